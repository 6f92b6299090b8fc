"""Train a network: one-cycle SGD in phases of growing image size, resumable at any step.

    train(TrainConfig(model="resnet20", epochs=24), data, "checkpoint/resnet20-….safetensors")

Augmentation works on whole batches in memory; bfloat16 where it is native. Epoch e draws its shuffle
and its augmentation from the seed (seed, e), and the state of that generator is part of what is saved,
so that a resumed run continues exactly as an uninterrupted one.
"""

import contextlib
import dataclasses
import json
import pathlib
import time

import safetensors
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from quantlab.evaluate import evaluate, limited
from quantlab.networks import architectures, checkpoints
from quantlab.networks.recipe import RECIPES, TrainConfig
from quantlab.system.errors import UserError
from quantlab.system.files import save_tensors
from quantlab.system.machine import device, has_bf16, seed_everything

SAVE_EVERY = 60  # seconds between two saves of an unfinished run: what a kill may cost
HALF_ABOVE = 20_000_000  # bytes of float32 weights from which a checkpoint is stored in half precision


def default_config(model, data, recipe=None, **changes):
    """The recipe for a network on a data set; digits are few and must not be mirrored.

    recipe: a key of RECIPES; None: the one for this network and machine. UserError for unknown ones.
    """
    if recipe is not None and recipe not in RECIPES:
        raise UserError(f"recipe {recipe!r} is unknown; use one of: {', '.join(RECIPES)}")
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


# ---- The run --------------------------------------------------------------------------------------


def train(
    config, data, out, *, start_from=None, restart=False, save_every=SAVE_EVERY, verbose=True
):
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
    last_save = time.perf_counter()
    for _ in run.steps(verbose):
        if time.perf_counter() - last_save >= save_every:
            run.save(state)
            last_save = time.perf_counter()
    run.save(state)
    card = _finish(run, out)
    state.unlink(missing_ok=True)
    return run.average.eval(), card


def _finish(run, out):
    """Write the checkpoint, in half precision where it is large, and the accuracy of what was written."""
    large = sum(4 * p.numel() for p in run.average.parameters()) > HALF_ABOVE
    half = large and checkpoints.round_to_half(run.average)
    return checkpoints.save_checkpoint(
        run.average,
        out,
        run.data,
        architecture=run.config.model,
        result=evaluate(run.average, run.data.test),
        heldout=evaluate(run.average, run.data.heldout),
        recipe=run.recipe(),
        history=run.history,
        half=half,
    )


def _check_sizes(model, config, data):
    """One image of every phase's size through the network, before hours are spent on it."""
    shape = tuple(data.train.images[torch.arange(1)].shape[-2:])
    for size in dict.fromkeys(config.sizes()):
        height, width = (size, size) if size else shape
        try:
            with torch.inference_mode():
                model.eval()(torch.zeros(1, 3, height, width, device=device()))
        except RuntimeError as error:
            reason = str(error).splitlines()[0][:120]
            raise UserError(
                f"{config.model} cannot take images of {width}x{height} pixels ({reason}); "
                "choose a larger size in the phases"
            ) from None


