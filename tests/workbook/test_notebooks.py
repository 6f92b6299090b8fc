"""Sources of notebooks are in step and clean; every notebook has run once, on the digits."""

import os
import re
import shutil
import subprocess
import sys

import jupytext
import nbformat
import pandas as pd
import pytest
from conftest import CHECKOUT, read_text

from quantlab.workbook import notebooks as files
from quantlab.workbook import results, run, tables

ALL = sorted((CHECKOUT / "notebooks").glob("*.ipynb"))
NOTEBOOKS = [path for path in ALL if path.name[:2].isdigit()]


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
    assert "**Question.**" in first and "**Cost.**" in first


def test_every_notebook_with_data_has_the_common_parameters():
    for notebook in files.notebooks().values():
        if "data" in notebook.parameters:
            assert {"data", "model", "checkpoint", "seed"} <= set(notebook.parameters)
    assert {"weight_bits", "act_bits", "observer"} <= set(files.find("03").parameters)


# ---- Running: all notebooks have run once, see `executed` ----------------------------------------


def test_all_notebooks_run_without_a_warning(executed):
    place, frame, _ = executed
    assert frame.status.tolist() == ["done"] * len(NOTEBOOKS), frame.to_string()
    for path in (place / "results" / "runs").glob("*.ipynb"):
        outputs = [o for c in cells_of(path) for o in c.get("outputs", [])]
        stderr = [o.text for o in outputs if o.get("name") == "stderr"]
        assert not [t for t in stderr if "Warning" in t], stderr


def test_exercises_are_right_where_solutions_ran_and_else_not_written_yet(executed):
    runs = executed[0] / "results" / "runs"
    for name in [path.stem for path in NOTEBOOKS[:5]]:
        (out,) = runs.glob(f"{name}-*.ipynb")
        outputs = [o for c in cells_of(out)
                   if "check" in c.metadata.get("tags", []) for o in c.outputs]
        said = "right" if name == "01_train" else "not written yet"
        assert [o.text.partition(": ")[2] for o in outputs] == [f"{said}\n"] * 3


def test_every_notebook_that_records_has_rows_and_each_configuration_is_there_once(executed):
    runs = executed[0] / "results" / "runs"
    rows = results.load()
    assert {"float", "by hand"} <= set(rows.method) and set(rows.dataset) == {"digits"}
    assert not rows.duplicated(["config_key", "seed"]).any()
    recorded = {path.stem.rpartition("-")[0]: results.load(path) for path in runs.glob("*.csv")}
    recording = re.compile(r"\b(study|results|builder)\.(record|once|measure)")
    measuring = {path.stem for path in NOTEBOOKS if recording.search(read_text(path))}
    assert {name for name, frame in recorded.items() if len(frame)} == measuring
    assert set(recorded) == {path.stem for path in NOTEBOOKS}
    together = pd.concat(recorded.values())
    pairs = ["config_key", "seed"]
    assert set(together[pairs].itertuples(index=False)) == set(rows[pairs].itertuples(index=False))
    assert set(rows.run) <= set(together.run)


def test_rows_of_other_number_formats_are_apart_and_in_no_headline(executed):
    rows = results.load()
    own = rows[rows.notebook == "14_number_formats"]
    formats = own[own.method != "by hand"]
    assert len(own) > len(formats) > 8 and formats.config_key.is_unique
    labels = {results.label(row) for _, row in formats.iterrows()}
    assert labels == set(formats.method), "each has a label of its own"
    assert set(formats.levels) == {15, 247, 253, 255} and formats.bytes.max() < 3e5
    assert labels <= set(tables.headline(rows).Quantization), "all that has been measured"
    assert labels.isdisjoint(tables.headline(rows, brief=True).Quantization)
    assert labels.isdisjoint(results.equal_widths(rows).method)


def test_every_figure_that_a_notebook_saves_is_a_picture_in_both_formats(executed):
    pictures = {p.name for p in (executed[0] / "pic").iterdir()} - {"source_map.xmind"}
    assert pictures >= {
        "01_confusion_resnet20_digits.png", "03_accuracy_by_bits_resnet20_digits.svg",
        "images_train_digits.png", "04_panel_resnet20_digits.png", "05_ridges_resnet20_digits.svg",
    }
    stems = {name.rpartition(".")[0] for name in pictures}
    assert pictures == {f"{stem}.{suffix}" for stem in stems for suffix in ("png", "svg")}
    saved = {path.stem: re.findall(r'"(\d\d_\w+)"', read_text(path.with_suffix(".py")))
             for path in NOTEBOOKS}
    of_two_networks = "13_small_against_large"
    for name in {name for names in saved.values() for name in names} - {*saved, of_two_networks}:
        assert [stem for stem in stems if stem.startswith(name)], name


def test_the_report_shows_rows_and_figures_and_says_that_it_is_a_smoke_run(executed):
    report = read_text(executed[0] / "results" / "report.html")
    assert "Smoke run." in report and "W4A4 histogram" in report
    assert report.count("data:image/png;base64") > 4


def test_what_is_complete_is_skipped_whoever_asks(executed, monkeypatch):
    """The first has other parameters now; the report sees rows in the order of this command."""
    started = []

    def execute(source, out, *_):
        started.append(source.stem)
        out.write_text("{}")

    monkeypatch.setattr(run, "execute", execute)
    monkeypatch.setattr(run, "export_html", lambda *_: None)
    again = run.run([], {"data": "digits"})
    assert again.status.tolist()[1:-1] == ["skipped"] * (len(NOTEBOOKS) - 2)
    assert {"01_train"} <= {*started} <= {"01_train", "13_report"} and again.seconds.max() < 5
    assert run.run([], {"data": "digits"}).status.tolist() == ["skipped"] * len(NOTEBOOKS)


def test_the_first_notebook_trains_where_there_is_no_checkpoint(executed):
    card = executed[2]
    assert card["recipe"]["epochs"] == 1 and len(card["history"]) == 1
    assert card["trained_on"] == "digits"


def test_plain_papermill_from_jupyterlab_s_own_folder(workbook, tmp_path):
    """As people call it themselves, with the notebooks' folder as working directory."""
    code = "import quantlab as ql\nprint(ql.root(), ql.quantize.__name__)"
    cells = [nbformat.v4.new_code_cell(code)]
    tiny = nbformat.v4.new_notebook(cells=cells, metadata=files.KERNEL)
    nbformat.write(tiny, workbook / "notebooks" / "98_tiny.ipynb")
    out = tmp_path / "out.ipynb"
    environment = {**os.environ, "QUANTLAB_ROOT": str(workbook), "PYTHONPATH": str(CHECKOUT)}
    papermill = [sys.executable, "-m", "papermill", "98_tiny.ipynb", str(out)]
    done = subprocess.run(papermill, cwd=workbook / "notebooks", capture_output=True, text=True,
                          env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert cells_of(out)[0].outputs[0].text == f"{workbook} quantize\n"


@pytest.mark.parametrize("folder", ["", "notebooks"])
def test_the_report_as_a_plain_script_prints_the_published_rows(workbook, folder):
    (workbook / "results").mkdir()
    for name in ("published.csv", "original.csv"):
        shutil.copy(CHECKOUT / "results" / name, workbook / "results")
    (script,) = (workbook / "notebooks").glob("*_report.py")
    environment = {**os.environ, "QUANTLAB_ROOT": str(workbook), "PYTHONPATH": str(CHECKOUT)}
    done = subprocess.run([sys.executable, os.path.relpath(script, workbook / folder)],
                          cwd=workbook / folder, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "rows** from `results/published.csv`" in done.stdout
