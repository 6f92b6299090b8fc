"""Corrections: the float output stays under equalisation, known errors leave the biases, BatchNorm's statistics come back, codes stay."""

import copy

import pytest
import scipy.integrate
import scipy.stats
import torch
from torch import nn

import quantlab as ql
from quantlab import graph as graphs
from quantlab import ptq
from quantlab.improving import corrections, equalization


def layer(graph, name):
    return graph.get_submodule(ptq.find_node(graph, name).target)


def sequence(channels=(3, 8, 6), depthwise=False, activation=nn.ReLU):
    torch.manual_seed(2)
    a, b, c = channels
    second = nn.Conv2d(b, b, 3, padding=1, groups=b) if depthwise else nn.Conv2d(b, b, 3, padding=1)
    first, third = nn.Conv2d(a, b, 3, padding=1), nn.Conv2d(b, c, 1)
    model = nn.Sequential(first, nn.BatchNorm2d(b), activation(), second, activation(), nn.MaxPool2d(2), third)
    size = torch.logspace(-2, 1, b).view(-1, 1, 1, 1)  # channels of very different size that matter alike
    model[3].weight.data /= size if depthwise else size.view(1, -1, 1, 1)
    model[1].running_mean, model[1].running_var = torch.randn(b) * 0.2, torch.rand(b) + 0.5
    model[1].weight.data, model[1].bias.data = (torch.rand(b) + 0.5) * size.flatten(), torch.randn(b) * 0.3 * size.flatten()
    return model.eval()


# ---- Equalisation -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depthwise", [False, True])
def test_equalized_networks_give_the_same_float_output_and_ranges_meet(depthwise):
    model, x = sequence(depthwise=depthwise), torch.randn(4, 3, 8, 8)
    equal = equalization.equalize(model)
    assert equalization.equalizable_pairs(equal) == [("0", "3"), ("3", "6")]
    assert torch.allclose(equal(x), model(x), rtol=1e-4, atol=1e-5)
    for first, second in equalization.equalizable_pairs(equal):
        w1, w2 = equal.get_submodule(first).weight, equal.get_submodule(second).weight
        r1 = w1.abs().amax((1, 2, 3))
        r2 = w2.abs().amax((1, 2, 3)) if w2.shape[1] == 1 and depthwise else w2.abs().amax((0, 2, 3))
        assert torch.allclose(r1, r2, rtol=0.02)
    before, after = (ql.quantize(m, ql.collect(m, [x]), ql.QuantConfig(4, 8, per_channel=False)) for m in (model, equal))
    exact = model(x)
    assert (after(x) - exact).square().mean() < 0.5 * (before(x) - exact).square().mean()


def test_equalisation_of_resnet20_pairs_the_two_convolutions_of_a_block(resnet20, digits):
    equal, x = equalization.equalize(resnet20), next(iter(digits.calibration(32)))
    assert equalization.equalizable_pairs(equal) == [(f"layer{s}.{b}.conv1", f"layer{s}.{b}.conv2") for s in (1, 2, 3) for b in (0, 1, 2)]
    assert torch.allclose(equal(x), resnet20(x), rtol=1e-3, atol=1e-3)


def test_nothing_is_scaled_across_relu6():
    assert equalization.equalizable_pairs(graphs.fold(graphs.trace(sequence(activation=nn.ReLU6)))) == []


# ---- Bias correction --------------------------------------------------------------------------------------------------------


def test_empirical_correction_leaves_no_mean_error_in_any_layer(resnet20, stats, digits):
    images = torch.cat(list(digits.calibration(64)))
    qmodel = ql.quantize(resnet20, stats, ql.QuantConfig(3, 4))
    before = copy.deepcopy(qmodel.state_dict())
    corrected = corrections.correct_bias(resnet20, qmodel, images.split(32))
    assert all(torch.equal(v, before[k]) for k, v in qmodel.state_dict().items())  # the argument is left alone

    def channel_means(graph):
        found = {}
        for name in ptq.layers(qmodel, qmodel.plan):
            layer(graph, name).register_forward_hook(lambda m, i, o, name=name: found.update({name: o.double().transpose(0, 1).flatten(1).mean(1)}))
        with torch.no_grad():
            graph(images.contiguous(memory_format=torch.channels_last))  # as it was measured: another layout sums, and breaks ties, otherwise
        return found

    target, plain, better = (channel_means(graph) for graph in (folded(resnet20), qmodel, corrected))
    for name in ptq.layers(corrected, corrected.plan):
        unit = ptq.input_qparams(corrected, name).scale.double() * layer(corrected, name).weight_qparams.scale.double()
        assert ((better[name] - target[name]).abs() <= 0.51 * unit + 1e-5).all()  # what rounding the bias leaves
    assert max((plain[n] - target[n]).abs().max() for n in target) > 0.1


