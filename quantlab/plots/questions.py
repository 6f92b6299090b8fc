"""Answers to the original README's questions: dataflow, strips, clipping, heat map, two values."""

import itertools
import textwrap

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.patches import FancyBboxPatch, Rectangle

from quantlab.plots.page import caption, distinct, facets, panels
from quantlab.plots.parts import bars, densities, name_rows, whiskers
from quantlab.plots.style import (
    BLUE,
    DASHED,
    GREY,
    INK,
    RED,
    VARIANT_COLOURS,
    WIDTH_COLOURS,
    styled,
)

# Boxes by (column, row from the bottom): codes run right above, and left again below.
PLACES = {
    "weight code": (2, 2), "bias code": (3, 2), "input code": (0, 1), "minus zero-point": (1, 1),
    "sum of products": (2, 1), "plus bias": (3, 1), "multiplier": (4, 0),
    "times multiplier": (3, 0), "shifted right": (2, 0), "clamped: ReLU": (1, 0),
    "de-quantized": (0, 0),
}
MAIN = tuple(name for name in PLACES if name not in ("weight code", "bias code", "multiplier"))
SIDE = {"weight code": MAIN[2], "bias code": MAIN[3], "multiplier": MAIN[4]}


@styled
def dataflow(steps, text, title=""):
    """One conv-BN-ReLU in integers, from codes to codes and back to a real number; steps: step (of
    PLACES), container, low, high, bits (seen), worst_bits (NaN where it holds no integer), example
    and grid (texts; grid: the scale and zero-point that a step reads or brings in, or "").
    """
    rows = steps.set_index("step")
    figure, (axes,) = panels(1, 9.6, 6.2)
    for name, (column, line) in PLACES.items():
        _box(axes, rows.loc[name], 1.9 * column, 2.0 * line)
    for start, end in [*itertools.pairwise(MAIN), *SIDE.items()]:
        _join(axes, PLACES[start], PLACES[end])
    _width_legend(axes, 1.9 * 4, 5.4)
    axes.set(xlim=(-0.15, 9.25), ylim=(-0.15, 5.65))
    axes.set_title("\n".join(textwrap.wrap(title, 100)))
    axes.axis("off")
    return caption(figure, text)


def _box(axes, row, x, y):
    """One step, 1.5 wide and high, coloured by the width of the integers that hold it."""
    is_real = row.container.startswith("float")
    colour = "white" if is_real else WIDTH_COLOURS[int(row.container.lstrip("uint"))]
    look = dict(boxstyle="round,pad=0.04", facecolor=colour, edgecolor=GREY, linewidth=0.8)
    axes.add_patch(FancyBboxPatch((x, y), 1.5, 1.5, **look))
    middle = dict(ha="center", va="center", linespacing=1.35)
    axes.text(x + 0.75, y + 1.36, row.name, fontsize=9, fontweight="bold", **middle)
    form = ",.0f" if abs(row.low) + row.high < 1e8 else ".1e"
    form = ".2f" if is_real else form
    bits = "" if is_real else f"{row.bits:.0f} bits, at worst {row.worst_bits:.0f}"
    lines = (row.container, f"{row.low:{form}} to {row.high:{form}}", bits, row.grid,
             f"here: {row.example}")
    axes.text(x + 0.75, y + 0.6, "\n".join(line for line in lines if line), fontsize=7.5, **middle)


def _join(axes, start, end):
    """An arrow between neighbouring boxes, given by column and row."""
    (x, y), (to_x, to_y) = ((1.9 * column + 0.75, 2.0 * row + 0.75) for column, row in (start, end))
    right, up = np.sign(to_x - x), np.sign(to_y - y)
    ends = ((to_x - 0.82 * right, to_y - 0.82 * up), (x + 0.82 * right, y + 0.82 * up))
    look = dict(arrowstyle="-|>", color=INK, linewidth=1.2, shrinkA=0, shrinkB=0)
    axes.annotate("", *ends, arrowprops=look)


