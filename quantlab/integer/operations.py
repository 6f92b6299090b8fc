"""Every operation of a quantized network in integers: codes in, an int32 accumulator, codes out.

    acc  = accumulate(*codes)                            exact: bounds are checked beforehand
    code = clamp(zero_point + round(acc * M), low, high)      M in fixed point, see fixedpoint.py

This is the reference, made to be read. A clamp behind the operation (ReLU, ReLU6, hard tanh) is
nothing but tighter `low` and `high`: rounding is monotone, so clamping the codes and clamping the
reals give the same. Jacob et al. 2018 (arXiv:1712.05877).
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import nn

from quantlab.affine import QParams, quantize_tensor
from quantlab.integer.fixedpoint import Requantization, fixed_point, multiply, signed_bits
from quantlab.system.errors import UserError

# fractional bits of an add's operands, as in TensorFlow Lite: 9-bit differences of codes times 2^20
# stay below 2^28
ADD_SHIFT = 20


@dataclasses.dataclass(frozen=True)
class Grid:
    """Codes as an operation stores them: those of `q`, less `offset`, within low..high.

    offset: 128 where unsigned 8-bit codes sit in an int8, else 0.
    """

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
        """(min, max) of code - zero_point; min <= 0 <= max."""
        zero_point = self.q.zero_point.item()
        return self.q.qmin - zero_point, self.q.qmax - zero_point

    def code(self, real):
        """The code of a real number."""
        return quantize_tensor(torch.tensor(float(real)), self.q).item() - self.offset

    def clamped(self, low, high):
        """The same codes after a clamp of the reals to [low, high]."""
        low, high = max(self.low, self.code(low)), min(self.high, self.code(high))
        return dataclasses.replace(self, low=low, high=high)


class Operation(nn.Module):
    """What all operations share: the requantization behind the accumulator.

    out: Grid of the result, None for the logits, which stay int32. acc_scale: float64, the real
    value of 1 in the accumulator, broadcast against it. extent: (min, max) of accumulators and
    partial sums, ints or tensors per channel. UserError where 32 bits are too few.
    """

    kind, weight_bits, bias_bits = "", None, None

    def __init__(self, name, out, acc_scale, extent, rounding):
        super().__init__()
        self.name, self.out, self.rounding = name, out, rounding
        self.acc_scale = torch.as_tensor(acc_scale, dtype=torch.float64)
        low, high = (torch.as_tensor(bound, dtype=torch.float64) for bound in extent)
        self.accumulator_bits = signed_bits(int(low.min()), int(high.max()))
        if self.accumulator_bits > 32:
            raise UserError(f"{name}: the accumulator needs {self.accumulator_bits} bits and has "
                            "32; use fewer bits or split the layer")
        if out is not None:
            self._set_multiplier(torch.maximum(-low, high))

    def _set_multiplier(self, largest):
        """M = acc_scale / s_out; largest: the largest |acc|, float64 [1] or [C]."""
        try:
            multiplier, shift = fixed_point(self.acc_scale / self.out.scale)
        except UserError as error:
            raise UserError(f"{self.name}: {error}") from None
        largest = largest.view(-1, *[1] * (shift.dim() - 1))
        # double rounding first shifts to the left, which must not leave int32
        if (largest * 2.0 ** shift.clamp(min=0) > 2**31 - 1).any():
            raise UserError(f"{self.name}: requantized values leave int32; its output scale "
                            f"{self.out.scale:g} is too small")
        self.register_buffer("multiplier", multiplier)
        self.register_buffer("shift", shift)
        for name in ("zero_point", "low", "high"):
            value = torch.tensor(getattr(self.out, name), dtype=torch.int32)
            self.register_buffer(name, value)

    @property
    def requantization(self):
        """The Requantization of this operation's accumulators."""
        return Requantization(
            self.multiplier, self.shift, self.zero_point, self.low, self.high, self.rounding)

    def store(self, acc):
        """int32 accumulator -> int32 codes."""
        return self.requantization(acc)

    def forward(self, *codes):
        self.check(*codes)
        return self.compute(*codes)

    def check(self, *codes):
        """UserError for codes of a shape that the operation cannot take."""

    def compute(self, *codes):
        acc = self.accumulate(*codes)
        return acc if self.out is None else self.store(acc)

    def macs(self, out_shape):
        """Multiplications of weights with codes for an output of that shape."""
        return 0


