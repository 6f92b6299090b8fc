"""Which layer broke, why, and what to do about it: every remedy is tried and says what it is worth.

    frame = diagnose(model, stats, batches, QuantConfig(4, 4), split)
    frame[["where", "fault", "evidence", "remedy", "gain_db", "gain_points"]]     # best first

A fault is a suspicion with a number; what counts is the gain, measured on the network and images at
hand: decibels at the logits, mean over images (one of them must not decide), and, where there are
labels, points of accuracy.
"""

import dataclasses
from functools import partial

import pandas as pd
import torch

from quantlab.calibration import collect, watch
from quantlab.config import QuantConfig
from quantlab.evaluate import evaluate
from quantlab.graph import find_kinds, folded
from quantlab.improving.equalization import equalizable_pairs, equalize
from quantlab.plan import make_plan
from quantlab.ptq import choose_edge_qparams, choose_weight_qparams, quantize
from quantlab.quantized import find_node
from quantlab.system.comparing import decibels
from quantlab.system.errors import UserError

OUTLIER = 6  # times the median channel: from there on one channel decides
USED = 0.5  # of a range that all but a thousandth of the values fill
NARROW = 0.2  # negative side over positive side of a smooth activation
UNBALANCED = 8  # ranges of the operands of an add or concatenation
FEW = 16  # products in a sum
EXACT = 200.0  # dB, where nothing is lost
SETTERS = ("histogram", "percentile", "mse")
EIGHT = "8 bits for this layer and what it reads"
COLUMNS = ["where", "fault", "evidence", "remedy", "gain_db", "gain_points"]


@dataclasses.dataclass(frozen=True)
class Suspect:
    """where: a layer or edge. remedy: in words; the same words are the same network. severity: of
    the evidence, 1 where it begins to count.
    """

    where: str
    fault: str
    evidence: str
    remedy: str
    changes: dict  # of the QuantConfig
    equalized: bool = False
    severity: float = 1.0


def diagnose(model, stats, batches, config=QuantConfig(4, 4), split=None, most=8, **options):
    """A frame of COLUMNS, a row a suspected fault and remedy, the largest gain first; gain_points
    only with `split`. batches: float32 [B, C, H, W] each. most: remedies of single layers that are
    tried, those of the strongest evidence. options: those of `evaluate`. UserError for no batch,
    and for statistics of another network.
    """
    batches = list(batches)
    if not batches:
        raise UserError("no images to diagnose with: give at least one batch")
    suspects = list(find_suspects(model, stats, batches, config))
    local = sorted((s for s in suspects if s.remedy.startswith(EIGHT)), key=lambda s: -s.severity)
    suspects = [s for s in suspects if s not in local[most:]]
    tries = {s.remedy: s for s in suspects}
    score = partial(_score, model, stats, batches, split, options)
    base, gains = score(config, False), {}
    for words, suspect in tries.items():
        found = score(dataclasses.replace(config, **suspect.changes), suspect.equalized)
        gains[words] = [after - before for after, before in zip(found, base)]
    rows = [(s.where, s.fault, s.evidence, s.remedy, *gains[s.remedy]) for s in suspects]
    frame = pd.DataFrame(rows, columns=COLUMNS[: 4 + len(base)])
    return frame.sort_values("gain_db", ascending=False, kind="stable", ignore_index=True)


def _score(model, stats, batches, split, options, config, equalized):
    """(dB at the logits, mean over images[, top-1 in %]) of a network under a config."""
    if equalized:
        equal = equalize(model, images=batches[0])
        qmodel = quantize(equal, collect(equal, batches), config)
    else:
        qmodel = quantize(model, stats, config)
    ratios, where = [], next(model.parameters()).device
    with torch.inference_mode():
        for batch in batches:
            exact = model(batch.to(where)).cpu().double()
            noise = (qmodel(batch.to(where)).cpu().double() - exact).square().flatten(1).sum(1)
            signal = exact.square().flatten(1).sum(1)
            ratios += [min(decibels(*pair), EXACT) for pair in zip(signal, noise)]
    mean = sum(ratios) / len(ratios)
    return (mean, evaluate(qmodel, split, **options).top1) if split is not None else (mean,)


# ---- Faults --------------------------------------------------------------------------------------


def find_suspects(model, stats, batches, config):
    """Yields a Suspect for everything that looks like a fault, of the whole network and of each
    layer, in order of execution.
    """
    graph = folded(model)
    plan, channels = make_plan(graph), {}
    joins = {n: kind for n, kind in find_kinds(graph).items() if kind in ("add", "concat")}
    operands = {operand.name for node in joins for operand in node.all_input_nodes}
    watch(graph, {*plan.observed, *operands}, partial(_channel_ranges, channels), batches)
    for name, value in plan.reads.items():
        layer = graph.get_submodule(find_node(graph, name).target)
        weight_bits, act_bits = config.layer_bits(plan, name)
        here = {"layer_weight_bits": (config.layer_weight_bits or {}) | {name: 8},
                "layer_act_bits": (config.layer_act_bits or {}) | {name: 8}}
        eight = (f"{EIGHT}: {name}", here)
        edge = stats.edges[value]
        for found in (_of_weight(name, layer, weight_bits, config, eight),
                      _of_edge(value, edge, channels.get(value), act_bits, config, eight, graph)):
            yield from found
        if name in plan.first | plan.last and min(weight_bits or 8, act_bits or 8) < 8:
            place = "first layer" if name in plan.first else "last layer"
            yield Suspect(name, place, f"W{weight_bits}A{act_bits} as all others",
                          f"8 bits for the {place}: {name}", here)
    yield from _of_joins(joins, plan, channels, config)
    if config.weight_symmetric and config.weight_bits < 8:
        yield Suspect("all layers", "weights waste a level",
                      f"{2**config.weight_bits - 1} of {2**config.weight_bits}",
                      "all 2^b levels of a weight", {"weight_symmetric": False})


