"""Rows in words: the tables of the README, each written from committed files by `python -m quantlab publish`."""

import pathlib
import re

import pandas as pd

from quantlab.system.errors import UserError
from quantlab.system.files import root, write_text
from quantlab.workbook import results

BEST = "QDrop"  # the correction whose rows the README shows, alone, tuned end to end and fine-tuned
ORIGINAL_FLOAT = 93.62  # top-1 in %, ResNet-50 on the official CIFAR-10 files: the original's README, as the next
ORIGINAL = {"8bit built-in": 93.62, "8bit hist": 93.52, "8bit fake-hist": 93.41, "4bit hist": 64.62, "4bit fake-hist": 88.55, "3bit fake-hist": 50.76}


def headline(frame, best=None):
    """The original's table and ours: one line a method, in its words, with the interval of the drop; a frame of strings.

    A smoke run never enters a headline: rows of the digits are shown only where nothing else is there, and say what they are.
    best: only the built-in paths, both ends of rounding to nearest, and the rows of this correction ("QDrop"), as the README has them.
    """
    if best:
        frame = frame[_is_brief(frame, best)]
    frame = results.current(frame[frame.method != "ablation"])  # steps between two methods belong to the notebook that takes them
    swept = results.equal_widths(frame).index
    summary = results.summarize(frame[(frame.method != "by hand") | frame.index.isin(swept) | (not len(swept)) | bool(best)])
    lines = []
    family = summary.method.map({"float": 0, "by hand": 2}).fillna(1)
    order = ["dataset", "model", "family", "act_bits", "drop"]
    for _, row in summary.assign(family=family).sort_values(order, ascending=[True, False, True, False, True]).iterrows():
        lost = "" if row.method == "float" else f"{row['drop']:+.2f} [{row.drop_low:+.2f}, {row.drop_high:+.2f}]".replace("+-", "-")
        deviation = f" ± {row.top1_std:.2f}" if row.seeds > 1 else ""
        lines.append({
            "Data set": row.dataset + (" (smoke run)" if row.dataset == results.SMOKE else ""), "Model": row.model, "Quantization": results.label(row),
            "Top-1 %": f"{row.top1:.2f}{deviation}", "Points lost [95 %]": lost, "Weights kB": f"{row.bytes / 1000:,.0f}",
            "n": f"{row.n_test:,}", "Seeds": int(row.seeds),
        })
    return pd.DataFrame(lines)


def _is_brief(frame, best):
    """True for the rows of a brief headline."""
    corrections = frame.corrections.fillna("").astype(str)
    plain = frame.method.eq("by hand") & frame.weight_bits.isin([8, 4, 3, 2]) & frame.residual_bits.eq(8) & frame.input_bits.eq(8) & frame.placement.eq("fused")
    nearest = corrections.eq("") & frame.observer.isin(["minmax", "histogram"]) & frame.weight_bits.eq(frame.act_bits)
    other = frame.method.isin(["float", "eager int8", "PT2E int8", "ONNX Runtime int8"]) | frame.method.str.fullmatch("integer only .*single rounding")
    return other | plain.fillna(False).astype(bool) & (nearest | corrections.str.match(rf"{best}( \+ (end to end|fine-tuning))?,"))


def original_table(frame):
    """The original's rows beside ours its way and the right way (notebook 08): a frame of strings; empty before that notebook has run."""
    frame = results.current(frame)
    ours = frame[frame.method.eq("original")]
    if not len(ours):
        return pd.DataFrame()
    own = results.summarize(ours).set_index("corrections")
    plain = results.is_default(frame) & frame.corrections.fillna("").eq("") & frame.weight_bits.eq(frame.act_bits).fillna(False).astype(bool)
    right = results.summarize(frame[plain]).set_index("weight_bits")
    built_in = results.summarize(frame[frame.method.eq("eager int8")])
    lines = [{"Quantization": "fp32", "Original": f"{ORIGINAL_FLOAT:.2f}", "Its way": f"{own.fp32_top1.iloc[0]:.2f}", "Right way": f"{own.fp32_top1.iloc[0]:.2f}"}]
    for name, published in ORIGINAL.items():
        key = next((k for k in own.index if k.startswith(name)), None)
        same = built_in.top1.iloc[0] if "built-in" in name and len(built_in) else right.top1.get(int(name[0])) if "built-in" not in name else None
        lines.append({
            "Quantization": name.replace("bit ", " bits, "), "Original": f"{published:.2f} ({published - ORIGINAL_FLOAT:+.2f})",
            "Its way": "" if key is None else f"{own.top1[key]:.2f} ({-own['drop'][key]:+.2f})",
            "Right way": "" if same is None else f"{same:.2f} ({same - own.fp32_top1.iloc[0]:+.2f})",
        })
    return pd.DataFrame(lines)


