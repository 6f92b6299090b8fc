"""Packed low-bit checkpoints: a quantized network in one safetensors file, its weights at 2 to 8 bits each and nothing wasted.

    save_quantized(qmodel, "model.safetensors")
    qmodel = load_quantized("model.safetensors", model)     # `model`: the float network, any weights

    tensors    LAYER.weight        uint8, codes - qmin as one stream of bits, least significant first
               LAYER.weight_scale  float32 [] or [C]; LAYER.weight_zero_point int32, only where one is not zero
               LAYER.bias          int32 codes at s_in * s_w, or float32 where the network keeps it so
               every other tensor of the network (BatchNorm that could not be folded, constants) as it is
    metadata   "quantlab", JSON: version, sha256, graph, config, layers, quantizers

Reading executes nothing: the graph is rebuilt from the caller's own model, and the file only fills it.
"""

import dataclasses
import hashlib
import json
import pathlib

import pandas as pd
import safetensors
import safetensors.torch
import torch

from quantlab.affine import QParams, dequantize
from quantlab.graph import folded
from quantlab.config import QuantConfig
from quantlab.export.codes import bias_codes, bias_unit, pack, unpack, weight_codes
from quantlab.observers import OBSERVERS, observer_name
from quantlab.plan import make_plan
from quantlab.ptq import layers
from quantlab.quantized import Quantizer, QuantizedNetwork, find_node, weight_bytes
from quantlab.system.errors import UserError
from quantlab.system.files import save_tensors

VERSION = 1

# ---- Save -------------------------------------------------------------------------------------------------------------------


def save_quantized(qmodel, path):
    """Write a quantized network (of `quantize`, corrected or not) as one packed safetensors file, atomically; return the file's bytes.

    Raises UserError when a weight is not the value of one of its codes, so that what is loaded is always exactly what was saved.
    """
    if not hasattr(qmodel, "plan"):
        raise UserError(f"{type(qmodel).__name__} is not a quantized network; make one with quantize(model, stats, config)")
    tensors = {k: v for k, v in qmodel.state_dict().items() if not k.startswith("quantizers.")}
    packed_layers = {}
    for name in layers(qmodel):
        node = find_node(qmodel, name)
        layer = qmodel.get_submodule(node.target)
        if not hasattr(layer, "weight_qparams"):
            continue  # left in float
        q, codes = layer.weight_qparams.to("cpu"), bias_codes(layer, bias_unit(qmodel, node))
        tensors[f"{node.target}.weight"] = pack(weight_codes(layer) - q.qmin, q.bits)
        tensors[f"{node.target}.weight_scale"] = q.scale
        if q.zero_point.any():
            tensors[f"{node.target}.weight_zero_point"] = q.zero_point
        if codes is not None:
            tensors[f"{node.target}.bias"] = codes
        packed_layers[name] = {"qmin": q.qmin, "qmax": q.qmax, "axis": q.axis, "shape": list(layer.weight.shape)}
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    config = dataclasses.asdict(qmodel.config) | {"observer": observer_name(qmodel.config.observer)}
    about = {"version": VERSION, "config": config, "layers": packed_layers, "quantizers": _quantizers(qmodel), "graph": graph_hash(qmodel)}
    save_tensors(path, tensors, {"quantlab": json.dumps(about | {"sha256": _checksum(tensors, about)})})
    return pathlib.Path(path).stat().st_size


def _quantizers(qmodel):
    """Every quantizer in order: its node, the node before it in the graph, what it reads, who reads it, and its parameters."""
    return [
        {"target": n.target, "name": n.name, "behind": n.prev.name, "reads": n.args[0].name, "readers": sorted(u.name for u in n.users),
         "scale": q.scale.item(), "zero_point": q.zero_point.item(), "qmin": q.qmin, "qmax": q.qmax}
        for n in qmodel.graph.nodes if n.op == "call_module" and isinstance(q := qmodel.get_submodule(n.target), Quantizer)
    ]


def graph_hash(graph):
    """sha256 of what a network is without its quantizers and the values of its tensors: nodes, arguments, settings of modules, shapes."""
    names, digest = {}, hashlib.sha256()
    for node in graph.graph.nodes:
        module = graph.get_submodule(node.target) if node.op == "call_module" else None
        if isinstance(module, Quantizer):
            names[node] = names[node.args[0]]
            continue
        names[node] = node.name
        arguments = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: names[n])
        target = node.target if isinstance(node.target, str) else node.target.__name__
        digest.update(f"{node.op} {node.name} {target} {arguments} {module}\n".encode())
    for name, tensor in graph.state_dict().items():
        digest.update(b"" if name.startswith("quantizers.") else f"{name} {list(tensor.shape)}\n".encode())
    return digest.hexdigest()


def _checksum(tensors, about):
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.numpy())
    return digest.hexdigest()


