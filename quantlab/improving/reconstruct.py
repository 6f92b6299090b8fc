"""Learned rounding: AdaRound, block reconstruction (BRECQ) and QDrop as one loop.

    learning = ReconstructConfig.preset("qdrop", iterations=800)
    qmodel = reconstruct(model, stats, images, QuantConfig(4, 4), learning)
    qmodel.meta["reconstruction"]       # frame: unit, layers, nearest, learned, note, seconds

Unit after unit, the output of the float network is the target, the quantized network up to the unit
gives the input, and what rounds inside it learns to come as close as it can. AdaRound: Nagel et al.
2020 (arXiv:2004.10568); BRECQ: Li et al. 2021 (arXiv:2102.05426); QDrop: Wei et al. 2022
(arXiv:2203.05740).
"""

import dataclasses
import math
import statistics
import time

import pandas as pd
import torch
from tqdm.auto import tqdm

from quantlab.calibration import Watcher
from quantlab.config import QuantConfig
from quantlab.graph import folded
from quantlab.improving.activations import BATCH, Networks, stack_images
from quantlab.improving.learned import (
    LearnedRounding,
    LearnedStep,
    Masks,
    learn_only,
    swap,
    write_learned,
)
from quantlab.improving.reconstruct_state import State, load_unit, unit_tensors
from quantlab.ptq import quantize
from quantlab.quantized import find_node
from quantlab.system.arguments import check_settings, number
from quantlab.system.contract import GATE_IMAGES, check_function, check_logits
from quantlab.system.errors import UserError, checked, did_you_mean
from quantlab.system.machine import device, exact_float
from quantlab.system.timing import take_turns

# ---- Settings ------------------------------------------------------------------------------------

CHOICES = {
    "unit": ("layer", "block"),
    "input": ("quantized", "float", "mixed"),
    "loss": ("mse", "fisher"),
}


@dataclasses.dataclass(frozen=True)
class ReconstructConfig:
    """What is learned, from what, for how long; AdaRound, BRECQ and QDrop differ in five choices.

    unit: "layer" or "block" (residual block). input: of a unit while it learns, from the
    "quantized" or the "float" network before it, or "mixed": each element one or the other. drop:
    probability that an element stays float, in mixed inputs and at every inner quantizer (QDrop).
    loss: "mse": squared error, summed over channels, mean elsewhere; "fisher": every term weighted
    by the squared gradient of the float network's log-likelihood, scaled to mean 1. lr: of the
    rounding (Adam); lr_steps, lr_bias: of activation steps (relative to the step) and biases,
    cosine to 0. weight_lambda: of the regulariser, whose exponent falls linearly from beta[0] to
    beta[1] after the fraction `warmup` of the iterations. iterations: a unit.
    """

    unit: str = "block"
    input: str = "mixed"
    drop: float = 0.5
    learn_activation_steps: bool = True
    learn_bias: bool = True
    loss: str = "mse"
    iterations: int = 800
    batch_size: int = 32
    lr: float = 1e-2
    lr_steps: float = 1e-3
    lr_bias: float = 1e-3
    weight_lambda: float = 0.01
    beta: tuple = (20.0, 2.0)
    warmup: float = 0.2
    seed: int = 0
    max_cache_bytes: int = 2**31

    def __post_init__(self):
        check_settings(self)
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise UserError(
                    f"{name}={getattr(self, name)!r} is unknown; use one of {', '.join(allowed)}")
        if len(self.beta) != 2:
            raise UserError(f"beta={self.beta!r}: give the first and the last exponent")
        for value in self.beta:
            number(value, "beta")
        if not 0 <= self.drop < 1 or not 0 <= self.warmup < 1:
            raise UserError(
                f"drop={self.drop} and warmup={self.warmup} are fractions: at least 0 and below 1")
        if self.iterations < 1 or self.batch_size < 1:
            raise UserError(
                f"iterations={self.iterations} and batch_size={self.batch_size} are positive "
                "integers")

    @classmethod
    def preset(cls, method="qdrop", **changes):
        """A paper's choices with this workbook's schedule: "adaround" (layers, quantized input),
        "brecq" (blocks, learned steps) or "qdrop" (and dropped quantization).
        """
        if method not in PRESETS:
            raise UserError(
                f"method {method!r} is unknown{did_you_mean(method, PRESETS)}; "
                f"use one of {', '.join(PRESETS)}")
        return cls(**(PRESETS[method] | changes))


PRESETS = {
    "adaround": {
        "unit": "layer", "input": "quantized", "drop": 0.0, "learn_activation_steps": False,
        "learn_bias": False},
    "brecq": {"unit": "block", "input": "quantized", "drop": 0.0},
    "qdrop": {},
}


# ---- The loop ------------------------------------------------------------------------------------


