"""What may be brought to the workbook: one contract for networks and for batches.

A network is an nn.Module that torch.fx can trace, computed in eval mode and in float32: one image
input, others by keyword default, weights of any floating-point type, weights that a module computes
anew (weight_norm, spectral_norm, parametrizations, pruning masks) as they are now. A hook that
changes a value is refused.

Batches are an iterable of floating-point tensors [B, C, H, W], of any floating-point type, or of
tuples and lists whose first element is one (a DataLoader of images and labels works as it is), or
one such tensor.

Everything else is refused by a UserError in one line that says what to pass instead. torch's
default dtype and gradient mode are the caller's and change nothing.
"""

import collections
import copy
import hashlib
import inspect
import operator
import traceback

import numpy as np
import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves

from quantlab.system.arguments import as_count
from quantlab.system.errors import UserError, first_line
from quantlab.system.machine import device, exact_float

RESERVED = {  # what a QuantizedNetwork has, where its Quantizers are, what every GraphModule has
    "bias_codes", "bias_scale", "codes", "config", "layers", "of", "plan", "quantizer_nodes",
    "quantizers", "reads", "write", *(
        {*dir(fx.GraphModule({}, fx.Graph()))} - {*dir(nn.Module())})}
GATE_IMAGES = 4  # of the first batch: every module's result is kept for them
FLOAT_NOISE = 1e-4  # of the largest value: 25 times what torchvision's deepest networks show

WRAPPERS = {  # classes by name, as some are slow to import: what they wrap
    "DataParallel": "model.module",
    "DistributedDataParallel": "model.module",
    "OptimizedModule": "model._orig_mod",
    "ScriptModule": "the nn.Module that it was made from",
}


# ---- Networks ------------------------------------------------------------------------------------


def check_network(model):
    """UserError unless `model` is a network of the contract (whether it can be traced apart)."""
    if not isinstance(model, nn.Module):
        raise UserError(f"a network is a torch.nn.Module, not {type(model).__name__}; pass one")
    for name, module in model.named_modules():
        found = [kind for kind in type(module).__mro__ if kind.__name__ in WRAPPERS]
        if found:
            wrapper, what = found[0].__name__, f"module {name}" if name else "the network"
            raise UserError(f"{what} is a {wrapper}, which torch.fx cannot trace; "
                            f"pass what it wraps: {WRAPPERS[wrapper]}")
    parameters = inspect.signature(model.forward).parameters.values()
    needed = [p.name for p in parameters
              if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if len(needed) > 1:
        raise UserError(f"the network's forward takes {len(needed)} inputs ({', '.join(needed)}); "
                        "wrap it in a module whose forward takes one batch of images")


def copy_network(model):
    """A float32 copy of `model` in eval mode, hooks and reparametrized weights as they are."""
    check_network(model)
    # what an earlier forward left behind carries a gradient, and such a tensor has no deepcopy
    left = [t for m in model.modules() for t in vars(m).values() if isinstance(t, torch.Tensor)]
    made = copy.deepcopy(model, {id(t): t.detach().clone() for t in left if not t.is_leaf})
    for hooks in ("_forward_hooks", "_forward_pre_hooks"):  # a copied GraphModule has none
        setattr(made, hooks, copy.copy(getattr(model, hooks)))
    return made.eval().float()


class _Tracer(fx.Tracer):
    """Names what is no module by the block that calls it: layer3_0_add, where torch.fx counts from
    the start of the network (add_6)."""

    def create_proxy(self, kind, target, args, kwargs, name=None, *rest, **options):
        called = getattr(target, "__name__", target)
        if name is None and kind in ("call_function", "call_method") and self.module_stack:
            block = next(reversed(self.module_stack)).split("@")[0]  # @1: its second call
            name = f"{block}_{called}"
        elif hasattr(nn.Module, called):  # x.to(y.dtype): no Quantizer can have that name
            name = f"x_{called}"
        return super().create_proxy(kind, target, args, kwargs, name, *rest, **options)


def trace_network(model):
    """A symbolic trace of a copy of `model` in which no weight is shared or computed anew.

    node.meta["call"] of a module's call is (its path, how many calls came before).
    """
    made = copy_network(model)
    _freeze(made)
    if isinstance(made, fx.GraphModule):
        graph = made.graph
    else:
        _take_one_input(made)
        try:
            graph = _Tracer().trace(made)
        except Exception as error:  # whatever the model's own forward raises on a symbolic value
            raise _untraceable(model, error) from None
    calls = collections.Counter()
    for node in graph.nodes:
        if node.op == "call_module":
            node.meta["call"] = node.target, calls[node.target]
            calls[node.target] += 1
    _rename_reserved(made, graph)
    if not isinstance(made, fx.GraphModule):
        made = fx.GraphModule(made, graph, type(made).__name__)
    _untie(made)
    made.recompile()
    return made


def _rename_reserved(model, graph):
    """Parts of the network called as something of a QuantizedNetwork get another path."""
    renamed = {}
    for parts in (model._modules, model._parameters, model._buffers, vars(model)):
        for name in RESERVED & parts.keys():
            if isinstance(parts[name], (nn.Module, torch.Tensor)):
                renamed[name] = f"own_{name}"
                while hasattr(model, renamed[name]):
                    renamed[name] += "_"
                parts[renamed[name]] = parts.pop(name)
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            first, *rest = node.target.split(".")
            node.target = ".".join([renamed.get(first, first), *rest])


def _untraceable(model, error):
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "torch" not in f.filename and "quantlab" not in f.filename]
    where = f" at {own[-1].filename}:{own[-1].lineno}: {own[-1].line}" if own else ""
    return UserError(
        f"{type(model).__name__} cannot be traced by torch.fx{where} ({first_line(error)}); "
        "replace control flow that depends on tensor values, or wrap it in a function marked "
        "torch.fx.wrap")


