"""Our own dense products of masked and compressed layers."""

import ctypes
import mmap
import os
import subprocess
import sys

import pytest
import torch
from initperf.kernels.cpu.team import NO_TEAM
from tolerance import assert_close_to_exact, bits
from torch import nn
from torch.nn import functional as F
from walls import before_a_wall

from initperf import SparseLinear, choice, ops
from initperf.checks import InitPerfError
from initperf.choice import prefer
from initperf.masked import MaskedLinear
from initperf.pattern import pack_bits

own = pytest.importorskip("initperf.kernels.cpu.dense", exc_type=ImportError)

pytestmark = pytest.mark.skipif(not own._WIDE, reason="our own dense products need AVX-512")
SHAPES = [  # batch rows, outputs, inputs: few rows, then many; lone rows and columns, and sizes around those of blocks
    (1, 300, 784),
    (1, 7, 20_001),
    (2, 130, 260),
    (3, 33, 1000),
    (4, 257, 131),
    (5, 128, 256),
    (9, 1000, 33),
    (16, 301, 784),
    (16, 1, 1),
    (1, 1, 1),
    (17, 65, 33),
    (23, 1, 1),
    (31, 300, 1),
    (64, 1, 700),
    (64, 40, 515),
    (130, 1030, 17),
    (300, 70, 260),
    (513, 33, 47),
    (1100, 8, 257),
    (600, 1000, 70),
]


class Case:
    """A weight with survivors, dense and compressed, and the three products of both."""

    def __init__(self, rows, outputs, inputs, density, bias=True):
        generator = torch.Generator().manual_seed(rows + outputs + inputs)
        normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
        self.x, self.dy, self.weight = normal(rows, inputs), normal(rows, outputs), normal(outputs, inputs)
        self.bias = normal(outputs) if bias else None
        self.mask = torch.rand(outputs, inputs, generator=generator) < density
        self.weight *= self.mask
        self.values, self.bits = self.weight[self.mask][:, None].contiguous(), pack_bits(self.mask)

    def dense(self):
        weight, (N, K) = self.weight, self.weight.shape
        return (
            own.forward(self.x, weight, self.bias, N),
            own.grad_input(self.dy, weight, K),
            own.grad_weight(self.dy, self.x, self.mask),
        )

    def compressed(self):
        (N, K), values, packed = self.mask.shape, self.values, self.bits
        return (
            own.forward(self.x, values, self.bias, N, packed),
            own.grad_input(self.dy, values, K, packed),
            own.grad_values(self.dy, self.x, packed, len(values)),
        )

    def torchs(self, dtype):
        x, dy, weight = self.x.to(dtype), self.dy.to(dtype), self.weight.to(dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        return F.linear(x, weight, bias), dy @ weight, (dy.t() @ x).masked_fill(~self.mask, 0)


@pytest.mark.parametrize(("rows", "outputs", "inputs"), SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_the_products_of_a_dense_weight(rows, outputs, inputs, bias):
    case = Case(rows, outputs, inputs, 0.4, bias)
    found, exact, torchs = case.dense(), case.torchs(torch.float64), case.torchs(torch.float32)
    for name in ("x", "dy", "weight", "bias"):
        setattr(case, name, None if getattr(case, name) is None else getattr(case, name).abs())
    for results in zip(found, exact, torchs, case.torchs(torch.float64), strict=True):
        assert_close_to_exact(*results)
    case = Case(rows, outputs, inputs, 0.4, bias)
    assert not bits(case.dense()[2])[~case.mask].any()


@pytest.mark.parametrize("rows", [4, 16, 40])
def test_operands_of_other_strides(rows):
    case = Case(rows, 50, 70, 0.5)
    want = case.dense()
    case.x, case.dy = case.x.t().contiguous().t(), case.dy.t().contiguous().t()
    case.bias = case.bias.repeat_interleave(2)[::2]
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(case.dense(), want, strict=True))


@pytest.mark.parametrize(("rows", "outputs", "inputs"), SHAPES)
@pytest.mark.parametrize("density", [0.0, 0.03, 0.5, 0.96, 1.0])
def test_a_compressed_weight_has_the_products_of_the_dense_one_bit_by_bit(rows, outputs, inputs, density):
    case = Case(rows, outputs, inputs, density)
    y, dx, dw = case.dense()
    found = case.compressed()
    assert torch.equal(bits(found[0]), bits(y))
    assert torch.equal(bits(found[1]), bits(dx))
    assert found[2].shape == case.values.shape
    assert torch.equal(bits(found[2].flatten()), bits(dw[case.mask]))


@pytest.mark.parametrize(("rows", "outputs", "inputs"), [*SHAPES, (8, 515, 301), (2, 1, 300), (0, 5, 7)])
@pytest.mark.parametrize("density", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_gradients_by_one_call(rows, outputs, inputs, density, threads):
    case, before = Case(rows, outputs, inputs, density), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for weight, mask, packed in ((case.weight, case.mask, None), (case.values, None, case.bits)):
            if packed is None:
                dw = own.grad_weight(case.dy, case.x, case.mask)
            else:
                dw = own.grad_values(case.dy, case.x, packed, len(weight))
            want = own.grad_input(case.dy, weight, inputs, packed), dw
            for needs in ((True, True, True), (False, True, True), (True, False, True), (True, True, False)):
                for dy, x in ((case.dy, case.x), (case.dy.t().contiguous().t(), case.x.t().contiguous().t())):
                    found = own.gradients(dy, x, weight, mask, packed, needs)
                    assert [f is not None for f in found] == list(needs)
                    for one, other in zip(found[:2], want, strict=True):
                        assert one is None or (one.shape == other.shape and torch.equal(bits(one), bits(other)))
                    if found[2] is not None:
                        assert_close_to_exact(found[2], dy.double().sum(0), dy.sum(0), dy.abs().double().sum(0))
    finally:
        torch.set_num_threads(before)


def test_each_thread_works_in_memory_of_its_own(monkeypatch):
    case, memory, before = Case(8, 515, 301, 0.4), [], torch.get_num_threads()
    torch.set_num_threads(2)

    def marked(size):
        memory.append(torch.full((size,), 0x55, dtype=torch.uint8))
        return memory[-1]

    monkeypatch.setattr(own, "working_memory", marked)
    try:
        own.gradients(case.dy, case.x, case.values, None, case.bits, (True, True, True))
    finally:
        torch.set_num_threads(before)
    assert all((part != 0x55).any() for part in memory[0].chunk(2))


@pytest.mark.parametrize(
    ("rows", "outputs", "inputs"),
    [(16, 1001, 515), (1, 515, 1001), (3, 40, 9000), (2, 9000, 40), (40, 515, 301), (600, 70, 1001), (90, 1001, 65)],
)
def test_the_same_bits_for_any_number_of_threads(rows, outputs, inputs, monkeypatch):
    case, before, found = Case(rows, outputs, inputs, 0.4), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            found.append([bits(result) for result in (*case.dense(), *case.compressed())])
        torch.set_num_threads(2)
        monkeypatch.setattr(own, "members", lambda work: (NO_TEAM, 0))  # on Numba's threads
        found.append([bits(result) for result in (*case.dense(), *case.compressed())])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(100, 100, 600), (600, 300, 40), (16, 100, 2000)])
