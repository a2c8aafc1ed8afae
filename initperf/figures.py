"""The figures of a report, as SVG text. Imports matplotlib (without pyplot): import this module only when drawing."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from initperf.findings import name_of, percent
from initperf.results import Run, spread

# Okabe & Ito's palette, which colour-blind readers can tell apart; the markers differ as well.
LOOKS = {
    "ticket": ("#0072B2", "o"),
    "reinit": ("#D55E00", "s"),
    "sign-reinit": ("#56B4E9", "P"),
    "shuffle": ("#009E73", "^"),
    "random": ("#CC79A7", "D"),
    "small-dense": ("#B8860B", "v"),
}
DENSE, GRID = "#555555", "#e6e6e6"
MOST_PANELS = 4
STYLE: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["Helvetica", "Arial", "DejaVu Sans", "sans-serif"],
    "font.size": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#999999",
    "axes.grid": True,
    "axes.titlesize": 10.5,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": "#333333",
    "ytick.color": "#333333",
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "svg.fonttype": "none",
    "svg.hashsalt": "initperf",
}


def _look(kind: str) -> dict[str, Any]:
    colour, marker = LOOKS.get(kind, ("#000000", "x"))
    return {"color": colour, "marker": marker, "label": name_of(kind)}


def _svg(figure: Figure) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return text.getvalue()


def _surviving_axis(axes: Axes, densities: Iterable[float]) -> None:
    """Surviving weights, falling to the right in log scale as in the paper, ticks at the levels themselves."""
    values = sorted(set(densities), reverse=True)
    axes.set_xscale("log")
    axes.set_xlim(values[0] * 1.08, values[-1] / 1.08)
    ticks = [values[0]]
    for value in values:
        if math.log(ticks[-1] / value) > 0.09 * math.log(values[0] / values[-1]):
            ticks.append(value)
    axes.set_xticks(ticks, [percent(value) for value in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("weights surviving")


def _line(axes: Axes, run: Run, kind: str, column: str, scale: float, **look: Any) -> None:
    """One kind of network over the levels that have it: mean as a line, range as a band."""
    found = [(run.density(level), run.spread(level, kind, column)) for level in run.levels]
    x = [density for density, value in found if value]
    axes.plot(x, [scale * value.mean for _, value in found if value], **look)
    low, high = ([scale * value[side] for _, value in found if value] for side in (1, 2))
    axes.fill_between(x, low, high, color=look["color"], alpha=0.13, linewidth=0)


def _legend(figure: Figure, axes: Axes, columns: int = 6) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), columns), columnspacing=1.4)


def accuracy_figure(run: Run, other: Run | None = None) -> str:
    """Test accuracy at early stopping against surviving weights: means, and the range over trials as a band; `other` dotted."""
    column = "early_stop_test_accuracy"
    with rc_context(STYLE):
        figure = Figure(figsize=(6.4, 4), layout="constrained")
        axes = figure.subplots()
        for kind in run.kinds:
            _line(axes, run, kind, column, 100, **_look(kind))
        if other:
            for kind in other.kinds:
                label = f"{name_of(kind)}, {other.folder.resolve().name}"
                _line(
                    axes, other, kind, column, 100, **_look(kind) | {"linestyle": ":", "mfc": "white", "label": label}
                )
        dense = run.spread(0, "ticket", column)
        if dense:
            axes.axhline(100 * dense.mean, color=DENSE, linestyle="--", linewidth=1.2, label="dense", zorder=1)
        _surviving_axis(axes, (r.density(level) for r in (run, other) if r for level in r.levels))
        axes.set_ylabel("test accuracy at early stop, %")
        _legend(figure, axes, 3 if other else 4)
        return _svg(figure)


def speed_figure(run: Run) -> str:
    """How soon: the iteration of least validation loss, and that of the dense network's least validation loss."""
    budget = max(row.iterations for row in run.rows)
    never = 1.12 * budget
    with rc_context(STYLE):
        figure = Figure(figsize=(13.2, 3.8), layout="constrained")
        left, right = figure.subplots(1, 2)
        for index, kind in enumerate(run.kinds):
            _line(left, run, kind, "early_stop_iteration", 1, **_look(kind))
            reach = [(run.density(level), run.reach(level, kind)) for level in run.levels]
            apart = never + (len(run.kinds) / 2 - index - 0.5) * 0.022 * budget  # so that no line hides another
            y = [apart if math.isinf(value.median) else value.median for _, value in reach if value]
            right.plot([x for x, value in reach if value], y, **_look(kind))
        for axes, title in ((left, "least validation loss"), (right, "dense network's least validation loss reached")):
            _surviving_axis(axes, (run.density(level) for level in run.levels))
            axes.set_title(title)
            axes.axhline(budget, color="#bbbbbb", linewidth=1)
            ticks = [tick * budget / 5 for tick in range(6)]
            axes.set_yticks(ticks, [f"{tick:,.0f}" for tick in ticks])
            axes.set_ylim(0, 1.19 * budget)
        right.set_yticks([*right.get_yticks(), never], [*(f"{tick:,.0f}" for tick in right.get_yticks()), "never"])
        right.axhspan(1.05 * budget, 1.19 * budget, color="#f2f2f2", zorder=0)
        left.set_ylabel("iteration")
        _legend(figure, left)
        return _svg(figure)


