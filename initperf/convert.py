"""Whole models: dense layers into masked ones and back, the proof that masks hold, and optimizers that keep them."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from initperf.checks import (
    FLOATS,
    InitPerfError,
    InitPerfRuntimeError,
    InitPerfTypeError,
    check,
    check_mask,
    fail,
)
from initperf.masked import MaskedLinear
from initperf.masked_layer import LAYERS, MaskedLayer, check_own_weight


class Family(NamedTuple):
    """What a dense layer can become."""

    masked: type[MaskedLayer]


FAMILIES: dict[type[nn.Module], Family] = {nn.Linear: Family(MaskedLinear)}

_masked_optimizers: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()


def masked_layers(model: nn.Module) -> dict[str, MaskedLayer]:
    """Name -> every masked layer of the model, itself included (as "")."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MaskedLayer)}


def sparsify(
    model: nn.Module,
    masks: Mapping[str, Tensor] | None = None,
    density: float | Mapping[str, float] | None = None,
    sparse: bool = False,
) -> nn.Module:
    """Turn the dense layers of `model` (nn.Linear) into masked ones, in place, and return the model.

    masks: {name of a weight, such as "fc1.weight": bool mask}; or density: the fraction of each layer's weights to keep,
    one number for every nn.Linear or {glob of weight names: number}, by magnitude. Masked layers keep their Parameter
    objects. sparse=True, compressed storage, is not in this version and raises. Raises, and changes nothing, for a name
    that is no such weight, a mask of wrong shape or dtype, a weight tied to another parameter, and layers whose
    forward is never called, as in nn.MultiheadAttention.
    """
    check(not sparse, "sparse=False: layers of compressed storage are not in this version", sparse)
    check((masks is None) != (density is None), "either masks or density", "both" if masks is not None else "neither")
    dense = _dense_layers(model)
    if density is not None:
        masks = _by_magnitude(dense, density)
    if not isinstance(masks, Mapping):
        fail("masks to be a dict of weight name -> bool mask", type(masks).__name__, kind=InitPerfTypeError)
    _check(model, dense, masks)
    for name, mask in masks.items():
        layer = dense[name]
        if isinstance(layer, MaskedLayer):
            layer.set_mask(mask)
        else:
            layer.__class__ = FAMILIES[
                type(layer)
            ].masked  # the same module and parameters, so hooks and optimizers stay
            cast(MaskedLayer, layer)._adopt(mask)
    return model


