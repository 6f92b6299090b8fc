"""Arithmetic against two independent oracles: torch's fake-quantize kernels, bit by bit, and exact
rational numbers.
"""

from fractions import Fraction

import pytest
import torch
from conftest import fuzz
from hypothesis import given
from hypothesis import strategies as st

import quantlab as ql
from quantlab.affine import MIN_SCALE, code_range

BITS = st.integers(2, 8)
REALS = st.floats(-1e6, 1e6, width=32, allow_subnormal=False)


@st.composite
def ranges(draw):
    low, high = sorted((draw(REALS), draw(REALS)))
    return low, high


def exact_code(x, scale, zero_point, qmin, qmax):
    """clamp(zero_point + round_half_even(x / scale)) in rational arithmetic; Python's round of a
    Fraction rounds half to even.
    """
    return min(max(zero_point + round(Fraction(x) / Fraction(scale)), qmin), qmax)


@given(ranges(), BITS, st.booleans(), st.booleans(), st.integers(0, 2**32 - 1))
@fuzz(150)
def test_round_trip_is_torchs_kernel_bit_by_bit(limits, bits, symmetric, signed, seed):
    q = ql.choose_qparams(*limits, bits, symmetric=symmetric, signed=signed)
    spread = max(abs(v) for v in (*limits, 1.0))
    x = torch.randn(4096, generator=torch.Generator().manual_seed(seed)) * spread
    ties = (torch.arange(-300, 300) + 0.5) * q.scale
    x = torch.cat([x, ties, torch.zeros(1), torch.tensor(limits)])
    ours = ql.dequantize(ql.quantize_tensor(x, q), q)
    scale, zero_point = q.scale.item(), q.zero_point.item()
    kernel = torch.fake_quantize_per_tensor_affine(x, scale, zero_point, q.qmin, q.qmax)
    assert torch.equal(ours, kernel)
    assert torch.equal(ours, ql.fake_quantize(x, q))
    assert torch.equal(ours, ql.fake_quantize(x.requires_grad_(), q))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("axis", [0, 1, 3])
@pytest.mark.parametrize("symmetric", [True, False])
def test_per_channel_round_trip_is_torchs_kernel_bit_by_bit(bits, axis, symmetric):
    x = torch.randn(5, 6, 7, 8) * torch.logspace(-3, 3, 8)
    dims = [d for d in range(4) if d != axis]
    q = ql.choose_qparams(x.amin(dims), x.amax(dims) * 0.7, bits, symmetric=symmetric, axis=axis)
    expected = torch.fake_quantize_per_channel_affine(
        x, q.scale, q.zero_point, axis, q.qmin, q.qmax)
    assert torch.equal(ql.dequantize(ql.quantize_tensor(x, q), q), expected)
    assert torch.equal(ql.fake_quantize(x, q), expected)
    assert torch.equal(ql.fake_quantize(x.requires_grad_(), q), expected)


@given(ranges(), BITS, st.booleans(), st.lists(REALS, min_size=1, max_size=40))
@fuzz(200)
def test_codes_are_the_exact_ones_except_within_two_ulp_of_a_tie(limits, bits, symmetric, values):
    q = ql.choose_qparams(*limits, bits, symmetric=symmetric)
    x = torch.tensor(values, dtype=torch.float32)
    scale, zero_point = q.scale.item(), q.zero_point.item()
    for value, code in zip(x.tolist(), ql.quantize_tensor(x, q).tolist()):
        if code == exact_code(value, scale, zero_point, q.qmin, q.qmax):
            continue
        ratio = Fraction(value) / Fraction(scale)
        size = torch.tensor(abs(float(ratio)))
        ulp = Fraction(float(torch.nextafter(size, torch.tensor(torch.inf)) - abs(float(ratio))))
        distance = abs(ratio - (ratio.__floor__() + Fraction(1, 2)))
        assert distance <= 2 * max(ulp, Fraction(2) ** -149)


