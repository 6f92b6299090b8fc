"""Accuracy, size and speed by method, bits and calibration images."""

from matplotlib.ticker import MaxNLocator

from quantlab.plots.page import caption, distinct, panels
from quantlab.plots.parts import bars, lost_scale, name_rows, whiskers
from quantlab.plots.style import BLUE, DASHED, colour_of, method_style, styled


@styled
def method_bars(table, text):
    """table: method, top1 (%), bytes, images_per_s: accuracy, size and throughput side by side.

    device, where there is such a column, names the machine and its threads; rows of several are
    drawn without their throughput, which would compare machines.
    """
    names = distinct(table.method)
    columns = {"top-1 accuracy, %": table.top1, "weights as stored, kB": table.bytes / 1000}
    if "device" not in table or table.device.nunique() == 1:
        columns["throughput, images/s"] = table.images_per_s
    figure, axes = panels(len(columns), 10, 0.55 * len(names) + 1.5, sharey=True)
    for panel, (label, values) in zip(axes, columns.items()):
        _labelled_bars(panel, names, values, label, [colour_of(name) for name in names])
    axes[0].set(xlim=(0, 130), xticks=[0, 25, 50, 75, 100])
    name_rows(axes[0], names)
    return caption(figure, text)


@styled
def what_a_bit_buys(table, marks, text):
    """By width (W4A4, ...): what it costs in accuracy, what it saves in bytes and in time.

    table: width, drop, drop_low, drop_high (points), megabytes, ms (an image). marks: name -> ms of
    others on the same machine.
    """
    names = distinct(table.width)
    figure, (lost, size, time) = panels(3, 11, 0.5 * len(names) + 1.9, sharey=True)
    bars(lost, range(len(names)), table["drop"].to_numpy(), whiskers(table), BLUE)
    lost.set(xlabel="points lost, 95 % interval")
    for panel, label, values in ((size, "weights as stored, MB", table.megabytes),
                                 (time, "ms an image, integers alone", table.ms)):
        _labelled_bars(panel, range(len(names)), values, label, BLUE)
    time.set(xlim=(0, 1.3 * max(*table.ms, *marks.values())))
    for (name, ms), look in zip(marks.items(), ("--", ":", "-.")):
        time.axvline(ms, **DASHED | {"linestyle": look, "label": f"{name}, {_short(ms)}"})
    time.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, fontsize=8)
    name_rows(lost, names)
    return caption(figure, text)


def _labelled_bars(panel, rows, values, label, colours):
    """Horizontal bars from zero, each with its value behind it."""
    drawn = panel.barh(rows, values.astype(float), 0.6, color=colours)
    panel.bar_label(drawn, [f" {_short(value)}" for value in values], fontsize=9)
    panel.set(xlabel=label, xlim=(0, 1.3 * values.max()))
    panel.xaxis.set_major_locator(MaxNLocator(4))
    panel.grid(axis="y", visible=False)


def _short(value):
    """Four digits, or all before the point: 99.12, 0.0312, 12,345."""
    return f"{value:#.4g}" if value < 1000 else f"{value:,.0f}"


@styled
def accuracy_by_bits(table, text, bits_label="bits of weights and activations"):
    """table: bits, observer, top1 and fp32_top1 (%), drop, drop_low, drop_high (points, paired), a
    row a seed. Left the means, with a band between the seeds; right the points lost, side by side,
    with the mean of the seeds' intervals: what reaches zero is no loss that was seen.
    """
    figure, (left, right) = panels(2, 10, 4.2)
    observers = distinct(table.observer)
    for i, observer in enumerate(observers):
        groups = table[table.observer == observer].groupby("bits")
        _band(left, groups.top1, observer)
        lost = groups[["drop", "drop_low", "drop_high"]].mean()
        aside = 0.5 * ((i + 0.5) / len(observers) - 0.5)  # of the bits, on a reversed axis
        look = dict(elinewidth=1, capsize=2, linewidth=0.8) | method_style(observer)
        right.errorbar(lost.index - aside, lost["drop"], yerr=whiskers(lost), **look)
    right.axhline(0, **DASHED)
    left.axhline(table.fp32_top1.iloc[0], label="float", **DASHED)
    left.set(xlabel=bits_label, ylabel="top-1 accuracy, %", title="Accuracy")
    left.set_ylim(10 * (table.top1.min() // 10), 10 * -(-table.fp32_top1.max() // 10) + 2)
    right.set(xlabel=bits_label, ylabel="points lost (log scale beyond 0.5)")
    right.set_title("Points lost against float, 95 % intervals")
    lost_scale(right.yaxis, min(table.drop_low.min(), 0), max(table.drop_high.max(), 1))
    for panel in (left, right):
        panel.set_xticks(sorted(table.bits.unique()))
        panel.invert_xaxis()
    left.legend(loc="lower left")
    return caption(figure, text)


def _band(axes, groups, observer):
    """The mean of every group with the range between its seeds."""
    means, style = groups.mean(), method_style(observer)
    axes.plot(means, label=observer, **style)
    look = dict(color=style["color"], alpha=0.15, linewidth=0)
    axes.fill_between(means.index, groups.min(), groups.max(), **look)


@styled
def accuracy_by_images(table, text):
    """table: observer, n, seed, top1 (%): mean over seeds, with the range between them."""
    figure, (axes,) = panels(1, 6.4, 3.6)
    for observer in distinct(table.observer):
        _band(axes, table[table.observer == observer].groupby("n").top1, observer)
    axes.set(xscale="log", xlabel="calibration images", ylabel="top-1 accuracy, %")
    axes.set_title("How many images are enough?")
    counts = sorted(table.n.unique())
    axes.set_xticks(counts, [f"{n:,}" for n in counts])
    axes.minorticks_off()
    axes.legend()
    return caption(figure, text)
