# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 03 · Quantize by hand
#
# <!-- findings:opening -->
# **Found** (resnet20, cifar10-jpeg, 10,000 test images; means over calibration seeds, paired 95 %
# intervals). At 8 bits the network by hand loses 0.12 [-0.03, 0.28] points with histogram, which these
# images cannot tell from none. At 4 bits it loses 2.20 with histogram, 2.32 with percentile, 4.31 with
# minmax. At 3 bits it loses 12.75 with histogram, 13.74 with percentile, 43.74 with minmax. Weights at 4
# bits take 142 kB with their scales and biases, in float 1,096 kB.
# <!-- /findings -->
#
# **Question.** What is quantization, down to the last rounding, and how far do the bits go down before
# the network breaks?
#
# **Seen.** [What a full run showed](../results/pages/03_quantize_by_hand-resnet20-cifar10-jpeg.md), without running it.
#
# **Cost.** A minute on the digits; about nine on 10,000 test images with three calibration seeds, on two
# CPU cores.

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
import bisect
import functools
import itertools
import math
import warnings

import pandas as pd
import quantlab as ql
import torch
from torch.nn import functional as F
from tqdm.auto import tqdm

# %%
from quantlab import observers, plots, ptq
from quantlab.calibration import watch
from quantlab.graph import folded
from quantlab.quantized import find_node
from quantlab.system.comparing import decibels
from quantlab.workbook.study import Study, show

# %% tags=["parameters"]
data = "auto"  # auto, cifar10, digits, images, or the path of a folder or archive
model = "resnet20"  # resnet20 or resnet50
checkpoint = "auto"  # auto, or the path of a .safetensors file
seed = 0
preset = "auto"  # smoke, full, or auto: smoke on the digits
weight_bits = 4  # 2 to 8, for the network in section 7
act_bits = 4  # 2 to 8
observer = "histogram"  # minmax, percentile or histogram
n_calibration = 0  # 0: 256 in a smoke run, 1,024 in a full one
# calibration seeds in section 9; 0: one in a smoke run, three in a full one
n_seeds = 0
solutions = False  # True: the exercises' solutions are run

# %%
study = Study(
    data, model, checkpoint, preset,
    n_calibration=n_calibration, seed=seed, notebook="03_quantize_by_hand",
)
network, images = study.network.cpu(), study.images
n_seeds = study.choose(n_seeds, smoke=1, full=3)


# %% [markdown]
# ## 1. Scale and zero-point
# A *code* is a small integer that stands for a real number. The formats in question, beside the one that
# the network was trained in:

# %%
def limits(dtype):
    info = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
    row = {"smallest": info.min, "largest": info.max, "bit patterns": 2**info.bits}
    return {name: str(number) for name, number in row.items()}

formats = {"Int 8": torch.int8, "uint8": torch.uint8, "Float 32": torch.float32}
show(pd.DataFrame({name: limits(dtype) for name, dtype in formats.items()}))
assert torch.finfo(torch.float32).max == (2 - 2.0**-23) * 2.0**127

# %% [markdown]
# (The original's table has $2 - 2^{23}$ there; how many of the patterns are different numbers is counted in
# [11](11_questions.ipynb).) 256 codes for all of float32 are hopeless; for the range $[a, b]$ in which a
# tensor's values lie they are enough. A straight line maps it to the codes $a_q \dots b_q$. The original's
# README writes
#
# $$x_q = \mathrm{round}\big(\tfrac{1}{s}\,x - z\big), \qquad x = s\,(x_q + z),$$
#
# with the *scale* $s$, the distance between neighbouring values, and the *zero-point* $z$. The two ends of
# the range give its two equations for two unknowns,
#
# $$[1]\qquad a = s\,(a_q + z), \qquad b = s\,(b_q + z),$$
#
# which are linear in $s$ and $s z$. For $[-1, 3]$ and the sixteen codes of 4 bits:

# %%
a, b = -1.0, 3.0
a_q, b_q = 0, 15
equations = torch.tensor([[a_q, 1], [b_q, 1]], dtype=torch.float64)  # times (s, s z)
ends = torch.tensor([a, b], dtype=torch.float64)
s, sz = torch.linalg.solve(equations, ends)
print(f"s = {s:.4f}, z = {sz / s:.4f}")
assert torch.isclose(s, ends.diff() / (b_q - a_q)), "[1]: the difference of the two"


# %% [markdown]
# Subtract one equation from the other, and $z$ is gone; put $s$ into the first, and $z$ is there:
#
# $$s = \frac{b - a}{b_q - a_q}, \qquad z = \frac{a}{s} - a_q.$$
#
# $z = -3.75$ lies between two codes, so no code stands for zero. But padding and ReLU write zeros
# everywhere, and an error there is made millions of times. So the original's second condition: **zero is
# exact**,
#
# $$[2]\qquad z = \mathrm{round}(z).$$
#
# Jacob et al. 2018 and every runtime write $x = s\,(x_q - z)$: the same with $z$ of the other sign, and then
# **$z$ is the code of zero**. From here on we do so too:

# %%
def scale_and_zero_point(a, b, a_q, b_q):
    """Of the codes a_q..b_q for the reals a..b, a <= 0 <= b; numbers, or [C]."""
    a, b = (torch.as_tensor(end, dtype=torch.float64) for end in (a, b))
    s = (b - a) / (b_q - a_q)
    s = torch.where(s > 0, s, 1.0)  # nothing but zeros: any scale will do
    z = torch.round(a_q - a / s)
    return s.float(), z.int()

s, z = scale_and_zero_point(a, b, a_q, b_q)
print(f"s = {s:.4f}, z = {z}: the codes reach from {s * (a_q - z):.4f} ", end="")
print(f"to {s * (b_q - z):.4f}")
q = ql.choose_qparams(a, b, bits=4)
assert torch.equal(q.scale, s) and torch.equal(q.zero_point, z), "ql does the same"
assert (q.qmin, q.qmax) == (a_q, b_q)


