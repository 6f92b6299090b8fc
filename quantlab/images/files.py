"""Images as files: where a data set is, what is in it, its fingerprint; loads without torch, so
that a mistyped path is answered at once.

    find_data("auto"); fingerprint(path, cache)

A fingerprint comes from the files' names and bytes, so that a folder and an archive of the same
files agree, wherever they lie and whenever written.
"""

import contextlib
import hashlib
import json
import lzma
import operator
import os
import pathlib
import tarfile
import zipfile
import zlib

from tqdm.auto import tqdm

from quantlab.system.errors import UserError
from quantlab.system.files import data_folder, root, write_text

SOURCES = ("auto", "cifar10", "digits", "images")  # or a path
CIFAR10_ARCHIVE, CIFAR10_FOLDER = "cifar-10-python.tar.gz", "cifar-10-batches-py"
HELDOUT_FRACTION = 0.1  # of every class
FETCH_COMMAND = "python -m quantlab data cifar10"
PARTS = ("train", "test")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
ARCHIVE_SUFFIXES = (".tar.gz", ".tar.xz", ".tar.bz2", ".tar", ".tgz", ".txz", ".zip")
DAMAGED = (
    tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, zlib.error, EOFError, OSError,
    RuntimeError,  # an encrypted zip
)


def find_data(source):
    """Where `source` leads on this machine: a path that exists, "digits", or "cifar10" where that
    must be downloaded.
    """
    source = str(source)
    if source == "auto":
        return find_cifar10() or find_images() or "digits"
    if source == "cifar10":
        return find_cifar10() or source
    found = find_images() if source == "images" else source
    if found is None:
        raise UserError(
            f"no image set in {data_folder()}: put a folder or archive with train/CLASS/* and "
            "test/CLASS/* there, or set QUANTLAB_DATA"
        )
    if found != "digits" and not pathlib.Path(found).exists():
        raise UserError(
            f"data {source!r} not found: use auto, cifar10, digits, images, or the path of a "
            "folder or archive of images"
        )
    return found


def find_images():
    """The first image set (folder or archive) named by $QUANTLAB_DATA or in data/, or None."""
    named = os.environ.get("QUANTLAB_DATA")
    for place in (pathlib.Path(p) for p in (named, root() / "data") if p):
        inside = sorted(place.iterdir()) if place.is_dir() else []
        inside = [p for p in inside if not p.name.startswith(".") and p.name != "cache"]
        for candidate in (*inside, place):
            if is_image_set(candidate):
                return str(candidate)
    return None


def is_cifar10(path):
    """True for CIFAR-10's official archive, and for a folder that holds it or its python files."""
    path = pathlib.Path(path)
    if path.is_file():
        return path.name == CIFAR10_ARCHIVE
    return any((path / name).exists() for name in (CIFAR10_ARCHIVE, CIFAR10_FOLDER))


def find_cifar10():
    """The folder in which CIFAR-10's official files already are, or None."""
    named = os.environ.get("QUANTLAB_DATA")
    return next((str(p) for p in (named, root() / "data") if p and is_cifar10(p)), None)


# ---- Any set of images ---------------------------------------------------------------------------


def stem(path):
    """File name without any archive suffix."""
    suffixes = (s for s in ARCHIVE_SUFFIXES if path.is_file() and path.name.lower().endswith(s))
    return path.name[: len(path.name) - len(next(suffixes, ""))]


def is_image_set(path):
    """True for a folder with train/ and test/ (or one such subfolder), and an archive of images."""
    if path.is_dir():
        return base_folder(path) is not None
    if not path.name.lower().endswith(ARCHIVE_SUFFIXES):
        return False

    from quantlab.images import listing

    try:
        return next(listing.archive_files(path), None) is not None
    except DAMAGED:
        return False


def fingerprint(path, cache):
    """sha256, in hex, of the names and bytes of all images of the set; nothing is decoded.

    Kept in the folder `cache` while path, sizes and times of the files stay the same: that saves
    time and decides nothing. Raises UserError when it is no image set, damaged or empty.
    """
    key = hashlib.sha256(json.dumps(_state(path)).encode()).hexdigest()[:16]
    kept = cache / f"{stem(path)}-{key}.fingerprint"
    if kept.is_file() and len(known := kept.read_text()) == 64:
        return known
    files = tqdm(image_files(path), desc=f"hash {path.name}", unit=" images", mininterval=0.5)
    digests = [(name, hashlib.sha256(content).hexdigest()) for name, content in files]
    if not digests:
        raise UserError(
            f"{path}: no images found; expected train/CLASS/*.jpg and test/CLASS/*.jpg "
            f"(or {', '.join(IMAGE_SUFFIXES[2:])})"
        )
    digests.sort(key=operator.itemgetter(0))
    lines = "\n".join(f"{'/'.join(name)} {digest}" for name, digest in digests)
    found = hashlib.sha256(lines.encode()).hexdigest()
    with contextlib.suppress(UserError):  # a folder that cannot be written keeps nothing
        write_text(kept, found)
    return found


def _state(path):
    """What changes when the images' files do: path, sizes and times."""
    from quantlab.images import listing

    files = [file for _, file in listing.folder_files(path)] if path.is_dir() else [path]
    stats = [(str(f.relative_to(path)), f.stat()) for f in files]  # of what a link leads to
    return str(path.resolve()), [
        (name, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for name, s in stats]


def image_files(path):
    """Yield ((part, class, file name), bytes) for every image of the set."""
    from quantlab.images import listing

    try:
        if path.is_dir():
            for name, file in listing.folder_files(path):
                yield name, file.read_bytes()
        else:
            yield from listing.archive_files(path)
    except DAMAGED as error:
        raise UserError(
            f"{path} is damaged or not a tar or zip archive ({type(error).__name__}: {error}); "
            "copy or download it again"
        ) from None


def base_folder(path):
    """The folder that holds train/ and test/: `path` itself or its only such subfolder."""
    inside = [p for p in sorted(path.iterdir()) if p.is_dir() and not p.name.startswith(".")]
    return next((p for p in (path, *inside) if all((p / part).is_dir() for part in PARTS)), None)
