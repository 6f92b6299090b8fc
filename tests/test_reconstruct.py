"""Reconstruction: units from the graph, rounding that stays beside the weight, gradients against formulas, resume, bounded memory."""

import math

import pytest
import torch
from torch import nn

import quantlab as ql
from quantlab import ptq
from quantlab.improving import reconstruct as rc
from quantlab.improving import tune, units
from quantlab.improving.activations import Cache
from quantlab.improving.learned import LearnedRounding, LearnedStep, Masks, round_to_step
from quantlab.improving.reconstruct_config import PRESETS
from quantlab.improving.tune import tune_end_to_end


class Tiny(nn.Module):
    """conv-bn-relu, a residual block with a shortcut convolution, pool, linear."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv1, self.conv2, self.shortcut = nn.Conv2d(6, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(6, 8, 1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        x = self.bn(self.stem(x)).relu()
        x = (self.conv2(self.conv1(x).relu()) + self.shortcut(x)).relu()
        return self.fc(x.mean((2, 3)))


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    model, images = Tiny().eval(), torch.randn(48, 3, 8, 8)
    model.bn.running_mean, model.bn.running_var = torch.randn(6) * 0.1, torch.rand(6) + 0.5
    return model, ql.collect(model, [images]), images


HOW = rc.ReconstructConfig(iterations=40, batch_size=16, lr=0.05)


def run(tiny, config=ql.QuantConfig(3, 3), how=HOW, **kw):
    return rc.reconstruct(*tiny, config, how, verbose=False, **kw)


@pytest.fixture(scope="module")
def learned(tiny):
    return run(tiny)


def tensors(qmodel):
    return {k: v.clone() for k, v in qmodel.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---- Units ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "layers", "blocks"), [
    ("resnet18", 21, 10), ("mobilenet_v2", 53, 33), ("densenet121", 121, 121), ("googlenet", 58, 58),
])
def test_units_of_torchvision_networks(name, layers, blocks):
    import torchvision

    extra = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
    model, x = getattr(torchvision.models, name)(weights=None, **extra).eval(), torch.randn(1, 3, 32, 32)
    qmodel = ql.quantize(model, ql.collect(model, [x]), ql.QuantConfig(weight_observer="minmax", observer="minmax"))
    for kind, count in (("layer", layers), ("block", blocks)):
        found = units.find_units(qmodel, kind)
        assert len(found) == count and sum(len(u.layers) for u in found) == layers
    values = {n.name: x for n in qmodel.graph.nodes if n.op == "placeholder"}
    for u in found:  # the units one after the other compute what the network does
        part = units.extract(qmodel, u.nodes, u.inputs, u.outputs)
        values |= dict(zip(u.outputs, part(*[values[i] for i in u.inputs]), strict=True))
    assert torch.equal(values[found[-1].output], qmodel(x))


def test_units_of_resnet20(resnet20, stats):
    qmodel = ql.quantize(resnet20, stats, ql.QuantConfig(4, 4))
    blocks = units.find_units(qmodel, "block")
    assert [len(u.layers) for u in blocks] == [1, 2, 2, 2, 3, 2, 2, 3, 2, 2, 1]
    assert all(len(u.inputs) == 1 for u in blocks) and blocks[4].layers == ("layer2_0_conv1", "layer2_0_conv2", "layer2_0_shortcut_0")
    assert [len(u.layers) for u in units.find_units(qmodel, "layer")] == [1] * 22


def test_a_block_that_holds_another_or_is_read_from_outside_is_taken_layer_by_layer():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Conv2d(3, 3, 1) for _ in range(4))

        def forward(self, x):
            inner = (self.b(self.a(x).relu()) + x).relu()
            outer = self.c(inner) + x  # holds the inner block
            tapped = self.d(outer).relu()
            return torch.cat([outer + tapped.sigmoid(), tapped], 1)  # tapped leaves its block

    model = Nested().eval()
    found = units.find_units(ql.quantize(model, ql.collect(model, [torch.randn(2, 3, 4, 4)])), "block")
    assert [u.layers for u in found] == [("a", "b"), ("c",), ("d",)]


# ---- Rounding and steps -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["layer", "block"])
@pytest.mark.parametrize("config", [ql.QuantConfig(3, 3), ql.QuantConfig(2, 4, weight_symmetric=False, per_channel=False)], ids=str)
def test_learned_rounding_never_leaves_floor_and_ceil(tiny, unit, config):
    qmodel = run(tiny, config, rc.ReconstructConfig.preset("adaround", unit=unit, iterations=40, batch_size=16, lr=0.1))
    graph, moved = ptq.prepare(tiny[0])[0], 0
    for name in ptq.layers(qmodel, qmodel.plan):
        layer, exact = (g.get_submodule(ptq.find_node(g, name).target) for g in (qmodel, graph))
        q = layer.weight_qparams
        scale, zero_point = q.broadcast(exact.weight.dim())
        codes = (layer.weight / scale).round() + zero_point
        assert torch.equal(scale * (codes - zero_point), layer.weight)  # exactly on the grid
        floor = torch.floor(exact.weight * (1 / scale)) + zero_point
        assert ((codes == floor.clamp(q.qmin, q.qmax)) | (codes == (floor + 1).clamp(q.qmin, q.qmax))).all()
        moved += int((codes != ql.quantize_tensor(exact.weight, q)).sum())
    assert moved > 0  # something was learned


def test_start_is_the_float_weight_and_the_finished_regulariser_leaves_zeros_and_ones():
    torch.manual_seed(0)
    layer = nn.Linear(20, 10)
    q = ql.choose_qparams(layer.weight.detach().amin(1), layer.weight.detach().amax(1), 4, symmetric=True, axis=0)
    learned, x = LearnedRounding(layer, layer.weight, layer.bias, q), torch.randn(64, 20)
    assert torch.allclose(learned(x), layer(x), atol=1e-5)
    optimizer = torch.optim.Adam([learned.v], lr=0.05)
    for i in range(400):
        optimizer.zero_grad()
        ((learned(x) - layer(x).detach()).square().mean() + 0.1 * learned.regularizer(20 - 18 * i / 400)).backward()
        optimizer.step()
    assert ((learned.h == 0) | (learned.h == 1)).all() and learned.regularizer(2.0) == 0
    assert 0 < learned.h.mean() < 1
    assert torch.equal(learned.codes, (learned.floor + learned.h).clamp(q.qmin, q.qmax).int())


@pytest.mark.parametrize(("low", "high"), [(0, 7), (-4, 3), (-8, 7)])
def test_values_and_gradients_of_a_learned_step(low, high):
    torch.manual_seed(1)
    x, scale = torch.randn(5, 3, 4, 4, requires_grad=True), torch.tensor(0.3, requires_grad=True)
    upstream, mask = torch.randn(5, 3, 4, 4), (torch.rand(5, 3, 4, 4) < 0.5).float()
    y = round_to_step(x, scale, low, high, mask)
    y.backward(upstream)
    kernel = torch.fake_quantize_per_tensor_affine(x.detach(), 0.3, 0, low, high)
    assert torch.allclose(y.detach(), torch.where(mask == 1, kernel, x.detach()), atol=1e-6)  # exact without a mask, below
    expected_x, expected_s = torch.empty_like(upstream), 0.0
    for i in range(x.numel()):  # LSQ, eq. 3, one element at a time
        v, g, m = (t.detach().flatten()[i].item() for t in (x, upstream, mask))
        v = v / scale.item()
        inside = low < v < high
        expected_x.view(-1)[i] = g if not m or inside else 0.0
        expected_s += m * g * (round(v) - v if inside else low if v <= low else high)
    assert torch.allclose(x.grad, expected_x, atol=1e-6)
    assert scale.grad.item() == pytest.approx(expected_s / math.sqrt(x.numel() * high), rel=1e-4)


def test_a_learned_step_without_masks_is_its_quantizer(tiny):
    q = ql.choose_qparams(-0.7, 1.9, 4)
    quantizer, x = ptq.Quantizer(q), torch.randn(1000)
    assert torch.equal(LearnedStep(quantizer)(x), quantizer(x))


def test_masks_keep_the_share_and_differ_between_calls():
    masks, x = Masks(0.3, torch.Generator().manual_seed(0)), torch.empty(8, 4, 16, 16).contiguous(memory_format=torch.channels_last)
    first, second = masks.like(x), masks.like(x)
    assert first.shape == x.shape and first.stride() == x.stride() and set(first.unique().tolist()) == {0.0, 1.0}
    assert first.mean().item() == pytest.approx(0.7, abs=0.03) and not torch.equal(first, second)


# ---- The loop ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [
    *(rc.ReconstructConfig.preset(m, iterations=30, batch_size=16, lr=0.05) for m in PRESETS),
    rc.ReconstructConfig(loss="fisher", iterations=60, batch_size=16, lr=0.05, weight_lambda=1e-3),
], ids=["adaround", "brecq", "qdrop", "fisher"])
def test_no_unit_is_worse_than_nearest_and_some_are_better(tiny, how):
    qmodel = run(tiny, how=how)
    log = qmodel.reconstruction
    assert (log.learned <= log.nearest).all() and log.learned.sum() < log.nearest.sum()
    assert log.layers.tolist() == ([1] * 5 if how.unit == "layer" else [1, 3, 1])


def test_a_learning_rate_that_destroys_leaves_the_nearest_rounding(tiny):
    qmodel = run(tiny, how=rc.ReconstructConfig(iterations=5, batch_size=16, lr_bias=1e3, lr_steps=0.0))
    assert same(tensors(qmodel), tensors(ql.quantize(tiny[0], tiny[1], ql.QuantConfig(3, 3))))
    assert qmodel.reconstruction.note.str.contains("nearest rounding kept").all()


def test_the_result_is_a_quantized_network(tiny, learned):
    qmodel = learned
    assert ql.weight_bytes(qmodel) == ql.weight_bytes(ql.quantize(tiny[0], tiny[1], ql.QuantConfig(3, 3)))
    for name in ptq.layers(qmodel, qmodel.plan):
        layer = qmodel.get_submodule(ptq.find_node(qmodel, name).target)
        codes = layer.bias.double() / (ptq.input_qparams(qmodel, name).scale.double() * layer.weight_qparams.scale.double())
        assert (codes - codes.round()).abs().max() < 1e-3 and codes.round().abs().max() > 0

def weight_codes(qmodel):
    layers = {name: qmodel.get_submodule(ptq.find_node(qmodel, name).target) for name in ptq.layers(qmodel, qmodel.plan)}
    return {name: ql.quantize_tensor(layer.weight, layer.weight_qparams) for name, layer in layers.items()}


def distance(tiny, qmodel):
    """KL(float || quantized) of the class probabilities."""
    exact = tiny[0](tiny[2]).log_softmax(1)
    return nn.functional.kl_div(qmodel(tiny[2]).log_softmax(1), exact, log_target=True, reduction="batchmean")


@pytest.mark.parametrize("learn_weights", [False, True])
def test_tuning_comes_closer_to_the_float_network(tiny, learned, learn_weights):
    how = dict(iterations=60, batch_size=16, lr=3e-3, lr_weights=1e-2, learn_weights=learn_weights, flip=learn_weights, verbose=False)
    before, tuned = tensors(learned), tune_end_to_end(tiny[0], learned, tiny[2], **how)
    assert same(tensors(learned), before), "a copy is tuned"
    assert distance(tiny, tuned) < 0.9 * distance(tiny, learned)
    assert same(tensors(tuned), tensors(tune_end_to_end(tiny[0], learned, tiny[2].split(20), **how))), "deterministic under a seed"
    old, new = weight_codes(learned), weight_codes(tuned)
    assert same(old, new) != learn_weights
    layers = [tuned.get_submodule(ptq.find_node(tuned, name).target) for name in new]
    assert all(torch.equal(layer.weight, ql.fake_quantize(layer.weight, layer.weight_qparams)) for layer in layers), "on the grid of 3 bits"
    assert all((old[name] - new[name]).abs().max() <= 1 for name in old), "no further than the neighbour in so short a time"


def test_gradient_of_a_learned_layer():
    """Of the latent codes: the weight's gradient times the step, 0 beyond half a code outside the range; of log_scale: the sum of dw * w."""
    torch.manual_seed(0)
    layer, exact, x = nn.Conv2d(3, 4, 3), torch.randn(4, 3, 3, 3), torch.randn(2, 3, 8, 8)
    layer.weight_qparams = q = ql.choose_qparams(*exact.flatten(1).aminmax(dim=1), 2, axis=0)
    layer.requires_grad_(False).weight.copy_(ql.fake_quantize(exact, q))
    learned, weight = tune._LearnedLayer(layer, exact), layer.weight.clone().requires_grad_()
    with torch.no_grad():
        learned.latent.view(-1)[:4] = torch.tensor([q.qmin - 0.6, q.qmin - 0.3, q.qmax + 0.3, q.qmax + 0.6])
        weight.copy_(ql.dequantize(learned.codes.int(), q))
    y = learned(x)
    assert torch.equal(y, nn.functional.conv2d(x, weight, layer.bias))
    y.square().sum().backward()
    nn.functional.conv2d(x, weight, layer.bias).square().sum().backward()
    step = weight.grad * q.scale.view(-1, 1, 1, 1)
    step.view(-1)[[0, 3]] = 0
    assert torch.allclose(learned.latent.grad, step, rtol=1e-5)
    assert torch.allclose(learned.log_scale.grad, (weight.grad * weight).sum((1, 2, 3), keepdim=True), rtol=1e-4)


