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
# **Question.** What is quantization, down to the last rounding, and how far do the bits go down before the network breaks?
#
# **Cost.** A minute on the digits; about nine on 10,000 test images with three calibration seeds, on two CPU cores.

# %%
import os
import subprocess
import sys

if "google.colab" in sys.modules and not os.path.isdir("quantlab"):  # fetch the workbook; Colab keeps its own torch
    subprocess.check_call("test -d workbook || git clone --depth 1 https://github.com/TimS-ml/Handwritten-Quantization workbook; pip install -q -e workbook", shell=True)
    os.chdir("workbook")
    sys.path.insert(0, os.getcwd())

# %%
import itertools

import pandas as pd
import quantlab as ql
import torch
from quantlab import observers, plots, ptq
from quantlab.workbook import results
from tqdm.auto import tqdm

# %% tags=["parameters"]
data = "auto"  # auto, cifar10, digits, images, or the path of a folder or archive
model = "resnet20"  # resnet20 or resnet50
checkpoint = "auto"  # auto, or the path of a .safetensors file
seed = 0
preset = "auto"  # smoke, full, or auto: smoke on the digits
weight_bits = 4  # 2 to 8, for the network in section 5
act_bits = 4  # 2 to 8
observer = "histogram"  # minmax, percentile or histogram
n_calibration = 0  # 0: 256 in a smoke run, 1,024 in a full one
n_seeds = 0  # calibration seeds in section 7; 0: one in a smoke run, three in a full one

# %%
images = ql.load_data(data)
smoke = images.smoke if preset == "auto" else preset == "smoke"
limit = 1000 if smoke else None  # test images
n_calibration = n_calibration or min(256 if smoke else 1024, len(images.train))
n_seeds = n_seeds or (1 if smoke else 3)
network, card = ql.load_trained(model, images, checkpoint)

# %% [markdown]
# ## 1. Scale and zero-point
# A *code* $q$ is a small integer that stands for a real number:
#
# $$\hat x = s\,(q - z), \qquad q = \mathrm{clamp}\big(z + \mathrm{round}(x / s),\ q_{\min},\ q_{\max}\big)$$
#
# The scale $s$ is the distance between neighbouring values, the zero-point $z$ the code of zero. (The original's README writes
# $x = s(x_q + z)$, with the other sign of $z$; this is the form of Jacob et al. 2018 and of every runtime.)

# %%
q = ql.choose_qparams(low=-1.0, high=3.0, bits=4)
x = torch.linspace(-1.5, 3.5, 11)
codes = ql.quantize_tensor(x, q)
x_hat = ql.dequantize(codes, q)
print(f"scale {q.scale.item():.4f}, zero_point {q.zero_point.item()}, codes {q.qmin}..{q.qmax}")
pd.DataFrame({"x": x, "code": codes, "x_hat": x_hat, "error": x_hat - x}).T.round(3)

# %% [markdown]
# Inside the range nothing is off by more than half a step; outside, values are *clipped*. Three things hold by construction:

# %%
inside = (x >= x_hat.min()) & (x <= x_hat.max())
assert ((x_hat - x)[inside].abs() <= q.scale / 2 + 1e-6).all(), "round-trip error is at most scale / 2"
assert ql.dequantize(ql.quantize_tensor(torch.zeros(1), q), q).item() == 0, "zero is exact: padding and ReLU rely on it"
assert torch.equal(x_hat, torch.fake_quantize_per_tensor_affine(x, q.scale, q.zero_point, q.qmin, q.qmax)), "torch's kernel agrees"

# %% [markdown]
# ## 2. One weight tensor to 8 bits
# Weights scatter around zero, so they get a *symmetric* range: zero-point 0 and codes $-127..127$, the narrow range in which $-x$ has a code
# whenever $x$ has one. First the whole range, per tensor:

