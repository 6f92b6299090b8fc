# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 03 · Quantize by hand
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/TimS-ml/Handwritten-Quantization/blob/main/notebooks/03_quantize_by_hand.ipynb)
#
# **Question.** What is quantization, down to the last rounding, and how far do the bits go down before
# the network breaks?
#
# **Cost.** A minute on the digits; about nine on 10,000 test images with three calibration seeds, on two
# CPU cores.

# %%
import os
import subprocess
import sys

# fetch the workbook
if "google.colab" in sys.modules and not os.path.isdir("quantlab"):
    address = "https://github.com/TimS-ml/Handwritten-Quantization"
    fetch = f"test -d workbook || git clone --depth 1 {address} workbook"
    subprocess.check_call(f"{fetch}; pip install -q -e workbook", shell=True)
    os.chdir("workbook")
    sys.path.insert(0, os.getcwd())

# %%
import itertools

import pandas as pd
import quantlab as ql
import torch
from quantlab import observers, plots, ptq
from quantlab.evaluate import decibels
from quantlab.graph import folded
from quantlab.quantized import find_node
from quantlab.workbook.study import Study, show
from torch.nn import functional as F
from tqdm.auto import tqdm

# %% tags=["parameters"]
data = "auto"  # auto, cifar10, digits, images, or the path of a folder or archive
model = "resnet20"  # resnet20 or resnet50
checkpoint = "auto"  # auto, or the path of a .safetensors file
seed = 0
preset = "auto"  # smoke, full, or auto: smoke on the digits
weight_bits = 4  # 2 to 8, for the network in section 6
act_bits = 4  # 2 to 8
observer = "histogram"  # minmax, percentile or histogram
n_calibration = 0  # 0: 256 in a smoke run, 1,024 in a full one
# calibration seeds in section 8; 0: one in a smoke run, three in a full one
n_seeds = 0

# %%
study = Study(
    data, model, checkpoint, preset,
    n_calibration=n_calibration, seed=seed, notebook="03_quantize_by_hand",
)
network, images = study.network.cpu(), study.images
n_seeds = study.choose(n_seeds, smoke=1, full=3)


# %% [markdown]
# ## 1. Scale and zero-point
# A *code* is a small integer that stands for a real number. Map a range of reals $[a, b]$ to the codes
# $a_q \dots b_q$ by a straight line:
#
# $$x = s\,(x_q - z)$$
#
# The scale $s$ is the distance between neighbouring values, the zero-point $z$ the code of zero. Two ends
# give two equations,
#
# $$a = s\,(a_q - z), \qquad b = s\,(b_q - z),$$
#
# and their difference is $b - a = s\,(b_q - a_q)$. So
#
# $$s = \frac{b - a}{b_q - a_q}, \qquad z = a_q - \frac{a}{s}.$$
#
# One condition more: **zero must be exact**, because padding and ReLU write zeros everywhere. So $z$ must
# itself be a code, and is rounded to one. (The original's README writes $x = s(x_q + z)$, with the other
# sign of $z$; this is the form of Jacob et al. 2018 and of every runtime.)

# %%
def scale_and_zero_point(a, b, bits):
    """Of codes 0..2^bits-1 for the reals a..b, a <= 0 <= b."""
    a_q, b_q = 0, 2**bits - 1
    s = (b - a) / (b_q - a_q)
    z = round(a_q - a / s)
    return s, z

s, z = scale_and_zero_point(-1.0, 3.0, bits=4)
q = ql.choose_qparams(-1.0, 3.0, bits=4)
print(f"s = {s:.4f}, z = {z}, codes 0..15")
assert abs(q.scale.item() - s) < 1e-7 and q.zero_point.item() == z, "ql does the same"


# %% [markdown]
# ## 2. Quantize, dequantize
# Divide by the scale, round to the nearest integer, add the zero-point, and *clip* to the codes there
# are. Back again is one multiplication. One after the other is called *fake quantization*: the result is
# a float, but only values that have a code occur.

# %%
def quantize(x, s, z, bits):
    return torch.clamp(torch.round(x / s) + z, 0, 2**bits - 1)

def dequantize(x_q, s, z):
    return s * (x_q - z)

def fake_quantize(x, s, z, bits):
    return dequantize(quantize(x, s, z, bits), s, z)

number = torch.tensor(0.7)
code = quantize(number, s, z, bits=4)
print(f"{number} -> code {code:.0f} -> {dequantize(code, s, z):.4f}")

# %% [markdown]
# A whole tensor goes the same way:

# %%
x = torch.linspace(-1.5, 3.5, 11)
x_hat = fake_quantize(x, s, z, bits=4)
table = {"x": x, "code": quantize(x, s, z, bits=4), "x_hat": x_hat, "error": x_hat - x}
show(pd.DataFrame(table).T.round(3))

