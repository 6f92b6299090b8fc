"""The search for the cheapest network: the loss decides, proxies only say what to try, and what was
tried is not tried again.
"""

import itertools
import json

import pytest
import torch
from torch import nn

import quantlab as ql
from quantlab.__main__ import main
from quantlab.analysis import mixed
from quantlab.analysis import search as searching
from quantlab.analysis.search import search
from quantlab.images.datasets import Split

WIDTHS = (8, 4, 2)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        return self.fc(self.b(self.a(x).relu()).relu().mean((2, 3)))


@pytest.fixture(scope="module")
def task():
    """(network, statistics, batches, images whose labels are the network's own answers)."""
    torch.manual_seed(0)
    model, pixels = Net().eval(), torch.randint(0, 256, (200, 3, 10, 10)).byte()
    nn.init.normal_(model.fc.weight)
    split = Split(pixels, torch.zeros(200).long(), (0.5,) * 3, (0.1,) * 3)
    with torch.no_grad():
        split.labels.copy_(model(split.normalize(pixels)).argmax(1))
    batches = [split.normalize(pixels[:64])]
    return model, ql.collect(model, batches), batches, split


@pytest.mark.parametrize("cost", searching.COSTS)
def test_no_cheaper_allocation_that_the_proxies_propose_meets_the_loss(task, cost):
    model, stats, batches, split = task
    name, config = next(iter(searching.CONFIGS.items()))
    lose, one = 10.0, {name: config}
    found = search(*task, lose, cost, configs=one, widths=WIDTHS, rounds=20, verbose=False)
    errors = mixed.layer_errors(model, stats, batches, WIDTHS, config)
    options = searching.COSTS[cost](errors, mixed.layer_costs(model, batches[0], config))
    exact = ql.evaluate(model, split)

    def lost(chosen):
        qmodel = ql.quantize(model, stats, mixed.mixed_config(config, chosen))
        return ql.paired_drop(exact.correct, ql.evaluate(qmodel, split).correct)

    assert lost(found.chosen) == (found.lost, found.low, found.high)
    assert ql.evaluate(found.qmodel, split).n == 200 and found.lost <= lose
    assert found.chosen.cost.sum() == found.cost
    each = [list(part.index) for _, part in options.groupby("layer")]
    costs = {int(options.loc[list(c)].cost.sum()) for c in itertools.product(*each)}
    cheaper = [mixed.allocate(options, c) for c in costs if c < found.cost / searching.CLOSE]
    near = [c for c in cheaper if c.cost.sum() > found.cost * 0.8]
    assert all(lost(chosen)[0] > lose for chosen in near)


def test_uniform_networks_stand_beside_it_and_reasons_name_layers(task):
    found = search(*task, 5.0, widths=WIDTHS, verbose=False)
    uniform = found.tried[found.tried.stage == "uniform"]
    sizes = [ql.weight_bytes(ql.quantize(task[0], task[1], ql.QuantConfig(b, 8))) for b in WIDTHS]
    # scales and zero-points of activations are no weights
    assert [s - c for s, c in zip(sizes, uniform.cost)] == [sizes[0] - uniform.cost.iloc[0]] * 3
    assert f"{found.cost:,} bytes of weights" in found.reasons and "5 were allowed" in found.reasons
    assert found.qmodel.config.layer_weight_bits == dict(
        zip(found.chosen.layer, found.chosen.weight_bits))


def test_what_was_evaluated_is_not_evaluated_again(task, monkeypatch):
    memory = {}
    first = search(*task, 5.0, widths=WIDTHS, memory=memory, verbose=False)
    calls = []
    monkeypatch.setattr(searching, "evaluate", lambda *a, **k: calls.append(a) or ql.evaluate(*a))
    again = search(*task, 5.0, widths=WIDTHS, memory=json.loads(json.dumps(memory)), verbose=False)
    assert len(calls) == 1, "the float network"
    assert again.tried.equals(first.tried) and again.reasons == first.reasons
    for name, layer in again.qmodel.layers.items():
        assert torch.equal(layer.weight, first.qmodel.layers[name].weight)


def test_learned_networks_are_tried_below_the_cheapest_that_nearest_reaches(task):
    model, stats, *_ = task
    asked = []

    def learn(config):  # as good as float, whatever the widths
        asked.append(config)
        qmodel = ql.quantize(model, stats, config)
        for name, layer in qmodel.layers.items():
            layer.weight.data.copy_(dict(model.named_modules())[name].weight)
        return qmodel

    nearest = search(*task, 0.0, widths=WIDTHS, verbose=False)
    found = search(*task, 0.0, learn=learn, widths=WIDTHS, verbose=False)
    learned = found.tried[found.tried.stage == "learned"]
    assert 0 < len(learned) == len(asked) <= 3 and (learned.cost < nearest.cost).all()
    assert found.cost <= nearest.cost


def test_where_nearest_rounding_reaches_nothing_learning_starts_from_the_dearest(task):
    """Of one width, so that there is one allocation; nearest rounding loses some of it, what is
    learned nothing.
    """
    model, stats, *_ = task
    eight = ql.quantize(model, stats, ql.QuantConfig(8, 8))
    found = search(*task, 0.0, widths=(2,), verbose=False, learn=lambda config: eight)
    assert found.tried.stage.tolist() == ["uniform", "nearest", "learned"]
    assert found.tried.lost[1] > 0 >= found.lost and found.cost == found.tried.cost[1]


def test_a_loss_that_nothing_meets_names_the_nearest(task):
    with pytest.raises(ql.UserError, match=r"loses at most -1 points; the nearest loses 0\.00 and"):
        search(*task, -1.0, widths=(8,), verbose=False)
    with pytest.raises(ql.UserError, match="cost 'byte' is unknown; did you mean bytes"):
        search(*task, cost="byte")


def test_the_command_writes_network_figure_and_text(workbook, capsys, monkeypatch):
    monkeypatch.setattr(searching, "WIDTHS", (8, 2))
    monkeypatch.setattr(searching, "CONFIGS", {"2^b levels": ql.QuantConfig()})
    out = workbook / "small.safetensors"
    search_digits = ["search", "resnet20", "--data", "digits", "--limit", "30", "-n", "32",
                     "--lose", "20", "--out", str(out)]
    assert main(search_digits) == 0
    said = capsys.readouterr().out
    assert "test images, looked at once" in said and out.with_suffix(".png").is_file()
    assert out.with_suffix(".txt").read_text() in said
    model = ql.load_model("resnet20", workbook / "checkpoint" / "resnet20-digits.safetensors")
    assert set(ql.load_quantized(out, model).config.layer_weight_bits.values()) <= {8, 2}
    for wrong, message in ((["search", "net"], "'net' is no network; name one of resnet20"),
                           (["search", "resnet20", "--limit", "0"], "--limit 0: name at least 1")):
        assert main(wrong) == 1 and message in capsys.readouterr().err
