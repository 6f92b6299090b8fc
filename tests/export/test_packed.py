"""Packed checkpoints come back bit for bit, those of older versions too, and damage is named."""

import copy
import functools
import json
import os
import pathlib
import pickle
import tempfile

import pytest
import safetensors
import safetensors.torch
import torch
from conftest import fuzz, mutate_fields, mutate_tensors
from examples import Tangle, randomize_batchnorm
from forms import FORMS, MINMAX, make_quantized, quantized, tiny
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import quantlab as ql
from quantlab.affine import choose_qparams
from quantlab.export import packed
from quantlab.export.bits import pack, unpack
from quantlab.quantized import QuantizedNetwork

FOLDER = pathlib.Path(__file__).parent


@given(st.integers(2, 8), st.data())
@fuzz(200)
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


@pytest.mark.parametrize("form", FORMS)
def test_a_loaded_network_is_the_saved_one_bit_for_bit(form, resnet20, stats, digits, tmp_path):
    qmodel = quantized(resnet20, stats, form)
    path, again = tmp_path / "model.safetensors", tmp_path / "again.safetensors"
    assert ql.save_quantized(qmodel, path) == path.stat().st_size
    # random weights: all of them are replaced
    loaded = ql.load_quantized(path, ql.load_model("resnet20"))
    assert isinstance(loaded, QuantizedNetwork)
    x = next(iter(digits.calibration(8, seed=5)))
    assert torch.equal(loaded(x), qmodel(x)) and str(loaded.graph) == str(qmodel.graph)
    assert loaded.plan == qmodel.plan and loaded.config == qmodel.config
    for name, layer in qmodel.layers.items():
        ours, theirs = layer.weight_qparams, loaded.layers[name].weight_qparams
        assert torch.equal(ours.scale, theirs.scale)
        assert torch.equal(ours.zero_point, theirs.zero_point)
        assert (ours.qmin, ours.qmax, ours.axis) == (theirs.qmin, theirs.qmax, theirs.axis)
    assert ql.weight_bytes(loaded) == ql.weight_bytes(qmodel)
    ql.save_quantized(loaded, again)
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("bits", range(2, 9))
def test_batchnorm_that_cannot_be_folded_comes_back(bits, tmp_path):
    model, x = randomize_batchnorm(Tangle()), torch.randn(4, 3, 16, 16)
    qmodel = make_quantized(model, x, ql.QuantConfig(bits, bits, **MINMAX))
    ql.save_quantized(qmodel, tmp_path / "tangle.safetensors")
    loaded = ql.load_quantized(tmp_path / "tangle.safetensors", Tangle())
    assert torch.equal(loaded(x), qmodel(x))


class Shared(nn.Module):
    """A layer that is called twice, between layers of its own."""

    def __init__(self):
        super().__init__()
        self.first, self.twice = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, x):
        return self.last(self.twice(self.twice(self.first(x)).relu()).relu())


def test_a_network_that_calls_a_layer_twice_comes_back(tmp_path):
    model, x = Shared().eval(), torch.randn(4, 3, 6, 6)
    qmodel = ql.quantize(model, ql.collect(model, [x]), ql.QuantConfig(3, 4, **MINMAX))
    ql.save_quantized(qmodel, tmp_path / "shared.safetensors")
    loaded = ql.load_quantized(tmp_path / "shared.safetensors", Shared().eval())
    assert torch.equal(loaded(x), qmodel(x)) and len(loaded.layers) == 4


def test_mixed_precision_and_a_bias_of_its_own(tmp_path):
    """Widths that no QuantConfig describes, and a bias that is no multiple of s_in * s_w: both are
    stored as they are."""
    model, x = tiny(), torch.randn(4, 3, 8, 8)
    qmodel = make_quantized(model, x)
    conv = qmodel.get_submodule("0")
    q = conv.weight_qparams = choose_qparams(-0.3, 0.3, 7, symmetric=True)
    with torch.no_grad():
        conv.weight.copy_(ql.fake_quantize(conv.weight, q))
        conv.bias.add_(1e-4)
    ql.save_quantized(qmodel, tmp_path / "mixed.safetensors")
    loaded = ql.load_quantized(tmp_path / "mixed.safetensors", tiny())
    assert torch.equal(loaded(x), qmodel(x))
    assert loaded.get_submodule("0").weight_qparams.bits == 7


