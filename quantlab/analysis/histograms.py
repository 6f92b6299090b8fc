"""The exact histogram of every layer: its weights, its values before and after the ReLU.

    edges = observe_layers(model, batches)  # (layer, "weight" | "before" | "after") -> EdgeStats
    frame = densities(edges)                # for figures

Layers are found from the graph: every convolution and linear layer, and whatever else a ReLU reads
(the sum of a residual block, a BatchNorm that cannot be folded). The graph is the folded one.
Notebook 05 does the same step by step, and looks at tails and channels.
"""

import pandas as pd
import torch

from quantlab.calibration import collect_edges
from quantlab.edgestats import EdgeStats
from quantlab.graph import find_kinds, folded
from quantlab.quantized import find_node


def find_layers(graph):
    """layer -> the ReLU (ReLU6, Hardtanh) that reads it, or None: names of nodes of a folded graph,
    in order of execution.
    """
    kinds = find_kinds(graph)
    clamps = [node for node in reversed(kinds) if kinds[node] == "clamp"]  # of several, the first
    relus = {clamp.args[0]: clamp.name for clamp in clamps}
    return {n.name: relus.get(n) for n in kinds if kinds[n] == "compute" or n in relus}


def observe_layers(model, batches, verbose=False):
    """(layer, point) -> EdgeStats of one pass over `batches` (float32 [B, C, H, W] each), in order
    of execution; point is "weight" (folded), "before" or "after" the ReLU.
    """
    graph = folded(model)
    kinds, layers = find_kinds(graph), find_layers(graph)
    names = [name for pair in layers.items() for name in pair if name]
    seen, _ = collect_edges(graph, names, batches, verbose)
    edges = {}
    for layer, relu in layers.items():
        node = find_node(graph, layer)
        if kinds[node] == "compute":
            edges[layer, "weight"] = EdgeStats().update(graph.get_submodule(node.target).weight)
        edges[layer, "before"] = seen[layer]
        if relu:
            edges[layer, "after"] = seen[relu]
    return edges


def densities(edges, bins=160):
    """A tidy frame for figures: order, layer, point, x (middle of a bin), density (fraction of all
    values by unit of x), zeros (their fraction).

    Neighbouring bins of the exact histograms are added until about `bins` remain.
    """
    order = {layer: i for i, layer in enumerate(dict.fromkeys(layer for layer, _ in edges))}
    frames = []
    for (layer, point), stats in edges.items():
        x, density = _density(stats, bins)
        names = {"order": order[layer], "layer": layer, "point": point}
        columns = {"x": x, "density": density, "zeros": stats.zeros / stats.count}
        frames.append(pd.DataFrame(names | columns))
    return pd.concat(frames, ignore_index=True)


def _density(stats, bins):
    centers, counts = stats.histogram()
    if not len(counts):  # nothing but zeros
        return [0.0], [0.0]
    size = max(1, len(counts) // bins)
    index = stats.first + torch.arange(len(counts))
    group = torch.div(index, size, rounding_mode="floor")  # aligned, so that zero is an edge
    first = group[0]
    total = torch.zeros(int(group[-1] - first) + 1, dtype=torch.float64)
    total.index_add_(0, group - first, counts.double())
    x = (first + torch.arange(len(total)) + 0.5) * size * stats.width
    return x, total / (size * stats.width * stats.count)
