"""initialize: torch's own distributions by class, named schemes, rules, masks and rescaling, meta models, shards; checked before anything is touched."""

import contextlib
import copy
import inspect
import math

import numpy as np
import pytest
import torch
from scipy import stats as scipy_stats
from torch import nn
from torch.nn import init as torch_init

import processes
from initperf import init, ops, rng
from initperf.core.checks import InitPerfError
from initperf.init import Init, initialize
from initperf.layers.linear import MaskedLinear
from tolerance import bits

NORMS = {
    "batch": lambda: nn.BatchNorm2d(7),
    "instance": lambda: nn.InstanceNorm1d(7, affine=True),
    "layer": lambda: nn.LayerNorm(7),
    "group": lambda: nn.GroupNorm(1, 7),
    "rms": lambda: nn.RMSNorm(7),
}
LAYERS = {
    "linear": lambda: nn.Linear(200, 300),
    "conv1d": lambda: nn.Conv1d(40, 60, 9, groups=2),
    "conv2d": lambda: nn.Conv2d(40, 50, 5),
    "conv3d": lambda: nn.Conv3d(12, 30, 4),
    "transposed1d": lambda: nn.ConvTranspose1d(60, 50, 9),
    "transposed2d": lambda: nn.ConvTranspose2d(40, 50, 5, groups=2),
    "transposed3d": lambda: nn.ConvTranspose3d(12, 30, 4),
    "bilinear": lambda: nn.Bilinear(30, 40, 20),
    "embedding": lambda: nn.Embedding(300, 100, padding_idx=3),
    "bag": lambda: nn.EmbeddingBag(300, 100),
    "rnn": lambda: nn.RNN(90, 100, num_layers=2, bidirectional=True),
    "lstm": lambda: nn.LSTM(50, 60, proj_size=20),
    "gru": lambda: nn.GRU(50, 60),
    "rnn cell": lambda: nn.RNNCell(90, 100),
    "lstm cell": lambda: nn.LSTMCell(50, 60),
    "gru cell": lambda: nn.GRUCell(50, 60),
    "attention": lambda: nn.MultiheadAttention(80, 4, add_bias_kv=True),
    "attention, other keys": lambda: nn.MultiheadAttention(80, 4, kdim=60, vdim=70),
    "transformer": lambda: nn.Transformer(64, 4, 1, 1, 100, batch_first=True),
    "encoder layer": lambda: nn.TransformerEncoderLayer(64, 4, 100, batch_first=True),
    "decoder layer": lambda: nn.TransformerDecoderLayer(64, 4, 100, batch_first=True),
    "adaptive softmax": lambda: nn.AdaptiveLogSoftmaxWithLoss(100, 200, [50, 100]),
    "prelu": lambda: nn.PReLU(7, init=0.1),
    **NORMS,
}


def mlp():
    return nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 10))


def snapshot(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(bits(a[k]), bits(b[k])) for k in a if a[k].is_floating_point())


@pytest.mark.parametrize("kind", LAYERS)
def test_without_a_scheme_every_parameter_is_distributed_as_torch_makes_it(kind):
    torch.manual_seed(0)
    made = dict(LAYERS[kind]().named_parameters())
    model = LAYERS[kind]()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(math.nan)
    initialize(model, seed=1)
    for name, parameter in model.named_parameters():
        ours, theirs = parameter.detach().flatten().double(), made[name].detach().flatten().double()
        if len(theirs.unique()) == 1:
            assert torch.equal(ours, theirs), name
        elif ours.numel() >= 1000:
            assert scipy_stats.ks_2samp(ours, theirs).pvalue > 1e-5, name
            assert abs(ours.std() / theirs.std() - 1) < 6 * math.sqrt(0.5 / len(ours)) * math.sqrt(2), name
        else:  # too few to compare shapes: the ranges of uniform values, the spread of others
            assert ours.abs().max() < 1.7 * theirs.abs().max() + 1e-12, name
            assert ours.std() < 2 * theirs.std() + 1e-12, name
            assert len(ours.unique()) > 1, name


def test_every_class_of_torch_nn_with_parameters_of_its_own_is_known():
    """Every public class of torch.nn that defines reset_parameters is covered by LAYERS, or builds on one that is."""
    covered = {c for make in LAYERS.values() for m in make().modules() for c in type(m).__mro__}
    resets = {
        c
        for _, c in inspect.getmembers(nn, inspect.isclass)
        if issubclass(c, nn.Module)
        and ("reset_parameters" in vars(c) or "_reset_parameters" in vars(c))
        and not issubclass(c, nn.modules.lazy.LazyModuleMixin)
    }
    assert resets <= covered


def test_values_are_what_the_functional_api_gives_for_the_stream_of_the_name():
    model = mlp()
    initialize(model, "kaiming_normal", seed=9)
    for i in (0, 2):
        w = model[i].weight
        std = torch_init.calculate_gain("relu") / math.sqrt(w.shape[1])
        expected = init.sample_into(
            torch.empty_like(w), rng.normal(0.0, std), seed=9, stream=rng.stream_of(f"{i}.weight")
        )
        assert torch.equal(bits(w.detach()), bits(expected))
        assert (model[i].bias == 0).all()


def test_adding_a_layer_changes_no_other_layer():
    model, longer = mlp(), mlp()
    longer.add_module("extra", nn.Linear(10, 10))
    initialize(model, seed=1)
    initialize(longer, seed=1)
    for name, value in model.state_dict().items():
        assert torch.equal(value, longer.state_dict()[name])


def test_the_seed_decides_and_without_one_manual_seed_does():
    a, b = mlp(), mlp()
    torch.manual_seed(5)
    first = initialize(a)
    assert initialize(b, seed=first.seed).seed == first.seed
    assert same(a.state_dict(), b.state_dict())
    torch.manual_seed(5)
    with torch.device("meta"):
        initialize(b)
    assert same(a.state_dict(), b.state_dict())
    initialize(b, seed=first.seed + 1)
    assert not same(a.state_dict(), b.state_dict())


