"""The panel without a browser: every control redraws the figure, and the figure shows the codes and the error that it says."""

import io

import matplotlib.image
import numpy as np
import pytest
import torch

import quantlab as ql
from quantlab.edgestats import EdgeStats
from quantlab.observers import OBSERVERS, histogram, quantization_error
from quantlab.plots import panel


@pytest.fixture
def edges():
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    return {"relu": EdgeStats().update(x.relu()), "sum": EdgeStats().update(x**3), "zeros": EdgeStats().update(torch.zeros(100))}


def pixels(box):
    return matplotlib.image.imread(io.BytesIO(box.children[1].value))


def test_every_control_redraws(edges):
    box = panel.range_panel(edges, "text", edge="relu", bits=4)
    controls = {control.description: control for control in box.children[0].children}
    assert list(controls) == ["edge", "bits", "observer", "clip range"] and controls["edge"].options == ("relu", "sum", "zeros")
    assert (controls["bits"].min, controls["bits"].max) == (2, 8) and set(controls["observer"].options) == set(OBSERVERS)
    seen = [pixels(box)]
    for name, value in (("bits", 3), ("edge", "sum"), ("observer", "minmax"), ("clip range", 0.4), ("clip range", 1.5), ("bits", 8), ("edge", "zeros")):
        controls[name].value = value
        assert not any(np.array_equal(pixels(box), before) for before in seen), f"{name} = {value} changed nothing"
        seen.append(pixels(box))
    controls["edge"].value, controls["bits"].value, controls["observer"].value, controls["clip range"].value = "relu", 4, "histogram", 1.0
    assert np.array_equal(pixels(box), seen[0]), "back at the start, the first picture"


def test_every_observer_can_be_chosen_on_an_edge_with_both_signs(edges):
    box = panel.range_panel(edges, "text", edge="sum", bits=2)
    for observer in OBSERVERS:
        box.children[0].children[2].value = observer
        assert pixels(box).std() > 0.05


@pytest.mark.parametrize("share", [0.3, 1.0, 1.4])
def test_the_figure_shows_the_codes_and_the_error(edges, share):
    low, high = histogram(edges["sum"], 3)
    figure = panel.range_figure(edges["sum"], "sum", 3, "histogram", (low, high), share, "text")
    left, right = figure.axes
    q = ql.choose_qparams(low * share, high * share, 3)
    codes = left.collections[2].get_segments()
    assert np.allclose([s[0][0] for s in codes], [(c - q.zero_point.item()) * q.scale.item() for c in range(8)])
    error = quantization_error(edges["sum"], [low * share], [high * share], 3).item()
    ring = next(line for line in right.lines if line.get_label() == "this range")
    assert ring.get_xdata()[0] == share and ring.get_ydata()[0] == pytest.approx(error, rel=1e-6)
    centers, counts = edges["sum"].histogram()
    signal = (centers.square() @ counts.double()).item() / edges["sum"].count
    assert right.get_title().startswith(f"{10 * np.log10(signal / error):.1f} dB")


def test_headless_runs_draw_the_same_figure(edges):
    """What the notebook saves for fixed values is what the panel shows for them."""
    box = panel.range_panel(edges, "text", edge="relu", bits=5, observer="mse", share=0.8)
    figure = panel.range_figure(edges["relu"], "relu", 5, "mse", OBSERVERS["mse"](edges["relu"], 5), 0.8, "text")
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    assert np.array_equal(matplotlib.image.imread(io.BytesIO(file.getvalue())), pixels(box))
