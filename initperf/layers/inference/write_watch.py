"""Was memory written? Asked of the kernel, which protects its pages and lets the first write to each through.

Version counters miss what goes through `.data`, NumPy or another language. Linux 6.7 and later tell of every write by this
process, for 13 us a question about 64 MB: userfaultfd with UFFD_FEATURE_WP_ASYNC, and the ioctl PAGEMAP_SCAN
(Documentation/admin-guide/mm/userfaultfd.rst and pagemap.rst). Elsewhere, and where containers forbid it, nothing is
watched. INITPERF_WATCH=0 turns it off.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import platform
import struct
import sys
import threading
import weakref
from functools import cache
from typing import NamedTuple

from initperf.core.checks import check

_SYSCALLS = {"x86_64": 323, "aarch64": 282}  # userfaultfd
_O_CLOEXEC, _USER_MODE_ONLY = 0o2000000, 1
_WP_UNPOPULATED, _WP_ASYNC = 1 << 13, 1 << 15
_UFFD_API, _MODE_WP = 0xAA, 2
_WRITTEN, _CHECK = 2, 2  # PAGE_IS_WRITTEN; PM_SCAN_CHECK_WPASYNC: an error if the memory is no longer watched
_PAGE = mmap.PAGESIZE
_WRITES, _READS = 3 << 30, 2 << 30  # directions of an ioctl that copies both ways, and out only


def _ioctl_number(direction: int, kind: int, number: int, size: int) -> int:
    return direction | size << 16 | kind << 8 | number


_API = _ioctl_number(_WRITES, _UFFD_API, 0x3F, 24)
_REGISTER = _ioctl_number(_WRITES, _UFFD_API, 0x00, 32)
_UNREGISTER = _ioctl_number(_READS, _UFFD_API, 0x01, 16)
_PROTECT = _ioctl_number(_WRITES, _UFFD_API, 0x06, 24)
_SCAN = _ioctl_number(_WRITES, ord("f"), 16, 96)


class _Kernel(NamedTuple):
    uffd: int  # file descriptors
    pagemap: int
    pid: int  # of the process they speak of: a forked child inherits them


@cache
def _kernel() -> _Kernel | str:
    """Opened once a process; or why there is none."""
    setting = os.environ.get("INITPERF_WATCH") or "1"
    check(setting in ("0", "1"), "INITPERF_WATCH to be 0 or 1", setting)
    if setting == "0":
        return "turned off by INITPERF_WATCH=0"
    number = _SYSCALLS.get(platform.machine())
    if not sys.platform.startswith("linux") or number is None:
        return "only Linux on x86-64 and ARM64 tells"
    import fcntl

    libc = ctypes.CDLL(None, use_errno=True)
    uffd = libc.syscall(number, _O_CLOEXEC | _USER_MODE_ONLY)
    if uffd < 0:
        return f"userfaultfd is not allowed here: {os.strerror(ctypes.get_errno())}"
    try:
        fcntl.ioctl(uffd, _API, bytearray(struct.pack("3Q", _UFFD_API, _WP_UNPOPULATED | _WP_ASYNC, 0)))
        pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as problem:
        os.close(uffd)
        return f"Linux 6.7 or later is needed: {problem.strerror}"
    return _Kernel(uffd, pagemap, os.getpid())


os.register_at_fork(after_in_child=_kernel.cache_clear) if hasattr(os, "register_at_fork") else None


def why_not() -> str:
    """Why nothing can be watched in this process; empty if it can."""
    found = _kernel()
    return found if isinstance(found, str) else ""


class WriteWatch:
    """Watches private memory of this process: `generation()` changes whenever any of it may have been written since the last call.

    OSError where that cannot be told, as for memory shared with other processes. Pages that are in the memory only in part
    are compared instead.
    """

    def __init__(self, address: int, size: int) -> None:
        kernel = _kernel()
        if isinstance(kernel, str):
            raise OSError(kernel)
        self._kernel, self._gone = kernel, False
        self._first, self._last = -(-address // _PAGE) * _PAGE, (address + size) // _PAGE * _PAGE
        if self._last <= self._first:
            raise OSError("less than a page")
        self._ends = ((address, self._first - address), (self._last, address + size - self._last))
        self.memory = address, size
        self._generation = 0
        self._bytes: tuple[bytes, ...] = ()
        self._region = ctypes.create_string_buffer(24)  # PAGEMAP_SCAN tells where; nobody asks
        where = self._first, self._last, 0, ctypes.addressof(self._region), 1, 1, 0, _WRITTEN, 0, _WRITTEN
        self._question = struct.pack("12Q", 96, _CHECK, *where)
        self._lock = threading.Lock()
        _check_private(self._first, self._last)
        self._ask(_REGISTER, "4Q", self._first, self._last - self._first, _MODE_WP, 0)
        self._release = weakref.finalize(self, _unregister, self._kernel, self._first, self._last)
        self._release.atexit = False
        self._protect()

    def _ask(self, number: int, layout: str, *values: int) -> int:
        import fcntl

        return fcntl.ioctl(self._kernel.uffd, number, bytearray(struct.pack(layout, *values)))

    def _protect(self) -> None:
        self._bytes = self._now()
        self._ask(_PROTECT, "3Q", self._first, self._last - self._first, 1)

    def _now(self) -> tuple[bytes, ...]:
        return tuple(ctypes.string_at(*end) for end in self._ends)

    def _written_pages(self) -> int:
        """1 if any page was written, else 0; OSError if what is mapped there is not watched."""
        import fcntl

        return fcntl.ioctl(self._kernel.pagemap, _SCAN, bytearray(self._question))

    def _is_written(self) -> bool:
        return self._written_pages() > 0 or self._now() != self._bytes

    def generation(self) -> int:
        """How often the memory was found written. -1, from then on: it is no longer watched (a forked child, memory that was given back)."""
        if self._gone or os.getpid() != self._kernel.pid:
            return -1
        try:
            if self._is_written():
                with self._lock:
                    if self._is_written():
                        self._generation += 1  # before the pages are protected, and another thread finds nothing
                        self._protect()
        except OSError:
            self.leave()
        return -1 if self._gone else self._generation

    def leave(self) -> None:
        """Tell nothing any more, and leave the memory as it is: another may be watching there."""
        self._gone = True
        self._release.detach()

    def close(self) -> None:
        """Lift the protection: the first writes cost nothing more."""
        self._gone = True
        self._release()

    def is_there(self) -> bool:
        """Whether it still watches; asked without reading memory that may have been given back."""
        try:
            return not self._gone and self._written_pages() >= 0
        except OSError:
            return False

    def overlaps(self, address: int, size: int) -> bool:
        """Whether any page of the memory is watched here."""
        return self._first < address + size and address < self._last


def _unregister(kernel: _Kernel, first: int, last: int) -> None:
    import fcntl

    if os.getpid() != kernel.pid:
        return
    with contextlib.suppress(OSError):  # given back meanwhile
        fcntl.ioctl(kernel.uffd, _UNREGISTER, bytearray(struct.pack("2Q", first, last - first)))


def _check_private(first: int, last: int) -> None:
    """No other process, and no file, is behind the memory."""
    with open("/proc/self/maps") as lines:
        for line in lines:
            where, mode, _, _, inode, *_ = line.split()
            low, high = (int(part, 16) for part in where.split("-"))
            if low < last and first < high and (mode[3] != "p" or inode != "0"):
                raise OSError("shared memory, or a file's")


_watches: weakref.WeakSet[WriteWatch] = weakref.WeakSet()
_lock = threading.Lock()


def watch(address: int, size: int) -> WriteWatch | None:
    """The watch of this memory, shared by all who ask; None if it cannot be watched, or if a part of it is watched already.

    One watch's protection would hide writes from another: of those that overlap only one ever tells anything.
    """
    if why_not():
        return None
    with _lock:
        for other in list(_watches):
            if not other.overlaps(address, size):
                continue
            if other.memory == (address, size) and other.generation() >= 0:
                return other
            if other.is_there():
                return None
            other.leave()
            _watches.discard(other)
        try:
            made = WriteWatch(address, size)
        except OSError:
            return None
        _watches.add(made)
        return made


def _forget() -> None:
    global _lock
    _lock = threading.Lock()
    for other in list(_watches):
        other.leave()
    _watches.clear()


os.register_at_fork(after_in_child=_forget) if hasattr(os, "register_at_fork") else None
