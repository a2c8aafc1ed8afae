"""How far a product or a sum may be from its exact value: derived from its terms and dtypes, never by another result.

A sum t_1 + ... + t_n of rounded products is off by the rounding errors of its partial sums and of its products, each
at most u times what is rounded. Two bounds follow, and a result must keep both:

1. Each value. No order and no blocks exceed n u / (1 - n u) (|t_1| + ... + |t_n|) (Higham, Accuracy and Stability of
   Numerical Algorithms, 2002, section 3.1). From some n on a smaller one holds: rounding errors of mean 0 exceed
   LAMBDA u sqrt(the sum of the squares of all partial sums and products) with a probability of at most
   2 exp(-LAMBDA^2 / 2), 4e-22 (Azuma's inequality: Ipsen and Zhou, Probabilistic error analysis for inner products,
   SIAM J. Matrix Anal. Appl. 41, 2020; as LAMBDA u sqrt(n) times the terms in Higham and Mary, A new approach to
   probabilistic rounding error analysis, SIAM J. Sci. Comput. 41, 2019). A narrower output adds half a unit in its
   last place.
2. The whole tensor. Errors are spread evenly over at most u times what is rounded on either side, so their square is
   a third of that squared on average (Fang and Chen, Probabilistic rounding error analysis from a statistical
   perspective, arXiv 2405.07537). The root-mean-square of error / deviation is therefore at most 1, and may be RMS.

Partial sums are those of terms added one after another in an order that has nothing to do with their values; blocks
and trees have smaller ones. The first bound sees a value that is wrong, the second what is a little wrong everywhere,
such as sums in float16, and most single values, too.

Equal terms are no chance: added one after another they are rounded the same way again and again. For them, and for
terms that are sorted, say random=False: the bound of any order counts, and nothing follows for the second.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

LAMBDA = 10.0
RMS = 2.0  # an order that happens to be bad for many of the sums, or errors that are not quite independent
# The mean of M squares of standard normals exceeds 1 + 2 sqrt(x / M) + 2 x / M with a probability of at most e^-x, here
# 2e-9 (Laurent and Massart, Adaptive estimation of a quadratic functional, Annals of Statistics 28, 2000, lemma 1).
_CHANCE = 20.0


class _Fields:
    def at(self, change: Callable[[Tensor], Tensor]):
        """The same of other elements: `change` selects, moves or repeats the elements of a tensor."""
        return type(self)(
            *(change(v) if isinstance(v, Tensor) else v for v in (getattr(self, f.name) for f in fields(self)))
        )

    def where(self, mask: Tensor):
        """Exactly 0 where the mask is False."""
        return self.at(lambda t: torch.where(mask, t, 0))


@dataclass
class Result(_Fields):
    """A value that was computed: what it should be, and how far off it may be. All but dtype in float64."""

    exact: Tensor
    worst: Tensor  # of the error's absolute values
    variance: Tensor  # the mean of the error's square
    dtype: torch.dtype

    def relu(self) -> Result:
        alive = self.exact > -self.worst
        likely = self.exact > -6 * self.variance.sqrt()
        return Result(self.exact.relu(), self.worst * alive, self.variance * likely, self.dtype)

    def gated(self, by: Result) -> Result:
        """Where `by` is positive: a ReLU's gradient. Where rounding may decide about that, either is right."""
        open_ = by.exact > 0
        either = (by.exact.abs() <= by.worst) & (by.worst > 0)
        perhaps = (by.exact.abs() <= 6 * by.variance.sqrt()) & (by.variance > 0)
        worst = torch.where(either, self.exact.abs() + self.worst, self.worst * open_)
        variance = torch.where(perhaps, self.exact**2 + self.variance, self.variance * open_)
        return Result(self.exact * open_, worst, variance, self.dtype)


