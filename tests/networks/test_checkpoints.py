"""Checkpoints: exact round trips, everything that can be wrong with a file, and those committed."""

import dataclasses
import json
import math
import os
import shutil

import pytest
import safetensors.torch
import torch
from conftest import CHECKOUT, JPEG_ARCHIVE, fuzz, mutate_fields
from hypothesis import given
from hypothesis import strategies as st

import quantlab as ql
from quantlab.__main__ import main
from quantlab.evaluate import Evaluation
from quantlab.networks import checkpoints
from quantlab.system import files

RESNET50 = CHECKOUT / "checkpoint" / "resnet50-cifar10-jpeg.safetensors"


def some_result(n=20):
    correct = torch.arange(n) % 4 > 0
    return Evaluation(75.0, n, torch.zeros(n, dtype=torch.int64), correct, 1.0, "a machine")


@pytest.fixture
def checkpoint(tmp_path, digits):
    torch.manual_seed(5)
    model = ql.load_model("resnet20")
    path = tmp_path / "net.safetensors"
    options = dict(architecture="resnet20", result=some_result())
    checkpoints.save_checkpoint(model, path, digits, **options)
    return model, path


def test_round_trip_is_exact(checkpoint):
    model, path = checkpoint
    loaded = ql.load_model("resnet20", path)
    pairs = zip(model.state_dict().values(), loaded.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    card = ql.load_card(path)
    assert (card.test_top1, card.n_test, card.num_outputs) == (75.0, 20, 10)
    assert card.trained_on == "digits"


def test_checkpoint_of_another_architecture(checkpoint):
    with pytest.raises(ql.UserError, match="is a resnet20, not a resnet50; set model=resnet20"):
        ql.load_model("resnet50", checkpoint[1])


def test_damaged_checkpoint_and_card(checkpoint):
    path = checkpoint[1]
    content = path.read_bytes()
    for damaged in (content[:-1], content[:1000], b"", content[:-1] + b"x"):
        path.write_bytes(damaged)
        with pytest.raises(ql.UserError, match="damaged"):
            ql.load_model("resnet20", path)
    path.write_bytes(content)
    checkpoints.card_path(path).write_text("{}")
    with pytest.raises(ql.UserError, match="not a checkpoint card"):
        ql.load_model("resnet20", path)
    checkpoints.card_path(path).unlink()
    with pytest.raises(ql.UserError, match="not found; train one with"):
        ql.load_model("resnet20", path)


@given(data=st.data())
@fuzz(60)
def test_a_card_is_what_is_written_or_refused_in_a_line(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "card.safetensors"
    committed = CHECKOUT / "checkpoint" / "resnet20-digits.safetensors"
    shutil.copy(committed, path)
    fields = json.loads(checkpoints.card_path(committed).read_text())
    fields["history"] = fields["history"][:1]
    mutate_fields(fields, data)
    checkpoints.card_path(path).write_text(json.dumps(fields))
    try:
        card = ql.load_card(path)
        ql.load_model(card.architecture, path)
    except ql.UserError as error:
        assert str(error).isprintable()
        return
    written, read = {"heldout_top1": None, **fields}, dataclasses.asdict(card)
    assert json.dumps(read, sort_keys=True) == json.dumps(written, sort_keys=True)
    assert 0 <= card.test_top1 <= 100 and f"{card.test_top1:.2f} {card.n_test:,}".isprintable()


@pytest.mark.parametrize("text", ["[]", "null", "{", "[" * 100_000, '{"a": NaN}', "\xff"])
def test_texts_that_are_no_card(checkpoint, text):
    checkpoints.card_path(checkpoint[1]).write_bytes(text.encode("latin-1"))
    with pytest.raises(ql.UserError, match="not a checkpoint card") as error:
        ql.load_card(checkpoint[1])
    assert str(error.value).isprintable()


def test_weights_that_do_not_fit(checkpoint):
    path = checkpoint[1]
    state = safetensors.torch.load_file(path)
    state["fc.weight"] = torch.zeros(7, 64)
    safetensors.torch.save_file(state, path)
    card = json.loads(checkpoints.card_path(path).read_text())
    checkpoints.card_path(path).write_text(json.dumps({**card, "sha256": files.sha256(path)}))
    with pytest.raises(ql.UserError, match="does not fit resnet20: size mismatch for fc.weight"):
        ql.load_model("resnet20", path)


def test_pickles_are_never_loaded(tmp_path):
    (tmp_path / "net.pt").write_bytes(b"")
    message = "not a .safetensors file; bring it in with: python -m quantlab import-checkpoint"
    with pytest.raises(ql.UserError, match=message):
        ql.load_model("resnet20", tmp_path / "net.pt")


# ---- import-checkpoint ---------------------------------------------------------------------------


def import_state(file, state, data, architecture="resnet20"):
    torch.save(state, file)
    out = file.with_suffix(".safetensors")
    return checkpoints.import_checkpoint(file, architecture, out, data)[1], out


@pytest.mark.parametrize("wrap", [
    lambda s: s,
    lambda s: {"state_dict": s, "epoch": 3},
    lambda s: {"net": {f"module.{k}": v for k, v in s.items()}},
    lambda s: {"model": {"state_dict": s}},
], ids=["bare", "state_dict", "net of modules", "twice"])
def test_import_of_a_state_dict(tmp_path, digits, resnet20, wrap):
    card, out = import_state(tmp_path / "mine.pt", wrap(resnet20.state_dict()), digits)
    assert card.test_top1 > 95 and card.source == "imported from mine.pt"
    assert torch.equal(ql.load_model("resnet20", out).fc.weight, resnet20.fc.weight)


def test_a_head_of_1000_is_kept_and_evaluated_over_the_first_ten(tmp_path, digits, resnet20):
    wide = resnet20.state_dict()
    wide["fc.weight"] = torch.cat([wide["fc.weight"], torch.randn(990, 64)])
    wide["fc.bias"] = torch.cat([wide["fc.bias"], torch.full((990,), 100.0)])
    card, out = import_state(tmp_path / "wide.pt", wide, digits)
    assert card.num_outputs == 1000
    assert card.test_top1 == pytest.approx(ql.evaluate(resnet20, digits.test).top1)
    loaded, _ = ql.load_trained("resnet20", digits, out)
    assert ql.evaluate(loaded, digits.test).top1 == card.test_top1


class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


def test_import_executes_nothing(tmp_path, workbook, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save({"fc.weight": Bomb()}, "bomb.pt")
    assert main(["import-checkpoint", "bomb.pt", "--model", "resnet20", "--data", "digits"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error:") and said.count("\n") == 1
    assert "without executing code" in said
    assert [file.name for file in tmp_path.glob("*") if file.is_file()] == ["bomb.pt"]
    assert not list((workbook / "checkpoint").glob("*imported*"))


@pytest.mark.parametrize("content, message", [
    (lambda f: torch.save(torch.zeros(3), f), "holds no state dict"),
    (lambda f: torch.save({}, f), "holds no state dict"),
    (lambda f: torch.save({"model": {"epoch": 3}}, f), "holds no state dict"),
    (lambda f: f.write_bytes(b"garbage"), "cannot be read as a state dict"),
    (lambda f: torch.save({"conv.weight": torch.zeros(3)}, f), "does not fit resnet20"),
], ids=["a tensor", "nothing", "numbers", "garbage", "another network"])
def test_files_that_are_no_state_dict(tmp_path, digits, content, message):
    out = tmp_path / "out.safetensors"
    content(tmp_path / "odd.pt")
    with pytest.raises(ql.UserError, match=message):
        checkpoints.import_checkpoint(tmp_path / "odd.pt", "resnet20", out, digits)
    assert not out.exists()


def itself(state):
    state["model"] = state
    return state


@pytest.mark.parametrize("change, message", [
    (lambda s: dict(enumerate(s.values())), "holds no state dict"),
    (lambda s: s | {"fc.weight": torch.tensor(1.0)}, r"has the weight \[\], not \[classes"),
    (lambda s: s | {"fc.weight": torch.zeros(1, 64).expand(10**9, 64)}, "not .classes"),
    (lambda s: {k: v.to("meta") for k, v in s.items()}, "conv1.weight is a meta"),
    (lambda s: s | {"conv1.weight": s["conv1.weight"].to_sparse()}, "meta, sparse or quantized"),
    (lambda s: s | {"conv1.weight": s["conv1.weight"].to(torch.complex64)}, "is torch.complex64"),
    (lambda s: s | {"conv1.weight": s["conv1.weight"].long()}, "is torch.int64, not torch.float32"),
    (lambda s: s | {"fc.bias": torch.full((10,), math.nan)}, "fc.bias holds values that are not"),
    (lambda s: s | {"\x1b[2J": torch.zeros(1)}, "does not fit resnet20"),
    (itself, "holds no state dict"),
], ids=["numbers for names", "scalar head", "huge head", "meta", "sparse", "complex", "integers",
        "NaN", "control characters", "itself"])
def test_states_that_would_be_another_network(tmp_path, digits, resnet20, change, message):
    with pytest.raises(ql.UserError, match=message) as error:
        import_state(tmp_path / "mine.pt", change(dict(resnet20.state_dict())), digits)
    assert str(error.value).isprintable() and not (tmp_path / "mine.safetensors").exists()


def test_a_device_is_no_state_dict(tmp_path, digits):
    os.mkfifo(tmp_path / "fifo.pt")
    for file in (tmp_path / "fifo.pt", tmp_path):
        with pytest.raises(ql.UserError, match="folder or a device"):
            checkpoints.import_checkpoint(file, "resnet20", tmp_path / "out.safetensors", digits)


# ---- The committed checkpoints -------------------------------------------------------------------


def test_every_committed_checkpoint_matches_its_card():
    found = sorted((CHECKOUT / "checkpoint").glob("*.safetensors"))
    committed = {"resnet20-digits", "resnet20-cifar10-jpeg", "resnet50-cifar10-jpeg"}
    assert committed <= {file.stem for file in found}
    for file in found:
        card = ql.load_card(file)
        own = f"{card.architecture}-{card.trained_on}"
        if "weight_bits" in card.recipe:  # quantized
            bits = card.recipe["weight_bits"], card.recipe["act_bits"]
            assert file.stem == "{}-w{}a{}".format(own, *bits)
            assert (ql.load_quantized(file).config.weight_bits, len(card.history)) == (bits[0], 0)
            continue
        assert file.stem == own
        assert len(card.history) == card.recipe["epochs"]
        ql.load_model(card.architecture, file)


@pytest.mark.parametrize(("bits", "size"), [(2, 110_000), (4, 180_000)])
def test_a_committed_network_of_few_bits_is_as_good_as_its_card_says(bits, size, jpeg):
    """By its file alone; on 300 test images, of which 2.2 points are one standard deviation."""
    path = CHECKOUT / "checkpoint" / f"resnet20-cifar10-jpeg-w{bits}a{bits}.safetensors"
    card, network = ql.load_card(path), ql.load_quantized(path)
    codes = [network.codes(name) for name in network.layers]
    assert all(c.min() >= 0 and c.max() < 2**bits for c in codes)
    assert path.stat().st_size < size
    assert abs(ql.evaluate(network, jpeg.test, limit=300).top1 - card.test_top1) < 5


@pytest.fixture(scope="module")
def resnet50():
    return ql.load_model("resnet50", RESNET50)


def test_the_committed_resnet50_is_what_its_card_says(resnet50):
    card = ql.load_card(RESNET50)
    assert files.sha256(RESNET50) == card.sha256
    assert card.n_test == 10_000 and 90 < card.test_top1 < 100 and 90 < card.heldout_top1 < 100
    parameters = list(resnet50.parameters())
    assert sum(p.numel() for p in parameters) == 23_520_842
    assert not resnet50.training and all(p.dtype == torch.float32 for p in parameters)


def test_the_committed_resnet50_is_as_good_as_its_card_says(resnet50, jpeg):
    """On 300 test images, whose accuracy is 1.7 points from that of all, one standard deviation."""
    card = ql.load_card(RESNET50)
    assert card.data_fingerprint == jpeg.fingerprint
    assert abs(ql.evaluate(resnet50, jpeg.test, limit=300).top1 - card.test_top1) < 4


def test_committed_digits_accuracy_is_what_the_card_says(digits, resnet20):
    card = ql.load_card(CHECKOUT / "checkpoint" / "resnet20-digits.safetensors")
    assert card.data_fingerprint == digits.fingerprint
    assert ql.evaluate(resnet20, digits.test).top1 == pytest.approx(card.test_top1, abs=0.5)


def test_committed_jpeg_accuracy_and_its_eight_bits(jpeg):
    """On 2,000 test images: about what the card says, and 8 bits by hand lose next to nothing."""
    model, card = ql.load_trained("resnet20", jpeg)
    assert card.data_fingerprint == jpeg.fingerprint and JPEG_ARCHIVE.is_file()
    baseline = ql.evaluate(model, jpeg.test, limit=2000)
    assert abs(baseline.top1 - card.test_top1) < 3
    stats = ql.collect(model, jpeg.calibration(256))
    eight = ql.evaluate(ql.quantize(model, stats), jpeg.test, limit=2000)
    assert ql.paired_drop(baseline.correct, eight.correct)[0] < 1
    four = ql.evaluate(ql.quantize(model, stats, ql.QuantConfig(4, 4)), jpeg.test, limit=2000)
    assert ql.paired_drop(baseline.correct, four.correct)[0] < 8


def test_a_checkpoint_is_found_by_name_and_for_the_same_classes_only(digits, jpeg):
    assert checkpoints.find_checkpoint("resnet20", digits).stem == "resnet20-digits"
    other = dataclasses.replace(jpeg, name="cifar100", classes=tuple(str(i) for i in range(100)))
    assert checkpoints.find_checkpoint("resnet20", other) is None
    same = dataclasses.replace(jpeg, name="cifar10")
    assert checkpoints.find_checkpoint("resnet20", same).stem == "resnet20-cifar10-jpeg"
