"""numba.njit with a disk cache that cannot go stale, and the two rules of calling parallel kernels (threads, forks).

Numba's own index follows one source file; an edit of an intrinsic in another file leaves stale entries. So the cache
folder is keyed by a hash of every file below kernels/cpu and of kernels: ~/.cache/initperf/numba-<hash> (INITPERF_CACHE_DIR overrides).
Its entries are keyed by the processor that they were compiled for, and its instructions, so machines may share a home.

Processes that start together need the same kernels at the same time: one compiles, the others wait and load. Nor may two
of them save at once: Numba gives the kernels that two processes add to an index the same file.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numba
import torch
from numba.core.compiler_lock import global_compiler_lock
from numba.np.ufunc import parallel

from ... import contract

try:
    import fcntl
except ImportError:  # Windows: as Numba does it alone
    fcntl = None  # type: ignore[assignment]

_KERNELS = Path(contract.__file__).parent
_FILES = sorted([*_KERNELS.glob("*.py"), *(_KERNELS / "cpu").rglob("*.py")])
_HASH = hashlib.sha256(b"".join(p.read_bytes() for p in _FILES)).hexdigest()[:16]
_ROOT = os.environ.get("INITPERF_CACHE_DIR") or Path(
    os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "initperf"
)
CACHE_DIR = Path(_ROOT, f"numba-{_HASH}")
_CONFIG: Any = numba.config
_PID = os.getpid()
_MAX_THREADS = _CONFIG.NUMBA_NUM_THREADS
_PATIENCE, _PAUSE = 300, 0.01  # seconds to wait for another process, and between two looks
_told = threading.local()  # Numba keeps its number by thread


def _start_threading() -> None:
    """Let Numba's threading layer start now, and give torch its number of threads back.

    The layer sets OpenMP's number for the whole process, and does so when the first parallel kernel is loaded: whatever
    torch.set_num_threads had asked for was gone from then on, and with it the bits of oneDNN's convolutions.
    """
    before = torch.get_num_threads()
    try:
        parallel._launch_threads()
    except (ImportError, ValueError):  # no layer can be loaded: parallel kernels will say so
        return
    if torch.get_num_threads() != before:
        torch.set_num_threads(before)


_start_threading()


@cache
def _locks() -> int:
    """A file that has a byte to lock for everything one process may do. It stays open: to close it lets go of all of them."""
    CACHE_DIR.mkdir(parents=True, exist_ok=True)
    return os.open(CACHE_DIR / "locks", os.O_RDWR | os.O_CREAT, 0o666)


@contextmanager
def _alone(*what: object) -> Iterator[None]:
    """Within the block no other process is within one for the same thing, if the system and the cache folder have locks."""
    place = int.from_bytes(hashlib.sha256(repr(what).encode()).digest()[:4], "little")
    locked, end = False, time.monotonic() + _PATIENCE
    while fcntl is not None and not locked and time.monotonic() < end:
        try:
            fcntl.lockf(_locks(), fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
            locked = True
        except BlockingIOError:
            time.sleep(_PAUSE)
        except OSError:  # no such folder, or no locks there
            break
    try:
        yield
    finally:
        if locked:
            fcntl.lockf(_locks(), fcntl.LOCK_UN, 1, place)


def _one_at_a_time(kernel: Any) -> Any:
    """A cached kernel whose variants are compiled by one process each, and saved one after another."""
    name = f"{kernel.py_func.__module__}.{kernel.py_func.__qualname__}"
    compile_here, save_here = kernel.compile, kernel._cache.save_overload

    def compile(signature: Any) -> Any:
        with global_compiler_lock, _alone(name, str(signature)):  # in this order, lest two threads wait for each other
            return compile_here(signature)

    def save(signature: Any, data: Any) -> None:
        with _alone(name):
            save_here(signature, data)

    kernel.compile, kernel._cache.save_overload = compile, save
    return kernel


def jit(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """njit(cache=True, nogil=True, ...) with our cache folder. Only for functions at module level: others never hit the cache."""

    def decorate(function: Callable[..., Any]) -> Any:
        before = _CONFIG.CACHE_DIR
        _CONFIG.CACHE_DIR = str(CACHE_DIR)
        try:
            return _one_at_a_time(numba.njit(cache=True, nogil=True, **options)(function))
        except RuntimeError:  # no writable cache folder: compile in every process
            return numba.njit(nogil=True, **options)(function)
        finally:
            _CONFIG.CACHE_DIR = before

    return decorate


class with_address:
    """Like numba.cfunc(signature), cached where jit caches, and compiled when its `address` is first asked for."""

    def __init__(self, signature: Any, **options: Any) -> None:
        self._signature, self._options = signature, options

    def __call__(self, function: Callable[..., Any]) -> with_address:
        self._function = function
        return self

    @cached_property
    def address(self) -> int:
        before, _CONFIG.CACHE_DIR = _CONFIG.CACHE_DIR, str(CACHE_DIR)
        try:
            with global_compiler_lock, _alone(self._function.__module__, self._function.__qualname__):
                self._compiled = numba.cfunc(self._signature, cache=True, **self._options)(self._function)
        except RuntimeError:  # no writable cache folder
            self._compiled = numba.cfunc(self._signature, **self._options)(self._function)
        finally:
            _CONFIG.CACHE_DIR = before
        found: Any = self._compiled.address
        return int(found)


def is_forked() -> bool:
    """Whether this is a forked child, where OpenMP's layer would abort or hang."""
    return os.getpid() != _PID


def threads() -> int:
    """Threads for a parallel kernel: torch's number, at most the cores; 1 in a forked child, where the OpenMP layer would abort."""
    if is_forked():
        return 1
    count = min(torch.get_num_threads(), _MAX_THREADS)
    if count > 1 and getattr(_told, "count", 1) != count:  # telling Numba again would take a microsecond of every call
        numba.set_num_threads(count)
        _told.count = count
    return count
