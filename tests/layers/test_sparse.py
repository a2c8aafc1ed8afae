"""SparseLinear stores survivors only, and otherwise behaves as the linear layer it stands for."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from initperf import ops, rng
from initperf.choice import prefer
from initperf.core import without_dispatch
from initperf.core.bits import pack_bits, unpack_bits
from initperf.core.checks import InitPerfError
from initperf.layers.linear import MaskedLinear, SparseLinear
from initperf.layers.ops import sparse_linear as sparse_ops
from tolerance import Sums, assert_close_to_exact, assert_near, bits, linear, of_linear

pytest.importorskip("numba")


def mask_of(N=30, K=20, density=0.3, seed=0):
    return torch.rand(N, K, generator=torch.Generator().manual_seed(seed)) < density


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return SparseLinear(20, 30, mask=mask_of())


@pytest.fixture(params=["sparse", "dense", "small"])
def path(request, monkeypatch):
    """Both products that an op may choose, and what small layers leave to torch's own ops."""
    if request.param == "dense":
        monkeypatch.setattr(without_dispatch, "TINY", 0)
    with prefer("sparse" if request.param == "sparse" else "dense"):
        yield request.param


def test_it_stores_the_survivors_in_row_major_order_and_the_mask_as_bits(layer):
    mask = mask_of()
    assert {n: tuple(p.shape) for n, p in layer.named_parameters()} == {
        "weight_values": (int(mask.sum()), 1),
        "bias": (30,),
    }
    assert {n: (tuple(b.shape), b.dtype) for n, b in layer.named_buffers()} == {
        "weight_mask_bits": ((75,), torch.uint8)
    }
    assert torch.equal(layer.weight_mask, mask)
    assert torch.equal(layer.to_dense().weight[mask], layer.weight_values.flatten())
    assert not bits(layer.to_dense().weight.detach())[~mask].any()
    assert layer.weight_shape == (30, 20)
    assert layer.nnz == int(mask.sum())
    assert layer.density == pytest.approx(float(mask.float().mean()))
    assert f"in_features=20, out_features=30, bias=True, density={layer.density:.4g}, nnz={layer.nnz}" in repr(layer)
    assert not hasattr(layer, "weight")


def test_bits_are_those_of_packbits_and_come_back():
    mask = mask_of(5, 7)
    packed = pack_bits(mask)
    assert packed.tolist() == [
        sum(int(b) << i for i, b in enumerate(mask.flatten()[8 * j : 8 * j + 8])) for j in range(5)
    ]
    assert torch.equal(unpack_bits(packed, (5, 7)), mask)


def outputs_of(layer, x) -> Sums:
    """What the dense layer of the same parameters gives."""
    dense = layer.to_dense()
    return linear(x, dense.weight, dense.bias)


def check(layer, x, dy):
    x.requires_grad_()
    y = layer(x)
    y.backward(dy)
    expected = of_linear(layer.to_dense(), x, dy)
    expected[2] = expected[2].at(lambda t: t[layer.weight_mask][:, None])
    for got, right in zip([y, x.grad, *(p.grad for p in layer.parameters())], expected, strict=True):
        assert_close_to_exact(got, right)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_outputs_and_gradients_are_those_of_nn_linear(path, dtype, bias):
    layer = SparseLinear(20, 30, bias, dtype=dtype, mask=mask_of())
    check(layer, torch.randn(60, 20).to(dtype), torch.randn(60, 30).to(dtype))


@pytest.mark.parametrize(
    ("N", "K", "density"), [(1, 1, 1.0), (3, 300, 0.05), (300, 3, 0.5), (130, 257, 0.1), (64, 64, 0.69)]
)
@pytest.mark.parametrize("batch", [1, 2, 17, 100])
def test_odd_shapes_and_batches(path, N, K, density, batch):
    check(SparseLinear(K, N, mask=mask_of(N, K, density)), torch.randn(batch, K), torch.randn(batch, N))


@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (2, 1, 4), (0,), (3, 0), (2, 0, 4)])
def test_any_leading_dimensions_behave_as_in_nn_linear(layer, path, leading):
    x = torch.randn(*leading, 20, requires_grad=True)
    y = layer(x)
    assert_close_to_exact(y, outputs_of(layer, x))
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert layer.weight_values.grad.shape == layer.weight_values.shape
    assert torch.isfinite(layer.weight_values.grad).all()


