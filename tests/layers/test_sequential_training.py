"""A SparseSequential trains its runs of small layers by two calls: the gradients are those of the dense network."""

import copy
import gc
import weakref
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from chains import assert_right, dense_of, in_threads, layer, model, with_threads
from forks import assert_same_in_a_forked_child, needs_fork
from initperf import SparseLinear, SparseSequential, choice, ops, sparsify
from initperf.choice import prefer
from tolerance import assert_close_to_exact, assert_near, bits, of_network
from walls import before_a_wall, needs_walls

pytest.importorskip("numba")
from initperf.kernels.cpu.chain import training as kernels  # noqa: E402
from initperf.kernels.cpu.sparse.compressed_index import sparse_tensors  # noqa: E402

COUNTS = ("sparse_chain_training", "numba"), ("sparse_chain_backward", "numba")


@pytest.fixture(autouse=True)
def sparse_products():
    with prefer("sparse"):
        yield


def counted(call):
    before = [ops.CALLS[what] for what in COUNTS]
    result = call()
    return result, tuple(ops.CALLS[what] - b for what, b in zip(COUNTS, before, strict=True))


def gradients(network, x, dy, needs_x=True):
    """[y, dx, then of every parameter], those of compressed weights as dense ones."""
    x = x.detach().clone().requires_grad_(needs_x)
    y = network(x)
    parameters = list(network.parameters())
    found = torch.autograd.grad(y, [x, *parameters] if needs_x else parameters, dy.to(y.dtype))
    owners = {id(m.weight_values): m for m in network.modules() if isinstance(m, SparseLinear)}
    result = [y.detach(), *found]
    for place, parameter in enumerate(parameters, start=len(result) - len(parameters)):
        if id(parameter) in owners:
            result[place] = owners[id(parameter)].expand(result[place])
    return result


def masks_of(network):
    """By parameter of the dense network: the mask of its gradient, or None."""
    return [
        mask
        for m in network
        if isinstance(m, SparseLinear)
        for mask in ([m.weight_mask] if m.bias is None else [m.weight_mask, None])
    ]


def assert_right_gradients(got, ours, x, dy, needs_x=True):
    """got is [y, dx, then of every parameter, dense] of the dense network, within rounding."""
    y, dx, *expected = of_network(dense_of(ours), x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1]))
    expected = [e if mask is None else e.where(mask) for e, mask in zip(expected, masks_of(ours), strict=True)]
    for mine, right in zip(got, [y, *([dx] if needs_x else []), *expected], strict=True):
        assert_close_to_exact(mine, right.at(lambda t, shape=mine.shape: t.reshape(shape)))


def check(ours, x, needs_x=True):
    dy = torch.randn(*x.shape[:-1], [m for m in ours if isinstance(m, SparseLinear)][-1].out_features)
    got, counts = counted(lambda: gradients(ours, x, dy.to(x.dtype), needs_x))
    assert counts == (1, 1)
    assert_right_gradients(got, ours, x, dy.to(x.dtype), needs_x)
    return got


@pytest.mark.parametrize("rows", [1, 4, 16, 17, 33, 60, 64, 65, 130, 200])
@pytest.mark.parametrize("widths", [(784, 300, 100, 10), (130, 257, 3), (20, 1, 40, 16)])
@pytest.mark.parametrize("needs_x", [True, False])
def test_gradients_are_those_of_the_dense_network(widths, rows, needs_x):
    check(model(*widths), torch.randn(rows, widths[0]), needs_x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [3, 40])
def test_every_dtype(dtype, rows):
    ours = model(200, 90, 30, dtype=dtype)
    check(ours, torch.randn(rows, 200).to(dtype))
    assert all(g.dtype == dtype for g in gradients(ours, torch.randn(rows, 200).to(dtype), torch.ones(rows, 30)))


@pytest.mark.parametrize("density", [0.004, 0.03, 0.5, 1.0])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("last_relu", [True, False])
def test_densities_biases_and_a_relu_at_the_end(density, bias, last_relu):
    check(model(300, 150, 20, density=density, bias=bias, last_relu=last_relu), torch.randn(40, 300))


