"""Every notebook runs through papermill with tiny parameters; the runner skips, resumes after kill -9, limits time; sources stay in step."""

import os
import re
import signal
import subprocess
import sys
import time

import jupytext
import nbformat
import pytest
from conftest import CHECKOUT, read_text

import quantlab as ql
from quantlab.system.files import repository_url
from quantlab.workbook import notebooks as files
from quantlab.workbook import results, run

NOTEBOOKS = sorted((CHECKOUT / "notebooks").glob("*.ipynb"))
TINY = {"preset": "smoke", "n_calibration": "32", "data": "digits"}


def command(*arguments, root, **options):
    environment = {**os.environ, "QUANTLAB_ROOT": str(root)}
    return subprocess.run([sys.executable, "-m", "quantlab", *arguments], cwd=root, capture_output=True, text=True, env=environment, **options)


def cells_of(path):
    return nbformat.read(path, as_version=4).cells


# ---- Sources ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_source_is_in_step_clean_and_in_the_house_style(path):
    cells = cells_of(path)
    script = path.with_suffix(".py")
    assert files.render(jupytext.read(script), path.stem) == (read_text(script), read_text(path)), "run: make sync"
    assert not any(c.get("outputs") or c.get("execution_count") for c in cells)
    assert cells[0].source.startswith(f"# {path.stem[:2]} · ") and repository_url().split("github.com/")[1] in cells[0].source
    assert "**Question.**" in cells[0].source and "**Cost.**" in cells[0].source
    assert sum("parameters" in c.metadata.get("tags", []) for c in cells) == 1
    code = [c.source for c in cells if c.cell_type == "code"]
    assert max(len(c.splitlines()) for c in code) <= 15
    assert not any(re.search(r"import \*|^\s*[%!]", c, re.MULTILINE) for c in code)


def test_every_notebook_with_data_has_the_common_parameters():
    for notebook in files.notebooks().values():
        if "data" in notebook.parameters:
            assert {"data", "model", "checkpoint", "seed"} <= set(notebook.parameters)
    assert {"weight_bits", "act_bits", "observer"} <= set(files.find("03").parameters)


def test_badges_and_clone_addresses_come_from_one_place(workbook):
    pyproject = workbook / "pyproject.toml"
    pyproject.write_text(read_text(pyproject).replace(repository_url(), "https://github.com/somebody/fork"))
    assert len(files.sync()) == 2 * len(NOTEBOOKS)
    for path in (workbook / "notebooks").glob("*.ipynb"):
        text = read_text(path)
        assert "colab.research.google.com/github/somebody/fork/blob/main/notebooks/" + path.name in text
        assert "https://github.com/somebody/fork workbook" in text
    assert files.sync() == []


# ---- Running ------------------------------------------------------------------------------------------------------------------


def test_all_notebooks_run_and_then_are_skipped(workbook):
    frame = run.run([], {"data": "digits"}, time_limit=400)
    assert frame.status.tolist() == ["done"] * len(NOTEBOOKS), frame.to_string()
    rows = results.load()
    assert {"float", "by hand"} <= set(rows.method) and set(rows.dataset) == {"digits"}
    by_hand = rows[rows.method == "by hand"].notebook.value_counts().to_dict()
    expected = {"03_quantize_by_hand": 12, "04_observers": 21, "06_low_bit": 34}
    assert by_hand == expected | {"08_original_experiment": 3, "09_questions": 25, "10_beyond": 2}
    report = read_text(workbook / "results" / "report.html")
    assert "Smoke run." in report and "W4A4 histogram" in report and report.count("data:image/png;base64") > 4
    pictures = {p.name for p in (workbook / "pic").iterdir()}
    assert {"01_confusion_resnet20_digits.png", "03_accuracy_by_bits_resnet20_digits.svg", "images_train_digits.png",
            "04_panel_resnet20_digits.png", "05_ridges_resnet20_digits.svg"} <= pictures
    for executed in (workbook / "results" / "runs").glob("*.ipynb"):
        stderr = [o.text for c in cells_of(executed) for o in c.get("outputs", []) if o.get("name") == "stderr"]
        assert not [t for t in stderr if "Warning" in t], stderr
    again = run.run([], {"data": "digits"})
    assert again.status.tolist() == ["skipped"] * len(NOTEBOOKS) and again.seconds.max() < 5
    changed = run.run(["03"], {**TINY, "weight_bits": "9"})
    assert changed.status.tolist() == ["failed"] and "weight_bits=9: a width is an integer from 2 to 8" in changed.message[0]


