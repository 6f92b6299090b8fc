"""A map of a package's source: which module defines what, and which uses which names of which.

    modules = scan("torch.ao", folder_of("torch.ao"))   # parsed from the files, nothing is imported
    write_xmind("pic/source_map.xmind", {"torch.ao": (tree(modules), arrows(modules))})
"""

import ast
import collections
import dataclasses
import hashlib
import importlib.util
import json
import pathlib
import re
import zipfile

import pandas as pd

from quantlab.system.files import atomic_path

# A module's topic is the first whose pattern occurs in its name (without the package's own).
TOPICS = (
    ("models and tests", r"^(_models|testing|experimental)\b"),
    ("prototypes", r"^prototype\b"),
    ("low-precision training", r"^(float8|optim)\b"),
    ("kernels", r"^(kernel|ops|csrc_meta_ops|_executorch_ops|swizzle)\b"),
    ("pruning, sparsity", r"^(pruning|sparsity)\b|nn\.sparse|sparse"),
    ("numeric suite", r"^ns\b|numeric_debugger|_correct_bias|equaliz"),
    ("observers", r"observer"),
    ("fake quantization, QAT", r"fake_quant|\bqat\b|qat_utils"),
    ("fusing", r"\bfus(e|er|ion)|intrinsic|_fuse\b"),
    ("quantizers", r"quantizer\b|quantizer\.|quantizer_"),
    ("qconfig, backends",
     r"qconfig|backend_config|mappings|quant_type|custom_config|granularity"),
    ("prepare", r"\bprepare"),
    ("convert", r"convert|lower|reference|decomposed|inductor"),
    ("entry points", r"\b(quantize|quantize_fx|quantize_jit|quantize_pt2e|quant_api|stubs)$"),
    ("quantized modules", r"^nn\b|linear_quant_modules|^dtypes\b|quantize_\b"),
    ("graph passes", r"\bfx\b|pt2e"),
    ("shared", r""),
)


@dataclasses.dataclass(frozen=True)
class Module:
    """One source file.

    definitions: public name -> names of its base classes, None for a function. uses: module of the
    scan -> names taken from it.
    """

    name: str
    lines: int
    topic: str
    definitions: dict
    uses: dict


def folder_of(package):
    """Folder of an installed package, found without importing it; None where there is none."""
    first, *rest = package.split(".")
    spec = importlib.util.find_spec(first)
    folder = spec and pathlib.Path(spec.origin).parent.joinpath(*rest)
    return folder if folder and folder.is_dir() else None


def scan(package, folder):
    """Every module below `folder` as a list of Module.

    A name that an __init__ passes on counts for the module that defines it.
    """
    paths = sorted(folder.rglob("*.py"))
    files = {_module_name(package, path.relative_to(folder)): path for path in paths}
    texts = {name: path.read_text(encoding="utf-8") for name, path in files.items()}
    trees = {name: ast.parse(text) for name, text in texts.items()}
    defined = {name: _definitions(tree) for name, tree in trees.items()}
    imports = {name: list(_imports(trees[name], name, files)) for name in files}
    modules = []
    for name, text in texts.items():
        topic = topic_of(name.removeprefix(package).lstrip("."))
        public = {n: bases for n, bases in defined[name].items() if not n.startswith("_")}
        uses = _uses(name, imports, defined)
        modules.append(Module(name, len(text.splitlines()), topic, public, uses))
    return modules


def topic_of(name):
    """The topic of a module, from its name below the package."""
    return next(topic for topic, pattern in TOPICS if re.search(pattern, name))


def _module_name(package, relative):
    parts = relative.with_suffix("").parts
    return ".".join((package, *(parts[:-1] if parts[-1] == "__init__" else parts)))


