"""The original experiment and ours: its rows, the way between, what every change is worth."""

import matplotlib.pyplot as plt
import numpy as np

from quantlab.plots.page import caption, distinct, facets, panels
from quantlab.plots.parts import bars, histogram, legend, name_rows, note, plain, whiskers
from quantlab.plots.style import DASHED, GREEN, INK, RED, colour_of, method_style, styled

WAYS = ("the original's", "ours, its way", "ours, the right way")


@styled
def original_rows(table, text):
    """table: quantization, way (of WAYS), top1 (%), drop (points), in the original's order."""
    names = distinct(table.quantization)
    figure, (left, right) = panels(2, 11.5, 0.42 * len(names) + 1.7, sharey=True)
    for offset, way in zip((-0.2, 0, 0.2), WAYS):
        part = table[table.way == way]
        height = [names.index(name) + offset for name in part.quantization]
        look = dict(markersize=7, linestyle="none", label=way) | method_style(way)
        left.plot(part.top1, height, **look)
        right.plot(part["drop"].clip(lower=-0.2), height, **look)
    left.set(xlabel="top-1 accuracy, %", xlim=(0, 102), title="Accuracy")
    name_rows(left, names)
    right.set_xscale("symlog", linthresh=0.5)
    right.set_xticks([0, 0.5, 1, 2, 5, 10, 20, 50, 100])
    plain(right.xaxis)
    right.set(xlabel="points lost (log scale beyond 0.5)", xlim=(-0.25, 110))
    right.set_title("Points lost against the same network in float")
    legend(right)
    return caption(figure, text)


@styled
def waterfall(table, seeds, text):
    """table: bits, step, top1, change, low, high (points, 95 %), in order; seeds: bits, step, top1.

    A bar goes from the accuracy before a step to the accuracy after it; dots are the seeds.
    """
    names = distinct(table.step)
    figure, parts = facets(table, "bits", 5.5, 0.42 * len(names) + 1.5, sharey=True)
    for panel, bits, part in parts:
        dots, before = seeds[seeds.bits == bits], (part.top1 - part.change).fillna(0)
        colours = np.where(part.change >= 0, GREEN, RED)
        colours[part.change.isna()] = INK  # where the ladder starts
        panel.barh(part.index, part.top1 - before, 0.62, left=before, color=colours)
        for i, row in part.iterrows():
            steps = [i - 0.31, min(i + 1.31, len(part) - 0.69)]
            panel.plot([row.top1] * 2, steps, color=INK, linewidth=0.8)
            drawn = [row.top1, before[i], *dots.top1[dots.step == row.step]]
            _label_step(panel, i, row, min(drawn), max(drawn))
        look = dict(color="white", markeredgecolor="black", markeredgewidth=0.7, markersize=3.5)
        panel.plot(dots.top1, [names.index(step) for step in dots.step], "o", **look)
        panel.set(xlabel="top-1 accuracy, %", xlim=(0, 100))
        panel.set_title(f"{bits} bits: {part.top1.iloc[0]:.1f} % to {part.top1.iloc[-1]:.1f} %")
        panel.grid(axis="y", visible=False)
    name_rows(figure.axes[0], names)
    return caption(figure, text)


def _label_step(panel, i, row, left, right):
    """What a step changed, clear of all that is drawn from `left` to `right` in its row."""
    text = f"{row.change:+.1f} [{row.low:+.1f}, {row.high:+.1f}]"
    if np.isnan(row.change):
        text = f"{row.top1:.1f} %"
    if right < 62:
        note(panel, text, right, i, 8, fontsize=7.5)
    elif np.isnan(row.change):
        note(panel, text, 0, i, 6, fontsize=7.5, color="white")
    elif left > 38:
        note(panel, text, left, i, -8, fontsize=7.5)
    else:  # a long bar that leaves no room at its sides
        note(panel, text, (left + right) / 2, i, 0, fontsize=7.5, color="white")


@styled
def repair_bars(table, text):
    """table: repair, end ("the original plus this", "ours minus this"), worth, low, high."""
    names = distinct(table.repair)
    figure, (axes,) = panels(1, 10, 0.55 * len(names) + 1.5)
    ends = (("the original plus this", RED, -0.2), ("ours minus this", GREEN, 0.2))
    for end, colour, offset in ends:
        part = table[table.end == end]
        rows = [names.index(name) + offset for name in part.repair]
        bars(axes, rows, part.worth, whiskers(part, "worth", "low", "high"), colour, 0.36, end)
    name_rows(axes, names)
    axes.set(xlabel="what the repair is worth, points of top-1 accuracy")
    axes.set_title("Every repair alone, from both ends")
    legend(axes)
    return caption(figure, text)


@styled
def code_strips(stats, codes, text, title="", xlabel="value"):
    """An edge (EdgeStats) above the values that every method's codes stand for, and the fraction of
    its non-zero values that become zero; codes: name -> float tensor [levels].
    """
    names, height = distinct(codes), 0.45 * len(codes)
    options = dict(figsize=(9.5, 2.6 + height), sharex=True, height_ratios=[2.4, height])
    figure, (above, below) = plt.subplots(2, 1, **options)
    histogram(above, stats)
    above.set_title(title)
    centers, counts = (v.numpy() for v in stats.histogram())
    for i, (name, values) in enumerate(codes.items()):
        lost = counts[np.abs(centers) < float(values.diff().min()) / 2].sum() / max(counts.sum(), 1)
        look = dict(color=colour_of(name), markersize=14, markeredgewidth=1.8)
        below.plot(values, [i] * len(values), "|", **look)
        above.axvline(float(values.max()), **DASHED | {"color": colour_of(name)})
        note(below, f"{lost:.0%} become 0", 1.0, i, 6, xycoords=("axes fraction", "data"))
    name_rows(below, names)
    low = min(stats.minimum, *(float(values.min()) for values in codes.values()))
    high = max(stats.maximum, *(float(values.max()) for values in codes.values()))
    margin = 0.02 * (high - low)
    below.set(xlabel=xlabel, xlim=(low - margin, high + margin))
    below.grid(axis="y", visible=False)
    return caption(figure, text)
