"""Images as people have them, for a network of one's own: a few of a folder, decoded when drawn.

    calibration, test, classes = load_folder("pets", 224, mean, std, n=256)

Nothing is cached, and a folder of a million images is listed, not read.
"""

import pathlib
import random

import torch

from quantlab.images.datasets import Split
from quantlab.images.files import IMAGE_SUFFIXES
from quantlab.images.imageset import Streamed
from quantlab.images.listing import files_below, is_image
from quantlab.system.errors import UserError


def load_folder(path, size, mean, std, n, seed=0):
    """(calibration, test, classes): two Splits of at most `n` images that share no file, in an
    order fixed by `seed`, and the sorted names of the classes.

    path: train/CLASS/* with test/CLASS/* or val/CLASS/*, or CLASS/*, or images alone: no classes,
    labels -1. Too few images for both: they are tested on those they were calibrated on. size: side
    in pixels. mean, std: of the three channels, values in 0..1. UserError where no image is.
    """
    folder = pathlib.Path(path)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; name a folder of images")
    tests = [folder / name for name in ("test", "val") if (folder / name).is_dir()]
    has_parts = tests and (folder / "train").is_dir()
    parts = [folder / "train", tests[0]] if has_parts else [folder]
    places = [place for part in parts for place in part.iterdir()
              if place.is_dir() and not place.name.startswith(".")]
    classes = sorted({place.name for place in places if _images(place)})
    found = [_labelled(part, classes, seed) for part in parts]
    if not found[0]:
        raise UserError(f"{folder} holds no images ({', '.join(IMAGE_SUFFIXES)})")
    calibration = found[0][:n]
    test = (found[1] if has_parts else found[0][n:])[:n] or calibration
    splits = []
    for items in (calibration, test):
        labels = torch.tensor([label for _, label in items])
        images = Streamed([file for file, _ in items], size)
        splits.append(Split(images, labels, mean, std, len(classes) or None))
    return (*splits, tuple(classes))


def _labelled(part, classes, seed):
    """[(file, number of its class)] of a part, shuffled; -1 where no folder is a class."""
    found = [(file, i) for i, name in enumerate(classes) for file in _images(part / name)]
    found = found or [(file, -1) for file in _images(part)]
    random.Random(seed).shuffle(found)
    return found


def _images(folder):
    return [file for file in files_below(folder) if is_image(file.name)]
