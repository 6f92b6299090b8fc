"""Nonsense for every argument of every public function: one line, before anything runs."""

import dataclasses
import functools
import inspect
import math

import numpy as np
import pytest
import torch
from torch import nn

import quantlab as ql

NONSENSE = [None, "x", -1, 0, 1.5, math.nan, [], object(), True]
MEANT = {  # what of it is none: a setting, "auto", a file's name, ...
    "low": [-1, 0], "high": [-1, 0, 1.5], "axis": [None, 0], "limit": [None], "on": [None],
    "architecture": [None], "checkpoint": [None], "images": [None], "compile": [None, True],
    "state": [None, "x"], "callback": [None], "path": ["x"], "image_shape": [None],
    "start_from": [None], "into": [None],
    "out": ["x"], "save_every": [0, 1.5], "rounds": [0], "size": [None],
    "model": ["x"], "first_last_bits": [None], "residual_bits": [None], "input_bits": [None],
    "layer_weight_bits": [None], "layer_act_bits": [None], "weight_norm": [1.5], "lr": [0, 1.5],
    "lr_weights": [1.5], "lr_steps": [0, 1.5], "lr_bias": [0, 1.5], "weight_lambda": [0, 1.5],
    "temperature": [1.5], "drop": [0], "mixup": [0], "seed": [0], "max_cache_bytes": [0],
    "phases": [[]], "learning_rate": [0, 1.5], "warmup": [0], "weight_decay": [0],
    "label_smoothing": [0], "crop": [0], "cutout": [0], "averaging": [0],
    "heldout_images": [0], "qmin": [-1, 0]}


@functools.cache
def valid(name):
    """Arguments with which that function of `ql` runs."""
    if dataclasses.is_dataclass(getattr(ql, name)) and name != "QParams":
        return dataclasses.asdict(getattr(ql, name)())
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()
    x, q = torch.randn(4, 3, 8, 8), ql.choose_qparams(-1.0, 1.0, 8)
    stats, config = ql.collect(model, [x]), ql.QuantConfig(observer="minmax")
    qmodel, right = ql.quantize(model, stats, config), torch.ones(4, dtype=torch.bool)
    data = ql.load_data("digits", verbose=False)
    file = ql.root() / "checkpoint" / "resnet20-digits.safetensors"
    given = {
        "choose_qparams": dict(low=-1.0, high=1.0, bits=8), "quantize_tensor": dict(x=x, q=q),
        "dequantize": dict(codes=torch.zeros(3).int(), q=q), "fake_quantize": dict(x=x, q=q),
        "QParams": dataclasses.asdict(q), "collect": dict(model=model, batches=[x]),
        "quantize": dict(model=model, stats=stats, config=config),
        "weight_bytes": dict(network=qmodel),
        "evaluate": dict(model=model, split=[(x, torch.zeros(4).long())], on="cpu"),
        "limited": dict(split=data.test, limit=4),
        "paired_drop": dict(correct_a=right, correct_b=right),
        "load_data": dict(source="digits", size=8),
        "find_checkpoint": dict(model="resnet20", data=data), "load_card": dict(checkpoint=file),
        "load_model": dict(name="resnet20", checkpoint=file),
        "load_trained": dict(name="resnet20", data=data, checkpoint=file),
        "train": dict(config=ql.TrainConfig(), data=data, out="x"),
        "reconstruct": dict(model=model, stats=stats, images=x, config=config),
        "tune_end_to_end": dict(model=model, qmodel=qmodel, images=x),
        "equalize": dict(model=model, rounds=1, images=x),
        "correct_bias": dict(model=model, qmodel=qmodel, batches=[x]),
        "to_integer": dict(qmodel=qmodel), "export_onnx": dict(network=qmodel, path="x"),
        "save_quantized": dict(qmodel=qmodel, path="x"),
        "load_quantized": dict(path="x", model=model)}[name]
    parameters = inspect.signature(getattr(ql, name)).parameters
    return {k: given.get(k, p.default) for k, p in parameters.items()}


def is_meant(name, argument, value, default):
    if isinstance(default, bool):
        return value is True
    if name == "QParams" and argument == "axis":
        return value in (None, -1, 0) and value is not True
    meant = MEANT.get(argument, [])
    if name in ("evaluate", "TrainConfig") and argument == "model" or name == "train":
        meant = [one for one in meant if argument != "model"]
    if name == "TrainConfig" and argument == "warmup":
        return False
    if name == "load_quantized" and argument == "path" or name == "load_trained":
        return False
    return any(value is one or (value == one and type(value) is type(one)) for one in meant)


NAMES = [name for name in ql.__all__ if name not in ("UserError", "root", "QuantizedNetwork")]


@pytest.mark.parametrize("name", NAMES)
def test_nonsense_for_any_argument_is_one_line(name, tmp_path, monkeypatch):
    if name == "export_onnx":
        pytest.importorskip("onnxscript")
    arguments = valid(name)
    monkeypatch.chdir(tmp_path)
    for argument, default in arguments.items():
        for value in NONSENSE:
            if not is_meant(name, argument, value, default):
                with pytest.raises(ql.UserError) as caught:
                    getattr(ql, name)(**arguments | {argument: value})
                    pytest.fail(f"{argument}={value!r} is accepted")
                assert len(str(caught.value).splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_the_names_that_python_refuses_stay_pythons():
    with pytest.raises(TypeError, match="missing a required argument: 'low'"):
        ql.choose_qparams(high=1, bits=8)
    with pytest.raises(TypeError, match="unexpected keyword argument 'batchsize'"):
        ql.limited(None, 1, batchsize=1)


def test_numbers_of_numpy_and_tensors_are_numbers(digits):
    assert len(ql.limited(digits.test, np.int64(5))) == 5
    low, high = np.float32(-1), torch.tensor(1.0)
    assert ql.choose_qparams(low, high, 8, symmetric=np.bool_(True)).qmin == -127
    assert ql.TuneConfig(lr=np.float64(0.1), iterations=np.int32(3)).iterations == 3


def test_a_line_says_what_to_give():
    for call, line in [
        (lambda: ql.QuantConfig(per_channel="yes"), "per_channel='yes': give True or False"),
        (lambda: ql.weight_bytes("model"), "network='model': give a Module"),
        (lambda: ql.QuantConfig(layer_weight_bits={"_0": 9}), "layer_weight_bits['_0']=9: a width"),
        (lambda: ql.TuneConfig(lr=math.nan), "lr=nan: give a finite number of at least 0"),
        (lambda: ql.equalize(None), "a network is a torch.nn.Module, not NoneType; pass one"),
    ]:
        with pytest.raises(ql.UserError) as caught:
            call()
        assert str(caught.value).startswith(line)
