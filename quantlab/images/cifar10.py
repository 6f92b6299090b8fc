"""CIFAR-10's official files: found, downloaded with their checksum, unpacked, read through torchvision; and a JPEG copy of them."""

import contextlib
import os
import pathlib
import tempfile

from quantlab.images import imageset
from quantlab.system.errors import UserError
from quantlab.system.files import data_folder, root

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)  # the constants of the original experiment
CIFAR10_MIRRORS = ("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",)  # $QUANTLAB_CIFAR10_URL puts others in front
FETCH_COMMAND = "python -m quantlab data cifar10"


def is_cifar10(path):
    """True for a folder that holds CIFAR-10's official python files or archive, and for the archive itself."""
    path = pathlib.Path(path)
    return path.name == "cifar-10-python.tar.gz" and path.is_file() or any(
        (path / name).exists() for name in ("cifar-10-batches-py", "cifar-10-python.tar.gz")
    )


def find_cifar10():
    """The folder in which CIFAR-10's official files already are, or None."""
    named = os.environ.get("QUANTLAB_DATA")
    return next((str(p) for p in (named, root() / "data") if p and is_cifar10(p)), None)


def read_cifar10(path):
    """torchvision's CIFAR10 datasets (train, test) from a folder or an archive, unpacked and downloaded as needed."""
    import torchvision

    cifar10 = torchvision.datasets.CIFAR10
    archive = path if path.is_file() else path / cifar10.filename
    folder = archive.parent
    if not (folder / cifar10.base_folder).is_dir():
        if not archive.exists():
            _download(archive, cifar10.tgz_md5)
        if not torchvision.datasets.utils.check_md5(str(archive), cifar10.tgz_md5):
            raise UserError(f"{archive} is damaged or not CIFAR-10's official archive (md5 differs from {cifar10.tgz_md5}); delete it and run: {FETCH_COMMAND}")
        if not os.access(folder, os.W_OK):  # an archive in a read-only place is unpacked into our own data folder
            folder = data_folder()
            folder.mkdir(parents=True, exist_ok=True)
        with _temporary_folder(folder, ".unpack-") as unpacked:
            torchvision.datasets.utils.extract_archive(str(archive), str(unpacked))
            os.replace(unpacked / cifar10.base_folder, folder / cifar10.base_folder)
    try:
        return [cifar10(str(folder), train=train, download=False) for train in (True, False)]
    except RuntimeError:
        raise UserError(f"{folder / cifar10.base_folder} is incomplete or damaged; delete it and run: {FETCH_COMMAND}") from None


def make_jpeg_copy(out=None, quality=75):
    """Re-encode the official CIFAR-10 files as JPEG (4:2:0) in the ImageFolder layout and return the folder: an approach to `cifar10-jpeg`.

    Files are numbered within their class in the official order. Named cifar10-jpeg only if its fingerprint says that it is the same set.
    """
    out = pathlib.Path(out or data_folder() / "cifar10-jpeg-copy")
    if out.exists():
        raise UserError(f"{out} already exists; remove it first or name another folder with --out")
    parts = dict(zip(("train", "test"), read_cifar10(pathlib.Path(find_cifar10() or data_folder()))))
    with _temporary_folder(out.parent, ".jpeg-") as temporary:
        for part, images in parts.items():
            imageset.write_jpegs(temporary / "copy" / part, images.data, images.targets, CIFAR10_CLASSES, quality)
        os.replace(temporary / "copy", out)
    return out


@contextlib.contextmanager
def _temporary_folder(parent, prefix):
    """A folder in `parent` that is gone afterwards; UserError where it cannot be written."""
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=parent, prefix=prefix) as folder:
            yield pathlib.Path(folder)
    except OSError as error:
        raise UserError(f"cannot write into {parent}: {error.strerror or error}; free space there or set QUANTLAB_DATA to another folder") from None


def _download(archive, md5):
    """Try every mirror in turn, with a progress bar; the file appears under its name only when its checksum is right."""
    import pooch

    mirrors = [*os.environ.get("QUANTLAB_CIFAR10_URL", "").split(), *CIFAR10_MIRRORS]
    reasons = []
    for url in mirrors:
        try:
            pooch.retrieve(url, known_hash=f"md5:{md5}", fname=archive.name, path=archive.parent, progressbar=True)
            return
        except Exception as error:  # every kind of network failure has its own class; the next mirror is the answer to all
            reasons.append(f"{url}: {type(error).__name__}")
    raise UserError(
        f"CIFAR-10 could not be downloaded ({'; '.join(reasons)}): put cifar-10-python.tar.gz into {archive.parent}, "
        "or name a mirror in QUANTLAB_CIFAR10_URL"
    )
