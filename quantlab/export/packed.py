"""Packed low-bit checkpoints: a quantized network in one safetensors file, weights at 2 to 8 bits.

    save_quantized(qmodel, "model.safetensors")
    qmodel = load_quantized("model.safetensors", model)     # the float network, any weights
    qmodel = load_quantized("checkpoint/resnet20-cifar10-jpeg-w4a4.safetensors")    # with a card

    tensors    LAYER.weight        uint8, codes - qmin as one stream of bits (bits.py)
               LAYER.weight_scale  float32 [] or [C]
               LAYER.weight_zero_point  int32, only where one is not zero
               LAYER.bias          int32 codes at s_in * s_w, or float32 where it has none
               every other tensor of the network (unfolded BatchNorm, constants) as it is
    metadata   "quantlab", JSON: version, sha256, graph, config, plan, layers, quantizers,
               image_shape ([C, H, W] of the calibration images; null where they are not known)

Reading executes nothing: the graph is rebuilt from the caller's own model, the file only fills it.
"""

import dataclasses
import hashlib
import json
import pathlib

import pandas as pd
import safetensors
import torch
from torch import nn

from quantlab.affine import QParams, dequantize
from quantlab.config import QuantConfig
from quantlab.export import packed_schema as schema
from quantlab.export.bits import pack, unpack
from quantlab.graph import folded
from quantlab.networks.architectures import build
from quantlab.networks.cards import card_path, load_card
from quantlab.observers import OBSERVERS, observer_name
from quantlab.plan import Plan, make_plan
from quantlab.quantized import (
    PREFIX,
    QuantizedNetwork,
    add_quantizer,
    find_node,
    find_quantizer,
    weight_bytes,
)
from quantlab.system.contract import unsaid
from quantlab.system.errors import UserError, checked, one_line
from quantlab.system.files import check_regular, save_tensors
from quantlab.system.schema import check

# 1 had no plan: it was the one that make_plan decides; 2 had no image_shape; 3 hashed what modules
# print, which of some pools and of Upsample is not all
VERSION = 4

# ---- Save ----------------------------------------------------------------------------------------


@checked
def save_quantized(qmodel, path):
    """Write a QuantizedNetwork as one packed safetensors file, atomically; return its bytes.

    Raises UserError when a weight is not the value of one of its codes, so that what is loaded is
    always exactly what was saved.
    """
    if not isinstance(qmodel, QuantizedNetwork):
        raise UserError(
            f"{type(qmodel).__name__} is not a quantized network; "
            "make one with quantize(model, stats, config)")
    tensors, about = _content(qmodel)
    about["sha256"] = _checksum(tensors, about)
    save_tensors(path, tensors, {"quantlab": json.dumps(about)})
    return pathlib.Path(path).stat().st_size


def _content(qmodel):
    """(tensors, description) of a QuantizedNetwork, as they stand in its file."""
    tensors = {k: v for k, v in qmodel.state_dict().items() if not k.startswith(PREFIX)}
    layers = {}
    for name, layer in qmodel.layers.items():
        if hasattr(layer, "weight_qparams"):
            q, target = layer.weight_qparams, find_node(qmodel, name).target
            tensors |= {f"{target}.{k}": v for k, v in _pack_layer(qmodel, name, q).items()}
            shape = list(layer.weight.shape)
            layers[name] = {"qmin": q.qmin, "qmax": q.qmax, "axis": q.axis, "shape": shape}
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    config = dataclasses.asdict(qmodel.config)
    config["observer"] = observer_name(qmodel.config.observer)
    about = {
        "version": VERSION, "config": config, "plan": _plan_fields(qmodel.plan),
        "layers": layers, "quantizers": _quantizers(qmodel), "graph": structure_hash(qmodel),
        "image_shape": qmodel.meta.get("image_shape")}
    return tensors, json.loads(json.dumps(about, default=sorted))  # sets become lists, in one order


