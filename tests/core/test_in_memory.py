"""A simulated network is evaluated in place: the same values, and nothing that is read twice."""

import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from conftest import CHECKOUT
from torch import nn

import quantlab as ql
from quantlab.calibration import collect_edges
from quantlab.graph import folded
from quantlab.inplace import written_in_place
from quantlab.plan import make_plan


class Mixed(nn.Module):
    """Every kind of operation that may write to its input, and values with two readers."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3 if i == 0 else 4, 4, 3, padding=1) for i in range(6))
        self.relu, self.relu6, self.tanh = nn.ReLU(), nn.ReLU6(), nn.Hardtanh(-0.5, 0.7)
        self.last = nn.Linear(4, 5)

    def forward(self, x):
        a = self.relu(self.convs[0](x))
        b = F.relu6(self.convs[1](a)) + a  # a is read twice
        c = self.tanh(self.convs[2](b))
        d = F.hardtanh(self.convs[3](c), -0.2, 0.4) + c.mean((2, 3), keepdim=True)  # broadcast
        e = torch.relu(self.convs[4](d)) + self.convs[5](d).relu()
        f = e + e
        return self.last(f.relu().mean((2, 3))), self.relu6(f).amax()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_in_place_gives_the_same_values_and_changes_no_other(bits, layout):
    torch.manual_seed(bits)
    model, images = Mixed().eval(), torch.randn(6, 3, 9, 9).contiguous(memory_format=layout)
    stats = ql.collect(model, [images])
    qmodel = ql.quantize(model, stats, ql.QuantConfig(weight_bits=bits, act_bits=bits))
    fast, before, state = written_in_place(qmodel), images.clone(), qmodel.state_dict()
    state = {name: value.clone() for name, value in state.items()}
    changed = [n for n in fast.graph.nodes
               if n.kwargs.get("in_place") or n.kwargs.get("inplace") or "_add_to" in str(n.target)]
    assert len(changed) >= 10
    with torch.no_grad():
        wanted = qmodel(images)
        for _ in range(2):
            for a, b in zip(fast(images), wanted, strict=True):
                assert torch.equal(a, b)
    assert torch.equal(images, before)
    check_edges(stats.edges, model, images)
    assert all(torch.equal(qmodel.state_dict()[name], value) for name, value in state.items())
    assert not any(m.inplace for m in qmodel.modules() if hasattr(m, "inplace"))


@pytest.mark.parametrize("name", [
    "resnet18", "mobilenet_v3_small", "googlenet",
    pytest.param("densenet121", marks=pytest.mark.long)])
def test_torchvisions_networks_in_place(name):
    from torchvision import models

    torch.manual_seed(0)
    extra = {"init_weights": False} if name == "googlenet" else {}
    model = getattr(models, name)(num_classes=10, **extra).eval()
    images = torch.randn(2, 3, 64, 64)
    stats = ql.collect(model, [images])
    qmodel = ql.quantize(model, stats)
    with torch.no_grad():
        assert torch.equal(written_in_place(qmodel)(images), qmodel(images))
    check_edges(stats.edges, model, images)


def check_edges(found, model, images):
    """collect, which overwrites values, counts what the graph as it is computes."""
    graph = folded(model)
    expected, _ = collect_edges(graph, make_plan(graph).observed, [images])
    assert list(found) == list(expected)
    for name, edge in expected.items():
        assert (edge.zeros, edge.minimum) == (found[name].zeros, found[name].minimum), name
        assert torch.equal(edge.bins, found[name].bins), name


def test_a_network_with_a_hook_is_left_as_it_is():
    model = Mixed().eval()
    qmodel = ql.quantize(model, ql.collect(model, [torch.randn(4, 3, 9, 9)]))
    kept = []
    layer = next(iter(qmodel.layers.values()))
    hook = layer.register_forward_hook(lambda module, args, value: kept.append(value))
    assert written_in_place(qmodel) is qmodel
    hook.remove()
    assert written_in_place(qmodel) is not qmodel


FAULTS = """
import resource, torch
from quantlab.system.machine import keep_memory
if {keep}:
    keep_memory()
x = torch.zeros(1 << 24)
y = x + 1
for _ in range(10):
    del y
    y = x + 1
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(40):
    del y
    y = x + 1
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, float(y.sum()))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="an option of glibc")
def test_freed_memory_is_reused():
    faults = []
    for keep in (False, True):
        done = subprocess.run([sys.executable, "-c", FAULTS.format(keep=keep)], cwd=CHECKOUT,
                              capture_output=True, text=True, check=True)
        count, total = done.stdout.split()
        assert float(total) == 1 << 24
        faults.append(int(count))
    if faults[0] < 1000:
        pytest.skip("this C library reuses large blocks by itself")
    assert faults[1] < faults[0] / 10


def test_a_simulated_network_is_one_graph_to_the_compiler():
    model, images = Mixed().eval(), torch.randn(4, 3, 9, 9)
    qmodel = ql.quantize(model, ql.collect(model, [images]))
    with torch.inference_mode(), warnings.catch_warnings(action="error", category=UserWarning):
        assert torch._dynamo.explain(qmodel)(images).graph_break_count == 0
