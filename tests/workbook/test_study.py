"""A Study: what the preset decides, what is computed once, and that its rows are results' rows."""

import dataclasses
import functools
import os
import pathlib
import subprocess
import sys

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
from conftest import CHECKOUT
from IPython.core.interactiveshell import InteractiveShell
from IPython.core.pylabtools import select_figure_formats
from IPython.display import Markdown
from matplotlib.figure import Figure

import quantlab as ql
from quantlab import plots
from quantlab.workbook import results, study
from quantlab.workbook.study import Study, brief, draw_figures, show

CHECKPOINT = CHECKOUT / "checkpoint" / "resnet20-digits.safetensors"


@pytest.fixture(scope="module")
def digits_study(digits):
    return Study(digits, "resnet20", CHECKPOINT, notebook="03_quantize_by_hand")


def test_a_preset_decides_how_much_is_done(digits, capsys):
    auto = Study("digits", "resnet20", CHECKPOINT)
    said = capsys.readouterr().out
    assert said.startswith("data: digits") and "checkpoint: resnet20-digits" in said
    assert auto.smoke and auto.limit == 1000 and auto.n_calibration == 256
    assert auto.images.fingerprint == digits.fingerprint and len(auto.test) == len(digits.test)
    full = Study(digits, "resnet20", CHECKPOINT, "full")
    assert not full.smoke and full.limit is None and full.n_calibration == 1024
    few = Study(digits, "resnet20", CHECKPOINT, n_calibration=7, limit=30, seed=3)
    assert few.n_calibration == 7 and len(few.test) == 30 and few.seed == 3
    assert [auto.choose(g, smoke=1, full=3) for g in (0, "auto", "", 2)] == [1, 1, 1, 2]
    assert full.choose(0, smoke=1, full=3) == 3


def test_calibration_is_never_more_than_there_are_images(digits):
    small = ql.images.datasets.Dataset(
        digits.name, digits.classes, digits.train.subset(torch.arange(100)), digits.heldout,
        digits.test, digits.fingerprint)
    assert Study(small, "resnet20", CHECKPOINT).n_calibration == 100


@pytest.mark.parametrize("wrong, message", [
    (dict(preset="smoky"), "preset 'smoky' is unknown; did you mean smoke?"),
    (dict(model="resnet50"), "is a resnet20, not a resnet50"),
    (dict(checkpoint="nowhere.safetensors"), "nowhere.safetensors not found"),
])
def test_mistakes_are_told(digits, wrong, message):
    arguments = {"model": "resnet20", "checkpoint": CHECKPOINT, **wrong}
    with pytest.raises(ql.UserError, match=message.replace("?", r"\?")):
        Study(digits, **arguments)


def test_the_baseline_and_the_statistics_are_computed_once(digits_study, monkeypatch, stats):
    assert digits_study.baseline.n == len(digits_study.test)
    assert digits_study.baseline.top1 == digits_study.card.test_top1
    own = digits_study.stats
    assert own.n_images == 256
    assert all(own.edges[k].bins.equal(edge.bins) for k, edge in stats.edges.items()), "ql.collect"
    monkeypatch.setattr(study, "evaluate", lambda *a, **k: pytest.fail("evaluated again"))
    monkeypatch.setattr(study, "collect", lambda *a, **k: pytest.fail("collected again"))
    assert digits_study.baseline.n and digits_study.stats is own


def test_nothing_is_taken_over_from_images_that_are_normalised_otherwise(workbook, digits):
    other = dataclasses.replace(digits, test=dataclasses.replace(digits.test, mean=(0.9,) * 3))
    studies = [Study(data, "resnet20", CHECKPOINT) for data in (digits, other, digits)]
    settings = {"method": "float"}
    rows = [one.once(settings, lambda state, one=one: one.row(one.baseline, "float"))
            for one in studies]
    assert rows[0]["top1"] == rows[2]["top1"] != rows[1]["top1"]
    assert studies[1].baseline.top1 == studies[1].evaluate(studies[1].network).top1


def test_calibration_and_evaluation_take_the_study_s_settings(digits_study, digits, resnet20):
    own, theirs = next(iter(digits_study.calibration())), next(iter(digits.calibration(256, 0)))
    assert torch.equal(own, theirs)
    other = next(iter(digits_study.calibration(seed=1, n=8, batch_size=4)))
    assert torch.equal(other, next(iter(digits.calibration(8, 1, 4))))
    assert digits_study.evaluate(resnet20, digits.heldout).n == len(digits.heldout)
    assert digits_study.evaluate(resnet20).n == len(digits.test)


def test_rows_are_those_of_make_row(workbook, digits_study, digits):
    config = ql.QuantConfig(weight_bits=4)
    ours = digits_study.row(digits_study.baseline, "by hand", config, bytes=5, corrections="none")
    theirs = results.make_row(
        data=digits, model="resnet20", card=digits_study.card, baseline=digits_study.baseline,
        result=digits_study.baseline, method="by hand", notebook="03_quantize_by_hand", seed=0,
        config=config, n_calibration=256, bytes=5, corrections="none")
    assert ours | {"created": 0} == theirs | {"created": 0}
    assert digits_study.row(digits_study.baseline, "float")["n_calibration"] == 0
    assert digits_study.row(digits_study.baseline, "x", seed=9, n_calibration=2)["seed"] == 9
    shown = digits_study.record(digits_study.baseline, "float", bytes=1)
    assert len(results.load()) == 1 and list(shown.columns) == study.SHOWN and len(shown) == 1
    frame = digits_study.record_rows([ours])
    assert set(results.COLUMNS) <= set(frame.columns)
    assert brief(frame).equals(frame[study.SHOWN].round(2))


