"""Does every op's kernel agree with its reference on this machine? Small inputs whose sums are exact in any order, so bits must be equal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from initperf import rng
from initperf.core import ops
from initperf.core.bits import pack_bits

Check = Callable[[Callable[..., Any], str], list[Tensor]]  # (launcher, device) -> outputs to compare
_PACKAGES = {
    "reference": "initperf.kernels.reference",
    "numba": "initperf.kernels.cpu",
    "triton": "initperf.kernels.gpu",
}


def agrees(name: str, backends: dict[str, str]) -> bool | None:
    """Whether op `name` gives the reference's bits on each device of {device: backend}; None where there is no check for it."""
    if name not in CHECKS:
        return None
    expected = CHECKS[name](_launcher(name, "reference"), "cpu")
    return all(_same(expected, CHECKS[name](_launcher(name, backend), device)) for device, backend in backends.items())


def _launcher(name: str, backend: str) -> Callable[..., Any]:
    return getattr(import_module(f"{_PACKAGES[backend]}.{ops.MODULES[name]}"), name)


def _beside(launch: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The launcher of op `name` of the same backend."""
    package = next(p for p in _PACKAGES.values() if launch.__module__.startswith(f"{p}."))
    return getattr(import_module(f"{package}.{ops.MODULES[name]}"), name)


def _same(expected: Sequence[Tensor], got: Sequence[Tensor]) -> bool:
    return len(expected) == len(got) and all(
        a.dtype == b.dtype and torch.equal(_bits(a), _bits(b)) for a, b in zip(expected, got, strict=True)
    )


def _bits(tensor: Tensor) -> Tensor:
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    tensor = tensor.detach().cpu().contiguous()
    return tensor.view(words[tensor.element_size()]) if tensor.is_floating_point() else tensor


def _integers(*shape: int, device: str) -> Tensor:
    """float32 whole numbers from -3 to 3."""
    return (torch.arange(torch.Size(shape).numel()) * 5 % 7 - 3).float().view(shape).to(device)


def _check_sample(launch: Callable[..., Any], device: str) -> list[Tensor]:
    distributions = [rng.uniform(-1, 1, torch.float32), rng.normal(0, 1), rng.trunc_normal(0, 1, -2, 2, torch.float32)]
    return [launch(torch.empty(2500, device=device), *which, 7, 3) for which in distributions]


def _check_orthogonal(launch: Callable[..., Any], device: str) -> list[Tensor]:
    return [launch(_integers(40, 24, device=device))]


def _check_kth_smallest(launch: Callable[..., Any], device: str) -> list[Tensor]:
    values = [_integers(31, 10, device=device), _integers(7, device=device)]
    return [launch(values, [v > -2 for v in values], 100), launch(values, None, 100)]


def _check_cut(launch: Callable[..., Any], device: str) -> list[Tensor]:
    values = [_integers(31, 10, device=device), _integers(7, device=device)]
    alive = [v > -2 for v in values]
    selection = _launcher("kth_smallest", "reference")(values, alive, 100)
    return list(launch(values, alive, selection))


def _check_moments(launch: Callable[..., Any], device: str) -> list[Tensor]:
    x = _integers(8, 4, 64, device=device)
    rows = launch([x, x], [(1, 1, 2048, 2048, 2048), (8, 4, 64, 256, 64)], 4, 0.0)
    return [rows.float()]  # to float32: quotients and roots may differ in the last bits


def _masked(device: str) -> dict[str, Tensor]:
    """Operands of the masked products."""
    mask = (torch.arange(80 * 300) * 7919 % 100 < 12).view(80, 300).to(device)
    x, dy, bias = (_integers(*shape, device=device) for shape in ((20, 300), (20, 80), (80,)))
    return {
        "x": x,
        "dy": dy,
        "bias": bias,
        "mask": mask,
        "weight": torch.where(mask, _integers(80, 300, device=device), 0),
    }


def _check_masked(name: str, launch: Callable[..., Any], device: str) -> list[Tensor]:
    """One of the three products, or the index that they read."""
    given = _masked(device)
    product = _beside(launch, "masked_linear") if name == "pattern_tensors" else launch
    pattern = _beside(launch, "pattern_tensors")(given["mask"])
    if name == "masked_grad_input":
        return [launch(given["dy"], given["weight"], given["mask"], pattern, True)]
    if name == "masked_grad_weight":
        return [launch(given["dy"], given["x"], given["mask"], pattern)]
    return [product(given["x"], given["weight"], given["bias"], given["mask"], pattern, True)]


def _check_sparse(name: str, launch: Callable[..., Any], device: str) -> list[Tensor]:
    """One of the three products of a compressed weight, or the index that they read."""
    given = _masked(device)
    values, bits = given["weight"][given["mask"]][:, None], pack_bits(given["mask"])
    index = _beside(launch, "sparse_tensors")(given["mask"])
    if name == "sparse_grad_values":
        return [launch(given["dy"], given["x"], bits, index)]
    by_columns = [_beside(launch, "sparse_grad_input")(given["dy"], values, bits, 300, index)]
    if name == "sparse_grad_input":
        return by_columns
    y = _beside(launch, "sparse_linear")(given["x"], values, given["bias"], bits, 80, index)
    return [y, *by_columns] if name == "sparse_tensors" else [y]


def _check_conv(name: str, launch: Callable[..., Any], device: str) -> list[Tensor]:
    """One of the three convolutions, or the index that they read."""
    mask = (torch.arange(10 * 6 * 9) * 7919 % 100 < 30).view(10, 6, 3, 3).to(device)
    x, dy, bias = (_integers(*shape, device=device) for shape in ((17, 6, 8, 9), (17, 10, 8, 9), (10,)))
    weight = torch.where(mask, _integers(10, 6, 3, 3, device=device), 0)
    index, geometry = _beside(launch, "conv_pattern_tensors")(mask, 1, False), ((1, 1), (1, 1), (1, 1), 1)
    if name == "masked_conv2d_grad_input":
        return [launch(dy, weight, mask, index, mask.shape, (8, 9), *geometry, True)]
    if name == "masked_conv2d_grad_weight":
        return [launch(dy, x, mask, index, mask.shape, *geometry)]
    return [_beside(launch, "masked_conv2d")(x, weight, bias, mask, index, mask.shape, *geometry, True)]


def _check_zero_pruned(launch: Callable[..., Any], device: str) -> list[Tensor]:
    values = _integers(31, 11, device=device)
    mask = values > -2
    return [launch(values.clone(), mask, bits) for bits in (None, pack_bits(mask))]


def _check_chain(name: str, launch: Callable[..., Any], device: str) -> list[Tensor]:
    """Two layers with ReLU between them: for one batch row and for many, or with their gradients."""
    given = _masked(device)
    second = (torch.arange(10 * 80) * 7919 % 100 < 30).view(10, 80).to(device)
    weights = (given["weight"], given["mask"], given["bias"]), (_integers(10, 80, device=device), second, None)
    layers = [
        (weight[mask][:, None], bias, mask, _beside(launch, "sparse_tensors")(mask), bias is not None)
        for weight, mask, bias in weights
    ]
    if name == "sparse_chain_training":
        return list(launch(given["x"], _integers(len(given["x"]), 10, device=device), layers))
    return [launch(given["x"][:1], layers), launch(given["x"], layers)]


def _check_sample_many(launch: Callable[..., Any], device: str) -> list[Tensor]:
    outs = [torch.empty(size, device=device) for size in (2500, 7)]
    launch(outs, [rng.uniform(-1, 1, torch.float32), rng.normal(0, 1)], [3, 4], 7)
    return outs


CHECKS: dict[str, Check] = {
    "sample_": _check_sample,
    "sample_many_": _check_sample_many,
    "orthogonal_": _check_orthogonal,
    "kth_smallest": _check_kth_smallest,
    "cut": _check_cut,
    "moments": _check_moments,
    "pattern_tensors": partial(_check_masked, "pattern_tensors"),
    "masked_linear": partial(_check_masked, "masked_linear"),
    "masked_grad_input": partial(_check_masked, "masked_grad_input"),
    "masked_grad_weight": partial(_check_masked, "masked_grad_weight"),
    "zero_pruned": _check_zero_pruned,
    "sparse_chain": partial(_check_chain, "sparse_chain"),
    "sparse_chain_training": partial(_check_chain, "sparse_chain_training"),
    "sparse_tensors": partial(_check_sparse, "sparse_tensors"),
    "sparse_linear": partial(_check_sparse, "sparse_linear"),
    "sparse_grad_input": partial(_check_sparse, "sparse_grad_input"),
    "sparse_grad_values": partial(_check_sparse, "sparse_grad_values"),
    "conv_pattern_tensors": partial(_check_conv, "conv_pattern_tensors"),
    "masked_conv2d": partial(_check_conv, "masked_conv2d"),
    "masked_conv2d_grad_input": partial(_check_conv, "masked_conv2d_grad_input"),
    "masked_conv2d_grad_weight": partial(_check_conv, "masked_conv2d_grad_weight"),
}
