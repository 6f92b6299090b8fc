"""Every figure drawn from data as a notebook has them: long names, many methods, small numbers, one
row; nothing is cut off, nothing of matplotlib's own is changed.
"""

import io
import itertools
import warnings

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

import quantlab as ql
from quantlab import plots
from quantlab.edgestats import EdgeStats
from quantlab.observers import OBSERVERS
from quantlab.plots import beyond, formats, integer, ladder, lowbit, page, panel, questions
from quantlab.system.errors import UserError

TEXT = ("cifar10-jpeg, resnet20, n = 10,000; test images, 1,024 calibration images, 3 calibration "
        "seed(s), residual stream 8 bits; paired 95 % intervals")
LAYERS = [f"layer{i}_{j}_conv{k}" for i, j, k in itertools.product((1, 2, 3), range(3), (1, 2))]
METHODS = ["nearest", "equalisation", "bias correction", "analytic bias correction", "AdaRound",
           "BatchNorm re-estimation", "BRECQ", "QDrop", "QDrop + Fisher", "QDrop + end to end",
           "QDrop + fine-tuning"]
random = np.random.default_rng(0)


def test_names_are_text_and_no_formulas():
    """Of a data set with one $, which is no formula, and classes with two, which would be one."""
    data, classes = "prices_$5_to_$9", ["US$ for CA$", "$x^2$", "$_{"]
    labels = torch.arange(3)
    figures = [
        plots.confusion(labels, labels, classes, plots.row_caption(data, "net", 3)),
        plots.image_grid(
            torch.zeros(3, 3, 8, 8, dtype=torch.uint8), classes, [1, 0, 1], data),
        page.caption(plt.figure(), f"{data} $a$")]
    for figure in figures:
        figure.savefig(io.BytesIO())
        texts = [text for text in figure.findobj(mpl.text.Text) if "$" in text.get_text()]
        assert texts and not any(text.get_parse_math() for text in texts)
    drawn = {text.get_text() for text in figures[0].findobj(mpl.text.Text)}
    assert {*classes} <= drawn and any(text.startswith(data) for text in drawn)
    assert mpl.rcParams["text.parse_math"], "the reader's own figures are as they were"


def with_interval(rows, value="drop", low="drop_low", high="drop_high"):
    frame = pd.DataFrame(rows)
    return frame.assign(**{low: frame[value] - 0.4, high: frame[value] + 0.6})


def edge(seed=0, relu=True, scale=1.0):
    x = torch.randn(40_000, generator=torch.Generator().manual_seed(seed)) ** 3 * scale
    return EdgeStats().update(x.relu() if relu else x)


def chosen_ranges(stats, bits=4):
    rows = [(name, *setter(stats, bits)) for name, setter in OBSERVERS.items()]
    return pd.DataFrame(rows, columns=["observer", "low", "high"])


def density_frame(layers, relus):
    rows, x = [], np.linspace(-6, 9, 160)
    for order, layer in enumerate(layers):
        points = ["weight", "before"] + ["after"] * (layer in relus)
        for point in points:
            width = 0.5 + order % 3
            y = np.exp(-(((x - order % 2) / width) ** 2)) / width
            y = np.where((point == "after") & (x <= 0), 0, y)
            zeros = 0.5 if point == "after" else 0.0
            rows.append(pd.DataFrame({"order": order, "layer": layer, "point": point, "x": x,
                                      "density": y, "zeros": zeros, "z": 1.7 * x}))
    return pd.concat(rows, ignore_index=True)


def layer_ranges(layers):
    return pd.DataFrame([(layer, 0.0, 3 + i % 4) for i, layer in enumerate(layers)],
                        columns=["layer", "low", "high"])


def bits_table(observers, seeds=3):
    rows = [{"bits": b, "observer": o, "fp32_top1": 92.31, "drop": 60 / b**2.5 * (1 + i) + 0.1 * s,
             "n": 4**b, "seed": s} for b, (i, o), s in
            itertools.product((8, 6, 5, 4, 3, 2), enumerate(observers), range(seeds))]
    frame = with_interval(rows)
    return frame.assign(top1=(92.31 - frame["drop"]).clip(lower=10))


