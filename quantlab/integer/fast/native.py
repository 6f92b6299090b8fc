"""integer_kernels.c from Python: compiled by the system's C compiler at first use, kept in the user's cache, called on torch tensors.

ctypes lets go of the interpreter during a call, so work is split over torch.get_num_threads() Python threads.
"""

import concurrent.futures
import ctypes
import functools
import hashlib
import os
import pathlib
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings

import torch
import torch.nn.functional as F

from quantlab.system.errors import UserError
from quantlab.system.files import PACKAGE, atomic_path, sha256, write_text

SOURCE = PACKAGE / "integer/fast/kernels.c"
ARM = platform.machine().lower() in ("arm64", "aarch64")
FLAGS = ("-O3", "-mcpu=native" if ARM else "-march=native", "-fwrapv", "-shared", "-fPIC")
OUT = 16  # channels that the kernels compute at a time, as in the source
BAND = 2**17  # bytes of widened codes that a task works on: they and a block of weights stay in the cache
THREADED = 2**22  # multiplications below which threads cost more than they save
ELEMENTS = 2**17  # the same for a pass over codes
LARGEST_SHIFT = 12  # a multiplier of 2^11 saturates every 8-bit code, as any larger one does


# ---- Compiled once, loaded --------------------------------------------------------------------------------------------------


@functools.cache
def library():
    """The kernels as a ctypes library, or None, after a warning that says why, where there is no compiler or it fails."""
    compiler = shlex.split(os.environ.get("CC", "")) or next(([c] for c in ("cc", "gcc", "clang") if shutil.which(c)), None)
    try:
        if compiler is None:
            raise OSError("no C compiler (cc, gcc, clang or $CC) was found")
        with tempfile.TemporaryDirectory(prefix="quantlab-", ignore_cleanup_errors=True) as temporary:  # loaded, it may go
            try:
                return declared(_load(cache_folder(), compiler))
            except (UserError, OSError):
                return declared(_load(pathlib.Path(temporary), compiler))  # the cache cannot be written or allows no libraries
    except OSError as error:
        why = str(error)
    except subprocess.CalledProcessError as error:
        why = f"{shlex.join(compiler)} fails: {(error.stderr.strip().splitlines() or [error])[0]}"
    warnings.warn(f"the fast executor runs without its C kernels, exact but slower: {why}", stacklevel=2)
    return None


def cache_folder():
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "quantlab"


def _load(folder, compiler):
    """The library in `folder`, compiled if it is not there or not what was written; its name is a hash of all that decides it."""
    version = _output([*compiler, "--version"])
    key = "\0".join([SOURCE.read_text(encoding="utf-8"), *compiler, version, *FLAGS, _processor()])
    path = folder / f"kernels-{hashlib.sha256(key.encode()).hexdigest()[:32]}.so"
    digest = path.with_suffix(".sha256")
    if not (path.exists() and digest.exists() and digest.read_text() == sha256(path)):  # loading a damaged one would end the process
        with atomic_path(path) as temporary:
            _output([*compiler, *FLAGS, str(SOURCE), "-o", str(temporary)])
        write_text(digest, sha256(path))
    return ctypes.CDLL(str(path))


