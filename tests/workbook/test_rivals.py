"""Rows of other tools: what they say, what is skipped, and that nothing is measured twice."""

import pandas as pd
import pytest
import torch

import quantlab as ql
from quantlab.workbook import results, rivals
from quantlab.workbook.methods import Methods
from quantlab.workbook.study import Study


@pytest.fixture
def builder(workbook, digits):
    study = Study(digits, "resnet20", n_calibration=32, limit=50, seed=1, notebook="rivals")
    return Methods(study)


@pytest.fixture
def asked(monkeypatch):
    """Settings of every call of Brevitas, which answers class 3 and has no 2 bits."""
    calls = []

    def predict(network, model, num_outputs, calibration, test, settings):
        if settings["weight_bits"] == 2:
            raise ql.UserError("Brevitas refused: ValueError: 2 bits")
        images = torch.cat(list(calibration)), torch.cat(list(test))
        calls.append({**settings, "images": [len(part) for part in images]})
        return torch.full((len(images[1]),), 3), {"seconds": "2.0", "brevitas": "0.13.4"}

    monkeypatch.setattr(rivals.brevitas, "brevitas_predictions", predict)
    monkeypatch.setattr(rivals.brevitas, "interpreter", lambda: None)
    return calls


def test_a_row_of_brevitas_names_its_convention(builder, asked):
    row = rivals.tool_row(builder, "Brevitas learned round", "4/3")
    assert asked == [dict(
        method="learned round", weight_bits=4, act_bits=3, first_last_bits=8, seed=1,
        iterations=3, images=[32, 50])]
    own = dict(
        method="Brevitas learned round", weight_bits=4, act_bits=3, levels=16, first_last_bits=8,
        residual_bits=None, input_bits=8, placement="inputs", granularity="channel",
        symmetric="weights", observer="mse", weight_observer="minmax",
        n_calibration=32, n_test=50, seed=1, seconds=2.0, corrections="W4A3, first/last 8, "
        "3 iterations, bias correction, 0.13.4")
    assert {name: row[name] for name in own} == own
    threes = (builder.study.test.labels == 3).double().mean().item()
    assert row["top1"] == pytest.approx(100 * threes)
    assert len(results.load()) == 1
    weights, outer, channels = 270_896, 3 * 16 * 9 + 64 * 10, 794
    assert row["bytes"] == (weights - outer) // 2 + outer + 8 * channels


def test_rows_are_measured_once_and_every_width_counts(builder, asked):
    for width in ("4/4", "3/3", "4/4/4", "4/4"):
        rivals.tool_row(builder, "Brevitas GPTQ", width)
    assert [(call["weight_bits"], call["first_last_bits"]) for call in asked] == [
        (4, 8), (3, 8), (4, 4)]
    assert len(results.current(results.load())) == 3
    losses = rivals.brevitas_losses(builder.rows())
    assert list(losses.index) == ["3/3", "4/4"] and list(losses) == ["Brevitas GPTQ"]


def test_no_rows_of_brevitas_are_no_columns():
    frame = pd.DataFrame({"width": ["4/4"]})
    empty = rivals.brevitas_losses(results.typed(pd.DataFrame(columns=results.COLUMNS)))
    assert frame.join(empty, on="width").columns.tolist() == ["width"]


def test_what_a_tool_cannot_do_is_said_in_one_line(builder, asked):
    said = []
    frame = rivals.compared(builder.study, ["2/2"], say=said.append)
    assert said == [
        "PT2E int8 has no W2A2: its kernels are for 8 bits",
        "ONNX Runtime int8 has no W2A2: its kernels are for 8 bits",
        "Brevitas GPTQ has no W2A2: Brevitas refused: ValueError: 2 bits",
        "Brevitas learned round has no W2A2: Brevitas refused: ValueError: 2 bits"]
    (ours,) = frame.to_dict("records")
    assert ours["method"] == "by hand" and ours["first_last_bits"] == 8 and ours["levels"] == 4
    assert pd.isna(ours["residual_bits"]) and ours["input_bits"] == 8