class _Run:
    """An unfinished training: network, momentum, and how far it has come (epoch, step in it)."""

    def __init__(self, config, data, start_from=None):
        self.config, self.data = config, data
        seed_everything(config.seed)
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
        self.history = []
        self.step = 0  # within the epoch
        self.seconds = 0.0  # of the epoch, without those spent before a kill and not saved
        self.generator = torch.Generator()
        self.loss_sum = torch.zeros((), device=device())
        self.correct = torch.zeros((), device=device(), dtype=torch.int64)
        self.steps_per_epoch = len(data.train) // config.batch_size or 1

    def steps(self, verbose):
        """Train step by step to the end, yielding after each; the caller decides when to save."""
        config = self.config
        forward = _compiled(self.model)
        split = dataclasses.replace(self.data.train, images=_resident(self.data.train.images))
        sizes = config.sizes()
        progress = _Progress(self, sizes, verbose)
        while len(self.history) < config.epochs:
            epoch = len(self.history)
            order = self._begin(epoch, len(split))
            self.model.train()
            while self.step < self.steps_per_epoch:
                started = time.perf_counter()
                rows = slice(self.step * config.batch_size, (self.step + 1) * config.batch_size)
                self._learn(forward, split, order[rows], sizes[epoch])
                self.step += 1
                self.seconds += time.perf_counter() - started
                progress.update(self)
                yield
            self._end(epoch, sizes[epoch], verbose)
        progress.close()

    def _begin(self, epoch, n):
        """The epoch's order of images; its generator goes on to draw the augmentation."""
        generator = torch.Generator().manual_seed(self.config.seed * 100_003 + epoch)
        order = torch.randperm(n, generator=generator)
        if self.step == 0:
            self.generator = generator
            self.loss_sum.zero_()
            self.correct.zero_()
            self.seconds = 0.0
        return order

    def _learn(self, forward, split, index, size):
        """One step of SGD on the images at `index`."""
        config = self.config
        done = len(self.history) * self.steps_per_epoch + self.step
        _set_learning_rate(self.optimizer, config, done, config.epochs * self.steps_per_epoch)
        images = augment(
            split.images[index].to(device()),
            self.generator,
            config.crop,
            config.flip,
            config.cutout,
            split.mean,
        )
        images = resized(split.normalize(images), size)
        labels = split.labels[index].to(device())
        native = has_bf16()
        autocast = torch.autocast(device().type, torch.bfloat16) if native else contextlib.nullcontext()
        try:
            with autocast:
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

    def _end(self, epoch, size, verbose):
        """Record the epoch: mean loss, accuracy on augmented and on held-out images in percent."""
        started = time.perf_counter()
        config = self.config
        split = limited(self.data.heldout, config.heldout_images or None)

        def network(images):
            return self.average.eval()(resized(images, size))

        heldout = evaluate(network, split)
        seen = self.steps_per_epoch * min(config.batch_size, len(self.data.train))
        record = {"epoch": epoch + 1, **({"size": size} if size else {})}
        record["loss"] = self.loss_sum.item() / self.steps_per_epoch
        record["train_top1"] = 100 * self.correct.item() / seen
        record["heldout_top1"] = heldout.top1
        record["seconds"] = round(self.seconds + time.perf_counter() - started, 1)
        self.history.append(record)
        self.step = 0
        if verbose:
            at = f" at {size}x{size}" if size else ""
            tqdm.write(
                f"epoch {epoch + 1}/{config.epochs}{at}: loss {record['loss']:.3f}, "
                f"train {record['train_top1']:.2f} %, held out {heldout.top1:.2f} % "
                f"of {heldout.n:,}, {record['seconds']:.0f} s"
            )

    # -- Saved as one safetensors file: tensors, and settings and history as its metadata --

    def recipe(self):
        """What the card says: every setting, the arithmetic, and the cycle before this one."""
        arithmetic = "bfloat16 autocast, float32 weights" if has_bf16() else "float32"
        told = {**dataclasses.asdict(self.config), "arithmetic": arithmetic}
        return {**told, "start_from": self.first_cycle} if self.first_cycle else told

    def settings(self):
        """What a saved state must agree with to be resumed."""
        data = {"data": self.data.name, "data_fingerprint": self.data.fingerprint}
        start = {"start_from": self.first_cycle["sha256"]} if self.first_cycle else {}
        return json.loads(json.dumps({**dataclasses.asdict(self.config), **data, **start}))

    def save(self, path):
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        if self.average is not self.model:
            tensors |= {f"average.{k}": v for k, v in self.average.state_dict().items()}
        names = {p: n for n, p in self.model.named_parameters()}
        for parameter, state in self.optimizer.state.items():
            tensors[f"momentum.{names[parameter]}"] = state["momentum_buffer"]
        tensors["generator"] = self.generator.get_state()
        tensors["loss_sum"], tensors["correct"] = self.loss_sum, self.correct
        place = {"step": self.step, "seconds": self.seconds, "history": self.history}
        metadata = {"settings": json.dumps(self.settings()), "place": json.dumps(place)}
        save_tensors(path, tensors, metadata)

    def load(self, path, restart):
        """Go on where `path` left off; refuse the state of other settings, unless `restart`."""
        try:
            with safetensors.safe_open(path, "pt") as file:
                metadata = file.metadata()
                tensors = {key: file.get_tensor(key) for key in file.keys()}
            there, place = json.loads(metadata["settings"]), json.loads(metadata["place"])
            self.step, self.seconds = place["step"], place["seconds"]
        except (safetensors.SafetensorError, KeyError, TypeError, ValueError):
            if restart:
                return
            raise UserError(
                f"{path} is damaged; delete it to start again, or pass --restart"
            ) from None
        asked = self.settings()
        if there != asked:
            self.step = 0
            if restart:
                return
            differing = ", ".join(
                f"{k}: {there.get(k)} there, {asked.get(k)} asked for"
                for k in {**there, **asked}
                if there.get(k) != asked.get(k)
            )
            raise UserError(
                f"{path} was trained with other settings ({differing}); "
                "use those, or pass --restart to begin again"
            )
        self.history = place["history"]
        for prefix, module in (("model.", self.model), ("average.", self.average)):
            part = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            if part:
                module.load_state_dict(part)
        for name, parameter in self.model.named_parameters():
            buffer = tensors.get(f"momentum.{name}")
            if buffer is not None:
                like = torch.empty_like(parameter).copy_(buffer)
                self.optimizer.state[parameter]["momentum_buffer"] = like
        self.generator.set_state(tensors["generator"])
        self.loss_sum.copy_(tensors["loss_sum"])
        self.correct.copy_(tensors["correct"])