def _width_legend(axes, x, y):
    for i, (bits, colour) in enumerate(WIDTH_COLOURS.items()):
        look = dict(facecolor=colour, edgecolor=GREY, linewidth=0.6)
        axes.add_patch(Rectangle((x, y - 0.28 * i - 0.1), 0.28, 0.2, **look))
        axes.text(x + 0.38, y - 0.28 * i, f"held in {bits} bits", fontsize=7.5, va="center")


@styled
def minmax_strip(values, ranges, bits, text, xlabel="weight"):
    """Which values share a code. values: numpy [n]; ranges: name, high (of a symmetric range)."""
    qmax = 2 ** (bits - 1) - 1
    extent = np.abs(values).max() * 1.04
    names = distinct(ranges.name)
    size = (10, 2.3 * len(names))
    figure, axes = plt.subplots(len(names), 1, figsize=size, squeeze=False)
    for panel, row in zip(axes[:, 0], ranges.itertuples()):
        scale = row.high / qmax
        _marks(panel, values, color=BLUE, markeredgewidth=0.5)
        for code in range(-qmax, qmax + 1):
            place = code / qmax * extent * 0.9
            panel.plot([code * scale, place], [0.9, 0.18], color="#888888", linewidth=0.8)
            if qmax <= 31 or code % 16 == 0:  # as many numbers as there is room for
                panel.text(place, 0.0, str(code), ha="center", va="center", fontsize=9)
        beyond = values[np.abs(values) > row.high + scale / 2]
        _marks(panel, beyond, color=RED, markeredgewidth=0.8)
        for value in {beyond.min(), beyond.max()} if len(beyond) else ():
            arrow = dict(arrowstyle="-|>", color=RED, linewidth=1.2)
            panel.annotate("", (np.sign(value) * row.high, 0.9), (value, 0.9), arrowprops=arrow)
        saturate = f"{len(beyond):,} of {len(values):,} values saturate"
        panel.set_title(f"{row.name}: ±{row.high:.3g}, step {scale:.3g}, {saturate}")
        panel.set(xlim=(-extent, extent), ylim=(-0.15, 1.2), yticks=[])
        panel.set_xlabel(f"{xlabel} (marks), and the codes below")
        panel.grid(False)
        panel.spines["left"].set_visible(False)
    return caption(figure, text)


def _marks(panel, values, **style):
    panel.plot(values, np.ones(len(values)), "|", markersize=14, rasterized=True, **style)


@styled
def clipped_histograms(stats, coded, text, xlabel="activation"):
    """An edge before (EdgeStats) and after quantization; coded: name -> (values of the codes, float
    [K], counts [K], upper end of the range).
    """
    count = 1 + len(coded)
    figure, (before, *after) = panels(count, 3.5 * count, 3.5, sharex=True, sharey=True)
    x, density = densities(stats, 128)
    width = np.diff(x).max(initial=stats.width)
    before.bar(x, density * width, width, color=BLUE)
    title = f"before: float\n(and {stats.zeros / max(stats.count, 1):.0%} exact zeros)"
    before.set(ylabel="fraction of the values (log scale)", yscale="log")
    before.set_title(title, fontsize=10)
    before.set_xlabel(xlabel)
    for panel, (name, (values, number, high)) in zip(after, coded.items()):
        fraction = np.asarray(number) / stats.count
        used = fraction > 0
        look = dict(color=RED, linewidth=1.6)
        panel.vlines(np.asarray(values)[used], 0.3 / stats.count, fraction[used], **look)
        panel.axvline(high, **DASHED)
        entropy = -(fraction[used] * np.log2(fraction[used])).sum()
        codes = f"{used.sum()} of {len(values)} codes used, entropy {entropy:.2f} bits"
        panel.set_title(f"{name}: up to {high:.3g} (dashed)\n{codes}", fontsize=10)
        panel.set_xlabel(xlabel)
    return caption(figure, text)


