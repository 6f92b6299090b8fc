# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 04 · Observers: why a range is good
#
# **Question.** What does every range setter decide, on which edge does it matter, which layer broke, and
# what would mend it?
#
# **Seen.** [What a full run showed](../results/pages/04_observers-resnet20-cifar10-jpeg.md), without running it.
#
# **Cost.** A minute on the digits; for ResNet-20 on 10,000 test images five minutes on two CPU cores with
# one calibration seed (three by default).

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
import itertools

import matplotlib.pyplot as plt
import pandas as pd
import quantlab as ql
import torch

# %%
from quantlab import observers, plots
from quantlab.calibration import watch
from quantlab.edgestats import EdgeStats
from quantlab.graph import folded
from quantlab.plots import panel
from quantlab.plots.panel import split_error
from quantlab.plots.style import BLUE, DASHED, INK, RED, styled
from quantlab.quantized import Quantizer, edge_name, find_node, origin
from quantlab.system.comparing import decibels
from quantlab.workbook.study import Study, show
from tqdm.auto import tqdm

# %% tags=["parameters"]
data = "auto"  # auto, cifar10, digits, images, or the path of a folder or archive
model = "resnet20"  # resnet20 or resnet50
checkpoint = "auto"  # auto, or the path of a .safetensors file
seed = 0
preset = "auto"  # smoke, full, or auto: smoke on the digits
# 2 to 8, of the activations in sections 1, 3, 5 and of everything in sections 6, 9
bits = 4
# name of an edge for sections 1 to 3, 7, 8; auto: behind a ReLU, the longest tail
edge = "auto"
observer = "histogram"  # of the figure in section 8
clip_share = 1.0  # of that observer's range, in section 8; 0.1 to 1.5
n_calibration = 0  # 0: 256 in a smoke run, 1,024 in a full one
# of sections 4 and 5; 0: one calibration seed in a smoke run, three in a full one
n_seeds = 0
solutions = False  # True: the exercises' solutions are run

# %%
study = Study(
    data, model, checkpoint, preset,
    n_calibration=n_calibration, seed=seed, notebook="04_observers",
)
observers.find_observer(observer)  # refuses an unknown name
network, images, stats = study.network, study.images, study.stats
n_seeds = study.choose(n_seeds, smoke=1, full=3)
n_calibration = study.n_calibration
seeds = range(seed, seed + n_seeds)


# %% [markdown]
# ## 1. Seven decisions on one edge
# All of them read the same statistics, collected in one pass. *minmax* clips nothing, *percentile* a
# fixed fraction; *histogram* searches both ends for the least squared error, *mse* (BRECQ's name; its
# exponent is 2.4) one, by shrinking; *entropy* wants to keep the distribution's information; the two
# *aciq* assume a Laplace or a normal distribution and calculate. PyTorch calls such range setters
# *observers*, and so does the parameter.

# %%
def tail(name):
    e = stats.edges[name]
    never_negative = e.minimum >= 0 < e.maximum
    return e.maximum / observers.percentile(e, bits)[1] if never_negative else 0

edge = max(stats.edges, key=tail) if edge == "auto" else edge
assert edge in stats.edges, f"use one of: {', '.join(stats.edges)}"
chosen = stats.edges[edge]
decisions = [(o, *setter(chosen, bits)) for o, setter in observers.OBSERVERS.items()]
ranges = pd.DataFrame(decisions, columns=["observer", "low", "high"])
about = f"values on edge {edge} from {n_calibration:,} calibration images"
text = study.caption(chosen.count, f"{about}; ranges for {bits} bits")
title = f"Where to clip? Edge {edge}"
figure = plots.clip_histogram(chosen, ranges, text, title, "activation")
study.save(figure, "04_clip_ranges")


# %%
def error(observer, width):
    low, high = observers.OBSERVERS[observer](chosen, width)
    return observers.quantization_error(chosen, [low], [high], width).item()

errors = pd.DataFrame({
    f"{b} bits": {o: error(o, b) for o in observers.OBSERVERS} for b in (8, 6, 4, 3, 2)
}).rename_axis("mean squared error")
best = errors.loc["histogram"] <= errors.min() * 1.01
assert best.all(), "nobody beats the search on its own criterion"
show(errors.style.format("{:.2e}").highlight_min(color="#d7e7d0"))

