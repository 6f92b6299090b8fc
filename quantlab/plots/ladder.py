"""The original experiment beside ours: its rows, the way from one to the other, and what every single change is worth."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import FuncFormatter

from quantlab.plots.style import COLOURS, DATA_COLOUR, ERROR_COLOUR, MARKERS, caption

WAYS = {"the original's": (COLOURS["float"], "s"), "ours, its way": (ERROR_COLOUR, "D"), "ours, the right way": (COLOURS["histogram"], "o")}
COLOURS.update({"hist": ERROR_COLOUR, "fake-hist": COLOURS["percentile"], "ours": COLOURS["histogram"]})
MARKERS.update({"hist": "D", "fake-hist": MARKERS["percentile"], "ours": MARKERS["histogram"]})


def original_rows(table, text):
    """table: quantization, way (a key of WAYS), top1 (%), drop (points): accuracy and what is lost, one line a row of the original's table."""
    names = list(dict.fromkeys(table.quantization))
    figure, (left, right) = plt.subplots(1, 2, figsize=(11.5, 0.42 * len(names) + 1.7), sharey=True)
    for offset, (way, (colour, marker)) in zip((-0.2, 0, 0.2), WAYS.items()):
        part = table[table.way == way]
        height = [names.index(n) + offset for n in part.quantization]
        style = dict(color=colour, markersize=7, linestyle="none", label=way)
        left.plot(part.top1, height, marker=marker, **style)
        right.plot(part["drop"].clip(lower=-0.2), height, marker=marker, **style)
    left.set(xlabel="top-1 accuracy, %", xlim=(0, 102), title="Accuracy")
    left.set_yticks(range(len(names)), names)
    left.invert_yaxis()
    right.set_xscale("symlog", linthresh=0.5)
    right.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    right.set_xticks([0, 0.5, 1, 2, 5, 10, 20, 50, 100])
    right.set(xlabel="points lost against the same network in float (log scale)", title="Points lost", xlim=(-0.25, 110))
    right.minorticks_off()
    right.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return caption(figure, text)


def waterfall(table, seeds, text):
    """table: bits, step, top1, change, low, high (points, 95 %), in order; seeds: bits, step, top1 of each seed: one panel a width.

    A bar goes from the accuracy before a step to the accuracy after it; dots are the calibration seeds.
    """
    widths = list(dict.fromkeys(table.bits))
    names = list(dict.fromkeys(table.step))
    figure, axes = plt.subplots(1, len(widths), figsize=(11, 0.42 * len(names) + 1.5), sharey=True)
    for panel, bits in zip(np.atleast_1d(axes), widths):
        part, dots = table[table.bits == bits].reset_index(drop=True), seeds[seeds.bits == bits]
        before = (part.top1 - part.change).fillna(0)
        colours = [COLOURS["float"] if np.isnan(c) else COLOURS["histogram"] if c >= 0 else ERROR_COLOUR for c in part.change]
        panel.barh(part.index, part.top1 - before, left=before, color=colours, height=0.62)
        for i, row in part.iterrows():
            panel.plot([row.top1] * 2, [i - 0.31, min(i + 1.31, len(part) - 0.69)], color=COLOURS["float"], linewidth=0.8)
            ends = [row.top1, before[i], *dots.top1[dots.step == row.step]]  # a label clears the dots too
            if np.isnan(row.change):
                x, colour = (0, "white") if row.top1 > 25 else (max(ends), "black")
                panel.annotate(f"{row.top1:.1f} %", (x, i), xytext=(6, 0), textcoords="offset points", color=colour, fontsize=7.5, va="center")
                continue
            left, right = min(ends), max(ends)
            x, side, colour = (right, "left", "black") if right < 62 else (left, "right", "black") if left > 38 else ((left + right) / 2, "center", "white")
            panel.annotate(f"{row.change:+.1f} [{row.low:+.1f}, {row.high:+.1f}]", (x, i), xytext=({"left": 8, "right": -8, "center": 0}[side], 0),
                           textcoords="offset points", fontsize=7.5, va="center", ha=side, color=colour)
        panel.plot(dots.top1, [names.index(s) for s in dots.step], "o", color="white", markeredgecolor="black", markersize=3.5, linestyle="none", markeredgewidth=0.7)
        panel.set(xlabel="top-1 accuracy, %", xlim=(0, 100), title=f"{bits} bits: {part.top1.iloc[0]:.1f} % to {part.top1.iloc[-1]:.1f} %")
        panel.grid(axis="y", visible=False)
    np.atleast_1d(axes)[0].set_yticks(range(len(names)), names)
    np.atleast_1d(axes)[0].invert_yaxis()
    return caption(figure, text)


