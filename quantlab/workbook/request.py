"""What is asked to be run, checked before anything heavy is loaded.

    for notebook, parameters in requested(["03"], {"weight_bits": "4"}, "digits"): ...
"""

import collections
import dataclasses
import functools
import itertools
import os
import pathlib
import re

from quantlab.images.files import (
    HELDOUT_FRACTION,
    base_folder,
    find_data,
    image_files,
    is_cifar10,
    is_image_set,
    stem,
)
from quantlab.images.listing import files_below, is_image
from quantlab.networks.cards import card_path, load_card
from quantlab.system.errors import UserError
from quantlab.system.files import root
from quantlab.workbook import allowed, notebooks

TIME_LIMIT = 7 * 24 * 3600  # seconds a notebook: a full preset may take a night and more
HEADLINE_SEEDS = {"resnet50": 3, "resnet20": 5}  # of learned rounding, as many as are published
ENOUGH = 64  # training images for every notebook: a batch of tuning, a smoke run's calibration
TRAINING_IMAGES = {"digits": 1294, "cifar10": 45000}  # without those held out


def requested(numbers=(), overrides=None, source=None):
    """[(Notebook, its parameters)], in order; no number: all notebooks.

    overrides: parameter -> text. With notebooks named, each must know every parameter; without,
    those that know it get it. source: the data set, for those that have the parameter `data`.
    Paths are relative to the working directory. UserError for unknown notebooks and parameters,
    for values that are not allowed, for data that is not there or too little, and for a checkpoint
    that is not there or of another network. A notebook whose own defaults are at fault is refused
    where it is named; else it has a `problem`, and the others are as asked.
    """
    _training_images.cache_clear()  # images may have been added since
    known = list(notebooks.notebooks().values())
    chosen = [notebooks.find(number) for number in numbers] if numbers else known
    overrides = dict(overrides or {})
    _check_known(overrides, chosen, strict=bool(numbers))
    overrides |= {"data": source} if source else {}
    if "data" in overrides:
        find_data(overrides["data"])
    for name in ("data", "checkpoint"):  # the notebook's working directory is another
        if name in overrides and pathlib.Path(overrides[name]).exists():
            overrides[name] = str(pathlib.Path(overrides[name]).resolve())
    trains = any("retrain" in notebook.parameters for notebook in chosen)
    return [_checked(notebook, overrides, bool(numbers), trains) for notebook in chosen]


def is_smoke(notebook, parameters):
    """Whether a notebook will run as a smoke run, or measures nothing: a report, or one that has a
    problem.
    """
    if notebook.problem or notebook.is_report:
        return True
    values = {**notebook.parameters, **parameters}
    if not {"preset", "data"} <= values.keys():
        return False
    is_auto = values["preset"] == "auto" and find_data(values["data"]) == "digits"
    return values["preset"] == "smoke" or is_auto


def headline(overrides=None):
    """[(number, parameters as texts)] that measure every row of the README's headline anew, of both
    networks or of the `model` in overrides: float, tools, learned rounding by the best method of 07
    and what that starts from, integers.

    overrides: parameter -> text, each for the notebooks that know it; UserError for one that none
    of them knows.
    """
    overrides = {"preset": "full"} | dict(overrides or {})
    best = notebooks.find("07").parameters["best_method"]
    learned = {"methods": f"{best.split(' + ')[0]},{best}", "widths": "4/4,3/3,2/2",
               "rivals": "both", "try_others": "False"}
    chosen = {number: notebooks.find(number) for number in ("01", "02", "07", "09")}
    _check_known(overrides, list(chosen.values()), strict=False)
    asked = []
    for model in [overrides["model"]] if "model" in overrides else HEADLINE_SEEDS:
        own = {"model": model} | overrides
        seeds = {"n_seeds": str(HEADLINE_SEEDS.get(model, 3))}
        for number, notebook in chosen.items():
            given = learned | seeds | own if number == "07" else own
            asked.append((number, {n: v for n, v in given.items() if n in notebook.parameters}))
    return asked


def cost(notebook):
    """What a notebook says that it costs, as one line; "" where it says nothing."""
    texts = (source for kind, source in notebook.cells if kind == "markdown")
    found = re.search(r"\*\*Cost\.\*\*(.*?)(\n\n|\Z)", "\n\n".join(texts), re.DOTALL)
    return " ".join(found[1].split()) if found else ""