def _dense_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Name of a weight -> its layer, of those with a dense weight that can be masked."""
    kinds: tuple[type[nn.Module], ...] = tuple(FAMILIES)
    modules = model.named_modules(remove_duplicate=False)
    return {_join(name, "weight"): module for name, module in modules if isinstance(module, kinds)}


def _check(model: nn.Module, dense: Mapping[str, nn.Module], masks: Mapping[str, Tensor]) -> None:
    """Raise unless every mask can be put on its layer."""
    inside = _attention_internals(model)
    shared = _tied(model)
    kinds = " and ".join(f"nn.{kind.__name__}" for kind in FAMILIES)
    for name, mask in masks.items():
        if name not in dense:
            fail(f"the names of {kinds} weights ({', '.join(dense) or 'the model has none'})", repr(name))
        layer = dense[name]
        family = next(kind for kind in FAMILIES if isinstance(layer, kind))
        check_own_weight(layer, family, name)
        weight = cast(Tensor, layer.weight)
        check_mask(mask, weight.shape, f"masks[{name!r}]")
        if id(layer) in inside:
            fail(
                "layers whose forward is called",
                f"{name}, whose weight {inside[id(layer)]} reads itself",
                kind=InitPerfRuntimeError,
            )
        if type(layer) not in (family, FAMILIES[family].masked):
            fail(
                f"plain {kinds} layers",
                f"{name}, a {type(layer).__name__} (convert it with {FAMILIES[family].masked.__name__}.on)",
                kind=InitPerfTypeError,
            )
        if len(shared[id(weight)]) > 1:
            names = " = ".join(shared[id(weight)])
            fail("weights of one layer each", f"the tied weights {names} (leave them out)", kind=InitPerfRuntimeError)
        if weight.dtype not in FLOATS:
            fail(f"{name} to be float32, bfloat16, float16 or float64", weight.dtype)


def _by_magnitude(dense: Mapping[str, nn.Module], density: float | Mapping[str, float]) -> dict[str, Tensor]:
    from initperf import prune

    kinds = " or ".join(f"nn.{kind.__name__}" for kind in FAMILIES)
    check(len(dense) > 0, f"a model with {kinds} layers", "none")
    masks: dict[str, Tensor] = {}
    for name, (_, fraction) in prune.fractions_by_name(list(dense), density).items():
        layer: Any = dense[name]
        check_own_weight(layer, next(kind for kind in FAMILIES if isinstance(layer, kind)), name)
        old = layer.weight_mask if isinstance(layer, MaskedLayer) else torch.ones_like(layer.weight, dtype=torch.bool)
        survivors, keep = int(old.count_nonzero()), round(fraction * old.numel())
        if keep > survivors:
            fail(f"a density of at most {survivors / old.numel():.4g} for {name}, as it is already pruned", fraction)
        pruned = (survivors - keep) / survivors if survivors else 0.0
        masks |= prune.magnitude({name: layer.weight}, pruned, masks={name: old})
    return masks


def _attention_internals(model: nn.Module) -> dict[int, str]:
    """id of every module inside an nn.MultiheadAttention -> the name of that attention."""
    return {
        id(part): f"{name or 'the model'} (nn.MultiheadAttention)"
        for name, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention)
        for part in module.modules()
        if part is not module
    }


def _tied(model: nn.Module) -> dict[int, list[str]]:
    """id of every parameter -> the names of the places that hold it (a module shared as a whole counts once)."""
    places: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for own, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append(_join(name, own))
    return places


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def densify(model: nn.Module) -> nn.Module:
    """Turn masked layers back into dense ones, in place, and return the model. Pruned weights are 0 and train again."""
    for layer in masked_layers(model).values():
        layer._forget()
        cast(nn.Module, layer).__class__ = layer.DENSE
    return model


def check_masks(model: nn.Module) -> dict[str, float]:
    """Prove that every pruned weight is exactly 0: {layer: density}, or InitPerfRuntimeError naming the layers that are not."""
    layers = masked_layers(model)
    revived = {}
    for name, layer in layers.items():
        count = int(layer.weight.detach().masked_fill(layer.weight_mask, 0).count_nonzero())
        if count:
            revived[name or "the model"] = count
    if revived:
        counts = ", ".join(f"{count} in {name}" for name, count in revived.items())
        fail("pruned weights to be 0", f"nonzero ones: {counts} (see mask_optimizer_)", kind=InitPerfRuntimeError)
    return {name: layer.density for name, layer in layers.items()}


def mask_optimizer_(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Keep pruned weights at 0 under any optimizer: their state of the weight's shape, and the weights after every step, are masked.

    Needed for optimizers that mix the elements of a matrix (Muon, Shampoo), and for momentum that is older than the mask.
    Follows later changes of the masks. Returns the optimizer.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        fail("a torch.optim.Optimizer", type(optimizer).__name__, kind=InitPerfTypeError)
    if not any(True for _ in _layers_of(optimizer)):
        fail(
            "an optimizer of at least one masked layer's weight", "none (sparsify the model first)", kind=InitPerfError
        )
    _mask_state(optimizer)
    if optimizer not in _masked_optimizers:
        optimizer.register_step_post_hook(lambda opt, args, kwargs: _mask_state(opt))
        _masked_optimizers.add(optimizer)
    return optimizer


def _layers_of(optimizer: torch.optim.Optimizer) -> Iterator[MaskedLayer]:
    parameters = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return (layer for layer in list(LAYERS) if id(layer._parameters.get("weight")) in parameters)


@torch.no_grad()
def _mask_state(optimizer: torch.optim.Optimizer) -> None:
    for layer in _layers_of(optimizer):
        pruned = ~layer.weight_mask
        layer.weight.masked_fill_(pruned, 0)
        for value in optimizer.state.get(layer.weight, {}).values():
            if isinstance(value, Tensor) and value.shape == pruned.shape:
                value.masked_fill_(pruned.to(value.device), 0)
