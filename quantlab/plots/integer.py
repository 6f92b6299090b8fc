"""Integer-only execution: rounding modes, codes that differ by depth, what every layer costs."""

import matplotlib.pyplot as plt
import numpy as np

from quantlab.plots.page import caption, distinct, panels
from quantlab.plots.parts import in_order, legend, plain
from quantlab.plots.style import BLUE, DASHED, KIND_COLOURS, RED, colour_of, method_style, styled

FED = {"same": "Each operation fed the simulation's codes", "own": "End to end, own codes"}


@styled
def rounding_modes(errors, layers, text):
    """errors: rounding, error (stored - exact, in codes, of one layer); layers: rounding,
    multiplier, share (of codes that differ).
    """
    figure, (left, right) = panels(2, 10, 3.6)
    for mode in distinct(errors.rounding):
        error, part = errors.error[errors.rounding == mode], layers[layers.rounding == mode]
        look = dict(bins=np.linspace(-1, 1, 81), histtype="step", linewidth=1.6, label=mode)
        left.hist(error, weights=0 * error + 100 / len(error), color=colour_of(mode), **look)
        look = dict(linestyle="", label=mode, alpha=0.8) | method_style(mode)
        right.plot(part.multiplier, 100 * part.share, **look)
    for bound in (-0.5, 0.5):
        left.axvline(bound, **DASHED)
    left.set(xlabel="stored - exact, in codes", ylabel="% of values", xticks=[-1, -0.5, 0, 0.5, 1])
    left.set_title("One layer: the nearest code lies between the lines")
    right.set(xscale="log", xlabel="multiplier M (largest of the layer)")
    right.set(ylabel="% of codes that differ", title="Every operation, fed the same codes")
    _percent_axis(right, 1e-3)
    legend(right, "rounding")
    return caption(figure, text)


def _percent_axis(axes, smallest):
    """Logarithmic from `smallest` to 100 % and linear from there down to 0, which is to be seen."""
    axes.set_yscale("symlog", linthresh=smallest)
    axes.set_ylim(-0.3 * smallest, 150)
    plain(axes.yaxis)


@styled
def codes_by_depth(frame, text, titles=FED):
    """frame: network, rounding, fed, order, share (that differ). titles: fed -> its panel's."""
    figure, axes = panels(len(titles), 11, 3.8, sharey=True)
    lines = dict(zip(distinct(frame.network), ("-", ":", "--", "-.")))
    for panel, (fed, title) in zip(axes, titles.items()):
        groups = frame[frame.fed == fed].groupby(["network", "rounding"], sort=False)
        for (network, mode), part in groups:
            look = dict(linestyle=lines.get(network, "-"), markersize=4) | method_style(mode)
            panel.plot(part.order, 100 * part.share, label=f"{network}, {mode}", **look)
        panel.set_title(title)
        in_order(panel, "edges")
    _percent_axis(axes[0], 1e-4)
    axes[0].set_ylabel("% of codes that differ")
    legend(axes[-1], "network, rounding")
    return caption(figure, text)


@styled
def layer_costs(report, text):
    """report: frame of IntegerModel.report, a row an operation."""
    kinds = {kind: KIND_COLOURS.get(kind, BLUE) for kind in distinct(report.kind)}
    size, x = (max(10, 0.16 * len(report)), 6.4), range(len(report))
    figure, axes = plt.subplots(3, 1, figsize=size, sharex=True)
    alive = report.live_bytes / 1000
    rows = (
        ("bits", report.accumulator_bits.fillna(0), "Accumulator width (dashed: the 32 there are)"),
        ("millions", report.bops / 1e6, "Bit operations: products x weight bits x input bits"),
        ("kB", alive, f"Codes alive while it runs, packed (peak {alive.max():,.1f} kB)"),
    )
    for panel, (unit, values, title) in zip(axes, rows):
        panel.bar(x, values, color=[kinds[kind] for kind in report.kind])
        panel.set(ylabel=unit, title=title)
        panel.grid(axis="x", visible=False)
    axes[0].axhline(32, **DASHED | {"color": RED})
    axes[0].set_ylim(0, 35)
    axes[2].set_xticks(x, report.layer, rotation=90, fontsize=6.5)
    axes[2].set_xlim(-0.8, len(report) - 0.2)
    for kind, colour in kinds.items():
        axes[0].bar(0, 0, color=colour, label=kind)
    legend(axes[0])
    return caption(figure, text)
