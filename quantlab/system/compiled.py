"""C sources, compiled by the system's C compiler at first use, kept in the user's cache.

    library = load(SOURCE)  # called by ctypes, which lets go of the interpreter: in_threads
"""

import concurrent.futures
import contextlib
import ctypes
import functools
import hashlib
import os
import pathlib
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile

from quantlab.system.errors import UserError
from quantlab.system.files import atomic_path, sha256, write_text

ARM = platform.machine().lower() in ("arm64", "aarch64")
FLAGS = ("-O3", "-mcpu=native" if ARM else "-march=native", "-fwrapv", "-shared", "-fPIC")


def load(source):
    """The ctypes library of a C file, which may include what lies beside it; OSError that says why
    where there is no compiler or it fails.
    """
    compiler = ["$CC"]
    try:
        compiler = _compiler()
        if not compiler:
            raise OSError("no C compiler (cc, gcc, clang or $CC) was found")
        return _load_anywhere(compiler, source)
    except ValueError as error:  # of a $CC with an open quote
        raise OSError(str(error)) from None
    except subprocess.CalledProcessError as error:
        why = (error.stderr.strip().splitlines() or [error])[0]
        raise OSError(f"{shlex.join(compiler)} fails: {why}") from None


def _compiler():
    """The C compiler as the words of a command; [] where there is none."""
    found = (name for name in ("cc", "gcc", "clang") if shutil.which(name))
    return shlex.split(os.environ.get("CC", "")) or [*found][:1]


def _load_anywhere(compiler, source):
    """The library from the cache, or from a temporary folder where the cache cannot be written or
    allows no libraries; once loaded, the folder may go.
    """
    with tempfile.TemporaryDirectory(prefix="quantlab-", ignore_cleanup_errors=True) as temporary:
        try:
            return _load(cache_folder(), compiler, source)
        except (UserError, OSError):
            return _load(pathlib.Path(temporary), compiler, source)


def cache_folder():
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return pathlib.Path(caches) / "quantlab"


def _load(folder, compiler, source):
    """The library in `folder`, compiled if it is not there or not what was written.

    Its name is a hash of all that decides it. Code is loaded from nowhere that another user could
    have written: OSError for a folder of someone else's.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    private = _is_private(folder.stat())
    if not private:
        folder.chmod(0o700)  # OSError unless it is ours; what lies there is compiled anew
        if not _is_private(folder.stat()):
            raise OSError(f"{folder} belongs to another user")
    version = _output([*compiler, "--version"])
    sources = [path.read_text(encoding="utf-8") for path in sorted(source.parent.glob("*.[ch]"))]
    key = "\0".join([*sources, *compiler, version, *FLAGS, _processor()])
    path = folder / f"{source.stem}-{hashlib.sha256(key.encode()).hexdigest()[:32]}.so"
    digest = path.with_suffix(".sha256")
    found = [os.path.lexists(file) and _is_private(file.lstat()) for file in (path, digest)]
    whole = private and all(found) and digest.read_text() == sha256(path)
    if not whole:  # loading a damaged library would end the process
        with atomic_path(path) as temporary:
            _output([*compiler, *FLAGS, str(source), "-o", str(temporary)])
        write_text(digest, sha256(path))
        for file in (path, digest):
            file.chmod(0o600)
    return ctypes.CDLL(str(path))


def _is_private(status):
    """True for a folder or regular file that this user owns and no other can write."""
    if not hasattr(os, "geteuid"):
        return True
    mode = status.st_mode
    return ((stat.S_ISREG(mode) or stat.S_ISDIR(mode)) and status.st_uid == os.geteuid()
            and not mode & (stat.S_IWGRP | stat.S_IWOTH))


def _output(command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _processor():
    """What the compiler looks at for "native"."""
    info = pathlib.Path("/proc/cpuinfo")
    lines = set(info.read_text().splitlines()) if info.exists() else ()
    names = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted(x for x in lines if x.startswith(names))) or platform.processor()


def in_threads(function, calls):
    """[function(*arguments) for arguments in calls]: the first here, the others in threads."""
    others = []
    with contextlib.suppress(RuntimeError):  # the main thread has ended: no more threads
        for arguments in calls[1:]:
            others.append(_threads(os.getpid()).submit(function, *arguments))
    here = [function(*arguments) for arguments in (*calls[:1], *calls[1 + len(others) :])]
    return [*here, *(other.result() for other in others)]


@functools.cache
def _threads(process):
    """Threads of this process: those of another do not survive a fork."""
    return concurrent.futures.ThreadPoolExecutor(os.cpu_count())