# ---- Layers --------------------------------------------------------------------------------------


class Layer(Operation):
    """acc = sum (code - zero_point) * weight + bias; weight and bias are int32.

    layer: its module, which gives geometry and `weight_qparams`. codes: int32 codes of the weight;
    less their zero point they have at most 9 bits. bias: int32 codes at s_in * s_w, or None.
    """

    def __init__(self, name, layer, codes, bias, grid_in, out, rounding):
        q = layer.weight_qparams.to("cpu")
        weight = codes - q.broadcast(codes.dim())[1]
        bias = weight.new_zeros(len(weight)) if bias is None else bias
        acc_scale = (grid_in.scale * q.scale.double()).expand(len(weight))
        acc_scale = acc_scale.view(-1, *[1] * (weight.dim() - 2))
        super().__init__(name, out, acc_scale, _bounds(weight, bias, grid_in.extent), rounding)
        self.zero_point_in, self.weight_bits = grid_in.zero_point, q.bits
        self.codes_in = tuple(grid_in.zero_point + end for end in grid_in.extent)
        self.bias_bits = signed_bits(int(bias.min()), int(bias.max()))
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def macs(self, out_shape):
        return out_shape[1:].numel() * self.weight[0].numel()


def _bounds(weight, bias, extent):
    """(min, max) float64 [C] of every partial sum, whatever the order of its terms."""
    low, high = extent
    negative = weight.clamp(max=0).flatten(1).sum(1, dtype=torch.int64)
    positive = weight.clamp(min=0).flatten(1).sum(1, dtype=torch.int64)
    smallest = positive * low + negative * high + bias.clamp(max=0)
    largest = positive * high + negative * low + bias.clamp(min=0)
    return smallest, largest


class Conv(Layer):
    """Convolution; padding is the code that stands for zero."""

    kind = "conv"

    def __init__(self, name, layer, *rest):
        super().__init__(name, layer, *rest)
        self.options = {"stride": layer.stride, "padding": layer.padding, "groups": layer.groups}
        self.dilation = layer.dilation
        self.channels = layer.in_channels
        # left, right, top, bottom, also for "same"
        self.padding = layer._reversed_padding_repeated_twice

    def check(self, x):
        check_channels(self.name, x, 1, self.channels, dim=4)
        left, right, top, bottom = self.padding
        wide = x.shape[2] + top + bottom, x.shape[3] + left + right
        reach = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.weight.shape[2:])]
        if wide[0] < reach[0] or wide[1] < reach[1]:
            raise UserError(f"{self.name}: its kernel of {reach[0]}x{reach[1]} does not fit into "
                            f"{wide[0]}x{wide[1]} pixels; use larger images")

    def accumulate(self, x):
        weight = dilate(self.weight, self.dilation)
        return F.conv2d(x.int() - self.zero_point_in, weight, self.bias, **self.options)


def check_channels(name, x, axis, channels, dim=None):
    """UserError unless codes x have that many channels along `axis`, and `dim` dimensions."""
    if x.dim() != (dim or x.dim()) or x.shape[axis] != channels:
        raise UserError(f"{name} takes {channels} channels along dimension {axis}"
                        f"{f' of {dim}' if dim else ''}, not codes of shape {list(x.shape)}; pass "
                        "images such as the network was calibrated on")


def dilate(weight, dilation):
    """A kernel with zeros between its taps: torch has no dilated convolution of integers."""
    (kh, kw), (dh, dw) = weight.shape[2:], dilation
    spread = weight.new_zeros(*weight.shape[:2], dh * (kh - 1) + 1, dw * (kw - 1) + 1)
    spread[:, :, ::dh, ::dw] = weight
    return spread


