"""MaskedLinear is an nn.Linear, and whole models turn into masked ones and back."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from initperf.choice import prefer
from initperf.core import without_dispatch
from initperf.core.bits import pack_bits
from initperf.core.checks import InitPerfError
from initperf.layers.convert import check_masks, densify, masked_layers, sparsify
from initperf.layers.linear import MaskedLinear, SparseLinear
from initperf.layers.ops import masked_linear as masked_ops
from initperf.layers.optimizers import mask_optimizer_
from tolerance import Sums, assert_close_to_exact, assert_near, bits, linear, of_linear, product

pytest.importorskip("numba")


def mask_of(N=30, K=20, density=0.3, seed=0):
    return torch.rand(N, K, generator=torch.Generator().manual_seed(seed)) < density


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return MaskedLinear(20, 30, mask=mask_of())


@pytest.fixture(params=["kernel", "dense", "small"])
def path(request, monkeypatch):
    """Both products that an op may choose, and what is left to torch's own ops, with a hook on the gradient."""
    if request.param == "dense":
        monkeypatch.setattr(without_dispatch, "TINY", 0)
        monkeypatch.setattr(masked_ops, "MOST_COMPOSED", 0)
    with prefer("sparse" if request.param == "kernel" else "dense"):
        yield


def outputs_of(layer, x) -> Sums:
    """What the dense layer of the same parameters gives."""
    dense = layer.to_linear()
    return linear(x, dense.weight, dense.bias)


def mlp(*sizes):
    layers = [nn.Linear(i, o) for i, o in zip(sizes, sizes[1:], strict=False)]
    return nn.Sequential(*[m for layer in layers for m in (layer, nn.ReLU())][:-1])


def test_it_is_an_nn_linear_whose_pruned_weights_are_zero(layer):
    assert isinstance(layer, nn.Linear)
    assert not bits(layer.weight)[~layer.weight_mask].any()
    assert layer.weight[layer.weight_mask].all()
    assert layer.density == pytest.approx(layer.weight_mask.float().mean().item())
    assert "in_features=20, out_features=30, bias=True, density=0.3" in repr(layer)


def test_with_no_mask_everything_survives_and_it_equals_nn_linear():
    layer = MaskedLinear(20, 30)
    assert layer.density == 1
    x = torch.randn(5, 20)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


def test_positional_arguments_are_those_of_nn_linear():
    layer = MaskedLinear(20, 30, False, "cpu", torch.float64)
    assert layer.bias is None
    assert layer.weight.dtype == torch.float64


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_outputs_and_gradients_are_those_of_nn_linear(path, dtype, bias):
    layer = MaskedLinear(20, 30, bias, dtype=dtype, mask=mask_of())
    x, dy = torch.randn(60, 20).to(dtype).requires_grad_(), torch.randn(60, 30).to(dtype)
    y = layer(x)
    y.backward(dy)
    expected = of_linear(layer.to_linear(), x, dy)
    expected[2] = expected[2].where(layer.weight_mask)
    for got, right in zip([y, x.grad, *(p.grad for p in layer.parameters())], expected, strict=True):
        assert_close_to_exact(got, right)
    assert not bits(layer.weight.grad)[~layer.weight_mask].any()


@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (2, 1, 4), (0,), (3, 0), (2, 0, 4)])
def test_any_leading_dimensions_behave_as_in_nn_linear(layer, path, leading):
    x = torch.randn(*leading, 20, requires_grad=True)
    y = layer(x)
    assert_close_to_exact(y, outputs_of(layer, x))
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert torch.isfinite(layer.weight.grad).all()


@pytest.mark.parametrize(("K", "N"), [(0, 3), (3, 0), (0, 0)])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_sizes_of_zero_are_permitted_as_in_nn_linear(K, N):
    layer, x = MaskedLinear(K, N), torch.randn(4, K, requires_grad=True)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    layer(x).sum().backward()
    assert x.grad.shape == (4, K)


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_masks_of_all_and_of_nothing_work(path, density):
    layer = MaskedLinear(20, 30, mask=torch.full((30, 20), bool(density)))
    x = torch.randn(6, 20, requires_grad=True)
    assert_close_to_exact(layer(x), outputs_of(layer, x))
    layer(x).sum().backward()
    assert bool(layer.weight.grad.any()) == bool(density)


