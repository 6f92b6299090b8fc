"""Packed checkpoints come back bit for bit, and ONNX Runtime, which knows nothing of us, computes the codes of our graph."""

import dataclasses
import json
import pickle
import sys

import pytest
import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_graph import Tangle, randomize_batchnorm
from torch import nn

import quantlab as ql
from quantlab.export import packed
from quantlab.export.codes import pack, unpack
from quantlab.export.onnx_operators import OperatorWriter
from quantlab.graph import fold, trace
from quantlab.rivals import onnxruntime as onnx_runtime

try:
    import onnx
    import onnxruntime  # noqa: F401
except ImportError:
    onnx = None
needs_onnx = pytest.mark.skipif(onnx is None, reason="onnx and onnxruntime are not installed (pip install onnx onnxruntime)")

CONFIGS = [
    ql.QuantConfig(8, 8), ql.QuantConfig(4, 4), ql.QuantConfig(2, 3, residual_bits=6, first_last_bits=8),
    ql.QuantConfig(3, 5, residual_bits=None), ql.QuantConfig(6, 7, act_symmetric=True, act_signed=True), ql.QuantConfig(5, 2, weight_symmetric=False, per_channel=False),
    ql.QuantConfig(8, 8, weight_symmetric=False), ql.QuantConfig(7, 6, weight_symmetric=False, per_channel=False),
    ql.QuantConfig(8, 4, placement="inputs"),
]
CONFIGS = [dataclasses.replace(config, observer="minmax", weight_observer="minmax") for config in CONFIGS] + [ql.QuantConfig(4, 4)]


@pytest.fixture(scope="module", params=CONFIGS, ids=str)
def qmodel(request, resnet20, stats, digits):
    """ResNet-20 on the digits in every form that the configuration allows."""
    if request.param.placement != "fused":
        stats = ql.collect(resnet20, digits.calibration(32), request.param.placement)
    return ql.quantize(resnet20, stats, request.param)


def make_quantized(model, x, config=ql.QuantConfig(4, 4, weight_observer="minmax", observer="minmax")):
    return ql.quantize(model, ql.collect(model, [x], config.placement), config)


def tiny(width=4):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.Flatten(), nn.Linear(width * 36, 5))
    return model.eval()


# ---- Packed checkpoints -----------------------------------------------------------------------------------------------------


