"""Integer operations one by one: against plain Python integers on the golden vectors, and against ONNX Runtime's integer operators."""

import json
import math
import shutil
from fractions import Fraction

import golden
import pytest
import torch
from conftest import read_text
from torch import nn

import quantlab as ql
from quantlab.affine import QParams, choose_qparams, fake_quantize
from quantlab.integer import fixedpoint
from quantlab.integer import operations as ops
from quantlab.integer import pooling as pools
from quantlab.integer.fast import gemm
from quantlab.integer.fast import operations as integer_fast

VECTORS = json.loads(read_text(golden.PATH))


# ---- Plain Python: no torch, no fixed width -----------------------------------------------------------------------------------


def rescale(x, q, shift, rounding):
    half = Fraction(1, 2)
    if rounding == "single":
        return math.floor(Fraction(x * q) * Fraction(2) ** (shift - 31) + half)
    high = min(math.floor(Fraction(x * 2 ** max(shift, 0) * q, 2**31) + half), 2**31 - 1)
    exact = Fraction(high, 2 ** max(-shift, 0))
    return math.floor(abs(exact) + half) * (1 if exact >= 0 else -1)


def nested(flat, shape):
    if len(shape) == 1:
        return list(flat)
    step = len(flat) // shape[0]
    return [nested(flat[i * step : (i + 1) * step], shape[1:]) for i in range(shape[0])]


def array(entry):
    flat = entry.get("codes", entry.get("values"))
    return nested(flat, entry["shape"]) if entry["shape"] else flat[0]


def flatten(values):
    return [v for item in values for v in flatten(item)] if isinstance(values, list) else [values]


def store(acc, p, rounding, channel=None):
    q, shift = (flatten(array(p[k])) for k in ("multiplier", "shift"))
    i = 0 if channel is None or len(q) == 1 else channel
    return max(array(p["low"]), min(array(p["high"]), array(p["zero_point"]) + rescale(acc, q[i], shift[i], rounding)))


def conv(x, p):
    """Accumulators {(image, channel, row, column): acc} by the definition."""
    weight, bias, (sh, sw), (ph, pw), (dh, dw) = array(p["weight"]), array(p["bias"]), p["stride"], p["padding"], p["dilation"]
    channels, kh, kw, height, width = len(weight[0]), len(weight[0][0]), len(weight[0][0][0]), len(x[0][0]), len(x[0][0][0])
    rows, columns = (height + 2 * ph - dh * (kh - 1) - 1) // sh + 1, (width + 2 * pw - dw * (kw - 1) - 1) // sw + 1
    result = {}
    for b, o, i, j in ((b, o, i, j) for b in range(len(x)) for o in range(len(weight)) for i in range(rows) for j in range(columns)):
        acc = bias[o]
        for c in range(channels):
            source = x[b][o // (len(weight) // p["groups"]) * channels + c]
            for u in range(kh):
                for v in range(kw):
                    h, w = i * sh - ph + u * dh, j * sw - pw + v * dw
                    if 0 <= h < height and 0 <= w < width:
                        acc += (source[h][w] - p["zero_point_in"]) * weight[o][c][u][v]
        result[b, o, i, j] = acc
    return result


@pytest.mark.parametrize("case", [c for c in VECTORS["cases"] if c["operation"].startswith("conv")], ids=lambda c: f"{c['operation']} {c['rounding']}")
def test_convolutions_by_definition(case):
    acc = conv(array(case["inputs"][0]), case["parameters"])
    assert list(acc.values()) == case["accumulator"]["codes"]
    assert [store(a, case["parameters"], case["rounding"], key[1]) for key, a in acc.items()] == case["codes"]["codes"]


@pytest.mark.parametrize("case", [c for c in VECTORS["cases"] if c["operation"].startswith("linear")], ids=lambda c: f"{c['operation']} {c['rounding']}")
def test_linear_layers_by_definition(case):
    p = case["parameters"]
    acc = [[b + sum((x - p["zero_point_in"]) * w for x, w in zip(row, weights)) for weights, b in zip(array(p["weight"]), array(p["bias"]))]
           for row in array(case["inputs"][0])]
    assert acc == array(case["accumulator"])
    expected = acc if "logits" in case["operation"] else [[store(a, p, case["rounding"], o) for o, a in enumerate(row)] for row in acc]
    assert expected == array(case["codes"])


@pytest.mark.parametrize("case", [c for c in VECTORS["cases"] if c["operation"] == "add"], ids=lambda c: c["rounding"])
def test_add_by_definition(case):
    p, mode = case["parameters"], case["rounding"]
    terms = [[rescale((code - z) << 20, q, s, mode) for code in x["codes"]]
             for x, z, q, s in zip(case["inputs"], *(array(p[k]) for k in ("zero_points", "multipliers", "shifts")))]
    assert [store(a + b, p, mode) for a, b in zip(*terms)] == case["codes"]["codes"]


@pytest.mark.parametrize("case", [c for c in VECTORS["cases"] if c["operation"].startswith(("requantize", "affine", "concat"))],
                         ids=lambda c: f"{c['operation']} {c['rounding']}")
def test_affine_requantize_and_concat_by_definition(case):
    p, mode, x = case["parameters"], case["rounding"], case["inputs"][0]
    if case["operation"] == "concat":
        expected = [store(c - q["zero_point_in"], q, mode) for q, part in zip(p["parts"], case["inputs"]) for c in part["codes"]]
    elif "weight" in p:
        channel = [i // 9 % 4 for i in range(len(x["codes"]))]
        weight, bias = flatten(array(p["weight"])), flatten(array(p["bias"]))
        expected = [store((code - p["zero_point_in"]) * weight[c] + bias[c], p, mode, c) for code, c in zip(x["codes"], channel)]
    else:
        expected = [store(code - p["zero_point_in"], p, mode) for code in x["codes"]]
    assert expected == case["codes"]["codes"]


def test_pools_by_definition():
    """Averages as exact fractions rounded once, which the fixed-point form may miss by its own 2^-31; maxima exactly."""
    for case in VECTORS["cases"]:
        if not case["operation"].startswith(("average", "max")):
            continue
        x, p = torch.tensor(array(case["inputs"][0])), case["parameters"]
        if case["operation"].startswith("max"):
            expected = nn.functional.max_pool2d(x.double(), 3, 2, 1)
            assert torch.equal(torch.tensor(array(case["codes"])).double(), expected)
            continue
        real = x.double() - p["zero_point_in"]
        kind = case["operation"].removeprefix("average ")
        average = {
            "2x2": lambda: nn.functional.avg_pool2d(real, 2), "3x3, padding counts": lambda: nn.functional.avg_pool2d(real, 3, 2, 1),
            "3x3, padding does not count": lambda: nn.functional.avg_pool2d(real, 3, 2, 1, count_include_pad=False),
            "global": lambda: real.mean((2, 3)), "adaptive 3x2": lambda: nn.functional.adaptive_avg_pool2d(real, (3, 2)),
        }[kind]()
        acc = torch.tensor(array(case["accumulator"]))
        q, shift = (torch.tensor(array(p[k]), dtype=torch.float64) for k in ("multiplier", "shift"))
        ratio = (acc * q * 2.0 ** (shift - 31)) / average  # s_in / s_out, the same everywhere
        assert ratio.nan_to_num(ratio.nanmedian()).sub(ratio.nanmedian()).abs().max() < 1e-8 * ratio.nanmedian()
        flat = [store(a, {**p, "multiplier": {"shape": [1], "values": [m]}, "shift": {"shape": [1], "values": [s]}}, case["rounding"])
                for a, m, s in zip(flatten(acc.tolist()), *(flatten(v.long().expand_as(acc).tolist()) for v in (q, shift)))]
        assert flat == case["codes"]["codes"]


def test_multiplier_vectors():
    for case in VECTORS["cases"]:
        if case["operation"] == "multiply":
            expected = [rescale(*row, case["rounding"]) for row in zip(case["x"], case["multiplier"], case["shift"])]
            assert expected == case["codes"]
        if case["operation"] == "fixed_point":
            for real, q, shift in zip(map(float.fromhex, case["real"]), case["multiplier"], case["shift"]):
                assert abs(Fraction(q) * Fraction(2) ** (shift - 31) - Fraction(real)) <= max(Fraction(real) / 2**31, Fraction(0 if q else 2**-32))


def test_golden_vectors_are_what_the_command_writes(tmp_path):
    golden.write(tmp_path / "again.json")
    assert read_text(tmp_path / "again.json") == read_text(golden.PATH), "run: python -m golden"
    assert golden.PATH.stat().st_size < 300_000


# ---- ONNX Runtime's integer operators, which multiply in float32 and round half to even ----------------------------------------


def ort_run(op, inputs, constants, attributes=None, domain=""):
    """Outputs of one ONNX operator; inputs: ordered {name: array}, of which `constants` are the rest of its arguments."""
    onnx, ort = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    values = {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in {**inputs, **constants}.items()}
    h = onnx.helper
    node = h.make_node(op, list(values), ["y"], domain=domain, **(attributes or {}))
    infos = [h.make_tensor_value_info(k, onnx.helper.np_dtype_to_tensor_dtype(values[k].dtype), values[k].shape) for k in values]
    out = h.make_tensor_value_info("y", onnx.TensorProto.UINT8, None)
    graph = h.make_graph([node], "one", infos, [out])
    opsets = [h.make_opsetid("", 17), h.make_opsetid("com.microsoft", 1)]
    session = ort.InferenceSession(h.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, values)[0])


def unsigned_grid(low, high):
    return ops.Grid.of(choose_qparams(low, high, 8))


def ort_constants(grid):
    return grid.q.scale.numpy(), grid.q.zero_point.to(torch.uint8).numpy()


def make_layer(layer, grid_in):
    """The layer with weights and biases that are values of their codes."""
    weight = layer.weight.detach()
    top = weight.abs().flatten(1).amax(1)
    layer.weight_qparams = choose_qparams(-top, top, 7, symmetric=True, axis=0)  # 7 bits: no 8-bit product saturates on any processor
    layer.weight.data = fake_quantize(weight, layer.weight_qparams)
    return layer


def nearly_equal(ours, theirs, share=2e-3):
    """At most one code apart, and that rarely: they differ where a value is next to a tie."""
    difference = (ours.int() - theirs.int()).abs()
    assert difference.max() <= 1 and (difference != 0).double().mean() <= share, (difference.max(), (difference != 0).double().mean())


@pytest.mark.parametrize("options", [{"padding": 1}, {"stride": 2, "padding": 1}, {"groups": 4}, {"groups": 8, "padding": 2, "dilation": 2}], ids=str)
def test_convolution_against_onnx_runtime(options):
    grid_in, out = unsigned_grid(-1.5, 2.5), unsigned_grid(-2.0, 2.0)
    layer = make_layer(nn.Conv2d(8, 16 if options.get("groups") != 8 else 8, 3, **options), grid_in)
    op = ops.Conv("conv", layer, grid_in, out, "single")
    x = torch.randint(0, 256, (4, 8, 12, 12), dtype=torch.int32)
    (s_in, z_in), (s_out, z_out) = ort_constants(grid_in), ort_constants(out)
    constants = {"xs": s_in, "xz": z_in, "w": op.weight.to(torch.int8), "ws": layer.weight_qparams.scale, "wz": torch.zeros(len(layer.weight), dtype=torch.int8),
                 "ys": s_out, "yz": z_out, "b": op.bias}
    attributes = {"pads": [layer.padding[0]] * 4, "strides": layer.stride, "dilations": layer.dilation, "group": layer.groups}
    nearly_equal(op(x), ort_run("QLinearConv", {"x": x.to(torch.uint8)}, constants, attributes))


def test_linear_against_onnx_runtime():
    grid_in, out = unsigned_grid(-1.0, 3.0), unsigned_grid(-2.0, 2.0)
    layer = make_layer(nn.Linear(64, 32, bias=False), grid_in)
    op = ops.Linear("linear", layer, grid_in, out, "single")
    x = torch.randint(0, 256, (256, 64), dtype=torch.int32)
    (s_in, z_in), (s_out, z_out) = ort_constants(grid_in), ort_constants(out)
    constants = {"xs": s_in, "xz": z_in, "w": op.weight.t().to(torch.int8).contiguous(), "ws": layer.weight_qparams.scale,
                 "wz": torch.zeros(32, dtype=torch.int8), "ys": s_out, "yz": z_out}
    nearly_equal(op(x), ort_run("QLinearMatMul", {"x": x.to(torch.uint8)}, constants))


def test_add_against_onnx_runtime():
    a, b, out = unsigned_grid(-1.0, 3.0), unsigned_grid(0.0, 1.3), unsigned_grid(-0.7, 3.9)
    op = ops.Add("add", (a, b), out, "single")
    x, y = (torch.randint(0, 256, (100_000,), dtype=torch.int32) for _ in range(2))
    (sa, za), (sb, zb), (so, zo) = (ort_constants(g) for g in (a, b, out))
    theirs = ort_run("QLinearAdd", {"a": x.to(torch.uint8), "as": sa, "az": za, "b": y.to(torch.uint8)}, {"bs": sb, "bz": zb, "os": so, "oz": zo},
                     domain="com.microsoft")
    nearly_equal(op(x, y), theirs, 0.01)
    exact = (a.scale * (x - a.zero_point).double() + b.scale * (y - b.zero_point).double()) / out.scale + out.zero_point
    rounded, away = exact.round().clamp(0, 255).int(), (exact - exact.floor() - 0.5).abs()
    assert torch.equal(op(x, y)[away > 1e-5], rounded[away > 1e-5]), "where they differ, ours is the exact sum rounded"


@pytest.mark.parametrize("count_include_pad", [0, 1])
def test_average_pool_against_onnx_runtime(count_include_pad):
    grid, out = unsigned_grid(-1.0, 3.0), unsigned_grid(-0.7, 2.6)
    windows = (pools.Windows(3, 2, 1, count_include_pad=bool(count_include_pad)),) * 2
    op = pools.Average("average", grid, out, "single", windows)
    x = torch.randint(0, 256, (4, 8, 13, 13), dtype=torch.int32)
    (s, z), (so, zo) = ort_constants(grid), ort_constants(out)
    attributes = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1] * 4, "count_include_pad": count_include_pad}
    theirs = ort_run("QLinearAveragePool", {"x": x.to(torch.uint8)}, {"s": s, "z": z, "so": so, "zo": zo}, attributes, "com.microsoft")
    if count_include_pad:  # ONNX Runtime pads with code 0, which stands for zero only where the zero point is 0: compare inside
        nearly_equal(op(x)[..., 1:-1, 1:-1], theirs[..., 1:-1, 1:-1], 0.02)
    else:
        nearly_equal(op(x), theirs, 0.02)


