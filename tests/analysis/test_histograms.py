"""What passes through every layer: the frames against NumPy on the raw values, on our network and
on one with everything odd in it.
"""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import CHECKOUT
from torch import nn

import quantlab as ql
from quantlab import observers, plots
from quantlab.analysis.histograms import (
    FRACTIONS,
    densities,
    edge_values,
    find_layers,
    observe_layers,
    outliers,
    range_costs,
)
from quantlab.calibration import watch
from quantlab.edgestats import EdgeStats
from quantlab.graph import folded
from quantlab.quantized import find_node


class Odd(nn.Module):
    """A BatchNorm that cannot be folded, a depthwise layer, concat, functional and module ReLUs,
    one shared, and a layer that is all dead.
    """

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(3)
        self.conv = nn.Conv2d(3, 4, 3)
        self.depthwise = nn.Conv2d(4, 4, 3, groups=4)
        self.dead = nn.Conv2d(8, 5, 1)
        self.relu6 = nn.ReLU6()
        self.relu = nn.ReLU()
        self.fc = nn.Linear(5, 2)
        nn.init.constant_(self.dead.bias, -100.0)

    def forward(self, x):
        x = self.relu(self.conv(F.relu(self.bn(x))))
        x = torch.cat([self.relu6(self.depthwise(x)), x[:, :, 1:-1, 1:-1]], 1)
        return self.fc(self.relu(self.dead(x)).mean((2, 3)))


def values_of(model, batches):
    """(folded graph, every node's value on all images by name: float32 NumPy arrays)."""
    graph, kept = folded(model), {}
    names = [node.name for node in graph.graph.nodes]
    watch(graph, names, kept.__setitem__, [torch.cat(list(batches))])
    return graph, {k: v.cpu().numpy() for k, v in kept.items() if isinstance(v, torch.Tensor)}


@pytest.mark.parametrize("which", ["resnet20", "odd"])
def test_every_channel_against_numpy(which, resnet20, digits):
    torch.manual_seed(0)
    model, batches = Odd(), [torch.randn(n, 3, 12, 12) for n in (4, 3)]
    if which == "resnet20":
        model, batches = resnet20, list(digits.calibration(24, batch_size=9))
    edges, channels = observe_layers(model, batches)
    graph, values = values_of(model, batches)
    layers = {layer.name: layer for layer in find_layers(graph)}
    assert channels.order.is_monotonic_increasing
    assert list(channels.layer.unique()) == list(dict.fromkeys(name for name, _ in edges))
    assert list(channels.layer.unique()) == list(layers)
    for (name, point), rows in channels.groupby(["layer", "point"]):
        if point == "weight":
            x = graph.get_submodule(find_node(graph, name).target).weight.detach().numpy()
        else:
            x = np.swapaxes(values[name if point == "before" else layers[name].relu], 0, 1)
        x = x.reshape(len(x), -1).astype(np.float64)
        assert rows.channel.tolist() == list(range(len(x)))
        assert (rows["count"] == x.shape[1]).all()
        # another batch size may round a value across zero
        assert (rows.zeros.to_numpy() == (x == 0).sum(1)).mean() > 0.9
        expected = {"minimum": x.min(1), "maximum": x.max(1), "mean": x.mean(1), "std": x.std(1)}
        for column, numbers in expected.items():
            close = np.allclose(rows[column], numbers, rtol=1e-4, atol=1e-5 * np.abs(x).max())
            assert close, (name, point, column)
        stats = edges[name, point]
        assert stats.count == x.size and stats.zeros == rows.zeros.sum()
        assert stats.maximum == pytest.approx(x.max(), rel=1e-4, abs=1e-5)


def test_layers_are_found_from_the_graph(resnet20):
    layers = find_layers(folded(resnet20))
    kinds = pd.Series([layer.kind for layer in layers]).value_counts()
    assert kinds.to_dict() == {"compute": 22, "add": 9}
    assert sum(layer.relu is not None for layer in layers) == 19
    odd = {layer.name: (layer.kind, layer.relu) for layer in find_layers(folded(Odd()))}
    assert odd == {
        "bn": ("batchnorm", "relu"), "conv": ("compute", "relu_1"),
        "depthwise": ("compute", "relu6"), "dead": ("compute", "relu_2"), "fc": ("compute", None)}


