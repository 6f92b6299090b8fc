"""Where we run: the torchvision repair, the device, seeds, folders, atomic files and the one kind of error a user can mend."""

import contextlib
import functools
import hashlib
import importlib.util
import os
import pathlib
import platform
import random
import subprocess
import tempfile
import tomllib

import numpy as np
import safetensors.torch
import torch


class UserError(Exception):
    """Something the user can mend, in one line: what was wrong, what is allowed, what to do. Shown without a traceback."""


# ---- torchvision beside another build of torch ------------------------------------------------------------------------------

# torchvision registers shape functions for these operators while it is imported and stops when its compiled extension, which
# defines them, was built for another torch (a CUDA wheel of torchvision beside a CPU wheel of torch, for instance).
TORCHVISION_OPERATORS = ("nms", "qnms")
_declared = []  # a torch.library.Library forgets its operators when it is collected


def make_torchvision_importable():
    """Declare torchvision's non-maximum-suppression operators where its own extension does not load; return True if it was needed.

    Only declared, never implemented: nothing here detects boxes. Call before the first `import torchvision`.
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


# ---- Folders and files ------------------------------------------------------------------------------------------------------

PACKAGE = pathlib.Path(__file__).resolve().parent


def root():
    """Folder of the workbook: $QUANTLAB_ROOT, else the checkout around this package, else the working directory."""
    if "QUANTLAB_ROOT" in os.environ:
        return pathlib.Path(os.environ["QUANTLAB_ROOT"]).resolve()
    return PACKAGE.parent if (PACKAGE.parent / "notebooks").is_dir() else pathlib.Path.cwd()


def data_folder():
    """Where downloads and caches go: data/ of the workbook, or $QUANTLAB_DATA where that is a folder."""
    named = os.environ.get("QUANTLAB_DATA")
    return pathlib.Path(named) if named and pathlib.Path(named).is_dir() else root() / "data"


def repository_url():
    """Address for clone commands and badges, kept in pyproject.toml and nowhere else."""
    with open(root() / "pyproject.toml", "rb") as file:
        return tomllib.load(file)["project"]["urls"]["Repository"]


@contextlib.contextmanager
def atomic_path(path):
    """Yield a temporary path beside `path`; move it there when the block succeeds, delete it when not. No half-written files."""
    path = pathlib.Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem[:40]}-", suffix=path.suffix)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; free space there or name another folder") from None
    os.close(handle)
    temporary = pathlib.Path(name)
    try:
        yield temporary
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; free space there or name another folder") from error
    finally:
        temporary.unlink(missing_ok=True)


@functools.cache
def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path, text):
    """Write a text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save_tensors(path, tensors, metadata):
    """Write tensors (name -> tensor, any device) and text metadata as one safetensors file, atomically."""
    with atomic_path(path) as temporary:
        try:
            safetensors.torch.save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary, metadata)
        except safetensors.SafetensorError as error:  # a full disk, told in the library's own class
            raise OSError(str(error)) from None


def sha256(path):
    """Hex digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- The machine ------------------------------------------------------------------------------------------------------------


def device():
    """The accelerator where there is one, else the CPU; $QUANTLAB_DEVICE overrides."""
    return torch.device(os.environ.get("QUANTLAB_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu"))


@contextlib.contextmanager
def exact_float():
    """float32 convolutions without TF32, which would round their inputs where no integer machine does."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def device_name(where=None):
    """The processor a number was measured on, in words, with its thread count where that matters."""
    if (where or device()).type == "cuda":
        return torch.cuda.get_device_name(where)
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return f"{model}, {torch.get_num_threads()} threads"


def has_bf16():
    """True where bfloat16 arithmetic is native, so that training in it is faster and not merely possible."""
    if device().type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # new in torch 2.12
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "arm_bf16", "bf16"))


def seed_everything(seed):
    """Seed Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def commit():
    """Short hash of the checked-out commit, '+' appended where tracked files differ from it; '' outside a repository."""
    git = functools.partial(subprocess.run, cwd=root(), capture_output=True, text=True)
    try:
        head = git(["git", "rev-parse", "--short=10", "HEAD"])
        dirty = git(["git", "status", "--porcelain", "--untracked-files=no", "--", "quantlab", "notebooks"])
    except FileNotFoundError:
        return ""
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "") if head.returncode == 0 else ""
