# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 12 · Beyond: dynamic, trained, without data
#
# **Question.** What lies beside static post-training quantization: ranges chosen at run time,
# quantization during training, calibration without data, and what does each cost? And how is PyTorch's
# own quantization code put together?
#
# **Seen.** [What a full run showed](../results/pages/12_beyond-resnet20-cifar10-jpeg.md), without running it.
#
# **Cost.** Half a minute on the digits. For ResNet-20 on 45,000 training and 10,000 test images about
# three quarters of an hour on two CPU cores: three epochs of fine-tuning are 2,109 steps of 64 images,
# the trials before them 789 more, then distillation and the evaluations. ResNet-50 needs an accelerator.

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
import importlib.metadata
import time

import pandas as pd
import quantlab as ql
import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

# %%
from quantlab import observers, plots
from quantlab.improving.learned import round_to_step
from quantlab.improving.tune import TuneConfig, Tuner
from quantlab.integer import proof
from quantlab.networks.augment import augment
from quantlab.plots import beyond
from quantlab.rivals import pytorch as builtin
from quantlab.rivals import sourcemap
from quantlab.system.comparing import decibels
from quantlab.system.machine import device, seed_everything
from quantlab.system.timing import latency
from quantlab.workbook.study import Study, brief, show

# %% tags=["parameters"]
data = "auto"  # auto, cifar10, digits, images, or the path of a folder or archive
model = "resnet20"  # resnet20 or resnet50
checkpoint = "auto"  # auto, or the path of a .safetensors file
seed = 0
preset = "auto"  # smoke, full, or auto: smoke on the digits
qat_bits = 3  # 2 to 8, of weights and activations in section 2
weight_symmetric = False  # True: weights of 2^b - 1 levels there; False: of all 2^b
# in section 2, over the training images; 0: one in a smoke run, three in a full one
qat_epochs = 0.0
qat_lr = 0.001  # of steps, scales and biases
qat_lr_weights = 0.0  # of codes; 0: chosen on held-out images (a smoke run takes 0.01)
distilled = 0  # images in section 3; 0: 32 in a smoke run, 128 in a full one
distillation_steps = 0  # 0: 20 in a smoke run, 500 in a full one
n_calibration = 0  # 0: 256 in a smoke run, 1,024 in a full one
n_seeds = 0  # seeds in section 3; 0: one in a smoke run, three in a full one

# %%
study = Study(
    data, model, checkpoint, preset,
    n_calibration=n_calibration, seed=seed, notebook="12_beyond",
)
network, images, card = study.network, study.images, study.card
n_calibration = study.n_calibration
n_seeds = study.choose(n_seeds, smoke=1, full=3)
baseline = study.baseline


# %% [markdown]
# ## 1. Dynamic: an LSTM
# A recurrent network has no fixed place where a range could be observed once: its state changes from step
# to step and with the length of the input. *Dynamic* quantization stores weights as int8 and chooses the
# range of what a layer reads at every call. The task: read a digit row by row (always the embedded
# digits, on the CPU).

# %%
class RowReader(nn.Module):
    """Grey rows as a sequence, the last state classified: [B, 3, 32, 32] -> [B, 10]."""

    def __init__(self, hidden=128):
        super().__init__()
        self.lstm = nn.LSTM(32, hidden, batch_first=True)
        self.fc = nn.Linear(hidden, 10)

    def forward(self, images):
        rows = images[:, 0].contiguous()
        states, _ = self.lstm(rows)
        return self.fc(states[:, -1])


# %%
digits = ql.load_data("digits", verbose=False)
pixels, labels = next(digits.train.batches(len(digits.train)))
seed_everything(seed)
reader = RowReader()
optimizer = torch.optim.Adam(reader.parameters(), 5e-3)
started = time.perf_counter()
for _ in tqdm(range(8), desc="train the LSTM", unit=" epochs"):
    for index in torch.randperm(len(labels)).split(64):
        loss = F.cross_entropy(reader(pixels[index]), labels[index])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
        optimizer.step()
spent = time.perf_counter() - started
print(f"{spent:.0f} s, {8 * len(labels):,} images seen, last loss {loss.item():.3f}")


# %% [markdown]
# By hand. Weights: symmetric int8 per tensor, once. Activations: their own range at every call. The
# product is one of integers, $\sum (x_q - z)\,w_q$, and two scales turn it into a real number. The gates
# stay float.

