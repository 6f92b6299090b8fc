# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 04 · Observers: why a range is good
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/TimS-ml/Handwritten-Quantization/blob/main/notebooks/04_observers.ipynb)
#
# **Question.** What does every range setter decide, on which edge does it matter, and which layer broke?
#
# **Cost.** A minute on the digits; on 10,000 test images about five minutes for each calibration seed (three by default), on two CPU cores.

# %%
import os
import subprocess
import sys

if "google.colab" in sys.modules and not os.path.isdir("quantlab"):  # fetch the workbook; Colab keeps its own torch
    subprocess.check_call("test -d workbook || git clone --depth 1 https://github.com/TimS-ml/Handwritten-Quantization workbook; pip install -q -e workbook", shell=True)
    os.chdir("workbook")
    sys.path.insert(0, os.getcwd())

# %%
import itertools

import pandas as pd
import quantlab as ql
import torch
from quantlab import edgestats, observers, plots
from quantlab.analysis import distributions, sensitivity
from quantlab.plots import panel
from quantlab.rivals import pytorch as builtin
from quantlab.workbook import results
from tqdm.auto import tqdm

# %% tags=["parameters"]
data = "auto"  # auto, cifar10, digits, images, or the path of a folder or archive
model = "resnet20"  # resnet20 or resnet50
checkpoint = "auto"  # auto, or the path of a .safetensors file
seed = 0
preset = "auto"  # smoke, full, or auto: smoke on the digits
bits = 4  # 2 to 8, of the activations in sections 1, 3 and 5 and of everything in section 6
edge = "auto"  # name of the edge in sections 1 to 3, 7 and 8; auto: the one with the longest tail
observer = "histogram"  # of the figure in section 8
clip_share = 1.0  # of that observer's range, in section 8; 0.1 to 1.5
n_calibration = 0  # 0: 256 in a smoke run, 1,024 in a full one
n_seeds = 0  # calibration seeds in sections 4 and 5; 0: one in a smoke run, three in a full one

# %%
images = ql.load_data(data)
smoke = images.smoke if preset == "auto" else preset == "smoke"
limit = 1000 if smoke else None  # test images
n_calibration = n_calibration or min(256 if smoke else 1024, len(images.train))
n_seeds = n_seeds or (1 if smoke else 3)
network, card = ql.load_trained(model, images, checkpoint)
stats = ql.collect(network, images.calibration(n_calibration, seed))


# %% [markdown]
# ## 1. Seven decisions on one edge
# All of them read the same statistics, collected in one pass. *minmax* clips nothing, *percentile* a fixed share; *histogram* and *mse* search
# for the least error, the former over both ends, the latter by shrinking; *entropy* wants to keep the distribution's information; the two
# *aciq* assume a Laplace or a normal distribution and calculate.

# %%
def tail(name):
    e = stats.edges[name]
    return e.maximum / observers.percentile(e, bits)[1] if e.minimum >= 0 < e.maximum else 0

edge = max(stats.edges, key=tail) if edge == "auto" else edge
chosen = stats.edges[edge]
ranges = [(o, *setter(chosen, bits)) for o, setter in observers.OBSERVERS.items()]
ranges = pd.DataFrame(ranges, columns=["observer", "low", "high"])
text = plots.row_caption(images, model, chosen.count,
                         f"values on edge {edge} from {n_calibration:,} calibration images; ranges for {bits} bits")
figure = plots.clip_histogram(chosen, ranges, text, f"Where to clip? Edge {edge}", "activation")
plots.save(figure, "04_clip_ranges", images, model)


# %%
def error(observer, width):
    low, high = observers.OBSERVERS[observer](chosen, width)
    return observers.quantization_error(chosen, [low], [high], width).item()

errors = pd.DataFrame({f"{b} bits": {o: error(o, b) for o in observers.OBSERVERS} for b in (8, 6, 4, 3, 2)})
errors = errors.rename_axis("mean squared error")
assert (errors.loc["histogram"] <= errors.min() * 1.01).all(), "nobody beats the search on its own criterion"
errors.style.format("{:.2e}").highlight_min(color="#d7e7d0")

# %% [markdown]
# ## 2. Clipping against rounding
# A wide range rounds coarsely, a narrow one clips. The sum has one minimum, and the fewer the bits, the further in it lies.

# %%
shares = torch.linspace(0.03, 1, 98, dtype=torch.float64)

def split(width):
    low, high = shares * min(chosen.minimum, 0), shares * chosen.maximum
    clipping, rounding = distributions.split_error(chosen, low, high, width)
    return pd.DataFrame({"bits": width, "share": shares, "clipping": clipping, "rounding": rounding})

curve = pd.concat([split(b) for b in (8, 4, 3, 2)], ignore_index=True)
text = plots.row_caption(images, model, chosen.count, f"values on edge {edge}")
plots.save(plots.range_tradeoff(curve, text), "04_clipping_rounding", images, model)

