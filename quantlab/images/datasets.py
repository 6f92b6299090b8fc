"""One call, three real sources of images: CIFAR-10's official files, any folder or archive of images, or handwritten digits.

    data = load_data("auto")      # "cifar10", "digits", "images", or the path of a folder or an archive

Images stay uint8 in memory; a batch is normalised when it is drawn. Three parts, never mixed: `train` to fit and to calibrate on,
`heldout` (a fixed tenth of the training images) to choose anything on, `test` only to be tested on.
"""

import dataclasses
import hashlib
import os
import pathlib

import numpy as np
import torch

from quantlab.images import imageset
from quantlab.images.cifar10 import (
    CIFAR10_CLASSES,
    CIFAR10_MEAN,
    CIFAR10_STD,
    FETCH_COMMAND,
    find_cifar10,
    is_cifar10,
    read_cifar10,
)
from quantlab.system.errors import UserError
from quantlab.system.files import data_folder, root

HELDOUT_SHARE, HELDOUT_SEED = 0.1, 20210  # a fixed tenth of every class

# Image sets recognised by the fingerprint of their files, whatever the folder or archive is called.
KNOWN_FINGERPRINTS = {"8dff00d1ad8e077c031697778bb41279a7f28b29566c954af8ae18ef1112f222": "cifar10-jpeg"}


@dataclasses.dataclass(frozen=True)
class Split:
    """Images and labels of one part: `images` uint8 [N, 3, H, W] (a tensor, or anything that gives one when indexed), `labels` int64 [N]."""

    images: object
    labels: torch.Tensor
    mean: tuple
    std: tuple
    num_classes: int | None = None  # None: as many as the labels show

    def __len__(self):
        return len(self.labels)

    def subset(self, index):
        """The images at `index` (int64 [M]), in that order; nothing is copied."""
        return dataclasses.replace(self, images=Rows(self.images, index), labels=self.labels[index])

    def normalize(self, images):
        """(x / 255 - mean) / std: uint8 [N, 3, H, W] -> float32 of the same shape."""
        mean, std = (torch.tensor(v, device=images.device).view(1, 3, 1, 1) for v in (self.mean, self.std))
        return (images.float() / 255 - mean) / std

    def batches(self, batch_size=256):
        """Yield (normalised float32 [B, 3, H, W], int64 [B]) in stored order."""
        for start in range(0, len(self), batch_size):
            index = torch.arange(start, min(start + batch_size, len(self)))
            yield self.normalize(self.images[index]), self.labels[index]


class Rows:
    """A view of some rows of an image store: rows[i] is store[index[i]]."""

    def __init__(self, store, index):
        self.store, self.index = store, index

    def __len__(self):
        return len(self.index)

    def __getitem__(self, i):
        return self.store[self.index[i]]


