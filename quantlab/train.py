"""Train a network: one-cycle SGD, augmentation on whole batches in memory, bfloat16 where it is native, resumable at every epoch.

    train(TrainConfig(model="resnet20", epochs=24), data, "checkpoint/resnet20-….safetensors")

Epoch e draws its shuffle and its augmentation from seed (seed, e), so a resumed run continues exactly as an uninterrupted one.
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

from quantlab import models
from quantlab.evaluate import evaluate
from quantlab.runtime import UserError, device, has_bf16, save_tensors, seed_everything


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Everything that decides the weights, besides the data. Learning rates are per batch; smoothing and averaging are shares."""

    model: str = "resnet20"
    epochs: int = 24
    batch_size: int = 128
    learning_rate: float = 0.2  # peak of the one-cycle schedule
    warmup: float = 0.2  # share of the steps until the peak
    momentum: float = 0.9
    weight_decay: float = 5e-4  # not on biases and BatchNorm
    label_smoothing: float = 0.0
    crop: int = 4  # pixels of zero padding before the random crop
    flip: bool = True  # mirror half of the images
    cutout: int = 0  # side of a square set to the mean, in pixels
    averaging: float = 0.0  # decay per step of the exponential moving average of the weights; 0: none
    seed: int = 0

    def __post_init__(self):
        allowed = {
            "epochs": (1, 10**5), "batch_size": (1, 10**6), "learning_rate": (0, 100), "warmup": (0.001, 0.999), "momentum": (0.001, 0.9999),
            "weight_decay": (0, 1), "label_smoothing": (0, 0.99), "crop": (0, 64), "cutout": (0, 512), "averaging": (0, 0.999999),
            "seed": (0, 2**31),
        }  # fmt: skip
        for name, (low, high) in allowed.items():
            if not low <= getattr(self, name) <= high:
                raise UserError(f"{name}={getattr(self, name)}: allowed are values from {low} to {high}")


def default_config(model, data, **changes):
    """The recipe for a network on a data set; digits are few and must not be mirrored."""
    digits = {"epochs": 20, "batch_size": 64, "learning_rate": 0.1, "flip": False, "crop": 2}
    return TrainConfig(**{"model": model, **(digits if data.smoke else {"epochs": 40}), **changes})


def is_complete(out):
    """True where a finished checkpoint lies and no unfinished run would go on."""
    return models.card_path(out).exists() and pathlib.Path(out).exists() and not state_path(out).exists()


def state_path(out):
    """Where the state of an unfinished run is kept."""
    return pathlib.Path(out).with_suffix(".training.safetensors")


def train(config, data, out, *, restart=False, verbose=True):
    """Train `config.model` on data.train, follow data.heldout, test once on data.test; write `out` and its card; return (model, card).

    A kill loses at most one epoch: the state is kept in OUT.training.safetensors until the run is complete, and a state of the same
    settings is always resumed. Raises UserError when it belongs to other settings (restart: it is dropped), or when memory runs out.
    """
    out = pathlib.Path(out)
    if out.suffix != ".safetensors":
        raise UserError(f"{out}: a checkpoint's name ends in .safetensors")
    seed_everything(config.seed)
    model = models.build(config.model, len(data.classes)).to(device(), memory_format=torch.channels_last)
    average = models.build(config.model, len(data.classes)).to(device()) if config.averaging else model
    average.load_state_dict(model.state_dict())
    optimizer = _optimizer(model, config)
    state = state_path(out)
    history = _load_state(state, config, data, model, average, optimizer, restart) if state.exists() else []
    forward = _compiled(model)
    source = dataclasses.replace(data.train, images=_resident(data.train.images))
    for epoch in range(len(history), config.epochs):
        started = time.perf_counter()
        loss, top1 = _epoch(forward, model, average, optimizer, source, config, epoch, verbose)
        heldout = evaluate(average, data.heldout).top1
        seconds = time.perf_counter() - started
        history.append({"epoch": epoch + 1, "loss": loss, "train_top1": top1, "heldout_top1": heldout, "seconds": round(seconds, 1)})
        _save_state(state, config, data, model, average, optimizer, history)
        if verbose:
            print(f"epoch {epoch + 1}/{config.epochs}: loss {loss:.3f}, train {top1:.2f} %, held out {heldout:.2f} %, {seconds:.0f} s", flush=True)
    result = evaluate(average, data.test)
    card = models.save_checkpoint(
        average, out, data, architecture=config.model, result=result, recipe=dataclasses.asdict(config), history=history
    )
    state.unlink(missing_ok=True)
    return average.eval(), card


