"""Observe once, decide later: one exact, mergeable histogram per edge, from which every range
setter decides at every width.
"""

import concurrent.futures
import dataclasses
import functools
import math
import threading

import torch

from quantlab.system.errors import UserError

# at least this many bins between the smallest and the largest value (zero included)
MIN_BINS = 2048
PIECE = 1 << 17  # values counted at once
MIN_LEVEL = -100  # finest bin width 2^-100, so that x / width is a float32


@dataclasses.dataclass
class EdgeStats:
    """Statistics of every value that passed one edge, in constant memory.

    Bin i counts the values in (i*w, (i+1)*w] with w = 2^level; exact zeros are counted apart. When
    the range grows, neighbouring bins are added, which is exact because an edge of a coarse bin is
    always an edge of a finer one. So the counts do not depend on the order or the batching of the
    data, and two statistics merge by addition. level is the largest that leaves MIN_BINS bins over
    the range.
    """

    level: int | None = None
    first: int = 0  # index of bins[0]
    bins: torch.Tensor | None = None  # int64
    zeros: int = 0
    count: int = 0
    minimum: float = math.inf
    maximum: float = -math.inf

    def update(self, x):
        """Count every element of a floating-point tensor of any shape; raise UserError on NaN or
        infinite values.
        """
        x = x.detach().float().flatten()
        if not len(x):
            return self
        low, high = (v.item() for v in torch.aminmax(x))
        if not (math.isfinite(low) and math.isfinite(high)):
            bad = int((~torch.isfinite(x)).sum())
            raise UserError(
                f"{bad} of {len(x)} values are NaN or infinite; "
                "find the layer and the input that make them")
        self._grow(min(self.minimum, low), max(self.maximum, high))
        if self.bins is None:
            self.zeros += len(x)
        else:
            counts, zeros = _count(x, self.level, self.first, len(self.bins))
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
    """The largest level at which the bins from low to high (low <= 0 <= high, not both 0) number at
    least MIN_BINS.
    """
    level = math.frexp((high - low) / MIN_BINS)[1] + 1
    while level > MIN_LEVEL:
        first, last = _bins(low, high, level)
        if last - first + 1 >= MIN_BINS:
            break
        level -= 1
    return max(level, MIN_LEVEL)


def _count(x, level, first, size):
    """(counts int64 [size] of the bins from `first` on, number of exact zeros) of a float32 [N]
    that lies within them.
    """
    if x.is_cuda or len(x) <= PIECE:
        counts, zeros = _count_part(x, level, first, size)
    else:
        threads = torch.get_num_threads()
        parts = _pool(threads).map(
            lambda part: _count_part(part, level, first, size), x.chunk(threads))
        counts, zeros = map(sum, zip(*parts))
    if first == 0:  # nothing negative: only a zero rounds up to 0
        return counts[1:].cpu(), int(counts[0])
    counts[-first] -= zeros  # they were counted in bin -1, which ends at 0
    return counts[1:].cpu(), zeros


def _count_part(x, level, first, size):
    """Counts int64 [size + 1] of ceil(x / w) - first, which is exact: the division only changes the
    exponent; and the number of zeros.
    """
    buffer = _buffer(x)
    codes = buffer.view(torch.int32)  # the same memory: each value is read before it is overwritten
    counts, zeros = torch.zeros(size + 1, dtype=torch.int64, device=x.device), 0
    for part in x.split(len(buffer)):
        b, c = buffer[: len(part)], codes[: len(part)]
        if first:
            # a piece has fewer than 2^24 values
            zeros += int(torch.eq(part, 0, out=b).sum(dtype=torch.float64 if x.is_cuda else None))
        torch.mul(part, 2.0**-level, out=b).ceil_()
        if first:
            b.sub_(first)
        counts += torch.bincount(c.copy_(b), minlength=size + 1)
    return counts, zeros


def _buffer(x):
    """Room for a piece: as large as x on an accelerator, else PIECE values that stay in a core's
    cache, kept for the thread's next share.
    """
    if x.is_cuda:
        return torch.empty_like(x)
    if not hasattr(_local, "buffer"):
        # a tensor made in that mode could not be written to outside it
        with torch.inference_mode(False):
            _local.buffer = torch.empty(PIECE)
    return _local.buffer


_local = threading.local()


@functools.cache
def _pool(threads):
    """Threads that each run torch's operations on one core: bincount, the slowest of them, is
    serial anyway.
    """
    started = threading.Barrier(threads + 1)

    def start():
        torch.set_num_threads(1)
        started.wait()

    pool = concurrent.futures.ThreadPoolExecutor(threads)
    for _ in range(threads):
        pool.submit(start)
    started.wait()
    torch.set_num_threads(threads)  # what threads to come begin with
    return pool


def _rebin(stats, level, first, size):
    """The counts of `stats` on coarser or equal bins that start at `first`."""
    # rounds down, as floor does
    index = torch.arange(stats.first, stats.first + len(stats.bins))
    index = (index >> min(level - stats.level, 62)) - first
    return torch.zeros(size, dtype=torch.int64).index_add_(0, index, stats.bins)
