"""Cross-layer equalisation, before anything is quantized.

    equalized = equalize(model)
    qmodel = quantize(equalized, collect(equalized, batches), config)
"""

import torch
from torch import nn

from quantlab.graph import find_kinds, folded, operation_name, readers_of


@torch.no_grad()
def equalize(model, rounds=20):
    """The folded float graph with equal weight ranges on both sides of every channel.

    For two layers with a ReLU (or nothing) between, relu(s y) = s relu(y) lets a channel i of the
    first be divided by s_i and the second's input i be multiplied by it:
        s_i = sqrt(r1_i / r2_i), r the largest |weight| of the channel
    repeated until nothing changes (Nagel et al. 2019, arXiv:1906.04721, eq. 11). Pairs are found
    from the graph: the first's value must reach the second alone, through ReLUs, pools and
    rearranging that keeps channels apart; not through adds, concatenations, or clamps with an upper
    end. The float output stays.
    """
    graph = folded(model).cpu()
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
    return graph


def equalizable_pairs(graph):
    """(first, second) module names of the layers that `equalize` scales against each other, in
    order of execution.
    """
    kinds, pairs = find_kinds(graph), []
    for node in [n for n in kinds if kinds[n] == "compute"]:
        follower = node
        while len(found := readers_of(follower, kinds)) == 1:
            follower = found[0]
            if kinds[follower] == "compute":
                channels = len(graph.get_submodule(node.target).weight)
                if channels == in_channels(graph.get_submodule(follower.target)):
                    pairs.append((node.target, follower.target))
                break
            if not _keeps_channels(follower, kinds, graph):
                break
    return pairs


def _keeps_channels(node, kinds, graph):
    """True for an operation f with f(s y) = s f(y) for s > 0, channel by channel, in the order they
    came.
    """
    name = operation_name(node, graph)
    pooled = kinds[node] in ("maxpool", "average") and name != "mean"
    return pooled or name in ("relu", "flatten", "identity", "contiguous")


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