# ---- Load -------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def load_quantized(path, model):
    """The quantized network of a packed file: a torch.fx.GraphModule whose logits are bit for bit those of the one that was saved.

    model: the float network it was made from; its architecture is needed, its weights are not used. The result lies on its device.
    Raises UserError for a file that is damaged, of a newer version, no packed checkpoint, or of another architecture.
    """
    tensors, about = _read(path)
    config = _current(path, about["config"])
    graph = folded(model)
    plan = make_plan(graph)
    if graph_hash(graph) != about["graph"]:
        raise UserError(f"{path} was saved from another network than this {type(model).__name__}: {_first_difference(graph, about)}")
    where = next(graph.parameters()).device
    _insert_quantizers(graph.cpu(), about["quantizers"])
    for name, saved in about["layers"].items():
        node = find_node(graph, name)
        layer = graph.get_submodule(node.target)
        scale = tensors.pop(f"{node.target}.weight_scale")
        zero_point = tensors.pop(f"{node.target}.weight_zero_point", torch.zeros_like(scale, dtype=torch.int32))
        q = QParams(scale, zero_point, saved["qmin"], saved["qmax"], saved["axis"])
        layer.weight_qparams = q.to(where)
        codes = unpack(tensors[f"{node.target}.weight"], q.bits, layer.weight.numel()) + q.qmin
        tensors[f"{node.target}.weight"] = dequantize(codes.view(layer.weight.shape), q)
        if layer.bias is not None and not tensors[f"{node.target}.bias"].is_floating_point():
            tensors[f"{node.target}.bias"] = (tensors[f"{node.target}.bias"].double() * bias_unit(graph, node)).float()
    graph.load_state_dict(tensors | {k: v for k, v in graph.state_dict().items() if k.startswith("quantizers.")})
    graph.recompile()
    observer = config["observer"] if config["observer"] in OBSERVERS else _unknown_observer(config["observer"])
    try:
        config = QuantConfig(**config | {"observer": observer})
    except TypeError as error:
        raise UserError(f"{path} was saved with a setting that this quantlab does not know ({error}); update quantlab") from None
    return QuantizedNetwork.of(graph, plan, config).to(where)


def _current(path, config):
    """The settings of a file as they are named today; UserError for a placement that is gone."""
    gone = {"placement": "fused", "fold_batchnorm": None, "act_signed": False}
    for name, only in gone.items():
        if config.get(name, only) != only:
            raise UserError(f"{path} was saved with {name}={config[name]!r}, which this quantlab does not know")
    return {name: value for name, value in config.items() if name not in gone}


def _read(path):
    """(tensors, metadata) of a packed file, version and checksum verified."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get("quantlab")
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except FileNotFoundError:
        raise UserError(f"{path} not found; write one with save_quantized(qmodel, path)") from None
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or no safetensors file ({str(error)[:100]}); save it again") from None
    if text is None:
        raise UserError(f"{path} is not a packed quantized network; write one with save_quantized(qmodel, path), or use load_model")
    try:
        about = json.loads(text)
        version, checksum = about["version"], about.pop("sha256")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is damaged: its description cannot be read; save it again") from None
    if version != VERSION:
        raise UserError(f"{path} has format version {version}, this quantlab reads {VERSION}; update quantlab or save the file again")
    if _checksum(tensors, about) != checksum:
        raise UserError(f"{path} is damaged: its content does not match its checksum; save it again")
    return tensors, about


def _first_difference(graph, about):
    for name, saved in about["layers"].items():
        node = next((n for n in graph.graph.nodes if n.name == name), None)
        if node is None or node.op != "call_module":
            return f"layer {name} is missing here"
        if (shape := list(graph.get_submodule(node.target).weight.shape)) != saved["shape"]:
            return f"the weight of {name} is {saved['shape']} there and {shape} here"
    return "other operations or settings; build it as it was when it was saved"


def _insert_quantizers(graph, saved):
    """Put the Quantizers back where they stood, in the same order."""
    graph.add_module("quantizers", torch.nn.Module())
    nodes = {n.name: n for n in graph.graph.nodes}
    value = {name: name for name in nodes}  # node -> the node of the float graph whose value it rounds
    for one in saved:
        q = QParams(torch.tensor(one["scale"]), torch.tensor(one["zero_point"], dtype=torch.int32), one["qmin"], one["qmax"])
        graph.add_submodule(one["target"], Quantizer(q))
        with graph.graph.inserting_after(nodes[one["behind"]]):
            nodes[one["name"]] = graph.graph.create_node("call_module", one["target"], (nodes[one["reads"]],), name=one["name"])
        value[one["name"]] = value[one["reads"]]
    for one in saved:
        for reader in one["readers"]:
            if reader not in {other["name"] for other in saved}:
                nodes[reader].replace_input_with(nodes[value[one["name"]]], nodes[one["name"]])


def _unknown_observer(name):
    def observer(stats, bits, symmetric):
        raise UserError(f"this network was loaded from a file; its observer {name!r} is a function that the file does not hold")

    observer.__name__ = name
    return observer


# ---- How large --------------------------------------------------------------------------------------------------------------


def file_sizes(networks, folder):
    """Write every network (name -> quantized or float network) into `folder` and weigh it: a frame of name, file_bytes, weight_bytes.

    A float network is written as its float32 state dict. What a file has beyond weight_bytes is names, alignment and the description.
    """
    rows = []
    for name, network in networks.items():
        path = pathlib.Path(folder) / f"{name}.safetensors"
        if hasattr(network, "plan"):
            save_quantized(network, path)
        else:
            save_tensors(path, network.state_dict(), {})
        rows.append({"name": name, "file_bytes": path.stat().st_size, "weight_bytes": weight_bytes(network)})
    return pd.DataFrame(rows)
