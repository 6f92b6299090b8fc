"""Training and classification figures."""

import matplotlib.pyplot as plt
import seaborn as sns
import torch
from matplotlib.ticker import MaxNLocator

from quantlab.plots.page import caption, distinct, panels
from quantlab.plots.style import BLUE, INK, RED, styled


@styled
def training_curves(history, text):
    """history: frame with epoch, loss, train_top1, heldout_top1 (percent)."""
    figure, (left, right) = panels(2, 9, 3.4)
    dots = dict(marker=".", markersize=4)  # a run of one epoch is seen too
    left.plot(history.epoch, history.loss, color=INK, **dots)
    left.set(xlabel="epoch", ylabel="cross-entropy, training images", title="Loss", ylim=(0, None))
    lines = ((history.train_top1, BLUE, "training images, augmented"),
             (history.heldout_top1, INK, "held-out images"))
    for top1, colour, label in lines:
        right.plot(history.epoch, top1, color=colour, label=label, **dots)
    right.set(xlabel="epoch", ylabel="top-1 accuracy, %", title="Accuracy")
    right.legend(loc="lower right")
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return caption(figure, text)


@styled
def confusion(labels, predictions, classes, text):
    """% of every true class (rows) predicted as each (columns); labels, predictions: int64 [n]."""
    table = torch.zeros(len(classes), len(classes))
    table.index_put_((labels, predictions), torch.ones(len(labels)), accumulate=True)
    percent = (100 * table / table.sum(1, keepdim=True)).numpy()
    few = len(classes) <= 20
    figure, (axes,) = panels(1, 6.6, 5.6)
    numbers = dict(annot=few, fmt=".0f", annot_kws={"fontsize": 8})
    scale = dict(cmap="Blues", vmin=0, vmax=100, cbar_kws={"label": "% of the true class"})
    names = classes if few else "auto"  # of many classes as many as there is room for
    sns.heatmap(percent, ax=axes, xticklabels=names, yticklabels=names, **numbers, **scale)
    axes.set(xlabel="predicted", ylabel="true", title="Where the network errs")
    axes.grid(False)
    axes.tick_params(axis="y", rotation=0)
    plt.setp(axes.get_xticklabels(), rotation=45, ha="right", rotation_mode="anchor")
    return caption(figure, text)


@styled
def image_grid(images, titles, wrong, text):
    """images: uint8 [N, 3, H, W]; titles: N strings, in red where `wrong`."""
    columns = min(8, len(distinct(range(len(images)))))
    rows = -(-len(images) // columns)
    size = (1.25 * columns, 1.5 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
    for cell, image, title, bad in zip(axes.flat, images, titles, wrong):
        cell.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
        cell.set_title(title, fontsize=8, color=RED if bad else INK)
    for cell in axes.flat:
        cell.axis("off")
    return caption(figure, text)