def test_clipped_normal_against_numerical_integration():
    for mean, std, high in ((0.3, 1.0, float("inf")), (-2.0, 0.7, float("inf")), (4.0, 3.0, 6.0), (7.0, 0.5, 6.0)):
        found = corrections.clipped_normal(torch.tensor([mean]).double(), torch.tensor([std]).double(), 0.0, high)
        density = scipy.stats.norm(mean, std)
        ends, kinks = (mean - 9 * std, mean + 9 * std), [0.0, min(high, 99)]
        moments = [
            scipy.integrate.quad(lambda x, p=p: min(max(x, 0.0), high) ** p * density.pdf(x), *ends, points=kinks, limit=200)[0] for p in (1, 2)
        ]
        assert found[0].item() == pytest.approx(moments[0], abs=1e-7)
        assert found[1].item() == pytest.approx(moments[1] - moments[0] ** 2, abs=1e-6)


def gaussian_toy(n=8192):
    """bn -> relu -> 1x1 convolution, where BatchNorm's output is exactly normal: the expected input of the second layer is known."""
    torch.manual_seed(4)
    model = nn.Sequential(nn.Conv2d(6, 6, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 1)).eval()
    model[0].weight.data = torch.eye(6).view(6, 6, 1, 1) * 1.0
    model[1].weight.data, model[1].bias.data = torch.rand(6) + 0.5, torch.randn(6) * 0.5
    model[1].eps = 0.0
    images = torch.randn(n, 6, 1, 1)
    images = (images - images.mean(0)) / images.std(0, unbiased=False)
    return model, images


def test_analytic_and_empirical_correction_agree_where_the_answer_is_known():
    model, images = gaussian_toy()
    qmodel = ql.quantize(model, ql.collect(model, [images]), ql.QuantConfig(2, 8))
    mu, sigma = model[1].bias.detach().double(), model[1].weight.detach().double()
    expected = torch.from_numpy(scipy.stats.norm.pdf(mu / sigma)) * sigma + mu * torch.from_numpy(scipy.stats.norm.cdf(mu / sigma))
    delta = (layer(qmodel, "_3").weight - model[3].weight).detach().double().flatten(1)
    known = layer(qmodel, "_3").bias.detach() - delta @ expected.double()
    unit = ptq.input_qparams(qmodel, "_3").scale * layer(qmodel, "_3").weight_qparams.scale
    analytic = corrections.correct_bias_analytic(model, qmodel)
    empirical = corrections.correct_bias(model, qmodel, images.split(1024))
    size = (delta @ expected.double()).abs().max()
    assert analytic.uncorrected == [] and size > 0.05
    assert ((layer(analytic, "_3").bias - known).abs() <= unit).all()
    assert ((layer(empirical, "_3").bias - known).abs() <= unit + 0.15 * size).all()  # and the first layer's own rounding


def test_analytic_correction_names_what_it_cannot_follow():
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return self.b(torch.sigmoid(self.a(x)))

    model = Gate().eval()
    corrected = corrections.correct_bias_analytic(model, ql.quantize(model, ql.collect(model, [torch.randn(2, 3, 4, 4)])))
    assert corrected.uncorrected == ["b"]


# ---- BatchNorm --------------------------------------------------------------------------------------------------------------


