"""The two-sided search against the optimum of its own criterion; what is said of PyTorch's
observers in notebook 04, on fixed tensors.
"""

import ast
import itertools

import jupytext
import numpy as np
import pytest
import scipy.optimize
import torch
from conftest import CHECKOUT

import quantlab as ql
from quantlab.edgestats import EdgeStats
from quantlab.observers import histogram, search_range
from quantlab.rivals import pytorch as builtin

eager = builtin.backends()[0]
needs_torch_ao = pytest.mark.skipif(not eager.available, reason=eager.note)


def observe(*tensors):
    stats = EdgeStats()
    for tensor in tensors:
        stats.update(tensor)
    return stats


def torch_histogram_range(batches, bits):
    """(low, high) that torch.ao's HistogramObserver chooses for codes 0..2^bits-1 of these batches,
    in this order.
    """
    from torch.ao.quantization import HistogramObserver

    with builtin._quiet():
        observer = HistogramObserver(dtype=torch.quint8, quant_min=0, quant_max=2**bits - 1)
        for batch in batches:
            observer(batch)
        scale, zero_point = (value.item() for value in observer.calculate_qparams())
    return -scale * zero_point, scale * (2**bits - 1 - zero_point)


def tensor(shape):
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(7))
    return {
        "shifted": x + 0.7,
        "two humps": torch.where(x > 0.3, x + 3, x * 0.3 - 1),
        "one outlier": torch.cat([x, torch.tensor([-25.0])]),
        "skewed": x.exp() - 1, "mostly negative": -(x**2) + 0.4,
    }[shape]


def criterion(stats, bits, p):
    """Mean |error|^p over the histogram for one range, in NumPy and float64; shares of both
    extremes in.
    """
    centers, counts = (v.numpy().astype(np.float64) for v in stats.histogram())
    centers, counts, top = centers[counts > 0], counts[counts > 0], 2**bits - 1

    def error(shares):
        low, high = stats.minimum * shares[0], stats.maximum * shares[1]
        scale = (high - low) / top
        zero = min(max(round(-low / scale), 0), top)
        x_hat = scale * (np.clip(np.round(centers / scale) + zero, 0, top) - zero)
        return float(np.abs(x_hat - centers) ** p @ counts) / stats.count

    return error


@pytest.mark.parametrize(
    "shape", ["shifted", "two humps", "one outlier", "skewed", "mostly negative"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_two_sided_search_reaches_the_global_optimum_of_its_criterion(bits, shape):
    """Every pair of 64 x 64 shares, then a simplex from the five best of them: range and zero-point
    free.
    """
    stats = observe(tensor(shape))
    error, low_high = criterion(stats, bits, 2.0), histogram(stats, bits)
    ours = error((low_high[0] / stats.minimum, low_high[1] / stats.maximum))
    shares = np.arange(1, 65) / 64
    grid = sorted((error(pair), pair) for pair in itertools.product(shares, shares))
    best = grid[0][0]
    for _, start in grid[:5]:
        found = scipy.optimize.minimize(
            lambda s: error(np.clip(s, 0.01, 1)), start,
            method="Nelder-Mead", options={"maxiter": 100})
        best = min(best, found.fun)
    assert ours <= 1.02 * best


def test_two_sided_search_for_another_exponent():
    stats = observe(tensor("one outlier"))
    error, (low, high) = criterion(stats, 4, 2.4), search_range(stats, 4, p=2.4)
    shares = np.arange(1, 49) / 48
    least = min(error(pair) for pair in itertools.product(shares, shares))
    below, above = low / stats.minimum, high / stats.maximum
    assert error((below, above)) <= 1.01 * least
    assert below < 0.7 * above, "the two ends differ: the outlier's side is clipped harder"


# ---- PyTorch's observers -------------------------------------------------------------------------


def heavy_batches():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2000, generator=generator) ** 3 * 2 ** (i / 4) for i in range(16)]


@needs_torch_ao
def test_pytorchs_search_counts_256_levels_whatever_the_width():
    x = torch.randn(40_000, generator=torch.Generator().manual_seed(1)).relu()
    stats, highs, ratios = observe(x), {}, {}
    for bits in (8, 4, 3):
        theirs = torch_histogram_range([x], bits)
        highs[bits] = theirs[1]
        theirs, ours = (
            (ql.fake_quantize(x, ql.choose_qparams(*r, bits)) - x).square().mean().item()
            for r in (theirs, histogram(stats, bits)))
        ratios[bits] = theirs / ours
    assert [highs[3], highs[4]] == pytest.approx([highs[8]] * 2, rel=1e-5)
    assert histogram(stats, 3)[1] < 0.8 * highs[3]
    assert ratios[3] > ratios[4] > ratios[8] > 0.99 and ratios[3] > 1.3


@needs_torch_ao
def test_pytorchs_histogram_depends_on_order_and_ours_does_not():
    batches = heavy_batches()
    orders = [batches, batches[::-1], batches[8:] + batches[:8], batches[::2] + batches[1::2]]
    theirs = [torch_histogram_range(order, 8)[1] for order in orders]
    ours = [histogram(observe(*order), 8) for order in orders]
    assert max(theirs) > 1.1 * min(theirs) and len(set(ours)) == 1


@needs_torch_ao
def test_moving_average_of_the_notebook_is_pytorchs():
    tq = pytest.importorskip("torch.ao.quantization")
    cells = jupytext.read(CHECKOUT / "notebooks" / "04_observers.py").cells
    source = next(c.source for c in cells if "def moving_average" in c.source)
    statements = ast.parse(source).body
    function = next(s for s in statements if getattr(s, "name", "") == "moving_average")
    names = {}
    exec(ast.unparse(function), names)
    for batches in (heavy_batches(), heavy_batches()[::-1]):
        observer = tq.MovingAverageMinMaxObserver(averaging_constant=0.01)
        for batch in batches:
            observer(batch)
        expected = observer.min_val.item(), observer.max_val.item()
        assert names["moving_average"](batches) == pytest.approx(expected, rel=1e-5)
    one = [torch.tensor([0.0, 1.0])] + [torch.zeros(2)] * 31
    kept = names["moving_average"](one)[1]
    assert kept == pytest.approx(0.99**31) and kept == pytest.approx(0.73, abs=0.005)
