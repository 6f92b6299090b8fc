"""What a notebook found, in words and numbers of published rows: written between the marks
<!-- findings:opening --> and <!-- findings:closing --> of its first and last cell by
`python -m quantlab publish`, so that it can be read without a run.
"""

import re
import textwrap

import pandas as pd

from quantlab.system.files import root, write_text
from quantlab.workbook import notebooks, results, rivals, tables
from quantlab.workbook.methods import METHODS, config_of, name_of

MEANS = "means over calibration seeds, paired 95 % intervals"
COLUMNS = 104  # of a line of text in a cell
WIDTHS = ("8/8", "4/8", "4/4", "3/3", "2/4", "2/2", "2/2/8")
SETTERS = ("histogram", "percentile", "minmax")
GOALS = {  # points lost by learned networks: required and aimed at, set before they were measured
    "resnet20": {"8/8": (0.2, 0.2), "4/8": (0.2, 0.2), "4/4": (0.4, 0.3), "3/3": (1.4, 1.0),
                 "2/4": (2.0, 1.5), "2/2": (5.2, 4.0), "2/2/8": (None, 3.5)},
    "resnet50": {"8/8": (0.2, 0.1), "4/8": (0.2, 0.1), "4/4": (0.2, 0.0), "3/3": (0.8, 0.4),
                 "2/4": (1.5, 0.8), "2/2": (4.0, 2.5)},
}
FIRST_STEP = "the original's hist"
LADDER = (  # of notebook 10, between the original's hist and ours
    "BatchNorm kept as trained", "ranges from the float network", "the search works",
    "unsigned after ReLU", "codes stored once", "image and stream 8 bits, zero-point",
    "BatchNorm folded", "one scale a channel",
)
LAST_STEP = "best range of weights"
ALSO = {"BatchNorm kept as trained": "hist, BatchNorm kept"}  # the same network, measured first
CONVENTIONS = {  # words -> what changes of the config
    "2^b - 1 levels": {"weight_symmetric": True},
    "2^b levels": {"weight_symmetric": False},
    "first and last layer 8 bits": {"first_last_bits": 8},
    "residual stream float": {"residual_bits": None},
    "residual stream as few bits": {"residual_bits": "act_bits"},
    "image float": {"input_bits": None},
    "image as few bits": {"input_bits": "act_bits"},
    "first and last layer 8 bits, residual stream float":
        {"first_last_bits": 8, "residual_bits": None},
    "residual stream and image as few bits":
        {"residual_bits": "act_bits", "input_bits": "act_bits"},
    "BatchNorm re-estimation": {},
}


class Rows:
    """Published rows of one network, a row a configuration, and what is asked of them. A question
    without a row is answered by None.
    """

    def __init__(self, frame):
        self.all = frame = results.current(frame)
        self.model, self.dataset = frame.groupby(["model", "dataset"]).size().idxmax()
        self.frame = frame[(frame.model == self.model) & (frame.dataset == self.dataset)]
        self.summary = results.summarize(self.frame)
        self.low_bit = low_bit(self.summary)

    def __str__(self):
        return f"{self.model}, {self.dataset}, {self.summary.n_test.max():,} test images"

    def where(self, corrections="", **changes):
        """The row of a method by hand; changes: to `config_of(width)`, by `width` and fields."""
        width = changes.pop("width")
        config = config_of(width, **changes)
        found = self.summary[results.has_config(self.summary, config)
                             & self.summary.corrections.eq(corrections)]
        return found.iloc[-1] if len(found) else None

    def setter(self, width, observer):
        weights = "minmax" if observer == "minmax" else "lp"
        return self.where(width=width, observer=observer, weight_observer=weights)

    def method(self, width, method, **convention):
        """The row of a method of notebook 07, learned for as many iterations as most are.

        convention: fields of a QuantConfig, by default the notebook's.
        """
        learned = self.summary.corrections.str.extract(r", (\d+) iterations")[0].dropna()
        names = ["" if method == "nearest" else method]
        names += [f"{method}, {n} iterations" for n in learned.mode()]
        convention = convention or self.low_bit
        found = (self.where(name, width=width, **convention) for name in names)
        return next((row for row in found if row is not None), None)

    def learned(self, width, **convention):
        """(Method, its row) of a width: the first of `tables.LEARNED` that was measured there."""
        found = ((name, self.method(width, name, **convention)) for name in tables.LEARNED)
        return next((pair for pair in found if pair[1] is not None), None)

    def others(self):
        """Every other network on the same data set, and this one: Rows, the largest first."""
        parts = self.all[self.all.dataset == self.dataset].groupby("model")
        return [self if model == self.model else Rows(part) for model, part in parts][::-1]

    def methods(self, width, names=METHODS):
        """method -> row, of those measured at a width, the least loss first."""
        rows = {name: self.method(width, name) for name in names}
        rows = {name: row for name, row in rows.items() if row is not None}
        return dict(sorted(rows.items(), key=lambda pair: pair[1]["drop"]))

    def named(self, corrections):
        """Rows by exact name of what was done."""
        return self.frame[self.frame.corrections.eq(corrections)]

    def every_seed(self, summary):
        """The rows, one a seed, of which `summary` is the mean; None: none."""
        if summary is None:
            return self.frame[:0]
        return self.frame[self.frame.config_key.eq(summary.config_key)]


