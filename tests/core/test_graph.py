"""The graph: folding changes nothing, kinds come from what an operation is, and the plan says where
codes are stored.
"""

import pytest
import torch
import torch.nn.functional as F
from examples import TORCHVISION, Tangle, randomize_batchnorm, torchvision_network
from torch import fx, nn

import quantlab as ql
from quantlab.calibration import watch
from quantlab.graph import find_kinds, folded, trace
from quantlab.inplace import written_in_place
from quantlab.plan import make_plan

IMAGES = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "build", [lambda: ql.load_model("resnet20"), Tangle], ids=["resnet20", "tangle"])
def test_folded_graph_computes_what_the_model_computes(build):
    model = randomize_batchnorm(build())
    x = torch.randn(4, 3, 32, 32)
    expected = model(x.clone())
    graph = folded(model)
    assert torch.allclose(graph(x), expected, atol=1e-4 * expected.abs().max().item())
    left = [n for n, kind in find_kinds(graph).items() if kind == "batchnorm"]
    expected_left = 1 if isinstance(model, Tangle) else 0
    assert len(left) == expected_left, "only the BatchNorm without a convolution in front stays"
    assert torch.equal(model(x.clone()), expected), "the model itself is left alone"


def test_an_addition_is_named_by_its_block(resnet20):
    """The blocks are those of the modules' own names; what no block calls keeps torch.fx's name."""
    blocks = [name for name, module in resnet20.named_modules() if hasattr(module, "shortcut")]
    kinds = find_kinds(folded(resnet20))
    adds = [node.name for node, kind in kinds.items() if kind == "add"]
    assert adds == [block.replace(".", "_") + "_add" for block in blocks] and len(adds) == 9
    assert "add" in {node.name for node in find_kinds(folded(Tangle()))}


def test_plan_of_the_tangle():
    plan = make_plan(folded(randomize_batchnorm(Tangle())))
    assert list(plan.floats) == ["hardswish"]
    assert plan.first == {"stem_0"} and plan.last == {"fc"}
    roles = plan.stores
    assert roles["x"] == "input" and "fc" not in roles, "the image is stored, the logits are not"
    assert roles["stem_2"] == roles["relu_1"] == "residual", "both operands of the add"
    assert "relu_2" not in roles, "a branch that only a concat reads is rounded there, once"
    assert "b" not in roles, "a branch that only a concat reads is rounded there, once"
    assert "max_pool2d" not in roles, "max-pooling passes codes on"
    assert plan.sources[plan.reads["b"]] == "add", "max-pooling passes codes on"


@pytest.mark.parametrize("name, layers, adds", [("resnet20", 22, 9), ("resnet50", 54, 16)])
def test_plans_of_the_resnets(name, layers, adds):
    graph = folded(ql.load_model(name))
    plan = make_plan(graph)
    kinds = list(find_kinds(graph).values())
    counts = {kind: kinds.count(kind) for kind in ("compute", "add", "batchnorm")}
    assert counts == {"compute": layers, "add": adds, "batchnorm": 0}
    assert plan.first == {"conv1"} and plan.last == {"fc"} and plan.floats == {}
    for node in graph.graph.nodes:
        if find_kinds(graph)[node] == "add":
            assert all(plan.stores[operand.name] == "residual" for operand in node.args)


def test_in_place_operations_keep_their_meaning():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.relu = nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True)

        def forward(self, x):
            y = self.conv(x)
            z = self.relu(y)  # y is changed as well
            return torch.relu_(self.conv(x)) + y * 2 + z

    model, x = InPlace().eval(), torch.randn(2, 3, 4, 4)
    assert torch.allclose(folded(model)(x), model(x), atol=1e-6)


class Changes(nn.Module):
    """forward(x): a convolution, what `change` does with its result, and its mean."""

    def __init__(self, change):
        super().__init__()
        self.change, self.conv = change, nn.Conv2d(3, 8, 3)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        y = z = self.conv(x)
        return self.change(self, y, z)


def changed(operation):
    def change(network, y, z):
        operation(network, y)
        return z.mean((2, 3))

    return change


def one_chunk(network, y, z):
    a, b = y.chunk(2, 1)
    return torch.cat([b, network.relu(a), a], 1)


