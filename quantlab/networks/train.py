"""Train a network: one-cycle SGD in phases of growing image size, resumable at any step.

    train(TrainConfig(model="resnet20", epochs=24), data, "checkpoint/resnet20-….safetensors")

Augmentation works on whole batches in memory; bfloat16 where it is native. Epoch e draws shuffle
and augmentation from the seed (seed, e); the state of that generator is part of what is saved, so
that a resumed run continues exactly as an uninterrupted one.
"""

import contextlib
import dataclasses
import json
import pathlib
import time

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from quantlab.evaluate import evaluate
from quantlab.images.datasets import limited
from quantlab.networks import architectures, checkpoints
from quantlab.networks.augment import augment, resized
from quantlab.networks.recipe import RECIPES, TrainConfig
from quantlab.system.errors import UserError, check_name, checked
from quantlab.system.files import save_tensors
from quantlab.system.machine import device, has_bf16, keep_memory, seed_everything

HALF_ABOVE = 20_000_000  # bytes of float32 weights from which they are stored in half precision


def default_config(model, data, recipe=None, **changes):
    """The recipe for a network on a data set; digits are few and must not be mirrored.

    recipe: a key of RECIPES; None: the one for this network and machine. UserError for others.
    """
    if recipe is not None:
        check_name("recipe", recipe, RECIPES)
    if data.smoke and recipe is None:
        settings = {"epochs": 20, "batch_size": 64, "learning_rate": 0.1, "flip": False, "crop": 2}
    elif recipe is None and model != "resnet50":
        settings = {"epochs": 40}
    else:
        machine = "accelerator" if device().type == "cuda" else "two-cores"
        settings = RECIPES[recipe or machine]
    if "epochs" in changes and "phases" not in changes:
        settings = {k: v for k, v in settings.items() if k != "phases"}
    return TrainConfig(**{**settings, "model": model, **changes})


def is_complete(out):
    """True where a finished checkpoint lies and no unfinished run would go on."""
    out = pathlib.Path(out)
    return checkpoints.card_path(out).exists() and out.exists() and not state_path(out).exists()


def state_path(out):
    """Where the state of an unfinished run is kept."""
    return pathlib.Path(out).with_suffix(".training.safetensors")


# ---- The run: its clock, its files and its line on the screen ------------------------------------


@checked
def train(config, data, out, *, start_from=None, restart=False, save_every=60, verbose=True):
    """Train on data.train, follow data.heldout, test once on data.test; return (model, card).

    Writes `out` and its card. A kill loses at most `save_every` seconds: the state is kept in
    OUT.training.safetensors until the run is complete, and a state of the same settings is resumed.
    start_from: a checkpoint whose weights begin the run instead of random ones; the card then tells
    both. Raises UserError when a state belongs to other settings (restart: it is dropped), when the
    network cannot take a phase's image size, or when memory runs out.
    """
    out = pathlib.Path(out)
    if out.suffix != ".safetensors":
        raise UserError(f"{out}: a checkpoint's name ends in .safetensors")
    run = _Run(config, data, start_from)
    _check_sizes(run.model, config, data)
    state = state_path(out)
    if state.exists():
        run.load(state, restart)
    progress = _Progress(run, verbose)
    started = last_save = time.perf_counter()
    for record in run.steps():
        run.seconds += time.perf_counter() - started
        if record is not None:
            record["seconds"] = round(run.seconds, 1)
            run.seconds = 0.0
        progress.show(run, record)
        if time.perf_counter() - last_save >= save_every:
            run.save(state)
            last_save = time.perf_counter()
        started = time.perf_counter()
    progress.bar.close()
    run.save(state)
    card = _finish(run, out)
    state.unlink(missing_ok=True)
    return run.average.eval(), card


def _check_sizes(model, config, data):
    """One image of every phase's size through the network, before hours are spent on it."""
    own = data.train.images[torch.arange(1)].shape[-2:]
    for size in dict.fromkeys(config.sizes()):
        height, width = (size, size) if size else own
        try:
            with torch.inference_mode():
                model.eval()(torch.zeros(1, 3, height, width, device=device()))
        except RuntimeError as error:
            reason = str(error).splitlines()[0][:120]
            raise UserError(
                f"{config.model} cannot take images of {width}x{height} pixels ({reason}); "
                "choose a larger size in the phases"
            ) from None


def _finish(run, out):
    """Write the checkpoint, in half precision where it is large, with the accuracy of just that."""
    large = sum(4 * p.numel() for p in run.average.parameters()) > HALF_ABOVE
    half = large and checkpoints.round_to_half(run.average)
    return checkpoints.save_checkpoint(
        run.average, out, run.data, architecture=run.config.model, recipe=run.recipe(),
        history=run.history, half=half, result=evaluate(run.average, run.data.test),
        heldout=evaluate(run.average, run.data.heldout),
    )


