"""What the network is, as a graph: BatchNorm folded, every node's kind, and the plan of where codes are stored.

    graph = fold(trace(model))      # a torch.fx.GraphModule in eval mode; the model itself is left alone
    plan  = make_plan(graph)        # which nodes' values are stored as codes, and what every convolution reads

Kinds are found from modules, functions and methods alike, never from names. Nothing here knows a bit-width.
"""

import copy
import dataclasses
import operator
import traceback

import torch
import torch.nn.functional as F
from torch import fx, nn

from quantlab.runtime import UserError

MODULE_KINDS = {
    "compute": (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear),
    "batchnorm": (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
    "clamp": (nn.ReLU, nn.ReLU6, nn.Hardtanh),
    "maxpool": (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d),
    "average": (nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d),
    "rearrange": (nn.Identity, nn.Flatten, nn.Unflatten, nn.ChannelShuffle, nn.PixelShuffle),
    "dropout": (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout),
}
CALL_KINDS = {  # functions and tensor methods by name
    "add": {"add", "add_", "iadd", "__add__", "__iadd__"},
    "clamp": {"relu", "relu_", "relu6", "hardtanh", "hardtanh_"},
    "maxpool": {"max_pool1d", "max_pool2d", "max_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d"},
    "average": {"avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "mean"},
    "concat": {"cat", "concat", "concatenate"},
    "rearrange": {"flatten", "view", "reshape", "permute", "transpose", "contiguous", "squeeze", "unsqueeze", "chunk", "split", "getitem",
                  "channel_shuffle", "pixel_shuffle", "movedim", "detach", "clone"},
    "dropout": {"dropout", "dropout1d", "dropout2d", "alpha_dropout", "stochastic_depth"},
    "shape": {"size", "dim", "getattr"},
}  # fmt: skip
PASSES_CODES = ("rearrange", "maxpool")  # the output holds codes of its input, at most fewer or in another order


# ---- Tracing and folding ----------------------------------------------------------------------------------------------------


def trace(model):
    """A symbolic trace of a copy of `model` in eval mode; UserError with the line to change when torch.fx cannot follow it."""
    model = copy.deepcopy(model).eval()
    if isinstance(model, fx.GraphModule):
        return model
    try:
        return fx.symbolic_trace(model)
    except Exception as error:  # whatever the model's own forward raises on a symbolic value
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "torch" not in f.filename and "quantlab" not in f.filename]
        where = f" at {frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}" if frames else ""
        raise UserError(
            f"{type(model).__name__} cannot be traced by torch.fx{where} ({str(error).splitlines()[0]}); "
            "replace control flow that depends on tensor values, or wrap it in a function marked torch.fx.wrap"
        ) from None


def fold(graph, batchnorm=True):
    """Make the float graph that quantization starts from: no dropout, nothing shared or in place, BatchNorm folded where it can be.

    A BatchNorm directly behind a convolution or linear layer that nobody else reads becomes part of it:
        w' = w * gamma / sqrt(var + eps),  b' = (b - mean) * gamma / sqrt(var + eps) + beta      (computed in float64)
    """
    normalize(graph)
    kinds = find_kinds(graph)
    for node in [n for n in kinds if kinds[n] == "batchnorm"] if batchnorm else []:
        before = node.args[0]
        foldable = kinds[before] == "compute" and _users(before, kinds) == [node]
        if foldable and graph.get_submodule(node.target).running_mean is not None:  # without running statistics it is no fixed affine map
            fold_batchnorm(graph.get_submodule(before.target), graph.get_submodule(node.target))
            node.replace_all_uses_with(before)
            graph.graph.erase_node(node)
    graph.delete_all_unused_submodules()
    graph.recompile()
    return graph


@torch.no_grad()
def fold_batchnorm(layer, bn):
    """Change weight and bias of `layer` so that it computes bn(layer(x)) with bn's running statistics."""
    gamma = bn.weight.double() if bn.affine else torch.ones_like(bn.running_var, dtype=torch.float64)
    beta = bn.bias.double() if bn.affine else torch.zeros_like(gamma)
    factor = gamma / torch.sqrt(bn.running_var.double() + bn.eps)
    bias = torch.zeros_like(factor) if layer.bias is None else layer.bias.double()
    shape = [-1] + [1] * (layer.weight.dim() - 1)
    layer.weight = nn.Parameter((layer.weight.double() * factor.view(shape)).float())
    layer.bias = nn.Parameter(((bias - bn.running_mean.double()) * factor + beta).float())


def normalize(graph):
    """Drop dropout and identities, give every call its own module, and write in-place operations as what they compute."""
    seen, kinds = set(), find_kinds(graph)
    for node in kinds:
        if kinds[node] == "dropout" or node.op == "call_module" and type(graph.get_submodule(node.target)) is nn.Identity:
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
            continue
        if node.op == "call_module":
            if node.target in seen:
                own = f"{node.target}_{node.name}".replace(".", "_")
                graph.add_submodule(own, copy.deepcopy(graph.get_submodule(node.target)))
                node.target = own
            seen.add(node.target)
        if _in_place(node, graph):
            _make_out_of_place(node, graph)
    graph.graph.lint()
    graph.recompile()


def _in_place(node, graph):
    if node.op == "call_module":
        return getattr(graph.get_submodule(node.target), "inplace", False)
    return node.kwargs.get("inplace", False) or node.target in (operator.iadd, operator.imul) or call_name(node).endswith("_") and node.op.startswith("call_")


def _make_out_of_place(node, graph):
    """After y.op_() every later reader of y sees the new value: give them the node's result, then drop the in-place form."""
    changed, order = node.args[0], {n: i for i, n in enumerate(graph.graph.nodes)}
    for user in [u for u in changed.users if order[u] > order[node]]:
        user.replace_input_with(changed, node)
    if node.op == "call_module":
        graph.get_submodule(node.target).inplace = False
    elif node.op == "call_method":
        node.target = node.target.rstrip("_")
    elif node.target in (operator.iadd, operator.imul):
        node.target = {operator.iadd: operator.add, operator.imul: operator.mul}[node.target]
    elif call_name(node).endswith("_"):
        node.target = getattr(F, call_name(node).rstrip("_"), None) or getattr(torch, call_name(node).rstrip("_"))
    node.kwargs = {k: v for k, v in node.kwargs.items() if k != "inplace"}
    if call_name(node) in CALL_KINDS["clamp"] and len(node.args) > 1 and node.op == "call_function":
        node.args = tuple(a for a in node.args if not isinstance(a, bool))


def call_name(node):
    """Name of the function or method that a node calls; '' for other nodes."""
    return node.target if node.op == "call_method" else getattr(node.target, "__name__", "") if node.op == "call_function" else ""


def find_kinds(graph):
    """Kind of every node: input, output, constant, shape, a key of MODULE_KINDS or CALL_KINDS, or "other"."""
    kinds = {}
    for node in graph.graph.nodes:
        kinds[node] = _kind(node, graph, [kinds[n] for n in node.all_input_nodes])
    return kinds


def _kind(node, graph, inputs):
    if node.op in ("placeholder", "output", "get_attr"):
        return {"placeholder": "input", "output": "output", "get_attr": "constant"}[node.op]
    if node.op == "call_module":
        module = graph.get_submodule(node.target)
        return next((k for k, types in MODULE_KINDS.items() if isinstance(module, types)), "other")
    if inputs and all(k in ("shape", "constant") for k in inputs):
        return "shape"  # arithmetic on sizes
    found = next((k for k, names in CALL_KINDS.items() if call_name(node) in names), "other")
    if found == "add" and (node.kwargs or "constant" in inputs or not all(isinstance(a, fx.Node) for a in node.args)):
        return "other"  # only the sum of two activations is a residual add
    return found


# ---- Where codes are stored -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Plan:
    """Where a quantized network rounds, by node name.

    stores: node -> "input", "residual" (operand or result of an add) or "activation"; its value is stored as codes.
    reads: convolution or linear node (with "inputs" also ReLU and average pool) -> the node whose value it reads, behind rearranging only.
    sources: value of `reads` -> the node of `stores` that holds its codes, where there is one.
    first, last: the layers that no other layer precedes or follows. floats: nodes without an integer form.
    """

    placement: str
    stores: dict
    reads: dict
    sources: dict
    first: frozenset
    last: frozenset
    floats: tuple

    @property
    def observed(self):
        """Names of the nodes whose values need statistics."""
        return list(dict.fromkeys([*self.stores, *self.reads.values()]))


PLACEMENTS = ("fused", "inputs")


def make_plan(graph, placement="fused"):
    """Decide from the graph alone where codes are stored.

    "fused": a value is rounded once, where an integer machine writes it to memory: behind conv-relu, add-relu, average, concat and every
    operation that has no integer form. Rearranging and max-pooling pass codes on; a layer that reads an add's codes may requantize them.
    "inputs": a quantizer in front of every convolution, linear layer, ReLU and average pool and nowhere else, as the original did.
    """
    if placement not in PLACEMENTS:
        raise UserError(f"placement {placement!r} is unknown; use one of: {', '.join(PLACEMENTS)}")
    nodes = list(graph.graph.nodes)
    kinds = find_kinds(graph)
    compute = [n for n in nodes if kinds[n] == "compute"]
    if not compute:
        raise UserError("the network has no convolution and no linear layer that is a module: there is nothing to quantize")
    first = frozenset(n.name for n in compute if not _reaches(n, lambda m: m.all_input_nodes, kinds))
    last = frozenset(n.name for n in compute if not _reaches(n, lambda m: m.users, kinds))
    reads = {n.name: _behind_rearranging(n.args[0], kinds) for n in compute}
    if placement == "inputs":
        readers = {n.name: n.args[0].name for n in nodes if kinds[n] in ("compute", "clamp", "average")}
        return Plan(placement, {}, readers, {}, first, last, ())
    operands = {_holder(a, kinds) for n in nodes if kinds[n] == "add" for a in n.all_input_nodes}
    stores = {}
    for node in nodes:
        if kinds[node] == "input":
            stores[node.name] = "input"
        elif _is_stored(node, kinds):
            producer = _producer(node, kinds)
            stores[node.name] = "residual" if node in operands or kinds[producer] == "add" else "activation"
    sources = {v.name: _holder(v, kinds).name for v in reads.values() if _holder(v, kinds).name in stores}
    floats = tuple(n.name for n in nodes if kinds[n] == "other")
    return Plan(placement, stores, {k: v.name for k, v in reads.items()}, sources, first, last, floats)


def _is_stored(node, kinds):
    """True where a new value is written to memory as codes."""
    if kinds[node] in ("input", "output", "constant", "shape", *PASSES_CODES):
        return False
    if kinds[node] == "clamp" and not _ends_group(node, kinds):
        return False
    users = _readers(node, kinds)
    if all(kinds[u] == "output" for u in users):
        return False  # logits
    follower = _only_user(node, kinds)
    while follower is not None and kinds[follower] in PASSES_CODES:  # a clamp commutes with max-pooling and rearranging
        follower = _only_user(follower, kinds)
    return follower is None or kinds[follower] not in ("clamp", "concat")  # rounded there, once


def _ends_group(clamp, kinds):
    """True for a clamp that is the only reader of what it clamps, so that the value is first stored behind it."""
    before = clamp.args[0]
    while kinds[before] in PASSES_CODES and _only_user(before, kinds) is not None:
        before = before.args[0]
    return _only_user(before, kinds) is not None and kinds[before] not in ("input", *PASSES_CODES)


def _producer(node, kinds):
    """The operation behind a stored value: what its clamp clamps, or the node itself."""
    while kinds[node] in ("clamp", *PASSES_CODES):
        node = node.args[0]
    return node


def _users(node, kinds):
    """The nodes that use the value itself; reading its size does not count."""
    return [user for user in node.users if kinds[user] != "shape"]


def _only_user(node, kinds):
    users = _users(node, kinds)
    return users[0] if len(users) == 1 else None


def _holder(node, kinds):
    """The node that holds the codes which `node` passes on."""
    while kinds[node] in PASSES_CODES or kinds[node] == "clamp" and not _ends_group(node, kinds):
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


def _reaches(node, neighbours, kinds):
    """True when another convolution or linear layer lies in that direction."""
    stack, seen = list(neighbours(node)), set()
    while stack:
        other = stack.pop()
        if kinds[other] == "compute":
            return True
        if other not in seen:
            seen.add(other)
            stack += neighbours(other)
    return False
