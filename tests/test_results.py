"""Rows, intervals and tables."""

import math
import multiprocessing

import pandas as pd
import pytest
import torch
from conftest import CHECKOUT, read_text

import quantlab as ql
from quantlab.evaluate import Evaluation, evaluate, latency, limited
from quantlab.workbook import results, tables


def evaluation(correct, seconds=2.0):
    correct = torch.as_tensor(correct)
    return Evaluation(100 * correct.double().mean().item(), len(correct), torch.zeros(len(correct)), correct, seconds, "a machine")


def some_row(digits, seed=0, created=None, dataset=None, **more):
    card = ql.load_card(CHECKOUT / "checkpoint" / "resnet20-digits.safetensors")
    good = torch.arange(200) % 10 > 0
    worse = torch.arange(200) % 10 > 1
    row = results.make_row(data=digits, model="resnet20", card=card, baseline=evaluation(good), result=evaluation(worse), method="by hand",
                           config=more.pop("config", ql.QuantConfig(4, 4)), n_calibration=64, seed=seed, bytes=1000, notebook="test")
    if dataset:
        row["dataset"] = dataset
        row["run_key"] = results.run_key(row)
    return {**row, **({"created": created} if created else {}), **more}


def test_a_row_has_every_column_of_the_design(digits):
    row = some_row(digits)
    assert list(row) == results.COLUMNS
    assert row["top1"] == 80 and row["fp32_top1"] == 90 and row["drop"] == pytest.approx(10)
    assert (row["observer"], row["granularity"], row["symmetric"], row["placement"]) == ("histogram", "channel", "weights", "fused")
    assert row["run_key"] == some_row(digits, seed=3)["run_key"] != some_row(digits, config=ql.QuantConfig(4, 5))["run_key"]


def test_interval_of_the_paired_difference_covers_the_truth():
    """Simulated pairs with a known difference: about 95 % of the intervals contain it, also where hardly any image differs."""
    generator = torch.Generator().manual_seed(0)
    for lost, gained, n in ((0.03, 0.02, 1000), (0.004, 0.003, 1000), (0.2, 0.1, 300)):
        covered = 0
        for _ in range(400):
            u = torch.rand(n, generator=generator)
            a = u >= gained
            b = (u < 1 - lost) if gained == 0 else ~((u >= gained) & (u < gained + lost))
            _, low, high = ql.paired_drop(a, b)
            covered += low <= 100 * (lost - gained) <= high
        assert 0.92 <= covered / 400 <= 0.995


def test_identical_networks_differ_by_zero_but_not_with_certainty():
    same = torch.ones(10_000, dtype=torch.bool)
    drop, low, high = ql.paired_drop(same, same)
    assert drop == 0 and -0.1 < low < 0 < high < 0.1


def test_record_appends_and_newest_wins_per_key_and_seed(digits, workbook):
    results.record([some_row(digits, created="2020-01-01", top1=50.0), some_row(digits, seed=1, created="2020-01-01")])
    results.record([some_row(digits, created="2021-01-01", top1=60.0)])
    frame = results.load()
    assert len(frame) == 3 and frame.weight_bits.tolist() == [4, 4, 4] and frame.first_last_bits.isna().all()
    kept = results.newest(frame)
    assert sorted(kept.top1) == [60.0, 80.0]
    summary = results.summarize(frame)
    assert len(summary) == 1 and summary.seeds[0] == 2 and summary.top1[0] == 70 and summary.top1_std[0] == pytest.approx(200**0.5)


def _write_rows(path, row):
    for _ in range(5):
        results.record([row], path)


def test_several_writers_lose_nothing(digits, tmp_path):
    row, path = some_row(digits), tmp_path / "results.csv"
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write_rows, args=(path, row)) for _ in range(3)]
    [w.start() for w in writers]
    [w.join() for w in writers]
    assert len(results.load(path)) == 15


