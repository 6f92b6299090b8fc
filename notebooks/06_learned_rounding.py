# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 06 · Learned rounding
#
# <!-- findings:opening -->
# **Found** (resnet20, cifar10-jpeg, 10,000 test images; weights of 2^b levels; means over calibration
# seeds, paired 95 % intervals). At W2A2, first/last 8 nearest rounding scores 46.41 % where float has
# 87.37 %, codes learned by QDrop 81.13 %. Points lost at W4A4: AdaRound 0.57, BRECQ 0.65, QDrop 0.67,
# nearest 1.72. Points lost at W3A3: AdaRound 1.53, BRECQ 1.75, QDrop 1.90, nearest 5.74.
# <!-- /findings -->
#
# **Question.** Why is the nearest code not the best one, and how is a better one learned, without labels
# and without training?
#
# **Seen.** [What a full run showed](../results/pages/06_learned_rounding-resnet20-cifar10-jpeg.md), without running it.
#
# **Cost.** Half a minute on the digits; the full preset learns one layer for 2,000 steps and one network
# for 500 iterations a block: about five minutes on two CPU cores, one or two on a GPU.

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
import dataclasses
import math

import pandas as pd
import quantlab as ql
import torch
from tqdm.auto import tqdm

# %%
from quantlab import ptq
from quantlab.calibration import watch
from quantlab.graph import folded
from quantlab.improving.equalization import equalizable_pairs
from quantlab.improving.learned import LearnedRounding, round_to_step
from quantlab.plots import lowbit
from quantlab.quantized import find_node
from quantlab.workbook import allowed
from quantlab.workbook.methods import LEARNED, Methods
from quantlab.workbook.study import Study, show

# %% tags=["parameters"]
data = "auto"  # auto, cifar10, digits, images, or the path of a folder or archive
model = "resnet20"  # resnet20 or resnet50
checkpoint = "auto"  # auto, or the path of a .safetensors file
seed = 0
preset = "auto"  # smoke, full, or auto: smoke on the digits
bits = 3  # 2 to 8, of the one layer in section 1
weight_bits = 2  # 2 to 8, of the network in section 3
act_bits = 2  # 2 to 8
weight_symmetric = False  # True: weights of 2^b - 1 levels; False: of all 2^b
method = "QDrop"  # AdaRound, BRECQ or QDrop, in section 3
iterations = 0  # of learning a unit; 0: 3 in a smoke run, 500 in a full one
n_calibration = 0  # 0: 64 in a smoke run, 1,024 in a full one

# %%
study = Study(
    data, model, checkpoint, preset,
    n_calibration=n_calibration, seed=seed, notebook="06_learned_rounding",
)
if study.smoke and not n_calibration:
    study.n_calibration = min(study.n_calibration, 64)
builder = Methods(study, iterations)
allowed.check(method=method)
network = study.network.cpu()

# %% [markdown]
# ## 1. One layer, by hand
# Why should the nearest code be the best one? Rounding changes the weights by $\Delta w$, and the loss,
# to second order and at a trained network, where its gradient is about zero, by
#
# $$\mathcal L(w + \Delta w) - \mathcal L(w) \approx \tfrac12\, \Delta w^{\!\top} H\, \Delta w .$$
#
# Nearest rounding minimises every $\Delta w_i^2$ for itself, as if $H$ were diagonal. But errors that
# meet in the same output can cancel, which the off-diagonal entries reward. With a layer's output as
# the measure, $H$ becomes $\mathbb E[x x^\top]$, and the task is: for each weight choose *down* or *up*
# such that $\lVert W x - \hat W x\rVert^2$ is least. *AdaRound* (Nagel et al. 2020, arXiv:2004.10568)
# makes it smooth, with one number $V$ per weight:
#
# $$\hat w = s\,\big(\mathrm{clamp}(\lfloor w/s \rfloor + z + h(V),\ q_{\min}, q_{\max}) - z\big),\qquad h(V) = \mathrm{clamp}\big(1.2\,\sigma(V) - 0.1,\ 0,\ 1\big)$$
#
# $$\min_V\ \mathbb E\,\lVert W x - \hat W x\rVert^2 + \lambda \sum_i \big(1 - |2h(V_i) - 1|^{\beta}\big),\qquad \beta: 20 \to 2$$
#
# The second term is zero only where every $h$ is 0 or 1; a large $\beta$ lets them move freely, a small
# one makes them decide. The codes are all $2^b$, with a zero-point $z$ for each channel
# ([03.3](03_quantize_by_hand.ipynb#3.-One-layer's-weights,-and-the-trade-off)). The layer's inputs and
# outputs come from the float network:

