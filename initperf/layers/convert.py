"""Whole models: dense layers into masked or compressed ones and back, and the proof that masks hold."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from initperf.core.bits import pack_bits
from initperf.core.checks import (
    FLOATS,
    InitPerfRuntimeError,
    InitPerfTypeError,
    check,
    check_mask,
    check_mask_has_data,
    fail,
)
from initperf.layers.base.masked import MaskedLayer, check_own_weight
from initperf.layers.base.sparse import SparseLayer
from initperf.layers.conv import MaskedConv2d, SparseConv2d
from initperf.layers.linear import MaskedLinear, SparseLinear
from initperf.layers.optimizers import check_optimizer, mask_optimizer_
from initperf.layers.sequential import fuse


class Family(NamedTuple):
    """What a dense layer can become."""

    masked: type[MaskedLayer]
    sparse: type[SparseLayer]


FAMILIES: dict[type[nn.Module], Family] = {
    nn.Linear: Family(MaskedLinear, SparseLinear),
    nn.Conv2d: Family(MaskedConv2d, SparseConv2d),
}


def sparse_layers(model: nn.Module) -> dict[str, SparseLayer]:
    """Name -> every compressed layer of the model, itself included (as "")."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseLayer)}


def masked_layers(model: nn.Module) -> dict[str, MaskedLayer]:
    """Name -> every masked layer of the model, itself included (as "")."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MaskedLayer)}


def sparsify(
    model: nn.Module,
    masks: Mapping[str, Tensor] | None = None,
    density: float | Mapping[str, float] | None = None,
    sparse: bool | None = None,
    *,
    optimizer: torch.optim.Optimizer | None = None,
) -> nn.Module:
    """Turn dense layers of `model` (nn.Linear, nn.Conv2d) into masked or compressed ones, in place, and return the model.

    masks: {name of a weight, such as "fc1.weight": bool mask}; or density: the fraction of each layer's weights to keep,
    one number for all or {glob of weight names: number}, by magnitude.
    sparse: True makes compressed layers (SparseLinear, SparseConv2d), False masked ones, of masked and compressed ones too;
    None leaves those as they are stored, and makes dense ones masked.
    An nn.Sequential that holds compressed linear layers becomes a SparseSequential, whose small layers run as one call.
    Parameters stay the same objects, so an optimizer without state keeps working; `optimizer`, or mask_optimizer_ afterwards,
    brings one with state along (without, its next step raises where a layer was compressed).
    Raises, and changes nothing, for a name that is no such weight, a mask of wrong shape or dtype, a weight tied to another
    parameter, and layers whose forward is never called, as in nn.MultiheadAttention. Conv1D layers of transformers' GPT-2,
    whose weight is (inputs, outputs), stay dense. Compressed layers have no `weight`: leave out layers whose model reads it
    (transformers' ViT asks its patch embedding for `projection.weight.dtype`), and densify before save_pretrained.
    """
    check((masks is None) != (density is None), "either masks or density", "both" if masks is not None else "neither")
    layers = layers_by_weight(model)
    if density is not None:
        masks = _by_magnitude(model, layers, density)
    if not isinstance(masks, Mapping):
        fail("masks to be a dict of weight name -> bool mask", type(masks).__name__, kind=InitPerfTypeError)
    masks = {name if name in layers else name.removesuffix("_values"): mask for name, mask in masks.items()}
    _check(model, layers, masks, sparse)
    if optimizer is not None:
        chosen = {id(_weight(layers[name])) for name in masks}
        check_optimizer(optimizer, chosen, sparse=any(_compressed(layers[name], sparse) for name in masks))
    for name, mask in masks.items():
        _convert(layers[name], mask, _compressed(layers[name], sparse))
    _fuse(model)
    if optimizer is not None:
        mask_optimizer_(optimizer)
    return model


def _fuse(model: nn.Module) -> None:
    for module in list(model.modules()):
        fuse(module)


def _compressed(layer: nn.Module, sparse: bool | None) -> bool:
    """Whether sparsify stores the layer compressed."""
    return isinstance(layer, SparseLayer) if sparse is None else sparse


def _convert(layer: nn.Module, mask: Tensor, sparse: bool) -> None:
    """Put a checked mask on a layer, in place: the same module and parameters, so hooks and optimizers stay."""
    family = _family(layer)
    if sparse and isinstance(layer, SparseLayer) or not sparse and isinstance(layer, MaskedLayer):
        layer.set_mask(mask)
    elif sparse:
        weight = cast(nn.Parameter, layer.weight)
        if isinstance(layer, MaskedLayer):
            layer._forget()
        layer.__class__ = FAMILIES[family].sparse
        cast(SparseLayer, layer)._become(weight, mask)
    else:
        if isinstance(layer, SparseLayer):
            layer._leave()
        layer.__class__ = FAMILIES[family].masked
        cast(MaskedLayer, layer)._adopt(mask)


def _family(layer: nn.Module) -> type[nn.Module]:
    """The dense class of a dense, masked or compressed layer."""
    if isinstance(layer, SparseLayer):
        return layer.DENSE
    return next(kind for kind in FAMILIES if isinstance(layer, kind))


def _weight(layer: nn.Module) -> Tensor:
    return cast(Tensor, layer.weight_values if isinstance(layer, SparseLayer) else layer.weight)


def layers_by_weight(model: nn.Module) -> dict[str, nn.Module]:
    """Name of a weight -> its layer, of those that are or can be masked; compressed ones by the name of their dense weight."""
    kinds: tuple[type[nn.Module], ...] = (*FAMILIES, SparseLayer)
    modules = model.named_modules(remove_duplicate=False)
    return {_join(name, "weight"): module for name, module in modules if isinstance(module, kinds)}


def _check(model: nn.Module, layers: Mapping[str, nn.Module], masks: Mapping[str, Tensor], sparse: bool | None) -> None:
    """Raise unless every mask can be put on its layer."""
    inside = _read_by_others(model)
    shared = _tied(model)
    for name, mask in masks.items():
        if name not in layers:
            fail(f"the names of {_kinds()} weights ({_some(layers) or 'the model has none'})", _what_is(model, name))
        layer = layers[name]
        family = _family(layer)
        weight = _weight(layer)
        if not isinstance(layer, SparseLayer):
            check_own_weight(layer, family, name)
        check_mask(mask, layer.weight_shape if isinstance(layer, SparseLayer) else weight.shape, f"masks[{name!r}]")
        check_mask_has_data(mask, weight, f"masks[{name!r}]")
        reader, masked_too = inside.get(id(layer), ("", False))
        if reader and (masked_too or _compressed(layer, sparse)):
            fail(
                "layers whose forward is called",
                f"{name}, whose weight {reader} reads itself",
                kind=InitPerfRuntimeError,
            )
        if type(layer) not in (family, *FAMILIES[family]):
            fail(
                f"plain {_kinds()} layers",
                f"{name}, a {type(layer).__name__} (convert it with {FAMILIES[family].masked.__name__}.on)",
                kind=InitPerfTypeError,
            )
        if len(shared[id(weight)]) > 1:
            names = " = ".join(shared[id(weight)])
            fail(
                "weights of one layer each",
                f"the tied weights {names} (leave them out: name the others in masks=, or by globs in density=)",
                kind=InitPerfRuntimeError,
            )
        if weight.dtype not in FLOATS:
            fail(f"{name} to be float32, bfloat16, float16 or float64", weight.dtype)


def _kinds() -> str:
    return " or ".join(f"nn.{kind.__name__}" for kind in FAMILIES)


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")


def _what_is(model: nn.Module, name: str) -> str:
    """A name that cannot be masked, and of which class its layer is."""
    for path, module in model.named_modules():
        if any(_join(path, own) == name for own in module._parameters):
            return f"{name!r}, of a {type(module).__name__}"
    return repr(name)


def _by_magnitude(
    model: nn.Module, layers: Mapping[str, nn.Module], density: float | Mapping[str, float]
) -> dict[str, Tensor]:
    from initperf import prune

    others = sorted({type(m).__name__ for m in model.modules() if "weight" in m._parameters})
    check(
        len(layers) > 0, f"a model with {_kinds()} layers", f"one with layers {', '.join(others) or 'without weights'}"
    )
    masks: dict[str, Tensor] = {}
    for name, (_, fraction) in prune.fractions_by_name(list(layers), density).items():
        layer: Any = layers[name]
        if isinstance(layer, SparseLayer):
            weight, old = layer.expand(layer.weight_values.detach()), layer.weight_mask
        else:
            check_own_weight(layer, _family(layer), name)
            weight = layer.weight
            old = layer.weight_mask if isinstance(layer, MaskedLayer) else torch.ones_like(weight, dtype=torch.bool)
        check(not weight.is_meta, f"{name} with data (or give masks)", "one on the meta device")
        survivors, keep = int(old.count_nonzero()), round(fraction * old.numel())
        if keep > survivors:
            fail(f"a density of at most {survivors / old.numel():.4g} for {name}, as it is already pruned", fraction)
        pruned = (survivors - keep) / survivors if survivors else 0.0
        masks |= prune.magnitude({name: weight}, pruned, masks={name: old})
    return masks


def _read_by_others(model: nn.Module) -> dict[int, tuple[str, bool]]:
    """id of every module whose weight another module reads -> that module, and whether it never calls the layer's forward."""
    found: dict[int, tuple[str, bool]] = {}
    for name, module in model.named_modules():
        where = f"{name or 'the model'} (nn.{type(module).__name__})"
        if isinstance(module, nn.TransformerEncoderLayer):  # in evaluation it hands the weights to one fused op
            for part in (module.linear1, module.linear2):
                found.setdefault(id(part), (where, False))
        if isinstance(module, nn.MultiheadAttention):
            found |= {id(part): (f"{name or 'the model'} (nn.MultiheadAttention)", True) for part in module.modules()}
            found.pop(id(module))
    return found


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


def densify(model: nn.Module, *, optimizer: torch.optim.Optimizer | None = None) -> nn.Module:
    """Turn masked and compressed layers back into dense ones, in place, and return the model. Pruned weights are 0 and train again.

    Parameters stay the same objects. Compressed layers: the state of `optimizer`, and of those that mask_optimizer_ was given,
    gets zeros for the pruned weights.
    """
    if optimizer is not None:
        mask_optimizer_(optimizer)
    for layer in list(model.modules()):
        kind = layer.DENSE if isinstance(layer, (MaskedLayer, SparseLayer)) else None
        if isinstance(layer, SparseLayer):
            layer._leave()
        elif isinstance(layer, MaskedLayer):
            layer._forget()
        if kind is not None:
            cast(nn.Module, layer).__class__ = kind
    _fuse(model)
    return model


def check_masks(model: nn.Module, *, group: Any = None) -> dict[str, float]:
    """Prove that every pruned weight is exactly 0: {layer: density}, or InitPerfRuntimeError naming the layers that are not.

    Compressed layers store none; there the mask has as many survivors as there are values. group: a torch.distributed process
    group, all ranks of which call this: their masks must be the same, by hash.
    """
    if not isinstance(model, nn.Module):
        fail("a torch.nn.Module", type(model).__name__, kind=InitPerfTypeError)
    masked, compressed, revived = masked_layers(model), sparse_layers(model), {}
    for name, layer in masked.items():
        count = int(layer.weight.detach().masked_fill(layer.weight_mask, 0).count_nonzero())
        if count:
            revived[name or "the model"] = count
    if revived:
        counts = ", ".join(f"{count} in {name}" for name, count in revived.items())
        fail("pruned weights to be 0", f"nonzero ones: {counts} (see mask_optimizer_)", kind=InitPerfRuntimeError)
    for sparse in compressed.values():
        sparse._fresh_pattern()
    if group is not None:
        _check_ranks({**masked, **compressed}, group)
    return {
        name: layer.density for name, layer in model.named_modules() if isinstance(layer, (MaskedLayer, SparseLayer))
    }


def _check_ranks(layers: Mapping[str, MaskedLayer | SparseLayer], group: Any) -> None:
    import torch.distributed as dist

    own = {
        name: hashlib.sha256(pack_bits(layer.weight_mask.cpu()).numpy().tobytes()).hexdigest()
        for name, layer in layers.items()
    }
    every: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(every, own, group)
    names = dict.fromkeys(name for hashes in every for name in hashes)
    different = [name or "the model" for name in names if len({hashes.get(name) for hashes in every}) > 1]
    if different:
        fail("the same masks on every rank", f"different ones for {_some(different)}", kind=InitPerfRuntimeError)
