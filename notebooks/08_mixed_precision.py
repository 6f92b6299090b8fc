# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 08 · Mixed precision and conventions
#
# <!-- findings:opening -->
# **Found** (resnet20, cifar10-jpeg, 10,000 test images; weights of 2^b levels; means over calibration
# seeds, paired 95 % intervals). A width for every layer loses 1.56 points in 111 kB of weights, 3 bits
# everywhere 2.66 (activations 8 bits). Conventions alone move W4A4 and W3A3, in points: first and last
# layer 8 bits, residual stream float +0.72 and +0.77, residual stream and image as few bits -1.23 and
# -8.45. W2A2 by QDrop + augmented fine-tuning, learned under each convention, loses 5.06 points in ours
# (5 seeds) and 4.58 in that of most papers (1).
# <!-- /findings -->
#
# **Question.** Which layer needs its bits, what do widths of their own for every layer bring, and why do
# papers disagree about the same width?
#
# **Seen.** [What a full run showed](../results/pages/08_mixed_precision-resnet20-cifar10-jpeg.md), without running it.
#
# **Cost.** Half a minute on the digits. The full preset takes about twenty minutes on two CPU cores, and
# an hour more for the networks that are compared with other tools (`compare_tools`), unless they are
# measured already. Every row is recorded when it is measured and not measured again.

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
import itertools

import numpy as np
import pandas as pd
import quantlab as ql
import torch
from torch.nn import functional as F
from tqdm.auto import tqdm

# %%
from quantlab import ptq
from quantlab.analysis import mixed
from quantlab.analysis.search import search
from quantlab.graph import folded
from quantlab.plan import make_plan
from quantlab.plots import lowbit
from quantlab.quantized import find_node
from quantlab.workbook.methods import Methods, config_of, name_of
from quantlab.workbook.rivals import brevitas_losses
from quantlab.workbook.study import Study, show

# %% tags=["parameters"]
data = "auto"  # auto, cifar10, digits, images, or the path of a folder or archive
model = "resnet20"  # resnet20 or resnet50
checkpoint = "auto"  # auto, or the path of a .safetensors file
seed = 0
preset = "auto"  # smoke, full, or auto: smoke on the digits
weight_symmetric = False  # True: weights of 2^b - 1 levels; False: of all 2^b
pareto_method = "nearest"  # a method of 07, in section 2
convention_method = "nearest"  # a method of 07, in section 3
widths = "auto"  # of section 3; auto: 3/3 in a smoke run, 4/4,3/3 in a full one
best_method = "QDrop + augmented fine-tuning"  # in section 4
compare_tools = True  # measure it for section 4; False: take the rows that there are
iterations = 0  # of learning a unit; 0: 3 in a smoke run, 500 in a full one
n_calibration = 0  # 0: 64 in a smoke run, 1,024 in a full one
n_sensitivity = 0  # images of section 1; 0: 32 in a smoke run, 512 in a full one
n_seeds = 0  # of section 4; 0: one in a smoke run, three in a full one

# %%
study = Study(
    data, model, checkpoint, preset,
    n_calibration=n_calibration, seed=seed, notebook="08_mixed_precision",
)
if study.smoke and not n_calibration:
    study.n_calibration = min(study.n_calibration, 64)
n_sensitivity = study.choose(n_sensitivity, smoke=32, full=512)
n_seeds = study.choose(n_seeds, smoke=1, full=3)
builder = Methods(study, iterations)
builder.check([pareto_method, convention_method, best_method])
network, images = study.network, study.images
convention = {"weight_symmetric": weight_symmetric}
levels = "2^b - 1" if weight_symmetric else "2^b"  # of a weight of b bits
eight = ql.QuantConfig(8, 8, **convention)

# %% [markdown]
# ## 1. Which layer needs its bits?
# One layer's weights, or what one layer reads, is rounded and nothing else. Its *sensitivity* is the
# divergence of the class probabilities from the float network's (ZeroQ, arXiv:2001.00281), on training
# images:
#
# $$\mathrm{KL}(p\,\Vert\,\hat p) = \sum_k p_k\,(\log p_k - \log \hat p_k)$$

# %%
options = (8, 4, 3, 2) if study.smoke else mixed.WIDTHS
pictures = study.calibration(seed + 100, n_sensitivity)
sensitivity = mixed.layer_errors(
    network, study.stats, pictures, options, eight, verbose=True)
