"""Integer-only execution: rounding modes, codes that differ by depth, what every layer costs."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import FuncFormatter

from quantlab.plots.style import COLOURS, DATA_COLOUR, ERROR_COLOUR, MARKERS, caption

COLOURS.update({"single": "#0173b2", "double": "#d55e00"})
MARKERS.update({"single": "o", "double": "^"})
KIND_COLOURS = {
    "conv": "#7f9fbf", "linear": "#4c72b0", "add": "#dd8452", "average": "#55a868", "requantize": "#b0b0b0", "affine": "#8172b3",
}


def rounding_modes(errors, layers, text):
    """errors: rounding, error (stored minus exact, in codes, of one layer); layers: rounding, multiplier, share of codes that differ."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
    bins = np.linspace(-1, 1, 81)
    for mode, part in errors.groupby("rounding", sort=False):
        share = 100 / len(part)
        left.hist(part.error, bins=bins, weights=np.full(len(part), share), histtype="step", linewidth=1.6, color=COLOURS[mode], label=mode)
    for bound in (-0.5, 0.5):
        left.axvline(bound, color=COLOURS["float"], linestyle="--", linewidth=1)
    left.set(xlabel="stored - exact, in codes", ylabel="% of values", title="One layer: the nearest code lies between the lines")
    left.set_xticks([-1, -0.5, 0, 0.5, 1])
    for mode, part in layers.groupby("rounding", sort=False):
        right.plot(part.multiplier, 100 * part.share, MARKERS[mode], color=COLOURS[mode], label=mode, alpha=0.8)
    right.set(xscale="log", xlabel="multiplier M (largest of the layer)", ylabel="% of codes that differ")
    right.set_title("Every operation, fed the same codes")
    right.set_yscale("symlog", linthresh=1e-3)
    right.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    right.set_ylim(-2e-4, 100)
    right.legend(title="rounding", loc="center left", bbox_to_anchor=(1.0, 0.5))
    return caption(figure, text)


def codes_by_depth(frame, text):
    """frame: network, rounding, fed ("same" or "own" codes), order, share: how many codes differ from the simulation at every edge."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.8), sharey=True)
    titles = {"same": "Each operation fed the simulation's codes", "own": "End to end, fed its own codes"}
    widths = list(frame.network.unique())
    for panel, (fed, title) in zip(axes, titles.items()):
        for (network, mode), part in frame[frame.fed == fed].groupby(["network", "rounding"], sort=False):
            line = ("-", ":", "--")[widths.index(network) % 3]
            style = dict(marker=MARKERS[mode], markersize=4, color=COLOURS[mode], label=f"{network}, {mode}")
            panel.plot(part.order, 100 * part.share, line, **style)
        panel.set(xlabel="edges, in order of execution", title=title)
        panel.set_yscale("symlog", linthresh=1e-4)
        panel.set_ylim(-2e-5, 150)
        panel.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axes[0].set_ylabel("% of codes that differ")
    axes[1].legend(title="network, rounding", loc="center left", bbox_to_anchor=(1.0, 0.5))
    return caption(figure, text)


def layer_costs(report, text):
    """report: frame of IntegerModel.report: accumulator width, operations in bits and live activation bytes of every operation."""
    figure, axes = plt.subplots(3, 1, figsize=(10, 6.4), sharex=True)
    colours = [KIND_COLOURS.get(kind, DATA_COLOUR) for kind in report.kind]
    x = np.arange(len(report))
    axes[0].bar(x, report.accumulator_bits.fillna(0), color=colours)
    axes[0].axhline(32, color=ERROR_COLOUR, linestyle="--", linewidth=1)
    axes[0].set(ylabel="bits", title="Accumulator width that is needed (dashed: the 32 there are)", ylim=(0, 35))
    axes[1].bar(x, report.bops / 1e6, color=colours)
    axes[1].set(ylabel="millions", title="Operations in bits: multiplications x weight bits x input bits")
    axes[2].bar(x, report.live_bytes / 1000, color=colours)
    axes[2].set(ylabel="kB", title=f"Codes alive while it runs, packed (peak {report.live_bytes.max() / 1000:,.1f} kB)")
    axes[2].set_xticks(x, report.layer, rotation=90, fontsize=6.5)
    axes[2].set_xlim(-0.8, len(report) - 0.2)
    for panel in axes:
        panel.grid(axis="x", visible=False)
    handles = [plt.Rectangle((0, 0), 1, 1, color=KIND_COLOURS.get(kind, DATA_COLOUR)) for kind in report.kind.unique()]
    axes[0].legend(handles, report.kind.unique(), loc="center left", bbox_to_anchor=(1.0, 0.5))
    return caption(figure, text)
