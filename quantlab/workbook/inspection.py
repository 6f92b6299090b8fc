"""Any network of one's own, analysed in one HTML file: what is rounded where, which layer breaks, which range would be better.

    python -m quantlab inspect my_module:build_model --data DIR --size 224 --bits 4
"""

import base64
import html
import importlib
import io
import os
import pathlib
import random
import sys

import pandas as pd
import torch
from torch import nn
from torchvision import transforms
from torchvision.datasets.folder import IMG_EXTENSIONS, default_loader

from quantlab import observers, plots
from quantlab.affine import fake_quantize
from quantlab.analysis import distributions
from quantlab.analysis.sensitivity import edge_errors
from quantlab.calibration import collect
from quantlab.config import QuantConfig
from quantlab.graph import call_name, folded
from quantlab.ptq import layers, quantize
from quantlab.quantized import find_node, weight_bytes
from quantlab.system.errors import UserError
from quantlab.system.files import atomic_path
from quantlab.system.machine import device, exact_float

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BATCH = 32


# ---- The network and the images ---------------------------------------------------------------------------------------------


def import_model(target, weights=None):
    """The nn.Module that `module:name` is, builds or has for a class, in eval mode; weights: a .safetensors file or a state dict (.pt)."""
    module_name, _, attribute = target.partition(":")
    if not attribute:
        raise UserError(f"{target!r} names no function; write module:function, as in my_module:build_model")
    sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except ModuleNotFoundError as error:
        raise UserError(f"module {error.name!r} was not found from {os.getcwd()}; run this where `import {module_name}` works") from None
    except AttributeError:
        raise UserError(f"module {module_name} has no {attribute!r}") from None
    model = found() if callable(found) and not isinstance(found, nn.Module) else found
    if not isinstance(model, nn.Module):
        raise UserError(f"{target} gives a {type(model).__name__}, not a torch.nn.Module")
    if weights:
        from safetensors.torch import load_file

        try:
            state = load_file(weights) if str(weights).endswith(".safetensors") else torch.load(weights, map_location="cpu", weights_only=True)
            model.load_state_dict(state.get("state_dict", state))
        except Exception as error:  # whatever a damaged or foreign file makes the readers say
            raise UserError(f"{weights} does not hold weights of {target}: {str(error).splitlines()[0]}") from None
    return model.eval()


class ImageFolder:
    """Images below a folder in an order of its own per seed: DIR/train/CLASS + DIR/test|val/CLASS, DIR/CLASS, or no classes at all.

    calibration, test: lists of (file, class index or None), which share no file. classes: sorted names, [] without labels.
    """

    def __init__(self, folder, size, mean, std, n_calibration, n_test, seed=0):
        folder = pathlib.Path(folder)
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder; --data names a folder of images")
        train, test = folder / "train", next((folder / name for name in ("test", "val") if (folder / name).is_dir()), None)
        parts = [train, test] if train.is_dir() and test else [folder]
        self.classes = sorted({c.name for part in parts for c in part.iterdir() if c.is_dir() and _images(c)})
        found = [_shuffled(self._labelled(part), seed) for part in parts]
        if not found[0]:
            raise UserError(f"{folder} holds no images ({', '.join(IMG_EXTENSIONS)})")
        self.calibration = found[0][:n_calibration]
        self.test = (found[1] if len(found) > 1 else found[0][n_calibration:])[:n_test] or self.calibration
        self.transform = transforms.Compose(
            [transforms.Resize(size), transforms.CenterCrop(size), transforms.ToTensor(), transforms.Normalize(mean, std)]
        )

    def _labelled(self, part):
        return [(f, self.classes.index(c.name)) for c in part.iterdir() if c.name in self.classes for f in _images(c)] or [(f, None) for f in _images(part)]

    def batches(self, files):
        """(images float32 [B, 3, size, size], labels int64 [B]), read as they are asked for."""
        for i in range(0, len(files), BATCH):
            part = files[i : i + BATCH]
            yield torch.stack([self.transform(default_loader(f)) for f, _ in part]), torch.tensor([-1 if y is None else y for _, y in part])


def _images(folder):
    return [f for f in sorted(folder.rglob("*")) if f.suffix.lower() in IMG_EXTENSIONS and f.is_file()]


def _shuffled(items, seed):
    random.Random(seed).shuffle(items)
    return items


