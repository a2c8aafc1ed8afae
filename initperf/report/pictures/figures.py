"""The figures of a report, as SVG text. Imports matplotlib (without pyplot): import this module only when drawing."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from initperf.core.extras import needed
from initperf.core.tables import percent
from initperf.report.numbers.results import Run, spread
from initperf.report.words.findings import name_of

with needed("report"):
    from matplotlib import rc_context
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

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
LEVELS = ("#9ecae1", "#4292c6", "#08519c", "#54278f", "#d94801")  # of one kind of network
MOST_PANELS = 4
MOST_POINTS = 150
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


def look_of(kind: str) -> dict[str, Any]:
    colour, marker = LOOKS.get(kind, ("#000000", "x"))
    return {"color": colour, "marker": marker, "label": name_of(kind)}


def svg(figure: Figure) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return text.getvalue()


def surviving_axis(axes: Axes, densities: Iterable[float]) -> None:
    """Surviving weights, falling to the right in log scale as in the paper, ticks at the levels themselves."""
    values = sorted(set(densities), reverse=True)
    axes.set_xscale("log")
    axes.set_xlim(values[0] * 1.08, values[-1] / 1.08)
    ticks = [values[0]]
    for value in values:
        if math.log(ticks[-1] / value) > 0.12 * math.log(values[0] / values[-1]):
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


def legend_above(figure: Figure, axes: Axes, columns: int = 6) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), columns), columnspacing=1.4)


def accuracy_figure(run: Run, other: Run | None = None) -> str:
    """Test accuracy at early stopping against surviving weights: means, and the range over trials as a band; `other` dotted."""
    column = "early_stop_test_accuracy"
    with rc_context(STYLE):
        figure = Figure(figsize=(6.4, 4), layout="constrained")
        axes = figure.subplots()
        for kind in run.kinds:
            _line(axes, run, kind, column, 100, **look_of(kind))
        if other:
            for kind in other.kinds:
                label = f"{name_of(kind)}, {other.folder.resolve().name}"
                _line(
                    axes, other, kind, column, 100, **look_of(kind) | {"linestyle": ":", "mfc": "white", "label": label}
                )
        dense = run.spread(0, "ticket", column)
        if dense:
            axes.axhline(100 * dense.mean, color=DENSE, linestyle="--", linewidth=1.2, label="dense", zorder=1)
        surviving_axis(axes, (r.density(level) for r in (run, other) if r for level in r.levels))
        axes.set_ylabel("test accuracy at early stop, %")
        legend_above(figure, axes, 3 if other else 4)
        return svg(figure)


def speed_figure(run: Run) -> str:
    """The paper's figure 4: the iteration of least validation loss, that of the dense network's least one, and accuracy at the end."""
    budget = max(row.iterations for row in run.rows)
    never = 1.12 * budget
    with rc_context(STYLE):
        figure = Figure(figsize=(13.2, 3.8), layout="constrained")
        left, right, end = figure.subplots(1, 3)
        dense = run.spread(0, "ticket", "final_test_accuracy")
        if dense:
            end.axhline(100 * dense.mean, color=DENSE, linestyle="--", linewidth=1.2, zorder=1)
        surviving_axis(end, (run.density(level) for level in run.levels))
        end.set_title("test accuracy at the end, %   (dashed: dense)")
        for index, kind in enumerate(run.kinds):
            _line(left, run, kind, "early_stop_iteration", 1, **look_of(kind))
            _line(end, run, kind, "final_test_accuracy", 100, **look_of(kind))
            reach = [(run.density(level), run.reach(level, kind)) for level in run.levels]
            apart = never + (len(run.kinds) / 2 - index - 0.5) * 0.022 * budget  # so that no line hides another
            y = [apart if math.isinf(value.median) else value.median for _, value in reach if value]
            right.plot([x for x, value in reach if value], y, **look_of(kind))
        for axes, title in ((left, "least validation loss"), (right, "dense network's least validation loss reached")):
            surviving_axis(axes, (run.density(level) for level in run.levels))
            axes.set_title(title)
            axes.axhline(budget, color="#bbbbbb", linewidth=1)
            ticks = [tick * budget / 5 for tick in range(6)]
            axes.set_yticks(ticks, [f"{tick:,.0f}" for tick in ticks])
            axes.set_ylim(0, 1.19 * budget)
        right.set_yticks([*right.get_yticks(), never], [*(f"{tick:,.0f}" for tick in right.get_yticks()), "never"])
        right.axhspan(1.05 * budget, 1.19 * budget, color="#f2f2f2", zorder=0)
        left.set_ylabel("iteration")
        legend_above(figure, left)
        return svg(figure)


def training_figure(run: Run) -> str | None:
    """Test accuracy during training: the ticket at several levels, then two levels with every control (the paper's figure 3)."""
    levels = run.levels[1:]
    if not levels or not any(point.test_accuracy is not None for point in run.points):
        return None
    middle, last = levels[len(levels) // 2], levels[-1]
    with rc_context(STYLE):
        figure = Figure(figsize=(13.2, 4), layout="constrained")
        panels = figure.subplots(1, 3 if middle != last else 2, sharey=True)
        count = min(len(levels), len(LEVELS))
        for axes in panels:
            _curve(axes, run, 0, "ticket", {"color": DENSE, "linestyle": "--", "label": "dense"}, "test_accuracy")
            axes.set_xlabel("iteration")
        for i in range(count):
            level = levels[round(i * (len(levels) - 1) / max(1, count - 1))]
            look = {"color": LEVELS[i], "label": f"ticket, {percent(run.density(level))}"}
            _curve(panels[0], run, level, "ticket", look, "test_accuracy")
        for axes, level in zip(panels[1:], dict.fromkeys((middle, last)), strict=True):
            for kind in run.kinds:
                _curve(axes, run, level, kind, look_of(kind) | {"marker": ""}, "test_accuracy")
            axes.set_title(f"{percent(run.density(level))} surviving")
            axes.legend(loc="lower right")
        panels[0].set_title("the ticket, by weights surviving")
        panels[0].legend(loc="lower right")
        panels[0].set_ylabel("test accuracy, %")
        panels[0].set_ylim(*_late_range(panels))
        return svg(figure)


def _late_range(panels: Iterable[Axes]) -> tuple[float, float]:
    """Where the curves are after a seventh of the training: their steep beginning would leave no room for the rest."""
    curves = [np.asarray(line.get_ydata(), dtype=float) for axes in panels for line in axes.get_lines()]
    values = np.concatenate([curve[len(curve) // 7 :] for curve in curves])
    low, high = float(values.min()), float(values.max())
    margin = 0.06 * (high - low) or 1.0
    return low - margin, high + margin


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
                _curve(axes, run, level, kind, look_of(kind) | {"marker": ""})
            axes.set_title(f"{percent(run.density(level))} surviving")
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.set_xlabel("iteration")
        panels[0].set_ylabel("validation loss")
        legend_above(figure, panels[0])
        return svg(figure)


def _curve(axes: Axes, run: Run, level: int, kind: str, look: dict[str, Any], column: str = "val_loss") -> None:
    """Mean over trials as a line, range as a band; accuracies in percent."""
    by_iteration: dict[int, list[float]] = {}
    for point in run.points:
        value = getattr(point, column)
        if point.level == level and point.kind == kind and value is not None:
            by_iteration.setdefault(point.iteration, []).append(100 * value if column == "test_accuracy" else value)
    iterations = sorted(by_iteration)
    every = math.ceil(len(iterations) / MOST_POINTS)  # a long training has hundreds, and a page many curves
    line = [(at, spread(by_iteration[at])) for at in iterations[every - 1 :: every]]
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
            compressed = [(s.density, s.sparse_speedup) for s in steps if s.sparse_speedup]
            if compressed:
                x, y = zip(*compressed, strict=True)
                axes.plot(x, y, color=colour, marker="D", ls=":", label=f"compressed, batch {batch}")
            for step in steps[:: max(1, len(steps) // 4)]:
                axes.annotate(
                    f"{step.speedup:.2f}x",
                    (step.density, step.speedup),
                    (0, 8),
                    textcoords="offset points",
                    ha="center",
                )
        surviving_axis(axes, densities)
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, 0.8), max(high * 1.05, 1.2))
        axes.axhspan(axes.get_ylim()[0], 1, color="#f2f2f2", zorder=0)
        axes.axhline(1, color=DENSE, linestyle="--", linewidth=1.2, label="dense (break-even)")
        axes.text(
            0.99,
            0.995,
            "slower than dense",
            transform=axes.get_yaxis_transform(),
            color="#777777",
            va="top",
            ha="right",
        )
        axes.set_ylabel("speed of a training step, dense = 1")
        legend_above(figure, axes)
        return svg(figure)