# %% [markdown]
# ## 2. Clipping against rounding
# A wide range rounds coarsely, a narrow one clips. The sum is least somewhere between, and the fewer the
# bits, the further in. It may have several hollows, so a search looks at the whole range.

# %%
fractions = torch.linspace(0.03, 1, 98, dtype=torch.float64)

def split(width):
    low, high = fractions * min(chosen.minimum, 0), fractions * chosen.maximum
    clipping, rounding = split_error(chosen, low, high, width)
    parts = {"clipping": clipping, "rounding": rounding}
    return pd.DataFrame({"bits": width, "share": fractions, **parts})

curve = pd.concat([split(b) for b in (8, 4, 3, 2)], ignore_index=True)
text = study.caption(chosen.count, f"values on edge {edge}")
study.save(plots.range_tradeoff(curve, text), "04_clipping_rounding")

# %% [markdown]
# ## 3. The landscape, and where everybody stands in it
# The same sum over the upper end of the range. Flat around the minimum: there it hardly matters who
# decides. Steep on the left: clipping too much costs more than clipping too little.

# %%
total = curve.clipping + curve.rounding
landscape = curve.assign(high=curve.share * chosen.maximum, error=total)
choices = pd.DataFrame([
    {"bits": b, "observer": o, "high": setter(chosen, b)[1], "error": error(o, b)}
    for b in (8, 4, 3, 2)
    for o, setter in observers.OBSERVERS.items()
])
study.save(plots.error_landscape(landscape, choices, text), "04_landscape")


# %% [markdown]
# ## 4. The whole network
# Weights at 8 bits, so that only the activations' ranges differ between the lines.

# %%
def measure(observer, act_bits, stats, s):
    config = ql.QuantConfig(weight_bits=8, act_bits=act_bits, observer=observer)
    qmodel = ql.quantize(network, stats, config)
    size = ql.weight_bytes(qmodel)
    return study.row(study.evaluate(qmodel), "by hand", config, seed=s, bytes=size)

statistics = {s: ql.collect(network, study.calibration(s)) for s in seeds}
grid = list(itertools.product(observers.OBSERVERS, (8, 4, 3), seeds))
rows = [measure(o, b, statistics[s], s) for o, b, s in tqdm(grid)]
frame = study.record_rows(rows).assign(bits=lambda f: f.act_bits.astype(int))

# %%
text = (
    f"test images, weights 8 bits, {n_calibration:,} calibration images, {n_seeds} "
    "seed(s)"
)
text = study.caption(study.baseline.n, text)
figure = plots.accuracy_by_bits(frame, text, "bits of the activations (weights 8)")
study.save(figure, "04_accuracy_by_observer")

# %%
groups = frame.groupby(["observer", "bits"], sort=False)
show(groups.top1.agg(["mean", "std"]).unstack("bits").round(2))


# %% [markdown]
# ## 5. How many calibration images are enough?
# On the held-out images, because the answer is a choice. Of several seeds the band is the range. Notice
# *minmax*: every further image can only widen its ranges.

# %%
def heldout_top1(observer, n, s):
    statistics = ql.collect(network, study.calibration(s, n=n))
    config = ql.QuantConfig(weight_bits=8, act_bits=bits, observer=observer)
    top1 = study.evaluate(ql.quantize(network, statistics, config), images.heldout).top1
    return {"observer": observer, "n": n, "seed": s, "top1": top1}

counts = [n for n in (4, 16, 64, 256, 1024) if n <= n_calibration]
grid = list(itertools.product(("minmax", "percentile", "histogram"), counts, seeds))
enough = pd.DataFrame(heldout_top1(*case) for case in tqdm(grid))
n_heldout = min(study.limit or len(images.heldout), len(images.heldout))
text = study.caption(n_heldout, f"held-out images, W8A{bits}, {n_seeds} seed(s)")
study.save(plots.accuracy_by_images(enough, text), "04_calibration_images")

# %% [markdown]
# ## 6. Where does the noise come in?
# Run the same images through both networks, and compare every value that is rounded, $x$ in the float
# network with $\hat x$ in the quantized one. The ratio of signal to noise, in decibels:
#
# $$\mathrm{sqnr} = 10 \log_{10} \frac{\sum x^2}{\sum (\hat x - x)^2}$$
#
# On its way through the network (*sqnr*) a value carries the noise of all layers before; *own_sqnr* is
# what it would have if this edge alone were rounded.

