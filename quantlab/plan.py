"""Where a quantized network stores codes, decided from the graph alone; no bit-width is known here.

    plan = make_plan(graph)     # which nodes' values are stored as codes, what every layer reads
"""

import dataclasses

from quantlab.graph import PASSES_CODES, find_kinds, readers_of
from quantlab.system.errors import UserError


@dataclasses.dataclass(frozen=True)
class Plan:
    """Where a quantized network rounds, by node name.

    stores: node -> "input", "residual" (operand or result of an add) or "activation"; stored as
    codes. reads: convolution or linear node -> the node whose value it reads, behind rearranging
    only. sources: value of `reads` -> the node of `stores` that holds its codes, where there is
    one. first, last: the layers that no other layer precedes or follows. floats: node without an
    integer form -> the reason.
    """

    stores: dict
    reads: dict
    sources: dict
    first: frozenset
    last: frozenset
    floats: dict

    @property
    def observed(self):
        """Names of the nodes whose values need statistics."""
        return list(dict.fromkeys([*self.stores, *self.reads.values()]))

    @property
    def unread(self):
        """Names of the stored activations that no layer reads: an average pool does, for instance.
        """
        read = {self.sources.get(value) for value in self.reads.values()}
        activations = [name for name, role in self.stores.items() if role == "activation"]
        return [name for name in activations if name not in read]

    def of_floats(self, edges):
        """The plan without stored values that have no statistics: they are no floats, but masks,
        indices or several values. UserError where a layer reads one.
        """
        strange = [name for name in self.reads.values() if name not in edges]
        if strange:
            raise UserError(f"edge {strange[0]} never saw a floating-point value; "
                            "a layer that reads it cannot be quantized: give it a float tensor")
        stores = {name: role for name, role in self.stores.items() if name in edges}
        sources = {value: name for value, name in self.sources.items() if name in stores}
        return dataclasses.replace(self, stores=stores, sources=sources)


def make_plan(graph):
    """Decide from the graph alone where codes are stored.

    A value is rounded once, where an integer machine writes it to memory: behind conv-relu,
    add-relu, average, concat and every operation that has no integer form. Rearranging and
    max-pooling pass codes on; a layer that reads an add's codes may requantize them. UserError
    where there is no layer.
    """
    from quantlab.ranks import find_ranks  # here, as they are only needed with a network
    from quantlab.system.forms import why_float

    kinds = find_kinds(graph)
    compute = [n for n in kinds if kinds[n] == "compute"]
    if not compute:
        raise UserError("the network has no convolution and no linear layer that is a module: "
                        "there is nothing to quantize")
    first = _without_another(kinds, lambda node: node.all_input_nodes)
    last = _without_another(dict(reversed(kinds.items())), lambda node: node.users)
    reads = {n.name: _behind_rearranging(n.args[0], kinds) for n in compute}
    adds = [n for n in kinds if kinds[n] == "add"]
    operands = {holder_of(a, kinds) for n in adds for a in n.all_input_nodes}
    stores = {}
    for node in kinds:
        if kinds[node] == "input":
            stores[node.name] = "input"
        elif _is_stored(node, kinds):
            residual = node in operands or kinds[_producer(node, kinds)] == "add"
            stores[node.name] = "residual" if residual else "activation"
    holders = {value.name: holder_of(value, kinds).name for value in reads.values()}
    sources = {value: holder for value, holder in holders.items() if holder in stores}
    ranks = find_ranks(graph.graph)
    floats = {n.name: why for n in kinds if (why := why_float(n, kinds, graph, ranks[n]))}
    return Plan(stores, {k: v.name for k, v in reads.items()}, sources, first, last, floats)


def _is_stored(node, kinds):
    """True where a new value is written to memory as codes."""
    if kinds[node] in ("input", "output", "constant", "shape", "tail", *PASSES_CODES):
        return False
    if kinds[node] == "clamp" and not _ends_group(node, kinds):
        return False
    users = _readers(node, kinds)
    if all(kinds[u] in ("output", "tail") for u in users):
        return False  # logits
    follower = _only_user(node, kinds)
    if follower is not None and _is_unfolded(follower, kinds):
        return False
    # a clamp commutes with max-pooling and rearranging
    while follower is not None and kinds[follower] in PASSES_CODES:
        follower = _only_user(follower, kinds)
    return follower is None or kinds[follower] not in ("clamp", "concat")  # rounded there, once


def _is_unfolded(node, kinds):
    """True for a BatchNorm that could be part of the layer before it: nothing is stored between."""
    if kinds[node] != "batchnorm":
        return False
    before = node.args[0]
    return kinds[before] == "compute" and readers_of(before, kinds) == [node]


def _ends_group(clamp, kinds):
    """True for a clamp that alone reads what it clamps: the value is first stored behind it."""
    before = clamp.args[0]
    while kinds[before] in PASSES_CODES and _only_user(before, kinds) is not None:
        before = before.args[0]
    return _only_user(before, kinds) is not None and kinds[before] not in ("input", *PASSES_CODES)


def _producer(node, kinds):
    """The operation behind a stored value: what its clamp clamps, or the node itself."""
    while kinds[node] in ("clamp", *PASSES_CODES):
        node = node.args[0]
    return node


def _only_user(node, kinds):
    found = readers_of(node, kinds)
    return found[0] if len(found) == 1 else None


def holder_of(node, kinds):
    """The node that holds the codes which `node` passes on."""
    while kinds[node] in PASSES_CODES or (kinds[node] == "clamp" and not _ends_group(node, kinds)):
        node = node.args[0]
    return node


def _behind_rearranging(node, kinds):
    while kinds[node] == "rearrange":
        node = node.args[0]
    return node


def _readers(node, kinds):
    """The nodes that use a value, looking through those that only rearrange it."""
    found = []
    for user in node.users:
        if kinds[user] in PASSES_CODES:
            found += _readers(user, kinds)
        elif kinds[user] != "shape":
            found.append(user)
    return found


def _without_another(kinds, neighbours):
    """Names of the layers that no other precedes (or follows, in reversed order)."""
    behind = {}  # node -> whether a layer lies in that direction
    for node in kinds:
        behind[node] = any(kinds[n] == "compute" or behind[n] for n in neighbours(node))
    return frozenset(n.name for n in kinds if kinds[n] == "compute" and not behind[n])
