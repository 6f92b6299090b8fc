"""How many dimensions every value has, as far as the graph alone tells.

    find_ranks(graph.graph)     # node -> 2 where a linear layer's features are what axis 1 holds
"""

import math
import re

from torch import fx, nn

from quantlab.graph import CALL_KINDS, operation_name


def find_ranks(graph):
    """node -> number of dimensions of its value, as far as the graph alone tells; else None."""
    ranks = {}
    for node in graph.nodes:
        ranks[node] = _rank(node, graph.owning_module, ranks)
    return ranks


def _rank(node, graph, ranks):
    name = operation_name(node, graph)
    module = graph.get_submodule(node.target) if node.op == "call_module" else None
    source = ranks.get(node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else None
    if isinstance(module, nn.modules.conv._ConvNd):
        return 2 + len(module.kernel_size)
    if spatial := re.search(r"(?:pool|batchnorm|upsample\w*)_?([123])d$", name):
        return source if spatial[1] == "1" and "norm" in name else 2 + int(spatial[1])
    if name == "flatten":
        return _flattened(node, graph, source)
    if name in ("view", "reshape", "permute"):
        shape = node.args[1:]
        return len(shape[0]) if shape and isinstance(shape[0], (tuple, list)) else len(shape)
    same = name in ("linear", "contiguous", "clone", "detach", "transpose", "dropout", "identity",
                    "sigmoid", "silu", "gelu", "hardswish", "elu", "leaky_relu", "tanh",
                    *CALL_KINDS["clamp"], *CALL_KINDS["add"])
    return source if same else None


def flattened_dims(node, graph):
    """(first, last) dimension that a flatten joins; NaN for one that is computed."""
    module = graph.get_submodule(node.target) if node.op == "call_module" else None
    names = ("start_dim", "end_dim")
    given = dict(zip(names, (0, -1))) | dict(zip(names, node.args[1:])) | node.kwargs
    dims = [given[name] if module is None else getattr(module, name) for name in names]
    return tuple(math.nan if isinstance(dim, fx.Node) else dim for dim in dims)


def _flattened(node, graph, rank):
    """Rank behind a flatten."""
    first, last = flattened_dims(node, graph)
    if first >= 0 and last == -1:
        return first + 1
    return None if rank is None or math.isnan(first + last) else rank - (last % rank - first % rank)