def low_bit(summary):
    """The convention of notebooks 06 to 08 for weights, as fields of a QuantConfig: all 2^b levels,
    where at least as many rows of their methods have them as have 2^b - 1.
    """
    learned = summary[summary.corrections.str.contains(" iterations")]
    counts = {symmetric: sum(results.has_config(learned, config_of(
        width, weight_symmetric=symmetric)).sum() for width in WIDTHS)
        for symmetric in (False, True)}
    return {"weight_symmetric": counts[True] > counts[False]}


def levels(fields):
    """Of a weight of b bits, in words."""
    return "2^b - 1 levels" if fields["weight_symmetric"] else "2^b levels"


def points(value):
    """As text, without a minus in front of nothing."""
    return f"{round(value, 2) + 0.0:.2f}"


def lost(row):
    """A row's points lost with their interval, as text."""
    return f"{points(row['drop'])} [{points(row.drop_low)}, {points(row.drop_high)}]"


def more(one, other):
    """Points of top-1 that rows `one` have more than `other`, mean over the seeds of both; None
    without any.
    """
    one, other = (rows.drop_duplicates("seed", keep="last").set_index("seed").top1
                  for rows in (one, other))
    both = (one - other).dropna()
    return both.mean() if len(both) else None


def steps(frame, bits):
    """step -> rows of one network on the ladder of notebook 10, from the original's hist to ours,
    one for every seed that all steps have; empty where there is none.
    """
    first = f"W{bits}A{bits} ladder: {FIRST_STEP}"  # where it is no row of the original's
    names = {FIRST_STEP: [f"{bits}bit hist", first]}
    for step in LADDER:
        also = (f"ladder: {step}", ALSO.get(step))
        names[step] = [f"W{bits}A{bits} {name}" for name in also]
    found = {step: frame[frame.corrections.isin(name)] for step, name in names.items()}
    ours = results.has_config(frame, config_of(f"{bits}/{bits}")) & frame.corrections.eq("")
    found[LAST_STEP] = frame[ours]
    found = {step: rows.drop_duplicates("seed") for step, rows in found.items()}
    common = set.intersection(*(set(rows.seed) for rows in found.values()))
    return {step: rows[rows.seed.isin(common)] for step, rows in found.items() if common}


# ---- 03 -----------------------------------------------------------------------------------------


def by_hand(rows):
    """Sentences of 03."""
    eight, four = rows.setter("8/8", "histogram"), rows.setter("4/4", "histogram")
    if eight is not None:
        seen = "more than these images' noise"
        if eight.drop_low <= 0:
            seen = "which these images cannot tell from none"
        yield (f"At 8 bits the network by hand loses {lost(eight)} points with histogram, "
               f"{seen}.")
    for bits in (4, 3):
        found = {name: rows.setter(f"{bits}/{bits}", name) for name in SETTERS}
        said = [f"{row['drop']:.2f} with {name}" for name, row in found.items() if row is not None]
        if said:
            yield f"At {bits} bits it loses {', '.join(said)}."
    whole = rows.summary.bytes[rows.summary.method == "float"]
    if four is not None and len(whole):
        yield (f"Weights at 4 bits take {four.bytes / 1000:,.0f} kB with their scales and biases, "
               f"in float {whole.iloc[0] / 1000:,.0f} kB.")


