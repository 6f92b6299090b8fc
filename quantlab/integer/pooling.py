"""Pooling in integers: maxima of codes are codes; an average is a sum, and its division is part of the multiplier."""

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
        """(indices int64 [taps, windows], `size` standing for padding; counts: how many values a window averages) for an axis of `size`."""
        if self.output is not None:
            spans = [(i * size // self.output, -(-(i + 1) * size // self.output)) for i in range(self.output)]
            rows = [list(range(start, stop)) for start, stop in spans]
            counts = [len(row) for row in rows]
        else:
            reach, room = self.dilation * (self.kernel - 1) + 1, size + 2 * self.padding
            n = (room - reach + (self.stride - 1 if self.ceil_mode else 0)) // self.stride + 1
            n -= self.ceil_mode and (n - 1) * self.stride >= size + self.padding  # a window must start inside
            starts = [i * self.stride - self.padding for i in range(n)]
            rows = [[start + t * self.dilation for t in range(self.kernel)] for start in starts]
            inside = [sum(0 <= i < size for i in row) for row in rows]
            counts = [min(start + self.kernel, size + self.padding) - start for start in starts] if self.count_include_pad else inside
        most = max(len(row) for row in rows)
        rows = [[i if 0 <= i < size else size for i in row] + [size] * (most - len(row)) for row in rows]
        return torch.tensor(rows).t().contiguous(), counts


def pool(x, windows, reduce, fill, axes=(-2, -1)):
    """Reduce two axes window by window; x: integers, by default [..., H, W]; fill: the value of padding."""
    for axis, window in zip(axes, windows):
        indices, _ = window.taps(x.shape[axis])
        edge = torch.full_like(x.narrow(axis, 0, 1), fill)
        padded = torch.cat([x, edge], axis)
        x = functools.reduce(reduce, (padded.index_select(axis, tap) for tap in indices.to(x.device)))
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
    """Average pooling, or the mean over `dims`: an integer sum; the division by the number of values is part of the multiplier.

    That number depends on the image's size and, where adaptive windows differ, on the position; its multipliers are made once a size.
    """

    kind = "average"

    def __init__(self, name, grid_in, out, rounding, windows=None, dims=None, keepdim=False, divisor=None):
        self.largest = max(-grid_in.extent[0], grid_in.extent[1])
        super().__init__(name, out, grid_in.scale, grid_in.extent, rounding)
        self.zero_point_in, self.scale_in = grid_in.zero_point, grid_in.scale
        self.windows, self.dims, self.keepdim, self.divisor, self.size = windows, dims, keepdim, divisor, None

    def accumulate(self, x):
        if self.size != x.shape[1:]:
            self._set_size(x.shape)
        if self.windows is None:
            return (x.sum(self.dims, keepdim=self.keepdim, dtype=torch.int32) - self.zero_point_in * self.count).int()
        return pool(x.int() - self.zero_point_in, self.windows, torch.add, 0)

    def _set_size(self, shape):
        """Unit and multiplier for inputs of this shape."""
        if self.windows is None:
            count = self.count = math.prod(shape[d] for d in self.dims)
        else:
            rows, columns = (torch.tensor(w.taps(n)[1]) for w, n in zip(self.windows, shape[-2:]))
            count = rows.view(-1, 1) * columns
            count = count[0, 0] if (count == count[0, 0]).all() else count
        most = int(torch.as_tensor(count).max()) * self.largest
        self.accumulator_bits = signed_bits(-most, most)
        if most + abs(self.zero_point_in) * int(torch.as_tensor(count).max()) > INT32_MAX:
            raise UserError(f"{self.name}: sums of {int(torch.as_tensor(count).max()):,} codes do not fit in int32; average in two steps")
        self.size, self.unit = shape[1:], self.scale_in / torch.as_tensor(self.divisor or count, dtype=torch.float64)
        if self.out is not None:
            device = self.multiplier.device
            self._set_multiplier(torch.tensor([float(most)]))
            self.to(device)
