# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 09 · Integer-only: the same network without floating point
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/TimS-ml/Handwritten-Quantization/blob/main/notebooks/09_integer_only.ipynb)
#
# **Question.** Does a machine that has only integers compute what the fake-quantized network simulates, code for code?
#
# **Cost.** Under a minute on the digits; on 10,000 test images about ten minutes, on two CPU cores.

# %%
import os
import subprocess
import sys

if "google.colab" in sys.modules and not os.path.isdir("quantlab"):  # fetch the workbook; Colab keeps its own torch
    subprocess.check_call("test -d workbook || git clone --depth 1 https://github.com/TimS-ml/Handwritten-Quantization workbook; pip install -q -e workbook", shell=True)
    os.chdir("workbook")
    sys.path.insert(0, os.getcwd())

# %%
import fractions
import importlib.util
import itertools
import pathlib
import tempfile

import pandas as pd
import quantlab as ql
import torch
import torch.nn.functional as F
from quantlab import graph, plots, ptq
from quantlab.export.packed import file_sizes
from quantlab.integer import proof
from quantlab.integer.fixedpoint import fixed_point, multiply, signed_bits
from quantlab.rivals import onnxruntime as onnx_runtime
from quantlab.workbook import results
from tqdm.auto import tqdm

# %% tags=["parameters"]
data = "auto"  # auto, cifar10, digits, images, or the path of a folder or archive
model = "resnet20"  # resnet20 or resnet50
checkpoint = "auto"  # auto, or the path of a .safetensors file
seed = 0
preset = "auto"  # smoke, full, or auto: smoke on the digits
bits = 4  # 2 to 8: the low width; 8 is the other one
layer = "auto"  # a convolution in front of a ReLU, for section 1; auto: the middle one
n_calibration = 0  # 0: 256 in a smoke run, 1,024 in a full one

# %%
images = ql.load_data(data)
smoke = images.smoke if preset == "auto" else preset == "smoke"
limit = 1000 if smoke else None  # test images
n_compared = 16 if smoke else 256  # images of the code-by-code comparison
n_calibration = n_calibration or min(256 if smoke else 1024, len(images.train))
network, card = ql.load_trained(model, images, checkpoint)
stats = ql.collect(network, images.calibration(n_calibration, seed))
qmodels = {f"W{b}A{b}": ql.quantize(network, stats, ql.QuantConfig(weight_bits=b, act_bits=b)) for b in sorted({8, bits}, reverse=True)}
low = f"W{bits}A{bits}"
qmodel = qmodels[low].cpu()


# %% [markdown]
# ## 1. One layer in integers, by hand
# A convolution of real numbers, with $x = s_x(q_x - z_x)$ and $w = s_w q_w$ in it, is a convolution of integers and one factor:
#
# $$y = s_x s_w \Big(\underbrace{\textstyle\sum (q_x - z_x)\,q_w + q_b}_{\text{accumulator, int32}}\Big), \qquad
# q_y = \mathrm{clamp}\Big(z_y + \mathrm{round}\Big(\underbrace{\frac{s_x s_w}{s_y}}_{M}\,\text{acc}\Big),\ z_y,\ q_{\max}\Big)$$
#
# The bias is coded in units of $s_x s_w$, so that it can be added to the sum. A ReLU is the lower end of the clamp: the code of zero.

# %%
def quantizer_at(node, following):
    """The nearest Quantizer before or behind a node: (edge, its parameters)."""
    while not str(node.target).startswith("quantizers."):
        node = next(iter(node.users)) if following else node.args[0]
    return node.target.removeprefix("quantizers."), qmodel.get_submodule(node.target).qparams

