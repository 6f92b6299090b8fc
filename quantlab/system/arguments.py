"""What a public function may be given, by the names of its arguments, and a dataclass of settings,
by its type hints: one table of kinds, checked before anything runs.

    @checked                            # of system/errors.py: check_call before every call
    def evaluate(model, split, *, batch_size=100, verbose=False): ...

An argument whose default is True or False is one of the two, one whose default is a dataclass of
settings is another of its class. What is not named here, the function itself checks.
"""

import dataclasses
import functools
import inspect
import math
import numbers
import operator
import os
import typing

from quantlab.system.errors import UserError, one_line


def check_call(signature, kinds, args, kwargs):
    """UserError for an argument that is none; the TypeError of Python where the names do not fit.

    signature, kinds: of the function, as `kinds_of` gives them.
    """
    for name, value in signature.bind(*args, **kwargs).arguments.items():
        if name in kinds:
            kinds[name](value, name)


def kinds_of(function):
    """(its signature, argument -> kind) of a function."""
    signature = inspect.signature(function)
    kinds = {}
    for name, parameter in signature.parameters.items():
        kind = KINDS.get(f"{function.__name__}.{name}", KINDS.get(name))
        if isinstance(parameter.default, bool):
            kind = flag
        elif dataclasses.is_dataclass(parameter.default):
            kind = instance(type(parameter.default).__name__)
        if kind is not None:
            kinds[name] = kind
    return signature, kinds


def check_settings(settings, integer=None):
    """UserError unless every field of a dataclass is of its type: bool, int (at least 0, or what
    `integer` allows), float (finite, at least 0), str, tuple, or a dictionary of integers or None.
    """
    integer = integer or functools.partial(as_count, least=0)
    checks = {bool: flag, int: integer, float: number, str: instance("str"),
              tuple: instance("tuple", "list"), dict: functools.partial(_each, integer)}
    for name, hint in typing.get_type_hints(type(settings)).items():
        value, kinds = getattr(settings, name), typing.get_args(hint) or (hint,)
        if kinds[0] in checks and not (value is None and type(None) in kinds):
            checks[kinds[0]](value, name)


# ---- Kinds: function(value, name) -> nothing, or UserError ---------------------------------------


def refuse(name, value, wanted):
    raise UserError(f"{name}={one_line(repr(value), 60)}: give {wanted}")


def as_count(n, name, least=1):
    """`n` as an int; UserError unless it is an integer, numpy's too, of at least `least` (if any).
    """
    try:
        found = None if isinstance(n, bool) else operator.index(n)
    except TypeError:
        found = None
    if found is None or (least is not None and found < least):
        refuse(name, n, "an integer" if least is None else f"an integer of at least {least}")
    return found


def number(value, name):
    """A finite number of at least 0."""
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not (real and math.isfinite(value) and value >= 0):
        refuse(name, value, "a finite number of at least 0")


def _each(integer, value, name):
    instance("dict")(value, name)
    for key, one in value.items():
        if one is not None:
            integer(one, f"{name}[{key!r}]")


def instance(*classes, wanted="", advice=""):
    """An object of one of these classes, by name, as some of them live further up."""
    wanted = wanted or " or ".join(f"a {one}" for one in classes) + advice

    def check(value, name):
        if not {kind.__name__ for kind in type(value).__mro__} & {*classes}:
            refuse(name, value, wanted)

    return check


def none_or(kind):
    return lambda value, name: None if value is None else kind(value, name)


def path(value, name):
    if not isinstance(value, (str, os.PathLike)) or not str(value) or "\0" in str(value):
        refuse(name, value, "a path")


def _callable(value, name):
    if not callable(value):
        refuse(name, value, "something that can be called")


def _device(value, name):
    from quantlab.system.contract import find_device

    instance("str", "device", advice=", such as cpu or cuda")(value, name)
    find_device(value)


def _values(value, name):
    """A real number, or a tensor or list of some."""
    import torch

    try:
        usable = not isinstance(value, bool) and torch.as_tensor(value, dtype=torch.float64).numel()
    except (TypeError, ValueError, RuntimeError):
        usable = False
    if not usable:
        refuse(name, value, "a number or a tensor")


def _answers(value, name):
    if str(getattr(value, "dtype", "")).removeprefix("torch.") != "bool" or not value.shape:
        refuse(name, value, "bool [n], as evaluate(...).correct is")


TENSOR, NETWORK = instance("Tensor"), instance("Module")
flag = instance("bool", "bool_", wanted="True or False")
text = instance("str", wanted="a name")
QUANTIZED = instance("QuantizedNetwork", advice=", which quantize(model, stats, config) returns")
DATA = instance("Dataset", advice=", which load_data returns")
KINDS = {
    "axis": none_or(functools.partial(as_count, least=0)), "low": _values, "high": _values,
    "x": TENSOR, "into": none_or(TENSOR), "codes": TENSOR,
    "q": instance("QParams", advice=" of choose_qparams"),
    "stats": instance("CalibrationStats", advice=", which collect(model, batches) returns"),
    "weight_bytes.network": NETWORK, "evaluate.model": _callable, "find_checkpoint.model": text,
    **{f"{name}.qmodel": QUANTIZED for name in (
        "correct_bias", "correct_bias_analytic", "reestimate_batchnorm", "tune_end_to_end")},
    "limited.split": instance("Split", advice=" of load_data"), "limit": none_or(as_count),
    "batch_size": as_count, "on": none_or(_device), "correct_a": _answers, "correct_b": _answers,
    "data": DATA, "name": text, "checkpoint": path, "load_model.checkpoint": none_or(path),
    "load_card.architecture": none_or(text),
    "num_classes": as_count, "path": path, "out": path, "start_from": none_or(path),
    "state": none_or(path), "callback": none_or(_callable), "save_every": number,
    "rounds": functools.partial(as_count, least=0), "compile": none_or(flag), "source": path,
    "train.config": instance("TrainConfig"),
}
