"""Learned rounding: AdaRound, block reconstruction (BRECQ) and QDrop as one loop.

    how = ReconstructConfig.preset("qdrop", iterations=800)
    qmodel = reconstruct(model, stats, images, QuantConfig(4, 4), how)      # images: float32 [N, 3, H, W], or an iterable of batches
    qmodel.reconstruction                                                   # frame: unit, layers, nearest, learned (losses), seconds, note

Unit after unit, the output of the float network is the target, the quantized network up to the unit gives the input, and what rounds
inside it learns to come as close as it can. AdaRound: Nagel et al. 2020 (arXiv:2004.10568); BRECQ: Li et al. 2021 (arXiv:2102.05426);
QDrop: Wei et al. 2022 (arXiv:2203.05740).
"""

import dataclasses
import difflib
import hashlib
import json
import math
import pathlib
import statistics
import time

import pandas as pd
import safetensors
import torch
from torch import fx
from tqdm.auto import tqdm

from quantlab.activations import BATCH, Networks
from quantlab.evaluate import evaluate
from quantlab.learned import Masks, learnable
from quantlab.observers import observer_name
from quantlab.ptq import QuantConfig, collect, find_node, input_qparams, prepare, quantize, write_codes
from quantlab.runtime import UserError, device, exact_float, save_tensors
from quantlab.units import is_quantizer

CHOICES = {"unit": ("layer", "block"), "input": ("quantized", "float", "mixed"), "loss": ("mse", "fisher")}


