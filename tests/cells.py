"""Notebooks whose cells run in the test's own process, to look at what they define."""

import ast

import jupytext
import torch
from conftest import CHECKOUT, read_text


def run_cells(name, **parameters):
    """What the notebook notebooks/NAME.py defines after all its cells, with these parameters."""
    space = {}
    for cell in jupytext.read(CHECKOUT / "notebooks" / f"{name}.py").cells:
        if cell.cell_type == "code":
            exec(cell.source, space)
            if "parameters" in cell.metadata.get("tags", []):
                assert parameters.keys() <= space.keys()
                space |= parameters
    return space


def functions(name, wanted, **names):
    """Functions and classes that a notebook defines, alone, among the names they need."""
    tree = ast.parse(read_text(CHECKOUT / "notebooks" / f"{name}.py"))
    tree.body = [node for node in tree.body if getattr(node, "name", None) in wanted]
    names |= {"torch": torch}
    exec(compile(tree, name, "exec"), names)
    return [names[each] for each in wanted]
