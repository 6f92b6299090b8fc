"""Any set of images laid out as train/CLASS/* and test/CLASS/*, read from a folder, a tar or a zip.

    images = load(path, cache)

Images are decoded once and cached as uint8, one tensor a part; a set of more than STREAM_ABOVE
bytes is decoded batch by batch instead.
"""

import contextlib
import dataclasses
import io
import json

import numpy as np
import safetensors
import torch
from PIL import Image
from tqdm.auto import tqdm

from quantlab.images.files import PARTS, base_folder, fingerprint, image_files, stem
from quantlab.system.errors import UserError, one_line
from quantlab.system.files import atomic_path, save_tensors

STREAM_ABOVE = 10**9  # bytes of decoded images
DECODING = 2  # counts what `decode` makes of the same file: 2 rounds 16 bits where 1 clipped


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """train and test: (images uint8 [N, 3, H, W], labels int64 [N]); stem: the name of its file."""

    stem: str
    classes: tuple
    train: tuple
    test: tuple
    fingerprint: str


def load(path, cache, size=None):
    """The ImageSet at `path`, decoded, or taken from the folder `cache`.

    size: side in pixels that images are resized and cropped to. Raises UserError when it is no
    image set, damaged or unreadable, or when image sizes differ and `size` is None.
    """
    content = fingerprint(path, cache)
    cached = cache / f"{stem(path)}-{content[:16]}-{size or 'full'}-{DECODING}.safetensors"
    with contextlib.suppress(safetensors.SafetensorError, KeyError, ValueError, OSError):
        return _read_cache(cached, path, content)  # not there, or damaged: decoded below
    names, images = _decode_all(path, size)
    if images is None:
        folder = base_folder(path) if path.is_dir() else _unpack(path, cached.with_suffix(""))
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
    files = tqdm(image_files(path), desc=f"decode {path.name}", unit=" images", mininterval=0.5)
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
    the shorter side is resized to it, the centre kept. 16 bits are rounded to 8; UserError for
    pixels of more, and for floats, which have no range.
    """
    try:
        image = _eight_bits(Image.open(io.BytesIO(content)), name).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise UserError(
            f"{one_line(name)} cannot be read as an image; remove it or replace it") from None
    if size is not None:
        scale = size / min(image.size)
        sides = [max(size, round(side * scale)) for side in image.size]
        image = image.resize(sides, Image.Resampling.BILINEAR)
        left, top = ((side - size) // 2 for side in sides)
        image = image.crop((left, top, left + size, top + size))
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def _eight_bits(image, name):
    """An image of 16 bits a pixel with 0..65535 as 0..255, where Pillow would clip; others as they
    are.
    """
    if not image.mode.startswith(("I", "F")):
        return image
    pixels = np.asarray(image)
    if image.mode == "F" or not 0 <= pixels.min() <= pixels.max() <= 65535:
        what = "floats" if image.mode == "F" else "32 bits"
        raise UserError(f"{one_line(name)} has pixels of {what}, whose range nobody knows; convert "
                        "it to 8 or 16 bits")
    return Image.fromarray(((pixels.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8))


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
    for name, content in tqdm(image_files(path), desc=f"unpack {path.name}", unit=" images"):
        with atomic_path(folder.joinpath(*name)) as temporary:
            temporary.write_bytes(content)
    return folder