@dataclasses.dataclass(frozen=True)
class ReconstructConfig:
    """What is learned, from what, for how long; `preset(method, **changes)` gives a paper's choices with this workbook's schedule.

    unit: "layer" or "block" (residual block). input: of a unit while it learns, from the "quantized" or the "float" prefix, or "mixed":
    each element one or the other. drop: probability that an element stays float, in mixed inputs and at every inner quantizer (QDrop).
    loss: "mse": squared error, summed over channels, mean elsewhere; "fisher": every term weighted by the squared gradient of the float
    network's log-likelihood, scaled to mean 1. lr: of the rounding (Adam); lr_steps, lr_bias: of activation steps (relative to the step)
    and biases, cosine to 0. weight_lambda: of the regulariser, whose exponent falls linearly from beta[0] to beta[1] after the
    share `warmup` of the iterations. iterations: a unit.
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
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise UserError(f"{name}={getattr(self, name)!r} is unknown; use one of {', '.join(allowed)}")
        if not 0 <= self.drop < 1 or not 0 <= self.warmup < 1:
            raise UserError(f"drop={self.drop} and warmup={self.warmup} are shares: at least 0 and below 1")
        if self.iterations < 1 or self.batch_size < 1:
            raise UserError(f"iterations={self.iterations} and batch_size={self.batch_size} are positive integers")

    @classmethod
    def preset(cls, method="qdrop", **changes):
        """method: "adaround" (layers, quantized input), "brecq" (blocks, learned steps) or "qdrop" (and dropped quantization)."""
        if method not in PRESETS:
            near = difflib.get_close_matches(str(method), PRESETS, 1)
            raise UserError(f"method {method!r} is unknown{f'; did you mean {near[0]}?' if near else ''}; use one of {', '.join(PRESETS)}")
        return cls(**(PRESETS[method] | changes))


PRESETS = {
    "adaround": {"unit": "layer", "input": "quantized", "drop": 0.0, "learn_activation_steps": False, "learn_bias": False},
    "brecq": {"unit": "block", "input": "quantized", "drop": 0.0},
    "qdrop": {},
}


# ---- The whole network ------------------------------------------------------------------------------------------------------


def reconstruct(model, stats, images, config=QuantConfig(), how=ReconstructConfig(), state=None, verbose=True, trace=None):
    """A quantized network as `quantize` gives it, whose rounding (and activation steps, biases) is learned unit by unit.

    images: float32 [N, 3, H, W] or an iterable of such batches. A unit keeps the nearest rounding where learning ends with a larger loss
    on all of them. `qmodel.reconstruction` is a frame of unit, layers, nearest, learned (the two losses), seconds, note.
    state: path of a safetensors file of finished units, from which a later call with the same settings goes on; the result is the same.
    trace(record): called after every iteration with unit, iteration, loss, h (layer -> tensor like its weight), steps (quantizer -> float).
    Raises UserError for fewer images than a batch, statistics of another network, and a state file of other settings.
    """
    images = images if isinstance(images, torch.Tensor) else torch.cat(list(images))
    if len(images) < how.batch_size:
        raise UserError(f"{len(images)} calibration images do not fill a batch of {how.batch_size}; give more, or a smaller batch_size")
    qmodel = quantize(model, stats, config).to(device())
    network = _Task(prepare(model, config.placement, config.fold_batchnorm)[0], qmodel, images, how)
    finished = _State(state, images, config, how, stats.graph_hash)
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
    qmodel.reconstruction = pd.DataFrame(rows)
    return qmodel


def _reconstruct_unit(network, i, trace, progress):
    """Learn one unit, write what was learned into the quantized network, or leave the nearest rounding where that is better."""
    unit, qmodel, how, started = network.units[i], network.graphs["quantized"], network.how, time.perf_counter()
    nearest = network.quantized_loss(i)
    row = {"unit": unit.name, "layers": len(unit.layers), "nearest": nearest, "learned": nearest, "seconds": 0.0, "note": ""}
    if network.is_constant(i):
        return row | {"note": "constant output: nothing to learn, nearest rounding kept"}
    before, learner = {k: v.clone() for k, v in _tensors(qmodel, unit).items()}, UnitLearner(network, i)
    for iteration in range(how.iterations):
        loss = learner.step(iteration)
        if trace:
            trace({"unit": unit.name, "iteration": iteration, "loss": loss.item()} | learner.snapshot())
    with torch.no_grad():
        learner.write()
    learned = network.quantized_loss(i)
    if not learned <= nearest:
        _load(qmodel, unit, before)
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


# ---- One unit ---------------------------------------------------------------------------------------------------------------


class UnitLearner:
    """One unit while it learns: `part` has LearnedRounding for layers and LearnedStep for Quantizers, step() is an iteration."""

    def __init__(self, network, i):
        self.network, self.i, self.unit, how = network, i, network.units[i], network.how
        self.generator = torch.Generator().manual_seed(how.seed * 1009 + i)
        masks = Masks(how.drop, self.generator)
        self.mixing = masks if how.input == "mixed" else None
        self.part, self.inputs, _ = network.part("quantized", i)
        self.roundings, self.steps = learnable(self.part, network.graphs["float"], masks, how.learn_activation_steps, how.learn_bias)
        groups = [
            ([r.v for r in self.roundings.values()], how.lr),
            ([s.log_step for s in self.steps.values() if how.learn_activation_steps], how.lr_steps),
            ([r.bias for r in self.roundings.values() if r.bias is not None and how.learn_bias], how.lr_bias),
        ]
        self.optimizer = torch.optim.Adam([{"params": parameters, "lr": lr} for parameters, lr in groups])
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, [lambda t: 1.0] + [_cosine(how.iterations)] * 2)

    def step(self, iteration):
        """One iteration on a random batch; the loss without regulariser, float32 []."""
        how, network = self.network.how, self.network
        index = torch.randint(len(network.images), (how.batch_size,), generator=self.generator)
        inputs = [self._input(name, index) for _, name in self.inputs]
        loss = total = network.loss(self.part(*inputs)[self.unit.outputs.index(self.unit.output)], self.i, index)
        share = (iteration / how.iterations - how.warmup) / (1 - how.warmup)
        if share >= 0:
            beta = how.beta[0] + (how.beta[1] - how.beta[0]) * share
            total = loss + how.weight_lambda * sum(r.regularizer(beta) for r in self.roundings.values())
        self.optimizer.zero_grad()
        total.backward()
        self.optimizer.step()
        self.schedule.step()
        return loss.detach()

    def _input(self, name, index):
        cache, exact = self.network.cache, ("float", self.network.origins[name])
        if self.network.how.input == "float":
            return cache.rows(exact, index)
        value = cache.rows(("quantized", name), index)
        if self.mixing is None or not self.network.how.drop or name in self.network.first:
            return value
        return torch.lerp(cache.rows(exact, index), value, self.mixing.like(value))

    def snapshot(self):
        """What has been learned so far, for `trace`."""
        h = {name: rounding.h.detach().cpu() for name, rounding in self.roundings.items()}
        return {"h": h, "steps": {name: step.scale.item() for name, step in self.steps.items()}}

    def write(self):
        """Round for good: codes, biases and steps into the quantized network."""
        qmodel = self.network.graphs["quantized"]
        for name, step in self.steps.items():
            qmodel.get_submodule(find_node(qmodel, name).target).scale.copy_(step.scale.detach())
        for name, rounding in self.roundings.items():
            layer = qmodel.get_submodule(find_node(qmodel, name).target)
            q_in = input_qparams(qmodel, name) if qmodel.config.placement == "fused" else None
            write_codes(layer, rounding.codes, rounding.q, rounding.bias, q_in)


def _cosine(iterations):
    return lambda t: 0.5 * (1 + math.cos(math.pi * min(t / iterations, 1)))


def iteration_cost(model, stats, images, config=QuantConfig(), how=ReconstructConfig(), repeats=20):
    """Median seconds of an iteration of every unit, and of a plain float forward and backward pass of the same unit on the same batch
    size: a frame of unit, learning, plain, ratio. They take turns, so that a machine that slows down slows both."""
    images = images if isinstance(images, torch.Tensor) else torch.cat(list(images))
    qmodel = quantize(model, stats, config).to(device())
    network, rows = _Task(prepare(model, config.placement, config.fold_batchnorm)[0], qmodel, images, how), []
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


def compare_on_heldout(model, data, settings, n_calibration=1024, seed=0, limit=None):
    """How the workbook's settings were chosen: name -> (QuantConfig, ReconstructConfig or None for nearest rounding), each measured on
    data.heldout, never on the test set. A frame of setting, top1, drop (points below float on the same images), n."""
    batches, rows = list(data.calibration(n_calibration, seed=seed)), []
    stats, exact = {}, evaluate(model, data.heldout, limit=limit)
    for name, (config, how) in settings.items():
        if config.placement not in stats:
            stats[config.placement] = collect(model, batches, config.placement)
        found = stats[config.placement]
        qmodel = reconstruct(model, found, batches, config, how) if how else quantize(model, found, config)
        result = evaluate(qmodel, data.heldout, limit=limit)
        rows.append({"setting": name, "top1": result.top1, "drop": exact.top1 - result.top1, "n": result.n})
    return pd.DataFrame(rows)


# ---- Finished units on disk -------------------------------------------------------------------------------------------------


def _tensors(qmodel, unit):
    """Everything of a unit that learning changes: name -> tensor, the network's own where it is a parameter or buffer."""
    found = {}
    for name in unit.nodes:
        node = find_node(qmodel, name)
        module = qmodel.get_submodule(node.target) if node.op == "call_module" else None
        if is_quantizer(node, qmodel):
            found[f"{name}.scale"] = module.scale
        elif hasattr(module, "weight_qparams"):
            found |= {f"{name}.weight": module.weight, f"{name}.weight_scale": module.weight_qparams.scale}
            found |= {f"{name}.bias": module.bias} if module.bias is not None else {}
    return {k: v.detach() for k, v in found.items()}


