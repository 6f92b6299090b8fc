"""Collect and quantize: what is stored is on its grid, nothing else is rounded, and a second
implementation agrees.
"""

import copy
import io

import pytest
import torch
from torch import nn

import quantlab as ql
from quantlab.calibration import Watcher
from quantlab.edgestats import EdgeStats
from quantlab.graph import folded
from quantlab.plan import make_plan
from quantlab.quantized import QuantizedNetwork, Quantizer, edge_name, find_node

IMAGES = torch.randn(8, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def is_on_grid(x, q):
    return torch.equal(ql.fake_quantize(x, q), x)


@pytest.mark.parametrize("config", [
    ql.QuantConfig(8, 8), ql.QuantConfig(4, 4),
    ql.QuantConfig(2, 3, observer="percentile", residual_bits=6),
    ql.QuantConfig(3, 3, first_last_bits=8),
    ql.QuantConfig(4, 4, act_symmetric=True, weight_symmetric=False, per_channel=False),
], ids=str)
def test_every_layer_reads_codes_of_its_width(resnet20, stats, digits, config):
    qmodel = ql.quantize(resnet20, stats, config)
    values = {}
    names = {node.name for node in qmodel.graph.nodes}
    Watcher(qmodel, names, values.__setitem__).run(next(iter(digits.calibration(16))))
    nodes = {n.name: n for n in qmodel.graph.nodes}
    for layer, module in qmodel.layers.items():
        weight_bits, act_bits = config.layer_bits(qmodel.plan, layer)
        assert module.weight_qparams.bits == weight_bits
        assert is_on_grid(module.weight.detach(), module.weight_qparams)
        source = nodes[layer].args[0]
        while source.op == "call_function":  # flatten
            source = source.args[0]
        quantizer = qmodel.get_submodule(source.target)
        assert isinstance(quantizer, Quantizer)
        expected = config.input_bits if layer in qmodel.plan.first else min(act_bits, 8)
        assert quantizer.qparams.bits == expected == qmodel.reads(layer).bits
        assert is_on_grid(values[source.name], quantizer.qparams)
        scale = quantizer.scale.double() * module.weight_qparams.scale.double()
        assert torch.equal(qmodel.bias_scale(layer), scale)
        codes = module.bias.detach().double() / scale
        assert (codes - codes.round()).abs().max() < 1e-3 * codes.abs().max().clamp(min=1)
        assert codes.abs().max() <= 2**30
        assert torch.equal(qmodel.bias_codes(layer).double(), codes.round())


def test_operands_and_results_of_adds_have_residual_bits(resnet20, stats):
    qmodel = ql.quantize(resnet20, stats, ql.QuantConfig(3, 3, residual_bits=7))
    adds = [n for n in qmodel.graph.nodes if n.name.endswith("_add")]
    assert len(adds) == 9
    for add in adds:
        for operand in add.args:
            assert qmodel.get_submodule(operand.target).qparams.bits == 7


def test_float_residual_stream(resnet20, stats):
    qmodel = ql.quantize(resnet20, stats, ql.QuantConfig(4, 4, residual_bits=None))
    for add in [n for n in qmodel.graph.nodes if n.name.endswith("_add")]:
        assert not any("quantizers" in str(operand.target) for operand in add.args)
    layers = {n.name: n for n in qmodel.graph.nodes}
    for layer in list(qmodel.layers)[1:-1]:
        assert qmodel.get_submodule(layers[layer].args[0].target).qparams.bits == 4


def test_equal_widths_need_no_second_rounding(resnet20, stats):
    qmodel = ql.quantize(resnet20, stats, ql.QuantConfig(8, 8))
    names = [edge_name(node) for node in qmodel.quantizer_nodes]
    assert sorted(names) == sorted(ql.quantize(resnet20, stats).plan.stores)


def test_a_second_implementation_agrees():
    """conv-bn-relu-conv quantized step by step with torch's own observers' formulas and kernels."""
    torch.manual_seed(3)
    convolution = nn.Conv2d(3, 6, 3, padding=1, bias=False)
    last = nn.Linear(6 * 64, 5)
    model = nn.Sequential(convolution, nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), last).eval()
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2)
    x = torch.randn(16, 3, 8, 8)
    config = ql.QuantConfig(5, 6, observer="minmax", weight_observer="minmax")
    qmodel = ql.quantize(model, ql.collect(model, [x]), config)

    def fake(t, low, high, bits):
        top = 2**bits - 1
        scale = torch.tensor((high - low) / top)
        zero_point = int(round(-low / ((high - low) / top)))
        t_hat = torch.fake_quantize_per_tensor_affine(t, scale.item(), zero_point, 0, top)
        return t_hat, scale.double()

    def weight(w, bits):
        top = 2 ** (bits - 1) - 1
        scale = (w.flatten(1).abs().amax(1).double() / top).float()
        zero = torch.zeros(len(w), dtype=torch.int32)
        w_hat = torch.fake_quantize_per_channel_affine(w, scale, zero, 0, -top, top)
        return w_hat, scale.double()

    bn = model[1]
    factor = (bn.weight / torch.sqrt(bn.running_var + bn.eps)).detach()
    w1 = model[0].weight.detach() * factor.view(-1, 1, 1, 1)
    b1 = (bn.bias - bn.running_mean * factor).detach()
    hidden = torch.relu(torch.nn.functional.conv2d(x, w1, b1, padding=1))
    x_hat, s_x = fake(x, x.min().item(), x.max().item(), 8)
    w1_hat, s_w1 = weight(w1, 5)
    b1_hat = ((b1 / (s_x * s_w1)).round() * s_x * s_w1).float()
    y = torch.relu(torch.nn.functional.conv2d(x_hat, w1_hat, b1_hat, padding=1))
    y_hat, s_y = fake(y, 0.0, hidden.max().item(), 6)
    w2_hat, s_w2 = weight(model[4].weight.detach(), 5)
    b2_hat = ((model[4].bias.detach() / (s_y * s_w2)).round() * s_y * s_w2).float()
    expected = torch.nn.functional.linear(y_hat.flatten(1), w2_hat, b2_hat)
    ours = qmodel(x)
    off = (ours - expected).abs() / expected.std()
    assert off.median() < 1e-4 and off.max() < 0.05, "but for a rare code moved across a tie"