@pytest.mark.parametrize("ceil_mode", [0, 1])
def test_max_pool_against_onnx_runtime(ceil_mode):
    x = torch.randint(0, 256, (2, 4, 14, 14), dtype=torch.int32)
    attributes = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1] * 4, "ceil_mode": ceil_mode}
    theirs = ort_run("MaxPool", {"x": x.to(torch.uint8)}, {}, attributes)
    windows = (pools.Windows(3, 2, 1, ceil_mode=bool(ceil_mode)),) * 2
    assert torch.equal(pools.MaxPool(windows)(x), theirs.int())
    stored = (x - 128).to(torch.int8)
    assert torch.equal(integer_fast.MaxPool(windows)(stored).int() + 128, theirs.int())


# ---- Pooling windows against torch, sizes and modes that real networks use -----------------------------------------------------


@pytest.mark.parametrize("size", [5, 7, 8])
@pytest.mark.parametrize("options", [{"kernel": 2, "stride": 2}, {"kernel": 3, "stride": 2, "padding": 1}, {"kernel": 3, "stride": 2, "ceil_mode": True},
                                     {"kernel": 3, "stride": 2, "padding": 1, "ceil_mode": True}], ids=str)
def test_windows_are_torchs(size, options):
    x = torch.randint(-50, 50, (2, 3, size, size))
    names = {"kernel": "kernel_size"}
    torchs = {names.get(k, k): v for k, v in options.items()}
    assert torch.equal(pools.MaxPool((pools.Windows(**options),) * 2)(x).double(), nn.MaxPool2d(**torchs)(x.double()))
    for include in (True, False):
        windows = (pools.Windows(**options, count_include_pad=include),) * 2
        grid = ops.Grid.of(QParams(torch.tensor(1.0), torch.tensor(0), -127, 127))
        op = pools.Average("a", grid, None, "single", windows)
        average = op(x.int()) * op.unit
        assert torch.allclose(average, nn.AvgPool2d(**torchs, count_include_pad=include)(x.double()))