def test_tuning_starts_from_the_network_as_it_is(tiny, learned):
    tuned = tune_end_to_end(tiny[0], learned, tiny[2], iterations=1, batch_size=16, lr=1e-9, lr_weights=1e-9, learn_weights=True, verbose=False)
    assert same(weight_codes(tuned), weight_codes(learned))
    assert torch.allclose(tuned(tiny[2]), learned(tiny[2]), atol=1e-5)


@pytest.mark.parametrize(("change", "message"), [
    (dict(batch_size=64), "48 calibration images do not fill a batch of 64"), (dict(lr=0), "lr=0"), (dict(iterations=0), "iterations=0"),
])
def test_tuning_refuses(tiny, learned, change, message):
    with pytest.raises(ql.UserError, match=message):
        tune_end_to_end(tiny[0], learned, tiny[2], **dict(batch_size=16) | change)


def test_deterministic_under_a_seed(tiny, learned):
    assert same(tensors(run(tiny)), tensors(learned))
    assert not same(tensors(learned), tensors(run(tiny, how=rc.ReconstructConfig(iterations=40, batch_size=16, lr=0.05, seed=1))))


def test_resume_after_a_kill_gives_the_same_result(tiny, learned, tmp_path):
    path, whole = tmp_path / "state.safetensors", learned

    def kill(record):
        if record["unit"] == "fc" and record["iteration"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tiny, state=path, trace=kill)
    seen = []
    resumed = run(tiny, state=path, trace=lambda record: seen.append(record["unit"]))
    assert set(seen) == {"fc"} and same(tensors(resumed), tensors(whole))
    assert resumed.reconstruction.drop(columns="seconds").equals(whole.reconstruction.drop(columns="seconds"))
    with pytest.raises(ql.UserError, match=r"how.lr 0.05 there, 0.01 now"):
        run(tiny, state=path, how=rc.ReconstructConfig(iterations=40, batch_size=16, lr=0.01))
    path.write_bytes(b"broken")
    with pytest.raises(ql.UserError, match="no state of a reconstruction"):
        run(tiny, state=path)


