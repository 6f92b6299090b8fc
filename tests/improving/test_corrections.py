"""Corrections: the float output stays under equalisation, known errors leave the biases,
BatchNorm's statistics come back, codes stay.
"""

import copy

import pytest
import scipy.integrate
import scipy.stats
import torch
from torch import nn

import quantlab as ql
from quantlab.calibration import watch
from quantlab.graph import folded
from quantlab.improving import corrections, equalization
from quantlab.quantized import find_node


def layer(graph, name):
    return graph.get_submodule(find_node(graph, name).target)


def channels_first(value):
    """float64 [C, N * places] of a layer's output."""
    return value.double().transpose(0, 1).flatten(1)


def sequence(channels=(3, 8, 6), depthwise=False, activation=nn.ReLU):
    torch.manual_seed(2)
    a, b, c = channels
    second = nn.Conv2d(b, b, 3, padding=1, groups=b if depthwise else 1)
    model = nn.Sequential(
        nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), activation(), second, activation(),
        nn.MaxPool2d(2), nn.Conv2d(b, c, 1))
    # channels of very different size that matter alike
    size = torch.logspace(-2, 1, b)
    model[3].weight.data /= size.view(-1, 1, 1, 1) if depthwise else size.view(1, -1, 1, 1)
    model[1].running_mean = torch.randn(b) * 0.2
    model[1].running_var = torch.rand(b) + 0.5
    model[1].weight.data = (torch.rand(b) + 0.5) * size
    model[1].bias.data = torch.randn(b) * 0.3 * size
    return model.eval()


# ---- Equalisation --------------------------------------------------------------------------------


@pytest.mark.parametrize("depthwise", [False, True])
def test_equalized_networks_give_the_same_float_output_and_ranges_meet(depthwise):
    model, x = sequence(depthwise=depthwise), torch.randn(4, 3, 8, 8)
    equal = equalization.equalize(model)
    assert equalization.equalizable_pairs(equal) == [("0", "3"), ("3", "6")]
    assert torch.allclose(equal(x), model(x), rtol=1e-4, atol=1e-5)
    for first, second in equalization.equalizable_pairs(equal):
        w1, w2 = equal.get_submodule(first).weight, equal.get_submodule(second).weight
        r1 = w1.abs().amax((1, 2, 3))
        places = (1, 2, 3) if w2.shape[1] == 1 and depthwise else (0, 2, 3)
        assert torch.allclose(r1, w2.abs().amax(places), rtol=0.02)
    config, exact = ql.QuantConfig(4, 8, per_channel=False), model(x)
    before, after = (ql.quantize(m, ql.collect(m, [x]), config) for m in (model, equal))
    assert (after(x) - exact).square().mean() < 0.5 * (before(x) - exact).square().mean()


def test_equalisation_of_resnet20_pairs_the_two_convolutions_of_a_block(resnet20, digits):
    equal, x = equalization.equalize(resnet20), next(iter(digits.calibration(32)))
    blocks = [f"layer{stage}.{block}" for stage in (1, 2, 3) for block in (0, 1, 2)]
    pairs = [(f"{block}.conv1", f"{block}.conv2") for block in blocks]
    assert equalization.equalizable_pairs(equal) == pairs
    assert torch.allclose(equal(x), resnet20(x), rtol=1e-3, atol=1e-3)


class Places(nn.Module):
    """A linear layer that mixes 16 places, as many as there are channels."""

    def __init__(self, behind=None):
        super().__init__()
        self.c, self.l, self.o = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 16), nn.Linear(256, 10)
        self.behind = behind or nn.Identity()

    def forward(self, x):
        y = self.l(torch.relu(self.c(x)).flatten(2)).relu()  # [B, 16 channels, 16 places]
        return self.o(self.behind(y).flatten(1))


@torch.no_grad()
@pytest.mark.parametrize("behind", [None, nn.Conv1d(16, 16, 1), nn.AvgPool1d(1), nn.Linear(16, 16)])
def test_equalisation_keeps_networks_that_mix_places(behind):
    model, x = Places(behind).eval(), torch.randn(8, 3, 16, 16)
    equal, exact = equalization.equalize(model), model(x).double()
    assert 10 * torch.log10(exact.square().sum() / (equal(x) - exact).square().sum()) > 120
    expected = [("l", "behind")] if isinstance(behind, nn.Linear) else []
    assert equalization.equalizable_pairs(equal) == expected