def test_more_bits_are_closer_to_float(resnet20, stats, digits):
    x = next(iter(digits.calibration(64, seed=1)))
    with torch.no_grad():
        exact = resnet20(x)
        networks = [ql.quantize(resnet20, stats, ql.QuantConfig(b, b)) for b in (8, 6, 4, 3, 2)]
        errors = [(network(x) - exact).square().mean().item() for network in networks]
    assert errors == sorted(errors)


def test_statistics_merge_across_processes(resnet20, digits, stats):
    batches = list(digits.calibration(256, seed=0))
    joined = ql.collect(resnet20, batches[:1]) + ql.collect(resnet20, batches[1:])
    assert joined.n_images == 256
    for name, edge in joined.edges.items():
        whole = stats.edges[name]
        assert torch.equal(edge.bins, whole.bins) and edge.zeros == whole.zeros


def test_statistics_know_their_network(resnet20, stats, digits):
    with pytest.raises(ql.UserError, match="another network"):
        ql.quantize(ql.load_model("resnet20"), stats)
    with pytest.raises(ql.UserError, match="cannot be added"):
        stats + ql.collect(ql.load_model("resnet20"), digits.calibration(8))


def test_empty_and_broken_calibration(resnet20, digits):
    with pytest.raises(ql.UserError, match="calibration set is empty"):
        ql.collect(resnet20, [])
    with pytest.raises(ql.UserError, match="has 1 to 1294 training images"):
        digits.calibration(0)
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ql.UserError, match="edge x: 1 of"):
            images = torch.zeros(1, 3, 32, 32)
            images[0, 0, 0, 0] = bad
            ql.collect(resnet20, [images])


def test_a_constant_network_works():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    x = torch.randn(2, 3, 4, 4)
    assert ql.quantize(model, ql.collect(model, [x]), ql.QuantConfig(2, 2))(x).abs().max() == 0


def test_bias_codes_stay_below_2_to_the_30():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    with torch.no_grad():
        model[0].weight.mul_(1e-12)
        model[0].bias.fill_(3.0)
    x = torch.randn(2, 3, 4, 4)
    qmodel = ql.quantize(model, ql.collect(model, [x]))
    layer, s_in = qmodel.get_submodule("0"), qmodel.quantizers.input_1.scale
    codes = layer.bias.detach().double() / (s_in.double() * layer.weight_qparams.scale.double())
    assert codes.abs().max() <= 2**30
    assert torch.allclose(qmodel(x), model(x), atol=0.05)


