"""Colab, played: a notebook alone in an empty folder, beside Colab's own module and packages,
fetches the workbook from its address, runs to its end, and what it made is zipped.
"""

import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
import zipfile

import nbformat
import pytest
from conftest import CHECKOUT, read_text

from quantlab.__main__ import main

ADDRESS = "https://github.com/somebody/workbook"
NOTEBOOK = "03_quantize_by_hand.ipynb"
METADATA = "Metadata-Version: 2.1\nName: only-missing\nVersion: 1.0\n"
WHEEL = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
LAST_CELLS = (
    "import importlib.metadata, json\n"
    "found = {d.metadata['Name']: d.version for d in importlib.metadata.distributions()}\n"
    "print(json.dumps([ql.__file__, found]))",
    "!python -m quantlab zip",
)

pytestmark = [
    pytest.mark.long, pytest.mark.skipif(not (CHECKOUT / ".git").exists(), reason="no clone")]


def git(*command, cwd):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run(["git", *identity, *command], cwd=cwd, check=True, capture_output=True)


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A repository of the workbook with its address set, which asks for one package more."""
    place = tmp_path / "published"
    git("clone", "-q", str(CHECKOUT), str(place), cwd=tmp_path)
    git("checkout", "-q", "-B", "main", cwd=place)
    project = read_text(place / "pyproject.toml")
    assert '"torch>=' in project
    (place / "pyproject.toml").write_text(
        project.replace('    "torch>=', '    "only-missing",\n    "torch>=', 1))
    monkeypatch.setenv("QUANTLAB_ROOT", str(place))
    assert main(["address", ADDRESS]) == 0
    monkeypatch.delenv("QUANTLAB_ROOT")
    git("commit", "-q", "-a", "-m", "address", cwd=place)
    return place


@pytest.fixture
def colab(tmp_path, published):
    """Environment of a kernel as in Colab: its module is loaded, `git` reaches the address, pip
    reaches one package, and installs where the kernel finds it.
    """
    packages, wheels = tmp_path / "packages", tmp_path / "wheels"
    (packages / "google" / "colab").mkdir(parents=True)
    (packages / "google" / "colab" / "__init__.py").write_text("")
    startup = tmp_path / "ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "colab.py").write_text("import google.colab")
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "only_missing-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("only_missing-1.0.dist-info/METADATA", METADATA)
        wheel.writestr("only_missing-1.0.dist-info/WHEEL", WHEEL)
        wheel.writestr("only_missing-1.0.dist-info/RECORD", "")
    outside = {name: value for name, value in os.environ.items()
               if not name.startswith(("QUANTLAB", "PYTEST"))}  # in pytest, kernels print less
    return outside | {
        "PATH": f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(packages), "IPYTHONDIR": str(tmp_path / "ipython"),
        "PIP_TARGET": str(packages), "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels),
        "GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": f"url.file://{published}.insteadOf",
        "GIT_CONFIG_VALUE_0": ADDRESS,
    }


def test_a_notebook_alone_runs_to_its_end_and_its_results_are_zipped(tmp_path, published, colab):
    notebook = nbformat.read(published / "notebooks" / NOTEBOOK, as_version=4)
    notebook.cells += [nbformat.v4.new_code_cell(source) for source in LAST_CELLS]
    content = tmp_path / "content"
    content.mkdir()
    nbformat.write(notebook, content / NOTEBOOK)
    out = tmp_path / "out.ipynb"
    command = [sys.executable, "-m", "papermill", NOTEBOOK, str(out), "-p", "n_calibration", "32"]
    done = subprocess.run(command, cwd=content, env=colab, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    cells = [cell for cell in nbformat.read(out, as_version=4).cells if cell.cell_type == "code"]
    said = ["".join(o.get("text", "") for o in cell.outputs) for cell in cells]
    assert "installs only-missing; what is there stays" in said[0]
    where, found = json.loads(said[-2])
    assert where == f"{content}/workbook/quantlab/__init__.py"
    before = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    assert {**found, "only-missing": "1.0"} == {**before, "only-missing": "1.0"}
    assert "only-missing" in found and "workbook.zip" in said[-1]
    with zipfile.ZipFile(content / "workbook" / "workbook.zip") as file:
        names = set(file.namelist())
    assert {"results/results.csv", "pic/03_tradeoff_resnet20_digits.png"} <= names