# ---- The analysis -----------------------------------------------------------------------------------------------------------


def inspect(target, data, out, *, size=224, mean=IMAGENET_MEAN, std=IMAGENET_STD, bits=4, n=256, weights=None, unlabelled=False, seed=0):
    """Quantize the network `target` on up to `n` images below `data` and write the analysis to the HTML file `out`; returns its path.

    Raises UserError for a network that cannot be traced (with the line), images that are missing, and classes that do not match the outputs.
    """
    model = import_model(target, weights).to(device())
    images = ImageFolder(data, size, mean, std, n, n, seed)
    _check_outputs(model, images, unlabelled)
    config = QuantConfig(weight_bits=bits, act_bits=bits)
    stats = collect(model, (x for x, _ in images.batches(images.calibration)), verbose=True)
    qmodel = quantize(model, stats, config)
    errors = edge_errors(model, qmodel, (x for x, _ in images.batches(images.test[:64])))
    by_observer, weight_errors = compare_observers(stats, qmodel, bits), compare_weights(model, qmodel)
    accuracy = None if unlabelled or not images.classes else compare_accuracy(model, qmodel, images)
    text = f"{target}, {len(images.calibration):,} calibration images, W{bits}A{bits}"
    edges, channels = distributions.observe_layers(model, (x for x, _ in images.batches(images.calibration)), verbose=True)
    stored = {layer: edges.get((layer, "after"), edges[layer, "before"]) for layer in channels.layer.unique()}
    ranges = pd.DataFrame([(name, *observers.histogram(edge, bits)) for name, edge in stored.items()], columns=["layer", "low", "high"])
    ridges = plots.ridges(distributions.densities(edges), f"{text}; bar: clip range, square root of the density", ranges)
    sections = [
        ("Summary", _summary(target, model, qmodel, images, config, accuracy)),
        ("What is computed in float between two sets of codes", _floats(qmodel)),
        ("Which layer broke", _figure(plots.edge_report(errors, f"{text}, error on {min(64, len(images.test))} images")) + _table(errors, "added_db")),
        ("Which range is best on which edge", _figure(plots.observer_map(by_observer, text)) + _table(by_observer, None)),
        ("Every layer's values", _figure(ridges)),
        ("Weights", _table(weight_errors, None)),
        ("The edge that adds most noise", _figure(_worst_edge(errors, stats, bits, text))),
    ]
    with atomic_path(pathlib.Path(out)) as temporary:
        temporary.write_text(_page(target, sections), encoding="utf-8")
    return pathlib.Path(out)


@torch.no_grad()
def _check_outputs(model, images, unlabelled):
    with exact_float():
        logits = model(next(images.batches(images.calibration[:2]))[0].to(device()))
    if not isinstance(logits, torch.Tensor) or logits.dim() != 2:
        raise UserError(f"the network returns {type(logits).__name__} {list(getattr(logits, 'shape', []))}, not logits [B, classes]; wrap it so that it does")
    if images.classes and not unlabelled and len(images.classes) != logits.shape[1]:
        raise UserError(f"the folder has {len(images.classes)} classes, the network {logits.shape[1]} outputs; pass --unlabelled to leave accuracy out")


def compare_observers(stats, qmodel, bits):
    """Signal to quantization noise in dB that each observer's range leaves on each stored edge at `bits`; frame: edge, one column an observer."""
    rows = []
    for name in qmodel.plan.stores:
        edge = stats.edges[name]
        centers, counts = edge.histogram()
        power = float(centers.square() @ counts.double()) / edge.count
        noise = {o: float(observers.quantization_error(edge, *([v] for v in setter(edge, bits)), bits)) for o, setter in observers.OBSERVERS.items()}
        rows.append({"edge": name} | {o: 10 * torch.log10(torch.tensor(power / max(e, 1e-300))).item() for o, e in noise.items()})
    return pd.DataFrame(rows)


