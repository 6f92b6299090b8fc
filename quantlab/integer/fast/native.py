"""kernels.c from Python: compiled by the system's C compiler at first use, kept in the user's
cache, called on torch tensors.

ctypes lets go of the interpreter during a call, so work is split over torch.get_num_threads()
Python threads.
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
# bytes of widened codes that a task works on: they and a block of weights stay in the cache
BAND = 2**17
THREADED = 2**22  # multiplications below which threads cost more than they save
ELEMENTS = 2**17  # the same for a pass over codes
LARGEST_SHIFT = 12  # a multiplier of 2^11 saturates every 8-bit code, as any larger one does


# ---- Compiled once, loaded -----------------------------------------------------------------------


@functools.cache
def library():
    """The kernels as a ctypes library, or None, after a warning that says why, where there is no
    compiler or it fails.
    """
    compiler = _compiler()
    try:
        if not compiler:
            raise OSError("no C compiler (cc, gcc, clang or $CC) was found")
        return _load_anywhere(compiler)
    except OSError as error:
        why = str(error)
    except subprocess.CalledProcessError as error:
        why = (error.stderr.strip().splitlines() or [error])[0]
        why = f"{shlex.join(compiler)} fails: {why}"
    warnings.warn(f"the fast executor runs without its C kernels, exact but slower: {why}",
                  stacklevel=2)
    return None


def _compiler():
    """The C compiler as the words of a command; [] where there is none."""
    found = (name for name in ("cc", "gcc", "clang") if shutil.which(name))
    return shlex.split(os.environ.get("CC", "")) or [*found][:1]


def _load_anywhere(compiler):
    """The library from the cache, or from a temporary folder where the cache cannot be written or
    allows no libraries; once loaded, the folder may go.
    """
    with tempfile.TemporaryDirectory(prefix="quantlab-", ignore_cleanup_errors=True) as temporary:
        try:
            return declared(_load(cache_folder(), compiler))
        except (UserError, OSError):
            return declared(_load(pathlib.Path(temporary), compiler))


def cache_folder():
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return pathlib.Path(caches) / "quantlab"


def _load(folder, compiler):
    """The library in `folder`, compiled if it is not there or not what was written.

    Its name is a hash of all that decides it.
    """
    version = _output([*compiler, "--version"])
    key = "\0".join([SOURCE.read_text(encoding="utf-8"), *compiler, version, *FLAGS, _processor()])
    path = folder / f"kernels-{hashlib.sha256(key.encode()).hexdigest()[:32]}.so"
    digest = path.with_suffix(".sha256")
    whole = path.exists() and digest.exists() and digest.read_text() == sha256(path)
    if not whole:  # loading a damaged library would end the process
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
    names = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted(x for x in lines if x.startswith(names))) or platform.processor()


def declared(library):
    """With the types of the kernels' arguments, for speed: p a pointer, i an int64; the last two
    are begin and end.
    """
    types = {"p": ctypes.c_void_p, "i": ctypes.c_int64}
    signatures = {"conv": "ppppppp", "requantize": "pipp", "add": "ppiippp", "affine": "piipppp"}
    for name, arguments in signatures.items():
        getattr(library, name).argtypes = [types[letter] for letter in arguments + "ii"]
    return library


# ---- Layers --------------------------------------------------------------------------------------


class Shape(ctypes.Structure):
    """Shape of kernels.c."""

    _fields_ = [(name, ctypes.c_int64) for name in (
        "images", "height", "width", "channels", "rows", "columns", "outputs", "groups", "kernel_h",
        "kernel_w", "stride_h", "stride_w", "dilation_h", "dilation_w", "top", "left", "zero_point",
        "depthwise", "band_images", "band_rows", "stretches", "stretch")]


def pack_constants(requantization, channels=OUT, groups=1):
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
    arrays = (pad_outputs(x.int(), groups) for x in (q, up, down, away))
    return torch.cat([torch.tensor(head, dtype=torch.int32), *arrays])


def pad_outputs(x, groups=1):
    """[channels, ...] with zeros behind every group, so that it fills the kernels' blocks."""
    x = x.unflatten(0, (groups, -1))
    padding = x.new_zeros(groups, -x.shape[1] % OUT, *x.shape[2:])
    return torch.cat([x, padding], 1).flatten(0, 1).contiguous()


