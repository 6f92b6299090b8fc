"""What learns: the steps of activations, the rounding or the codes of weights, and what is dropped.

    steps, layers = swap(part, LearnedStep, make_layer)     # stand-ins for Quantizers and layers
    ...                                                     # gradient descent on their parameters
    write_learned(qmodel, steps, layers)                    # what they learned, into the network

Everything is a handful of elementwise operations with a straight-through gradient: on a CPU torch's
own learnable fake-quantize kernels take 20 times as long.
"""

import dataclasses
import math

import torch
from torch import nn

from quantlab.affine import MAX_BITS, quantize_tensor
from quantlab.quantized import find_node, find_quantizer

ZETA, GAMMA = 1.1, -0.1  # AdaRound's stretch of the sigmoid, so that h reaches 0 and 1
NEAR = 0.49  # how far from its code a weight may lie when its learning starts, in codes


# ---- Steps of activations ------------------------------------------------------------------------


def round_to_step(x, scale, low, high, mask=None):
    """x_hat = s round(clamp(x / s, low, high)), differentiable: LSQ (arXiv:1902.08153), eq. 1 to 3.

    d x_hat / d x = 1 between low and high and 0 elsewhere (straight through);
    d x_hat / d s = round(x/s) - x/s between, low or high elsewhere; times 1 / sqrt(N high), with N
    the number of elements.

    x: float32, any shape. scale: float32 []. low, high: numbers, the first and last code with the
    zero-point taken off. mask: float32 like x, 0 for elements that stay as they are.
    """
    return _RoundToStep.apply(x, scale, low, high, mask)


class _RoundToStep(torch.autograd.Function):
    """In float arithmetic and in place: boolean masks (where, masked_fill) cost ten times as much
    as a product.
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
            gain = math.sqrt(v.numel() * max(ctx.high, 1))
            scale_grad = (_dot(through, codes) - _dot(inside, v)) / gain
        x_grad = inside if mask is None else inside.sub_(through).add_(grad)
        return x_grad, scale_grad, None, None, None


def _dot(a, b):
    """Sum of products; one pass where both lie channels last."""
    a, b = (t.permute(0, 2, 3, 1) if t.dim() == 4 else t for t in (a, b))
    return torch.dot(a.reshape(-1), b.reshape(-1))


class Masks:
    """Random masks of ones (probability 1 - drop) and zeros, cut from one pool at random offsets:
    bernoulli_ costs as much as a layer.
    """

    def __init__(self, drop, generator):
        self.drop, self.generator, self.pool = drop, generator, torch.empty(0)

    def like(self, x):
        """float32 mask of x's shape and memory layout; None when nothing is dropped."""
        if not self.drop:
            return None
        count = x.numel()
        if len(self.pool) < 2 * count:
            drawn = torch.rand(
                2 * count + 2**20, generator=self.generator, dtype=torch.float32)
            self.pool = (drawn >= self.drop).float().to(x.device)
        start = int(torch.randint(len(self.pool) - count, (), generator=self.generator))
        flat = self.pool[start : start + count]
        if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
            n, c, h, w = x.shape
            return flat.view(n, h, w, c).permute(0, 3, 1, 2)
        return flat.view(x.shape)