# %%
qmodel = ql.quantize(network, stats, ql.QuantConfig(weight_bits=bits, act_bits=bits))
quantizers = qmodel.quantizer_nodes  # node -> Quantizer, in order of execution
origins = {node: origin(qmodel, node).name for node in quantizers}
sums = {node: torch.zeros(3, dtype=torch.float64) for node in quantizers}
n_images = 64 if study.smoke else 256
graph = folded(network)
for batch in study.calibration(seed + 100, n=n_images):
    exact, rounded = {}, {}
    watch(graph, set(origins.values()), exact.__setitem__, [batch])
    watch(qmodel, {node.name for node in quantizers}, rounded.__setitem__, [batch])
    for node, quantizer in quantizers.items():
        x, x_hat = exact[origins[node]], rounded[node.name]
        parts = x, x_hat - x, quantizer(x) - x
        sums[node] += torch.stack([p.double().square().sum() for p in parts]).cpu()

# %% [markdown]
# `added_db` is the noise that a step adds to the most that reached it from the steps before; its largest
# values name the culprits.

# %%
noise = {node: (n / s).item() for node, (s, n, _) in sums.items()}
before, added = {}, {}  # node -> the Quantizers whose codes its value comes from
for node in qmodel.graph.nodes:
    before[node] = set().union(*(before[n] for n in node.all_input_nodes))
    if node in quantizers:
        most = max((noise[n] for n in before[node]), default=0.0)
        lossy = most > 0 and noise[node] > 0
        added[node] = decibels(noise[node], most) if lossy else float("nan")
        before[node] = {node}

# %%
report = pd.DataFrame([
    {
        "edge": edge_name(node),
        "role": qmodel.plan.stores.get(edge_name(node), "read"),
        "bits": quantizer.qparams.bits, "sqnr": decibels(*sums[node][:2]),
        "own_sqnr": decibels(*sums[node][::2]), "added_db": added[node],
    }
    for node, quantizer in quantizers.items()
]).rename_axis("order").reset_index()

# %%
noisiest = report.set_index("order").sort_values("added_db", ascending=False)
show(noisiest.head(8).round(1))
text = f"training images of another seed, W{bits}A{bits}, residual stream 8 bits"
study.save(plots.edge_report(report, study.caption(n_images, text)), "04_edge_report")

# %% [markdown]
# ## 7. Levels and order: PyTorch's observers
# PyTorch's `HistogramObserver` searches for the range with the least squared error, as *histogram* does.
# Two things differ: its search counts 256 levels whatever the width, measured here on this edge's raw
# values; and its histogram may depend on the order of the batches, because old bins are spread over new
# ones whenever the range grows, measured on this edge and on values with a heavy tail.

# %%
values = []
batches = study.calibration(n=min(256, n_calibration), batch_size=8)
watch(folded(network), [edge], lambda name, value: values.append(value.cpu()), batches)
seen = EdgeStats()
for batch in values:
    seen.update(batch)
try:
    from torch.ao.quantization import HistogramObserver
except ImportError:  # a torch that no longer has it
    HistogramObserver = None
state = "ready" if HistogramObserver else "missing: its columns are left out"
print(f"{len(values)} batches of 8 images, {seen.count:,} values; torch.ao {state}")


# %%
def torch_range(batches, width):
    """(low, high) that torch.ao's observer chooses after these batches."""
    top = 2**width - 1
    observer = HistogramObserver(dtype=torch.quint8, quant_min=0, quant_max=top)
    for batch in batches:
        observer(batch)
    scale, zero_point = observer.calculate_qparams()
    return -(scale * zero_point).item(), (scale * (top - zero_point)).item()


# %%
def measured(setter, width):
    ours = setter == "ours"
    low, high = observers.histogram(seen, width) if ours else torch_range(values, width)
    q = ql.choose_qparams(low, high, width)
    lost = sum((ql.fake_quantize(x, q) - x).square().sum().item() for x in values)
    mse = lost / seen.count
    return {"bits": width, "by": setter, "upper end": high, "mean squared error": mse}


# %%
setters = ("ours", "PyTorch") if HistogramObserver else ("ours",)
levels = pd.DataFrame(measured(s, b) for b in (8, 4, 3, 2) for s in setters)
levels = levels.pivot(index="bits", columns="by")
show(levels.sort_index(ascending=False).style.format("{:.3g}"))


