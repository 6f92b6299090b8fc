"""The fast executor: the same operations, code for code, on int8 tensors in channels-last order.

Unsigned 8-bit codes are stored less 128. On a CPU with a C compiler the work is done by kernels.c,
elsewhere by the torch operators of gemm.py: a convolution is a matrix product of int8 behind
im2col, the zero point's part, -zero_point * sum(weight), is in its bias.
"""

import dataclasses
import functools

import torch
import torch.nn.functional as F

from quantlab.integer import operations as ops
from quantlab.integer import pooling as pools
from quantlab.integer.fast import gemm, native
from quantlab.integer.fixedpoint import Requantization


def has_compiler(device_type):
    """True where kernels can be made: by a C compiler for the CPU, by torch.compile with Triton for
    CUDA.
    """
    return native.library() is not None if device_type == "cpu" else gemm.has_triton()


def classes(compile):
    """kind -> maker of the operation, with `compile` whether it uses compiled kernels."""
    compilable = (Conv, Linear, Affine, Requantize, Add, Average)
    made = {c.kind: functools.partial(c, compile=compile) for c in compilable}
    return made | {"maxpool": MaxPool}


def channels_last(x):
    """[B, C, H, W] -> [B, H, W, C], as kernels and rows have it; other tensors end in C already."""
    return x.permute(0, 2, 3, 1) if x.dim() == 4 else x


def channels_second(x):
    """The way back."""
    return x.permute(0, 3, 1, 2) if x.dim() == 4 else x


NOT_NATIVE = "torch", "not compiled for this device: compile=False, or no C compiler"


class Fast:
    """What the fast operations share; compile: whether they run compiled kernels, on the CPU in C.
    """

    def __init__(self, *arguments, compile=False, **options):
        super().__init__(*arguments, **options)
        self.use_compiler = compile

    def use_native(self, x):
        return self.use_compiler and x.is_cpu and native.library() is not None

    def runs(self):
        """(kernel, why) on the device where the operation is."""
        if self.out is None:
            return "torch", "logits, once a batch"
        return (self.kind, "a pass over codes") if self.use_native(self.multiplier) else NOT_NATIVE

    @functools.cached_property
    def packed(self):
        return native.pack_constants(self.requantization)

    def run(self, function, tensors, *constants):
        """A pass of gemm.py over tensors of one shape, with a requantization of columns."""
        multiplier, shift = self.multiplier.flatten(), self.shift.flatten()
        r = dataclasses.replace(self.requantization, multiplier=multiplier, shift=shift)
        tensors = [channels_last(x) for x in tensors]
        rows = [x.reshape(-1, x.shape[-1]) for x in tensors]
        codes = gemm.run_rows(function, rows, *constants, r, compile=self.use_compiler)
        return channels_second(codes.view(tensors[0].shape))


# ---- Layers --------------------------------------------------------------------------------------


