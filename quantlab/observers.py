"""Observe once, decide later: one exact, mergeable histogram per edge, and range setters that are pure functions of it.

A range setter is a function (stats, bits, symmetric) -> (low, high) in real units; `observer=` also accepts one of your own.
"""

import dataclasses
import difflib
import functools
import math

import torch

from quantlab.affine import choose_qparams, fake_quantize
from quantlab.runtime import UserError

MIN_BINS = 2048  # at least this many bins between the smallest and the largest value (zero included)
MIN_LEVEL = -100  # finest bin width 2^-100, so that x / width is a float32


@dataclasses.dataclass
class EdgeStats:
    """Statistics of every value that passed one edge, in constant memory.

    Bin i counts the values in [i*w, (i+1)*w) with w = 2^level; exact zeros are counted apart. When the range grows, neighbouring bins are
    added, which is exact because an edge of a coarse bin is always an edge of a finer one. So the counts do not depend on the order or the
    batching of the data, and two statistics merge by addition. level is the largest that leaves MIN_BINS bins over the range.
    """

    level: int | None = None
    first: int = 0  # index of bins[0]
    bins: torch.Tensor | None = None  # int64
    zeros: int = 0
    count: int = 0
    minimum: float = math.inf
    maximum: float = -math.inf

    def update(self, x):
        """Count every element of a floating-point tensor of any shape; raise UserError on NaN or infinite values."""
        x = x.detach().float().flatten()
        if not len(x):
            return self
        low, high = (v.item() for v in torch.aminmax(x))
        if not (math.isfinite(low) and math.isfinite(high)):
            raise UserError(f"{int((~torch.isfinite(x)).sum())} of {len(x)} values are NaN or infinite; find the layer and the input that make them")
        self._grow(min(self.minimum, low), max(self.maximum, high))
        zeros = len(x) - int(torch.count_nonzero(x))
        if zeros < len(x):
            index = torch.floor(x * 2.0**-self.level).long() - self.first
            counts = torch.bincount(index, minlength=len(self.bins)).cpu()
            counts[-self.first] -= zeros
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
        first, last = math.floor(low * 2.0**-level), math.floor(high * 2.0**-level)
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
        return (self.first + torch.arange(len(self.bins), dtype=torch.float64) + 0.5) * self.width, self.bins


def _level(low, high):
    """The largest level at which the bins from low to high (low <= 0 <= high, not both 0) number at least MIN_BINS."""
    level = math.frexp((high - low) / MIN_BINS)[1] + 1
    while level > MIN_LEVEL and math.floor(high * 2.0**-level) - math.floor(low * 2.0**-level) + 1 < MIN_BINS:
        level -= 1
    return max(level, MIN_LEVEL)


def _rebin(stats, level, first, size):
    """The counts of `stats` on coarser or equal bins that start at `first`."""
    index = (torch.arange(stats.first, stats.first + len(stats.bins)) >> min(level - stats.level, 62)) - first  # rounds down, as floor does
    return torch.zeros(size, dtype=torch.int64).index_add_(0, index, stats.bins)


# ---- Range setters ----------------------------------------------------------------------------------------------------------


def minmax(stats, bits, symmetric=False):
    """The whole range: nothing is clipped."""
    return stats.minimum, stats.maximum


def percentile(stats, bits, symmetric=False, q=99.99):
    """Clip the largest (100 - q) % of the values, and the smallest where some are negative; linear within a bin."""
    centers, counts = stats.histogram()
    if not len(counts):
        return 0.0, 0.0
    counts = counts.double()
    counts[-stats.first] += stats.zeros
    edges = torch.cat([centers - stats.width / 2, centers[-1:] + stats.width / 2])
    cumulative = torch.cat([torch.zeros(1, dtype=torch.float64), counts.cumsum(0)]) / stats.count

    def quantile(share):
        i = int(torch.searchsorted(cumulative, share, right=False).clamp(1, len(counts)))
        inside = (share - cumulative[i - 1]) / (cumulative[i] - cumulative[i - 1])
        return float(edges[i - 1] + inside.clamp(0, 1) * stats.width)

    low = max(quantile(1 - q / 100), stats.minimum) if stats.minimum < 0 else 0.0
    return min(low, 0.0), max(min(quantile(q / 100), stats.maximum), 0.0)


