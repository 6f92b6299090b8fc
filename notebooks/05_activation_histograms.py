# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 05 · Activation histograms: what has to fit into a range
#
# **Question.** What do the values of every layer look like, before and after the ReLU, and what does
# their shape cost at low bits?
#
# **Seen.** [What a full run showed](../results/pages/05_activation_histograms-resnet20-cifar10-jpeg.md), without running it.
#
# **Cost.** Half a minute on the digits; with 1,024 calibration images a few minutes on two CPU cores. No
# test image is looked at.

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
import pandas as pd
import quantlab as ql
import torch
from quantlab import observers, plots
from quantlab.calibration import collect_edges, watch
from quantlab.edgestats import EdgeStats
from quantlab.graph import find_kinds, folded
from quantlab.system.comparing import decibels
from quantlab.workbook.study import Study, show
from scipy import stats as statistics

# %% tags=["parameters"]
data = "auto"  # auto, cifar10, digits, images, or the path of a folder or archive
model = "resnet20"  # resnet20 or resnet50
checkpoint = "auto"  # auto, or the path of a .safetensors file
seed = 0
preset = "auto"  # smoke, full, or auto: smoke on the digits
bits = 4  # 2 to 8, of the ranges drawn and of the costs in sections 4 and 5
n_calibration = 0  # 0: 256 in a smoke run, 1,024 in a full one
# images of section 4, with 20 ranges a channel; 0: 32 in a smoke run, 128 in a full one
n_costs = 0
n_panels = 20  # layers in section 2, evenly chosen where there are more
solutions = False  # True: the exercises' solutions are run

# %%
study = Study(
    data, model, checkpoint, preset,
    n_calibration=n_calibration, seed=seed, notebook="05_activation_histograms",
)
network, n_calibration = study.network, study.n_calibration
n_costs = min(study.choose(n_costs, smoke=32, full=128), n_calibration)

# %% [markdown]
# The layers are found from the graph, BatchNorm folded: every convolution and linear layer, and whatever
# else a ReLU reads, such as the sum of a residual block. Of each we want the values *before* its ReLU and
# those *after* it.

# %%
graph = folded(network)
kinds = find_kinds(graph)
# of several, the first
clamps = [node for node in reversed(kinds) if kinds[node] == "clamp"]
relus = {clamp.args[0].name: clamp.name for clamp in clamps}
layers = [n.name for n in kinds if kinds[n] == "compute" or n.name in relus]
compute = [node for node in kinds if kinds[node] == "compute"]
modules = {node.name: graph.get_submodule(node.target) for node in compute}
weights = {name: module.weight.detach() for name, module in modules.items()}
# the node whose value is stored
stored = {layer: relus.get(layer, layer) for layer in layers}
print(f"{len(layers)} layers, {len(relus)} of them with a ReLU")

# %% [markdown]
# One pass counts them all. `EdgeStats` is an exact histogram: its bins are powers of two wide and merge
# when the range grows. `ql.collect` sees stored values only; on those both must agree in every bin.

# %%
names = [*layers, *relus.values()]
found, _ = collect_edges(graph, names, study.calibration(), verbose=True)
edges = {}
for layer in layers:
    if layer in weights:
        edges[layer, "weight"] = EdgeStats().update(weights[layer])
    edges[layer, "before"] = found[layer]
    if layer in relus:
        edges[layer, "after"] = found[relus[layer]]

# %%
collected = study.stats.edges
shared = [layer for layer, relu in relus.items() if relu in collected]
pairs = [(edges[layer, "after"], collected[relus[layer]]) for layer in shared]
# None is None: behind a ReLU that passes nothing
assert pairs and all(a.bins is b.bins or a.bins.equal(b.bins) for a, b in pairs)
print(f"{len(shared)} histograms agree with collect's in every bin")


# %% [markdown]
# ## 1. Every layer
# From the input (top) to the logits (bottom), all on one scale in real units. Pale is what the ReLU takes
# away, coloured what it lets through: the codes are for that part only. The red bar is the range that the
# squared-error search gives to it.

