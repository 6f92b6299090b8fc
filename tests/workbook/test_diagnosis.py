"""A network with one planted fault: it is named first, and its remedy is worth most."""

import dataclasses

import pytest
import torch
from torch import nn

import quantlab as ql
from quantlab.images.datasets import Split
from quantlab.workbook.diagnosis import COLUMNS, diagnose


class Net(nn.Module):
    def __init__(self, activation=nn.ReLU, step=None, width=16):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, width, 3, padding=1)
        self.act1, self.act2, self.fc = activation(), activation(), nn.Linear(width, 5)
        self.step = step

    def forward(self, x):
        y = self.act1(self.a(x))
        z = self.b(y) if self.step is None else y + self.step * self.b(y)
        return self.fc(self.act2(z).mean((2, 3)))


def plain(**options):
    torch.manual_seed(0)
    return Net(**options).eval(), torch.randn(64, 3, 8, 8)


@torch.no_grad()
def outlier_channel():
    """One channel 40 times as large as the others, and read 40 times as small."""
    model, x = plain()
    model.a.weight[3] *= 40
    model.a.bias[3] *= 40
    model.b.weight[:, 3] /= 40
    return model, x, ql.QuantConfig(8, 4), "one outlier channel sets the range"


@torch.no_grad()
def outlier_weights():
    model, x = plain()
    model.b.weight[3] *= 40
    model.fc.weight[:, 3] /= 40
    config = ql.QuantConfig(4, 8, per_channel=False)
    return model, x, config, "one channel sets the range of the weight"


def outlier_value():
    """One image in 256 of which one pixel is bright."""
    model, x = plain()
    x = torch.randn(256, 3, 8, 8)
    x[5, :, 4, 4] = 60
    config = ql.QuantConfig(8, 4, observer="minmax")
    return model, x, config, "a range that never uses half of its codes"


def smooth():
    model, x = plain(activation=nn.SiLU)
    with torch.no_grad():
        model.a.weight.mul_(5)
    config = ql.QuantConfig(8, 3, act_symmetric=True)
    return model, x, config, "negative side of a smooth activation"


def unbalanced():
    model, x = plain(step=0.02)
    with torch.no_grad():
        model.fc.weight.mul_(torch.randn(16))
    return model, x, ql.QuantConfig(8, 8, residual_bits=3), "an unbalanced add"


class Concatenated(Net):
    """Eleven channels of `a` beside the others, 30 times as small, which alone count."""

    def forward(self, x):
        y = self.act1(self.a(x))
        y = torch.cat([y[:, :11], y[:, 11:] / 30], 1)
        return self.fc(self.act2(self.b(y)).mean((2, 3)))


@torch.no_grad()
def unbalanced_concat():
    model, x = plain()
    model.__class__ = Concatenated
    model.b.weight[:, 11:] *= 30
    model.b.weight[:, :11] /= 30
    return model, x, ql.QuantConfig(8, 4), "an unbalanced concat"


@torch.no_grad()
def dead_channels():
    """Six channels 60 times as small as the others, which alone are read, 60 times as large."""
    model, x = plain()
    model.b.weight[:6] /= 60
    model.b.bias[:6] /= 60
    model.fc.weight[:, :6] *= 60
    model.fc.weight[:, 6:] /= 60
    config = ql.QuantConfig(4, 8, per_channel=False, layer_weight_bits={"fc": 8})
    return model, x, config, "channels become dead"


def few_products():
    """A depthwise layer: nine products a sum, the others have all their bits."""
    model, x = plain()
    model.b = nn.Conv2d(16, 16, 3, padding=1, groups=16).eval()
    config = ql.QuantConfig(3, 8, layer_weight_bits={"a": 8, "fc": 8})
    return model, x, config, "its sums meet few levels"


@torch.no_grad()
def on_the_grid(*layers, smallest=-3):
    """A network in which the weights of these layers have a code each, at 3 bits."""
    model, x = plain(width=32)
    for layer in (getattr(model, name) for name in layers):
        codes = torch.randint(smallest, 4, layer.weight.shape)
        codes.flatten(1)[:, 0], codes.flatten(1)[:, 1] = smallest, 3
        layer.weight.copy_(codes / 16)
    return model, x