@pytest.mark.parametrize("rows", [3, 40, 300])
def test_the_bits_do_not_depend_on_threads(rows):
    ours, x, dy = model(784, 300, 100, 10), torch.randn(rows, 784), torch.randn(rows, 10)
    found = with_threads((1, 2, 3), lambda: [bits(g) for g in gradients(ours, x, dy)])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_every_share_of_the_work_gives_the_same_bits():
    """More workers than panels or parts, which a machine of many cores would ask for."""
    ours, x, dy = model(784, 300, 100, 10), torch.randn(60, 784), torch.randn(60, 10)
    want = [bits(g) for g in gradients(ours, x, dy)]
    plan = next(iter(ours._parts.parts[0].plans.training.values())).plan
    for workers in (1, 2, 3, 5, 9, 2, 1):
        owners = plan.owners(workers)
        assert len(owners) == len(plan.panels)
        assert set(owners.tolist()) <= set(range(workers))
    loads = [sum(size for size, o in zip(plan.panels, plan.owners(2), strict=True) if o == w) for w in (0, 1)]
    assert max(loads) < 0.6 * plan.slots
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(kernels, "SERIAL", 0)
        for count in (1, 2, 5):
            patched.setattr(kernels, "threads", lambda count=count: count)
            assert all(torch.equal(a, bits(b)) for a, b in zip(want, gradients(ours, x, dy), strict=True))


@pytest.mark.parametrize("shape", [(100,), (3, 100), (2, 3, 100)])
def test_inputs_of_any_number_of_dimensions(shape):
    check(model(100, 60, 10), torch.randn(shape))


@pytest.mark.parametrize("shape", [(0, 100), (0, 2, 100)])
def test_an_empty_batch(shape):
    ours, x = model(100, 60, 10), torch.randn(shape, requires_grad=True)
    ours(x).sum().backward()
    assert x.grad.shape == shape
    assert all(not p.grad.any() for p in ours.parameters())


def test_inputs_and_gradients_that_are_not_contiguous():
    ours = model(100, 60, 10)
    wide = torch.randn(100, 7)
    check(ours, wide.t())
    x = torch.randn(7, 100, requires_grad=True)
    y = ours(x)
    want = torch.autograd.grad(y, x, torch.ones(7, 10), retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(y, x, torch.ones(1, 1).expand(7, 10), retain_graph=True)[0], want)
    dy = torch.randn(10, 7).t()
    want = torch.autograd.grad(y, x, dy.contiguous(), retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(y, x, dy)[0], want)


def test_a_negated_gradient():
    ours, x = model(100, 60, 10), torch.randn(7, 100, requires_grad=True)
    dy = torch.randn(7, 10, dtype=torch.complex64)
    y = ours(x)
    got = torch.autograd.grad(y, x, dy.conj().imag, retain_graph=True)[0]
    assert_near(got, torch.autograd.grad(y, x, -dy.imag.contiguous())[0])


