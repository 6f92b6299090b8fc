"""Post-training quantization, the second of two steps.

    stats  = collect(model, data.calibration(1024, seed=0))                  # once: calibration.py
    qmodel = quantize(model, stats, QuantConfig(weight_bits=4, act_bits=4))  # as often as you like
"""

import dataclasses

import torch

from quantlab import observers
from quantlab.affine import MIN_SCALE, choose_qparams, fake_quantize
from quantlab.config import QuantConfig
from quantlab.graph import find_kinds, folded, operation_name
from quantlab.plan import holder_of, make_plan
from quantlab.quantized import QuantizedNetwork, add_quantizer, find_node, round_bias
from quantlab.system.errors import checked


@checked
def quantize(model, stats, config=QuantConfig()):
    """A copy of `model` that rounds where `config` says: a QuantizedNetwork on [B, C, H, W].

    Weights are replaced by the values of their codes, biases by multiples of s_in * s_w, and a
    Quantizer stands behind every value that is stored. `qmodel.plan.floats`: operations computed in
    float between two sets of codes -> why. UserError for the statistics of another network.
    """
    from quantlab.system.contract import check_statistics

    graph = folded(model)
    check_statistics(stats, model, graph)
    qmodel = quantize_graph(graph, make_plan(graph), stats.edges, config)
    origins = [stats.graph_hash, *graph.meta.get("origins", [])]
    qmodel.meta |= {"image_shape": stats.image_shape, "origins": origins}
    return qmodel


@torch.no_grad()
def quantize_graph(graph, plan, edges, config):
    """The QuantizedNetwork of a float graph, which is used up, under a plan of the caller's own.

    edges: name -> EdgeStats of every value in plan.observed.
    """
    names, plan = layers(graph), plan.of_floats(edges)
    config.check_layers(plan, names)
    inputs = _insert_quantizers(graph, plan, edges, config)
    for name in names:
        layer = graph.get_submodule(find_node(graph, name).target)
        _quantize_layer(layer, config.layer_bits(plan, name)[0], config, inputs.get(name))
    return QuantizedNetwork.of(graph, plan, config).to(next(graph.parameters()).device)


def layers(graph):
    """Names of the convolution and linear nodes, in order of execution."""
    kinds = find_kinds(graph)
    return [node.name for node in kinds if kinds[node] == "compute"]


def _insert_quantizers(graph, plan, edges, config):
    """A Quantizer behind every stored value; layer -> QParams of what it reads (None: float).

    Where a layer reads fewer bits than are stored, a second one stands in front of it. Behind a
    clamp of stored codes the same codes round its bounds, unless these are zero and infinity.
    """
    kinds = find_kinds(graph)
    nodes = {n.name: n for n in kinds}
    clamps = {n: holder_of(n, kinds).name for n in kinds
              if kinds[n] == "clamp" and operation_name(n, graph) != "relu"}
    required = {layer: config.layer_bits(plan, layer)[1] for layer in plan.reads}
    stored = {}
    for name, role in plan.stores.items():
        bits = _stored_bits(name, role, plan, required, config)
        if bits is None:
            continue
        stored[name] = choose_edge_qparams(edges[name], bits, config)
        _read_codes(graph, nodes[name], stored[name])
    for node, holder in clamps.items():
        if holder in stored and node.name not in stored:
            _read_codes(graph, node, stored[holder])
    inputs, narrow = {}, {}
    for layer, value in plan.reads.items():
        bits = required[layer]
        q = stored.get(plan.sources.get(value))
        if bits is not None and (q is None or bits < q.bits):
            read = nodes[layer].args[0]
            if (read, bits) not in narrow:  # layers that read the same value share its codes
                q = choose_edge_qparams(edges[value], bits, config)
                narrow[read, bits] = q, add_quantizer(graph, read, f"{value}_{bits}bit", q)
            q, quantizer = narrow[read, bits]
            nodes[layer].replace_input_with(read, quantizer)
        inputs[layer] = q
    return inputs


def _read_codes(graph, node, q):
    """Let all who read a node read the values of its codes."""
    users = list(node.users)
    quantizer = add_quantizer(graph, node, node.name, q)
    for user in users:
        user.replace_input_with(node, quantizer)


def _stored_bits(name, role, plan, required, config):
    """Width at which a value is stored, None for float: the most that any of its readers needs."""
    if role == "residual":
        return config.residual_bits
    readers = [layer for layer, value in plan.reads.items() if plan.sources.get(value) == name]
    needs = [required[layer] for layer in readers]
    if needs:
        return None if None in needs else max(needs)
    if role == "input":
        return config.input_bits
    return (config.layer_act_bits or {}).get(name, config.act_bits)


def choose_edge_qparams(edge, bits, config):
    """The QParams of an activation edge: its observer's range at that width."""
    low, high = observers.find_observer(config.observer)(edge, bits, config.act_symmetric)
    signed = edge.minimum < 0
    return choose_qparams(low, high, bits, symmetric=config.act_symmetric, signed=signed)


def choose_weight_qparams(weight, bits, config):
    """The QParams of a weight [C, ...] at that width."""
    low, high = observers.weight_range(
        weight, bits, observer=config.weight_observer, p=config.weight_norm,
        per_channel=config.per_channel, symmetric=config.weight_symmetric)
    axis = 0 if config.per_channel else None
    return choose_qparams(low, high, bits, symmetric=config.weight_symmetric, axis=axis)


def _quantize_layer(layer, bits, config, q_in):
    """Replace weight and bias by the values of their codes; q_in: of what it reads, or None."""
    if bits is None:
        return
    weight = layer.weight.detach()
    q = choose_weight_qparams(weight, bits, config)
    if layer.bias is not None and q_in is not None:
        # a channel without weights has only its bias: the finest scale that holds its code
        empty = (weight == 0).flatten(1).all(1) & (layer.bias != 0)
        empty = empty if config.per_channel else (weight == 0).all()
        q = dataclasses.replace(q, scale=q.scale.where(~empty, MIN_SCALE))
        q, bias = round_bias(layer.bias, q, q_in)
        layer.bias.copy_(bias)
    layer.weight.copy_(fake_quantize(weight, q))
    layer.weight_qparams = q
