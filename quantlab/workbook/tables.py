"""Rows in words: the tables of the README, each written from committed files by
`python -m quantlab publish`. What is said around them stands in README.md itself.
"""

import functools
import html
import pathlib
import re

import pandas as pd

from quantlab.config import QuantConfig
from quantlab.system.errors import UserError
from quantlab.system.files import PACKAGE, read_csv, read_text, root, write_text
from quantlab.workbook import results

# The rows of the headline, of every network: float, of the tools the one that loses least on the
# test images, integers alone, and at each width one method: the first of these that was measured
# there, in an order fixed beforehand and not by accuracy, all 2^b levels before 2^b - 1.
TOOLS = ("eager int8", "PT2E int8", "ONNX Runtime int8")
INTEGERS = "integer only W8A8, single rounding"
BITS = ("weight_bits", "act_bits")
WIDTHS = (4, 3, 2)  # of weights and activations
LEARNED = (*(f"QDrop + {kind}fine-tuning" for kind in ("augmented ", "long ", "")), "QDrop")


def headline(frame, brief=False):
    """Our rows, one line a method, in words, with the interval of the drop: a frame of strings,
    the largest network first.

    A smoke run never enters a headline: rows of the digits are shown only where nothing else is
    there, and say what they are. brief: six rows a network, chosen by rule, as in the README.
    """
    frame = results.current(frame[frame.method != "ablation"])  # steps belong to their notebook
    summary = results.summarize(frame)
    if brief:
        summary = summary[_is_brief(summary)]
    elif len(swept := results.equal_widths(frame)):
        shown = summary.config_key.isin(swept.config_key) | summary.corrections.ne("")
        summary = summary[summary.method.ne("by hand") | shown]
    family = summary.method.map({"float": 0, "by hand": 2}).fillna(1)
    order = ["dataset", "model", "family", "act_bits", "drop"]
    ascending = [True, False, True, False, True]
    rows = summary.assign(family=family).sort_values(order, ascending=ascending)
    return pd.DataFrame([_headline_row(row) for _, row in rows.iterrows()])


def _headline_row(row):
    lost = f"{row['drop']:+.2f} [{row.drop_low:+.2f}, {row.drop_high:+.2f}]".replace("+-", "-")
    deviation = f" ± {row.top1_std:.2f}" if row.seeds > 1 else ""
    return {
        "Data set": row.dataset + (" (smoke run)" if row.dataset == results.SMOKE else ""),
        "Model": row.model, "Quantization": results.label(row).replace("fp32 original", "float"),
        "Top-1 %": f"{row.top1:.2f}{deviation}",
        "Points lost [95 %]": "" if row.method == "float" else lost,
        "Weights kB": f"{row.bytes / 1000:,.0f}", "n": f"{row.n_test:,}", "Seeds": int(row.seeds),
    }


def _is_brief(summary):
    """bool Series: the rows of a summary that a headline shows."""
    tools = summary[summary.method.isin(TOOLS)]
    least = tools.groupby(["dataset", "model"])["drop"].transform("min")
    chosen = summary.method.isin(["float", INTEGERS]) | summary["drop"].eq(least)
    every = results.has_config(summary, QuantConfig(weight_symmetric=False), free=BITS)
    for _, part in summary.groupby(["dataset", "model"]):
        for bits in WIDTHS:
            there = part[part.weight_bits.eq(bits) & part.act_bits.eq(bits)]
            named = [there[convention[there.index] & there.corrections.str.startswith(f"{m},")]
                     for convention in (every, results.is_default(summary)) for m in LEARNED]
            chosen[next((rows.index for rows in named if len(rows)), [])] = True
    return chosen


def original():
    """The original's rows, as its README has them, by name: a frame of quantization (in words),
    bits, corrections (of our rows that repeat it), right_way (our method instead), top1 in %.
    """
    places = (root(), PACKAGE.parent)  # its numbers are the same in every workbook
    files = [place / "results" / "original.csv" for place in places]
    file = next(file for file in files if file.is_file())
    return read_csv(file, index_col="name", dtype={"bits": "Int64"})