@torch.no_grad()
def _load(qmodel, unit, tensors):
    """Put back what _tensors gave."""
    for name in unit.layers:
        layer = qmodel.get_submodule(find_node(qmodel, name).target)
        layer.weight_qparams = dataclasses.replace(layer.weight_qparams, scale=tensors[f"{name}.weight_scale"].clone())
    for key, tensor in _tensors(qmodel, unit).items():
        tensor.copy_(tensors[key])


class _State:
    """The finished units of a run in a safetensors file, written anew after each; refuses one of other settings."""

    def __init__(self, path, images, config, how, graph_hash):
        self.path, self.rows, self.tensors = path and pathlib.Path(path), [], {}
        settings = dataclasses.asdict(config) | {f"how.{k}": v for k, v in dataclasses.asdict(how).items() if k != "max_cache_bytes"}
        settings |= {"observer": observer_name(config.observer), "network": graph_hash[:16], "n_images": len(images)}
        settings["images"] = hashlib.sha256(images.cpu().contiguous().numpy()).hexdigest()[:16]
        self.settings = json.loads(json.dumps(settings))
        if self.path and self.path.exists():
            self._read()

    def _read(self):
        try:
            with safetensors.safe_open(self.path, "pt") as file:
                metadata = file.metadata() or {}
                self.tensors = {k: file.get_tensor(k) for k in file.keys()}
            there, self.rows = json.loads(metadata["settings"]), json.loads(metadata["rows"])
        except (safetensors.SafetensorError, KeyError, ValueError):
            raise UserError(f"{self.path} is no state of a reconstruction; delete it or name another file") from None
        other = [f"{k} {there.get(k)!r} there, {v!r} now" for k, v in self.settings.items() if there.get(k) != v]
        if other:
            raise UserError(f"{self.path} was made with other settings ({'; '.join(other)}); use those, delete it or name another file")

    def restore(self, qmodel, unit):
        _load(qmodel, unit, self.tensors)

    def add(self, qmodel, unit, rows):
        if self.path:
            self.tensors |= {k: v.cpu().clone() for k, v in _tensors(qmodel, unit).items()}
            self.rows = rows
            save_tensors(self.path, self.tensors, {"settings": json.dumps(self.settings), "rows": json.dumps(rows)})
