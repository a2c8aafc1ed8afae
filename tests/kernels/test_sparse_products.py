"""The kernels for compressed weights against float64: dtypes, batches, blocks, threads."""

from importlib import import_module

import pytest
import torch

from initperf.core.bits import pack_bits
from initperf.kernels.reference.linear import sparse_linear as reference
from tolerance import assert_close_to_exact, bits, linear, product

pytest.importorskip("numba")
kernels = import_module("initperf.kernels.cpu.linear.sparse_linear")

SHAPES = [  # N, K, density; blocks of 256 columns below density 0.05
    (1, 1, 1.0),
    (3, 300, 0.3),
    (5, 129, 1.0),
    (70, 7, 0.4),
    (131, 257, 0.1),
    (37, 515, 0.03),
    (520, 260, 0.02),
    (6, 40, 0.0),
]
BATCHES = [
    1,
    2,
    3,
    4,
    5,
    16,
    17,
    33,
    64,
    65,
    130,
    300,
]  # 1 to 4: lanes over the slots; then 16, 32 or 64 lanes over the batch


class Problem:
    """Operands, and what the kernels read of the mask: some rows and columns are empty, one row and one column full."""

    def __init__(self, N, K, density, B, dtype=torch.float32, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.mask = torch.rand(N, K, generator=generator) < density
        if N > 2 and K > 2 and 0 < density < 1:
            self.mask[0], self.mask[:, 1] = True, True
            self.mask[N // 2], self.mask[:, -1] = False, False
        numbers = ((B, K), (B, N), (N, K), (N,))
        self.x, self.dy, weight, self.bias = (torch.randn(s, generator=generator).to(dtype) for s in numbers)
        self.weight = weight.masked_fill(~self.mask, 0)
        self.values = weight[self.mask][:, None]
        self.packed, self.pattern = pack_bits(self.mask), kernels.sparse_tensors(self.mask)

    def forward(self, bias=True, x=None):
        x, values = self.x if x is None else x, self.values
        return kernels.sparse_linear(x, values, self.bias if bias else None, self.packed, len(self.mask), self.pattern)

    def grad_input(self, dy=None):
        dy = self.dy if dy is None else dy
        return kernels.sparse_grad_input(dy, self.values, self.packed, self.mask.shape[1], self.pattern)

    def grad_values(self, dy=None, x=None):
        dy, x = self.dy if dy is None else dy, self.x if x is None else x
        return kernels.sparse_grad_values(dy, x, self.packed, self.pattern)

    def products(self):
        return self.forward(), self.grad_input(), self.grad_values()


def check(problem):
    x, dy, weight, bias, mask = problem.x, problem.dy, problem.weight, problem.bias, problem.mask
    assert_close_to_exact(problem.forward(bias=False), linear(x, weight))
    assert_close_to_exact(problem.forward(), linear(x, weight, bias))
    assert_close_to_exact(problem.grad_input(), product(dy, weight))
    assert_close_to_exact(problem.grad_values(), product(dy.t(), x).at(lambda t: t[mask][:, None]))


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(("N", "K", "density"), SHAPES)
def test_float32(N, K, density, batch):
    check(Problem(N, K, density, batch))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("N", "K", "density"), [(37, 515, 0.03), (131, 257, 0.3)])
def test_other_dtypes_are_summed_in_float32_or_their_own(N, K, density, dtype):
    for batch in (3, 40):  # 64 lanes
        check(Problem(N, K, density, batch, dtype))


@pytest.mark.parametrize("batch", [3, 40])
def test_an_index_of_a_mask_of_other_strides_is_the_same(batch):
    problem = Problem(131, 257, 0.1, batch)
    for one, other in zip(problem.pattern, kernels.sparse_tensors(problem.mask.t().contiguous().t()), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("batch", [1, 3, 40])
def test_inputs_of_any_strides_give_the_same_bits(batch):
    problem = Problem(131, 257, 0.1, batch)
    y, dx, grad = problem.products()

    def feature_major(t):
        return t.t().contiguous().t()

    def spread(t):
        wide = t.new_full((t.shape[0] * 2, 2 * t.shape[1]), float("nan"))
        wide[::2, ::2] = t
        return wide[::2, ::2]

    def shifted(t):
        return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)

    for odd in (feature_major, spread, shifted):
        assert torch.equal(bits(problem.forward(x=odd(problem.x))), bits(y))
        assert torch.equal(bits(problem.grad_input(odd(problem.dy))), bits(dx))
        assert torch.equal(bits(problem.grad_values(odd(problem.dy), odd(problem.x))), bits(grad))
    assert torch.equal(bits(problem.grad_values(x=feature_major(problem.x))), bits(grad))
    one = problem.dy[:1].expand(batch, -1)
    assert torch.equal(bits(problem.grad_input(one)), bits(problem.grad_input(one.contiguous())))
    assert torch.equal(bits(problem.grad_values(one)), bits(problem.grad_values(one.contiguous())))


@pytest.mark.parametrize("density", [0.03, 0.4])
@pytest.mark.parametrize("batch", [2, 200])
def test_indexes_and_products_have_the_same_bits_for_one_and_two_threads(batch, density):
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            problem = Problem(
                700, 1030, density, batch
            )  # large enough to be shared in every step, in odd numbers of panels
            found.append([*problem.pattern, *(bits(t) for t in problem.products())])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))
    if batch == 2:
        check(problem)


