"""What is missing is installed, and nothing that is there is replaced."""

import subprocess
import sys

import pytest
from conftest import CHECKOUT

from quantlab.system import missing
from quantlab.workbook import address

COLAB = """
import sys, types
sys.modules["google.colab"] = types.ModuleType("colab")
exec(sys.argv[1])
import quantlab as ql
print(ql.load_data("digits", verbose=False).name, ql.__file__)
"""


@pytest.fixture
def pip(monkeypatch):
    """(arguments, constraints) of every call."""
    calls = []

    def call(command):
        file = command[command.index("--constraint") + 1]
        with open(file, encoding="utf-8") as lines:
            calls.append((command[1:4] + command[7:], lines.read().splitlines()))
        return "impossible" in command

    monkeypatch.setattr(missing.subprocess, "call", call)
    return calls


def test_where_all_is_there_nothing_is_installed(pip, capsys):
    missing.install_missing()
    assert pip == [] and "nothing was installed" in capsys.readouterr().out
    assert {"torch", "papermill", "scikit-learn"} <= set(missing.needed())


def test_what_is_missing_is_installed_and_what_is_there_is_held(pip, capsys, monkeypatch):
    there = {"Torch": "2.9.0+cu126", "ipykernel": "6.17.1", "scikit_learn": "1.6"}
    monkeypatch.setattr(missing, "installed", lambda: there)
    monkeypatch.setattr(missing, "needed", lambda: ["torch", "ipykernel", "papermill",
                                                    "scikit-learn", "jupytext"])
    missing.install_missing()
    (command, held), = pip
    assert command == ["-m", "pip", "install", "papermill", "jupytext"]
    assert held == ["Torch==2.9.0+cu126", "ipykernel==6.17.1", "scikit_learn==1.6"]
    assert capsys.readouterr().out == "installs papermill, jupytext; what is there stays\n"


def test_what_pip_cannot_install_is_said_in_a_line(pip, monkeypatch):
    monkeypatch.setattr(missing, "needed", lambda: ["torch", "impossible"])
    with pytest.raises(SystemExit, match="pip could not install impossible beside what is there"):
        missing.install_missing()


@pytest.mark.skipif(not (CHECKOUT / ".git").exists(), reason="this is no clone")
def test_the_first_cell_in_an_empty_folder_gives_the_whole_workbook(tmp_path):
    """As in Colab, from a clone of what is committed; the packages are this environment's."""
    cell = address.SETUP.format(address=f"file://{CHECKOUT}", branch="HEAD").replace(
        '"-b", branch, ', "")
    done = subprocess.run([sys.executable, "-P", "-c", COLAB, cell], cwd=tmp_path, text=True,
                          capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert said[0].startswith("everything that the workbook needs is there")
    assert said[-1] == f"digits {tmp_path}/workbook/quantlab/__init__.py"