def test_the_folded_first_layer_is_what_the_network_computes(resnet20, digits):
    x = next(iter(digits.calibration(16)))
    with torch.no_grad():
        before = resnet20.bn1(resnet20.conv1(x))
    _, channels = observe_layers(resnet20, [x])
    rows = channels[channels.layer == "conv1"].set_index("point")
    assert np.allclose(rows.loc["before"].maximum, before.amax((0, 2, 3)), atol=1e-4)
    assert np.allclose(rows.loc["after"]["mean"], before.relu().mean((0, 2, 3)), atol=1e-4)
    assert np.allclose(edge_values(resnet20, "conv1", [x])[0], before, atol=1e-4)


def rounded(x, low, high, bits):
    """Affine quantization once more, in NumPy and float64."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / (2**bits - 1) or 1.0
    zero = np.clip(np.round(-low / scale), 0, 2**bits - 1)
    return scale * (np.clip(np.round(x / scale) + zero, 0, 2**bits - 1) - zero)


@pytest.mark.parametrize("bits", [3, 4])
def test_range_costs_against_numpy(bits):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    with torch.no_grad():
        model[0].weight *= torch.tensor([1.0, 0.5, 0.1, 0.02]).view(-1, 1, 1, 1)
    batches = [torch.randn(5, 3, 6, 6) for _ in range(2)]
    _, channels = observe_layers(model, batches)
    costs = range_costs(model, batches, channels, bits).set_index(["layer", "point"])
    _, values = values_of(model, batches)
    cases = {
        ("_0", "after"): np.swapaxes(values["_1"], 0, 1),
        ("_0", "weight"): model[0].weight.detach().numpy(), ("_3", "before"): values["_3"].T}
    assert set(costs.index) == {*cases, ("_3", "weight")}
    for key, x in cases.items():
        x = x.reshape(len(x), -1).astype(np.float64)

        def least(part):
            ranges = [(s * part.min(), s * part.max()) for s in FRACTIONS.tolist()]
            return min(((rounded(part, *ends, bits) - part) ** 2).sum() for ends in ranges)

        signal = (x**2).sum()
        gain = 10 * np.log10(least(x) / sum(least(row) for row in x))
        assert costs.tensor_db[key] == pytest.approx(10 * np.log10(signal / least(x)), abs=0.05)
        assert costs.gain_db[key] == pytest.approx(gain, abs=0.05)
        assert costs.gain_bits[key] == pytest.approx(gain / 6.0206, abs=0.01)
    assert costs.gain_db["_0", "weight"] > 1, "channels of very different size"


def test_dead_channels_and_the_figures_of_a_network_with_a_dead_layer():
    torch.manual_seed(0)
    batches = [torch.randn(6, 3, 12, 12)]
    edges, channels = observe_layers(Odd(), batches)
    dead = channels[(channels.point == "after") & (channels.maximum == 0)]
    assert dead[dead.layer == "dead"].channel.tolist() == [0, 1, 2, 3, 4]
    assert edges["dead", "after"].zeros == edges["dead", "after"].count
    density = densities(edges)
    names = channels.layer.unique()
    stored = {name: edges.get((name, "after"), edges[name, "before"]) for name in names}
    ranges = [(name, *observers.histogram(stats, 4)) for name, stats in stored.items()]
    ranges = pd.DataFrame(ranges, columns=["layer", "low", "high"])
    costs = range_costs(Odd(), batches, channels, 4)
    activations = costs[costs.point != "weight"]
    live = channels[channels.point == "after"].assign(share=1.0)
    table = [{"layer": layer, **outliers(stats)} for (layer, _), stats in edges.items()]
    table = pd.DataFrame(table).rename_axis("order").reset_index()
    figures = [
        plots.ridges(density, "text", ranges),
        plots.layer_histograms(density, ranges[:-1], "text"),
        plots.tails(table, "text", {4: 6e-5, 6: 2e-9}),
        plots.channel_spread(live, activations, "text", 4),
        plots.weights_beside_activations(density.assign(z=density.x), "text")]
    for figure in figures:
        figure.canvas.draw()
    labels = [text.get_text() for text in figures[0].axes[0].get_yticklabels()]
    assert labels == ["bn", "conv", "depthwise", "dead", "fc"]


def test_densities_are_the_histogram():
    x = torch.randn(40_000, generator=torch.Generator().manual_seed(3)).relu()
    frame = densities({("a", "after"): EdgeStats().update(x)})
    step = frame.x.diff().median()
    positive = (x > 0).double().mean().item()
    assert frame.density.sum() * step == pytest.approx(positive, rel=1e-9)
    assert frame.zeros[0] == (x == 0).double().mean().item()
    bins = np.append(frame.x - step / 2, frame.x.iloc[-1] + step / 2)
    expected, _ = np.histogram(x[x > 0], bins=bins)
    assert np.allclose(frame.density, expected / len(x) / step) and 100 < len(frame) < 400


def test_outliers_against_numpy():
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(5)) ** 3
    x = torch.cat([x, torch.zeros(500)])
    table, values = outliers(EdgeStats().update(x), (3, 5)), x.double().numpy()
    size, distance = np.abs(values), np.abs(values - values.mean())
    assert table["std"] == pytest.approx(values.std(), rel=0.01)
    assert table["max_over_p"] == pytest.approx(size.max() / np.quantile(size, 0.9999), rel=0.03)
    for k in (3, 5):
        beyond = (distance > k * values.std()).mean()
        assert table[f"beyond_{k}"] == pytest.approx(beyond, rel=0.03)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_clipping_and_rounding_add_up_to_the_error(bits):
    x = torch.randn(50_000, generator=torch.Generator().manual_seed(6)) - 0.3
    stats, low, high = EdgeStats().update(x), [-1.0, -2.5, -5.0], [1.5, 2.0, 4.0]
    clipping, rounding = observers.split_error(stats, low, high, bits)
    total = observers.quantization_error(stats, low, high, bits)
    assert torch.allclose(clipping + rounding, total, rtol=1e-4)
    for i in range(3):
        q = ql.choose_qparams(low[i], high[i], bits)
        bottom, top = (q.scale.item() * (code - q.zero_point.item()) for code in (q.qmin, q.qmax))
        outside = (x < bottom) | (x > top)
        error = (ql.fake_quantize(x, q) - x).double().square()
        lost = [error[part].sum().item() / len(x) for part in (outside, ~outside)]
        assert clipping[i].item() == pytest.approx(lost[0], rel=0.02, abs=1e-7)
        assert rounding[i].item() == pytest.approx(lost[1], rel=0.02)


def test_bad_input(resnet20, digits):
    with pytest.raises(ql.UserError, match="no images to observe"):
        observe_layers(resnet20, [])
    with pytest.raises(ql.UserError, match="no value 'conv9'; there are: x, conv1"):
        edge_values(resnet20, "conv9", digits.calibration(4))


def test_data_whose_classes_are_not_the_networks(digits, resnet20):
    """Fewer outputs than classes, other names, another order: one line each, before anything is
    computed.
    """
    checkpoint = CHECKOUT / "checkpoint" / "resnet20-digits.safetensors"

    def load(classes):
        named = dataclasses.replace(digits, name="letters", classes=tuple(classes))
        return ql.load_trained("resnet20", named, checkpoint)

    with pytest.raises(ql.UserError, match="has 10 outputs but letters has 12 classes; train one"):
        load("abcdefghijkl")
    others = {"abcdefghij": "a, b, c, …", "1203456789": "1, 2, 0, …", "01": "0, 1:"}
    for classes, shown in others.items():
        said = f"tells apart the classes 0, 1, 2, …; letters has {shown}"
        with pytest.raises(ql.UserError, match=said) as error:
            load(classes)
        assert "\n" not in str(error.value)
    more = dataclasses.replace(digits.test, num_classes=12)
    with pytest.raises(ql.UserError, match="network has 10 outputs but the data has 12 classes"):
        ql.evaluate(resnet20, more, limit=10)
