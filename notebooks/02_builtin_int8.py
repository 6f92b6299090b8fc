# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 02 · PyTorch's own int8
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/TimS-ml/Handwritten-Quantization/blob/main/notebooks/02_builtin_int8.ipynb)
#
# **Question.** What does a finished tool do to the network at 8 bits, what does it cost in accuracy, and what does it gain in size and speed?
#
# **Cost.** A minute on the digits, about two on 10,000 test images, on two CPU cores. These int8 kernels exist for the CPU only.

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
import torch
from quantlab import plots
from quantlab.system.timing import latency
from quantlab.rivals import pytorch as builtin
from quantlab.workbook import results

# %% tags=["parameters"]
data = "auto"  # auto, cifar10, digits, images, or the path of a folder or archive
model = "resnet20"  # resnet20 or resnet50
checkpoint = "auto"  # auto, or the path of a .safetensors file
seed = 0
preset = "auto"  # smoke, full, or auto: smoke on the digits
n_calibration = 0  # 0: 256 in a smoke run, 1,024 in a full one

# %% [markdown]
# ## 1. Which back ends there are
# Two generations: the *eager* tool that the original experiment used in 2021, deprecated since, and its supported successor *PT2E*. Either
# may be missing on a machine; then its cells are skipped and say so.

# %%
ready = {backend.name: backend.available for backend in builtin.backends()}
for backend in builtin.backends():
    print(f"{backend.name:6} {'ready' if backend.available else 'MISSING'}: {backend.note}")

# %%
images = ql.load_data(data)
smoke = images.smoke if preset == "auto" else preset == "smoke"
limit = 1000 if smoke else None  # test images
n_calibration = n_calibration or min(256 if smoke else 1024, len(images.train))
network, card = ql.load_trained(model, images, checkpoint)
network = network.cpu().to(memory_format=torch.channels_last)
calibration = images.calibration(n_calibration, seed)


# %% [markdown]
# ## 2. Fusing
# A BatchNorm behind a convolution is a per-channel scale and shift, which the convolution can absorb; a ReLU only cuts off what the
# convolution writes. Fusing turns three modules into one, so that values are rounded once instead of three times.

# %%
def kinds(module):
    return pd.Series([type(m).__name__ for m in module.modules() if not list(m.children())]).value_counts()

if ready["eager"]:
    fused = builtin.fuse(network)
    display(pd.DataFrame({"before": kinds(network), "after fusing": kinds(fused)}).fillna(0).astype(int))

# %% [markdown]
# Every BatchNorm is gone and an `Identity` stands in its place; a `ConvReLU2d` holds what were three modules. Fusing must not change what
# the network computes:

# %%
if ready["eager"]:
    sample = next(iter(calibration))[:32]
    with torch.no_grad():
        difference = (fused(sample) - network(sample)).abs().max().item()
        spread = network(sample).std().item()
    print(f"largest difference of a logit: {difference:.1e}, of a spread of {spread:.1f}")
    assert difference < 1e-3 * spread

# %% [markdown]
# ## 3. Calibrate and convert
# Observers watch the activations of the calibration images; then every module is replaced by one that computes in int8.

# %%
networks = {"float": network}
if ready["eager"]:
    networks["eager int8"] = builtin.eager_int8(network, calibration)

# %% [markdown]
# One layer's parameters. Its weights are int8 with a scale per output channel and zero-point 0; its output is unsigned with one scale.

# %%
if ready["eager"]:
    layer = next(m for m in networks["eager int8"].modules() if "Conv" in type(m).__name__)
    weight = layer.weight()
    print(layer)
    print(f"weight: {tuple(weight.shape)}, {weight.dtype}, codes {weight.int_repr().min()} to {weight.int_repr().max()}")
    per_channel = weight.qscheme() == torch.per_channel_affine  # engines for ARM have one scale for the whole tensor
    scales = weight.q_per_channel_scales() if per_channel else torch.full((len(weight),), weight.q_scale())
    print("first scales:", [round(s, 5) for s in scales[:4].tolist()])

