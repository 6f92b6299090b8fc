# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 10 · The original experiment
#
# <!-- findings:opening -->
# **Found** (resnet20, cifar10-jpeg, 10,000 test images; means over calibration seeds, paired 95 %
# intervals). Repeated its way at 4 bits, hist keeps 53.48 % and fake-hist 75.52 % (the original, with
# ResNet-50: 64.62 and 88.55 %); the right way keeps 85.17 % of 87.37 %. On the way from its hist to ours,
# at 4 bits “the search works” gains most (+42.6 points) and “BatchNorm kept as trained” loses most
# (-24.8); at 3 bits “one scale a channel” gains most (+51.1 points) and “BatchNorm folded” loses most
# (-31.5). Leaving out the largest 0.01 % of every batch gives hist +21.0 points, averaging over batches
# +8.8.
# <!-- /findings -->
#
# **Question.** In 2021 this project published seven rows; at 4 bits its histogram observer fell to
# 64.62 % while a simple order statistic kept 88.55 %. Why, and what does each of its decisions cost?
#
# **Seen.** [What a full run showed](../results/pages/10_original_experiment-resnet20-cifar10-jpeg.md), without running it.
#
# **Cost.** A minute and a half on the digits; for ResNet-20 on 10,000 test images and three calibration
# seeds about half an hour on two CPU cores; for ResNet-50 many hours there, minutes an evaluation, and on
# one H100 five minutes for the seven rows. A run that was stopped goes on from its last evaluation.

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
import bisect
import copy
import dataclasses
import functools
import itertools

import numpy as np
import pandas as pd
import quantlab as ql
import torch
from tqdm.auto import tqdm

# %%
from quantlab import observers, ptq
from quantlab.calibration import collect_edges
from quantlab.edgestats import EdgeStats
from quantlab.graph import find_kinds, folded, normalize, trace
from quantlab.networks.train import augment, default_config
from quantlab.plan import Plan, make_plan
from quantlab.plots import ladder
from quantlab.quantized import edge_name
from quantlab.rivals import pytorch as builtin
from quantlab.system.comparing import decibels
from quantlab.workbook import tables
from quantlab.workbook.study import Study, show

# %% tags=["parameters"]
data = "auto"  # auto, cifar10, digits, images, or the path of a folder or archive
model = "resnet20"  # resnet20 or resnet50
checkpoint = "auto"  # auto, or the path of a .safetensors file
seed = 0
preset = "auto"  # smoke, full, or auto: smoke on the digits
n_calibration = 0  # images for our ranges; 0: 256 in a smoke run, 1,024 in a full one
n_batches = 0  # augmented batches of 128 for the original's; 0: 2 (smoke), 51 (full)
n_seeds = 0  # of the rows and the ladder; 0: 1 (smoke), 3 (full)
ablations = True  # False: the seven rows and the ladder at 4 bits only