@torch.no_grad()
def _freeze(model):
    """Write what computes a weight anew into the weight, and remove all hooks, in place.

    A hook that changes a value is not lost in silence: check_function names its module.
    """
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            if type(hook).__module__.startswith("torch.nn.utils."):
                hook(module, None)  # weight_norm, spectral_norm, prune: sets the weight
        computed = [*getattr(module, "parametrizations", ())]
        values = {name: getattr(module, name).clone() for name in computed}
        if computed:
            del module.parametrizations  # torch's own removal would change the original's class too
            module.__class__ = type(module).__bases__[0]
        for name in {"weight", "bias"} & vars(module).keys():
            values[name] = vars(module).pop(name)
        for name, value in values.items():
            module.register_parameter(name, nn.Parameter(value.clone()))
            for left in [*module._parameters, *module._buffers]:
                if left.startswith(f"{name}_"):
                    delattr(module, left)
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()


def _take_one_input(model):
    """torch.fx would trace `mask=None` as a value."""
    if len(inspect.signature(model.forward).parameters) > 1:
        def forward(self, x):
            return super(one, self).forward(x)

        one = type(type(model).__name__, (type(model),), {"forward": forward})
        model.__class__ = one


def _untie(graph):
    """A weight that several layers share, or that the forward reads as well, once for each."""
    seen = set()
    for target in {n.target: None for n in graph.graph.nodes if n.op == "call_module"}:
        for module in graph.get_submodule(target).modules():
            for name, value in list(module.named_parameters(recurse=False)):
                if _storage(value) in seen:
                    setattr(module, name, nn.Parameter(value.detach().clone()))
                seen.add(_storage(value))
    for node in [n for n in graph.graph.nodes if n.op == "get_attr"]:
        value = operator.attrgetter(node.target)(graph)
        if isinstance(value, torch.Tensor) and _storage(value) in seen:
            node.target = f"{node.target}_{node.name}".replace(".", "_")
            graph.register_buffer(node.target, value.detach().clone())


def _storage(value):
    return value.untyped_storage().data_ptr()


# ---- Batches -------------------------------------------------------------------------------------


def as_batches(batches, first=None):
    """Yields the images of each batch, float32 [B, C, H, W]; first(images) is called once."""
    single = isinstance(batches, torch.Tensor) or not hasattr(batches, "__iter__")
    for batch in [batches] if single else batches:
        images = as_images(batch)
        if first and len(images):
            first(images)
            first = None
        yield images


