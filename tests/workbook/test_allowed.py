"""What parameters may be: the table is what notebooks say and what the package accepts."""

import itertools
import re

import pytest
from conftest import CHECKOUT, make_image_folder, make_tar

import quantlab as ql
from quantlab.improving.reconstruct import ReconstructConfig
from quantlab.observers import OBSERVERS
from quantlab.system.errors import UserError
from quantlab.workbook import allowed, notebooks
from quantlab.workbook.methods import Methods, config_of
from quantlab.workbook.request import TRAINING_IMAGES, requested
from quantlab.workbook.study import PRESETS

FREE = {"data", "checkpoint", "edge", "layer", "target", "weights"}  # checked otherwise, or names
INSPECT = CHECKOUT / "notebooks" / "inspect_network.ipynb"
OURS = [*notebooks.notebooks().values(), notebooks.read(INSPECT)]


def comments(notebook):
    """Parameter -> its comment, behind it or on the line above."""
    found, above = {}, ""
    first = re.compile(r"(data|target|(# .*\n)+source) = ")
    (cell,) = (source for _, source in notebook.cells if first.match(source))
    for line in cell.splitlines():
        if line.startswith("#"):
            above += line
            continue
        name, _, rest = line.partition(" = ")
        found[name], above = above + rest.partition("#")[2], ""
    return found


@pytest.mark.parametrize("notebook", OURS, ids=lambda notebook: notebook.path.stem)
def test_every_parameter_is_declared_and_its_comment_says_the_same(notebook):
    said = comments(notebook)
    assert said.keys() == notebook.parameters.keys()
    allowed.check(**notebook.parameters)
    for name, default in notebook.parameters.items():
        assert name in FREE or isinstance(default, bool) or allowed.describe(name), name
        between = re.search(r"\b([\d.]+) to ([\d.]+)\b", said[name])
        if between and not isinstance(default, str):
            assert allowed.NUMBERS[name] == tuple(map(float, between.groups())), name
        if name in allowed.NAMES and name != "observer":
            assert {*allowed.NAMES[name]} <= {*re.findall(r"\w+", said[name])}, name


def test_the_table_allows_what_the_package_accepts_and_nothing_else():
    assert tuple(OBSERVERS) == allowed.OBSERVERS and PRESETS == allowed.PRESETS
    for bits in range(12):
        accepted = raises_not(lambda b: ql.QuantConfig(b, b), bits)
        for name in ("bits", "weight_bits", "act_bits", "qat_bits"):
            assert raises_not(lambda b, n=name: allowed.check(**{n: b}), bits) == accepted
    for widths in itertools.product((1, 2, 8, 9), repeat=3):
        names = "/".join(map(str, widths[:2])), "/".join(map(str, widths))
        for name in names:
            assert raises_not(lambda w: allowed.check(widths=f"4/4,{w}"), name) == raises_not(
                lambda w: ql.QuantConfig(*map(int, w.split("/")[:2]), first_last_bits=int(
                    w.split("/")[-1])), name)
            assert raises_not(config_of, name) == raises_not(allowed.split_width, name)
    for name in allowed.LEARNED:
        assert ReconstructConfig.preset(name.lower())
    assert Methods.check(allowed.METHODS) == [*allowed.METHODS]
    for name, images in TRAINING_IMAGES.items():
        assert name != "digits" or images == len(ql.load_data(name).train)


def raises_not(function, value):
    try:
        function(value)
    except UserError:
        return False
    return True


