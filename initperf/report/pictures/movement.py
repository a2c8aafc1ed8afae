"""Figures of the analysis, as SVG text: movement, initial values of survivors, layers. Imports matplotlib: for drawing only."""

from __future__ import annotations

from itertools import pairwise
from statistics import fmean

from initperf.core.extras import needed
from initperf.core.tables import percent
from initperf.report.numbers.intervals import spread
from initperf.report.numbers.movement import movement_of
from initperf.report.numbers.results import Run
from initperf.report.numbers.survivors import BINS, Overlap, Survivors, mean_histogram
from initperf.report.pictures.figures import DENSE, STYLE, legend_above, surviving_axis, svg
from initperf.report.words.movement import evenly

with needed("report"):
    from matplotlib import rc_context
    from matplotlib.figure import Figure

KEPT, PRUNED = "#0072B2", "#D55E00"
SHADES = ("#555555", "#9ecae1", "#4292c6", "#08519c", "#08306b")  # dense, then darker the fewer survive
LAYERS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#B8860B", "#56B4E9", "#000000", "#999999", "#E69F00")
MOST_LAYERS = 4


def movement_figure(run: Run) -> str | None:
    """Kept against pruned weights at every level, as measured and under the permutation null."""
    levels = [level for level in run.levels if movement_of(run, level)]
    if not levels:
        return None
    x = [run.density(level) for level in levels]
    with rc_context(STYLE):
        figure = Figure(figsize=(13.2, 3.8), layout="constrained")
        panels = figure.subplots(1, 3)
        titles = {"moved": "distance moved, |w_T − w_0|", "grew": "growth, |w_T| − |w_0|", "flipped": "sign changes, %"}
        for axes, (what, title) in zip(panels, titles.items(), strict=True):
            for part, colour in (("kept", KEPT), ("pruned", PRUNED)):
                scale = 100 if what == "flipped" else 1
                look = {"color": colour, "marker": "o" if part == "kept" else "s"}
                for of, line in (("measured", "-"), ("null", "--")):
                    label = part if of == "measured" else f"{part}, null"
                    found = [
                        spread(scale * getattr(m, of)[f"{part}_{what}"] for m in movement_of(run, level).values())
                        for level in levels
                    ]
                    axes.plot(
                        x,
                        [v.mean for v in found],
                        label=label,
                        ls=line,
                        mfc=colour if of == "measured" else "w",
                        **look,
                    )
                    band = {"alpha": 0.13 if of == "measured" else 0.05, "color": colour, "lw": 0}
                    axes.fill_between(x, [v.low for v in found], [v.high for v in found], **band)
            axes.set_title(title)
            if what == "grew":
                axes.axhline(0, color="#999999", linewidth=1)
            surviving_axis(axes, x)
            axes.set_xlabel("weights surviving during the training")
        legend_above(figure, panels[0])
        return svg(figure)


def survivors_figure(run: Run, survivors: list[Survivors]) -> str | None:
    """Initial values of the survivors of every layer, in standard deviations of the layer's initialization."""
    names = evenly(list(dict.fromkeys(s.parameter for s in survivors)), MOST_LAYERS)
    levels = evenly(sorted({s.level for s in survivors}), len(SHADES))
    if not names:
        return None
    centres = [(low + high) / 2 for low, high in pairwise(BINS)]
    width = BINS[1] - BINS[0]
    with rc_context(STYLE):
        figure = Figure(figsize=(13.2, 3.4), layout="constrained")
        panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
        for axes, name in zip(panels, names, strict=True):
            for level, shade in zip(levels, SHADES[: len(levels)], strict=True):
                shares = mean_histogram(survivors, level, name)
                if shares:
                    label = percent(run.density(level))
                    line = "--" if level == 0 else "-"
                    axes.step(centres, [s / width for s in shares], where="mid", color=shade, ls=line, label=label)
            axes.set_title(name)
            axes.set_xlabel("initial weight / its standard deviation")
        panels[0].set_ylabel("density")
        legend_above(figure, panels[0])
        return svg(figure)


def layers_figure(run: Run, survivors: list[Survivors], overlaps: list[Overlap]) -> str | None:
    """Left: which part of each layer survives. Right: overlap of the masks of two trials, and chance."""
    names = list(dict.fromkeys(s.parameter for s in survivors))
    levels = sorted({s.level for s in survivors} - {0})
    if not levels:
        return None
    with rc_context(STYLE):
        figure = Figure(figsize=(13.2, 3.8), layout="constrained")
        left, right = figure.subplots(1, 2)
        x = [run.density(level) for level in levels]
        for i, name in enumerate(names):
            colour = LAYERS[i % len(LAYERS)]
            kept = [fmean(s.density for s in survivors if (s.level, s.parameter) == (at, name)) for at in levels]
            left.plot(x, [100 * v for v in kept], color=colour, marker="o", label=name)
            pairs = [[o for o in overlaps if (o.level, o.parameter) == (at, name)] for at in levels]
            shown = [(at, pair) for at, pair in zip(x, pairs, strict=True) if pair]
            for field, look in (("shared", {"marker": "o"}), ("chance", {"ls": "--", "lw": 1.2})):
                y = [100 * fmean(getattr(o, field) for o in pair) for _, pair in shown]
                right.plot([at for at, _ in shown], y, color=colour, **look)
        left.set_title("weights of the layer that survive, %")
        right.set_title("survivors shared by two trials, %   (dashed: by chance)")
        left.plot(x, [100 * v for v in x], color=DENSE, ls=":", label="whole network")
        for axes in (left, right):
            surviving_axis(axes, x)
            axes.set_ylim(0)
        legend_above(figure, left)
        return svg(figure)
