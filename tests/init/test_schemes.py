"""Schemes: each torch.nn class's own reset, compared with the real one; GPT-2's and timm's; parametrized weights; transformers' models."""

import inspect
import math

import pytest
import torch
from scipy import stats as scipy_stats
from torch import nn
from torch.nn.utils import parametrizations

from initperf import InitPerfError
from initperf.init import describe, initialize

# class -> how to make one with enough values for a comparison
LAYERS = {
    nn.Linear: lambda: nn.Linear(200, 300),
    nn.modules.linear.NonDynamicallyQuantizableLinear: lambda: nn.modules.linear.NonDynamicallyQuantizableLinear(
        90, 80
    ),
    nn.Bilinear: lambda: nn.Bilinear(30, 40, 20),
    nn.Conv1d: lambda: nn.Conv1d(40, 60, 9, groups=2),
    nn.Conv2d: lambda: nn.Conv2d(40, 50, 5),
    nn.Conv3d: lambda: nn.Conv3d(12, 30, 4),
    nn.ConvTranspose1d: lambda: nn.ConvTranspose1d(60, 50, 9),
    nn.ConvTranspose2d: lambda: nn.ConvTranspose2d(40, 50, 5, groups=2),
    nn.ConvTranspose3d: lambda: nn.ConvTranspose3d(12, 30, 4),
    nn.Embedding: lambda: nn.Embedding(300, 100),
    nn.EmbeddingBag: lambda: nn.EmbeddingBag(300, 100),
    nn.RNN: lambda: nn.RNN(90, 100, num_layers=2, bidirectional=True),
    nn.LSTM: lambda: nn.LSTM(50, 60, proj_size=20),
    nn.GRU: lambda: nn.GRU(50, 60),
    nn.RNNCell: lambda: nn.RNNCell(90, 100),
    nn.LSTMCell: lambda: nn.LSTMCell(50, 60),
    nn.GRUCell: lambda: nn.GRUCell(50, 60),
    nn.MultiheadAttention: lambda: nn.MultiheadAttention(80, 4, kdim=60, vdim=70),
    nn.Transformer: lambda: nn.Transformer(64, 4, 1, 1, 100, batch_first=True),
    nn.AdaptiveLogSoftmaxWithLoss: lambda: nn.AdaptiveLogSoftmaxWithLoss(100, 200, [50, 100]),
    nn.PReLU: lambda: nn.PReLU(2000, init=0.1),
    nn.BatchNorm1d: lambda: nn.BatchNorm1d(2000),
    nn.BatchNorm2d: lambda: nn.BatchNorm2d(2000),
    nn.BatchNorm3d: lambda: nn.BatchNorm3d(2000),
    nn.SyncBatchNorm: lambda: nn.SyncBatchNorm(2000),
    nn.InstanceNorm1d: lambda: nn.InstanceNorm1d(2000, affine=True),
    nn.InstanceNorm2d: lambda: nn.InstanceNorm2d(2000, affine=True),
    nn.InstanceNorm3d: lambda: nn.InstanceNorm3d(2000, affine=True),
    nn.LayerNorm: lambda: nn.LayerNorm(2000),
    nn.GroupNorm: lambda: nn.GroupNorm(4, 2000),
    nn.RMSNorm: lambda: nn.RMSNorm(2000),
}
LEFT_OUT = {
    "lazy classes": "they become one of the others at their first input; before it initialize refuses them",
    "_ConvNd, _NormBase, RNNBase, RNNCellBase and other bases": "abstract: their subclasses are above",
    "_ConvTransposeMixin": "kept by torch for old code: nothing is built on it",
    "CrossMapLRN2d": "its reset_parameters does nothing: it has no parameters",
}


def resettable():
    """Every class of torch.nn.modules that has a reset function."""
    found = set()
    for name in dir(nn.modules):
        part = getattr(nn.modules, name)
        members = [part] if inspect.isclass(part) else list(vars(part).values()) if inspect.ismodule(part) else []
        found |= {
            c
            for c in members
            if inspect.isclass(c)
            and issubclass(c, nn.Module)
            and (hasattr(c, "reset_parameters") or hasattr(c, "_reset_parameters"))
        }
    return found


