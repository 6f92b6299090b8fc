"""Mixed precision: widths reach their layers, errors equal those of the quantized network, allocations equal brute force."""

import dataclasses
import itertools
import json

import numpy as np
import pandas as pd
import pytest
import torch
from test_results import some_row
from torch import nn

import quantlab as ql
from quantlab import ptq
from quantlab.analysis import mixed
from quantlab.workbook import results


@pytest.fixture(scope="module")
def small():
    """A residual network of five layers, its calibration batches and their statistics."""

    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
            self.d, self.fc = nn.Conv2d(8, 12, 3, stride=2, groups=4), nn.Linear(12, 5)

        def forward(self, x):
            x = self.a(x).relu()
            x = (x + self.c(self.b(x).relu())).relu()
            return self.fc(self.d(x).relu().mean((2, 3)))

    torch.manual_seed(0)
    model, batches = Small().eval(), [torch.randn(8, 3, 9, 9) for _ in range(2)]
    return model, batches, ql.collect(model, batches)


NAMES = ["a", "b", "c", "d", "fc"]


def quantizer_in_front(qmodel, layer):
    node = ptq.find_node(qmodel, layer).args[0]
    module = qmodel.get_submodule(node.target) if node.op == "call_module" else None
    return module.qparams.bits if isinstance(module, ptq.Quantizer) else None


def test_every_layer_has_its_own_widths(small):
    model, batches, stats = small
    weights, acts = {"a": 3, "b": None, "fc": 7}, {"b": 2, "c": None, "d": 8}
    qmodel = ql.quantize(model, stats, ql.QuantConfig(4, 5, layer_weight_bits=weights, layer_act_bits=acts))
    found = {n: getattr(qmodel.get_submodule(n), "weight_qparams", None) for n in NAMES}
    assert {n: q and q.bits for n, q in found.items()} == {"a": 3, "b": None, "c": 4, "d": 4, "fc": 7}
    assert torch.equal(qmodel.b.weight, model.b.weight) and torch.equal(qmodel.b.bias, model.b.bias)
    assert {n: quantizer_in_front(qmodel, n) for n in NAMES} == {"a": 8, "b": 2, "c": None, "d": 8, "fc": 5}
    assert qmodel.quantizers.relu_3.qparams.bits == 5, "an average pool reads it, and no layer"
    assert ql.quantize(model, stats, ql.QuantConfig(4, 5, layer_act_bits={"relu_3": 3})).quantizers.relu_3.qparams.bits == 3


def test_all_float_is_the_float_network(small):
    model, batches, stats = small
    config = ql.QuantConfig(2, 2, residual_bits=None, input_bits=None, layer_weight_bits=dict.fromkeys(NAMES), layer_act_bits=dict.fromkeys([*NAMES, "relu_3"]))
    qmodel = ql.quantize(model, stats, config)
    assert not [m for m in qmodel.modules() if isinstance(m, ptq.Quantizer)]
    with torch.no_grad():
        assert torch.equal(qmodel(batches[0]), model(batches[0]))


def test_float_image_and_low_image(small):
    model, batches, stats = small
    for bits in (None, 3):
        assert quantizer_in_front(ql.quantize(model, stats, ql.QuantConfig(4, 4, input_bits=bits)), "a") == bits


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
    table = mixed.layer_errors(model, stats, batches, widths=(4, 2)).set_index(["layer", "kind", "bits"]).error
    assert len(table) == 2 * 5 + 1 + 2 * 4 and table.index.is_unique
    x = torch.cat(batches)
    free = ql.QuantConfig(residual_bits=None, input_bits=None, layer_weight_bits=dict.fromkeys(NAMES), layer_act_bits=dict.fromkeys([*NAMES, "relu_3"]))
    for layer, kind, bits in table.index:
        field = f"layer_{'weight' if kind == 'weight' else 'act'}_bits"
        qmodel = ql.quantize(model, stats, dataclasses.replace(free, **{field: getattr(free, field) | {layer: bits}}))
        with torch.no_grad():
            p, q = model(x).double().softmax(-1), qmodel(x).double().softmax(-1)
        divergence = (p * (p / q).log()).sum(-1).mean().item()
        assert table[layer, kind, bits] == pytest.approx(divergence, rel=1e-3, abs=1e-12), (layer, kind, bits)
    fewer = mixed.layer_errors(model, stats, batches, widths=(2,)).error
    assert (fewer > 0).all(), "the graph was left as it was between two layers"


