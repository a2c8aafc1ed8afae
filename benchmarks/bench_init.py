"""The public functions of initperf.init, argument checks and seed included, against torch.nn.init; and whole models."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import init as torch_init

from initperf import init, ops, rng
from initperf.init import fast_init, initialize

CALLS = {
    "uniform_": {"a": -0.1, "b": 0.1},
    "normal_": {"std": 0.02},
    "trunc_normal_": {"std": 0.02},
    "kaiming_uniform_": {"a": math.sqrt(5)},
    "kaiming_normal_": {"nonlinearity": "relu"},
    "xavier_normal_": {},
}


@pytest.mark.parametrize("shape", [(4, 5), (25, 40), (100, 100), (4096, 4096)])
@pytest.mark.parametrize("name", CALLS)
def test_init_functions(versus, name, shape):
    tensor = torch.empty(shape)
    ours, theirs = getattr(init, name), getattr(torch_init, name)
    arguments = CALLS[name]

    def check():
        spread = [f(torch.empty(300, 300), **arguments).std().item() for f in (ours, theirs)]
        assert spread[0] == pytest.approx(spread[1], rel=0.03)

    n = tensor.numel()
    versus(
        lambda: ours(tensor, **arguments),
        lambda: theirs(tensor, **arguments),
        check=check,
        group=f"init {name} {'x'.join(map(str, shape))}",
        budget=0.3,
        values=n,
        nbytes=4 * n,
    )


@pytest.mark.parametrize("size", [64, 256, 1024])
def test_init_orthogonal(versus, size):
    tensor = torch.empty(size, size)

    def check():
        gram = init.orthogonal_(tensor) @ tensor.t()
        assert (gram - torch.eye(size)).abs().max() < 1e-4

    versus(
        lambda: init.orthogonal_(tensor),
        lambda: torch_init.orthogonal_(tensor),
        check=check,
        group=f"init orthogonal_ {size}",
        budget=0.5,
        flops=round(8 / 3 * size**3),
    )


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})


def gpt2(width: int = 768, depth: int = 12, vocabulary: int = 50257, device: str = "cpu") -> nn.Module:
    """The parameters of GPT-2 small: 124 million in 148 tensors."""
    with torch.device("meta"):
        model = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocabulary, width),
                "wpe": nn.Embedding(1024, width),
                "h": nn.ModuleList([Block(width) for _ in range(depth)]),
                "ln_f": nn.LayerNorm(width),
            }
        )
    return model if device == "meta" else model.to_empty(device=device)


def torchs_gpt2(model: nn.Module) -> None:
    """What GPT-2's own code does, with torch.nn.init."""
    for name, p in model.named_parameters():
        if p.dim() >= 2:
            torch_init.normal_(p, 0.0, 0.02 / math.sqrt(24) if "c_proj" in name else 0.02)
        elif name.endswith("weight"):
            torch_init.ones_(p)
        else:
            torch_init.zeros_(p)


def test_init_whole_model(versus):
    model = gpt2()
    count = sum(p.numel() for p in model.parameters())

    def check():
        initialize(model, "gpt2", seed=1)
        spread = {n: p.std().item() for n, p in model.named_parameters() if n in ("wpe.weight", "h.3.c_proj.weight")}
        assert spread == pytest.approx({"wpe.weight": 0.02, "h.3.c_proj.weight": 0.02 / math.sqrt(24)}, rel=0.01)

    versus(
        lambda: initialize(model, "gpt2", seed=1),
        lambda: torchs_gpt2(model),
        check=check,
        group="init whole model, 124 M parameters",
        budget=2.0,
        values=count,
        nbytes=4 * count,
        tensors=len(list(model.parameters())),
    )


def test_init_from_meta(versus):
    """Memory and values in one step, against to_empty and the loop."""
    count = sum(p.numel() for p in gpt2(depth=4, device="meta").parameters())

    def check():
        model = gpt2(depth=4, device="meta")
        initialize(model, "gpt2", seed=1)
        assert model["wte"].weight.std().item() == pytest.approx(0.02, rel=0.01)

    versus(
        lambda: initialize(gpt2(depth=4, device="meta"), "gpt2", seed=1),
        lambda: torchs_gpt2(gpt2(depth=4)),
        check=check,
        group="init model from meta, 68 M parameters",
        budget=2.0,
        values=count,
        nbytes=4 * count,
    )


def test_init_small_model(versus):
    """LeNet-300-100, six tensors, against its layers' own reset_parameters."""
    model = nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))
    layers = [layer for layer in model if isinstance(layer, nn.Linear)]
    count = sum(p.numel() for p in model.parameters())

    def check():
        initialize(model, seed=1)
        assert model[0].weight.std().item() == pytest.approx(1 / math.sqrt(3 * 784), rel=0.01)

    versus(
        lambda: initialize(model, seed=1),
        lambda: [layer.reset_parameters() for layer in layers],
        check=check,
        group="init small model, LeNet-300-100",
        budget=0.5,
        values=count,
        nbytes=4 * count,
    )