def test_wrappers_do_not_change_the_values():
    model = mlp()
    initialize(model, seed=1)
    wrapped = torch.compile(mlp(), backend="eager")
    initialize(wrapped, seed=1)
    assert same(model.state_dict(), wrapped._orig_mod.state_dict())

    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = mlp()

    parallel = Module()
    initialize(parallel, seed=1)
    assert same(model.state_dict(), parallel.module.state_dict())


def test_parametrized_and_pruned_weights_count_as_the_weight():
    from torch.nn.utils import parametrize, prune

    class Double(nn.Module):
        def forward(self, w):
            return 2 * w

    plain, parametrized, pruned = mlp(), mlp(), mlp()
    parametrize.register_parametrization(parametrized[0], "weight", Double())
    prune.l1_unstructured(pruned[0], "weight", 0.5)
    for model in (plain, parametrized, pruned):
        result = initialize(model, seed=1)
        assert "0.weight" in {r.name for r in result.records}
    assert torch.equal(parametrized[0].weight, 2 * plain[0].weight)
    mask = pruned[0].weight_mask
    assert torch.equal(pruned[0].weight_orig, plain[0].weight * mask)


def test_a_tied_parameter_goes_by_its_first_name():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(50, 20)
            self.head = nn.Linear(20, 50, bias=False)
            self.head.weight = self.embedding.weight

    tied = Tied()
    result = initialize(tied, seed=1)
    assert [r.name for r in result.records] == ["embedding.weight"]
    assert tied.head.weight is tied.embedding.weight
    assert str(result["embedding.weight"]) == "normal(0, 1)"


def test_running_statistics_start_anew_and_padding_rows_are_zero():
    model = nn.ModuleDict({"norm": nn.BatchNorm1d(5), "embedding": nn.Embedding(9, 4, padding_idx=2)})
    model["norm"](torch.randn(8, 5))
    result = initialize(model, "gpt2", seed=1)
    assert (model["norm"].running_mean == 0).all()
    assert (model["norm"].running_var == 1).all()
    assert model["norm"].num_batches_tracked == 0
    assert (model["embedding"].weight[2] == 0).all()
    assert (model["embedding"].weight[3] != 0).all()
    assert "embedding.weight" not in result  # f(seed, stream, index) alone does not give it back
    kept = nn.Parameter(torch.ones(9, 4))
    model["embedding"].weight = kept
    initialize(model, seed=1, rules={"embedding.*": "keep"})
    assert (kept == 1).all()


@pytest.mark.parametrize("scheme", ["kaiming_normal", "xavier_uniform", "trunc_normal", "orthogonal", "timm"])
def test_a_named_scheme_means_weights_while_biases_norms_and_activations_start_neutral(scheme):
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.PReLU(), nn.ConvTranspose2d(5, 4, 3), nn.LSTM(3, 4))
    result = initialize(model, scheme, seed=2)
    constants = {name: value.args[0] for name, value in result.items() if value.function == "constant"}
    assert constants == {
        "0.bias": 0, "1.weight": 1, "1.bias": 0, "2.weight": 0.25, "3.bias": 0, "4.bias_ih_l0": 0, "4.bias_hh_l0": 0
    }  # fmt: skip


@pytest.mark.parametrize("scheme", ["kaiming_normal", "kaiming_uniform", "xavier_normal", "xavier_uniform"])
@pytest.mark.parametrize("shape", [(30, 20), (8, 4, 3, 3), (6, 10, 5)])
def test_a_named_scheme_has_torchs_exact_bounds(scheme, shape):
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.empty(shape))

    holder = Holder()
    initialize(holder, scheme, seed=2)
    expected = getattr(init, f"{scheme}_")
    stream_zero = expected(torch.empty(shape), seed=2)
    again = initialize(holder, scheme, seed=2)["weight"].distribution(torch.float32)
    assert torch.equal(stream_zero, init.sample_into(torch.empty(shape), again, seed=2, stream=0))


def test_the_gpt2_scheme_shrinks_projections_into_the_residual_stream():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.c_attn, self.c_proj = nn.Linear(8, 24), nn.Linear(8, 8)
            self.mlp = nn.ModuleDict({"c_fc": nn.Linear(8, 32), "c_proj": nn.Linear(32, 8)})

    model = nn.ModuleDict({"wte": nn.Embedding(50, 8), "h": nn.ModuleList([Block() for _ in range(3)])})
    result = initialize(model, "gpt2", seed=1)
    assert result["wte.weight"] == Init("normal", (0.0, 0.02))
    assert result["h.0.c_attn.weight"] == Init("normal", (0.0, 0.02))
    assert result["h.2.c_proj.weight"] == result["h.0.mlp.c_proj.weight"] == Init("normal", (0.0, 0.02 / math.sqrt(6)))
    assert result["h.1.c_proj.bias"] == Init("constant", (0.0,))


def test_the_timm_scheme_tells_convolutions_from_linear_layers():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(8, 4), nn.LayerNorm(4))
    result = initialize(model, "timm", seed=1)
    assert result["0.weight"].args == pytest.approx((0.0, math.sqrt(2 / (8 * 9))))
    assert result["1.weight"] == Init("trunc_normal", (0.0, 0.02, -2.0, 2.0))
    assert result["2.weight"] == Init("constant", (1.0,))


def test_rules_override_the_scheme_and_the_last_that_matches_counts():
    model = mlp()
    before = model[2].bias.detach().clone()
    result = initialize(
        model,
        "xavier_normal",
        seed=1,
        rules={"*": "zeros", "0.*": "kaiming_uniform", "2.weight": Init("normal", (1.0, 0.1)), "2.bias": "keep"},
    )
    assert result["0.weight"].function == "uniform"
    assert result["0.bias"] == Init("constant", (0.0,))
    assert result["2.weight"] == Init("normal", (1.0, 0.1))
    assert torch.equal(model[2].bias, before)
    assert "2.bias" not in result


