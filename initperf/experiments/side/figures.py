"""The figures of the side experiments, as SVG text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from initperf.core.extras import needed
from initperf.report.numbers.intervals import Spread
from initperf.report.pictures.figures import DENSE, STYLE, legend_above, look_of, svg

with needed("report"):
    from matplotlib import rc_context
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Looks = Mapping[str, Mapping[str, Any]]  # beside those of figures.LOOKS


class Panel(NamedTuple):
    """places: names along the horizontal axis; lines: a kind of network -> its value at each of them; multiplied by `scale`."""

    title: str
    places: Sequence[str]
    lines: Mapping[str, Sequence[Spread | None]]
    scale: float = 100
    log: bool = False


def panels_figure(panels: Sequence[Panel], xlabel: str, looks: Looks | None = None) -> str:
    """The panels side by side: means, and the range over trials as bars."""
    with rc_context(STYLE):
        figure = Figure(figsize=(2 + 4.8 * len(panels), 4), layout="constrained")
        all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, panel in zip(all_axes, panels, strict=True):
            _draw(axes, panel, looks or {})
            axes.set_xlabel(xlabel)
            if panel.lines.keys() != panels[0].lines.keys():
                axes.legend()
        legend_above(figure, all_axes[0], 5)
        return svg(figure)


def _draw(axes: Axes, panel: Panel, looks: Looks) -> None:
    for i, (kind, values) in enumerate(panel.lines.items()):
        shift = 0.05 * (i - (len(panel.lines) - 1) / 2)  # so that no bar hides another
        found = [(place + shift, value) for place, value in enumerate(values) if value]
        y = [panel.scale * value.mean for _, value in found]
        bars = [[panel.scale * abs(end - value.mean) for _, value in found for end in [value[side]]] for side in (1, 2)]
        look = {**look_of(kind), **looks.get(kind, {})}
        if kind == "dense":
            look |= {"color": DENSE, "linestyle": "--", "marker": "x"}
        axes.errorbar([at for at, _ in found], y, yerr=bars, capsize=2.5, elinewidth=1, **look)
    axes.set_title(panel.title)
    axes.set_xticks(range(len(panel.places)), list(panel.places))
    axes.set_xlim(-0.4, len(panel.places) - 0.6)
    if panel.log:
        axes.set_yscale("log")
        axes.axhline(1, color=DENSE, linestyle="--", linewidth=1.2)
