"""What decides a number, as a hash of contents: code, notebook, parameters, weights, data.

No path, date or machine enters: two clones agree, and touching a file changes nothing.
"""

import ast
import functools
import os
import pathlib
import re

from quantlab.images import datasets
from quantlab.images.files import is_cifar10, is_image_set
from quantlab.system.files import PACKAGE, read_text, root, sha256
from quantlab.workbook.contents import code_hash, digest
from quantlab.workbook.inspection import module_hash

ENVIRONMENT = ("QUANTLAB_SIZE", "DATA_NAME")  # variables that decide what images are
OUTSIDE = ("data", "checkpoint", "weights", "target")  # parameters that name something


def run_key(notebook, parameters):
    """Sixteen hex digits of everything that decides what a notebook computes.

    parameters: those that differ from the notebook's own.
    """
    return digest(settings_of(notebook, parameters), facts(notebook, parameters))


def settings_of(notebook, parameters):
    """Name -> value of what counts as it is written: parameters that name nothing outside."""
    settings = {**notebook.parameters, **parameters}
    settings["environment"] = [os.environ.get(name) for name in ENVIRONMENT]
    return {name: value for name, value in settings.items() if name not in OUTSIDE}


def facts(notebook, parameters):
    """Name -> hash of what lies outside the parameters and may differ between machines: notebook,
    package, and what the parameters in OUTSIDE name, by its contents.

    What has no `data` reads the recorded rows, in any order.
    """
    settings = {**notebook.parameters, **parameters}
    found = {"notebook": digest(notebook.cells), "package": _package(notebook)}
    if names_network(notebook, parameters):
        found["network"] = module_hash(settings["target"])
    for name in ("checkpoint", "weights"):
        if name in settings:
            found[name] = _weights(str(settings[name]), settings.get("model", ""))
    if "data" in settings:
        found["data"] = images_hash(str(settings["data"]))
    else:
        files = sorted((root() / "results").glob("[a-z]*.csv"))
        found["rows"] = digest([sorted(read_text(file).splitlines()) for file in files])
    return found


def names_network(notebook, parameters):
    """Whether `target` is a network of one's own, MODULE:FUNCTION; in others' notebooks it may be
    anything.
    """
    target = parameters.get("target", notebook.parameters.get("target"))
    return bool(re.fullmatch(r"[\w.]+:\w+", str(target)))


def _package(notebook):
    code = "\n".join(source for kind, source in notebook.cells if kind == "code")
    try:
        rooms = rooms_reached(code)
    except SyntaxError:  # magics: what they reach is not known
        rooms = [place.name for place in PACKAGE.iterdir() if place.is_dir()]
    return code_hash(rooms)


def _weights(named, model):
    """sha256 of the checkpoint at a path; for "auto", of all that the notebook may choose from."""
    if named != "auto":
        file = next((f for f in (pathlib.Path(named), root() / named) if f.is_file()), None)
        return file and sha256(file)
    files = (root() / "checkpoint").glob(f"{model}-*.safetensors")
    other = re.compile(r".*(\.training|-w\da\d)")  # states of training, quantized networks
    return digest(sorted([f.name, sha256(f)] for f in files if not other.fullmatch(f.stem)))


def images_hash(source):
    """The fingerprint of a data set; of a folder that is none, what its files hold."""
    path = pathlib.Path(source)
    if not path.is_dir() or is_image_set(path) or is_cifar10(path):
        return datasets.find_fingerprint(source)
    files = (file for file in path.rglob("*") if file.is_file())
    return digest(sorted([f.relative_to(path).as_posix(), sha256(f)] for f in files))


# ---- Which rooms --------------------------------------------------------------------------------


def rooms_reached(source):
    """Names of the rooms whose modules a Python source imports, itself or through other modules."""
    found, waiting = set(), [source]
    while waiting:
        names = _names(waiting.pop())
        for file in {file for name in names for file in _files(name)} - found:
            found.add(file)
            waiting.append(file.read_text("utf-8"))
    return sorted({f.relative_to(PACKAGE).parts[0] for f in found if f.parent != PACKAGE})


@functools.cache
def _names(source):
    """What a source imports of the package, as dotted names, and quantlab.NAME for its ql.NAME."""
    names, aliases = set(), {}
    nodes = list(ast.walk(ast.parse(source)))
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
            aliases |= {alias.asname or alias.name: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    for node in nodes:
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            names.add(f"{aliases.get(node.value.id)}.{node.attr}")
    return {name for name in names if name.startswith("quantlab.")}


def _files(name):
    """The module that a dotted name leads to; for quantlab.NAME, all that define NAME."""
    parts = name.split(".")[1:]
    for n in range(len(parts), 0, -1):
        place = PACKAGE.joinpath(*parts[:n])
        if place.with_suffix(".py").is_file():
            return [place.with_suffix(".py")]
        if place.is_dir():
            return [place / "__init__.py"]
    # the door hands names of rooms through, so a notebook may reach a room by the name alone
    defined = re.compile(rf"^(def|class) {parts[0]}\b", re.MULTILINE)
    files = [f for f in PACKAGE.rglob("*.py") if defined.search(f.read_text("utf-8"))]
    return [f for f in files if f.parent == PACKAGE] or files
