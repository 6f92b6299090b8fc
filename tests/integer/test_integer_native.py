"""The C kernels: equal to the reference, code for code, whatever the layer; and what happens
without them.
"""

import copy
import os

import pytest
import torch
import torch.nn.functional as F
from conftest import equal_codes, fuzz
from hypothesis import given
from hypothesis import strategies as st

import quantlab as ql
from quantlab.affine import choose_qparams
from quantlab.integer import operations as ops
from quantlab.integer import pooling as pools
from quantlab.integer.fast import native
from quantlab.integer.fast import operations as fast
from quantlab.integer.fixedpoint import ROUNDINGS, Requantization, fixed_point
from quantlab.integer.network import to_integer
from quantlab.system import compiled

INT32 = (-(2**31), 2**31 - 1)


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """No library is loaded and the cache is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    native.library.cache_clear()
    yield tmp_path / "cache" / "quantlab"
    native.library.cache_clear()


def need_compiler():
    if native.library() is None:
        pytest.skip("no C compiler")


def random_codes(generator, shape, low=-128, high=127):
    return torch.randint(low, high + 1, shape, generator=generator, dtype=torch.int32)


def random_multipliers(generator, n, low=-34.0, high=14.0):
    """(q, shift) of n real multipliers from 2^low to 2^high."""
    uniform = torch.rand(n, generator=generator, dtype=torch.float64)
    return fixed_point(2 ** (low + (high - low) * uniform))


# ---- Requantization ------------------------------------------------------------------------------


def requantized(acc, requantization):
    """int32 codes of arbitrary accumulators: the biases of a layer without weights."""
    weight = torch.zeros(len(acc), 1, 1, 1, dtype=torch.int32)
    layer = native.Layer(weight, acc, 0, requantization)
    return layer(torch.zeros(1, 1, 1, 1, dtype=torch.int8)).flatten().int()


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_requantization_over_all_of_int32(rounding):
    need_compiler()
    generator = torch.Generator().manual_seed(0)
    bounds = [*INT32, INT32[0] + 1, INT32[1] - 1, -1, 0, 1, 2**30, -(2**30)]
    near = [s * 2**k + d for k in range(31) for s in (-1, 1) for d in (-1, 0, 1)]
    acc = torch.cat([
        torch.tensor(bounds + near), torch.randint(*INT32, (20_000,), generator=generator),
        torch.randint(-5000, 5000, (20_000,), generator=generator)])
    acc = acc.clamp(*INT32).int()
    q = torch.tensor([2**30, 2**31 - 1, 0]).repeat(62).int()  # the extreme mantissas, and none
    shift = torch.arange(-31, 31).repeat_interleave(3).int()
    drawn = random_multipliers(generator, 60, high=29.9)
    for q, shift in zip(torch.cat([q, drawn[0]]), torch.cat([shift, drawn[1]])):
        x = acc
        if rounding == "double" and shift > 0:  # its definition asks for it; no operation exceeds
            x = acc[(acc.long() << shift).abs() <= INT32[1]]
        requantization = Requantization(q, shift, 3, -128, 100, rounding)
        assert torch.equal(requantized(x, requantization), requantization(x)), shift


@given(st.integers(*INT32), st.floats(2.0**-33, 2.0**13),
       st.tuples(*[st.integers(-128, 127)] * 3), st.sampled_from(ROUNDINGS))
@fuzz(200)
def test_requantization_of_any_accumulator(acc, real, bounds, rounding):
    need_compiler()
    q, shift = fixed_point(real)
    low, zero_point, high = sorted(bounds)
    if rounding == "double":
        largest = INT32[1] >> max(int(shift), 0)
        acc = max(-largest, min(largest, acc))
    x = torch.tensor([acc], dtype=torch.int32)
    requantization = Requantization(q, shift, zero_point, low, high, rounding)
    assert torch.equal(requantized(x, requantization), requantization(x))


# ---- Layers --------------------------------------------------------------------------------------


@st.composite
def convolutions(draw):
    """What decides a convolution, as a dict."""

    def pair(low, high):
        return draw(st.integers(low, high)), draw(st.integers(low, high))

    groups = draw(st.sampled_from([1, 1, 1, 2, 3, 8]))
    per_group = draw(st.integers(1, 9))
    depthwise = draw(st.booleans()) and groups == 1
    channels = draw(st.integers(1, 40)) if depthwise else groups * per_group
    outputs = channels if depthwise else groups * draw(st.integers(1, 20))
    kernel, dilation = pair(1, 4), pair(1, 3)
    padding = (*pair(0, 3), *pair(0, 3))  # left, right, top, bottom
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilation)]
    inside = (reach[0] - padding[2] - padding[3], reach[1] - padding[0] - padding[1])
    return {
        "images": draw(st.integers(1, 5)), "channels": channels, "outputs": outputs,
        "groups": channels if depthwise else groups, "kernel": kernel, "dilation": dilation,
        "stride": pair(1, 3), "padding": padding,
        "size": tuple(draw(st.integers(max(1, n), 12)) for n in inside),
        "bits": draw(st.integers(2, 9)), "zero_point": draw(st.integers(-128, 127)),
        "threads": draw(st.integers(1, 3)), "seed": draw(st.integers(0, 10**6)),
    }


@given(convolutions(), st.sampled_from([*ROUNDINGS, None]))
@fuzz(150)
def test_any_convolution(case, rounding):
    need_compiler()
    generator = torch.Generator().manual_seed(case["seed"])
    channels, outputs, zero_point = case["channels"], case["outputs"], case["zero_point"]
    top = 2 ** (case["bits"] - 1) - 1
    size = (outputs, channels // case["groups"], *case["kernel"])
    weight = random_codes(generator, size, -top, top)
    bias = random_codes(generator, (outputs,), -(2**16), 2**16)
    x = random_codes(generator, (case["images"], channels, *case["size"]))
    q, shift = random_multipliers(generator, outputs, -14.0, 0.5 if case["seed"] % 4 else 3.0)
    options = {"stride": case["stride"], "groups": case["groups"]}
    dilated = ops.dilate(weight, case["dilation"])
    expected = F.conv2d(F.pad(x - zero_point, case["padding"]), dilated, bias, **options)
    requantization = None
    if rounding is not None:
        requantization = Requantization(q, shift, -5, -128, 120, rounding)
        by_channel = Requantization(
            q.view(-1, 1, 1), shift.view(-1, 1, 1), -5, -128, 120, rounding)
        expected = by_channel(expected)
    options |= {"dilation": case["dilation"], "padding": case["padding"]}
    layer = native.Layer(weight, bias, zero_point, requantization, **options)
    codes = x.to(torch.int8).permute(0, 2, 3, 1)
    result = run_in_threads(case["threads"], lambda: layer(codes).permute(0, 3, 1, 2))
    assert result.dtype == (torch.int32 if rounding is None else torch.int8)
    assert torch.equal(result.int(), expected)


def run_in_threads(n, function):
    """With n threads, however little there is to do, and bands of a few rows."""
    before, kept = torch.get_num_threads(), (native.THREADED, native.BAND)
    torch.set_num_threads(n)
    native.THREADED, native.BAND = 0, 2**12
    try:
        return function()
    finally:
        torch.set_num_threads(before)
        native.THREADED, native.BAND = kept


def test_accumulators_wrap_as_int32_does():
    need_compiler()
    weight = torch.full((3, 64, 1, 1), 255, dtype=torch.int32)
    bias = torch.full((3,), INT32[1], dtype=torch.int32)
    logits = native.Layer(weight, bias, -128)(torch.full((2, 1, 1, 64), 127, dtype=torch.int8))
    assert (logits == INT32[1] + 64 * 255 * 255 - 2**32).all()


def test_an_empty_batch():
    need_compiler()
    weight = torch.ones(4, 3, 1, 1, dtype=torch.int32)
    layer = native.Layer(weight, torch.zeros(4, dtype=torch.int32), 0)
    assert layer(torch.zeros(0, 5, 5, 3, dtype=torch.int8)).shape == (0, 5, 5, 4)


# ---- Passes over codes ---------------------------------------------------------------------------


SHAPES = [(1, 1), (3, 5), (7, 16), (2, 77), (513, 129)]


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_requantize(shape, rounding):
    need_compiler()
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        a = random_codes(generator, shape)
        q, shift = random_multipliers(generator, 1, -30.0, -20.0 if seed % 3 else 1.0)
        requantization = Requantization(q, shift, seed, -100, 127, rounding)
        packed = native.pack_constants(requantization)
        codes = native.requantize(a.to(torch.int8), seed - 128, packed)
        assert torch.equal(codes.int(), requantization(a - (seed - 128)))


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_add(shape, rounding):
    need_compiler()
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        a, b = (random_codes(generator, shape) for _ in range(2))
        zero_points = torch.tensor([seed - 128, 17 - seed])
        ratio = 1.0 if seed == 0 else float(torch.rand(1, generator=generator))
        scales = torch.tensor([0.7, 0.7 * ratio], dtype=torch.float64)
        multipliers, shifts = fixed_point(scales / (2 * scales.max()))
        q, shift = random_multipliers(generator, 1, -24.0, -18.0)
        requantization = Requantization(q, shift, seed, -100, 127, rounding)
        smaller = Requantization(multipliers[1], shifts[1], 0, 0, 0, rounding)
        codes = native.add(a.to(torch.int8), b.to(torch.int8), zero_points.tolist(),
                           native.pack_constants(smaller), native.pack_constants(requantization))
        acc = ops.add_rescaled(a, b, zero_points, multipliers, shifts, rounding)
        assert torch.equal(codes.int(), requantization(acc))


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_affine(shape, rounding):
    need_compiler()
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        x = random_codes(generator, shape)
        weight, bias = (random_codes(generator, shape[1:], -(2**k), 2**k) for k in (20, 30))
        q, shift = random_multipliers(generator, shape[1], -30.0, -16.0)
        requantization = Requantization(q, shift, seed, -100, 127, rounding)
        codes = native.affine(x.to(torch.int8), seed - 128, native.pad_outputs(weight),
                              native.pad_outputs(bias), native.pack_constants(requantization))
        assert torch.equal(codes.int(), requantization((x - (seed - 128)) * weight + bias))


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("options", [
    {"windows": (pools.Windows(output=1),) * 2}, {"dims": (2, 3)},
    {"dims": (-2, -1), "keepdim": True}, {"dims": (2,)},
    {"windows": (pools.Windows(output=2),) * 2}], ids=str)
def test_averages(options, rounding):
    need_compiler()
    grid = ops.Grid.of(choose_qparams(-1.0, 3.0, 8), 128)
    out = ops.Grid.of(choose_qparams(-0.4, 1.1, 8), 128)
    with torch.inference_mode():
        average = fast.Average("average", grid, out, rounding, compile=True, **options)
        expected = pools.Average("average", grid, out, rounding, **options)
        for size in ((3, 5, 7, 6), (2, 19, 4, 4), (2, 19, 4, 4), (1, 5, 7, 6)):
            x = torch.randint(-128, 128, size, dtype=torch.int8)
            assert torch.equal(average(x).int(), expected(x)) and average(x).dtype == torch.int8
    assert torch.equal(copy.deepcopy(average)(x), average(x))


# ---- The compiler --------------------------------------------------------------------------------


@pytest.mark.parametrize("compiler, why", [
    ("false", "false fails"), ("no-such-compiler", "No such file"), (None, "no C compiler")])
def test_without_a_compiler_the_codes_are_the_same(
        resnet20, stats, digits, fresh, monkeypatch, compiler, why):
    qmodel = ql.quantize(resnet20, stats, ql.QuantConfig(4, 4))
    x = next(iter(digits.calibration(2)))
    if compiler:
        monkeypatch.setenv("CC", compiler)
    else:
        monkeypatch.delenv("CC", raising=False)
        monkeypatch.setattr("shutil.which", lambda name: None)
    message = f"runs without its C kernels, exact but slower: .*{why}"
    with pytest.warns(UserWarning, match=message):
        imodel = to_integer(qmodel, executor="fast")
    assert equal_codes(imodel.codes(x), to_integer(qmodel).codes(x))


def test_the_library_is_compiled_once_and_again_when_damaged(fresh, monkeypatch):
    need_compiler()
    library, digest = next(fresh.glob("*.so")), next(fresh.glob("*.sha256"))
    commands, run = [], compiled._output

    def count(command):
        commands.extend([command] if "-o" in command else [])
        return run(command)

    monkeypatch.setattr(compiled, "_output", count)
    native.library.cache_clear()
    assert native.library() is not None and not commands
    damages = (lambda: library.write_bytes(library.read_bytes()[:5000]),
               lambda: library.write_bytes(b""), digest.unlink)
    for damage in damages:
        native.library.cache_clear()
        library.unlink()  # the mapped file itself must not change
        library.write_bytes(b"\x7fELF" * 1000)
        damage()
        assert native.library() is not None
        assert len(commands) == 1 and commands.pop()
    assert sorted(fresh.iterdir()) == sorted([library, digest])


def test_a_cache_that_cannot_be_written(fresh):
    fresh.parent.write_text("a file where the folder should be")
    need_compiler()
    assert native.library() is not None


def test_no_library_is_loaded_that_another_user_could_have_written(fresh, monkeypatch, tmp_path):
    """Of what is there only files of this user's own, in a folder that no other can write; anything
    else is compiled anew, elsewhere where the folder is not ours.
    """
    need_compiler()
    library, digest = next(fresh.glob("*.so")), next(fresh.glob("*.sha256"))
    assert fresh.stat().st_mode & 0o777 == 0o700 and library.stat().st_mode & 0o77 == 0
    commands, run = [], compiled._output

    def count(command):
        commands.extend([command[-1]] if "-o" in command else [])
        return run(command)

    monkeypatch.setattr(compiled, "_output", count)

    def link():
        library.rename(tmp_path / "elsewhere.so")
        library.symlink_to(tmp_path / "elsewhere.so")

    for change in (lambda: fresh.chmod(0o777), lambda: fresh.chmod(0o775),
                   lambda: library.chmod(0o666), lambda: digest.chmod(0o620), link):
        change()
        native.library.cache_clear()
        assert native.library() is not None and len(commands) == 1
        assert str(fresh) in commands.pop() and fresh.stat().st_mode & 0o777 == 0o700
        assert not library.is_symlink() and library.stat().st_mode & 0o77 == 0
    native.library.cache_clear()
    assert native.library() is not None and not commands, "what is ours is loaded"

    real = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: real + 1)  # the folder belongs to another user
    native.library.cache_clear()
    with pytest.warns(UserWarning, match="belongs to another user"):
        assert native.library() is None
    assert not commands


def test_a_compiler_that_cannot_be_parsed(fresh, monkeypatch):
    monkeypatch.setenv("CC", "gcc 'open")
    with pytest.warns(UserWarning, match="runs without its C kernels.*No closing quotation"):
        assert native.library() is None