# %% [markdown]
# What exact zeros cost: the ends have moved, by less than half a step.
#
# ## 2. Quantize, dequantize
# **A number.** Divide by the scale, round to the nearest integer (a tie to the even one), add the
# zero-point, and *clip* to the codes there are. Back again is one multiplication. One after the other is
# called *fake quantization*: the result is a float, but only values that have a code occur.

# %%
def quantize(x, s, z, a_q, b_q):
    return torch.clamp(torch.round(x * (1 / s)) + z, a_q, b_q).int()

def dequantize(x_q, s, z):
    return s * (x_q - z)

def fake_quantize(x, s, z, a_q, b_q):
    return dequantize(quantize(x, s, z, a_q, b_q), s, z)

number = torch.tensor(0.7)
code = quantize(number, s, z, a_q, b_q)
print(f"{number} -> code {code} -> {dequantize(code, s, z):.4f}")

# %% [markdown]
# **A tensor** goes the same way:

# %%
x = torch.linspace(-1.5, 3.5, 11)
x_q = quantize(x, s, z, a_q, b_q)
x_hat = dequantize(x_q, s, z)
table = {"x": x, "code": x_q, "x_hat": x_hat, "error": x_hat - x}
show(pd.DataFrame(table).round(3))

inside = (x >= x_hat.min()) & (x <= x_hat.max())
assert ((x_hat - x)[inside].abs() <= s / 2 + 1e-6).all(), "at most half a step"
assert fake_quantize(torch.zeros(1), s, z, a_q, b_q) == 0, "zero is exact"
again = fake_quantize(x_hat, s, z, a_q, b_q)
assert torch.equal(again, x_hat), "what has a code keeps it"

# %% [markdown]
# Outside the range values are clipped, and the error has no bound. The package and PyTorch's own kernel
# give the same, bit for bit: a million random numbers in 8 bits.

# %%
many = torch.randn(1_000_000, generator=torch.Generator().manual_seed(seed))
s8, z8 = scale_and_zero_point(many.min(), many.max(), 0, 255)
q8 = ql.choose_qparams(many.min(), many.max(), bits=8)
codes = quantize(many, s8, z8, 0, 255)
assert torch.equal(codes, ql.quantize_tensor(many, q8)), "ql's codes"
values = dequantize(codes, s8, z8)
kernel = torch.fake_quantize_per_tensor_affine(many, s8, z8, 0, 255)
assert torch.equal(values, kernel), "torch's kernel gives the same values"
assert torch.equal(values, ql.fake_quantize(many, q8)), "so does ql"

# %% [markdown]
# Bit for bit it is because `quantize` multiplies by $1/s$, taken once, as kernels do. In float32 that is not
# quite the same as dividing, and half-way between two codes the last digit decides:

# %%
half_way = (torch.arange(255) + 0.5 - z8) * s8
divided = torch.round(half_way / s8) + z8
off = (divided != quantize(half_way, s8, z8, 0, 255)).sum()
print(f"x / s in place of x * (1 / s): {off} of {len(half_way)} codes differ")

# %% [markdown]
# **Per channel.** Nothing forces all output channels of a layer to share a scale: each accumulates on
# its own. Then $s$ is a vector, shaped to meet each channel with its own. Weights scatter around zero; with
# the range $[-m, m]$ and the *narrow* codes $-127 \dots 127$ the same two equations give $s = m/127$ and
# $z = 0$, and $-x$ has a code whenever $x$ has one.

