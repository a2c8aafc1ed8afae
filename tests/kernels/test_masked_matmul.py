"""The three masked products: every backend against float64, each other's gradients, and the index they read."""

from importlib import import_module

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from initperf import choice
from initperf.kernels.reference.linear import masked_linear as reference
from initperf.layers.base.pattern import SparsePattern
from initperf.layers.ops import masked_linear as masked_ops
from tolerance import assert_close_to_exact, bits, linear, product

SHAPES = [  # B, K, N
    (60, 300, 100),
    (16, 130, 64),
    (30, 63, 260),
    (64, 500, 37),
    (100, 129, 257),
    (3, 8, 300),
    (257, 40, 37),  # one row beyond a chunk of the batch
    (600, 130, 100),
]
DENSITIES = [0.0, 0.02, 0.1, 0.5, 1.0]


def operands(B, K, N, density, dtype=torch.float32, seed=0, device="cpu"):
    """x, dy, weight (masked), bias, mask."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(N, K, generator=generator) < density
    if N > 5:
        mask[N // 2] = False  # a dead row
        mask[1] = density > 0  # and a full one
    x, dy, weight, bias = (torch.randn(s, generator=generator).to(dtype) for s in ((B, K), (B, N), (N, K), (N,)))
    return tuple(t.to(device) for t in (x, dy, weight.masked_fill(~mask, 0), bias, mask))


def check_products(module, x, dy, weight, bias, mask, pattern, premasked=True):
    """All three products of a backend are sums of the survivors' products."""
    narrow = torch.where(mask, weight, 0)
    y = module.masked_linear(x, weight, bias, mask, pattern, premasked)
    assert_close_to_exact(y, linear(x, narrow, bias))
    dx = module.masked_grad_input(dy, weight, mask, pattern, premasked)
    assert_close_to_exact(dx, product(dy, narrow))
    dw = module.masked_grad_weight(dy, x, mask, pattern)
    assert_close_to_exact(dw, product(dy.t(), x).where(mask))
    assert not bits(dw)[~mask].any(), "a pruned weight has a gradient that is not +0"


def numba():
    pytest.importorskip("numba")
    return import_module("initperf.kernels.cpu.linear.masked_linear"), import_module(
        "initperf.kernels.cpu.sparse.index"
    ).pattern_tensors


def triton():
    pytest.importorskip("triton")
    return import_module("initperf.kernels.gpu.linear.masked_linear"), import_module(
        "initperf.kernels.gpu.sparse.index"
    ).pattern_tensors


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_numba_products(shape, density):
    module, pattern_of = numba()
    x, dy, weight, bias, mask = operands(*shape, density)
    check_products(module, x, dy, weight, bias, mask, pattern_of(mask))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_numba_products_keep_the_dtype_and_sum_16_bit_values_in_float32(dtype):
    module, pattern_of = numba()
    B, K, N = (16, 130, 64) if dtype == torch.float64 else (60, 300, 100)
    for density in (0.0, 0.1, 1.0):
        x, dy, weight, bias, mask = operands(B, K, N, density, dtype)
        check_products(module, x, dy, weight, None if density == 0.1 else bias, mask, pattern_of(mask))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("shape", "density"), [((7, 37, 41), 0.3), ((33, 130, 200), 0.05), ((5, 64, 70), 1.0)])
def test_the_triton_products(shape, density, dtype, gpu_device):
    module, pattern_of = triton()
    x, dy, weight, bias, mask = operands(*shape, density, dtype, device=gpu_device)
    check_products(module, x, dy, weight + 1, bias, mask, pattern_of(mask), premasked=False)


@settings(max_examples=25, deadline=None)
@given(
    B=st.integers(0, 70), K=st.integers(1, 300), N=st.integers(1, 300), density=st.floats(0, 1), seed=st.integers(0, 99)
)
@example(B=1, K=37, N=41, density=0.1, seed=0)
@example(B=7, K=1, N=1, density=1.0, seed=0)
def test_any_shape_and_density(B, K, N, density, seed):
    module, pattern_of = numba()
    x, dy, weight, bias, mask = operands(B, K, N, density, seed=seed)
    check_products(module, x, dy, weight, bias, mask, pattern_of(mask))


def test_the_reference_masks_whatever_weight_it_is_given():
    x, dy, weight, bias, mask = operands(9, 20, 30, 0.4)
    check_products(reference, x, dy, weight + 1, bias, mask, [], premasked=False)


