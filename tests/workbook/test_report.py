"""What the report opens with: on a new machine what is published, beside its own smoke run."""

import re
import shutil

import jupytext
import pandas as pd
import pytest
from conftest import CHECKOUT

from quantlab.workbook import findings, results

PUBLISHED = CHECKOUT / "results" / "published.csv"


def opening(source, capsys):
    """What the report's cells print in front of its second section."""
    space = {}
    for cell in jupytext.read(CHECKOUT / "notebooks" / "13_report.py").cells:
        if cell.source.startswith("## 2."):
            return capsys.readouterr().out
        if cell.cell_type == "code":
            exec(cell.source, space)
            space |= {"source": source} if "parameters" in cell.metadata.get("tags", []) else {}


@pytest.fixture
def measured(workbook):
    """A workbook with the published rows; measured(data set): and with local rows of ResNet-20."""
    (workbook / "results").mkdir()
    for name in ("published.csv", "original.csv"):
        shutil.copy(CHECKOUT / "results" / name, workbook / "results")

    def measure(dataset):
        rows = results.load(PUBLISHED)
        rows = rows[rows.model.eq("resnet20") & rows.weight_bits.eq(4) & rows.act_bits.eq(4)][:40]
        rows = rows.assign(dataset=dataset, n_test=359)
        rows["config_key"] = [results.config_key(row) for row in rows.to_dict("records")]
        results.write(rows, results.local_path())

    return measure


def test_beside_a_smoke_run_stands_what_is_published(measured, capsys):
    measured("digits")
    said = opening("auto", capsys)
    raw = pd.read_csv(PUBLISHED)
    top1 = raw.top1[raw.method.eq("float") & raw.model.eq("resnet50")].iloc[0]
    assert "Smoke run." in said and "are published ones" in said
    assert f"| cifar10-jpeg | resnet50 | float | {top1:.2f} |" in said
    assert said.index("| cifar10-jpeg |") < said.index("| digits (smoke run) |")
    assert len(re.findall(r"^- .*\d", said, re.MULTILINE)) == 5
    assert "cifar10-jpeg, 10,000 test images" in said, "what the sentences are of"


@pytest.mark.parametrize("source, dataset", [("local", "digits"), ("auto", "pets")])
def test_rows_of_this_machine_alone_where_asked_for_or_of_real_images(
    measured, capsys, source, dataset
):
    measured(dataset)
    said = opening(source, capsys)
    assert "published" not in said and "| cifar10-jpeg |" not in said and dataset in said
    assert ("Smoke run." in said) == (dataset == "digits")


def test_the_reports_sentences_say_what_the_rows_say():
    """From the file itself; what has no rows is left out."""
    frame = results.load(PUBLISHED)
    text = findings.overview(frame)
    raw = pd.read_csv(PUBLISHED)
    integer = raw[raw.method.eq("integer only W8A8, single rounding") & raw.model.eq("resnet20")]
    top1, whole = integer[["top1", "fp32_top1"]].iloc[-1]
    assert f"keeps {top1:.2f} % of float's {whole:.2f} %" in text
    four = raw[raw.weight_bits.eq(4) & raw.act_bits.eq(4) & raw.corrections.isna()
               & raw.method.eq("by hand") & raw.residual_bits.eq(8) & raw.input_bits.eq(8)
               & raw.observer.eq("histogram") & raw.weight_observer.eq("lp(p=3)")
               & raw.symmetric.eq("weights") & raw.granularity.eq("channel")
               & raw.first_last_bits.isna()]
    means = four.groupby("model")["drop"].mean()
    for model in ("resnet50", "resnet20"):
        assert f"{model} {means[model]:.2f} [" in text.splitlines()[-1]
    few = findings.overview(frame[frame.model.eq("resnet50") & frame.method.ne("by hand")])
    assert 0 < few.count("\n- ") < 5
    assert findings.overview(frame[:0]) == ""
