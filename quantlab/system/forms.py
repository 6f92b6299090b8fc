"""Why an operation has no integer form: what `plan.floats` lists and `to_integer` refuses."""

KNOWN = "only layers, adds, averages, BatchNorm, clamps, pools and rearranging have one"


def has_own_forward(module):
    """True where a module computes otherwise than torch's class: by its subclass, or by itself."""
    made = [vars(c) for c in type(module).__mro__ if not c.__module__.startswith("torch.nn.")]
    return any(name in own for own in (vars(module), *made)
               for name in ("forward", "_conv_forward"))


def why_float(node, kinds, graph, rank=None):
    """The reason for which a node of a float graph has no integer form; None where it has one.

    kinds: node -> kind, as graph.find_kinds gives them. rank: how many dimensions the node's value
    has, where that is known.
    """
    module = graph.get_submodule(node.target) if node.op == "call_module" else None
    rule = {"other": _other, "compute": _layer, "batchnorm": _batchnorm, "average": _average,
            "maxpool": _pool}.get(kinds[node])
    reason = rule and rule(node, module, kinds)
    if not reason and kinds[node] == "batchnorm" and rank == 3:
        return "only BatchNorm1d of [B, C] has one"
    return reason


def _name(node, module):
    """Name of the operation, as modules, functions and methods alike have it: avgpool2d."""
    called = node.target if isinstance(node.target, str) else node.target.__name__
    return (called if module is None else type(module).__name__).lower().replace("_", "")


def _other(node, module, kinds):
    if module is not None and has_own_forward(module):
        return "its forward is not torch's own"
    if node.kwargs.get("return_indices") or getattr(module, "return_indices", False):
        return "it returns indices too"
    if _name(node, module) in ("add", "iadd"):
        return "it does not add two activations"
    if _name(node, module) in ("getitem", "getattr") and kinds[node.args[0]] == "other":
        return f"it is a result of {node.args[0].name}, which has none"
    return KNOWN


def _layer(node, module, kinds):
    if not hasattr(module, "kernel_size"):  # linear
        return None
    if len(module.kernel_size) != 2:
        return "only convolutions in two dimensions have one"
    return None if module.padding_mode == "zeros" else f"its padding is {module.padding_mode!r}"


def _batchnorm(node, module, kinds):
    before = node.args[0]
    readers = [user for user in before.users if kinds[user] != "shape"]
    if module.running_mean is None:
        return "it has no running statistics: what it computes depends on the batch"
    if kinds[before] == "compute" and readers == [node]:
        return "it is not folded into the layer whose sums it reads"
    return "only BatchNorm1d and BatchNorm2d have one" if "3d" in _name(node, module) else None


def _average(node, module, kinds):
    if _name(node, module) != "mean":
        return _pool(node, module, kinds)
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    dims = dims if isinstance(dims, (tuple, list)) else (dims,)
    if 0 in dims:
        return "it averages over the images of a batch"
    return "it is a mean over everything; name its dimensions" if None in dims else None


def _pool(node, module, kinds):
    name = _name(node, module)
    return None if name.endswith("2d") else "only pools in two dimensions have one"
