# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 13 · Report
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/TimS-ml/Handwritten-Quantization/blob/main/notebooks/13_report.ipynb)
#
# **Question.** What has been measured, on what, and how sure is it?
#
# **Cost.** Seconds: this notebook reads `results/` and `pic/` only and computes nothing anew. `python -m quantlab report` writes it as
# `results/report.html`.

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
from IPython.display import Image, Markdown, display
from quantlab import plots
from quantlab.workbook import results, tables

# %% tags=["parameters"]
source = "auto"  # local (results.csv), published (published.csv), or auto: local where there are local results

# %%
local = source == "local" or source == "auto" and len(results.load()) > 0
rows = results.current(results.load() if local else results.load(results.published_path()))
assert len(rows), "no results yet: run `make results` first"
sets = list(dict.fromkeys(zip(rows.dataset, rows.model)))
where = "results/results.csv (measured on this machine)" if local else "results/published.csv"
display(Markdown(f"**{len(rows)} rows** from `{where}`, the newest of every configuration and seed; data sets and networks: "
                 + ", ".join(f"`{d}` with {m}" for d, m in sets) + "."))
if (rows.dataset == results.SMOKE).all():
    display(Markdown("> **Smoke run.** These are handwritten digits: they show that everything runs and are no benchmark."))

# %% [markdown]
# ## 1. The headline
# The original's table, as published in 2021 for ResNet-50 on the official CIFAR-10 files (93.62 % in float, 10,000 test images, one run):

# %%
top1 = tables.original().top1
original = pd.DataFrame({"Quantization": top1.index, "Top-1 %": [f"{v:.2f}" for v in top1],
                         "Points lost": [f"{top1.iloc[0] - v:.2f}" for v in top1]})
Markdown(tables.markdown(original))

# %% [markdown]
# And ours. Points lost are against the float network on the same images, with a paired 95 % interval. Another network on other images than
# the original's: read what is lost, not the accuracy itself.

# %%
real = rows[rows.dataset != results.SMOKE]
Markdown(tables.markdown(tables.headline(real if len(real) else rows)))

# %% [markdown]
# ## 2. Accuracy by bits

# %%
hand = results.equal_widths(rows).assign(bits=lambda f: f.weight_bits.astype(int))
for (dataset, model), part in hand.groupby(["dataset", "model"], sort=False):
    text = plots.row_caption(dataset, model, int(part.n_test.iloc[0]), f"test images, {part.seed.nunique()} calibration seed(s)")
    display(plots.accuracy_by_bits(part, text))

# %% [markdown]
# ## 3. Built-in int8

# %%
for (dataset, model), part in rows[(rows.method == "float") | rows.method.str.contains("int8")].groupby(["dataset", "model"], sort=False):
    text = plots.row_caption(dataset, model, int(part.n_test.iloc[0]), part.device.iloc[-1])
    display(plots.method_bars(part.drop_duplicates("method", keep="last").reset_index(drop=True), text))

# %% [markdown]
# ## 4. Figures

# %%
shown = [(d, m) for d, m in sets if d != results.SMOKE] or sets
for dataset, model in shown:
    for picture in sorted((ql.root() / "pic").glob(f"*_{model}_{dataset}.png")):
        if not picture.name.startswith(("images_", "02_builtin", "03_accuracy")):
            display(Markdown(f"`{picture.name}`"), Image(str(picture), width=850))

# %% [markdown]
# ## 5. Where the numbers come from

# %%
facts = ["dataset", "data_sha", "model", "checkpoint_sha", "trained_on", "n_calibration", "device", "torch", "commit", "notebook"]
rows.groupby(facts, dropna=False, sort=False).agg(rows=("config_key", "size"), seeds=("seed", "nunique"), newest=("created", "max")).reset_index()
