"""What Triton's interpreter gets wrong in some of the supported versions, put right for the tests: each where it is found wrong."""

from __future__ import annotations

from typing import Any

import numpy as np


def mend() -> None:
    """Let the interpreter compute what a GPU computes. Call it before any kernel runs.

    fma rounds once, as in Triton 3.9; a tensor of one element is an index beside NumPy 2.4 too, as from Triton 3.7 on.
    """
    from triton.runtime import interpreter

    if not _rounds_once(interpreter):
        _mend_fma(interpreter)
    if not _indexes(interpreter):
        _mend_index(interpreter)


def exact_fma(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """x y + z of float32 or float64 arrays, rounded once; of float64 where no part of x y leaves the range of normal numbers.

    By rounding to odd: of the two neighbours of an inexact sum, the one whose last bit is set. So the rounding that follows, of
    that sum to float32 or of one more sum, meets no tie that the exact result is not (Boldo & Melquiond 2008, Emulation of a FMA
    and correctly rounded sums: proved algorithms using rounding to odd).
    """
    with np.errstate(all="ignore"):
        if z.dtype == np.float32:
            return _odd_sum(np.multiply(x, y, dtype=np.float64), z.astype(np.float64)).astype(np.float32)
        high, low = _two_product(x, y)
        z, rest = _two_sum(z, low)
        high, more = _two_sum(high, z)
        return high + np.where(np.isfinite(high), _odd_sum(rest, more), 0.0)


def _two_sum(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """a + b, and what rounding left out of it, exactly (Knuth)."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def _two_product(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x y in float64, and what rounding left out of it, exactly (Dekker)."""

    def halves(v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        high = v * (2.0**27 + 1) - (v * (2.0**27 + 1) - v)
        return high, v - high

    product, (a, b), (c, d) = x * y, halves(x), halves(y)
    return product, ((a * c - product) + a * d + b * c) + b * d


def _odd_sum(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a + b in float64, rounded to odd."""
    total, error = _two_sum(*np.broadcast_arrays(a, b))
    bits = np.asarray(total).view(np.int64)
    even = np.isfinite(error) & (error != 0) & (bits & 1 == 0)
    away = np.where((error > 0) == (total > 0), 1, -1)  # bits count away from zero
    return (bits + away * even).view(np.float64)


def _rounds_once(interpreter: Any) -> bool:
    """Just above the middle of two numbers, where a product that is rounded first falls on it, and goes down."""
    values = [np.full(1, v, np.float32) for v in (1 + 2.0**-12, 1 + 2.0**-12, 2.0**-60)]
    x, y, z = (interpreter.TensorHandle(v, interpreter.tl.float32) for v in values)
    found = interpreter.InterpreterBuilder().create_fma(x, y, z).data
    return bool(found[0] == np.float32(1 + 2.0**-11 + 2.0**-23))


def _mend_fma(interpreter: Any) -> None:
    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        return interpreter.TensorHandle(exact_fma(x.data, y.data, z.data), z.dtype.scalar)

    interpreter.InterpreterBuilder.create_fma = create_fma


def _indexes(interpreter: Any) -> bool:
    scope = interpreter._LangPatchScope()
    tensor = interpreter.tl.tensor(
        interpreter.TensorHandle(np.ones(1, np.int32), interpreter.tl.int32), interpreter.tl.int32
    )
    interpreter._patch_lang_tensor(interpreter.tl.tensor, scope)
    try:
        return tensor.__index__() == 1
    except TypeError:
        return False
    finally:
        scope.restore()


def _mend_index(interpreter: Any) -> None:
    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched
