"""Golden vectors: inputs, parameters and codes of every integer operation, for writers of other
kernels.

    cd tests/integer && python golden.py            # writes golden_integer.json

One file, one list of cases, nothing but JSON: operation, rounding, inputs (shape and codes),
parameters (every constant that the operation uses), accumulator (int32, before requantization) and
codes. M = multiplier * 2^(shift - 31); shapes are NCHW, weights OIHW. The numbers come from
Python's own generator, so that another version of torch writes the same file.
"""

import dataclasses
import json
import pathlib
import random

import torch
from torch import nn

from quantlab.affine import QParams
from quantlab.integer import operations as ops
from quantlab.integer import pooling as pools
from quantlab.integer.fixedpoint import INT32_MAX, INT32_MIN, ROUNDINGS, fixed_point, multiply
from quantlab.system.files import write_text

PATH = pathlib.Path(__file__).with_name("golden_integer.json")
ABOUT = (
    "Integer operations of a quantized network. real = scale * (code - zero_point), M = multiplier "
    "* 2^(shift - 31), code = clamp(zero_point + round(accumulator * M), low, high). single: (x * "
    "q + 2^(30 - shift)) >> (31 - shift). double: saturating rounding doubling high mul (ties up) "
    "of x * 2^max(shift, 0) and q, then a rounding division by 2^max(-shift, 0) (ties away from "
    "zero), as in gemmlowp."
)


def cases():
    """All cases, as plain dicts."""
    draw = random.Random(2024)
    found = [_multipliers(draw)]
    for rounding in ROUNDINGS:
        found += [_products(draw, rounding), *_operations(draw, rounding)]
    draw = random.Random(2025)  # younger cases, so that those above stay
    return found + [case for rounding in ROUNDINGS for case in _all_levels(draw, rounding)]


def write(path=PATH):
    """Write the file; one case a line."""
    lines = ",\n".join(json.dumps(case, separators=(",", ":")) for case in cases())
    head = f'{{"version":1,"about":{json.dumps(ABOUT)},"cases":['
    write_text(pathlib.Path(path), f"{head}\n{lines}\n]}}\n")


# ---- Fixed point ---------------------------------------------------------------------------------


def _multipliers(draw):
    reals = [1.0, 0.5, 1 - 2.0**-40, 2.0**-32, 2.0**-33, 1000.25]
    reals += [2.0 ** draw.uniform(-31, 10) for _ in range(40)]
    q, shift = fixed_point(torch.tensor(reals, dtype=torch.float64))
    return {"operation": "fixed_point", "real": [real.hex() for real in reals],
            "multiplier": q.tolist(), "shift": shift.tolist()}


def _products(draw, rounding):
    rows = [(7984, 1583594044, -9), (-7984, 1583594044, -9), (3, 2**30, 0), (-3, 2**30, 0)]
    rows += [(INT32_MIN, INT32_MAX, 0), (INT32_MAX, 2**30, -31)]
    for _ in range(120):
        shift = draw.randint(-31, 12)
        x = draw.randint(INT32_MIN, INT32_MAX) >> draw.randint(max(shift, 0), 28)
        rows.append((x, draw.randint(2**30, INT32_MAX), shift))
    x, q, shift = (torch.tensor(column) for column in zip(*rows))
    return {"operation": "multiply", "rounding": rounding, "x": x.tolist(),
            "multiplier": q.tolist(), "shift": shift.tolist(),
            "codes": multiply(x, q, shift, rounding).tolist()}


# ---- Operations ----------------------------------------------------------------------------------


def _operations(draw, rounding):
    """One case of every operation, and several of the convolution."""
    wide, narrow = _grid(draw, 8), _grid(draw, 4)
    signed = _grid(draw, 7, low=-63, high=63, zero_point=0)
    yield from _convolutions(draw, rounding, wide, narrow, signed)
    linear = nn.Linear(12, 5)
    codes = _set_weights(draw, linear, 8)
    for name, out in (("linear", narrow), ("linear, int32 logits", None)):
        op = ops.Linear("linear", linear, *codes(wide), wide, out, rounding)
        yield _case(op, name, rounding, [_codes(draw, wide, 3, 12)])
    op = ops.Affine("affine", _batchnorm(draw), wide, narrow, rounding)
    yield _case(op, "affine per channel", rounding, [_codes(draw, wide, 2, 4, 3, 3)])
    for name, grid_in, out in (("8 to 4", wide, narrow), ("4 to 8", narrow, wide)):
        every = torch.arange(grid_in.q.qmax + 1, dtype=torch.int32).view(1, -1)
        op = ops.Requantize("requantize", grid_in, out, rounding)
        yield _case(op, f"requantize {name} bits", rounding, [every])
    operands = [_codes(draw, grid, 2, 3, 4, 4) for grid in (wide, signed)]
    yield _case(ops.Add("add", (wide, signed), wide, rounding), "add", rounding, operands)
    yield from _averages(draw, rounding, wide, narrow)
    windows = (pools.Windows(3, 2, 1),) * 2
    codes = _codes(draw, signed, 1, 3, 6, 6)
    yield {"operation": "max 3x3, stride 2, padding 1", "rounding": rounding,
           "inputs": [_plain(codes)], "parameters": _window_options({"windows": windows}),
           "codes": _plain(pools.MaxPool(windows)(codes))}
    parts = [ops.Requantize("part", grid, wide, rounding) for grid in (narrow, signed)]
    codes = [_codes(draw, grid, 1, 2, 3, 3) for grid in (narrow, signed)]
    yield {"operation": "concat", "rounding": rounding, "inputs": [_plain(x) for x in codes],
           "parameters": {"dim": 1, "parts": [_constants(part) for part in parts]},
           "codes": _plain(torch.cat([part(x) for part, x in zip(parts, codes)], 1))}


def _convolutions(draw, rounding, wide, narrow, signed):
    relu6 = wide.clamped(0, 6 * wide.scale)
    rows = {  # name: layer, grids of input and output, bits of the weight, size of the image
        "3x3, stride 2, padding": (nn.Conv2d(3, 4, 3, 2, 1), wide, narrow, 8, 6),
        "1x1": (nn.Conv2d(6, 5, 1), narrow, wide, 4, 4),
        "depthwise, dilation 2": (
            nn.Conv2d(4, 4, 3, groups=4, padding=2, dilation=2), wide, signed, 8, 5),
        "2 groups": (nn.Conv2d(4, 6, (1, 3), groups=2), signed, _grid(draw, 2), 3, 5),
        "ReLU6, asymmetric weights": (nn.Conv2d(2, 3, 2), wide, relu6, 8, 4),
    }
    for name, (layer, grid_in, out, bits, size) in rows.items():
        codes = _set_weights(draw, layer, bits, symmetric="asymmetric" not in name)
        op = ops.Conv("conv", layer, *codes(grid_in), grid_in, out, rounding)
        x = _codes(draw, grid_in, 1, layer.in_channels, size, size)
        yield _case(op, f"conv {name}", rounding, [x], **op.options, dilation=op.dilation)


def _all_levels(draw, rounding):
    """Weights of 2^b levels, by channel with one code more below zero or above."""
    wide, narrow = _grid(draw, 8), _grid(draw, 4)
    for bits in (2, 4, 8):
        layer, half = nn.Conv2d(3, 4, 2, padding=1), 2 ** (bits - 1)
        codes = _set_weights(draw, layer, bits, zero_points=(half, half - 1))
        op = ops.Conv("conv", layer, *codes(wide), wide, narrow, rounding)
        name = f"conv {2**bits} levels of a weight"
        x = _codes(draw, wide, 1, 3, 4, 4)
        yield _case(op, name, rounding, [x], **op.options, dilation=op.dilation)


