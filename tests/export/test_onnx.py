"""ONNX Runtime, which knows nothing of us, computes the codes of our graph."""

import copy
import itertools
import random
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from examples import Tangle, randomize_batchnorm
from forms import FORMS, MINMAX, make_quantized, quantized, residual, tiny
from torch import nn

import quantlab as ql
from quantlab import ptq
from quantlab.export import onnx as exporter
from quantlab.graph import folded
from quantlab.quantized import edge_name, find_node
from quantlab.rivals.onnxruntime import OnnxModel, compare_codes, onnx_codes

onnx = pytest.importorskip("onnx", reason="pip install onnx onnxscript onnxruntime")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.fixture
def file(tmp_path):
    return str(tmp_path / "model.onnx")


# ---- The float operators -------------------------------------------------------------------------


class Call(nn.Module):
    """A function of the image as a network."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Channelwise(nn.Module):
    """Shape arithmetic as people write it: a channel shuffle, slices, a chunk, a mean, a constant.
    """

    def __init__(self):
        super().__init__()
        self.register_buffer("gain", torch.tensor([1.0, -2.0, 0.5, 3.0]).view(1, 4, 1, 1))
        self.fc = nn.Linear(6, 3)

    def forward(self, x):
        batch, channels, height, width = x.size()
        x = x.view(batch, 2, channels // 2, height, width).transpose(1, 2)
        x = x.reshape(batch, channels, height, width)
        first, second = torch.chunk(x * self.gain, 2, dim=1)
        x = torch.cat([second - 1.5, first / height, x[:, 1:3]], dim=1)
        y = x[:, 0].unsqueeze(1) + x[..., :1]
        x = x.permute(0, 2, 3, 1) + y.mean((2, 3)).view(batch, 1, 1, -1)
        return self.fc(x[:, -1]).softmax(-1).flatten(1)


class All(nn.Module):
    """Every network's outputs, as a tuple: one export for all of them."""

    def __init__(self, networks):
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, x):
        return tuple(network(x) for network in self.networks)


OPERATIONS = {
    "ceil_mode": lambda x: F.max_pool2d(x, 3, 2, ceil_mode=True) + F.avg_pool2d(
        x, 3, 2, ceil_mode=True),
    "adaptive": lambda x: F.adaptive_avg_pool2d(x, (4, 3)),
    "adaptive up": lambda x: F.adaptive_avg_pool2d(x, 13),
    "adaptive max": lambda x: F.adaptive_max_pool2d(x, (1, 1)) + F.adaptive_avg_pool2d(x, 1),
    "hard": lambda x: F.hardswish(x) * F.hardsigmoid(x) + F.relu6(x),
    "clamps": lambda x: torch.clamp(x, min=-0.1) - F.hardtanh(x, -0.5, 0.25),
    "smooth": lambda x: F.silu(x) + torch.sigmoid(x) + torch.tanh(x) + F.softmax(x, dim=1),
    "sloped": lambda x: F.leaky_relu(x, 0.1) + F.gelu(x),
    "shuffles": lambda x: F.pixel_shuffle(F.channel_shuffle(x, 2), 2).squeeze(1),
    "padding": lambda x: F.pad(
        F.pad(x[:, :, ::2, 1:], (0, 1, 2, 0, 1, 3), value=-2.0), (1, 2, 0, 1), "replicate"),
    "numbers": lambda x: 1 - x * x.size(1) / 3,
    "alpha": lambda x: torch.add(x, x, alpha=2),
    "einsum": lambda x: torch.einsum("bchw->bcwh", x),
}
LAYERS = [
    nn.Conv2d(4, 8, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2),
    nn.Conv2d(4, 4, 3, padding="same", dilation=2), nn.Conv2d(4, 2, 3, padding="valid"),
    nn.Conv2d(4, 2, 3, padding=1, padding_mode="reflect", bias=False),
    nn.ConvTranspose2d(4, 3, 2), nn.ZeroPad2d((1, 0, 2, 3)), nn.BatchNorm2d(4, affine=False),
    nn.Linear(9, 3), nn.Linear(9, 3, bias=False),
    nn.Sequential(nn.Flatten(), nn.Linear(360, 6), nn.Unflatten(1, (2, 3))),
    nn.ChannelShuffle(2), nn.ReLU6(), nn.Hardtanh(-2, 0.5), nn.GELU(),
]


