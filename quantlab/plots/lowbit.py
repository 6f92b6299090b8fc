"""Low bits: rounding that is learned, methods by width, sensitivity, Pareto fronts, conventions."""

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from quantlab.plots.style import COLOURS, DATA_COLOUR, ERROR_COLOUR, MARKERS, caption

COLOURS.update({
    "nearest": "#7f7f7f", "equalisation": "#b8860b", "bias correction": "#4aa3a2", "analytic bias correction": "#9fd0cf",
    "BatchNorm re-estimation": "#8c6bb1", "AdaRound": "#d95f02", "BRECQ": "#2b6cb0", "QDrop": "#1b7f3b", "QDrop + Fisher": "#66c2a5",
    "QDrop + end to end": "#7fbf4d", "QDrop + fine-tuning": "#0b3d1b", "ONNX Runtime int8": "#c2185b",
})
MARKERS.update({
    "nearest": "o", "equalisation": "v", "bias correction": "s", "analytic bias correction": "p", "BatchNorm re-estimation": "D", "AdaRound": "^",
    "BRECQ": "P", "QDrop": "*", "QDrop + Fisher": "X", "QDrop + end to end": "h", "QDrop + fine-tuning": "H", "ONNX Runtime int8": "d",
})


def learned_rounding(paths, curve, text):
    """One layer's rounding while it is learned: how each weight makes up its mind, and what it is worth.

    paths: iteration, weight, h (0 rounds down, 1 up), start. curve: iteration, nearest, learned (errors of the layer's output).
    """
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.6), width_ratios=[1.5, 1, 1.2])
    last = paths[paths.iteration == paths.iteration.max()].set_index("weight").h
    for weight, part in paths.groupby("weight"):
        moved = (last[weight] > 0.5) != (part.start.iloc[0] >= 0.5)
        left.plot(part.iteration, part.h, color=ERROR_COLOUR if moved else DATA_COLOUR, linewidth=1.1 if moved else 0.6, alpha=0.9 if moved else 0.6)
    left.plot([], [], color=ERROR_COLOUR, label="ends away from the nearest")
    left.plot([], [], color=DATA_COLOUR, label="ends at the nearest")
    left.set(xlabel="iteration", ylabel="h: 0 rounds down, 1 up", title="Each line is a weight", ylim=(-0.05, 1.35), yticks=[0, 0.5, 1])
    left.legend(loc="upper left", ncols=2, fontsize=8)
    for label, when, colour in (("start", paths.iteration.min(), DATA_COLOUR), ("end", paths.iteration.max(), ERROR_COLOUR)):
        middle.hist(paths[paths.iteration == when].h, bins=np.linspace(0, 1, 21), histtype="step", linewidth=1.6, color=colour, label=label)
    middle.set(xlabel="h", ylabel="weights shown", title="At the end, a decision")
    middle.legend()
    right.plot(curve.iteration, curve.learned, color=ERROR_COLOUR, label="learned")
    right.axhline(curve.nearest.iloc[0], color=COLOURS["float"], linestyle="--", label="nearest")
    right.set(xlabel="iteration", ylabel="squared error of the output", title="What it is worth", ylim=(0, None))
    right.legend()
    return caption(figure, text)


def unit_errors(frame, text):
    """frame: method, order, unit, nearest, learned (errors of a unit's output): the share of the error that learning leaves."""
    methods = list(dict.fromkeys(frame.method))
    figure, axes = plt.subplots(1, len(methods), figsize=(3.4 * len(methods) + 1, 1.4 + 0.22 * frame.groupby("method").size().max()), squeeze=False)
    for panel, method in zip(axes[0], methods):
        part = frame[frame.method == method]
        share, colour = 100 * part.learned / part.nearest, COLOURS.get(method, ERROR_COLOUR)
        panel.hlines(part.order, share, 100, color=colour, linewidth=2, alpha=0.4)
        panel.plot(share, part.order, "o", color=colour, markersize=5)
        panel.axvline(100, color=COLOURS["nearest"], linestyle="--", linewidth=1)
        panel.set(xlabel="error left, % of nearest rounding's", title=method, xlim=(0, 108))
        panel.set_yticks(part.order, part.unit, fontsize=7)
        panel.invert_yaxis()
    return caption(figure, text)


