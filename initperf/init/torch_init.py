"""torch.nn.init's sampling functions by the RNG contract: several times faster, and the same bits everywhere.

What is not a plain float32, bfloat16, float16 or float64 tensor (meta and fake tensors, complex dtypes, tensor
subclasses, tensors inside vmap) goes to torch's own function, with torch's own generator, result and errors.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from initperf import rng
from initperf.core import ops
from initperf.core.checks import InitPerfRuntimeError, InitPerfTypeError, check_seed, fail
from initperf.core.torch_private import correct_fan, fans, not_compiled
from initperf.rng import Distribution
from initperf.rng.sampling import PLAIN_TYPES, has_no_values, is_plain, kind_of, write, write_orthogonal

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

_gain = torch.nn.init.calculate_gain


def _as_torch(function: Callable[..., Tensor], tensor: Any, seed: int | None, **arguments: Any) -> Tensor:
    """What torch does with a tensor that is not plain. A mode (torch.device as a context is one) sees our function and its arguments."""
    if type(tensor) in PLAIN_TYPES and has_torch_function_variadic(tensor):
        return handle_torch_function(function, (tensor,), tensor=tensor, seed=seed, **arguments)
    if seed is not None and not has_no_values(tensor):
        fail("a plain float32, bfloat16, float16 or float64 tensor with seed=", kind_of(tensor), kind=InitPerfTypeError)
    return ORIGINALS[function.__name__](tensor, **arguments)


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
    if (a < -65504.0 or b > 65504.0) and max(-a, b) > torch.finfo(dtype).max:  # the first is float16's, the least
        fail(f"bounds within {dtype}'s range", f"[{a}, {b}]", kind=InitPerfRuntimeError)
    return rng.uniform(a, b, dtype)


def _normal(mean: Any, std: Any) -> Distribution:
    if type(mean) is not float or type(std) is not float:
        mean, std = _number(mean, "mean"), _number(std, "std")
    return rng.normal(mean, std)


def _seed(generator: Generator | None, seed: int | None) -> int:
    if seed is None:
        if generator is not None and not isinstance(generator, Generator):
            fail("generator to be a torch.Generator", type(generator).__name__, kind=InitPerfTypeError)
        return rng.draw_seed(generator)
    if generator is not None:
        fail("either generator= or seed=", "both")
    return check_seed(seed)


def _sample(tensor: Tensor, distribution: Distribution, generator: Generator | None, seed: int | None) -> Tensor:
    if not tensor.numel():
        return tensor
    return write(tensor, distribution, _seed(generator, seed), 0)


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
    fan_in, fan_out = fans(tensor)
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
    fan = correct_fan(tensor, mode)
    return _gain(nonlinearity, a) / math.sqrt(fan)


@not_compiled
def orthogonal_(
    tensor: Tensor, gain: float = 1, generator: Generator | None = None, *, seed: int | None = None
) -> Tensor:
    """gain times a random (semi-)orthogonal matrix (Saxe et al. 2013). As torch.nn.init.orthogonal_, with bfloat16 and float16 too.

    Q of the QR decomposition of normals, R's diagonal positive, by Householder reflections of one fixed order at every
    size (kernels/cpu/sampling/orthogonal.py), on the CPU whatever the tensor's device. Narrow dtypes are rounded once at the end.
    """
    if not is_plain(tensor):
        return _as_torch(orthogonal_, tensor, seed, gain=gain, generator=generator)
    if tensor.dim() < 2:
        fail("a tensor of 2 or more dimensions", f"shape {tuple(tensor.shape)}")
    if not tensor.numel():
        return tensor
    gain = _number(gain, "gain")
    return write_orthogonal(tensor, gain, _seed(generator, seed), 0)


@not_compiled
def sparse_(
    tensor: Tensor, sparsity: float, std: float = 0.01, generator: Generator | None = None, *, seed: int | None = None
) -> Tensor:
    """N(0, std^2) with ceil(sparsity * rows) zeros in every column (Martens 2010). As torch.nn.init.sparse_.

    In each column the rows with the least random words of stream 1 are zeroed, a tie going to the lower row.
    """
    if not is_plain(tensor):
        return _as_torch(sparse_, tensor, seed, sparsity=sparsity, std=std, generator=generator)
    if tensor.dim() != 2:
        fail("a tensor of 2 dimensions", f"shape {tuple(tensor.shape)}")
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
