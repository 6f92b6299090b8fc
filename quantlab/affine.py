"""Affine quantization: a real number is scale * (code - zero_point).

    code  = clamp(zero_point + round_half_even(x * (1 / scale)), qmin, qmax)
    x_hat = scale * (code - zero_point)

Jacob et al. 2018 (arXiv:1712.05877), eq. 1. The reciprocal is taken once, in float32, as torch's
fake-quantize kernels do; the result is identical to theirs, which the tests prove. Zero is always
represented exactly.
"""

import dataclasses

import torch

from quantlab.system.errors import UserError, checked

MIN_BITS, MAX_BITS = 2, 8
MIN_SCALE = 2.0**-60  # so that s_in * s_w, the scale of a bias, is still a normal float32


@dataclasses.dataclass(frozen=True)
class QParams:
    """How one tensor is coded.

    scale: float32, [] for a whole tensor or [C] per channel. zero_point: int32, same shape. Codes
    are the integers qmin..qmax. axis: the channel dimension of the coded tensor, or None.
    """

    scale: torch.Tensor
    zero_point: torch.Tensor
    qmin: int
    qmax: int
    axis: int | None = None

    def __post_init__(self):
        tensors = {isinstance(v, torch.Tensor) for v in (self.scale, self.zero_point)}
        whole = {type(n) for n in (self.qmin, self.qmax, 0 if self.axis is None else self.axis)}
        if tensors != {True} or whole != {int} or self.qmin >= self.qmax:
            raise UserError("QParams has tensors scale and zero_point, integers qmin < qmax and an "
                            "integer axis or None; choose_qparams makes one")

    @property
    def bits(self):
        """Width in bits of a code."""
        return max(-self.qmin - 1, self.qmax).bit_length() + (self.qmin < 0)

    def broadcast(self, dim):
        """(scale, zero_point), shaped to broadcast against a tensor of `dim` dimensions."""
        shape = [1] * dim
        if self.axis is not None:
            shape[self.axis] = -1
            return self.scale.view(shape), self.zero_point.view(shape)
        return self.scale, self.zero_point

    def to(self, device):
        scale, zero_point = self.scale.to(device), self.zero_point.to(device)
        return dataclasses.replace(self, scale=scale, zero_point=zero_point)


def check_bits(bits, name="bits"):
    """`bits` itself, or UserError when it is not an integer from 2 to 8."""
    if not isinstance(bits, int) or isinstance(bits, bool) or not MIN_BITS <= bits <= MAX_BITS:
        raise UserError(f"{name}={bits!r}: a width is an integer from {MIN_BITS} to {MAX_BITS}")
    return bits


def code_range(bits, symmetric, signed):
    """(qmin, qmax): 0..2^b-1; symmetric and signed: narrow, so that -x has a code where x has."""
    if symmetric and signed:
        return 1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1
    return 0, 2**bits - 1


@checked
def choose_qparams(low, high, bits, *, symmetric=False, signed=True, axis=None):
    """QParams that cover [low, high], widened to include zero.

    low, high: numbers, or tensors [] or [C]; real values, any float dtype. bits: 2..8. symmetric:
    zero_point 0, scale = max(|low|, |high|) / qmax; with signed=False for a tensor that is never
    negative (codes 0..2^b-1). Otherwise affine: scale = (high - low) / (2^b - 1), zero_point =
    round(-low / scale). An all-zero range gets scale 1. Raises UserError for a range that is empty
    (low > high) or not finite, or for bits outside 2..8.
    """
    check_bits(bits)
    low, high = (torch.as_tensor(v, dtype=torch.float64) for v in (low, high))
    if not (torch.isfinite(low).all() and torch.isfinite(high).all()):
        raise UserError(
            f"range [{low.min():g}, {high.max():g}] is not finite: the tensor holds NaN or "
            "infinite values; find where they arise")
    if (low > high).any():
        raise UserError(f"range [{low.max():g}, {high.min():g}] is empty: low must not exceed high")
    low, high = low.clamp(max=0), high.clamp(min=0)
    qmin, qmax = code_range(bits, symmetric, signed)
    extent = torch.maximum(-low if signed else high, high) if symmetric else high - low
    scale = extent / (qmax if symmetric else qmax - qmin)
    scale = torch.where(extent == 0, torch.ones_like(scale), scale.clamp(min=MIN_SCALE))
    zero_point = torch.zeros_like(low)
    if not symmetric:
        zero_point = (qmin - low / scale).round().clamp(qmin, qmax)
    return QParams(scale.float(), zero_point.int(), qmin, qmax, axis)


@checked
def quantize_tensor(x, q):
    """float32 tensor -> int32 codes of the same shape."""
    scale, zero_point = q.broadcast(x.dim())
    return (torch.round(x * (1.0 / scale)) + zero_point).clamp(q.qmin, q.qmax).int()


@checked
def dequantize(codes, q):
    """int32 codes -> float32 tensor of the same shape: scale * (code - zero_point)."""
    scale, zero_point = q.broadcast(codes.dim())
    return scale * (codes - zero_point)


@checked
def fake_quantize(x, q, into=None):
    """dequantize(quantize_tensor(x)) in four passes over memory; float32, same shape, a new tensor.

    into: a tensor to write it to, x itself for instance. Where a gradient is wanted, torch's kernel
    does it (straight-through inside the range); elsewhere it gives the same values 20 times slower.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        if q.axis is None:
            return torch.fake_quantize_per_tensor_affine(x, q.scale, q.zero_point, q.qmin, q.qmax)
        return torch.fake_quantize_per_channel_affine(
            x, q.scale, q.zero_point, q.axis, q.qmin, q.qmax)
    scale, zero_point = q.broadcast(x.dim())
    numbers = 1.0 / scale, q.qmin - zero_point, q.qmax - zero_point, scale
    if q.axis is None and not (x.is_cuda or torch.compiler.is_compiling()):  # no tensors: faster
        numbers = [number.item() for number in numbers]
    inverse, low, high, scale = numbers
    return torch.mul(x, inverse, out=into).round_().clamp_(low, high).mul_(scale)