def methods_by_width(frame, rivals, text):
    """frame: method, width ("W4A4"), drop (points), drop_low, drop_high, one row a seed; rivals: method, drop at 8 bits, their only width."""
    widths = list(dict.fromkeys(frame.width))
    methods = list(dict.fromkeys(frame.method))
    figure, axes = plt.subplots(figsize=(9.5, 4.6))
    for i, method in enumerate(methods):
        means = frame[frame.method == method].groupby("width", sort=False)[["drop", "drop_low", "drop_high"]].mean()
        x = np.array([widths.index(w) for w in means.index]) + (i - (len(methods) - 1) / 2) * 0.07
        style = dict(color=COLOURS.get(method, ERROR_COLOUR), marker=MARKERS.get(method, "o"))
        whiskers = np.abs([means["drop"] - means.drop_low, means.drop_high - means["drop"]])
        axes.errorbar(x, means["drop"], yerr=whiskers, elinewidth=0.8, linewidth=0.9, markersize=7, label=method, **style)
    for row in rivals.itertuples():
        axes.plot(widths.index("W8A8") + 0.42 if "W8A8" in widths else -0.5, row.drop, marker=MARKERS.get(row.method, "X"), linestyle="",
                  color=COLOURS.get(row.method, ERROR_COLOUR), markersize=8, markeredgecolor="#222222", label=f"{row.method} (W8A8)")
    axes.axhline(0, color=COLOURS["float"], linestyle="--", linewidth=1)
    axes.set_yscale("symlog", linthresh=1)
    ticks = [0, 0.5, 1, 2, 5, 10, 20, 50]
    axes.set_yticks(ticks)
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axes.set_xticks(range(len(widths)), widths)
    axes.set(ylabel="points lost against float (log scale beyond 1)", title="Every method at every width")
    axes.set_ylim(max(1.5, frame["drop"].max() * 1.6), min(-0.3, frame.drop_low.min() * 1.1))
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return caption(figure, text)


def sensitivity_map(errors, text, chosen=None):
    """errors of mixed.layer_errors as two heat maps, layers x bits; chosen: layer and weight_bits (act_bits) of an allocation, framed."""
    layers = list(dict.fromkeys(errors.layer))
    figure, axes = plt.subplots(1, 2, figsize=(10, 1.6 + 0.24 * len(layers)), sharey=True)
    exponent = np.log10(errors.error.clip(lower=1e-9))
    limits = dict(vmin=exponent.min(), vmax=exponent.max())
    for panel, (kind, column) in zip(axes, (("weight", "weight_bits"), ("activation", "act_bits"))):
        table = errors.assign(exponent=exponent)[errors.kind == kind].pivot(index="layer", columns="bits", values="exponent")
        table = table.reindex(layers)[sorted(table.columns, reverse=True)]
        sns.heatmap(table, ax=panel, cmap="rocket_r", annot=True, fmt=".1f", annot_kws={"fontsize": 7}, linewidths=0.4, cbar=kind == "activation",
                    cbar_kws={"label": "log10 of the divergence, nats"}, **limits)
        for row in chosen.itertuples() if chosen is not None and column in chosen else []:
            x, y = list(table.columns).index(getattr(row, column)), layers.index(row.layer)
            panel.add_patch(Rectangle((x, y), 1, 1, fill=False, edgecolor="#1f9e5a", linewidth=2.2, clip_on=False))
        panel.set(xlabel="bits", ylabel="", title=f"{kind}s of this layer alone" if kind == "weight" else "what this layer reads, alone")
        panel.tick_params(axis="y", labelsize=8, rotation=0)
        panel.grid(False)
    return caption(figure, text)