def by_hand_table(rows):
    """(What it shows, the table) of 03."""
    lines = []
    for bits in (8, 6, 4, 3):
        found = {name: rows.setter(f"{bits}/{bits}", name) for name in SETTERS}
        words = {name: "" if row is None else lost(row) for name, row in found.items()}
        lines.append({"Bits of weights and activations": bits, **words})
    return f"Points lost against float, by range setter ({rows})", pd.DataFrame(lines)


# ---- 06 and 07 ----------------------------------------------------------------------------------

LEARNED = ("nearest", "AdaRound", "BRECQ", "QDrop")


def learned_rounding(rows):
    """Sentences of 06."""
    outer = rows.methods("2/2/8", ("nearest", "QDrop"))
    if len(outer) == 2:
        top1 = [f"{outer[name].top1:.2f} %" for name in ("nearest", "QDrop")]
        yield (f"At {name_of('2/2/8')} nearest rounding scores {top1[0]} where float has "
               f"{outer['QDrop'].fp32_top1:.2f} %, codes learned by QDrop {top1[1]}.")
    for width in ("4/4", "3/3"):
        found = rows.methods(width, LEARNED)
        if len(found) > 1:
            words = [f"{name} {row['drop']:.2f}" for name, row in found.items()]
            yield f"Points lost at {name_of(width)}: {', '.join(words)}."


def methods_by_width(rows):
    """Sentences of 07."""
    found = {width: rows.methods(width) for width in ("4/4", "3/3", "2/2")}
    found = {width: methods for width, methods in found.items() if "nearest" in methods}
    if found:
        words = [f"{m['nearest']['drop']:.2f} at {name_of(width)}" for width, m in found.items()]
        yield f"Nearest rounding loses {', '.join(words)} (points)."
    yield from _learned_losses(rows)
    unlearned = METHODS[1:5]
    words = [(width, *next(iter(rows.methods(width, unlearned).items()), ()))
             for width in ("4/4", "3/3")]
    words = [f"{row['drop']:.2f} at {name_of(width)} ({name})"
             for width, name, row in (w for w in words if len(w) == 3)]
    if words:
        yield f"Of those that learn nothing, the best lose {' and '.join(words)}."
    yield from _beside_learned(rows)


def _learned_losses(rows):
    """What the method of a fixed order loses at each width."""
    groups = {}
    for width in ("4/4", "3/3", "2/2"):
        if found := rows.learned(width):
            name, row = found
            groups.setdefault(f"{name}, {row.seeds} seeds", []).append(
                f"{lost(row)} at {name_of(width)}")
    words = [f"{', '.join(said)} ({name})" for name, said in groups.items()]
    if words:
        yield ("Learned by the method that a fixed order names first, not picked on test images, "
               f"it loses {'; '.join(words)}.")


def _beside_learned(rows):
    """What training with labels and another tool lose at the same widths."""
    trained = {bits: _trained(rows, bits) for bits in (3, 2)}
    said = [f"{' to '.join(map(points, sorted(found['drop'])))} at W{bits}A{bits}"
            for bits, found in trained.items() if len(found)]
    words = [f"training with labels loses {' and '.join(said)}"] if said else []
    theirs = rivals.brevitas_losses(rows.summary)
    widths = [width for width in ("4/4", "3/3", "2/2") if width in theirs.index]
    if widths:
        least = [f"{theirs.loc[w].min():.2f} at {name_of(w)}" for w in widths]
        words.append("the better of Brevitas' two methods, in its own convention, "
                     f"{', '.join(least)}")
    if words:
        text = "; ".join(words)
        yield f"{text[0].upper()}{text[1:]}."


