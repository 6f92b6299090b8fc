# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 02 · The built-in way: PyTorch's own int8
#
# **Question.** What does PyTorch's own int8 do, step by step, what does it cost, and what does it gain?
#
# **Seen.** [What a full run showed](../results/pages/02_builtin_int8-resnet20-cifar10-jpeg.md), without running it.
#
# **Cost.** Two minutes on two CPU cores, most of it compiling PT2E. Everything runs on the CPU, where
# these int8 kernels exist.

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
import copy
import warnings

import pandas as pd
import quantlab as ql
import torch
from quantlab import plots
from quantlab.graph import find_kinds, normalize, trace
from quantlab.rivals import pytorch as builtin
from quantlab.system.timing import latency
from quantlab.workbook.study import Study, brief, show

# torch.ao says on every call that torchao will replace it; this notebook says it once
warnings.filterwarnings("ignore", module="torch.ao")
warnings.filterwarnings("ignore", category=DeprecationWarning)

# %% tags=["parameters"]
data = "auto"  # auto, cifar10, digits, images, or the path of a folder or archive
model = "resnet20"  # resnet20 or resnet50
checkpoint = "auto"  # auto, or the path of a .safetensors file
seed = 0
preset = "auto"  # smoke, full, or auto: smoke on the digits
n_calibration = 0  # 0: 256 in a smoke run, 1,024 in a full one
solutions = False  # True: the exercises' solutions are run

# %% [markdown]
# ## 1. Which back ends there are
# Two generations: the *eager* tool that the original experiment used in 2021, deprecated since, and its
# supported successor *PT2E*. Either may be missing on a machine; then its cells are skipped and say so.

# %%
ready = {backend.name: backend.available for backend in builtin.backends()}
for backend in builtin.backends():
    state = "ready" if backend.available else "MISSING"
    print(f"{backend.name:6} {state}: {backend.note}")

# %%
study = Study(
    data, model, checkpoint, preset,
    n_calibration=n_calibration, seed=seed, notebook="02_builtin_int8",
)
images = study.images
network = study.network.cpu().to(memory_format=torch.channels_last)
calibration = study.calibration()

# %% [markdown]
# ## 2. Fuse
# The original's steps one by one, on the network as it was trained; one layer, the first, is printed after
# each. A BatchNorm behind a convolution is a per-channel scale and shift, which the convolution can absorb;
# a ReLU only cuts off what the convolution writes. *Fusing* turns three modules into one, so that values
# are rounded once instead of three times.
#
# `fuse_modules` wants names, and a ReLU module that a block calls twice must not vanish with its first
# call. So the network is traced first (`torch.fx`), and every call gets a module of its own. Then chains
# whose inner values nobody else reads:

# %%
graph = trace(network)
normalize(graph)  # one module a call
kinds = find_kinds(graph)
groups = []
for node in (n for n in kinds if kinds[n] == "compute"):
    chain = [node]
    for kind in ("batchnorm", "clamp"):
        readers = list(chain[-1].users)
        if len(readers) == 1 and kinds[readers[0]] == kind:
            chain.append(readers[0])
    if len(chain) > 1:
        groups.append([n.target for n in chain])
print(f"{len(groups)} chains:", ", ".join(" + ".join(g) for g in groups[:3]), "…")
print("conv1:", graph.conv1)


# %%
def leaves(module):
    kinds = [type(m).__name__ for m in module.modules() if not list(m.children())]
    return pd.Series(kinds).value_counts()

if ready["eager"]:
    from torch.ao.quantization import fuse_modules

    fused = fuse_modules(graph, groups)
    counts = pd.DataFrame({"before": leaves(graph), "after fusing": leaves(fused)})
    show(counts.fillna(0).astype(int))
    print("conv1:", fused.conv1)

# %% [markdown]
# Every BatchNorm is gone, and so is every ReLU behind one; an `Identity` stands in their place, and a
# `ConvReLU2d` holds what were three modules. The add and the ReLU behind it stay as they are. Fusing must
# not change what the network computes:

# %%
if ready["eager"]:
    sample = next(iter(calibration))[:32]
    with torch.no_grad():
        difference = (fused(sample) - network(sample)).abs().max().item()
        spread = network(sample).std().item()
    print(
        f"largest difference of a logit: {difference:.1e}, of a spread of {spread:.1f}"
    )
    assert difference < 1e-3 * spread

