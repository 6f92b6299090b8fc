"""Corrections of a quantized network that learn nothing: bias correction, BatchNorm re-estimation.

    qmodel = correct_bias(model, qmodel, batches)

Each returns a network of its own and leaves its arguments alone. Codes stay integers: a weight is
scale * code, a bias a multiple of s_in * s_w, as `quantize` left them.
"""

import copy
import dataclasses
import math

import torch
from torch import nn

from quantlab.graph import find_kinds, folded, operation_name
from quantlab.improving.activations import Networks
from quantlab.improving.equalization import grouped_weight, in_channels, random_images
from quantlab.quantized import find_node
from quantlab.ranks import find_ranks, flattened_dims
from quantlab.system.contract import as_batches, check_function, check_origin
from quantlab.system.errors import UserError, checked
from quantlab.system.machine import device, exact_float

NO_BIAS = "it has no bias"

# ---- Biases --------------------------------------------------------------------------------------


@checked
def correct_bias(model, qmodel, batches):
    """Empirical bias correction: the mean output error of each channel leaves the bias.

    b_o <- b_o - (E[y_q] - E[y])_o, y a layer's output before its clamp, E over the images and
    places of `batches` (float32 [B, C, H, W]); layer after layer in order of execution, each on
    inputs from the network corrected so far. `corrected.meta["uncorrected"]`: layer -> why it is as
    it was.
    """
    networks, corrected = _side_by_side(model, qmodel, batches)
    left = {name: NO_BIAS for name, layer in corrected.layers.items() if layer.bias is None}
    corrected.meta["uncorrected"] = left
    for i, unit in enumerate(networks.units):
        name = unit.layers[0]
        if corrected.layers[name].bias is not None:
            mean, _ = _moments(networks, "quantized", i)
            exact, _ = _moments(networks, "float", i)
            _shift_bias(corrected, name, mean - exact)
        networks.advance("float", i)
        networks.advance("quantized", i)
        networks.free(i)
    return corrected


@torch.no_grad()
def _shift_bias(qmodel, name, error):
    layer = qmodel.layers[name]
    bias = layer.bias.detach().cpu().double() - error
    if hasattr(layer, "weight_qparams"):
        qmodel.write(name, qmodel.codes(name), layer.weight_qparams, bias)
    else:  # left float on purpose
        layer.bias.copy_(bias)


@checked
@torch.no_grad()
def correct_bias_analytic(model, qmodel):
    """Bias correction without data: b_o <- b_o - sum_ck (w_hat - w)_ock E[x_c], with E[x] from
    BatchNorm's parameters (arXiv:1906.04721).

    A BatchNormed layer gives N(beta, gamma^2); ReLU and ReLU6 make a clipped normal of it; adds add
    means and variances; a layer without BatchNorm maps them with its weights, as if its inputs were
    independent. Padding is ignored. The network's input is taken to have mean 0 and variance 1. A
    layer whose input passes an operation without such a rule is left alone:
    `corrected.meta["uncorrected"]`, layer -> why. UserError for the quantized network of another,
    and where the folded network is not the model (on random images of the calibrated shape).
    """
    graph, corrected = folded(model), copy.deepcopy(qmodel)
    check_origin(qmodel, graph)
    images = random_images(graph, qmodel.meta.get("image_shape"))
    if images is not None:
        check_function(model, copy.deepcopy(graph), images)
    gaussian, layers = _Gaussian(graph), corrected.layers
    means = gaussian.layer_inputs()
    left = {name: gaussian.why(name) for name in means if means[name] is None}
    left |= {name: NO_BIAS for name in means if layers[name].bias is None}
    corrected.meta["uncorrected"] = left
    for name in [n for n in means if n not in left]:
        exact = grouped_weight(graph.get_submodule(find_node(graph, name).target))
        error = (grouped_weight(layers[name]) - exact).sum(3)
        mean = means[name].view(len(error), -1)
        _shift_bias(corrected, name, torch.einsum("goc,gc->go", error, mean).flatten())
    return corrected


def clipped_normal(mean, std, low=0.0, high=math.inf):
    """(mean, variance) of clamp(x, low, high), x ~ N(mean, std^2); tensors float64, elementwise."""
    normal = torch.distributions.Normal(*torch.tensor([0.0, 1.0], dtype=torch.float64))
    std = std.clamp(min=1e-12)
    a, b = (low - mean) / std, (torch.full_like(mean, high) - mean) / std
    pdf_a, pdf_b = (normal.log_prob(t).exp() for t in (a, b))
    below, above = normal.cdf(a), normal.cdf(-b)
    inside = 1 - below - above
    b_pdf_b = torch.where(torch.isinf(b), 0.0, b * pdf_b)
    first = inside * mean + std * (pdf_a - pdf_b)  # E[x; inside]
    second = inside * (mean**2 + std**2) + 2 * mean * std * (pdf_a - pdf_b)  # E[x^2; inside]
    second = second + std**2 * (a * pdf_a - b_pdf_b)
    edge, edge2 = (above * high, above * high**2) if math.isfinite(high) else (0.0, 0.0)
    clipped = first + low * below + edge
    return clipped, (second + low**2 * below + edge2 - clipped**2).clamp(min=0)