def test_non_contiguous_inputs_and_weights_give_the_same(layer, path):
    x = torch.randn(20, 7).t()
    for _ in range(2):
        assert_close_to_exact(layer(x), outputs_of(layer, x))
        assert_close_to_exact(layer(x.contiguous()), outputs_of(layer, x))
        layer.weight.data = layer.weight.data.t().contiguous().t()


def test_no_grad_and_inference_mode_give_the_same(layer):
    x = torch.randn(6, 20)
    expected = layer(x)
    with torch.no_grad():
        assert torch.equal(layer(x), expected)
    with torch.inference_mode():
        assert torch.equal(layer(x), expected)
        made = MaskedLinear(20, 30, mask=mask_of())
        made(x)
        made.set_mask(mask_of(seed=3))
        assert_close_to_exact(made(x), outputs_of(made, x))


def test_autocast_lowers_the_layer_as_it_lowers_nn_linear(layer, path):
    x = torch.randn(6, 20, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        assert y.dtype == layer.to_linear()(x).dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad.dtype == layer.weight.grad.dtype == torch.float32
    assert not layer.weight.grad[~layer.weight_mask].any()


def test_double_backward_reaches_the_weights(path):
    layer = MaskedLinear(5, 4, dtype=torch.float64, mask=mask_of(4, 5))
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x).pow(2).sum(), x, create_graph=True)
    gradient.pow(2).sum().backward()
    dense = layer.to_linear()
    own = x.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(dense(own).pow(2).sum(), own, create_graph=True)
    gradient.pow(2).sum().backward()
    assert_near(x.grad, own.grad)
    assert_near(layer.weight.grad, dense.weight.grad.masked_fill(~layer.weight_mask, 0))


class Copied(nn.Module):
    """A parametrization whose result is not the Parameter itself."""

    def forward(self, weight):
        return weight.clone()


def test_a_weight_that_is_not_the_layers_own_parameter_is_masked_in_the_product(layer, path):
    x, free = torch.randn(6, 20), torch.randn(30, 20)
    expected = linear(x, free.masked_fill(~layer.weight_mask, 0), layer.bias)
    assert_close_to_exact(torch.func.functional_call(layer, {"weight": free}, (x,)), expected)
    parametrize.register_parametrization(layer, "weight", Copied())
    with torch.no_grad():
        layer.parametrizations.weight.original.copy_(free)
    assert_close_to_exact(layer(x), expected)


def test_meta_layers_have_shapes_and_come_alive_with_everything_surviving():
    layer = MaskedLinear(20, 30, device="meta")
    assert layer(torch.empty(4, 20, device="meta")).shape == (4, 30)
    layer.to_empty(device="cpu").reset_parameters()
    assert layer.density == 1
    assert torch.isfinite(layer(torch.randn(4, 20))).all()


def test_a_copy_and_a_pickle_are_the_same_layer(layer):
    x = torch.randn(6, 20)
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(stream, weights_only=False)):
        assert torch.equal(twin(x), layer(x))
        assert twin.density == layer.density
        twin.set_mask(~layer.weight_mask)
        assert not torch.equal(twin.weight_mask, layer.weight_mask)


@pytest.mark.parametrize(
    "convert",
    [lambda m: m.half(), lambda m: m.double(), lambda m: m.to(torch.bfloat16), lambda m: m.type(torch.float64)],
)
def test_the_mask_survives_conversions(layer, convert):
    before = layer.weight_mask.clone()
    convert(layer)
    assert layer.weight_mask.dtype == torch.bool
    assert torch.equal(layer.weight_mask, before)
    x = torch.randn(6, 20).to(layer.weight.dtype)
    assert_close_to_exact(layer(x), outputs_of(layer, x))


