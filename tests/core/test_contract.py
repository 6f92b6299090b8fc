"""What people bring: within the contract it works, the rest is refused in one line, and the folded
network never is another one than the model.
"""

import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset

import quantlab as ql
from quantlab import calibration
from quantlab.analysis.mixed import layer_errors
from quantlab.analysis.sensitivity import edge_errors
from quantlab.graph import folded

X = torch.randn(8, 3, 12, 12, generator=torch.Generator().manual_seed(1))
MINMAX = ql.QuantConfig(observer="minmax", weight_observer="minmax")  # quick to choose


def network():
    conv, bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
    bn.running_mean.normal_()
    bn.running_var.uniform_(0.5, 2)
    pool = nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(conv, bn, nn.ReLU(), nn.Conv2d(8, 4, 3), pool, nn.Flatten()).eval()


def refusal(function, *args):
    with pytest.raises(ql.UserError) as caught:
        function(*args)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


# ---- The gate ------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["0", "1", "2", "3", ""])
@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook"])
def test_a_hook_that_changes_a_value_is_refused_by_the_name_of_its_module(place, kind):
    model = network()
    change = {"forward_hook": lambda module, inputs, output: output * 3,
              "forward_pre_hook": lambda module, inputs: (inputs[0] * 3,)}[kind]
    getattr(model.get_submodule(place), f"register_{kind}")(change)
    message = refusal(ql.collect, model, [X])
    assert f"hook (there is one on module {place or 'the outermost'})" in message


def test_a_hook_that_only_looks_changes_nothing():
    model, seen = network(), []
    plain = ql.collect(model, [X])
    model[2].register_forward_hook(lambda module, inputs, output: seen.append(output.mean().item()))
    stats = ql.collect(model, [X])
    assert seen and stats.graph_hash == plain.graph_hash
    assert torch.equal(ql.quantize(model, stats)(X), ql.quantize(model, plain)(X))


@pytest.mark.parametrize("what, name", [("weight of 3", "node _3"), ("bias of 0", "node _0")])
def test_a_folded_network_that_is_another_is_refused_by_its_first_node(monkeypatch, what, name):
    def wrong(model):
        graph = folded(model)
        parameter, _, place = what.split()
        getattr(graph.get_submodule(place), parameter).data.mul_(1.01)
        return graph

    monkeypatch.setattr(calibration, "folded", wrong)
    assert refusal(ql.collect, network(), [X]).startswith(f"{name} of the traced network is not")


def test_a_forward_that_was_replaced_is_refused():
    model = network()
    model.forward = lambda x, forward=model.forward: forward(x) * 2  # torch.fx reads the class
    assert "the output of the traced network is not" in refusal(ql.collect, model, [X])


def test_a_change_in_place_that_torch_fx_does_not_record_is_refused():
    class Alias(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x):
            y = z = self.a(x)
            y -= 0.5  # traced as y = y - 0.5, which would leave z
            return self.b(z)

    assert refusal(ql.collect, Alias(), [X]).startswith("node b of the traced network is not")


# ---- Sizes, attributes, tuples, indices ----------------------------------------------------------


class Written(nn.Module):
    """A network that ends as `end(self, y)` writes it, y [B, 4, 5, 5]."""

    def __init__(self, end):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, stride=2), nn.Conv2d(4, 4, 1)
        self.long, self.short, self.end = nn.Linear(100, 5), nn.Linear(4, 5), end

    def forward(self, x):
        return self.end(self, F.relu(self.a(x)))


