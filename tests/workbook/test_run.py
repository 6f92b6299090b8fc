"""The runner on one tiny notebook: skips what is complete, survives kill -9, limits time."""

import os
import signal
import subprocess
import sys
import time

import meeting
import nbformat
import pandas as pd
import pytest
from conftest import CHECKOUT, is_gone

from quantlab.__main__ import main
from quantlab.system.errors import UserError
from quantlab.system.files import atomic_path
from quantlab.workbook import notebooks, request, results, run, tables, together
from quantlab.workbook.request import requested

RECORDING = """
import time
from quantlab.workbook import results
root = results.root()
results.record([{"config_key": f"k{n}", "seed": s, "notebook": "98_tiny"} for s in (0, 1)])
(root / "recorded").touch()
while (root / "wait").exists():
    time.sleep(0.05)
"""


def write_notebook(place, code, parameters="n = 1\ndata = 'digits'", metadata=notebooks.KERNEL,
                   name="98_tiny"):
    cells = [
        nbformat.v4.new_markdown_cell("# 98 · Tiny"),
        nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(code),
    ]
    notebook = nbformat.v4.new_notebook(cells=cells, metadata=metadata)
    nbformat.write(notebook, place / "notebooks" / f"{name}.ipynb")


def outputs_of_run(place):
    """What the cells of the run of 98_tiny showed: a dict of type -> content each."""
    (out,) = (place / "results" / "runs").glob("98_*.ipynb")
    cells = nbformat.read(out, as_version=4).cells
    return [output.data for cell in cells for output in cell.get("outputs", [])]


def start_runner(place, *numbers):
    environment = {**os.environ, "QUANTLAB_ROOT": str(place), "PYTHONPATH": str(CHECKOUT)}
    command = [sys.executable, "-m", "quantlab", "run", *numbers]
    return subprocess.Popen(command, cwd=place, env=environment, stdout=subprocess.DEVNULL)


def wait_for(condition):
    deadline = time.monotonic() + 120
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert condition()


def test_a_kill_between_recording_and_finishing_leaves_every_row_once(workbook):
    write_notebook(workbook, RECORDING)
    (workbook / "wait").touch()
    killed = start_runner(workbook, "98")
    wait_for(lambda: (workbook / "recorded").exists())
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    runs = workbook / "results" / "runs"
    assert not list(runs.glob("98_*"))
    assert len(list(runs.glob(".98_tiny-*"))) >= 2, "the notebook and its rows, not yet complete"
    assert not len(results.load()), "recorded, but its run is not complete"
    (workbook / "wait").unlink()
    with atomic_path(runs / "mine.csv") as mine:
        assert run.run(["98"]).status.tolist() == ["done"]
        assert [*runs.glob(".*")] == [mine], "of killed processes, not of those that live"
    (runs / "mine.csv").unlink()
    assert results.load().seed.tolist() == [0, 1]
    (out,) = runs.glob("98_*.ipynb")
    raw = pd.read_csv(results.local_path())
    assert len(raw) == 2 and set(raw.run) == {out.stem.removeprefix("98_tiny-")}


def test_what_is_complete_is_skipped_and_its_rows_are_there_again(workbook):
    write_notebook(workbook, "import os; os.environ['QUANTLAB_RUN']")
    assert run.run(["98"]).status.tolist() == ["done"]
    (rows,) = (workbook / "results" / "runs").glob("98_*.csv")
    row = {"config_key": "k", "run": "r", "seed": 3, "notebook": "98_tiny"}
    pd.DataFrame([row], columns=results.COLUMNS).to_csv(rows, index=False)
    assert run.run(["98"]).status.tolist() == ["skipped"]
    assert results.load().seed.tolist() == [3]
    results.local_path().unlink()
    frame = run.run(["98"])
    assert (frame.status[0], frame.message[0]) == ("skipped", f"complete: {rows.stem}.ipynb")
    assert results.load().run.tolist() == ["r"], "though results.csv was moved away"
    rows.unlink()
    assert run.run(["98"]).status.tolist() == ["done"], "a run without its rows is not complete"
    assert not {"QUANTLAB_RUN", "QUANTLAB_ROWS"} & set(os.environ)


def test_time_limit_and_failing_cell(workbook):
    write_notebook(workbook, "import time; time.sleep(60)")
    started = time.perf_counter()
    frame = run.run(["98"], time_limit=3)
    assert frame.status[0] == "failed" and "time limit of 3 s reached" in frame.message[0]
    assert time.perf_counter() - started < 40
    write_notebook(workbook, "raise ValueError('too green')")
    frame = run.run(["98"])
    assert frame.message[0].startswith("ValueError: too green (cell 2")
    kept = [p.name for p in (workbook / "results" / "runs").glob("*") if p.suffix != ".lock"]
    assert kept == ["98_tiny.failed.ipynb"], "kept to look at, under a name that says so"


def test_results_that_cannot_be_written(workbook):
    write_notebook(workbook, "1")
    (workbook / "results").write_text("a file where the folder should be")
    frame = run.run(["98"])
    assert frame.status[0] == "failed" and "cannot write" in frame.message[0]
    assert "name another folder" in frame.message[0]


