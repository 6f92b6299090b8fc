"""Every operation of a quantized network in integers: codes in, an int32 accumulator, codes out. The reference, made to be read.

    acc  = accumulate(*codes)                                       exact: bounds are checked before anything runs
    code = clamp(zero_point + round(acc * M), low, high)            M in fixed point, see fixedpoint.py

A clamp behind the operation (ReLU, ReLU6, hard tanh) is nothing but tighter `low` and `high`: rounding is monotone, so clamping the codes
and clamping the reals give the same. Jacob et al. 2018 (arXiv:1712.05877).
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import nn

from quantlab.affine import QParams, quantize_tensor
from quantlab.integer.fixedpoint import INT32_MAX, fixed_point, multiply, requantize, signed_bits
from quantlab.system.errors import UserError

ADD_SHIFT = 20  # fractional bits of an add's operands, as in TensorFlow Lite: 9-bit differences of codes stay below 2^28


@dataclasses.dataclass(frozen=True)
class Grid:
    """Codes as an operation stores them: those of `q`, less `offset` (128 where unsigned 8-bit codes sit in an int8), within low..high."""

    q: QParams
    offset: int
    low: int
    high: int

    @classmethod
    def of(cls, q, offset=0):
        return cls(q.to("cpu"), offset, q.qmin - offset, q.qmax - offset)

    @property
    def scale(self):
        return self.q.scale.double().item()

    @property
    def zero_point(self):
        return self.q.zero_point.item() - self.offset

    @property
    def extent(self):
        """(least, largest) value of code - zero_point."""
        return self.q.qmin - self.offset - self.zero_point, self.q.qmax - self.offset - self.zero_point

    def clamped(self, low, high):
        """The same codes after a clamp of the reals to [low, high]: both ends are coded as any other value is."""
        low, high = (int(quantize_tensor(torch.tensor(float(end)), self.q)) - self.offset for end in (low, high))
        return dataclasses.replace(self, low=max(self.low, low), high=min(self.high, high))


class Operation(nn.Module):
    """What all operations share: the requantization behind the accumulator.

    out: Grid of the result, None for the logits, which stay int32. unit: float64, what 1 in the accumulator stands for, broadcast against
    it. extent: (least, largest) possible accumulator and partial sum, ints or tensors per channel. Raises UserError where 32 bits are too few.
    """

    kind, weight_bits, bias_bits = "", None, None

    def __init__(self, name, out, unit, extent, rounding):
        super().__init__()
        self.name, self.out, self.rounding = name, out, rounding
        self.unit = torch.as_tensor(unit, dtype=torch.float64)
        low, high = (torch.as_tensor(end, dtype=torch.float64) for end in extent)
        self.accumulator_bits = signed_bits(int(low.min()), int(high.max()))
        if self.accumulator_bits > 32:
            raise UserError(f"{name}: the accumulator needs {self.accumulator_bits} bits and has 32; use fewer bits or split the layer")
        if out is not None:
            self._set_multiplier(torch.maximum(-low, high))

    def _set_multiplier(self, largest):
        real = self.unit / self.out.scale
        try:
            multiplier, shift = fixed_point(real)
        except UserError as error:
            raise UserError(f"{self.name}: {error}") from None
        if (largest.view(-1, *[1] * (real.dim() - 1)) * 2.0 ** shift.clamp(min=0) > INT32_MAX).any():
            raise UserError(f"{self.name}: requantized values leave int32; its output scale {self.out.scale:g} is too small")
        self.register_buffer("multiplier", multiplier)
        self.register_buffer("shift", shift)
        for end in ("zero_point", "low", "high"):
            self.register_buffer(end, torch.tensor(getattr(self.out, end), dtype=torch.int32))

    def store(self, acc):
        """int32 accumulator -> int32 codes."""
        return requantize(acc, self.multiplier, self.shift, self.zero_point, self.low, self.high, self.rounding)

    def forward(self, *codes):
        acc = self.accumulate(*codes)
        return acc if self.out is None else self.store(acc)

    def macs(self, out_shape):
        """Multiplications of weights with codes for an output of that shape."""
        return 0


# ---- Layers -----------------------------------------------------------------------------------------------------------------


class Layer(Operation):
    """acc = sum (code - zero_point) * weight + bias; weight of at most 9 bits and bias are int32, bias in units of s_in * s_w."""

    def __init__(self, name, layer, grid_in, out, rounding):
        q, scale_in, real = layer.weight_qparams.to("cpu"), grid_in.scale, layer.weight.detach().cpu()
        scale, zero_point = q.broadcast(real.dim())
        weight = quantize_tensor(real, q) - zero_point
        if not torch.allclose(scale * weight, real, rtol=1e-4, atol=0):
            raise UserError(f"{name}: its weights are not the values of its codes; give to_integer what quantize returned")
        unit = (scale_in * q.scale.double()).expand(len(weight))
        bias = torch.zeros(len(weight)) if layer.bias is None else layer.bias.detach().cpu()
        bias = torch.round(bias.double() / unit)
        if not (bias.abs() <= INT32_MAX).all():
            raise UserError(f"{name}: a bias of {bias.abs().max():.3g} units of s_in * s_w does not fit in int32; its weights are too small")
        negative, positive = (weight.clamp(**end).flatten(1).sum(1, dtype=torch.int64) for end in ({"max": 0}, {"min": 0}))
        least, most = grid_in.extent  # least <= 0 <= most
        low, high = positive * least + negative * most + bias.clamp(max=0), positive * most + negative * least + bias.clamp(min=0)
        super().__init__(name, out, unit.view(-1, *[1] * (weight.dim() - 2)), (low, high), rounding)
        self.zero_point_in, self.weight_bits = grid_in.zero_point, q.bits
        self.bias_bits = signed_bits(int(bias.min()), int(bias.max()))
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias.int())

    def macs(self, out_shape):
        return out_shape[1:].numel() * self.weight[0].numel()


class Conv(Layer):
    """Convolution; padding is the code that stands for zero."""

    kind = "conv"

    def __init__(self, name, layer, *rest):
        super().__init__(name, layer, *rest)
        self.options = {"stride": layer.stride, "padding": layer.padding, "groups": layer.groups}
        self.dilation = layer.dilation

    def accumulate(self, x):
        return F.conv2d(x.int() - self.zero_point_in, dilate(self.weight, self.dilation), self.bias, **self.options)


def dilate(weight, dilation):
    """A kernel with zeros between its taps: torch has no dilated convolution of integers."""
    (kh, kw), (dh, dw) = weight.shape[2:], dilation
    spread = weight.new_zeros(*weight.shape[:2], dh * (kh - 1) + 1, dw * (kw - 1) + 1)
    spread[:, :, ::dh, ::dw] = weight
    return spread


class Linear(Layer):
    kind = "linear"

    def accumulate(self, x):
        return (x.int() - self.zero_point_in) @ self.weight.t() + self.bias


class Affine(Operation):
    """A BatchNorm that cannot be folded: acc = (code - zero_point) * weight + bias, all of them per channel (dimension 1).

    One unit a channel, the finest that keeps |weight| <= 2^20 and |bias| <= 2^30, so that neither costs accuracy.
    """

    kind = "affine"

    def __init__(self, name, bn, grid_in, out, rounding, dim=4):
        mean, variance = bn.running_mean.double().cpu(), bn.running_var.double().cpu()
        factor = (variance + bn.eps).rsqrt() * (1 if bn.weight is None else bn.weight.detach().double().cpu())
        bias = (0 if bn.bias is None else bn.bias.detach().double().cpu()) - mean * factor
        step = grid_in.scale * factor
        unit = torch.maximum(step.abs() / 2**20, bias.abs() / 2**30).clamp(min=2.0**-100)
        weight, bias = (torch.round(v / unit).long() for v in (step, bias))
        ends = torch.stack([weight * end for end in grid_in.extent])
        shape = [-1] + [1] * (dim - 2)
        extent = (ends.amin(0) + bias.clamp(max=0), ends.amax(0) + bias.clamp(min=0))
        super().__init__(name, out, unit.view(shape), extent, rounding)
        self.zero_point_in = grid_in.zero_point
        self.bias_bits = signed_bits(int(bias.min()), int(bias.max()))
        self.weight_bits = signed_bits(int(weight.min()), int(weight.max()))
        self.register_buffer("weight", weight.int().view(shape))
        self.register_buffer("bias", bias.int().view(shape))

    def accumulate(self, x):
        return (x.int() - self.zero_point_in) * self.weight + self.bias


# ---- Without weights --------------------------------------------------------------------------------------------------------


class Requantize(Operation):
    """Codes of one grid to codes of another: between widths, and for every part of a concat."""

    kind = "requantize"

    def __init__(self, name, grid_in, out, rounding):
        super().__init__(name, out, grid_in.scale, grid_in.extent, rounding)
        self.zero_point_in = grid_in.zero_point

    def accumulate(self, x):
        return x.int() - self.zero_point_in


def add_rescaled(a, b, zero_points, multipliers, shifts, rounding):
    """Both operands with 20 fractional bits on the common scale 2 * max(s_a, s_b), and their sum; int32."""
    terms = [multiply((x.int() - z) << ADD_SHIFT, q, s, rounding) for x, z, q, s in zip((a, b), zero_points, multipliers, shifts)]
    return (terms[0] + terms[1]).int()


class Add(Operation):
    """The residual add as TensorFlow Lite computes it: operands shifted left by 20, rescaled to 2 * max(s_a, s_b), added, requantized."""

    kind = "add"

    def __init__(self, name, grids_in, out, rounding):
        scales = [g.scale for g in grids_in]
        common = 2 * max(scales)
        largest = sum(max(-g.extent[0], g.extent[1]) * 2**ADD_SHIFT * g.scale / common + 1 for g in grids_in)
        super().__init__(name, out, common / 2**ADD_SHIFT, (-largest, largest), rounding)
        multipliers, shifts = fixed_point(torch.tensor(scales, dtype=torch.float64) / common)
        self.register_buffer("multipliers", multipliers)
        self.register_buffer("shifts", shifts)
        self.register_buffer("zero_points", torch.tensor([g.zero_point for g in grids_in], dtype=torch.int32))

    def accumulate(self, a, b):
        return add_rescaled(a, b, self.zero_points, self.multipliers, self.shifts, self.rounding)
