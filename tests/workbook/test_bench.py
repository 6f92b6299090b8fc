"""Speed as ratios: measured in turns, round by round."""

import re
import types

import pytest
import torch
from torch import nn

import quantlab as ql
from quantlab.__main__ import main
from quantlab.system import timing
from quantlab.workbook import bench


def test_ratios_are_taken_round_by_round(monkeypatch):
    now = [0.0]
    durations = {"a": iter([9, 1, 2, 1]), "b": iter([9, 3, 4, 4])}  # the first is the warm-up

    def network(name):
        return lambda images: now.__setitem__(0, now[0] + next(durations[name]))

    monkeypatch.setattr(timing, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    networks = {name: network(name) for name in durations}
    frame = bench.compare("toy", "a", networks, [0] * 6, rounds=3).set_index("what")
    assert frame.images_per_s.tolist() == [6.0, 1.5]
    ratios = frame.loc["b", ["time_ratio", "time_ratio_least", "time_ratio_most"]]
    assert tuple(ratios) == (3.0, 2.0, 4.0)
    assert "3.00x [2.00, 4.00]" in bench.table(frame.reset_index())


def test_integers_are_measured_on_three_networks_one_image_and_many(workbook, monkeypatch):
    measured = []

    def section(model, images, rounds, compiled):
        measured.append((type(model).__name__, len(images)))
        return bench.compare("integer", "a", {"a": lambda x: x}, images, rounds)

    monkeypatch.setitem(bench.SECTIONS, "integer", section)
    monkeypatch.setitem(bench.SECTIONS, "int8", section)
    frame = bench.bench(["integer", "int8"], rounds=1)
    networks = ("ResNet", "ResNet20", "MobileNetV2")
    assert measured == [(name, n) for name in networks for n in (1, 64)] + [("ResNet", 64)]
    assert len(frame) == 7 and set(frame.model) == set(bench.MODELS)
    measured.clear()
    bench.bench(["integer"], model="resnet20", batch=3, rounds=1)
    assert measured == [("ResNet20", 3)]


def test_its_quick_sections_run_and_others_are_refused(workbook, capsys):
    frame = bench.bench(["fakequant"], model="resnet20", batch=2, rounds=1, compiled=False)
    assert {"float", "fake-quant"} <= set(frame.what)
    assert (workbook / "results" / "bench.csv").exists()
    assert "time against float" in capsys.readouterr().out
    assert main(["bench", "speed"]) == 1
    said = capsys.readouterr().err
    assert "bench section 'speed' is unknown" in said and ", fakequant, int8, integer" in said


@pytest.mark.long
def test_all_its_sections_run(workbook, capsys):
    sections = ["collect", "fakequant", "integer", "reconstruct", "tune"]
    frame = bench.bench(sections, model="resnet20", batch=2, rounds=1, compiled=False)
    assert set(frame.section) == set(sections)
    assert {"float", "collect", "fake-quant", "learning units", "learning the network",
            *(f"integer only W{w}A{a}" for w, a in bench.WIDTHS)} <= set(frame.what)
    said = capsys.readouterr().out
    assert (workbook / "results" / "bench.csv").exists() and "time against float" in said
    assert "where the time goes: " in said


def test_where_the_time_goes_is_all_of_it_and_the_peak_is_of_layers_alone():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
                          nn.Linear(8 * 9, 5)).eval()
    images = torch.randn(4, 3, 8, 8)
    imodel = ql.to_integer(ql.quantize(model, ql.collect(model, [images]), ql.QuantConfig()))
    parts = bench.operation_times(imodel, images, rounds=1)
    products = parts.set_index("layer").products
    assert products.max() == 4 * 8 * 36 * 27
    assert products.sum() == 4 * (8 * 36 * 27 + 8 * 9 * 5)
    assert parts.peak.notna().sum() in (0, 2) and not (parts.peak <= 0).any()
    kinds, *_ = bench.said_of_times(parts).split("\n")
    assert all(f"{kind} " in kinds for kind in ("conv", "linear", "images to codes"))
    shares = [int(text) for text in re.findall(r"(\d+)%", kinds)]
    assert 95 <= sum(shares) <= 105
