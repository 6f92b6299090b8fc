"""The whole network in integers: two executors and the simulation agree, no float exists inside,
and what cannot be done is named.
"""

import copy
import re
import subprocess
import sys
import time

import pytest
import torch
from conftest import equal_codes
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

import quantlab as ql
from quantlab.integer import proof
from quantlab.integer.fast import gemm
from quantlab.integer.fast import operations as fast
from quantlab.integer.network import IntegerRun, to_integer

CONFIGS = [
    ql.QuantConfig(8, 8), ql.QuantConfig(4, 4),
    ql.QuantConfig(2, 3, residual_bits=6, first_last_bits=8),
    ql.QuantConfig(8, 8, weight_symmetric=False, per_channel=False, act_symmetric=True),
]


@pytest.fixture(scope="module")
def qmodel(resnet20, stats):
    return ql.quantize(resnet20, stats, ql.QuantConfig(4, 4))


class OnlyIntegers(TorchDispatchMode):
    """Fails on every operator that gives a floating-point tensor, inside modules as well."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                assert not tensor.is_floating_point(), f"{func} gives {tensor.dtype}"
        return result


@pytest.mark.parametrize("executor, compile", [
    ("reference", False), ("fast", False), ("fast", None)])
def test_no_operator_inside_gives_a_float(qmodel, digits, executor, compile):
    imodel = to_integer(qmodel, executor=executor, compile=compile)
    codes = imodel.input_codes(next(iter(digits.calibration(2))))
    imodel.network(codes)  # the average's multipliers are made at the first image of a size
    with OnlyIntegers():
        logits = imodel.network(codes)
    assert logits.dtype == torch.int32
    with pytest.raises(AssertionError, match="is torch.float32: only integers may exist"):
        IntegerRun(imodel.network).run(codes.float())


@pytest.mark.parametrize("rounding", ["single", "double"])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_executors_agree_code_for_code(resnet20, stats, digits, config, rounding):
    """16 images for each setting, for time; 256 in the next test."""
    qmodel = ql.quantize(resnet20, stats, config)
    x = next(iter(digits.calibration(16, seed=1)))
    codes = to_integer(qmodel, rounding, "fast", compile=False).codes(x)
    assert equal_codes(to_integer(qmodel, rounding).codes(x), codes)


def test_executors_agree_on_256_images(qmodel, digits):
    reference, fast = to_integer(qmodel), to_integer(qmodel, executor="fast", compile=False)
    batches = list(digits.calibration(256, seed=2))
    assert sum(len(batch) for batch in batches) == 256
    assert all(equal_codes(reference.codes(batch), fast.codes(batch)) for batch in batches)


@pytest.mark.parametrize("rounding", ["single", "double"])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_compiled_kernels_agree(resnet20, stats, digits, config, rounding):
    if not fast.has_compiler("cpu"):
        pytest.skip("no C compiler")
    qmodel = ql.quantize(resnet20, stats, config)
    imodel = copy.deepcopy(to_integer(qmodel, rounding, "fast"))
    for seed, batch in ((3, 16), (4, 1)):
        x = next(iter(digits.calibration(batch, seed=seed)))
        assert equal_codes(imodel.codes(x), to_integer(qmodel, rounding).codes(x))
    assert equal_codes(copy.deepcopy(imodel).codes(x), imodel.codes(x)), "a copy is as good"


def test_the_reference_runs_without_the_fast_executor():
    script = (
        "import sys, torch, quantlab as ql; from torch import nn\n"
        "from quantlab.integer import network, proof\n"
        "model, x = nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU(), nn.Conv2d(2, 2, 1)).eval(), "
        "torch.randn(1, 3, 4, 4)\n"
        "network.to_integer(ql.quantize(model, ql.collect(model, [x])))(x)\n"
        "assert not any(name.startswith('quantlab.integer.fast.') for name in sys.modules)")
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("executor", ["reference", "fast"])
def test_conversion_leaves_the_network_alone(executor):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Flatten(2), nn.Unflatten(2, (6, 6)),
                          nn.Conv2d(4, 2, 1), nn.Flatten())
    x = torch.randn(2, 3, 6, 6)
    qmodel = ql.quantize(model, ql.collect(model, [x])).train()

    def state():
        return {name: (type(module), sorted(vars(module)), module.training)
                for name, module in qmodel.named_modules()}

    before, tensors = state(), copy.deepcopy(qmodel.state_dict())
    imodel = to_integer(qmodel, executor=executor)
    imodel(x)
    assert "rearrange" in {op.kind for op in imodel.operations.values()}
    assert state() == before
    assert all(torch.equal(qmodel.state_dict()[key], value) for key, value in tensors.items())


def saturating(a, b):  # as a processor without VNNI may
    return (a.int() @ b.int()).clamp(-(2**15), 2**15 - 1)


def plain_loop(a, b):  # as torch does where no library has a kernel
    time.sleep(0.05)
    return a.int() @ b.int()


@pytest.mark.parametrize("product, why", [
    (saturating, "saturates on this processor"), (plain_loop, "has no kernel for this processor")])
def test_without_the_integer_gemm_the_result_is_the_same(qmodel, digits, monkeypatch, product, why):
    x = next(iter(digits.calibration(4, seed=3)))
    expected = to_integer(qmodel).codes(x)
    gemm.has_integer_gemm.cache_clear()
    monkeypatch.setattr(torch, "_int_mm", product)
    try:
        with pytest.warns(UserWarning, match=f"{why}.*exact but slow"):
            codes = to_integer(qmodel, executor="fast", compile=False).codes(x)
        assert equal_codes(codes, expected)
    finally:
        gemm.has_integer_gemm.cache_clear()


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_operation_is_within_one_code_of_the_simulation(resnet20, stats, digits, config):
    qmodel = ql.quantize(resnet20, stats, config)
    batches = list(digits.calibration(24, seed=4))
    frame, double = (
        proof.per_operation(qmodel, to_integer(qmodel, rounding, "fast", compile=False), batches)
        for rounding in ("single", "double"))
    assert set(frame.edge) | {"x"} == {name for name, _ in qmodel.quantizers.named_children()}
    assert frame.max_difference.max() <= 1
    assert frame.share.max() < 1e-3 and frame.from_tie.max() < 1e-4, "few, and only next to a tie"
    assert double.max_difference.max() <= 1
    assert double.differing.sum() > frame.differing.sum()


def test_end_to_end_the_input_is_equal_and_predictions_agree(resnet20, stats, digits):
    qmodel = ql.quantize(resnet20, stats, ql.QuantConfig(8, 8))
    imodel = to_integer(qmodel, executor="fast", compile=False)
    frame = proof.end_to_end(qmodel, imodel, digits.calibration(64, seed=4))
    assert frame.edge[0] == "x" and frame.differing[0] == 0 and len(frame) == len(imodel.stored)
    simulated, ours = (ql.evaluate(m, digits.test) for m in (qmodel, imodel))
    assert (simulated.predictions == ours.predictions).double().mean() >= 0.999
    images = next(iter(digits.calibration(32, seed=5)))
    difference = (qmodel(images) - imodel(images)).abs().max()
    assert difference < 0.02 * qmodel(images).std(), (
        "one code of the last layer's input at most moves a logit this much")


def test_logits_are_int32_times_their_scale(qmodel, digits):
    imodel = to_integer(qmodel)
    x = next(iter(digits.calibration(4)))
    codes = imodel.codes(x)
    assert codes["logits"].dtype == torch.int32
    scale = qmodel.quantizers.adaptive_avg_pool2d.scale.double()
    scale = scale * qmodel.fc.weight_qparams.scale.double()
    assert torch.equal(imodel(x), (codes["logits"] * scale).float())


# ---- What it costs -------------------------------------------------------------------------------


def test_report(resnet20, stats):
    qmodel = ql.quantize(resnet20, stats, ql.QuantConfig(4, 4))
    reports = [to_integer(qmodel, executor=executor, compile=False).report((3, 32, 32))
               for executor in ("reference", "fast")]
    assert reports[0].equals(reports[1])
    frame = reports[0].set_index("layer")
    assert frame.macs["conv1"] == 3 * 16 * 9 * 32 * 32
    assert frame.bops["layer1_0_conv1"] == frame.macs["layer1_0_conv1"] * 4 * 4
    assert frame.bops["conv1"] == frame.macs["conv1"] * 8 * 4, "the image has 8 bits"
    assert frame.live_bytes["conv1"] == 3 * 1024 + 16 * 1024, "the image and what conv1 writes"
    assert frame.live_bytes["layer1_0_add"] == 3 * 16 * 1024, "two operands and their sum"
    assert frame.live_bytes.max() == 3 * 16 * 1024
    assert frame.accumulator_bits["layer1_0_conv1"] <= 4 + 4 + 8
    assert frame.accumulator_bits["layer1_0_add"] <= 30


# ---- Bad input -----------------------------------------------------------------------------------


def test_what_is_no_quantized_model(resnet20, qmodel):
    for model in (resnet20, fx.symbolic_trace(resnet20)):
        with pytest.raises(ql.UserError, match="is not calibrated; give to_integer what quantize"):
            to_integer(model)
    with pytest.raises(ql.UserError, match="use one of: single, double"):
        to_integer(qmodel, rounding="stochastic")
    with pytest.raises(ql.UserError, match="use one of: reference, fast"):
        to_integer(qmodel, executor="gpu")


def test_simulation_only_is_refused_by_name(resnet20, stats):
    with pytest.raises(ql.UserError, match="node relu is stored as float"):
        to_integer(ql.quantize(resnet20, stats, ql.QuantConfig(residual_bits=None)))


def test_weights_and_biases_that_are_no_codes_are_refused_by_name(qmodel):
    changed = copy.deepcopy(qmodel)
    with torch.no_grad():
        changed.layers["layer2_0_conv1"].weight += 0.0003
    with pytest.raises(ql.UserError, match="the weight of layer2_0_conv1 is not the value of its"):
        to_integer(changed)
    for bias in (1e-3, 1e9):
        changed = copy.deepcopy(qmodel)
        with torch.no_grad():
            changed.fc.bias += bias
        with pytest.raises(ql.UserError, match="the bias of fc is not a multiple of s_in \\* s_w"):
            to_integer(changed)


@pytest.mark.parametrize("layers, node", [
    ([nn.Conv2d(3, 4, 1), nn.Hardswish(), nn.Conv2d(4, 2, 1)], "_1 (Hardswish)"),
    ([nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), nn.ReLU(), nn.Conv2d(4, 2, 1)],
     "_0 (Conv2d)"),
    ([nn.Conv2d(3, 4, 1), nn.Flatten(2), nn.Conv1d(4, 2, 1)], "_2 (Conv1d)"),
    ([nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False), nn.Conv2d(4, 2, 1)],
     "_1 (BatchNorm2d)"),
    ([nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Flatten(2), nn.BatchNorm1d(4), nn.Linear(36, 2)],
     "_3 (BatchNorm1d)"),
], ids=["hardswish", "reflect", "conv1d", "batchnorm", "batchnorm over places"])
def test_operations_without_integer_form_are_named(layers, node):
    model = nn.Sequential(*layers).eval()
    qmodel = ql.quantize(model, ql.collect(model, [torch.randn(2, 3, 6, 6)]))
    with pytest.raises(ql.UserError, match=re.escape(f"node {node} has no integer form here")):
        to_integer(qmodel)


def test_an_edge_without_parameters_is_named(resnet20, stats):
    qmodel = ql.quantize(resnet20, stats)
    node = next(n for n in qmodel.graph.nodes if n.target == "quantizers.layer2_0_relu")
    node.replace_all_uses_with(node.args[0])
    qmodel.graph.erase_node(node)
    qmodel.recompile()
    message = "node layer2_0_conv2 reads layer2_0_relu, which has no quantization parameters"
    with pytest.raises(ql.UserError, match=message):
        to_integer(qmodel)
