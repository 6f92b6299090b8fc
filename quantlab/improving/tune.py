"""End-to-end tuning: the steps, scales, biases and, if wanted, weights of a finished quantized network, learned together.

    tuned = tune_end_to_end(model, qmodel, images)                                        # every weight keeps its code
    tuned = tune_end_to_end(model, qmodel, images, learn_weights=True, flip=True)         # codes may move

The float network's logits are the target; no labels. Learning everything at once is QFT (Finkelstein et al. 2022, arXiv:2212.02634), here
from where reconstruction ended.
"""

import copy
import dataclasses
import math

import torch
from torch import nn
from tqdm.auto import tqdm

from quantlab.affine import quantize_tensor
from quantlab.graph import folded
from quantlab.improving.learned import LearnedStep
from quantlab.quantized import find_node, find_quantizer
from quantlab.system.errors import UserError
from quantlab.system.machine import device, exact_float

BATCH = 256  # images at once for the targets
NEAR = 0.49  # codes: how far from its code a weight may lie when its learning starts


class _LearnedLayer(nn.Module):
    """Stands for a quantized layer while its scales, its bias and, given the float weights, its codes are learned.

    weight = s exp(log_scale) (round(clamp(latent, qmin - 1/2, qmax + 1/2)) - z), the rounding straight through. `latent` is the float weight
    in units of its code, brought to within half a code of the code that was learned, so that tuning starts from the network as it is.
    """

    def __init__(self, layer, exact=None):
        super().__init__()
        self.layer, self.q = [layer], layer.weight_qparams.to(layer.weight.device)
        self.scale, self.zero_point = self.q.broadcast(layer.weight.dim())
        latent = quantize_tensor(layer.weight.detach(), self.q).float()
        if exact is not None:
            latent = torch.clamp(exact.detach() / self.scale + self.zero_point, latent - NEAR, latent + NEAR)
        self.latent = nn.Parameter(latent, requires_grad=exact is not None)
        self.log_scale = nn.Parameter(torch.zeros_like(self.scale))
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone())

    @property
    def codes(self):
        """Codes as float32, the weight's shape."""
        return self.latent.detach().round().clamp(self.q.qmin, self.q.qmax)

    def forward(self, x):
        latent = self.latent.clamp(self.q.qmin - 0.5, self.q.qmax + 0.5)
        codes = self.codes + (latent - latent.detach())  # the value of the first term, the gradient of the second
        values = {"weight": (codes - self.zero_point) * (self.scale * self.log_scale.exp())}
        return torch.func.functional_call(self.layer[0], values | ({} if self.bias is None else {"bias": self.bias}), x)


def tune_end_to_end(
    model, qmodel, images, iterations=250, lr=1e-3, lr_weights=2e-3, learn_weights=False, flip=False, batch_size=64, temperature=4.0, seed=0, verbose=True
):
    """A copy of qmodel with activation steps, weight scales and biases learned together.

    images: float32 [N, 3, H, W] or an iterable of batches. loss = KL(softmax(z / T) || softmax(z_q / T)) T^2 between the float network's
    logits z and the quantized one's, on random batches. Adam, falling to 0 as a cosine from lr (relative, for biases absolute). learn_weights:
    codes may move too, at lr_weights (in codes); without it every weight keeps its code. flip: every image is mirrored with probability 1/2.
    Raises UserError for fewer images than a batch and for settings that are not positive.
    """
    images = images if isinstance(images, torch.Tensor) else torch.cat(list(images))
    if len(images) < batch_size:
        raise UserError(f"{len(images)} calibration images do not fill a batch of {batch_size}; give more, or a smaller batch_size")
    if iterations < 1 or min(lr, lr_weights, temperature) <= 0:
        raise UserError(f"iterations={iterations}, lr={lr}, lr_weights={lr_weights} and temperature={temperature} are positive numbers")
    graph = folded(model).to(device()).requires_grad_(False)
    tuned = copy.deepcopy(qmodel).to(device())
    learning = copy.deepcopy(qmodel).to(device())
    steps, learned = _swap(learning, graph if learn_weights else None)
    latent = [layer.latent for layer in learned.values() if learn_weights]
    rest = [p for module in (*steps.values(), *learned.values()) for name, p in module.named_parameters() if name != "latent"]
    optimizer = torch.optim.Adam([{"params": rest, "lr": lr}] + ([{"params": latent, "lr": lr_weights}] if latent else []))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.5 * (1 + math.cos(math.pi * t / iterations)))
    generator = torch.Generator().manual_seed(seed)
    with exact_float(), tqdm(range(iterations), desc="tune", leave=False, disable=not verbose) as progress:
        targets = torch.stack([_log_softmax(graph, shown, temperature) for shown in (images, images.flip(-1))[: 1 + flip]])
        for _ in progress:
            index = torch.randint(len(images), (batch_size,), generator=generator)
            mirrored = torch.rand(batch_size, generator=generator) < 0.5 if flip else torch.zeros(batch_size, dtype=torch.bool)
            batch = images[index]
            batch[mirrored] = batch[mirrored].flip(-1)
            output = (learning(batch.to(device()).contiguous(memory_format=torch.channels_last)) / temperature).log_softmax(1)
            loss = temperature**2 * nn.functional.kl_div(output, targets[mirrored.long(), index], log_target=True, reduction="batchmean")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            progress.set_postfix(loss=f"{loss.item():.3g}")
    return _write(tuned, steps, learned)


@torch.no_grad()
def _log_softmax(graph, images, temperature):
    return torch.cat([(graph(batch.to(device())) / temperature).log_softmax(1) for batch in images.split(BATCH)])


def _swap(network, graph):
    """Stand-ins for the Quantizers and layers of `network`; graph: the float one, whose weights are the start, or None."""
    steps, learned = {}, {}
    for node in list(network.graph.nodes):
        module = network.get_submodule(node.target) if node.op == "call_module" else None
        if find_quantizer(network, node) is not None:
            steps[node.name] = LearnedStep(module)
            network.set_submodule(node.target, steps[node.name])
        elif hasattr(module, "weight_qparams"):
            exact = graph and graph.get_submodule(find_node(graph, node.name).target).weight
            learned[node.name] = _LearnedLayer(module, exact)
            network.set_submodule(node.target, learned[node.name])
    return steps, learned


@torch.no_grad()
def _write(tuned, steps, learned):
    for name, step in steps.items():
        tuned.get_submodule(find_node(tuned, name).target).scale.copy_(step.scale)
    for name, found in learned.items():
        q = tuned.layers[name].weight_qparams
        q = dataclasses.replace(q, scale=q.scale * found.log_scale.exp().to(q.scale.device).view(q.scale.shape))
        tuned.write(name, found.codes.int(), q, found.bias)
    return tuned