def _trained(rows, bits):
    """Rows of quantization-aware training (12) of a width, the shortest training first, with its
    steps and the learning rate of codes as text.
    """
    named = rows.summary[rows.summary.method.eq(f"W{bits}A{bits} QAT, learned steps")
                         & rows.summary.levels.eq(2**bits)]
    how = named.corrections.str.extract(r"LSQ, (?P<steps>\d+) steps.*codes (?P<rate>[\d.]+)")
    return named.assign(**how).sort_values("steps", key=lambda steps: steps.astype(float))


def _methods_table(rows, names, widths):
    lines = []
    for name in names:
        found = {width: rows.method(width, name) for width in widths}
        words = {name_of(w): "" if r is None else lost(r) for w, r in found.items()}
        lines.append({"Method": name, **words})
    about = f"Points lost against float, weights of {levels(rows.low_bit)} ({rows})"
    return about, pd.DataFrame(lines)


def learned_rounding_table(rows):
    """(What it shows, the table) of 06."""
    return _methods_table(rows, LEARNED, ("4/4", "3/3", "2/2", "2/2/8"))


def methods_by_width_table(rows):
    """(What it shows, the table) of 07."""
    return _methods_table(rows, METHODS, WIDTHS)


def goals_table(rows):
    """(What it shows, the table): what was learned at every width, of every network, beside the
    goal that was set before it was measured.
    """
    lines = []
    for network in rows.others():
        for width, (required, aim) in GOALS.get(network.model, {}).items():
            nearest = network.method(width, "nearest")
            name, row = network.learned(width) or ("nearest", nearest)
            if row is None:
                continue
            lines.append({
                "Network": network.model, "Width": name_of(width), "Method": name,
                "Levels": f"{int(row.levels)}", "Seeds": f"{row.seeds}", "Points lost": lost(row),
                "Nearest": "" if nearest is None else f"{nearest['drop']:.2f}",
                "Required": f"{required or ''}", "Aim": f"{aim}",
                "Reached": _reached(row, width, required, aim)})
    about = ("Beside the goals set beforehand, learned where that was measured; with activations "
             f"of 8 bits an interval that holds 0 is enough ({rows.dataset})")
    return about, pd.DataFrame(lines)


def _reached(row, width, required, aim):
    if row["drop"] <= aim:
        return "aim"
    from_none = row.drop_low > 0 or config_of(width).act_bits < 8
    return "no" if required is None or (row["drop"] > required and from_none) else "required"


def others_table(rows):
    """(What it shows, the table): other tools and training with labels beside ours."""
    bits = (8, 4, 3, 2)
    lines = []
    for name in (*rivals.INT8, *rivals.BREVITAS):
        own = rows.summary[rows.summary.method.eq(name)]
        found = {b: own[own.weight_bits.eq(b) & own.act_bits.eq(b)] for b in bits}
        lines.append(_losses(name, "its own", {b: r.iloc[0] for b, r in found.items() if len(r)}))
    for name in ("nearest", *tables.LEARNED[:1]):
        theirs = dict(weight_symmetric=False, residual_bits=None)
        found = {b: rows.method(f"{b}/{b}/8", name, **theirs) for b in bits}
        lines.append(_losses(f"ours, {name}", "Brevitas'", found))
    longest = max(len(_trained(rows, b)) for b in bits)
    for i in range(longest):
        found = {b: _trained(rows, b)[i : i + 1] for b in bits}
        found = {b: r.iloc[0] for b, r in found.items() if len(r)}
        steps = "/".join(dict.fromkeys(f"{int(row.steps):,}" for row in found.values()))
        rates = "/".join(dict.fromkeys(row.rate for row in found.values()))
        label = f"trained with labels, {steps} steps, codes at {rates}"
        lines.append(_losses(label, "ours", found))
    lines = [line for line in lines if any(list(line.values())[2:])]
    about = f"Points lost by other tools, and after training with labels ({rows})"
    return about, pd.DataFrame(lines)


def _losses(name, convention, found):
    """A line of `others_table`. found: bits -> row or None."""
    words = {b: lost(row) for b, row in found.items() if row is not None}
    return {"": name, "Convention": convention,
            **{f"W{b}A{b}": words.get(b, "") for b in (8, 4, 3, 2)}}


