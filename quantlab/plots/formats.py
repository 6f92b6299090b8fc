"""Number formats side by side: their values on one axis, their errors, what they cost a network."""

import seaborn as sns

from quantlab.plots.page import caption, distinct, panels
from quantlab.plots.parts import lost_scale, name_rows, note, open_rows, whiskers
from quantlab.plots.style import BLUE, DASHED, INK, RED, method_style, styled


@styled
def value_grids(table, text):
    """table: format, bits, value, subnormal (bool): the positive values of every format, each
    drawn as a fraction of its largest, as a scale can be chosen freely.
    """
    names = distinct(table.format)
    figure, (axes,) = panels(1, 9, 0.42 * len(names) + 1.6)
    for row, name in enumerate(names):
        part = table[table.format == name]
        fraction = part.value / part.value.max()
        for colour, shown in ((BLUE, ~part.subnormal), (RED, part.subnormal)):
            axes.vlines(fraction[shown], row - 0.33, row + 0.33, color=colour, linewidth=0.7)
        words = f"{len(part)} from {part.value.min():.3g} to {part.value.max():,g}"
        note(axes, words, 1, row, points=8)
    for colour, label in ((BLUE, "normal"), (RED, "subnormal: one step, as integers")):
        axes.plot([], [], "|", color=colour, markersize=9, markeredgewidth=1.5, label=label)
    bits = table.groupby("format", sort=False).bits.first()
    name_rows(axes, [f"{name}, {width} bits" for name, width in bits.items()])
    axes.set_xscale("log", base=2)
    axes.set(xlabel="positive value, as a fraction of the largest (log scale)")
    axes.set_title("All positive values of each format")
    axes.legend(loc="upper left")
    open_rows(axes)
    return caption(figure, text)


@styled
def error_map(table, text):
    """table: format, bits, distribution, sqnr (dB), gain (dB above the integers of that width)."""
    formats, columns = distinct(table.format), distinct(table.distribution)
    values, gains = (table.pivot(index="format", columns="distribution", values=name)
                     .loc[formats, columns] for name in ("sqnr", "gain"))
    size = (3.2 + 0.85 * len(columns), max(3.2, 2.2 + 0.25 * len(formats)))
    figure, (axes,) = panels(1, *size)
    scale = dict(cmap="RdBu", vmin=-12, vmax=12)  # white: no gain
    bar = {"label": "dB above integers", "extend": "both"}
    numbers = dict(annot=values, fmt=".1f", annot_kws={"fontsize": 8}, yticklabels=True)
    sns.heatmap(gains, ax=axes, cbar_kws=bar, linewidths=0.4, **scale, **numbers)
    _part_widths(axes, table.groupby("format", sort=False).bits.first(), 1)
    axes.set(xlabel="", ylabel="", title="Signal to quantization noise, dB")
    axes.tick_params(axis="x", rotation=25, labelsize=8.5)
    axes.tick_params(axis="y", rotation=0, labelsize=8.5)
    axes.grid(False)
    return caption(figure, text)


@styled
def lost_by_format(table, text):
    """table: format, bits, drop, drop_low, drop_high (points): a row a format, widths apart."""
    figure, (axes,) = panels(1, 8, 1.8 + 0.26 * len(table))
    for row, (name, lost, *ends) in enumerate(zip(table.format, table["drop"], *whiskers(table))):
        look = dict(elinewidth=1.2, markersize=6) | method_style(name)
        axes.errorbar(lost, row, xerr=[[end] for end in ends], **look)
    name_rows(axes, list(table.format), fontsize=8.5)
    _part_widths(axes, table.bits, 0.5)
    axes.axvline(0, **DASHED)
    low, high = min(table.drop_low.min(), 0), max(table.drop_high.max(), 1)
    lost_scale(axes.xaxis, low, high, steps=(0.5, 1, 2, 5, 10, 20, 50))
    axes.set(xlabel="points lost against float (log scale beyond 0.5)")
    axes.set_title("What a format costs the network")
    open_rows(axes)
    return caption(figure, text)


def _part_widths(axes, bits, place):
    """A line between the rows of one width and the next; place: of a row's lower end."""
    bits = bits.to_numpy()
    for row in (bits[1:] != bits[:-1]).nonzero()[0]:
        axes.axhline(row + place, color=INK, linewidth=1.2)