def as_images(batch):
    """The images of one batch, float32 [B, C, H, W]: the batch, or the first element of a pair."""
    if isinstance(batch, (tuple, list)) and batch:
        batch = batch[0]
    wanted = "a batch is a float tensor [B, C, H, W]"
    if isinstance(batch, dict):
        raise UserError(f"{wanted}, not a dict with {', '.join(map(str, batch))}; pass its images")
    if not isinstance(batch, torch.Tensor):
        advice = "use torch.from_numpy(x)" if isinstance(batch, np.ndarray) else "pass tensors"
        raise UserError(f"{wanted}, not {type(batch).__name__}; {advice}")
    if not batch.is_floating_point():
        raise UserError(f"{wanted}, not {batch.dtype}; scale it as the network was trained, for "
                        "instance (images.float() / 255 - mean) / std")
    if batch.dim() < 2:
        raise UserError(f"{wanted}, not one of shape {list(batch.shape)}; pass images")
    return batch.detach().float()


def as_pairs(split, batch_size, limit=None):
    """(iterable of (images float32 [B, C, H, W], labels int64 [B]), how many, classes or None) of a
    Split of load_data, or of batches of images and labels.
    """
    if not hasattr(split, "batches"):
        return _pairs(split, limit), operator.length_hint(split), None
    size = as_count(batch_size, "batch_size")
    classes = split.num_classes or (int(split.labels.max()) + 1 if len(split) else 0)
    return split.batches(size), -(-len(split) // size), classes


def _pairs(batches, limit):
    wanted = "evaluate takes a Split of load_data (data.test) or batches of images and labels"
    if not hasattr(batches, "__iter__") or isinstance(batches, (torch.Tensor, np.ndarray, dict)):
        raise UserError(f"{wanted}, not {type(batches).__name__}; pass a DataLoader")
    if limit is not None:
        raise UserError(f"limit={limit!r} chooses images of a Split; pass fewer batches")
    for batch in batches:
        labels = batch[1] if isinstance(batch, (tuple, list)) and len(batch) > 1 else None
        if not isinstance(labels, torch.Tensor) or labels.dim() != 1:
            raise UserError(f"{wanted}, labels int64 [B]; pass a DataLoader that gives both")
        yield as_images(batch), labels.long()


# ---- Devices --------------------------------------------------------------------------


def find_device(name):
    """The torch.device of that name; UserError where torch has none such."""
    try:
        return torch.device(name)
    except RuntimeError:
        raise UserError(f"device {name!r} is unknown; use cpu or cuda") from None


# ---- The gate ------------------------------------------------------------------------------------


@torch.no_grad()
def check_function(model, graph, images):
    """UserError, naming the first node that differs, unless a folded float graph computes what
    `model` does, to float noise, on the first of these images (float32 [B, C, H, W]).

    The results of all modules and what the network returns are compared: whatever torch.fx or
    folding would miss, it is never another network in silence. Returns what the graph does, for
    GATE_IMAGES of them at most.
    """
    images = images[:GATE_IMAGES].to(device())
    if images.dim() != 4 and any(isinstance(m, nn.Conv2d) for m in graph.modules()):
        raise UserError(f"a batch is a float tensor [B, C, H, W], not {list(images.shape)}; "
                        "a single image becomes one with image[None]")
    nodes = [n for n in graph.graph.nodes if "call" in n.meta]
    with exact_float():
        try:
            exact, wanted = _run(copy_network(model).to(device()), images, {
                n.meta["call"] for n in nodes})
        except Exception as error:  # whatever the network says of images that it cannot read
            raise _unreadable(images, error) from None
        found, result = _run(graph.to(device()), images, {(n.target, 0) for n in nodes})
    pairs = [(f"node {n.name}", exact.get(n.meta["call"]), found[n.target, 0]) for n in nodes]
    leaves = tree_leaves(wanted), tree_leaves(result)
    pairs += [("the output", a, b) for a, b in zip(*leaves, strict=True)]
    for name, a, b in pairs:
        if isinstance(a, torch.Tensor) and _differ(a, b):
            raise UserError(
                f"{name} of the traced network is not what the model computes: {_reason(model)} "
                "that torch.fx cannot see changes it; write it as a module or an expression in "
                "forward")
    return result


def check_logits(found, n, places=False, floats=True):
    """UserError unless what a network gives for n images is its logits, one tensor [B, classes],
    with places [B, classes, ...].
    """
    shape = list(found.shape) if isinstance(found, torch.Tensor) else []
    dims = len(shape) == 2 or places and len(shape) > 2
    if shape[:1] != [n] or not dims or floats and not found.is_floating_point():
        what = f"{found.dtype} {shape}" if shape else f"a {type(found).__name__}"
        what = what.replace("immutable_", "")  # of torch.fx
        wanted = f"{'float ' * floats}tensor of logits [B, classes{', ...' * places}]"
        raise UserError(f"the network gives {what} for {n} images, where one {wanted} is needed; "
                        "wrap it in a module that returns that alone")


UNSAID = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.Upsample)  # their repr says not all of it