@pytest.mark.parametrize(("K", "N"), [(0, 3), (3, 0), (0, 0)])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_sizes_of_zero_are_permitted_as_in_nn_linear(K, N):
    layer, x = SparseLinear(K, N), torch.randn(4, K, requires_grad=True)
    assert torch.equal(layer(x), layer.to_dense()(x))
    layer(x).sum().backward()
    assert x.grad.shape == (4, K)


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_masks_of_all_and_of_nothing_work(path, density):
    layer = SparseLinear(20, 30, mask=torch.full((30, 20), bool(density)))
    assert layer.nnz == 600 * density
    x = torch.randn(6, 20, requires_grad=True)
    assert_close_to_exact(layer(x), outputs_of(layer, x))
    layer(x).sum().backward()
    assert layer.weight_values.grad.shape == (int(600 * density), 1)
    assert bool(x.grad.any()) == bool(density)
    torch.optim.Adam(layer.parameters()).step()
    copy.deepcopy(layer).reset_parameters()


def test_with_no_mask_everything_survives():
    layer = SparseLinear(20, 30)
    assert layer.density == 1
    x = torch.randn(5, 20)
    assert_close_to_exact(layer(x), outputs_of(layer, x))


def test_the_seed_gives_survivors_the_values_they_have_in_the_dense_layer():
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(3)
        sparse = SparseLinear(20, 30, dtype=dtype, mask=mask_of())
        masked = MaskedLinear(20, 30, dtype=dtype, mask=mask_of())
        torch.manual_seed(4)
        sparse.reset_parameters()
        torch.manual_seed(4)
        masked.reset_parameters()
        assert torch.equal(sparse.to_dense().weight, masked.weight)
        assert torch.equal(sparse.bias, masked.bias)
        assert sparse.weight_values.abs().max() <= 20**-0.5
        assert len(sparse.weight_values.unique()) > 50


def test_initialize_gives_survivors_the_values_of_the_dense_model():
    from initperf import initialize

    dense = nn.Sequential(nn.Linear(20, 30))
    sparse = nn.Sequential(SparseLinear(20, 30, mask=mask_of()))
    initialize(dense, seed=5)
    initialize(sparse, seed=5)
    assert torch.equal(sparse[0].weight_values.flatten(), dense[0].weight[mask_of()])
    assert rng.canonical_name("0.weight_values") == "0.weight"


def test_non_contiguous_inputs_and_output_gradients_give_the_same(layer, path):
    x = torch.randn(20, 7).t()
    for given in (x, x.contiguous()):
        assert_close_to_exact(layer(given), outputs_of(layer, x))
    layer(x).backward(torch.ones(1, 1).expand(7, 30))
    grad = layer.weight_values.grad
    layer.weight_values.grad = None
    layer(x).backward(torch.ones(7, 30))
    assert_near(grad, layer.weight_values.grad)


def test_no_grad_and_inference_mode_give_the_same(layer):
    x = torch.randn(6, 20)
    expected = layer(x)
    with torch.no_grad():
        assert torch.equal(layer(x), expected)
    with torch.inference_mode():
        assert torch.equal(layer(x), expected)
        made = SparseLinear(20, 30, mask=mask_of())
        made.set_mask(mask_of(seed=3))
        assert_close_to_exact(made(x), outputs_of(made, x))


def test_frozen_values_get_no_gradient(layer):
    layer.weight_values.requires_grad_(False)
    x = torch.randn(6, 20, requires_grad=True)
    layer(x).sum().backward()
    assert layer.weight_values.grad is None
    assert x.grad is not None
    assert not layer.to_dense().weight.requires_grad
    assert not SparseLinear.from_linear(layer.to_dense(), mask_of()).weight_values.requires_grad


