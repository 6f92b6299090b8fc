"""One call, three real sources of images: CIFAR-10's official files, any folder or archive of
images, or handwritten digits.

    data = load_data("auto")  # "cifar10", "digits", "images", or the path of a folder or archive

Images stay uint8 in memory; a batch is normalised when it is drawn. Three parts, never mixed:
`train` to fit and to calibrate on, `heldout` (a fixed tenth of the training images) to choose
anything on, `test` only to be tested on.
"""

import dataclasses
import hashlib
import os
import pathlib

import numpy as np
import torch

from quantlab.images.files import (
    FETCH_COMMAND,
    HELDOUT_FRACTION,
    find_data,
    fingerprint,
    is_cifar10,
)
from quantlab.system.errors import UserError, checked, one_line
from quantlab.system.files import data_folder

LARGEST_SIDE = 8192  # pixels
HELDOUT_SEED = 20210  # the same tenth for everyone

# Image sets recognised by the fingerprint of their files, whatever the folder or archive is called.
KNOWN_FINGERPRINTS = {
    "8dff00d1ad8e077c031697778bb41279a7f28b29566c954af8ae18ef1112f222": "cifar10-jpeg",
}


@dataclasses.dataclass(frozen=True)
class Split:
    """Images uint8 [N, 3, H, W] of one part (a tensor, or what gives one when indexed), and their
    labels int64 [N].
    """

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

    def limited(self, limit):
        """`limit` evenly spaced images, as they are stored class by class; None: all."""
        if limit is None or limit >= len(self):
            return self
        steps = torch.linspace(0, len(self) - 1, limit, dtype=torch.float32)
        return self.subset(steps.round().long())

    def normalize(self, images):
        """(x / 255 - mean) / std: uint8 [N, 3, H, W] -> float32 of the same shape."""
        mean, std = (torch.tensor(v, device=images.device, dtype=torch.float32).view(1, 3, 1, 1)
                     for v in (self.mean, self.std))
        return (images.float() / 255 - mean) / std

    def batches(self, batch_size=256):
        """Yield (normalised float32 [B, 3, H, W], int64 [B]) in stored order."""
        for start in range(0, len(self), batch_size):
            index = torch.arange(start, min(start + batch_size, len(self)))
            yield self.normalize(self.images[index]), self.labels[index]


@checked
def limited(split, limit):
    """`limit` evenly spaced images of a Split, which is stored class by class; None: all."""
    return split.limited(limit)


class Rows:
    """A view of some rows of an image store: rows[i] is store[index[i]]."""

    def __init__(self, store, index):
        self.store, self.index = store, index

    def __len__(self):
        return len(self.index)

    def __getitem__(self, i):
        return self.store[self.index[i]]


