# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 11 · Questions, answered by measuring
#
# **Question.** The original README asks six questions and answers them in words. What are the answers in
# numbers?
#
# **Seen.** [What a full run showed](../results/pages/11_questions-resnet20-cifar10-jpeg.md), without running it.
#
# **Cost.** Half a minute on the digits; for ResNet-20 on 10,000 test images about ten minutes on two CPU
# cores, nearly all of it evaluation (47 networks); for ResNet-50 minutes on an accelerator, many hours
# without. Rows are recorded one by one.

# %%
import os
import subprocess
import sys

# fetch the workbook
if "google.colab" in sys.modules and not os.path.isdir("quantlab"):
    address, branch = "", "main"
    clone = ["git", "clone", "--depth", "1", "-b", branch, address, "workbook"]
    if not os.path.isdir("workbook"):
        subprocess.run(clone, capture_output=True)
    if not os.path.isfile("workbook/quantlab/affine.py"):
        sys.exit(f"{address!r} is not this workbook; python -m quantlab address URL")
    os.chdir("workbook")
    sys.path.insert(0, os.getcwd())
    subprocess.check_call([sys.executable, "-m", "quantlab.system.missing"])

# %%
import copy
import dataclasses
import functools
import itertools

import pandas as pd
import quantlab as ql
import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

# %%
from quantlab import observers, plots, ptq
from quantlab.calibration import collect_edges, watch
from quantlab.graph import find_kinds, folded, normalize, trace
from quantlab.integer.fixedpoint import Requantization, fixed_point, signed_bits
from quantlab.plan import make_plan
from quantlab.plots import questions
from quantlab.quantized import add_quantizer, edge_name, find_node, find_quantizer
from quantlab.system.comparing import decibels
from quantlab.workbook.study import Study, show

# %% tags=["parameters"]
data = "auto"  # auto, cifar10, digits, images, or the path of a folder or archive
model = "resnet20"  # resnet20 or resnet50
checkpoint = "auto"  # auto, or the path of a .safetensors file
seed = 0
preset = "auto"  # smoke, full, or auto: smoke on the digits
bits = 4  # 2 to 8, for the pictures in sections 4 and 5
n_calibration = 0  # 0: 256 in a smoke run, 1,024 in a full one
n_sample = 0  # images in sections 2, 3 and 5; 0: 16 in a smoke run, 64 in a full one

# %%
study = Study(
    data, model, checkpoint, preset,
    n_calibration=n_calibration, seed=seed, notebook="11_questions",
)
network, n_calibration = study.network, study.n_calibration
n_sample = study.choose(n_sample, smoke=16, full=64)
sample = next(iter(study.calibration(batch_size=n_sample)))
depths = (3,) if study.smoke else (8, 4, 3)  # bits in sections 6 and 7
widths = (8, 4, 3) if study.smoke else (8, 6, 4, 3, 2)  # in sections 2 and 8


# %% [markdown]
# ## 1. Int8, uint8 and float32
# The original's table, computed. A format with $e$ exponent and $m$ mantissa bits has $2^{e+m+1}$ bit
# patterns. One exponent is kept for NaN and infinities, and zero has two signs. So $2^{32}$ patterns are
# fewer different numbers; for float16 they can be counted one by one.

# %%
def integer_row(dtype):
    info = torch.iinfo(dtype)
    count = {"bit patterns": 2**info.bits, "different numbers": 2**info.bits}
    steps = {"step at 1": 1, "step at the largest": 1}
    return {"smallest": info.min, "largest": info.max, **count, **steps}

def float_row(dtype, exponent):
    info = torch.finfo(dtype)
    mantissa = info.bits - 1 - exponent
    numbers = 2**info.bits - 2 ** (mantissa + 1) - 1
    last_step = info.max * info.eps / (2 - info.eps)
    count = {"bit patterns": 2**info.bits, "different numbers": numbers}
    steps = {"step at 1": info.eps, "step at the largest": last_step}
    return {"smallest": info.min, "largest": info.max, **count, **steps}


# %%
def text_of(number):
    return f"{number:,}" if isinstance(number, int) else f"{number:.6g}"

rows = {
    "int8": integer_row(torch.int8), "uint8": integer_row(torch.uint8),
    "float16": float_row(torch.float16, 5), "float32": float_row(torch.float32, 8),
}
patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
halves = patterns.view(torch.float16)
counted = len(halves[torch.isfinite(halves)].double().unique())
assert counted == rows["float16"]["different numbers"], "counted one by one"
texts = {name: {k: text_of(v) for k, v in row.items()} for name, row in rows.items()}
show(pd.DataFrame(texts).T)

# %% [markdown]
# The largest float32 is $(2 - 2^{-23})\cdot 2^{127}$; the original's table lacks the minus sign in the
# exponent. Integers have the same step everywhere, floats a step that grows with the number: that is the
# difference that matters, not the count.

# %%
assert torch.finfo(torch.float32).max == (2 - 2.0**-23) * 2.0**127


