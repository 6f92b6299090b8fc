# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 12 · Beyond: dynamic, trained, without data
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/TimS-ml/Handwritten-Quantization/blob/main/notebooks/12_beyond.ipynb)
#
# **Question.** What lies beside static post-training quantization: ranges chosen at run time, quantization during training, calibration without
# data, and what does each cost? And how is PyTorch's own quantization code put together?
#
# **Cost.** Under a minute on the digits. On 45,000 training and 10,000 test images with two CPU cores twenty to forty minutes: three epochs of
# fine-tuning are 2,109 steps of 64 images, each about two and a half times a float training step; then distillation and twelve evaluations.

# %%
import os
import subprocess
import sys

if "google.colab" in sys.modules and not os.path.isdir("quantlab"):  # fetch the workbook; Colab keeps its own torch
    subprocess.check_call("test -d workbook || git clone --depth 1 https://github.com/TimS-ml/Handwritten-Quantization workbook; pip install -q -e workbook", shell=True)
    os.chdir("workbook")
    sys.path.insert(0, os.getcwd())

# %%
import copy
import dataclasses
import importlib.metadata
import time

import pandas as pd

# %%
import quantlab as ql
import torch
import torch.nn.functional as F
from quantlab import observers, plots, ptq
from quantlab.system.timing import latency
from quantlab.networks.train import augment
from quantlab.plots import beyond
from quantlab.rivals import pytorch as builtin
from quantlab.rivals import sourcemap
from quantlab.system.files import root
from quantlab.system.machine import device, seed_everything
from quantlab.workbook import results
from torch import nn
from torch.nn.utils import parametrize
from tqdm.auto import tqdm

# %% tags=["parameters"]
data = "auto"  # auto, cifar10, digits, images, or the path of a folder or archive
model = "resnet20"  # resnet20 or resnet50
checkpoint = "auto"  # auto, or the path of a .safetensors file
seed = 0
preset = "auto"  # smoke, full, or auto: smoke on the digits
qat_bits = 3  # 2 to 8, of weights and activations in section 2
qat_epochs = 0.0  # passes over the training images in section 2; 0: one and a half in a smoke run, three in a full one
qat_learning_rate = 0.0002  # of Adam; at 0.001 training diverges
distilled = 0  # images in section 3; 0: 32 in a smoke run, 128 in a full one
distillation_steps = 0  # 0: 40 in a smoke run, 500 in a full one
n_calibration = 0  # 0: 256 in a smoke run, 1,024 in a full one
n_seeds = 0  # seeds in section 3; 0: one in a smoke run, three in a full one

# %%
images = ql.load_data(data)
smoke = images.smoke if preset == "auto" else preset == "smoke"
limit = 1000 if smoke else None  # test images
n_calibration = n_calibration or min(256 if smoke else 1024, len(images.train))
n_seeds = n_seeds or (1 if smoke else 3)
network, card = ql.load_trained(model, images, checkpoint)
baseline = ql.evaluate(network, images.test, limit=limit)


# %% [markdown]
# ## 1. Dynamic: an LSTM
# A recurrent network has no fixed place where a range could be observed once: its state changes from step to step and with the length of the
# input. *Dynamic* quantization stores weights as int8 and chooses the range of what a layer reads at every call. The task: read a digit row by
# row (always the embedded digits, on the CPU).

# %%
class RowReader(nn.Module):
    """float32 images [B, 3, 32, 32] -> logits [B, 10]: the grey rows as a sequence of 32 vectors, the last state classified."""

    def __init__(self, hidden=128):
        super().__init__()
        self.lstm, self.fc = nn.LSTM(32, hidden, batch_first=True), nn.Linear(hidden, 10)

    def forward(self, images):
        return self.fc(self.lstm(images[:, 0].contiguous())[0][:, -1])

digits = ql.load_data("digits", verbose=False)
seed_everything(seed)
reader = RowReader()
optimizer = torch.optim.Adam(reader.parameters(), 5e-3)
pixels, labels = digits.train.normalize(digits.train.images[torch.arange(len(digits.train))]), digits.train.labels

# %%
started = time.perf_counter()
for _ in tqdm(range(8), desc="train the LSTM", unit=" epochs"):
    for index in torch.randperm(len(labels)).split(64):
        loss = F.cross_entropy(reader(pixels[index]), labels[index])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
        optimizer.step()
