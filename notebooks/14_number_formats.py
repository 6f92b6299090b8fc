# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 14 · Other number formats
#
# **Question.** Are integers the right grid? What do floats of 8, 6 and 4 bits and scales shared by
# small blocks do better, on which values, and what do they cost?
#
# **Seen.** [What a full run showed](../results/pages/14_number_formats-resnet20-cifar10-jpeg.md), without running it.
#
# **Cost.** Twenty seconds on the digits, without the networks of six bits; for ResNet-20 on 10,000 test
# images about ten minutes on two CPU cores (18 networks, one calibration seed), for ResNet-50 about an
# hour and a quarter.

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
import math

import numpy as np
import pandas as pd
import quantlab as ql
import torch
from torch.nn import functional as F
from tqdm.auto import tqdm

# %%
from quantlab import observers, ptq
from quantlab.calibration import watch
from quantlab.edgestats import EdgeStats
from quantlab.graph import folded
from quantlab.plan import make_plan
from quantlab.plots import formats as figures
from quantlab.quantized import find_node
from quantlab.system.comparing import decibels
from quantlab.workbook.study import Study, show

# %% tags=["parameters"]
data = "auto"  # auto, cifar10, digits, images, or the path of a folder or archive
model = "resnet20"  # resnet20 or resnet50
checkpoint = "auto"  # auto, or the path of a .safetensors file
seed = 0
preset = "auto"  # smoke, full, or auto: smoke on the digits
n_calibration = 0  # 0: 256 in a smoke run, 1,024 in a full one
n_sample = 0  # images in sections 3 and 4; 0: 16 in a smoke run, 64 in a full one

# %%
study = Study(
    data, model, checkpoint, preset,
    n_calibration=n_calibration, seed=seed, notebook="14_number_formats",
)
network, n_calibration = study.network.cpu(), study.n_calibration
n_sample = study.choose(n_sample, smoke=16, full=64)
sample = next(iter(study.calibration(batch_size=n_sample)))
widths = (8, 4) if study.smoke else (8, 6, 4)  # of the networks in section 5


# %% [markdown]
# ## 1. The values
# A float has a sign $S$, an exponent $E$ of $e$ bits and a mantissa $M$ of $m$ bits, and stands for
#
# $$(-1)^S\; 2^{E - \mathrm{bias}}\; \big(1 + M\,2^{-m}\big), \qquad \mathrm{bias} = 2^{e-1} - 1,$$
#
# and where $E = 0$, *subnormal*, for $(-1)^S\, 2^{1 - \mathrm{bias}}\, M\, 2^{-m}$, so that zero has a
# code and small values keep one step. With $1 + e + m$ bits it is called E$e$M$m$. Floats of 16 and 32
# bits keep the highest $E$ for infinities and NaN. Of a few bits that is a waste, so of the Open Compute
# Project's formats (OFP8; Microscaling, MX) only E5M2 does it; E4M3 has one NaN of each sign and no
# infinity; those of six and four bits have nothing but numbers.
#
# An integer is the extreme case: no exponent, every value subnormal.

# %%
@dataclasses.dataclass(frozen=True)
class Format:
    """One sign bit, `exponent` and `mantissa` bits; without an exponent: integers."""

    name: str
    exponent: int
    mantissa: int

    @property
    def bits(self):
        return 1 + self.exponent + self.mantissa

    @property
    def bias(self):
        return 2 ** (self.exponent - 1) - 1 if self.exponent else 1 - self.mantissa


# %%
def value_of(code, f):
    """The number that a code of the format f stands for."""
    sign = -1.0 if code >> (f.bits - 1) else 1.0
    E = (code >> f.mantissa) & (2**f.exponent - 1)
    M = (code & (2**f.mantissa - 1)) / 2**f.mantissa
    if f.name == "E5M2" and E == 31:
        return sign * math.inf if M == 0 else math.nan
    if f.name == "E4M3" and E == 15 and M == 7 / 8:
        return math.nan
    if E == 0:
        return sign * 2.0 ** (1 - f.bias) * M
    return sign * 2.0 ** (E - f.bias) * (1 + M)