def test_reestimated_statistics_are_what_batchnorm_in_training_mode_gives():
    """One layer: the corrected network equals the unfolded quantized convolution followed by a BatchNorm in training mode."""
    torch.manual_seed(5)
    model = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 4)).eval()
    model[1].running_mean, model[1].running_var = torch.randn(6), torch.rand(6) * 2 + 0.2
    model[1].weight.data, model[1].bias.data, model[1].eps = torch.tensor([0.5, -1.0, 1.5, 0.1, 2.0, -0.3]), torch.randn(6), 0.05
    images = torch.randn(64, 3, 8, 8)
    qmodel = ql.quantize(model, ql.collect(model, [images]), ql.QuantConfig(3, 8))
    corrected = corrections.reestimate_batchnorm(model, qmodel, images)
    factor = (model[1].weight / torch.sqrt(model[1].running_var + model[1].eps)).view(-1, 1, 1, 1)
    bn = copy.deepcopy(model[1]).train()
    x = ql.fake_quantize(images, ptq.input_qparams(qmodel, "_0"))
    with torch.no_grad():
        expected = bn(nn.functional.conv2d(x, layer(qmodel, "_0").weight / factor))
        found = nn.functional.conv2d(x, layer(corrected, "_0").weight, layer(corrected, "_0").bias)
    assert torch.allclose(found, expected, atol=2e-2, rtol=1e-3) and (found - expected).abs().mean() < 3e-3


@pytest.mark.parametrize("name", ["correct_bias", "reestimate_batchnorm", "analytic"])
def test_codes_stay_and_biases_are_integers(resnet20, stats, digits, name):
    qmodel, images = ql.quantize(resnet20, stats, ql.QuantConfig(3, 4)), torch.cat(list(digits.calibration(32)))
    corrected = {
        "correct_bias": lambda: corrections.correct_bias(resnet20, qmodel, images),
        "reestimate_batchnorm": lambda: corrections.reestimate_batchnorm(resnet20, qmodel, [images]),
        "analytic": lambda: corrections.correct_bias_analytic(resnet20, qmodel),
    }[name]()
    changed = 0.0
    for n in ptq.layers(qmodel, qmodel.plan):
        old, new = layer(qmodel, n), layer(corrected, n)
        codes = ql.quantize_tensor(new.weight, new.weight_qparams)
        assert torch.equal(codes, ql.quantize_tensor(old.weight, old.weight_qparams))
        assert torch.equal(ql.dequantize(codes, new.weight_qparams), new.weight)
        bias = new.bias.double() / (ptq.input_qparams(corrected, n).scale.double() * new.weight_qparams.scale.double())
        assert (bias - bias.round()).abs().max() < 1e-3 * bias.abs().max().clamp(min=1)
        changed += (new.bias - old.bias).abs().sum().item()
    assert changed > 0 and ql.weight_bytes(corrected) == ql.weight_bytes(qmodel) and corrected.config is qmodel.config
    assert ql.evaluate(corrected, digits.test, limit=100).n == 100


def test_corrections_survive_equalisation(resnet20, digits):
    images = torch.cat(list(digits.calibration(32)))
    equal = equalization.equalize(resnet20)
    qmodel = ql.quantize(equal, ql.collect(equal, [images]), ql.QuantConfig(4, 8))
    bn = layer(folded(equal), "layer1_0_conv1").folded_batchnorm
    with torch.no_grad():
        value = equal.get_submodule("layer1.0.conv1")(equal.relu(equal.conv1(images))).double().transpose(0, 1).flatten(1)
    plain = layer(folded(resnet20), "layer1_0_conv1").folded_batchnorm
    ratio = equal.get_submodule("layer1.0.conv1").bias / layer(folded(resnet20), "layer1_0_conv1").bias
    assert torch.allclose(bn["mean"], plain["mean"] * ratio, rtol=1e-3) and value.shape[0] == len(bn["mean"])
    assert ql.evaluate(corrections.reestimate_batchnorm(equal, qmodel, images), digits.test, limit=200).top1 > 95


def test_bad_input(resnet20, stats):
    qmodel = ql.quantize(resnet20, stats, ql.QuantConfig(4, 4))
    with pytest.raises(ql.UserError, match="no images to measure the correction on"):
        corrections.correct_bias(resnet20, qmodel, [])
    plain, x = nn.Sequential(nn.Conv2d(3, 2, 1)), torch.randn(2, 3, 4, 4)
    with pytest.raises(ql.UserError, match="no layer of this network had a BatchNorm"):
        corrections.reestimate_batchnorm(plain, ql.quantize(plain, ql.collect(plain, [x])), x)