print(f"trained in {time.perf_counter() - started:.0f} s, {8 * len(labels):,} images seen, last loss {loss.item():.3f}")


# %% [markdown]
# By hand. Weights: symmetric int8 per tensor, once. Activations: their own range at every call. The product is one of integers,
# $\sum (x_q - z)\,w_q$, and two scales turn it into a real number. The gates stay float.

# %%
class DynamicLinear(nn.Module):
    """y = s_x s_w sum((x_q - z) w_q) + b with s_x and z from this very x; float32 [B, K] -> [B, N]."""

    def __init__(self, weight, bias):
        super().__init__()
        self.q = ql.choose_qparams(weight.min(), weight.max(), 8, symmetric=True)
        self.register_buffer("codes", ql.quantize_tensor(weight, self.q).to(torch.int8))
        self.register_buffer("bias", bias)
        assert weight.shape[1] * 255 * 127 < 2**24, "every sum is an integer that float32 holds exactly"

    def forward(self, x):
        low, high = torch.aminmax(x)
        q_x = ql.choose_qparams(low, high, 8)
        x_q = ql.quantize_tensor(x, q_x) - q_x.zero_point
        return (q_x.scale * self.q.scale) * (x_q.float() @ self.codes.float().T) + self.bias


# %%
class DynamicReader(nn.Module):
    """RowReader with three DynamicLinear: for the rows, for the state, and for the classes."""

    def __init__(self, reader):
        super().__init__()
        w_rows, w_state, b_rows, b_state, w_fc, b_fc = (p.detach() for p in reader.parameters())
        self.rows, self.state, self.fc = DynamicLinear(w_rows, b_rows), DynamicLinear(w_state, b_state), DynamicLinear(w_fc, b_fc)

    def forward(self, images):
        h = c = torch.zeros(len(images), self.state.codes.shape[1])
        for row in images[:, 0].unbind(1):
            i, f, g, o = (self.rows(row) + self.state(h)).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        return self.fc(h)


# %% [markdown]
# Beside it PyTorch's own, in one call. Both against float on the same test images, and all three in turn for the time of a call.

# %%
readers = {"float": reader.eval(), "dynamic int8 by hand": DynamicReader(reader).eval()}
if builtin.backends()[0].available:
    readers["quantize_dynamic"] = builtin.dynamic_int8(reader)
else:
    print("quantize_dynamic:", builtin.backends()[0].note)
runs = {name: ql.evaluate(net, digits.test, on="cpu") for name, net in readers.items()}
batches = {size: digits.test.normalize(digits.test.images[torch.arange(size)]) for size in (1, 64)}
seconds = {size: latency(readers, batch) for size, batch in batches.items()}
lstm = pd.DataFrame([{"method": name, "top1": runs[name].top1, "bytes": builtin.bytes_on_disk(net), "ms, batch 1": 1e3 * seconds[1][name],
                      "ms, batch 64": 1e3 * seconds[64][name], "images_per_s": 64 / seconds[64][name]} for name, net in readers.items()])
lstm.round(2)

# %%
with torch.inference_mode():
    outputs = {name: net(batches[64]) for name, net in readers.items()}
noise = {name: 10 * torch.log10(outputs["float"].square().sum() / (y - outputs["float"]).square().sum()).item() for name, y in outputs.items() if name != "float"}
print("signal to noise of the logits, dB:", {name: round(v, 1) for name, v in noise.items()})
assert min(noise.values()) > 15, "both follow the float network"
plots.save(plots.method_bars(lstm, plots.row_caption(digits, "LSTM, 128 units", runs["float"].n, "test images; throughput at batch 64, taken in turns")), "10_lstm", digits)


# %% [markdown]
# By hand the arithmetic is the point, not the time: codes are multiplied as floats, in a Python loop over the rows. The built-in uses int8
# kernels, and on x86 keeps activations to 7 bits.

# %% [markdown]
# ## 2. Trained: learned step sizes at 3 bits
# Post-training quantization cannot move the weights much. *Quantization-aware training* rounds in the forward pass and lets the gradient
# through as if it had not. Esser et al. (LSQ, arXiv:1902.08153) learn the step $s$ as well:
#
# $$ \hat x = s\,\lfloor v \rceil,\quad v = \mathrm{clamp}(x/s,\ Q_N, Q_P), \qquad
# \frac{\partial \hat x}{\partial s} = \begin{cases} \lfloor v\rceil - v & Q_N < x/s < Q_P \\ Q_N \text{ or } Q_P & \text{outside} \end{cases} $$
#
# with the gradient of $s$ scaled by $1/\sqrt{N Q_P}$, $N$ the number of values that share it. Written as elementwise operations: torch's own
# learnable fake-quantize kernel is many times slower on the CPU.

