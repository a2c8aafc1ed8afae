"""The versions of Triton that are supported: those which the supported versions of torch bring."""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib import metadata

# torch -> the Triton in the metadata of its CUDA wheels on PyPI
BROUGHT = {"2.11": "3.6.0", "2.12": "3.7.1", "2.13": "3.7.1", "2.14": "3.8.0", "2.15": "3.9.0"}


def ordered(versions: Iterable[str]) -> list[str]:
    """Without repetition, the oldest first."""
    return sorted(set(versions), key=lambda version: [int(n) for n in version.split(".")])


TRITONS = ordered(BROUGHT.values())


def of_installed_torch() -> str:
    """What the installed torch pins or, if it pins none (a CPU build), what its CUDA build brings."""
    for requirement in metadata.requires("torch") or []:
        if match := re.match(r"triton[^\d;]*([\d.]+)", requirement):
            return match.group(1)
    return BROUGHT[".".join(metadata.version("torch").split(".")[:2])]


def nearest(version: str, known: Iterable[str]) -> str:
    """The one of `known` that differs in the last number at most."""
    minor = version.split(".")[:2]
    found = [k for k in ordered(known) if k.split(".")[:2] == minor]
    if not found:
        raise ValueError(f"Expected Triton {', '.join(ordered(known))} or a patch of one. Got {version}.")
    return version if version in found else found[-1]