@pytest.mark.parametrize(
    "frozen", [(0, 1), (0, 1, 2), (2, 3), (0, 1, 2, 3), (0, 1, 2, 3, 4), (0, 2, 4), (1, 3, 5), (4, 5)]
)
@pytest.mark.parametrize("needs_x", [True, False])
def test_frozen_parameters_of_three_layers(frozen, needs_x):
    ours, x, dy = model(100, 60, 30, 10), torch.randn(70, 100), torch.randn(70, 10)
    free = gradients(ours, x, dy)[2:]
    parameters = list(ours.parameters())
    for place in frozen:
        parameters[place].requires_grad_(False)
    wanted = [place for place in range(6) if place not in frozen]
    found = torch.autograd.grad(ours(x.requires_grad_(needs_x)), [parameters[place] for place in wanted], dy)
    for place, gradient in zip(wanted, found, strict=True):
        dense = ours[place // 2 * 2].expand(gradient) if place % 2 == 0 else gradient
        assert torch.equal(dense, free[place])


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (3,), (0, 1), (2, 3), (0, 2), (1, 3), (0, 1, 2)])
@pytest.mark.parametrize("needs_x", [True, False])
def test_frozen_parameters_get_no_gradient_and_change_no_other(frozen, needs_x):
    ours, x, dy = model(100, 60, 10), torch.randn(9, 100, requires_grad=needs_x), torch.randn(9, 10)
    free = gradients(ours, x, dy)[1:]
    for place in frozen:
        list(ours.parameters())[place].requires_grad_(False)
    _, counts = counted(lambda: ours(x).backward(dy))
    assert counts == (1, 1)
    if needs_x:
        assert torch.equal(x.grad, free[0])
    for place, p in enumerate(ours.parameters()):
        if place in frozen:
            assert p.grad is None
        else:
            dense = ours[place // 2 * 2].expand(p.grad) if place % 2 == 0 else p.grad
            assert torch.equal(dense, free[1 + place])


def test_without_anything_to_differentiate_inference_runs():
    ours, x = model(100, 60, 10).requires_grad_(False), torch.randn(9, 100)
    before = ops.CALLS["sparse_chain", "numba"]
    y, counts = counted(lambda: ours(x))
    assert not y.requires_grad
    assert counts == (0, 0)
    assert ops.CALLS["sparse_chain", "numba"] == before + 1


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_training_goes_the_way_of_the_dense_network(optimizer):
    torch.manual_seed(0)
    ours = model(60, 40, 30, 5, density=0.3)
    theirs, masks = dense_of(ours), masks_of(ours)
    x, target = torch.randn(50, 60), torch.randint(0, 5, (50,))
    one, other = optimizer(ours.parameters(), lr=0.01), optimizer(theirs.parameters(), lr=0.01)
    for _ in range(15):
        losses = []
        for network, stepper in ((ours, one), (theirs, other)):
            stepper.zero_grad()
            loss = nn.functional.cross_entropy(network(x), target)
            loss.backward()
            if network is theirs:
                for p, mask in zip(theirs.parameters(), masks, strict=True):
                    if mask is not None:
                        p.grad *= mask
            stepper.step()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_gradients_accumulate():
    ours, x, dy = model(100, 60, 10), torch.randn(9, 100), torch.randn(9, 10)
    ours(x).backward(dy)
    once = [p.grad.clone() for p in ours.parameters()]
    ours(x).backward(dy)
    assert all(torch.equal(p.grad, 2 * g) for p, g in zip(ours.parameters(), once, strict=True))


def test_a_graph_may_be_run_back_twice():
    ours, x, dy = model(100, 60, 10), torch.randn(9, 100, requires_grad=True), torch.randn(9, 10)
    y = ours(x)
    first = torch.autograd.grad(y, [x, *ours.parameters()], dy, retain_graph=True)
    second = torch.autograd.grad(y, [x, *ours.parameters()], dy)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        y.backward(dy)


@pytest.mark.parametrize("last_relu", [True, False])
def test_second_derivatives(last_relu):
    ours = model(12, 9, 4, density=0.6, dtype=torch.float64, last_relu=last_relu)
    names, parameters = zip(*ours.named_parameters(), strict=True)
    x = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)

    def call(x, *parameters):
        return functional_call(ours, dict(zip(names, parameters, strict=True)), (x,))

    assert counted(lambda: call(x, *parameters))[1] == (1, 0)
    assert torch.autograd.gradcheck(call, (x, *parameters))
    assert torch.autograd.gradgradcheck(call, (x, *parameters))


def test_a_gradient_penalty_trains_as_in_the_dense_network():
    ours, x = model(60, 40, 1, density=0.4, dtype=torch.float64), torch.randn(9, 60, dtype=torch.float64)
    theirs, found = dense_of(ours), []
    for network in (ours, theirs):
        x_ = x.clone().requires_grad_()
        (dx,) = torch.autograd.grad(network(x_).sum(), x_, create_graph=True)
        dx.square().sum().backward()
        found.append([p.grad for p in network.parameters()])
    for mine, right, mask in zip(*found, masks_of(ours), strict=True):
        if mask is None:
            if mine is not None and right is not None:
                assert_near(mine, right)
        else:
            owner = next(m for m in ours if isinstance(m, SparseLinear) and m.weight_shape == right.shape)
            assert_near(owner.expand(mine), right * mask)


