"""Notebooks as people edit them: the others stay usable, the one at fault gets one line."""

import os

import nbformat
import pytest
from conftest import read_text

from quantlab.__main__ import main
from quantlab.system.errors import UserError
from quantlab.workbook import notebooks
from quantlab.workbook.notebooks import check_parameter, find
from quantlab.workbook.request import requested

BADGE = '<a href="https://example.org/x.ipynb"><img src="https://example.org/badge.svg"/></a>'


def edit(workbook, name, change):
    path = workbook / "notebooks" / f"{name}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    change(notebook)
    nbformat.write(notebook, path)


def write(workbook, name, text):
    (workbook / "notebooks" / f"{name}.ipynb").write_text(text)


def own(*cells):
    return nbformat.writes(nbformat.v4.new_notebook(cells=[*cells]))


def listed(capsys):
    assert main(["list"]) == 0
    said = capsys.readouterr().out.splitlines()
    return {line[:2]: line for line in said if line[:2].isdigit()}, said


def test_a_cell_above_the_title_changes_nothing(workbook, capsys):
    before = listed(capsys)
    badge = nbformat.v4.new_markdown_cell(BADGE, metadata={"id": "view-in-github"})
    edit(workbook, "03_quantize_by_hand", lambda notebook: notebook.cells.insert(0, badge))
    assert listed(capsys) == before


@pytest.mark.parametrize("text", [
    own(), own(nbformat.v4.new_code_cell("# not a title\nimport quantlab")),
], ids=["empty", "without a title"])
def test_a_notebook_of_one_s_own_stands_beside_ours_of_the_same_number(workbook, capsys, text):
    write(workbook, "12_mine", text)
    _, said = listed(capsys)
    assert sum(line.startswith("12_beyond: 12 · ") for line in said) == 1
    assert "12_mine: 12_mine" in said
    assert find("12_beyond.ipynb").number == find("12_mine").number == "12"
    assert find("beyond").path.stem == "12_beyond" and find("3") == find("quantize_by_hand")
    with pytest.raises(UserError, match="'12' may be each of 12_beyond, 12_mine: name one in"):
        find("12")


@pytest.mark.parametrize("damage, said", [
    (lambda text: text.replace('"cells": [', '"cells": [\n<<<<<<< HEAD\n=======\n>>>>>>> theirs'),
     "05_activation_histograms.ipynb holds git's conflict markers; resolve them first"),
    (lambda text: text[:900], "05_activation_histograms.ipynb is no notebook of format 4 (JSON"),
    (lambda text: "[]", "05_activation_histograms.ipynb is no notebook of format 4 (TypeError"),
    (lambda text: '{"worksheets": [], "metadata": {}}', "is no notebook of format 4 (KeyError"),
    (lambda text: text.replace("n_panels = 20", "n_panels = = 20"),
     "05_activation_histograms.ipynb: its parameters cell is no Python (invalid syntax"),
], ids=["conflict", "torn", "no notebook", "format 3", "typing error"])
def test_a_damaged_notebook_gets_one_line_and_the_others_stay_usable(
    workbook, capsys, damage, said
):
    before, _ = listed(capsys)
    write(workbook, "05_activation_histograms",
          damage(read_text(workbook / "notebooks" / "05_activation_histograms.ipynb")))
    after, _ = listed(capsys)
    assert said in after.pop("05") and before.pop("05") and after == before
    assert main(["run", "05"]) == 1
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert requested(["07"], {"n_seeds": "2"})[0][1] == {"n_seeds": 2}
    problems = [notebook.problem for notebook, _ in requested((), {"n_seeds": "2"})]
    assert len(problems) == len(before) + 1 and sum(bool(problem) for problem in problems) == 1