def test_a_batch_in_parts_has_the_same_bits(rows, outputs, inputs):
    """Every sum is a chain along the weight: neither tiles nor blocks of rows show in the forward pass and the input gradient."""
    case = Case(rows, outputs, inputs, 0.5)
    y, dx, _ = case.dense()
    case.x, case.dy = case.x[: rows - 7], case.dy[: rows - 7]
    assert torch.equal(bits(case.dense()[0]), bits(y[: rows - 7]))
    assert torch.equal(bits(case.dense()[1]), bits(dx[: rows - 7]))


@pytest.mark.skipif(not hasattr(mmap, "MAP_ANONYMOUS"), reason="needs a page that may not be read")
@pytest.mark.parametrize("rows", [1, 3, 16, 17, 90])
@pytest.mark.parametrize(("outputs", "inputs", "density"), [(9, 37, 0.5), (64, 64, 0.9), (33, 257, 0.05), (5, 8, 1.0)])
def test_nothing_is_read_or_written_beyond_an_operand(rows, outputs, inputs, density):
    """Every operand ends where a page begins that cannot be touched."""
    case = Case(rows, outputs, inputs, density)
    want = [*case.dense(), *case.compressed()]
    for name in ("x", "dy", "weight", "bias", "mask", "values", "bits"):
        setattr(case, name, before_a_wall(getattr(case, name)))
    found = [*case.dense(), *case.compressed()]
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(found, want, strict=True))


def test_no_rows_and_no_columns():
    for rows, outputs, inputs in ((0, 3, 4), (5, 0, 4), (5, 3, 0), (40, 0, 4), (40, 3, 0)):
        case = Case(rows, outputs, inputs, 0.5)
        for found, want in zip(case.dense(), case.torchs(torch.float32), strict=True):
            torch.testing.assert_close(found, want, rtol=0, atol=0)
        assert case.compressed()[2].shape == (len(case.values), 1)
        assert not case.compressed()[2].any()