def test_autocast_lowers_the_layer_as_it_lowers_nn_linear(layer, path):
    x = torch.randn(6, 20, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad.dtype == layer.weight_values.grad.dtype == torch.float32


def test_double_backward_reaches_the_values(path):
    layer = SparseLinear(5, 4, dtype=torch.float64, mask=mask_of(4, 5))
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    dense = layer.to_dense()
    grads = []
    for module in (layer, dense):
        own = x.detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(module(own).pow(2).sum(), own, create_graph=True)
        gradient.pow(2).sum().backward()
        grads.append(own.grad)
    assert_near(*grads)
    assert_near(layer.weight_values.grad.flatten(), dense.weight.grad[layer.weight_mask])


@pytest.mark.parametrize("density", [0.4, 0.0, 1.0])
def test_all_gradients_of_the_three_ops_are_right(path, density):
    layer = SparseLinear(5, 4, dtype=torch.float64, mask=mask_of(4, 5, density))
    pattern, packed = layer._fresh_pattern().tensors, layer.weight_mask_bits
    x, dy = (torch.randn(3, n, dtype=torch.float64, requires_grad=True) for n in (5, 4))
    values = layer.weight_values.detach().requires_grad_()

    def products(x, dy, values, bias):
        return (
            sparse_ops.sparse_linear(x, values, bias, packed, 4, pattern),
            sparse_ops.sparse_grad_input(dy, values, packed, 5, pattern),
            sparse_ops.sparse_grad_values(dy, x, packed, len(values), pattern),
        )

    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(products, (x, dy, values, bias))
    assert torch.autograd.gradgradcheck(products, (x, dy, values, bias))


def test_the_ops_pass_torchs_own_check():
    layer = SparseLinear(20, 30, mask=mask_of())
    pattern, packed = layer._fresh_pattern().tensors, layer.weight_mask_bits
    x, dy = torch.randn(6, 20, requires_grad=True), torch.randn(6, 30, requires_grad=True)
    values, bias = layer.weight_values, layer.bias
    for op, arguments in (
        (sparse_ops.sparse_linear, (x, values, bias, packed, 30, pattern)),
        (sparse_ops.sparse_grad_input, (dy, values, packed, 20, pattern)),
        (sparse_ops.sparse_grad_values, (dy, x, packed, layer.nnz, pattern)),
    ):
        torch.library.opcheck(op, arguments)


def test_what_ran_is_counted(layer, monkeypatch):
    monkeypatch.setattr(without_dispatch, "TINY", 0)
    x = torch.randn(6, 20, requires_grad=True)
    dense = "mkl" if sparse_ops.own(x) is None else sparse_ops.OWN
    for mode, backend in (("sparse", "numba"), ("dense", dense)):
        with prefer(mode):
            before = ops.CALLS.copy()
            layer(x).sum().backward()
        assert ops.CALLS - before == {
            (name, backend): 1 for name in ("sparse_linear", "sparse_grad_input", "sparse_grad_values")
        }


def test_the_transforms_of_torch_func_work_as_on_a_linear_layer():
    layer = SparseLinear(6, 5, mask=torch.rand(5, 6) < 0.5)
    dense, x = layer.to_dense(), torch.randn(3, 6)

    def loss(module):
        return lambda weights: torch.func.functional_call(module, weights, x).square().sum()

    assert_close_to_exact(torch.vmap(layer)(x), outputs_of(layer, x))
    mine = torch.func.grad(loss(layer))(dict(layer.named_parameters()))
    theirs = torch.func.grad(loss(dense))(dict(dense.named_parameters()))
    assert_near(mine["weight_values"].flatten(), theirs["weight"][layer.weight_mask])
    for got, right in zip(torch.func.jvp(layer, (x,), (x,)), torch.func.jvp(dense, (x,), (x,)), strict=True):
        assert_near(got, right)
    stacked = {n: torch.stack([p, 2 * p]) for n, p in layer.named_parameters()}
    both = torch.vmap(lambda weights: torch.func.functional_call(layer, weights, x))(stacked)
    assert_near(both, torch.stack([dense(x), 2 * dense(x)]))


def test_hooks_fire(layer):
    seen = []
    layer.register_forward_hook(lambda *args: seen.append("forward"))
    layer.register_full_backward_hook(lambda *args: seen.append("backward"))
    layer.weight_values.register_post_accumulate_grad_hook(lambda p: seen.append("grad"))
    layer(torch.randn(6, 20, requires_grad=True)).sum().backward()
    assert sorted(seen) == ["backward", "forward", "grad"]


def test_meta_layers_have_shapes_and_come_alive_with_their_mask(layer):
    meta = SparseLinear(20, 30, device="meta", mask=mask_of())
    assert meta(torch.empty(4, 20, device="meta")).shape == (4, 30)
    assert meta.weight_values.shape == layer.weight_values.shape
    meta.to_empty(device="cpu").reset_parameters()
    assert torch.equal(meta.weight_mask, mask_of())
    moved = copy.deepcopy(layer).to("meta").to_empty(device="cpu")
    moved.load_state_dict(layer.state_dict())
    x = torch.randn(4, 20)
    assert torch.equal(moved(x), layer(x))
    assigned = SparseLinear(20, 30, device="meta", mask=mask_of(seed=9))
    assigned.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(assigned(x), layer(x))


def test_a_copy_and_a_pickle_are_the_same_layer(layer):
    x = torch.randn(6, 20)
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(stream, weights_only=False)):
        assert torch.equal(twin(x), layer(x))
        twin.set_mask(~layer.weight_mask)
        assert_close_to_exact(twin(x), outputs_of(twin, x))
        assert torch.equal(layer.weight_mask, mask_of())