# %% [markdown]
# Inside the range nothing is off by more than half a step; outside, values are clipped. Three things
# hold by construction, and the package and PyTorch's own kernel give the same values:

# %%
inside = (x >= x_hat.min()) & (x <= x_hat.max())
assert ((x_hat - x)[inside].abs() <= s / 2 + 1e-6).all(), "at most half a step"
assert fake_quantize(torch.zeros(1), s, z, 4) == 0, "zero is exact"
assert torch.equal(fake_quantize(x_hat, s, z, 4), x_hat), "what has a code keeps it"

kernel = torch.fake_quantize_per_tensor_affine(x, s, z, 0, 15)
assert torch.allclose(x_hat, kernel, rtol=1e-6, atol=0), "torch's kernel agrees"
assert torch.equal(ql.fake_quantize(x, q), kernel), "so does ql, bit for bit"

# %% [markdown]
# **Bit for bit.** Our `x / s` divides in float32; kernels multiply by `1 / s`, taken once. Where $x/s$
# lies within two units in the last place of a tie the two can round to different codes. `ql` does what
# the kernels do; on random numbers the two forms differ this often:

# %%
many = torch.randn(1_000_000, generator=torch.Generator().manual_seed(seed))
ours = quantize(many, q.scale, q.zero_point, bits=4)
theirs = ql.quantize_tensor(many, q)
print(f"{(ours != theirs).sum()} of {len(many):,} codes differ")
assert (ours - theirs).abs().max() <= 1, "and then by one"

# %% [markdown]
# **Per channel.** Nothing forces all output channels of a layer to share a scale: each accumulates on
# its own. Then $s$ is a vector, shaped to divide each channel by its own. Weights scatter around zero, so
# $z = 0$, and the codes run from $-127$ to $127$: the *narrow* range, in which $-x$ has a code whenever
# $x$ has one.

