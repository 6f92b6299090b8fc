"""What passes through every layer: the frames against NumPy on the raw values, on our network and on one with everything odd in it."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import CHECKOUT
from torch import fx, nn

import quantlab as ql
from quantlab import observers, plots
from quantlab.analysis import distributions
from quantlab.analysis.distributions import (
    densities,
    edge_values,
    find_layers,
    observe_layers,
    outliers,
    range_costs,
    split_error,
)
from quantlab.calibration import prepare
from quantlab.edgestats import EdgeStats


class Odd(nn.Module):
    """A BatchNorm that cannot be folded, a depthwise layer, concat, functional and module ReLUs, one shared, and a layer that is all dead."""

    def __init__(self):
        super().__init__()
        self.bn, self.conv, self.depthwise = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, groups=4)
        self.dead, self.relu6, self.relu, self.fc = nn.Conv2d(8, 5, 1), nn.ReLU6(), nn.ReLU(), nn.Linear(5, 2)
        nn.init.constant_(self.dead.bias, -100.0)

    def forward(self, x):
        x = self.relu(self.conv(F.relu(self.bn(x))))
        x = torch.cat([self.relu6(self.depthwise(x)), x[:, :, 1:-1, 1:-1]], 1)
        return self.fc(self.relu(self.dead(x)).mean((2, 3)))


def values_of(model, batches):
    """Every node's value on all images, by name: float32 NumPy arrays."""
    kept = {}

    class Record(fx.Interpreter):
        def run_node(self, node):
            kept[node.name] = super().run_node(node)
            return kept[node.name]

    graph = prepare(model)[0]
    with torch.no_grad():
        Record(graph).run(torch.cat(list(batches)))
    return graph, {name: value.numpy() for name, value in kept.items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize("which", ["resnet20", "odd"])
def test_every_channel_against_numpy(which, resnet20, digits):
    torch.manual_seed(0)
    model, batches = Odd(), [torch.randn(n, 3, 12, 12) for n in (4, 3)]
    if which == "resnet20":
        model, batches = resnet20, list(digits.calibration(24, batch_size=9))
    edges, channels = observe_layers(model, batches)
    graph, values = values_of(model, batches)
    layers = find_layers(graph)
    assert channels.order.is_monotonic_increasing and list(channels.layer.unique()) == [layer.name for layer in layers]
    for (name, point), rows in channels.groupby(["layer", "point"]):
        layer = next(found for found in layers if found.name == name)
        if point == "weight":
            x = graph.get_submodule(next(n.target for n in graph.graph.nodes if n.name == name)).weight.detach().numpy()
        else:
            x = np.swapaxes(values[name if point == "before" else layer.relu], 0, 1)
        x = x.reshape(len(x), -1).astype(np.float64)
        assert rows.channel.tolist() == list(range(len(x))) and (rows["count"] == x.shape[1]).all()
        assert (rows.zeros.to_numpy() == (x == 0).sum(1)).mean() > 0.9  # another batch size may round a value across zero
        for column, expected in (("minimum", x.min(1)), ("maximum", x.max(1)), ("mean", x.mean(1)), ("std", x.std(1))):
            assert np.allclose(rows[column], expected, rtol=1e-4, atol=1e-5 * np.abs(x).max()), (name, point, column)
        stats = edges[name, point]
        assert stats.count == x.size and stats.maximum == pytest.approx(x.max(), rel=1e-4, abs=1e-5) and stats.zeros == rows.zeros.sum()


def test_layers_are_found_from_the_graph(resnet20):
    layers = {layer.name: layer for layer in find_layers(prepare(resnet20)[0])}
    kinds = pd.Series([layer.kind for layer in layers.values()]).value_counts()
    assert kinds.to_dict() == {"compute": 22, "add": 9} and sum(layer.relu is not None for layer in layers.values()) == 19
    odd = {layer.name: (layer.kind, layer.relu) for layer in find_layers(prepare(Odd())[0])}
    assert odd == {
        "bn": ("batchnorm", "relu"), "conv": ("compute", "relu_1"), "depthwise": ("compute", "relu6"), "dead": ("compute", "relu_2"),
        "fc": ("compute", None),
    }


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
    assert set(costs.index) == {("_0", "weight"), ("_0", "after"), ("_3", "weight"), ("_3", "before")}
    cases = {("_0", "after"): np.swapaxes(values["_1"], 0, 1), ("_0", "weight"): model[0].weight.detach().numpy(), ("_3", "before"): values["_3"].T}
    for key, x in cases.items():
        x = x.reshape(len(x), -1).astype(np.float64)

        def least(part):
            return min(((rounded(part, s * part.min(), s * part.max(), bits) - part) ** 2).sum() for s in distributions.SHARES.tolist())

        signal, gain = (x**2).sum(), 10 * np.log10(least(x) / sum(least(row) for row in x))
        assert costs.tensor_db[key] == pytest.approx(10 * np.log10(signal / least(x)), abs=0.05)
        assert costs.gain_db[key] == pytest.approx(gain, abs=0.05) and costs.gain_bits[key] == pytest.approx(gain / 6.0206, abs=0.01)
    assert costs.gain_db["_0", "weight"] > 1, "channels of very different size: one range is expensive"


def test_dead_channels_and_the_figures_of_a_network_with_a_dead_layer():
    torch.manual_seed(0)
    batches = [torch.randn(6, 3, 12, 12)]
    edges, channels = observe_layers(Odd(), batches)
    dead = channels[(channels.point == "after") & (channels.maximum == 0)]
    assert dead[dead.layer == "dead"].channel.tolist() == [0, 1, 2, 3, 4] and edges["dead", "after"].zeros == edges["dead", "after"].count
    density = densities(edges)
    ranges = pd.DataFrame([(name, *observers.histogram(edges.get((name, "after"), edges[name, "before"]), 4)) for name in channels.layer.unique()])
    ranges.columns = ["layer", "low", "high"]
    costs = range_costs(Odd(), batches, channels, 4)
    activations = costs[costs.point != "weight"]
    live = channels[channels.point == "after"].assign(share=1.0)
    table = pd.DataFrame([{"order": i, "layer": key[0], **outliers(e)} for i, (key, e) in enumerate(edges.items())])
    figures = [
        plots.ridges(density, "text", ranges), plots.layer_histograms(density, ranges[:-1], "text"), plots.tails(table, "text", {4: 6e-5, 6: 2e-9}),
        plots.channel_spread(live, activations, "text", 4), plots.weights_beside_activations(density.assign(z=density.x), "text"),
    ]
    for figure in figures:
        figure.canvas.draw()
    assert [t.get_text() for t in figures[0].axes[0].get_yticklabels()] == ["bn", "conv", "depthwise", "dead", "fc"]


def test_densities_are_the_histogram():
    x = torch.randn(40_000, generator=torch.Generator().manual_seed(3)).relu()
    frame = densities({("a", "after"): EdgeStats().update(x)})
    step = frame.x.diff().median()
    assert frame.density.sum() * step == pytest.approx((x > 0).double().mean().item(), rel=1e-9) and frame.zeros[0] == (x == 0).double().mean().item()
    expected, _ = np.histogram(x[x > 0], bins=np.append(frame.x - step / 2, frame.x.iloc[-1] + step / 2))
    assert np.allclose(frame.density, expected / len(x) / step) and 100 < len(frame) < 400


def test_outliers_against_numpy():
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(5)) ** 3
    table, values = outliers(EdgeStats().update(torch.cat([x, torch.zeros(500)])), (3, 5)), np.append(x.double().numpy(), np.zeros(500))
    assert table["std"] == pytest.approx(values.std(), rel=0.01)
    assert table["max_over_p"] == pytest.approx(np.abs(values).max() / np.quantile(np.abs(values), 0.9999), rel=0.03)
    for k in (3, 5):
        assert table[f"beyond_{k}"] == pytest.approx((np.abs(values - values.mean()) > k * values.std()).mean(), rel=0.03)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_clipping_and_rounding_add_up_to_the_error(bits):
    x = torch.randn(50_000, generator=torch.Generator().manual_seed(6)) - 0.3
    stats, low, high = EdgeStats().update(x), [-1.0, -2.5, -5.0], [1.5, 2.0, 4.0]
    clipping, rounding = split_error(stats, low, high, bits)
    assert torch.allclose(clipping + rounding, observers.quantization_error(stats, low, high, bits), rtol=1e-4)
    for i in range(3):
        q = ql.choose_qparams(low[i], high[i], bits)
        ends = [q.scale.item() * (code - q.zero_point.item()) for code in (q.qmin, q.qmax)]
        outside = (x < ends[0]) | (x > ends[1])
        error = (ql.fake_quantize(x, q) - x).double().square()
        assert clipping[i].item() == pytest.approx(error[outside].sum().item() / len(x), rel=0.02, abs=1e-7)
        assert rounding[i].item() == pytest.approx(error[~outside].sum().item() / len(x), rel=0.02)