def methods_table(methods, scale=1.0):
    rows = [{"method": m, "top1": 92.31 - i * 0.013, "bytes": scale * 1_083_000 / (1 + i),
             "images_per_s": 812.4 * (1 + i)} for i, m in enumerate(methods)]
    return pd.DataFrame(rows)


def widths_table(methods, widths=("W8A8", "W4A4", "W3A3", "W2A2", "W2A4\nfirst/last 8")):
    pairs = itertools.product(enumerate(widths), enumerate(methods))
    return with_interval({"method": m, "width": w, "drop": 0.02 + 0.6 * i**2 * (2 - j / 11)}
                         for (i, w), (j, m) in pairs)


def rivals():
    return with_interval({"method": m, "drop": d} for m, d in zip(TOOLS[2:], (0.1, -0.9)))


def units_table(methods):
    return pd.DataFrame([{"method": m, "order": i, "unit": layer, "nearest": 0.02, "learned":
                          0.02 * (0.3 + i / 20)} for m, (i, layer) in
                         itertools.product(methods, enumerate([*LAYERS, "stem", "head"]))])


def sensitivity_table():
    return pd.DataFrame([{"layer": n, "kind": k, "bits": b, "error": 10.0 ** -(b + i % 3)}
                         for (i, n), k, b in itertools.product(
                             enumerate(LAYERS), ("weight", "activation"), (8, 4, 2))])


def learned_rounding():
    rows = [(it, w, float(np.clip(0.5 + (w / 40 - 0.5) * it / 100, 0, 1)), (w * 7 % 40) / 40)
            for it, w in itertools.product(range(0, 500, 50), range(40))]
    curve = pd.DataFrame({"iteration": range(0, 500, 50), "nearest": 0.031,
                          "learned": np.linspace(0.03, 0.012, 10)})
    paths = pd.DataFrame(rows, columns=["iteration", "weight", "h", "start"])
    return lowbit.learned_rounding(paths, curve, TEXT)


def layer_accuracy():
    rows = [{"layer": n, "case": c, "all": 3.1, "drop": 0.1 * (i % 5)} for c, (i, n) in
            itertools.product(("only this quantized", "only this float"), enumerate(LAYERS))]
    frame = with_interval(rows).assign(regained=lambda f: f["all"] - f["drop"])
    names = "regained", "regained_low", "regained_high"
    return lowbit.layer_accuracy(with_interval(frame, *names), TEXT)


def pareto():
    axes = (("size", 34_000), ("operations", 4e7))
    rows = [{"axis": axis, "kind": kind, "cost": cost * b * (0.93 if kind == "mixed" else 1),
             "top1": 92 - 90 / b**2, "label": f"W{b}A{b}", "fp32_top1": 92.31}
            for (axis, cost), kind, b in itertools.product(axes, ("uniform", "mixed"), range(2, 9))]
    return lowbit.pareto(pd.DataFrame(rows), TEXT)


def conventions(widths=("W4A4", "W3A3")):
    names = ["first and last layer 8 bits", "residual stream float", "image low bits",
             "BatchNorm re-estimation", "most papers: first/last 8,\nresidual stream float"]
    rows = [{"width": w, "convention": n, "gain": 0.9 * i - 1.2} for w, (i, n) in
            itertools.product(widths, enumerate(names))]
    return lowbit.conventions(with_interval(rows, "gain", "gain_low", "gain_high"), TEXT)


def edge_report():
    sqnr = np.linspace(38, 14, len(LAYERS))
    frame = pd.DataFrame({"edge": LAYERS, "order": range(len(LAYERS)), "sqnr": sqnr,
                          "own_sqnr": sqnr + 6, "added_db": np.arange(len(LAYERS)) % 7 + 0.3})
    return plots.edge_report(frame, TEXT)


def observer_map(layers):
    values = {o: random.uniform(15, 30, len(layers)) for o in OBSERVERS}
    return plots.observer_map(pd.DataFrame({"edge": layers, **values}), TEXT)


def tradeoff():
    fraction = np.linspace(0.1, 1, 50)
    rows = [pd.DataFrame({"bits": b, "share": fraction, "clipping": 1e-3 * (1 - fraction) ** 4,
                          "rounding": fraction**2 / 4.0**b}) for b in (8, 4, 3, 2)]
    return plots.range_tradeoff(pd.concat(rows), TEXT)