@given(st.integers(2, 8), st.data())
@settings(max_examples=200, deadline=None)
def test_packing_is_one_little_endian_number(bits, data):
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=70))
    stream = pack(torch.tensor(codes, dtype=torch.int32), bits)
    number = sum(code << (i * bits) for i, code in enumerate(codes))
    assert bytes(stream.tolist()) == number.to_bytes(-(-len(codes) * bits // 8), "little")
    assert unpack(stream, bits, len(codes)).tolist() == codes


def test_codes_that_do_not_fit_and_streams_of_another_length():
    with pytest.raises(ql.UserError, match=r"codes 0..8 do not fit in 3 bits"):
        pack(torch.tensor([0, 8]), 3)
    with pytest.raises(ql.UserError, match=r"codes -1..1 do not fit in 8 bits"):
        pack(torch.tensor([-1, 1]), 8)
    with pytest.raises(ql.UserError, match="3 bytes do not hold 9 codes of 3 bits, which take 4"):
        unpack(torch.zeros(3, dtype=torch.uint8), 3, 9)


def test_a_loaded_network_is_the_saved_one_bit_for_bit(qmodel, digits, tmp_path):
    path = tmp_path / "model.safetensors"
    assert ql.save_quantized(qmodel, path) == path.stat().st_size
    loaded = ql.load_quantized(path, ql.load_model("resnet20"))  # random weights: all of them are replaced
    x = next(iter(digits.calibration(8, seed=5)))
    assert torch.equal(loaded(x), qmodel(x))
    assert str(loaded.graph) == str(qmodel.graph) and (loaded.plan, loaded.config) == (qmodel.plan, qmodel.config)
    for name in packed.layers(qmodel, qmodel.plan):
        ours, theirs = (g.get_submodule(packed.find_node(g, name).target).weight_qparams for g in (qmodel, loaded))
        assert torch.equal(ours.scale, theirs.scale) and torch.equal(ours.zero_point, theirs.zero_point)
        assert (ours.qmin, ours.qmax, ours.axis) == (theirs.qmin, theirs.qmax, theirs.axis)
    assert ql.weight_bytes(loaded) == ql.weight_bytes(qmodel)
    assert ql.save_quantized(loaded, tmp_path / "again.safetensors") and (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("bits", range(2, 9))
def test_batchnorm_that_cannot_be_folded_comes_back(bits, tmp_path):
    model, x = randomize_batchnorm(Tangle()), torch.randn(4, 3, 16, 16)
    qmodel = make_quantized(model, x, ql.QuantConfig(bits, bits, observer="minmax", weight_observer="minmax"))
    ql.save_quantized(qmodel, tmp_path / "tangle.safetensors")
    assert torch.equal(ql.load_quantized(tmp_path / "tangle.safetensors", Tangle())(x), qmodel(x))


def test_mixed_precision_and_a_bias_of_its_own(tmp_path):
    """Widths that no QuantConfig describes, and a bias that is no multiple of s_in * s_w: both are stored as they are."""
    model, x = tiny(), torch.randn(4, 3, 8, 8)
    qmodel = make_quantized(model, x)
    conv = qmodel.get_submodule("0")
    q = conv.weight_qparams = ql.choose_qparams(-0.3, 0.3, 7, symmetric=True)
    with torch.no_grad():
        conv.weight.copy_(ql.fake_quantize(conv.weight, q))
        conv.bias.add_(1e-4)
    ql.save_quantized(qmodel, tmp_path / "mixed.safetensors")
    loaded = ql.load_quantized(tmp_path / "mixed.safetensors", tiny())
    assert torch.equal(loaded(x), qmodel(x)) and loaded.get_submodule("0").weight_qparams.bits == 7


def test_an_observer_of_ones_own_is_remembered_by_name(tmp_path):
    def own(edge, bits, symmetric):
        return edge.minimum, edge.maximum

    qmodel = make_quantized(tiny(), torch.randn(2, 3, 8, 8), ql.QuantConfig(4, 4, observer=own))
    ql.save_quantized(qmodel, tmp_path / "own.safetensors")
    config = ql.load_quantized(tmp_path / "own.safetensors", tiny()).config
    assert config.observer.__name__ == "own"
    with pytest.raises(ql.UserError, match="'own' is a function that the file does not hold"):
        ql.quantize(tiny(), ql.collect(tiny(), [torch.randn(2, 3, 8, 8)]), config)


def test_files_hold_packed_codes_and_nothing_else(resnet20, stats, tmp_path):
    configs = {f"w{b}": ql.QuantConfig(b, 8, observer="minmax", weight_observer="minmax") for b in (8, 5, 2)}
    networks = {"float": resnet20} | {name: ql.quantize(resnet20, stats, config) for name, config in configs.items()}
    sizes = packed.file_sizes(networks, tmp_path).set_index("name")
    for name in ("w8", "w5", "w2"):
        header = 8 + int.from_bytes((tmp_path / f"{name}.safetensors").read_bytes()[:8], "little")
        quantizers = len(list(networks[name].quantizers.children()))  # their scale and zero-point are in the description
        assert sizes.file_bytes[name] - header == sizes.weight_bytes[name] - 8 * quantizers
    assert sizes.file_bytes["float"] / sizes.file_bytes["w2"] > 10


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "model.safetensors"
    ql.save_quantized(make_quantized(tiny(), torch.randn(2, 3, 8, 8)), path)
    return path


def edit(path, change):
    """Rewrite the file with its description changed, checksum left alone."""
    with safetensors.safe_open(path, "pt") as file:
        about, tensors = json.loads(file.metadata()["quantlab"]), {k: file.get_tensor(k) for k in file.keys()}
    change(about)
    safetensors.torch.save_file(tensors, path, {"quantlab": json.dumps(about)})


def test_every_damage_is_named(saved):
    content = saved.read_bytes()
    for cut in (0, 7, 100, len(content) // 2, len(content) - 1):
        saved.write_bytes(content[:cut])
        with pytest.raises(ql.UserError, match="is damaged"):
            ql.load_quantized(saved, tiny())
    for at in (len(content) - 1, len(content) - 300):
        saved.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(ql.UserError, match="does not match its checksum"):
            ql.load_quantized(saved, tiny())
    saved.write_bytes(content)
    edit(saved, lambda about: about["quantizers"][0].update(scale=2.0))
    with pytest.raises(ql.UserError, match="does not match its checksum"):
        ql.load_quantized(saved, tiny())
    edit(saved, lambda about: about.update(version=packed.VERSION + 1))
    with pytest.raises(ql.UserError, match="has format version 2, this quantlab reads 1"):
        ql.load_quantized(saved, tiny())


def test_another_network_is_refused(saved):
    with pytest.raises(ql.UserError, match=r"weight of _0 is \[4, 3, 3, 3\] there and \[6, 3, 3, 3\] here"):
        ql.load_quantized(saved, tiny(width=6))
    with pytest.raises(ql.UserError, match="layer _3 is missing here"):
        ql.load_quantized(saved, nn.Sequential(nn.Conv2d(3, 4, 3)))
    other = tiny()
    other[0].padding_mode = "reflect"
    with pytest.raises(ql.UserError, match="other operations or settings"):
        ql.load_quantized(saved, other)


def test_what_is_no_packed_checkpoint(tmp_path, resnet20):
    with pytest.raises(ql.UserError, match="not found"):
        ql.load_quantized(tmp_path / "nothing.safetensors", resnet20)
    with pytest.raises(ql.UserError, match="is not a packed quantized network"):
        ql.load_quantized(ql.root() / "checkpoint" / "resnet20-digits.safetensors", resnet20)
    with pytest.raises(ql.UserError, match="ResNet20 is not a quantized network"):
        ql.save_quantized(resnet20, tmp_path / "float.safetensors")


def test_loading_executes_nothing(tmp_path):
    class Trap:
        def __reduce__(self):
            return (tmp_path.joinpath("sprung").touch, ())

    (tmp_path / "trap.safetensors").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ql.UserError, match="is damaged or no safetensors file"):
        ql.load_quantized(tmp_path / "trap.safetensors", tiny())
    assert not (tmp_path / "sprung").exists()


def test_a_failed_save_leaves_the_old_file(saved):
    before, qmodel = saved.read_bytes(), make_quantized(tiny(), torch.randn(2, 3, 8, 8))
    with torch.no_grad():
        qmodel.get_submodule("3").weight[0, 0] += 1e-3
    with pytest.raises(ql.UserError, match="Linear.* is not the value of a code"):
        ql.save_quantized(qmodel, saved)
    assert saved.read_bytes() == before and [p.name for p in saved.parent.iterdir()] == [saved.name]


# ---- ONNX: the float operators ----------------------------------------------------------------------------------------------


class Call(nn.Module):
    """A function of the image as a network."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Channelwise(nn.Module):
    """Shape arithmetic as people write it: a channel shuffle, slices, a chunk, a mean, a constant."""

    def __init__(self):
        super().__init__()
        self.register_buffer("gain", torch.tensor([1.0, -2.0, 0.5, 3.0]).view(1, 4, 1, 1))
        self.fc = nn.Linear(6, 3)

    def forward(self, x):
        batch, channels, height, width = x.size()
        x = x.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(batch, channels, height, width)
        first, second = torch.chunk(x * self.gain, 2, dim=1)
        x = torch.cat([second - 1.5, first / height, x[:, 1:3]], dim=1)
        y = x[:, 0].unsqueeze(1) + x[..., :1]
        return self.fc((x.permute(0, 2, 3, 1) + y.mean((2, 3)).view(batch, 1, 1, -1))[:, -1]).softmax(-1).flatten(1)


OPERATIONS = {
    "ceil_mode": lambda x: F.max_pool2d(x, 3, 2, ceil_mode=True) + F.avg_pool2d(x, 3, 2, ceil_mode=True),
    "adaptive": lambda x: F.adaptive_avg_pool2d(x, (4, 3)),
    "adaptive up": lambda x: F.adaptive_avg_pool2d(x, 13),
    "adaptive max": lambda x: F.adaptive_max_pool2d(x, (1, 1)) + F.adaptive_avg_pool2d(x, 1),
    "hard": lambda x: F.hardswish(x) * F.hardsigmoid(x) + F.relu6(x) - F.hardtanh(x, -0.5, 0.25) + torch.clamp(x, min=-0.1),
    "smooth": lambda x: F.silu(x) + torch.sigmoid(x) + torch.tanh(x) + F.leaky_relu(x, 0.1) + F.softmax(x, dim=1),
    "shuffles": lambda x: F.pixel_shuffle(F.channel_shuffle(x, 2), 2).squeeze(1),
    "padding": lambda x: F.pad(F.pad(x[:, :, ::2, 1:], (0, 1, 2, 0, 1, 3), value=-2.0), (1, 2, 0, 1), "replicate"),
    "numbers": lambda x: 1 - x * x.size(1) / 3,
}


@pytest.fixture
def file(tmp_path):
    return str(tmp_path / "model.onnx")


def assert_same_floats(model, x, file, atol=2e-6):
    expected = model(x).detach()
    ql.export_onnx(fold(trace(model)), file, x.shape[1:])
    for optimize in (False, True):
        run = onnx_runtime.OnnxModel(file, optimize)
        for part in (slice(None), slice(0, 1)):  # the batch size is free
            assert torch.allclose(run(x[part]), expected[part], atol=atol * max(1, expected.abs().max().item()))


@needs_onnx
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_has_torchs_meaning(name, file):
    assert_same_floats(Call(OPERATIONS[name]), torch.randn(3, 4, 10, 9) * 3, file)


@needs_onnx
def test_shape_arithmetic(file):
    assert_same_floats(Channelwise().eval(), torch.randn(3, 4, 5, 5), file)


@needs_onnx
@pytest.mark.parametrize("layer", [
    nn.Conv2d(4, 8, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2), nn.Conv2d(4, 4, 3, padding="same", dilation=2),
    nn.Conv2d(4, 2, 3, padding="valid"),
    nn.Conv2d(4, 2, 3, padding=1, padding_mode="reflect", bias=False), nn.ZeroPad2d((1, 0, 2, 3)), nn.BatchNorm2d(4, affine=False),
    nn.Linear(9, 3), nn.Linear(9, 3, bias=False),
    nn.Sequential(nn.Flatten(), nn.Linear(360, 6), nn.Unflatten(1, (2, 3))), nn.ChannelShuffle(2), nn.ReLU6(), nn.Hardtanh(-2, 0.5),
], ids=str)
def test_a_layer_has_torchs_meaning(layer, file):
    assert_same_floats(nn.Sequential(layer).eval(), torch.randn(3, 4, 10, 9), file)


@needs_onnx
@given(st.data())
@settings(max_examples=60, deadline=None)
def test_pools_of_any_window(data):
    kernel = data.draw(st.integers(1, 4))
    size, stride, padding = data.draw(st.integers(kernel, 9)), data.draw(st.integers(1, 4)), data.draw(st.integers(0, kernel // 2))
    ceil, include = data.draw(st.booleans()), data.draw(st.booleans())
    pools = nn.MaxPool2d(kernel, stride, padding, ceil_mode=ceil), nn.AvgPool2d(kernel, stride, padding, ceil, include)
    x = torch.randn(2, 3, size, size)
    for pool in pools:
        written = OperatorWriter(fold(trace(Call(pool))), x.shape[1:]).model()
        model = onnx_runtime.OnnxModel(written.SerializeToString(), optimize=False)
        assert torch.allclose(model(x), pool(x), atol=1e-6)


# ---- ONNX: the quantized network --------------------------------------------------------------------------------------------


@needs_onnx
def test_onnx_runtime_computes_our_codes(qmodel, digits, file):
    ql.export_onnx(qmodel, file)
    x = next(iter(digits.calibration(8, seed=5)))
    frame = onnx_runtime.compare_codes(qmodel, file, x)
    assert len(frame) == len(list(qmodel.quantizers.children())) and frame.edge.is_unique
    assert frame.local_max_difference.max() <= 1 and frame.local_differing.sum() <= 1e-5 * frame.n.sum()
    logits = qmodel(x).detach()
    for optimize in (False, True):  # codes at a tie may fall to the other side early and be carried on; nothing else may differ
        theirs = onnx_runtime.OnnxModel(file, optimize)(x)
        assert (theirs - logits).abs().mean() < 0.05 * logits.std() and torch.equal(theirs.argmax(1), logits.argmax(1))


@needs_onnx
def test_a_difference_would_be_seen(resnet20, stats, digits, file):
    """The comparison itself: two networks that differ in one layer differ locally at that layer only."""
    qmodel = ql.quantize(resnet20, stats, ql.QuantConfig(8, 8, observer="minmax", weight_observer="minmax"))
    ql.export_onnx(qmodel, file)
    layer = qmodel.get_submodule("layer2.0.conv1")
    with torch.no_grad():
        layer.bias[3] += 0.5
    frame = onnx_runtime.compare_codes(qmodel, file, next(iter(digits.calibration(16, seed=5)))).set_index("edge")
    assert frame.local_max_difference["layer2_0_relu"] > 1 and (frame.drop("layer2_0_relu").local_max_difference <= 1).all()
    assert frame.max_difference["layer3_2_relu_1"] > 1, "carried on to every later edge"


@needs_onnx
def test_weights_are_int8_biases_int32_and_every_layer_reads_codes(resnet20, stats, file):
    ql.export_onnx(ql.quantize(resnet20, stats, ql.QuantConfig(4, 4, weight_observer="minmax")), file)
    model = onnx.load(file)
    kinds = {i.name: (i.data_type, list(i.dims)) for i in model.graph.initializer}
    producer = {name: node for node in model.graph.node for name in node.output}
    layers = [node for node in model.graph.node if node.op_type in ("Conv", "Gemm")]
    assert len(layers) == 22
    for node in layers:
        x, weight, bias = (producer[name] for name in node.input)
        source = producer[x.input[0]] if x.op_type == "Reshape" else x
        assert (source.op_type, weight.op_type, bias.op_type) == ("DequantizeLinear",) * 3
        assert kinds[weight.input[0]][0] == onnx.TensorProto.INT8 and kinds[bias.input[0]][0] == onnx.TensorProto.INT32
        assert kinds[weight.input[1]][1] == kinds[bias.input[1]][1] == kinds[weight.input[0]][1][:1], "one scale a channel"


@needs_onnx
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("signed", [False, True])
def test_values_far_beyond_the_range_saturate_at_the_codes_of_the_width(bits, signed, file):
    """QuantizeLinear alone would give codes up to 255 or down to -128 here."""
    config = ql.QuantConfig(8, bits, input_bits=bits, observer="minmax", weight_observer="minmax", act_symmetric=signed, act_signed=signed)
    qmodel = make_quantized(tiny(), torch.randn(4, 3, 8, 8), config)
    ql.export_onnx(qmodel, file, (3, 8, 8))
    x = torch.randn(8, 3, 8, 8) * 1000
    codes = onnx_runtime.onnx_codes(file, x)
    frame = onnx_runtime.compare_codes(qmodel, file, x)
    assert frame.max_difference.max() == 0
    for edge, found in codes.items():
        q = qmodel.get_submodule(next(n for n in qmodel.graph.nodes if n.name == edge).target).qparams
        assert found.max() == q.qmax and found.min() == (q.qmin if edge == "quantizers_input_1" else q.zero_point)


@needs_onnx
@pytest.mark.parametrize("name", ["resnet18", "vgg11_bn", "mobilenet_v2", "densenet121", "googlenet"])
def test_torchvision_networks(name, file):
    """Untrained, with re-estimated BatchNorm: every edge, fed our codes, gives our codes, but for ties, which averages have."""
    import torchvision

    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(num_classes=10, **({"init_weights": False} if name in ("googlenet", "vgg11_bn") else {}))
    if name == "vgg11_bn":
        model.classifier = nn.Sequential(nn.Linear(25088, 16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 10))  # instead of 400 MB
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        model.train()(x)
        qmodel = make_quantized(model.eval(), x)
        ql.export_onnx(qmodel, file)
        frame = onnx_runtime.compare_codes(qmodel, file, x)
    others = frame[~frame.edge.str.contains("pool")]
    assert frame.local_max_difference.max() <= 1 and others.local_differing.sum() <= 1e-5 * others.n.sum()
    assert torch.isfinite(onnx_runtime.OnnxModel(file)(x)).all()


@needs_onnx
def test_the_tangle_and_a_fixed_batch(file):
    model, x = randomize_batchnorm(Tangle()), torch.randn(4, 3, 32, 32)
    qmodel = make_quantized(model, x)
    ql.export_onnx(qmodel, file, batch=4)
    assert onnx_runtime.compare_codes(qmodel, file, x).local_max_difference.max() <= 1
    with pytest.raises(Exception, match="Got: 3 Expected: 4"):
        onnx_runtime.OnnxModel(file)(x[:3])


@needs_onnx
@pytest.mark.parametrize("layer, message", [
    (nn.ConvTranspose2d(3, 3, 2), "node _0: ConvTranspose2d has no ONNX export"),
    (nn.GELU(), "node _0: GELU has no ONNX export"),
    (Call(lambda x: torch.einsum("bchw->bcwh", x)), "node einsum: einsum has no ONNX export"),
    (Call(lambda x: torch.add(x, x, alpha=2)), "node add: add with alpha has no ONNX export"),
    (nn.AvgPool2d(2, divisor_override=3), "node _0: AvgPool2d with divisor_override has no ONNX export"),
    (Call(lambda x: x.chunk(2, 0)[0]), "node chunk: chunk along the batch has no ONNX export"),
], ids=str)
def test_what_has_no_export_is_named_and_nothing_is_written(layer, message, file, tmp_path):
    with pytest.raises(ql.UserError, match=message):
        ql.export_onnx(fold(trace(nn.Sequential(layer, nn.Flatten()))), file)
    assert not list(tmp_path.iterdir())


def test_missing_onnx_is_said_in_one_line(monkeypatch, tmp_path):
    qmodel = make_quantized(tiny(), torch.randn(2, 3, 8, 8))
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ql.UserError, match="^ONNX export needs two more packages: pip install onnx onnxruntime$"):
        ql.export_onnx(qmodel, tmp_path / "model.onnx", (3, 8, 8))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ql.UserError, match="pip install onnx onnxruntime$"):
        onnx_runtime.OnnxModel(tmp_path / "model.onnx")


# ---- The rival --------------------------------------------------------------------------------------------------------------


@needs_onnx
def test_onnx_runtimes_own_quantization(resnet20, digits):
    reference, rival = onnx_runtime.onnxruntime_float(resnet20), onnx_runtime.onnxruntime_int8(resnet20, digits.calibration(128))
    x = next(iter(digits.calibration(16)))
    assert torch.allclose(reference(x), resnet20(x), atol=1e-4)
    float_result, int8_result = (ql.evaluate(network, digits.test, on="cpu") for network in (resnet20, rival))
    assert abs(ql.paired_drop(float_result.correct, int8_result.correct)[0]) < 2
    assert not torch.equal(rival(x), reference(x)) and 3 < reference.bytes / rival.bytes < 4
    with pytest.raises(ql.UserError, match="method 'max' is unknown; use one of: minmax, entropy, percentile"):
        onnx_runtime.onnxruntime_int8(resnet20, [x], method="max")