def test_a_function_decides_by_name_parameter_and_module():
    seen = []

    def choose(name, parameter, module):
        seen.append((name, tuple(parameter.shape), type(module)))
        return {"0.weight": "orthogonal", "0.bias": 0.5, "2.weight": rng.uniform(1.0, 2.0, torch.float32)}.get(name)

    model = mlp()
    result = initialize(model, choose, seed=1)
    assert seen[0] == ("0.weight", (30, 20), nn.Linear)
    gram = model[0].weight.t() @ model[0].weight
    assert (gram - torch.eye(20)).abs().max() < 1e-5
    assert (model[0].bias == 0.5).all()
    assert ((model[2].weight >= 1) & (model[2].weight < 2)).all()
    assert result["2.bias"].function == "uniform"  # None: the class's own


class Custom(nn.Module):
    """A layer with its own reset_parameters, and a child that torch knows."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.empty(40, 50))
        self.child = nn.Linear(4, 4)
        self.reset_parameters()

    def reset_parameters(self):
        torch_init.normal_(self.scale, 3.0, 0.1)


def test_a_custom_reset_runs_reproducibly_and_apart_from_the_rest():
    a = nn.Sequential(Custom(), Custom())
    b = copy.deepcopy(a)
    result = initialize(a, seed=1)
    initialize(b, seed=1)
    assert same(a.state_dict(), b.state_dict())
    assert not torch.equal(a[0].scale, a[1].scale)
    initialize(b, seed=2)
    assert not torch.equal(a[0].scale, b[0].scale)
    assert abs(a[0].scale.mean() - 3) < 0.02
    assert {r.name: r.text for r in result.records}["0.scale"] == "Custom.reset_parameters()"
    assert "0.scale" not in result
    assert "0.child.weight" in result
    assert torch_init.normal_.__module__ == "torch.nn.init"


def test_a_mask_holds_for_a_parameter_that_a_custom_reset_filled():
    model, mask = Custom(), torch.rand(40, 50) < 0.5
    initialize(model, seed=1, masks={"scale": mask})
    assert torch.equal(model.scale != 0, mask)


def test_a_parents_reset_counts_more_than_its_childrens_and_a_rule_more_than_both():
    class Parent(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.own = nn.Parameter(torch.empty(2))

        def reset_parameters(self):
            for p in self.parameters():
                nn.init.constant_(p, 7.0)

    model = Parent()
    result = initialize(model, seed=1, rules={"b.weight": "ones"})
    assert (model.a.weight == 7).all()
    assert (model.own == 7).all()
    assert (model.b.weight == 1).all()
    assert {r.name: r.text for r in result.records}["a.weight"] == "Parent.reset_parameters()"


class Raw(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.gamma = nn.Parameter(torch.ones(4))


class Nameless(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.module = nn.Parameter(torch.ones(4))


REFUSED = {
    "raw parameter": (Raw, {}, "gamma.*Raw"),
    "raw parameter, named scheme": (Raw, {"scheme": "kaiming_normal"}, "gamma"),
    "unknown scheme": (mlp, {"scheme": "lecun"}, "lecun"),
    "scheme of a wrong type": (mlp, {"scheme": ["zeros"]}, r"\['zeros'\]"),
    "a function's wrong answer": (mlp, {"scheme": lambda *_: "x"}, "'x'"),
    "unmatched rule": (mlp, {"rules": {"3.*": "zeros"}}, r"0\.weight.*3\.\*"),
    "negative seed": (mlp, {"seed": -1}, "2\\*\\*64"),
    "seed beyond 64 bits": (mlp, {"seed": 2**64}, "2\\*\\*64"),
    "nan std": (mlp, {"rules": {"0.weight": Init("normal", (0.0, math.nan))}}, "nan"),
    "infinite std": (mlp, {"rules": {"0.weight": Init("normal", (0.0, math.inf))}}, "inf"),
    "negative std": (mlp, {"rules": {"2.bias": Init("normal", (0.0, -1.0))}}, "-1"),
    "bounds the wrong way": (mlp, {"rules": {"2.bias": Init("uniform", (1.0, 0.0))}}, "1.0"),
    "truncation the wrong way": (
        mlp,
        {"rules": {"0.weight": Init("trunc_normal", (0.0, 1.0, 2.0, 1.0))}},
        "a <= b.*a=2",
    ),
    "truncation of no width": (mlp, {"rules": {"0.weight": Init("trunc_normal", (0.0, -1.0, -2.0, 2.0))}}, "std > 0"),
    "nan bound": (mlp, {"rules": {"2.bias": Init("uniform", (0.0, math.nan))}}, "nan"),
    "a seed that is no integer": (mlp, {"seed": 1.5}, "int.*float"),
    "unknown function": (mlp, {"rules": {"2.bias": Init("gamma", (1.0,))}}, "gamma"),
    "orthogonal bias": (mlp, {"rules": {"2.bias": Init("orthogonal", (1.0,))}}, "2.bias"),
    "mask of a wrong shape": (mlp, {"masks": {"0.weight": torch.ones(20, 30, dtype=torch.bool)}}, r"\(30, 20\)"),
    "mask of a wrong dtype": (mlp, {"masks": {"0.weight": torch.ones(30, 20)}}, "bool"),
    "two masks of one parameter": (
        mlp,
        {"masks": {name: torch.ones(30, 20, dtype=torch.bool) for name in ("0.weight", "module.0.weight")}},
        "one mask for 0.weight",
    ),
    "mask of nothing": (mlp, {"masks": {"9.weight": torch.ones(30, 20, dtype=torch.bool)}}, "9.weight"),
    "unknown rescaling": (mlp, {"rescale": "rows"}, "rows"),
    "rules as a list": (mlp, {"rules": [("*.bias", "zeros")]}, "as a dict"),
    "masks as a list": (mlp, {"masks": [torch.ones(30, 20, dtype=torch.bool)]}, "as a dict"),
    "a function of torch.nn.init": (mlp, {"scheme": nn.init.kaiming_normal_}, "as a name"),
    "measured without sample": (mlp, {"rescale": "measured"}, "sample"),
    "sample without measured": (mlp, {"sample": torch.ones(1, 20)}, "sample"),
    "device for a model with memory": (mlp, {"device": "cpu"}, "meta"),
    "lazy": (lambda: nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(3)), {}, "1.weight.*forward pass"),
    "integer parameter": (
        lambda: nn.ParameterList([nn.Parameter(torch.ones(3, dtype=torch.int32), requires_grad=False)]),
        {"scheme": lambda *_: "zeros"},
        "int32",
    ),
    "a name that is empty without wrappers' parts": (Nameless, {"scheme": lambda *_: "zeros"}, "name.*'module'"),
    "the same name twice": (
        lambda: nn.ModuleDict({"a": nn.Linear(2, 2), "module": nn.ModuleDict({"a": nn.Linear(2, 2)})}),
        {},
        "a.weight",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_and_nothing_is_touched(case):
    make, arguments, message = REFUSED[case]
    model = make()
    lazy = case == "lazy"
    before = None if lazy else snapshot(model)
    versions = [p._version for p in model.parameters()]
    with pytest.raises(InitPerfError, match=f"(?s)Expected .*{message}|{message}.*"):
        initialize(model, **{"seed": 1, **arguments})
    assert [p._version for p in model.parameters()] == versions
    assert lazy or same(before, snapshot(model))


def test_a_rule_covers_a_raw_parameter():
    model = Raw()
    initialize(model, seed=1, rules={"gamma": "ones"})
    assert (model.gamma == 1).all()
    with pytest.raises(InitPerfError, match="model to be"):
        initialize("model")


def test_a_rule_with_a_named_scheme_covers_a_raw_matrix_of_any_name():
    model = nn.ParameterDict({"w": torch.empty(200, 300)})
    done = initialize(model, seed=1, rules={"w": "xavier_normal"})
    assert done["w"] == Init("normal", (0.0, math.sqrt(2 / 500)))


def half(shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5


def test_a_mask_zeroes_what_is_pruned_and_leaves_the_rest():
    mask = half((30, 20))
    dense, pruned = mlp(), mlp()
    initialize(dense, seed=1)
    initialize(pruned, seed=1, masks={"0.weight": mask})
    assert torch.equal(pruned[0].weight, dense[0].weight * mask)
    assert torch.equal(pruned[2].weight, dense[2].weight)


def test_masked_layers_keep_to_their_own_mask_or_take_the_new_one():
    mask, other = half((30, 20)), half((30, 20), 1)
    model = nn.Sequential(MaskedLinear(20, 30, mask=mask))
    dense = nn.Sequential(nn.Linear(20, 30))
    initialize(dense, seed=1)
    initialize(model, seed=1)
    assert torch.equal(model[0].weight, dense[0].weight * mask)
    initialize(model, seed=1, masks={"0.weight": other})
    assert torch.equal(model[0].weight, dense[0].weight * other)
    assert torch.equal(model[0].weight_mask, other)
    x = torch.randn(5, 20)
    assert torch.allclose(model(x), nn.functional.linear(x, model[0].weight, model[0].bias), atol=1e-5)


def test_layer_rescaling_multiplies_the_std_by_the_root_of_the_density():
    mask = half((30, 20))
    density = mask.double().mean().item()
    model = mlp()
    result = initialize(model, "kaiming_normal", seed=1, masks={"0.weight": mask}, rescale="layer")
    assert result["0.weight"].args[1] == pytest.approx(math.sqrt(2 / 20 / density))
    assert result["2.weight"].args[1] == pytest.approx(math.sqrt(2 / 30))


def test_unit_rescaling_gives_every_output_unit_its_live_fan_in():
    mask = half((30, 20))
    mask[4] = False
    mask[5] = True
    dense, model = mlp(), mlp()
    initialize(dense, "kaiming_normal", seed=1)
    initialize(model, "kaiming_normal", seed=1, masks={"0.weight": mask}, rescale="unit")
    live = mask.sum(1, keepdim=True).clamp(min=1)
    assert torch.allclose(model[0].weight, dense[0].weight * mask * (20 / live).sqrt())
    assert (model[0].weight[4] == 0).all()
    assert torch.equal(model[0].weight[5], dense[0].weight[5])


@pytest.mark.parametrize("transposed", [False, True])
def test_a_unit_of_a_convolution_is_an_output_channel(transposed):
    model = nn.Sequential((nn.ConvTranspose2d if transposed else nn.Conv2d)(6, 8, 3))
    dense = copy.deepcopy(model)
    mask = half(model[0].weight.shape)
    initialize(dense, "kaiming_normal", seed=1)
    initialize(model, "kaiming_normal", seed=1, masks={"0.weight": mask}, rescale="unit")
    axis = 1 if transposed else 0
    others = [d for d in range(4) if d != axis]
    live = mask.sum(others, keepdim=True)
    assert torch.allclose(model[0].weight, dense[0].weight * mask * (6 * 9 / live).sqrt())


def test_squares_rescaling_keeps_the_sum_of_squares_for_magnitude_masks_too():
    dense, model = mlp(), mlp()
    initialize(dense, "kaiming_normal", seed=1)
    mask = dense[0].weight.abs() > dense[0].weight.abs().median()
    initialize(model, "kaiming_normal", seed=1, masks={"0.weight": mask}, rescale="squares")
    squares = [m[0].weight.detach().double().square().sum().item() for m in (model, dense)]
    assert squares[0] == pytest.approx(squares[1], rel=1e-6)
    assert ((model[0].weight != 0) == mask).all()


@pytest.mark.parametrize("own_layers", [False, True])
def test_measured_rescaling_keeps_the_variance_of_the_pre_activations(own_layers):
    linear = MaskedLinear if own_layers else nn.Linear
    model = nn.Sequential(linear(40, 60), nn.ReLU(), nn.Dropout(0.5), linear(60, 50), nn.ReLU(), linear(50, 10))
    x = torch.randn(200, 40)
    initialize(model, "kaiming_normal", seed=1)
    model.eval()
    dense = [model[:1](x).var().item(), model[:4](x).var().item(), model[:6](x).var().item()]
    masks = {f"{i}.weight": model[i].weight.abs() > model[i].weight.abs().quantile(0.8) for i in (0, 3, 5)}
    model.train()
    initialize(model, "kaiming_normal", seed=1, masks=masks, rescale="measured", sample=x)
    assert model.training
    model.eval()
    got = [model[:1](x).var().item(), model[:4](x).var().item(), model[:6](x).var().item()]
    assert got == pytest.approx(dense, rel=1e-4)
    for name, mask in masks.items():
        assert ((dict(model.named_parameters())[name] != 0) == mask).all()
    assert all("forward" not in m.__dict__ for m in model.modules())


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_measured_refuses_a_sample_that_says_nothing(value):
    model = mlp()
    before, masks = copy.deepcopy(model.state_dict()), {"0.weight": torch.rand(model[0].weight.shape) < 0.5}
    with pytest.raises(InitPerfError, match="sample"):
        initialize(model, seed=1, masks=masks, rescale="measured", sample=torch.full((3, 20), value))
    assert same(before, model.state_dict())


def test_measured_refuses_a_sample_that_fails_or_misses_a_layer_before_touching_anything():
    model = nn.ModuleDict({"used": nn.Linear(4, 4), "unused": nn.Linear(4, 4)})
    model.forward = lambda x: model["used"](x)
    before = snapshot(model)
    masks = {"unused.weight": half((4, 4))}
    with pytest.raises(InitPerfError, match="reaches"):
        initialize(model, seed=1, masks=masks, rescale="measured", sample=torch.ones(2, 4))
    with pytest.raises(RuntimeError, match="shapes"):
        initialize(model, seed=1, masks=masks, rescale="measured", sample=torch.ones(2, 5))
    assert same(before, snapshot(model))


def test_the_result_gives_every_parameter_back():
    model = mlp()
    result = initialize(model, "xavier_uniform", seed=3)
    assert [r.name for r in result.records] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    for record in result.records:
        again = torch.empty(record.shape)
        init.sample_into(again, result[record.name].distribution(again.dtype), seed=result.seed, stream=record.stream)
        assert torch.equal(bits(again), bits(dict(model.named_parameters())[record.name].detach()))
    text = str(result)
    assert "0.weight" in text
    assert "uniform(" in text


def test_stats_measure_what_was_asked():
    model = nn.Sequential(nn.Linear(300, 400), nn.Conv2d(20, 30, 5))
    result = initialize(model, "trunc_normal", seed=3, stats=True, masks={"0.weight": half((400, 300))})
    for record in result.records:
        mean, variance = record.measured
        if record.name.endswith("weight"):
            n = math.prod(record.shape) / 2
            assert abs(mean - record.asked[0]) < 6 * math.sqrt(record.asked[1] / n)
            assert variance == pytest.approx(record.asked[1], rel=6 * math.sqrt(2 / n))
        else:
            assert (mean, variance) == (0, 0)
    assert "variance / asked" in str(result)


def test_stats_of_what_no_distribution_tells_are_shown_without_it():
    model = nn.Sequential(nn.Linear(60, 50), nn.Linear(50, 40))
    mask = half((50, 60))
    for rescale in ("unit", "squares"):
        kept = {"1.*": "keep"}
        result = initialize(
            model, "kaiming_normal", seed=3, stats=True, masks={"0.weight": mask}, rescale=rescale, rules=kept
        )
        records = {r.name: r for r in result.records}
        assert records["0.weight"].asked is None  # twice the dense variance or so, which its Init does not say
        assert records["1.weight"].asked is None
        mean, variance = records["1.weight"].measured
        row = next(line for line in str(result).splitlines() if line.startswith("1.weight"))
        assert f"{mean:.4g} / -" in row
        assert f"{variance:.4g} / -" in row
    scaled = initialize(model, "kaiming_normal", seed=3, stats=True, masks={"0.weight": mask}, rescale="layer").records[
        0
    ]
    assert scaled.asked[1] == pytest.approx(2 / 60 * mask.numel() / int(mask.sum()))
    assert scaled.measured[1] == pytest.approx(scaled.asked[1], rel=0.2)


@pytest.mark.parametrize(
    "given",
    [
        Init("uniform", (-1.0, 3.0)),
        Init("normal", (0.5, 2.0)),
        Init("trunc_normal", (0.0, 1.0, -1.0, 2.0)),
        Init("trunc_normal", (0.0, 1.0, 1.0, math.inf)),
        Init("constant", (0.25,)),
    ],
)
def test_the_moments_of_an_init_are_those_of_its_values(given):
    values = init.sample_into(torch.empty(400000), given.distribution(torch.float32), seed=1).double()
    mean, variance = given.moments((400000,))
    assert abs(values.mean() - mean) < 6 * math.sqrt(variance / 400000) + 1e-12
    assert abs(values.var() - variance) < 0.02 * variance + 1e-12


def test_a_model_on_the_meta_device_is_materialized_and_initialized_in_one_step():
    def make():
        return nn.ModuleDict(
            {
                "masked": MaskedLinear(6, 6),
                "norm": nn.BatchNorm1d(6),
                "lstm": nn.LSTM(6, 6),
                "tied": nn.Embedding(9, 6),
                "head": nn.Linear(6, 9),
            }
        )

    real = make()
    real["head"].weight = real["tied"].weight
    with torch.device("meta"):
        model = make()
        model["head"].weight = model["tied"].weight
    model["head"].bias.requires_grad_(False)
    initialize(real, seed=1)
    initialize(model, seed=1, device="cpu")
    assert same(real.state_dict(), model.state_dict())
    assert not any(t.is_meta for t in model.state_dict().values())
    assert model["head"].weight is model["tied"].weight
    assert not model["head"].bias.requires_grad
    assert model["masked"].weight_mask.all()
    x = torch.randn(3, 6)
    assert torch.equal(model["lstm"](x)[0], real["lstm"](x)[0])
    assert torch.equal(model["masked"](x), real["masked"](x))


def test_a_buffer_without_values_and_a_kept_parameter_without_memory_are_refused():
    class Rotary(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(2, 2)
            self.register_buffer("inv_freq", torch.ones(3))

    with torch.device("meta"):
        rotary, plain = Rotary(), mlp()
    with pytest.raises(InitPerfError, match="inv_freq"):
        initialize(rotary, seed=1)
    with pytest.raises(InitPerfError, match="keep"):
        initialize(plain, seed=1, rules={"0.bias": "keep"})
    assert all(p.is_meta for m in (rotary, plain) for p in m.parameters())


@pytest.fixture
def mesh(tmp_path):
    """A device mesh of this process alone."""
    dist = pytest.importorskip("torch.distributed", reason="needs torch.distributed")
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("needs torch.distributed with gloo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    from torch.distributed.device_mesh import init_device_mesh

    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_sharded_parameters_get_their_part_of_the_same_values(mesh):
    from torch.distributed.tensor import Shard, distribute_tensor

    model, whole = mlp(), mlp()
    initialize(whole, seed=1, masks={"0.weight": half((30, 20))})
    for module in (model[0], model[2]):
        for name, p in list(module.named_parameters()):
            setattr(module, name, nn.Parameter(distribute_tensor(p.detach().clone(), mesh, [Shard(0)])))
    initialize(model, seed=1, masks={"0.weight": half((30, 20))})
    for name, p in model.named_parameters():
        assert torch.equal(p.full_tensor(), dict(whole.named_parameters())[name])


def test_models_in_narrow_dtypes_get_the_same_values_rounded():
    model, narrow = mlp(), mlp().to(torch.bfloat16)
    initialize(model, "xavier_normal", seed=1)
    initialize(narrow, "xavier_normal", seed=1)
    for a, b in zip(model.parameters(), narrow.parameters(), strict=True):
        assert torch.equal(bits(a.detach().to(torch.bfloat16)), bits(b.detach()))


def calls_of(act):
    """Calls of sampling kernels inside act()."""
    before = ops.CALLS.copy()
    act()
    return {name: count for (name, _), count in (ops.CALLS - before).items() if name.startswith("sample")}


def test_a_whole_model_is_one_call_of_the_kernel_with_masks_moments_and_memory_from_meta():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(20, 30), MaskedLinear(30, 10))
    mask = half((30, 20))
    assert calls_of(lambda: initialize(model, seed=1)) == {"sample_many_": 1}
    arguments = {"seed": 1, "masks": {"2.weight": mask}, "rescale": "layer", "stats": True}
    assert calls_of(lambda: initialize(model, **arguments)) == {"sample_many_": 1}
    with torch.device("meta"):
        empty = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(20, 30), MaskedLinear(30, 10))
    assert calls_of(lambda: initialize(empty, device="cpu", **arguments)) == {"sample_many_": 1}
    assert same(model.state_dict(), empty.state_dict())


def test_what_kernels_cannot_write_in_place_gets_its_values_beside_the_rest():
    model = mlp()
    initialize(model, seed=1, masks={"0.weight": half((30, 20))})
    strided = mlp()
    strided[0].weight = nn.Parameter(torch.empty(20, 30).t())
    initialize(strided, seed=1, masks={"0.weight": half((30, 20))})
    assert not strided[0].weight.is_contiguous()
    assert same(model.state_dict(), strided.state_dict())


def test_versions_of_written_parameters_rise():
    model = mlp()
    versions = [p._version for p in model.parameters()]
    initialize(model, seed=1)
    assert all(p._version > v for p, v in zip(model.parameters(), versions, strict=True))


@pytest.mark.parametrize("rescale", [None, "layer", "unit", "squares"])
def test_stats_are_the_moments_of_what_is_there_in_the_end(rescale):
    """Within the rounding of float64 sums of up to 9,000 terms: 9,000 2^-53 < 1e-12 of the values' range."""
    model = nn.ModuleDict(
        {
            "masked": nn.Linear(90, 100),
            "dense": nn.Linear(90, 100),
            "padded": nn.Embedding(9, 50, padding_idx=1),
            "custom": Custom(),
            "kept": nn.Linear(3, 3),
        }
    )
    mask = half((100, 90))
    result = initialize(
        model, seed=1, masks={"masked.weight": mask}, rescale=rescale, stats=True, rules={"kept.*": "keep"}
    )
    values = {rng.canonical_name(n): p.detach().double() for n, p in model.named_parameters()}
    values["masked.weight"] = values["masked.weight"][mask]
    assert [r.name for r in result.records] == list(values)
    for record in result.records:
        v = values[record.name]
        span = float(v.abs().max())
        assert record.measured[0] == pytest.approx(float(v.mean()), rel=0, abs=1e-12 * span)
        assert record.measured[1] == pytest.approx(float(v.var(correction=0)), rel=0, abs=1e-12 * span**2)