def landscape():
    high = np.linspace(0.5, 6, 60)
    curve = pd.concat(pd.DataFrame({"bits": b, "high": high}) for b in (8, 4, 3))
    rows = [{"bits": b, "observer": o, "high": 1 + i / 2}
            for b, (i, o) in itertools.product((8, 4, 3), enumerate(OBSERVERS))]
    curve, rows = (f.assign(error=1e-4 * (f.high - f.bits / 2) ** 2 + 1e-5)
                   for f in (curve, pd.DataFrame(rows)))
    return plots.error_landscape(curve, rows, TEXT)


def tails(layers):
    table = pd.DataFrame({"order": range(len(layers)), "layer": layers,
                          "max_over_p": 1 + random.gamma(2, 0.5, len(layers))})
    for k in (3, 4, 6):
        table[f"beyond_{k}"] = 10.0**-k * random.uniform(0, 9, len(layers))
    return plots.tails(table, TEXT, {3: 2.7e-3, 4: 6.3e-5, 6: 2e-9})


def spread(layers):
    rows = [(layer, v) for layer in layers for v in [*random.uniform(0.1, 1, 30), 0.0, 0.0, 1.0]]
    costs = pd.DataFrame({"layer": layers, "gain_db": random.uniform(0, 9, len(layers))})
    return plots.channel_spread(pd.DataFrame(rows, columns=["layer", "share"]), costs, TEXT, 4)


def rounding(networks=("W8A8", "W4A4")):
    modes = ("single", "double")
    errors = pd.DataFrame([{"rounding": m, "error": e * w} for m, w in zip(modes, (0.5, 0.8))
                           for e in random.uniform(-1, 1, 400)])
    layers = [{"rounding": m, "multiplier": 10.0 ** -(1 + i / 6), "share": j * 10.0**-i}
              for (j, m), i in itertools.product(enumerate(modes), range(18))]
    depth = [{"network": n, "rounding": m, "fed": fed, "order": i, "share": 1e-6 * j * i**3}
             for n, (j, m), fed, i in
             itertools.product(networks, enumerate(modes), ("same", "own"), range(20))]
    modes = integer.rounding_modes(errors, pd.DataFrame(layers), TEXT)
    return modes, integer.codes_by_depth(pd.DataFrame(depth), TEXT)


def costs():
    kinds = ["conv", "conv", "add", "requantize", "average", "linear"] * 6
    report = pd.DataFrame({"layer": [f"{k}_{i}" for i, k in enumerate(kinds)], "kind": kinds,
                           "accumulator_bits": 20.0, "bops": 3e8, "live_bytes": 20_480})
    return integer.layer_costs(report, TEXT)


def original_rows():
    names = ["fp32 original", "8bit built-in", "8bit hist", "8bit fake-hist", "4bit hist",
             "4bit fake-hist", "3bit fake-hist"]
    rows = [{"quantization": n, "way": w, "top1": 93 - i**2 * (2 - j), "drop": i**2 * (2 - j) - 0.1}
            for (i, n), (j, w) in itertools.product(enumerate(names), enumerate(ladder.WAYS))]
    frame = with_interval(rows, "drop", "low", "high")
    theirs = frame.way == ladder.WAYS[0]
    return ladder.original_rows(frame.assign(high=frame.high.mask(theirs)), TEXT)


def waterfall():
    steps = ["the original's hist", "BatchNorm kept as trained", "ranges from the float network",
             "the search works", "image and stream 8 bits, zero-point", "one scale a channel"]
    changes = [np.nan, 3.2, 41.0, -4.2, 22.8, 0.3]
    rows, dots = [], []
    for bits, start in ((4, 28.4), (3, 10.2)):
        top1 = start
        for step, change in zip(steps, changes):
            top1 += 0 if np.isnan(change) else change
            rows.append({"bits": bits, "step": step, "top1": top1, "change": change,
                         "low": change - 1, "high": change + 1})
            dots += [{"bits": bits, "step": step, "top1": top1 + s} for s in (-2, 0, 1)]
    return ladder.waterfall(pd.DataFrame(rows), pd.DataFrame(dots), TEXT)