def test_equalisation_that_changes_the_function_is_refused(monkeypatch):
    monkeypatch.setattr(equalization, "equalizable_pairs", lambda graph: [("c", "l")])
    for images in (None, torch.randn(2, 3, 16, 16)):
        with pytest.raises(ql.UserError, match="the output of the traced network is not"):
            equalization.equalize(Places().eval(), images=images)


def test_channels_of_a_linear_layer_over_places_are_its_outputs():
    model, x = Places().eval(), torch.randn(32, 3, 16, 16)
    qmodel = ql.quantize(model, ql.collect(model, [x]), ql.QuantConfig(2, 8))
    corrected = corrections.correct_bias(model, qmodel, [x])
    seen = {}
    for name, network in {"exact": folded(model), "corrected": corrected}.items():
        network.get_submodule("l").register_forward_hook(
            lambda module, inputs, output, name=name: seen.update({name: output}))
        with torch.no_grad():
            network(x)
    error = (seen["corrected"] - seen["exact"]).mean((0, 1))
    assert (error.abs() <= corrected.bias_scale("l") * 0.51 + 1e-6).all()


def test_nothing_is_scaled_across_relu6():
    assert equalization.equalizable_pairs(folded(sequence(activation=nn.ReLU6))) == []


# ---- Bias correction -----------------------------------------------------------------------------


def test_empirical_correction_leaves_no_mean_error_in_any_layer(resnet20, stats, digits):
    images = torch.cat(list(digits.calibration(64)))
    qmodel = ql.quantize(resnet20, stats, ql.QuantConfig(3, 4))
    before = copy.deepcopy(qmodel.state_dict())
    corrected = corrections.correct_bias(resnet20, qmodel, images.split(32))
    unchanged = all(torch.equal(v, before[k]) for k, v in qmodel.state_dict().items())
    assert unchanged, "the argument is left alone"

    def channel_means(graph):
        found = {}
        for name in qmodel.layers:
            layer(graph, name).register_forward_hook(
                lambda m, i, o, name=name: found.update({name: channels_first(o).mean(1)}))
        with torch.no_grad():
            # as it was measured: another layout sums, and breaks ties, otherwise
            graph(images.contiguous(memory_format=torch.channels_last))
        return found

    target, plain, better = map(channel_means, (folded(resnet20), qmodel, corrected))
    for name in corrected.layers:
        left = 0.51 * corrected.bias_scale(name) + 1e-5  # by rounding the bias
        assert ((better[name] - target[name]).abs() <= left).all()
    assert max((plain[n] - target[n]).abs().max() for n in target) > 0.1


@pytest.mark.parametrize(("mean", "std", "high"), [
    (0.3, 1.0, float("inf")), (-2.0, 0.7, float("inf")), (4.0, 3.0, 6.0), (7.0, 0.5, 6.0),
])
def test_clipped_normal_against_numerical_integration(mean, std, high):
    found = corrections.clipped_normal(
        torch.tensor([mean]).double(), torch.tensor([std]).double(), 0.0, high)
    density, kinks = scipy.stats.norm(mean, std), [0.0, min(high, 99)]

    def moment(power):
        def integrand(x):
            return min(max(x, 0.0), high) ** power * density.pdf(x)

        low, top = mean - 9 * std, mean + 9 * std
        return scipy.integrate.quad(integrand, low, top, points=kinks, limit=200)[0]

    assert found[0].item() == pytest.approx(moment(1), abs=1e-7)
    assert found[1].item() == pytest.approx(moment(2) - moment(1) ** 2, abs=1e-6)


def gaussian_toy(n=8192):
    """bn -> relu -> 1x1 convolution, where BatchNorm's output is exactly normal: the expected input
    of the second layer is known.
    """
    torch.manual_seed(4)
    first, second = nn.Conv2d(6, 6, 1, bias=False), nn.Conv2d(6, 5, 1)
    model = nn.Sequential(first, nn.BatchNorm2d(6), nn.ReLU(), second).eval()
    first.weight.data = torch.eye(6).view(6, 6, 1, 1) * 1.0
    model[1].weight.data, model[1].bias.data = torch.rand(6) + 0.5, torch.randn(6) * 0.5
    model[1].eps = 0.0
    images = torch.randn(n, 6, 1, 1)
    images = (images - images.mean(0)) / images.std(0, unbiased=False)
    return model, images