# %%
@functools.cache
def values_of(f):
    """Its finite values in order, zero once: float32 [n]."""
    found = {value_of(code, f) for code in range(2**f.bits)}
    return torch.tensor(sorted(v for v in found if math.isfinite(v)))

INT8, INT6, INT4 = Format("INT8", 0, 7), Format("INT6", 0, 5), Format("INT4", 0, 3)
E4M3, E5M2 = Format("E4M3", 4, 3), Format("E5M2", 5, 2)
E2M3, E3M2, E2M1 = Format("E2M3", 2, 3), Format("E3M2", 3, 2), Format("E2M1", 2, 1)
FORMATS = (INT8, E4M3, E5M2, INT6, E2M3, E3M2, INT4, E2M1)


# %%
def describe(f):
    positive = values_of(f)[values_of(f) > 0]
    row = {"bits": f.bits, "bias": f.bias if f.exponent else ""}
    row |= {"values": len(values_of(f)), "smallest": f"{positive[0]:.3g}"}
    row["largest"] = f"{positive[-1]:,g}"
    codes = [value_of(code, f) for code in range(2**f.bits)]
    return {**row, "infinities and NaN": sum(not math.isfinite(v) for v in codes)}

show(pd.DataFrame({f.name: describe(f) for f in FORMATS}).T)
print("E2M1:", *(f"{v:g}" for v in values_of(E2M1)))

# %% [markdown]
# (Integers stand here with a sign and a magnitude, $-127 \dots 127$; with a zero-point, as everywhere
# else in this workbook, all $2^b$ codes are used.) Two independent tables of the same codes: torch has
# both 8-bit floats, `ml_dtypes`, which comes with `onnx`, the smaller ones too.

# %%
try:
    import ml_dtypes
except ImportError:
    ml_dtypes = None
    print("not compared with ml_dtypes: pip install ml_dtypes")
TORCH = {E4M3: torch.float8_e4m3fn, E5M2: torch.float8_e5m2}
SMALL = (E2M1, E2M3, E3M2) if ml_dtypes else ()
OTHER = {f: f"float{f.bits}_{f.name.lower()}fn" for f in SMALL}

def decoded(f):
    """What torch or ml_dtypes make of all codes, in order."""
    codes = np.arange(2**f.bits, dtype=np.uint8)
    if f in TORCH:
        return torch.from_numpy(codes).view(TORCH[f]).float().numpy()
    return codes.view(getattr(ml_dtypes, OTHER[f])).astype(np.float32)


# %%
for f in [*TORCH, *OTHER]:
    ours = [value_of(code, f) for code in range(2**f.bits)]
    np.testing.assert_array_equal(ours, decoded(f))  # NaN is equal to NaN here
print("the same numbers:", ", ".join(f.name for f in [*TORCH, *OTHER]))


# %% [markdown]
# All positive values on one axis, as fractions of the largest: a scale moves all of them, and what
# counts is how they lie. Integers have one step; floats have the same number of values in every octave,
# down to the subnormal ones (E4M3's highest lacks the one that means NaN). A bit moved from the mantissa
# to the exponent gives about twice as many octaves and half the values in each.

# %%
def positive_values(f):
    value = values_of(f)[values_of(f) > 0].numpy()
    subnormal = value < 2.0 ** (1 - f.bias)
    row = {"format": f.name, "bits": f.bits}
    return pd.DataFrame({**row, "value": value, "subnormal": subnormal})

table = pd.concat([positive_values(f) for f in FORMATS], ignore_index=True)
text = "values of number formats, no data and no model in it; n: right of each row"
study.save(figures.value_grids(table, text), "14_values")