def test_every_class_of_torch_nn_with_a_reset_is_compared_or_left_out_with_a_reason():
    found = resettable()
    assert len(found) > 40
    lazy = {c for c in found if issubclass(c, nn.modules.lazy.LazyModuleMixin)}
    bases = {c for c in found if c.__name__.startswith("_") or c.__name__ in ("RNNBase", "RNNCellBase", "Module")}
    rest = found - lazy - bases - set(LAYERS)
    assert {c.__name__ for c in rest} <= {"CrossMapLRN2d"}
    alone = {b.__name__ for b in bases - lazy if not any(issubclass(known, b) for known in LAYERS)}
    assert alone <= {"_ConvTransposeMixin"}
    assert LEFT_OUT.keys() >= alone | {c.__name__ for c in rest}


@pytest.mark.parametrize("kind", LAYERS, ids=lambda c: c.__name__)
def test_the_distribution_moments_and_bounds_are_those_of_the_real_reset(kind):
    torch.manual_seed(0)
    theirs = LAYERS[kind]()
    getattr(theirs, "reset_parameters", getattr(theirs, "_reset_parameters", None))()  # as its constructor does, again
    ours = LAYERS[kind]()
    with torch.no_grad():
        for p in ours.parameters():
            p.fill_(math.nan)
    result = initialize(ours, seed=1)
    expected = dict(theirs.named_parameters())
    compared = 0
    for name, parameter in ours.named_parameters():
        x, y = parameter.detach().flatten().double(), expected[name].detach().flatten().double()
        if y.min() == y.max():
            assert torch.equal(x, y), name
            compared += 1
            continue
        init = result[name]
        n = len(x)
        mean, variance = init.moments(tuple(parameter.shape))
        # the distribution that we say, against both: theirs decides whether it is torch's
        for values in (x, y):
            assert abs(values.mean() - mean) < 5 * math.sqrt(variance / n), name
            assert abs(values.var() / variance - 1) < 5 * math.sqrt(2 / n), name
            if init.function == "uniform":
                low, high = init.args
                assert low <= values.min(), name
                assert values.max() <= high, name
                # the farthest of n uniform values is within 12 / n of the bound but once in exp(12)
                assert high - values.max() < 12 / n * (high - low), name
                assert values.min() - low < 12 / n * (high - low), name
            cdf = scipy_stats.uniform(init.args[0], init.args[1] - init.args[0]) if init.function == "uniform" else None
            cdf = cdf or scipy_stats.norm(*init.args[:2])
            assert scipy_stats.kstest(values.numpy(), cdf.cdf).pvalue > 1e-5, name
        compared += 1
    assert compared == len(expected)


def test_gpt2_scales_residual_projections_of_transformers_gpt2_and_of_a_plain_model():
    pytest.importorskip("transformers", reason="transformers is not installed")
    from families import build

    torch.manual_seed(0)
    real = build("GPT2")
    theirs = {n: p.detach().std().item() for n, p in real.named_parameters()}
    initialize(real, "gpt2", seed=1)
    for name, p in real.named_parameters():
        n = p.numel()
        assert abs(p.std().item() - theirs[name]) <= 5 * theirs[name] * math.sqrt(1 / n), name
    layers = 3
    assert real.transformer.h[0].mlp.c_proj.weight.std().item() == pytest.approx(0.02 / math.sqrt(2 * layers), rel=0.03)

    plain = nn.ModuleDict(
        {
            "embedding": nn.Embedding(500, 64),
            "layers": nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 256, batch_first=True), 5),
            "head": nn.Linear(64, 500),
        }
    )
    initialize(plain, "gpt2", seed=1)
    for name, p in plain.named_parameters():
        if p.dim() < 2:
            assert (p == (0.0 if "bias" in name else 1.0)).all(), name
            continue
        residual = "out_proj" in name or "linear2" in name
        expected = 0.02 / math.sqrt(2 * 5) if residual else 0.02
        assert p.std().item() == pytest.approx(expected, rel=5 * math.sqrt(0.5 / p.numel())), name