def test_very_many_rows():
    case = Case(20_000, 9, 20, 0.5)
    for found, want in zip(case.dense(), case.torchs(torch.float64), strict=True):
        torch.testing.assert_close(found, want.float(), rtol=1e-4, atol=1e-3)


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


@pytest.mark.parametrize("rows", [1, 2, 16, 17, 300])
def test_which_products_a_layer_runs(rows):
    """Which products run, and that they, and their gradients of any order, are the layer's own."""
    mask = torch.rand(400, 400, generator=torch.Generator().manual_seed(0)) < 0.5
    layer = MaskedLinear(400, 400, mask=mask)
    dense, x = layer.to_linear(), torch.randn(rows, 400)
    x_ = x.clone().requires_grad_()
    with prefer("dense"):
        before = ops.CALLS.copy()
        grads = torch.autograd.grad(layer(x_).pow(2).sum(), (x_, layer.weight, layer.bias))
        counted = ops.CALLS - before
        assert (counted["masked_grad_weight", "numba-dense"] == 1) == own.pays(rows, 160_000, torch.float32)
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


def test_more_outputs_than_a_packed_block_on_one_thread():
    case, before = Case(600, 1000, 70, 0.4), torch.get_num_threads()
    want = [bits(result) for result in case.dense()]
    torch.set_num_threads(1)
    try:
        found = [bits(result) for result in case.dense()]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