class _Progress:
    """One line: epoch, image size, step, images a second, time left over all phases (steps count by
    the pixels of an image, so that it holds for phases of other sizes too).
    """

    def __init__(self, run, verbose):
        own = run.data.train.images[torch.arange(1)].shape[-1]
        self.sizes = run.config.sizes()
        self.cost = [(size or own) ** 2 for size in self.sizes for _ in range(run.steps_per_epoch)]
        self.bar = tqdm(
            total=sum(self.cost), initial=sum(self.cost[: run.steps_done]), smoothing=0,
            bar_format="{desc} |{bar:20}|{postfix}, {remaining} left", mininterval=1,
            disable=not verbose,
        )

    def show(self, run, record):
        """One step more, or one line of what the epoch that has just ended came to."""
        if self.bar.disable:
            return
        epoch = len(run.history) - (record is not None)
        size = self.sizes[epoch]
        place = f"epoch {epoch + 1}/{len(self.sizes)}" + (f" at {size}x{size}" if size else "")
        if record is not None:
            followed = len(limited(run.data.heldout, run.config.heldout_images or None))
            tqdm.write(
                f"{place}: loss {record['loss']:.3f}, train {record['train_top1']:.2f} %, held out "
                f"{record['heldout_top1']:.2f} % of {followed:,}, {record['seconds']:.0f} s"
            )
            return
        rate = run.config.batch_size * run.step / max(run.seconds, 1e-9)
        steps = f"{place}: step {run.steps_done}/{len(self.cost)}"
        self.bar.set_description_str(steps, refresh=False)
        self.bar.set_postfix_str(f"{rate:,.0f} images/s", refresh=False)
        self.bar.update(self.cost[run.steps_done - 1])


# ---- The arithmetic ------------------------------------------------------------------------------


