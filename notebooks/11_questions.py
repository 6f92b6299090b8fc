# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 11 · Questions, answered by measuring
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/TimS-ml/Handwritten-Quantization/blob/main/notebooks/11_questions.ipynb)
#
# **Question.** The original README asks six questions and answers them in words. What are the answers in numbers?
#
# **Cost.** Under a minute on the digits; about twelve minutes on 10,000 test images on two CPU cores, nearly all of it evaluation (49 networks).

# %%
import os
import subprocess
import sys

if "google.colab" in sys.modules and not os.path.isdir("quantlab"):  # fetch the workbook; Colab keeps its own torch
    subprocess.check_call("test -d workbook || git clone --depth 1 https://github.com/TimS-ml/Handwritten-Quantization workbook; pip install -q -e workbook", shell=True)
    os.chdir("workbook")
    sys.path.insert(0, os.getcwd())

# %%
import copy
import functools
import itertools
import math

import pandas as pd
import quantlab as ql
import torch
import torch.nn.functional as F
from quantlab import graph, observers, plan, plots
from quantlab.edgestats import EdgeStats
from quantlab.plots import questions
from quantlab.workbook import results
from torch import nn
from tqdm.auto import tqdm

# %% tags=["parameters"]
data = "auto"  # auto, cifar10, digits, images, or the path of a folder or archive
model = "resnet20"  # resnet20 or resnet50
checkpoint = "auto"  # auto, or the path of a .safetensors file
seed = 0
preset = "auto"  # smoke, full, or auto: smoke on the digits
bits = 4  # 2 to 8, for the pictures in sections 4 and 5
n_calibration = 0  # 0: 256 in a smoke run, 1,024 in a full one

# %%
images = ql.load_data(data)
smoke = images.smoke if preset == "auto" else preset == "smoke"
limit = 1000 if smoke else None  # test images
n_calibration = n_calibration or min(256 if smoke else 1024, len(images.train))
depths = (4, 3) if smoke else (8, 4, 3)  # bits in sections 6 and 7
network, card = ql.load_trained(model, images, checkpoint)
baseline = ql.evaluate(network, images.test, limit=limit)
network = network.cpu()  # sections 1 to 5 look at single layers; evaluation moves what it evaluates
stats = ql.collect(network, images.calibration(n_calibration, seed))
sample = next(iter(images.calibration(n_calibration, seed, batch_size=16 if smoke else 64)))


# %% [markdown]
# ## 1. Int8, uint8 and float32
# The original's table, computed. A format with $e$ exponent and $m$ mantissa bits has $2^{e+m+1}$ bit patterns. One exponent is kept for
# NaN and infinities, and zero has two signs. So $2^{32}$ patterns are fewer different numbers; for float16 they can be counted one by one.

# %%
def float_row(dtype, exponent):
    info = torch.finfo(dtype)
    mantissa = info.bits - 1 - exponent
    return {"smallest": info.min, "largest": info.max, "bit patterns": 2**info.bits,
            "different numbers": 2**info.bits - 2 ** (mantissa + 1) - 1, "step at 1": info.eps, "step at the largest": info.max * info.eps / (2 - info.eps)}

def integer_row(dtype):
    info = torch.iinfo(dtype)
    return {"smallest": info.min, "largest": info.max, "bit patterns": 2**info.bits, "different numbers": 2**info.bits, "step at 1": 1, "step at the largest": 1}

rows = {"int8": integer_row(torch.int8), "uint8": integer_row(torch.uint8), "float16": float_row(torch.float16, 5), "float32": float_row(torch.float32, 8)}
halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
assert len(halves[torch.isfinite(halves)].double().unique()) == rows["float16"]["different numbers"], "counted one by one"
pd.DataFrame(rows).T.map(lambda v: f"{v:,}" if isinstance(v, int) else f"{v:.6g}")

# %% [markdown]
# The largest float32 is $(2 - 2^{-23})\cdot 2^{127}$; the original's table lacks the minus sign in the exponent. Integers have the same step
# everywhere, floats a step that grows with the number: that is the difference that matters, not the count.

# %%
assert torch.finfo(torch.float32).max == (2 - 2.0**-23) * 2.0**127


