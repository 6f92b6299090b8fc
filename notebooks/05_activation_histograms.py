# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 05 · Activation histograms: what has to fit into a range
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/TimS-ml/Handwritten-Quantization/blob/main/notebooks/05_activation_histograms.ipynb)
#
# **Question.** What do the values of every layer look like, before and after the ReLU, and what does their shape cost at low bits?
#
# **Cost.** Half a minute on the digits; with 1,024 calibration images a few minutes on two CPU cores. No test image is looked at.

# %%
import os
import subprocess
import sys

if "google.colab" in sys.modules and not os.path.isdir("quantlab"):  # fetch the workbook; Colab keeps its own torch
    subprocess.check_call("test -d workbook || git clone --depth 1 https://github.com/TimS-ml/Handwritten-Quantization workbook; pip install -q -e workbook", shell=True)
    os.chdir("workbook")
    sys.path.insert(0, os.getcwd())

# %%
import pandas as pd
import quantlab as ql
from IPython.display import display
from quantlab import observers, plots
from quantlab.analysis import distributions
from scipy import stats as statistics

# %% tags=["parameters"]
data = "auto"  # auto, cifar10, digits, images, or the path of a folder or archive
model = "resnet20"  # resnet20 or resnet50
checkpoint = "auto"  # auto, or the path of a .safetensors file
seed = 0
preset = "auto"  # smoke, full, or auto: smoke on the digits
bits = 4  # 2 to 8, of the ranges drawn and of the costs in sections 4 and 5
n_calibration = 0  # 0: 256 in a smoke run, 1,024 in a full one
n_costs = 0  # images of section 4, which tries 20 ranges on every channel; 0: 32 in a smoke run, 128 in a full one
n_panels = 20  # layers in section 2, evenly chosen where there are more

# %%
images = ql.load_data(data)
smoke = images.smoke if preset == "auto" else preset == "smoke"
n_calibration = n_calibration or min(256 if smoke else 1024, len(images.train))
n_costs = n_costs or min(32 if smoke else 128, n_calibration)
network, card = ql.load_trained(model, images, checkpoint)

# %% [markdown]
# One pass over the folded network. `observe_layers` looks at every convolution and linear layer, found from the graph, and at whatever else a
# ReLU reads, such as the sum of a residual block. `collect` sees stored values only, which lie behind the ReLU; here each layer has an exact
# histogram (`EdgeStats`, the same as in `collect`) of its weights, of its values before the ReLU and of those after it, and every channel its
# extremes and moments.

# %%
edges, channels = distributions.observe_layers(network, images.calibration(n_calibration, seed), verbose=True)
relus = channels[channels.point == "after"].drop_duplicates("layer").set_index("layer").relu
collected = ql.collect(network, images.calibration(n_calibration, seed)).edges
shared = [layer for layer, relu in relus.items() if relu in collected]
assert shared and all(edges[layer, "after"].bins.equal(collected[relus[layer]].bins) for layer in shared)
print(f"{channels.layer.nunique()} layers, {len(relus)} of them with a ReLU; "
      f"{len(shared)} histograms agree with collect's in every bin")

# %% [markdown]
# ## 1. Every layer
# From the input (top) to the logits (bottom), all on one scale in real units. Pale is what the ReLU takes away, coloured what it lets through:
# the codes are for that part only. The red bar is the range that the squared-error search gives to it.

# %%
density = distributions.densities(edges)
stored = {layer: edges.get((layer, "after"), edges[layer, "before"]) for layer in channels.layer.unique()}
ranges = [(layer, *observers.histogram(e, bits)) for layer, e in stored.items()]
ranges = pd.DataFrame(ranges, columns=["layer", "low", "high"])
text = plots.row_caption(images, model, n_calibration, f"calibration images; {bits}-bit clip ranges; heights: square root")
plots.save(plots.ridges(density, text, ranges), "05_ridges", images, model)

# %% [markdown]
# ## 2. Before and after
# The same histograms one by one, on a logarithmic scale, where the tail can be seen. A code that stands for values beyond the dashed lines is
# not spent; what lies there is clipped. Zeros are counted apart (section 1 gives their share) and not drawn.

