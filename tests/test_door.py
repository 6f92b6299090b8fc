"""The public door: names, rooms, torchvision, and a command line that is quick to refuse."""

import pickle
import re
import subprocess
import sys

import pytest
import torch
from conftest import CHECKOUT, read_text

import quantlab as ql
from quantlab.__main__ import BENCH_SECTIONS, SEARCH_COSTS, main
from quantlab.analysis import search
from quantlab.networks.architectures import ARCHITECTURES
from quantlab.networks.recipe import NETWORKS
from quantlab.system.errors import check_name
from quantlab.workbook import bench

COMMAND = """
import sys
from quantlab.__main__ import main
try:
    status = main(sys.argv[1:])
except SystemExit as stop:
    status = stop.code
print(status, *{"torch", "pandas", "matplotlib", "numpy", "jupytext"} & set(sys.modules))
"""


def python(code, *arguments, cwd=CHECKOUT):
    """(output, errors) of a new interpreter."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=cwd, capture_output=True,
                          text=True)
    return done.stdout, done.stderr


# ---- Names ---------------------------------------------------------------------------------------


def test_every_public_name_and_every_room_is_there():
    for name in [*ql.__all__, "analysis", "export", "images", "improving", "integer", "networks",
                 "plots", "rivals"]:
        assert getattr(ql, name) is not None and name in dir(ql), name
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        ql.quantise  # noqa: B018


def test_every_name_that_the_readme_uses_is_there():
    used = re.findall(r"\bql((?:\.\w+)+)", read_text(CHECKOUT / "README.md"))
    assert used
    for path in used:
        value = ql
        for name in path.split(".")[1:]:
            value = getattr(value, name)
        assert value is not None, path


def test_names_are_the_functions_also_where_a_module_has_the_same_name():
    from quantlab.evaluate import evaluate

    assert ql.evaluate is evaluate and ql.quantize.__module__ == "quantlab.ptq"
    assert ql.improving.reconstruct is ql.reconstruct and callable(ql.reconstruct)
    assert ql.integer.to_integer is ql.to_integer and ql.export.export_onnx is ql.export_onnx


def test_the_import_loads_no_torch_and_torchvision_is_repaired_when_it_is_imported():
    code = "import sys, quantlab; print('torch' in sys.modules, 'torchvision' in sys.modules)"
    assert python(code) == ("False False\n", "")
    output, errors = python("import quantlab, torchvision; print(torchvision.models.resnet50)")
    assert "resnet50" in output, errors


# ---- The command line ----------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [
    ["--help"], ["run", "--help"], ["sweep", "--help"], ["figures", "--help"], ["train", "--help"],
    ["list"],
], ids=" ".join)
def test_help_and_list_load_nothing_heavy(arguments):
    output, errors = python(COMMAND, *arguments)
    assert output.splitlines()[-1] == "0" and not errors


def test_list_shows_every_parameter(workbook, capsys):
    assert main(["list"]) == 0
    said = capsys.readouterr().out
    assert "-p weight_bits 4  (int)" in said and "_report" in said


@pytest.mark.parametrize("arguments, message", [
    (["runn"], "invalid choice: 'runn'"),
    (["run", "--forced"], "unrecognized arguments: --forced"),
    (["train", "--epochs", "many"], "invalid int value: 'many'"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_an_unknown_command_option_or_number_loads_nothing_heavy(arguments, message):
    output, errors = python(COMMAND, *arguments)
    assert output == "2\n" and message in errors


@pytest.mark.parametrize("arguments, message", [
    (["run", "03", "-p", "weight_bit", "4"], "'weight_bit'; did you mean weight_bits?"),
    (["run", "03", "-p", "weight_bits", "four"], "weight_bits='four' of 03_quantize_by_hand is not"
                                                 " int; its default is 4"),
    (["run", "01", "-p", "retrain", "maybe"], "is not bool"),
    (["run", "04_observes"], "notebook '04_observes' is unknown"),
    (["run", "03_quantise_by_hand"], "did you mean 03_quantize_by_hand?"),
    (["run", "-p", "nonsense", "1"], "has no parameter 'nonsense'"),
    (["run", "03", "--data", "no/such"], "data 'no/such' not found: use auto, cifar10, digits"),
    (["run", "03", "--data", "notebooks"], "notebooks is no image set: name a folder or archive"),
    (["run", "03", "-p", "weight_bits", "9"], "weight_bits=9: a width is an integer from 2 to 8"),
    (["run", "-p", "observer", "hist"], "observer 'hist' is unknown; did you mean histogram?"),
    (["run", "07", "-p", "widths", "4/4,2"], "width '2': give the bits, 2 to 8"),
    (["run", "07", "-p", "methods", "QDrop,best"], "method 'best': 'best' is unknown"),
    (["run", "13", "-p", "source", "locl"], "source 'locl' is unknown; did you mean local?"),
    (["run", "03", "-p", "model", "vgg"], "model 'vgg' is unknown; use one of: resnet20, resnet50"),
    (["run", "03", "-p", "model", "resnet50"], "no checkpoint of resnet50 for auto: train one"),
    (["run", "03", "-p", "checkpoint", "no.safetensors"], "checkpoint no.safetensors not found"),
    (["run", "03", "-p", "checkpoint", "pyproject.toml"], "is not a .safetensors file"),
    (["run", "03", "-p", "model", "resnet50", "-p", "checkpoint",
      "checkpoint/resnet20-digits.safetensors"], "is a resnet20, not a resnet50"),
    (["run", "03", "--data", "digits", "-p", "n_calibration", "5000"], "digits has 1,294 training"),
    (["run", "03", "--time-limit", "0"], "--time-limit 0: name at least 1"),
    (["figures", "--widths", "3"], "width '3' is none of a figure; give 40 to 600 (in mm), as 89"),
    (["figures", "99", "--formats", "tif"], "format 'tif' is unknown; use one of: pdf, svg, png"),
    (["figures", "99"], "notebook '99' is unknown"),
    (["tables", "headlin"], "table 'headlin' is unknown; did you mean headline?"),
    (["tables", "--formats", "doc"], "format 'doc' is unknown; use one of: tex, csv"),
    (["train", "--data", "notebooks"], "notebooks is no image set"),
    (["data", "notebooks"], "notebooks is no image set"),
    (["bench", "collect", "--batch", "0"], "--batch 0: name at least 1"),
    (["train", "--data", "no/such/folder"], "data 'no/such/folder' not found"),
    (["train", "--data", "digits", "--model", "resnet2O"], "did you mean resnet20?"),
    (["train", "--recipe", "two-core"], "did you mean two-cores?"),
    (["train", "--epochs", "0"], "epochs=0: allowed are values from 1"),
    (["train", "--phases", "3x16"], "write EPOCHS@SIZE"),
    (["train", "--threads", "0"], "--threads 0: name at least 1"),
    (["train", "--start-from", "missing.safetensors"], "missing.safetensors not found"),
    (["import-checkpoint", "missing.pt"], "missing.pt not found"),
    (["import-checkpoint", "missing.pt", "--model", "vgg"], "model 'vgg' is unknown"),
    (["sweep", "03", "-p", "weight_bits", "4,9"], "weight_bits=9: a width is an integer"),
    (["data", "images"], "no image set in"),
    (["data", "nowhere"], "data 'nowhere' not found"),
    (["bench", "integers"], "did you mean integer?"),
    (["inspect", "json", "--data", "digits"], "write module:function"),
    (["inspect", "no_such.module:f", "--data", "digits"], "module 'no_such.module' was not found"),
    (["inspect", "json:loads", "--data", "nowhere"], "'nowhere' not found: name a folder"),
    (["inspect", "json:loads", "--data", "digits", "--bits", "9"], "bits=9: a width is an integer"),
    (["inspect", "json:loads", "--data", "digits", "--std", "0", "1", "1"], "are above 0"),
    (["inspect", "json:loads", "--data", "digits", "-n", "0"], "n=0: allowed are values from 1"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_a_mistake_gets_one_line_and_status_1_before_anything_heavy_is_loaded(
    workbook, arguments, message
):
    output, errors = python(COMMAND, *arguments, cwd=workbook)
    assert output == "1\n", "status 1, and nothing heavy was loaded"
    assert errors.startswith("error: ") and errors.count("\n") == 1 and message in errors
    assert sorted(p.name for p in workbook.iterdir()) == [
        "checkpoint", "notebooks", "pyproject.toml"], "nothing was written"


def test_names_that_the_command_line_offers_are_those_that_there_are():
    assert tuple(ARCHITECTURES) == NETWORKS and tuple(bench.SECTIONS) == BENCH_SECTIONS
    assert tuple(search.COSTS) == SEARCH_COSTS


def test_a_user_error_is_one_line_also_when_torch_fx_adds_its_own(resnet20):
    bad = torch.zeros(2, 3, 32, 32)
    bad[0, 0, 0, 0] = float("nan")
    with pytest.raises(ql.UserError) as caught:
        ql.collect(resnet20, [bad])
    said = str(caught.value)
    assert said.splitlines() == [said] and "NaN or infinite" in said
    caught.value.args = ("While executing\n\n%input",)
    assert str(caught.value) == said
    assert str(ql.UserError("one\n  two\n")) == "one two"
    assert str(pickle.loads(pickle.dumps(ql.UserError("one\ntwo")))) == "one two"


def test_an_unknown_name_is_answered_with_the_nearest_and_all_known():
    check_name("fruit", "plum", ["plum", "pear"])
    with pytest.raises(ql.UserError) as caught:
        check_name("fruit", "plumb", ["plum", "pear"])
    assert str(caught.value) == (
        "fruit 'plumb' is unknown; did you mean plum?; use one of: plum, pear")


def test_a_reader_that_ends_early_gets_no_traceback():
    command = f"{sys.executable} -m quantlab list | head -n 1; echo ${{PIPESTATUS[0]}}"
    for _ in range(3):
        done = subprocess.run(["bash", "-c", command], cwd=CHECKOUT, capture_output=True, text=True)
        assert done.stderr == "" and done.stdout.splitlines()[-1] in ("0", "141"), done


# ---- Where the README leads ---------------------------------------------------------------------


def anchors_of(path):
    """Of a notebook's headings, as JupyterLab names them: blanks become hyphens, marks go."""
    source = read_text(path.with_suffix(".py"))
    headings = re.findall(r"^# #+ (.*)$", source, re.MULTILINE)
    return {re.sub(r"[*`]", "", heading).replace(" ", "-") for heading in headings}


def test_every_link_of_the_readme_leads_somewhere():
    readme = read_text(CHECKOUT / "README.md")
    links = re.findall(r"\]\(((?:[^()\s]|\([^)\s]*\))+)\)", readme)
    assert len([link for link in links if link.startswith("notebooks/")]) > 40
    own = {re.sub(r"[^\w\- ]", "", h).lower().replace(" ", "-")
           for h in re.findall(r"^#+ (.*)$", readme, re.MULTILINE)}
    for link in links:
        place, _, anchor = link.partition("#")
        if "://" in place:
            continue
        assert not place or (CHECKOUT / place).exists(), link
        if anchor:
            known = anchors_of(CHECKOUT / place) if place else own
            assert anchor in known, f"{link}: {sorted(known)}"
