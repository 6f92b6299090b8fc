# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 10 · The original experiment
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/TimS-ml/Handwritten-Quantization/blob/main/notebooks/10_original_experiment.ipynb)
#
# **Question.** In 2021 this project published seven rows; at 4 bits its histogram observer fell to 64.62 % while a simple order statistic kept
# 88.55 %. Why, and what does each of its decisions cost?
#
# **Cost.** Under a minute on the digits. On 10,000 test images with three calibration seeds 98 evaluations and 26 calibrations in
# training mode: about half an hour on two CPU cores.

# %%
import os
import subprocess
import sys

if "google.colab" in sys.modules and not os.path.isdir("quantlab"):  # fetch the workbook; Colab keeps its own torch
    subprocess.check_call("test -d workbook || git clone --depth 1 https://github.com/TimS-ml/Handwritten-Quantization workbook; pip install -q -e workbook", shell=True)
    os.chdir("workbook")
    sys.path.insert(0, os.getcwd())

# %%
import bisect
import copy
import functools
import itertools

import numpy as np
import pandas as pd
import quantlab as ql
import torch
from quantlab import edgestats, observers, plots, ptq
from quantlab.networks.train import augment, default_config
from quantlab.rivals import pytorch as builtin
from quantlab.workbook import results, tables
from tqdm.auto import tqdm

# %% tags=["parameters"]
data = "auto"  # auto, cifar10, digits, images, or the path of a folder or archive
model = "resnet20"  # resnet20 or resnet50
checkpoint = "auto"  # auto, or the path of a .safetensors file
seed = 0
preset = "auto"  # smoke, full, or auto: smoke on the digits
n_calibration = 0  # images for our ranges; 0: 256 in a smoke run, 1,024 in a full one
n_batches = 0  # augmented batches of 128 for the original's; 0: 4 in a smoke run, 51 in a full one, as it had
n_seeds = 0  # calibration seeds of the rows below 8 bits and of the ladder; the rest has the first. 0: one in a smoke run, three in a full one

