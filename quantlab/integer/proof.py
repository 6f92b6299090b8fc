"""How far the integer network and the fake-quantized graph are apart, code by code.

    per_operation(qmodel, imodel, batches)     every operation fed the same codes: what one operation alone does differently
    end_to_end(qmodel, imodel, batches)        both networks on the same images: what has added up, edge by edge
"""

import pandas as pd
import torch
from torch import fx
from tqdm.auto import tqdm

from quantlab.affine import quantize_tensor
from quantlab.integer.network import IntegerRun
from quantlab.integer.operations import Operation
from quantlab.quantized import Quantizer
from quantlab.system.errors import UserError
from quantlab.system.machine import exact_float

TIE = 2.0**-15  # codes; nearer to a tie than this, a float32 sum of several hundred products cannot tell which side it is on


class _Codes(fx.Interpreter):
    """Runs the fake-quantized graph and keeps the codes behind every Quantizer."""

    def __init__(self, qmodel):
        super().__init__(qmodel)
        self.codes = {}

    def run_node(self, node):
        value = super().run_node(node)
        module = self.module.get_submodule(node.target) if node.op == "call_module" else None
        if isinstance(module, Quantizer):
            self.codes[node.target.removeprefix("quantizers.")] = quantize_tensor(value, module.qparams)
        return value


@torch.no_grad()
def simulated_codes(qmodel, images):
    """{edge: int32 codes} of the fake-quantized graph, and its float32 "logits"."""
    run = _Codes(qmodel)
    with exact_float():
        logits = run.run(images)
    return run.codes | {"logits": logits}


class _Forced(IntegerRun):
    """Runs the integer graph, compares every edge with the given codes, and goes on with those."""

    def __init__(self, imodel, codes, counts):
        super().__init__(imodel.network)
        self.edges = {node: (edge, offset) for edge, (node, offset) in imodel.edges.items()}
        self.codes, self.counts = codes, counts

    def run_node(self, node):
        value = super().run_node(node)
        if node.name not in self.edges:
            return value
        edge, offset = self.edges[node.name]
        expected = self.codes[edge] - offset
        if node.op != "placeholder":
            difference = value.int() - expected
            start = {"layer": node.name, "kind": self._kind(node), "values": 0, "differing": 0, "max_difference": 0, "ties": 0, "from_tie": 0.0}
            count = self.counts.setdefault(edge, start)
            _count(count, difference)
            if difference.any():
                self._explain(count, node, difference != 0)
        return expected.to(value.dtype)

    def _kind(self, node):
        return getattr(self.network.get_submodule(node.target), "kind", "") if node.op == "call_module" else node.target.__name__

    def _explain(self, count, node, where):
        """How far from a tie the exact values are that were rounded differently, in codes."""
        op = self.network.get_submodule(node.target) if node.op == "call_module" else None
        if not isinstance(op, Operation):
            return
        acc = op.accumulate(*self.arguments(node)[0])
        exact = (acc.double() * (op.unit.to(acc.device) / op.out.scale))[where]
        distance = (exact - exact.floor() - 0.5).abs()
        count["ties"] += int((distance < TIE).sum())
        count["from_tie"] = max(count["from_tie"], distance.max().item())


def _count(count, difference):
    count["values"] += difference.numel()
    count["differing"] += int((difference != 0).sum())
    count["max_difference"] = max(count["max_difference"], int(difference.abs().max()))


@torch.no_grad()
def per_operation(qmodel, imodel, batches, verbose=False):
    """Feed every integer operation the codes of the fake-quantized graph and compare what it stores: a frame, one row an edge.

    columns: order, edge, layer, kind, bits, values, differing, max_difference (codes), share (of values that differ), from_tie: the largest
    distance of a differing value from a tie, in codes of the exact result, and ties: how many are nearer than 2^-15 (both 0 where the edge is
    a concat or a rearranging). Few and near a tie is what float32 explains: its sums and its reciprocal of the scale round, and it rounds ties to even.
    """
    counts = {}
    for batch in tqdm(batches, desc="operations", leave=False, disable=not verbose):
        batch = batch.to(next(qmodel.parameters()).device)
        codes = simulated_codes(qmodel, batch)
        _Forced(imodel, codes, counts).run(imodel.input_codes(batch))
    return _frame(qmodel, counts)


@torch.no_grad()
def end_to_end(qmodel, imodel, batches, verbose=False):
    """Run both networks on the same images and compare the codes at every edge: a frame, one row an edge, in order of execution.

    columns: order, edge, bits, values, differing, max_difference (codes), share (of values that differ).
    """
    counts = {}
    for batch in tqdm(batches, desc="end to end", leave=False, disable=not verbose):
        batch = batch.to(next(qmodel.parameters()).device)
        codes, ours = simulated_codes(qmodel, batch), imodel.codes(batch)
        for edge in imodel.edges:
            count = counts.setdefault(edge, {"values": 0, "differing": 0, "max_difference": 0})
            _count(count, ours[edge].to(codes[edge].device) - codes[edge])
    return _frame(qmodel, counts)


def _frame(qmodel, counts):
    if not counts:
        raise UserError("no images to compare on: give at least one batch")
    bits = {edge: getattr(qmodel.quantizers, edge).qparams.bits for edge in counts}
    rows = [{"order": i, "edge": edge, "bits": bits[edge], **count} for i, (edge, count) in enumerate(counts.items())]
    return pd.DataFrame(rows).assign(share=lambda f: f.differing / f["values"])
