"""The repository's address stands in one place, and everything that names it is written from it."""

import subprocess
import sys

import jupytext
import pytest
from conftest import CHECKOUT, read_text

from quantlab.__main__ import main
from quantlab.workbook import address
from quantlab.workbook import notebooks as files

SCRIPTS = sorted((CHECKOUT / "notebooks").glob("*.py"))
FORK = "https://github.com/somebody/fork"


def cells_of(script):
    return [cell.source for cell in jupytext.read(script).cells]


# ---- As committed --------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_badge_and_fetching_cell_are_what_sync_would_write(script):
    cells = cells_of(script)
    assert [address.in_notebook(cell, script.stem) for cell in cells] == cells, "run: make sync"
    assert sum(cell.startswith("import os\nimport subprocess") for cell in cells) == 1
    assert all(len(line) <= 88 for line in address.SETUP.splitlines())


def test_the_readme_is_what_sync_would_write_and_tells_the_owner_one_command():
    text = read_text(CHECKOUT / "README.md")
    assert address.in_readme(text) == text, "run: make sync"
    assert "python -m quantlab address https://" in text and "git clone" in text
    if not address.read_address()[0]:
        assert "https://github.com" not in text.partition("git clone")[2].partition("workbook")[0]


# ---- Setting it ----------------------------------------------------------------------------------


def everything(place):
    paths = [*place.glob("notebooks/*.py"), *place.glob("notebooks/*.ipynb"), place / "README.md"]
    return {path.name: read_text(path) for path in paths} | {"toml": read_text(
        place / "pyproject.toml")}


def test_one_command_writes_it_everywhere_and_another_takes_it_back(workbook, capsys):
    (workbook / "README.md").write_text(address.in_readme(read_text(CHECKOUT / "README.md")))
    assert main(["address", ""]) == 0
    without = everything(workbook)
    assert main(["address", FORK + ".git/", "--branch", "next"]) == 0
    texts = everything(workbook)
    for script in SCRIPTS:
        badge = f"github/somebody/fork/blob/next/notebooks/{script.stem}.ipynb)"
        assert badge in texts[script.name] and f'"{FORK}", "next"' in texts[script.name]
    assert f"git clone -b next {FORK} workbook" in texts["README.md"]
    assert "somebody/fork/blob/next/notebooks/03_" in texts["README.md"]
    assert files.sync() == [] and f'repository = "{FORK}"' in texts["toml"]
    capsys.readouterr()
    assert main(["address"]) == 0
    assert capsys.readouterr().out == f"{FORK}, branch next\n"
    assert main(["address", ""]) == 0 and everything(workbook) == without
    assert not [name for name, text in without.items() if "colab.research" in text]


def test_an_address_elsewhere_has_no_colab_badge(workbook):
    address.write_address("https://git.example.org/group/workbook", "main")
    assert address.badge("03_quantize_by_hand") == ""
    assert "git clone https://git.example.org/group/workbook workbook" in address.in_readme(
        "git clone <address of this repository> workbook")


@pytest.mark.parametrize("wrong", [
    "foo", "github.com/a/b", "http://github.com/a/b", "https://github.com/a", "https://a/b c/d",
    'https://github.com/a/b"', "https://github.com/a/b; rm"])
def test_what_is_no_address_is_refused_in_one_line(workbook, capsys, wrong):
    before = everything(CHECKOUT)["toml"]
    assert main(["address", wrong]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: address {wrong!r} is none of a repository; give one such as")
    assert said.count("\n") == 1 and read_text(workbook / "pyproject.toml") == before


@pytest.mark.parametrize("wrong", ["", "a b", "-x", 'a"b'])
def test_what_is_no_branch_is_refused(workbook, wrong):
    with pytest.raises(address.UserError, match="is none; give a name such as main"):
        address.write_address(FORK, wrong)


def test_a_file_without_an_address_says_what_to_write(workbook):
    (workbook / "pyproject.toml").write_text("[project]\n")
    with pytest.raises(address.UserError, match=r"give \[tool.quantlab\] the lines repository"):
        files.sync()


# ---- In Colab ------------------------------------------------------------------------------------

COLAB = """
import subprocess, sys, types
sys.modules["google.colab"] = types.ModuleType("colab")
subprocess.check_call = lambda *arguments, **options: print("installed")
exec(sys.argv[1])
print(sys.path[0])
"""


def in_colab(place, repository):
    cell = address.SETUP.format(address=repository, branch="main")
    done = subprocess.run([sys.executable, "-c", COLAB, cell], cwd=place, capture_output=True,
                          text=True)
    return done.returncode, done.stdout.splitlines(), done.stderr.splitlines()


def make_repository(place, *names):
    for name in names:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text("")
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for arguments in (["init", "-q", "-b", "main"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run(["git", *identity, *arguments], cwd=place, check=True)
    return str(place)


def test_the_colab_cell_fetches_the_workbook_or_says_in_one_line_what_it_fetched(tmp_path):
    ours = make_repository(tmp_path / "ours", "quantlab/affine.py")
    theirs = make_repository(tmp_path / "theirs", "main.py")
    for name, repository in (("right", ours), ("wrong", theirs), ("none", "")):
        place = tmp_path / name
        place.mkdir()
        status, out, errors = in_colab(place, repository)
        if name == "right":
            assert (status, out, errors) == (0, ["installed", str(place / "workbook")], [])
        else:
            said = f"{repository!r} is not this workbook; python -m quantlab address URL"
            assert (status, out, errors) == (1, [], [said])