class LearnedStep(nn.Module):
    """Stands for a Quantizer while its step, scale * exp(log_step), is learned.

    Its zero-point stays. Eight-bit codes are never dropped: their error is too small to overfit to,
    and each mask costs time.
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
        mask = self.masks.like(x) if self.masks else None
        return round_to_step(x, self.scale, self.low, self.high, mask)


# ---- Weights -------------------------------------------------------------------------------------


class LearnedLayer(nn.Module):
    """Stands for a quantized layer while it learns; subclasses give `weight`, `codes`, `qparams`.

    `layer` is the module it stands for, `q` the QParams of its weight where learning starts, `bias`
    float32 [C] where learning starts, or None.
    """

    def __init__(self, layer, q, bias, learn_bias=True):
        super().__init__()
        self.layer = [layer]  # in a list, so that its parameters are not this module's
        self.q = q.to(layer.weight.device)
        self.scale, self.zero_point = self.q.broadcast(layer.weight.dim())
        self.bias = None
        if bias is not None:
            self.bias = nn.Parameter(bias.detach().clone(), requires_grad=learn_bias)

    def forward(self, x):
        values = {"weight": self.weight}
        if self.bias is not None:
            values["bias"] = self.bias
        return torch.func.functional_call(self.layer[0], values, x)


class LearnedRounding(LearnedLayer):
    """Every code is one of the two beside the float weight (AdaRound, Nagel et al. 2020,
    arXiv:2004.10568):

    w_hat = s (clamp(floor(w / s) + h(V) + z, qmin, qmax) - z)
    h(V) = clamp(sigmoid(V) (zeta - gamma) + gamma, 0, 1)
    V starts at h = frac(w / s), that is at the float weight; a weight is rounded up in the end
    where V >= 0. exact: the float layer.
    """

    def __init__(self, layer, exact, q, learn_bias=True):
        super().__init__(layer, q, exact.bias, learn_bias)
        codes = exact.weight.detach() * (1.0 / self.scale)
        self.register_buffer("floor", torch.floor(codes) + self.zero_point)
        fraction = codes + self.zero_point - self.floor
        self.v = nn.Parameter(-torch.log((ZETA - GAMMA) / (fraction - GAMMA) - 1))

    @property
    def h(self):
        """Fraction by which each weight is rounded up, 0 to 1; float32, the weight's shape."""
        return (torch.sigmoid(self.v) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)

    @property
    def weight(self):
        codes = (self.floor + self.h).clamp(self.q.qmin, self.q.qmax)
        return self.scale * (codes - self.zero_point)

    @property
    def codes(self):
        """The codes learned: int32, the weight's shape."""
        return (self.floor + (self.v >= 0)).clamp(self.q.qmin, self.q.qmax).int()

    @property
    def qparams(self):
        return self.q

    def regularizer(self, beta):
        """sum(1 - |2h - 1|^beta): 0 when every h is 0 or 1."""
        return (1 - (2 * self.h - 1).abs().pow(beta)).sum()


class LearnedCodes(LearnedLayer):
    """The scales of the weight are learned and, given the float weight, the codes themselves:

    weight = s exp(log_scale) (round(clamp(latent, qmin - 1/2, qmax + 1/2)) - z)

    with the rounding straight through. `latent` is the float weight in units of its code, brought
    to within half a code of the code that the layer has, so that learning starts from the network
    as it is. exact: the float layer; None: every weight keeps its code.
    """

    def __init__(self, layer, exact=None):
        super().__init__(layer, layer.weight_qparams, layer.bias)
        latent = quantize_tensor(layer.weight.detach(), self.q).float()
        if exact is not None:
            wanted = exact.weight.detach() / self.scale + self.zero_point
            latent = torch.clamp(wanted, latent - NEAR, latent + NEAR)
        self.latent = nn.Parameter(latent, requires_grad=exact is not None)
        self.log_scale = nn.Parameter(torch.zeros_like(self.scale))

    @property
    def weight(self):
        latent = self.latent.clamp(self.q.qmin - 0.5, self.q.qmax + 0.5)
        # the value of the first term, the gradient of the second
        codes = self._rounded + (latent - latent.detach())
        return (codes - self.zero_point) * (self.scale * self.log_scale.exp())

    @property
    def _rounded(self):
        return self.latent.detach().round().clamp(self.q.qmin, self.q.qmax)

    @property
    def codes(self):
        """The codes learned: int32, the weight's shape."""
        return self._rounded.int()

    @property
    def qparams(self):
        factor = self.log_scale.detach().exp().view(self.q.scale.shape)
        return dataclasses.replace(self.q, scale=self.q.scale * factor)


# ---- Into a network and out of it ----------------------------------------------------------------


def learn_only(graph, layers):
    """Ask for gradients of the named layers' parameters and of no others; the graph, changed."""
    graph.requires_grad_(False)
    for name in layers:
        graph.get_submodule(find_node(graph, name).target).requires_grad_(True)
    return graph


def swap(part, make_step, make_layer):
    """Put stand-ins in the place of the Quantizers and quantized layers of a graph; two dicts, node
    name -> stand-in.

    make_step(quantizer) gives the one, make_layer(name, layer) the other.
    """
    steps, layers = {}, {}
    for node in [n for n in part.graph.nodes if n.op == "call_module"]:
        module = part.get_submodule(node.target)
        if find_quantizer(part, node) is not None:
            steps[node.name] = make_step(module)
            part.set_submodule(node.target, steps[node.name])
        elif hasattr(module, "weight_qparams"):
            layers[node.name] = make_layer(node.name, module)
            part.set_submodule(node.target, layers[node.name])
    return steps, layers


@torch.no_grad()
def write_learned(qmodel, steps, layers):
    """Round for good: the steps, codes, scales and biases of stand-ins into the network."""
    for name, step in steps.items():
        find_quantizer(qmodel, find_node(qmodel, name)).scale.copy_(step.scale)
    for name, layer in layers.items():
        qmodel.write(name, layer.codes, layer.qparams, layer.bias)
