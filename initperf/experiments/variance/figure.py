"""The picture of `initperf variance`: both panels of figure 7.4, with the analytic values dashed."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING, Any

from initperf.core.extras import needed

with needed("report"):
    from matplotlib import rc_context
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

if TYPE_CHECKING:
    from initperf.experiments.variance.result import Line, VarianceResult

# Okabe & Ito's palette, which colour-blind readers can tell apart; the markers differ as well.
COLOURS = ("#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#555555", "#CC79A7", "#B8860B")
MARKERS = "osD^vPX*p"  # one more than colours, so that 72 lines differ
NAMES = {"relu": "ReLU", "leaky_relu": "leaky ReLU", "gelu": "GELU", "selu": "SELU", "linear": "no activation"}
STYLE: Any = {
    "font.size": 13,
    "axes.titlesize": 15,
    "axes.labelsize": 14,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#999999",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
    "lines.linewidth": 2.2,
    "lines.markersize": 6,
}


def png(result: VarianceResult) -> bytes:
    """The figure of `result`, 2,100 pixels wide; of several masks, one below the other."""
    c = result.config
    masks = list(dict.fromkeys(line.mask for line in result.lines))
    rows = [[line for line in result.lines if line.mask == mask] for mask in masks]
    with rc_context(STYLE):
        figure = Figure(figsize=(14, 1.6 + 4.8 * len(rows)), layout="constrained")
        panels = figure.subplots(len(rows), 2, squeeze=False)
        for mask, lines, (left, right) in zip(masks, rows, panels, strict=True):
            above = f"{mask.capitalize()} masks\n" if len(rows) > 1 else ""
            _panel(left, lines, c["depth"], "forward", above)
            _panel(right, lines, c["depth"], "backward", above)
        what = (
            f"{c['depth']} hidden layers of {c['width']} units, {NAMES.get(c['activation'], c['activation'])}, biases 0"
        )
        if c["density"] < 1:
            scaled = {line.rescale for line in result.lines}
            how = "" if len(scaled) > 1 else f", rescaled by {scaled.pop()}" if scaled != {None} else ", not rescaled"
            what += f"; {masks[0] + ' ' if len(masks) == 1 else ''}masks, density {c['density']:g}{how}"
        figure.suptitle(f"Variance through the layers at initialization: {what}", fontsize=16, weight="bold")
        nets = f"mean of {c['seeds']} nets, from least to greatest shaded" if c["seeds"] > 1 else "one net"
        handles = [
            Line2D([], [], color=COLOURS[i % 8], marker=MARKERS[i % 9], label=_named(line.label, masks))
            for i, line in enumerate(rows[0])
        ]
        styles = [
            Line2D([], [], color="#333333", label=f"measured: {nets}"),
            Line2D([], [], color="#333333", linestyle=(0, (4, 3)), linewidth=1.5, label="analytic, for wide layers"),
        ]
        figure.legend(handles=handles, loc="outside right center", title="variance of\nthe weights")
        figure.legend(handles=styles, loc="outside lower center", ncols=2)
        data = io.BytesIO()
        figure.savefig(data, format="png", dpi=150, metadata={"Software": None})
    return data.getvalue()


def _named(label: str, masks: list[str]) -> str:
    """A line's label without its mask, where every mask has panels of its own."""
    return label.replace(f", {masks[0]}", "") if len(masks) > 1 else label


def _panel(axes: Axes, lines: list[Line], depth: int, way: str, above: str) -> None:
    layers = range(1, depth + 1)
    low, high = math.inf, -math.inf
    for i, line in enumerate(lines):
        seen, expected = getattr(line, way), getattr(line, f"{way}_expected")
        colour, marker = COLOURS[i % 8], MARKERS[i % 9]
        # log10 of the values, so that 1e-300 and 1e300 fit one axis
        band = (seen.amin(0).log10(), seen.amax(0).log10())
        axes.fill_between(layers, *band, color=colour, alpha=0.16, linewidth=0)
        every = (i % 3, max(1, depth // 10))
        axes.plot(layers, seen.mean(0).log10(), color=colour, marker=marker, markevery=every)
        logs = [math.log10(v) if v > 0 else -math.inf for v in expected]
        axes.plot(layers, logs, color="#222222", linestyle=(0, (4, 3)), linewidth=1.3)
        shown = [v for v in (*band[0].tolist(), *band[1].tolist(), *logs) if math.isfinite(v)]
        low, high = min([low, *shown]), max([high, *shown])
    low, high = (low, high) if low <= high else (0.0, 0.0)  # no signal at all: every variance is 0
    axes.set_title(
        above
        + (
            r"Forward: variance of the pre-activations $f_k$"
            if way == "forward"
            else r"Backward: variance of the gradients $\partial\ell/\partial f_k$"
        )
    )
    axes.set_xlabel("hidden layer k" + ("" if way == "forward" else "    (the gradient travels from right to left)"))
    axes.set_ylabel("variance (log axis)")
    axes.set_xlim(1, depth)
    axes.xaxis.set_major_locator(FixedLocator([1, *range(10, depth + 1, 10)] if depth >= 20 else list(layers)))
    span = max(high - low, 1.0)
    step = next(s for s in (1, 2, 5, 10, 20, 25, 50, 100) if span / s <= 9 or s == 100)
    bottom, top = math.floor(low / step), math.ceil(high / step)
    axes.set_ylim(bottom * step, top * step)
    axes.yaxis.set_major_locator(FixedLocator([step * k for k in range(bottom, top + 1)]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"$10^{{{v:.0f}}}$"))
    axes.yaxis.set_minor_locator(NullLocator())
