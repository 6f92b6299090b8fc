"""Three sources, each with real files that the tests build: image sets as folder and archives, CIFAR-10's format behind a local mirror, digits."""

import functools
import hashlib
import http.server
import pickle
import shutil
import tarfile
import threading
import zipfile

import numpy as np
import pytest
import torch
from conftest import make_tar
from PIL import Image

import quantlab as ql
from quantlab.images import cifar10 as files_of_cifar10
from quantlab.images import datasets as qdata
from quantlab.images import imageset


def load(path, **options):
    return ql.load_data(path, verbose=False, **options)


# ---- Digits and what every source has in common -------------------------------------------------------------------------------


def test_digits_are_the_embedded_default(workbook, capsys):
    data = ql.load_data("auto")
    said = capsys.readouterr().out
    assert "digits (smoke run" in said and "python -m quantlab data cifar10" in said and said.count("\n") == 1
    assert data.smoke and len(data.train) + len(data.heldout) + len(data.test) == 1797
    images, labels = next(data.test.batches(32))
    assert images.shape == (32, 3, 32, 32) and images.dtype == torch.float32 and labels.dtype == torch.int64


def test_parts_are_disjoint_fixed_and_balanced(digits):
    fit, held = digits.train.images.index, digits.heldout.images.index
    assert not set(fit.tolist()) & set(held.tolist())
    again = load("digits")
    assert torch.equal(again.heldout.images.index, held)
    counts = torch.bincount(digits.heldout.labels)
    assert counts.min() >= 13 and counts.max() <= 16


def test_calibration_comes_from_training_images_and_follows_its_seed(digits):
    def rows(n, seed):
        return torch.cat(list(digits.calibration(n, seed)))

    assert torch.equal(rows(100, 0), rows(100, 0)) and not torch.equal(rows(100, 0), rows(100, 1))
    assert torch.equal(rows(300, 0)[:100], rows(100, 0)), "fewer images are a part of more"
    everything = digits.train.normalize(digits.train.images[torch.arange(len(digits.train))])
    known = {hashlib.sha256(image.numpy().tobytes()).digest() for image in everything}
    assert all(hashlib.sha256(image.numpy().tobytes()).digest() in known for image in rows(100, 3))
    for n in (0, -1, 10**6):
        with pytest.raises(ql.UserError, match="n_calibration"):
            digits.calibration(n)


def test_unknown_source_says_what_is_allowed():
    with pytest.raises(ql.UserError, match="use auto, cifar10, digits, images, or the path"):
        load("cifar100")


# ---- Image sets -----------------------------------------------------------------------------------------------------------------


def test_folder_tar_and_zip_are_the_same_set(workbook, image_folder, tmp_path):
    tar = make_tar(image_folder, tmp_path / "pets.tar.gz")
    archive = shutil.make_archive(str(tmp_path / "zipped" / "pets"), "zip", tmp_path, "pets")
    sets = [load(place) for place in (image_folder, tar, archive)]
    assert {s.name for s in sets} == {"pets"} and len({s.fingerprint for s in sets}) == 1
    for other in sets[1:]:
        assert other.classes == ("cat", "dog") and torch.equal(other.test.labels, sets[0].test.labels)
        assert torch.equal(other.test.images, sets[0].test.images)
    assert (len(sets[0].train) + len(sets[0].heldout), len(sets[0].test)) == (12, 6)
    expected = np.asarray(Image.open(image_folder / "test" / "dog" / "0001.png")).transpose(2, 0, 1)
    assert np.array_equal(sets[0].test.images[4].numpy(), expected)


def test_decoded_once_then_cached_and_a_damaged_cache_is_rebuilt(workbook, image_folder, monkeypatch):
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
        assert isinstance(streamed.test.images, imageset.Streamed) and streamed.fingerprint == in_memory.fingerprint
        for a, b in zip(streamed.test.batches(4), in_memory.test.batches(4)):
            assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
        assert torch.equal(next(iter(streamed.calibration(5))), next(iter(in_memory.calibration(5))))


