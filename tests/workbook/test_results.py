"""Rows, intervals and tables."""

import csv
import dataclasses
import json
import math
import shutil
import subprocess
import sys
import time

import pandas as pd
import pytest
import torch
from conftest import CHECKOUT, NONSENSE, fuzz, read_text
from hypothesis import given
from hypothesis import strategies as st

import quantlab as ql
from quantlab.__main__ import TABLES
from quantlab.evaluate import Evaluation, evaluate
from quantlab.images.datasets import limited
from quantlab.ptq import choose_weight_qparams
from quantlab.system.errors import UserError
from quantlab.system.timing import latency
from quantlab.workbook import figures, results, tables


def evaluation(correct, seconds=2.0):
    correct = torch.as_tensor(correct)
    top1 = 100 * correct.double().mean().item()
    return Evaluation(top1, len(correct), torch.zeros(len(correct)), correct, seconds, "a machine")


def some_row(digits, seed=0, config=ql.QuantConfig(4, 4), changes=None, **columns):
    """A row of 80 % against 90 % in float on 200 images; columns: of make_row; changes: at last."""
    card = ql.load_card(CHECKOUT / "checkpoint" / "resnet20-digits.safetensors")
    good = torch.arange(200) % 10 > 0
    worse = torch.arange(200) % 10 > 1
    given = {
        "data": digits, "model": "resnet20", "card": card, "method": "by hand", "config": config,
        "baseline": evaluation(good), "result": evaluation(worse), "n_calibration": 64,
        "seed": seed, "bytes": 1000, "notebook": "test", **columns,
    }
    row = {**results.make_row(**given), **(changes or {})}
    return {**row, "config_key": results.config_key(row)}


def test_a_row_has_every_column_of_the_design(digits):
    row = some_row(digits)
    assert list(row) == results.COLUMNS
    assert row["top1"] == 80 and row["fp32_top1"] == 90 and row["drop"] == pytest.approx(10)
    facts = ("observer", "granularity", "symmetric", "placement", "levels")
    assert [row[fact] for fact in facts] == ["histogram", "channel", "weights", "fused", 15]
    other = some_row(digits, config=ql.QuantConfig(4, 5))
    assert row["config_key"] == some_row(digits, seed=3)["config_key"] != other["config_key"]


def test_levels_are_those_that_weights_take(digits):
    """Counted on codes of values that go far beyond what the range was chosen for."""
    weight = torch.linspace(-1, 1, 4001).repeat(2, 1)
    for bits in (2, 3, 4, 8):
        for symmetric in (True, False):
            config = ql.QuantConfig(bits, 8, weight_symmetric=symmetric, weight_observer="minmax")
            codes = ql.quantize_tensor(2 * weight, choose_weight_qparams(weight, bits, config))
            assert some_row(digits, config=config)["levels"] == len(codes.unique())
    assert some_row(digits, config=None, method="float")["levels"] is None
    assert some_row(digits, weight_bits=None, corrections="mixed precision")["levels"] is None
    assert some_row(digits, config=None, method="a rival", weight_bits=8)["levels"] is None


def test_interval_of_the_paired_difference_covers_the_truth():
    """Simulated pairs with a known difference: about 95 % of the intervals contain it, also where
    hardly any image differs.
    """
    generator = torch.Generator().manual_seed(0)
    for lost, gained, n in ((0.03, 0.02, 1000), (0.004, 0.003, 1000), (0.2, 0.1, 300)):
        covered = 0
        for _ in range(400):
            u = torch.rand(n, generator=generator)
            a = u >= gained
            b = ~((u >= gained) & (u < gained + lost))
            _, low, high = ql.paired_drop(a, b)
            covered += low <= 100 * (lost - gained) <= high
        assert 0.92 <= covered / 400 <= 0.995


def test_identical_networks_differ_by_zero_but_not_with_certainty():
    same = torch.ones(10_000, dtype=torch.bool)
    drop, low, high = ql.paired_drop(same, same)
    assert drop == 0 and -0.1 < low < 0 < high < 0.1


# ---- Recording ----------------------------------------------------------------------------------