class _Progress:
    """One line: epoch, image size, step, images a second, time left over all phases."""

    def __init__(self, run, sizes, verbose):
        side = run.data.train.images[torch.arange(1)].shape[-1]
        self.cost = [(size or side) ** 2 for size in sizes]  # of a step, in pixels of an image
        self.sizes, self.done, self.started = sizes, 0, time.perf_counter()
        total = len(sizes) * run.steps_per_epoch
        first = len(run.history) * run.steps_per_epoch + run.step
        self.bar = tqdm(
            total=total, initial=first, unit=" steps", disable=not verbose, mininterval=1,
            bar_format="{desc}: step {n_fmt}/{total_fmt} |{bar:20}|{postfix}",
        )

    def update(self, run):
        if self.bar.disable:
            return
        epoch, per_epoch = len(run.history), run.steps_per_epoch
        self.done += self.cost[epoch]
        left = sum(self.cost[epoch:]) * per_epoch - run.step * self.cost[epoch]
        seconds = time.perf_counter() - self.started
        size = f" at {self.sizes[epoch]}x{self.sizes[epoch]}" if self.sizes[epoch] else ""
        self.bar.set_description_str(f"epoch {epoch + 1}/{len(self.sizes)}{size}", refresh=False)
        rate = run.config.batch_size * run.step / max(run.seconds, 1e-9)
        remaining = tqdm.format_interval(seconds * left / self.done)
        self.bar.set_postfix_str(f"{rate:,.0f} images/s, {remaining} left", refresh=False)
        self.bar.update(1)

    def close(self):
        self.bar.close()


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


# ---- One batch ------------------------------------------------------------------------------------


def resized(images, size):
    """float32 [B, C, H, W] -> [B, C, size, size], bilinear and antialiased; None: as they are."""
    if size is None or images.shape[-2:] == (size, size):
        return images
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True)


def augment(images, generator, crop, flip, cutout, mean):
    """Random crop of the zero-padded image, mirror and cutout, one draw per image; uint8 [B, 3, H, W] -> uint8 of the same shape."""
    batch, _, height, width = images.shape
    rows, columns = (torch.arange(side).expand(batch, side) for side in (height, width))
    if crop:
        shift = torch.randint(0, 2 * crop + 1, (2, batch, 1), generator=generator)
        rows, columns = rows + shift[0], columns + shift[1]
        images = F.pad(images, [crop] * 4)
    if flip:
        mirrored = torch.rand(batch, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    index = (torch.arange(batch)[:, None, None], rows[:, :, None], columns[:, None, :])
    images = images.permute(0, 2, 3, 1)[tuple(i.to(images.device) for i in index)].permute(0, 3, 1, 2)
    if cutout:
        centre = torch.rand(2, batch, 1, generator=generator) * torch.tensor([height, width]).view(2, 1, 1)
        inside = [(torch.arange(side) - c).abs() < cutout / 2 for side, c in zip((height, width), centre)]
        hole = (inside[0][:, :, None] & inside[1][:, None, :]).unsqueeze(1).to(images.device)
        fill = (torch.tensor(mean, device=images.device) * 255).to(torch.uint8).view(1, 3, 1, 1)
        images = torch.where(hole, fill, images)
    return images


def _optimizer(model, config):
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum, nesterov=True)


def _set_learning_rate(optimizer, config, step, total):
    """One cycle: linear up over the first `warmup` share of the steps, linear down to zero over the rest."""
    position = (step + 1) / (total + 1)
    factor = min(position / config.warmup, (1 - position) / (1 - config.warmup))
    for group in optimizer.param_groups:
        group["lr"] = config.learning_rate * factor


@torch.no_grad()
def _average(average, model, decay, step):
    """average <- decay * average + (1 - decay) * model, with a shorter memory in the first steps."""
    if average is model:
        return
    decay = min(decay, (step + 1) / (step + 10))
    for mean, value in zip(average.state_dict().values(), model.state_dict().values()):
        if mean.is_floating_point():
            mean.lerp_(value, 1 - decay)
        else:
            mean.copy_(value)


def _compiled(model):
    """torch.compile where it pays and works: on an accelerator with a compiler; the network itself elsewhere."""
    if device().type != "cuda":
        return model
    torch._dynamo.config.suppress_errors = True  # without a compiler the same network runs eagerly
    return torch.compile(model)


def _resident(images):
    """The training images as one tensor on the accelerator, where there is one and they are in memory; themselves otherwise."""
    if device().type == "cpu" or not isinstance(getattr(images, "store", images), torch.Tensor):
        return images
    return images[torch.arange(len(images))].to(device())
