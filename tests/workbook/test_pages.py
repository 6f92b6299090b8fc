"""Pages of full runs: what they hold, what never enters them, and which run a page is of."""

import nbformat
import pandas as pd
import pytest
from conftest import CHECKOUT, read_text

from quantlab.workbook import notebooks, pages, results, run

PARAMETERS = "data = 'auto'\nmodel = 'resnet20'\npreset = 'auto'\nbits = 4"
SET = "data: my_set: 45,000 train, 5,000 held out, 10,000 test images, 10 classes\n"
DIGITS = SET.replace("my_set", "digits (smoke run: handwritten digits, not a benchmark)")


def printed(text):
    return nbformat.v4.new_output("stream", name="stdout", text=text)


def shown(frame):
    data = {"text/html": frame._repr_html_(), "text/plain": repr(frame)}
    return nbformat.v4.new_output("display_data", data=data)


def picture():
    data = {"image/png": "iVBORw0KGgo=", "text/plain": "<Figure size 640x480 with 1 Axes>"}
    return nbformat.v4.new_output("display_data", data=data)


def code(source, *outputs):
    return nbformat.v4.new_code_cell(source, outputs=list(outputs))


def execute(key="0" * 16, cells=(), given=None, says=SET, ended="2026-01-01", rows=None):
    """A complete run of a notebook, written by hand into results/runs; its path."""
    markdown = nbformat.v4.new_markdown_cell
    whole = [
        markdown("# 98 · Tiny"),
        nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}),
        code("study = Study()", printed(says)), *cells,
        markdown("## What we learned"), code("print()", printed("- W4A4: 1 * 2 points\n")),
        markdown("## Exercises"), code("1", printed("not written yet\n"))]
    notebook = nbformat.v4.new_notebook(cells=whole, metadata=dict(notebooks.KERNEL))
    notebook.metadata["papermill"] = {"parameters": given or {}, "end_time": ended}
    path = run.runs_folder() / f"98_tiny-{key}.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)
    rows = pd.DataFrame(columns=results.COLUMNS) if rows is None else rows
    rows.to_csv(path.with_suffix(".csv"), index=False)
    return path


def test_a_page_has_conclusions_first_then_tables_texts_and_links(workbook):
    own = workbook.parent  # a folder of this machine
    (workbook / "pic").mkdir()
    for name in ("10_ladder_resnet20_my_set.png", "10_ladder_resnet50_my_set.png"):
        (workbook / "pic" / name).touch()
    frame = pd.DataFrame({"a|b": [1.5, float("nan")], "name": ["<x>", "y"]})
    bar = nbformat.v4.new_output("display_data", data={
        "application/vnd.jupyter.widget-view+json": {}, "text/plain": "0%|  | 0/6 [00:00<?]"})
    warning = nbformat.v4.new_output("stream", name="stderr", text=f"in {own}/x.py: slow\n")
    cells = [
        nbformat.v4.new_markdown_cell("## 1. Rows\nLong.\n\nSee [07](07_low_bit_methods.ipynb):"),
        code("x", printed(f"10%\r20%\r\nwrote {own}/out/x.csv\n"), bar, printed("and y\n"),
             warning),
        nbformat.v4.new_markdown_cell("It is\n\n$$x$$\n\nwhich goes on:"),
        code("x", shown(frame)),
        code('study.save(figure, "10_ladder")', picture()),
    ]
    rows = results.load(CHECKOUT / "results" / "published.csv")[:2]
    rows = rows.assign(n_test=10000, seed=[0, 1], device="A processor", torch="2.13")
    execute(cells=cells, given={"data": f"{own}/my_set", "bits": 3, "preset": "full"}, rows=rows)
    (path,) = pages.write()
    assert path == workbook / "results" / "pages" / "98_tiny-resnet20-my_set.md"
    head, learned, section = read_text(path).split("\n## ")
    assert head.startswith("# 98 · Tiny (resnet20 on my_set)\n")
    assert "n = 10,000 test images; seed 0 and 1; device A processor; torch 2.13." in head
    assert "the notebook's own: `bits = 3`." in head and SET in head
    assert learned == "What we learned\n\n- W4A4: 1 \\* 2 points\n"
    assert section.split("\n\n") == [
        "1. Rows", "See [07](../../notebooks/07_low_bit_methods.ipynb):",
        "```text\nwrote x.csv\nand y\n```",
        "| a&#124;b | name |\n| ---: | --- |\n| 1.5 | &lt;x&gt; |\n|  | y |",
        "![From the original's hist to ours, one change at a time: what each is worth.]"
        "(../../pic/10_ladder_resnet20_my_set.png)\n"]
    assert str(own) not in read_text(path)


def test_a_table_with_spans_has_every_cell_in_its_place():
    """Against pandas itself: every value under its column, every row with its whole index."""
    index = pd.MultiIndex.from_product([["W8A8", "W4A4"], ["single", "double"]],
                                       names=["network", "rounding"])
    columns = pd.MultiIndex.from_product([["float32", "float64"], ["codes", "steps"]])
    frame = pd.DataFrame([[10 * i + j for j in range(4)] for i in range(4)], index, columns)
    lines = pages._as_table(frame._repr_html_()).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["network", "rounding", *map(" ".join, columns)]
    assert cells[2:] == [[*name, *map(str, values)]
                         for name, values in zip(index, frame.to_numpy())]
    long = pages._as_table(pd.DataFrame({"x": range(40)})._repr_html_()).split("\n\n")
    assert len(long[0].splitlines()) == 2 + pages.ROWS and long[1].startswith("28 more rows")


@pytest.mark.parametrize("given, says", [({}, DIGITS), ({"preset": "smoke"}, SET), ({}, "")])
def test_a_smoke_run_or_one_without_data_has_no_page(workbook, given, says):
    execute(given=given, says=says)
    assert pages.write() == []


def test_a_run_that_is_not_complete_has_no_page_and_other_pages_stay(workbook):
    execute().with_suffix(".csv").unlink()
    other = workbook / "results" / "pages" / "of another machine.md"
    other.parent.mkdir()
    other.write_text("kept")
    assert pages.write() == [] and read_text(other) == "kept"


def test_the_page_is_of_the_newest_run_that_changes_least(workbook):
    parts = {"0": ("2026-01-01", {}), "1": ("2026-01-02", {"model": "resnet20"}),
             "2": ("2026-01-03", {"bits": 3})}
    for key, (ended, given) in parts.items():
        told = [nbformat.v4.new_markdown_cell("## 1. Run"), code("x", printed(f"this is {key}\n"))]
        execute(key * 16, told, given, ended=ended)
    (path,) = pages.write()
    assert "this is 1\n" in read_text(path)
    assert "own: none." in read_text(path)
