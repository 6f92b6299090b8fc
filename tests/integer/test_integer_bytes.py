"""Kernels of bytes: equal to the reference at every width, by every instruction, real or emulated,
where all codes and weights are at their ends too; and clean under sanitizers.
"""

import functools
import itertools
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import CHECKOUT, fuzz
from hypothesis import given
from hypothesis import strategies as st
from test_integer_native import convolutions, random_codes, random_multipliers, run_in_threads
from torch import nn

import quantlab as ql
from quantlab.integer import operations as ops
from quantlab.integer.fast import native
from quantlab.integer.fixedpoint import ROUNDINGS, Requantization
from quantlab.system import compiled

WIDTHS = st.integers(2, 8)
ENDS = ("random", "codes", "weights", "both", "worst")
# what the compiler may use -> bits in which bytes are then summed
BUILDS = {
    "this machine's": ((), None),
    "without AVX-512": (("-mno-avx512f", "-mno-avxvnni"), 16),
    "AVX-512 without VNNI": (("-mno-avx512vnni", "-mno-avxvnni"), 16),
    "vpdpbusd emulated": (("-DEMULATE_VNNI",), 32),
    "vpmaddubsw emulated": (("-DEMULATE_AVX2",), 16),
    "no vectors": (("-march=x86-64", "-mtune=generic"), 0),
}


@pytest.fixture(scope="module", params=BUILDS)
def build(request, tmp_path_factory):
    """The kernels built so; bits of the sums of bytes."""
    flags, sums = BUILDS[request.param]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(compiled, "FLAGS", (*compiled.FLAGS, *flags))
        native.library.cache_clear()
        built = _built(flags)
        if sums is not None and built.byte_sums() != sums:
            pytest.skip(f"this machine has no {request.param}")
        yield built.byte_sums()
    native.library.cache_clear()


def _built(flags):
    try:
        compiled._output([*compiled._compiler(), *flags, "-fsyntax-only", str(native.SOURCE)])
    except (OSError, IndexError, subprocess.CalledProcessError):
        pytest.skip(f"no C compiler that takes {' '.join(flags)}")
    return native.library()


def at_ends(generator, shape, low, high):
    return torch.where(torch.rand(shape, generator=generator) < 0.5, low, high).int()