def test_timm_means_fan_out_for_convolutions_and_cut_normals_for_linear_layers():
    model = nn.Sequential(nn.Conv2d(20, 30, 3), nn.Conv2d(24, 24, 3, groups=24), nn.Linear(300, 100))
    result = initialize(model, "timm", seed=1)
    assert str(result["0.weight"]) == f"normal(0, {math.sqrt(2 / (30 * 9)):.6g})"
    assert str(result["2.weight"]) == "trunc_normal(0, 0.02, -2, 2)"
    assert all((layer.bias == 0).all() for layer in model)


NORMED = {
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(60, 40)),
    "weight_norm of columns": lambda: parametrizations.weight_norm(nn.Linear(60, 40), dim=1),
    "weight_norm of all": lambda: parametrizations.weight_norm(nn.Linear(60, 40), dim=None),
    "old weight_norm": lambda: nn.utils.weight_norm(nn.Linear(60, 40)),
    "old weight_norm of columns": lambda: nn.utils.weight_norm(nn.Linear(60, 40), dim=1),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("scheme", [None, "kaiming_normal", "orthogonal"])
@pytest.mark.parametrize("kind", NORMED)
def test_a_weight_normed_layer_starts_as_the_plain_layer_does(kind, scheme):
    plain, layer = nn.Sequential(nn.Linear(60, 40)), nn.Sequential(NORMED[kind]())
    with torch.no_grad():
        for p in layer.parameters():
            p.fill_(math.nan)
    initialize(plain, scheme, seed=3)
    result = initialize(layer, scheme, seed=3)
    assert "0.weight" in {r.name for r in result.records}
    torch.testing.assert_close(layer[0].weight.detach(), plain[0].weight.detach())
    assert torch.equal(layer[0].bias, plain[0].bias)
    x = torch.randn(5, 60)
    torch.testing.assert_close(layer(x), plain(x))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("register", [parametrizations.spectral_norm, nn.utils.spectral_norm], ids=["new", "old"])
def test_a_spectral_normed_layer_has_norm_one_of_its_new_values(register):
    layer = register(nn.Linear(60, 40))
    mode = layer.training
    initialize(layer, "kaiming_normal", seed=1)
    assert layer.training == mode
    layer.eval()
    layer(torch.zeros(1, 60))  # the old form computes its weight here
    assert torch.linalg.matrix_norm(layer.weight.detach(), 2).item() == pytest.approx(1, abs=0.05)
    plain = nn.Linear(60, 40)
    initialize(plain, "kaiming_normal", seed=1)
    ratio = layer.weight.detach() / plain.weight.detach()
    torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=1e-3, atol=0)


@pytest.mark.parametrize("options", [{}, {"orthogonal_map": "matrix_exp"}, {"use_trivialization": False}], ids=str)
@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (50, 50)])
def test_an_orthogonal_layer_is_orthogonal_again_random_and_reproducible(shape, options):
    weights = []
    for seed in (1, 1, 2):
        layer = parametrizations.orthogonal(nn.Linear(*shape), **options)
        torch.manual_seed(0)
        initialize(layer, seed=seed)
        after = torch.rand(1)
        torch.manual_seed(0)
        assert torch.equal(after, torch.rand(1))  # torch's generator is as it was
        weights.append(layer.weight.detach())
    w = weights[0] if weights[0].shape[0] >= weights[0].shape[1] else weights[0].T
    torch.testing.assert_close(w.T @ w, torch.eye(w.shape[1]), atol=1e-5, rtol=0)
    assert torch.equal(weights[0], weights[1])
    assert not torch.allclose(weights[0], weights[2], atol=1e-2)


