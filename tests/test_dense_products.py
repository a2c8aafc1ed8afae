"""Dense products of a masked layer with few batch rows: our own kernels."""

import pytest
import torch
from tolerance import assert_close_to_exact, bits
from torch import nn
from torch.nn import functional as F

from initperf import SparseLinear, ops
from initperf.checks import InitPerfError
from initperf.choice import prefer
from initperf.kernels.cpu.team import NO_TEAM
from initperf.masked import MaskedLinear

own = pytest.importorskip("initperf.kernels.cpu.dense", exc_type=ImportError)

SHAPES = [
    (2, 130, 260),
    (3, 33, 1000),
    (4, 257, 131),
    (5, 128, 256),
    (9, 1000, 33),
    (16, 301, 784),
    (1, 300, 784),
    (1, 7, 20_001),
]


@pytest.mark.parametrize(("rows", "outputs", "inputs"), SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_dense_products_with_few_rows(rows, outputs, inputs, bias):
    torch.manual_seed(rows)
    x, dy = torch.randn(rows, inputs), torch.randn(rows, outputs)
    mask = torch.rand(outputs, inputs) < 0.4
    weight = torch.randn(outputs, inputs) * mask
    b = torch.randn(outputs) if bias else None
    exact = F.linear(x.double(), weight.double(), None if b is None else b.double())
    assert_close_to_exact(own.forward(x, weight, b, outputs), exact, F.linear(x, weight, b))
    assert_close_to_exact(own.grad_input(dy, weight, weight.shape[1]), dy.double() @ weight.double(), dy @ weight)
    exact = (dy.double().t() @ x.double()).masked_fill(~mask, 0)
    found = own.grad_weight(dy, x, mask)
    assert_close_to_exact(found, exact, (dy.t() @ x).masked_fill(~mask, 0))
    assert not bits(found)[~mask].any()
    columns = torch.randn(inputs, rows).t(), torch.randn(outputs, rows).t()  # of other strides
    torch.testing.assert_close(
        own.forward(columns[0], weight, b, len(weight)), F.linear(columns[0], weight, b), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(own.grad_input(columns[1], weight, inputs), columns[1] @ weight, rtol=1e-4, atol=1e-4)
    want = (columns[1].t() @ columns[0]).masked_fill(~mask, 0)
    torch.testing.assert_close(own.grad_weight(columns[1], columns[0], mask), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(16, 1001, 515), (1, 515, 1001), (3, 40, 9000), (2, 9000, 40)])
def test_few_rows_have_the_same_bits_for_any_number_of_threads(rows, outputs, inputs, monkeypatch):
    x, dy, weight = torch.randn(rows, inputs), torch.randn(rows, outputs), torch.randn(outputs, inputs)
    mask, before, found = torch.rand(outputs, inputs) < 0.4, torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results = (
                own.forward(x, weight, None, len(weight)),
                own.grad_input(dy, weight, weight.shape[1]),
                own.grad_weight(dy, x, mask),
            )
            found.append([bits(result) for result in results])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
    monkeypatch.setattr(own, "members", lambda work: (NO_TEAM, 0))  # on Numba's threads
    assert torch.equal(bits(own.forward(x, weight, None, outputs)), found[0][0])


def test_few_rows_spread_nan_and_infinity_as_a_dense_product_does():
    x, dy, weight = torch.randn(3, 300), torch.randn(3, 200), torch.randn(200, 300)
    x[0, 7], x[1, 299], weight[5, 3], dy[2, 199] = float("nan"), float("inf"), float("inf"), float("nan")
    mask = torch.ones(200, 300, dtype=torch.bool)
    for found, dense in (
        (own.forward(x, weight, None, len(weight)), F.linear(x, weight)),
        (own.grad_input(dy, weight, weight.shape[1]), dy @ weight),
        (own.grad_weight(dy, x, mask), dy.t() @ x),
    ):
        torch.testing.assert_close(found, dense, equal_nan=True, rtol=1e-4, atol=1e-4)
    assert not own.grad_weight(dy, x, ~mask).any()


@pytest.mark.parametrize("rows", [1, 2, 16, 17])
def test_a_layer_with_few_rows(rows):
    """Which products run, and that they, and their gradients of any order, are the layer's own."""
    mask = torch.rand(400, 400, generator=torch.Generator().manual_seed(0)) < 0.5
    layer = MaskedLinear(400, 400, mask=mask)
    dense, x = layer.to_linear(), torch.randn(rows, 400)
    few = own._WIDE and rows <= 16
    x_ = x.clone().requires_grad_()
    with prefer("dense"):
        before = ops.CALLS.copy()
        grads = torch.autograd.grad(layer(x_).pow(2).sum(), (x_, layer.weight, layer.bias))
        counted = ops.CALLS - before
        assert (counted["masked_grad_weight", "numba-dense"] == 1) == few
        want = torch.autograd.grad(dense(x_).pow(2).sum(), (x_, dense.weight, dense.bias))
        want = (want[0], want[1].masked_fill(~mask, 0), want[2])
        for one, other in zip(grads, want, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        assert not grads[1][~mask].any()
        with torch.no_grad():
            torch.testing.assert_close(layer(x), dense(x), rtol=1e-4, atol=1e-4)
        for module in (layer, dense):
            module.zero_grad()
            (dx,) = torch.autograd.grad(module(x_).pow(3).sum(), x_, create_graph=True)
            dx.square().mean().backward()
        torch.testing.assert_close(layer.weight.grad, dense.weight.grad.masked_fill(~mask, 0), rtol=1e-3, atol=1e-3)


def test_few_rows_of_a_transposed_weight():
    weight = nn.Parameter(torch.randn(400, 400).t())
    layer = MaskedLinear(400, 400, bias=False, mask=torch.rand(400, 400) < 0.5)
    layer.weight = weight
    x = torch.randn(3, 400)
    with prefer("dense"):
        y = layer(x)
        torch.testing.assert_close(y, x @ (weight * layer.weight_mask).t(), rtol=1e-4, atol=1e-4)
        y.sum().backward()
    want = x.sum(0).expand(400, 400).masked_fill(~layer.weight_mask, 0)
    torch.testing.assert_close(layer.weight.grad, want, rtol=1e-4, atol=1e-4)


@pytest.fixture
def layer():
    return MaskedLinear(400, 400, mask=torch.rand(400, 400, generator=torch.Generator().manual_seed(0)) < 0.5)


def test_a_layer_on_another_device_raises(layer):
    layer.to("meta")
    x = torch.randn(4, 400)
    with pytest.raises((RuntimeError, NotImplementedError)):
        layer(x)
    with pytest.raises((RuntimeError, NotImplementedError)), torch.no_grad():
        layer(x)


def test_a_mask_of_other_strides(layer):
    mask = torch.rand(400, 400) < 0.5
    state = layer.state_dict() | {"weight_mask": mask.t()}
    layer.load_state_dict(state, assign=True)
    with prefer("dense"):
        layer(torch.randn(4, 400)).pow(2).sum().backward()
    assert not layer.weight.grad[~mask.t()].any()


@pytest.mark.parametrize("bias", [torch.ones(400, dtype=torch.bfloat16), torch.ones(3), torch.ones(400, 1)])
@pytest.mark.parametrize("rows", [4, 40])
def test_a_bias_that_does_not_fit_raises(layer, bias, rows):
    layer.bias = nn.Parameter(bias)
    sparse = SparseLinear.from_masked(MaskedLinear(400, 400, mask=layer.weight_mask))
    sparse.bias = nn.Parameter(bias)
    for module in (layer, sparse):
        with pytest.raises(InitPerfError, match="bias"):
            module(torch.randn(rows, 400))


def test_forward_mode_derivatives(layer):
    layer.requires_grad_(False)
    x, tangent = torch.randn(4, 400), torch.randn(4, 400)
    with torch.autograd.forward_ad.dual_level():
        found = torch.autograd.forward_ad.unpack_dual(layer(torch.autograd.forward_ad.make_dual(x, tangent))).tangent
    torch.testing.assert_close(found, tangent @ layer.weight.t(), rtol=1e-4, atol=1e-4)