SIZES = {  # F06: what a view is given
    "size": lambda m, y: m.long(y.view(y.size(0), -1)),
    "shape": lambda m, y: m.long(y.reshape(y.shape[0], y.shape[1] * y.shape[2] * y.shape[3])),
    "a tuple": lambda m, y: m.long(y.view((y.size()[0], 4 * y.size(2) * y.size(3)))),
    "ndim": lambda m, y: m.short(y.flatten(y.ndim - 2).mean(2)),
}
ATTRIBUTES = {  # F12: of tensors
    "T": lambda m, y: m.short(y.mean((2, 3)).T.T),
    "mT": lambda m, y: m.short(m.b(y.mT).mean((2, 3))),
    "data": lambda m, y: m.short(y.data.mean((2, 3))),
}
INDICES = {  # F13: parts of a value
    "channels": lambda m, y: m.short(y[:, [3, 2, 1, 0]].mean((2, 3))),
    "an ellipsis": lambda m, y: m.short(y[..., 1:, :-1].mean((2, 3))),
    "pieces": lambda m, y: m.short(
        torch.cat([y.chunk(2, 1)[1], y.chunk(2, 1)[0]], 1).mean((2, 3))),
}
AXES = {  # named as numpy does
    "mean": lambda m, y: m.short(y.mean(axis=(2, 3))),
    "keepdims": lambda m, y: m.short(m.b(torch.mean(y, axis=(2, 3), keepdims=True)).flatten(1)),
    "cat": lambda m, y: m.short(torch.cat([y, y], axis=2).mean(axis=(2, 3))),
    "chunk": lambda m, y: m.short(
        torch.concatenate([y.chunk(2, axis=1)[1], y.chunk(2, axis=1)[0]], axis=1).mean((2, 3))),
}
FLOATS = {  # F13, F12: several results, and what else is a float operation, listed
    "values": (lambda m, y: m.short(m.b(y.sort(1).values).mean((2, 3))), ["sort", "b_getattr"]),
    "first": (lambda m, y: m.short(m.b(y.sort(1)[0]).mean((2, 3))), ["sort", "getitem"]),
    "a list": (lambda m, y: m.short(torch.cat(y.chunk(2, 1)[::-1], 1).mean((2, 3))), ["cat"]),
    "dtype": (lambda m, y: m.short(y.to(y.dtype).mean((2, 3))), ["x_to"]),
}


def quantized_as_written(end):
    model = Written(end).eval()
    qmodel = ql.quantize(model, ql.collect(model, [X]), MINMAX)
    exact, rounded = model(X[:3]), qmodel(X[:3])  # another number of images
    assert (exact - rounded).abs().max() < 0.05 * exact.abs().max()
    return qmodel