def test_a_bounded_cache_spills_and_changes_nothing(tiny, learned, monkeypatch):
    most, spilled, allocate = [0], [0], Cache.allocate

    def watched(self, key, shape):
        value = allocate(self, key, shape)
        most[0], spilled[0] = max(most[0], self.bytes), spilled[0] + len(self.uncounted)
        return value

    monkeypatch.setattr(Cache, "allocate", watched)
    bound = 80_000  # the stem's target alone has 48 * 6 * 64 float32, 73,728 bytes
    small = run(tiny, how=rc.ReconstructConfig(iterations=40, batch_size=16, lr=0.05, max_cache_bytes=bound))
    assert most[0] <= bound and spilled[0] > 0 and same(tensors(small), tensors(learned))


def test_trace_shows_a_rounding_being_learned(tiny):
    records = []
    run(tiny, trace=records.append)
    first, last = (next(r for r in order if r["unit"] == "stem") for order in (records, records[::-1]))
    assert [r["iteration"] for r in records if r["unit"] == "stem"] == list(range(40)) and first["h"]["stem"].shape == (6, 3, 3, 3)
    assert (last["h"]["stem"] - 0.5).abs().mean() > (first["h"]["stem"] - 0.5).abs().mean()
    assert first["steps"].keys() == {"quantizers_x", "quantizers_relu"}


