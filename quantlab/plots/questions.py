"""Figures that answer the questions of the original README: dataflow, strips, clipped histograms, heat map, two values of one code."""

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.patches import FancyBboxPatch

from quantlab.plots.style import COLOURS, DATA_COLOUR, ERROR_COLOUR, caption

MAIN = ["input code", "minus zero-point", "sum of products", "plus bias", "times multiplier", "shifted right", "clamped: ReLU"]
SIDE = {"weight code": "sum of products", "bias code": "plus bias", "multiplier": "times multiplier"}
VARIANT_COLOURS = sns.color_palette("colorblind", 8).as_hex()
BOX_COLOURS = {"8": "#dfeaf5", "16": "#e7efdc", "32": "#fdf0d5", "64": "#f8dcd6"}


def dataflow(steps, text, title=""):
    """steps: step, container, low, high, bits (seen), worst_bits, example (text): the integers of one conv-BN-ReLU from codes to codes."""
    rows = steps.set_index("step")
    figure, axes = plt.subplots(figsize=(13, 4.1))
    places = {name: (1.9 * i, 0.0) for i, name in enumerate(MAIN)}
    places |= {name: (places[target][0], 2.1) for name, target in SIDE.items()}
    for name, (x, y) in places.items():
        row = rows.loc[name]
        colour = BOX_COLOURS[row.container.lstrip("uint")]
        axes.add_patch(FancyBboxPatch((x, y), 1.5, 1.4, boxstyle="round,pad=0.04", facecolor=colour, edgecolor="#666666", linewidth=0.8))
        axes.text(x + 0.75, y + 1.22, name, ha="center", va="center", fontsize=9, fontweight="bold")
        form = ",d" if abs(row.low) + row.high < 1e8 else ".1e"
        span, widths = f"{row.low:{form}} to {row.high:{form}}", f"{row.bits} bits, at worst {row.worst_bits}"
        lines = [row.container, span, widths, f"here: {row.example}"]
        axes.text(x + 0.75, y + 0.5, "\n".join(lines), ha="center", va="center", fontsize=8, linespacing=1.4)
    arrow = dict(arrowstyle="-|>", color="#444444", linewidth=1.2)
    for before, after in zip(MAIN, MAIN[1:]):
        axes.annotate("", (places[after][0] - 0.05, 0.7), (places[before][0] + 1.55, 0.7), arrowprops=arrow)
    for name, target in SIDE.items():
        axes.annotate("", (places[target][0] + 0.75, 1.46), (places[name][0] + 0.75, 2.05), arrowprops=arrow)
    axes.set(xlim=(-0.15, 1.9 * len(MAIN) - 0.25), ylim=(-0.15, 3.65), title=title)
    axes.axis("off")
    return caption(figure, text)


def minmax_strip(values, ranges, bits, text, unit="weight"):
    """values: numpy [n]; ranges: frame with name, high (symmetric): which values share a code, without and with saturation."""
    qmax = 2 ** (bits - 1) - 1
    extent = np.abs(values).max() * 1.04
    figure, axes = plt.subplots(len(ranges), 1, figsize=(10, 2.3 * len(ranges)))
    for panel, row in zip(np.atleast_1d(axes), ranges.itertuples()):
        scale = row.high / qmax
        panel.plot(values, np.full(len(values), 1.0), "|", color=DATA_COLOUR, markersize=14, markeredgewidth=0.5, rasterized=True)
        for code in range(-qmax, qmax + 1):
            place = code / qmax * extent * 0.9
            panel.plot([code * scale, place], [0.9, 0.18], color="#888888", linewidth=0.8)
            panel.text(place, 0.0, str(code), ha="center", va="center", fontsize=9)
        outside = np.abs(values) > row.high + scale / 2
        panel.plot(values[outside], np.full(outside.sum(), 1.0), "|", color=ERROR_COLOUR, markersize=14, markeredgewidth=0.8)
        for value, side in ((values.min(), -1), (values.max(), 1)):
            if abs(value) > row.high + scale / 2:
                arrow = dict(arrowstyle="-|>", color=ERROR_COLOUR, linewidth=1.2)
                panel.annotate("", (side * row.high, 0.9), (value, 0.9), arrowprops=arrow)
        panel.set_title(f"{row.name}: ±{row.high:.3f}, step {scale:.4f}, {outside.sum():,} of {len(values):,} values saturate")
        panel.set(xlim=(-extent, extent), ylim=(-0.15, 1.2), yticks=[], xlabel=f"{unit} (marks), and the codes below")
        panel.grid(False)
        panel.spines["left"].set_visible(False)
    return caption(figure, text)


