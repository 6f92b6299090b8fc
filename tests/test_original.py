"""The original experiment: what is arithmetic about its observers, and folding as a decision of its own."""

import ast
import bisect
import functools

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import CHECKOUT, read_text

import quantlab as ql
from quantlab import ptq
from quantlab.analysis import sensitivity
from quantlab.edgestats import EdgeStats
from quantlab.graph import find_kinds
from quantlab.workbook import results, tables


@pytest.fixture(scope="module")
def notebook():
    """The functions and classes that notebook 10 shows, as they stand in its source."""
    tree = ast.parse(read_text(CHECKOUT / "notebooks" / "10_original_experiment.py"))
    functions = {"squared_error", "greedy_search", "Running", "hist", "fake_hist", "follow", "training_pass"}
    tree.body = [node for node in tree.body if getattr(node, "name", None) in functions]
    names = {"np": np, "torch": torch, "bisect": bisect, "ql": ql, "ptq": ptq, "functools": functools}
    exec(compile(tree, "notebook 10", "exec"), names)
    assert functions <= set(names)
    return names


def samples():
    g = torch.Generator().manual_seed(3)
    normal = torch.randn(4000, generator=g)
    return [normal, normal.relu(), normal.exp(), torch.cat([normal, torch.tensor([40.0])]), -normal.abs()]


# ---- Its observers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [3, 4, 8, 256])
def test_search_is_the_greedy_one_of_the_description(notebook, levels):
    """Against the same walk with plain loops over bins and values."""
    bins, step = 128, 1e-3
    for x in samples():
        counts = torch.histc(x, bins).double().numpy()
        low, width, total = x.min().item(), (x.max() - x.min()).item() / bins, counts.sum()
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
        assert found == pytest.approx((low + width * first, low + width * (last + 1)), abs=1.01 * width), "one bin: a tie of two sums"
        assert notebook["squared_error"](counts, first, last, levels) == pytest.approx(error(first, last))


@pytest.mark.parametrize("levels", [3, 4, 8, 16])
def test_hist_is_minmax_whatever_the_search_proposes(notebook, levels):
    """The whole range of a batch enters a running minimum and maximum first, then the proposal: after every batch it is the minimum and maximum."""
    low, high, narrowed = float("inf"), -float("inf"), 0
    running, seen = notebook["hist"](), []
    for x in samples():
        seen.append(x)
        low, high = min(low, x.min().item()), max(high, x.max().item())
        proposed = notebook["greedy_search"](x, levels, bins=256, step=1e-4)
        narrowed += proposed[1] - proposed[0] < 0.9 * (x.max() - x.min()).item()
        low, high = min(low, proposed[0]), max(high, proposed[1])
        everything = torch.cat(seen)
        assert (low, high) == pytest.approx((everything.min().item(), everything.max().item()), rel=1e-5)
        assert running(x, 4, True) == (everything.min().item(), everything.max().item())
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


def test_training_pass_sets_ranges_and_moves_batchnorm(notebook, resnet20, digits):
    settings = dict(weight_bits=4, act_bits=4, placement="inputs", per_channel=False, act_symmetric=True, act_signed=True, observer="minmax")
    qmodel = ql.quantize(resnet20, ql.collect(resnet20, digits.calibration(16, 5), "inputs"), ql.QuantConfig(**settings))
    batches = list(digits.calibration(24, 1, batch_size=8))
    notebook["training_pass"](qmodel, batches, notebook["hist"])
    first = qmodel.get_submodule("quantizers.x_4bit").qparams
    assert first.scale.item() == pytest.approx(max(b.abs().max().item() for b in batches) / 7) and (first.qmin, first.qmax) == (-7, 7)
    weight = qmodel.conv1.weight
    moments = [torch.nn.functional.conv2d(ql.fake_quantize(b, first), weight, padding=1) for b in batches]
    assert not qmodel.training and not torch.allclose(qmodel.bn1.running_mean, resnet20.bn1.running_mean)
    notebook["training_pass"](_reset(qmodel), batches, momentum=None)
    expected = torch.stack([m.mean((0, 2, 3)) for m in moments]).mean(0)
    assert torch.allclose(qmodel.bn1.running_mean, expected, atol=1e-4)


def _reset(qmodel):
    for module in qmodel.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.reset_running_stats()
    return qmodel


# ---- Folding as a decision of its own ---------------------------------------------------------------------------------------