# %% [markdown]
# The same codes from our formula, `code = round(weight / scale)`: the tool does nothing that we could not do by hand.

# %%
if ready["eager"]:
    folded = next(m for m in fused.modules() if isinstance(m, torch.nn.Conv2d)).weight.detach()
    q = ql.QParams(scales.float(), torch.zeros(len(folded), dtype=torch.int32), -128, 127, axis=0)
    by_hand = ql.quantize_tensor(folded, q)
    print(f"{(by_hand == weight.int_repr()).double().mean():.2%} of {by_hand.numel()} codes agree")
    assert torch.equal(by_hand, weight.int_repr().int())

# %% [markdown]
# ## 4. The successor: PT2E
# `torch.export` turns the network into a graph, a quantizer annotates it, and the inductor compiler picks int8 kernels.

# %%
if ready["pt2e"]:
    networks["PT2E int8"] = builtin.pt2e_int8(network, calibration)
else:
    print(next(b.note for b in builtin.backends() if b.name == "pt2e"))

# %% [markdown]
# ## 5. Accuracy, size, speed

# %%
evaluations = {name: ql.evaluate(n, images.test, limit=limit, batch_size=64, on="cpu") for name, n in networks.items()}
baseline = evaluations["float"]
sizes = {name: builtin.bytes_on_disk(n) for name, n in networks.items()}
widths = {"float": {}, "eager int8": {"weight_bits": 8, "act_bits": builtin.eager_act_bits() if ready["eager"] else 8},
          "PT2E int8": {"weight_bits": 8, "act_bits": 8}}
rows = [
    results.make_row(data=images, model=model, card=card, baseline=baseline, result=evaluations[name], method=name, seed=seed,
                     n_calibration=n_calibration if widths[name] else 0, notebook="02_builtin_int8", bytes=sizes[name], **widths[name])
    for name in networks
]
results.record(rows)[["method", "weight_bits", "act_bits", "n_test", "top1", "drop", "drop_low", "drop_high", "bytes"]].round(2)

# %% [markdown]
# The eager tool's default keeps activations to **7 bits** on x86 engines (`reduce_range`), because an unsigned-by-signed int8 product may
# saturate on processors without VNNI. The original's table calls this row 8 bits; the column `act_bits` says what it is here.

# %%
table = pd.DataFrame([
    {"method": name, "top1": e.top1, "bytes": sizes[name], "images_per_s": e.images_per_s,
     "points lost": ql.paired_drop(baseline.correct, e.correct)[0]}
    for name, e in evaluations.items()
])
text = plots.row_caption(images, model, baseline.n, f"{n_calibration:,} calibration images, {torch.get_num_threads()} threads, batches of 64")
plots.save(plots.method_bars(table, text), "02_builtin", images, model)

# %% [markdown]
# Latency in turn, so that a machine that slows down slows all of them: read the ratios, not the milliseconds.

# %%
lines = []
for batch in (1, 64):
    sample = next(images.test.batches(batch))[0]
    runnable = {name: n for name, n in networks.items() if batch > 1 or name != "PT2E int8"}  # PT2E is compiled for batches of 64
    times = latency(runnable, sample, repeats=5 if smoke else 15)
    lines += [{"batch": batch, "method": m, "ms": 1e3 * s, "times faster than float": times["float"] / s} for m, s in times.items()]
pd.DataFrame(lines).round(2)

# %% [markdown]
# ## What we learned

# %%
for name, e in list(evaluations.items())[1:]:
    drop, low, high = ql.paired_drop(baseline.correct, e.correct)
    ratio = table.bytes[0] / table.set_index("method").bytes[name]
    print(f"- {name}: {e.top1:.2f} %, {drop:+.2f} points lost [{low:+.2f}, {high:+.2f}], {ratio:.1f} times smaller on disk.")

# %% [markdown]
# Next: [03_quantize_by_hand](03_quantize_by_hand.ipynb), the same with our own arithmetic, and then fewer bits than any of these offers.
