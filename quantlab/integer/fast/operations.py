"""The fast executor: the same operations, code for code, on int8 tensors in channels-last order.

Unsigned 8-bit codes are stored less 128. On a CPU with a C compiler the work is done by integer_kernels.c, elsewhere by the torch operators of
integer_gemm.py: a convolution is a matrix product of int8 behind im2col, the zero-point's share, -zero_point * sum(weight), part of its bias.
"""

import functools

import torch
import torch.nn.functional as F

from quantlab.integer import operations as ops
from quantlab.integer import pooling as pools
from quantlab.integer.fast import gemm, native


def has_compiler(device_type):
    """True where kernels can be made: by a C compiler for the CPU, by torch.compile with Triton for CUDA."""
    return native.library() is not None if device_type == "cpu" else gemm.has_triton()


def channels_last(x):
    """[B, C, H, W] -> [B, H, W, C], as the kernels read it; others as they are."""
    return x.permute(0, 2, 3, 1) if x.dim() == 4 else x


def channels_second(x):
    """The way back."""
    return x.permute(0, 3, 1, 2) if x.dim() == 4 else x


class Fast:
    """What the fast operations share: `use_compiler` says whether they run compiled kernels, which are C on the CPU."""

    use_compiler = False

    def use_native(self, x):
        return self.use_compiler and x.is_cpu and native.library() is not None

    def constants(self):
        return self.multiplier.flatten(), self.shift.flatten(), self.zero_point, self.low, self.high, self.rounding

    @functools.cached_property
    def packed(self):
        return native.pack_constants(*self.constants())

    def run(self, function, rows, *constants):
        return gemm.run_rows(function, rows, *constants, compile=self.use_compiler)


# ---- Operations -------------------------------------------------------------------------------------------------------------


