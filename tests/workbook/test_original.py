"""The original experiment: what is arithmetic about its observers, and its places and codes."""

import ast
import bisect
import dataclasses
import functools

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import CHECKOUT, read_text

import quantlab as ql
from quantlab import ptq
from quantlab.calibration import collect_edges
from quantlab.edgestats import EdgeStats
from quantlab.graph import find_kinds, folded, normalize, trace
from quantlab.plan import Plan, make_plan
from quantlab.workbook import results, tables

SHOWN = {
    "squared_error", "greedy_search", "narrower", "Running", "smallest", "range_of", "hist",
    "fake_hist", "follow", "batchnorms", "training_pass", "original_places", "float_graph",
    "signed",
}


@pytest.fixture(scope="module")
def notebook(resnet20):
    """The functions and classes that notebook 10 shows, as they stand in its source."""
    tree = ast.parse(read_text(CHECKOUT / "notebooks" / "10_original_experiment.py"))
    tree.body = [node for node in tree.body if getattr(node, "name", None) in SHOWN]
    names = dict(
        np=np, torch=torch, bisect=bisect, dataclasses=dataclasses, functools=functools, ql=ql,
        Plan=Plan, make_plan=make_plan, find_kinds=find_kinds, folded=folded, trace=trace,
        normalize=normalize, network=resnet20, device=torch.device("cpu"))
    exec(compile(tree, "notebook 10", "exec"), names)
    assert set(names) >= SHOWN
    return names


def samples():
    g = torch.Generator().manual_seed(3)
    normal = torch.randn(4000, generator=g)
    outlier = torch.cat([normal, torch.tensor([40.0])])
    return [normal, normal.relu(), normal.exp(), outlier, -normal.abs()]