def test_fewer_threads_than_asked_for():
    try:
        openmp = ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
    except (OSError, AttributeError):
        pytest.skip("torch's OpenMP runtime is another one")
    before, cases = torch.get_num_threads(), [Case(16, 1001, 515, 0.4), Case(90, 300, 515, 0.4)]
    want = [[bits(result) for result in case.dense()] for case in cases]
    torch.set_num_threads(7)
    openmp.omp_set_dynamic(1)
    try:
        found = [[bits(result) for result in case.dense()] for case in cases]
    finally:
        openmp.omp_set_dynamic(0)
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for x, y in zip(found, want, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("rows", [4, 40])
def test_in_a_forked_child(rows):
    code = """
import os, signal, torch
from initperf import MaskedLinear
from initperf.choice import prefer
layer, x = MaskedLinear(400, 400, mask=torch.rand(400, 400) < 0.5), torch.randn(ROWS, 400)
with prefer("dense"):
    layer(x)
    if not (child := os.fork()):
        signal.alarm(60)
        layer(x).sum().backward()
        os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""
    code = code.replace("ROWS", str(rows))
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_only_the_bias_trains(layer):
    layer.requires_grad_(False)
    layer.bias.requires_grad_()
    with prefer("dense"):
        layer(torch.randn(4, 400)).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((400,), 4.0))
    assert layer.weight.grad is None


@pytest.mark.parametrize("rows", [2, 60])
def test_inputs_of_three_dimensions_twice(layer, rows):
    x = torch.randn(rows, 3, 400)
    with prefer("dense"):
        assert torch.equal(layer(x), layer(x))
        torch.testing.assert_close(layer(x), layer(x.view(-1, 400)).view(rows, 3, 400))


def test_what_the_last_call_took_is_not_kept(layer):
    x = torch.randn(4, 400)
    with prefer("dense"):
        layer(x)
        before = ops.CALLS.copy()
        with prefer("sparse"):
            layer(x)
        assert (ops.CALLS - before) == {("masked_linear", "numba"): 1}
        layer(x)
        with pytest.raises(InitPerfError, match="dtype"):
            layer(x.bfloat16())
        assert layer(x.to("meta")).is_meta
        layer.bias = nn.Parameter(layer.bias.to("meta"))
        with pytest.raises(InitPerfError, match="bias"):
            layer(x)


def transpose_data(layer):
    layer.weight.data = layer.weight.data.t()


def transposed_parameter(layer):
    layer.weight = nn.Parameter(layer.weight.data.t())


@pytest.mark.parametrize("change", [transpose_data, transposed_parameter])
@pytest.mark.parametrize("gradients", [True, False])
def test_a_weight_of_other_strides_in_the_same_memory(layer, change, gradients):
    layer.weight.data = torch.randn(400, 400)
    x = torch.randn(4, 400)
    with prefer("dense"), torch.set_grad_enabled(gradients):
        layer(x)
        change(layer)
        want = F.linear(x, layer.weight * layer.weight_mask, layer.bias)
        torch.testing.assert_close(layer(x), want, rtol=1e-4, atol=1e-4)


def test_a_weight_of_another_dtype_after_a_call(layer):
    x = torch.randn(4, 400)
    with prefer("dense"):
        layer(x)
        layer.weight.data = layer.weight.data.double()
        with pytest.raises(InitPerfError, match="dtype"):
            layer(x)


def test_a_mask_rewritten_with_the_same_content_before_the_backward_pass(layer):
    """As DistributedDataParallel does with every buffer, before every forward pass."""
    for rows in (4, 40):
        with prefer("dense"):
            y = layer(torch.randn(rows, 400))
            layer.weight_mask.copy_(layer.weight_mask.clone())
            y.sum().backward()
            y = layer(torch.randn(rows, 400))
            layer.weight_mask.logical_not_()
            with pytest.raises(InitPerfError, match="changed in between"):
                y.sum().backward()
            layer.weight_mask.logical_not_()


@pytest.mark.parametrize("rows", [4, 40])
@pytest.mark.parametrize(
    "unpack", [torch.Tensor.bfloat16, lambda t: t.t().contiguous().t(), lambda t: t[: len(t) // 2].clone()]
)
@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_saved_tensors_that_come_back_otherwise(layer, rows, unpack, compressed, mode):
    layer = SparseLinear.from_masked(layer) if compressed else layer
    x, results = torch.randn(rows, 400, requires_grad=True), []
    parameter = layer.weight_values if compressed else layer.weight
    for hook in (lambda t: t, unpack):
        change = lambda t, hook=hook: hook(t) if t.is_floating_point() else t  # noqa: E731
        with prefer(mode), torch.autograd.graph.saved_tensors_hooks(lambda t: t, change):
            y = layer(x).square().sum()
        try:
            with prefer(mode):
                results.append(torch.autograd.grad(y, (x, parameter)))
        except (RuntimeError, TypeError):  # of another dtype or shape: torch's own layer raises too
            assert unpack(parameter).dtype != parameter.dtype or unpack(parameter).shape != parameter.shape
            return
    assert unpack(parameter).shape == parameter.shape
    for found, want in zip(*results, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("rows", [4, 40])
def test_compressed_layers_that_do_not_fit_their_mask_or_input_raise(layer, rows):
    sparse, x = SparseLinear.from_masked(layer), torch.randn(rows, 400)
    with prefer("dense"):
        with pytest.raises(InitPerfError, match="survivors"):
            torch.func.functional_call(sparse, {"weight_values": torch.randn(10, 1)}, (x,))
        state = sparse.state_dict()
        state["weight_mask_bits"] = state["weight_mask_bits"].repeat_interleave(2)[::2]
        want = sparse(x)
        sparse.load_state_dict(state, assign=True)
        assert torch.equal(sparse(x), want)
        sparse(x).sum().backward()
        dw = (torch.ones(rows, 400).t() @ x)[layer.weight_mask]
        torch.testing.assert_close(sparse.weight_values.grad.flatten(), dw, rtol=1e-4, atol=1e-4)
        for gradients in (True, False):
            with torch.set_grad_enabled(gradients), pytest.raises(InitPerfError, match="device"):
                sparse.to("meta")(x)


@pytest.mark.parametrize("rows", [3, 40])
def test_operands_that_kernels_could_not_read_raise(rows):
    case = Case(rows, 50, 70, 0.5)
    with pytest.raises(TypeError, match="float32"):
        own.forward(case.x, case.weight.double(), None, 50)
    with pytest.raises(TypeError, match="float32"):
        own.grad_weight(case.dy.bfloat16(), case.x, case.mask)
    with pytest.raises(TypeError, match="float32"):
        own.gradients(case.dy.double(), case.x, case.weight, case.mask, None, (True, True, True))
    with pytest.raises(TypeError, match="float32"):
        own.gradients(case.dy, case.x, case.weight.double(), case.mask, None, (True, True, True))
    with pytest.raises(ValueError, match="weight of"):
        own.gradients(case.dy, case.x, case.weight[1:], case.mask, None, (True, True, True))
    with pytest.raises(ValueError, match="50 x 70"):
        own.forward(case.x, case.weight[:3], None, 50)
    values = own.grad_values(case.dy, case.x, case.bits, 10)  # fewer than the mask has: no more are written
    assert torch.equal(values, own.grad_values(case.dy, case.x, case.bits, len(case.values))[:10])


def test_inference_of_a_compressed_layer_is_counted(layer):
    sparse, before = SparseLinear.from_masked(layer), ops.CALLS.copy()
    with prefer("dense"), torch.no_grad():
        sparse(torch.randn(4, 400))
    assert (ops.CALLS - before) == {("sparse_linear", "numba-dense"): 1}


def test_all_dense_is_asked_by_the_batchs_rows(layer, monkeypatch):
    asked = []
    monkeypatch.setattr(choice, "all_dense", lambda storage, rows, *_: asked.append(rows) or True)
    SparseLinear.from_masked(layer)(torch.randn(7, 400)).sum().backward()
    assert set(asked) == {7}
