"""Our own dense products of masked and compressed layers."""

import ctypes
import mmap
import os

import pytest
import torch
from torch import nn

from forks import assert_same_in_a_forked_child, needs_fork
from initperf import SparseLinear, choice, ops
from initperf.choice import prefer
from initperf.core.bits import pack_bits
from initperf.core.checks import InitPerfError
from initperf.kernels.cpu.core.team import NO_TEAM
from initperf.layers.linear import MaskedLinear
from tolerance import assert_close_to_exact, assert_near, bits, linear, of_linear, of_squares, product, sums
from walls import before_a_wall

own = pytest.importorskip("initperf.kernels.cpu.dense.products", exc_type=ImportError)

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

    def exact(self):
        forward, grad_weight = linear(self.x, self.weight, self.bias), product(self.dy.t(), self.x)
        return forward, product(self.dy, self.weight), grad_weight.where(self.mask)


@pytest.mark.parametrize(("rows", "outputs", "inputs"), SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_the_products_of_a_dense_weight(rows, outputs, inputs, bias):
    case = Case(rows, outputs, inputs, 0.4, bias)
    found = case.dense()
    for got, right in zip(found, case.exact(), strict=True):
        assert_close_to_exact(got, right)
    assert not bits(found[2])[~case.mask].any()


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
                        assert_close_to_exact(found[2], sums(lambda t: t.sum(0), dy))
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
        for found, want in zip(case.dense(), case.exact(), strict=True):
            assert torch.equal(found, want.exact.float())
        assert case.compressed()[2].shape == (len(case.values), 1)
        assert not case.compressed()[2].any()


def test_very_many_rows():
    case = Case(20_000, 9, 20, 0.5)
    for found, want in zip(case.dense(), case.exact(), strict=True):
        assert_close_to_exact(found, want)


def test_few_rows_spread_nan_and_infinity_as_a_dense_product_does():
    x, dy, weight = torch.randn(3, 300), torch.randn(3, 200), torch.randn(200, 300)
    x[0, 7], x[1, 299], weight[5, 3], dy[2, 199] = float("nan"), float("inf"), float("inf"), float("nan")
    mask = torch.ones(200, 300, dtype=torch.bool)
    for found, right in (
        (own.forward(x, weight, None, len(weight)), linear(x, weight)),
        (own.grad_input(dy, weight, weight.shape[1]), product(dy, weight)),
        (own.grad_weight(dy, x, mask), product(dy.t(), x)),
    ):
        finite = right.exact.isfinite()
        assert torch.equal(found[~finite].nan_to_num(7), right.exact[~finite].float().nan_to_num(7))
        assert_close_to_exact(found[finite], right.at(lambda t, finite=finite: t[finite]))
    assert not own.grad_weight(dy, x, ~mask).any()


@pytest.mark.parametrize("rows", [1, 2, 16, 17, 300])
@pytest.mark.parametrize("faster", [True, False])
def test_which_products_a_layer_runs(rows, faster, monkeypatch):
    """Where MKL is slow and where it is fast: which products run, and that they and their gradients are the layer's."""
    monkeypatch.setattr(own, "_FASTER", faster)
    mask = torch.rand(400, 400, generator=torch.Generator().manual_seed(0)) < 0.5
    layer = MaskedLinear(400, 400, mask=mask)
    dense, x = layer.to_linear(), torch.randn(rows, 400)
    x_ = x.clone().requires_grad_()
    with prefer("dense"):
        before = ops.CALLS.copy()
        grads = torch.autograd.grad(layer(x_).pow(2).sum(), (x_, layer.weight, layer.bias))
        counted = ops.CALLS - before
        assert (counted["masked_grad_weight", "numba-dense"] == 1) == own.pays(rows, 160_000, torch.float32)
        want = of_linear(dense, x, of_squares(linear(x, dense.weight, dense.bias)))
        want[2] = want[2].where(mask)
        with torch.no_grad():
            grads = (layer(x), *grads)
        for one, right in zip(grads, want, strict=True):
            assert_close_to_exact(one, right)
        assert not grads[2][~mask].any()
        for module in (layer, dense):
            module.zero_grad()
            (dx,) = torch.autograd.grad(module(x_).pow(3).sum(), x_, create_graph=True)
            dx.square().mean().backward()
        assert_near(layer.weight.grad, dense.weight.grad.masked_fill(~mask, 0))


def test_few_rows_of_a_transposed_weight():
    weight = nn.Parameter(torch.randn(400, 400).t())
    layer = MaskedLinear(400, 400, bias=False, mask=torch.rand(400, 400) < 0.5)
    layer.weight = weight
    x = torch.randn(3, 400)
    with prefer("dense"):
        y = layer(x)
        assert_close_to_exact(y, linear(x, weight * layer.weight_mask))
        y.sum().backward()
    assert_close_to_exact(layer.weight.grad, product(torch.ones(400, 3), x).where(layer.weight_mask))


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
    assert_close_to_exact(found, linear(tangent, layer.weight))


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


@needs_fork
@pytest.mark.parametrize("rows", [4, 40])
def test_in_a_forked_child(layer, rows):
    """Our products, by themselves and in layers. With many rows a masked layer may choose torch's, which could hang."""
    case = Case(rows, 400, 400, 0.5)
    compressed, x, dy = SparseLinear.from_masked(layer), torch.randn(rows, 400), torch.randn(rows, 400)
    runs = [(layer, "sparse"), (compressed, "sparse"), (compressed, "dense")]
    if own.pays(rows, 160_000, torch.float32):
        runs.append((layer, "dense"))

    def call():
        found = [*case.dense(), *case.compressed()]
        for module, mode in runs:
            own_x = x.clone().requires_grad_()
            with prefer(mode):
                y = module(own_x)
                found += [y, *torch.autograd.grad(y, [own_x, *module.parameters()], dy)]
        return found

    before = ops.CALLS.copy()
    found = call()
    assert all(backend.startswith("numba") for _, backend in ops.CALLS - before)
    exact = of_linear(layer.to_linear(), x, dy)
    for y, dx, _, db in zip(*[iter(found[6:])] * 4, strict=True):
        for got, right in zip((y, dx, db), (exact[0], exact[1], exact[3]), strict=True):
            assert_close_to_exact(got, right)
    assert_same_in_a_forked_child(call)


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
        for given in (x, x.view(-1, 400)):
            assert_close_to_exact(layer(given), linear(given, layer.weight, layer.bias))


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
        assert_close_to_exact(layer(x), linear(x, layer.weight * layer.weight_mask, layer.bias))


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
        assert_near(found, want)


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
        dw = product(torch.ones(400, rows), x).at(lambda t: t[layer.weight_mask])
        assert_close_to_exact(sparse.weight_values.grad.flatten(), dw)
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