costs = mixed.layer_costs(network, next(iter(pictures)), eight)
show(sensitivity.sort_values("error", ascending=False).head(6).round(4))

# %% [markdown]
# By hand, for the weights of the layer that suffers most at two bits:

# %%
weights = sensitivity[(sensitivity.kind == "weight") & (sensitivity.bits == 2)]
worst = weights.loc[weights.error.idxmax()]
exact, rounded = folded(network.cpu()), folded(network.cpu())
layer = rounded.get_submodule(find_node(rounded, worst.layer).target)
with torch.inference_mode():
    q = ptq.choose_weight_qparams(layer.weight, 2, eight)
    layer.weight.copy_(ql.fake_quantize(layer.weight, q))
    total = 0.0
    for batch in pictures:
        log_p, log_q = (F.log_softmax(net(batch), 1) for net in (exact, rounded))
        total += (log_p.exp() * (log_p - log_q)).sum().item()
kl = total / n_sensitivity
print(f"{worst.layer}, weights at 2 bits: {kl:.4f} nats")
assert abs(kl - worst.error) < 1e-2 * worst.error + 1e-5, "layer_errors gives the same"

# %% [markdown]
# In the map, the green frames are the widths that section 2 chooses for the bit operations of W4A4: for
# each layer, multiply-accumulates times bits of a weight times bits of an activation.

# %%
plan = make_plan(exact)
by_size = mixed.weight_options(sensitivity, costs)
by_operations = mixed.operation_options(sensitivity, costs)
reads_image = costs.layer.isin(plan.first)

def uniform_operations(weight_bits, act_bits):
    acts = np.where(reads_image, 8, act_bits)  # the image has 8 bits
    return int((costs.macs * weight_bits * acts).sum())

chosen = mixed.allocate(by_operations, uniform_operations(4, 4))
text = "training images; darker is worse; green: smallest total error within the bit "
text = study.caption(n_sensitivity, text + "operations of W4A4")
figure = lowbit.sensitivity_map(sensitivity, text, chosen)
study.save(figure, "08_sensitivity_map")

# %% [markdown]
# The same question asked of the accuracy, on held-out images: what is lost when only one layer is
# quantized, and how much of the whole network's loss comes back when only that one stays float. (An
# interval that holds zero: these images cannot tell.)

# %%
some = ptq.layers(exact)[:: 6 if study.smoke else 1]
limit = min(len(images.heldout), 100 if study.smoke else 2000)
accuracy = mixed.layer_accuracy(
    network, study.stats, images.heldout, config_of("3/3", **convention), some,
    limit=limit, verbose=True,
)
text = "held-out images, W3A3, residual stream 8 bits"
text += ", every sixth layer" if study.smoke else ""
text = study.caption(limit, text + "; paired 95 % intervals")
study.save(lowbit.layer_accuracy(accuracy, text), "08_layer_accuracy")

# %% [markdown]
# ## 2. Mixed precision
# Choose a width for every layer such that the sensitivities add up to the least within a budget: bytes of
# the weights, or bit operations, where weights and activations get widths of their own. With $x_{ij} = 1$
# where layer $i$ gets its option $j$,
#
# $$\min_x \sum_{ij} e_{ij} x_{ij} \quad\text{with}\quad \sum_{ij} c_{ij} x_{ij} \le B, \qquad \sum_j x_{ij} = 1,$$
#
# an integer linear program, which `scipy.optimize.milp` solves exactly. For five layers, trying
# everything finds the same:

# %%
few = by_size[by_size.layer.isin(costs.layer[:5])]
budget = int(few.groupby("layer").cost.mean().sum())

def total(choice):
    """(error, cost) of one option for every layer."""
    return sum(c.error for c in choice), sum(c.cost for c in choice)

each_layer = [list(part.itertuples()) for _, part in few.groupby("layer")]
totals = (total(choice) for choice in itertools.product(*each_layer))
smallest = min(error for error, cost in totals if cost <= budget)
found = mixed.allocate(few, budget)
assert found.cost.sum() <= budget and abs(found.error.sum() - smallest) < 1e-9
show(found)


# %% [markdown]
# That errors add up is an assumption; the accuracies are measured.

# %%
def point(axis, kind, config, cost=0, label="", **columns):
    row = builder.measure(pareto_method, config, **columns)
    numbers = {"cost": cost or row["bytes"], "top1": row["top1"]}
    return {"axis": axis, "kind": kind, "label": label, **numbers}

