"""How fast: every claim of speed as a ratio, both sides measured in turns in one run.

    python -m quantlab bench [collect fakequant int8 integer reconstruct tune] [--model resnet50]
                             [--batch 64]

Weights are random, images are noise: neither changes what is computed. All networks run on the CPU
with torch's threads.
"""

import collections
import copy
import functools
import itertools
import math
import shutil
import statistics
import time

import pandas as pd
import torch

from quantlab.calibration import collect
from quantlab.config import QuantConfig
from quantlab.improving.reconstruct import ReconstructConfig, iteration_cost
from quantlab.improving.tune import TuneConfig
from quantlab.improving.tune import iteration_cost as tuning_cost
from quantlab.inplace import written_in_place
from quantlab.integer.fast import native
from quantlab.integer.network import IntegerRun, to_integer
from quantlab.networks.architectures import build
from quantlab.ptq import quantize
from quantlab.rivals import pytorch as builtin
from quantlab.system.errors import UserError, check_name
from quantlab.system.files import atomic_path, read_csv, root
from quantlab.system.machine import device_name
from quantlab.system.timing import take_turns

SIZE = 32  # pixels a side, as CIFAR-10
MODELS = ("resnet50", "resnet20", "mobilenet_v2")
WIDTHS = ((8, 8), (4, 8), (4, 4), (2, 2))  # weights, activations
ENTRY = "images to codes"  # what comes before the first operation


def compare(section, baseline, networks, images, rounds):
    """A frame, one row a network (name -> callable on `images`): images/s by the median, time and
    throughput against `baseline`, with the smallest and the largest round.
    """
    calls = {name: functools.partial(network, images) for name, network in networks.items()}
    with torch.inference_mode():
        times = take_turns(calls, rounds, verbose=True)
    rows = []
    for name, seconds in times.items():
        ratios = [a / b for a, b in zip(seconds, times[baseline])]
        rows.append({
            "section": section, "what": name, "against": baseline,
            "images_per_s": len(images) / statistics.median(seconds),
            "time_ratio": statistics.median(ratios),
            "time_ratio_least": min(ratios), "time_ratio_most": max(ratios),
            "throughput_ratio": 1 / statistics.median(ratios),
        })
    return pd.DataFrame(rows)


def bench_collect(model, images, rounds, compiled):
    """A calibration pass (four batches, all edges, all values counted) against plain forward passes
    and torch.ao's HistogramObserver.
    """
    networks = {"float": model}
    if builtin.backends()[0].available:
        networks["torch.ao HistogramObserver"] = builtin.observed(model, images[:1])
    if compiled:
        networks["float, compiled"] = torch.compile(model)
    batches = [images] * 4

    def forward(network, _):
        return [network(x) for x in batches]

    passes = {name: functools.partial(forward, network) for name, network in networks.items()}
    passes["collect"] = lambda _: collect(model, batches)
    return compare("collect", "float", passes, images.repeat(4, 1, 1, 1), rounds)


def bench_fakequant(model, images, rounds, compiled):
    """The fake-quantized network, as it is called and as evaluate runs it, against the unfolded
    float network and torch's FX fake-quant; images lie as evaluate lays them.
    """
    images = images.contiguous(memory_format=torch.channels_last)
    ours = quantize(model, collect(model, [images]), QuantConfig())
    networks = {"float": model, "fake-quant": ours, "fake-quant in place": written_in_place(ours)}
    if builtin.backends()[0].available:
        networks["torch.ao FX fake-quant"] = builtin.fake_quantized(model, images)
    if compiled:
        networks["float, compiled"] = torch.compile(model)
        networks["fake-quant, compiled"] = torch.compile(copy.deepcopy(ours))
    return compare("fakequant", "float", networks, images, rounds)


def bench_int8(model, images, rounds, compiled):
    """PyTorch's built-in int8 kernels against float."""
    networks = {"float": model}
    if compiled:
        networks["float, compiled"] = torch.compile(model)
    pt2e = functools.partial(builtin.pt2e_int8, batch_size=len(images))
    for backend, make in zip(builtin.backends(), (builtin.eager_int8, pt2e)):
        if not backend.available:
            print(f"{backend.name} int8: {backend.note}")
        elif compiled or backend.name == "eager":
            networks[f"{backend.name} int8"] = make(model, [images])
        else:
            print(f"{backend.name} int8: needs the compiler; skipped")
    return compare("int8", "float", networks, images, rounds)