def first_layer():
    return *on_the_grid("b", "fc"), ql.QuantConfig(3, 8), "first layer"


def last_layer():
    return *on_the_grid("a", "b"), ql.QuantConfig(3, 8), "last layer"


def wasted_level():
    """Weights on all eight levels of 3 bits, of which the narrow range has seven."""
    config = ql.QuantConfig(3, 8)
    return *on_the_grid("a", "b", "fc", smallest=-4), config, "weights waste a level"


@pytest.mark.parametrize("plant", [
    outlier_channel, outlier_weights, outlier_value, smooth, unbalanced, unbalanced_concat,
    dead_channels, few_products, first_layer, last_layer, wasted_level])
def test_the_planted_fault_is_first_and_its_remedy_gains_most(plant):
    model, x, config, fault = plant()
    stats = ql.collect(model, x.split(32))
    frame = diagnose(model, stats, x.split(32), config)
    assert frame.columns.tolist() == COLUMNS[:-1]
    assert frame.fault[0] == fault and frame.gain_db[0] > 3
    assert frame.gain_db.is_monotonic_decreasing
    # as measured without the package's own score
    changed = {"one channel sets the range of the weight": {"per_channel": True},
               "negative side of a smooth activation": {"act_symmetric": False},
               "an unbalanced add": {"residual_bits": None},
               "an unbalanced concat": {"layer_act_bits": {"b": 8}},
               "its sums meet few levels": {"weight_bits": 8},
               "first layer": {"layer_weight_bits": {"a": 8}},
               "last layer": {"layer_weight_bits": {"fc": 8}},
               "weights waste a level": {"weight_symmetric": False}}
    if fault in changed:
        mended = dataclasses.replace(config, **changed[fault])
        nets = [ql.quantize(model, stats, c) for c in (config, mended)]
        with torch.no_grad():
            before, after = ((net(x) - model(x)).square().sum(1) for net in nets)
        gain = 10 * torch.log10(before / after).mean().item()
        assert frame.gain_db[0] == pytest.approx(gain, abs=0.05)


def test_points_stand_beside_decibels_where_there_are_labels():
    model, x, config, _ = outlier_channel()
    stats = ql.collect(model, x.split(32))
    pixels = torch.randint(0, 256, (40, 3, 8, 8)).byte()
    split = Split(pixels, torch.zeros(40).long(), (0.5,) * 3, (0.25,) * 3)
    with torch.no_grad():
        split.labels.copy_(model(split.normalize(pixels)).argmax(1))
    frame = diagnose(model, stats, x.split(32), config, split)
    assert frame.columns.tolist() == COLUMNS
    nets = [ql.quantize(model, stats, config), ql.quantize(
        model, stats, ql.QuantConfig(8, 4, layer_weight_bits={"b": 8}, layer_act_bits={"b": 8}))]
    before, after = (ql.evaluate(net, split).top1 for net in nets)
    row = frame[frame.remedy.str.endswith(": b")].iloc[0]
    assert row.gain_points == pytest.approx(after - before)


def test_only_the_strongest_evidence_of_single_layers_is_tried():
    model, x, config, _ = outlier_channel()
    with torch.no_grad():
        model.b.weight[5] *= 400
        model.b.bias[5] *= 400
    stats = ql.collect(model, x.split(32))
    every, one, none = (diagnose(model, stats, x.split(32), config, most=n) for n in (8, 1, 0))
    local = [frame.remedy.str.startswith("8 bits for this layer").sum() for frame in (every, one)]
    assert local == [2, 1] and not none.remedy.str.startswith("8 bits for this layer").any()
    assert one.remedy.str.endswith(": fc").any(), "its input has the stronger outlier"


def test_a_sound_network_has_little_to_gain_and_no_images_are_refused():
    model, x = plain()
    stats = ql.collect(model, x)
    frame = diagnose(model, stats, [x], ql.QuantConfig(8, 8))
    assert not len(frame)
    with pytest.raises(ql.UserError, match="no images to diagnose with"):
        diagnose(model, stats, [])
