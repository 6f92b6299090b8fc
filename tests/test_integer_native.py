"""The C kernels: equal to the reference, code for code, whatever the layer; and what happens without them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import equal_codes
from hypothesis import given, settings
from hypothesis import strategies as st

import quantlab as ql
from quantlab.affine import choose_qparams
from quantlab.integer import fixedpoint
from quantlab.integer import operations as ops
from quantlab.integer import pooling as pools
from quantlab.integer.fast import native
from quantlab.integer.fast import operations as integer_fast
from quantlab.integer.network import to_integer

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
    return fixedpoint.fixed_point(2 ** (low + (high - low) * torch.rand(n, generator=generator, dtype=torch.float64)))


# ---- Requantization --------------------------------------------------------------------------------------------------------------


def requantized(acc, q, shift, grid, rounding):
    """Codes of arbitrary accumulators: the biases of a layer without weights."""
    layer = native.Layer(torch.zeros(len(acc), 1, 1, 1, dtype=torch.int32), acc, 0, (q, shift, *grid, rounding))
    return layer(torch.zeros(1, 1, 1, 1, dtype=torch.int8)).flatten()


@pytest.mark.parametrize("rounding", fixedpoint.ROUNDINGS)
def test_requantization_over_all_of_int32(rounding):
    need_compiler()
    generator = torch.Generator().manual_seed(0)
    ends = torch.tensor([*INT32, INT32[0] + 1, INT32[1] - 1, -1, 0, 1, 2**30, -(2**30)])
    near = torch.tensor([s * 2**k + d for k in range(31) for s in (-1, 1) for d in (-1, 0, 1)])
    acc = torch.cat([ends, near, torch.randint(*INT32, (20_000,), generator=generator), torch.randint(-5000, 5000, (20_000,), generator=generator)])
    acc = acc.clamp(*INT32).int()
    shifts = torch.arange(-31, 31).repeat_interleave(3)
    q = torch.tensor([2**30, 2**31 - 1, 0]).repeat(62)  # the extreme mantissas, and none
    drawn = random_multipliers(generator, 60, high=29.9)
    for multiplier, shift in zip(torch.cat([q.int(), drawn[0]]), torch.cat([shifts.int(), drawn[1]])):
        x = acc
        if rounding == "double" and shift > 0:  # what its definition asks for, and no operation exceeds
            x = acc[(acc.long() << shift).abs() <= INT32[1]]
        zero_point, low, high = 3, -128, 100
        expected = fixedpoint.requantize(x, multiplier, shift, zero_point, low, high, rounding)
        assert torch.equal(requantized(x, multiplier.expand(len(x)), shift.expand(len(x)), (zero_point, low, high), rounding).int(), expected), shift


@given(st.integers(*INT32), st.floats(2.0**-33, 2.0**13), st.tuples(*[st.integers(-128, 127)] * 3), st.sampled_from(fixedpoint.ROUNDINGS))
@settings(max_examples=200, deadline=None)
def test_requantization_of_any_accumulator(acc, real, ends, rounding):
    need_compiler()
    q, shift = fixedpoint.fixed_point(real)
    low, zero_point, high = sorted(ends)
    if rounding == "double":
        acc = max(-(INT32[1] >> max(int(shift), 0)), min(INT32[1] >> max(int(shift), 0), acc))
    x = torch.tensor([acc], dtype=torch.int32)
    expected = fixedpoint.requantize(x, q, shift, zero_point, low, high, rounding)
    assert torch.equal(requantized(x, q.view(1), shift.view(1), (zero_point, low, high), rounding).int(), expected)


# ---- Layers ----------------------------------------------------------------------------------------------------------------------


@st.composite
def convolutions(draw):
    """(images, channels, outputs, groups, kernel, stride, dilation, padding, size, bits, zero_point, threads, seed)."""
    pair = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(2))  # noqa: E731
    groups = draw(st.sampled_from([1, 1, 1, 2, 3, 8]))
    per_group = draw(st.integers(1, 9))
    depthwise = draw(st.booleans()) and groups == 1
    channels = draw(st.integers(1, 40)) if depthwise else groups * per_group
    outputs, groups = (channels, channels) if depthwise else (groups * draw(st.integers(1, 20)), groups)
    kernel, dilation = pair(1, 4), pair(1, 3)
    padding = (*pair(0, 3), *pair(0, 3))
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilation)]
    size = tuple(draw(st.integers(max(1, r - a - b), 12)) for r, a, b in zip(reach, padding[2::-2], padding[3::-2]))
    return (draw(st.integers(1, 5)), channels, outputs, groups, kernel, pair(1, 3), dilation, padding, size,
            draw(st.integers(2, 9)), draw(st.integers(-128, 127)), draw(st.integers(1, 3)), draw(st.integers(0, 10**6)))


@given(convolutions(), st.sampled_from([*fixedpoint.ROUNDINGS, None]))
@settings(max_examples=150, deadline=None)
def test_any_convolution(case, rounding):
    need_compiler()
    images, channels, outputs, groups, kernel, stride, dilation, padding, size, bits, zero_point, threads, seed = case
    generator = torch.Generator().manual_seed(seed)
    weight = random_codes(generator, (outputs, channels // groups, *kernel), 1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1)
    bias = random_codes(generator, (outputs,), *(2**16 * torch.tensor([-1, 1])).tolist())
    x = random_codes(generator, (images, channels, *size))
    q, shift = random_multipliers(generator, outputs, -14.0, 0.5 if seed % 4 else 3.0)
    options = {"stride": stride, "groups": groups}
    acc = F.conv2d(F.pad(x - zero_point, padding), ops.dilate(weight, dilation), bias, **options)
    grid = (-5, -128, 120)
    constants = None if rounding is None else (q, shift, *grid, rounding)
    expected = acc if rounding is None else fixedpoint.requantize(acc, q.view(-1, 1, 1), shift.view(-1, 1, 1), *grid, rounding)
    layer = native.Layer(weight, bias, zero_point, constants, dilation=dilation, padding=padding, **options)
    result = run_in_threads(threads, lambda: layer(x.to(torch.int8).permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
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
    weight, bias = torch.full((3, 64, 1, 1), 255, dtype=torch.int32), torch.full((3,), INT32[1], dtype=torch.int32)
    logits = native.Layer(weight, bias, -128)(torch.full((2, 1, 1, 64), 127, dtype=torch.int8))
    assert (logits == INT32[1] + 64 * 255 * 255 - 2**32).all()


def test_an_empty_batch():
    need_compiler()
    layer = native.Layer(torch.ones(4, 3, 1, 1, dtype=torch.int32), torch.zeros(4, dtype=torch.int32), 0)
    assert layer(torch.zeros(0, 5, 5, 3, dtype=torch.int8)).shape == (0, 5, 5, 4)


# ---- Passes over codes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounding", fixedpoint.ROUNDINGS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 16), (2, 77), (513, 129)], ids=str)
def test_passes_over_codes(shape, rounding):
    need_compiler()
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        a, b = (random_codes(generator, shape) for _ in range(2))
        za, zb, grid = -128 + seed, 17 - seed, (seed, -100, 127)
        q, shift = random_multipliers(generator, 1, -30.0, -20.0 if seed % 3 else 1.0)
        packed = native.pack_constants(q, shift, *grid, rounding)
        codes = native.requantize(a.to(torch.int8), za, packed).int()
        assert torch.equal(codes, fixedpoint.requantize(a - za, q, shift, *grid, rounding))

        scales = torch.tensor([0.7, 0.7 * (1.0 if seed == 0 else float(torch.rand(1, generator=generator)))], dtype=torch.float64)
        multipliers, shifts = fixedpoint.fixed_point(scales / (2 * scales.max()))
        q, shift = random_multipliers(generator, 1, -24.0, -18.0)
        packed, operand = native.pack_constants(q, shift, *grid, rounding), native.pack_constants(multipliers[1], shifts[1], 0, 0, 0, rounding)
        expected = fixedpoint.requantize(ops.add_rescaled(a, b, torch.tensor([za, zb]), multipliers, shifts, rounding), q, shift, *grid, rounding)
        assert torch.equal(native.add(a.to(torch.int8), b.to(torch.int8), (za, zb), operand, packed).int(), expected)

        weight, bias = (random_codes(generator, shape[1:], -(2**k), 2**k) for k in (20, 30))
        q, shift = random_multipliers(generator, shape[1], -30.0, -16.0)
        packed = native.pack_constants(q, shift, *grid, rounding)
        affine = native.affine(a.to(torch.int8), za, native.pad_outputs(weight), native.pad_outputs(bias), packed)
        assert torch.equal(affine.int(), fixedpoint.requantize((a - za) * weight + bias, q, shift, *grid, rounding))


@pytest.mark.parametrize("rounding", fixedpoint.ROUNDINGS)
@pytest.mark.parametrize("options", [{"windows": (pools.Windows(output=1),) * 2}, {"dims": (2, 3)}, {"dims": (-2, -1), "keepdim": True},
                                     {"dims": (2,)}, {"windows": (pools.Windows(output=2),) * 2}], ids=str)
def test_averages(options, rounding):
    need_compiler()
    grid, out = (ops.Grid.of(choose_qparams(*ends, 8), 128) for ends in ((-1.0, 3.0), (-0.4, 1.1)))
    with torch.inference_mode():
        average, expected = (c("average", grid, out, rounding, **options) for c in (integer_fast.Average, pools.Average))
        average.use_compiler = True
        for size in ((3, 5, 7, 6), (2, 19, 4, 4), (2, 19, 4, 4), (1, 5, 7, 6)):
            x = torch.randint(-128, 128, size, dtype=torch.int8)
            assert torch.equal(average(x).int(), expected(x)) and average(x).dtype == torch.int8
    assert torch.equal(copy.deepcopy(average)(x), average(x))


# ---- The compiler ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiler, why", [("false", "false fails"), ("no-such-compiler", "No such file"), (None, "no C compiler")])
def test_without_a_compiler_the_codes_are_the_same(resnet20, stats, digits, fresh, monkeypatch, compiler, why):
    qmodel = ql.quantize(resnet20, stats, ql.QuantConfig(4, 4))
    x = next(iter(digits.calibration(2)))
    if compiler:
        monkeypatch.setenv("CC", compiler)
    else:
        monkeypatch.delenv("CC", raising=False)
        monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.warns(UserWarning, match=f"runs without its C kernels, exact but slower: .*{why}"):
        imodel = to_integer(qmodel, executor="fast")
    assert equal_codes(imodel.codes(x), to_integer(qmodel).codes(x))


def test_the_library_is_compiled_once_and_again_when_damaged(fresh, monkeypatch):
    need_compiler()
    library, digest = next(fresh.glob("*.so")), next(fresh.glob("*.sha256"))
    compiled, run = [], native._output
    monkeypatch.setattr(native, "_output", lambda command: (compiled.append(command) if "-o" in command else None, run(command))[1])
    native.library.cache_clear()
    assert native.library() is not None and not compiled
    for damage in (lambda: library.write_bytes(library.read_bytes()[:5000]), lambda: library.write_bytes(b""), digest.unlink):
        native.library.cache_clear()
        library.unlink()  # the mapped file itself must not change
        library.write_bytes(b"\x7fELF" * 1000)
        damage()
        assert native.library() is not None
        assert len(compiled) == 1 and compiled.pop()
    assert sorted(fresh.iterdir()) == sorted([library, digest])


def test_a_cache_that_cannot_be_written(fresh):
    fresh.parent.write_text("a file where the folder should be")
    need_compiler()
    assert native.library() is not None