def repairs():
    rows = [{"repair": n, "end": e, "worth": w * s} for (n, w), (e, s) in itertools.product(
        (("BatchNorm kept as trained", 12.3), ("codes stored once, stream 8 bits", 20.1),
         ("unsigned after ReLU", -0.4)), (("the original plus this", 1), ("ours minus this", 0.1)))]
    return ladder.repair_bars(with_interval(rows, "worth", "low", "high"), TEXT)


def strips(stats):
    levels = {name: torch.arange(-8, 8) * step for name, step in
              (("hist", 4.0), ("fake-hist", 1.5), ("ours", 0.9))}
    return ladder.code_strips(stats, levels, TEXT, "Three sets of codes", "activation")


def dataflow():
    names = [*questions.MAIN, *questions.SIDE]
    held = ["uint8", "int16", "int32", "int32", "int64", "int32", "uint8", "float32", "int8",
            "int32", "int32"]
    ends = (128, 255, 120_345, 1_234_567, 123_456_789_012, 255, 255, 11.27, 127, 12_345,
            2_147_483_647)
    rows = [{"step": name, "container": container, "low": -end, "high": end, "bits": 12,
             "worst_bits": 23, "example": "1,234,567", "grid": "s = 0.004395, z = 119"}
            for name, container, end in zip(names, held, ends)]
    title = "conv1 + BatchNorm + ReLU in integers, 27 products a sum; “here” is one output"
    return questions.dataflow(pd.DataFrame(rows), TEXT, title)


def minmax_strip(bits):
    values = random.normal(0, 0.1, 400).astype(np.float32)
    ranges = pd.DataFrame({"name": ["min-max, no saturation", "best range, with saturation"],
                           "high": [float(np.abs(values).max()), 0.2]})
    return questions.minmax_strip(values, ranges, bits, TEXT)


def clipped(stats):
    values = np.arange(16) * 0.5
    counts = (1000 / (1 + values)).round() * (values < 6)
    coded = dict.fromkeys(("minmax", "mse"), (values, counts, 7.5))
    return questions.clipped_histograms(stats, coded, TEXT)


def error_by_range():
    fraction = np.linspace(0.1, 1, 40)
    rows = [pd.DataFrame({"part": p, "share": fraction, "measured": m,
                          "sqnr": 25 - 30 * (fraction - 0.5 - i / 8) ** 2})
            for p in ("weights of layer2_0_conv1", "its input")
            for i, m in enumerate(("the tensor itself", "the layer's output", "the logits"))]
    return questions.error_by_range(pd.concat(rows), TEXT)


def variants(bits=(8, 4, 3)):
    names = ["folded, rounded once", "BatchNorm in float, rounded once", "rounded behind each",
             "rounded behind convolution and ReLU"]
    rows = [{"bits": b, "variant": n, "drop": (i + 1) * 8 / b - 1} for b, (i, n) in
            itertools.product(bits, enumerate(names))]
    return questions.variant_drops(with_interval(rows), TEXT, "Fused or not: points lost")


def heatmap():
    rows = [{"weight_bits": w, "act_bits": a, "drop": 40 / w + 30 / a - 8,
             "top1": 92 - 40 / w - 30 / a} for w, a in itertools.product((8, 4, 3, 2), repeat=2)]
    return questions.bits_heatmap(pd.DataFrame(rows), TEXT)


def two_values():
    pair = ql.choose_qparams(-4.0, 6.0, 8), ql.choose_qparams(0.0, 6.0, 8)
    return questions.two_values({"layer1_0_conv1": pair, "The original's example": pair}, 192, TEXT)


def fine_tuning():
    history = pd.DataFrame({"images": np.arange(1, 11) * 45_000, "heldout": np.linspace(70, 90, 10),
                            "loss": np.linspace(1.2, 0.2, 10)})
    return beyond.fine_tuning(history, {"float": 92.31, "PTQ, nearest rounding": 71.2}, TEXT)


