"""Figures of notebook 10: learning curves of a fine-tuned network, calibration sources, the source map."""

import matplotlib.pyplot as plt
import numpy as np

from quantlab.plots.style import COLOURS, DATA_COLOUR, ERROR_COLOUR, caption

SOURCE_COLOURS = {"real images": COLOURS["histogram"], "distilled images": COLOURS["mse"], "noise": COLOURS["minmax"]}
SOURCE_MARKERS = {"real images": "o", "distilled images": "D", "noise": "s"}


def fine_tuning(history, levels, text):
    """history: images (seen), heldout (top-1, %), loss; levels: name -> accuracy in %, drawn as lines: what fine-tuning brings for what it costs."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
    left.plot(history.images, history.loss, color=DATA_COLOUR)
    left.set(xlabel="images seen", ylabel="cross-entropy, training images", title="Loss", ylim=(0, None))
    right.plot(history.images, history.heldout, "-o", color=ERROR_COLOUR, markersize=4, label="fine-tuned, learned steps")
    for (name, level), style in zip(levels.items(), ("--", ":")):
        right.axhline(level, linestyle=style, color=COLOURS["float"], label=f"{name}: {level:.2f} %")
    right.set(xlabel="images seen", ylabel="top-1 accuracy, held-out images, %", title="Accuracy")
    right.legend(loc="lower right")
    return caption(figure, text)


def calibration_sources(table, ranges, text):
    """table: source, images, top1 (%) and float (%), one row a seed; ranges: source, order (of the edge), ratio (chosen range over that of real images)."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), width_ratios=[2, 3])
    means = table.groupby(["source", "images"], sort=False).top1.agg(["mean", "min", "max"])
    names = [f"{source}, {images:,}" for source, images in means.index]
    error = np.stack([means["mean"] - means["min"], means["max"] - means["mean"]])
    left.barh(names, means["mean"], xerr=error, height=0.6, color=[SOURCE_COLOURS[s] for s, _ in means.index], error_kw=dict(capsize=3, lw=1, ecolor="#444444"))
    for i, (value, end) in enumerate(zip(means["mean"], means["max"])):
        left.annotate(f"{value:.2f}", (end, i), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9)
    left.axvline(table.float.iloc[0], color=COLOURS["float"], linestyle="--", linewidth=1, label="float")
    left.set(xlabel="top-1 accuracy, %", xlim=(0, 115), title="Accuracy by what it was calibrated on")
    left.set_xticks([0, 25, 50, 75, 100])
    left.invert_yaxis()
    left.grid(axis="y", visible=False)
    for source, part in ranges.groupby("source", sort=False):
        right.plot(part.order, part.ratio, SOURCE_MARKERS[source], linestyle="-", linewidth=0.8, markersize=4, color=SOURCE_COLOURS[source], label=source)
    right.axhline(1, color=COLOURS["float"], linestyle="--", linewidth=1)
    right.set(yscale="log", xlabel="edges, in order of execution", ylabel="range / that of real images", title="Which ranges come out")
    right.set_yticks([0.1, 0.2, 0.5, 1, 2, 5], ["0.1", "0.2", "0.5", "1", "2", "5"])
    right.minorticks_off()
    right.legend()
    return caption(figure, text)


def source_map(packages, text, strongest=16):
    """packages: name -> (topics, edges) of sourcemap: topics as circles (area: lines), arrows from who uses to who is used (width: names taken)."""
    figure, axes = plt.subplots(1, len(packages), figsize=(8.2 * len(packages), 8), squeeze=False)
    for panel, (name, (topics, edges)) in zip(axes[0], packages.items()):
        angles = np.pi / 2 - 2 * np.pi * np.arange(len(topics)) / len(topics)
        place = {topic: np.array([np.cos(a), np.sin(a)]) for topic, a in zip(topics.topic, angles)}
        area = dict(zip(topics.topic, 3500 * topics.lines / topics.lines.max() + 40))
        for rank, edge in enumerate(edges.head(strongest).itertuples()):
            start, end = place[edge.importer], place[edge.imported]
            style = dict(arrowstyle="-|>", mutation_scale=14, color="#666666", alpha=0.75, linewidth=0.8 + 3.5 * edge.uses / edges.uses.max(), connectionstyle="arc3,rad=0.15",
                         shrinkA=np.sqrt(area[edge.importer]) / 2 + 2, shrinkB=np.sqrt(area[edge.imported]) / 2 + 2)  # fmt: skip
            panel.annotate("", end, start, arrowprops=style, zorder=1)
        for row in topics.itertuples():
            x, y = place[row.topic]
            panel.scatter(x, y, s=area[row.topic], color=DATA_COLOUR, edgecolor="white", zorder=2)
            away = 1.0 + (np.sqrt(area[row.topic]) / 2 + 6) / 250
            side = "center" if abs(x) < 0.25 else "left" if x > 0 else "right"
            used = "\n".join(n for n in row.used if n)
            panel.text(x * away, y * away, f"{row.topic}\n", ha=side, va="center", fontsize=11, fontweight="bold")
            panel.text(x * away, y * away, f"\n{row.modules} files, {row.lines:,} lines\n{used}", ha=side, va="center" if abs(y) < 0.9 else "bottom" if y > 0 else "top", fontsize=8, color="#444444")
        panel.set(xlim=(-1.95, 1.95), ylim=(-1.5, 1.5), title=name)
        panel.axis("off")
    return caption(figure, text)