def drawn(case, weight_bits, act_bits, ends):
    """(weight, codes, (their least, their most), zero point) as a network of such widths has them.

    "worst": codes are the last where the first output's weights are positive, else the first.
    """
    generator = torch.Generator().manual_seed(case["seed"])
    most = 2**act_bits - 1 - (128 if act_bits == 8 else 0)
    codes = (most - 2**act_bits + 1, most)
    bound = 2 ** (weight_bits - 1) - 1 + (case["seed"] % 7 == 0)  # 8 bits: 128 fits in no byte
    size = (case["outputs"], case["channels"] // case["groups"], *case["kernel"])
    draw = at_ends if ends in ("weights", "both", "worst") else random_codes
    weight = draw(generator, size, -bound, bound)
    size = (case["images"], case["channels"], *case["size"])
    draw = random_codes if ends in ("random", "weights") else at_ends
    x = draw(generator, size, *codes)
    if ends == "worst":
        first = (weight[0] > 0).repeat(case["groups"], 1, 1)[None]
        tile = [-(-n // k) for n, k in zip(case["size"], case["kernel"])]
        first = first.repeat(1, 1, *tile)[..., : case["size"][0], : case["size"][1]]
        x = torch.where(first, codes[1], codes[0]).int().expand(size).contiguous()
    zero_point = (codes[0], codes[1], sum(codes) // 2)[case["seed"] % 3]
    return weight, x, codes, zero_point


def prepared(case, weight_bits, act_bits, ends, limits=None):
    """What a layer is made of, its codes, and the reference's accumulators.

    limits: (least, most) of the weights, all of which are one or the other; None: as drawn.
    """
    generator = torch.Generator().manual_seed(case["seed"])
    weight, x, codes, zero_point = drawn(case, weight_bits, act_bits, ends)
    if limits is not None:
        weight = at_ends(generator, weight.shape, *limits)
    bias = random_codes(generator, (len(weight),), -(2**16), 2**16)
    options = {"stride": case["stride"], "groups": case["groups"]}
    padded = F.pad(x - zero_point, case["padding"])
    acc = F.conv2d(padded, ops.dilate(weight, case["dilation"]), bias, **options)
    options |= {"dilation": case["dilation"], "padding": case["padding"], "codes": codes}
    return (weight, bias, zero_point), options, x, acc


def check(case, layer, options, x, expected, rounding):
    """The Layer, after its codes were compared."""
    requantization = None
    if rounding is not None:
        generator = torch.Generator().manual_seed(case["seed"])
        q, shift = random_multipliers(generator, len(layer[0]), -14.0, 0.5)
        requantization = Requantization(q, shift, -5, -128, 120, rounding)
        q, shift = q.view(-1, 1, 1), shift.view(-1, 1, 1)
        expected = Requantization(q, shift, -5, -128, 120, rounding)(expected)
    layer = native.Layer(*layer, requantization, **options)
    bytes_in = x.to(torch.int8).permute(0, 2, 3, 1).contiguous()
    result = run_in_threads(case["threads"], lambda: layer(bytes_in).permute(0, 3, 1, 2))
    assert torch.equal(result.int(), expected), (layer.name, layer.reason)
    return layer


@given(convolutions(), WIDTHS, WIDTHS, st.sampled_from(ENDS),
       st.sampled_from([*ROUNDINGS, None]))
@fuzz(40)
def test_any_convolution_at_any_width(build, case, weight_bits, act_bits, ends, rounding):
    layer = check(case, *prepared(case, weight_bits, act_bits, ends), rounding)
    assert build == 0 or build == 16 or layer.name != "conv_words" or layer.weight.max() == 128


# 3x3 windows over 36 channels: long sums
LONG = {"images": 1, "channels": 36, "outputs": 35, "groups": 1, "kernel": (3, 3),
        "dilation": (1, 1), "padding": (1, 1, 1, 1), "stride": (1, 1), "size": (2, 4),
        "threads": 2, "seed": 5}


@functools.cache
def at_worst(outputs, groups):
    """(case, `prepared`) of every pair of widths; the same for every build."""
    case = LONG | {"outputs": outputs, "groups": groups}
    pairs = itertools.product(range(2, 9), repeat=2)
    return [(case, prepared(case, *pair, "worst")) for pair in pairs]


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_every_pair_of_widths_at_its_worst(build, rounding):
    for case, parts in at_worst(35, 1) + at_worst(36, 36):
        check(case, *parts, rounding)


def test_codes_of_weights_less_any_zero_point(build):
    """All 2^b levels: half of them below zero, half above, all above, all below."""
    depthwise = LONG | {"outputs": 36, "groups": 36}
    for bits, act_bits in ((2, 8), (4, 4), (7, 8), (8, 8)):
        for below in (2 ** (bits - 1), 2 ** (bits - 1) - 1, 0, 2**bits - 1):
            limits = -below, 2**bits - 1 - below
            layer = check(LONG, *prepared(LONG, bits, act_bits, "both", limits), "single")
            assert (limits[0] >= -128 and limits[1] <= 127) or layer.name == "conv_words"
            check(depthwise, *prepared(depthwise, bits, act_bits, "both", limits), None)


def test_codes_that_are_read_in_place(build):
    """1x1, stride 1, no padding, codes from 0: nothing is copied, nothing read behind the end."""
    case = LONG | {"images": 3, "outputs": 70, "kernel": (1, 1), "padding": (0, 0, 0, 0),
                   "size": (5, 7)}
    for act_bits in (4, 8):
        layer = check(case, *prepared(case, 4, act_bits, "random"), "single")
        assert layer.shape.in_place == (layer.name == "conv_bytes" and act_bits == 4)


def test_16_bits_hold_what_is_claimed_of_them():
    """Against the definition: every partial sum of pairs, for the codes that are worst for it."""
    generator = torch.Generator().manual_seed(0)
    for bits in range(2, 9):
        bound = 2 ** (bits - 1) - 1
        for most in (1, 3, 15, 63, 255):
            fours = random_codes(generator, (5, 40), -bound, bound)
            run = native.longest_run(fours, most)
            worst = 0
            for start in range(0, 40, 4 * max(run, 1)):
                pairs = fours[:, start : start + 4 * max(run, 1)].view(5, -1, 2, 2)
                for sign in (1, -1):
                    worst = max(worst, int((sign * pairs).clamp(min=0).sum((1, 3)).max()) * most)
            assert run == 0 or worst <= 2**15 - 1
            assert run > 0 or worst > 2**15 - 1
    ones = torch.full((1, 400), 7, dtype=torch.int32)
    assert native.longest_run(ones, 15) == 100 and native.longest_run(18 * ones, 255) == 0
    assert not native.fits_16_bits(-ones, 255, 10) and native.fits_16_bits(-ones, 255, 9)


def test_the_peak_counts_as_many_products_as_it_says(build):
    if not build:
        assert native.peak() is None
        return
    lanes = native.library().byte_lanes()
    steps, rest = divmod(native.library().peak_products(), 12 * 4 * lanes)
    assert rest == 0
    x, y = torch.ones(2 * 4 * lanes, dtype=torch.int8), torch.zeros(2, dtype=torch.int32)
    native.call("peak_bytes", (x, y), 2, 0, 1)
    if build == 32:  # four ones a step, from 0 .. 11 on
        wanted = sum(i + 4 * steps for i in range(12))
    else:  # two ones a step in each half of 16 bits
        half = 2 * steps % 2**16
        wanted = sum((half + i) % 2**16 + half * 2**16 for i in range(12))
    assert y.tolist() == [(wanted + 2**31) % 2**32 - 2**31] * 2
    assert 0 < native.peak(rounds=1, tasks=2) < 1e14


def test_kernels_are_chosen_by_layer_and_say_why(build):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(),
                          nn.Conv2d(8, 4, 1), nn.Flatten(), nn.Linear(256, 5)).eval()
    images = [torch.randn(4, 3, 12, 12)]
    for bits in ((8, 8), (4, 4)):
        qmodel = ql.quantize(model, ql.collect(model, images), ql.QuantConfig(*bits))
        imodel = ql.to_integer(qmodel, executor="fast", compile=True)
        table = imodel.kernels()
        expected = ["conv_bytes", "conv_depthwise", "conv_bytes", "conv_bytes"]
        if build == 0 or (build == 16 and bits == (8, 8)):
            expected = ["conv_words"] * 4
        layers = table[table.kind.isin(["conv", "linear"])]
        assert layers.kernel.tolist() == expected and table.why.str.len().min() > 5
        assert list(table.layer) == list(imodel.operations)
        assert torch.equal(imodel(images[0]), ql.to_integer(qmodel)(images[0]))
    for options in ({"executor": "fast", "compile": False}, {}):
        assert set(ql.to_integer(qmodel, **options).kernels().kernel) == {"torch"}


# ---- Sanitizers ----------------------------------------------------------------------------------

SANITIZERS = ("-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
DRIVE = f"""
import sys, torch
sys.path[:0] = ["tests", "tests/integer", "tests/system"]
from quantlab.integer.fast import native
from quantlab.system import compiled
compiled.FLAGS = (*compiled.FLAGS, *{SANITIZERS}, *sys.argv[1:])
assert native.library() is not None
import test_integer_bytes as bytes_tests
from test_counting import check_drawn
from test_integer_native import test_add, test_affine, test_requantize
from hypothesis import given, settings, strategies as st
torch.set_num_threads(1)

@given(bytes_tests.convolutions(), bytes_tests.WIDTHS, bytes_tests.WIDTHS,
       st.sampled_from(bytes_tests.ENDS), st.sampled_from(["single", "double", None]))
@settings(max_examples=60, deadline=None, database=None)
def drive(case, weight_bits, act_bits, ends, rounding):
    bytes_tests.check(case, *bytes_tests.prepared(case, weight_bits, act_bits, ends), rounding)

drive()
for shape in ((1, 1), (7, 16), (2, 77)):
    for test in (test_add, test_affine, test_requantize):
        test(shape, "single")
check_drawn(60)
print("clean")
"""


def sanitized(code, *flags):
    """What Python says of `code` under gcc's sanitizers."""
    compiler = compiled._compiler()
    found = [subprocess.run([*compiler, f"-print-file-name=lib{name}.so"], capture_output=True,
                            text=True).stdout.strip() for name in ("asan", "ubsan")]
    if not all(os.path.isabs(path) for path in found):
        pytest.skip("gcc's address and undefined-behaviour sanitizers are not installed")
    settings = {"LD_PRELOAD": ":".join(found), "ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run([sys.executable, "-c", code, *flags], cwd=CHECKOUT, text=True,
                          capture_output=True, timeout=300, env=os.environ | settings)


@pytest.mark.parametrize("flags", [
    (), pytest.param(("-mno-avx512f", "-mno-avxvnni"), marks=pytest.mark.long)], ids=" ".join)
def test_sanitizers_find_nothing_in_the_kernels(flags, tmp_path, monkeypatch):
    if native.library() is None:
        pytest.skip("no C compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    done = sanitized(DRIVE, *flags)
    assert done.stdout.endswith("clean\n"), done.stderr[-3000:]


@pytest.mark.long
def test_sanitizers_would_find_a_read_behind_the_end(tmp_path, monkeypatch):
    if native.library() is None:
        pytest.skip("no C compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    short = DRIVE.split("import test_integer_bytes")[0] + """
layer = native.Layer(torch.ones(40, 20, 3, 3, dtype=torch.int32), torch.zeros(40).int(), 0)
layer.weight = layer.weight[:-1].clone()
layer(torch.zeros(2, 9, 9, 20, dtype=torch.int8))
"""
    done = sanitized(short)
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr, done.stderr[-3000:]


def test_narrow_widths_run_the_same_kernels_and_narrow_the_stream(resnet20, stats):
    """What README says of speed: with VNNI the same instruction at every width, and one more pass
    where a layer reads fewer bits than the residual stream has.
    """
    if native.library() is None:
        pytest.skip("no C compiler")
    found = {}
    for bits in (8, 4, 2):
        qmodel = ql.quantize(resnet20, stats, ql.QuantConfig(bits, bits))
        found[bits] = ql.to_integer(qmodel, executor="fast").kernels().set_index("layer")
    for bits in (4, 2):
        narrow = found[bits].kind.eq("requantize")
        assert narrow.sum() == 9 and not found[8].kind.eq("requantize").any()
        if native.library().byte_sums() == 32:
            assert found[bits][~narrow].kernel.tolist() == found[8].kernel.tolist()