def _plan_fields(plan):
    """A plan as it stands in a file; why an operation has no integer form is known from the graph.
    """
    return dataclasses.asdict(plan) | {"floats": list(plan.floats)}


def _pack_layer(qmodel, name, q):
    """What the file holds of a layer: weight, weight_scale and, where they have codes, the rest."""
    tensors = {"weight": pack(qmodel.codes(name) - q.qmin, q.bits), "weight_scale": q.scale}
    if q.zero_point.any():
        tensors["weight_zero_point"] = q.zero_point
    bias = qmodel.bias_codes(name)
    return tensors if bias is None else tensors | {"bias": bias}


def _quantizers(qmodel):
    """Every Quantizer in order: its node, the node before it, what it reads, who reads it, q."""
    return [
        {"target": node.target, "name": node.name, "behind": node.prev.name,
         "reads": node.args[0].name, "readers": sorted(user.name for user in node.users),
         "scale": q.scale.item(), "zero_point": q.zero_point.item(), "qmin": q.qmin,
         "qmax": q.qmax}
        for node, q in qmodel.quantizer_nodes.items()
    ]


def structure_hash(graph, version=VERSION):
    """sha256 of what a network is without its Quantizers and the values of its tensors: nodes,
    arguments, settings of modules, shapes.
    """
    names, digest = {}, hashlib.sha256()
    for node in graph.graph.nodes:
        if find_quantizer(graph, node) is not None:
            names[node] = names[node.args[0]]
            continue
        names[node] = node.name
        module = graph.get_submodule(node.target) if node.op == "call_module" else None
        arguments = torch.fx.node.map_arg((node.args, node.kwargs), names.get)
        target = node.target if isinstance(node.target, str) else node.target.__name__
        settings = f"{module}{unsaid(module) if version > 3 else ''}"
        digest.update(f"{node.op} {node.name} {target} {arguments} {settings}\n".encode())
    for name, tensor in graph.state_dict().items():
        if not name.startswith(PREFIX):
            digest.update(f"{name} {list(tensor.shape)}\n".encode())
    return digest.hexdigest()


def _checksum(tensors, about):
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


# ---- Load ----------------------------------------------------------------------------------------


@checked
@torch.no_grad()
def load_quantized(path, model=None):
    """The QuantizedNetwork of a packed file, bit for bit the one that was saved.

    model: the float network it was made from; its architecture is needed, its weights are not used.
    None: that of the card beside the file (networks/cards.py). The result lies on its device.
    Raises UserError for a file that is damaged, of a newer version, no packed checkpoint, of
    another architecture, or with values that no quantized network has.
    """
    tensors, about = _read(path)
    model = _named_by_card(path) if model is None else model
    graph = folded(model)
    graph = torch.fx.GraphModule(graph, graph.graph)  # modules in order, as saved
    device = next(graph.parameters()).device
    graph.cpu()
    try:
        about = _upgraded(path, about, graph)
        check(about, schema.SCHEMA, "description")
        config = _config(path, about["config"])
        if structure_hash(graph) != about["graph"]:
            raise UserError(
                f"{path} was saved from another network than this {type(model).__name__}: "
                f"{_first_difference(graph, about['layers'])}")
        schema.check_network(about, tensors, graph)
        network = _build(graph, tensors, about, config)
    except ValueError as error:
        raise UserError(
            f"{path} holds no quantized network: {one_line(error)}; save it again") from None
    for layer in network.layers.values():
        if hasattr(layer, "weight_qparams"):
            layer.weight_qparams = layer.weight_qparams.to(device)
    return network.to(device)


def _named_by_card(path):
    """A network, untrained, of the architecture that the card of a packed file names."""
    if not card_path(path).is_file():
        raise UserError(f"{path} has no card that names its network; give the float network, too: "
                        "load_quantized(path, model)")
    card = load_card(path)
    return build(card.architecture, card.num_outputs).float().eval()