FAMILIES = ["Bert", "GPT2", "Llama", "ViT", "ResNet", "T5", "Whisper", "CLIP", "Mamba", "Hubert", "Swin"]


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_scheme_a_transformers_model_starts_as_its_own_init_weights_does(family):
    pytest.importorskip("transformers", reason="transformers is not installed")
    from families import build
    from recorded import recording

    torch.manual_seed(0)
    with recording() as truth:
        model = build(family)
    made = {n: p.detach().clone() for n, p in model.named_parameters()}
    flags = [getattr(m, "_is_hf_initialized", None) for m in model.modules()]
    text = dict((r.name, r.text) for r in initialize(model, seed=1).records)
    once = {n: p.detach().clone() for n, p in model.named_parameters()}
    torch.manual_seed(7)
    initialize(model, seed=1)
    changed = 0
    for name, p in model.named_parameters():
        assert torch.equal(p, once[name]), name
        if truth.of(p) is not None and p.numel() >= 1000 and "parametrizations" not in name:
            changed += 1
            assert not torch.equal(p, made[name]), name
            assert abs(p.std() / made[name].std() - 1) < 6 / math.sqrt(p.numel()), name
            assert "_init_weights" in text[name], name
    assert changed >= 5
    assert flags == [getattr(m, "_is_hf_initialized", None) for m in model.modules()]


def test_the_fan_in_of_transformers_conv1d_is_its_first_dimension():
    pytest.importorskip("transformers", reason="transformers is not installed")
    from families import build

    result = initialize(build("GPT2"), "kaiming_normal", seed=1)
    assert result["transformer.h.0.attn.c_attn.weight"].args[1] == pytest.approx(math.sqrt(2 / 96))


@pytest.mark.parametrize("scheme", [None, "xavier_normal"])
@pytest.mark.parametrize("family", ["Bert", "Llama", "ViT", "Mamba", "ResNet"])
def test_a_transformers_model_from_the_meta_device_gets_the_same_parameters_and_buffers(family, scheme):
    pytest.importorskip("transformers", reason="transformers is not installed")
    from families import build

    real = build(family)
    with torch.device("meta"):
        model = build(family)
    initialize(real, scheme, seed=1)
    initialize(model, scheme, seed=1)
    want, got = ({**dict(m.named_parameters()), **dict(m.named_buffers())} for m in (real, model))
    assert want.keys() == got.keys()
    for name, tensor in want.items():
        assert torch.equal(tensor, got[name]), name


def test_a_transformers_model_with_unknown_buffers_on_the_meta_device_is_refused_and_untouched():
    pytest.importorskip("transformers", reason="transformers is not installed")
    from families import build

    with torch.device("meta"):
        model = build("Llama")
    model.norm.weight = nn.Parameter(torch.full((96,), 5.0))
    model.layers[0].register_buffer("scale", torch.ones(3, device="meta"))
    with pytest.raises(InitPerfError, match="layers.0.scale"):
        initialize(model, seed=1)
    assert (model.norm.weight == 5).all()
    assert model.layers[0].mlp.up_proj.weight.is_meta


def test_a_named_scheme_and_rules_on_a_transformers_model_leave_the_rest_to_its_init_weights():
    pytest.importorskip("transformers", reason="transformers is not installed")
    from families import build

    torch.manual_seed(0)
    model = build("Llama")
    kept = model.layers[0].mlp.up_proj.weight.detach().clone()
    with torch.no_grad():
        model.norm.weight.fill_(5)
    initialize(model, "kaiming_normal", seed=1, rules={"*0.mlp.up_proj*": "keep", "*1.mlp.up_proj*": 0.5})
    assert torch.equal(model.layers[0].mlp.up_proj.weight, kept)
    assert (model.layers[1].mlp.up_proj.weight == 0.5).all()
    assert (model.norm.weight == 1).all()  # LlamaRMSNorm, a class of transformers' own
    found = {f.name: f.scheme for f in describe(model).findings}
    assert found["layers.1.self_attn.q_proj.weight"] == "kaiming_normal"


def test_a_transformers_model_inside_another_and_layers_around_it_keep_their_own_ways():
    pytest.importorskip("transformers", reason="transformers is not installed")
    from families import build

    model = nn.ModuleDict({"body": build("Bert"), "head": nn.Linear(96, 300)})
    result = initialize(model, seed=1)
    assert str(result["head.weight"]).startswith("uniform")
    assert model["body"].encoder.layer[0].output.dense.weight.std().item() == pytest.approx(0.02, rel=0.03)
