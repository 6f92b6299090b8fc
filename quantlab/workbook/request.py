"""What is asked to be run, checked before anything heavy is loaded.

    for notebook, parameters in requested(["03"], {"weight_bits": "4"}, "digits"): ...
"""

import pathlib

from quantlab.images.files import find_data
from quantlab.workbook import notebooks


def requested(numbers=(), overrides=None, source=None):
    """[(Notebook, its parameters)], in order; no number: all notebooks.

    overrides: parameter -> text. With notebooks named, each must know every parameter; without,
    those that know it get it. source: the data set, for those that have the parameter `data`.
    Paths are relative to the working directory. UserError for unknown notebooks and parameters,
    for values of the wrong type and for data that is not there.
    """
    known = list(notebooks.notebooks().values())
    chosen = [notebooks.find(number) for number in numbers] if numbers else known
    overrides = dict(overrides or {})
    _check_known(overrides, chosen, strict=bool(numbers))
    overrides |= {"data": source} if source else {}
    if "data" in overrides:
        find_data(overrides["data"])
    for name in ("data", "checkpoint"):  # the notebook's working directory is another
        if name in overrides and pathlib.Path(overrides[name]).exists():
            overrides[name] = str(pathlib.Path(overrides[name]).resolve())
    return [(notebook, _parameters(notebook, overrides)) for notebook in chosen]


def _check_known(overrides, chosen, strict):
    chosen = [notebook for notebook in chosen if not notebook.problem]
    for name in overrides:
        strangers = [notebook for notebook in chosen if name not in notebook.parameters]
        if strangers and (strict or len(strangers) == len(chosen)):
            notebooks.check_parameter(strangers[0], name, overrides[name])  # raises, with a hint


def _parameters(notebook, overrides):
    known = [name for name in overrides if name in notebook.parameters]
    return {name: notebooks.check_parameter(notebook, name, overrides[name]) for name in known}
