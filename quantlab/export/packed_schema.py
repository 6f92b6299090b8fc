"""What a packed file may hold, in one place: checked before anything is built from it.

    schema.check(about, SCHEMA)               # every field: there, of its type
    check_network(about, tensors, graph)      # names, codes, scales and shapes that belong together

Both raise ValueError with what is wrong. A format that is new extends SCHEMA.
"""

import math
import typing

import torch
from torch import nn

from quantlab.affine import MAX_BITS, MIN_BITS, QParams
from quantlab.config import QuantConfig
from quantlab.export.bits import unpack
from quantlab.quantized import PREFIX
from quantlab.system.schema import Between, Each, check

SCALES = 2.0**-126, 2.0**119  # float32 that are neither rounded nor infinite once times a code


def _kind(hint):
    """The kind of a type hint; a dictionary is one of widths."""
    kinds = {object: str, dict: Each((int, None)), type(None): None}
    found = tuple(kinds.get(one, one) for one in typing.get_args(hint) or (hint,))
    return found if len(found) > 1 else found[0]


CONFIG = {name: _kind(hint) for name, hint in typing.get_type_hints(QuantConfig).items()}
CODES = {"qmin": int, "qmax": int}
SCHEMA = {
    "version": int, "graph": str, "config": Each(object),
    "plan": {"stores": Each(("input", "residual", "activation")), "reads": Each(str),
             "sources": Each(str), "first": [str], "last": [str], "floats": [str]},
    "layers": Each({"axis": (int, None), "shape": [int], **CODES}),
    "quantizers": [{"target": str, "name": str, "behind": str, "reads": str, "readers": [str],
                    "scale": float, "zero_point": int, **CODES}],
    "image_shape": ([Between(1, 2**20, int)], None),
}


def check_config(config):
    """ValueError unless it holds the settings of a QuantConfig."""
    check(config, CONFIG, "config")
    if not 0 < config["weight_norm"] < math.inf:
        raise ValueError(f"config.weight_norm is {config['weight_norm']}")


def check_network(about, tensors, graph):
    """ValueError unless description and tensors can be those of this float graph."""
    nodes = {node.name: node for node in graph.graph.nodes}
    _check_plan(about["plan"], nodes)
    _check_quantizers(about["quantizers"], about["plan"], nodes)
    _check_image_shape(about["image_shape"], graph)
    expected = {name: tensor for name, tensor in graph.state_dict().items()
                if not name.startswith(PREFIX)}
    for name, saved in about["layers"].items():
        target = nodes[name].target if name in nodes else None
        weight, bias = (expected.pop(f"{target}.{kind}", None) for kind in ("weight", "bias"))
        if weight is None or name not in about["plan"]["reads"]:
            raise ValueError(f"{name} is no layer of the network")
        _check_layer(target, {**saved, "layer": name}, tensors, weight, bias)
        for kind in ("weight", "weight_scale", "weight_zero_point", "bias"):
            tensors = {k: v for k, v in tensors.items() if k != f"{target}.{kind}"}
    if tensors.keys() != expected.keys():
        names = ", ".join(sorted(tensors.keys() ^ expected.keys()))
        raise ValueError(f"it has tensors of its own or too few: {names}")
    for name, tensor in tensors.items():
        _check_tensor(name, tensor, [expected[name].dtype], expected[name].shape)
        if tensor.isnan().any() or (name.endswith("running_var") and (tensor < 0).any()):
            raise ValueError(f"{name} holds NaN or variances below zero")


def _check_plan(plan, nodes):
    named = [*plan["stores"], *plan["reads"], *plan["reads"].values(), *plan["sources"],
             *plan["sources"].values(), *plan["first"], *plan["last"], *plan["floats"]]
    strangers = [name for name in named if name not in nodes]
    if strangers or not {*plan["first"], *plan["last"]} <= plan["reads"].keys():
        raise ValueError(f"the plan names {strangers[:1] or 'other layers'}, not of the network")


def _check_image_shape(shape, graph):
    """A layer that reads the image has as many channels."""
    readers = [user for node in graph.graph.nodes if node.op == "placeholder"
               for user in node.users if user.op == "call_module"]
    layers = [graph.get_submodule(node.target) for node in readers]
    channels = {layer.in_channels for layer in layers if isinstance(layer, nn.Conv2d)}
    if shape is not None and channels and (len(shape) != 3 or channels != {shape[0]}):
        raise ValueError(f"image_shape is {shape}, and the network reads {channels} channels")


