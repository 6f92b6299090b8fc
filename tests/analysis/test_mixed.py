"""Mixed precision: widths reach their layers, errors equal those of the quantized network,
allocations equal brute force.
"""

import dataclasses
import itertools
import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import quantlab as ql
from quantlab import ptq
from quantlab.analysis import mixed
from quantlab.graph import folded

NAMES = ["a", "b", "c", "d", "fc"]
FREE = ql.QuantConfig(  # all float: what each test rounds is added
    2, 2, residual_bits=None, input_bits=None, layer_weight_bits=dict.fromkeys(NAMES),
    layer_act_bits=dict.fromkeys([*NAMES, "relu_3"]))


class Small(nn.Module):
    """A residual network of five layers."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 8, 3, padding=1)
        self.c = nn.Conv2d(8, 8, 3, padding=1)
        self.d = nn.Conv2d(8, 12, 3, stride=2, groups=4)
        self.fc = nn.Linear(12, 5)

    def forward(self, x):
        x = self.a(x).relu()
        x = (x + self.c(self.b(x).relu())).relu()
        return self.fc(self.d(x).relu().mean((2, 3)))


@pytest.fixture(scope="module")
def small():
    """(network, its calibration batches, their statistics)."""
    torch.manual_seed(0)
    model, batches = Small().eval(), [torch.randn(8, 3, 9, 9) for _ in range(2)]
    return model, batches, ql.collect(model, batches)


def weight_widths(qmodel):
    found = {name: getattr(layer, "weight_qparams", None) for name, layer in qmodel.layers.items()}
    return {name: q.bits if q else None for name, q in found.items()}


def read_widths(qmodel):
    found = {name: qmodel.reads(name) for name in qmodel.layers}
    return {name: q.bits if q else None for name, q in found.items()}


def test_every_layer_has_its_own_widths(small):
    model, _, stats = small
    weights, acts = {"a": 3, "b": None, "fc": 7}, {"b": 2, "c": None, "d": 8}
    config = ql.QuantConfig(4, 5, layer_weight_bits=weights, layer_act_bits=acts)
    qmodel = ql.quantize(model, stats, config)
    assert weight_widths(qmodel) == {"a": 3, "b": None, "c": 4, "d": 4, "fc": 7}
    assert torch.equal(qmodel.b.weight, model.b.weight)
    assert torch.equal(qmodel.b.bias, model.b.bias)
    assert read_widths(qmodel) == {"a": 8, "b": 2, "c": None, "d": 8, "fc": 5}
    assert qmodel.quantizers.relu_3.qparams.bits == 5, "an average pool reads it, and no layer"
    qmodel = ql.quantize(model, stats, ql.QuantConfig(4, 5, layer_act_bits={"relu_3": 3}))
    assert qmodel.quantizers.relu_3.qparams.bits == 3


def test_all_float_is_the_float_network(small):
    model, batches, stats = small
    qmodel = ql.quantize(model, stats, FREE)
    assert not qmodel.quantizer_nodes
    with torch.no_grad():
        assert torch.equal(qmodel(batches[0]), model(batches[0]))


def test_float_image_and_low_image(small):
    model, _, stats = small
    for bits in (None, 3):
        qmodel = ql.quantize(model, stats, ql.QuantConfig(4, 4, input_bits=bits))
        assert read_widths(qmodel)["a"] == bits


def test_unknown_layers_and_widths_are_refused(small):
    model, _, stats = small
    with pytest.raises(ql.UserError, match="no layer 'layer1'; its layers are a, b, c, d, fc"):
        ql.quantize(model, stats, ql.QuantConfig(layer_weight_bits={"layer1": 4}))
    with pytest.raises(ql.UserError, match="layer_act_bits: the network has no layer"):
        ql.quantize(model, stats, ql.QuantConfig(layer_act_bits={"relu": 4}))
    with pytest.raises(ql.UserError, match=r"layer_act_bits\['a'\]=9: a width"):
        ql.QuantConfig(layer_act_bits={"a": 9})


def test_errors_are_those_of_a_network_with_one_layer_quantized(small):
    model, batches, stats = small
    table = mixed.layer_errors(model, stats, batches, widths=(4, 2))
    table = table.set_index(["layer", "kind", "bits"]).error
    assert len(table) == 2 * 5 + 1 + 2 * 4
    assert table.index.is_unique
    x = torch.cat(batches)
    for key in table.index:
        layer, kind, bits = key
        field = "layer_weight_bits" if kind == "weight" else "layer_act_bits"
        one = dataclasses.replace(FREE, **{field: getattr(FREE, field) | {layer: bits}})
        qmodel = ql.quantize(model, stats, one)
        with torch.no_grad():
            p, q = (network(x).double().softmax(-1) for network in (model, qmodel))
        divergence = (p * (p / q).log()).sum(-1).mean().item()
        assert table[key] == pytest.approx(divergence, rel=1e-3, abs=1e-12), key
    fewer = mixed.layer_errors(model, stats, batches, widths=(2,)).error
    assert (fewer > 0).all(), "the graph was left as it was between two layers"


def test_costs_are_counted_by_hand(small):
    model, batches, _ = small
    costs = mixed.layer_costs(model, batches[0]).set_index("layer")
    assert costs.loc["a"].tolist() == [3 * 8 * 9, 16, 3 * 81, 81 * 8 * 27]
    assert costs.loc["d"].tolist() == [12 * 2 * 9, 24, 8 * 81, 16 * 12 * 2 * 9]
    assert costs.loc["fc"].tolist() == [60, 10, 12, 60]


@pytest.mark.parametrize("config", [
    ql.QuantConfig(), ql.QuantConfig(weight_symmetric=False), ql.QuantConfig(per_channel=False)],
    ids=["15 levels", "16 levels", "per tensor"])
def test_cost_is_what_weight_bytes_says(small, config):
    model, batches, stats = small
    errors = mixed.layer_errors(model, stats, batches, widths=(5, 3), config=config)
    options = mixed.weight_options(errors, mixed.layer_costs(model, batches[0], config))
    costs, widths = options.groupby("layer").cost, []
    for budget in (costs.min().sum(), costs.max().sum()):
        chosen = mixed.allocate(options, budget)
        qmodel = ql.quantize(model, stats, mixed.mixed_config(config, chosen))
        quantizers = 8 * len(qmodel.quantizer_nodes)  # a scale and a zero-point each
        assert ql.weight_bytes(qmodel) - quantizers == chosen.cost.sum() <= budget
        widths.append(chosen.weight_bits.tolist())
    assert widths == [[3] * 5, [5] * 5]


def brute_force(options, budget):
    groups = [list(g.itertuples(index=False)) for _, g in options.groupby("layer", sort=False)]
    feasible = [c for c in itertools.product(*groups) if sum(r.cost for r in c) <= budget]
    return min((sum(r.error for r in c) for c in feasible), default=None)


@pytest.mark.parametrize("seed", range(12))
def test_allocation_is_the_best_there_is(seed):
    """Five layers, four widths, errors over six orders of magnitude: every one of the 1,024
    allocations is tried.
    """
    random, names = np.random.default_rng(seed), [f"l{i}" for i in range(5)]
    options = pd.DataFrame([
        {"layer": name, "weight_bits": bits, "error": 10 ** random.uniform(-6, 0),
         "cost": int(random.integers(1, 10 ** random.integers(2, 9)))}
        for name in names for bits in (2, 3, 4, 8)])
    low, high = (int(options.groupby("layer").cost.agg(f).sum()) for f in ("min", "max"))
    for budget in (low, low + 1, *np.linspace(low, high, 7).astype(int).tolist(), high):
        chosen = mixed.allocate(options, budget)
        assert chosen.layer.tolist() == names
        assert chosen.cost.sum() <= budget
        assert chosen.error.sum() == pytest.approx(brute_force(options, budget), rel=1e-9)
    with pytest.raises(ql.UserError, match=f"narrowest widths offered need {low:,}"):
        mixed.allocate(options, low - 1)


def test_operations_are_allocated_for_weights_and_activations(small):
    model, batches, stats = small
    errors = mixed.layer_errors(model, stats, batches, widths=(4, 2))
    costs = mixed.layer_costs(model, batches[0])
    options = mixed.operation_options(errors, costs)
    assert len(options) == 2 + 4 * 4
    assert (options[options.layer == "a"].act_bits == 8).all()
    budget = int(costs.macs.sum() * 14)
    chosen = mixed.allocate(options, budget)
    assert chosen.error.sum() == pytest.approx(brute_force(options, budget), rel=1e-9)
    qmodel = ql.quantize(model, stats, mixed.mixed_config(ql.QuantConfig(), chosen))
    assert weight_widths(qmodel) == dict(zip(chosen.layer, chosen.weight_bits))
    assert read_widths(qmodel) == dict(zip(chosen.layer, chosen.act_bits))


def test_one_layer_at_a_time(resnet20, stats, digits):
    split, names = ql.limited(digits.heldout, 40), dict.fromkeys(ptq.layers(folded(resnet20)))
    frame = mixed.layer_accuracy(resnet20, stats, split, ql.QuantConfig(2, 3), ["conv1", "fc"])
    frame = frame.set_index(["layer", "case"])
    assert len(frame) == 4
    free = ql.QuantConfig(2, 3, residual_bits=None, layer_weight_bits=names | {"fc": 2},
                          layer_act_bits=names | {"fc": 3})
    bound = ql.QuantConfig(2, 3, layer_weight_bits={"fc": None}, layer_act_bits={"fc": None})
    for case, config in (("only this quantized", free), ("only this float", bound)):
        top1 = ql.evaluate(ql.quantize(resnet20, stats, config), split).top1
        assert frame.top1["fc", case] == top1
    assert (frame["all"] - frame["drop"]).to_numpy() == pytest.approx(frame.regained.to_numpy())
    assert (frame.regained_low <= frame.regained).all()
    assert (frame.regained <= frame.regained_high).all()
    drop = frame["drop"]["fc"]
    assert drop["only this float"] > drop["only this quantized"]


def test_needs_images_and_the_right_statistics(small, resnet20):
    model, batches, stats = small
    with pytest.raises(ql.UserError, match="at least one batch"):
        mixed.layer_errors(model, stats, [])
    with pytest.raises(ql.UserError, match="another network"):
        mixed.layer_errors(resnet20, stats, batches)


def segmentation():
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()


@torch.no_grad()
def test_classes_are_axis_1_of_what_a_segmentation_network_returns():
    model, x = segmentation(), torch.randn(8, 3, 10, 10)
    error = mixed.layer_errors(model, ql.collect(model, [x]), [x], widths=(2,)).error[0]
    exact = model(x).double()
    q = ptq.choose_weight_qparams(model[0].weight, 2, ql.QuantConfig())
    model[0].weight.copy_(ql.fake_quantize(model[0].weight, q))
    p, log_q = exact.softmax(1), model(x).double().log_softmax(1)
    by_hand = (p * (exact.log_softmax(1) - log_q)).sum(1).mean().item()
    assert error == pytest.approx(by_hand, rel=1e-4)


def test_a_layer_that_reads_float_is_in_the_table_and_in_the_budget():
    model, x = segmentation(), torch.randn(4, 3, 8, 8)
    stats, costs = ql.collect(model, [x]), mixed.layer_costs(model, x)
    config = ql.QuantConfig(input_bits=None)
    errors = mixed.layer_errors(model, stats, [x], widths=(8, 4), config=config)
    options = mixed.operation_options(errors, costs)
    chosen = mixed.allocate(options, math.inf)
    assert chosen.layer.tolist() == costs.layer.tolist()
    assert chosen.weight_bits.tolist() == [8, 8] and chosen.act_bits.tolist() == [32, 8]
    assert chosen.cost.tolist() == (costs.macs * 8 * chosen.act_bits).tolist()
    qmodel = ql.quantize(model, stats, mixed.mixed_config(ql.QuantConfig(), chosen))
    assert qmodel.reads("_0") is None and qmodel.reads("_2").bits == 8
    with pytest.raises(ql.UserError, match="no allocation meets"):
        mixed.allocate(options, math.nan)
