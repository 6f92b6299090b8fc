"""Fixtures: a workbook of its own for every test that writes, one in which every notebook has run,
the committed digits network, and the JPEG images where they are.
"""

import contextlib
import copy
import json
import os

# with a process on every core, torch's threads would wait for each other
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import math
import pathlib
import shutil
import tarfile

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from PIL import Image
from xdist.scheduler import LoadScopeScheduling

import quantlab as ql
from quantlab.system import files
from quantlab.workbook import notebooks, run

CHECKOUT = files.PACKAGE.parent
JPEG_ARCHIVE = CHECKOUT.parent / "shared" / "data" / "cifar10-images.tar.xz"
os.environ["JUPYTER_PLATFORM_DIRS"] = "1"
settings.register_profile("quick", max_examples=100, deadline=None, derandomize=True)
settings.register_profile("long", max_examples=2000, deadline=None)  # make test-long
settings.load_profile("quick")


class OneProcessRunsTheNotebooks(LoadScopeScheduling):
    """They are run once, for all tests of them: one group, which goes out first, as the largest."""

    def _split_scope(self, nodeid):
        return "notebooks" if "test_notebooks" in nodeid else nodeid


def pytest_xdist_make_scheduler(config, log):
    return OneProcessRunsTheNotebooks(config, log)


def pytest_configure(config):
    config.addinivalue_line("markers", "long: only in make test-long")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--hypothesis-profile") != "long":
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="takes long: make test-long"))


