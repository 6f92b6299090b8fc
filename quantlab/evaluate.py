"""Top-1 accuracy on a split."""

import dataclasses
import time

import torch
from tqdm.auto import tqdm

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
def evaluate(model, split, *, batch_size=100, limit=None, on=None, verbose=False):
    """Accuracy of `model`, a callable float32 [B, 3, H, W] -> logits [B, >= classes], on a Split
    or on batches of images and labels (a DataLoader), which have a size of their own.

    limit: that many evenly spaced images of a Split only, for smoke runs. on: the device to compute
    on. UserError where these are no such logits, fewer than classes, or not finite.
    """
    from quantlab.system.contract import as_pairs

    where = device() if on is None else torch.device(on)
    split = split.limited(limit) if hasattr(split, "limited") else split
    pairs, total, classes = as_pairs(split, batch_size, limit)
    if isinstance(model, torch.nn.Module):
        model.eval().to(where)
    if isinstance(model, QuantizedNetwork):
        from quantlab.inplace import written_in_place  # here, as only a network's rows need it

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
    from quantlab.system.contract import check_logits

    logits = model(images.contiguous(memory_format=torch.channels_last))
    check_logits(logits, len(images), floats=False)
    classes = classes or max(logits.shape[1], int(labels.max()) + 1)
    if logits.shape[1] < classes:
        raise UserError(f"the network has {logits.shape[1]} outputs but the data has {classes} "
                        "classes; load a checkpoint trained on this data")
    if not torch.isfinite(logits).all():
        raise UserError("the network gives logits that are NaN or infinite; check its weights and "
                        "its calibration")
    return logits[:, :classes].argmax(1).cpu()