# %%
class Rounded(torch.autograd.Function):
    """s * round(clamp(x / s, low, high)) with the gradients above; s broadcasts against x, low and high are integers."""
    @staticmethod
    def forward(ctx, x, s, low, high):
        v = x / s
        codes = v.clamp(low, high).round_()
        ctx.save_for_backward(v, codes, s)
        ctx.bounds = low, high
        return codes * s

    @staticmethod
    def backward(ctx, gradient):
        v, codes, s = ctx.saved_tensors
        passed = gradient * ((v >= ctx.bounds[0]) & (v <= ctx.bounds[1]))
        return passed, (gradient * codes - passed * v).sum_to_size(s.shape), None, None


# %%
class LearnedStep(nn.Module):
    """Rounds a float32 tensor to the codes of `q`, whose scale is learned."""

    def __init__(self, q):
        super().__init__()
        self.q, self.step = q, nn.Parameter(q.scale.clone())

    def forward(self, x):
        gain = (x[0].numel() * self.q.qmax) ** -0.5  # x[0]: one image's values, or the weights of one output channel
        scaled = self.step.detach() + gain * (self.step - self.step.detach())  # the step itself, with the gradient times gain
        s, z = dataclasses.replace(self.q, scale=scaled).broadcast(x.dim())
        zero = int(z.flatten()[0])  # weights are symmetric: 0 in every channel
        return Rounded.apply(x, s.view([1] * x.dim()) if not s.dim() else s, self.q.qmin - zero, self.q.qmax - zero)


# %% [markdown]
# The check: the gradient that autograd finds is the one in the paper.

# %%
q = ql.choose_qparams(-0.7, 0.7, 3, symmetric=True)
x, quantizer = torch.linspace(-2, 2, 101)[None].requires_grad_(), LearnedStep(q)
quantizer(x).sum().backward()
v = (x / q.scale).detach()
expected = torch.where(v.abs() < q.qmax, v.round() - v, v.clamp(q.qmin, q.qmax)).sum() * (x.numel() * q.qmax) ** -0.5
assert torch.allclose(quantizer.step.grad, expected, atol=1e-4) and torch.equal(x.grad[0] != 0, v[0].abs() <= q.qmax)
assert torch.equal(quantizer(x), ql.fake_quantize(x.detach(), q)), "forward: the quantizer of notebook 03"

# %% [markdown]
# Start and end are the network of `ql.quantize`: BatchNorm is folded before training, codes are stored at the same places, and at the end steps and
# weights go back into it. So what is trained is what runs, in integers if wanted.

# %%
started = time.perf_counter()
config = ql.QuantConfig(weight_bits=qat_bits, act_bits=qat_bits)
stats = ql.collect(network, images.calibration(n_calibration, seed))
ptq_model = ql.quantize(network, stats, config)
ptq_seconds = time.perf_counter() - started


# %%
class BiasCode(nn.Module):
    """Rounds a bias to multiples of s_x * s_w of the two LearnedStep it is given; straight through."""

    def __init__(self, reads, weight):
        super().__init__()
        self.steps = (reads, weight)  # a tuple: they belong to the network already

    def forward(self, bias):
        unit = self.steps[0].step.detach().double() * self.steps[1].step.detach().double()
        return bias + ((torch.round(bias.double() / unit) * unit).float() - bias).detach()


# %%
def layers(graph):
    """(target of a layer, target of the quantizer whose codes it reads) of every convolution and linear layer."""
    for node in [n for n in graph.graph.nodes if n.op == "call_module" and hasattr(graph.get_submodule(n.target), "weight_qparams")]:
        source = node.args[0]
        while "quantizers." not in str(source.target):
            source = source.args[0]
        yield node.target, source.target