kinds = {n.name: kind for n, kind in graph.find_kinds(qmodel).items()}
before_relu = [n for n in qmodel.plan.reads if [kinds[user.name] for user in ptq.find_node(qmodel, n).users] == ["clamp"]]
layer = before_relu[len(before_relu) // 2] if layer == "auto" else layer
node = ptq.find_node(qmodel, layer)
conv = qmodel.get_submodule(node.target)
(source, q_x), (edge, q_y) = quantizer_at(node.args[0], False), quantizer_at(node, True)
batch = next(iter(images.calibration(16, seed + 1)))
codes = proof.simulated_codes(qmodel, batch)
print(f"{layer}: {tuple(conv.weight.shape)}, reads {source} ({q_x.bits} bits), writes {edge} ({q_y.bits} bits)")

# %% [markdown]
# Every line below is an integer tensor; the widths are those of the values that occur on these images.

# %%
x, z_x, z_y = codes[source], q_x.zero_point, q_y.zero_point
w = ql.quantize_tensor(conv.weight.detach(), conv.weight_qparams)
unit = q_x.scale.double() * conv.weight_qparams.scale.double()
bias = torch.round(conv.bias.detach().double() / unit).int()
sums = F.conv2d(x - z_x, w, None, conv.stride, conv.padding, conv.dilation, conv.groups)
acc = sums + bias.view(-1, 1, 1)
multiplier, shift = (t.view(-1, 1, 1) for t in fixed_point(unit / q_y.scale.double()))  # M = multiplier * 2^(shift - 31), once, off line
product = acc.long() * multiplier
rounded = (product + (1 << (30 - shift.long()))) >> (31 - shift.long())
y = (rounded + z_y).clamp(z_y.item(), q_y.qmax)

# %%
steps = {"input codes": x, "input codes - zero point": x - z_x, "weight codes": w, "sum of products": sums, "bias codes": bias, "accumulator": acc,
         "multiplier": multiplier, "accumulator * multiplier": product, "shifted": rounded, "output codes": y}
assert not any(t.is_floating_point() for t in steps.values())
ends = {name: (t.min().item(), t.max().item()) for name, t in steps.items()}
widths = {name: signed_bits(*e) - (e[0] >= 0) for name, e in ends.items()}  # no sign bit where nothing is negative
pd.DataFrame(ends, index=["least", "largest"]).T.assign(bits=widths).rename_axis("integer")

# %%
difference = (y - codes[edge]).abs()
assert difference.max() <= 1, "one layer, fed the same codes, is at most one code off"
print(f"{layer}: {(difference != 0).sum().item()} of {y.numel():,} codes differ from the simulation in float32")

# %% [markdown]
# ## 2. Multiplier, shift, and two ways to round
# $M$ becomes an int32 multiplier of 31 significant bits and a shift. *Single* rounding rounds the 64-bit product once. *Double* rounding is
# gemmlowp's, made for processors without 64-bit products: first the upper half of the doubled product, then a division by a power of
# two, each of them rounded. The published example on which they disagree:

# %%
example = {"x": 7984, "q": 1583594044, "shift": -9}
exact = fractions.Fraction(example["x"] * example["q"]) / 2 ** (31 - example["shift"])
found = {mode: multiply(*(torch.tensor(v) for v in example.values()), mode).item() for mode in ("single", "double")}
assert found == {"single": 11, "double": 12}
print(f"exact {float(exact):.4f}, rounded {found}")

# %% [markdown]
# Which of them matters here? Both are asked for every operation of the network, which `to_integer` (section 3) turns into integers. The
# right panel feeds each operation the simulation's codes and counts; the left one looks at the layer where double rounding differs most.

# %%
compared = list(images.calibration(n_compared, seed + 2))
imodels = {(w, r): ql.to_integer(q, r, executor="fast") for (w, q), r in itertools.product(qmodels.items(), ("single", "double"))}
alone = pd.concat(proof.per_operation(qmodels[w], imodel, compared).assign(network=w, rounding=r) for (w, r), imodel in tqdm(imodels.items()))
report = imodels[low, "single"].report(batch.shape[1:])
layers = alone[alone.network == low].merge(report[["layer", "multiplier"]], on="layer")
worst = layers[(layers.rounding == "double") & (layers.kind == "conv")].nlargest(1, "share").layer.item()

# %%
reference = ql.to_integer(qmodel)
op = reference.operations[worst]
acc = op.accumulate(codes[quantizer_at(ptq.find_node(qmodel, worst).args[0], False)[0]])
exact = acc.double() * op.acc_scale / op.out.scale
inside = (exact > op.out.low - op.out.zero_point) & (exact < op.out.high - op.out.zero_point)
errors = pd.concat(pd.DataFrame({"rounding": mode, "error": (multiply(acc, op.multiplier, op.shift, mode) - exact)[inside].numpy()})
                   for mode in ("single", "double"))
assert errors[errors.rounding == "single"].error.abs().max() < 0.5 + 1e-6, "single rounding is the nearest code"
text = plots.row_caption(images, model, n_compared, f"training images, {low}; left: layer {worst}, {inside.sum():,} values that are not clamped")
plots.save(plots.rounding_modes(errors, layers, text), "09_rounding", images, model)

# %% [markdown]
# The first step of double rounding makes whole units of the accumulator. With few bits an accumulator holds small numbers, $M$ is large, and
# that step costs a good part of a code. Adds escape: they carry 20 fractional bits.

# %% [markdown]
# ## 3. The whole network
# `to_integer` walks the graph of the simulation and turns every Quantizer into one operation that ends in codes. Where a layer reads fewer
# bits than the residual stream has, codes are requantized to codes; an add rescales both operands with 20 fractional bits; an average's
# division is part of its multiplier. Bounds of every accumulator are checked before anything runs.

# %%
codes = reference.codes(batch)
assert not any(tensor.is_floating_point() for tensor in codes.values()), "images in, integers from there to the logits"
print(f"{len(codes)} edges; logits {codes['logits'].dtype}, {codes['logits'].min()} to {codes['logits'].max()}")
report.drop(columns=["bops", "live_bytes"]).head(6).round(4)

# %% [markdown]
# The reference runs int32 tensors and is made to be read. The fast executor keeps int8 codes in memory and accumulators in registers (in C,
# `quantlab/integer/fast/kernels.c`, or by torch's integer matrix product); it must give the same codes.

# %%
count = equal = 0
for part in compared[: 1 if smoke else None]:
    ours, theirs = reference.codes(part), imodels[low, "single"].codes(part)
    equal += sum(torch.equal(ours[name], theirs[name].cpu()) for name in ours)
    count += len(ours)
assert equal == count, "two executors, one result"
print(f"{equal} of {count} edges equal, code for code")

# %% [markdown]
# ## 4. The proof
# Left, every operation is fed the codes of the simulation, so that it answers for itself alone. Right, the integer network is fed its own
# codes, and differences travel. What an operation rounds otherwise lies next to a tie: float32 sums round, and ties go to even there, up here.

# %%
together = pd.concat(proof.end_to_end(qmodels[w], imodel, compared).assign(network=w, rounding=r) for (w, r), imodel in tqdm(imodels.items()))
depth = pd.concat([alone.assign(fed="same"), together.assign(fed="own")])
text = plots.row_caption(images, model, n_compared, "training images; 0: not one code differs")
plots.save(plots.codes_by_depth(depth, text), "09_codes_by_depth", images, model)

# %%
assert alone[alone.rounding == "single"].max_difference.max() <= 1, "under single rounding no operation is more than one code off"
grouped = alone.groupby(["network", "rounding"], sort=False)
why = grouped.agg(values=("values", "sum"), differing=("differing", "sum"), next_to_a_tie=("ties", "sum"), largest_difference=("max_difference", "max"),
                  farthest_from_tie=("from_tie", "max"))
why.assign(per_million=lambda f: 1e6 * f.differing / f["values"])


# %% [markdown]
# Where they differ most, and on how many different sums. A sum next to a tie differs every time it occurs, and a common one occurs often: in
# float32 the rounding of the scales and the order of the additions decide it.

# %%
def sums_that_differ(network, edge):
    """Accumulators of an operation, fed the simulation's codes, where it stores another code than the simulation."""
    integer, codes = ql.to_integer(qmodels[network].cpu()), proof.simulated_codes(qmodels[network], compared[0])
    edges = {node: name for name, (node, _) in integer.stored.items()}
    node = ptq.find_node(integer.network, integer.stored[edge][0])
    op, operands = integer.operations[node.name], [codes[edges[source.name]] for source in node.args]
    return op.accumulate(*operands)[op(*operands) != codes[edge]]

most = alone[(alone.rounding == "single") & alone.kind.isin(["conv", "add"])].nlargest(4, "differing")
counts = {row.Index: (len(sums := sums_that_differ(row.network, row.edge)), len(sums.unique())) for row in most.itertuples()}
counts = pd.DataFrame(counts, index=["differing in one batch", "different sums"]).T
most[["network", "edge", "kind", "values", "differing", "from_tie"]].join(counts)


# %% [markdown]
# And what it is for: the same answers on the test images. A second judge runs the same simulation in float64, whose sums do not err.

# %%
def in_float64(q):
    exact = ptq.copy_quantized(q).double()
    return lambda x: exact.to(x.device)(x.double())

baseline = ql.evaluate(network, images.test, limit=limit)

# %%
in_double = {w: ql.evaluate(in_float64(q), images.test, limit=limit) for w, q in qmodels.items()}
simulated = {w: ql.evaluate(q, images.test, limit=limit) for w, q in qmodels.items()}
for imodel in imodels.values():
    imodel(batch)  # what is compiled at the first call is compiled before the clock runs
measured = {key: ql.evaluate(imodel, images.test, limit=limit) for key, imodel in tqdm(imodels.items())}
agreement = pd.DataFrame([{
    "network": w, "rounding": r, "simulated": simulated[w].top1, "integer": result.top1, "n": result.n,
    "agreement": 100 * (result.predictions == simulated[w].predictions).double().mean().item(),
    "in_float64": 100 * (result.predictions == in_double[w].predictions).double().mean().item(),
    "images_per_s": result.images_per_s, "simulated_images_per_s": simulated[w].images_per_s} for (w, r), result in measured.items()])
assert smoke or agreement[agreement.rounding == "single"].in_float64.min() >= 99.9, "one network, whoever computes it"
agreement.round(2)

# %%
common = dict(data=images, model=model, card=card, baseline=baseline, notebook="09_integer_only", n_calibration=n_calibration, seed=seed)
rows = [results.make_row(**common, result=result, method=f"integer only {w}, {r} rounding", config=qmodels[w].config, bytes=ql.weight_bytes(qmodels[w]))
        for (w, r), result in measured.items()]
results.record(rows)[["method", "top1", "drop", "drop_low", "drop_high"]].round(2)

# %% [markdown]
# ## 5. What it costs
# Accumulators need far fewer than 32 bits; an add needs its 20 fractional ones. Operations in bits (BOPs) count a multiplication of a
# $b_w$-bit weight with a $b_x$-bit code as $b_w b_x$ (van Baalen et al. 2020, arXiv:2005.07093).

# %%
text = plots.row_caption(images, model, 1, f"image of {' x '.join(map(str, batch.shape[1:]))}, {low}, residual stream 8 bits")
plots.save(plots.layer_costs(report, text), "09_layer_costs", images, model)


# %%
def costs(width):
    q = ql.quantize(network, stats, ql.QuantConfig(weight_bits=width, act_bits=width))
    frame = ql.to_integer(q).report(batch.shape[1:])
    wide = frame[frame.kind.isin(["conv", "linear"])].accumulator_bits.max()
    return {"network": f"W{width}A{width}", "weights kB": ql.weight_bytes(q) / 1000, "BOPs, billions": frame.bops.sum() / 1e9,
            "peak activations kB": frame.live_bytes.max() / 1000, "widest accumulator of a layer": wide}

folded = ptq.prepare(network)[0]
size = sum(4 * p.numel() for p in folded.parameters()) / 1000
macs = report.macs.sum()
sizes = pd.DataFrame([{"network": "float32", "weights kB": size, "BOPs, billions": macs * 32 * 32 / 1e9}, *(costs(b) for b in (8, 4, 3, 2))])
sizes.round(2)

# %% [markdown]
# ## 6. Export
# The packed checkpoint holds every code at its own width; loading it rebuilds the graph from the float network and executes nothing from the
# file. It gives the same integers.

# %%
folder = tempfile.TemporaryDirectory()
packed_path = pathlib.Path(folder.name) / "packed.safetensors"
ql.save_quantized(qmodel, packed_path)
loaded = ql.to_integer(ql.load_quantized(packed_path, network))
again, codes = loaded.codes(batch), reference.codes(batch)
assert all(torch.equal(again[name], codes[name]) for name in codes), "the file holds all there is"
print(f"{packed_path.stat().st_size / 1000:.1f} kB as a file, {ql.weight_bytes(qmodel) / 1000:.1f} kB of it weights, scales and biases")


# %% [markdown]
# Size does not depend on what the weights are, so the original's network can be packed untrained. Files in MB, and how many times smaller:

# %%
def packed_sizes(name):
    net = ql.load_model(name)
    counted = ql.collect(net, [torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed))])
    configs = {f"{b} bits": ql.QuantConfig(b, b, observer="minmax", weight_observer="minmax") for b in (8, 4, 3, 2)}
    networks = {"float32": net} | {width: ql.quantize(net, counted, config) for width, config in configs.items()}
    return file_sizes(networks, folder.name).set_index("name").file_bytes / 1e6

