"""Training: it learns, a killed run continues exactly, and the wrong state is refused."""

import copy
import dataclasses
import functools
import importlib
import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import CHECKOUT, fuzz, mutate_fields, mutate_tensors
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import quantlab as ql
from quantlab.__main__ import main
from quantlab.images.datasets import Dataset, Split
from quantlab.networks import checkpoints
from quantlab.networks.augment import augment
from quantlab.networks.recipe import parse_phases
from quantlab.networks.train import default_config

module = importlib.import_module("quantlab.networks.train")  # ql.train is the function
SETTINGS = ql.TrainConfig(
    epochs=3, batch_size=32, learning_rate=0.05, flip=False, crop=1, averaging=0.9
)


@pytest.fixture(autouse=True)
def _one_thread():
    """Steps this small take twenty times as long when threads wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def few():
    """Two kinds of noise that are easy to tell apart, 8x8."""

    def part(n, seed):
        generator = torch.Generator().manual_seed(seed)
        labels = torch.arange(n) % 2
        noise = torch.randint(0, 256, (n, 3, 8, 8), dtype=torch.uint8, generator=generator)
        images = noise // 2 + 120 * labels.to(torch.uint8).view(-1, 1, 1, 1)
        return Split(images, labels, (0.5,) * 3, (0.25,) * 3)

    return Dataset("noise", ("dark", "light"), part(128, 0), part(32, 1), part(64, 2), "f" * 64)


def test_it_learns_and_writes_its_card(few, tmp_path):
    model, card = ql.train(SETTINGS, few, tmp_path / "net.safetensors", verbose=False)
    assert card.test_top1 > 90 and [h["epoch"] for h in card.history] == [1, 2, 3]
    assert dataclasses.asdict(SETTINGS).items() <= card.recipe.items()
    assert card.trained_on == "noise" and card.data_fingerprint == few.fingerprint
    assert all(h["seconds"] > 0 for h in card.history)
    assert not list(tmp_path.glob("*.training.*")), "the state of a complete run is removed"
    loaded = ql.load_model("resnet20", tmp_path / "net.safetensors")
    assert torch.equal(loaded.fc.weight, model.fc.weight)


def test_it_says_where_it_is_and_what_every_epoch_came_to(few, tmp_path, capsys):
    config = dataclasses.replace(SETTINGS, phases=((1, 4), (1, 8)), heldout_images=10)
    ql.train(config, few, tmp_path / "net.safetensors")
    said, shown = capsys.readouterr()
    first, second = said.splitlines()
    assert first.startswith("epoch 1/2 at 4x4: loss ") and " % of 10, " in first
    assert second.startswith("epoch 2/2 at 8x8: loss ")
    assert "step 8/8" in shown and "images/s" in shown and "00:00 left" in shown


class Stopped(Exception):
    """What stands for a kill: nothing after it runs."""


def train_with_stops(monkeypatch, config, data, out, stops, **options):
    """Train, killed after each number of steps in `stops` (counted anew after every start)."""
    original = module._Run.steps
    for stop in stops:

        def until(run, stop=stop):
            count = 0
            for record in original(run):
                yield record
                count += record is None
                if count == stop:
                    raise Stopped

        with monkeypatch.context() as patch, pytest.raises(Stopped):
            patch.setattr(module._Run, "steps", until)
            ql.train(config, data, out, verbose=False, **options)
    return ql.train(config, data, out, verbose=False, **options)


@pytest.mark.parametrize("averaging", [0.0, 0.9])
@pytest.mark.parametrize(
    "phases, stops",
    [((), [2]), ((), [1, 4, 2]), (((1, 4), (1, 6), (1, 8)), [3, 3, 1])],
    ids=["in an epoch", "three times", "across phases"],
)
def test_an_interrupted_run_continues_exactly(few, tmp_path, monkeypatch, averaging, phases, stops):
    config = dataclasses.replace(SETTINGS, averaging=averaging, phases=phases, cutout=2)
    straight, told = ql.train(config, few, tmp_path / "straight.safetensors", verbose=False)
    resumed, card = train_with_stops(
        monkeypatch, config, few, tmp_path / "resumed.safetensors", stops, save_every=0
    )
    pairs = zip(straight.state_dict().values(), resumed.state_dict().values())
    assert all(torch.equal(a, b) for a, b in pairs)
    assert [h["loss"] for h in card.history] == [h["loss"] for h in told.history]
    assert [h["train_top1"] for h in card.history] == [h["train_top1"] for h in told.history]


def test_what_was_not_saved_is_trained_again_to_the_same_weights(few, tmp_path, monkeypatch):
    straight, _ = ql.train(SETTINGS, few, tmp_path / "straight.safetensors", verbose=False)
    resumed, _ = train_with_stops(
        monkeypatch, SETTINGS, few, tmp_path / "resumed.safetensors", [5], save_every=3600
    )
    assert torch.equal(straight.fc.weight, resumed.fc.weight)


def test_phases_resize_the_augmented_image_under_one_learning_rate_line(few, tmp_path, monkeypatch):
    seen = []
    rates = []
    resized = module.resized
    set_rate = module._set_learning_rate

    def watch(images, size):
        seen.append(size)
        return resized(images, size)

    def note(optimizer, config, step, total):
        set_rate(optimizer, config, step, total)
        rates.append(optimizer.param_groups[0]["lr"])

    monkeypatch.setattr(module, "resized", watch)
    monkeypatch.setattr(module, "_set_learning_rate", note)
    config = dataclasses.replace(SETTINGS, phases=((1, 4), (2, 8)), heldout_images=10)
    _, card = ql.train(config, few, tmp_path / "net.safetensors", verbose=False)
    assert config.epochs == 3 and [h["size"] for h in card.history] == [4, 8, 8]
    assert set(seen) == {4, 8} and len(rates) == 12
    peak = rates.index(max(rates))
    assert all(a < b for a, b in zip(rates[:peak], rates[1 : peak + 1]))
    falls = [a - b for a, b in zip(rates[peak:], rates[peak + 1 :])]
    assert falls == pytest.approx([falls[0]] * len(falls)), "one line down over all phases"


def test_resizing_is_pillows_antialiased_bilinear(few):
    image = few.train.images[:1]
    ours = module.resized(image.float(), 5)
    pixels = Image.fromarray(image[0].permute(1, 2, 0).numpy())
    theirs = torch.from_numpy(np.array(pixels.resize((5, 5), Image.BILINEAR)))
    assert (ours[0].permute(1, 2, 0) - theirs).abs().max() <= 1, "Pillow rounds to bytes"


def test_the_two_cores_recipe_is_that_of_the_handed_network(few):
    config = default_config("resnet50", few, "two-cores")
    handed = dict(
        phases=((10, 16), (6, 24), (3, 32)), batch_size=128, learning_rate=0.1, warmup=0.15,
        momentum=0.9, weight_decay=5e-4, label_smoothing=0.1, crop=4, flip=True,
        zero_last_gamma=True, seed=0, cutout=0, averaging=0.0, heldout_images=1000,
    )
    assert {name: getattr(config, name) for name in handed} == handed and config.epochs == 19


def test_a_second_cycle_starts_from_a_checkpoint_and_tells_of_both(few, tmp_path):
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    ql.train(SETTINGS, few, first, verbose=False)
    weak = dataclasses.replace(SETTINGS, epochs=1, learning_rate=1e-6, averaging=0.0)
    model, card = ql.train(weak, few, second, start_from=first, verbose=False)
    start = ql.load_model("resnet20", first)
    assert (model.fc.weight - start.fc.weight).abs().max() < 1e-4
    assert card.recipe["start_from"]["sha256"] == checkpoints.load_card(first).sha256
    assert len(card.recipe["start_from"]["history"]) == 3
    with pytest.raises(ql.UserError, match="is a resnet20, not a resnet50"):
        config = dataclasses.replace(weak, model="resnet50")
        ql.train(config, few, tmp_path / "third.safetensors", start_from=first, verbose=False)


def test_a_large_network_is_stored_in_half_precision_and_its_card_tells_of_what_is_stored(
    few, tmp_path, monkeypatch
):
    monkeypatch.setattr(module, "HALF_ABOVE", 1000)
    out = tmp_path / "net.safetensors"
    ql.train(SETTINGS, few, out, verbose=False)
    stored = safetensors.torch.load_file(out)
    assert stored["fc.weight"].dtype == torch.float16
    loaded, card = ql.load_model("resnet20", out), checkpoints.load_card(out)
    assert loaded.fc.weight.dtype == torch.float32
    assert ql.evaluate(loaded, few.test).top1 == card.test_top1
    assert ql.evaluate(loaded, few.heldout).top1 == card.heldout_top1
    with torch.no_grad():
        loaded.bn1.running_var[0] = 1e5
    before = loaded.fc.weight.clone()
    assert not checkpoints.round_to_half(loaded) and torch.equal(before, loaded.fc.weight)


@pytest.mark.parametrize("text", ["", "3", "3@", "a@b", "1@2@3", "3@32;4@16"])
def test_a_schedule_that_cannot_be_read_is_refused(text):
    with pytest.raises(ql.UserError, match="write EPOCHS@SIZE"):
        parse_phases(text)


@pytest.mark.parametrize("phases", [((0, 8),), ((1, 0),), ((1, 8), (-1, 8)), ((1, 10**6),)])
def test_impossible_phases_are_refused(phases):
    with pytest.raises(ql.UserError, match="phase .*allowed are 1 to"):
        ql.TrainConfig(phases=phases)


def test_a_size_that_the_network_cannot_take_is_refused_before_anything_is_trained(
    few, tmp_path, monkeypatch
):
    def picky(name, num_classes=10):
        return torch.nn.Sequential(torch.nn.Conv2d(3, 2, 7), torch.nn.Flatten())

    monkeypatch.setattr(module.architectures, "build", picky)
    with pytest.raises(ql.UserError, match="cannot take images of 5x5 pixels.*larger size"):
        config = dataclasses.replace(SETTINGS, phases=((1, 8), (1, 5)), averaging=0.0)
        ql.train(config, few, tmp_path / "net.safetensors", verbose=False)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_while_saving_is_one_line_and_loses_nothing(few, tmp_path, monkeypatch):
    out = tmp_path / "net.safetensors"
    straight, _ = ql.train(SETTINGS, few, tmp_path / "straight.safetensors", verbose=False)
    saves = []

    def full(tensors, path, metadata):
        saves.append(path)
        if len(saves) > 3:
            raise OSError(28, "No space left on device")
        return save_file(tensors, path, metadata)

    save_file = safetensors.torch.save_file
    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", full)
        with pytest.raises(ql.UserError, match="No space left on device; free space"):
            ql.train(SETTINGS, few, out, save_every=0, verbose=False)
    assert [file.name for file in tmp_path.glob("net*")] == ["net.training.safetensors"]
    resumed, _ = ql.train(SETTINGS, few, out, verbose=False)
    assert torch.equal(straight.fc.weight, resumed.fc.weight)


def interrupted(*args, **kwargs):
    raise KeyboardInterrupt


def test_a_state_of_other_settings_is_refused_and_both_are_shown(few, tmp_path, monkeypatch):
    monkeypatch.setattr(module.checkpoints, "save_checkpoint", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ql.train(SETTINGS, few, tmp_path / "net.safetensors", verbose=False)
    other = dataclasses.replace(SETTINGS, epochs=5, seed=1)
    shown = "epochs: 3 there, 5 asked for, seed: 0 there, 1 asked for"
    with pytest.raises(ql.UserError, match=shown):
        ql.train(other, few, tmp_path / "net.safetensors", verbose=False)
    state = tmp_path / "net.training.safetensors"
    state.write_bytes(state.read_bytes()[:500])
    with pytest.raises(ql.UserError, match="damaged; delete it"):
        ql.train(SETTINGS, few, tmp_path / "net.safetensors", verbose=False)


@pytest.fixture(scope="module")
def begun(digits, tmp_path_factory):
    """A run within its first epoch, and what it saved."""
    path = tmp_path_factory.mktemp("begun") / "net.training.safetensors"
    run = module._Run(SETTINGS, digits)
    next(run.steps())
    run.history.append({"epoch": 1, "loss": 2.0, "train_top1": 10.0, "heldout_top1": 11.0})
    run.save(path)
    with safetensors.safe_open(path, "pt") as file:
        metadata = {name: json.loads(text) for name, text in file.metadata().items()}
    return run, path, safetensors.torch.load_file(path), metadata


@given(data=st.data())
@fuzz(60)
def test_a_state_goes_on_as_it_was_saved_or_is_refused_in_a_line(begun, data):
    run, path, tensors, metadata = *begun[:2], *map(copy.deepcopy, begun[2:])
    if data.draw(st.booleans()):
        mutate_fields(metadata, data)
    else:
        mutate_tensors(tensors, data)
    texts = {name: json.dumps(value) for name, value in metadata.items()}
    safetensors.torch.save_file(tensors, path, texts)
    try:
        run.load(path, restart=False)
    except ql.UserError as error:
        assert str(error).isprintable() and "--restart" in str(error)
        run.load(path, restart=True)
        return
    run.save(path)
    again = safetensors.torch.load_file(path)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[k].nan_to_num(), v.nan_to_num()) for k, v in tensors.items())
    with safetensors.safe_open(path, "pt") as file:
        kept = file.metadata()
    value = functools.partial(json.loads, parse_constant=str)  # NaN is equal to NaN here
    assert {k: value(v) for k, v in kept.items()} == {k: value(v) for k, v in texts.items()}


def test_a_killed_process_goes_on_from_its_last_save(workbook, tmp_path, capsys):
    out = tmp_path / "d.safetensors"
    state = module.state_path(out)
    arguments = ["train", "--data", "digits", "--out", str(out), "--phases", "1@8,1@16"]
    arguments += ["--batch-size", "256", "--save-every", "0", "--threads", "1"]
    command = [sys.executable, "-m", "quantlab", *arguments]
    silent = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    process = subprocess.Popen(command, cwd=CHECKOUT, **silent)
    while not state.exists():
        assert process.poll() is None, "it ended before it saved"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert state.exists() and not out.exists()
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "epoch 2/2 at 16x16" in said and not state.exists()
    assert main(arguments) == 1
    assert "is complete" in capsys.readouterr().err


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


@pytest.mark.parametrize("name, value", [
    ("epochs", 0), ("batch_size", 0), ("momentum", 0), ("warmup", 1), ("crop", -1), ("seed", -1),
    ("averaging", 1),
])
def test_impossible_settings_are_refused(name, value):
    with pytest.raises(ql.UserError, match=f"{name}=.*allowed are values from"):
        ql.TrainConfig(**{name: value})


def test_an_unknown_recipe_is_refused(few):
    with pytest.raises(ql.UserError, match="did you mean two-cores.*use one of: two-cores, "):
        default_config("resnet50", few, "two-core")


def test_a_compilers_failures_are_suppressed_while_it_runs_and_nowhere_else(monkeypatch):
    import torch._dynamo

    seen = []

    def network(images):
        seen.append(torch._dynamo.config.suppress_errors)
        return images

    monkeypatch.setattr(module, "device", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch, "compile", lambda model: model)
    assert module._compiled(network)(1) == 1
    assert seen == [True] and not torch._dynamo.config.suppress_errors


def test_an_interrupted_retraining_is_resumed_and_another_one_dropped(few, tmp_path, monkeypatch):
    out = tmp_path / "net.safetensors"
    config = dataclasses.replace(SETTINGS, epochs=1)
    ql.train(config, few, out, verbose=False)

    def interrupt_at_the_end(config):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(module.checkpoints, "save_checkpoint", interrupted)
            ql.train(config, few, out, verbose=False)

    interrupt_at_the_end(config)
    assert module.state_path(out).exists() and not module.is_complete(out)
    with monkeypatch.context() as patch:
        patch.setattr(module._Run, "_learn", lambda *a: pytest.fail("trained again what was done"))
        ql.train(config, few, out, verbose=False)
    assert module.is_complete(out)
    interrupt_at_the_end(config)
    _, card = ql.train(dataclasses.replace(config, seed=9), few, out, restart=True, verbose=False)
    assert card.recipe["seed"] == 9
    with pytest.raises(ql.UserError, match="ends in .safetensors"):
        ql.train(config, few, tmp_path / "net.pt", verbose=False)