@pytest.mark.parametrize("change", [
    one_chunk,
    changed(lambda network, y: network.relu(y)),
    changed(lambda network, y: F.relu(y, True)),
    changed(lambda network, y: F.hardtanh(y, -0.1, 0.2, True)),
    changed(lambda network, y: F.leaky_relu(y, 0.5, inplace=True)),
    changed(lambda network, y: y.clamp_(0, 0.1)),
    changed(lambda network, y: (y.shape, y.mul_(2))),
    lambda network, y, z: F.normalize(y, dim=1).mean((2, 3)),  # torch.fx records its out=None
    lambda network, y, z: torch.add(y, z, out=None).mean((2, 3)),
])
@torch.no_grad()
def test_in_place_operations_that_can_be_written_out_are(change):
    model, x = Changes(change).eval(), torch.randn(4, 3, 6, 6)
    graph = folded(model)
    assert torch.allclose(graph(x), model(x), atol=1e-6)
    values, watched = {}, {n.name for n in graph.graph.nodes}
    watch(graph, watched, lambda name, value: values.update({name: value}), [x])
    before = {k: v.clone() for k, v in values.items() if isinstance(v, torch.Tensor)}
    watch(graph, watched, lambda name, value: None, [x])
    assert all(torch.equal(values[name], value) for name, value in before.items())
    assert torch.equal(values["conv"], model.conv(x)), "no value changes once it is computed"


@pytest.mark.parametrize("operation, name", [
    (lambda network, y: y[:, :4].relu_(), "relu_"),
    (lambda network, y: network.relu(y[:, :4]), "relu"),
    (lambda network, y: y.chunk(2, 1)[0].mul_(0.1), "mul_"),
    (lambda network, y: y.view(y.size(0), -1).clamp_(0, 1), "clamp_"),
    (lambda network, y: y.T.mul_(2), "mul_"),
    (lambda network, y: y.float().mul_(2), "mul_"),
    (lambda network, y: F.relu(y.flatten(1), True), "relu"),
    (lambda network, y: torch.add(y, 1, out=y), "add"),
])
def test_in_place_operations_on_views_are_refused(operation, name):
    with pytest.raises(ql.UserError, match=rf"node {name} .* in place .*; write y = f\(y\)"):
        folded(Changes(changed(operation)).eval())


def noted(y):
    """A function of the caller's own, which does more than its result says."""
    NOTED.append(y.shape)


NOTED = []
fx.wrap("noted")


class Headed(nn.Module):
    """Two layers and, with `head`, what is computed of the first behind them and never read."""

    def __init__(self, head):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.fc, self.aux = nn.Conv2d(3, 8, 3), nn.Linear(8, 4), nn.Linear(32, 4)
        self.head = head

    def forward(self, x):
        y = self.conv(x).relu()
        logits = self.fc(y.mean((2, 3)))
        self.head(self, y)
        return logits


def unread_head(network, y):
    pooled = F.adaptive_avg_pool2d(y, 2)
    network.aux(pooled.view(pooled.shape[0], -1)).softmax(1)
    y.clone().mul_(2)


def test_what_nobody_reads_is_no_part_of_the_network():
    found = []
    for head in (unread_head, lambda network, y: None):
        model = Headed(head).eval()
        qmodel = ql.quantize(model, ql.collect(model, [IMAGES]), ql.QuantConfig(4, 4))
        found.append((str(qmodel.graph), qmodel.plan, ql.weight_bytes(qmodel)))
    assert found[0] == found[1] and found[0][1].last == {"fc"}


def test_assertions_and_functions_of_the_callers_own_stay():
    def head(network, y):
        torch._assert(y.shape[1] == 8, "eight channels")
        noted(y)

    graph = folded(Headed(head).eval())
    before = len(NOTED)
    graph(IMAGES)
    assert len(NOTED) == before + 1 and "torch._assert" in graph.code


def behind_a_linear(linear, flat, bn):
    """A linear layer on the value of `flat` and a BatchNorm with real statistics."""
    model = nn.Sequential(nn.Conv2d(3, 16, 8, 8), flat, linear, bn, nn.Flatten()).eval()
    bn.running_mean.normal_()
    bn.running_var.uniform_(0.2, 3)
    return model