# %%
class DynamicLinear(nn.Module):
    """y = s_x s_w sum((x_q - z) w_q) + b, s_x and z of this x: [B, K] -> [B, N]."""

    def __init__(self, weight, bias):
        super().__init__()
        self.q = ql.choose_qparams(weight.min(), weight.max(), 8, symmetric=True)
        self.register_buffer("codes", ql.quantize_tensor(weight, self.q).to(torch.int8))
        self.register_buffer("bias", bias)
        assert weight.shape[1] * 255 * 127 < 2**24, "float32 holds every sum exactly"

    def forward(self, x):
        q_x = ql.choose_qparams(*torch.aminmax(x), 8)
        x_q = ql.quantize_tensor(x, q_x) - q_x.zero_point
        sums = x_q.float() @ self.codes.float().T
        return (q_x.scale * self.q.scale) * sums + self.bias


# %%
class DynamicReader(nn.Module):
    """RowReader with DynamicLinear for the rows, for the state, and for the classes."""
    def __init__(self, lstm, fc):
        super().__init__()
        self.rows = DynamicLinear(lstm.weight_ih_l0.detach(), lstm.bias_ih_l0.detach())
        self.state = DynamicLinear(lstm.weight_hh_l0.detach(), lstm.bias_hh_l0.detach())
        self.fc = DynamicLinear(fc.weight.detach(), fc.bias.detach())

    def forward(self, images):
        h = c = torch.zeros(len(images), self.state.codes.shape[1])
        for row in images[:, 0].unbind(1):
            i, f, g, o = (self.rows(row) + self.state(h)).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        return self.fc(h)


# %% [markdown]
# Beside it PyTorch's own, in one call. Both against float on the same test images, and all three in turn
# for the time of a call.

# %%
reader.eval()
by_hand = DynamicReader(reader.lstm, reader.fc).eval()
readers = {"float": reader, "dynamic int8 by hand": by_hand}
eager = builtin.backends()[0]
if eager.available:
    readers["quantize_dynamic"] = builtin.dynamic_int8(reader)
else:
    print("quantize_dynamic:", eager.note)

runs = {name: ql.evaluate(net, digits.test, on="cpu") for name, net in readers.items()}
batch, _ = next(digits.test.batches(64))
alone, together = latency(readers, batch[:1]), latency(readers, batch)

# %%
lstm = pd.DataFrame([
    {
        "method": name, "top1": runs[name].top1, "bytes": builtin.bytes_on_disk(net),
        "ms, batch 1": 1e3 * alone[name], "ms, batch 64": 1e3 * together[name],
        "images_per_s": len(batch) / together[name],
    }
    for name, net in readers.items()
])
show(lstm.round(2))

# %%
with torch.inference_mode():
    exact, *rounded = (net(batch) for net in readers.values())
signal = exact.square().sum()
for name, logits in zip(lstm.method[1:], rounded):
    ratio = decibels(signal, (logits - exact).square().sum())
    print(f"{name}: signal to noise of the logits {ratio:.1f} dB")
    assert ratio > 15, "it follows the float network"

text = "test images; throughput at batch 64, taken in turns"
text = plots.row_caption(digits, "LSTM, 128 units", runs["float"].n, text)
plots.save(plots.method_bars(lstm, text), "12_lstm", digits)


# %% [markdown]
# By hand the arithmetic is the point, not the time: codes are multiplied as floats, in a Python loop over
# the rows. The built-in uses int8 kernels, and on x86 keeps activations to 7 bits.
#
# ## 2. Trained: learned step sizes
# Post-training quantization cannot move the weights much. *Quantization-aware training* (QAT) rounds in
# the forward pass and lets the gradient through as if it had not. Esser et al. (LSQ, arXiv:1902.08153)
# learn the step $s$ as well. Write $\hat x = s\,\lfloor v \rceil$ with
# $v = \mathrm{clamp}(x/s,\ Q_N, Q_P)$, and let the rounding alone pass the gradient as it is: then
#
# $$\frac{\partial \hat x}{\partial s} = \begin{cases} \lfloor x/s\rceil - x/s & Q_N < x/s < Q_P \\
# Q_N \text{ or } Q_P & \text{outside} \end{cases} \qquad
# \frac{\partial \hat x}{\partial x} = \begin{cases} 1 & \text{inside} \\ 0 & \text{outside} \end{cases}$$
#
# In three lines, from which autograd finds just these two:

# %%
def lsq(x, s, low, high):
    """s round(clamp(x / s, low, high)); for the gradient, rounding is the identity."""
    v = (x / s).clamp(low, high)
    codes = v + (v.round() - v).detach()
    return s * codes