def test_analytic_and_empirical_correction_agree_where_the_answer_is_known():
    model, images = gaussian_toy()
    qmodel = ql.quantize(model, ql.collect(model, [images]), ql.QuantConfig(2, 8))
    mu, sigma = model[1].bias.detach().double(), model[1].weight.detach().double()
    normal = scipy.stats.norm
    pdf, cdf = (torch.from_numpy(f(mu / sigma)) for f in (normal.pdf, normal.cdf))
    expected = pdf * sigma + mu * cdf
    second = qmodel.layers["_3"]
    delta = (second.weight - model[3].weight).detach().double().flatten(1)
    known = second.bias.detach() - delta @ expected
    analytic = corrections.correct_bias_analytic(model, qmodel)
    empirical = corrections.correct_bias(model, qmodel, images.split(1024))
    scale, size = qmodel.bias_scale("_3"), (delta @ expected).abs().max()
    assert analytic.meta["uncorrected"] == {} and size > 0.05
    assert ((analytic.layers["_3"].bias - known).abs() <= scale).all()
    # and the first layer's own rounding
    assert ((empirical.layers["_3"].bias - known).abs() <= scale + 0.15 * size).all()


def test_analytic_correction_names_what_it_cannot_follow():
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return self.b(torch.sigmoid(self.a(x)))

    model = Gate().eval()
    qmodel = ql.quantize(model, ql.collect(model, [torch.randn(2, 3, 4, 4)]))
    left = corrections.correct_bias_analytic(model, qmodel).meta["uncorrected"]
    assert left == {"b": "there is no rule for the mean behind sigmoid"}


@torch.no_grad()
def test_layers_that_are_left_are_listed_with_the_reason_and_other_networks_are_refused():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1, bias=False),
        nn.GELU(), nn.Conv2d(4, 2, 1)).eval()
    x = torch.randn(8, 3, 6, 6)
    qmodel = ql.quantize(model, ql.collect(model, [x]), ql.QuantConfig(observer="minmax"))
    analytic = corrections.correct_bias_analytic(model, qmodel)
    assert analytic.meta["uncorrected"] == {
        "_3": "it has no bias", "_5": "there is no rule for the mean behind _4"}
    empirical = corrections.correct_bias(model, qmodel, x)
    assert empirical.meta["uncorrected"] == {"_3": "it has no bias"}
    again = corrections.reestimate_batchnorm(model, qmodel, x)
    assert list(again.meta["uncorrected"]) == ["_3", "_5"]
    hook = model[5].register_forward_hook(lambda module, inputs, output: output + 1)
    with pytest.raises(ql.UserError, match="there is one on module 5"):
        corrections.correct_bias_analytic(model, qmodel)
    hook.remove()
    model[5].weight.data.mul_(2)
    for correct in (lambda: corrections.correct_bias_analytic(model, qmodel),
                    lambda: corrections.correct_bias(model, qmodel, x),
                    lambda: ql.tune_end_to_end(model, qmodel, x.repeat(8, 1, 1, 1))):
        with pytest.raises(ql.UserError, match="this one has changed since"):
            correct()


@torch.no_grad()
def test_means_behind_a_shuffle_are_those_of_a_sample():
    torch.manual_seed(0)
    images = torch.randn(64, 3, 6, 6)
    model = Shuffled(nn.ChannelShuffle(4), images).eval()
    y = nn.functional.channel_shuffle(torch.relu(model.bn(model.a(images))), 4)
    found = corrections._Gaussian(folded(model)).layer_inputs()["c"]
    assert (found - y.double().mean((0, 2, 3))).abs().max() < 0.1
    assert (found - found.roll(1)).abs().max() > 1, "another order would show"


class Shuffled(nn.Module):
    """A convolution that reads another's channels in another order; BatchNorm tells their means."""

    def __init__(self, shuffle, images):
        super().__init__()
        self.shuffle, self.a, self.bn = shuffle, nn.Conv2d(3, 32, 3, bias=False), nn.BatchNorm2d(32)
        self.c = nn.Conv2d(32, 32, 1)
        with torch.no_grad():
            self.bn.weight.uniform_(0.1, 3)
            self.bn.bias.uniform_(-1, 4)
            y = self.a(images)
            self.bn.running_mean.copy_(y.mean((0, 2, 3)))
            self.bn.running_var.copy_(y.var((0, 2, 3)))

    def forward(self, x):
        return self.c(self.shuffle(torch.relu(self.bn(self.a(x)))))


