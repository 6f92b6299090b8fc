"""One pass over the calibration data: what is collected serves every range setter and every width.

    stats = collect(model, data.calibration(1024, seed=0))
"""

import dataclasses
import hashlib

import torch
from torch import fx
from tqdm.auto import tqdm

from quantlab.edgestats import EdgeStats
from quantlab.graph import folded
from quantlab.plan import make_plan
from quantlab.system.errors import UserError
from quantlab.system.machine import device, exact_float


@dataclasses.dataclass
class CalibrationStats:
    """What one pass saw of one graph: node name -> EdgeStats; `+` joins two passes."""

    edges: dict
    graph_hash: str
    n_images: int

    def __add__(self, other):
        if self.graph_hash != other.graph_hash:
            raise UserError("statistics of different networks cannot be added")
        edges = {
            name: EdgeStats().merge(edge).merge(other.edges[name])
            for name, edge in self.edges.items()
        }
        return CalibrationStats(edges, self.graph_hash, self.n_images + other.n_images)


def graph_hash(graph):
    """sha256 of a graph's operations and of every tensor in it."""
    digest = hashlib.sha256(f"{graph.graph}".encode())
    for name, tensor in sorted(graph.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy())
    return digest.hexdigest()


def check_statistics(stats, graph):
    """UserError unless the statistics were collected on this folded float graph."""
    if stats.graph_hash != graph_hash(graph):
        raise UserError(
            "these statistics were collected on another network; "
            "run collect(model, batches) on this one"
        )


def collect(model, batches, verbose=False):
    """Run the folded float network over `batches` (float32 [B, C, H, W] each), count every value.

    Eval mode, no gradients, one pass, constant memory; the result does not depend on the order of
    the images. UserError for an empty calibration set and for values that are not finite, naming
    the edge.
    """
    graph = folded(model)
    digest = graph_hash(graph)
    edges, n_images = collect_edges(graph, make_plan(graph).observed, batches, verbose)
    return CalibrationStats(edges, digest, n_images)


def collect_edges(graph, names, batches, verbose=False):
    """(name -> EdgeStats of the values of these nodes, number of images) of one pass."""
    edges = {name: EdgeStats() for name in names}

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
        raise UserError(
            f"edge {unseen[0]} never saw a floating-point value; it cannot be quantized"
        )
    return edges, n_images


@torch.no_grad()
def watch(graph, names, callback, batches, verbose=False, desc="observe"):
    """Run a graph over `batches` (float32 [B, C, H, W] each) and return the number of images.

    callback(name, value) is called for the nodes in `names` as soon as their value exists.
    """
    watcher = Watcher(graph.to(device()), names, callback)
    n_images = 0
    with exact_float():
        for batch in tqdm(batches, desc=desc, unit=" batches", leave=False, disable=not verbose):
            watcher.run(batch.to(device()))
            n_images += len(batch)
    return n_images


class Watcher(fx.Interpreter):
    """Runs a graph and hands over (name, value) of the named nodes; all graph watching is done
    here.
    """

    def __init__(self, graph, names, callback):
        super().__init__(graph)
        self.names, self.callback = names, callback

    def run_node(self, node):
        value = super().run_node(node)
        if node.name in self.names:
            self.callback(node.name, value)
        return value
