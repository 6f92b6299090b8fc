"""Observe once, decide later: one exact, mergeable histogram an edge, for every range and width."""

import dataclasses
import math

import torch

from quantlab.system.errors import UserError

MIN_BINS = 2048  # at least so many between the smallest and the largest value, zero included
MIN_LEVEL = -100  # finest bin width 2^-100, so that x / width is a float32


@dataclasses.dataclass
class EdgeStats:
    """Statistics of every value that passed one edge, in constant memory.

    Bin i counts the values in (i*w, (i+1)*w], w = 2^level, zeros apart. When the range grows,
    neighbouring bins are added: exact, as an edge of a coarse bin is an edge of a finer one. So the
    order of the data does not matter, and two statistics merge by addition.
    """

    level: int | None = None
    first: int = 0  # index of bins[0]
    bins: torch.Tensor | None = None  # int64
    zeros: int = 0
    count: int = 0
    minimum: float = math.inf
    maximum: float = -math.inf

    def update(self, x):
        """Count every element of a floating-point tensor; UserError for NaN and infinite values."""
        order = sorted(range(x.dim()), key=x.stride, reverse=True)  # as memory has it: no copy
        x = x.detach().float().permute(order).flatten()
        if not len(x):
            return self
        low, high = (v.item() for v in torch.aminmax(x))
        if not (math.isfinite(low) and math.isfinite(high)):
            bad = int((~torch.isfinite(x)).sum())
            raise UserError(f"{bad} of {len(x)} values are NaN or infinite; find the layer and the "
                            "input that make them")
        self._grow(min(self.minimum, low), max(self.maximum, high))
        if self.bins is None:
            self.zeros += len(x)
        else:
            from quantlab.system.counting import count_bins  # here, as only values need it

            counts, zeros = count_bins(x, self.level, self.first, len(self.bins))
            self.bins += counts
            self.zeros += zeros
        self.count += len(x)
        return self

    def merge(self, other):
        """Add another edge's counts to these, as if its data had been seen here."""
        if other.count:
            self._grow(min(self.minimum, other.minimum), max(self.maximum, other.maximum))
            if other.bins is not None:
                self.bins += _rebin(other, self.level, self.first, len(self.bins))
            self.zeros += other.zeros
            self.count += other.count
        return self

    def _grow(self, minimum, maximum):
        self.minimum, self.maximum = minimum, maximum
        low, high = min(minimum, 0.0), max(maximum, 0.0)
        if low == high:
            return
        level = _level(low, high)
        first, last = _bins(low, high, level)
        if self.bins is None:
            self.bins = torch.zeros(last - first + 1, dtype=torch.int64)
        elif (level, first, last - first + 1) != (self.level, self.first, len(self.bins)):
            self.bins = _rebin(self, level, first, last - first + 1)
        self.level, self.first = level, first

    @property
    def width(self):
        """Width of a bin in real units; 0 when only zeros were seen."""
        return 0.0 if self.level is None else 2.0**self.level

    def histogram(self):
        """(centers float64 [N], counts int64 [N]) of the non-zero values."""
        if self.bins is None:
            return torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.int64)
        index = self.first + torch.arange(len(self.bins), dtype=torch.float64)
        return (index + 0.5) * self.width, self.bins


def _bins(low, high, level):
    """(first, last) bin for values from low to high, low <= 0 <= high; bin 0 always exists."""
    width = 2.0**level
    first = math.ceil(low / width) - 1 if low < 0 else 0
    last = math.ceil(high / width) - 1
    return min(first, 0), max(last, 0)


def _level(low, high):
    """The largest level with MIN_BINS bins from low to high (low <= 0 <= high, not both 0)."""
    level = math.frexp((high - low) / MIN_BINS)[1] + 1
    while level > MIN_LEVEL:
        first, last = _bins(low, high, level)
        if last - first + 1 >= MIN_BINS:
            break
        level -= 1
    return max(level, MIN_LEVEL)


def _rebin(stats, level, first, size):
    """The counts of `stats` on coarser or equal bins that start at `first`."""
    # rounds down, as floor does
    index = torch.arange(stats.first, stats.first + len(stats.bins))
    index = (index >> min(level - stats.level, 62)) - first
    return torch.zeros(size, dtype=torch.int64).index_add_(0, index, stats.bins)