class Calibration:
    """A Split's images in batches, float32 [B, 3, H, W], normalised; can be iterated again."""

    def __init__(self, split, batch_size=128):
        self.split, self.batch_size = split, batch_size

    def __len__(self):
        return -(-len(self.split) // self.batch_size)

    def __iter__(self):
        return (images for images, _ in self.split.batches(self.batch_size))


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A named set of labelled images; `fingerprint` tells their pixels in every row of results."""

    name: str
    classes: tuple
    train: Split
    heldout: Split
    test: Split
    fingerprint: str

    @property
    def pixels(self):
        """What tells the values that networks read: contents, size, mean and std."""
        return self.fingerprint, self.test.mean, self.test.std

    @property
    def smoke(self):
        """True for the digits: they show that everything runs, and never enter a headline."""
        return self.name == "digits"

    def calibration(self, n=1024, seed=0, batch_size=128):
        """Batches of `n` training images, not augmented, in the order of `seed`; for `collect`."""
        from quantlab.system.arguments import as_count

        there, n = len(self.train), as_count(n, "n_calibration", 0)
        batch_size = as_count(batch_size, "batch_size")
        if not 1 <= n <= there:
            raise UserError(f"n_calibration={n}: {self.name} has 1 to {there} training images")
        generator = torch.Generator().manual_seed(as_count(seed, "seed", 0))
        order = torch.randperm(there, generator=generator)
        return Calibration(self.train.subset(order[:n]), batch_size)

    def __str__(self):
        note = " (smoke run: handwritten digits, not a benchmark)" if self.smoke else ""
        fit, heldout, test = (f"{len(part):,}" for part in (self.train, self.heldout, self.test))
        content = f"{len(self.classes)} classes, fingerprint {self.fingerprint[:10]}"
        return f"{self.name}{note}: {fit} train, {heldout} held out, {test} test images, {content}"


@checked
def load_data(source="auto", *, size=None, verbose=True):
    """Load a data set by name or path and say in one line which one it is.

    source: "auto" (CIFAR-10 where it already is, else an image set in data/ or $QUANTLAB_DATA, else
    digits), "cifar10" (downloads), "images" (the set in data/ or $QUANTLAB_DATA), "digits", or the
    path of a folder or archive of either kind.
    size: side in pixels that images are resized and centre-cropped to (default $QUANTLAB_SIZE);
    needed only where their sizes differ.
    Raises UserError for an unknown name, a folder without classes, unreadable images, a damaged
    archive or a missing network.
    """
    if size is not None:
        _side(size)  # whether or not the images need it
    place = find_data(source)
    if place == "digits":
        data = load_digits()
    elif place == "cifar10" or is_cifar10(place):
        data = load_cifar10(place)
    else:
        data = load_images(place, _side(size))
    if verbose:
        better = str(source) == "auto" and data.name != "cifar10"
        hint = f"; CIFAR-10's official files: {FETCH_COMMAND}" if better else ""
        print(f"data: {data}{hint}", flush=True)
    return data


def _side(size):
    """Side in pixels from `size`, else $QUANTLAB_SIZE, else None; UserError for what is none."""
    name, given = ("size", size) if size is not None else ("QUANTLAB_SIZE",
                                                           os.environ.get("QUANTLAB_SIZE"))
    if not given and size is None:
        return None
    text = str(given)
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:9]) <= LARGEST_SIDE):
        raise UserError(f"{name}={one_line(text, 40)!r}: a side is a whole number of pixels from 1 "
                        f"to {LARGEST_SIDE}, such as {name}=224")
    return int(text)


def find_fingerprint(source="auto"):
    """The fingerprint of load_data(source), without decoding an image; raises what that does."""
    place = find_data(source)
    if place == "digits":
        return load_digits().fingerprint
    if place == "cifar10" or is_cifar10(place):
        return load_cifar10(place).fingerprint
    return _at_size(fingerprint(pathlib.Path(place), data_folder() / "cache"), _side(None))


def _at_size(content, size):
    """The fingerprint of files that are read at a size: other pixels are other images."""
    return content if size is None else hashlib.sha256(f"{content} {size}".encode()).hexdigest()


# ---- The parts -----------------------------------------------------------------------------------


def _assemble(name, classes, train, test, fingerprint, constants=None):
    """The Dataset of train and test (images, labels): a fixed tenth of every class is held out.

    constants: (mean, std), or None for those of a sample.
    """
    images, labels = train
    generator = torch.Generator().manual_seed(HELDOUT_SEED)
    held = torch.zeros(len(labels), dtype=torch.bool)
    for c in range(len(classes)):
        members = (labels == c).nonzero().flatten()
        count = max(round(len(members) * HELDOUT_FRACTION), int(len(members) > 1))
        held[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    if constants is None:
        sample = images[torch.randperm(len(labels), generator=generator)[:2000]].float() / 255
        measured = sample.mean((0, 2, 3)), sample.std((0, 2, 3)) + 1e-3
        constants = [tuple(round(v, 4) for v in values.tolist()) for values in measured]
    whole = Split(images, labels, *constants, len(classes))
    fit, heldout = (whole.subset(rows.nonzero().flatten()) for rows in (~held, held))
    tested = Split(*test, *constants, len(classes))
    return Dataset(name, tuple(classes), fit, heldout, tested, fingerprint)


def _fingerprint(*arrays):
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


# ---- Digits, CIFAR-10, any images ----------------------------------------------------------------


def load_digits():
    """scikit-learn's 1,797 handwritten digits (8x8 grey) as 32x32x3: the default without a network.

    Every fifth image is a test image.
    """
    from sklearn.datasets import load_digits as sklearn_digits

    digits = sklearn_digits()
    grey = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) * (255 / 16)
    large = torch.nn.functional.interpolate(grey, size=32, mode="bilinear")
    images = large.round().to(torch.uint8).repeat(1, 3, 1, 1)
    labels = torch.tensor(digits.target, dtype=torch.int64)
    test = torch.arange(len(labels)) % 5 == 4
    parts = (images[~test], labels[~test]), (images[test], labels[test])
    classes = [str(digit) for digit in range(10)]
    return _assemble("digits", classes, *parts, _fingerprint(digits.images, digits.target))


def load_cifar10(place):
    """CIFAR-10 through torchvision, checksums verified; place: a folder or archive, or "cifar10" to
    download it into the data folder.
    """
    from quantlab.images import cifar10  # here, as digits need none of it

    parts = cifar10.read_cifar10(data_folder() if place == "cifar10" else pathlib.Path(place))
    images = [torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous() for part in parts]
    labels = [torch.tensor(part.targets) for part in parts]
    content = _fingerprint(*(part.data for part in parts), *(label.numpy() for label in labels))
    constants = cifar10.CIFAR10_MEAN, cifar10.CIFAR10_STD
    return _assemble("cifar10", cifar10.CIFAR10_CLASSES, *zip(images, labels), content, constants)


def load_images(path, size=None):
    """A folder or archive of train/CLASS/* and test/CLASS/*; its name is $DATA_NAME, else that of a
    known fingerprint, else the file's.
    """
    from quantlab.images import cifar10, imageset  # here, as digits need no reader of files

    path = pathlib.Path(path)
    path = path if path.name not in ("", "..") else path.resolve()
    images = imageset.load(path, data_folder() / "cache", size)
    known = KNOWN_FINGERPRINTS.get(images.fingerprint)
    name = os.environ.get("DATA_NAME") or known or images.stem
    if not name.isprintable() or "/" in name or name.startswith("."):
        raise UserError(f"the data set's name {one_line(name)!r} cannot name files; rename it, or "
                        "set DATA_NAME")
    constants = None
    if images.classes == cifar10.CIFAR10_CLASSES:
        constants = cifar10.CIFAR10_MEAN, cifar10.CIFAR10_STD
    content = _at_size(images.fingerprint, size)
    return _assemble(name, images.classes, images.train, images.test, content, constants)