# %%
graph, plan, _ = ptq.prepare(network.cpu())
name = ptq.layers(graph, plan)[len(plan.reads) // 2]
layer = graph.get_submodule(ptq.find_node(graph, name).target)
weight = layer.weight.detach()
q = ql.choose_qparams(weight.min(), weight.max(), bits=8, symmetric=True)
x_hat = ql.fake_quantize(weight, q)
print(f"{name}: {tuple(weight.shape)}, {weight.min():.3f} to {weight.max():.3f}, scale {q.scale.item():.5f}")

# %%
text = f"{plots.data_label(card.trained_on)}, {model}, layer {name}, n = {weight.numel():,} weights, 8 bits per tensor"
plots.save(plots.weight_codes(weight, x_hat, q, text), "03_weight_8bit", card.trained_on, model)


# %% [markdown]
# The error never leaves half a step. But look at how few weights use the outer codes: one outlier sets the step for everyone.
#
# **The trade-off.** A narrower range clips the outliers and makes the step smaller for all others. Clipping error rises, rounding error
# falls, and their sum has its minimum in between. The fewer the bits, the further inside it lies.

# %%
def tradeoff(bits, share):
    q = ql.choose_qparams(weight.min() * share, weight.max() * share, bits, symmetric=True)
    bound = q.scale * q.qmax
    clipping = (weight.abs() - bound).clamp(min=0).square().mean().item()
    total = (ql.fake_quantize(weight, q) - weight).square().mean().item()
    return {"bits": bits, "share": share, "clipping": clipping, "rounding": total - clipping}

curve = pd.DataFrame(tradeoff(bits, share) for bits in (8, 4, 3) for share in torch.linspace(0.1, 1, 91).tolist())
text = f"{plots.data_label(card.trained_on)}, {model}, layer {name}, n = {weight.numel():,} weights, per tensor"
plots.save(plots.range_tradeoff(curve, text), "03_tradeoff", card.trained_on, model)


# %% [markdown]
# **Per channel.** Nothing forces all output channels to share a scale: each accumulates on its own. What that and the search for the best
# range bring together:

# %%
def weight_error(bits, **options):
    low, high = observers.weight_range(weight, bits, **options)
    q = ql.choose_qparams(low, high, bits, symmetric=True, axis=0 if low.dim() else None)
    return (10 * torch.log10(weight.square().mean() / (ql.fake_quantize(weight, q) - weight).square().mean())).item()

choices = {"whole range, per tensor": dict(observer="minmax", per_channel=False), "best range, per tensor": dict(p=2.0, per_channel=False),
           "whole range, per channel": dict(observer="minmax"), "best range, per channel": dict(p=2.0)}
ratios = pd.DataFrame({f"{b} bits": {k: weight_error(b, **v) for k, v in choices.items()} for b in (8, 6, 4, 3)}).rename_axis("signal to noise, dB")
ratios.round(1)

# %%
gain = (ratios.iloc[-1] - ratios.iloc[0]) / (20 * torch.log10(torch.tensor(2.0)).item())  # one bit halves the step: 6.02 dB
print("the two choices together are worth", ", ".join(f"{g:.1f} bits at {b}" for b, g in gain.items()))

# %% [markdown]
# ## 3. One convolution, BatchNorm and ReLU
# In evaluation, BatchNorm multiplies each channel by a constant and adds another, so it *folds* into the convolution before it:
# $w' = w\,\gamma/\sqrt{\sigma^2 + \epsilon}$ and $b' = (b - \mu)\,\gamma/\sqrt{\sigma^2 + \epsilon} + \beta$.

# %%
sample = next(iter(images.calibration(64, seed)))
conv, bn = network.cpu().conv1, network.bn1
folded = graph.get_submodule("conv1")
with torch.no_grad():
    separate, together = bn(conv(sample)), folded(sample)
print(f"largest difference {(separate - together).abs().max():.1e} of values up to {separate.abs().max():.1f}")
assert torch.allclose(separate, together, atol=1e-4)

# %% [markdown]
# Now the same in codes. An 8-bit code times an 8-bit code has 16 bits; the sum over all inputs of an output has more; the bias is added
# at the scale of the products, $s_x s_w$; and only then is the result rounded back to 8 bits, behind the ReLU:

# %%
q_x = ql.choose_qparams(sample.min(), sample.max(), 8)
low, high = observers.weight_range(folded.weight, 8)
q_w = ql.choose_qparams(low, high, 8, symmetric=True, axis=0)
codes_x = (ql.quantize_tensor(sample, q_x) - q_x.zero_point).double()  # float64 holds these integers exactly
codes_w = ql.quantize_tensor(folded.weight.detach(), q_w).double()
unit = (q_x.scale * q_w.scale).double()
bias = torch.round(folded.bias.detach().double() / unit)
accumulator = torch.nn.functional.conv2d(codes_x, codes_w, bias, folded.stride, folded.padding)
result = (accumulator * unit.view(1, -1, 1, 1)).relu()


# %%
def signed_bits(t):
    return int(t.abs().max()).bit_length() + 1

products = codes_x.abs().max() * codes_w.abs().max()
steps = {"input code minus zero-point": signed_bits(codes_x), "weight code": signed_bits(codes_w), "one product": signed_bits(products),
         "bias": signed_bits(bias), "accumulator": signed_bits(accumulator)}
error = (result.float() - together.relu()).abs().max().item()
print(f"largest error behind the ReLU: {error:.4f}, of values up to {together.max():.2f}")
pd.Series(steps, name="bits needed").to_frame()

# %% [markdown]
# The accumulator stays far below the 32 bits it gets. Fake quantization computes the same thing in float, from the values of the codes:

# %%
simulated = torch.nn.functional.conv2d(ql.fake_quantize(sample, q_x), ql.fake_quantize(folded.weight.detach(), q_w),
                                       (bias * unit).float(), folded.stride, folded.padding).relu()
print(f"integer against simulated: {(simulated - result).abs().max():.1e}")
assert torch.allclose(simulated, result.float(), atol=1e-4)

# %% [markdown]
# ## 4. One activation edge
# Activations are not known in advance: *calibration* runs training images through the float network and counts what passes every edge.
# One pass yields a mergeable histogram per edge, and every range setter at every width is a function of it.

# %%
calibration = images.calibration(n_calibration, seed)
stats = ql.collect(network, calibration)
edge_name = max(stats.edges, key=lambda n: stats.edges[n].maximum / observers.percentile(stats.edges[n], 4)[1] if stats.edges[n].minimum >= 0 and stats.edges[n].maximum else 0)
edge = stats.edges[edge_name]
print(f"{len(stats.edges)} edges; {edge_name} has the longest tail: {edge.count:,} values, {edge.zeros / edge.count:.0%} of them zero, up to {edge.maximum:.2f}")

# %%
OBSERVERS = ("minmax", "percentile", "histogram")  # 04 compares all there are
ranges = pd.DataFrame([(o, *observers.find_observer(o)(edge, act_bits)) for o in OBSERVERS], columns=["observer", "low", "high"])
text = plots.row_caption(images, model, edge.count, f"values on edge {edge_name} from {n_calibration:,} calibration images; ranges for {act_bits} bits")
figure = plots.clip_histogram(edge, ranges, text, f"Where to clip? Edge {edge_name}", "activation")
plots.save(figure, "03_activation_edge", images, model)


# %% [markdown]
# The mean squared error that each choice makes on this edge, by width. The whole range wastes codes on values that hardly occur; a fixed
# percentile cannot know how many codes there are; the search does.

# %%
def edge_error(observer, bits):
    low, high = observers.find_observer(observer)(edge, bits)
    return observers.quantization_error(edge, [low], [high], bits).item()

errors = pd.DataFrame({f"{b} bits": {o: edge_error(o, b) for o in OBSERVERS} for b in (8, 6, 4, 3)})
assert (errors.loc["histogram"] <= errors.min() * 1.001).all(), "the search is never worse than the others on its own criterion"
errors.style.format("{:.2e}")

# %% [markdown]
# ## 5. The whole network
# Where are codes stored? Behind every conv-ReLU and add-ReLU, in front of every add, and at the image: found from the graph, nothing else
# is rounded. Operands and results of adds keep 8 bits (`residual_bits`), so that the residual stream stays accurate.

# %%
config = ql.QuantConfig(weight_bits=weight_bits, act_bits=act_bits, observer=observer)
quantized = ql.quantize(network, stats, config)
plan = quantized.plan
print(f"{len(plan.reads)} layers, {len(plan.stores)} stored values: {pd.Series(plan.stores).value_counts().to_dict()}")
print("computed in float between two sets of codes:", ", ".join(plan.floats) or "nothing")

# %%
baseline = ql.evaluate(network, images.test, limit=limit)
result = ql.evaluate(quantized, images.test, limit=limit)
drop, low, high = ql.paired_drop(baseline.correct, result.correct)
print(f"float {baseline.top1:.2f} %, W{weight_bits}A{act_bits} {result.top1:.2f} %: {drop:+.2f} points lost [{low:+.2f}, {high:+.2f}], n = {result.n:,}")
print(f"weights {ptq.weight_bytes(quantized):,} bytes instead of {sum(4 * p.numel() for p in network.parameters()):,}; {result.images_per_s:,.0f} images/s")


# %% [markdown]
# ## 6. Which error should the weights' search minimise?
# The squared error is the obvious choice, and not the best: it clips most, so every layer's output shrinks a little, and layers multiply.
# A larger exponent $p$ in $\sum|\hat w - w|^p$ clips less. Such a choice is made on the *held-out* part of the training images:

# %%
def heldout_top1(bits, p):
    qmodel = ql.quantize(network, stats, ql.QuantConfig(weight_bits=bits, act_bits=bits, weight_norm=p))
    return ql.evaluate(qmodel, images.heldout, limit=limit).top1

norms = pd.DataFrame({f"W{bits}A{bits}": {p: heldout_top1(bits, p) for p in (2.0, 2.4, 3.0, 4.0)} for bits in (4, 3)}).rename_axis("p")
best = ", ".join(f"p = {norms[c].idxmax():g} at {c}" for c in norms)
print(f"top-1 in % on held-out images, n = {min(limit or len(images.heldout), len(images.heldout)):,}; best: {best}")
norms.round(2)


# %% [markdown]
# `QuantConfig` uses $p = 3$: of these four the best at W4A4 on the held-out images of `cifar10-jpeg`, by less than the noise of 5,000 images. At three bits more may be better still,
# and the choice matters far more there.

# %% [markdown]
# ## 7. 8, 6, 4 and 3 bits
# Three range setters, four widths, from the same statistics. `minmax` takes the whole range of activations *and* weights, as the simplest
# tool would; with the other two the weights' range is searched. So their difference is not that of the activations' ranges alone.

# %%
def measure(observer, bits, stats, seed):
    weights = "minmax" if observer == "minmax" else "lp"
    config = ql.QuantConfig(weight_bits=bits, act_bits=bits, observer=observer, weight_observer=weights)
    qmodel = ql.quantize(network, stats, config)
    result = ql.evaluate(qmodel, images.test, limit=limit)
    return results.make_row(data=images, model=model, card=card, baseline=baseline, result=result, method="by hand", config=config,
                            n_calibration=n_calibration, seed=seed, bytes=ptq.weight_bytes(qmodel), notebook="03_quantize_by_hand")

rows = []
for s in range(seed, seed + n_seeds):
    stats = ql.collect(network, images.calibration(n_calibration, s))
    grid = list(itertools.product(OBSERVERS, (8, 6, 4, 3)))
    rows += [measure(o, bits, stats, s) for o, bits in tqdm(grid, desc=f"seed {s}")]
frame = results.record(rows).assign(bits=lambda f: f.weight_bits.astype(int))

# %%
table = frame.groupby(["observer", "bits"], sort=False).agg(top1=("top1", "mean"), std=("top1", "std"), drop=("drop", "mean"),
                                                low=("drop_low", "mean"), high=("drop_high", "mean"), kB=("bytes", lambda b: b.mean() / 1e3))
table.round(2)

# %%
text = plots.row_caption(images, model, baseline.n, f"test images, {n_calibration:,} calibration images, {n_seeds} calibration seed(s), residual stream 8 bits")
plots.save(plots.accuracy_by_bits(frame, text), "03_accuracy_by_bits", images, model)

# %% [markdown]
# ## What we learned

# %%
means = table["drop"].unstack("observer")
for bits in (8, 4, 3):
    lost = ", ".join(f"{v:+.2f} with {o}" for o, v in means.loc[bits].sort_values().items())
    print(f"- {bits} bits, points lost: {lost}.")
print(f"- Weights at 4 bits take {table.kB.xs(4, level='bits').mean():,.0f} kB, scales and biases included, against {4e-3 * sum(p.numel() for p in network.parameters()):,.0f} kB in float.")

# %% [markdown]
# Next: [04_observers](04_observers.ipynb), why one range is better than another, and which layer breaks first.