# %%
study = Study(
    data, model, checkpoint, preset,
    n_calibration=n_calibration, seed=seed, notebook="10_original_experiment",
)
images, network, baseline = study.images, study.network, study.baseline
device = next(network.parameters()).device
n_calibration = study.n_calibration
n_batches = min(study.choose(n_batches, smoke=2, full=51), len(images.train) // 128)
n_batches = max(n_batches, 1)  # of fewer than 128 images: all of them
n_augmented = min(128 * n_batches, len(images.train))
seeds = list(range(seed, seed + study.choose(n_seeds, smoke=1, full=3)))


# %% [markdown]
# ## 1. Its two observers
# **hist** was modelled on PyTorch's `HistogramObserver`: 2,048 bins over the batch's own range, then a
# search that moves one end inwards by 0.00001 of the values at a time and stops at the first increase of
# the squared error. Where the number of levels belongs, $2^b$, it had $b$. (Written here from its
# description; the error takes a value for the middle of its bin.)

# %%
def squared_error(counts, first, last, levels):
    """Of merging bins first..last into `levels` equal groups, in squared bin widths.

    What lies beyond is clipped.
    """
    width = (last - first + 1) / levels
    position = np.arange(len(counts)) + 0.5 - first
    group = np.clip(position // width, 0, levels - 1)
    return float(counts @ (position - (group + 0.5) * width) ** 2)


# %%
def greedy_search(x, levels, bins=2048, step=1e-5):
    """(low, high) after the last step that did not raise the error."""
    low, width = x.min().item(), (x.max() - x.min()).item() / bins
    counts = torch.histc(x, bins).double().numpy()
    kept, least = (0, bins - 1), float("inf")
    for moved in narrower(counts, step):
        error = squared_error(counts, *moved, levels)
        if error > least:
            break
        kept, least = moved, error
    return low + width * kept[0], low + width * (kept[1] + 1)


# %%
def narrower(counts, step):
    """Bins first..last after every step: the end that skips more bins moves."""
    below = (counts.cumsum() / counts.sum()).tolist()
    first, last, alpha, beta = 0, len(counts) - 1, 0.0, 1.0
    while alpha < beta:
        left = min(max(bisect.bisect_left(below, alpha + step), first), last)
        right = max(min(bisect.bisect_right(below, beta - step) - 1, last), first)
        if left - first > last - right:
            moved, alpha = (left, last), alpha + step
        else:
            moved, beta = (first, right), beta - step
        if moved != (first, last):
            yield moved
        first, last = moved


# %% [markdown]
# What the search proposes does not matter. The batch's whole range has already entered a running minimum
# and maximum, and the proposal goes through the same running minimum and maximum, which only widen. A
# range inside them changes nothing: **hist is min-max**. Three batches on the edge behind the first ReLU:

# %%
def augmented(s, n=n_batches):
    """The original's calibration data: n times 128 images, cropped and mirrored."""
    recipe = default_config(model, images)
    generator = torch.Generator().manual_seed(s)
    order = torch.randperm(len(images.train), generator=generator)[: 128 * n]
    for index in order.split(128):
        pixels = images.train.images[index]
        pixels = augment(
            pixels, generator, recipe.crop, recipe.flip, 0, images.train.mean
        )
        yield images.train.normalize(pixels).to(device)


# %%
low, high, lines = 0.0, 0.0, []
for batch in augmented(seed, 3):
    with torch.no_grad():
        x = network.bn1(network.conv1(batch)).relu().cpu()
    proposed = {levels: greedy_search(x, levels)[1] for levels in (4, 16)}
    # the range enters first,
    low, high = min(low, x.min().item()), max(high, x.max().item())
    after = max(high, proposed[4])  # then the proposal
    named = {f"proposed for {k} levels": end for k, end in proposed.items()}
    lines.append({"whole range": x.max().item(), **named, "kept": after})
    assert abs(after - high) <= 1e-4 * high, "the proposal lies inside what is kept"
show(pd.DataFrame(lines, index=pd.RangeIndex(1, len(lines) + 1, name="batch")).round(3))


# %% [markdown]
# **fake-hist** takes the int(0.9999 N)-th smallest $|x|$ of a batch; the first batch sets the range,
# every later one moves it by a tenth of the difference. Both depend on the order of the batches. A class
# of a few lines is enough for them and for everything in between:

# %%
class Running:
    """Range of an edge: `fraction` of a batch's |x|; the widest, or an average."""

    def __init__(self, fraction, memory):
        self.fraction, self.memory, self.range = fraction, memory, None

    def __call__(self, x, bits, symmetric):
        now = range_of(x, self.fraction)
        old = now if self.range is None else self.range
        self.range = torch.stack([min(old[0], now[0]), max(old[1], now[1])])
        if self.memory is not None:
            self.range = self.memory * old + (1 - self.memory) * now
        return tuple(self.range.tolist())


# %%
def smallest(values, k):
    """The k-th smallest; torch's own kthvalue takes seconds on millions of values."""
    if values.is_cuda:
        return values.sort().values[k - 1].item()
    return float(np.partition(values.numpy(), k - 1)[k - 1])

def range_of(x, fraction):
    if fraction == 1:
        return torch.stack(torch.aminmax(x)).cpu()
    k = int(fraction * x.numel())
    return torch.tensor([0.0, smallest(x.abs().flatten(), k)])


# %%
def hist():
    return Running(fraction=1.0, memory=None)

def fake_hist():
    return Running(fraction=0.9999, memory=0.9)

x = torch.randn(10_007, generator=torch.Generator().manual_seed(0))
kth = x.abs().kthvalue(int(0.9999 * len(x))).values.item()
assert fake_hist()(x, 4, True)[1] == kth


# %% [markdown]
# ## 2. Its way
# **Where it rounds.** A quantizer in front of every convolution, linear layer, ReLU and pool, and nowhere
# else; the residual add, the logits and all biases stay float. The package knows one placement, so the
# original's is a `Plan` of our own:

# %%
def original_places(graph):
    """What is read by layers, ReLUs and pools is rounded in front of each of them."""
    kinds = find_kinds(graph)
    readers = [n for n in kinds if kinds[n] in ("compute", "clamp", "average")]
    reads = {node.name: node.args[0].name for node in readers}
    ours = make_plan(graph)
    return Plan({}, reads, {}, first=ours.first, last=ours.last, floats={})


# %%
def float_graph(fold):
    if fold:
        return folded(network)
    graph = trace(network)  # BatchNorm stays a step of its own
    normalize(graph)
    return graph

PLACES = {"inputs": original_places, "fused": make_plan}
n_places = len(original_places(float_graph(fold=False)).reads)
print(f"{model}: {n_places} quantizers its way")


# %% [markdown]
# **With which codes.** Signed and symmetric everywhere, also behind a ReLU, where half of them are of no
# use. A range setter chooses signed codes for an edge that has negative values; so all that is needed is
# to say that it has.

# %%
@functools.cache
def statistics(placement, fold, s):
    graph = float_graph(fold)
    names = PLACES[placement](graph).observed
    return collect_edges(graph, names, study.calibration(s))[0]

def signed(edges):
    """The same statistics, but every edge goes below zero by next to nothing."""
    below = {name: min(edge.minimum, -1e-30) for name, edge in edges.items()}
    return {n: dataclasses.replace(e, minimum=below[n]) for n, e in edges.items()}


# %%
q = ptq.choose_edge_qparams(
    next(iter(signed(statistics("inputs", False, seed)).values())), 4,
    ql.QuantConfig(4, 4, observer="minmax", act_symmetric=True),
)
assert (q.qmin, q.qmax) == (-7, 7), "4 bits, signed, narrow"


# %% [markdown]
# **Weights** over their whole range, one scale a tensor; the linear layer had one for every row.

# %%
def weights_by_row(qmodel, config):
    for name, layer in qmodel.layers.items():
        if isinstance(layer, torch.nn.Linear) and not config.per_channel:
            weight = network.get_submodule(name).weight.detach()
            per_row = dataclasses.replace(config, per_channel=True)
            q = ptq.choose_weight_qparams(weight, config.weight_bits, per_row)
            layer.weight_qparams = q.to(weight.device)
            layer.weight.data.copy_(ql.fake_quantize(weight, layer.weight_qparams))
    return qmodel


# %%
def quantized(config, placement, fold, act_signed, s):
    graph, edges = float_graph(fold), statistics(placement, fold, s)
    biases = {k: v.clone() for k, v in graph.state_dict().items() if k.endswith("bias")}
    plan = PLACES[placement](graph)
    edges = signed(edges) if act_signed else edges
    qmodel = weights_by_row(ptq.quantize_graph(graph, plan, edges, config), config)
    if placement == "inputs":
        qmodel.load_state_dict(biases, strict=False)  # its biases stay float
    return qmodel


# %% [markdown]
# **How it calibrated.** It ran *the quantized network in training mode*: the quantizers followed their
# inputs while they rounded them, and BatchNorm overwrote its running statistics. So what was published
# is quantization *plus BatchNorm re-estimation*, which its README does not say.

# %%
def follow(running, symmetric, quantizer, inputs):
    """Set a Quantizer's range from what is about to pass it."""
    bits, signed = quantizer.qparams.bits, quantizer.qmin < 0
    low, high = running(inputs[0], bits, symmetric)
    q = ql.choose_qparams(low, high, bits, symmetric=symmetric, signed=signed)
    quantizer.scale.copy_(q.scale)
    quantizer.zero_point.copy_(q.zero_point)

def batchnorms(qmodel):
    return [m for m in qmodel.modules() if isinstance(m, torch.nn.BatchNorm2d)]


# %%
@torch.no_grad()
def training_pass(qmodel, batches, observer=None, momentum=0.1):
    """Run in training mode: BatchNorm moves (momentum None: to the plain average),
    and an `observer` sets every quantizer's range as it goes."""
    hooks = []
    for quantizer in qmodel.quantizer_nodes.values() if observer else ():
        set_range = functools.partial(follow, observer(), qmodel.config.act_symmetric)
        hooks.append(quantizer.register_forward_pre_hook(set_range))
    for norm in batchnorms(qmodel):
        norm.momentum = momentum
    for batch in batches:
        qmodel.train()(batch.to(device))
    for hook in hooks:
        hook.remove()
    return qmodel.eval()


# %% [markdown]
# Two ends and everything between them are dictionaries: the fields of `QuantConfig`, its three decisions
# beside them, where the ranges come from (`ranges`: an observer that follows the training pass, or None:
# one pass over the float network) and what happens to BatchNorm.

# %%
OURS = dict(
    ranges=None, batchnorm="kept", placement="fused", fold=True, act_signed=False,
    observer="histogram", act_symmetric=False, residual_bits=8, input_bits=8,
    per_channel=True, weight_observer="lp",
)
ORIGINAL = dict(
    ranges=hist, batchnorm="moved", placement="inputs", fold=False, act_signed=True,
    observer="minmax", act_symmetric=True, residual_bits=None, input_bits=None,
    per_channel=False, weight_observer="minmax",
)

# %%
FIELDS = [field.name for field in dataclasses.fields(ql.QuantConfig)]

def configured(bits, settings):
    """The QuantConfig among settings."""
    own = {name: settings[name] for name in FIELDS if name in settings}
    own["input_bits"] = settings["input_bits"] or bits
    return ql.QuantConfig(bits, bits, **own)


# %%
@functools.lru_cache(maxsize=4)
def calibrated(config, placement, fold, act_signed, ranges, moved, s):
    qmodel = quantized(config, placement, fold, act_signed, s).to(device)
    return training_pass(qmodel, augmented(s), ranges) if moved else qmodel


# %%
def build(bits, s, ranges, batchnorm, placement, fold, act_signed, **settings):
    config = configured(bits, settings)
    moved = ranges is not None or batchnorm == "moved"
    qmodel = calibrated(config, placement, fold, act_signed, ranges, moved, s)
    qmodel = copy.deepcopy(qmodel)
    if batchnorm == "kept":  # as trained
        trained = {k: v for k, v in network.state_dict().items() if "running" in k}
        qmodel.load_state_dict(trained, strict=False)
    if batchnorm == "re-estimated":
        for norm in batchnorms(qmodel):
            norm.reset_running_stats()
        training_pass(qmodel, study.calibration(s), momentum=None)
    return qmodel


# %% [markdown]
# Each state is measured once and recorded at once, under the first name it is asked for by.

# %%
evaluations = {}


# %%
def measure(settings, bits, s, name, method="ablation"):
    """The Evaluation of one state on the test images."""
    named = sorted((k, getattr(v, "__name__", str(v))) for k, v in settings.items())
    key = str((bits, s, named))
    if key not in evaluations:
        builder = functools.partial(build, bits, s, **settings)
        evaluations[key], size = study.evaluated(key, builder)
        ranges, passed = settings["ranges"], settings["batchnorm"] == "moved"
        n = n_augmented if ranges or passed else n_calibration
        more = {"placement": settings["placement"], "bytes": size}
        more |= {"observer": ranges.__name__} if ranges else {}
        more |= {"corrections": name, "seed": s, "n_calibration": n}
        study.record(evaluations[key], method, configured(bits, settings), **more)
    return evaluations[key]


# %% [markdown]
# ## 3. Its seven rows
# Over all seeds. The right way is this workbook's default at the same width, for hist and fake-hist alike.

# %%
published = tables.original().top1  # in %, of ResNet-50 on the official files
PUBLISHED = published.drop(["fp32 original", "8bit built-in"])
ITS, RIGHT = ladder.WAYS[1:]
ways = {("fp32 original", way): [baseline] for way in (ITS, RIGHT)}
cases = list(itertools.product(PUBLISHED.index, seeds))
for way, (name, s) in tqdm(list(itertools.product((ITS, RIGHT), cases))):
    bits, ranges = int(name[0]), {"hist": hist, "fake-hist": fake_hist}[name[5:]]
    if way == ITS:
        result = measure({**ORIGINAL, "ranges": ranges}, bits, s, name, "original")
    else:
        result = measure(OURS, bits, s, "", "by hand")
    ways.setdefault((name, way), []).append(result)

# %% [markdown]
# The built-in row: eager int8 (on x86 with 7-bit activations), calibrated on one batch of *test* images; the
# right way is on training images.

# %%
ready = next(backend for backend in builtin.backends() if backend.name == "eager")
print(ready.note)
generator = torch.Generator().manual_seed(seed)
order = torch.randperm(len(images.test), generator=generator)[:128]
batch = next(images.test.subset(order).batches(128))[0]
sets = {ITS: [batch], RIGHT: study.calibration()}
on_cpu = copy.deepcopy(network).cpu().to(memory_format=torch.channels_last)

# %%
for way, calibration in sets.items() if ready.available else []:
    int8 = builtin.eager_int8(on_cpu, calibration)
    result = study.evaluate(int8, on="cpu")
    ways["8bit built-in", way] = [result]
    columns = {"weight_bits": 8, "act_bits": builtin.eager_act_bits()}
    columns |= {"bytes": builtin.bytes_on_disk(int8)}
    if way == ITS:
        name = "8bit built-in on 128 test images"
        columns |= {"corrections": name, "n_calibration": len(batch)}
        study.record(result, "original", **columns)
    else:
        study.record(result, "eager int8", n_calibration=n_calibration, **columns)


# %%
def mean(pairs):
    """Of (Evaluation before, after), over seeds: top-1, points lost, their interval."""
    lost = [(b.top1, *ql.paired_drop(a.correct, b.correct)) for a, b in pairs]
    return dict(zip(("top1", "drop", "low", "high"), np.mean(lost, axis=0)))


# %%
NAMES = list(published.index)
THEIRS, FLOAT = ladder.WAYS[0], published["fp32 original"]
theirs = {"quantization": NAMES, "way": THEIRS, "top1": published.to_numpy()}
theirs = pd.DataFrame(theirs)
lines = theirs.assign(drop=FLOAT - theirs.top1).to_dict("records")
for name, way in ways:
    numbers = mean((baseline, result) for result in ways[name, way])
    lines.append({"quantization": name, "way": way, **numbers})
table = pd.DataFrame(lines)
columns = ["top1", "drop", "low", "high"]
wide = table.pivot(index="quantization", columns="way", values=columns).reindex(NAMES)
show(wide.dropna(axis=1, how="all").round(2))

# %%
text = f"test images, {len(seeds)} calibration seed(s). The original's: "
text += "ResNet-50 on the official CIFAR-10 files, one run, from its README"
text = study.caption(baseline.n, text + "; paired 95 % intervals of ours")
words = tables.original().quantization.replace("fp32", "float")
drawn = table.assign(quantization=table.quantization.map(words))
study.save(ladder.original_rows(drawn, text), "10_seven_rows")

# %% [markdown]
# ## 4. The ladder
# From the original's hist to this workbook's default, one change a step, at 4 and 3 bits. Where folding is
# not yet done, BatchNorm is computed in float before a layer's result is stored. The ladder ends at the
# default; BatchNorm's statistics estimated anew on top of it are a step beyond, and stand apart.

# %%
STREAM = {"residual_bits": 8, "input_bits": 8}
LADDER = {
    "the original's hist": {},
    "BatchNorm kept as trained": {"batchnorm": "kept"},
    "ranges from the float network": {"ranges": None},
    "the search works": {"observer": "histogram"},
    "unsigned after ReLU": {"act_signed": False},
    "codes stored once": {"placement": "fused"},
    "image and stream 8 bits, zero-point": {**STREAM, "act_symmetric": False},
    "BatchNorm folded": {"fold": True},
    "one scale a channel": {"per_channel": True},
    "best range of weights": {"weight_observer": "lp"},
}
BEYOND = "BatchNorm re-estimated"

# %%
steps = itertools.accumulate(LADDER.values(), dict.__or__, initial=ORIGINAL)
states = dict(zip(LADDER, list(steps)[1:]))
assert states["best range of weights"] == OURS
states[BEYOND] = {**OURS, "batchnorm": "re-estimated", "fold": False}

# %%
top = {}
widths = (4, 3) if ablations and not study.smoke else (4,)
for s, bits, step in tqdm(list(itertools.product(seeds, widths, states))):
    name = f"W{bits}A{bits} ladder: {step}"
    top[step, bits, s] = measure(states[step], bits, s, name)

# %%
changes = []
pairs = list(itertools.pairwise([None, *states]))
for bits, (before, step) in itertools.product(widths, pairs):
    change = dict.fromkeys(("change", "low", "high"), np.nan)
    m = mean((top[before or step, bits, s], top[step, bits, s]) for s in seeds)
    if before:
        change = {"change": -m["drop"], "low": -m["high"], "high": -m["low"]}
    changes.append({"bits": bits, "step": step, "top1": m["top1"], **change})
changes = pd.DataFrame(changes)
columns = ["top1", "change", "low", "high"]
wide = changes.pivot(index="step", columns="bits", values=columns)
show(wide.reindex(states).round(2))
beyond = changes[changes.step == BEYOND]
changes = changes[changes.step != BEYOND]  # the ladder itself

# %%
dots = [
    {"bits": bits, "step": step, "top1": e.top1}
    for (step, bits, s), e in top.items() if step != BEYOND
]
text = (
    f"test images, float {baseline.top1:.2f} %; bars: mean of {len(seeds)} "
    "calibration "
)
text += "seed(s), dots: each seed; in brackets the paired 95 % interval of the step"
text = study.caption(baseline.n, text)
study.save(ladder.waterfall(changes, pd.DataFrame(dots), text), "10_ladder")


# %% [markdown]
# Per channel, folding changes next to nothing: a channel's factor goes into its scale, and the bias is
# rounded. Per tensor it does, because one range must then hold all channels' factors. So the order of the steps matters, and a step's bar is
# not the whole of what it is worth.
#
# ## 5. Why hist collapsed at 4 bits and fake-hist did not
# Both quantize the same network in the same places, with the same signed codes and the same training pass.
# Only the range of an edge differs, in two ways: what is taken of a batch (all, or 0.9999 of it) and how
# batches are joined (the widest, or an average). One at a time, and each with BatchNorm's statistics as
# the pass left them and as they were trained:

# %%
def hist_averaged():
    return Running(fraction=1.0, memory=0.9)

def fake_hist_widest():
    return Running(fraction=0.9999, memory=None)

KINDS = {f.__name__: f for f in (hist, hist_averaged, fake_hist_widest, fake_hist)}
why = pd.DataFrame(index=pd.Index(KINDS, name="top-1 in % at W4A4"))
kinds = KINDS if ablations else {"hist": hist, "fake_hist": fake_hist}
for b, kind in itertools.product(("moved", "kept"), kinds):
    settings = {**ORIGINAL, "ranges": KINDS[kind], "batchnorm": b}
    result = measure(settings, 4, seed, f"W4A4 {kind}, BatchNorm {b}")
    why.loc[kind, f"BatchNorm {b}"] = result.top1
show(why.round(2))


# %% [markdown]
# The ranges of both on every edge, and what they do to the values there: the fraction of the non-zero
# values that the middle code swallows.

# %%
def quantizers(kind):
    config = configured(4, ORIGINAL)
    qmodel = calibrated(config, "inputs", False, True, kind, True, seed)
    found = qmodel.quantizer_nodes.items()
    return {edge_name(n).removesuffix("_4bit"): q.qparams for n, q in found}

def swallowed(edge, q):
    centers, counts = edge.histogram()
    return float(counts[centers.abs() < q.scale.item() / 2].sum() / counts.sum())


# %%
edges = statistics("inputs", False, seed)
pair = {kind: quantizers(KINDS[kind]) for kind in ("hist", "fake_hist")}
columns = {}
for kind, found in pair.items():
    columns[f"step, {kind}"] = {n: q.scale.item() for n, q in found.items()}
    columns[f"become 0, {kind}"] = {n: swallowed(edges[n], q) for n, q in found.items()}
report = pd.DataFrame(columns)
report["ratio"] = report["step, hist"] / report["step, fake_hist"]
show(report.sort_values("ratio", ascending=False).head(8).round(3))

# %%
edge = report.ratio.idxmax()
ours = ql.choose_qparams(*observers.histogram(edges[edge], 4), 4)
codes = {"hist": pair["hist"][edge], "fake-hist": pair["fake_hist"][edge], "ours": ours}
values = {}
for name, q in codes.items():
    q = q.to("cpu")
    values[name] = (torch.arange(q.qmin, q.qmax + 1) - q.zero_point) * q.scale
text = f"values on edge {edge}, {n_calibration:,} calibration images; ranges for 4 "
text += f"bits after {n_batches} augmented batches (of hist: in the quantized network)"
text = study.caption(edges[edge].count, text)
title = f"The same edge, three sets of codes: {edge}"
figure = ladder.code_strips(edges[edge], values, text, title, "activation")
study.save(figure, "10_why_hist")


# %% [markdown]
# ## 6. Every repair alone, from both ends
# At 4 bits and with the first seed: the original plus one repair, and ours with that one repair undone.
# Where repairs only add up, both bars are equally long. Three conditions: a folded BatchNorm cannot move,
# so folding is measured against the original with BatchNorm kept; what BatchNorm re-estimation adds is
# undone and added back on the unfolded graph; a search in training mode looks at batches 1, 2, 4, 8, ...
# only.

# %%
class Searched:
    """Counts the values of batches 1, 2, 4, 8, ... and searches anew after each."""

    def __init__(self):
        self.edge, self.batches, self.range = EdgeStats(), 0, None

    def __call__(self, x, bits, symmetric):
        self.batches += 1
        if self.batches & (self.batches - 1) == 0:
            self.edge.update(x)
            # of signed codes only half are of use
            half = symmetric and self.edge.minimum >= 0
            self.range = observers.histogram(self.edge, max(bits - half, 2), symmetric)
        return self.range


# %%
UNFOLDED = {"fold": False}
FUSED = {"placement": "fused", **STREAM}
KEPT, AGAIN = {"batchnorm": "kept"}, {"batchnorm": "re-estimated", **UNFOLDED}
SEARCH = {"ranges": Searched}
SIGNED = {"act_signed": True, "act_symmetric": True}

# %%
# what it changes of the original, and what undoes it in ours
REPAIRS = {
    "BatchNorm kept as trained": (KEPT, AGAIN),
    "ranges from the float network": ({"ranges": None}, {**SEARCH, **UNFOLDED}),
    "the search works": (SEARCH, {"observer": "minmax"}),
    "unsigned after ReLU": ({"act_signed": False}, SIGNED),
    "codes stored once, stream 8 bits": (FUSED, {"placement": "inputs"}),
    "BatchNorm folded": ({"fold": True}, UNFOLDED),
    "one scale a channel": ({"per_channel": True}, {"per_channel": False}),
    "best range of weights": ({"weight_observer": "lp"}, {"weight_observer": "minmax"}),
}

# %%
ENDS = ("the original plus this", "ours minus this")

def worth(repair, end):
    change, undo = REPAIRS[repair]
    if end == ENDS[0]:
        without = ORIGINAL | (KEPT if repair == "BatchNorm folded" else {})
        repaired = without | change
    else:  # what needs a BatchNorm to move is compared on the unfolded graph
        moving = undo.keys() > UNFOLDED.keys()
        without, repaired = OURS | undo, OURS | (UNFOLDED if moving else {})
    name = f"W4A4 {end}: {repair}"
    m = mean([(measure(repaired, 4, seed, name), measure(without, 4, seed, name))])
    interval = {"low": m["low"], "high": m["high"]}
    return {"repair": repair, "end": end, "worth": m["drop"], **interval}


# %%
pairs = list(itertools.product(REPAIRS, ENDS)) if ablations else []
alone = pd.DataFrame([worth(*pair) for pair in tqdm(pairs)])
if ablations:
    columns = ["worth", "low", "high"]
    wide = alone.pivot(index="repair", columns="end", values=columns)
    show(wide.reindex(REPAIRS).round(2))
    first = top["the original's hist", 4, seed]
    ours = top["best range of weights", 4, seed]
    text = f"test images, W4A4, calibration seed {seed}, lines: paired 95 % interval; "
    text += f"the original's hist {first.top1:.1f} %, ours {ours.top1:.1f} %"
    figure = ladder.repair_bars(alone, study.caption(baseline.n, text))
    study.save(figure, "10_repairs")

# %% [markdown]
# **Why a repair can cost.** In the original's places the input of a ReLU is rounded, and what leaves the
# ReLU again. With the same signed codes on both sides the second rounding changes nothing; its README asks
# for just that. Finer codes or another range behind the ReLU do not bring back what the first rounding
# took, and round once more on another grid. Signal to noise behind the first ReLU, in decibels:

# %%
edges = statistics("inputs", False, seed)
before, after = edges["bn1"], edges["relu"]
x, counts = after.histogram()
counts = counts.double()

def codes_of(edge, observer, signed_codes):
    edge = signed({"it": edge})["it"] if signed_codes else edge
    config = ql.QuantConfig(observer=observer, act_symmetric=True)
    return ptq.choose_edge_qparams(edge, 4, config)


# %%
def snr(observer, signed_codes, twice=True):
    first = x.float()
    if twice:
        first = ql.fake_quantize(first, codes_of(before, observer, True))
    rounded = ql.fake_quantize(first, codes_of(after, observer, signed_codes))
    return decibels(counts @ x.square(), counts @ (rounded - x).double().square())


# %%
cases = {"signed, twice": (True,), "then unsigned": (False,)}
cases |= {"unsigned, once": (False, False)}
grids = pd.DataFrame({
    case: {o: snr(o, *options) for o in ("minmax", "histogram")}
    for case, options in cases.items()
})
show(grids.rename_axis("W4A4, dB").round(1))
print(f"{len(evaluations)} states measured and recorded")

# %% [markdown]
# ## What we learned
# Causes are claimed for this checkpoint only.

# %%
lost = table.set_index(["quantization", "way"])["drop"]
for name in PUBLISHED.index:
    theirs, its, right = (lost[name, way] for way in (THEIRS, ITS, RIGHT))
    print(
        f"- {name}: the original lost {theirs:.2f} points with its ResNet-50, "
        f"our {model} {its:.2f} its way and {right:.2f} the right way."
    )
m = report.median()
print(
    f"- On the median edge hist's step is {m['ratio']:.2f} times fake-hist's "
    f"({report.ratio.max():.2f} on {edge}); {m['become 0, hist']:.0%} of the non-zero "
    f"values become 0 instead of {m['become 0, fake_hist']:.0%}."
)

# %%
moved, kept = (why[f"BatchNorm {b}"] for b in ("moved", "kept"))
gained = moved["fake_hist"] - moved["hist"]
gift = moved - kept
print(
    f"- hist to fake-hist at W4A4: {gained:+.2f} points. BatchNorm re-estimation gave "
    f"{gift['hist']:+.2f} to hist and {gift['fake_hist']:+.2f} to fake-hist."
)
if ablations:
    clipped = moved["fake_hist_widest"] - moved["hist"]
    averaged = moved["hist_averaged"] - moved["hist"]
    print(
        f"- Leaving out the largest 0.01 % of every batch gives {clipped:+.2f} alone, "
        f"averaging over batches {averaged:+.2f}."
    )

# %%
for bits, part in changes.groupby("bits", sort=False):
    change = part.dropna().set_index("step").change
    up, down = change.idxmax(), change.idxmin()
    print(
        f"- Ladder at {bits} bits, {part.top1.iloc[0]:.2f} % to "
        f"{part.top1.iloc[-1]:.2f} %: "
        f'the largest gain is "{up}" with {change[up]:+.2f}, '
        f'the largest loss "{down}" with {change[down]:+.2f} points.'
    )
for row in beyond.itertuples():
    print(
        f"- Beyond the ladder, BatchNorm re-estimated at {row.bits} bits: "
        f"{row.change:+.2f} points [{row.low:+.2f}, {row.high:+.2f}]."
    )

# %%
minmax = grids.loc["minmax"] - grids.loc["minmax", "signed, twice"]
print(
    f"- Behind the first ReLU, unsigned codes are worth "
    f"{minmax['then unsigned']:+.1f} dB while its input is rounded too, "
    f"{minmax['unsigned, once']:+.1f} dB once it is not."
)

# %%
if ablations:
    sides = alone.pivot(index="repair", columns="end", values="worth")
    for end in ENDS:
        best, worst = sides[end].idxmax(), sides[end].idxmin()
        most, least = sides[end].max(), sides[end].min()
        words = f'most "{best}" ({most:+.2f}), least "{worst}" ({least:+.2f})'
        print(f"- W4A4, {end}: {words}.")
    gap = ours.top1 - first.top1
    print(
        "- One by one, the original's repairs are worth "
        f"{sides[ENDS[0]].sum():.2f} points, those undone in ours "
        f"{sides[ENDS[1]].sum():.2f}; together {gap:.2f}. "
        "The rest is interaction."
    )

# %% [markdown]
# <!-- findings:closing -->
# **Published.** Top-1 in % (and points against float; resnet20, cifar10-jpeg, 10,000 test images):
#
# | Quantization | Original | resnet20 on cifar10-jpeg, its way | resnet20 on cifar10-jpeg, right way |
# | --- | ---: | ---: | ---: |
# | fp32 | 93.62 | 87.37 | 87.37 |
# | 8 bits, built-in | 93.62 (+0.00) | 87.10 (-0.27 [-0.52, -0.02]) | 87.01 (-0.36 [-0.61, -0.11]) |
# | 8 bits, hist | 93.52 (-0.10) | 87.13 (-0.24 [-0.48, -0.00]) | 87.25 (-0.12 [-0.28, +0.03]) |
# | 8 bits, fake-hist | 93.41 (-0.21) | 87.11 (-0.26 [-0.47, -0.05]) | 87.25 (-0.12 [-0.28, +0.03]) |
# | 4 bits, hist | 64.62 (-29.00) | 53.48 (-33.89 [-34.92, -32.84]) | 85.17 (-2.20 [-2.69, -1.70]) |
# | 4 bits, fake-hist | 88.55 (-5.07) | 75.52 (-11.85 [-12.64, -11.05]) | 85.17 (-2.20 [-2.69, -1.70]) |
# | 3 bits, fake-hist | 50.76 (-42.86) | 25.98 (-61.39 [-62.41, -60.34]) | 74.62 (-12.75 [-13.56, -11.93]) |
# <!-- /findings -->
#
# Next: [11_questions](11_questions.ipynb), the questions of the original's README, each answered by a
# measurement.
