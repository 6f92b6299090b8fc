"""Cross-layer equalisation, before anything is quantized.

    equalized = equalize(model)
    qmodel = quantize(equalized, collect(equalized, batches), config)
"""

import contextlib

import torch
from torch import nn

from quantlab.graph import find_kinds, folded, operation_name, readers_of
from quantlab.ranks import flattened_dims
from quantlab.system.contract import as_images, check_function, graph_hash
from quantlab.system.errors import checked

SIZES = (32, 28, 64, 224, 16, 8, 96, 128, 299)  # of images, in pixels


@checked
@torch.no_grad()
def equalize(model, rounds=20, images=None):
    """The folded float graph with equal weight ranges on both sides of every channel.

    For two layers with a ReLU (or nothing) between, relu(s y) = s relu(y) lets a channel i of the
    first be divided by s_i and the second's input i be multiplied by it:
        s_i = sqrt(r1_i / r2_i), r the largest |weight| of the channel
    repeated until nothing changes (Nagel et al. 2019, arXiv:1906.04721, eq. 11). Pairs are found
    from the graph: the first's value must reach the second alone, through ReLUs, pools and
    rearranging that keeps channels apart; not through adds, concatenations, or clamps with an upper
    end. The float output stays, which is checked on `images` (float32 [B, C, H, W]; None: random
    ones of the first size that the network can read): UserError where it does not.
    """
    graph = folded(model).cpu()
    graph.meta["origins"] = [graph_hash(graph), *graph.meta.get("origins", [])]
    pairs = [tuple(map(graph.get_submodule, pair)) for pair in equalizable_pairs(graph)]
    for _ in range(rounds):
        change = 0.0
        for first, second in pairs:
            r1 = first.weight.abs().flatten(1).amax(1).double()
            r2 = grouped_weight(second).abs().amax((1, 3)).flatten()
            scale = torch.sqrt(r1 / r2.clamp(min=1e-30))
            scale = torch.where((r1 > 0) & (r2 > 0), scale, 1.0).clamp(1e-4, 1e4)
            _divide_outputs(first, scale)
            _multiply_inputs(second, scale)
            change = max(change, scale.log().abs().max().item())
        if change < 1e-3:
            break
    images = random_images(graph) if images is None else as_images(images)
    if images is not None:
        for node in graph.graph.nodes:  # only the output stays
            node.meta.pop("call", None)
        check_function(model, graph, images)
    return graph.cpu()


def random_images(graph, shape=None):
    """float32 [2, C, H, W] that the graph can read, of that shape (C, H, W) if it is given; None
    where none of the usual sizes can be.
    """
    kinds, generator = find_kinds(graph), torch.Generator().manual_seed(0)
    first = graph.get_submodule(next(n for n in kinds if kinds[n] == "compute").target)
    usual = [(first.in_channels, n, n) for n in SIZES] if isinstance(first, nn.Conv2d) else []
    for one in [shape] if shape else usual:
        images = torch.randn(2, *one, generator=generator, dtype=torch.float32)
        with contextlib.suppress(RuntimeError):
            graph(images.to(next(graph.parameters()).device))
            return images
    return None


def equalizable_pairs(graph):
    """(first, second) module names of the layers that `equalize` scales against each other, in
    order of execution.
    """
    kinds, pairs = find_kinds(graph), []
    for node in [n for n in kinds if kinds[n] == "compute"]:
        first = graph.get_submodule(node.target)
        follower, axis = node, _channel_axis(first)
        while axis is not None and len(found := readers_of(follower, kinds)) == 1:
            follower = found[0]
            if kinds[follower] == "compute":
                second = graph.get_submodule(follower.target)
                if axis == _channel_axis(second) and len(first.weight) == in_channels(second):
                    pairs.append((node.target, follower.target))
                break
            axis = _axis_behind(follower, axis, kinds, graph)
    return pairs


def _channel_axis(layer):
    """A linear layer's features lie along the last axis, a convolution's channels along axis 1."""
    return -1 if isinstance(layer, nn.Linear) else 1


def _axis_behind(node, axis, kinds, graph):
    """Axis of the channels behind an operation f with f(s y) = s f(y) for s > 0, channel by channel
    in the order they came; None for any other.
    """
    name = operation_name(node, graph)
    if name in ("relu", "identity", "contiguous"):
        return axis
    if name == "flatten":
        first, last = flattened_dims(node, graph)
        places = first >= 2 and axis == 1
        return axis if places else {(1, -1): -1}.get((first, last))
    pooled = kinds[node] in ("maxpool", "average") and name != "mean"
    return 1 if pooled and axis == 1 else None


def in_channels(layer):
    """Number of input channels (features) of a convolution or linear layer."""
    return layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels


def grouped_weight(layer):
    """A layer's weight, float64 [groups, C_out / groups, C_in / groups, places]."""
    weight = layer.weight.detach().cpu().double()
    return weight.unflatten(0, (getattr(layer, "groups", 1), -1)).unsqueeze(-1).flatten(3)


def _divide_outputs(layer, scale):
    layer.weight.copy_(layer.weight.double() / scale.view([-1] + [1] * (layer.weight.dim() - 1)))
    if layer.bias is not None:
        layer.bias.copy_(layer.bias.double() / scale)
    if (bn := getattr(layer, "folded_batchnorm", None)) is not None:
        layer.folded_batchnorm = bn | {key: bn[key] / scale for key in ("mean", "std", "gamma")}


def _multiply_inputs(layer, scale):
    weight = grouped_weight(layer)
    layer.weight.copy_((weight * scale.view(len(weight), 1, -1, 1)).view(layer.weight.shape))