def speed_table(frame):
    """results/bench.csv in words: throughput against the side named "against", one column a network, one line a measurement and processor."""
    frame = frame[frame.what != frame.against]
    frame = frame.assign(
        Network=frame.model + ", batch " + frame.batch.astype(str), What=frame.section, Measured=frame.what, On=frame.device,
        ratio=[f"{1 / r.time_ratio:.2f} [{1 / r.time_ratio_most:.2f}, {1 / r.time_ratio_least:.2f}]" for r in frame.itertuples()],
    )
    return frame.pivot_table("ratio", ["What", "Measured", "On"], "Network", aggfunc="last", sort=False, fill_value="").reset_index()


def markdown(table):
    """A frame of strings as a Markdown table, numbers to the right."""
    right = {"Top-1 %", "Points lost [95 %]", "Weights kB", "n", "Seeds", "Original", "Its way", "Right way"}
    lines = [" | ".join(table.columns), " | ".join("---:" if c in right else "---" for c in table.columns)]
    lines += [" | ".join(str(v) for v in row) for row in table.itertuples(index=False)]
    return "\n".join(f"| {line} |" for line in lines)


def publish(readme=None):
    """Move the newest local rows into published.csv and write the README's tables from it; smoke runs stay local. Returns the number of rows."""
    local = results.newest(results.load())
    local = local[(local.dataset != results.SMOKE) & (local.n_test == local.groupby("data_sha").n_test.transform("max"))]  # no smoke presets either
    if not len(local):
        raise UserError("nothing to publish: results.csv has no rows of a real data set; run: make results DATA=PATH")
    published = results.load(results.published_path())
    frame = results.newest(pd.concat([published, local]) if len(published) else local)
    results.write(frame, results.published_path())
    update_readme(readme)
    return len(local)


def update_readme(readme=None):
    """Replace what stands between the README's <!-- table:NAME --> marks by tables from published.csv and results/bench.csv."""
    readme = pathlib.Path(readme or root() / "README.md")
    published, bench = results.load(results.published_path()), root() / "results" / "bench.csv"
    frame = results.current(published)
    devices, versions = (" and ".join(frame[name].unique()) for name in ("device", "torch"))
    texts = {"headline": f"{markdown(headline(published, best=BEST))}\n\n" + (
        f"Top-1 on the full test set (n and calibration seeds per row; ± is the deviation between seeds) on {devices}, torch {versions}, "
        "1,024 calibration images. The interval is paired, against the float network on the same test images. Weights kB: packed codes, scales "
        "and biases; for other tools the saved file. `python -m quantlab publish` writes this table from `results/published.csv`, which "
        "`make results DATA=PATH` measures."
    )}
    if len(original := original_table(published)):
        own = frame[frame.method.eq("original")].iloc[0]
        texts["original"] = f"{markdown(original)}\n\n" + (
            f"Top-1 in % (and points against float). *Original*: ResNet-50, official CIFAR-10 files, its README, one run. *Its way* and *right way*: "
            f"{own.model} on {own.dataset}, n = {own.n_test:,}, {frame[frame.method.eq('original')].seed.nunique()} calibration seeds below 8 bits."
        )
    if bench.is_file():
        measured = pd.read_csv(bench)
        version = ", ".join(measured.torch.unique())
        texts["speed"] = f"{markdown(speed_table(measured))}\n\n" + (
            f"How many times the images a second of float, eager (`reconstruct`: iterations against those of the float unit); median over rounds [least, most], "
            f"torch {version}: `python -m quantlab bench` measures both sides in turn, `results/bench.csv` has images a second."
        )
    text = readme.read_text(encoding="utf-8")
    for name, table in texts.items():
        text = re.sub(rf"(<!-- table:{name} -->).*?(<!-- /table -->)", lambda m, s=table: f"{m[1]}\n{s}\n{m[2]}", text, flags=re.DOTALL)
    write_text(readme, text)
