"""Accuracy, size and speed by method, bits and calibration images."""

import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, MaxNLocator

from quantlab.plots.style import COLOURS, DATA_COLOUR, ERROR_COLOUR, MARKERS, caption


def method_bars(table, text):
    """table: method, top1 (%), bytes, images_per_s: accuracy, size and throughput side by side, float first."""
    figure, axes = plt.subplots(1, 3, figsize=(10, 0.55 * len(table) + 1.5), sharey=True)
    colours = [COLOURS.get(m, DATA_COLOUR) for m in table.method]
    panels = (("top1", "top-1 accuracy, %", 1), ("bytes", "weights as stored, kB", 1e-3), ("images_per_s", "throughput, images/s", 1))
    for panel, (column, label, unit) in zip(axes, panels):
        values = table[column] * unit
        bars = panel.barh(table.method, values, color=colours, height=0.6)
        panel.bar_label(bars, [f" {v:,.2f}" if column == "top1" else f" {v:,.0f}" for v in values], fontsize=9)
        panel.set(xlabel=label, xlim=(0, 1.25 * (100 if column == "top1" else values.max())))
        panel.set_xticks([0, 25, 50, 75, 100]) if column == "top1" else panel.xaxis.set_major_locator(MaxNLocator(4))
        panel.grid(axis="y", visible=False)
    axes[0].invert_yaxis()
    return caption(figure, text)


def accuracy_by_bits(table, text, bits_label="bits of weights and activations"):
    """table: bits, observer, top1 (%), fp32_top1; seeds become a band. The left panel shows all, the right one what is lost at 8 to 4 bits."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
    for observer, part in table.groupby("observer", sort=False):
        means = part.groupby("bits").agg(top1=("top1", "mean"), low=("top1", "min"), high=("top1", "max"), drop=("drop", "mean"))
        style = dict(color=COLOURS.get(observer, ERROR_COLOUR), marker=MARKERS.get(observer, "o"), label=observer)
        left.plot(means.index, means.top1, **style)
        left.fill_between(means.index, means.low, means.high, color=style["color"], alpha=0.15, linewidth=0)
        right.plot(means.index, means["drop"], **style)
    left.axhline(table.fp32_top1.iloc[0], color=COLOURS["float"], linestyle="--", label="float")
    left.set(xlabel=bits_label, ylabel="top-1 accuracy, %", title="Accuracy", ylim=(0, 102))
    right.set(xlabel=bits_label, ylabel="points lost (log scale)", title="Points lost against float")
    right.set_yscale("symlog", linthresh=0.5)
    right.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    right.set_yticks([0, 0.25, 0.5, 1, 2, 5, 10, 20, 50])
    for panel in (left, right):
        panel.set_xticks(sorted(table.bits.unique()))
        panel.invert_xaxis()
    left.legend(loc="lower left")
    return caption(figure, text)


def accuracy_by_images(table, text):
    """table: observer, n, seed, top1 (%): mean over seeds, with the range between them."""
    figure, axes = plt.subplots(figsize=(6.4, 3.6))
    for observer, part in table.groupby("observer", sort=False):
        groups = part.groupby("n").top1
        axes.plot(groups.mean().index, groups.mean(), color=COLOURS[observer], marker=MARKERS[observer], label=observer)
        axes.fill_between(groups.mean().index, groups.min(), groups.max(), color=COLOURS[observer], alpha=0.15, linewidth=0)
    axes.set(xscale="log", xlabel="calibration images", ylabel="top-1 accuracy, %", title="How many images are enough?")
    axes.set_xticks(sorted(table.n.unique()), [f"{n:,}" for n in sorted(table.n.unique())])
    axes.minorticks_off()
    axes.legend()
    return caption(figure, text)