# %% [markdown]
# ## 3. Stubs
# What is quantized must be a module, so that an observer can hang on it: every `+` of two values becomes a
# `FloatFunctional`.

# %%
if ready["eager"]:
    from torch.ao.nn.quantized import FloatFunctional

    kinds = find_kinds(fused)
    for i, node in enumerate([n for n in kinds if kinds[n] == "add"]):
        fused.add_submodule(f"add_{i}", FloatFunctional())
        with fused.graph.inserting_before(node):
            functional = fused.graph.get_attr(f"add_{i}")
            total = fused.graph.call_method("add", (functional, *node.args))
        node.replace_all_uses_with(total)
        fused.graph.erase_node(node)
    fused.recompile()
    print(fused.add_0)

# %% [markdown]
# `QuantStub` marks where floats become codes, `DeQuantStub` where codes become floats again;
# `QuantWrapper` puts one before and one behind the network. So far they do nothing.

# %%
if ready["eager"]:
    from torch.ao.quantization import QuantWrapper

    wrapped = QuantWrapper(fused).eval()
    print(wrapped.quant, wrapped.dequant)
    print("conv1:", wrapped.module.conv1)
    with torch.no_grad():
        before = wrapped(sample)

# %% [markdown]
# ## 4. A qconfig
# It names two observers, one for activations and one for weights: how ranges are found, and which codes
# there are. Look at the codes of the activations: on x86 they end at 127, that is **7 bits**.

# %%
if ready["eager"]:
    from torch.ao.quantization import get_default_qconfig

    engine = builtin.choose_engine()
    wrapped.qconfig = get_default_qconfig(engine)
    for part in ("activation", "weight"):
        observer = getattr(wrapped.qconfig, part)()
        codes = f"codes {observer.quant_min}..{observer.quant_max}"
        print(f"{part}: {type(observer).__name__}, {observer.qscheme}, {codes}")

# %% [markdown]
# ## 5. Prepare, and feed data
# `prepare` hangs an observer behind every module that will be quantized. Then calibration images pass.

# %%
if ready["eager"]:
    from torch.ao.quantization import prepare

    prepare(wrapped, inplace=True)
    print("conv1:", wrapped.module.conv1)

# %%
if ready["eager"]:
    with torch.no_grad():
        for batch in calibration:
            wrapped(batch)
    print("conv1's observer:", wrapped.module.conv1.activation_post_process)

# %% [markdown]
# The observer has seen a range. **The model is still float**: not a single value has been rounded.

# %%
if ready["eager"]:
    with torch.no_grad():
        # a copy: the observers would count these images twice
        after = copy.deepcopy(wrapped)(sample)
    assert torch.equal(after, before), "observers only look"
    print("conv1's weight:", wrapped.module.conv1[0].weight.dtype)

# %% [markdown]
# ## 6. Convert
# Now every module is replaced by one that computes in int8, with the scale and zero-point that its
# observer found.

# %%
if ready["eager"]:
    from torch.ao.quantization import convert

    # the kernels that the converted modules are packed for
    torch.backends.quantized.engine = engine
    converted = convert(wrapped)
    print("conv1:", converted.module.conv1)

# %% [markdown]
# One layer's parameters. Its weights are int8 with a scale per output channel and zero-point 0; its
# output is unsigned with one scale.

# %%
if ready["eager"]:
    weight = converted.module.conv1.weight()
    codes = weight.int_repr()
    print(
        f"weight: {tuple(weight.shape)}, {weight.dtype}, codes {codes.min()} to "
        f"{codes.max()}"
    )
    if weight.qscheme() == torch.per_channel_affine:
        scales = weight.q_per_channel_scales()
    else:  # engines for ARM have one scale for the whole tensor
        scales = torch.full((len(weight),), weight.q_scale())
    print("first scales:", [round(s, 5) for s in scales[:4].tolist()])

# %% [markdown]
# The same codes from a formula, `code = round(weight * (1 / scale))`: the tool does nothing that we could
# not do by hand, which is what [03](03_quantize_by_hand.ipynb) does.