@pytest.mark.parametrize("size, output", [(2, 7), (8, 4), (7, 3), (5, 1)])
def test_adaptive_windows_are_torchs(size, output):
    x = torch.randint(-50, 50, (2, 3, size, size))
    windows = (pools.Windows(output=output),) * 2
    assert torch.equal(pools.MaxPool(windows)(x).double(), nn.AdaptiveMaxPool2d(output)(x.double()))
    op = pools.Average("a", ops.Grid.of(QParams(torch.tensor(1.0), torch.tensor(0), -127, 127)), None, "single", windows)
    assert torch.allclose(op(x.int()) * op.unit, nn.AdaptiveAvgPool2d(output)(x.double()))


# ---- Overflow and other bad input ----------------------------------------------------------------------------------------------


def test_accumulator_overflow_names_the_layer():
    layer = nn.Linear(70_000, 1, bias=False)
    layer.weight.data.fill_(1.0)
    layer.weight_qparams = choose_qparams(-torch.ones(1), torch.ones(1), 8, symmetric=True, axis=0)
    grid = ops.Grid.of(choose_qparams(0, 1, 8))
    with pytest.raises(ql.UserError, match="huge: the accumulator needs 33 bits and has 32"):
        ops.Linear("huge", layer, grid, None, "single")
    layer.weight.data, layer.in_features = layer.weight.data[:, :60_000], 60_000
    op = ops.Linear("fits", layer, grid, None, "single")
    assert op.accumulator_bits == 32 and op(torch.full((1, 60_000), 255, dtype=torch.int32)).item() == 60_000 * 127 * 255


