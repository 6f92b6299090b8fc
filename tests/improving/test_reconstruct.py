"""Reconstruction: units from the graph, rounding that stays beside the weight, gradients against
formulas, resume, bounded memory; tuning, with the float network as target or with labels.
"""

import dataclasses
import importlib
import itertools
import math
import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import quantlab as ql
from quantlab.graph import folded
from quantlab.improving import learned as stand_ins
from quantlab.improving import units
from quantlab.improving.activations import Cache
from quantlab.improving.corrections import correct_bias
from quantlab.improving.tune import TuneConfig, Tuner, tune_end_to_end
from quantlab.quantized import Quantizer, find_node

rc = importlib.import_module("quantlab.improving.reconstruct")  # the package has the function
tune = importlib.import_module("quantlab.improving.tune")


class Tiny(nn.Module):
    """conv-bn-relu, a residual block with a shortcut convolution, pool, linear."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv1, self.conv2 = nn.Conv2d(6, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.shortcut, self.fc = nn.Conv2d(6, 8, 1), nn.Linear(8, 4)

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


SHORT = rc.ReconstructConfig(iterations=40, batch_size=16, lr=0.05)


def run(tiny, config=ql.QuantConfig(3, 3), learning=SHORT, **options):
    return rc.reconstruct(*tiny, config, learning, verbose=False, **options)


@pytest.fixture(scope="module")
def learned(tiny):
    return run(tiny)


def tensors(qmodel):
    return {k: v.clone() for k, v in qmodel.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---- Units ---------------------------------------------------------------------------------------


def check_units(qmodel, found, x):
    """The units one after the other compute what the network does; tensors lie between them."""
    values = {n.name: x for n in qmodel.graph.nodes if n.op == "placeholder"}
    for u in found:
        part = units.extract(qmodel, u.nodes, u.inputs, u.outputs)
        values |= dict(zip(u.outputs, part(*[values[i] for i in u.inputs]), strict=True))
        assert all(isinstance(values[name], torch.Tensor) for name in u.outputs)
    assert torch.equal(values[found[-1].output], qmodel(x))


@pytest.mark.parametrize(("name", "layers", "blocks"), [
    ("resnet18", 21, 10), ("mobilenet_v2", 53, 33), ("densenet121", 121, 121),
    ("googlenet", 58, 58), ("shufflenet_v2_x0_5", 57, 57),
])
def test_units_of_torchvision_networks(name, layers, blocks):
    import torchvision

    extra = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
    model = getattr(torchvision.models, name)(weights=None, **extra).eval()
    x = torch.randn(1, 3, 32, 32)
    config = ql.QuantConfig(weight_observer="minmax", observer="minmax")
    qmodel = ql.quantize(model, ql.collect(model, [x]), config)
    for kind, count in (("layer", layers), ("block", blocks)):
        found = units.find_units(qmodel, kind)
        assert len(found) == count and sum(len(u.layers) for u in found) == layers
    check_units(qmodel, found, x)


def test_units_of_resnet20(resnet20, stats):
    qmodel = ql.quantize(resnet20, stats, ql.QuantConfig(4, 4))
    blocks = units.find_units(qmodel, "block")
    assert [len(u.layers) for u in blocks] == [1, 2, 2, 2, 3, 2, 2, 3, 2, 2, 1]
    assert all(len(u.inputs) == 1 for u in blocks)
    assert blocks[4].layers == ("layer2_0_conv1", "layer2_0_conv2", "layer2_0_shortcut_0")
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
    qmodel = ql.quantize(model, ql.collect(model, [torch.randn(2, 3, 4, 4)]))
    assert [u.layers for u in units.find_units(qmodel, "block")] == [("a", "b"), ("c",), ("d",)]


class Parts(nn.Module):
    """Two parts of a value, one read by a unit, the other by the next: in `pieces`, y -> both."""

    def __init__(self, pieces):
        super().__init__()
        torch.manual_seed(0)
        self.pieces, self.a, self.b = pieces, nn.Conv2d(3, 8, 3), nn.Conv2d(2, 2, 3, padding=1)
        self.c, self.fc = nn.Conv2d(4, 6, 3), nn.Linear(6, 4)

    def forward(self, x):
        p, q = self.pieces(self.a(x).relu())
        return self.fc(self.c(torch.cat([self.b(p).relu(), q], 1)).relu().mean((2, 3)))


@pytest.mark.parametrize("pieces", [
    lambda y: y.chunk(4, 1)[1:3],
    lambda y: torch.split(y, [2, 2, 2, 2], 1)[1:3],
    lambda y: y.reshape(-1, 4, 2, 6, 6).unbind(1)[1:3],
], ids=["chunk", "split", "unbind"])
@pytest.mark.parametrize("unit", ["layer", "block"])
def test_parts_of_a_value_are_learned_as_slices_of_it_are(pieces, unit):
    images = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    settings = rc.ReconstructConfig.preset("brecq", unit=unit, iterations=5, batch_size=8, lr=0.5)
    found = []
    for written in (pieces, lambda y: (y[:, 2:4], y[:, 4:6])):
        model = Parts(written).eval()
        stats = ql.collect(model, [images])
        learned = run((model, stats, images), learning=settings)
        nearest = ql.quantize(model, stats, ql.QuantConfig(3, 3))
        found.append([tensors(q) for q in (nearest, learned, correct_bias(model, nearest, images))])
    assert all(map(same, *found))
    assert not same(found[0][0], found[0][1]) and not same(found[0][0], found[0][2])


@pytest.mark.parametrize("pieces", [
    lambda y: operator.itemgetter(1, 2)(y.tensor_split(4, 1)),
    lambda y: y.chunk(2, 1)[0].chunk(2, 1),
], ids=["tensor_split", "twice"])
def test_units_hand_on_tensors(pieces):
    x = torch.randn(2, 3, 8, 8)
    model = Parts(pieces).eval()
    qmodel = ql.quantize(model, ql.collect(model, [x]))
    found = units.find_units(qmodel)
    assert [u.layers for u in found] == [("a",), ("b",), ("c",), ("fc",)]
    assert [len(u.inputs) for u in found] == [1, 1, 2, 1]
    check_units(qmodel, found, x)


# ---- Rounding and steps --------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["layer", "block"])
@pytest.mark.parametrize("config", [
    ql.QuantConfig(3, 3), ql.QuantConfig(2, 4, weight_symmetric=False, per_channel=False),
    ql.QuantConfig(2, 2, weight_symmetric=False),
], ids=str)
def test_learned_rounding_never_leaves_floor_and_ceil(tiny, unit, config):
    settings = dict(unit=unit, iterations=40, batch_size=16, lr=0.1)
    qmodel = run(tiny, config, rc.ReconstructConfig.preset("adaround", **settings))
    graph, moved = folded(tiny[0]), 0
    for name, layer in qmodel.layers.items():
        exact = graph.get_submodule(find_node(graph, name).target).weight
        q = layer.weight_qparams
        scale, zero_point = q.broadcast(exact.dim())
        codes = (layer.weight / scale).round() + zero_point
        assert torch.equal(scale * (codes - zero_point), layer.weight)  # exactly on the grid
        floor = torch.floor(exact * (1 / scale)) + zero_point
        low, high = (n.clamp(q.qmin, q.qmax) for n in (floor, floor + 1))
        assert ((codes == low) | (codes == high)).all()
        moved += int((codes != ql.quantize_tensor(exact, q)).sum())
    assert moved > 0  # something was learned


@pytest.mark.parametrize("learn_weights", [False, True])
def test_what_is_learned_with_all_levels_is_what_the_integers_compute(tiny, learn_weights):
    """Rounding, then codes and scales: every weight stays a code of the 2^b, zero-points stay."""
    config = ql.QuantConfig(2, 3, weight_symmetric=False)
    qmodel = run(tiny, config)
    start = {name: layer.weight_qparams for name, layer in qmodel.layers.items()}
    tuning = TuneConfig(iterations=5, learn_weights=learn_weights, batch_size=16)
    tuned = tune_end_to_end(tiny[0], qmodel, tiny[2], tuning, verbose=False)
    for name, layer in tuned.layers.items():
        q, codes = layer.weight_qparams, tuned.codes(name)
        assert torch.equal(q.zero_point, start[name].zero_point) and (q.qmin, q.qmax) == (0, 3)
        assert torch.equal(ql.dequantize(codes, q), layer.weight.cpu())
    images = tiny[2][:8]
    models = [ql.to_integer(tuned, executor=executor) for executor in ("reference", "fast")]
    codes, others = (model.codes(images) for model in models)
    assert all(torch.equal(codes[edge], others[edge]) for edge in codes)
    assert (models[0](images) - tuned(images)).abs().max() < 0.2 * tuned(images).std()


def test_start_is_the_float_weight_and_the_finished_regulariser_leaves_zeros_and_ones():
    torch.manual_seed(0)
    layer, x = nn.Linear(20, 10), torch.randn(64, 20)
    q = ql.choose_qparams(*layer.weight.detach().aminmax(dim=1), 4, symmetric=True, axis=0)
    learned = stand_ins.LearnedRounding(layer, layer, q)
    assert torch.allclose(learned(x), layer(x), atol=1e-5)
    optimizer = torch.optim.Adam([learned.v], lr=0.05)
    for i in range(400):
        optimizer.zero_grad()
        error = (learned(x) - layer(x).detach()).square().mean()
        (error + 0.1 * learned.regularizer(20 - 18 * i / 400)).backward()
        optimizer.step()
    assert ((learned.h == 0) | (learned.h == 1)).all() and learned.regularizer(2.0) == 0
    assert 0 < learned.h.mean() < 1
    assert torch.equal(learned.codes, (learned.floor + learned.h).clamp(q.qmin, q.qmax).int())


@pytest.mark.parametrize(("low", "high"), [(0, 7), (-4, 3), (-8, 7)])
def test_values_and_gradients_of_a_learned_step(low, high):
    torch.manual_seed(1)
    x, scale = torch.randn(5, 3, 4, 4, requires_grad=True), torch.tensor(0.3, requires_grad=True)
    upstream, mask = torch.randn(5, 3, 4, 4), (torch.rand(5, 3, 4, 4) < 0.5).float()
    y = stand_ins.round_to_step(x, scale, low, high, mask)
    y.backward(upstream)
    kernel = torch.fake_quantize_per_tensor_affine(x.detach(), 0.3, 0, low, high)
    # exact without a mask: the next test
    assert torch.allclose(y.detach(), torch.where(mask == 1, kernel, x.detach()), atol=1e-6)
    expected_x, expected_s = torch.empty_like(upstream), 0.0
    for i in range(x.numel()):  # LSQ, eq. 3, one element at a time
        v, g, m = (t.detach().flatten()[i].item() for t in (x, upstream, mask))
        v = v / scale.item()
        inside = low < v < high
        expected_x.view(-1)[i] = g if not m or inside else 0.0
        if m:
            expected_s += g * (round(v) - v if inside else min(max(v, low), high))
    assert torch.allclose(x.grad, expected_x, atol=1e-6)
    expected_s /= math.sqrt(x.numel() * high)
    assert scale.grad.item() == pytest.approx(expected_s, rel=1e-4)


def test_a_learned_step_without_masks_is_its_quantizer():
    quantizer, x = Quantizer(ql.choose_qparams(-0.7, 1.9, 4)), torch.randn(1000)
    assert torch.equal(stand_ins.LearnedStep(quantizer)(x), quantizer(x))


def test_masks_keep_the_fraction_and_differ_between_calls():
    masks = stand_ins.Masks(0.3, torch.Generator().manual_seed(0))
    x = torch.empty(8, 4, 16, 16).contiguous(memory_format=torch.channels_last)
    first, second = masks.like(x), masks.like(x)
    assert first.shape == x.shape and first.stride() == x.stride()
    assert set(first.unique().tolist()) == {0.0, 1.0}
    assert first.mean().item() == pytest.approx(0.7, abs=0.03) and not torch.equal(first, second)


# ---- The loop ------------------------------------------------------------------------------------


@pytest.mark.parametrize("learning", [
    *(rc.ReconstructConfig.preset(m, iterations=30, batch_size=16, lr=0.05) for m in rc.PRESETS),
    dataclasses.replace(SHORT, loss="fisher", iterations=60, weight_lambda=1e-3),
], ids=["adaround", "brecq", "qdrop", "fisher"])
def test_no_unit_is_worse_than_nearest_and_some_are_better(tiny, learning):
    log = run(tiny, learning=learning).meta["reconstruction"]
    assert (log.learned <= log.nearest).all() and log.learned.sum() < log.nearest.sum()
    assert log.layers.tolist() == ([1] * 5 if learning.unit == "layer" else [1, 3, 1])


def test_a_learning_rate_that_destroys_leaves_the_nearest_rounding(tiny):
    settings = rc.ReconstructConfig(iterations=5, batch_size=16, lr_bias=1e3, lr_steps=0.0)
    qmodel = run(tiny, learning=settings)
    nearest = ql.quantize(tiny[0], tiny[1], ql.QuantConfig(3, 3))
    assert same(tensors(qmodel), tensors(nearest))
    assert qmodel.meta["reconstruction"].note.str.contains("nearest rounding kept").all()


def test_the_result_is_a_quantized_network(tiny, learned):
    nearest = ql.quantize(tiny[0], tiny[1], ql.QuantConfig(3, 3))
    assert ql.weight_bytes(learned) == ql.weight_bytes(nearest)
    for name, layer in learned.layers.items():
        codes = layer.bias.double() / learned.bias_scale(name)
        assert (codes - codes.round()).abs().max() < 1e-3 and codes.round().abs().max() > 0


def test_deterministic_under_a_seed(tiny, learned):
    assert same(tensors(run(tiny)), tensors(learned))
    other = run(tiny, learning=dataclasses.replace(SHORT, seed=1))
    assert not same(tensors(learned), tensors(other))


def test_resume_after_a_kill_gives_the_same_result(tiny, learned, tmp_path):
    path = tmp_path / "state.safetensors"

    def kill(record):
        if record["unit"] == "fc" and record["iteration"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tiny, state=path, callback=kill)
    seen = []
    resumed = run(tiny, state=path, callback=lambda record: seen.append(record["unit"]))
    assert set(seen) == {"fc"} and same(tensors(resumed), tensors(learned))
    frames = [q.meta["reconstruction"].drop(columns="seconds") for q in (resumed, learned)]
    assert frames[0].equals(frames[1])
    with pytest.raises(ql.UserError, match=r"learning.lr 0.05 there, 0.01 now"):
        run(tiny, state=path, learning=dataclasses.replace(SHORT, lr=0.01))
    path.write_bytes(b"broken")
    with pytest.raises(ql.UserError, match="no state of a reconstruction"):
        run(tiny, state=path)


def test_a_bounded_cache_spills_and_changes_nothing(tiny, learned, monkeypatch):
    counted, spilled, allocate = [], [], Cache.allocate

    def watched(self, key, shape):
        value = allocate(self, key, shape)
        counted.append(self.bytes)
        spilled.append(len(self.uncounted))
        return value

    monkeypatch.setattr(Cache, "allocate", watched)
    bound = 80_000  # the stem's target alone has 48 * 6 * 64 float32, 73,728 bytes
    small = run(tiny, learning=dataclasses.replace(SHORT, max_cache_bytes=bound))
    assert max(counted) <= bound and sum(spilled) > 0 and same(tensors(small), tensors(learned))


def test_a_callback_sees_a_rounding_being_learned(tiny):
    records = []
    run(tiny, callback=records.append)
    stem = [r for r in records if r["unit"] == "stem"]
    assert [r["iteration"] for r in stem] == list(range(40))
    first, last = (stem[i]["h"]["stem"] for i in (0, -1))
    assert first.shape == (6, 3, 3, 3)
    assert (last - 0.5).abs().mean() > (first - 0.5).abs().mean()
    assert stem[0]["steps"].keys() == {"quantizers_x", "quantizers_relu"}


# ---- Tuning --------------------------------------------------------------------------------------


def weight_codes(qmodel):
    return {name: qmodel.codes(name) for name in qmodel.layers}


def distance(tiny, qmodel):
    """KL(float || quantized) of the class probabilities."""
    exact = tiny[0](tiny[2]).log_softmax(1)
    found = qmodel(tiny[2]).log_softmax(1)
    return F.kl_div(found, exact, log_target=True, reduction="batchmean")


@pytest.mark.parametrize("learn_weights", [False, True])
def test_tuning_comes_closer_to_the_float_network(tiny, learned, learn_weights):
    config = TuneConfig(
        iterations=60, batch_size=16, lr=3e-3, lr_weights=1e-2, learn_weights=learn_weights,
        flip=learn_weights)
    before = tensors(learned)
    tuned, again = (
        tune_end_to_end(tiny[0], learned, images, config, verbose=False)
        for images in (tiny[2], tiny[2].split(20)))
    assert same(tensors(learned), before), "a copy is tuned"
    assert distance(tiny, tuned) < 0.9 * distance(tiny, learned)
    assert same(tensors(tuned), tensors(again)), "deterministic under a seed"
    old, new = weight_codes(learned), weight_codes(tuned)  # exactly on the grid of 3 bits
    assert same(old, new) != learn_weights
    moves = [(old[name] - new[name]).abs().max() for name in old]
    assert max(moves) <= 1, "no further than the neighbour in so short a time"


def test_both_networks_see_the_same_mixed_images(tiny, learned):
    """Targets are the float network's answers for just the batch that is learned from; a mixed
    batch holds images between two of the set, a mirrored one those seen from the other side.
    """
    model, _, images = tiny
    graph, config = folded(model), TuneConfig(batch_size=16, flip=True, mixup=0.5)
    shown = torch.cat([images, images.flip(-1)]).flatten(1)
    kinds = {"plain": 0, "mixed": 0}
    for batch, targets in itertools.islice(tune._soft_targets(graph, images, config), 12):
        assert torch.allclose(targets, (model(batch) / 4).log_softmax(1), atol=1e-5)
        weights = batch.flatten(1) @ torch.linalg.pinv(shown)  # of the set's images
        assert (batch.flatten(1) - weights @ shown).abs().max() < 1e-3
        most = weights.max(1).values
        assert ((most > 0.49) & (most < 1.01)).all()
        kinds["plain" if (most > 0.999).all() else "mixed"] += 1
    assert min(kinds.values()) > 0


def test_images_are_moved_by_so_many_pixels_and_no_more():
    images = torch.randn(64, 3, 8, 8)
    moved = tune.augmented(images, TuneConfig(crop=1), torch.Generator().manual_seed(0))
    padded, seen = F.pad(images, [1] * 4), set()
    for image, whole in zip(moved, padded):
        places = itertools.product(range(3), range(3))
        found = [p for p in places if torch.equal(
            image, whole[:, p[0] : p[0] + 8, p[1] : p[1] + 8])]
        seen |= set(found[:1])
        assert len(found) == 1
    assert len(seen) == 9


def test_tuning_starts_from_the_network_as_it_is(tiny, learned):
    config = TuneConfig(iterations=1, batch_size=16, lr=1e-9, lr_weights=1e-9, learn_weights=True)
    tuned = tune_end_to_end(tiny[0], learned, tiny[2], config, verbose=False)
    assert same(weight_codes(tuned), weight_codes(learned))
    assert torch.allclose(tuned(tiny[2]), learned(tiny[2]), atol=1e-5)


def test_training_with_labels_learns_them_and_what_is_trained_runs_in_integers(tiny, learned):
    model, _, images = tiny
    labels = (model(images).argmax(1) + 1) % 4  # never what the float network says
    config = TuneConfig(40, lr=5e-2, lr_weights=1e-1, learn_weights=True)
    tuner = Tuner(model, learned, config)
    losses = list(tuner.steps(itertools.repeat((images, labels)), F.cross_entropy))
    trained = tuner.quantized()
    assert len(losses) == 40 and F.cross_entropy(trained(images), labels) < 0.5 * losses[0]
    with torch.no_grad():
        assert (tuner.network(images) - trained(images)).abs().max() < 0.1  # biases are rounded
    assert trained.config == learned.config and trained.plan == learned.plan
    integer = ql.to_integer(trained)(images)
    assert torch.allclose(integer, trained(images), atol=1e-3)


def test_gradient_of_learned_codes():
    """Of the latent codes: the weight's gradient times the step, 0 beyond half a code outside the
    range; of log_scale: the sum of dw * w.
    """
    torch.manual_seed(0)
    layer, exact, x = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), torch.randn(2, 3, 8, 8)
    nn.init.normal_(exact.weight)
    layer.weight_qparams = q = ql.choose_qparams(
        *exact.weight.detach().flatten(1).aminmax(dim=1), 2, axis=0)
    layer.requires_grad_(False).weight.copy_(ql.fake_quantize(exact.weight.detach(), q))
    learned, weight = stand_ins.LearnedCodes(layer, exact), layer.weight.clone().requires_grad_()
    with torch.no_grad():
        edges = [q.qmin - 0.6, q.qmin - 0.3, q.qmax + 0.3, q.qmax + 0.6]
        learned.latent.view(-1)[:4] = torch.tensor(edges)
        weight.copy_(ql.dequantize(learned.codes, q))
    y = learned(x)
    assert torch.equal(y, F.conv2d(x, weight, layer.bias))
    y.square().sum().backward()
    F.conv2d(x, weight, layer.bias).square().sum().backward()
    step = weight.grad * q.scale.view(-1, 1, 1, 1)
    step.view(-1)[[0, 3]] = 0
    assert torch.allclose(learned.latent.grad, step, rtol=1e-5)
    by_scale = (weight.grad * weight).sum((1, 2, 3), keepdim=True)
    assert torch.allclose(learned.log_scale.grad, by_scale, rtol=1e-4)


# ---- Bad input -----------------------------------------------------------------------------------


def test_bad_input(tiny):
    model, stats, images = tiny
    large = rc.ReconstructConfig(batch_size=64)
    with pytest.raises(ql.UserError, match="48 calibration images do not fill a batch of 64"):
        rc.reconstruct(model, stats, images, learning=large)
    with pytest.raises(ql.UserError, match="did you mean adaround"):
        rc.ReconstructConfig.preset("adaroud")
    with pytest.raises(ql.UserError, match="use one of mse, fisher"):
        rc.ReconstructConfig(loss="kl")
    with pytest.raises(ql.UserError, match="at least 0 and below 1"):
        rc.ReconstructConfig(drop=1.0)


@pytest.mark.parametrize(("change", "message"), [
    (dict(batch_size=64), "48 calibration images do not fill a batch of 64"),
    (dict(lr=0), "lr=0"), (dict(iterations=0), "iterations=0"),
    (dict(mixup=1.5), "mixup=1.5 is a fraction of the batches: at most 1"),
])
def test_tuning_refuses(tiny, learned, change, message):
    with pytest.raises(ql.UserError, match=message):
        tune_end_to_end(tiny[0], learned, tiny[2], TuneConfig(**dict(batch_size=16) | change))


class Scaled(nn.Module):
    """conv, `middle` with parameters of its own, that nothing learns, pool, linear."""

    def __init__(self, middle):
        super().__init__()
        self.conv, self.middle, self.fc = nn.Conv2d(3, 8, 3), middle, nn.Linear(8, 4)

    def forward(self, x):
        return self.fc(self.middle(self.conv(x)).relu().mean((2, 3)))


def learn_twice(model, config=ql.QuantConfig(3, 3), method="brecq"):
    """(network of `quantize`, after reconstruct, after tuning that, its Tuner)."""
    images = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    stats = ql.collect(model, [images])
    settings = rc.ReconstructConfig.preset(method, iterations=5, batch_size=16, lr=0.5)
    learned = rc.reconstruct(model, stats, images, config, settings, verbose=False)
    tuner = Tuner(model, learned, TuneConfig(5, lr=0.1))
    labels = torch.arange(32) % 4
    assert len(list(tuner.steps(itertools.repeat((images, labels)), F.cross_entropy))) == 5
    return ql.quantize(model, stats, config), learned, tuner.quantized(), tuner


# torch's GroupNorm ends the process where parameters want a gradient and a channels-last input none
@pytest.mark.parametrize("middle", [nn.PReLU(8), nn.GroupNorm(2, 8)], ids=["prelu", "groupnorm"])
def test_only_what_is_learned_gets_gradients(middle):
    *networks, tuner = learn_twice(Scaled(middle).eval())
    given = {id(p) for p in tuner.network.parameters() if p.grad is not None}
    assert given and given == {id(p) for g in tuner.optimizer.param_groups for p in g["params"]
                               if p.requires_grad}
    for before, after in itertools.pairwise(networks):
        assert all(p.grad is None for p in after.middle.parameters())
        assert same(tensors(before.middle), tensors(after.middle))
        assert not same(tensors(before), tensors(after))


def test_what_an_iteration_costs_is_measured_beside_a_groupnorm():
    model, images = Scaled(nn.GroupNorm(2, 8)).eval(), torch.randn(32, 3, 8, 8)
    stats = ql.collect(model, [images])
    settings, config = rc.ReconstructConfig(batch_size=16), TuneConfig(batch_size=16)
    frame = rc.iteration_cost(model, stats, images, learning=settings, repeats=1)
    assert frame.unit.tolist() == ["conv", "fc"]
    tuned = tune.iteration_cost(model, ql.quantize(model, stats), images, config, repeats=1)
    assert {name: len(seconds) for name, seconds in tuned.items()} == {"learning": 1, "plain": 1}


@pytest.mark.parametrize("method", ["adaround", "qdrop"])
def test_what_is_left_float_stays_as_it_is(method):
    model = Scaled(nn.PReLU(8)).eval()
    floats = dict.fromkeys(["conv", "fc"])
    config = ql.QuantConfig(
        input_bits=None, layer_weight_bits=floats, layer_act_bits=floats | {"relu": None})
    before, *after, _ = learn_twice(model, config, method)
    assert not before.quantizer_nodes
    assert all(same(tensors(before), tensors(network)) for network in after)


@pytest.mark.parametrize("learn", [
    lambda model, stats, x: ql.correct_bias(model, ql.quantize(model, stats), x),
    lambda model, stats, x: rc.reconstruct(
        model, stats, x, learning=rc.ReconstructConfig(iterations=2, batch_size=4), verbose=False)])
def test_a_layer_that_mixes_images_is_refused_by_its_name(learn):
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Flatten(2), nn.Linear(36, 4), Mixing(), nn.Linear(8, 4)).eval()
    x = torch.randn(4, 3, 8, 8)
    with pytest.raises(ql.UserError, match=r"node _4 gives \[8, 2, 4\] for 4 images"):
        learn(model, ql.collect(model, x), x)


class Mixing(nn.Module):
    def forward(self, x):
        return x.view(-1, 2, 8)


def test_a_unit_of_constant_output_keeps_nearest_rounding():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    nn.init.constant_(model[0].bias, -100.0)
    images = torch.randn(32, 3, 4, 4)
    stats = ql.collect(model, [images])
    qmodel = rc.reconstruct(model, stats, images.split(16), learning=SHORT, verbose=False)
    assert qmodel.meta["reconstruction"].note.str.contains("constant output").all()
    assert torch.isfinite(qmodel(images)).all()


def test_iteration_cost_names_every_unit(tiny):
    frame = rc.iteration_cost(*tiny, ql.QuantConfig(4, 4), SHORT, repeats=2)
    assert frame.unit.tolist() == ["stem", "relu_2", "fc"] and (frame.ratio > 0).all()