def test_set_mask_prunes_at_once_and_revives_at_zero(layer):
    old, new = layer.weight_mask.clone(), mask_of(seed=5)
    before = layer.weight.detach().clone()
    layer.set_mask(new)
    assert torch.equal(layer.weight_mask, new)
    assert torch.equal(layer.weight, before.masked_fill(~(old & new), 0))
    x = torch.randn(6, 20)
    assert_close_to_exact(layer(x), outputs_of(layer, x))


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("write", ["normal_", "copy_", "data"])
def test_a_weight_that_is_written_past_the_mask_is_masked_again(layer, path, write, contiguous):
    if not contiguous:
        layer.weight.data = layer.weight.data.t().contiguous().t()
    x, new = torch.randn(5, 20), torch.randn(30, 20)
    layer(x)
    if write == "normal_":
        nn.init.normal_(layer.weight)
    elif write == "copy_":
        layer.weight.detach().copy_(new)
    else:
        layer.weight.data = new
    wanted = linear(x, layer.weight.detach() * layer.weight_mask, layer.bias)
    assert_close_to_exact(layer(x), wanted)
    assert not bits(layer.weight)[~layer.weight_mask].any()


def test_edits_of_the_mask_in_place_are_noticed(layer, path):
    x = torch.randn(6, 20)
    layer(x)
    layer.weight_mask[:10] = False
    y = layer(x)
    assert not layer.weight[:10].any()
    assert torch.equal(y[:, :10], layer.bias[:10].expand(6, 10))
    layer.weight_mask = mask_of(seed=9)
    assert_close_to_exact(layer(x), outputs_of(layer, x))
    assert layer.density == pytest.approx(mask_of(seed=9).float().mean().item())


def test_reset_parameters_samples_anew_and_stays_masked(layer):
    before = layer.weight.detach().clone()
    torch.manual_seed(1)
    layer.reset_parameters()
    assert not torch.equal(layer.weight, before)
    check_masks(layer)
    bound = 20**-0.5
    assert layer.weight.abs().max() <= bound
    assert layer.bias.abs().max() <= bound


@pytest.mark.parametrize(
    ("mask", "what"),
    [
        (torch.ones(20, 30, dtype=torch.bool), r"shape \(30, 20\). Got \(20, 30\)"),
        (torch.ones(30, 20), "dtype bool"),
        ([[True]], "torch.Tensor"),
    ],
)
def test_a_wrong_mask_is_refused_and_nothing_changes(layer, mask, what):
    before, kept = layer.weight.detach().clone(), layer.weight_mask.clone()
    linear = nn.Linear(20, 30)
    original = linear.weight.detach().clone()
    for act in (
        lambda: MaskedLinear(20, 30, mask=mask),
        lambda: layer.set_mask(mask),
        lambda: MaskedLinear.from_linear(linear, mask),
    ):
        with pytest.raises(InitPerfError, match=what):
            act()
    assert torch.equal(layer.weight, before)
    assert torch.equal(layer.weight_mask, kept)
    assert torch.equal(linear.weight, original)


@pytest.mark.parametrize(
    "x", [torch.randn(4, 19), torch.randn(3, 4, 21), torch.randn(19), torch.randn(4, 20).double(), torch.tensor(1.0)]
)
def test_a_wrong_input_raises_what_nn_linear_raises(layer, x):
    with pytest.raises(RuntimeError, match="Expected"):
        layer(x)
    with pytest.raises(RuntimeError):
        layer.to_linear()(x)


def test_a_checkpoint_of_nn_linear_loads_and_the_mask_stays(layer):
    dense, mask = nn.Linear(20, 30), layer.weight_mask.clone()
    checkpoint = dense.state_dict()
    assert layer.load_state_dict(checkpoint, strict=True) == ([], [])
    assert torch.equal(layer.weight, dense.weight.masked_fill(~mask, 0))
    assert torch.equal(layer.weight_mask, mask)
    assert torch.equal(checkpoint["weight"], dense.weight), "the checkpoint was edited"


@pytest.mark.parametrize("assign", [False, True])
def test_its_own_checkpoint_brings_weights_and_mask(layer, assign):
    other = MaskedLinear(20, 30, mask=mask_of(seed=7))
    other.load_state_dict(layer.state_dict(), assign=assign)
    assert torch.equal(other.weight_mask, layer.weight_mask)
    x = torch.randn(6, 20)
    assert torch.equal(other(x), layer(x))


def test_assigning_a_dense_checkpoint_masks_the_layer_and_not_the_checkpoint(layer):
    checkpoint = nn.Linear(20, 30).state_dict()
    kept = checkpoint["weight"].clone()
    layer.load_state_dict(checkpoint, assign=True)
    check_masks(layer)
    assert torch.equal(checkpoint["weight"], kept)