def test_the_kernels_read_survivors_only():
    module, pattern_of = numba()
    x, dy, weight, bias, mask = operands(20, 70, 90, 0.2)
    dirty = torch.where(mask, weight, float("nan"))
    pattern = pattern_of(mask)
    for op, first in (("masked_linear", (x,)), ("masked_grad_input", (dy,))):
        rest = ((bias,) if op == "masked_linear" else ()) + (mask, pattern, False)
        clean = getattr(module, op)(*first, weight, *rest)
        assert torch.equal(bits(getattr(module, op)(*first, dirty, *rest)), bits(clean))


def test_strides_do_not_matter():
    module, pattern_of = numba()
    x, dy, weight, bias, mask = operands(30, 70, 90, 0.2)
    pattern = pattern_of(mask)
    y, dx, dw = (
        module.masked_linear(x, weight, bias, mask, pattern, True),
        module.masked_grad_input(dy, weight, mask, pattern, True),
        module.masked_grad_weight(dy, x, mask, pattern),
    )

    def feature_major(t):
        return t.t().contiguous().t()

    def spread(t):
        wide = t.new_full((t.shape[0], 2 * t.shape[1]), float("nan"))
        wide[:, ::2] = t
        return wide[:, ::2]

    for odd in (feature_major, spread):
        assert torch.equal(bits(module.masked_linear(odd(x), odd(weight), bias, mask, pattern, True)), bits(y))
        assert torch.equal(bits(module.masked_grad_input(odd(dy), odd(weight), mask, pattern, True)), bits(dx))
        assert torch.equal(bits(module.masked_grad_weight(odd(dy), odd(x), mask, pattern)), bits(dw))
    row = dy[:1].expand(30, 90)
    assert torch.equal(
        bits(module.masked_grad_weight(row, x, mask, pattern)),
        bits(module.masked_grad_weight(row.contiguous(), x, mask, pattern)),
    )
    assert torch.equal(pattern_of(mask.t().contiguous().t())[1], pattern[1])


def test_the_bits_do_not_depend_on_the_number_of_threads():
    module, pattern_of = numba()
    x, dy, weight, bias, mask = operands(200, 600, 700, 0.1)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            pattern = pattern_of(mask)
            results.append(
                [
                    *pattern,
                    bits(module.masked_linear(x, weight, bias, mask, pattern, True)),
                    bits(module.masked_grad_input(dy, weight, mask, pattern, True)),
                    bits(module.masked_grad_weight(dy, x, mask, pattern)),
                ]
            )
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


def test_permuting_the_batch_permutes_the_output():
    module, pattern_of = numba()
    x, dy, weight, bias, mask = operands(64, 300, 100, 0.1)
    pattern, order = pattern_of(mask), torch.randperm(64)
    y = module.masked_linear(x, weight, bias, mask, pattern, True)
    assert torch.equal(bits(module.masked_linear(x[order], weight, bias, mask, pattern, True)), bits(y[order]))


def test_the_index_holds_every_survivor_once():
    _, pattern_of = numba()
    for shape, density in (((257, 300), 0.1), ((40, 5), 0.5), ((300, 600), 0.01), ((3, 700), 1.0), ((64, 256), 0.03)):
        mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < density
        units, columns, *transposed = pattern_of(mask)
        assert torch.equal(survivors(units, columns, shape), mask)
        assert torch.equal(survivors(*transposed, shape[::-1]), mask.t())


