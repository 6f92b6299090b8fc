"""What notebooks 01, 03 and 11 write by hand, against exact arithmetic and plain loops."""

import fractions
import itertools
import types

import jupytext
import numpy as np
import pytest
import torch
from cells import functions
from conftest import CHECKOUT
from torch import nn

import quantlab as ql


def code_cells(name):
    cells = jupytext.read(CHECKOUT / "notebooks" / f"{name}.py").cells
    return [cell for cell in cells if cell.cell_type == "code"]


@pytest.fixture(scope="module")
def by_hand():
    """What notebook 03 has defined before it quantizes the whole network, without its figures
    and without its tables of errors by width.
    """
    space, left_out = {}, ("plots.", "OBSERVERS", "weight_error(")
    for cell in code_cells("03_quantize_by_hand"):
        if cell.source.startswith("config = ql.QuantConfig("):
            return space
        if not any(word in cell.source for word in left_out):
            exec(cell.source, space)
        if "parameters" in cell.metadata.get("tags", []):
            space["data"] = "digits"


def test_scale_and_zero_point_against_exact_fractions(by_hand):
    random = np.random.default_rng(0)
    for low, high in random.exponential(size=(200, 2)):
        for a_q, b_q in ((0, 15), (-8, 7), (0, 255)):
            s, z = by_hand["scale_and_zero_point"](-low, high, a_q, b_q)
            a, b = fractions.Fraction(-low), fractions.Fraction(high)
            exact = (b - a) / (b_q - a_q)
            assert s.item() == np.float32(exact) and z.item() == round(a_q - a / exact)
    s, z = by_hand["scale_and_zero_point"](torch.zeros(2), torch.tensor([0.0, 1.0]), 0, 15)
    assert s.tolist() == [1, np.float32(1 / 15)] and z.tolist() == [0, 0]


def test_one_convolution_gives_the_codes_of_the_integer_network(by_hand):
    integers = ql.to_integer(by_hand["qmodel"]).codes(by_hand["sample"])
    assert torch.equal(by_hand["y_q"].int(), integers["relu"])
    assert by_hand["y_q"].unique().numel() > 100


def test_the_growing_histogram_counts_every_value_in_any_order(by_hand):
    g = torch.Generator().manual_seed(1)
    batches = [torch.randn(500, generator=g) * 10.0**k for k in (-3, 0, -1, 1)]
    batches[0][:40] = 0
    for order in itertools.permutations(batches):
        counts, width = torch.zeros(2 * by_hand["HALF"], dtype=torch.int64), 2.0**-30
        for x in order:
            counts, width = by_hand["count"](counts, width, x)
        values = torch.cat(order).double().numpy()
        values = values[values != 0]
        assert by_hand["HALF"] * width >= abs(values).max() > by_hand["HALF"] * width / 2
        bins = np.ceil(values / width).astype(int) - 1 + by_hand["HALF"]
        assert np.array_equal(counts.numpy(), np.bincount(bins, minlength=len(counts)))


def test_the_error_of_a_range_is_that_of_the_values_themselves(by_hand):
    batches = by_hand["study"].calibration()
    signed = by_hand["longest_tail"](True)
    x = torch.cat([by_hand["values_on"](signed, batch) for batch in batches]).double().numpy()
    for low, high in ((x.min(), x.max()), (-2.0, 2.5), (-1.0, 4.0)):
        s = np.float32((high - low) / 15)
        z = np.round(-low / s)
        x_hat = s * (np.clip(np.round(x / s) + z, 0, 15) - z)
        mean = np.square(x_hat - x).mean()
        assert by_hand["error_of_range"](low, high, 4) == pytest.approx(mean, rel=1e-3)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_the_walk_is_the_one_of_pytorch_s_observer(by_hand, bits):
    """Its loops one bin at a time, as HistogramObserver's non-linear search has them."""
    mass, ends, step = by_hand["mass"], by_hand["bin_ends"], 1e-5
    alpha, beta, start, end = 0.0, 1.0, 0, len(mass) - 1
    best = by_hand["error_of_range"](ends[0], ends[-1], bits)
    while alpha + step < beta - step:
        left, right = start, end
        while left < end and mass[left] < alpha + step:
            left += 1
        while right > start and mass[right - 1] >= beta - step:
            right -= 1
        move_left = left - start > end - right
        alpha, beta = (alpha + step, beta) if move_left else (alpha, beta - step)
        narrower = (left, end) if move_left else (start, right)
        if narrower == (start, end):
            continue
        error = by_hand["error_of_range"](ends[narrower[0]], ends[narrower[1] + 1], bits)
        if error > best:
            break
        best, (start, end) = error, narrower
    assert by_hand["walk"](bits) == (ends[start], ends[end + 1])


def test_descend_is_torch_s_sgd():
    """Nesterov's momentum, weight decay on what has more than one dimension."""
    config = types.SimpleNamespace(momentum=0.9, weight_decay=0.01)
    (descend,) = functions("01_train", ["descend"], config=config)
    torch.manual_seed(0)
    ours, theirs = nn.Linear(5, 3), nn.Linear(5, 3)
    theirs.load_state_dict(ours.state_dict())
    groups = [{"params": [theirs.weight], "weight_decay": 0.01}, {"params": [theirs.bias]}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)
    velocity = {}
    for rate in (0.1, 0.3, 0.2):
        x = torch.randn(7, 5)
        for network in (ours, theirs):
            network.zero_grad()
            network(x).square().sum().backward()
        descend(ours, velocity, rate)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        assert torch.equal(ours.weight, theirs.weight) and torch.equal(ours.bias, theirs.bias)


def test_one_bit_is_the_best_of_all_signs_and_magnitudes():
    (one_bit,) = functions("11_questions", ["one_bit"])
    weight = torch.randn(3, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    w_hat = one_bit(weight)
    assert w_hat.shape == weight.shape
    for channel, found in zip(weight.flatten(1).double(), w_hat.flatten(1).double()):
        signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=8))).double()
        alphas = (signs @ channel).clamp(min=0) / 8  # the best of each choice of signs
        errors = (alphas[:, None] * signs - channel).square().sum(1)
        assert (found - channel).square().sum() == pytest.approx(errors.min().item(), rel=1e-6)
        assert found.abs().unique().numel() == 1