@dataclass
class Sums(_Fields):
    """Sums of products before they are rounded, element by element. All but dtype in float64."""

    exact: Tensor
    terms: Tensor  # sums of the terms' absolute values
    squares: Tensor  # and of their squares
    summands: Tensor  # terms that are not 0
    worst: Tensor  # what the operands' own errors make of it
    variance: Tensor
    dtype: torch.dtype

    def __add__(self, other: Tensor | Result) -> Sums:
        """One term more each."""
        one = result_of(other)
        more = one.exact, one.exact.abs(), one.exact**2, (one.exact != 0).double(), one.worst, one.variance
        mine = self.exact, self.terms, self.squares, self.summands, self.worst, self.variance
        return Sums(*(a + b for a, b in zip(mine, more, strict=True)), self.dtype)

    def result(self, accumulate: torch.dtype | None = None, random: bool = True) -> Result:
        """Summed in `accumulate` (float64 of float64, else float32) and rounded to dtype."""
        accumulate = accumulate or (torch.float64 if self.dtype == torch.float64 else torch.float32)
        u, n, s = torch.finfo(accumulate).eps / 2, self.summands, self.exact
        # The first k of n terms in random order have a mean square of s^2 k^2 / n^2 + spread k (n - k) / (n (n - 1)),
        # as samples without replacement have. Summed over k = 2 ... n, and the products' own squares:
        m = n.clamp(min=1)
        spread = self.squares - s**2 / m
        rounded = s**2 * ((m + 1) * (2 * m + 1) / (6 * m) - 1 / m**2) + spread * ((m + 1) / 6 - 1 / m) + self.squares
        own = n * u / (1 - n * u) * (self.terms + self.worst)
        if random:
            own = torch.minimum(own, LAMBDA * u * rounded.sqrt())
        lost = n * _half_unit(torch.zeros_like(s), accumulate)  # of products below the smallest number
        both = 2 if accumulate == torch.float64 else 1  # then `exact` has such errors, too
        worst = both * (own + lost) + self.worst
        variance = both * (u**2 * rounded / 3 + lost**2) + self.variance
        if self.dtype != accumulate:
            variance = variance + torch.where(s == 0, 0, _half_unit(s, self.dtype) ** 2 / 3)
            worst = worst + _half_unit(s.abs() + worst, self.dtype)
        return Result(s, worst, variance, self.dtype)