def sources(names=("real images", "distilled images", "noise images")):
    table = pd.DataFrame([{"source": n, "images": c, "float": 92.31, "top1": 91 - 8 * i + s}
                          for (i, n), c, s in itertools.product(enumerate(names), [128], range(3))]
                         + [{"source": names[0], "images": 1024, "float": 92.31, "top1": 91.9}])
    ranges = pd.DataFrame([{"source": n, "order": i, "ratio": 1.2 ** ((i * (j + 1)) % 7 - 3)}
                           for (j, n), i in itertools.product(enumerate(names), range(22))])
    return beyond.calibration_sources(table, ranges, TEXT)


def source_map(count=9):
    topics = [f"topic {i} of quantization" for i in range(count)]
    table = pd.DataFrame({"topic": topics, "modules": range(1, count + 1),
                          "lines": [1000 * (i + 1) for i in range(count)],
                          "used": [["QuantizedLinear", "get_observer_state", "prepare"]] * count})
    edges = pd.DataFrame([{"importer": a, "imported": b, "uses": 1 + i} for i, (a, b) in
                          enumerate(itertools.pairwise(topics))])
    return beyond.source_map(dict.fromkeys(("torch.ao 2.13.0", "torchao"), (table, edges)), TEXT)


SCHEMES = [(name, bits) for bits, names in {
    8: ["integers, 8 bits", "minifloat E4M3", "MXINT8", "MXFP8 E4M3", "MXFP8 E5M2"],
    6: ["integers, 6 bits", "minifloat E2M3", "MXFP6 E2M3"],
    4: ["integers, 4 bits", "minifloat E2M1", "MXFP4", "NVINT4", "NVFP4"]}.items()
    for name in names]


def value_grids(names=("INT8", "E4M3", "E5M2", "INT6", "E2M3", "E3M2", "INT4", "E2M1")):
    grid = pd.DataFrame({"bits": 8, "value": 2.0 ** np.arange(-16, 16)})
    grid["subnormal"] = grid.value < 2.0**-14
    return formats.value_grids(pd.concat(grid.assign(format=name) for name in names), TEXT)


def error_map(schemes, columns=("normal", "Laplace", "behind a ReLU", "before an add", "weights")):
    rows = [{"format": name, "bits": bits, "distribution": column, "sqnr": 6.0 * bits - i,
             "gain": 10 * (i - 1) * (-1) ** bits} for (name, bits), (i, column) in
            itertools.product(schemes, enumerate(columns))]
    return formats.error_map(pd.DataFrame(rows), TEXT)


def lost_by_format(schemes):
    rows = [{"format": name, "bits": bits, "drop": 0.02 + i * (9 - bits) ** 2 / 10}
            for i, (name, bits) in enumerate(schemes)]
    return formats.lost_by_format(with_interval(rows), TEXT)


def curves(epochs=60):
    history = pd.DataFrame({"epoch": range(1, epochs + 1), "loss": 2.0 / np.arange(1, epochs + 1),
                            "train_top1": 60.0, "heldout_top1": 70.0})
    return plots.training_curves(history, TEXT)


def confusion(classes):
    labels = torch.arange(500) % classes
    names = [f"a class with a long name {i}" for i in range(classes)]
    return plots.confusion(labels, (labels * 3) % classes, names, TEXT)


def images(n):
    return plots.image_grid(torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8),
                            ["automobile, not ship"] * n, [i % 2 == 0 for i in range(n)], TEXT)


def weights(bits):
    weight = torch.randn(16, 16, 3, 3, generator=torch.Generator().manual_seed(0)) * 1e-3
    q = ql.choose_qparams(weight.min(), weight.max(), bits, symmetric=True)
    return plots.weight_codes(weight, ql.fake_quantize(weight, q), q, TEXT)


def range_figure(stats, bits, share):
    chosen = OBSERVERS["mse"](stats, bits)
    return panel.range_figure(stats, "layer2_0_conv1", bits, "mse", chosen, share, TEXT)


