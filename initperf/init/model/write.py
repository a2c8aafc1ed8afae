"""Writing what initialize planned: all that kernels can write as it lies in memory in one pass a device, the rest one by one."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from initperf.core.bits import bits_set
from initperf.core.torch_private import shard_offset
from initperf.init.model.plan import Task
from initperf.init.model.rescale import rescale_all
from initperf.rng.sampling import (
    has_own_memory,
    is_sharded,
    sample_survivors_into,
    write,
    write_many,
    write_orthogonal,
    write_shard,
)

Figures = dict[str, tuple[float, float]]
SEPARATE = ("unit", "squares", "measured")  # rescalings that need the dense values first: a pass of their own


def fill(tasks: list[Task], seed: int, rescale: str | None, stats: bool, exact: set[str], figures: Figures) -> None:
    """Write the tasks that have a distribution; add their names to `exact`, and to `figures` the moments that were measured on the way.

    exact: whose values are f(seed, stream, index) of the task's Init, 0 where pruned.
    """
    together: dict[torch.device, list[tuple[Task, Tensor, Tensor | None]]] = defaultdict(list)
    dense: list[Task] = []
    for task in tasks:
        if task.keep or task.reset is not None or not task.memory.numel():
            continue
        masked = task.mask is not None or task.bits is not None
        if masked and rescale == "layer":
            _scale_distribution(task)
        if masked and rescale in SEPARATE:
            task.text += f", rescaled ({rescale})"
            dense.append(task)
        elif task.init is not None:
            exact.add(task.name)
        tensor, shape, start = local(task.memory)
        if task.distribution is None or start is not None or not has_own_memory(tensor):
            _alone(task, tensor, shape, start, seed, None if masked and rescale in SEPARATE else task.mask)
            continue
        mask = None if rescale in SEPARATE else task.mask
        mask = task.bits if task.bits is not None else mask
        together[tensor.device].append((task, tensor, mask if mask is None else mask.to(tensor.device).contiguous()))
    for batch in together.values():
        _together(batch, seed, stats, figures)
    if rescale in ("unit", "squares"):
        rescale_all(rescale, dense, seed)
    for task in dense:
        figures.pop(task.name, None)


def _together(batch: list[tuple[Task, Tensor, Tensor | None]], seed: int, stats: bool, figures: Figures) -> None:
    tasks, tensors, masks = zip(*batch, strict=True)
    distributions = [t.distribution for t in tasks]
    found = write_many(tensors, distributions, [t.stream for t in tasks], seed, masks, stats)
    if found is not None:
        figures.update(zip((t.name for t in tasks), zip(*found.tolist(), strict=True), strict=True))


def _alone(
    task: Task, tensor: Tensor, shape: tuple[int, ...], start: tuple[int, ...] | None, seed: int, mask: Tensor | None
) -> None:
    stream = task.stream
    if task.distribution is None:
        gain = task.init.args[0]  # type: ignore[union-attr]
        if start is None and task.bits is None:
            write_orthogonal(tensor, gain, seed, stream)
        else:
            whole = torch.empty(task.shape, dtype=tensor.dtype, device="cpu")
            write_orthogonal(whole, gain, seed, stream)
            kept = part(whole, tensor, start) if task.bits is None else whole[task.unpacked_bits().cpu()]
            tensor.copy_(kept.view(tensor.shape))
    elif start is not None:
        write_shard(tensor, task.distribution, shape, start, seed, stream)
    elif task.bits is not None:
        sample_survivors_into(tensor, task.distribution, task.bits, task.shape, seed=seed, stream=stream)
    else:
        write(tensor, task.distribution, seed, stream)
    if mask is not None:
        tensor.masked_fill_(~part(mask.to(tensor.device), tensor, start), 0)


def _scale_distribution(task: Task) -> None:
    """By 1 / sqrt(density); a layer without survivors keeps its distribution."""
    live = int(task.mask.count_nonzero()) if task.mask is not None else bits_set(task.bits)  # type: ignore[arg-type]
    init = task.init.scaled((live / task.place.parameter.numel()) ** -0.5 if live else 1.0)  # type: ignore[union-attr]
    task.init, task.text = init, str(init)
    if task.distribution is not None:
        task.distribution = init.distribution(task.memory.dtype)


def part(whole: Tensor, like: Tensor, start: tuple[int, ...] | None) -> Tensor:
    """The block of `whole` that `like` holds."""
    for d, first in enumerate(start or ()):
        whole = whole.narrow(d, first, like.shape[d])
    return whole


def local(parameter: Tensor) -> tuple[Tensor, tuple[int, ...], tuple[int, ...] | None]:
    """The memory to write: (tensor, global shape, where the tensor begins in it; None for a tensor that is the whole)."""
    if not is_sharded(parameter):
        return parameter, tuple(parameter.shape), None
    return parameter.to_local(), tuple(parameter.shape), shard_offset(parameter)  # type: ignore[attr-defined]