def test_mistaken_parameters_and_names_are_refused_at_once(workbook):
    write_notebook(workbook, "1")
    texts = []
    mistakes = ((["98"], {"m": 1}), (["98"], {"n": "x"}), (["99"], {}), ([], {"sede": 1}))
    for numbers, overrides in mistakes:
        with pytest.raises(UserError) as caught:
            run.run(numbers, overrides)
        texts.append(str(caught.value))
    assert texts[0] == "98_tiny has no parameter 'm'; it accepts: n, data"
    assert texts[1] == "parameter n='x' of 98_tiny is not int; its default is 1"
    assert "notebook '99' is unknown" in texts[2] and "98_tiny" in texts[2]
    assert "did you mean seed?" in texts[3]
    assert not (workbook / "results").exists()


# ---- Several at a time ---------------------------------------------------------------------------


@pytest.mark.long
def test_notebooks_run_beside_each_other_and_a_report_behind_them(workbook):
    for n in (0, 1):
        write_notebook(workbook, MEETING, f"n = {n}\ndata = 'digits'", name=f"9{n}_tiny")
    report = "from quantlab.workbook import results\nprint(len(results.load()))"
    write_notebook(workbook, report, "n = 1", name="98_report")
    frame = run.run(["91", "90", "98"], workers=2)
    assert frame.status.tolist() == ["done"] * 3, frame.message.tolist()
    assert frame.notebook.tolist() == ["91_tiny", "90_tiny", "98_report"]
    assert all(m.startswith(n) for m, n in zip(frame.message, frame.notebook))
    assert sorted(results.load().config_key) == ["a0", "a1"]
    (out,) = (workbook / "results" / "runs").glob("98_*.ipynb")
    assert nbformat.read(out, as_version=4).cells[-1].outputs[0].text == "2\n", "it came last"
    assert not {"QUANTLAB_RUN", "QUANTLAB_ROWS"} & set(os.environ)


MEETING = """
import time
from quantlab.workbook import results
(results.root() / f"here {n}").touch()
while not (results.root() / f"here {1 - n}").exists():
    time.sleep(0.05)
results.record([{"config_key": f"a{n}", "seed": 0, "notebook": f"9{n}"}])
"""


@pytest.mark.parametrize("ending", [
    signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.long)])
def test_what_runs_beside_each_other_ends_with_its_runner(ending, tmp_path, capfd):
    (tmp_path / "wait").touch()
    code = ("import meeting, pathlib; from quantlab.workbook.together import outcomes; "
            f"folder = pathlib.Path({str(tmp_path)!r}); "
            "outcomes(meeting.meet, [meeting.part(folder, n) for n in (0, 1)], 2)")
    environment = {**os.environ, "PYTHONPATH": f"{CHECKOUT}{os.pathsep}{meeting.HERE}"}
    killed = subprocess.Popen([sys.executable, "-c", code], env=environment)
    here = [tmp_path / f"here {n}" for n in (0, 1)]
    wait_for(lambda: all(file.exists() and file.read_text() for file in here))
    ids = [int(file.read_text()) for file in here]
    assert len(set(ids)) == 2 and not any(map(is_gone, ids))
    killed.send_signal(ending)
    killed.wait()
    wait_for(lambda: all(map(is_gone, ids)))
    (tmp_path / "wait").unlink()
    ended = together.outcomes(meeting.meet, [meeting.part(tmp_path, n) for n in (1, 0)], 2)
    assert ended == [("done", 0.0, "met 0"), ("done", 0.0, "met 1")]
    said = capfd.readouterr().out
    assert "2 notebooks, 2 at a time" in said and "done: 90_tiny" in said
    assert "never seen" not in said


def test_a_process_that_is_lost_fails_what_it_ran_in_one_line(tmp_path):
    ended = together.outcomes(meeting.leave, [meeting.part(tmp_path, n) for n in (0, 1)], 2)
    assert [status for status, *_ in ended] == ["failed"] * 2
    assert all("killed" in said and "--workers 1" in said for *_, said in ended)


def test_by_itself_only_smoke_runs_go_beside_each_other(workbook, monkeypatch, capsys):
    several = []
    monkeypatch.setattr(run, "default_workers", lambda: 3)
    monkeypatch.setattr(run, "_run_one", lambda *part: ("done", ""))
    monkeypatch.setattr(run, "outcomes", lambda function, parts, workers: [
        several.append((len(parts), workers)) or ("done", 0.0, "") for _ in parts])
    write_notebook(workbook, "1", "data = '/nowhere'\npreset = 'auto'")  # one with a problem
    names = run.run(source="digits", workers=None).notebook
    assert names[0] == "01_train" and names.iloc[-1] == "13_report"
    assert set(several) == {(len(names) - 2, 3)}, "not the one that trains, nor the report"
    several.clear()
    run.run(overrides={"preset": "full"}, source="digits", workers=None)
    run.run(["03"], source="digits", workers=None)
    assert not several
    run.run(["03", "04"], {"preset": "full"}, source="digits", workers=2)
    assert several == [(2, 2)] * 2
    assert main(["run", "03", "--workers", "0"]) == 1
    assert "--workers 0: name at least 1" in capsys.readouterr().err