# ---- 08 -----------------------------------------------------------------------------------------


def gain(rows, width, convention):
    """Points of nearest rounding gained by a change of convention, the first seed; or None."""
    bits = config_of(width).act_bits
    changes = rows.low_bit | {name: bits if value == "act_bits" else value
                              for name, value in CONVENTIONS[convention].items()}
    step = "" if CONVENTIONS[convention] else convention
    frame = rows.frame[rows.frame.seed.eq(0)]
    row, base = (frame[results.has_config(frame, config_of(width, **fields))
                       & frame.corrections.eq(corrections)]
                 for fields, corrections in ((changes, step), (rows.low_bit, "")))
    return more(row, base)


def mixed_precision(rows):
    """Sentences of 08."""
    uniform = rows.where(width="3/8", **rows.low_bit)
    mixed = rows.summary[rows.summary.corrections.str.fullmatch(r"mixed precision, [\d.]+ kB")]
    mixed = mixed[mixed.symmetric.isin(results.NARROW) == rows.low_bit["weight_symmetric"]]
    if uniform is not None and len(mixed):
        mixed = mixed[mixed.bytes <= 1.001 * uniform.bytes].nsmallest(1, "drop")
        for row in mixed.itertuples():
            yield (f"A width for every layer loses {row.drop:.2f} points in {row.bytes / 1000:,.0f}"
                   f" kB of weights, 3 bits everywhere {uniform['drop']:.2f} (activations 8 bits).")
    gains = {name: [gain(rows, w, name) for w in ("4/4", "3/3")] for name in CONVENTIONS}
    gains = {name: pair for name, pair in gains.items()
             if None not in pair and name != levels(rows.low_bit)}
    if gains:
        said = [f"{name} {pair[0]:+.2f} and {pair[1]:+.2f}" for name, pair in (
            max(gains.items(), key=lambda item: item[1][1]),
            min(gains.items(), key=lambda item: item[1][1]))]
        yield f"Conventions alone move W4A4 and W3A3, in points: {', '.join(said)}."
    ours = rows.learned("2/2")
    theirs = rows.learned("2/2/8", residual_bits=None, **rows.low_bit)
    if ours and theirs and ours[0] == theirs[0]:
        yield (f"W2A2 by {ours[0]}, learned under each convention, loses {ours[1]['drop']:.2f} "
               f"points in ours ({ours[1].seeds} seeds) and {theirs[1]['drop']:.2f} in that of "
               f"most papers ({theirs[1].seeds}).")


def mixed_precision_table(rows):
    """(What it shows, the table) of 08."""
    lines = []
    for name in (n for n in CONVENTIONS if n != levels(rows.low_bit)):
        pair = {name_of(width): gain(rows, width, name) for width in ("4/4", "3/3")}
        words = {width: "" if value is None else f"{value:+.2f}" for width, value in pair.items()}
        if any(words.values()):
            lines.append({"Convention": name, **words})
    about = f"our convention with weights of {levels(rows.low_bit)}, nearest rounding, seed 0"
    return f"Points gained against {about} ({rows})", pd.DataFrame(lines)


# ---- 10 -----------------------------------------------------------------------------------------


def original_experiment(rows):
    """Sentences of 10."""
    summary, lines = rows.summary, tables.original()
    hist, fake = (summary[summary.corrections.eq(f"4bit {name}")] for name in ("hist", "fake-hist"))
    ours = rows.where(width="4/4")
    if len(hist) and len(fake) and ours is not None:
        theirs = lines.top1
        yield (f"Repeated its way at 4 bits, hist keeps {hist.top1.iloc[0]:.2f} % and fake-hist "
               f"{fake.top1.iloc[0]:.2f} % (the original, with ResNet-50: "
               f"{theirs['4bit hist']:.2f} and {theirs['4bit fake-hist']:.2f} %); "
               f"the right way keeps {ours.top1:.2f} % of {ours.fp32_top1:.2f} %.")
    said = []
    for bits in (4, 3):
        means = {step: part.top1.mean() for step, part in steps(rows.frame, bits).items()}
        changes = pd.Series(means, dtype=float).diff().dropna()
        if len(changes):
            up, down = changes.idxmax(), changes.idxmin()
            said.append(f"at {bits} bits “{up}” gains most ({changes[up]:+.1f} points) and "
                        f"“{down}” loses most ({changes[down]:+.1f})")
    if said:
        yield f"On the way from its hist to ours, {'; '.join(said)}."
    clipped, averaged = (more(rows.named(f"W4A4 {name}, BatchNorm moved"),
                              rows.named("4bit hist"))
                         for name in ("fake_hist_widest", "hist_averaged"))
    if clipped is not None and averaged is not None:
        yield (f"Leaving out the largest 0.01 % of every batch gives hist {clipped:+.1f} points, "
               f"averaging over batches {averaged:+.1f}.")