# %%
images = ql.load_data(data)
smoke = images.smoke if preset == "auto" else preset == "smoke"
limit = 1000 if smoke else None  # test images
n_calibration = n_calibration or min(256 if smoke else 1024, len(images.train))
n_batches = min(n_batches or (4 if smoke else 51), len(images.train) // 128)
seeds = list(range(seed, seed + (n_seeds or (1 if smoke else 3))))
network, card = ql.load_trained(model, images, checkpoint)
baseline = ql.evaluate(network, images.test, limit=limit)


# %% [markdown]
# ## 1. Its two observers
# **hist** was modelled on PyTorch's `HistogramObserver`: 2,048 bins over the batch's own range, then a search that moves one end inwards by
# 0.00001 of the values at a time and stops at the first increase of the squared error. Where the number of levels belongs, $2^b$, it had $b$.
# (Written here from its description; the error takes a value for the middle of its bin.)

# %%
def squared_error(counts, first, last, levels):
    """Of merging bins first..last into `levels` equal groups, in squared bin widths; what lies beyond is clipped."""
    width = (last - first + 1) / levels
    position = np.arange(len(counts)) + 0.5 - first
    group = np.clip(position // width, 0, levels - 1)
    return float(counts @ (position - (group + 0.5) * width) ** 2)


# %%
def greedy_search(x, levels, bins=2048, step=1e-5):
    low, width, counts = x.min().item(), (x.max() - x.min()).item() / bins, torch.histc(x, bins).double().numpy()
    share = (counts.cumsum() / counts.sum()).tolist()
    (first, last), alpha, beta, least = (0, bins - 1), 0.0, 1.0, float("inf")
    while alpha < beta:
        left = min(max(bisect.bisect_left(share, alpha + step), first), last)
        right = max(min(bisect.bisect_right(share, beta - step) - 1, last), first)
        up = left - first > last - right
        moved, alpha, beta = ((left, last), alpha + step, beta) if up else ((first, right), alpha, beta - step)
        if moved != (first, last):
            if (error := squared_error(counts, *moved, levels)) > least:
                break
            (first, last), least = moved, error
    return low + width * first, low + width * (last + 1)


# %% [markdown]
# What the search proposes does not matter. The batch's whole range has already entered a running minimum and maximum, and the proposal goes
# through the same running minimum and maximum, which only widen. A range inside them changes nothing: **hist is min-max**. Three batches
# on the edge behind the first ReLU:

# %%
@functools.cache
def statistics(placement, fold_batchnorm, s):
    return ql.collect(network, images.calibration(n_calibration, s), placement, fold_batchnorm=fold_batchnorm)

def augmented(s, n=n_batches):
    """The original's calibration data: batches of 128 training images, cropped and mirrored as in training."""
    recipe, generator = default_config(model, images), torch.Generator().manual_seed(s)
    for index in torch.randperm(len(images.train), generator=generator)[: 128 * n].split(128):
        batch = augment(images.train.images[index], generator, recipe.crop, recipe.flip, 0, images.train.mean)
        yield images.train.normalize(batch).to(next(network.parameters()).device)


# %%
low, high, lines = 0.0, 0.0, []
for batch in augmented(seed, 3):
    with torch.no_grad():
        x = network.bn1(network.conv1(batch)).relu().cpu()
    proposed = {levels: greedy_search(x, levels)[1] for levels in (4, 16)}
    low, high = min(low, x.min().item()), max(high, x.max().item())  # the whole range enters first,
    after = max(high, proposed[4])  # then the proposal
    lines.append({"whole range": x.max().item(), **{f"proposed for {k} levels": v for k, v in proposed.items()}, "kept": after})
    assert abs(after - high) <= 1e-4 * high, "the proposal lies inside what is kept already"
pd.DataFrame(lines, index=pd.Index(range(1, len(lines) + 1), name="batch")).round(3)


# %% [markdown]
# **fake-hist** takes the int(0.9999 N)-th smallest $|x|$ of a batch; the first batch sets the range, every later one moves it by a tenth of the
# difference. Both depend on the order of the batches. A class of a few lines is enough for them and for everything in between:

# %%
class Running:
    """Range of one edge over the batches it sees: of a batch `share` of its |x|; over batches the widest, or an average that keeps `memory`."""

    def __init__(self, share, memory):
        self.share, self.memory, self.range = share, memory, None

    def __call__(self, x, bits, symmetric):
        now = torch.stack(torch.aminmax(x)).cpu()
        if self.share < 1:
            k = int(self.share * x.numel()) - 1
            now = torch.tensor([0.0, np.partition(x.abs().flatten().cpu(), k)[k]])
        old = now if self.range is None else self.range
        widest = torch.stack([min(old[0], now[0]), max(old[1], now[1])])
        self.range = widest if self.memory is None else self.memory * old + (1 - self.memory) * now
        return tuple(self.range.tolist())


# %%
def hist():
    return Running(share=1.0, memory=None)

def fake_hist():
    return Running(share=0.9999, memory=0.9)

x = torch.randn(10_007, generator=torch.Generator().manual_seed(0))
assert fake_hist()(x, 4, True)[1] == x.abs().kthvalue(int(0.9999 * len(x))).values.item()


# %% [markdown]
# ## 2. Its seven rows
# Its way: a quantizer in front of every convolution, linear layer, ReLU and pool; all codes signed and symmetric, also behind a ReLU;
# weights over their whole range, one scale a tensor (the linear layer: one a row); BatchNorm not folded. And calibration ran **the quantized
# network in training mode**: the quantizers followed their inputs while they rounded them, and BatchNorm overwrote its running statistics.
# So what was published is quantization *plus BatchNorm re-estimation*, which its README does not say.

# %%
def follow(running, symmetric, quantizer, inputs):
    """Set a Quantizer's range from what is about to pass it."""
    low, high = running(inputs[0], quantizer.qparams.bits, symmetric)
    q = ql.choose_qparams(low, high, quantizer.qparams.bits, symmetric=symmetric, signed=quantizer.qmin < 0)
    quantizer.scale.copy_(q.scale)
    quantizer.zero_point.copy_(q.zero_point)


# %%
@torch.no_grad()
def training_pass(qmodel, batches, observer=None, momentum=0.1):
    """Run in training mode: BatchNorm moves (momentum None: to the plain average); an `observer` sets every quantizer's range as it goes."""
    hooks = [m.register_forward_pre_hook(functools.partial(follow, observer(), qmodel.config.act_symmetric))
             for m in qmodel.modules() if isinstance(m, ptq.Quantizer) and observer]
    for norm in (m for m in qmodel.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        norm.momentum = momentum
    for batch in batches:
        qmodel.train()(batch.to(next(qmodel.parameters()).device))
    for hook in hooks:
        hook.remove()
    return qmodel.eval()


# %%
def weights_by_row(qmodel, config):
    """The original gave every row of a linear layer its own scale, and every convolution one."""
    for name, layer in qmodel.named_modules():
        if isinstance(layer, torch.nn.Linear) and not config.per_channel:
            weight = network.get_submodule(name).weight.detach()
            low, high = observers.weight_range(weight, config.weight_bits, observer=config.weight_observer, p=config.weight_norm)
            layer.weight_qparams = ql.choose_qparams(low, high, config.weight_bits, symmetric=True, axis=0).to(weight.device)
            layer.weight.data.copy_(ql.fake_quantize(weight, layer.weight_qparams))
    return qmodel

@functools.lru_cache(maxsize=4)
def calibrated(config, ranges, moved, s):
    stats = statistics(config.placement, config.fold_batchnorm, s)
    qmodel = weights_by_row(ql.quantize(network, stats, config), config)
    return training_pass(qmodel, augmented(s), ranges) if moved else qmodel


# %% [markdown]
# Two ends and everything between them are dictionaries: the fields of `QuantConfig`, where the ranges come from (`ranges`: an observer that
# follows the training pass, or None: our one pass over the float network) and what happens to BatchNorm.

# %%
OURS = dict(ranges=None, batchnorm="kept", observer="histogram", act_symmetric=False, act_signed=False, placement="fused", residual_bits=8,
            input_bits=8, fold_batchnorm=True, per_channel=True, weight_observer="lp")
ORIGINAL = dict(ranges=hist, batchnorm="moved", observer="minmax", act_symmetric=True, act_signed=True, placement="inputs", residual_bits=None,
                input_bits=None, fold_batchnorm=False, per_channel=False, weight_observer="minmax")


# %%
def build(bits, s, ranges, batchnorm, input_bits, **settings):
    config = ql.QuantConfig(weight_bits=bits, act_bits=bits, input_bits=input_bits or bits, **settings)
    qmodel = copy.deepcopy(calibrated(config, ranges, bool(ranges) or batchnorm == "moved", s))
    qmodel.config = config
    if batchnorm == "kept":  # as trained
        qmodel.load_state_dict({k: v for k, v in network.state_dict().items() if "running" in k}, strict=False)
    if batchnorm == "re-estimated":
        for norm in (m for m in qmodel.modules() if isinstance(m, torch.nn.BatchNorm2d)):
            norm.reset_running_stats()
        training_pass(qmodel, images.calibration(n_calibration, s), momentum=None)
    return qmodel


# %%
evaluations, rows = {}, []

def add_row(result, method, name, s, n, size, **more):
    rows.append(results.make_row(data=images, model=model, card=card, baseline=baseline, result=result, method=method, corrections=name, seed=s,
                                 n_calibration=n, bytes=size, notebook="10_original_experiment", **more))
    results.record(rows[-1:])  # at once: a run that is stopped keeps them


# %%
def measure(settings, bits, s, name, method="ablation"):
    """The Evaluation of one state on the test images; each is measured once and recorded under the first name it is asked for by."""
    key = str((bits, s, sorted((k, getattr(v, "__name__", str(v))) for k, v in settings.items())))
    if key not in evaluations:
        qmodel = build(bits, s, **settings)
        evaluations[key] = ql.evaluate(qmodel, images.test, limit=limit)
        passed = settings["ranges"] or settings["batchnorm"] == "moved"
        more = {"observer": settings["ranges"].__name__} if settings["ranges"] else {}
        add_row(evaluations[key], method, name, s, 128 * n_batches if passed else n_calibration, ql.weight_bytes(qmodel), config=qmodel.config, **more)
    return evaluations[key]


# %% [markdown]
# The rows below 8 bits over all seeds. The right way is this workbook's default at the same width.

# %%
published = tables.original().top1  # in %, of ResNet-50 on the official files, from its README
FLOAT = published["fp32 original"]
PUBLISHED = published.drop(["fp32 original", "8bit built-in"])
WAYS = list(plots.ladder.WAYS)
ways = {("fp32 original", way): [baseline] for way in WAYS[1:]}
for name, s in tqdm([(n, s) for n in PUBLISHED.index for s in (seeds[:1] if n[0] == "8" else seeds)]):
    ranges = {"hist": hist, "fake-hist": fake_hist}[name[5:]]
    ways.setdefault((name, WAYS[1]), []).append(measure({**ORIGINAL, "ranges": ranges}, int(name[0]), s, name, "original"))
    ways.setdefault((name, WAYS[2]), []).append(measure(OURS, int(name[0]), s, "", "by hand"))

# %% [markdown]
# The built-in row: eager int8 with 7-bit activations, calibrated on one batch of *test* images; the right way is on training images.

# %%
ready = next(backend for backend in builtin.backends() if backend.name == "eager")
print(ready.note)
order = torch.randperm(len(images.test), generator=torch.Generator().manual_seed(seed))[:128]
sets = {WAYS[1]: [next(images.test.subset(order).batches(128))[0]], WAYS[2]: images.calibration(n_calibration, seed)}
for way, calibration in sets.items() if ready.available else []:
    int8 = builtin.eager_int8(copy.deepcopy(network).cpu().to(memory_format=torch.channels_last), calibration)
    result = ql.evaluate(int8, images.test, limit=limit, on="cpu")
    ways["8bit built-in", way] = [result]
    if way == WAYS[1]:
        add_row(result, "original", "8bit built-in on 128 test images", seed, 128, builtin.bytes_on_disk(int8), weight_bits=8,
                act_bits=builtin.eager_act_bits())


# %%
def mean(pairs):
    """Of (Evaluation before, after), over seeds: top-1 after, points lost and their paired 95 % interval."""
    lost = [(after.top1, *ql.paired_drop(before.correct, after.correct)) for before, after in pairs]
    return dict(zip(("top1", "drop", "low", "high"), np.mean(lost, axis=0)))

NAMES = list(published.index)
table = [{"quantization": n, "way": WAYS[0], "top1": published[n], "drop": FLOAT - published[n]} for n in NAMES]
table += [{"quantization": n, "way": w, **mean((baseline, e) for e in ways[n, w])} for n in NAMES for w in WAYS[1:] if (n, w) in ways]
table = pd.DataFrame(table)
table.pivot(index="quantization", columns="way", values=["top1", "drop", "low", "high"]).reindex(NAMES).dropna(axis=1, how="all").round(2)

# %%
text = plots.row_caption(images, model, baseline.n, f"test images, {len(seeds)} calibration seed(s) below 8 bits. The original's: ResNet-50 on the official "
                         "CIFAR-10 files, 10,000 test images, one run, from its README")
plots.save(plots.original_rows(table, text), "10_seven_rows", images, model)


# %% [markdown]
# ## 3. Why hist collapsed at 4 bits and fake-hist did not
# Both quantize the same network in the same places, with the same signed codes and the same training pass. Only the range of an edge differs,
# in two ways: what is taken of a batch (all, or 0.9999 of it) and how batches are joined (the widest, or an average). One at a time, and
# each with BatchNorm's statistics as the pass left them and as they were trained:

# %%
def hist_averaged():
    return Running(share=1.0, memory=0.9)

def fake_hist_widest():
    return Running(share=0.9999, memory=None)

KINDS = {f.__name__: f for f in (hist, hist_averaged, fake_hist_widest, fake_hist)}
found = {(k, b): measure({**ORIGINAL, "ranges": KINDS[k], "batchnorm": b}, 4, seed, f"W4A4 {k}, BatchNorm {b}")
         for k, b in tqdm(list(itertools.product(KINDS, ("moved", "kept"))))}
why = pd.DataFrame({f"BatchNorm {b}": {k: found[k, b].top1 for k in KINDS} for b in ("moved", "kept")})
why.rename_axis("top-1 in % at W4A4").round(2)


# %% [markdown]
# The ranges of both on every edge, and what they do to the values there: the share of the non-zero values that the middle code swallows.

# %%
def quantizers(kind):
    config = ql.QuantConfig(4, 4, input_bits=4, **{k: v for k, v in ORIGINAL.items() if k not in ("ranges", "batchnorm", "input_bits")})
    named = calibrated(config, kind, True, seed).named_modules()
    return {n.removeprefix("quantizers.").removesuffix("_4bit"): m.qparams for n, m in named if isinstance(m, ptq.Quantizer)}

def swallowed(edge, q):
    centers, counts = edge.histogram()
    return float(counts[centers.abs() < q.scale.item() / 2].sum() / counts.sum())

edges, pair = statistics("inputs", False, seed).edges, {k: quantizers(KINDS[k]) for k in ("hist", "fake_hist")}
step = pd.DataFrame({k: {n: q.scale.item() for n, q in named.items()} for k, named in pair.items()})
zeros = pd.DataFrame({k: {n: swallowed(edges[n], q) for n, q in named.items()} for k, named in pair.items()})
report = step.add_prefix("step, ").join(zeros.add_prefix("become 0, ")).assign(ratio=step["hist"] / step["fake_hist"])
report.sort_values("ratio", ascending=False).head(8).round(3)

# %%
edge = report.ratio.idxmax()
low, high = observers.histogram(edges[edge], 4)
codes = {"hist": pair["hist"][edge], "fake-hist": pair["fake_hist"][edge], "ours": ql.choose_qparams(low, high, 4)}
levels = {k: (torch.arange(q.qmin, q.qmax + 1) - q.zero_point.cpu()) * q.scale.cpu() for k, q in codes.items()}
text = plots.row_caption(images, model, edges[edge].count, f"values on edge {edge}, {n_calibration:,} calibration images; ranges for 4 bits after "
                         f"{n_batches} augmented batches")
plots.save(plots.code_strips(edges[edge], levels, text, f"The same edge, three sets of codes: {edge}", "activation"), "10_why_hist", images, model)

# %% [markdown]
# ## 4. The ladder
# From the original's hist to this workbook's default, one change a step, at 4 and 3 bits. Where folding is not yet done, BatchNorm is
# computed in float before a layer's result is stored.

# %%
LADDER = {
    "the original's hist": {}, "BatchNorm kept as trained": {"batchnorm": "kept"}, "ranges from the float network": {"ranges": None},
    "the search works": {"observer": "histogram"}, "unsigned after ReLU": {"act_signed": False}, "codes stored once": {"placement": "fused"},
    "image and stream 8 bits, zero-point": {"residual_bits": 8, "input_bits": 8, "act_symmetric": False},
    "BatchNorm folded": {"fold_batchnorm": True}, "one scale a channel": {"per_channel": True},
    "best range of weights": {"weight_observer": "lp"}, "BatchNorm re-estimated": {"batchnorm": "re-estimated", "fold_batchnorm": False},
}
states = dict(zip(LADDER, list(itertools.accumulate(LADDER.values(), dict.__or__, initial=ORIGINAL))[1:]))
assert states["best range of weights"] == OURS

# %%
top = {(step, bits, s): measure(states[step], bits, s, f"W{bits}A{bits} ladder: {step}") for s, bits, step in tqdm(list(itertools.product(seeds, (4, 3), LADDER)))}
ladder = []
for bits, (before, step) in itertools.product((4, 3), itertools.pairwise([None, *LADDER])):
    m = mean((top[before or step, bits, s], top[step, bits, s]) for s in seeds)
    change = {"change": -m["drop"], "low": -m["high"], "high": -m["low"]} if before else dict.fromkeys(("change", "low", "high"), np.nan)
    ladder.append({"bits": bits, "step": step, "top1": m["top1"], **change})
ladder = pd.DataFrame(ladder)
ladder.pivot(index="step", columns="bits", values=["top1", "change", "low", "high"]).reindex(LADDER).round(2)

# %%
dots = pd.DataFrame([{"bits": b, "step": step, "top1": e.top1} for (step, b, s), e in top.items()])
text = plots.row_caption(images, model, baseline.n, f"test images, float {baseline.top1:.2f} %; bars: mean of {len(seeds)} calibration seed(s), dots: "
                         "each seed; in brackets the paired 95 % interval of the step")
plots.save(plots.waterfall(ladder, dots, text), "10_ladder", images, model)


# %% [markdown]
# Per channel, folding changes nothing: a channel's factor goes into its scale. Per tensor it does, because one range must then hold
# all channels' factors. So the order of the steps matters, and a step's bar is not the whole of what it is worth.
#
# ## 5. Every repair alone, from both ends
# At 4 bits and with the first seed: the original plus one repair, and ours with that one repair undone. Where repairs only add up, both bars are equally long. Three
# conditions: a folded BatchNorm cannot move, so folding is measured against the original with BatchNorm kept; what BatchNorm re-estimation adds is
# undone and added back on the unfolded graph; a search in training mode looks at batches 1, 2, 4, 8, … only.

# %%
class Searched:
    """Counts the values of batches 1, 2, 4, 8, … and searches anew after each."""

    def __init__(self):
        self.edge, self.batches, self.range = edgestats.EdgeStats(), 0, None

    def __call__(self, x, bits, symmetric):
        self.batches += 1
        if self.batches & (self.batches - 1) == 0:
            self.edge.update(x)
            half = symmetric and self.edge.minimum >= 0  # signed codes, of which only half are of use
            self.range = observers.histogram(self.edge, max(bits - half, 2), symmetric)
        return self.range


# %%
UNFOLDED = {"fold_batchnorm": False}
FUSED = {"placement": "fused", "residual_bits": 8, "input_bits": 8}
REPAIRS = {  # what it changes of the original, what undoes it in ours, and what both sides of the original's comparison have beside
    "BatchNorm kept as trained": ({"batchnorm": "kept"}, {"batchnorm": "re-estimated", **UNFOLDED}, {}),
    "ranges from the float network": ({"ranges": None}, {"ranges": Searched, **UNFOLDED}, {}),
    "the search works": ({"ranges": Searched}, {"observer": "minmax"}, {}),
    "unsigned after ReLU": ({"act_signed": False}, {"act_signed": True, "act_symmetric": True}, {}),
    "codes stored once, stream 8 bits": (FUSED, {"placement": "inputs"}, {}),
    "BatchNorm folded": ({"fold_batchnorm": True}, UNFOLDED, {"batchnorm": "kept"}),
    "one scale a channel": ({"per_channel": True}, {"per_channel": False}, {}),
    "best range of weights": ({"weight_observer": "lp"}, {"weight_observer": "minmax"}, {}),
}


# %%
def worth(repair, end):
    change, undo, beside = REPAIRS[repair]
    if end == "the original plus this":
        without, repaired = ORIGINAL | beside, ORIGINAL | beside | change
    else:  # what needs a BatchNorm to move is compared on the unfolded graph
        without, repaired = OURS | undo, OURS | (UNFOLDED if undo.keys() > UNFOLDED.keys() else {})
    name = f"W4A4 {end}: {repair}"
    m = mean([(measure(repaired, 4, seed, name), measure(without, 4, seed, name))])
    return {"repair": repair, "end": end, "worth": m["drop"], "low": m["low"], "high": m["high"]}

ends = ("the original plus this", "ours minus this")
alone = pd.DataFrame([worth(*g) for g in tqdm(list(itertools.product(REPAIRS, ends)))])
alone.pivot(index="repair", columns="end", values=["worth", "low", "high"]).reindex(REPAIRS).round(2)

# %%
text = plots.row_caption(images, model, baseline.n, f"test images, W4A4, calibration seed {seed}, lines: paired 95 % interval; the original's "
                         f"hist {top[next(iter(LADDER)), 4, seed].top1:.1f} %, ours {top['best range of weights', 4, seed].top1:.1f} %")
plots.save(plots.repair_bars(alone, text), "10_repairs", images, model)

# %% [markdown]
# **Why a repair can cost.** In the original's places the input of a ReLU is rounded, and what leaves the ReLU again. With the same signed codes on
# both sides the second rounding changes nothing; its README asks for just that. Finer codes or another range behind the ReLU do not bring
# back what the first rounding took, and round once more on another grid. Signal to noise behind the first ReLU, in decibels:

# %%
before, after = (statistics("inputs", False, seed).edges[n] for n in ("bn1", "relu"))
x, counts = after.histogram()

def snr(observer, signed, twice=True):
    def choose(edge, signed):
        return ptq.choose_edge_qparams(edge, 4, ql.QuantConfig(observer=observer, act_symmetric=True, act_signed=signed))
    first = ql.fake_quantize(x.float(), choose(before, True)) if twice else x.float()
    noise = counts.double() @ (ql.fake_quantize(first, choose(after, signed)) - x).double().square()
    return 10 * torch.log10(counts.double() @ x.square() / noise).item()

CASES = {"signed, twice": (True,), "then unsigned": (False,), "unsigned, once": (False, False)}
grids = pd.DataFrame({case: {o: snr(o, *options) for o in ("minmax", "histogram")} for case, options in CASES.items()})
grids.rename_axis("W4A4, dB").round(1)

# %%
print(f"{len(rows)} rows recorded")

# %% [markdown]
# ## What we learned
# Causes are claimed for this checkpoint only.

# %%
lost = table.set_index(["quantization", "way"])["drop"]
for name in PUBLISHED.index:
    print(f"- {name}: the original lost {lost[name, WAYS[0]]:.2f} points with its ResNet-50, our {model} {lost[name, WAYS[1]]:.2f} its way "
          f"and {lost[name, WAYS[2]]:.2f} the right way.")
w, kept = (why[f"BatchNorm {b}"].to_dict() for b in ("moved", "kept"))
print(f"- hist to fake-hist at W4A4: {w['fake_hist'] - w['hist']:+.2f} points. Leaving out the largest 0.01 % of every batch does "
      f"{w['fake_hist_widest'] - w['hist']:+.2f} alone, averaging over batches {w['hist_averaged'] - w['hist']:+.2f}.")
m = report.median()
print(f"- On the median edge hist's step is {m['ratio']:.2f} times fake-hist's ({report.ratio.max():.2f} on {edge}), and {m['become 0, hist']:.0%} of the "
      f"non-zero values become 0 instead of {m['become 0, fake_hist']:.0%}.")
gift = {k: w[k] - kept[k] for k in ("hist", "fake_hist")}
print(f"- Of these accuracies at W4A4, BatchNorm re-estimation gave {gift['hist']:+.2f} points to hist and {gift['fake_hist']:+.2f} to fake-hist.")

# %%
for bits, part in ladder.groupby("bits", sort=False):
    steps = part.dropna().set_index("step")
    up, down = steps.change.idxmax(), steps.change.idxmin()
    print(f"- Ladder at {bits} bits, {part.top1.iloc[0]:.2f} % to {part.top1.iloc[-1]:.2f} % (float {baseline.top1:.2f} %): the largest gain is \"{up}\" with "
          f"{steps.change[up]:+.2f}, the largest loss \"{down}\" with {steps.change[down]:+.2f} points.")
sides = alone.pivot(index="repair", columns="end", values="worth")[list(ends)]
for end in ends:
    print(f"- W4A4, {end}: worth most is \"{sides[end].idxmax()}\" with {sides[end].max():+.2f} points, least \"{sides[end].idxmin()}\" with {sides[end].min():+.2f}.")
print(f"- Behind the first ReLU, unsigned codes are worth {grids['then unsigned']['minmax'] - grids['signed, twice']['minmax']:+.1f} dB while its input is rounded "
      f"too, and {grids['unsigned, once']['minmax'] - grids['signed, twice']['minmax']:+.1f} dB once it is not (both over the whole range, 4 bits).")
gap = top["best range of weights", 4, seed].top1 - top["the original's hist", 4, seed].top1
print(f"- Added up one by one, the repairs of the original are worth {sides[ends[0]].sum():.2f} points and those undone in ours {sides[ends[1]].sum():.2f}; "
      f"together they are worth {gap:.2f}. The difference is interaction.")

# %% [markdown]
# Next: [13_report](13_report.ipynb), everything measured so far on one page.
