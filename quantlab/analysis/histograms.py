"""What passes through every layer: exact histograms before and after the ReLU, channel by channel,
and what one range for all channels costs.

    edges, channels = observe_layers(model, batches)  # whole layers; a frame with one row a channel
    costs = range_costs(model, batches, channels, 4)  # one range a tensor against one a channel

Layers are found from the graph: every convolution and linear layer, and whatever else a ReLU reads
(the sum of a residual block, a BatchNorm that cannot be folded). The graph is the folded one.
"""

import dataclasses
import math

import pandas as pd
import torch

from quantlab.affine import check_bits, choose_qparams, fake_quantize
from quantlab.calibration import watch
from quantlab.edgestats import EdgeStats
from quantlab.evaluate import decibels
from quantlab.graph import find_kinds, folded
from quantlab.quantized import find_node
from quantlab.system.errors import UserError

# of the extremes: the ranges that range_costs tries
FRACTIONS = torch.arange(1, 21, dtype=torch.float64) / 20
POINTS = ("weight", "before", "after")  # where a layer is looked at, the last two around its ReLU


@dataclasses.dataclass(frozen=True)
class Observed:
    """A node that is looked at, and the ReLU (ReLU6, Hardtanh) that reads it, by their names."""

    name: str
    kind: str
    relu: str | None


def find_layers(graph):
    """Every Observed of a folded graph, in order of execution."""
    kinds = find_kinds(graph)
    clamps = [node for node in reversed(kinds) if kinds[node] == "clamp"]  # of several, the first
    relus = {clamp.args[0]: clamp.name for clamp in clamps}
    found = [node for node in kinds if kinds[node] == "compute" or node in relus]
    return [Observed(node.name, kinds[node], relus.get(node)) for node in found]


# ---- One pass ------------------------------------------------------------------------------------


def _watch(graph, names, callback, batches, verbose=False):
    if not watch(graph, names, callback, batches, verbose, "observe layers"):
        raise UserError("no images to observe: give at least one batch")


def _watch_layers(model, batches, callback, verbose):
    """Call callback((layer, point), x [C, values]) for every weight once and for every value of
    every batch; return the layers.
    """
    graph = folded(model)
    layers = find_layers(graph)
    keys = {layer.name: (layer.name, "before") for layer in layers}
    keys |= {layer.relu: (layer.name, "after") for layer in layers if layer.relu}
    for layer in layers:
        if layer.kind == "compute":
            weight = graph.get_submodule(find_node(graph, layer.name).target).weight
            callback((layer.name, "weight"), weight.detach().flatten(1))
    _watch(graph, keys, lambda name, value: callback(keys[name], value.transpose(0, 1).flatten(1)),
           batches, verbose)
    return layers


def edge_values(model, name, batches):
    """The values of one node of the folded graph, one float32 tensor a batch: for what an EdgeStats
    cannot show, such as their order.
    """
    graph, values = folded(model), []
    names = [node.name for node in graph.graph.nodes]
    if name not in names:
        raise UserError(f"the network has no value {name!r}; there are: {', '.join(names)}")
    _watch(graph, [name], lambda _, value: values.append(value.cpu()), batches)
    return values


def observe_layers(model, batches, verbose=False):
    """(edges, channels) of one pass over `batches` (float32 [B, C, H, W]), in constant memory.

    edges: (layer, point) -> EdgeStats, in order of execution; point is "weight" (folded), "before"
    or "after" the ReLU. channels: a frame, one row a layer, point and channel: order, layer, kind,
    relu (its node, "" for none), point, channel, count, zeros, minimum, maximum, mean, std. A
    channel is an index of dimension 1 of a value and of dimension 0 of a weight. Sums are float64.
    """
    edges, sums = {}, {}

    def count(key, x):
        edges.setdefault(key, EdgeStats()).update(x)
        new = _channel_sums(x)
        if key in sums:
            new[:2] = torch.maximum(new[:2], sums[key][:2])
            new[2:] += sums[key][2:]
        sums[key] = new

    layers, frames = _watch_layers(model, batches, count, verbose), []
    for order, layer in enumerate(layers):
        for key in [(layer.name, point) for point in POINTS if (layer.name, point) in edges]:
            edges[key] = edges.pop(key)  # to the end: into order of execution
            names = {"order": order, "layer": layer.name, "kind": layer.kind,
                     "relu": layer.relu or "", "point": key[1]}
            columns = _channel_columns(sums[key], edges[key].count // sums[key].shape[1])
            frames.append(pd.DataFrame(names | columns))
    return edges, pd.concat(frames, ignore_index=True)


def _channel_sums(x):
    """Of every row of x [C, values]: maximum, -minimum, zeros, sum and sum of squares; float64
    [5, C] on the CPU.
    """
    wide = x.double()
    low, high = torch.aminmax(wide, dim=1)
    sums = [high, -low, (x == 0).sum(1), wide.sum(1), wide.square().sum(1)]
    return torch.stack([row.double() for row in sums]).cpu()


def _channel_columns(sums, count):
    high, low, zeros, total, squares = sums
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=0).sqrt()
    return {"channel": range(len(mean)), "count": count, "zeros": zeros.long(),
            "minimum": -low, "maximum": high, "mean": mean, "std": std}


