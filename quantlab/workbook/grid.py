"""What a sweep runs: lists of parameters multiplied into single runs, each of them checked before
anything heavy is loaded.

    asked = ask("03", [("weight_bits", "4,3"), ("observer", "mse,percentile")], seeds=5)
    for notebook, parameters in multiplied(asked): ...                # 20 runs
"""

import dataclasses
import itertools
import pathlib
import re

from quantlab.system.errors import UserError, check_name, one_line
from quantlab.system.files import read_text
from quantlab.workbook import allowed, notebooks
from quantlab.workbook.request import requested

FIELDS = ("notebook", "parameters", "seeds", "data")  # of a file
EXAMPLE = "as in -p weight_bits 4,3 or -p widths '4/4,3/3;2/2'"


@dataclasses.dataclass(frozen=True)
class Asked:
    """A sweep as it is asked for: a notebook's name, and parameter -> values as texts."""

    notebook: str
    lists: dict

    @property
    def swept(self):
        """Names of the parameters with more than one value; of all, where none has."""
        return [n for n, values in self.lists.items() if len(values) > 1] or [*self.lists]


def ask(name, parameters=(), seeds=None, source=None):
    """An Asked of a notebook by number or name, or of a YAML file (`read_file`), whose parameters
    those given here replace.

    parameters: pairs (parameter, text of its values). seeds: n for 0 to n - 1. source: the data.
    UserError for an unknown notebook or parameter, an empty list, and what is given twice.
    """
    of_file = {}
    if str(name).endswith((".yaml", ".yml")):
        of_file = read_file(name)
        name = of_file.pop("notebook")
    notebook = notebooks.find(name)
    if "data" not in notebook.parameters:
        raise UserError(f"{notebook.path.stem} has no parameter data: it reads recorded rows, to "
                        "which every run of a sweep adds; name a notebook that measures")
    lists = _lists(**of_file)
    given = [(parameter, values(notebook, parameter, text)) for parameter, text in parameters]
    return Asked(notebook.path.stem, lists | _lists(given, seeds, source))


def _lists(parameters=(), seeds=None, data=None):
    """Parameter -> values of all that is given in one place."""
    given = [*parameters]
    given += [("seed", _seeds(seeds))] if seeds is not None else []
    given += [("data", [data])] if data else []
    twice = [a for a, b in itertools.pairwise(sorted(name for name, _ in given)) if a == b]
    if twice:
        raise UserError(f"{twice[0]} is given twice; give its values once, {EXAMPLE}")
    return dict(given)


def _seeds(count):
    if not (str(count).isdecimal() and int(count)):
        raise UserError(f"seeds {one_line(count)!r}: name how many, at least 1")
    return [str(seed) for seed in range(int(count))]


def values(notebook, name, text):
    """The values in a text, "4,3": separated by commas outside of brackets. Where there is a
    semicolon, semicolons separate; of a parameter whose own values have commas, nothing else does.
    """
    default = notebook.parameters.get(name)
    if text == "" and isinstance(default, str):
        return [text]
    is_list = name in allowed.LISTS or (isinstance(default, str) and "," in default)
    parts = text.split(";")
    if len(parts) > 1 and not parts[-1].strip():  # "4/4,3/3;" is one value
        parts.pop()
    elif len(parts) == 1 and not is_list:
        parts = re.split(r",(?![^(\[{]*[)\]}])", text)
    found = [part.strip() for part in parts]
    if not all(found):
        raise UserError(f"-p {name} {text!r} has an empty value: separate values by commas, or by "
                        f"semicolons where a value has commas itself, {EXAMPLE}")
    return found


def read_file(path):
    """A sweep's YAML file as a dict of FIELDS: `notebook` (required), `parameters` (pairs of name
    and values; in the file, name: value or name: [value, value]), `seeds`, `data`. Every value is
    the text that stands there; UserError for anything else.
    """
    import yaml

    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"{path} not found")
    try:
        found = yaml.load(read_text(path), yaml.BaseLoader)  # texts, as on the command line
    except yaml.YAMLError as error:
        raise UserError(f"{path} is no YAML: {one_line(error)}") from None
    if not isinstance(found, dict) or not isinstance(found.get("notebook"), str):
        raise UserError(f"{path} names no notebook; its first line is such as notebook: 03")
    for field in found:
        check_name(f"{path}: field", field, FIELDS)
    parameters = found.get("parameters") or {}
    if not isinstance(parameters, dict):
        raise UserError(f"{path}: parameters are lines such as weight_bits: [4, 3]")
    lists = {name: v if isinstance(v, list) else [v] for name, v in parameters.items()}
    for name, texts in lists.items():
        if not texts or not all(isinstance(text, str) for text in texts):
            raise UserError(f"{path}: {name} has an empty list or one that is none of single "
                            f"values; write such as {name}: [4, 3]")
    return found | {"parameters": [*lists.items()]}


def multiplied(asked):
    """[(Notebook, its parameters)] of every combination, in order, the last list fastest; each
    checked as by `requested`, which raises UserError.
    """
    found = []
    for combination in itertools.product(*asked.lists.values()):
        overrides = dict(zip(asked.lists, combination))
        found += requested([asked.notebook], overrides)
    return found