# %%
graph = folded(network)  # traced, BatchNorm folded: section 4 does one by hand
name = ptq.layers(graph)[len(ptq.layers(graph)) // 2]
weight = graph.get_submodule(find_node(graph, name).target).weight.detach()

largest = weight.abs().flatten(1).amax(1)  # of every output channel
scales, zeros = scale_and_zero_point(-largest, largest, -127, 127)
by_channel = scales.view(-1, 1, 1, 1), zeros.view(-1, 1, 1, 1)
w_q = quantize(weight, *by_channel, -127, 127)
w_hat = dequantize(w_q, *by_channel)
print(
    f"{name}: {tuple(weight.shape)}, {len(scales)} scales from {scales.min():.5f} to "
    f"{scales.max():.5f}, zero-points {zeros.unique().tolist()}"
)

# %%
q = ql.choose_qparams(-largest, largest, bits=8, symmetric=True, axis=0)
assert torch.equal(q.scale, scales) and torch.equal(q.zero_point, zeros)
assert torch.equal(w_q, ql.quantize_tensor(weight, q))
kernel = torch.fake_quantize_per_channel_affine(weight, scales, zeros, 0, -127, 127)
assert torch.equal(w_hat, kernel) and torch.equal(w_hat, ql.fake_quantize(weight, q))

# %% [markdown]
# PyTorch also has tensors that *are* codes, the ones that [02](02_builtin_int8.ipynb) converts to; none of
# 7 to 3 bits. They are to be removed (PyTorch's issue 184982), so this cell asks first. Their kernel adds $z$
# before it rounds: again another code where $x/s$ is a tie but for the last digits.

# %%
# the deprecation is said above
warnings.filterwarnings("ignore", message=".*quantized tensor creation functions.*")
if hasattr(torch, "quantize_per_tensor"):
    stored = torch.quantize_per_tensor(many, s8, z8, torch.quint8)
    off = (stored.int_repr().int() - codes).abs()
    print(f"{stored.dtype}: {(off > 0).sum()} of {len(many):,} codes differ")
    assert off.max() <= 1 and (off > 0).double().mean() < 1e-4
    assert torch.equal(stored.dequantize()[off == 0], values[off == 0])
    stored = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
    assert torch.equal(stored.int_repr().int(), w_q), "with z = 0 none differs"

# %% [markdown]
# Now that it is written, `ql.choose_qparams`, `ql.quantize_tensor` and `ql.fake_quantize` stand for these
# lines.
#
# ## 3. One layer's weights, and the trade-off
# First with one scale for the whole tensor and its whole range. One 3x3 filter on its way, weights, codes,
# values, errors:

# %%
q = ql.choose_qparams(weight.min(), weight.max(), bits=8, symmetric=True)
w_hat = ql.fake_quantize(weight, q)
taps = weight[0, 0].flatten()
steps = {"weight": taps, "code": ql.quantize_tensor(taps, q)}
steps["value"] = ql.dequantize(steps["code"], q)
steps["error in steps"] = (steps["value"] - taps) / q.scale
print(f"{name}: scale {weight.abs().max():.4f} / 127 = {q.scale:.6f}")
show(pd.DataFrame(steps).round(4))
about = f"{plots.data_label(study.card.trained_on)}, {model}, layer {name}"
about += f", n = {weight.numel():,} weights"
picture = plots.weight_codes(weight, w_hat, q, about + ", 8 bits per tensor")
study.save(picture, "03_weight_8bit", data=study.card.trained_on)


# %% [markdown]
# The error never leaves half a step (the table's last column). But look at how few weights use the outer
# codes: one outlier sets the step for everyone. A narrower range clips the outliers and makes the step
# smaller for all others. Clipping error rises, rounding error falls, and their sum has its minimum in
# between. The fewer the bits, the further inside it lies.

# %%
def tradeoff(bits, fraction):
    low, high = weight.min() * fraction, weight.max() * fraction
    q = ql.choose_qparams(low, high, bits, symmetric=True)
    clipping = (weight.abs() - q.scale * q.qmax).clamp(min=0).square().mean().item()
    total = (ql.fake_quantize(weight, q) - weight).square().mean().item()
    parts = {"clipping": clipping, "rounding": total - clipping}
    return {"bits": bits, "share": fraction, **parts}

fractions = torch.linspace(0.1, 1, 91).tolist()
curve = pd.DataFrame(tradeoff(b, f) for b, f in itertools.product((8, 4, 3), fractions))
picture = plots.range_tradeoff(curve, about + ", per tensor")
study.save(picture, "03_tradeoff", data=study.card.trained_on)


# %% [markdown]
# A scale for every channel, and the best range instead of the whole one: what the two bring together.

# %%
def weight_error(bits, **options):
    low, high = observers.weight_range(weight, bits, **options)
    axis = 0 if low.dim() else None
    q = ql.choose_qparams(low, high, bits, symmetric=True, axis=axis)
    noise = ql.fake_quantize(weight, q) - weight
    return decibels(weight.square().sum(), noise.square().sum())

choices = {
    "whole range, per tensor": dict(observer="minmax", per_channel=False),
    "best range, per tensor": dict(p=2.0, per_channel=False),
    "whole range, per channel": dict(observer="minmax"),
    "best range, per channel": dict(p=2.0),
}

# %%
ratios = pd.DataFrame({
    f"{bits} bits": {name: weight_error(bits, **how) for name, how in choices.items()}
    for bits in (8, 6, 4, 3)
})
show(ratios.rename_axis("10 log10 (signal / noise), dB").round(1))
# a bit halves the step: 6.02 dB
gain = (ratios.iloc[-1] - ratios.iloc[0]) / decibels(4, 1)
gains = ", ".join(f"{g:.1f} bits at {b}" for b, g in gain.items())
print("the two choices together are worth", gains)

# %% [markdown]
# **How many levels has a weight?** The narrow range leaves one code out: of $b$ bits it uses $2^b - 1$ levels.
# At 8 bits that is one of 256. At 2 bits it is one of four: "2 bits" with $2^b - 1$ levels are three values,
# $-s$, $0$ and $s$.

# %%
for symmetric in (True, False):
    how = ql.QuantConfig(weight_symmetric=symmetric)
    q = ptq.choose_weight_qparams(weight, 2, how)
    w_hat = ql.fake_quantize(weight, q)
    count = max(len(channel.unique()) for channel in w_hat)
    shown = ", ".join(f"{value + 0:.4f}" for value in w_hat[0].unique())  # 0, not -0
    print(f"2 bits, {count} levels in a channel; the first channel's: {shown}")
    assert count == 4 - symmetric and q.qmax - q.qmin + 1 == 2**2 - symmetric

# %% [markdown]
# Where does the $2^b$-th level go? One code more below zero than above ($z = 2^{b-1}$), or one more above
# ($z = 2^{b-1} - 1$), or $z$ as the channel's range lies. An integer machine multiplies $x_q - z$ in any case,
# and a file stores $x_q$: the level costs nothing. For each channel, the least squared error of each choice:

# %%
some = weight[:64]  # channels are enough

def relative_error(q):
    """Squared error over squared weights of every channel, [C]."""
    noise = (ql.fake_quantize(some, q) - some).square().sum((1, 2, 3))
    return noise / some.square().sum((1, 2, 3))

def least_error(low, high, bits, symmetric=False):
    """The least of 100 fractions of a range [C]."""
    how = dict(bits=bits, symmetric=symmetric, axis=0)
    shares = torch.linspace(0.01, 1, 100)
    tried = (ql.choose_qparams(low * s, high * s, **how) for s in shares)
    return torch.stack([relative_error(q) for q in tried]).amin(0)


# %%
def one_more(low, high, below, bits):
    """The range with so many codes below zero that clips nothing."""
    above = 2**bits - 1 - below
    step = torch.maximum(-low / below, high / above)
    return -below * step, above * step


# %%
def level_errors(bits):
    low, high = some.amin((1, 2, 3)), some.amax((1, 2, 3))
    half = 2 ** (bits - 1)
    every = {
        "one more below": least_error(*one_more(low, high, half, bits), bits),
        "one more above": least_error(*one_more(low, high, half - 1, bits), bits),
        "as the range lies": least_error(low, high, bits),
    }
    least = torch.stack(list(every.values())).amin(0)
    narrow = {"2^b - 1 levels": least_error(low, high, bits, symmetric=True)}
    return {**narrow, **every, "2^b, the least of three": least}


# %%
found = {bits: level_errors(bits) for bits in (2, 3, 4, 8)}
errors = pd.DataFrame({
    f"{bits} bits": {name: error.mean().item() for name, error in rows.items()}
    for bits, rows in found.items()
})
show(errors.rename_axis("relative squared error").map("{:.3g}".format))
for bits, rows in found.items():
    every = ql.QuantConfig(weight_symmetric=False, weight_norm=2.0)
    ours = relative_error(ptq.choose_weight_qparams(some, bits, every)).mean()
    least = rows["2^b, the least of three"].mean()
    assert ours <= 1.02 * least, "ql's search, coarse then fine, finds it too"

# %% [markdown]
# The fewer the bits, the more that one level is worth, and no choice is the best for every channel. Every row
# of every table here states how many `levels` its weights have. What follows keeps the narrow range; the
# notebooks on low bits, [06](06_learned_rounding.ipynb) to [08](08_mixed_precision.ipynb), use all $2^b$.
#
# ## 4. One BatchNorm, folded
# In evaluation, BatchNorm multiplies each channel by a constant and adds another, so it *folds* into the
# convolution before it:
#
# $$w' = w\,\frac{\gamma}{\sqrt{\sigma^2 + \epsilon}}, \qquad b' = (b - \mu)\,\frac{\gamma}{\sqrt{\sigma^2 + \epsilon}} + \beta$$

# %%
conv, bn = network.conv1, network.bn1
sample = next(iter(study.calibration(n=64)))
with torch.no_grad():
    factor = bn.weight.double() / torch.sqrt(bn.running_var.double() + bn.eps)
    w = (conv.weight.double() * factor.view(-1, 1, 1, 1)).float()
    b = (0 - bn.running_mean.double()) * factor + bn.bias  # the convolution has none
    b = b.float()
    separate = bn(conv(sample))
    together = F.conv2d(sample, w, b, conv.stride, conv.padding)
print(f"{conv}\n{bn}\nlargest difference {(separate - together).abs().max():.1e}")
assert torch.allclose(separate, together, atol=1e-4)
assert torch.equal(w, graph.conv1.weight) and torch.equal(b, graph.conv1.bias)


# %% [markdown]
# The difference is float32's own rounding: the sums are taken in another order. The last line says that the
# package folds in the same way, bit for bit. From here on `folded(network)` stands for it.
#
# ## 5. One activation edge
# Activations are not known in advance: *calibration* runs training images through the float network and
# counts what passes every *edge*, the way of a value from one operation to the next. We do it for one
# edge, of values on both sides of zero, and of those the one whose outermost values lie farthest beyond
# nearly all others.

# %%
def tail(edge):
    """How far an end lies beyond the quantile that leaves out 0.01 %."""
    low, high = observers.percentile(edge, 4)
    sides = ((edge.minimum, low), (edge.maximum, high))
    return max(end / quantile for end, quantile in sides if quantile)

def longest_tail(signed):
    names = [n for n, edge in stats.edges.items() if (edge.minimum < 0) == signed]
    return max(names, key=lambda name: tail(stats.edges[name]))

stats = study.stats
edge_name = longest_tail(signed=True)
edge = stats.edges[edge_name]
reach = f"{edge.minimum:.2f} to {edge.maximum:.2f}"
print(f"edge {edge_name}: {edge.count:,} values, {reach}")

# %% [markdown]
# **The histogram observer**, in the three steps that the original lists. *One: a histogram of what comes
# in.* It grows as the data come: when a value lies outside, every bin becomes twice as wide, and two old
# bins are one new one. Zeros are left out, since they have a code in any case.

# %%
HALF = 2**14  # bins on each side of zero; bin i holds the values in (i w, (i + 1) w]

def count(counts, width, x):
    """Step one: a histogram, with one more batch in it."""
    while x.max() > HALF * width or x.min() <= -HALF * width:
        width *= 2
        counts = F.pad(counts.view(-1, 2).sum(1), (HALF // 2, HALF // 2))
    bins = torch.ceil(x[x != 0] / width).long() - 1 + HALF
    return counts + torch.bincount(bins, minlength=2 * HALF), width

def values_on(name, batch):
    found = []
    watch(graph, [name], lambda _, x: found.append(x.cpu().flatten()), [batch])
    return found[0]


# %%
counts, width = torch.zeros(2 * HALF, dtype=torch.int64), 2.0**-30
for batch in study.calibration():
    counts, width = count(counts, width, values_on(edge_name, batch))

wider = round(edge.width / width)  # the package's bins, which are fewer
coarse = counts.view(-1, wider).sum(1)[HALF // wider + edge.first :]
assert torch.equal(coarse[: len(edge.bins)], edge.bins), "ql counts the same"
assert counts.sum() + edge.zeros == edge.count
print(f"{len(edge.bins):,} bins of width {edge.width:g}, {edge.zeros:,} zeros apart")


# %% [markdown]
# *Two: the error of a range.* Every bin's values move from its middle to the nearest code: the *density*
# times the square of the way. How many codes there are decides which range is good, so `bits` is an
# argument (in the original it stood where the number of codes belongs).

# %%
def error_of_range(low, high, bits):
    """Step two: mean squared error of all that passed the edge."""
    middles, counts = edge.histogram()
    middles = middles.float()
    codes = 0, 2**bits - 1
    s, z = scale_and_zero_point(min(low, 0), max(high, 0), *codes)
    way = fake_quantize(middles, s, z, *codes) - middles
    return ((way.double().square() * counts).sum() / edge.count).item()

whole = edge.minimum, edge.maximum
ours = error_of_range(*whole, act_bits)
theirs = observers.quantization_error(edge, *([end] for end in whole), act_bits)
assert math.isclose(ours, theirs.item(), rel_tol=1e-9), "ql's error is the same"

# %% [markdown]
# *Search, from both ends.* PyTorch's observer cuts a little of the mass off one end or the other, whichever
# then moves farther, and stops as soon as the error rises:

# %%
bins = edge.bins.clone()
bins[-edge.first - 1] += edge.zeros  # to the bin that ends at zero
mass = (bins.cumsum(0) / edge.count).tolist()  # up to each bin's end
bin_ends = ((edge.first + torch.arange(len(bins) + 1)) * edge.width).tolist()


# %%
def walk(bits, step=1e-5):
    error = functools.cache(lambda i, j: error_of_range(bin_ends[i], bin_ends[j], bits))
    alpha, beta, i, j = 0.0, 1.0, 0, len(mass)
    while alpha + step < beta - step:
        left = max(i, bisect.bisect_left(mass, alpha + step))
        right = min(j, bisect.bisect_left(mass, beta - step) + 1)
        if left - i > j - right:
            alpha, narrower = alpha + step, (left, j)
        else:
            beta, narrower = beta - step, (i, right)
        if error(*narrower) > error(i, j):
            break
        i, j = narrower
    return bin_ends[i], bin_ends[j]


# %% [markdown]
# A walk that stops at the first rise may stop too early. Ours tries every pair of ends on a grid:

# %%
def search(bits, steps=60):
    fractions = [(i + 1) / steps for i in range(steps)]
    lows, highs = ([end * f for f in fractions] for end in whole)
    pairs = itertools.product(lows, highs)
    return min(pairs, key=lambda pair: error_of_range(*pair, bits))


# %% [markdown]
# Beside it **a percentile**, the original's *fake-hist*: leave out the outermost 0.01 % and be done. It
# knows nothing of the number of codes.

# %%
def clipped(fraction=0.9999):
    low = bisect.bisect_left(mass, 1 - fraction)
    return bin_ends[low], bin_ends[bisect.bisect_left(mass, fraction) + 1]

by_ql = observers.percentile(edge, act_bits)
assert all(abs(a - b) <= edge.width for a, b in zip(clipped(), by_ql)), "ql's, to a bin"

# %% [markdown]
# *Three: scale and zero-point* of the range that was found, which is section 1.

# %%
found = {
    "whole range": whole, "percentile": clipped(), "search, walking": walk(act_bits),
    "search, every pair": search(act_bits),
    "ql's histogram": observers.histogram(edge, act_bits),
}
lines = {}
for label, (low, high) in found.items():
    s, z = scale_and_zero_point(low, high, 0, 2**act_bits - 1)
    line = {"low": low, "high": high, "s": s.item(), "z": z.item()}
    lines[label] = {**line, "error": error_of_range(low, high, act_bits)}
two_ended = pd.DataFrame(lines).T
gap = two_ended.error["ql's histogram"] / two_ended.error["search, every pair"]
assert gap <= 1.001, "no range on the grid is better"
show(two_ended.style.format("{:.4g}"))

# %%
ends = two_ended.loc[["whole range", "percentile", "ql's histogram"], ["low", "high"]]
ranges = ends.assign(observer=["minmax", "percentile", "histogram"])
text = f"values on edge {edge_name} from {study.n_calibration:,} calibration images; "
text = study.caption(edge.count, text + f"ranges for {act_bits} bits")
title = f"Both ends are free: edge {edge_name}"
figure = plots.clip_histogram(edge, ranges, text, title, "activation")
study.save(figure, "03_two_ends")

# %% [markdown]
# From here on `observers.percentile` and `observers.histogram` stand for these lines (its search refines
# the grid around the best pair). The edge with the longest tail behind a ReLU:

# %%
relu_name = longest_tail(signed=False)
behind_relu = stats.edges[relu_name]
OBSERVERS = ("minmax", "percentile", "histogram")  # 04 compares all there are
chosen = [(o, *observers.find_observer(o)(behind_relu, act_bits)) for o in OBSERVERS]
ranges = pd.DataFrame(chosen, columns=["observer", "low", "high"])
text = f"values on edge {relu_name} from {study.n_calibration:,} calibration images; "
text = study.caption(behind_relu.count, text + f"ranges for {act_bits} bits")
title = f"Where to clip? Edge {relu_name}"
figure = plots.clip_histogram(behind_relu, ranges, text, title, "activation")
study.save(figure, "03_activation_edge")


# %% [markdown]
# The mean squared error that each choice makes on this edge, by width. The whole range wastes codes on
# values that hardly occur; a fixed percentile cannot know how many codes there are; the search does.

# %%
def edge_error(observer, bits):
    low, high = observers.find_observer(observer)(behind_relu, bits)
    return observers.quantization_error(behind_relu, [low], [high], bits).item()

errors = pd.DataFrame({
    f"{bits} bits": {o: edge_error(o, bits) for o in OBSERVERS} for bits in (8, 6, 4, 3)
})
assert (errors.loc["histogram"] <= errors.min() * 1.001).all(), "its own criterion"
show(errors.style.format("{:.2e}"))

# %% [markdown]
# ## 6. One convolution in integers
# Now weights, activations and BatchNorm are known, and one layer can be computed in codes: the first
# convolution, its BatchNorm and its ReLU. An 8-bit code times an 8-bit code has 16 bits; the sum over all
# inputs of an output has more; the bias is added at the scale of the products, $s_x s_w$; and only then is
# the result rounded back to 8 bits, behind the ReLU:
#
# $$a = \sum (x_q - z_x)\, w_q + b_q, \qquad b_q = \mathrm{round}\Big(\frac{b}{s_x s_w}\Big), \qquad y_q = \mathrm{clamp}\big(z_y + \mathrm{round}(a\,M),\; z_y,\; 255\big), \qquad M = \frac{s_x s_w}{s_y}$$
#
# Scales and zero-points are those that the package chooses for the whole network at 8 bits:

# %%
qmodel = ql.quantize(network, stats, ql.QuantConfig(8, 8)).cpu()
q_x, q_w = qmodel.reads("conv1"), qmodel.layers["conv1"].weight_qparams
q_y = qmodel.quantizers.relu.qparams
s_w = q_w.scale.view(-1, 1, 1, 1)
x_q = quantize(sample, q_x.scale, q_x.zero_point, 0, 255)
w_q = quantize(w, s_w, 0, -127, 127)
bias_scale = q_x.scale.double() * q_w.scale.double()
b_q = torch.round(b.double() / bias_scale).long()
centred = (x_q - q_x.zero_point).long()
assert torch.equal(w_q, qmodel.codes("conv1")), "ql's codes of the weight"
assert torch.equal(b_q, qmodel.bias_codes("conv1").long()), "and of the bias"

# %% [markdown]
# Every tensor below is int64. $M$, one number a channel, is the only thing that is not an integer; it
# becomes a 31-bit integer $m$ and a shift to the right by $k$ places, $M \approx m\,2^{-k}$, and half of the
# last place is added first, so that the shift rounds.

# %%
accumulator = F.conv2d(centred, w_q.long(), b_q, conv.stride, conv.padding)
mantissa, exponent = torch.frexp(bias_scale / q_y.scale.double())  # M
m = torch.round(mantissa * 2**31).long().view(1, -1, 1, 1)
k = (31 - exponent).long().view(1, -1, 1, 1)
scaled = (accumulator * m + (1 << (k - 1))) >> k
z_y = int(q_y.zero_point)
y_q = (scaled + z_y).clamp(z_y, 255)  # the ReLU is the lower end
assert y_q.dtype == torch.int64, "no float on the way"


# %%
def signed_bits(t):
    return int(t.abs().max()).bit_length() + 1

steps = {
    "input code minus zero-point": signed_bits(centred),
    "weight code": signed_bits(w_q),
    "one product": signed_bits(centred.abs().max() * w_q.abs().max()),
    "bias code": signed_bits(b_q),
    "accumulator": signed_bits(accumulator),
    "multiplier m": signed_bits(m),
    "accumulator times m": signed_bits(accumulator * m),
}
show(pd.Series(steps, name="bits needed").to_frame())

# %% [markdown]
# The accumulator stays far below the 32 bits it gets. Fake quantization computes the same thing in
# float, from the values of the codes; that is what every accuracy below is measured with:

# %%
layer = qmodel.layers["conv1"]  # its weight is the values of the codes
with torch.no_grad():
    x_hat = dequantize(x_q, q_x.scale, q_x.zero_point)
    simulated = F.conv2d(x_hat, layer.weight, layer.bias, conv.stride, conv.padding)
codes = quantize(simulated.relu(), q_y.scale, q_y.zero_point, 0, 255)
off = (codes - y_q).abs()
simulation = f"{(off > 0).sum()} of {off.numel():,} codes differ"
print("simulated in float:", simulation)
assert off.max() <= 1 and (off > 0).double().mean() < 1e-4, "ties, and by one"

# %% [markdown]
# [09](09_integer_only.ipynb) does this for the whole network, where `ql.to_integer` gives just these codes
# for this layer, and follows every difference.
#
# **The layer's input and output, before and after.** Eight neighbouring pixels of one image, and the
# output of one channel in the same place:

# %%
y, y_hat = together.relu(), dequantize(y_q, q_y.scale, q_y.zero_point)
channel, row = int(y[0].flatten(1).std(1).argmax()), sample.shape[2] // 2
here = slice(sample.shape[3] // 2 - 4, sample.shape[3] // 2 + 4)
columns = {
    "x": sample[0, 0], "x_q": x_q[0, 0], "x_hat": x_hat[0, 0],
    "y": y[0, channel], "y_q": y_q[0, channel], "y_hat": y_hat[0, channel],
}
table = {label: v[row, here].tolist() for label, v in columns.items()}
show(pd.DataFrame(table).round(3))
for label, before, after in (("input", sample, x_hat), ("output", y, y_hat)):
    noise = decibels(before.square().sum(), (after - before).square().sum())
    print(f"{label}: signal to noise {noise:.1f} dB")


# %% [markdown]
# To the eye: the first image as the layer reads it, and below it what one channel makes of it, with
# weights, input and output of as many bits as stand above.

# %%
def rounded(x, edge_name, bits):
    low, high = observers.histogram(stats.edges[edge_name], bits)
    return ql.fake_quantize(x, ql.choose_qparams(low, high, bits))

def layer_at(bits):
    """(input, output) of the first image, rounded at this width."""
    low, high = observers.weight_range(w, bits)
    q_w = ql.choose_qparams(low, high, bits, symmetric=True, axis=0)
    weight = ql.fake_quantize(w, q_w)
    x_hat = rounded(sample[:1], qmodel.plan.reads["conv1"], bits)
    out = F.conv2d(x_hat, weight, b, conv.stride, conv.padding)
    return x_hat, rounded(out.relu(), "relu", bits)


# %%
def pixels(x, float_x):
    """float [1, C, H, W] -> uint8 [1, 3, H, W]; black to white: the float's range."""
    low, high = float_x.min(), float_x.max()
    return (255 * (x - low) / (high - low)).clamp(0, 255).byte().expand(-1, 3, -1, -1)

widths = (8, 7, 6, 5, 4, 3, 2)
pairs = [(sample[:1], y[:1]), *map(layer_at, widths)]

# %%
inputs, outputs = ([pair[side] for pair in pairs] for side in (0, 1))
outputs = [out[:, [channel]] for out in outputs]
images_in = [pixels(x, inputs[0]) for x in inputs]
maps_out = [pixels(x, outputs[0]) for x in outputs]
titles = ["float", *(f"{bits} bits" for bits in widths), *[""] * len(pairs)]
text = f"image: above the input of conv1, below channel {channel} behind its ReLU"
pictures, plain = torch.cat(images_in + maps_out), [False] * len(titles)
figure = plots.image_grid(pictures, titles, plain, study.caption(1, text))
study.save(figure, "images_layer")

# %% [markdown]
# ## 7. The whole network
# Where are codes stored? Behind every conv-ReLU and add-ReLU, in front of every add, and at the image:
# found from the graph. Operands and results of adds, the *residual stream*, keep 8 bits
# (`residual_bits`), so that it stays accurate; a layer that reads fewer bits than are stored rounds once
# more, in front of itself. Nothing else is rounded.

# %%
config = ql.QuantConfig(weight_bits=weight_bits, act_bits=act_bits, observer=observer)
quantized = ql.quantize(network, stats, config)
plan = quantized.plan
roles = pd.Series(plan.stores).value_counts().to_dict()
print(f"{len(plan.reads)} layers, {len(plan.stores)} stored values: {roles}")
again = len(quantized.quantizer_nodes) - len(plan.stores)
print(f"rounded once more, in front of a layer: {again}")
floats = "; ".join(f"{node}: {why}" for node, why in plan.floats.items()) or "nothing"
print("computed in float between two sets of codes:", floats)

# %%
baseline = study.baseline
result = study.evaluate(quantized)
drop, low, high = ql.paired_drop(baseline.correct, result.correct)
print(
    f"float {baseline.top1:.2f} %, W{weight_bits}A{act_bits} {result.top1:.2f} %: "
    f"{drop:+.2f} points lost [{low:+.2f}, {high:+.2f}], n = {result.n:,}"
)
in_float = ql.weight_bytes(network)
print(f"weights {ql.weight_bytes(quantized):,} bytes instead of {in_float:,}")


# %% [markdown]
# ## 8. Which error should the weights' search minimise?
# The squared error is the obvious choice, and not the best: it clips most, so every layer's output shrinks
# a little, and layers multiply. A larger exponent $p$ in $\sum|\hat w - w|^p$ clips less. Such a choice is
# made on the *held-out* part of the training images:

# %%
def heldout_top1(bits, p):
    config = ql.QuantConfig(weight_bits=bits, act_bits=bits, weight_norm=p)
    return study.evaluate(ql.quantize(network, stats, config), images.heldout).top1

norms = pd.DataFrame({
    f"W{bits}A{bits}": {p: heldout_top1(bits, p) for p in (2.0, 2.4, 3.0, 4.0)}
    for bits in (4, 3)
}).rename_axis("p")
best = ", ".join(f"p = {norms[c].idxmax():g} at {c}" for c in norms)
n = min(study.limit or len(images.heldout), len(images.heldout))
print(f"top-1 in % on held-out images, n = {n:,}; best: {best}")
show(norms.round(2))


# %% [markdown]
# `QuantConfig` uses $p = 3$: of these four the best at W4A4 on the held-out images of `cifar10-jpeg`, by
# less than the noise of 5,000 images. At three bits more may be better still, and the choice matters far
# more there.
#
# ## 9. 8, 6, 4 and 3 bits
# Three range setters, four widths, from the same statistics (W4A4: weights and activations of 4 bits).
# `minmax` takes the whole range of activations *and* weights, as the simplest tool would; with the other
# two the weights' range is searched. So their difference is not that of the activations' ranges alone.

# %%
def measure(observer, bits, stats, seed):
    weights = "minmax" if observer == "minmax" else "lp"
    config = ql.QuantConfig(bits, bits, observer=observer, weight_observer=weights)
    qmodel = ql.quantize(network, stats, config)
    size = ql.weight_bytes(qmodel)
    return study.row(study.evaluate(qmodel), "by hand", config, seed=seed, bytes=size)

rows = []
for n in range(seed, seed + n_seeds):
    own = stats if n == seed else ql.collect(network, study.calibration(n))
    grid = list(itertools.product(OBSERVERS, (8, 6, 4, 3)))
    rows += [measure(o, bits, own, n) for o, bits in tqdm(grid, desc=f"seed {n}")]
frame = study.record_rows(rows).assign(bits=lambda f: f.weight_bits.astype(int))

# %%
table = frame.groupby(["observer", "bits"], sort=False).agg(
    top1=("top1", "mean"), std=("top1", "std"), drop=("drop", "mean"),
    low=("drop_low", "mean"), high=("drop_high", "mean"), kB=("bytes", "mean"),
)
show(table.assign(kB=table.kB / 1e3).round(2))

# %%
text = (
    f"test images, {study.n_calibration:,} calibration images, {n_seeds} calibration "
    "seed(s)"
)
text = study.caption(baseline.n, text + ", residual stream 8 bits")
study.save(plots.accuracy_by_bits(frame, text), "03_accuracy_by_bits")

# %% [markdown]
# ## What we learned

# %%
factor = two_ended.error / two_ended.error.min()
print(
    f"- One range at {act_bits} bits, its error over the least: whole range "
    f"{factor['whole range']:.2f}, percentile {factor['percentile']:.2f}, a walk that "
    f"stops at the first rise {factor['search, walking']:.2f}."
)
print(
    f"- One convolution at 8 bits needs {steps['accumulator']} bits to sum up; in "
    f"integers and simulated in float, {simulation}."
)

# %%
means = table["drop"].unstack("observer")
for bits in (8, 4, 3):
    losses = means.loc[bits].sort_values().items()
    listed = ", ".join(f"{v:+.2f} with {o}" for o, v in losses)
    print(f"- {bits} bits, points lost: {listed}")
kilobytes = table.kB.xs(4, level="bits").mean() / 1e3
print(
    f"- Weights at 4 bits take {kilobytes:,.0f} kB, scales and biases "
    "included; ", end=""
)
print(f"in float they take {in_float / 1e3:,.0f} kB.")

# %% [markdown]
# <!-- findings:closing -->
# **Published.** Points lost against float, by range setter (resnet20, cifar10-jpeg, 10,000 test images):
#
# | Bits of weights and activations | histogram | percentile | minmax |
# | ---: | ---: | ---: | ---: |
# | 8 | 0.12 [-0.03, 0.28] | 0.05 [-0.12, 0.23] | 0.05 [-0.12, 0.22] |
# | 6 | 0.24 [-0.01, 0.49] | 0.28 [0.03, 0.52] | 0.42 [0.15, 0.69] |
# | 4 | 2.20 [1.70, 2.69] | 2.32 [1.83, 2.82] | 4.31 [3.72, 4.90] |
# | 3 | 12.75 [11.93, 13.56] | 13.74 [12.91, 14.57] | 43.74 [42.66, 44.81] |
# <!-- /findings -->

# %% [markdown]
# ## Exercises
# Write each function in place of its `...`, run its cell, then the one with the check, which says what is
# wrong. The solution is folded between the two; with `solutions = True` at the top all of them run.
#
# **1. A range of any sign.** `scale_and_zero_point` above asks for $a \le 0 \le b$. Values may also lie in
# $[0.5, 3]$ or $[-2, -0.5]$, and zero must still have a code. Return scale and zero-point for the
# $2^{bits}$ codes from 0.

# %%
from fractions import Fraction

from quantlab.workbook.exercises import check


# %% tags=["exercise"]
def any_range(low, high, bits):
    """(scale, zero-point): a float and an int, of the codes 0..2^bits - 1."""
    ...


# %% tags=["solution"] jupyter={"source_hidden": true}
if solutions:
    def any_range(low, high, bits):
        low, high = min(low, 0), max(high, 0)
        scale = (high - low) / (2**bits - 1)
        return scale, round(-low / scale)


# %% tags=["check"]
def exact_range(low, high, bits):
    """A case, in exact fractions; ql must agree."""
    a, b = min(Fraction(low), 0), max(Fraction(high), 0)
    scale = (b - a) / (2**bits - 1)
    zero_point = round(-a / scale)
    q = ql.choose_qparams(low, high, bits)
    assert q.zero_point == zero_point and math.isclose(q.scale, scale, rel_tol=1e-6)
    return (low, high, bits), (float(scale), zero_point)

check(
    any_range,
    (*exact_range(-1, 3, 4), "As in section 1: 15 steps from -1 to 3, z rounded."),
    (*exact_range(0.5, 3, 4), "All above zero: widen the range to [0, 3] first."),
    (*exact_range(-2, -0.5, 8), "All below zero: widen to [-2, 0], zero is code 255."),
)


# %% [markdown]
# **2. A scale for every channel.** Fake quantization to the narrow codes
# $-(2^{b-1} - 1) \dots 2^{b-1} - 1$ with zero-point 0, where every channel along `axis` has a scale of its own.
# PyTorch lines shapes up from the *right*: give the scales the shape in which each meets its own channel. A
# linear layer's weight has two dimensions, a convolution's four, a transposed convolution's channels lie on
# axis 1.

# %% tags=["exercise"]
def fake_quantize_channels(x, scales, axis, bits):
    """float32, the shape of x; scales: float32 [C], C = x.shape[axis]."""
    ...


# %% tags=["solution"] jupyter={"source_hidden": true}
if solutions:
    def fake_quantize_channels(x, scales, axis, bits):
        shape = [1] * x.dim()
        shape[axis] = -1
        s, top = scales.view(shape), 2 ** (bits - 1) - 1
        return torch.round(x * (1 / s)).clamp(-top, top) * s


# %% tags=["check"]
def channels(axis, bits, *shape):
    """A case: torch's kernel, and ql must agree; the range is narrow, so some clip."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(axis))
    scales = torch.arange(1, shape[axis] + 1) / 2**bits
    zeros, top = torch.zeros(len(scales), dtype=torch.int32), 2 ** (bits - 1) - 1
    kernel = torch.fake_quantize_per_channel_affine(x, scales, zeros, axis, -top, top)
    ours = ql.fake_quantize(x, ql.QParams(scales, zeros, -top, top, axis))
    assert torch.equal(ours, kernel)
    return (x, scales, axis, bits), kernel

square = "Codes -7 to 7; of a square matrix, [3] alone meets the columns, not the rows."
check(fake_quantize_channels, (*channels(0, 4, 3, 3), square),
      (*channels(0, 8, 2, 3, 3, 3), "A convolution's weight, channels in front."),
      (*channels(1, 3, 2, 4, 3, 3), "Axis 1, 3 bits: the codes are -3 to 3."))


# %% [markdown]
# **3. Requantize in integers.** Section 6 rounds $a\,m / 2^k$ by adding half of the last place before the
# shift, which rounds ties *up*. gemmlowp's last step, and ARM's, round ties *away from zero*, so that $-a$
# gives the negative of $a$. Write that, with integers only: $a\,m$ needs up to 62 bits, more than a float64
# has. [09](09_integer_only.ipynb) has both.

# %% tags=["exercise"]
def requantize(a, m, k):
    """a * m / 2^k to nearest, ties away from zero; a: int64 [N], ints m > 0, k >= 1."""
    ...


# %% tags=["solution"] jupyter={"source_hidden": true}
if solutions:
    def requantize(a, m, k):
        product = a * m
        return product.sign() * ((product.abs() + (1 << (k - 1))) >> k)


# %% tags=["check"]
def away_from_zero(a, m, k):
    """A case, in exact fractions; where there is no tie, section 6 must agree."""
    exact = [Fraction(value) * m / 2**k for value in a]
    away = [math.floor(abs(v) + Fraction(1, 2)) * (1 if v >= 0 else -1) for v in exact]
    a = torch.tensor(a)
    for v, up, found in zip(exact, (a * m + (1 << (k - 1))) >> k, away):
        assert up == found or v % 1 == Fraction(1, 2)
    return (a, m, k), away


# %% tags=["check"]
near = 3 * 2**28 + 3  # times 2^31 - 8 it is 3 * 2^59 - 24
check(
    requantize,
    (*away_from_zero([7, 8, -7, 100], 3, 3), "7 * 3 / 8 = 2.625 is nearest to 3."),
    (*away_from_zero([5, 3, 1], 1, 1), "A tie: 2.5 goes up to 3, not to the even 2."),
    (*away_from_zero([-5, -3, -1, 0], 1, 1), "A tie: -2.5 goes down to -3."),
    (*away_from_zero([near, -near], 2**31 - 8, 60), "Just below 1.5: no floats."),
)

# %% [markdown]
# Next: [04_observers](04_observers.ipynb), why one range is better than another, and which layer breaks
# first.
