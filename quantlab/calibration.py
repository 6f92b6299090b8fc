"""One pass over the calibration data: what is collected serves every range setter and every width.

    stats = collect(model, data.calibration(1024, seed=0))
"""

import dataclasses
import operator

import torch
from torch import fx
from tqdm.auto import tqdm

from quantlab.edgestats import EdgeStats
from quantlab.graph import folded
from quantlab.plan import make_plan
from quantlab.system.errors import UserError, checked
from quantlab.system.machine import device, exact_float


@dataclasses.dataclass
class CalibrationStats:
    """What one pass saw of one graph: node name -> EdgeStats; `+` joins two passes.

    images: the first few, float32 [B, C, H, W].
    """

    edges: dict
    graph_hash: str
    n_images: int
    images: torch.Tensor

    @property
    def image_shape(self):
        return tuple(self.images.shape[1:])

    def __add__(self, other):
        if self.graph_hash != other.graph_hash:
            raise UserError("statistics of different networks cannot be added")
        edges = {
            name: EdgeStats().merge(edge).merge(other.edges[name])
            for name, edge in self.edges.items()
        }
        return dataclasses.replace(self, edges=edges, n_images=self.n_images + other.n_images)


@checked
def collect(model, batches, verbose=False):
    """Run the folded float network over `batches` (float [B, C, H, W] each), count every value.

    Eval mode, no gradients, one pass, constant memory; the result does not depend on the order of
    the images. UserError for what is not in the contract (system/contract.py), for a folded network
    that does not compute what `model` does, for an empty calibration set, and for values that are
    not finite, naming the edge.
    """
    from quantlab.inplace import written_in_place  # here, as they are only needed with a network
    from quantlab.system.contract import GATE_IMAGES, check_function, graph_hash

    graph, seen = folded(model), []
    digest = graph_hash(graph)

    def check(images):
        seen.append(images[:GATE_IMAGES].cpu().clone())
        check_function(model, graph, images)

    names = make_plan(graph).observed
    # a value is counted as soon as it exists: what is next may overwrite it
    edges, n_images = collect_edges(written_in_place(graph), names, batches, verbose, check)
    return CalibrationStats(edges, digest, n_images, seen[0])


def collect_edges(graph, names, batches, verbose=False, first=None):
    """(name -> EdgeStats of the values of these nodes, number of images) of one pass; nodes without
    a floating-point value are left out.

    first(images), if given, is called once, with the first batch.
    """
    edges = {name: EdgeStats() for name in names}

    def count(name, value):
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            try:
                edges[name].update(value)
            except UserError as error:
                raise UserError(f"edge {name}: {error}") from None

    n_images = watch(graph, edges, count, batches, verbose, "collect", first)
    if not n_images:
        raise UserError("the calibration set is empty: give at least one batch of images")
    # masks, indices and pairs of values are computed as they are
    edges = {name: edge for name, edge in edges.items() if edge.count}
    return edges, n_images


@torch.no_grad()
def watch(graph, names, callback, batches, verbose=False, desc="observe", first=None):
    """Run a graph over `batches` (as system/contract.py says) and return the number of images.

    callback(name, value) is called for the nodes in `names` as soon as their value exists,
    first(images) once, before anything runs.
    """
    from quantlab.system.contract import as_batches

    watcher = Watcher(graph.to(device()), names, callback)
    n_images, total = 0, operator.length_hint(batches, 0) or None
    bar = dict(desc=desc, unit=" batches", total=total, leave=False, disable=not verbose)
    with exact_float():
        for batch in tqdm(as_batches(batches, first), **bar):
            watcher.run(batch.to(device()))
            n_images += len(batch)
    return n_images


class Watcher(fx.Interpreter):
    """Runs a graph and hands over (name, value) of the named nodes; all watching is done here."""

    def __init__(self, graph, names, callback):
        super().__init__(graph)
        self.names, self.callback = names, callback
        self.extra_traceback = False  # an error message stays one line

    def run_node(self, node):
        value = super().run_node(node)
        if node.name in self.names:
            self.callback(node.name, value)
        return value