def original_table(frame, model=None):
    """The original's rows beside ours its way and the right way (notebook 10), of one network or of
    every one, the original's own first: top-1 in % (points against float, 95 % interval), as a
    frame of strings; empty before that notebook has run.
    """
    frame = results.current(frame)
    frame = frame if model is None else frame[frame.model == model]
    published = original()
    lines = list(published.itertuples())
    theirs = published.top1
    columns = {"Quantization": published.quantization}
    columns["Original"] = [f"{v:.2f}" + (f" ({v - theirs.iloc[0]:+.2f})" if i else "")
                           for i, v in enumerate(theirs)]
    repeated = frame[frame.method == "original"][["model", "dataset"]].drop_duplicates()
    repeated = repeated.sort_values(["model", "dataset"], ascending=[False, True])
    for model, dataset in repeated.itertuples(index=False):
        summary = results.summarize(frame[(frame.model == model) & (frame.dataset == dataset)])
        for way, chosen in (("its way", its_way), ("right way", right_way)):
            found = [summary[chosen(summary, line)] for line in lines[1:]]
            texts = [f"{summary.fp32_top1.iloc[0]:.2f}", *map(_against_float, found)]
            columns[f"{model} on {dataset}, {way}"] = texts
    return pd.DataFrame(columns) if len(repeated) else pd.DataFrame()


def its_way(summary, line):
    """bool Series: where a summary repeats a line of `original`."""
    return summary.method.eq("original") & summary.corrections.eq(line.corrections)


def right_way(summary, line):
    """bool Series: where a summary has what this workbook does instead of a line of `original`."""
    if line.right_way != "by hand":
        return summary.method.eq(line.right_way)
    widths = summary.weight_bits.eq(line.bits) & summary.act_bits.eq(line.bits)
    plain = results.is_default(summary) & summary.corrections.eq("")
    return plain & widths.fillna(False).astype(bool)


def _against_float(found):
    """The first of some rows as text: top-1, points against float, their 95 % interval."""
    if not len(found):
        return ""
    row = found.iloc[0]
    low, high = -row.drop_high, -row.drop_low
    return f"{row.top1:.2f} ({-row['drop']:+.2f} [{low:+.2f}, {high:+.2f}])"


# ---- Speed --------------------------------------------------------------------------------------


def speed_table(frame, brief=False):
    """results/bench.csv in words: throughput against the side named "against", one column a
    network, one line a measurement and processor.

    brief: networks of batch 64 against float on the processor measured last, medians only; a batch
    of one varies several-fold where two cores are shared, as its spread in the file says.
    """
    frame = frame[frame.what != frame.against]
    ratios = [f"{1 / r.time_ratio:.2f}" if brief else
              f"{1 / r.time_ratio:.2f} [{1 / r.time_ratio_most:.2f}, {1 / r.time_ratio_least:.2f}]"
              for r in frame.itertuples()]
    frame = frame.assign(
        Network=frame.model + ", batch " + frame.batch.astype(str), What=frame.section,
        Measured=frame.what, On=frame.device, ratio=ratios,
    )
    lines = ["What", "Measured", "On"]
    if brief:
        frame = frame[(frame.section == "integer") & (frame.batch == 64)]
        frame, lines = frame[frame.device == frame.device.iloc[-1]], ["Measured"]
    frame = frame.sort_values("model", ascending=False, kind="stable")  # the largest first
    table = frame.pivot_table("ratio", lines, "Network", aggfunc="last", sort=False, fill_value="")
    return table.reset_index().rename(columns={"Measured": "Times float"} if brief else {})


def _numeric(table):
    """Whether each column begins with a number in every row."""
    return [all(re.match(r"[+-]?\d|$", str(v)) for v in table[name]) for name in table.columns]


def markdown(table):
    """A frame of strings as a Markdown table, columns of numbers to the right."""
    numeric = _numeric(table)
    lines = [" | ".join(table.columns), " | ".join("---:" if n else "---" for n in numeric)]
    lines += [" | ".join(_cell(v) for v in row) for row in table.itertuples(index=False)]
    return "\n".join(f"| {line} |" for line in lines)


# ---- For reports --------------------------------------------------------------------------------

LATEX = {"\\": r"\textbackslash{}", "±": r"$\pm$", "~": r"\textasciitilde{}",
         "^": r"\textasciicircum{}", **{sign: "\\" + sign for sign in "&%$#_{}"}}


