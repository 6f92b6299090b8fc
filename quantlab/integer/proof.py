"""How far the integer network and the fake-quantized graph are apart, code by code.

    per_operation(qmodel, imodel, batches)   every operation fed the same codes: what one alone does
    end_to_end(qmodel, imodel, batches)      both on the same images: what has added up, by edge
"""

import pandas as pd
import torch
from tqdm.auto import tqdm

from quantlab.affine import quantize_tensor
from quantlab.calibration import Watcher
from quantlab.integer.network import IntegerRun
from quantlab.integer.operations import Operation
from quantlab.quantized import edge_name
from quantlab.system.errors import UserError
from quantlab.system.machine import exact_float

# codes; nearer to a tie than this, a float32 sum of several hundred products cannot tell which side
# it is on
TIE = 2.0**-15


@torch.no_grad()
def simulated_codes(qmodel, images):
    """{edge: int32 codes} of the fake-quantized graph, and its float32 "logits"."""
    quantizers = {node.name: (edge_name(node), quantizer)
                  for node, quantizer in qmodel.quantizer_nodes.items()}
    codes = {}

    def keep(name, value):
        edge, quantizer = quantizers[name]
        codes[edge] = quantize_tensor(value, quantizer.qparams)

    with exact_float():
        logits = Watcher(qmodel, quantizers, keep).run(images)
    return codes | {"logits": logits}


class _Forced(IntegerRun):
    """Runs the integer graph, compares every edge with the given codes, and goes on with those."""

    def __init__(self, imodel, codes, counts):
        super().__init__(imodel.network)
        self.edge_of = {node: (edge, offset) for edge, (node, offset) in imodel.stored.items()}
        self.codes, self.counts = codes, counts

    def run_node(self, node):
        value = super().run_node(node)
        if node.name not in self.edge_of:
            return value
        edge, offset = self.edge_of[node.name]
        expected = self.codes[edge] - offset
        if node.op != "placeholder":
            difference = value.int() - expected
            count = self.counts.setdefault(edge, {
                "layer": node.name, "kind": self._kind(node), **_zeros(), "ties": 0,
                "from_tie": 0.0})
            _count(count, difference)
            if difference.any():
                self._explain(count, node, difference != 0)
        return expected.to(value.dtype)

    def _module(self, node):
        return self.module.get_submodule(node.target) if node.op == "call_module" else None

    def _kind(self, node):
        module = self._module(node)
        return node.target.__name__ if module is None else module.kind

    def _explain(self, count, node, where):
        """How far from a tie the exact values are that were rounded differently, in codes."""
        op = self._module(node)
        if not isinstance(op, Operation):
            return
        acc = op.accumulate(*self.fetch_args_kwargs_from_env(node)[0])
        exact = (acc.double() * (op.acc_scale.to(acc.device) / op.out.scale))[where]
        distance = (exact - exact.floor() - 0.5).abs()
        count["ties"] += int((distance < TIE).sum())
        count["from_tie"] = max(count["from_tie"], distance.max().item())


def _zeros():
    return {"values": 0, "differing": 0, "max_difference": 0}


def _count(count, difference):
    count["values"] += difference.numel()
    count["differing"] += int((difference != 0).sum())
    count["max_difference"] = max(count["max_difference"], int(difference.abs().max()))


@torch.no_grad()
def per_operation(qmodel, imodel, batches, verbose=False):
    """Feed every integer operation the codes of the fake-quantized graph and compare what it
    stores: a frame, one row an edge.

    columns: order, edge, layer, kind, bits, values, differing, max_difference (codes), share (of
    values that differ), from_tie: the largest distance of a differing value from a tie, in codes of
    the exact result, and ties: how many are nearer than 2^-15 (both 0 where the edge is a concat or
    a rearranging). Few and near a tie is what float32 explains: its sums and its reciprocal of the
    scale round, and it rounds ties to even.
    """
    counts = {}
    for batch in _batches(qmodel, batches, "operations", verbose):
        codes = simulated_codes(qmodel, batch)
        _Forced(imodel, codes, counts).run(imodel.input_codes(batch))
    if not counts:
        raise UserError("the network stores no codes but its input's, so there are none to "
                        "compare; compare imodel(images) with qmodel(images)")
    return _frame(qmodel, counts)


@torch.no_grad()
def end_to_end(qmodel, imodel, batches, verbose=False):
    """Run both networks on the same images and compare the codes at every edge: a frame, one row an
    edge, in order of execution.

    columns: order, edge, bits, values, differing, max_difference (codes), share (of values that
    differ).
    """
    counts = {}
    for batch in _batches(qmodel, batches, "end to end", verbose):
        simulated, ours = simulated_codes(qmodel, batch), imodel.codes(batch)
        for edge in imodel.stored:
            difference = ours[edge].to(batch.device) - simulated[edge]
            _count(counts.setdefault(edge, _zeros()), difference)
    return _frame(qmodel, counts)


def _batches(qmodel, batches, desc, verbose):
    where = next(qmodel.parameters()).device
    batch = None
    for batch in tqdm(batches, desc=desc, leave=False, disable=not verbose):
        yield batch.to(where)
    if batch is None:
        raise UserError("no images to compare on: give at least one batch")


def _frame(qmodel, counts):
    bits = {edge_name(node): q.qparams.bits for node, q in qmodel.quantizer_nodes.items()}
    rows = [{"order": i, "edge": edge, "bits": bits[edge], **count}
            for i, (edge, count) in enumerate(counts.items())]
    return pd.DataFrame(rows).assign(share=lambda f: f.differing / f["values"])
