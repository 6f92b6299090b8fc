"""Brevitas as a rival: what goes to its environment, what comes back, and what it makes there."""

import json
import subprocess

import pytest
import safetensors
import safetensors.torch
import torch
from conftest import CHECKOUT

import quantlab as ql
from quantlab.__main__ import main
from quantlab.rivals import brevitas, brevitas_worker

SETTINGS = dict(
    method="GPTQ", weight_bits=4, act_bits=4, first_last_bits=8, seed=0, iterations=0)
PYTHON = CHECKOUT / ".venv-rivals" / "bin" / "python"


@pytest.fixture
def environment(workbook):
    """A .venv-rivals whose interpreter is to be written by the test."""
    python = workbook / ".venv-rivals" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch(mode=0o755)
    return python


def predictions(network, **changed):
    images = torch.randn(5, 3, 32, 32)
    return images, *brevitas.brevitas_predictions(
        network, "resnet20", 10, [images[:2], images[2:3]], [images[:4], images[4:]],
        {**SETTINGS, **changed})


# ---- There and back ------------------------------------------------------------------------------


def test_network_and_images_arrive_and_predictions_come_back(resnet20, environment, monkeypatch):
    seen = {}

    def quantized(network, batches, settings):
        seen["settings"], seen["calibration"] = settings, torch.cat([x for x, _ in batches])
        return network

    def work(python, request, response):
        assert python == environment and brevitas_worker.main(request, response) == 0

    monkeypatch.setattr(brevitas_worker, "quantized", quantized)
    monkeypatch.setattr(brevitas_worker.importlib.metadata, "version", lambda name: f"{name} 1.0")
    monkeypatch.setattr(brevitas, "_work", work)
    images, found, about = predictions(resnet20)
    assert torch.equal(found, resnet20(images).argmax(1))
    assert torch.equal(seen["calibration"], images[:3])
    assert seen["settings"] == {**SETTINGS, "model": "resnet20", "num_outputs": 10}
    assert float(about["seconds"]) > 0 and about["brevitas"] == "brevitas 1.0"


def test_the_worker_says_a_refusal_in_one_line(resnet20, tmp_path, monkeypatch, capsys):
    def quantized(network, batches, settings):
        raise RuntimeError("1 bit is too few\nfor this")

    request = tmp_path / "request.safetensors"
    tensors = {f"network.{name}": value for name, value in resnet20.state_dict().items()}
    tensors |= {"calibration": torch.zeros(1, 3, 32, 32), "test": torch.zeros(1, 3, 32, 32)}
    settings = json.dumps({**SETTINGS, "model": "resnet20", "num_outputs": 10})
    safetensors.torch.save_file(tensors, request, {"settings": settings})
    monkeypatch.setattr(brevitas_worker, "quantized", quantized)
    assert brevitas_worker.main(request, tmp_path / "response.safetensors") == 1
    assert capsys.readouterr().err == "RuntimeError: 1 bit is too few\n"


def test_what_its_interpreter_refuses_is_told(resnet20, environment):
    environment.write_text("#!/bin/sh\necho note >&2; echo 'ValueError: 1 bit' >&2; exit 1\n")
    with pytest.raises(ql.UserError, match="^Brevitas refused: ValueError: 1 bit$"):
        predictions(resnet20)


@pytest.mark.parametrize("tensors, about, said", [
    (None, None, "no response that can be read .*; make its environment again: rm -r .venv-rivals"),
    ({"predictions": torch.zeros(5).long()}, {}, "no response that can be read"),
    ({"logits": torch.zeros(5)}, {"seconds": "1"}, "no response that can be read"),
    ({"predictions": torch.zeros(4).long()}, {"seconds": "1"}, r"int64 \[4\], not torch.int64 \[5"),
    ({"predictions": torch.zeros(5)}, {"seconds": "1"}, r"torch.float32 \[5\], not torch.int64"),
])
def test_a_response_of_another_form_is_refused(tmp_path, tensors, about, said):
    if tensors:
        safetensors.torch.save_file(tensors, tmp_path / "response", about)
    with pytest.raises(ql.UserError, match=said):
        brevitas.read_response(tmp_path / "response", 5)


def test_a_missing_environment_is_one_line(resnet20, workbook, capsys):
    with pytest.raises(ql.UserError, match="make it with: make rivals$"):
        predictions(resnet20)
    assert main(["rivals", "--data", "digits"]) == 1
    assert capsys.readouterr().err.strip().endswith("make it with: make rivals")


def test_an_unknown_method_is_refused(resnet20, environment):
    with pytest.raises(ql.UserError, match="'GTPQ' is unknown; did you mean GPTQ?"):
        predictions(resnet20, method="GTPQ")


# ---- What it makes -------------------------------------------------------------------------------


MAKE = """
import json, sys, torch
from torch import nn
from quantlab.rivals import brevitas_worker as worker
torch.manual_seed(0)
network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8),
                        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)).eval()
batches = [(torch.randn(16, 3, 8, 8), None)] * 2
made = worker.quantized(network, batches, json.loads(sys.argv[1]))
layers = [m for m in made.modules() if hasattr(m, "quant_weight")]
codes = [m.quant_weight().int().flatten(1) for m in layers]
print([[len(row.unique()) for row in rows] for rows in codes],
      [[int(rows.min()), int(rows.max())] for rows in codes],
      [int(m.input_quant.bit_width()) for m in layers], sep=";")
"""


@pytest.mark.skipif(not PYTHON.is_file(), reason="Brevitas is not there: make rivals")
@pytest.mark.parametrize("method", brevitas.METHODS)
def test_brevitas_makes_what_the_rows_say(method):
    settings = json.dumps({**SETTINGS, "weight_bits": 2, "act_bits": 3, "method": method,
                           "iterations": 3})
    done = subprocess.run([PYTHON, "-c", MAKE, settings], env={"PYTHONPATH": str(CHECKOUT)},
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]
    counts, ends, act_bits = map(json.loads, done.stdout.strip().splitlines()[-1].split(";"))
    assert max(counts[1]) <= 4 < max(counts[0])  # first and last layer have more
    assert -2 <= ends[1][0] < 0 < ends[1][1] <= 1 and ends[0][1] > 7 and ends[2][1] > 7
    assert act_bits == [8, 3, 8]