def _check_known(overrides, chosen, strict):
    chosen = [notebook for notebook in chosen if not notebook.problem]
    for name in overrides:
        strangers = [notebook for notebook in chosen if name not in notebook.parameters]
        if strangers and (strict or len(strangers) == len(chosen)):
            notebooks.check_parameter(strangers[0], name, overrides[name])  # raises, with a hint


def _checked(notebook, overrides, is_named, trains):
    """(notebook, the parameters that it is given)."""
    known = [name for name in overrides if name in notebook.parameters]
    given = {name: notebooks.check_parameter(notebook, name, overrides[name]) for name in known}
    fault = _fault(notebook.parameters, given, trains)
    if fault and (is_named or not _fault(notebook.parameters, {}, trains)):
        raise UserError(fault)
    return dataclasses.replace(notebook, problem=notebook.problem or fault), given


def _fault(defaults, given, trains):
    """Why a notebook cannot be run with these parameters, as far as can be known; "" if it can.

    trains: a notebook that trains where there is no checkpoint is to be run, too.
    """
    values = {**defaults, **given}
    is_ours = set(allowed.COMMON) <= values.keys()
    try:
        for name, value in values.items():
            if isinstance(value, notebooks.Computed):
                continue
            if is_ours or _is_allowed(name, defaults[name]):  # else the name means something else
                allowed.check(**{name: value})
        if is_ours:
            _check_images(values["data"], values.get("n_calibration", 0))
            _check_checkpoint(values["checkpoint"], values["model"], values["data"], trains)
    except UserError as error:
        return str(error)
    return ""


def _is_allowed(name, value):
    try:
        allowed.check(**{name: value})
    except UserError:
        return False
    return True


# ---- Images --------------------------------------------------------------------------------------


def check_data(source):
    """Where a data set is (`find_data`); UserError for a path that is no image set."""
    place = find_data(source)
    if place in TRAINING_IMAGES or is_cifar10(place) or is_image_set(pathlib.Path(place)):
        return place
    raise UserError(f"{place} is no image set: name a folder or archive with train/CLASS/* and "
                    "test/CLASS/*")


def _check_images(source, n_calibration):
    there = _training_images(check_data(source), max(ENOUGH, n_calibration))
    what = f"{source} has {there:,} training images, besides those held out"
    if there < ENOUGH:
        raise UserError(f"{what}; the notebooks need at least {ENOUGH} of them to calibrate on "
                        "(n_calibration): add images to its train/")
    if there < n_calibration:
        raise UserError(f"n_calibration={n_calibration}: {what}")


@functools.cache
def _training_images(place, enough):
    """How many images a set has to fit and to calibrate on; at least `enough` where there are
    more.
    """
    path = pathlib.Path(place)
    if place in TRAINING_IMAGES or is_cifar10(path):
        return TRAINING_IMAGES.get(place, TRAINING_IMAGES["cifar10"])
    if path.is_dir():
        folders = [p for p in (base_folder(path) / "train").iterdir() if p.is_dir()]
        classes = (p.name for p in folders for f in files_below(p) if is_image(f.name))
    else:
        classes = (name[1] for name, _ in image_files(path) if name[0] == "train")
    counts = collections.Counter(itertools.islice(classes, 2 * enough))  # a class keeps half
    if counts.total() == 2 * enough:
        return enough
    return sum(n - max(round(n * HELDOUT_FRACTION), int(n > 1)) for n in counts.values())


# ---- The checkpoint ------------------------------------------------------------------------------


def _check_checkpoint(checkpoint, model, source, trains):
    if checkpoint != "auto":
        inside = root() / checkpoint  # where a notebook's own default is meant
        load_card(inside if inside.exists() else checkpoint, model)
        return
    place = find_data(source)
    name = os.environ.get("DATA_NAME") or stem(pathlib.Path(place))
    name = "cifar10" if place != "digits" and is_cifar10(place) else name
    names = {name} if place == "digits" else {name, "cifar10-jpeg"}
    files = [root() / "checkpoint" / f"{model}-{name}.safetensors" for name in names]
    if not trains and not any(card_path(file).is_file() for file in files):
        raise UserError(f"no checkpoint of {model} for {source}: train one with python -m quantlab "
                        f"train --model {model} --data {source}, or run notebook 01 first")
