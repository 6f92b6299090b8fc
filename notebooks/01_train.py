# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 01 · A trained network to start from
#
# **Question.** What exactly is the float network that everything later is measured against?
#
# **Seen.** [What a full run showed](../results/pages/01_train-resnet20-cifar10-jpeg.md), without running it.
#
# **Cost.** Loading a committed checkpoint: half a minute. Training ResNet-20 from scratch: about a
# minute per epoch on two CPU cores in bfloat16, forty epochs; under half a minute in all on the
# digits. A kill loses at most a minute.

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
import dataclasses
import tempfile

import pandas as pd
import quantlab as ql
import torch
from quantlab import plots
from quantlab.networks.architectures import build
from quantlab.networks.train import augment, default_config
from quantlab.system.machine import device, has_bf16, seed_everything
from quantlab.workbook.study import Study, show
from torch.nn import functional as F

# %% tags=["parameters"]
data = "auto"  # auto, cifar10, digits, images, or the path of a folder or archive
model = "resnet20"  # resnet20 or resnet50
checkpoint = "auto"  # auto, or the path of a .safetensors file
seed = 0
preset = "auto"  # smoke, full, or auto: smoke on the digits
epochs = 0  # 0: as many as the recipe says
retrain = False  # True: train even where a checkpoint exists, and replace it
solutions = False  # True: the exercises' solutions are run

# %% [markdown]
# ## 1. The images
# One call, three sources. Training images are for fitting and calibrating, a fixed tenth of them is
# *held out* for choosing anything, and test images are only ever tested on.

# %%
images = ql.load_data(data)
parts = ("train", "heldout", "test")
counts = {part: torch.bincount(getattr(images, part).labels).tolist() for part in parts}
show(pd.DataFrame(counts, index=images.classes).T)

# %% [markdown]
# Where classes are equally frequent, top-1 accuracy alone is a fair summary. What always naming the
# most frequent class would score:

# %%
print(f"{100 * max(counts['test']) / sum(counts['test']):.1f} %")
shown = torch.linspace(0, len(images.train) - 1, min(16, len(images.train))).long()
titles = [images.classes[i] for i in images.train.labels[shown].tolist()]
caption = f"{plots.data_label(images)}: some of the training images"
pictures = images.train.images[shown]
grid = plots.image_grid(pictures, titles, [False] * len(shown), caption)
plots.save(grid, "images_train", images)


# %% [markdown]
# ## 2. The two networks
# The original experiment's **ResNet-50** is torchvision's with a 3x3 stem of stride 1 and no max-pool,
# for images of 32 pixels (its head had 1,000 outputs, ours has one a class). **ResNet-20** is the small
# network on which everything can be tried in minutes.

# %%
def describe(network):
    kinds = (torch.nn.Conv2d, torch.nn.Linear)
    layers = [m for m in network.modules() if isinstance(m, kinds)]
    names = [type(m).__name__ for m in network.modules()]
    parameters = sum(p.numel() for p in network.parameters())
    return {
        "convolutions and linear layers": len(layers),
        "residual adds": names.count("BasicBlock") + names.count("Bottleneck"),
        "parameters": f"{parameters:,}",
        "MB in float32": round(4 * parameters / 1e6, 2),
    }

networks = {name: ql.load_model(name) for name in ("resnet20", "resnet50")}
show(pd.DataFrame({name: describe(network) for name, network in networks.items()}))

# %% [markdown]
# The first three layers of ResNet-50, as the original's README lists them. A convolution in front of a
# BatchNorm needs no bias: BatchNorm subtracts the mean and adds a bias of its own.

# %%
for name in ("conv1", "bn1", "relu"):
    module = networks["resnet50"].get_submodule(name)
    print(f"({name}): {module}")
    for parameter, value in module.named_parameters():
        print(f"    {name}.{parameter}: {tuple(value.shape)}")

# %% [markdown]
# Almost all parameters are weights of convolutions. Quantizing weights from 32 to 4 bits divides what
# must be stored and moved by eight; quantizing activations as well is what makes integer arithmetic
# possible.
#
# ## 3. How a network learns
# The heart of the training loop, with nothing left out: augment, normalise, predict, compare, step. Four steps
# on the same 32 images, each time shifted anew.

# %%
chosen = torch.linspace(0, len(images.train) - 1, 32).long()  # of every class
tiny = dataclasses.replace(images, train=images.train.subset(chosen))
config = ql.TrainConfig(
    model=model, epochs=4, batch_size=32, learning_rate=0.05, crop=2, flip=False,
    seed=seed,
)