class Compressed(nn.Module):
    """What initialize needs to know of a sparse layer: values of survivors, bits, and the dense shape."""

    def __init__(self, mask):
        super().__init__()
        self.weight_shape = tuple(mask.shape)
        self.weight_values = nn.Parameter(torch.full((int(mask.sum()), 1), math.nan))
        self.bias = nn.Parameter(torch.empty(mask.shape[0]))
        packed = np.packbits(mask.numpy(), bitorder="little")
        self.register_buffer("weight_mask_bits", torch.from_numpy(packed))

    @property
    def weight_mask(self):
        raise AssertionError("the dense mask was asked for")


SPARSE = {
    "linear": (lambda: nn.Linear(45, 30), (30, 45)),
    "convolution": (lambda: nn.Conv2d(6, 8, 3), (8, 6, 3, 3)),
    "odd": (lambda: nn.Linear(3, 5), (5, 3)),
}


@pytest.mark.parametrize("scheme", [None, "kaiming_normal", "xavier_uniform", "timm", "orthogonal", "gpt2"])
@pytest.mark.parametrize("kind", SPARSE)
def test_a_compressed_layer_gets_the_survivors_of_the_dense_one(kind, scheme):
    make, shape = SPARSE[kind]
    mask = half(shape, 2)
    dense, sparse = nn.Sequential(make()), nn.Sequential(Compressed(mask))
    told = initialize(dense, scheme, seed=3, masks={"0.weight": mask})
    same_told = initialize(sparse, scheme, seed=3)
    assert torch.equal(bits(sparse[0].weight_values.detach().flatten()), bits(dense[0].weight.detach()[mask]))
    assert torch.equal(bits(sparse[0].bias.detach()), bits(dense[0].bias.detach()))
    assert dict(told) == dict(same_told)
    assert [r.shape for r in told.records] == [r.shape for r in same_told.records]


