"""Image sets as folder, tar and zip: one set, one fingerprint, decoded once; and bad ones."""

import functools
import os
import shutil
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from conftest import make_tar
from PIL import Image

import quantlab as ql
from quantlab.images import files, imageset
from quantlab.images.datasets import find_fingerprint

load = functools.partial(ql.load_data, verbose=False)


def test_folder_tar_and_zip_are_the_same_set(workbook, image_folder, tmp_path):
    tar = make_tar(image_folder, tmp_path / "pets.tar.gz")
    archive = shutil.make_archive(str(tmp_path / "zipped" / "pets"), "zip", tmp_path, "pets")
    first, *others = [load(place) for place in (image_folder, tar, archive)]
    for other in others:
        assert other.name == first.name == "pets" and other.fingerprint == first.fingerprint
        assert other.classes == ("cat", "dog")
        assert torch.equal(other.test.labels, first.test.labels)
        assert torch.equal(other.test.images, first.test.images)
    assert (len(first.train) + len(first.heldout), len(first.test)) == (12, 6)
    expected = np.asarray(Image.open(image_folder / "test" / "dog" / "0001.png"))
    assert np.array_equal(first.test.images[4].numpy(), expected.transpose(2, 0, 1))


def test_decoded_once_then_cached_and_a_damaged_cache_is_rebuilt(
    workbook, image_folder, monkeypatch
):
    first = load(image_folder)
    (cached,) = (workbook / "data" / "cache").glob("*.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr(imageset, "decode", lambda *a: pytest.fail("decoded again"))
        assert torch.equal(load(image_folder).test.images, first.test.images)
    cached.write_bytes(cached.read_bytes()[:100])
    assert torch.equal(load(image_folder).test.images, first.test.images)
    (image_folder / "train" / "cat" / "0000.png").unlink()
    assert load(image_folder).fingerprint != first.fingerprint, "changed files are noticed"


def test_large_sets_are_streamed(workbook, image_folder, tmp_path, monkeypatch):
    in_memory = load(image_folder)
    monkeypatch.setattr(imageset, "STREAM_ABOVE", 500)
    shutil.rmtree(workbook / "data")
    for place in (image_folder, make_tar(image_folder, tmp_path / "pets.tar.gz")):
        streamed = load(place)
        assert isinstance(streamed.test.images, imageset.Streamed)
        assert streamed.fingerprint == in_memory.fingerprint
        for a, b in zip(streamed.test.batches(4), in_memory.test.batches(4)):
            assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
        a, b = (next(iter(data.calibration(5))) for data in (streamed, in_memory))
        assert torch.equal(a, b)


def test_images_of_several_sizes_need_one_size(workbook, image_folder):
    Image.new("RGB", (20, 12)).save(image_folder / "train" / "cat" / "wide.png")
    with pytest.raises(ql.UserError, match="20x12 pixels but the first image is 8x8"):
        load(image_folder)
    assert load(image_folder, size=10).train.images[torch.arange(2)].shape == (2, 3, 10, 10)


# ---- The fingerprint -----------------------------------------------------------------------------


def test_the_fingerprint_is_that_of_the_content_wherever_it_lies_and_whenever_it_was_written(
    workbook, image_folder, tmp_path
):
    first = find_fingerprint(image_folder)
    assert first == load(image_folder).fingerprint
    for file in image_folder.rglob("*.png"):
        os.utime(file, (1, 1))
    (image_folder / "notes.txt").write_text("no image")
    copy = shutil.copytree(image_folder, tmp_path / "elsewhere" / "animals")
    tar = make_tar(image_folder, tmp_path / "pets.tar.gz")
    assert {find_fingerprint(place) for place in (image_folder, copy, tar)} == {first}
    changed = copy / "test" / "cat" / "0001.png"
    content = bytearray(changed.read_bytes())
    content[-1] ^= 1
    changed.write_bytes(content)
    assert find_fingerprint(copy) != first, "one byte"
    os.rename(image_folder / "test/cat/0001.png", image_folder / "test/cat/0009.png")
    assert find_fingerprint(image_folder) != first, "one name"


def test_images_at_another_size_are_other_images(workbook, image_folder, monkeypatch):
    found = [load(image_folder, size=size).fingerprint for size in (None, 4, 6)]
    assert len(set(found)) == 3, "what was measured at one size is not taken for another's"
    for size, content in zip(("", "4", "6"), found):
        monkeypatch.setenv("QUANTLAB_SIZE", size)
        assert find_fingerprint(image_folder) == load(image_folder).fingerprint == content


def test_the_fingerprint_decodes_nothing_and_is_read_again_only_where_files_changed(
    workbook, image_folder, monkeypatch
):
    monkeypatch.setattr(imageset, "decode", lambda *a: pytest.fail("decoded"))
    first = find_fingerprint(image_folder)
    (kept,) = (workbook / "data" / "cache").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(files, "image_files", lambda path: pytest.fail("read again"))
        assert find_fingerprint(image_folder) == first
    kept.write_text("damaged")
    assert find_fingerprint(image_folder) == first and kept.read_text() == first


def test_a_touched_set_is_not_decoded_again(workbook, image_folder, monkeypatch):
    first = load(image_folder)
    os.utime(image_folder / "train" / "cat" / "0000.png", (1, 1))
    monkeypatch.setattr(imageset, "decode", lambda *a: pytest.fail("decoded again"))
    assert torch.equal(load(image_folder).test.images, first.test.images)


def test_a_set_that_holds_its_own_cache_is_read_once(workbook, image_folder, monkeypatch):
    monkeypatch.setenv("QUANTLAB_DATA", str(image_folder))
    first = load("images")
    assert list((image_folder / "cache").glob("*.safetensors"))
    for module in (files, imageset):
        monkeypatch.setattr(module, "image_files", lambda path: pytest.fail("read again"))
    assert load("images").fingerprint == first.fingerprint


# ---- Bad folders and archives --------------------------------------------------------------------


def _without_test(folder):
    shutil.rmtree(folder / "test")


def _without_classes(folder):
    for part in ("train", "test"):
        shutil.rmtree(folder / part)
        (folder / part).mkdir()
        (folder / part / "loose.png").write_bytes(b"")


def _without_test_images(folder):
    for file in (folder / "test").rglob("*.png"):
        file.unlink()


def _unreadable(folder):
    (folder / "train" / "cat" / "0003.png").write_bytes(b"this is no image")


def _truncated_image(folder):
    file = folder / "train" / "cat" / "0003.png"
    file.write_bytes(file.read_bytes()[:60])


def _stranger(folder):
    (folder / "test" / "cow").mkdir()
    shutil.copy(folder / "test" / "cat" / "0000.png", folder / "test" / "cow")


@pytest.mark.parametrize("damage, message", [
    (_without_test, "no train/ and test/ folders"),
    (_without_classes, "no images found; expected train/CLASS"),
    (_without_test_images, "no images in test/; expected test/CLASS"),
    (_unreadable, "train/cat/0003.png cannot be read as an image"),
    (_truncated_image, "train/cat/0003.png cannot be read"),
    (_stranger, "classes that train/ lacks: cow"),
])
def test_bad_folders(workbook, image_folder, damage, message):
    damage(image_folder)
    with pytest.raises(ql.UserError, match=message):
        load(image_folder)
    assert not list((workbook / "data").rglob("*.safetensors")), "nothing half-written"


@pytest.mark.parametrize("kind", ["truncated", "text", "empty zip", "truncated zip"])
def test_bad_archives(workbook, image_folder, tmp_path, kind):
    archive = tmp_path / ("bad.zip" if "zip" in kind else "bad.tar.gz")
    if kind == "truncated":
        whole = make_tar(image_folder, tmp_path / "good.tar.gz").read_bytes()
        archive.write_bytes(whole[: len(whole) // 2])
    elif kind == "text":
        archive.write_text("not an archive")
    elif kind == "empty zip":
        zipfile.ZipFile(archive, "w").close()
    else:
        archive.write_bytes(b"PK\x03\x04 half a zip")
    message = "damaged or not a tar or zip archive|no images found"
    for use in (load, find_fingerprint):
        with pytest.raises(ql.UserError, match=message):
            use(archive)


def test_an_archive_writes_nowhere_but_into_the_cache(
    workbook, image_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(imageset, "STREAM_ABOVE", 500)
    archive = tmp_path / "sly.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for part in ("train", "test"):
            for i in range(4):
                file = image_folder / "train" / "cat" / f"000{i}.png"
                tar.add(file, f"../../../{part}/cat/{i}.png")
    data = load(archive)
    assert all(workbook / "data" / "cache" in file.parents for file in data.test.images.files)


def test_a_read_only_data_folder_still_works(workbook, image_folder, monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.mkstemp", refuse)
    assert len(load(image_folder).test) == 6
    assert "not cached" in capsys.readouterr().out
    assert find_fingerprint(image_folder) == load(image_folder).fingerprint