def test_training_from_the_notebook(workbook):
    for file in (workbook / "checkpoint").iterdir():
        file.unlink()
    frame = run.run(["01"], {"data": "digits", "epochs": "1"})
    assert frame.status[0] == "done", frame.message[0]
    assert ql.load_card(workbook / "checkpoint" / "resnet20-digits.safetensors").recipe["epochs"] == 1


@pytest.mark.parametrize("folder", ["", "notebooks"])
def test_plain_papermill_from_anywhere(workbook, tmp_path, folder):
    """As people call it themselves, from the root and from JupyterLab's own working directory."""
    out = tmp_path / "out.ipynb"
    source = os.path.relpath(workbook / "notebooks" / "11_report.ipynb", workbook / folder)
    results.record([])
    environment = {**os.environ, "QUANTLAB_ROOT": str(CHECKOUT), "PYTHONPATH": str(CHECKOUT)}
    papermill = [sys.executable, "-m", "papermill", source, str(out), "-p", "source", "published"]
    done = subprocess.run(papermill, cwd=workbook / folder, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert any("rows** from `results/published.csv`" in str(c.get("outputs")) for c in cells_of(out))


def test_kill_9_in_the_middle_and_resume(workbook):
    arguments = [sys.executable, "-m", "quantlab", "run", "01", "11", "--force"]
    environment = {**os.environ, "QUANTLAB_ROOT": str(workbook)}
    process = subprocess.Popen([*arguments[:-3], "01"], cwd=workbook, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    process.stdout.readline()
    time.sleep(6)  # the kernel is up and cells are running
    process.send_signal(signal.SIGKILL)
    process.wait()
    runs = workbook / "results" / "runs"
    assert not list(runs.glob("01_train-*.ipynb")), "nothing under its final name"
    done = command("run", "01", root=workbook)
    assert done.returncode == 0 and re.search(r"01_train +done", done.stdout), done.stdout + done.stderr
    assert len(list(runs.glob("01_train-*.ipynb"))) == 1 and len(results.load()) >= 1
    again = command("run", "01", root=workbook)
    assert re.search(r"01_train +skipped", again.stdout) and "report:" in again.stdout


def test_time_limit_and_failing_cell(workbook):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# 12 · Slow"), nbformat.v4.new_code_cell("import time; time.sleep(60)")])
    notebook.metadata = files.KERNEL
    nbformat.write(notebook, workbook / "notebooks" / "12_slow.ipynb")
    started = time.perf_counter()
    frame = run.run(["12"], time_limit=3)
    assert frame.status[0] == "failed" and "time limit of 3 s reached" in frame.message[0] and time.perf_counter() - started < 40
    notebook.cells[1].source = "raise ValueError('too green')"
    nbformat.write(notebook, workbook / "notebooks" / "12_slow.ipynb")
    frame = run.run(["12"])
    assert frame.message[0].startswith("ValueError: too green (cell 1")
    assert [p.name for p in (workbook / "results" / "runs").glob("*")] == ["12_slow.failed.ipynb"], "kept to look at, under a name that says so"


def test_results_that_cannot_be_written(workbook):
    (workbook / "results").write_text("a file where the folder should be")
    frame = run.run(["11"])
    assert frame.status[0] == "failed" and "cannot write" in frame.message[0] and "name another folder" in frame.message[0]


def test_changed_parameters_package_or_data_make_another_run(workbook, monkeypatch):
    notebook = files.find("03")
    keys = {run.run_key(notebook, p) for p in ({}, {"weight_bits": 3}, {"data": "digits"}, {"data": "cifar10"})}
    assert len(keys) == 4
    (workbook / "checkpoint" / "resnet20-digits.safetensors").write_bytes(b"other weights")
    assert run.run_key(notebook, {}) not in keys
