"""One tidy row per measured configuration: results/results.csv (local, grows) and results/published.csv (committed, what the README shows).

A row carries everything its number depends on. `run_key` identifies the configuration; a table takes the newest row per (run_key, seed).
"""

import datetime
import hashlib
import json
import pathlib

import filelock
import pandas as pd
import torch

from quantlab.config import QuantConfig
from quantlab.evaluate import paired_drop
from quantlab.observers import observer_name
from quantlab.system.errors import UserError
from quantlab.system.files import PACKAGE, atomic_path, commit, root, write_text

CONFIGURATION = [
    "dataset", "data_sha", "n_test", "model", "checkpoint_sha", "trained_on", "method", "weight_bits", "act_bits", "first_last_bits",
    "residual_bits", "input_bits", "placement", "granularity", "symmetric", "observer", "weight_observer", "corrections", "n_calibration",
]
MEASURED = ["fp32_top1", "top1", "drop", "drop_low", "drop_high", "bytes", "seconds", "images_per_s"]
PROVENANCE = ["seed", "device", "torch", "commit", "notebook", "created"]
COLUMNS = ["run_key", *CONFIGURATION, *MEASURED, *PROVENANCE]
SMOKE = "digits"


def local_path():
    return root() / "results" / "results.csv"


def published_path():
    return root() / "results" / "published.csv"


def make_row(*, data, model, card, baseline, result, method, notebook, config=None, n_calibration=0, seed=0, bytes=0, corrections="", **more):
    """A dict with every column: `result` (an Evaluation) beside `baseline`, the float network on the same images.

    data: Dataset. model: its name. card: of the checkpoint. config: the QuantConfig, None for float and built-in methods, whose columns
    `more` may fill. bytes: size of the weights as stored. top1 and drop in percent and points, seconds of wall clock.
    """
    drop, low, high = paired_drop(baseline.correct, result.correct)
    row = {
        "dataset": data.name, "data_sha": data.fingerprint[:12], "n_test": result.n, "model": model, "checkpoint_sha": card.sha256[:12],
        "trained_on": card.trained_on, "method": method, "corrections": corrections, "n_calibration": n_calibration,
        **describe(config), **more,
        "fp32_top1": baseline.top1, "top1": result.top1, "drop": drop, "drop_low": low, "drop_high": high, "bytes": bytes,
        "seconds": round(result.seconds, 3), "images_per_s": round(result.images_per_s, 1), "seed": seed, "device": result.device,
        "torch": torch.__version__, "commit": commit(), "notebook": notebook,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
    }
    row["run_key"] = run_key(row)
    return {column: row.get(column) for column in COLUMNS}


def describe(config):
    """The columns that a QuantConfig decides."""
    if config is None:
        return {}
    names = ("weight_bits", "act_bits", "first_last_bits", "residual_bits", "input_bits", "placement")
    symmetric = {(True, True): "both", (True, False): "weights", (False, True): "activations", (False, False): "neither"}
    return {
        **{name: getattr(config, name) for name in names},
        "granularity": "channel" if config.per_channel else "tensor",
        "symmetric": symmetric[config.weight_symmetric, config.act_symmetric],
        "observer": observer_name(config.observer),
        "weight_observer": f"lp(p={config.weight_norm:g})" if config.weight_observer == "lp" else config.weight_observer,
    }


def is_default(frame, free=("weight_bits", "act_bits")):
    """bool Series: the rows by hand whose configuration is QuantConfig()'s, but for the columns in `free`."""
    like = {"method": "by hand"} | {k: v for k, v in describe(QuantConfig()).items() if k not in free}
    same = [frame[k].isna() if v is None else frame[k].eq(v).fillna(False).astype(bool) for k, v in like.items()]
    return pd.concat(same, axis=1).all(axis=1)


def run_key(row):
    """Twelve hex digits of everything but the seed that decides a number."""
    settings = json.dumps([str(row.get(column)) for column in CONFIGURATION])
    return hashlib.sha256(settings.encode()).hexdigest()[:12]