def test_the_batch_neither_mixes_nor_leaks_into_padding():
    """Every batch up to 70 gives each of its rows what that row gives among others: integers, so in any order."""
    problem = Problem(131, 257, 0.1, 70)
    problem.x, problem.dy, problem.values, problem.bias = (
        (8 * t).round() for t in (problem.x, problem.dy, problem.values, problem.bias)
    )
    y, dx = problem.forward(), problem.grad_input()
    for batch in range(1, 70):
        x, dy = problem.x[:batch], problem.dy[:batch]
        assert torch.equal(problem.forward(x=x), y[:batch])
        assert torch.equal(problem.grad_input(dy), dx[:batch])
        assert torch.equal(problem.grad_values(dy, x).flatten(), (dy.t() @ x)[problem.mask])


def test_every_slot_of_the_transposed_index_names_its_survivor():
    for N, K, density in ((5, 7, 0.5), (300, 130, 0.3), (600, 515, 0.02), (900, 1030, 0.1)):
        mask = torch.rand(N, K, generator=torch.Generator().manual_seed(1)) < density
        places = kernels.sparse_tensors(mask)[5]
        named = places[places >= 0].long()
        assert torch.equal(named.sort().values, torch.arange(int(mask.sum())))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (31, 33), (399, 331), (2, 1 << 16)])
@pytest.mark.parametrize("density", [0.0, 0.2, 0.99])
def test_expanding_and_compressing_are_the_definition(shape, density, dtype):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(2)) < density
    mask[: len(mask) // 2] &= density > 0.5  # nothing in the first worker's half
    nnz, packed, dense = int(mask.sum()), pack_bits(mask), torch.randn(shape).to(dtype)
    values = kernels.compress(dense, packed, nnz)
    assert torch.equal(values, reference.compress(dense, packed, nnz))
    assert torch.equal(kernels.compress(dense.t().contiguous().t(), packed, nnz), values)
    assert torch.equal(bits(kernels.expand(values, packed, *shape)), bits(reference.expand(values, packed, *shape)))


@pytest.mark.parametrize("batch", [2, 20])
def test_a_value_that_is_not_a_number_reaches_the_outputs_it_concerns_and_no_other(batch):
    problem = Problem(131, 257, 0.1, batch)
    problem.x[1, 1] = float("nan")
    y, grad = problem.forward(), problem.grad_values()
    assert torch.equal(y[1].isnan(), problem.mask[:, 1])
    assert y[torch.arange(batch) != 1].isfinite().all()
    assert torch.equal(grad.flatten().isnan(), problem.mask.nonzero()[:, 1] == 1)
