"""End-to-end tuning: the steps and biases of a finished quantized network, learned jointly against the float network's logits."""

import dataclasses
import math

import torch
from torch import nn
from tqdm.auto import tqdm

from quantlab.affine import quantize as to_codes
from quantlab.calibration import prepare
from quantlab.learned import LearnedStep
from quantlab.ptq import copy_quantized, find_node, input_qparams, layers, write_codes
from quantlab.runtime import UserError, device, exact_float
from quantlab.units import is_quantizer


class _LearnedScale(nn.Module):
    """Stands for a quantized layer while its scales and bias are learned; its codes stay."""

    def __init__(self, layer):
        super().__init__()
        self.layer = [layer]
        self.register_buffer("weight", layer.weight.detach())
        self.log_scale = nn.Parameter(torch.zeros_like(layer.weight_qparams.broadcast(layer.weight.dim())[0].to(layer.weight.device)))
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone())

    def forward(self, x):
        values = {"weight": self.weight * self.log_scale.exp()}
        return torch.func.functional_call(self.layer[0], values | ({} if self.bias is None else {"bias": self.bias}), x)


def tune_end_to_end(model, qmodel, images, iterations=300, lr=1e-3, batch_size=64, temperature=4.0, flip=False, seed=0, verbose=True):
    """A copy of qmodel with activation steps, weight scales and biases learned together; every weight keeps its code.

    loss = KL(softmax(z / T) || softmax(z_q / T)) T^2 between the float network's logits z and the quantized one's, on random batches of
    `images` (float32 [N, 3, H, W] or an iterable of batches); no labels. Adam, relative steps, lr falling to 0 as a cosine. flip: every
    image is mirrored with probability 1/2, the float network giving the target for what it is shown. An extra beyond BRECQ and QDrop.
    """
    images = images if isinstance(images, torch.Tensor) else torch.cat(list(images))
    if len(images) < batch_size:
        raise UserError(f"{len(images)} calibration images do not fill a batch of {batch_size}; give more, or a smaller batch_size")
    graph = prepare(model, qmodel.config.placement, qmodel.config.fold_batchnorm)[0].to(device()).requires_grad_(False)
    tuned, learning = copy_quantized(qmodel).to(device()), copy_quantized(qmodel).to(device())
    steps, scales = _swap(learning)
    parameters = [s.log_step for s in steps.values()] + [p for s in scales.values() for p in s.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.5 * (1 + math.cos(math.pi * t / iterations)))
    generator = torch.Generator().manual_seed(seed)
    with exact_float(), tqdm(range(iterations), desc="tune", leave=False, disable=not verbose) as progress:
        for _ in progress:
            index = torch.randint(len(images), (batch_size,), generator=generator)
            batch = images[index].to(device()).contiguous(memory_format=torch.channels_last)
            if flip and torch.rand((), generator=generator) < 0.5:
                batch = batch.flip(-1)
            with torch.no_grad():
                target = (graph(batch) / temperature).log_softmax(1)
            loss = nn.functional.kl_div((learning(batch) / temperature).log_softmax(1), target, log_target=True, reduction="batchmean")
            optimizer.zero_grad()
            (loss * temperature**2).backward()
            optimizer.step()
            schedule.step()
    return _write(tuned, steps, scales)


def _swap(network):
    steps, scales = {}, {}
    for node in list(network.graph.nodes):
        module = network.get_submodule(node.target) if node.op == "call_module" else None
        if is_quantizer(node, network):
            steps[node.name] = LearnedStep(module)
            network.set_submodule(node.target, steps[node.name])
        elif hasattr(module, "weight_qparams"):
            scales[node.name] = _LearnedScale(module)
            network.set_submodule(node.target, scales[node.name])
    return steps, scales


@torch.no_grad()
def _write(tuned, steps, scales):
    for name, step in steps.items():
        tuned.get_submodule(find_node(tuned, name).target).scale.copy_(step.scale)
    for name in layers(tuned, tuned.plan):
        layer, learned = tuned.get_submodule(find_node(tuned, name).target), scales[name]
        q = layer.weight_qparams
        codes = to_codes(layer.weight.detach().cpu(), q)
        scaled = dataclasses.replace(q, scale=q.scale * learned.log_scale.exp().cpu().view(q.scale.shape))
        write_codes(layer, codes, scaled, learned.bias, input_qparams(tuned, name) if tuned.config.placement == "fused" else None)
    return tuned