def survivors(units, columns, shape):
    """The mask that an index describes; a survivor named twice fails."""
    panels, blocks, quads, _ = units.shape
    block = 128 if blocks == -(-shape[1] // 128) else 256
    mask = torch.zeros(shape, dtype=torch.bool)
    records = units.view(torch.uint8).view(panels, blocks, quads, 16)
    counts = units[..., 1:3].contiguous().view(torch.int16).view(panels, blocks, quads, 4)
    for p in range(panels):
        for kb in range(blocks):
            for u in range(quads):
                start = int(units[p, kb, u, 3])
                assert counts[p, kb, u].tolist() == sorted(counts[p, kb, u].tolist())
                for r in range(4):
                    row = p * quads * 4 + int(records[p, kb, u, r])
                    for j in range(int(counts[p, kb, u, r])):
                        column = kb * block + int(columns[start + 4 * j + r])
                        assert not mask[row, column]
                        mask[row, column] = True
    return mask


def test_the_dense_products_of_the_ops_are_counted_under_their_own_name():
    x, _, weight, bias, mask = operands(20, 70, 90, 0.2)
    pattern = SparsePattern(mask).tensors
    for mode, backend in (("sparse", "numba"), ("dense", "mkl")):
        before = masked_ops.ops.CALLS["masked_linear", backend]
        with choice.prefer(mode):
            masked_ops.masked_linear(x, weight, bias, mask, pattern, True)
        assert masked_ops.ops.CALLS["masked_linear", backend] == before + 1


@pytest.mark.parametrize("mode", ["sparse", "dense"])
def test_gradients_and_their_gradients_are_those_of_the_definition(mode):
    x, dy, weight, bias, mask = operands(3, 5, 6, 0.5, torch.float64)
    pattern = SparsePattern(mask).tensors
    for op, inputs, rest in (
        (masked_ops.masked_linear, (x, weight, bias), (mask, pattern, False)),
        (masked_ops.masked_grad_input, (dy, weight), (mask, pattern, False)),
        (masked_ops.masked_grad_weight, (dy, x), (mask, pattern)),
    ):
        inputs = tuple(t.clone().requires_grad_() for t in inputs)
        with choice.prefer(mode):
            assert torch.autograd.gradcheck(lambda *t, op=op, rest=rest: op(*t, *rest), inputs)
            assert torch.autograd.gradgradcheck(lambda *t, op=op, rest=rest: op(*t, *rest), inputs)


def test_the_ops_pass_opcheck():
    x, dy, weight, bias, mask = operands(4, 6, 7, 0.5)
    pattern = SparsePattern(mask).tensors
    x.requires_grad_(), weight.requires_grad_()
    torch.library.opcheck(masked_ops.masked_linear, (x, weight, bias, mask, pattern, True))
    torch.library.opcheck(masked_ops.masked_linear, (x, weight, None, mask, [], False))
    torch.library.opcheck(masked_ops.masked_grad_input, (dy.requires_grad_(), weight, mask, pattern, True))
    torch.library.opcheck(masked_ops.masked_grad_weight, (dy, x, mask, pattern))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_dense_weight_gradient_is_masked_to_exact_zeros_whatever_it_held(dtype):
    module, _ = numba()
    for B, K, N in ((5, 40, 30), (0, 40, 30), (2, 2048, 1700)):  # the last is large enough for two threads
        x, dy, _, _, mask = operands(B, K, N, 0.3, dtype)
        if B:
            x[0, 0] = float("inf")
        got, expected = module.dense_grad_weight(dy, x, mask, []), product(dy.t(), x).where(mask)
        finite = expected.exact.isfinite()
        assert torch.equal(got[~finite].double(), expected.exact[~finite])
        assert_close_to_exact(got[finite], expected.at(lambda t, finite=finite: t[finite]))
        assert not bits(got)[~mask].any()


def test_the_memory_of_a_large_gradient_is_used_again_only_when_free_and_goes_with_the_mask():
    numba()
    memory = import_module("initperf.kernels.cpu.core.memory")
    torch.use_deterministic_algorithms(False)
    mask, shape = torch.ones(1), (memory.LARGE // 4, 1)
    first = memory.gradient_memory(mask, shape, torch.float32)
    address = first.data_ptr()
    view = first[5:]
    del first
    second = memory.gradient_memory(mask, shape, torch.float32)
    assert second.data_ptr() != address, "a view of the first still lives"
    del view
    assert memory.gradient_memory(mask, shape, torch.float32).data_ptr() == address
    assert mask in memory._kept
    before = len(memory._kept)
    del mask
    assert len(memory._kept) == before - 1


def test_modes_and_transforms_see_the_op():
    """The shortcut past the dispatcher is taken only where nothing could tell."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    x, dy, weight, bias, mask = operands(6, 20, 30, 0.4)
    x.requires_grad_(), weight.requires_grad_()
    plain = masked_ops.linear(x, weight, bias, mask, [], True)
    with Watch():
        watched = masked_ops.linear(x, weight, bias, mask, [], True)
        watched.backward(dy)
    assert torch.equal(plain, watched)
    for op in ("masked_linear", "masked_grad_input", "masked_grad_weight"):
        assert any(name.startswith(f"initperf.{op}") for name in seen), op