def test_a_checkpoint_of_torch_prune_loads(layer):
    pruned = nn.Linear(20, 30)
    prune.random_unstructured(pruned, "weight", 0.4)
    layer.load_state_dict(pruned.state_dict(), strict=True)
    assert torch.equal(layer.weight_mask, pruned.weight_mask.bool())
    assert torch.equal(layer.weight, pruned.weight)


def test_a_model_of_masked_layers_loads_with_prefixes():
    model, dense = sparsify(mlp(8, 16, 4), density=0.5), mlp(8, 16, 4)
    assert model.load_state_dict(dense.state_dict(), strict=True) == ([], [])
    check_masks(model)
    missing, unexpected = model.load_state_dict({"0.weight": dense[0].weight, "nonsense": dense[0].bias}, strict=False)
    assert missing == ["0.bias", "2.weight", "2.bias"]
    assert unexpected == ["nonsense"]
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({"0.weight": dense[0].weight})


@pytest.mark.parametrize(
    "damage",
    [
        {"weight_mask": torch.ones(20, 30, dtype=torch.bool)},
        {"weight_mask": torch.full((30, 20), 0.5)},
        {"weight": torch.ones(3, 3)},
        {"bias": torch.ones(3)},
    ],
)
def test_a_damaged_checkpoint_is_refused_and_nothing_changes(layer, damage):
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    fresh = MaskedLinear(20, 30, mask=mask_of(seed=4)).state_dict()
    with pytest.raises(RuntimeError, match="Expected"):
        layer.load_state_dict(fresh | damage)
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name])


def test_to_linear_loads_strictly_into_an_nn_linear(layer):
    linear = nn.Linear(20, 30)
    linear.load_state_dict(layer.to_linear().state_dict(), strict=True)
    x = torch.randn(6, 20)
    assert_close_to_exact(layer(x), outputs_of(layer, x))
    layer.to_linear().weight.data.zero_()
    assert layer.weight.any()


def test_torch_prune_on_a_masked_layer_is_refused_and_leaves_it_whole(layer):
    x = torch.randn(6, 20)
    expected = layer(x)
    with pytest.raises(RuntimeError, match="set_mask"):
        prune.l1_unstructured(layer, "weight", 0.5)
    assert set(layer.state_dict()) == {"weight", "bias", "weight_mask"}
    assert torch.equal(layer(x), expected)


def test_from_linear_keeps_the_parameters(layer):
    linear = nn.Linear(20, 30)
    made = MaskedLinear.from_linear(linear, mask_of())
    assert made.weight is linear.weight
    assert made.bias is linear.bias
    check_masks(made)


def test_the_converter_of_torch_ao_pruning_finds_from_dense():
    pruning = pytest.importorskip("torch.ao.pruning")
    model = mlp(16, 32, 8)
    sparsifier = pruning.WeightNormSparsifier(sparsity_level=0.5, sparse_block_shape=(1, 1), zeros_per_block=1)
    sparsifier.prepare(model, [{"tensor_fqn": "0.weight"}])
    sparsifier.step()
    converted = sparsifier.convert(model, mapping={nn.Linear: MaskedLinear})
    assert isinstance(converted[0], MaskedLinear)
    assert type(converted[2]) is nn.Linear
    x = torch.randn(4, 16)
    assert_near(converted(x), model(x))
    check_masks(converted)


def test_sparsify_works_in_place_on_the_same_parameters_and_densify_returns():
    model = mlp(8, 16, 4)
    parameters, modules = list(model.parameters()), list(model.modules())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    hooked = []
    model[0].register_forward_hook(lambda *args: hooked.append(1))
    masks = {"0.weight": mask_of(16, 8), "2.weight": mask_of(4, 16)}
    assert sparsify(model, masks) is model
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert {f"{n}.weight": m.weight_mask.tolist() for n, m in masked_layers(model).items()} == {
        n: m.tolist() for n, m in masks.items()
    }
    model(torch.randn(5, 8)).sum().backward()
    optimizer.step()
    assert check_masks(model) == {n[:-7]: pytest.approx(m.float().mean().item()) for n, m in masks.items()}
    assert hooked
    assert densify(model) is model
    assert [type(m) for m in model] == [nn.Linear, nn.ReLU, nn.Linear]
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert not any("mask" in name for name in model.state_dict())
    copy.deepcopy(model)(torch.randn(5, 8))


