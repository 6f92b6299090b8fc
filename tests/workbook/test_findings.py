"""What notebooks say they found is what the published rows say."""

import re

import jupytext
import pandas as pd
import pytest
from conftest import CHECKOUT, read_text

from quantlab.workbook import findings, results

NAMES = list(findings.FINDINGS)


@pytest.fixture(scope="module")
def texts():
    return findings.findings(results.load(CHECKOUT / "results" / "published.csv"))


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_opens_and_ends_with_what_publish_would_write(texts, name):
    cells = jupytext.read(CHECKOUT / "notebooks" / f"{name}.py").cells
    (closing,) = (cell for cell in cells if "<!-- findings:closing -->" in cell.source)
    below = [cell.source for cell in cells[cells.index(closing) + 1 :]]
    assert not below or below[0].startswith("## Exercises")
    for cell, place in ((cells[0], "opening"), (closing, "closing")):
        assert cell.cell_type == "markdown"
        assert cell.source.count(f"<!-- findings:{place} -->") == 1
        written = findings.with_findings(cell.source, texts, name)
        assert written == cell.source, "run: python -m quantlab publish"
        assert texts[name, place]


@pytest.mark.parametrize("name", NAMES)
def test_an_opening_is_three_sentences_with_numbers(texts, name):
    opening = texts[name, "opening"].partition("). ")[2].replace("\n", " ")
    sentences = re.split(r"(?<=\.) (?=[A-Z])", opening)
    assert 3 <= len(sentences) <= 4
    assert all(re.search(r"\d", sentence) for sentence in sentences)


def test_numbers_are_the_means_of_the_published_file(texts):
    """Computed here from the file itself, column by column."""
    frame = pd.read_csv(CHECKOUT / "results" / "published.csv", keep_default_na=False)
    three = frame[frame.model.eq("resnet20") & frame.method.eq("by hand")
                  & frame.weight_bits.astype(str).str.fullmatch(r"3(\.0)?")
                  & frame.observer.eq("minmax") & frame.weight_observer.eq("minmax")
                  & frame.corrections.eq("")]
    assert len(three) == 3
    low, mean, high = (three[c].astype(float).mean() for c in ("drop_low", "drop", "drop_high"))
    table = texts["03_quantize_by_hand", "closing"]
    assert f"{mean:.2f} [{low:.2f}, {high:.2f}]" in table.splitlines()[-1]
    assert f"{mean:.2f} with minmax" in texts["03_quantize_by_hand", "opening"].replace("\n", " ")
    float_bytes = int(frame[frame.method.eq("float") & frame.model.eq("resnet20")].bytes.iloc[0])
    assert f"{float_bytes / 1000:,.0f} kB" in texts["03_quantize_by_hand", "opening"]


def test_new_rows_change_the_text_and_none_leave_it_empty(workbook):
    frame = results.load(CHECKOUT / "results" / "published.csv")
    worse = frame.assign(drop=frame["drop"] + 1, top1=frame.top1 - 1)
    results.write(worse, results.published_path())
    changed = findings.update_notebooks()
    assert changed == [f"{name}{suffix}" for name in NAMES for suffix in (".py", ".ipynb")]
    loses = r"At 3[\s#]+bits it loses ([\d.]+)[\s#]+with[\s#]+histogram"
    before, after = (float(re.search(loses, read_text(place / "notebooks" / f"{NAMES[0]}.py"))[1])
                     for place in (CHECKOUT, workbook))
    assert after == pytest.approx(before + 1)
    assert findings.update_notebooks() == []
    results.write(frame[:0], results.published_path())
    findings.update_notebooks()
    assert "with histogram, " not in read_text(workbook / "notebooks" / f"{NAMES[0]}.py")


def test_low_bit_findings_are_of_the_levels_that_most_learned_rows_have():
    """Once all learned rows are measured with 2^b levels, those are told, and the levels with them;
    what was found with the whole range or the default is told as before.
    """
    frame = results.load(CHECKOUT / "results" / "published.csv")
    frame = frame[frame.symmetric.ne("neither")]
    narrow = findings.Rows(frame)
    assert narrow.low_bit == {"weight_symmetric": True}
    learned = frame[frame.symmetric.eq("weights") & frame.method.eq("by hand")]
    every = learned.assign(symmetric="neither", drop=learned["drop"] - 0.07)
    every["levels"] = [results.levels(row) for row in every.to_dict("records")]
    every["config_key"] = [results.config_key(row) for row in every.to_dict("records")]
    both = pd.concat([frame, results.typed(every)])
    rows = findings.Rows(both)
    assert rows.low_bit == {"weight_symmetric": False}
    method = "QDrop + fine-tuning"
    gained = narrow.method("2/2", method)["drop"] - rows.method("2/2", method)["drop"]
    assert gained == pytest.approx(0.07)
    assert rows.method("2/2", method).levels == 4 and narrow.method("2/2", method).levels == 3
    before, after = findings.findings(frame), findings.findings(both)
    assert before["03_quantize_by_hand", "closing"] == after["03_quantize_by_hand", "closing"]
    for text, levels in ((before, "2^b - 1 levels"), (after, "2^b levels")):
        assert f"weights of {levels}" in text["07_low_bit_methods", "closing"]
        opening = text["08_mixed_precision", "opening"].replace("\n", " ")
        assert f"weights of {levels}" in opening
    assert "| 2^b - 1 levels | +0.00 | +0.00 |" in after["08_mixed_precision", "closing"]


