"""Post-training quantization, the second of two steps: statistics are collected once, then quantized as often and as differently as you like.

    stats  = collect(model, data.calibration(1024, seed=0))                      # calibration.py
    qmodel = quantize(model, stats, QuantConfig(weight_bits=4, act_bits=4))
"""

import copy
import dataclasses

import torch
from torch import nn

from quantlab import observers
from quantlab.affine import MIN_BITS, QParams, choose_qparams, dequantize, fake_quantize
from quantlab.calibration import prepare
from quantlab.config import QuantConfig
from quantlab.graph import PASSES_CODES, find_kinds
from quantlab.system.errors import UserError

BIAS_CODES = 2.0**30  # a bias code stays below this, so that an int32 accumulator has room for the products


class Quantizer(nn.Module):
    """Rounds a float32 tensor to the values that its codes stand for."""

    def __init__(self, q):
        super().__init__()
        self.register_buffer("scale", q.scale)
        self.register_buffer("zero_point", q.zero_point)
        self.qmin, self.qmax = q.qmin, q.qmax

    @property
    def qparams(self):
        return QParams(self.scale, self.zero_point, self.qmin, self.qmax)

    def forward(self, x):
        return fake_quantize(x, self.qparams)

    def extra_repr(self):
        q = self.qparams
        return f"bits={q.bits}, scale={self.scale.item():.4g}, zero_point={self.zero_point.item()}"


@torch.no_grad()
def quantize(model, stats, config=QuantConfig()):
    """A copy of `model` that rounds where `config` says: a torch.fx.GraphModule on float32 [B, C, H, W], in eval mode.

    Weights are replaced by the values of their codes (each layer keeps its `weight_qparams`), biases by multiples of s_in * s_w, and a
    Quantizer stands behind every value that is stored. `qmodel.plan` and `qmodel.config` say what was decided; `qmodel.plan.floats`
    lists operations that are computed in float between two sets of codes.
    Raises UserError when the statistics belong to another network or placement.
    """
    graph, plan, digest = prepare(model, config.placement, config.fold_batchnorm)
    if (stats.graph_hash, stats.placement) != (digest, config.placement):
        what = "placement" if stats.placement != config.placement else "network"
        folding = "" if config.fold_batchnorm is None else f", fold_batchnorm={config.fold_batchnorm}"
        raise UserError(f"these statistics were collected on another {what}; run collect(model, batches, placement={config.placement!r}{folding}) on this one")
    names = layers(graph, plan)
    config.check_layers(plan, names)
    inputs = _insert_quantizers(graph, plan, stats, config)
    for name in names:
        _quantize_layer(graph.get_submodule(find_node(graph, name).target), plan, name, config, inputs.get(name))
    graph.recompile()
    graph.plan, graph.config = plan, config
    return graph.eval().to(next(graph.parameters()).device)


def layers(graph, plan):
    """Names of the convolution and linear nodes, in order of execution."""
    kinds = find_kinds(graph)
    return [node.name for node in kinds if kinds[node] == "compute"]


def find_node(graph, name):
    return next(n for n in graph.graph.nodes if n.name == name)


def _insert_quantizers(graph, plan, stats, config):
    """Put a Quantizer behind every stored value and, where a layer reads fewer bits than are stored, in front of it; layer -> its QParams."""
    nodes = {n.name: n for n in graph.graph.nodes}
    required = {layer: config.layer_bits(plan, layer)[1] for layer in plan.reads}
    stored, holders = {}, {}
    for name, role in plan.stores.items():
        needs = [required[layer] for layer, value in plan.reads.items() if plan.sources.get(value) == name]
        if role == "residual":
            bits = config.residual_bits
        elif not needs:
            bits = config.input_bits if role == "input" else (config.layer_act_bits or {}).get(name, config.act_bits)
        else:
            bits = None if None in needs else max(needs)
        if bits is not None:
            stored[name] = choose_edge_qparams(stats.edges[name], bits, config)
            users = list(nodes[name].users)
            quantizer = holders[name] = _add_quantizer(graph, nodes[name], name, stored[name])
            for user in users:
                user.replace_input_with(nodes[name], quantizer)
    inputs, shared = {}, {}
    for layer, value in plan.reads.items():
        q = stored.get(plan.sources.get(value))
        if required[layer] is not None and (q is None or required[layer] < q.bits):
            read = nodes[layer].args[0]
            if (read, required[layer]) not in shared:
                q = choose_edge_qparams(stats.edges[value], required[layer], config)
                shared[read, required[layer]] = q, _add_quantizer(graph, read, f"{value}_{required[layer]}bit", q)
            q, quantizer = shared[read, required[layer]]
            nodes[layer].replace_input_with(read, quantizer)
        inputs[layer] = q
    return inputs