def test_exact_rational_mismatches_are_rare():
    """The exception above, counted: one reciprocal in float32 instead of a division moves almost no
    code.
    """
    x = torch.randn(20_000)
    q = ql.choose_qparams(-3.3, 2.9, 8)
    codes = ql.quantize_tensor(x, q).tolist()
    exact = [exact_code(v, q.scale.item(), q.zero_point.item(), q.qmin, q.qmax) for v in x.tolist()]
    assert sum(a != b for a, b in zip(codes, exact)) <= 2


@given(ranges(), BITS, st.booleans(), st.booleans())
@fuzz(200)
def test_zero_is_exact_and_the_range_is_covered(limits, bits, symmetric, signed):
    q = ql.choose_qparams(*limits, bits, symmetric=symmetric, signed=signed)
    assert q.bits == bits
    assert q.qmin <= q.zero_point <= q.qmax
    assert ql.fake_quantize(torch.zeros(3), q).abs().max() == 0
    if signed or limits[0] >= 0:
        inside = torch.linspace(*limits, 101).clamp(*limits)
        error = (ql.fake_quantize(inside, q) - inside).abs().max()
        # an affine zero-point, rounded, may move an end by half a step
        step = q.scale * (1.0 if not symmetric else 0.5)
        assert error <= step * 1.001


def test_narrow_symmetric_range_negates_exactly():
    for bits in range(2, 9):
        qmin, qmax = code_range(bits, symmetric=True, signed=True)
        assert qmin == -qmax == 1 - 2 ** (bits - 1)
    x = torch.randn(1000)
    q = ql.choose_qparams(-2.0, 2.0, 3, symmetric=True)
    assert torch.equal(ql.fake_quantize(-x, q), -ql.fake_quantize(x, q))


def test_published_example_of_the_original():
    """The original's quantized ReLU: [-1, 1] has scale 2/255 and zero-point 128, [0, 1] scale 1/255
    and zero-point 0; code 192 means two values.
    """
    before, after = ql.choose_qparams(-1, 1, 8), ql.choose_qparams(0, 1, 8)
    assert before.scale.item() == pytest.approx(2 / 255) and before.zero_point == 128
    assert after.scale.item() == pytest.approx(1 / 255) and after.zero_point == 0
    code = torch.tensor([192])
    assert ql.dequantize(code, before).item() == pytest.approx(64 * 2 / 255)
    assert ql.dequantize(code, after).item() == pytest.approx(192 / 255)


@pytest.mark.parametrize("symmetric", [True, False])
def test_constant_all_zero_and_tiny_tensors_work(symmetric):
    zero = ql.choose_qparams(0.0, 0.0, 4, symmetric=symmetric)
    assert zero.scale == 1 and ql.fake_quantize(torch.zeros(4), zero).abs().max() == 0
    constant = ql.choose_qparams(2.5, 2.5, 4, symmetric=symmetric)
    assert ql.fake_quantize(torch.full((4,), 2.5), constant).sub(2.5).abs().max() < 1e-6
    tiny = ql.choose_qparams(-1e-42, 1e-42, 4, symmetric=symmetric)
    assert tiny.scale == MIN_SCALE
    assert torch.isfinite(ql.fake_quantize(torch.tensor([1e-42]), tiny)).all()


@pytest.mark.parametrize("limits", [(float("nan"), 1), (0, float("inf")), (1, -1)])
def test_impossible_ranges_are_refused(limits):
    with pytest.raises(ql.UserError, match="not finite|empty"):
        ql.choose_qparams(*limits, 8)


@pytest.mark.parametrize("bits", [1, 9, 0, -4, 4.0, "4", True, None])
def test_bits_outside_2_to_8_are_refused(bits):
    with pytest.raises(ql.UserError, match="from 2 to 8"):
        ql.choose_qparams(-1, 1, bits)