# %% [markdown]
# ## 2. The dataflow of one convolution, BatchNorm and ReLU
# *"Explain the bit-accuracy at each step."* BatchNorm is folded, then everything between two sets of 8-bit codes is integers:
#
# $$ a = \sum (x_q - z_x)\,w_q + b_q, \qquad y_q = \mathrm{clamp}\big(z_y + \mathrm{round}(a\,M)\big), \qquad M = \frac{s_x s_w}{s_y} \approx m\,2^{k-31} $$
#
# The real number $M$, one a channel, is the only thing that is not an integer. It becomes a 31-bit integer $m$ and a shift, and the ReLU
# becomes the lower end of the clamp. First the convolutions of a quantized network with the codes they read and write:

# %%
def convolutions(qmodel):
    """(name, layer, QParams read, followed by a ReLU?, QParams written) of every convolution."""
    modules = dict(qmodel.named_modules())
    for node in qmodel.graph.nodes:
        if node.op == "call_module" and isinstance(modules[node.target], nn.Conv2d):
            user = next(iter(node.users))
            relu = isinstance(modules[user.target], nn.ReLU)
            writer = next(iter(user.users)) if relu else user
            yield node.name, modules[node.target], modules[node.args[0].target].qparams, relu, modules[writer.target].qparams


# %%
def codes_read(qmodel, inputs):
    """int32 codes that every convolution reads, by layer, for one batch."""
    seen = {}
    hooks = [layer.register_forward_pre_hook(lambda m, x: seen.update({m: x[0]})) for _, layer, *_ in convolutions(qmodel)]
    with torch.no_grad():
        qmodel(inputs)
    for hook in hooks:
        hook.remove()
    return {layer: ql.quantize_tensor(seen[layer], q) for _, layer, q, *_ in convolutions(qmodel)}


# %% [markdown]
# Now the integers. float64 holds every one of them exactly (they stay below $2^{53}$), so torch's convolution can do the sums.

# %%
def conv(x, w, b, layer):
    return F.conv2d(x, w, b, layer.stride, layer.padding, layer.dilation, layer.groups)

def accumulate(codes, layer, q_in):
    """Weight codes, bias codes, sum of products and the real value of one unit, all float64 that hold integers but the last."""
    w_q = ql.quantize_tensor(layer.weight.detach(), layer.weight_qparams).double()
    unit = q_in.scale.double() * layer.weight_qparams.scale.double()
    b_q = torch.round(layer.bias.detach().double() / unit)
    return w_q, b_q, conv((codes - q_in.zero_point).double(), w_q, None, layer), unit