# %% [markdown]
# A moving average of each batch's extremes is the one setter that cannot work from mergeable statistics:
# it is sequential by its definition. With PyTorch's c = 0.01 the first batch alone decides most of it.
# The same batches in four orders, and a second case for whoever expects order not to matter: 16 batches
# of a heavy-tailed tensor whose spread grows.

# %%
def moving_average(batches, c=0.01):  # as torch.ao's MovingAverageMinMaxObserver
    low, high = batches[0].aminmax()
    for x in batches[1:]:
        low, high = low + c * (x.min() - low), high + c * (x.max() - high)
    return low.item(), high.item()

def upper_ends(batches):
    together = EdgeStats()
    for x in batches:
        together.update(x)
    own = observers.histogram(together, 8)[1]
    ends = {"ours": own, "moving average": moving_average(batches)[1]}
    return ends | ({"PyTorch": torch_range(batches, 8)[1]} if HistogramObserver else {})


# %%
generator = torch.Generator().manual_seed(0)
tensors = [torch.randn(2000, generator=generator) ** 3 for _ in range(16)]
growing = [x * 2 ** (i / 4) for i, x in enumerate(tensors)]
cases = {edge: values, "heavy tail": growing}
orders = {
    "as drawn": lambda batches: batches,
    "reversed": lambda batches: batches[::-1],
    "largest batch first": lambda batches: sorted(batches, key=lambda x: -x.max()),
    "largest batch last": lambda batches: sorted(batches, key=lambda x: x.max()),
}

# %%
pairs = itertools.product(cases, orders)
ends = {(case, order): upper_ends(orders[order](cases[case])) for case, order in pairs}
names = ["upper end of the range at 8 bits", "order"]
order_table = pd.DataFrame(ends).T.rename_axis(names)
assert (order_table.ours.groupby(level=0).nunique() == 1).all(), "one in every order"
show(order_table.style.format("{:.4g}"))

# %% [markdown]
# ## 8. Turn the knobs
# First the figure for the parameters at the top, then the same figure under four controls: any edge,
# width and observer, and a slider that scales the observer's range. The controls need a running kernel
# (JupyterLab or Colab). Try 3 bits and a range below 1, then 8 bits.

# %%
text = study.caption(n_calibration, "calibration images")
decided = observers.find_observer(observer)(chosen, bits)
figure = panel.range_figure(chosen, edge, bits, observer, decided, clip_share, text)
study.save(figure, "04_panel")

# %%
knobs = dict(edge=edge, bits=bits, observer=observer, share=clip_share)
panel.range_panel(stats.edges, text, **knobs)

# %% [markdown]
# ## 9. Which layer broke, and what would mend it?
# Section 6 looked at values on their way. What counts is what arrives at the logits, and weights make noise
# too. A *part* is the weights of one layer or the values of one edge (image and residual stream keep 8 bits
# and are left out). The ratio at the logits is a mean over images, so that none of them decides for all.

# %%
n_images = 16 if study.smoke else 256
batches = list(study.calibration(seed + 100, n=n_images))
logits_node = qmodel.graph.output_node().args[0].name

def logits(net):
    found = []
    watch(net, {logits_node}, lambda _, x: found.append(x.cpu().double()), batches)
    return torch.cat(found)

exact = logits(graph)

def logits_db(net):
    signal = exact.square().sum(1)
    noise = (logits(net) - exact).square().sum(1)
    return (10 * torch.log10(signal / noise)).clamp(max=200).mean().item()


# %% [markdown]
# Layers and Quantizers are modules, each at a path of the network. To round a part, to leave it in float or to
# try a remedy is to put another module there for a while. Biases stay in float here: rounded to multiples of
# $s_{in} s_w$, they would keep the step of an edge that a remedy has just made finer.

# %%
def with_part(net, path, part, measure):
    """measure(net) with `part` in the place of its module at `path`."""
    before = net.get_submodule(path)
    net.add_submodule(path, part)
    try:
        return measure(net)
    finally:
        net.add_submodule(path, before)


# %%
layers = {find_node(qmodel, name).target: name for name in qmodel.layers}
in_float = {path: graph.get_submodule(path) for path in layers}
for path, layer in in_float.items():
    qmodel.get_submodule(path).bias.data = layer.bias.data