@torch.no_grad()
@pytest.mark.parametrize("name", [*SIZES, *ATTRIBUTES, *INDICES, *AXES])
def test_sizes_attributes_and_indices_keep_the_function_in_integers(name):
    qmodel = quantized_as_written((SIZES | ATTRIBUTES | INDICES | AXES)[name])
    assert qmodel.plan.floats == {}
    assert torch.allclose(ql.to_integer(qmodel)(X[:3]), qmodel(X[:3]), atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("name", FLOATS)
def test_one_of_several_results_is_listed_and_stored(name):
    end, floats = FLOATS[name]
    qmodel = quantized_as_written(end)
    assert list(qmodel.plan.floats) == floats and floats[-1] in qmodel.plan.stores
    assert f"node {floats[0]} (" in refusal(ql.to_integer, qmodel)
    assert all(qmodel.reads(layer) is not None for layer in qmodel.layers)


# ---- Between collect and quantize ----------------------------------------------------------------


@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook"])
def test_a_hook_that_is_added_after_collect_counts_or_is_refused(kind):
    model = network()
    stats = ql.collect(model, [X])
    change = {"forward_hook": lambda module, inputs, output: output * 3,
              "forward_pre_hook": lambda module, inputs: (inputs[0] * 3,)}[kind]
    handle = getattr(model[3], f"register_{kind}")(change)
    assert "hook (there is one on module 3)" in refusal(ql.quantize, model, stats, MINMAX)
    handle.remove()
    assert ql.quantize(model, stats, MINMAX).meta["image_shape"] == (3, 12, 12)


def replaced_forward(model):
    model.forward = lambda x, forward=model.forward: forward(x) * 2


CHANGES = {
    "a weight": lambda model: model[3].weight.data.mul_(2),
    "a state": lambda model: model.load_state_dict(network().state_dict()),
    "a running mean": lambda model: model.train()(X),
    "a setting": lambda model: setattr(model[3], "stride", (2, 2)),
    "a module": lambda model: model.__setitem__(2, nn.ReLU6()),
    "a forward": replaced_forward,
}


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
def test_a_network_that_changed_after_collect_is_refused(change):
    model = network()
    stats = ql.collect(model, [X])
    model.train()
    assert torch.equal(ql.quantize(model, stats, MINMAX)(X),
                       ql.quantize(model.eval(), stats, MINMAX)(X)), "the mode changes nothing"
    CHANGES[change](model)
    message = refusal(ql.quantize, model, stats, MINMAX)
    assert "collected on another network" in message or "not what the model computes" in message


# ---- Weights that are not a layer's own ----------------------------------------------------------


def pruned(conv):
    return prune.l1_unstructured(conv, "weight", 0.5)


def standardized(conv):
    """A weight that a hook of the caller's computes."""
    weight = conv.weight
    del conv.weight
    conv.source = weight
    conv.register_forward_pre_hook(lambda module, _: setattr(module, "weight", module.source * 2))
    return conv


REPARAMETRIZATIONS = {
    "parametrizations.weight_norm": nn.utils.parametrizations.weight_norm,
    "parametrizations.spectral_norm": nn.utils.parametrizations.spectral_norm,
    "weight_norm": nn.utils.weight_norm, "spectral_norm": nn.utils.spectral_norm,
    "prune": pruned, "own hook": standardized}


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
@pytest.mark.parametrize("batchnorm", [False, True])
@pytest.mark.parametrize("name", REPARAMETRIZATIONS)
def test_weights_that_are_computed_anew_are_quantized_as_they_are(name, batchnorm):
    conv = REPARAMETRIZATIONS[name](nn.Conv2d(3, 6, 3))
    bn = [nn.BatchNorm2d(6)] if batchnorm else []
    model = nn.Sequential(conv, *bn, nn.ReLU(), nn.Conv2d(6, 2, 1))
    model.train()(X)  # with gradients: the weight it leaves behind is no parameter
    model.eval()
    expected, hooks, kind = model(X), len(conv._forward_pre_hooks), type(conv)
    qmodel = ql.quantize(model, ql.collect(model, [X]), ql.QuantConfig(weight_bits=2))
    assert all(len(c.unique()) <= 3 for c in qmodel.layers["_0"].weight.flatten(1))
    assert qmodel.codes("_0").abs().max() == 1
    assert torch.allclose(folded(model)(X), expected, atol=1e-5)
    assert torch.equal(model(X), expected), "the model itself is left alone"
    assert len(conv._forward_pre_hooks) == hooks and type(conv) is kind


class Tied(nn.Module):
    """An autoencoder of one weight, and a layer that shares its storage."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(n, 6, 1, bias=False) for n in (3, 6, 6))
        self.b.weight = self.c.weight
        self.d = nn.Conv2d(6, 6, 1)
        self.d.weight = nn.Parameter(self.c.weight.data)
        self.bn = nn.BatchNorm2d(6)

    def forward(self, x):
        x = self.bn(self.d(self.c(self.b(F.relu(self.a(x))))))
        return F.conv_transpose2d(x, self.a.weight)


def test_a_weight_that_is_used_twice_is_rounded_once_for_each():
    model = Tied().eval()
    model.bn.running_var.uniform_(0.3, 3)
    expected, before = model(X), {k: v.clone() for k, v in model.state_dict().items()}
    assert torch.allclose(folded(model)(X), expected, atol=1e-5)
    config = ql.QuantConfig(weight_bits=3, weight_observer="minmax")
    qmodel = ql.quantize(model, ql.collect(model, [X]), config)
    for name in "bc":
        weight = getattr(model, name).weight.detach()
        scale = weight.abs().amax((1, 2, 3), keepdim=True) / 3
        assert torch.equal(qmodel.codes(name), (weight * (1 / scale)).round().int())
    scale = model.bn.weight / torch.sqrt(model.bn.running_var + model.bn.eps)
    error = (qmodel.layers["d"].weight / scale.view(-1, 1, 1, 1) - model.d.weight).abs()
    assert (error <= model.d.weight.abs().amax(1, keepdim=True) / 5.9).all()
    (kept,) = [v for k, v in qmodel.named_buffers() if k.startswith("a_weight")]
    assert torch.equal(kept, model.a.weight), "what the forward reads itself stays float"
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# ---- Networks and batches ------------------------------------------------------------------------


def Two():
    class Two(nn.Module):
        def forward(self, x, y):
            return x + y

    return Two()


@pytest.mark.parametrize("wrap, advice", [
    (nn.DataParallel, "pass what it wraps: model.module"),
    (lambda m: nn.Sequential(nn.DataParallel(m)), "module 0 is a DataParallel"),
    (lambda m: torch.compile(m, backend="eager"), "pass what it wraps: model._orig_mod"),
    (torch.jit.script, "pass what it wraps: the nn.Module"),
    (lambda m: lambda x: m(x), "a torch.nn.Module, not function"),
    (lambda m: Two(), r"takes 2 inputs (x, y); wrap it"),
])
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated")
def test_what_is_no_network_is_refused_with_what_to_pass(wrap, advice):
    assert advice in refusal(ql.collect, wrap(network()), [X])


@pytest.mark.parametrize("batches, advice", [
    (X.byte(), "not torch.uint8; scale it"),
    ([X.long()], "not torch.int64"),
    ([X.numpy()], "torch.from_numpy(x)"),
    (X.numpy(), "not ndarray"),
    ([{"image": X, "label": 1}], "not a dict with image, label"),
    ({"image": X}, "not str; pass tensors"),
    (7, "not int"),
    ([X[0]], "a single image becomes one with image[None]"),
    ([X.permute(0, 2, 3, 1)], "give it x.permute(0, 3, 1, 2)"),
    ([X[:, :1]], "to have 3 channels, but got 1"),
    ([], "the calibration set is empty"),
    ([X[:0]], "the calibration set is empty"),
])
def test_what_is_no_batch_is_refused_with_what_to_pass(batches, advice):
    assert advice in refusal(ql.collect, network(), batches)


def test_every_form_of_a_batch_gives_the_same_statistics():
    model, labels = network(), torch.zeros(8)
    expected = ql.collect(model, [X[:4], X[4:]])
    loader = DataLoader(TensorDataset(X, labels), 4)
    for batches in (loader, X, [X], [[X, labels]], (x for x in X.double().split(4))):
        stats = ql.collect(model, batches)
        assert stats.n_images == 8 and stats.image_shape == (3, 12, 12)
        for name, edge in expected.edges.items():
            assert torch.equal(stats.edges[name].bins, edge.bins)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_weights_of_any_float_type_are_computed_in_float32(dtype):
    model = network().to(dtype)
    exact = ql.collect(network().float(), [X]).edges.keys()
    qmodel = ql.quantize(model, ql.collect(model, [X.to(dtype)]))
    assert qmodel(X).dtype == torch.float32 and exact == set(qmodel.plan.observed)
    assert next(model.parameters()).dtype == dtype


def test_other_inputs_keep_their_defaults():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x, mask=None, *, scale=2.0):
            return self.conv(x) * scale if mask is None else self.conv(x) * mask

    model = Masked().eval()
    qmodel = ql.quantize(model, ql.collect(model, [X]))
    assert torch.allclose(folded(model)(X), model(X)) and qmodel(X).shape == model(X).shape


def test_a_value_that_is_not_finite_is_one_line():
    bad = X.clone()
    bad[0, 0, 0, 0] = torch.nan
    assert refusal(ql.collect, network(), [bad]).startswith("edge input_1: 1 of 3456 values")


# ---- Every function takes the same ---------------------------------------------------------------


@functools.cache
def prepared():
    model = network()
    stats = ql.collect(model, [X])
    return model, stats, ql.quantize(model, stats, ql.QuantConfig(4, 4))


def every_function(batches):
    model, stats, qmodel = prepared()
    learning = ql.ReconstructConfig(iterations=2, batch_size=4)
    tuning = ql.TuneConfig(iterations=2, batch_size=4)
    return {
        "collect": lambda: ql.collect(model, batches),
        "correct_bias": lambda: ql.correct_bias(model, qmodel, batches),
        "reestimate": lambda: ql.improving.reestimate_batchnorm(model, qmodel, batches),
        "edge_errors": lambda: edge_errors(model, qmodel, batches),
        "layer_errors": lambda: layer_errors(model, stats, batches, widths=(4,)),
        "reconstruct": lambda: ql.reconstruct(
            model, stats, batches, qmodel.config, learning, verbose=False),
        "tune": lambda: ql.tune_end_to_end(model, qmodel, batches, tuning, verbose=False),
    }


@pytest.mark.parametrize("name", every_function(X))
def test_every_function_takes_a_loader_and_refuses_what_is_no_batch(name):
    every_function(DataLoader(TensorDataset(X, torch.zeros(8)), 4))[name]()
    with torch.inference_mode():
        every_function([X])[name]()
    assert "not torch.uint8; scale it" in refusal(every_function([X.byte()])[name])


class Answer(nn.Module):
    """A network that answers with something made of its places [B, 6, H, W] and logits [B, 4]."""

    def __init__(self, answer):
        super().__init__()
        self.a, self.fc, self.answer = nn.Conv2d(3, 6, 3), nn.Linear(6, 4), answer

    def forward(self, x):
        y = self.a(x).relu()
        return self.answer(y, self.fc(y.mean((2, 3))))


ANSWERS = {  # what a network returns -> how it is called, and which functions take it
    "tuple": (lambda y, z: (z, y), "a tuple", ()),
    "dict": (lambda y, z: {"out": z}, "a dict", ()),
    "argmax": (lambda y, z: z.argmax(1), "torch.int64 [4]", ()),
    "number": (lambda y, z: z.argmax(1, keepdim=True), "torch.int64 [4, 1]", ("evaluate",)),
    "places": (lambda y, z: y, "torch.float32 [4, 6, 10, 10]", ("tune", "layer_errors")),
    "mixed": (lambda y, z: z.view(-1, 2, 4), "torch.float32 [2, 2, 4]", ()),
}


@pytest.mark.parametrize("function", ["evaluate", "tune", "fisher", "layer_errors"])
@pytest.mark.parametrize("kind", ANSWERS)
def test_an_answer_that_is_no_logits_is_refused_with_what_it_is(kind, function):
    answer, called, taken = ANSWERS[kind]
    model, x = Answer(answer).eval(), X[:4]
    stats = ql.collect(model, [x])
    qmodel = ql.quantize(model, stats, MINMAX)
    learning = ql.ReconstructConfig(iterations=2, batch_size=4, loss="fisher")
    call = {
        "evaluate": lambda: ql.evaluate(qmodel, [(x, torch.zeros(4).long())]),
        "tune": lambda: ql.tune_end_to_end(
            model, qmodel, x, ql.TuneConfig(iterations=2, batch_size=4), verbose=False),
        "fisher": lambda: ql.reconstruct(model, stats, x, MINMAX, learning, verbose=False),
        "layer_errors": lambda: layer_errors(model, stats, x, (4,), MINMAX),
    }[function]
    if function in taken:
        call()
    else:
        assert f"the network gives {called} for 4 images" in refusal(call)


def test_evaluate_takes_a_loader_of_images_and_labels():
    model, labels = network(), torch.arange(8) % 4
    loader = DataLoader(TensorDataset(X, labels), 3)
    result = ql.evaluate(model, loader)
    expected = model(X).argmax(1)
    assert torch.equal(result.predictions, expected) and result.n == 8
    assert result.top1 == pytest.approx(100 * (expected == labels).float().mean().item())
    assert "pass fewer batches" in refusal(lambda: ql.evaluate(model, loader, limit=4))
    for wrong in (X, [X], 7, [(X, None)]):
        assert "a Split of load_data" in refusal(lambda wrong=wrong: ql.evaluate(model, wrong))
    wide = DataLoader(TensorDataset(X, labels + 1), 8)
    assert "4 outputs but the data has 5" in refusal(lambda: ql.evaluate(model, wide))
    assert "device 'gpu'" in refusal(lambda: ql.evaluate(model, loader, on="gpu"))


@pytest.mark.parametrize("options, name", [
    (dict(n=100.0), "n=100.0"), (dict(n=None), "n=None"), (dict(n=8, seed=1.5), "seed=1.5"),
    (dict(n=8, batch_size=0), "batch_size=0")])
def test_counts_of_calibration_images(digits, options, name):
    assert f"{name}: give an integer" in refusal(lambda: digits.calibration(**options))
    assert len(list(digits.calibration(np.int64(8), batch_size=np.int32(4)))) == 2


@pytest.mark.parametrize("options", [
    dict(limit=-5), dict(limit=10.0), dict(batch_size=0), dict(batch_size=-1), dict(limit=0.5)])
def test_counts_of_evaluate(resnet20, digits, options):
    assert "give an integer of at least 1" in refusal(
        lambda: ql.evaluate(resnet20, digits.test, **options))


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def pipeline(digits):
    """Logits of the readme's example, after a little learning."""
    model = ql.load_model("resnet20", ql.root() / "checkpoint" / "resnet20-digits.safetensors")
    images = torch.cat(list(digits.calibration(32)))
    stats, learning = ql.collect(model, [images]), ql.ReconstructConfig(
        iterations=2, batch_size=8, unit="layer")
    qmodel = ql.reconstruct(model, stats, images, ql.QuantConfig(3, 4), learning, verbose=False)
    result = ql.evaluate(qmodel, digits.test, limit=50)
    return images, qmodel(images).detach(), result.predictions, ql.to_integer(qmodel)(images)


def test_the_default_dtype_changes_nothing(digits, float64):
    found = pipeline(digits)
    torch.set_default_dtype(torch.float32)
    for value, expected in zip(found, pipeline(digits), strict=True):
        assert value.dtype == expected.dtype and torch.equal(value, expected)


@pytest.mark.parametrize(
    "name", ["layers", "plan", "config", "quantizers", "codes", "reads", "write", "bias_scale",
             "graph", "code", "meta", "recompile", "shape_env", "_graph"])
def test_a_part_of_the_network_may_have_any_name(name):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            setattr(self, name, nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)))

        def forward(self, x):
            return self.get_submodule(name)(x).mean((2, 3))

    model = Named().eval()
    qmodel = ql.quantize(model, ql.collect(model, [X]), MINMAX)
    assert list(qmodel.layers) == [f"{name}_0", f"{name}_2"] and qmodel.plan.floats == {}
    assert torch.allclose(ql.to_integer(qmodel)(X), qmodel(X), atol=1e-6)
    assert torch.allclose(qmodel(X), model(X), atol=0.05)