# ---- Figures -------------------------------------------------------------------------------------

FIGURE = "from matplotlib import pyplot as plt\nf, axes = plt.subplots()\nplt.close(f)\nf"


def test_the_headlines_notebooks_measure_all_of_its_rows():
    rows = results.load(CHECKOUT / "results" / "published.csv")
    brief = results.summarize(rows)
    brief = brief[tables._is_brief(brief)]
    asked = {(number, own["model"]): own for number, own in request.headline()}
    texts = " ".join(str(notebooks.find(number).cells) for number, _ in asked)
    for tool in set(brief.method) - {"by hand"}:
        assert tool.split()[0] in texts, f"{tool} is measured by none of {list(asked)}"
    assert all(own["preset"] == "full" for own in asked.values())
    learned = rows[rows.config_key.isin(brief.config_key[brief.corrections.ne("")])]
    assert set(learned.model) == {"resnet20", "resnet50"}
    for row in learned.itertuples():
        own = asked["07", row.model]
        assert row.corrections.removesuffix(", 500 iterations") in own["methods"].split(",")
        assert f"{row.weight_bits}/{row.act_bits}" in own["widths"].split(",")
        assert row.seed < int(own["n_seeds"]), "one that stays as another machine measured it"
    asked = dict(request.headline({"n_seeds": "1", "model": "resnet20"}))
    assert asked["07"]["n_seeds"] == "1" and "n_seeds" not in asked["09"] and len(asked) == 4
    with pytest.raises(UserError, match="no parameter 'n_seds'"):
        request.headline({"n_seds": "1"})
    assert request.cost(notebooks.find("13")).startswith("Seconds")


@pytest.mark.parametrize("backend", ["Agg", "TkAgg"])
def test_figures_are_pictures_under_any_backend(workbook, monkeypatch, backend):
    monkeypatch.setenv("MPLBACKEND", backend)
    write_notebook(workbook, FIGURE)
    assert run.run(["98"]).message[0].startswith("98_tiny-")
    (shown,) = outputs_of_run(workbook)
    assert "image/png" in shown


def test_a_run_whose_figures_are_missing_fails_and_is_not_taken_for_complete(workbook):
    write_notebook(workbook, "from IPython.display import display\n"
                             "display({'text/plain': '<Figure size 9x9 with 1 Axes>'}, raw=True)")
    frame = run.run(["98"])
    assert (frame.status[0], frame.message[0]) == (
        "failed", "1 of 1 figures have no picture: leave matplotlib's backend to the notebook; "
                  "see 98_tiny.failed.ipynb")
    assert run.run(["98"]).status[0] == "failed", "it is not skipped"
    assert not list((workbook / "results" / "runs").glob("98_tiny-*"))


def test_the_report_is_found_by_its_name(workbook, monkeypatch):
    started = []
    monkeypatch.setattr(run, "_run_one", lambda notebook, *_: started.append(notebook) or ("", ""))
    assert main(["report"]) == 0
    assert [notebook.path.stem for notebook in started] == ["13_report"]


def test_the_report_is_run_last_whatever_its_number(workbook):
    """It reads what the others record: those with higher numbers too, a reader's own for example.
    """
    write_notebook(workbook, "1")
    names = [notebook.path.stem for notebook, _ in requested()]
    assert names[-1] == "13_report" and names[:-1] == sorted(names[:-1]) and "98_tiny" in names


# ---- Notebooks that people edit ------------------------------------------------------------------


@pytest.mark.parametrize("metadata, said", [
    ({"kernelspec": {"name": "theirs", "display_name": "Theirs"}},
     "98_tiny.ipynb wants the kernel 'theirs', which is not installed here; choose Python 3"),
    ({"kernelspec": {"name": "ir", "display_name": "R", "language": "R"}},
     "98_tiny.ipynb is written in r; only Python"),
])
def test_a_kernel_that_is_not_here_gets_one_line(workbook, metadata, said):
    write_notebook(workbook, "1", metadata=metadata)
    for other in (workbook / "notebooks").glob("[01]*"):
        other.unlink()
    frame = run.run()
    assert frame.status[0] == "failed" and frame.message[0].startswith(said)


def test_magics_expressions_and_no_kernel_at_all_run_as_with_papermill(workbook):
    write_notebook(workbook, "print(n, width, sides)", metadata={},
                   parameters="%matplotlib inline\nn = 4 * 2\nwidth, sides = 3, (1, 2)")
    frame = run.run(["98"], {"n": "9", "sides": "(5, 6)"})
    assert frame.status[0] == "done", frame.message[0]
    (out,) = (workbook / "results" / "runs").glob("98_*.ipynb")
    assert nbformat.read(out, as_version=4).cells[-1].outputs[0].text == "9 3 (5, 6)\n"