def compare_weights(model, qmodel):
    """Per layer: shape, spread of its channels' ranges, and the signal to noise that its rounded weights keep; a frame."""
    graph, rows = folded(model), []
    for name in layers(graph):
        weight = graph.get_submodule(find_node(graph, name).target).weight.detach()
        q = qmodel.get_submodule(find_node(qmodel, name).target).weight_qparams
        ranges = weight.flatten(1).abs().amax(1)
        noise = (fake_quantize(weight, q) - weight).double().square().sum() / weight.double().square().sum()
        rows.append({
            "layer": name, "weights": weight.numel(), "shape": "x".join(map(str, weight.shape)), "bits": q.bits,
            "largest channel / median": (ranges.max() / ranges.median().clamp(min=1e-12)).item(), "sqnr": -10 * torch.log10(noise).item(),
        })
    return pd.DataFrame(rows)


@torch.no_grad()
def compare_accuracy(model, qmodel, images):
    """Top-1 in percent on the test images: (float, quantized, n)."""
    right = torch.zeros(2)
    with exact_float():
        for x, labels in images.batches(images.test):
            right += torch.tensor([(m(x.to(device())).argmax(1).cpu() == labels).sum() for m in (model, qmodel)])
    return (*(100 * right / len(images.test)).tolist(), len(images.test))


def _worst_edge(errors, stats, bits, text):
    name = errors.loc[errors.added_db.idxmax(), "edge"] if errors.added_db.notna().any() else errors.edge.iloc[0]
    name = name if name in stats.edges else name.removesuffix(f"_{bits}bit")
    edge = stats.edges[name]
    ranges = pd.DataFrame([(o, *setter(edge, bits)) for o, setter in observers.OBSERVERS.items()], columns=["observer", "low", "high"])
    return plots.clip_histogram(edge, ranges, text, f"Edge {name}", "activation")


# ---- The page ---------------------------------------------------------------------------------------------------------------

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#222}table{border-collapse:collapse;font-size:13px}
td,th{padding:.2em .7em;text-align:right;border-bottom:1px solid #ddd}td:first-child,th:first-child{text-align:left}img{max-width:100%}
td.names{text-align:left;font-family:monospace}details{margin:.5em 0}summary{cursor:pointer;color:#246}"""


def _page(target, sections):
    body = "\n".join(f"<h2>{html.escape(title)}</h2>\n{content}" for title, content in sections)
    title = html.escape(f"Quantization of {target}")
    return f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style><h1>{title}</h1>\n{body}\n</html>\n'


def _summary(target, model, qmodel, images, config, accuracy):
    float_bytes = 4 * sum(p.numel() for p in model.parameters())
    facts = {
        "network": target, "convolutions and linear layers": len(layers(qmodel)), "values stored as codes": len(qmodel.plan.stores),
        "calibration images": f"{len(images.calibration):,}", "weights in float": f"{float_bytes / 1e6:.2f} MB",
        f"weights at {config.weight_bits} bits, with scales and biases": f"{weight_bytes(qmodel) / 1e6:.2f} MB",
        "convention": f"all layers W{config.weight_bits}A{config.act_bits}, operands and results of adds {config.residual_bits} bits, image {config.input_bits} bits",
    }
    if accuracy:
        facts["top-1"] = f"{accuracy[0]:.2f} % in float, {accuracy[1]:.2f} % quantized, n = {accuracy[2]:,}"
    return "<table>" + "".join(f"<tr><td>{html.escape(k)}</td><td>{html.escape(str(v))}</td></tr>" for k, v in facts.items()) + "</table>"


def _floats(qmodel):
    if not qmodel.plan.floats:
        return "<p>Nothing: every operation has an integer form.</p>"
    groups = {}
    for name in qmodel.plan.floats:
        node = find_node(qmodel, name)
        operation = type(qmodel.get_submodule(node.target)).__name__ if node.op == "call_module" else call_name(node)
        groups.setdefault(operation, []).append(name)
    rows = "".join(f"<tr><td>{html.escape(o)}</td><td>{len(names)}</td><td class=names>{html.escape(', '.join(names))}</td></tr>" for o, names in groups.items())
    return (
        "<p>These operations have no integer form here. Each reads values that were rounded to codes, computes in float, and its result is rounded again.</p>"
        f"<table><tr><th>operation</th><th>times</th><th>nodes</th></tr>{rows}</table>"
    )


def _table(frame, ranked_by):
    frame = frame.sort_values(ranked_by, ascending=False) if ranked_by else frame
    return f"<details><summary>{len(frame)} rows</summary>{frame.to_html(index=False, border=0, float_format=lambda v: f'{v:.2f}')}</details>"


def _figure(figure):
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=130)
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}">'
