"""What passes through every layer: distributions before and after the ReLU, channel by channel, and what one range for all channels costs.

    edges, channels = observe_layers(model, batches)     # whole-layer histograms, and a tidy frame with one row a channel
    costs = range_costs(model, batches, channels, 4)     # one range a tensor against one a channel, at 4 bits

Layers are found from the graph: every convolution and linear layer, and whatever else a ReLU reads (the sum of a residual block, a
BatchNorm that cannot be folded). The graph is the folded one, as everywhere.
"""

import dataclasses
import math

import pandas as pd
import torch

from quantlab.affine import check_bits, choose_qparams, fake_quantize
from quantlab.calibration import watch
from quantlab.edgestats import EdgeStats
from quantlab.graph import find_kinds, folded
from quantlab.system.errors import UserError

SHARES = torch.arange(1, 21, dtype=torch.float64) / 20  # of the extremes: the ranges that range_costs tries


@dataclasses.dataclass(frozen=True)
class Layer:
    """A node whose value is looked at before and, where a ReLU (ReLU6, Hardtanh) reads it, after: names of the graph's nodes."""

    name: str
    kind: str
    relu: str | None


def find_layers(graph):
    """The Layers of a folded graph, in order of execution."""
    kinds = find_kinds(graph)
    relus = {node.args[0]: node.name for node in reversed(kinds) if kinds[node] == "clamp"}  # of several, the first
    return [Layer(node.name, kinds[node], relus.get(node)) for node in kinds if kinds[node] == "compute" or node in relus]


# ---- One pass ---------------------------------------------------------------------------------------------------------------


def _watch(graph, names, see, batches, verbose=False):
    if not watch(graph, names, see, batches, verbose, "observe layers"):
        raise UserError("no images to observe: give at least one batch")


def _see_layers(model, batches, see, verbose):
    """Call see((layer, point), x [C, values]) for every weight once and for every value of every batch; return the Layers."""
    graph = folded(model)
    layers, nodes = find_layers(graph), {node.name: node for node in graph.graph.nodes}
    points = {layer.name: (layer.name, "before") for layer in layers}
    points |= {layer.relu: (layer.name, "after") for layer in layers if layer.relu}
    for layer in layers:
        if layer.kind == "compute":
            see((layer.name, "weight"), graph.get_submodule(nodes[layer.name].target).weight.detach().flatten(1))
    _watch(graph, points, lambda name, value: see(points[name], value.transpose(0, 1).flatten(1)), batches, verbose)
    return layers


def edge_values(model, name, batches):
    """The values of one node of the folded graph, one float32 tensor a batch: for what an EdgeStats cannot show, such as order."""
    graph, values = folded(model), []
    if name not in {node.name for node in graph.graph.nodes}:
        raise UserError(f"the network has no value {name!r}; there are: {', '.join(node.name for node in graph.graph.nodes)}")
    _watch(graph, [name], lambda _, value: values.append(value.cpu()), batches)
    return values


def observe_layers(model, batches, verbose=False):
    """(edges, channels) of one pass over `batches` (float32 [B, C, H, W] each), in constant memory.

    edges: (layer, point) -> EdgeStats, in order of execution; point is "weight" (folded), "before" or "after" the ReLU.
    channels: a frame, one row a layer, point and channel: order, layer, kind, relu (its node, "" for none), point, channel, count, zeros,
    minimum, maximum, mean, std. A channel is an index of dimension 1 of a value and of dimension 0 of a weight. Sums are float64.
    """
    edges, sums = {}, {}

    def see(key, x):
        edges.setdefault(key, EdgeStats()).update(x)
        zeros, wide = (x == 0).sum(1), x.double()
        new = [zeros, *(v.double() for v in torch.aminmax(x, dim=1)), wide.sum(1), wide.square().sum(1)]
        old = sums.get(key, (0, [0, math.inf, -math.inf, 0, 0]))
        how = (torch.add, torch.minimum, torch.maximum, torch.add, torch.add)
        sums[key] = old[0] + x.shape[1], [f(a.cpu(), torch.as_tensor(b)) for f, a, b in zip(how, new, old[1])]

    layers = _see_layers(model, batches, see, verbose)
    order = {layer.name: (i, layer) for i, layer in enumerate(layers)}
    keys = sorted(edges, key=lambda key: (order[key[0]][0], ("weight", "before", "after").index(key[1])))
    return {key: edges[key] for key in keys}, pd.concat([_channel_rows(key, *order[key[0]], *sums[key]) for key in keys], ignore_index=True)


def _channel_rows(key, order, layer, count, sums):
    zeros, minimum, maximum, first, second = sums
    mean = first / count
    return pd.DataFrame({
        "order": order, "layer": layer.name, "kind": layer.kind, "relu": layer.relu or "", "point": key[1], "channel": range(len(mean)),
        "count": count, "zeros": zeros, "minimum": minimum, "maximum": maximum, "mean": mean,
        "std": (second / count - mean.square()).clamp(min=0).sqrt(),
    })