def choose_edge_qparams(edge, bits, config):
    """The QParams of an activation edge: its observer's range at that width.

    Of signed codes on an edge that is never negative only half are of use, as many as one bit less has unsigned: the observer is told so.
    """
    half = config.act_symmetric and config.act_signed and edge.minimum >= 0
    low, high = observers.find_observer(config.observer)(edge, max(bits - half, MIN_BITS), config.act_symmetric)
    return choose_qparams(low, high, bits, symmetric=config.act_symmetric, signed=config.act_signed or edge.minimum < 0)


def choose_weight_qparams(weight, bits, config):
    """The QParams of a weight [C, ...] at that width."""
    low, high = observers.weight_range(
        weight, bits, observer=config.weight_observer, p=config.weight_norm, per_channel=config.per_channel, symmetric=config.weight_symmetric
    )
    return choose_qparams(low, high, bits, symmetric=config.weight_symmetric, axis=0 if config.per_channel else None)


def _add_quantizer(graph, node, name, q):
    target = f"quantizers.{name}"
    if not hasattr(graph, "quantizers"):
        graph.add_module("quantizers", nn.Module())
    graph.add_submodule(target, Quantizer(q))
    with graph.graph.inserting_after(node):
        return graph.graph.call_module(target, (node,))


def _quantize_layer(layer, plan, name, config, q_in):
    """Replace weight and bias by the values of their codes; q_in: the codes the layer reads, None for float."""
    bits = config.layer_bits(plan, name)[0]
    if bits is None:
        return
    weight = layer.weight.detach()
    q = choose_weight_qparams(weight, bits, config)
    if layer.bias is not None and q_in is not None and config.placement == "fused":
        bias = layer.bias.detach().double()
        floor = bias.abs() / (BIAS_CODES * q_in.scale.double())  # a channel of tiny weights and a large bias
        q = dataclasses.replace(q, scale=torch.maximum(q.scale, (floor if config.per_channel else floor.max()).float()))
        unit = q_in.scale.double() * q.scale.double()
        layer.bias.copy_(torch.round(bias / unit) * unit)
    layer.weight.copy_(fake_quantize(weight, q))
    layer.weight_qparams = q


# ---- Change a quantized network ---------------------------------------------------------------------------------------------


def copy_quantized(qmodel):
    """A copy that shares nothing; deepcopy of a GraphModule alone forgets plan and config."""
    copied = copy.deepcopy(qmodel)
    copied.plan, copied.config = qmodel.plan, qmodel.config
    return copied


def input_qparams(qmodel, layer):
    """QParams of the codes that a layer reads, by node name; None where it reads float."""
    kinds = find_kinds(qmodel)
    node = find_node(qmodel, layer).args[0]
    while not isinstance(module := qmodel.get_submodule(node.target) if node.op == "call_module" else None, Quantizer):
        if kinds[node] not in (*PASSES_CODES, "clamp"):
            return None
        node = node.args[0]
    return module.qparams


@torch.no_grad()
def write_codes(layer, codes, q, bias, q_in):
    """Give a layer these weight codes (int32) and this bias (float, rounded to s_in * s_w unless q_in is None).

    A channel's scale is raised where its bias code would leave 30 bits, as in `quantize`.
    """
    codes, q = codes.cpu(), q.to("cpu")
    if bias is not None and q_in is not None:
        bias, s_in = bias.detach().cpu().double(), q_in.scale.cpu().double()
        floor = (bias.abs() / (BIAS_CODES * s_in)).float()
        q = dataclasses.replace(q, scale=torch.maximum(q.scale, floor if q.axis is not None else floor.max()))
        unit = s_in * q.scale.double()
        bias = torch.round(bias / unit) * unit
    if bias is not None:
        layer.bias.copy_(bias)
    layer.weight.copy_(dequantize(codes, q))
    layer.weight_qparams = q


def weight_bytes(qmodel):
    """Bytes of a quantized network as stored: packed codes, float32 scales, int32 biases, and what stayed float at four bytes a value."""
    total = 0
    for module in qmodel.modules():
        own = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
        q = getattr(module, "weight_qparams", None)
        if q is not None:
            total += -(-own.pop("weight").numel() * q.bits // 8) + 4 * q.scale.numel()
        total += sum(4 * tensor.numel() for tensor in own.values() if tensor is not None)
    return total
