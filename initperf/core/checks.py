"""Argument checks and the one exception family. Every check runs before anything is touched; messages read "Expected ... Got ..."."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class InitPerfError(ValueError):
    """A wrong argument, file or model. Derives from ValueError so that code catching torch.nn.init's errors still works."""


class InitPerfRuntimeError(InitPerfError, RuntimeError):
    """The same where torch raises RuntimeError."""


class InitPerfTypeError(InitPerfError, TypeError):
    """The same where torch raises TypeError."""


class InitPerfImportError(InitPerfError, ImportError):
    """The same where a package is not installed (initperf/core/extras.py)."""


def fail(expected: str, got: object, *, kind: type[InitPerfError] = InitPerfError) -> NoReturn:
    """Raise "Expected {expected}. Got {got}."."""
    raise kind(f"Expected {expected}. Got {got}.")


def check(condition: bool, expected: str, got: object, *, kind: type[InitPerfError] = InitPerfError) -> None:
    """Raise unless `condition`. For hot paths write `if not ...: fail(...)`, so that messages are not formatted for nothing."""
    if not condition:
        fail(expected, got, kind=kind)


def check_float_tensor(tensor: object, name: str = "tensor") -> None:
    """A torch.Tensor of float32, bfloat16, float16 or float64."""
    if not isinstance(tensor, torch.Tensor):
        fail(f"{name} to be a torch.Tensor", type(tensor).__name__, kind=InitPerfTypeError)
    if tensor.dtype not in FLOATS:
        fail(f"{name} to be float32, bfloat16, float16 or float64", tensor.dtype, kind=InitPerfRuntimeError)


def check_mapping(value: object, name: str, entries: str) -> None:
    """None, or a dict."""
    if value is not None and not isinstance(value, Mapping):
        fail(f"{name} as a dict, {entries}", type(value).__name__, kind=InitPerfTypeError)


def check_mask(mask: object, shape: tuple[int, ...] | torch.Size, name: str = "mask") -> None:
    """A bool tensor of exactly `shape`."""
    if not isinstance(mask, torch.Tensor):
        fail(f"{name} to be a torch.Tensor of dtype bool", type(mask).__name__, kind=InitPerfTypeError)
    if mask.dtype != torch.bool:
        fail(f"{name} to have dtype bool (True = survives)", mask.dtype)
    if tuple(mask.shape) != tuple(shape):
        fail(f"{name} to have shape {tuple(shape)}", tuple(mask.shape))


def check_mask_has_data(mask: torch.Tensor, weight: torch.Tensor, name: str = "mask") -> None:
    """Not on the meta device, unless the weight is."""
    if mask.is_meta and not weight.is_meta:
        fail(f"{name} with data", "one on the meta device")


def check_seed(seed: object, name: str = "seed") -> int:
    """An int in [0, 2**64)."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        fail(f"{name} to be an int", type(seed).__name__, kind=InitPerfTypeError)
    if not 0 <= seed < 2**64:
        fail(f"{name} to be at least 0 and below 2**64", seed)
    return seed
