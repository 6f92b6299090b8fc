"""Low bits: rounding that is learned, methods by width, sensitivity, Pareto fronts, conventions."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator

from quantlab.plots.page import caption, distinct, facets, panels
from quantlab.plots.parts import bars, lost_scale, name_rows, plain, whiskers
from quantlab.plots.style import (
    BLUE,
    DASHED,
    GREEN,
    INK,
    RED,
    VARIANT_COLOURS,
    colour_of,
    method_style,
    styled,
)


@styled
def learned_rounding(paths, curve, text):
    """One layer's rounding while it is learned. paths: iteration, weight, h (0 rounds down, 1 up),
    start; curve: iteration, nearest, learned (squared errors of the layer's output).
    """
    figure, (left, middle, right) = panels(3, 11, 3.6, width_ratios=[1.5, 1, 1.2])
    for _, part in paths.groupby("weight"):
        moved = (part.h.iloc[-1] > 0.5) != (part.start.iloc[0] >= 0.5)
        look = dict(color=RED, linewidth=1.1) if moved else dict(color=BLUE, linewidth=0.6)
        left.plot(part.iteration, part.h, alpha=0.8, **look)
    left.plot([], [], color=RED, label="ends away from the nearest")
    left.plot([], [], color=BLUE, label="ends at the nearest")
    left.set(xlabel="iteration", ylabel="h: 0 rounds down, 1 up", title="Each line is a weight")
    left.set(ylim=(-0.05, 1.35), yticks=[0, 0.5, 1])
    left.legend(loc="upper left", ncols=2, fontsize=7.5)
    times, look = paths.iteration, dict(bins=np.linspace(0, 1, 21), histtype="step", linewidth=1.6)
    middle.hist(paths.h[times == times.min()], color=BLUE, label="start", **look)
    middle.hist(paths.h[times == times.max()], color=RED, label="end", **look)
    middle.set(xlabel="h", ylabel="weights shown", title="At the end, a decision")
    middle.legend()
    right.plot(curve.iteration, curve.learned, color=RED, label="learned")
    right.axhline(curve.nearest.iloc[0], label="nearest", **DASHED)
    right.set(xlabel="iteration", ylabel="squared error of the output", ylim=(0, None))
    right.set_title("What it is worth")
    right.legend()
    return caption(figure, text)


@styled
def unit_errors(frame, text):
    """frame: method, order, unit, nearest, learned (errors of a unit's output)."""
    height = 1.4 + 0.22 * frame.unit.nunique()
    figure, parts = facets(frame, "method", 3.4, height, extra=1)
    for panel, method, part in parts:
        left = 100 * part.learned / part.nearest
        colour = colour_of(method)
        panel.hlines(part.index, left, 100, color=colour, linewidth=2, alpha=0.4)
        panel.plot(left, part.index, "o", color=colour, markersize=5)
        panel.axvline(100, **DASHED)
        panel.set(title=method, xlim=(0, max(108, 1.05 * left.max())))
        panel.set_xlabel("error left, % of nearest rounding's")
        name_rows(panel, list(part.unit), fontsize=7)
    return caption(figure, text)


@styled
def methods_by_width(frame, rivals, text):
    """A panel a method, nearest rounding in grey behind it. frame: method, width ("W4A4"), drop,
    drop_low, drop_high (points), a row a seed; rivals: the same at 8 bits, their only width, which
    have a panel together. A line joins neighbouring widths only: none passes one not measured.
    """
    widths, methods = distinct(frame.width), distinct(frame.method)
    count = len(methods) + (len(rivals) > 0)
    rows, columns = -(-count // 4), min(count, 4)
    size = (2.5 * columns + 0.8, 2.1 * rows + 1.4)
    options = dict(figsize=size, squeeze=False, sharex=True, sharey=True)
    figure, grid = plt.subplots(rows, columns, **options)
    nearest = frame[frame.method == "nearest"]
    for panel, method in zip(grid.flat, methods):
        _by_width(panel, nearest, widths, color=colour_of("nearest"), alpha=0.45, linewidth=0.9)
        look = dict(elinewidth=1, linewidth=1, markersize=6) | method_style(method)
        _by_width(panel, frame[frame.method == method], widths, **look)
        panel.set_title(method, fontsize=9.5)
    for i, row in enumerate(rivals.itertuples()):
        panel, place = grid.flat[len(methods)], widths.index("W8A8") if "W8A8" in widths else 0
        aside = place + 0.35 * i
        panel.plot(aside, row.drop, linestyle="", label=row.method, **method_style(row.method))
        panel.vlines(aside, row.drop_low, row.drop_high, color=colour_of(row.method), linewidth=1)
        panel.legend(loc="lower left", fontsize=7.5)
        panel.set_title("other tools, W8A8", fontsize=9.5)
    for panel in grid.flat[:count]:
        panel.axhline(0, **DASHED)
    for panel in grid.flat[count:]:
        panel.set_visible(False)
    for panel in grid.flat[max(count - columns, 0) : count]:  # the lowest of every column
        panel.tick_params(axis="x", labelbottom=True)
    last, highest = grid.flat[0], pd.concat([frame.drop_high, rivals.drop_high]).max()
    lowest = min(0, pd.concat([frame.drop_low, rivals.drop_low]).min())
    lost_scale(last.yaxis, lowest, max(highest, 1), steps=(1, 2, 5, 10, 50), linear=2)
    last.invert_yaxis()
    for panel in grid.flat:
        panel.set_xticks(range(len(widths)), widths, rotation=90, fontsize=7.5)
    figure.supylabel("points lost (log scale beyond 2)", fontsize=9.5)
    return caption(figure, f"{text}; grey: nearest; lines join neighbouring widths only")


def _by_width(panel, part, widths, **look):
    """Means over seeds with the mean of their intervals; a line between neighbouring widths."""
    means = part.groupby("width")[["drop", "drop_low", "drop_high"]].mean()
    means = means.reindex(widths).reset_index(drop=True)  # NaN breaks the line
    panel.errorbar(means.index, means["drop"], yerr=whiskers(means), **look)


@styled
def sensitivity_map(errors, text, chosen=None):
    """errors: frame of mixed.layer_errors; chosen: layer, weight_bits and act_bits, framed."""
    layers = distinct(errors.layer)
    figure, axes = panels(2, 10, 1.6 + 0.24 * len(layers), sharey=True)
    errors = errors.assign(exponent=np.log10(errors.error.clip(lower=1e-9)))
    limits = dict(vmin=errors.exponent.min(), vmax=errors.exponent.max())
    figure.suptitle("What a layer costs: divergence from float, its power of ten", fontsize=11)
    sides = (("weight", "weight_bits", "weights of this layer alone"),
             ("activation", "act_bits", "what this layer reads, alone"))
    for panel, (kind, column, title) in zip(axes, sides):
        table = errors[errors.kind == kind].pivot(index="layer", columns="bits", values="exponent")
        table = table.reindex(layers)[sorted(table.columns, reverse=True)]
        numbers = dict(annot=True, fmt=".1f", annot_kws={"fontsize": 7}, linewidths=0.4)
        bar = dict(cbar=panel is axes[-1], cbar_kws={"label": "log10 of the divergence, nats"})
        sns.heatmap(table, ax=panel, cmap="rocket_r", yticklabels=True, **numbers, **bar, **limits)
        if chosen is not None and column in chosen:
            _frame(panel, layers, list(table.columns), chosen.set_index("layer")[column])
        panel.set(xlabel="bits", ylabel="", title=title)
        panel.tick_params(axis="y", labelsize=8, rotation=0)
        panel.grid(False)
    return caption(figure, text)


def _frame(panel, layers, widths, chosen):
    """A frame around the chosen width of every layer; chosen: Series, layer -> bits."""
    look = dict(fill=False, edgecolor=GREEN, linewidth=2.2, clip_on=False)
    for layer, bits in chosen.items():
        panel.add_patch(Rectangle((widths.index(bits), layers.index(layer)), 1, 1, **look))


@styled
def layer_accuracy(frame, text):
    """frame of mixed.layer_accuracy: points lost with one layer quantized, won with one float."""
    layers = distinct(frame.layer)
    figure, parts = facets(frame, "case", 5, 1.7 + 0.22 * len(layers), sharey=True)
    for panel, case, part in parts:
        rows = [layers.index(name) for name in part.layer]
        look = dict(fmt="o", markersize=4, color=INK, ecolor=BLUE, elinewidth=1.2)
        value, label = "drop", "points lost against float"
        if case == "only this float":
            value = "regained"
            label = f"points regained of {part['all'].iloc[0]:.2f}, against all quantized"
        names = value, f"{value}_low", f"{value}_high"
        panel.errorbar(part[value], rows, xerr=whiskers(part, *names), **look)
        panel.axvline(0, **DASHED | {"color": RED})
        panel.set(xlabel=label, title=case)
    name_rows(figure.axes[0], layers, fontsize=8)
    return caption(figure, text)


@styled
def pareto(frame, text):
    """frame: axis ("size", "operations"), kind ("uniform", "mixed"), cost (bytes, bit operations),
    top1 and fp32_top1 (%), label.
    """
    figure, (sizes, operations) = panels(2, 10, 4)
    for panel, axis, divisor in ((sizes, "size", 1e3), (operations, "operations", 1e9)):
        part = frame[frame["axis"] == axis].sort_values("cost")
        part = part.assign(cost=part.cost / divisor)
        for kind, method in (("uniform", "nearest"), ("mixed", "mixed precision")):
            line = part[part.kind == kind]
            panel.plot(line.cost, line.top1, label=f"{kind} widths", **method_style(method))
        for row in part[part.kind == "uniform"].itertuples():
            place = dict(xytext=(5, -11), textcoords="offset points", fontsize=7.5)
            panel.annotate(row.label, (row.cost, row.top1), color=INK, **place)
        panel.axhline(distinct(frame.fp32_top1)[0], label="float", **DASHED)
        panel.set_ylabel("top-1 accuracy, %")
        panel.margins(x=0.08, y=0.1)
    sizes.set(xlabel="weights as stored, kB", title="Size: activations at 8 bits")
    operations.set(xlabel="bit operations an image, 10⁹ (log scale)", xscale="log")
    operations.set_title("Operations: weights and activations")
    operations.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    plain(operations.xaxis)
    sizes.legend(loc="lower right")
    return caption(figure, text)


@styled
def search_front(tried, chosen, lose, unit, text):
    """What a search tried: frame of stage ("uniform", "nearest", "learned"), cost, lost, low, high
    (points). chosen: (cost, lost). lose: what was allowed. unit: of the cost, in words.
    """
    figure, (axes,) = panels(1, 7.5, 4.4)
    stages = {"uniform": ("one width for all layers", "nearest"),
              "nearest": ("a width for each layer", "mixed precision"),
              "learned": ("a width for each layer, learned", "QDrop")}
    for stage, (name, method) in stages.items():
        part = tried[tried.stage == stage].sort_values("cost")
        if len(part):
            look = method_style(method) | ({} if stage == "uniform" else {"linestyle": ""})
            lengths = whiskers(part, "lost", "low", "high")
            axes.errorbar(part.cost, part.lost, yerr=lengths, label=name, elinewidth=0.8, **look)
    axes.plot(*chosen, "o", markersize=15, fillstyle="none", color=RED, label="chosen")
    axes.axhline(lose, label=f"{lose:g} points allowed", **DASHED)
    axes.set(xscale="log", xlabel=f"{unit} (log scale)", ylabel="points lost against float")
    lost_scale(axes.yaxis, min(0, tried.low.min()), max(tried.high.max(), 1))
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    plain(axes.xaxis)
    axes.legend(loc="upper right", fontsize=8)
    return caption(figure, text)


@styled
def conventions(frame, text):
    """frame: width, convention, gain, gain_low, gain_high (points) by one change of convention."""
    names, columns = distinct(frame.convention), ["gain", "gain_low", "gain_high"]
    figure, parts = facets(frame, "width", 4.6, 1.5 + 0.36 * len(names), extra=1, sharey=True)
    for panel, width, part in parts:
        part = part.groupby("convention")[columns].mean().reindex(names)
        colours = np.where(part.gain >= 0, BLUE, RED)
        bars(panel, range(len(names)), part.gain, whiskers(part, *columns), colours)
        panel.set(xlabel="points gained against our convention", title=width)
    name_rows(figure.axes[0], names)
    return caption(figure, text)


@styled
def networks_by_bits(table, text):
    """Points lost by width, the networks beside each other, a panel a method.

    table: method, width (W4A8, ...), model, drop, drop_low, drop_high (points).
    """
    methods, models = distinct(table.method), distinct(table.model)
    most = table.groupby("method").width.nunique().max()
    size = 6 * len(methods) + 1.5, 0.4 * most * len(models) + 1.2
    figure, grid = panels(len(methods), *size)
    height = 0.8 / len(models)
    for axes, method in zip(grid, methods, strict=True):
        part = table[table.method == method]
        widths = distinct(part.width)
        for i, (model, colour) in enumerate(zip(models, VARIANT_COLOURS)):
            own = part[part.model == model]
            place = (i - (len(models) - 1) / 2) * height
            rows = [widths.index(width) + place for width in own.width]
            bars(axes, rows, own["drop"], whiskers(own), colour, height, label=model)
        name_rows(axes, widths)
        axes.set(xlabel="points lost against the float network", title=method)
    grid[0].legend(loc="upper right")
    figure.suptitle("Small against large", fontsize=11)
    return caption(figure, text)
