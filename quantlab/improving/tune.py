"""End-to-end tuning: steps, scales, biases and, if wanted, weights, learned all together.

    tuned = tune_end_to_end(model, qmodel, images)                  # every weight keeps its code
    tuned = tune_end_to_end(model, qmodel, images, TuneConfig(learn_weights=True, flip=True))

The float network's logits are the target; no labels. Learning everything at once is QFT
(Finkelstein et al. 2022, arXiv:2212.02634), here from where reconstruction ended. With labels it is
quantization-aware training (LSQ, Esser et al. 2020, arXiv:1902.08153):

    tuner = Tuner(model, qmodel, TuneConfig(iterations=2000, learn_weights=True))
    for loss in tuner.steps(batches, F.cross_entropy):              # batches: (images, labels)
        ...
    tuned = tuner.quantized()
"""

import copy
import dataclasses

import torch
from torch import nn
from tqdm.auto import tqdm

from quantlab.graph import folded
from quantlab.improving.activations import stack_images
from quantlab.improving.learned import LearnedCodes, LearnedStep, learn_only, swap, write_learned
from quantlab.quantized import find_node
from quantlab.system.arguments import check_settings
from quantlab.system.contract import GATE_IMAGES, check_function, check_logits, check_origin
from quantlab.system.errors import UserError, checked
from quantlab.system.machine import device, exact_float
from quantlab.system.timing import take_turns


@dataclasses.dataclass(frozen=True)
class TuneConfig:
    """What is learned and for how long, by Adam, whose rates fall to 0 as a cosine.

    lr: of activation steps and weight scales (relative) and of biases (absolute). learn_weights:
    codes may move too, at lr_weights (in codes). flip: every image is mirrored with probability
    1/2. crop: it is moved by up to so many pixels, zeros come in. mixup: fraction of the batches in
    which every image gets up to half of another one mixed in (Zhang et al. 2018, arXiv:1710.09412).
    temperature: that softens both networks' logits. From flip on they are `tune_end_to_end`'s: a
    `Tuner` is given batches and a loss.
    """

    iterations: int = 250
    lr: float = 1e-3
    lr_weights: float = 2e-3
    learn_weights: bool = False
    flip: bool = False
    crop: int = 0
    mixup: float = 0.0
    batch_size: int = 64
    temperature: float = 4.0
    seed: int = 0

    def __post_init__(self):
        check_settings(self)
        for name in ("iterations", "lr", "lr_weights", "batch_size", "temperature"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name}={getattr(self, name)}: give a positive number")
        if self.mixup > 1:
            raise UserError(f"mixup={self.mixup} is a fraction of the batches: at most 1")


@checked
def tune_end_to_end(model, qmodel, images, config=TuneConfig(), verbose=True):
    """A copy of qmodel with activation steps, weight scales, biases (and codes) learned together.

    loss = KL(softmax(z / T) || softmax(z_q / T)) T^2 between the float network's logits z and the
    quantized one's, both on the same random batches of `images`: float32 [N, 3, H, W] or an
    iterable of batches. Raises UserError for fewer images than a batch.
    """
    tuner, steps = _begin(model, qmodel, images, config)
    for _ in tqdm(steps, "tune", config.iterations, leave=False, disable=not verbose):
        pass
    return tuner.quantized()


def iteration_cost(model, qmodel, images, config=TuneConfig(), repeats=20):
    """Seconds of `repeats` iterations, targets included, and of as many plain forward and backward
    passes of the float network on a batch of the same size, in turns: a dict of two lists, learning
    and plain.
    """
    tuner, steps = _begin(model, qmodel, images, dataclasses.replace(config, iterations=10**6))
    plain = learn_only(copy.deepcopy(tuner.graph), qmodel.layers)
    batch = stack_images(images, config.batch_size)[: config.batch_size].to(device())
    batch = batch.contiguous(memory_format=torch.channels_last)

    def run():
        plain.zero_grad()
        with exact_float(), torch.inference_mode(False), torch.enable_grad():
            plain(batch).square().sum().backward()

    return take_turns({"learning": lambda: next(steps), "plain": run}, repeats, warm_up=3)


