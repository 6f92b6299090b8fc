"""Figures at the width of a column, and those that published rows suffice for."""

import io
import re

import matplotlib.pyplot as plt
import numpy as np
import pytest
from test_figures import (
    FIGURES,
    METHODS,
    TEXT,
    methods_table,
    rivals,
    waterfall,
    widths_table,
    with_interval,
)

from quantlab import plots
from quantlab.plots import lowbit
from quantlab.plots.column import _at_width, overlaps
from quantlab.system import paper
from quantlab.system.errors import UserError
from quantlab.system.files import read_csv, root, write_text
from quantlab.workbook import figures, results


def picture(figure):
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=60)
    return file.getvalue()


# ---- Columns -------------------------------------------------------------------------------------


def test_a_figure_comes_at_both_widths_with_its_caption_beside_it(workbook):
    figure = FIGURES["by_images"]()
    before = picture(figure)
    plots.save(figure, "03_bits", "digits", "resnet20", widths=(89, "183"), formats=("pdf", "svg"))
    folder = workbook / "results" / "figures"
    assert (folder / "03_bits_resnet20_digits.txt").read_text() == TEXT + "\n"
    for width in (89, 183):
        pdf = (folder / f"03_bits_resnet20_digits_{width}mm.pdf").read_bytes()
        right = float(re.search(rb"/MediaBox \[ 0 0 ([\d.]+)", pdf)[1])
        assert right == pytest.approx(72 * width / 25.4, abs=0.1), "in points, 72 an inch"
        svg = (folder / f"03_bits_resnet20_digits_{width}mm.svg").read_text()
        assert "top-1 accuracy, %" in svg and "n = 10,000" not in svg, "the caption is not in it"
    assert picture(figure) == before, "the figure itself is as it was"


def test_the_same_pdf_twice(workbook):
    files = []
    for _ in range(2):
        plots.save(FIGURES["by_images"](), "04_images", widths=[89])
        files.append((workbook / "results" / "figures" / "04_images_89mm.pdf").read_bytes())
    assert files[0] == files[1]


def test_panels_that_do_not_fit_side_by_side_stand_one_below_the_other():
    figure = FIGURES["unit_errors"]()
    with _at_width(figure, 89 / 25.4):
        figure.draw_without_rendering()
        boxes = [axes.get_position() for axes in figure.axes]
        assert all(a.y0 > b.y1 for a, b in zip(boxes, boxes[1:])) and not overlaps(figure)
    figure.draw_without_rendering()
    assert len({axes.get_position().y0 for axes in figure.axes}) == 1


@pytest.mark.parametrize(("options", "message"), [
    ({"widths": [3]}, r"width 3 is none of a figure; give 40 to 600 \(in mm\), as 89"),
    ({"widths": ["wide"]}, "width 'wide' is none of a figure"),
    ({"widths": [89], "formats": ["tiff"]}, "format 'tiff' is unknown; use one of: pdf, svg, png"),
    ({"widths": [45]}, r"99_x at 45 mm: .*; ask for \d+ mm"),
])
def test_a_width_or_format_that_a_figure_cannot_have_is_refused_in_one_line(
        workbook, options, message):
    with pytest.raises(UserError, match=message) as said:
        plots.save(FIGURES["heatmap"](), "99_x", **options)
    assert "\n" not in str(said.value)


def test_a_notebook_that_was_asked_saves_columns_and_says_what_it_left_out(
        workbook, monkeypatch, capsys):
    monkeypatch.setenv("QUANTLAB_PAPER", "")  # put back afterwards
    paper.ask_notebooks((50, 183), ("pdf",))
    plots.save(FIGURES["dataflow"](), "11_dataflow")
    files = [path.name for path in (workbook / "results" / "figures").glob("*.pdf")]
    assert files == ["11_dataflow_183mm.pdf"]
    assert capsys.readouterr().out.startswith("left out: 11_dataflow at 50 mm")


# ---- What a figure says --------------------------------------------------------------------------


def test_no_line_passes_a_width_that_was_not_measured():
    frame = widths_table(METHODS)
    frame = frame[(frame.method != "AdaRound") | (frame.width != "W3A3")]
    figure = lowbit.methods_by_width(frame, rivals(), TEXT)
    panel = next(axes for axes in figure.axes if axes.get_title() == "AdaRound")
    line = next(line for line in panel.lines if line.get_marker() == "^")
    missing = np.isnan(np.array(line.get_ydata(), float))
    assert missing.tolist() == [False, False, True, False, False]