TOOLS = ["float", "eager int8", "PT2E int8", "ONNX Runtime int8"]
MANY = [f"{layer}_{i}" for i in range(3) for layer in LAYERS]
FIGURES = {
    "method_bars": lambda: plots.method_bars(methods_table(TOOLS), TEXT),
    "method_bars_tiny": lambda: plots.method_bars(methods_table(
        ["float", "dynamic int8 by hand", "quantize_dynamic"], 1e-4), TEXT),
    "method_bars_one": lambda: plots.method_bars(methods_table(["float"]), TEXT),
    "by_bits": lambda: plots.accuracy_by_bits(bits_table(OBSERVERS), TEXT),
    "by_bits_one": lambda: plots.accuracy_by_bits(bits_table(["percentile(q=99.9)"], 1), TEXT),
    "by_images": lambda: plots.accuracy_by_images(bits_table(["minmax", "mse", "my own"]), TEXT),
    "curves": curves, "curves_one": lambda: curves(1),
    "confusion": lambda: confusion(10), "confusion_many": lambda: confusion(100),
    "images": lambda: images(20), "images_few": lambda: images(3),
    "clip_histogram": lambda: plots.clip_histogram(
        edge(), chosen_ranges(edge()), TEXT, "Where to clip? Edge layer2_0_conv1", "activation"),
    "clip_histogram_signed": lambda: plots.clip_histogram(
        edge(1, False, 1e-4), chosen_ranges(edge(1, False, 1e-4)), TEXT, "Tiny and signed"),
    "clip_histogram_zeros": lambda: plots.clip_histogram(
        edge(1, scale=0), chosen_ranges(edge(1, scale=0)), TEXT, "Nothing but zeros"),
    "weight_8": lambda: weights(8), "weight_3": lambda: weights(3),
    "tradeoff": tradeoff, "landscape": landscape, "edge_report": edge_report,
    "observer_map": lambda: observer_map(LAYERS),
    "observer_map_one": lambda: observer_map(LAYERS[:1]),
    "ridges": lambda: plots.ridges(density_frame(LAYERS, LAYERS[::2]), TEXT, layer_ranges(LAYERS)),
    "ridges_many": lambda: plots.ridges(density_frame(MANY, MANY), TEXT, layer_ranges(MANY)),
    "ridges_one": lambda: plots.ridges(density_frame(LAYERS[:1], []), TEXT),
    "layer_histograms": lambda: plots.layer_histograms(
        density_frame(LAYERS, LAYERS), layer_ranges(LAYERS[:7]), TEXT),
    "layer_histograms_one": lambda: plots.layer_histograms(
        density_frame(LAYERS[:1], LAYERS), layer_ranges(LAYERS[:1]), TEXT),
    "tails": lambda: tails(LAYERS), "tails_many": lambda: tails(MANY),
    "channel_spread": lambda: spread(LAYERS), "channel_spread_many": lambda: spread(MANY),
    "channel_spread_one": lambda: spread(LAYERS[:1]),
    "weights_activations": lambda: plots.weights_beside_activations(
        density_frame(LAYERS, LAYERS), TEXT),
    "rounding_modes": lambda: rounding()[0], "codes_by_depth": lambda: rounding()[1],
    "codes_by_depth_one": lambda: rounding(["W8A8"])[1], "layer_costs": costs,
    "original_rows": original_rows, "waterfall": waterfall, "repair_bars": repairs,
    "code_strips": lambda: strips(edge(relu=False)),
    "code_strips_zeros": lambda: strips(edge(scale=0)),
    "learned_rounding": learned_rounding,
    "unit_errors": lambda: lowbit.unit_errors(units_table(["AdaRound", "BRECQ", "QDrop"]), TEXT),
    "unit_errors_one": lambda: lowbit.unit_errors(units_table(["QDrop + Fisher"]), TEXT),
    "methods_by_width": lambda: lowbit.methods_by_width(
        widths_table(METHODS), rivals(), TEXT),
    "methods_by_width_one": lambda: lowbit.methods_by_width(
        widths_table(["nearest"], ("W4A4",)), rivals()[:0], TEXT),
    "sensitivity_map": lambda: lowbit.sensitivity_map(sensitivity_table(), TEXT, pd.DataFrame(
        {"layer": LAYERS, "weight_bits": 4, "act_bits": 2})),
    "layer_accuracy": layer_accuracy, "pareto": pareto, "conventions": conventions,
    "conventions_one": lambda: conventions(["W3A3"]), "dataflow": dataflow,
    "minmax_strip": lambda: minmax_strip(4), "minmax_strip_8": lambda: minmax_strip(8),
    "clipped": lambda: clipped(edge()), "error_by_range": error_by_range,
    "variants": variants, "variants_one": lambda: variants([4]), "heatmap": heatmap,
    "two_values": two_values, "fine_tuning": fine_tuning, "sources": sources,
    "value_grids": value_grids, "value_grids_one": lambda: value_grids(["E2M1"]),
    "error_map": lambda: error_map(SCHEMES), "error_map_one": lambda: error_map(SCHEMES[:1]),
    "lost_by_format": lambda: lost_by_format(SCHEMES),
    "lost_by_format_one": lambda: lost_by_format(SCHEMES[:1]),
    "source_map": source_map, "source_map_two": lambda: source_map(2),
    "range_figure": lambda: range_figure(edge(), 4, 0.8),
    "range_figure_signed": lambda: range_figure(edge(2, False), 8, 0.3),
    "range_figure_zeros": lambda: range_figure(edge(scale=0), 4, 1.0),
}


