"""What is put right in Triton's interpreter for the tests is right."""

import ctypes
from fractions import Fraction

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from triton_interpreter import exact_fma  # noqa: E402


def c_fma(x, y, z):
    """The C library's, which rounds once."""
    fmaf = ctypes.CDLL(None).fmaf
    fmaf.restype, fmaf.argtypes = ctypes.c_float, [ctypes.c_float] * 3
    return np.array([fmaf(*v) for v in zip(x.tolist(), y.tolist(), z.tolist(), strict=True)], np.float32)


def cases():
    """Ordinary numbers; sums that nearly cancel; sums just beside the middle of two numbers; tiny, huge and infinite ones."""
    g = np.random.default_rng(0)
    x, y, z = g.standard_normal((3, 20000)).astype(np.float32)
    yield x, y, z
    yield x, y, -x * y * np.float32(1 + 2.0**-20)
    middle = (1 + 2.0**-12) * np.exp2(g.integers(-20, 20, 4000)).astype(np.float32)
    sign = g.choice([-1, 1], (2, 4000))
    tiny = np.exp2(g.integers(-100, -40, 4000))
    yield (
        (sign[0] * middle).astype(np.float32),
        np.full(4000, 1 + 2.0**-12, np.float32),
        (sign[1] * tiny).astype(np.float32),
    )
    yield x * np.float32(2.0**-70), y * np.float32(2.0**-75), z * np.float32(2.0**-146)
    yield x * np.float32(2.0**100), y * np.float32(2.0**28), z * np.float32(2.0**126)
    special = np.array([0.0, -0.0, 1.0, -1.0, 3e38, np.inf, -np.inf, np.nan, 1e-45], np.float32)
    yield tuple(a.ravel() for a in np.meshgrid(special, special, special))


@pytest.mark.parametrize("case", range(6))
def test_an_exact_fma_rounds_as_the_c_librarys(case):
    x, y, z = list(cases())[case]
    got, want = exact_fma(x, y, z), c_fma(x, y, z)
    assert not (np.isnan(got) ^ np.isnan(want)).any()
    real = ~np.isnan(want)
    assert (got.view(np.uint32) == want.view(np.uint32))[real].all()


def test_an_exact_fma_of_doubles_rounds_once():
    g = np.random.default_rng(0)
    x, y, z = g.standard_normal((3, 5000))
    z[1000:2000] = (-x * y * (1 + 2.0**-50))[1000:2000]
    x[2000:], y[2000:], z[2000:] = 1 + 2.0**-27, 1 + 2.0**-26, np.exp2(g.integers(-200, -60, 3000))
    z[2000::2] *= -1
    x[2500:] *= np.exp2(g.integers(-300, -100, 2500))
    want = [
        float(Fraction(a) * Fraction(b) + Fraction(c)) for a, b, c in zip(*(v.tolist() for v in (x, y, z)), strict=True)
    ]
    assert np.array_equal(exact_fma(x, y, z), want)
    assert (x * y + z != want).sum() > 1000


def test_the_cases_hold_sums_that_rounding_twice_gets_wrong():
    for x, y, z in list(cases())[:3]:
        with np.errstate(all="ignore"):
            assert (x * y + z != c_fma(x, y, z)).any()
    x, y, z = list(cases())[2]
    twice = (np.multiply(x, y, dtype=np.float64) + z).astype(np.float32)
    assert (twice != c_fma(x, y, z)).any()


@triton.jit
def _fma(x_ptr, y_ptr, z_ptr, out_ptr, n, BLOCK: tl.constexpr):
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x, y = tl.load(x_ptr + at, mask=at < n, other=0.0), tl.load(y_ptr + at, mask=at < n, other=0.0)
        tl.store(out_ptr + at, tl.fma(x, y, tl.load(z_ptr + at, mask=at < n, other=0.0)), mask=at < n)


@pytest.mark.parametrize("case", [0, 1, 2])
def test_a_kernels_fma_rounds_once_in_a_loop_to_an_argument(case, gpu_device):
    x, y, z = list(cases())[case]
    arguments = [torch.from_numpy(v).to(gpu_device) for v in (x, y, z)]
    out = torch.empty_like(arguments[0])
    _fma[(1,)](*arguments, out, len(out), BLOCK=1024)
    assert np.array_equal(out.cpu().numpy(), c_fma(x, y, z))
