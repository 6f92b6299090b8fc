"""One figure for one range (histogram, codes, error), and a panel of widgets that redraws it."""

import functools
import io

import ipywidgets as widgets
import torch

from quantlab.affine import choose_qparams
from quantlab.observers import OBSERVERS, quantization_error
from quantlab.plots.page import caption, panels
from quantlab.plots.parts import error_curves, histogram
from quantlab.plots.style import DASHED, INK, method_style, styled
from quantlab.system.comparing import decibels

# Fractions of the observer's range: what the slider and the error curve cover.
FRACTIONS = torch.linspace(0.1, 1.5, 71, dtype=torch.float64)


@styled
def range_figure(stats, name, bits, observer, chosen, share, text):
    """An edge (EdgeStats) under the fraction `share` of the range (low, high) that an observer
    chose at `bits`: codes on the histogram, and the error.

    Left: the values by which codes are represented (grey), the clip range (dashed) and what lies
    beyond it (red). Right: clipping, rounding and their sum as the range is scaled from 0.1 to 1.5;
    the ring is `share`, the observer's own mark stands at 1.
    """
    low, high = chosen
    q = choose_qparams(low * share, high * share, bits)
    levels = (torch.arange(q.qmin, q.qmax + 1) - q.zero_point) * q.scale
    figure, (left, right) = panels(2, 11, 3.8, width_ratios=(5, 3))
    _draw_codes(left, stats, levels.numpy())
    span = f"{low * share + 0:.3g} to {high * share + 0:.3g}"  # 0, not -0
    left.set_title(f"{name}: {span}, {len(levels)} codes, one step {q.scale.item():.3g}")
    _draw_errors(right, stats, bits, chosen, share, method_style(observer))
    return caption(figure, f"{text}; {bits} bits, {share:.2f} of the range of {observer}")


def _draw_codes(axes, stats, levels):
    floor, top = histogram(axes, stats, (levels[0], levels[-1]))
    reached = 3 * top if len(levels) <= 32 else floor * 4
    axes.vlines(levels, floor, reached, color=INK, linewidth=0.6, alpha=0.6, label="codes")
    axes.vlines(levels[[0, -1]], floor, 3 * top, label="clip range", **DASHED)
    axes.set_xlabel("value")
    axes.minorticks_off()  # most of the time of a redraw
    axes.legend(fontsize=7.5, loc="upper right", frameon=True, edgecolor="none")


def _draw_errors(axes, stats, bits, chosen, share, style):
    scales = torch.cat([FRACTIONS, torch.tensor([1.0, share], dtype=torch.float64)])
    low, high = (scales * end for end in chosen)
    clipping, rounding = (v.numpy() for v in split_error(stats, low, high, bits))
    total, n = clipping + rounding, len(FRACTIONS)
    error_curves(axes, FRACTIONS, clipping[:n], rounding[:n])
    axes.plot(1, total[n], markersize=8, linestyle="", label="the observer's choice", **style)
    ring = dict(markersize=13, fillstyle="none", markeredgewidth=1.8, label="this range")
    axes.plot(share, total[-1], "o", color=INK, **ring)
    centers, counts = stats.histogram()
    signal = float(centers.square() @ counts.double()) / max(stats.count, 1)
    axes.set(xlabel="fraction of the observer's range", ylabel="mean squared error")
    axes.set_title("no error")
    if total[-1] > 0:
        clipped = f"{clipping[-1] / total[-1]:.0%} of the error is clipping"
        axes.set_title(f"{decibels(signal, total[-1]):.1f} dB, {clipped}")
    axes.minorticks_off()
    axes.legend(fontsize=7.5)


def range_panel(edges, text, *, edge=None, bits=4, observer="histogram", share=1.0):
    """Widgets for edge, bits, observer and fraction over `range_figure`, which every change
    redraws; an ipywidgets box.

    edges: name -> EdgeStats, as in `collect(...).edges`; text: the figure's caption. The controls
    are the box's first child.
    """
    names = list(edges)
    controls = {
        "edge": widgets.Dropdown(options=names, value=edge or names[0], description="edge"),
        "bits": widgets.IntSlider(bits, 2, 8, description="bits", continuous_update=False),
        "observer": widgets.Dropdown(
            options=list(OBSERVERS), value=observer, description="observer"),
        "share": widgets.FloatSlider(share, min=0.1, max=1.5, step=0.01, description="clip range",
                                     continuous_update=False),
    }
    picture = widgets.Image(format="png", layout=widgets.Layout(max_width="100%"))

    @functools.cache  # entropy takes a moment
    def choose(name, bits, observer):
        return OBSERVERS[observer](edges[name], bits)

    def redraw(change=None):
        name, *choice = (controls[c].value for c in ("edge", "bits", "observer"))
        range_ = choose(name, *choice)
        figure = range_figure(edges[name], name, *choice, range_, controls["share"].value, text)
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=110)
        picture.value = file.getvalue()

    for control in controls.values():
        control.observe(redraw, names="value")
    redraw()
    row = widgets.HBox(list(controls.values()), layout=widgets.Layout(flex_flow="row wrap"))
    return widgets.VBox([row, picture])


def split_error(stats, low, high, bits):
    """(clipping, rounding): squared error of the ranges [low, high] by cause; float64 [G] each.

    Clipping is what values lose beyond the outermost codes, rounding what they lose between two.
    """
    q = choose_qparams(low, high, bits, axis=0)
    centers, counts = stats.histogram()
    bottom, top = (q.scale.double() * (code - q.zero_point) for code in (q.qmin, q.qmax))
    beyond = (centers - top[:, None]).clamp(min=0) + (bottom[:, None] - centers).clamp(min=0)
    clipping = beyond.square() @ counts.double() / max(stats.count, 1)
    return clipping, (quantization_error(stats, low, high, bits) - clipping).clamp(min=0)
