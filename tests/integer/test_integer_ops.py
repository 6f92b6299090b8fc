"""Integer operations one by one: against plain Python integers on the golden vectors, and against
ONNX Runtime's integer operators.
"""

import itertools
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
from quantlab.affine import QParams, choose_qparams, quantize_tensor
from quantlab.integer import fixedpoint
from quantlab.integer import operations as ops
from quantlab.integer import pooling as pools
from quantlab.integer.fast import gemm
from quantlab.integer.fast import operations as fast

VECTORS = json.loads(read_text(golden.PATH))


def vectors(*names):
    """The golden vectors of the operations whose names begin so, as parameters of a test."""
    cases = [case for case in VECTORS["cases"] if case["operation"].startswith(names)]
    return pytest.mark.parametrize(
        "case", cases, ids=[f"{case['operation']} {case['rounding']}" for case in cases])


# ---- Plain Python: no torch, no fixed width ------------------------------------------------------


def rescale(x, q, shift, rounding):
    """round(x * q * 2^(shift - 31)), as exact fractions."""
    half = Fraction(1, 2)
    if rounding == "single":
        return math.floor(Fraction(x * q) * Fraction(2) ** (shift - 31) + half)
    high = math.floor(Fraction(x * 2 ** max(shift, 0) * q, 2**31) + half)
    exact = Fraction(min(high, 2**31 - 1), 2 ** max(-shift, 0))
    return math.floor(abs(exact) + half) * (1 if exact >= 0 else -1)


def nested(flat, shape):
    """A list of numbers as lists in lists of that shape."""
    if len(shape) == 1:
        return list(flat)
    step = len(flat) // shape[0]
    return [nested(flat[i * step : (i + 1) * step], shape[1:]) for i in range(shape[0])]


def array(entry):
    """An entry of the file as lists in lists, or as its number."""
    flat = entry.get("codes", entry.get("values"))
    return nested(flat, entry["shape"]) if entry["shape"] else flat[0]


def flatten(values):
    if not isinstance(values, list):
        return [values]
    return [number for item in values for number in flatten(item)]


def store(acc, parameters, rounding, channel=0):
    """The code of an accumulator; one multiplier serves all channels, or each has its own."""
    q = flatten(array(parameters["multiplier"]))
    shift = flatten(array(parameters["shift"]))
    i = channel if len(q) > 1 else 0
    code = array(parameters["zero_point"]) + rescale(acc, q[i], shift[i], rounding)
    return max(array(parameters["low"]), min(array(parameters["high"]), code))


def conv(x, parameters):
    """Accumulators {(image, output, row, column): acc} of a convolution, by its definition."""
    weight = array(parameters["weight"])
    bias = array(parameters["bias"])
    zero_point = parameters["zero_point_in"]
    stride_h, stride_w = parameters["stride"]
    padding_h, padding_w = parameters["padding"]
    dilation_h, dilation_w = parameters["dilation"]

    outputs = len(weight)
    channels = len(weight[0])  # of one group
    kernel_h = len(weight[0][0])
    kernel_w = len(weight[0][0][0])
    height = len(x[0][0])
    width = len(x[0][0][0])
    rows = (height + 2 * padding_h - dilation_h * (kernel_h - 1) - 1) // stride_h + 1
    columns = (width + 2 * padding_w - dilation_w * (kernel_w - 1) - 1) // stride_w + 1

    result = {}
    positions = itertools.product(range(len(x)), range(outputs), range(rows), range(columns))
    for image, output, row, column in positions:
        group = output // (outputs // parameters["groups"])
        acc = bias[output]
        taps = itertools.product(range(channels), range(kernel_h), range(kernel_w))
        for channel, u, v in taps:
            h = row * stride_h - padding_h + u * dilation_h
            w = column * stride_w - padding_w + v * dilation_w
            if 0 <= h < height and 0 <= w < width:  # padding stands for zero
                code = x[image][group * channels + channel][h][w]
                acc += (code - zero_point) * weight[output][channel][u][v]
        result[image, output, row, column] = acc
    return result


