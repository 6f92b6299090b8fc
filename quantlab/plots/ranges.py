"""Distributions, clip ranges and the error they cost."""

import numpy as np
import seaborn as sns
from matplotlib.ticker import MaxNLocator

from quantlab.plots.page import caption, distinct, facets, panels
from quantlab.plots.parts import error_curves, histogram, in_order, legend, plain
from quantlab.plots.style import BLUE, DASHED, INK, RED, method_style, styled


@styled
def clip_histogram(stats, ranges, text, title="", xlabel="value"):
    """An edge (EdgeStats) with the clip range of each observer; ranges: observer, low, high."""
    figure, (axes,) = panels(1, 9.5, 3.6)
    floor, top = histogram(axes, stats)
    for i, row in enumerate(ranges.itertuples()):
        look = dict(markevery=[1], linewidth=1.6) | method_style(row.observer)
        ends = [floor, top * 1.6**i]  # ranges that agree lie on one line: their markers do not
        label = f"{row.observer}: {row.low + 0:.3g} to {row.high + 0:.3g}"  # 0, not -0
        axes.plot([row.high, row.high], ends, label=label, **look)
        if row.low < 0:
            axes.plot([row.low, row.low], ends, **look)
    axes.set(title=title, xlabel=xlabel, ylim=(floor, top * 1.6 ** (len(ranges) + 1)))
    legend(axes, "clip range")
    return caption(figure, text)


@styled
def weight_codes(weight, x_hat, q, text):
    """A weight before and after (QParams q, per tensor): its values, and how many of them have
    each code.
    """
    figure, (left, right) = panels(2, 10, 3.6)
    values, step = weight.flatten().numpy(), q.scale.item()
    left.hist(values, bins=120, color=BLUE)
    levels = (np.arange(q.qmin, q.qmax + 1) - q.zero_point.item()) * step
    for level in levels if len(levels) <= 32 else ():
        left.axvline(level, color=RED, linewidth=0.8)
    for level in (levels[0], levels[-1]):
        left.axvline(level, **DASHED)
    left.set(xlabel="weight", ylabel="weights in a bin")
    left.set_title(f"Weights and the range of {len(levels)} codes (dashed)")
    codes = (x_hat / q.scale + q.zero_point).round().int().flatten().numpy()
    counts = np.bincount(codes - q.qmin, minlength=len(levels))
    right.bar(np.arange(q.qmin, q.qmax + 1), counts, 0.8, color=RED)
    right.set(xlabel="code", ylabel="weights with this code (log scale)", yscale="log")
    right.set(ylim=(0.7, 2 * counts.max()), xlim=(q.qmin - 1, q.qmax + 1))
    plain(right.yaxis)
    right.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    fullest = f"the fullest has {counts.max() / counts.sum():.0%} of the weights"
    right.set_title(f"{(counts > 0).sum()} of {len(levels)} codes used; {fullest}", fontsize=10)
    return caption(figure, text)


def _widest_first(table):
    return table.sort_values("bits", ascending=False, kind="stable")


@styled
def range_tradeoff(table, text):
    """table: bits, share (of the full range), clipping and rounding (mean squared errors)."""
    figure, parts = facets(_widest_first(table), "bits", 3.2, 3.4, extra=0.8)
    for panel, bits, part in parts:
        total = error_curves(panel, part.share, part.clipping, part.rounding)
        best = total.idxmin()
        panel.plot(part.share[best], total[best], "o", color=INK)
        panel.set_xlabel("clip range, fraction of the whole")
        panel.set_title(f"{bits} bits: best at {part.share[best]:.0%} of the range")
    figure.axes[0].set_ylabel("mean squared error")
    legend(figure.axes[-1])
    return caption(figure, text)


@styled
def error_landscape(curve, choices, text):
    """curve: bits, high, error (mean squared); choices: bits, observer, high, error, marked."""
    figure, parts = facets(_widest_first(curve), "bits", 3, 3.4, extra=1.6)
    for panel, bits, part in parts:
        panel.plot(part.high, part.error, color=INK, linewidth=1)
        for row in choices[choices.bits == bits].itertuples():
            look = dict(linestyle="", markersize=7, alpha=0.85) | method_style(row.observer)
            panel.plot(row.high, row.error, label=row.observer, **look)
        panel.set(yscale="log", xlabel="upper end of the range", title=f"{bits} bits")
    figure.axes[0].set_ylabel("mean squared error")
    legend(figure.axes[-1])
    return caption(figure, text)


@styled
def edge_report(frame, text, named=4):
    """frame of sensitivity.edge_errors; the `named` edges that add most noise are written out."""
    figure, (axes,) = panels(1, max(10, 0.12 * len(distinct(frame.edge))), 4)
    axes.plot(frame.order, frame.own_sqnr, "o", color=BLUE, markersize=5, label="this edge alone")
    axes.plot(frame.order, frame.sqnr, "-D", color=INK, markersize=4, label="in the network")
    worst = frame.nlargest(named, "added_db").sort_values("order")
    axes.plot(worst.order, worst.sqnr, "D", color=RED, markersize=7, label="adds most noise")
    low, high = axes.get_ylim()
    low = min(low, (frame.sqnr.min() - 0.36 * high) / 0.64)  # the labels take the lower third
    for i, row in enumerate(worst.itertuples()):
        place = row.order + 0.3, low + (0.04, 0.14, 0.24)[i % 3] * (high - low)
        words = f"{row.edge}, +{row.added_db:.1f} dB"
        line = dict(arrowstyle="-", color=RED, linewidth=0.6, relpos=(0, 1), shrinkA=0)
        axes.annotate(words, (row.order, row.sqnr), place, fontsize=7.5, color=RED, arrowprops=line)
    axes.set(ylabel="signal to quantization noise, dB", ylim=(low, high))
    axes.set_title("Which layer broke?")
    in_order(axes, "rounded values")
    legend(axes)
    return caption(figure, text)


@styled
def observer_map(table, text):
    """table: edge, one column an observer with its signal to quantization noise in dB."""
    values = table.set_index("edge")
    loss = values.max(axis=1).to_numpy()[:, None] - values
    height = max(3, 1.8 + 0.16 * len(distinct(table.edge)))
    figure, (axes,) = panels(1, 2.6 + 0.9 * loss.shape[1], height)
    scale = {"label": "dB below the best range", "shrink": min(1, 20 / len(loss)), "anchor": (0, 1)}
    numbers = dict(annot=True, fmt=".1f", annot_kws={"fontsize": 6}, yticklabels=True)
    sns.heatmap(loss, ax=axes, cmap="rocket_r", vmin=0, vmax=12, cbar_kws=scale, **numbers)
    axes.set(ylabel="", title="What each observer loses on each edge")
    axes.grid(False)
    above = dict(top=True, labeltop=True, bottom=False, labelbottom=False)
    axes.tick_params(axis="x", rotation=20, **above)
    axes.tick_params(axis="y", labelsize=7, rotation=0)
    return caption(figure, text)