# %%
if ready["eager"]:
    folded = wrapped.module.conv1[0].weight.detach()
    steps = folded * (1 / scales.float()).view(-1, 1, 1, 1)
    by_hand = torch.round(steps).clamp(-128, 127).int()
    agree = (by_hand == codes).double().mean()
    print(f"{agree:.2%} of {by_hand.numel()} codes agree")
    assert torch.equal(by_hand, codes.int())

# %% [markdown]
# `builtin.eager_int8` is these steps in one call: the same scales, zero-points and codes in every layer,
# and the same logits. From here on it stands for them.

# %%
networks = {"float": network}
if ready["eager"]:
    networks["eager int8"] = builtin.eager_int8(network, calibration)
    ours, theirs = converted.state_dict(), networks["eager int8"].state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, theirs[name]), name
    with torch.no_grad():
        assert torch.equal(converted(sample), networks["eager int8"](sample))
    print(f"{len(ours)} entries of the state are equal, and {len(sample)} logits")

# %% [markdown]
# ## 7. The successor: PT2E
# `torch.export` turns the network into a graph, a quantizer annotates it, and the inductor compiler picks
# int8 kernels: prepare, feed, convert once more, on a graph instead of modules.

# %%
if ready["pt2e"]:
    networks["PT2E int8"] = builtin.pt2e_int8(network, calibration)
else:
    print(next(b.note for b in builtin.backends() if b.name == "pt2e"))

# %% [markdown]
# ## 8. Accuracy, size, speed

# %%
evaluations = {
    name: study.evaluate(n, batch_size=64, on="cpu") for name, n in networks.items()
}
baseline = evaluations["float"]
sizes = {name: builtin.bytes_on_disk(n) for name, n in networks.items()}
sizes["float"] = ql.weight_bytes(network)  # its values alone, as everywhere
act_bits = builtin.eager_act_bits() if ready["eager"] else 8
columns = {"eager int8": {"weight_bits": 8, "act_bits": act_bits}}
columns["PT2E int8"] = {"weight_bits": 8, "act_bits": 8}
for name, own in columns.items():
    own["n_calibration"] = study.n_calibration

# %%
rows = []
for name, result in evaluations.items():
    own = {"baseline": baseline, "bytes": sizes[name], **columns.get(name, {})}
    rows.append(study.row(result, name, **own))
show(brief(study.record_rows(rows)))

# %% [markdown]
# The eager tool's default keeps activations to 7 bits on x86 engines, because without VNNI a processor
# adds two neighbouring products in 16 bits, and that sum may saturate. The original's table calls this row
# 8 bits; the column `act_bits` says what it is here.

# %%
table = pd.DataFrame([
    {
        "method": name, "top1": e.top1, "bytes": sizes[name],
        "images_per_s": e.images_per_s,
        "points lost": ql.paired_drop(baseline.correct, e.correct)[0],
    }
    for name, e in evaluations.items()
])
threads = f"{torch.get_num_threads()} threads, batches of 64"
caption = study.caption(
    baseline.n, f"{study.n_calibration:,} calibration images, {threads}"
)
study.save(plots.method_bars(table, caption), "02_builtin")

# %% [markdown]
# Latency in turn, so that a machine that slows down slows all of them: read the ratios, not the
# milliseconds. (PT2E is compiled for batches of 64.)

# %%
lines = []
for batch in (1, 64):
    sample = next(images.test.batches(batch))[0]
    runnable = {k: n for k, n in networks.items() if batch > 1 or k != "PT2E int8"}
    times = latency(runnable, sample, repeats=5 if study.smoke else 15)
    for method, seconds in times.items():
        faster = times["float"] / seconds
        line = {"batch": batch, "method": method, "ms": 1e3 * seconds}
        lines.append({**line, "times faster than float": faster})
show(pd.DataFrame(lines).round(2))

# %% [markdown]
# ## What we learned

# %%
for name, e in list(evaluations.items())[1:]:
    drop, low, high = ql.paired_drop(baseline.correct, e.correct)
    ratio = sizes["float"] / sizes[name]
    print(
        f"- {name}: {e.top1:.2f} %, {drop:+.2f} points lost [{low:+.2f}, {high:+.2f}], "
        f"{ratio:.1f} times smaller (its file)."
    )