# ---- What a range costs -----------------------------------------------------------------------------------------------------


def range_costs(model, batches, channels, bits, verbose=False):
    """Signal-to-quantization-noise ratio of one range for a whole tensor against one range a channel: a frame, one row a layer and point.

    Both sides follow one rule: of SHARES of the extremes (of the tensor, or of the channel; `channels` of observe_layers), the one with
    the least squared error. So the difference, gain_db, comes from the channels' different ranges alone. gain_bits = gain_db / 6.02: a bit
    halves the step. Weights are compared the same way; a value that a ReLU reads is never stored and left out.
    columns: order, layer, point, tensor_db, channel_db, gain_db, gain_bits.
    """
    check_bits(bits)
    extremes = {key: (torch.tensor(f.minimum.values), torch.tensor(f.maximum.values)) for key, f in channels.groupby(["layer", "point"])}
    sums = {}

    def see(key, x):
        if key[1] == "before" and (key[0], "after") in extremes:
            return
        low, high = extremes[key]
        per_tensor = [_errors(x, low.min() * share, high.max() * share, bits, None) for share in SHARES]
        per_channel = [_errors(x, low * share, high * share, bits, 0) for share in SHARES]
        sums[key] = sums.get(key, 0) + torch.stack([*per_tensor, *per_channel, x.double().square().sum(1)]).cpu()  # [2 shares + 1, C]

    order = {layer.name: i for i, layer in enumerate(_see_layers(model, batches, see, verbose))}
    rows = []
    for (layer, point), total in sums.items():
        signal, tensors, each = total[-1].sum(), total[: len(SHARES)].sum(1), total[len(SHARES) : -1]
        rows.append((order[layer], layer, point, _db(signal, tensors.min()), _db(signal, each.amin(0).sum())))
    frame = pd.DataFrame(rows, columns=["order", "layer", "point", "tensor_db", "channel_db"])
    frame = frame.sort_values("order", kind="stable", ignore_index=True)
    gain = frame.channel_db - frame.tensor_db
    return frame.assign(gain_db=gain, gain_bits=gain / (20 * math.log10(2)))


def _errors(x, low, high, bits, axis):
    """Squared quantization error of every row of x [C, values], float64 [C]; the range is [] or [C]."""
    q = choose_qparams(low, high, bits, axis=axis).to(x.device)
    return fake_quantize(x, q).sub_(x).square_().sum(1, dtype=torch.float64)


def _db(signal, noise):
    return 10 * math.log10(max(float(signal), 1e-300) / max(float(noise), 1e-300))


# ---- From a histogram -------------------------------------------------------------------------------------------------------


def outliers(stats, sigmas=(4, 6, 8)):
    """How heavy an edge's tail is, exact to a bin.

    std; max_over_p: largest |value| over the 99.99 % quantile of |value|; beyond_K: share of values more than K std from the mean.
    """
    centers, counts = stats.histogram()
    weights = torch.cat([counts, torch.tensor([stats.zeros])]).double() / stats.count
    values = torch.cat([centers, torch.zeros(1, dtype=torch.float64)])
    mean = float(values @ weights)
    std = math.sqrt(float((values - mean).square() @ weights))
    size, order = values.abs().sort()
    reached = int(torch.searchsorted(weights[order].cumsum(0), 0.9999).clamp(max=len(size) - 1))
    largest = max(-stats.minimum, stats.maximum)
    ratio = max(largest / float(size[reached]), 1.0) if size[reached] > 0 else math.nan
    beyond = {f"beyond_{k}": float(weights[(values - mean).abs() > k * std].sum()) for k in sigmas}
    return {"std": std, "max_over_p": ratio, **beyond}


def densities(edges, bins=160):
    """A tidy frame for figures: order, layer, point, x (middle of a bin), density (share of all values by unit of x), zeros (their share).

    Neighbouring bins of the exact histograms are added until about `bins` remain.
    """
    order = {layer: i for i, layer in enumerate(dict.fromkeys(layer for layer, _ in edges))}
    frames = []
    for (layer, point), stats in edges.items():
        centers, counts = stats.histogram()
        if not len(counts):  # nothing but zeros
            frames.append(pd.DataFrame({"order": order[layer], "layer": layer, "point": point, "x": [0.0], "density": 0.0, "zeros": 1.0}))
            continue
        size = max(1, len(counts) // bins)
        group = torch.div(stats.first + torch.arange(len(counts)), size, rounding_mode="floor")  # aligned, so that zero is an edge
        total = torch.zeros(int(group[-1] - group[0]) + 1, dtype=torch.float64).index_add_(0, group - group[0], counts.double())
        x = (group[0] + torch.arange(len(total)) + 0.5) * size * stats.width
        density = total / (size * stats.width * stats.count)
        zeros = stats.zeros / stats.count
        frames.append(pd.DataFrame({"order": order[layer], "layer": layer, "point": point, "x": x, "density": density, "zeros": zeros}))
    return pd.concat(frames, ignore_index=True)
