"""quantlab: post-training quantization by hand, in the open.

    import quantlab as ql

Every name below and every room (`ql.improving.reconstruct`) is loaded when it is first used, so
that the command line refuses a mistake before it has loaded torch.
"""

import importlib
import importlib.abc
import sys
import types

from quantlab.system.errors import UserError
from quantlab.system.files import root

_NAMES = {  # the core, then the rooms
    "affine": ["QParams", "choose_qparams", "dequantize", "fake_quantize", "quantize_tensor"],
    "config": ["QuantConfig"],
    "calibration": ["collect"],
    "quantized": ["QuantizedNetwork", "weight_bytes"],
    "ptq": ["quantize"],
    "evaluate": ["evaluate"],
    "system.comparing": ["paired_drop"],
    "images.datasets": ["limited", "load_data"],
    "networks.checkpoints": ["find_checkpoint", "load_card", "load_model", "load_trained"],
    "networks.recipe": ["TrainConfig"],
    "networks.train": ["train"],
    "improving.reconstruct": ["ReconstructConfig", "reconstruct"],
    "improving.tune": ["TuneConfig", "tune_end_to_end"],
    "improving.equalization": ["equalize"],
    "improving.corrections": ["correct_bias"],
    "integer.network": ["to_integer"],
    "export.onnx": ["export_onnx"],
    "export.packed": ["load_quantized", "save_quantized"],
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}
_ROOMS = ["analysis", "export", "images", "improving", "integer", "networks", "plots", "rivals"]

__all__ = ["UserError", "root", *_HOME]


def __getattr__(name):
    if name in _HOME:
        value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    elif name in _ROOMS:
        value = importlib.import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module 'quantlab' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__():
    return sorted([*globals(), *__all__, *_ROOMS])


class _Door(types.ModuleType):
    """Keeps `ql.evaluate` the function: a module's import would put the module in its place."""

    def __setattr__(self, name, value):
        if not (name in _HOME and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


class _RepairFirst(importlib.abc.MetaPathFinder):
    """Before torchvision is first imported, by whomever, makes it importable; finds nothing."""

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            from quantlab.system.machine import make_torchvision_importable

            sys.meta_path.remove(self)
            make_torchvision_importable()


sys.modules[__name__].__class__ = _Door
sys.meta_path.insert(0, _RepairFirst())