class FastLayer(Fast):
    """A layer as a matrix product; weights that do not fit in int8 (asymmetric, 8 bits) as 2 * (w >> 1) + (w & 1)."""

    def prepare(self):
        weight = self.weight.flatten(1) if self.weight.dim() == 2 else self.weight.permute(0, 2, 3, 1).flatten(1)
        bias = self.bias - self.zero_point_in * weight.sum(1)  # wraps as the accumulator does, so their sum is right
        groups = self.groups = getattr(self, "options", {}).get("groups", 1)
        self.outputs, inner = len(weight) // groups, weight.shape[1]
        self.width = -(-inner // 8) * 8
        weight = F.pad(weight.view(groups, self.outputs, inner), (0, self.width - inner, 0, -self.outputs % 8))
        self.split = bool(weight.abs().max() > 127)
        parts = torch.stack([weight >> 1, weight & 1] if self.split else [weight])
        self.register_buffer("fast_bias", bias.int())
        self.register_buffer("parts", parts.to(torch.int8))

    def product(self, rows, group=0):
        """int8 [M, width] -> int32 [M, outputs of one group], without bias."""
        products = [gemm.int_mm(rows, part[group].t())[:, : self.outputs] for part in self.parts]
        return 2 * products[0] + products[1] if self.split else products[0]

    def blocks(self, rows):
        """int8 rows -> what `finish` gives, on a CPU block by block."""
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
        return self.run(gemm.store_rows, (acc,), self.fast_bias, *self.constants())


class Linear(FastLayer, ops.Linear):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.prepare()

    @functools.cached_property
    def kernel(self):
        return native.Layer(self.weight[:, :, None, None], self.bias, self.zero_point_in, None if self.out is None else self.constants())

    def forward(self, x):
        if self.use_native(x):
            return self.kernel(x.reshape(-1, 1, 1, x.shape[-1])).view(*x.shape[:-1], -1)
        rows = F.pad(x.reshape(-1, x.shape[-1]), (0, self.width - x.shape[-1]))
        return self.finish(self.product(rows)).view(*x.shape[:-1], -1)


class Conv(FastLayer, ops.Conv):
    """gemm.im2col and a matrix product for each group; a depthwise convolution is a sum over its taps."""

    def __init__(self, name, layer, *rest):
        super().__init__(name, layer, *rest)
        self.padding = layer._reversed_padding_repeated_twice  # left, right, top, bottom, also for "same"
        self.window = {"kernel": layer.kernel_size, "stride": layer.stride, "dilation": layer.dilation}
        self.depthwise = self.options["groups"] == layer.in_channels and self.weight.shape[0] == layer.in_channels
        self.prepare()

    @functools.cached_property
    def kernel(self):
        window = {"stride": self.window["stride"], "dilation": self.window["dilation"], "padding": self.padding, "groups": self.groups}
        return native.Layer(self.weight, self.bias, self.zero_point_in, None if self.out is None else self.constants(), **window)

    def forward(self, x):
        if self.use_native(x):
            return channels_second(self.kernel(channels_last(x)))
        if self.depthwise:
            acc, shape = self.sum_over_taps(x)
            result = self.finish(acc)
        elif self.groups == 1:
            rows, shape = gemm.im2col(x, **self.window, padding=self.padding, zero_point=self.zero_point_in, width=self.width)
            result = self.blocks(rows)
        else:
            parts = x.chunk(self.groups, 1)
            columns = [gemm.im2col(part, **self.window, padding=self.padding, zero_point=self.zero_point_in, width=self.width) for part in parts]
            shape = columns[0][1]
            result = self.finish(torch.cat([self.product(rows, group) for group, (rows, _) in enumerate(columns)], 1))
        return result.view(*shape, -1).permute(0, 3, 1, 2)

    def sum_over_taps(self, x):
        """acc [M, C] = sum over the kernel's positions of shifted codes times one weight a channel."""
        x = F.pad(x.contiguous(memory_format=torch.channels_last), self.padding, value=self.zero_point_in).permute(0, 2, 3, 1)
        (kh, kw), (sh, sw), (dh, dw) = self.window.values()
        height, width = ((n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(x.shape[1:3], (kh, kw), (sh, sw), (dh, dw)))
        acc = x.new_zeros(x.shape[0], height, width, x.shape[3], dtype=torch.int32)
        for i in range(kh):
            for j in range(kw):
                tap = x[:, i * dh : i * dh + (height - 1) * sh + 1 : sh, j * dw : j * dw + (width - 1) * sw + 1 : sw]
                acc.addcmul_(tap.int(), self.weight[:, 0, i, j])
        return acc.view(-1, x.shape[3]), (x.shape[0], height, width)


class Affine(Fast, ops.Affine):
    def forward(self, x):
        weight, bias = self.weight.flatten(), self.bias.flatten()
        if self.out is None:
            return self.accumulate(x)
        if self.use_native(x):
            weight, bias = native.pad_outputs(weight), native.pad_outputs(bias)
            return channels_second(native.affine(channels_last(x), self.zero_point_in, weight, bias, self.packed))
        return gemm.from_rows(self.run(gemm.affine_rows, (gemm.to_rows(x),), self.zero_point_in, weight, bias, *self.constants()), x)


class Requantize(Fast, ops.Requantize):
    def forward(self, x):
        if self.use_native(x):
            return channels_second(native.requantize(channels_last(x), self.zero_point_in, self.packed))
        return gemm.from_rows(self.run(gemm.requantize_rows, (gemm.to_rows(x),), self.zero_point_in, *self.constants()), x)


class Add(Fast, ops.Add):
    @functools.cached_property
    def smaller(self):
        """(which operand has the smaller scale, its constants for the C kernel, both zero points, the larger one's first)."""
        small = int(self.multipliers[1].double().ldexp(self.shifts[1]) <= self.multipliers[0].double().ldexp(self.shifts[0]))
        constants = native.pack_constants(self.multipliers[small], self.shifts[small], 0, 0, 0, self.rounding)
        return small, constants, self.zero_points.tolist()[:: 1 if small else -1]

    def forward(self, a, b):
        if self.out is None:
            return self.accumulate(a, b)
        if a.shape != b.shape:
            a, b = torch.broadcast_tensors(a, b)
        if self.use_native(a):
            small, operand, zero_points = self.smaller
            a, b = (channels_last(x) for x in ((a, b) if small else (b, a)))
            return channels_second(native.add(a, b, zero_points, operand, self.packed))
        rows = gemm.to_rows(a), gemm.to_rows(b)
        return gemm.from_rows(self.run(gemm.add_rows, rows, self.zero_points, self.multipliers, self.shifts, *self.constants()), a)


class Average(Fast, pools.Average):
    """The mean of a whole image is a depthwise convolution by ones, as large as the image."""

    def forward(self, x):
        whole = self.dims in ((2, 3), (-2, -1)) if self.windows is None else all(w.output == 1 for w in self.windows)
        if self.out is None or not whole or x.dim() != 4 or not self.use_native(x):
            return super().forward(x)
        if self.size != x.shape[1:]:
            self._set_size(x.shape)
        y = self.kernel(channels_last(x))
        return channels_second(y) if self.keepdim or self.windows else y.flatten(1)

    def _set_size(self, shape):
        super()._set_size(shape)
        self.__dict__.pop("kernel", None)

    @functools.cached_property
    def kernel(self):
        channels = self.size[0]
        ones, zeros = torch.ones(channels, 1, *self.size[1:], dtype=torch.int32), torch.zeros(channels, dtype=torch.int32)
        multiplier, shift, *rest = self.constants()
        return native.Layer(ones, zeros, self.zero_point_in, (multiplier.expand(channels), shift.expand(channels), *rest), groups=channels)

    def store(self, acc):
        return super().store(acc).to(torch.int8)


class MaxPool(pools.MaxPool):
    def forward(self, x):
        rows = x.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
        return pools.pool(rows, self.windows, torch.maximum, -128, axes=(1, 2)).permute(0, 3, 1, 2)


FAST = {c.__name__: c for c in (Conv, Linear, Affine, Requantize, Add, Average, MaxPool)}
