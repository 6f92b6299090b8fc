"""Notebook 05's own numbers, of tails, channels and the cost of a range, against NumPy."""

import numpy as np
import pytest
import torch
from cells import run_cells

from quantlab import plots
from quantlab.calibration import watch
from quantlab.edgestats import EdgeStats


@pytest.fixture(scope="module")
def space():
    """What the notebook's cells define, on 24 digits; its figures are drawn and not saved."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "save", lambda figure, *_: figure.canvas.draw())
        return run_cells("05_activation_histograms", data="digits", n_calibration=24, n_costs=8)


def values_of(space, layer, n):
    """float64 [C, values] of what is stored behind a layer, of n images."""
    kept = {}
    node = space["stored"][layer]
    batches = [torch.cat(list(space["study"].calibration(n=n)))]
    watch(space["graph"], [node], kept.__setitem__, batches)
    return kept[node].transpose(0, 1).flatten(1).cpu().numpy().astype(np.float64)


def rounded(x, low, high, bits):
    """Affine quantization once more, in NumPy and float64."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / (2**bits - 1) or 1.0
    zero = np.clip(np.round(-low / scale), 0, 2**bits - 1)
    return scale * (np.clip(np.round(x / scale) + zero, 0, 2**bits - 1) - zero)


def least_error(x, low, high, bits):
    fractions = np.arange(1, 21) / 20
    return min(((rounded(x, f * low, f * high, bits) - x) ** 2).sum() for f in fractions)


def test_tails(space):
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(5)) ** 3
    x = torch.cat([x, torch.zeros(500)])
    table, values = space["outliers"](EdgeStats().update(x), (3, 5)), x.double().numpy()
    size, distance = np.abs(values), np.abs(values - values.mean())
    assert table["std"] == pytest.approx(values.std(), rel=0.01)
    assert table["max_over_p"] == pytest.approx(size.max() / np.quantile(size, 0.9999), rel=0.03)
    for k in (3, 5):
        beyond = (distance > k * values.std()).mean()
        assert table[f"beyond_{k}"] == pytest.approx(beyond, rel=0.03)


def test_a_dead_layer_has_a_density_and_no_tail(space):
    dead = EdgeStats().update(torch.zeros(50))
    assert space["density"](dead) == ([0.0], [0.0])
    table = space["outliers"](dead, (4,))
    assert table["std"] == table["beyond_4"] == 0 and np.isnan(table["max_over_p"])


def test_every_channels_share_of_its_layers_range(space):
    channels = space["channels"]
    assert list(channels.layer.unique()) == space["layers"]
    for layer, rows in channels.groupby("layer"):
        size = np.abs(values_of(space, layer, 24)).max(1)
        assert np.allclose(rows.share, size / size.max(), atol=1e-4), layer
        assert rows.channel.tolist() == list(range(len(size)))


@pytest.mark.parametrize("layer", ["conv1", "layer2_0_add", "layer3_2_conv2", "fc"])
def test_what_one_range_for_all_channels_costs(space, layer):
    costs = space["costs"].set_index(["layer", "what"])
    cases = {"activations": values_of(space, layer, 8)}
    if layer in space["weights"]:
        cases["weights"] = space["weights"][layer].flatten(1).double().cpu().numpy()
    for what, x in cases.items():
        low, high = x.min(1), x.max(1)
        if what == "activations":  # the ranges come from all the calibration images
            low, high = (space[name][layer].double().cpu().numpy() for name in ("low", "high"))
        one = least_error(x, low.min(), high.max(), space["bits"])
        each = sum(least_error(*row, space["bits"]) for row in zip(x, low, high))
        signal, gain = (x**2).sum(), 10 * np.log10(one / each)
        row = costs.loc[layer, what]
        assert row.tensor_db == pytest.approx(10 * np.log10(signal / one), abs=0.05)
        assert row.gain_db == pytest.approx(gain, abs=0.05)
        assert row.gain_bits == pytest.approx(gain / 6.0206, abs=0.01)


def test_histograms_and_densities(space):
    for layer in ("conv1", "layer2_0_add"):
        x = values_of(space, layer, 24)
        edge = space["edges"][layer, "after"]
        assert edge.count == x.size and edge.maximum == pytest.approx(x.max(), rel=1e-4)
        rows = space["density_rows"](layer, "after", 160)
        step = rows.x.diff().median()
        assert rows.density.sum() * step == pytest.approx((x > 0).mean(), abs=1e-3)
        assert rows.zeros[0] == pytest.approx((x == 0).mean(), abs=1e-3)