@pytest.mark.parametrize(
    "convert",
    [
        lambda m: m.half(),
        lambda m: m.double(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.type(torch.float64),
        lambda m: m.share_memory(),
    ],
)
def test_the_mask_survives_conversions(layer, convert):
    convert(layer)
    assert layer.weight_mask_bits.dtype == torch.uint8
    assert torch.equal(layer.weight_mask, mask_of())
    x = torch.randn(6, 20).to(layer.weight_values.dtype)
    assert_close_to_exact(layer(x), outputs_of(layer, x))


def test_set_mask_prunes_and_revives_at_zero_on_the_same_parameter(layer):
    old, new = layer.weight_mask, mask_of(seed=5, density=0.5)
    before, parameter = layer.to_dense().weight.detach(), layer.weight_values
    loss = layer(torch.randn(6, 20)).sum()  # kept: its graph still knows the old shape
    loss.backward()
    gradient = layer.expand(layer.weight_values.grad)
    layer.set_mask(new)
    assert layer.weight_values is parameter
    assert torch.equal(layer.weight_mask, new)
    assert torch.equal(layer.to_dense().weight, before.masked_fill(~(old & new), 0))
    assert torch.equal(layer.expand(parameter.grad), gradient.masked_fill(~(old & new), 0))
    x = torch.randn(6, 20)
    assert_close_to_exact(layer(x), outputs_of(layer, x))
    parameter.grad = None
    layer(x).sum().backward()
    assert parameter.grad.shape == (int(new.sum()), 1)


def test_writing_the_same_bits_again_keeps_the_index_and_other_bits_are_noticed(layer):
    x = torch.randn(6, 20)
    index = layer._fresh_pattern()
    layer.weight_mask_bits.copy_(layer.weight_mask_bits.clone())  # as DistributedDataParallel does
    assert layer._fresh_pattern() is index
    rolled = layer.weight_mask.roll(1, 0)
    layer.weight_mask_bits.copy_(pack_bits(rolled))
    assert_close_to_exact(layer(x), outputs_of(layer, x))
    layer.weight_mask_bits.zero_()
    with pytest.raises(InitPerfError, match="survivors"):
        layer(x)


@pytest.mark.parametrize(
    ("mask", "what"),
    [
        (torch.ones(20, 30, dtype=torch.bool), r"shape \(30, 20\). Got \(20, 30\)"),
        (torch.ones(30, 20), "dtype bool"),
        ([[True]], "torch.Tensor"),
    ],
)
def test_a_wrong_mask_is_refused_and_nothing_changes(layer, mask, what):
    before = {n: v.clone() for n, v in layer.state_dict().items()}
    for act in (
        lambda: SparseLinear(20, 30, mask=mask),
        lambda: layer.set_mask(mask),
        lambda: SparseLinear.from_linear(nn.Linear(20, 30), mask),
    ):
        with pytest.raises(InitPerfError, match=what):
            act()
    assert all(torch.equal(v, before[n]) for n, v in layer.state_dict().items())


def test_wrong_sources_and_dtypes_are_refused():
    with pytest.raises(TypeError, match="nn.Linear"):
        SparseLinear.from_linear(nn.Conv2d(3, 4, 3))
    with pytest.raises(TypeError, match="MaskedLinear"):
        SparseLinear.from_masked(nn.Linear(3, 4))
    with pytest.raises(InitPerfError, match="float32, bfloat16"):
        SparseLinear(3, 4, dtype=torch.int32)
    pruned = prune.random_unstructured(nn.Linear(3, 4), "weight", 0.5)
    with pytest.raises(InitPerfError, match=r"prune\.remove"):
        SparseLinear.from_linear(pruned)


@pytest.mark.parametrize(
    "x", [torch.randn(4, 19), torch.randn(3, 4, 21), torch.randn(19), torch.randn(4, 20).double(), torch.tensor(1.0)]
)
def test_a_wrong_input_raises_what_nn_linear_raises(layer, x):
    with pytest.raises(RuntimeError, match="Expected"):
        layer(x)
    with pytest.raises(RuntimeError):
        layer.to_dense()(x)
    with pytest.raises(TypeError, match="torch.Tensor"):
        layer([1.0] * 20)


def kinds():
    """A dense, a masked, a compressed and a torch-pruned layer of the same weights."""
    torch.manual_seed(1)
    dense = nn.Linear(20, 30)
    with torch.no_grad():
        dense.weight[0, 0] = -0.0  # survives, with its sign
    mask = mask_of(seed=8, density=0.2)
    mask[0, 0] = True
    pruned = prune.custom_from_mask(copy.deepcopy(dense), "weight", mask)
    masked = MaskedLinear.from_linear(copy.deepcopy(dense), mask)
    return dense, masked, SparseLinear.from_linear(dense, mask), pruned


@pytest.mark.parametrize("assign", [False, True])
def test_checkpoints_travel_between_all_kinds_without_loss(layer, assign):
    dense, masked, sparse, pruned = kinds()
    assert torch.equal(dense.weight, kinds()[0].weight), "from_linear edited the layer"
    for source in (masked, sparse, pruned):
        for target in (copy.deepcopy(layer), MaskedLinear(20, 30, mask=mask_of())):
            checkpoint = {n: v.clone() for n, v in source.state_dict().items()}
            assert target.load_state_dict(checkpoint, strict=True, assign=assign) == ([], [])
            assert torch.equal(target.weight_mask, masked.weight_mask)
            assert torch.equal(bits(target.to_dense().weight.detach()), bits(masked.weight.detach()))
            assert torch.equal(target.bias, dense.bias)
            assert all(torch.equal(v, checkpoint[n]) for n, v in source.state_dict().items())
    again = nn.Linear(20, 30)
    again.load_state_dict(sparse.to_dense().state_dict(), strict=True)
    assert torch.equal(bits(again.weight.detach()), bits(masked.weight.detach()))
    for twin in (sparse.to_masked(), SparseLinear.from_masked(masked), SparseLinear.from_masked(sparse.to_masked())):
        assert torch.equal(twin.weight_mask, masked.weight_mask)
        assert torch.equal(bits(twin.to_dense().weight.detach()), bits(masked.weight.detach()))


def test_a_dense_checkpoint_keeps_the_mask_and_its_own_brings_one(layer):
    dense, _, sparse, _ = kinds()
    parameter, mask = layer.weight_values, layer.weight_mask
    assert layer.load_state_dict(dense.state_dict(), strict=True) == ([], [])
    assert torch.equal(layer.weight_mask, mask)
    assert torch.equal(layer.weight_values.flatten(), dense.weight[mask])
    layer.load_state_dict(sparse.state_dict())
    assert layer.weight_values is parameter
    assert torch.equal(layer.weight_mask, sparse.weight_mask)
    x = torch.randn(6, 20)
    assert torch.equal(layer(x), sparse(x))
    assert layer.load_state_dict({"bias": torch.zeros(30)}, strict=False).missing_keys == ["weight_values"]
    assert set(layer.state_dict()) == {"weight_values", "bias", "weight_mask_bits"}


@pytest.mark.parametrize(
    "damage",
    [
        {"weight_mask_bits": torch.zeros(74, dtype=torch.uint8)},
        {"weight_mask_bits": torch.zeros(75, dtype=torch.uint8)},
        {"weight_mask_bits": torch.zeros(75)},
        {"weight_values": torch.ones(3, 1)},
        {"weight_values": torch.ones(30, 20)},
        {"bias": torch.ones(3)},
    ],
)
def test_a_damaged_checkpoint_is_refused_and_nothing_changes(layer, damage):
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    other = SparseLinear(20, 30, mask=mask_of(seed=4)).state_dict()
    with pytest.raises(RuntimeError, match="Expected"):
        layer.load_state_dict(other | damage)
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_masked_layer_refuses_a_damaged_compressed_checkpoint():
    masked = MaskedLinear(20, 30, mask=mask_of())
    before = {n: v.clone() for n, v in masked.state_dict().items()}
    broken = SparseLinear(20, 30, mask=mask_of(seed=4)).state_dict() | {"weight_values": torch.ones(3, 1)}
    with pytest.raises(RuntimeError):
        masked.load_state_dict(broken)
    assert all(torch.equal(v, before[n]) for n, v in masked.state_dict().items() if n != "bias")


def test_many_gradients_at_once(layer, path):
    x, dy = torch.randn(7, 20, requires_grad=True), torch.randn(3, 7, 30)
    inputs = (x, layer.weight_values, layer.bias)
    y = layer(x)
    found = torch.autograd.grad(y, inputs, dy, is_grads_batched=True, retain_graph=True)
    for i in range(3):
        for one, many in zip(torch.autograd.grad(y, inputs, dy[i], retain_graph=True), found, strict=True):
            assert_near(many[i], one)
