"""The gallery shows what is committed, each figure with a line about it."""

import re
import subprocess

import numpy as np
import pytest
from conftest import CHECKOUT, read_text
from matplotlib.figure import Figure
from PIL import Image

from quantlab import plots
from quantlab.workbook import gallery


@pytest.fixture(scope="module")
def committed():
    """Names of the pictures that git has; of all that lie in pic/ outside git."""
    listed = subprocess.run(["git", "ls-files", "pic", "results/pages"], cwd=CHECKOUT,
                            capture_output=True, text=True)
    files = listed.stdout.split() or [f"pic/{p.name}" for p in (CHECKOUT / "pic").iterdir()]
    return [file.rpartition("/")[2] for file in files]


def test_every_committed_picture_is_in_the_committed_gallery(committed):
    pictures = {name for name in committed if name.endswith(".png")}
    found = gallery.figures(pictures)
    assert {figure.file for figure in found} == pictures, "a line for it in gallery.ABOUT"
    pages = [name for name in committed if name.endswith(".md") and name != "README.md"]
    assert gallery.page(found, pages) == read_text(CHECKOUT / "pic" / "README.md"), "run: publish"


def test_lines_are_of_the_figures_that_notebooks_save_and_none_is_left_over():
    paths = [*(CHECKOUT / "notebooks").glob("[0-9]*.py")]
    files = [*paths, CHECKOUT / "quantlab" / "workbook" / "figures.py"]
    saved = {name for file in files for name in re.findall(r'"(\d\d_\w+)"', read_text(file))}
    named = {path.stem for path in paths} | {"12_lstm"}  # notebooks; always of the digits
    assert set(gallery.ABOUT) - named - {"source_map"} == saved - named


def test_networks_stand_beside_each_other_and_smoke_runs_not_at_all():
    files = ["10_ladder_resnet20_my_set.png", "10_ladder_resnet50_my_set.png",
             "10_ladder_resnet20_digits.png", "images_train_my_set.png", "source_map.png",
             "13_small_against_large_my_set.png", "mine.png", "10_ladder.svg"]
    found = gallery.figures(files)
    assert [(f.name, f.model, f.data) for f in found] == [
        ("10_ladder", "resnet50", "my_set"), ("10_ladder", "resnet20", "my_set"),
        ("source_map", "", ""), ("13_small_against_large", "", "my_set")]
    text = gallery.page(found, ["10_original_experiment-resnet50-my_set.md"])
    assert text.count("\n## ") == 3
    title, links, about, *table = text.split("\n## ")[1].split("\n\n")
    assert title == "[10 · The original experiment](../notebooks/10_original_experiment.ipynb)"
    page = "10_original_experiment-resnet50-my_set.md"
    assert links.endswith(f": [resnet50-my_set](../results/pages/{page}).")
    assert about == gallery.ABOUT["10_ladder"]
    assert table[0].splitlines() == [
        "| resnet50, my_set | resnet20, my_set |", "| --- | --- |",
        "| [![10_ladder](10_ladder_resnet50_my_set.png)](10_ladder_resnet50_my_set.svg) | "
        "[![10_ladder](10_ladder_resnet20_my_set.png)](10_ladder_resnet20_my_set.svg) |"]
    assert gallery.page([]) == gallery.INTRODUCTION + "\n"


def test_pictures_become_small_and_look_the_same(workbook):
    x = np.linspace(0, 6, 100)
    figure = Figure(figsize=(4, 3))
    axes = figure.subplots()
    for shift in range(4):
        axes.plot(x, np.sin(x + shift), label=f"line {shift}")
    axes.legend()
    plots.save(figure, "10_ladder", "my_set", "resnet20")
    file = workbook / "pic" / "10_ladder_resnet20_my_set.png"
    before, size = np.asarray(Image.open(file).convert("RGB")).astype(int), file.stat().st_size
    assert gallery.write() == workbook / "pic" / "README.md"
    assert file.name in read_text(gallery.write())
    after = np.asarray(Image.open(file).convert("RGB")).astype(int)
    assert file.stat().st_size < 0.6 * size
    assert (abs(after - before).max(-1) > 16).mean() < 1e-3 and after.shape == before.shape
    written = file.read_bytes()
    gallery.write()
    assert file.read_bytes() == written, "once"
