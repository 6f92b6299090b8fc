"""Figures: one function each, from a tidy frame (or the tensors it names) to a matplotlib figure.

Figures of one notebook stay in its module: `from quantlab.plots import ladder, lowbit, panel`. The
names below are loaded when they are first used, so that a notebook loads what it draws.
"""

import importlib

_NAMES = {
    "accuracy": ["accuracy_by_bits", "accuracy_by_images", "method_bars", "what_a_bit_buys"],
    "distributions": ["channel_spread", "layer_histograms", "ridges", "tails",
                      "weights_beside_activations"],
    "page": ["caption", "data_label", "row_caption", "save"],
    "ranges": ["clip_histogram", "edge_report", "error_landscape", "observer_map",
               "range_tradeoff", "weight_codes"],
    "style": ["COLOURS", "MARKERS"],
    "training": ["confusion", "image_grid", "training_curves"],
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}

__all__ = [*_HOME]


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    return globals()[name]


def __dir__():
    return sorted([*globals(), *__all__])
