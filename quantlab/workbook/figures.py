"""Figures that the published rows suffice for, drawn without running a notebook.

    python -m quantlab figures                        # PDF, 89 and 183 mm, into results/figures
"""

import pandas as pd

from quantlab import plots
from quantlab.plots import ladder, lowbit, questions
from quantlab.plots.column import save_columns
from quantlab.system.errors import UserError
from quantlab.system.files import read_csv, root
from quantlab.workbook import findings, results, tables
from quantlab.workbook.methods import METHODS, config_of, name_of


def draw(frame):
    """(name, model, data set, figure) of every figure that published rows suffice for, of every
    network, the largest first, then of all networks together (model "").

    frame: rows of `results.load`.
    """
    frame = results.current(frame)
    networks = frame[["model", "dataset"]].drop_duplicates()
    for model, dataset in networks.sort_values("model", ascending=False).itertuples(index=False):
        rows = frame[(frame.model == model) & (frame.dataset == dataset)]
        for name, make in FIGURES.items():
            if (figure := make(rows)) is not None:
                yield name, model, dataset, figure
    for dataset, figure in small_against_large(frame).items():
        yield "13_small_against_large", "", dataset, figure


def _caption(rows, text):
    row = rows.iloc[-1]
    return plots.row_caption(row.dataset, row.model, row.n_test, f"test images, {text}")


def accuracy_by_bits(rows):
    """Of the range setters measured at several widths; None where there are none."""
    hand = results.equal_widths(rows)
    if not len(hand):
        return None
    hand = hand.assign(bits=hand.weight_bits.astype(int))
    text = f"up to {hand.seed.nunique()} calibration seeds, residual stream 8 bits"
    return plots.accuracy_by_bits(hand, _caption(hand, text))


def bits_heatmap(rows):
    """Weight bits against activation bits; None where they were not varied apart."""
    hand = rows[results.is_default(rows) & rows.corrections.eq("")]
    hand = hand[hand.weight_bits.between(2, 8) & hand.act_bits.between(2, 8)]
    widths = hand.groupby("weight_bits").act_bits.nunique()
    hand = hand[hand.weight_bits.isin(widths[widths > 2].index)]
    hand = hand[hand.act_bits.isin(hand.weight_bits)]
    if not len(hand):
        return None
    text = ("nearest rounding, weights of 2^b - 1 levels, residual stream and image 8 bits, "
            f"up to {hand.seed.nunique()} seeds")
    return questions.bits_heatmap(hand, _caption(hand, text))


def methods_by_width(rows):
    """Of rounding learned and not, beside other tools; None where nothing was learned."""
    tools = rows[rows.method.isin(["PT2E int8", "ONNX Runtime int8"])]
    learned = rows.corrections.str.extract(r", (\d+) iterations")[0]
    steps = learned.dropna().astype(int).max()
    names = rows.corrections.str.removesuffix(f", {steps} iterations").replace("", "nearest")
    rows = rows.assign(name=names)
    parts = []
    convention = findings.low_bit(rows)
    for width in findings.WIDTHS:
        same = rows[results.has_config(rows, config_of(width, **convention)) & names.isin(METHODS)]
        parts.append(same.assign(width=name_of(width).replace(", ", "\n"), method=same.name))
    drawn = pd.concat(parts)
    if drawn.method.nunique() < 2:
        return None
    order = {name: place for place, name in enumerate(METHODS)}
    drawn = drawn.sort_values("method", key=lambda names: names.map(order), kind="stable")
    text = f"weights of {findings.levels(convention)}; learned: {steps} iterations a unit; "
    text += "paired 95 % intervals, means of up to "
    text += f"{drawn.seed.nunique()} seeds"
    return lowbit.methods_by_width(drawn, tools, _caption(drawn, text))


def original_rows(rows):
    """The original's seven rows, its way and the right way; None where notebook 10 has not run."""
    if not rows.method.eq("original").any():
        return None
    summary, lines, drawn = results.summarize(rows), list(tables.original().itertuples()), []
    for line in lines:
        name = line.quantization.replace("fp32", "float")
        theirs = {"top1": line.top1, "drop": lines[0].top1 - line.top1}
        drawn.append({"quantization": name, "way": ladder.WAYS[0], **theirs})
        for way, chosen in zip(ladder.WAYS[1:], (tables.its_way, tables.right_way)):
            is_float = line is lines[0]
            found = summary[summary.method.eq("float") if is_float else chosen(summary, line)]
            for row in found.head(1).itertuples():
                ours = {"top1": row.top1, "drop": row.drop}
                ours |= {"low": row.drop_low, "high": row.drop_high}
                drawn.append({"quantization": name, "way": way, **ours})
    text = "paired 95 % intervals. The original's: ResNet-50 on the official CIFAR-10 files, one "
    text += "run without an interval, from its README"
    return ladder.original_rows(pd.DataFrame(drawn), _caption(rows, text))


def waterfall(rows):
    """The ladder of notebook 10 at 4 and 3 bits; None where it was not measured."""
    steps, seeds = [], []
    for bits in (4, 3):
        parts = findings.steps(rows, bits)
        if not parts:
            continue
        means = pd.Series({step: part.top1.mean() for step, part in parts.items()})
        frame = pd.DataFrame({"step": means.index, "top1": means.values, "bits": bits})
        steps.append(frame.assign(change=means.diff().values, low=float("nan"), high=float("nan")))
        seeds += [part.assign(step=step, bits=bits) for step, part in parts.items()]
    if not steps:
        return None
    n = pd.concat(seeds).seed.nunique()
    text = f"bars: means over {n} calibration seed(s), dots: each; right: what each step changed"
    return ladder.waterfall(pd.concat(steps), pd.concat(seeds), _caption(rows, text))