def batch_of(epoch, split):
    """(float32 [B, 3, H, W], int64 [B]): in another order, augmented, normalised."""
    generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
    order = torch.randperm(len(split), generator=generator)
    pixels = augment(
        split.images[order], generator, config.crop, config.flip, 0, split.mean)
    return split.normalize(pixels).to(device()), split.labels[order].to(device())


# %% [markdown]
# *Predict and compare.* The loss is the cross-entropy; `backward` gives its slope along every parameter.
# Where the machine multiplies bfloat16 natively, the network does.

# %%
def loss_of(network, pixels, labels):
    with torch.autocast(device().type, torch.bfloat16, enabled=has_bf16()):
        logits = network(pixels.contiguous(memory_format=torch.channels_last))
    loss = F.cross_entropy(logits.float(), labels)
    network.zero_grad()
    loss.backward()
    return loss.item()


# %% [markdown]
# *Step.* Stochastic gradient descent with momentum $\mu$ after Nesterov and weight decay $\lambda$ (not on
# biases and BatchNorm), at a learning rate $\eta$ that rises in a line and falls in a line:
#
# $$g \leftarrow g + \lambda w, \qquad v \leftarrow \mu v + g, \qquad w \leftarrow w - \eta\,(g + \mu v)$$

# %%
@torch.no_grad()
def descend(network, velocity, rate):
    for name, w in network.named_parameters():
        decay = config.weight_decay if w.dim() > 1 else 0.0
        g = w.grad.add(w, alpha=decay)
        velocity[name] = config.momentum * velocity.get(name, 0) + g
        w.sub_(g.add(velocity[name], alpha=config.momentum), alpha=rate)

def rate_at(step, steps):
    position = (step + 1) / (steps + 1)
    falling = (1 - position) / (1 - config.warmup)
    return config.learning_rate * min(position / config.warmup, falling)


# %%
seed_everything(seed)
network = build(model, len(images.classes))
network = network.to(device(), memory_format=torch.channels_last).train()
losses, velocity = [], {}
for epoch in range(config.epochs):  # of one step each
    losses.append(loss_of(network, *batch_of(epoch, tiny.train)))
    descend(network, velocity, rate_at(epoch, config.epochs))
print("loss on the same 32 images:", ", ".join(f"{loss:.2f}" for loss in losses))
assert losses[-1] < losses[0], "steps on these images make them easier"

# %% [markdown]
# `ql.train` does this for every batch of every epoch, with torch's optimizer and a state that survives a
# kill. Given the same 32 images, it arrives at the same losses and the same network, to the last bit (on an
# accelerator it compiles the network, which rounds otherwise):

# %%
small = {part: ql.limited(getattr(images, part), 32) for part in parts[1:]}
tiny = dataclasses.replace(tiny, **small)  # 32 held-out and 32 test images will do
with tempfile.TemporaryDirectory() as folder:
    out = f"{folder}/{model}-tiny.safetensors"
    theirs, tiny_card = ql.train(config, tiny, out, verbose=False)
pairs = zip(network.state_dict().values(), theirs.state_dict().values())
largest = max((a - b).abs().max().item() for a, b in pairs)
print(f"largest difference of a parameter: {largest:.1e}")
if device().type == "cpu":
    assert largest == 0 and losses == [line["loss"] for line in tiny_card.history]

# %% [markdown]
# ## 4. Load, resume or train
# A checkpoint is a `.safetensors` file and a JSON card that says how it came about. `train` finds an
# unfinished run and goes on with it.
#
# To train on CIFAR-10's official files set `data = "cifar10"` and `retrain = True` above (they are
# downloaded once, 170 MB, checksum verified), or without Jupyter
# `python -m quantlab train --model resnet20 --data cifar10`. The checkpoint is then named after them,
# and every notebook that is given these files takes it before one that was trained on other images.

# %%
path = ql.find_checkpoint(model, images) if checkpoint == "auto" else checkpoint
if path is None or retrain:
    changes = {"epochs": epochs} if epochs else {}
    config = default_config(model, images, seed=seed, **changes)
    path = ql.root() / "checkpoint" / f"{model}-{images.name}.safetensors"
    ql.train(config, images, path)
study = Study(images, model, path, preset, seed=seed, notebook="01_train")
network, card = study.network, study.card

# %%
left_out = ("history", "classes", "recipe")
facts = {k: v for k, v in dataclasses.asdict(card).items() if k not in left_out}
facts |= {f"recipe.{k}": v for k, v in card.recipe.items() if k != "start_from"}
show(pd.Series(facts).to_frame("card"))

# %% [markdown]
# ## 5. How it learned
# One cycle of the learning rate: linearly up for the first steps, linearly down to zero for the rest.
# Notice how the held-out curve jumps about while the rate is high and settles as it falls.