@pytest.mark.parametrize("per_channel", [True, False])
def test_a_channel_without_weights_keeps_its_bias(per_channel):
    """Images of 0 to 255, so that a step of the input is 1 and half of one loses every bias."""
    conv = nn.Conv2d(3, 8, 3, padding=1)
    pruned = slice(0, 8 if not per_channel else 4)
    conv.weight.data[pruned], conv.bias.data[pruned] = 0, torch.rand(8)[pruned]
    model = nn.Sequential(conv, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    x = torch.rand(16, 3, 8, 8) * 255
    qmodel = ql.quantize(
        model, ql.collect(model, [x]), ql.QuantConfig(per_channel=per_channel))
    error = (qmodel.layers["_0"].bias - conv.bias)[pruned].abs()
    assert (error <= conv.bias.abs()[pruned] * 2.0**-20).all()
    step = qmodel.quantizer_nodes[find_node(qmodel, "quantizers__1")].scale
    with torch.no_grad():
        found, integers = qmodel(x)[:, pruned], ql.to_integer(qmodel)(x)[:, pruned]
    exact = conv.bias.relu()[pruned]
    assert ((found - exact).abs() <= 0.51 * step).all() and torch.allclose(integers, found)


class Ends(nn.Module):
    """A classifier and what its author does with the logits."""

    def __init__(self, tail):
        super().__init__()
        self.conv, self.fc, self.tail = nn.Conv2d(3, 6, 3), nn.Linear(6, 5), tail
        self.heat = nn.Parameter(torch.tensor(0.7))

    def forward(self, x):
        return self.tail(self, self.fc(self.conv(x).relu().mean((2, 3))))


@pytest.mark.parametrize("tail", [
    lambda net, y: torch.log_softmax(y, 1), lambda net, y: nn.functional.softmax(y, dim=-1),
    lambda net, y: y / 2, lambda net, y: y / net.heat.exp(), lambda net, y: (y * 3).sigmoid(),
    lambda net, y: y.unsqueeze(2).squeeze(2), lambda net, y: y.reshape(-1, 5).float() + 1,
    lambda net, y: torch.relu(y.softmax(1) - 0.1),
])
def test_what_is_done_with_the_logits_rounds_nothing(tail):
    torch.manual_seed(3)
    model, x = Ends(tail).eval(), torch.randn(8, 3, 8, 8)
    config = ql.QuantConfig(3, 3)
    qmodel = ql.quantize(model, ql.collect(model, [x]), config)
    plain = copy.deepcopy(model)
    plain.tail = lambda net, y: y
    logits = ql.quantize(plain, ql.collect(plain, [x]), config)(x)
    assert torch.equal(qmodel(x), tail(model, logits)), "as if it stood outside the network"
    assert "fc" not in qmodel.plan.stores and qmodel.plan.floats == {}
    assert torch.allclose(ql.to_integer(qmodel)(x), qmodel(x), atol=1e-5)


def test_an_operation_in_the_middle_is_no_tail():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            y = self.a(x)
            return self.b(y.softmax(1)) * y.sigmoid()

    plan = make_plan(folded(Gated().eval()))
    assert list(plan.floats) == ["softmax", "sigmoid", "mul"]
    assert {"a", "b", "softmax"} <= set(plan.stores)


def unpooled(net, pair):
    return net.unpool(pair[0], pair[1])


# what an operation makes of y: no float, several values, values that parameters make
ODD = {
    "where": lambda net, y: torch.where(y > 0, y, 0.1 * y),
    "mask": lambda net, y: y * (y > 0),
    "pair": lambda net, y: torch.max(y, 1, keepdim=True)[0].expand(-1, 6, -1, -1),
    "topk": lambda net, y: y.topk(6, 1)[0],
    "unbind": lambda net, y: torch.stack(y.unbind(1), 1),
    "indices": lambda net, y: unpooled(net, net.pool(torch.relu(y))),
    "parameter": lambda net, y: y + net.heat.exp().view(1, -1, 1, 1),
    "part of a parameter": lambda net, y: y * net.table[: y.size(1)].view(1, -1, 1, 1),
    "keyword": lambda net, y: torch.relu(input=net.same(input=y)),
    "attribute": lambda net, y: y.mT.mT,
}


@pytest.mark.parametrize("name", ODD)
def test_values_that_are_no_float_tensors_of_the_image_alone(name):
    class Odd(Ends):
        def __init__(self):
            super().__init__(None)
            self.pool, self.unpool = nn.MaxPool2d(2, return_indices=True), nn.MaxUnpool2d(2)
            self.same, self.table = nn.Conv2d(6, 6, 1), nn.Parameter(torch.rand(8))

        def forward(self, x):
            return self.fc(ODD[name](self, self.conv(x)).mean((2, 3)))

    model, x = Odd().eval(), torch.randn(16, 3, 10, 10)
    qmodel = ql.quantize(model, ql.collect(model, [x]))
    with torch.no_grad():
        exact, rounded = model(x), qmodel(x)
    assert 10 * torch.log10(exact.square().sum() / (rounded - exact).square().sum()) > 35
    if name not in ("unbind", "keyword", "attribute"):
        first = next(iter(qmodel.plan.floats))
        with pytest.raises(ql.UserError, match=f"node {first} .*has no integer"):
            ql.to_integer(qmodel)


def test_own_observer_as_a_function(resnet20, stats):
    seen = []

    def own(edge, bits, symmetric):
        assert isinstance(edge, EdgeStats)
        seen.append(bits)
        return 0.0 if edge.minimum >= 0 else -1.0, 1.0

    qmodel = ql.quantize(resnet20, stats, ql.QuantConfig(4, 4, observer=own))
    assert set(seen) == {4, 8}
    assert qmodel.quantizers.layer1_0_relu.scale.item() == pytest.approx(1 / 15)


def test_sizes_are_those_of_packed_codes(resnet20, stats):
    networks = {b: ql.quantize(resnet20, stats, ql.QuantConfig(weight_bits=b)) for b in (8, 4, 2)}
    sizes = {b: ql.weight_bytes(network) for b, network in networks.items()}
    weights = sum(p.numel() for n, p in resnet20.named_parameters() if p.dim() > 1)
    assert sizes[8] - sizes[4] == weights // 2 and sizes[4] - sizes[2] == weights // 4


# ---- One object ----------------------------------------------------------------------------------


def test_a_copy_keeps_everything_and_shares_nothing(resnet20, stats, digits):
    qmodel = ql.quantize(resnet20, stats, ql.QuantConfig(4, 4))
    copied = copy.deepcopy(copy.deepcopy(qmodel))
    assert isinstance(copied, QuantizedNetwork)
    assert copied.plan == qmodel.plan and copied.config == qmodel.config
    x = next(iter(digits.calibration(8)))
    logits = qmodel(x)
    assert torch.equal(copied(x), logits)
    layer = "layer1_0_conv1"
    assert torch.equal(copied.codes(layer), qmodel.codes(layer))
    q = copied.layers[layer].weight_qparams
    copied.write(layer, torch.zeros_like(copied.codes(layer)), q, copied.layers[layer].bias)
    assert torch.equal(qmodel(x), logits) and not torch.equal(copied(x), logits)


def test_to_and_state_dict_keep_everything(resnet20, stats, digits):
    qmodel = ql.quantize(resnet20, stats, ql.QuantConfig(4, 4))
    other = ql.quantize(resnet20, stats, ql.QuantConfig(4, 4, observer="minmax"))
    other.load_state_dict(qmodel.state_dict())
    x = next(iter(digits.calibration(8)))
    assert torch.equal(other(x), qmodel(x)) and other.to("cpu").config.observer == "minmax"
    assert qmodel.to(torch.float32).plan is qmodel.plan


@pytest.mark.parametrize("widths", [(2, 8), (8, 2), (4, 3)])
def test_the_state_of_other_widths_is_refused_and_nothing_changes(widths):
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)).eval(), IMAGES
    stats = ql.collect(model, [x])
    saved, other = (ql.quantize(model, stats, ql.QuantConfig(b, b)) for b in widths)
    before = other(x)
    with pytest.raises(ql.UserError, match=r"_1 has codes 0\.\.\d+ here and 0\.\.\d+ in the state"):
        other.load_state_dict(saved.state_dict())
    assert torch.equal(other(x), before)
    stored = io.BytesIO()
    torch.save(saved.state_dict(), stored)
    stored.seek(0)
    saved.load_state_dict(torch.load(stored, weights_only=True))


