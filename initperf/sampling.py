"""torch.nn.init's sampling functions by the RNG contract: value = f(seed, stream, index), several times faster, the same bits everywhere.

What is not a plain float32, bfloat16, float16 or float64 tensor (meta and fake tensors, complex dtypes, tensor
subclasses, tensors inside vmap) goes to torch's own function, with torch's own generator, result and errors.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Generator, Tensor
from torch._C._dynamo import eval_frame
from torch.overrides import handle_torch_function, has_torch_function_variadic

from initperf import ops, rng
from initperf.checks import FLOATS, InitPerfTypeError, check_seed, fail
from initperf.rng import Distribution

ops.register("sample_", "sample")
ops.register("orthogonal_", "orthogonal")

ORIGINALS: dict[str, Callable[..., Tensor]] = {
    name: getattr(torch.nn.init, name)
    for name in (
        "uniform_",
        "normal_",
        "trunc_normal_",
        "xavier_uniform_",
        "xavier_normal_",
        "kaiming_uniform_",
        "kaiming_normal_",
        "orthogonal_",
        "sparse_",
    )
}
SELECT_STREAM = 1  # of sparse_'s choice of zeros in the functional API; values are stream 0

F = TypeVar("F", bound=Callable[..., Any])
_fan_in_and_fan_out = torch.nn.init._calculate_fan_in_and_fan_out
_correct_fan = torch.nn.init._calculate_correct_fan
_gain = torch.nn.init.calculate_gain
_TYPES = {Tensor, torch.nn.Parameter}
_DTYPES = frozenset(FLOATS)
_STRIDED = torch.strided
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_transform = torch._C._functorch.peek_interpreter_stack
_inference_mode = torch.is_inference_mode_enabled
_written: Callable[[tuple[Tensor]], None] = torch._C._increment_version

_SKIP = eval_frame._FrameExecStrategy(eval_frame._FrameAction.SKIP, eval_frame._FrameAction.SKIP)


def not_compiled(function: F) -> F:
    """torch.compile breaks the graph at `function` and leaves all it calls alone: torch.compiler.disable, whose import takes seconds and which costs 0.5 us a call."""
    eval_frame.set_code_exec_strategy(function.__code__, _SKIP)
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    return function


def is_plain(tensor: Any) -> bool:
    """Whether a tensor's memory may be written directly: no subclass, mode, transform or foreign layout stands between."""
    return (
        type(tensor) in _TYPES
        and tensor.dtype in _DTYPES
        and not has_torch_function_variadic(tensor)
        and tensor.layout is _STRIDED
        and not tensor.is_meta
        and not _dispatch_modes()
        and _function_transform() is None
        and (not tensor.is_inference() or _inference_mode())
    )


def is_sharded(tensor: Any) -> bool:
    """Whether it is a DTensor, without importing torch.distributed."""
    return hasattr(tensor, "device_mesh")


def _as_torch(function: Callable[..., Tensor], tensor: Any, seed: int | None, **arguments: Any) -> Tensor:
    """What torch does with a tensor that is not plain. A mode (torch.device as a context is one) sees our function and its arguments."""
    if type(tensor) in _TYPES and has_torch_function_variadic(tensor):
        return handle_torch_function(function, (tensor,), tensor=tensor, seed=seed, **arguments)
    if seed is not None and not _has_no_values(tensor):
        fail("a plain float32, bfloat16, float16 or float64 tensor with seed=", _kind(tensor), kind=InitPerfTypeError)
    return ORIGINALS[function.__name__](tensor, **arguments)


