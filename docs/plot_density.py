"""docs/density.png from the benchmark's own output: speed against density, and where the sparse kernels break even.

pytest benchmarks --benchmark-only -k "1024-1024" --benchmark-json out.json
python -m docs.plot_density out.json
"""

from __future__ import annotations

import json
import math
import sys
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

LAYERS = ("256 x 1024 -> 1024", "16 x 1024 -> 1024")
PICTURE = Path(__file__).with_name("density.png")
COLORS = {"masked": "tab:blue", "sparse": "tab:orange"}
Curve = list[tuple[float, float]]


def curves(report: dict[str, Any], layer: str) -> dict[tuple[str, str, str], Curve]:
    """(product, storage, mode) -> [(density, times as fast as dense)]."""
    found: dict[tuple[str, str, str], dict[float, float]] = defaultdict(dict)
    for benchmark in report["benchmarks"]:
        storage, product, *rest = benchmark["group"].split(" ", 2)
        info = benchmark["extra_info"]
        if rest == [layer] and "mode" in info:
            found[product, storage, info["mode"]][info["density"]] = info["times_dense"]
    return {key: sorted(points.items()) for key, points in found.items()}


def break_even(curve: Curve) -> float | None:
    """Density where the curve falls to 1, by a line in the logarithms of the two neighbours; None if it never does."""
    for (d0, y0), (d1, y1) in pairwise(curve):
        if y0 >= 1 > y1:
            share = math.log(y0) / math.log(y0 / y1)
            return d0 * (d1 / d0) ** share
    return None


def plot(report: dict[str, Any], path: Path) -> None:
    figure, axes = pyplot.subplots(2, 2, figsize=(10, 7.5), sharex=True, sharey="row")
    for row, layer in zip(axes, LAYERS, strict=True):
        found = curves(report, layer)
        if not found:
            raise SystemExit(f"Expected benchmarks of {layer}. Got none (run them with -k 1024-1024).")
        for axis, product in zip(row, ("forward", "step"), strict=True):
            for storage, color in COLORS.items():
                chosen, forced = found.get((product, storage, "auto"), []), found.get((product, storage, "sparse"), [])
                axis.plot(*zip(*chosen, strict=True), color=color, marker="o", label=f"{storage}, as chosen")
                axis.plot(
                    *zip(*forced, strict=True), color=color, linestyle=":", label=f"{storage}, sparse kernels always"
                )
                limit = break_even(forced)
                if limit is not None:
                    axis.axvline(limit, color=color, linewidth=0.7)
                    axis.annotate(f"break-even {limit:.2f}", (limit, 1.1), color=color, rotation=90, fontsize=8)
            axis.axhline(1, color="grey", linewidth=0.7)
            axis.set(xscale="log", yscale="log", title=f"{product}, {layer}")
        row[0].set_ylabel("times as fast as nn.Linear, pre-masked")
    axes[0][0].legend(fontsize=7)
    for axis in axes[1]:
        axis.set_xlabel("density")
    info = report["machine_info"]
    figure.suptitle(f"{info['cpu']['brand_raw']}, {os_threads(report)} threads, float32", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def os_threads(report: dict[str, Any]) -> int:
    return int(report["benchmarks"][0]["extra_info"]["threads"])


if __name__ == "__main__":
    plot(json.loads(Path(sys.argv[1]).read_text()), PICTURE)
    print(PICTURE)
