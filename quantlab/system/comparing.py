"""How far two results are apart: accuracy on the same images, signal over noise."""

import math

from quantlab.system.errors import checked


@checked
def paired_drop(correct_a, correct_b):
    """(drop, low, high): accuracy of a less that of b on the same images, points, 95 % interval.

    Only images on which they disagree count: Bonett & Price's adjusted Wald interval (2012), which
    stays honest when few or none do. correct_a, correct_b: bool [n].
    """
    n = len(correct_a)
    lost = int((correct_a & ~correct_b).sum())
    gained = int((~correct_a & correct_b).sum())
    p, q = (lost + 1) / (n + 2), (gained + 1) / (n + 2)
    half = 1.959964 * math.sqrt((p + q - (p - q) ** 2) / (n + 2))
    return 100 * (lost - gained) / n, 100 * (p - q - half), 100 * (p - q + half)


def decibels(signal, noise):
    """Signal over noise (sums of squares, or their means), 10 log10(signal / noise), in dB;
    infinite where there is no noise.
    """
    signal, noise = float(signal), float(noise)
    return 10 * math.log10(max(signal, 1e-300) / noise) if noise else math.inf
