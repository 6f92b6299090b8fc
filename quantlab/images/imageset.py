"""Read any set of images laid out as train/CLASS/* and test/CLASS/*, from a folder, a tar or a zip, without unpacking it.

Every image is decoded once and cached as one uint8 tensor; a set that would exceed STREAM_ABOVE bytes is decoded batch by batch instead.
The fingerprint is computed from the files' names and bytes, so that a folder and an archive of the same files agree.
"""

import dataclasses
import hashlib
import io
import json
import lzma
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
from quantlab.system.files import atomic_path, save_tensors

PARTS = ("train", "test")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
ARCHIVE_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2", ".zip")
DAMAGED = (tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, zlib.error, EOFError, OSError, RuntimeError)  # the last: encrypted
STREAM_ABOVE = 10**9  # bytes of decoded images


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """train and test: (images uint8 [N, 3, H, W], labels int64 [N]); `stem` is the file's name without its suffix."""

    stem: str
    classes: tuple
    train: tuple
    test: tuple
    fingerprint: str


def stem(path):
    """File name without any archive suffix."""
    suffix = next((s for s in sorted(ARCHIVE_SUFFIXES, key=len, reverse=True) if path.name.lower().endswith(s)), "")
    return path.name[: len(path.name) - len(suffix)] if suffix and path.is_file() else path.name


def is_image_set(path):
    """True for a folder with train/ and test/ (also one level down), and for an archive whose first image lies in such a folder."""
    if path.is_dir():
        return _base(path) is not None
    if not path.name.lower().endswith(ARCHIVE_SUFFIXES):
        return False
    try:
        return next(_archive_files(path), None) is not None
    except DAMAGED:
        return False


def load(path, cache, size=None):
    """Decode the set at `path`, or take it from the folder `cache`; raise UserError when it is no image set, damaged or unreadable."""
    key = hashlib.sha256(json.dumps([state(path), size]).encode()).hexdigest()[:16]
    cached = cache / f"{stem(path)}-{key}.safetensors"
    if cached.exists():
        try:
            return _read_cache(cached, path)
        except (safetensors.SafetensorError, KeyError, ValueError, OSError):
            pass  # damaged: decoded again below
    files = _files(path)
    kept, names, digests, total = [], [], [], 0
    for name, content in tqdm(files, desc=f"decode {path.name}", unit=" images", mininterval=0.5):
        image = decode(content, "/".join(name), size)
        if kept and image.shape != kept[0].shape:
            raise UserError(f"{path}: {'/'.join(name)} is {_pixels(image)} but the first image is {_pixels(kept[0])}; name one size: QUANTLAB_SIZE=224")
        names.append(name)
        digests.append(hashlib.sha256(content).hexdigest())
        total += image.nbytes
        if total <= STREAM_ABOVE or not kept:
            kept.append(image)
    if not names:
        raise UserError(f"{path}: no images found; expected train/CLASS/*.jpg and test/CLASS/*.jpg (or {', '.join(IMAGE_SUFFIXES[2:])})")
    order = sorted(range(len(names)), key=names.__getitem__)
    classes = _classes(names, path)
    lines = "\n".join(f"{'/'.join(names[i])} {digests[i]}" for i in order)
    fingerprint = hashlib.sha256(lines.encode()).hexdigest()
    if len(kept) < len(names):
        folder = _base(path) if path.is_dir() else _unpack(path, cache / f"{stem(path)}-{key}")
        stores = {p: Streamed([folder.joinpath(*names[i]) for i in order if names[i][0] == p], size) for p in PARTS}
    else:
        stores = {p: torch.from_numpy(np.stack([kept[i] for i in order if names[i][0] == p])) for p in PARTS}
    labels = {p: torch.tensor([classes.index(names[i][1]) for i in order if names[i][0] == p]) for p in PARTS}
    if len(kept) == len(names):
        _write_cache(cached, classes, fingerprint, stores, labels)
    return ImageSet(stem(path), classes, *((stores[p], labels[p]) for p in PARTS), fingerprint)


