"""One pass over the calibration data: what is collected serves every range setter and every width.

    stats = collect(model, data.calibration(1024, seed=0))
"""

import dataclasses
import hashlib

import torch
from torch import fx
from tqdm.auto import tqdm

from quantlab.edgestats import EdgeStats
from quantlab.graph import fold, trace
from quantlab.plan import make_plan
from quantlab.system.errors import UserError
from quantlab.system.machine import device, exact_float


@dataclasses.dataclass
class CalibrationStats:
    """What one pass over the calibration data saw: node name -> EdgeStats, for one graph and placement; `+` joins two passes."""

    edges: dict
    placement: str
    graph_hash: str
    n_images: int

    def __add__(self, other):
        if (self.graph_hash, self.placement) != (other.graph_hash, other.placement):
            raise UserError("statistics of different networks or placements cannot be added")
        edges = {name: EdgeStats().merge(edge).merge(other.edges[name]) for name, edge in self.edges.items()}
        return CalibrationStats(edges, self.placement, self.graph_hash, self.n_images + other.n_images)


def prepare(model, placement="fused", fold_batchnorm=None):
    """(folded float graph, plan, hash): what `collect` and `quantize` both start from; fold_batchnorm None: for placement "fused" only."""
    graph = fold(trace(model), batchnorm=placement == "fused" if fold_batchnorm is None else fold_batchnorm)
    digest = hashlib.sha256(f"{graph.graph}".encode())
    for name, tensor in sorted(graph.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy())
    return graph, make_plan(graph, placement), digest.hexdigest()


@torch.no_grad()
def collect(model, batches, placement="fused", verbose=False, fold_batchnorm=None):
    """Run the folded float network over `batches` (float32 [B, C, H, W] each) and count every value on every edge.

    Eval mode, no gradients, one pass, constant memory; the result does not depend on the order of the images.
    Raises UserError for an empty calibration set and for values that are not finite, naming the edge.
    """
    graph, plan, digest = prepare(model, placement, fold_batchnorm)
    edges = {name: EdgeStats() for name in plan.observed}

    def count(name, value):
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            try:
                edges[name].update(value)
            except UserError as error:
                raise UserError(f"edge {name}: {error}") from None

    n_images = watch(graph, edges, count, batches, verbose, "collect")
    if not n_images:
        raise UserError("the calibration set is empty: give at least one batch of images")
    unseen = [name for name, edge in edges.items() if not edge.count]
    if unseen:
        raise UserError(f"edge {unseen[0]} never saw a floating-point value; it cannot be quantized")
    return CalibrationStats(edges, placement, digest, n_images)


@torch.no_grad()
def watch(graph, names, see, batches, verbose=False, desc="observe"):
    """Run the graph over `batches` (float32 [B, C, H, W] each) and call see(name, value) for the nodes in `names` as soon as their value exists.

    Returns the number of images.
    """
    watcher, n_images = _Watcher(graph.to(device()), names, see), 0
    with exact_float():
        for batch in tqdm(batches, desc=desc, unit=" batches", leave=False, disable=not verbose):
            watcher.run(batch.to(device()))
            n_images += len(batch)
    return n_images


class _Watcher(fx.Interpreter):
    def __init__(self, graph, names, see):
        super().__init__(graph)
        self.names, self.see = names, see

    def run_node(self, node):
        value = super().run_node(node)
        if node.name in self.names:
            self.see(node.name, value)
        return value
