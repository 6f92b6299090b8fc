"""Any set of images laid out as train/CLASS/* and test/CLASS/*, read from a folder, a tar or a zip.

    images = load(path, cache)

Images are decoded once and cached as uint8, one tensor a part; a set of more than STREAM_ABOVE
bytes is decoded batch by batch instead. Its fingerprint comes from the files' names and bytes, so
that a folder and an archive of the same files agree, wherever they lie and whenever written.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import lzma
import operator
import pathlib
import tarfile
import zipfile
import zlib

import numpy as np
import safetensors
import torch
from PIL import Image
from tqdm.auto import tqdm

from quantlab.system.errors import UserError
from quantlab.system.files import atomic_path, save_tensors, write_text

PARTS = ("train", "test")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
ARCHIVE_SUFFIXES = (".tar.gz", ".tar.xz", ".tar.bz2", ".tar", ".tgz", ".txz", ".zip")
DAMAGED = (
    tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, zlib.error, EOFError, OSError,
    RuntimeError,  # an encrypted zip
)
STREAM_ABOVE = 10**9  # bytes of decoded images


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """train and test: (images uint8 [N, 3, H, W], labels int64 [N]); stem: the name of its file."""

    stem: str
    classes: tuple
    train: tuple
    test: tuple
    fingerprint: str


def stem(path):
    """File name without any archive suffix."""
    suffixes = (s for s in ARCHIVE_SUFFIXES if path.is_file() and path.name.lower().endswith(s))
    return path.name[: len(path.name) - len(next(suffixes, ""))]


def is_image_set(path):
    """True for a folder with train/ and test/ (or one such subfolder), and an archive of images."""
    if path.is_dir():
        return _base(path) is not None
    if not path.name.lower().endswith(ARCHIVE_SUFFIXES):
        return False
    try:
        return next(_archive_files(path), None) is not None
    except DAMAGED:
        return False


def fingerprint(path, cache):
    """sha256, in hex, of the names and bytes of all images of the set; nothing is decoded.

    Kept in the folder `cache` while path, sizes and times of the files stay the same: that saves
    time and decides nothing. Raises UserError when it is no image set, damaged or empty.
    """
    key = hashlib.sha256(json.dumps(state(path)).encode()).hexdigest()[:16]
    kept = cache / f"{stem(path)}-{key}.fingerprint"
    if kept.is_file() and len(known := kept.read_text()) == 64:
        return known
    files = tqdm(_files(path), desc=f"hash {path.name}", unit=" images", mininterval=0.5)
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


def load(path, cache, size=None):
    """The ImageSet at `path`, decoded, or taken from the folder `cache`.

    size: side in pixels that images are resized and cropped to. Raises UserError when it is no
    image set, damaged or unreadable, or when image sizes differ and `size` is None.
    """
    content = fingerprint(path, cache)
    cached = cache / f"{stem(path)}-{content[:16]}-{size or 'full'}.safetensors"
    with contextlib.suppress(safetensors.SafetensorError, KeyError, ValueError, OSError):
        return _read_cache(cached, path, content)  # not there, or damaged: decoded below
    names, images = _decode_all(path, size)
    if images is None:
        folder = _base(path) if path.is_dir() else _unpack(path, cached.with_suffix(""))
        images = Streamed([folder.joinpath(*name) for name in names], size)
    classes = _classes(names, path)
    parts = [_part(part, names, images, classes) for part in PARTS]
    found = ImageSet(stem(path), classes, *parts, content)
    if not isinstance(images, Streamed):
        _write_cache(cached, found)
    return found


def _decode_all(path, size):
    """(names, images) in the order of names; images is None above STREAM_ABOVE bytes."""
    names, kept, total = [], [], 0
    files = tqdm(_files(path), desc=f"decode {path.name}", unit=" images", mininterval=0.5)
    for name, content in files:
        image = decode(content, "/".join(name), size)
        if kept and image.shape != kept[0].shape:
            raise UserError(
                f"{path}: {'/'.join(name)} is {_pixels(image)} but the first image is "
                f"{_pixels(kept[0])}; name one size: QUANTLAB_SIZE=224"
            )
        names.append(name)
        total += image.nbytes
        if total <= STREAM_ABOVE or not kept:
            kept.append(image)
    order = sorted(range(len(names)), key=names.__getitem__)
    images = [kept[i] for i in order] if len(kept) == len(names) else None
    return [names[i] for i in order], images


def _part(part, names, images, classes):
    """(images uint8 [N, 3, H, W], labels int64 [N]) of train or test."""
    rows = [i for i, name in enumerate(names) if name[0] == part]
    labels = torch.tensor([classes.index(names[i][1]) for i in rows])
    if isinstance(images, Streamed):
        return Streamed([images.files[i] for i in rows], images.size), labels
    return torch.from_numpy(np.stack([images[i] for i in rows])), labels


def decode(content, name, size=None):
    """Bytes of an image file -> uint8 [3, H, W], cropped to [3, size, size] if `size` is not None:
    the shorter side is resized to it, the centre kept.
    """
    try:
        image = Image.open(io.BytesIO(content)).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise UserError(f"{name} cannot be read as an image; remove it or replace it") from None
    if size is not None:
        scale = size / min(image.size)
        sides = [max(size, round(side * scale)) for side in image.size]
        image = image.resize(sides, Image.Resampling.BILINEAR)
        left, top = ((side - size) // 2 for side in sides)
        image = image.crop((left, top, left + size, top + size))
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


class Streamed:
    """Images decoded when they are asked for: streamed[index int64 [B]] -> uint8 [B, 3, H, W]."""

    def __init__(self, files, size):
        self.files, self.size = files, size

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        chosen = [self.files[i] for i in index.tolist()]
        images = [decode(file.read_bytes(), file, self.size) for file in chosen]
        return torch.from_numpy(np.stack(images))


# ---- Files of a folder or an archive -------------------------------------------------------------


def _files(path):
    """Yield ((part, class, file name), bytes) for every image of the set."""
    try:
        if path.is_dir():
            for name, file in _folder_files(path):
                yield name, file.read_bytes()
        else:
            yield from _archive_files(path)
    except DAMAGED as error:
        raise UserError(
            f"{path} is damaged or not a tar or zip archive ({type(error).__name__}: {error}); "
            "copy or download it again"
        ) from None


def _folder_files(path):
    """[((part, class, file name), file)] of every image of a folder."""
    base = _base(path)
    if base is None:
        raise UserError(
            f"{path} has no train/ and test/ folders; expected train/CLASS/* and test/CLASS/*"
        )
    files = [(_name(f.relative_to(base).parts), f) for f in sorted(base.glob("*/*/*"))]
    return [(name, file) for name, file in files if name]


def _archive_files(path):
    if path.name.lower().endswith(".zip"):
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                name = _name(pathlib.PurePosixPath(member.filename).parts)
                if name:
                    yield name, archive.read(member)
    else:
        with tarfile.open(path) as archive:
            for member in archive:
                name = _name(pathlib.PurePosixPath(member.name).parts)
                if name and member.isfile():
                    yield name, archive.extractfile(member).read()


def _name(parts):
    """(…, part, class, file) -> (part, class, file); None for what is no image of the set."""
    if len(parts) < 3 or parts[-3] not in PARTS:
        return None
    is_image = parts[-1].lower().endswith(IMAGE_SUFFIXES) and not parts[-1].startswith(".")
    return tuple(parts[-3:]) if is_image else None


def _base(path):
    """The folder that holds train/ and test/: `path` itself or its only such subfolder."""
    inside = [p for p in sorted(path.iterdir()) if p.is_dir() and not p.name.startswith(".")]
    return next((p for p in (path, *inside) if all((p / part).is_dir() for part in PARTS)), None)


def _classes(names, path):
    found = {part: sorted({c for p, c, _ in names if p == part}) for part in PARTS}
    for part in PARTS:
        if not found[part]:
            raise UserError(f"{path}: no images in {part}/; expected {part}/CLASS/*")
    strangers = ", ".join(c for c in found["test"] if c not in found["train"])
    if strangers:
        raise UserError(f"{path}: test/ has classes that train/ lacks: {strangers}")
    return tuple(found["train"])


def _pixels(image):
    return f"{image.shape[2]}x{image.shape[1]} pixels"


def write_jpegs(folder, images, labels, classes, quality):
    """Write uint8 [N, H, W, 3] as folder/CLASS/NNNN.jpg with half-resolution chroma; NNNN counts
    within each class in the given order.
    """
    counts = dict.fromkeys(classes, 0)
    for name in classes:
        (folder / name).mkdir(parents=True)
    pairs = tqdm(zip(images, labels), f"write {folder.name}", len(labels), unit=" images")
    for image, label in pairs:
        name = classes[label]
        file = folder / name / f"{counts[name]:04d}.jpg"
        Image.fromarray(image).save(file, quality=quality, subsampling="4:2:0")
        counts[name] += 1


# ---- Cache ---------------------------------------------------------------------------------------


def state(path):
    """What changes when the images' files do: path, sizes and times."""
    files = [file for _, file in _folder_files(path)] if path.is_dir() else [path]
    stats = [(str(f.relative_to(path)), f.stat()) for f in files]
    return str(path.resolve()), [(name, s.st_size, s.st_mtime_ns) for name, s in stats]


def _write_cache(cached, images):
    tensors = {}
    for part in PARTS:
        tensors[f"{part}.images"], tensors[f"{part}.labels"] = getattr(images, part)
    try:
        save_tensors(cached, tensors, {"classes": json.dumps(images.classes)})
    except UserError as error:
        print(f"note: decoded images are not cached ({error})")


def _read_cache(cached, path, content):
    with safetensors.safe_open(cached, "pt") as file:
        classes = tuple(json.loads(file.metadata()["classes"]))
        get = file.get_tensor
        parts = [(get(f"{part}.images"), get(f"{part}.labels")) for part in PARTS]
        return ImageSet(stem(path), classes, *parts, content)


def _unpack(path, folder):
    """Write an archive's images to folder/part/class/name, so that any order can read them."""
    for name, content in tqdm(_files(path), desc=f"unpack {path.name}", unit=" images"):
        with atomic_path(folder.joinpath(*name)) as temporary:
            temporary.write_bytes(content)
    return folder