def test_density_keeps_exactly_the_largest_weights_of_every_layer():
    model = mlp(8, 16, 4)
    before = [model[0].weight.detach().clone(), model[2].weight.detach().clone()]
    sparsify(model, density=0.3)
    for layer, old in zip((model[0], model[2]), before, strict=True):
        keep = round(0.3 * old.numel())
        assert int(layer.weight_mask.sum()) == keep
        assert old[layer.weight_mask].abs().min() >= old[~layer.weight_mask].abs().max()
    sparsify(model, density={"0.weight": 0.1})
    assert int(model[0].weight_mask.sum()) == round(0.1 * 128)
    assert int(model[2].weight_mask.sum()) == round(0.3 * 64)
    with pytest.raises(InitPerfError, match="at most"):
        sparsify(model, density=0.5)


def test_a_model_that_is_one_layer_is_sparsified_itself():
    layer = nn.Linear(8, 4)
    assert sparsify(layer, {"weight": mask_of(4, 8)}) is layer
    assert isinstance(layer, MaskedLinear)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(16, 8)
        self.body = nn.Linear(8, 8)
        self.head = nn.Linear(8, 16, bias=False)
        self.head.weight = self.embedding.weight


def test_what_cannot_be_masked_is_refused_by_name_and_nothing_changes():
    model = nn.ModuleDict(
        {
            "first": nn.Linear(8, 8),
            "tied": Tied(),
            "attention": nn.MultiheadAttention(8, 2),
            "conv": nn.Conv1d(3, 4, 3),
            "pruned": prune.random_unstructured(nn.Linear(8, 8), "weight", 0.5),
        }
    )
    good = {"first.weight": mask_of(8, 8)}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for name, mask, what in (
        ("tied.head.weight", mask_of(16, 8), "tied weights tied.embedding.weight = tied.head.weight"),
        ("attention.out_proj.weight", mask_of(8, 8), "attention .nn.MultiheadAttention. reads itself"),
        ("conv.weight", torch.ones(4, 3, 3, dtype=torch.bool), "nn.Linear or nn.Conv2d"),
        ("pruned.weight", mask_of(8, 8), "prune.remove"),
        ("missing.weight", mask_of(8, 8), "missing.weight"),
        ("tied.body.weight", mask_of(8, 9), "shape"),
    ):
        with pytest.raises(InitPerfError, match=what):
            sparsify(model, good | {name: mask})
    for arguments in (
        {},
        {"masks": good, "density": 0.5},
        {"density": 1.5},
        {"density": {"nothing*": 0.5}},
        {"masks": [1]},
    ):
        with pytest.raises(InitPerfError):
            sparsify(model, **arguments)
    with pytest.raises(InitPerfError):
        sparsify(model, density=0.5)
    assert type(model["first"]) is nn.Linear
    assert not masked_layers(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_check_masks_names_the_layer_with_a_revived_weight():
    model = sparsify(mlp(8, 16, 4), density=0.5)
    with torch.no_grad():
        model[2].weight[~model[2].weight_mask] = float("nan")
    with pytest.raises(RuntimeError, match=r"32 in 2 "):
        check_masks(model)


def test_mask_optimizer_refuses_an_optimizer_without_masked_layers():
    with pytest.raises(InitPerfError, match="sparsify"):
        mask_optimizer_(torch.optim.SGD(mlp(4, 4).parameters(), lr=0.1))
    with pytest.raises(InitPerfError, match="Optimizer"):
        mask_optimizer_(mlp(4, 4))


def test_gradients_older_than_the_mask_revive_nothing():
    layer = MaskedLinear(6, 5)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(torch.randn(4, 6)).sum().backward()
    layer.set_mask(torch.rand(5, 6) < 0.5)
    optimizer.step()
    assert check_masks(layer)


def test_the_transforms_of_torch_func_work_as_on_a_linear_layer():
    layer = MaskedLinear(6, 5, mask=torch.rand(5, 6) < 0.5)
    dense, x = layer.to_linear(), torch.randn(3, 6)

    def loss(module):
        return lambda weights: torch.func.functional_call(module, weights, x).square().sum()

    assert_close_to_exact(torch.vmap(layer)(x), outputs_of(layer, x))
    mine = torch.func.grad(loss(layer))(dict(layer.named_parameters()))
    theirs = torch.func.grad(loss(dense))(dict(dense.named_parameters()))
    assert_near(mine["weight"], theirs["weight"] * layer.weight_mask)
    for got, right in zip(torch.func.jvp(layer, (x,), (x,)), torch.func.jvp(dense, (x,), (x,)), strict=True):
        assert_near(got, right)


def test_an_input_that_is_no_tensor_is_a_type_error():
    with pytest.raises(TypeError, match="torch.Tensor"):
        MaskedLinear(4, 3)([1, 2, 3, 4])


def test_a_mask_from_the_meta_device_starts_with_everything_surviving_whatever_its_memory_holds(monkeypatch):
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: empty_like(*args, **kwargs).zero_())
    layer = MaskedLinear(20, 30, device="meta").to_empty(device="cpu")
    assert layer.weight_mask.all()
    assert layer.density == 1