@checked
def reconstruct(model, stats, images, config=QuantConfig(), learning=ReconstructConfig(),
                state=None, verbose=True, callback=None):
    """The network of `quantize`, its rounding (activation steps, biases) learned unit by unit.

    images: float32 [N, 3, H, W] or an iterable of such batches. A unit keeps the nearest rounding
    where learning ends with a larger loss on all of them. `qmodel.meta["reconstruction"]` is a
    frame of unit, layers, nearest, learned (the two losses), note, seconds. state: path of a
    safetensors file of finished units, from which a later call with the same settings goes on; the
    result is the same. callback(record): after every iteration, with unit, iteration, loss, h
    (layer -> tensor like its weight), steps (quantizer -> float). Raises UserError for fewer images
    than a batch, statistics of another network, and a state file of other settings.
    """
    with exact_float(), torch.inference_mode(False), torch.enable_grad():
        task = _Task(model, stats, images, config, learning)
        finished = State(state, task.images, config, learning, stats.graph_hash)
        return _learn_all(task, finished, verbose, callback)


def _learn_all(task, finished, verbose, callback):
    """The quantized network, learned unit by unit; those that are finished are restored."""
    rows = []
    with tqdm(task.units, "reconstruct", unit=" units", disable=not verbose) as bar:
        for i, unit in enumerate(bar):
            task.load_target(i)
            if i < len(finished.rows):
                finished.restore(task.qmodel, unit)
                task.quantized_loss(i)
                rows.append(finished.rows[i])
            else:
                started = time.perf_counter()
                row = _learn_unit(task, i, callback)
                rows.append(row | {"seconds": time.perf_counter() - started})
                bar.set_postfix({key: row[key] for key in ("unit", "nearest", "learned")})
                finished.add(task.qmodel, unit, rows)
            task.free(i)
    task.qmodel.meta["reconstruction"] = pd.DataFrame(rows)
    return task.qmodel.requires_grad_(False)


def _learn_unit(task, i, callback):
    """Learn one unit, write what was learned into the quantized network, or leave the nearest
    rounding where that is better; a row of the frame.
    """
    unit = task.units[i]
    nearest = task.quantized_loss(i)
    row = {"unit": unit.name, "layers": len(unit.layers), "nearest": nearest, "learned": nearest}
    if task.is_constant(i):
        return row | {"note": "constant output: nothing to learn, nearest rounding kept"}
    before = {k: v.clone() for k, v in unit_tensors(task.qmodel, unit).items()}
    learner = _UnitLearner(task, i)
    for iteration in range(task.learning.iterations):
        loss = learner.iterate(iteration)
        if callback:
            record = {"unit": unit.name, "iteration": iteration, "loss": loss.item()}
            callback(record | learner.snapshot())
    write_learned(task.qmodel, learner.steps, learner.roundings)
    learned = task.quantized_loss(i)
    if learned <= nearest:
        return row | {"learned": learned, "note": ""}
    load_unit(task.qmodel, unit, before)  # also where learning ended at NaN
    note = f"learning ended at {learned:.4g}: nearest rounding kept"
    return row | {"learned": task.quantized_loss(i), "note": note}


class _Task(Networks):
    """Both networks, and what a unit's output is compared with."""

    def __init__(self, model, stats, images, config, learning):
        images = stack_images(images, learning.batch_size)
        self.qmodel, self.learning = quantize(model, stats, config).to(device()), learning
        graph = folded(model)
        logits = check_function(model, graph, images)
        if learning.loss == "fisher":
            check_logits(logits, len(images[:GATE_IMAGES]))
        super().__init__(
            graph, self.qmodel, images, learning.unit, learning.max_cache_bytes)

    def load_target(self, i):
        """Advance the float network through unit i."""
        self.advance("float", i)
        if self.learning.loss == "fisher":
            self._load_fisher(self.units[i].target)

    def quantized_loss(self, i):
        """Advance the quantized network through unit i as it is now; the loss over all images."""
        self.advance("quantized", i)
        total = 0.0
        for index in torch.arange(len(self.images)).split(BATCH):
            value = self.cache.rows(("quantized", self.units[i].output), index)
            total += self.loss(value, i, index).item() * len(index)
        return total / len(self.images)

    def loss(self, value, i, index):
        """Squared error at unit i's output, summed over channels, mean over images and places."""
        target = self.units[i].target
        error = (value - self.cache.rows(("float", target), index)).square()
        if self.learning.loss == "fisher":
            error = error * self.cache.rows(("fisher", target), index)
        return error.sum(1).mean()

    def _load_fisher(self, name):
        """Squared gradient of log p(y | x) at a node, y drawn from the float network's own softmax;
        scaled to mean 1.
        """
        generator, seen = torch.Generator().manual_seed(self.learning.seed), {}
        watcher = Watcher(self.graphs["float"], [name], seen.__setitem__)
        for index in torch.arange(len(self.images)).split(BATCH):
            logits = watcher.run(self.images[index].to(self.device).requires_grad_())
            chances = logits.detach().softmax(1).cpu()
            label = torch.multinomial(chances, 1, generator=generator).to(self.device)
            likelihood = logits.log_softmax(1).gather(1, label).sum()
            (gradient,) = torch.autograd.grad(likelihood, seen[name])
            self.fill(("fisher", name), index, gradient.square())
        fisher = self.cache.values["fisher", name]
        fisher /= fisher.mean().clamp(min=1e-30)

    def is_constant(self, i):
        target = self.cache.values["float", self.units[i].target]
        return all(bool((rows == target[:1]).all()) for rows in target.split(BATCH))