@vectors("conv")
def test_convolutions_by_definition(case):
    acc = conv(array(case["inputs"][0]), case["parameters"])
    codes = [store(value, case["parameters"], case["rounding"], channel)
             for (_, channel, _, _), value in acc.items()]
    assert list(acc.values()) == case["accumulator"]["codes"]
    assert codes == case["codes"]["codes"]


@vectors("linear")
def test_linear_layers_by_definition(case):
    parameters = case["parameters"]
    zero_point = parameters["zero_point_in"]
    acc = []
    for row in array(case["inputs"][0]):
        sums = []
        for weights, bias in zip(array(parameters["weight"]), array(parameters["bias"])):
            products = [(code - zero_point) * w for code, w in zip(row, weights)]
            sums.append(bias + sum(products))
        acc.append(sums)
    assert acc == array(case["accumulator"])

    codes = acc
    if "logits" not in case["operation"]:
        codes = [[store(value, parameters, case["rounding"], i) for i, value in enumerate(sums)]
                 for sums in acc]
    assert codes == array(case["codes"])


@vectors("add")
def test_add_by_definition(case):
    parameters, rounding = case["parameters"], case["rounding"]
    zero_points, multipliers, shifts = (
        array(parameters[key]) for key in ("zero_points", "multipliers", "shifts"))
    terms = []
    for i, x in enumerate(case["inputs"]):
        wide = [(code - zero_points[i]) << 20 for code in x["codes"]]
        terms.append([rescale(value, multipliers[i], shifts[i], rounding) for value in wide])
    codes = [store(a + b, parameters, rounding) for a, b in zip(*terms)]
    assert codes == case["codes"]["codes"]


@vectors("requantize")
def test_requantize_by_definition(case):
    parameters, rounding = case["parameters"], case["rounding"]
    codes = [store(code - parameters["zero_point_in"], parameters, rounding)
             for code in case["inputs"][0]["codes"]]
    assert codes == case["codes"]["codes"]


@vectors("concat")
def test_concat_by_definition(case):
    codes = []
    for part, x in zip(case["parameters"]["parts"], case["inputs"]):
        codes += [store(code - part["zero_point_in"], part, case["rounding"])
                  for code in x["codes"]]
    assert codes == case["codes"]["codes"]


@vectors("affine")
def test_affine_by_definition(case):
    parameters, x = case["parameters"], case["inputs"][0]
    weight = flatten(array(parameters["weight"]))
    bias = flatten(array(parameters["bias"]))
    _, channels, height, width = x["shape"]
    codes = []
    for i, code in enumerate(x["codes"]):
        channel = i // (height * width) % channels
        acc = (code - parameters["zero_point_in"]) * weight[channel] + bias[channel]
        codes.append(store(acc, parameters, case["rounding"], channel))
    assert codes == case["codes"]["codes"]


@vectors("max")
def test_maxima_by_definition(case):
    x = torch.tensor(array(case["inputs"][0])).double()
    expected = nn.functional.max_pool2d(x, 3, 2, 1)
    assert torch.equal(torch.tensor(array(case["codes"])).double(), expected)


AVERAGES = {
    "2x2": lambda x: nn.functional.avg_pool2d(x, 2),
    "3x3, padding counts": lambda x: nn.functional.avg_pool2d(x, 3, 2, 1),
    "3x3, padding does not count":
        lambda x: nn.functional.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
    "global": lambda x: x.mean((2, 3)),
    "adaptive 3x2": lambda x: nn.functional.adaptive_avg_pool2d(x, (3, 2)),
}


@vectors("average")
def test_averages_by_definition(case):
    """Averages as exact fractions rounded once, which the fixed-point form may miss by its own
    2^-31.
    """
    parameters, rounding = case["parameters"], case["rounding"]
    x = torch.tensor(array(case["inputs"][0])).double() - parameters["zero_point_in"]
    average = AVERAGES[case["operation"].removeprefix("average ")](x)
    acc = torch.tensor(array(case["accumulator"]))
    q = torch.tensor(array(parameters["multiplier"]))
    shift = torch.tensor(array(parameters["shift"]))
    ratio = (acc * q * 2.0 ** (shift.double() - 31)) / average  # s_in / s_out, the same everywhere
    middle = ratio.nanmedian()
    assert ratio.nan_to_num(middle).sub(middle).abs().max() < 1e-8 * middle

    zero_point, low, high = (array(parameters[key]) for key in ("zero_point", "low", "high"))
    flat = (tensor.expand_as(acc).flatten().tolist() for tensor in (acc, q, shift))
    codes = [zero_point + rescale(*row, rounding) for row in zip(*flat)]
    assert [max(low, min(high, code)) for code in codes] == case["codes"]["codes"]


@vectors("multiply")
def test_products_by_definition(case):
    rows = zip(case["x"], case["multiplier"], case["shift"])
    assert [rescale(*row, case["rounding"]) for row in rows] == case["codes"]


def test_multipliers_are_within_half_a_unit():
    case = next(case for case in VECTORS["cases"] if case["operation"] == "fixed_point")
    for real, q, shift in zip(case["real"], case["multiplier"], case["shift"]):
        real = Fraction(float.fromhex(real))
        error = abs(Fraction(q) * Fraction(2) ** (shift - 31) - real)
        assert error <= max(real / 2**31, Fraction(0 if q else 2**-32))


def test_golden_vectors_are_what_the_command_writes(tmp_path):
    golden.write(tmp_path / "again.json")
    assert read_text(tmp_path / "again.json") == read_text(golden.PATH), "run: python golden.py"
    assert golden.PATH.stat().st_size < 300_000


# ---- ONNX Runtime's integer operators, which multiply in float32 and round half to even ----------


def ort_run(op, inputs, constants, attributes=None, domain=""):
    """Outputs of one ONNX operator; inputs: ordered {name: array}, of which `constants` are the
    rest of its arguments.
    """
    onnx, ort = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    values = {name: value.numpy() if isinstance(value, torch.Tensor) else value
              for name, value in {**inputs, **constants}.items()}
    h = onnx.helper
    node = h.make_node(op, list(values), ["y"], domain=domain, **(attributes or {}))
    infos = [h.make_tensor_value_info(name, h.np_dtype_to_tensor_dtype(value.dtype), value.shape)
             for name, value in values.items()]
    out = h.make_tensor_value_info("y", onnx.TensorProto.UINT8, None)
    graph = h.make_graph([node], "one", infos, [out])
    opsets = [h.make_opsetid("", 17), h.make_opsetid("com.microsoft", 1)]
    model = h.make_model(graph, opset_imports=opsets, ir_version=8)
    session = ort.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, values)[0])


def unsigned_grid(low, high):
    return ops.Grid.of(choose_qparams(low, high, 8))


def ort_constants(grid):
    return grid.q.scale.numpy(), grid.q.zero_point.to(torch.uint8).numpy()


def layer_codes(layer, grid_in, bits=7):
    """(weight codes, bias codes) of a float layer, which gets weight_qparams.

    7 bits: no 8-bit product saturates on any processor.
    """
    weight = layer.weight.detach()
    top = weight.abs().flatten(1).amax(1)
    q = choose_qparams(-top, top, bits, symmetric=True, axis=0)
    layer.weight_qparams = q
    bias = None
    if layer.bias is not None:
        scale = grid_in.scale * q.scale.double()
        bias = torch.round(layer.bias.detach().double() / scale).int()
    return quantize_tensor(weight, q), bias


def nearly_equal(ours, theirs, fraction=2e-3):
    """At most one code apart, and that rarely: they differ where a value is next to a tie."""
    difference = (ours.int() - theirs.int()).abs()
    differing = (difference != 0).double().mean()
    assert difference.max() <= 1 and differing <= fraction, (difference.max(), differing)


@pytest.mark.parametrize("options", [
    {"padding": 1}, {"stride": 2, "padding": 1}, {"groups": 4},
    {"groups": 8, "padding": 2, "dilation": 2}], ids=str)