def test_a_row_takes_the_place_of_the_one_with_its_configuration_and_seed(digits, workbook):
    first = [some_row(digits, changes={"top1": 50.0}), some_row(digits, seed=1)]
    results.record(first)
    results.record([some_row(digits, changes={"top1": 60.0})])
    frame = results.load()
    assert sorted(frame.top1) == [60.0, 80.0] and frame.weight_bits.tolist() == [4, 4]
    assert frame.first_last_bits.isna().all()
    summary = results.summarize(frame)
    assert len(summary) == 1 and summary.seeds[0] == 2 and summary.top1[0] == 70
    assert summary.top1_std[0] == pytest.approx(200**0.5)


def test_a_file_of_rows_reads_back_what_was_recorded(digits, workbook):
    recorded = results.record([some_row(digits), some_row(digits, config=None, method="float")])
    pd.testing.assert_frame_equal(results.load(), recorded)
    assert [results.config_key(row) for row in results.load().to_dict("records")] == list(
        recorded.config_key
    )


RUN = """
from quantlab.workbook import results
with results.rows_of_run("aa", results.root() / "results" / "runs" / "aa.csv"):
    for seed in [*range(6), *range(6)]:
        results.record([{"config_key": "k", "seed": seed, "method": "by hand"}])
"""


def test_two_runs_and_a_writer_at_once_leave_every_row_once(workbook):
    """Twice the same run, and rows by hand all the while, of whose seeds half are theirs."""
    runs = [subprocess.Popen([sys.executable, "-c", RUN], cwd=CHECKOUT) for _ in range(2)]
    while None in [run.poll() for run in runs]:
        for seed in range(3, 9):
            results.record([{"config_key": "k", "seed": seed, "method": "by hand"}])
        time.sleep(0.1)
    assert [run.returncode for run in runs] == [0, 0]
    raw = pd.read_csv(results.local_path())
    assert sorted(raw.seed) == list(range(9))
    assert (raw[raw.seed < 3].run == "aa").all() and raw[raw.seed > 5].run.isna().all()
    assert sorted(pd.read_csv(workbook / "results" / "runs" / "aa.csv").seed) == list(range(6))


def test_rows_of_a_run_that_fails_do_not_count_and_those_it_replaced_stay(digits, workbook):
    results.record([some_row(digits, changes={"top1": 50.0})])
    file = workbook / "results" / "runs" / "run.csv"
    new = [some_row(digits, changes={"top1": 60.0}), some_row(digits, seed=1)]
    with pytest.raises(KeyboardInterrupt), results.rows_of_run("run", file):
        results.record(new)
        assert sorted(results.load().top1) == [60, 80], "a run sees its own rows"
        raise KeyboardInterrupt
    assert results.load().top1.tolist() == [50] and not list(file.parent.iterdir())
    with results.rows_of_run("run", file):
        results.record(new)
    assert sorted(results.load().top1) == [60, 80] and set(results.load().run) == {"run"}
    results.local_path().unlink()
    results.count_again(file)
    assert sorted(results.load().top1) == [60, 80]


def test_a_finished_row_is_not_measured_again(workbook, digits):
    calls = []

    def measure(state):
        calls.append(state)
        assert not state.exists()
        state.write_bytes(b"half of it")
        return some_row(digits)

    first = results.once({"bits": 4}, measure)
    assert not calls[0].exists() and results.load().created.tolist() == [first["created"]]
    again = results.once({"bits": 4}, measure)
    assert again == json.loads(json.dumps(first)) and len(calls) == 1 and len(results.load()) == 1
    results.local_path().unlink()
    results.once({"bits": 4}, measure)
    assert len(calls) == 1 and len(results.load()) == 1, "recorded again where it was moved away"
    results.once({"bits": 3}, measure)
    assert len(calls) == 2 and calls[0] != calls[1]


def test_a_killed_measurement_finds_its_state(workbook, digits):
    def killed(state):
        state.write_bytes(b"half of it")
        raise KeyboardInterrupt

    def resumed(state):
        assert state.read_bytes() == b"half of it"
        return some_row(digits)

    with pytest.raises(KeyboardInterrupt):
        results.once({"bits": 4}, killed)
    assert not len(results.load())
    results.once({"bits": 4}, resumed)
    assert len(results.load()) == 1