# ---- Its observers -------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [3, 4, 8, 256])
def test_search_is_the_greedy_one_of_the_description(notebook, levels):
    """Against the same walk with plain loops over bins and values."""
    bins, step = 128, 1e-3
    for x in samples():
        counts = torch.histc(x, bins).double().numpy()
        low, total = x.min().item(), counts.sum()
        width = (x.max() - x.min()).item() / bins
        below = np.cumsum(counts)

        def error(first, last, counts=counts):
            group_width, sum_ = (last - first + 1) / levels, 0.0
            for i, count in enumerate(counts):
                group = min(max((i + 0.5 - first) // group_width, 0), levels - 1)
                sum_ += count * (i + 0.5 - first - (group + 0.5) * group_width) ** 2
            return sum_

        first, last, alpha, beta, least = 0, bins - 1, 0.0, 1.0, float("inf")
        while alpha < beta:
            left, right = first, last
            while left < last and below[left] < (alpha + step) * total:
                left += 1
            while right > first and below[right] > (beta - step) * total:
                right -= 1
            if left - first > last - right:
                new, alpha = (left, last), alpha + step
            else:
                new, beta = (first, right), beta - step
            if new == (first, last):
                continue
            if error(*new) > least:
                break
            (first, last), least = new, error(*new)
        found = notebook["greedy_search"](x, levels, bins, step)
        expected = low + width * first, low + width * (last + 1)
        assert found == pytest.approx(expected, abs=1.01 * width), "one bin: a tie of two sums"
        ours = notebook["squared_error"](counts, first, last, levels)
        assert ours == pytest.approx(error(first, last))


@pytest.mark.parametrize("levels", [3, 4, 8, 16])
def test_hist_is_minmax_whatever_the_search_proposes(notebook, levels):
    """The whole range of a batch enters a running minimum and maximum first, then the proposal."""
    low, high, narrowed = float("inf"), -float("inf"), 0
    running, seen = notebook["hist"](), []
    for x in samples():
        seen.append(x)
        low, high = min(low, x.min().item()), max(high, x.max().item())
        proposed = notebook["greedy_search"](x, levels, bins=256, step=1e-4)
        narrowed += proposed[1] - proposed[0] < 0.9 * (x.max() - x.min()).item()
        low, high = min(low, proposed[0]), max(high, proposed[1])
        everything = torch.cat(seen)
        whole = everything.min().item(), everything.max().item()
        assert (low, high) == pytest.approx(whole, rel=1e-5)
        assert running(x, 4, True) == whole
    assert narrowed, "the search itself does narrow, in vain"


def test_fake_hist_is_an_order_statistic_and_an_average(notebook):
    g = torch.Generator().manual_seed(1)
    batches = [torch.randn(7, 1003, generator=g) * scale for scale in (1.0, 3.0, 0.2, 5.0)]
    running, expected = notebook["fake_hist"](), None
    for x in batches:
        now = sorted(x.abs().flatten().tolist())[int(0.9999 * x.numel()) - 1]
        expected = now if expected is None else 0.9 * expected + 0.1 * now
        low, high = running(x, 4, True)
        assert low == 0 and high == pytest.approx(expected, rel=1e-6)


def its_way(notebook, resnet20, batches, fold=False, **settings):
    """The original's network: its places, signed symmetric codes, one scale a tensor."""
    graph = notebook["float_graph"](fold)
    plan = notebook["original_places"](graph)
    edges, _ = collect_edges(graph, plan.observed, batches)
    config = ql.QuantConfig(4, 4, per_channel=False, act_symmetric=True, **settings)
    return ptq.quantize_graph(graph, plan, notebook["signed"](edges), config)


def test_training_pass_sets_ranges_and_moves_batchnorm(notebook, resnet20, digits):
    qmodel = its_way(notebook, resnet20, digits.calibration(16, 5), observer="minmax")
    batches = list(digits.calibration(24, 1, batch_size=8))
    notebook["training_pass"](qmodel, batches, notebook["hist"])
    first = qmodel.get_submodule("quantizers.x_4bit").qparams
    largest = max(b.abs().max().item() for b in batches)
    assert first.scale.item() == pytest.approx(largest / 7) and (first.qmin, first.qmax) == (-7, 7)
    weight = qmodel.conv1.weight
    moments = [
        torch.nn.functional.conv2d(ql.fake_quantize(b, first), weight, padding=1) for b in batches]
    trained = resnet20.bn1.running_mean
    assert not qmodel.training and not torch.allclose(qmodel.bn1.running_mean, trained)
    notebook["training_pass"](_reset(qmodel), batches, momentum=None)
    expected = torch.stack([m.mean((0, 2, 3)) for m in moments]).mean(0)
    assert torch.allclose(qmodel.bn1.running_mean, expected, atol=1e-4)


def _reset(qmodel):
    for module in qmodel.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.reset_running_stats()
    return qmodel


# ---- Its places, and folding as a decision of its own --------------------------------------------


def test_resnet50_has_the_originals_104_quantizers(notebook):
    plan = notebook["original_places"](trace(ql.load_model("resnet50")))
    assert len(plan.reads) == 104 and plan.stores == {}


def test_unfolded_stores_as_many_values_behind_the_same_operations(notebook):
    with_batchnorm = notebook["float_graph"](fold=False)
    plan, unfolded = make_plan(notebook["float_graph"](fold=True)), make_plan(with_batchnorm)
    kinds = {node.name: kind for node, kind in find_kinds(with_batchnorm).items()}
    assert sorted(plan.stores.values()) == sorted(unfolded.stores.values())
    stored = [name for name in unfolded.stores if kinds[name] == "compute"]
    assert not stored, "a layer's sum is not stored in front of its BatchNorm"
    assert set(unfolded.floats) == {name for name, kind in kinds.items() if kind == "batchnorm"}
    assert not plan.floats


def test_its_places_are_those_in_front_of_layers_relus_and_pools(notebook):
    graph = notebook["float_graph"](fold=True)
    kinds = {n.name: kind for n, kind in find_kinds(graph).items()}
    assert "batchnorm" not in kinds.values()
    readers = {name for name, kind in kinds.items() if kind in ("compute", "clamp", "average")}
    plan = notebook["original_places"](graph)
    assert set(plan.reads) == readers and not plan.stores


def quantized(graph, images):
    plan = make_plan(graph)
    edges, _ = collect_edges(graph, plan.observed, images)
    config = ql.QuantConfig(weight_bits=4, weight_observer="minmax", observer="minmax")
    return ptq.quantize_graph(graph, plan, edges, config)


def test_per_channel_folding_changes_only_the_rounding_of_biases(notebook, digits):
    """A channel's factor gamma / sigma goes into its scale: the codes are the same, and the outputs
    as close as rounded biases allow."""
    images = digits.calibration(32, 0)
    ours, unfolded = (quantized(notebook["float_graph"](fold), images) for fold in (True, False))
    for name in [name for name in ours.layers if name != "fc"]:
        a, b = ours.codes(name), unfolded.codes(name)
        sign = torch.sign(a.flatten(1).sum(1) * b.flatten(1).sum(1)).view(-1, 1, 1, 1)
        mirrored = torch.where(sign < 0, -1, 1)  # by a negative gamma
        assert ((a - b * mirrored).abs() > 0).float().mean() < 0.002, name
    batch = next(iter(images))
    with torch.no_grad():
        a, b = ours(batch), unfolded(batch)
    assert (a - b).abs().mean() < 0.02 * a.std()


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_search_knows_that_half_of_signed_codes_are_of_no_use(notebook, bits):
    """The range chosen for an edge that is never negative has the least error among ranges for
    signed codes, by brute force."""
    x = torch.randn(5000, generator=torch.Generator().manual_seed(2)).relu()
    edge = notebook["signed"]({"it": EdgeStats().update(x)})["it"]
    q = ptq.choose_edge_qparams(edge, bits, ql.QuantConfig(act_symmetric=True))
    assert (q.qmin, q.qmax) == (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1)

    def error(scale):
        rounded = (x / scale).round().clamp(q.qmin, q.qmax) * scale
        return (rounded - x).square().mean().item()

    fractions = torch.linspace(0.05, 1, 400).tolist()
    best = min(error(fraction * x.max().item() / q.qmax) for fraction in fractions)
    assert error(q.scale.item()) <= 1.01 * best


# ---- Its rows ------------------------------------------------------------------------------------


def test_steps_of_a_study_stay_out_of_the_headline(digits, resnet20):
    card = ql.load_card(CHECKOUT / "checkpoint" / "resnet20-digits.safetensors")
    baseline = ql.evaluate(resnet20, digits.test, limit=50)
    common = dict(
        data=digits, model="resnet20", card=card, baseline=baseline, result=baseline,
        notebook="10_original_experiment", config=ql.QuantConfig(4, 4))
    names = [
        ("original", "4bit hist"), ("original", "8bit hist"), ("ablation", "W4A4 ladder: a step"),
        ("by hand", "")]
    rows = [results.make_row(**common, method=m, corrections=c) for m, c in names]
    table = tables.headline(pd.DataFrame(rows))
    ours = "W4A4 histogram, weights lp(p=3)"
    assert list(table.Quantization) == ["original: 4bit hist", "original: 8bit hist", ours]
