"""Pixels of every depth, folders as they lie on disks, archives as tools pack them, hostile names.
"""

import functools
import io
import os
import shutil
import stat
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from conftest import make_image_folder, make_tar
from PIL import Image

import quantlab as ql
from quantlab.images import imageset
from quantlab.images.datasets import find_fingerprint
from quantlab.images.folder import load_folder
from quantlab.system import machine

load = functools.partial(ql.load_data, verbose=False)


# ---- Pixels --------------------------------------------------------------------------------------


def encoded(pixels, kind, **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["png", "tiff", "ppm"])
def test_16_bits_are_rounded_to_8(kind):
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    x = imageset.decode(encoded(values, kind), "x")
    exact = np.rint(values.astype(np.float64) * 255 / 65535)  # no tie: 65535 is odd
    assert x.dtype == np.uint8 and (x == exact).all() and len(x) == 3


def test_8_bits_are_kept_whatever_the_mode():
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert (imageset.decode(encoded(grey, "png"), "x") == grey).all()
    color = np.random.default_rng(0).integers(0, 256, (5, 7, 4), dtype=np.uint8)
    for channels in (3, 4):
        x = imageset.decode(encoded(color[..., :channels].copy(), "png"), "x")
        assert (x == color[..., :3].transpose(2, 0, 1)).all()


@pytest.mark.parametrize("pixels", [
    np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8),
    np.full((8, 8), 70_000, dtype=np.int32), np.full((8, 8), -1, dtype=np.int32)])
def test_pixels_without_a_known_range_are_refused(pixels):
    with pytest.raises(ql.UserError, match="x.tif has pixels of .* convert it to 8 or 16 bits"):
        imageset.decode(encoded(pixels, "tiff"), "x.tif")


# ---- Folders and archives ------------------------------------------------------------------------


def test_hidden_folders_are_no_class(workbook, image_folder, tmp_path):
    for place in ("train/.ipynb_checkpoints", "train/cat/.thumbnails"):
        (image_folder / place).mkdir()
        shutil.copy(image_folder / "train/cat/0000.png", image_folder / place / "0.png")
    for place in (image_folder, make_tar(image_folder, tmp_path / "pets.tar.gz")):
        data = load(place)
        assert data.classes == ("cat", "dog") and len(data.train) + len(data.heldout) == 12
    (image_folder / "test").rename(tmp_path / "elsewhere")
    assert load_folder(image_folder / "train", 8, [0] * 3, [1] * 3, 20)[2] == ("cat", "dog")


@pytest.mark.parametrize("pack", ["folder", "tar", "zip"])
def test_a_class_that_cannot_be_read_does_not_vanish(workbook, image_folder, tmp_path, pack):
    for part in ("train", "test"):
        (image_folder / part / "owl").mkdir()
        Image.new("RGB", (8, 8)).save(image_folder / part / "owl" / "0.gif")
    place = image_folder
    if pack == "tar":
        place = make_tar(image_folder, tmp_path / "pets.tar.gz")
    elif pack == "zip":
        place = shutil.make_archive(str(tmp_path / "zipped"), "zip", tmp_path, "pets")
    for use in (load, find_fingerprint):
        with pytest.raises(ql.UserError, match="class test/owl can be read, only .* 0.gif; conv"):
            use(place)


def test_an_empty_class_does_not_vanish(workbook, image_folder):
    (image_folder / "train" / "owl").mkdir()
    with pytest.raises(ql.UserError, match="no image of the class train/owl can be read; convert"):
        load(image_folder)


def test_deeper_images_belong_to_their_class(workbook, image_folder, tmp_path, monkeypatch):
    deep = image_folder / "train" / "cat" / "more" / "and more"
    deep.mkdir(parents=True)
    for file in (image_folder / "train" / "dog").iterdir():
        shutil.copy(file, deep / file.name)
    places = [image_folder, make_tar(image_folder, tmp_path / "pets.tar.gz"),
              shutil.make_archive(str(tmp_path / "zipped" / "pets"), "zip", tmp_path, "pets")]
    sets = [load(place) for place in places]
    monkeypatch.setattr(imageset, "STREAM_ABOVE", 500)
    shutil.rmtree(workbook / "data")
    sets += [load(place) for place in places]
    for data in sets:
        labels = torch.cat([data.train.labels, data.heldout.labels])
        assert labels.bincount().tolist() == [12, 6]
        assert data.fingerprint == sets[0].fingerprint
        index = torch.arange(len(data.train))
        assert torch.equal(data.train.images[index], sets[0].train.images[index])


def test_links_lead_to_images_and_never_around(workbook, image_folder, tmp_path):
    disk = image_folder.rename(tmp_path / "disk")
    image_folder.mkdir()
    for part in ("train", "test"):
        (image_folder / part).symlink_to(disk / part)
    (disk / "train" / "cat" / "again").symlink_to(disk / "train")
    first = load(image_folder)
    assert len(first.train) + len(first.heldout) == 12 + 6, "the dogs once more, through the link"
    file = disk / "test" / "cat" / "0000.png"
    before, content = file.stat(), bytearray(file.read_bytes())
    pixels = np.asarray(Image.open(file)) ^ 1
    Image.fromarray(pixels).save(file)
    padding = len(content) - file.stat().st_size
    file.write_bytes(file.read_bytes() + bytes(max(padding, 0)))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # of the same size and time
    assert load(image_folder).fingerprint != first.fingerprint


def test_links_in_archives(workbook, image_folder, tmp_path):
    first, linked = image_folder / "train/cat/0000.png", image_folder / "train/cat/0009.png"
    os.link(first, linked)
    with tarfile.open(tmp_path / "hard.tar", "w") as tar:
        tar.add(image_folder, "pets")
        assert [member.islnk() for member in tar].count(True) == 1
    assert load(tmp_path / "hard.tar").fingerprint == load(image_folder).fingerprint
    linked.unlink()
    linked.symlink_to("0000.png")
    for name in ("soft", "outside", "class"):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            tar.add(image_folder, "pets")
            if name == "outside":
                link = tarfile.TarInfo("pets/train/cat/passwords.png")
                link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
                tar.addfile(link)
            elif name == "class":
                link = tarfile.TarInfo("pets/train/owl")
                link.type, link.linkname = tarfile.SYMTYPE, "/etc"
                tar.addfile(link)
    assert load(tmp_path / "soft.tar").fingerprint == load(image_folder).fingerprint
    for name, what in (("outside", "cat/passwords.png"), ("class", "owl")):
        with pytest.raises(ql.UserError, match=f"train/{what} is a link; pack the files"):
            load(tmp_path / f"{name}.tar")
    with zipfile.ZipFile(tmp_path / "linked.zip", "w") as archive:
        info = zipfile.ZipInfo("pets/train/owl")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, "/etc")
    with pytest.raises(ql.UserError, match="train/owl is a link"):
        load(tmp_path / "linked.zip")


# ---- What is no file, and hostile names ----------------------------------------------------------


def test_a_device_called_jpg_is_named_and_not_read(workbook, image_folder):
    os.mkfifo(image_folder / "train" / "cat" / "x.jpg")
    for use in (load, find_fingerprint, lambda f: load_folder(f, 8, [0] * 3, [1] * 3, 20)):
        with pytest.raises(ql.UserError, match="x.jpg is no file but a device or a link"):
            use(image_folder)


@pytest.mark.parametrize("name", ["..", ".", ".hidden", "../../.."])
def test_a_streamed_archive_writes_nowhere_else(workbook, tmp_path, monkeypatch, name):
    monkeypatch.setattr(imageset, "STREAM_ABOVE", 500)
    pets = make_image_folder(tmp_path / "pets")
    archive = make_tar(pets, tmp_path / "sly.tar")
    with tarfile.open(archive, "w") as tar:
        tar.add(pets, "pets")
        for part in ("train", "test"):
            tar.add(pets / "train/cat/0000.png", f"{part}/{name}/0.png")
            tar.add(pets / "train/cat/0000.png", f"{part}/cat/{name}/1.png")
    data = load(archive)
    files = [*data.test.images.files, *data.train.images.store.files]
    inside = {file.resolve().relative_to(workbook / "data" / "cache").parts[1:] for file in files}
    assert all(len(parts) == 3 and parts[1] in ("cat", "dog") for parts in inside)


def test_names_that_would_write_on_a_terminal_are_refused(workbook, image_folder, monkeypatch):
    sly = "cow\x1b[2J\n"
    shutil.copytree(image_folder / "train/cat", image_folder / "train" / sly)
    with pytest.raises(ql.UserError, match="has a name that cannot be printed") as error:
        load(image_folder)
    assert str(error.value).isprintable()
    (image_folder / "train" / sly).rename(image_folder / "train" / "cow")
    (image_folder / "train" / "cow" / f"{sly}.png").write_bytes(b"no image")
    with pytest.raises(ql.UserError, match="cannot be read as an image") as error:
        load(image_folder)
    assert str(error.value).isprintable()
    shutil.rmtree(image_folder / "train" / "cow")
    for name in (sly, "a/b", ".."):
        monkeypatch.setenv("DATA_NAME", name)
        with pytest.raises(ql.UserError, match="cannot name files") as error:
            load(image_folder)
        assert str(error.value).isprintable()


# ---- The environment -----------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["224x224", "-1", "0", "1e3", "big", "9" * 30, "\x1b[2J", "²"])
def test_a_size_that_is_none(workbook, image_folder, monkeypatch, value):
    monkeypatch.setenv("QUANTLAB_SIZE", value)
    with pytest.raises(ql.UserError, match="QUANTLAB_SIZE=.* a side is a whole number") as error:
        load(image_folder)
    assert str(error.value).isprintable()
    monkeypatch.delenv("QUANTLAB_SIZE")
    with pytest.raises(ql.UserError, match="size=.* a side is a whole number"):
        load(image_folder, size=value)


@pytest.mark.parametrize("value", ["gpu", "meta", "cuda:99", "cpu:x", "\x1b[2J"])
def test_a_device_that_is_none(monkeypatch, value):
    monkeypatch.setenv("QUANTLAB_DEVICE", value)
    with pytest.raises(ql.UserError, match="QUANTLAB_DEVICE=.* is no device of this machine") as e:
        machine.device()
    assert str(e.value).isprintable()
    monkeypatch.setenv("QUANTLAB_DEVICE", "cpu")
    assert machine.device() == torch.device("cpu")