@torch.no_grad()
@pytest.mark.parametrize("name", ["graph", "meta"])
def test_a_layer_a_weight_and_a_tensor_may_have_any_name(name, tmp_path):
    class Named(nn.Module):
        def __init__(self, kind):
            super().__init__()
            value = torch.rand(4, 1, 1)
            setattr(self, name, {"layer": nn.Conv2d(3, 4, 3), "tensor": value,
                                 "parameter": nn.Parameter(value)}[kind])
            self.own_code = self.first = nn.Conv2d(3, 4, 3)
            self.kind = kind

        def forward(self, x):
            if self.kind == "layer":
                return F.relu(getattr(self, name)(x) + self.own_code(x)).mean((2, 3))
            return self.first(x) * getattr(self, name)

    for kind in ("layer", "tensor", "parameter"):
        model = Named(kind).eval()
        assert torch.allclose(folded(model)(X), model(X), atol=1e-5)
        qmodel = ql.quantize(model, ql.collect(model, [X]), MINMAX)
        assert torch.allclose(qmodel(X), model(X), atol=0.1)
        assert list(qmodel.layers)[0] == (name if kind == "layer" else "own_code")
        ql.save_quantized(qmodel, tmp_path / "named.safetensors")
        again = ql.load_quantized(tmp_path / "named.safetensors", Named(kind))
        assert torch.equal(again(X), qmodel(X))
        if kind == "layer":
            assert torch.allclose(ql.to_integer(again)(X), qmodel(X), atol=1e-6)
            ql.correct_bias(model, qmodel, X)