def test_an_observer_of_ones_own_is_remembered_by_name(tmp_path):
    def own(edge, bits, symmetric):
        return edge.minimum, edge.maximum

    x = torch.randn(2, 3, 8, 8)
    qmodel = make_quantized(tiny(), x, ql.QuantConfig(4, 4, observer=own))
    ql.save_quantized(qmodel, tmp_path / "own.safetensors")
    config = ql.load_quantized(tmp_path / "own.safetensors", tiny()).config
    assert config.observer.__name__ == "own"
    with pytest.raises(ql.UserError, match="'own' is a function that the file does not hold"):
        ql.quantize(tiny(), ql.collect(tiny(), [x]), config)


def test_files_hold_packed_codes_and_nothing_else(resnet20, stats, tmp_path):
    configs = {f"w{bits}": ql.QuantConfig(bits, 8, **MINMAX) for bits in (8, 5, 2)}
    configs["zero-points"] = ql.QuantConfig(3, 8, weight_symmetric=False, **MINMAX)
    networks = {name: ql.quantize(resnet20, stats, config) for name, config in configs.items()}
    sizes = packed.file_sizes(networks | {"float": resnet20}, tmp_path).set_index("name")
    for name, network in networks.items():
        content = (tmp_path / f"{name}.safetensors").read_bytes()
        header = 8 + int.from_bytes(content[:8], "little")
        # scales and zero-points of Quantizers are in the description
        expected = sizes.weight_bytes[name] - 8 * len(network.quantizer_nodes)
        assert sizes.file_bytes[name] - header == expected
    assert sizes.file_bytes["float"] / sizes.file_bytes["w2"] > 10


@pytest.mark.parametrize("kind, settings", [
    (nn.AvgPool2d, {"count_include_pad": False}), (nn.AvgPool2d, {"ceil_mode": True}),
    (nn.AvgPool2d, {"divisor_override": 3}), (nn.Upsample, {"align_corners": True})], ids=str)
def test_what_a_module_does_not_print_tells_networks_apart(kind, settings, tmp_path):
    def network(**more):
        torch.manual_seed(0)
        plain = dict(scale_factor=2, mode="bilinear")
        if kind is nn.AvgPool2d:
            plain = dict(kernel_size=3, stride=2, padding=1)
        return nn.Sequential(nn.Conv2d(3, 8, 3), kind(**plain, **more), nn.Conv2d(8, 5, 3),
                             nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()

    model, other, x = network(), network(**settings), torch.randn(2, 3, 12, 12)
    stats = ql.collect(model, [x])
    with pytest.raises(ql.UserError, match="collected on another network"):
        ql.quantize(other, stats)
    path, qmodel = tmp_path / "model.safetensors", ql.quantize(model, stats)
    ql.save_quantized(qmodel, path)
    assert torch.equal(ql.load_quantized(path, network())(x), qmodel(x))
    with pytest.raises(ql.UserError, match="was saved from another network"):
        ql.load_quantized(path, other)
    tensors, about = content(path)
    about |= {"version": 3, "graph": packed.structure_hash(qmodel, 3)}  # as it was written once
    about["sha256"] = packed._checksum(tensors, about)
    safetensors.torch.save_file(tensors, path, {"quantlab": json.dumps(about)})
    assert torch.equal(ql.load_quantized(path, network())(x), qmodel(x))


# ---- Older files ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name, bits, logits", [
    ("signs", 3, [-0.0435624, 0.0, -0.0739669, -0.1558331, 0.1618134]),
    ("zero_points", 5, [-0.0464929, 0.0360039, -0.1347018, -0.2082390, 0.2133790]),
])
def test_a_file_of_version_1_loads(name, bits, logits):
    """Files and logits are those of the commit that wrote version 1."""
    qmodel = ql.load_quantized(FOLDER / f"version1_{name}.safetensors", tiny())
    x = torch.linspace(-2, 2, 2 * 3 * 64).sin().view(2, 3, 8, 8)
    assert torch.allclose(qmodel(x)[0], torch.tensor(logits), atol=1e-6)
    assert qmodel.config.weight_bits == bits and qmodel.config.observer == "minmax"
    assert qmodel.plan == make_quantized(tiny(), x).plan
    with safetensors.safe_open(FOLDER / f"version1_{name}.safetensors", "pt") as file:
        assert json.loads(file.metadata()["quantlab"])["version"] == 1
        stream, scale = (file.get_tensor(f"3.{n}") for n in ("weight", "weight_scale"))
    linear = qmodel.layers["_3"]
    number = int.from_bytes(bytes(stream.tolist()), "little")
    codes = [(number >> (i * bits)) % 2**bits for i in range(linear.weight.numel())]
    codes = torch.tensor(codes).view(linear.weight.shape) + linear.weight_qparams.qmin
    zero_point = linear.weight_qparams.zero_point[:, None]
    assert torch.equal(linear.weight, (codes - zero_point) * scale[:, None])
    assert zero_point.any() == (name == "zero_points")


