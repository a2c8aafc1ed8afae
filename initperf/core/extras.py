"""Optional packages: which extra of the installation brings them, and the one error for one that is not there.

Nothing here imports torch, so that the command line can ask.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

EXTRAS = {"cli": ("rich", "typer"), "report": ("matplotlib",), "gpu": ("triton",)}  # as in pyproject.toml


def installation(extra: str) -> str:
    """The command that brings an extra."""
    return f'pip install "initperf[{extra}]"'


def need(extra: str) -> None:
    """Raise InitPerfImportError unless the packages of an extra are installed; none is imported."""
    missing = [name for name in EXTRAS[extra] if find_spec(name) is None]
    if missing:
        from initperf.core.checks import InitPerfImportError, fail

        fail(
            f"{' and '.join(missing)} to be installed: {installation(extra)}",
            "an installation without",
            kind=InitPerfImportError,
        )


@contextmanager
def needed(extra: str) -> Iterator[None]:
    """Around the imports of an extra's packages: `need` first."""
    need(extra)
    yield