# %% [markdown]
# ## 3. The landscape, and where everybody stands in it
# The same sum over the upper end of the range. Flat around the minimum: there it hardly matters who decides. Steep on the left: clipping too
# much costs more than clipping too little.

# %%
landscape = curve.assign(high=curve.share * chosen.maximum, error=curve.clipping + curve.rounding)
choices = pd.DataFrame([{"bits": b, "observer": o, "high": f(chosen, b)[1], "error": error(o, b)}
                        for b in (8, 4, 3, 2) for o, f in observers.OBSERVERS.items()])
plots.save(plots.error_landscape(landscape, choices, text), "04_landscape", images, model)

# %% [markdown]
# ## 4. The whole network
# Weights at 8 bits, so that only the activations' ranges differ between the lines.

# %%
baseline = ql.evaluate(network, images.test, limit=limit)

def measure(observer, act_bits, stats, s):
    config = ql.QuantConfig(weight_bits=8, act_bits=act_bits, observer=observer)
    qmodel = ql.quantize(network, stats, config)
    result = ql.evaluate(qmodel, images.test, limit=limit)
    return results.make_row(data=images, model=model, card=card, baseline=baseline, result=result, method="by hand",
                            config=config, n_calibration=n_calibration, seed=s, bytes=ql.weight_bytes(qmodel),
                            notebook="04_observers")


# %%
rows = []
for s in range(seed, seed + n_seeds):
    statistics = ql.collect(network, images.calibration(n_calibration, s))
    pairs = list(itertools.product(observers.OBSERVERS, (8, 4, 3)))
    rows += [measure(o, b, statistics, s) for o, b in tqdm(pairs, desc=f"seed {s}")]
frame = results.record(rows).assign(bits=lambda f: f.act_bits.astype(int))

# %%
text = plots.row_caption(images, model, baseline.n,
                         f"test images, weights 8 bits, {n_calibration:,} calibration images, {n_seeds} seed(s)")
figure = plots.accuracy_by_bits(frame, text, "bits of the activations (weights 8)")
plots.save(figure, "04_accuracy_by_observer", images, model)

# %%
summary = frame.groupby(["observer", "bits"], sort=False).top1.agg(["mean", "std"]).unstack("bits").round(2)
summary


# %% [markdown]
# ## 5. How many calibration images are enough?
# On the held-out images, because the answer is a choice. The band is the spread between seeds.

# %%
def heldout_top1(observer, n, s):
    statistics = ql.collect(network, images.calibration(n, s))
    qmodel = ql.quantize(network, statistics, ql.QuantConfig(weight_bits=8, act_bits=bits, observer=observer))
    top1 = ql.evaluate(qmodel, images.heldout, limit=limit).top1
    return {"observer": observer, "n": n, "seed": s, "top1": top1}

counts = [n for n in (4, 16, 64, 256, 1024) if n <= n_calibration]
grid = list(itertools.product(("minmax", "percentile", "histogram"), counts, range(seed, seed + n_seeds)))
enough = pd.DataFrame(heldout_top1(*g) for g in tqdm(grid))
n_heldout = min(limit or len(images.heldout), len(images.heldout))
text = plots.row_caption(images, model, n_heldout, f"held-out images, W8A{bits}, {n_seeds} seed(s)")
plots.save(plots.accuracy_by_images(enough, text), "04_calibration_images", images, model)

# %% [markdown]
# ## 6. Which layer broke?
# The ratio of signal to quantization noise at every rounded value, in decibels: on its way through the network (*sqnr*) and if this edge
# alone were rounded (*own_sqnr*). `added_db` is the noise that a step adds to what reached it; its largest values name the culprits.

# %%
qmodel = ql.quantize(network, stats, ql.QuantConfig(weight_bits=bits, act_bits=bits))
report = sensitivity.edge_errors(network, qmodel, images.calibration(64 if smoke else 256, seed + 100))
report.sort_values("added_db", ascending=False).head(8).round(1)

# %%
text = plots.row_caption(images, model, 64 if smoke else 256,
                         f"training images of another seed, W{bits}A{bits}, residual stream 8 bits")
plots.save(plots.edge_report(report, text), "04_edge_report", images, model)

# %% [markdown]
# ## 7. Levels and order: PyTorch's observers
# PyTorch's `HistogramObserver` searches for the range with the least squared error, as *histogram* does. Two things differ, and both are
# measured here on this edge's raw values: its search counts 256 levels whatever the width, and its histogram depends on the order of the
# batches, because old bins are spread over new ones whenever the range grows.

# %%
batches = images.calibration(min(256, n_calibration), seed, batch_size=8)
values = distributions.edge_values(network, edge, batches)
seen = edgestats.EdgeStats()
for batch in values:
    seen.update(batch)
eager = builtin.backends()[0]
print(f"{len(values)} batches of 8 images, {seen.count:,} values; PyTorch's side: {eager.note}")


# %%
def chosen_range(setter, width):
    if setter == "PyTorch":
        return builtin.torch_histogram_range(values, width)
    return observers.histogram(seen, width)

