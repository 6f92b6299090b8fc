"""results/pages: what full runs on real data showed, as Markdown that is read without running them.

    for line in pages.write(): ...        # in `python -m quantlab publish`

A page holds what the cells of an executed notebook printed, its tables, and links into pic/; never
a picture, a path or a date. Conclusions come first.
"""

import dataclasses
import html
import itertools
import json
import re

import pandas as pd

from quantlab.system.files import read_text, root, write_text
from quantlab.workbook import gallery, notebooks, results, run, tables

CONCLUSIONS = "What we learned"
LEFT_OUT = ("", "Exercises")  # sections: what comes before the first, and what is the reader's
ROWS, LINES, SHORT = 12, 24, 400  # of a table and a text that are shown; signs of a paragraph
TOLD = ("data", "model", "preset", "checkpoint")  # parameters that the page says in other words
DATA = re.compile(r"^data: (.+?)( \(smoke run.*\))?: [\d,]+ train", re.MULTILINE)
FOLDERS = re.compile(r"(?<![\w.:/])/(?:[\w.+-]+/)+")  # of an absolute path


@dataclasses.dataclass(frozen=True)
class Run:
    """A complete full run on real data: notebook's name and title, data set, network, the other
    parameters that are not the notebook's own, cells as in format 4, rows it recorded, its end.
    """

    name: str
    title: str
    data: str
    model: str
    changed: dict
    cells: list
    rows: pd.DataFrame
    ended: str

    @property
    def page(self):
        return f"{self.name}-{self.model}-{self.data}.md"


def read(path):
    """A Run from results/runs/NAME-KEY.ipynb; None for what is incomplete, smoke or without data.
    """
    notebook = notebooks.read(path)
    defaults, recorded = notebook.parameters, path.with_suffix(".csv")
    if notebook.problem or not recorded.is_file() or not {"data", "model"} <= set(defaults):
        return None
    content = json.loads(read_text(path))
    about = content["metadata"].get("papermill", {})
    given = about.get("parameters", {})
    said = DATA.search("".join(map(_printed, content["cells"])))
    if not said or said[2] or (defaults | given).get("preset") == "smoke":
        return None
    changed = {k: v for k, v in given.items() if k not in TOLD and v != defaults.get(k)}
    return Run(path.stem.rpartition("-")[0], notebook.title, said[1], (defaults | given)["model"],
               changed, content["cells"], results.load(recorded), about.get("end_time") or "")


def chosen(runs):
    """Of the runs of one notebook, network and data set the one with the fewest parameters changed,
    the newest among equals: a run in pieces does not take the place of a whole one.
    """
    runs = sorted(runs, key=lambda one: one.ended, reverse=True)
    runs = sorted(runs, key=lambda one: (one.page, len(one.changed)))
    return [next(same) for _, same in itertools.groupby(runs, key=lambda one: one.page)]


def write():
    """Write a page for every run in results/runs; their paths. Other pages stay as they are."""
    found = map(read, sorted(run.runs_folder().glob("[0-9][0-9]_*-*.ipynb")))
    paths = []
    for one in chosen(filter(None, found)):
        paths.append(root() / "results" / "pages" / one.page)
        write_text(paths[-1], page(one))
    return paths


# ---- A page --------------------------------------------------------------------------------------


def page(one):
    """A Run as Markdown."""
    sections, heading, said = {}, "", ""
    for cell in one.cells:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            if title := re.search(r"^## (.*)", source, re.MULTILINE):
                heading = title[1]
            said = _introduction(source)
        elif shown := [*filter(None, _outputs(cell)), *_figures(source, one)]:
            sections.setdefault(heading, []).extend(filter(None, [said, *shown]))
            said = ""
    first = [CONCLUSIONS] if CONCLUSIONS in sections else []
    parts = [f"# {one.title} ({one.model} on {one.data})", _facts(one)]
    for name in dict.fromkeys([*first, *sections]):
        parts += [f"## {name}", *sections[name]] if name not in LEFT_OUT else []
    return FOLDERS.sub("", "\n\n".join(parts)) + "\n"


def _facts(one):
    """What a run depends on: rows, seeds, machine, parameters; then what its set-up printed."""
    set_up = next((text for text in map(_printed, one.cells) if DATA.search(text)), "")
    rows, link = one.rows, f"[this notebook](../../notebooks/{one.name}.ipynb)"
    said = [f"What a full run of {link} showed; [all figures](../../pic/README.md)."]
    if len(rows):
        columns = {"seed": "seed", "device": "device", "torch": "torch"}
        facts = [f"{name} {' and '.join(map(str, rows[column].drop_duplicates()))}"
                 for column, name in columns.items()]
        n = " and ".join(f"{n:,}" for n in rows.n_test.drop_duplicates())
        said.append(f"{len(rows)} rows recorded: n = {n} test images; {'; '.join(facts)}.")
    changed = ", ".join(f"`{name} = {value!r}`" for name, value in one.changed.items())
    said.append(f"Parameters other than the notebook's own: {changed or 'none'}.")
    return " ".join(said) + "\n\n" + _as_text(set_up)