@pytest.mark.parametrize("name, value, said", [
    ("weight_bits", 9, "weight_bits=9: a width is an integer from 2 to 8"),
    ("clip_share", float("nan"), "clip_share=nan: allowed are values from 0.1 to 1.5"),
    ("n_calibration", -1, "n_calibration=-1: allowed are values from 0"),
    ("bits", "four", "bits='four': a width is an integer"),
    ("observer", "percntile", "observer 'percntile' is unknown; did you mean percentile?"),
    ("widths", "", "width '': give the bits, 2 to 8, of weights/activations"),
    ("widths", "4/4, 2/2", "width ' 2/2': give the bits"),
    ("methods", "AdaRound,QDropp", "method 'QDropp': 'QDropp' is unknown; did you mean QDrop?"),
    ("best_method", "QDrop + finetuning", "'finetuning' is unknown; did you mean fine-tuning?"),
    ("method", "nearest", "method 'nearest' is unknown; use one of: AdaRound, BRECQ, QDrop"),
    ("rivals", "onnx", "rivals 'onnx' is unknown"),
    ("source", None, "source None is unknown; use one of: auto, local, published"),
    ("methods", None, "methods=None is no text; allowed: auto, none, or methods"),
    ("mean", "0.5 0.5", "'0.5 0.5': give three numbers"), ("std", "0 0 0", "are above 0"),
])
def test_what_is_not_allowed_gets_one_line(name, value, said):
    with pytest.raises(UserError) as caught:
        allowed.check(**{name: value})
    assert said in str(caught.value) and "\n" not in str(caught.value)


# ---- What is asked to be run ---------------------------------------------------------------------


def edited(workbook, name, old, new):
    path = workbook / "notebooks" / f"{name}.ipynb"
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1
    path.write_text(text.replace(old, new), encoding="utf-8")


def test_a_default_that_is_not_allowed_stops_its_notebook_alone(workbook):
    edited(workbook, "05_activation_histograms", "bits = 4 ", "bits = 12 ")
    assert requested(["04"], {"bits": "3"})
    assert requested(["05"], {"bits": "3"})[0][1] == {"bits": 3}
    with pytest.raises(UserError, match="bits=12: a width is an integer from 2 to 8"):
        requested(["05"], {}, "digits")
    problems = {n.path.stem: n.problem for n, _ in requested((), {}, "digits") if n.problem}
    assert problems == {"05_activation_histograms": "bits=12: a width is an integer from 2 to 8"}
    with pytest.raises(UserError, match="'no/such' not found"):
        requested((), {}, "no/such")


def test_a_name_that_means_something_else_in_a_notebook_of_one_s_own_is_left_alone(workbook):
    edited(workbook, "13_report", 'source = \\"auto\\"', 'source = \\"mine.csv\\"')
    assert requested(["13"], {"source": "other.csv"})[0][1] == {"source": "other.csv"}


@pytest.mark.parametrize("pack", [lambda folder: folder, lambda folder: make_tar(
    folder, folder.with_suffix(".tar.gz"))], ids=["folder", "archive"])
def test_a_small_data_set_says_how_many_images_are_needed_for_what(workbook, tmp_path, pack):
    (workbook / "checkpoint" / "resnet20-pets.json").write_text("{}")
    few = pack(make_image_folder(tmp_path / "few", train=35, test=1))
    said = r"few\S* has 62 training images, .*need at least 64 of them .*\(n_calibration\)"
    with pytest.raises(UserError, match=said):
        requested((), {}, str(few))
    pets = make_image_folder(tmp_path / "pets", train=36, test=1)
    (pets / "train" / "cat" / "deeper").mkdir()
    for file in [*(pets / "train" / "cat").glob("000*.png")]:
        file.rename(file.parent / "deeper" / file.name)
    pets = pack(pets)
    there = len(ql.load_data(pets).train)
    assert there == 64 and len(requested((), {}, str(pets))) == len(OURS) - 1
    assert requested(["05"], {"n_calibration": "64"}, str(pets))
    with pytest.raises(UserError, match=r"n_calibration=65: .*pets\S* has 64 training images"):
        requested(["05"], {"n_calibration": "65"}, str(pets))


def test_a_network_without_a_checkpoint_is_refused_unless_it_is_trained_before(workbook, tmp_path):
    pets = str(make_image_folder(tmp_path / "pets", train=40, test=1))
    for data, model in (("digits", "resnet50"), (pets, "resnet20")):
        with pytest.raises(UserError, match=f"no checkpoint of {model} for .*: train one with"):
            requested(["05"], {"model": model}, data)
        assert requested(["01", "05"], {"model": model}, data)
    (workbook / "checkpoint" / "resnet20-cifar10-jpeg.json").write_text("{}")
    assert requested(["05"], {}, pets), "it may be known by its fingerprint"
