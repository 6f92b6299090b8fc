"""Folders of the workbook, files written whole or not at all, and the commit they come from."""

import contextlib
import functools
import hashlib
import io
import os
import pathlib
import platform
import re
import subprocess
import tempfile

from quantlab.system.errors import UserError

CONFLICT = re.compile(r"^(<<<<<<<|>>>>>>>)( |$)", re.MULTILINE)
PACKAGE = pathlib.Path(__file__).resolve().parent.parent


def root():
    """The workbook's folder: $QUANTLAB_ROOT, else the checkout around this package, else the
    working directory."""
    if "QUANTLAB_ROOT" in os.environ:
        return pathlib.Path(os.environ["QUANTLAB_ROOT"]).resolve()
    return PACKAGE.parent if (PACKAGE.parent / "notebooks").is_dir() else pathlib.Path.cwd()


def data_folder():
    """Where downloads and caches go: $QUANTLAB_DATA if a folder, else data/ of the workbook."""
    named = os.environ.get("QUANTLAB_DATA")
    return pathlib.Path(named) if named and pathlib.Path(named).is_dir() else root() / "data"


@contextlib.contextmanager
def atomic_path(path):
    """Yield a temporary path beside `path`, moved there when the block succeeds, else deleted.

    Raises UserError where it cannot be written.
    """
    path = pathlib.Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        prefix = f".{path.stem[:40]}-{platform.node()}-{os.getpid()}-"  # whose it is
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=prefix, suffix=path.suffix)
        os.close(handle)
        temporary = pathlib.Path(name)
        yield temporary
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp's files are for their owner only
        os.replace(temporary, path)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"cannot write {path}: {reason}; free space there or name another folder"
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@functools.cache
def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def read_text(path):
    """A UTF-8 text file; UserError where it is none or where git left conflict markers in it."""
    path = pathlib.Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text ({error}); save it as such") from None
    if CONFLICT.search(text):
        raise UserError(f"{path} holds git's conflict markers; resolve them first")
    return text


def read_csv(path, **options):
    """A table of comma-separated values as a frame (pandas.read_csv); UserError where it is none.
    """
    import pandas

    text = read_text(path)
    try:
        return pandas.read_csv(io.StringIO(text), **options)
    except ValueError as error:  # ragged, empty
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} is no table of comma-separated values ({reason}); restore it or "
                        "move it away") from None


def write_text(path, text):
    """Write a text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save_tensors(path, tensors, metadata):
    """Write tensors (name -> tensor, any device) and text metadata as one safetensors file."""
    import safetensors.torch

    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    with atomic_path(path) as temporary:
        try:
            safetensors.torch.save_file(tensors, temporary, metadata)
        except safetensors.SafetensorError as error:  # a full disk, told in the library's own class
            raise OSError(str(error)) from None


def check_regular(path):
    """UserError for a folder, a FIFO or a device: reading one fails, or waits forever."""
    path = pathlib.Path(path)
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is a folder or a device, not a file; name a file")


def sha256(path):
    """Hex digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def commit():
    """Short hash of the checked-out commit, with '+' where tracked files differ; '' outside git."""
    git = functools.partial(subprocess.run, cwd=root(), capture_output=True, text=True)
    ours = ["--untracked-files=no", "--", "quantlab", "notebooks"]
    try:
        head = git(["git", "rev-parse", "--short=10", "HEAD"])
        changed = git(["git", "status", "--porcelain", *ours]).stdout.strip()
    except FileNotFoundError:
        return ""
    if head.returncode != 0:
        return ""
    return head.stdout.strip() + ("+" if changed else "")
