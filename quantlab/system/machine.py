"""The machine: device and name, seeds, exact float arithmetic, and torchvision beside any torch."""

import contextlib
import ctypes
import functools
import importlib.util
import os
import pathlib
import platform
import random

import numpy as np
import torch

from quantlab.system.errors import UserError


def device():
    """The accelerator where there is one, else the CPU; $QUANTLAB_DEVICE overrides."""
    found = "cuda" if torch.cuda.is_available() else "cpu"
    named = os.environ.get("QUANTLAB_DEVICE") or found
    try:
        torch.empty(0, device=named).cpu()  # where tensors have no values, this fails
        return torch.device(named)
    except (RuntimeError, AssertionError, NotImplementedError, ValueError):
        raise UserError(f"QUANTLAB_DEVICE={named[:40]!r} is no device of this machine; use "
                        f"{' or '.join(dict.fromkeys([found, 'cpu']))}") from None


@functools.cache
def keep_memory():
    """Have the C library reuse freed memory, large blocks too, for the life of this process.

    glibc returns every large block to the system and has the next one mapped anew, page by page,
    which can take longer than writing the tensor. Elsewhere nothing happens.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        set_option = ctypes.CDLL(None).mallopt
        m_mmap_max, m_trim_threshold = -4, -1  # as malloc.h names them
        set_option(m_mmap_max, 0)
        set_option(m_trim_threshold, 2**31 - 1)


@contextlib.contextmanager
def exact_float():
    """float32 convolutions without TF32, which rounds inputs where no integer machine does; memory
    is reused (`keep_memory`).
    """
    keep_memory()
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def device_name(where=None):
    """The processor a number was measured on, in words, with the thread count of a CPU."""
    if (where or device()).type == "cuda":
        return torch.cuda.get_device_name(where)
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        named = next(line for line in lines if line.startswith("model name"))
        model = named.split(":", 1)[1].strip()
    return f"{model}, {torch.get_num_threads()} threads"


def has_bf16():
    """True where bfloat16 is native, so that training in it is faster and not merely possible."""
    if device().type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    there = getattr(torch.cpu, "get_capabilities", dict)()  # new in torch 2.12
    return any(there.get(name) for name in ("avx512_bf16", "amx_bf16", "arm_bf16", "bf16"))


def seed_everything(seed):
    """Seed Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


# ---- torchvision beside another build of torch --------------------------------------------------

# While it is imported, torchvision registers shape functions for these operators; it stops where
# its compiled extension, which defines them, was built for another torch: a CUDA wheel of
# torchvision beside a CPU wheel of torch, for instance.
TORCHVISION_OPERATORS = ("nms", "qnms")
_declared = []  # a torch.library.Library forgets its operators when it is collected


def make_torchvision_importable():
    """Declare torchvision's non-maximum-suppression operators where its extension does not load.

    Returns True if that was needed. They are never implemented: nothing here detects boxes. Call it
    before the first `import torchvision`.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or _declared:
        return bool(_declared)
    folder = pathlib.Path(spec.origin).parent
    for extension in [*folder.glob("_C*.so"), *folder.glob("_C*.pyd")]:
        with contextlib.suppress(OSError):
            torch.ops.load_library(str(extension))
            return False
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in TORCHVISION_OPERATORS:
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.append(library)
    return True