@torch.no_grad()
@pytest.mark.parametrize("shuffle, known", [
    (lambda y: y, True), (lambda y: nn.functional.channel_shuffle(y, 4), True),
    (nn.ChannelShuffle(4), True), (nn.MaxPool2d(1), True), (lambda y: y.contiguous(), True),
    (lambda y: y[:, [*range(1, 32), 0]], False),
    (lambda y: y.chunk(2, 1)[0].repeat(1, 2, 1, 1), False),
    (lambda y: y.view(-1, 4, 8, 4, 4).transpose(1, 2).reshape(-1, 32, 4, 4), False),
    (lambda y: torch.cat([y[:, 16:], y[:, :16]], 1), False), (lambda y: y.mT.mT, False),
])
def test_analytic_correction_moves_means_with_their_channels(shuffle, known):
    torch.manual_seed(0)
    images = torch.randn(64, 3, 6, 6)
    model = Shuffled(shuffle, images).eval()
    qmodel = ql.quantize(model, ql.collect(model, [images]), ql.QuantConfig(weight_bits=3))
    better = corrections.correct_bias_analytic(model, qmodel)
    assert ("c" not in better.meta["uncorrected"]) == known
    before, after = (
        (n(images) - model(images)).mean((0, 2, 3)).abs().mean() for n in (qmodel, better))
    assert after < 0.2 * before if known else after <= before


@torch.no_grad()
@pytest.mark.parametrize("twice, name", [
    (lambda y: (y + y)[:, :32], "add"), (lambda y: torch.cat([y, y], 1)[:, 16:48], "cat")])
def test_moments_of_a_value_that_is_read_twice_are_those_of_a_sample(twice, name):
    torch.manual_seed(0)
    images, seen = torch.randn(512, 3, 6, 6), {}
    model = Shuffled(twice, images).eval()
    watch(folded(model), [name], seen.__setitem__, [images])
    values = channels_first(seen[name])
    moments = corrections._Gaussian(folded(model)).moments
    node = next(n for n in moments if n.name == name)
    for found, sampled in zip(moments[node], (values.mean(1), values.var(1)), strict=True):
        assert torch.allclose(found, sampled, rtol=0.1, atol=0.05)
    qmodel = ql.quantize(model, ql.collect(model, [images]), ql.QuantConfig(weight_bits=3))
    assert "a" not in corrections.correct_bias_analytic(model, qmodel).meta["uncorrected"]


@torch.no_grad()
def test_a_flatten_whose_dimension_is_computed_is_followed_by_no_rule():
    class Computed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.bn = nn.Conv2d(3, 4, 3), nn.Linear(36, 5), nn.BatchNorm1d(4)

        def forward(self, x):
            return self.bn(self.b(torch.relu(self.a(x)).flatten(x.ndim - 2)))

    model, x = Computed().eval(), torch.randn(4, 3, 8, 8)
    assert torch.allclose(equalization.equalize(model)(x), model(x), atol=1e-5)
    qmodel = ql.quantize(model, ql.collect(model, [x]))
    left = corrections.correct_bias_analytic(model, qmodel).meta["uncorrected"]
    assert list(left) == ["b"]


# ---- BatchNorm -----------------------------------------------------------------------------------


def test_reestimated_statistics_are_what_batchnorm_in_training_mode_gives():
    """One layer: the corrected network equals the unfolded quantized convolution followed by a
    BatchNorm in training mode.
    """
    torch.manual_seed(5)
    conv, norm, linear = nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.Linear(6 * 36, 4)
    model = nn.Sequential(conv, norm, nn.ReLU(), nn.Flatten(), linear).eval()
    norm.running_mean, norm.running_var = torch.randn(6), torch.rand(6) * 2 + 0.2
    norm.weight.data = torch.tensor([0.5, -1.0, 1.5, 0.1, 2.0, -0.3])
    norm.bias.data, norm.eps = torch.randn(6), 0.05
    images = torch.randn(64, 3, 8, 8)
    qmodel = ql.quantize(model, ql.collect(model, [images]), ql.QuantConfig(3, 8))
    corrected = corrections.reestimate_batchnorm(model, qmodel, images)
    factor = (norm.weight / torch.sqrt(norm.running_var + norm.eps)).view(-1, 1, 1, 1)
    bn, x = copy.deepcopy(norm).train(), ql.fake_quantize(images, qmodel.reads("_0"))
    with torch.no_grad():
        expected = bn(nn.functional.conv2d(x, qmodel.layers["_0"].weight / factor))
        found = corrected.layers["_0"](x)
    assert torch.allclose(found, expected, atol=2e-2, rtol=1e-3)
    assert (found - expected).abs().mean() < 3e-3


