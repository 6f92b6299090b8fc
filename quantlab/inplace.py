"""In-place operations, written as what they compute; those on views are refused. And back.

    write_out_of_place(graph)       # a torch.fx.GraphModule, changed; part of graph.normalize
    fast = written_in_place(graph)  # computes the same with less memory; part of evaluate
"""

import copy
import inspect
import operator

import torch
import torch.nn.functional as F
from torch import fx

from quantlab.graph import CALL_KINDS, call_name, find_kinds, is_view, operation_name
from quantlab.quantized import find_quantizer
from quantlab.system.errors import UserError

VIEWS = CALL_KINDS["rearrange"] - {"channel_shuffle", "pixel_shuffle", "clone"} | {
    "alias", "diagonal", "expand", "expand_as", "float", "identity", "moveaxis", "narrow", "ravel",
    "reshape_as", "select", "swapaxes", "swapdims", "t", "tensor_split", "to", "type",
    "type_as", "unbind", "unflatten", "unfold", "view_as"}  # may show the memory of their input
IN_PLACE_OPERATORS = {
    operator.iadd: operator.add, operator.isub: operator.sub, operator.imul: operator.mul,
    operator.itruediv: operator.truediv}


def write_out_of_place(graph):
    """UserError where something else shows the same memory and is read later.

    After y.op_() later readers of y see the new value: they get the node's result instead.
    """
    order = {n: i for i, n in enumerate(graph.graph.nodes)}
    memory = {}  # node -> (node that allocated its memory, piece of it)
    for node in order:
        memory[node] = _memory(node, graph, memory)
        if not _in_place(node, graph):
            continue
        out = node.kwargs.get("out")
        changed = out or node.args[0]
        others = [
            n for n in memory if n not in (node, changed) and _overlap(memory[n], memory[changed])]
        late = [u for n in others for u in n.users if order[u] > order[node]]
        if late or out or node.target is operator.setitem:
            reader = f", which {late[0].name} reads" if late else ""
            raise UserError(
                f"node {node.name} ({operation_name(node, graph)}) changes {changed} in place and "
                f"with it another name or a view of the same memory{reader}; "
                "write y = f(y) in place of y.f_()")
        for user in [u for u in changed.users if order[u] > order[node]]:
            user.replace_input_with(changed, node)
        _make_out_of_place(node, graph)
        memory[node] = node, None


def _memory(node, graph, memory):
    """What a node's value lies in: its own memory, or for a view that of what it shows."""
    name = operation_name(node, graph).rstrip("_")
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or not (name in VIEWS or is_view(node)):
        return node, None
    if name == "getitem" and call_name(source) in ("chunk", "split", "unbind", "tensor_split"):
        return memory[source][0], (source, node.args[1])
    return memory[source]


def _overlap(a, b):
    """False for other memory, and for two pieces of one chunk or split."""
    apart = a[1] and b[1] and a[1][0] is b[1][0] and a[1][1] != b[1][1]
    return a[0] is b[0] and not apart


def _in_place(node, graph):
    if node.op == "call_module":
        return getattr(graph.get_submodule(node.target), "inplace", False)
    if not node.op.startswith("call_"):
        return False
    return (_inplace_given(node) or node.kwargs.get("out") or node.target is operator.setitem
            or node.target in IN_PLACE_OPERATORS
            or call_name(node).endswith("_") and not call_name(node).startswith("__"))


def _inplace_given(node):
    """True for F.relu(x, inplace=True) and F.relu(x, True)."""
    if node.op != "call_function" or "inplace" not in (names := _parameters(node.target)):
        return node.kwargs.get("inplace", False)
    position = names.index("inplace")
    given = node.args[position] if len(node.args) > position else False
    return node.kwargs.get("inplace", given)


def _parameters(function):
    try:
        return list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # built in
        return []


def _make_out_of_place(node, graph):
    if node.op == "call_module":
        graph.get_submodule(node.target).inplace = False
    elif node.op == "call_method":
        node.target = node.target.rstrip("_")
    elif node.target in IN_PLACE_OPERATORS:
        node.target = IN_PLACE_OPERATORS[node.target]
    elif call_name(node).endswith("_"):
        name = call_name(node).rstrip("_")
        node.target = getattr(F, name, None) or getattr(torch, name)
    if "inplace" in (names := _parameters(node.target)):
        node.args = node.args[: names.index("inplace")]
    node.kwargs = {k: v for k, v in node.kwargs.items() if k != "inplace"}


# ---- And back, where nobody can see it ----------------------------------------------------------


def written_in_place(graph):
    """A graph of the same modules that clamps, adds and rounds in memory that no other operation
    reads: the same values, bit for bit. The graph itself where a hook might look.
    """
    if any(m._forward_hooks or m._forward_pre_hooks for m in graph.modules()):
        return graph
    kinds, copies, fresh = find_kinds(graph), {}, set()  # fresh: results in memory of their own
    new = fx.Graph()
    new.output(new.graph_copy(graph.graph, copies))
    fast = fx.GraphModule(graph, new)
    for node in kinds:
        simple = find_quantizer(graph, node) or kinds[node] in ("clamp", "add")
        own = [n for n in node.all_input_nodes if n in fresh and list(n.users) == [node]]
        if simple and own:
            _write_in_place(copies[node], fast, copies[own[0]])
        if simple or kinds[node] in ("compute", "batchnorm"):
            fresh.add(node)
    fast.recompile()
    return fast.eval()


def _write_in_place(node, graph, own):
    if find_quantizer(graph, node):
        node.kwargs = {"in_place": True}
    elif node.op == "call_module":
        module = copy.copy(graph.get_submodule(node.target))
        module.inplace, node.target = True, f"{node.name}_in_place"
        graph.add_submodule(node.target, module)
    elif call_name(node) in CALL_KINDS["clamp"]:
        node.op, node.target = "call_function", getattr(F, call_name(node))
        node.kwargs = {**node.kwargs, "inplace": True}
    else:
        other = next((n for n in node.args if n is not own), own)
        node.op, node.target, node.args = "call_function", _add_to, (own, other)


def _add_to(x, y):
    return x.add_(y) if (x.shape, x.dtype) == (y.shape, y.dtype) else x + y