def test_costs_are_counted_by_hand(small):
    model, batches, _ = small
    costs = mixed.layer_costs(model, batches[0]).set_index("layer")
    assert costs.loc["a"].tolist() == [3 * 8 * 9, 16, 3 * 81, 81 * 8 * 27]
    assert costs.loc["d"].tolist() == [12 * 2 * 9, 24, 8 * 81, 16 * 12 * 2 * 9]
    assert costs.loc["fc"].tolist() == [60, 10, 12, 60]


def test_cost_is_what_weight_bytes_says(small):
    model, batches, stats = small
    errors, costs = mixed.layer_errors(model, stats, batches, widths=(5, 3)), mixed.layer_costs(model, batches[0])
    options = mixed.weight_options(errors, costs)
    sizes = []
    for budget in (options.groupby("layer").cost.min().sum(), options.groupby("layer").cost.max().sum()):
        chosen = mixed.allocate(options, budget)
        qmodel = ql.quantize(model, stats, mixed.mixed_config(ql.QuantConfig(), chosen))
        quantizers = sum(8 for m in qmodel.modules() if isinstance(m, ptq.Quantizer))  # a scale and a zero-point each
        assert ql.weight_bytes(qmodel) - quantizers == chosen.cost.sum() <= budget
        sizes.append(chosen.weight_bits.tolist())
    assert sizes == [[3] * 5, [5] * 5]


def brute_force(options, budget):
    groups = [list(g.itertuples(index=False)) for _, g in options.groupby("layer", sort=False)]
    feasible = [c for c in itertools.product(*groups) if sum(r.cost for r in c) <= budget]
    return min((sum(r.error for r in c) for c in feasible), default=None)


@pytest.mark.parametrize("seed", range(12))
def test_allocation_is_the_best_there_is(seed):
    """Five layers, four widths, errors over six orders of magnitude: every one of the 1,024 allocations is tried."""
    random = np.random.default_rng(seed)
    options = pd.DataFrame([
        {"layer": f"l{i}", "weight_bits": bits, "error": 10 ** random.uniform(-6, 0), "cost": int(random.integers(1, 10 ** random.integers(2, 9)))}
        for i in range(5) for bits in (2, 3, 4, 8)
    ])
    least, most = (int(options.groupby("layer").cost.agg(f).sum()) for f in ("min", "max"))
    for budget in (least, least + 1, *np.linspace(least, most, 7).astype(int).tolist(), most):
        chosen = mixed.allocate(options, budget)
        assert chosen.layer.tolist() == [f"l{i}" for i in range(5)] and chosen.cost.sum() <= budget
        assert chosen.error.sum() == pytest.approx(brute_force(options, budget), rel=1e-9)
    with pytest.raises(ql.UserError, match=f"narrowest widths offered need {least:,}"):
        mixed.allocate(options, least - 1)


