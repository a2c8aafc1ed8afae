"""`initperf doctor --gpu`: which kernel would run on a GPU, and why, as tables; on any machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from initperf.core.checks import check, fail
from initperf.core.tables import Table
from initperf.layers.choice.gpu_devices import DEVICES
from initperf.layers.choice.gpu_model import BLOCKS, DTYPES, OPS, Candidate, choose

_DENSITIES = (0.5, 0.2, 0.1, 0.02)
_RUNS = {
    "forward, 1 row": ("forward", 1),
    "forward, 256": ("forward", 256),
    "dx, 256": ("dx", 256),
    "dw, 256": ("dw", 256),
}


def report(
    gpu: str, *, dtype: str = "bfloat16", tf32: bool = False, masks: Mapping[str, Tensor] | None = None
) -> list[Table]:
    """For `initperf doctor --gpu`: what would run, its speed over dense, and what most of its time goes to.

    By op, rows, shape and density; of `masks`, by layer, with the occupancy of their tiles and the blocks that were found in them.
    """
    if gpu not in DEVICES:
        fail(f"gpu to be one of {', '.join(DEVICES)}", gpu)
    check(dtype in DTYPES, f"dtype to be one of {', '.join(DTYPES)}", dtype)
    title = f"{gpu} ({DEVICES[gpu].target}), {dtype}{', TF32' if tf32 else ''}: predicted, not measured"
    notes = [
        f"Figures of the device: {DEVICES[gpu].source}; instructions counted in compiled code (docs/gpu.md).",
        "A cell is the kernel that would run, its speed over dense on the pre-masked weight, and what most of its time goes to.",
        "Layers choose among dense, rows, rows or tiles at survivors, and masked tiles; decode and blocks are called by hand.",
    ]
    ask = partial(choose, gpu, dtype=dtype, tf32=tf32)
    if masks:
        return [Table(title, ["layer", "shape", "density", "live tiles", *_RUNS], _of_masks(ask, masks), notes)]
    lines = []
    for op in OPS:
        for rows in (1, 16, 256, 4096) if op == "forward" else (256, 4096):
            for outputs, inputs in ((1024, 1024), (4096, 4096), (28672, 8192)):
                found = [ask(op, rows, outputs, inputs, density) for density in _DENSITIES]
                dense = f"{_us(found[0], 'dense'):.1f}"
                lines.append([op, str(rows), f"{outputs} x {inputs}", dense, *(_cell(f) for f in found)])
    return [Table(title, ["op", "rows", "out x in", "dense us", *map(str, _DENSITIES)], lines, notes)]


def _of_masks(ask: Callable[..., list[Candidate]], masks: Mapping[str, Tensor]) -> list[list[str]]:
    lines = []
    for name, mask in masks.items():
        m = mask.flatten(1)
        n, k = m.shape
        density, tiles, block = float(m.float().mean()), live_share(m, 128), whole_blocks(m)
        blocks = {"block": block, "blocks": density} if block else {}
        cells = [_cell(ask(op, rows, n, k, density, tiles=tiles, **blocks)) for op, rows in _RUNS.values()]
        lines.append([name, f"{n} x {k}", f"{density:.1%}", f"{tiles:.0%}", *cells])
    return lines


def _us(found: list[Candidate], kernel: str) -> float:
    return next(c.us for c in found if c.kernel == kernel)


def _cell(found: list[Candidate]) -> str:
    return f"{found[0].kernel} {_us(found, 'dense') / found[0].us:.2f}, {found[0].bound}"


def _tiled(mask: Tensor, side: int) -> Tensor:
    """mask (N, K) as (tiles, side * side), False beyond its edges."""
    n, k = mask.shape
    padded = torch.nn.functional.pad(mask, (0, -k % side, 0, -n % side))
    return padded.unflatten(1, (-1, side)).unflatten(0, (-1, side)).transpose(1, 2).reshape(-1, side * side)


def live_share(mask: Tensor, side: int) -> float:
    """Fraction of tiles of side x side of a bool mask (N, K) that hold a survivor."""
    return float(_tiled(mask, side).any(1).float().mean())


def whole_blocks(mask: Tensor) -> int | None:
    """The largest block of BLOCKS that divides a bool mask (N, K), not all True, and is kept or pruned as a whole everywhere."""
    for block in reversed(BLOCKS):
        if mask.shape[0] % block == mask.shape[1] % block == 0 and not mask.all():
            tiles = _tiled(mask, block)
            if bool((tiles.any(1) == tiles.all(1)).all()):
                return block
    return None