def latex(table):
    """A frame of strings as a LaTeX tabular with booktabs' rules, columns of numbers to the right.
    """
    columns = "".join("r" if numeric else "l" for numeric in _numeric(table))
    lines = [" & ".join(map(_escaped, row)) + r" \\" for row in (table.columns, *table.values)]
    begin, end = f"\\begin{{tabular}}{{{columns}}}", r"\end{tabular}"
    rows = [r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule"]
    return "\n".join([begin, *rows, end, ""])


def _escaped(value):
    text = "".join(LATEX.get(sign, sign) for sign in str(value))
    return re.sub(r"(?<!\w)-(?=[\d.])", "$-$", text)  # a minus, not a hyphen


def save_tables(names=(), formats=("tex", "csv")):
    """Write results/tables/NAME.tex and .csv of published rows (none named: all that have rows);
    the paths. UserError for a table that has none.
    """
    published, bench = results.load(results.published_path()), root() / "results" / "bench.csv"
    makers = {
        "headline": lambda: headline(published, brief=True),
        "original": lambda: original_table(published),
        "speed": lambda: speed_table(read_csv(bench)) if bench.is_file() else pd.DataFrame(),
        "all": lambda: headline(published),
    }
    makers |= {name: functools.partial(_of_notebook, name, published) for name in OF_NOTEBOOKS}
    frames = {name: makers[name]() for name in names or makers}
    empty = [name for name, frame in frames.items() if not len(frame)]
    if empty and (names or len(empty) == len(frames)):
        raise UserError(f"table {empty[0]} has no rows; measure them with make results DATA=PATH "
                        "and publish them with python -m quantlab publish")
    paths = []
    for name, frame in frames.items():
        for suffix in formats if len(frame) else ():
            text = latex(frame) if suffix == "tex" else frame.to_csv(index=False)
            paths.append(root() / "results" / "tables" / f"{name}.{suffix}")
            write_text(paths[-1], text)
    return paths


OF_NOTEBOOKS = {  # tables with which 07 and 08 end, and the functions of findings that make them
    "methods": "methods_by_width_table", "goals": "goals_table", "tools": "others_table",
    "conventions": "mixed_precision_table"}


def _of_notebook(name, published):
    """A table of OF_NOTEBOOKS, its network in the first column."""
    from quantlab.workbook import findings  # here, as it reads what this module defines

    if not len(published):
        return published
    rows = findings.Rows(published)
    table = getattr(findings, OF_NOTEBOOKS[name])(rows)[1]
    if "Network" not in table:
        table.insert(0, "Network", rows.model)
    return table


def _cell(value):
    """A name may hold what Markdown or HTML take for their own."""
    return html.escape(str(value), quote=False).replace("|", "&#124;")


# ---- Publishing ---------------------------------------------------------------------------------


def publish(readme=None):
    """Move the newest local rows into published.csv and write the README's tables from it; smoke
    runs stay local. Returns the number of rows.

    Without local rows it writes both again from what is published, in today's columns.
    """
    local = results.newest(results.load())
    most = local.groupby("data_sha").n_test.transform("max")  # a smoke preset looks at fewer images
    local = local[(local.dataset != results.SMOKE) & (local.n_test == most)]
    published = results.load(results.published_path())
    if not len(local) and not len(published):
        raise UserError("nothing to publish: results.csv has no rows of a real data set; "
                        "run: make results DATA=PATH")
    results.write(results.newest(pd.concat([published, local])), results.published_path())
    update_readme(readme)
    return len(local)


def update_readme(readme=None):
    """Replace what stands between the README's <!-- table:NAME --> marks by tables from
    published.csv and results/bench.csv.
    """
    readme = pathlib.Path(readme or root() / "README.md")
    text = read_text(readme)
    for name, content in readme_tables().items():
        marks = rf"(<!-- table:{name} -->).*?(<!-- /table -->)"
        text = re.sub(marks, lambda m, c=content: m[1] + c + m[2], text, flags=re.DOTALL)
    write_text(readme, text)


def readme_tables():
    """What is generated in the README, by the name of its mark: tables, and their processors."""
    from quantlab.workbook.findings import answers  # here, as it reads what this module defines

    published, bench = results.load(results.published_path()), root() / "results" / "bench.csv"
    frames = {"headline": headline(published, brief=True), "answers": answers(published)}
    frames |= {f"original-{m}": original_table(published, m) for m in ("resnet50", "resnet20")}
    tables = {}
    if bench.is_file():
        speeds = read_csv(bench)
        frames["speed"] = speed_table(speeds, brief=True)
        integer = speeds[(speeds.section == "integer") & (speeds.batch == 64)].device
        tables["processor"] = integer.iloc[-1] if len(integer) else ""
    tables |= {name: f"\n{markdown(frame)}\n" for name, frame in frames.items() if len(frame)}
    devices = "; ".join(results.current(published).device.unique())
    return {**tables, "devices": devices}