# %% [markdown]
# ## 2. The dataflow of one convolution, BatchNorm and ReLU
# *"Explain the bit-accuracy at each step."* BatchNorm is folded, then everything between two sets of
# 8-bit codes is integers:
#
# $$ a = \sum (x_q - z_x)\,w_q + b_q, \qquad y_q = \mathrm{clamp}\big(z_y + \mathrm{round}(a\,M)\big), \qquad M = \frac{s_x s_w}{s_y} \approx m\,2^{k-31} $$
#
# The real number $M$, one a channel, is the only thing that is not an integer. It becomes a 31-bit
# integer $m$ and a shift, and the ReLU becomes the lower end of the clamp. First what a convolution of a
# quantized network consists of:

# %%
@dataclasses.dataclass(frozen=True)
class Conv:
    """A convolution in codes, on the CPU; w and b: float64 that hold integers."""

    module: nn.Conv2d  # stride, padding, dilation, groups
    w: torch.Tensor
    b: torch.Tensor
    scale: torch.Tensor  # s_x * s_w, one a channel
    q_in: ql.QParams
    q_out: ql.QParams
    relu: bool

def convolutions(qmodel):
    return [n for n, layer in qmodel.layers.items() if isinstance(layer, nn.Conv2d)]


# %%
def take(qmodel, name):
    """The Conv of that name; a Quantizer stands behind it or behind its ReLU."""
    follower = next(iter(find_node(qmodel, name).users))
    relu = find_kinds(qmodel)[follower] == "clamp"
    writer = next(iter(follower.users)) if relu else follower
    return Conv(
        qmodel.layers[name], qmodel.codes(name).double(),
        qmodel.bias_codes(name).double(), qmodel.bias_scale(name),
        q_in=qmodel.reads(name).to("cpu"),
        q_out=find_quantizer(qmodel, writer).qparams.to("cpu"), relu=relu,
    )


# %%
def codes_read(qmodel):
    """layer -> int32 codes that it reads of the sample images, on the CPU."""
    nodes = {n: find_node(qmodel, n).args[0].name for n in convolutions(qmodel)}
    values = {}

    def keep(node, value):
        values[node] = value.cpu()

    watch(qmodel, set(nodes.values()), keep, [sample])
    found = {}
    for name, node in nodes.items():
        q = qmodel.reads(name).to("cpu")
        found[name] = ql.quantize_tensor(values[node], q)
    return found


# %% [markdown]
# Now the integers. float64 holds every one of them exactly (they stay below $2^{53}$), so torch's
# convolution can do the sums.

# %%
def convolve(x, w, b, module):
    options = (module.stride, module.padding, module.dilation, module.groups)
    return F.conv2d(x, w, b, *options)

def products(conv, codes):
    """The sums of products, float64 [N, C, H, W] that holds integers."""
    return convolve((codes - conv.q_in.zero_point).double(), conv.w, None, conv.module)

def by_channel(vector):
    return vector.view(1, -1, 1, 1)

def accumulators(conv, codes):
    return (products(conv, codes) + by_channel(conv.b)).long()


# %%
@functools.lru_cache(maxsize=len(widths))  # the equal widths are wanted again
def quantized(weight_bits, act_bits):
    config = ql.QuantConfig(weight_bits=weight_bits, act_bits=act_bits)
    return ql.quantize(network, study.stats, config)

qmodel = quantized(8, 8)
codes = codes_read(qmodel)
first = convolutions(qmodel)[0]
conv, x_q = take(qmodel, first), codes[first]
sums = products(conv, x_q)
total = accumulators(conv, x_q)

# %% [markdown]
# Multiplying by $M$ without floating point, by hand: $m$ is the mantissa in 31 bits, $2^{k-31}$ a shift
# to the right, and half of the last place is added first, so that the shift rounds.

# %%
M = conv.scale / conv.q_out.scale.double()
mantissa, k = torch.frexp(M)  # M = mantissa * 2^k, 0.5 <= mantissa < 1
m = torch.round(mantissa * 2**31).long()

def times_M(a):
    """a * m, and (a * m + half) >> (31 - k), int64 [N, C, H, W]."""
    product, shift = a * by_channel(m), by_channel(31 - k.long())
    return product, (product + (1 << (shift - 1))) >> shift

scaled, shifted = times_M(total)
z_y = int(conv.q_out.zero_point)
lowest = z_y if conv.relu else conv.q_out.qmin  # the ReLU
written = (shifted + z_y).clamp(lowest, conv.q_out.qmax)


# %% [markdown]
# The package's `fixed_point` and `Requantization` are these lines; from here on they stand for them.

# %%
def requantization(conv):
    multiplier, shift = fixed_point(conv.scale / conv.q_out.scale.double())
    z = int(conv.q_out.zero_point)
    low = z if conv.relu else conv.q_out.qmin
    both = (by_channel(multiplier), by_channel(shift))
    return Requantization(*both, z, low, conv.q_out.qmax)

by_package = requantization(conv)
assert torch.equal(by_package.multiplier.flatten(), m.int())
assert torch.equal(by_package.shift.flatten(), k.int())
assert torch.equal(by_package(total), written.int())


