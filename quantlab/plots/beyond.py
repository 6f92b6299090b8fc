"""Figures of notebook 10: learning curves of a fine-tuned network, calibration sources, the source map."""

import matplotlib.pyplot as plt
import numpy as np

from quantlab.plots.style import COLOURS, DATA_COLOUR, ERROR_COLOUR, caption

SOURCE_COLOURS = {"real images": COLOURS["histogram"], "distilled images": COLOURS["mse"], "noise images": COLOURS["minmax"]}
SOURCE_MARKERS = {"real images": "o", "distilled images": "D", "noise images": "s"}


def fine_tuning(history, levels, text):
    """history: images (seen), heldout (top-1, %), loss; levels: name -> accuracy in %, drawn as lines."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
    left.plot(history.images, history.loss, color=DATA_COLOUR)
    left.set(xlabel="images seen", ylabel="cross-entropy, training images", title="Loss", ylim=(0, None))
    right.plot(history.images, history.heldout, "-o", color=ERROR_COLOUR, markersize=4, label="fine-tuned, learned steps")
    for (name, level), style in zip(levels.items(), ("--", ":")):
        right.axhline(level, linestyle=style, color=COLOURS["float"], label=f"{name}: {level:.2f} %")
    right.set(xlabel="images seen", ylabel="top-1 accuracy, held-out images, %", title="Accuracy")
    right.legend(loc="center right")
    return caption(figure, text)


def calibration_sources(table, ranges, text):
    """table: source, images, top1 and float (%), a row a seed; ranges: source, order (of the edge), ratio (to real images' range)."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), width_ratios=[2, 3])
    lost = table.assign(lost=table.float - table.top1)
    means = lost.groupby(["source", "images"], sort=False).lost.agg(["mean", "min", "max"])
    names = [f"{source}, {images:,}" for source, images in means.index]
    error = np.stack([means["mean"] - means["min"], means["max"] - means["mean"]])
    colours, whiskers = [SOURCE_COLOURS[s] for s, _ in means.index], dict(capsize=3, lw=1, ecolor="#444444")
    left.barh(names, means["mean"], xerr=error, height=0.6, color=colours, error_kw=whiskers)
    for i, (value, end) in enumerate(zip(means["mean"], means["max"])):
        left.annotate(f"{value:+.2f}", (max(end, 0), i), xytext=(5, 0), textcoords="offset points", va="center", fontsize=9)
    left.axvline(0, color=COLOURS["float"], linewidth=0.8)
    ends = min(0, 1.3 * means["min"].min()), 1.3 * max(means["max"].max(), 0.5)
    left.set(xlabel="points lost against float", xlim=ends, title="Lost, by what it was calibrated on")
    left.invert_yaxis()
    left.grid(axis="y", visible=False)
    for source, part in ranges.groupby("source", sort=False):
        style = dict(marker=SOURCE_MARKERS[source], color=SOURCE_COLOURS[source], linewidth=0.8, markersize=4)
        right.plot(part.order, part.ratio, label=source, **style)
    right.axhline(1, color=COLOURS["float"], linestyle="--", linewidth=1)
    right.set(yscale="log", xlabel="edges, in order of execution", ylabel="range / that of real images", title="Which ranges come out")
    right.set_yticks([0.1, 0.2, 0.5, 1, 2, 5], ["0.1", "0.2", "0.5", "1", "2", "5"])
    right.minorticks_off()
    right.legend()
    return caption(figure, text)


def source_map(packages, text, strongest=16):
    """packages: name -> (topics, edges) of sourcemap: circles (area: lines), arrows from who uses to who is used (width: names taken)."""
    figure, axes = plt.subplots(1, len(packages), figsize=(8.4 * len(packages), 8), squeeze=False)
    for panel, (name, (topics, edges)) in zip(axes[0], packages.items()):
        place = dict(zip(topics.topic, _oval(len(topics))))
        radius = dict(zip(topics.topic, 4 + 26 * np.sqrt(topics.lines / topics.lines.max())))  # in points
        for edge in edges.head(strongest).itertuples():
            (x0, y0), (x1, y1) = place[edge.importer], place[edge.imported]
            bend = -0.4 * np.sign(x0) * np.sign(y1 - y0) if x0 * x1 > 0 else 0.15  # along one side: inwards, past the circles between
            width = 0.6 + 3.5 * np.sqrt(edge.uses / edges.uses.max())
            gaps = dict(shrinkA=radius[edge.importer] + 2, shrinkB=radius[edge.imported] + 2, connectionstyle=f"arc3,rad={bend}")
            style = dict(arrowstyle="-|>", mutation_scale=13, color="#666666", alpha=0.7, linewidth=width, **gaps)
            panel.annotate("", (x1, y1), (x0, y0), arrowprops=style, zorder=1)
        for row in topics.itertuples():
            panel.scatter(*place[row.topic], s=(2 * radius[row.topic]) ** 2, color=DATA_COLOUR, edgecolor="white", zorder=2)
            _topic_label(panel, row, place[row.topic], radius[row.topic] + 5)
        panel.set(xlim=(-2.1, 2.1), ylim=(-1.4, 1.4))
        panel.set_title(name, fontsize=13, pad=18)
        panel.axis("off")
    return caption(figure, text)


def _oval(count):
    """Places on an oval, clockwise from the top, at equal distances in height, so that the labels beside it do not meet."""
    right, left = (np.linspace(0.8, -0.8, n) for n in (-(-(count - 2) // 2), (count - 2) // 2))
    bulge = [(1.2 * np.sqrt(1 - (0.85 * y) ** 2), y) for y in right], [(-1.2 * np.sqrt(1 - (0.85 * y) ** 2), y) for y in left[::-1]]
    return [(0.0, 1.0), *bulge[0], (0.0, -1.0), *bulge[1]]


def _topic_label(panel, row, place, distance):
    """A topic's name, size and most used names beside its circle, on the side that looks outwards; distance in points."""
    lines = [f"{row.modules} file{'s' * (row.modules > 1)}, {row.lines:,} lines", *row.used]
    height = 15 + 10.5 * len(lines)
    x, y = place
    above, centred = abs(x) < 0.2, "center" if abs(x) < 0.2 else "left" if x > 0 else "right"
    right = 0 if above else distance * np.sign(x)
    top = height / 2 if not above else distance + height if y > 0 else -distance
    options = dict(xy=place, textcoords="offset points", ha=centred, va="top", zorder=3)
    panel.annotate(row.topic, xytext=(right, top), fontsize=11, fontweight="bold", **options)
    panel.annotate("\n".join(lines), xytext=(right, top - 15), fontsize=8, color="#444444", **options)