def _begin(model, qmodel, images, config):
    """(Tuner, its iterations: a generator of losses)."""
    images = stack_images(images, config.batch_size)
    tuner, heat = Tuner(model, qmodel, config), config.temperature
    logits = check_function(model, folded(model), images)
    check_logits(logits, len(images[:GATE_IMAGES]), places=True)

    def divergence(logits, targets):
        softened = (logits / heat).log_softmax(1)
        kl = nn.functional.kl_div(softened, targets, log_target=True, reduction="batchmean")
        return heat**2 * kl

    return tuner, tuner.steps(_soft_targets(tuner.graph, images, config), divergence)


def _soft_targets(graph, images, config):
    """Batches without end: random images, augmented, and log(softmax(z / T)) of the graph for them.
    """
    generator = torch.Generator().manual_seed(config.seed)
    while True:
        index = torch.randint(len(images), (config.batch_size,), generator=generator)
        batch = augmented(images[index], config, generator)
        with exact_float(), torch.inference_mode(False), torch.no_grad():
            targets = (graph(batch.to(device())) / config.temperature).log_softmax(1)
        yield batch, targets


def augmented(batch, config, generator):
    """float32 [B, 3, H, W] -> the same: mirrored, moved, mixed, as a TuneConfig says."""
    def draw(*shape):
        return torch.rand(shape, generator=generator, dtype=torch.float32)

    n, _, height, width = batch.shape
    if config.flip:
        batch = torch.where(draw(n, 1, 1, 1) < 0.5, batch.flip(-1), batch)
    if config.crop:
        corners = (draw(n, 2) * (2 * config.crop + 1)).long().tolist()
        padded = nn.functional.pad(batch, [config.crop] * 4)
        batch = torch.stack([image[:, row : row + height, column : column + width]
                             for image, (row, column) in zip(padded, corners, strict=True)])
    if config.mixup and draw(1) < config.mixup:
        batch = torch.lerp(batch, batch.flip(0), draw(n, 1, 1, 1) / 2)
    return batch


class Tuner:
    """A copy of a quantized network, `network`, all of whose steps, scales and biases learn, and
    with config.learn_weights its codes too; the start is the network as it is.
    """

    def __init__(self, model, qmodel, config=TuneConfig()):
        self.qmodel, self.config = qmodel, config
        self.graph = folded(model)
        check_origin(qmodel, self.graph)
        self.graph = self.graph.to(device()).requires_grad_(False)
        self.network = copy.deepcopy(qmodel).to(device()).requires_grad_(False)
        self.learned = swap(self.network, LearnedStep, self._make_layer)
        modules = [module for stand_ins in self.learned for module in stand_ins.values()]
        named = [parameter for module in modules for parameter in module.named_parameters()]
        self.optimizer = torch.optim.Adam([
            {"params": [p for name, p in named if name != "latent"], "lr": config.lr},
            {"params": [p for name, p in named if name == "latent"], "lr": config.lr_weights},
        ])
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
            self.optimizer, config.iterations)

    def _make_layer(self, name, layer):
        exact = self.graph.get_submodule(find_node(self.graph, name).target)
        return LearnedCodes(layer, exact if self.config.learn_weights else None)

    def steps(self, batches, loss):
        """Learn from each (images float32 [B, 3, H, W], target) of `batches`, config.iterations at
        most; yields loss(logits, target) of each, float32 [] on the device.
        """
        for _, (images, target) in zip(range(self.config.iterations), batches, strict=False):
            with exact_float(), torch.inference_mode(False), torch.enable_grad():
                images = images.to(device()).contiguous(memory_format=torch.channels_last)
                value = loss(self.network(images), target.to(device()))
                self.optimizer.zero_grad()
                if value.requires_grad:  # else everything was left float
                    value.backward()
            self.optimizer.step()
            self.schedule.step()
            yield value.detach()

    def quantized(self):
        """The network as learned so far, rounded for good: a QuantizedNetwork."""
        tuned = copy.deepcopy(self.qmodel).to(device())
        write_learned(tuned, *self.learned)
        return tuned