def _definitions(tree):
    """name -> names of its base classes, None for a function."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    functions = {n.name: None for n in tree.body if isinstance(n, kinds)}
    classes = [n for n in tree.body if isinstance(n, ast.ClassDef)]
    return functions | {
        n.name: [ast.unparse(base).split(".")[-1] for base in n.bases] for n in classes}


def _imports(tree, name, files):
    """(module, name in it, name here) of every import of a scanned module, in functions too.

    A whole module is ("a.b", None, name here).
    """
    package = name if files[name].stem == "__init__" else name.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name in files:
                    yield alias.name, None, alias.asname or alias.name
        elif isinstance(node, ast.ImportFrom):
            relative = "." * node.level + (node.module or "")
            module = importlib.util.resolve_name(relative, package)
            for alias in node.names:
                if f"{module}.{alias.name}" in files:
                    yield f"{module}.{alias.name}", None, alias.asname or alias.name
                elif module in files:
                    yield module, alias.name, alias.asname or alias.name


def _uses(name, imports, defined):
    """Module -> sorted names that `name` takes from it, followed to where they are defined."""
    found = {}
    for module, wanted, _ in imports[name]:
        origin = _origin(module, wanted, imports, defined, set())
        if origin != name:
            found.setdefault(origin, set()).update([wanted] if wanted and wanted != "*" else [])
    return {module: sorted(names) for module, names in sorted(found.items())}


def _origin(module, wanted, imports, defined, seen):
    """The module that defines `wanted`, through re-exports; `module` where that cannot be told."""
    if wanted is None or wanted in defined[module] or module in seen:
        return module
    for source, original, here in imports[module]:
        if here == wanted and original not in (None, "*"):
            return _origin(source, original, imports, defined, seen | {module})
        if original == "*" and wanted in defined[source]:
            return source
    return module


# ---- Tables --------------------------------------------------------------------------------------


def _by_topic(modules):
    """topic -> its modules, in the order of TOPICS, none empty."""
    found = {topic: [m for m in modules if m.topic == topic] for topic, _ in TOPICS}
    return {topic: part for topic, part in found.items() if part}


def topic_table(modules):
    """One row a topic: modules, lines, definitions, the two names that most others take from it."""
    taken = collections.Counter((n, name) for m in modules for n in m.uses for name in m.uses[n])
    rows = []
    for topic, part in _by_topic(modules).items():
        public = {(m.name, name) for m in part for name in m.definitions}
        popular = [key[1] for key, _ in taken.most_common() if key in public][:2]
        lines = sum(m.lines for m in part)
        rows.append({"topic": topic, "modules": len(part), "lines": lines,
                     "definitions": len(public), "used": popular})
    return pd.DataFrame(rows)


def topic_edges(modules):
    """importer, imported (topics), uses: how many names (or whole modules); strongest first."""
    topic, sums = {m.name: m.topic for m in modules}, collections.Counter()
    for module in modules:
        for used, names in module.uses.items():
            if topic[used] != module.topic:
                sums[module.topic, topic[used]] += max(1, len(names))
    rows = [(*pair, uses) for pair, uses in sorted(sums.items(), key=lambda p: (-p[1], p[0]))]
    return pd.DataFrame(rows, columns=["importer", "imported", "uses"])


# ---- XMind ---------------------------------------------------------------------------------------


def tree(modules):
    """topic -> module name -> definitions as text: "MinMaxObserver (ObserverBase)", "prepare()"."""
    return {
        topic: {m.name: [_signature(*item) for item in m.definitions.items()] for m in part}
        for topic, part in _by_topic(modules).items()
    }


def _signature(name, bases):
    if bases is None:
        return f"{name}()"
    return f"{name} ({', '.join(bases)})" if bases else name


def arrows(modules, count=20, without=("models and tests", "prototypes")):
    """The `count` strongest uses between modules of different topics: (importer, imported, names).
    """
    topic = {m.name: m.topic for m in modules if m.topic not in without}
    pairs = [
        (m.name, used, names) for m in modules for used, names in m.uses.items()
        if names and {m.name, used} <= set(topic) and topic[m.name] != topic[used]
    ]
    pairs.sort(key=lambda pair: (-len(pair[2]), pair[:2]))
    return [(a, b, ", ".join(names[:3])) for a, b, names in pairs[:count]]


def write_xmind(path, sheets):
    """Write sheets (title -> (tree, arrows)) as an .xmind file, atomically, always the same bytes.

    The format of XMind Zen, 2020 and later: a zip with content.json (a list of sheets; topics nest
    under children.attached), metadata.json and manifest.json. Ids are hashes of the topic's path.
    """
    content = [_sheet(title, *parts) for title, parts in sheets.items()]
    metadata = {
        "creator": {"name": "quantlab", "version": "1"}, "dataStructureVersion": "2",
        "activeSheetId": content[0]["id"]}
    manifest = {"file-entries": {"content.json": {}, "metadata.json": {}}}
    files = {"content": content, "metadata": metadata, "manifest": manifest}
    with (atomic_path(path) as temporary,
          zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive):
        for name, value in files.items():
            entry = zipfile.ZipInfo(f"{name}.json", (2020, 1, 1, 0, 0, 0))
            text = json.dumps(value, ensure_ascii=False, indent=1)
            archive.writestr(entry, text, zipfile.ZIP_DEFLATED)
    return pathlib.Path(path)


def _sheet(title, branches, links):
    ids = {m: _id((title, topic, m)) for topic, modules in branches.items() for m in modules}
    relationships = [
        {"id": _id((title, "uses", a, b)), "class": "relationship", "end1Id": ids[a],
         "end2Id": ids[b], "title": text}
        for a, b, text in links
    ]
    return {"id": _id((title, "sheet")), "class": "sheet", "title": title,
            "rootTopic": _topic(title, (title,), branches), "relationships": relationships}


def _topic(title, path, below):
    """A topic with what hangs below it: a dict of branches or a list of leaves."""
    topic = {"id": _id(path), "class": "topic", "title": title}
    is_leaves = isinstance(below, list)
    children = [_topic(n, (*path, n), [] if is_leaves else below[n]) for n in below]
    if children:
        topic["children"] = {"attached": children}
        if len(path) > 1 and not is_leaves:
            topic["branch"] = "folded"
    return topic


def _id(path):
    return hashlib.sha256("\0".join(path).encode()).hexdigest()[:26]
