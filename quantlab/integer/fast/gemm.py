"""Integer layers by torch's own operators, for CUDA and for machines without a C compiler: matrix
products behind im2col, passes over rows.

Everything here is exact. Rows are windows, pixels or samples; columns are channels.
"""

import functools
import importlib.util
import warnings

import torch
import torch.nn.functional as F

from quantlab.integer.operations import add_rescaled
from quantlab.system.errors import UserError
from quantlab.system.timing import take_turns

BLOCK = 2**16  # elements that uncompiled requantization takes at a time; as int64 half a megabyte
# int32 results of a matrix product at a time, two megabytes: they need not go through memory on
# their way to codes
ACCUMULATORS = 2**19


# ---- The integer matrix product ------------------------------------------------------------------


def int_mm(a, b):
    """int8 [M, K] @ int8 [K, N] -> int32 [M, N], exact; K and N multiples of 8."""
    if not has_integer_gemm(a.device.type):
        return a.int() @ b.int()
    padded = F.pad(a, (0, 0, 0, 17 - len(a))) if len(a) < 17 else a  # CUDA takes no fewer rows
    return torch._int_mm(padded, b)[: len(a)]


@functools.cache
def has_integer_gemm(device_type):
    """True when torch._int_mm is there, exact and a kernel.

    On CPUs without VNNI a pair of int8 products can saturate at 16 bits, unnoticed, or torch
    multiplies in a plain loop that takes several times as long as int32 matrices.
    """
    a = torch.tensor([-128, 127], dtype=torch.int8).repeat_interleave(512)
    a = a.view(1024, 1).expand(1024, 64).contiguous().to(device_type)
    b = torch.tensor([-127, 127], dtype=torch.int8).repeat(4).expand(64, 8)
    b = b.contiguous().to(device_type)
    why = _inexact(a, b)
    if device_type != "cpu":
        if why:
            raise UserError(f"this {device_type} device has no integer matrix product ({why}); run "
                            "on the CPU: QUANTLAB_DEVICE=cpu")
        return True
    if not why and _is_slow(a, b):
        why = "has no kernel for this processor"
    if why:
        warnings.warn(f"torch._int_mm {why}: the fast executor multiplies int32 matrices instead, "
                      "exact but slow", stacklevel=2)
    return not why


def _inexact(a, b):
    """Why torch._int_mm cannot be used, '' where it gives the exact product."""
    try:
        exact = torch.equal(torch._int_mm(a, b).cpu(), a.cpu().int() @ b.cpu().int())
    except (AttributeError, RuntimeError) as error:
        return str(error).splitlines()[0]
    return "" if exact else "saturates on this processor"


def _is_slow(a, b):
    wide = a.int(), b.int()
    times = take_turns({"int8": lambda: torch._int_mm(a, b), "int32": lambda: wide[0] @ wide[1]})
    return min(times["int8"]) >= min(times["int32"])


def im2col(x, kernel, stride, dilation, padding, zero_point, width):
    """Codes int8 [B, C, H, W] -> (one row a window, (B, Ho, Wo)).

    Rows are int8 [B * Ho * Wo, width], zero behind kh * kw * C.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    if any(padding):
        x = F.pad(x, padding, value=zero_point)
    x = x.permute(0, 2, 3, 1)
    size = (len(x), *result_size(x.shape[1:3], kernel, stride, dilation))
    channels = x.shape[3]
    if tuple(kernel) == (1, 1) and channels == width:
        return x[:, :: stride[0], :: stride[1]].reshape(-1, channels), size
    b, h, w, c = x.stride()
    strides = (b, h * stride[0], w * stride[1], h * dilation[0], w * dilation[1], c)
    windows = x.as_strided((*size, *kernel, channels), strides, x.storage_offset())
    used = kernel[0] * kernel[1] * channels
    rows = (x.new_zeros if used < width else x.new_empty)(*size, width)
    rows[..., :used].unflatten(-1, (*kernel, channels)).copy_(windows)
    return rows.view(-1, width), size


def result_size(size, kernel, stride, dilation):
    """Height and width of a convolution's result, for an input that is padded already."""
    return [(size[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in (0, 1)]


# ---- One pass over rows of int32 accumulators or int8 codes, [M, N] -> int8 codes ----------------


def store_rows(acc, bias, requantization):
    return requantization(acc + bias).to(torch.int8)


def affine_rows(x, zero_point_in, weight, bias, requantization):
    return requantization((x.int() - zero_point_in) * weight + bias).to(torch.int8)


def requantize_rows(x, zero_point_in, requantization):
    return requantization(x.int() - zero_point_in).to(torch.int8)


def add_rows(a, b, zero_points, multipliers, shifts, requantization):
    acc = add_rescaled(a, b, zero_points, multipliers, shifts, requantization.rounding)
    return requantization(acc).to(torch.int8)


@functools.cache
def compiled(function):
    return torch.compile(function, dynamic=True)


@functools.cache
def has_triton():
    if importlib.util.find_spec("triton") is None:
        warnings.warn("Triton is not installed: on CUDA the fast executor requantizes uncompiled, "
                      "exact but slower", stacklevel=2)
        return False
    return True


def run_rows(function, rows, *constants, compile=False):
    """function(*rows, *constants) for [M, N] tensors, int8: on CUDA one kernel where `compile` is
    and Triton, on the CPU block by block.
    """
    if compile and rows[0].is_cuda and has_triton():
        return compiled(function)(*rows, *constants)
    n, columns = rows[0].shape
    step = n if rows[0].is_cuda else max(1, BLOCK // columns)
    return torch.cat([function(*(r[i : i + step] for r in rows), *constants)
                      for i in range(0, n, step)])