# %%
behind = ranges[ranges.layer.isin(relus.index)]
every = max(1, -(-len(behind) // n_panels))
text = plots.row_caption(images, model, n_calibration, f"calibration images; {bits}-bit clip ranges; non-zero values")
plots.save(plots.layer_histograms(density, behind.iloc[::every], text), "05_before_after", images, model)

# %% [markdown]
# ## 3. Tails
# Left: the share of values before the ReLU that lie far from their layer's mean, against a normal distribution with the same deviation. Right:
# how much of a min-max range behind the ReLU serves one value in 10,000. A ratio of 2 is a bit that nearly nobody uses.

# %%
sigmas = (3, 4, 6)
before = pd.DataFrame({layer: distributions.outliers(edges[layer, "before"], sigmas) for layer in stored}).T
after = pd.DataFrame({layer: distributions.outliers(e, sigmas) for layer, e in stored.items()}).T
tail = before.assign(max_over_p=after.max_over_p).rename_axis("layer").reset_index()
tail = tail.assign(order=range(len(tail)))
normal = {k: 2 * statistics.norm.sf(k) for k in sigmas}
text = plots.row_caption(images, model, n_calibration, "calibration images; left: before the ReLU, right: as stored")
plots.save(plots.tails(tail, text, normal), "05_tails", images, model)

# %% [markdown]
# ## 4. Channels
# One range serves all channels of an activation. A channel whose largest value is a quarter of the layer's has a quarter of the codes, two
# bits fewer. *Dead* channels are zero on every calibration image. What a range for each channel would gain is measured, not estimated: both
# sides take the best of the same 20 shares of their extremes. (Integer convolutions cannot use it, because they add over the channels of their
# input; equalisation moves some of it into the weights.)

# %%
live = channels[channels.point.eq("after") | channels.point.eq("before") & ~channels.layer.isin(relus.index)]
size = live[["minimum", "maximum"]].abs().max(axis=1)
share = (size / size.groupby(live.layer).transform("max")).fillna(0)
costs = distributions.range_costs(network, images.calibration(n_costs, seed), channels, bits, verbose=True)
activations = costs[costs.point != "weight"]
assert (costs.gain_db > -0.01).all(), "more ranges never cost"
text = plots.row_caption(images, model, n_calibration, f"calibration images (costs: {n_costs:,}); values as stored")
figure = plots.channel_spread(live.assign(share=share), activations, text, bits)
plots.save(figure, "05_channels", images, model)

# %%
dead = live[(size == 0) & (live.relu != "")].groupby("layer", sort=False).channel.agg(["count", list])
display(dead.rename(columns={"count": "dead channels", "list": "which"}) if len(dead) else "no dead channel")
activations.nlargest(6, "gain_db").drop(columns="order").round(2)

# %% [markdown]
# ## 5. Weights beside activations
# Both in standard deviations, the scale on which a range costs: the wider it is, the fewer codes lie where the values are. The red ticks are
# the extremes.

# %%
std = pd.Series({key: distributions.outliers(e)["std"] for key, e in edges.items()})
coarse = distributions.densities(edges, bins=80)
z = coarse.assign(z=coarse.x / std.loc[pd.MultiIndex.from_frame(coarse[["layer", "point"]])].to_numpy())
both = z[z.layer.isin(channels[channels.point == "weight"].layer)]
text = plots.row_caption(images, model, n_calibration, "calibration images; BatchNorm folded; heights: square root")
plots.save(plots.weights_beside_activations(both, text), "05_weights_activations", images, model)

# %%
kinds = costs.assign(what=costs.point.map({"weight": "weights"}).fillna("activations"))
table = kinds.groupby("what")[["tensor_db", "channel_db", "gain_db", "gain_bits"]].median()
table.rename_axis(f"median over layers, {bits} bits").round(2)

# %% [markdown]
# ## What we learned

# %%
heavy, spread = tail.loc[tail.max_over_p.idxmax()], activations.loc[activations.gain_db.idxmax()]
zeros = pd.Series({layer: edges[layer, "after"].zeros / edges[layer, "after"].count for layer in relus.index})
print(f"- A ReLU leaves {zeros.median():.0%} zeros in the median layer, {zeros.min():.0%} to {zeros.max():.0%}.")
print(f"- Beyond 4 sigma lie up to {tail.beyond_4.max():.2%} of a layer's values; {normal[4]:.4%} of a normal distribution.")
print(f"- {heavy.layer}'s largest value is {heavy.max_over_p:.1f} times its 99.99 % quantile, the most of all layers.")
print(f"- {dead['count'].sum():.0f} of {live.relu.ne('').sum():,} channels behind a ReLU are dead.")
print(f"- One range for all channels costs {table.gain_db['activations']:.1f} dB ({table.gain_bits['activations']:.2f} bits) "
      f"in the median layer at {bits} bits, most in {spread.layer}: {spread.gain_db:.1f} dB. "
      f"For weights: {table.gain_db['weights']:.1f} dB.")

# %% [markdown]
# Next: [11_report](11_report.ipynb), everything measured so far on one page.