# %% [markdown]
# ## Exercises
# Write each function in place of its `...`, run its cell, then the one with the check, which says what is
# wrong. The solution is folded between the two; with `solutions = True` at the top all of them run.
#
# **1. What `int_repr` means.** A `quint8` tensor holds bytes; `int_repr()` shows them, `q_scale()` and
# `q_zero_point()` say which real numbers they stand for. Turn bytes into those numbers, as `dequantize()`
# does. Mind the type that they arrive in.

# %%
from fractions import Fraction

from quantlab.workbook.exercises import check

# tensors of codes are deprecated, too
warnings.filterwarnings("ignore", message=".*quantized tensor creation functions.*")


# %% tags=["exercise"]
def real_values(codes, scale, zero_point):
    """float32, the shape of codes (uint8); scale: a float, zero_point: an int."""
    ...


# %% tags=["solution"] jupyter={"source_hidden": true}
if solutions:
    def real_values(codes, scale, zero_point):
        return scale * (codes.int() - zero_point)  # a byte has no -1

# %% tags=["check"]
q = ql.QParams(torch.tensor(0.125), torch.tensor(80, dtype=torch.int32), 0, 255)
above = torch.tensor([80, 88, 255], dtype=torch.uint8)
below = torch.tensor([[79], [0]], dtype=torch.uint8)
if hasattr(torch, "quantize_per_tensor"):  # until torch removes it
    for codes in (above, below):
        values = ql.dequantize(codes.int(), q)
        stored = torch.quantize_per_tensor(values, 0.125, 80, torch.quint8)
        assert stored.int_repr().equal(codes) and stored.dequantize().equal(values)

expected = [ql.dequantize(codes.int(), q) for codes in (above, below)]
why = "Code 80 is zero, 88 is 8 steps of 0.125 above it: 1.0."
wraps = "Codes below the zero-point: a uint8 wraps around, 79 - 80 is 255 there."
check(real_values, ((above, 0.125, 80), expected[0], why),
      ((below, 0.125, 80), expected[1], wraps))


# %% [markdown]
# **2. Why 7 bits?** Without VNNI, x86 multiplies bytes by `vpmaddubsw`: unsigned codes of activations times
# signed codes of weights, neighbours added in twos, each sum kept in 16 bits. What does not fit *saturates*:
# it becomes the largest or the smallest int16. Write the instruction: from $2n$ codes each to $n$ sums.

# %% tags=["exercise"]
def pair_sums(x_q, w_q):
    """int [n]: x0 w0 + x1 w1, x2 w2 + x3 w3, ...; x_q: uint8 [2n], w_q: int8 [2n]."""
    ...


# %% tags=["solution"] jupyter={"source_hidden": true}
if solutions:
    def pair_sums(x_q, w_q):
        products = x_q.int() * w_q.int()
        return products.view(-1, 2).sum(1).clamp(-(2**15), 2**15 - 1)


# %% tags=["check"]
def pairs(x, w):
    """A case, in Python's integers, which have no width."""
    terms = [a * b for a, b in zip(x, w)]
    twos = map(sum, zip(terms[::2], terms[1::2]))
    sums = [max(-32768, min(two, 32767)) for two in twos]
    return (torch.tensor(x, dtype=torch.uint8), torch.tensor(w, dtype=torch.int8)), sums


# %% tags=["check"]
seven = ql.choose_qparams(0, 1, 7)  # codes 0..127, what the qconfig above chooses
x = ql.quantize_tensor(torch.linspace(0, 1, 64), seven).tolist()
safe = "With 7 bits, 127 * -128 * 2 = -32,512 fits: nothing may saturate."
check(
    pair_sums,
    (*pairs([1, 2, 3, 4], [1, 1, 1, -1]), "Neighbours in twos: 1 + 2, and 3 - 4."),
    (*pairs([255] * 2, [127] * 2), "64,770 needs 17 bits: saturated, it is 32,767."),
    (*pairs([255] * 2, [-128] * 2), "-65,280 saturates at the other end, -32,768."),
    (*pairs(x + [127] * 2, [-128] * 66), safe),
)