def unsaid(module):
    """Settings of a module that its repr leaves out, as text."""
    if not isinstance(module, UNSAID):
        return ""
    return f"{ {name: getattr(module, name, None) for name in module.__constants__} }"


def graph_hash(graph):
    """sha256 of a graph's operations, of the settings of its modules and of every tensor in it."""
    digest = hashlib.sha256(f"{graph.graph}{graph}".encode())
    digest.update("".join(map(unsaid, graph.modules())).encode())
    for name, tensor in sorted(graph.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy())
    return digest.hexdigest()


def check_statistics(stats, model, graph):
    """UserError unless the statistics were collected on this folded float graph of `model`, with
    what a hook or a forward of one's own changes in it now.
    """
    if stats.graph_hash != graph_hash(graph):
        raise UserError(
            "these statistics were collected on another network; "
            "run collect(model, batches) on this one")
    if any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m)
           for m in model.modules()):
        check_function(model, copy.deepcopy(graph), stats.images)


def check_origin(qmodel, graph):
    """UserError where a QuantizedNetwork is known to be of another float graph than this one, and
    of none that was equalized from it.
    """
    origins = qmodel.meta.get("origins")
    if origins and graph_hash(graph) not in origins:
        raise UserError("the quantized network was made from another network, or this one has "
                        "changed since; pass the network that quantize was given")


def _run(model, images, wanted):
    """({(path of a module, number of the call): its result} of those wanted, the output)."""
    calls, seen = collections.Counter(), {}

    def record(name, value):
        if (name, calls[name]) in wanted:
            seen[name, calls[name]] = value.clone() if isinstance(value, torch.Tensor) else value
        calls[name] += 1

    hooks = [module.register_forward_hook(lambda _, args, value, name=name: record(name, value))
             for name, module in model.named_modules()]
    try:
        return seen, model(images.clone())
    finally:
        for hook in hooks:
            hook.remove()


def _differ(a, b):
    """True where b is not a to float noise; values that are not finite are another's to report."""
    if a.shape != b.shape:
        return True
    known = torch.isfinite(a)
    a, b = (a, b) if known.all() else (a[known], b[known])
    return bool(a.numel()) and not (a - b).abs().max() <= FLOAT_NOISE * a.abs().max()


def _reason(model):
    hooked = [path or "the outermost" for path, module in model.named_modules()
              if module._forward_hooks or module._forward_pre_hooks]
    if hooked:
        return f"a forward hook (there is one on module {', '.join(hooked)})"
    return "an in-place operation, a method or a state"


def _unreadable(images, error):
    """The UserError for images that the network refuses with that exception."""
    shape = list(images.shape)
    last = len(shape) == 4 and shape[3] in (1, 3, 4) and shape[1] not in (1, 3, 4)
    advice = "batches [B, C, H, W] as its forward reads them"
    return UserError(f"the network cannot read a batch of shape {shape} ({first_line(error)}); "
                     f"give it {'x.permute(0, 3, 1, 2)' if last else advice}")
