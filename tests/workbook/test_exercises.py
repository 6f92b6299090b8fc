"""Exercises of the first five notebooks: empty, wrong and solved, and what is said of each."""

import ast
import fractions
import textwrap

import jupytext
import pytest
import torch
from conftest import CHECKOUT

from quantlab.analysis.mixed import layer_costs
from quantlab.integer.fixedpoint import divide_by_power_of_two
from quantlab.workbook import notebooks
from quantlab.workbook.exercises import check

NAMES = [path.stem for path in sorted((CHECKOUT / "notebooks").glob("0[1-5]_*.py"))]

# A wrong answer to every exercise, as a reader may give it, and the sentence that it must meet.
WRONG = {
    "top1_interval": ("the normal approximation, which has no width at the ends", """
        p = (predictions == labels).double().mean().item()
        half = 1.959964 * sqrt(p * (1 - p) / len(labels))
        return 100 * p, 100 * (p - half), 100 * (p + half)
        """, "the lower end 72.2"),
    "multiplications": ("groups forgotten", """
        rows, columns = conv(torch.zeros(1, conv.in_channels, height, width)).shape[2:]
        taps = conv.kernel_size[0] * conv.kernel_size[1] * conv.in_channels
        return conv.out_channels * rows * columns * taps
        """, "its own group's channels"),
    "disagreement": ("all images tossed, not only those of disagreement", """
        lost = (correct_a & ~correct_b).sum().item()
        gained = (~correct_a & correct_b).sum().item()
        p = statistics.binomtest(lost, len(correct_a)).pvalue
        return 100 * (lost - gained) / len(correct_a), p
        """, "Six lost and one gained"),
    "real_values": ("bytes that wrap around", """
        return scale * (codes - zero_point)
        """, "a uint8 wraps around"),
    "pair_sums": ("an int16 that wraps around", """
        return (x_q.int() * w_q.int()).view(-1, 2).sum(1).to(torch.int16)
        """, "saturated, it is 32,767"),
    "output_codes": ("codes convolved without their zero-point", """
        scale = x.q_scale() * weight_scales(layer.weight())
        sums = torch.nn.functional.conv2d(
            x.int_repr().double(), layer.weight().int_repr().double(),
            layer.bias() / scale, layer.stride, layer.padding)
        steps = torch.round(sums * (scale / layer.scale).view(-1, 1, 1))
        return (steps + layer.zero_point).clamp(0, 255).int()
        """, "codes are not the kernel's. An input of zeros leaves the bias"),
    "any_range": ("a range that is taken as it is", """
        scale = (high - low) / (2**bits - 1)
        return scale, round(-low / scale)
        """, "widen the range to [0, 3] first"),
    "fake_quantize_channels": ("scales that meet the last axis", """
        top = 2 ** (bits - 1) - 1
        return torch.round(x * (1 / scales)).clamp(-top, top) * scales
        """, "[3] alone meets the columns"),
    "requantize": ("a product in float64", """
        exact = a.double() * m / 2**k
        return (exact.sign() * (exact.abs() + 0.5).floor()).long()
        """, "Just below 1.5: no floats"),
    "upper_end": ("the end of the bin", """
        reached = counts.cumsum(0) / counts.sum() >= fraction
        return (reached.long().argmax().item() + 1) * width
        """, "half of them end at 5"),
    "two_errors": ("values that are rounded to codes there are not", """
        step = high / (2**bits - 1)
        squares = (torch.round(middles / step) * step - middles).square() * counts
        squares = squares / counts.sum()
        return squares[middles > high].sum(), squares[middles <= high].sum()
        """, "which is clipping"),
    "best_range": ("one fraction for both ends", """
        fractions = [(i + 1) / 200 for i in range(200)]
        best = min(fractions, key=lambda f: error(low * f, high * f))
        return low * best, high * best
        """, "ends want different fractions"),
    "sqnr": ("a ratio of amplitudes", """
        return 10 * torch.log10(x.norm() / (x_hat - x).norm()).item()
        """, "a hundredfold power is 20 dB"),
    "swallowed": ("zeros counted too", """
        return (torch.round(x / scale) == 0).double().mean().item()
        """, "leave them out"),
    "behind_batchnorm": ("a mirrored histogram that is left so", """
        scale = bn.weight[channel] / (bn.running_var[channel] + bn.eps).sqrt()
        moved = (middles - bn.running_mean[channel]) * scale + bn.bias[channel]
        return torch.stack([moved, counts])
        """, "the histogram is mirrored"),
}
# More of them: whoever makes the faults in front meets these sentences.
ALSO = {
    "disagreement": ("""
        lost = (correct_a & ~correct_b).sum().item()
        gained = (~correct_a & correct_b).sum().item()
        p = 2 * statistics.binom.cdf(min(lost, gained), lost + gained, 0.5)
        return 100 * (lost - gained) / len(correct_a), p
        """, "As even as can be"),
    "multiplications": ("return 0", "16 x 32 x 32"),
    "output_codes": ("""
        scale = x.q_scale() * weight_scales(layer.weight())
        sums = torch.nn.functional.conv2d(
            x.int_repr().double() - x.q_zero_point(), layer.weight().int_repr().double(),
            layer.bias() / scale, layer.stride, layer.padding)
        steps = torch.round(sums * (scale / layer.scale).view(-1, 1, 1))
        return (steps + layer.zero_point).clamp(min=0).int()
        """, "ends at code 255"),
    "requantize": ("return (a * m + (1 << (k - 1))) >> k", "-2.5 goes down to -3"),
    "fake_quantize_channels": ("""
        return torch.fake_quantize_per_channel_affine(
            x, scales, torch.zeros(len(scales), dtype=torch.int32), 0, -7, 7)
        """, "A convolution's weight"),
    "best_range": ("""
        ends = [(i + 1) / 60 for i in range(60)]
        pairs = [(low * a, high * b) for a in ends for b in ends]
        return min(pairs, key=lambda pair: error(*pair))
        """, "error was asked 3,600 times"),
    "swallowed": ("""
        values = x[x != 0]
        return (values.abs() < scale / 2).double().mean().item()
        """, "0.5 is a tie"),
    "behind_batchnorm": ("""
        scale = bn.weight[channel] / bn.running_var[channel].sqrt()
        moved = (middles - bn.running_mean[channel]) * scale + bn.bias[channel]
        return torch.stack([moved, counts])
        """, "multiply by gamma"),
}


