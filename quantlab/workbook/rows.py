"""Rows of results read from files that anyone may have edited: as they are written, or refused.

    checked(typed(parsed("results.csv")))
"""

import csv
import io
import json
import math

import pandas as pd

from quantlab.system.errors import UserError, one_line
from quantlab.system.files import read_text
from quantlab.system.schema import check
from quantlab.workbook import results


def parsed(path):
    """A file's cells as text, without those that are empty; ValueError that names the line."""
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    try:
        header, rows = next(reader, []), []
        for cells in reader:
            if len(cells) != len(header):
                raise ValueError(f"line {reader.line_num} has {len(cells)} cells, not "
                                 f"{len(header)}: {','.join(cells)[:40]}")
            rows.append(cells)
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num}: {error}") from None
    if len(set(header)) < len(header):
        raise ValueError("two columns have one name")
    frame = pd.DataFrame(rows, columns=header, dtype=object)
    return frame.where(frame != "", None)


def checked(frame):
    """The frame itself; ValueError for a row that is none of `make_row`."""
    bounds = {"n_test": 0, "seed": 0, "bytes": 0, "seconds": 0, "fp32_top1": 100, "top1": 100}
    for column, most in bounds.items():
        wrong = (frame[column] < 0) | ((frame[column] > most) if most else False)
        if wrong.fillna(False).any():
            raise ValueError(f"{column} is {frame[column][wrong.fillna(False)].iloc[0]}")
    for column in results.FLOATS:
        if frame[column].abs().eq(math.inf).any():
            raise ValueError(f"{column} is infinite")
    for column in results.TEXTS:
        strange = [text for text in frame[column] if not text.isprintable()]
        if strange:
            raise ValueError(f"{column} is {strange[0]!r}")
    keys = frame.config_key.tolist()
    if strange := [key for key in keys if not (key.isalnum() and key.isascii())]:
        raise ValueError(f"config_key is {strange[0]!r}, not hex digits")
    if frame.seed.isna().any():
        raise ValueError("a row has no seed")
    return frame


def read_row(file):
    """The row that `once` kept; UserError where the file is torn."""
    try:
        row = json.loads(file.read_text(encoding="utf-8"))
        check(row, dict, "row")
        if missing := ", ".join(sorted(set(results.COLUMNS) - row.keys())):
            raise ValueError(f"it lacks {missing}")
        checked(results.typed(pd.DataFrame([row], columns=results.COLUMNS)))
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise UserError(f"{file} is no row of results ({one_line(error)}); delete it and it is "
                        "measured again") from None
    return row
