"""Beyond static quantization: curves of fine-tuning, sources of calibration, the source map."""

import numpy as np
from matplotlib.ticker import MaxNLocator

from quantlab.plots.page import caption, distinct, panels
from quantlab.plots.parts import bars, in_order, legend, name_rows
from quantlab.plots.style import BLUE, DASHED, GREY, INK, colour_of, method_style, styled


@styled
def fine_tuning(history, levels, text):
    """history: images (seen), heldout (top-1, %), loss; levels: name -> accuracy in %, as lines."""
    figure, (left, right) = panels(2, 12, 3.6)
    left.plot(history.images, history.loss, color=BLUE)
    left.set(ylabel="cross-entropy, training images", title="Loss", ylim=(0, None))
    look = dict(markersize=4, label="fine-tuned, learned steps") | method_style("QAT")
    right.plot(history.images, history.heldout, **look)
    for (name, level), line in zip(levels.items(), ("--", ":", "-.", (0, (1, 4)))):
        right.axhline(level, linestyle=line, color=INK, label=f"{name}: {level:.2f} %")
    right.set(ylabel="top-1 accuracy, held-out images, %", title="Accuracy")
    legend(right)
    for panel in (left, right):
        panel.set_xlabel("images seen")
        panel.xaxis.set_major_locator(MaxNLocator(5))
        panel.xaxis.set_major_formatter("{x:,.0f}")
    return caption(figure, text)


@styled
def calibration_sources(table, ranges, text):
    """table: source, images, top1, float (%), a row a seed; ranges: source, order, ratio."""
    figure, (left, right) = panels(2, 11, 3.8, width_ratios=[2, 3])
    lost = (table.float - table.top1).groupby([table.source, table.images], sort=False)
    means, lengths = lost.mean(), [lost.mean() - lost.min(), lost.max() - lost.mean()]
    bars(left, range(len(means)), means, lengths, [colour_of(source) for source, _ in means.index])
    left.set(xlabel="points lost against float", title="Lost, by what it was calibrated on")
    name_rows(left, [f"{source}, {images:,}" for source, images in means.index])
    for source in distinct(ranges.source):
        part = ranges[ranges.source == source]
        look = dict(linewidth=0.8, markersize=4, label=source) | method_style(source)
        right.plot(part.order, part.ratio, **look)
    right.axhline(1, **DASHED)
    right.set(yscale="log", title="Which ranges come out", ylabel="range / that of real images")
    in_order(right, "edges")
    right.set_yticks([0.1, 0.2, 0.5, 1, 2, 5], ["0.1", "0.2", "0.5", "1", "2", "5"])
    right.minorticks_off()
    right.legend()
    return caption(figure, text)


@styled
def source_map(packages, text, strongest=16):
    """packages: name -> (topics, edges) of sourcemap. Circles: topics, area: lines; arrows: from
    who uses to who is used, width: names taken.
    """
    figure, axes = panels(len(distinct(packages)), 8.4 * len(packages), 8)
    for panel, (name, (topics, edges)) in zip(axes, packages.items()):
        places = dict(zip(topics.topic, _oval(len(topics))))
        sizes = 4 + 26 * np.sqrt(topics.lines / topics.lines.max())  # radius in points
        radius = dict(zip(topics.topic, sizes))
        for edge in edges.head(strongest).itertuples():
            width = 0.6 + 3.5 * np.sqrt(edge.uses / edges.uses.max())
            start, end = edge.importer, edge.imported
            gaps = dict(shrinkA=radius[start] + 2, shrinkB=radius[end] + 2, linewidth=width)
            _arrow(panel, places[start], places[end], **gaps)
        for row in topics.itertuples():
            look = dict(s=(2 * radius[row.topic]) ** 2, color=BLUE, edgecolor="white", zorder=2)
            panel.scatter(*places[row.topic], **look)
            _topic_label(panel, row, places[row.topic], radius[row.topic] + 5)
        panel.set(xlim=(-2.1, 2.1), ylim=(-1.4, 1.4))
        panel.set_title(name, fontsize=13, pad=18)
        panel.axis("off")
    return caption(figure, text)


def _arrow(panel, start, end, **options):
    """From circle to circle; along one side it bends inwards, past the circles between."""
    bend = 0.15
    if start[0] * end[0] > 0:
        bend = -0.4 * np.sign(start[0]) * np.sign(end[1] - start[1])
    look = dict(arrowstyle="-|>", mutation_scale=13, color=GREY, alpha=0.7)
    look |= dict(connectionstyle=f"arc3,rad={bend}", **options)
    panel.annotate("", end, start, arrowprops=look, zorder=1)


def _oval(count):
    """Places on an oval, clockwise from the top, equally apart in height: labels do not meet."""
    if count == 1:
        return [(0.0, 1.0)]
    right = np.linspace(0.8, -0.8, (count - 1) // 2)
    left = np.linspace(-0.8, 0.8, (count - 2) // 2)
    x, y = 1.2 * np.sqrt(1 - (0.85 * right) ** 2), 1.2 * np.sqrt(1 - (0.85 * left) ** 2)
    return [(0.0, 1.0), *zip(x, right), (0.0, -1.0), *zip(-y, left)]


def _topic_label(panel, row, place, distance):
    """A topic's name, size and most used names outside its circle, at a distance in points."""
    lines = [f"{row.modules} file{'s' * (row.modules > 1)}, {row.lines:,} lines", *row.used]
    height = 15 + 10.5 * len(lines)
    x, y = place
    across, top, side = distance * np.sign(x), height / 2, "left" if x > 0 else "right"
    if abs(x) < 0.2:  # the circles at the top and at the bottom
        across, side = 0, "center"
        top = distance + height if y > 0 else -distance
    options = dict(xy=place, textcoords="offset points", ha=side, va="top", zorder=3)
    panel.annotate(row.topic, xytext=(across, top), fontsize=11, fontweight="bold", **options)
    below = dict(xytext=(across, top - 15), fontsize=8, color=GREY)
    panel.annotate("\n".join(lines), **below, **options)