def test_a_mask_edited_in_place_anywhere_is_noticed(layer, path):
    x = torch.randn(6, 20)
    for place in ((0, 0), (17, 3), (29, 19)):
        layer(x)
        layer.weight_mask[place] ^= True
        with torch.no_grad():
            layer.weight.fill_(1.0)
        y = layer(x)
        assert_close_to_exact(y, linear(x, layer.weight_mask.float(), layer.bias))


def test_parameters_of_another_model_in_a_functional_call_are_masked_and_not_written(layer, path):
    other, x = nn.Linear(20, 30), torch.randn(5, 20)
    before = other.weight.detach().clone()
    got = torch.func.functional_call(layer, dict(other.named_parameters()), (x,))
    assert_close_to_exact(got, linear(x, before * layer.weight_mask, other.bias))
    assert torch.equal(other.weight, before)


def test_a_parameter_that_is_assigned_is_masked(layer, path):
    layer.weight = nn.Parameter(torch.randn(30, 20))
    assert not bits(layer.weight)[~layer.weight_mask].any()
    x = torch.randn(5, 20)
    assert_close_to_exact(layer(x), linear(x, layer.weight, layer.bias))


def test_gradients_are_masked_however_they_are_asked_for(layer, path):
    pruned, x = ~layer.weight_mask, torch.randn(7, 20)
    dense = layer.to_linear()
    (want,) = torch.autograd.grad(dense(x).pow(2).sum(), dense.weight)
    want = want.masked_fill(pruned, 0)
    loss = layer(x).pow(2).sum()
    (first,) = torch.autograd.grad(loss, layer.weight, retain_graph=True)
    (again,) = torch.autograd.grad(loss, layer.weight, retain_graph=True)
    for found in (first, again):
        assert not bits(found)[pruned].any()
        assert_near(found, want)
    loss.backward()
    layer(x).pow(2).sum().backward()  # accumulates
    assert not layer.weight.grad[pruned].any()
    assert_near(layer.weight.grad, 2 * want)


def test_a_layer_called_twice_in_one_graph(layer, path):
    x, dense = torch.randn(7, 20), layer.to_linear()
    (layer(x).sum() * layer(x + 1).pow(2).sum()).backward()
    (dense(x).sum() * dense(x + 1).pow(2).sum()).backward()
    assert_near(layer.weight.grad, dense.weight.grad.masked_fill(~layer.weight_mask, 0))
    assert_near(layer.bias.grad, dense.bias.grad)


def test_hooks_on_the_weight_see_masked_gradients(layer, path):
    seen = []
    layer.weight.register_hook(lambda gradient: seen.append(gradient.clone()))
    layer(torch.randn(7, 20)).sum().backward()
    assert len(seen) == 1
    assert not seen[0][~layer.weight_mask].any()


def test_many_gradients_at_once(layer, path):
    x, dy = torch.randn(7, 20, requires_grad=True), torch.randn(3, 7, 30)
    y = layer(x)
    found = torch.autograd.grad(y, (x, layer.weight, layer.bias), dy, is_grads_batched=True, retain_graph=True)
    for i in range(3):
        for one, many in zip(
            torch.autograd.grad(y, (x, layer.weight, layer.bias), dy[i], retain_graph=True), found, strict=True
        ):
            assert_near(many[i], one)


