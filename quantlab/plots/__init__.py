"""Figures: one function each, from a tidy frame (or the tensors it names) to a matplotlib figure."""

from quantlab.plots.accuracy import accuracy_by_bits, accuracy_by_images, method_bars
from quantlab.plots.ladder import code_strips, original_rows, repair_bars, waterfall
from quantlab.plots.ranges import clip_histogram, edge_report, error_landscape, range_tradeoff, weight_codes
from quantlab.plots.style import COLOURS, MARKERS, caption, data_label, row_caption, save, set_style
from quantlab.plots.training import confusion, image_grid, training_curves

__all__ = [
    "COLOURS", "MARKERS", "accuracy_by_bits", "accuracy_by_images", "caption", "clip_histogram", "code_strips", "confusion", "data_label", "edge_report",
    "error_landscape", "image_grid", "method_bars", "original_rows", "range_tradeoff", "repair_bars", "row_caption", "save", "set_style", "training_curves", "waterfall", "weight_codes",
]  # fmt: skip