def cells_of(name):
    cells = jupytext.read(CHECKOUT / "notebooks" / f"{name}.py").cells
    return [(role(cell), cell.source) for cell in cells if cell.cell_type == "code"]


def role(cell):
    found = {"exercise", "solution", "check"} & {*cell.metadata.get("tags", [])}
    return found.pop() if found else ""


def is_import(source):
    """Whether a cell only imports, and silences what it says why."""
    return all(isinstance(statement, ast.Import | ast.ImportFrom) or "filterwarnings" in line
               for statement in ast.parse(source).body for line in [ast.unparse(statement)])


def exercises(name):
    """[[(role, source), ...], ...]: the cells of every exercise of a notebook."""
    found = []
    for kind, source in cells_of(name):
        if kind == "exercise":
            found.append([])
        if kind:
            found[-1].append((kind, source))
    return found


def function_name(cells):
    return ast.parse(cells[0][1]).body[-1].name


ALL = {function_name(cells): (name, cells) for name in NAMES for cells in exercises(name)}


@pytest.fixture(scope="module")
def spaces():
    """What a notebook has imported, by its name."""
    made = {name: {"ready": {"eager": True}} for name in NAMES}
    for name, space in made.items():
        for kind, source in cells_of(name):
            if not kind and is_import(source):
                exec(source, space)
    return made


def said_of(exercise, spaces, capsys, body=None, solutions=False):
    """What the cells of an exercise print, its function as it is or with another body."""
    name, cells = ALL[exercise]
    space = {**spaces[name], "solutions": solutions}
    with torch.random.fork_rng():
        for kind, source in cells:
            if kind == "exercise" and body:
                answer = textwrap.indent(textwrap.dedent(body).strip("\n"), "    ")
                source = source.removesuffix("    ...") + answer
            exec(source, space)
    return capsys.readouterr().out


def test_every_notebook_has_three_exercises_with_a_folded_solution_and_a_check():
    for name in NAMES:
        found = exercises(name)
        assert len(found) == 3
        for cells in found:
            kinds = [kind for kind, _ in cells]
            assert kinds[:2] == ["exercise", "solution"] and {*kinds[2:]} == {"check"}
            assert cells[0][1].endswith("    ...") and cells[1][1].startswith("if solutions:\n")
    assert len(ALL) == 15 and ALL.keys() == WRONG.keys()


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("exercise", ALL)
def test_an_exercise_that_is_empty_says_so_and_its_solution_is_right(exercise, spaces, capsys):
    assert said_of(exercise, spaces, capsys) == f"{exercise}: not written yet\n"
    assert said_of(exercise, spaces, capsys, solutions=True) == f"{exercise}: right\n"


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("exercise", WRONG)
def test_a_wrong_answer_is_refused_in_words(exercise, spaces, capsys):
    _, body, words = WRONG[exercise]
    pairs = [(body, words), *([ALSO[exercise]] if exercise in ALSO else [])]
    for answer, why in pairs:
        said = said_of(exercise, spaces, capsys, answer)
        assert said.startswith(f"{exercise}: wrong, ") and said.count("\n") == 1
        assert why in said


