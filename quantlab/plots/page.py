"""How a figure begins and ends: panels, the caption that names data set, model and n, its files."""

import os
import textwrap

import matplotlib.pyplot as plt
from matplotlib.category import StrCategoryFormatter
from matplotlib.ticker import FixedFormatter, LogFormatter, ScalarFormatter

from quantlab.plots.style import saving, styled
from quantlab.system.errors import UserError
from quantlab.system.files import atomic_path, root


def distinct(column):
    """The values of a column in order of appearance; UserError when there is none."""
    if not len(column):
        raise UserError("there is nothing to draw: the table has no rows; measure or select some")
    return list(dict.fromkeys(column))


def panels(count, width, height, **options):
    """(figure, [axes]) with `count` panels side by side; width and height of it all in inches."""
    figure, axes = plt.subplots(1, count, figsize=(width, height), squeeze=False, **options)
    return figure, list(axes[0])


def facets(table, column, width, height, extra=0, **options):
    """(figure, [(axes, value, its rows)]): a panel for every value of a column, each `width` inches
    wide, with `extra` for names or a legend beside them all.
    """
    values = distinct(table[column])
    figure, axes = panels(len(values), width * len(values) + extra, height, **options)
    parts = [table[table[column] == value].reset_index(drop=True) for value in values]
    return figure, list(zip(axes, values, parts))


@saving
def save(figure, name, data=None, model=None, widths=(), formats=("pdf",)):
    """Write pic/NAME_MODEL_DATA.png (200 dpi) and .svg and return the figure; names that begin with
    images_ and digits stay out of git.

    widths: in mm, 89 or 183 as a rule: also results/figures/NAME_MODEL_DATA_89mm.pdf (or other
    formats), with the caption in a .txt beside it instead of in the picture. UserError for a width
    or format that the figure cannot have.
    """
    full = "_".join(part for part in (name, model, getattr(data, "name", data)) if part)
    for suffix, extra in ((".png", {}), (".svg", {"metadata": {"Date": None}})):
        with atomic_path(root() / "pic" / (full + suffix)) as temporary:
            figure.savefig(temporary, format=suffix[1:], **extra)
    if widths or "QUANTLAB_PAPER" in os.environ:
        from quantlab.plots import column  # loaded where a report wants it

        column.save_columns(figure, full, widths, formats)
        column.save_asked(figure, full)
    return figure


@styled
def caption(figure, text):
    """A line under the finished figure that says what was measured; closed, so that a notebook
    shows it once, as the value of its cell.
    """
    plt.close(figure)
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        if isinstance(axis.get_major_formatter(), (FixedFormatter, StrCategoryFormatter)):
            axis.get_ticklabels()  # those that are not made until they are drawn would parse $
        elif isinstance(axis.get_major_formatter(), (LogFormatter, ScalarFormatter)):
            for tick in [*axis.majorTicks, *axis.minorTicks]:
                tick.label1.set_parse_math(True)  # numbers: 10² is a formula
    lines = textwrap.fill(text, int(figure.get_figwidth() * 15))
    figure.supxlabel(lines, fontsize=8, color="#555555", x=0.01, ha="left")
    return figure


def data_label(data):
    """A data set's name; a smoke run says that it is one."""
    name = getattr(data, "name", data)
    return f"{name} (smoke run)" if name == "digits" else name


def row_caption(data, model, n, more=""):
    """What every caption says: data set, model and number of images."""
    return f"{data_label(data)}, {model}, n = {n:,}{'; ' + more if more else ''}"
