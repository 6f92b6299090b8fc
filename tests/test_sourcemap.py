"""The source map against a small package that the test writes, and the .xmind file against its format."""

import json
import sys
import zipfile

import pytest

from quantlab.rivals import sourcemap

FILES = {
    "__init__.py": "from .observer import *\nfrom .prepare import prepare as prepare_model\n",
    "observer.py": (
        "import torch\n\nclass ObserverBase:\n    def forward(self): ...\n\n"
        "class MinMaxObserver(ObserverBase): ...\nclass _Hidden: ...\n"
    ),
    "qconfig.py": "from pack.observer import MinMaxObserver, ObserverBase\nfrom pack import prepare_model\n",
    "prepare.py": "def prepare(model):\n    from .fx import passes\n    from .fx.passes import insert\n    return insert(model)\n",
    "fx/__init__.py": "",
    "fx/passes.py": (
        "import pack.observer as o\nfrom .. import MinMaxObserver\nfrom ..prepare import prepare\nasync def insert(model): ...\n"
    ),
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
    assert set(modules) == {"pack", "pack.observer", "pack.qconfig", "pack.prepare", "pack.fx", "pack.fx.passes", "pack.stubs"}
    assert modules["pack.observer"].definitions == {"ObserverBase": [], "MinMaxObserver": ["ObserverBase"]}, "private names are left out"
    assert modules["pack.prepare"].definitions == {"prepare": None} and modules["pack.fx.passes"].definitions == {"insert": None}
    assert modules["pack.observer"].lines == 7 and modules["pack.fx"].lines == 0
    assert "pack" not in sys.modules and "pack.stubs" not in sys.modules


def test_uses_follow_reexports_relative_and_star_imports(modules):
    assert modules["pack.qconfig"].uses == {"pack.observer": ["MinMaxObserver", "ObserverBase"], "pack.prepare": ["prepare_model"]}
    assert modules["pack.prepare"].uses == {"pack.fx.passes": ["insert"]}, "imports inside functions, whole modules and names"
    assert modules["pack.fx.passes"].uses == {"pack.observer": ["MinMaxObserver"], "pack.prepare": ["prepare"]}, "star import"
    assert modules["pack"].uses == {"pack.observer": [], "pack.prepare": ["prepare"]}


def test_topics_and_tables(modules):
    topics = {name: m.topic for name, m in modules.items()}
    assert topics["pack.observer"] == "observers" and topics["pack.qconfig"] == "qconfig, backends" and topics["pack.prepare"] == "prepare"
    assert topics["pack.fx.passes"] == "graph passes" and topics["pack.stubs"] == "entry points" and topics["pack"] == "shared"
    table = sourcemap.topic_table(list(modules.values())).set_index("topic")
    assert table.modules.sum() == len(modules) and table.lines.sum() == sum(m.lines for m in modules.values())
    assert table.used["observers"] == ["MinMaxObserver", "ObserverBase"]
    edges = sourcemap.topic_edges(list(modules.values())).set_index(["importer", "imported"]).uses
    assert edges["qconfig, backends", "observers"] == 2 and edges["shared", "observers"] == 1 and ("observers", "prepare") not in edges


@pytest.mark.parametrize(
    "name, topic",
    [("quantization.fake_quantize", "fake quantization, QAT"), ("quantization.fuse_modules", "fusing"), ("prototype.qat.api", "prototypes"),
     ("quantization.fx.convert", "convert"), ("quantization.quantize_fx", "entry points"), ("nn.intrinsic.modules.fused", "fusing"),
     ("nn.quantized.dynamic.modules.rnn", "quantized modules"), ("quantization.pt2e.observer", "observers"),
     ("quantization.pt2e.quantizer.x86_inductor_quantizer", "quantizers")],
)
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
    sheets = {"pack 1.0": (sourcemap.tree(found), sourcemap.arrows(found)), "again": (sourcemap.tree(found), [])}
    path = sourcemap.write_xmind(tmp_path / "map.xmind", sheets)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        content, metadata, manifest = (json.loads(archive.read(f"{n}.json")) for n in ("content", "metadata", "manifest"))
        assert set(manifest["file-entries"]) | {"manifest.json"} == set(archive.namelist())
    assert [s["title"] for s in content] == list(sheets) and metadata["activeSheetId"] == content[0]["id"]
    topics = [t for sheet in content for t in topics_below(sheet["rootTopic"])]
    ids = [i for _, i in topics] + [r["id"] for s in content for r in s["relationships"]] + [s["id"] for s in content]
    assert len(ids) == len(set(ids)) and all(ids)
    expected = {(m.topic, m.name) for m in found}
    assert {p[1:] for p, _ in topics if p[0] == "pack 1.0" and len(p) == 3} == expected
    assert ("pack 1.0", "observers", "pack.observer", "MinMaxObserver (ObserverBase)") in {p for p, _ in topics}
    title = {i: p[-1] for p, i in topics}
    links = {(title[r["end1Id"]], title[r["end2Id"]]) for r in content[0]["relationships"]}
    assert links == {(a, b) for a, b, _ in sourcemap.arrows(found)} and ("pack.qconfig", "pack.observer") in links
    assert sourcemap.write_xmind(tmp_path / "other.xmind", sheets).read_bytes() == path.read_bytes(), "the same bytes every time"


def test_installed_torch_is_found_without_importing(tmp_path):
    assert sourcemap.folder_of("torch.ao").parts[-2:] == ("torch", "ao")
    assert sourcemap.folder_of("no_such_package") is None and sourcemap.folder_of("torch.no_such_folder") is None