def bench_integer(model, images, rounds, compiled):
    """The network in integers alone (fast executor, at several widths) against float, PyTorch's
    built-in int8, eager and PT2E, and ONNX Runtime's.
    """
    stats, networks = collect(model, [images]), {"float": model}
    for w, a in WIDTHS:
        qmodel = quantize(model, stats, QuantConfig(w, a))
        networks[f"integer only W{w}A{a}"] = to_integer(qmodel, executor="fast")
    if compiled:
        networks["float, compiled"] = torch.compile(model)
    eager, pt2e = builtin.backends()
    if eager.available:
        networks["eager int8"] = builtin.eager_int8(model, [images])
    if compiled and pt2e.available:
        # its export takes no batch of one: two images, of which one is asked for
        networks["pt2e int8"] = builtin.pt2e_int8(model, [images], max(2, len(images)))
    try:
        from quantlab.rivals.onnxruntime import onnxruntime_float, onnxruntime_int8

        networks["ONNX Runtime float"] = onnxruntime_float(model, images.shape[1:])
        networks["ONNX Runtime int8"] = onnxruntime_int8(model, [images], exact=False)
    except (ImportError, UserError) as error:
        print(f"ONNX Runtime: {error}")
    frame = compare("integer", "float", networks, images, rounds)
    parts = operation_times(networks["integer only W8A8"], images, rounds)
    print(said_of_times(parts))
    for row in networks["integer only W8A8"].kernels().value_counts(["kernel", "why"]).items():
        print(f"integer only W8A8, {row[1]} operations by {row[0][0]}: {row[0][1]}")
    return frame


def operation_times(imodel, images, rounds):
    """Where an IntegerModel's time goes: a frame of layer, kind, seconds (of a batch, the mean of
    `rounds`), products (multiplications of the batch) and peak: the share, for layers, of what the
    processor's instruction for bytes reaches alone (NaN without one); the slowest first.
    """
    seconds = collections.Counter()
    for turn in range(rounds + 1):
        started = time.perf_counter()
        run = IntegerRun(imodel.network)
        codes = imodel.input_codes(images)
        spent = collections.Counter({ENTRY: time.perf_counter() - started})

        def timed(node, compute=run.run_node, spent=spent):
            started = time.perf_counter()
            value = compute(node)
            spent[node.name] += time.perf_counter() - started
            return value

        run.run_node = timed
        run.run(codes)
        seconds += spent if turn else collections.Counter()  # the first is a warm-up
    report = imodel.report(images.shape[1:]).set_index("layer")
    frame = pd.DataFrame({"seconds": pd.Series(seconds) / rounds}).rename_axis("layer")
    frame["kind"] = report.kind.reindex(frame.index).fillna("views")
    frame.loc[ENTRY, "kind"] = ENTRY
    frame["products"] = report.macs.reindex(frame.index).fillna(0) * len(images)
    frame["peak"] = frame.products / frame.seconds / (native.peak() or math.nan)
    frame["peak"] = frame.peak.where(frame.products > 0)
    return frame.sort_values("seconds", ascending=False).reset_index()


def said_of_times(parts):
    """`operation_times` in words: by kind, then the share of the peak in all layers together, in
    the best one and in those that take most of the time.
    """
    shares = parts.groupby("kind").seconds.sum().sort_values(ascending=False) / parts.seconds.sum()
    kinds = ", ".join(f"{kind} {share:.0%}" for kind, share in shares.items())
    said = f"integer only W8A8, where the time goes: {kinds}"
    layers = parts[parts.peak.notna()]
    if not len(layers):
        return said
    whole = (layers.peak * layers.seconds).sum() / layers.seconds.sum()
    slow = "; ".join(f"{r.layer} {r.seconds / parts.seconds.sum():.0%} of the time at {r.peak:.0%}"
                     for r in layers.head(5).itertuples())
    best = layers.loc[layers.peak.idxmax()]
    return (f"{said}\ninteger only W8A8, layers reach {whole:.0%} of the products that the "
            f"instruction for bytes reaches alone, {best.layer} {best.peak:.0%}; slowest: {slow}")