def test_a_mask_changed_between_forward_and_backward_raises(layer, path):
    loss = layer(torch.randn(7, 20)).sum()
    layer.set_mask(~layer.weight_mask)
    with pytest.raises(RuntimeError, match="mask|modified"):
        loss.backward()
    assert layer.weight.grad is None


def test_frozen_weights_and_frozen_biases(layer, path):
    layer.weight.requires_grad_(False)
    x = torch.randn(7, 20, requires_grad=True)
    layer(x).sum().backward()
    assert_close_to_exact(x.grad, product(torch.ones(7, 30), layer.weight))
    assert layer.weight.grad is None
    layer.weight.requires_grad_(True)
    layer.bias.requires_grad_(False)
    layer.bias.grad = None
    layer(x.detach()).sum().backward()
    assert layer.bias.grad is None
    assert not layer.weight.grad[~layer.weight_mask].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 5), (31, 33), (600, 500)])
def test_the_gradient_of_every_dtype_and_size_is_masked_in_place(dtype, shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.4
    layer = MaskedLinear(shape[1], shape[0], dtype=dtype, mask=mask)
    x, dy = torch.randn(4, shape[1]).to(dtype), torch.randn(4, shape[0]).to(dtype)
    with prefer("dense"):
        layer(x).backward(dy)
    assert_close_to_exact(layer.weight.grad, product(dy.t(), x).where(mask))
    assert not bits(layer.weight.grad)[~mask].any()


@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 1000, (1 << 18) + 5, (1 << 22) + 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_zero_pruned(size, dtype):
    from initperf.kernels.cpu.masks.zero_pruned import zero_pruned

    mask, whole = torch.rand(size) < 0.5, torch.randn(size + 2).to(dtype)
    whole[:] = torch.where(whole == 0, 1, whole)
    for packed in (None, pack_bits(mask)):
        copy = whole.clone()
        zero_pruned(copy[1:-1], mask, packed)
        want = torch.cat([whole[:1], whole[1:-1] * mask, whole[-1:]])
        assert torch.equal(copy, want)
        assert not bits(copy[1:-1])[~mask].any()


def test_a_gradient_that_never_comes(layer, path):
    class Cut(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, dy):
            return None

    x = torch.randn(7, 20, requires_grad=True)
    (Cut.apply(layer(x)).sum() + x.sum()).backward()
    assert layer.weight.grad is None or not layer.weight.grad.any()
    assert torch.equal(x.grad, torch.ones_like(x))


@pytest.mark.parametrize(
    "name", ["MaskedLinear(6, 5", "SparseLinear(6, 5", "MaskedConv2d(2, 3, 3", "SparseConv2d(2, 3, 3"]
)
def test_each_layer_trains_where_nothing_else_was_imported(name):
    shape = "(5, 6)" if "Linear" in name else "(3, 2, 3, 3)"
    code = (
        f"import torch; from initperf import {name.split('(')[0]}\n"
        f"layer = {name}, mask=torch.rand{shape} < 0.5)\n"
        f"layer(torch.randn({'4, 6' if 'Linear' in name else '4, 2, 8, 8'})).sum().backward()\n"
        "print(all(p.grad is not None for p in layer.parameters()))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.stdout.split() == ["True"], found.stderr


@pytest.mark.parametrize("kind", [MaskedLinear, SparseLinear])
@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("gradients", [True, False])
def test_inputs_and_gradients_that_are_still_to_be_negated(kind, rows, gradients):
    """As conj().imag gives them: their memory holds the opposite."""
    mask = torch.rand(100, 200) < 0.2
    layer = kind(200, 100, mask=mask)
    x, dy = torch.randn(rows, 200), torch.randn(rows, 100)
    expected = of_linear(layer.to_dense(), -x, -dy)
    lazily = torch._neg_view(x)
    assert lazily.is_neg()
    with torch.set_grad_enabled(gradients):
        y = layer(lazily)
        assert_close_to_exact(y, expected[0])
        if gradients:
            y.backward(torch._neg_view(dy))
            values = layer.weight.grad[mask] if kind is MaskedLinear else layer.weight_values.grad.flatten()
            assert_close_to_exact(values, expected[2].at(lambda t: t[mask]))
            assert_close_to_exact(layer.bias.grad, expected[3])