def _channel_ranges(channels, name, value):
    """Largest |value| of every channel (axis 1), over all batches."""
    if value.dim() > 1 and value.is_floating_point():
        now = value.detach().abs().transpose(0, 1).flatten(1).amax(1).cpu()
        channels[name] = torch.maximum(channels.get(name, now), now)


def _outlier(ranges):
    """(index, its range, the median's) of a channel that decides alone; None where there is none.
    """
    if ranges is None or len(ranges) < 4 or not ranges.max() > 0:
        return None
    median = ranges[ranges > 0].median().item()
    worst = ranges.argmax().item()
    return (worst, ranges[worst].item(), median) if ranges[worst] > OUTLIER * median else None


def _of_weight(name, layer, bits, config, eight):
    if bits is None or bits >= 8:
        return
    weight = layer.weight.detach()
    found = _outlier(weight.abs().flatten(1).amax(1).cpu())
    if found and not config.per_channel:
        yield Suspect(name, "one channel sets the range of the weight",
                      f"channel {found[0]} reaches {found[1]:.3g}, the median {found[2]:.3g}",
                      "one scale a channel", {"per_channel": True})
    q = choose_weight_qparams(weight, bits, config)
    rows = weight.abs().flatten(1).amax(1)
    dead = int((rows < q.scale.to(rows.device) / 2).sum()) - int((rows == 0).sum())
    if dead:
        yield Suspect(name, "channels become dead", f"{dead} of {len(rows)} round to zero", *eight,
                      severity=1 + dead / len(rows))
    if weight[0].numel() <= FEW:
        yield Suspect(name, "its sums meet few levels",
                      f"{weight[0].numel()} products of {bits} bits a sum", *eight)


def _of_edge(value, edge, ranges, bits, config, eight, graph):
    if bits is None or bits >= 8:
        return
    found = _outlier(ranges)
    if found:
        said = (value, "one outlier channel sets the range",
                f"channel {found[0]} reaches {found[1]:.3g}, the median {found[2]:.3g}")
        if equalizable_pairs(graph):
            yield Suspect(*said, "equalisation", {}, equalized=True)
        yield Suspect(*said, *eight, severity=found[1] / found[2] / OUTLIER)
    q = choose_edge_qparams(edge, bits, config)
    centers, counts = edge.histogram()
    if counts.sum() > 0:
        shares = counts.double().cumsum(0) / counts.sum()  # of the values that are not zero
        low, high = (centers[(shares >= share).nonzero()[0]].item() for share in (0.0005, 0.9995))
        used = (max(high, 0) - min(low, 0)) / (q.scale.item() * (q.qmax - q.qmin))
        if used < USED:
            for setter in (s for s in SETTERS if s != config.observer):
                yield Suspect(value, "a range that never uses half of its codes",
                              f"99.9 % of the values lie in {used:.0%} of it",
                              f"the range setter {setter}", {"observer": setter})
    if edge.minimum < 0 and config.act_symmetric and -edge.minimum < NARROW * edge.maximum:
        yield Suspect(value, "negative side of a smooth activation",
                      f"from {edge.minimum:.3g} to {edge.maximum:.3g}, with codes of both signs",
                      "a zero-point for activations", {"act_symmetric": False})


def _of_joins(joins, plan, channels, config):
    """Adds and concatenations whose operands have very different ranges."""
    for node, kind in joins.items():
        reach = {n.name: channels[n.name].max().item()
                 for n in node.all_input_nodes if n.name in channels}
        if len(reach) < 2 or not max(reach.values()) > UNBALANCED * min(reach.values()) > 0:
            continue
        large = max(reach, key=reach.get)
        ratio = reach[large] / min(reach.values())
        said = (node.name, f"an unbalanced {kind}",
                f"{large} reaches {ratio:.0f} times as far as its partner")
        if kind == "add" and config.residual_bits is not None:
            yield Suspect(*said, "residual stream in float", {"residual_bits": None})
        if kind == "concat":
            yield from _of_concat(node, said, plan, config)


def _of_concat(node, said, plan, config):
    """More bits for the one range that the operands of a concatenation share."""
    while node.name not in plan.stores and len(node.users) == 1:
        node = next(iter(node.users))  # a clamp behind it, where its values are rounded
    readers = [layer for layer, value in plan.reads.items()
               if plan.sources.get(value) == node.name]
    bits = [config.layer_bits(plan, layer)[1] or 8 for layer in readers]
    if bits and min(bits) < 8:
        finer = (config.layer_act_bits or {}) | dict.fromkeys(readers, 8)
        yield Suspect(*said, f"8 bits for the values of {node.name}", {"layer_act_bits": finer})