def original_experiment_table(rows):
    """(What it shows, the table) of 10."""
    shown = tables.original_table(rows.frame)
    return f"Top-1 in % (and points against float; {rows})", shown


# ---- 13 -----------------------------------------------------------------------------------------


def overview(frame):
    """The report's opening, as Markdown: at most five sentences, of the network with most rows and
    of the others beside it; "" without rows.

    frame: rows of `results.load`.
    """
    if not len(frame):
        return ""
    rows = Rows(frame)
    said = [*by_hand(rows)][:1] + [*methods_by_width(rows)][1:2] + [*_integers(rows)]
    said += [*original_experiment(rows)][:1] + [*_by_size(rows)]
    return "\n".join([f"**Found** ({rows}; {MEANS}):", "", *(f"- {text}" for text in said)])


def _integers(rows):
    for row in rows.summary[rows.summary.method.eq(tables.INTEGERS)].itertuples():
        yield (f"In integers alone it keeps {row.top1:.2f} % of float's {row.fp32_top1:.2f} %, its "
               f"weights in {row.bytes / 1000:,.0f} kB.")


def _by_size(own):
    found = {rows.model: rows.setter("4/4", "histogram") for rows in own.others()}
    words = [f"{model} {lost(row)}" for model, row in found.items() if row is not None]
    if len(words) > 1:
        yield f"Points lost at 4 bits by nearest rounding, by network: {', '.join(words)}."


# ---- README: the original's questions -----------------------------------------------------------

UNDONE = "W4A4 ours minus this: "


def answers(frame):
    """The original's six questions, each with what was measured and where, of the network with most
    published rows: a frame of strings. A question without rows is left out.
    """
    if not len(frame):
        return pd.DataFrame()
    rows = Rows(frame)
    lines = [(question, answer, _link(place)) for question, answer, place in _answers(rows)]
    return pd.DataFrame(lines, columns=["Its question", f"Measured on {rows}", "Where"])


def _answers(rows):
    """(question, answer, NOTEBOOK#ANCHOR) of each that has its rows."""
    integer = rows.summary[rows.summary.method.eq(tables.INTEGERS)]
    for row in integer.itertuples():
        yield ("The dataflow of one convolution",
               "8-bit codes, products of 16 bits, sums in int32, one fixed-point multiplier, 8-bit "
               f"codes; the whole network in integers: {row.top1:.2f} %, float "
               f"{row.fp32_top1:.2f} %",
               "11_questions#2.-The-dataflow-of-one-convolution,-BatchNorm-and-ReLU")
    ladder = steps(rows.frame, 4)
    if ladder:
        once, before = (ladder[step].top1.mean() for step in ("codes stored once",
                                                              "unsigned after ReLU"))
        yield ("How to raise accuracy: fusion and freeze",
               f"storing codes once, behind conv-BatchNorm-ReLU: {once - before:+.2f} points at 4 "
               "bits; multipliers computed in advance change no code but at a tie",
               "10_original_experiment#4.-The-ladder")
    four, whole = rows.setter("4/4", "histogram"), rows.setter("4/4", "minmax")
    own = rows.every_seed(four)
    if (won := more(own, rows.named(UNDONE + "one scale a channel"))) is not None:
        yield ("One layer's weights, and the trade-off", "one scale a channel instead of one a "
               f"tensor: {won:+.2f} points at 4 bits",
               "10_original_experiment#6.-Every-repair-alone,-from-both-ends")
    if (won := more(own, rows.every_seed(whole))) is not None:
        yield ("Input and output of a layer, and the error",
               f"ranges by least error instead of min-max: {won:+.2f} points at 4 bits",
               "03_quantize_by_hand#9.-8,-6,-4-and-3-bits")
    widths = {bits: rows.setter(f"{bits}/{bits}", "histogram") for bits in (8, 6, 4, 3)}
    said = [f"{bits} bits {row.top1:.2f} %" for bits, row in widths.items() if row is not None]
    if four is not None:
        yield ("Six bits and lower", f"{', '.join(said)} to nearest, weights of 2^b - 1 levels, "
               f"float {four.fp32_top1:.2f} %; learned rounding holds further down",
               "03_quantize_by_hand#9.-8,-6,-4-and-3-bits")
    twice = rows.named(UNDONE + "codes stored once, stream 8 bits")
    if (won := more(twice, own)) is not None:
        yield ("Before and after the activation", "rounding in front of every layer and ReLU, "
               f"stream included: {won:+.2f} points at 4 bits; the codes in front "
               "decide, finer ones behind bring nothing back",
               "10_original_experiment#6.-Every-repair-alone,-from-both-ends")