def fuzz(examples):
    """Hypothesis settings of a test: that many examples, 20 times as many in the profile "long"."""
    quick = settings.get_profile("quick").max_examples
    return settings(max_examples=examples * settings.default.max_examples // quick)


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    for name in ("QUANTLAB_DATA", "QUANTLAB_ROOT", "QUANTLAB_CIFAR10_URL", "DATA_NAME"):
        monkeypatch.delenv(name, raising=False)
    torch.manual_seed(0)


def make_workbook(place):
    """A folder that the package takes for the workbook: notebooks, the digits checkpoint and
    pyproject.toml; everything else empty.
    """
    place.mkdir()
    ignored = shutil.ignore_patterns(".*")
    shutil.copytree(CHECKOUT / "notebooks", place / "notebooks", ignore=ignored)
    shutil.copy(CHECKOUT / "pyproject.toml", place)
    copy_checkpoint(place)
    return place


def is_gone(process):
    """Whether a process has ended; a zombie whose parent has not asked counts."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(process).status() == psutil.STATUS_ZOMBIE
    return True


def copy_checkpoint(place):
    (place / "checkpoint").mkdir(exist_ok=True)
    for file in (CHECKOUT / "checkpoint").glob("resnet20-digits.*"):
        shutil.copy(file, place / "checkpoint")


@pytest.fixture
def workbook(tmp_path, monkeypatch):
    place = make_workbook(tmp_path / "workbook")
    monkeypatch.setenv("QUANTLAB_ROOT", str(place))
    return place


@pytest.fixture(scope="session")
def _executed(tmp_path_factory):
    place = make_workbook(tmp_path_factory.mktemp("executed") / "workbook")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUANTLAB_ROOT", str(place))
        for name in ("QUANTLAB_DATA", "DATA_NAME"):
            patch.delenv(name, raising=False)
        shutil.rmtree(place / "checkpoint")
        first, *others = notebooks.notebooks()
        given = {"data": "digits", "epochs": "1", "solutions": "True"}
        trained = run.run([first], given, time_limit=400)
        assert trained.status[0] == "done", trained.message[0]
        card = json.loads(read_text(place / "checkpoint" / "resnet20-digits.json"))
        copy_checkpoint(place)
        frame = run.run(others, source="digits", time_limit=400)
    return place, pd.concat([trained, frame], ignore_index=True), card


@pytest.fixture
def executed(_executed, monkeypatch):
    """(workbook, frame of `run`, card): every notebook run once, in the smoke preset. The first
    found no checkpoint and trained for an epoch, which the card states, and ran its exercises'
    solutions; the others have the digits checkpoint and empty exercises.
    """
    monkeypatch.setenv("QUANTLAB_ROOT", str(_executed[0]))
    return _executed


@pytest.fixture(scope="session")
def digits():
    return ql.load_data("digits", verbose=False)


@pytest.fixture(scope="session")
def resnet20():
    return ql.load_model("resnet20", CHECKOUT / "checkpoint" / "resnet20-digits.safetensors")


@pytest.fixture(scope="session")
def stats(resnet20, digits):
    return ql.collect(resnet20, digits.calibration(256, seed=0))


@pytest.fixture(scope="session")
def jpeg():
    """All 60,000 CIFAR-10 images as JPEG; tests that need them say so where they are not."""
    if not JPEG_ARCHIVE.is_file():
        pytest.skip("cifar10-images.tar.xz is not in ../shared/data")
    return ql.load_data(JPEG_ARCHIVE)


def make_image_folder(folder, classes=("cat", "dog"), train=6, test=3, size=(8, 8), suffix=".png"):
    """A small image set in the ImageFolder layout, every image another."""
    generator = np.random.default_rng(0)
    for part, count in (("train", train), ("test", test)):
        for name in classes:
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{i:04d}{suffix}")
    return folder


def make_tar(folder, archive):
    """Pack a folder as tar.gz, members in reverse order."""
    with tarfile.open(archive, "w:gz") as tar:
        for file in sorted(folder.rglob("*"), reverse=True):
            if file.is_file():
                tar.add(file, f"{folder.name}/{file.relative_to(folder)}")
    return archive


@pytest.fixture
def image_folder(tmp_path):
    return make_image_folder(tmp_path / "pets")


def read_text(path):
    return pathlib.Path(path).read_text(encoding="utf-8")


def equal_codes(a, b):
    """True when two dicts of integer codes by edge are the same."""
    return a.keys() == b.keys() and all(torch.equal(a[edge], b[edge]) for edge in a)


NONSENSE = st.sampled_from([
    None, True, -1, 0, 1, 3, 128, 255, 256, 2**31, 2**40, 10**400, -0.0, 0.5, 1e-300, 3e38,
    math.nan, math.inf, -math.inf, "", "_0", "_3", "input_1", "quantizers._1", "nobody",
    "line\nbreak", "\x1b[2J", [], ["_0"], {}, {"_0": 9}, {"_0": "_0"}])


def mutate_fields(value, data):
    """Change one field of a JSON value, drawn by hypothesis: set, delete, rename or repeat it."""
    *path, key = data.draw(st.sampled_from(list(_places(value))))
    for step in path:
        value = value[step]
    change = data.draw(st.sampled_from(["set", "set", "set", "delete", "rename", "repeat"]))
    if change == "set":
        value[key] = copy.deepcopy(data.draw(NONSENSE))  # which is changed by the next change
    elif change == "delete":
        del value[key]
    elif isinstance(value, list):
        value.append(value[key])
    else:
        value["nobody" if change == "rename" else "_0"] = value.pop(key)


def _places(value, path=()):
    """The path of every field, whole branches among them."""
    if path:
        yield path
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from _places(value[key], (*path, key))


def mutate_tensors(tensors, data):
    """Change one tensor of a dict: a value, its type, its shape or its name."""
    name = data.draw(st.sampled_from(sorted(tensors)))
    x = tensors[name].clone()
    changes = ["value", "value", "value", "type", "shape", "delete", "rename"]
    change = data.draw(st.sampled_from(changes))
    if change == "value":
        values = [0, 1, -1, 255, 2**30, 2**31 - 1, -(2**31), 1e-45, 3e38, math.nan, math.inf]
        value = data.draw(st.sampled_from(values))
        place = data.draw(st.integers(0, x.numel() - 1))
        has_value = x.is_floating_point() or math.isfinite(value)
        x.view(-1)[place] = torch.tensor(value).to(x.dtype) if has_value else 77
    elif change == "type":
        x = x.to(data.draw(st.sampled_from([
            torch.float64, torch.bfloat16, torch.int64, torch.int8, torch.bool])))
    elif change == "shape":
        flat = x.flatten()
        x = [x[None], flat[:-1], torch.cat([flat, flat]), flat[0]][data.draw(st.integers(0, 3))]
    if change in ("delete", "rename"):
        del tensors[name]
    if change != "delete":
        tensors["nobody" if change == "rename" else name] = x.contiguous()
