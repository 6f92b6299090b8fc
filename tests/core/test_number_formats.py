"""What notebook 14 writes by hand, against exact fractions, ONNX's vectors and torchao."""

import dataclasses
import fractions
import functools
import math
import warnings

import numpy as np
import pytest
import torch
from cells import functions
from onnx_vectors import vectors
from torch.nn import functional as F

from quantlab.edgestats import EdgeStats

NAME = "14_number_formats"
(Format,) = functions(NAME, ["Format"], dataclasses=dataclasses)
E4M3, E5M2, E2M1 = Format("E4M3", 4, 3), Format("E5M2", 5, 2), Format("E2M1", 2, 1)
FORMATS = [E4M3, E5M2, E2M1, Format("E2M3", 2, 3), Format("E3M2", 3, 2), Format("INT8", 0, 7),
           Format("INT4", 0, 3)]
names = dict(functools=functools, math=math, F=F, E4M3=E4M3)
by_hand = ["round_to", "values_of", "best_scale", "scale_of_edge", "mx", "nv", "value_of",
           "power_of_two", "largest_of", "in_blocks", "mx_scale", "nv_scale"]
round_to, values_of, best_scale, scale_of_edge, mx, nv, *_ = functions(NAME, by_hand, **names)


def nearest(x, values):
    """The nearest of all values, in fractions; of two, the one of even place among them."""
    places = range(len(values))
    zero = values.index(0)
    return min(places, key=lambda i: (abs(values[i] - x), (i - zero) % 2))


@pytest.mark.parametrize("f", FORMATS, ids=lambda f: f.name)
def test_rounding_is_that_of_exact_fractions(f):
    values = [fractions.Fraction(v) for v in values_of(f).tolist()]
    g = torch.Generator().manual_seed(f.bits)
    x = torch.randn(60, generator=g) * 2.0 ** torch.randint(-12, 10, (60,), generator=g)
    ties = torch.tensor([float(a + b) / 2 for a, b in zip(values, values[1:])])
    x = torch.cat([x, ties[:: 1 + len(ties) // 40], torch.tensor([1e-45, -1e-40, 3e38, -3e38])])
    expected = [float(values[nearest(fractions.Fraction(v), values)]) for v in x.tolist()]
    assert round_to(x, f).tolist() == expected


def test_onnx_s_vectors_of_casts_and_of_quantize_linear():
    """Finite ones: what to do with others, an attribute decides there."""
    of = {f"float{f.bits}_{f.name.lower()}{'' if f is E5M2 else 'fn'}": f
          for f in (E4M3, E5M2, E2M1)}
    seen = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of NumPy, as they make vectors of float16
        cases = vectors("Cast") + vectors("QuantizeLinear")
    for name, attributes, (x, *scale), y in cases:
        f = of.get(y.dtype.name)
        if f is None or x.dtype != np.float32 or attributes.get("saturate") == 0:
            continue
        scale = scale[0].reshape(-1, *[1] * (x.ndim - 1)) if scale else np.float32(1)
        finite = np.isfinite(x)
        ours = round_to(torch.from_numpy(x / scale), f).numpy()
        assert np.array_equal(ours[finite], y.astype(np.float32)[finite]), name
        seen.append(name)
    assert len(seen) == 6


# ---- Scales --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tensor():
    """[48, 64] with long tails, rows of other sizes and a block of zeros."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(48, 64, generator=g) ** 3 * 10.0 ** torch.linspace(-2, 1, 48)[:, None]
    x[3, :32] = 0
    return x


def test_blocks_are_those_of_torchao(tensor):
    mx_tensor = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor", reason="torchao")
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor

    dtypes = {E4M3: torch.float8_e4m3fn, E5M2: torch.float8_e5m2, E2M1: torch.float4_e2m1fn_x2}
    dtypes |= {f: f"fp6_{f.name.lower()}" for f in FORMATS if f.bits == 6}
    for f, dtype in dtypes.items():
        theirs = mx_tensor.MXTensor.to_mx(tensor, dtype, 32).dequantize(torch.float32)
        assert torch.equal(mx(tensor, f), theirs), f.name
    rows = tensor[24:]  # below, its scales end at E4M3's normal numbers
    whole = rows.abs().max()
    theirs = NVFP4Tensor.to_nvfp4(rows, 16, whole / (448 * 6)).dequantize(torch.float32)
    torch.testing.assert_close(nv(rows, E2M1, whole.item()), theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(5, 40), (5, 40, 3, 3), (5, 3, 3, 3), (2, 1, 3)])
def test_blocks_lie_along_the_channels_and_may_be_incomplete(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) ** 3
    whole = x.abs().max().item()
    for size, scheme in ((32, lambda t: mx(t, E2M1)), (16, lambda t: nv(t, E2M1, whole))):
        alone = [scheme(part) for part in x.split(size, 1)]
        assert torch.equal(scheme(x), torch.cat(alone, 1)) and scheme(x).shape == x.shape


@pytest.mark.parametrize("f", [E4M3, FORMATS[-1]], ids=lambda f: f.name)
def test_the_scale_of_least_error_is_the_least_of_many(f):
    x = torch.randn(3, 2000, generator=torch.Generator().manual_seed(0)) ** 3
    x[2], counts = 0, torch.arange(2000) % 5

    def error(scale):
        return ((round_to(x / scale, f) * scale - x).abs() ** 3 * counts).sum(1)

    whole = x.abs().amax(1, keepdim=True).clamp(min=1e-6) / values_of(f)[-1]
    least = torch.stack([error(part * whole) for part in torch.linspace(0.05, 1, 100)]).amin(0)
    found = error(best_scale(x, f, p=3.0, counts=counts))
    assert found[2] == 0 and (found[:2] <= 1.02 * least[:2]).all()


def test_the_scale_of_an_edge_is_that_of_its_values_and_a_dead_edge_has_one():
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(0)) ** 3
    found = scale_of_edge(EdgeStats().update(x), E2M1)
    assert found == pytest.approx(best_scale(x[None], E2M1).item(), rel=0.02)
    assert scale_of_edge(EdgeStats().update(torch.zeros(9)), E2M1) > 0
