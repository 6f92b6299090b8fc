"""What the network is, as a graph: traced, BatchNorm folded, every node's kind.

    graph = folded(model)           # a torch.fx.GraphModule; the model itself is left alone
    kinds = find_kinds(graph)       # what every node is

Kinds are found from modules, functions and methods, never from names; no bit-width is known here.
"""

import copy
import operator
import traceback

import torch
import torch.nn.functional as F
from torch import fx, nn

from quantlab.system.errors import UserError

MODULE_KINDS = {
    "compute": (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear),
    "batchnorm": (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
    "clamp": (nn.ReLU, nn.ReLU6, nn.Hardtanh),
    "maxpool": (
        nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d),
    "average": (nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d),
    "rearrange": (nn.Identity, nn.Flatten, nn.Unflatten, nn.ChannelShuffle, nn.PixelShuffle),
    "dropout": (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout),
}
CALL_KINDS = {  # functions and tensor methods by name
    "add": {"add", "add_", "iadd", "__add__", "__iadd__"},
    "clamp": {"relu", "relu_", "relu6", "hardtanh", "hardtanh_"},
    "maxpool": {
        "max_pool1d", "max_pool2d", "max_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d"},
    "average": {"avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "mean"},
    "concat": {"cat", "concat", "concatenate"},
    "rearrange": {
        "flatten", "view", "reshape", "permute", "transpose", "contiguous", "squeeze", "unsqueeze",
        "chunk", "split", "getitem", "channel_shuffle", "pixel_shuffle", "movedim", "detach",
        "clone"},
    "dropout": {"dropout", "dropout1d", "dropout2d", "alpha_dropout", "stochastic_depth"},
    "shape": {"size", "dim", "getattr"},
}
PASSES_CODES = ("rearrange", "maxpool")  # codes of the input, at most fewer or in another order


# ---- Tracing and folding -------------------------------------------------------------------------


class _Tracer(fx.Tracer):
    """Names what is no module by the block that calls it: layer3_0_add, where torch.fx counts from
    the start of the network (add_6)."""

    def create_proxy(self, kind, target, args, kwargs, name=None, *rest, **options):
        if name is None and kind in ("call_function", "call_method") and self.module_stack:
            block = next(reversed(self.module_stack)).split("@")[0]  # @1: its second call
            name = f"{block}_{getattr(target, '__name__', target)}"
        return super().create_proxy(kind, target, args, kwargs, name, *rest, **options)


def trace(model):
    """A symbolic trace of a copy of `model` in eval mode; UserError with the line to change."""
    model = copy.deepcopy(model).eval()
    if isinstance(model, fx.GraphModule):
        return model
    try:
        return fx.GraphModule(model, _Tracer().trace(model), type(model).__name__)
    except Exception as error:  # whatever the model's own forward raises on a symbolic value
        frames = traceback.extract_tb(error.__traceback__)
        own = [f for f in frames if "torch" not in f.filename and "quantlab" not in f.filename]
        where = f" at {own[-1].filename}:{own[-1].lineno}: {own[-1].line}" if own else ""
        raise UserError(
            f"{type(model).__name__} cannot be traced by torch.fx{where} "
            f"({str(error).splitlines()[0]}); replace control flow that depends on tensor values, "
            "or wrap it in a function marked torch.fx.wrap"
        ) from None


def folded(model):
    """The float graph that quantization starts from: nothing shared or in place, BatchNorm folded.

    A BatchNorm behind a convolution or linear layer that nobody else reads becomes part of it:
        w' = w * gamma / sqrt(var + eps)
        b' = (b - mean) * gamma / sqrt(var + eps) + beta      (computed in float64)
    """
    graph = trace(model)
    normalize(graph)
    kinds = find_kinds(graph)
    for node in [n for n in kinds if kinds[n] == "batchnorm"]:
        before = node.args[0]
        foldable = kinds[before] == "compute" and readers_of(before, kinds) == [node]
        # without running statistics it is no fixed affine map
        if foldable and graph.get_submodule(node.target).running_mean is not None:
            fold_batchnorm(graph.get_submodule(before.target), graph.get_submodule(node.target))
            node.replace_all_uses_with(before)
            graph.graph.erase_node(node)
    graph.delete_all_unused_submodules()
    graph.recompile()
    return graph


@torch.no_grad()
def fold_batchnorm(layer, bn):
    """Change `layer` so that it computes bn(layer(x)) with bn's running statistics.

    layer.folded_batchnorm keeps what BatchNorm promised of each output, float64 [C]: mean = beta,
    std and gamma (equal but for eps), eps_share = eps / (var + eps).
    """
    var = bn.running_var.double() + bn.eps
    gamma = bn.weight.double() if bn.affine else torch.ones_like(var)
    beta = bn.bias.double() if bn.affine else torch.zeros_like(var)
    factor = gamma / torch.sqrt(var)
    bias = torch.zeros_like(factor) if layer.bias is None else layer.bias.double()
    shape = [-1] + [1] * (layer.weight.dim() - 1)
    layer.weight = nn.Parameter((layer.weight.double() * factor.view(shape)).float())
    layer.bias = nn.Parameter(((bias - bn.running_mean.double()) * factor + beta).float())
    eps_share = bn.eps / var
    promise = {"mean": beta, "std": gamma.abs() * torch.sqrt(1 - eps_share)}
    promise |= {"gamma": gamma, "eps_share": eps_share}
    layer.folded_batchnorm = {name: value.detach().cpu() for name, value in promise.items()}


def normalize(graph):
    """Drop dropout and identities, give every call its own module, and write in-place operations as
    what they compute.
    """
    seen, kinds = set(), find_kinds(graph)
    for node in kinds:
        module = graph.get_submodule(node.target) if node.op == "call_module" else None
        if kinds[node] == "dropout" or type(module) is nn.Identity:
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
    if node.kwargs.get("inplace", False) or node.target in (operator.iadd, operator.imul):
        return True
    return node.op.startswith("call_") and call_name(node).endswith("_")


def _make_out_of_place(node, graph):
    """After y.op_() later readers of y see the new value: they get the node's result instead."""
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
        name = call_name(node).rstrip("_")
        node.target = getattr(F, name, None) or getattr(torch, name)
    node.kwargs = {k: v for k, v in node.kwargs.items() if k != "inplace"}
    if call_name(node) in CALL_KINDS["clamp"] and len(node.args) > 1 and node.op == "call_function":
        node.args = tuple(a for a in node.args if not isinstance(a, bool))


def call_name(node):
    """Name of the function or method that a node calls; '' for other nodes."""
    if node.op == "call_method":
        return node.target
    return getattr(node.target, "__name__", "") if node.op == "call_function" else ""


def operation_name(node, graph):
    """Lower-case name of the module class, function or method that a node calls."""
    if node.op == "call_module":
        return type(graph.get_submodule(node.target)).__name__.lower()
    return call_name(node)


def find_kinds(graph):
    """node -> input, output, constant, shape, a key of MODULE_KINDS or CALL_KINDS, or other."""
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
    activations = all(isinstance(a, fx.Node) for a in node.args) and "constant" not in inputs
    if found == "add" and (node.kwargs or not activations):
        return "other"  # only the sum of two activations is a residual add
    return found


def readers_of(node, kinds):
    """The nodes that use the value itself; reading its size does not count."""
    return [user for user in node.users if kinds[user] != "shape"]