def repair_bars(table, text):
    """table: repair, end ("the original plus this" or "ours minus this"), worth, low, high (points, 95 %): two bars a repair."""
    ends = {"the original plus this": ERROR_COLOUR, "ours minus this": COLOURS["histogram"]}
    names = list(dict.fromkeys(table.repair))
    figure, axes = plt.subplots(figsize=(10, 0.55 * len(names) + 1.5))
    for offset, (end, colour) in zip((-0.19, 0.19), ends.items()):
        part = table[table.end == end]
        height = np.array([names.index(n) for n in part.repair]) + offset
        axes.barh(height, part.worth, height=0.36, color=colour, label=end)
        axes.errorbar(part.worth, height, xerr=[part.worth - part.low, part.high - part.worth], fmt="none", ecolor=COLOURS["float"], elinewidth=1)
        for y, row in zip(height, part.itertuples()):
            axes.annotate(f"{row.worth:+.1f}", (max(row.high, 0), y), xytext=(5, 0), textcoords="offset points", fontsize=8, va="center")
    axes.axvline(0, color=COLOURS["float"], linewidth=0.8)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.margins(x=0.08)
    axes.grid(axis="y", visible=False)
    axes.set(xlabel="what the repair is worth, points of top-1 accuracy", title="Every repair alone, from both ends")
    axes.legend(loc="best")
    return caption(figure, text)


def code_strips(stats, codes, text, title="", unit="value"):
    """The histogram of an edge (EdgeStats) above the values that every method's codes stand for; codes: name -> float tensor [levels].

    The share of the non-zero values that a method rounds to zero is written beside its codes.
    """
    centers, counts = (v.numpy() for v in stats.histogram())
    groups = max(1, len(centers) // 200)
    edges = np.arange(0, len(centers), groups)
    density = np.add.reduceat(counts, edges) / (stats.count * stats.width * groups)
    figure, (above, below) = plt.subplots(2, 1, figsize=(9.5, 2.6 + 0.45 * len(codes)), sharex=True, height_ratios=[2.4, 0.45 * len(codes)])
    above.fill_between(centers[edges] + stats.width * (groups - 1) / 2, density, step="mid", color=DATA_COLOUR, alpha=0.6, linewidth=0)
    above.set(yscale="log", ylabel="density (log scale)", title=title)
    right = max([stats.maximum, *(float(v.max()) for v in codes.values())]) * 1.02
    for i, (name, values) in enumerate(codes.items()):
        step = float(values.diff().min())
        lost = counts[np.abs(centers) < step / 2].sum() / max(counts.sum(), 1)
        colour = COLOURS.get(name, ERROR_COLOUR)
        below.plot(values, [i] * len(values), "|", color=colour, markersize=14, markeredgewidth=1.8)
        above.axvline(float(values.max()), color=colour, linestyle="--", linewidth=1.2)
        below.annotate(f"{lost:.0%} become 0", (1.0, i), xycoords=("axes fraction", "data"), xytext=(6, 0), textcoords="offset points", fontsize=9, va="center")
    below.set_yticks(range(len(codes)), list(codes))
    below.set(xlabel=unit, ylim=(len(codes) - 0.5, -0.5), xlim=(min(float(v.min()) for v in codes.values()) * 1.02 - 0.02 * right, right))
    below.grid(axis="y", visible=False)
    return caption(figure, text)
