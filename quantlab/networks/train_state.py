"""The state of an unfinished training, read: one that this run can go on from, or an error.

    place, tensors = read(run, path)
"""

import json

import safetensors.torch
import torch

from quantlab.system.errors import UserError, one_line
from quantlab.system.files import check_regular
from quantlab.system.schema import Between, Each, check


def read(run, path):
    """(place, tensors) of a state; UserError unless this run can go on from it."""
    advice = "or pass --restart to begin again"
    try:
        there, place, tensors = _read_state(path)
        asked = run.settings()
        differing = [k for k in {**there, **asked} if there.get(k) != asked.get(k)]
        if differing:
            shown = ", ".join(f"{k}: {there.get(k)} there, {asked.get(k)} asked for"
                              for k in differing)
            raise UserError(f"{path} was trained with other settings ({one_line(shown)}); "
                            f"use those, {advice}")
        _check_state(run, place, tensors)
    except ValueError as error:
        raise UserError(f"{path} is damaged; delete it {advice} ({one_line(error)})") from None
    return place, tensors


def _check_state(run, place, tensors):
    """ValueError unless place and tensors are of this run: all names, shapes and types."""
    last = run.steps_per_epoch
    check(place, {"step": Between(0, last, int), "seconds": Between(0, 1e12),
                  "history": [Each((int, float))]}, "place")
    if len(place["history"]) > run.config.epochs:
        raise ValueError(f"{len(place['history'])} epochs of {run.config.epochs}")
    expected = {**run.tensors(), "generator": run.generator.get_state()}
    momentum = {f"momentum.{name}": p for name, p in run.model.named_parameters()}
    if any(name in tensors for name in momentum):
        expected |= momentum
    if tensors.keys() != expected.keys():
        raise ValueError("tensors " + ", ".join(sorted(tensors.keys() ^ expected.keys())))
    for name, like in expected.items():
        if (tensors[name].shape, tensors[name].dtype) != (like.shape, like.dtype):
            raise ValueError(f"{name} is {tensors[name].dtype} {list(tensors[name].shape)}")
    try:
        kept = torch.Generator().set_state(tensors["generator"]).get_state()
    except RuntimeError as error:
        raise ValueError(str(error).splitlines()[0]) from None
    if not torch.equal(kept, tensors["generator"]):
        raise ValueError("generator is no state of a generator")


def _read_state(path):
    """(settings, place, tensors) of an unfinished run; ValueError where it is none."""
    check_regular(path)
    try:
        tensors = safetensors.torch.load_file(path)
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        settings, place = (json.loads(metadata[name]) for name in ("settings", "place"))
    except (safetensors.SafetensorError, OSError, KeyError, RecursionError) as error:
        raise ValueError(str(error)) from None
    check(settings, dict, "settings")
    return settings, place, tensors