def test_images_of_several_sizes_need_one_size(workbook, image_folder):
    Image.new("RGB", (20, 12)).save(image_folder / "train" / "cat" / "wide.png")
    with pytest.raises(ql.UserError, match="20x12 pixels but the first image is 8x8"):
        load(image_folder)
    assert load(image_folder, size=10).train.images[torch.arange(2)].shape == (2, 3, 10, 10)


def test_names_come_from_the_environment_the_fingerprint_or_the_file(workbook, image_folder, monkeypatch):
    data = load(image_folder)
    assert data.name == "pets"
    monkeypatch.setitem(qdata.KNOWN_FINGERPRINTS, data.fingerprint, "famous-pets")
    assert load(image_folder).name == "famous-pets"
    monkeypatch.setenv("DATA_NAME", "mine")
    assert load(image_folder).name == "mine"


def test_auto_finds_an_image_set_in_data_and_in_the_environment(workbook, image_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("QUANTLAB_DATA", str(make_tar(image_folder, tmp_path / "elsewhere.tar.gz")))
    assert load("auto").name == "elsewhere"
    monkeypatch.delenv("QUANTLAB_DATA")
    (workbook / "data").mkdir(exist_ok=True)
    shutil.copytree(image_folder, workbook / "data" / "pets")
    assert load("auto").name == load("images").name == "pets"
    shutil.rmtree(workbook / "data" / "pets")
    with pytest.raises(ql.UserError, match="no image set"):
        load("images")


def _without_test(folder):
    shutil.rmtree(folder / "test")


def _without_classes(folder):
    for part in ("train", "test"):
        shutil.rmtree(folder / part)
        (folder / part).mkdir()
        (folder / part / "loose.png").write_bytes(b"")


def _unreadable(folder):
    (folder / "train" / "cat" / "0003.png").write_bytes(b"this is no image")


def _truncated_image(folder):
    file = folder / "train" / "cat" / "0003.png"
    file.write_bytes(file.read_bytes()[:60])


def _stranger(folder):
    (folder / "test" / "cow").mkdir()
    shutil.copy(folder / "test" / "cat" / "0000.png", folder / "test" / "cow")


@pytest.mark.parametrize("damage, message", [
    (_without_test, "no train/ and test/ folders"), (_without_classes, "no images found; expected train/CLASS"),
    (_unreadable, "train/cat/0003.png cannot be read as an image"), (_truncated_image, "train/cat/0003.png cannot be read"),
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
    with pytest.raises(ql.UserError, match="damaged or not a tar or zip archive|no images found"):
        load(archive)


def test_an_archive_writes_nowhere_but_into_the_cache(workbook, image_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(imageset, "STREAM_ABOVE", 500)
    archive = tmp_path / "sly.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for part in ("train", "test"):
            for i in range(4):
                tar.add(image_folder / "train" / "cat" / f"000{i}.png", f"../../../{part}/cat/{i}.png")
    data = load(archive)
    assert all(workbook / "data" / "cache" in file.parents for file in data.test.images.files)


def test_a_read_only_data_folder_still_works(workbook, image_folder, monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.mkstemp", refuse)
    assert len(load(image_folder).test) == 6
    assert "not cached" in capsys.readouterr().out


# ---- CIFAR-10, its official format ------------------------------------------------------------------------------------------------


@pytest.fixture
def cifar10_archive(tmp_path, monkeypatch):
    """An archive in CIFAR-10's official format with a hundred images, and torchvision's checksums set to it."""
    import torchvision

    folder = tmp_path / "made" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    def batch(n):
        return {"data": generator.integers(0, 256, (n, 3072), dtype=np.uint8), "labels": (np.arange(n) % 10).tolist()}

    cifar10 = torchvision.datasets.CIFAR10
    monkeypatch.setattr(cifar10, "train_list", [write(f"data_batch_{i}", batch(40)) for i in range(1, 6)])
    monkeypatch.setattr(cifar10, "test_list", [write("test_batch", batch(20))])
    meta = write("batches.meta", {"label_names": list(files_of_cifar10.CIFAR10_CLASSES)})
    monkeypatch.setattr(cifar10, "meta", {"filename": meta[0], "key": "label_names", "md5": meta[1]})
    archive = tmp_path / "made" / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, folder.name)
    shutil.rmtree(folder)
    monkeypatch.setattr(cifar10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    return archive


@pytest.fixture
def mirror(cifar10_archive, monkeypatch):
    """A server on this machine that has the archive; a broken mirror stands in front of it, the official host is left out."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=cifar10_archive.parent)
    handler.log_message = lambda *a: None
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(files_of_cifar10, "CIFAR10_MIRRORS", ())
    monkeypatch.setenv("QUANTLAB_CIFAR10_URL", f"{address}/missing.tar.gz {address}/{cifar10_archive.name}")
    yield server
    server.shutdown()


def test_cifar10_is_downloaded_from_a_mirror_verified_and_found_again(workbook, mirror):
    data = load("cifar10")
    assert data.name == "cifar10" and data.classes == files_of_cifar10.CIFAR10_CLASSES and not data.smoke
    assert (len(data.train) + len(data.heldout), len(data.test)) == (200, 20)
    mirror.shutdown()
    assert load("auto").fingerprint == data.fingerprint, "auto takes CIFAR-10 where it already is"


def test_cifar10_archive_anywhere_is_accepted(workbook, cifar10_archive):
    data = load(cifar10_archive)
    assert data.name == "cifar10" and load(cifar10_archive.parent).fingerprint == data.fingerprint


def test_no_network_says_what_to_do(workbook, monkeypatch):
    monkeypatch.setattr(files_of_cifar10, "CIFAR10_MIRRORS", ("http://127.0.0.1:9/cifar-10-python.tar.gz",))
    with pytest.raises(ql.UserError, match="could not be downloaded.*put cifar-10-python.tar.gz into .* or name a mirror in QUANTLAB_CIFAR10_URL"):
        load("cifar10")
    assert not list((workbook / "data").rglob("*.gz"))


def test_damaged_cifar10_is_refused(workbook, cifar10_archive):
    load(cifar10_archive)  # unpacks beside it
    batch = cifar10_archive.parent / "cifar-10-batches-py" / "data_batch_3"
    batch.write_bytes(batch.read_bytes()[:-10])
    with pytest.raises(ql.UserError, match="incomplete or damaged"):
        load(cifar10_archive)
    shutil.rmtree(batch.parent)
    cifar10_archive.write_bytes(cifar10_archive.read_bytes()[:-100])
    with pytest.raises(ql.UserError, match="damaged or not CIFAR-10's official archive"):
        load(cifar10_archive)


def test_jpeg_copy_of_the_official_files(workbook, cifar10_archive, monkeypatch):
    monkeypatch.setenv("QUANTLAB_DATA", str(cifar10_archive.parent))
    official = load("cifar10")
    out = files_of_cifar10.make_jpeg_copy(workbook / "copy")
    copy = load(out)
    assert copy.name == "copy" and copy.classes == official.classes and len(copy.test) == 20
    with Image.open(next((out / "test" / "cat").iterdir())) as image:
        assert image.format == "JPEG" and image.layer[0][1:3] == (2, 2), "chroma at half resolution"
    with pytest.raises(ql.UserError, match="already exists"):
        files_of_cifar10.make_jpeg_copy(workbook / "copy")


# ---- The real JPEG images -----------------------------------------------------------------------------------------------------


def test_the_jpeg_images_are_recognised(jpeg):
    assert jpeg.name == "cifar10-jpeg" and jpeg.classes == files_of_cifar10.CIFAR10_CLASSES
    assert (len(jpeg.train), len(jpeg.heldout), len(jpeg.test)) == (45_000, 5_000, 10_000)
    assert torch.bincount(jpeg.heldout.labels).tolist() == [500] * 10
