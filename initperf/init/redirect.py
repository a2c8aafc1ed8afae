"""fast_init: code that one cannot edit (constructors, from_config, timm) samples by the RNG contract inside a block.

Python has one torch.nn.init for all threads. So while any thread is in a block its functions are replaced by others
that ask which thread calls them: other threads, and code that kept a replaced function, get torch's own.
"""

from __future__ import annotations

import functools
import hashlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from initperf import rng
from initperf.core.checks import InitPerfError, check_seed
from initperf.core.torch_private import DeviceContext, DisableTorchFunction, function_mode_stack, init_worker
from initperf.init import torch_init
from initperf.rng.sampling import is_plain, written

_THREAD = threading.local()
_LOCK = threading.Lock()
_WEYL = 0x9E3779B97F4A7C15  # odd, so the seeds of 2**64 calls differ
_open_blocks = 0  # of all threads


class _Block:
    """An open block of one thread. With a seed, call k has the seed `seed + k * _WEYL`."""

    def __init__(self, seed: int | None) -> None:
        self._seed = seed

    def next_seed(self) -> int | None:
        seed = self._seed
        if seed is not None:
            self._seed = (seed + _WEYL) % 2**64
        return seed


@contextmanager
def fast_init(seed: int | None = None) -> Iterator[None]:
    """Inside the block, and in this thread only, torch.nn.init and Tensor.normal_ and uniform_ sample as initperf.init does.

    Without a seed each call draws one from torch's default generator, so that torch.manual_seed makes it reproducible;
    with a seed the block is reproducible by itself. What initperf.init cannot do goes to torch's own functions. Blocks nest.
    """
    global _open_blocks
    if seed is not None:
        check_seed(seed)
    outer = getattr(_THREAD, "block", None)
    with _LOCK:
        if not _open_blocks:
            _replace()
        _open_blocks += 1
    _THREAD.block = _Block(seed)
    try:
        yield
    finally:
        _THREAD.block = outer
        with _LOCK:
            _open_blocks -= 1
            if not _open_blocks:
                _restore()


@contextmanager
def fast_init_by_name(seed: int, name: str) -> Iterator[None]:
    """fast_init seeded by a seed and a module's name; torch's default CPU generator too, for what is not redirected, and put back after."""
    digest = hashlib.sha256(f"{seed}:{rng.canonical_name(name)}".encode()).digest()
    named = int.from_bytes(digest[:8], "little")
    with DisableTorchFunction():  # torch.device as a context must not move the generator's state
        state = torch.default_generator.get_state()
        torch.default_generator.manual_seed(named)
    try:
        with fast_init(seed=named):
            yield
    finally:
        torch.default_generator.set_state(state)


def _on_default_device(tensor: Any) -> bool:
    """Whether nothing but `torch.device` as a context, or torch.set_default_device, keeps a tensor from being plain."""
    modes = function_mode_stack()
    if not modes or not all(isinstance(mode, DeviceContext) for mode in modes):
        return False
    with DisableTorchFunction():
        return is_plain(tensor)


def _try(ours: Callable[..., Tensor], block: _Block, tensor: Any, *args: Any, generator: Any, **kwargs: Any) -> bool:
    """Sample by `ours`, unless it refuses, which it does before anything is touched."""
    try:
        if is_plain(tensor):
            ours(tensor, *args, generator=generator, seed=None if generator else block.next_seed(), **kwargs)
            return True
        if _on_default_device(tensor):
            with DisableTorchFunction():
                return _try(ours, block, tensor, *args, generator=generator, **kwargs)
    except (InitPerfError, TypeError):
        pass
    return False


def _function(original: Callable[..., Tensor], ours: Callable[..., Tensor], position: int) -> Callable[..., Tensor]:
    """A function of torch.nn.init; its generator is argument number `position`."""

    @functools.wraps(original)
    def replaced(*args: Any, **kwargs: Any) -> Tensor:
        block = getattr(_THREAD, "block", None)
        if block is not None:
            rest = dict(kwargs)
            tensor = args[0] if args else rest.pop("tensor", None)
            generator = args[position] if len(args) > position else rest.pop("generator", None)
            if _try(ours, block, tensor, *args[1:position], generator=generator, **rest):
                return tensor
            if isinstance(tensor, Tensor) and tensor.is_meta:  # torch's own may leave these as they are
                written((tensor,))
        return original(*args, **kwargs)

    return replaced


def _method(original: Any, ours: Callable[..., Tensor], first: str, second: str) -> Callable[..., Tensor]:
    """Tensor.normal_ or Tensor.uniform_, with the names of its two numbers."""

    @functools.wraps(original)
    def replaced(self: Tensor, *args: Any, generator: Any = None, **kwargs: Any) -> Tensor:
        block = getattr(_THREAD, "block", None)
        if block is not None and not (self.requires_grad and torch.is_grad_enabled()) and len(args) <= 2:
            numbers = dict(zip((first, second), args, strict=False)) | kwargs
            low, high = numbers.pop(first, 0.0), numbers.pop(second, 1.0)
            if not numbers and _try(ours, block, self, low, high, generator=generator):
                return self
        return original(self, *args, generator=generator, **kwargs)

    return replaced


_INIT: Any = torch.nn.init
_GENERATOR = {"uniform_": 3, "normal_": 3, "trunc_normal_": 5, "xavier_uniform_": 2, "xavier_normal_": 2}
_GENERATOR |= {"kaiming_uniform_": 4, "kaiming_normal_": 4, "orthogonal_": 2, "sparse_": 3}
_FUNCTIONS = {name: (torch_init.ORIGINALS[name], getattr(torch_init, name), at) for name, at in _GENERATOR.items()}
# what torch's own functions call: who kept `from torch.nn.init import trunc_normal_` comes by here
_FUNCTIONS |= {
    init_worker(name): (getattr(_INIT, init_worker(name)), getattr(torch_init, name), _GENERATOR[name])
    for name in ("uniform_", "normal_", "trunc_normal_")
}
_REPLACED = {name: _function(*entry) for name, entry in _FUNCTIONS.items()}
_METHODS = {
    "normal_": _method(Tensor.normal_, torch_init.normal_, "mean", "std"),
    "uniform_": _method(Tensor.uniform_, torch_init.uniform_, "from", "to"),
}


def _replace() -> None:
    for name, function in _REPLACED.items():
        setattr(_INIT, name, function)
    for name, function in _METHODS.items():
        setattr(Tensor, name, function)


def _restore() -> None:
    """What someone else replaced in the meantime stays."""
    for name, function in _REPLACED.items():
        if getattr(_INIT, name) is function:
            setattr(_INIT, name, _FUNCTIONS[name][0])
    for name, function in _METHODS.items():
        if Tensor.__dict__.get(name) is function:
            delattr(Tensor, name)  # torch's own is inherited
