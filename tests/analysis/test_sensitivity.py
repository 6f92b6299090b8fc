"""The error report against sums computed by hand, here and in notebook 04."""

import math
import types

import jupytext
import pandas as pd
import pytest
import torch
from conftest import CHECKOUT
from torch import nn

import quantlab as ql
from quantlab.analysis.sensitivity import edge_errors
from quantlab.graph import folded
from quantlab.quantized import find_node


def decibels(signal, noise):
    power = [x.double().square().sum().item() for x in (signal, noise)]
    return 10 * math.log10(power[0] / power[1])


def test_every_edge_is_measured_against_the_float_network():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(64, 5)).eval()
    batches = [torch.randn(6, 3, 8, 8) for _ in range(3)]
    qmodel = ql.quantize(model, ql.collect(model, batches), ql.QuantConfig(4, 3))
    report = edge_errors(model, qmodel, batches).set_index("edge")
    assert report.index.tolist() == ["input_1", "_1", "_3"]
    assert report.bits.tolist() == [8, 3, 3]
    x = torch.cat(batches)
    with torch.no_grad():
        first = qmodel.quantizers.input_1(x)
        hidden = model[1](model[0](x))
        rounded = qmodel.quantizers._1(qmodel.layers["_0"](first).relu())
        alone = qmodel.quantizers._1(hidden)
    assert report.sqnr["input_1"] == pytest.approx(decibels(x, first - x), abs=1e-3)
    assert report.own_sqnr["input_1"] == report.sqnr["input_1"]
    assert report.sqnr["_1"] == pytest.approx(decibels(hidden, rounded - hidden), abs=1e-3)
    assert report.own_sqnr["_1"] == pytest.approx(decibels(hidden, alone - hidden), abs=1e-3)
    added = report.sqnr["input_1"] - report.sqnr["_1"]
    assert report.added_db["_1"] == pytest.approx(added, abs=1e-3)
    assert math.isnan(report.added_db["input_1"])


def test_the_broken_layer_is_named(resnet20, stats, digits):
    """A range that is far too small on one edge: that edge adds most noise."""
    guilty = "layer2_1_relu"

    def observer(edge, bits, symmetric):
        low, high = ql.observers.histogram(edge, bits, symmetric)
        return (low, high / 20) if edge is stats.edges[guilty] else (low, high)

    qmodel = ql.quantize(resnet20, stats, ql.QuantConfig(8, 8, observer=observer))
    report = edge_errors(resnet20, qmodel, digits.calibration(32))
    assert report.edge[report.added_db.idxmax()] == guilty
    assert report.edge[report.own_sqnr.idxmin()] == guilty


def test_notebook_04_computes_the_same_report_by_hand(resnet20, stats, digits):
    cells = jupytext.read(CHECKOUT / "notebooks" / "04_observers.py").cells
    code = [cell.source for cell in cells if cell.cell_type == "code"]
    first, last = (next(i for i, source in enumerate(code) if source.startswith(start))
                   for start in ("qmodel = ql.quantize(", "report = pd.DataFrame("))
    imports = [source for source in code[:first] if source.startswith(("import ", "from "))]
    study = types.SimpleNamespace(smoke=True, calibration=lambda s, n: digits.calibration(n, s))
    space = dict(study=study, network=resnet20, stats=stats, bits=4, seed=0)
    for source in [*imports[1:], *code[first : last + 1]]:  # the first one fetches the workbook
        exec(source, space)
    theirs = edge_errors(resnet20, space["qmodel"], digits.calibration(64, 100))
    pd.testing.assert_frame_equal(space["report"], theirs)
    assert theirs.added_db.notna().sum() > 10
    plan, quantizers = space["qmodel"].plan, space["qmodel"].quantizer_nodes
    again = theirs.role.eq("read")  # a stored value, rounded once more in front of a layer
    assert again.sum() == len(quantizers) - len(plan.stores) > 0
    assert (theirs.bits[again] == 4).all() and (theirs.bits[theirs.role == "residual"] == 8).all()


class Small(nn.Module):
    """Two convolutions, the first with a BatchNorm to fold, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.b, self.fc = nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, 5)

    def forward(self, x):
        x = torch.relu(self.b(torch.relu(self.norm(self.a(x)))))
        return self.fc(x.mean((2, 3)))


def test_notebook_04_names_a_planted_fault_first_and_its_remedy_gains_most():
    """One channel 64 times as large as the others, and read 64 times as small."""
    torch.manual_seed(0)
    model, images = Small().eval(), torch.randn(16, 3, 8, 8)
    with torch.no_grad():
        model.norm.weight[3] *= 64
        model.norm.bias[3] *= 64
        model.b.weight[:, 3] /= 64
        exact = model(images).double()
    cells = jupytext.read(CHECKOUT / "notebooks" / "04_observers.py").cells
    code = [cell.source for cell in cells if cell.cell_type == "code"]
    before, section, after = (next(i for i, source in enumerate(code) if source.startswith(start))
                              for start in ("qmodel = ql.quantize(", "n_images = ", "lost = "))
    imports = [source for source in code[:before] if source.startswith(("import ", "from "))]
    study = types.SimpleNamespace(
        smoke=True, calibration=lambda seed=0, n=16: [images], caption=lambda n, text: text,
        save=lambda figure, name: None,
        evaluate=lambda net: ql.evaluate(net, [(images, exact.argmax(1))]))
    stats = ql.collect(model, [images])
    space = dict(study=study, network=model, stats=stats, bits=4, seed=0)
    for source in [*imports[1:], code[before], *code[section:after]]:
        exec(source, space)
    rows = space["diagnosis"]
    assert (rows.part[0], rows.remedy[0]) == ("relu", "a scale a channel")
    assert rows.why[0].startswith("one channel reaches ") and rows["gain, dB"][0] > 3
    configs = ql.QuantConfig(4, 4), ql.QuantConfig(4, 4, layer_act_bits={"b": 6})
    graph, nets = folded(model), [ql.quantize(model, stats, config) for config in configs]
    with torch.no_grad():
        for net in nets:  # biases in float, as there
            for name, layer in net.layers.items():
                layer.bias.copy_(graph.get_submodule(find_node(graph, name).target).bias)
        base, finer = (net(images).double() for net in nets)
    ratio = (base - exact).square().sum(1) / (finer - exact).square().sum(1)
    by_hand = rows[(rows.part == "relu") & (rows.remedy == "6 bits")]["gain, dB"].item()
    assert by_hand == pytest.approx(10 * ratio.log10().mean().item(), abs=0.05)


def test_needs_images(resnet20, stats):
    with pytest.raises(ql.UserError, match="at least one batch"):
        edge_errors(resnet20, ql.quantize(resnet20, stats), [])
