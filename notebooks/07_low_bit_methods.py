# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 07 · Low bits that hold
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/TimS-ml/Handwritten-Quantization/blob/main/notebooks/07_low_bit_methods.ipynb)
#
# **Question.** How much of what 4, 3 and 2 bits cost can be won back without training, by which method, and why do papers disagree about it?
#
# **Cost.** A minute or two on the digits. The full preset learns about 40 networks of two to three minutes each and tunes as many for two to four more, on
# two CPU cores. Every row is recorded when it is measured and not measured again, so the notebook can be stopped, continued and run in pieces
# (`widths`, `methods`, `sections`); its tables and figures take the rows already published with those of this run.

# %%
import os
import subprocess
import sys

if "google.colab" in sys.modules and not os.path.isdir("quantlab"):  # fetch the workbook; Colab keeps its own torch
    subprocess.check_call("test -d workbook || git clone --depth 1 https://github.com/TimS-ml/Handwritten-Quantization workbook; pip install -q -e workbook", shell=True)
    os.chdir("workbook")
    sys.path.insert(0, os.getcwd())

# %%
import dataclasses
import functools

import numpy as np
import pandas as pd
import quantlab as ql
import torch
from IPython.display import display
from quantlab import plots, ptq
from quantlab.analysis import mixed
from quantlab.improving import corrections
from quantlab.improving.equalization import equalize
from quantlab.improving.reconstruct import ReconstructConfig, reconstruct
from quantlab.improving.tune import tune_end_to_end
from quantlab.plots import lowbit
from quantlab.rivals import pytorch as builtin
from quantlab.workbook import results
from tqdm.auto import tqdm

# %% tags=["parameters"]
data = "auto"  # auto, cifar10, digits, images, or the path of a folder or archive
model = "resnet20"  # resnet20 or resnet50
checkpoint = "auto"  # auto, or the path of a .safetensors file
seed = 0
preset = "auto"  # smoke, full, or auto: smoke on the digits
widths = "auto"  # weights/activations[/first and last layer], comma-separated, as in 4/4,2/2/8
methods = "auto"  # comma-separated names of section 3, or auto: all
best_method = "QDrop + fine-tuning"  # a method of section 3, for the targets and the comparison with other tools; chosen on held-out images
iterations = 0  # of learning a unit; 0: 5 in a smoke run, 500 in a full one
n_calibration = 0  # 0: 64 in a smoke run, 1,024 in a full one
n_seeds = 0  # calibration seeds in section 3; 0: one in a smoke run, three in a full one, for nearest and best_method
sections = "methods,tuning,rivals,fisher,sensitivity,pareto,conventions,tools"  # what is measured
rivals = "auto"  # pt2e and onnxruntime, comma-separated; auto: onnxruntime in a smoke run, because compiling takes long, else both
pareto_method = "nearest"  # a method of section 3
convention_method = "nearest"  # a method of section 3

# %%
images = ql.load_data(data)
smoke = images.smoke if preset == "auto" else preset == "smoke"
limit = 1000 if smoke else None  # test images
n_calibration = n_calibration or min(64 if smoke else 1024, len(images.train))
n_seeds, iterations = n_seeds or (1 if smoke else 3), iterations or (5 if smoke else 500)
network, card = ql.load_trained(model, images, checkpoint)
baseline = ql.evaluate(network, images.test, limit=limit)
sections, seeds = sections.split(","), range(seed, seed + n_seeds)
widths = ("4/4,2/2" if smoke else "8/8,4/8,4/4,3/3,2/4,2/2,2/2/8") if widths == "auto" else widths

# %% [markdown]
# ## 1. Rounding that is learned
# Why should the nearest code be the best one? Rounding changes the weights by $\Delta w$, and the loss, to second order, by
#
# $$\mathcal L(w + \Delta w) - \mathcal L(w) \approx \tfrac12\, \Delta w^{\!\top} H\, \Delta w .$$
#
# Nearest rounding minimises every $\Delta w_i^2$ for itself, as if $H$ were a multiple of the identity. But errors that meet in the same
# output can cancel, which the off-diagonal entries reward. With a layer's output as the measure, $H$ becomes $\mathbb E[x x^\top]$, and the
# task is: for each weight choose *down* or *up* such that $\lVert W x - \hat W x\rVert^2$ is least. *AdaRound* (Nagel et al. 2020,
# arXiv:2004.10568) makes it smooth, with one number $V$ per weight:
#
# $$\hat w = s\,\mathrm{clamp}\big(\lfloor w/s \rfloor + h(V),\ q_{\min}, q_{\max}\big),\qquad h(V) = \mathrm{clamp}\big(1.2\,\sigma(V) - 0.1,\ 0,\ 1\big)$$
#
# $$\min_V\ \mathbb E\,\lVert W x - \hat W x\rVert^2 + \lambda \sum_i \big(1 - |2h(V_i) - 1|^{\beta}\big),\qquad \beta: 20 \to 2$$
#
# The second term is zero only where every $h$ is 0 or 1; a large $\beta$ lets them move freely, a small one makes them decide. Here it is, on
# one layer, in one screen. The layer's inputs and outputs come from the float network:

