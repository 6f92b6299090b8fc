"""Collect and quantize: what is stored is on its grid, nothing else is rounded, and a second implementation agrees."""

import pytest
import torch
from torch import fx, nn

import quantlab as ql
from quantlab import ptq
from quantlab.edgestats import EdgeStats


class Record(fx.Interpreter):
    """Keeps every node's value."""

    def __init__(self, graph):
        super().__init__(graph)
        self.values = {}

    def run_node(self, node):
        self.values[node.name] = super().run_node(node)
        return self.values[node.name]


def is_on_grid(x, q):
    return torch.equal(ql.fake_quantize(x, q), x)


@pytest.mark.parametrize("config", [
    ql.QuantConfig(8, 8), ql.QuantConfig(4, 4), ql.QuantConfig(2, 3, observer="percentile", residual_bits=6),
    ql.QuantConfig(3, 3, first_last_bits=8), ql.QuantConfig(4, 4, act_symmetric=True, weight_symmetric=False, per_channel=False),
], ids=str)
def test_every_layer_reads_codes_of_its_width(resnet20, stats, digits, config):
    qmodel = ql.quantize(resnet20, stats, config)
    record = Record(qmodel)
    record.run(next(iter(digits.calibration(16))))
    nodes = {n.name: n for n in qmodel.graph.nodes}
    for layer in ptq.layers(qmodel, qmodel.plan):
        module = qmodel.get_submodule(nodes[layer].target)
        weight_bits, act_bits = config.layer_bits(qmodel.plan, layer)
        assert module.weight_qparams.bits == weight_bits and is_on_grid(module.weight.detach(), module.weight_qparams)
        source = nodes[layer].args[0]
        while source.op == "call_function":  # flatten
            source = source.args[0]
        quantizer = qmodel.get_submodule(source.target)
        assert isinstance(quantizer, ptq.Quantizer)
        expected = config.input_bits if layer in qmodel.plan.first else min(act_bits, 8)
        assert quantizer.qparams.bits == expected
        assert is_on_grid(record.values[source.name], quantizer.qparams)
        unit = quantizer.scale.double() * module.weight_qparams.scale.double()
        codes = module.bias.detach().double() / unit
        assert (codes - codes.round()).abs().max() < 1e-3 * codes.abs().max().clamp(min=1) and codes.abs().max() <= 2**30


def test_operands_and_results_of_adds_have_residual_bits(resnet20, stats):
    qmodel = ql.quantize(resnet20, stats, ql.QuantConfig(3, 3, residual_bits=7))
    adds = [n for n in qmodel.graph.nodes if n.name.startswith("add")]
    assert len(adds) == 9
    for add in adds:
        for operand in add.args:
            assert qmodel.get_submodule(operand.target).qparams.bits == 7


def test_float_residual_stream(resnet20, stats):
    qmodel = ql.quantize(resnet20, stats, ql.QuantConfig(4, 4, residual_bits=None))
    for add in [n for n in qmodel.graph.nodes if n.name.startswith("add")]:
        assert not any("quantizers" in str(operand.target) for operand in add.args)
    layers = {n.name: n for n in qmodel.graph.nodes}
    for layer in ptq.layers(qmodel, qmodel.plan)[1:-1]:
        assert qmodel.get_submodule(layers[layer].args[0].target).qparams.bits == 4


def test_equal_widths_need_no_second_rounding(resnet20, stats):
    names = [name for name, _ in ql.quantize(resnet20, stats, ql.QuantConfig(8, 8)).quantizers.named_children()]
    assert sorted(names) == sorted(ql.quantize(resnet20, stats).plan.stores)


def test_a_second_implementation_agrees():
    """conv-bn-relu-conv quantized step by step with torch's own observers' formulas and kernels."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 64, 5)).eval()
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2)
    x = torch.randn(16, 3, 8, 8)
    config = ql.QuantConfig(5, 6, observer="minmax", weight_observer="minmax")
    qmodel = ql.quantize(model, ql.collect(model, [x]), config)

    def fake(t, low, high, bits):
        scale = torch.tensor((high - low) / (2**bits - 1))
        zero_point = int(round(-low / ((high - low) / (2**bits - 1))))
        return torch.fake_quantize_per_tensor_affine(t, scale.item(), zero_point, 0, 2**bits - 1), scale.double()

    def weight(w, bits):
        top = 2 ** (bits - 1) - 1
        scale = (w.flatten(1).abs().amax(1).double() / top).float()
        return torch.fake_quantize_per_channel_affine(w, scale, torch.zeros(len(w), dtype=torch.int32), 0, -top, top), scale.double()

    factor = (model[1].weight / torch.sqrt(model[1].running_var + model[1].eps)).detach()
    w1 = model[0].weight.detach() * factor.view(-1, 1, 1, 1)
    b1 = (model[1].bias - model[1].running_mean * factor).detach()
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
    assert off.median() < 1e-4 and off.max() < 0.05, "only a rare activation code that float rounding moved across a tie may differ"


def test_more_bits_are_closer_to_float(resnet20, stats, digits):
    x = next(iter(digits.calibration(64, seed=1)))
    with torch.no_grad():
        exact = resnet20(x)
        errors = [(ql.quantize(resnet20, stats, ql.QuantConfig(b, b))(x) - exact).square().mean().item() for b in (8, 6, 4, 3, 2)]
    assert errors == sorted(errors)


def test_statistics_merge_across_processes(resnet20, digits, stats):
    batches = list(digits.calibration(256, seed=0))
    joined = ql.collect(resnet20, batches[:1]) + ql.collect(resnet20, batches[1:])
    assert joined.n_images == 256
    for name, edge in joined.edges.items():
        assert torch.equal(edge.bins, stats.edges[name].bins) and edge.zeros == stats.edges[name].zeros


def test_statistics_know_their_network(resnet20, stats, digits):
    with pytest.raises(ql.UserError, match="another network"):
        ql.quantize(ql.load_model("resnet20"), stats)
    with pytest.raises(ql.UserError, match="another placement"):
        ql.quantize(resnet20, stats, ql.QuantConfig(placement="inputs"))
    with pytest.raises(ql.UserError, match="cannot be added"):
        stats + ql.collect(resnet20, digits.calibration(8), placement="inputs")


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


def test_own_observer_as_a_function(resnet20, stats):
    seen = []

    def own(edge, bits, symmetric):
        assert isinstance(edge, EdgeStats)
        seen.append(bits)
        return 0.0 if edge.minimum >= 0 else -1.0, 1.0

    qmodel = ql.quantize(resnet20, stats, ql.QuantConfig(4, 4, observer=own))
    assert set(seen) == {4, 8} and qmodel.quantizers.layer1_0_relu.scale.item() == pytest.approx(1 / 15)


def test_sizes_are_those_of_packed_codes(resnet20, stats):
    sizes = {b: ptq.weight_bytes(ql.quantize(resnet20, stats, ql.QuantConfig(weight_bits=b))) for b in (8, 4, 2)}
    weights = sum(p.numel() for n, p in resnet20.named_parameters() if p.dim() > 1)
    assert sizes[8] - sizes[4] == weights // 2 and sizes[4] - sizes[2] == weights // 4