def test_many_gradients_at_once():
    ours, x = model(30, 20, 4), torch.randn(5, 30, requires_grad=True)
    y, many = ours(x), torch.randn(3, 5, 4)
    got = torch.autograd.grad(y, [x, *ours.parameters()], many, is_grads_batched=True, retain_graph=True)
    for i in range(3):
        want = torch.autograd.grad(y, [x, *ours.parameters()], many[i], retain_graph=True)
        for a, b in zip(got, want, strict=True):
            assert_near(a[i], b)


def test_nan_passes_a_relu_as_torch_lets_it():
    ours, x = model(100, 60, 10, density=1.0), torch.randn(9, 100)
    x[3, 5] = float("nan")
    x[4, 6] = float("inf")
    dy = torch.ones(9, 10)
    for mine, right in zip(gradients(ours, x, dy), gradients(dense_of(ours), x, dy), strict=True):
        assert torch.equal(mine.isnan(), right.isnan())


def test_changes_before_the_backward_pass_raise_as_in_torch():
    ours, x = model(100, 60, 10), torch.randn(9, 100)
    y = ours(x).sum()
    with torch.no_grad():
        ours[2].weight_values.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
    y = ours(x).sum()
    ours[0].set_mask(ours[0].weight_mask.roll(1, 0))
    with pytest.raises(RuntimeError):
        y.backward()
    y = ours(x).sum()
    with torch.no_grad():
        ours[0].bias.add_(1)  # a bias is not needed: dense layers let it change, too
    y.backward()
    y, x = ours(x.requires_grad_()).sum(), x
    with torch.no_grad():
        ours[0].bias.add_(1)
    with pytest.raises(RuntimeError, match="biases"):
        torch.autograd.grad(y, x, create_graph=True)


def test_what_is_saved_may_be_moved_by_hooks():
    ours, x, dy = model(100, 60, 10), torch.randn(9, 100), torch.randn(9, 10)
    want = gradients(ours, x, dy)
    for pack, unpack in (
        (lambda t: t.clone(), lambda t: t.clone()),
        (lambda t: (t.dtype, t.double() if t.is_floating_point() else t), lambda p: p[1].to(p[0])),
    ):
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            got = gradients(ours, x, dy)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    strided = torch.autograd.graph.saved_tensors_hooks(
        lambda t: t, lambda t: torch.stack([t, t], -1)[..., 0] if t.shape[-1] == 1 else t
    )
    with strided:
        for got, right in zip(gradients(ours, x, dy), want, strict=True):
            assert_near(got, right)
    for change in (
        lambda t: t.double(),
        lambda t: t[:1] if t.shape[-1] == 1 else t,  # values
        lambda t: t[:1].clone() if t.dim() == 1 else t,  # tiles
        lambda t: t[:, :50].contiguous() if t.shape[-1] == 100 else t,  # x
    ):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, change):
            y = ours(x.requires_grad_())
            with pytest.raises((RuntimeError, TypeError)):  # an error, and not garbage
                y.backward(dy)
    y = ours(x)
    ours[0].weight_values.data = torch.randn(3, 1)
    with pytest.raises(RuntimeError, match="saved tensor"):
        y.backward(dy)


def test_an_input_that_no_gradient_needs_may_change():
    ours, x, dy = model(100, 60, 10), torch.randn(9, 100), torch.randn(9, 10)
    ours[0].weight_values.requires_grad_(False)
    parameters = [ours[0].bias, ours[2].weight_values, ours[2].bias]
    want = torch.autograd.grad(ours(x), parameters, dy)
    y = ours(x)
    penalty = ours(x)
    before = x.clone()
    x.mul_(2)
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(y, parameters, dy), want, strict=True))
    with pytest.raises(RuntimeError, match="input and biases"):
        torch.autograd.grad(penalty, parameters, dy, create_graph=True)
    with torch.inference_mode():
        frozen = before.clone()
    y, counts = counted(lambda: ours(frozen))
    assert counts == (1, 0)
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(y, parameters, dy), want, strict=True))


