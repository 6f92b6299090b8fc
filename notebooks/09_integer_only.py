# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 09 · Integer-only: the same network without floating point
#
# **Question.** Does a machine that has only integers compute what the fake-quantized network simulates,
# code for code?
#
# **Seen.** [What a full run showed](../results/pages/09_integer_only-resnet20-cifar10-jpeg.md), without running it.
#
# **Cost.** Half a minute on the digits; about five minutes for ResNet-20 on 10,000 test images and about
# half an hour for ResNet-50, most of it the simulation in float64, on two CPU cores.

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
import importlib.util
import itertools
import pathlib
import tempfile
from fractions import Fraction

import pandas as pd
import quantlab as ql
import torch
from torch.nn import functional as F
from tqdm.auto import tqdm

# %%
from quantlab.export.packed import file_sizes
from quantlab.graph import find_kinds, folded
from quantlab.integer import proof
from quantlab.integer.fixedpoint import fixed_point, multiply, signed_bits
from quantlab.integer.network import IntegerRun
from quantlab.plots import integer as pictures
from quantlab.quantized import edge_name, find_node, find_quantizer
from quantlab.rivals import onnxruntime as onnx_runtime
from quantlab.system.comparing import decibels
from quantlab.system.files import root
from quantlab.system.machine import device, exact_float
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
# training images compared code by code; 0: 64 in a smoke run, 1,000 in a full one, and
# 50 for ResNet-50, whose float64 is slow
n_proof = 0

# %%
study = Study(
    data, model, checkpoint, preset,
    n_calibration=n_calibration, seed=seed, notebook="09_integer_only",
)
deep = model == "resnet50"
n_proof = study.choose(n_proof, smoke=64, full=50 if deep else 1000)
proof_images = list(study.calibration(seed + 2, n_proof, batch_size=25))
batch = next(iter(study.calibration(seed + 1, 16)))
image_shape = tuple(batch.shape[1:])

# %% [markdown]
# Two networks: 8 bits everywhere, and a low width with 8 bits on the residual stream.

# %%
low = f"W{bits}A{bits}"
qmodels = {}
for b in (8, bits):
    config = ql.QuantConfig(weight_bits=b, act_bits=b)
    qmodels[f"W{b}A{b}"] = ql.quantize(study.network, study.stats, config).cpu()
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
kinds = find_kinds(qmodel)

def feeds_relu(name):
    return [kinds[user] for user in find_node(qmodel, name).users] == ["clamp"]