@pytest.mark.parametrize("rescale", ["layer", "unit", "squares"])
@pytest.mark.parametrize("kind", SPARSE)
def test_rescaling_a_compressed_layer_is_rescaling_the_masked_one(kind, rescale):
    make, shape = SPARSE[kind]
    mask = half(shape, 2)
    mask[1] = False
    dense, sparse = nn.Sequential(make()), nn.Sequential(Compressed(mask))
    told = initialize(dense, "kaiming_normal", seed=3, masks={"0.weight": mask}, rescale=rescale, stats=True)
    same_told = initialize(sparse, "kaiming_normal", seed=3, rescale=rescale, stats=True)
    got, want = sparse[0].weight_values.detach().flatten(), dense[0].weight.detach()[mask]
    assert torch.allclose(got, want, rtol=2**-22, atol=0)  # squares: the factor's own rounding may differ
    assert rescale == "squares" or torch.equal(bits(got), bits(want))
    assert [r.text for r in told.records] == [r.text for r in same_told.records]
    assert same_told.records[0].measured == pytest.approx(told.records[0].measured, rel=1e-6)


def test_compressed_layers_take_part_in_the_one_call_and_in_what_is_refused():
    model = nn.Sequential(Compressed(half((30, 45))), nn.Linear(30, 4))
    assert calls_of(lambda: initialize(model, seed=1, stats=True)) == {"sample_many_": 1}
    before = snapshot(model)
    for arguments, message in [
        ({"masks": {"0.weight": half((30, 45))}}, "no mask for 0.weight"),
        ({"rescale": "measured", "sample": torch.ones(1, 45)}, "compressed"),
    ]:
        with pytest.raises(InitPerfError, match=message):
            initialize(model, seed=2, **arguments)
    assert same(before, snapshot(model))
    model[0].weight_mask_bits[0] ^= 1
    with pytest.raises(InitPerfError, match="as many values as weight_mask_bits of 0.weight"):
        initialize(model, seed=2)
    initialize(nn.Sequential(Compressed(torch.zeros(3, 4, dtype=torch.bool))), seed=1, rescale="layer", stats=True)


