"""Finished units of a reconstruction on disk, so that a run that was stopped goes on."""

import dataclasses
import hashlib
import json
import pathlib

import safetensors
import torch

from quantlab.observers import observer_name
from quantlab.system.errors import UserError
from quantlab.system.files import save_tensors


def unit_tensors(qmodel, unit):
    """Everything of a unit that learning changes: name -> tensor, the network's own."""
    steps = {node.name: q.scale for node, q in qmodel.quantizer_nodes.items()}
    found = {f"{name}.scale": steps[name] for name in unit.nodes if name in steps}
    layers = qmodel.layers
    for name in unit.layers:
        layer = layers[name]
        if hasattr(layer, "weight_qparams"):  # else it stays float, and nothing is learned
            found[f"{name}.weight"] = layer.weight
            found[f"{name}.weight_scale"] = layer.weight_qparams.scale
            if layer.bias is not None:
                found[f"{name}.bias"] = layer.bias
    return {key: tensor.detach() for key, tensor in found.items()}


@torch.no_grad()
def load_unit(qmodel, unit, tensors):
    """Put back what unit_tensors gave."""
    for key, tensor in unit_tensors(qmodel, unit).items():
        tensor.copy_(tensors[key])


class State:
    """The finished units of a run in a safetensors file, written anew after each; refuses one of
    other settings.
    """

    def __init__(self, path, images, config, learning, graph_hash):
        self.path = path and pathlib.Path(path)
        self.rows, self.tensors = [], {}
        settings = dataclasses.asdict(config) | {"observer": observer_name(config.observer)}
        settings |= {f"learning.{k}": v for k, v in dataclasses.asdict(learning).items()}
        del settings["learning.max_cache_bytes"]  # where activations lie changes nothing
        settings |= {"network": graph_hash[:16], "n_images": len(images)}
        settings["images"] = hashlib.sha256(images.cpu().contiguous().numpy()).hexdigest()[:16]
        self.settings = json.loads(json.dumps(settings))  # as it is read back: tuples are lists
        if self.path and self.path.exists():
            self._read()

    def _read(self):
        try:
            with safetensors.safe_open(self.path, "pt") as file:
                metadata = file.metadata() or {}
                self.tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
            there, self.rows = json.loads(metadata["settings"]), json.loads(metadata["rows"])
        except (safetensors.SafetensorError, KeyError, ValueError):
            raise UserError(
                f"{self.path} is no state of a reconstruction; delete it or name another file"
            ) from None
        other = [
            f"{key} {there.get(key)!r} there, {value!r} now"
            for key, value in self.settings.items() if there.get(key) != value]
        if other:
            raise UserError(
                f"{self.path} was made with other settings ({'; '.join(other)}); "
                "use those, delete it or name another file")

    def restore(self, qmodel, unit):
        load_unit(qmodel, unit, self.tensors)

    def add(self, qmodel, unit, rows):
        if self.path:
            found = unit_tensors(qmodel, unit)
            self.tensors |= {key: tensor.cpu().clone() for key, tensor in found.items()}
            self.rows = rows
            metadata = {"settings": json.dumps(self.settings), "rows": json.dumps(rows)}
            save_tensors(self.path, self.tensors, metadata)