def test_a_row_measured_once_counts_though_its_run_was_stopped(workbook, digits):
    file = workbook / "results" / "runs" / "run.csv"
    with pytest.raises(KeyboardInterrupt), results.rows_of_run("run", file):
        results.once({"bits": 4}, lambda state: some_row(digits))
        results.record([some_row(digits, seed=1)])
        raise KeyboardInterrupt
    assert results.load().seed.tolist() == [0]
    with results.rows_of_run("run", file):
        results.once({"bits": 4}, lambda state: pytest.fail("it is known"))
    assert results.load().seed.tolist() == [0] == pd.read_csv(file).seed.tolist()


# ---- Files --------------------------------------------------------------------------------------


def test_a_foreign_results_file_is_refused(workbook):
    (workbook / "results").mkdir()
    results.local_path().write_text("a,b\n1,2\n")
    with pytest.raises(ql.UserError, match="lacks the columns"):
        results.load()


@pytest.mark.parametrize("damage, said", [
    (lambda text: text.replace("\n", "\n<<<<<<< HEAD\n", 1).encode(), "git's conflict markers"),
    (lambda text: text.replace("\n", "\n>>>>>>> 1a2b\n", 1).encode(), "git's conflict markers"),
    (lambda text: text.encode("utf-16"), "cannot be read as UTF-8 text"),
    (lambda text: text.replace("digits", "\xc4", 1).encode("latin-1"), "as UTF-8 text"),
    (lambda text: (text + "1,2,3" + "," * 99 + "\n").encode(), "of results (line 3 has"),
    (lambda text: b"\n", "lacks the columns"),
    (lambda text: text.replace(",80.0,", ",half,").encode(), "is no table of results (top1"),
], ids=["ours", "theirs", "UTF-16", "Latin-1", "ragged", "empty", "word"])
def test_a_damaged_results_file_is_refused_by_name(digits, workbook, damage, said):
    results.record([some_row(digits)])
    file = results.published_path()
    file.write_bytes(damage(read_text(results.local_path())))
    before = file.read_bytes()
    for use in (results.load, lambda path: tables.publish()):
        with pytest.raises(UserError) as caught:
            use(file)
        assert str(file) in str(caught.value) and said in str(caught.value)
        assert "\n" not in str(caught.value)
    assert file.read_bytes() == before


@pytest.mark.parametrize("name", ["birds", "2024", "NA", "null", "1e5", "a,b", '"', "ä"])
def test_a_data_set_keeps_its_name_whatever_it_looks_like(digits, workbook, name):
    data = dataclasses.replace(digits, name=name)
    recorded = results.record([some_row(data), some_row(data, config=None, method="float")])
    frame = results.load()
    pd.testing.assert_frame_equal(frame, recorded)
    assert frame.dataset.tolist() == [name] * 2 and len(results.current(frame)) == 2


def test_names_are_no_html_and_no_cells():
    names = ["<script>alert(1)</script>", "a | b"]
    table = pd.DataFrame({"Data set": names, "Top-1 %": ["1", "2"]})
    lines = tables.markdown(table).splitlines()
    assert lines[2] == "| &lt;script&gt;alert(1)&lt;/script&gt; | 1 |"
    assert lines[3].count("|") == 3 and "a &#124; b" in lines[3]