def test_once_measures_once_for_these_settings(workbook, digits_study):
    calls = []

    def measure(state):
        calls.append(pathlib.Path(state).suffix)
        return digits_study.row(digits_study.baseline, "float")

    first = digits_study.once({"method": "float"}, measure)
    assert digits_study.once({"method": "float"}, measure)["top1"] == first["top1"]
    assert calls == [".safetensors"]
    digits_study.once({"method": "float", "seed": 1}, measure)
    assert len(calls) == 2


def test_a_run_that_is_started_again_evaluates_nothing_twice(workbook, digits, monkeypatch):
    """What a killed run has evaluated is there with its predictions, the float baseline for all."""
    built = []

    def build(study):
        built.append(study)
        return study.network

    def started():
        return Study(digits, "resnet20", CHECKPOINT, limit=50)

    assert started().evaluated("float", functools.partial(build, started()))[0].n == 50
    assert not list((workbook / "results").glob("rows/*")), "by hand nothing is kept"
    monkeypatch.setenv("QUANTLAB_RUN", "a run")
    first, size = started().evaluated("float", functools.partial(build, started()))
    again, same_size = started().evaluated("float", lambda: pytest.fail("it is known"))
    assert len(built) == 2 and size == same_size == ql.weight_bytes(started().network)
    assert again.correct.equal(first.correct) and again.predictions.equal(first.predictions)
    assert (again.top1, again.n, again.seconds, again.device) == (
        first.top1, first.n, first.seconds, first.device)
    monkeypatch.setenv("QUANTLAB_RUN", "another run")
    started().evaluated("float", functools.partial(build, started()))
    assert len(built) == 3
    for kept in (workbook / "results" / "rows").iterdir():
        kept.write_bytes(b"torn")
    assert started().evaluated("float", lambda: started().network)[0].correct.equal(first.correct)
    baseline = started().baseline
    monkeypatch.setattr(study, "evaluate", lambda *a, **k: pytest.fail("evaluated again"))
    assert started().baseline.predictions.equal(baseline.predictions)
    with pytest.raises(pytest.fail.Exception, match="evaluated again"):
        Study(digits, "resnet20", CHECKPOINT, limit=40).baseline  # noqa: B018


def test_figures_are_named_after_network_and_data(workbook, digits_study, capsys):
    figure, _ = plt.subplots()
    assert digits_study.save(figure, "99_try") is figure
    assert (workbook / "pic" / "99_try_resnet20_digits.png").is_file()
    assert "99_try_resnet20_digits.png" in capsys.readouterr().out, "a plain script says where"
    digits_study.save(figure, "99_try", data="cifar10")
    assert (workbook / "pic" / "99_try_resnet20_cifar10.svg").is_file()
    assert digits_study.caption(3, "more") == plots.row_caption("digits", "resnet20", 3, "more")
    assert digits_study.caption(3, data="other") == "other, resnet20, n = 3"
    plt.close(figure)


def test_show_prints_in_a_plain_script_and_displays_in_a_notebook(monkeypatch, capsys):
    frame = pd.DataFrame({"bits": [8, 4]})
    styled = frame.style.format("{:.1f}")
    show("said", frame, frame.bits, styled, Markdown("**rows**"), plt.figure())
    said = capsys.readouterr().out
    assert said.startswith("said\n") and said.count("bits") == 2 and "8.0" in said
    assert "**rows**" in said
    shown = []
    monkeypatch.setattr(study, "get_ipython", lambda: "a kernel")
    monkeypatch.setattr(study, "display", shown.append)
    show("said", frame)
    assert shown == [frame] and capsys.readouterr().out == "said\n"
    plt.close("all")


def test_a_plain_script_opens_no_window(workbook, tmp_path):
    """As `python notebooks/NN_….py` does, on a machine that names a screen which is not there."""
    script = tmp_path / "script.py"
    script.write_text(
        "import matplotlib, matplotlib.pyplot as plt\n"
        "from quantlab.workbook.study import Study, show\n"
        "study = Study('digits', 'resnet20', 'auto', notebook='99_try')\n"
        "study.save(plt.figure(), '99_try')\n"
        "print(matplotlib.get_backend())\n")
    environment = {**os.environ, "QUANTLAB_ROOT": str(workbook), "MPLBACKEND": "TkAgg"}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True,
                          env={**environment, "PYTHONPATH": str(CHECKOUT)})
    assert done.stdout.splitlines()[-1].lower() == "agg", done.stderr
    assert "99_try_resnet20_digits.png" in done.stdout


def test_figures_are_drawn_under_a_backend_that_shows_nothing_in_the_format_chosen():
    shell = InteractiveShell()
    draw_figures(shell)
    figure = Figure()
    figure.add_subplot()
    assert shell.display_formatter.format(figure)[0]["image/png"].startswith("iVBOR")
    select_figure_formats(shell, {"svg"})
    draw_figures(shell)
    assert {*shell.display_formatter.format(figure)[0]} == {"text/plain", "image/svg+xml"}
