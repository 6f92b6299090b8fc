"""The panel without a browser: every control redraws the figure, and the figure shows the codes and
the error that it says.
"""

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
    values = {"relu": x.relu(), "sum": x**3, "zeros": torch.zeros(100)}
    return {name: EdgeStats().update(value) for name, value in values.items()}


def pixels(box):
    return matplotlib.image.imread(io.BytesIO(box.children[1].value))


def test_every_control_redraws(edges):
    box = panel.range_panel(edges, "text", edge="relu", bits=4)
    controls = {control.description: control for control in box.children[0].children}
    assert list(controls) == ["edge", "bits", "observer", "clip range"]
    assert controls["edge"].options == ("relu", "sum", "zeros")
    assert (controls["bits"].min, controls["bits"].max) == (2, 8)
    assert set(controls["observer"].options) == set(OBSERVERS)
    seen = [pixels(box)]
    changes = (("bits", 3), ("edge", "sum"), ("observer", "minmax"), ("clip range", 0.4),
               ("clip range", 1.5), ("bits", 8), ("edge", "zeros"))
    for name, value in changes:
        controls[name].value = value
        new = not any(np.array_equal(pixels(box), before) for before in seen)
        assert new, f"{name} = {value} changed nothing"
        seen.append(pixels(box))
    start = {"edge": "relu", "bits": 4, "observer": "histogram", "clip range": 1.0}
    for name, value in start.items():
        controls[name].value = value
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
    values = (np.arange(8) - q.zero_point.item()) * q.scale.item()
    assert np.allclose([segment[0][0] for segment in codes], values)
    error = quantization_error(edges["sum"], [low * share], [high * share], 3).item()
    ring = next(line for line in right.lines if line.get_label() == "this range")
    assert ring.get_xdata()[0] == share and ring.get_ydata()[0] == pytest.approx(error, rel=1e-6)
    centers, counts = edges["sum"].histogram()
    signal = (centers.square() @ counts.double()).item() / edges["sum"].count
    assert right.get_title().startswith(f"{10 * np.log10(signal / error):.1f} dB")


def test_headless_runs_draw_the_same_figure(edges):
    """What the notebook saves for fixed values is what the panel shows for them."""
    box = panel.range_panel(edges, "text", edge="relu", bits=5, observer="mse", share=0.8)
    chosen = OBSERVERS["mse"](edges["relu"], 5)
    figure = panel.range_figure(edges["relu"], "relu", 5, "mse", chosen, 0.8, "text")
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    assert np.array_equal(matplotlib.image.imread(io.BytesIO(file.getvalue())), pixels(box))
