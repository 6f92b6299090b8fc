"""The torchvision repair, atomic files, and the command line's one-line errors."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import CHECKOUT

import quantlab as ql
from quantlab.system import files, machine


def python(code, **environment):
    return subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, env={**os.environ, **environment})


def quantlab(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "quantlab", *arguments], cwd=CHECKOUT, capture_output=True, text=True, env={**os.environ, **environment}
    )


def test_torchvision_imports_after_quantlab():
    done = python("import quantlab, torchvision; print(torchvision.models.resnet50.__name__)")
    assert done.stdout.strip() == "resnet50", done.stderr


def test_operators_are_declared_only_where_the_extension_does_not_load():
    alone = python("import torchvision")
    declared = machine.make_torchvision_importable()
    assert declared == (alone.returncode != 0), "declared exactly where torchvision fails to import by itself"
    if declared:
        with pytest.raises((RuntimeError, NotImplementedError)):
            torch.ops.torchvision.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)


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
    code = f"""
import resource, signal, sys
import quantlab as ql
from quantlab.networks.checkpoints import import_checkpoint, save_checkpoint
data = ql.load_data("digits", verbose=False)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
try:
    save_checkpoint(ql.load_model("resnet20"), r"{tmp_path}/net.safetensors", data, architecture="resnet20", result=None)
except ql.UserError as error:
    print(error)
"""
    done = python(code)
    assert "cannot write" in done.stdout and "net.safetensors" in done.stdout and "free space" in done.stdout, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ql.UserError, match="cannot write .*; free space there or name another folder"):
        files.write_text(tmp_path / "file" / "below.txt", "x")


@pytest.mark.parametrize("arguments, message", [
    (["run", "03", "-p", "weight_bit", "4"], "has no parameter 'weight_bit'; did you mean weight_bits?"),
    (["run", "03", "-p", "weight_bits", "four"], "parameter weight_bits='four' of 03_quantize_by_hand is not int; its default is 4"),
    (["run", "01", "-p", "retrain", "maybe"], "is not bool"),
    (["run", "04_observes"], "notebook '04_observes' is unknown"),
    (["run", "03_quantise_by_hand"], "did you mean 03_quantize_by_hand?"),
    (["run", "-p", "nonsense", "1"], "has no parameter 'nonsense'"),
    (["train", "--data", "no/such/folder"], "data 'no/such/folder' not found"),
    (["train", "--data", "digits", "--model", "resnet2O", "--out", "x.safetensors"], "did you mean resnet20?"),
    (["import-checkpoint", "missing.pt", "--data", "digits"], "missing.pt not found"),
    (["data", "images"], "no image set in"),
])
def test_mistakes_get_one_line_and_status_1(workbook, arguments, message):
    done = quantlab(*arguments, QUANTLAB_ROOT=str(workbook))
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: ") and message in done.stderr
    assert not (workbook / "results").exists() and not (CHECKOUT / "x.safetensors").exists()


def test_list_shows_every_parameter(workbook):
    done = quantlab("list", QUANTLAB_ROOT=str(workbook))
    assert done.returncode == 0 and "-p weight_bits 4  (int)" in done.stdout and "11_report" in done.stdout


def test_import_is_quick_and_quiet():
    done = python("import quantlab, sys; print('matplotlib' in sys.modules, 'papermill' in sys.modules)")
    assert done.stdout.split() == ["False"] * 2 and not done.stderr