def test_the_shape_of_the_images_comes_back_and_older_files_ask_for_it(saved, tmp_path):
    shape = ql.load_quantized(saved, tiny()).meta["image_shape"]
    assert shape == (3, 8, 8)
    tensors, about = content(saved)
    del about["image_shape"]
    about["version"] = 2
    about["sha256"] = packed._checksum(tensors, about)
    safetensors.torch.save_file(tensors, saved, {"quantlab": json.dumps(about)})
    old = ql.load_quantized(saved, tiny())
    assert "image_shape" not in old.meta
    pytest.importorskip("onnxscript")
    with pytest.raises(ql.UserError, match=r"pass image_shape=\(C, H, W\)$"):
        ql.export_onnx(old, tmp_path / "old.onnx")
    with pytest.raises(ql.UserError, match="image_shape='8x8': give"):
        ql.export_onnx(old, tmp_path / "old.onnx", "8x8")
    assert list(tmp_path.iterdir()) == [saved]


@pytest.mark.parametrize("name, value", [("placement", "inputs"), ("fold_batchnorm", False)])
def test_settings_of_version_1_that_are_gone_are_refused(name, value, tmp_path):
    tensors, about = content(FOLDER / "version1_signs.safetensors")
    about["config"][name] = value
    about["sha256"] = packed._checksum(tensors, about)
    path = tmp_path / "old.safetensors"
    safetensors.torch.save_file(tensors, path, {"quantlab": json.dumps(about)})
    with pytest.raises(ql.UserError, match=f"was saved with another {name} than"):
        ql.load_quantized(path, tiny())


# ---- What is refused -----------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "model.safetensors"
    ql.save_quantized(make_quantized(tiny(), torch.randn(2, 3, 8, 8)), path)
    return path


def content(path):
    """(tensors, description without checksum) of a file."""
    with safetensors.safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["quantlab"])
        tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    return tensors, {k: v for k, v in about.items() if k != "sha256"}


def edit(path, change):
    """Rewrite the file with its description changed, checksum left alone."""
    tensors, _ = content(path)
    with safetensors.safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["quantlab"])
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
    with pytest.raises(ql.UserError, match="has format version 5, this quantlab reads 1 to 4"):
        ql.load_quantized(saved, tiny())