def drawn(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = FIGURES[name]()
        figure.draw_without_rendering()
    return figure


def overlapping_ticks(axis, across):
    """Pairs of horizontal tick labels within the view of which one covers the other."""
    low, high = sorted(axis.get_view_interval())
    labels = [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    labels = [label for label in labels if label.get_text() and not label.get_rotation()]
    boxes = sorted((label.get_window_extent().get_points()[:, across].tolist(), label.get_text())
                   for label in labels if label.get_visible())
    return [(a[1], b[1]) for a, b in itertools.pairwise(boxes) if b[0][0] < a[0][1] - 1]


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_whole_and_leaves_matplotlib_as_it_was(name):
    before, opened = dict(mpl.rcParams), plt.get_fignums()
    figure = drawn(name)
    assert dict(mpl.rcParams) == before and plt.get_fignums() == opened
    words = figure._supxlabel.get_text().replace("\n", " ")
    assert words.startswith(TEXT), "the caption says what was measured"
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert box.x0 > -0.02 and box.y0 > -0.02, "cut off at the left or below"
    assert box.x1 < width + 0.02 and box.y1 < height + 0.02, "cut off at the right or above"
    for axes in figure.axes:
        assert not overlapping_ticks(axes.xaxis, 0) and not overlapping_ticks(axes.yaxis, 1)
        if axes.axison and axes.lines and not axes.get_legend_handles_labels()[1]:
            assert axes.get_title() or axes.get_xlabel() or axes.get_ylabel()


def test_a_figure_looks_the_same_wherever_it_is_shown():
    """A figure is shown after the style has ended: nothing may be left to decide by then."""
    pictures = []
    for context in (plt.rc_context(), plt.rc_context(plots.style.STYLE)):
        figure, file = FIGURES["by_bits"](), io.BytesIO()
        with context:
            figure.savefig(file, format="png", dpi=60)
        pictures.append(file.getvalue())
    assert pictures[0] == pictures[1]


def test_a_saved_figure_is_the_same_file_twice(workbook):
    files = []
    for _ in range(2):
        plots.save(FIGURES["by_images"](), "04_images", "digits", "resnet20")
        files.append([(workbook / "pic" / f"04_images_resnet20_digits.{s}").read_bytes()
                      for s in ("png", "svg")])
    assert files[0] == files[1]


def test_powers_of_ten_are_formulas_in_a_saved_figure_too(workbook):
    for name in ("tradeoff", "clip_histogram"):
        figure = plots.save(FIGURES[name](), name, widths=[183])
        powers = [text for text in figure.findobj(mpl.text.Text) if "10^" in text.get_text()]
        seen = [text for text in powers if text.get_visible()]
        assert seen and all(text.get_parse_math() for text in seen)


def test_an_empty_table_is_said_to_be_empty():
    empty = {
        plots.method_bars: methods_table(TOOLS), plots.accuracy_by_bits: bits_table(["mse"]),
        questions.variant_drops: with_interval([{"bits": 8, "variant": "a", "drop": 0}]),
        lowbit.unit_errors: units_table(["QDrop"]), plots.ridges: density_frame(LAYERS, LAYERS),
    }
    for draw, table in empty.items():
        with pytest.raises(UserError, match="nothing to draw"):
            draw(table[:0], TEXT)