# %%
q = ql.choose_qparams(-0.7, 0.7, 3, symmetric=True)
low, high = q.qmin, q.qmax
# none of them at s Q_N or s Q_P, where the slope jumps
x = torch.linspace(-1, 2, 100, requires_grad=True)
s = q.scale.clone().requires_grad_()
grad_x, grad_s = torch.autograd.grad(lsq(x, s, low, high).sum(), (x, s))
ratio = (x / s).detach()
inside = (ratio > low) & (ratio < high)
paper = torch.where(inside, ratio.round() - ratio, ratio.clamp(low, high)).sum()
assert torch.allclose(grad_s, paper, atol=1e-4)
assert torch.equal(grad_x, inside.float())

# %% [markdown]
# The package does the same, in fewer passes over memory. It divides the gradient of $s$ by
# $\sqrt{N Q_P}$ for the $N$ values that share $s$, as the paper does: else a step that millions of values
# share would move much faster than a weight.

# %%
x_hat = round_to_step(x, s, low, high)
own_x, own_s = torch.autograd.grad(x_hat.sum(), (x, s))
assert torch.equal(x_hat, ql.fake_quantize(x.detach(), q)), "the quantizer of 03"
assert torch.allclose(x_hat, lsq(x, s, low, high))
assert torch.equal(own_x, grad_x)
assert torch.allclose(own_s, grad_s / (x.numel() * high) ** 0.5, atol=1e-5)
print(f"gradient of s: {grad_s:.3f}, {own_s:.3f} as learned from")

# %% [markdown]
# Start and end are networks of `ql.quantize`: BatchNorm is folded before training, codes are stored at
# the same places. `Tuner` puts a learned step in the place of every quantizer and learned codes, with a
# scale for each channel, in the place of every weight. At the end all of them are rounded for good and
# written back. So what is trained is what runs, in integers if wanted; a cell below wants it.

# %%
started = time.perf_counter()
config = ql.QuantConfig(qat_bits, qat_bits, weight_symmetric=weight_symmetric)
ptq_model = ql.quantize(network, study.stats, config)
ptq_seconds = time.perf_counter() - started
ptq = study.evaluate(ptq_model)
ptq_row = study.row(ptq, "by hand", config, bytes=ql.weight_bytes(ptq_model))
ptq_rows = study.record_rows([ptq_row])

tuner = Tuner(network, ptq_model, TuneConfig(learn_weights=True))
at_start = study.evaluate(tuner.network)
same = (at_start.predictions == ptq.predictions).double().mean().item()
print(f"top-1 {ptq.top1:.2f} %, and {at_start.top1:.2f} % where learning starts")
assert same > 0.99, "one network, but for codes at a tie"


# %% [markdown]
# The loop: cross-entropy, Adam with a cosine to zero, the recipe's crop and flip, batches of 64.

# %%
def batches(split):
    """(images, labels) without end: 64 at random, cropped, mirrored as in training."""
    generator = torch.Generator().manual_seed(seed)
    crop, flip = card.recipe.get("crop", 0), card.recipe.get("flip", False)
    while True:
        index = torch.randint(len(split), (64,), generator=generator)
        pixels = split.images[index].to(device())
        pixels = augment(pixels, generator, crop, flip, 0, split.mean)
        yield split.normalize(pixels), split.labels[index]


# %%
def tuner_for(iterations, lr_weights):
    settings = TuneConfig(iterations, qat_lr, lr_weights, learn_weights=True)
    return Tuner(network, ptq_model, settings)

def heldout_top1(net):
    return study.evaluate(net, images.heldout).top1


# %% [markdown]
# Which rate? Too low and the codes hardly move, too high and they never settle. That is a choice, so
# held-out images make it, after trials of an eighth of the steps; the test images decide nothing. (A
# smoke run tries one rate: nothing is chosen there.)