def bench_reconstruct(model, images, rounds, compiled):
    """An iteration of learning (QDrop, W4A4) against the plain float forward and backward pass of
    the same units, batch 32, summed over units.
    """
    images = images.repeat(-(-64 // len(images)), 1, 1, 1)
    stats, settings = collect(model, [images]), ReconstructConfig()
    cost = iteration_cost(model, stats, images, QuantConfig(4, 4), settings, repeats=4 * rounds)
    ratios = {"plain": cost.plain / cost.plain, "learning": cost.learning / cost.plain}
    seconds = {"float units": cost.plain.sum(), "learning units": cost.learning.sum()}
    ratios = {"float units": ratios["plain"], "learning units": ratios["learning"]}
    return _costs("reconstruct", seconds, ratios, settings.batch_size)


def bench_tune(model, images, rounds, compiled):
    """An iteration of fine-tuning the whole network (W4A4, on augmented images, targets included)
    against its plain float forward and backward pass.
    """
    images = images.repeat(-(-64 // len(images)), 1, 1, 1)
    qmodel = quantize(model, collect(model, [images]), QuantConfig(4, 4))
    settings = TuneConfig(learn_weights=True, flip=True, crop=1, mixup=0.5)
    times = tuning_cost(model, qmodel, images, settings, repeats=2 * rounds)
    times = {"float network": times["plain"], "learning the network": times["learning"]}
    ratios = {what: pd.Series(t) / times["float network"] for what, t in times.items()}
    seconds = {what: statistics.median(t) for what, t in times.items()}
    return _costs("tune", seconds, ratios, settings.batch_size)


def _costs(section, seconds, ratios, batch):
    """Rows of what learning costs, against the first of `seconds`; ratios: of times, by name."""
    first, *_ = seconds
    return pd.DataFrame([{
        "section": section, "what": what, "against": first, "images_per_s": batch / seconds[what],
        "time_ratio": seconds[what] / seconds[first], "time_ratio_least": ratios[what].min(),
        "time_ratio_most": ratios[what].max(),
        "throughput_ratio": seconds[first] / seconds[what],
    } for what in seconds])


SECTIONS = {
    "collect": bench_collect, "fakequant": bench_fakequant, "int8": bench_int8,
    "integer": bench_integer, "reconstruct": bench_reconstruct,
    "tune": bench_tune,
}


def bench(sections=(), model=None, batch=None, rounds=5, compiled=None):
    """Run the named sections (none: all), print each one's ratios, add them to results/bench.csv
    and return them as a frame.

    model, batch: None: of "integer" all MODELS, one image and 64; elsewhere resnet50, 64 images.
    compiled: also with torch.compile; None: where a C++ compiler is there.
    """
    for name in sections:
        check_name("bench section", name, SECTIONS)
    has_compiler = any(shutil.which(name) for name in ("c++", "g++", "clang++", "cl"))
    compiled = has_compiler if compiled is None else compiled
    where = {"device": processor(), "torch": torch.__version__}
    frames = []
    for name in sections or SECTIONS:
        several = name == "integer"
        models = [model] if model else MODELS if several else MODELS[:1]
        batches = [batch] if batch else (1, 64) if several else (64,)
        for model_name, size in itertools.product(models, batches):
            torch.manual_seed(0)
            network, images = untrained(model_name), torch.randn(size, 3, SIZE, SIZE)
            print(f"{model_name}, batch {size}, {SIZE} x {SIZE}, {processor()}, torch "
                  f"{torch.__version__}; median of {rounds} rounds, [min, max]; "
                  f"{'eager and compiled' if compiled else 'eager'}")
            frame = SECTIONS[name](network, images, rounds, compiled)
            print("\n" + table(frame), flush=True)
            frame = frame.assign(model=model_name, batch=size, rounds=rounds, **where)
            _store(frame)
            frames.append(frame)
    return pd.concat(frames)


def untrained(name):
    """A network of MODELS in evaluation mode."""
    if name == "mobilenet_v2":
        import torchvision

        return torchvision.models.mobilenet_v2(num_classes=10).eval()
    return build(name).eval()


def processor():
    """The CPU in words, its thread count, and whether it multiplies int8 in one instruction (VNNI),
    which decides what integers are worth.
    """
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # new in torch 2.12
    named = [name for name in ("avx512_vnni", "avx_vnni", "amx_int8") if capabilities.get(name)]
    return f"{device_name(torch.device('cpu'))}, {' and '.join(named) or 'no VNNI'}"


def table(frame):
    """A section's frame in words, one line a network."""
    against = frame.against.iloc[0]
    lines = [f"{frame.section.iloc[0]:32}{'images/s':>10}  time against {against}      throughput"]
    for row in frame.itertuples():
        spread = f"[{row.time_ratio_least:.2f}, {row.time_ratio_most:.2f}]"
        time = f"{row.time_ratio:6.2f}x {spread:16}"
        speed = f"{row.throughput_ratio:8.2f}x"
        lines.append(f"  {row.what:30}{row.images_per_s:>10.1f}  {time} {speed}")
    return "\n".join(lines)


def _store(frame):
    """Replace the rows of these sections, model, batch and processor in results/bench.csv."""
    path = root() / "results" / "bench.csv"
    keys = ["section", "model", "batch", "device"]
    if path.exists():
        old = read_csv(path)
        fresh = frame[keys].drop_duplicates().assign(fresh=True)
        old = old.merge(fresh, on=keys, how="left")
        frame = pd.concat([old[old.fresh.isna()].drop(columns="fresh"), frame])
    with atomic_path(path) as temporary:
        frame.to_csv(temporary, index=False, float_format="%.4g")
