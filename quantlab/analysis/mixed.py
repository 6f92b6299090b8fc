"""Mixed precision: what every layer loses and costs at every width, and the widths that lose least within a budget.

    errors = layer_errors(model, stats, images.calibration(256), widths=(8, 4, 3, 2))
    chosen = allocate(weight_options(errors, layer_costs(model, batch)), budget=50_000)
    qmodel = quantize(model, stats, mixed_config(QuantConfig(), chosen))
"""

import dataclasses

import numpy as np
import pandas as pd
import scipy.optimize
import torch
import torch.nn.functional as F
from torch import fx
from torch.fx.passes.shape_prop import ShapeProp
from tqdm.auto import tqdm

from quantlab.affine import check_bits, fake_quantize
from quantlab.calibration import check_statistics
from quantlab.config import QuantConfig
from quantlab.evaluate import evaluate, paired_drop
from quantlab.graph import folded
from quantlab.plan import make_plan
from quantlab.ptq import choose_edge_qparams, choose_weight_qparams, layers, quantize
from quantlab.quantized import find_node
from quantlab.system.errors import UserError
from quantlab.system.machine import device, exact_float

WIDTHS = (8, 6, 5, 4, 3, 2)


# ---- What a layer loses -----------------------------------------------------------------------------------------------------


class _Values(fx.Interpreter):
    """Runs a graph from `known` values on, rounding with `q` what the module `target` reads; keeps every value when asked to."""

    def __init__(self, graph, target=None, q=None, keep=False):
        super().__init__(graph, garbage_collect_values=not keep)
        self.target, self.q = target, q

    def call_module(self, target, args, kwargs):
        if target == self.target:
            args = (fake_quantize(args[0], self.q), *args[1:])
        return super().call_module(target, args, kwargs)


@torch.no_grad()
def layer_errors(model, stats, batches, widths=WIDTHS, config=QuantConfig(), verbose=False):
    """What the output loses when one layer's weights, or what one layer reads, is rounded and nothing else: a frame, one row a measurement.

    columns: layer, kind ("weight" or "activation"), bits, error: the Kullback-Leibler divergence KL(p || q) in nats, mean over images, of the
    class probabilities p of the float network and q of the rounded one (the measure of ZeroQ, arXiv:2001.00281). Such errors add up
    nearly enough to rank allocations. A layer that reads the image has one activation row, at `input_bits`. batches: float32 [B, C, H, W].
    """
    for bits in widths:
        check_bits(bits, "widths")
    graph = folded(model)
    check_statistics(stats, graph)
    plan = make_plan(graph)
    graph.to(device())
    cases = [case for name in layers(graph) for case in _cases(graph, plan, name, stats, widths, config)]
    order = {node: i for i, node in enumerate(graph.graph.nodes)}
    totals, seen = np.zeros(len(cases)), 0
    with exact_float():
        for batch in tqdm(batches, desc="one layer at a time", unit=" batches", leave=False, disable=not verbose):
            exact = _Values(graph, keep=True)
            log_p = F.log_softmax(exact.run(batch.to(device())).double(), -1)
            for i, (name, kind, _, q) in enumerate(cases):
                node = find_node(graph, name)
                known = {n: v for n, v in exact.env.items() if order[n] < order[node]}
                logits = _run_rounded(graph, node, kind, q, known)
                totals[i] += F.kl_div(F.log_softmax(logits.double(), -1), log_p, reduction="sum", log_target=True).item()
            seen += len(batch)
    if not seen:
        raise UserError("no images to measure the error on: give at least one batch")
    return pd.DataFrame(
        [{"layer": name, "kind": kind, "bits": bits, "error": max(total, 0.0) / seen} for (name, kind, bits, _), total in zip(cases, totals)]
    )


def _cases(graph, plan, name, stats, widths, config):
    """(layer, kind, bits, QParams) of everything that is measured for one layer."""
    weight = graph.get_submodule(find_node(graph, name).target).weight
    reads_image = plan.stores.get(plan.sources.get(plan.reads[name])) == "input"
    act_widths = ([config.input_bits] if config.input_bits else []) if reads_image else widths
    found = [(name, "weight", bits, choose_weight_qparams(weight.detach(), bits, config)) for bits in widths]
    return found + [(name, "activation", bits, choose_edge_qparams(stats.edges[plan.reads[name]], bits, config).to(device())) for bits in act_widths]


def _run_rounded(graph, node, kind, q, known):
    if kind == "activation":
        return _Values(graph, node.target, q).run(initial_env=known)
    layer = graph.get_submodule(node.target)
    exact = layer.weight.data
    layer.weight.data = fake_quantize(exact, q)
    logits = _Values(graph).run(initial_env=known)
    layer.weight.data = exact
    return logits


