"""Training and classification figures."""

import matplotlib.pyplot as plt
import seaborn as sns
import torch
from matplotlib.ticker import MaxNLocator

from quantlab.plots.style import COLOURS, DATA_COLOUR, ERROR_COLOUR, caption


def training_curves(history, text):
    """history: frame with epoch, loss, train_top1, heldout_top1 (percent)."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    left.plot(history.epoch, history.loss, color=COLOURS["float"])
    left.set(xlabel="epoch", ylabel="cross-entropy, training images", title="Loss", ylim=(0, None))
    right.plot(history.epoch, history.train_top1, color=DATA_COLOUR, label="training images, augmented")
    right.plot(history.epoch, history.heldout_top1, color=COLOURS["float"], label="held-out images")
    right.set(xlabel="epoch", ylabel="top-1 accuracy, %", title="Accuracy")
    right.legend(loc="lower right")
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return caption(figure, text)


def confusion(labels, predictions, classes, text):
    """Share of each true class (rows) that was predicted as each class (columns), in percent; labels and predictions int64 [n]."""
    table = torch.zeros(len(classes), len(classes)).index_put_((labels, predictions), torch.ones(len(labels)), accumulate=True)
    share = 100 * table / table.sum(1, keepdim=True)
    figure, axes = plt.subplots(figsize=(6.6, 5.6))
    few = len(classes) <= 20
    sns.heatmap(share.numpy(), ax=axes, cmap="Blues", annot=few, fmt=".0f", xticklabels=classes, yticklabels=classes, vmin=0, vmax=100,
                annot_kws={"fontsize": 8}, cbar_kws={"label": "% of the true class"})
    axes.set(xlabel="predicted", ylabel="true", title="Where the network errs")
    axes.grid(False)
    axes.tick_params(axis="x", rotation=45)
    return caption(figure, text)


def image_grid(images, titles, wrong, text):
    """images: uint8 [N, 3, H, W]; titles: N strings, in red where `wrong`."""
    columns = 8
    rows = -(-len(images) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(1.25 * columns, 1.5 * rows))
    for cell, image, title, bad in zip(axes.flat, images, titles, wrong):
        cell.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
        cell.set_title(title, fontsize=8, color=ERROR_COLOUR if bad else "#222222")
    for cell in axes.flat:
        cell.axis("off")
    return caption(figure, text)
