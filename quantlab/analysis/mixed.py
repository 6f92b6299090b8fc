"""Mixed precision: what every layer loses and costs at every width, and the widths that lose least
within a budget.

    errors = layer_errors(model, stats, images.calibration(256), widths=(8, 4, 3, 2))
    chosen = allocate(weight_options(errors, layer_costs(model, batch)), budget=50_000)
    qmodel = quantize(model, stats, mixed_config(QuantConfig(), chosen))
"""

import dataclasses
from functools import partial

import numpy as np
import pandas as pd
import scipy.optimize
import torch
import torch.nn.functional as F
from torch import fx
from torch.fx.passes.shape_prop import ShapeProp
from tqdm.auto import tqdm

from quantlab.affine import check_bits, fake_quantize
from quantlab.config import QuantConfig
from quantlab.evaluate import evaluate
from quantlab.graph import folded
from quantlab.plan import make_plan
from quantlab.ptq import choose_edge_qparams, choose_weight_qparams, layers, quantize
from quantlab.quantized import find_node
from quantlab.system.comparing import paired_drop
from quantlab.system.contract import (
    as_batches,
    as_images,
    check_function,
    check_logits,
    check_statistics,
)
from quantlab.system.errors import UserError
from quantlab.system.machine import device, exact_float

WIDTHS = (8, 6, 5, 4, 3, 2)
FLOAT_BITS = 32  # what a value costs that is not rounded


# ---- What a layer loses --------------------------------------------------------------------------


@torch.no_grad()
def layer_errors(model, stats, batches, widths=WIDTHS, config=QuantConfig(), verbose=False):
    """What the output loses when one layer's weights, or what one layer reads, is rounded and
    nothing else: a frame, one row a measurement.

    columns: layer, kind ("weight" or "activation"), bits, error: the Kullback-Leibler divergence
    KL(p || q) in nats, mean over images (and over the places of a segmentation), of the class
    probabilities (axis 1) p of the float network and q of the rounded one (the measure of ZeroQ,
    arXiv:2001.00281). Such errors add up nearly enough to rank allocations. A layer that reads the
    image has one activation row, at `input_bits`. batches: as system/contract.py says.
    """
    for bits in widths:
        check_bits(bits, "widths")
    graph = folded(model)
    check_statistics(stats, model, graph)
    graph.to(device())
    cases, check = _cases(graph, stats, widths, config), partial(check_function, model, graph)
    totals, seen = np.zeros(len(cases)), 0
    options = dict(desc="one layer at a time", unit=" batches", leave=False, disable=not verbose)
    with exact_float():
        for batch in tqdm(as_batches(batches, check), **options):
            totals += _divergences(graph, cases, batch.to(device()))
            seen += len(batch)
    if not seen:
        raise UserError("no images to measure the error on: give at least one batch")
    frame = pd.DataFrame([case[:3] for case in cases], columns=["layer", "kind", "bits"])
    return frame.assign(error=totals.clip(min=0) / seen)


def _cases(graph, stats, widths, config):
    """(layer, kind, bits, QParams) of everything that is measured."""
    plan, cases = make_plan(graph), []
    for name in layers(graph):
        weight = graph.get_submodule(find_node(graph, name).target).weight.detach()
        for bits in widths:
            cases.append((name, "weight", bits, choose_weight_qparams(weight, bits, config)))
        edge = plan.reads[name]
        reads_image = plan.stores.get(plan.sources.get(edge)) == "input"
        for bits in [config.input_bits] if reads_image else widths:
            if bits is not None:
                q = choose_edge_qparams(stats.edges[edge], bits, config).to(device())
                cases.append((name, "activation", bits, q))
    return cases


def _divergences(graph, cases, batch):
    """KL(p || q), summed over the images of a batch, mean over places: float64 [cases]."""
    exact = fx.Interpreter(graph, garbage_collect_values=False)
    logits = exact.run(batch)
    check_logits(logits, len(batch), places=True)
    log_p = F.log_softmax(logits.double(), 1)
    places = log_p[0, 0].numel()
    nodes, found = list(graph.graph.nodes), []
    for name, kind, _, q in cases:
        node = find_node(graph, name)
        layer, x = graph.get_submodule(node.target), exact.env[node.args[0]]
        # what is computed before the layer is not computed again
        known = {n: exact.env[n] for n in nodes[: nodes.index(node)]}
        if kind == "activation":
            known[node] = layer(fake_quantize(x, q))
        else:
            weight = fake_quantize(layer.weight, q)
            known[node] = torch.func.functional_call(layer, {"weight": weight}, x)
        logits = fx.Interpreter(graph).run(initial_env=known)
        log_q = F.log_softmax(logits.double(), 1)
        found.append(F.kl_div(log_q, log_p, reduction="sum", log_target=True).item() / places)
    return np.array(found)


