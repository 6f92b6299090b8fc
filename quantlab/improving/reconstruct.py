"""Learned rounding: AdaRound, block reconstruction (BRECQ) and QDrop as one loop.

    how = ReconstructConfig.preset("qdrop", iterations=800)
    qmodel = reconstruct(model, stats, images, QuantConfig(4, 4), how)      # images: float32 [N, 3, H, W], or an iterable of batches
    qmodel.meta["reconstruction"]                                           # frame: unit, layers, nearest, learned (losses), seconds, note

Unit after unit, the output of the float network is the target, the quantized network up to the unit gives the input, and what rounds
inside it learns to come as close as it can. AdaRound: Nagel et al. 2020 (arXiv:2004.10568); BRECQ: Li et al. 2021 (arXiv:2102.05426);
QDrop: Wei et al. 2022 (arXiv:2203.05740).
"""

import statistics
import time

import pandas as pd
import torch
from torch import fx
from tqdm.auto import tqdm

from quantlab.config import QuantConfig
from quantlab.graph import folded
from quantlab.improving.activations import BATCH, Networks
from quantlab.improving.reconstruct_config import ReconstructConfig
from quantlab.improving.reconstruct_state import State, load_unit, unit_tensors
from quantlab.improving.unit_learner import UnitLearner
from quantlab.ptq import quantize
from quantlab.system.errors import UserError
from quantlab.system.machine import device, exact_float


def reconstruct(model, stats, images, config=QuantConfig(), how=ReconstructConfig(), state=None, verbose=True, trace=None):
    """A quantized network as `quantize` gives it, whose rounding (and activation steps, biases) is learned unit by unit.

    images: float32 [N, 3, H, W] or an iterable of such batches. A unit keeps the nearest rounding where learning ends with a larger loss
    on all of them. `qmodel.meta["reconstruction"]` is a frame of unit, layers, nearest, learned (the two losses), seconds, note.
    state: path of a safetensors file of finished units, from which a later call with the same settings goes on; the result is the same.
    trace(record): called after every iteration with unit, iteration, loss, h (layer -> tensor like its weight), steps (quantizer -> float).
    Raises UserError for fewer images than a batch, statistics of another network, and a state file of other settings.
    """
    images = images if isinstance(images, torch.Tensor) else torch.cat(list(images))
    if len(images) < how.batch_size:
        raise UserError(f"{len(images)} calibration images do not fill a batch of {how.batch_size}; give more, or a smaller batch_size")
    qmodel = quantize(model, stats, config).to(device())
    network = _Task(folded(model), qmodel, images, how)
    finished = State(state, images, config, how, stats.graph_hash)
    rows = []
    with exact_float(), tqdm(network.units, desc="reconstruct", unit=" units", disable=not verbose) as progress:
        for i, unit in enumerate(progress):
            network.load_target(i)
            if i < len(finished.rows):
                finished.restore(qmodel, unit)
                network.quantized_loss(i)
                rows.append(finished.rows[i])
            else:
                rows.append(_reconstruct_unit(network, i, trace, progress))
                finished.add(qmodel, unit, rows)
            network.free(i)
    for parameter in qmodel.parameters():
        parameter.requires_grad_(False)
    qmodel.meta["reconstruction"] = pd.DataFrame(rows)
    return qmodel


def _reconstruct_unit(network, i, trace, progress):
    """Learn one unit, write what was learned into the quantized network, or leave the nearest rounding where that is better."""
    unit, qmodel, how, started = network.units[i], network.graphs["quantized"], network.how, time.perf_counter()
    nearest = network.quantized_loss(i)
    row = {"unit": unit.name, "layers": len(unit.layers), "nearest": nearest, "learned": nearest, "seconds": 0.0, "note": ""}
    if network.is_constant(i):
        return row | {"note": "constant output: nothing to learn, nearest rounding kept"}
    before, learner = {k: v.clone() for k, v in unit_tensors(qmodel, unit).items()}, UnitLearner(network, i)
    for iteration in range(how.iterations):
        loss = learner.step(iteration)
        if trace:
            trace({"unit": unit.name, "iteration": iteration, "loss": loss.item()} | learner.snapshot())
    with torch.no_grad():
        learner.write()
    learned = network.quantized_loss(i)
    if not learned <= nearest:
        load_unit(qmodel, unit, before)
        row["note"] = f"learning ended at {learned:.4g}: nearest rounding kept"
        learned = network.quantized_loss(i)
    progress.set_postfix(unit=unit.name, nearest=f"{nearest:.3g}", learned=f"{learned:.3g}")
    return row | {"learned": learned, "seconds": time.perf_counter() - started}


