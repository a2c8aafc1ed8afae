"""Zeroing what a mask prunes, in place, and telling whether it is zero: 16 elements at once, of which the pruned ones are stored and the others not even read.

Tensors beyond the caches are read all the same, 8 or 4 elements at once, which was measured to take two thirds of the time.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from torch import Tensor

from ..core.jit import is_forked, jit, with_address
from ..core.scalars import intrinsic, pointer
from ..core.target import has_avx512
from ..core.team import in_team, members, number
from ..core.vectors import Loop

_LANES = 16
SHARED = 1 << 18  # elements from which torch's threads, still awake after the product, share the work
CACHED = 16 << 20  # bytes, of which most are in a cache still
_LIKE2, _LIKE4, _LIKE8 = (np.zeros(1, f"int{8 * size}") for size in (2, 4, 8))
_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _zero_line(bits: bool) -> Any:
    """An intrinsic: elements like those of an array, at an address, are 0 where 16 bytes, or bits, at another are."""

    def line(typingctx: Any, like: Any, words: Any, mask: Any) -> Any:
        size = like.dtype.bitwidth // 8

        def codegen(ctx: Any, builder: Any, sig: Any, args: Any) -> Any:
            kind, i1 = ir.VectorType(ir.IntType(8 * size), _LANES), ir.VectorType(ir.IntType(1), _LANES)
            found = ir.IntType(_LANES) if bits else ir.VectorType(ir.IntType(8), _LANES)
            at, where = builder.inttoptr(args[1], kind.as_pointer()), builder.inttoptr(args[2], found.as_pointer())
            survives = builder.load(where, align=1)
            if bits:
                pruned = builder.bitcast(builder.not_(survives), i1)
            else:
                pruned = builder.icmp_unsigned("==", survives, ir.Constant(found, [0] * _LANES))
            zeros = ir.Constant(kind, [0] * _LANES)
            if not has_avx512():
                kept = builder.and_(builder.load(at, align=size), builder.not_(builder.sext(pruned, kind)))
                builder.store(kept, at, align=size)  # of a select LLVM would make a masked store again
                return ctx.get_dummy_value()
            align = ir.Constant(ir.IntType(32), size)
            function_type = ir.FunctionType(ir.VoidType(), [kind, at.type, align.type, i1])
            name = f"llvm.masked.store.v{_LANES}i{8 * size}.p0"
            function = cgutils.get_or_insert_function(builder.module, function_type, name)
            builder.call(function, [zeros, at, align, pruned])
            return ctx.get_dummy_value()

        return types.void(like, types.int64, types.int64), codegen

    return intrinsic(line)


_zero_by_bytes, _zero_by_bits = _zero_line(False), _zero_line(True)


@intrinsic
def _pruned_bits(typingctx: Any, like: Any, words: Any, bits: Any, lines: Any) -> Any:
    """What is set, but for signs, in elements like those of an array where bits of a packed mask are not, of `lines` times 16."""
    size = like.dtype.bitwidth // 8

    def codegen(ctx: Any, builder: Any, sig: Any, args: Any) -> Any:
        _, start, mask, count = args
        word = ir.IntType(8 * size)
        kind, i1, i64 = ir.VectorType(word, _LANES), ir.VectorType(ir.IntType(1), _LANES), ir.IntType(64)
        zeros = ir.Constant(kind, [0] * _LANES)
        loop = Loop(builder, count, [zeros])
        at = builder.add(start, builder.mul(loop.j, ir.Constant(i64, size * _LANES)))
        where = builder.add(mask, builder.mul(loop.j, ir.Constant(i64, 2)))
        survives = builder.load(builder.inttoptr(where, ir.IntType(_LANES).as_pointer()), align=1)
        value = builder.load(builder.inttoptr(at, kind.as_pointer()), align=size)
        loop.end([builder.or_(loop.carried[0], builder.select(builder.bitcast(survives, i1), zeros, value))])
        name = f"llvm.vector.reduce.or.v{_LANES}i{8 * size}"
        reduce = cgutils.get_or_insert_function(builder.module, ir.FunctionType(word, [kind]), name)
        magnitude = ir.Constant(word, (1 << (8 * size - 1)) - 1)
        found = builder.and_(builder.call(reduce, loop.carried), magnitude)
        return builder.zext(found, i64) if size < 8 else found

    return types.uint64(like, types.int64, types.int64, types.int64), codegen


@intrinsic
def _magnitude(typingctx: Any, like: Any, address: Any) -> Any:
    """The element at an address without its sign, as an integer."""

    def codegen(ctx: Any, builder: Any, sig: Any, args: Any) -> Any:
        word, i64 = ir.IntType(like.dtype.bitwidth), ir.IntType(64)
        value = builder.load(builder.inttoptr(args[1], word.as_pointer()))
        value = builder.and_(value, ir.Constant(word, (1 << (like.dtype.bitwidth - 1)) - 1))
        return builder.zext(value, i64) if like.dtype.bitwidth < 64 else value

    return types.uint64(like, types.int64), codegen


@intrinsic
def _byte(typingctx: Any, address: Any) -> Any:
    """The byte at an address."""

    def codegen(ctx: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.load(builder.inttoptr(args[0], ir.IntType(8).as_pointer()))

    return types.uint8(types.int64), codegen


@intrinsic
def _zero_word(typingctx: Any, like: Any, address: Any) -> Any:
    def codegen(ctx: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = ir.IntType(like.dtype.bitwidth)
        builder.store(ir.Constant(kind, 0), builder.inttoptr(args[1], kind.as_pointer()))
        return ctx.get_dummy_value()

    return types.void(like, types.int64), codegen


@jit()
def _zero_span(like, words, mask, first, last, packed):
    """Elements first..last; first: a multiple of 16."""
    itemsize = like.itemsize
    whole = first + (last - first) // _LANES * _LANES
    if packed:
        for i in range(first, whole, _LANES):
            _zero_by_bits(like, words + i * itemsize, mask + i // 8)
    else:
        for i in range(first, whole, _LANES):
            _zero_by_bytes(like, words + i * itemsize, mask + i)
    for i in range(whole, last):
        survives = _byte(mask + i // 8) >> (i % 8) & 1 if packed else _byte(mask + i)
        if not survives:
            _zero_word(like, words + i * itemsize)


@jit()
def _zero_any(itemsize, words, mask, first, last, packed):
    if itemsize == 4:
        _zero_span(_LIKE4, words, mask, first, last, packed)
    elif itemsize == 2:
        _zero_span(_LIKE2, words, mask, first, last, packed)
    else:
        _zero_span(_LIKE8, words, mask, first, last, packed)


@jit()
def _any_span(like, words, bits, first, last):
    """Whether any pruned element of first..last is not 0; first: a multiple of 16."""
    itemsize, lines = like.itemsize, (last - first) // _LANES
    found = _pruned_bits(like, words + first * itemsize, bits + first // 8, lines)
    for i in range(first + lines * _LANES, last):
        if not _byte(bits + i // 8) >> (i % 8) & 1:
            found |= _magnitude(like, words + i * itemsize)
    return found != 0


@jit()
def _any_of(itemsize, words, bits, first, last):
    if itemsize == 4:
        return _any_span(_LIKE4, words, bits, first, last)
    if itemsize == 2:
        return _any_span(_LIKE2, words, bits, first, last)
    return _any_span(_LIKE8, words, bits, first, last)


@with_address(types.void(types.uintp))
def _share_of_any(data):
    """What one thread of a team finds."""
    job = carray(pointer(data, np.int64), (8,))
    me, team = number(np.uintp(job[0])), number(np.uintp(job[1]))
    itemsize, words, bits, size, workers = job[2], job[3], job[4], job[5], job[7]
    for worker in range(me, workers, team):
        first, last = size * worker // workers // _LANES * _LANES, size * (worker + 1) // workers // _LANES * _LANES
        if worker == workers - 1:
            last = size
        if _any_of(itemsize, words, bits, first, last):
            job[6] = 1  # by any thread, and the same from all


@jit()
def _any_pruned(itemsize, words, bits, size, workers, team, share):
    if workers == 1 or not team[0]:
        return _any_of(itemsize, words, bits, 0, size)
    job = np.empty(8, np.int64)
    job[0], job[1], job[2], job[3], job[4], job[5] = team[1], team[2], itemsize, words, bits, size
    job[6], job[7] = 0, workers
    in_team(np.uintp(team[0]), np.uintp(share), np.uintp(job.ctypes.data), np.uintp(workers))
    return job[6] != 0


def any_pruned(tensor: Tensor, bits: Tensor) -> bool:
    """Whether a contiguous tensor holds anything but 0 and -0 where the packed mask `bits` is False."""
    size = tensor.numel()
    workers = 1 if size < SHARED or is_forked() else torch.get_num_threads()
    return bool(
        _any_pruned(tensor.element_size(), tensor.data_ptr(), bits.data_ptr(), size, workers, *members(_share_of_any))
    )


@with_address(types.void(types.uintp))
def _share(data):
    """What one thread of a team does."""
    job = carray(pointer(data, np.int64), (8,))
    me, team = number(np.uintp(job[0])), number(np.uintp(job[1]))
    itemsize, words, mask, size, packed, workers = job[2], job[3], job[4], job[5], job[6], job[7]
    for worker in range(me, workers, team):  # fewer threads than asked for may have come
        first, last = size * worker // workers // _LANES * _LANES, size * (worker + 1) // workers // _LANES * _LANES
        if worker == workers - 1:
            last = size
        _zero_any(itemsize, words, mask, first, last, packed != 0)


@jit()
def _zero_pruned(itemsize, words, mask, size, packed, workers, team, share):
    if workers > 1 and team[0]:
        job = np.empty(8, np.int64)
        job[0], job[1], job[2], job[3], job[4], job[5] = team[1], team[2], itemsize, words, mask, size
        job[6], job[7] = 1 if packed else 0, workers
        in_team(np.uintp(team[0]), np.uintp(share), np.uintp(job.ctypes.data), np.uintp(workers))
    else:
        _zero_any(itemsize, words, mask, 0, size, packed)


@jit()
def _zero_by_one(itemsize, words, bits, size):
    _zero_any(itemsize, words, bits, 0, size, True)


@jit()
def _zero_large(words, mask):
    for i in range(words.size):
        words[i] &= -words.dtype.type(mask[i])


def zero_pruned(tensor: Tensor, mask: Tensor, bits: Tensor | None = None) -> Tensor:
    """`tensor` with 0 where the bool mask is False; masked_fill_ takes tens of times longer.

    tensor: contiguous, of the mask's shape, or the transpose of such a one. bits: the same mask packed (initperf.layers.base.pattern),
    which is sooner read.
    """
    size, itemsize = tensor.numel(), tensor.element_size()
    if size < SHARED and bits is not None:  # sooner called
        _zero_by_one(itemsize, tensor.data_ptr(), bits.data_ptr(), size)
    elif not mask.is_contiguous():
        (tensor if tensor.is_contiguous() else tensor.t()).masked_fill_(~mask, 0)
    elif size * itemsize > CACHED:
        words = (tensor if tensor.is_contiguous() else tensor.t()).view(-1).view(_WORDS[itemsize]).numpy()
        _zero_large(words, mask.view(-1).view(torch.uint8).numpy())
    else:
        where = (mask if bits is None else bits).data_ptr()
        workers = 1 if size < SHARED or is_forked() else torch.get_num_threads()
        _zero_pruned(itemsize, tensor.data_ptr(), where, size, bits is not None, workers, *members(_share))
    return tensor
