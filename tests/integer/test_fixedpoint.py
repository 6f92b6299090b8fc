"""Fixed-point multiplication against exact rational arithmetic, over the whole int32 range, and
gemmlowp's published vectors.
"""

import math
from fractions import Fraction

import pytest
import torch
from conftest import fuzz
from hypothesis import example, given
from hypothesis import strategies as st

import quantlab as ql
from quantlab.integer import fixedpoint
from quantlab.integer.fixedpoint import INT32_MAX, INT32_MIN, fixed_point, multiply, signed_bits

int32 = st.integers(INT32_MIN, INT32_MAX)
mantissa = st.integers(2**30, 2**31 - 1)


def tensor(value):
    return torch.tensor(value, dtype=torch.int64)


def ties_up(x):
    return math.floor(x + Fraction(1, 2))


def ties_away(x):
    return int(math.copysign(1, x)) * ties_up(abs(x))


@given(int32, mantissa, st.integers(-31, 30))
@example(7984, 1583594044, -9)
@example(INT32_MIN, 2**31 - 1, 30)
@example(INT32_MAX, 2**31 - 1, -31)
@fuzz(1500)
def test_single_rounding_is_the_exact_product_rounded_once(x, q, shift):
    exact = Fraction(x) * q * Fraction(2) ** (shift - 31)
    assert multiply(tensor(x), tensor(q), tensor(shift)).item() == ties_up(exact)


@given(int32, mantissa, st.integers(-31, 30))
@example(INT32_MIN, 2**31 - 1, -31)
@example(-1, 2**30, 0)
@fuzz(1500)
def test_double_rounding_is_the_exact_product_rounded_twice(x, q, shift):
    x >>= max(shift, 0)  # so that x * 2^shift is an int32
    first = ties_up(Fraction(x * 2 ** max(shift, 0)) * q / 2**31)
    expected = ties_away(Fraction(first, 2 ** max(-shift, 0)))
    assert multiply(tensor(x), tensor(q), tensor(shift), "double").item() == expected


@given(int32, int32)
@example(INT32_MIN, INT32_MIN)
@example(INT32_MIN, INT32_MAX)
@example(-(2**30), 1)
@fuzz(800)
def test_doubling_high_mul(a, b):
    found = fixedpoint.doubling_high_mul(tensor(a), tensor(b)).item()
    assert found == min(ties_up(Fraction(a * b, 2**31)), INT32_MAX)
    # gemmlowp's own formula: a nudge, then a division that truncates
    nudged = a * b + (2**30 if a * b >= 0 else 1 - 2**30)
    truncated = abs(nudged) // 2**31 * (1 if nudged >= 0 else -1)
    assert a == b == INT32_MIN or found == truncated


@given(int32, st.integers(0, 31))
@example(INT32_MIN, 31)
@example(-3, 1)
@fuzz(800)
def test_division_by_a_power_of_two_rounds_ties_away_from_zero(x, exponent):
    found = fixedpoint.divide_by_power_of_two(tensor(x), tensor(exponent)).item()
    assert found == ties_away(Fraction(x, 2**exponent))


def test_the_published_vector():
    """TensorFlow Lite's example of the two modes disagreeing: the exact product is 11.499."""
    x, q, shift = tensor(7984), tensor(1583594044), tensor(-9)
    assert 11.4985 < float(Fraction(7984 * 1583594044, 2**40)) < 11.4995
    assert multiply(x, q, shift, "double").item() == 12
    assert multiply(x, q, shift, "single").item() == 11


@given(st.floats(2.0**-33, 2.0**30 - 1, exclude_max=True, allow_nan=False))
@example(1 - 2.0**-40)  # the mantissa rounds up to 2^31
@example(0.5)
@example(2.0**30 - 1.5)
@fuzz(800)
def test_fixed_point_is_within_half_a_unit_of_31_bits(real):
    q, shift = (int(v) for v in fixed_point(real))
    if q == 0:
        assert real < 2.0**-32 * (1 + 2.0**-30)
        return
    assert 2**30 <= q < 2**31 and -31 <= shift <= 30
    assert abs(Fraction(q) * Fraction(2) ** (shift - 31) / Fraction(real) - 1) <= Fraction(1, 2**31)


def test_a_mantissa_that_rounds_up_is_halved():
    q, shift = fixed_point(torch.tensor([1 - 2.0**-40, 0.75], dtype=torch.float64))
    assert q.tolist() == [2**30, 3 * 2**29] and shift.tolist() == [1, 0]


@pytest.mark.parametrize("real", [0.0, 2.0**-40, 5e-324])
def test_a_vanishing_multiplier_gives_zero(real):
    q, shift = fixed_point(real)
    for mode in ("single", "double"):
        assert multiply(tensor([INT32_MIN, INT32_MAX]), q, shift, mode).tolist() == [0, 0]


@pytest.mark.parametrize("real", [2.0**30, -0.1, float("nan"), float("inf"), 2.0**30 - 2.0**-23])
def test_a_multiplier_without_fixed_point_form(real):
    with pytest.raises(ql.UserError, match="no fixed-point form"):
        fixed_point(real)


def test_requantization_broadcasts_per_channel_and_clamps():
    acc = torch.tensor([[1000, -1000, 7], [100000, -100000, 8]])
    q, shift = fixed_point(torch.tensor([0.01, 0.02, 0.5], dtype=torch.float64))
    codes = fixedpoint.Requantization(q, shift, zero_point=10, low=0, high=255)(acc)
    assert codes.dtype == torch.int32
    assert codes.tolist() == [[20, 0, 14], [255, 0, 14]], "3.5 goes up, the bounds are clamped"


@given(int32, int32)
@fuzz(300)
def test_signed_bits(a, b):
    low, high = min(a, b), max(a, b)
    bits = signed_bits(low, high)
    assert -(2 ** (bits - 1)) <= low and high < 2 ** (bits - 1)
    assert bits == 1 or low < -(2 ** (bits - 2)) or high >= 2 ** (bits - 2)