def _averages(draw, rounding, wide, narrow):
    no_padding = pools.Windows(3, 2, 1, count_include_pad=False)
    options = {
        "average 2x2": {"windows": (pools.Windows(2, 2),) * 2},
        "average 3x3, padding counts": {"windows": (pools.Windows(3, 2, 1),) * 2},
        "average 3x3, padding does not count": {"windows": (no_padding,) * 2},
        "average global": {"dims": (2, 3)},
        "average adaptive 3x2": {"windows": (pools.Windows(output=3), pools.Windows(output=2))},
    }
    for name, chosen in options.items():
        op = pools.Average("average", wide, narrow, rounding, **chosen)
        x = _codes(draw, wide, 1, 3, 5, 5)
        yield _case(op, name, rounding, [x], **_window_options(chosen))


def _grid(draw, bits, low=0, high=None, zero_point=None):
    high = 2**bits - 1 if high is None else high
    zero_point = draw.randint(low, high) if zero_point is None else zero_point
    scale = torch.tensor(draw.uniform(0.01, 0.1) * 2.0 ** (8 - bits))
    return ops.Grid.of(QParams(scale, torch.tensor(zero_point, dtype=torch.int32), low, high))


def _set_weights(draw, layer, bits, symmetric=True, zero_points=()):
    """Give a layer weight_qparams; the result: grid of the input -> (weight codes, bias codes).

    zero_points: of 2^b codes, by turns; every channel has the last and the first code.
    """
    symmetric = symmetric and not zero_points
    qmin, qmax = (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)
    channels = len(layer.weight)
    scale = torch.tensor([draw.uniform(0.002, 0.02) for _ in range(channels)])
    zero_point = [0 if symmetric else draw.randint(0, qmax) for _ in range(channels)]
    if zero_points:
        zero_point = [zero_points[i % len(zero_points)] for i in range(channels)]
    zero_point = torch.tensor(zero_point, dtype=torch.int32)
    layer.weight_qparams = QParams(scale, zero_point, qmin, qmax, axis=0)
    codes = [draw.randint(qmin, qmax) for _ in range(layer.weight.numel())]
    codes = torch.tensor(codes, dtype=torch.int32).view_as(layer.weight)
    if zero_points:
        codes.flatten(1)[:, :2] = torch.tensor([qmax, qmin])
    bias = torch.tensor([draw.uniform(-1, 1) for _ in range(channels)]) * scale.sqrt()
    return lambda grid: (codes, torch.round(bias.double() / (grid.scale * scale.double())).int())


def _batchnorm(draw):
    bn = nn.BatchNorm2d(4).eval()
    ranges = ((bn.weight, -2, 2), (bn.bias, -1, 1), (bn.running_mean, -1, 1),
              (bn.running_var, 0.2, 3))
    for parameter, low, high in ranges:
        parameter.data = torch.tensor([draw.uniform(low, high) for _ in range(4)])
    return bn


def _codes(draw, grid, *shape):
    count = torch.Size(shape).numel()
    codes = [draw.randint(grid.q.qmin, grid.q.qmax) for _ in range(count)]
    return torch.tensor(codes, dtype=torch.int32).view(shape)


# ---- As JSON -------------------------------------------------------------------------------------


def _plain(tensor):
    return {"shape": list(tensor.shape), "codes": tensor.flatten().tolist()}


def _constants(op):
    constants = {key: {"shape": list(value.shape), "values": value.flatten().tolist()}
                 for key, value in op.named_buffers()}
    return constants | (
        {"zero_point_in": op.zero_point_in} if hasattr(op, "zero_point_in") else {})


def _window_options(options):
    """Pooling windows along height and width, as plain dicts."""
    return {key: [dataclasses.asdict(w) for w in value] if key == "windows" else value
            for key, value in options.items()}


def _case(op, name, rounding, inputs, **options):
    acc = op.accumulate(*inputs)
    options = {key: list(value) if isinstance(value, tuple) else value
               for key, value in options.items()}
    return {"operation": name, "rounding": rounding, "inputs": [_plain(x) for x in inputs],
            "parameters": _constants(op) | options, "accumulator": _plain(acc),
            "codes": _plain(op(*inputs))}


if __name__ == "__main__":
    with torch.no_grad():
        write()
    print(f"wrote {PATH}")