def test_parameters_with_a_pending_negation():
    ours, x = model(100, 60, 10), torch.randn(9, 100)
    for name in ("0.bias", "0.weight_values"):
        given = dict(ours.named_parameters())[name].detach()
        want = functional_call(ours, {name: -given}, (x,))
        assert_near(functional_call(ours, {name: torch._neg_view(given)}, (x,)), want)
        with torch.no_grad():
            assert_near(functional_call(ours, {name: torch._neg_view(given)}, (x,)), want)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant):
    ours, x, dy = model(100, 60, 10), torch.randn(9, 100, requires_grad=True), torch.randn(9, 10)
    want = gradients(ours, x, dy)[1:]
    checkpoint(ours, x, use_reentrant=reentrant).backward(dy)
    got = [x.grad, *(p.grad for p in ours.parameters())]
    got = [ours[0].expand(g) if i == 1 else ours[2].expand(g) if i == 3 else g for i, g in enumerate(got)]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_hooks_see_every_child_and_its_gradient():
    ours, x, seen = model(100, 60, 10), torch.randn(4, 100, requires_grad=True), []
    for register in (
        lambda m: m.register_forward_hook(lambda *a: seen.append("forward")),
        lambda m: m.register_forward_pre_hook(lambda *a: seen.append("forward pre")),
        lambda m: m.register_full_backward_hook(lambda *a: seen.append("backward")),
        lambda m: m.register_full_backward_pre_hook(lambda *a: seen.append("backward pre")),
    ):
        handle = register(ours[1])
        _, counts = counted(lambda: ours(x).sum().backward())
        handle.remove()
        assert counts == (0, 0)
    assert seen == ["forward", "forward pre", "backward", "backward pre"]
    handle = nn.modules.module.register_module_full_backward_hook(lambda m, *a: seen.append(type(m).__name__))
    try:
        ours(x).sum().backward()
    finally:
        handle.remove()
    assert "ReLU" in seen
    assert seen.count("SparseLinear") == 2
    assert counted(lambda: ours(x).sum().backward())[1] == (1, 1)


def test_hooks_on_parameters_and_on_the_output_run():
    ours, x, seen = model(100, 60, 10), torch.randn(4, 100), []
    ours[0].weight_values.register_hook(lambda g: seen.append("values") or g * 2)
    ours[2].bias.register_post_accumulate_grad_hook(lambda p: seen.append("bias"))
    y = ours(x)
    y.register_hook(lambda g: seen.append("output"))
    _, counts = counted(lambda: y.sum().backward())
    assert counts == (0, 1)
    assert sorted(seen) == ["bias", "output", "values"]


def test_dropout_at_work_is_called():
    ours = SparseSequential(layer(100, 60), nn.ReLU(), nn.Dropout(0.5), layer(60, 10, seed=1))
    x = torch.randn(4, 100)
    assert counted(lambda: ours(x).sum().backward())[1] == (0, 0)
    assert counted(lambda: ours.eval()(x).sum().backward())[1] == (1, 1)


def test_relu_in_place_leaves_the_input_alone():
    ours = SparseSequential(layer(100, 60), nn.ReLU(inplace=True), layer(60, 10, seed=1))
    x = torch.randn(4, 100)
    before = x.clone()
    check(ours, x)
    assert torch.equal(x, before)


def test_a_layer_used_twice():
    shared = layer(50, 50, 0.3)
    ours, x, dy = SparseSequential(shared, nn.ReLU(), shared), torch.randn(8, 50), torch.randn(8, 50)
    _, counts = counted(lambda: ours(x).backward(dy))
    assert counts == (1, 1)
    dense = shared.to_dense()
    nn.Sequential(dense, nn.ReLU(), dense)(x).backward(dy)
    assert_near(shared.expand(shared.weight_values.grad), dense.weight.grad * shared.weight_mask)
    assert_near(shared.bias.grad, dense.bias.grad)


