# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 09 · Integers only
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/TimS-ml/Handwritten-Quantization/blob/main/notebooks/09_integer_only.ipynb)
#
# **Question.** Every accuracy so far came from a simulation in float. Is it what an integer machine would
# compute?
#
# **Cost.** Half a minute on the digits; about three minutes for ResNet-20 on 10,000 test images and about
# half an hour for ResNet-50, on two CPU cores.

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
import copy
import fractions
import importlib.util
import itertools
import pathlib
import tempfile

import pandas as pd
import quantlab as ql
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

# %%
from quantlab.export.packed import file_sizes
from quantlab.graph import find_kinds, folded
from quantlab.integer import proof
from quantlab.integer.fixedpoint import fixed_point, multiply, signed_bits
from quantlab.plots import integer as pictures
from quantlab.quantized import edge_name, find_node, find_quantizer
from quantlab.rivals import onnxruntime
from quantlab.workbook.study import Study, show

# %% tags=["parameters"]
data = "auto"  # auto, cifar10, digits, images, or the path of a folder or archive
model = "resnet20"  # resnet20 or resnet50
checkpoint = "auto"  # auto, or the path of a .safetensors file
seed = 0
preset = "auto"  # smoke, full, or auto: smoke on the digits
bits = 4  # 2 to 8: the low width; 8 is the other one
layer = "auto"  # a convolution in front of a ReLU, for section 1; auto: the middle one
n_calibration = 0  # 0: 256 in a smoke run, 1,024 in a full one
n_compared = 0  # images compared code by code; 0: 16 (smoke), 256; 20 for resnet50
# test images for the simulation in float64; 0: all of them, 1,000 for resnet50
n_proof = 0

# %%
study = Study(
    data, model, checkpoint, preset,
    n_calibration=n_calibration, seed=seed, notebook="09_integer_only",
)
network = study.network
deep = model == "resnet50"
n_compared = study.choose(n_compared, smoke=16, full=20 if deep else 256)
n_all = len(study.test)
n_proof = study.choose(n_proof, smoke=n_all, full=1000 if deep else n_all)
configs = {f"W{b}A{b}": ql.QuantConfig(b, b) for b in sorted({8, bits}, reverse=True)}
qmodels = {w: ql.quantize(network, study.stats, c).cpu() for w, c in configs.items()}
low = f"W{bits}A{bits}"
qmodel = qmodels[low]


# %% [markdown]
# ## 1. One layer in integers, by hand
# A convolution of real numbers, with $x = s_x(q_x - z_x)$ and $w = s_w q_w$ in it, is a convolution of
# integers and one factor:
#
# $$y = s_x s_w \Big(\underbrace{\textstyle\sum (q_x - z_x)\,q_w + q_b}_{\text{accumulator, int32}}\Big), \qquad
# q_y = \mathrm{clamp}\Big(z_y + \mathrm{round}\Big(\underbrace{\frac{s_x s_w}{s_y}}_{M}\,\text{acc}\Big),\ z_y,\ q_{\max}\Big)$$
#
# The bias is coded in units of $s_x s_w$, so that it can be added to the sum. A ReLU is the lower end of
# the clamp: the code of zero.

# %%
def written(node):
    """The edge and the QParams that a layer's result is stored with."""
    while find_quantizer(qmodel, node) is None:
        node = next(iter(node.users))
    return edge_name(node), find_quantizer(qmodel, node).qparams

def read_edge(node):
    """The edge whose codes a layer reads."""
    node = node.args[0]
    while find_quantizer(qmodel, node) is None:
        node = node.args[0]
    return edge_name(node)