def _output(command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _processor():
    """What the compiler looks at for "native"."""
    info = pathlib.Path("/proc/cpuinfo")
    lines = set(info.read_text().splitlines()) if info.exists() else ()
    return "\n".join(sorted(line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part")))) or platform.processor()


def declared(library):
    """With the types of the kernels' arguments, for speed: p a pointer, i an int64; all end in begin and end."""
    for name, arguments in (("conv", "ppppppp"), ("requantize", "pipp"), ("add", "ppiippp"), ("affine", "piipppp")):
        getattr(library, name).argtypes = [{"p": ctypes.c_void_p, "i": ctypes.c_int64}[a] for a in arguments + "ii"]
    return library


# ---- Calls ------------------------------------------------------------------------------------------------------------------


class Shape(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ["images", "height", "width", "channels", "rows", "columns", "outputs", "groups", "kernel_h", "kernel_w", "stride_h", "stride_w", "dilation_h", "dilation_w", "top", "left", "zero_point", "depthwise", "band_images", "band_rows", "stretches", "stretch"]]


def pack_constants(multiplier, shift, zero_point, low, high, rounding, groups=1):
    """int32 [4 + 4 * channels]: Output of integer_kernels.c, from which it computes fixedpoint.requantize.

    multiplier, shift: int32 of one value or one a channel; groups: into which a layer's channels are padded.
    """
    channels = OUT if multiplier.numel() == 1 and groups == 1 else multiplier.numel()
    q, shift = (x.flatten().int().expand(channels) for x in (multiplier, shift.clamp(max=LARGEST_SHIFT)))
    away = (shift < 0) & (rounding == "double")
    up, down = torch.where(away, 0, (shift + 1).clamp(min=0)), (-shift - 1).clamp(min=0)
    zero_point, low, high = int(zero_point), int(low), int(high)
    head = torch.tensor([zero_point, low - zero_point, high - zero_point, not (up.any() or away.any())], dtype=torch.int32)
    return torch.cat([head, *(pad_outputs(x.int(), groups) for x in (q, up, down, away))])


def pad_outputs(x, groups=1):
    """[channels, ...] with zeros behind every group, so that it fills the kernels' blocks."""
    x = x.unflatten(0, (groups, -1))
    return torch.cat([x, x.new_zeros(groups, -x.shape[1] % OUT, *x.shape[2:])], 1).flatten(0, 1).contiguous()


class Layer:
    """A convolution on int8 [B, H, W, C]; a linear layer is one of images of one pixel. weight: int32 [O, C / groups, kh, kw].

    padding: left, right, top, bottom; constants: the arguments of `pack_constants`, None for int32 logits.
    """

    def __init__(self, weight, bias, zero_point, constants=None, stride=(1, 1), dilation=(1, 1), padding=(0, 0, 0, 0), groups=1):
        outputs, inner, kh, kw = weight.shape
        depthwise = inner == 1 and groups == outputs
        blocks = 1 if depthwise else groups
        self.padding, self.work, self.sizes = padding, weight[0].numel(), {}
        neighbours = groups == 1 and dilation[1] == 1  # codes under a row of the kernel are one stretch
        stretches, stretch = (1, kw * inner) if neighbours and not depthwise else (kw, inner)
        rows = F.pad(weight.permute(0, 2, 3, 1).reshape(outputs, kh * stretches, stretch), (0, stretch % 2))
        rows = pad_outputs(rows, blocks).to(torch.int16).view(-1, OUT, rows.shape[1] * rows.shape[2] // 2, 2)
        self.weight = rows.transpose(1, 2).contiguous()  # [blocks of channels, pairs, OUT, 2]; depthwise: a weight and a zero
        self.bias = pad_outputs(bias.int(), blocks)
        self.constants = None if constants is None else pack_constants(*constants, groups=blocks)
        self.shape = Shape(outputs=outputs, groups=groups, kernel_h=kh, kernel_w=kw, zero_point=zero_point, depthwise=depthwise,
                           stride_h=stride[0], stride_w=stride[1], dilation_h=dilation[0], dilation_w=dilation[1],
                           left=padding[0], top=padding[2], stretches=stretches, stretch=stretch + stretch % 2)

    def sized(self, images, height, width, channels, threads):
        """(Shape, size of the result, number of tasks) for inputs of this size; a task is whole images, or rows of one, that fit BAND."""
        s = Shape.from_buffer_copy(self.shape)
        s.images, s.height, s.width, s.channels = images, height, width, channels
        left, right, top, bottom = self.padding
        s.rows = (height + top + bottom - s.dilation_h * (s.kernel_h - 1) - 1) // s.stride_h + 1
        s.columns = (width + left + right - s.dilation_w * (s.kernel_w - 1) - 1) // s.stride_w + 1
        row = 2 * channels * ((s.columns - 1) * s.stride_w + s.dilation_w * (s.kernel_w - 1) + 1)
        lines = (BAND // row - s.dilation_h * (s.kernel_h - 1) - 1) // s.stride_h + 1  # output rows
        s.band_rows = max(1, min(s.rows, lines, s.rows if images >= threads else -(-s.rows // threads)))
        s.band_images = max(1, min(lines // s.rows, -(-images // threads)))
        return s, (s.images, s.rows, s.columns, s.outputs), -(-s.images // s.band_images) * -(-s.rows // s.band_rows)

    def __call__(self, x):
        """int8 codes [B, Ho, Wo, O], or int32 logits."""
        key = x.shape, torch.get_num_threads()
        if key not in self.sizes:
            self.sizes[key] = self.sized(*x.shape, key[1])
        s, size, tasks = self.sizes[key]
        logits = self.constants is None
        y = torch.empty(size, dtype=torch.int32 if logits else torch.int8)
        results = (None, y) if logits else (y, None)
        arguments = ctypes.byref(s), x.contiguous(), self.weight, self.bias, self.constants, *results
        call("conv", arguments, tasks, y.numel() * self.work, THREADED)
        return y


def call(name, arguments, n, work, enough):
    """The kernel `name` for parts of range(n), in threads where there is `enough` work; arguments: contiguous tensors, None, integers."""
    function = getattr(library(), name)
    passed = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments]
    threads = min(torch.get_num_threads(), n) if work >= enough else 1
    if threads <= 1:
        failed = n and function(*passed, 0, n)
    else:
        ends = [n * i // threads for i in range(threads + 1)]
        others = [_threads(os.getpid()).submit(function, *passed, *part) for part in zip(ends[1:], ends[2:])]
        failed = any([function(*passed, *ends[:2]), *(other.result() for other in others)])
    if failed:
        raise MemoryError(f"no memory for the kernel {name}")


@functools.cache
def _threads(process):
    return concurrent.futures.ThreadPoolExecutor(os.cpu_count())


def requantize(x, zero_point, constants):
    """clamp(zero_point_out + round((x - zero_point) M)): int8 codes to int8 codes of any shape; constants: of `pack_constants`."""
    x = x.contiguous()
    y = torch.empty_like(x)
    call("requantize", (x, zero_point, constants, y), x.numel(), x.numel(), ELEMENTS)
    return y


def add(a, b, zero_points, operand, constants):
    """int8 codes + int8 codes -> int8 codes of equal shapes, the scale of a the larger; operand, constants: `pack_constants` of b and of the sum."""
    a, b = a.contiguous(), b.contiguous()
    y = torch.empty_like(a)
    call("add", (a, b, *zero_points, operand, constants, y), a.numel(), a.numel(), ELEMENTS)
    return y


def affine(x, zero_point, weight, bias, constants):
    """int8 [..., C] times int32 [C] plus int32 [C] -> int8 codes; weight, bias and constants padded by pad_outputs."""
    x = x.contiguous()
    y, channels = torch.empty_like(x), x.shape[-1]
    call("affine", (x, channels, zero_point, weight, bias, constants, y), x.numel() // channels, x.numel(), ELEMENTS)
    return y