# %% [markdown]
# ## 2. Rounding
# To the nearest value, of two equally near ones to that with the even mantissa, and beyond the largest
# to the largest (*saturation*; IEEE would give infinity). $2^{\lfloor\log_2|x|\rfloor}$ is the exponent
# field of the float32 itself; below the smallest normal number the step stays what it is there:
#
# $$\hat x = \mathrm{clamp}\big(\Delta \cdot \mathrm{round}(x / \Delta)\big), \qquad \Delta = 2^{-m}\, \max\big(2^{\lfloor\log_2|x|\rfloor},\; 2^{1-\mathrm{bias}}\big)$$

# %%
def power_of_two(x):
    """2^floor(log2 |x|) of float32 values, 0 for 0: their exponents alone."""
    return (x.view(torch.int32) & 0x7F800000).view(torch.float32)

def largest_of(f):
    return values_of(f)[-1].item()

def round_to(x, f):
    """The nearest values of f to finite ones, saturating: float32, same shape."""
    step = power_of_two(x).clamp_(min=2.0 ** (1 - f.bias)).mul_(2.0**-f.mantissa)
    largest = largest_of(f)
    return (x / step).round_().mul_(step).clamp_(-largest, largest)


# %% [markdown]
# Integers come out of the same two lines. First against the nearest of all values, found by looking at
# all of them; random numbers, the values, everything half-way between two, and numbers far outside:

# %%
many = torch.randn(10_000, generator=torch.Generator().manual_seed(seed))

def numbers(f):
    values = values_of(f)
    half_way = (values[1:].double() + values[:-1].double()).float() / 2
    return torch.cat([many * largest_of(f) / 3, values, half_way, 9 * values])

for f in FORMATS:
    x, values = numbers(f), values_of(f)
    x_hat = round_to(x, f)
    nearest = (x[:, None] - values).abs().amin(1)
    assert torch.isin(x_hat, values).all(), "only values of the format"
    assert torch.equal((x_hat - x).abs(), nearest), "no other is nearer"


# %% [markdown]
# Then against the casts of torch and of `ml_dtypes`, which decide the ties too. Most of them saturate as
# well; what lies beyond the largest value is left out where one gives NaN or infinity (torch's E5M2):

# %%
def cast(x, f):
    if f in TORCH:
        return x.to(TORCH[f]).float()
    small = x.numpy().astype(getattr(ml_dtypes, OTHER[f]))
    return torch.from_numpy(small.astype(np.float32))

for f in [*TORCH, *OTHER]:
    x, largest = numbers(f), largest_of(f)
    if cast(torch.tensor([9 * largest]), f) != largest:
        x = x[x.abs() <= largest]
        print(f.name, "is not saturated by the cast")
    assert torch.equal(round_to(x, f), cast(x, f)), f.name


# %% [markdown]
# ## 3. Scales
# **One scale** for a tensor, or for an output channel of a weight: a real number, chosen as everywhere
# in this workbook by the least error, over the exact histogram of an edge or over the weights
# themselves.

# %%
def best_scale(x, f, p=2.0, counts=1.0, steps=60):
    """Scales [C, 1] with the least sum of |error|^p over x [C, n], counted so often."""
    whole = x.abs().amax(1, keepdim=True).clamp(min=2.0**-60) / largest_of(f)
    best, least = whole, torch.full_like(whole, math.inf)
    for part in torch.linspace(1, 0.05, steps):
        error = (round_to(x / (part * whole), f) * (part * whole) - x).abs() ** p
        error = (error * counts).sum(1, keepdim=True)
        best = torch.where(error < least, part * whole, best)
        least = torch.minimum(error, least)
    return best

def scale_of_edge(edge, f):
    """Of all that an EdgeStats has counted; a dead edge has no bins, hence the zero."""
    centers, counts = (F.pad(v, [0, 1]) for v in edge.histogram())
    return best_scale(centers.float()[None], f, counts=counts).item()


# %% [markdown]
# For integers the package does the same; its range for a symmetric weight is the scale times the
# largest code:

# %%
graph = folded(network).cpu()
names = ptq.layers(graph)
layers = {n: graph.get_submodule(find_node(graph, n).target) for n in names}
weights = {n: layer.weight.detach() for n, layer in layers.items()}
name = [n for n in names if weights[n].dim() == 4][len(names) // 2]
flat = weights[name].flatten(1)
ours = best_scale(flat, INT4, p=3.0)

# %%
low, high = observers.weight_range(flat, 4, p=3.0)
theirs = torch.maximum(-low, high).float()[:, None] / largest_of(INT4)

def error_of(scale):
    return (round_to(flat / scale, INT4) * scale - flat).abs().pow(3).sum()

ratio = error_of(ours) / error_of(theirs)
print(f"{name}: error over that of the package's range {ratio:.3f}")
assert 0.9 < ratio < 1.1


# %% [markdown]
# **A scale for every block.** If 32 neighbours share a scale, it need not be searched for: it comes
# from the largest of them, at the moment when they are rounded. Neighbours lie along the input
# channels, whose products are summed; a layer with fewer channels has shorter blocks. *Microscaling*
# (OCP MX v1.0): the scale $X$ is a power of two, one byte without sign or mantissa (E8M0), such that
# the largest value of the block falls into the highest octave of the element format:
#
# $$X = 2^{\lfloor \log_2 \max|x| \rfloor - \lfloor \log_2 \mathrm{largest} \rfloor}$$
#
# (The specification's MXINT8 counts in steps of $2^{-6}$, so its $X$ is 64 times ours; the values are the
# same.) The tests compare blocks with torchao's, value by value.

# %%
def in_blocks(x, size):
    """[N, C, ...] -> [N, blocks, size, ...], the last block filled up with zeros."""
    size = min(size, x.shape[1])
    if x.shape[1] % size:
        x = F.pad(x, [0, 0] * (x.dim() - 2) + [0, -x.shape[1] % size])
    return x.unflatten(1, (-1, size))

def mx_scale(blocks, f):
    """Powers of two [N, blocks, 1, ...], from 2^-126; E8M0 has 2^-127 too."""
    largest = power_of_two(blocks.abs().amax(2, keepdim=True))
    return (largest * (1 / power_of_two(values_of(f)[-1:]).item())).clamp(2.0**-126)


# %%
def mx(x, f):
    blocks = in_blocks(x, 32)
    scale = mx_scale(blocks, f)
    return (round_to(blocks / scale, f) * scale).flatten(1, 2)[:, : x.shape[1]]


# %% [markdown]
# *NVFP4*: blocks of 16, each with a scale that is itself an E4M3, so that a block's largest value is met
# but for that rounding; and because E4M3 is short of range, one float32 scale $t$ a tensor, which brings
# the largest block's scale to 448 ($\max|x|$ of activations is from calibration):
#
# $$t = \frac{\max|x|}{448 \cdot \mathrm{largest}}, \qquad s = t\;\mathrm{E4M3}\!\left(\frac{\max_{16}|x|}{t \cdot \mathrm{largest}}\right)$$

# %%
def nv_scale(blocks, f, whole):
    """Scales [N, blocks, 1, ...], none 0; whole: the largest value of the tensor."""
    t = max(whole, 2.0**-60) / (largest_of(E4M3) * largest_of(f))
    largest = blocks.abs().amax(2, keepdim=True)
    return t * round_to(largest / (t * largest_of(f)), E4M3).clamp(2.0**-9)

def nv(x, f, whole):
    blocks = in_blocks(x, 16)
    scale = nv_scale(blocks, f, whole)
    return (round_to(blocks / scale, f) * scale).flatten(1, 2)[:, : x.shape[1]]


# %% [markdown]
# Eight of the weights of one output channel as E2M1, under the three scales:

# %%
row = weights[name][:1, :32, 0, 0]
own = best_scale(row, E2M1).item()
whole = weights[name].abs().max().item()
three = {"one scale": round_to(row / own, E2M1) * own, "MXFP4": mx(row, E2M1)}
three["NVFP4"] = nv(row, E2M1, whole)
show(pd.DataFrame({"w": row[0], **{k: v[0] for k, v in three.items()}})[:8].T.round(4))

def sqnr(x, x_hat):
    return decibels(x.double().square().sum(), (x_hat - x).double().square().sum())

said = ", ".join(f"{label} {sqnr(row, v):.1f} dB" for label, v in three.items())
print(f"{row.shape[1]} weights: {said}")

# %% [markdown]
# MX's power of two is not free: the highest octave of E2M1 ends at 8, its largest value is 6, and a
# block whose largest value falls between them loses up to a quarter of it. Clipped is what lies more
# than half a step beyond the largest. With more bits of mantissa the octave ends nearer to it (but
# E4M3 gives its last code to NaN). This is the specification's rounding down of the scale; rounding it up
# would clip nothing and halve the resolution of these blocks:

# %%
blocks = in_blocks(many[:9600].view(100, 96), 32)
saturate = {}
for f in FORMATS:
    X = mx_scale(blocks, f)
    assert torch.equal(X.to(torch.float8_e8m0fnu).float(), X), "an E8M0"
    top = (blocks / X).abs().amax(2)
    octave = power_of_two(values_of(f)[-1:])
    assert (top >= octave).all() and (top < 2 * octave).all(), "in the highest octave"
    zeros = torch.zeros(1, 32)
    assert torch.equal(mx(zeros, f), zeros) and torch.equal(nv(zeros, f, 1.0), zeros)
    last_step = (values_of(f)[-1] - values_of(f)[-2]).item()
    saturate[f.name] = (top > largest_of(f) + last_step / 2).double().mean().item()
show(pd.Series(saturate, name="blocks clipped, normal values").to_frame().T.round(2))


# %% [markdown]
# What the schemes are called from here on: integers with a zero-point (weights: one scale a channel,
# all $2^b$ levels), *minifloats* with one scale, and blocks. MXINT6, MXINT4 and NVINT4 are in no
# specification: they take the same scales with integers as elements, and so tell what is the blocks'
# merit and what the elements'. One difference remains: behind a ReLU a zero-point lets integers use all
# their codes, every other format here spends half of its own on negative values that never come.

# %%
@dataclasses.dataclass(frozen=True)
class Scheme:
    """scales: "zero-point", "one", "MX" or "NV"."""

    name: str
    format: Format
    scales: str


# %%
INTEGERS = (INT8, INT6, INT4)
SCHEMES = [Scheme(f"integers, {f.bits} bits", f, "zero-point") for f in INTEGERS]
SCHEMES += [Scheme(f"minifloat {f.name}", f, "one") for f in FORMATS if f.exponent]
SCHEMES += [Scheme(f"MX{f.name}", f, "MX") for f in INTEGERS]
SCHEMES += [Scheme(f"MXFP8 {f.name}", f, "MX") for f in (E4M3, E5M2)]
SCHEMES += [Scheme(f"MXFP6 {f.name}", f, "MX") for f in (E2M3, E3M2)]
SCHEMES += [Scheme("MXFP4", E2M1, "MX"), Scheme("NVINT4", INT4, "NV")]
SCHEMES += [Scheme("NVFP4", E2M1, "NV")]
SCHEMES.sort(key=lambda scheme: -scheme.format.bits)  # stable: integers come first


# %%
def rounding(scheme, edge):
    """The function that rounds tensors with the statistics of this edge."""
    f = scheme.format
    if scheme.scales == "MX":
        return functools.partial(mx, f=f)
    if scheme.scales == "NV":
        return functools.partial(nv, f=f, whole=max(-edge.minimum, edge.maximum))
    if scheme.scales == "zero-point":
        q = ql.choose_qparams(*observers.histogram(edge, f.bits), f.bits)
        return lambda x: ql.fake_quantize(x, q.to(x.device))
    scale = scale_of_edge(edge, f)
    return lambda x: round_to(x / scale, f) * scale


# %%
NORM = ql.QuantConfig().weight_norm  # p = 3, as for integers: notebook 03, section 8

def rounded_weight(scheme, weight):
    """Scales along the output channels, or of blocks along the input channels."""
    f, flat = scheme.format, weight.flatten(1)
    if scheme.scales == "MX":
        return mx(weight, f)
    if scheme.scales == "NV":
        return nv(weight, f, weight.abs().max().item())
    if scheme.scales == "zero-point":
        config = ql.QuantConfig(f.bits, weight_symmetric=False)
        q = ptq.choose_weight_qparams(weight, f.bits, config)
        return ql.fake_quantize(weight, q)
    scale = best_scale(flat, f, p=NORM)
    return (round_to(flat / scale, f) * scale).view_as(weight)


# %% [markdown]
# What a scale costs: a byte for every block, one more float32 a tensor with NVFP4, for minifloats one
# float32 a channel, and for integers as much again for its zero-point. In bits a value, of this network's
# weights and of an activation of many channels:

# %%
def scale_bytes(scheme, weight):
    size = {"MX": 32, "NV": 16}.get(scheme.scales)
    if size is None:
        return 4 * len(weight) * (2 if scheme.scales == "zero-point" else 1)
    blocks = in_blocks(weight, size)
    return blocks.numel() // blocks.shape[2] + 4 * (scheme.scales == "NV")

def stored_bytes(scheme):
    """(Codes and scales, those and float32 biases)."""
    codes = sum(-(-w.numel() * scheme.format.bits // 8) for w in weights.values())
    scales = sum(scale_bytes(scheme, w) for w in weights.values())
    biases = sum(4 * len(w) for w in weights.values())
    return codes + scales, codes + scales + biases


# %%
total = sum(w.numel() for w in weights.values())
shared = {"MX": 8 / 32, "NV": 8 / 16}
cost = pd.DataFrame({
    scheme.name: {
        "bits a code": scheme.format.bits,
        "weights here": 8 * stored_bytes(scheme)[0] / total,
        "activations": scheme.format.bits + shared.get(scheme.scales, 0),
    } for scheme in SCHEMES
}).T.rename_axis("bits a value, with scales")
show(cost.round(2))

# %% [markdown]
# ## 4. Which error on which values
# Three ideal distributions; then, of this network, the image, the edge behind a ReLU and the operand of
# an add (signed) with the longest tails, and the weights of a layer in its middle. Scales come from the
# exact histograms of all calibration images, the errors from a few of them, because a block needs to
# know who is neighbour to whom.

# %%
stats, plan = study.stats, make_plan(graph)

def tail(name):
    """The largest value over the 99.99 % quantile."""
    high = observers.percentile(stats.edges[name], 8)[1]
    return stats.edges[name].maximum / high if high > 0 else 0

roles = {"image": [], "behind a ReLU": [], "before an add": []}
for edge, role in plan.stores.items():
    signed = stats.edges[edge].minimum < 0
    kind = "before an add" if signed else "behind a ReLU"
    roles["image" if role == "input" else kind].append(edge)

# %%
chosen = {kind: max(found, key=tail) for kind, found in roles.items() if found}
seen = {}
watch(folded(network), set(chosen.values()), seen.__setitem__, [sample])
print(", ".join(f"{kind}: {edge}" for kind, edge in chosen.items()))


# %%
def draw(distribution):
    """[2048, 64] independent values."""
    torch.manual_seed(seed)
    return distribution.sample((2048, 64))

ideal = {
    "normal": draw(torch.distributions.Normal(0.0, 1.0)),
    "Laplace": draw(torch.distributions.Laplace(0.0, 1.0)),
    "uniform": draw(torch.distributions.Uniform(-1.0, 1.0)),
}
edges = {kind: EdgeStats().update(x) for kind, x in ideal.items()}
edges |= {kind: stats.edges[edge] for kind, edge in chosen.items()}
tensors = ideal | {kind: seen[edge].cpu() for kind, edge in chosen.items()}

# %%
rows = []
for scheme in tqdm(SCHEMES, desc="errors"):
    row = {"format": scheme.name, "bits": scheme.format.bits}
    for kind, x in tensors.items():
        db = sqnr(x, rounding(scheme, edges[kind])(x))
        rows.append({**row, "distribution": kind, "sqnr": db})
    db = sqnr(weights[name], rounded_weight(scheme, weights[name]))
    rows.append({**row, "distribution": "weights", "sqnr": db})
errors = pd.DataFrame(rows)

# %%
groups = errors.groupby(["bits", "distribution"])
errors["gain"] = errors.sqnr - groups.sqnr.transform("first")  # integers
text = "calibration images; " + ", ".join(f"{k}: {v}" for k, v in chosen.items())
text += f"; weights of {name}; ideal: {ideal['normal'].numel():,} values each"
text = study.caption(n_sample, text)
study.save(figures.error_map(errors, text), "14_errors")

# %% [markdown]
# A float errs in proportion to the value: E4M3 loses the same whatever the tail. Integers lose little
# where values fill the range and much where most of it is for a few. At four bits, the two grids side by
# side and the scales below each other; what the differences are worth to the network, section 5 measures:

# %%
db = errors.pivot(index="format", columns="distribution", values="sqnr")
for label in ("minifloat E4M3", "MXFP8 E4M3"):
    assert db.loc[label, ["normal", "Laplace"]].agg(np.ptp) < 1, "any tail"
full, tailed = db.loc["integers, 8 bits", ["uniform", "Laplace"]]
assert full > tailed + 10, "an empty range costs integers"
by_scale = {
    "one scale": ["integers, 4 bits", "minifloat E2M1"], "MX": ["MXINT4", "MXFP4"],
    "NV": ["NVINT4", "NVFP4"],
}
show(pd.DataFrame({
    scale: db.loc[names].mean(axis=1).set_axis(["integers", "E2M1"])
    for scale, names in by_scale.items()
}).T.rename_axis("4 bits, mean of all columns, dB").round(1))

# %% [markdown]
# ## 5. The network
# All layers, first and last included, read their input in the format and have their weights in it. What
# they write stays float: sums, biases and the residual stream, as on the machines that have these
# formats, which sum up in float32 (`residual_bits=None` for integers). The image keeps its 8-bit
# integers at every width.

# %%
IMAGE = Scheme("image", INT8, "zero-point")

def network_in(scheme):
    """The folded float graph; a hook rounds what each layer reads."""
    own = copy.deepcopy(graph)
    for layer_name, edge in plan.reads.items():
        layer = own.get_submodule(find_node(own, layer_name).target)
        layer.weight.data = rounded_weight(scheme, weights[layer_name])
        is_image = plan.stores.get(plan.sources.get(edge)) == "input"
        read = rounding(IMAGE if is_image else scheme, stats.edges[edge])
        layer.register_forward_pre_hook(lambda _, inputs, read=read: read(inputs[0]))
    return own


# %% [markdown]
# With integers this must be the package's own network, bit for bit, once its biases are rounded too,
# which takes the scale of a nearly dead channel along:

# %%
def integers(bits):
    config = ql.QuantConfig(bits, bits, weight_symmetric=False, residual_bits=None)
    return ql.quantize(network, stats, config).cpu()


# %%
scheme = next(scheme for scheme in SCHEMES if scheme.name == "integers, 4 bits")
ours, by_package, moved = network_in(scheme), integers(4), 0
for layer_name, layer in by_package.layers.items():
    own = ours.get_submodule(find_node(ours, layer_name).target)
    q = ptq.choose_weight_qparams(weights[layer_name], 4, by_package.config)
    same = layer.weight_qparams.scale == q.scale
    assert torch.equal(own.weight[same], layer.weight[same]), layer_name
    moved += (~same).sum().item()
    own.load_state_dict(layer.state_dict())
with torch.no_grad():
    assert torch.equal(ours(sample), by_package(sample)), "the same places"
print(f"weights equal, but for {moved} channels that a rounded bias gave another scale")


# %% [markdown]
# Integers are recorded as the package's own network, the others under their own names.

# %%
def columns_of(scheme):
    """What of a row its scheme decides."""
    block = {"MX": "block of 32", "NV": "block of 16"}.get(scheme.scales)
    return {
        "weight_bits": scheme.format.bits, "act_bits": scheme.format.bits,
        "levels": len(values_of(scheme.format)), "input_bits": 8, "placement": "read",
        "granularity": block or "channel",
        "observer": "block maximum" if block else "histogram",
        "weight_observer": "block maximum" if block else f"lp(p={NORM:g})",
        "n_calibration": n_calibration,
    }


# %%
def row_of(scheme):
    if scheme.scales == "zero-point":
        own = integers(scheme.format.bits)
        result, size = study.evaluated(["integers", own.config.act_bits], lambda: own)
        return study.row(result, "by hand", own.config, bytes=size)
    result, _ = study.evaluated([scheme.name], lambda: network_in(scheme))
    size = stored_bytes(scheme)[1]
    return study.row(result, scheme.name, bytes=size, **columns_of(scheme))


# %%
rows = []
measured = [scheme for scheme in SCHEMES if scheme.format.bits in widths]
for scheme in tqdm(measured, desc="networks"):
    row = row_of(scheme)
    study.record_rows([row])
    rows.append({**row, "format": scheme.name, "bits": scheme.format.bits})
lost = pd.DataFrame(rows)
columns = ["bits", "top1", "drop", "drop_low", "drop_high", "bytes"]
print(f"float {study.baseline.top1:.2f} %, n = {study.baseline.n:,}")
show(lost.set_index("format")[columns].round(2))

# %%
text = "test images; weights and inputs of all layers, image 8-bit integers, residual "
text += f"stream float, {n_calibration:,} calibration images; paired 95 % intervals"
text = study.caption(study.baseline.n, text)
study.save(figures.lost_by_format(lost, text), "14_points_lost")

# %% [markdown]
# ## What we learned

# %%
spread = errors.groupby("format").sqnr.agg(["min", "max"])
for label in ("integers, 8 bits", "minifloat E4M3"):
    low, high = spread.loc[label]
    print(f"- {label}: {low:.1f} to {high:.1f} dB, by what is rounded.")
least = errors.loc[errors.groupby(["bits", "distribution"], sort=False).sqnr.idxmax()]
for bits, part in least.groupby("bits", sort=False):
    wins = [f"{label} on {', '.join(own)}" for label, own in
            part.groupby("format", sort=False).distribution]
    print(f"- {bits} bits, least error: {'; '.join(wins)}.")

# %%
mean = errors[errors.bits == 4].groupby("format").sqnr.mean()
print(
    f"- 4 bits, mean over the {errors.distribution.nunique()}: a scale for every 16 "
    f"gives E2M1 {mean['NVFP4'] - mean['minifloat E2M1']:+.1f} dB, MX's power of two "
    f"for every 32 {mean['MXFP4'] - mean['minifloat E2M1']:+.1f} dB. In blocks of 16, "
    f"integers instead of E2M1: {mean['NVINT4'] - mean['NVFP4']:+.1f} dB."
)
extra = cost["weights here"] - cost["bits a code"]
print(
    f"- Scales take {extra['integers, 4 bits']:.2f} bits a weight by channel, "
    f"{extra['MXFP4']:.2f} with MX, {extra['NVFP4']:.2f} with NVFP4."
)

# %%
for bits, part in lost.groupby("bits", sort=False):
    said = [f"{r.format} {r.drop:+.2f} [{r.drop_low:+.2f}, {r.drop_high:+.2f}]"
            for r in part.sort_values("drop", kind="stable").itertuples()]
    print(f"- {bits} bits, points lost: {'; '.join(said)}.")

# %% [markdown]
# Next: [13_report](13_report.ipynb), everything measured so far on one page.