# %% [markdown]
# **3. One layer, from its codes.** A converted convolution reads codes and writes codes. Everything between
# is in `x.int_repr()`, `x.q_scale()`, `x.q_zero_point()`, `layer.weight().int_repr()`,
# `weight_scales(layer.weight())`, `layer.bias()`, `layer.stride`, `layer.padding`, `layer.scale` and
# `layer.zero_point`. Compute the output's codes from these, in float64 (no sum is too large for it).
# Padding adds *zeros*; the bias joins the sum at the scale of the products and keeps its fraction, as in
# x86's kernels (an integer machine rounds it, [09](09_integer_only.ipynb)); a `quint8` ends at 0 and 255.

# %% tags=["exercise"]
def weight_scales(weight):
    """float64 [C] of a quantized weight: one a channel, on ARM the same for all."""
    if weight.qscheme() == torch.per_channel_affine:
        return weight.q_per_channel_scales()
    return torch.full((len(weight),), weight.q_scale(), dtype=torch.float64)

def output_codes(x, layer):
    """int [B, C, H, W]: what layer(x).int_repr() gives; x: quint8 [B, C_in, H, W]."""
    ...


# %% tags=["solution"] jupyter={"source_hidden": true}
if solutions:
    def output_codes(x, layer):
        scale = x.q_scale() * weight_scales(layer.weight())  # of the products, [C]
        sums = torch.nn.functional.conv2d(
            x.int_repr().double() - x.q_zero_point(),
            layer.weight().int_repr().double(),
            layer.bias() / scale, layer.stride, layer.padding)
        steps = torch.round(sums * (scale / layer.scale).view(-1, 1, 1))
        return (steps + layer.zero_point).clamp(0, 255).int()


# %% tags=["check"]
def tiny_layer():
    """(images as codes, a convolution with its BatchNorm and ReLU in int8)."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 2, 6, 6, generator=generator)
    conv, bn = torch.nn.Conv2d(2, 4, 3, padding=1), torch.nn.BatchNorm2d(4)
    with torch.no_grad():
        for parameter in (conv.weight, conv.bias, bn.running_mean):
            parameter.normal_(generator=generator)
    net = torch.nn.Sequential(conv, bn, torch.nn.ReLU()).eval()
    quantized = builtin.eager_int8(net, [images])
    return quantized.quant(images), quantized.module.get_submodule("0")


# %% tags=["check"]
def exact_code(x, layer):
    """The code in row 2, column 2 of image 0, channel 0, in exact fractions."""
    z, weight = x.q_zero_point(), layer.weight()
    patch = x.int_repr()[0, :, 1:4, 1:4].flatten().tolist()
    taps = weight.int_repr()[0].flatten().tolist()
    scale = Fraction(x.q_scale()) * Fraction(weight_scales(weight)[0].item())
    total = sum((code - z) * tap for code, tap in zip(patch, taps))
    total += Fraction(layer.bias()[0].item()) / scale
    code = round(total * scale / Fraction(layer.scale)) + layer.zero_point
    return max(0, min(code, 255))


# %% tags=["check"]
def as_the_kernel(x, layer):
    """What is wrong with codes, beside the kernel's and the one in exact fractions."""
    codes, exact = layer(x).int_repr().int(), exact_code(x, layer)

    def fault(found):
        off = (found - codes).abs()
        if found.shape == codes.shape and off.max() <= 1 and (off > 0).sum() <= 2:
            one = found[0, 0, 2, 2]  # float32, as kernels have it, may miss a tie
            return "" if one == exact else f"{one} where fractions give {exact}"
        return f"{(off > 0).sum()} of {codes.numel()} codes are not the kernel's"

    return fault


# %% tags=["check"]
if ready["eager"]:
    x, layer = tiny_layer()
    nothing = torch.quantize_per_tensor(
        torch.zeros(x.shape), x.q_scale(), x.q_zero_point(), torch.quint8)
    finer = copy.deepcopy(layer)
    finer.scale = layer.scale / 4
    alone = "An input of zeros leaves the bias, divided by the products' scale."
    middle = "Subtract the zero-point before the convolution: padding adds zeros."
    ends = "A finer output scale: what lies beyond ends at code 255."
    cases = (nothing, layer, alone), (x, layer, middle), (x, finer, ends)
    with torch.no_grad():
        check(output_codes, *(((x, la), as_the_kernel(x, la), w) for x, la, w in cases))

# %% [markdown]
# Next: [03_quantize_by_hand](03_quantize_by_hand.ipynb), the same with our own arithmetic, and then fewer
# bits than any of these offers.