# %%
history = pd.DataFrame(card.history)
if len(history):
    n = card.recipe.get("heldout_images") or len(images.heldout)
    text = f"{plots.data_label(card.trained_on)}, {model}, n = {n:,} held-out images; "
    curves = plots.training_curves(history, text + f"trained on {card.hardware}")
    study.save(curves, "01_training_curves", data=card.trained_on)

# %% [markdown]
# ## 6. What it gets right and wrong

# %%
baseline = study.baseline
print(
    f"{baseline.top1:.2f} % top-1 on {baseline.n:,} test images of {images.name}, "
    f"{baseline.images_per_s:,.0f} images/s"
)
if card.data_fingerprint == images.fingerprint and not study.limit:
    assert abs(baseline.top1 - card.test_top1) < 0.1, "the card states another accuracy"

# %%
test = study.test
text = study.caption(baseline.n, "test images, float")
matrix = plots.confusion(test.labels, baseline.predictions, images.classes, text)
study.save(matrix, "01_confusion")

# %% [markdown]
# The diagonal is the accuracy by class. Where two classes are confused with each other, both of their
# rows show it.

# %%
wrong = (~baseline.correct).nonzero().flatten()[:8]
right = baseline.correct.nonzero().flatten()[: 16 - len(wrong)]
chosen = torch.cat([wrong, right])
titles = [images.classes[i] for i in baseline.predictions[chosen].tolist()]
marked = [True] * len(wrong) + [False] * len(right)
caption = f"{plots.data_label(images)}: predictions, mistakes in red"
grid = plots.image_grid(test.images[chosen], titles, marked, caption)
study.save(grid, "images_predictions")

# %% [markdown]
# ## 7. The float row
# Every later number is a difference to this one, on the same images.

# %%
size = ql.weight_bytes(network)
show(study.record(baseline, "float", bytes=size))

# %% [markdown]
# ## What we learned

# %%
correct = pd.Series(baseline.correct.numpy(), dtype=float)
by_class = correct.groupby(test.labels.numpy()).mean()
best, worst = images.classes[by_class.idxmax()], images.classes[by_class.idxmin()]
smoke = " (smoke run)" if images.smoke else ""
print(
    f"- {model}: {baseline.top1:.2f} % on {baseline.n:,} test images of "
    f"{images.name}{smoke}."
)
print(f"- It is best at {best} and worst at {worst}.")

# %%
n_values = sum(p.numel() for p in network.parameters())
sizes = ", ".join(f"{n_values * bits / 8e6:.2f} at {bits}" for bits in (8, 4, 3))
print(
    f"- Its parameters take {n_values / 250e3:.2f} MB in float32; by bits "
    f"{sizes}."
)

# %% [markdown]
# ## Exercises
# Write each function in place of its `...`, run its cell, then the one with the check, which says what is
# wrong. The solution is folded between the two; with `solutions = True` at the top all of them run.
#
# **1. How sure is an accuracy?** Of $n$ images $k$ are named right. Return top-1 in percent and the two ends
# of its 95 % interval in percent, with $z = 1.959964$, after Wilson:
#
# $$\frac{k + z^2/2 \;\pm\; z\sqrt{k\,(n - k)/n + z^2/4}}{n + z^2}$$

# %%
from math import comb, sqrt

from quantlab.evaluate import Evaluation
from quantlab.workbook.exercises import check
from scipy import stats as statistics
from torch.utils.flop_counter import conv_flop_count


# %% tags=["exercise"]
def top1_interval(predictions, labels):
    """(top-1, lower end, upper end) in percent; predictions, labels: int64 [n]."""
    ...


# %% tags=["solution"] jupyter={"source_hidden": true}
if solutions:
    def top1_interval(predictions, labels):
        k, n, z = (predictions == labels).sum().item(), len(labels), 1.959964
        half = z * sqrt(k * (n - k) / n + z**2 / 4)
        ends = [(k + z**2 / 2 + side) / (n + z**2) for side in (-half, half)]
        return 100 * k / n, 100 * ends[0], 100 * ends[1]


# %% tags=["check"]
def counted_right(k, n):
    """A case of n images, k of them named right: ql's top-1, scipy's interval."""
    labels = torch.arange(n) % 10
    predictions = torch.where(torch.arange(n) < k, labels, labels + 1)
    top1 = Evaluation.of(predictions, labels, 1.0, "cpu").top1
    ends = statistics.binomtest(k, n).proportion_ci(0.95, "wilson")
    return (predictions, labels), (top1, 100 * ends.low, 100 * ends.high)

