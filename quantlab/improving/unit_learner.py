"""One unit while its rounding, its activation steps and its biases are learned."""

import math

import torch

from quantlab.improving.learned import Masks, learnable
from quantlab.quantized import find_node


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
            qmodel.write(name, rounding.codes, rounding.q, rounding.bias)


def _cosine(iterations):
    return lambda t: 0.5 * (1 + math.cos(math.pi * min(t / iterations, 1)))