def test_other_parameters_by_functional_call_get_the_gradients():
    ours, x = model(100, 60, 10), torch.randn(4, 100)
    other = {name: torch.randn_like(p, requires_grad=True) for name, p in ours.named_parameters()}
    found = torch.autograd.grad(functional_call(ours, other, (x,)).sum(), list(other.values()))
    stranger = copy.deepcopy(ours)
    stranger.load_state_dict(ours.state_dict() | {n: p.detach() for n, p in other.items()})
    want = torch.autograd.grad(stranger(x).sum(), list(stranger.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


def test_func_transforms_autocast_and_compilation_call_the_layers():
    ours, x = model(30, 20, 4), torch.randn(5, 30)
    parameters = dict(ours.named_parameters())

    def loss(parameters, x):
        return functional_call(ours, parameters, (x,)).square().sum()

    want = torch.autograd.grad(ours(x).square().sum(), list(parameters.values()))
    found, counts = counted(lambda: torch.func.grad(loss)(parameters, x))
    assert counts == (0, 0)
    for got, right in zip(found.values(), want, strict=True):
        assert_near(got, right)
    with torch.autocast("cpu", torch.bfloat16):
        assert counted(lambda: ours(x).float().sum().backward())[1] == (0, 0)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for got, right in zip(
        torch.autograd.grad(compiled(x).square().sum(), list(parameters.values())), want, strict=True
    ):
        assert_near(got, right)


def test_wrong_inputs_get_the_layers_errors():
    ours = model(100, 60, 10)
    for x in (torch.randn(3, 99), torch.randn(3, 100).double(), torch.tensor(1.0)):
        with pytest.raises(ValueError, match="Expected an input"):
            ours(x)
    ours[2].bias = nn.Parameter(torch.randn(9))
    with pytest.raises((ValueError, RuntimeError), match="bias"):
        ours(torch.randn(3, 100))


def test_values_that_are_not_contiguous_or_too_few():
    ours, x = model(100, 60, 10), torch.randn(3, 100)
    check(ours, x)
    values = ours[0].weight_values
    values.data = torch.stack([values.data, values.data], 1).flatten(1)[:, ::2]
    assert not values.is_contiguous()
    y, counts = counted(lambda: ours(x))
    assert counts == (0, 0)
    assert_right(y, ours, x)
    values.data = values.data[:-1].contiguous()
    with pytest.raises(RuntimeError, match="survivors"):
        ours(x)


def test_changes_of_mask_dtype_and_parameters_are_followed():
    ours, x = model(100, 60, 10), torch.randn(9, 100)
    check(ours, x)
    ours[0].set_mask(torch.rand(60, 100) < 0.5)
    ours[0].reset_parameters()
    check(ours, x)
    ours.double()
    check(ours, x.double())
    ours.float()
    ours[2].bias = None
    check(ours, x)
    ours[0].weight_values.data = torch.randn_like(ours[0].weight_values)
    check(ours, x)
    ours[2] = layer(60, 11, 0.4, seed=9)
    check(ours, x)


def test_memory_is_given_back_after_the_backward_pass():
    ours, x = model(100, 60, 10), torch.randn(9, 100)
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(weakref.ref(t)) or t, lambda t: t):
        loss = ours(x).sum()
    del x
    loss.backward()
    gc.collect()
    lasting = {t.data_ptr() for t in (*ours.parameters(), *ours.buffers())}
    assert len(held) == 4
    assert all(ref() is None or ref().data_ptr() in lasting for ref in held)


def test_threads_that_train_copies_of_one_network():
    ours, x, dy = model(784, 300, 100, 10), torch.randn(60, 784), torch.randn(60, 10)
    want, wrong = gradients(ours, x, dy), []

    def work(number):
        for _ in range(20):
            if not all(torch.equal(a, b) for a, b in zip(gradients(ours, x, dy), want, strict=True)):
                wrong.append(1)

    in_threads(work)
    assert not wrong


def test_training_and_inference_take_turns():
    ours, x, target = model(60, 40, 5, density=0.3), torch.randn(50, 60), torch.randint(0, 5, (50,))
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        y = ours(x)
        nn.functional.cross_entropy(y, target).backward()
        with torch.no_grad():
            assert_right(ours(x), ours, x)
            assert_right(y, ours, x)
        optimizer.step()
        with torch.no_grad():
            assert_right(ours(x), ours, x)


def test_where_layers_alone_pay_they_are_called():
    ours, x = model(100, 60, 10), torch.randn(4, 100)
    with prefer("dense"):
        assert counted(lambda: ours(x).sum().backward())[1] == (0, 0)
    with prefer("auto"):
        assert counted(lambda: ours(x).sum().backward())[1] == (1, 1)
        assert choice.chain_trains(3, 60, 266_200, 27_000)  # LeNet-300-100 at a tenth
        assert not choice.chain_trains(1, 60, 266_200, 27_000)  # nothing to save
        assert not choice.chain_trains(3, 1, 1 << 20, 1 << 17)  # more survivors than calls cost
        assert not choice.chain_trains(3, 64, 1 << 17, 1 << 17)  # nothing pruned
        assert not choice.chain_trains(3, 4096, 1 << 20, 1 << 16)  # activations beyond the caches


@pytest.mark.parametrize(("rows", "density"), [(3, 0.1), (60, 0.05), (60, 0.3), (300, 0.5)])
def test_what_is_chosen_does_not_depend_on_threads(rows, density):
    ours, x, dy = model(300, 200, 100, 10, density=density), torch.randn(rows, 300), torch.randn(rows, 10)
    with prefer("auto"), choice.built_in():
        found = with_threads((1, 2, 3, 16), lambda: [bits(g) for g in gradients(ours, x, dy)])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_layers_beyond_the_limit_train_alone():
    wide = layer(2100, 1000, 0.2)
    ours = SparseSequential(wide, nn.ReLU(), layer(1000, 10, seed=1))
    assert counted(lambda: ours(torch.randn(4, 2100)).sum().backward())[1] == (0, 0)


def test_sparsify_and_a_step_of_training():
    network = sparsify(nn.Sequential(nn.Linear(60, 50), nn.ReLU(), nn.Linear(50, 10)), density=0.2, sparse=True)
    optimizer = torch.optim.Adam(network.parameters())
    x, target = torch.randn(20, 60), torch.randint(0, 10, (20,))
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        loss, counts = counted(lambda: nn.functional.cross_entropy(network(x), target))
        assert counts == (1, 0)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@needs_walls
@pytest.mark.parametrize("rows", [1, 17, 60, 130])
@pytest.mark.parametrize("density", [0.004, 0.2, 1.0])
@pytest.mark.parametrize("widths", [(20, 300, 7), (300, 257, 33, 10), (5, 8, 3), (1, 600, 1)])
def test_nothing_is_read_or_written_beyond_an_operand(rows, density, widths, monkeypatch):
    """Every operand, and all memory that is worked in, ends where a page begins that cannot be touched."""

    class Walled:
        def __getattr__(self, name):
            return getattr(torch, name)

        def empty(self, *args, **kwargs):
            return before_a_wall(torch.full(args, 7, **kwargs))

    layers = []
    for i, (a, b) in enumerate(pairwise(widths)):
        one = layer(a, b, density, seed=i)
        layers.append(
            (one.weight_values.detach(), one.bias.detach(), one.weight_mask, sparse_tensors(one.weight_mask), i == 0)
        )
    x, dy = torch.randn(rows, widths[0]), torch.randn(rows, widths[-1])
    want = kernels.sparse_chain_training(x, dy, layers)
    for threads in (1, 2):
        monkeypatch.setattr(kernels, "SERIAL", 0)
        monkeypatch.setattr(kernels, "threads", lambda threads=threads: threads)
        with monkeypatch.context() as patched:
            patched.setattr(kernels, "torch", Walled())
            patched.setattr(kernels, "working_memory", lambda size: before_a_wall(torch.full((size,), 255).byte()))
            walled = [
                (before_a_wall(v), before_a_wall(b), m, [before_a_wall(t) for t in index], r)
                for v, b, m, index, r in layers
            ]
            found = kernels.sparse_chain_training(before_a_wall(x), before_a_wall(dy), walled)
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(found, want, strict=True))


@needs_fork
def test_a_forked_child_trains():
    ours, x, dy = model(784, 300, 100, 10), torch.randn(60, 784, requires_grad=True), torch.randn(60, 10)

    def call():
        y = ours(x)
        return [y, *torch.autograd.grad(y, [x, *ours.parameters()], dy)]

    assert counted(call)[1] == (1, 1)
    assert_same_in_a_forked_child(call)