def test_a_foreign_results_file_is_refused(workbook):
    (workbook / "results").mkdir()
    results.local_path().write_text("a,b\n1,2\n")
    with pytest.raises(ql.UserError, match="lacks the columns"):
        results.load()


def test_digits_never_enter_a_headline_and_are_never_published(digits, workbook):
    results.record([some_row(digits)])
    with pytest.raises(ql.UserError, match="nothing to publish"):
        tables.publish()
    assert tables.headline(results.load())["Data set"].tolist() == ["digits (smoke run)"]
    (workbook / "README.md").write_text("before\n<!-- table:headline -->\nold\n<!-- /table -->\nafter\n")
    results.record([some_row(digits, dataset="pets"), some_row(digits, dataset="pets", seed=1)])
    assert tables.publish() == 2
    readme = read_text(workbook / "README.md")
    assert readme.startswith("before\n") and readme.endswith("after\n") and "old" not in readme
    assert "| pets | resnet20 | W4A4 histogram, weights lp(p=3) | 80.00 ± 0.00 |" in readme and "digits" not in readme
    assert tables.publish() == 2 and len(results.load(results.published_path())) == 2, "publishing again changes nothing"


def test_the_readme_shows_what_is_published():
    """The committed tables are those that the committed rows give."""
    published = results.load(CHECKOUT / "results" / "published.csv")
    assert len(published) and results.SMOKE not in set(published.dataset)
    readme = read_text(CHECKOUT / "README.md")
    assert tables.markdown(tables.headline(published, best=tables.BEST)) in readme
    if len(original := tables.original_table(published)):
        assert tables.markdown(original) in readme
    assert tables.markdown(tables.speed_table(pd.read_csv(CHECKOUT / "results" / "bench.csv"))) in readme
    assert pd.to_datetime(published.created).notna().all() and (published.n_test == 10_000).all()


def test_evaluate_counts_and_complains(digits, resnet20):
    result = evaluate(resnet20, digits.test, limit=50)
    sample = limited(digits.test, 50)
    logits = resnet20(next(sample.batches(50))[0])
    assert result.n == 50 and torch.equal(result.predictions, logits.argmax(1)) and torch.equal(result.correct, logits.argmax(1) == sample.labels)
    with pytest.raises(ql.UserError, match="3 ways but the data has 10 classes"):
        evaluate(lambda x: torch.zeros(len(x), 3), digits.test)
    with pytest.raises(ql.UserError, match="NaN or infinite"):
        evaluate(lambda x: torch.full((len(x), 10), math.nan), digits.test)


def test_latency_measures_every_network_on_the_same_images():
    calls = []
    times = latency({"a": lambda x: calls.append(("a", len(x))), "b": lambda x: calls.append(("b", len(x)))}, torch.zeros(4, 3, 2, 2), repeats=3)
    assert calls == [("a", 4), ("b", 4)] * 5 and set(times) == {"a", "b"}


def test_smoke_presets_and_stale_checkpoints_do_not_mix_with_the_rest(digits, workbook):
    old, new = (some_row(digits, dataset="pets", created=f"202{i}-01-01", checkpoint_sha=sha) for i, sha in ((0, "old"), (1, "new")))
    small = some_row(digits, dataset="pets", created="2019-01-01", n_test=50)
    for row in (old, new, small):
        row["run_key"] = results.run_key(row)
    results.record([old, new, small])
    assert results.current(results.load()).checkpoint_sha.tolist() == ["new"]
    (workbook / "README.md").write_text("<!-- table:headline -->\n<!-- /table -->\n")
    assert tables.publish() == 2, "the row on 50 of 200 images stays here"


def test_evaluating_leaves_a_network_trainable(digits):
    model = ql.load_model("resnet20").double().float()
    evaluate(model, digits.test, limit=8)
    model.train()(torch.randn(2, 3, 32, 32)).sum().backward()
    with pytest.raises(ql.UserError, match="no images"):
        evaluate(model, digits.test.subset(torch.arange(0)))
