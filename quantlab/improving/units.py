"""The units that reconstruction takes one after the other, found from the quantized graph alone.

    for unit in find_units(qmodel, "block"):
        part = extract(qmodel, unit.nodes, unit.inputs, unit.outputs)       # a GraphModule of this unit, sharing qmodel's layers
"""

import dataclasses

from torch import fx

from quantlab.graph import find_kinds, readers_of
from quantlab.quantized import find_quantizer, origin


@dataclasses.dataclass(frozen=True)
class Unit:
    """Nodes of the quantized graph, by name: `layers` (convolution, linear) among `nodes`, which read `inputs` from outside.

    output: the node whose value is compared with `target`, the float graph's node behind it. outputs: all values that later units read.
    """

    name: str
    layers: tuple
    nodes: tuple
    inputs: tuple
    output: str
    outputs: tuple
    target: str


def find_units(qmodel, unit="block"):
    """Units in order of execution. "block": a residual block, from where the stream splits to the add (and its clamp) that joins it again,
    and every other layer by itself; "layer": every layer by itself, with the clamp and the Quantizer behind it.

    The split is the add's immediate dominator: the nearest node that all paths to the add pass. A block that holds another block, or one
    whose inner values are read from outside, is taken layer by layer. What lies between two units belongs to the later one.
    """
    kinds = find_kinds(qmodel)
    ends = {_end_of_group(n, kinds, qmodel): {n} for n in kinds if kinds[n] == "compute"}
    if unit == "block":
        dominators, inside = _dominators(kinds), set()
        for add in [n for n in kinds if kinds[n] == "add"]:
            end = _end_of_group(add, kinds, qmodel)
            block = _ancestors(end, kinds) - _ancestors(dominators[add], kinds)
            layers = {n for n in block if kinds[n] == "compute"}
            closed = all(user in block for n in block - {end} for user in readers_of(n, kinds))
            if layers and closed and not block & inside:
                inside |= block
                ends = {e: own for e, own in ends.items() if not own <= layers} | {end: layers}
    order = {n: i for i, n in enumerate(kinds)}
    done, units = set(), []
    for end in sorted(ends, key=order.get):
        nodes = sorted(_ancestors(end, kinds) - done, key=order.get)
        done |= {n for n in nodes if kinds[n] not in ("shape", "constant")}  # those cost nothing and are computed wherever they are read
        units.append((end, [n for n in nodes if kinds[n] != "input"]))
    return [_unit(end, nodes, units[i + 1 :], kinds, qmodel) for i, (end, nodes) in enumerate(units)]


def _unit(end, nodes, later, kinds, qmodel):
    own = set(nodes)
    inputs = dict.fromkeys(a.name for n in nodes for a in n.all_input_nodes if a not in own)
    read_later = {a for _, others in later for n in others for a in n.all_input_nodes}
    outputs = [n.name for n in nodes if n == end or n in read_later and kinds[n] not in ("shape", "constant")]
    layers = tuple(n.name for n in nodes if kinds[n] == "compute")
    return Unit(layers[0] if len(layers) == 1 else origin(qmodel, end).name, layers, tuple(n.name for n in nodes), tuple(inputs), end.name,
                tuple(outputs), origin(qmodel, end).name)


def _end_of_group(node, kinds, qmodel):
    """The last of node, its clamp and their Quantizer, as far as each is the only reader of the one before."""
    while len(found := readers_of(node, kinds)) == 1 and find_quantizer(qmodel, node) is None:
        if kinds[found[0]] != "clamp" and find_quantizer(qmodel, found[0]) is None:
            break
        node = found[0]
    return node


def _inputs(node, kinds):
    return [a for a in node.all_input_nodes if kinds[a] not in ("shape", "constant")]


def _ancestors(node, kinds):
    """The node itself and all that it is computed from."""
    found, stack = set(), [node]
    while stack:
        other = stack.pop()
        if other not in found:
            found.add(other)
            stack += other.all_input_nodes
    return found


def _dominators(kinds):
    """node -> the nearest other node that every path from the network's input to it passes (itself for the input)."""
    order, dominator = {n: i for i, n in enumerate(kinds)}, {}
    for node in kinds:
        common, *others = _inputs(node, kinds) or [node]
        for other in others:
            while common != other:
                common, other = sorted((common, other), key=order.get)
                other = dominator[other] if dominator[other] != other else common
        dominator[node] = common
    return dominator


def extract(graph, nodes, inputs, outputs):
    """The part of a graph made of the named nodes: a GraphModule from the values of `inputs` to the list of those of `outputs`.

    Its layers are the graph's own, not copies.
    """
    part, made, named = fx.Graph(), {}, {n.name: n for n in graph.graph.nodes}
    for name in inputs:
        made[named[name]] = part.placeholder(name)
    for name in nodes:
        made[named[name]] = part.node_copy(named[name], made.__getitem__)
    part.output([made[named[name]] for name in outputs])
    return fx.GraphModule(graph, part).eval()
