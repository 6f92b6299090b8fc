"""What passes through every layer: histograms against NumPy on the raw values, on our network and
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
from quantlab.analysis.histograms import densities, find_layers, observe_layers
from quantlab.calibration import watch
from quantlab.edgestats import EdgeStats
from quantlab.graph import folded
from quantlab.plots.panel import split_error
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
def test_every_layer_against_numpy(which, resnet20, digits):
    torch.manual_seed(0)
    model, batches = Odd(), [torch.randn(n, 3, 12, 12) for n in (4, 3)]
    if which == "resnet20":
        model, batches = resnet20, list(digits.calibration(24, batch_size=9))
    edges = observe_layers(model, batches)
    graph, values = values_of(model, batches)
    layers = find_layers(graph)
    assert list(dict.fromkeys(name for name, _ in edges)) == list(layers)
    for (name, point), edge in edges.items():
        if point == "weight":
            x = graph.get_submodule(find_node(graph, name).target).weight.detach().numpy()
        else:
            x = values[name if point == "before" else layers[name]]
        assert edge.count == x.size
        # another batch size may round a value across zero
        assert edge.zeros == pytest.approx((x == 0).sum(), rel=0.01, abs=2)
        exact = {"rel": 1e-4, "abs": 1e-5 * float(np.abs(x).max())}
        assert edge.minimum == pytest.approx(x.min(), **exact), (name, point)
        assert edge.maximum == pytest.approx(x.max(), **exact), (name, point)
        centers, counts = edge.histogram()
        mean = (centers @ counts.double()).item() / x.size
        assert mean == pytest.approx(x.mean(dtype=np.float64), abs=edge.width / 2), (name, point)


def test_layers_are_found_from_the_graph(resnet20):
    layers = find_layers(folded(resnet20))
    assert len(layers) == 22 + 9
    assert len([name for name in layers if name.endswith("_add")]) == 9
    assert sum(relu is not None for relu in layers.values()) == 19
    assert find_layers(folded(Odd())) == {
        "bn": "relu", "conv": "relu_1", "depthwise": "relu6", "dead": "relu_2", "fc": None}


def test_the_folded_first_layer_is_what_the_network_computes(resnet20, digits):
    x = next(iter(digits.calibration(16)))
    with torch.no_grad():
        before = resnet20.bn1(resnet20.conv1(x))
    edges = observe_layers(resnet20, [x])
    for point, value in (("before", before), ("after", before.relu())):
        edge = edges["conv1", point]
        assert edge.maximum == pytest.approx(value.max().item(), abs=1e-4)
        assert edge.minimum == pytest.approx(value.min().item(), abs=1e-4)
        expected = EdgeStats().update(value)
        counts = [stats.histogram()[1].double().cumsum(0) for stats in (edge, expected)]
        assert (counts[0] - counts[1]).abs().max() < 0.001 * value.numel()


def test_figures_of_a_network_with_a_dead_layer():
    torch.manual_seed(0)
    edges = observe_layers(Odd(), [torch.randn(6, 3, 12, 12)])
    assert edges["dead", "after"].zeros == edges["dead", "after"].count
    density = densities(edges)
    stored = {layer: edge for (layer, point), edge in edges.items() if point != "weight"}
    ranges = [(layer, *observers.histogram(edge, 4)) for layer, edge in stored.items()]
    ranges = pd.DataFrame(ranges, columns=["layer", "low", "high"])
    figures = [
        plots.ridges(density, "text", ranges),
        plots.layer_histograms(density, ranges[:-1], "text"),
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


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_clipping_and_rounding_add_up_to_the_error(bits):
    x = torch.randn(50_000, generator=torch.Generator().manual_seed(6)) - 0.3
    stats, low, high = EdgeStats().update(x), [-1.0, -2.5, -5.0], [1.5, 2.0, 4.0]
    clipping, rounding = split_error(stats, low, high, bits)
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


def test_needs_images(resnet20):
    with pytest.raises(ql.UserError, match="at least one batch"):
        observe_layers(resnet20, [])


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