def test_masks_are_applied_to_a_model_that_comes_from_the_meta_device():
    mask = half((30, 20))
    with torch.device("meta"):
        model = mlp()
    for rescale in (None, "unit"):
        real, empty = mlp(), copy.deepcopy(model)
        initialize(real, seed=1, masks={"0.weight": mask}, rescale=rescale)
        initialize(empty, seed=1, masks={"0.weight": mask}, rescale=rescale)
        assert same(real.state_dict(), empty.state_dict())


def test_a_scheme_may_be_written_as_a_function_and_its_numbers():
    by_text, by_init = (nn.Sequential(nn.Linear(9, 8), nn.Linear(8, 7)) for _ in range(2))
    initialize(by_text, "normal(0, 0.02)", rules={"1.*": " uniform(-1,1) "}, seed=3)
    initialize(by_init, Init("normal", (0.0, 0.02)), rules={"1.*": Init("uniform", (-1.0, 1.0))}, seed=3)
    for got, want in zip(by_text.parameters(), by_init.parameters(), strict=True):
        assert torch.equal(got, want)
    for wrong in ("normal(0)", "normal(a, b)", "normal(0, 0.02", "nothing(1)"):
        before = [p.clone() for p in by_text.parameters()]
        with pytest.raises(ValueError, match="Expected"):
            initialize(by_text, wrong, seed=0)
        assert all(torch.equal(a, b) for a, b in zip(before, by_text.parameters(), strict=True))


