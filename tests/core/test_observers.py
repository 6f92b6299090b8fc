"""Statistics: exact counts whatever the order, against a two-pass reference. Range setters: against
the optimum of their own criterion.
"""

import functools
import math

import numpy as np
import pytest
import torch
from conftest import fuzz
from hypothesis import given
from hypothesis import strategies as st

import quantlab as ql
from quantlab import observers
from quantlab.edgestats import MIN_BINS, EdgeStats
from quantlab.observers import (
    OBSERVERS,
    aciq_gauss,
    aciq_laplace,
    entropy,
    histogram,
    mse,
    percentile,
    quantization_error,
    weight_range,
)
from quantlab.system.counting import PIECE


def observe(*tensors):
    stats = EdgeStats()
    for tensor in tensors:
        stats.update(tensor)
    return stats


def same(a, b):
    facts = ("level", "first", "zeros", "count", "minimum", "maximum")
    if any(getattr(a, name) != getattr(b, name) for name in facts):
        return False
    return (a.bins is None and b.bins is None) or torch.equal(a.bins, b.bins)


def normal(n, seed):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


SCALES = st.lists(st.floats(-60, 60), min_size=1, max_size=6)


@given(SCALES, st.booleans(), st.randoms(use_true_random=False))
@fuzz(60)
def test_counts_do_not_depend_on_order_or_batching_and_merge_by_addition(exponents, relu, random):
    batches = [normal(257, i) * 2.0**e for i, e in enumerate(exponents)]
    batches = [b.relu() for b in batches] if relu else batches
    together = observe(torch.cat(batches))
    shuffled = list(batches)
    random.shuffle(shuffled)
    assert same(observe(*shuffled), together)
    cut = random.randint(0, len(shuffled))
    assert same(observe(*shuffled[:cut]).merge(observe(*shuffled[cut:])), together)


@given(SCALES)
@fuzz(40)
def test_counts_agree_with_a_two_pass_reference(exponents):
    values = torch.cat([normal(500, i) * 2.0**e for i, e in enumerate(exponents)])
    values = torch.cat([values, torch.zeros(17), -torch.zeros(3)])
    stats = observe(*values.split(100))
    assert stats.zeros == 20 and stats.count == len(values) == int(stats.bins.sum()) + stats.zeros
    assert (stats.minimum, stats.maximum) == (values.min().item(), values.max().item())
    # Python floats: division by a power of two is exact
    index = [math.ceil(v / stats.width) - 1 - stats.first for v in values.tolist() if v != 0]
    expected = torch.bincount(torch.tensor(index), minlength=len(stats.bins))
    assert torch.equal(stats.bins, expected)


@pytest.mark.parametrize("shift", [0.0, -0.3, -5.0])
def test_large_tensors_are_counted_in_pieces_on_several_threads(shift):
    values = torch.randn(3 * PIECE + 77).relu() + shift
    values[::5] = 0
    values[1::7] = torch.round(values[1::7] * 8) / 8  # many exactly on the edge of a bin
    stats, threads = observe(values.view(1, -1)), torch.get_num_threads()
    index = np.ceil(values.double().numpy() / stats.width).astype(np.int64) - 1 - stats.first
    assert stats.zeros == int((values == 0).sum()) and threads == torch.get_num_threads()
    expected = np.bincount(index[values.numpy() != 0], minlength=len(stats.bins))
    assert np.array_equal(stats.bins.numpy(), expected)
    assert same(observe(*values.split(1000)), stats)
    with torch.inference_mode():
        assert same(observe(values), stats)
    assert same(observe(values), stats), "what one mode leaves behind serves the other"


@given(st.floats(-80, 80), st.floats(0, 1))
@fuzz(60)
def test_at_least_2048_bins_over_the_range_and_constant_memory(exponent, balance):
    values = (torch.rand(1000) - balance) * 2.0**exponent
    stats = observe(values)
    assert MIN_BINS <= len(stats.bins) <= 2 * MIN_BINS + 2
    assert stats.width == 2.0**stats.level


def test_half_precision_and_empty_batches():
    x = torch.randn(1000)
    assert same(observe(x.bfloat16()), observe(x.bfloat16().float()))
    assert same(observe(x, torch.empty(0, 3)), observe(x))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused_and_counted(bad):
    with pytest.raises(ql.UserError, match="1 of 3 values are NaN or infinite"):
        observe(torch.tensor([1.0, bad, 2.0]))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("observer", OBSERVERS.values(), ids=OBSERVERS)
def test_all_zero_and_constant_edges_work(observer, bits):
    for values in (torch.full((50,), value) for value in (0.0, 3.0, -3.0, 1e-40)):
        low, high = observer(observe(values), bits)
        q = ql.choose_qparams(low, high, bits)
        assert torch.allclose(ql.fake_quantize(values, q), values, rtol=0.01, atol=1e-6)


