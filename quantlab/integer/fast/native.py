"""kernels.c from Python: compiled at first use (system/compiled.py), called on torch tensors, work
split over torch.get_num_threads() threads.
"""

import ctypes
import functools
import math
import time
import warnings

import torch
import torch.nn.functional as F

from quantlab.system import compiled
from quantlab.system.errors import UserError
from quantlab.system.files import PACKAGE

SOURCE = PACKAGE / "integer/fast/kernels.c"  # it includes the headers beside it
OUT = 16  # channels that the kernels compute at a time, as in the source
# bytes of widened codes that a task works on: they and a block of weights stay in the cache
BAND = 2**17
THREADED = 2**22  # multiplications below which threads cost more than they save
ELEMENTS = 2**17  # the same for a pass over codes
SHORTEST = 4  # products of four that 16 bits must hold, or widening eats what they save
WIDEST = 2**15 - 1  # of a weight, which kernels read as int16
LARGEST_SHIFT = 12  # a multiplier of 2^11 saturates every 8-bit code, as any larger one does


# ---- Compiled once, loaded -----------------------------------------------------------------------


@functools.cache
def library():
    """The kernels as a ctypes library, or None, after a warning that says why, where there is no
    compiler or it fails.
    """
    try:
        return declared(compiled.load(SOURCE))
    except OSError as error:
        warnings.warn(f"the fast executor runs without its C kernels, exact but slower: {error}",
                      stacklevel=2)
        return None


def declared(library):
    """With the types of the kernels' arguments, for speed: p a pointer, i an int64; the last two
    are begin and end.
    """
    types = {"p": ctypes.c_void_p, "i": ctypes.c_int64}
    convolutions = dict.fromkeys(("conv_words", "conv_bytes", "conv_depthwise"), "ppppppp")
    signatures = convolutions | {"requantize": "pipp", "add": "ppiippp", "affine": "piipppp"}
    signatures["peak_bytes"] = "pp"
    for name in ("byte_sums", "byte_lanes", "peak_products"):
        if hasattr(library, name):
            getattr(library, name).restype = ctypes.c_int64
    for name, arguments in signatures.items():
        if hasattr(library, name):  # kernels of bytes are not everywhere
            getattr(library, name).argtypes = [types[letter] for letter in arguments + "ii"]
    return library


# ---- Layers --------------------------------------------------------------------------------------


class Shape(ctypes.Structure):
    """Shape of kernels.c."""

    _fields_ = [(name, ctypes.c_int64) for name in (
        "images", "height", "width", "channels", "rows", "columns", "outputs", "groups", "kernel_h",
        "kernel_w", "stride_h", "stride_w", "dilation_h", "dilation_w", "top", "left", "zero_point",
        "depthwise", "band_images", "band_rows", "stretches", "stretch", "weights", "least",
        "in_place", "run")]


def pack_constants(requantization, channels=OUT, groups=1, block=OUT):
    """int32 [4 + 4 * channels]: Output of kernels.c, from which it computes a Requantization.

    Its multiplier has one value or one a channel; groups: into which channels are padded.
    """
    r = requantization
    channels = channels if r.multiplier.numel() == 1 else r.multiplier.numel()
    q = r.multiplier.flatten().int().expand(channels)
    shift = r.shift.clamp(max=LARGEST_SHIFT).flatten().int().expand(channels)
    away = (shift < 0) & (r.rounding == "double")
    up = torch.where(away, 0, (shift + 1).clamp(min=0))
    down = (-shift - 1).clamp(min=0)
    zero_point = int(r.zero_point)
    plain = not (up.any() or away.any())
    head = [zero_point, int(r.low) - zero_point, int(r.high) - zero_point, plain]
    arrays = (pad_outputs(x.int(), groups, block) for x in (q, up, down, away))
    return torch.cat([torch.tensor(head, dtype=torch.int32), *arrays])


def pad_outputs(x, groups=1, block=OUT):
    """[channels, ...] with zeros behind every group, so that it fills the kernels' blocks."""
    x = x.unflatten(0, (groups, -1))
    padding = x.new_zeros(groups, -x.shape[1] % block, *x.shape[2:])
    return torch.cat([x, padding], 1).flatten(0, 1).contiguous()


