"""The notebooks as files: which there are, what their parameters cells accept, and keeping .ipynb,
.py, README and badges in step.
"""

import ast
import contextlib
import dataclasses
import json
import pathlib

from quantlab.system.errors import UserError, did_you_mean
from quantlab.system.files import read_text, root, write_text

KERNEL = {
    "kernelspec": {
        "display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3",
    },
}


class Computed(str):
    """The source of a parameter's default that is no literal, as in 4 * 256: any value may be given
    in its place.
    """

    def __repr__(self):
        return str(self)


@dataclasses.dataclass(frozen=True)
class Notebook:
    """One notebook: its two-digit number, its .ipynb, its title, the defaults of its parameters
    cell by name, and its cells as (type, source), without outputs.

    problem: why it cannot be run, in one line that names it; "" where it can.
    """

    number: str
    path: pathlib.Path
    title: str
    parameters: dict
    cells: tuple
    problem: str = ""

    @property
    def is_report(self):
        """Whether it reads what the others record: it is run when they have ended."""
        return "report" in self.path.stem


def notebooks():
    """All notebooks of the workbook by name, in order, the report last, as it reads what the others
    record; also those with a problem.
    """
    folder = root() / "notebooks"
    paths = sorted(folder.glob("[0-9][0-9]_*.ipynb"), key=lambda p: ("report" in p.stem, p.name))
    if not paths:
        raise UserError(f"no notebooks in {folder}; run this in a checkout of the workbook, "
                        "or set QUANTLAB_ROOT to one")
    return {path.stem: read(path) for path in paths}


def read(path):
    """A Notebook from its file. papermill.inspect_notebook would give the parameters too, as texts,
    after two seconds of imports: too long before the one line that answers a mistyped name.
    """
    try:
        _, language = kernel(path)
        if language != "python":
            raise UserError(f"{path.name} is written in {language}; only Python is run here")
        cells = _cells(path)
        sources = tuple((kind, source) for kind, source, _ in cells)
        tagged = [source for _, source, tags in cells if "parameters" in tags]
        parameters = _defaults(tagged[0], path) if tagged else {}
    except UserError as error:
        return Notebook(path.name[:2], path, path.stem, {}, (), str(error))
    texts = "\n".join(source for kind, source in sources if kind == "markdown").splitlines()
    title = next((line.removeprefix("# ") for line in texts if line.startswith("# ")), path.stem)
    return Notebook(path.name[:2], path, title, parameters, sources)


def kernel(path):
    """(name, language) of the kernel that a notebook's file asks for; this Python's by default."""
    with _format_4(path) as notebook:
        spec = notebook["metadata"].get("kernelspec", {})
        return spec.get("name", "python3"), spec.get("language", "python").lower()


def _cells(path):
    """[(type, source, tags)] of a notebook's file."""
    with _format_4(path) as notebook:
        return [(cell["cell_type"], "".join(cell["source"]), cell["metadata"].get("tags", []))
                for cell in notebook["cells"]]


@contextlib.contextmanager
def _format_4(path):
    """A notebook's file as it is; UserError for what is none."""
    try:
        yield json.loads(read_text(path))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        why = f"{type(error).__name__}: {error}"
        raise UserError(f"{path.name} is no notebook of format 4 ({why}); save it in JupyterLab "
                        "or move it out of the folder") from None


def _defaults(code, path):
    """Name -> default of everything that a parameters cell assigns; a Computed where it is no
    literal. Lines of magic are left out.
    """
    lines = ["" if line.lstrip().startswith(("%", "!")) else line for line in code.splitlines()]
    try:
        statements = ast.parse("\n".join(lines)).body
    except (SyntaxError, ValueError) as error:
        raise UserError(f"{path.name}: its parameters cell is no Python ({error}); correct it in "
                        "JupyterLab") from None
    found = {}
    for statement in statements:
        if isinstance(statement, ast.Assign):
            for target in statement.targets:
                found |= _assigned(target, statement.value)
        elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
            found |= _assigned(statement.target, statement.value)
        elif isinstance(statement, ast.AugAssign):
            found |= _assigned(statement.target, statement)
    return found


def _assigned(target, value):
    if isinstance(target, ast.Name):
        return {target.id: _literal(value)}
    if not isinstance(target, (ast.Tuple, ast.List)):
        return {}
    same = isinstance(value, (ast.Tuple, ast.List)) and len(value.elts) == len(target.elts)
    values = value.elts if same else [value] * len(target.elts)
    pairs = [_assigned(*pair) for pair in zip(target.elts, values)]
    return {name: default for pair in pairs for name, default in pair.items()}


def _literal(node):
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        return Computed(ast.unparse(node))