class _Task(Networks):
    """The networks and what a unit's output is compared with."""

    def __init__(self, graph, qmodel, images, how):
        super().__init__(graph, qmodel, images, how.unit, how.max_cache_bytes)
        self.how = how

    def load_target(self, i):
        """Advance the float network through unit i."""
        self.advance("float", i)
        if self.how.loss == "fisher":
            self._load_fisher(self.units[i].target)

    def quantized_loss(self, i):
        """Advance the quantized network through unit i as it is now; the loss over all images."""
        self.advance("quantized", i)
        total = 0.0
        for index in torch.arange(len(self.images)).split(BATCH):
            total += self.loss(self.cache.rows(("quantized", self.units[i].output), index), i, index).item() * len(index)
        return total / len(self.images)

    def loss(self, value, i, index):
        """Squared error at unit i's output, summed over channels, mean over images and places."""
        error = (value - self.cache.rows(("float", self.units[i].target), index)).square()
        if self.how.loss == "fisher":
            error = error * self.cache.rows(("fisher", self.units[i].target), index)
        return error.sum(1).mean()

    def _load_fisher(self, name):
        """Squared gradient of log p(y | x) at a node, y drawn from the float network's own softmax; scaled to mean 1."""
        generator, keep = torch.Generator().manual_seed(self.how.seed), _Keep(self.graphs["float"], name)
        for index in torch.arange(len(self.images)).split(BATCH):
            logits = keep.run(self.images[index].to(self.device))
            label = torch.multinomial(logits.detach().softmax(1).cpu(), 1, generator=generator).to(self.device)
            (gradient,) = torch.autograd.grad(logits.log_softmax(1).gather(1, label).sum(), keep.value)
            self.fill(("fisher", name), index, gradient.square())
        fisher = self.cache.values["fisher", name]
        fisher /= fisher.mean().clamp(min=1e-30)

    def is_constant(self, i):
        target = self.cache.values["float", self.units[i].target]
        return all(bool((rows == target[:1]).all()) for rows in target.split(BATCH))


class _Keep(fx.Interpreter):
    """Runs a graph and makes one node's value a leaf that gathers a gradient."""

    def __init__(self, graph, name):
        super().__init__(graph)
        self.name = name

    def run_node(self, node):
        value = super().run_node(node)
        if node.name == self.name:
            self.value = value = value.detach().requires_grad_()
        return value


def iteration_cost(model, stats, images, config=QuantConfig(), how=ReconstructConfig(), repeats=20):
    """Median seconds of an iteration of every unit, and of a plain float forward and backward pass of the same unit on the same batch
    size: a frame of unit, learning, plain, ratio. They take turns, so that a machine that slows down slows both."""
    images = images if isinstance(images, torch.Tensor) else torch.cat(list(images))
    qmodel = quantize(model, stats, config).to(device())
    network, rows = _Task(folded(model), qmodel, images, how), []
    with exact_float():
        for i, unit in enumerate(network.units):
            network.load_target(i)
            network.quantized_loss(i)
            learner, times = UnitLearner(network, i), {"learning": [], "plain": []}
            for repeat in range(repeats + 3):
                for name, function in (("learning", lambda: learner.step(how.iterations // 2)), ("plain", _plain_pass(network, i))):
                    started = time.perf_counter()
                    function()
                    if network.device.type == "cuda":
                        torch.cuda.synchronize()
                    if repeat >= 3:
                        times[name].append(time.perf_counter() - started)
            row = {name: statistics.median(values) for name, values in times.items()}
            rows.append({"unit": unit.name, **row, "ratio": row["learning"] / row["plain"]})
            network.free(i)
    return pd.DataFrame(rows)


def _plain_pass(network, i):
    """A function that runs the float unit forward and backward on one fixed batch."""
    part, inputs, outputs = network.part("float", i)
    part.requires_grad_(True)
    index, target = torch.arange(network.how.batch_size), network.units[i].target
    values, goal = [network.cache.rows(key, index) for key in inputs], network.cache.rows(("float", target), index) + 1

    def run():
        part.zero_grad()
        (part(*values)[outputs.index(target)] - goal).square().sum(1).mean().backward()

    return run
