"""The units that reconstruction takes one after the other, found from the quantized graph alone.

    for unit in find_units(qmodel, "block"):
        part = extract(qmodel, unit.nodes, unit.inputs, unit.outputs)   # shares qmodel's layers
"""

import dataclasses

import networkx as nx
from torch import fx

from quantlab.graph import FREE, call_name, find_kinds, readers_of
from quantlab.quantized import find_quantizer, origin

SEVERAL = ("chunk", "split", "tensor_split", "unbind")  # give views of one value, in a tuple


@dataclasses.dataclass(frozen=True)
class Unit:
    """Nodes of the quantized graph, by name: `layers` (convolution, linear) among `nodes`, which
    read `inputs` from outside.

    output: the node whose value is compared with `target`, the float graph's node behind it.
    outputs: all values that later units read.
    """

    name: str
    layers: tuple
    nodes: tuple
    inputs: tuple
    output: str
    outputs: tuple
    target: str


def find_units(qmodel, unit="block"):
    """Units in order of execution: "layer", every layer by itself, with the clamp and the Quantizer
    behind it; "block", residual blocks, and every other layer by itself.

    A block reaches from where the stream splits to the add (and its clamp) that joins it again. One
    that holds another block, or whose inner values are read from outside, is taken layer by layer.
    What lies between two units belongs to the later one.
    """
    kinds = find_kinds(qmodel)
    flow = nx.DiGraph((a, n) for n in kinds for a in n.all_input_nodes)
    ends = {_end_of_group(n, kinds, qmodel): {n} for n in kinds if kinds[n] == "compute"}
    if unit == "block":
        for end, layers in _blocks(kinds, flow, qmodel):
            ends = {e: own for e, own in ends.items() if not own <= layers} | {end: layers}
    order = {n: i for i, n in enumerate(kinds)}
    done, units = set(), []
    for end in sorted(ends, key=order.get):
        left = nx.restricted_view(flow, done, ())  # nothing that only earlier units need
        nodes = sorted(nx.ancestors(left, end) | {end}, key=order.get)
        done |= {n for n in nodes if not _is_free(n, kinds)}
        units.append((end, [n for n in nodes if kinds[n] != "input"]))
    return [_unit(*unit, units[i + 1 :], kinds, qmodel) for i, unit in enumerate(units)]


def _is_free(node, kinds):
    """True for what is computed wherever it is read: it costs nothing, and a tuple of views could
    not be kept. Of its items, a slice is a tuple again.
    """
    item = call_name(node) == "getitem" and _is_free(node.args[0], kinds)
    return item or kinds[node] in FREE or call_name(node) in SEVERAL


def _blocks(kinds, flow, qmodel):
    """(last node, layers) of every residual block.

    The stream splits at the add's immediate dominator: the nearest node that all paths from the
    network's input to the add pass.
    """
    paths, inside = nx.DiGraph(flow.subgraph(n for n in flow if kinds[n] not in FREE)), set()
    start = next(n for n in kinds if kinds[n] == "input")
    sources = [n for n, degree in paths.in_degree if degree == 0 and n != start]
    paths.add_edges_from((start, n) for n in sources)  # so that every node is behind the start
    dominators = nx.immediate_dominators(paths, start)
    for add in [n for n in kinds if kinds[n] == "add"]:
        end, split = _end_of_group(add, kinds, qmodel), dominators[add]
        block = (nx.ancestors(flow, end) | {end}) - nx.ancestors(flow, split) - {split}
        layers = {n for n in block if kinds[n] == "compute"}
        closed = all(user in block for n in block - {end} for user in readers_of(n, kinds))
        if layers and closed and not block & inside:
            inside |= block
            yield end, layers


def _unit(end, nodes, later, kinds, qmodel):
    inputs = dict.fromkeys(a.name for n in nodes for a in n.all_input_nodes if a not in nodes)
    read_later = {a for _, others in later for n in others for a in n.all_input_nodes}
    outputs = [n for n in nodes if n == end or (n in read_later and not _is_free(n, kinds))]
    layers = tuple(n.name for n in nodes if kinds[n] == "compute")
    target = origin(qmodel, end).name
    return Unit(
        layers[0] if len(layers) == 1 else target, layers, tuple(n.name for n in nodes),
        tuple(inputs), end.name, tuple(n.name for n in outputs), target)


def _end_of_group(node, kinds, qmodel):
    """The last of node, its clamp and their Quantizer, as far as each is the only reader of the one
    before.
    """
    while len(found := readers_of(node, kinds)) == 1 and find_quantizer(qmodel, node) is None:
        if kinds[found[0]] != "clamp" and find_quantizer(qmodel, found[0]) is None:
            break
        node = found[0]
    return node


def extract(graph, nodes, inputs, outputs):
    """The part of a graph made of the named nodes: a GraphModule from the values of `inputs` to the
    list of those of `outputs`; its layers are the graph's own, not copies.

    torch.fx.experimental.optimization.extract_subgraph does the same, with a warning on import.
    """
    part, made, named = fx.Graph(), {}, {n.name: n for n in graph.graph.nodes}
    for name in inputs:
        made[named[name]] = part.placeholder(name)
    for name in nodes:
        made[named[name]] = part.node_copy(named[name], made.__getitem__)
    part.output([made[named[name]] for name in outputs])
    return fx.GraphModule(graph, part).eval()
