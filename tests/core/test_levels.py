"""How many values a weight can take: 2^b - 1 in the narrow range, else 2^b with the zero-point that
errs least; the search against exact fractions.
"""

import fractions

import pytest
import torch
from conftest import fuzz
from hypothesis import given
from hypothesis import strategies as st

import quantlab as ql
from quantlab.ptq import choose_weight_qparams

STEPS = [fractions.Fraction(i, 100) for i in range(5, 101)]


def exact_error(values, step, zero_point, bits, p):
    """sum |error|^p of rounding to the nearest of all 2^b codes, in fractions."""
    low, high = -zero_point, 2**bits - 1 - zero_point
    codes = [min(max(round(value / step), low), high) for value in values]
    return sum(abs(code * step - value) ** p for code, value in zip(codes, values))


def one_more(values, bits, p):
    """The least exact error of the two grids with one code more on one side of zero, over every
    hundredth of the step that clips nothing.
    """
    errors, half = [], 2 ** (bits - 1)
    for below, above in ((half, half - 1), (half - 1, half)):
        whole = max(-min(values) / below, max(values) / above)
        errors += [exact_error(values, whole * part, below, bits, p) for part in STEPS]
    return min(errors)


def own_range(values, bits, p):
    """The same of the grid whose zero-point the range itself decides."""
    low, high = min(*values, 0), max(*values, 0)
    step = (high - low) / (2**bits - 1)
    zero_point = min(max(round(-low / step), 0), 2**bits - 1)
    return min(exact_error(values, step * part, zero_point, bits, p) for part in STEPS)


@given(bits=st.integers(2, 4), p=st.sampled_from([2, 3]), seed=st.integers(0, 2**32 - 1))
@fuzz(20)
def test_the_search_is_as_good_as_every_grid_in_fractions(bits, p, seed):
    """Coarse, then fine: on a few values it may end in the second best hollow, hence the margin."""
    weight = torch.randn(6, 8, generator=torch.Generator().manual_seed(seed))
    weight[0] = weight[0].abs()
    q = choose_weight_qparams(
        weight, bits, ql.QuantConfig(bits, weight_symmetric=False, weight_norm=float(p)))
    ours = least = 0
    for row, scale, zero_point in zip(weight.tolist(), q.scale.tolist(), q.zero_point.tolist()):
        values = [fractions.Fraction(value) for value in row]
        ours += exact_error(values, fractions.Fraction(scale), zero_point, bits, p)
        least += min(one_more(values, bits, p), own_range(values, bits, p))
    assert ours <= least * fractions.Fraction(110, 100)


def test_each_of_the_three_grids_is_found_where_the_weights_lie_on_it():
    """Values that are codes of one grid alone lose nothing on it and something on the others."""
    for bits in range(2, 9):
        half = 2 ** (bits - 1)
        ends = [(-half, half - 1), (1 - half, half), (0, 2 * half - 1), (-half // 2, half + 1)]
        weight = torch.stack([torch.linspace(low, high, 2 * half).round() for low, high in ends])
        q = choose_weight_qparams(weight * 0.375, bits, ql.QuantConfig(weight_symmetric=False))
        assert q.zero_point[:3].tolist() == [half, half - 1, 0]
        assert torch.allclose(q.scale[:3], torch.tensor(0.375)), bits
        assert torch.allclose(ql.fake_quantize(weight * 0.375, q)[:3], weight[:3] * 0.375)
        assert (q.qmin, q.qmax, q.bits) == (0, 2**bits - 1, bits)


def test_an_outlier_does_not_decide_on_which_side_the_code_more_lies():
    """Shrunk as it lies, a range keeps the zero-point of its two ends: here 1 of 0..3."""
    most = torch.tensor([-2.0, -1, 0, 1]).repeat(30)
    weight = torch.stack([torch.cat([most, torch.tensor([3.5])]),
                          torch.cat([-most, torch.tensor([-3.5])])])
    config = ql.QuantConfig(weight_symmetric=False, weight_norm=2.0)
    q = choose_weight_qparams(weight, 2, config)
    assert q.zero_point.tolist() == [2, 1]
    assert (ql.fake_quantize(weight, q) - weight).abs()[:, :-1].max() < 0.05


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_more_levels_err_less_and_zero_stays_exact(bits, per_channel):
    weight = torch.randn(64, 72)
    error = {}
    for symmetric in (True, False):
        config = ql.QuantConfig(
            weight_norm=2.0, weight_symmetric=symmetric, per_channel=per_channel)
        q = choose_weight_qparams(weight, bits, config)
        assert q.qmax - q.qmin + 1 == 2**bits - symmetric and q.zero_point.any() != symmetric
        assert q.scale.shape == ((64,) if per_channel else ())
        error[symmetric] = (ql.fake_quantize(weight, q) - weight).square().sum().item()
        assert not ql.fake_quantize(torch.zeros_like(weight), q).any()
    # of 1 / (2^b - 1) finer steps, squared, this much at the least
    assert error[False] < {2: 0.85, 3: 0.9, 4: 0.95}[bits] * error[True]


def test_the_whole_range_is_the_channel_s_own():
    weight = torch.randn(8, 9)
    config = ql.QuantConfig(weight_symmetric=False, weight_observer="minmax")
    for bits in range(2, 9):
        q = choose_weight_qparams(weight, bits, config)
        expected = ql.choose_qparams(weight.amin(1), weight.amax(1), bits, axis=0)
        assert torch.equal(q.scale, expected.scale)
        assert torch.equal(q.zero_point, expected.zero_point)


@pytest.mark.parametrize("bits, per_channel", [(2, True), (2, False), (8, True), (8, False)])
def test_a_weight_of_zeros_has_a_scale(bits, per_channel):
    config = ql.QuantConfig(bits, 8, per_channel=per_channel, weight_symmetric=False)
    q = choose_weight_qparams(torch.zeros(3, 4), bits, config)
    assert (q.scale == 1).all() and not ql.fake_quantize(torch.zeros(3, 4), q).any()
