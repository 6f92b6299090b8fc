"""The ONNX project's own vectors, which its package generates, against our arithmetic."""

import numpy as np
import torch
from onnx_vectors import vectors
from torch import nn

from quantlab.affine import QParams, dequantize, quantize_tensor
from quantlab.integer import operations as ops

WIDTHS = {"uint8": 8, "int8": 8, "uint4": 4, "int4": 4, "uint2": 2, "int2": 2}


def parameters(scale, zero_point, axis):
    """The QParams of a vector; None for 16 bits, floats and blocks, which are not quantlab's."""
    name = zero_point.dtype.name
    if name not in WIDTHS or scale.size > 1 and scale.ndim > 1:
        return None
    low = -(2 ** (WIDTHS[name] - 1)) if name.startswith("int") else 0
    scale, zero_point = (torch.from_numpy(v.reshape(-1) if v.size > 1 else v.reshape(()))
                         for v in (scale.astype(np.float32), zero_point.astype(np.int32)))
    return QParams(scale, zero_point, low, low + 2 ** WIDTHS[name] - 1,
                   axis if scale.dim() else None)


def test_quantize_linear():
    seen = set()
    for name, attributes, (x, scale, *rest), codes in vectors("QuantizeLinear"):
        q = parameters(scale, rest[0] if rest else codes[..., 0], attributes.get("axis", 1))
        if q is not None and "block_size" not in attributes:
            ours = quantize_tensor(torch.from_numpy(x), q)
            assert np.array_equal(ours.numpy(), codes.astype(np.int32)), name
            seen.add(codes.dtype.name)
    assert seen >= {"uint8", "uint4", "int4"}


def test_dequantize_linear():
    seen = set()
    for name, attributes, (codes, scale, *rest), x in vectors("DequantizeLinear"):
        zero_point = rest[0] if rest else np.zeros((), codes.dtype)
        q = parameters(scale, zero_point, attributes.get("axis", 1))
        if q is not None and "block_size" not in attributes:
            ours = dequantize(torch.from_numpy(codes.astype(np.int32)), q)
            assert np.array_equal(ours.numpy(), x), name
            seen.add(codes.dtype.name)
    assert seen >= {"uint8", "uint4", "int4"}


def layer_of(kind, module, weight, zero_points, inputs, out=None, scale=1.0):
    """Our integer layer of raw codes: weight [C, ...], zero_points of it [C], inputs a QParams."""
    module.weight_qparams = QParams(
        torch.full((len(weight),), scale), zero_points, int(weight.min()), 255, 0)
    return kind("layer", module, weight, None, ops.Grid.of(inputs), out, "single")


def whole(value):
    return torch.from_numpy(np.asarray(value).astype(np.int32))


def test_conv_integer():
    cases = vectors("ConvInteger")
    for name, attributes, (x, weight, *rest), expected in cases:
        of_weight = whole(rest[1]) if rest[1:] else torch.zeros(len(weight)).int()
        q = parameters(np.ones(()), rest[0], None)
        conv = nn.Conv2d(*weight.shape[1::-1], weight.shape[2:],
                         padding=attributes.get("pads", [0])[0])
        layer = layer_of(ops.Conv, conv, whole(weight), of_weight, q)
        assert np.array_equal(layer(whole(x)).numpy(), expected), name
    assert len(cases) >= 2


def test_qlinear_matmul():
    cases = [case for case in vectors("QLinearMatMul") if case[2][1].dtype == np.float32]
    for name, _, inputs, expected in cases:
        a, sa, za, b, sb, zb, sy, zy = inputs
        in_q, out_q = parameters(sa, za, None), parameters(sy, zy, None)
        pairs = [(a, b, expected)] if a.ndim == 2 else list(zip(a, b, expected))
        for x, weight, y in pairs:
            weight = whole(weight).t().contiguous()
            layer = layer_of(ops.Linear, nn.Linear(*weight.shape[::-1]), weight,
                             whole(zb).expand(len(weight)), in_q, ops.Grid.of(out_q), float(sb[0]))
            assert np.array_equal(layer(whole(x)).numpy(), y.astype(np.int32)), name
    assert len(cases) >= 4


def test_matmul_integer():
    [(_, _, (a, b, za, zb), expected)] = vectors("MatMulInteger")
    weight = whole(b).t().contiguous()
    q = parameters(np.ones(()), za, None)
    layer = layer_of(ops.Linear, nn.Linear(*weight.shape[::-1]), weight,
                     whole(zb).expand(len(weight)), q)
    assert np.array_equal(layer(whole(a)).numpy(), expected)
