"""Files are written whole or not at all; what handles files and errors needs no torch."""

import subprocess
import sys

import pytest
from conftest import CHECKOUT

import quantlab as ql
from quantlab.system import files


def python(code):
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True)


def test_atomic_files(tmp_path):
    target = tmp_path / "deep" / "file.txt"
    with pytest.raises(ZeroDivisionError), files.atomic_path(target) as temporary:
        temporary.write_text("half")
        1 / 0
    assert list(target.parent.iterdir()) == []
    files.write_text(target, "whole")
    with pytest.raises(ql.UserError, match="cannot write"), files.atomic_path(target):
        raise OSError(28, "No space left on device")
    assert target.read_text() == "whole" and len(list(target.parent.iterdir())) == 1


def test_a_full_disk_leaves_nothing_half_written(tmp_path):
    """The kernel refuses to let files grow beyond 64 kB, as a full disk would."""
    done = python(f"""
import resource, signal
import torch
from quantlab.system.errors import UserError
from quantlab.system.files import save_tensors
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
try:
    save_tensors(r"{tmp_path}/net.safetensors", {{"weight": torch.zeros(100_000)}}, {{}})
except UserError as error:
    print(error)
""")
    assert "cannot write" in done.stdout and "net.safetensors" in done.stdout, done.stderr
    assert "free space" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    message = "cannot write .*; free space there or name another folder"
    with pytest.raises(ql.UserError, match=message):
        files.write_text(tmp_path / "file" / "below.txt", "x")


def test_errors_and_files_load_no_torch():
    done = python("""
import sys
import quantlab.system.errors, quantlab.system.files
print([name for name in ("torch", "numpy", "safetensors", "tqdm") if name in sys.modules])
""")
    assert done.stdout == "[]\n", done.stderr