class FastLayer(Fast):
    """A layer as a matrix product.

    Weights that do not fit in int8 (asymmetric, 8 bits) are 2 * (w >> 1) + (w & 1).
    """

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        # one row an output, in the order of im2col's columns
        weight = channels_last(self.weight).flatten(1)
        # wraps as the accumulator does, so their sum is right
        bias = self.bias - self.zero_point_in * weight.sum(1)
        self.groups = getattr(self, "options", {}).get("groups", 1)
        self.outputs, inner = len(weight) // self.groups, weight.shape[1]
        self.width = -(-inner // 8) * 8
        weight = weight.view(self.groups, self.outputs, inner)
        weight = F.pad(weight, (0, self.width - inner, 0, -self.outputs % 8))
        self.split = bool(weight.abs().max() > 127)
        parts = torch.stack([weight >> 1, weight & 1] if self.split else [weight])
        self.register_buffer("fast_bias", bias.int())
        self.register_buffer("parts", parts.to(torch.int8))

    def make_kernel(self, weight, **options):
        requantization = None if self.out is None else self.requantization
        return native.Layer(weight, self.bias, self.zero_point_in, requantization,
                            codes=self.codes_in, **options)

    def runs(self):
        kernel = self.kernel if self.use_native(self.weight) else None
        return (kernel.name, kernel.reason) if kernel else NOT_NATIVE

    def product(self, rows, group=0):
        """int8 [M, width] -> int32 [M, outputs of one group], without bias."""
        products = [gemm.int_mm(rows, part[group].t())[:, : self.outputs] for part in self.parts]
        return 2 * products[0] + products[1] if self.split else products[0]

    def blocks(self, rows):
        """`finish` of the product of int8 rows, on a CPU block by block."""
        step = max(64, gemm.ACCUMULATORS // self.outputs)
        if len(rows) <= step or rows.is_cuda or self.out is None:
            return self.finish(self.product(rows))
        out = rows.new_empty(len(rows), self.outputs)
        for i in range(0, len(rows), step):
            out[i : i + step] = self.finish(self.product(rows[i : i + step]))
        return out

    def finish(self, acc):
        """int32 [M, N] without bias -> int8 codes, or with bias as logits."""
        if self.out is None:
            return acc + self.fast_bias
        return self.run(gemm.store_rows, [acc], self.fast_bias)


class Linear(FastLayer, ops.Linear):
    @functools.cached_property
    def kernel(self):
        return self.make_kernel(self.weight[:, :, None, None])

    def compute(self, x):
        if self.use_native(x):
            return self.kernel(x.reshape(-1, 1, 1, x.shape[-1])).view(*x.shape[:-1], -1)
        rows = F.pad(x.reshape(-1, x.shape[-1]), (0, self.width - x.shape[-1]))
        return self.finish(self.product(rows)).view(*x.shape[:-1], -1)


class Conv(FastLayer, ops.Conv):
    """gemm.im2col and a matrix product for each group; a depthwise convolution is a sum over its
    taps.
    """

    def __init__(self, name, layer, *rest, **options):
        super().__init__(name, layer, *rest, **options)
        self.window = {
            "kernel": layer.kernel_size, "stride": layer.stride, "dilation": layer.dilation}
        self.depthwise = self.groups == layer.in_channels == len(self.weight)

    @functools.cached_property
    def kernel(self):
        window = {"stride": self.window["stride"], "dilation": self.window["dilation"]}
        return self.make_kernel(self.weight, padding=self.padding, groups=self.groups, **window)

    def compute(self, x):
        if self.use_native(x):
            return channels_second(self.kernel(channels_last(x)))
        if self.depthwise:
            acc, size = self.sum_over_taps(x)
            result = self.finish(acc)
        elif self.groups == 1:
            rows, size = self.columns(x)
            result = self.blocks(rows)
        else:
            parts = [self.columns(part) for part in x.chunk(self.groups, 1)]
            size = parts[0][1]
            products = [self.product(rows, group) for group, (rows, _) in enumerate(parts)]
            result = self.finish(torch.cat(products, 1))
        return channels_second(result.view(*size, -1))

    def columns(self, x):
        return gemm.im2col(
            x, **self.window, padding=self.padding, zero_point=self.zero_point_in, width=self.width)

    def sum_over_taps(self, x):
        """acc [M, C]: over the kernel's positions, shifted codes times one weight a channel."""
        x = x.contiguous(memory_format=torch.channels_last)
        x = channels_last(F.pad(x, self.padding, value=self.zero_point_in))
        (kh, kw), (sh, sw), (dh, dw) = self.window.values()
        height, width = gemm.result_size(x.shape[1:3], **self.window)
        size = (len(x), height, width)
        acc = x.new_zeros(*size, x.shape[3], dtype=torch.int32)
        for i in range(kh):
            rows = x[:, i * dh : i * dh + (height - 1) * sh + 1 : sh]
            for j in range(kw):
                tap = rows[:, :, j * dw : j * dw + (width - 1) * sw + 1 : sw]
                acc.addcmul_(tap.int(), self.weight[:, 0, i, j])
        return acc.view(-1, x.shape[3]), size


# ---- Other operations ----------------------------------------------------------------------------


class Affine(Fast, ops.Affine):
    def compute(self, x):
        weight, bias = self.weight.flatten(), self.bias.flatten()
        if self.out is None:
            return self.accumulate(x)
        if self.use_native(x):
            x, weight, bias = channels_last(x), *map(native.pad_outputs, (weight, bias))
            codes = native.affine(x, self.zero_point_in, weight, bias, self.packed)
            return channels_second(codes)
        return self.run(gemm.affine_rows, [x], self.zero_point_in, weight, bias)


class Requantize(Fast, ops.Requantize):
    def compute(self, x):
        if self.use_native(x):
            codes = native.requantize(channels_last(x), self.zero_point_in, self.packed)
            return channels_second(codes)
        return self.run(gemm.requantize_rows, [x], self.zero_point_in)


class Add(Fast, ops.Add):
    @functools.cached_property
    def smaller(self):
        """(which operand has the smaller scale, its constants for the C kernel, both zero points,
        the larger one's first).
        """
        first, second = self.multipliers.double().ldexp(self.shifts)
        small = int(second <= first)
        rescaling = Requantization(
            self.multipliers[small], self.shifts[small], 0, 0, 0, self.rounding)
        zero_points = self.zero_points.tolist()[:: 1 if small else -1]
        return small, native.pack_constants(rescaling), zero_points

    def compute(self, a, b):
        if self.out is None:
            return self.accumulate(a, b)
        if a.shape != b.shape:
            a, b = torch.broadcast_tensors(a, b)
        if self.use_native(a):
            small, operand, zero_points = self.smaller
            large, small = (channels_last(x) for x in ((a, b) if small else (b, a)))
            return channels_second(native.add(large, small, zero_points, operand, self.packed))
        constants = self.zero_points, self.multipliers, self.shifts
        return self.run(gemm.add_rows, [a, b], *constants)


class Average(Fast, pools.Average):
    """The mean of a whole image is a depthwise convolution by ones, as large as the image."""

    def compute(self, x):
        if self.out is None or not self.is_whole() or x.dim() != 4 or not self.use_native(x):
            return super().compute(x)
        if self.size != x.shape[1:]:
            self._set_size(x.shape)
        y = self.kernel(channels_last(x))
        return channels_second(y) if self.keepdim or self.windows else y.flatten(1)

    def runs(self):
        if self.is_whole() and self.out is not None and self.use_native(self.multiplier):
            return "conv", "the mean of an image is a depthwise convolution by ones"
        return "torch", "a mean of windows, or of a result that stays int32"

    def is_whole(self):
        if self.windows is None:
            return self.dims in ((2, 3), (-2, -1))
        return all(window.output == 1 for window in self.windows)

    def _set_size(self, shape):
        super()._set_size(shape)
        self.__dict__.pop("kernel", None)

    @functools.cached_property
    def kernel(self):
        channels = self.size[0]
        ones = torch.ones(channels, 1, *self.size[1:], dtype=torch.int32)
        zeros = torch.zeros(channels, dtype=torch.int32)
        return native.Layer(
            ones, zeros, self.zero_point_in, self.requantization, groups=channels)

    def store(self, acc):
        return super().store(acc).to(torch.int8)


class MaxPool(pools.MaxPool):
    def forward(self, x):
        rows = channels_last(x.contiguous(memory_format=torch.channels_last))
        return channels_second(pools.pool(rows, self.windows, torch.maximum, -128, axes=(1, 2)))