def test_convolution_against_onnx_runtime(options):
    grid_in, out = unsigned_grid(-1.5, 2.5), unsigned_grid(-2.0, 2.0)
    layer = nn.Conv2d(8, 16 if options.get("groups") != 8 else 8, 3, **options)
    op = ops.Conv("conv", layer, *layer_codes(layer, grid_in), grid_in, out, "single")
    x = torch.randint(0, 256, (4, 8, 12, 12), dtype=torch.int32)
    (s_in, z_in), (s_out, z_out) = ort_constants(grid_in), ort_constants(out)
    constants = {
        "xs": s_in, "xz": z_in, "w": op.weight.to(torch.int8), "ws": layer.weight_qparams.scale,
        "wz": torch.zeros(len(layer.weight), dtype=torch.int8), "ys": s_out, "yz": z_out,
        "b": op.bias}
    attributes = {"pads": [layer.padding[0]] * 4, "strides": layer.stride,
                  "dilations": layer.dilation, "group": layer.groups}
    theirs = ort_run("QLinearConv", {"x": x.to(torch.uint8)}, constants, attributes)
    nearly_equal(op(x), theirs)


def test_linear_against_onnx_runtime():
    grid_in, out = unsigned_grid(-1.0, 3.0), unsigned_grid(-2.0, 2.0)
    layer = nn.Linear(64, 32, bias=False)
    op = ops.Linear("linear", layer, *layer_codes(layer, grid_in), grid_in, out, "single")
    x = torch.randint(0, 256, (256, 64), dtype=torch.int32)
    (s_in, z_in), (s_out, z_out) = ort_constants(grid_in), ort_constants(out)
    constants = {
        "xs": s_in, "xz": z_in, "w": op.weight.t().to(torch.int8).contiguous(),
        "ws": layer.weight_qparams.scale, "wz": torch.zeros(32, dtype=torch.int8),
        "ys": s_out, "yz": z_out}
    nearly_equal(op(x), ort_run("QLinearMatMul", {"x": x.to(torch.uint8)}, constants))


def test_add_against_onnx_runtime():
    a, b, out = unsigned_grid(-1.0, 3.0), unsigned_grid(0.0, 1.3), unsigned_grid(-0.7, 3.9)
    op = ops.Add("add", (a, b), out, "single")
    x, y = (torch.randint(0, 256, (100_000,), dtype=torch.int32) for _ in range(2))
    (sa, za), (sb, zb), (so, zo) = (ort_constants(grid) for grid in (a, b, out))
    inputs = {"a": x.to(torch.uint8), "as": sa, "az": za, "b": y.to(torch.uint8)}
    constants = {"bs": sb, "bz": zb, "os": so, "oz": zo}
    nearly_equal(op(x, y), ort_run("QLinearAdd", inputs, constants, domain="com.microsoft"), 0.01)
    exact = a.scale * (x - a.zero_point).double() + b.scale * (y - b.zero_point).double()
    exact = exact / out.scale + out.zero_point
    clear = (exact - exact.floor() - 0.5).abs() > 1e-5  # of a tie
    rounded = exact.round().clamp(0, 255).int()
    assert torch.equal(op(x, y)[clear], rounded[clear]), (
        "where they differ, ours is the exact sum rounded")


@pytest.mark.parametrize("count_include_pad", [0, 1])
def test_average_pool_against_onnx_runtime(count_include_pad):
    grid, out = unsigned_grid(-1.0, 3.0), unsigned_grid(-0.7, 2.6)
    windows = (pools.Windows(3, 2, 1, count_include_pad=bool(count_include_pad)),) * 2
    op = pools.Average("average", grid, out, "single", windows)
    x = torch.randint(0, 256, (4, 8, 13, 13), dtype=torch.int32)
    (s, z), (so, zo) = ort_constants(grid), ort_constants(out)
    attributes = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1] * 4,
                  "count_include_pad": count_include_pad}
    constants = {"s": s, "z": z, "so": so, "zo": zo}
    theirs = ort_run("QLinearAveragePool", {"x": x.to(torch.uint8)}, constants, attributes,
                     "com.microsoft")
    # ONNX Runtime pads with code 0, which stands for zero only where the zero point is 0: compare
    # inside
    inside = slice(1, -1) if count_include_pad else slice(None)
    nearly_equal(op(x)[..., inside, inside], theirs[..., inside, inside], 0.02)


