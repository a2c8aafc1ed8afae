"""Sampling into tensors by the RNG contract, value = f(seed, stream, index): whole, strided, a shard of a whole, orthogonal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from initperf import rng
from initperf.core import ops
from initperf.core.bits import check_bits, pack_bits
from initperf.core.checks import FLOATS, InitPerfRuntimeError, InitPerfTypeError, check_mask, check_seed, fail
from initperf.core.torch_private import dispatch_modes, function_transform, not_compiled
from initperf.core.torch_private import increment_version as written
from initperf.rng import Distribution

ops.register("sample_", "sampling.sample")
ops.register("sample_many_", "sampling.sample_many")
ops.register("orthogonal_", "sampling.orthogonal")

PLAIN_TYPES = {Tensor, torch.nn.Parameter}
_DTYPES = frozenset(FLOATS)
_STRIDED = torch.strided
_inference_mode = torch.is_inference_mode_enabled


def is_plain(tensor: Any) -> bool:
    """Whether a tensor's memory may be written directly: no subclass, mode, transform or foreign layout stands between."""
    return (
        type(tensor) in PLAIN_TYPES
        and not has_torch_function_variadic(tensor)
        and tensor.dtype in _DTYPES
        and tensor.layout is _STRIDED
        and not tensor.is_meta
        and not dispatch_modes()
        and function_transform() is None
        and (not tensor.is_inference() or _inference_mode())
    )


def is_sharded(tensor: Any) -> bool:
    """Whether it is a DTensor, without importing torch.distributed."""
    return hasattr(tensor, "device_mesh")


