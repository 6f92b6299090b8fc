"""Finished units of a reconstruction on disk, so that a run that was stopped goes on where it was."""

import dataclasses
import hashlib
import json
import pathlib

import safetensors
import torch

from quantlab.observers import observer_name
from quantlab.quantized import find_node, find_quantizer
from quantlab.system.errors import UserError
from quantlab.system.files import save_tensors


def unit_tensors(qmodel, unit):
    """Everything of a unit that learning changes: name -> tensor, the network's own where it is a parameter or buffer."""
    found = {}
    for name in unit.nodes:
        node = find_node(qmodel, name)
        module = qmodel.get_submodule(node.target) if node.op == "call_module" else None
        if find_quantizer(qmodel, node) is not None:
            found[f"{name}.scale"] = module.scale
        elif hasattr(module, "weight_qparams"):
            found |= {f"{name}.weight": module.weight, f"{name}.weight_scale": module.weight_qparams.scale}
            found |= {f"{name}.bias": module.bias} if module.bias is not None else {}
    return {k: v.detach() for k, v in found.items()}


@torch.no_grad()
def load_unit(qmodel, unit, tensors):
    """Put back what unit_tensors gave."""
    for name in unit.layers:
        layer = qmodel.get_submodule(find_node(qmodel, name).target)
        layer.weight_qparams = dataclasses.replace(layer.weight_qparams, scale=tensors[f"{name}.weight_scale"].clone())
    for key, tensor in unit_tensors(qmodel, unit).items():
        tensor.copy_(tensors[key])


class State:
    """The finished units of a run in a safetensors file, written anew after each; refuses one of other settings."""

    def __init__(self, path, images, config, how, graph_hash):
        self.path, self.rows, self.tensors = path and pathlib.Path(path), [], {}
        settings = dataclasses.asdict(config) | {f"how.{k}": v for k, v in dataclasses.asdict(how).items() if k != "max_cache_bytes"}
        settings |= {"observer": observer_name(config.observer), "network": graph_hash[:16], "n_images": len(images)}
        settings["images"] = hashlib.sha256(images.cpu().contiguous().numpy()).hexdigest()[:16]
        self.settings = json.loads(json.dumps(settings))
        if self.path and self.path.exists():
            self._read()

    def _read(self):
        try:
            with safetensors.safe_open(self.path, "pt") as file:
                metadata = file.metadata() or {}
                self.tensors = {k: file.get_tensor(k) for k in file.keys()}
            there, self.rows = json.loads(metadata["settings"]), json.loads(metadata["rows"])
        except (safetensors.SafetensorError, KeyError, ValueError):
            raise UserError(f"{self.path} is no state of a reconstruction; delete it or name another file") from None
        other = [f"{k} {there.get(k)!r} there, {v!r} now" for k, v in self.settings.items() if there.get(k) != v]
        if other:
            raise UserError(f"{self.path} was made with other settings ({'; '.join(other)}); use those, delete it or name another file")

    def restore(self, qmodel, unit):
        load_unit(qmodel, unit, self.tensors)

    def add(self, qmodel, unit, rows):
        if self.path:
            self.tensors |= {k: v.cpu().clone() for k, v in unit_tensors(qmodel, unit).items()}
            self.rows = rows
            save_tensors(self.path, self.tensors, {"settings": json.dumps(self.settings), "rows": json.dumps(rows)})
