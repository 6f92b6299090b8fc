"""The source map against a small package that the test writes, and .xmind against its format."""

import json
import sys
import zipfile

import pytest

from quantlab.rivals import sourcemap

FILES = {
    "__init__.py": "from .observer import *\nfrom .prepare import prepare as prepare_model\n",
    "observer.py": """\
import torch

class ObserverBase:
    def forward(self): ...

class MinMaxObserver(ObserverBase): ...
class _Hidden: ...
""",
    "qconfig.py": """\
from pack.observer import MinMaxObserver, ObserverBase
from pack import prepare_model
""",
    "prepare.py": """\
def prepare(model):
    from .fx import passes
    from .fx.passes import insert
    return insert(model)
""",
    "fx/__init__.py": "",
    "fx/passes.py": """\
import pack.observer as o
from .. import MinMaxObserver
from ..prepare import prepare
async def insert(model): ...
""",
    "stubs.py": "raise RuntimeError('scanning must not import')\n",
}


@pytest.fixture
def package(tmp_path):
    for name, text in FILES.items():
        path = tmp_path / "pack" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "pack"


@pytest.fixture
def modules(package):
    return {m.name: m for m in sourcemap.scan("pack", package)}


def test_modules_definitions_and_lines(modules):
    names = ("observer", "qconfig", "prepare", "fx", "fx.passes", "stubs")
    assert set(modules) == {"pack", *(f"pack.{name}" for name in names)}
    found = modules["pack.observer"].definitions
    assert found == {"ObserverBase": [], "MinMaxObserver": ["ObserverBase"]}, "no private names"
    assert modules["pack.prepare"].definitions == {"prepare": None}
    assert modules["pack.fx.passes"].definitions == {"insert": None}
    assert modules["pack.observer"].lines == 7 and modules["pack.fx"].lines == 0
    assert "pack" not in sys.modules and "pack.stubs" not in sys.modules


def test_uses_follow_reexports_relative_and_star_imports(modules):
    uses = {name.removeprefix("pack."): module.uses for name, module in modules.items()}
    observers = ["MinMaxObserver", "ObserverBase"]
    assert uses["qconfig"] == {"pack.observer": observers, "pack.prepare": ["prepare_model"]}
    # imports inside functions, whole modules and names
    assert uses["prepare"] == {"pack.fx.passes": ["insert"]}
    # through a star import
    assert uses["fx.passes"] == {"pack.observer": ["MinMaxObserver"], "pack.prepare": ["prepare"]}
    assert uses["pack"] == {"pack.observer": [], "pack.prepare": ["prepare"]}


def test_topics_and_tables(modules):
    topics = {name.removeprefix("pack."): m.topic for name, m in modules.items()}
    assert topics == {
        "pack": "shared", "observer": "observers", "qconfig": "qconfig, backends",
        "prepare": "prepare", "fx": "graph passes", "fx.passes": "graph passes",
        "stubs": "entry points"}
    table = sourcemap.topic_table(list(modules.values())).set_index("topic")
    assert table.modules.sum() == len(modules)
    assert table.lines.sum() == sum(m.lines for m in modules.values())
    assert table.used["observers"] == ["MinMaxObserver", "ObserverBase"]
    edges = sourcemap.topic_edges(list(modules.values())).set_index(["importer", "imported"]).uses
    assert edges["qconfig, backends", "observers"] == 2 and edges["shared", "observers"] == 1
    assert ("observers", "prepare") not in edges


@pytest.mark.parametrize("name, topic", [
    ("quantization.fake_quantize", "fake quantization, QAT"),
    ("quantization.fuse_modules", "fusing"), ("prototype.qat.api", "prototypes"),
    ("quantization.fx.convert", "convert"), ("quantization.quantize_fx", "entry points"),
    ("nn.intrinsic.modules.fused", "fusing"),
    ("nn.quantized.dynamic.modules.rnn", "quantized modules"),
    ("quantization.pt2e.observer", "observers"),
    ("quantization.pt2e.quantizer.x86_inductor_quantizer", "quantizers"),
])
def test_topics_of_the_installed_packages_names(name, topic):
    assert sourcemap.topic_of(name) == topic


def topics_below(topic, path=()):
    """(path of titles, id) of a topic and everything below it, as XMind reads it."""
    path = (*path, topic["title"])
    yield path, topic["id"]
    for child in topic.get("children", {}).get("attached", []):
        assert child["class"] == "topic"
        yield from topics_below(child, path)


def test_xmind_file(modules, tmp_path):
    found = list(modules.values())
    sheets = {"pack 1.0": (sourcemap.tree(found), sourcemap.arrows(found)),
              "again": (sourcemap.tree(found), [])}
    path = sourcemap.write_xmind(tmp_path / "map.xmind", sheets)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        files = {name: json.loads(archive.read(name)) for name in archive.namelist()}
    assert set(files["manifest.json"]["file-entries"]) | {"manifest.json"} == set(files)
    content = files["content.json"]
    assert [s["title"] for s in content] == list(sheets)
    assert files["metadata.json"]["activeSheetId"] == content[0]["id"]
    topics = [t for sheet in content for t in topics_below(sheet["rootTopic"])]
    relationships = [r for sheet in content for r in sheet["relationships"]]
    ids = [i for _, i in topics] + [part["id"] for part in [*relationships, *content]]
    assert len(ids) == len(set(ids)) and all(ids)
    modules_found = {p[1:] for p, _ in topics if p[0] == "pack 1.0" and len(p) == 3}
    assert modules_found == {(m.topic, m.name) for m in found}
    leaf = ("pack 1.0", "observers", "pack.observer", "MinMaxObserver (ObserverBase)")
    assert leaf in {p for p, _ in topics}
    title = {i: p[-1] for p, i in topics}
    links = {(title[r["end1Id"]], title[r["end2Id"]]) for r in content[0]["relationships"]}
    assert links == {(a, b) for a, b, _ in sourcemap.arrows(found)}
    assert ("pack.qconfig", "pack.observer") in links
    again = sourcemap.write_xmind(tmp_path / "other.xmind", sheets)
    assert again.read_bytes() == path.read_bytes(), "the same bytes every time"


def test_installed_torch_is_found_without_importing(tmp_path):
    assert sourcemap.folder_of("torch.ao").parts[-2:] == ("torch", "ao")
    assert sourcemap.folder_of("no_such_package") is None
    assert sourcemap.folder_of("torch.no_such_folder") is None
