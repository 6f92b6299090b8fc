"""Figures: one function each, from a tidy frame (or the tensors it names) to a matplotlib figure."""

from quantlab.plots.accuracy import accuracy_by_bits, accuracy_by_images, method_bars
from quantlab.plots.ranges import clip_histogram, edge_report, error_landscape, observer_map, range_tradeoff, weight_codes
from quantlab.plots.style import COLOURS, MARKERS, caption, data_label, row_caption, save, set_style
from quantlab.plots.training import confusion, image_grid, training_curves

__all__ = [
    "COLOURS", "MARKERS", "accuracy_by_bits", "accuracy_by_images", "caption", "clip_histogram", "confusion", "data_label", "edge_report", "error_landscape",
    "image_grid", "method_bars", "observer_map", "range_tradeoff", "row_caption", "save", "set_style", "training_curves", "weight_codes",
]  # fmt: skip
