"""What every benchmark shares: `versus` checks, then measures ours and its rivals alternately in one process and records the ratios."""

from __future__ import annotations

import importlib.metadata
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

ROWS: list[tuple[str, str, dict[str, Any]]] = []
VERSIONS = {name: importlib.metadata.version(name) for name in ("torch", "numba", "numpy")}
VERSIONS["python"] = platform.python_version()


def seconds(call: Callable[[], object], number: int, device: str) -> float:
    """Mean time of `number` calls in a row; on a GPU those are launches, followed by one synchronization."""
    start = time.perf_counter()
    for _ in range(number):
        call()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / number


@pytest.fixture
def versus(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., dict[str, Any]]:
    """versus(ours, theirs, check=...): see `measure`."""

    def measure(
        ours: Callable[[], object],
        theirs: Callable[[], object] | Mapping[str, Callable[[], object]],
        *,
        check: Callable[[], object],
        group: str | None = None,
        device: str = "cpu",
        budget: float = 1.0,
        values: int | None = None,
        nbytes: int | None = None,
        flops: int | None = None,
        **extra: Any,
    ) -> dict[str, Any]:
        """Run `check()` (it raises if ours is wrong), then time ours and theirs in alternating rounds for `budget` seconds.

        `theirs` is torch's way, or {rival's name: call}. extra_info gets times_<rival> (median over rounds of
        theirs / ours: over 1, ours is faster), <rival>_us, ours_us, and from `values`, `nbytes`, `flops` of one call
        Gvalues_s, GB_s, GFLOP_s; threads, versions, and whatever else is given. Returns it.
        """
        check()
        rivals = dict(theirs) if isinstance(theirs, Mapping) else {"torch": theirs}
        calls = {"ours": ours, **rivals}
        numbers = {}
        for name, call in calls.items():  # the first calls compile and warm; a round lasts 2 ms or one call
            call()
            numbers[name] = max(1, round(2e-3 / min(seconds(call, 1, device) for _ in range(3))))
        times: dict[str, list[float]] = {name: [] for name in calls}
        end = time.perf_counter() + budget
        while time.perf_counter() < end or len(times["ours"]) < 5:
            for name, call in calls.items():
                times[name].append(seconds(call, numbers[name], device))

        median = statistics.median(times["ours"])
        info = {f"times_{name}": _ratio(times[name], times["ours"]) for name in rivals}
        info |= {f"{name}_us": statistics.median(times[name]) * 1e6 for name in calls}
        for unit, amount in (("Gvalues_s", values), ("GB_s", nbytes), ("GFLOP_s", flops)):
            if amount is not None:
                info[unit] = amount / median / 1e9
        info |= {"threads": torch.get_num_threads(), "device": device, "versions": VERSIONS, **extra}

        benchmark.group = group or benchmark.group
        benchmark.extra_info.update(info)
        if device == "cuda":
            benchmark.extra_info["calls_a_round"] = numbers["ours"]
            benchmark.pedantic(seconds, (ours, numbers["ours"], device), rounds=5)
        else:
            benchmark.pedantic(ours, rounds=5, iterations=numbers["ours"])
        ROWS.append((benchmark.group or "", request.node.name, info))
        return info

    return measure


def _ratio(theirs: list[float], ours: list[float]) -> float:
    """Median of the ratios of neighbouring rounds, so that a slow phase of the machine slows both sides of each."""
    return statistics.median(t / o for t, o in zip(theirs, ours, strict=True))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """One line a row: the ratio against every rival, the time of a call, and the rates."""
    if not ROWS:
        return
    terminalreporter.section("ours against the rivals (over 1: ours is faster)")
    for group, name, info in ROWS:
        ratios = "  ".join(f"{v:7.2f}x {k.removeprefix('times_')}" for k, v in info.items() if k.startswith("times_"))
        rates = "  ".join(f"{info[k]:.2f} {k}" for k in ("Gvalues_s", "GB_s", "GFLOP_s") if k in info)
        terminalreporter.write_line(f"{ratios}  {info['ours_us']:10.1f} us  {rates:28s} {group} {name}")
