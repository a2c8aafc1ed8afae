"""torch.nn.utils' parametrizations of a weight: weight_norm, spectral_norm, orthogonal, old and new. The weight is what is initialized."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from initperf.core.torch_private import OrthogonalStep, SpectralNormStep, WeightNormStep
from initperf.init.redirect import fast_init_by_name

_POWER_STEPS = 15  # as torch takes when it registers spectral_norm


class Split(NamedTuple):
    """A weight held as direction v and length g: full names of both, the layer's path, and the weight's name in the layer."""

    v: str
    g: str
    path: str
    leaf: str


def splits(model: nn.Module) -> Iterator[Split]:
    """Every weight under weight_norm."""
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for leaf, chain in _chains(module):
            if len(chain) == 1 and isinstance(chain[0], WeightNormStep):
                below = f"{prefix}parametrizations.{leaf}.original"
                yield Split(f"{below}1", f"{below}0", path, leaf)
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, WeightNorm):
                yield Split(f"{prefix}{hook.name}_v", f"{prefix}{hook.name}_g", path, hook.name)


def _chains(module: nn.Module) -> list[tuple[str, Any]]:
    return list(module.parametrizations.items()) if parametrize.is_parametrized(module) else []  # type: ignore[union-attr, operator]


def finish(model: nn.Module, written: set[int], seed: int) -> set[int]:
    """Bring what depends on a weight up to date where the weight's parameter (an id in `written`) has new values.

    weight_norm: g = |v|. orthogonal: the matrix that torch makes of these values. spectral_norm: its singular vectors.
    Returns the ids of parameters that no longer hold the values written.
    """
    parameters = dict(model.named_parameters())
    for split in splits(model):
        if id(parameters[split.v]) in written:
            length = _length(model.get_submodule(split.path), split.leaf, parameters[split.v])
            parameters[split.g].copy_(length)
    changed: set[int] = set()
    for path, module in model.named_modules():
        for leaf, chain in _chains(module):
            original = getattr(chain, "original", None)
            if original is None or id(original) not in written:
                continue
            with fast_init_by_name(seed, f"{path}.{leaf}"):
                if isinstance(chain[0], OrthogonalStep) and _assign(module, leaf, original):
                    changed.add(id(original))
                if any(isinstance(step, SpectralNormStep) for step in chain):
                    _iterate(chain)
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, SpectralNorm) and id(getattr(module, f"{hook.name}_orig")) in written:
                for _ in range(_POWER_STEPS):
                    setattr(module, hook.name, hook.compute_weight(module, do_power_iteration=True))
            elif isinstance(hook, WeightNorm):
                hook(module, None)
    return changed


def _length(module: nn.Module, leaf: str, v: torch.Tensor) -> torch.Tensor:
    for name, chain in _chains(module):
        if name == leaf:
            return torch.norm_except_dim(v, 2, chain[0].dim)
    hook = next(h for h in module._forward_pre_hooks.values() if isinstance(h, WeightNorm) and h.name == leaf)
    return torch.norm_except_dim(v, 2, hook.dim)


def _assign(module: nn.Module, leaf: str, original: torch.Tensor) -> bool:
    """layer.weight = the values; False where torch has no inverse, and any values mean an orthogonal matrix."""
    try:
        setattr(module, leaf, original.clone())
    except NotImplementedError:
        return False
    return True


def _iterate(chain: Any) -> None:
    """Power iterations, which the parametrization does when it is evaluated in training mode."""
    modes = [(step, step.training) for step in chain]
    chain.train()
    for _ in range(_POWER_STEPS):
        chain()
    for step, mode in modes:
        step.train(mode)