def assert_same_floats(networks, x, file, atol=2e-6):
    """networks: name -> network. Each has torch's meaning, optimized or not, for any batch size."""
    model = All(networks.values()).eval()
    with torch.no_grad():
        expected = dict(zip(networks, model(x), strict=True))
    ql.export_onnx(folded(model), file, x.shape[1:])
    for optimize, part in itertools.product((False, True), (slice(None), slice(0, 1))):
        found = OnnxModel(file, optimize, threads=1).run(x[part]).values()
        for (name, ours), theirs in zip(expected.items(), found, strict=True):
            close = atol * max(1, ours.abs().max().item())
            assert torch.allclose(torch.from_numpy(theirs), ours[part], atol=close), name


def test_operations_have_torchs_meaning(file):
    networks = {name: Call(function) for name, function in OPERATIONS.items()}
    assert_same_floats(networks, torch.randn(3, 4, 10, 9) * 3, file)


def test_layers_and_shape_arithmetic_have_torchs_meaning(file):
    networks = {str(layer): nn.Sequential(layer) for layer in [*LAYERS, Channelwise()]}
    assert_same_floats(networks, torch.randn(3, 4, 10, 9), file)


def test_pools_of_any_window(file):
    choose = random.Random(0)
    pools = []
    for kernel, ceil, include in itertools.product(range(1, 5), (False, True), (False, True)):
        for padding in range(kernel // 2 + 1):
            stride = choose.randint(1, 4)
            pools.append(nn.AvgPool2d(kernel, stride, padding, ceil, include))
            pools.append(nn.MaxPool2d(kernel, stride, padding, ceil_mode=ceil))
    size = choose.randint(5, 9)
    networks = {f"{i} {pool}": pool for i, pool in enumerate(pools)}
    assert_same_floats(networks, torch.randn(2, 3, size, size + 1), file, atol=1e-6)


# ---- The quantized network -----------------------------------------------------------------------


@pytest.fixture(scope="session")
def exported(resnet20, stats, tmp_path_factory):
    """(ResNet-20 at W8A8, its file)."""
    qmodel = quantized(resnet20, stats, "8/8")
    file = tmp_path_factory.mktemp("onnx") / "resnet20.onnx"
    return qmodel, ql.export_onnx(qmodel, file, (3, 32, 32))


def assert_same_codes(qmodel, file, x, ties=1e-5, except_for="no edge", optimize=(False, True)):
    """Every edge, fed our codes, gives our codes, but for ties; the logits follow."""
    frame = compare_codes(qmodel, file, x)
    assert len(frame) == len(qmodel.quantizer_nodes) and frame.edge.is_unique
    assert frame.local_max_difference.max() <= 1
    others = frame[~frame.edge.str.contains(except_for)]
    assert others.local_differing.sum() <= ties * others.n.sum()
    logits = qmodel(x).detach()
    # codes at a tie may fall to the other side early and be carried on; nothing else may differ
    for optimized in optimize:
        theirs = OnnxModel(file, optimized, threads=1)(x)
        assert (theirs - logits).abs().mean() < 0.05 * logits.std()
        assert torch.equal(theirs.argmax(1), logits.argmax(1))


def test_onnx_runtime_computes_our_codes(exported, digits):
    assert_same_codes(*exported, next(iter(digits.calibration(8, seed=5))))


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_residual_network(form, file):
    model, x = residual(), torch.randn(4, 3, 8, 8)
    qmodel = quantized(model, ql.collect(model, [x]), form)
    ql.export_onnx(qmodel, file, x.shape[1:])
    assert_same_codes(qmodel, file, x)


def test_the_tangle_and_a_fixed_batch(file):
    model, x = randomize_batchnorm(Tangle()), torch.randn(4, 3, 32, 32)
    qmodel = make_quantized(model, x)
    ql.export_onnx(qmodel, file, batch=4)
    assert_same_codes(qmodel, file, x, ties=1e-3)
    with pytest.raises(Exception, match="Got: 3 Expected: 4"):
        OnnxModel(file, threads=1)(x[:3])


def test_a_difference_would_be_seen(exported, digits):
    """The comparison itself: two networks that differ in one layer differ locally at that layer
    only."""
    qmodel, file = exported
    changed = copy.deepcopy(qmodel)
    with torch.no_grad():
        changed.get_submodule("layer2.0.conv1").bias[3] += 0.5
    frame = compare_codes(changed, file, next(iter(digits.calibration(16, seed=5))))
    frame = frame.set_index("edge")
    assert frame.local_max_difference["layer2_0_relu"] > 1
    assert (frame.drop("layer2_0_relu").local_max_difference <= 1).all()
    assert frame.max_difference["layer3_2_relu_1"] > 1, "carried on to every later edge"


def test_weights_are_int8_biases_int32_and_every_layer_reads_codes(exported):
    model = onnx.load(exported[1])
    kinds = {i.name: (i.data_type, list(i.dims)) for i in model.graph.initializer}
    producer = {name: node for node in model.graph.node for name in node.output}
    layers = [node for node in model.graph.node if node.op_type in ("Conv", "Gemm")]
    assert len(layers) == 22
    for node in layers:
        x, weight, bias = (producer[name] for name in node.input)
        source = producer[x.input[0]] if x.op_type == "Reshape" else x
        assert {n.op_type for n in (source, weight, bias)} == {"DequantizeLinear"}
        assert kinds[weight.input[0]][0] == onnx.TensorProto.INT8
        assert kinds[bias.input[0]][0] == onnx.TensorProto.INT32
        channels = kinds[weight.input[0]][1][:1]
        assert kinds[weight.input[1]][1] == kinds[bias.input[1]][1] == channels


def test_a_file_says_how_it_was_made_and_not_where(exported):
    qmodel, file = exported
    assert b"test_onnx" not in file.read_bytes() and b"quantlab/" not in file.read_bytes()
    model = onnx.load(file)
    assert '"weight_bits": 8' in {p.key: p.value for p in model.metadata_props}["quantlab"]
    names = [n.output[0] for n in model.graph.node if n.op_type == "QuantizeLinear"]
    assert names == [f"{edge_name(node)}_codes" for node in qmodel.quantizer_nodes]


@pytest.mark.parametrize("signed", [False, True])
def test_values_far_beyond_the_range_saturate_at_the_codes_of_the_width(signed, file):
    """QuantizeLinear alone would give codes up to 255 or down to -128 here."""
    layers = [nn.Sequential(nn.Conv2d(3, 2, 1), nn.Flatten()) for _ in range(2, 9)]
    model, x = All(layers).eval(), torch.randn(4, 3, 8, 8)
    widths = {f"networks_{i}_0": i + 2 for i in range(7)}
    config = ql.QuantConfig(8, 8, act_symmetric=signed, layer_act_bits=widths, **MINMAX)
    qmodel = make_quantized(model, x, config)
    ql.export_onnx(qmodel, file, (3, 8, 8))
    x = torch.randn(8, 3, 8, 8) * 1000
    assert compare_codes(qmodel, file, x).max_difference.max() == 0
    codes = onnx_codes(file, x)
    quantizers = {edge_name(n): q.qparams for n, q in qmodel.quantizer_nodes.items()}
    assert {q.bits for q in quantizers.values()} == set(range(2, 9))
    for edge, found in codes.items():
        q = quantizers[edge]
        assert (found.min(), found.max()) == (q.qmin, q.qmax) and (q.qmin < 0) == signed


def shortened(name):
    """A torchvision network with fewer blocks, each kind of block once or twice."""
    from torchvision import models as zoo
    from torchvision.models.googlenet import Inception

    if name == "resnet":
        return zoo.ResNet(zoo.resnet.BasicBlock, [1, 1, 1, 1], num_classes=10)
    if name == "densenet":
        return zoo.DenseNet(8, (2, 2), 16, num_classes=10)
    if name == "mobilenet_v2":
        blocks = [[1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 2, 2]]
        return zoo.MobileNetV2(10, inverted_residual_setting=blocks)
    if name == "googlenet":
        first = nn.Sequential(nn.Conv2d(3, 16, 3), nn.MaxPool2d(3, 2, ceil_mode=True))
        blocks = [Inception(c, 4, 4, 8, 4, 8, 4) for c in (16, 24)]
        return nn.Sequential(first, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = zoo.vgg11_bn(num_classes=10, init_weights=False)
    head = nn.Linear(25088, 16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 10)  # instead of 400 MB
    model.classifier = nn.Sequential(*head)
    return model


@pytest.mark.parametrize("name", [
    "resnet", "mobilenet_v2", "googlenet",
    *(pytest.param(name, marks=pytest.mark.long) for name in ("vgg11_bn", "densenet"))])
def test_torchvision_networks(name, file):
    """Untrained, with re-estimated BatchNorm. Averages have ties."""
    model, x = shortened(name).train(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        model(x)
    qmodel = make_quantized(model.eval(), x)
    ql.export_onnx(qmodel, file)
    assert_same_codes(qmodel, file, x, except_for="pool")


# ---- What is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("function, message", [
    (torch.special.bessel_j0, "^node bessel_j0 has no ONNX export .*bessel_j0"),
    (nn.AvgPool2d(2, divisor_override=3), "^node avg_pool2d: divisor_override has no ONNX export"),
    (lambda x: F.avg_pool2d(x, 2, 2, 0, False, True, 3), "divisor_override has no ONNX export"),
    (lambda x: x @ x[0, 0, :3, 0], "^the network has no ONNX export .*[sS]ize"),
], ids=["no translation", "divisor, module", "divisor, function", "wrong shapes"])
def test_what_has_no_export_is_named_and_nothing_is_written(function, message, file, tmp_path):
    with pytest.raises(ql.UserError, match=message) as error:
        ql.export_onnx(folded(nn.Sequential(Call(function), nn.Flatten())), file, (3, 32, 32))
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_missing_onnx_is_said_in_one_line(package, monkeypatch, tmp_path):
    qmodel = make_quantized(tiny(), torch.randn(2, 3, 8, 8))
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ql.UserError, match="pip install onnx onnxscript onnxruntime$"):
        ql.export_onnx(qmodel, tmp_path / "model.onnx", (3, 8, 8))


