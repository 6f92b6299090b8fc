"""Counts of values in bins: in C as in torch as in float64, whatever the values; and without C."""

import subprocess

import numpy as np
import pytest
import torch
from conftest import fuzz
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlab.edgestats import EdgeStats
from quantlab.system import compiled, counting

BLOCK, PART = 1024, 126 * 1024  # of counting.c
SIZES = (1, 7, 8, 17, BLOCK - 1, BLOCK, BLOCK + 9, PART - 1, PART + 1, 2 * PART + BLOCK + 3)
KINDS = ("normal", "relu", "edges", "equal", "tiny", "huge", "apart")
BUILDS = {
    "this machine's": (),
    "without AVX-512": ("-mno-avx512f",),
    "no vectors": ("-march=x86-64", "-mtune=generic"),
}


@pytest.fixture
def fresh():
    """Nothing is loaded, before and after."""
    counting.library.cache_clear()
    yield
    counting.library.cache_clear()


def need_compiler():
    if counting.library() is None:
        pytest.skip("no C compiler")


def values(kind, n, exponent, seed):
    """float32 [n]: "edges": many exactly on the edge of a bin, "apart": the largest and the least
    that there are.
    """
    x = torch.randn(n, generator=torch.Generator().manual_seed(seed))
    if kind == "relu":
        x = x.relu()
    elif kind == "edges":
        x = (x * 64).round() / 64
    elif kind == "equal":
        x = torch.where(x < 1, -2.5, x)
    elif kind in ("tiny", "huge"):
        x = x.clamp(-3, 3)
        exponent = -140 if kind == "tiny" else 126
    x = x.double() * 2.0**exponent
    if kind == "apart":
        x[::2] = x[::2].sign() * 2.0**-149
        x[1::3] = x[1::3].sign() * torch.finfo(torch.float32).max
    x[3::5] = -0.0
    return x.float()


def check_counts(x):
    """C, torch and float64 agree."""
    stats = EdgeStats()
    stats._grow(x.min().item(), x.max().item())
    if stats.bins is None:
        return
    bins = stats.level, stats.first, len(stats.bins)
    exact = x[x != 0].double().numpy() / stats.width
    index = np.ceil(exact).astype(np.int64) - 1 - stats.first
    expected = torch.from_numpy(np.bincount(index, minlength=bins[2]))
    for count in (counting._count_in_c, counting._count_in_torch):
        counts, zeros = count(x, *bins)
        assert torch.equal(counts, expected), count
        assert zeros == len(x) - len(exact)


def check_drawn(examples):
    @given(st.sampled_from(KINDS), st.sampled_from(SIZES), st.integers(-60, 60), st.integers(0, 99))
    @settings(max_examples=examples, deadline=None, database=None)
    def drawn(kind, n, exponent, seed):
        check_counts(values(kind, n, exponent, seed))

    drawn()


@pytest.fixture(params=BUILDS)
def build(request, fresh, tmp_path, monkeypatch):
    flags = BUILDS[request.param]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compiled, "FLAGS", (*compiled.FLAGS, *flags))
    try:
        command = [*compiled._compiler(), *flags, "-fsyntax-only", str(counting.SOURCE)]
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip(f"no C compiler that takes {' '.join(flags)}")
    need_compiler()


def test_counts_in_c_and_in_torch_are_exact(build):
    check_drawn(60)


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1))
@fuzz(100)
def test_counts_of_any_values_are_exact(drawn):
    need_compiler()
    check_counts(torch.tensor(drawn))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_counts_do_not_depend_on_threads(threads):
    need_compiler()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check_counts(values("normal", 5 * PART + 17, 0, 0))
    finally:
        torch.set_num_threads(before)


def test_values_lie_in_memory_in_any_order():
    need_compiler()
    x = values("edges", 6 * 5 * 4 * 30, 0, 1).view(6, 5, 4, 30)
    expected = EdgeStats().update(x)
    for same in (x.permute(0, 3, 1, 2), x.to(memory_format=torch.channels_last),
                 torch.cat([x, x - 9], 1)[:, :5], x.double()):
        stats = EdgeStats().update(same)
        assert torch.equal(stats.bins, expected.bins) and stats.zeros == expected.zeros


def test_values_outside_of_the_bins_are_refused():
    need_compiler()
    for x in (torch.full((9,), 3.0), torch.full((9,), -1.5), torch.tensor([0.5, float("nan")])):
        with pytest.raises(ValueError, match="outside of 2 bins"):
            counting._count_in_c(x, 0, 0, 2)
    with pytest.raises(ValueError, match="5000 bins"):
        counting._count_in_c(torch.ones(1), 0, 0, 5000)


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false", "gcc 'open"])
def test_without_a_compiler_the_counts_are_the_same(fresh, monkeypatch, tmp_path, compiler):
    x = values("edges", PART, 0, 2)
    expected = EdgeStats().update(x)
    counting.library.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", compiler)
    stats = EdgeStats().update(x)
    assert counting.library() is None
    assert torch.equal(stats.bins, expected.bins) and stats.zeros == expected.zeros