def _epoch(forward, model, average, optimizer, split, config, epoch, verbose):
    """One pass over the training images; return mean loss and accuracy in percent on the augmented images."""
    model.train()
    generator = torch.Generator().manual_seed(config.seed * 100_003 + epoch)
    order = torch.randperm(len(split), generator=generator)
    steps = len(order) // config.batch_size or 1
    autocast = torch.autocast(device().type, torch.bfloat16) if has_bf16() else contextlib.nullcontext()
    loss_sum = torch.zeros((), device=device())
    correct = torch.zeros((), device=device(), dtype=torch.int64)
    bar = tqdm(range(steps), desc=f"epoch {epoch + 1}/{config.epochs}", unit=" steps", leave=False, disable=not verbose, mininterval=1)
    for step in bar:
        _set_learning_rate(optimizer, config, epoch * steps + step, config.epochs * steps)
        index = order[step * config.batch_size : (step + 1) * config.batch_size]
        images = augment(split.images[index].to(device()), generator, config.crop, config.flip, config.cutout, split.mean)
        labels = split.labels[index].to(device())
        try:
            with autocast:
                logits = forward(split.normalize(images).contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(logits.float(), labels, label_smoothing=config.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
        except torch.OutOfMemoryError:
            raise UserError(f"batch_size={config.batch_size} does not fit into the device's memory; try {max(config.batch_size // 2, 1)}") from None
        optimizer.step()
        _average(average, model, config.averaging, epoch * steps + step)
        loss_sum += loss.detach()
        correct += (logits.detach().argmax(1) == labels).sum()
    return loss_sum.item() / steps, 100 * correct.item() / (steps * len(index))


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


# ---- Resuming: one safetensors file, weights and momentum as tensors, settings and history as its metadata ------------------


def _settings(config, data):
    return {**dataclasses.asdict(config), "data": data.name, "data_fingerprint": data.fingerprint}


def _save_state(path, config, data, model, average, optimizer, history):
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    if average is not model:
        tensors |= {f"average.{k}": v for k, v in average.state_dict().items()}
    names = {p: n for n, p in model.named_parameters()}
    tensors |= {f"momentum.{names[p]}": s["momentum_buffer"] for p, s in optimizer.state.items()}
    metadata = {"settings": json.dumps(_settings(config, data)), "history": json.dumps(history)}
    save_tensors(path, tensors, metadata)


def _load_state(path, config, data, model, average, optimizer, restart):
    """Restore everything in place and return the history; refuse the state of other settings, showing both, unless `restart`."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata()
            tensors = {key: file.get_tensor(key) for key in file.keys()}
        old, history = json.loads(metadata["settings"]), json.loads(metadata["history"])
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError):
        if restart:
            return []
        raise UserError(f"{path} is damaged; delete it to start again, or pass --restart") from None
    new = json.loads(json.dumps(_settings(config, data)))
    if old != new and restart:
        return []
    if old != new:
        differing = ", ".join(f"{k}: {old.get(k)} there, {new.get(k)} asked for" for k in {**old, **new} if old.get(k) != new.get(k))
        raise UserError(f"{path} was trained with other settings ({differing}); use those, or pass --restart to begin again")
    for prefix, module in (("model.", model), ("average.", average)):
        part = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        if part:
            module.load_state_dict(part)
    for name, parameter in model.named_parameters():
        optimizer.state[parameter]["momentum_buffer"] = tensors[f"momentum.{name}"].to(parameter.device)
    return history