def decode(content, name, size=None):
    """Bytes of an image file -> uint8 [3, H, W]; with `size`, the shorter side is resized to it and the centre cropped."""
    try:
        image = Image.open(io.BytesIO(content)).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise UserError(f"{name} cannot be read as an image; remove it or replace it") from None
    if size is not None:
        scale = size / min(image.size)
        image = image.resize([max(size, round(side * scale)) for side in image.size], Image.Resampling.BILINEAR)
        left, top = ((side - size) // 2 for side in image.size)
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
        return torch.from_numpy(np.stack([decode(file.read_bytes(), file, self.size) for file in chosen]))


# ---- Files of a folder or an archive ----------------------------------------------------------------------------------------


def _files(path):
    """Yield ((part, class, file name), bytes) for every image of the set."""
    try:
        if path.is_dir():
            base = _base(path)
            if base is None:
                raise UserError(f"{path} has no train/ and test/ folders; expected train/CLASS/* and test/CLASS/*")
            for file in sorted(base.glob("*/*/*")):
                name = _name(file.relative_to(base).parts)
                if name:
                    yield name, file.read_bytes()
        else:
            yield from _archive_files(path)
    except DAMAGED as error:
        raise UserError(f"{path} is damaged or not a tar or zip archive ({type(error).__name__}: {error}); copy or download it again") from None


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
                name = _name(pathlib.PurePosixPath(member.name).parts) if member.isfile() else None
                if name:
                    yield name, archive.extractfile(member).read()


def _name(parts):
    """(…, part, class, file) -> (part, class, file), or None for anything else than an image of the set."""
    if len(parts) < 3 or parts[-3] not in PARTS or parts[-1].startswith(".") or not parts[-1].lower().endswith(IMAGE_SUFFIXES):
        return None
    return tuple(parts[-3:])


def _base(path):
    """The folder that holds train/ and test/: `path` itself or its only such subfolder."""
    candidates = [path, *(p for p in sorted(path.iterdir()) if p.is_dir() and not p.name.startswith("."))]
    return next((p for p in candidates if all((p / part).is_dir() for part in PARTS)), None)


def _classes(names, path):
    found = {part: sorted({c for p, c, _ in names if p == part}) for part in PARTS}
    if not found["train"] or not found["test"]:
        missing = "train" if not found["train"] else "test"
        raise UserError(f"{path}: no images in {missing}/; expected {missing}/CLASS/*")
    if set(found["test"]) - set(found["train"]):
        strangers = ", ".join(sorted(set(found["test"]) - set(found["train"])))
        raise UserError(f"{path}: test/ has classes that train/ lacks: {strangers}")
    return tuple(found["train"])


def _pixels(image):
    return f"{image.shape[2]}x{image.shape[1]} pixels"


def write_jpegs(folder, images, labels, classes, quality):
    """Write uint8 [N, H, W, 3] as folder/CLASS/NNNN.jpg with half-resolution chroma, numbered within each class in the given order."""
    counts = dict.fromkeys(classes, 0)
    for name in classes:
        (folder / name).mkdir(parents=True)
    for image, label in tqdm(zip(images, labels), total=len(labels), desc=f"write {folder.name}", unit=" images"):
        name = classes[label]
        Image.fromarray(image).save(folder / name / f"{counts[name]:04d}.jpg", quality=quality, subsampling="4:2:0")
        counts[name] += 1


# ---- Cache ------------------------------------------------------------------------------------------------------------------


def state(path):
    """What changes when the files do: path, sizes and times."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    stats = [(str(f.relative_to(path)), f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()]
    return str(path.resolve()), stats


def _write_cache(cached, classes, fingerprint, stores, labels):
    tensors = {f"{part}.{kind}": values[part] for part in PARTS for kind, values in (("images", stores), ("labels", labels))}
    try:
        save_tensors(cached, tensors, {"classes": json.dumps(classes), "fingerprint": fingerprint})
    except UserError as error:
        print(f"note: decoded images are not cached ({error})")


def _read_cache(cached, path):
    with safetensors.safe_open(cached, "pt") as file:
        parts = ((file.get_tensor(f"{part}.images"), file.get_tensor(f"{part}.labels")) for part in PARTS)
        metadata = file.metadata()
        return ImageSet(stem(path), tuple(json.loads(metadata["classes"])), *parts, metadata["fingerprint"])


def _unpack(path, folder):
    """Write an archive's images to folder/part/class/name, so that they can be read in any order."""
    for name, content in tqdm(_files(path), desc=f"unpack {path.name}", unit=" images"):
        with atomic_path(folder.joinpath(*name)) as temporary:
            temporary.write_bytes(content)
    return folder
