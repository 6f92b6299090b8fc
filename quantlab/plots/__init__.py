"""Figures: one function each, from a tidy frame (or the tensors it names) to a matplotlib figure.

Figures of one notebook stay in its module: `from quantlab.plots import lowbit, panel, questions`.
"""

# ruff: noqa: F401
from quantlab.plots.accuracy import accuracy_by_bits, accuracy_by_images, method_bars
from quantlab.plots.distributions import (
    channel_spread,
    layer_histograms,
    ridges,
    tails,
    weights_beside_activations,
)
from quantlab.plots.integer import codes_by_depth, layer_costs, rounding_modes
from quantlab.plots.ladder import code_strips, original_rows, repair_bars, waterfall
from quantlab.plots.page import caption, data_label, row_caption, save
from quantlab.plots.ranges import (
    clip_histogram,
    edge_report,
    error_landscape,
    observer_map,
    range_tradeoff,
    weight_codes,
)
from quantlab.plots.style import COLOURS, MARKERS
from quantlab.plots.training import confusion, image_grid, training_curves
