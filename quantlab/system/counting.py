"""How many values fall into each bin of a histogram: exact, on every core.

    counts, zeros = count_bins(x, level, first, size)

In C (counting.c) on a CPU with a compiler, else by torch: the same counts.
"""

import ctypes
import functools
import threading

import torch

from quantlab.system import compiled
from quantlab.system.files import PACKAGE
from quantlab.system.timing import one_core_each

SOURCE = PACKAGE / "system/counting.c"
PIECE = 1 << 19  # values that torch counts at once: fewer, and threads wait for Python's lock
THREADED = 1 << 16  # values below which threads cost more than they save


def count_bins(x, level, first, size):
    """(counts int64 [size], zeros) of a float32 [N] whose values all lie in the bins.

    Bin i holds the values in ((first + i) w, (first + i + 1) w], w = 2^level, zeros apart.
    """
    count = _count_in_c if x.is_cpu and library() else _count_in_torch
    return count(x, level, first, size)


# ---- In C ----------------------------------------------------------------------------------------


class Work(ctypes.Structure):
    """Work of counting.c."""

    _fields_ = [("x", ctypes.c_void_p), ("n", ctypes.c_int64), ("taken", ctypes.c_int64),
                ("width", ctypes.c_float), ("per_width", ctypes.c_float),
                ("first", ctypes.c_int64), ("bins", ctypes.c_int64), ("counts", ctypes.c_void_p)]


@functools.cache
def library():
    """counting.c as a ctypes library; None where it cannot be compiled."""
    try:
        found = compiled.load(SOURCE)
    except OSError:
        return None  # without a word: torch counts the same, in three times the time
    found.count.argtypes = [ctypes.c_void_p]
    return found


def _count_in_c(x, level, first, size):
    counts = torch.zeros(size + 2, dtype=torch.int64)  # the last two: zeros, values outside
    work = Work(x.data_ptr(), len(x), 0, 2.0**level, 2.0**-level, first, size, counts.data_ptr())
    threads = torch.get_num_threads() if len(x) >= THREADED else 1
    failed = compiled.in_threads(library().count, [(ctypes.byref(work),)] * threads)
    *_, zeros, outside = counts.tolist()
    if any(failed) or outside:
        raise ValueError(f"{outside} values lie outside of {size} bins")
    return counts[:size], zeros


# ---- In torch ------------------------------------------------------------------------------------


def _count_in_torch(x, level, first, size):
    if x.is_cuda or len(x) < THREADED:
        counts, zeros = _count_part(x, level, first, size)
    else:
        parts = one_core_each(lambda part: _count_part(part, level, first, size), x)
        counts, zeros = map(sum, zip(*parts))
    if first == 0:  # nothing negative: only a zero rounds up to 0
        return counts[1:].cpu(), int(counts[0])
    counts[-first] -= zeros  # they were counted in bin -1, which ends at 0
    return counts[1:].cpu(), zeros


def _count_part(x, level, first, size):
    """(counts int64 [size + 1] of ceil(x / w) - first, zeros): exact, w is a power of two."""
    buffer, codes = _buffers(x)
    # two tables, so that no count waits for the one before it: 4 * MIN_BINS + 6 bins fit an int16
    start = torch.full_like(buffer[: len(x)], first)
    start[1::2] -= size + 1
    counts, zeros = torch.zeros(2 * (size + 1), dtype=torch.int64, device=x.device), 0
    for part in x.split(len(buffer)):
        b, c = buffer[: len(part)], codes[: len(part)]
        if first:
            # a piece has fewer than 2^24 values
            zeros += int(torch.eq(part, 0, out=b).sum(dtype=torch.float64 if x.is_cuda else None))
        torch.mul(part, 2.0**-level, out=b).ceil_()
        if level > 0:
            b += (part > 0) & (b == 0)  # x / w was too small for a float32
        counts += torch.bincount(c.copy_(b.sub_(start[: len(part)])), minlength=len(counts))
    return counts.view(2, -1).sum(0), zeros


def _buffers(x):
    """Room for a piece, float32 and int16: as large as x on an accelerator."""
    if x.is_cuda:
        return torch.empty_like(x), torch.empty_like(x, dtype=torch.int16)
    if not hasattr(_local, "buffers"):
        with torch.inference_mode(False):  # made in that mode, they could not be written outside it
            types = torch.float32, torch.int16
            _local.buffers = tuple(torch.empty(PIECE, dtype=dtype) for dtype in types)
    return _local.buffers


_local = threading.local()
