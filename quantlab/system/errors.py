"""The one kind of error that a user can mend, and "did you mean"."""

import difflib
import functools


class UserError(Exception):
    """Something the user can mend, in one line: what was wrong, what is allowed, what to do.

    Shown without a traceback.
    """

    def __init__(self, message=""):
        super().__init__(message)
        self.line = " ".join(line.strip() for line in str(message).splitlines())

    def __str__(self):
        return self.line  # torch.fx writes paragraphs of its own into args


def checked(function):
    """The function, its arguments checked by their names before it runs (system/arguments.py)."""

    expected = []  # looked up once; torch.compile warns of functools.cache

    @functools.wraps(function)
    def call(*args, **kwargs):
        from quantlab.system.arguments import check_call, kinds_of  # here: it knows every room

        if not expected:
            expected.extend(kinds_of(function))
        check_call(*expected, args, kwargs)
        return function(*args, **kwargs)

    return call


def first_line(error):
    """The first line of what an exception says, or its class where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def did_you_mean(word, known, cutoff=0.6):
    """ "; did you mean NAME?" for the nearest of the known names, or "" where none is near."""
    near = difflib.get_close_matches(str(word), [str(name) for name in known], 1, cutoff)
    return f"; did you mean {near[0]}?" if near else ""


def check_name(kind, name, known):
    """UserError, with the nearest and all known names, unless `name` is one of them."""
    if name not in known:
        hint = did_you_mean(name, known)
        raise UserError(f"{kind} {name!r} is unknown{hint}; use one of: {', '.join(known)}")


def one_line(text, most=200):
    """Text of a file, of which nothing may reach a terminal but what can be printed."""
    shown = (c if c.isprintable() else ascii(c)[1:-1] for c in str(text)[:most])
    return "".join(shown)