def curves_figure(run: Run) -> str | None:
    """Validation loss during training, one panel a level (at most four, the sparsest among them)."""
    levels = run.levels[1:]
    if not run.points or not levels:
        return None
    count = min(len(levels), MOST_PANELS)
    shown = [levels[round((i + 1) * len(levels) / count) - 1] for i in range(count)]
    with rc_context(STYLE):
        figure = Figure(figsize=(13.2, 3.6), layout="constrained")
        panels = figure.subplots(1, count, sharey=True, squeeze=False)[0]
        for axes, level in zip(panels, shown, strict=True):
            _curve(axes, run, 0, "ticket", {"color": DENSE, "linestyle": "--", "label": "dense"})
            for kind in run.kinds:
                _curve(axes, run, level, kind, _look(kind) | {"marker": ""})
            axes.set_title(f"{percent(run.density(level))} surviving")
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.set_xlabel("iteration")
        panels[0].set_ylabel("validation loss")
        _legend(figure, panels[0])
        return _svg(figure)


def _curve(axes: Axes, run: Run, level: int, kind: str, look: dict[str, Any]) -> None:
    by_iteration: dict[int, list[float]] = {}
    for point in run.points:
        if point.level == level and point.kind == kind:
            by_iteration.setdefault(point.iteration, []).append(point.val_loss)
    line = [(iteration, spread(losses)) for iteration, losses in sorted(by_iteration.items())]
    x = [iteration for iteration, _ in line]
    axes.plot(x, [v.mean for _, v in line], **look)
    axes.fill_between(
        x, [v.low for _, v in line], [v.high for _, v in line], color=look["color"], alpha=0.13, linewidth=0
    )


def steps_figure(run: Run) -> str | None:
    """Time of a training step, masked as a multiple of dense: above 1 is a loss and drawn as one."""
    if not run.steps:
        return None
    with rc_context(STYLE):
        figure = Figure(figsize=(6.4, 4), layout="constrained")
        axes = figure.subplots()
        densities = [step.density for step in run.steps]
        colours = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
        for batch, colour in zip(sorted({step.batch for step in run.steps}), colours, strict=False):
            steps = sorted((s for s in run.steps if s.batch == batch), key=lambda s: -s.density)
            ratios = [step.speedup for step in steps]
            axes.plot([s.density for s in steps], ratios, color=colour, marker="o", label=f"masked, batch {batch}")
            for step in steps[:: max(1, len(steps) // 4)]:
                axes.annotate(
                    f"{step.speedup:.2f}x",
                    (step.density, step.speedup),
                    (0, 8),
                    textcoords="offset points",
                    ha="center",
                )
        _surviving_axis(axes, densities)
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, 0.8), max(high * 1.05, 1.2))
        axes.axhspan(axes.get_ylim()[0], 1, color="#f2f2f2", zorder=0)
        axes.axhline(1, color=DENSE, linestyle="--", linewidth=1.2, label="dense (break-even)")
        axes.text(0.01, 0.99, "slower than dense", transform=axes.get_yaxis_transform(), color="#777777", va="top")
        axes.set_ylabel("speed of a training step, dense = 1")
        _legend(figure, axes)
        return _svg(figure)