# %%
passes = qat_epochs or study.choose(0.0, smoke=1.0, full=3.0)
total = max(8, round(passes * len(images.train) / 64))
tried = study.choose(0, smoke=[0.01], full=[0.003, 0.01, 0.03])
trials = {}
for rate in tqdm([qat_lr_weights] if qat_lr_weights else tried, desc="rates"):
    trial = tuner_for(total // 8, rate)
    for _ in trial.steps(batches(images.train), F.cross_entropy):
        pass
    trials[rate] = heldout_top1(trial.network)
rate = max(trials, key=trials.get)
n_heldout = min(study.limit or len(images.heldout), len(images.heldout))
trials = pd.Series(trials, name="held-out top-1, %").rename_axis("rate of the codes")
show(trials.to_frame().round(2))
print(f"after {total // 8} steps, n = {n_heldout:,}; now {total} steps with {rate:g}")

# %%
tuner = tuner_for(total, rate)
history, losses = [], []
marks = {total * i // 8 for i in range(1, 9)}  # where the held-out images are looked at
started = time.perf_counter()
steps = tuner.steps(batches(images.train), F.cross_entropy)
for step, loss in enumerate(tqdm(steps, "fine-tune", total), start=1):
    losses.append(loss)
    if step in marks:
        mean = torch.stack(losses).mean().item()
        losses = []
        look = study.evaluate(tuner.network, images.heldout)
        started += look.seconds  # not a part of training
        history.append({"images": 64 * step, "loss": mean, "heldout": look.top1})
spent = time.perf_counter() - started

# %%
qat_model = tuner.quantized()
qat = study.evaluate(qat_model)
recipe = f"LSQ, {total} steps of 64, Adam {qat_lr:g}, codes {rate:g}"
method, size = f"W{qat_bits}A{qat_bits} QAT, learned steps", ql.weight_bytes(qat_model)
qat_row = study.row(qat, method, config, corrections=recipe, bytes=size)
rows = pd.concat([ptq_rows, study.record_rows([qat_row])], ignore_index=True)

# %% [markdown]
# What was trained is what was written: every step and every code as it was learned. Only the biases,
# which learned as real numbers, are rounded at the end, to multiples of $s_x s_w$.

# %%
learned_steps, learned_layers = tuner.learned
quantizers = {node.name: module for node, module in qat_model.quantizer_nodes.items()}
for name, learned in learned_steps.items():
    assert torch.equal(learned.scale, quantizers[name].scale)
for name, learned in learned_layers.items():
    bias = learned.bias.detach().double().cpu() / qat_model.bias_scale(name)
    assert torch.equal(learned.codes.cpu(), qat_model.codes(name))
    assert torch.equal(bias.round().int(), qat_model.bias_codes(name))

trained = study.evaluate(tuner.network)
same = (trained.predictions == qat.predictions).double().mean().item()
print(
    f"top-1 {trained.top1:.2f} % before the biases were rounded, {qat.top1:.2f} % "
    f"after; {same:.1%} of the answers are the same"
)

# %%
table = brief(rows).assign(
    seconds=[ptq_seconds, ptq_seconds + spent],
    images_seen=[n_calibration, n_calibration + 64 * total], labels=["no", "yes"],
)
show(table.round(2))

# %%
levels = {
    "float": heldout_top1(network), f"PTQ, {qat_bits} bits": heldout_top1(ptq_model)
}
n_levels = 2**qat_bits - weight_symmetric
text = f"held-out images; W{qat_bits}A{qat_bits}, weights of {n_levels} levels, "
text += "residual stream and image 8 bits"
text = study.caption(n_heldout, f"{text}, {recipe}, one seed")
study.save(beyond.fine_tuning(pd.DataFrame(history), levels, text), "12_qat")

# %% [markdown]
# **In integers.** The trained network goes through the converter of [09](09_integer_only.ipynb) as every
# other: its steps, codes and biases are those of integers already. First, fed the same codes, each of its
# operations must give the simulation's codes, but for sums that float32 cannot tell from a tie. Then the
# answers, on all test images looked at: after such a tie an image may go its own way, but few do.

# %%
integer_model = ql.to_integer(qat_model, executor="fast")
some, _ = next(study.test.batches(64))
operations = proof.per_operation(qat_model, integer_model, [some])
assert operations.max_difference.max() <= 1, "in codes"
assert operations.from_tie.max() < 2**-12, "only next to a tie"

in_integers = study.evaluate(integer_model)
equal = in_integers.predictions == qat.predictions
print(
    f"{operations.differing.sum()} of {operations['values'].sum():,} codes differ; "
    f"in integers {in_integers.top1:.2f} %, simulated {qat.top1:.2f} %: the same "
    f"answer to {equal.sum():,} of {qat.n:,} test images"
)
assert equal.double().mean() >= 0.99, "what is trained is what runs"


# %% [markdown]
# ## 3. Without data: calibration images from BatchNorm's statistics
# Every BatchNorm remembers mean and variance of what it saw in training. Cai et al. (ZeroQ,
# arXiv:2001.00281) start from noise and change the *image* until the activations in front of every
# BatchNorm have those statistics. No training image is needed.

# %%
def spread(value):
    """Per-channel mean and deviation of [N, C, H, W]."""
    return value.mean((0, 2, 3)), value.std((0, 2, 3))

def distance(found, wanted):
    return sum((a - b).square().mean() for a, b in zip(found, wanted))


# %%
def watched(network):
    """(a copy of it, what each BatchNorm remembers, what each has read last)."""
    net = copy.deepcopy(network).eval().requires_grad_(False)
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    wanted = {m: (m.running_mean, (m.running_var + m.eps).sqrt()) for m in norms}
    read = {}
    for norm in norms:
        norm.register_forward_pre_hook(lambda m, x: read.update({m: spread(x[0])}))
    return net, wanted, read


# %%
def mismatch(watched, x):
    """How far images x, and what BatchNorm reads of them, are from the statistics."""
    net, wanted, read = watched
    net(x)
    inside = sum(distance(read[norm], wanted[norm]) for norm in wanted)
    return distance(spread(x), (0.0, 1.0)) + inside


# %%
def distil(watched, x, steps):
    """(images [N, 3, H, W] made of x by Adam, the mismatch at every step)."""
    x = x.to(device()).requires_grad_()
    optimizer = torch.optim.Adam([x], 0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    for _ in tqdm(range(steps), "distil", leave=False):
        loss = mismatch(watched, x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return x.detach().cpu(), losses


# %% [markdown]
# The same number of real images, of distilled ones, and of Gaussian noise with the mean and deviation of
# the training images (0 and 1 after normalisation); as a reference all the real calibration images.
# Everything at W4A4.

# %%
count = study.choose(distilled, smoke=32, full=128)
steps = study.choose(distillation_steps, smoke=20, full=500)
four = ql.QuantConfig(weight_bits=4, act_bits=4)
shape = next(iter(study.calibration(n=1))).shape[1:]
network = network.to(device())

def measure(source, n, s, images):
    """Calibrate on `images`, record the row; (row, statistics)."""
    statistics = ql.collect(network, images)
    qmodel = ql.quantize(network, statistics, four)
    is_default = (source, n) == ("real images", n_calibration)
    method = "by hand" if is_default else f"W4A4, calibrated on {n:,} {source}"
    columns = dict(seed=s, n_calibration=n, bytes=ql.weight_bytes(qmodel))
    row = study.row(study.evaluate(qmodel), method, four, **columns)
    return study.record_rows([row]).assign(source=source, images=n), statistics


# %%
measured = []
for s in range(seed, seed + n_seeds):
    generator = torch.Generator().manual_seed(s)
    noise = torch.randn(count, *shape, generator=generator)
    found, losses = distil(watched(network), noise.clone(), steps)
    print(
        f"seed {s}: distance of the statistics {losses[0]:.2f} at the start, "
        f"{losses[-1]:.2f} after {steps} steps"
    )
    everything = study.calibration(s)
    measured.append(measure("real images", n_calibration, s, everything))
    measured.append(measure("real images", count, s, study.calibration(s, n=count)))
    measured.append(measure("distilled images", count, s, [found]))
    measured.append(measure("noise images", count, s, [noise]))

# %%
without = pd.concat([row for row, _ in measured], ignore_index=True)
without["float"] = without.fp32_top1
groups = without.groupby(["source", "images"], sort=False)
show(groups.top1.agg(["mean", "std", "min", "max"]).round(2))


# %%
def upper(statistics):
    """The upper end of every edge's range at 4 bits, by name."""
    edges = statistics.edges.items()
    return pd.Series({name: observers.histogram(edge, 4)[1] for name, edge in edges})

reference = upper(measured[0][1])  # the first seed's real images, all of them
parts = []
for place in (2, 3):  # its distilled images and its noise
    high = upper(measured[place][1])
    ratio = (high / reference)[(high > 0) & (reference > 0)]
    order = [reference.index.get_loc(name) for name in ratio.index]
    source = without.source[place]
    parts.append(pd.DataFrame({"source": source, "order": order, "ratio": ratio}))

# %%
text = (
    f"test images, W4A4, residual stream 8 bits, {n_seeds} seed(s), lines: least and "
    f"most of them, {steps} steps of distillation; ranges: first seed, against "
    f"{n_calibration:,} real images"
)
text = study.caption(baseline.n, text)
figure = beyond.calibration_sources(without, pd.concat(parts), text)
study.save(figure, "12_data_free")

# %% [markdown]
# What a network's statistics remember of its training images, as pictures (of the last seed):

# %%
mean = torch.tensor(images.train.mean).view(1, 3, 1, 1)
std = torch.tensor(images.train.std).view(1, 3, 1, 1)
pictures = (found[:16] * std + mean).clamp(0, 1)
with torch.inference_mode():
    answers = network(found[:16].to(device())).argmax(1)
titles = [images.classes[i] for i in answers]
text = "distilled images with the class that the float network sees in them"
text = study.caption(len(pictures), text)
pixels = (255 * pictures).to(torch.uint8)
figure = plots.image_grid(pixels, titles, [False] * len(pixels), text)
study.save(figure, "images_distilled")

# %% [markdown]
# ## 4. The source map
# The original shipped a mind map of PyTorch's quantization source, drawn by hand. This one is parsed from
# the files of the installed packages: every module with its classes and functions, sorted into topics by
# name, and which takes what from which (re-exports followed to where a name is defined). Nothing is
# imported.

# %%
scans = {}
for package in ("torch.ao", "torchao"):
    folder = sourcemap.folder_of(package)
    if folder is None:
        print(f"{package} is not installed: left out")
        continue
    version = importlib.metadata.version(package.partition(".")[0])
    modules = sourcemap.scan(package, folder)
    lines = sum(module.lines for module in modules)
    scans[f"{package} {version}"] = modules
    print(f"{package} {version}: {len(modules)} files, {lines:,} lines")

topics = {name: sourcemap.topic_table(modules) for name, modules in scans.items()}
uses = {name: sourcemap.topic_edges(modules) for name, modules in scans.items()}
show(pd.concat(topics))

# %%
aside = ["models and tests", "prototypes"]
drawn, left_out = {}, 0
for name, table in topics.items():
    is_aside = table.topic.isin(aside)
    edges = uses[name]
    edges = edges[~edges.importer.isin(aside) & ~edges.imported.isin(aside)]
    drawn[name] = table[~is_aside], edges
    left_out += table.lines[is_aside].sum()

# %%
text = (
    "Parsed from the installed files. Area of a circle: lines of code; arrows point "
    "from who uses to who is used, the 16 strongest, width: names taken. Below a "
    "topic: what others use most of it. Not drawn: prototypes, example models and "
    f"tests, {left_out:,} lines."
)
plots.save(beyond.source_map(drawn, text), "source_map")

# %% [markdown]
# The same for XMind, with every module, class and function: one sheet a package, the strongest uses
# between modules as arrows.

# %%
arrows = {name: sourcemap.arrows(modules) for name, modules in scans.items()}
sheets = {name: (sourcemap.tree(scans[name]), arrows[name]) for name in scans}
path = sourcemap.write_xmind(ql.root() / "pic" / "source_map.xmind", sheets)
print(f"{path.name}: {path.stat().st_size:,} bytes, sheets {', '.join(sheets)}")
strongest = [arrow for name in scans for arrow in arrows[name][:6]]
show(pd.DataFrame(strongest, columns=["module", "uses", "above all"]))

# %% [markdown]
# ## What we learned

# %%
times, sizes = lstm["ms, batch 64"], lstm.bytes
print(f"- LSTM: float {lstm.top1[0]:.2f} %")
for i in range(1, len(lstm)):
    print(
        f"- LSTM, {lstm.method[i]}: {lstm.top1[i]:.2f} %, {sizes[0] / sizes[i]:.1f} "
        f"times fewer bytes, {times[0] / times[i]:.2f} times the speed of float"
    )
lost = rows["drop"]
print(
    f"- At {qat_bits} bits PTQ loses {lost[0]:+.2f} points, fine-tuning "
    f"{lost[1]:+.2f}: for {spent:.0f} s instead of {ptq_seconds:.0f}, "
    f"{64 * total:,} labelled images seen instead of {n_calibration:,} without labels."
)

# %%
means = groups.top1.mean().items()
listed = ", ".join(f"{top1:.2f} % on {n:,} {source}" for (source, n), top1 in means)
print(f"- W4A4 by calibration: {listed}.")
for name, table in topics.items():
    largest, fraction = table.lines.idxmax(), table.lines.max() / table.lines.sum()
    first = uses[name].iloc[0]
    print(
        f"- {name}: {fraction:.0%} of the lines are {table.topic[largest]}; "
        f"{first.importer} takes most from {first.imported}."
    )

# %% [markdown]
# Next: [14_number_formats](14_number_formats.ipynb), whether integers are the right grid.
