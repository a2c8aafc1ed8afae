"""The RNG contract, version 1: value = f(seed, stream, index), the same bits on every device, thread count and sharding.

Frozen: saved tickets depend on every bit. A better formula would be version 2 beside this one.

Words. Philox-4x32-10 (Salmon et al. 2011); key = seed, low word first; counter = (block low, block high, stream low,
stream high). index is the row-major position in the whole tensor: tile = index >> 10, r = index & 1023,
lane = r >> 8, block = (tile << 8) | (r & 255); the word of an index is word `lane` of its block.

Values. Every operation below is one IEEE-754 float32 operation, rounded to nearest even, subnormals kept; fma rounds
once; a product of more than two factors is evaluated from the left; P(x) is Horner's rule in fma, highest power first.
float(w) rounds an unsigned word, signed(w) reads it as two's complement first. Constants are in kernels/contract.py.

  finish(z)     = clamp(fma(z, scale, base), least, greatest)      scale, base, least, greatest: params[0:4]
  log(x, k, s)  = fma(float(bits(x) - bits(2^k)), LOG_SLOPE, fma(g, LOG(t), s)), which is s - 2 ln(x 2^-k), where
                  m = x's significand in [1, 2), t = m - 1.5, g = fma(-t, t, 0.25)
  UNIFORM       finish(float(w >> 8)); scale = (hi - lo) 2^-24, base = lo
  NORMAL        lanes (0, 1) and (2, 3) hold words (v, w): s = log(float(v | 1), 32, 0) with g LOG(t) rounded alone,
                radius = sqrt(s) scale, its sign flipped if v is odd; x = signed(w) 2^-32;
                values fma(radius, COS(x x), base) and fma(radius, x SIN(x x), base)
  TRUNC_CENTER  y = fma(signed(w), params[4], params[5]); finish(y CENTER(log(fma(-y, y, 1), 0, 0)))
  TRUNC_NORMAL, TRUNC_TAIL   left = fma(float(w | 1), params[4], params[5]), right = fma(float(~w | 1), params[6], params[7]),
                q = min(left, right), t = sqrt(log(q, 0, params[8])), z from the two PIECES of the kind;
                finish(z), with -scale where left < right
  TRUNC_FAR     s = log(fma(float(~w | 1), params[4], params[5]), 0, 0); finish(s P(s)), P = params[6:14]
  TRUNC_NARROW  x = signed(w) 2^-32; finish(x P(x)), P = params[4:12]

The result is rounded once to bfloat16 or float16. float64: the unclamped float32 value widened, clamped in float64.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import re
import threading
from functools import lru_cache
from typing import NamedTuple

import torch

from initperf.core.checks import FLOATS, InitPerfRuntimeError, InitPerfTypeError, fail
from initperf.core.torch_private import WRAPPERS
from initperf.kernels.contract import (
    BITS,
    NORMAL,
    PHILOX_MULTIPLIERS,
    PHILOX_WEYL,
    TRUNC_CENTER,
    TRUNC_FAR,
    TRUNC_NARROW,
    TRUNC_NORMAL,
    TRUNC_TAIL,
    UNIFORM,
)
from initperf.rng import truncation

__all__ = [
    "BITS",
    "NORMAL",
    "TRUNC_CENTER",
    "TRUNC_FAR",
    "TRUNC_NARROW",
    "TRUNC_NORMAL",
    "TRUNC_TAIL",
    "UNIFORM",
    "VERSION",
    "Distribution",
    "canonical_name",
    "draw_seed",
    "normal",
    "philox",
    "stream_of",
    "trunc_normal",
    "uniform",
]

VERSION = 1
_NORMAL_REACH = 6.6605  # sqrt(-2 ln 2^-32) = 6.66043...: no value of NORMAL is further from the mean, in std
_ALIASES = {"weight_values": "weight", "weight_orig": "weight"}


class Distribution(NamedTuple):
    """What a kernel needs to know: which formula, and its constants (scale, base, least, greatest, ...; see the module)."""

    kind: int
    params: tuple[float, ...]


def float32(x: float) -> float:
    """The float32 nearest to x; infinite beyond its range."""
    return ctypes.c_float(x).value


# significant bits, exponent of the smallest subnormal, largest finite value
_GRIDS = {
    torch.float32: (24, -149, 3.4028234663852886e38),
    torch.bfloat16: (8, -133, 3.3895313892515355e38),
    torch.float16: (11, -24, 65504.0),
}


def at_most(x: float, dtype: torch.dtype) -> float:
    """The greatest value of `dtype` that is <= x."""
    if dtype == torch.float64 or math.isinf(x):
        return x
    digits, smallest, largest = _GRIDS[dtype]
    if abs(x) > largest:
        return largest if x > 0 else -math.inf
    step = math.ldexp(1.0, max(math.frexp(x)[1] - digits, smallest))
    return math.floor(x / step) * step


def at_least(x: float, dtype: torch.dtype) -> float:
    """The least value of `dtype` that is >= x."""
    return -at_most(-x, dtype) + 0.0  # no -0.0


def _finite(**values: float) -> None:
    for name, value in values.items():
        if not math.isfinite(value):
            fail(f"{name} to be finite", value, kind=InitPerfRuntimeError)


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in FLOATS:
        fail("dtype to be float32, bfloat16, float16 or float64", dtype, kind=InitPerfTypeError)


def _constant(value: float, dtype: torch.dtype) -> Distribution:
    value = float(value) if dtype == torch.float64 else float32(value)
    return Distribution(UNIFORM, (0.0, float32(value), value, value))


@lru_cache(maxsize=4096)
def uniform(lo: float, hi: float, dtype: torch.dtype) -> Distribution:
    """Uniform on [lo, hi): lo + (hi - lo) k 2^-24, k an integer below 2^24, rounded to `dtype`; hi is never returned. lo == hi gives lo.

    (hi - lo) 2^-24 is rounded to float32: below hi - lo = 2^-102 that loses resolution, at 2^-126 all of it.

    Raises if lo > hi, a bound is not finite, hi - lo exceeds float32's range, or no value of `dtype` is in [lo, hi).
    """
    _check_dtype(dtype)
    _finite(lo=lo, hi=hi)
    if lo > hi:
        fail("lo <= hi", f"lo={lo}, hi={hi}", kind=InitPerfRuntimeError)
    if lo == hi:
        return _constant(lo, dtype)
    width = float32(hi - lo)
    if math.isinf(width):
        fail("hi - lo within float32's range", f"{hi} - {lo}", kind=InitPerfRuntimeError)
    least, greatest = at_least(lo, dtype), at_most(math.nextafter(hi, -math.inf), dtype)
    if least > greatest:
        fail(f"a value of {dtype} in [lo, hi)", f"[{lo}, {hi})", kind=InitPerfRuntimeError)
    return Distribution(UNIFORM, (float32(width * 2.0**-24), float32(lo), float(least), float(greatest)))


@lru_cache(maxsize=4096)
def normal(mean: float, std: float) -> Distribution:
    """Normal with this mean and standard deviation. Raises if either is not finite (in float32), or std < 0."""
    _finite(mean=mean, std=std)
    if std < 0:
        fail("std >= 0", std, kind=InitPerfRuntimeError)
    mean, std = float32(mean), float32(std)
    _finite(mean=mean, std=std)
    return Distribution(NORMAL, (std, mean, -math.inf, math.inf))


@lru_cache(maxsize=4096)
def trunc_normal(mean: float, std: float, a: float, b: float, dtype: torch.dtype) -> Distribution:
    """Normal conditioned on [a, b] (either may be infinite), by the inverse of its distribution function.

    The kind depends on where the interval lies, in std from the mean; where it contains all that NORMAL can return, it
    is NORMAL. a == b gives a. Raises if std is not positive, a > b, anything is NaN, or no value of `dtype` is in [a, b].
    """
    _check_dtype(dtype)
    _finite(mean=mean, std=std)
    if std <= 0:
        fail("std > 0", std)
    if math.isnan(a) or math.isnan(b) or a > b or a == math.inf or b == -math.inf:
        fail("a <= b", f"a={a}, b={b}", kind=InitPerfRuntimeError)
    if a == b:
        return _constant(a, dtype)
    least, greatest = at_least(a, dtype), at_most(b, dtype)
    if least > greatest:
        fail(f"a value of {dtype} in [a, b]", f"[{a}, {b}]", kind=InitPerfRuntimeError)
    reach = _NORMAL_REACH * std
    if least <= at_most(mean - reach, dtype) and at_least(mean + reach, dtype) <= greatest:
        return normal(mean, std)
    kind, scale, base, rest = truncation.constants(mean, std, a, b)
    head = (float32(scale), float32(base))
    if not (math.isfinite(head[0]) and math.isfinite(head[1])):
        fail("mean and std within float32's range", f"mean={mean}, std={std}", kind=InitPerfRuntimeError)
    return Distribution(kind, (*head, float(least), float(greatest), *(float32(x) for x in rest)))


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """The four 32-bit words of one Philox-4x32-10 block, in plain integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = PHILOX_MULTIPLIERS[0] * c0, PHILOX_MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & 0xFFFFFFFF, (p0 >> 32) ^ c3 ^ k1, p0 & 0xFFFFFFFF
        k0, k1 = (k0 + PHILOX_WEYL[0]) & 0xFFFFFFFF, (k1 + PHILOX_WEYL[1]) & 0xFFFFFFFF
    return c0, c1, c2, c3


