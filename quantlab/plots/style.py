"""How every figure looks: one palette, one colour and one marker a method. Nothing is set at
import, and drawing leaves matplotlib as it was.
"""

from types import MappingProxyType

import matplotlib.pyplot as plt
import seaborn as sns

STYLE = MappingProxyType({
    "figure.dpi": 110, "savefig.dpi": 200, "figure.constrained_layout.use": True,
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
    "axes.grid": True, "grid.alpha": 0.25, "legend.frameon": False,
    "font.size": 10, "axes.titlesize": 11, "svg.hashsalt": "quantlab",
    "pdf.fonttype": 42,  # letters, not curves
    "text.parse_math": False,  # a data set or class may have $ in its name
})

# Decorator of every function here that draws: the style while it runs, the reader's own afterwards.
styled = plt.rc_context(STYLE)
saving = plt.rc_context({**STYLE, "text.parse_math": True})  # ticks made then may be powers of ten


# ---- Colours -------------------------------------------------------------------------------------

INK, GREY, PALE = "#333333", "#666666", "#c9ced6"  # references; side notes; what a ReLU takes away
BLUE, RED, GREEN = "#7f9fbf", "#c44e52", "#029e73"  # data; errors and losses; gains
DASHED = MappingProxyType(dict(color=INK, linestyle="--", linewidth=1))

# Colours may return from one group to another, as the two never share a figure; a pair never does.
_METHODS = {
    "float": (INK, "s"),
    # range setters
    "minmax": ("#0173b2", "o"), "percentile": ("#de8f05", "v"), "histogram": ("#029e73", "D"),
    "mse": ("#d55e00", "^"), "entropy": ("#cc78bc", "P"),
    "aciq_laplace": ("#949494", "<"), "aciq_gauss": ("#56b4e9", ">"),
    # tools, and an LSTM's dynamic quantization
    "eager int8": ("#ca9161", "*"), "PT2E int8": ("#fbafe4", "X"),
    "ONNX Runtime int8": ("#c2185b", "d"),
    "Brevitas GPTQ": ("#17a0b5", "<"), "Brevitas learned round": ("#5d6d1e", ">"),
    "dynamic int8 by hand": ("#5b8c5a", "p"), "quantize_dynamic": ("#b07aa1", "h"),
    # what improves a network after its ranges are set
    "nearest": ("#7f7f7f", "o"), "equalisation": ("#b8860b", "v"),
    "bias correction": ("#4aa3a2", "s"), "analytic bias correction": ("#9fd0cf", "p"),
    "BatchNorm re-estimation": ("#8c6bb1", "D"), "AdaRound": ("#d95f02", "^"),
    "BRECQ": ("#2b6cb0", "P"), "QDrop": ("#1b7f3b", "*"), "QDrop + Fisher": ("#66c2a5", "<"),
    "QDrop + end to end": ("#7fbf4d", "h"), "QDrop + fine-tuning": ("#0b3d1b", "H"),
    "QDrop + long fine-tuning": ("#2d004b", ">"),
    "QDrop + augmented fine-tuning": ("#b5179e", "8"),
    "mixed precision": (RED, "d"), "QAT": ("#6a3d9a", "o"),
    # roundings of the integer executor
    "single": ("#4c72b0", "o"), "double": ("#dd8452", "^"),
    # the original experiment
    "the original's": (INK, "X"), "ours, its way": (RED, "D"),
    "ours, the right way": (GREEN, "o"),
    "hist": (RED, "s"), "fake-hist": ("#de8f05", "d"), "ours": (GREEN, "H"),
    # number formats
    "integers": ("#029e73", "^"), "minifloat": ("#0173b2", "v"), "MX": ("#de8f05", "o"),
    "NV": ("#cc78bc", "s"),
    # what a network is calibrated on
    "real images": (GREEN, "8"), "distilled images": ("#d55e00", "D"),
    "noise images": ("#0173b2", "s"),
}
COLOURS = MappingProxyType({name: colour for name, (colour, _) in _METHODS.items()})
MARKERS = MappingProxyType({name: marker for name, (_, marker) in _METHODS.items()})

POINT_COLOURS = MappingProxyType({"weight": "#8c6bb1", "before": PALE, "after": BLUE})
KIND_COLOURS = MappingProxyType({
    "conv": "#7f9fbf", "linear": "#4c72b0", "add": "#dd8452", "average": "#55a868",
    "requantize": "#b0b0b0", "affine": "#8172b3",
})
WIDTH_COLOURS = MappingProxyType({8: "#dfeaf5", 16: "#e7efdc", 32: "#fdf0d5", 64: "#f8dcd6"})
VARIANT_COLOURS = tuple(sns.color_palette("colorblind", 10).as_hex())


def find_method(label):
    """The method of the palette that a label ends with, as in "W4A4 histogram, QDrop, 500
    iterations" (QDrop) or "percentile(q=99.9)"; None where it names none.
    """
    if (tool := label.split(":")[0]) in COLOURS:  # what stands behind it is the tool's own
        return tool
    if label == "fp32 original":
        return "float"
    named = [name for name in COLOURS if name in label and name != "float"]  # "residual float"
    return max(named, key=lambda name: (label.rfind(name) + len(name), len(name)), default=None)


def method_style(label):
    """dict(color, marker) of a method or of a label that names it; red circles for unknown ones."""
    name = find_method(label)
    return dict(color=COLOURS.get(name, RED), marker=MARKERS.get(name, "o"))


def colour_of(label):
    """The colour of `method_style`."""
    return method_style(label)["color"]