# %%
bits = 3  # of the one layer in this section
graph, plan, _ = ptq.prepare(network.cpu())
name = ptq.layers(graph, plan)[len(plan.reads) // 2]
layer, seen = graph.get_submodule(ptq.find_node(graph, name).target), []
hook = layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
with torch.no_grad():
    for batch in images.calibration(128, seed):
        graph(batch)
    hook.remove()
    x, weight = torch.cat(seen), layer.weight.detach()
    y = layer(x)
q = ptq.choose_weight_qparams(weight, bits, ql.QuantConfig())
scale = q.broadcast(weight.dim())[0]
down = torch.floor(weight / scale)


# %%
def output_error(w_hat, index=slice(None)):
    y_hat = torch.func.functional_call(layer, {"weight": w_hat}, x[index])
    return (y_hat - y[index]).square().sum(1).mean()  # summed over channels, mean over images and places

def h_of(v):
    return (1.2 * torch.sigmoid(v) - 0.1).clamp(0, 1)

def weight_of(h):
    return scale * (down + h).clamp(q.qmin, q.qmax)

v = torch.logit((weight / scale - down + 0.1) / 1.2).requires_grad_()
assert torch.allclose(h_of(v), weight / scale - down, atol=1e-5), "V starts where w_hat is the float weight, up to clipping"
assert torch.allclose(weight_of((v >= 0).float()), ql.fake_quantize(weight, q)), "V >= 0 is nearest rounding, before anything is learned"

# %%
n_steps, paths, curve = 600 if smoke else 2000, [], []
start, optimizer, generator = h_of(v).detach(), torch.optim.Adam([v], lr=1e-2), torch.Generator().manual_seed(seed)
nearest = output_error(weight_of((v >= 0).float())).item()
for i in tqdm(range(n_steps + 1)):
    h, free = h_of(v), i < 0.2 * n_steps
    if i % (n_steps // 40) == 0:
        paths += [(i, k, h.flatten()[k].item(), start.flatten()[k].item()) for k in range(0, weight.numel(), weight.numel() // 120)]
        with torch.no_grad():
            curve.append((i, nearest, output_error(weight_of((v >= 0).float())).item()))
    beta = 20 - 18 * max(i / n_steps - 0.2, 0) / 0.8
    loss = output_error(weight_of(h), torch.randint(len(x), (32,), generator=generator))
    loss = loss + (0 if free else 0.01 * (1 - (2 * h - 1).abs() ** beta).sum())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

# %%
codes = (down + (v >= 0)).clamp(q.qmin, q.qmax)
assert ((codes == down.clamp(q.qmin, q.qmax)) | (codes == (down + 1).clamp(q.qmin, q.qmax))).all(), "never further than the two neighbours"
moved = (codes != ql.quantize_tensor(weight, q)).float().mean().item()
curve = pd.DataFrame(curve, columns=["iteration", "nearest", "learned"])
print(f"{name} at {bits} bits: {moved:.0%} of the weights end away from the nearest code; "
      f"the output's error falls from {nearest:.4g} to {curve.learned.iloc[-1]:.4g}")
drawn = len({k for _, k, _, _ in paths})
text = plots.row_caption(images, model, len(x), f"calibration images; layer {name}, {bits} bits, {drawn} of {weight.numel():,} weights drawn")
figure = lowbit.learned_rounding(pd.DataFrame(paths, columns=["iteration", "weight", "h", "start"]), curve, text)
plots.save(figure, "06_learned_rounding", images, model)

# %% [markdown]
# ## 2. From the layer to the network
# **BRECQ** (Li et al. 2021, arXiv:2102.05426). Learning layer after layer ignores that the layers of a residual block can make up for each
# other; the whole network at once overfits a thousand images. The block is the compromise. For the error of its output $z$,
#
# $$\Delta\mathcal L \approx \tfrac12\,\Delta z^{\!\top} H^{(z)} \Delta z \approx \tfrac12 \sum_i \Big(\frac{\partial \mathcal L}{\partial z_i}\Big)^{\!2} \Delta z_i^2 .$$
#
# The last form is the *Fisher* loss; leaving the weights $(\partial\mathcal L/\partial z_i)^2$ out is the plain one. Section 3 compares them.
#
# **LSQ** (Esser et al. 2020, arXiv:1902.08153). The step $s$ of an activation is learned with the rounding, with the straight-through gradient
#
# $$\frac{\partial \hat x}{\partial s} = \mathrm{round}(x/s) - x/s \ \text{ inside the range, } q_{\min} \text{ or } q_{\max} \text{ outside, scaled by } 1/\sqrt{N q_{\max}} .$$
#
# **QDrop** (Wei et al. 2022, arXiv:2203.05740). While learning, every element of an activation keeps its float value with probability ½. The
# rounding is then learned for many mixtures of exact and rounded inputs, and becomes flat in the direction in which activations err.
#
# **Corrections that learn nothing.** *Equalisation* (Nagel et al. 2019, arXiv:1906.04721) divides a channel by $r_i$ and multiplies the
# weights that read it by $r_i$, so that all channels have similar ranges; ReLU lets it pass. *Bias correction* subtracts each channel's mean
# error $\mathbb E[\hat W x - W x]$ from its bias, measured, or calculated from BatchNorm's parameters (analytic). *BatchNorm re-estimation*
# measures means and variances again, in the quantized network.

# %% [markdown]
# ## 3. Every method at every width
# The convention, unless said otherwise: every layer quantized, first and last at the same bits as the rest, residual stream and image at 8 bits.

# %%
LEARNED = {"AdaRound": "adaround", "BRECQ": "brecq", "QDrop": "qdrop"}
CORRECTIONS = {
    "nearest": lambda q, batches: q,
    "bias correction": lambda q, batches: corrections.correct_bias(network, q, batches),
    "analytic bias correction": lambda q, batches: corrections.correct_bias_analytic(network, q),
    "BatchNorm re-estimation": lambda q, batches: corrections.reestimate_batchnorm(network, q, batches),
}
TUNED = {"end to end": {"iterations": max(iterations // 2, 1)}, "fine-tuning": {"iterations": iterations, "learn_weights": True, "flip": True}}
METHODS = ["nearest", "equalisation", *list(CORRECTIONS)[1:], *LEARNED, *(f"QDrop + {name}" for name in TUNED)]
methods = METHODS if methods == "auto" else methods.split(",")
parts = {part for method in [*methods, best_method, convention_method, pareto_method] for part in method.split(" + ")}
if unknown := parts - set(METHODS) - {"Fisher", *TUNED}:
    raise ql.UserError(f"method {unknown.pop()!r} is unknown; use {', '.join(METHODS)}, or some of them joined by ' + '")


# %% [markdown]
# `QDrop + Fisher` is QDrop with the other loss. `+ end to end` goes on with the steps, scales and biases of the whole network together,
# against the float network's logits, every weight keeping its code, for half as many iterations. `+ fine-tuning` lets the codes move as well
# (QFT, Finkelstein et al. 2022, arXiv:2212.02634), mirrors half of the images and takes as many iterations, still on the
# calibration images alone and without labels. `+` a correction applies it to what was learned.

# %%
@functools.cache
def calibration(s):
    return images.calibration(n_calibration, s), ql.collect(network, images.calibration(n_calibration, s))

last = {}  # the network that was learned last: what a "+" goes on from

def learn(kind, loss, config, s, state):
    key = (kind, loss, repr(config), s)
    if key not in last:
        last.clear()
        how = ReconstructConfig.preset(LEARNED[kind], iterations=iterations, seed=s, loss=loss)
        last[key] = reconstruct(network, calibration(s)[1], calibration(s)[0], config, how, state)
    return last[key]


# %%
def build(method, config, s, state=None):
    batches, stats = calibration(s)
    kind, *more = method.split(" + ")
    if kind == "equalisation":
        equal = equalize(network)
        qmodel = ql.quantize(equal, ql.collect(equal, batches), config)
    elif kind in LEARNED:
        qmodel = learn(kind, "fisher" if "Fisher" in more else "mse", config, s, state)
    else:
        qmodel = CORRECTIONS[kind](ql.quantize(network, stats, config), batches)
    for step in [m for m in more if m != "Fisher"]:
        tune = functools.partial(tune_end_to_end, network, batch_size=min(64, n_calibration), seed=s)
        qmodel = tune(qmodel, batches, **TUNED[step]) if step in TUNED else CORRECTIONS[step](qmodel, batches)
    return qmodel


# %% [markdown]
# A row is looked up before it is measured: same settings, checkpoint, images and code give the same row.

# %%
def measure(method, config, s, **more):
    label = {"corrections": note_of(method), **more}

    def run(state):
        qmodel = build(method, config, s, state)
        result = ql.evaluate(qmodel, images.test, limit=limit)
        row = results.make_row(data=images, model=model, card=card, baseline=baseline, result=result, method="by hand", config=config,
                               n_calibration=n_calibration, seed=s, bytes=ql.weight_bytes(qmodel), notebook="07_low_bit_methods", **label)
        units = getattr(qmodel, "reconstruction", pd.DataFrame()).to_dict("records")
        heldout = ql.evaluate(qmodel, images.heldout, limit=limit).top1 if method.split(" + ")[0] in LEARNED else None
        return row | {"units": units, "heldout": heldout, "right": np.packbits(result.correct.numpy()).tobytes().hex()}

    settings = [images.fingerprint, card.sha256, model, baseline.n, method, n_calibration, s, dataclasses.asdict(config), label]
    return results.once(settings, run)


# %%
def note_of(method):
    return "" if method == "nearest" else f"{method}, {iterations} iterations" if method.split(" + ")[0] in LEARNED else method

def right(row):
    return torch.from_numpy(np.unpackbits(np.frombuffer(bytes.fromhex(row["right"]), np.uint8))[: baseline.n].astype(bool))

def config_of(width, **convention):
    weight_bits, act_bits, *outer = (int(b) for b in width.split("/"))
    return ql.QuantConfig(**{"weight_bits": weight_bits, "act_bits": act_bits, "first_last_bits": outer[0] if outer else None} | convention)

def name_of(width):
    weight_bits, act_bits, *outer = width.split("/")
    return f"W{weight_bits}A{act_bits}" + (f"\nfirst/last {outer[0]}" if outer else "")


# %%
def is_measured(width, method, s):
    """Nearest, the best method and what it starts from for every seed; others for the first, those of learned units at two widths."""
    kind = method.split(" + ")[0]
    if smoke and kind in LEARNED:
        return width == widths.split(",")[-1]
    return method in ("nearest", best_method, best_method.split(" + ")[0]) or s == seed and (method not in LEARNED or width in ("4/4", "3/3"))

grid = [(width, method, s) for width in widths.split(",") for s in seeds for method in methods if is_measured(width, method, s)]
grid = grid if "methods" in sections else []
rows = [measure(method, config_of(width), s) | {"width": name_of(width), "name": method} for width, method, s in tqdm(grid, desc="networks")]
frame = pd.DataFrame(rows)


# %% [markdown]
# **Rivals** at 8 bits, on the same checkpoint, calibration images and test images: torchao's PT2E and ONNX Runtime's static quantization.

# %%
def rival(name):
    batches = images.calibration(n_calibration, seed)
    if name == "pt2e":
        backend = next(b for b in builtin.backends() if b.name == "pt2e")
        if not backend.available:
            raise ql.UserError(backend.note)
        converted = builtin.pt2e_int8(network.cpu(), batches, batch_size=100)
        return "PT2E int8", converted, builtin.bytes_on_disk(converted)
    from quantlab.rivals.onnxruntime import onnxruntime_int8

    converted = onnxruntime_int8(network.cpu(), batches)
    return "ONNX Runtime int8", converted, converted.bytes


# %%
wanted = ("onnxruntime" if smoke else "pt2e,onnxruntime") if rivals == "auto" else rivals
skipped = {"pt2e", "onnxruntime"} - set(wanted.split(","))
print(f"not measured here: {', '.join(sorted(skipped))} (parameter rivals)" if skipped else "both are measured")

# %%
rival_rows = []
for which in wanted.split(",") if "rivals" in sections else []:
    try:
        method, converted, size = rival(which)
    except (ImportError, ql.UserError) as error:
        print(f"{which} is skipped: {str(error).removesuffix('; skipped')}")
        continue
    result = ql.evaluate(converted, images.test, limit=limit, on="cpu")
    rival_rows.append(results.make_row(data=images, model=model, card=card, baseline=baseline, result=result, method=method, weight_bits=8,
                                       act_bits=8, n_calibration=n_calibration, seed=seed, bytes=size, notebook="07_low_bit_methods"))
results.record(rival_rows)[["method", "top1", "drop", "drop_low", "drop_high"]].round(2) if rival_rows else "not measured"


# %% [markdown]
# All rows of this network, these images and this convention: those measured now, and those published before. Without sections
# (`-p sections none`) the notebook measures nothing and draws from the files.

# %%
def published_or_new():
    """The rows published and those measured here: this network, these test images, as many calibration images."""
    rows = results.newest(pd.concat([results.load(results.published_path()), results.load()])).reset_index(drop=True)
    return rows[(rows.checkpoint_sha == card.sha256[:12]) & (rows.data_sha == images.fingerprint[:12]) & (rows.n_test == baseline.n) & (rows.n_calibration == n_calibration)]

def known(rows):
    """One row a method, width and seed, the newest: columns of results.csv, `name` and `width`."""
    rows = rows[results.is_default(rows, ("weight_bits", "act_bits", "first_last_bits")) & rows.weight_bits.notna() & rows.act_bits.notna()].copy()
    rows["name"] = rows.corrections.fillna("").str.removesuffix(f", {iterations} iterations").replace("", "nearest")
    outer = rows.first_last_bits.map(lambda b: "" if pd.isna(b) else f"/{b}")
    rows["width"] = (rows.weight_bits.astype(str) + "/" + rows.act_bits.astype(str) + outer).map(lambda w: name_of(w) if w in widths.split(",") else "")
    rows = rows[rows.name.isin(METHODS) & (rows.width != "")]
    order = 100 * rows.name.map(METHODS.index) + rows.width.map([name_of(w) for w in widths.split(",")].index)
    return rows.loc[order.sort_values(kind="stable").index]


# %%
rows = published_or_new()
everything, rival_frame = known(rows), rows[rows.method.isin(["PT2E int8", "ONNX Runtime int8"])]
if len(everything):
    table, counts = (everything.pivot_table("drop", "name", "width", how, sort=False) for how in ("mean", "count"))
    shown = table.round(2).astype(str) + " (" + counts.fillna(0).astype(int).astype(str) + ")"
    display(shown.where(table.notna(), "").rename(columns=lambda w: w.replace("\n", ", ")).rename_axis("points lost (seeds)", axis=0))
    more = f"test images, {n_calibration:,} calibration images, learned: {iterations:,} iterations a unit; paired 95 % intervals, means of up to {everything.seed.nunique()} seeds"
    text = plots.row_caption(images, model, baseline.n, more)
    figure = lowbit.methods_by_width(everything.assign(method=everything.name), rival_frame, text)
    display(plots.save(figure, "07_methods_by_width", images, model))


# %% [markdown]
# **Chosen on held-out images.** Which learned method is the best one, for how many iterations and with which learning rates is not the test
# set's business. The same networks on the fixed tenth of the training images that nothing was fitted to (another choice to compare: the same
# command with other parameters, as `python -m quantlab run 06 -p sections methods -p iterations 300`):

# %%
@functools.cache
def baseline_heldout():
    return ql.evaluate(network, images.heldout, limit=limit)

if len(frame) and frame.heldout.notna().any():
    float_heldout = baseline_heldout()
    chosen_on = frame[frame.heldout.notna()].assign(lost=lambda f: float_heldout.top1 - f.heldout)
    chosen_on = chosen_on[chosen_on.seed == seed].pivot_table("lost", "name", "width", sort=False).rename(columns=lambda w: w.replace("\n", ", "))
    every = chosen_on.dropna(axis=1)  # widths at which every method was learned
    print(f"points lost on {float_heldout.n:,} held-out images (float {float_heldout.top1:.2f} %), seed {seed}; least over {', '.join(every)}: {every.mean(axis=1).idxmin()}")
    display(chosen_on.round(2))


# %% [markdown]
# How fast may codes move in fine-tuning, and do mirrored images help? Held-out images again, at the narrowest width, where it matters most:
# points lost, and the mean divergence from the float network's answers in nats.

# %%
def divergence(qmodel):
    where, total, split = next(qmodel.buffers()).device, 0.0, ql.limited(images.heldout, limit)
    with torch.inference_mode():
        for batch, _ in split.batches():
            log_p, log_q = (net.to(where)(batch.to(where)).log_softmax(1) for net in (network, qmodel))
            total += torch.nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True).item()
    return total / len(split)


# %%
tried = []
half, rates = {"iterations": max(iterations // 2, 1)}, ((1e-3, True), (2e-3, False), (2e-3, True), (4e-3, True))
variants = [half, half | {"flip": True}, *(half | {"learn_weights": True, "lr_weights": lr, "flip": flip} for lr, flip in rates), TUNED["fine-tuning"]]
for how in tqdm(variants if "tuning" in sections else [], desc="variants"):
    started = learn("QDrop", "mse", config_of(widths.split(",")[-1]), seed, None)
    tuned = tune_end_to_end(network, started, calibration(seed)[0], batch_size=min(64, n_calibration), seed=seed, **how)
    lost = baseline_heldout().top1 - ql.evaluate(tuned, images.heldout, limit=limit).top1
    tried.append(how | {"points lost, held out": round(lost, 2), "divergence, held out": round(divergence(tuned), 4)})
display(pd.DataFrame(tried).astype(object).fillna("")) if tried else print("not measured")

# %% [markdown]
# What learning does to every unit: the squared error of its output against nearest rounding of the same unit, on the calibration images,
# behind the quantized network before it.

# %%
if len(frame) and set(methods) & set(LEARNED):
    narrow = frame[(frame.seed == seed) & (frame.width == frame.width.iloc[-1])]
    units = [{"method": row["name"], "order": i, **unit} for _, row in narrow.iterrows() for i, unit in enumerate(row["units"])]
    more = f"calibration images, {frame.width.iloc[-1]}, seed {seed}, {iterations:,} iterations".replace("\n", ", ")
    text = plots.row_caption(images, model, n_calibration, more)
    display(plots.save(lowbit.unit_errors(pd.DataFrame(units), text), "06_unit_errors", images, model))


# %% [markdown]
# **Fisher against plain.** BRECQ's public code never uses its Fisher-weighted loss. The same network, seeds and iterations with and without it;
# gain is in points of accuracy, positive where Fisher is better, with the paired interval:

# %%
def fisher_gain(width, s):
    plain, fisher = (measure(method, config_of(width), s) for method in ("QDrop", "QDrop + Fisher"))
    gain, low, high = ql.paired_drop(right(fisher), right(plain))
    found = {"width": name_of(width), "seed": s, "plain": plain["top1"], "fisher": fisher["top1"]}
    return found | {"gain": gain, "gain_low": low, "gain_high": high}

fisher_widths = [w for w in widths.split(",") if w in ("4/4", "3/3", "2/2")][-1 if smoke else 0:]
fisher = pd.DataFrame([fisher_gain(w, s) for w in fisher_widths for s in seeds[:1]] if "fisher" in sections else [])
fisher.groupby("width", sort=False).mean().drop(columns="seed").round(2) if len(fisher) else "not measured"

# %% [markdown]
# ## 4. Which layer needs its bits?
# One layer's weights, or what one layer reads, is rounded and nothing else. Its *sensitivity* is the divergence
# $\mathrm{KL}(p\,\Vert\,\hat p)$ of the class probabilities from the float network's (ZeroQ, arXiv:2001.00281), on training images. The green
# frames are the widths chosen below for the bit operations of W4A4.

# %%
if {"sensitivity", "pareto"} & set(sections):
    n_sensitivity, tried = (32, (8, 4, 3, 2)) if smoke else (512, mixed.WIDTHS)
    sensitivity = mixed.layer_errors(network, calibration(seed)[1], images.calibration(n_sensitivity, seed + 100), tried, verbose=True)
    costs = mixed.layer_costs(network, next(iter(images.calibration(1))))
    by_size, by_operations = mixed.weight_options(sensitivity, costs), mixed.operation_options(sensitivity, costs)
    first = costs.layer.isin(plan.first)
    uniform_operations = lambda w, a: int((costs.macs * w * np.where(first, 8, a)).sum())  # the image has 8 bits
    chosen = mixed.allocate(by_operations, uniform_operations(4, 4))
    more = "training images; darker is worse; green: least total error within the bit operations of W4A4"
    text = plots.row_caption(images, model, n_sensitivity, more)
    display(plots.save(lowbit.sensitivity_map(sensitivity, text, chosen), "08_sensitivity_map", images, model))

# %% [markdown]
# The same question asked of the accuracy, on held-out images: what is lost when only one layer is quantized, and how much of the whole
# network's loss comes back when only that one stays float.

# %%
if "sensitivity" in sections:
    config = ql.QuantConfig(3, 3)
    some = ptq.layers(graph, plan)[:: 6 if smoke else 1]
    n_heldout = min(len(images.heldout), 100 if smoke else 2000)
    one = mixed.layer_accuracy(network, calibration(seed)[1], images.heldout, config, some, limit=n_heldout, verbose=True)
    more = f"held-out images, W3A3, residual stream 8 bits{', every sixth layer' if smoke else ''}; paired 95 % intervals"
    text = plots.row_caption(images, model, n_heldout, more)
    display(plots.save(lowbit.layer_accuracy(one, text), "08_layer_accuracy", images, model))


# %% [markdown]
# **Mixed precision.** Choose a width for every layer such that the sensitivities add up to the least within a budget: bytes of the weights, or
# bit operations (multiply-accumulates x weight bits x activation bits), where weights and activations get widths of their own. It is an
# integer linear program, which `scipy.optimize.milp` solves exactly. That errors add up is an assumption; the accuracies are measured.

# %%
def point(axis, kind, config, cost, label, **more):
    row = measure(pareto_method, config, seed, **more)
    return {"axis": axis, "kind": kind, "cost": cost or row["bytes"], "top1": row["top1"], "fp32_top1": row["fp32_top1"], "label": label}

def mixed_point(axis, options, budget, base):
    chosen = mixed.allocate(options, budget)
    named = f"mixed precision, {budget / 1e3:.0f} kB" if axis == "size" else f"mixed precision, {budget / 1e9:.2f}e9 bit operations"
    note = ", ".join(filter(None, (named, note_of(pareto_method))))
    more = {"weight_bits": None, "corrections": note} | ({"act_bits": None} if axis == "operations" else {})
    return point(axis, "mixed", mixed.mixed_config(base, chosen), int(chosen.cost.sum()) if axis == "operations" else 0, "", **more)

def uniform_size(bits):
    low, high = (by_size[by_size.weight_bits == b].cost.sum() for b in (2, 8))
    return int(low + (high - low) * (bits - 2) / 6)


# %%
points = []
if "pareto" in sections:
    uniform, budgets = ((2, 3, 4, 8), (2.5, 3)) if smoke else (range(2, 9), (2.25, 2.5, 3, 3.5, 4, 5, 6))
    for b in tqdm(uniform, desc="uniform"):
        points.append(point("size", "uniform", ql.QuantConfig(b, 8), 0, f"W{b}"))
        points.append(point("operations", "uniform", ql.QuantConfig(b, b), uniform_operations(b, b), f"W{b}A{b}"))
    for b in tqdm(budgets, desc="mixed"):
        points.append(mixed_point("size", by_size, uniform_size(b), ql.QuantConfig(8, 8)))
        points.append(mixed_point("operations", by_operations, uniform_operations(b, b), ql.QuantConfig(8, 8)))
    more = f"test images, {note_of(pareto_method) or 'nearest rounding'}, {n_calibration:,} calibration images, seed {seed}"
    text = plots.row_caption(images, model, baseline.n, more)
    display(plots.save(lowbit.pareto(pd.DataFrame(points), text), "08_pareto", images, model))


# %% [markdown]
# ## 5. Why papers disagree
# "W4A4" leaves open what the first and last layer get, what the residual stream carries, whether the image is rounded, and whether BatchNorm
# may look at the data again. The same network, range setter and method under each convention; every bar but the last two changes one thing
# against ours (all layers alike, residual stream and image 8 bits).

# %%
def convention_rows(width):
    act_bits, base = config_of(width).act_bits, measure(convention_method, config_of(width), seed)
    changes = {
        "first and last layer 8 bits": dict(first_last_bits=8), "residual stream float": dict(residual_bits=None),
        "residual stream low bits": dict(residual_bits=act_bits), "image float": dict(input_bits=None), "image low bits": dict(input_bits=act_bits),
        "BatchNorm re-estimation": {}, "most papers: first/last 8,\nresidual stream float": dict(first_last_bits=8, residual_bits=None),
        "strictest: residual stream\nand image low bits": dict(residual_bits=act_bits, input_bits=act_bits),
    }
    for convention, change in tqdm(changes.items(), desc=name_of(width)):
        again = convention == "BatchNorm re-estimation"
        method = convention_method if not again else f"{convention_method} + {convention}".removeprefix("nearest + ")
        row = measure(method, config_of(width, **change), seed)
        gain, low, high = ql.paired_drop(right(row), right(base))
        yield {"width": name_of(width), "convention": convention, "top1": row["top1"], "gain": gain, "gain_low": low, "gain_high": high}


# %%
if "conventions" in sections:
    convention = pd.DataFrame([row for width in (("3/3",) if smoke else ("4/4", "3/3")) for row in convention_rows(width)])
    named = convention_method + (f", {iterations:,} iterations a unit" if convention_method.split(" + ")[0] in LEARNED else " rounding")
    more = f"test images, {named}, {n_calibration:,} calibration images, seed {seed}; paired 95 % intervals"
    text = plots.row_caption(images, model, baseline.n, more)
    display(plots.save(lowbit.conventions(convention, text), "08_conventions", images, model))
    wide = convention.replace("\n", " ", regex=True).set_index(["convention", "width"])[["top1", "gain"]].unstack("width").round(2)
    display(wide.reindex(convention.convention.str.replace("\n", " ").unique()))

# %% [markdown]
# **Under their convention.** What other tools' public code lost on another ResNet-20 of cifar10-jpeg (86.20 % in float; one seed, 512 to 1,024
# images, 500 to 1,000 iterations), with first and last layer at 8 bits and a float residual stream, beside ours under the same convention:
# mean points lost and mean paired interval over the seeds.

# %%
TOOLS = pd.DataFrame({"QDrop's code": {"4/4": 0.54, "3/3": 1.73, "2/4": 3.48, "2/2": 11.98}, "BRECQ's code": {"4/4": 0.38, "3/3": 2.37},
                      "Brevitas GPTQ": {"4/4": 0.35, "3/3": 2.44}})
compared = [w for w in TOOLS.index if w in widths.split(",")][-1 if smoke else 0:]
theirs = {"first_last_bits": 8, "residual_bits": None}
for width, s in tqdm([(w, s) for w in compared for s in seeds] if "tools" in sections else [], desc="networks"):
    measure(best_method, config_of(width, **theirs), s)

# %%
rows = published_or_new()
rows = rows[results.is_default(rows, ("weight_bits", "act_bits", *theirs)) & (rows.first_last_bits == 8) & rows.residual_bits.isna()]
rows = rows.assign(ours=rows.corrections.fillna("").str.removesuffix(f", {iterations} iterations"), width=rows.weight_bits.astype(str) + "/" + rows.act_bits.astype(str))
rows = rows[rows.ours.isin(METHODS) & rows.width.isin(TOOLS.index)].groupby(["width", "ours"])
ours = rows[["drop", "drop_low", "drop_high"]].mean().assign(seeds=rows.size())
ours.join(TOOLS, on="width").reindex([w for w in TOOLS.index if w in widths.split(",")], level="width").round(2) if len(ours) else "not measured"

# %% [markdown]
# ## 6. Targets
# Points lost, mean over the seeds, with the mean of their paired intervals: what was required, what was aimed at, and what `best_method`, what
# it starts from and its relatives give.

# %%
REQUIRED = {"resnet20": {"8/8": 0.2, "4/8": 0.4, "4/4": 0.6, "3/3": 2.5}, "resnet50": {"8/8": 0.2, "4/8": 0.3, "4/4": 0.5, "3/3": 1.5}}
AIMS = {"resnet20": {"8/8": 0.1, "4/8": 0.3, "4/4": 0.5, "3/3": 2.0, "2/4": 4.0, "2/2": 9.0, "2/2/8": 6.0},
        "resnet50": {"8/8": 0.1, "4/8": 0.2, "4/4": 0.3, "3/3": 1.0, "2/4": 2.0, "2/2": 5.0}}

# %%
targets, candidates = [], [m for m in METHODS if m.split(" + ")[0] == best_method.split(" + ")[0]]
for (width, name), rows in everything[everything.name.isin(candidates)].groupby(["width", "name"], sort=False) if len(everything) else []:
    lost, asked = rows[["drop", "drop_low", "drop_high"]].mean(), next(w for w in widths.split(",") if name_of(w) == width)
    goals = [goal[model].get(asked, float("nan")) for goal in (REQUIRED, AIMS)]
    reached = [goal for goal, value in zip(("required", "aim"), goals) if lost["drop"] <= value]
    verdict = reached[-1] + " reached" if reached else "missed" if not np.isnan(goals).all() else ""
    targets.append({"width": width.replace("\n", ", "), "method": name, "seeds": len(rows), **lost, "required": goals[0], "aim": goals[1], "verdict": verdict})
if images.smoke:
    print("digits: the targets are those of CIFAR-10 and mean nothing here")
pd.DataFrame(targets).round(2) if targets else "not measured"

# %% [markdown]
# ## What we learned

# %%
if len(everything):
    means = everything.groupby(["width", "name"], sort=False)["drop"].mean()
    for width in everything.width.unique():
        best, lost = means[width].idxmin(), means[width].min()
        start = f"; with nearest rounding {means[width, 'nearest']:+.2f}" if "nearest" in means[width] else ""
        print(f"- {width}: {lost:+.2f} points lost with {best}, the least of {len(means[width])} methods{start}.".replace("\n", ", "))
    against = {"QDrop + fine-tuning": "QDrop + end to end", "QDrop + end to end": "QDrop", "BRECQ": "AdaRound", "QDrop": "BRECQ"} | dict.fromkeys(["equalisation", *list(CORRECTIONS)[1:]], "nearest")
    single = everything[everything.seed == seed].set_index(["name", "width"])["drop"]
    for name, other in against.items():
        both = [w for w in everything.width.unique() if (name, w) in single and (other, w) in single]
        if both:
            print(f"- {name} against {other}, points won: " + ", ".join(f"{w} {single[other, w] - single[name, w]:+.2f}" for w in both).replace("\n", " ") + ".")
for width, part in fisher.groupby("width", sort=False) if len(fisher) else []:
    clear = "clear" if part.gain_low.mean() > 0 or part.gain_high.mean() < 0 else "within the noise"
    print(f"- {width}: the Fisher loss changes the accuracy by {part.gain.mean():+.2f} points, {clear}.")

# %%
if "conventions" in sections:
    for width, part in convention.groupby("width", sort=False):
        best, worst = part.loc[part.gain.idxmax()], part.loc[part.gain.idxmin()]
        spread = f"{worst.gain:+.2f} ({worst.convention}) to {best.gain:+.2f} points ({best.convention})"
        print(f"- {width} {convention_method}: from {spread} against ours, by convention alone.".replace("\n", " "))
if points:
    table = pd.DataFrame(points)
    for axis, part in table.groupby("axis", sort=False):
        uniform, part = part[part.kind == "uniform"], part[part.kind == "mixed"]
        gain = [row.top1 - uniform[uniform.cost <= 1.001 * row.cost].top1.max() for row in part.itertuples()]
        span = f"{np.nanmin(gain):+.2f} to {np.nanmax(gain):+.2f} points"
        print(f"- Mixed precision by {axis}: {span} against the best uniform width that costs no more.")

# %% [markdown]
# Next: [09_integer_only](09_integer_only.ipynb), the same network in integers alone.
