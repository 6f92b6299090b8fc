"""Distributions, clip ranges and the error they cost."""

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns

from quantlab.plots.style import COLOURS, DATA_COLOUR, ERROR_COLOUR, MARKERS, caption


def clip_histogram(stats, ranges, text, title="", unit="value"):
    """The histogram of an edge (EdgeStats) with the clip range that each observer chose; ranges: frame with observer, low, high."""
    centers, counts = (v.numpy() for v in stats.histogram())
    groups = max(1, len(centers) // 200)
    edges = np.arange(0, len(centers), groups)
    density = np.add.reduceat(counts, edges) / (stats.count * stats.width * groups)
    figure, axes = plt.subplots(figsize=(9.5, 3.6))
    axes.fill_between(centers[edges] + stats.width * (groups - 1) / 2, density, step="mid", color=DATA_COLOUR, alpha=0.6, linewidth=0)
    axes.set_yscale("log")
    for row in ranges.itertuples():
        style = dict(color=COLOURS.get(row.observer, ERROR_COLOUR), marker=MARKERS.get(row.observer, "o"), markevery=[1], linewidth=1.6)
        top = density.max() * 3
        axes.plot([row.high, row.high], [density[density > 0].min(), top], label=f"{row.observer}: {row.low:.2f} to {row.high:.2f}", **style)
        if row.low < 0:
            axes.plot([row.low, row.low], [density[density > 0].min(), top], **style)
    axes.set(xlabel=unit, ylabel="density (log scale)", title=title)
    axes.legend(title="clip range", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return caption(figure, text)


def weight_codes(weight, x_hat, q, text):
    """One weight tensor before and after: the distribution with the values that codes stand for, and the error of every weight."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
    left.hist(weight.flatten().numpy(), bins=120, color=DATA_COLOUR)
    step = q.scale.item()
    levels = np.arange(q.qmin - q.zero_point.item(), q.qmax - q.zero_point.item() + 1) * step
    if len(levels) <= 32:
        for level in levels:
            left.axvline(level, color=ERROR_COLOUR, linewidth=0.8)
    for level in (levels[0], levels[-1]):
        left.axvline(level, color=COLOURS["float"], linestyle="--", linewidth=1.2)
    left.set(xlabel="weight", ylabel="count", title=f"Weights and the range of {len(levels)} codes (dashed)")
    right.scatter(weight.flatten().numpy(), (x_hat - weight).flatten().numpy() / step, s=3, color=ERROR_COLOUR, alpha=0.4, linewidths=0, rasterized=True)
    for bound in (-0.5, 0.5):
        right.axhline(bound, color=COLOURS["float"], linestyle="--", linewidth=1)
    right.set(xlabel="weight", ylabel="error, in steps", title="Rounding stays within half a step")
    return caption(figure, text)


def range_tradeoff(table, text):
    """table: bits, share (of the full range), clipping and rounding (mean squared error): the two errors and their sum."""
    widths = sorted(table.bits.unique(), reverse=True)
    figure, axes = plt.subplots(1, len(widths), figsize=(3.2 * len(widths), 3.4))
    for panel, bits in zip(np.atleast_1d(axes), widths):
        part = table[table.bits == bits]
        total = part.clipping + part.rounding
        panel.plot(part.share, part.clipping, color=ERROR_COLOUR, linestyle=":", label="clipping")
        panel.plot(part.share, part.rounding, color=DATA_COLOUR, linestyle="--", label="rounding")
        panel.plot(part.share, total, color=COLOURS["float"], label="sum")
        panel.plot(part.share[total.idxmin()], total.min(), "o", color=COLOURS["float"])
        panel.set(yscale="log", xlabel="clip range, share of the whole", title=f"{bits} bits: best at {part.share[total.idxmin()]:.2f}")
        panel.set_ylim(total.min() / 30, total.max() * 3)
    np.atleast_1d(axes)[0].set_ylabel("mean squared error")
    np.atleast_1d(axes)[-1].legend()
    return caption(figure, text)


def error_landscape(curve, choices, text):
    """curve: bits, high, error; choices: bits, observer, high, error: the squared error over the range's upper end, every choice marked."""
    widths = sorted(curve.bits.unique(), reverse=True)
    figure, axes = plt.subplots(1, len(widths), figsize=(3 * len(widths) + 1.6, 3.4), sharey=False)
    for panel, bits in zip(np.atleast_1d(axes), widths):
        part = curve[curve.bits == bits]
        panel.plot(part.high, part.error, color=COLOURS["float"], linewidth=1)
        for row in choices[choices.bits == bits].itertuples():
            panel.plot(row.high, row.error, MARKERS[row.observer], color=COLOURS[row.observer], label=row.observer, markersize=7, alpha=0.85)
        panel.set(yscale="log", xlabel="upper end of the range", title=f"{bits} bits")
    np.atleast_1d(axes)[0].set_ylabel("mean squared error")
    np.atleast_1d(axes)[-1].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return caption(figure, text)


def edge_report(frame, text, named=4):
    """frame of sensitivity.edge_errors: signal-to-noise at every edge in order, the `named` edges that add most noise written beside it."""
    figure, axes = plt.subplots(figsize=(10, 4))
    axes.plot(frame.order, frame.own_sqnr, "o", color=DATA_COLOUR, markersize=5, label="this edge alone")
    axes.plot(frame.order, frame.sqnr, "-D", color=COLOURS["float"], markersize=4, label="in the network")
    worst = frame.nlargest(named, "added_db")
    axes.plot(worst.order, worst.sqnr, "D", color=ERROR_COLOUR, markersize=7, label="adds most noise")
    for i, row in enumerate(worst.sort_values("order").itertuples()):
        axes.annotate(f"{row.edge}\n+{row.added_db:.1f} dB", (row.order, row.sqnr), xytext=(6, -20 - 26 * (i % 2)), textcoords="offset points",
                      fontsize=7.5, ha="left", va="top", color=ERROR_COLOUR)
    high = axes.get_ylim()[1]
    low = min(axes.get_ylim()[0], (worst.sqnr.min() - 0.34 * high) / 0.66)  # the labels take the lower third
    axes.set(xlabel="rounded values, in order of execution", ylabel="signal to quantization noise, dB", title="Which layer broke?", ylim=(low, high))
    axes.legend(loc="upper right")
    return caption(figure, text)


def observer_map(table, text):
    """table: edge, one column an observer with its signal to quantization noise in dB: each range's loss against the best one, edge by edge."""
    values = table.set_index("edge")
    loss = values.max(axis=1).to_numpy()[:, None] - values
    figure, axes = plt.subplots(figsize=(2.6 + 0.9 * loss.shape[1], 1.8 + 0.16 * len(loss)))
    sns.heatmap(loss, ax=axes, cmap="rocket_r", vmin=0, vmax=12, annot=True, fmt=".1f", annot_kws={"fontsize": 6}, yticklabels=True,
                cbar_kws={"label": "dB below the best range", "shrink": min(1, 20 / len(loss)), "anchor": (0, 1)})
    axes.set(ylabel="", title="What each observer loses on each edge")
    axes.grid(False)
    axes.tick_params(axis="x", top=True, labeltop=True, bottom=False, labelbottom=False, rotation=20)
    axes.tick_params(axis="y", labelsize=7)
    return caption(figure, text)