def record(rows, path=None):
    """Append rows (dicts of make_row) to results.csv and return them as a frame; safe against a kill and against several writers."""
    path = pathlib.Path(path or local_path())
    new = pd.DataFrame(rows, columns=COLUMNS)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(path.with_suffix(".lock"))
        with lock:
            old = load(path)
            write(pd.concat([old, new]) if len(old) else new, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; free space there or set QUANTLAB_ROOT") from None
    return new


ARITHMETIC = (".", "images", "networks", "improving", "analysis")  # the rooms that decide a number


def once(settings, measure):
    """The row that measure(state) returns, recorded at once; with the same settings a later call returns it again and measures nothing.

    settings: a dict of everything but the code that decides the number; the modules that compute and torch's version are added here. state:
    a path for what a long measurement keeps to resume after a kill; deleted when the row is recorded. Rows are kept in results/rows.
    """
    code = hashlib.sha256(b"".join(f.read_bytes() for room in ARITHMETIC for f in sorted((PACKAGE / room).glob("[a-z]*.py"))))
    key = hashlib.sha256(json.dumps([settings, code.hexdigest(), torch.__version__], sort_keys=True, default=str).encode()).hexdigest()[:16]
    file = root() / "results" / "rows" / f"{key}.json"
    if file.is_file():
        row = json.loads(file.read_text(encoding="utf-8"))
        if row["created"] not in set(load().created):
            record([row])
        return row
    state = file.with_suffix(".safetensors")
    row = measure(state)
    record([row])
    write_text(file, json.dumps(row))
    state.unlink(missing_ok=True)
    return row


def write(frame, path):
    """Write a frame of rows as a file, atomically."""
    with atomic_path(path) as temporary:
        frame.to_csv(temporary, index=False)


def load(path=None):
    """All rows of a results file as a frame; empty when there is none yet; UserError when its columns are not ours."""
    path = pathlib.Path(path or local_path())
    if not path.is_file() or not path.stat().st_size:
        return pd.DataFrame(columns=COLUMNS)
    frame = pd.read_csv(path, dtype={"checkpoint_sha": str, "data_sha": str, "run_key": str, "commit": str})
    if set(COLUMNS) - set(frame.columns):
        missing = ", ".join(sorted(set(COLUMNS) - set(frame.columns)))
        raise UserError(f"{path} lacks the columns {missing}; move it away and run the notebooks again")
    for column in ("weight_bits", "act_bits", "first_last_bits", "residual_bits", "input_bits", "n_calibration", "bytes"):
        frame[column] = frame[column].astype("Int64")
    return frame


def newest(frame):
    """The newest row per (run_key, seed), in order of creation."""
    return frame.sort_values("created").drop_duplicates(["run_key", "seed"], keep="last")


def current(frame):
    """The rows that belong together: of every data set and network the newest checkpoint and test set, of every label the newest run_key."""
    frame = newest(frame).reset_index(drop=True)
    frame = frame.assign(label=[label(row) for _, row in frame.iterrows()])
    for columns, kept in ((["dataset", "model"], ["checkpoint_sha", "n_test"]), (["dataset", "model", "label"], ["run_key"])):
        for name in kept:
            frame = frame[frame[name] == frame.groupby(columns)[name].transform("last")]
    return frame


def equal_widths(frame):
    """Rows by hand with as many bits for weights as for activations, of the observers that were measured at several such widths.

    Without corrections and in the default convention: what learned rounding and other conventions give has tables of its own.
    """
    plain = (frame.corrections.isna() | frame.corrections.eq("")) & frame.first_last_bits.isna()
    for name in ("residual_bits", "input_bits"):
        plain &= frame[name].eq(8).fillna(False).astype(bool)
    same = frame[(frame.method == "by hand") & (frame.weight_bits == frame.act_bits).fillna(False).astype(bool) & plain]
    widths = same.groupby(["dataset", "model", "observer"]).weight_bits.transform("nunique")
    return same[widths > 1]


def summarize(frame):
    """One row a configuration: the newest rows of every seed, averaged; `seeds` and the deviation `top1_std` added.

    drop_low and drop_high are the means of the seeds' intervals: the uncertainty from the test images, which seeds do not reduce.
    """
    groups = newest(frame).groupby("run_key", sort=False)
    table = groups.first()
    for column in MEASURED:
        table[column] = groups[column].mean()
    return table.assign(seeds=groups.size(), top1_std=groups["top1"].std(ddof=1)).reset_index()


def label(row):
    """A row's configuration in a few words."""
    if row.method == "float":
        return "fp32 original"
    if row.method != "by hand":
        return f"{row.method}: {row.corrections}" if isinstance(row.corrections, str) and row.corrections else row.method
    words = [f"W{'*' if pd.isna(row.weight_bits) else row.weight_bits}A{'*' if pd.isna(row.act_bits) else row.act_bits} {row.observer}"]
    words += [f"weights {row.weight_observer}"] + ([] if pd.isna(row.first_last_bits) else [f"first/last {row.first_last_bits}"])
    for name in ("residual", "input"):
        bits = row[f"{name}_bits"]
        words += [f"{name} float"] if pd.isna(bits) else [f"{name} {bits}"] if bits != 8 else []
    return ", ".join(words + ([] if pd.isna(row.corrections) or not row.corrections else [row.corrections]))
