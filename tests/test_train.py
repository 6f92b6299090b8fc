"""Training: it learns, a killed run continues exactly, and the wrong state is refused."""

import dataclasses
import importlib
import os
import signal
import subprocess
import sys

import pytest
import torch
from conftest import CHECKOUT

import quantlab as ql
from quantlab.data import Dataset, Split
from quantlab.train import augment, default_config

module = importlib.import_module("quantlab.train")  # ql.train is the function
SETTINGS = ql.TrainConfig(epochs=3, batch_size=32, learning_rate=0.05, flip=False, crop=1, averaging=0.9)


@pytest.fixture
def few():
    """Two kinds of noise that are easy to tell apart, 8x8."""

    def part(n, seed):
        labels = torch.arange(n) % 2
        images = torch.randint(0, 256, (n, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
        return Split(images // 2 + 120 * labels.to(torch.uint8).view(-1, 1, 1, 1), labels, (0.5,) * 3, (0.25,) * 3)

    return Dataset("noise", ("dark", "light"), part(128, 0), part(32, 1), part(64, 2), "f" * 64)


def test_it_learns_and_writes_its_card(few, tmp_path):
    model, card = ql.train(SETTINGS, few, tmp_path / "net.safetensors", verbose=False)
    assert card.test_top1 > 90 and [h["epoch"] for h in card.history] == [1, 2, 3]
    assert card.recipe == dataclasses.asdict(SETTINGS) and card.trained_on == "noise" and card.data_fingerprint == few.fingerprint
    assert not list(tmp_path.glob("*.training.*")), "the state of a complete run is removed"
    assert torch.equal(ql.load_model("resnet20", tmp_path / "net.safetensors").fc.weight, model.fc.weight)


@pytest.mark.parametrize("averaging", [0.0, 0.9])
def test_an_interrupted_run_continues_exactly(few, tmp_path, monkeypatch, averaging):
    config = dataclasses.replace(SETTINGS, averaging=averaging)
    straight, _ = ql.train(config, few, tmp_path / "straight.safetensors", verbose=False)
    def stop_after_first_epoch(*args):
        if args[6] == 1:
            raise KeyboardInterrupt
        return original(*args)

    original = module._epoch
    with monkeypatch.context() as patch:
        patch.setattr(module, "_epoch", stop_after_first_epoch)
        with pytest.raises(KeyboardInterrupt):
            ql.train(config, few, tmp_path / "resumed.safetensors", verbose=False)
    assert (tmp_path / "resumed.training.safetensors").exists() and not (tmp_path / "resumed.safetensors").exists()
    resumed, card = ql.train(config, few, tmp_path / "resumed.safetensors", verbose=False)
    assert all(torch.equal(a, b) for a, b in zip(straight.state_dict().values(), resumed.state_dict().values()))
    assert len(card.history) == 3


def test_a_state_of_other_settings_is_refused_and_both_are_shown(few, tmp_path, monkeypatch):
    monkeypatch.setattr(module.models, "save_checkpoint", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        ql.train(SETTINGS, few, tmp_path / "net.safetensors", verbose=False)
    with pytest.raises(ql.UserError, match="epochs: 3 there, 5 asked for, seed: 0 there, 1 asked for"):
        ql.train(dataclasses.replace(SETTINGS, epochs=5, seed=1), few, tmp_path / "net.safetensors", verbose=False)
    state = tmp_path / "net.training.safetensors"
    state.write_bytes(state.read_bytes()[:500])
    with pytest.raises(ql.UserError, match="damaged; delete it"):
        ql.train(SETTINGS, few, tmp_path / "net.safetensors", verbose=False)


def test_a_killed_process_loses_at_most_one_epoch(workbook, tmp_path):
    arguments = [sys.executable, "-m", "quantlab", "train", "--data", "digits", "--epochs", "4", "--batch-size", "256", "--out", str(tmp_path / "d.safetensors")]
    environment = {**os.environ, "QUANTLAB_ROOT": str(workbook)}
    process = subprocess.Popen(arguments, cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
    for line in process.stdout:
        if line.startswith("epoch 2/4"):
            process.send_signal(signal.SIGKILL)
            break
    process.wait()
    assert not (tmp_path / "d.safetensors").exists()
    done = subprocess.run(arguments, cwd=CHECKOUT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    epochs = [line.split(":")[0] for line in done.stdout.splitlines() if line.startswith("epoch ")]
    assert epochs in (["epoch 3/4", "epoch 4/4"], ["epoch 4/4"])
    again = subprocess.run(arguments, cwd=CHECKOUT, capture_output=True, text=True, env=environment)
    assert again.returncode == 1 and "is complete" in again.stderr


def test_out_of_memory_says_which_batch_size_to_try(few, tmp_path, monkeypatch):
    def explode(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(module.F, "cross_entropy", explode)
    with pytest.raises(ql.UserError, match="batch_size=32 does not fit.*try 16"):
        ql.train(SETTINGS, few, tmp_path / "net.safetensors", verbose=False)


def test_augmentation_moves_pixels_and_nothing_else():
    images = torch.arange(1, 1 + 4 * 3 * 6 * 6).view(4, 3, 6, 6).remainder(255).to(torch.uint8) + 1
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(augment(images, generator, 0, False, 0, (0, 0, 0)), images)
    mirrored = augment(images, generator, 0, True, 0, (0, 0, 0))
    assert all(torch.equal(m, i) or torch.equal(m, i.flip(2)) for m, i in zip(mirrored, images))
    padded = torch.nn.functional.pad(images, [2] * 4)
    for image, whole in zip(augment(images, generator, 2, False, 0, (0, 0, 0)), padded):
        windows = [whole[:, r : r + 6, c : c + 6] for r in range(5) for c in range(5)]
        assert any(torch.equal(image, w) for w in windows)
    holes = augment(images, generator, 0, False, 3, (0, 0, 0)) == 0
    assert holes.any((1, 2, 3)).all() and not holes.all()


def test_digits_are_not_mirrored(digits, few):
    assert not default_config("resnet20", digits).flip and default_config("resnet20", few).flip


@pytest.mark.parametrize("wrong", [{"epochs": 0}, {"batch_size": 0}, {"momentum": 0}, {"warmup": 1}, {"crop": -1}, {"seed": -1}, {"averaging": 1}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ql.UserError, match=f"{next(iter(wrong))}=.*allowed are values from"):
        ql.TrainConfig(**wrong)


def test_an_interrupted_retraining_is_resumed_and_another_one_dropped(few, tmp_path, monkeypatch):
    out = tmp_path / "net.safetensors"
    config = dataclasses.replace(SETTINGS, epochs=1)
    ql.train(config, few, out, verbose=False)

    def interrupt_at_the_end(config):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(module.models, "save_checkpoint", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
            ql.train(config, few, out, verbose=False)

    interrupt_at_the_end(config)
    assert module.state_path(out).exists() and not module.is_complete(out)
    with monkeypatch.context() as patch:
        patch.setattr(module, "_epoch", lambda *a: pytest.fail("trained again what was done"))
        ql.train(config, few, out, verbose=False)
    assert module.is_complete(out)
    interrupt_at_the_end(config)
    _, card = ql.train(dataclasses.replace(config, seed=9), few, out, restart=True, verbose=False)
    assert card.recipe["seed"] == 9
    with pytest.raises(ql.UserError, match="ends in .safetensors"):
        ql.train(config, few, tmp_path / "net.pt", verbose=False)
