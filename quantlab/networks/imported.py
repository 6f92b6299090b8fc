"""Weights from files that anyone may have written: checked before they are used.

    read("mine.pt", "resnet20")  # a network with the weights of a state dict
"""

import torch

from quantlab.networks.architectures import build
from quantlab.networks.card_fields import MOST_OUTPUTS
from quantlab.system.errors import UserError, one_line
from quantlab.system.files import check_regular


def check_values(state, model):
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


def read(file, architecture):
    """The network of a state dict; UserError where it is none, or of another architecture."""
    state = read_state_dict(file)
    head = state.get("fc.weight", state.get("linear.weight"))
    outputs = (*head.shape, 0)[0] if head is not None else 10
    if not 1 <= outputs <= MOST_OUTPUTS:
        raise UserError(f"{file} does not fit {architecture}: its last layer has the weight "
                        f"{list(head.shape)}, not [classes, features]")
    model = build(architecture, outputs)
    try:
        check_values(state, model)
        model.load_state_dict(state)
    except (RuntimeError, ValueError) as error:
        lines = str(error).splitlines()  # torch's first is a title
        reason = one_line(lines[min(1, len(lines) - 1)].strip())
        raise UserError(f"{file} does not fit {architecture}: {reason}") from None
    return model


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