def test_codes_that_were_changed_behind_our_back_are_refused(resnet20, stats):
    qmodel = ql.quantize(resnet20, stats, ql.QuantConfig(4, 4))
    with torch.no_grad():
        qmodel.layers["fc"].weight[0, 0] += 1e-4
    with pytest.raises(ql.UserError, match="the weight of fc is not the value of its codes"):
        qmodel.codes("fc")


def test_written_codes_and_biases_are_read_back(resnet20, stats):
    qmodel = ql.quantize(resnet20, stats, ql.QuantConfig(4, 4))
    q = qmodel.layers["fc"].weight_qparams
    codes = torch.randint(q.qmin, q.qmax + 1, qmodel.codes("fc").shape, dtype=torch.int32)
    bias = torch.randn(10)
    qmodel.write("fc", codes, q, bias)
    assert torch.equal(qmodel.codes("fc"), codes)
    step = qmodel.bias_scale("fc")
    assert ((qmodel.bias_codes("fc") * step - bias).abs() <= step / 2 * (1 + 1e-6)).all()


def test_a_layer_behind_a_float_operation_reads_no_codes():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    stats = ql.collect(model, [torch.randn(2, 3, 4, 4)])
    config = ql.QuantConfig(4, 4, input_bits=None)
    qmodel = ql.quantize(model, stats, config)
    first, second = qmodel.layers
    assert qmodel.reads(first) is None and qmodel.bias_codes(first) is None
    assert qmodel.reads(second).bits == 4 and qmodel.bias_codes(second) is not None
