"""Runs Python where Triton compiles instead of interpreting, once for all workers of pytest-xdist."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def compiled(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A Python process without the interpreter, with this Triton, from the root of the project."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": path}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


def once(factory: pytest.TempPathFactory, name: str, *arguments: str) -> Any:
    """The JSON that `compiled` writes to the file named by its last argument, made by the first worker that asks."""
    folder = factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    path = folder / f"{name}.json"
    with open(folder / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            done = compiled(*arguments, str(path))
            assert path.exists(), done.stderr[-2000:]
    return json.loads(path.read_text())
