"""Optimizers that follow masks: state of pruned weights is zeroed in dense storage, and moves along in compressed storage."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn

from initperf.core.checks import InitPerfRuntimeError, InitPerfTypeError, fail
from initperf.layers.base.masked import LAYERS, MaskedLayer
from initperf.layers.base.reshape_parameter import FOLLOWERS, move_state
from initperf.layers.base.sparse import COMPRESSED, SparseLayer

# They read a matrix, or factor it; a list of survivors is none.
NOT_ELEMENTWISE = ("Muon", "Shampoo", "DistributedShampoo", "SOAP", "Adafactor")


def mask_optimizer_(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Make an optimizer follow the masks of its parameters, now and after every later change, and return it.

    Masked layers: state of the weight's shape, and after every step the weight, are zeroed where pruned. Needed for optimizers
    that mix the elements of a matrix (Muon, Shampoo), and for momentum that is older than the mask.
    Compressed layers: state made for the dense weight shrinks to the survivors; from then on set_mask, checkpoints with
    another mask and densify move the state along, new survivors starting at 0. Elementwise optimizers only.
    """
    known = {id(layer._parameters.get("weight")) for layer in LAYERS}
    known |= {id(layer._parameters.get("weight_values")) for layer in COMPRESSED}
    check_optimizer(optimizer, known - {id(None)}, sparse=False)
    compressed = list(_compressed_of(optimizer))
    check_optimizer(optimizer, known, sparse=bool(compressed))
    for layer in compressed:
        _check_state(optimizer, layer)
    for layer in compressed:
        values = cast(nn.Parameter, layer.weight_values)
        move_state(optimizer, values, layer.weight_shape, layer.compress)
    _mask_state(optimizer)
    if optimizer not in FOLLOWERS:
        optimizer.register_step_post_hook(lambda opt, args, kwargs: _mask_state(opt))
        FOLLOWERS.add(optimizer)
    return optimizer


def check_optimizer(optimizer: object, parameters: set[int], *, sparse: bool) -> None:
    """Raise unless `optimizer` is one, has one of `parameters` (ids), and, if they are to be compressed (sparse), is elementwise."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        fail("a torch.optim.Optimizer", type(optimizer).__name__, kind=InitPerfTypeError)
    if not parameters & _parameters(optimizer):
        fail("an optimizer of at least one masked or compressed layer's weight", "none (sparsify the model first)")
    if sparse and type(optimizer).__name__ in NOT_ELEMENTWISE:
        fail(
            "an elementwise optimizer for compressed layers, or masked ones (sparse=False)",
            type(optimizer).__name__,
            kind=InitPerfTypeError,
        )


def _check_state(optimizer: torch.optim.Optimizer, layer: SparseLayer) -> None:
    values = cast(nn.Parameter, layer.weight_values)
    for key, value in optimizer.state.get(values, {}).items():
        if not isinstance(value, Tensor) or value.dim() == 0 or value.shape in (values.shape, layer.weight_shape):
            continue
        if value.dim() == 2 and value.shape[1] == 1:
            fail(
                f"optimizer state {key!r} of shape {tuple(values.shape)} or {tuple(layer.weight_shape)}",
                f"{tuple(value.shape)}, from before a change of the mask (call mask_optimizer_ before such changes)",
                kind=InitPerfRuntimeError,
            )


def _masked_of(optimizer: torch.optim.Optimizer) -> Iterator[MaskedLayer]:
    parameters = _parameters(optimizer)
    return (layer for layer in list(LAYERS) if id(layer._parameters.get("weight")) in parameters)


def _compressed_of(optimizer: torch.optim.Optimizer) -> Iterator[SparseLayer]:
    parameters = _parameters(optimizer)
    return (layer for layer in list(COMPRESSED) if id(layer._parameters.get("weight_values")) in parameters)


def _parameters(optimizer: torch.optim.Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


@torch.no_grad()
def _mask_state(optimizer: torch.optim.Optimizer) -> None:
    for layer in _masked_of(optimizer):
        pruned = ~layer.weight_mask
        layer.weight.masked_fill_(pruned, 0)
        for value in optimizer.state.get(layer.weight, {}).values():
            if isinstance(value, Tensor) and value.shape == pruned.shape:
                value.masked_fill_(pruned.to(value.device), 0)