def clipped_histograms(stats, coded, text, unit="activation"):
    """An edge before (EdgeStats) and after quantization; coded: name -> (values of the codes, float [K], counts [K], end of the range)."""
    centers, counts = (v.numpy() for v in stats.histogram())
    groups = max(1, len(centers) // 128)
    edges = np.arange(0, len(centers), groups)
    figure, axes = plt.subplots(1, 1 + len(coded), figsize=(3.5 * (1 + len(coded)), 3.5), sharex=True, sharey=True)
    axes[0].bar(centers[edges], np.add.reduceat(counts, edges) / stats.count, width=stats.width * groups, align="edge", color=DATA_COLOUR)
    title = f"before: float\n(and {stats.zeros / stats.count:.0%} exact zeros)"
    axes[0].set(title=title, ylabel="share of the values (log scale)", yscale="log", xlabel=unit)
    for panel, (name, (values, number, high)) in zip(axes[1:], coded.items()):
        share = np.asarray(number) / stats.count
        used = share > 0
        panel.vlines(np.asarray(values)[used], 0.3 / stats.count, share[used], color=ERROR_COLOUR, linewidth=1.6)
        panel.axvline(high, color=COLOURS["float"], linestyle="--", linewidth=1)
        entropy = -(share[used] * np.log2(share[used])).sum()
        codes = f"{used.sum()} of {len(values)} codes used, entropy {entropy:.2f} bits"
        panel.set(title=f"{name}: up to {high:.2f} (dashed)\n{codes}", xlabel=unit)
    return caption(figure, text)


def error_by_range(curve, text):
    """curve: part (what is quantized), share (of the whole range), measured (where the error is taken), sqnr (dB); the best is marked."""
    parts = list(dict.fromkeys(curve.part))
    figure, axes = plt.subplots(1, len(parts), figsize=(5 * len(parts), 3.6))
    colours = [DATA_COLOUR, ERROR_COLOUR, COLOURS["float"]]
    for panel, part in zip(np.atleast_1d(axes), parts):
        for colour, style, (measured, line) in zip(colours, ("--", ":", "-"), curve[curve.part == part].groupby("measured", sort=False)):
            best = line.loc[line.sqnr.idxmax()]
            panel.plot(line.share, line.sqnr, style, color=colour, label=f"{measured}: best at {best.share:.2f}")
            panel.plot(best.share, best.sqnr, "o", color=colour)
        panel.set(xlabel="clip range, share of the whole", ylabel="signal to quantization noise, dB", title=f"Quantized: {part}")
        panel.legend(loc="lower center", title="error measured at")
    return caption(figure, text)


def bits_heatmap(table, text):
    """table: weight_bits, act_bits, top1 (%), drop (points): accuracy and points lost over both widths."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    panels = (("top1", "top-1 accuracy, %", "Blues", 100), ("drop", "points lost against float", "Reds", None))
    for panel, (column, label, colours, top) in zip(axes, panels):
        grid = table.pivot_table(index="weight_bits", columns="act_bits", values=column).sort_index(ascending=False)
        grid = grid[sorted(grid.columns)]
        style = dict(cmap=colours, annot=True, fmt=".1f", square=True, cbar_kws={"label": label}, vmin=0, vmax=top)
        sns.heatmap(grid.astype(float), ax=panel, **style)
        panel.tick_params(axis="y", rotation=0)
        panel.set(xlabel="bits of the activations", ylabel="bits of the weights", title=label.capitalize())
        panel.grid(False)
    return caption(figure, text)


def variant_drops(table, text, title=""):
    """table: bits, variant, drop, drop_low, drop_high (points): points lost by variant, grouped by bits, with their 95 % intervals."""
    variants, widths = list(dict.fromkeys(table.variant)), sorted(table.bits.unique(), reverse=True)
    figure, axes = plt.subplots(1, len(widths), figsize=(3.0 * len(widths) + 2.4, 0.5 * len(variants) + 1.8), sharey=True)
    for panel, bits in zip(np.atleast_1d(axes), widths):
        part = table[table.bits == bits].groupby("variant", sort=False)[["drop", "drop_low", "drop_high"]].mean().reindex(variants)
        error = np.abs(part[["drop_low", "drop_high"]].to_numpy() - part[["drop"]].to_numpy()).T
        whiskers = dict(ecolor="#444444", capsize=3, lw=1)
        panel.barh(variants, part["drop"], xerr=error, color=VARIANT_COLOURS[: len(variants)], height=0.6, error_kw=whiskers)
        panel.axvline(0, color=COLOURS["float"], linewidth=0.8)
        panel.set(title=f"{bits} bits", xlabel="points lost")
        for i, (value, end) in enumerate(zip(part["drop"], part.drop_high)):
            panel.annotate(f"{value:+.2f}", (max(end, 0), i), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
        low, high = panel.get_xlim()
        panel.set_xlim(low, high + 0.28 * (high - low))
        panel.grid(axis="y", visible=False)
    np.atleast_1d(axes)[0].invert_yaxis()
    figure.suptitle(title, fontsize=11)
    return caption(figure, text)


def two_values(pairs, code, text):
    """pairs: name -> (QParams before the ReLU, QParams behind it): the real value of every code under both, `code` marked."""
    figure, axes = plt.subplots(1, len(pairs), figsize=(5 * len(pairs), 3.8))
    for panel, (name, both) in zip(np.atleast_1d(axes), pairs.items()):
        looks = zip(both, ("before the ReLU", "behind the ReLU"), (DATA_COLOUR, ERROR_COLOUR), ("--", "-"), ((8, -14), (-44, 10)))
        for q, label, colour, style, offset in looks:
            scale, zero_point = q.scale.item(), q.zero_point.item()
            codes = np.arange(q.qmin, q.qmax + 1)
            value = scale * (code - zero_point)
            label += f": scale {scale:.4f}, zero-point {zero_point}"
            panel.plot(codes, scale * (codes - zero_point), style, color=colour, label=label)
            panel.plot(code, value, "o", color=colour)
            panel.annotate(f"{value:.3f}", (code, value), xytext=offset, textcoords="offset points", color=colour, fontweight="bold")
        panel.axvline(code, color=COLOURS["float"], linewidth=0.8, linestyle=":")
        panel.axhline(0, color=COLOURS["float"], linewidth=0.8)
        panel.set(xlabel="code", ylabel="real value", title=f"{name}: the two values of code {code}", xticks=[0, 64, 128, code, 255])
        panel.legend(loc="lower right", fontsize=8)
    return caption(figure, text)
