"""transformers' models: each module is initialized by the `_init_weights` of the PreTrainedModel that it belongs to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from initperf.init.redirect import fast_init_by_name

_FLAG = "_is_hf_initialized"  # what transformers leaves on loaded parameters, which its functions then do not touch


def is_pretrained(module: nn.Module) -> bool:
    """Whether the module is a transformers.PreTrainedModel, found without importing transformers."""
    return any(
        c.__module__ == "transformers.modeling_utils" and c.__name__ == "PreTrainedModel" for c in type(module).__mro__
    )


def owned(model: nn.Module) -> Iterator[tuple[str, nn.Module, Any]]:
    """(path, module, its nearest PreTrainedModel) for every module that has one, children before their parents."""
    seen: set[int] = set()

    def visit(path: str, module: nn.Module, owner: nn.Module | None) -> Iterator[tuple[str, nn.Module, Any]]:
        if id(module) in seen:
            return
        seen.add(id(module))
        owner = module if is_pretrained(module) else owner
        for name, child in module.named_children():
            yield from visit(f"{path}.{name}" if path else name, child, owner)
        if owner is not None:
            yield path, module, owner

    yield from visit("", model, None)


def init_weights(model: nn.Module, seed: int) -> set[int]:
    """Run `_init_weights` for every module, seeded by the seed and its name. Returns the ids of the parameters and buffers it wrote."""
    tensors = [*model.parameters(), *model.buffers()]
    before = {id(t): t._version for t in tensors}
    flags = [t.__dict__.pop(_FLAG, None) for t in tensors]
    try:
        for path, module, owner in owned(model):
            with torch.no_grad(), fast_init_by_name(seed, path):
                owner._init_weights(module)
    finally:
        for tensor, flag in zip(tensors, flags, strict=True):
            if flag is not None:
                setattr(tensor, _FLAG, flag)
    return {id(t) for t in tensors if t._version != before[id(t)]}


def rehearsed(model: nn.Module) -> set[int]:
    """Ids of what `_init_weights` writes, found on the meta device, where that costs nothing; what has memory gets its values back."""
    real = [(t, t.clone()) for t in (*model.parameters(), *model.buffers()) if not t.is_meta]
    written = init_weights(model, 0)
    with torch.no_grad():
        for tensor, values in real:
            if id(tensor) in written:
                tensor.copy_(values)
    return written
