"""A map of a package's source: which module defines what and which uses which, parsed from the installed files, nothing imported.

    modules = scan("torch.ao", folder_of("torch.ao"))
    write_xmind("pic/source_map.xmind", "PyTorch quantization", tree(modules), arrows(modules))
"""

import ast
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
    ("qconfig, backends", r"qconfig|backend_config|mappings|quant_type|custom_config|granularity"),
    ("prepare", r"\bprepare"),
    ("convert", r"convert|lower|reference|decomposed|inductor"),
    ("entry points", r"\b(quantize|quantize_fx|quantize_jit|quantize_pt2e|quant_api|stubs)$"),
    ("quantized modules", r"^nn\b|linear_quant_modules|^dtypes\b|quantize_\b"),
    ("graph passes", r"\bfx\b|pt2e"),
    ("shared", r""),
)


@dataclasses.dataclass(frozen=True)
class Module:
    """One source file: dotted name, lines, topic, public definitions (name -> names of its base classes, None for a function)
    and uses (module of the scan -> names taken from it)."""

    name: str
    lines: int
    topic: str
    definitions: dict
    uses: dict


def folder_of(package):
    """Folder of an installed package, found without importing it (nor, for a.b, more than a's finder); None where it is not installed."""
    first, *rest = package.split(".")
    spec = importlib.util.find_spec(first)
    folder = spec and pathlib.Path(spec.origin).parent.joinpath(*rest)
    return folder if folder and folder.is_dir() else None


def scan(package, folder):
    """Every module below `folder` as a list of Module; a name that an __init__ passes on counts for the module that defines it."""
    files = {_module_name(package, path.relative_to(folder)): path for path in sorted(folder.rglob("*.py"))}
    texts = {name: path.read_text(encoding="utf-8") for name, path in files.items()}
    trees = {name: ast.parse(text) for name, text in texts.items()}
    own = {name: _definitions(tree) for name, tree in trees.items()}
    imports = {name: list(_imports(tree, name, files[name].stem == "__init__", set(files))) for name, tree in trees.items()}
    return [
        Module(name, len(texts[name].splitlines()), topic_of(name.removeprefix(package).lstrip(".")),
               {n: b for n, b in own[name].items() if not n.startswith("_")}, _uses(name, imports, own))
        for name in files
    ]


def topic_of(name):
    """The topic of a module, from its name below the package."""
    return next(topic for topic, pattern in TOPICS if re.search(pattern, name))


def _module_name(package, relative):
    parts = relative.with_suffix("").parts
    return ".".join((package, *(parts[:-1] if parts[-1] == "__init__" else parts)))


def _definitions(tree):
    found = {n.name: None for n in tree.body if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))}
    return found | {n.name: [ast.unparse(b).split(".")[-1] for b in n.bases] for n in tree.body if isinstance(n, ast.ClassDef)}