def measured(setter, width):
    low, high = chosen_range(setter, width)
    q = ql.choose_qparams(low, high, width)
    mse = sum((ql.fake_quantize(x, q) - x).square().sum().item() for x in values) / seen.count
    return {"bits": width, "by": setter, "upper end": high, "mean squared error": mse}

setters = ("ours", "PyTorch") if eager.available else ("ours",)
levels = pd.DataFrame(measured(s, b) for b in (8, 4, 3, 2) for s in setters).pivot(index="bits", columns="by")
levels.sort_index(ascending=False).style.format("{:.3g}")


# %% [markdown]
# A moving average of each batch's extremes is the one setter that cannot work from mergeable statistics: it is sequential by its definition.
# With PyTorch's c = 0.01 the first batch alone decides most of it. The same batches in four orders, and a second case for whoever expects order
# not to matter: 16 batches of a heavy-tailed tensor whose spread grows.

# %%
def moving_average(batches, c=0.01):  # as torch.ao's MovingAverageMinMaxObserver
    low, high = batches[0].aminmax()
    for x in batches[1:]:
        low, high = low + c * (x.min() - low), high + c * (x.max() - high)
    return low.item(), high.item()

def upper_ends(batches):
    together = edgestats.EdgeStats()
    for x in batches:
        together.update(x)
    theirs = {"PyTorch": builtin.torch_histogram_range(batches, 8)[1]} if eager.available else {}
    own = {"ours": observers.histogram(together, 8)[1], "moving average": moving_average(batches)[1]}
    return own | theirs


# %%
generator = torch.Generator().manual_seed(0)
growing = [torch.randn(2000, generator=generator) ** 3 * 2 ** (i / 4) for i in range(16)]
cases = {edge: values, "heavy tail": growing}
orders = {"as drawn": lambda b: b, "reversed": lambda b: b[::-1],
          "largest batch first": lambda b: sorted(b, key=lambda x: -x.max()),
          "largest batch last": lambda b: sorted(b, key=lambda x: x.max())}
upper = {(case, name): upper_ends(order(b)) for case, b in cases.items() for name, order in orders.items()}
order_table = pd.DataFrame(upper).T.rename_axis(["upper end of the range at 8 bits", "order"])
assert (order_table.ours.groupby(level=0).nunique() == 1).all(), "ours: the same range in every order"
order_table.style.format("{:.4g}")

# %% [markdown]
# ## 8. Turn the knobs
# First the figure for the parameters at the top, then the same figure under four controls: any edge, width and observer, and a slider that
# scales the observer's range. The controls need a running kernel (JupyterLab or Colab). Try 3 bits and a range below 1, then 8 bits.

# %%
text = plots.row_caption(images, model, n_calibration, "calibration images")
decided = observers.find_observer(observer)(chosen, bits)
figure = panel.range_figure(chosen, edge, bits, observer, decided, clip_share, text)
plots.save(figure, "04_panel", images, model)

# %%
panel.range_panel(stats.edges, text, edge=edge, bits=bits, observer=observer, share=clip_share)

# %% [markdown]
# ## What we learned

# %%
lost = frame.groupby(["bits", "observer"])["drop"].mean()
for b in (8, 4, 3):
    best, worst = lost[b].idxmin(), lost[b].idxmax()
    print(f"- Activations at {b} bits, weights at 8: {lost[b].min():+.2f} points lost with {best}, "
          f"{lost[b].max():+.2f} with {worst}.")
last = enough[enough.observer == "histogram"].groupby("n").top1.mean()
print(f"- With histogram, {last.index[0]} images give {last.iloc[0]:.2f} % on held-out images, "
      f"{last.index[-1]:,} give {last.iloc[-1]:.2f} %.")
low = report.loc[report.sqnr.idxmin()]
print(f"- At W{bits}A{bits} the noisiest edge is {low.edge} ({low.role}, {low.bits} bits): {low.sqnr:.1f} dB, "
      f"{low.own_sqnr:.1f} dB of its own.")

# %%
if eager.available:
    ratio = levels["mean squared error"].PyTorch / levels["mean squared error"].ours
    print(f"- On {edge}, PyTorch's observer leaves {ratio[8]:.2f} times our squared error at 8 bits, "
          f"{ratio[4]:.1f} times at 4 and {ratio[3]:.1f} times at 3, where it still counts 256 levels.")
apart = (order_table.groupby(level=0).max() / order_table.groupby(level=0).min() - 1).drop(columns="ours")
for case, row in apart.iterrows():
    by = ", ".join(f"{share:.1%} ({name})" for name, share in row.items())
    print(f"- {case}: the order of the batches moves the upper end by {by}; ours does not move.")
weight = 0.99 ** (len(values) - 1)
print(f"- After {len(values)} batches the first one holds {weight:.0%} of a moving average with c = 0.01.")

# %% [markdown]
# Next: [05_activation_histograms](05_activation_histograms.ipynb), every layer's distribution and what its shape costs.