@pytest.mark.parametrize("q", [90.0, 99.0, 99.99])
def test_percentile_is_the_quantile_within_a_bin(q):
    for values in (torch.randn(50_000), torch.randn(50_000).relu(), torch.randn(50_000) ** 3):
        stats = observe(values)
        low, high = percentile(stats, 8, q=q)
        assert abs(high - torch.quantile(values.double(), q / 100).item()) <= 2 * stats.width
        expected = min(torch.quantile(values.double(), 1 - q / 100).item(), 0.0)
        assert abs(low - expected) <= 2 * stats.width


def brute_force(values, bits, symmetric, steps=120):
    """Least mean squared error of quantizing the raw values themselves over a dense grid of ranges,
    by torch's kernel.
    """
    low, high = min(values.min().item(), 0.0), max(values.max().item(), 0.0)
    shares = [i / steps for i in range(1, steps + 1)]
    pairs = [(a, a) for a in shares]
    if not symmetric and low != 0:
        pairs = [(a, b) for a in shares[4::3] for b in shares[4::3]]
    best = math.inf
    for a, b in pairs:
        q = ql.choose_qparams(low * a, high * b, bits, symmetric=symmetric, signed=low < 0)
        best = min(best, (ql.fake_quantize(values, q) - values).square().mean().item())
    return best


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("shape", ["gauss", "relu", "heavy", "skewed"])
def test_histogram_search_reaches_the_brute_force_optimum(bits, shape):
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(1))
    values = {"gauss": x, "relu": x.relu(), "heavy": x**3, "skewed": x.exp() - 1}[shape]
    stats = observe(values)
    low, high = histogram(stats, bits)
    q = ql.choose_qparams(low, high, bits, signed=stats.minimum < 0)
    ours = (ql.fake_quantize(values, q) - values).square().mean().item()
    assert ours <= 1.01 * brute_force(values, bits, symmetric=False)
    low, high = histogram(stats, bits, symmetric=True)
    q = ql.choose_qparams(low, high, bits, symmetric=True, signed=stats.minimum < 0)
    ours = (ql.fake_quantize(values, q) - values).square().mean().item()
    assert ours <= 1.01 * brute_force(values, bits, symmetric=True)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("p", [2.0, 2.4])
def test_mse_reaches_the_optimum_of_its_own_criterion(bits, p):
    for values in (torch.randn(20_000) ** 3, torch.randn(20_000).relu()):
        stats = observe(values)

        def error(low, high):
            q = ql.choose_qparams(low, high, bits, signed=stats.minimum < 0)
            return (ql.fake_quantize(values, q) - values).abs().double().pow(p).mean().item()

        best = min(error(stats.minimum * s / 100, stats.maximum * s / 100) for s in range(1, 101))
        assert error(*mse(stats, bits, p=p)) <= 1.01 * best