def _imports(tree, name, is_package, known):
    """(module, name in it, name here) of every import of a scanned module, also inside functions; ("a.b", None, …) for a whole module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None, alias.asname or alias.name) for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            base = name.split(".")[: None if is_package else -1]
            base = base[: len(base) - node.level + 1] + [node.module or ""] if node.level else [node.module]
            module = ".".join(part for part in base if part)
            for alias in node.names:
                if f"{module}.{alias.name}" in known:
                    yield f"{module}.{alias.name}", None, alias.asname or alias.name
                elif module in known:
                    yield module, alias.name, alias.asname or alias.name


def _uses(name, imports, own):
    """Module -> sorted names that `name` takes from it, followed to where they are defined."""
    found = {}
    for module, wanted, _ in imports[name]:
        origin = _origin(module, wanted, imports, own, set())
        if origin != name:
            found.setdefault(origin, set()).update([wanted] if wanted and wanted != "*" else [])
    return {module: sorted(names) for module, names in sorted(found.items())}


def _origin(module, wanted, imports, own, seen):
    """The module that defines `wanted`, through re-exports; `module` itself where that cannot be told."""
    if wanted is None or wanted in own[module] or module in seen:
        return module
    for source, original, here in imports[module]:
        if here == wanted and original not in (None, "*"):
            return _origin(source, original, imports, own, seen | {module})
        if original == "*" and wanted in own[source]:
            return source
    return module


# ---- Tables -----------------------------------------------------------------------------------------------------------------


def topic_table(modules):
    """One row a topic: modules, lines, definitions, and the two names that most other modules take from it."""
    taken = pd.Series([(module, n) for m in modules for module, names in m.uses.items() for n in names], dtype=object).value_counts()
    rows = []
    for topic in dict.fromkeys(t for t, _ in TOPICS):
        part = {m.name: m for m in modules if m.topic == topic}
        popular = [n for (module, n) in taken.index if module in part and n in part[module].definitions][:2]
        rows.append({"topic": topic, "modules": len(part), "lines": sum(m.lines for m in part.values()),
                     "definitions": sum(len(m.definitions) for m in part.values()), "used": popular})
    return pd.DataFrame(rows).query("modules > 0").reset_index(drop=True)


def topic_edges(modules):
    """importer, imported (topics), uses: how many names (or whole modules) one topic takes from another; strongest first."""
    topic = {m.name: m.topic for m in modules}
    rows = [(m.topic, topic[used], max(1, len(names))) for m in modules for used, names in m.uses.items() if topic[used] != m.topic]
    frame = pd.DataFrame(rows, columns=["importer", "imported", "uses"])
    sums = frame.groupby(["importer", "imported"], as_index=False).uses.sum()
    return sums.sort_values("uses", ascending=False, kind="stable").reset_index(drop=True)


# ---- XMind ------------------------------------------------------------------------------------------------------------------


def tree(modules):
    """topic -> module name -> definitions as text ("MinMaxObserver (ObserverBase)", "prepare()"): what a map shows."""
    found = {}
    for topic in dict.fromkeys(t for t, _ in TOPICS):
        part = [m for m in modules if m.topic == topic]
        if part:
            found[topic] = {m.name: [_signature(n, bases) for n, bases in m.definitions.items()] for m in part}
    return found


def _signature(name, bases):
    return f"{name}()" if bases is None else f"{name} ({', '.join(bases)})" if bases else name


def arrows(modules, count=20, without=("models and tests", "prototypes")):
    """(importer, imported, names) of the `count` strongest uses between modules of different topics, as text: the arrows of the map."""
    topic = {m.name: m.topic for m in modules if m.topic not in without}
    between = [(m, used, names) for m in modules for used, names in m.uses.items() if names and {m.name, used} <= set(topic)]
    pairs = [(m.name, used, names) for m, used, names in between if m.topic != topic[used]]
    return [(a, b, ", ".join(names[:3])) for a, b, names in sorted(pairs, key=lambda p: (-len(p[2]), p[:2]))[:count]]


def write_xmind(path, sheets):
    """Write sheets (title -> (tree, arrows)) as an .xmind file, atomically and always with the same bytes.

    The format of XMind Zen, 2020 and later: a zip with content.json (a list of sheets; topics nest under children.attached),
    metadata.json and manifest.json. Ids are hashes of the topic's path.
    """
    content = []
    for title, (branches, links) in sheets.items():
        root = _topic(title, (title,), branches)
        ids = {child["title"]: child["id"] for topic in root["children"]["attached"] for child in topic["children"]["attached"]}
        relationships = [
            {"id": _id((title, "uses", a, b)), "class": "relationship", "end1Id": ids[a], "end2Id": ids[b], "title": text}
            for a, b, text in links
        ]
        content.append({"id": _id((title, "sheet")), "class": "sheet", "title": title, "rootTopic": root, "relationships": relationships})
    files = {
        "content.json": content,
        "metadata.json": {"creator": {"name": "quantlab", "version": "1"}, "dataStructureVersion": "2", "activeSheetId": content[0]["id"]},
        "manifest.json": {"file-entries": {"content.json": {}, "metadata.json": {}}},
    }
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, value in files.items():
            entry = zipfile.ZipInfo(name, (2020, 1, 1, 0, 0, 0))
            archive.writestr(entry, json.dumps(value, ensure_ascii=False, indent=1), zipfile.ZIP_DEFLATED)
    return pathlib.Path(path)


def _topic(title, path, below):
    """A topic with what hangs below it: a dict of branches or a list of leaves."""
    topic = {"id": _id(path), "class": "topic", "title": title}
    children = [_topic(name, (*path, name), below[name] if isinstance(below, dict) else []) for name in below]
    if children:
        topic["children"] = {"attached": children}
        if isinstance(below, dict) and len(path) > 1:
            topic["branch"] = "folded"
    return topic


def _id(path):
    return hashlib.sha256("\0".join(path).encode()).hexdigest()[:26]
