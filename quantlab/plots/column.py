"""A finished figure at the width of a column: letters of a journal's size, panels one below the
other where they do not fit side by side, the caption in a file of its own.
"""

import contextlib
import warnings

import numpy as np
from matplotlib.gridspec import GridSpec
from matplotlib.lines import Line2D
from matplotlib.text import Text

from quantlab.plots.style import saving
from quantlab.system.errors import UserError
from quantlab.system.files import atomic_path, root, write_text
from quantlab.system.paper import asked, check_paper

SHRUNK = 0.7  # letters of 10 points become 7
LEAST = 0.55  # inches: a panel narrower or lower shows nothing
WIDTHS = (89, 120, 160, 183, 240)  # mm, to name one that would do
NARROW = 0.75  # of the width that side by side they would have: below, panels are stacked


@saving
def save_columns(figure, name, widths, formats):
    """Write results/figures/NAME_WIDTHmm.FORMAT for every width (mm) and format, and NAME.txt with
    the caption; UserError, in one line, where the figure cannot be as narrow.
    """
    widths, formats = check_paper(widths, formats)
    folder = root() / "results" / "figures"
    label = figure._supxlabel
    if label is not None:
        write_text(folder / f"{name}.txt", label.get_text().replace("\n", " ") + "\n")
    usual = set(overlaps(figure))
    for width in widths:
        with _at_width(figure, width / 25.4):
            why = _unreadable(figure, usual)
        if why is not None:
            raise UserError(f"{name} at {width:g} mm: {why}; {_wide_enough(figure, width, usual)}")
        with _at_width(figure, width / 25.4):
            for suffix in formats:
                date = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}.get(suffix)
                path = folder / f"{name}_{width:g}mm.{suffix}"
                with atomic_path(path) as temporary:
                    figure.savefig(temporary, format=suffix, metadata=date, dpi=600)


def save_asked(figure, name):
    """The same where `python -m quantlab figures NN` runs the notebook: says what is left out."""
    widths, formats = asked()
    for width in widths:
        try:
            save_columns(figure, name, [width], formats)
        except UserError as error:
            print(f"left out: {error}")


def _wide_enough(figure, width, usual):
    """In words, the first of some widths above this one that the figure can have."""
    for wider in [w for w in WIDTHS if w > width]:
        with _at_width(figure, wider / 25.4):
            if _unreadable(figure, usual) is None:
                return f"ask for {wider} mm"
    return "take the .svg that is as wide as it was drawn"


@contextlib.contextmanager
def _at_width(figure, inches):
    """The figure that wide, without its caption, while the block runs; as it was afterwards."""
    undo = contextlib.ExitStack()
    with undo:
        size = tuple(figure.get_size_inches())
        undo.callback(figure.set_size_inches, *size)
        if figure._supxlabel is not None:
            _change(undo, figure._supxlabel, visible=False, in_layout=False)
        rows = _stack(figure, undo) if inches < NARROW * SHRUNK * size[0] else 1
        ticks = _tick_labels(figure)
        for axis, labels in ticks.items():
            for points in [label.get_fontsize() for label, _ in labels[:1]]:
                undo.callback(axis.set_tick_params, labelsize=points)
                axis.set_tick_params(labelsize=SHRUNK * points)
        of_ticks = {label for labels in ticks.values() for label, _ in labels}
        for text in set(figure.findobj(Text)) - of_ticks:
            _change(undo, text, fontsize=SHRUNK * text.get_fontsize())
        for line in figure.findobj(Line2D):
            width, marker = line.get_linewidth(), line.get_markersize()
            _change(undo, line, linewidth=SHRUNK * width, markersize=SHRUNK * marker)
        figure.set_size_inches(inches, SHRUNK * size[1] * rows)
        yield


def _tick_labels(figure):
    """axis -> [(a label of its ticks, whether it is within the view)]."""
    found = {}
    for axis in [axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)]:
        low, high = sorted(axis.get_view_interval())
        ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
        found[axis] = [(label, axis.axes.axison and low <= tick.get_loc() <= high)
                       for tick in ticks for label in (tick.label1, tick.label2)]
    return found


def _change(undo, artist, **properties):
    before = {name: getattr(artist, f"get_{name}")() for name in properties}
    undo.callback(artist.set, **before)
    artist.set(**properties)


def _stack(figure, undo):
    """Put panels that stand in one row below one another; returns how many rows there are."""
    panels = [axes for axes in figure.axes if axes.get_subplotspec() is not None]
    specs = [axes.get_subplotspec() for axes in panels]
    shapes = {spec.get_gridspec().get_geometry() for spec in specs}
    if len(panels) < 2 or shapes != {(1, len(panels))}:
        return 1
    grid = GridSpec(len(panels), 1, figure=figure)
    for axes, spec, place in zip(panels, specs, grid):
        undo.callback(axes.set_subplotspec, spec)
        axes.set_subplotspec(place)
        shown = axes.yaxis.get_tick_params().get("labelleft", True)
        undo.callback(axes.tick_params, axis="y", labelleft=shown)
        axes.tick_params(axis="y", labelleft=True)
    return len(panels)


# ---- Can it be read? -----------------------------------------------------------------------------


def _unreadable(figure, usual):
    """Why the figure cannot be read at its present size, in a few words; None where it can.

    usual: pairs of texts that meet at any size.
    """
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        figure.draw_without_rendering()
    if any("collapsed" in str(warning.message) for warning in said):
        return "there is no room for its panels"
    width, height = figure.get_size_inches()
    shown = [axes for axes in figure.axes if axes.axison and axes.get_subplotspec() is not None]
    sizes = [axes.get_position() for axes in shown]
    least = min([LEAST, *(min(b.width * width, b.height * height) for b in sizes)])
    if least < LEAST:
        return f"a panel would be {25.4 * least:.0f} mm small"
    box = figure.get_tightbbox()
    if min(box.x0, box.y0) < -0.03 or box.x1 > width + 0.03 or box.y1 > height + 0.03:
        return "something would be cut off"
    pairs = [pair for pair in overlaps(figure) if pair not in usual]
    lines = [text.splitlines()[0] for text in (pairs[0] if pairs else ())]
    return "“{}” would lie on “{}”".format(*lines) if pairs else None


def overlaps(figure, share=0.15):
    """Pairs of texts of which one covers more than that share of the smaller one."""
    figure.draw_without_rendering()
    hidden = {text for labels in _tick_labels(figure).values() for text, seen in labels if not seen}
    texts = [text for text in figure.findobj(Text) if text not in hidden and _is_seen(text)]
    boxes = np.array([text.get_window_extent().extents for text in texts]).reshape(-1, 4)
    low = np.maximum(boxes[:, None, :2], boxes[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    common = (high - low).clip(0).prod(-1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(-1)
    covered = np.triu(common > share * np.minimum(areas[:, None], areas[None]), 1)
    return [(texts[i].get_text(), texts[j].get_text()) for i, j in zip(*np.nonzero(covered))]


def _is_seen(text):
    return text.get_visible() and text.get_text().strip() and text.get_window_extent().width > 0