def find(name):
    """A notebook by number or name ("3", "03", "03_quantize_by_hand", "quantize_by_hand"), one
    without a number by its whole name; UserError with those there are, or with its problem.
    """
    known, wanted = notebooks(), str(name).removesuffix(".ipynb")
    found = [stem for stem in known if wanted in (stem, stem[3:]) or wanted.zfill(2) == stem[:2]]
    if not found and (other := root() / "notebooks" / f"{wanted}.ipynb").is_file():
        known, found = {wanted: read(other)}, [wanted]  # such as inspect_network
    if not found:
        hint = did_you_mean(name, known, 0.5)
        raise UserError(f"notebook {name!r} is unknown{hint}; there are: {', '.join(known)}")
    if len(found) > 1:
        raise UserError(f"notebook {name!r} may be each of {', '.join(found)}: name one in full")
    notebook = known[found[0]]
    if notebook.problem:
        raise UserError(notebook.problem)
    return notebook


def check_parameter(notebook, name, text):
    """The value of a parameter given as text, converted to the type of its default; UserError for
    an unknown name or a wrong type.
    """
    stem, known = notebook.path.stem, notebook.parameters
    if name not in known:
        raise UserError(f"{stem} has no parameter {name!r}{did_you_mean(name, known)}; "
                        f"it accepts: {', '.join(known)}")
    default, text = known[name], str(text)
    wanted = type(default)
    try:
        if wanted is str:
            return text
        if wanted in (int, float):
            return wanted(text)
        if wanted is bool:
            return {"true": True, "false": False}[text.lower()]
        value = ast.literal_eval(text)
        if wanted is Computed or default is None or isinstance(value, wanted):
            return value
    except (ValueError, KeyError, TypeError, SyntaxError):
        if wanted is Computed or default is None:
            return text
    raise UserError(f"parameter {name}={text!r} of {stem} is not {wanted.__name__}; "
                    f"its default is {default!r}")


# ---- In step ------------------------------------------------------------------------------------


def sync():
    """Write every .ipynb from its .py, without outputs, with stable cell ids and this repository's
    address. Where they say different things, the newer of the two wins, as with jupytext --sync.

    Returns the names of the files that changed. UserError, when the others are in step, for pairs
    that are left as they are: a damaged file, or a pasted image, which a .py cannot hold.
    """
    from quantlab.workbook.address import in_readme

    changed, refused = [], []
    for script in sorted((root() / "notebooks").glob("*.py")):
        try:
            changed += _sync_pair(script, script.with_suffix(".ipynb"))
        except UserError as error:
            refused.append(str(error))
    readme = root() / "README.md"
    if readme.exists():
        old = read_text(readme)
        if (new := in_readme(old)) != old:
            write_text(readme, new)
            changed.append(readme.name)
    if refused:
        raise UserError("; ".join(refused))
    return changed


def _sync_pair(script, path):
    """Names of the files that were written of a .py and its .ipynb."""
    import jupytext

    from quantlab.workbook.address import in_notebook

    texts = {file: read_text(file) for file in (script, path) if file.exists()}
    if path in texts:
        _check_attachments(path)
    is_newer = path in texts and path.stat().st_mtime > script.stat().st_mtime
    newer = path if is_newer else script
    notebook = jupytext.reads(texts[newer], newer.suffix[1:])
    for cell in notebook.cells:
        cell.source = in_notebook(cell.source, path.stem)
    changed = []
    for file, text in zip((script, path), render(notebook, script.stem)):
        if texts.get(file) != text:
            write_text(file, text)
            changed.append(file.name)
    return changed


def _check_attachments(path):
    with _format_4(path) as notebook:
        pasted = [name for cell in notebook["cells"] for name in cell.get("attachments", {})]
    if pasted:
        raise UserError(f"{path.name} holds pasted images ({', '.join(pasted)}), which its .py "
                        "cannot keep: save them as files in pic/ and link to them")


def render(notebook, stem):
    """(.py text, .ipynb text) of a notebook without outputs; the same input always gives the same
    bytes. Cells tagged "solution" are folded in JupyterLab, no others.
    """
    import jupytext
    import nbformat

    makers = {
        "markdown": nbformat.v4.new_markdown_cell, "code": nbformat.v4.new_code_cell,
        "raw": nbformat.v4.new_raw_cell,
    }
    cells = []
    for i, cell in enumerate(notebook.cells):
        tags = cell.metadata.get("tags")
        kept = {"tags": tags} if tags else {}
        if "solution" in (tags or ()):
            kept["jupyter"] = {"source_hidden": True}
        make = makers[cell.cell_type]
        cells.append(make(cell.source, metadata=kept, id=f"{stem[:2]}-{i:03d}"))
    clean = nbformat.v4.new_notebook(cells=cells, metadata=KERNEL)
    clean.metadata["jupytext"] = {
        "notebook_metadata_filter": "kernelspec,-jupytext", "cell_metadata_filter": "tags",
    }
    script = jupytext.writes(clean, fmt="py:percent")
    clean.metadata.pop("jupytext")
    return script, nbformat.writes(clean) + "\n"