# %%
def trainable(qmodel, floats):
    """A copy that holds float weights and rounds them, the biases and every stored value, with learned steps."""
    net = copy.deepcopy(qmodel)
    for name, module in list(net.quantizers.named_children()):
        setattr(net.quantizers, name, LearnedStep(module.qparams))
    for name, source in layers(net):
        layer = net.get_submodule(name)
        layer.load_state_dict(floats.get_submodule(name).state_dict())
        parametrize.register_parametrization(layer, "weight", LearnedStep(layer.weight_qparams))
        parametrize.register_parametrization(layer, "bias", BiasCode(net.get_submodule(source), layer.parametrizations.weight[0]))
    return net


# %%
@torch.no_grad()
def frozen(net, qmodel):
    """`qmodel` with the learned steps, weights and biases."""
    out = copy.deepcopy(qmodel)
    for name, module in out.quantizers.named_children():
        module.scale.copy_(net.get_submodule(f"quantizers.{name}").step)
    for name, _ in layers(out):
        layer, learned = out.get_submodule(name), net.get_submodule(name)
        layer.weight_qparams = dataclasses.replace(layer.weight_qparams.to("cpu"), scale=learned.parametrizations.weight[0].step.detach())
        layer.weight.copy_(ql.fake_quantize(learned.parametrizations.weight.original, layer.weight_qparams))
        layer.bias.copy_(learned.bias)
    return out


# %% [markdown]
# The loop: cross-entropy, Adam with a cosine to zero, the recipe's crop and flip, batches of 64. The accuracy on held-out images is followed eight times.

# %%
net = trainable(ptq_model, ptq.prepare(network)[0]).to(device())
total = max(8, round((qat_epochs or (1.5 if smoke else 3)) * len(images.train) / 64))
optimizer = torch.optim.Adam(net.parameters(), qat_learning_rate)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
generator = torch.Generator().manual_seed(seed)
crop, flip = (card.recipe.get(name) for name in ("crop", "flip"))

def batch_of(split):
    index = torch.randint(len(split), (64,), generator=generator)
    pictures = augment(split.images[index].to(device()), generator, crop or 0, flip or False, 0, split.mean)
    return split.normalize(pictures).contiguous(memory_format=torch.channels_last), split.labels[index].to(device())

def heldout_top1(network):
    return ql.evaluate(network, images.heldout, limit=1000).top1