@functools.cache
def valid(weight_symmetric):
    """(tensors, description) of a valid file, with two widths."""
    x = torch.linspace(-2, 2, 3 * 64).sin().view(1, 3, 8, 8)
    config = ql.QuantConfig(
        3, 4, weight_symmetric=weight_symmetric, layer_weight_bits={"_3": 5}, **MINMAX)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "model.safetensors"
        ql.save_quantized(make_quantized(tiny(), x, config), path)
        return content(path)


@pytest.mark.parametrize("weight_symmetric", [True, False])
@given(data=st.data())
@fuzz(150)
def test_a_file_loads_and_equals_or_is_refused_in_a_line(weight_symmetric, tmp_path_factory, data):
    path, again = (tmp_path_factory.getbasetemp() / f"{x}.safetensors" for x in ("file", "again"))
    tensors, about = copy.deepcopy(valid(weight_symmetric))
    for _ in range(data.draw(st.integers(1, 2))):
        if data.draw(st.booleans()):
            mutate_fields(about, data)
        else:
            mutate_tensors(tensors, data)
    about["sha256"] = packed._checksum(tensors, about)
    safetensors.torch.save_file(tensors, path, {"quantlab": json.dumps(about)})
    try:
        loaded = ql.load_quantized(path, tiny())
    except ql.UserError as error:
        assert str(error).isprintable()
        return
    ql.save_quantized(loaded, again)
    kept, description = content(again)
    assert kept.keys() == tensors.keys() and loaded(torch.ones(1, 3, 8, 8)).shape == (1, 5)
    assert all(torch.equal(kept[name], tensors[name]) for name in tensors)
    assert {**description, "sha256": 0} == {**about, "sha256": 0, "version": packed.VERSION}


@pytest.mark.parametrize("change", [
    lambda about, tensors: about["quantizers"][0].update(scale=float("nan")),
    lambda about, tensors: about["quantizers"][0].update(scale=-1.0),
    lambda about, tensors: about["quantizers"][0].update(zero_point=256),
    lambda about, tensors: about["quantizers"][0].update(
        target="quantizers.other", name="quantizers_other"),
    lambda about, tensors: about["layers"]["_0"].update(qmin=-9),
    lambda about, tensors: tensors["0.weight_scale"].mul_(0),
    lambda about, tensors: tensors["0.weight"].fill_(255),
    lambda about, tensors: tensors.update({"0.bias": torch.full((4,), 2**40)}),
    lambda about, tensors: about["config"].update(weight_norm=0),
    lambda about, tensors: about["plan"]["stores"].update(_1="elsewhere"),
    lambda about, tensors: about["plan"].update(floats=["_0"]),
    lambda about, tensors: about.pop("image_shape"),
    lambda about, tensors: about.update(image_shape=[4, 8, 8]),
    lambda about, tensors: about.update(image_shape=[3, 8, 0]),
    lambda about, tensors: about.update(image_shape="3x8x8")])
def test_nonsense_is_refused(saved, change):
    tensors, about = content(saved)
    change(about, tensors)
    about["sha256"] = packed._checksum(tensors, about)
    safetensors.torch.save_file(tensors, saved, {"quantlab": json.dumps(about)})
    with pytest.raises(ql.UserError, match="holds no quantized network") as error:
        ql.load_quantized(saved, tiny())
    assert str(error.value).isprintable()


def test_a_file_that_is_none(tmp_path):
    os.mkfifo(tmp_path / "fifo.safetensors")
    for path in (tmp_path / "fifo.safetensors", tmp_path):
        with pytest.raises(ql.UserError, match="is a folder or a device"):
            ql.load_quantized(path, tiny())


def test_another_network_is_refused(saved):
    shapes = r"weight of _0 is \[4, 3, 3, 3\] there and \[6, 3, 3, 3\] here"
    with pytest.raises(ql.UserError, match=shapes):
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
    with pytest.raises(ql.UserError, match="weight of _3 is not the value of its codes"):
        ql.save_quantized(qmodel, saved)
    assert saved.read_bytes() == before
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]
