"""Range setters: pure functions (EdgeStats, bits, symmetric) -> (low, high) in real units.

`observer=` takes one of their names or a function of your own; affine.choose_qparams does the rest.
"""

import dataclasses
import functools
import math

import scipy.optimize
import scipy.special
import torch
import torch.nn.functional as F
from torch.special import xlogy

from quantlab.affine import choose_qparams, fake_quantize
from quantlab.system.errors import check_name

# ---- From order statistics -----------------------------------------------------------------------


def minmax(stats, bits, symmetric=False):
    """The whole range: nothing is clipped."""
    return stats.minimum, stats.maximum


def percentile(stats, bits, symmetric=False, q=99.99):
    """Clip the largest (100 - q) %, and the smallest if negative; linear within a bin."""
    centers, counts = stats.histogram()
    if not len(counts):
        return 0.0, 0.0
    counts = counts.double()
    counts[-stats.first] += stats.zeros
    edges = torch.cat([centers - stats.width / 2, centers[-1:] + stats.width / 2])
    cumulative = torch.cat([torch.zeros(1, dtype=torch.float64), counts.cumsum(0)]) / stats.count

    def quantile(fraction):
        i = int(torch.searchsorted(cumulative, fraction, right=False).clamp(1, len(counts)))
        inside = (fraction - cumulative[i - 1]) / (cumulative[i] - cumulative[i - 1])
        return float(edges[i - 1] + inside.clamp(0, 1) * stats.width)

    low = max(quantile(1 - q / 100), stats.minimum) if stats.minimum < 0 else 0.0
    return min(low, 0.0), max(min(quantile(q / 100), stats.maximum), 0.0)


# ---- From the quantization error -----------------------------------------------------------------


def histogram(stats, bits, symmetric=False):
    """The range with the least squared error over the histogram, for the levels that `bits` gives.

    Every range on a coarse grid is tried (both ends, so zero-points too), then finer ones around
    the best; unlike PyTorch's greedy search it does not stop at a first increase.
    """
    return search_range(stats, bits, symmetric, p=2.0)


def mse(stats, bits, symmetric=False, p=2.4, steps=100):
    """The range, shrunk by the best of `steps` fractions; p = 2.4 in BRECQ (arXiv:2102.05426)."""
    fractions = torch.arange(1, steps + 1, dtype=torch.float64) / steps
    low, high = fractions * stats.minimum, fractions * stats.maximum
    best = float(fractions[quantization_error(stats, low, high, bits, symmetric, p).argmin()])
    return stats.minimum * best, stats.maximum * best


def search_range(stats, bits, symmetric=False, p=2.0):
    """The range [low, high] with the least sum of |error|^p, both ends free (symmetric: one)."""
    low, high = min(stats.minimum, 0.0), max(stats.maximum, 0.0)
    if symmetric:
        high = max(-low, high)
        low = -high if stats.minimum < 0 else 0.0
    best, step = (0.5, 0.5), 1 / 48
    low_grid = high_grid = torch.arange(1, 49, dtype=torch.float64) / 48
    for _ in range(3):
        if symmetric or low == 0 or high == 0:
            lows = highs = high_grid
        else:
            lows, highs = torch.cartesian_prod(low_grid, high_grid).unbind(1)
        errors = quantization_error(stats, low * lows, high * highs, bits, symmetric, p)
        i = int(errors.argmin())
        best = float(lows[i]), float(highs[i])
        around = torch.linspace(-1, 1, 13, dtype=torch.float64) * step
        low_grid, high_grid = ((b + around).clamp(step / 24, 1.0) for b in best)
        step /= 6
    return low * best[0], high * best[1]


