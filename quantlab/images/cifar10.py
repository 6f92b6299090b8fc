"""CIFAR-10's official files, found or downloaded by pooch, unpacked and read by torchvision, which
both verify checksums; and a JPEG copy of them.
"""

import contextlib
import os
import pathlib
import tempfile

from quantlab.images.files import CIFAR10_ARCHIVE, CIFAR10_FOLDER, FETCH_COMMAND, find_cifar10
from quantlab.system.errors import UserError
from quantlab.system.files import data_folder

CIFAR10_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)
CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)  # these constants are the original experiment's
CIFAR10_STD = (0.2023, 0.1994, 0.2010)
# $QUANTLAB_CIFAR10_URL puts others in front
CIFAR10_MIRRORS = ("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",)


def read_cifar10(path):
    """torchvision's CIFAR10 datasets (train, test) from a folder or an archive, unpacked and
    downloaded as needed; UserError for damaged files and where there is no network.
    """
    import torchvision

    archive = path if path.is_file() else path / CIFAR10_ARCHIVE
    folder = archive.parent
    if not (folder / CIFAR10_FOLDER).is_dir():
        folder = _unpack(archive)
    try:
        return [torchvision.datasets.CIFAR10(str(folder), train) for train in (True, False)]
    except RuntimeError:
        raise UserError(
            f"{folder / CIFAR10_FOLDER} is incomplete or damaged; delete it and run: "
            f"{FETCH_COMMAND}"
        ) from None


def _unpack(archive):
    """Unpack the archive, downloaded if need be, beside itself; return the folder."""
    from torchvision.datasets import CIFAR10, utils

    if not archive.exists():
        _download(archive, CIFAR10.tgz_md5)
    if not utils.check_md5(str(archive), CIFAR10.tgz_md5):
        raise UserError(
            f"{archive} is damaged or not CIFAR-10's official archive (md5 differs from "
            f"{CIFAR10.tgz_md5}); delete it and run: {FETCH_COMMAND}"
        )
    # an archive in a read-only place is unpacked into our own data folder
    folder = archive.parent if os.access(archive.parent, os.W_OK) else data_folder()
    with _temporary_folder(folder, ".unpack-") as unpacked:
        utils.extract_archive(str(archive), str(unpacked))
        os.replace(unpacked / CIFAR10_FOLDER, folder / CIFAR10_FOLDER)
    return folder


def make_jpeg_copy(out=None, quality=75):
    """Re-encode the official files as JPEG (4:2:0) in the ImageFolder layout; return the folder.

    An approach to `cifar10-jpeg`, so named only where its fingerprint is that set's. Files are
    numbered within their class in the official order.
    """
    from quantlab.images.imageset import write_jpegs  # here, as reading them needs none of it

    out = pathlib.Path(out or data_folder() / "cifar10-jpeg-copy")
    if out.exists():
        raise UserError(f"{out} already exists; remove it first or name another folder with --out")
    train, test = read_cifar10(pathlib.Path(find_cifar10() or data_folder()))
    with _temporary_folder(out.parent, ".jpeg-") as temporary:
        copy = temporary / "copy"
        for name, part in (("train", train), ("test", test)):
            write_jpegs(copy / name, part.data, part.targets, CIFAR10_CLASSES, quality)
        os.replace(copy, out)
    return out


@contextlib.contextmanager
def _temporary_folder(parent, prefix):
    """A folder in `parent` that is gone afterwards; UserError where it cannot be written."""
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=parent, prefix=prefix) as folder:
            yield pathlib.Path(folder)
    except OSError as error:
        raise UserError(
            f"cannot write into {parent}: {error.strerror or error}; "
            "free space there or set QUANTLAB_DATA to another folder"
        ) from None


def _download(archive, md5):
    """Try every mirror in turn; the file appears under its name only when its checksum is right."""
    import pooch

    options = dict(known_hash=f"md5:{md5}", fname=archive.name, path=archive.parent)
    reasons = []
    for url in [*os.environ.get("QUANTLAB_CIFAR10_URL", "").split(), *CIFAR10_MIRRORS]:
        try:
            pooch.retrieve(url, **options, progressbar=True)
            return
        except Exception as error:  # each failure has a class of its own; the next mirror is tried
            reasons.append(f"{url}: {type(error).__name__}")
    raise UserError(
        f"CIFAR-10 could not be downloaded ({'; '.join(reasons)}): put {CIFAR10_ARCHIVE} into "
        f"{archive.parent}, or name a mirror in QUANTLAB_CIFAR10_URL"
    )
