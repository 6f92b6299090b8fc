"""One figure for one range (histogram, codes, error), and a panel of widgets that redraws it: JupyterLab and Colab alike."""

import functools
import io

import ipywidgets as widgets
import matplotlib.pyplot as plt
import numpy as np
import torch

from quantlab import observers
from quantlab.affine import choose_qparams
from quantlab.analysis.distributions import split_error
from quantlab.plots.style import COLOURS, DATA_COLOUR, ERROR_COLOUR, MARKERS, caption

SHARES = torch.linspace(0.1, 1.5, 71, dtype=torch.float64)  # of the observer's range: what the slider and the error curve cover


def range_figure(stats, name, bits, observer, chosen, share, text):
    """An edge (EdgeStats) under `share` of the range (low, high) that an observer chose at `bits`: codes on the histogram, and the error.

    Left: the values by which codes are represented (grey), the clip range (dashed) and what lies beyond it (red). Right: clipping, rounding
    and their sum as the range is scaled from 0.1 to 1.5; the ring is `share`, the observer's own mark stands at 1.
    """
    low, high = chosen
    q = choose_qparams(low * share, high * share, bits)
    levels = (torch.arange(q.qmin, q.qmax + 1) - q.zero_point) * q.scale
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), width_ratios=(5, 3))
    _histogram(left, stats, levels.numpy())
    left.set_title(f"{name}: {low * share:.3g} to {high * share:.3g}, {len(levels)} codes, one step {q.scale.item():.3g}")
    style = COLOURS.get(observer, ERROR_COLOUR), MARKERS.get(observer, "o")
    _error_curve(right, stats, bits, low, high, share, *style)
    return caption(figure, f"{text}; {bits} bits, {share:.2f} of the range of {observer}")


def _histogram(axes, stats, levels):
    centers, counts = (v.numpy() for v in stats.histogram())
    if not len(counts):
        axes.text(0.5, 0.5, "only zeros", ha="center", transform=axes.transAxes)
        return
    starts = np.arange(0, len(centers), max(1, len(centers) // 200))
    density = np.add.reduceat(counts, starts) / (stats.count * stats.width * max(1, len(centers) // 200))
    x = np.add.reduceat(centers, starts) / np.diff(np.append(starts, len(centers)))
    floor, top = density[density > 0].min() / 2, density.max() * 3
    inside = (x >= levels[0]) & (x <= levels[-1])
    for part, colour, label in ((inside, DATA_COLOUR, "values with a code near them"), (~inside, ERROR_COLOUR, "clipped")):
        height = np.where(part, density, floor).clip(floor)
        axes.fill_between(x, floor, height, step="mid", color=colour, alpha=0.65, linewidth=0, label=label)
    axes.vlines(levels, floor, top if len(levels) <= 32 else floor * 4, color=COLOURS["float"], linewidth=0.6, alpha=0.6, label="codes")
    axes.vlines(levels[[0, -1]], floor, top, color=COLOURS["float"], linestyle="--", linewidth=1.4, label="clip range")
    axes.set(yscale="log", ylim=(floor, top), xlabel="value", ylabel="density (log scale)")
    axes.minorticks_off()  # most of the time of a redraw
    axes.legend(fontsize=7.5, loc="upper right", frameon=True, edgecolor="none")


def _error_curve(axes, stats, bits, low, high, share, colour, marker):
    scales = torch.cat([SHARES, torch.tensor([1.0, share], dtype=torch.float64)])
    clipping, rounding = (v.numpy() for v in split_error(stats, scales * low, scales * high, bits))
    total, n = clipping + rounding, len(SHARES)
    axes.plot(SHARES, clipping[:n], color=ERROR_COLOUR, linestyle=":", label="clipping")
    axes.plot(SHARES, rounding[:n], color=DATA_COLOUR, linestyle="--", label="rounding")
    axes.plot(SHARES, total[:n], color=COLOURS["float"], label="sum")
    axes.plot(1, total[n], marker, color=colour, markersize=8, label="the observer's choice")
    axes.plot(share, total[-1], "o", color=COLOURS["float"], markersize=13, fillstyle="none", markeredgewidth=1.8, label="this range")
    signal = float(stats.histogram()[0].square() @ stats.histogram()[1].double()) / max(stats.count, 1)
    ratio = f"{10 * np.log10(signal / total[-1]):.1f} dB" if total[-1] > 0 and signal > 0 else "no error"
    part = f", {clipping[-1] / total[-1]:.0%} of the error is clipping" if total[-1] > 0 else ""
    axes.set_title(f"{ratio}{part}")
    axes.set(xlabel="share of the observer's range", ylabel="mean squared error")
    if total.max() > 0:
        axes.set(yscale="log", ylim=(total[total > 0].min() / 30, total.max() * 3))
    axes.minorticks_off()
    axes.legend(fontsize=7.5)


def range_panel(edges, text, *, edge=None, bits=4, observer="histogram", share=1.0):
    """Widgets for edge, bits, observer and share over `range_figure`, which every change redraws; an ipywidgets box.

    edges: name -> EdgeStats, as in `collect(...).edges`; text: the figure's caption. The controls are the box's first child.
    """
    choose = functools.cache(lambda name, width, how: observers.OBSERVERS[how](edges[name], width))  # entropy takes a moment
    controls = {
        "edge": widgets.Dropdown(options=list(edges), value=edge or next(iter(edges)), description="edge"),
        "bits": widgets.IntSlider(bits, 2, 8, description="bits", continuous_update=False),
        "observer": widgets.Dropdown(options=list(observers.OBSERVERS), value=observer, description="observer"),
        "share": widgets.FloatSlider(share, min=0.1, max=1.5, step=0.01, description="clip range", continuous_update=False),
    }
    picture = widgets.Image(format="png", layout=widgets.Layout(max_width="100%"))

    def redraw(change=None):
        name, width, how, scale = (controls[c].value for c in ("edge", "bits", "observer", "share"))
        figure = range_figure(edges[name], name, width, how, choose(name, width, how), scale, text)
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=110)
        picture.value = file.getvalue()

    for control in controls.values():
        control.observe(redraw, names="value")
    redraw()
    return widgets.VBox([widgets.HBox(list(controls.values()), layout=widgets.Layout(flex_flow="row wrap")), picture])