def layer_accuracy(frame, text):
    """frame of mixed.layer_accuracy: points lost with one layer quantized, and with all but one, in order of execution."""
    layers = list(dict.fromkeys(frame.layer))
    figure, axes = plt.subplots(1, 2, figsize=(10, 1.7 + 0.22 * len(layers)), sharey=True)
    for panel, (case, part) in zip(axes, frame.groupby("case", sort=False)):
        y = [layers.index(name) for name in part.layer]
        whiskers = np.abs([part["drop"] - part.drop_low, part.drop_high - part["drop"]])
        panel.errorbar(part["drop"], y, xerr=whiskers, fmt="o", markersize=4, color=COLOURS["float"], ecolor=DATA_COLOUR, elinewidth=1.2)
        reference, named = (part["all"].iloc[0], "all quantized") if case == "only this float" else (0, "all float")
        panel.axvline(reference, color=ERROR_COLOUR, linestyle="--", linewidth=1.2)
        panel.set(xlabel="points lost against float", title=f"{case} (dashed: {named})")
        panel.set_yticks(range(len(layers)), layers, fontsize=8)
    axes[0].invert_yaxis()
    return caption(figure, text)


def pareto(frame, text):
    """frame: axis ("size" or "operations"), kind ("uniform" or "mixed"), cost (bytes, bit operations), top1 (%), label, fp32_top1."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 4))
    for panel, (axis, unit, label) in zip(panels, (("size", 1e3, "weights as stored, kB"), ("operations", 1e9, "bit operations an image, 10⁹ (log scale)"))):
        part = frame[frame["axis"] == axis]
        for kind, colour, marker in (("uniform", COLOURS["nearest"], "o"), ("mixed", ERROR_COLOUR, "D")):
            line = part[part.kind == kind].sort_values("cost")
            panel.plot(line.cost / unit, line.top1, color=colour, marker=marker, label=f"{kind} widths")
            for row in line.itertuples() if kind == "uniform" else []:
                panel.annotate(row.label, (row.cost / unit, row.top1), xytext=(5, -11), textcoords="offset points", fontsize=7.5, color=colour)
        panel.axhline(frame.fp32_top1.iloc[0], color=COLOURS["float"], linestyle="--", linewidth=1, label="float")
        panel.set(xlabel=label, ylabel="top-1 accuracy, %")
        if axis == "operations":
            panel.set_xscale("log")
            panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
            panel.xaxis.set_minor_formatter(NullFormatter())
        panel.margins(x=0.08, y=0.1)
    panels[0].set_title("Size: activations at 8 bits")
    panels[1].set_title("Operations: weights and activations")
    panels[0].legend(loc="lower right")
    return caption(figure, text)


def conventions(frame, text):
    """frame: width, convention, gain, gain_low, gain_high: points gained (right) or lost (left) by one change of convention."""
    names, widths = list(dict.fromkeys(frame.convention)), list(dict.fromkeys(frame.width))
    figure, panels = plt.subplots(1, len(widths), figsize=(4.6 * len(widths) + 1, 1.5 + 0.36 * len(names)), sharey=True, squeeze=False)
    for panel, width in zip(panels[0], widths):
        part = frame[frame.width == width].groupby("convention", sort=False)[["gain", "gain_low", "gain_high"]].mean()
        colours = [DATA_COLOUR if g >= 0 else ERROR_COLOUR for g in part.gain]
        whiskers = np.abs([part.gain - part.gain_low, part.gain_high - part.gain])
        panel.barh(range(len(part)), part.gain, xerr=whiskers, color=colours, height=0.65, error_kw={"elinewidth": 1, "ecolor": "#555555"})
        panel.axvline(0, color=COLOURS["float"], linewidth=1)
        panel.set(xlabel="points gained against our convention", title=width)
        panel.set_yticks(range(len(names)), names)
        panel.grid(axis="y", visible=False)
    panels[0][0].invert_yaxis()
    return caption(figure, text)
