"""Which layer broke, and by how much: the error at every edge of a quantized network, ranked."""

import pandas as pd
import torch

from quantlab.affine import fake_quantize
from quantlab.calibration import Watcher
from quantlab.graph import folded
from quantlab.quantized import edge_name, origin
from quantlab.system.errors import UserError


@torch.no_grad()
def edge_errors(model, qmodel, batches):
    """Signal-to-quantization-noise ratio of every rounded value, in order of execution: a frame, one row a Quantizer.

    sqnr = 10 log10(sum x^2 / sum (x_hat - x)^2) in dB, x from the float network, x_hat from the quantized one on the same images.
    own_sqnr: the same if only this edge were rounded, so that what arrives from earlier layers does not count. added_db: how much noise
    this step adds to what its predecessor on the path had, in dB; the largest is where the network breaks.
    columns: order, edge, role, bits, sqnr, own_sqnr, added_db. batches: float32 [B, C, H, W] each.
    """
    graph = folded(model)
    plan = qmodel.plan
    quantizers = qmodel.quantizer_nodes
    origins = {n: origin(qmodel, n).name for n in quantizers}
    sums = {n: torch.zeros(3, dtype=torch.float64) for n in quantizers}  # signal, noise, own noise
    seen = 0
    for batch in batches:
        batch = batch.to(next(qmodel.parameters()).device)
        exact, rounded = {}, {}
        Watcher(graph.to(batch.device), set(origins.values()), exact.__setitem__).run(batch)
        Watcher(qmodel, {n.name for n in quantizers}, rounded.__setitem__).run(batch)
        for node, quantizer in quantizers.items():
            x = exact[origins[node]]
            noise = (rounded[node.name] - x).double().square().sum()
            own = (fake_quantize(x, quantizer.qparams) - x).double().square().sum()
            sums[node] += torch.stack([x.double().square().sum(), noise, own]).cpu()
        seen += len(batch)
    if not seen:
        raise UserError("no images to measure the error on: give at least one batch")
    rows = [_row(i, node, quantizers[node], plan.stores.get(origins[node], "read"), *sums[node].tolist()) for i, node in enumerate(quantizers)]
    return _with_added_noise(pd.DataFrame(rows), quantizers)


def _row(order, node, quantizer, role, signal, noise, own):
    return {
        "order": order, "edge": edge_name(node), "role": role, "bits": quantizer.qparams.bits,
        "noise_share": noise / max(signal, 1e-300), "sqnr": _db(signal, noise), "own_sqnr": _db(signal, own),
    }


def _db(signal, noise):
    """10 log10(signal / noise); infinite where nothing is lost."""
    return float("inf") if noise == 0 else 10 * torch.log10(torch.tensor(max(signal, 1e-300) / noise, dtype=torch.float64)).item()


def _with_added_noise(frame, quantizers):
    """added_db: noise-to-signal ratio here over the largest among the Quantizers this one follows."""
    position, shares, added = {n: i for i, n in enumerate(quantizers)}, frame.noise_share.tolist(), []
    for node in quantizers:
        before = [shares[position[p]] for p in _predecessors(node, position)]
        ratio = shares[position[node]] / max(before) if before and max(before) > 0 else float("nan")
        added.append(10 * torch.log10(torch.tensor(ratio, dtype=torch.float64)).item() if ratio > 0 else float("nan"))
    return frame.assign(added_db=added).drop(columns="noise_share")


def _predecessors(node, quantizers):
    """The nearest Quantizers upstream."""
    found, stack = set(), list(node.all_input_nodes)
    while stack:
        other = stack.pop()
        if other in quantizers:
            found.add(other)
        else:
            stack += other.all_input_nodes
    return found