def masks_of(model: nn.Module, density: float = 0.2) -> dict[str, torch.Tensor]:
    return {name: torch.rand(p.shape) < density for name, p in model.named_parameters() if p.dim() >= 2}


def test_init_whole_model_masked(versus):
    """With masks in the same pass; torch: its loop, then a multiplication a mask."""
    model = gpt2(depth=4)
    masks = masks_of(model)
    count = sum(p.numel() for p in model.parameters())
    parameters = dict(model.named_parameters())

    def theirs():
        torchs_gpt2(model)
        with torch.no_grad():
            for name, mask in masks.items():
                parameters[name].mul_(mask)

    def check():
        initialize(model, "gpt2", seed=1, masks=masks)
        assert all((parameters[name][~mask] == 0).all() for name, mask in masks.items())
        assert parameters["wpe.weight"][masks["wpe.weight"]].std().item() == pytest.approx(0.02, rel=0.01)

    versus(
        lambda: initialize(model, "gpt2", seed=1, masks=masks),
        theirs,
        check=check,
        group="init whole model with masks, 68 M parameters",
        budget=2.0,
        values=count,
        density=0.2,
    )


def test_init_whole_model_stats(versus):
    """With mean and variance of every parameter from the same pass; torch: its loop, then torch.var_mean."""
    model = gpt2(depth=4)
    count = sum(p.numel() for p in model.parameters())
    parameters = [p.detach() for p in model.parameters()]

    def theirs():
        torchs_gpt2(model)
        for p in parameters:
            torch.var_mean(p, correction=0)

    def check():
        found = {r.name: r.measured for r in initialize(model, "gpt2", seed=1, stats=True).records}
        assert found["wte.weight"][1] == pytest.approx(0.02**2, rel=0.01)

    versus(
        lambda: initialize(model, "gpt2", seed=1, stats=True),
        theirs,
        check=check,
        group="init whole model with stats, 68 M parameters",
        budget=2.0,
        values=count,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sample_many(versus, dtype):
    """The kernel alone on GPT-2's 148 tensors, against sample_ tensor by tensor."""
    tensors = [p.detach().to(dtype) for p in gpt2().parameters()]
    normal, zero = rng.normal(0.0, 0.02), rng.uniform(0.0, 0.0, dtype)
    distributions = [normal if t.dim() >= 2 else zero for t in tensors]
    streams = list(range(len(tensors)))
    many, one = (ops.implementation(name, "cpu") for name in ("sample_many_", "sample_"))
    count = sum(t.numel() for t in tensors)

    def loop():
        for tensor, distribution, stream in zip(tensors, distributions, streams, strict=True):
            one(tensor, *distribution, 1, stream)

    def check():
        loop()
        wanted = [t[-1].clone() for t in tensors]
        many(tensors, distributions, streams, 1)
        assert all(torch.equal(t[-1], w) for t, w in zip(tensors, wanted, strict=True))

    versus(
        lambda: many(tensors, distributions, streams, 1),
        {
            "sample_ by tensor": loop,
            "torch": lambda: [t.normal_(0.0, 0.02) if t.dim() >= 2 else t.zero_() for t in tensors],
        },
        check=check,
        group=f"sample_many_, 124 M values, {dtype}",
        budget=1.0,
        values=count,
        nbytes=count * dtype.itemsize,
    )


@pytest.mark.parametrize("density", [0.1, 0.5])
def test_sample_survivors(versus, density):
    """A sparse layer's values, against making the dense tensor and choosing from it."""
    shape, normal = (4096, 4096), rng.normal(0.0, 0.02)
    mask = torch.rand(shape) < density
    bits = torch.from_numpy(np.packbits(mask.numpy(), bitorder="little"))
    values = torch.empty(int(mask.sum()), 1)

    def check():
        init.sample_survivors_into(values, normal, bits, shape, seed=1)
        assert torch.equal(values[:, 0], init.sample_into(torch.empty(shape), normal, seed=1)[mask])

    versus(
        lambda: init.sample_survivors_into(values, normal, bits, shape, seed=1),
        lambda: torch.empty(shape).normal_(0.0, 0.02)[mask],
        check=check,
        group="sample survivors 4096 x 4096",
        budget=1.0,
        values=mask.numel(),
        density=density,
    )


def test_init_constructor(versus):
    def make():
        return nn.TransformerEncoder(nn.TransformerEncoderLayer(512, 8, 2048, batch_first=True), 2)

    def ours():
        with fast_init():
            return make()

    def check():
        spread = [f().layers[0].linear1.weight.std().item() for f in (ours, make)]
        assert spread[0] == pytest.approx(spread[1], rel=0.02)

    versus(ours, make, check=check, group="init constructor under fast_init", budget=1.0)