# %%
def fixed_point(real):
    """Integers (m, k) with real = m * 2^(k - 31) and m in [2^30, 2^31); float64 [C] -> int64 [C] each."""
    mantissa, exponent = torch.frexp(real)
    m, k = torch.round(mantissa * 2**31).long(), exponent.long()
    return torch.where(m == 2**31, m // 2, m), torch.where(m == 2**31, k + 1, k)

def requantize(total, m, k, q_out, relu):
    """int64 accumulators [N, C, H, W] -> int64 codes: (a * m + half) >> (31 - k), then the zero-point, then the clamp."""
    m, shift = m.view(1, -1, 1, 1), (31 - k).view(1, -1, 1, 1)
    rounded = (total * m + (1 << (shift - 1))) >> shift
    return rounded, (rounded + q_out.zero_point).clamp(int(q_out.zero_point) if relu else q_out.qmin, q_out.qmax)


# %% [markdown]
# Every intermediate of the first layer with the range that occurs on calibration images, and the widest range that any input at all could
# bring about with these weights.

# %%
def width(low, high):
    """Bits of the integers low..high: unsigned, or two's complement where low is negative."""
    return int(high).bit_length() if low >= 0 else max(int(high), -int(low) - 1).bit_length() + 1

def worst_sum(w_q, low, high):
    """Least and largest sum of products per channel, for inputs anywhere in low..high."""
    a, b = (w_q * low).flatten(1), (w_q * high).flatten(1)
    return torch.minimum(a, b).sum(1), torch.maximum(a, b).sum(1)

def row(step, container, seen, worst, example):
    low, high = int(seen.min()), int(seen.max())
    return {"step": step, "container": container, "low": low, "high": high, "bits": width(low, high),
            "worst_low": int(min(worst)), "worst_high": int(max(worst)), "worst_bits": width(min(worst), max(worst)), "example": example}


# %%
qmodel = ql.quantize(network, stats, ql.QuantConfig(weight_bits=8, act_bits=8))
layers, codes = list(convolutions(qmodel)), codes_read(qmodel, sample)
name, layer, q_in, relu, q_out = layers[0]
w_q, b_q, sums, unit = accumulate(codes[layer], layer, q_in)
m, k = fixed_point(unit / q_out.scale.double())
total = (sums + b_q.view(1, -1, 1, 1)).long()
shifted, written = requantize(total, m, k, q_out, relu)
channel, y, x = (int(i) for i in torch.unravel_index((written[0] - 100).abs().argmin(), written[0].shape))  # a pixel of the first image
tap = (codes[layer][0, :, y * layer.stride[0], x * layer.stride[1]], w_q[channel, :, w_q.shape[2] // 2, w_q.shape[3] // 2])
z, (lo, hi) = int(q_in.zero_point), worst_sum(w_q, q_in.qmin - int(q_in.zero_point), q_in.qmax - int(q_in.zero_point))
ends = torch.stack([lo + b_q, hi + b_q]).long()
scaled = [int(v) for v in (ends * m).flatten()]
worst_shifted, _ = requantize(ends.view(2, -1, 1, 1), m, k, q_out, relu)

# %%
at = (0, channel, y, x)
steps = pd.DataFrame([
    row("input code", "uint8", codes[layer], (q_in.qmin, q_in.qmax), int(tap[0][0])),
    row("minus zero-point", "int16", codes[layer] - z, (q_in.qmin - z, q_in.qmax - z), int(tap[0][0]) - z),
    row("weight code", "int8", w_q, (-127, 127), int(tap[1][0])),
    row("sum of products", "int32", sums, (int(lo.min()), int(hi.max())), f"{int(sums[at]):,}"),
    row("bias code", "int32", b_q, (int(b_q.min()), int(b_q.max())), f"{int(b_q[channel]):,}"),
    row("plus bias", "int32", total, (int(ends.min()), int(ends.max())), f"{int(total[at]):,}"),
    row("multiplier", "int32", m, (2**30, 2**31 - 1), f"{int(m[channel]):,}"),
    row("times multiplier", "int64", total * m.view(1, -1, 1, 1), (min(scaled), max(scaled)), f"{int(total[at] * m[channel]):.2e}"),
    row("shifted right", "int32", shifted, (int(worst_shifted.min()), int(worst_shifted.max())), f"{int(shifted[at])} (by {31 - int(k[channel])})"),
    row("clamped: ReLU", "uint8", written, (q_out.qmin, q_out.qmax), int(written[at])),
])
steps.drop(columns="example")

# %%
with torch.no_grad():
    exact = conv(sample, layer.weight, layer.bias, layer).relu()[at].item() if relu else conv(sample, layer.weight, layer.bias, layer)[at].item()
decoded = (q_out.scale * (written[at] - q_out.zero_point)).item()
title = f"{name} + BatchNorm + ReLU in integers, {w_q[0].numel()} products a sum; “here” is one output: code {int(written[at])} = {decoded:.3f}"
text = plots.row_caption(images, model, len(sample), "calibration images, 8 bits; ranges seen on them, and the worst any input can cause; input and weight of one tap")
print(f"code {int(written[at])} decodes to {decoded:.4f}; the same layer in float on the unrounded image gives {exact:.4f} (step {q_out.scale.item():.4f})")
plots.save(questions.dataflow(steps, text, title), "11_dataflow", images, model)


# %% [markdown]
# No single layer needs 32 bits. What the widest of all layers needs, at every width of weights and activations (the image keeps 8 bits):

# %%
def accumulator_bits(width_of_codes):
    qmodel = ql.quantize(network, stats, ql.QuantConfig(weight_bits=width_of_codes, act_bits=width_of_codes))
    codes, needed = codes_read(qmodel, sample), []
    for _, layer, q, *_ in convolutions(qmodel):
        w_q, b_q, sums, _ = accumulate(codes[layer], layer, q)
        lo, hi = worst_sum(w_q, q.qmin - int(q.zero_point), q.qmax - int(q.zero_point))
        total = sums + b_q.view(1, -1, 1, 1)
        needed.append({"product": width(int(-w_q.abs().max() * (q.qmax - q.qmin)), int(w_q.abs().max() * (q.qmax - q.qmin))), "bias": width(int(b_q.min()), int(b_q.max())),
                       "accumulator, seen": width(int(total.min()), int(total.max())), "accumulator, worst case": width(int((lo + b_q).min()), int((hi + b_q).max()))})
    return pd.DataFrame(needed).max()

widths = pd.DataFrame({f"{b} bits": accumulator_bits(b) for b in (8, 6, 4, 3, 2)}).rename_axis("bits needed, widest layer")
widths


# %% [markdown]
# ## 3. "Freeze": multipliers computed in advance
# *"Some parameters can be pre-calculated."* Step by step, every call multiplies codes by scales, convolves, divides by the output's scale
# and rounds. Frozen, weights and biases are codes already and $M$ is one number. Is it the same? All convolutions, each on the same codes;
# the reference is the step-by-step arithmetic in float64.

# %%
def step_by_step(codes, layer, q_in, relu, q_out, dtype):
    w_q, b_q, _, unit = accumulate(codes[:1], layer, q_in)
    x = q_in.scale.to(dtype) * (codes - q_in.zero_point)
    w = layer.weight_qparams.scale.to(dtype).view(-1, 1, 1, 1) * w_q.to(dtype)
    y = conv(x, w, (b_q * unit).to(dtype), layer)
    y = y.relu() if relu else y
    return (torch.round(y / q_out.scale.to(dtype)) + q_out.zero_point).clamp(q_out.qmin, q_out.qmax).long()

def frozen(codes, layer, q_in, relu, q_out, fixed):
    _, b_q, sums, unit = accumulate(codes, layer, q_in)
    total, multiplier = sums + b_q.view(1, -1, 1, 1), unit / q_out.scale.double()
    if fixed:
        return requantize(total.long(), *fixed_point(multiplier), q_out, relu)[1]
    return (torch.round(total * multiplier.view(1, -1, 1, 1)) + q_out.zero_point).clamp(int(q_out.zero_point) if relu else q_out.qmin, q_out.qmax).long()


# %%
forms = {"step by step, float32": functools.partial(step_by_step, dtype=torch.float32), "frozen M, float64": functools.partial(frozen, fixed=False),
         "frozen M, 31-bit integer": functools.partial(frozen, fixed=True)}
counts = []
for name, layer, q_in, relu, q_out in tqdm(layers, desc="freeze"):
    reference = step_by_step(codes[layer], layer, q_in, relu, q_out, torch.float64)
    for form, function in forms.items():
        apart = (function(codes[layer], layer, q_in, relu, q_out) - reference).abs()
        counts.append({"form": form, "layer": name, "codes": apart.numel(), "differing": int((apart > 0).sum()), "largest difference": int(apart.max())})
freeze = pd.DataFrame(counts).groupby("form", sort=False).agg({"codes": "sum", "differing": "sum", "largest difference": "max"})
assert freeze["largest difference"].max() <= 1, "a difference is a tie that falls to the other side"
freeze

# %% [markdown]
# What it saves is work outside the convolutions: multiplications per image to decode the inputs and the weights and to encode the outputs.

# %%
step = sum(c[0].numel() + layer.weight.numel() for layer, c in codes.items()) + freeze.codes.iloc[0] // len(sample)
print(f"multiplications per image outside the convolutions: {step:,} step by step, {freeze.codes.iloc[0] // len(sample):,} frozen")

# %% [markdown]
# ## 4. One weight tensor to 8 bits
# *"Explain how you do the quantization, and what is the trade-off."* One 3x3 filter on its way: weights, codes, values, errors. The original writes
# $x = s\,(x_q + z)$; with $z$ of the other sign it is the same.

# %%
name, layer, q_in, relu, _ = layers[len(layers) // 2]
folded = dict(graph.fold(graph.trace(network)).named_modules())
weight = folded[next(n.target for n in qmodel.graph.nodes if n.name == name)].weight.detach()
a, b = weight.min().item(), weight.max().item()
q = ql.choose_qparams(a, b, bits=8, symmetric=True)
filter_ = weight[0, 0].flatten()
filter_codes = ql.quantize_tensor(filter_, q)
assert torch.equal(ql.dequantize(filter_codes, q), q.scale * (filter_codes + -q.zero_point)), "the original's formula with -z"
print(f"{name}: {weight.numel():,} weights in [{a:.4f}, {b:.4f}], scale {max(-a, b):.4f} / 127 = {q.scale.item():.6f}")
values = ql.dequantize(filter_codes, q)
pd.DataFrame({"weight": filter_, "code": filter_codes, "value": values, "error in steps": (values - filter_) / q.scale}).T.round(4)


# %% [markdown]
# The trade-off in numbers: narrowing the range clips some weights and makes the step finer for all. How far it pays (least squared error),
# and what it brings, as signal to noise and in equivalent bits (6.02 dB each). Notebook 03 draws the curves.

# %%
def tradeoff(bits):
    def sqnr(high):
        q = ql.choose_qparams(-high, high, bits, symmetric=True)
        return 10 * math.log10(weight.square().mean() / (ql.fake_quantize(weight, q) - weight).square().mean()), q.scale.item()

    whole, best = max(-a, b), observers.weight_range(weight, bits, p=2.0, per_channel=False)
    high = float(torch.maximum(-best[0], best[1]))
    (before, step), (after, finer) = sqnr(whole), sqnr(high)
    clipped = (weight.abs() > high + finer / 2).double().mean().item()
    return {"bits": bits, "whole range": whole, "step": step, "dB": before, "best range": high, "finer step": finer, "clipped %": 100 * clipped,
            "dB, best": after, "worth bits": (after - before) / (20 * math.log10(2))}

trade = pd.DataFrame(tradeoff(b) for b in (8, 6, 4, 3, 2)).set_index("bits")
trade.round(4)

# %%
strips = pd.DataFrame({"name": ["min-max, no saturation", "best range, with saturation"], "high": trade.loc[bits, ["whole range", "best range"]].tolist()})
text = f"{plots.data_label(card.trained_on)}, {model}, layer {name}, n = {weight.numel():,} weights, {bits} bits per tensor"
plots.save(questions.minmax_strip(weight.flatten().numpy(), strips, bits, text), "11_minmax_strip", card.trained_on, model)

# %% [markdown]
# ## 5. Input and output of one layer, and which error is minimised
# *"How do you minimise the error?"* Few activations occupy a large part of the range. An edge with a long tail, before and after
# rounding: the entropy says how many bits its codes really carry.

# %%
edge_name = max((n for n, e in stats.edges.items() if e.minimum >= 0 < e.maximum), key=lambda n: stats.edges[n].maximum / observers.percentile(stats.edges[n], bits)[1])
edge = stats.edges[edge_name]

def coded(observer):
    q = ql.choose_qparams(*observers.OBSERVERS[observer](edge, bits), bits)
    centers, counts = edge.histogram()
    number = torch.bincount(ql.quantize_tensor(centers.float(), q).long(), counts.double(), minlength=2**bits)
    number[int(q.zero_point)] += edge.zeros
    codes = torch.arange(2**bits)
    return ql.dequantize(codes, q).numpy(), number.numpy(), q.scale.item() * (q.qmax - int(q.zero_point))

text = plots.row_caption(images, model, edge.count, f"values on edge {edge_name} from {n_calibration:,} calibration images, {bits} bits")
plots.save(questions.clipped_histograms(edge, {o: coded(o) for o in ("minmax", "histogram")}, text), "11_clipping", images, model)

# %% [markdown]
# A range setter minimises the error of the tensor that it sees. What counts is the error behind the layer, and in the end the logits.
# One layer, its input or its weight rounded and nothing else, over the clip range:

# %%
float_graph = graph.fold(graph.trace(network))
float_layer = float_graph.get_submodule(next(n.target for n in qmodel.graph.nodes if n.name == name))

def run(x=None, w=None):
    """(input, weight, layer's output, logits) of the float network in which `x` and `w` (functions) replace the layer's input and weight."""
    seen, before = {}, float_layer.weight.data
    hooks = [float_layer.register_forward_pre_hook(lambda m, i: seen.update(input=i[0] if x is None else x(i[0])) or seen["input"]),
             float_layer.register_forward_hook(lambda m, i, o: seen.update(output=o.relu() if relu else o))]
    float_layer.weight.data = before if w is None else w(before)
    with torch.no_grad():
        seen.update(logits=float_graph(sample), weight=float_layer.weight.data)
    float_layer.weight.data = before
    for hook in hooks:
        hook.remove()
    return seen


# %%
clean = run()
measured_at = {"input": ("input", "output", "logits"), "weight": ("weight", "output", "logits")}

def errors(part, share):
    whole = clean[part]
    low, high = (share * v for v in (min(whole.min().item(), 0), whole.max().item()))
    q = ql.choose_qparams(low, high, bits, symmetric=part == "weight")
    noisy = run(**{"x" if part == "input" else "w": lambda t: ql.fake_quantize(t, q)})
    return [{"part": f"{part} of {name}, {bits} bits", "share": share, "measured": f"the {p}" if p != "output" else "the layer's output",
             "sqnr": 10 * math.log10(clean[p].square().sum() / (noisy[p] - clean[p]).square().sum())} for p in measured_at[part]]

shares = torch.linspace(0.1, 1, 19 if smoke else 46).tolist()
curve = pd.DataFrame(itertools.chain.from_iterable(errors(part, s) for part in measured_at for s in tqdm(shares, desc=part)))

# %%
text = plots.row_caption(images, model, len(sample), "calibration images; only the named tensor is rounded, per tensor")
plots.save(questions.error_by_range(curve, text), "11_error_by_range", images, model)

# %%
best = curve.loc[curve.groupby(["part", "measured"], sort=False).sqnr.idxmax()].set_index(["part", "measured"]).share.unstack()
for part, lines in curve.groupby("part", sort=False):
    own, logits = (lines[lines.measured == m].set_index("share").sqnr for m in (lines.measured.iloc[0], "the logits"))
    print(f"{part}: least error of its own at {own.idxmax():.2f} of the range, of the logits at {logits.idxmax():.2f};"
          f" minimising its own costs the logits {logits.max() - logits[own.idxmax()]:.2f} dB, the whole range {logits.max() - logits[1.0]:.2f} dB")
best.round(2)


# %% [markdown]
# ## 6. Fused or not: where values are rounded
# *"How to further increase the accuracy."* The same weights, ranges and observer, rounded at different places. A network for that: statistics
# of every module's input and output, then hooks that round. `batchnorm=True` folds.

# %%
@functools.cache
def observed(batchnorm):
    """A float graph, what its modules read and write (EdgeStats by (node, side)), and where the package would store codes."""
    g = graph.fold(graph.trace(network), batchnorm=batchnorm)
    calls = {n.name: g.get_submodule(n.target) for n in g.graph.nodes if n.op == "call_module"}
    seen = {(name, side): EdgeStats() for name in calls for side in ("in", "out")}
    for name, module in calls.items():
        module.register_forward_hook(lambda m, i, o, name=name: (seen[name, "in"].update(i[0]), seen[name, "out"].update(o)) and None)
    with torch.no_grad():
        for batch in images.calibration(n_calibration, seed):
            g(batch)
    for module in calls.values():
        module._forward_hooks.clear()
    return g, seen, plan.make_plan(g)


# %%
@functools.cache
def choose(batchnorm, node, side, width):
    """QParams of what a module reads ("in") or writes ("out")."""
    edge = observed(batchnorm)[1][node, side]
    return ql.choose_qparams(*observers.histogram(edge, width), width)


# %%
@functools.cache
def rounded(batchnorm, node, target, width, input_width):
    """A layer's weights per channel and its bias at s_x * s_w, as ql.quantize rounds them."""
    layer = observed(batchnorm)[0].get_submodule(target)
    low, high = observers.weight_range(layer.weight, width)
    q = ql.choose_qparams(low, high, width, symmetric=True, axis=0)
    unit = choose(batchnorm, node, "in", input_width).scale.double() * q.scale.double()
    bias = None if layer.bias is None else (torch.round(layer.bias.detach().double() / unit) * unit).float()
    return ql.fake_quantize(layer.weight.detach(), q), bias


# %%
def rounds(q):
    return lambda module, values, output=None: ql.fake_quantize(values[0] if output is None else output, q.to(values[0].device))


# %% [markdown]
# Each value is stored where `plan` says, plus the places that a variant adds: behind the convolution, behind the BatchNorm, around the
# ReLU. Operands and results of adds keep 8 bits, a layer reads `acts` bits, the image has 8.

# %%
def simulate(batchnorm, weights, acts, extra=(), skip=(), around_relu=None):
    """A network that rounds to those bits at the plan's places, at modules of the types in `extra`, and not at those in `skip`."""
    g, where = copy.deepcopy(observed(batchnorm)[0]), observed(batchnorm)[2]
    for node in [n for n in g.graph.nodes if n.op == "call_module"]:
        module, role, name = g.get_submodule(node.target), where.stores.get(node.name), node.name
        width, reads = 8 if role == "residual" else acts, 8 if name in where.first else acts
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            weight, bias = rounded(batchnorm, name, node.target, weights, reads)
            module.load_state_dict({"weight": weight} if bias is None else {"weight": weight, "bias": bias})
            module.register_forward_pre_hook(rounds(choose(batchnorm, name, "in", reads)))
        if around_relu and isinstance(module, nn.ReLU):
            around_relu(module, *(choose(batchnorm, name, side, width) for side in ("in", "out")))
        if (role and not isinstance(module, skip)) or isinstance(module, extra):
            module.register_forward_hook(rounds(choose(batchnorm, name, "out", width)))
    return g


# %% [markdown]
# The check: rounding only where the plan says is, value by value, the network that `ql.quantize` makes.

# %%
for w, a in ((8, 8), (4, 8), (3, 4)):
    package = ql.quantize(network, stats, ql.QuantConfig(weight_bits=w, act_bits=a))
    with torch.no_grad():
        assert torch.equal(simulate(True, w, a)(sample), package(sample)), "the simulation of this section is the package's network"


# %%
def measure(variant, width, qmodel):
    result = ql.evaluate(qmodel, images.test, limit=limit)
    drop, low, high = ql.paired_drop(baseline.correct, result.correct)
    return {"bits": width, "variant": variant, "top1": result.top1, "drop": drop, "drop_low": low, "drop_high": high}

bn_alone = nn.Conv2d  # the plan of an unfolded graph stores every convolution's output; not so where BatchNorm is computed in float behind it
variants = {"folded, rounded once": dict(batchnorm=True), "BatchNorm in float, rounded once": dict(batchnorm=False, skip=bn_alone),
            "conv and BatchNorm rounded apart": dict(batchnorm=False, extra=nn.BatchNorm2d)}
grid = list(itertools.product(variants, depths))
fused = pd.DataFrame(measure(v, w, simulate(weights=w, acts=w, **variants[v])) for v, w in tqdm(grid, desc="fused or not"))
fused.pivot(index="variant", columns="bits", values="drop").reindex(variants).sort_index(axis=1, ascending=False).round(2)

# %%
text = plots.row_caption(images, model, baseline.n, f"test images; W = A = bits, residual stream 8 bits, {n_calibration:,} calibration images; paired 95 % intervals")
plots.save(questions.variant_drops(fused, text, "Fused or not: points lost against float"), "11_fused", images, model)


# %% [markdown]
# ## 7. Rounding before *and* after the activation
# *"You need to make sure that the scale and zero point before and after quantization are the same."* Four ways to round in front of every ReLU:

# %%
def same(module, before, after):  # the parameters of the value behind the ReLU: negative values saturate at code 0
    module.register_forward_pre_hook(rounds(after))

def different(module, before, after):  # each side has its own range; the value is rounded twice
    module.register_forward_pre_hook(rounds(before))

def signed(module, before, after):  # both sides use the range in front: behind the ReLU, codes below the zero-point are never used
    module.register_forward_pre_hook(rounds(before))
    module.register_forward_hook(rounds(before))

def misread(module, before, after):  # the code passes the ReLU unchanged and is decoded with the parameters behind it
    zero = int(before.zero_point)
    module.register_forward_hook(lambda m, x, y: ql.dequantize(ql.quantize_tensor(x[0], before.to(y.device)).clamp(min=zero), after.to(y.device)))


# %%
ways = {"after only": {}, "before and after, same parameters": dict(around_relu=same), "before and after, each its own": dict(around_relu=different),
        "both the range in front": dict(around_relu=signed, skip=nn.ReLU), "one code, two parameters (a bug)": dict(around_relu=misread)}
grid = list(itertools.product(ways, depths))
twice = pd.DataFrame(measure(v, w, simulate(True, w, w, **ways[v])) for v, w in tqdm(grid, desc="before and after"))
exactly = twice.set_index(["variant", "bits"]).top1
assert all(exactly["after only", w] == exactly["before and after, same parameters", w] for w in depths), "round(relu(round(x))) = round(x) clamped at zero"
twice.pivot(index="variant", columns="bits", values="drop").reindex(ways).sort_index(axis=1, ascending=False).round(2)

# %%
sound = twice[~twice.variant.str.contains("bug")]
plots.save(questions.variant_drops(sound, text, "Rounding before and after the ReLU: points lost against float"), "11_before_and_after", images, model)

# %% [markdown]
# The original's picture shows the bug: input range $[-1, 1]$, output range $[0, 1]$, and the same code stands for two values. On the right the
# same with the ranges of a ReLU of this network.

# %%
g = observed(True)[0]
relu_name = next(n.name for n in g.graph.nodes if n.op == "call_module" and isinstance(g.get_submodule(n.target), nn.ReLU))
pairs = {"The original's example": (ql.choose_qparams(-1, 1, 8), ql.choose_qparams(0, 1, 8)),
         f"Node {relu_name}": (choose(True, relu_name, "in", 8), choose(True, relu_name, "out", 8))}
values = {who: [ql.dequantize(torch.tensor(192), q).item() for q in both] for who, both in pairs.items()}
assert torch.allclose(torch.tensor(values["The original's example"]), torch.tensor([64 * 2 / 255, 192 / 255]))
text = plots.row_caption(images, model, n_calibration, "calibration images, 8 bits")
plots.save(questions.two_values(pairs, 192, text), "11_code_192", images, model)


# %% [markdown]
# ## 8. From 8 to 2 bits, weights against activations
# *"Can you quantize to 6 bits or even lower? Weights and activations are not equally sensitive, so mix-bit quantization is an option."* All 25
# combinations of one width for all weights and one for all activations (widths per layer are a subject of 06), simulated as in section 6: that
# is the package's network, and what is chosen once is not searched again.

# %%
def cell(weight_bits, act_bits):
    config = ql.QuantConfig(weight_bits=weight_bits, act_bits=act_bits)
    result = ql.evaluate(simulate(True, weight_bits, act_bits), images.test, limit=limit)
    return results.make_row(data=images, model=model, card=card, baseline=baseline, result=result, method="by hand", config=config,
                            n_calibration=n_calibration, seed=seed, bytes=size[weight_bits], notebook="11_questions")

WIDTHS = (8, 6, 4, 3, 2)
size = {w: ql.weight_bytes(ql.quantize(network, stats, ql.QuantConfig(weight_bits=w, observer="minmax", weight_observer="minmax"))) for w in WIDTHS}
frame = results.record([cell(w, a) for w, a in tqdm(list(itertools.product(WIDTHS, WIDTHS)), desc="heat map")])
more = f"test images; residual stream and image 8 bits, first and last layer as the rest, {n_calibration:,} calibration images, one seed"
text = plots.row_caption(images, model, baseline.n, more)
plots.save(questions.bits_heatmap(frame, text), "11_heatmap", images, model)

# %% [markdown]
# ## What we learned

# %%
seen, worst = (widths.loc[f"accumulator, {which}"] for which in ("seen", "worst case"))
print(f"- Dataflow: at 8 bits the widest accumulator needs {seen['8 bits']} bits on real images and {worst['8 bits']} at worst; at 4 bits {worst['4 bits']}.")
apart = freeze.differing.tolist()
print(f"- Freeze: of {freeze.codes.iloc[0]:,} codes {apart[2]:,} differ with 31-bit multipliers, {apart[1]:,} with float64 ones, {apart[0]:,} with float32 step by step.")
print(f"- Trade-off: at 8 bits the best range is worth {trade.loc[8, 'worth bits']:.2f} bits, at 3 bits {trade.loc[3, 'worth bits']:.2f}.")
for b in depths:
    f, t = (table[table.bits == b].set_index("variant")["drop"] for table in (fused, twice))
    print(f"- {b} bits, points lost: folded {f.iloc[0]:+.2f}, conv and BatchNorm rounded apart {f.iloc[2]:+.2f}; before and after the ReLU"
          f" with the same parameters {t.iloc[1]:+.2f}, each its own {t.iloc[2]:+.2f}, misread {t.iloc[4]:+.2f}.")

# %%
lost = frame.set_index(["weight_bits", "act_bits"])["drop"]
for b in (6, 4, 3, 2):
    print(f"- {b} bits, points lost: {lost[b, 8]:+.2f} with the weights alone, {lost[8, b]:+.2f} with the activations alone, {lost[b, b]:+.2f} with both.")
low = next((b for b in WIDTHS if lost[b, b] > 1), None)
print(f"- It breaks at {low} bits (more than one point lost, both at the same width)." if low else "- No width loses more than one point.")

# %% [markdown]
# Next: [12_beyond](12_beyond.ipynb), what lies beside static post-training quantization.