def _check_quantizers(quantizers, plan, nodes):
    """Each rounds a value that is there before it, and is called after it."""
    known, names = set(nodes), [one["name"] for one in quantizers]
    for one in quantizers:
        q, edge = check_qparams(one, one["target"]), one["target"].removeprefix(PREFIX)
        check_values(torch.tensor(float(one["scale"])), one["zero_point"], q, one["target"])
        narrow = [f"{value}_{q.bits}bit" for value in plan["reads"].values()]
        is_edge = one["target"] == PREFIX + edge and (edge == one["reads"] or edge in narrow)
        if not is_edge or one["name"] in known or not {one["reads"], one["behind"]} <= known:
            raise ValueError(f"quantizer {one['target']} stands where there is no such value")
        if not {*one["readers"]} <= {*nodes, *names}:
            raise ValueError(f"quantizer {one['target']} has readers that the network lacks")
        known.add(one["name"])
    if len({one["target"] for one in quantizers}) < len(quantizers):
        raise ValueError("two quantizers have one name")


def check_qparams(saved, where):
    """QParams with the codes of `saved`, of scale 1; ValueError for no codes."""
    qmin, qmax = saved["qmin"], saved["qmax"]
    if not -128 <= qmin <= 0 < qmax <= 255:
        raise ValueError(f"{where} has codes from {qmin} to {qmax}")
    q = QParams(torch.ones(()), torch.zeros(()), qmin, qmax, saved.get("axis"))
    if not MIN_BITS <= q.bits <= MAX_BITS:
        raise ValueError(f"{where} has codes from {qmin} to {qmax}")
    return q


def check_values(scale, zero_point, q, where):
    """ValueError for a scale that is no positive normal number or a zero-point that is no code."""
    if not ((scale >= SCALES[0]) & (scale <= SCALES[1])).all():
        raise ValueError(f"{where} has a scale that is not positive and finite")
    low, high = ((f(zero_point) for f in (torch.min, torch.max))
                 if isinstance(zero_point, torch.Tensor) else (zero_point, zero_point))
    if not q.qmin <= low <= high <= q.qmax:
        raise ValueError(f"{where} has a zero-point outside its codes {q.qmin}..{q.qmax}")


def _check_layer(target, saved, tensors, weight, bias):
    name, q = saved["layer"], check_qparams(saved, saved["layer"])
    if saved["shape"] != list(weight.shape) or not (q.axis is None or 0 <= q.axis < weight.dim()):
        raise ValueError(f"the weight of {name} has another shape or axis")
    each = () if q.axis is None else (weight.shape[q.axis],)
    scale, zero_point, stream, found = (
        tensors.get(f"{target}.{kind}")
        for kind in ("weight_scale", "weight_zero_point", "weight", "bias"))
    _check_tensor(f"{target}.weight_scale", scale, [torch.float32], each)
    if zero_point is not None:
        _check_tensor(f"{target}.weight_zero_point", zero_point, [torch.int32], each)
    check_values(scale, 0 if zero_point is None else zero_point, q, name)
    size = -(-weight.numel() * q.bits // 8)
    _check_tensor(f"{target}.weight", stream, [torch.uint8], (size,))
    codes = unpack(stream, q.bits, weight.numel())
    if len(codes) and codes.max() > q.qmax - q.qmin:
        raise ValueError(f"the weight of {name} has codes outside {q.qmin}..{q.qmax}")
    if (bias is None) != (found is None):
        raise ValueError(f"{name} has a bias on one side only")
    if bias is not None:
        _check_tensor(f"{target}.bias", found, [torch.int32, torch.float32], bias.shape)
        if not found.isfinite().all():
            raise ValueError(f"the bias of {name} is not finite")


def _check_tensor(name, tensor, dtypes, shape):
    if tensor is None or tensor.dtype not in dtypes or tensor.shape != torch.Size(shape):
        found = "missing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
        raise ValueError(f"{name} is {found}, not {dtypes[0]} {list(shape)}")
