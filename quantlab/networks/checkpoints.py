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
from quantlab.networks.cards import MOST_OUTPUTS, TRAIN_COMMAND, Card, card_path, load_card
from quantlab.system.errors import UserError
from quantlab.system.files import check_regular, root, save_tensors, sha256, write_text
from quantlab.system.machine import device_name
from quantlab.system.schema import one_line


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


def load_model(name, checkpoint=None, num_classes=10):
    """Build a network in eval mode and load its weights.

    name: a key of ARCHITECTURES. checkpoint: path of a .safetensors file with its card, or None for
    random weights. Raises UserError for an unknown name, a damaged file, or a checkpoint of
    another architecture.
    """
    if checkpoint is None:
        return build(name, num_classes).eval()
    card = load_card(checkpoint, name)
    model = build(name, card.num_outputs)
    try:
        state = safetensors.torch.load_file(checkpoint)
        state = {k: v.float() if v.dtype == torch.float16 else v for k, v in state.items()}
        _check_values(state, model)
        model.load_state_dict(state)
    except (safetensors.SafetensorError, RuntimeError, ValueError) as error:
        reason = one_line(str(error).splitlines()[-1].strip())
        raise UserError(f"checkpoint {checkpoint} does not fit {name}: {reason}") from None
    return model.eval()


def _check_values(state, model):
    """ValueError for tensors that would be loaded as other values than they hold."""
    own = model.state_dict()
    for name, tensor in state.items():
        if tensor.is_meta or tensor.layout != torch.strided or tensor.is_quantized:
            raise ValueError(f"{name} is a meta, sparse or quantized tensor")
        like = own.get(name)
        if like is not None and tensor.is_floating_point() != like.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}, not {like.dtype}")
        if not tensor.isfinite().all():
            raise ValueError(f"{name} holds values that are not finite")


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
    state = read_state_dict(file)
    head = state.get("fc.weight", state.get("linear.weight"))
    outputs = 10 if head is None else head.shape[0] if head.dim() else 0
    if not 1 <= outputs <= MOST_OUTPUTS:
        raise UserError(f"{file} does not fit {architecture}: its last layer has the weight "
                        f"{list(head.shape)}, not [classes, features]")
    model = build(architecture, outputs)
    try:
        _check_values(state, model)
        model.load_state_dict(state)
    except (RuntimeError, ValueError) as error:
        lines = str(error).splitlines()  # torch's first is a title
        reason = one_line(lines[min(1, len(lines) - 1)].strip())
        raise UserError(f"{file} does not fit {architecture}: {reason}") from None
    result = evaluate(model, data.test)
    source = f"imported from {pathlib.Path(file).name}"
    card = save_checkpoint(
        model, out, data, architecture=architecture, result=result, source=source
    )
    return model, card


def read_state_dict(file):
    """Name -> tensor of a state dict (.pt), bare or under "state_dict", "model" or "net", without
    the prefix "module."; nothing in it is executed. UserError where it holds none.
    """
    check_regular(file)
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{file} not found") from None
    except Exception as error:  # code in a pickle, a truncated zip, not a checkpoint: all refused
        reason = one_line((str(error).splitlines() or [type(error).__name__])[0], 100)
        raise UserError(
            f"{file} cannot be read as a state dict without executing code ({reason}); "
            "save it with torch.save(model.state_dict(), …)"
        ) from None
    for _ in range(4):  # a pickle may hold itself
        inner = _inner(state)
        state = state if inner is None else inner
    items = list(state.items()) if isinstance(state, dict) else [(0, 0)]
    named = all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in items)
    if not items or not named:
        raise UserError(
            f"{file} holds no state dict of tensors; "
            "save it with torch.save(model.state_dict(), …)"
        )
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def _inner(state):
    """What a training script keeps its state dict under; None where it is bare."""
    if not isinstance(state, dict):
        return None
    inner = (state.get(key) for key in ("state_dict", "model", "net"))
    return next((found for found in inner if isinstance(found, dict)), None)