def layer_accuracy(model, stats, split, config, names=None, verbose=False, **options):
    """Accuracy with one layer quantized and all others float, and with one layer float and all others quantized, as `config` says.

    A frame with layer, case ("only this quantized" or "only this float"), top1 in percent, drop, drop_low, drop_high: points lost
    against the float network on the same images, with the paired 95 % interval, and all: those lost with all layers quantized.
    names: of the layers, None for all. options: those of `evaluate` (limit, batch_size). A lone quantized layer reads unrounded adds and
    image; a float layer among quantized ones reads them as stored.
    """
    graph = folded(model)
    plan = make_plan(graph)
    weights, acts = dict.fromkeys(layers(graph)), dict.fromkeys([*plan.reads, *plan.unread])
    baseline = evaluate(model, split, **options)
    everything = paired_drop(baseline.correct, evaluate(quantize(model, stats, config), split, **options).correct)[0]
    rows = []
    for name in tqdm(names or list(weights), desc="layer by layer", leave=False, disable=not verbose):
        weight_bits, act_bits = config.layer_bits(plan, name)
        alone = dataclasses.replace(
            config, residual_bits=None, layer_weight_bits=weights | {name: weight_bits}, layer_act_bits=acts | {name: act_bits}
        )
        without = dataclasses.replace(
            config, layer_weight_bits=(config.layer_weight_bits or {}) | {name: None}, layer_act_bits=(config.layer_act_bits or {}) | {name: None}
        )
        for case, one in (("only this quantized", alone), ("only this float", without)):
            result = evaluate(quantize(model, stats, one), split, **options)
            drop, low, high = paired_drop(baseline.correct, result.correct)
            rows.append({"layer": name, "case": case, "top1": result.top1, "drop": drop, "drop_low": low, "drop_high": high, "all": everything})
    return pd.DataFrame(rows)


# ---- What a layer costs -----------------------------------------------------------------------------------------------------


def layer_costs(model, batch):
    """A frame with layer, weights (values), constants (scales and biases), reads (values read) and macs (multiply-accumulates), for one image.

    batch: float32 [B, C, H, W] of any B.
    """
    graph = folded(model)
    ShapeProp(graph).propagate(batch[:1].to(next(graph.parameters()).device))
    rows = []
    for name in layers(graph):
        node = find_node(graph, name)
        layer = graph.get_submodule(node.target)
        reads, writes = (n.meta["tensor_meta"].shape.numel() for n in (node.args[0], node))
        channels = layer.weight.shape[0]
        rows.append({"layer": name, "weights": layer.weight.numel(), "constants": channels * (1 + (layer.bias is not None)),
                     "reads": reads, "macs": writes * layer.weight.numel() // channels})
    return pd.DataFrame(rows)


# ---- Allocation -------------------------------------------------------------------------------------------------------------


def weight_options(errors, costs):
    """Widths of every layer's weights; cost: bytes as stored, packed codes with float32 scales and int32 biases."""
    table = errors[errors.kind == "weight"].merge(costs, on="layer").rename(columns={"bits": "weight_bits"})
    return table.assign(cost=-(-table.weights * table.weight_bits // 8) + 4 * table.constants)[["layer", "weight_bits", "error", "cost"]]


def activation_options(errors, costs):
    """Widths of what every layer reads; cost: bytes read for one image."""
    table = errors[errors.kind == "activation"].merge(costs, on="layer").rename(columns={"bits": "act_bits"})
    return table.assign(cost=-(-table.reads * table.act_bits // 8))[["layer", "act_bits", "error", "cost"]]


def operation_options(errors, costs):
    """Pairs of widths for every layer; cost: bit operations for one image, multiply-accumulates * weight_bits * act_bits (BOPs)."""
    weights, acts = (errors[errors.kind == kind].rename(columns={"bits": name}) for kind, name in (("weight", "weight_bits"), ("activation", "act_bits")))
    table = weights.merge(acts, on="layer", suffixes=("", "_act")).merge(costs, on="layer")
    table = table.assign(error=table.error + table.error_act, cost=table.macs * table.weight_bits * table.act_bits)
    return table[["layer", "weight_bits", "act_bits", "error", "cost"]]


def allocate(options, budget):
    """One row of `options` for every layer, such that the errors add up to the least and the costs to at most `budget`: a frame.

    minimise sum_i error_i x_i  with  sum_i cost_i x_i <= budget,  sum of x over a layer's options = 1,  x binary      (scipy.optimize.milp)
    Raises UserError for a budget that no allocation meets, with the least that one needs.
    """
    options = options.reset_index(drop=True)
    cost, error = options.cost.to_numpy(dtype=np.int64), options.error.to_numpy(dtype=np.float64)
    least = int(options.groupby("layer").cost.min().sum())
    if budget < least:
        raise UserError(f"no allocation meets a budget of {budget:,}: the narrowest widths offered need {least:,}; raise it or offer narrower ones")
    unit = np.gcd.reduce(cost)  # small integers, so that the solver's tolerance of 1e-6 is far below one unit of cost
    one_each = pd.get_dummies(options.layer, dtype=float).T.to_numpy()
    solution = scipy.optimize.milp(
        error / max(error.max(), 1e-300),
        integrality=np.ones(len(error)),
        bounds=scipy.optimize.Bounds(0, 1),
        constraints=[scipy.optimize.LinearConstraint(one_each, 1, 1), scipy.optimize.LinearConstraint((cost // unit)[None, :], 0, budget // unit)],
        options={"mip_rel_gap": 0},
    )
    if solution.x is None:
        raise UserError(f"the solver found no allocation: {solution.message}; offer fewer widths")
    return options[solution.x > 0.5].reset_index(drop=True)


def mixed_config(config, chosen):
    """`config` with the widths of an allocation."""
    found = {name: dict(zip(chosen.layer, chosen[name].astype(int).tolist())) for name in ("weight_bits", "act_bits") if name in chosen}
    return dataclasses.replace(config, **{f"layer_{name}": bits for name, bits in found.items()})