@pytest.mark.parametrize("rescale", ["layer", "unit", "squares"])
def test_rescale_without_any_mask_is_an_error(rescale):
    with pytest.raises(ValueError, match="masks for rescale"):
        initialize(nn.Linear(4, 3), "kaiming_normal", seed=0, rescale=rescale)


def test_embeddings_start_as_the_scheme_says_or_as_torch_does():
    for scheme, expected in (
        ("gpt2", Init("normal", (0.0, 0.02))),
        ("timm", Init("trunc_normal", (0.0, 0.02, -2.0, 2.0))),
        ("trunc_normal", Init("trunc_normal", (0.0, 0.02, -2.0, 2.0))),
        ("kaiming_normal", Init("normal", (0.0, 1.0))),
    ):
        for kind in (nn.Embedding, nn.EmbeddingBag):
            assert initialize(nn.Sequential(kind(9, 8)), scheme, seed=1)["0.weight"] == expected


@pytest.mark.parametrize("scheme", ["kaiming_uniform", "gpt2", "orthogonal"])
def test_an_attentions_extra_key_and_value_keep_their_own_distribution(scheme):
    def attention():
        return nn.MultiheadAttention(8, 2, add_bias_kv=True)

    by_itself = initialize(attention(), seed=1)
    result = initialize(attention(), scheme, seed=1)
    assert result["bias_k"] == result["bias_v"] == by_itself["bias_k"] == Init("normal", (0.0, math.sqrt(2 / 16)))
    assert result["in_proj_weight"] != by_itself["in_proj_weight"]