@styled
def error_by_range(curve, text):
    """curve: part (that is quantized), share (of the whole range), measured (where), sqnr (dB)."""
    figure, parts = facets(curve, "part", 5, 3.6)
    looks = ((BLUE, "--"), (RED, ":"), (INK, "-"))
    for panel, name, part in parts:
        for (colour, style), (measured, line) in zip(looks, part.groupby("measured", sort=False)):
            best = line.loc[line.sqnr.idxmax()]
            label = f"{measured}: best at {best.share:.0%} of the range"
            panel.plot(line.share, line.sqnr, style, color=colour, label=label)
            panel.plot(best.share, best.sqnr, "o", color=colour)
        panel.set(xlabel="clip range, fraction of the whole", title=f"Quantized: {name}")
        panel.set_ylabel("signal to quantization noise, dB")
        panel.legend(loc="lower center", title="error measured at")
    return caption(figure, text)


@styled
def bits_heatmap(table, text):
    """table: weight_bits, act_bits, top1 (%), drop (points)."""
    figure, axes = panels(2, 10, 4)
    sides = (("top1", "Blues", 100, "Top-1 accuracy, %"),
             ("drop", "Reds", None, "Points lost against float"))
    for panel, (column, colours, top, title) in zip(axes, sides):
        grid = table.pivot_table(index="weight_bits", columns="act_bits", values=column)
        grid = grid.sort_index(ascending=False).sort_index(axis=1).astype(float)
        look = dict(cmap=colours, vmin=0, vmax=top, annot=True, fmt=".1f", square=True)
        sns.heatmap(grid, ax=panel, cbar_kws={"label": title}, **look)
        panel.tick_params(axis="y", rotation=0)
        panel.set(xlabel="bits of the activations", ylabel="bits of the weights", title=title)
        panel.grid(False)
    return caption(figure, text)


@styled
def variant_drops(table, text, title=""):
    """table: bits, variant, drop, drop_low, drop_high (points, 95 %)."""
    variants, columns = distinct(table.variant), ["drop", "drop_low", "drop_high"]
    table = table.sort_values("bits", ascending=False, kind="stable")
    size = dict(width=3, height=0.5 * len(variants) + 1.8, extra=2.4)
    figure, parts = facets(table, "bits", sharey=True, **size)
    for panel, bits, part in parts:
        part = part.groupby("variant")[columns].mean().reindex(variants)
        bars(panel, range(len(variants)), part["drop"], whiskers(part), VARIANT_COLOURS)
        panel.set(title=f"{bits} bits", xlabel="points lost")
    name_rows(figure.axes[0], variants)
    figure.suptitle(title, fontsize=11)
    return caption(figure, text)


@styled
def two_values(pairs, code, text):
    """pairs: name -> (QParams before the ReLU, behind it): what every code is worth under both."""
    names = distinct(pairs)
    figure, axes = panels(len(names), 5 * len(names), 3.8)
    looks = (("before the ReLU", "--", BLUE, (8, -14)), ("behind the ReLU", "-", RED, (-44, 10)))
    for panel, name in zip(axes, names):
        values = []
        for q, (where, style, colour, offset) in zip(pairs[name], looks):
            scale, zero_point = q.scale.item(), q.zero_point.item()
            codes, value = np.arange(q.qmin, q.qmax + 1), scale * (code - zero_point)
            label = f"{where}: scale {scale:.4f}, zero-point {zero_point}"
            panel.plot(codes, scale * (codes - zero_point), style, color=colour, label=label)
            panel.plot(code, value, "o", color=colour)
            values.append(value)
            place = dict(xytext=offset, textcoords="offset points", fontweight="bold")
            panel.annotate(f"{value:.3f}", (code, value), color=colour, **place)
        panel.vlines(code, min(values), max(values), color=INK, linewidth=0.8, linestyle=":")
        panel.axhline(0, color=INK, linewidth=0.8)
        panel.set(xlabel="code", ylabel="real value", xticks=[0, 64, 128, code, 255])
        panel.set_title(f"{name}: the two values of code {code}")
        panel.legend(loc="lower right", fontsize=8)
    return caption(figure, text)