def uniform_size(bits):
    """Bytes of weights at `bits`, between those at 2 and at 8."""
    low, high = (by_size[by_size.weight_bits == b].cost.sum() for b in (2, 8))
    return int(low + (high - low) * (bits - 2) / 6)

def mixed_note(budget):
    """What the row's column `corrections` says."""
    name = builder.note(pareto_method)
    return f"mixed precision, {budget}" + (f", {name}" if name else "")


# %%
def mixed_size(bits):
    budget = uniform_size(bits)
    config = mixed.mixed_config(eight, mixed.allocate(by_size, budget))
    note = mixed_note(f"{budget / 1e3:.0f} kB")
    return point("size", "mixed", config, weight_bits=None, corrections=note)

def mixed_operations(bits):
    budget = uniform_operations(bits, bits)
    chosen = mixed.allocate(by_operations, budget)
    config = mixed.mixed_config(eight, chosen)
    note = mixed_note(f"{budget / 1e9:.2f}e9 bit operations")
    columns = dict(weight_bits=None, act_bits=None, corrections=note)
    return point("operations", "mixed", config, int(chosen.cost.sum()), **columns)


# %%
points = []
for b in tqdm((2, 3, 4, 8) if study.smoke else range(2, 9), desc="uniform"):
    wide, same = (config_of(f"{b}/{a}", **convention) for a in (8, b))
    points.append(point("size", "uniform", wide, label=f"W{b}"))
    cost, name = uniform_operations(b, b), f"W{b}A{b}"
    points.append(point("operations", "uniform", same, cost, name))
for b in tqdm((2.5, 3) if study.smoke else (2.25, 2.5, 3, 3.5, 4, 5, 6), desc="mixed"):
    points += [mixed_size(b), mixed_operations(b)]
points = pd.DataFrame(points).assign(fp32_top1=study.baseline.top1)

# %%
named = builder.note(pareto_method) or "nearest rounding"
text = f"test images, {named}, weights of {levels} levels, "
text += f"{study.n_calibration:,} calibration images, seed {seed}"
text = study.caption(len(study.test), text)
study.save(lowbit.pareto(points, text), "08_pareto")

# %% [markdown]
# **The other way round**: not what loses least within a budget, but what is cheapest and loses at most so
# much. `search` bisects the budget; the sensitivities say what to try, held-out images what it loses. As a
# command, for any network, with learned rounding and resumable:
# `python -m quantlab search resnet20 --lose 1.0 --cost bitops --learned --data PATH`.

# %%
some_widths = (8, 3) if study.smoke else options
found = search(
    network, study.stats, pictures, images.heldout, lose=2.0, widths=some_widths,
    configs={f"{levels} levels": eight}, limit=limit,
)
assert found.lost <= 2
print(found.reasons)


# %% [markdown]
# ## 3. Why papers disagree
# "W4A4" leaves open what the first and last layer get, what the residual stream carries, whether the
# image is rounded, how many values a weight may take, and whether BatchNorm may look at the data again.
# The same network, range setter and method under each convention; every bar but the last two changes one
# thing against ours (all layers alike, all $2^b$ levels of a weight, residual stream and image 8 bits).

# %%
def conventions(act_bits):
    """Name of the convention -> what it changes in the config."""
    return {
        "first and last layer 8 bits": dict(first_last_bits=8),
        "residual stream float": dict(residual_bits=None),
        "residual stream low bits": dict(residual_bits=act_bits),
        "weights of 2^b - 1 levels": dict(weight_symmetric=True),
        "image float": dict(input_bits=None),
        "image low bits": dict(input_bits=act_bits),
        "BatchNorm re-estimation": {},
        "most papers: first/last 8,\nresidual stream float":
            dict(first_last_bits=8, residual_bits=None),
        "strictest: residual stream\nand image low bits":
            dict(residual_bits=act_bits, input_bits=act_bits),
    }


# %%
def compare(width, name, change):
    method = convention_method
    if name == "BatchNorm re-estimation":  # a step of its own
        again = "" if method == "nearest" else f"{method} + "
        method = again + name
    base = builder.measure(convention_method, config_of(width, **convention))
    row = builder.measure(method, config_of(width, **convention | change))
    gains = ql.paired_drop(builder.correct_images(row), builder.correct_images(base))
    gain = dict(zip(("gain", "gain_low", "gain_high"), gains))
    named = {"width": name_of(width), "convention": name}
    return {**named, "top1": row["top1"], **gain}