in_float |= {node.target: torch.nn.Identity() for node in quantizers}
unrounded = copy.deepcopy(qmodel)
for path, part in in_float.items():
    unrounded.add_submodule(path, part)
assert torch.allclose(logits(unrounded), exact), "nothing is rounded yet"

# %% [markdown]
# Each part is measured twice. *alone*: the signal to noise of the float network when nothing else is rounded.
# *worth*: what the quantized network gains when this part alone is left in float, in decibels: roughly what can
# be won there. The three that are worth most are called the worst.

# %%
narrow = [n for n, quantizer in quantizers.items() if quantizer.qparams.bits == bits]
edges = {node.target: origins[node] for node in narrow}
names = {path: f"weights of {name}" for path, name in layers.items()} | edges
together = logits_db(qmodel)

def both_ways(path):
    alone = with_part(unrounded, path, qmodel.get_submodule(path), logits_db)
    worth = with_part(qmodel, path, in_float[path], logits_db) - together
    return {"path": path, "part": names[path], "alone": alone, "worth": worth}

by_part = pd.DataFrame(both_ways(path) for path in tqdm(names)).set_index("path")
by_part = by_part.sort_values("worth", ascending=False, kind="stable")
worst = by_part[:3]


# %%
@styled
def alone_and_worth(text):
    figure, axes = plt.subplots(figsize=(9, 4))
    others = by_part[3:]
    weights, values = (others[others.index.isin(paths)] for paths in (layers, edges))
    axes.plot(weights.alone, weights.worth, "D", color=INK, label="weights of a layer")
    axes.plot(values.alone, values.worth, "o", color=BLUE, label="values of an edge")
    for marker, row in zip("*sP", worst.itertuples()):
        look = dict(linestyle="", marker=marker, markersize=10, color=RED)
        axes.plot(row.alone, row.worth, label=row.part, **look)
    axes.axhline(0, **DASHED)
    axes.set(xlabel="alone, dB", ylabel="worth, dB", title="What a part is worth")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return plots.caption(figure, text)


# %%
text = f"training images of another seed; signal to noise at the logits, W{bits}A{bits}"
study.save(alone_and_worth(study.caption(n_images, text)), "04_alone_and_worth")


# %% [markdown]
# What a part does alone tells only roughly what mending it is worth: noises of two parts may add up, or cancel.
# Below zero the rest is worse off without this part's noise.
#
# **Why these three?** By rules that can be checked by eye, each with its number; if none applies, it is the few
# levels. Over few products errors do not average out, and behind the last layer nothing does. Of weights, one
# side of zero may hardly need its codes; of values, one channel or a few large ones may set the range for all.

# %%
def why_weights(path):
    x, name = graph.get_submodule(path).weight.detach().flatten(1), layers[path]
    sides = torch.stack([-x.amin(1), x.amax(1)]).clamp(min=0)
    short = (sides.amin(0) / sides.amax(0)).nanmedian()  # of all channels
    return {
        "first layer": name in qmodel.plan.first,
        "last layer": name in qmodel.plan.last,
        f"{x.shape[1]} products a sum": x.shape[1] <= 32,
        f"one side of zero reaches {short:.0%} of the other": short < 0.5,
    }


# %%
def channel_ends(edge):
    """The smallest and the largest value of each channel, both [C]."""
    seen = []
    def see(_, x):
        seen.append(torch.stack(x.transpose(0, 1).flatten(1).aminmax(dim=1)).cpu())
    watch(graph, {edge}, see, study.calibration())
    low, high = torch.stack(seen).unbind(1)
    return low.amin(0), high.amax(0)

spans = {path: channel_ends(edges[path]) for path in worst.index if path in edges}


# %%
def why_values(path):
    edge, q = stats.edges[edges[path]], qmodel.get_submodule(path).qparams
    size = torch.maximum(-spans[path][0], spans[path][1])
    outlier = size.max() / size[size > 0].median()
    least, most = observers.percentile(edge, bits, q=99.9)
    used = (most - least) / (q.scale.item() * (q.qmax - q.qmin))
    tail = edge.maximum / (q.scale.item() * (q.qmax - q.zero_point.item()))
    return {
        f"one channel reaches {outlier:.1f} times as far as the median": outlier > 6,
        f"99.9 % of the values lie in {used:.0%} of the range": used < 0.5,
        f"a long tail, to {tail:.1f} times the range": tail > 2,
    }