packed = pd.DataFrame({name: packed_sizes(name) for name in ("resnet20", "resnet50")}).T
packed.join((1 / packed.div(packed.float32, axis=0)).drop(columns="float32").add_suffix(", times smaller")).round(2)

# %% [markdown]
# ONNX has QuantizeLinear and DequantizeLinear (QDQ) around float operators; ONNX Runtime turns them into integer kernels where it has some.
# *local* counts codes that differ where it is fed ours at every edge, graph optimisation off.

# %%
has_onnx = all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime"))
print("" if has_onnx else "onnx and onnxruntime are not installed: the comparison with ONNX Runtime is skipped (pip install onnx onnxruntime)")
rows = []
for w, q in qmodels.items() if has_onnx else ():
    path = ql.export_onnx(q, pathlib.Path(folder.name) / f"{w}.onnx", tuple(batch.shape[1:]))
    edges = onnx_runtime.compare_codes(q, path, batch)
    result = ql.evaluate(onnx_runtime.OnnxModel(path), images.test, limit=limit)
    equal = (result.predictions == measured[w, "single"].predictions).double().mean().item()
    rows.append({"network": w, "top-1, ONNX Runtime": result.top1, "top-1, integer": measured[w, "single"].top1, "agreement": 100 * equal, "n": result.n,
                 "local codes that differ": edges.local_differing.sum(), "of": edges.n.sum(), "by at most": edges.local_max_difference.max()})
