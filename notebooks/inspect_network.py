# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown] tags=["intro"]
# # inspect · A network of your own
#
# **Question.** What does quantization do to *your* network: what stays in float, which layer breaks
# first, and which range would be better?
#
# **Cost.** Half a minute for a small network; a few minutes for a ResNet-50 on 256 images of 224 x 224
# pixels, on two CPU cores.
#
# Name your network and your images in the parameters below. From the command line the same notebook
# becomes one HTML file: `python -m quantlab inspect my_module:build_model --data DIR --bits 4`

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
import html
import pathlib

import pandas as pd
import quantlab as ql
from IPython.display import Markdown
from quantlab import observers, plots
from quantlab.analysis.histograms import densities, observe_layers
from quantlab.analysis.sensitivity import edge_errors
from quantlab.graph import folded, operation_name
from quantlab.quantized import find_node
from quantlab.system.comparing import decibels

# %%
from quantlab.images.datasets import Calibration
from quantlab.images.files import SOURCES
from quantlab.images.folder import load_folder
from quantlab.system.machine import device
from quantlab.workbook.diagnosis import diagnose
from quantlab.workbook.inspection import check_folder, check_outputs, import_model
from quantlab.workbook.study import show

pd.set_option("display.max_rows", None)  # every layer and every edge is shown

# %% tags=["parameters"]
target = "quantlab.networks.architectures:ResNet20"  # MODULE:FUNCTION that builds it
weights = "checkpoint/resnet20-digits.safetensors"  # or a .pt, or "": as it is built
data = "digits"  # a folder of images, or auto, cifar10, digits, images
size = 224  # side in pixels that a folder's images are resized and cropped to
mean = "0.485 0.456 0.406"  # of a folder's images, three channels in 0..1: ImageNet's
std = "0.229 0.224 0.225"  # of the three channels
n = 256  # calibration images, and as many test images
bits = 4  # 2 to 8, of weights and activations
unlabelled = False  # True: the folders are no classes; accuracy is left out

# %% [markdown] tags=["intro"]
# ## Your network, your images
# A folder may hold `train/CLASS/*` and `test/CLASS/*` (or `val`), or `CLASS/*`, from which both parts
# are drawn, or images without classes. The network may be anything that `torch.fx` can trace and that
# returns logits `[B, classes]`. BatchNorm is folded; the rest of it is left as it is.

# %%
show(Markdown(f"# Quantization of {html.escape(target)}"))
if data in SOURCES:
    images = ql.load_data(data)
    calibration, test = ql.limited(images.train, n), ql.limited(images.test, n)
    classes = images.classes
else:
    check_folder(data)
    constants = [tuple(map(float, text.split())) for text in (mean, std)]
    calibration, test, classes = load_folder(data, size, *constants, n)
classes = () if unlabelled else classes
model = import_model(target, weights).to(device())
batches = Calibration(calibration, 32)
check_outputs(model, next(iter(batches))[:2].to(device()), classes)

# %%
stats = ql.collect(model, batches)
qmodel = ql.quantize(model, stats, ql.QuantConfig(weight_bits=bits, act_bits=bits))
layer_edges = observe_layers(model, batches)


def caption(n, text):
    more = f"W{bits}A{bits}; {text}"
    return plots.row_caption(pathlib.Path(data).name, target, n, more)


# %%
float_bytes = 4 * sum(p.numel() for p in model.parameters())
facts = {
    "layers": len(qmodel.layers), "values stored as codes": len(qmodel.plan.stores),
    "widths": f"W{bits}A{bits} in all layers; adds and the image 8 bits",
    "calibration images": f"{len(calibration):,} of {data}",
    "weights in float": f"{float_bytes / 1e6:.2f} MB",
    "weights, scales and biases": f"{ql.weight_bytes(qmodel) / 1e6:.2f} MB"}
if classes:
    exact, rounded = (ql.evaluate(network, test) for network in (model, qmodel))
    lost, low, high = ql.paired_drop(exact.correct, rounded.correct)
    facts["top-1 in float"] = f"{exact.top1:.2f} %, n = {exact.n:,}"
    facts["top-1 quantized"] = f"{rounded.top1:.2f} %, n = {exact.n:,}"
    facts["points lost"] = f"{lost:.2f}, 95 % interval {low:.2f} to {high:.2f}"
show(pd.Series(facts).to_frame(""))

# %% [markdown]
# ## 1. What is computed in float between two sets of codes
# These operations have no integer form here. Each reads values that were rounded to codes, computes in
# float, and its result is rounded again: on an integer machine they need a table or a float unit.

# %%
operations = {}
for name, why in qmodel.plan.floats.items():
    operation = operation_name(find_node(qmodel, name), qmodel)
    operations.setdefault((operation, why), []).append(name)
rows = [(*what, len(names), ", ".join(names)) for what, names in operations.items()]
floats = pd.DataFrame(rows, columns=["operation", "why", "times", "nodes"])
show(floats if rows else "Nothing: every operation has an integer form.")

# %% [markdown]
# ## 2. Which layer broke?
# The same images run through both networks, and at every value that is rounded the error is compared
# with the signal. Black is the error that has gathered up to there, blue the error of this rounding
# alone. Where the black line falls steeply, the network breaks: those edges are named. (It always falls
# at the first layer, as an image of 8 bits is nearly exact.)

# %%
seen = ql.limited(test, 64)
errors = edge_errors(model, qmodel, Calibration(seen, 32))
show(plots.edge_report(errors, caption(len(seen), "test images")))
show(errors.set_index("order").sort_values("added_db", ascending=False).round(2))