# %%
graph = folded(network)
name = (names := ptq.layers(graph))[len(names) // 2]
node = find_node(graph, name)
seen = []
batches = study.calibration(n=min(128, len(study.images.train)))
watch(graph, [node.args[0].name], lambda _, value: seen.append(value.cpu()), batches)
layer = graph.cpu().get_submodule(node.target)
x, weight = torch.cat(seen), layer.weight.detach()
with torch.no_grad():
    y = layer(x)
layer_config = ql.QuantConfig(weight_symmetric=weight_symmetric)
q = ptq.choose_weight_qparams(weight, bits, layer_config)
scale, zero_point = q.broadcast(weight.dim())  # one of each a channel
down = torch.floor(weight / scale) + zero_point
print(f"{name}: weight {tuple(weight.shape)}, inputs {tuple(x.shape)}")


# %%
def output_error(w_hat, index=slice(None)):
    """Squared error, summed over channels, mean over images and places."""
    y_hat = torch.func.functional_call(layer, {"weight": w_hat}, x[index])
    return (y_hat - y[index]).square().sum(1).mean()

def h_of(v):
    return (1.2 * torch.sigmoid(v) - 0.1).clamp(0, 1)

def weight_of(h):
    return scale * ((down + h).clamp(q.qmin, q.qmax) - zero_point)

def regularizer(h, beta):
    return (1 - (2 * h - 1).abs() ** beta).sum()


# %% [markdown]
# $V$ starts where $\hat w$ is the float weight itself (but for clipping), and *up* where $V \ge 0$ is
# nearest rounding. The package's module for a layer that learns is these four functions:

# %%
fraction = weight / scale + zero_point - down
v = torch.logit((fraction + 0.1) / 1.2)
assert torch.allclose(h_of(v), fraction, atol=1e-5)
assert torch.allclose(weight_of((v >= 0).float()), ql.fake_quantize(weight, q))

rounding = LearnedRounding(layer, layer, q)
# w / s and w * (1 / s) may differ in the last place, and floor makes 1 of that
same = rounding.floor == down
assert same.float().mean() > 0.999
assert torch.allclose(rounding.h[same], h_of(v)[same], atol=1e-4)
tolerance = 1e-4 * scale.max().item()
assert torch.allclose(rounding.weight, weight_of(h_of(v)), atol=tolerance)
ours, theirs = regularizer(h_of(v), 8.0), rounding.regularizer(8.0).detach()
assert torch.isclose(ours, theirs, rtol=1e-3)

# %% [markdown]
# For the first fifth of the steps the weights move freely; then $\beta$ falls from 20 to 2 and makes
# them decide.

# %%
n_steps = study.choose(0, smoke=400, full=2000)
shown = range(0, weight.numel(), max(weight.numel() // 120, 1))
start = h_of(v)
paths, curve = [], []

@torch.no_grad()
def remember(step):
    first, now = start.flatten(), h_of(v).flatten()
    paths.extend((step, k, now[k].item(), first[k].item()) for k in shown)
    rounded = output_error(weight_of((v >= 0).float()))
    curve.append((step, nearest, rounded.item()))


# %%
nearest = output_error(ql.fake_quantize(weight, q)).item()
v.requires_grad_()
optimizer = torch.optim.Adam([v], lr=1e-2)
generator = torch.Generator().manual_seed(seed)
for step in tqdm(range(n_steps + 1)):
    if step % (n_steps // 40) == 0:
        remember(step)
    h = h_of(v)
    loss = output_error(weight_of(h), torch.randint(len(x), (32,), generator=generator))
    progress = (step / n_steps - 0.2) / 0.8
    if progress >= 0:
        loss = loss + 0.01 * regularizer(h, 20 - 18 * progress)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

# %%
codes = (down + (v.detach() >= 0)).clamp(q.qmin, q.qmax)
moved = (codes != ql.quantize_tensor(weight, q)).float().mean().item()
undecided = ((h_of(v) > 0.05) & (h_of(v) < 0.95)).float().mean().item()
curve = pd.DataFrame(curve, columns=["iteration", "nearest", "learned"])
learned = curve.learned.iloc[-1]
print(
    f"{name} at {bits} bits: {moved:.0%} of the weights end away from the nearest "
    f"code, {undecided:.1%} undecided;"
)
print(f"the output's error falls from {nearest:.4g} to {learned:.4g}")

# %%
text = f"calibration images; layer {name}, {bits} bits, {len(shown)} of "
text = study.caption(len(x), text + f"{weight.numel():,} weights drawn")
drawn = pd.DataFrame(paths, columns=["iteration", "weight", "h", "start"])
study.save(lowbit.learned_rounding(drawn, curve, text), "06_learned_rounding")


# %% [markdown]
# ## 2. From the layer to the network
# **BRECQ** (Li et al. 2021, arXiv:2102.05426). Learning layer after layer ignores that the layers of a
# residual block can make up for each other; the whole network at once overfits a thousand images. The
# block is the compromise. For the error of its output $y$,
#
# $$\Delta\mathcal L \approx \tfrac12\,\Delta y^{\!\top} H^{(y)} \Delta y \approx \tfrac12 \sum_i \Big(\frac{\partial \mathcal L}{\partial y_i}\Big)^{\!2} \Delta y_i^2 .$$
#
# The last form is the *Fisher* loss; leaving the weights $(\partial\mathcal L/\partial y_i)^2$ out is the
# plain one, of section 1. [07](07_low_bit_methods.ipynb) compares them.
#
# **LSQ** (Esser et al. 2020, arXiv:1902.08153). The scale $s$ of an activation, its *step*, is learned
# with the rounding, with the straight-through gradient
#
# $$\frac{\partial \hat x}{\partial s} = \mathrm{round}(x/s) - x/s \ \text{ inside the range, } q_{\min} \text{ or } q_{\max} \text{ outside, scaled by } 1/\sqrt{N q_{\max}} .$$
#
# **QDrop** (Wei et al. 2022, arXiv:2203.05740). While learning, every element of an activation keeps its
# float value with probability ½. The rounding is then learned for many mixtures of exact and rounded
# inputs, and becomes flat in the direction in which activations err.

# %%
def step_gradient(x, s, low, high):
    """Of sum(x_hat) with respect to s."""
    v = x / s
    inside = (v >= low) & (v <= high)
    each = torch.where(inside, v.round() - v, v.clamp(low, high))
    return each.sum() / math.sqrt(x.numel() * high)

x_float = torch.randn(1000, generator=torch.Generator().manual_seed(seed))
s = torch.tensor(0.5, requires_grad=True)
round_to_step(x_float, s, low=-3, high=3).sum().backward()
assert torch.allclose(s.grad, step_gradient(x_float, s.detach(), -3, 3), rtol=1e-4)

# %%
dropped = torch.rand(1000, generator=torch.Generator().manual_seed(seed)) < 0.5
x_hat = round_to_step(x_float, s, -3, 3)
mixed = round_to_step(x_float, s, -3, 3, mask=(~dropped).float())
assert torch.allclose(mixed, torch.where(dropped, x_float, x_hat), atol=1e-6), "QDrop"

# %% [markdown]
# AdaRound, BRECQ and QDrop are one loop over *units*, layers or blocks, with other settings; these are all
# that differ (`learn_bias` moves the biases along, `drop` is QDrop's probability):

# %%
settings = {name: dataclasses.asdict(builder.learning(name)) for name in LEARNED}
settings = pd.DataFrame(settings)
show(settings[settings.nunique(axis=1) > 1])

# %% [markdown]
# **Corrections that learn nothing.** *Equalisation* (Nagel et al. 2019, arXiv:1906.04721) divides a
# channel by $r_i$ and multiplies the weights that read it by $r_i$, so that all channels have similar
# ranges; ReLU lets it pass, and the float network stays what it is:

# %%
equal = ql.equalize(network)
sample = next(iter(batches))[:32]
with torch.no_grad():
    before, after = graph(sample), equal(sample)
assert torch.allclose(before, after, atol=1e-3 * before.abs().max().item())

def range_ratio(graph, name):
    """Largest over smallest range of a layer's output channels."""
    ranges = graph.get_submodule(name).weight.abs().flatten(1).amax(1)
    return (ranges.max() / ranges.clamp(min=1e-6).min()).item()

for first, second in equalizable_pairs(graph)[:3]:
    ratios = f"{range_ratio(graph, first):.1f} to {range_ratio(equal, first):.1f}"
    print(f"{first} -> {second}: largest over smallest channel of the first, {ratios}")

# %% [markdown]
# *Bias correction* subtracts each channel's mean error $\mathbb E[\hat W \hat x - W x]$ from its bias,
# measured, or calculated from BatchNorm's parameters (analytic). *BatchNorm re-estimation* measures
# means and variances again, in the quantized network. The first layer by hand:

# %%
config = ql.QuantConfig(weight_bits, act_bits, weight_symmetric=weight_symmetric)
quantized = ql.quantize(network, study.stats, config)
corrected = ql.correct_bias(network, quantized, [sample])
first = names[0]
outputs = []
for net in (graph, quantized):
    watch(net, [first], lambda _, value: outputs.append(value.cpu()), [sample])
y_float, y_hat = outputs
error = (y_hat - y_float).mean((0, 2, 3))
wanted = quantized.layers[first].bias.cpu() - error
difference = (corrected.layers[first].bias.cpu() - wanted).abs()
# a bias is a multiple of s_in s_w
assert (difference <= corrected.bias_scale(first) / 2 + 1e-5).all()
print(f"{first}: mean error of a channel up to {error.abs().max():.4f}, corrected")


# %% [markdown]
# ## 3. A network, block by block
# The float network gives every unit's target, the quantized network before it the input; what was
# learned is rounded for good before the next unit starts. Every layer is quantized, residual stream and
# image at 8 bits. Everything is recorded: [07](07_low_bit_methods.ipynb) takes this row and does not
# learn it again.

# %%
def learn(state):
    """state: a path from which a learning that was stopped goes on."""
    learning = builder.learning(method)
    images = study.calibration()
    return ql.reconstruct(network, study.stats, images, config, learning, state)

row = builder.once(learn, method, config)
base = builder.measure("nearest", config)

# %%
units = pd.DataFrame(row["units"])
units["left"] = 100 * units.learned / units.nearest
show(units.round(4))

# %% [markdown]
# The squared error of every unit's output against nearest rounding of the same unit, on the calibration
# images, behind the quantized network before it:

# %%
text = f"calibration images, W{weight_bits}A{act_bits}, seed {seed}, "
text += f"{builder.iterations:,} iterations"
text = study.caption(study.n_calibration, text)
drawn = units.assign(method=method, order=units.index)
study.save(lowbit.unit_errors(drawn, text), "06_unit_errors")

# %% [markdown]
# ## What we learned

# %%
print(
    f"- {name} at {bits} bits: {moved:.0%} of the weights end at another code than the "
    f"nearest; together they bring the output's error to {learned / nearest:.0%}."
)
kept = units.note.str.contains("kept").sum()
print(
    f"- {method} at W{weight_bits}A{act_bits}: of nearest rounding's error the units "
    f"keep {units.left.min():.0f} to {units.left.max():.0f} %, "
    f"{kept} of {len(units)} stay with it."
)
print(
    f"- Accuracy: float {row['fp32_top1']:.2f} %, nearest {base['top1']:.2f} %, "
    f"learned {row['top1']:.2f} %."
)

# %% [markdown]
# <!-- findings:closing -->
# **Published.** Points lost against float, weights of 2^b levels (resnet20, cifar10-jpeg, 10,000 test images):
#
# | Method | W4A4 | W3A3 | W2A2 | W2A2, first/last 8 |
# | --- | ---: | ---: | ---: | ---: |
# | nearest | 1.72 [1.27, 2.16] | 5.74 [5.08, 6.40] | 45.73 [44.64, 46.81] | 40.96 [39.87, 42.03] |
# | AdaRound | 0.57 [0.21, 0.93] | 1.53 [1.04, 2.02] |  |  |
# | BRECQ | 0.65 [0.30, 1.00] | 1.75 [1.27, 2.23] |  |  |
# | QDrop | 0.67 [0.33, 1.02] | 1.90 [1.42, 2.38] | 7.40 [6.70, 8.09] | 6.24 [5.58, 6.90] |
# <!-- /findings -->
#
# Next: [07_low_bit_methods](07_low_bit_methods.ipynb), every method at every width.