folder.cleanup()
exported = pd.DataFrame(rows)
assert smoke or not len(exported) or (exported["top-1, ONNX Runtime"] - exported["top-1, integer"]).abs().max() <= 0.05, "the export is the network"
exported.round(2)

# %% [markdown]
# ## What we learned

# %%
for key, part in alone[alone.rounding == "single"].groupby("network", sort=False):
    print(f"- {key}, single rounding: {part.differing.sum():,} of {part['values'].sum():,} codes differ when every operation is fed the same codes, "
          f"by {part.max_difference.max()} at most, {part.from_tie.max():.1g} codes from a tie at most.")
for row in agreement.itertuples():
    print(f"- {row.network}, {row.rounding} rounding: the same top-1 answer as the simulation on {row.agreement:.2f} % of {row.n:,} test images "
          f"({row.in_float64:.2f} % in float64), {row.integer:.2f} % right.")
share = layers[layers.rounding == "double"].set_index("layer").share[worst]
print(f"- Double rounding alone changes up to {100 * share:.1f} % of the codes of a layer ({worst}, {low}).")
print(f"- No layer's accumulator needs more than {sizes['widest accumulator of a layer'].max():.0f} bits.")

# %% [markdown]
# Next: [13_report](13_report.ipynb), everything measured so far on one page.