def _introduction(source):
    """The last paragraph of a text, which says what comes next, where it is short; links as seen
    from a page.
    """
    last = source.strip().split("\n\n")[-1].partition("\n## ")[0]
    # no heading, table or list, nor what goes on behind a formula
    if re.match(r"[#|<$]|\s|[-*] |\d+\. |Next:|[a-z]", last) or len(last) > SHORT:
        return ""
    last = re.sub(r"\]\(\.\./", "](../../", last)
    return re.sub(r"\]\((?=\d\d_\w+\.ipynb)", "](../../notebooks/", last)


def _printed(cell):
    """What a cell printed, without what was only a sign of life."""
    outputs = [o for o in cell.get("outputs", []) if o.get("name") == "stdout"]
    text = "".join("".join(output["text"]) for output in outputs)
    return "".join(line for line in text.splitlines(keepends=True) if "\r" not in line)


def _outputs(cell):
    """Tables and texts that a cell showed, as Markdown, in order; what it printed between signs of
    life is one text.
    """
    printed = []
    for output in cell["outputs"]:
        if output.get("name") == "stdout":
            printed.append(output)
        elif shown := _shown(output):
            yield _as_text(_printed({"outputs": printed}))
            yield shown
            printed = []
    yield _as_text(_printed({"outputs": printed}))


def _shown(output):
    """A table or a text as Markdown; "" for pictures, bars and warnings."""
    data = {kind: "".join(text) for kind, text in output.get("data", {}).items()
            if kind.startswith("text/")}
    if "<table" in data.get("text/html", ""):
        return _as_table(data["text/html"])
    if "text/markdown" in data:
        return data["text/markdown"]
    if output["output_type"] == "execute_result" and len(output["data"]) == 1:
        return _as_text(data.get("text/plain", ""))
    return ""


def _figures(source, one):
    """Pictures that a cell saved, where pic/ has them."""
    saved = set(re.findall(r'"(\w+)"', source)) if "save(" in source else ()
    for figure in gallery.figures() if saved else ():
        is_ours = figure.model in ("", one.model) and figure.data in ("", one.data)
        if figure.name in saved and is_ours:
            yield f"![{gallery.ABOUT[figure.name]}](../../pic/{figure.file})"


def _as_text(text):
    """Printed text: a list where every line is a point, else as it was printed, the first LINES."""
    lines = text.strip("\n").splitlines()
    lines, more = lines[:LINES], len(lines) - LINES
    if not lines:
        return ""
    left = f"\n\n{more:,} more lines in the notebook." if more > 0 else ""
    if all(line.startswith(("- ", "  ")) for line in lines):
        return re.sub(r"([\\*_<~])", r"\\\1", "\n".join(lines)) + left
    return "\n".join(["```text", *lines, "```"]) + left


def _as_table(source):
    """An HTML table of pandas as Markdown, the first ROWS, an index of mere numbers left out."""
    import bs4

    soup = bs4.BeautifulSoup(source, "html.parser")
    rows = _grid(soup.find_all("tr"))
    body = [row for row in rows if any(cell.name == "td" for cell in row)]
    width = max(map(len, body), default=0)
    columns = {}
    for place in range(width):
        cells = [row[place] for row in body if len(row) == width]
        above = [_words(row[place]) for row in rows[: rows.index(body[0])] if len(row) > place]
        names = list(dict.fromkeys(filter(None, above)))
        is_index = all(cell.name == "th" for cell in cells)
        if is_index and not names and all(_words(cell).isdigit() for cell in cells):
            continue
        name = html.escape(" ".join(names[-1:] if is_index else names)).replace("|", "&#124;")
        name += " " * sum(known.strip() == name for known in columns)  # names may come twice
        columns[name] = [_words(cell) for cell in cells]
    table = pd.DataFrame(columns)
    more = len(table) - ROWS
    left = f"\n\n{more:,} more rows in the notebook." if more > 0 else ""
    return tables.markdown(table[:ROWS]) + left


def _words(cell):
    words = " ".join(cell.get_text().split())
    return "" if words in ("NaN", "nan") else words


def _grid(rows):
    """Cells of every row; one that spans several rows or columns stands in each of them."""
    grid, waiting = [], {}  # place -> (cell, rows it still spans)
    for row in rows:
        cells, line = iter(row.find_all(["th", "td"])), []
        cell = next(cells, None)
        while cell is not None or len(line) in waiting:
            if len(line) in waiting:
                above, left = waiting.pop(len(line))
                if left > 1:
                    waiting[len(line)] = above, left - 1
                line.append(above)
                continue
            for _ in range(int(cell.get("colspan", 1))):
                if (left := int(cell.get("rowspan", 1)) - 1) > 0:
                    waiting[len(line)] = cell, left
                line.append(cell)
            cell = next(cells, None)
        grid.append(line)
    return grid
