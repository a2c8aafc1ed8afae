"""Files that are whole or absent: written beside their place, synced, then renamed."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from pathlib import Path
from typing import ClassVar

from initperf.core.checks import InitPerfError


def write_atomically(path: str | Path, data: bytes | str) -> Path:
    """Write `data` (text as UTF-8): a reader, or a crash, sees the old file or the new one, never a part."""
    path = Path(path)
    raw = data.encode() if isinstance(data, str) else data
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise InitPerfError(
            f"Expected a folder that can be written for {path}. Got {error.strerror or error}."
        ) from None
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    return path


def make_folder(path: str | Path) -> Path:
    """`path` as a folder that can be written, made if absent; anything else raises InitPerfError."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise InitPerfError(
            f"Expected a folder that can be written at {path}. Got {error.strerror or error}."
        ) from None
    return path


class FileLock:
    """An exclusive lock on a file, released by the system when the process ends, however it ends."""

    held: ClassVar[set[Path]] = set()  # by this process

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle: int | None = None

    def acquire(self, *, wait: bool) -> bool:
        """Take the lock; without `wait`, False if another process, or another lock object of this one, has it."""
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _lock(handle, wait)
        except OSError:
            os.close(handle)
            return False
        self._handle = handle
        self.held.add(self.path)
        return True

    def release(self) -> None:
        if self._handle is not None:
            self.held.discard(self.path)
            os.close(self._handle)
            self._handle = None

    def __enter__(self) -> FileLock:
        self.acquire(wait=True)
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def _lock(handle: int, wait: bool) -> None:
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(handle, msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
