"""CIFAR-10 in its official format, made small, behind a mirror on this machine."""

import functools
import hashlib
import http.server
import pickle
import shutil
import tarfile
import threading

import numpy as np
import pytest
from PIL import Image

import quantlab as ql
from quantlab.images import cifar10
from quantlab.images.datasets import find_fingerprint

load = functools.partial(ql.load_data, verbose=False)


@pytest.fixture
def cifar10_archive(tmp_path, monkeypatch):
    """A hundred images in CIFAR-10's official format; torchvision's checksums are set to them."""
    import torchvision

    folder = tmp_path / "made" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    def batch(n):
        images = generator.integers(0, 256, (n, 3072), dtype=np.uint8)
        return {"data": images, "labels": (np.arange(n) % 10).tolist()}

    official = torchvision.datasets.CIFAR10
    batches = [write(f"data_batch_{i}", batch(40)) for i in range(1, 6)]
    monkeypatch.setattr(official, "train_list", batches)
    monkeypatch.setattr(official, "test_list", [write("test_batch", batch(20))])
    name, md5 = write("batches.meta", {"label_names": list(cifar10.CIFAR10_CLASSES)})
    monkeypatch.setattr(official, "meta", {"filename": name, "key": "label_names", "md5": md5})
    archive = tmp_path / "made" / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, folder.name)
    shutil.rmtree(folder)
    monkeypatch.setattr(official, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    return archive


@pytest.fixture
def mirror(cifar10_archive, monkeypatch):
    """A server that has the archive, behind a broken mirror; the official host is left out."""
    handler = functools.partial(
        http.server.SimpleHTTPRequestHandler, directory=cifar10_archive.parent
    )
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *a: None)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(cifar10, "CIFAR10_MIRRORS", ())
    mirrors = f"{address}/missing.tar.gz {address}/{cifar10_archive.name}"
    monkeypatch.setenv("QUANTLAB_CIFAR10_URL", mirrors)
    yield server
    server.shutdown()


def test_cifar10_is_downloaded_from_a_mirror_verified_and_found_again(workbook, mirror):
    data = load("cifar10")
    assert data.name == "cifar10" and data.classes == cifar10.CIFAR10_CLASSES and not data.smoke
    assert (len(data.train) + len(data.heldout), len(data.test)) == (200, 20)
    mirror.shutdown()
    assert load("auto").fingerprint == data.fingerprint, "auto takes CIFAR-10 where it already is"
    assert find_fingerprint("cifar10") == find_fingerprint("auto") == data.fingerprint


def test_cifar10_archive_anywhere_is_accepted(workbook, cifar10_archive):
    data = load(cifar10_archive)
    assert data.name == "cifar10" and load(cifar10_archive.parent).fingerprint == data.fingerprint
    assert find_fingerprint(cifar10_archive) == data.fingerprint


def test_no_network_says_what_to_do(workbook, monkeypatch):
    nowhere = "http://127.0.0.1:9/cifar-10-python.tar.gz"
    monkeypatch.setattr(cifar10, "CIFAR10_MIRRORS", (nowhere,))
    message = (
        "could not be downloaded.*put cifar-10-python.tar.gz into .* or name a mirror "
        "in QUANTLAB_CIFAR10_URL"
    )
    with pytest.raises(ql.UserError, match=message):
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
    out = cifar10.make_jpeg_copy(workbook / "copy")
    copy = load(out)
    assert copy.name == "copy" and copy.classes == official.classes and len(copy.test) == 20
    with Image.open(next((out / "test" / "cat").iterdir())) as image:
        assert image.format == "JPEG"
        assert image.layer[0][1:3] == (2, 2), "chroma at half resolution"
    with pytest.raises(ql.UserError, match="already exists"):
        cifar10.make_jpeg_copy(workbook / "copy")