def quantization_error(stats, low, high, bits, symmetric=False, p=2.0):
    """Mean |error|^p of what `stats` saw in each of the ranges [low, high]; float64 [G] all.

    A value stands for the middle of its bin, at most 1/8 of a step wide at 8 bits. Zeros are exact.
    """
    centers, counts = stats.histogram()
    seen = counts > 0
    centers, counts = centers[seen].float(), counts[seen].double()
    q = choose_qparams(low, high, bits, symmetric=symmetric, signed=stats.minimum < 0, axis=0)
    errors = []
    for part in zip(q.scale.split(256), q.zero_point.split(256)):  # a few megabytes at once
        chunk = dataclasses.replace(q, scale=part[0], zero_point=part[1])
        x_hat = fake_quantize(centers.expand(len(chunk.scale), -1), chunk)
        errors.append((x_hat - centers).abs().double().pow(p) @ counts)
    return torch.cat(errors) / max(stats.count, 1)


# ---- From information and from a model of the distribution ---------------------------------------


def entropy(stats, bits, symmetric=False, bins=2048):
    """The threshold on |x| with the least KL divergence KL(P || Q) (NVIDIA, GTC 2017, s7310).

    P: the first i of `bins` bins, everything beyond added to the last. Q: the first i bins, merged
    into one group a level on one side of zero, each group's count spread over its occupied bins.
    As log Q is constant in a group, sums over groups give the divergence of every i at once.
    """
    centers, counts = stats.histogram()
    if not len(counts):
        return 0.0, 0.0
    top = max(-stats.minimum, stats.maximum)
    index = (centers.abs() * (bins / (top * (1 + 1e-9)))).long().clamp(max=bins - 1)
    x = torch.zeros(bins, dtype=torch.float64).index_add_(0, index, counts.double())
    levels = 2 ** (bits - 1) if stats.minimum < 0 else 2**bits
    kept = torch.arange(levels, bins + 1)  # every i
    first = -(-torch.arange(levels + 1) * kept[:, None] // levels)  # bin of each group of each i

    def group_sums(values):
        return F.pad(values.cumsum(0), (1, 0))[first].diff()

    total, occupied = group_sums(x), group_sums((x > 0).double())
    last, beyond = x[kept - 1], x.sum() - x.cumsum(0)[kept - 1]
    p_log_p = xlogy(x, x).cumsum(0)[kept - 1] - xlogy(last, last)
    p_log_p += xlogy(last + beyond, last + beyond)
    spread = total / occupied.clamp(min=1)
    p_log_q = xlogy(total, spread).sum(1) + xlogy(beyond, spread[:, -1])
    divergence = (p_log_p - p_log_q) / x.sum() + torch.log(total.sum(1) / x.sum())
    divergence[((last == 0) & (beyond > 0)) | (total.sum(1) == 0)] = math.inf
    t = top * int(kept[divergence.argmin()]) / bins
    return max(-t, min(stats.minimum, 0.0)), min(t, max(stats.maximum, 0.0))


def aciq_laplace(stats, bits, symmetric=False):
    """mean +- c E|x - mean|, best for a Laplace distribution (Banner et al. 2019): c e^c = 3 * 4^M.

    M bits; M + 1 where values are never negative: one half of a distribution around zero.
    """

    def factor(m):
        return float(scipy.special.lambertw(3 * 4**m).real)

    return _model_range(stats, bits, factor, absolute=True)


def aciq_gauss(stats, bits, symmetric=False):
    """mean +- c sigma, best for a normal distribution (Banner et al. 2019).

    c (1 - erf(c / sqrt 2)) - sqrt(2 / pi) e^(-c^2 / 2) + c / (3 * 4^M) = 0; M as in aciq_laplace.
    """

    def slope(c, m):
        density = math.sqrt(2 / math.pi) * math.exp(-c * c / 2)
        return c * math.erfc(c / math.sqrt(2)) - density + c / (3 * 4**m)

    def factor(m):
        return scipy.optimize.brentq(slope, 0.1, 10, args=(m,))

    return _model_range(stats, bits, factor, absolute=False)


def _model_range(stats, bits, factor, absolute):
    centers, counts = stats.histogram()
    if not len(counts):
        return 0.0, 0.0
    if stats.minimum >= 0:
        mean, total, bits = 0.0, float(counts.sum()), bits + 1  # and the same mirrored
    else:
        mean, total = float(centers @ counts.double()) / stats.count, stats.count
        # the middle of the last bin may lie beyond
        mean = min(max(mean, stats.minimum), stats.maximum)
    deviation = (centers - mean).abs() if absolute else (centers - mean).square()
    moment = float(deviation @ counts.double())
    if stats.minimum < 0:  # exact zeros are counted apart
        moment += stats.zeros * (abs(mean) if absolute else mean**2)
    half = factor(bits) * (moment / total if absolute else math.sqrt(moment / total))
    return max(mean - half, min(stats.minimum, 0.0)), min(mean + half, max(stats.maximum, 0.0))


OBSERVERS = {
    "minmax": minmax, "percentile": percentile, "histogram": histogram, "mse": mse,
    "entropy": entropy, "aciq_laplace": aciq_laplace, "aciq_gauss": aciq_gauss,
}


def find_observer(observer):
    """The range setter of that name, or the callable itself; UserError with the names there are."""
    if callable(observer):
        return observer
    check_name("observer", observer, [*OBSERVERS, "or a function (stats, bits, symmetric)"])
    return OBSERVERS[observer]


def observer_name(observer):
    """The name that a row of results carries: histogram, percentile(q=99.9), a function's own."""
    if isinstance(observer, functools.partial):
        settings = ", ".join(f"{k}={v}" for k, v in observer.keywords.items())
        return f"{observer.func.__name__}({settings})"
    return observer if isinstance(observer, str) else observer.__name__


# ---- Weights -------------------------------------------------------------------------------------

# Exponent of the weights' error: squared errors clip most and shrink every layer's output. Notebook
# 03 measures 2 to 4 on held-out images (BRECQ takes 2.4); 3 is best at W4A4 on cifar10-jpeg.
WEIGHT_NORM = 3.0
WEIGHT_OBSERVERS = ("minmax", "lp")


def weight_range(weight, bits, *, observer="lp", p=WEIGHT_NORM, per_channel=True, symmetric=True):
    """(low, high) of a weight [C, ...]: tensors [C], or [] per tensor.

    "minmax": the whole range. "lp": shrunk to the fraction with the least sum of |error|^p. Where
    not symmetric, all 2^b codes: as the range lies, or on one side of zero one more than on the
    other, whichever errs less.
    """
    check_name("weight_observer", observer, WEIGHT_OBSERVERS)
    flat = weight.detach().flatten(1) if per_channel else weight.detach().reshape(1, -1)
    low, high = flat.amin(1).double(), flat.amax(1).double()
    if observer == "lp":
        if not symmetric:  # three ranges, one behind the other
            below = low.new_tensor([[2 ** (bits - 1)], [2 ** (bits - 1) - 1]])
            above = 2**bits - 1 - below
            step = torch.maximum(-low / below, high / above)
            low = torch.vstack([low, -below * step]).flatten()
            high, flat = torch.vstack([high, above * step]).flatten(), flat.repeat(3, 1)
        factor, best = torch.ones_like(low), torch.full_like(low, math.inf)
        # 1.00, 0.95, … 0.05, then hundredths around the best
        for steps in (torch.arange(20).float() * -0.05, torch.arange(-4, 5).float() * 0.01):
            centre = factor
            for step in steps.tolist():
                part = (centre + step).clamp(0.01, 1)
                q = choose_qparams(low * part, high * part, bits, symmetric=symmetric, axis=0)
                error = (fake_quantize(flat, q) - flat).abs_().pow_(p).sum(1).double()
                factor = torch.where(error < best, part, factor)
                best = torch.fmin(error, best)
        ends = torch.stack([low, high]).mul(factor).view(2, 1 if symmetric else 3, -1)
        least = best.view(ends.shape[1:]).argmin(0)
        low, high = ends[:, least, torch.arange(len(least))]
    return (low, high) if per_channel else (low[0], high[0])