# ---- Bad input --------------------------------------------------------------------------------------------------------------


def test_bad_input(tiny):
    model, stats, images = tiny
    with pytest.raises(ql.UserError, match="48 calibration images do not fill a batch of 64"):
        rc.reconstruct(model, stats, images, how=rc.ReconstructConfig(batch_size=64))
    with pytest.raises(ql.UserError, match="did you mean adaround"):
        rc.ReconstructConfig.preset("adaroud")
    with pytest.raises(ql.UserError, match="use one of mse, fisher"):
        rc.ReconstructConfig(loss="kl")
    with pytest.raises(ql.UserError, match="at least 0 and below 1"):
        rc.ReconstructConfig(drop=1.0)


def test_a_unit_of_constant_output_keeps_nearest_rounding():
    model, images = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval(), torch.randn(32, 3, 4, 4)
    nn.init.constant_(model[0].bias, -100.0)
    qmodel = rc.reconstruct(model, ql.collect(model, [images]), images.split(16), how=HOW, verbose=False)
    assert qmodel.reconstruction.note.str.contains("constant output").all() and torch.isfinite(qmodel(images)).all()


def test_iteration_cost_names_every_unit(tiny):
    frame = rc.iteration_cost(*tiny, ql.QuantConfig(4, 4), HOW, repeats=2)
    assert frame.unit.tolist() == ["stem", "relu_2", "fc"] and (frame.ratio > 0).all()
