"""Every layer's distribution at a glance: ridges, small multiples, tails, channels, weights."""

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns

from quantlab.plots.page import caption, distinct, panels
from quantlab.plots.parts import in_order, note, open_rows
from quantlab.plots.style import BLUE, DASHED, GREY, INK, PALE, POINT_COLOURS, RED, styled

ROWS = 36  # layers a column of ridges
HEIGHT = 1.7  # of a ridge, in rows
OUTLINED = 0.08  # height from which a ridge has a white outline, which would hide its tail
BIT_DB = 20 * np.log10(2)  # a bit more halves the step


@styled
def ridges(density, text, ranges=None, title="Every layer before and after its ReLU"):
    """One ridge a layer, from the input (top) to the output: coloured what a ReLU lets through,
    pale what it takes away; heights are the square root of the density, to show the tails.

    density: frame of `densities` with points "before" and "after"; ranges: layer, low, high: the
    clip range, a bar on the line.
    """
    before = density[density.point == "before"]
    layers = distinct(before.layer)
    columns = -(-len(layers) // ROWS)
    rows = -(-len(layers) // columns)
    width = 9.5 if columns == 1 else 7 * columns
    figure, axes = panels(columns, width, 0.27 * rows + 1.2, sharex=True)
    colours = sns.color_palette("crest", len(layers))
    extents = before.groupby("layer").x.agg(["min", "max"])
    limits = extents["min"].quantile(0.05), extents["max"].quantile(0.95) * 1.12
    wider = ((extents["min"] < limits[0]) | (extents["max"] > limits[1])).sum()
    label = f"value ({wider} layer(s) reach farther)" if wider else "value"
    for i, layer in enumerate(layers):
        panel, base = axes[i // rows], -(i % rows)
        _layer_ridge(panel, density[density.layer == layer], base, colours[i], limits[1])
        if ranges is not None:
            row = ranges[ranges.layer == layer].iloc[0]
            look = dict(color=RED, linewidth=2, solid_capstyle="butt", zorder=1000)
            panel.plot(np.clip([row.low, row.high], *limits), [base, base], **look)
    for column, panel in enumerate(axes):
        named = layers[column * rows : (column + 1) * rows]
        panel.set_yticks([-i for i in range(len(named))], named, fontsize=7.5)
        panel.set(xlim=limits, ylim=(-rows + 0.6, 1.9), xlabel=label)
        panel.axvline(0, color=INK, linewidth=0.6, alpha=0.5)
        open_rows(panel)
    if ranges is not None:
        axes[-1].plot([], [], color=RED, linewidth=2, label="clip range")
        figure.legend(loc="outside upper right", fontsize=8)
    figure.suptitle(title, fontsize=11)
    return caption(figure, text)


def _layer_ridge(panel, part, base, colour, right):
    """A layer before and after its ReLU on one scale, and its zeros and maximum in words."""
    before, after = part[part.point == "before"], part[part.point == "after"]
    peak = before.density.max()
    _ridge(panel, before.x, before.density, peak, base, PALE if len(after) else colour)
    _ridge(panel, after.x, after.density, peak, base, colour)
    words = f"max {before.x.max():.3g}, no ReLU"
    if len(after):
        words = f"{after.zeros.iloc[0]:.0%} zeros, max {before.x.max():.3g}"
    note(panel, words, right, base, 4, fontsize=6.5, color=GREY, va="bottom")


def _ridge(panel, x, density, peak, base, colour):
    """The square root of a density above the line `base`, lower ridges before those above them."""
    height = HEIGHT * np.sqrt(density / max(peak, 1e-300)).clip(upper=1)
    panel.fill_between(x, base, base + height, color=colour, linewidth=0, zorder=10 - base)
    outline = (base + height).where(height > OUTLINED)
    panel.plot(x, outline, color="white", linewidth=0.8, zorder=10 - base)


@styled
def layer_histograms(density, ranges, text, columns=5):
    """The density of every layer with a ReLU, before and after it, the clip range dashed.

    density: as for ridges; ranges: layer, low, high of the value behind the ReLU.
    """
    layers = distinct(ranges.layer)
    rows = -(-len(layers) // columns)
    size = (2.3 * columns, 1.55 * rows + 0.8)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
    for panel, row in zip(axes.flat, ranges.itertuples()):
        part = density[(density.layer == row.layer) & (density.point != "weight")]
        panel.set_title(row.layer, fontsize=8)
        _layer_histogram(panel, part, row)
    for panel in axes.flat[len(layers) :]:
        panel.axis("off")
    for panel in axes.flat[max(0, len(layers) - columns) : len(layers)]:
        panel.set_xlabel("value", fontsize=8)
    figure.supylabel("density (log scale)", fontsize=9)
    for point in ("before", "after"):
        axes.flat[0].fill_between([], [], color=POINT_COLOURS[point], label=point)
    axes.flat[0].plot([], [], label="clip range", **DASHED | {"color": RED})
    figure.legend(loc="outside upper right", ncols=3, fontsize=8)
    return caption(figure, text)


def _layer_histogram(panel, part, row):
    positive = part.density[part.density > 0]
    panel.tick_params(labelsize=7)
    if not len(positive):
        panel.set_title(f"{row.layer}: only zeros", fontsize=8)
        return
    floor = positive.min() / 2
    for point in ("before", "after"):
        points = part[part.point == point]
        look = dict(step="mid", color=POINT_COLOURS[point], alpha=0.9, linewidth=0)
        panel.fill_between(points.x, floor, points.density.clip(lower=floor), **look)
    for end in (row.low, row.high):
        panel.axvline(end, **DASHED | {"color": RED})
    panel.set(yscale="log", ylim=(floor, part.density.max() * 2))
    panel.minorticks_off()


@styled
def tails(table, text, expected):
    """How many values lie far from the mean, and how far the largest is from nearly all others.

    table: order, layer, and max_over_p, beyond_K of `outliers`; expected: K -> fraction of a normal
    distribution beyond K sigma, dashed.
    """
    names = distinct(table.layer)
    figure, (left, right) = panels(2, max(12, 0.2 * len(names)), 3.8)
    colours = sns.color_palette("flare", len(expected)).as_hex()
    for (k, normal), colour, marker in zip(expected.items(), colours, "osD^vP"):
        fraction = table[f"beyond_{k}"].where(table[f"beyond_{k}"] > 0)
        look = dict(color=colour, linewidth=1, marker=marker, markersize=4)
        label = f"beyond {k} σ" + (f" (normal: {normal:.0e})" if normal <= 1e-7 else "")
        left.plot(table.order, fraction, label=label, **look)
        if normal > 1e-7:
            look = DASHED | {"color": colour}
            left.axhline(normal, label=f"normal distribution, {k} σ", **look)
    left.set(yscale="log", ylabel="fraction of all values (log scale)")
    left.set_title("Before the ReLU: far from the mean")
    figure.legend(loc="outside right upper", fontsize=8)
    right.bar(table.order, table.max_over_p - 1, bottom=1, color=BLUE, width=0.8)
    right.set(ylabel="largest / 99.99 % quantile")
    right.set_title("As stored: the largest value against nearly all")
    if table.max_over_p.notna().any():
        row = table.loc[table.max_over_p.idxmax()]
        above = dict(xytext=(0, 3), textcoords="offset points", ha="center", color=RED)
        right.annotate(row.layer, (row.order, row.max_over_p), fontsize=8, **above)
        right.set_ylim(1, 1 + max(row.max_over_p - 1, 1e-3) * 1.3)
    for panel in (left, right):
        in_order(panel, "layers")
    return caption(figure, text)


@styled
def channel_spread(channels, costs, text, bits):
    """Above: every channel's largest value over its layer's; below: what one range for all costs.

    channels: layer, share (0 to 1), a row a channel; costs: layer, gain_db (at `bits`), in order.
    """
    layers = distinct(costs.layer)
    places = range(len(layers))
    size = dict(figsize=(max(10, 0.26 * len(layers)), 6), height_ratios=(3, 2))
    figure, (top, bottom) = plt.subplots(2, 1, sharex=True, **size)
    _draw_channels(top, [channels[channels.layer == layer].share.to_numpy() for layer in layers])
    top.set(ylim=(-0.12, 1.05), ylabel="channel's largest / layer's largest")
    red = " Red: dead channels, counted" if (channels.share <= 0).any() else ""
    top.set_title(f"How much of the layer's range does a channel use?{red}")
    bottom.bar(places, costs.gain_db, color=RED, width=0.6)
    bottom.set_ylabel(f"dB lost at {bits} bits")
    bottom.set_xlim(-0.7, len(layers) - 0.3)
    slanted = dict(rotation=60, ha="right", rotation_mode="anchor", fontsize=7.5)
    bottom.set_xticks(places, layers, **slanted)
    bottom.set_title("What one range for all channels costs, against a range for each")
    scales = (lambda db: db / BIT_DB, lambda bits: bits * BIT_DB)
    bottom.secondary_yaxis("right", functions=scales).set_ylabel("the same, in bits")
    for panel in (top, bottom):
        panel.grid(axis="x", visible=False)
    return caption(figure, text)


def _draw_channels(axes, groups):
    box = dict(facecolor=BLUE, alpha=0.5, linewidth=0.8)
    options = dict(widths=0.6, whis=(0, 100), patch_artist=True, showfliers=False)
    look = dict(boxprops=box, medianprops={"color": INK})
    axes.boxplot(groups, positions=range(len(groups)), **options, **look)
    jitter = np.random.default_rng(0)
    dots = dict(s=4, color=INK, alpha=0.35, linewidths=0, zorder=3, rasterized=True)
    for i, group in enumerate(groups):
        axes.scatter(i + jitter.uniform(-0.22, 0.22, len(group)), group, **dots)
        dead = int((group <= 0).sum())
        if dead:
            axes.text(i, -0.03, dead, ha="center", va="top", fontsize=8, color=RED)


@styled
def weights_beside_activations(density, text, sigmas=8):
    """Ridges in standard deviations: weights left, the values that the layer makes of them right.

    density: as for ridges, with a column z = x / std and points "weight" and "before".
    """
    layers = distinct(density[density.point == "weight"].layer)
    figure, axes = panels(2, 10, 0.27 * len(layers) + 1.3, sharey=True)
    sides = (("weight", POINT_COLOURS["weight"], "weights"),
             ("before", POINT_COLOURS["after"], "what the layer makes of them"))
    for panel, (point, colour, title) in zip(axes, sides):
        for i, layer in enumerate(layers):
            part = density[(density.layer == layer) & (density.point == point)]
            _ridge(panel, part.z, part.density, part.density.max(), -i, colour)
            _mark_ends(panel, part.z.min(), part.z.max(), -i, sigmas)
        panel.set(xlim=(-sigmas, sigmas), xlabel="standard deviations", title=title)
        open_rows(panel)
    axes[0].set_yticks([-i for i in range(len(layers))], layers, fontsize=7.5)
    return caption(figure, text)


def _mark_ends(panel, low, high, base, sigmas):
    """Where the values end, as strokes; in numbers where that is beyond the picture."""
    ends = np.clip([low, high], -sigmas, sigmas)
    panel.plot(ends, [base, base], "|", color=RED, markersize=6, zorder=1000)
    for value, side in ((low, "left"), (high, "right")):
        if abs(value) > sigmas:
            look = dict(fontsize=6.5, color=RED, zorder=2000, ha=side)
            panel.text(np.sign(value) * sigmas, base + 0.1, f"to {abs(value):.0f} σ", **look)