# %% [markdown]
# Every intermediate of the first layer with the range that occurs on calibration images, and the widest
# range that any input at all could bring about with these weights. The width of an integer counts a sign
# bit where something is negative.

# %%
def width(low, high):
    """Bits of the integers low..high."""
    unsigned = low >= 0
    bits = high.bit_length() if unsigned else max(high, -low - 1).bit_length() + 1
    assert bits == signed_bits(low, high) - unsigned  # the package always has a sign
    return bits

def ends(tensor):
    return int(tensor.min()), int(tensor.max())


# %%
def worst_sums(conv):
    """Sums of products, int64 [2, C]: lowest and highest that any input can cause."""
    low = conv.w * (conv.q_in.qmin - int(conv.q_in.zero_point))
    high = conv.w * (conv.q_in.qmax - int(conv.q_in.zero_point))
    lowest, highest = torch.minimum(low, high), torch.maximum(low, high)
    return torch.stack([t.flatten(1).sum(1) for t in (lowest, highest)]).long()


# %% [markdown]
# One output pixel is followed from its input to its code: of the first image the one whose code is
# nearest to 100. Of its products one is shown, that of the middle of the filter.

# %%
place = torch.unravel_index((written[0] - 100).abs().argmin(), written[0].shape)
channel, row, column = (int(i) for i in place)
at = (0, channel, row, column)
stride, kernel = conv.module.stride, conv.module.kernel_size
x_here = int(x_q[0, 0, row * stride[0], column * stride[1]])
w_here = int(conv.w[channel, 0, kernel[0] // 2, kernel[1] // 2])
z_x, q_in, q_out = int(conv.q_in.zero_point), conv.q_in, conv.q_out

worst = worst_sums(conv)
worst_total = worst + conv.b.long()
worst_scaled, worst_shifted = times_M(worst_total.view(2, -1, 1, 1))

# %%
example = f"{int(shifted[at])}, by {31 - int(k[channel])} bits"
codes_in, codes_out = (q_in.qmin, q_in.qmax), (q_out.qmin, q_out.qmax)
centred = (q_in.qmin - z_x, q_in.qmax - z_x)
flow = [
    ("input code", "uint8", x_q, codes_in, x_here),
    ("minus zero-point", "int16", x_q - z_x, centred, x_here - z_x),
    ("weight code", "int8", conv.w, (-127, 127), w_here),
    ("sum of products", "int32", sums, ends(worst), f"{int(sums[at]):,}"),
    ("bias code", "int32", conv.b, ends(conv.b), f"{int(conv.b[channel]):,}"),
    ("plus bias", "int32", total, ends(worst_total), f"{int(total[at]):,}"),
    ("multiplier", "int32", m, (2**30, 2**31 - 1), f"{int(m[channel]):,}"),
    ("times multiplier", "int64", scaled, ends(worst_scaled), f"{scaled[at]:.2e}"),
    ("shifted right", "int32", shifted, ends(worst_shifted), example),
    ("clamped: ReLU", "uint8", written, codes_out, int(written[at])),
]


# %%
def line(step, container, seen, worst, example):
    (low, high), (worst_low, worst_high) = ends(seen), worst
    return {
        "step": step, "container": container, "low": low, "high": high,
        "bits": width(low, high), "worst_low": worst_low, "worst_high": worst_high,
        "worst_bits": width(worst_low, worst_high), "example": example,
    }

steps = pd.DataFrame([line(*part) for part in flow])
show(steps.drop(columns="example"))

# %%
graph = folded(network).cpu()  # float, BatchNorm folded
layer = graph.get_submodule(find_node(graph, first).target)
with torch.no_grad():
    exact = convolve(sample, layer.weight, layer.bias, layer)[at].item()
exact = max(exact, 0) if conv.relu else exact
step = q_out.scale.item()
decoded = step * (int(written[at]) - z_y)
print(f"code {int(written[at])} decodes to {decoded:.4f}")
print(f"the same layer in float gives {exact:.4f}; a step is {step:.4f}")

# %%
s_x, s_w = q_in.scale.item(), conv.scale[channel].item() / q_in.scale.item()
grids = {
    "input code": f"s_x = {s_x:.3g}, z_x = {z_x}",
    "minus zero-point": f"z_x = {z_x}",
    "weight code": f"s_w = {s_w:.3g}, z_w = 0",
    "bias code": "s_b = s_x · s_w, z_b = 0",
    "multiplier": f"s_x · s_w / s_y = {M[channel].item():.2e}",
    "clamped: ReLU": f"plus z_y = {z_y}; s_y = {step:.3g}",
    "de-quantized": "s_y · (code - z_y)",
}

# %%
low, high = (step * (end - z_y) for end in ends(written))
real = {"low": low, "high": high, "example": f"{decoded:.3f}"}
real = pd.DataFrame([{"step": "de-quantized", "container": "float32", **real}])
steps = pd.concat([steps.astype(object), real], ignore_index=True)
steps["grid"] = steps.step.map(grids).fillna("")

# %%
title = f"{first} + BatchNorm + ReLU in integers, {conv.w[0].numel()} products a sum; "
title += f"“here” is one output: code {int(written[at])} = {decoded:.3f}"
text = "calibration images, 8 bits; ranges seen on them, and the worst any input can "
text += "cause; input and weight of one tap"
figure = questions.dataflow(steps, study.caption(len(sample), text), title)
study.save(figure, "11_dataflow")


# %% [markdown]
# No single layer needs 32 bits. What the widest of all layers needs, at every width of weights and
# activations (the image keeps 8 bits):

# %%
def bits_needed(conv, codes):
    levels = conv.q_in.qmax - conv.q_in.qmin
    largest = int(conv.w.abs().max()) * levels
    found = {
        "product": (-largest, largest),
        "bias": ends(conv.b),
        "accumulator, seen": ends(accumulators(conv, codes)),
        "accumulator, worst case": ends(worst_sums(conv) + conv.b.long()),
    }
    return {name: width(*pair) for name, pair in found.items()}


# %%
needed = {}
for b in widths:
    own, read = quantized(b, b), codes_read(quantized(b, b))
    layers = [bits_needed(take(own, n), read[n]) for n in read]
    needed[f"{b} bits"] = pd.DataFrame(layers).max()
needed = pd.DataFrame(needed).rename_axis("bits needed, widest layer")
assert needed.max().max() < 32, "none needs the whole int32"
show(needed)


# %% [markdown]
# ## 3. "Freeze": multipliers computed in advance
# *"Some parameters can be pre-calculated."* Step by step, every call multiplies codes by scales,
# convolves, divides by the output's scale and rounds. Frozen, weights and biases are codes already and
# $M$ is one number. Is it the same? All convolutions, each on the same codes; the reference is the
# step-by-step arithmetic in float64.

# %%
def step_by_step(conv, codes, dtype):
    s_w = conv.module.weight_qparams.scale.cpu().view(-1, 1, 1, 1)
    x = conv.q_in.scale.to(dtype) * (codes - conv.q_in.zero_point)
    w = s_w.to(dtype) * conv.w.to(dtype)
    y = convolve(x, w, (conv.b * conv.scale).to(dtype), conv.module)
    y = y.relu() if conv.relu else y
    rounded = torch.round(y / conv.q_out.scale.to(dtype)) + conv.q_out.zero_point
    return rounded.clamp(conv.q_out.qmin, conv.q_out.qmax).int()


# %%
def frozen_integer(conv, codes):
    return requantization(conv)(accumulators(conv, codes))

def frozen_float(conv, codes):
    frozen = requantization(conv)  # its clamp, with M as a float64
    M = conv.scale / conv.q_out.scale.double()
    rounded = torch.round(accumulators(conv, codes).double() * by_channel(M))
    return (rounded + frozen.zero_point).clamp(frozen.low, frozen.high).int()


# %%
forms = {
    "step by step, float32": functools.partial(step_by_step, dtype=torch.float32),
    "frozen M, float64": frozen_float, "frozen M, 31-bit integer": frozen_integer,
}
counts = []
for name in tqdm(codes, desc="freeze"):
    conv = take(qmodel, name)
    reference = step_by_step(conv, codes[name], torch.float64)
    for form, function in forms.items():
        off = (function(conv, codes[name]) - reference).abs()
        row = {"form": form, "codes": off.numel(), "largest": int(off.max())}
        counts.append({**row, "differing": int((off > 0).sum())})

# %%
freeze = pd.DataFrame(counts).groupby("form", sort=False)
freeze = freeze.agg({"codes": "sum", "differing": "sum", "largest": "max"})
assert freeze.largest.max() <= 1, "a difference is a tie that falls to the other side"
show(freeze)

# %% [markdown]
# What it saves is work outside the convolutions: multiplications per image to decode the inputs and the
# weights and to encode the outputs.

# %%
outputs = freeze.codes.iloc[0] // len(sample)
inputs = sum(read[0].numel() for read in codes.values())
weights = sum(qmodel.layers[name].weight.numel() for name in codes)
print(
    f"multiplications per image outside the convolutions: "
    f"{inputs + weights + outputs:,} step by step, {outputs:,} frozen"
)

# %% [markdown]
# ## 4. One weight tensor to 8 bits
# *"Explain how you do the quantization, and what is the trade-off."* One 3x3 filter of a layer in the
# middle on its way: weights, codes, values, errors. The original writes $x = s\,(x_q + z)$; with $z$ of
# the other sign it is the same.

# %%
square = [n for n in codes if qmodel.layers[n].kernel_size == (3, 3)]
name = square[len(square) // 2]
weight = graph.get_submodule(find_node(graph, name).target).weight.detach().cpu()
largest = weight.abs().max().item()
q = ql.choose_qparams(-largest, largest, bits=8, symmetric=True)
taps = weight[0, 0].flatten()
tap_codes = ql.quantize_tensor(taps, q)
values = ql.dequantize(tap_codes, q)
assert torch.equal(values, q.scale * (tap_codes + -q.zero_point)), "with -z"
print(f"{name}: {weight.numel():,} weights, scale {largest:.4f} / 127 = {q.scale:.6f}")
table = {"weight": taps, "code": tap_codes, "value": values}
table["error in steps"] = (values - taps) / q.scale
show(pd.DataFrame(table).T.round(4))


# %% [markdown]
# The trade-off in numbers: narrowing the range clips some weights and makes the step finer for all. How
# far it pays (least squared error), and what it brings, as signal to noise and in equivalent bits
# (6.02 dB each). Notebook [03](03_quantize_by_hand.ipynb) draws the curves.

# %%
def weight_snr(high, bits):
    q = ql.choose_qparams(-high, high, bits, symmetric=True)
    noise = ql.fake_quantize(weight, q) - weight
    return decibels(weight.square().mean(), noise.square().mean()), q.scale.item()

def tradeoff(bits):
    low, high = observers.weight_range(weight, bits, p=2.0, per_channel=False)
    best = float(torch.maximum(-low, high))
    (before, step), (after, finer) = weight_snr(largest, bits), weight_snr(best, bits)
    clipped = (weight.abs() > best + finer / 2).double().mean().item()
    return {
        "bits": bits, "whole range": largest, "step": step, "dB": before,
        "best range": best, "finer step": finer, "clipped %": 100 * clipped,
        "dB, best": after, "worth bits": (after - before) / decibels(4, 1),
    }


# %%
trade = pd.DataFrame([tradeoff(b) for b in (8, 6, 4, 3, 2)]).set_index("bits")
show(trade.round(4))
now = tradeoff(bits)
strips = pd.DataFrame({
    "name": ["min-max, no saturation", "best range, with saturation"],
    "high": [now["whole range"], now["best range"]],
})
text = f"{plots.data_label(study.card.trained_on)}, {model}, layer {name}, "
text += f"n = {weight.numel():,} weights, {bits} bits per tensor"
figure = questions.minmax_strip(weight.flatten().numpy(), strips, bits, text)
study.save(figure, "11_minmax_strip", data=study.card.trained_on)


# %% [markdown]
# ## 5. Input and output of one layer, and which error is minimised
# *"How do you minimise the error?"* Few activations occupy a large part of the range. An edge with a long
# tail, before and after rounding: the entropy says how many bits its codes really carry.

# %%
def tail(edge):
    """How far the largest value lies beyond the 99.99 % quantile."""
    high = observers.percentile(edge, bits)[1]
    return edge.maximum / high if edge.minimum >= 0 and high > 0 else 0.0

def coded(edge, observer):
    """Values of the codes, how often each occurs, upper end of the range."""
    q = ql.choose_qparams(*observers.OBSERVERS[observer](edge, bits), bits)
    centers, counts = edge.histogram()
    index = ql.quantize_tensor(centers.float(), q).long()
    number = torch.bincount(index, counts.double(), minlength=2**bits)
    number[int(q.zero_point)] += edge.zeros
    values = ql.dequantize(torch.arange(2**bits), q)
    return values.numpy(), number.numpy(), values[-1].item()


# %%
edges = study.stats.edges
longest = max(edges, key=lambda name: tail(edges[name]))
edge = edges[longest]
text = f"values on edge {longest}, {n_calibration:,} calibration images, {bits} bits"
text = study.caption(edge.count, text)
both = {observer: coded(edge, observer) for observer in ("minmax", "histogram")}
figure = questions.clipped_histograms(edge, both, text)
study.save(figure, "11_clipping")


# %% [markdown]
# A range setter minimises the error of the tensor that it sees. What counts is the error behind the
# layer, and in the end the logits. The float network, in which one layer's input or its weight is rounded
# and nothing else:

# %%
def rounded(part, q):
    """The float graph, its layer's input or weight rounded."""
    own = copy.deepcopy(graph)
    node = find_node(own, name)
    if part == "input":
        read = node.args[0]
        node.replace_input_with(read, add_quantizer(own, read, "input", q))
    else:
        layer = own.get_submodule(node.target)
        layer.weight.data = ql.fake_quantize(weight, q)
    return own


# %%
node = find_node(graph, name)
behind = next(iter(node.users))
behind = behind if find_kinds(graph)[behind] == "clamp" else node
places = {node.args[0].name: "the input", behind.name: "the layer's output"}
places["output"] = "the logits"  # the graph's last node


# %%
def run(network):
    """What is at these places for the sample images."""
    values = {}

    def keep(node, value):
        values[places[node]] = value.cpu()

    watch(network, places, keep, [sample])
    return values

clean = {**run(graph), "the weight": weight}


# %% [markdown]
# Over the clip range, as a fraction of the whole, the error at three places:

# %%
def errors(part, fraction):
    own = f"the {part}"
    low = fraction * min(clean[own].min().item(), 0)
    high = fraction * clean[own].max().item()
    q = ql.choose_qparams(low, high, bits, symmetric=part == "weight")
    noisy = {**run(rounded(part, q)), own: ql.fake_quantize(clean[own], q)}
    rows = []
    for where in (own, "the layer's output", "the logits"):
        signal = clean[where].square().sum()
        noise = (noisy[where] - clean[where]).square().sum()
        row = {"part": f"{part} of {name}, {bits} bits", "share": fraction}
        rows.append({**row, "measured": where, "sqnr": decibels(signal, noise)})
    return rows


# %%
rows = []
fractions = torch.linspace(0.1, 1, 19 if study.smoke else 46).tolist()
for part in ("input", "weight"):
    for fraction in tqdm(fractions, desc=part):
        rows += errors(part, fraction)
curve = pd.DataFrame(rows)
text = "calibration images; only the named tensor is rounded, per tensor"
figure = questions.error_by_range(curve, study.caption(len(sample), text))
study.save(figure, "11_error_by_range")

# %%
for part, lines in curve.groupby("part", sort=False):
    at_fraction = lines.pivot(index="share", columns="measured", values="sqnr")
    logits, own = at_fraction["the logits"], at_fraction[lines.measured.iloc[0]]
    best = at_fraction.idxmax().round(2)
    listed = ", ".join(f"{where} {fraction}" for where, fraction in best.items())
    print(f"{part}: fraction of the range with the least error at {listed}")
    print(
        f"  minimising its own error costs the logits "
        f"{logits.max() - logits[own.idxmax()]:.2f} dB, "
        f"the whole range {logits.max() - logits[1.0]:.2f} dB"
    )


# %% [markdown]
# ## 6. Fused or not: where values are rounded
# *"How to further increase the accuracy."* The same weights, ranges and observer, rounded at different
# places. The package folds BatchNorm and rounds behind the ReLU, once. Every network is measured once,
# and the package's own are recorded at once:

# %%
@functools.cache
def by_hand(weight_bits, act_bits):
    """The row of the package's network at these widths."""
    qmodel = quantized(weight_bits, act_bits)
    size = ql.weight_bytes(qmodel)
    row = study.row(study.evaluate(qmodel), "by hand", qmodel.config, bytes=size)
    study.record_rows([row])
    return row


# %%
def measure(variant, bits, qmodel=None):
    """Points lost; None: by the package's own network."""
    if qmodel is None:
        row = by_hand(bits, bits)
    else:
        row = study.row(study.evaluate(qmodel), variant)
    columns = ("top1", "drop", "drop_low", "drop_high")
    return {"bits": bits, "variant": variant, **{name: row[name] for name in columns}}


# %% [markdown]
# Not folded, BatchNorm is a step of its own. `make_plan` then rounds behind the ReLU all the same, and
# what is between is float. An implementation that runs operation by operation rounds the convolution's
# result, then BatchNorm's: a `Plan` of our own.

# %%
def unfolded():
    graph = trace(network)
    normalize(graph)
    return graph

def apart(graph):
    """make_plan, and results of convolutions and BatchNorms are stored too."""
    plan, kinds = make_plan(graph), find_kinds(graph)
    more = {}
    for node in kinds:
        if kinds[node] == "batchnorm":
            more[node.args[0].name] = more[node.name] = "activation"
    return dataclasses.replace(plan, stores=more | plan.stores)


# %%
plans = [make_plan(folded(network)), make_plan(unfolded()), apart(unfolded())]
stored = [len(plan.stores) for plan in plans]
assert stored[0] == stored[1] < stored[2]
print(f"values stored: {stored[0]} folded or not, {stored[2]} rounded apart")

# %%
names = apart(unfolded()).observed
unfolded_edges, _ = collect_edges(unfolded(), names, study.calibration())

def not_fused(plan_of, bits):
    graph, config = unfolded(), ql.QuantConfig(weight_bits=bits, act_bits=bits)
    return ptq.quantize_graph(graph, plan_of(graph), unfolded_edges, config)

OURS = "folded, rounded once"
APART = "conv and BatchNorm rounded apart"
variants = {"BatchNorm in float, rounded once": make_plan, APART: apart}
rows = [measure(OURS, b) for b in depths]
for name, b in tqdm(list(itertools.product(variants, depths)), desc="fused or not"):
    rows.append(measure(name, b, not_fused(variants[name], b)))
fused = pd.DataFrame(rows)


# %%
def by_bits(table):
    wide = table.pivot(index="variant", columns="bits", values="drop")
    wide = wide.reindex(index=table.variant.unique(), columns=depths)
    return wide.rename_axis("points lost").round(2)

show(by_bits(fused))
text = "test images; W = A = bits, residual stream 8 bits, "
text += f"{n_calibration:,} calibration images; paired 95 % intervals"
text = study.caption(study.baseline.n, text)
title = "Fused or not: points lost against float"
study.save(questions.variant_drops(fused, text, title), "11_fused")

# %% [markdown]
# ## 7. Rounding before *and* after the activation
# *"You need to make sure that the scale and zero point before and after quantization are the same."* A
# plan that also stores what every ReLU reads, at the width of what it writes. The ranges come from the
# statistics of an edge: a range of another edge is its statistics under this edge's name.

# %%
graph = folded(network)
plan, kinds = make_plan(graph), find_kinds(graph)
relus = [n for n in kinds if kinds[n] == "clamp" and n.name in plan.stores]
fronts = {node.name: node.args[0].name for node in relus}
in_front = {front: plan.stores[relu] for relu, front in fronts.items()}
before_and_after = dataclasses.replace(plan, stores=plan.stores | in_front)
edges_in_front, _ = collect_edges(graph, in_front, study.calibration())
all_edges = study.stats.edges | edges_in_front

def twice(edges, bits):
    config = ql.QuantConfig(weight_bits=bits, act_bits=bits)
    return ptq.quantize_graph(folded(network), before_and_after, edges, config)


# %%
def same(bits):
    """The parameters of the value behind the ReLU: negative values become code 0."""
    ranges = {front: all_edges[relu] for relu, front in fronts.items()}
    return twice(all_edges | ranges, bits)

def different(bits):
    """Each side has its own range; the value is rounded twice."""
    return twice(all_edges, bits)

def range_in_front(bits):
    """The parameters in front: behind the ReLU, codes below the zero-point are idle."""
    ranges = {relu: all_edges[front] for relu, front in fronts.items()}
    return twice(all_edges | ranges, bits)


# %%
def misread(bits):
    """The bug: the code passes unchanged and is decoded with the parameters behind."""
    qmodel = different(bits)
    found = {edge_name(node): q for node, q in qmodel.quantizer_nodes.items()}
    for relu, front in fronts.items():
        module = qmodel.get_submodule(find_node(qmodel, relu).target)
        pass_on = functools.partial(pass_code, found[front], found[relu])
        module.register_forward_hook(pass_on)
    return qmodel

def pass_code(before, after, relu, inputs, output):
    codes = ql.quantize_tensor(inputs[0], before.qparams)
    codes = torch.maximum(codes, before.zero_point)  # the ReLU
    return ql.dequantize(codes, after.qparams)


# %%
ONCE, SAME = "after only", "before and after, same parameters"
OWN, BUG = "before and after, each its own", "one code, two parameters (a bug)"
roundings = {
    SAME: same, OWN: different, "both the range in front": range_in_front, BUG: misread,
}
rows = [measure(ONCE, b) for b in depths]
pairs = list(itertools.product(roundings, depths))
for name, b in tqdm(pairs, desc="before and after"):
    rows.append(measure(name, b, roundings[name](b)))
around = pd.DataFrame(rows)
exactly = around.pivot(index="variant", columns="bits", values="top1")
assert exactly.loc[ONCE].equals(exactly.loc[SAME]), "the second rounding is free"
show(by_bits(around))

# %%
text = "test images; W = A = bits, residual stream 8 bits, "
text += f"{n_calibration:,} calibration images; paired 95 % intervals"
text = study.caption(study.baseline.n, text)
title = "Rounding before and after the ReLU: points lost against float"
sound = around[around.variant != BUG]
study.save(questions.variant_drops(sound, text, title), "11_before_and_after")

# %% [markdown]
# The original's picture shows the bug: input range $[-1, 1]$, output range $[0, 1]$, and the same code
# stands for two values. On the right the same with the ranges of a ReLU of this network.

# %%
relu, front = next(iter(fronts.items()))
sides = (all_edges[front], all_edges[relu])
pairs = {
    "The original's example": (ql.choose_qparams(-1, 1, 8), ql.choose_qparams(0, 1, 8)),
    f"Node {relu}": [ptq.choose_edge_qparams(e, 8, ql.QuantConfig()) for e in sides],
}
code = torch.tensor(192)
before, after = (ql.dequantize(code, q) for q in pairs["The original's example"])
assert torch.allclose(before, code.new_tensor(64 * 2 / 255, dtype=torch.float32))
assert torch.allclose(after, code.new_tensor(192 / 255, dtype=torch.float32))
text = study.caption(n_calibration, "calibration images, 8 bits")
study.save(questions.two_values(pairs, 192, text), "11_code_192")

# %% [markdown]
# ## 8. From 8 to 2 bits, weights against activations
# *"Can you quantize to 6 bits or even lower? Weights and activations are not equally sensitive, so
# mix-bit quantization is an option."* All combinations of one width for all weights and one for all
# activations, equal widths first (widths per layer are the subject of
# [08](08_mixed_precision.ipynb)).

# %%
grid = [(b, b) for b in widths]
grid += [(w, a) for w, a in itertools.product(widths, widths) if w != a]
frame = pd.DataFrame([by_hand(w, a) for w, a in tqdm(grid, desc="heat map")])
text = "test images; residual stream and image 8 bits, outer layers as the rest, "
text += f"{n_calibration:,} calibration images, one seed"
text = study.caption(study.baseline.n, text)
study.save(questions.bits_heatmap(frame, text), "11_heatmap")


# %% [markdown]
# ## 9. One bit
# *"The problem with those binary networks is that they are only fancy in research."* What is left of this
# network when a weight is nothing but a sign? $w \approx \alpha\,b$ with $b = \pm 1$ loses
#
# $$\sum (w - \alpha b)^2 = \sum w^2 - 2 \alpha \sum w b + n \alpha^2 ,$$
#
# least for $b = \mathrm{sign}(w)$ and $\alpha = \frac{1}{n} \sum |w|$: the mean magnitude, one $\alpha$ a channel
# (XNOR-Net, arXiv:1603.05279). The package's codes end at two bits, so this is by hand:

# %%
def one_bit(weight):
    """sign(w) times the mean of |w| over each output channel; the same shape."""
    flat = weight.flatten(1)
    sign = torch.where(flat < 0, -1.0, 1.0)
    return (flat.abs().mean(1, keepdim=True) * sign).view_as(weight)

w_hat = one_bit(weight)
channel = weight[0].flatten().double()
alpha = torch.linalg.lstsq(channel.sign()[:, None], channel[:, None]).solution
assert torch.isclose(alpha.float(), w_hat[0].max()), "least squares says the same"
noise = (w_hat - weight).square().sum()
print(f"{name}: {decibels(weight.square().sum(), noise):.1f} dB at one bit, ", end="")
print(f"{weight_snr(tradeoff(2)['best range'], 2)[0]:.1f} dB at two (per tensor)")


# %% [markdown]
# BatchNorm is not folded here, so that its means and variances can be estimated anew: on the calibration
# images, of what the binary network's layers really write.

# %%
def binary(outer):
    """A copy with one-bit weights; outer: the first and the last layer too."""
    own = copy.deepcopy(network).eval()
    layers = [m for m in own.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    for layer in layers if outer else layers[1:-1]:
        layer.weight.data = one_bit(layer.weight.data)
    return own


# %%
@torch.no_grad()
def reestimated(own):
    for module in own.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # the plain mean over all batches
    own.train()
    for batch in study.calibration():
        own(batch.to(next(own.parameters()).device))
    return own.eval()


# %%
NEAREST, ANEW = "nearest", "nearest, BatchNorm re-estimated"
rows = []
for outer, which in ((True, "all layers"), (False, "all but the first and the last")):
    rows.append(measure(NEAREST, 1, binary(outer)) | {"layers": which})
    rows.append(measure(ANEW, 1, reestimated(binary(outer))) | {"layers": which})
one = pd.DataFrame(rows).set_index(["layers", "variant"])
show(one.drop(columns="bits").round(2))
chance = 100 / len(study.images.classes)
print(f"guessing scores {chance:.1f} %; activations stay float")

# %% [markdown]
# ## What we learned

# %%
seen, worst = needed.loc["accumulator, seen"], needed.loc["accumulator, worst case"]
print(
    f"- Dataflow: at 8 bits the widest accumulator needs {seen['8 bits']} bits on real "
    f"images and {worst['8 bits']} at worst; at 4 bits {worst['4 bits']}."
)
in_float32, in_float64, in_integers = freeze.differing[list(forms)]
print(
    f"- Freeze: of {freeze.codes.iloc[0]:,} codes {in_integers:,} differ with 31-bit "
    f"multipliers, {in_float64:,} with float64 ones, {in_float32:,} with float32 step "
    "by step."
)

# %%
worth = trade["worth bits"]
print(
    f"- Trade-off: at 8 bits the best range is worth {worth[8]:.2f} bits, at 3 bits "
    f"{worth[3]:.2f}."
)

# %%
lost = pd.concat([fused, around]).set_index(["bits", "variant"])["drop"]
for b in depths:
    print(
        f"- {b} bits, points lost: folded {lost[b, OURS]:+.2f}, conv and BatchNorm "
        f"rounded apart {lost[b, APART]:+.2f}; before and after the ReLU with the same "
        f"parameters {lost[b, SAME]:+.2f}, each its own {lost[b, OWN]:+.2f}, misread "
        f"{lost[b, BUG]:+.2f}."
    )

# %%
lost = frame.set_index(["weight_bits", "act_bits"])["drop"]
for b in widths[1:]:
    print(
        f"- {b} bits, points lost: {lost[b, 8]:+.2f} with the weights alone, "
        f"{lost[8, b]:+.2f} with the activations alone, {lost[b, b]:+.2f} with both."
    )
broken = [b for b in widths if lost[b, b] > 1]
if broken:
    print(f"- It breaks at {broken[0]} bits: over a point lost, both at that width.")
else:
    print("- No width loses more than one point.")

# %%
top1 = one.top1.xs("all but the first and the last", level="layers")
print(
    f"- One bit a weight, first and last layer float: {top1[NEAREST]:.2f} %, with "
    f"BatchNorm re-estimated {top1[ANEW]:.2f} %; float {study.baseline.top1:.2f} %."
)

# %% [markdown]
# Next: [12_beyond](12_beyond.ipynb), what lies beside static post-training quantization.