def has_no_values(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and (tensor.is_meta or hasattr(tensor, "fake_mode"))


def kind_of(tensor: Any) -> str:
    return f"{type(tensor).__name__} of {tensor.dtype}" if isinstance(tensor, Tensor) else type(tensor).__name__


def has_own_memory(tensor: Tensor) -> bool:
    """Whether kernels can write a plain tensor as it lies in memory."""
    return (tensor.is_cpu or tensor.is_cuda) and tensor.is_contiguous() and not tensor.is_neg()


def _scratch(tensor: Tensor) -> Tensor:
    """Memory like a tensor's, which kernels can write."""
    if tensor.is_cpu or tensor.is_cuda:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    ops.explain(tensor.device.type)
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")


def write(tensor: Tensor, distribution: Distribution, seed: int, stream: int) -> Tensor:
    """Sample into a plain tensor, its row-major position being the index; nothing is checked."""
    if has_own_memory(tensor):
        ops.implementation("sample_", "cpu" if tensor.is_cpu else "cuda")(tensor, *distribution, seed, stream)
        written((tensor,))
        return tensor
    values = _scratch(tensor)
    with torch.no_grad():
        return tensor.copy_(write(values, distribution, seed, stream))


def write_many(
    tensors: Sequence[Tensor],
    distributions: Sequence[Distribution],
    streams: Sequence[int],
    seed: int,
    masks: Sequence[Tensor | None],
    moments: bool = False,
) -> Tensor | None:
    """Sample into plain tensors of one device with memory of their own, in one pass; nothing is checked.

    masks: None, a contiguous bool tensor, or packed bits whose survivors the tensor holds. moments: return float64
    (2, tensors), mean and variance of what survives. See initperf.kernels.reference.sampling.sample_many.
    """
    op = ops.implementation("sample_many_", tensors[0].device.type)
    result = op(tensors, distributions, streams, seed, masks if any(m is not None for m in masks) else None, moments)
    written(tuple(tensors))
    return result


def write_shard(
    tensor: Tensor, distribution: Distribution, shape: Sequence[int], start: Sequence[int], seed: int, stream: int
) -> Tensor:
    """Sample the part of a whole of `shape` that begins at `start` into a plain tensor; nothing is checked."""
    if not has_own_memory(tensor):
        values = _scratch(tensor)
        with torch.no_grad():
            return tensor.copy_(write_shard(values, distribution, shape, start, seed, stream))
    cut = [d for d, (part, whole) in enumerate(zip(tensor.shape, shape, strict=True)) if part != whole]
    steps = [math.prod(shape[d + 1 :]) for d in range(len(shape))]

    def fill(part: Tensor, d: int, offset: int) -> None:
        """The dimensions from d on. Cut in dimension d and one more, the runs begin at equal distances."""
        if sum(c > d for c in cut) > 1:
            for i in range(part.shape[0]):
                fill(part[i], d + 1, offset + (start[d] + i) * steps[d])
            return
        last = max((c for c in cut if c >= d), default=None)
        run = -1 if last is None else tensor.shape[last] * steps[last]
        stride = 0 if last is None else shape[last] * steps[last]
        offset += sum(start[e] * steps[e] for e in range(d, len(shape)))
        op(part, *distribution, seed, stream, offset, run, stride)

    op = ops.implementation("sample_", tensor.device.type)
    if tensor.numel():
        fill(tensor, 0, 0)
        written((tensor,))
    return tensor


def sample_shard_into(
    tensor: Tensor,
    distribution: Distribution,
    shape: Sequence[int],
    start: Sequence[int],
    *,
    seed: int,
    stream: int = 0,
) -> Tensor:
    """whole[start[0] : start[0] + tensor.shape[0], ...] of sample_into on a tensor of `shape`, without the whole. Returns the tensor.

    For sharded weights: any block, rows, columns or both. Raises as sample_into does, and if the block is not inside.
    """
    if len(shape) != tensor.dim() or len(start) != tensor.dim():
        fail(f"shape and start of {tensor.dim()} dimensions", f"{tuple(shape)} and {tuple(start)}")
    if any(s < 0 or s + part > whole for s, part, whole in zip(start, tensor.shape, shape, strict=True)):
        fail(f"a block inside {tuple(shape)}", f"{tuple(tensor.shape)} from {tuple(start)}")
    check_seed(seed)
    check_seed(stream, "stream")
    if not is_plain(tensor):
        return sample_into(tensor, distribution, seed=seed, stream=stream)
    return write_shard(tensor, distribution, shape, start, seed, stream)


@not_compiled
def sample_into(tensor: Tensor, distribution: Distribution, *, seed: int, stream: int = 0) -> Tensor:
    """tensor[i] = f(seed, stream, i), i being the row-major position, whatever the strides. Returns the tensor.

    distribution: of initperf.rng (made for the tensor's dtype); seed, stream: ints in [0, 2**64). Meta and fake tensors
    are returned as they are. Raises for other tensors that are not plain float32, bfloat16, float16 or float64.
    """
    if not isinstance(distribution, Distribution):
        fail("an initperf.rng.Distribution", type(distribution).__name__, kind=InitPerfTypeError)
    check_seed(seed)
    check_seed(stream, "stream")
    if is_plain(tensor):
        return write(tensor, distribution, seed, stream) if tensor.numel() else tensor
    if not has_no_values(tensor):
        fail("a plain float32, bfloat16, float16 or float64 tensor", kind_of(tensor), kind=InitPerfTypeError)
    return tensor


@not_compiled
def sample_survivors_into(
    values: Tensor, distribution: Distribution, mask: Tensor, shape: Sequence[int], *, seed: int, stream: int = 0
) -> Tensor:
    """values[j] = f(seed, stream, i), i being the row-major position of survivor j in `shape`: whole[mask] without the whole.

    values: plain, (nnz,) or (nnz, 1), of the dtype that `distribution` was made for. mask: bool of `shape`, or its packed
    bits (uint8, row-major, numpy.packbits with bitorder="little"), on the device of values. Returns values. Raises as
    sample_into does, and if values and mask do not fit.
    """
    shape = tuple(shape)
    if not isinstance(distribution, Distribution):
        fail("an initperf.rng.Distribution", type(distribution).__name__, kind=InitPerfTypeError)
    check_seed(seed)
    check_seed(stream, "stream")
    if not isinstance(mask, Tensor):
        fail("mask to be a torch.Tensor of bool, or of packed bits", type(mask).__name__, kind=InitPerfTypeError)
    if mask.dtype == torch.bool:
        check_mask(mask, shape)
    if has_no_values(values):
        return values
    if not is_plain(values):
        fail("plain float32, bfloat16, float16 or float64 values", kind_of(values), kind=InitPerfTypeError)
    if values.dim() not in (1, 2) or values.dim() == 2 and values.shape[1] != 1:
        fail("values of shape (nnz,) or (nnz, 1)", tuple(values.shape))
    if mask.device != values.device:
        fail(f"mask on the device of values ({values.device})", mask.device, kind=InitPerfRuntimeError)
    bits = pack_bits(mask) if mask.dtype == torch.bool else mask.contiguous()
    check_bits(bits, shape, values.numel())
    if not values.numel():
        return values
    if has_own_memory(values):
        write_many([values], [distribution], [stream], seed, [bits])
        return values
    copy = _scratch(values)
    write_many([copy], [distribution], [stream], seed, [bits.to(copy.device)])
    with torch.no_grad():
        return values.copy_(copy)


def write_orthogonal(tensor: Tensor, gain: float, seed: int, stream: int) -> Tensor:
    """orthogonal_ with a seed and a stream; nothing is checked."""
    rows = tensor.size(0)
    dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    normals = torch.empty(rows, tensor.numel() // rows, dtype=dtype, device="cpu")
    write(normals, rng.normal(0.0, 1.0), seed, stream)
    wide = rows < normals.shape[1]
    matrix = normals.t().contiguous() if wide else normals
    ops.implementation("orthogonal_", "cpu")(matrix)
    matrix.mul_(gain)
    with torch.no_grad():
        return tensor.copy_((matrix.t() if wide else matrix).reshape(tensor.shape))
