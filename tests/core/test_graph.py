"""The graph: folding changes nothing, kinds come from what an operation is, and the plan says where codes are stored."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import quantlab as ql
from quantlab.calibration import prepare
from quantlab.graph import find_kinds, fold, trace
from quantlab.plan import make_plan


def randomize_batchnorm(model):
    """BatchNorm statistics as a trained network has them, so that folding has something to do."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.5)
            module.running_var.uniform_(0.3, 3)
            nn.init.uniform_(module.weight, 0.3, 2)
            nn.init.normal_(module.bias)
    return model.eval()


class Tangle(nn.Module):
    """What people write: functional and module forms, reused and in-place ReLUs, concat, chunk, a BatchNorm that cannot be folded."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU6(inplace=True))
        self.pre = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.Conv2d(8, 8, 1)
        self.bn = nn.BatchNorm2d(8)
        self.drop, self.fc = nn.Dropout(0.5), nn.Linear(16, 4)

    def forward(self, x):
        x = self.stem(x)
        y = self.relu(self.pre(x))
        y = self.relu(self.bn(self.a(y)))
        y += x
        z = F.relu(self.b(F.max_pool2d(y, 2)))
        z = torch.cat([z, F.hardswish(F.avg_pool2d(y, 2))], 1)
        first, second = z.chunk(2, 1)
        z = torch.cat([second, first], dim=1)
        return self.fc(self.drop(z.mean((2, 3))).view(x.size(0), -1))


@pytest.mark.parametrize("build", [lambda: ql.load_model("resnet20"), Tangle], ids=["resnet20", "tangle"])
def test_folded_graph_computes_what_the_model_computes(build):
    model = randomize_batchnorm(build())
    x = torch.randn(4, 3, 32, 32)
    expected = model(x.clone())
    graph = fold(trace(model))
    assert torch.allclose(graph(x), expected, atol=1e-4 * expected.abs().max().item())
    left = [n for n, kind in find_kinds(graph).items() if kind == "batchnorm"]
    assert len(left) == (1 if isinstance(model, Tangle) else 0), "only the BatchNorm without a convolution in front stays"
    assert torch.equal(model(x.clone()), expected), "the model itself is left alone"


def test_plan_of_the_tangle():
    graph, plan, _ = prepare(randomize_batchnorm(Tangle()))
    assert plan.floats == ("hardswish",)
    assert plan.first == {"stem_0"} and plan.last == {"fc"}
    roles = plan.stores
    assert roles["x"] == "input" and "fc" not in roles, "the image is stored, the logits are not"
    assert roles["stem_2"] == "residual" and roles["relu_1"] == "residual", "both operands of the add"
    assert "relu_2" not in roles and "b" not in roles, "a branch that only a concat reads is rounded there, once"
    assert "max_pool2d" not in roles and plan.sources[plan.reads["b"]] == "add", "max-pooling passes codes on"


@pytest.mark.parametrize("name, layers, adds", [("resnet20", 22, 9), ("resnet50", 54, 16)])
def test_plans_of_the_resnets(name, layers, adds):
    graph, plan, _ = prepare(ql.load_model(name))
    kinds = list(find_kinds(graph).values())
    assert (kinds.count("compute"), kinds.count("add"), kinds.count("batchnorm")) == (layers, adds, 0)
    assert plan.first == {"conv1"} and plan.last == {"fc"} and plan.floats == ()
    for node in graph.graph.nodes:
        if find_kinds(graph)[node] == "add":
            assert all(plan.stores[operand.name] == "residual" for operand in node.args)


def test_placement_inputs_has_the_originals_104_quantizers():
    _, plan, _ = prepare(ql.load_model("resnet50"), "inputs")
    assert len(plan.reads) == 104 and plan.stores == {}


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
    assert torch.allclose(fold(trace(model))(x), model(x), atol=1e-6)


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

    assert len(make_plan(fold(trace(Deep()))).floats) == 120


def test_what_cannot_be_traced_names_the_line():
    class Branches(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(ql.UserError, match=r"test_graph.py:\d+: return x if x.sum\(\) > 0"):
        trace(Branches())


def test_nothing_to_quantize_and_unknown_placement():
    with pytest.raises(ql.UserError, match="nothing to quantize"):
        prepare(nn.Sequential(nn.ReLU()))
    with pytest.raises(ql.UserError, match="use one of: fused, inputs"):
        prepare(nn.Sequential(nn.Conv2d(3, 3, 1)), "outputs")


def test_a_relu_behind_pooling_still_belongs_to_its_convolution():
    class Tutorial(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2, self.fc = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(16, 3)

        def forward(self, x):
            x = F.relu(F.max_pool2d(self.conv1(x), 2))
            y = self.conv2(x)
            batch = y.size(0)
            return self.fc(F.relu(y).view(batch, -1))

    _, plan, _ = prepare(Tutorial())
    assert list(plan.stores) == ["x", "relu", "relu_1"] and plan.reads == {"conv1": "x", "conv2": "relu", "fc": "relu_1"}


def test_batchnorm_without_running_statistics_is_not_folded():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    graph, _, _ = prepare(model)
    assert "batchnorm" in find_kinds(graph).values()
    x = torch.randn(4, 3, 5, 5)
    assert torch.allclose(graph(x), model(x), atol=1e-6)


@pytest.mark.parametrize("name", ["resnet18", "vgg11_bn", "mobilenet_v2", "mobilenet_v3_small", "densenet121", "googlenet", "shufflenet_v2_x0_5",
                                  "squeezenet1_1", "efficientnet_b0"])
def test_torchvision_networks_at_eight_bits(name):
    """Random weights with re-estimated BatchNorm statistics: the logits stay far above the noise, and no residual branch stays float."""
    import torchvision

    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(num_classes=10, **({"init_weights": False} if name == "googlenet" else {}))
    x = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        model.train()(x)
        model.eval()
        stats = ql.collect(model, [x])
        qmodel = ql.quantize(model, stats, ql.QuantConfig(weight_observer="minmax"))
        exact, rounded = model(x), qmodel(x)
    assert 10 * torch.log10(exact.square().sum() / (rounded - exact).square().sum()) > 15
    assert not [f for f in qmodel.plan.floats if "stochastic" in f]
    if name in ("resnet18", "mobilenet_v2", "densenet121", "googlenet", "vgg11_bn", "squeezenet1_1", "shufflenet_v2_x0_5"):
        assert qmodel.plan.floats == ()