@pytest.mark.parametrize("bits", [3, 4, 6])
@pytest.mark.parametrize("relu", [True, False])
def test_entropy_is_the_least_divergence_computed_the_slow_way(bits, relu):
    """The definition once more, with loops and Python floats, on a coarse histogram."""
    values = torch.randn(4000, generator=torch.Generator().manual_seed(2)) ** 3
    stats, bins = observe(values.relu() if relu else values), 96
    top = max(-stats.minimum, stats.maximum)
    centers, counts = stats.histogram()
    x = [0.0] * bins
    for center, count in zip(centers.tolist(), counts.tolist()):
        x[min(int(abs(center) / (top * (1 + 1e-9)) * bins), bins - 1)] += count
    levels = 2**bits if relu else 2 ** (bits - 1)
    best = (math.inf, None)
    for i in range(levels, bins + 1):
        p = x[: i - 1] + [sum(x[i - 1 :])]
        q = [0.0] * i
        for level in range(levels):
            members = [j for j in range(i) if j * levels // i == level and x[j] > 0]
            for j in members:
                q[j] = sum(x[m] for m in members) / len(members)
        if sum(q) == 0 or any(a > 0 and b == 0 for a, b in zip(p, q)):
            continue
        ratios = [(a / sum(p), b / sum(q)) for a, b in zip(p, q) if a > 0]
        divergence = sum(a * math.log(a / b) for a, b in ratios)
        best = min(best, (divergence, i))
    low, high = entropy(stats, bits, bins=bins)
    assert max(-low, high) == pytest.approx(top * best[1] / bins, rel=1e-6)


def test_aciq_has_the_published_constants():
    """Banner et al. 2019: the multiples of b and of sigma for 2 to 8 bits."""
    laplace = [2.83, 3.89, 5.03, 6.20, 7.41, 8.64, 9.89]
    gauss = [1.71, 2.15, 2.55, 2.93, 3.28, 3.61, 3.92]
    two_sided = torch.tensor([-1.0, 1.0] * 500 + [-100.0, 100.0])
    b, sigma = two_sided.abs().mean().item(), two_sided.std(correction=0).item()
    stats = observe(two_sided)
    for bits, (c_l, c_g) in enumerate(zip(laplace, gauss), start=2):
        assert aciq_laplace(stats, bits)[1] / b == pytest.approx(c_l, abs=0.02 * c_l)
        assert aciq_gauss(stats, bits)[1] / sigma == pytest.approx(c_g, abs=0.02 * c_g)
    one_sided = observe(two_sided.relu())
    high = aciq_laplace(one_sided, 3)[1]
    assert high / b == pytest.approx(laplace[2], rel=0.02), "one-sided: the next bit's value"


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_aciq_is_the_optimum_where_its_model_holds(bits):
    generator = torch.Generator().manual_seed(4)
    normal = torch.randn(200_000, generator=generator)
    uniform = torch.rand(200_000, generator=generator) - 0.5
    laplace = -uniform.sign() * torch.log1p(-2 * uniform.abs().clamp(max=0.4999999))
    for observer, values in ((aciq_gauss, normal), (aciq_laplace, laplace)):
        stats = observe(values)
        halves = [i / 20 for i in range(10, 200)]
        errors = quantization_error(stats, [-h for h in halves], halves, bits)
        ours = quantization_error(stats, *([v] for v in observer(stats, bits)), bits)
        assert ours <= 1.06 * errors.min(), "the model counts levels on a line, not a real grid"


def test_error_from_the_histogram_is_the_error_on_the_values():
    values = torch.randn(30_000)
    stats = observe(values)
    for bits in (2, 4, 6):
        q = ql.choose_qparams(-2.5, 2.0, bits)
        exact = (ql.fake_quantize(values, q) - values).square().mean().item()
        error = quantization_error(stats, [-2.5], [2.0], bits).item()
        assert error == pytest.approx(exact, rel=0.02)


def test_the_search_knows_the_number_of_levels():
    """PyTorch's observer looks for 256 levels whatever the width; ours clips more, the fewer there
    are.
    """
    stats = observe(torch.randn(100_000).relu())
    highs = [histogram(stats, bits)[1] for bits in (8, 6, 4, 3, 2)]
    assert highs == sorted(highs, reverse=True) and highs[-1] < 0.6 * highs[0]


def test_histogram_is_at_least_as_good_as_pytorchs_observer():
    tq = pytest.importorskip("torch.ao.quantization")
    values = torch.randn(40_000) ** 3
    theirs = tq.HistogramObserver(dtype=torch.quint8)
    theirs(values)
    scale, zero_point = theirs.calculate_qparams()
    x_hat = torch.fake_quantize_per_tensor_affine(values, scale.item(), zero_point.item(), 0, 255)
    error = (x_hat - values).square().mean().item()
    low, high = histogram(observe(values), 8)
    x_hat = ql.fake_quantize(values, ql.choose_qparams(low, high, 8))
    ours = (x_hat - values).square().mean().item()
    assert ours <= 1.01 * error


@pytest.mark.parametrize("p", [2.0, 2.4, 3.0])
@pytest.mark.parametrize("symmetric", [True, False])
def test_weight_search_is_per_channel_and_never_worse_than_the_whole_range(symmetric, p):
    weight = torch.randn(8, 4, 3, 3) * torch.logspace(-2, 2, 8).view(-1, 1, 1, 1)
    for bits in (2, 3, 4, 8):
        errors = {}
        for observer in ("minmax", "lp"):
            low, high = weight_range(weight, bits, observer=observer, p=p, symmetric=symmetric)
            q = ql.choose_qparams(low, high, bits, symmetric=symmetric, axis=0)
            errors[observer] = (ql.fake_quantize(weight, q) - weight).abs().pow(p).sum((1, 2, 3))
        assert (errors["lp"] <= errors["minmax"] * (1 + 1e-6)).all()
    low, high = weight_range(weight, 4, per_channel=False, observer="minmax")
    assert (low, high) == (weight.min().double(), weight.max().double())


def test_unknown_observers_are_refused_with_a_suggestion():
    with pytest.raises(ql.UserError, match="did you mean histogram"):
        ql.QuantConfig(observer="histgram")
    with pytest.raises(ql.UserError, match="use one of: minmax, lp"):
        weight_range(torch.randn(2, 2), 4, observer="entropic")
    assert observers.observer_name(functools.partial(percentile, q=99.9)) == "percentile(q=99.9)"
