"""What the network is, as a graph: traced, BatchNorm folded, every node's kind.

    graph = folded(model)           # a torch.fx.GraphModule; the model itself is left alone
    kinds = find_kinds(graph)       # what every node is

Kinds are found from modules, functions and methods, never from names; no bit-width is known here.
"""

import copy

import torch
from torch import fx, nn

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
        "chunk", "split", "unbind", "getitem", "channel_shuffle", "pixel_shuffle", "movedim",
        "detach", "clone"},
    "dropout": {"dropout", "dropout1d", "dropout2d", "alpha_dropout", "stochastic_depth"},
    "shape": {"size", "dim", "getattr"},
}
TAIL = {  # of the network: changes no logit's code and needs none
    "add", "argmax", "div", "double", "exp", "float", "interpolate", "log_softmax", "logsigmoid",
    "logsoftmax", "mul", "neg", "sigmoid", "softmax", "softmax2d", "softmin", "sub", "tanh", "to",
    "truediv", "upsample"}
VIEW_ATTRIBUTES = ("T", "mT", "H", "mH", "data", "real")  # of a tensor, another view of it
NUMPY = {"axis": "dim", "keepdims": "keepdim"}  # other names that torch takes
KEYWORDS = ("input", "tensors", "tensor", "other")  # of torch's functions, in the order they take
FREE = ("shape", "constant")  # kinds of nodes that read no activation, but for its size
PASSES_CODES = ("rearrange", "maxpool")  # codes of the input, at most fewer or in another order


# ---- Tracing and folding -------------------------------------------------------------------------


def trace(model):
    """A symbolic trace of a copy of `model` that shares no weights; UserError for what is not in
    the contract (system/contract.py), with the line to change.
    """
    from quantlab.system.contract import trace_network  # here, as it is only needed with a network

    return trace_network(model)


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
        if kinds[before] == "compute" and readers_of(before, kinds) == [node]:
            layer, bn = graph.get_submodule(before.target), graph.get_submodule(node.target)
            # without running statistics it is no fixed affine map
            if bn.running_mean is not None and _same_channels(before, layer, bn):
                fold_batchnorm(layer, bn)
                before.meta["call"] = node.meta["call"]  # whose value it has from now on
                node.replace_all_uses_with(before)
                graph.graph.erase_node(node)
    graph.delete_all_unused_submodules()
    graph.recompile()
    return graph


def _same_channels(node, layer, bn):
    """True where a layer's outputs are BatchNorm's channels, axis 1: not over a linear's places."""
    if isinstance(layer, nn.Linear):
        from quantlab.ranks import find_ranks  # here, as few networks need it

        return len(layer.weight) == bn.num_features and find_ranks(node.graph)[node] in (2, None)
    return True


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
    """Drop dropout and identities, give every call its own module and tensors, and write in-place
    operations as what they compute and `layer(input=x)` as `layer(x)`.
    """
    seen, kinds = set(), find_kinds(graph)
    for node in kinds:
        if _is_of_torch(node, graph):
            node.args = (*node.args, *(node.kwargs[k] for k in KEYWORDS if k in node.kwargs))
            node.kwargs = {k: v for k, v in node.kwargs.items() if k not in KEYWORDS}
            if kinds[node] in ("average", "concat", "rearrange"):
                node.kwargs = {NUMPY.get(k, k): v for k, v in node.kwargs.items()}
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
    from quantlab.inplace import write_out_of_place  # here, as it reads what this module defines

    write_out_of_place(graph)
    # what nobody reads goes, apart from a function of the caller's own, which may do more
    graph.graph.eliminate_dead_code(lambda n: n.is_impure() or not _is_of_torch(n, graph))
    graph.graph.lint()
    graph.recompile()


def _is_of_torch(node, graph):
    """True for calls of torch's and Python's own functions, methods and modules."""
    module = node.op == "call_module"
    return _is_known(type(graph.get_submodule(node.target)) if module else node.target)


def _is_known(made):
    """True for a class or function of torch or Python, whose name says what it computes."""
    where = (getattr(made, "__module__", None) or "torch").split(".")[0]
    return where in ("torch", "torchvision", "_operator", "builtins", "math")


# ---- What every node is --------------------------------------------------------------------------


def call_name(node):
    """Name of the function or method that a node calls; '' for other nodes."""
    if node.op != "call_function":
        return node.target if node.op == "call_method" else ""
    name = getattr(node.target, "__name__", "")
    return name if _is_known(node.target) else f"{node.target.__module__}.{name}"


def operation_name(node, graph):
    """Lower-case name of the module class, function or method that a node calls."""
    if node.op == "call_module":
        return type(graph.get_submodule(node.target)).__name__.lower()
    return call_name(node)


def is_view(node):
    """True for x.T and the like, which torch.fx writes as getattr(x, "T")."""
    return call_name(node) == "getattr" and node.args[1] in VIEW_ATTRIBUTES


def find_kinds(graph):
    """node -> input, output, constant, shape, a key of MODULE_KINDS or CALL_KINDS, tail (what only
    the network's output is made with, of logits that stay float), or other.
    """
    kinds, ends = {}, set()
    for node in graph.graph.nodes:
        kinds[node] = _kind(node, graph, [kinds[n] for n in node.all_input_nodes])
    for node in reversed(kinds):
        reads = [n for n in node.all_input_nodes if kinds[n] not in ("constant", "shape")]
        tail = kinds[node] == "other" and operation_name(node, graph) in TAIL and len(reads) == 1
        passes = tail or kinds[node] in ("rearrange", "clamp")
        if kinds[node] == "output" or passes and ends.issuperset(readers_of(node, kinds)):
            ends.add(node)
            kinds[node] = "tail" if tail else kinds[node]
    return kinds


def _kind(node, graph, inputs):
    if node.op in ("placeholder", "output", "get_attr"):
        return {"placeholder": "input", "output": "output", "get_attr": "constant"}[node.op]
    if node.op == "call_module":
        return _module_kind(graph.get_submodule(node.target))
    name = call_name(node)
    if inputs and all(k in ("shape", "constant") for k in inputs):
        # arithmetic on sizes, or on parameters and sizes
        sizes = "constant" not in inputs or name in CALL_KINDS["shape"] and not is_view(node)
        return "shape" if sizes else "constant"
    found = next((k for k, names in CALL_KINDS.items() if name in names), "other")
    if found == "shape" and is_view(node):
        return "rearrange"
    index = node.args[1:]
    part = index in (("values",), ("indices",)) or [type(i) for i in index] == [int]
    if name in ("getitem", "getattr") and inputs[0] == "other" and part:
        return "other"  # one of several results of an operation, itself a value
    if found == "concat" and isinstance([*node.args, 0][0], fx.Node):
        return "other"  # of as many values as another operation gives
    mixed = not all(isinstance(a, fx.Node) for a in node.args) or {"constant", "shape"} & {*inputs}
    if found == "add" and (node.kwargs or mixed):
        return "other"  # only the sum of two activations is a residual add
    return "other" if node.kwargs.get("return_indices") else found


def _module_kind(module):
    """The kind of a module whose forward is torch's own: a subclass may compute anything."""
    from quantlab.system.forms import has_own_forward  # here, as it is only needed with a network

    found = next((k for k, types in MODULE_KINDS.items() if isinstance(module, types)), "other")
    own = has_own_forward(module) or getattr(module, "return_indices", False)
    return "other" if own else found


def readers_of(node, kinds):
    """The nodes that use the value itself; reading its size does not count."""
    return [user for user in node.users if kinds[user] != "shape"]
