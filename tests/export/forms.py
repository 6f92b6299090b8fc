"""Small networks, quantized in every form that a config or a plan of one's own allows."""

import copy
import dataclasses

import torch
from torch import nn

import quantlab as ql
from quantlab.graph import folded
from quantlab.plan import make_plan
from quantlab.ptq import quantize_graph

MINMAX = {"observer": "minmax", "weight_observer": "minmax"}
FORMS = {
    "8/8": ql.QuantConfig(8, 8, **MINMAX),
    "4/4": ql.QuantConfig(4, 4),
    "2/3, stream 6": ql.QuantConfig(2, 3, residual_bits=6, first_last_bits=8, **MINMAX),
    "3/5, float stream": ql.QuantConfig(3, 5, residual_bits=None, **MINMAX),
    "6/7, signed": ql.QuantConfig(6, 7, act_symmetric=True, **MINMAX),
    "5/2, one affine weight scale": ql.QuantConfig(
        5, 2, weight_symmetric=False, per_channel=False, **MINMAX),
    "8/8, zero-points": ql.QuantConfig(8, 8, weight_symmetric=False, **MINMAX),
    "7/6, one affine weight scale": ql.QuantConfig(
        7, 6, weight_symmetric=False, per_channel=False, **MINMAX),
    "2/4, all levels": ql.QuantConfig(2, 4, weight_symmetric=False),
    "8/4, before every layer": ql.QuantConfig(8, 4, **MINMAX),
}


def quantized(model, stats, form):
    """The network in one of FORMS: `signed` at every edge; or a Quantizer in front of every layer
    and no other."""
    graph = folded(model)
    plan, edges = make_plan(graph), copy.deepcopy(stats.edges)
    if form.endswith("signed"):
        for edge in edges.values():
            edge.minimum = min(edge.minimum, -edge.maximum)
    if form.endswith("before every layer"):
        plan = dataclasses.replace(plan, stores={}, sources={})
    return quantize_graph(graph, plan, edges, FORMS[form])


def make_quantized(model, x, config=ql.QuantConfig(4, 4, **MINMAX)):
    return ql.quantize(model, ql.collect(model, [x]), config)


def tiny(width=4):
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(3, width, 3), nn.ReLU(), nn.Flatten(), nn.Linear(width * 36, 5))
    return model.eval()


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        x = self.a(x).relu()
        return self.fc((self.b(x) + x).relu().mean((2, 3)))


def residual():
    torch.manual_seed(1)
    return Residual().eval()