def _has_no_values(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and (tensor.is_meta or hasattr(tensor, "fake_mode"))


def _kind(tensor: Any) -> str:
    return f"{type(tensor).__name__} of {tensor.dtype}" if isinstance(tensor, Tensor) else type(tensor).__name__


def _number(value: Any, name: str) -> float:
    """What torch takes for a float argument: Python and NumPy numbers, and tensors of no dimension without gradient."""
    if isinstance(value, Tensor) and value.dim() == 0 and not value.requires_grad and not value.is_complex():
        return float(value.item())
    if isinstance(value, (str, bytes, Tensor)) or not hasattr(value, "__float__"):
        fail(f"{name} to be a number", f"{value!r}", kind=InitPerfTypeError)
    return float(value)


def _uniform(a: Any, b: Any, dtype: torch.dtype) -> Distribution:
    if type(a) is not float or type(b) is not float:
        a, b = _number(a, "a"), _number(b, "b")
    return rng.uniform(a, b, dtype)


def _normal(mean: Any, std: Any) -> Distribution:
    if type(mean) is not float or type(std) is not float:
        mean, std = _number(mean, "mean"), _number(std, "std")
    return rng.normal(mean, std)


def write(tensor: Tensor, distribution: Distribution, seed: int, stream: int) -> Tensor:
    """Sample into a plain tensor, its row-major position being the index; nothing is checked."""
    device = tensor.device.type
    if tensor.is_contiguous() and device in ("cpu", "cuda") and not tensor.is_neg():
        ops.implementation("sample_", device)(tensor, *distribution, seed, stream)
        _written((tensor,))
        return tensor
    values = torch.empty(tensor.shape, dtype=tensor.dtype, device=device if device == "cuda" else "cpu")
    with torch.no_grad():
        return tensor.copy_(write(values, distribution, seed, stream))


def write_shard(
    tensor: Tensor, distribution: Distribution, shape: Sequence[int], start: Sequence[int], seed: int, stream: int
) -> Tensor:
    """Sample the part of a whole of `shape` that begins at `start` into a plain tensor; nothing is checked."""
    if not tensor.is_contiguous():
        values = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
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
        _written((tensor,))
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


def _seed(generator: Generator | None, seed: int | None) -> int:
    if seed is None:
        return rng.draw_seed(generator)
    if generator is not None:
        fail("either generator= or seed=", "both")
    return check_seed(seed)


def _sample(tensor: Tensor, distribution: Distribution, generator: Generator | None, seed: int | None) -> Tensor:
    if not tensor.numel():
        return tensor
    return write(tensor, distribution, _seed(generator, seed), 0)


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
    if not _has_no_values(tensor):
        fail("a plain float32, bfloat16, float16 or float64 tensor", _kind(tensor), kind=InitPerfTypeError)
    return tensor


@not_compiled
def uniform_(
    tensor: Tensor, a: float = 0.0, b: float = 1.0, generator: Generator | None = None, *, seed: int | None = None
) -> Tensor:
    """U[a, b): b is never returned. As torch.nn.init.uniform_; seed= instead of a generator names the values."""
    if not is_plain(tensor):
        return _as_torch(uniform_, tensor, seed, a=a, b=b, generator=generator)
    return _sample(tensor, _uniform(a, b, tensor.dtype), generator, seed)


@not_compiled
def normal_(
    tensor: Tensor, mean: float = 0.0, std: float = 1.0, generator: Generator | None = None, *, seed: int | None = None
) -> Tensor:
    """N(mean, std^2). As torch.nn.init.normal_."""
    if not is_plain(tensor):
        return _as_torch(normal_, tensor, seed, mean=mean, std=std, generator=generator)
    return _sample(tensor, _normal(mean, std), generator, seed)


@not_compiled
def trunc_normal_(
    tensor: Tensor,
    mean: float = 0.0,
    std: float = 1.0,
    a: float = -2.0,
    b: float = 2.0,
    generator: Generator | None = None,
    *,
    seed: int | None = None,
) -> Tensor:
    """N(mean, std^2) given a <= x <= b, exact for any bounds, by the inverse of its distribution function. As torch.nn.init.trunc_normal_."""
    if not is_plain(tensor):
        return _as_torch(trunc_normal_, tensor, seed, mean=mean, std=std, a=a, b=b, generator=generator)
    mean, std, a, b = _number(mean, "mean"), _number(std, "std"), _number(a, "a"), _number(b, "b")
    distribution = rng.trunc_normal(mean, std, a, b, tensor.dtype)
    if mean < a - 2 * std or mean > b + 2 * std:
        warnings.warn(
            "mean is more than 2 std from [a, b] in nn.init.trunc_normal_. "
            "The distribution of values may be incorrect.",
            stacklevel=2,
        )
    return _sample(tensor, distribution, generator, seed)


@not_compiled
def xavier_uniform_(
    tensor: Tensor, gain: float = 1.0, generator: Generator | None = None, *, seed: int | None = None
) -> Tensor:
    """U(-bound, bound), bound = gain sqrt(6 / (fan_in + fan_out)). As torch.nn.init.xavier_uniform_ (Glorot & Bengio 2010)."""
    if not is_plain(tensor):
        return _as_torch(xavier_uniform_, tensor, seed, gain=gain, generator=generator)
    bound = math.sqrt(3.0) * _glorot(tensor, gain)
    return _sample(tensor, _uniform(-bound, bound, tensor.dtype), generator, seed)


@not_compiled
def xavier_normal_(
    tensor: Tensor, gain: float = 1.0, generator: Generator | None = None, *, seed: int | None = None
) -> Tensor:
    """N(0, std^2), std = gain sqrt(2 / (fan_in + fan_out)). As torch.nn.init.xavier_normal_ (Glorot & Bengio 2010)."""
    if not is_plain(tensor):
        return _as_torch(xavier_normal_, tensor, seed, gain=gain, generator=generator)
    return _sample(tensor, _normal(0.0, _glorot(tensor, gain)), generator, seed)


def _glorot(tensor: Tensor, gain: float) -> float:
    fan_in, fan_out = _fan_in_and_fan_out(tensor)
    return gain * math.sqrt(2.0 / float(fan_in + fan_out))


@not_compiled
def kaiming_uniform_(
    tensor: Tensor,
    a: float = 0,
    mode: Any = "fan_in",
    nonlinearity: Any = "leaky_relu",
    generator: Generator | None = None,
    *,
    seed: int | None = None,
) -> Tensor:
    """U(-bound, bound), bound = gain sqrt(3 / fan). As torch.nn.init.kaiming_uniform_ (He et al. 2015)."""
    if not is_plain(tensor):
        return _as_torch(kaiming_uniform_, tensor, seed, a=a, mode=mode, nonlinearity=nonlinearity, generator=generator)
    if 0 in tensor.shape:
        warnings.warn("Initializing zero-element tensors is a no-op", stacklevel=2)
        return tensor
    bound = math.sqrt(3.0) * _he(tensor, a, mode, nonlinearity)
    return _sample(tensor, _uniform(-bound, bound, tensor.dtype), generator, seed)


@not_compiled
def kaiming_normal_(
    tensor: Tensor,
    a: float = 0,
    mode: Any = "fan_in",
    nonlinearity: Any = "leaky_relu",
    generator: Generator | None = None,
    *,
    seed: int | None = None,
) -> Tensor:
    """N(0, std^2), std = gain / sqrt(fan). As torch.nn.init.kaiming_normal_ (He et al. 2015)."""
    if not is_plain(tensor):
        return _as_torch(kaiming_normal_, tensor, seed, a=a, mode=mode, nonlinearity=nonlinearity, generator=generator)
    if 0 in tensor.shape:
        warnings.warn("Initializing zero-element tensors is a no-op", stacklevel=2)
        return tensor
    return _sample(tensor, _normal(0.0, _he(tensor, a, mode, nonlinearity)), generator, seed)


def _he(tensor: Tensor, a: float, mode: Any, nonlinearity: Any) -> float:
    fan = _correct_fan(tensor, mode)
    return _gain(nonlinearity, a) / math.sqrt(fan)


@not_compiled
def orthogonal_(
    tensor: Tensor, gain: float = 1, generator: Generator | None = None, *, seed: int | None = None
) -> Tensor:
    """gain times a random (semi-)orthogonal matrix (Saxe et al. 2013). As torch.nn.init.orthogonal_, with bfloat16 and float16 too.

    Q of the QR decomposition of normals, R's diagonal positive, by Householder reflections of one fixed order at every
    size (kernels/cpu/orthogonal.py), on the CPU whatever the tensor's device. Narrow dtypes are rounded once at the end.
    """
    if isinstance(tensor, Tensor) and tensor.ndimension() < 2:
        fail("a tensor of 2 or more dimensions", f"shape {tuple(tensor.shape)}")
    if not is_plain(tensor):
        return _as_torch(orthogonal_, tensor, seed, gain=gain, generator=generator)
    if not tensor.numel():
        return tensor
    gain = _number(gain, "gain")
    return write_orthogonal(tensor, gain, _seed(generator, seed), 0)


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


@not_compiled
def sparse_(
    tensor: Tensor, sparsity: float, std: float = 0.01, generator: Generator | None = None, *, seed: int | None = None
) -> Tensor:
    """N(0, std^2) with ceil(sparsity * rows) zeros in every column (Martens 2010). As torch.nn.init.sparse_.

    In each column the rows with the least random words of stream 1 are zeroed, a tie going to the lower row.
    """
    if isinstance(tensor, Tensor) and tensor.ndimension() != 2:
        fail("a tensor of 2 dimensions", f"shape {tuple(tensor.shape)}")
    if not is_plain(tensor):
        return _as_torch(sparse_, tensor, seed, sparsity=sparsity, std=std, generator=generator)
    zeros = math.ceil(_number(sparsity, "sparsity") * tensor.size(0))
    distribution = _normal(0.0, std)
    if not tensor.numel():
        return tensor
    seed = _seed(generator, seed)
    write(tensor, distribution, seed, 0)
    with torch.no_grad():
        return tensor.masked_fill_(_first_by_word(tensor, zeros, seed, SELECT_STREAM), 0)


def _first_by_word(like: Tensor, count: int, seed: int, stream: int) -> Tensor:
    """Mask of the `count` least entries of each column in the order (word, row)."""
    words = torch.empty(like.shape, dtype=torch.int32, device=like.device)
    ops.implementation("sample_", like.device.type)(words, rng.BITS, (), seed, stream)
    order = (
        (words ^ -(2**31)).sort(dim=0, stable=True).indices
    )  # the sign bit flipped: signed order is the words' order
    return torch.zeros(like.shape, dtype=torch.bool, device=like.device).scatter_(0, order[:count], True)


def _deprecated(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    new = function.__name__
    old = new[:-1]

    def deprecated_init(*args: Any, **kwargs: Any) -> Tensor:
        warnings.warn(f"`nn.init.{old}` is now deprecated in favor of `nn.init.{new}`.", FutureWarning, stacklevel=2)
        return function(*args, **kwargs)

    deprecated_init.__name__ = deprecated_init.__qualname__ = old
    deprecated_init.__doc__ = f"Deprecated: use {new}."
    return deprecated_init


uniform = _deprecated(uniform_)
normal = _deprecated(normal_)
xavier_uniform = _deprecated(xavier_uniform_)
xavier_normal = _deprecated(xavier_normal_)
kaiming_uniform = _deprecated(kaiming_uniform_)
kaiming_normal = _deprecated(kaiming_normal_)
orthogonal = _deprecated(orthogonal_)
sparse = _deprecated(sparse_)