# %% [markdown]
# **What would help?** Each remedy is tried in the quantized network, everything else as it was: another
# range, two more bits; for weights all $2^b$ levels; for values a scale for every channel, the most that
# equalisation could win. (Only a depthwise integer convolution can have that: others add over the
# channels.) The ranges come from the calibration images, the decibels from other training images, the
# points from test images.

# %%
wider = min(bits + 2, 8)

def weights_remedies(path):
    def rounded(width, symmetric=True, **how):  # a scale for each channel, as before
        layer = copy.deepcopy(graph.get_submodule(path))
        ends = observers.weight_range(layer.weight, width, symmetric=symmetric, **how)
        q = ql.choose_qparams(*ends, width, symmetric=symmetric, axis=0)
        layer.weight.data = ql.fake_quantize(layer.weight.data, q)
        return layer
    return {
        "the whole range": rounded(bits, observer="minmax"),
        f"all {2**bits} levels": rounded(bits, symmetric=False),
        f"{wider} bits": rounded(wider),
    }


# %%
class ChannelQuantizer(Quantizer):
    @property
    def qparams(self):
        return dataclasses.replace(super().qparams, axis=1)

def values_remedies(path):
    edge = stats.edges[edges[path]]
    low, high = observers.histogram(edge, bits)
    inside = spans[path][0].clamp(min=low), spans[path][1].clamp(max=high)
    mse, more = observers.mse(edge, bits), observers.histogram(edge, wider)
    return {
        "range by mse": Quantizer(ql.choose_qparams(*mse, bits)),
        "a scale a channel": ChannelQuantizer(ql.choose_qparams(*inside, bits, axis=1)),
        f"{wider} bits": Quantizer(ql.choose_qparams(*more, wider)),
    }


# %%
def why(path):
    part = qmodel.get_submodule(path)
    q = part.weight_qparams if path in layers else part.qparams
    rules = why_weights if path in layers else why_values
    found = [reason for reason, applies in rules(path).items() if applies]
    return "; ".join(found) or f"{q.qmax - q.qmin + 1} levels are few"

top1 = study.evaluate(qmodel).top1

def gains(net):
    return logits_db(net) - together, study.evaluate(net).top1 - top1


# %%
rows, mended = [], copy.deepcopy(qmodel)
for path, row in tqdm(worst.iterrows(), total=len(worst)):
    remedies = (weights_remedies if path in layers else values_remedies)(path)
    tried = {name: with_part(qmodel, path, m, gains) for name, m in remedies.items()}
    order = sorted(tried, key=tried.get, reverse=True)
    about = row.part, f"{row.worth:+.2f}", why(path)
    rows += [(*about, name, *tried[name]) for name in order]
    mended.add_submodule(path, remedies[order[0]])
gain, points = gains(mended)

columns = ["part", "worth, dB", "why", "remedy", "gain, dB", "gain, points"]
diagnosis = pd.DataFrame(rows, columns=columns)
show(diagnosis.set_index(columns[:4]).style.format("{:+.2f}"))
print(f"the best of each together: {gain:+.2f} dB, {points:+.2f} points")

# %% [markdown]
# For any network of yours, `python -m quantlab inspect my_module:build_model --data DIR` does the same, with all
# causes and remedies: unbalanced adds, dead channels and equalisation among them.

# %% [markdown]
# ## What we learned

# %%
lost = frame.groupby(["bits", "observer"])["drop"].mean()
for b in (8, 4, 3):
    least, most = lost[b].idxmin(), lost[b].idxmax()
    print(f"- Activations at {b} bits, weights at 8, points lost: ", end="")
    print(f"{lost[b].min():+.2f} with {least}, {lost[b].max():+.2f} with {most}.")

# %%
by_images = enough.groupby(["observer", "n"], sort=False).top1.mean()
for name, part in by_images.groupby(level=0, sort=False):
    said = ", ".join(f"{top1:.2f} with {n:,}" for (_, n), top1 in part.items())
    print(f"- Held-out images, % by calibration images, {name}: {said}.")
low = report.loc[report.sqnr.idxmin()]
print(
    f"- At W{bits}A{bits} the noisiest edge is {low.edge} ({low.role}, "
    f"{low.bits} bits): ", end=""
)
print(f"{low.sqnr:.1f} dB, {low.own_sqnr:.1f} dB of its own.")

