"""Multiplying an integer by a real number M without floating point.

    M = q * 2^(shift - 31), q an int32 with 31 significant bits
    single rounding   (x * q + 2^(30 - shift)) >> (31 - shift)                           ties up
    double rounding   SaturatingRoundingDoublingHighMul(x * 2^max(shift, 0), q)          ties up
                      then RoundingDivideByPOT by max(-shift, 0)             ties away from zero

Jacob et al. 2018 (arXiv:1712.05877), section 2.2, as gemmlowp (double) and TensorFlow Lite (single)
compute it. Products are int64.
"""

import dataclasses

import torch

from quantlab.system.errors import UserError

ROUNDINGS = ("single", "double")
INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1


def fixed_point(real):
    """(q, shift) of positive real multipliers: q = round(mantissa * 2^31) in [2^30, 2^31).

    real: a number or float64 tensor of any shape; q and shift are int32 tensors of that shape. A
    mantissa that rounds up to 2^31 is halved and its shift raised. Below 2^-32 the product with any
    int32 rounds to zero: q = 0. UserError outside [0, 2^30 - 1).
    """
    real = torch.as_tensor(real, dtype=torch.float64)
    if not (torch.isfinite(real) & (real >= 0) & (real < 2**30 - 1)).all():
        raise UserError(f"a multiplier from {real.min():g} to {real.max():g} has no fixed-point "
                        "form, which ends at 2^30 - 1: check the scales")
    mantissa, shift = torch.frexp(real)
    q = torch.floor(mantissa * 2**31 + 0.5).long()
    overflow = q == 2**31
    q = torch.where(overflow, q // 2, q)
    shift = torch.where(overflow, shift + 1, shift)
    vanishes = (shift < -31) | (q == 0)
    return torch.where(vanishes, 0, q).int(), torch.where(vanishes, 0, shift).int()


def doubling_high_mul(a, b):
    """round(a * b / 2^31), ties up, for int32 values; int64 result.

    INT32_MIN * INT32_MIN, the one product that does not fit, saturates.
    """
    return ((a.long() * b.long() + 2**30) >> 31).clamp(max=INT32_MAX)


def divide_by_power_of_two(x, exponent):
    """round(x / 2^exponent), ties away from zero; exponent 0..31, a tensor. int64 result."""
    x, exponent = x.long(), exponent.long()
    mask = (1 << exponent) - 1
    return (x >> exponent) + ((x & mask) > (mask >> 1) + (x < 0)).long()


def multiply(x, q, shift, rounding="single"):
    """round(x * q * 2^(shift - 31)) as int64; q and shift of `fixed_point`, broadcast against x.

    Exact for every int32 x; with double rounding x * 2^shift must still be an int32 where shift is
    positive.
    """
    x, q, shift = x.long(), q.long(), shift.long()
    if rounding == "single":
        return (x * q + (1 << (30 - shift))) >> (31 - shift)
    high = doubling_high_mul(x << shift.clamp(min=0), q)
    return divide_by_power_of_two(high, (-shift).clamp(min=0))


@dataclasses.dataclass(frozen=True)
class Requantization:
    """int32 accumulators -> int32 codes: clamp(zero_point + round(acc * M), low, high).

    multiplier, shift: int32 tensors of `fixed_point`, broadcast against acc. zero_point, low, high:
    of the codes, ints or int32 tensors []. rounding: "single" or "double".
    """

    multiplier: torch.Tensor
    shift: torch.Tensor
    zero_point: int
    low: int
    high: int
    rounding: str = "single"

    def __call__(self, acc):
        codes = multiply(acc, self.multiplier, self.shift, self.rounding) + self.zero_point
        return codes.clamp(self.low, self.high).int()


def check_rounding(rounding):
    """`rounding` itself, or UserError."""
    if rounding not in ROUNDINGS:
        raise UserError(f"rounding={rounding!r} is unknown; use one of: {', '.join(ROUNDINGS)}")
    return rounding


def signed_bits(low, high):
    """Width in bits of the two's-complement integer that holds everything from low to high."""
    return max((-low - 1).bit_length() if low < 0 else 0, high.bit_length() if high > 0 else 0) + 1
