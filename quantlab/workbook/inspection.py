"""A network of one's own in the notebook inspect_network: found by name, checked, and analysed into
one HTML file.

    python -m quantlab inspect my_module:build_model --data DIR --size 224 --bits 4
"""

import importlib
import importlib.util
import os
import pathlib
import sys

from quantlab.images.files import SOURCES
from quantlab.system.errors import UserError
from quantlab.system.files import root, sha256
from quantlab.workbook import allowed
from quantlab.workbook.contents import digest

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NOTEBOOK = "inspect_network.ipynb"
PARTS = {"train", "test", "val"}
OTHER_NAMES = {"training", "testing", "valid", "validation"}


def inspect(target, data, out, *, size=224, mean=IMAGENET_MEAN, std=IMAGENET_STD, bits=4, n=256,
            weights=None, unlabelled=False):
    """Run the notebook on the network `target` and up to `n` images of `data` (a folder or a name
    of load_data), write it to the HTML file `out`, return its path.

    Raises UserError for what `import_model`, `check_outputs` and the data's reader refuse.
    """
    module, attribute = split_target(target)
    find_module(module)
    constants = {"mean": " ".join(map(str, mean)), "std": " ".join(map(str, std))}
    allowed.check(bits=bits, size=size, n=n, **constants)
    if data not in SOURCES:
        check_folder(data)

    from quantlab.workbook.run import execute, export_html, runs_folder

    parameters = {"target": target, "data": str(data), "weights": str(weights or ""), "bits": bits,
                  "size": size, "n": n, "unlabelled": unlabelled, **constants}
    executed = runs_folder() / f"inspect-{attribute}.ipynb"
    # in the folder where the command was typed, as its paths and the target's module are meant
    execute(root() / "notebooks" / NOTEBOOK, executed, parameters, folder=os.getcwd())
    return export_html(executed, pathlib.Path(out))


def split_target(target):
    """(module, attribute) of "module:attribute"."""
    module, _, attribute = target.partition(":")
    if not attribute.isidentifier():  # it becomes part of a file's name and of a page
        raise UserError(
            f"{target!r} names no function; write module:function, as in my_module:build_model")
    return module, attribute


def find_module(module):
    """The spec of a module that can be imported from the working directory, else UserError; imports
    nothing but the packages that it lies in.
    """
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # of the package that it would be in
        found = None
    if found is None:
        raise _not_found(module, module)
    return found


def module_hash(target):
    """Hash of the sources of the module, or the whole top package, of "module:attribute"."""
    module = split_target(target)[0]
    find_module(module)
    top = find_module(module.split(".")[0])
    files = [pathlib.Path(top.origin)] if top.origin else []
    for folder in map(pathlib.Path, top.submodule_search_locations or ()):
        files += folder.rglob("*.py")
    return digest(sorted([file.name, sha256(file)] for file in files if file.is_file()))


def _not_found(name, module):
    return UserError(f"module {name!r} was not found from {os.getcwd()}; "
                     f"run this where `import {module}` works")


def check_folder(path):
    """UserError for a folder of images of which the parts cannot be told: one of train/ and test/
    (or val/) without the other, or under another name; its images would become classes.
    """
    found = {place.name for place in pathlib.Path(path).glob("*") if place.is_dir()}
    if strange := sorted(n for n in found - PARTS if n.lower() in PARTS | OTHER_NAMES):
        raise UserError(f"{path} holds {strange[0]}/; call its parts train/ and test/ (or val/)")
    if found & PARTS and not ("train" in found and found & {"test", "val"}):
        there = ", ".join(f"{name}/" for name in sorted(found & PARTS))
        raise UserError(f"{path} holds {there} alone, not train/ with test/ or val/; name "
                        f"{pathlib.Path(path) / sorted(found & PARTS)[0]} to draw both parts from")


def import_model(target, weights=""):
    """The nn.Module that `module:name` is, builds or has for a class, in eval mode.

    weights: a .safetensors file or a state dict (.pt), from the working directory or the workbook;
    "": as it was built. UserError for what is not there, and for weights of another network.
    """
    from torch import nn

    module, attribute = split_target(target)
    find_module(module)
    try:
        found = getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        raise _not_found(error.name, module) from None
    except AttributeError:
        raise UserError(f"module {module} has no {attribute!r}") from None
    model = found() if callable(found) and not isinstance(found, nn.Module) else found
    if not isinstance(model, nn.Module):
        raise UserError(f"{target} gives a {type(model).__name__}, not a torch.nn.Module")
    if weights:
        _load_weights(model, target, weights)
    return model.eval()


def _load_weights(model, target, weights):
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from quantlab.networks.imported import read_state_dict

    file = weights if pathlib.Path(weights).exists() else root() / weights
    try:
        state = (load_file(file) if str(file).endswith(".safetensors") else read_state_dict(file))
        model.load_state_dict({name.removeprefix("module."): t for name, t in state.items()})
    except (SafetensorError, OSError, RuntimeError, UserError) as error:
        lines = str(error).splitlines()  # torch's first is a title
        reason = lines[min(1, len(lines) - 1)].strip()
        raise UserError(f"{weights} does not hold weights of {target}: {reason}") from None


def check_outputs(model, images, classes=()):
    """UserError unless the network makes logits [B, classes] of `images` (float32 [B, C, H, W]).

    classes: their names; of any number where there are none.
    """
    import torch

    try:
        with torch.no_grad():
            logits = model(images)
    except Exception as error:  # whatever a network of one's own says
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"the network does not take images {list(images.shape[1:])}: {reason}; "
                        "give the size in pixels that it wants, or wrap it") from None
    if not isinstance(logits, torch.Tensor) or logits.dim() != 2:
        shape = list(getattr(logits, "shape", []))
        raise UserError(f"the network returns {type(logits).__name__} {shape}, not logits "
                        "[B, classes]; wrap it so that it does")
    if classes and len(classes) != logits.shape[1]:
        raise UserError(f"the data has {len(classes)} classes, the network {logits.shape[1]} "
                        "outputs; pass --unlabelled (unlabelled = True) to leave accuracy out")