# %%
graph = folded(network)  # traced, BatchNorm folded: section 4 does one by hand
name = ptq.layers(graph)[len(ptq.layers(graph)) // 2]
weight = graph.get_submodule(find_node(graph, name).target).weight.detach()

top = 127
largest = weight.abs().flatten(1).amax(1)  # of every output channel
s = (largest / top).view(-1, *[1] * (weight.dim() - 1))
w_hat = torch.clamp(torch.round(weight / s), -top, top) * s
q = ql.choose_qparams(-largest, largest, bits=8, symmetric=True, axis=0)
print(
    f"{name}: {tuple(weight.shape)}, {len(largest)} scales from {s.min():.5f} to "
    f"{s.max():.5f}"
)
close = torch.isclose(w_hat, ql.fake_quantize(weight, q), rtol=1e-5, atol=0)
assert close.float().mean() > 0.999, "ql does the same, but for ties"

# %% [markdown]
# From here on `ql.choose_qparams`, `ql.quantize_tensor` and `ql.fake_quantize` stand for these lines.
#
# ## 3. One weight tensor, and the trade-off
# First with one scale for the whole tensor and its whole range:

# %%
q = ql.choose_qparams(weight.min(), weight.max(), bits=8, symmetric=True)
w_hat = ql.fake_quantize(weight, q)
about = f"{plots.data_label(study.card.trained_on)}, {model}, layer {name}"
about += f", n = {weight.numel():,} weights"
picture = plots.weight_codes(weight, w_hat, q, about + ", 8 bits per tensor")
study.save(picture, "03_weight_8bit", data=study.card.trained_on)


# %% [markdown]
# The error never leaves half a step. But look at how few weights use the outer codes: one outlier sets
# the step for everyone. A narrower range clips the outliers and makes the step smaller for all others.
# Clipping error rises, rounding error falls, and their sum has its minimum in between. The fewer the
# bits, the further inside it lies.

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
show(ratios.rename_axis("signal to noise, dB").round(1))
# a bit halves the step: 6.02 dB
gain = (ratios.iloc[-1] - ratios.iloc[0]) / decibels(4, 1)
gains = ", ".join(f"{g:.1f} bits at {b}" for b, g in gain.items())
print("the two choices together are worth", gains)

# %% [markdown]
# ## 4. One convolution, BatchNorm and ReLU
# In evaluation, BatchNorm multiplies each channel by a constant and adds another, so it *folds* into the
# convolution before it:
#
# $$w' = w\,\frac{\gamma}{\sqrt{\sigma^2 + \epsilon}}, \qquad b' = (b - \mu)\,\frac{\gamma}{\sqrt{\sigma^2 + \epsilon}} + \beta$$

# %%
conv, bn = network.conv1, network.bn1
sample = next(iter(study.calibration(n=64)))
with torch.no_grad():
    factor = bn.weight / torch.sqrt(bn.running_var + bn.eps)
    w = conv.weight * factor.view(-1, 1, 1, 1)
    b = (0 - bn.running_mean) * factor + bn.bias  # this convolution has no bias
    separate = bn(conv(sample))
    together = F.conv2d(sample, w, b, conv.stride, conv.padding)
print(f"largest difference {(separate - together).abs().max():.1e}")
assert torch.allclose(separate, together, atol=1e-4)
assert torch.allclose(w, graph.conv1.weight, rtol=1e-5), "ql folds in float64"

# %% [markdown]
# Now the same in codes. An 8-bit code times an 8-bit code has 16 bits; the sum over all inputs of an
# output has more; the bias is added at the scale of the products, $s_x s_w$; and only then is the result
# rounded back to 8 bits, behind the ReLU:
#
# $$y = s_x s_w \Big( \sum (x_q - z_x)\, w_q + b_q \Big), \qquad b_q = \mathrm{round}\Big(\frac{b}{s_x s_w}\Big)$$

# %%
q_x = ql.choose_qparams(sample.min(), sample.max(), 8)
q_w = ql.choose_qparams(*observers.weight_range(w, 8), 8, symmetric=True, axis=0)
codes_x = ql.quantize_tensor(sample, q_x) - q_x.zero_point  # int32
codes_w = ql.quantize_tensor(w, q_w)
bias_scale = (q_x.scale * q_w.scale).double()
codes_b = torch.round(b.double() / bias_scale)
# float64 holds integers up to 2^53 exactly: the sum below is integer arithmetic
accumulator = F.conv2d(
    codes_x.double(), codes_w.double(), codes_b, conv.stride, conv.padding
)
assert torch.equal(accumulator, accumulator.round())
result = (accumulator * bias_scale.view(1, -1, 1, 1)).relu()


# %%
def signed_bits(t):
    return int(t.abs().max()).bit_length() + 1

steps = {
    "input code minus zero-point": signed_bits(codes_x),
    "weight code": signed_bits(codes_w),
    "one product": signed_bits(codes_x.abs().max() * codes_w.abs().max()),
    "bias": signed_bits(codes_b),
    "accumulator": signed_bits(accumulator),
}
error = (result - together.relu()).abs().max()
print(
    f"largest error behind the ReLU: {error:.4f}, of values up to {together.max():.2f}"
)
show(pd.Series(steps, name="bits needed").to_frame())

# %% [markdown]
# The accumulator stays far below the 32 bits it gets. Fake quantization computes the same thing in
# float, from the values of the codes; that is what every accuracy below is measured with, and
# [09](09_integer_only.ipynb) proves it for the whole network:

# %%
w_hat, b_hat = ql.fake_quantize(w, q_w), (codes_b * bias_scale).float()
x_hat = ql.fake_quantize(sample, q_x)
simulated = F.conv2d(x_hat, w_hat, b_hat, conv.stride, conv.padding)
print(f"integer against simulated: {(simulated.relu() - result).abs().max():.1e}")
assert torch.allclose(simulated.relu(), result.float(), atol=1e-4)


# %% [markdown]
# ## 5. One activation edge
# Activations are not known in advance: *calibration* runs training images through the float network and
# counts what passes every edge. One pass yields a histogram per edge, and every range setter at every
# width is a function of it. Here is the edge with the longest tail:

# %%
def tail(edge):
    """How far the largest value lies beyond the 99.99 % quantile."""
    high = observers.percentile(edge, 4)[1]
    return edge.maximum / high if edge.minimum >= 0 and high > 0 else 0.0

stats = study.stats
edge_name = max(stats.edges, key=lambda name: tail(stats.edges[name]))
edge = stats.edges[edge_name]
print(
    f"{len(stats.edges)} edges; {edge_name} has the longest tail: "
    f"{edge.count:,} values, {edge.zeros / edge.count:.0%} of them zero, "
    f"up to {edge.maximum:.2f}"
)


# %% [markdown]
# **A percentile**, the original's *fake-hist*: leave out the largest 0.01 % and be done. It knows
# nothing of the number of codes.
#
# **The histogram observer**, in three steps. *One*: count. *Two*: for a candidate range, sum up what every
# bin loses: its values move from the bin's middle to the nearest code. *Three*: take the range that loses
# least, searching both ends.

# %%
def error_of_range(low, high, bits):
    """Step two: mean squared error of everything that passed the edge."""
    centers, counts = edge.histogram()
    s, z = scale_and_zero_point(min(low, 0), max(high, 0), bits)
    lost = fake_quantize(centers, s, z, bits) - centers
    return ((lost.square() * counts).sum() / edge.count).item()

def search(bits, steps=60):
    """Step three: both ends of the range, each on a grid of fractions."""
    fractions = [(i + 1) / steps for i in range(steps)]
    lows = [edge.minimum * f for f in fractions] if edge.minimum < 0 else [0.0]
    highs = [edge.maximum * f for f in fractions]
    pairs = itertools.product(lows, highs)
    return min(pairs, key=lambda pair: error_of_range(*pair, bits))


# %%
by_hand = search(act_bits)
by_ql = observers.histogram(edge, act_bits)
clip = observers.percentile(edge, act_bits)
choices = {"search": by_hand, "ql's search": by_ql, "percentile": clip}
for label, ends in choices.items():
    print(
        f"{label:12} {ends[0]:.3f} to {ends[1]:.3f}, error "
        f"{error_of_range(*ends, act_bits):.3e}"
    )
assert error_of_range(*by_ql, act_bits) <= 1.001 * error_of_range(*by_hand, act_bits)

# %%
OBSERVERS = ("minmax", "percentile", "histogram")  # 04 compares all there are
found = [(o, *observers.find_observer(o)(edge, act_bits)) for o in OBSERVERS]
ranges = pd.DataFrame(found, columns=["observer", "low", "high"])
text = f"values on edge {edge_name} from {study.n_calibration:,} calibration images; "
text = study.caption(edge.count, text + f"ranges for {act_bits} bits")
title = f"Where to clip? Edge {edge_name}"
figure = plots.clip_histogram(edge, ranges, text, title, "activation")
study.save(figure, "03_activation_edge")


# %% [markdown]
# The mean squared error that each choice makes on this edge, by width. The whole range wastes codes on
# values that hardly occur; a fixed percentile cannot know how many codes there are; the search does.

# %%
def edge_error(observer, bits):
    low, high = observers.find_observer(observer)(edge, bits)
    return observers.quantization_error(edge, [low], [high], bits).item()

errors = pd.DataFrame({
    f"{bits} bits": {o: edge_error(o, bits) for o in OBSERVERS} for bits in (8, 6, 4, 3)
})
assert (errors.loc["histogram"] <= errors.min() * 1.001).all(), "its own criterion"
show(errors.style.format("{:.2e}"))

# %% [markdown]
# ## 6. The whole network
# Where are codes stored? Behind every conv-ReLU and add-ReLU, in front of every add, and at the image:
# found from the graph, nothing else is rounded. Operands and results of adds keep 8 bits
# (`residual_bits`), so that the residual stream stays accurate.

# %%
config = ql.QuantConfig(weight_bits=weight_bits, act_bits=act_bits, observer=observer)
quantized = ql.quantize(network, stats, config)
plan = quantized.plan
roles = pd.Series(plan.stores).value_counts().to_dict()
print(f"{len(plan.reads)} layers, {len(plan.stores)} stored values: {roles}")
floats = ", ".join(plan.floats) or "nothing"
print("computed in float between two sets of codes:", floats)

# %%
baseline = study.baseline
result = study.evaluate(quantized)
drop, low, high = ql.paired_drop(baseline.correct, result.correct)
print(
    f"float {baseline.top1:.2f} %, W{weight_bits}A{act_bits} {result.top1:.2f} %: "
    f"{drop:+.2f} points lost [{low:+.2f}, {high:+.2f}], n = {result.n:,}"
)
in_float = sum(4 * p.numel() for p in network.parameters())
print(f"weights {ql.weight_bytes(quantized):,} bytes instead of {in_float:,}")


# %% [markdown]
# ## 7. Which error should the weights' search minimise?
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
# ## 8. 8, 6, 4 and 3 bits
# Three range setters, four widths, from the same statistics. `minmax` takes the whole range of
# activations *and* weights, as the simplest tool would; with the other two the weights' range is
# searched. So their difference is not that of the activations' ranges alone.

# %%
def measure(observer, bits, stats, seed):
    weights = "minmax" if observer == "minmax" else "lp"
    config = ql.QuantConfig(bits, bits, observer=observer, weight_observer=weights)
    qmodel = ql.quantize(network, stats, config)
    size = ql.weight_bytes(qmodel)
    return study.row(study.evaluate(qmodel), "by hand", config, seed=seed, bytes=size)

rows = []
for s in range(seed, seed + n_seeds):
    stats = study.stats if s == seed else ql.collect(network, study.calibration(s))
    grid = list(itertools.product(OBSERVERS, (8, 6, 4, 3)))
    rows += [measure(o, bits, stats, s) for o, bits in tqdm(grid, desc=f"seed {s}")]
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
# Next: [04_observers](04_observers.ipynb), why one range is better than another, and which layer breaks
# first.
