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
# **Cost.** Seconds: this notebook reads `results/` and `pic/` only and computes nothing anew.
# `python -m quantlab report` writes it as `results/report.html`.

# %%
import os
import subprocess
import sys

# fetch the workbook
if "google.colab" in sys.modules and not os.path.isdir("quantlab"):
    address = "https://github.com/TimS-ml/Handwritten-Quantization"
    fetch = f"test -d workbook || git clone --depth 1 {address} workbook"
    subprocess.check_call(f"{fetch}; pip install -q -e workbook", shell=True)
    os.chdir("workbook")
    sys.path.insert(0, os.getcwd())

# %%
import pandas as pd
import quantlab as ql
from IPython.display import Image, Markdown
from quantlab import plots
from quantlab.workbook import results, tables
from quantlab.workbook.study import show

# %% tags=["parameters"]
source = "auto"  # local (results.csv), published, or auto: local where there are rows

# %%
local = source == "local" or (source == "auto" and len(results.load()) > 0)
file = results.local_path() if local else results.published_path()
rows = results.current(results.load(file))
assert len(rows), "no results yet: run `make results` first"
# the original's network first
sets = rows[["model", "dataset"]].drop_duplicates()
sets = sets.sort_values(["model", "dataset"], ascending=[False, True])
named = ", ".join(f"`{row.dataset}` with {row.model}" for row in sets.itertuples())
what = "the newest of every configuration and seed; data sets and networks"
show(Markdown(f"**{len(rows)} rows** from `results/{file.name}`, {what}: {named}."))

# %%
if (rows.dataset == results.SMOKE).all():
    words = "Handwritten digits: they show that everything runs and are no benchmark."
    show(Markdown(f"> **Smoke run.** {words}"))

# %% [markdown]
# ## 1. The headline
# The original's table, as published in 2021 for ResNet-50 on the official CIFAR-10 files (93.62 % in
# float, 10,000 test images, one run), beside ours where they are measured. Another network on other images
# than the original's: read what is lost, not the accuracy itself.

# %%
original = tables.original_table(rows)
if not len(original):  # notebook 10 has not run
    top1 = tables.original().top1
    lost = top1.iloc[0] - top1
    original = pd.DataFrame({"Top-1 %": top1, "Points lost": lost}).round(2)
    original = original.rename_axis("Quantization").reset_index()
show(Markdown(tables.markdown(original)))

# %% [markdown]
# All rows. Points lost are against the float network on the same images, with a paired 95 % interval.

# %%
real = rows[rows.dataset != results.SMOKE]
show(Markdown(tables.markdown(tables.headline(real if len(real) else rows))))

# %% [markdown]
# ## 2. Accuracy by bits

# %%
hand = results.equal_widths(rows)
hand = hand.assign(bits=hand.weight_bits.astype(int))
for (dataset, model), part in hand.groupby(["dataset", "model"], sort=False):
    text = f"test images, {part.seed.nunique()} calibration seed(s)"
    text = plots.row_caption(dataset, model, int(part.n_test.iloc[0]), text)
    show(plots.accuracy_by_bits(part, text))

# %% [markdown]
# ## 3. Built-in int8

# %%
builtin = rows[(rows.method == "float") | rows.method.str.contains("int8")]
for (dataset, model), part in builtin.groupby(["dataset", "model"], sort=False):
    device = part.device.iloc[-1]
    text = plots.row_caption(dataset, model, int(part.n_test.iloc[0]), device)
    part = part.drop_duplicates("method", keep="last").reset_index(drop=True)
    show(plots.method_bars(part, text))

# %% [markdown]
# ## 4. Figures

# %%
shown = sets[sets.dataset != results.SMOKE]
shown = shown if len(shown) else sets
elsewhere = ("images_", "02_builtin", "03_accuracy")
for row in shown.itertuples():
    pattern = f"*_{row.model}_{row.dataset}.png"
    for picture in sorted((ql.root() / "pic").glob(pattern)):
        if not picture.name.startswith(elsewhere):
            show(Markdown(f"`{picture.name}`"), Image(str(picture), width=850))

# %% [markdown]
# ## 5. Where the numbers come from

# %%
facts = ["dataset", "data_sha", "model", "checkpoint_sha", "trained_on"]
facts += ["n_calibration", "device", "torch", "commit", "notebook"]
groups = rows.groupby(facts, dropna=False, sort=False)
counts = groups.agg(
    rows=("config_key", "size"), seeds=("seed", "nunique"), newest=("created", "max")
)
show(counts.reset_index())
