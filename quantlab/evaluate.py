"""Top-1 accuracy on a split, and how far two networks differ on the same images."""

import dataclasses
import math
import time

import torch
from tqdm.auto import tqdm

from quantlab.inplace import written_in_place
from quantlab.quantized import QuantizedNetwork
from quantlab.system.errors import UserError, checked
from quantlab.system.machine import device, device_name, exact_float


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """top1 in percent over n images; predictions int64 [n] and correct bool [n] in stored order."""

    top1: float
    n: int
    predictions: torch.Tensor
    correct: torch.Tensor
    seconds: float  # wall clock
    device: str  # in words

    @classmethod
    def of(cls, predictions, labels, seconds, device):
        """From predictions and labels, int64 [n] each."""
        correct = predictions == labels
        top1 = 100 * correct.double().mean().item()
        return cls(top1, len(correct), predictions, correct, seconds, device)

    @property
    def images_per_s(self):
        return self.n / self.seconds


@checked
def limited(split, limit):
    """`limit` evenly spaced images of a Split, which is stored class by class; None: all."""
    if limit is None or limit >= len(split):
        return split
    steps = torch.linspace(0, len(split) - 1, limit, dtype=torch.float32)
    return split.subset(steps.round().long())


@checked
def evaluate(model, split, *, batch_size=100, limit=None, on=None, verbose=False):
    """Accuracy of `model`, a callable float32 [B, 3, H, W] -> logits [B, >= classes], on a Split
    or on batches of images and labels (a DataLoader), which have a size of their own.

    limit: that many evenly spaced images of a Split only, for smoke runs. on: the device to compute
    on. UserError where there are fewer outputs than classes, or a logit that is not finite.
    """
    from quantlab.system.contract import as_pairs

    where = device() if on is None else torch.device(on)
    split = limited(split, limit) if hasattr(split, "subset") else split
    pairs, total, classes = as_pairs(split, batch_size, limit)
    if isinstance(model, torch.nn.Module):
        model.eval().to(where)
    if isinstance(model, QuantizedNetwork):
        model = written_in_place(model)
    started = time.perf_counter()
    with torch.inference_mode(), exact_float():
        pairs = tqdm(pairs, "evaluate", total, leave=False, disable=not verbose)
        found = [(_predict(model, x.to(where), y, classes), y) for x, y in pairs]
    seconds = time.perf_counter() - started
    if not found:
        raise UserError("there are no images to evaluate on")
    predictions, labels = map(torch.cat, zip(*found))
    return Evaluation.of(predictions, labels, seconds, device_name(where))


def _predict(model, images, labels, classes):
    logits = model(images.contiguous(memory_format=torch.channels_last))
    classes = classes or max(logits.shape[1], int(labels.max()) + 1)
    if logits.shape[1] < classes:
        raise UserError(
            f"the network has {logits.shape[1]} outputs but the data has {classes} classes; "
            "load a checkpoint trained on this data")
    if not torch.isfinite(logits).all():
        raise UserError(
            "the network gives logits that are NaN or infinite; "
            "check its weights and its calibration")
    return logits[:, :classes].argmax(1).cpu()


@checked
def paired_drop(correct_a, correct_b):
    """(drop, low, high): accuracy of a less that of b on the same images, points, 95 % interval.

    Only images on which they disagree count: Bonett & Price's adjusted Wald interval (2012), which
    stays honest when few or none do. correct_a, correct_b: bool [n].
    """
    n = len(correct_a)
    lost = int((correct_a & ~correct_b).sum())
    gained = int((~correct_a & correct_b).sum())
    p, q = (lost + 1) / (n + 2), (gained + 1) / (n + 2)
    half = 1.959964 * math.sqrt((p + q - (p - q) ** 2) / (n + 2))
    return 100 * (lost - gained) / n, 100 * (p - q - half), 100 * (p - q + half)


def decibels(signal, noise):
    """Signal over noise (sums of squares, or their means), 10 log10(signal / noise), in dB;
    infinite where there is no noise.
    """
    signal, noise = float(signal), float(noise)
    return 10 * math.log10(max(signal, 1e-300) / noise) if noise else math.inf
