"""Weights of 2^b - 1 and of 2^b levels in integers: every width, both executors, both roundings;
accumulators against plain Python integers.
"""

import copy
import functools
import itertools

import pytest
import torch
from conftest import equal_codes, fuzz
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import quantlab as ql
from quantlab.affine import QParams
from quantlab.integer import proof
from quantlab.integer.network import to_integer

EXECUTORS = [("reference", None), ("fast", False), ("fast", None)]


class Small(nn.Module):
    """A convolution, one in groups, a depthwise one and a linear layer."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, (1, 2), groups=2)
        self.c, self.fc = nn.Conv2d(6, 6, 2, groups=6, padding=1), nn.Linear(6 * 20, 3)

    def forward(self, x):
        return self.fc(self.c(self.b(self.a(x).relu()).relu()).relu().flatten(1))


def small(seed, bits, act_bits, **settings):
    """(Network, its images): weights of both signs, in some channels of one alone."""
    torch.manual_seed(seed)
    model, x = Small().eval(), torch.randn(3, 3, 6, 6)
    with torch.no_grad():
        model.a.weight[0].abs_()
        model.b.weight[1] = -model.b.weight[1].abs()
    config = ql.QuantConfig(bits, act_bits, **settings)
    return ql.quantize(model, ql.collect(model, [x]), config), x


@functools.cache
def eight_bits():
    return small(0, 8, 8, observer="minmax", weight_observer="minmax")


def set_zero_points(qmodel, bits, below):
    """Random codes of 2^b levels, `below` of them below zero, the first and the last among them."""
    for name, layer in qmodel.layers.items():
        scale = layer.weight_qparams.scale
        zero_point = torch.full_like(scale, below, dtype=torch.int32)
        q = QParams(scale, zero_point, 0, 2**bits - 1, axis=0)
        codes = torch.randint(2**bits, layer.weight.shape, dtype=torch.int32)
        codes.view(-1)[:2] = torch.tensor([0, 2**bits - 1])
        qmodel.write(name, codes, q)


def last_layer_in_python(qmodel, codes):
    """sum (code - zero_point) (weight code - zero_point) + bias, in Python's integers."""
    q, q_in = qmodel.fc.weight_qparams, qmodel.reads("fc")
    zero_point, bias = int(q_in.zero_point), qmodel.bias_codes("fc").tolist()
    zero_points = q.zero_point.expand(3).tolist()
    rows = [[w - z for w in row] for row, z in zip(qmodel.codes("fc").tolist(), zero_points)]
    images = [[a - zero_point for a in image] for image in codes.flatten(1).tolist()]
    return [[sum(a * w for a, w in zip(image, row)) + b for row, b in zip(rows, bias)]
            for image in images]


def integers(qmodel, x, rounding):
    """The reference, after all executors have given the same codes, and the logits that Python has.
    """
    models = [to_integer(qmodel, rounding, executor, compile) for executor, compile in EXECUTORS]
    codes, *others = (model.codes(x) for model in models)
    assert all(equal_codes(other, codes) for other in others)
    assert last_layer_in_python(qmodel, codes["relu_2"]) == codes["logits"].tolist()
    return models[0]


@given(bits=st.integers(2, 8), act_bits=st.integers(2, 8), seed=st.integers(0, 2**16),
       symmetric=st.booleans(), observer=st.sampled_from(["minmax", "lp"]),
       per_channel=st.booleans())
@fuzz(20)
def test_codes_are_the_simulation_s_in_every_executor(
        bits, act_bits, seed, symmetric, observer, per_channel):
    """Equal but where the exact result is a tie, of which float32 cannot see the side."""
    qmodel, x = small(seed, bits, act_bits, weight_symmetric=symmetric, weight_observer=observer,
                      per_channel=per_channel)
    integers(qmodel, x, "double")
    frame = proof.per_operation(qmodel, integers(qmodel, x, "single"), [x])
    assert (frame.differing == frame.ties).all() and frame.max_difference.max() <= 1


@pytest.mark.parametrize("bits, side", list(itertools.product(range(2, 9), range(4))))
def test_every_level_at_every_width_in_every_executor(bits, side):
    """One code more below zero, one more above, all above, all below. An int8 does not hold 8 bits
    of the last three.
    """
    below = [2 ** (bits - 1), 2 ** (bits - 1) - 1, 0, 2**bits - 1][side]
    qmodel, x = copy.deepcopy(eight_bits())
    set_zero_points(qmodel, bits, below)
    images = torch.cat([x, 1e3 * x.sign()])
    operations = integers(qmodel, images, ("single", "double")[bits % 2]).operations
    for name in qmodel.layers:
        op, q_in = operations[name], qmodel.reads(name)
        assert (op.weight.min(), op.weight.max()) == (-below, 2**bits - 1 - below)
        ends = [end - int(q_in.zero_point) for end in (q_in.qmin, q_in.qmax)]
        for weight, bias in zip(op.weight.flatten(1).tolist(), op.bias.tolist()):
            for extreme in (min, max):
                total = sum(extreme(w * end for end in ends) for w in weight) + bias
                assert -(2 ** (op.accumulator_bits - 1)) <= total < 2 ** (op.accumulator_bits - 1)
