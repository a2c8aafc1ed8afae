"""numba.njit with a disk cache that cannot go stale, and the two rules of calling parallel kernels (threads, forks).

Numba's own index follows one source file; an edit of an intrinsic in another file leaves stale entries. So the cache
folder is keyed by a hash of every file of kernels/cpu and of kernels: ~/.cache/initperf/numba-<hash> (INITPERF_CACHE_DIR overrides).
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import torch
from numba.np.ufunc import parallel

_HERE = Path(__file__).parent
_FILES = sorted([*_HERE.glob("*.py"), *_HERE.parent.glob("*.py")])
_HASH = hashlib.sha256(b"".join(p.read_bytes() for p in _FILES)).hexdigest()[:16]
_ROOT = os.environ.get("INITPERF_CACHE_DIR") or Path(
    os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "initperf"
)
CACHE_DIR = Path(_ROOT, f"numba-{_HASH}")
_CONFIG: Any = numba.config
_PID = os.getpid()
_MAX_THREADS = _CONFIG.NUMBA_NUM_THREADS
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


def jit(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """njit(cache=True, nogil=True, ...) with our cache folder. Only for functions at module level: others never hit the cache."""

    def decorate(function: Callable[..., Any]) -> Any:
        before = _CONFIG.CACHE_DIR
        _CONFIG.CACHE_DIR = str(CACHE_DIR)
        try:
            return numba.njit(cache=True, nogil=True, **options)(function)
        except RuntimeError:  # no writable cache folder: compile in every process
            return numba.njit(nogil=True, **options)(function)
        finally:
            _CONFIG.CACHE_DIR = before

    return decorate


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