def _build(graph, tensors, about, config):
    """The network of a description and tensors that the schema allows; ValueError unless it would
    be saved as just these.
    """
    sets = {name: frozenset(about["plan"][name]) for name in ("first", "last")}
    why = make_plan(graph).floats
    if strange := [name for name in about["plan"]["floats"] if name not in why]:
        raise ValueError(f"{strange[0]} is no operation without an integer form")
    floats = {name: why[name] for name in about["plan"]["floats"]}
    plan = Plan(**about["plan"] | sets | {"floats": floats})
    _insert_quantizers(graph, about["quantizers"])
    values = dict(tensors)
    try:
        network = QuantizedNetwork.of(graph, plan, config)
        if about["image_shape"] is not None:
            network.meta["image_shape"] = tuple(about["image_shape"])
        config.check_layers(plan, list(network.layers))
        for name, saved in about["layers"].items():
            _unpack_layer(network, name, values, saved)
        quantizers = network.get_submodule("quantizers").state_dict(prefix=PREFIX)
        network.load_state_dict(values | quantizers)
        again, description = _content(network)
    except (RuntimeError, UserError) as error:  # a Quantizer in front of what it reads
        raise ValueError(str(error).splitlines()[0]) from None
    differing = [name for name in description if description[name] != about[name]]
    differing += [name for name in tensors if not _same(tensors[name], again.get(name))]
    if differing or again.keys() != tensors.keys():
        raise ValueError(f"its {', '.join(differing) or 'tensors'} would be saved otherwise")
    return network


def _same(a, b):
    return b is not None and a.dtype == b.dtype and torch.equal(a, b)


def _unpack_layer(network, name, tensors, saved):
    """Put weight and bias of a layer into `tensors` in place of their codes; give it its q."""
    layer, target = network.layers[name], find_node(network, name).target
    scale = tensors.pop(f"{target}.weight_scale")
    zero_point = torch.zeros_like(scale, dtype=torch.int32)
    zero_point = tensors.pop(f"{target}.weight_zero_point", zero_point)
    q = QParams(scale, zero_point, saved["qmin"], saved["qmax"], saved["axis"])
    layer.weight_qparams = q
    codes = unpack(tensors[f"{target}.weight"], q.bits, layer.weight.numel()) + q.qmin
    tensors[f"{target}.weight"] = dequantize(codes.view(layer.weight.shape), q)
    bias = tensors.get(f"{target}.bias")
    if bias is not None and not bias.is_floating_point():
        scale = network.bias_scale(name)
        if scale is None:
            raise ValueError(f"the bias of {name} has codes, but the layer reads none")
        tensors[f"{target}.bias"] = (bias.double() * scale).float()


def _read(path):
    """(tensors, description) of a packed file, version and checksum verified."""
    again = "save it again"
    check_regular(path)
    try:
        with safetensors.safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get("quantlab")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise UserError(f"{path} not found; write one with save_quantized(qmodel, path)") from None
    except (safetensors.SafetensorError, OSError) as error:
        what = f"is damaged or no safetensors file ({str(error)[:100]})"
        raise UserError(f"{path} {what}; {again}") from None
    if text is None:
        raise UserError(
            f"{path} is not a packed quantized network; write one with "
            "save_quantized(qmodel, path), or use load_model")
    try:
        about = json.loads(text)
        version, checksum = about["version"], about.pop("sha256")
        check(version, int, "version")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(
            f"{path} is damaged: its description cannot be read; {again}") from None
    if version not in range(1, VERSION + 1):
        raise UserError(
            f"{path} has format version {str(version)[:20]}, this quantlab reads 1 to {VERSION}; "
            "update quantlab or save the file again")
    if _checksum(tensors, about) != checksum:
        raise UserError(f"{path} is damaged: its content does not match its checksum; {again}")
    return tensors, about


