"""ONNX Runtime as a rival: its own int8 network, from our float export."""

import sys

import pytest
import torch

import quantlab as ql
from quantlab.rivals import onnxruntime as rival

for package in ("onnx", "onnxruntime", "onnxscript"):
    pytest.importorskip(package, reason="pip install onnx onnxscript onnxruntime")


def test_onnx_runtime_runs_the_float_network():
    model, x = torch.nn.Conv2d(3, 4, 3), torch.randn(2, 3, 8, 8)
    assert torch.allclose(rival.onnxruntime_float(model, (3, 8, 8))(x), model(x), atol=1e-5)


def test_onnx_runtimes_own_quantization(resnet20, digits):
    network = rival.onnxruntime_int8(resnet20, digits.calibration(128))
    ours, theirs = (ql.evaluate(n, digits.test, on="cpu") for n in (resnet20, network))
    assert abs(ql.paired_drop(ours.correct, theirs.correct)[0]) < 2
    x = next(iter(digits.calibration(16)))
    assert not torch.allclose(network(x), resnet20(x), atol=1e-3)
    assert 3 < ql.weight_bytes(resnet20) / network.bytes < 4


def test_an_unknown_method_names_the_known_ones(resnet20):
    message = "method 'max' is unknown; use one of: minmax, entropy, percentile"
    with pytest.raises(ql.UserError, match=message):
        rival.onnxruntime_int8(resnet20, [torch.randn(1, 3, 32, 32)], method="max")


def test_missing_onnx_runtime_is_said_in_one_line(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ql.UserError, match="pip install onnx onnxruntime$"):
        rival.OnnxModel(tmp_path / "model.onnx")