class Layer:
    """A convolution on int8 [B, H, W, C]; a linear layer is one of images of one pixel.

    weight: int32 [O, C / groups, kh, kw]. padding: left, right, top, bottom. requantization: of the
    accumulators, None for int32 logits.
    """

    def __init__(self, weight, bias, zero_point, requantization=None, stride=(1, 1),
                 dilation=(1, 1), padding=(0, 0, 0, 0), groups=1):
        outputs, inner, kh, kw = weight.shape
        depthwise = inner == 1 and groups == outputs
        blocks = 1 if depthwise else groups
        self.padding, self.work, self.sizes = padding, weight[0].numel(), {}
        # codes under a row of the kernel are one stretch where they are neighbours in memory
        joined = groups == 1 and dilation[1] == 1 and not depthwise
        stretches, stretch = (1, kw * inner) if joined else (kw, inner)
        even = stretch + stretch % 2
        rows = weight.permute(0, 2, 3, 1).reshape(outputs, kh * stretches, stretch)
        rows = pad_outputs(F.pad(rows, (0, even - stretch)), blocks).to(torch.int16)
        pairs = rows.view(-1, OUT, kh * stretches * even // 2, 2)
        # [blocks of channels, pairs, OUT, 2]; depthwise: a weight and a zero
        self.weight = pairs.transpose(1, 2).contiguous()
        self.bias = pad_outputs(bias.int(), blocks)
        self.constants = None
        if requantization is not None:
            self.constants = pack_constants(requantization, outputs, blocks)
        self.shape = Shape(
            outputs=outputs, groups=groups, kernel_h=kh, kernel_w=kw, zero_point=zero_point,
            depthwise=depthwise, stride_h=stride[0], stride_w=stride[1], dilation_h=dilation[0],
            dilation_w=dilation[1], left=padding[0], top=padding[2], stretches=stretches,
            stretch=even)

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
        row = 2 * channels * ((s.columns - 1) * s.stride_w + reach_w + 1)  # bytes
        lines = (BAND // row - reach_h - 1) // s.stride_h + 1  # output rows
        part = s.rows if images >= threads else -(-s.rows // threads)
        s.band_rows = max(1, min(s.rows, lines, part))
        s.band_images = max(1, min(lines // s.rows, -(-images // threads)))
        tasks = -(-images // s.band_images) * -(-s.rows // s.band_rows)
        return s, (images, s.rows, s.columns, s.outputs), tasks

    def __call__(self, x):
        """int8 codes [B, Ho, Wo, O], or int32 logits."""
        key = x.shape, torch.get_num_threads()
        if key not in self.sizes:
            self.sizes[key] = self.sized(*x.shape, key[1])
        s, size, tasks = self.sizes[key]
        logits = self.constants is None
        y = torch.empty(size, dtype=torch.int32 if logits else torch.int8)
        results = (None, y) if logits else (y, None)
        arguments = (ctypes.byref(s), x.contiguous(), self.weight, self.bias, self.constants)
        call("conv", arguments + results, tasks, y.numel() * self.work, THREADED)
        return y


# ---- Calls ---------------------------------------------------------------------------------------


def call(name, arguments, n, work, enough):
    """The kernel `name` for parts of range(n), in threads where there is `enough` work.

    arguments: contiguous tensors, None, integers.
    """
    function = getattr(library(), name)
    passed = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments]
    threads = min(torch.get_num_threads(), n) if work >= enough else 1
    if threads <= 1:
        failed = n and function(*passed, 0, n)
    else:
        ends = [n * i // threads for i in range(threads + 1)]
        pool = _threads(os.getpid())
        others = [pool.submit(function, *passed, *part) for part in zip(ends[1:], ends[2:])]
        failed = any([function(*passed, *ends[:2]), *(other.result() for other in others)])
    if failed:
        raise MemoryError(f"no memory for the kernel {name}")


@functools.cache
def _threads(process):
    """Threads of this process: those of another do not survive a fork."""
    return concurrent.futures.ThreadPoolExecutor(os.cpu_count())


def requantize(x, zero_point, constants):
    """clamp(zero_point_out + round((x - zero_point) M)): int8 codes to int8 codes of any shape;
    constants: of `pack_constants`.
    """
    x = x.contiguous()
    y = torch.empty_like(x)
    call("requantize", (x, zero_point, constants, y), x.numel(), x.numel(), ELEMENTS)
    return y


def add(a, b, zero_points, operand, constants):
    """int8 codes + int8 codes -> int8 codes of equal shapes, the scale of a the larger; operand,
    constants: `pack_constants` of b and of the sum.
    """
    a, b = a.contiguous(), b.contiguous()
    y = torch.empty_like(a)
    call("add", (a, b, *zero_points, operand, constants, y), a.numel(), a.numel(), ELEMENTS)
    return y


def affine(x, zero_point, weight, bias, constants):
    """int8 [..., C] times int32 [C] plus int32 [C] -> int8 codes; weight, bias and constants padded
    by `pad_outputs`.
    """
    x = x.contiguous()
    y, channels = torch.empty_like(x), x.shape[-1]
    arguments = (x, channels, zero_point, weight, bias, constants, y)
    call("affine", arguments, x.numel() // channels, x.numel(), ELEMENTS)
    return y