def layer_accuracy(model, stats, split, config, names=None, verbose=False, **options):
    """Accuracy with one layer quantized and all others float, and with one layer float and all
    others quantized, as `config` says.

    A frame with layer, case ("only this quantized" or "only this float"), top1 in percent, drop,
    drop_low, drop_high: points lost against the float network on the same images, with the paired
    95 % interval, regained (_low, _high): those won against all layers quantized, and all: what
    these lose. names: of the layers, None for all. options: those of `evaluate` (limit,
    batch_size). A lone quantized layer reads unrounded adds and image; a float layer among
    quantized ones reads them as stored.
    """
    qmodel = quantize(model, stats, config)
    plan, baseline = qmodel.plan, evaluate(model, split, **options)
    everything = evaluate(qmodel, split, **options)
    lost = {"all": paired_drop(baseline.correct, everything.correct)[0]}

    def measure(config):
        result = evaluate(quantize(model, stats, config), split, **options)
        drop = paired_drop(baseline.correct, result.correct)
        won = paired_drop(result.correct, everything.correct)
        return {"top1": result.top1, **dict(zip(("drop", "drop_low", "drop_high"), drop)),
                **dict(zip(("regained", "regained_low", "regained_high"), won)), **lost}

    rows = []
    bar = dict(desc="layer by layer", leave=False, disable=not verbose)
    for name in tqdm(names or list(plan.reads), **bar):
        weights, acts = dict.fromkeys(plan.reads), dict.fromkeys([*plan.reads, *plan.unread])
        weights[name], acts[name] = config.layer_bits(plan, name)
        alone = dataclasses.replace(
            config, residual_bits=None, layer_weight_bits=weights, layer_act_bits=acts)
        without = dataclasses.replace(
            config, layer_weight_bits=(config.layer_weight_bits or {}) | {name: None},
            layer_act_bits=(config.layer_act_bits or {}) | {name: None})
        for case, one in (("only this quantized", alone), ("only this float", without)):
            rows.append({"layer": name, "case": case, **measure(one)})
    return pd.DataFrame(rows)


# ---- What a layer costs --------------------------------------------------------------------------


def layer_costs(model, batch, config=QuantConfig()):
    """A frame with layer, weights (values), constants (scales, zero-points and biases), reads
    (values read) and macs (multiply-accumulates), for one image.

    batch: float32 [B, C, H, W] of any B. config: says whether a weight has one scale or one a
    channel, and zero-points beside them (all 2^b levels).
    """
    graph = folded(model)
    ShapeProp(graph).propagate(as_images(batch)[:1].to(next(graph.parameters()).device))
    rows = []
    for name in layers(graph):
        node = find_node(graph, name)
        layer = graph.get_submodule(node.target)
        reads, writes = (n.meta["tensor_meta"].shape.numel() for n in (node.args[0], node))
        weights, channels = layer.weight.numel(), layer.weight.shape[0]
        constants = channels if config.per_channel else 1
        constants *= 1 if config.weight_symmetric else 2
        constants += channels * (layer.bias is not None)
        rows.append((name, weights, constants, reads, writes * weights // channels))
    return pd.DataFrame(rows, columns=["layer", "weights", "constants", "reads", "macs"])


# ---- Allocation ----------------------------------------------------------------------------------


def weight_options(errors, costs):
    """Widths of every layer's weights; cost: bytes as stored, packed codes with float32 scales,
    int32 zero-points and biases.
    """
    table = errors[errors.kind == "weight"].merge(costs, on="layer")
    cost = -(-table.weights * table.bits // 8) + 4 * table.constants
    table = table.rename(columns={"bits": "weight_bits"}).assign(cost=cost)
    return table[["layer", "weight_bits", "error", "cost"]]


def operation_options(errors, costs):
    """Pairs of widths for every layer; cost: bit operations for one image (BOPs),
    multiply-accumulates * weight_bits * act_bits. A layer that reads float (input_bits=None) reads
    32 bits.
    """
    weights = errors[errors.kind == "weight"].rename(columns={"bits": "weight_bits"})
    acts = errors[errors.kind == "activation"].rename(columns={"bits": "act_bits"})
    unrounded = [name for name in weights.layer.unique() if name not in set(acts.layer)]
    floats = pd.DataFrame({"layer": unrounded, "act_bits": FLOAT_BITS, "error": 0.0})
    acts = pd.concat([acts, floats]) if unrounded else acts
    table = weights.merge(acts, on="layer", suffixes=("", "_act")).merge(costs, on="layer")
    cost = table.macs * table.weight_bits * table.act_bits
    table = table.assign(error=table.error + table.error_act, cost=cost)
    return table[["layer", "weight_bits", "act_bits", "error", "cost"]]


def allocate(options, budget):
    """One row of `options` for every layer, such that the errors add up to the least and the costs
    to at most `budget`: a frame.

    minimise sum_i error_i x_i  with  sum_i cost_i x_i <= budget,  x binary,
    sum of x over a layer's options = 1                                   (scipy.optimize.milp)

    Raises UserError for a budget that no allocation meets, with the least that one needs.
    """
    options = options.reset_index(drop=True)
    budget = min(budget, int(options.groupby("layer").cost.max().sum()))
    cost, error = options.cost.to_numpy(np.int64), options.error.to_numpy(np.float64)
    least = int(options.groupby("layer").cost.min().sum())
    if not budget >= least:
        raise UserError(f"no allocation meets a budget of {budget:,}: the narrowest widths offered "
                        f"need {least:,}; raise it or offer narrower ones")
    # small integers, so that the solver's tolerance of 1e-6 is far below one step of cost
    step = np.gcd.reduce(cost)
    linear = scipy.optimize.LinearConstraint
    one_each = linear(pd.get_dummies(options.layer, dtype=float).T.to_numpy(), 1, 1)
    affordable = linear((cost // step)[None, :], 0, budget // step)
    solution = scipy.optimize.milp(
        error / max(error.max(), 1e-300), integrality=np.ones(len(error)),
        bounds=scipy.optimize.Bounds(0, 1), constraints=[one_each, affordable],
        options={"mip_rel_gap": 0})
    if solution.x is None:
        raise UserError(
            f"the solver found no allocation: {solution.message}; offer fewer widths")
    return options[solution.x > 0.5].reset_index(drop=True)


def mixed_config(config, chosen):
    """`config` with the widths of an allocation."""
    names = [name for name in ("weight_bits", "act_bits") if name in chosen]
    widths = {name: dict(zip(chosen.layer, map(_width, chosen[name]))) for name in names}
    return dataclasses.replace(config, **{f"layer_{name}": bits for name, bits in widths.items()})


def _width(bits):
    return None if bits == FLOAT_BITS else int(bits)
