"""Checkpoints: safetensors with a JSON card each, never a pickle.

    model = load_model("resnet20", checkpoint="checkpoint/resnet20-cifar10-jpeg.safetensors")
"""

import dataclasses
import datetime
import json
import pathlib
import platform

import safetensors
import safetensors.torch
import torch
from torch import nn

from quantlab.evaluate import evaluate
from quantlab.networks.architectures import build
from quantlab.networks.cards import TRAIN_COMMAND, Card, card_path, load_card
from quantlab.system.errors import UserError, checked, one_line
from quantlab.system.files import root, save_tensors, sha256, write_text
from quantlab.system.machine import device_name


def software():
    """Versions that a number may depend on."""
    return {"python": platform.python_version(), "torch": torch.__version__}


@torch.no_grad()
def round_to_half(model):
    """Round float32 weights and statistics to half precision in place.

    Returns False, and does nothing, where one would overflow.
    """
    values = [value for value in model.state_dict().values() if value.dtype == torch.float32]
    if not all(torch.isfinite(value.half()).all() for value in values):
        return False
    for value in values:
        value.copy_(value.half())
    return True


def save_checkpoint(
    model, path, data, *, architecture, result, heldout=None, recipe=None, history=(), half=False,
    source="quantlab train",
):
    """Write the weights of `model` (contiguous, on the CPU) and its card; return the card.

    result, heldout: its Evaluation on data.test and data.heldout. half: store float32 tensors in
    half precision (`round_to_half` first).
    """
    path = pathlib.Path(path)
    tensors = model.state_dict()
    if half:
        tensors = {k: v.half() if v.dtype == torch.float32 else v for k, v in tensors.items()}
    save_tensors(path, tensors, {"architecture": architecture})
    card = Card(
        architecture=architecture, num_outputs=_head(model).out_features,
        trained_on=data.name, data_fingerprint=data.fingerprint, classes=data.classes,
        mean=data.test.mean, std=data.test.std, recipe=recipe or {}, history=tuple(history),
        test_top1=result.top1, n_test=result.n, heldout_top1=heldout.top1 if heldout else None,
        sha256=sha256(path), software=software(), hardware=device_name(), source=source,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )
    write_text(card_path(path), json.dumps(dataclasses.asdict(card), indent=1) + "\n")
    return card


def _head(model):
    return [module for module in model.modules() if isinstance(module, nn.Linear)][-1]


@checked
def load_model(name, checkpoint=None, num_classes=10):
    """Build a network in eval mode and load its weights.

    name: a key of ARCHITECTURES. checkpoint: path of a .safetensors file with its card, or None for
    random weights. Raises UserError for an unknown name, a damaged file, or a checkpoint of
    another architecture.
    """
    if checkpoint is None:
        return build(name, num_classes).float().eval()
    from quantlab.networks.imported import check_values

    card = load_card(checkpoint, name)
    model = build(name, card.num_outputs).float()  # whatever torch's default dtype is
    try:
        state = safetensors.torch.load_file(checkpoint)
        state = {k: v.float() if v.dtype == torch.float16 else v for k, v in state.items()}
        check_values(state, model)
        model.load_state_dict(state)
    except (safetensors.SafetensorError, RuntimeError, ValueError) as error:
        reason = one_line(str(error).splitlines()[-1].strip())
        raise UserError(f"checkpoint {checkpoint} does not fit {name}: {reason}") from None
    return model.eval()


@checked
def find_checkpoint(model, data):
    """Path of the checkpoint trained on this Dataset's name, else of that for cifar10-jpeg where
    the classes are the same; else None.
    """
    for name in (data.name, "cifar10-jpeg"):
        path = root() / "checkpoint" / f"{model}-{name}.safetensors"
        if not (path.is_file() and card_path(path).is_file()):
            continue
        if name == data.name or tuple(load_card(path).classes) == tuple(data.classes):
            return path
    return None


@checked
def load_trained(name, data, checkpoint="auto"):
    """(model, card) of a checkpoint, by path or "auto" (find_checkpoint); says in one line which.

    Raises UserError where there is none, or none for these classes.
    """
    path = find_checkpoint(name, data) if checkpoint == "auto" else pathlib.Path(checkpoint)
    train = f"train one with: {TRAIN_COMMAND} --model {name} --data PATH"
    if path is None:
        folder = root() / "checkpoint"
        raise UserError(f"no checkpoint of {name} for {data.name} in {folder}; {train}")
    card = load_card(path)
    if card.num_outputs < len(data.classes):
        raise UserError(
            f"{path.name} has {card.num_outputs} outputs but {data.name} has "
            f"{len(data.classes)} classes; {train}"
        )
    if tuple(card.classes) != tuple(data.classes):
        raise UserError(
            f"{path.name} tells apart the classes {_some(card.classes)}; {data.name} has "
            f"{_some(data.classes)}: name its folders alike, or train a network on it"
        )
    if path.stem == f"{name}-{data.name}" and card.data_fingerprint != data.fingerprint:
        print(f"note: {path.name} was trained on other files than these under the name {data.name}")
    print(
        f"checkpoint: {path.name}, {card.test_top1:.2f} % on {card.n_test:,} test images of "
        f"{card.trained_on}, sha256 {card.sha256[:10]}"
    )
    return load_model(name, path), card


def _some(classes):
    return ", ".join([*classes[:3], "…"] if len(classes) > 3 else classes)


def import_checkpoint(file, architecture, out, data):
    """Write a user's state dict as safetensors with a card; return (model, card).

    It is read with weights_only, so that nothing in it is executed; bare or under "state_dict",
    "model" or "net", with or without the prefix "module.". A head with more outputs than classes is
    kept; evaluation looks at the first, one a class.
    """
    from quantlab.networks.imported import read

    model = read(file, architecture)
    result = evaluate(model, data.test)
    source = f"imported from {pathlib.Path(file).name}"
    card = save_checkpoint(
        model, out, data, architecture=architecture, result=result, source=source
    )
    return model, card
