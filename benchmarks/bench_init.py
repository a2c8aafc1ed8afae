"""The public functions of initperf.init, argument checks and seed included, against torch.nn.init; and whole models."""

import math

import pytest
import torch
from torch import nn
from torch.nn import init as torch_init

from initperf import init
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


def gpt2(width: int = 768, depth: int = 12, vocabulary: int = 50257) -> nn.Module:
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
    return model.to_empty(device="cpu")


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
