"""Figures: one function each, from a tidy frame (or the tensors it names) to a matplotlib figure.

Figures of one notebook stay in its module: `from quantlab.plots import ladder, lowbit, panel`.
"""

# ruff: noqa: F401
from quantlab.plots.accuracy import (
    accuracy_by_bits,
    accuracy_by_images,
    method_bars,
    what_a_bit_buys,
)
from quantlab.plots.distributions import (
    channel_spread,
    layer_histograms,
    ridges,
    tails,
    weights_beside_activations,
)
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
