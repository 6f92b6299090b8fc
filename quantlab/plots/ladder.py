"""The original experiment and ours: its rows, the way between, what every change is worth."""

import matplotlib.pyplot as plt
import numpy as np

from quantlab.plots.page import caption, distinct, facets, panels
from quantlab.plots.parts import bars, histogram, legend, lost_scale, name_rows, note, whiskers
from quantlab.plots.style import DASHED, GREEN, INK, RED, colour_of, method_style, styled

WAYS = ("the original's", "ours, its way", "ours, the right way")


@styled
def original_rows(table, text):
    """table: quantization, way (of WAYS), top1 (%), drop, low, high (points, paired; NaN where no
    interval is known), in the original's order, float first. Beside each mark the accuracy.
    """
    names = distinct(table.quantization)
    is_float = table.quantization == names[0]  # what others are measured against
    table = table.assign(low=table.low.mask(is_float), high=table.high.mask(is_float))
    figure, (axes,) = panels(1, 10, 0.58 * len(names) + 1.5)
    for offset, way in zip((-0.26, 0, 0.26), WAYS):
        part = table[table.way == way]
        height = [names.index(name) + offset for name in part.quantization]
        lengths = whiskers(part, "drop", "low", "high")
        look = dict(markersize=6, linestyle="none", elinewidth=1.2, capsize=2, label=way)
        look |= method_style(way)
        axes.errorbar(part["drop"], height, xerr=np.nan_to_num(lengths), **look)
        for row, place in zip(part.itertuples(), height):
            end = np.nanmax([row.drop, row.high])
            note(axes, f"{row.top1:.2f} %", end, place, 7, fontsize=7.5)
    name_rows(axes, names)
    lost_scale(axes.xaxis, min(table.low.min(), 0), max(table["drop"].max(), 1) * 1.6)
    axes.axvline(0, **DASHED)
    for row in range(1, len(names)):
        axes.axhline(row - 0.5, color=INK, linewidth=0.4, alpha=0.3)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("points lost against the same network in float (log scale beyond 0.5)")
    axes.set_title("Points lost, with 95 % intervals; beside each mark its top-1 accuracy")
    legend(axes)
    return caption(figure, text)


@styled
def waterfall(table, seeds, text):
    """table: bits, step, top1, change, low, high (points, 95 %; NaN where no interval is known), in
    order, the last step ours; seeds: bits, step, top1.

    A bar goes from the accuracy before a step to the accuracy after it; dots are the seeds. What a
    step changed stands right of the panel, clear of bars and dots.
    """
    names = distinct(table.step)
    figure, parts = facets(table, "bits", 5.5, 0.42 * len(names) + 1.7, extra=1.5, sharey=True)
    for panel, bits, part in parts:
        dots, before = seeds[seeds.bits == bits], (part.top1 - part.change).fillna(0)
        colours = np.where(part.change >= 0, GREEN, RED)
        colours[part.change.isna()] = INK  # where the ladder starts
        panel.barh(part.index, part.top1 - before, 0.62, left=before, color=colours)
        for i, row in part.iterrows():
            steps = [i - 0.31, min(i + 1.31, len(part) - 0.69)]
            panel.plot([row.top1] * 2, steps, color=INK, linewidth=0.8)
            _label_step(panel, i, row)
        look = dict(color="white", markeredgecolor="black", markeredgewidth=0.7, markersize=3.5)
        panel.plot(dots.top1, [names.index(step) for step in dots.step], "o", **look)
        panel.set(xlabel="top-1 accuracy, %", xlim=(0, 100))
        panel.set_title(f"{bits} bits: {part.top1.iloc[0]:.1f} % to {part.top1.iloc[-1]:.1f} %")
        panel.grid(axis="y", visible=False)
        beside = dict(xycoords=("axes fraction", "data"), fontsize=7.5, fontweight="bold")
        note(panel, "points", 1.0, -0.75, 6, **beside)
    name_rows(figure.axes[0], [*names[:-1], f"{names[-1]}\n= ours"])
    return caption(figure, text)


def _label_step(panel, i, row):
    """What a step changed, in a column right of the panel; of the first its accuracy."""
    if np.isnan(row.change):
        text = f"from {row.top1:.1f} %"
    else:
        text = f"{row.change:+.1f}"
        text += "" if np.isnan(row.low) else f" [{row.low:+.1f}, {row.high:+.1f}]"
    note(panel, text, 1.0, i, 6, xycoords=("axes fraction", "data"), fontsize=7.5)


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
