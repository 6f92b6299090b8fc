"""How fast: every claim of speed as a ratio, both sides measured in turns in one run.

    python -m quantlab bench [collect fakequant int8 integer reconstruct] [--model resnet50] [--batch 64]

Weights are random, images are noise: neither changes what is computed. All networks run on the CPU with torch's threads.
"""

import collections
import copy
import shutil
import statistics
import time

import pandas as pd
import torch
from tqdm.auto import tqdm

from quantlab.calibration import collect
from quantlab.config import QuantConfig
from quantlab.improving.reconstruct import ReconstructConfig, iteration_cost
from quantlab.integer.network import IntegerRun, to_integer
from quantlab.networks.architectures import build
from quantlab.ptq import quantize
from quantlab.rivals import pytorch as builtin
from quantlab.system.errors import UserError
from quantlab.system.files import atomic_path, root
from quantlab.system.machine import device_name

SIZE = 32  # pixels a side, as CIFAR-10


def take_turns(networks, images, rounds=5):
    """Seconds a call of each callable in `networks` (name -> callable on `images`): name -> [rounds].

    They take turns within every round, so that a machine that slows down slows all of them; one warm-up round is not counted.
    """
    times = {name: [] for name in networks}
    for turn in tqdm(range(rounds + 1), desc="rounds", leave=False):
        for name, network in networks.items():
            started = time.perf_counter()
            with torch.inference_mode():
                network(images)
            if turn:
                times[name].append(time.perf_counter() - started)
    return times


def compare(section, baseline, networks, images, rounds):
    """A frame, one row a network: images/s by the median, time and throughput against `baseline`, with the least and the largest round."""
    times, rows = take_turns(networks, images, rounds), []
    for name, seconds in times.items():
        ratios = [a / b for a, b in zip(seconds, times[baseline])]
        rows.append({
            "section": section, "what": name, "images_per_s": len(images) / statistics.median(seconds), "against": baseline,
            "time_ratio": statistics.median(ratios), "time_ratio_least": min(ratios), "time_ratio_most": max(ratios),
            "throughput_ratio": 1 / statistics.median(ratios),
        })
    return pd.DataFrame(rows)


def bench_collect(model, images, rounds, compiled):
    """A calibration pass (four batches, all edges, all values counted) against plain forward passes and torch.ao's HistogramObserver."""
    networks = {"float": model}
    if builtin.backends()[0].available:
        networks["torch.ao HistogramObserver"] = builtin.observed(model, images[:1])
    if compiled:
        networks["float, compiled"] = torch.compile(model)
    passes = {name: lambda batches, f=f: [f(x) for x in batches.split(len(images))] for name, f in networks.items()}
    passes["collect"] = lambda batches: collect(model, batches.split(len(images)))
    return compare("collect", "float", passes, images.repeat(4, 1, 1, 1), rounds)


def bench_fakequant(model, images, rounds, compiled):
    """Evaluation of the fake-quantized network against the unfolded float network and torch's FX fake-quant."""
    ours = quantize(model, collect(model, [images]), QuantConfig())
    networks = {"float": model, "fake-quant": ours}
    if builtin.backends()[0].available:
        networks["torch.ao FX fake-quant"] = builtin.fake_quantized(model, images)
    if compiled:
        networks |= {"float, compiled": torch.compile(model), "fake-quant, compiled": torch.compile(copy.deepcopy(ours))}
    return compare("fakequant", "float", networks, images, rounds)


def bench_int8(model, images, rounds, compiled):
    """PyTorch's built-in int8 kernels against float."""
    networks = {"float": model}
    if compiled:
        networks["float, compiled"] = torch.compile(model)
    for backend, make in zip(builtin.backends(), (builtin.eager_int8, lambda m, batches: builtin.pt2e_int8(m, batches, len(images)))):
        if backend.available and (compiled or backend.name == "eager"):
            networks[f"{backend.name} int8"] = make(model, [images])
        else:
            print(f"{backend.name} int8: {backend.note if not backend.available else 'needs the compiler; skipped'}")
    return compare("int8", "float", networks, images, rounds)


def bench_integer(model, images, rounds, compiled):
    """The network in integers alone (8 bits, fast executor) against float, PyTorch's built-in int8 and ONNX Runtime's."""
    ours = quantize(model, collect(model, [images]), QuantConfig())
    networks = {"float": model, "integer only": to_integer(ours, executor="fast")}
    if compiled:
        networks["float, compiled"] = torch.compile(model)
    if builtin.backends()[0].available:
        networks["eager int8"] = builtin.eager_int8(model, [images])
    try:
        from quantlab.rivals.onnxruntime import onnxruntime_float, onnxruntime_int8

        networks |= {"ONNX Runtime float": onnxruntime_float(model), "ONNX Runtime int8": onnxruntime_int8(model, [images], exact=False)}
    except (ImportError, UserError) as error:
        print(f"ONNX Runtime: {error}")
    frame = compare("integer", "float", networks, images, rounds)
    shares = time_by_operation(networks["integer only"], images, rounds)
    print("integer only, where the time goes: " + ", ".join(f"{kind} {share:.0%}" for kind, share in shares.items()))
    return frame