def test_speeds_of_several_machines_are_not_drawn_together():
    table = methods_table(["float", "eager int8"])
    same, several = table.assign(device="A, 2 threads"), table.assign(device=["A", "B"])
    words = [[axes.get_xlabel() for axes in plots.method_bars(t, TEXT).axes]
             for t in (same, several)]
    assert [sum("images/s" in word for word in labels) for labels in words] == [1, 0]


def test_the_ladder_ends_with_ours_and_its_labels_are_clear_of_the_dots():
    figure = waterfall()
    figure.draw_without_rendering()
    assert figure.axes[0].get_yticklabels()[-1].get_text().endswith("= ours")
    for axes in figure.axes:
        right = axes.get_window_extent().x1
        assert axes.texts and all(text.get_window_extent().x0 > right for text in axes.texts)


def test_the_right_panel_of_a_weight_counts_its_codes():
    import torch

    import quantlab as ql

    weight = torch.tensor([-3.0, -1.0, -1.1, 0.0, 0.1, 0.0, 2.9])
    q = ql.choose_qparams(-3.0, 3.0, 3, symmetric=True)
    figure = plots.weight_codes(weight, ql.fake_quantize(weight, q), q, TEXT)
    assert [bar.get_height() for bar in figure.axes[1].patches] == [1, 0, 2, 3, 0, 0, 1]


def test_an_interval_is_drawn_where_one_is_known():
    table = with_interval([{"bits": 8, "observer": "mse", "fp32_top1": 90.0, "drop": 0.1}])
    figure = plots.accuracy_by_bits(table.assign(top1=89.9), TEXT)
    low, high = figure.axes[1].collections[0].get_segments()[0][:, 1]
    assert (low, high) == pytest.approx((-0.3, 0.7))


# ---- From published rows -------------------------------------------------------------------------


def test_every_figure_that_published_rows_suffice_for_is_drawn_from_them():
    published = results.load(results.published_path())
    drawn = {(name, model): figure for name, model, _, figure in figures.draw(published)}
    assert {name for name, model in drawn if model == "resnet20"} == set(figures.FIGURES)
    at_four = drawn["10_ladder", "resnet20"].axes[0].get_title()
    summary = results.summarize(results.current(published))
    ours = summary[results.has_config(summary, figures.config_of("4/4"))
                   & summary.corrections.eq("") & summary.model.eq("resnet20")]
    assert at_four.endswith(f"to {ours.top1.iloc[0]:.1f} %")


def test_what_a_bit_buys_takes_the_times_of_one_machine():
    rows = results.current(results.load(results.published_path()))
    rows = rows[(rows.model == "resnet50") & (rows.dataset == "cifar10-jpeg")]
    figure = figures.what_a_bit_buys(rows)
    lost, _, time = figure.axes
    times = read_csv(root() / "results" / "bench.csv")
    times = times[(times.section == "integer") & (times.model == "resnet50") & (times.batch == 64)]
    device = times[times.what == "integer only W4A4"].device.iloc[-1]
    seconds = 1 / times[times.device == device].set_index("what").images_per_s
    widths = [label.get_text() for label in lost.get_yticklabels()]
    for width, bar in zip(widths, time.patches, strict=True):
        assert bar.get_width() == pytest.approx(1000 * seconds[f"integer only {width}"])
    assert len(time.lines) == 2 and time.lines[0].get_xdata()[0] == 1000 * seconds["float"]
    assert device in " ".join(text.get_text() for text in figure.texts)
    assert figures.what_a_bit_buys(rows.assign(model="resnet18")) is None


def test_no_rows_are_said_to_be_none(workbook):
    with pytest.raises(UserError, match="published.csv has no rows to draw; run: make results"):
        list(figures.save_figures((89,), ("pdf",)))


def test_a_figure_that_holds_more_than_the_rows_is_not_drawn_over(workbook, monkeypatch):
    page = workbook / "results" / "pages" / "10_original_experiment-resnet20-my_set.md"
    write_text(page, "a run")
    monkeypatch.setattr(figures, "draw", lambda frame: [
        ("10_ladder", model, "my_set", plt.figure()) for model in ("resnet20", "resnet50")])
    monkeypatch.setattr(figures.results, "load", lambda path: [1])
    lines = list(figures.save_figures((), ()))
    assert lines == ["10_ladder_resnet20_my_set: as its notebook drew it",
                     "10_ladder_resnet50_my_set: pic"]
    names = {path.stem for path in (workbook / "pic").iterdir()}
    assert names == {"10_ladder_resnet50_my_set"}