def histogram(stats, bits, symmetric=False):
    """The range with the least squared quantization error over the histogram, searched over both ends for the levels that `bits` gives.

    Every range on a coarse grid is tried, then finer ones around the best; unlike a greedy search it does not stop at a first increase.
    """
    scale_low = 0.0 if stats.minimum >= 0 else stats.minimum
    scale_high = 0.0 if stats.maximum <= 0 else stats.maximum
    if symmetric:
        scale_high = max(-scale_low, scale_high)
        scale_low = -scale_high if stats.minimum < 0 else 0.0
    best, step = (0.5, 0.5), 1 / 48
    grid = torch.arange(1, 49, dtype=torch.float64) / 48
    low_grid = high_grid = grid
    for _ in range(3):
        if symmetric or scale_low == 0 or scale_high == 0:
            low_shares = high_shares = high_grid if scale_high else low_grid
        else:
            low_shares, high_shares = (g.flatten() for g in torch.meshgrid(low_grid, high_grid, indexing="ij"))
        error = quantization_error(stats, scale_low * low_shares, scale_high * high_shares, bits, symmetric)
        i = int(error.argmin())
        best = float(low_shares[i]), float(high_shares[i])
        around = torch.linspace(-1, 1, 13, dtype=torch.float64) * step
        low_grid, high_grid = ((b + around).clamp(step / 24, 1.0) for b in best)
        step /= 6
    return scale_low * best[0], scale_high * best[1]


def quantization_error(stats, low, high, bits, symmetric=False):
    """Mean squared error of quantizing what `stats` saw with the ranges [low, high] (float64 [G] each); float64 [G], in real units squared.

    A value stands for the middle of its bin, which is at most 1/8 of a step wide at 8 bits. Zeros are exact and add nothing.
    """
    centers, counts = stats.histogram()
    seen = counts > 0
    centers, counts = centers[seen].float(), counts[seen].double()
    q = choose_qparams(low, high, bits, symmetric=symmetric, signed=stats.minimum < 0, axis=0)
    errors = []
    for part in range(0, len(q.scale), 256):  # 256 ranges at once keep the memory at a few megabytes
        chunk = dataclasses.replace(q, scale=q.scale[part : part + 256], zero_point=q.zero_point[part : part + 256])
        x_hat = fake_quantize(centers.expand(len(chunk.scale), -1).contiguous(), chunk)
        errors.append(((x_hat - centers).double() ** 2) @ counts)
    return torch.cat(errors) / max(stats.count, 1)


OBSERVERS = {"minmax": minmax, "percentile": percentile, "histogram": histogram}


def find_observer(observer):
    """The range setter of that name, or the callable itself; UserError with the names there are."""
    if callable(observer):
        return observer
    if observer not in OBSERVERS:
        near = difflib.get_close_matches(str(observer), OBSERVERS, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"observer {observer!r} is unknown{hint}; use one of {', '.join(OBSERVERS)}, or a function (stats, bits, symmetric)")
    return OBSERVERS[observer]


def observer_name(observer):
    """The name that a row of results carries: histogram, percentile(q=99.9), or a function's own."""
    if isinstance(observer, functools.partial):
        return f"{observer.func.__name__}({', '.join(f'{k}={v}' for k, v in observer.keywords.items())})"
    return observer if isinstance(observer, str) else observer.__name__


# ---- Weights ----------------------------------------------------------------------------------------------------------------

# Exponent of the weights' error. The squared error clips most and thereby shrinks every layer's output, which adds up over the layers;
# BRECQ takes 2.4. Notebook 03 measures 2 to 4 on held-out images: 2 is worst at 3 bits, at 4 bits they hardly differ; 3 lies between.
WEIGHT_NORM = 3.0


def check_weight_observer(observer):
    """UserError unless it is one of the two there are."""
    if observer not in ("minmax", "lp"):
        raise UserError(f"weight_observer {observer!r} is unknown; use minmax or lp")


def weight_range(weight, bits, *, observer="lp", p=WEIGHT_NORM, per_channel=True, symmetric=True):
    """(low, high) of a weight [C, ...]: tensors [C], or [] per tensor.

    "minmax": the whole range. "lp": the range, shrunk by one of 100 factors, with the least sum of |error|^p, channel by channel.
    """
    check_weight_observer(observer)
    flat = weight.detach().flatten(1) if per_channel else weight.detach().reshape(1, -1)
    low, high = flat.amin(1).double(), flat.amax(1).double()
    if observer == "lp":
        best = torch.full_like(low, math.inf)
        factor = torch.ones_like(low)
        for share in torch.linspace(1, 0.01, 100, dtype=torch.float64).tolist():
            q = choose_qparams(low * share, high * share, bits, symmetric=symmetric, axis=0)
            error = (fake_quantize(flat, q) - flat).abs().pow(p).sum(1).double()
            better = error < best
            best, factor = torch.where(better, error, best), torch.where(better, share, factor)
        low, high = low * factor, high * factor
    return (low, high) if per_channel else (low[0], high[0])