def test_bad_input(resnet20, digits):
    with pytest.raises(ql.UserError, match="no images to observe"):
        observe_layers(resnet20, [])
    with pytest.raises(ql.UserError, match="no value 'conv9'; there are: x, conv1"):
        edge_values(resnet20, "conv9", digits.calibration(4))


def test_data_whose_classes_are_not_the_networks(digits, resnet20):
    """Fewer ways than classes, other names, another order: one line each, before anything is computed."""
    checkpoint = CHECKOUT / "checkpoint" / "resnet20-digits.safetensors"
    more = dataclasses.replace(digits, name="letters", classes=tuple("abcdefghijkl"))
    with pytest.raises(ql.UserError, match="has 10 ways but letters has 12 classes; train one"):
        ql.load_trained("resnet20", more, checkpoint)
    for classes, shown in ((tuple("abcdefghij"), "a, b, c, …"), (tuple("1203456789"), "1, 2, 0, …"), (tuple("01"), "0, 1:")):
        with pytest.raises(ql.UserError, match=f"tells apart the classes 0, 1, 2, …; letters has {shown}") as error:
            ql.load_trained("resnet20", dataclasses.replace(digits, name="letters", classes=classes), checkpoint)
        assert "\n" not in str(error.value)
    with pytest.raises(ql.UserError, match="the network has 10 ways but the data has 12 classes"):
        ql.evaluate(resnet20, dataclasses.replace(digits.test, num_classes=12), limit=10)