# %% [markdown]
# ## 3. Which range is best on which edge?
# Every observer chooses a range from the same histogram; what it keeps of the signal is computed from
# that histogram too. Zero marks the best range of an edge; a dark row is an edge on which the choice
# matters.

# %%
def kept(edge, low, high):
    """Signal to quantization noise in dB that a range leaves of an edge's values."""
    centers, counts = edge.histogram()
    signal = centers.square() @ counts.double() / edge.count
    return decibels(signal, observers.quantization_error(edge, [low], [high], bits))


rows = []
for name in qmodel.plan.stores:
    edge = stats.edges[name]
    ranges = {o: choose(edge, bits) for o, choose in observers.OBSERVERS.items()}
    rows.append({"edge": name} | {o: kept(edge, *r) for o, r in ranges.items()})
by_observer = pd.DataFrame(rows)

# %%
show(plots.observer_map(by_observer, caption(len(calibration), "calibration images")))
show(by_observer.round(2))

# %% [markdown]
# ## 4. The edge that adds most noise
# Its histogram on a logarithmic scale, and the range that every observer chose. Values beyond a range
# are clipped to its end; the wider the range, the larger the step for all others.

# %%
worst = errors.loc[errors.added_db.idxmax() if errors.added_db.notna().any() else 0]
name = worst.edge.removesuffix(f"_{bits}bit")  # a second rounding, for one reader
edge = stats.edges[worst.edge if worst.edge in stats.edges else name]
rows = [(o, *choose(edge, bits)) for o, choose in observers.OBSERVERS.items()]
ranges = pd.DataFrame(rows, columns=["observer", "low", "high"])
text = caption(len(calibration), "calibration images")
show(plots.clip_histogram(edge, ranges, text, f"Edge {worst.edge}", "activation"))

# %% [markdown]
# ## 5. Every layer's values
# From the input (top) to the logits (bottom) on one scale. Pale is what a ReLU takes away, coloured what
# is stored, the red bar the range that the squared-error search gives to it. A long thin tail costs
# codes; a layer of nearly only zeros needs few.

# %%
points = {key: edge for key, edge in layer_edges.items() if key[1] != "weight"}
stored = {layer: edge for (layer, _), edge in points.items()}  # after a ReLU if any
rows = [(name, *observers.histogram(edge, bits)) for name, edge in stored.items()]
ranges = pd.DataFrame(rows, columns=["layer", "low", "high"])
text = caption(len(calibration), "calibration images; square root of the density")
show(plots.ridges(densities(layer_edges), text, ranges))

# %% [markdown]
# ## 6. Weights
# What rounding keeps of every layer's weights, and how much its channels differ: with a range for each
# channel that does no harm, with one for the whole tensor a ratio of 4 costs most channels two bits.

# %%
graph, rows = folded(model), []
for name, layer in qmodel.layers.items():
    exact_layer = graph.get_submodule(find_node(graph, name).target)
    weight = exact_layer.weight.detach()
    error = (layer.weight.detach() - weight).double()
    sqnr = decibels(weight.double().square().sum(), error.square().sum())
    largest = weight.flatten(1).abs().amax(1)
    ratio = largest.max() / largest.median().clamp(min=1e-12)
    shape = "x".join(map(str, weight.shape))
    rows.append((name, shape, weight.numel(), ratio.item(), sqnr))
columns = ["layer", "shape", "weights", "largest channel / median", "sqnr"]
by_weight = pd.DataFrame(rows, columns=columns)
show(by_weight.round(2))

# %% [markdown]
# ## 7. Cause and remedy
# What looks wrong, in words and with its number, and every remedy **tried** on this network: decibels
# gained at the logits (mean over two batches of calibration images) and, where the folders are classes,
# points of accuracy. Remedies of one name are one network: they mend all such places at once.

# %%
labelled = ql.limited(test, n) if classes else None
remedies = diagnose(model, stats, [*batches][:2], qmodel.config, labelled)
with pd.option_context("display.max_colwidth", None):
    show(remedies.round(2) if len(remedies) else "Nothing looks wrong at this width.")

# %% [markdown]
# ## What we learned

# %%
if worst.added_db > 0:
    own = 10 ** ((worst.sqnr - worst.own_sqnr) / 10)  # of the noise at that edge
    cause = "its own rounding" if own > 0.5 else "what its layer reads and its weights"
    show(f"- {worst.edge} adds most noise, {worst.added_db:.1f} dB, "
         f"most of it by {cause}: give that more bits first.")
table = by_observer.set_index("edge")
gain = table.max(axis=1) - table.histogram
edge = gain.idxmax()
better = f"{table.loc[edge].idxmax()} gains {gain[edge]:.1f} dB on {edge}, the most"
better = better if gain[edge] > 0.05 else "no other range gains anything"
show(f"- Against histogram, {better}.")

# %%
weakest = by_weight.loc[by_weight.sqnr.idxmin()]
show(f"- The weights of {weakest.layer} keep least: {weakest.sqnr:.1f} dB.")
names = dict.fromkeys(what for what, _ in operations)
show(f"- Computed in float: {', '.join(names) or 'nothing'}.")
if len(remedies):
    best = remedies.iloc[0]
    show(f"- Worth most: {best.remedy}, {best.gain_db:+.1f} dB at the logits; "
         f"{best['where']}: {best.fault}, {best.evidence}.")

# %% [markdown] tags=["intro"]
# What to do about it: `QuantConfig(layer_weight_bits=…, layer_act_bits=…, observer=…)` takes these
# findings at once; [04](04_observers.ipynb) compares the ranges, [06](06_learned_rounding.ipynb) learns
# the rounding.