# %%
if HistogramObserver:
    ratio = levels["mean squared error"].PyTorch / levels["mean squared error"].ours
    print(
        f"- On {edge}, PyTorch's observer leaves {ratio[8]:.2f} times our "
        "squared error at ", end=""
    )
    print(f"8 bits, {ratio[4]:.1f} times at 4 and {ratio[3]:.1f} times at 3.")

# %%
cases = order_table.groupby(level=0)
apart = (cases.max() / cases.min() - 1).drop(columns="ours")
for case, row in apart.iterrows():
    moved = ", ".join(f"{fraction:.1%} ({name})" for name, fraction in row.items())
    print(f"- {case}: the order of batches moves the upper end by {moved}; ours stays.")
weight = 0.99 ** (len(values) - 1)
print(
    f"- After {len(values)} batches the first holds {weight:.0%} of a moving average, "
    "c = 0.01."
)

# %%
for part, tried in diagnosis.groupby("part", sort=False):
    best = tried.iloc[0]
    print(f"- {part} ({best.why}): {best.remedy} gains ", end="")
    print(f"{best['gain, dB']:+.2f} dB, {best['gain, points']:+.2f} points.")
print(f"- The best of each together gain {gain:+.2f} dB at the logits, ", end="")
print(f"{points:+.2f} points.")

# %% [markdown]
# ## Exercises
# Write each function in place of its `...`, run its cell, then the one with the check, which says what is
# wrong. The solution is folded between the two; with `solutions = True` at the top all of them run.
#
# **1. A percentile from a histogram.** Bin $i$ counts the values in $(i\,w, (i + 1)\,w]$. Where is the end
# below which a given fraction of all values lies? Inside the bin in which the fraction is reached, count
# its values as evenly spread.

# %%
from fractions import Fraction

from quantlab.workbook.exercises import check


# %% tags=["exercise"]
def upper_end(counts, width, fraction):
    """A float; counts: int64 [N], of bins `width` wide from 0 on; 0 < fraction <= 1."""
    ...


# %% tags=["solution"] jupyter={"source_hidden": true}
if solutions:
    def upper_end(counts, width, fraction):
        wanted = fraction * counts.sum().item()
        below = 0
        for i, count in enumerate(counts.tolist()):
            if below + count >= wanted:
                return (i + (wanted - below) / count) * width
            below += count

# %% tags=["check"]
skewed = torch.rand(5000, generator=torch.Generator().manual_seed(0)) ** 3
seen_here = EdgeStats().update(skewed)
by_ql = observers.percentile(seen_here, 8, q=99)[1]
assert abs(by_ql - skewed.quantile(0.99)) <= 2 * seen_here.width, "torch: to a bin"

table = torch.tensor([5, 3, 2, 0])
whole = seen_here.histogram()[1]
check(
    upper_end,
    ((table, 2.0, 0.5), 2.0, "5 of 10 lie in the first bin: its end, 2."),
    ((table, 2.0, 0.9), 5.0, "The third bin's 2 are spread: half of them end at 5."),
    ((table, 2.0, 1.0), 6.0, "All lie below 6: the last bin is empty."),
    ((whole, seen_here.width, 0.99), by_ql, "A histogram of 5,000: ql's percentile."),
)


# %% [markdown]
# **2. The error of a candidate range.** From a histogram's middles and counts, the mean squared error of the
# range from 0 to `high` in its two parts: *clipping*, what values beyond it lose, each its whole way down to
# `high`, and *rounding*, what all others lose on their way to the nearest code. The mean is over all values.

# %% tags=["exercise"]
def two_errors(middles, counts, high, bits):
    """(clipping, rounding) of codes 0..2^bits - 1; middles: float64, counts: int64."""
    ...


# %% tags=["solution"] jupyter={"source_hidden": true}
if solutions:
    def two_errors(middles, counts, high, bits):
        step = high / (2**bits - 1)
        nearest = (torch.round(middles / step) * step).clamp(max=high)
        squares = (nearest - middles).square() * counts / counts.sum()
        return squares[middles > high].sum(), squares[middles <= high].sum()


