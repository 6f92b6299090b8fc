"""Folders of images as people have them: parts, classes, neither; what is drawn is the same."""

import pytest
import torch
from conftest import make_image_folder

import quantlab as ql
from quantlab.images.folder import load_folder

HALF = (0.5, 0.5, 0.5)


def load(folder, n=16, size=10, **options):
    return load_folder(folder, size, HALF, HALF, n, **options)


@pytest.fixture
def pets(tmp_path):
    return make_image_folder(tmp_path / "pets", train=20, test=7, size=(12, 10))


def files_of(split):
    return {str(file) for file in split.images.files}


@pytest.mark.parametrize("name", ["test", "val"])
def test_parts_and_classes(pets, name):
    (pets / "test").rename(pets / name)
    calibration, test, classes = load(pets)
    assert classes == ("cat", "dog")
    assert len(calibration) == 16 and len(test) == 14
    assert all("/train/" in file for file in files_of(calibration))
    assert all(f"/{name}/" in file for file in files_of(test))
    for file, label in zip(test.images.files, test.labels):
        assert file.parent.name == classes[label]


def test_classes_without_parts_are_split(pets):
    calibration, test, classes = load(pets / "train", n=25)
    assert classes == ("cat", "dog")
    assert len(calibration) == 25 and len(test) == 15
    assert not files_of(calibration) & files_of(test)
    few, tested, _ = load(pets / "train", n=40)
    assert files_of(few) == files_of(tested), "too few for both"


def test_images_alone(pets):
    calibration, test, classes = load(pets / "train" / "cat")
    assert classes == () and calibration.num_classes is None
    assert len(calibration) == 16 and len(test) == 4
    assert set(calibration.labels.tolist()) == {-1}


def test_the_order_is_fixed_by_the_seed(pets):
    first, again, other = (load(pets, seed=seed)[0].images.files for seed in (0, 0, 1))
    assert first == again != other


def test_batches_are_normalised_pixels(pets):
    calibration, _, _ = load(pets)
    images, labels = next(calibration.batches(5))
    assert images.shape == (5, 3, 10, 10) and labels.shape == (5,)
    pixels = calibration.images[torch.arange(5)]
    assert torch.allclose(images, (pixels.float() / 255 - 0.5) / 0.5)


def test_folders_that_hold_nothing(tmp_path):
    with pytest.raises(ql.UserError, match="nowhere is not a folder"):
        load("nowhere")
    with pytest.raises(ql.UserError, match=r"holds no images \(.jpg"):
        load(tmp_path)