# ---- What a range costs --------------------------------------------------------------------------


def range_costs(model, batches, channels, bits, verbose=False):
    """Signal-to-quantization-noise ratio of one range for a whole tensor against one range a
    channel: a frame, one row a layer and point.

    Both sides follow one rule: of FRACTIONS of the extremes (of the tensor, or of the channel;
    `channels` of observe_layers), the one with the least squared error. So the difference, gain_db,
    comes from the channels' different ranges alone. gain_bits = gain_db / 6.02: a bit halves the
    step. Weights are compared the same way; a value that a ReLU reads is never stored and left out.
    columns: order, layer, point, tensor_db, channel_db, gain_db, gain_bits.
    """
    check_bits(bits)
    groups = channels.groupby(["layer", "point"])
    extremes = {key: torch.tensor(f[["minimum", "maximum"]].to_numpy().T) for key, f in groups}
    sums = {}

    def measure(key, x):
        layer, point = key
        if point != "before" or (layer, "after") not in extremes:
            sums[key] = sums.get(key, 0) + _squared_errors(x, *extremes[key], bits)

    layers = _watch_layers(model, batches, measure, verbose)
    order = {layer.name: i for i, layer in enumerate(layers)}
    rows = []
    for (layer, point), total in sums.items():
        per_tensor, per_channel = total[:-1].chunk(2)
        noise = torch.stack([per_tensor.sum(1).min(), per_channel.amin(0).sum()])
        # a floor, as the difference of two infinities is no number
        ratios = [decibels(total[-1].sum(), power) for power in noise.clamp(min=1e-300)]
        rows.append((order[layer], layer, point, *ratios))
    frame = pd.DataFrame(rows, columns=["order", "layer", "point", "tensor_db", "channel_db"])
    frame = frame.sort_values("order", kind="stable", ignore_index=True)
    gain = frame.channel_db - frame.tensor_db
    return frame.assign(gain_db=gain, gain_bits=gain / (20 * math.log10(2)))


def _squared_errors(x, low, high, bits):
    """Sums of squares over every row of x [C, values], float64 [2 fractions + 1, C] on the CPU: of
    the errors of each range of the tensor, of each range of its channels, and of the values.
    """
    rows = []
    for bottom, top, axis in ((low.min(), high.max(), None), (low, high, 0)):
        for fraction in FRACTIONS:
            q = choose_qparams(bottom * fraction, top * fraction, bits, axis=axis).to(x.device)
            error = fake_quantize(x, q).sub_(x)
            rows.append(error.square_().sum(1, dtype=torch.float64))
    return torch.stack([*rows, x.double().square().sum(1)]).cpu()


# ---- From a histogram ----------------------------------------------------------------------------


def outliers(stats, sigmas=(4, 6, 8)):
    """How heavy an edge's tail is, exact to a bin.

    std; max_over_p: largest |value| over the 99.99 % quantile of |value|; beyond_K: fraction of the
    values more than K std from the mean.
    """
    centers, counts = stats.histogram()
    weights = torch.cat([counts, torch.tensor([stats.zeros])]).double() / stats.count
    values = torch.cat([centers, torch.zeros(1, dtype=torch.float64)])
    mean = float(values @ weights)
    std = math.sqrt(float((values - mean).square() @ weights))
    size, order = values.abs().sort()
    reached = torch.searchsorted(weights[order].cumsum(0), 0.9999).clamp(max=len(size) - 1)
    quantile = float(size[int(reached)])
    largest = max(-stats.minimum, stats.maximum)
    ratio = max(largest / quantile, 1.0) if quantile > 0 else math.nan
    distance = (values - mean).abs()
    beyond = {f"beyond_{k}": float(weights[distance > k * std].sum()) for k in sigmas}
    return {"std": std, "max_over_p": ratio, **beyond}


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