# %%
def density(stats, bins=160):
    """Middle and density of bins, neighbours added until about `bins` remain."""
    counts = stats.histogram()[1]
    if not len(counts):
        return [0.0], [0.0]  # a dead layer: nothing but zeros
    size = max(1, len(counts) // bins)
    # aligned: zero is an edge
    group = (stats.first + torch.arange(len(counts))) // size
    group = group - group[0]
    total = torch.zeros(int(group[-1]) + 1, dtype=torch.float64)
    total.index_add_(0, group, counts.double())
    x = (torch.arange(len(total)) + stats.first // size + 0.5) * size * stats.width
    return x, total / (size * stats.width * stats.count)


# %%
def density_rows(layer, point, bins):
    stats = edges[layer, point]
    x, y = density(stats, bins)
    zeros = stats.zeros / stats.count
    row = {"order": layers.index(layer), "layer": layer, "point": point}
    return pd.DataFrame({**row, "x": x, "density": y, "zeros": zeros})


# %%
densities = pd.concat([density_rows(*key, 160) for key in edges], ignore_index=True)
as_stored = {layer: found[stored[layer]] for layer in layers}
ranges = [(layer, *observers.histogram(e, bits)) for layer, e in as_stored.items()]
ranges = pd.DataFrame(ranges, columns=["layer", "low", "high"])
about = f"calibration images; {bits}-bit clip ranges"
text = study.caption(n_calibration, f"{about}; heights: square root")
study.save(plots.ridges(densities, text, ranges), "05_ridges")

# %% [markdown]
# ## 2. Before and after
# The same histograms one by one, on a logarithmic scale, where the tail can be seen. No code stands for
# values beyond the dashed lines; what lies there is clipped. Zeros are counted apart and not drawn.

# %%
behind = ranges[ranges.layer.isin(relus)]
every = max(1, -(-len(behind) // n_panels))
text = study.caption(n_calibration, f"{about}; non-zero values")
figure = plots.layer_histograms(densities, behind.iloc[::every], text)
study.save(figure, "05_before_after")


# %% [markdown]
# ## 3. Tails
# Left: the fraction of values before the ReLU that lie far from their layer's mean, against a normal
# distribution with the same deviation. Right: how much of a min-max range of what is stored serves one
# value in 10,000. A ratio of 2 is a bit that nearly nobody uses.

# %%
def outliers(stats, sigmas=()):
    """Deviation, largest value over the 99.99 % quantile, fractions beyond k std."""
    centers, counts = stats.histogram()
    values = torch.cat([centers, torch.zeros(1, dtype=torch.float64)])
    share = torch.cat([counts, torch.tensor([stats.zeros])]).double() / stats.count
    mean = values @ share
    std = ((values - mean).square() @ share).sqrt()
    size, order = values.abs().sort()
    at = torch.searchsorted(share[order].cumsum(0), 0.9999).clamp(max=len(size) - 1)
    quantile = float(size[at]) or float("nan")  # 0 where nearly all values are
    ratio = max(max(-stats.minimum, stats.maximum) / quantile, 1.0)
    distance = (values - mean).abs()
    beyond = {f"beyond_{k}": float(share[distance > k * std].sum()) for k in sigmas}
    return {"std": float(std), "max_over_p": ratio, **beyond}


# %%
sigmas = (3, 4, 6)
tail = pd.DataFrame([outliers(edges[layer, "before"], sigmas) for layer in layers])
largest = [outliers(stats)["max_over_p"] for stats in as_stored.values()]
tail = tail.assign(max_over_p=largest, layer=layers, order=range(len(layers)))
normal = {k: 2 * statistics.norm.sf(k) for k in sigmas}
text = "calibration images; left: before the ReLU, right: as stored"
text = study.caption(n_calibration, text)
study.save(plots.tails(tail, text, normal), "05_tails")

# %% [markdown]
# ## 4. Channels
# One range serves all channels of an activation. A channel whose largest value is a quarter of the
# layer's has a quarter of the codes, two bits fewer. *Dead* channels are zero on every calibration image.

# %%
low, high = {}, {}  # of every channel of every stored value
layer_of = {node: layer for layer, node in stored.items()}

def extremes(node, value):
    layer = layer_of[node]
    bottom, top = value.transpose(0, 1).flatten(1).aminmax(dim=1)
    low[layer] = torch.minimum(low.get(layer, bottom), bottom)
    high[layer] = torch.maximum(high.get(layer, top), top)

n_seen = watch(graph, layer_of, extremes, study.calibration())

# %%
size = {layer: torch.maximum(-low[layer], high[layer]).cpu() for layer in layers}
channels = pd.concat([
    pd.DataFrame({
        "order": i, "layer": layer, "channel": range(len(size[layer])),
        "share": (size[layer] / size[layer].max().clamp(min=1e-30)).numpy(),
    })
    for i, layer in enumerate(layers)
], ignore_index=True)

# %%
behind_relu = channels[channels.layer.isin(relus)]
dead = behind_relu[behind_relu.share == 0].groupby("layer", sort=False).channel
names = {"count": "dead channels", "list": "which"}
dead = dead.agg(["count", list]).rename(columns=names)
show(dead if len(dead) else "no dead channel")


# %% [markdown]
# What a range for each channel would gain is measured, not estimated: both sides take the best of the
# same 20 fractions of their extremes. (Integer convolutions cannot use it, unless depthwise, because they
# add over the channels of their input; equalisation moves some of it into the weights.)

# %%
def squared_errors(x, low, high):
    """Of x [C, values]: every range's error, by tensor and by channel; the signal."""
    errors = {"tensor": [], "channel": []}
    for fraction in torch.arange(1, 21) / 20:
        for key, a, b in (("tensor", low.min(), high.max()), ("channel", low, high)):
            axis = 0 if key == "channel" else None
            q = ql.choose_qparams(a * fraction, b * fraction, bits, axis=axis)
            error = (ql.fake_quantize(x, q.to(x.device)) - x).square()
            error = error.sum(1, dtype=torch.float64)
            errors[key].append(error.cpu())
    signal = x.double().square().sum(1).cpu()
    return torch.stack([*errors["tensor"], *errors["channel"], signal])


# %%
sums = {}

def measure(node, value):
    layer = layer_of[node]
    x = value.transpose(0, 1).flatten(1)
    lost = squared_errors(x, low[layer].cpu(), high[layer].cpu())
    sums[layer, "activations"] = sums.get((layer, "activations"), 0) + lost

watch(graph, layer_of, measure, study.calibration(n=n_costs))
for layer, weight in weights.items():
    x = weight.flatten(1)
    bottom, top = (v.cpu() for v in x.aminmax(dim=1))
    sums[layer, "weights"] = squared_errors(x, bottom, top)

# %%
rows = []
for (layer, what), total in sums.items():
    tensor, channel = total[:20].sum(1).min(), total[20:40].amin(0).sum()
    signal = total[-1].sum()
    row = {"order": layers.index(layer), "layer": layer, "what": what}
    row["tensor_db"] = decibels(signal, tensor.clamp(min=1e-300))
    row["channel_db"] = decibels(signal, channel.clamp(min=1e-300))
    rows.append(row)
costs = pd.DataFrame(rows)
costs = costs.assign(gain_db=costs.channel_db - costs.tensor_db)
costs = costs.assign(gain_bits=costs.gain_db / decibels(4, 1))  # a bit halves the step
assert (costs.gain_db > -0.01).all(), "more ranges never cost"

# %%
activations = costs[costs.what == "activations"]
text = f"calibration images (costs: {n_costs:,}); values as stored"
text = study.caption(n_calibration, text)
figure = plots.channel_spread(channels, activations, text, bits)
study.save(figure, "05_channels")
show(activations.nlargest(6, "gain_db").drop(columns=["order", "what"]).round(2))

# %% [markdown]
# ## 5. Weights beside activations
# Both in standard deviations, the scale on which a range costs: the wider it is, the fewer codes lie
# where the values are. Of activations, what the layer computes, before a ReLU. The red ticks are the
# extremes.

# %%
shown = [key for key in edges if key[0] in weights]
parts = []
for key in shown:
    coarse = density_rows(*key, 80)
    parts.append(coarse.assign(z=coarse.x / outliers(edges[key])["std"]))
both = pd.concat(parts, ignore_index=True)
text = "calibration images; BatchNorm folded; heights: square root"
figure = plots.weights_beside_activations(both, study.caption(n_calibration, text))
study.save(figure, "05_weights_activations")

# %%
columns = ["tensor_db", "channel_db", "gain_db", "gain_bits"]
table = costs.groupby("what")[columns].median()
show(table.rename_axis(f"median over layers, {bits} bits").round(2))

# %% [markdown]
# ## What we learned

# %%
zeros = pd.Series([edges[la, "after"].zeros / edges[la, "after"].count for la in relus])
print(f"- A ReLU leaves {zeros.median():.0%} zeros in the median layer, ", end="")
print(f"{zeros.min():.0%} to {zeros.max():.0%}.")
print(
    f"- Beyond 4 sigma lie up to {tail.beyond_4.max():.2%} of a layer's "
    "values; ", end=""
)
print(f"{normal[4]:.4%} of a normal distribution.")
heavy = tail.loc[tail.max_over_p.idxmax()]
print(
    f"- {heavy.layer}'s largest value is {heavy.max_over_p:.1f} times its 99.99 % "
    "quantile."
)

# %%
print(f"- {dead['dead channels'].sum():.0f} of {len(behind_relu):,} channels are dead.")
gains = table.gain_db
worst = activations.loc[activations.gain_db.idxmax()]
print(
    f"- One range for all channels costs {gains['activations']:.1f} dB at "
    f"{bits} bits in the median layer, ", end=""
)
print(
    f"most in {worst.layer}: {worst.gain_db:.1f} dB. For weights: "
    f"{gains['weights']:.1f} dB."
)

# %% [markdown]
# ## Exercises
# Write each function in place of its `...`, run its cell, then the one with the check, which says what is
# wrong. The solution is folded between the two; with `solutions = True` at the top all of them run.
#
# **1. Signal to noise.** Return $10 \log_{10} \big(\sum x^2 / \sum (\hat x - x)^2\big)$ in decibels, one number
# for a tensor of any shape; infinite where nothing is lost.

# %%
import copy
import math

from quantlab.workbook.exercises import check


# %% tags=["exercise"]
def sqnr(x, x_hat):
    """A float, in dB; x, x_hat: float32 of the same shape."""
    ...


# %% tags=["solution"] jupyter={"source_hidden": true}
if solutions:
    def sqnr(x, x_hat):
        signal, noise = x.square().sum(), (x_hat - x).square().sum()
        return 10 * torch.log10(signal / noise).item()


# %% tags=["check"]
def with_noise(x, x_hat):
    """A case: ql's decibels of sums in Python's floats."""
    pairs = list(zip(x.flatten().tolist(), x_hat.flatten().tolist()))
    signal = math.fsum(a * a for a, _ in pairs)
    return (x, x_hat), decibels(signal, math.fsum((b - a) ** 2 for a, b in pairs))

x = torch.tensor([[6.0, 8.0], [0.0, 0.0]])
x_hat = torch.tensor([[6.0, 9.0], [0.0, 0.0]])
check(
    sqnr,
    ((x, x_hat), 20.0, "Signal 100, noise 1: a hundredfold power is 20 dB."),
    (*with_noise(x, x + 0.5), "Four errors of 0.5: a noise of 1, not 0.25."),
    (*with_noise(x[0], x_hat[0] - 9), "Sums of squares; no mean is taken off."),
    ((x, x), math.inf, "Nothing is lost: the ratio has no bound."),
)


# %% [markdown]
# **2. What zero swallows.** Weights and activations crowd around zero. Of the values that are *not* zero, which
# fraction gets zero's code at a given scale (ties to even)?

# %% tags=["exercise"]
def swallowed(x, scale):
    """A float from 0 to 1, 0 where x holds nothing but zeros; x: float32."""
    ...


# %% tags=["solution"] jupyter={"source_hidden": true}
if solutions:
    def swallowed(x, scale):
        values = x[x != 0]
        gone = (torch.round(values * (1 / scale)) == 0).sum().item()
        return gone / max(len(values), 1)


# %% tags=["check"]
def by_torch(x, scale):
    """A case: torch's kernel and ql's codes, zero-point 8 of 16."""
    kernel = torch.fake_quantize_per_tensor_affine(x, scale, 8, 0, 15)
    q = ql.QParams(torch.tensor(scale), torch.tensor(8, dtype=torch.int32), 0, 15)
    assert torch.equal(kernel == 0, ql.quantize_tensor(x, q) == 8)
    gone, values = ((kernel == 0) & (x != 0)).sum().item(), (x != 0).sum().item()
    return (x, scale), gone / max(values, 1)


# %% tags=["check"]
normal = torch.randn(1000, generator=torch.Generator().manual_seed(0))
check(
    swallowed,
    ((torch.tensor([0.1, -0.2, 0.6, -3.0]), 1.0), 0.5, "0.1 and -0.2 of four."),
    (*by_torch(normal.relu(), 0.5), "Zeros are not swallowed: leave them out."),
    ((torch.tensor([0.5, -0.5, 1.5]), 1.0), 2 / 3, "0.5 is a tie: to the even 0."),
    (*by_torch(torch.zeros(3), 1.0), "Nothing but zeros: 0, no division by zero."),
)


# %% [markdown]
# **3. A histogram behind BatchNorm.** In evaluation a channel's values $x$ become
# $\gamma\,(x - \mu) / \sqrt{\sigma^2 + \epsilon} + \beta$: its histogram is moved and stretched, and no value
# leaves its bin. That is what folding does to a range. Given the middles of the bins in front and their
# counts, return those behind, the middles ascending as before. Which signs may $\gamma$ have?

# %% tags=["exercise"]
def behind_batchnorm(middles, counts, bn, channel):
    """float64 [2, N]: middles and counts; middles ascending, counts: float64 [N]."""
    ...


# %% tags=["solution"] jupyter={"source_hidden": true}
if solutions:
    def behind_batchnorm(middles, counts, bn, channel):
        scale = bn.weight[channel] / (bn.running_var[channel] + bn.eps).sqrt()
        moved = (middles - bn.running_mean[channel]) * scale + bn.bias[channel]
        behind = torch.stack([moved, counts]).detach()
        return behind.flip(1) if scale < 0 else behind

# %% tags=["check"]
bn = torch.nn.BatchNorm2d(3, eps=0.01).double().eval()
with torch.no_grad():
    bn.weight.copy_(torch.tensor([2.0, -0.5, 1.0]))
    bn.bias.copy_(torch.tensor([0.0, 0.25, -1.0]))
    bn.running_mean.copy_(torch.tensor([0.0, 1.0, 0.5]))
    bn.running_var.copy_(torch.tensor([0.99, 3.99, 0.0]))
middles, counts = torch.linspace(-1, 2, 7).double(), torch.arange(1.0, 8).double()
conv = torch.nn.Conv2d(3, 3, 1, bias=False)  # so that there is something to fold into
conv.weight.data.copy_(torch.eye(3).view(3, 3, 1, 1))
together = folded(torch.nn.Sequential(conv, copy.deepcopy(bn).float()).eval())


# %% tags=["check"]
def through_torch(channel):
    """A case: every value through BatchNorm itself, then counted; ql folds alike."""
    values = middles.repeat_interleave(counts.long()).expand(1, 3, 1, -1)
    with torch.no_grad():
        behind, ours = bn(values)[0, channel], together(values.float())[0, channel]
    assert torch.allclose(ours.double(), behind, atol=1e-5)
    counted = torch.stack(behind.unique(return_counts=True))
    return (middles, counts, bn, channel), counted

check(
    behind_batchnorm,
    (*through_torch(0), "Subtract the mean, multiply by gamma over the deviation."),
    (*through_torch(2), "The variance is 0 here: epsilon stands below the root."),
    (*through_torch(1), "Here gamma is negative: the histogram is mirrored."),
)

# %% [markdown]
# Next: [06_learned_rounding](06_learned_rounding.ipynb), how a few bits can be made to hold.