@pytest.mark.parametrize("line, name, default", [
    ("weight_bits = 3", "weight_bits", 3),
    ("weight_bits: int = 3", "weight_bits", 3),
    ("weight_bits, act_bits = 3, 2", "act_bits", 2),
    ("weight_bits = act_bits = 5", "weight_bits", 5),
    ("%matplotlib inline\n!ls", "weight_bits", 4),
    ("n_calibration = 4 * 256", "n_calibration", "4 * 256"),
    ("n_calibration += 1", "n_calibration", "n_calibration += 1"),
    ("n_calibration = None", "n_calibration", None),
    ("sides, n_calibration = study()", "n_calibration", "study()"),
    ("bits.weight = 3", "weight_bits", 4),
])
def test_parameters_may_be_written_as_papermill_runs_them(workbook, line, name, default):
    def append(notebook):
        cell = next(c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
        cell.source += "\n" + line

    edit(workbook, "03_quantize_by_hand", append)
    notebook = find("03")
    assert not notebook.problem and notebook.parameters[name] == default
    assert len(notebook.parameters) == 11 + ("sides" in line)
    assert check_parameter(notebook, "n_calibration", "64") == 64


@pytest.mark.parametrize("default, text, value", [
    ("(1, 2)", "(3, 4)", (3, 4)), ("[1]", "[]", []), ("{}", "{'a': 1}", {"a": 1}),
    ("None", "percentile", "percentile"), ("2 * 3", "7", 7), ("2.0", "3", 3.0),
])
def test_a_value_has_the_type_of_its_default(workbook, default, text, value):
    cell = nbformat.v4.new_code_cell(f"x = {default}", metadata={"tags": ["parameters"]})
    write(workbook, "98_mine", own(cell))
    assert check_parameter(find("98"), "x", text) == value
    if default[0] in "([{":
        with pytest.raises(UserError, match="its default is"):
            check_parameter(find("98"), "x", "three")


def test_every_notebook_of_ours_can_be_run():
    assert not any(notebook.problem for notebook in notebooks.notebooks().values())


# ---- In step -------------------------------------------------------------------------------------


def touch_later(path):
    later = path.with_suffix(".py").stat().st_mtime + 5
    os.utime(path, (later, later))


def test_sync_keeps_raw_cells(workbook, capsys):
    path = workbook / "notebooks" / "05_activation_histograms.ipynb"
    edit(workbook, path.stem, lambda n: n.cells.append(nbformat.v4.new_raw_cell("\\newpage")))
    touch_later(path)
    for _ in range(2):  # from the .ipynb to the .py, then back
        assert main(["sync"]) == 0
        cell = nbformat.read(path, as_version=4).cells[-1]
        assert (cell.cell_type, cell.source) == ("raw", "\\newpage")
        path.with_suffix(".ipynb").unlink()
    assert "# %% [raw]\n# \\newpage" in read_text(path.with_suffix(".py"))


@pytest.mark.parametrize("is_newer", [True, False])
def test_sync_refuses_pasted_images_and_brings_the_others_into_step(workbook, capsys, is_newer):
    pasted = nbformat.v4.new_markdown_cell(
        "![shot.png](attachment:shot.png)", attachments={"shot.png": {"image/png": "iVBORw0KGgo="}})
    path = workbook / "notebooks" / "05_activation_histograms.ipynb"
    edit(workbook, path.stem, lambda notebook: notebook.cells.append(pasted))
    if is_newer:
        touch_later(path)
    before = read_text(path), read_text(path.with_suffix(".py"))
    (workbook / "notebooks" / "07_low_bit_methods.ipynb").unlink()
    assert main(["sync"]) == 1
    assert capsys.readouterr().err == (
        "error: 05_activation_histograms.ipynb holds pasted images (shot.png), which its .py "
        "cannot keep: save them as files in pic/ and link to them\n")
    assert (read_text(path), read_text(path.with_suffix(".py"))) == before
    assert (workbook / "notebooks" / "07_low_bit_methods.ipynb").exists()


@pytest.mark.parametrize("suffix", [".py", ".ipynb"])
def test_sync_refuses_a_file_with_conflict_markers(workbook, capsys, suffix):
    path = workbook / "notebooks" / f"05_activation_histograms{suffix}"
    path.write_text("<<<<<<< HEAD\n=======\n>>>>>>> theirs\n" + read_text(path))
    before = read_text(path)
    assert main(["sync"]) == 1
    assert f"{path} holds git's conflict markers" in capsys.readouterr().err
    assert read_text(path) == before
