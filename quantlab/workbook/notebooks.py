"""The notebooks as files: which there are, what their parameters cells accept, and keeping .ipynb,
.py, README and badges in step.
"""

import ast
import dataclasses
import json
import pathlib
import re

from quantlab.system.errors import UserError, did_you_mean
from quantlab.system.files import repository_url, root, write_text

KERNEL = {
    "kernelspec": {
        "display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3",
    },
}


@dataclasses.dataclass(frozen=True)
class Notebook:
    """One notebook: its two-digit number, its .ipynb, its title, the defaults of its parameters
    cell by name, and its cells as (type, source), without outputs.
    """

    number: str
    path: pathlib.Path
    title: str
    parameters: dict
    cells: tuple


def notebooks():
    """All notebooks of the workbook, by number."""
    folder = root() / "notebooks"
    paths = sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    if not paths:
        raise UserError(f"no notebooks in {folder}; run this in a checkout of the workbook, "
                        "or set QUANTLAB_ROOT to one")
    return {path.name[:2]: read(path) for path in paths}


def read(path):
    """A Notebook from its file. papermill.inspect_notebook would give the parameters too, as texts,
    after two seconds of imports: too long before the one line that answers a mistyped name.
    """
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    sources = [(cell["cell_type"], "".join(cell["source"])) for cell in cells]
    title = next(line for line in sources[0][1].splitlines() if line.startswith("# "))
    tagged = [i for i, c in enumerate(cells) if "parameters" in c["metadata"].get("tags", [])]
    code = sources[tagged[0]][1] if tagged else ""
    assignments = [n for n in ast.parse(code).body if isinstance(n, ast.Assign)]
    parameters = {n.targets[0].id: ast.literal_eval(n.value) for n in assignments}
    return Notebook(path.name[:2], path, title.removeprefix("# "), parameters, tuple(sources))


def find(number):
    """A notebook by number or name ("3", "03", "03_quantize_by_hand"), or UserError with those
    there are.
    """
    known = notebooks()
    key = str(number).split("_")[0].zfill(2)
    is_name = "_" in str(number)
    if key not in known or (is_name and known[key].path.stem != pathlib.Path(number).stem):
        names = [notebook.path.stem for notebook in known.values()]
        hint = did_you_mean(number, names, 0.5)
        raise UserError(f"notebook {number!r} is unknown{hint}; there are: {', '.join(names)}")
    return known[key]


def check_parameter(notebook, name, text):
    """The value of a parameter given as text, converted to the type of its default; UserError for
    an unknown name or a wrong type.
    """
    stem, known = notebook.path.stem, notebook.parameters
    if name not in known:
        raise UserError(f"{stem} has no parameter {name!r}{did_you_mean(name, known)}; "
                        f"it accepts: {', '.join(known)}")
    wanted = type(known[name])
    if wanted is bool and str(text).lower() in ("true", "false"):
        return str(text).lower() == "true"
    if wanted in (int, float):
        try:
            return wanted(text)
        except ValueError:
            pass
    elif wanted is str:
        return str(text)
    raise UserError(f"parameter {name}={text!r} of {stem} is not {wanted.__name__}; "
                    f"its default is {known[name]!r}")


# ---- In step ------------------------------------------------------------------------------------


def sync():
    """Write every .ipynb from its .py, without outputs, with stable cell ids and this repository's
    address. Where they say different things, the newer of the two wins, as with jupytext --sync.
    """
    import jupytext

    changed = []
    for script in sorted((root() / "notebooks").glob("*.py")):
        path = script.with_suffix(".ipynb")
        is_newer = path.exists() and path.stat().st_mtime > script.stat().st_mtime
        notebook = jupytext.read(path if is_newer else script)
        for cell in notebook.cells:
            cell.source = with_address(cell.source, path.stem)
        for file, text in zip((script, path), render(notebook, script.stem)):
            if not file.exists() or file.read_text(encoding="utf-8") != text:
                write_text(file, text)
                changed.append(file.name)
    readme = root() / "README.md"
    if readme.exists():
        old = readme.read_text(encoding="utf-8")
        if (new := with_address(old)) != old:
            write_text(readme, new)
            changed.append(readme.name)
    return changed


def render(notebook, stem):
    """(.py text, .ipynb text) of a notebook without outputs; the same input always gives the same
    bytes.
    """
    import jupytext
    import nbformat

    makers = {"markdown": nbformat.v4.new_markdown_cell, "code": nbformat.v4.new_code_cell}
    cells = []
    for i, cell in enumerate(notebook.cells):
        tags = {"tags": cell.metadata["tags"]} if cell.metadata.get("tags") else {}
        make = makers[cell.cell_type]
        cells.append(make(cell.source, metadata=tags, id=f"{stem[:2]}-{i:03d}"))
    clean = nbformat.v4.new_notebook(cells=cells, metadata=KERNEL)
    clean.metadata["jupytext"] = {
        "notebook_metadata_filter": "kernelspec,-jupytext", "cell_metadata_filter": "tags",
    }
    script = jupytext.writes(clean, fmt="py:percent")
    clean.metadata.pop("jupytext")
    return script, nbformat.writes(clean) + "\n"


def with_address(text, stem=None):
    """The text with the address from pyproject.toml in its badges and clone commands."""
    url = repository_url()
    slug = url.removeprefix("https://github.com/")
    badge = r"(colab\.research\.google\.com/github/)[\w.-]+/[\w.-]+(/blob/)"
    text = re.sub(badge, rf"\g<1>{slug}\g<2>", text)
    clone = r"(git clone (?:--?[\w-]+(?: \d+)? )*|address = \")https://[^\s\"]+"
    text = re.sub(clone, rf"\g<1>{url}", text)
    if stem is None:
        return text
    return re.sub(r"(/blob/main/notebooks/)\w+(\.ipynb)", rf"\g<1>{stem}\g<2>", text)