def test_bias_overflow_and_scale_out_of_reach():
    layer = nn.Conv2d(1, 1, 1)
    layer.weight.data.fill_(1e-9)
    layer.weight_qparams = choose_qparams(-torch.full((1,), 1e-9), torch.full((1,), 1e-9), 8, symmetric=True, axis=0)
    layer.bias.data.fill_(5.0)
    grid = ops.Grid.of(choose_qparams(0, 1, 8))
    with pytest.raises(ql.UserError, match="small: a bias of .* does not fit in int32"):
        ops.Conv("small", layer, grid, grid, "single")
    layer.weight_qparams, layer.weight.data, layer.bias.data = choose_qparams(-torch.ones(1), torch.ones(1), 8, symmetric=True, axis=0), torch.ones(1, 1, 1, 1), torch.ones(1)
    with pytest.raises(ql.UserError, match="steep: .*(leave int32|no fixed-point form)"):
        ops.Conv("steep", layer, grid, ops.Grid.of(choose_qparams(0, 1e-9, 8)), "single")
    layer.weight.data += 0.0003
    with pytest.raises(ql.UserError, match="off: its weights are not the values of its codes"):
        ops.Conv("off", layer, grid, grid, "single")


def test_average_of_too_many_codes():
    grid = ops.Grid.of(choose_qparams(0, 1, 8))
    op = pools.Average("wide", grid, grid, "single", dims=(2, 3))
    with pytest.raises(ql.UserError, match="wide: sums of 9,000,000 codes do not fit in int32"):
        op(torch.zeros(1, 1, 3000, 3000, dtype=torch.int32))


@pytest.mark.parametrize("rounding", fixedpoint.ROUNDINGS)
def test_passes_over_rows_are_the_same_compiled(rounding):
    """What CUDA runs, compiled here for the CPU."""
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        pytest.skip("no C++ compiler for torch.compile")
    generator = torch.Generator().manual_seed(0)
    acc = torch.randint(-(2**22), 2**22, (333, 24), generator=generator, dtype=torch.int32)
    bias = torch.randint(-(2**20), 2**20, (24,), generator=generator, dtype=torch.int32)
    multiplier, shift = fixedpoint.fixed_point(torch.rand(24, generator=generator, dtype=torch.float64) * 2**-14)
    constants = bias, multiplier, shift, -5, -128, 120, rounding
    expected = gemm.run_rows(gemm.store_rows, (acc,), *constants)
    assert torch.equal(gemm.compiled(gemm.store_rows)(acc, *constants), expected) and len(expected.unique()) > 50