def test_unfolded_stores_as_many_values_behind_the_same_operations(resnet20):
    _, folded, _ = ptq.prepare(resnet20)
    graph, unfolded, _ = ptq.prepare(resnet20, fold_batchnorm=False)
    kinds = {node.name: kind for node, kind in find_kinds(graph).items()}
    assert sorted(folded.stores.values()) == sorted(unfolded.stores.values())
    assert not [name for name in unfolded.stores if kinds[name] == "compute"], "a layer's sum is not stored in front of its BatchNorm"
    assert set(unfolded.floats) == {name for name, kind in kinds.items() if kind == "batchnorm"} and not folded.floats


def test_inputs_can_be_folded(resnet20):
    graph, plan, _ = ptq.prepare(resnet20, "inputs", fold_batchnorm=True)
    kinds = find_kinds(graph)
    assert "batchnorm" not in kinds.values()
    assert set(plan.reads) == {n.name for n, kind in kinds.items() if kind in ("compute", "clamp", "average")} and not plan.stores


def test_per_channel_folding_changes_only_the_rounding_of_biases(resnet20, digits):
    """A channel's factor gamma / sigma goes into its scale: the codes are the same, and the outputs as close as rounded biases allow."""
    images, models = digits.calibration(32, 0), {}
    for fold in (True, False):
        stats = ql.collect(resnet20, images, fold_batchnorm=fold)
        config = ql.QuantConfig(weight_bits=4, weight_observer="minmax", observer="minmax", fold_batchnorm=fold)
        models[fold] = ql.quantize(resnet20, stats, config)
    for name, layer in models[True].named_modules():
        if isinstance(layer, torch.nn.Conv2d):
            other = models[False].get_submodule(name)
            codes = [ql.quantize_tensor(m.weight, m.weight_qparams) for m in (layer, other)]
            sign = torch.sign(codes[0].flatten(1).sum(1) * codes[1].flatten(1).sum(1)).view(-1, 1, 1, 1)  # a negative gamma mirrors the codes
            assert ((codes[0] - codes[1] * torch.where(sign < 0, -1, 1)).abs() > 0).float().mean() < 0.002, name
    batch = next(iter(images))
    with torch.no_grad():
        a, b = models[True](batch), models[False](batch)
    assert (a - b).abs().mean() < 0.02 * a.std()


def test_statistics_of_the_other_folding_are_refused(resnet20, digits):
    stats = ql.collect(resnet20, digits.calibration(16, 0))
    config = ql.QuantConfig(fold_batchnorm=False)
    with pytest.raises(ql.UserError, match=r"another network; run collect\(model, batches, placement='fused', fold_batchnorm=False\)"):
        ql.quantize(resnet20, stats, config)
    unfolded = ql.collect(resnet20, digits.calibration(16, 0), fold_batchnorm=False)
    report = sensitivity.edge_errors(resnet20, ql.quantize(resnet20, unfolded, config), digits.calibration(16, 1))
    assert report.sqnr.min() > 15


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_search_knows_that_half_of_signed_codes_are_of_no_use(bits):
    """The range chosen for an edge that is never negative has the least error among ranges for signed codes, by brute force."""
    x = torch.randn(5000, generator=torch.Generator().manual_seed(2)).relu()
    config = ql.QuantConfig(act_symmetric=True, act_signed=True)
    q = ptq.choose_edge_qparams(EdgeStats().update(x), bits, config)
    assert (q.qmin, q.qmax) == (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1)

    def error(scale):
        return ((x / scale).round().clamp(q.qmin, q.qmax) * scale - x).square().mean().item()

    best = min(error(share * x.max().item() / q.qmax) for share in torch.linspace(0.05, 1, 400).tolist())
    assert error(q.scale.item()) <= 1.01 * best


# ---- Its rows ---------------------------------------------------------------------------------------------------------------


def test_steps_of_a_study_stay_out_of_the_headline(digits, resnet20):
    card = ql.load_card(CHECKOUT / "checkpoint" / "resnet20-digits.safetensors")
    baseline = ql.evaluate(resnet20, digits.test, limit=50)
    common = dict(data=digits, model="resnet20", card=card, baseline=baseline, result=baseline, notebook="10_original_experiment")
    names = [("original", "4bit hist"), ("original", "8bit hist"), ("ablation", "W4A4 ladder: a step"), ("by hand", "")]
    rows = [results.make_row(**common, method=m, corrections=c, config=ql.QuantConfig(4, 4)) for m, c in names]
    table = tables.headline(pd.DataFrame(rows))
    assert list(table.Quantization) == ["original: 4bit hist", "original: 8bit hist", "W4A4 histogram, weights lp(p=3)"]
