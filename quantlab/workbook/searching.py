"""The search for the cheapest network as a command: what it reads, keeps and ends with.

    python -m quantlab search resnet20 --lose 1.0 --cost bytes --data PATH
"""

import dataclasses
import json
import pathlib

from quantlab import plots
from quantlab.analysis.search import search
from quantlab.calibration import collect
from quantlab.evaluate import evaluate
from quantlab.export.packed import load_quantized, save_quantized
from quantlab.images.datasets import load_data
from quantlab.improving.reconstruct import ReconstructConfig, reconstruct
from quantlab.networks.checkpoints import load_trained
from quantlab.networks.recipe import NETWORKS
from quantlab.plots import lowbit
from quantlab.system.comparing import paired_drop
from quantlab.system.files import read_text, root, write_text
from quantlab.workbook.contents import code_hash, digest
from quantlab.workbook.inspection import check_outputs, import_model

ROOMS = ("analysis", "improving", "networks")  # whose code decides what is found
PICTURES = 256  # that the proxies are measured on
SCALES = {"bytes": (1e3, "weights as stored, kB"),
          "bitops": (1e9, "bit operations an image, 10⁹")}


class Memory(dict):
    """What was evaluated, in a JSON file that is written anew with every entry."""

    def __init__(self, path):
        self.path = path
        super().__init__(json.loads(read_text(path)) if path.is_file() else {})

    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        write_text(self.path, json.dumps(self))


def run_search(target, data, out, *, lose=1.0, cost="bytes", learned=False, n_calibration=1024,
               limit=None, seed=0, iterations=500, size=None, mean=None, std=None, weights=None):
    """Search for the network `target` (a name of NETWORKS or module:function) on the images of
    `data`; write the packed network `out`, a figure and a text beside it; return the text.

    What was tried is kept in results/search: the same search goes on where it was. UserError for
    what `load_data`, `import_model` and `search` refuse.
    """
    images = load_data(data, size=size)
    if mean or std:
        constants = {name: tuple(v) for name, v in (("mean", mean), ("std", std)) if v}
        parts = ("train", "heldout", "test")
        images = dataclasses.replace(images, **{
            part: dataclasses.replace(getattr(images, part), **constants) for part in parts})
    if target in NETWORKS:
        model, _ = load_trained(target, images, weights or "auto")
    else:
        model = import_model(target, weights or "")
    n = min(n_calibration, len(images.train))
    pictures = images.calibration(n, seed)
    check_outputs(model, next(iter(pictures))[:2], images.classes)
    stats = collect(model, pictures)
    settings = [images.pixels, stats.graph_hash, n, limit, seed, iterations, code_hash(ROOMS)]
    folder = root() / "results" / "search" / digest(settings)
    folder.mkdir(parents=True, exist_ok=True)

    def learn(config):
        path = folder / f"{digest(dataclasses.asdict(config))}.safetensors"
        if path.is_file():
            return load_quantized(path, model)
        learning = ReconstructConfig.preset("qdrop", iterations=iterations, seed=seed,
                                            batch_size=min(32, n))
        state = path.with_suffix(".state.safetensors")
        qmodel = reconstruct(model, stats, pictures, config, learning, state)
        save_quantized(qmodel, path)
        state.unlink(missing_ok=True)
        return qmodel

    found = search(
        model, stats, images.calibration(min(PICTURES, n), seed), images.heldout, lose, cost,
        learn if learned else None, memory=Memory(folder / "tried.json"), limit=limit)
    exact, rounded = (evaluate(net, images.test, limit=limit) for net in (model, found.qmodel))
    drop, low, high = paired_drop(exact.correct, rounded.correct)
    text = (f"{found.reasons}\nOn {exact.n:,} test images, looked at once: {rounded.top1:.2f} %, "
            f"float {exact.top1:.2f} %, {drop:.2f} [{low:.2f}, {high:.2f}] points lost.\n")
    out = pathlib.Path(out)
    save_quantized(found.qmodel, out)
    write_text(out.with_suffix(".txt"), text)
    n_heldout = min(limit or len(images.heldout), len(images.heldout))
    about = plots.row_caption(images, target, n_heldout, "held-out images; paired 95 % intervals")
    scale, unit = SCALES[cost]
    tried = found.tried.assign(cost=found.tried.cost / scale)
    chosen = found.cost / scale, found.lost
    figure = lowbit.search_front(tried, chosen, lose, unit, about)
    figure.savefig(out.with_suffix(".png"), dpi=200)
    return text