def test_of_nested_custom_resets_the_outermost_has_the_last_word():
    class Sets(nn.Module):
        def __init__(self, value, **children):
            super().__init__()
            self.value, self.own = value, nn.Parameter(torch.empty(2))
            for name, child in children.items():
                self.add_module(name, child)

        def reset_parameters(self):
            for p in self.parameters():
                torch_init.constant_(p, self.value)

    model = Sets(1.0, a=Sets(2.0, b=Sets(3.0)), c=nn.Sequential(Sets(4.0)))
    initialize(model, seed=1)
    assert all((p == 1).all() for p in model.parameters())
    lone = nn.Sequential(Sets(2.0, b=Sets(3.0)))
    result = initialize(lone, seed=1)
    assert (lone[0].b.own == 2).all()
    assert not result


def test_squares_of_a_compressed_layer_are_taken_in_parts(monkeypatch):
    mask = half((30, 45), 2)
    at_once, in_parts = nn.Sequential(Compressed(mask)), nn.Sequential(Compressed(mask))
    scheme = Init("normal", (0.5, 1.0))
    initialize(at_once, scheme, seed=3, rescale="squares", rules={"*.bias": 0.0})
    monkeypatch.setattr("initperf.init.model.rescale._PART", 400)
    initialize(in_parts, scheme, seed=3, rescale="squares", rules={"*.bias": 0.0})
    assert torch.allclose(in_parts[0].weight_values, at_once[0].weight_values, rtol=2**-22, atol=0)


def test_measured_rescaling_does_not_count_the_biases():
    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(40, 60), nn.ReLU(), nn.Linear(60, 50))

    x, dense, masked = torch.randn(200, 40), model(), model()
    rules = {"*.bias": Init("normal", (0.0, 3.0))}
    initialize(dense, "kaiming_normal", seed=1, rules=rules)
    masks = {f"{i}.weight": half(dense[i].weight.shape) for i in (0, 2)}
    initialize(masked, "kaiming_normal", seed=1, rules=rules, masks=masks, rescale="measured", sample=x)
    for i in (0, 2):
        products = [m[i](m[:i](x)) - m[i].bias for m in (masked, dense)]
        got, want = (p.double().var(correction=0).item() for p in products)
        assert got == pytest.approx(want, rel=1e-4)
        assert torch.equal(masked[i].bias, dense[i].bias)


def sharded(number):
    """The local parts of one process of two: rows of the first weight and of all biases, columns of the second weight."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh, model = init_device_mesh("cpu", (2,)), mlp()
    for module, dim in ((model[0], 0), (model[2], 1)):
        for name, p in list(module.named_parameters()):
            placement = [Shard(dim if name == "weight" else 0)]
            setattr(module, name, nn.Parameter(distribute_tensor(p.detach().clone(), mesh, placement)))
    initialize(
        model, seed=1, masks={"0.weight": half((30, 20)), "2.weight": half((10, 30))}, rules={"2.*t": "orthogonal"}
    )
    return {name: p.to_local().detach() for name, p in model.named_parameters()}


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
def test_every_process_gets_its_own_part_of_values_and_masks(tmp_path):
    parts, whole = processes.run(sharded, tmp_path), mlp()
    initialize(
        whole, seed=1, masks={"0.weight": half((30, 20)), "2.weight": half((10, 30))}, rules={"2.*t": "orthogonal"}
    )
    for name, p in whole.named_parameters():
        together = torch.cat([part[name] for part in parts], dim=1 if name == "2.weight" else 0)
        assert torch.equal(bits(together), bits(p.detach()))


@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (8, 4, 3, 3)])
def test_the_variance_of_an_orthogonal_init_is_its_mean_square(shape):
    values = init.orthogonal_(torch.empty(shape), 2.0, seed=1).double()
    assert Init("orthogonal", (2.0,)).moments(shape) == (0.0, pytest.approx(values.square().mean().item(), rel=1e-5))


@pytest.mark.parametrize("fails", [False, True])
def test_a_custom_reset_leaves_torchs_generator_as_it_was(fails):
    class Draws(nn.Module):
        def __init__(self):
            super().__init__()
            self.own = nn.Parameter(torch.zeros(30))

        def reset_parameters(self):
            with torch.no_grad():
                self.own.copy_(torch.rand(30))
            if fails:
                raise KeyError("reset")

    model, before = Draws(), torch.get_rng_state()
    with pytest.raises(KeyError) if fails else contextlib.nullcontext():
        initialize(model, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(model.own, torch.rand(30))


def test_unit_rescaling_counts_the_inputs_of_a_unit_however_its_layer_stores_them():
    """Grouped transposed convolutions: (inputs, outputs / groups, ...); transformers' Conv1D: (inputs, outputs)."""

    def factors(make, mask):
        scaled, plain = nn.Sequential(make()), nn.Sequential(make())
        initialize(scaled, "kaiming_normal", seed=1, masks={"0.weight": mask}, rescale="unit")
        initialize(plain, "kaiming_normal", seed=1)
        return (scaled[0].weight / plain[0].weight).detach().squeeze()

    mask = torch.tensor([1, 1, 1, 0]).bool().view(4, 1, 1, 1)
    got = factors(lambda: nn.ConvTranspose2d(4, 2, 1, groups=2), mask)
    torch.testing.assert_close(got, torch.tensor([1, 1, math.sqrt(2), 0]))
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    mask = torch.tensor([[1, 1], [1, 0], [1, 0], [1, 0]]).bool()
    torch.testing.assert_close(factors(lambda: conv1d(2, 4), mask), mask * torch.tensor([1.0, 2.0]))
