"""What every source of images has in common: parts, calibration, names, and where "auto" leads."""

import functools
import hashlib
import shutil

import pytest
import torch
from conftest import make_tar

import quantlab as ql
from quantlab.images import datasets
from quantlab.images.cifar10 import CIFAR10_CLASSES

load = functools.partial(ql.load_data, verbose=False)


def test_digits_are_the_embedded_default(workbook, capsys):
    data = ql.load_data("auto")
    said = capsys.readouterr().out
    assert "digits (smoke run" in said and said.count("\n") == 1
    assert "python -m quantlab data cifar10" in said
    assert data.smoke and len(data.train) + len(data.heldout) + len(data.test) == 1797
    images, labels = next(data.test.batches(32))
    assert images.shape == (32, 3, 32, 32)
    assert images.dtype == torch.float32 and labels.dtype == torch.int64
    assert datasets.find_fingerprint("auto") == data.fingerprint


def test_parts_are_disjoint_fixed_and_balanced(digits):
    fit = digits.train.images.index
    held = digits.heldout.images.index
    assert not set(fit.tolist()) & set(held.tolist())
    again = load("digits")
    assert torch.equal(again.heldout.images.index, held)
    counts = torch.bincount(digits.heldout.labels)
    assert counts.min() >= 13 and counts.max() <= 16


def test_calibration_comes_from_training_images_and_follows_its_seed(digits):
    def rows(n, seed):
        return torch.cat(list(digits.calibration(n, seed)))

    def digest(image):
        return hashlib.sha256(image.numpy().tobytes()).digest()

    assert torch.equal(rows(100, 0), rows(100, 0))
    assert not torch.equal(rows(100, 0), rows(100, 1))
    assert torch.equal(rows(300, 0)[:100], rows(100, 0)), "fewer images are a part of more"
    everything = digits.train.images[torch.arange(len(digits.train))]
    known = {digest(image) for image in digits.train.normalize(everything)}
    assert {digest(image) for image in rows(100, 3)} <= known
    for n in (0, -1, 10**6):
        with pytest.raises(ql.UserError, match="n_calibration"):
            digits.calibration(n)


def test_unknown_source_says_what_is_allowed():
    for use in (load, datasets.find_fingerprint):
        with pytest.raises(ql.UserError, match="use auto, cifar10, digits, images, or the path"):
            use("cifar100")


def test_names_come_from_the_environment_the_fingerprint_or_the_file(
    workbook, image_folder, monkeypatch
):
    data = load(image_folder)
    assert data.name == "pets"
    monkeypatch.setitem(datasets.KNOWN_FINGERPRINTS, data.fingerprint, "famous-pets")
    assert load(image_folder).name == "famous-pets"
    monkeypatch.setenv("DATA_NAME", "mine")
    assert load(image_folder).name == "mine"


def test_auto_finds_an_image_set_in_data_and_in_the_environment(
    workbook, image_folder, tmp_path, monkeypatch
):
    monkeypatch.setenv("QUANTLAB_DATA", str(make_tar(image_folder, tmp_path / "elsewhere.tar.gz")))
    assert load("auto").name == "elsewhere"
    assert datasets.find_fingerprint("auto") == load("auto").fingerprint
    monkeypatch.delenv("QUANTLAB_DATA")
    (workbook / "data").mkdir(exist_ok=True)
    shutil.copytree(image_folder, workbook / "data" / "pets")
    assert load("auto").name == load("images").name == "pets"
    assert datasets.find_fingerprint("images") == load("images").fingerprint
    shutil.rmtree(workbook / "data" / "pets")
    with pytest.raises(ql.UserError, match="no image set"):
        load("images")


def test_the_jpeg_images_are_recognised(jpeg):
    assert jpeg.name == "cifar10-jpeg" and jpeg.classes == CIFAR10_CLASSES
    assert (len(jpeg.train), len(jpeg.heldout), len(jpeg.test)) == (45_000, 5_000, 10_000)
    assert torch.bincount(jpeg.heldout.labels).tolist() == [500] * 10