def _link(place):
    """NOTEBOOK#ANCHOR as a Markdown link that names the notebook's number and section."""
    notebook, anchor = place.split("#")
    section = anchor.split(".")[0]
    return f"[{notebook[:2]}.{section}](notebooks/{notebook}.ipynb#{anchor})"


# ---- Writing ------------------------------------------------------------------------------------

FINDINGS = {
    "03_quantize_by_hand": (by_hand, by_hand_table),
    "06_learned_rounding": (learned_rounding, learned_rounding_table),
    "07_low_bit_methods": (
        methods_by_width, methods_by_width_table, goals_table, others_table),
    "08_mixed_precision": (mixed_precision, mixed_precision_table),
    "10_original_experiment": (original_experiment, original_experiment_table),
}
LOW_BIT = ("06_learned_rounding", "07_low_bit_methods", "08_mixed_precision")


def findings(frame):
    """(notebook's name, "opening" or "closing") -> text, from published rows (`results.load`)."""
    texts = {}
    rows = Rows(frame) if len(frame) else None
    for name, (sentences, *make_tables) in FINDINGS.items():
        said = list(sentences(rows)) if rows else []
        means = MEANS
        if name in LOW_BIT and rows:
            means = f"weights of {levels(rows.low_bit)}; {MEANS}"
        opening = f"**Found** ({rows}; {means}). {' '.join(said)}" if said else ""
        texts[name, "opening"] = "\n".join(textwrap.wrap(opening, COLUMNS))
        made = [make(rows) for make in make_tables] if said else []
        shown = [f"{about}:\n\n{tables.markdown(table.astype(str))}"
                 for about, table in made if len(table)]
        texts[name, "closing"] = "**Published.** " + "\n\n".join(shown) if shown else ""
    return texts


def with_findings(source, texts, name):
    """A cell's source with what belongs between its marks."""
    for place in ("opening", "closing"):
        content = f"\n{texts[name, place]}\n".replace("\n\n\n", "\n\n")
        marks = rf"(<!-- findings:{place} -->).*?(<!-- /findings -->)"
        source = re.sub(marks, lambda m, c=content: m[1] + c + m[2], source, flags=re.DOTALL)
    return source


def update_notebooks():
    """Write findings into the notebooks' marks; the names of the files that changed."""
    import jupytext

    texts, changed = findings(results.load(results.published_path())), []
    for name in FINDINGS:
        script = root() / "notebooks" / f"{name}.py"
        if not script.is_file():
            continue
        notebook = jupytext.read(script)
        for cell in notebook.cells:
            cell.source = with_findings(cell.source, texts, name)
        files = script, script.with_suffix(".ipynb")
        for file, text in zip(files, notebooks.render(notebook, name)):
            if file.read_text(encoding="utf-8") != text:
                write_text(file, text)
                changed.append(file.name)
    return changed
