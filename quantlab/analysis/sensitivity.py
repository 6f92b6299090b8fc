"""Which layer broke, and by how much: the error at every edge of a quantized network, ranked."""

import math
from functools import partial

import pandas as pd
import torch

from quantlab.affine import fake_quantize
from quantlab.calibration import watch
from quantlab.graph import folded
from quantlab.quantized import edge_name, origin
from quantlab.system.comparing import decibels
from quantlab.system.contract import as_batches, check_function
from quantlab.system.errors import UserError


@torch.no_grad()
def edge_errors(model, qmodel, batches):
    """Signal-to-quantization-noise ratio of every rounded value, in order of execution: a frame,
    one row a Quantizer.

    sqnr = 10 log10(sum x^2 / sum (x_hat - x)^2) in dB, x from the float network, x_hat from the
    quantized one on the same images. own_sqnr: the same if only this edge were rounded, so that
    what arrives from earlier layers does not count. added_db: how much noise this step adds to what
    its predecessor on the path had, in dB; the largest is where the network breaks.
    columns: order, edge, role, bits, sqnr, own_sqnr, added_db. batches: as system/contract.py
    says.
    """
    graph = folded(model)
    quantizers = qmodel.quantizer_nodes
    origins = {node: origin(qmodel, node).name for node in quantizers}
    sums = {node: torch.zeros(3, dtype=torch.float64) for node in quantizers}
    seen = 0
    for batch in as_batches(batches, partial(check_function, model, graph)):
        exact, rounded = {}, {}
        seen += watch(graph, set(origins.values()), exact.__setitem__, [batch])
        watch(qmodel, {node.name for node in quantizers}, rounded.__setitem__, [batch])
        for node, quantizer in quantizers.items():
            x = exact[origins[node]]
            noise, own = rounded[node.name] - x, fake_quantize(x, quantizer.qparams) - x
            sums[node] += torch.stack([v.double().square().sum() for v in (x, noise, own)]).cpu()
    if not seen:
        raise UserError("no images to measure the error on: give at least one batch")
    ratios, rows = {}, []
    for node, quantizer in quantizers.items():
        signal, noise, own = sums[node].tolist()
        ratios[node] = noise / max(signal, 1e-300)
        rows.append({
            "edge": edge_name(node), "role": qmodel.plan.stores.get(edge_name(node), "read"),
            "bits": quantizer.qparams.bits, "sqnr": decibels(signal, noise),
            "own_sqnr": decibels(signal, own)})
    frame = pd.DataFrame(rows).assign(added_db=_added_noise(qmodel.graph, ratios))
    return frame.rename_axis("order").reset_index()


def _added_noise(graph, ratios):
    """Noise-to-signal ratio (`ratios`: node -> ratio) of every Quantizer over the largest among the
    nearest ones upstream, in dB; NaN where there are none or nothing is lost.
    """
    nearest, added = {}, []  # node -> the Quantizers whose codes its value comes from
    for node in graph.nodes:
        nearest[node] = set().union(*(nearest[n] for n in node.all_input_nodes))
        if node in ratios:
            before = max((ratios[n] for n in nearest[node]), default=0)
            lossy = before > 0 and ratios[node] > 0
            added.append(decibels(ratios[node], before) if lossy else math.nan)
            nearest[node] = {node}
    return added
