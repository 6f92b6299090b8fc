"""What learns while a unit is reconstructed: the rounding of weights, the steps of activations, and the dropping of quantization.

Everything is a handful of elementwise operations with a straight-through gradient: on a CPU torch's own learnable fake-quantize kernels
take 20 times as long.
"""

import math

import torch
from torch import nn

from quantlab.affine import MAX_BITS
from quantlab.quantized import find_quantizer

ZETA, GAMMA = 1.1, -0.1  # AdaRound's stretch of the sigmoid, so that h reaches 0 and 1


class _RoundToStep(torch.autograd.Function):
    """x_hat = s clamp(round(x / s), low, high), an element kept as it is where mask is 0.

    d x_hat / d x = 1 between low and high and 0 elsewhere (straight through); d x_hat / d s = round(x/s) - x/s between, low or high
    elsewhere (LSQ, Esser et al. 2020, arXiv:1902.08153), times LSQ's gradient scale 1 / sqrt(N qmax), N the number of elements.
    In float arithmetic and in place: boolean masks (where, masked_fill) cost ten times as much as a product.
    """

    @staticmethod
    def forward(ctx, x, scale, low, high, mask):
        v = x * (1.0 / scale)
        codes = v.clamp(low, high).round_()
        ctx.low, ctx.high = low, high
        ctx.save_for_backward(v, codes if ctx.needs_input_grad[1] else None, mask)
        x_hat = codes * scale
        return x_hat if mask is None else x_hat.sub_(x).mul_(mask).add_(x)

    @staticmethod
    def backward(ctx, grad):
        v, codes, mask = ctx.saved_tensors
        through = grad if mask is None else grad * mask  # the part that meets the rounding
        inside = torch.ops.aten.hardtanh_backward(through, v, ctx.low, ctx.high)
        scale_grad = None
        if ctx.needs_input_grad[1]:
            scale_grad = (_dot(through, codes) - _dot(inside, v)) / math.sqrt(v.numel() * max(ctx.high, 1))
        return inside if mask is None else inside.sub_(through).add_(grad), scale_grad, None, None, None


def _dot(a, b):
    """Sum of products; one pass where both lie channels last."""
    a, b = (t.permute(0, 2, 3, 1) if t.dim() == 4 else t for t in (a, b))
    return torch.dot(a.reshape(-1), b.reshape(-1))


def round_to_step(x, scale, low, high, mask=None):
    """Differentiable fake quantization of x (float32, any shape) with zero-point taken into low and high (numbers); scale: float32 []."""
    return _RoundToStep.apply(x, scale, low, high, mask)


class Masks:
    """Random masks of ones (probability 1 - drop) and zeros, cut from one pool at random offsets: bernoulli_ costs as much as a layer."""

    def __init__(self, drop, generator):
        self.drop, self.generator, self.pool = drop, generator, torch.empty(0)

    def like(self, x):
        """float32 mask of x's shape and memory layout; None when nothing is dropped."""
        if not self.drop:
            return None
        count = x.numel()
        if len(self.pool) < 2 * count:
            self.pool = (torch.rand(2 * count + 2**20, generator=self.generator) >= self.drop).float().to(x.device)
        start = int(torch.randint(len(self.pool) - count, (), generator=self.generator))
        if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
            n, c, h, w = x.shape
            return self.pool[start : start + count].view(n, h, w, c).permute(0, 3, 1, 2)
        return self.pool[start : start + count].view(x.shape)


class LearnedStep(nn.Module):
    """Stands for a Quantizer while its unit learns: its step is scale * exp(log_step), its zero-point stays.

    Eight-bit codes are never dropped: their error is too small to overfit to, and each mask costs time.
    """

    def __init__(self, quantizer, masks=None, learn=True):
        super().__init__()
        q = quantizer.qparams
        self.register_buffer("start", q.scale.clone())
        self.log_step = nn.Parameter(torch.zeros_like(q.scale), requires_grad=learn)
        zero_point = int(q.zero_point)
        self.low, self.high = q.qmin - zero_point, q.qmax - zero_point
        self.masks = masks if q.bits < MAX_BITS else None

    @property
    def scale(self):
        return self.start * self.log_step.exp()

    def forward(self, x):
        return round_to_step(x, self.scale, self.low, self.high, self.masks.like(x) if self.masks else None)


class LearnedRounding(nn.Module):
    """Stands for a layer while its rounding is learned (AdaRound, Nagel et al. 2020, arXiv:2004.10568):

    w_hat = s (clamp(floor(w / s) + h(V) + z, qmin, qmax) - z),   h(V) = clamp(sigmoid(V) (zeta - gamma) + gamma, 0, 1)
    V starts at h = frac(w / s), that is at the float weight; a weight is rounded up in the end where V >= 0.
    """

    def __init__(self, layer, weight, bias, q, learn_bias=True):
        super().__init__()
        q = q.to(weight.device)
        self.layer, self.q = [layer], q  # in a list, so that its parameters are not this module's
        self.scale, self.zero_point = q.broadcast(weight.dim())
        share = weight.detach() * (1.0 / self.scale)
        self.register_buffer("floor", torch.floor(share) + self.zero_point)
        share = share + self.zero_point - self.floor
        self.v = nn.Parameter(-torch.log((ZETA - GAMMA) / (share - GAMMA) - 1))
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=learn_bias)

    @property
    def h(self):
        """Share by which each weight is rounded up, 0 to 1; float32, the weight's shape."""
        return (torch.sigmoid(self.v) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)

    @property
    def codes(self):
        """The codes learned: int32, the weight's shape."""
        return (self.floor + (self.v >= 0)).clamp(self.q.qmin, self.q.qmax).int()

    def regularizer(self, beta):
        """sum(1 - |2h - 1|^beta): 0 when every h is 0 or 1."""
        return (1 - (2 * self.h - 1).abs().pow(beta)).sum()

    def forward(self, x):
        weight = self.scale * ((self.floor + self.h).clamp(self.q.qmin, self.q.qmax) - self.zero_point)
        return torch.func.functional_call(self.layer[0], {"weight": weight} | ({} if self.bias is None else {"bias": self.bias}), x)


def learnable(part, graph, masks=None, learn_steps=True, learn_bias=True):
    """Swap the layers and Quantizers of `part` for their stand-ins; (layer -> LearnedRounding, quantizer -> LearnedStep) by node name.

    graph: the float graph, whose weights and biases are the start.
    """
    roundings, steps, named = {}, {}, {n.name: n for n in graph.graph.nodes}
    for node in [n for n in part.graph.nodes if n.op == "call_module"]:
        module = part.get_submodule(node.target)
        if find_quantizer(part, node) is not None:
            steps[node.name] = LearnedStep(module, masks, learn_steps)
            part.set_submodule(node.target, steps[node.name])
        elif hasattr(module, "weight_qparams"):
            exact = graph.get_submodule(named[node.name].target)
            roundings[node.name] = LearnedRounding(module, exact.weight, exact.bias, module.weight_qparams, learn_bias)
            part.set_submodule(node.target, roundings[node.name])
    return roundings, steps
