# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 13 · Report
#
# **Question.** What has been measured, on what, and how sure is it?
#
# **Cost.** Seconds, with or without an accelerator: this notebook reads `results/` and `pic/` only and
# measures nothing. `python -m quantlab report` writes it as `results/report.html`.

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
from IPython.display import Image, Markdown
from quantlab import plots
from quantlab.workbook import allowed, figures, findings, gallery, results, tables
from quantlab.workbook.study import show

# %% tags=["parameters"]
# local (results.csv), published (published.csv), or auto: local where there are some,
# and beside a smoke run what is published
source = "auto"

# %%
allowed.check(source=source)
local, published = results.load(), results.load(results.published_path())
is_local = source == "local" or (source == "auto" and len(local) > 0)
own = rows = results.current(local if is_local else published)
if not len(rows):
    raise ql.UserError("there are no results yet; run: make results")
is_smoke = (own.dataset == results.SMOKE).all()
beside = is_smoke and source == "auto" and len(published) > 0
if beside:
    rows = results.current(pd.concat([published, local]))
real = rows[rows.dataset != results.SMOKE]
counted = real if len(real) else rows

# %%
# the largest network first
networks = rows[["model", "dataset"]].drop_duplicates()
networks = networks.sort_values(["model", "dataset"], ascending=[False, True])
networks = list(networks.itertuples(index=False, name=None))

def rows_of(model, dataset, frame=rows):
    return frame[(frame.model == model) & (frame.dataset == dataset)]


# %%
where = "`results/results.csv`, measured on this machine"
if not is_local or beside:
    where = f"{where}, and " * is_local + "`results/published.csv`"
listed = ", ".join(f"{m} on `{d}` ({len(rows_of(m, d))} rows)" for m, d in networks)
show(Markdown(
    f"**{len(rows)} rows** from {where}: the newest of every configuration and seed. "
    f"Networks and data sets: {listed}."
))
if is_smoke:
    show(Markdown(
        "> **Smoke run.** What was measured here are handwritten digits: they show "
        "that everything runs and are no benchmark."
        + " All other numbers and figures are published ones." * beside
    ))

# %%
show(Markdown(findings.overview(counted)))

# %% [markdown]
# ## 1. The headline
# Points lost are against the float network on the same images, with a paired 95 % interval. For each
# network: float; of the other tools the one that loses least on these images, which is to our
# disadvantage; integers alone; and at each width one method of ours, fixed beforehand and not picked by
# its accuracy on the test images.

# %%
show(Markdown(tables.markdown(tables.headline(counted, brief=True))))
if beside:
    show(Markdown("This machine's smoke run, the same rows of the digits:"))
    show(Markdown(tables.markdown(tables.headline(own, brief=True))))

# %% [markdown]
# The original's table, as published in 2021 for ResNet-50 on the official CIFAR-10 files (10,000 test
# images, one run), and ours: its way, and the right way. Top-1 in %, in brackets the points against
# float. Its images are not ours: read what is lost, not the accuracy itself.

# %%
repeated = tables.original_table(counted)
if len(repeated):
    show(Markdown(tables.markdown(repeated)))
else:
    top1 = tables.original().top1
    lost = (top1.iloc[0] - top1).round(2)
    show(pd.DataFrame({"top-1, %": top1, "points lost": lost}))
    print("ours is missing: run notebook 10")

# %% [markdown]
# ## 2. Accuracy by bits
# By hand, weights and activations at the same width, ranges from calibration alone.

# %%
hand = results.equal_widths(rows).assign(bits=lambda f: f.weight_bits.astype(int))
for model, dataset in networks:
    part = rows_of(model, dataset, hand)
    if not len(part):
        print(f"{model} on {dataset}: not measured at several widths")
        continue
    text = f"test images, up to {part.seed.nunique()} calibration seed(s)"
    text = plots.row_caption(dataset, model, part.n_test.iloc[0], text)
    show(plots.accuracy_by_bits(part, text))

# %% [markdown]
# The original claims that a large network loses less. The same method and convention on both, where two
# networks have been measured on the same images:

# %%
show(*figures.small_against_large(counted).values())

# %% [markdown]
# ## 3. Built-in int8
# Speeds compare on one machine only: a figure for each on which several methods were measured.

# %%
tools = rows[(rows.method == "float") | rows.method.str.contains("int8")]
tools = tools.drop_duplicates(["model", "dataset", "method"], keep="last")
columns = ["top1", "drop", "drop_low", "drop_high", "bytes"]
for model, dataset in networks:
    part = rows_of(model, dataset, tools)
    print(f"{model} on {dataset}")
    show(part.set_index("method")[columns].round(2))
    for device, same in part.groupby("device", sort=False):
        if len(same) > 1:
            text = f"test images, {device}"
            text = plots.row_caption(dataset, model, same.n_test.iloc[0], text)
            show(plots.method_bars(same.reset_index(drop=True), text))

# %% [markdown]
# ## 4. Speed
# How many times the throughput of what each group of measurements is held `against` (a column of
# `results/bench.csv`), taken in turns on one machine; in brackets the range between rounds.

# %%
bench = ql.root() / "results" / "bench.csv"
if bench.is_file():
    show(Markdown(tables.markdown(tables.speed_table(pd.read_csv(bench)))))
else:
    print("not measured here: python -m quantlab bench")

# %% [markdown]
# ## 5. Every configuration
# The same columns as the headline's. Single steps of notebook 10, and nearest rounding at widths that are
# not in the headline, are in `results/published.csv` alone.

# %%
show(Markdown(tables.markdown(tables.headline(counted))))

# %% [markdown]
# ## 6. Figures
# As the notebooks saved them when they ran last; of real images also in
# [the gallery](../pic/README.md).

# %%
drawn_above = "02_builtin", "03_accuracy_by_bits", "13_small_against_large"
for figure in gallery.figures(data={*counted.dataset, ""}):
    if figure.name not in drawn_above:
        show(Markdown(f"{gallery.ABOUT[figure.name]} `{figure.file}`"))
        show(Image(str(ql.root() / "pic" / figure.file), width=850))

# %% [markdown]
# ## 7. Where the numbers come from

# %%
trained = ["dataset", "data_sha", "model", "checkpoint_sha", "trained_on"]
measured = ["notebook", "model", "n_calibration", "device", "torch", "commit"]
counts = dict(
    rows=("config_key", "size"), configurations=("config_key", "nunique"),
    seeds=("seed", "nunique"), newest=("created", "max"),
)
for facts in (trained, measured):
    groups = rows.assign(created=rows.created.str[:10]).groupby(facts, dropna=False)
    show(groups.agg(**counts).reset_index().style.hide())

# %% [markdown]
# To keep all this, on Colab for example, run `!python -m quantlab zip` in a cell: rows, executed
# notebooks, report and figures in one file, `workbook.zip`, which the panel of files downloads.