# %% tags=["check"]
def exact_errors(stats, high, bits):
    """A case, in exact fractions, value by value; split_error must agree."""
    middles, counts = stats.histogram()
    step, parts = Fraction(high) / (2**bits - 1), [0, 0]
    for x, n in zip(map(Fraction, middles.tolist()), counts.tolist()):
        nearest = min(round(x / step), 2**bits - 1) * step
        parts[x <= high] += n * (nearest - x) ** 2 / stats.count
    by_ql = split_error(stats, [0.0], [high], bits)
    expected = torch.tensor([float(part) for part in parts])
    assert torch.allclose(torch.cat(by_ql).float(), expected, rtol=1e-3, atol=1e-9)
    return (middles, counts, high, bits), expected


# %% tags=["check"]
crowded = torch.rand(200, generator=torch.Generator().manual_seed(2)) ** 3
few = EdgeStats().update(crowded)
everything = "The whole range at 3 bits: nothing is clipped, all is rounded."
narrow = "A narrow range: beyond it a value goes to the last code, which is clipping."
check(
    two_errors,
    (*exact_errors(few, few.maximum + few.width, 3), everything),
    (*exact_errors(few, 0.25, 3), narrow),
    (*exact_errors(few, 0.5, 2), "At 2 bits there are three steps from 0 to high."),
)


# %% [markdown]
# **3. A search with both ends free.** `error(low, high)` tells the error of a range; the whole range is given.
# Find one whose error is at most 0.05 % above that of *ql's histogram*, and ask at most 300 times: every pair of
# 18 ends is already more. (Section 3's landscape helps: where is it flat, and why is it no good to walk
# inwards and to stop at the first rise?)

# %% tags=["exercise"]
def best_range(error, low, high):
    """(low, high), inside low <= 0 <= high; error: a function (low, high) -> float."""
    ...


# %% tags=["solution"] jupyter={"source_hidden": true}
if solutions:
    def best_range(error, low, high):
        best, step = (0.5, 0.5), 0.5  # fractions of the two ends, and how far to look
        for points in (9, 7, 7, 7):
            around = torch.linspace(-step, step, points).tolist()
            sides = [[min(max(b + a, 0.01), 1) for a in around] for b in best]
            pairs = itertools.product(*map(set, sides))
            best = min(pairs, key=lambda pair: error(low * pair[0], high * pair[1]))
            step *= 2 / (points - 1)
        return low * best[0], high * best[1]


# %% tags=["check"]
def error_of(x, low, high, bits):
    """Mean squared error of x in ranges [low, high], numbers or [R, 1]; [] or [R]."""
    top = 2**bits - 1
    s = (high - low) / top
    z = (low / s).round() if isinstance(s, torch.Tensor) else round(low / s)
    codes = (torch.round(x / s) - z).clamp(0, top)
    return (s * (codes + z) - x).square().mean(-1)

def least_of_all(x, bits):
    """By brute force, the error of the best of all pairs of 25 ends."""
    ends = torch.arange(1, 26).double() / 25
    low, high = torch.cartesian_prod(x.min() * ends, x.max() * ends).unbind(1)
    return error_of(x, low[:, None], high[:, None], bits).min()


# %% tags=["check"]
def searched(x, bits):
    """A case: what is wrong with a range for x, beside ql's and brute force."""
    asked, by_ql = [], observers.histogram(EdgeStats().update(x), bits)
    most = error_of(x, *by_ql, bits)
    assert most <= 1.001 * least_of_all(x, bits), "ql's is no worse than brute force"
    def error(low, high):
        asked.append((low, high))
        return error_of(x, low, high, bits).item()
    def fault(found):
        ratio = error_of(x, *found, bits) / most
        if len(asked) > 300:
            return f"error was asked {len(asked):,} times"
        return "" if ratio <= 1.0005 else f"{ratio:.4f} times the error of ql's range"
    return (error, x.min().item(), x.max().item()), fault


# %% tags=["check"]
normal = torch.randn(2000, generator=torch.Generator().manual_seed(1)).double()
some, outlier = normal[:300], torch.cat([normal, torch.tensor([40.0])])
unequal = "More lies above zero than below: the ends want different fractions."
rises = "One value lies at 40: on the way in the error rises before it falls."
check(
    best_range,
    (*searched(some, 4), "At 4 bits both ends move in: coarsely first, then finely."),
    (*searched(some - some.min() * 0.7, 3), unequal),
    (*searched(outlier, 3), rises),
)

# %% [markdown]
# Next: [05_activation_histograms](05_activation_histograms.ipynb), every layer's distribution and what its
# shape costs.
