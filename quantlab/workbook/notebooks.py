"""The notebooks as files: which there are, what their parameters cells accept, and keeping .ipynb, .py, README and badges in step."""

import ast
import dataclasses
import difflib
import pathlib
import re

import jupytext
import nbformat

from quantlab.system.errors import UserError
from quantlab.system.files import repository_url, root, write_text

KERNEL = {"kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}}


@dataclasses.dataclass(frozen=True)
class Notebook:
    """One notebook: its two-digit number, its .ipynb, its title, and the defaults of its parameters cell by name."""

    number: str
    path: pathlib.Path
    title: str
    parameters: dict


def notebooks():
    """All notebooks of the workbook, by number."""
    paths = sorted((root() / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    if not paths:
        raise UserError(f"no notebooks in {root() / 'notebooks'}; run this in a checkout of the workbook, or set QUANTLAB_ROOT to one")
    return {path.name[:2]: _read(path) for path in paths}


def _read(path):
    cells = nbformat.read(path, as_version=4).cells
    title = next(line for line in cells[0].source.splitlines() if line.startswith("# ")).removeprefix("# ")
    cell = next((c for c in cells if "parameters" in c.metadata.get("tags", [])), None)
    assignments = [n for n in ast.parse(cell.source if cell else "").body if isinstance(n, ast.Assign)]
    return Notebook(path.name[:2], path, title, {n.targets[0].id: ast.literal_eval(n.value) for n in assignments})


def find(number):
    """A notebook by number or name ("3", "03", "03_quantize_by_hand"), or UserError with those there are."""
    known = notebooks()
    key = str(number).split("_")[0].zfill(2)
    if key not in known or "_" in str(number) and known[key].path.stem != pathlib.Path(number).stem:
        names = [n.path.stem for n in known.values()]
        near = difflib.get_close_matches(str(number), names, 1, 0.5)
        raise UserError(f"notebook {number!r} is unknown{f'; did you mean {near[0]}?' if near else ''}; there are: {', '.join(names)}")
    return known[key]


def check_parameter(notebook, name, text):
    """The value of a parameter given as text, converted to the type of its default; UserError for an unknown name or a wrong type."""
    if name not in notebook.parameters:
        near = difflib.get_close_matches(name, notebook.parameters, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"{notebook.path.stem} has no parameter {name!r}{hint}; it accepts: {', '.join(notebook.parameters)}")
    wanted = type(notebook.parameters[name])
    if wanted is bool and str(text).lower() in ("true", "false"):
        return str(text).lower() == "true"
    if wanted in (int, float):
        try:
            return wanted(text)
        except ValueError:
            pass
    elif wanted is str:
        return str(text)
    raise UserError(f"parameter {name}={text!r} of {notebook.path.stem} is not {wanted.__name__}; its default is {notebook.parameters[name]!r}")


# ---- In step ----------------------------------------------------------------------------------------------------------------


def sync():
    """Write every .ipynb from its .py (the newer of the two wins), without outputs, with stable cell ids and this repository's address."""
    changed = []
    for script in sorted((root() / "notebooks").glob("[0-9][0-9]_*.py")):
        path = script.with_suffix(".ipynb")
        newer = path if path.exists() and path.stat().st_mtime > script.stat().st_mtime else script
        notebook = jupytext.read(newer)
        for cell in notebook.cells:
            cell.source = with_address(cell.source, path.stem)
        texts = render(notebook, script.stem)
        for file, text in zip((script, path), texts):
            if not file.exists() or file.read_text(encoding="utf-8") != text:
                write_text(file, text)
                changed.append(file.name)
    readme = root() / "README.md"
    if readme.exists() and (text := with_address(readme.read_text(encoding="utf-8"))) != readme.read_text(encoding="utf-8"):
        write_text(readme, text)
        changed.append(readme.name)
    return changed


def render(notebook, stem):
    """(.py text, .ipynb text) of a notebook without outputs; the same input always gives the same bytes."""
    cells = []
    for i, cell in enumerate(notebook.cells):
        tags = {"tags": cell.metadata["tags"]} if cell.metadata.get("tags") else {}
        make = nbformat.v4.new_markdown_cell if cell.cell_type == "markdown" else nbformat.v4.new_code_cell
        cells.append(make(cell.source, metadata=tags, id=f"{stem[:2]}-{i:03d}"))
    clean = nbformat.v4.new_notebook(cells=cells, metadata=KERNEL)
    options = {"notebook_metadata_filter": "kernelspec,-jupytext", "cell_metadata_filter": "tags"}
    clean.metadata["jupytext"] = options
    script = jupytext.writes(clean, fmt="py:percent")
    clean.metadata.pop("jupytext", None)
    return script, nbformat.writes(clean) + "\n"


def with_address(text, stem=None):
    """The text with the address from pyproject.toml in its badges and clone commands."""
    url = repository_url()
    slug = url.removeprefix("https://github.com/")
    text = re.sub(r"(colab\.research\.google\.com/github/)[\w.-]+/[\w.-]+(/blob/)", rf"\g<1>{slug}\g<2>", text)
    text = re.sub(r"(git clone (?:--?[\w-]+(?: \d+)? )*)https://\S+", rf"\g<1>{url}", text)
    return re.sub(r"(/blob/main/notebooks/)\w+(\.ipynb)", rf"\g<1>{stem}\g<2>", text) if stem else text
