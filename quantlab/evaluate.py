"""Top-1 accuracy on a split, and how far two networks differ on the same images."""

import dataclasses
import functools
import math
import statistics
import time

import torch
from tqdm.auto import tqdm

from quantlab.system.errors import UserError
from quantlab.system.machine import device, device_name, exact_float


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """top1 in percent over n images; predictions int64 [n] and correct bool [n] in stored order;
    wall-clock seconds; the device in words.
    """

    top1: float
    n: int
    predictions: torch.Tensor
    correct: torch.Tensor
    seconds: float
    device: str

    @property
    def images_per_s(self):
        return self.n / self.seconds


def limited(split, limit):
    """The Split itself, or `limit` evenly spaced images of it (stored order goes class by class, so
    classes stay balanced).
    """
    if limit is None or limit >= len(split):
        return split
    return split.subset(torch.linspace(0, len(split) - 1, limit).round().long())


def evaluate(model, split, *, batch_size=100, limit=None, on=None, verbose=False):
    """Accuracy of `model` (any callable on float32 [B, 3, H, W] giving logits [B, >= classes]) on a
    Split; argmax over the classes' ways only.

    limit: look at that many evenly spaced images only, for smoke runs. on: the device; the model is
    moved there when it can be. Raises UserError when the network gives fewer ways than there are
    classes, or a logit that is not finite.
    """
    where = torch.device(on) if on else device()
    split = limited(split, limit)
    if not len(split):
        raise UserError("there are no images to evaluate on")
    if isinstance(model, torch.nn.Module):
        model.eval().to(where)
    started = time.perf_counter()
    with torch.inference_mode(), exact_float():
        batches = _batches(split, batch_size, verbose)
        predictions = torch.cat([_predict(model, x.to(where), split) for x, _ in batches])
    seconds = time.perf_counter() - started
    correct = predictions == split.labels
    top1 = 100 * correct.double().mean().item()
    return Evaluation(top1, len(correct), predictions, correct, seconds, device_name(where))


def _predict(model, images, split):
    classes = split.num_classes or int(split.labels.max()) + 1
    logits = model(images.contiguous(memory_format=torch.channels_last))
    if logits.shape[1] < classes:
        raise UserError(
            f"the network has {logits.shape[1]} outputs but the data has {classes} classes; "
            "load a checkpoint trained on this data")
    if not torch.isfinite(logits).all():
        raise UserError(
            "the network gives logits that are NaN or infinite; "
            "check its weights and its calibration")
    return logits[:, :classes].argmax(1).cpu()


def _batches(split, batch_size, verbose):
    total = -(-len(split) // batch_size)
    return tqdm(split.batches(batch_size), "evaluate", total, leave=False, disable=not verbose)


def take_turns(calls, rounds=5, warm_up=1, verbose=False):
    """Wall-clock seconds of each call (name -> function without arguments): name -> [rounds].

    They take turns within every round, so that a machine that slows down slows all of them and
    ratios hold. The first `warm_up` rounds are not counted.
    """
    times = {name: [] for name in calls}
    for turn in tqdm(range(warm_up + rounds), desc="rounds", leave=False, disable=not verbose):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # a kernel that is only queued has taken no time yet
            if turn >= warm_up:
                times[name].append(time.perf_counter() - started)
    return times


@torch.inference_mode()
def latency(networks, images, repeats=20):
    """Median wall-clock seconds a call, by name, of several networks (name -> callable) on the same
    float32 [B, C, H, W], measured in turns (`take_turns`). CPU only.
    """
    images = images.contiguous(memory_format=torch.channels_last)
    calls = {name: functools.partial(network, images) for name, network in networks.items()}
    times = take_turns(calls, repeats, warm_up=2)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def paired_drop(correct_a, correct_b):
    """Accuracy of a minus accuracy of b on the same images, in points, with its 95 % interval:
    (drop, low, high).

    Only images on which they disagree count: the adjusted Wald interval for paired proportions of
    Bonett & Price (2012), which stays honest when few or none do. correct_a, correct_b: bool [n].
    """
    n = len(correct_a)
    lost = int((correct_a & ~correct_b).sum())
    gained = int((~correct_a & correct_b).sum())
    p, q = (lost + 1) / (n + 2), (gained + 1) / (n + 2)
    half = 1.959964 * math.sqrt((p + q - (p - q) ** 2) / (n + 2))
    return 100 * (lost - gained) / n, 100 * (p - q - half), 100 * (p - q + half)


def decibels(signal, noise):
    """10 log10(signal / noise) of two sums of squares (numbers, or tensors []), in dB; infinite
    where nothing is lost.
    """
    signal, noise = float(signal), float(noise)
    return math.inf if noise == 0 else 10 * math.log10(max(signal, 1e-300) / noise)


def decibels(signal, noise):
    """Signal over noise (sums of squares, or their means), 10 log10(signal / noise), in dB;
    infinite where there is no noise.
    """
    signal, noise = float(signal), float(noise)
    return 10 * math.log10(max(signal, 1e-300) / noise) if noise else math.inf
