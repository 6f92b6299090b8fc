"""The ONNX project's own vectors, as the functions in its package make them."""

import importlib

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="pip install onnx")


def vectors(operator):
    """[name, attributes, inputs, output] of an operator."""
    module = importlib.import_module(f"onnx.backend.test.case.node.{operator.lower()}")
    found, before = [], module.expect
    module.expect = lambda node, inputs, outputs, name, **_: found.append(
        (name, {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute},
         [array(value) for value in inputs], array(outputs[0])))
    try:
        owner = getattr(module, operator)
        for name in [name for name in dir(owner) if name.startswith("export")]:
            getattr(owner, name)()
    finally:
        module.expect = before
    return found


def array(value):
    return onnx.numpy_helper.to_array(value) if hasattr(value, "data_type") else np.asarray(value)