@pytest.mark.parametrize("width", [16, 24])
@pytest.mark.parametrize("flat", [nn.Flatten(2), nn.Sequential(nn.ReLU(), nn.Flatten(-2))])
def test_batchnorm_over_the_places_of_a_linear_layer_is_not_folded(width, flat):
    model, x = behind_a_linear(nn.Linear(16, width), flat, nn.BatchNorm1d(16)), IMAGES
    graph = folded(model)
    assert "batchnorm" in find_kinds(graph).values()
    assert torch.allclose(graph(x), model(x), atol=1e-5)
    exact, rounded = model(x), ql.quantize(model, ql.collect(model, [x]))(x)
    assert 10 * torch.log10(exact.square().sum() / (rounded - exact).square().sum()) > 35


def test_batchnorm_behind_a_linear_layer_is_folded_along_its_outputs():
    linear, bn = nn.Linear(256, 16), nn.BatchNorm1d(16)
    model = behind_a_linear(linear, nn.Flatten(), bn)
    graph = folded(model)
    assert "batchnorm" not in find_kinds(graph).values()
    assert torch.allclose(graph(IMAGES), model(IMAGES), atol=1e-5)


def test_a_layer_of_the_callers_own_is_not_taken_for_torchs():
    class Doubled(nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    class Leaves(fx.Tracer):
        def is_leaf_module(self, module, name):
            return True

    model = nn.Sequential(Doubled(3, 4, 1), nn.Conv2d(4, 2, 1)).eval()
    graph = fx.GraphModule(model, Leaves().trace(model))
    plan = make_plan(folded(graph))
    assert list(plan.reads) == ["_1"] and list(plan.floats) == ["_0"]


def test_a_layer_whose_forward_was_replaced_is_not_taken_for_torchs():
    class Standardized(nn.Conv2d):
        def _conv_forward(self, x, weight, bias):
            return super()._conv_forward(x, weight / weight.std(), bias)

    class Leaves(fx.Tracer):
        def is_leaf_module(self, module, name):
            return True

    replaced = nn.Conv2d(4, 4, 3, padding=1)
    replaced.forward = lambda x: F.conv2d(F.pad(x, (1, 1, 1, 1), "circular"), replaced.weight)
    model = nn.Sequential(Standardized(3, 4, 1), replaced, nn.Conv2d(4, 2, 1)).eval()
    graph = folded(fx.GraphModule(model, Leaves().trace(model)))
    plan = make_plan(graph)
    assert list(plan.reads) == ["_2"] and list(plan.floats) == ["_0", "_1"]
    assert set(plan.floats.values()) == {"its forward is not torch's own"}


@fx.wrap
def add(a, b):
    return a + 0.5 * b


@fx.wrap
def relu(x):
    return x.relu() - 1


@fx.wrap
def flatten(x):
    return 3 * x.flatten(1)


class Namesakes(nn.Module):
    """Functions of the caller's own that are called like torch's."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        y = relu(self.a(x))
        return self.fc(flatten(add(y, self.b(y)).mean((2, 3), keepdim=True)))


def test_a_function_of_the_callers_own_is_not_taken_for_torchs():
    torch.manual_seed(0)
    model, x = Namesakes().eval(), torch.randn(4, 3, 8, 8)
    qmodel = ql.quantize(model, ql.collect(model, [x]))
    assert list(qmodel.plan.floats) == ["relu", "add", "flatten"]
    torch.testing.assert_close(qmodel(x), model(x), rtol=0, atol=0.02)
    assert torch.equal(written_in_place(qmodel)(x), qmodel(x))
    with pytest.raises(ql.UserError, match="relu"):
        ql.to_integer(qmodel)


def test_deep_chains_are_planned_in_no_time():
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            x = self.conv(x)
            for _ in range(60):
                x = x * torch.sigmoid(x) + x
            return x

    assert len(make_plan(folded(Deep())).floats) == 120


def test_what_cannot_be_traced_names_the_line():
    class Branches(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(ql.UserError, match=r"test_graph.py:\d+: return x if x.sum\(\) > 0"):
        trace(Branches())


def test_nothing_to_quantize():
    with pytest.raises(ql.UserError, match="nothing to quantize"):
        make_plan(folded(nn.Sequential(nn.ReLU())))


def test_a_relu_behind_pooling_still_belongs_to_its_convolution():
    class Tutorial(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1 = nn.Conv2d(3, 4, 3)
            self.conv2 = nn.Conv2d(4, 4, 3)
            self.fc = nn.Linear(16, 3)

        def forward(self, x):
            x = F.relu(F.max_pool2d(self.conv1(x), 2))
            y = self.conv2(x)
            batch = y.size(0)
            return self.fc(F.relu(y).view(batch, -1))

    plan = make_plan(folded(Tutorial()))
    assert list(plan.stores) == ["x", "relu", "relu_1"]
    assert plan.reads == {"conv1": "x", "conv2": "relu", "fc": "relu_1"}


def test_batchnorm_without_running_statistics_is_not_folded():
    batchnorm = nn.BatchNorm2d(4, track_running_stats=False)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), batchnorm, nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    graph = folded(model)
    assert "batchnorm" in find_kinds(graph).values()
    x = torch.randn(4, 3, 5, 5)
    assert torch.allclose(graph(x), model(x), atol=1e-6)


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_networks_at_eight_bits(name):
    """The logits stay far above the noise, and no residual branch stays float."""
    x = torch.randn(4, 3, 64, 64)
    model = torchvision_network(name, x)
    stats = ql.collect(model, [x])
    qmodel = ql.quantize(model, stats, ql.QuantConfig(weight_observer="minmax"))
    with torch.no_grad():
        exact, rounded = model(x), qmodel(x)
    assert 10 * torch.log10(exact.square().sum() / (rounded - exact).square().sum()) > 15
    assert not [f for f in qmodel.plan.floats if "stochastic" in f]
    if name not in ("mobilenet_v3_small", "efficientnet_b0"):
        assert qmodel.plan.floats == {}


class Odd(nn.Module):
    """A layer, an operation, and a layer behind it."""

    def __init__(self, operation, first=None):
        super().__init__()
        self.first, self.last = first or nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 2)
        self.pool, self.operation = nn.MaxPool2d(2, return_indices=True), operation
        self.batch = nn.BatchNorm2d(4, track_running_stats=False)

    def forward(self, x):
        return self.last(self.operation(self, self.first(x)).mean((2, 3)))


WITHOUT_FORM = {  # an operation: what plan.floats says of it
    "gelu": (lambda m, y: nn.functional.gelu(y), {"gelu": "only layers, adds"}),
    "number": (lambda m, y: y + 1, {"add": "does not add two activations"}),
    "alpha": (lambda m, y: torch.add(y, y, alpha=2), {"add": "does not add two activations"}),
    "size": (lambda m, y: y + y.size(2), {"add": "does not add two activations"}),
    "indices": (lambda m, y: m.pool(y)[0],
                {"pool": "returns indices", "getitem": "of pool, which"}),
    "pool": (lambda m, y: nn.functional.max_pool1d(y.flatten(2), 2).unsqueeze(3),
             {"max_pool1d": "pools in two dimensions"}),
    "average": (lambda m, y: nn.functional.avg_pool1d(y.flatten(2), 2).unsqueeze(3),
                {"avg_pool1d": "pools in two dimensions"}),
    "mean": (lambda m, y: torch.relu(y) - y.mean(),
             {"mean": "name its dimensions", "sub": "only layers, adds"}),
    "batch": (lambda m, y: m.batch(torch.relu(y)), {"batch": "depends on the batch"}),
}


LAYERS = {
    "reflect": (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), "its padding is 'reflect'"),
    "conv1d": (nn.Sequential(nn.Flatten(2), nn.Conv1d(3, 4, 3), nn.Unflatten(2, (2, -1))),
               "two dimensions"),
    "batch": (nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)),
              "on the batch"),
}


@pytest.mark.parametrize("name", WITHOUT_FORM)
def test_every_operation_without_an_integer_form_is_listed_with_its_reason(name):
    operation, expected = WITHOUT_FORM[name]
    found = make_plan(folded(Odd(operation).eval())).floats
    assert found.keys() == expected.keys()
    assert all(why in found[node] for node, why in expected.items())


@torch.no_grad()
@pytest.mark.parametrize("name", LAYERS)
def test_layers_without_an_integer_form_are_listed_too_and_refused_with_the_reason(name):
    first, why = LAYERS[name]
    model = Odd(lambda m, y: nn.functional.gelu(y), first).eval()
    stats = ql.collect(model, [torch.randn(4, 3, 8, 8)])
    qmodel = ql.quantize(model, stats, ql.QuantConfig(observer="minmax", weight_observer="minmax"))
    (node, reason), (other, _) = qmodel.plan.floats.items()
    assert why in reason and other == "gelu"
    with pytest.raises(ql.UserError, match=f"^node {node} ") as caught:
        ql.to_integer(qmodel)
    refused = f" has no integer form here: {reason}; replace the operation (nor have gelu: see"
    assert refused in str(caught.value)
