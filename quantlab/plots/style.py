"""One palette, one colour and one marker a method everywhere; every caption names data set, model and n."""

import textwrap

import matplotlib.pyplot as plt
import seaborn as sns

from quantlab.system.files import atomic_path, root

COLOURS = dict(zip(
    ["float", "minmax", "percentile", "histogram", "mse", "entropy", "eager int8", "PT2E int8", "aciq_laplace", "aciq_gauss"],
    ["#333333", *sns.color_palette("colorblind", 9).as_hex()], strict=True,
))
MARKERS = dict(zip(COLOURS, "sovD^P*X<>", strict=True))
DATA_COLOUR, ERROR_COLOUR = "#7f9fbf", "#c44e52"
STYLE = {
    "figure.dpi": 110, "savefig.dpi": 200, "figure.constrained_layout.use": True, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.alpha": 0.25, "axes.axisbelow": True, "font.size": 10, "axes.titlesize": 11, "svg.hashsalt": "quantlab",
    "legend.frameon": False,
}


def set_style():
    """The workbook's style for every figure that follows."""
    plt.rcParams.update(STYLE)


def save(figure, name, data=None, model=None):
    """Write pic/NAME_MODEL_DATA.png (200 dpi) and .svg and return the figure; names that begin with images_ and digits stay out of git."""
    full = "_".join(part for part in (name, model, getattr(data, "name", data)) if part)
    for suffix, extra in ((".png", {}), (".svg", {"metadata": {"Date": None}})):
        with atomic_path(root() / "pic" / (full + suffix)) as temporary:
            figure.savefig(temporary, format=suffix[1:], **extra)
    return figure


def caption(figure, text):
    """A line under the finished figure that says what was measured; closed, so that a notebook shows it once, as the value of its cell."""
    width = int(figure.get_figwidth() * 15)
    plt.close(figure)
    figure.supxlabel(textwrap.fill(text, width), fontsize=8, color="#555555", x=0.01, ha="left")
    return figure


def data_label(data):
    """A data set's name; a smoke run says that it is one."""
    name = getattr(data, "name", data)
    return f"{name} (smoke run)" if name == "digits" else name


def row_caption(data, model, n, more=""):
    """What every caption says: data set, model and number of images."""
    return f"{data_label(data)}, {model}, n = {n:,}{'; ' + more if more else ''}"


set_style()
