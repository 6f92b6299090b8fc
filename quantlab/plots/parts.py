"""What several figures share: rows with names, bars, notes, histograms, error curves, legends."""

import numpy as np
from matplotlib.ticker import MaxNLocator, NullFormatter, NullLocator

from quantlab.plots.style import BLUE, INK, RED

LOST_STEPS = (0.25, 0.5, 1, 2, 5, 10, 20, 50, 100)


def name_rows(axes, names, **style):
    """The first name at the top, a row each: 0, 1, 2 …"""
    axes.set_yticks(range(len(names)), names, **style)
    axes.set_ylim(len(names) - 0.5, -0.5)


def open_rows(axes):
    """The names of the rows alone: no axis line, no ticks beside them, no lines across."""
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)


def plain(axis):
    """Ticks of a logarithmic axis as 0.5 and 20, not as powers of ten; no numbers between them."""
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(NullFormatter())


def lost_scale(axis, low, high, steps=LOST_STEPS, linear=0.5):
    """Points lost on an axis that is linear up to `linear` and logarithmic beyond, so that an
    interval may reach below zero; from `low` (at most 0) to `high`, with ticks at `steps`.
    """
    axes, name = axis.axes, axis.axis_name
    getattr(axes, f"set_{name}scale")("symlog", linthresh=linear)
    axis.set_ticks([-step for step in reversed(steps)] + [0, *steps])
    plain(axis)
    axis.set_minor_locator(NullLocator())
    getattr(axes, f"set_{name}lim")(1.2 * low - 0.1, 1.3 * high)


def in_order(axes, things):
    """The horizontal axis counts layers or edges: whole numbers."""
    axes.set_xlabel(f"{things}, in order of execution")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def note(axes, text, x, y, points=5, **style):
    """A text right of a point at that distance in points, left of it when negative, on it at 0."""
    side = {1: "left", -1: "right", 0: "center"}[np.sign(points)]
    options = dict(fontsize=8, va="center", ha=side, annotation_clip=False) | style
    axes.annotate(text, (x, y), xytext=(points, 0), textcoords="offset points", **options)


def legend(axes, title=None):
    """The legend right of the panel."""
    axes.legend(title=title, loc="upper left", bbox_to_anchor=(1.0, 1.0), alignment="left")


def whiskers(table, value="drop", low="drop_low", high="drop_high"):
    """Lengths [2, n] of the intervals around a value, for matplotlib's error bars."""
    return np.abs([table[value] - table[low], table[high] - table[value]])


def bars(axes, rows, values, lengths, colours, height=0.6, label=None):
    """Horizontal bars from zero in the given rows, with whiskers and the value behind each."""
    lines = dict(ecolor=INK, capsize=3, elinewidth=1)
    axes.barh(rows, values, height, xerr=lengths, color=colours, error_kw=lines, label=label)
    for row, value, end in zip(rows, values, values + lengths[1]):
        note(axes, f"{value:+.2f}", max(end, 0), row)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.margins(x=0.25)  # room for the numbers
    axes.grid(axis="y", visible=False)


def densities(stats, bins=200):
    """(x, density) of an EdgeStats, neighbouring bins added until `bins` to twice as many remain;
    empty where there are only zeros.
    """
    centers, counts = (v.numpy() for v in stats.histogram())
    if not len(counts):
        return np.zeros(0), np.zeros(0)
    starts = np.arange(0, len(centers), max(1, len(centers) // bins))
    sizes = np.diff(np.append(starts, len(centers)))
    density = np.add.reduceat(counts, starts) / (stats.count * stats.width * sizes)
    return np.add.reduceat(centers, starts) / sizes, density


def histogram(axes, stats, limits=None):
    """An EdgeStats on a logarithmic axis, red beyond the limits (low, high); returns the lowest and
    the highest density drawn, whatever they be where all values are zero.
    """
    x, density = densities(stats)
    if not len(x):
        axes.text(0.5, 0.5, "only zeros", ha="center", transform=axes.transAxes)
        return 0.1, 1.0
    floor, top = density[density > 0].min() / 2, density.max()
    low, high = limits or (-np.inf, np.inf)
    inside = (x >= low) & (x <= high)
    sides = {BLUE: (inside, "values with a code near them"), RED: (~inside, "clipped")}
    for colour, (part, label) in sides.items():
        height = np.where(part, density, floor).clip(floor)
        look = dict(step="mid", color=colour, alpha=0.65, linewidth=0)
        axes.fill_between(x, floor, height, label=label if limits else None, **look)
    axes.set(yscale="log", ylabel="density (log scale)", ylim=(floor, 3 * top))
    return floor, top


def error_curves(axes, scales, clipping, rounding):
    """Clipping, rounding and their sum, as a range is scaled; returns the sum."""
    total = clipping + rounding
    axes.plot(scales, clipping, color=RED, linestyle=":", label="clipping")
    axes.plot(scales, rounding, color=BLUE, linestyle="--", label="rounding")
    axes.plot(scales, total, color=INK, label="sum")
    if (total > 0).any():
        axes.set(yscale="log", ylim=(total[total > 0].min() / 30, total.max() * 3))
    return total
