"""Integer layers by torch's own operators, for CUDA and for machines without a C compiler: matrix products behind im2col, passes over rows.

Everything here is exact. Rows are windows, pixels or samples; columns are channels.
"""

import functools
import importlib.util
import time
import warnings

import torch
import torch.nn.functional as F

from quantlab.integer.fixedpoint import requantize
from quantlab.integer.operations import add_rescaled
from quantlab.system.errors import UserError

BLOCK = 2**16  # elements that uncompiled requantization takes at a time; as int64 half a megabyte
ACCUMULATORS = 2**19  # int32 results of a matrix product at a time, two megabytes: they need not go through memory on their way to codes


# ---- The integer matrix product ---------------------------------------------------------------------------------------------


def int_mm(a, b):
    """int8 [M, K] @ int8 [K, N] -> int32 [M, N], exact; K and N multiples of 8."""
    if not has_integer_gemm(a.device.type):
        return a.int() @ b.int()
    padded = F.pad(a, (0, 0, 0, 17 - len(a))) if len(a) < 17 else a  # CUDA takes no fewer rows
    return torch._int_mm(padded, b)[: len(a)]


@functools.cache
def has_integer_gemm(device_type):
    """True when torch._int_mm is there, exact and a kernel: on CPUs without VNNI a pair of int8 products can saturate at 16 bits, unnoticed,
    or torch multiplies in a plain loop that takes several times as long as int32 matrices."""
    a = torch.tensor([-128, 127], dtype=torch.int8).repeat_interleave(512).view(1024, 1).expand(1024, 64).contiguous().to(device_type)
    b = torch.tensor([-127, 127], dtype=torch.int8).repeat(4).expand(64, 8).contiguous().to(device_type)
    try:
        exact = torch.equal(torch._int_mm(a, b).cpu(), a.cpu().int() @ b.cpu().int())
        why = "has no kernel for this processor" if exact else "saturates on this processor"
    except (AttributeError, RuntimeError) as error:
        exact, why = False, str(error).splitlines()[0]
    if device_type != "cpu" and not exact:
        raise UserError(f"this {device_type} device has no integer matrix product ({why}); run on the CPU: QUANTLAB_DEVICE=cpu")
    useful = exact and (device_type != "cpu" or _least_seconds(torch._int_mm, a, b) < _least_seconds(torch.matmul, a.int(), b.int()))
    if not useful:
        warnings.warn(f"torch._int_mm {why}: the fast executor multiplies int32 matrices instead, exact but slow", stacklevel=2)
    return useful


def _least_seconds(function, a, b, repeats=5):
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        function(a, b)
        times.append(time.perf_counter() - started)
    return min(times)


def im2col(x, kernel, stride, dilation, padding, zero_point, width):
    """Codes int8 [B, C, H, W] -> (one row a window, int8 [B * Ho * Wo, width], zero behind kh * kw * C; (B, Ho, Wo))."""
    x = x.contiguous(memory_format=torch.channels_last)
    if any(padding):
        x = F.pad(x, padding, value=zero_point)
    x = x.permute(0, 2, 3, 1)
    batch, height, columns = (x.shape[0], *((n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(x.shape[1:3], kernel, stride, dilation)))
    channels = x.shape[3]
    if tuple(kernel) == (1, 1) and channels == width:
        return x[:, :: stride[0], :: stride[1]].reshape(-1, channels), (batch, height, columns)
    b, h, w, c = x.stride()
    shape = (batch, height, columns, *kernel, channels)
    windows = x.as_strided(shape, (b, h * stride[0], w * stride[1], h * dilation[0], w * dilation[1], c), x.storage_offset())
    used = kernel[0] * kernel[1] * channels
    out = (x.new_zeros if used < width else x.new_empty)(batch * height * columns, width)
    out.view(batch, height, columns, width)[..., :used].unflatten(-1, (*kernel, channels)).copy_(windows)
    return out, (batch, height, columns)


# ---- One pass over rows of int32 accumulators or int8 codes, [M, N] -> int8 codes; constants as in fixedpoint.requantize ------------


def store_rows(acc, bias, multiplier, shift, zero_point, low, high, rounding):
    return requantize(acc + bias, multiplier, shift, zero_point, low, high, rounding).to(torch.int8)


def affine_rows(x, zero_point_in, weight, bias, multiplier, shift, zero_point, low, high, rounding):
    return requantize((x.int() - zero_point_in) * weight + bias, multiplier, shift, zero_point, low, high, rounding).to(torch.int8)


def requantize_rows(x, zero_point_in, multiplier, shift, zero_point, low, high, rounding):
    return requantize(x.int() - zero_point_in, multiplier, shift, zero_point, low, high, rounding).to(torch.int8)


def add_rows(a, b, zero_points, multipliers, shifts, multiplier, shift, zero_point, low, high, rounding):
    acc = add_rescaled(a, b, zero_points, multipliers, shifts, rounding)
    return requantize(acc, multiplier, shift, zero_point, low, high, rounding).to(torch.int8)


@functools.cache
def compiled(function):
    return torch.compile(function, dynamic=True)


def to_rows(x):
    """[B, C, H, W] or [..., C] -> [M, C], without a copy in channels-last order."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]) if x.dim() == 4 else x.reshape(-1, x.shape[-1])


def from_rows(rows, like):
    if like.dim() == 4:
        return rows.view(like.shape[0], *like.shape[2:], -1).permute(0, 3, 1, 2)
    return rows.view(*like.shape[:-1], -1)


@functools.cache
def has_triton():
    if importlib.util.find_spec("triton") is None:
        warnings.warn("Triton is not installed: on CUDA the fast executor requantizes uncompiled, exact but slower", stacklevel=2)
        return False
    return True


def run_rows(function, rows, *constants, compile=False):
    """function(*rows, *constants) for [M, N] tensors, int8: on CUDA one kernel where `compile` is and Triton, on the CPU block by block."""
    if compile and rows[0].is_cuda and has_triton():
        return compiled(function)(*rows, *constants)
    step = len(rows[0]) if rows[0].is_cuda else max(1, BLOCK // rows[0].shape[1])
    return torch.cat([function(*(r[i : i + step] for r in rows), *constants) for i in range(0, len(rows[0]), step)])