@pytest.mark.parametrize("correct", [
    corrections.correct_bias, corrections.reestimate_batchnorm,
    lambda model, qmodel, images: corrections.correct_bias_analytic(model, qmodel),
], ids=["correct_bias", "reestimate_batchnorm", "analytic"])
def test_codes_stay_and_biases_are_integers(resnet20, stats, digits, correct):
    qmodel = ql.quantize(resnet20, stats, ql.QuantConfig(3, 4))
    corrected = correct(resnet20, qmodel, torch.cat(list(digits.calibration(32))))
    changed = 0.0
    for name, new in corrected.layers.items():
        old = qmodel.layers[name]
        codes = ql.quantize_tensor(new.weight, new.weight_qparams)
        assert torch.equal(codes, ql.quantize_tensor(old.weight, old.weight_qparams))
        assert torch.equal(ql.dequantize(codes, new.weight_qparams), new.weight)
        bias = new.bias.double() / corrected.bias_scale(name)
        assert (bias - bias.round()).abs().max() < 1e-3 * bias.abs().max().clamp(min=1)
        changed += (new.bias - old.bias).abs().sum().item()
    assert changed > 0 and ql.weight_bytes(corrected) == ql.weight_bytes(qmodel)
    assert corrected.config == qmodel.config
    assert ql.evaluate(corrected, digits.test, limit=100).n == 100


def test_corrections_survive_equalisation(resnet20, digits):
    images = torch.cat(list(digits.calibration(32)))
    equal = equalization.equalize(resnet20)
    qmodel = ql.quantize(equal, ql.collect(equal, [images]), ql.QuantConfig(4, 8))
    scaled, plain = (layer(folded(model), "layer1_0_conv1") for model in (equal, resnet20))
    expected = plain.folded_batchnorm["mean"] * (scaled.bias / plain.bias)
    assert torch.allclose(scaled.folded_batchnorm["mean"], expected, rtol=1e-3)
    corrected = corrections.reestimate_batchnorm(equal, qmodel, images)
    assert ql.evaluate(corrected, digits.test, limit=200).top1 > 95


def test_a_layer_left_float_is_corrected_in_float():
    model, x = sequence(), torch.randn(16, 3, 8, 8)
    config = ql.QuantConfig(2, 8, layer_weight_bits={"_0": None})
    qmodel = ql.quantize(model, ql.collect(model, [x]), config)
    exact, names = folded(model), ["_0", "_3", "_6"]
    for correct in (corrections.correct_bias, corrections.reestimate_batchnorm):
        corrected = correct(model, qmodel, [x])
        assert not hasattr(corrected.layers["_0"], "weight_qparams")
        assert list(corrected.layers) == names
        with torch.no_grad():
            image = ql.fake_quantize(x, corrected.reads("_0"))
            error = (corrected.layers["_0"](image) - exact.get_submodule("0")(x)).mean((0, 2, 3))
        assert correct is not corrections.correct_bias or error.abs().max() < 1e-5


def test_a_correction_of_another_network_is_refused(resnet20, stats, digits):
    qmodel, model = ql.quantize(resnet20, stats), copy.deepcopy(resnet20)
    model.layer1[0].conv1.register_forward_hook(lambda module, inputs, output: output * 2)
    images = [torch.cat(list(digits.calibration(8)))]
    for correct in (corrections.correct_bias, corrections.reestimate_batchnorm):
        with pytest.raises(ql.UserError, match="is not what the model computes: a forward hook"):
            correct(model, qmodel, images)


def test_bad_input(resnet20, stats):
    qmodel = ql.quantize(resnet20, stats, ql.QuantConfig(4, 4))
    with pytest.raises(ql.UserError, match="no images to measure the correction on"):
        corrections.correct_bias(resnet20, qmodel, [])
    plain, x = nn.Sequential(nn.Conv2d(3, 2, 1)), torch.randn(2, 3, 4, 4)
    qmodel = ql.quantize(plain, ql.collect(plain, [x]))
    with pytest.raises(ql.UserError, match="no layer of this network had a BatchNorm"):
        corrections.reestimate_batchnorm(plain, qmodel, x)