class Calibration:
    """Normalised input batches, float32 [B, 3, H, W], drawn from the training images without replacement; can be iterated again."""

    def __init__(self, split, batch_size=128):
        self.split, self.batch_size = split, batch_size

    def __len__(self):
        return -(-len(self.split) // self.batch_size)

    def __iter__(self):
        return (images for images, _ in self.split.batches(self.batch_size))


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A named set of labelled images; `fingerprint` identifies its content in every row of results."""

    name: str
    classes: tuple
    train: Split
    heldout: Split
    test: Split
    fingerprint: str

    @property
    def smoke(self):
        """True for the digits: they show that everything runs, and never enter a headline."""
        return self.name == "digits"

    def calibration(self, n=1024, seed=0, batch_size=128):
        """`n` training images in an order fixed by `seed`, without augmentation, as batches for `collect`."""
        if not 1 <= n <= len(self.train):
            raise UserError(f"n_calibration={n}: {self.name} has 1 to {len(self.train)} training images to calibrate on")
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(seed))
        return Calibration(self.train.subset(order[:n]), batch_size)

    def __str__(self):
        note = " (smoke run: handwritten digits, not a benchmark)" if self.smoke else ""
        sizes = f"{len(self.train):,} train, {len(self.heldout):,} held out, {len(self.test):,} test images"
        return f"{self.name}{note}: {sizes}, {len(self.classes)} classes, fingerprint {self.fingerprint[:10]}"


def load_data(source="auto", *, size=None, verbose=True):
    """Load a data set by name or path and say in one line which one it is.

    source: "auto" (CIFAR-10 where it already is, else an image set in data/ or $QUANTLAB_DATA, else digits), "cifar10" (downloads),
    "images" (the image set in data/ or $QUANTLAB_DATA), "digits", or the path of a folder or archive of either kind.
    size: side in pixels that images are resized and centre-cropped to (default $QUANTLAB_SIZE); needed only where their sizes differ.
    Raises UserError for an unknown name, a folder without classes, unreadable images, a damaged archive or a missing network.
    """
    source = str(source)
    size = size or int(os.environ.get("QUANTLAB_SIZE", 0)) or None
    place = find_data(source)
    hint = f"; CIFAR-10's official files: {FETCH_COMMAND}" if source == "auto" and not is_cifar10(place) else ""
    if place == "digits":
        data = load_digits()
    elif place == "cifar10" or is_cifar10(place):
        data = load_cifar10(data_folder() if place == "cifar10" else place)
    elif pathlib.Path(place).exists():
        data = load_images(place, size)
    else:
        raise UserError(f"data {source!r} not found: use auto, cifar10, digits, images, or the path of a folder or archive of images")
    if verbose:
        print(f"data: {data}{hint}", flush=True)
    return data


def find_data(source):
    """Where "auto", "images" and "cifar10" lead on this machine: a path, "digits" or "cifar10"; any other source is itself."""
    if source == "auto":
        return find_cifar10() or find_images() or "digits"
    if source == "cifar10":
        return find_cifar10() or source
    if source == "images" and find_images() is None:
        raise UserError(f"no image set in {data_folder()}: put a folder or archive with train/CLASS/* and test/CLASS/* there, or set QUANTLAB_DATA")
    return find_images() if source == "images" else source


# ---- The parts --------------------------------------------------------------------------------------------------------------


def _assemble(name, classes, train, test, fingerprint, mean=None, std=None):
    """Split the held-out tenth from the training images, class by class, the same one every time."""
    (train_images, train_labels), (test_images, test_labels) = train, test
    generator = torch.Generator().manual_seed(HELDOUT_SEED)
    held = torch.zeros(len(train_labels), dtype=torch.bool)
    for c in range(len(classes)):
        members = (train_labels == c).nonzero().flatten()
        count = max(round(len(members) * HELDOUT_SHARE), int(len(members) > 1))
        held[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    if mean is None:
        sample = train_images[torch.randperm(len(train_labels), generator=generator)[:2000]].float() / 255
        mean, std = (tuple(round(v, 4) for v in stat.tolist()) for stat in (sample.mean((0, 2, 3)), sample.std((0, 2, 3)) + 1e-3))
    whole = Split(train_images, train_labels, mean, std, len(classes))
    fit, heldout = whole.subset((~held).nonzero().flatten()), whole.subset(held.nonzero().flatten())
    return Dataset(name, tuple(classes), fit, heldout, Split(test_images, test_labels, mean, std, len(classes)), fingerprint)


def _fingerprint(*arrays):
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


# ---- Digits, and CIFAR-10 ---------------------------------------------------------------------------------------------------


def load_digits():
    """scikit-learn's 1,797 handwritten digits (8x8 grey) as 32x32x3: the embedded default, no network. Every fifth image is a test image."""
    from sklearn.datasets import load_digits as sklearn_digits

    digits = sklearn_digits()
    grey = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) * (255 / 16)
    images = torch.nn.functional.interpolate(grey, size=32, mode="bilinear").round().to(torch.uint8).repeat(1, 3, 1, 1)
    labels = torch.tensor(digits.target, dtype=torch.int64)
    test = torch.arange(len(labels)) % 5 == 4
    parts = ((images[~test], labels[~test]), (images[test], labels[test]))
    return _assemble("digits", [str(d) for d in range(10)], *parts, _fingerprint(digits.images, digits.target))


def load_cifar10(path):
    """CIFAR-10 through torchvision, checksums verified; downloads into `path` where it is missing."""
    parts = read_cifar10(pathlib.Path(path))
    arrays = [(torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets)) for part in parts]
    fingerprint = _fingerprint(*(part.data for part in parts), *(np.array(part.targets) for part in parts))
    return _assemble("cifar10", CIFAR10_CLASSES, *arrays, fingerprint, CIFAR10_MEAN, CIFAR10_STD)


# ---- Any images -------------------------------------------------------------------------------------------------------------


def find_images():
    """The first image set (folder or archive) that $QUANTLAB_DATA names or that lies in data/, or None."""
    named = os.environ.get("QUANTLAB_DATA")
    for place in [pathlib.Path(p) for p in (named, root() / "data") if p]:
        inside = sorted(p for p in place.iterdir() if not p.name.startswith(".") and p.name != "cache") if place.is_dir() else []
        candidates = [*inside, place]
        for candidate in candidates:
            if imageset.is_image_set(candidate):
                return str(candidate)
    return None


def load_images(path, size=None):
    """A folder or archive in the layout train/CLASS/*, test/CLASS/*; named by $DATA_NAME, by its fingerprint, or by its file name."""
    images = imageset.load(pathlib.Path(path), data_folder() / "cache", size)
    name = os.environ.get("DATA_NAME") or KNOWN_FINGERPRINTS.get(images.fingerprint) or images.stem
    constants = (CIFAR10_MEAN, CIFAR10_STD) if images.classes == CIFAR10_CLASSES else (None, None)
    return _assemble(name, images.classes, images.train, images.test, images.fingerprint, *constants)
