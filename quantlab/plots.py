"""Figures: one function each, from a tidy frame (or the tensors it names) to a matplotlib figure.

One palette, one colour and one marker a method everywhere; every caption names data set, model and n.
"""

import textwrap

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from quantlab.runtime import atomic_path, root

COLOURS = dict(zip(
    ["float", "minmax", "percentile", "histogram", "mse", "entropy", "eager int8", "PT2E int8", "aciq_laplace", "aciq_gauss"],
    ["#333333", *sns.color_palette("colorblind", 9).as_hex()], strict=True,
))  # fmt: skip
MARKERS = dict(zip(COLOURS, "sovD^P*X<>", strict=True))
DATA_COLOUR, ERROR_COLOUR = "#7f9fbf", "#c44e52"
STYLE = {
    "figure.dpi": 110, "savefig.dpi": 200, "figure.constrained_layout.use": True, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.alpha": 0.25, "axes.axisbelow": True, "font.size": 10, "axes.titlesize": 11, "svg.hashsalt": "quantlab",
    "legend.frameon": False,
}  # fmt: skip


def set_style():
    """The workbook's style for every figure that follows."""
    plt.rcParams.update(STYLE)


def save(figure, name, data=None, model=None):
    """Write pic/NAME_MODEL_DATA.png (200 dpi) and .svg and return the figure; names that begin with images_ and digits stay out of git."""
    full = "_".join(part for part in (name, model, getattr(data, "name", data)) if part)
    for suffix, extra in ((".png", {}), (".svg", {"metadata": {"Date": None}})):
        with atomic_path(root() / "pic" / (full + suffix)) as temporary:
            figure.savefig(temporary, format=suffix[1:], **extra)
    return figure


def caption(figure, text):
    """A line under the finished figure that says what was measured; closed, so that a notebook shows it once, as the value of its cell."""
    width = int(figure.get_figwidth() * 15)
    plt.close(figure)
    figure.supxlabel(textwrap.fill(text, width), fontsize=8, color="#555555", x=0.01, ha="left")
    return figure


# ---- Training ---------------------------------------------------------------------------------------------------------------


def training_curves(history, text):
    """history: frame with epoch, loss, train_top1, heldout_top1 (percent)."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    left.plot(history.epoch, history.loss, color=COLOURS["float"])
    left.set(xlabel="epoch", ylabel="cross-entropy, training images", title="Loss", ylim=(0, None))
    right.plot(history.epoch, history.train_top1, color=DATA_COLOUR, label="training images, augmented")
    right.plot(history.epoch, history.heldout_top1, color=COLOURS["float"], label="held-out images")
    right.set(xlabel="epoch", ylabel="top-1 accuracy, %", title="Accuracy")
    right.legend(loc="lower right")
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return caption(figure, text)


def confusion(labels, predictions, classes, text):
    """Share of each true class (rows) that was predicted as each class (columns), in percent; labels and predictions int64 [n]."""
    table = torch.zeros(len(classes), len(classes)).index_put_((labels, predictions), torch.ones(len(labels)), accumulate=True)
    share = 100 * table / table.sum(1, keepdim=True)
    figure, axes = plt.subplots(figsize=(6.6, 5.6))
    few = len(classes) <= 20
    sns.heatmap(share.numpy(), ax=axes, cmap="Blues", annot=few, fmt=".0f", xticklabels=classes, yticklabels=classes, vmin=0, vmax=100,
                annot_kws={"fontsize": 8}, cbar_kws={"label": "% of the true class"})  # fmt: skip
    axes.set(xlabel="predicted", ylabel="true", title="Where the network errs")
    axes.grid(False)
    axes.tick_params(axis="x", rotation=45)
    return caption(figure, text)


def image_grid(images, titles, wrong, text):
    """images: uint8 [N, 3, H, W]; titles: N strings, in red where `wrong`."""
    columns = 8
    rows = -(-len(images) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(1.25 * columns, 1.5 * rows))
    for cell, image, title, bad in zip(axes.flat, images, titles, wrong):
        cell.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
        cell.set_title(title, fontsize=8, color=ERROR_COLOUR if bad else "#222222")
    for cell in axes.flat:
        cell.axis("off")
    return caption(figure, text)


# ---- Built-in int8 ----------------------------------------------------------------------------------------------------------


def method_bars(table, text):
    """table: method, top1 (%), bytes, images_per_s: accuracy, size and throughput side by side, float first."""
    figure, axes = plt.subplots(1, 3, figsize=(10, 0.55 * len(table) + 1.5), sharey=True)
    colours = [COLOURS.get(m, DATA_COLOUR) for m in table.method]
    panels = (("top1", "top-1 accuracy, %", 1), ("bytes", "weights as stored, kB", 1e-3), ("images_per_s", "throughput, images/s", 1))
    for panel, (column, label, unit) in zip(axes, panels):
        values = table[column] * unit
        bars = panel.barh(table.method, values, color=colours, height=0.6)
        panel.bar_label(bars, [f" {v:,.2f}" if column == "top1" else f" {v:,.0f}" for v in values], fontsize=9)
        panel.set(xlabel=label, xlim=(0, 1.25 * (100 if column == "top1" else values.max())))
        panel.set_xticks([0, 25, 50, 75, 100]) if column == "top1" else panel.xaxis.set_major_locator(MaxNLocator(4))
        panel.grid(axis="y", visible=False)
    axes[0].invert_yaxis()
    return caption(figure, text)


# ---- By hand ----------------------------------------------------------------------------------------------------------------


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


def accuracy_by_bits(table, text, bits_label="bits of weights and activations"):
    """table: bits, observer, top1 (%), fp32_top1; seeds become a band. The left panel shows all, the right one what is lost at 8 to 4 bits."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
    for observer, part in table.groupby("observer", sort=False):
        means = part.groupby("bits").agg(top1=("top1", "mean"), low=("top1", "min"), high=("top1", "max"), drop=("drop", "mean"))
        style = dict(color=COLOURS.get(observer, ERROR_COLOUR), marker=MARKERS.get(observer, "o"), label=observer)
        left.plot(means.index, means.top1, **style)
        left.fill_between(means.index, means.low, means.high, color=style["color"], alpha=0.15, linewidth=0)
        right.plot(means.index, means["drop"], **style)
    left.axhline(table.fp32_top1.iloc[0], color=COLOURS["float"], linestyle="--", label="float")
    left.set(xlabel=bits_label, ylabel="top-1 accuracy, %", title="Accuracy", ylim=(0, 102))
    right.set(xlabel=bits_label, ylabel="points lost (log scale)", title="Points lost against float")
    right.set_yscale("symlog", linthresh=0.5)
    right.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    right.set_yticks([0, 0.25, 0.5, 1, 2, 5, 10, 20, 50])
    for panel in (left, right):
        panel.set_xticks(sorted(table.bits.unique()))
        panel.invert_xaxis()
    left.legend(loc="lower left")
    return caption(figure, text)