# ---- Weights of 4 bits and fewer ----------------------------------------------------------------


@pytest.mark.parametrize("bits, symmetric", [
    (4, True), (2, False), *(pytest.param(*case, marks=pytest.mark.long)
                             for case in ((3, False), (2, True)))])
def test_codes_of_few_bits_take_a_half_or_a_quarter_of_a_byte(
        bits, symmetric, tmp_path, monkeypatch):
    """Two bits, where the runtime's optimizer refuses them, are run without it."""
    optimize = {"int4": (False, True), "int2": (False, True)[: 1 + bool(exporter.runtime_takes(2))]}
    monkeypatch.setattr(exporter, "runtime_takes", lambda *asked: True)
    model, x = residual(), torch.randn(4, 3, 8, 8)
    first, *_, last = ptq.layers(folded(model))
    widths = {first: 4, last: 8}
    config = ql.QuantConfig(bits, 4, weight_symmetric=symmetric, layer_weight_bits=widths)
    qmodel = ql.quantize(model, ql.collect(model, [x]), config)
    least = "int2" if bits == 2 else "int4"
    files = {weights: ql.export_onnx(qmodel, tmp_path / f"{weights}.onnx", weights=weights)
             for weights in dict.fromkeys(("auto", least, "int4", "int8"))}
    assert files["auto"].read_bytes() == files[least].read_bytes()
    names, sign = onnx.TensorProto.DataType, "" if symmetric else "U"
    for weights in (least, "int4", "int8"):
        assert_same_codes(qmodel, files[weights], x, optimize=optimize.get(weights, (True,)))
        stored = {i.name: i for i in onnx.load(files[weights]).graph.initializer}
        for layer in qmodel.layers:
            codes = stored[f"{find_node(qmodel, layer).target}.weight_codes"]
            fits = 8 if layer == last or weights == "int8" else 4
            fits = 2 if weights == "int2" and layer not in widths else fits
            assert names.Name(codes.data_type) == f"{sign}INT{fits}"
            assert len(codes.raw_data) == -(-qmodel.layers[layer].weight.numel() * fits // 8)
            read = onnx.numpy_helper.to_array(codes).astype(np.int32)
            assert np.array_equal(read, qmodel.codes(layer).numpy())


def test_what_the_runtime_does_not_take_is_stored_in_more_bits(file, monkeypatch, tmp_path):
    model, x = residual(), torch.randn(4, 3, 8, 8)
    stats = ql.collect(model, [x])
    two, four, wide = (ql.quantize(model, stats, ql.QuantConfig(b, b)) for b in (2, 4, 8))
    for takes, opset in ((set(), exporter.OPSET), ({4}, 21)):
        monkeypatch.setattr(
            exporter, "runtime_takes", lambda width, signed=False, takes=takes: width in takes)
        ql.export_onnx(two, file)
        assert onnx.load(file).opset_import[0].version == opset
        assert_same_codes(two, file, x)
    for network, weights, line in [
        (two, "int2", "does not compute with it"), (wide, "int4", "no layer has weights of 4 bits"),
        (four, "int2", "no layer has weights of 2 bits"),
        (two, "int1", "use one of: auto, int8, int4, int2"),
    ]:
        with pytest.raises(ql.UserError, match=line):
            ql.export_onnx(network, tmp_path / "none.onnx", weights=weights)
    assert not (tmp_path / "none.onnx").exists()


@pytest.mark.parametrize("move", [
    lambda y: y.flatten(1), lambda y: y.permute(0, 2, 3, 1), lambda y: F.max_pool2d(y, 2),
    lambda y: y[:, :, ::2]], ids=["flatten", "permute", "max-pool", "slice"])
def test_by_default_a_file_is_one_that_the_runtime_loads(move, file):
    class Moved(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.LazyLinear(5)

        def forward(self, x):
            return self.fc(move(self.a(x)))

    model, x = Moved().eval(), torch.randn(4, 3, 8, 8)
    model(x)
    stats = ql.collect(model, [x])
    for signed in (True, False):
        config = ql.QuantConfig(weight_bits=4, act_symmetric=signed)
        qmodel = ql.quantize(model, stats, config)
        assert {q.qmin < 0 for q in qmodel.quantizer_nodes.values()} == {signed}
        ql.export_onnx(qmodel, file)
        for optimized in (False, True):
            theirs = OnnxModel(file, optimized, threads=1)(x)
            assert torch.allclose(theirs, qmodel(x), atol=1e-3)
        narrow = exporter.runtime_takes(4, signed)
        assert onnx.load(file).opset_import[0].version == (21 if narrow else exporter.OPSET)


def test_signed_codes_that_nothing_moves_leave_the_weights_narrow(file):
    model, x = residual(), torch.randn(4, 3, 8, 8)
    qmodel = ql.quantize(model, ql.collect(model, [x]), ql.QuantConfig(4, 8, act_symmetric=True))
    assert any(q.qmin < 0 for q in qmodel.quantizer_nodes.values())
    ql.export_onnx(qmodel, file)
    assert onnx.load(file).opset_import[0].version == (21 if exporter.runtime_takes(4) else 18)
    assert_same_codes(qmodel, file, x)