LEARNED_WIDTHS = ("4/8", "4/4", "3/3", "2/4", "2/2")


def networks_by_width(frame, dataset, widths=("8/8", "4/8", "4/4", "3/3"), method=""):
    """Rows of one method ("": nearest) of all networks on one data set, means over seeds: a frame
    of width (W4A8), model, drop, drop_low, drop_high, bytes, seeds, n_test, levels (of weights, in
    words); widths in order, the largest network first. All 2^b levels where every network has such
    rows.
    """
    summary = results.summarize(frame[frame.dataset == dataset])
    summary = summary[summary.corrections.str.fullmatch(method and rf"{method}, \d+ iterations")]
    tables = []
    for symmetric in (False, True):
        found = [(w, results.has_config(summary, config_of(w, weight_symmetric=symmetric)))
                 for w in widths]
        tables.append(pd.concat([summary[same].assign(width=name_of(w)) for w, same in found]))
    lacking = set(tables[1].model) - set(tables[0].model)
    rows = tables[bool(lacking)].assign(levels="2^b - 1 levels" if lacking else "2^b levels")
    rows = rows.sort_values("model", ascending=False, kind="stable")
    columns = ["width", "model", "drop", "drop_low", "drop_high", "bytes", "seeds", "n_test"]
    return rows[[*columns, "levels"]]


def small_against_large(frame):
    """{data set: figure} of `networks_by_width`, nearest and learned, where two networks or more
    have been measured.

    frame: rows of `results.current`.
    """
    figures = {}
    for dataset in frame.dataset.unique():
        nearest = networks_by_width(frame, dataset)
        methods = {f"nearest rounding, {level}": nearest for level in nearest.levels[:1]}
        learned = networks_by_width(frame, dataset, LEARNED_WIDTHS, "QDrop")
        learned = learned[learned.groupby("width").model.transform("nunique") > 1]
        if len(learned):
            methods[f"learned by QDrop, {learned.levels.iloc[0]}"] = learned
        if nearest.model.nunique() > 1:
            table = pd.concat([part.assign(method=name) for name, part in methods.items()])
            fewest, most = table.seeds.min(), table.seeds.max()
            seeds = f"{most if fewest == most else f'{fewest} to {most}'} calibration seed(s)"
            text = f"{dataset}, n = {table.n_test.max():,} test images; means of {seeds}; "
            figures[dataset] = lowbit.networks_by_bits(
                table, text + "lines: paired 95 % interval")
    return figures


def what_a_bit_buys(rows):
    """Points, bytes and time by width; None where results/bench.csv has no times of this network's
    integers, or no width of them was measured.
    """
    path, widths = root() / "results" / "bench.csv", ("8/8", "4/8", "4/4", "2/2")
    model, dataset = rows[["model", "dataset"]].iloc[-1]
    if not path.is_file():
        return None
    times = read_csv(path)
    times = times[(times.section == "integer") & (times.model == model) & (times.batch == 64)]
    timed = times[times.what.str.contains("W4A4")]
    if not len(timed):
        return None
    times = times[times.device == timed.device.iloc[-1]].set_index("what")
    ms = 1000 / times.images_per_s.rename(lambda what: what.removeprefix("integer only "))
    table = networks_by_width(rows, dataset, widths)
    table = table[table.width.isin(ms.index)]
    table = table.assign(ms=ms[table.width].to_numpy(), megabytes=table.bytes / 1e6)
    if not len(table):
        return None
    marks = {name: ms[what] for name, what in (("float", "float"), ("built-in int8", "eager int8"))
             if what in ms}
    text = f"nearest rounding, weights of {table.levels.iloc[0]}; time: batch 64, "
    text += times.device.iloc[-1]
    return plots.what_a_bit_buys(table, marks, _caption(rows, text))


FIGURES = {
    "03_accuracy_by_bits": accuracy_by_bits, "07_methods_by_width": methods_by_width,
    "10_seven_rows": original_rows, "10_ladder": waterfall, "11_heatmap": bits_heatmap,
    "09_what_a_bit_buys": what_a_bit_buys,
}
OF_A_RUN = {"10_ladder": "10_original_experiment"}  # rows lack the intervals of its steps


# ---- Commands ------------------------------------------------------------------------------------


def save_figures(widths, formats):
    """Draw what published rows suffice for, into pic/ and, in widths (mm) and formats, into
    results/figures; yields a line about each. pic/ keeps a figure of OF_A_RUN that a full run of
    its notebook drew.
    """
    frame = results.load(results.published_path())
    if not len(frame):
        raise UserError("published.csv has no rows to draw; run: make results DATA=PATH, then "
                        "python -m quantlab publish")
    for name, model, dataset, figure in draw(frame):
        had, full = [], "_".join(filter(None, (name, model, dataset)))
        page = root() / "results" / "pages" / f"{OF_A_RUN.get(name)}-{model}-{dataset}.md"
        if not page.is_file():
            plots.save(figure, name, dataset, model)
            had.append("pic")
        for width in widths:
            try:
                save_columns(figure, full, [width], formats)
                had.append(f"{width} mm")
            except UserError as error:
                yield f"left out: {error}"
        yield f"{full}: {', '.join(had) or 'as its notebook drew it'}"