def _upgraded(path, about, graph):
    """A description as version 4 has it; settings of version 1 that are gone are refused where they
    matter.
    """
    check(about.get("config"), dict, "config")
    config = dict(about["config"])
    if about["version"] == 1:
        plan = json.loads(json.dumps(_plan_fields(make_plan(graph)), default=sorted))
        about = {"plan": plan, **about}
        config.pop("act_signed", None)  # it only chose the Quantizers, which the file holds
        for name, only in {"placement": "fused", "fold_batchnorm": None}.items():
            if config.pop(name, only) != only:
                raise UserError(
                    f"{path} was saved with another {name} than {only!r}, which this quantlab "
                    "cannot read; quantize the network again")
    if about["version"] < 3:
        about = {"image_shape": None, **about}
    if about["version"] < 4 and structure_hash(graph, 3) == about.get("graph"):
        about = about | {"graph": structure_hash(graph)}
    return about | {"config": config, "version": VERSION}


def _config(path, config):
    """The QuantConfig of a file's settings."""
    if unknown := ", ".join(config.keys() - schema.CONFIG.keys()):
        raise UserError(
            f"{path} was saved with a setting that this quantlab does not know ({unknown[:100]!r});"
            " update quantlab")
    schema.check_config(config)
    observer = config["observer"]
    if observer not in OBSERVERS:
        observer = _unknown_observer(observer)
    try:
        return QuantConfig(**config | {"observer": observer})
    except UserError as error:
        raise ValueError(str(error)) from None


def _unknown_observer(name):
    def observer(stats, bits, symmetric):
        raise UserError(
            f"this network was loaded from a file; its observer {name!r} is a function that the "
            "file does not hold")

    observer.__name__ = name
    return observer


def _first_difference(graph, layers):
    for name, saved in layers.items():
        node = next((n for n in graph.graph.nodes if n.name == name), None)
        if node is None or node.op != "call_module":
            return f"layer {name} is missing here"
        shape = list(graph.get_submodule(node.target).weight.shape)
        if shape != saved["shape"]:
            return f"the weight of {name} is {saved['shape']} there and {shape} here"
    return "other operations or settings; build it as it was when it was saved"


def _insert_quantizers(graph, saved):
    """Put the Quantizers back where they stood, in the same order."""
    graph.add_module("quantizers", nn.Module())
    nodes = {n.name: n for n in graph.graph.nodes}
    value = dict(nodes)  # name -> the float graph's node whose value it stands for
    for one in saved:
        zero_point = torch.tensor(one["zero_point"], dtype=torch.int32)
        q = QParams(torch.tensor(one["scale"]), zero_point, one["qmin"], one["qmax"])
        edge = one["target"].removeprefix(PREFIX)
        nodes[one["name"]] = add_quantizer(graph, nodes[one["behind"]], edge, q)
        nodes[one["name"]].args = (nodes[one["reads"]],)  # often, but not always, the one before it
        value[one["name"]] = value[one["reads"]]
    added = {one["name"] for one in saved}
    for one in saved:
        for reader in set(one["readers"]) - added:
            nodes[reader].replace_input_with(value[one["name"]], nodes[one["name"]])


# ---- How large -----------------------------------------------------------------------------------


def file_sizes(networks, folder):
    """Write networks (name -> quantized or float) into `folder`; name, file_bytes, weight_bytes.

    A float network is written as its float32 state dict. What a file has beyond weight_bytes is
    names, alignment and the description.
    """
    rows = []
    for name, network in networks.items():
        path = pathlib.Path(folder) / f"{name}.safetensors"
        if isinstance(network, QuantizedNetwork):
            save_quantized(network, path)
        else:
            save_tensors(path, network.state_dict(), {})
        n_bytes = path.stat().st_size
        rows.append({"name": name, "file_bytes": n_bytes, "weight_bytes": weight_bytes(network)})
    return pd.DataFrame(rows)
