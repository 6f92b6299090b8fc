"""Every notebook runs through papermill with tiny parameters; sources stay in step."""

import os
import re
import subprocess
import sys

import jupytext
import nbformat
import pandas as pd
import pytest
from conftest import CHECKOUT, read_text

import quantlab as ql
from quantlab.system.files import repository_url
from quantlab.workbook import notebooks as files
from quantlab.workbook import results, run

ALL = sorted((CHECKOUT / "notebooks").glob("*.ipynb"))
NOTEBOOKS = [path for path in ALL if path.name[:2].isdigit()]
TINY = {"preset": "smoke", "n_calibration": "32", "data": "digits"}


def cells_of(path):
    return nbformat.read(path, as_version=4).cells


# ---- Sources ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ALL, ids=lambda p: p.stem)
def test_source_is_in_step_and_clean(path):
    script, cells = path.with_suffix(".py"), cells_of(path)
    texts = (read_text(script), read_text(path))
    assert files.render(jupytext.read(script), path.stem) == texts, "run: make sync"
    assert not any(c.get("outputs") or c.get("execution_count") for c in cells)
    code = [c.source for c in cells if c.cell_type == "code"]
    assert max(len(c.splitlines()) for c in code) <= 15
    assert not any(re.search(r"import \*|^\s*[%!]", c, re.MULTILINE) for c in code)
    assert sum("parameters" in c.metadata.get("tags", []) for c in cells) == 1


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_the_first_cell_says_what_is_asked_and_what_it_costs(path):
    first = cells_of(path)[0].source
    assert first.startswith(f"# {path.stem[:2]} · ")
    assert repository_url().split("github.com/")[1] in first
    assert "**Question.**" in first and "**Cost.**" in first


def test_every_notebook_with_data_has_the_common_parameters():
    for notebook in files.notebooks().values():
        if "data" in notebook.parameters:
            assert {"data", "model", "checkpoint", "seed"} <= set(notebook.parameters)
    assert {"weight_bits", "act_bits", "observer"} <= set(files.find("03").parameters)


def test_badges_and_clone_addresses_come_from_one_place(workbook):
    pyproject = workbook / "pyproject.toml"
    old, fork = repository_url(), "https://github.com/somebody/fork"
    pyproject.write_text(read_text(pyproject).replace(old, fork))
    files.sync()
    for path in NOTEBOOKS:
        text = read_text(workbook / "notebooks" / path.name)
        badge = "colab.research.google.com/github/somebody/fork/blob/main/notebooks/"
        assert badge + path.name in text
        assert fork in text and old.removeprefix("https://") not in text
    assert files.sync() == []


# ---- Running ------------------------------------------------------------------------------------


def test_all_notebooks_run_and_then_are_skipped(workbook):
    frame = run.run([], {"data": "digits"}, time_limit=400)
    assert frame.status.tolist() == ["done"] * len(NOTEBOOKS), frame.to_string()
    check_rows(workbook / "results" / "runs")
    report = read_text(workbook / "results" / "report.html")
    assert "Smoke run." in report and "W4A4 histogram" in report
    assert report.count("data:image/png;base64") > 4
    pictures = {p.name for p in (workbook / "pic").iterdir()}
    assert pictures >= {
        "01_confusion_resnet20_digits.png", "03_accuracy_by_bits_resnet20_digits.svg",
        "images_train_digits.png", "04_panel_resnet20_digits.png", "05_ridges_resnet20_digits.svg",
    }
    for executed in (workbook / "results" / "runs").glob("*.ipynb"):
        outputs = [o for c in cells_of(executed) for o in c.get("outputs", [])]
        stderr = [o.text for o in outputs if o.get("name") == "stderr"]
        assert not [t for t in stderr if "Warning" in t], stderr
    again = run.run([], {"data": "digits"})
    assert again.status.tolist() == ["skipped"] * len(NOTEBOOKS) and again.seconds.max() < 5
    changed = run.run(["03"], {**TINY, "weight_bits": "9"})
    assert changed.status.tolist() == ["failed"]
    assert "weight_bits=9: a width is an integer from 2 to 8" in changed.message[0]


def check_rows(runs):
    """Every notebook that records has rows, and results.csv has each configuration of each once."""
    rows = results.load()
    assert {"float", "by hand"} <= set(rows.method) and set(rows.dataset) == {"digits"}
    assert not rows.duplicated(["config_key", "seed"]).any()
    recorded = {path.stem.rpartition("-")[0]: results.load(path) for path in runs.glob("*.csv")}
    recording = re.compile(r"\b(study|results)\.(record|once)")
    measuring = {path.stem for path in NOTEBOOKS if recording.search(read_text(path))}
    assert {name for name, frame in recorded.items() if len(frame)} == measuring
    assert set(recorded) == {path.stem for path in NOTEBOOKS}
    together = pd.concat(recorded.values())
    pairs = ["config_key", "seed"]
    assert set(together[pairs].itertuples(index=False)) == set(rows[pairs].itertuples(index=False))
    assert set(rows.run) <= set(together.run)


def test_training_from_the_notebook(workbook):
    for file in (workbook / "checkpoint").iterdir():
        file.unlink()
    frame = run.run(["01"], {"data": "digits", "epochs": "1"})
    assert frame.status[0] == "done", frame.message[0]
    card = ql.load_card(workbook / "checkpoint" / "resnet20-digits.safetensors")
    assert card.recipe["epochs"] == 1


@pytest.mark.parametrize("folder", ["", "notebooks"])
def test_plain_papermill_from_anywhere(workbook, tmp_path, folder):
    """As people call it themselves, from the root and from JupyterLab's own working directory."""
    out = tmp_path / "out.ipynb"
    (report,) = (workbook / "notebooks").glob("*_report.ipynb")
    source = os.path.relpath(report, workbook / folder)
    environment = {**os.environ, "QUANTLAB_ROOT": str(CHECKOUT), "PYTHONPATH": str(CHECKOUT)}
    papermill = [sys.executable, "-m", "papermill", source, str(out), "-p", "source", "published"]
    done = subprocess.run(papermill, cwd=workbook / folder, capture_output=True, text=True,
                          env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    outputs = [str(c.get("outputs")) for c in cells_of(out)]
    assert any("rows** from `results/published.csv`" in text for text in outputs)
