"""The graph: folding changes nothing, kinds come from what an operation is, and the plan says where
codes are stored.
"""

import pytest
import torch
import torch.nn.functional as F
from examples import TORCHVISION, Tangle, randomize_batchnorm, torchvision_network
from torch import nn

import quantlab as ql
from quantlab.graph import find_kinds, folded, trace
from quantlab.plan import make_plan


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
    assert plan.floats == ("hardswish",)
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
    assert plan.first == {"conv1"} and plan.last == {"fc"} and plan.floats == ()
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
        assert qmodel.plan.floats == ()