def test_operations_are_allocated_for_weights_and_activations(small):
    model, batches, stats = small
    errors, costs = mixed.layer_errors(model, stats, batches, widths=(4, 2)), mixed.layer_costs(model, batches[0])
    options = mixed.operation_options(errors, costs)
    assert len(options) == 2 + 4 * 4 and (options[options.layer == "a"].act_bits == 8).all()
    budget = int(costs.macs.sum() * 14)
    chosen = mixed.allocate(options, budget)
    assert chosen.error.sum() == pytest.approx(brute_force(options, budget), rel=1e-9)
    config = mixed.mixed_config(ql.QuantConfig(), chosen)
    qmodel = ql.quantize(model, stats, config)
    for row in chosen.itertuples():
        assert qmodel.get_submodule(row.layer).weight_qparams.bits == row.weight_bits
        assert quantizer_in_front(qmodel, row.layer) == row.act_bits
    acts = mixed.activation_options(errors, costs)
    assert acts[acts.layer == "d"].cost.tolist() == [8 * 81 // 2, 8 * 81 // 4]


def test_one_layer_at_a_time(resnet20, stats, digits):
    split = ql.limited(digits.heldout, 40)
    config = ql.QuantConfig(2, 3)
    frame = mixed.layer_accuracy(resnet20, stats, split, config, ["conv1", "fc"]).set_index(["layer", "case"])
    assert len(frame) == 4
    names = ptq.layers(*ptq.prepare(resnet20)[:2])
    free = ql.QuantConfig(2, 3, residual_bits=None, layer_weight_bits=dict.fromkeys(names) | {"fc": 2}, layer_act_bits=dict.fromkeys(names) | {"fc": 3})
    assert frame.top1["fc", "only this quantized"] == ql.evaluate(ql.quantize(resnet20, stats, free), split).top1
    bound = ql.QuantConfig(2, 3, layer_weight_bits={"fc": None}, layer_act_bits={"fc": None})
    assert frame.top1["fc", "only this float"] == ql.evaluate(ql.quantize(resnet20, stats, bound), split).top1
    assert frame["drop"]["fc", "only this float"] > frame["drop"]["fc", "only this quantized"]


def test_needs_images_and_the_right_statistics(small, resnet20):
    model, batches, stats = small
    with pytest.raises(ql.UserError, match="at least one batch"):
        mixed.layer_errors(model, stats, [])
    with pytest.raises(ql.UserError, match="another network"):
        mixed.layer_errors(resnet20, stats, batches)


def test_a_finished_row_is_not_measured_again(workbook, digits):
    calls = []

    def measure(state):
        calls.append(state)
        assert not state.exists()
        state.parent.mkdir(parents=True, exist_ok=True)
        state.write_bytes(b"half of it")
        return some_row(digits)

    first = results.once({"bits": 4}, measure)
    assert not calls[0].exists() and results.load().created.tolist() == [first["created"]]
    again = results.once({"bits": 4}, measure)
    assert again == json.loads(json.dumps(first)) and len(calls) == 1 and len(results.load()) == 1
    results.local_path().unlink()
    results.once({"bits": 4}, measure)
    assert len(calls) == 1 and len(results.load()) == 1, "recorded again where results.csv was moved away"
    results.once({"bits": 3}, measure)
    assert len(calls) == 2 and calls[0] != calls[1]


def test_a_killed_measurement_finds_its_state(workbook, digits):
    def killed(state):
        state.parent.mkdir(parents=True, exist_ok=True)
        state.write_bytes(b"half of it")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        results.once({"bits": 4}, killed)
    assert not len(results.load())
    results.once({"bits": 4}, lambda state: some_row(digits) if state.read_bytes() == b"half of it" else None)
    assert len(results.load()) == 1


def test_corrected_rows_have_a_label_of_their_own(digits):
    rows = [some_row(digits), some_row(digits, config=ql.QuantConfig(4, 4, residual_bits=None, input_bits=4, first_last_bits=8), corrections="QDrop")]
    rows.append(some_row(digits, weight_bits=None, corrections="mixed precision, 80 kB"))
    labels = [results.label(pd.Series(row)) for row in rows]
    assert labels == ["W4A4 histogram, weights lp(p=3)", "W4A4 histogram, weights lp(p=3), first/last 8, residual float, input 4, QDrop",
                      "W*A4 histogram, weights lp(p=3), mixed precision, 80 kB"]
    swept = [some_row(digits, config=ql.QuantConfig(b, b)) for b in (4, 3)] + [some_row(digits, config=ql.QuantConfig(2, 2), corrections="QDrop")]
    frame = pd.DataFrame([*swept, some_row(digits, config=ql.QuantConfig(2, 2, residual_bits=None))])
    assert results.equal_widths(frame).index.tolist() == [0, 1]