def _half_unit(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Half a unit in the last place: what rounding to `dtype` may add to a value of this size."""
    info = torch.finfo(dtype)
    return torch.exp2(torch.frexp(value.abs().clamp(min=info.smallest_normal))[1].double() - 1) * (info.eps / 2)


def result_of(value: Tensor | Result) -> Result:
    if isinstance(value, Result):
        return value
    exact = value.detach().double()
    return Result(exact, torch.zeros_like(exact), torch.zeros_like(exact), value.dtype)


def sums(function: Callable[..., Tensor], *operands: Tensor | Result) -> Sums:
    """The sums of products that `function` computes of the operands. It is linear in each, with factors of 1 alone:
    each value is a sum of products of one element of each operand, as in a @ b, a convolution, a.sum(0), a gradient.
    """
    given = [result_of(o) for o in operands]
    exact = function(*(g.exact for g in given))
    sizes = [g.exact.abs() for g in given]
    worst, variance = torch.zeros_like(exact), torch.zeros_like(exact)
    for i, one in enumerate(given):
        if one.worst.any():
            before, after = given[:i], given[i + 1 :]
            worst = worst + function(
                *(b.exact.abs() + b.worst for b in before), one.worst, *(a.exact.abs() for a in after)
            )
            variance = variance + function(
                *(b.exact**2 + b.variance for b in before), one.variance, *(a.exact**2 for a in after)
            )
    return Sums(
        exact,
        function(*sizes),
        function(*(s**2 for s in sizes)),
        function(*((s != 0).double() for s in sizes)),
        worst,
        variance,
        given[0].dtype,
    )


def product(a: Tensor | Result, b: Tensor | Result) -> Sums:
    """a @ b."""
    return sums(torch.matmul, a, b)


def linear(x: Tensor | Result, weight: Tensor, bias: Tensor | None = None) -> Sums:
    """x @ weight^T + bias."""
    found = product(x, weight.t())
    return found if bias is None else found + bias


def of_linear(layer: nn.Linear, x: Tensor | Result, dy: Tensor | Result) -> list[Sums]:
    """[y, dx, dW, db] of a linear layer, the last where it has a bias."""
    rows = [result_of(t).at(lambda v: v.reshape(-1, v.shape[-1])) for t in (x, dy)]
    found = [linear(x, layer.weight, layer.bias), product(dy, layer.weight), product(rows[1].at(torch.t), rows[0])]
    return found if layer.bias is None else [*found, sums(lambda t: t.sum(0), rows[1])]


def of_squares(y: Sums | Result) -> Result:
    """The gradient of y.square().sum()."""
    found = y.result() if isinstance(y, Sums) else y
    return Result(2 * found.exact, 2 * found.worst, 4 * found.variance, found.dtype)


def of_convolution(conv: nn.Conv2d, x: Tensor, dy: Tensor | Result | None = None) -> list[Sums]:
    """[y, and with dy dx, dW, db] of a convolution, the last where it has a bias."""
    x, weight = x.detach(), conv.weight.detach()

    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return conv._conv_forward(x, weight, None)

    def gradient(operand: int) -> Callable[[Tensor, Tensor], Tensor]:
        def compute(dy: Tensor, other: Tensor) -> Tensor:
            like = (x, weight)[operand].double().requires_grad_()
            y = forward(like, other) if operand == 0 else forward(other, like)
            return torch.autograd.grad(y, like, dy)[0]

        return compute

    y = sums(forward, x, weight)
    if conv.bias is not None:
        y = y + conv.bias.detach().view(-1, 1, 1)
    if dy is None:
        return [y]
    found = [y, sums(gradient(0), dy, weight), sums(gradient(1), dy, x)]
    return found if conv.bias is None else [*found, sums(lambda t: t.sum((0, 2, 3)), dy)]


def of_network(layers: nn.Sequential, x: Tensor, dy: Tensor | None = None) -> list[Sums | Result]:
    """[y], and with dy [y, dx, then of every parameter in order], of linear layers and ReLUs. What a layer leaves is
    rounded to the dtype, and its error goes through the layers that follow, by their |weights|.
    """
    at, inputs, y = result_of(x), [], None
    for layer in layers:
        inputs.append(at)
        if isinstance(layer, nn.Linear):
            y = linear(at, layer.weight, layer.bias)
            at = y.result()
        elif isinstance(layer, nn.ReLU):
            y = at = at.relu()
        else:
            raise TypeError(f"no bound of {type(layer).__name__}")
    if dy is None:
        return [y]
    found, gradient = [], result_of(dy)
    for layer, input_ in zip(reversed(layers), reversed(inputs), strict=True):
        if isinstance(layer, nn.ReLU):
            dx = gradient = gradient.gated(input_)
            continue
        bias = [] if layer.bias is None else [sums(lambda t: t.sum(0), gradient)]
        found = [product(gradient.at(torch.t), input_), *bias, *found]
        dx = product(gradient, layer.weight)
        gradient = dx.result()
    return [y, dx, *found]


@dataclass
class Distance:
    """How far a result is from the exact one, as parts of what may be."""

    worst: float  # of all values: |error| / bound
    rms: float  # root-mean-square of error / deviation, in parts of its limit
    where: tuple[int, ...]  # the worst


def distance(
    got: Tensor, expected: Sums | Result, accumulate: torch.dtype | None = None, random: bool = True
) -> Distance:
    found = expected.result(accumulate, random) if isinstance(expected, Sums) else expected
    error = (got.detach().double() - found.exact).abs()
    parts = torch.where(error == 0, 0, error / found.worst).nan_to_num(math.inf, math.inf)  # NaN is never near
    i = int(parts.argmax())
    where = tuple(int(v) for v in torch.unravel_index(torch.tensor(i), got.shape))
    random &= bool((free := found.variance > 0).any())
    if not random:
        return Distance(float(parts.max()), 0.0, where)
    z = (error[free] ** 2 / found.variance[free]).mean().sqrt()
    count = found.exact[free].unique().numel()  # equal sums have equal errors
    limit = RMS * math.sqrt(1 + 2 * math.sqrt(_CHANCE / count) + 2 * _CHANCE / count)
    return Distance(float(parts.max()), float(z.nan_to_num(math.inf, math.inf)) / limit, where)


def assert_close_to_exact(
    got: Tensor, expected: Sums | Result, *, accumulate: torch.dtype | None = None, random: bool = True
) -> None:
    """Assert that `got` keeps both bounds, naming the worst coordinates. NaN anywhere fails."""
    assert got.shape == expected.exact.shape, f"shape {tuple(got.shape)}, expected {tuple(expected.exact.shape)}"
    assert got.dtype == expected.dtype, f"dtype {got.dtype}, expected {expected.dtype}"
    if not got.numel():
        return
    found = distance(got, expected, accumulate, random)
    if found.worst > 1:
        raise AssertionError(
            f"{found.worst:.3g} of the bound at {found.where}: got {got[found.where].item()}, "
            f"exact {expected.exact[found.where].item()}"
        )
    if found.rms > 1:
        raise AssertionError(
            f"the root-mean-square error is {found.rms:.3g} of what it may be; the worst at {found.where}: "
            f"got {got[found.where].item()}, exact {expected.exact[found.where].item()}"
        )


def assert_near(got: Tensor, right: Tensor) -> None:
    """Assert that two results of several steps in one dtype, for which no bound is derived, agree to a hundred
    roundings of the whole: by the Euclidean norm of the difference, which tensors of small values do not escape.
    """
    assert got.shape == right.shape, f"shape {tuple(got.shape)}, expected {tuple(right.shape)}"
    assert got.dtype == right.dtype, f"dtype {got.dtype}, expected {right.dtype}"
    got, right, unit = got.detach().double(), right.detach().double(), torch.finfo(right.dtype).eps / 2
    units = float((got - right).norm() / (unit * right.norm())) if not torch.equal(got, right) else 0.0
    assert units <= 100, f"the difference is {units:.3g} units of the whole"


def bits(tensor: Tensor) -> Tensor:
    """The integer view, for comparisons that must see -0.0 and NaN payloads."""
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