class _UnitLearner:
    """One unit of a task while it learns: `part` has LearnedRounding for its layers and LearnedStep
    for its Quantizers.
    """

    def __init__(self, task, i):
        self.task, self.i, self.unit, self.learning = task, i, task.units[i], task.learning
        learning = self.learning
        self.generator = torch.Generator().manual_seed(learning.seed * 1009 + i)
        self.masks = Masks(learning.drop, self.generator)
        self.part, self.inputs, _ = task.part("quantized", i)
        self.part.requires_grad_(False)  # of what is never learned; the stand-ins come next
        self.steps, self.roundings = swap(self.part, self._make_step, self._make_rounding)
        steps = [step.log_step for step in self.steps.values()]
        biases = [r.bias for r in self.roundings.values() if r.bias is not None]
        self.optimizer = torch.optim.Adam([
            {"params": [r.v for r in self.roundings.values()], "lr": learning.lr},
            {"params": steps if learning.learn_activation_steps else [], "lr": learning.lr_steps},
            {"params": biases if learning.learn_bias else [], "lr": learning.lr_bias},
        ])
        factors = [lambda t: 1.0, self._cosine, self._cosine]
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factors)

    def _make_step(self, quantizer):
        return LearnedStep(quantizer, self.masks, self.learning.learn_activation_steps)

    def _make_rounding(self, name, layer):
        graph = self.task.graphs["float"]
        exact = graph.get_submodule(find_node(graph, name).target)
        return LearnedRounding(layer, exact, layer.weight_qparams, self.learning.learn_bias)

    def _cosine(self, iteration):
        return 0.5 * (1 + math.cos(math.pi * min(iteration / self.learning.iterations, 1)))

    def iterate(self, iteration):
        """One iteration on a random batch; the loss without regulariser, float32 []."""
        learning, task = self.learning, self.task
        index = torch.randint(len(task.images), (learning.batch_size,), generator=self.generator)
        values = self.part(*[self._input(name, index) for _, name in self.inputs])
        loss = total = task.loss(values[self.unit.outputs.index(self.unit.output)], self.i, index)
        progress = (iteration / learning.iterations - learning.warmup) / (1 - learning.warmup)
        if progress >= 0:
            first, last = learning.beta
            beta = first + (last - first) * progress
            regularizer = sum(r.regularizer(beta) for r in self.roundings.values())
            total = loss + learning.weight_lambda * regularizer
        self.optimizer.zero_grad()
        if total.requires_grad:  # else nothing of the unit is learned
            total.backward()
        self.optimizer.step()
        self.schedule.step()
        return loss.detach()

    def _input(self, name, index):
        cache, exact = self.task.cache, ("float", self.task.origins[name])
        if self.learning.input == "float":
            return cache.rows(exact, index)
        value = cache.rows(("quantized", name), index)
        mixed = self.learning.input == "mixed" and self.learning.drop
        if not mixed or name in self.task.first:  # the image itself is never mixed
            return value
        return torch.lerp(cache.rows(exact, index), value, self.masks.like(value))

    def snapshot(self):
        """What has been learned so far, for a callback."""
        h = {name: rounding.h.detach().cpu() for name, rounding in self.roundings.items()}
        return {"h": h, "steps": {name: step.scale.item() for name, step in self.steps.items()}}


# ---- What an iteration costs ---------------------------------------------------------------------


def iteration_cost(model, stats, images, config=QuantConfig(), learning=ReconstructConfig(),
                   repeats=20):
    """Median seconds of an iteration of every unit, and of a plain float forward and backward pass
    of the same unit on the same batch size: a frame of unit, learning, plain, ratio.
    """
    task, rows = _Task(model, stats, images, config, learning), []
    with exact_float():
        for i, unit in enumerate(task.units):
            task.load_target(i)
            task.quantized_loss(i)
            learner, plain = _UnitLearner(task, i), _plain_pass(task, i)
            calls = {"learning": lambda: learner.iterate(learning.iterations // 2), "plain": plain}
            times = take_turns(calls, repeats, warm_up=3)
            row = {name: statistics.median(seconds) for name, seconds in times.items()}
            rows.append({"unit": unit.name, **row, "ratio": row["learning"] / row["plain"]})
            task.free(i)
    return pd.DataFrame(rows)


def _plain_pass(task, i):
    """A function that runs the float unit forward and backward on one fixed batch."""
    part, inputs, outputs = task.part("float", i)
    learn_only(part, task.units[i].layers)
    index, target = torch.arange(task.learning.batch_size), task.units[i].target
    values = [task.cache.rows(key, index) for key in inputs]
    goal = task.cache.rows(("float", target), index) + 1

    def run():
        part.zero_grad()
        (part(*values)[outputs.index(target)] - goal).square().sum(1).mean().backward()

    return run