class Linear(Layer):
    kind = "linear"

    def check(self, x):
        check_channels(self.name, x, -1, self.weight.shape[1])

    def accumulate(self, x):
        return (x.int() - self.zero_point_in) @ self.weight.t() + self.bias


class Affine(Operation):
    """A BatchNorm that cannot be folded: acc = (code - zero_point) * weight + bias, by channel.

    The scale of a channel's accumulator is the finest that keeps |weight| <= 2^20 and |bias| <=
    2^30, so that neither costs accuracy. dim: of the input, whose dimension 1 is the channels.
    """

    kind = "affine"

    def __init__(self, name, bn, grid_in, out, rounding, dim=4):
        mean, variance = bn.running_mean.double().cpu(), bn.running_var.double().cpu()
        gamma = 1 if bn.weight is None else bn.weight.detach().double().cpu()
        beta = 0 if bn.bias is None else bn.bias.detach().double().cpu()
        factor = (variance + bn.eps).rsqrt() * gamma
        offset = beta - mean * factor
        step = grid_in.scale * factor
        acc_scale = torch.maximum(step.abs() / 2**20, offset.abs() / 2**30).clamp(min=2.0**-100)
        weight = torch.round(step / acc_scale).long()
        bias = torch.round(offset / acc_scale).long()
        products = torch.stack([weight * bound for bound in grid_in.extent])
        extent = (products.amin(0) + bias.clamp(max=0), products.amax(0) + bias.clamp(min=0))
        shape = [-1] + [1] * (dim - 2)
        super().__init__(name, out, acc_scale.view(shape), extent, rounding)
        self.zero_point_in = grid_in.zero_point
        self.bias_bits = signed_bits(int(bias.min()), int(bias.max()))
        self.weight_bits = signed_bits(int(weight.min()), int(weight.max()))
        self.register_buffer("weight", weight.int().view(shape))
        self.register_buffer("bias", bias.int().view(shape))

    def check(self, x):
        check_channels(self.name, x, 1, len(self.weight), self.weight.dim() + 1)

    def accumulate(self, x):
        return (x.int() - self.zero_point_in) * self.weight + self.bias


# ---- Without weights -----------------------------------------------------------------------------


class Requantize(Operation):
    """Codes of one grid to codes of another: between widths, and for every part of a concat."""

    kind = "requantize"

    def __init__(self, name, grid_in, out, rounding):
        super().__init__(name, out, grid_in.scale, grid_in.extent, rounding)
        self.zero_point_in = grid_in.zero_point

    def accumulate(self, x):
        return x.int() - self.zero_point_in


class Add(Operation):
    """The residual add as TensorFlow Lite computes it.

    Operands are shifted left by 20, rescaled to 2 * max(s_a, s_b), added, requantized.
    """

    kind = "add"

    def __init__(self, name, grids_in, out, rounding):
        scales = torch.tensor([grid.scale for grid in grids_in], dtype=torch.float64)
        common = 2 * scales.max().item()
        largest = sum(max(-g.extent[0], g.extent[1]) * 2**ADD_SHIFT * g.scale / common + 1
                      for g in grids_in)
        super().__init__(name, out, common / 2**ADD_SHIFT, (-largest, largest), rounding)
        zero_points = torch.tensor([grid.zero_point for grid in grids_in], dtype=torch.int32)
        multipliers, shifts = fixed_point(scales / common)
        self.register_buffer("multipliers", multipliers)
        self.register_buffer("shifts", shifts)
        self.register_buffer("zero_points", zero_points)

    def accumulate(self, a, b):
        return add_rescaled(a, b, self.zero_points, self.multipliers, self.shifts, self.rounding)


def add_rescaled(a, b, zero_points, multipliers, shifts, rounding):
    """int32 sum of codes of both operands on the scale 2 * max(s_a, s_b) / 2^20."""
    total = 0
    for i, x in enumerate((a, b)):
        wide = (x.int() - zero_points[i]) << ADD_SHIFT
        total = total + multiply(wide, multipliers[i], shifts[i], rounding)
    return total.int()