# %%
compared = []
for width in study.choose(widths, smoke="3/3", full="4/4,3/3").split(","):
    changes = conventions(config_of(width).act_bits)
    bar = tqdm(changes.items(), desc=name_of(width))
    compared += [compare(width, name, change) for name, change in bar]
compared = pd.DataFrame(compared)

# %%
named = builder.note(convention_method) or "nearest rounding"
text = f"test images, {named}, {study.n_calibration:,} calibration images, "
text += f"seed {seed}; paired 95 % intervals"
text = study.caption(len(study.test), text)
study.save(lowbit.conventions(compared, text), "08_conventions")

# %%
table = compared.replace("\n", " ", regex=True)
table = table.pivot_table(["top1", "gain"], "convention", "width", sort=False)
show(table.round(2))

# %% [markdown]
# ## 4. Under their convention
# What QDrop's and BRECQ's public code lost on another ResNet-20 of cifar10-jpeg (86.20 % in float; one
# seed, 512 to 1,024 images, 500 to 1,000 iterations; run once with the authors' code, by no command of
# this workbook), with first and last layer at 8 bits, a float residual stream and all $2^b$ levels of a
# weight, beside ours under the same convention: mean points
# lost and mean paired interval over the seeds. Brevitas' columns are of this very network, with the same
# calibration and test images (`make rivals DATA=PATH` measures them: its ImageNet example's layerwise
# target, weights symmetric per channel, activations of least squared error, bias correction).

# %%
TOOLS = pd.DataFrame({
    "QDrop's code": {"4/4": 0.54, "3/3": 1.73, "2/4": 3.48, "2/2": 11.98},
    "BRECQ's code": {"4/4": 0.38, "3/3": 2.37},
})
theirs = dict(first_last_bits=8, residual_bits=None, **convention)
measured = list(TOOLS.index)[-1 if study.smoke else 0:] if compare_tools else []
seeds = range(seed, seed + n_seeds)
for s, width in tqdm(list(itertools.product(seeds, measured)), desc="networks"):
    builder.measure(best_method, config_of(width, **theirs), s)

# %%
ours = builder.known(TOOLS.index, **theirs)
if len(ours):
    groups = ours.groupby(["width", "name"], sort=False)
    means = groups[["drop", "drop_low", "drop_high"]].mean()
    table = means.assign(seeds=groups.size()).join(TOOLS, on="width")
    table = table.join(brevitas_losses(builder.rows()), on="width")
    present = [width for width in TOOLS.index if width in ours.width.values]
    show(table.reindex(present, level="width").round(2))

# %% [markdown]
# ## What we learned

# %%
for axis, part in points.groupby("axis", sort=False):
    uniform = part[part.kind == "uniform"]
    gain = [
        row.top1 - uniform[uniform.cost <= 1.001 * row.cost].top1.max()
        for row in part[part.kind == "mixed"].itertuples()
    ]
    print(
        f"- Mixed precision by {axis}: {np.nanmin(gain):+.2f} to "
        f"{np.nanmax(gain):+.2f} points against the best uniform width that costs no "
        "more."
    )
for width, part in compared.replace("\n", " ", regex=True).groupby("width", sort=False):
    best, worst = part.loc[part.gain.idxmax()], part.loc[part.gain.idxmin()]
    print(f"- {width}, {convention_method}: by convention alone from {worst.gain:+.2f}")
    print(f"  ({worst.convention}) to {best.gain:+.2f} points ({best.convention}).")

# %% [markdown]
# <!-- findings:closing -->
# **Published.** Points gained against our convention with weights of 2^b levels, nearest rounding, seed 0 (resnet20, cifar10-jpeg, 10,000 test images):
#
# | Convention | W4A4 | W3A3 |
# | --- | ---: | ---: |
# | 2^b - 1 levels | -0.47 | -7.27 |
# | first and last layer 8 bits | +0.38 | +0.39 |
# | residual stream float | +0.18 | +0.11 |
# | residual stream as few bits | -0.86 | -6.41 |
# | image float | +0.22 | +0.20 |
# | image as few bits | -0.39 | -2.61 |
# | first and last layer 8 bits, residual stream float | +0.72 | +0.77 |
# | residual stream and image as few bits | -1.23 | -8.45 |
# | BatchNorm re-estimation | -3.73 | -1.92 |
# <!-- /findings -->
#
# Next: [09_integer_only](09_integer_only.ipynb), the same network in integers alone.
