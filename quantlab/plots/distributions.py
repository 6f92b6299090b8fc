"""Every layer's distribution at a glance: ridges, small multiples, tails, the spread between channels, weights beside activations."""

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns

from quantlab.plots.style import COLOURS, DATA_COLOUR, ERROR_COLOUR, caption

PALE = "#c9ced6"  # what a ReLU takes away
POINT_COLOURS = {"weight": "#8c6bb1", "before": PALE, "after": DATA_COLOUR}
ROWS = 36  # layers a column of ridges
OUTLINED = 0.08  # height from which a ridge has a white outline, which would hide its tail


def ridges(density, text, ranges=None, title="Every layer before and after its ReLU"):
    """One ridge a layer, from the input (top) to the output: coloured what a ReLU lets through, pale what it takes away.

    density: frame of distributions.densities with points "before" and "after"; ranges: layer, low, high: the clip range, a bar on the line.
    Heights are the square root of the density, so that tails can be seen; horizontally all layers share one scale in real units.
    """
    layers = list(dict.fromkeys(density[density.point == "before"].layer))
    columns = -(-len(layers) // ROWS)
    rows = -(-len(layers) // columns)
    figure, axes = plt.subplots(1, columns, figsize=(9.5 if columns == 1 else 7 * columns, 0.27 * rows + 1.2), sharex=True, squeeze=False)
    colours = sns.color_palette("crest", len(layers))
    extents = density[density.point == "before"].groupby("layer").x.agg(["min", "max"])
    limits = extents["min"].quantile(0.05), extents["max"].quantile(0.95) * 1.12
    for i, layer in enumerate(layers):
        panel, base = axes[0][i // rows], -(i % rows)
        _ridge(panel, density[density.layer == layer], base, colours[i], limits)
        if ranges is not None:
            row = ranges[ranges.layer == layer].iloc[0]
            ends = np.clip([row.low, row.high], *limits)
            panel.plot(ends, [base, base], color=ERROR_COLOUR, linewidth=2, solid_capstyle="butt", zorder=1000)
    for column, panel in enumerate(axes[0]):
        named = layers[column * rows : (column + 1) * rows]
        panel.set_yticks([-i for i in range(len(named))], named, fontsize=7.5)
        panel.set(xlim=limits, ylim=(-rows + 0.6, 1.9), xlabel="value")
        panel.grid(axis="y", visible=False)
        panel.spines["left"].set_visible(False)
        panel.tick_params(axis="y", length=0)
        panel.axvline(0, color=COLOURS["float"], linewidth=0.6, alpha=0.5)
    if ranges is not None:
        axes[0][-1].plot([], [], color=ERROR_COLOUR, linewidth=2, label="clip range")
        figure.legend(loc="outside upper right", fontsize=8)
    figure.suptitle(title, fontsize=11)
    return caption(figure, text)


def _ridge(panel, part, base, colour, limits):
    before, after = (part[part.point == point] for point in ("before", "after"))
    peak = np.sqrt(max(before.density.max(), 1e-300))
    for points, face in ((before, PALE if len(after) else colour), (after, colour)):
        height = (1.7 * np.sqrt(points.density) / peak).clip(upper=1.7)
        panel.fill_between(points.x, base, base + height, color=face, linewidth=0, zorder=10 - base)
        panel.plot(points.x, (base + height).where(height > OUTLINED), color="white", linewidth=0.8, zorder=10 - base)
    zeros, top = (after if len(after) else before).zeros.iloc[0], before.x.max()
    note = f"{zeros:.0%} zeros, max {top:.1f}" if len(after) else f"max {top:.1f}, no ReLU"
    place = dict(xytext=(4, 1), textcoords="offset points", annotation_clip=False)
    panel.annotate(note, (limits[1], base), fontsize=6.5, color="#666666", **place)


def layer_histograms(density, ranges, text, columns=5, unit="value"):
    """Small multiples: the logarithmic density of every layer with a ReLU, before (pale) and after (filled), the clip range dashed.

    density as for ridges; ranges: frame with layer, low, high of the value behind the ReLU.
    """
    layers = list(ranges.layer)
    rows = -(-len(layers) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(2.3 * columns, 1.55 * rows + 0.6), squeeze=False)
    for panel, row in zip(axes.flat, ranges.itertuples()):
        part = density[(density.layer == row.layer) & (density.point != "weight")]
        seen = part.density[part.density > 0]
        panel.set_title(row.layer if len(seen) else f"{row.layer}: only zeros", fontsize=8)
        if not len(seen):
            continue
        floor = seen.min() / 2
        for point in ("before", "after"):
            points = part[part.point == point]
            height, colour = points.density.clip(lower=floor), POINT_COLOURS[point]
            panel.fill_between(points.x, floor, height, step="mid", color=colour, alpha=0.9, linewidth=0, label=point)
        for end in {row.low, row.high}:
            panel.axvline(end, color=ERROR_COLOUR, linestyle="--", linewidth=1.1, label="clip range" if end == row.high else None)
        panel.set(yscale="log", ylim=(floor, part.density.max() * 2))
        panel.tick_params(labelsize=7)
        panel.minorticks_off()
    for panel in axes.flat[len(layers) :]:
        panel.axis("off")
    figure.supylabel("density (log scale)", fontsize=9)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=3, fontsize=8, title=None)
    return caption(figure, text)


def tails(table, text, expected):
    """How many values lie far from the mean, and how far the largest is from nearly all others.

    table: order, layer, max_over_p and beyond_K (distributions.outliers), one row a layer. expected: {K: share of a normal distribution
    beyond K sigma}, dashed for comparison.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
    markers = dict(zip(expected, "osD^"))
    colours = dict(zip(expected, sns.color_palette("flare", len(expected)).as_hex()))
    for k, normal in expected.items():
        share = table[f"beyond_{k}"].where(table[f"beyond_{k}"] > 0)
        left.plot(table.order, share, marker=markers[k], color=colours[k], linewidth=1, markersize=4, label=f"beyond {k} σ")
        if normal > 1e-7:
            left.axhline(normal, color=colours[k], linestyle="--", linewidth=1, label=f"normal distribution, {k} σ")
    left.set(yscale="log", ylabel="share of all values (log scale)", title="Before the ReLU: far from the mean")
    left.legend(fontsize=7.5)
    right.bar(table.order, table.max_over_p - 1, bottom=1, color=DATA_COLOUR, width=0.8)
    row = table.loc[table.max_over_p.idxmax()]
    place = dict(xytext=(0, 3), textcoords="offset points", ha="center")
    right.annotate(row.layer, (row.order, row.max_over_p), fontsize=8, color=ERROR_COLOUR, **place)
    right.set(ylabel="largest / 99.99 % quantile", title="As stored: the largest value against nearly all")
    for panel in (left, right):
        panel.set_xlabel("layer, in order of execution")
    right.set_ylim(1, 1 + (table.max_over_p.max() - 1) * 1.3)
    return caption(figure, text)


def channel_spread(channels, costs, text, bits):
    """Above: every channel's largest value over its layer's, as boxes, dead channels counted. Below: what one range for all of them costs.

    channels: layer, share (0 to 1), one row a channel; costs: layer, gain_db, in the same order of layers; bits: the width of the costs.
    """
    layers = list(costs.layer)
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(max(10, 0.26 * len(layers)), 6), sharex=True, height_ratios=(3, 2))
    groups = [channels[channels.layer == layer].share.to_numpy() for layer in layers]
    top.boxplot(groups, positions=range(len(layers)), widths=0.6, whis=(0, 100), patch_artist=True, showfliers=False,
                boxprops={"facecolor": DATA_COLOUR, "alpha": 0.5, "linewidth": 0.8}, medianprops={"color": COLOURS["float"]})
    jitter = np.random.default_rng(0)
    for i, group in enumerate(groups):
        x = i + jitter.uniform(-0.22, 0.22, len(group))
        top.scatter(x, group, s=4, color=COLOURS["float"], alpha=0.35, linewidths=0, zorder=3, rasterized=True)
        if dead := int((group <= 0).sum()):
            top.text(i, -0.03, f"{dead} dead", ha="center", va="top", fontsize=7, color=ERROR_COLOUR)
    top.set(ylim=(-0.12, 1.05), ylabel="channel's largest / layer's largest", title="How much of the layer's range does a channel use?")
    bottom.bar(range(len(layers)), costs.gain_db, color=ERROR_COLOUR, width=0.6)
    bottom.set_ylabel(f"dB lost at {bits} bits")
    bottom.set_xticks(range(len(layers)), layers, rotation=60, ha="right", rotation_mode="anchor", fontsize=7.5)
    bottom.set_title("What one range for all channels costs, against a range for each", fontsize=11)
    in_bits = bottom.secondary_yaxis("right", functions=(lambda v: v / (20 * np.log10(2)), lambda v: v * (20 * np.log10(2))))
    in_bits.set_ylabel("the same, in bits")
    for panel in (top, bottom):
        panel.grid(axis="x", visible=False)
    return caption(figure, text)


def weights_beside_activations(density, text, sigmas=8):
    """Two columns of ridges on one scale, standard deviations: weights left, the values that the layer makes of them right.

    density: frame of distributions.densities with an added column z = x / std; points "weight" and "before".
    """
    layers = list(dict.fromkeys(density[density.point == "weight"].layer))
    figure, axes = plt.subplots(1, 2, figsize=(10, 0.27 * len(layers) + 1.3), sharey=True)
    for panel, point, title in zip(axes, ("weight", "before"), ("weights", "what the layer makes of them")):
        for i, layer in enumerate(layers):
            part = density[(density.layer == layer) & (density.point == point)]
            height = 1.7 * np.sqrt(part.density / max(part.density.max(), 1e-300))
            colour = POINT_COLOURS["weight" if point == "weight" else "after"]
            panel.fill_between(part.z, -i, height - i, color=colour, linewidth=0, zorder=10 + i)
            panel.plot(part.z, (height - i).where(height > OUTLINED), color="white", linewidth=0.8, zorder=10 + i)
            ends = np.clip([part.z.min(), part.z.max()], -sigmas, sigmas)
            panel.plot(ends, [-i, -i], "|", color=ERROR_COLOUR, markersize=6, zorder=1000)
            for end, side in ((-part.z.min(), "left"), (part.z.max(), "right")):
                if end > sigmas:
                    x = sigmas if side == "right" else -sigmas
                    panel.text(x, 0.1 - i, f"to {end:.0f} σ", ha=side, fontsize=6.5, color=ERROR_COLOUR, zorder=2000)
        panel.set(xlim=(-sigmas, sigmas), xlabel="standard deviations", title=title)
        panel.grid(axis="y", visible=False)
        panel.spines["left"].set_visible(False)
        panel.tick_params(axis="y", length=0)
    axes[0].set_yticks([-i for i in range(len(layers))], layers, fontsize=7.5)
    return caption(figure, text)
