"""Keys come from contents: not from places, dates or machines, and from all that can be reached."""

import os
import shutil
import subprocess
import sys

import grimp
import nbformat
import pytest
from conftest import CHECKOUT, make_image_folder, read_text

from quantlab.workbook import contents, keys, notebooks

TRAINING = "import quantlab as ql\nfrom quantlab.workbook import results"
EXECUTING = "import quantlab as ql\nimodel = ql.to_integer(qmodel)"


def write_notebook(folder, code, **parameters):
    """A notebook of three cells: title, parameters, code."""
    settings = {"data": "digits", "model": "resnet20", "checkpoint": "auto", **parameters}
    text = "\n".join(f"{name} = {value!r}" for name, value in settings.items())
    cells = [
        nbformat.v4.new_markdown_cell("# 98 · Tiny"),
        nbformat.v4.new_code_cell(text, metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(code),
    ]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "98_tiny.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=notebooks.KERNEL), path)
    return path


def make_clone(place):
    """The package, one checkpoint and a set of images, in a folder of their own."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(CHECKOUT / "quantlab", place / "quantlab", ignore=ignored)
    (place / "checkpoint").mkdir()
    for file in (CHECKOUT / "checkpoint").glob("resnet20-digits.*"):
        shutil.copy(file, place / "checkpoint")
    make_image_folder(place / "data" / "pets")
    return place


@pytest.fixture
def clone(tmp_path, monkeypatch):
    place = make_clone(tmp_path / "clone")
    for module in (keys, contents):
        monkeypatch.setattr(module, "PACKAGE", place / "quantlab")
    monkeypatch.setenv("QUANTLAB_ROOT", str(place))
    return place


def key_of(place, code=TRAINING, parameters=None):
    notebook = notebooks.read(write_notebook(place / "notebooks", code))
    return keys.run_key(notebook, parameters or {})


def edit(file, old, new):
    text = read_text(file)
    assert old in text
    file.write_text(text.replace(old, new), encoding="utf-8")


def test_two_clones_in_different_folders_give_the_same_key(clone, tmp_path):
    """The other clone in a process of its own, with its own package, from another directory."""
    other = make_clone(tmp_path / "elsewhere" / "deep")
    path = write_notebook(other / "notebooks", EXECUTING)
    named = {"data": "data/pets", "checkpoint": "checkpoint/resnet20-digits.safetensors"}
    script = (
        "import pathlib, sys; from quantlab.workbook import keys, notebooks\n"
        "notebook = notebooks.read(pathlib.Path(sys.argv[1]))\n"
        f"print(keys.PACKAGE, keys.run_key(notebook, {named}), keys.run_key(notebook, {{}}))"
    )
    environment = {**os.environ, "QUANTLAB_ROOT": str(other), "PYTHONPATH": str(other)}
    command = [sys.executable, "-c", script, str(path)]
    said = subprocess.run(command, cwd=other, env=environment, capture_output=True, text=True)
    package, with_paths, plain = said.stdout.split()
    assert package == str(other / "quantlab"), said.stderr
    here = {name: str(clone / value) for name, value in named.items()}
    assert key_of(clone, EXECUTING, here) == with_paths
    assert key_of(clone, EXECUTING) == plain != with_paths


def test_touching_files_changes_no_key(clone):
    named = {"data": str(clone / "data" / "pets")}
    before = key_of(clone, EXECUTING, named)
    for file in clone.rglob("*"):
        os.utime(file, (1, 1))
    assert key_of(clone, EXECUTING, named) == before


def test_other_normalisation_constants_change_every_key(clone):
    sources = {path.stem: notebooks.read(path) for path in (CHECKOUT / "notebooks").glob("*.ipynb")}

    def all_keys():
        digits = {"data": "digits"}
        return {name: keys.run_key(notebook, digits) for name, notebook in sources.items()}

    before = all_keys()
    files = [f for f in (clone / "quantlab" / "images").glob("*.py") if "0.4914" in read_text(f)]
    assert files, "CIFAR-10's mean stands somewhere in images/"
    edit(files[0], "0.4914", "0.4915")
    after = all_keys()
    assert before and not [name for name in before if before[name] == after[name]]


def test_code_counts_where_a_notebook_reaches_it(clone):
    names = ("kernels.c", "bytes.h", "evaluate.py")
    *kernels, train = (next((clone / "quantlab").rglob(name)) for name in names)
    between = key_of(clone, TRAINING), key_of(clone, EXECUTING)
    for kernel in kernels:
        before = between
        kernel.write_text(read_text(kernel) + "\n", encoding="utf-8")
        between = key_of(clone, TRAINING), key_of(clone, EXECUTING)
        assert between[0] == before[0] and between[1] != before[1], "C counts, in its room"
    train.write_text(read_text(train) + "\n", encoding="utf-8")
    after = key_of(clone, TRAINING), key_of(clone, EXECUTING)
    assert not {*after} & {*between}, "the core counts everywhere"


def test_weights_images_parameters_and_cells_count_by_content(clone):
    pets, weights = clone / "data" / "pets", clone / "checkpoint" / "resnet20-digits.safetensors"

    def with_data(place):
        return key_of(clone, parameters={"data": str(place)})

    def with_weights(place):
        return key_of(clone, parameters={"checkpoint": str(place)})

    seen = [key_of(clone), with_data(pets), with_weights(weights), key_of(clone, "x = 1")]
    seen.append(key_of(clone, parameters={"model": "resnet50"}))
    assert len({*seen}) == 5
    moved, renamed = clone / "moved", clone / "copy.safetensors"
    shutil.copytree(pets, moved)
    shutil.copy(weights, renamed)
    assert with_data(moved) == seen[1] and with_weights(renamed) == seen[2]
    next((moved / "train").rglob("*.png")).unlink()
    renamed.write_bytes(b"other weights")
    assert with_data(moved) not in seen and with_weights(renamed) not in seen
    weights.write_bytes(b"other weights")
    assert key_of(clone) not in seen, "auto stands for the weights that there are"


def test_an_executed_copy_is_the_same_notebook(clone):
    path = write_notebook(clone / "notebooks", TRAINING)
    before = keys.run_key(notebooks.read(path), {})
    executed = nbformat.read(path, as_version=4)
    executed.cells[2].execution_count = 7
    executed.cells[2].outputs = [nbformat.v4.new_output("stream", text="done")]
    executed.metadata["language_info"] = {"version": "3.12"}
    nbformat.write(executed, path)
    assert keys.run_key(notebooks.read(path), {}) == before


def test_rooms_are_those_that_grimp_finds():
    """A library's import graph of the package: what every module reaches, through whatever."""
    graph = grimp.build_graph("quantlab", cache_dir=None)
    modules = [name for name in graph.modules if name.count(".") == 2]
    assert len(modules) > 30
    for module in sorted(modules):
        reached = {module, *graph.find_upstream_modules(module)}
        rooms = {name.split(".")[1] for name in reached if "." in name}
        top = {file.stem for file in (CHECKOUT / "quantlab").glob("*.py")}
        assert set(keys.rooms_reached(f"import {module}")) == rooms - top, module