check(
    top1_interval,
    (*counted_right(10, 10), "Ten right of ten are 100 %, the lower end 72.2 %."),
    (*counted_right(870, 1000), "Here k is 870 and n is 1,000; all three in percent."),
    (*counted_right(1, 5), "One right of five: both z^2 / 2 and z^2 / 4 matter."),
)


# %% [markdown]
# **2. What does a convolution cost?** Speed is often stated as multiplications. Count those of a `Conv2d` on
# one image of so many rows and columns: how many values has its output, and how many weights does each of
# them meet? Remember stride, padding, dilation and groups. (For `Conv2d(3, 16, 3, padding=1)`, the first layer of
# ResNet-20, they are 442,368 on 32 x 32 pixels.)

# %% tags=["exercise"]
def multiplications(conv, height, width):
    """Those of a torch.nn.Conv2d on one image [in_channels, height, width]: an int."""
    ...


# %% tags=["solution"] jupyter={"source_hidden": true}
if solutions:
    def multiplications(conv, height, width):
        values = conv.out_channels
        for i, size in enumerate((height, width)):
            reach = conv.dilation[i] * (conv.kernel_size[i] - 1) + 1
            values *= (size + 2 * conv.padding[i] - reach) // conv.stride[i] + 1
        return values * conv.weight[0].numel()  # in_channels / groups * kernel


# %% tags=["check"]
def counted(height, width, *channels, **how):
    """A case: torch counts a multiplication and an addition each."""
    conv = torch.nn.Conv2d(*channels, **how)
    image = torch.zeros(1, conv.in_channels, height, width)
    flops = conv_flop_count(image.shape, conv.weight.shape, conv(image).shape)
    return (conv, height, width), flops / 2


# %% tags=["check"]
first = torch.nn.Conv2d(3, 16, 3, padding=1), 32, 32
check(
    multiplications,
    (first, 442_368, "An output of 16 x 32 x 32 values meets 3 x 3 x 3 weights each."),
    (*counted(9, 7, 4, 8, 3, stride=2), "Stride 2 without padding: 8 x 4 x 3 values."),
    (*counted(8, 8, 6, 6, 3, groups=6), "A value meets only its own group's channels."),
    (*counted(9, 9, 2, 2, (1, 3), dilation=2), "Dilation 2: 3 taps reach over 5."),
    (*counted(9, 7, 4, 8, (3, 5), stride=(1, 2), padding=(0, 2), dilation=(2, 1)),
     "Rows and columns have a stride, a padding and a dilation each."),
)


# %% [markdown]
# **3. Is the other network worse?** Two networks on the *same* images: where both are right, or both wrong,
# nothing is learned about which is better. Only the $m$ images count on which they disagree; were both
# equally good, a fair coin would decide each. Return the points that the second one loses, and the
# probability $p$ that $m$ fair coins fall at least as unevenly, to either side (1 where $m = 0$).

# %% tags=["exercise"]
def disagreement(correct_a, correct_b):
    """(points that b loses against a, p); correct_a, correct_b: bool [n]."""
    ...


# %% tags=["solution"] jupyter={"source_hidden": true}
if solutions:
    def disagreement(correct_a, correct_b):
        lost = (correct_a & ~correct_b).sum().item()
        gained = (~correct_a & correct_b).sum().item()
        m, fewer = lost + gained, min(lost, gained)
        p = 2 * sum(comb(m, i) for i in range(fewer + 1)) / 2**m
        return 100 * (lost - gained) / len(correct_a), min(p, 1)


# %% tags=["check"]
def compared(both, lost, gained, neither):
    """A case of so many images of each kind: ql's points, scipy's p."""
    sizes = torch.tensor([both, lost, gained, neither])
    a = torch.tensor([True, True, False, False]).repeat_interleave(sizes)
    b = torch.tensor([True, False, True, False]).repeat_interleave(sizes)
    m = lost + gained
    p = statistics.binomtest(lost, m).pvalue if m else 1.0
    return (a, b), (ql.paired_drop(a, b)[0], p)


# %% tags=["check"]
check(
    disagreement,
    (*compared(90, 6, 1, 3), "Six lost and one gained of 100; p counts both sides."),
    (*compared(900, 6, 1, 93), "1,000 images, the same 7 of them count: p stays."),
    (*compared(50, 1, 5, 0), "It gains: points below zero, and p does not mind."),
    (*compared(9, 2, 2, 0), "As even as can be: p is 1, never more."),
    (*compared(9, 0, 0, 1), "They never disagree: nothing lost, and p is 1."),
)

# %% [markdown]
# Next: [02_builtin_int8](02_builtin_int8.ipynb), what PyTorch itself makes of this network.