# ---- Observers --------------------------------------------------------------------------------------------------------------


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


def accuracy_by_images(table, text):
    """table: observer, n, seed, top1 (%): mean over seeds, with the range between them."""
    figure, axes = plt.subplots(figsize=(6.4, 3.6))
    for observer, part in table.groupby("observer", sort=False):
        groups = part.groupby("n").top1
        axes.plot(groups.mean().index, groups.mean(), color=COLOURS[observer], marker=MARKERS[observer], label=observer)
        axes.fill_between(groups.mean().index, groups.min(), groups.max(), color=COLOURS[observer], alpha=0.15, linewidth=0)
    axes.set(xscale="log", xlabel="calibration images", ylabel="top-1 accuracy, %", title="How many images are enough?")
    axes.set_xticks(sorted(table.n.unique()), [f"{n:,}" for n in sorted(table.n.unique())])
    axes.minorticks_off()
    axes.legend()
    return caption(figure, text)


def edge_report(frame, text, named=4):
    """frame of sensitivity.edge_errors: signal-to-noise at every edge in order, the `named` edges that add most noise written beside it."""
    figure, axes = plt.subplots(figsize=(10, 4))
    axes.plot(frame.order, frame.own_sqnr, "o", color=DATA_COLOUR, markersize=5, label="this edge alone")
    axes.plot(frame.order, frame.sqnr, "-D", color=COLOURS["float"], markersize=4, label="in the network")
    worst = frame.nlargest(named, "added_db")
    axes.plot(worst.order, worst.sqnr, "D", color=ERROR_COLOUR, markersize=7, label="adds most noise")
    for i, row in enumerate(worst.sort_values("order").itertuples()):
        axes.annotate(f"{row.edge}\n+{row.added_db:.1f} dB", (row.order, row.sqnr), xytext=(6, -14 - 26 * (i % 2)), textcoords="offset points",
                      fontsize=7.5, ha="left", va="top", color=ERROR_COLOUR)  # fmt: skip
    low, high = axes.get_ylim()
    axes.set(xlabel="rounded values, in order of execution", ylabel="signal to quantization noise, dB", title="Which layer broke?", ylim=(low - 14, high))
    axes.legend(loc="upper right")
    return caption(figure, text)


def data_label(data):
    """A data set's name; a smoke run says that it is one."""
    name = getattr(data, "name", data)
    return f"{name} (smoke run)" if name == "digits" else name


def row_caption(data, model, n, more=""):
    """What every caption says: data set, model and number of images."""
    return f"{data_label(data)}, {model}, n = {n:,}{'; ' + more if more else ''}"


set_style()