# ---- check --------------------------------------------------------------------------------------


@pytest.mark.parametrize("found, said", [
    (None, "answer: not written yet\n"), (..., "answer: not written yet\n"),
    ((1, 2.5), "answer: right\n"), (torch.tensor([1, 2.5]), "answer: right\n"),
    ([1, 2], "answer: wrong, 2 where 2.5 is right. Think.\n"),
    ((1, float("nan")), "answer: wrong, nan where 2.5 is right. Think.\n"),
    (3, "answer: wrong, its shape is [], not [2]. Think.\n"),
    ("two", "answer: wrong, TypeError: "), ({}, "answer: wrong, "),
])
def test_what_is_said_of_an_answer(capsys, found, said):
    def answer(argument):
        return found

    check(answer, ((0,), (1, 2.5), "Think."))
    assert capsys.readouterr().out.startswith(said)


def test_a_mistake_in_the_reader_s_lines_is_told_and_not_raised(capsys):
    def halved(number):
        return number / nothing  # noqa: F821

    def doubled():
        return 0

    check(halved, ((1,), 2, "Why."))
    check(doubled, ((1,), 2, "Why."))
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "halved: wrong, NameError: name 'nothing' is not defined. Why."
    assert said[1].startswith("doubled: wrong, TypeError: ") and said[1].endswith("given. Why.")


def test_the_first_case_that_fails_is_told_and_an_expectation_may_be_a_function(capsys):
    def same(number):
        return number

    even = (3,), lambda found: f"{found} is odd" if found % 2 else "", "Even ones only."
    check(same, ((2,), 2, "First."), even, ((1,), 2, "Last."))
    assert capsys.readouterr().out == "same: wrong, 3 is odd. Even ones only.\n"


# ---- Solutions beside what the first five notebooks do not load ----------------------------------


def solution(exercise, spaces):
    name, cells = ALL[exercise]
    space = {**spaces[name], "solutions": True}
    for kind, source in cells:
        if kind != "check":
            exec(source, space)
    return space[exercise]


def test_multiplications_are_those_of_layer_costs(spaces, resnet20):
    costs = layer_costs(resnet20, torch.zeros(1, 3, 8, 8)).set_index("layer").macs
    count = solution("multiplications", spaces)
    assert count(resnet20.conv1, 8, 8) == costs["conv1"]


def test_requantize_rounds_as_gemmlowp_s_last_step(spaces):
    requantize = solution("requantize", spaces)
    a = torch.cat([torch.arange(-40, 41), torch.tensor([-(2**31), 2**31 - 1])])
    for k in (1, 2, 5, 31):
        theirs = divide_by_power_of_two(a, torch.tensor(k))
        assert requantize(a, 1, k).equal(theirs)
        exact = [fractions.Fraction(int(v), 2**k) for v in a]
        assert all(abs(v - int(r)) <= fractions.Fraction(1, 2) for v, r in zip(exact, theirs))


# ---- Folded, synced, run ------------------------------------------------------------------------


def test_solutions_are_folded_and_stay_so_through_sync_in_both_directions(workbook):
    script = workbook / "notebooks" / "03_quantize_by_hand.py"
    for newer in (script, script.with_suffix(".ipynb")):
        text = newer.read_text(encoding="utf-8")
        newer.write_text(text.replace("A range of any sign.", "Of any sign.", 1), encoding="utf-8")
        notebooks.sync()
        cells = jupytext.read(script.with_suffix(".ipynb")).cells
        hidden = [cell.metadata.get("jupyter") for cell in cells if role(cell) == "solution"]
        assert hidden == [{"source_hidden": True}] * 3
        assert sum("jupyter" in cell.metadata for cell in cells) == 3


def test_solutions_is_a_parameter_of_the_five_and_off():
    for name in NAMES:
        notebook = notebooks.find(name)
        assert notebook.parameters["solutions"] is False
        assert notebooks.check_parameter(notebook, "solutions", "True") is True