def damaged_files():
    def on_line(n, change):
        def damage(text):
            lines = text.splitlines(keepends=True)
            lines[n] = change(lines[n])
            return "".join(lines).encode()
        return damage

    return {
        "a short row": on_line(2, lambda line: line[: len(line) // 2] + "\n"),
        "a long row": on_line(1, lambda line: "1," + line),
        "text for a number": on_line(1, lambda line: line.replace(",80.0,", ",many,")),
        "above 100 %": on_line(1, lambda line: line.replace(",80.0,", ",180.0,")),
        "infinite": on_line(1, lambda line: line.replace(",80.0,", ",inf,")),
        "half a seed": on_line(1, lambda line: line.replace(",0,a machine", ",0.5,a machine")),
        "no seed": on_line(1, lambda line: line.replace(",0,a machine", ",,a machine")),
        "an open quote": on_line(1, lambda line: '"' + line),
        "a conflict": on_line(1, lambda line: "<<<<<<< HEAD\n" + line),
        "a terminal's codes": on_line(1, lambda line: line.replace("by hand", "\x1b[2J")),
        "zeros": lambda text: bytes(5000), "garbage": lambda text: bytes(range(256)) * 10,
        "another encoding": lambda text: text.encode("utf-16"),
        "two columns of one name": on_line(0, lambda line: line.replace("top1", "drop", 1)),
    }


@pytest.mark.parametrize("kind", damaged_files())
def test_a_damaged_results_file_is_refused_in_a_line_by_name(digits, workbook, kind):
    results.record([some_row(digits), some_row(digits, seed=1)])
    path = results.local_path()
    text = read_text(path)
    path.write_bytes(damaged_files()[kind](text))
    assert path.read_bytes() != text.encode(), "the damage is done"
    with pytest.raises(ql.UserError, match="results.csv (is no table|lacks|holds|cannot)") as error:
        results.load()
    assert str(error.value).isprintable()


@given(data=st.data())
@fuzz(60)
def test_a_changed_results_file_reads_as_it_is_written_or_is_refused(committed_row, data):
    path, text = committed_row
    cells = [line.split(";") for line in text.splitlines()]
    row, column = data.draw(st.integers(0, 2)), data.draw(st.integers(0, len(cells[0]) - 1))
    cells[row][column] = str(data.draw(NONSENSE))
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(cells)
    try:
        frame = results.load(path)
    except ql.UserError as error:
        assert str(error).isprintable()
        return
    results.write(frame, path)
    pd.testing.assert_frame_equal(results.load(path), frame)
    value = frame[cells[0][column]].iloc[row - 1]
    written = cells[row][column]
    assert pd.isna(value) or value == written or float(value) == float(written or "nan")


@pytest.fixture(scope="module")
def committed_row(digits, tmp_path_factory):
    """(path of a results file, its text with cells apart by semicolons)."""
    path = tmp_path_factory.mktemp("results") / "results.csv"
    rows = [some_row(digits, changes={"created": "now"}, seed=seed) for seed in (0, 1)]
    pd.DataFrame(rows).to_csv(path, index=False, sep=";")
    return path, read_text(path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"seed": 0}', "\x00", '{"top1": "many"}'])
def test_a_torn_row_is_named(digits, workbook, text):
    results.once({"bits": 4}, lambda state: some_row(digits))
    (file,) = (workbook / "results" / "rows").glob("*.json")
    file.write_text(text)
    with pytest.raises(ql.UserError, match=f"{file.name} is no row of results .*; delete it"):
        results.once({"bits": 4}, lambda state: pytest.fail("it is there"))


def test_a_file_from_before_keys_of_content_is_brought_up_to_date(digits, workbook):
    """Written with the columns of that time: the same rows as those made today, with their keys."""
    rows = [some_row(digits, config=ql.QuantConfig(b, 4, weight_symmetric=s)) for b, s in
            ((4, True), (4, False), (8, True))]
    rows += [some_row(digits, config=None, method="float"), some_row(digits, weight_bits=None)]
    old = pd.DataFrame(rows).drop(columns=["config_key", "run", "levels"])
    old.insert(0, "run_key", "0123456789ab")
    results.local_path().parent.mkdir()
    old.to_csv(results.local_path(), index=False)
    frame = results.load()
    assert frame.config_key.tolist() == [row["config_key"] for row in rows]
    assert frame.levels.tolist()[:3] == [15, 16, 255] and frame.levels[3:].isna().all()
    results.record(rows)
    assert len(pd.read_csv(results.local_path())) == len(rows), "replaced, not doubled"


# ---- Choosing rows ------------------------------------------------------------------------------


def test_smoke_presets_and_stale_checkpoints_do_not_mix_with_the_rest(digits, workbook):
    shas = {"old": "2020-01-01", "new": "2021-01-01"}
    pets = {"dataset": "pets"}
    rows = [some_row(digits, changes=pets | {"checkpoint_sha": sha, "created": created})
            for sha, created in shas.items()]
    rows.append(some_row(digits, changes=pets | {"created": "2019-01-01", "n_test": 50}))
    results.record(rows)
    assert results.current(results.load()).checkpoint_sha.tolist() == ["new"]
    (workbook / "README.md").write_text("<!-- table:headline -->\n<!-- /table -->\n")
    assert tables.publish() == 2, "the row on 50 of 200 images stays here"


def test_corrected_rows_have_a_label_of_their_own(digits):
    papers = ql.QuantConfig(4, 4, residual_bits=None, input_bits=4, first_last_bits=8)
    rows = [
        some_row(digits), some_row(digits, config=papers, corrections="QDrop"),
        some_row(digits, weight_bits=None, corrections="mixed precision, 80 kB"),
        some_row(digits, config=ql.QuantConfig(4, 4, weight_symmetric=False)),
    ]
    assert [results.label(pd.Series(row)) for row in rows] == [
        "W4A4 histogram, weights lp(p=3)",
        "W4A4 histogram, weights lp(p=3), first/last 8, residual float, input 4, QDrop",
        "W*A4 histogram, weights lp(p=3), mixed precision, 80 kB",
        "W4A4 histogram, weights lp(p=3), 2^b levels",
    ]
    swept = [some_row(digits, config=ql.QuantConfig(b, b)) for b in (4, 3)]
    swept.append(some_row(digits, config=ql.QuantConfig(2, 2), corrections="QDrop"))
    swept.append(some_row(digits, config=ql.QuantConfig(2, 2, residual_bits=None)))
    swept += [some_row(digits, config=ql.QuantConfig(b, b, weight_symmetric=False)) for b in (4, 3)]
    assert results.equal_widths(pd.DataFrame(swept)).index.tolist() == [0, 1]


@pytest.mark.filterwarnings("error")
def test_rows_without_a_single_text_in_a_column_raise_no_warning(digits, workbook):
    """A column that is empty throughout is read as numbers; nothing may be filled into it then."""
    results.record([some_row(digits, config=None, method="float")])
    frame = results.load()
    assert frame.corrections.tolist() == [""] and not results.is_default(frame).any()
    assert len(tables.headline(frame)) == 1 and not len(results.equal_widths(frame))
    assert not len(tables.original_table(frame))


# ---- Tables -------------------------------------------------------------------------------------


def test_digits_never_enter_a_headline_and_are_never_published(digits, workbook):
    results.record([some_row(digits)])
    with pytest.raises(ql.UserError, match="nothing to publish"):
        tables.publish()
    assert tables.headline(results.load())["Data set"].tolist() == ["digits (smoke run)"]
    readme = workbook / "README.md"
    readme.write_text("before\n<!-- table:headline -->\nold\n<!-- /table -->\nafter\n"
                      "on <!-- table:devices --><!-- /table -->.\n")
    pets = {"dataset": "pets"}
    learned = {"corrections": "QDrop + fine-tuning, 5 iterations"}
    results.record([some_row(digits, seed, changes=pets, **learned) for seed in (0, 1)])
    assert tables.publish() == 2
    text = read_text(readme)
    assert text.startswith("before\n") and "\nafter\non <!-- table:devices -->a machine<!" in text
    assert "| pets | resnet20 | W4A4 histogram, weights lp(p=3), QDrop + fine-tuning, 5" in text
    assert "| 80.00 ± 0.00 |" in text and "digits" not in text and "old" not in text
    before = read_text(results.published_path())
    assert tables.publish() == 2 and read_text(results.published_path()) == before
    results.local_path().unlink()
    assert tables.publish() == 0 and read_text(results.published_path()) == before
    assert read_text(readme) == text


def test_the_readme_shows_what_is_published():
    """The committed tables are those that the committed rows give."""
    published = results.load(CHECKOUT / "results" / "published.csv")
    assert len(published) and results.SMOKE not in set(published.dataset)
    assert not published.duplicated(["config_key", "seed"]).any()
    readme = read_text(CHECKOUT / "README.md")
    for name, content in tables.readme_tables().items():
        assert f"<!-- table:{name} -->{content}<!-- /table -->" in readme, name
    assert set(tables.readme_tables()) == {
        "headline", "original-resnet50", "original-resnet20", "answers", "speed", "processor",
        "devices"}
    assert pd.to_datetime(published.created).notna().all() and (published.n_test == 10_000).all()


def rows_of_two_networks(digits):
    """What notebooks 02 to 08 record for the tables, of both networks, accuracies made up."""
    plain, rows = ql.QuantConfig, []
    for model, off in (("resnet20", 0.0), ("resnet50", 10.0)):
        def add(top1, drop, seed=0, model=model, off=off, **columns):
            changes = {"model": model, "top1": off + top1, "drop": drop, "fp32_top1": off + 80}
            rows.append(some_row(digits, seed, changes={**changes, "dataset": "pets"}, **columns))

        add(80, 0, config=None, method="float")
        add(79, 1, config=None, method="eager int8", weight_bits=8, act_bits=7)
        add(79.5, 0.5, config=None, method="PT2E int8", weight_bits=8, act_bits=8)
        for rounding in ("single", "double"):
            add(79, 1, config=plain(8, 8), method=f"integer only W8A8, {rounding} rounding")
        for bits, lost in ((8, 1), (4, 10), (3, 20), (2, 60)):
            add(80 - lost, lost, config=plain(bits, bits))
            for more in ("", " + end to end", " + fine-tuning"):
                add(79, 1, config=plain(bits, bits), corrections=f"QDrop{more}, 5 iterations")
        add(30, 50, config=plain(4, 4), method="original", corrections="4bit hist")
        add(34, 46, 1, config=plain(4, 4), method="original", corrections="4bit hist")
        add(78, 2, config=None, method="original", corrections="8bit built-in on 128 test images")
    return results.record(rows)


def test_a_headline_has_six_rows_a_network_the_largest_first(digits, workbook):
    frame = rows_of_two_networks(digits)
    table = tables.headline(frame, brief=True)
    assert table.Model.tolist() == ["resnet50"] * 6 + ["resnet20"] * 6
    kinds = [text.replace(" histogram, weights lp(p=3)", "") for text in table.Quantization[:6]]
    assert kinds == [
        "float", "PT2E int8", "integer only W8A8, single rounding",
        *(f"W{b}A{b}, QDrop + fine-tuning, 5 iterations" for b in (4, 3, 2)),
    ]
    everything = tables.headline(frame)
    assert len(everything) == 2 * (1 + 2 + 2 + 16 + 2) and set(table.Quantization) <= set(
        everything.Quantization
    )


def test_rows_of_all_levels_stand_in_the_headline_for_narrow_ones(digits, workbook):
    """Of the network and width that has them; the others keep theirs."""
    every = ql.QuantConfig(4, 4, weight_symmetric=False)
    changes = {"model": "resnet20", "dataset": "pets", "top1": 79.9, "fp32_top1": 80, "drop": 0.1}
    row = some_row(digits, changes=changes, config=every,
                   corrections="QDrop, 5 iterations")
    frame = pd.concat([rows_of_two_networks(digits), results.record([row])])
    table = tables.headline(frame, brief=True)
    assert table.Model.tolist() == ["resnet50"] * 6 + ["resnet20"] * 6
    learned = table.Quantization[table.Quantization.str.contains("QDrop")].tolist()
    name, tuned = "histogram, weights lp(p=3)", "QDrop + fine-tuning, 5 iterations"
    narrow = [f"W{bits}A{bits} {name}, {tuned}" for bits in (4, 3, 2)]
    assert learned == [*narrow, f"W4A4 {name}, 2^b levels, QDrop, 5 iterations", *narrow[1:]]


def test_the_originals_table_has_every_network_beside_it_its_own_first(digits, workbook):
    table = tables.original_table(rows_of_two_networks(digits)).set_index("Quantization")
    ways = ("its way", "right way")
    names = [f"{model} on pets, {way}" for model in ("resnet50", "resnet20") for way in ways]
    assert table.columns.tolist() == ["Original", *names]
    assert table.loc["fp32"].tolist() == ["93.62", "90.00", "90.00", "80.00", "80.00"]
    its, right = (table[f"resnet50 on pets, {way}"] for way in ways)
    row = some_row(digits)
    interval = f"[{-row['drop_high']:+.2f}, {-row['drop_low']:+.2f}]"
    assert its["4 bits, hist"] == f"42.00 (-48.00 {interval})", "the mean of two seeds"
    assert right["4 bits, hist"].startswith("80.00 (-10.00 [")
    assert its["8 bits, built-in"].startswith("88.00 (-2.00 [")
    assert right["8 bits, built-in"].startswith("89.00 (-1.00 [")
    assert table.Original["8 bits, built-in"] == "93.62 (+0.00)"
    only = tables.original_table(results.load(), "resnet20")
    assert only.columns.tolist() == ["Quantization", "Original", *names[2:]]
    assert its["3 bits, fake-hist"] == "" and right["3 bits, fake-hist"].startswith("70.00 (-20")
    assert "| ---: | ---: |" in tables.markdown(table.reset_index())


def test_networks_are_compared_where_two_have_been_measured(workbook, digits):
    frame = results.current(rows_of_two_networks(digits))
    table = figures.networks_by_width(frame, "pets")
    assert table.width.tolist() == ["W8A8", "W4A4", "W3A3"] * 2
    assert table.model.tolist() == ["resnet50"] * 3 + ["resnet20"] * 3
    assert table["drop"].tolist() == [1, 10, 20] * 2 and (table.drop_low < table.drop_high).all()
    assert list(figures.small_against_large(frame)) == ["pets"]
    assert not figures.small_against_large(frame[frame.model == "resnet20"])


# ---- Evaluating ---------------------------------------------------------------------------------


def test_evaluate_counts_and_complains(digits, resnet20):
    result = evaluate(resnet20, digits.test, limit=50)
    sample = limited(digits.test, 50)
    predictions = resnet20(next(sample.batches(50))[0]).argmax(1)
    assert result.n == 50 and torch.equal(result.predictions, predictions)
    assert torch.equal(result.correct, predictions == sample.labels)
    with pytest.raises(ql.UserError, match="the network has 3 .* but the data has 10 classes"):
        evaluate(lambda x: torch.zeros(len(x), 3), digits.test)
    with pytest.raises(ql.UserError, match="NaN or infinite"):
        evaluate(lambda x: torch.full((len(x), 10), math.nan), digits.test)


def test_latency_measures_every_network_on_the_same_images():
    calls = []
    networks = {name: lambda x, name=name: calls.append((name, len(x))) for name in "ab"}
    times = latency(networks, torch.zeros(4, 3, 2, 2), repeats=3)
    assert calls == [("a", 4), ("b", 4)] * 5 and set(times) == {"a", "b"}


def test_evaluating_leaves_a_network_trainable(digits):
    model = ql.load_model("resnet20").double().float()
    evaluate(model, digits.test, limit=8)
    model.train()(torch.randn(2, 3, 32, 32)).sum().backward()
    with pytest.raises(ql.UserError, match="no images"):
        evaluate(model, digits.test.subset(torch.arange(0)))


# ---- For reports ---------------------------------------------------------------------------------


def test_a_table_as_latex_is_text_with_booktabs_rules():
    frame = pd.DataFrame({"Method_1": ["a & b", "50 %"], "Lost": ["-0.10 [-0.2, +0.1]", "3 ± 1"]})
    assert tables.latex(frame) == (
        "\\begin{tabular}{lr}\n\\toprule\nMethod\\_1 & Lost \\\\\n\\midrule\n"
        "a \\& b & $-$0.10 [$-$0.2, +0.1] \\\\\n50 \\% & 3 $\\pm$ 1 \\\\\n"
        "\\bottomrule\n\\end{tabular}\n")


def test_tables_are_written_from_published_rows_and_one_without_rows_is_refused(workbook):
    with pytest.raises(UserError, match="table speed has no rows; measure them with make results"):
        tables.save_tables(["speed"])
    with pytest.raises(UserError, match="table headline has no rows"):
        tables.save_tables()
    results.published_path().parent.mkdir(exist_ok=True)
    shutil.copy(CHECKOUT / "results" / "published.csv", results.published_path())
    shutil.copy(CHECKOUT / "results" / "bench.csv", results.published_path().parent)
    paths = tables.save_tables(["original", *TABLES])
    assert [path.name for path in paths[:4]] == [
        "original.tex", "original.csv", "headline.tex", "headline.csv"]
    assert len(paths) == 2 * len(TABLES) and all(path.stat().st_size for path in paths)
    frame = pd.read_csv(paths[1], dtype=str, keep_default_na=False)
    shown = tables.original_table(results.load(results.published_path()))
    assert frame.values.tolist() == shown.values.tolist() and len(frame) == 7
    made = {path.stem: pd.read_csv(path) for path in paths[1::2]}
    networks = {name: set(made[name].Network)
                for name in ("methods", "goals", "tools", "conventions")}
    assert networks.pop("goals") == {"resnet20", "resnet50"}
    assert all(named == {"resnet20"} for named in networks.values())