def _argument(node, name, default=None):
    """The second argument of a call, or the one of that name."""
    return node.args[1] if len(node.args) > 1 else node.kwargs.get(name, default)


class _Gaussian:
    """Mean and variance per channel at every node, from BatchNorm's parameters alone; None where no
    rule applies.
    """

    def __init__(self, graph):
        self.graph, self.kinds, self.moments = graph, find_kinds(graph), {}
        self.ranks = find_ranks(graph.graph)
        for node in self.kinds:
            self.moments[node] = self._rule(node)

    def layer_inputs(self):
        """layer -> E[x_c] of its input, float64 [C_in], or None."""
        found = {}
        for node in [n for n in self.kinds if self.kinds[n] == "compute"]:
            moments = self._input(node)
            found[node.name] = None if moments is None else moments[0]
        return found

    def why(self, layer):
        """The reason for which the mean of a layer's input is not known."""
        node = find_node(self.graph, layer).args[0]
        if self.moments[node] is not None:
            return f"it does not read the channels of {node.name}, one by one"
        while unknown := [n for n in node.all_input_nodes if self.moments[n] is None
                          and self.kinds[n] not in ("input", "constant", "shape")]:
            node = unknown[0]
        return f"there is no rule for the mean behind {node.name}"

    def _input(self, node):
        layer, before = self.graph.get_submodule(node.target), node.args[0]
        channels, moments = in_channels(layer), self.moments[before]
        if isinstance(layer, nn.Linear) and self.ranks[before] not in (2, None):
            return None  # it reads places, not channels
        if self.kinds[before] == "input":
            return tuple(torch.tensor([[0.0], [1.0]], dtype=torch.float64).expand(2, channels))
        # flattened places of a channel are alike
        if moments is not None and channels % len(moments[0]) == 0:
            return tuple(m.repeat_interleave(channels // len(m)) for m in moments)
        return None

    def _rule(self, node):
        kind, read = self.kinds[node], node.all_input_nodes
        if kind in ("add", "concat"):  # which may read a value twice
            read = node.args if kind == "add" else node.args[0]
        inputs = [self.moments.get(a) for a in read]
        if kind == "compute":
            return self._layer(node)
        if not inputs or any(m is None for m in inputs):
            return None
        if kind in ("rearrange", "average", "maxpool"):
            return self._same_channels(node, inputs[0])
        if kind == "add":
            mean, variance = (a + b for a, b in zip(*inputs, strict=True))
            return mean, variance * (2 if read[0] is read[1] else 1)  # Var(y + y) = 4 Var(y)
        if kind == "concat" and _argument(node, "dim", 0) == 1:
            return tuple(torch.cat(parts) for parts in zip(*inputs, strict=True))
        if kind == "clamp":
            high = {"relu": math.inf, "relu6": 6.0}.get(operation_name(node, self.graph))
            if high is not None:
                mean, variance = inputs[0]
                return clipped_normal(mean, variance.sqrt(), 0.0, high)
        return None

    def _same_channels(self, node, moments):
        """Moments behind an operation that keeps channels, or moves them as a known shuffle does.
        """
        name = operation_name(node, self.graph)
        if name in ("channel_shuffle", "channelshuffle"):
            module = self.graph.get_submodule(node.target) if node.op == "call_module" else None
            groups = _argument(node, "groups") if module is None else module.groups
            return tuple(m.view(groups, -1).T.flatten() for m in moments)
        if name == "flatten":
            return moments if flattened_dims(node, self.graph)[0] >= 1 else None
        if name in ("view", "reshape"):  # [B, -1] and nothing else
            shape = node.args[1] if isinstance(node.args[1], (tuple, list)) else node.args[1:]
            return moments if len(shape) == 2 and shape[1] == -1 else None
        if name in ("mean", "squeeze"):
            dims = _argument(node, "dim")
            dims = dims if isinstance(dims, (tuple, list)) else [dims]
            return moments if {2, 3, -1, -2}.issuperset(dims) else None
        pools = self.kinds[node] in ("average", "maxpool")
        return moments if pools or name in ("contiguous", "clone", "detach", "identity") else None

    def _layer(self, node):
        if isinstance(self.graph.get_submodule(node.target), nn.Linear) and self.ranks[node] == 3:
            return None  # its channels are no channels of what follows
        layer = self.graph.get_submodule(node.target)
        if (bn := getattr(layer, "folded_batchnorm", None)) is not None:
            return bn["mean"], bn["std"] ** 2
        moments = self._input(node)
        if moments is None:
            return None
        weight = grouped_weight(layer)
        mean, variance = (m.view(len(weight), -1) for m in moments)
        bias = 0.0 if layer.bias is None else layer.bias.detach().cpu().double()
        mean = torch.einsum("gock,gc->go", weight, mean).flatten() + bias
        return mean, torch.einsum("gock,gc->go", weight.square(), variance).flatten()


# ---- BatchNorm -----------------------------------------------------------------------------------


@checked
def reestimate_batchnorm(model, qmodel, batches):
    """Give every formerly BatchNormed layer the scale and shift that BatchNorm would have with
    statistics of the quantized network.

    With m, v a channel's mean and variance behind the quantized layer on `batches` (float32 [B, C,
    H, W]), and BatchNorm's gamma, beta and eps:
        y <- a (y - m) + beta,   a = gamma / sqrt(v + eps') with eps' in units of the folded output
    which changes the weight's scale to a s_w and the bias; codes stay. Layer after layer, each
    behind those already done. A step of its own, never hidden in calibration.
    `corrected.meta["uncorrected"]`: layer -> why it is as it was. Raises UserError for a network
    without folded BatchNorm.
    """
    networks, corrected = _side_by_side(model, qmodel, batches)
    graph = networks.graphs["float"]
    batchnorms = {}
    for unit in networks.units:
        layer = graph.get_submodule(find_node(graph, unit.layers[0]).target)
        batchnorms[unit.layers[0]] = getattr(layer, "folded_batchnorm", None)
    if not any(batchnorms.values()):
        raise UserError(
            "no layer of this network had a BatchNorm folded into it: there are no statistics to "
            "re-estimate")
    why = "no BatchNorm was folded into it"
    left = {name: why for name, bn in batchnorms.items() if bn is None}
    corrected.meta["uncorrected"] = left
    for i, (name, bn) in enumerate(batchnorms.items()):
        if bn is not None:
            _rescale(corrected, name, bn, *_moments(networks, "quantized", i))
        networks.advance("quantized", i)
        networks.free(i)
    return corrected


@torch.no_grad()
def _rescale(corrected, name, bn, mean, variance):
    layer, gamma = corrected.layers[name], bn["gamma"]
    q = getattr(layer, "weight_qparams", None)
    if q is not None and q.axis is None:
        raise UserError(
            "re-estimating BatchNorm rescales channels one by one; quantize with per_channel=True")
    ratio = gamma.abs() / torch.sqrt(variance + gamma**2 * bn["eps_share"]).clamp(min=1e-12)
    ratio = torch.where(gamma == 0, 1.0, ratio)
    bias = (layer.bias.detach().cpu().double() - mean) * ratio + bn["mean"]
    if q is None:  # left float on purpose
        layer.weight.copy_(layer.weight * ratio.view([-1] + [1] * (layer.weight.dim() - 1)))
        layer.bias.copy_(bias)
        return
    scaled = dataclasses.replace(q, scale=(q.scale.double() * ratio).float())
    corrected.write(name, corrected.codes(name), scaled, bias)


# ---- Shared --------------------------------------------------------------------------------------


def _side_by_side(model, qmodel, batches):
    """The float network beside a copy of the quantized one, layer by layer, and that copy."""
    graph, batches = folded(model), list(as_batches(batches))
    if not sum(len(b) for b in batches):
        raise UserError("there are no images to measure the correction on: give at least one batch")
    check_origin(qmodel, graph)
    images, corrected = torch.cat(batches), copy.deepcopy(qmodel).to(device())
    check_function(model, graph, images)
    return Networks(graph, corrected, images, "layer"), corrected


def _moments(networks, kind, i):
    """(mean, variance) of each channel of a layer's output over all images and places, float64 [C]
    on the CPU.
    """
    count = total = squares = 0.0
    with exact_float():
        name = networks.units[i].layers[0]
        linear = isinstance(networks.graphs["quantized"].layers[name], nn.Linear)
        for _, (value,) in networks.run(kind, i, outputs=[name]):
            flat = value.double().transpose(0, -1 if linear else 1).flatten(1)
            count += flat.shape[1]
            total += flat.sum(1).cpu()
            squares += flat.square().sum(1).cpu()
    return total / count, (squares / count - (total / count) ** 2).clamp(min=0)