# %%
history, loss_sum, spent, since = [], 0.0, 0.0, 0
for step in tqdm(range(1, total + 1), desc="fine-tune", unit=" steps"):
    started = time.perf_counter()
    inputs, labels = batch_of(images.train)
    loss = F.cross_entropy(net(inputs), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()
    loss_sum, since, spent = loss_sum + loss.item(), since + 1, spent + time.perf_counter() - started
    if step * 8 // total > (step - 1) * 8 // total:
        history.append({"images": 64 * step, "loss": loss_sum / since, "heldout": heldout_top1(net)})
        loss_sum, since = 0.0, 0

# %%
qat_model = frozen(net.cpu(), ptq_model.cpu())
with torch.no_grad():
    check = next(iter(images.calibration(64, seed + 1)))
    agree = (qat_model(check).argmax(1) == net(check).argmax(1)).double().mean().item()
assert agree >= 0.98, "frozen and trained are one network, but for codes at a tie"
assert all(m.step.min() > 0 for m in net.modules() if isinstance(m, LearnedStep))
outcome = {"PTQ": ql.evaluate(ptq_model, images.test, limit=limit), "QAT": ql.evaluate(qat_model, images.test, limit=limit)}
common = dict(data=images, model=model, card=card, baseline=baseline, config=config, n_calibration=n_calibration, seed=seed, notebook="12_beyond")
recipe = f"LSQ, {total} steps of 64, Adam {qat_learning_rate:g}"
rows = results.record([
    results.make_row(**common, result=outcome["PTQ"], method="by hand", bytes=ql.weight_bytes(ptq_model)),
    results.make_row(**common, result=outcome["QAT"], method=f"W{qat_bits}A{qat_bits} QAT, learned steps", corrections=recipe, bytes=ql.weight_bytes(qat_model)),
])

# %%
seen = [n_calibration, n_calibration + 64 * total]
qat = rows[["method", "top1", "drop", "drop_low", "drop_high", "bytes"]].assign(seconds=[ptq_seconds, ptq_seconds + spent], images_seen=seen, labels=["no", "yes"])
qat.round(2)

# %%
levels = {"float": heldout_top1(network), f"PTQ, {qat_bits} bits": heldout_top1(ptq_model)}
text = plots.row_caption(images, model, min(1000, len(images.heldout)), f"held-out images; W{qat_bits}A{qat_bits}, residual stream and image 8 bits, {recipe}, one seed")
plots.save(beyond.fine_tuning(pd.DataFrame(history), levels, text), "12_qat", images, model)


# %% [markdown]
# ## 3. Without data: calibration images from BatchNorm's statistics
# Every BatchNorm remembers mean and variance of what it saw in training. Cai et al. (ZeroQ, arXiv:2001.00281) start from noise and change
# the *image* until the activations in front of every BatchNorm have those statistics. No training image is needed.

# %%
def spread(value):
    """Per-channel mean and deviation of [N, C, H, W]."""
    return value.mean((0, 2, 3)), value.std((0, 2, 3))

def distance(found, wanted):
    return sum((a - b).square().mean() for a, b in zip(found, wanted))


# %%
def distil(network, x, steps, learning_rate=0.1):
    """Change the images x, float32 [N, 3, H, W], by Adam until what BatchNorm reads has its running statistics; (images, distances)."""
    net, seen, losses = copy.deepcopy(network).eval().requires_grad_(False), {}, []
    targets = {m: (m.running_mean, (m.running_var + m.eps).sqrt()) for m in net.modules() if isinstance(m, nn.BatchNorm2d)}
    for m in targets:
        m.register_forward_pre_hook(lambda m, inputs: seen.update({m: spread(inputs[0])}))
    x = x.to(next(net.parameters()).device).requires_grad_()
    optimizer = torch.optim.Adam([x], learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in tqdm(range(steps), desc="distil", leave=False):
        net(x)
        loss = distance(spread(x), (0.0, 1.0)) + sum(distance(seen[m], targets[m]) for m in targets)
        x.grad = torch.autograd.grad(loss, x)[0]
        optimizer.step(), schedule.step(), losses.append(loss.item())
    return x.detach().cpu(), losses


# %% [markdown]
# The same number of real images, of distilled ones, and of Gaussian noise with the mean and deviation of the training images (0 and 1 after
# normalisation); as a reference all the real calibration images. Everything at W4A4.

# %%
count, steps = distilled or (32 if smoke else 128), distillation_steps or (40 if smoke else 500)
four = ql.QuantConfig(weight_bits=4, act_bits=4)
size = next(iter(images.calibration(1, seed))).shape[1:]
network = network.to(device())

def calibrated(source, batches, n, s):
    statistics = ql.collect(network, batches)
    qmodel = ql.quantize(network, statistics, four)
    result = ql.evaluate(qmodel, images.test, limit=limit)
    method = "by hand" if (source, n) == ("real images", n_calibration) else f"W4A4, calibrated on {n:,} {source}"
    row = results.make_row(data=images, model=model, card=card, baseline=baseline, config=four, result=result, seed=s, n_calibration=n,
                           method=method, bytes=ql.weight_bytes(qmodel), notebook="12_beyond")
    return {"source": source, "images": n, "top1": result.top1, "float": baseline.top1, "statistics": statistics, "row": row}


# %%
sources = []
for s in range(seed, seed + n_seeds):
    noise = torch.randn(count, *size, generator=torch.Generator().manual_seed(s))
    found, losses = distil(network, noise.clone(), steps)
    print(f"seed {s}: distance of the statistics {losses[0]:.2f} at the start, {losses[-1]:.2f} after {steps} steps")
    sources += [calibrated("real images", images.calibration(n_calibration, s), n_calibration, s), calibrated("real images", images.calibration(count, s), count, s),
                calibrated("distilled images", [found], count, s), calibrated("noise images", [noise], count, s)]
without = pd.DataFrame(sources)
results.record(list(without.row))
without.groupby(["source", "images"], sort=False).top1.agg(["mean", "std", "min", "max"]).round(2)


# %%
def upper(statistics):
    return {name: observers.histogram(edge, 4)[1] for name, edge in statistics.edges.items()}

reference = upper(without.statistics[0])
ranges = pd.DataFrame([{"source": row.source, "order": i, "ratio": high / reference[name]} for row in without.iloc[2:4].itertuples()
                       for i, (name, high) in enumerate(upper(row.statistics).items()) if high > 0 < reference[name]])
more = f"test images, W4A4, residual stream 8 bits, {n_seeds} seed(s), {steps} steps of distillation; ranges: first seed, against {n_calibration:,} real images"
text = plots.row_caption(images, model, baseline.n, more)
plots.save(beyond.calibration_sources(without, ranges, text), "12_data_free", images, model)

# %% [markdown]
# What a network's statistics remember of its training images, as pictures (of the last seed):

# %%
pictures = found[:16] * torch.tensor(images.train.std).view(1, 3, 1, 1) + torch.tensor(images.train.mean).view(1, 3, 1, 1)
titles = [images.classes[i] for i in network.cpu()(found[:16]).argmax(1)]
text = plots.row_caption(images, model, len(pictures), "distilled images with the class that the float network sees in them")
plots.save(plots.image_grid((255 * pictures.clamp(0, 1)).to(torch.uint8), titles, [False] * 16, text), "images_distilled", images, model)

# %% [markdown]
# ## 4. The source map
# The original shipped a mind map of PyTorch's quantization source, drawn by hand. This one is parsed from the files of the installed packages:
# every module with its classes and functions, sorted into topics by name, and which takes what from which (re-exports followed to where
# a name is defined). Nothing is imported.

# %%
scans = {}
for package in ("torch.ao", "torchao"):
    folder = sourcemap.folder_of(package)
    if folder is None:
        print(f"{package} is not installed: left out")
    else:
        version = importlib.metadata.version(package.partition(".")[0])
        scans[f"{package} {version}"] = sourcemap.scan(package, folder)
tables = {name: (sourcemap.topic_table(modules), sourcemap.topic_edges(modules)) for name, modules in scans.items()}
for name, modules in scans.items():
    print(f"{name}: {len(modules)} files, {sum(m.lines for m in modules):,} lines")
pd.concat({name: table for name, (table, _) in tables.items()})

# %%
aside = ["models and tests", "prototypes"]
drawn = {name: (table[~table.topic.isin(aside)], edges[~(edges.importer.isin(aside) | edges.imported.isin(aside))]) for name, (table, edges) in tables.items()}
left_out = sum(table.lines[table.topic.isin(aside)].sum() for table, _ in tables.values())
text = ("Parsed from the installed files. Area of a circle: lines of code; arrows point from who uses to who is used, the 16 strongest, width: names taken. "
        f"Below a topic: what others use most of it. Not drawn: prototypes, example models and tests, {left_out:,} lines.")
plots.save(beyond.source_map(drawn, text), "source_map")

# %% [markdown]
# The same for XMind, with every module, class and function: one sheet a package, the strongest uses between modules as arrows.

# %%
sheets = {name: (sourcemap.tree(modules), sourcemap.arrows(modules)) for name, modules in scans.items()}
path = sourcemap.write_xmind(root() / "pic" / "source_map.xmind", sheets)
print(f"{path.name}: {path.stat().st_size:,} bytes, sheets {', '.join(sheets)}")
pd.DataFrame([link for _, links in sheets.values() for link in links[:6]], columns=["module", "uses", "above all"])

# %% [markdown]
# ## What we learned

# %%
times, points = lstm.set_index("method")["ms, batch 64"], lstm.set_index("method").top1
print(f"- LSTM: float {points.iloc[0]:.2f} %")
for name, size_ in zip(lstm.method[1:], lstm.bytes[1:]):
    print(f"- LSTM, {name}: {points[name]:.2f} %, {lstm.bytes.iloc[0] / size_:.1f} times fewer bytes, {times.iloc[0] / times[name]:.2f} times the speed of float")
print(f"- At {qat_bits} bits PTQ loses {rows['drop'][0]:+.2f} points, fine-tuning {rows['drop'][1]:+.2f}: for {spent:.0f} s instead of {ptq_seconds:.0f}, "
      f"{64 * total:,} labelled images seen instead of {n_calibration:,} without labels.")
means = without.groupby(["source", "images"], sort=False).top1.mean()
print("- W4A4 by calibration: " + ", ".join(f"{value:.2f} % on {n:,} {source}" for (source, n), value in means.items()) + ".")
for name, (table, edges) in tables.items():
    largest, share = table.topic[table.lines.idxmax()], table.lines.max() / table.lines.sum()
    print(f"- {name}: {share:.0%} of the lines are {largest}; {edges.importer[0]} takes most from {edges.imported[0]}.")

# %% [markdown]
# Next: [13_report](13_report.ipynb), everything measured so far on one page.
