"""Notebooks whose cells run in the test's own process, to look at what they define."""

import jupytext
from conftest import CHECKOUT


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