class _Run:
    """An unfinished training: network, momentum, and how far it has come (epoch, step in it)."""

    def __init__(self, config, data, start_from=None):
        self.config, self.data = config, data
        seed_everything(config.seed)
        keep_memory()
        self.model = architectures.build(config.model, len(data.classes))
        if config.zero_last_gamma:
            architectures.zero_last_gamma(self.model)
        self.first_cycle = _start(self.model, config, data, start_from)
        self.model = self.model.to(device(), memory_format=torch.channels_last)
        self.average = self.model
        if config.averaging:
            self.average = architectures.build(config.model, len(data.classes)).to(device())
            self.average.load_state_dict(self.model.state_dict())
        self.optimizer = _optimizer(self.model, config)
        self.history = []  # one record an epoch
        self.step = 0  # within the epoch
        self.seconds = 0.0  # of the epoch, without those before a kill that were not saved
        self.generator = torch.Generator()
        self.loss_sum = torch.zeros((), device=device())
        self.correct = torch.zeros((), device=device(), dtype=torch.int64)
        self.steps_per_epoch = len(data.train) // config.batch_size or 1

    @property
    def steps_done(self):
        return len(self.history) * self.steps_per_epoch + self.step

    def steps(self):
        """Train to the end; yields None after every step and, after an epoch's last, its record."""
        forward = _compiled(self.model)
        split = dataclasses.replace(self.data.train, images=_resident(self.data.train.images))
        batch = self.config.batch_size
        for epoch, size in list(enumerate(self.config.sizes()))[len(self.history) :]:
            order = self._begin(epoch, len(split))
            while self.step < self.steps_per_epoch:
                index = order[self.step * batch : (self.step + 1) * batch]
                self._learn(forward, split, index, size)
                self.step += 1
                yield None
            yield self._end(size)

    def _begin(self, epoch, n):
        """The epoch's order of images; its generator goes on to draw the augmentation."""
        generator = torch.Generator().manual_seed(self.config.seed * 100_003 + epoch)
        order = torch.randperm(n, generator=generator)
        if self.step == 0:  # else the generator goes on as it was saved within the epoch
            self.generator = generator
            self.loss_sum.zero_()
            self.correct.zero_()
        self.model.train()
        return order

    def _learn(self, forward, split, index, size):
        """One step of SGD on the images at `index`."""
        config = self.config
        done = self.steps_done
        _set_learning_rate(self.optimizer, config, done, config.epochs * self.steps_per_epoch)
        changes = config.crop, config.flip, config.cutout, split.mean
        images = augment(split.images[index].to(device()), self.generator, *changes)
        images = resized(split.normalize(images), size)
        labels = split.labels[index].to(device())
        bf16 = torch.autocast(device().type, torch.bfloat16)
        try:
            with bf16 if has_bf16() else contextlib.nullcontext():
                logits = forward(images.contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(logits.float(), labels, label_smoothing=config.label_smoothing)
            self.optimizer.zero_grad()
            loss.backward()
        except torch.OutOfMemoryError:
            raise UserError(
                f"batch_size={config.batch_size} does not fit into the device's memory; "
                f"try {max(config.batch_size // 2, 1)}"
            ) from None
        self.optimizer.step()
        _average(self.average, self.model, config.averaging, done)
        self.loss_sum += loss.detach()
        self.correct += (logits.detach().argmax(1) == labels).sum()

    def _end(self, size):
        """Record the epoch: mean loss, accuracy on augmented and on held-out images in percent."""
        config = self.config
        heldout = limited(self.data.heldout, config.heldout_images or None)

        def network(images):
            return self.average.eval()(resized(images, size))

        seen = self.steps_per_epoch * min(config.batch_size, len(self.data.train))
        record = {"epoch": len(self.history) + 1, **({"size": size} if size else {})}
        record["loss"] = self.loss_sum.item() / self.steps_per_epoch
        record["train_top1"] = 100 * self.correct.item() / seen
        record["heldout_top1"] = evaluate(network, heldout).top1
        self.history.append(record)
        self.step = 0
        return record

    # -- Saved as one safetensors file: tensors, and settings and history as its metadata --

    def recipe(self):
        """What the card says: every setting, the arithmetic, and the cycle before this one."""
        arithmetic = "bfloat16 autocast, float32 weights" if has_bf16() else "float32"
        start = {"start_from": self.first_cycle} if self.first_cycle else {}
        return {**dataclasses.asdict(self.config), "arithmetic": arithmetic, **start}

    def settings(self):
        """What a saved state must agree with to be resumed."""
        data = {"data": self.data.name, "data_fingerprint": self.data.fingerprint}
        start = {"start_from": self.first_cycle["sha256"]} if self.first_cycle else {}
        return json.loads(json.dumps({**dataclasses.asdict(self.config), **data, **start}))

    def tensors(self):
        """What a state holds that is there from the first step on, by name; not copied."""
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        if self.average is not self.model:
            tensors |= {f"average.{k}": v for k, v in self.average.state_dict().items()}
        return {**tensors, "loss_sum": self.loss_sum, "correct": self.correct}

    def save(self, path):
        tensors = {**self.tensors(), "generator": self.generator.get_state()}
        for name, parameter in self.model.named_parameters():
            if parameter in self.optimizer.state:
                tensors[f"momentum.{name}"] = self.optimizer.state[parameter]["momentum_buffer"]
        place = {"step": self.step, "seconds": self.seconds, "history": self.history}
        metadata = {"settings": json.dumps(self.settings()), "place": json.dumps(place)}
        save_tensors(path, tensors, metadata)

    def load(self, path, restart):
        """Go on where `path` left off. Raises UserError when it is damaged or of other settings;
        with `restart` the run begins anew instead.
        """
        from quantlab.networks.train_state import read

        try:
            place, tensors = read(self, path)
        except UserError:
            if restart:
                return
            raise
        self.step, self.seconds, self.history = place["step"], place["seconds"], place["history"]
        for name, tensor in self.tensors().items():
            tensor.copy_(tensors[name])
        for name, parameter in self.model.named_parameters():
            buffer = tensors.get(f"momentum.{name}")
            if buffer is not None:
                like = torch.empty_like(parameter).copy_(buffer)  # channels last, on the device
                self.optimizer.state[parameter]["momentum_buffer"] = like
        self.generator.set_state(tensors["generator"])


def _start(model, config, data, start_from):
    """Load the weights to begin with, if any; return what the card tells of them, or None."""
    if start_from is None:
        return None
    card = checkpoints.load_card(start_from)
    if card.num_outputs != len(data.classes):
        raise UserError(
            f"{start_from} has {card.num_outputs} outputs but {data.name} has "
            f"{len(data.classes)} classes; start from a network of as many"
        )
    model.load_state_dict(checkpoints.load_model(config.model, start_from).state_dict())
    facts = ("recipe", "history", "test_top1", "sha256", "source", "hardware")
    return {name: getattr(card, name) for name in facts}


def _optimizer(model, config):
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    options = dict(lr=config.learning_rate, momentum=config.momentum, nesterov=True)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain}]
    return torch.optim.SGD(groups, **options)


def _set_learning_rate(optimizer, config, step, total):
    """One cycle: linear up over the first `warmup` fraction of the steps, linear down to zero."""
    position = (step + 1) / (total + 1)
    factor = min(position / config.warmup, (1 - position) / (1 - config.warmup))
    for group in optimizer.param_groups:
        group["lr"] = config.learning_rate * factor


@torch.no_grad()
def _average(average, model, decay, step):
    """average <- decay * average + (1 - decay) * model; a shorter memory in the first steps."""
    if average is model:
        return
    decay = min(decay, (step + 1) / (step + 10))
    for mean, value in zip(average.state_dict().values(), model.state_dict().values()):
        if mean.is_floating_point():
            mean.lerp_(value, 1 - decay)
        else:
            mean.copy_(value)


def _compiled(model):
    """torch.compile where it pays, on an accelerator; without a compiler this runs eagerly."""
    if device().type != "cuda":
        return model
    compiled = torch.compile(model)

    def forward(images):
        with torch._dynamo.config.patch(suppress_errors=True):
            return compiled(images)

    return forward


def _resident(images):
    """Training images that are in memory, as one tensor on the accelerator; else themselves."""
    if device().type == "cpu" or not isinstance(getattr(images, "store", images), torch.Tensor):
        return images
    return images[torch.arange(len(images))].to(device())
