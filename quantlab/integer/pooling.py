"""Pooling in integers: maxima of codes are codes; an average is a sum, and its division is part of
the multiplier.
"""

import dataclasses
import functools
import math

import torch
from torch import nn

from quantlab.integer.fixedpoint import INT32_MAX, signed_bits
from quantlab.integer.operations import Operation
from quantlab.system.errors import UserError


@dataclasses.dataclass(frozen=True)
class Windows:
    """Pooling windows along one axis; output: number of adaptive windows, None for fixed ones."""

    kernel: int = 1
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    ceil_mode: bool = False
    count_include_pad: bool = True
    output: int | None = None

    @functools.cache  # noqa: B019 - a handful of sizes
    def taps(self, size):
        """(indices, counts) for an axis of `size`.

        indices: int64 [taps, windows], `size` standing for padding. counts: how many values each
        window averages.
        """
        rows, counts = self._adaptive(size) if self.output is not None else self._fixed(size)
        longest = max(len(row) for row in rows)
        rows = [row + [size] * (longest - len(row)) for row in rows]
        return torch.tensor(rows).t().contiguous(), counts

    def _adaptive(self, size):
        """Windows from floor(i * size / output) to ceil((i + 1) * size / output)."""
        rows = [list(range(i * size // self.output, -(-(i + 1) * size // self.output)))
                for i in range(self.output)]
        return rows, [len(row) for row in rows]

    def _fixed(self, size):
        reach = self.dilation * (self.kernel - 1) + 1
        steps = size + 2 * self.padding - reach
        n = (-(-steps // self.stride) if self.ceil_mode else steps // self.stride) + 1
        if n < 1:
            raise UserError(f"a pooling window of {reach} does not fit into {size} pixels with "
                            f"padding {self.padding}; use larger images")
        if self.ceil_mode and (n - 1) * self.stride >= size + self.padding:
            n -= 1  # a window must start inside
        starts = [i * self.stride - self.padding for i in range(n)]
        rows = [[start + t * self.dilation for t in range(self.kernel)] for start in starts]
        rows = [[i if 0 <= i < size else size for i in row] for row in rows]
        if self.count_include_pad:
            return rows, [min(self.kernel, size + self.padding - start) for start in starts]
        return rows, [sum(i < size for i in row) for row in rows]


def pool(x, windows, reduce, fill, axes=(-2, -1)):
    """Reduce two axes of an integer tensor window by window; fill: the value of padding."""
    for axis, window in zip(axes, windows):
        indices, _ = window.taps(x.shape[axis])
        padded = torch.cat([x, torch.full_like(x.narrow(axis, 0, 1), fill)], axis)
        x = functools.reduce(reduce, (padded.index_select(axis, i) for i in indices.to(x.device)))
    return x


class MaxPool(nn.Module):
    """The largest code of every window; codes keep their order, so nothing is rounded."""

    kind = "maxpool"

    def __init__(self, windows):
        super().__init__()
        self.windows = windows

    def forward(self, x):
        return pool(x, self.windows, torch.maximum, torch.iinfo(x.dtype).min)


class Clamp(nn.Module):
    """A clamp of stored codes."""

    kind = "clamp"

    def __init__(self, low, high):
        super().__init__()
        self.low, self.high = low, high

    def forward(self, x):
        return x.clamp(self.low, self.high)


class Average(Operation):
    """Average pooling, or the mean over `dims`: an integer sum, divided by the multiplier.

    The number of values depends on the image's size and, where adaptive windows differ, on the
    position; the multipliers are made once a size.
    """

    kind = "average"

    def __init__(self, name, grid_in, out, rounding, windows=None, dims=None, keepdim=False,
                 divisor=None):
        super().__init__(name, out, grid_in.scale, grid_in.extent, rounding)
        self.zero_point_in, self.scale_in = grid_in.zero_point, grid_in.scale
        self.largest = max(-grid_in.extent[0], grid_in.extent[1])
        self.windows, self.dims, self.keepdim, self.divisor = windows, dims, keepdim, divisor
        self.size = None

    def accumulate(self, x):
        if self.size != x.shape[1:]:
            self._set_size(x.shape)
        if self.windows is None:
            total = x.sum(self.dims, keepdim=self.keepdim, dtype=torch.int32)
            return (total - self.zero_point_in * self.count).int()
        return pool(x.int() - self.zero_point_in, self.windows, torch.add, 0)

    def _set_size(self, shape):
        """Scale and multiplier for inputs of this shape."""
        if any(d % len(shape) == 0 for d in self.dims or ()):
            raise UserError(f"{self.name} averages over the images of a batch, so what it gives an "
                            "image depends on the others; average over its other dimensions")
        count = self._count(shape)
        most = int(count.max())
        self.accumulator_bits = signed_bits(-most * self.largest, most * self.largest)
        if most * (self.largest + abs(self.zero_point_in)) > INT32_MAX:
            raise UserError(f"{self.name}: sums of {most:,} codes do not fit in int32; "
                            "average in two steps")
        self.size, self.count = shape[1:], most
        divisor = torch.as_tensor(self.divisor or count, dtype=torch.float64)
        self.acc_scale = self.scale_in / divisor
        if self.out is not None:
            device = self.multiplier.device
            self._set_multiplier(torch.tensor([float(most * self.largest)]))
            self.to(device)

    def _count(self, shape):
        """Number of values behind every result: a tensor [], or [rows, columns] where it varies."""
        if self.windows is None:
            return torch.tensor(math.prod(shape[d] for d in self.dims))
        rows, columns = (torch.tensor(w.taps(n)[1]) for w, n in zip(self.windows, shape[-2:]))
        count = rows.view(-1, 1) * columns
        return count[0, 0] if (count == count[0, 0]).all() else count