# %%
kinds = {n.name: kind for n, kind in find_kinds(qmodel).items()}
users = {n: [kinds[u.name] for u in find_node(qmodel, n).users] for n in qmodel.layers}
before_relu = [n for n in qmodel.layers if users[n] == ["clamp"]]
layer = before_relu[len(before_relu) // 2] if layer == "auto" else layer
node, conv, q_x = find_node(qmodel, layer), qmodel.layers[layer], qmodel.reads(layer)
source, (edge, q_y) = read_edge(node), written(node)
batch = next(iter(study.calibration(seed + 1, n=16)))
codes = proof.simulated_codes(qmodel, batch)
print(
    f"{layer}: {tuple(conv.weight.shape)}, reads {source} ({q_x.bits} bits), ", end=""
)
print(f"writes {edge} ({q_y.bits} bits)")

# %% [markdown]
# Every line below is an integer tensor; the widths are those of the values that occur on these images.

# %%
x, z_x, z_y = codes[source], q_x.zero_point, q_y.zero_point
w, scale = qmodel.codes(layer), qmodel.bias_scale(layer)
bias = torch.round(conv.bias.detach().double() / scale).int()
assert torch.equal(bias, qmodel.bias_codes(layer)), "the bias is a multiple of s_x s_w"
sums = F.conv2d(x - z_x, w, None, conv.stride, conv.padding, conv.dilation, conv.groups)
acc = sums + bias.view(-1, 1, 1)
# M = multiplier * 2^(shift - 31), once, when the network is made
multiplier, shift = (t.view(-1, 1, 1) for t in fixed_point(scale / q_y.scale.double()))
product = acc.long() * multiplier
rounded = (product + (1 << (30 - shift.long()))) >> (31 - shift.long())
y = (rounded + z_y).clamp(z_y.item(), q_y.qmax)

# %%
steps = {
    "input codes": x, "input codes - zero point": x - z_x, "weight codes": w,
    "sum of products": sums, "bias codes": bias, "accumulator": acc,
    "multiplier": multiplier, "accumulator * multiplier": product,
    "shifted": rounded, "output codes": y,
}
assert not any(t.is_floating_point() for t in steps.values())
ends = {name: (t.min().item(), t.max().item()) for name, t in steps.items()}
# no sign bit where nothing is negative
needed = {name: signed_bits(a, b) - (a >= 0) for name, (a, b) in ends.items()}
table = pd.DataFrame(ends, index=["smallest", "largest"]).T.assign(bits=needed)
show(table.rename_axis("integer"))

# %%
difference = (y - codes[edge]).abs()
assert difference.max() <= 1, "fed the same codes, a layer is at most one code off"
apart = (difference != 0).sum().item()
print(f"{layer}: {apart} of {y.numel():,} codes differ from the simulation in float32")

# %% [markdown]
# ## 2. Multiplier, shift, and two ways to round
# $M$ becomes an int32 multiplier of 31 significant bits and a shift. *Single* rounding rounds the 64-bit
# product once. *Double* rounding is gemmlowp's, made for processors without 64-bit products: first the
# upper half of the doubled product, then a division by a power of two, each of them rounded. The published
# example on which they disagree:

# %%
number, factor, by = 7984, 1583594044, -9
exact = fractions.Fraction(number * factor) / 2 ** (31 - by)
operands = [torch.tensor(v) for v in (number, factor, by)]
found = {mode: multiply(*operands, mode).item() for mode in ("single", "double")}
assert found == {"single": 11, "double": 12}
print(f"exact {float(exact):.4f}, rounded {found}")

# %% [markdown]
# Which of them matters here? Both are asked for every operation of the network, which `to_integer`
# (section 3) turns into integers. The right panel feeds each operation the simulation's codes and counts;
# the left one looks at the layer where double rounding differs most.

# %%
compared = list(study.calibration(seed + 2, n=n_compared))
modes = ("single", "double")
imodels = {
    (w, mode): ql.to_integer(qmodels[w], mode, executor="fast")
    for w, mode in itertools.product(qmodels, modes)
}
frames = []
for (w, mode), imodel in tqdm(imodels.items()):
    frame = proof.per_operation(qmodels[w], imodel, compared)
    frames.append(frame.assign(network=w, rounding=mode))
alone = pd.concat(frames)

# %%
report = imodels[low, "single"].report(batch.shape[1:])
layers = alone[alone.network == low].merge(report[["layer", "multiplier"]], on="layer")
doubled = layers[(layers.rounding == "double") & (layers.kind == "conv")]
worst = doubled.nlargest(1, "share").layer.item()
reference = ql.to_integer(qmodel)
op = reference.operations[worst]
acc = op.accumulate(codes[read_edge(find_node(qmodel, worst))])
exact = acc.double() * op.acc_scale / op.out.scale
lowest, highest = op.out.low - op.out.zero_point, op.out.high - op.out.zero_point
inside = (exact > lowest) & (exact < highest)

# %%
errors = []
for mode in modes:
    error = (multiply(acc, op.multiplier, op.shift, mode) - exact)[inside]
    errors.append(pd.DataFrame({"rounding": mode, "error": error.numpy()}))
errors = pd.concat(errors)
single = errors[errors.rounding == "single"].error
assert single.abs().max() < 0.5 + 1e-6, "single rounding is the nearest code"
text = (
    f"training images, {low}; left: layer {worst}, {inside.sum():,} values not clamped"
)
figure = pictures.rounding_modes(errors, layers, study.caption(n_compared, text))
study.save(figure, "09_rounding")

# %% [markdown]
# The first step of double rounding makes whole units of the accumulator. With few bits an accumulator
# holds small numbers, $M$ is large, and that step costs a good part of a code. Adds escape: they carry 20
# fractional bits.
#
# ## 3. The whole network
# `to_integer` walks the graph of the simulation and turns every Quantizer into one operation that ends in
# codes. Where a layer reads fewer bits than the residual stream has, codes are requantized to codes; an
# add rescales both operands with 20 fractional bits; an average's division is part of its multiplier.
# Bounds of every accumulator are checked before anything runs.

# %%
codes = reference.codes(batch)
assert not any(t.is_floating_point() for t in codes.values()), "integers to the logits"
logits = codes["logits"]
print(f"{len(codes)} edges; logits {logits.dtype}, {logits.min()} to {logits.max()}")
show(report.drop(columns=["bops", "live_bytes"]).head(6).round(4))

# %% [markdown]
# The reference runs int32 tensors and is made to be read. The fast executor keeps int8 codes in memory
# and accumulators in registers (in C, `quantlab/integer/fast/kernels.c`, or by torch's integer matrix
# product); it must give the same codes.

# %%
count = equal = 0
for part in compared[: 1 if study.smoke or deep else None]:
    ours, theirs = reference.codes(part), imodels[low, "single"].codes(part)
    equal += sum(torch.equal(ours[name], theirs[name].cpu()) for name in ours)
    count += len(ours)
assert equal == count, "two executors, one result"
print(f"{equal} of {count} edges equal, code for code")

# %% [markdown]
# ## 4. The proof
# Left, every operation is fed the codes of the simulation, so that it answers for itself alone. Right,
# the integer network is fed its own codes, and differences travel. What an operation rounds otherwise lies
# next to a tie: float32 sums round, and ties go to even there, up here.

# %%
frames = []
for (w, mode), imodel in tqdm(imodels.items()):
    frame = proof.end_to_end(qmodels[w], imodel, compared)
    frames.append(frame.assign(network=w, rounding=mode))
depth = pd.concat([alone.assign(fed="same"), pd.concat(frames).assign(fed="own")])
text = study.caption(n_compared, "training images; 0: not one code differs")
study.save(pictures.codes_by_depth(depth, text), "09_codes_by_depth")

# %%
one_step = alone[alone.rounding == "single"].max_difference
assert one_step.max() <= 1, "under single rounding at most one code off"
why = alone.groupby(["network", "rounding"], sort=False).agg(
    values=("values", "sum"), differing=("differing", "sum"),
    next_to_a_tie=("ties", "sum"), largest_difference=("max_difference", "max"),
    farthest_from_tie=("from_tie", "max"),
)
show(why.assign(per_million=1e6 * why.differing / why["values"]))


# %% [markdown]
# **What equality means at depth.** Fed the same codes, an operation stores the same code unless its sum
# lies next to a tie, and then one step beside it. In a shallow network such a flip rarely meets another.
# In a deep one it spreads: a code that differs enters every sum of the next layer, and some of those lie
# next to ties as well. So the whole network is compared by its answers, and by the signal-to-noise ratio
# of its logits, not by a claim that every code is equal. A second judge runs the same simulation in
# float64, whose sums do not err.

# %%
def in_float64(q):
    exact = copy.deepcopy(q).double()

    def run(x):
        return exact.to(x.device)(x.double())

    return run

proven = ql.limited(study.test, n_proof)
in_double = {w: ql.evaluate(in_float64(q), proven) for w, q in qmodels.items()}
simulated = {w: ql.evaluate(q, proven) for w, q in qmodels.items()}
checked = {key: ql.evaluate(imodel, proven) for key, imodel in tqdm(imodels.items())}

# %%
lines = []
for (w, mode), result in checked.items():
    answers = {"simulation": simulated[w], "in float64": in_double[w]}
    same = {
        k: 100 * (result.predictions == e.predictions).double().mean().item()
        for k, e in answers.items()
    }
    lines.append({"network": w, "rounding": mode, "n": result.n, **same})
agreement = pd.DataFrame(lines)
single = agreement[agreement.rounding == "single"]
if not study.smoke:
    assert single["in float64"].min() >= 99.0, "the same answers, whoever computes them"
show(agreement.round(2))

# %% [markdown]
# The accuracy of the network in integers on all test images, recorded one by one:

# %%
measured = {}
for w, mode in itertools.product(qmodels, modes[:1] if deep else modes):
    result = measured[w, mode] = study.evaluate(imodels[w, mode])
    size, name = ql.weight_bytes(qmodels[w]), f"integer only {w}, {mode} rounding"
    show(study.record(result, name, configs[w], bytes=size))
    print(f"{result.images_per_s:,.0f} images/s")

# %% [markdown]
# ## 5. What it costs
# Accumulators need far fewer than 32 bits; an add needs its 20 fractional ones. Operations in bits (BOPs)
# count a multiplication of a $b_w$-bit weight with a $b_x$-bit code as $b_w b_x$ (van Baalen et al. 2020,
# arXiv:2005.07093).

# %%
shape = " x ".join(map(str, batch.shape[1:]))
text = study.caption(1, f"image of {shape}, {low}, residual stream 8 bits")
study.save(pictures.layer_costs(report, text), "09_layer_costs")


# %%
def costs(width):
    q = ql.quantize(network, study.stats, ql.QuantConfig(width, width))
    frame = ql.to_integer(q).report(batch.shape[1:])
    layers = frame[frame.kind.isin(["conv", "linear"])]
    return {
        "network": f"W{width}A{width}", "weights kB": ql.weight_bytes(q) / 1000,
        "BOPs, billions": frame.bops.sum() / 1e9,
        "peak activations kB": frame.live_bytes.max() / 1000,
        "widest accumulator of a layer": layers.accumulator_bits.max(),
    }


# %%
size = sum(4 * p.numel() for p in folded(network).parameters()) / 1000
in_float = {"weights kB": size, "BOPs, billions": report.macs.sum() * 32 * 32 / 1e9}
rows = [{"network": "float32", **in_float}, *(costs(b) for b in (8, 4, 3, 2))]
sizes = pd.DataFrame(rows)
show(sizes.round(2))

# %% [markdown]
# ## 6. Export
# The packed checkpoint holds every code at its own width; loading it rebuilds the graph from the float
# network and executes nothing from the file. It gives the same integers.

# %%
folder = tempfile.TemporaryDirectory()
packed_path = pathlib.Path(folder.name) / "packed.safetensors"
ql.save_quantized(qmodel, packed_path)
loaded = ql.to_integer(ql.load_quantized(packed_path, network.cpu()))
again = loaded.codes(batch)
assert all(torch.equal(again[name], codes[name]) for name in codes), "all there is"
stored, counted = packed_path.stat().st_size / 1000, ql.weight_bytes(qmodel) / 1000
print(f"{stored:.1f} kB as a file, {counted:.1f} kB of it weights, scales and biases")


# %% [markdown]
# Size does not depend on what the weights are, so a network can be packed untrained. Files in MB, and how
# many times smaller:

# %%
def packed_sizes(name):
    net = ql.load_model(name)
    noise = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    counted = ql.collect(net, [noise])
    networks = {"float32": net}
    for b in (8, 4, 3, 2):
        config = ql.QuantConfig(b, b, observer="minmax", weight_observer="minmax")
        networks[f"{b} bits"] = ql.quantize(net, counted, config)
    return file_sizes(networks, folder.name).set_index("name").file_bytes / 1e6

names = ("resnet20",) if study.smoke else ("resnet20", "resnet50")
packed = pd.DataFrame({name: packed_sizes(name) for name in names}).T
smaller = (1 / packed.div(packed.float32, axis=0)).drop(columns="float32")
show(packed.join(smaller.add_suffix(", times smaller")).round(2))

# %% [markdown]
# ONNX has QuantizeLinear and DequantizeLinear (QDQ) around float operators; ONNX Runtime turns them into
# integer kernels where it has some. *local* counts codes that differ where it is fed ours at every edge,
# graph optimisation off.

# %%
needed = ("onnx", "onnxscript", "onnxruntime")
missing = [name for name in needed if importlib.util.find_spec(name) is None]
if missing:
    print(f"skipped: pip install {' '.join(missing)}")
rows = []
for w, q in {} if missing else qmodels.items():
    path = pathlib.Path(folder.name) / f"{w}.onnx"
    ql.export_onnx(q, path, tuple(batch.shape[1:]))
    edges = onnxruntime.compare_codes(q, path, batch)
    theirs, ours = study.evaluate(onnxruntime.OnnxModel(path)), measured[w, "single"]
    same = 100 * (theirs.predictions == ours.predictions).double().mean().item()
    row = {"network": w, "ONNX Runtime": theirs.top1, "integers": ours.top1}
    row |= {"agreement": same, "of local codes": edges.n.sum()}
    row |= {"differ": edges.local_differing.sum()}
    rows.append({**row, "by at most": edges.local_max_difference.max()})

# %%
folder.cleanup()
exported = pd.DataFrame(rows)
if len(exported) and not study.smoke:
    gap = (exported["ONNX Runtime"] - exported.integers).abs().max()
    assert gap <= (0.3 if deep else 0.05), "the export is the network"
show(exported.round(2))

# %% [markdown]
# ## What we learned

# %%
for key, part in alone[alone.rounding == "single"].groupby("network", sort=False):
    print(
        f"- {key}, single rounding: {part.differing.sum():,} of "
        f"{part['values'].sum():,} codes differ when every operation is fed "
        "the same codes, by "
        f"{part.max_difference.max()} at most."
    )
for row in agreement.to_dict("records"):
    print(
        f"- {row['network']}, {row['rounding']} rounding: the simulation's answer on "
        f"{row['simulation']:.2f} % of {row['n']:,} test images, that of float64 on "
        f"{row['in float64']:.2f} %."
    )
widest = sizes["widest accumulator of a layer"].max()
print(f"- No layer's accumulator needs more than {widest:.0f} bits.")

# %% [markdown]
# Next: [10_original_experiment](10_original_experiment.ipynb), what the experiment did that this workbook
# grew out of.