def test_the_originals_questions_are_answered_from_the_rows_there_are():
    frame = results.load(CHECKOUT / "results" / "published.csv")
    table = findings.answers(frame)
    assert len(table) == 6 and "resnet20, cifar10-jpeg, 10,000 test images" in table.columns[1]
    told = dict(zip(table["Its question"], table.iloc[:, 1]))
    raw = pd.read_csv(CHECKOUT / "results" / "published.csv", keep_default_na=False)
    raw = raw[raw.model == "resnet20"]
    once, before = (raw.top1[raw.corrections == f"W4A4 ladder: {step}"].mean()
                    for step in ("codes stored once", "unsigned after ReLU"))
    assert f"{once - before:+.2f} points" in told["How to raise accuracy: fusion and freeze"]
    partly = findings.answers(frame[frame.weight_bits.isna() | frame.weight_bits.ne(4)])
    assert 0 < len(partly) < 6, "what has no rows is left out"
    assert not len(findings.answers(frame[:0]))


@pytest.mark.parametrize("bits", [4, 3])
def test_the_published_ladder_has_every_step_at_both_widths(bits):
    frame = results.current(results.load(CHECKOUT / "results" / "published.csv"))
    found = findings.steps(frame[frame.model == "resnet20"], bits)
    assert list(found) == [findings.FIRST_STEP, *findings.LADDER, findings.LAST_STEP]
    assert all(part.seed.nunique() == 3 for part in found.values()), "three seeds of each"


def published():
    return pd.read_csv(CHECKOUT / "results" / "published.csv", keep_default_na=False)


def test_goals_stand_beside_the_mean_of_the_seeds_of_the_method_fixed_beforehand(texts):
    raw = published()
    raw = raw[raw.model.eq("resnet20") & raw.first_last_bits.eq("")
              & pd.to_numeric(raw.residual_bits).eq(8)
              & raw.corrections.eq("QDrop + augmented fine-tuning, 500 iterations")]
    lines = texts["07_low_bit_methods", "closing"].splitlines()
    for bits, required, aim in ((4, 0.4, 0.3), (3, 1.4, 1.0), (2, 5.2, 4.0)):
        widths = [pd.to_numeric(raw[name]).eq(bits) for name in ("weight_bits", "act_bits")]
        own = raw[widths[0] & widths[1] & pd.to_numeric(raw.levels).eq(2**bits)]
        low, mean, high = (own[c].astype(float).mean() for c in ("drop_low", "drop", "drop_high"))
        (line,) = (x for x in lines if x.startswith(f"| resnet20 | W{bits}A{bits} | QDrop"))
        assert f"| {2**bits} | {len(own)} | {mean:.2f} [{low:.2f}, {high:.2f}] |" in line
        reached = "aim" if mean <= aim else "required" if mean <= required else "no"
        assert line.endswith(f"| {required} | {aim} | {reached} |")


def test_a_goal_at_8_bits_is_reached_where_the_interval_holds_0_and_at_fewer_it_is_not():
    frame = results.load(CHECKOUT / "results" / "published.csv")
    noisy = frame.assign(drop=1.9, drop_low=-0.1, drop_high=3.9)
    _, table = findings.goals_table(findings.Rows(noisy))
    told = table.set_index(["Network", "Width"]).Reached
    assert told["resnet20", "W4A8"] == "required" and told["resnet20", "W4A4"] == "no"
    assert told["resnet20", "W2A2"] == "aim" and told["resnet20", "W2A2, first/last 8"] == "aim"
    _, table = findings.goals_table(findings.Rows(noisy.assign(drop_low=0.1)))
    assert table.set_index(["Network", "Width"]).Reached["resnet20", "W4A8"] == "no"


def test_other_tools_and_training_with_labels_stand_beside_ours(texts):
    raw = published()
    closing = texts["07_low_bit_methods", "closing"]
    gptq = raw[raw.method.eq("Brevitas GPTQ") & raw.weight_bits.astype(str).str.match("3")]
    trained = raw[raw.method.eq("W3A3 QAT, learned steps") & raw.levels.astype(str).str.match("8")]
    assert len(gptq) == 1 and len(trained)
    for row in (gptq.iloc[0], trained.iloc[0]):
        numbers = [float(row[name]) for name in ("drop", "drop_low", "drop_high")]
        assert "{:.2f} [{:.2f}, {:.2f}]".format(*numbers) in closing