class _Scratch(threading.local):
    """A tensor a thread to draw into: making one costs as much as the draw."""

    def __init__(self) -> None:
        with torch.inference_mode(False):
            self.word = torch.zeros((), dtype=torch.int64, device="cpu")


_scratch = _Scratch()


def draw_seed(generator: torch.Generator | None = None) -> int:
    """One seed from a generator, torch's CPU default if None.

    A CPU generator gives the next int64 of `random_`, and so does one of another device, but CUDA's. A CUDA generator is not
    waited for: the seed is the first two Philox words of counter = (offset low, offset high, 0, 0), key = its initial
    seed, and its offset advances by 4.
    """
    if generator is None or generator.device.type == "cpu":
        return int(_scratch.word.random_(generator=generator))
    if generator.device.type != "cuda":
        return int(torch.zeros((), dtype=torch.int64, device=generator.device).random_(generator=generator))
    seed, offset = generator.initial_seed() % 2**64, generator.get_offset()
    generator.set_offset(offset + 4)
    low, high, _, _ = philox((offset & 0xFFFFFFFF, offset >> 32, 0, 0), (seed & 0xFFFFFFFF, seed >> 32))
    return high << 32 | low


@lru_cache(maxsize=1 << 14)
def canonical_name(name: str) -> str:
    """A parameter's qualified name without the parts that wrappers add (DDP, FSDP, compile, checkpoint, parametrize)."""
    if name.endswith(".original"):
        name = re.sub(r"(^|\.)parametrizations\.([^.]+)\.original$", r"\1\2", name)
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    if parts:
        parts[-1] = _ALIASES.get(parts[-1], parts[-1])
    return ".".join(parts)


@lru_cache(maxsize=1 << 14)
def stream_of(name: str) -> int:
    """The stream of a parameter: the first 8 bytes of SHA-256 of its canonical name, little-endian."""
    return int.from_bytes(hashlib.sha256(canonical_name(name).encode()).digest()[:8], "little")
