"""Networks and checkpoints: the counts of the papers, exact round trips, and everything that can be wrong with a file."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from conftest import CHECKOUT, JPEG_ARCHIVE

import quantlab as ql
from quantlab.evaluate import Evaluation
from quantlab.networks import checkpoints
from quantlab.system import files


def some_result(n=20):
    correct = torch.arange(n) % 4 > 0
    return Evaluation(75.0, n, torch.zeros(n, dtype=torch.int64), correct, 1.0, "a machine")


@pytest.fixture
def checkpoint(tmp_path, digits):
    torch.manual_seed(5)
    model = ql.load_model("resnet20")
    checkpoints.save_checkpoint(model, tmp_path / "net.safetensors", digits, architecture="resnet20", result=some_result())
    return model, tmp_path / "net.safetensors"


@pytest.mark.parametrize("name, parameters, convolutions", [("resnet20", 272_474, 21), ("resnet50", 23_520_842, 53)])
def test_architectures(name, parameters, convolutions):
    model = ql.load_model(name)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert sum(isinstance(m, torch.nn.Conv2d) for m in model.modules()) == convolutions
    with torch.no_grad():
        assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_round_trip_is_exact(checkpoint):
    model, path = checkpoint
    loaded = ql.load_model("resnet20", path)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values()))
    card = ql.load_card(path)
    assert (card.test_top1, card.n_test, card.trained_on, card.num_outputs) == (75.0, 20, "digits", 10)


def test_unknown_architecture_is_refused_with_a_suggestion():
    with pytest.raises(ql.UserError, match="did you mean resnet20.*use one of: resnet20, resnet50"):
        ql.load_model("resnet2O")


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
    with pytest.raises(ql.UserError, match="not a .safetensors file; bring it in with: python -m quantlab import-checkpoint"):
        ql.load_model("resnet20", tmp_path / "net.pt")


# ---- import-checkpoint ------------------------------------------------------------------------------------------------------------


def command(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "quantlab", *arguments], cwd=CHECKOUT, capture_output=True, text=True, env={**os.environ, **environment}
    )


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"net": {f"module.{k}": v for k, v in s.items()}}])
def test_import_of_a_state_dict(tmp_path, digits, resnet20, wrap):
    torch.save(wrap(resnet20.state_dict()), tmp_path / "mine.pt")
    _, card = checkpoints.import_checkpoint(tmp_path / "mine.pt", "resnet20", tmp_path / "mine.safetensors", digits)
    assert card.test_top1 > 95 and card.source == "imported from mine.pt"
    assert torch.equal(ql.load_model("resnet20", tmp_path / "mine.safetensors").fc.weight, resnet20.fc.weight)


def test_a_1000_way_head_is_kept_and_evaluated_over_the_first_ten(tmp_path, digits, resnet20):
    state = resnet20.state_dict()
    wide = {**state, "fc.weight": torch.cat([state["fc.weight"], torch.randn(990, 64)]), "fc.bias": torch.cat([state["fc.bias"], torch.full((990,), 100.0)])}
    torch.save(wide, tmp_path / "wide.pt")
    model, card = checkpoints.import_checkpoint(tmp_path / "wide.pt", "resnet20", tmp_path / "wide.safetensors", digits)
    assert card.num_outputs == 1000 and card.test_top1 == pytest.approx(ql.evaluate(resnet20, digits.test).top1)
    loaded, _ = ql.load_trained("resnet20", digits, tmp_path / "wide.safetensors")
    assert ql.evaluate(loaded, digits.test).top1 == card.test_top1


class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


def test_import_executes_nothing(tmp_path, workbook):
    torch.save({"fc.weight": Bomb()}, tmp_path / "bomb.pt")
    done = command("import-checkpoint", str(tmp_path / "bomb.pt"), "--data", "digits", QUANTLAB_ROOT=str(workbook))
    assert done.returncode == 1 and done.stderr.startswith("error:") and "without executing code" in done.stderr and done.stderr.count("\n") == 1
    assert not (CHECKOUT / "exploded").exists() and not list((workbook / "checkpoint").glob("*imported*"))


@pytest.mark.parametrize("content, message", [
    (lambda f: torch.save(torch.zeros(3), f), "holds no state dict"), (lambda f: f.write_bytes(b"garbage"), "cannot be read as a state dict"),
    (lambda f: torch.save({"conv.weight": torch.zeros(3)}, f), "does not fit resnet50"),
])
def test_files_that_are_no_state_dict(tmp_path, digits, content, message):
    content(tmp_path / "odd.pt")
    with pytest.raises(ql.UserError, match=message):
        checkpoints.import_checkpoint(tmp_path / "odd.pt", "resnet50", tmp_path / "out.safetensors", digits)
    assert not (tmp_path / "out.safetensors").exists()


# ---- The committed checkpoints ----------------------------------------------------------------------------------------------------


def test_every_committed_checkpoint_matches_its_card():
    files = sorted((CHECKOUT / "checkpoint").glob("*.safetensors"))
    assert {"resnet20-digits", "resnet20-cifar10-jpeg"} <= {f.stem for f in files}
    for file in files:
        card = ql.load_card(file)
        assert file.stem == f"{card.architecture}-{card.trained_on}" and len(card.history) == card.recipe["epochs"]
        ql.load_model(card.architecture, file)


def test_committed_digits_accuracy_is_what_the_card_says(digits, resnet20):
    card = ql.load_card(CHECKOUT / "checkpoint" / "resnet20-digits.safetensors")
    assert card.data_fingerprint == digits.fingerprint
    assert ql.evaluate(resnet20, digits.test).top1 == pytest.approx(card.test_top1, abs=0.5)


def test_committed_jpeg_accuracy_and_its_eight_bits(jpeg):
    """On 2,000 test images: the stored network is about as good as its card says, and 8 bits by hand lose next to nothing."""
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
    assert checkpoints.find_checkpoint("resnet20", dataclasses.replace(jpeg, name="cifar10")).stem == "resnet20-cifar10-jpeg"