def time_by_operation(imodel, images, rounds):
    """Share of an IntegerModel's time that each kind of operation takes, the largest first; a dict that adds up to 1."""
    seconds = collections.Counter()
    for turn in range(rounds + 1):
        started = time.perf_counter()
        run, codes = IntegerRun(imodel.network), imodel.input_codes(images)
        spent = collections.Counter({"images to codes": time.perf_counter() - started})

        def timed(node, compute=run.run_node, spent=spent):
            started = time.perf_counter()
            value = compute(node)
            kind = imodel.network.get_submodule(node.target).kind if node.op == "call_module" else "views"
            spent[kind] += time.perf_counter() - started
            return value

        run.run_node = timed
        run.run(codes)
        seconds += spent if turn else collections.Counter()  # the first is a warm-up
    return {kind: value / seconds.total() for kind, value in seconds.most_common()}


def bench_reconstruct(model, images, rounds, compiled):
    """An iteration of learning (QDrop, W4A4) against the plain float forward and backward pass of the same units, batch 32, summed over units."""
    images = images.repeat(-(-64 // len(images)), 1, 1, 1)
    cost = iteration_cost(model, collect(model, [images]), images, QuantConfig(4, 4), ReconstructConfig(), repeats=4 * rounds)
    ratios = cost.learning / cost.plain
    return pd.DataFrame([{
        "section": "reconstruct", "what": what, "images_per_s": ReconstructConfig().batch_size / cost[column].sum(), "against": "float units",
        "time_ratio": cost[column].sum() / cost.plain.sum(), "time_ratio_least": least, "time_ratio_most": most,
        "throughput_ratio": cost.plain.sum() / cost[column].sum(),
    } for what, column, least, most in (("float units", "plain", 1.0, 1.0), ("learning units", "learning", ratios.min(), ratios.max()))])


SECTIONS = {
    "collect": bench_collect, "fakequant": bench_fakequant, "int8": bench_int8, "integer": bench_integer, "reconstruct": bench_reconstruct,
}


def bench(sections=(), model="resnet50", batch=64, rounds=5, compiled=None):
    """Run the named sections (none: all), print each one's ratios and add them to results/bench.csv; returns the frame.

    compiled: also with torch.compile; None: where a C++ compiler is there.
    """
    unknown = [name for name in sections if name not in SECTIONS]
    if unknown:
        raise UserError(f"bench section {unknown[0]!r} is unknown; use: {', '.join(SECTIONS)}")
    has_compiler = any(shutil.which(name) for name in ("c++", "g++", "clang++", "cl"))
    compiled = has_compiler if compiled is None else compiled
    torch.manual_seed(0)
    network, images = build(model).eval(), torch.randn(batch, 3, SIZE, SIZE)
    where = f"{model}, batch {batch}, {SIZE} x {SIZE}, {processor()}, torch {torch.__version__}"
    print(f"{where}; median of {rounds} rounds, [least, most]; {'eager and compiled' if compiled else 'eager'}")
    frames = []
    for name in sections or SECTIONS:
        frame = SECTIONS[name](network, images, rounds, compiled)
        print("\n" + table(frame), flush=True)
        frames.append(frame.assign(model=model, batch=batch, rounds=rounds, device=processor(), torch=torch.__version__))
    frame = pd.concat(frames)
    _store(frame)
    return frame


def processor():
    """The CPU in words, its thread count, and whether it multiplies int8 in one instruction (VNNI), which decides what integers are worth."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    named = [name for name in ("avx512_vnni", "avx_vnni", "amx_int8") if capabilities.get(name)]
    return f"{device_name(torch.device('cpu'))}, {' and '.join(named) or 'no VNNI'}"


def table(frame):
    """A section's frame in words, one line a network."""
    lines = [f"{frame.section.iloc[0]:32}{'images/s':>10}  time against {frame.against.iloc[0]}      throughput"]
    for row in frame.itertuples():
        spread = f"[{row.time_ratio_least:.2f}, {row.time_ratio_most:.2f}]"
        lines.append(f"  {row.what:30}{row.images_per_s:>10.1f}  {row.time_ratio:6.2f}x {spread:16} {row.throughput_ratio:8.2f}x")
    return "\n".join(lines)


def _store(frame):
    """Replace the rows of these sections, model, batch and processor in results/bench.csv."""
    path = root() / "results" / "bench.csv"
    keys = ["section", "model", "batch", "device"]
    if path.exists():
        old = pd.read_csv(path)
        fresh = frame[keys].drop_duplicates().assign(fresh=True)
        old = old.merge(fresh, on=keys, how="left")
        frame = pd.concat([old[old.fresh.isna()].drop(columns="fresh"), frame])
    with atomic_path(path) as temporary:
        frame.to_csv(temporary, index=False, float_format="%.4g")