before_relu = [name for name in qmodel.layers if feeds_relu(name)]
layer = before_relu[len(before_relu) // 2] if layer == "auto" else layer
assert layer in before_relu, f"use one of: {', '.join(before_relu)}"
conv, node = qmodel.layers[layer], find_node(qmodel, layer)
relu = next(iter(node.users))
stored = next(iter(relu.users))  # the Quantizer behind the ReLU
source, edge = edge_name(node.args[0]), edge_name(stored)
q_x, q_y = qmodel.reads(layer), find_quantizer(qmodel, stored).qparams
print(f"{layer} {tuple(conv.weight.shape)} reads {source}, {q_x.bits} bits")
print(f"and writes {edge}, {q_y.bits} bits")


# %% [markdown]
# $M$ is a real number, and has to go too: $M = q_M\,2^{\,n - 31}$ with $q_M$ an int32 of 31 significant
# bits and a shift $n$, both computed once, off line.

# %%
def mantissa_and_shift(real):
    # real = fraction * 2^shift, 1/2 <= fraction < 1
    fraction, shift = torch.frexp(real)
    return torch.round(fraction * 2**31).long(), shift

bias_scale = q_x.scale.double() * conv.weight_qparams.scale.double()
factor = (bias_scale / q_y.scale.double()).view(-1, 1, 1)  # M, of every channel
multiplier, shift = mantissa_and_shift(factor)
assert torch.equal(multiplier, fixed_point(factor)[0].long()), "ql does the same"
assert torch.equal(shift, fixed_point(factor)[1])
off = (multiplier * 2.0 ** (shift.double() - 31) / factor - 1).abs().max()
print(f"M from {factor.min():.5f} to {factor.max():.5f}; coded, it is {off:.0e} off")

# %% [markdown]
# From here on every line is an integer tensor; the widths in the table are those of the values that
# occur on these images.

# %%
codes = proof.simulated_codes(qmodel, batch)
x, z_x, z_y = codes[source], q_x.zero_point, q_y.zero_point
w = ql.quantize_tensor(conv.weight.detach(), conv.weight_qparams)
bias = torch.round(conv.bias.detach().double() / bias_scale).int()
assert torch.equal(w, qmodel.codes(layer))
assert torch.equal(bias, qmodel.bias_codes(layer))

sums = F.conv2d(x - z_x, w, None, conv.stride, conv.padding)
acc = sums + bias.view(-1, 1, 1)
product = acc.long() * multiplier
places = 31 - shift.long()
rounded = (product + (1 << (places - 1))) >> places  # half a unit added: to the nearest
y = (rounded + z_y).clamp(z_y.item(), q_y.qmax)

# %%
steps = {
    "input codes": x, "input codes - zero point": x - z_x, "weight codes": w,
    "sum of products": sums, "bias codes": bias, "accumulator": acc,
    "multiplier": multiplier, "accumulator * multiplier": product, "shifted": rounded,
    "output codes": y,
}
assert not any(tensor.is_floating_point() for tensor in steps.values())
table = pd.DataFrame({
    name: {"min": t.min().item(), "max": t.max().item()} for name, t in steps.items()
}).T
# no sign bit where nothing is negative
table["bits"] = [signed_bits(r.min, r.max) - (r.min >= 0) for r in table.itertuples()]
show(table.rename_axis("integer"))

# %%
difference = (y - codes[edge]).abs()
assert difference.max() <= 1, "one layer, fed the same codes, is at most one code off"
print(
    f"{layer}: {(difference != 0).sum()} of {y.numel():,} codes differ from the "
    "simulation in float32"
)


# %% [markdown]
# ## 2. Two ways to round
# *Single* rounding, as above, rounds the 64-bit product once. *Double* rounding is gemmlowp's, made for
# processors without 64-bit products: first the upper half of the doubled product, then a division by a
# power of two, each of them rounded. An example on which they disagree:

# %%
def single(x, q, shift):
    return (x * q + (1 << (30 - shift))) >> (31 - shift)

def double(x, q, shift):  # for shift < 0
    high = (x * q + (1 << 30)) >> 31
    half = 1 << (-shift - 1)
    away = high + half if high >= 0 else high + half - 1  # ties away from zero
    return away >> -shift

example = (7984, 1583594044, -9)  # accumulator, multiplier, shift
exact = Fraction(example[0] * example[1], 2**40)
found = {"single": single(*example), "double": double(*example)}
assert found == {"single": 11, "double": 12}
assert all(multiply(*map(torch.tensor, example), r) == found[r] for r in found)
print(f"exact {float(exact):.4f}, rounded {found}")


# %% [markdown]
# Which of them matters here? Both are asked for every operation of the network, which `to_integer`
# (section 3) turns into integers. `proof.per_operation` feeds each operation the simulation's codes, so
# that it answers for itself alone, and counts the codes that come out otherwise. It is asked against two
# simulations: in float32, with which accuracies are measured everywhere, and in float64, whose sums err
# a billion times less.

# %%
def compare(function, key):
    w, rounding, simulation = key
    images = [x.to(getattr(torch, simulation)) for x in proof_images]
    frame = function(simulations[w, simulation], imodels[w, rounding], images)
    return frame.assign(network=w, rounding=rounding, simulation=simulation)

imodels, simulations = {}, {}
for w, q in qmodels.items():
    simulations |= {(w, "float32"): q, (w, "float64"): copy.deepcopy(q).double()}
    for rounding in ("single", "double"):
        imodels[w, rounding] = ql.to_integer(q, rounding, executor="fast")
asked = (("single", "float32"), ("single", "float64"), ("double", "float32"))
keys = [(w, *rest) for w, rest in itertools.product(qmodels, asked)]
alone = pd.concat(compare(proof.per_operation, key) for key in tqdm(keys))

# %% [markdown]
# The right panel shows all operations against the simulation in float32; the left one looks at the layer
# where double rounding differs most.

# %%
report = imodels[low, "single"].report(image_shape)
layers = alone[(alone.network == low) & (alone.simulation == "float32")]
layers = layers.merge(report[["layer", "multiplier"]], on="layer")
convs = layers[(layers.rounding == "double") & (layers.kind == "conv")]
worst = convs.nlargest(1, "share").layer.item()

reference = ql.to_integer(qmodel)
op = reference.operations[worst]
acc = op.accumulate(codes[edge_name(find_node(qmodel, worst).args[0])])
exact = acc.double() * op.acc_scale / op.out.scale
inside = exact > op.out.low - op.out.zero_point
inside &= exact < op.out.high - op.out.zero_point

# %%
errors = []
for rounding in ("single", "double"):
    error = (multiply(acc, op.multiplier, op.shift, rounding) - exact)[inside]
    errors.append(pd.DataFrame({"rounding": rounding, "error": error.numpy()}))
    if rounding == "single":
        assert error.abs().max() < 0.5 + 1e-6, "single rounding: the nearest code"
text = f"training images, {low}; left: layer {worst}, {inside.sum():,} values that are "
text = study.caption(n_proof, text + f"not clamped, of {len(batch)} images")
study.save(pictures.rounding_modes(pd.concat(errors), layers, text), "09_rounding")

# %% [markdown]
# The first step of double rounding makes whole units of the accumulator. With few bits an accumulator
# holds small numbers, $M$ is large, and that step costs a good part of a code. Adds escape: they carry
# 20 fractional bits.

# %% [markdown]
# ## 3. The whole network
# `to_integer` walks the graph of the simulation and turns every Quantizer into one operation that ends
# in codes. Where a layer reads fewer bits than the residual stream has, codes are requantized to codes;
# an add rescales both operands with 20 fractional bits; an average's division is part of its multiplier.
# Bounds of every accumulator are checked before anything runs.

# %%
codes = reference.codes(batch)
assert not any(t.is_floating_point() for t in codes.values()), "integers to the logits"
logits = codes["logits"]
print(f"{len(codes)} edges; logits {logits.dtype}, {logits.min()} to {logits.max()}")
first = report.drop(columns=["bops", "live_bytes"]).head(6)
show(first.style.format({"multiplier": "{:.3g}"}))

# %% [markdown]
# The reference runs int32 tensors and is made to be read. The fast executor keeps int8 codes in memory
# and accumulators in registers (in C, `quantlab/integer/fast/kernels.c`, or by torch's integer matrix
# product; `imodel.kernels()` says what computes each layer, and why). Between these two *equal* means
# equal without any condition: integer sums do not round, so no order of additions and no depth can part
# them. One code would be a bug.

# %%
few = batch[:4] if deep else batch  # the reference is slow
slow, fast = reference.codes(few), imodels[low, "single"].codes(few)
equal = sum(torch.equal(slow[name], fast[name].cpu()) for name in slow)
assert equal == len(slow), "two executors, one result"
print(f"{equal} of {len(slow)} edges equal, code for code, on {len(few)} images")

# %% [markdown]
# ## 4. The proof
# Between integers and the simulation *equal* needs a condition. **Fed the same codes**, an operation
# stores the same codes, unless the exact result lies next to a tie, halfway between two codes. There the
# simulation cannot tell the sides apart: float32 sums of several hundred products err by about
# $2^{-15}$ of a code, the reciprocal of a scale is rounded, and ties go to even there, up here. In
# float64 the sums are good to $10^{-13}$; what is left are the weights $s_w q_w$, which every simulation
# holds as float32.

# %%
one_rounding = alone[alone.rounding == "single"]
assert one_rounding.max_difference.max() <= 1, "one operation: at most one code off"
in_float64 = one_rounding[one_rounding.simulation == "float64"]
assert (in_float64.ties == in_float64.differing).all(), "and next to a tie"
assert one_rounding.from_tie.max() < 2**-12, "float32 errs a little more"
assert alone[alone.rounding == "double"].from_tie.max() > 2**-12, "this can fail"
groups = alone.groupby(["network", "rounding", "simulation"], sort=False)
table = groups.agg(
    codes=("values", "sum"), differing=("differing", "sum"),
    steps=("max_difference", "max"), next_to_tie=("ties", "sum"),
    farthest=("from_tie", "max"),
)
table.insert(2, "per million", 1e6 * table.differing / table.codes)
names = {"steps": "by steps", "next_to_tie": "within 2^-15 of a tie"}
show(table.rename(columns=names | {"farthest": "farthest from a tie"}))

# %% [markdown]
# Operation by operation, those that ever differ (single rounding), in order of execution:

# %%
index = ["network", "edge", "kind", "values", "simulation"]
columns = ["differing", "max_difference", "ties", "from_tie"]
rows = one_rounding.set_index(index)[columns]
judges = ("float32", "float64")
table = pd.concat({j: rows.xs(j, level="simulation") for j in judges}, axis=1)
differs = table.xs("differing", axis=1, level=1).sum(axis=1) > 0
names = {"max_difference": "by steps", "ties": "within 2^-15", "from_tie": "farthest"}
with pd.option_context("display.max_rows", None):
    show(table[differs].rename(columns=names).rename_axis(index={"values": "codes"}))
print(f"{(~differs).sum()} more operations never differ, on {n_proof:,} images")

# %% [markdown]
# How many different sums are behind them? A sum next to a tie differs every time it occurs, and a common
# one occurs often.

# %%
several = torch.cat(proof_images[:5])

# accumulators for which integers store another code than float32
def sums_that_differ(w, edge):
    integer = ql.to_integer(qmodels[w])
    codes = proof.simulated_codes(qmodels[w], several)
    edges = {name: edge for edge, (name, _) in integer.stored.items()}
    node = find_node(integer.network, integer.stored[edge][0])
    operands = [codes[edges[source.name]] for source in node.args]
    op = integer.operations[node.name]
    return op.accumulate(*operands)[op(*operands) != codes[edge]]


# %%
most = one_rounding[one_rounding.simulation == "float32"]
most = most[most.kind.isin(["conv", "add"])].nlargest(4, "differing")
sums = [sums_that_differ(row.network, row.edge) for row in most.itertuples()]
most["differing"] = [len(s) for s in sums]
most["different sums"] = [len(s.unique()) for s in sums]
print(f"on {len(several)} images:")
show(most[["network", "edge", "kind", "differing", "different sums"]])

# %% [markdown]
# **Fed its own codes**, the network is equal only up to the first flipped tie. The code behind it is one
# step off, and with it every sum that reads it; some of those sums lie close enough to the next border
# to cross it. So a deep network need not be equal, code for code, to a float simulation, nor two float
# simulations to each other. A zero in this table says that no tie was met, and is no property of the
# method.

# %%
together = pd.concat(compare(proof.end_to_end, key) for key in tqdm(keys))
first = together[together.differing > 0].groupby(["network", "rounding", "simulation"])
groups = together.groupby(["network", "rounding", "simulation"], sort=False)
table = groups.agg(
    codes=("values", "sum"), differing=("differing", "sum"),
    steps=("max_difference", "max"), most=("share", "max"),
)
table = table.join(first.edge.first().rename("first edge"))
table = table.fillna({"first edge": "none"})
percent = 100 * table.differing / table.codes
table = table.assign(differing=percent, most=100 * table.most)
names = {"differing": "differing, %", "steps": "by steps", "most": "most at an edge, %"}
show(table.rename(columns=names).round(5))

# %%
depth = pd.concat([alone.assign(fed="same"), together.assign(fed="own")])
depth = depth[depth.simulation == "float32"]
text = study.caption(n_proof, "training images, float32; 0: not one code differs")
study.save(pictures.codes_by_depth(depth, text), "09_codes_by_depth")


# %% [markdown]
# ### One tie's path to the logits
# Where integers and float32 part for the first time, everything before agrees: the operation there was
# fed the same codes, and its result lay next to a tie. Take an image on which the last codes differ too,
# and on it the first code that does. Run the rest of the network once with this code and once with its
# neighbour, **both in integers**, and count what differs behind it. Nothing else can differ: integers
# add up the same way every time. (Float32 does not: in a batch of another size the same image may be
# summed in another order, and the tie fall to the other side.)

# %%
def first_tie(w):
    """(images, edge, index of the code, simulated - integer), or None."""
    imodel = imodels[w, "single"]
    for images in proof_images:
        ours, theirs = imodel.codes(images), proof.simulated_codes(qmodels[w], images)
        steps = {edge: theirs[edge] - ours[edge] for edge in imodel.stored}
        apart = {edge: step.flatten(1).any(1) for edge, step in steps.items()}
        last = next(reversed(apart.values()))
        if last.any():
            i = last.nonzero()[0].item()
            edge = next(edge for edge in apart if apart[edge][i])
            place = (i, *steps[edge][i].nonzero()[0].tolist())
            return images, edge, place, steps[edge][place].item()
    return None


# %%
def run_flipped(imodel, images, edge, place, step):
    """Values of all nodes: as they are, and with one code `step` off."""
    network, codes = imodel.network, imodel.input_codes(images)
    plain, flipped = IntegerRun(network, keep=True), IntegerRun(network, keep=True)
    plain.run(codes)
    nodes = list(network.graph.nodes)
    node = find_node(network, imodel.stored[edge][0])
    known = {n: plain.env[n] for n in nodes[: nodes.index(node) + 1]}
    known[node] = known[node].clone()
    known[node][place] += step
    flipped.run(codes, initial_env=known)  # runs only what is not known
    return plain.env, flipped.env


# %%
def path_of(w, images, edge, place, step):
    """Rows for the figure: by edge, the fraction of one image's codes that differ."""
    imodel, i = imodels[w, "single"], place[0]
    before, after = run_flipped(imodel, images, edge, place, step)
    simulated, rows = proof.simulated_codes(qmodels[w], images), []
    for order, (edge, (node, offset)) in enumerate(imodel.stored.items()):
        node = find_node(imodel.network, node)
        ours = before[node][i].int() + offset
        others = {"one": after[node][i].int() + offset, "every": simulated[edge][i]}
        for fed, codes in others.items():
            share = (ours != codes).double().mean().item()
            rows.append({"fed": fed, "order": order, "share": share})
    return pd.DataFrame(rows).assign(network=w, rounding="single")


# %%
ties = {w: first_tie(w) for w in qmodels}
paths = [path_of(w, *tie) for w, tie in ties.items() if tie is not None]

# %%
titles = {
    "one": "One code flipped, all in integers",
    "every": "The same image in float32: every tie",
}
text = "a training image for each network; 0: not one code differs"
if paths:
    figure = pictures.codes_by_depth(pd.concat(paths), study.caption(1, text), titles)
    study.save(figure, "09_one_tie")

# %%
reached = {}  # network -> how far its logits agree after one flipped code
for w, tie in ties.items():
    if tie is None:
        print(f"{w}: on {n_proof:,} images no tie gets through to the last codes")
        continue
    imodel, (_, edge, place, step) = imodels[w, "single"], tie
    output = next(reversed(imodel.network.graph.nodes))
    envs = run_flipped(imodel, *tie)
    before, after = (imodel.dequantize(env[output])[place[0]] for env in envs)
    reached[w] = decibels(before.square().sum(), (after - before).square().sum())
    same = (before.argmax() == after.argmax()).item()
    print(f"{w}: {edge}{list(place)} moved by {step:+d}; its logits agree", end=" ")
    print(f"to {reached[w]:.0f} dB, the same answer: {same}")


# %% [markdown]
# A flipped code dies where everything that reads it rounds back to the same codes, and spreads
# otherwise: what survives reaches all channels within a few layers, and the more layers follow, the more
# of their codes it reaches. How that compares with the noise of quantization itself, the last table of
# this section says.

# %% [markdown]
# ### The same answers
# So the whole network is judged by its answers. First the accuracy in integers on all test images, a row
# for each as it is measured:

# %%
def measure(w, rounding):
    imodel, q = imodels[w, rounding], qmodels[w]
    # what is compiled at the first call is compiled before the clock runs
    ql.evaluate(imodel, study.test, limit=100)
    result = study.evaluate(imodel)
    method = f"integer only {w}, {rounding} rounding"
    show(study.record(result, method, q.config, bytes=ql.weight_bytes(q)))
    return result

measured = {(w, "single"): measure(w, "single") for w in qmodels}
if not deep:
    measured |= {(w, "double"): measure(w, "double") for w in qmodels}

# %% [markdown]
# Then the logits beside those of the simulation, on all test images, for ResNet-50 on 1,000 and in a
# smoke run on 100. Signal is the simulation's logits, noise what separates the integers' from them. The
# last column is the yardstick: the same ratio between the simulation and the float network, the noise of
# quantization.

# %%
n_logits = study.choose(0, smoke=100, full=1000 if deep else len(study.test))

def logits_of(network, dtype=torch.float32):
    where = device()
    network.to(where)
    batches = ql.limited(study.test, n_logits).batches(100)
    with torch.inference_mode(), exact_float():
        parts = [network(x.to(where, dtype)).cpu().double() for x, _ in batches]
        return torch.cat(parts)


# %%
logits = {"float": logits_of(study.network)}
for w, q in tqdm(qmodels.items()):
    logits[w, "float32"] = logits_of(q)
    logits[w, "float64"] = logits_of(simulations[w, "float64"], torch.float64)
    for rounding in ("single", "double"):
        logits[w, rounding] = logits_of(imodels[w, rounding])


# %%
def ratio(reference, other):
    return decibels(reference.square().sum(), (other - reference).square().sum())

rows = []
for (w, rounding), simulation in itertools.product(imodels, judges):
    ours, theirs = logits[w, rounding], logits[w, simulation]
    equal = (ours.argmax(1) == theirs.argmax(1)).double()
    row = {"network": w, "rounding": rounding, "simulation": simulation, "n": len(ours)}
    row |= {"same answer, %": 100 * equal.mean().item()}
    row |= {"logits, dB": ratio(theirs, ours)}
    row |= {"simulation to float, dB": ratio(logits["float"], theirs)}
    rows.append(row)

# %%
agreement = pd.DataFrame(rows)
same = agreement[agreement.rounding == "single"].set_index("simulation")
same = same["same answer, %"]
enough = 99 if deep else 99.9
assert study.smoke or same["float64"].min() >= enough, "one network, two computers"
show(agreement.round(2))

# %% [markdown]
# ## 5. What it costs
# With few bits accumulators need far fewer than 32; an add needs its 20 fractional ones. Operations in bits
# (BOPs) count a multiplication of a $b_w$-bit weight with a $b_x$-bit code as $b_w b_x$ (van Baalen et
# al. 2020, arXiv:2005.07093).

# %%
text = f"image of {' x '.join(map(str, image_shape))}, {low}, residual stream 8 bits"
study.save(pictures.layer_costs(report, study.caption(1, text)), "09_layer_costs")


# %%
def costs(width):
    config = ql.QuantConfig(weight_bits=width, act_bits=width)
    q = ql.quantize(study.network, study.stats, config).cpu()
    frame = ql.to_integer(q).report(image_shape)
    layers = frame[frame.kind.isin(["conv", "linear"])]
    return {
        "network": f"W{width}A{width}", "weights kB": ql.weight_bytes(q) / 1000,
        "BOPs, billions": frame.bops.sum() / 1e9,
        "peak activations kB": frame.live_bytes.max() / 1000,
        "widest accumulator of a layer": layers.accumulator_bits.max(),
    }


# %%
size = sum(4 * p.numel() for p in folded(study.network).parameters()) / 1000
in_float = {"network": "float32", "weights kB": size}
in_float["BOPs, billions"] = report.macs.sum() * 32 * 32 / 1e9
sizes = pd.DataFrame([in_float, *(costs(b) for b in (8, 4, 3, 2))])
show(sizes.round(2))

# %% [markdown]
# ## 6. Export
# The packed checkpoint holds every code at its own width; loading it rebuilds the graph from the float
# network and executes nothing from the file. It gives the same integers, all of them, on any image.

# %%
folder = tempfile.TemporaryDirectory()
packed_path = pathlib.Path(folder.name) / "packed.safetensors"
ql.save_quantized(qmodel, packed_path)
loaded = ql.to_integer(ql.load_quantized(packed_path, study.network))
again, codes = loaded.codes(few), reference.codes(few)
assert all(torch.equal(again[name], codes[name]) for name in codes), "nothing is lost"
print(f"{packed_path.stat().st_size / 1000:,.1f} kB as a file, of which weights,")
print(f"scales and biases are {ql.weight_bytes(qmodel) / 1000:,.1f} kB")

# %% [markdown]
# Learned networks ([07](07_low_bit_methods.ipynb)) lie so in `checkpoint/`, each with its card: no
# calibration, no learning, a second to load. In integers they are what their cards say.

# %%
ready = f"{model}-{study.images.name}-w*a*.safetensors"
for path in sorted((root() / "checkpoint").glob(ready)):
    card = ql.load_card(path)
    learned = ql.to_integer(ql.load_quantized(path), executor="fast")
    answers = study.evaluate(learned)
    print(f"{path.name}: {path.stat().st_size / 1000:,.0f} kB, "
          f"{answers.top1:.2f} % of {answers.n:,}, card {card.test_top1:.2f} %")


# %% [markdown]
# Size does not depend on what the weights are, so the original's network can be packed untrained. Files
# in MB, and how many times smaller:

# %%
def packed_sizes(name):
    untrained = ql.load_model(name)
    noise = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    seen = ql.collect(untrained, [noise])
    networks = {"float32": untrained}
    for b in (8, 4, 3, 2):
        config = ql.QuantConfig(b, b, observer="minmax", weight_observer="minmax")
        networks[f"{b} bits"] = ql.quantize(untrained, seen, config)
    return file_sizes(networks, folder.name).set_index("name").file_bytes / 1e6

names = ("resnet20",) if study.smoke else ("resnet20", "resnet50")
packed = pd.DataFrame({name: packed_sizes(name) for name in names}).T
smaller = (1 / packed.div(packed.float32, axis=0)).drop(columns="float32")
show(packed.join(smaller.add_suffix(", times smaller")).round(2))


# %% [markdown]
# ONNX has QuantizeLinear and DequantizeLinear (QDQ) around float operators; ONNX Runtime turns them into
# integer kernels where it has some. *local* counts codes that differ where it is fed ours at every edge,
# graph optimisation off: the same condition, the same ties. Codes of four bits and fewer are stored two in
# a byte (int4, opset 21), of two bits four in a byte (int2, opset 25), where the installed runtime takes
# them; `weights="int8"` writes the older form.

# %%
def in_onnxruntime(w):
    q, integer = qmodels[w], measured[w, "single"]
    path = ql.export_onnx(q, pathlib.Path(folder.name) / f"{w}.onnx", image_shape)
    edges = onnx_runtime.compare_codes(q, path, batch)
    result = study.evaluate(onnx_runtime.OnnxModel(path), on="cpu")
    equal = (result.predictions == integer.predictions).double().mean().item()
    return {
        "network": w, "file, kB": path.stat().st_size / 1000,
        "top-1, ONNX Runtime": result.top1,
        "top-1, integer": integer.top1,
        "same answer, %": 100 * equal, "n": result.n,
        "local codes that differ": edges.local_differing.sum(), "of": edges.n.sum(),
        "by at most": edges.local_max_difference.max(),
    }


# %%
needed = ("onnx", "onnxscript", "onnxruntime")
missing = [name for name in needed if importlib.util.find_spec(name) is None]
if not missing:
    exported = pd.DataFrame([in_onnxruntime(w) for w in qmodels])
    assert exported["by at most"].max() <= 1, "fed the same codes: at most one step"
    gap = (exported["top-1, ONNX Runtime"] - exported["top-1, integer"]).abs().max()
    assert study.smoke or gap <= 0.05, "the export is the network"
    show(exported.round(2))
else:
    print(f"skipped: pip install {' '.join(missing)}")
folder.cleanup()

# %% [markdown]
# ## What we learned

# %%
in_float32 = one_rounding[one_rounding.simulation == "float32"]
for w, part in in_float32.groupby("network", sort=False):
    count, total = part.differing.sum(), part["values"].sum()
    print(f"- {w}: fed the same codes, {count:,} of {total:,} differ from float32,")
    print(f"  by {part.max_difference.max()} step at most and at most", end=" ")
    print(f"{part.from_tie.max():.0e} of a code from a tie.")

# %%
for (w, rounding), result in measured.items():
    about = agreement[(agreement.network == w) & (agreement.rounding == rounding)]
    about = about.set_index("simulation").loc["float64"]
    print(f"- {w}, {rounding} rounding: {result.top1:.2f} % of", end=" ")
    print(f"{result.n:,} right; as float64 on", end=" ")
    print(f"{about['same answer, %']:.1f} % of {about.n:,}, logits to", end=" ")
    print(f"{about['logits, dB']:.0f} dB")
    noise = about["simulation to float, dB"]
    print(f"  (the simulation itself, to those of the float network: {noise:.0f} dB).")

# %%
for w, dB in reached.items():
    print(f"- {w}: with one code flipped, its image's logits agree to {dB:.0f} dB.")
share = convs.share.max()
print(f"- Double rounding alone changes up to {100 * share:.1f} % of", end=" ")
print(f"the codes of a layer ({worst}, {low}).")
widest = sizes["widest accumulator of a layer"].max()
print(f"- No layer's accumulator needs more than {widest:.0f} bits.")

# %% [markdown]
# Next: [10_original_experiment](10_original_experiment.ipynb), the seven rows that started it all.
