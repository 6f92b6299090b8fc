# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 01 · A trained network to start from
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/TimS-ml/Handwritten-Quantization/blob/main/notebooks/01_train.ipynb)
#
# **Question.** What exactly is the float network that everything later is measured against?
#
# **Cost.** Loading a committed checkpoint: half a minute. Training ResNet-20 from scratch: about a minute per epoch on two CPU cores in
# bfloat16, forty epochs; under half a minute in all on the digits. A kill loses at most one epoch.

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

import pandas as pd
import quantlab as ql
import torch
from quantlab import plots
from quantlab.networks.train import default_config
from quantlab.workbook import results

# %% tags=["parameters"]
data = "auto"  # auto, cifar10, digits, images, or the path of a folder or archive
model = "resnet20"  # resnet20 or resnet50
checkpoint = "auto"  # auto, or the path of a .safetensors file
seed = 0
preset = "auto"  # smoke, full, or auto: smoke on the digits
epochs = 0  # 0: as many as the recipe says
retrain = False  # True: train even where a checkpoint exists, and replace it

# %% [markdown]
# ## 1. The images
# One call, three sources. Training images are for fitting and calibrating, a fixed tenth of them is *held out* for choosing anything, and
# test images are only ever tested on.

# %%
images = ql.load_data(data)
smoke = images.smoke if preset == "auto" else preset == "smoke"
limit = 1000 if smoke else None  # test images

# %%
counts = {part: torch.bincount(getattr(images, part).labels).tolist() for part in ("train", "heldout", "test")}
pd.DataFrame(counts, index=images.classes).T

# %% [markdown]
# Where classes are equally frequent, top-1 accuracy alone is a fair summary. What always naming the most frequent class would score:

# %%
print(f"{100 * max(counts['test']) / sum(counts['test']):.1f} %")
shown = torch.arange(min(16, len(images.train)))
titles = [images.classes[i] for i in images.train.labels[shown].tolist()]
grid = plots.image_grid(images.train.images[shown], titles, [False] * len(shown), f"{plots.data_label(images)}: the first training images")
plots.save(grid, "images_train", images)

# %% [markdown]
# ## 2. The network

# %%
network = ql.load_model(model, num_classes=len(images.classes))
layers = [m for m in network.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
parameters = sum(p.numel() for p in network.parameters())
print(f"{model}: {len(layers)} convolutions and linear layers, {parameters:,} parameters, {4 * parameters / 1e6:.2f} MB in float32")

# %% [markdown]
# Almost all parameters are weights of convolutions. Quantizing weights from 32 to 4 bits divides what must be stored and moved by eight;
# quantizing activations as well is what makes integer arithmetic possible.
#
# ## 3. Load, resume or train
# A checkpoint is a `.safetensors` file and a JSON card that says how it came about. `train` finds an unfinished run and goes on with it.
#
# To train on CIFAR-10's official files set `data = "cifar10"` and `retrain = True` above (they are downloaded once, 170 MB, checksum
# verified), or without Jupyter `python -m quantlab train --model resnet20 --data cifar10`. The checkpoint is then named after them,
# and every notebook that is given these files takes it before one that was trained on other images.

# %%
path = ql.find_checkpoint(model, images) if checkpoint == "auto" else checkpoint
if path is None or retrain:
    config = default_config(model, images, seed=seed, **({"epochs": epochs} if epochs else {}))
    path = ql.root() / "checkpoint" / f"{model}-{images.name}.safetensors"
    ql.train(config, images, path)
network, card = ql.load_trained(model, images, path)

# %%
card_facts = {k: v for k, v in dataclasses.asdict(card).items() if k not in ("history", "classes", "recipe")}
pd.Series({**card_facts, **{f"recipe.{k}": v for k, v in card.recipe.items()}}).to_frame("card")

# %% [markdown]
# ## 4. How it learned
# One cycle of the learning rate: linearly up for a fifth of the steps, linearly down to zero for the rest. Notice how the held-out curve
# jumps about while the rate is high and settles as it falls.

# %%
history = pd.DataFrame(card.history)
if len(history):
    text = f"{plots.data_label(card.trained_on)}, {model}, n = {len(images.heldout):,} held-out images; trained on {card.hardware}"
    plots.save(plots.training_curves(history, text), "01_training_curves", card.trained_on, model)

# %% [markdown]
# ## 5. What it gets right and wrong

# %%
baseline = ql.evaluate(network, images.test, limit=limit)
test = images.test if limit is None else ql.limited(images.test, limit)
print(f"{baseline.top1:.2f} % top-1 on {baseline.n:,} test images of {images.name}, {baseline.images_per_s:,.0f} images/s")
assert card.data_fingerprint != images.fingerprint or limit or abs(baseline.top1 - card.test_top1) < 0.1, "the card states another accuracy"

# %%
text = plots.row_caption(images, model, baseline.n, "test images, float")
plots.save(plots.confusion(test.labels, baseline.predictions, images.classes, text), "01_confusion", images, model)

# %% [markdown]
# The diagonal is the accuracy by class. Where two classes are confused with each other, both of their rows show it.

# %%
wrong = (~baseline.correct).nonzero().flatten()[:8]
right = baseline.correct.nonzero().flatten()[:16 - len(wrong)]
chosen = torch.cat([wrong, right])
titles = [images.classes[i] for i in baseline.predictions[chosen].tolist()]
grid = plots.image_grid(test.images[chosen], titles, [True] * len(wrong) + [False] * len(right), f"{plots.data_label(images)}: predictions, mistakes in red")
plots.save(grid, "images_predictions", images, model)

# %% [markdown]
# ## 6. The float row
# Every later number is a difference to this one, on the same images.

# %%
size = sum(4 * p.numel() for p in network.state_dict().values())
row = results.make_row(data=images, model=model, card=card, baseline=baseline, result=baseline, method="float",
                       notebook="01_train", bytes=size, seed=seed)
results.record([row])[["dataset", "model", "method", "n_test", "top1", "bytes", "images_per_s", "device"]]

# %% [markdown]
# ## What we learned

# %%
best, worst = (images.classes[i] for i in (lambda s: (s.argmax(), s.argmin()))(
    pd.Series(baseline.correct.numpy()).groupby(test.labels.numpy()).mean().to_numpy()))
print(f"- {model} reaches {baseline.top1:.2f} % on {baseline.n:,} test images of {images.name}" + (" (smoke run)" if images.smoke else "") + ".")
print(f"- It is best at {best} and worst at {worst}.")
print(f"- Its weights take {size / 1e6:.2f} MB in float32; at 8, 4 and 3 bits they would take about {size / 4e6:.2f}, {size / 8e6:.2f} and {size * 3 / 32e6:.2f} MB.")

# %% [markdown]
# Next: [02_builtin_int8](02_builtin_int8.ipynb), what PyTorch itself makes of this network.