@pytest.mark.parametrize("ceil_mode", [0, 1])
def test_max_pool_against_onnx_runtime(ceil_mode):
    x = torch.randint(0, 256, (2, 4, 14, 14), dtype=torch.int32)
    attributes = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1] * 4,
                  "ceil_mode": ceil_mode}
    theirs = ort_run("MaxPool", {"x": x.to(torch.uint8)}, {}, attributes)
    windows = (pools.Windows(3, 2, 1, ceil_mode=bool(ceil_mode)),) * 2
    assert torch.equal(pools.MaxPool(windows)(x), theirs.int())
    stored = (x - 128).to(torch.int8)
    assert torch.equal(fast.MaxPool(windows)(stored).int() + 128, theirs.int())


# ---- Pooling windows against torch, sizes and modes that real networks use -----------------------


# codes that are the numbers themselves
UNITS = ops.Grid.of(QParams(torch.tensor(1.0), torch.tensor(0), -127, 127))


@pytest.mark.parametrize("size", [5, 7, 8])
@pytest.mark.parametrize("options", [
    {"kernel": 2, "stride": 2}, {"kernel": 3, "stride": 2, "padding": 1},
    {"kernel": 3, "stride": 2, "ceil_mode": True},
    {"kernel": 3, "stride": 2, "padding": 1, "ceil_mode": True}], ids=str)
def test_windows_are_torchs(size, options):
    x = torch.randint(-50, 50, (2, 3, size, size))
    torchs = {"kernel_size" if key == "kernel" else key: value for key, value in options.items()}
    found = pools.MaxPool((pools.Windows(**options),) * 2)(x)
    assert torch.equal(found.double(), nn.MaxPool2d(**torchs)(x.double()))
    for include in (True, False):
        windows = (pools.Windows(**options, count_include_pad=include),) * 2
        op = pools.Average("a", UNITS, None, "single", windows)
        average = op(x.int()) * op.acc_scale
        expected = nn.AvgPool2d(**torchs, count_include_pad=include)(x.double())
        assert torch.allclose(average, expected)


@pytest.mark.parametrize("size, output", [(2, 7), (8, 4), (7, 3), (5, 1)])
def test_adaptive_windows_are_torchs(size, output):
    x = torch.randint(-50, 50, (2, 3, size, size))
    windows = (pools.Windows(output=output),) * 2
    assert torch.equal(pools.MaxPool(windows)(x).double(), nn.AdaptiveMaxPool2d(output)(x.double()))
    op = pools.Average("a", UNITS, None, "single", windows)
    assert torch.allclose(op(x.int()) * op.acc_scale, nn.AdaptiveAvgPool2d(output)(x.double()))


# ---- Overflow and other bad input ----------------------------------------------------------------


def test_accumulator_overflow_names_the_layer():
    layer = nn.Linear(70_000, 1, bias=False)
    layer.weight_qparams = choose_qparams(-torch.ones(1), torch.ones(1), 8, symmetric=True, axis=0)
    codes = torch.full((1, 70_000), 127, dtype=torch.int32)
    grid = unsigned_grid(0, 1)
    with pytest.raises(ql.UserError, match="huge: the accumulator needs 33 bits and has 32"):
        ops.Linear("huge", layer, codes, None, grid, None, "single")
    op = ops.Linear("fits", layer, codes[:, :60_000], None, grid, None, "single")
    largest = op(torch.full((1, 60_000), 255, dtype=torch.int32)).item()
    assert op.accumulator_bits == 32 and largest == 60_000 * 127 * 255


def test_a_scale_out_of_reach_names_the_layer():
    grid, layer = unsigned_grid(0, 1), nn.Conv2d(1, 1, 1)
    codes = layer_codes(layer, grid, bits=8)
    with pytest.raises(ql.UserError, match="steep: .*(leave int32|no fixed-point form)"):
        ops.Conv("steep", layer, *codes, grid, unsigned_grid(0, 1e-9), "single")


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
    real = torch.rand(24, generator=generator, dtype=torch.float64) * 2**-14
    multiplier, shift = fixedpoint.fixed_point(real)
    requantization = fixedpoint.Requantization(multiplier, shift, -5, -128, 120, rounding)
    expected = gemm.run_rows(gemm.store_rows, (acc,), bias, requantization)
    found = gemm.compiled(gemm.store_rows)(acc, bias, requantization)
    assert torch.equal(found, expected) and len(expected.unique()) > 50
