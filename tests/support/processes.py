"""Two processes that talk through gloo, for the tests of data-parallel training."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

WORLD = 2


def run(rank: Callable[..., object], folder: Path, *arguments: Any) -> list[Any]:
    """What `rank(number, *arguments)` returned in each of two processes of one gloo group, each on one thread."""
    torch.multiprocessing.spawn(_member, (rank, str(folder), arguments), nprocs=WORLD)
    return [torch.load(folder / f"{number}.pt", weights_only=False) for number in range(WORLD)]


def _member(number: int, rank: Callable[..., object], folder: str, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=number, world_size=WORLD)
    torch.save(rank(number, *arguments), f"{folder}/{number}.pt")
    dist.barrier()
    os._exit(0)  # gloo of torch 2.13 aborts now and then when it is taken down, with plain models too