def choose_kernel(rows, codes, depthwise):
    """(name, why, run) of the kernel for int32 weights [O, stretches, stretch].

    run: how many products of four a sum of 16 bits holds, whatever the codes.
    """
    sums = library().byte_sums()
    if not sums:
        return "conv_words", "no instruction for bytes here", 0
    if rows.min() < -128 or rows.max() > 127:
        return "conv_words", "a weight does not fit in 8 bits", 0
    name = "conv_depthwise" if depthwise else "conv_bytes"
    if sums == 32:
        return name, "vpdpbusd: four products a sum of 32 bits", 0
    fours = rows.transpose(1, 2) if depthwise else rows
    fours = F.pad(fours, (0, -fours.shape[2] % 4)).flatten(1)
    run = longest_run(fours, codes[1] - codes[0])
    if run < min(1 if depthwise else SHORTEST, fours.shape[1] // 4):
        return "conv_words", f"16 bits hold {4 * run} products in the worst case, too few", 0
    assert fits_16_bits(fours, codes[1] - codes[0], run)
    if depthwise:
        return name, "vpmaddubsw: two products in 16 bits", 0
    return name, f"vpmaddubsw: {4 * run} products a sum of 16 bits", run


def longest_run(fours, most):
    """Products of four that 16 bits hold: all, or half as often as needed; 0: not one.

    fours: weights, int32 [O, a multiple of 4]; codes are 0 .. most.
    """
    run = fours.shape[1] // 4
    while run and not fits_16_bits(fours, most, run):
        run //= 2
    return run


def fits_16_bits(fours, most, run):
    """Whether every sum of pairs over `run` products of four fits, for codes 0 .. most."""
    fours = F.pad(fours, (0, -fours.shape[1] % (4 * run))).view(len(fours), -1, run, 2, 2)
    largest, least = (part.sum((2, 4)) for part in (fours.clamp(min=0), fours.clamp(max=0)))
    return bool(most * largest.max() < 2**15 and most * least.min() >= -(2**15))


def in_turns(x, lanes):
    """[channels, ...] in the order that interleaving bytes leaves: of every 4 * lanes channels
    four of each sixteen.
    """
    return x.unflatten(0, (-1, lanes // 4, 4, 4)).transpose(1, 2).flatten(0, 3).contiguous()


class Layer:
    """A convolution on int8 [B, H, W, C]; a linear layer is one of images of one pixel.

    weight: int32 [O, C / groups, kh, kw]. padding: left, right, top, bottom. requantization: of the
    accumulators, None for int32 logits.
    """

    def __init__(self, weight, bias, zero_point, requantization=None, stride=(1, 1),
                 dilation=(1, 1), padding=(0, 0, 0, 0), groups=1, codes=(-128, 127)):
        outputs, inner, kh, kw = weight.shape
        fits = weight.min() >= -WIDEST and weight.max() <= WIDEST
        if outputs % groups or len(bias) != outputs or not fits:
            raise ValueError(f"no layer: weight {list(weight.shape)} of at most {WIDEST}, bias "
                             f"{list(bias.shape)}, {groups} groups")
        depthwise = inner == 1 and groups == outputs
        blocks = 1 if depthwise else groups
        self.padding, self.work, self.sizes = padding, weight[0].numel(), {}
        # codes under a row of the kernel are one stretch where they are neighbours in memory
        joined = groups == 1 and dilation[1] == 1 and not depthwise
        stretches, stretch = (1, kw * inner) if joined else (kw, inner)
        rows = weight.permute(0, 2, 3, 1).reshape(outputs, kh * stretches, stretch)
        self.name, self.reason, run = choose_kernel(rows, codes, depthwise)
        if self.name == "conv_depthwise":
            rows = rows.transpose(1, 2)  # its taps are one stretch
        lanes = library().byte_lanes()
        step, block = {"conv_words": (2, OUT), "conv_bytes": (4, 2 * lanes),
                       "conv_depthwise": (4, 4 * lanes)}[self.name]
        rows = F.pad(rows, (0, -rows.shape[2] % step))
        weights = rows[0].numel()
        rows = pad_outputs(rows, blocks, block)
        is_bytes = self.name != "conv_words"
        reach = max(codes[1] - zero_point, zero_point - codes[0])
        largest = bias.long().abs() + reach * weight.long().abs().flatten(1).sum(1)
        if is_bytes:
            bias = bias - (zero_point - codes[0]) * weight.flatten(1).sum(1)
        self.bias, self.channels = pad_outputs(bias.int(), blocks, block), inner * groups
        if self.name == "conv_depthwise":
            rows, self.bias = in_turns(rows, lanes), in_turns(self.bias, lanes)
        rows = rows.to(torch.int8 if is_bytes else torch.int16)
        rows = rows.view(-1, block, weights // step, step)
        # [blocks of channels, steps, block, step]; depthwise words: a weight and a zero
        self.weight = rows.transpose(1, 2).contiguous()
        self.constants = None
        if requantization is not None:
            self.constants = pack_constants(requantization, outputs, blocks, block)
            check_constants(len(self.bias), self.constants)
            if self.constants[3] and largest.max() < 2**30:
                self.constants[3] = 2
        as_is = self.name == "conv_bytes" and (kh, kw, *stride) == (1, 1, 1, 1) and not any(padding)
        self.shape = Shape(
            outputs=outputs, groups=groups, kernel_h=kh, kernel_w=kw, zero_point=zero_point,
            depthwise=depthwise, stride_h=stride[0], stride_w=stride[1], dilation_h=dilation[0],
            dilation_w=dilation[1], left=padding[0], top=padding[2], stretches=stretches,
            stretch=stretch + -stretch % step, weights=weights, least=codes[0], run=run,
            in_place=as_is and codes[0] == 0 and inner % 4 == 0)

    def sized(self, images, height, width, channels, threads):
        """(Shape, size of the result, number of tasks) for inputs of this size.

        A task is whole images, or rows of one, that fit BAND.
        """
        s = Shape.from_buffer_copy(self.shape)
        s.images, s.height, s.width, s.channels = images, height, width, channels
        left, right, top, bottom = self.padding
        reach_h, reach_w = s.dilation_h * (s.kernel_h - 1), s.dilation_w * (s.kernel_w - 1)
        s.rows = (height + top + bottom - reach_h - 1) // s.stride_h + 1
        s.columns = (width + left + right - reach_w - 1) // s.stride_w + 1
        if min(s.rows, s.columns) < 1:
            raise UserError(f"a kernel of {reach_h + 1}x{reach_w + 1} does not fit into images of "
                            f"{height}x{width} pixels; use larger ones")
        line = (s.columns - 1) * s.stride_w + reach_w + 1
        row = self.weight.element_size() * channels * line  # bytes
        lines = (BAND // row - reach_h - 1) // s.stride_h + 1  # output rows
        part = s.rows if images >= threads else -(-s.rows // threads)
        s.band_rows = max(1, min(s.rows, lines, part))
        s.band_images = max(1, min(lines // s.rows, -(-images // threads)))
        tasks = -(-images // s.band_images) * -(-s.rows // s.band_rows)
        return s, (images, s.rows, s.columns, s.outputs), tasks

    def __call__(self, x):
        """int8 codes [B, H, W, C] -> int8 codes [B, Ho, Wo, O], or int32 logits."""
        check_codes(x, 4, self.channels)
        key = x.shape, torch.get_num_threads()
        if key not in self.sizes:
            self.sizes[key] = self.sized(*x.shape, key[1])
        s, size, tasks = self.sizes[key]
        logits = self.constants is None
        y = torch.empty(size, dtype=torch.int32 if logits else torch.int8)
        results = (None, y) if logits else (y, None)
        arguments = (ctypes.byref(s), x.contiguous(), self.weight, self.bias, self.constants)
        call(self.name, arguments + results, tasks, y.numel() * self.work, THREADED)
        return y


# ---- Calls ---------------------------------------------------------------------------------------


def peak(rounds=20, tasks=256):
    """Products of bytes a second that the instruction itself reaches here, on as many threads as
    torch has: the best of `rounds`; None where there is no such instruction.
    """
    if not library() or not library().byte_sums():
        return None
    x, y = torch.ones(2 * 4 * 16, dtype=torch.int8), torch.zeros(tasks, dtype=torch.int32)
    products, best = tasks * library().peak_products(), math.inf
    for _ in range(rounds):
        started = time.perf_counter()
        call("peak_bytes", (x, y), tasks, products, THREADED)
        best = min(best, time.perf_counter() - started)
    return products / best


def call(name, arguments, n, work, enough):
    """The kernel `name` for parts of range(n), in threads where there is `enough` work.

    arguments: contiguous tensors, None, integers.
    """
    function = getattr(library(), name)
    passed = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments]
    threads = min(torch.get_num_threads(), n) if work >= enough else 1
    ends = [n * i // threads for i in range(threads + 1)] if n else []
    if any(compiled.in_threads(function, [(*passed, *part) for part in zip(ends, ends[1:])])):
        raise MemoryError(f"no memory for the kernel {name}")


def check_codes(x, dim=None, channels=None):
    """UserError unless a kernel may read x: int8 codes on the CPU, with `dim` dimensions and
    `channels` in the last of them.

    Kernels look at no shape, and read on where memory ends.
    """
    if x.dtype != torch.int8 or not x.is_cpu:
        raise UserError(f"the kernels take int8 codes on the CPU, not {x.dtype} on {x.device}")
    if channels is not None and (x.dim() != dim or x.shape[-1] != channels):
        raise UserError(f"the kernel takes {channels} channels in the last of {dim} dimensions, "
                        f"not codes of shape {list(x.shape)}; pass images such as the network was "
                        "calibrated on")


def check_constants(channels, constants, *arrays):
    """ValueError unless there are constants for so many channels, and arrays of as many int32."""
    for array, n in ((constants, 4 + 4 * channels), *((a, channels) for a in arrays)):
        if array.dtype != torch.int32 or not array.is_cpu or array.shape != (n,):
            raise ValueError(f"{array.dtype} {list(array.shape)}, the kernel reads int32 [{n}]")


def requantize(x, zero_point, constants):
    """clamp(zero_point_out + round((x - zero_point) M)): int8 codes to int8 codes of any shape;
    constants: of `pack_constants`.
    """
    check_codes(x)
    check_constants(OUT, constants)
    x = x.contiguous()
    y = torch.empty_like(x)
    call("requantize", (x, zero_point, constants, y), x.numel(), x.numel(), ELEMENTS)
    return y


def add(a, b, zero_points, operand, constants):
    """int8 codes + int8 codes -> int8 codes of equal shapes, the scale of a the larger; operand,
    constants: `pack_constants` of b and of the sum.
    """
    check_codes(a)
    check_codes(b)
    check_constants(OUT, constants)
    check_constants(OUT, operand)
    if a.shape != b.shape:
        raise UserError(f"codes of shapes {list(a.shape)} and {list(b.shape)} cannot be added; "
                        "pass images such as the network was calibrated on")
    a, b = a.contiguous(), b.contiguous()
    y = torch.empty_like(a)
    call("add", (a, b, *zero_points, operand, constants, y), a.numel(), a.numel(), ELEMENTS)
    return y


def affine(x, zero_point, weight, bias, constants):
    """int8 [..., C] times int32 [C] plus int32 [C] -> int8 codes; weight, bias and constants padded
    by `pad_outputs`.
    """
    check_codes(x)
    channels = x.shape[-1]
    check_constants(-(-channels // OUT) * OUT, constants, weight, bias)
    x = x.contiguous()
    y = torch.empty_like(x)
    arguments = (x, channels, zero_point, weight, bias, constants, y)
    call("affine", arguments, x.numel() // channels, x.numel(), ELEMENTS)
    return y