@torch.no_grad()
@pytest.mark.parametrize("kernel, known", [
    (lambda y: y.size()[3], True), (lambda y: y.shape[2:], True), (lambda y: y.size(2), True),
    (lambda y: y.size(2) // 2, False)])
def test_pools_over_the_size_of_the_image(kernel, known):
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4 if known else 16, 5)

        def forward(self, x):
            y = F.relu(self.conv(x))
            y = F.avg_pool2d(y, kernel(y))
            return self.fc(y.view(y.size(0), -1))

    model = Pooled().eval()
    qmodel = ql.quantize(model, ql.collect(model, [X]))
    if known:
        assert torch.allclose(ql.to_integer(qmodel)(X), qmodel(X), atol=1e-5)
    else:
        assert "write its size as a number" in refusal(ql.to_integer, qmodel)


def test_a_layer_left_float_is_simulation_only():
    model = network()
    config = ql.QuantConfig(layer_weight_bits={"_3": None})
    qmodel = ql.quantize(model, ql.collect(model, [X]), config)
    assert "layer _3 has float weights" in refusal(ql.to_integer, qmodel)
    ql.tune_end_to_end(model, qmodel, X, ql.TuneConfig(iterations=2, batch_size=4), verbose=False)


def test_export_takes_its_shape_from_the_calibration(tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    x, fc = X[:, :1], nn.Linear(400, 3)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), fc).eval()
    qmodel = ql.quantize(model, ql.collect(model, [x]))
    file = onnx.load(ql.export_onnx(qmodel, tmp_path / "grey.onnx"))
    shape = file.graph.input[0].type.tensor_type.shape.dim
    assert [d.dim_value for d in shape[1:]] == [1, 12, 12]
    assert "not Sequential; quantize it" in refusal(ql.export_onnx, model, tmp_path / "f.onnx")
    for batch in (0, -1, None):
        assert "batch=" in refusal(ql.export_onnx, qmodel, tmp_path / "f.onnx", None, batch)
