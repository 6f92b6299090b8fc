"""Sizes and formats of figures for reports, checked before anything is drawn."""

import os

from quantlab.system.errors import UserError, check_name

FORMATS = ("pdf", "svg", "png")
COLUMNS = (89, 183)  # mm: one and two columns of a journal's page
LIMITS = 40, 600  # mm


def check_paper(widths, formats):
    """(widths in mm, formats) as tuples; UserError where a figure cannot have one of them.

    widths: numbers, or texts such as "89".
    """
    for name in formats:
        check_name("format", name, FORMATS)
    return tuple(_millimetres(width) for width in widths), tuple(formats)


def _millimetres(width):
    low, high = LIMITS
    try:
        number = float(width)
    except ValueError:
        number = 0
    if not low <= number <= high:
        raise UserError(f"width {width!r} is none of a figure; give {low} to {high} (in mm), as 89")
    return int(number) if number == int(number) else number


def ask_notebooks(widths, formats):
    """Let every figure that notebooks save from now on come at these widths too."""
    os.environ["QUANTLAB_PAPER"] = f"{','.join(map(str, widths))};{','.join(formats)}"


def asked():
    """(widths, formats) of `ask_notebooks`, in this process or the one that started it; both empty
    where nobody asked.
    """
    widths, _, formats = os.environ.get("QUANTLAB_PAPER", "").partition(";")
    return check_paper(*(tuple(filter(None, text.split(","))) for text in (widths, formats)))
