"""What JSON of a file may be, written down as a pattern and checked before it is used.

    check(card, {"classes": [str], "n_test": Between(1, 10**9), "recipe": dict}, "card")

A dictionary stands for just these fields, a list for any number of one kind, a tuple for one of
several; str, bool, dict, int and float for any such value, None or a text for itself.
"""

import typing


class Each(typing.NamedTuple):
    """A dictionary of any names to values of one kind."""

    kind: object


class Between(typing.NamedTuple):
    """A finite number, or whole number, from low to high."""

    low: object
    high: object
    number: type = float


def check(value, kind, where):
    """ValueError that names the place unless a value of JSON is of that kind."""
    if isinstance(kind, tuple) and not isinstance(kind, (Each, Between)):
        if not any(is_a(value, one) for one in kind):
            raise ValueError(f"{where} is {value!r}")
    elif isinstance(kind, Each):
        check(value, dict, where)
        for name, one in value.items():
            check(one, kind.kind, f"{where}.{name}")
    elif isinstance(kind, dict):
        check(value, dict, where)
        if value.keys() != kind.keys():
            differing = ", ".join(sorted(value.keys() ^ kind.keys()))
            raise ValueError(f"{where} has fields of its own or too few: {differing}")
        for name, one in kind.items():
            check(value[name], one, f"{where}.{name}")
    elif isinstance(kind, list):
        check(value, list, where)
        for i, one in enumerate(value):
            check(one, kind[0], f"{where}[{i}]")
    elif not _is(value, kind):
        raise ValueError(f"{where} is {value!r}")


def is_a(value, kind):
    """True where `check` finds nothing wrong."""
    try:
        check(value, kind, "")
    except ValueError:
        return False
    return True


def _is(value, kind):
    if isinstance(kind, Between):
        return _is(value, kind.number) and kind.low <= value <= kind.high
    if kind is None or isinstance(kind, str):
        return value == kind
    if kind in (int, float):  # True is an int in Python, and no number of a file
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    return isinstance(value, kind)
