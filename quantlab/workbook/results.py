"""One tidy row per measured configuration: results/results.csv (local), results/published.csv.

    results.record([results.make_row(...)])     # in a notebook
    results.current(results.load())             # in the report

A row carries everything its number depends on. `config_key` names its configuration, `run` the run
of a notebook that measured it. Each file has one row a (config_key, seed): a new one replaces the
old. What a run records counts when the run is complete; recorded by hand, it counts at once.
"""

import contextlib
import datetime
import hashlib
import json
import os
import pathlib

import filelock
import pandas as pd
import torch

from quantlab.config import QuantConfig
from quantlab.observers import observer_name
from quantlab.system.comparing import paired_drop
from quantlab.system.errors import UserError, one_line
from quantlab.system.files import atomic_path, check_regular, commit, root, write_text
from quantlab.workbook.contents import code_hash, digest

CONFIGURATION = [
    "dataset", "data_sha", "n_test", "model", "checkpoint_sha", "trained_on", "method",
    "weight_bits", "act_bits", "levels", "first_last_bits", "residual_bits", "input_bits",
    "placement", "granularity", "symmetric", "observer", "weight_observer", "corrections",
    "n_calibration",
]
MEASURED = [
    "fp32_top1", "top1", "drop", "drop_low", "drop_high", "bytes", "seconds", "images_per_s",
]
PROVENANCE = ["seed", "device", "torch", "commit", "notebook", "created"]
COLUMNS = ["config_key", "run", *CONFIGURATION, *MEASURED, *PROVENANCE]
INTEGERS = [
    "n_test", "weight_bits", "act_bits", "levels", "first_last_bits", "residual_bits",
    "input_bits", "n_calibration", "bytes", "seed",
]
FLOATS = [column for column in MEASURED if column != "bytes"]
TEXTS = [column for column in COLUMNS if column not in [*INTEGERS, *FLOATS]]
SMOKE = "digits"
NARROW = ("weights", "both")  # in the column `symmetric`: weights of 2^b - 1 levels
ARITHMETIC = ("improving", "analysis")  # rooms that decide the numbers of `once`, besides the core


def local_path():
    return root() / "results" / "results.csv"


def published_path():
    return root() / "results" / "published.csv"


# ---- A row --------------------------------------------------------------------------------------


def make_row(
    *, data, model, card, baseline, result, method, notebook,
    config=None, n_calibration=0, seed=0, bytes=0, corrections="", **more,
):
    """A dict with every column: `result` (an Evaluation) beside `baseline`, the float network on
    the same images.

    data: Dataset. model: its name. card: of the checkpoint. config: the QuantConfig, None for float
    and built-in methods, whose columns `more` may fill. bytes: size of the weights as stored. top1
    and drop in percent and points, seconds of wall clock.
    """
    drop, low, high = paired_drop(baseline.correct, result.correct)
    row = {
        "dataset": data.name, "data_sha": data.fingerprint[:12], "n_test": result.n,
        "model": model, "checkpoint_sha": card.sha256[:12], "trained_on": card.trained_on,
        "method": method, "corrections": corrections, "n_calibration": n_calibration,
        **describe(config), **more,
        "fp32_top1": baseline.top1, "top1": result.top1,
        "drop": drop, "drop_low": low, "drop_high": high, "bytes": bytes,
        "seconds": round(result.seconds, 3), "images_per_s": round(result.images_per_s, 1),
        "seed": seed, "device": result.device, "torch": torch.__version__,
        "commit": commit(), "notebook": notebook,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
    }
    row.setdefault("levels", levels(row))
    row["config_key"] = config_key(row)
    return {column: row.get(column) for column in COLUMNS}


def describe(config):
    """The columns that a QuantConfig decides."""
    if config is None:
        return {}
    widths = ("weight_bits", "act_bits", "first_last_bits", "residual_bits", "input_bits")
    names = {(1, 1): "both", (1, 0): "weights", (0, 1): "activations", (0, 0): "neither"}
    lp = f"lp(p={config.weight_norm:g})"
    return {
        **{name: getattr(config, name) for name in widths},
        "placement": "fused",
        "granularity": "channel" if config.per_channel else "tensor",
        "symmetric": names[config.weight_symmetric, config.act_symmetric],
        "observer": observer_name(config.observer),
        "weight_observer": lp if config.weight_observer == "lp" else config.weight_observer,
    }


def levels(row):
    """Values that a weight can take: 2^b - 1 where symmetric (the narrow range), 2^b where not.

    None where the row does not say: float, other tools, several widths.
    """
    bits, symmetric = row.get("weight_bits"), row.get("symmetric")
    unsaid = pd.isna(bits) or not symmetric
    return None if unsaid else 2 ** int(bits) - (symmetric in NARROW)


def config_key(row):
    """Twelve hex digits of everything but the seed that decides a number.

    The same for a row that was just made and for one read from a file.
    """
    values = (row.get(column) for column in CONFIGURATION)
    settings = json.dumps(["" if pd.isna(value) else str(value) for value in values])
    return hashlib.sha256(settings.encode()).hexdigest()[:12]


def is_default(frame, free=("weight_bits", "act_bits")):
    """bool Series: rows by hand of QuantConfig()'s configuration, but for the columns in `free`."""
    return has_config(frame, QuantConfig(), free)


def has_config(frame, config, free=()):
    """bool Series: rows by hand of a QuantConfig, but for the columns in `free`."""
    wanted = {"method": "by hand", **describe(config)}
    same = [_equal(frame[name], value) for name, value in wanted.items() if name not in free]
    return pd.concat(same, axis=1).all(axis=1)


def _equal(column, value):
    """bool Series: where a column has this value; None: where it has none."""
    return column.isna() if value is None else column.eq(value).fillna(False).astype(bool)


# ---- Recording ----------------------------------------------------------------------------------


def record(rows):
    """Record rows (dicts of make_row) and return them as a frame.

    In a run of `python -m quantlab run` they are kept apart until the run is complete. Safe against
    a kill at any moment and against several writers; UserError where nothing can be written.
    """
    new = _stamped(rows)
    _replace(new, _path_of_run() or local_path())
    return new


def once(settings, measure):
    """The row that measure(state) returns, recorded at once; with the same settings a later call
    records and returns it again and measures nothing.

    settings: whatever decides the number besides the code; the modules that compute and torch's
    version are added here. state: a path for what a long measurement keeps to resume after a kill;
    deleted when it is done. The row is complete in itself: it counts also if its run is stopped.
    """
    from quantlab.workbook import rows

    key = digest(settings, code_hash(ARITHMETIC), torch.__version__)
    file = root() / "results" / "rows" / f"{key}.json"
    state = file.with_suffix(".safetensors")
    file.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(file.with_suffix(".lock")):  # a second run waits and finds the row
        if not file.is_file():
            write_text(file, json.dumps(measure(state)))
            state.unlink(missing_ok=True)
    row = rows.read_row(file)
    record([row])
    _replace(_stamped([row]), local_path())
    return row


@contextlib.contextmanager
def rows_of_run(key, file):
    """While open, what is recorded by this process and those it starts belongs to the run `key`.

    It goes to a file of this execution alone, which becomes `file`, and counts, when the block
    succeeds; a killed or failed run leaves nothing that is read.
    """
    with atomic_path(file) as own:
        write(typed(pd.DataFrame(columns=COLUMNS)), own)
        os.environ |= {"QUANTLAB_RUN": key, "QUANTLAB_ROWS": str(own)}
        try:
            yield
        finally:
            del os.environ["QUANTLAB_RUN"], os.environ["QUANTLAB_ROWS"]
    count_again(file)


def count_again(file):
    """Put a complete run's rows into results.csv, as when it ran."""
    _replace(_read(file), local_path())


def _path_of_run():
    return pathlib.Path(os.environ["QUANTLAB_ROWS"]) if "QUANTLAB_ROWS" in os.environ else None


def _stamped(rows):
    frame = pd.DataFrame(rows, columns=COLUMNS)
    return typed(frame.assign(run=os.environ.get("QUANTLAB_RUN", "")))


def _replace(rows, path):
    """Write rows into a file, each in place of the one with its configuration and seed."""
    try:
        local_path().parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(local_path().with_suffix(".lock")):
            write(_unique(_read(path), rows), path)
    except OSError as error:
        why = f"{error.strerror}; free space there or set QUANTLAB_ROOT"
        raise UserError(f"cannot write {path}: {why}") from None


def _unique(*frames):
    """Several frames as one, of every configuration and seed the last row."""
    frames = [frame for frame in frames if len(frame)] or frames[:1]
    return pd.concat(frames).drop_duplicates(["config_key", "seed"], keep="last")


# ---- Files --------------------------------------------------------------------------------------


def write(frame, path):
    """Write a frame of rows as a file, atomically."""
    with atomic_path(path) as temporary:
        frame.to_csv(temporary, index=False)


def load(path=None):
    """All rows of a results file that count, as a frame; empty where there is none yet.

    path: None for results.csv, in a run with the run's own rows so far. Missing texts are "".
    Files from before `config_key`, `run` and `levels` are brought up to date: old local rows need
    no command then. UserError when columns are missing.
    """
    if path is None and _path_of_run():
        return _unique(_read(local_path()), _read(_path_of_run()))
    return _read(pathlib.Path(path or local_path()))


def _read(path):
    from quantlab.workbook import rows

    check_regular(path)
    if not path.is_file() or not path.stat().st_size:
        return typed(pd.DataFrame(columns=COLUMNS))
    try:
        frame = rows.parsed(path)
        if is_old := "run_key" in frame.columns:  # it named the configuration
            frame = frame.assign(config_key="", run="", levels=pd.NA)
        if missing := ", ".join(sorted(set(COLUMNS) - set(frame.columns))):
            raise UserError(
                f"{path} lacks the columns {missing}; move it away and run the notebooks")
        frame = typed(frame)
        return rows.checked(_upgraded(frame) if is_old else frame)
    except (ValueError, TypeError, OverflowError) as error:
        raise UserError(f"{path} is no table of results ({one_line(error)}); mend that line, or "
                        "move it away and run the notebooks") from None


def _upgraded(frame):
    """Rows of an old file, with levels and today's keys."""
    frame["levels"] = pd.array([levels(row) for row in frame.to_dict("records")], "Int64")
    keys = [config_key(row) for row in frame.to_dict("records")]
    return typed(frame.assign(config_key=keys))


def typed(frame):
    """The columns in order, whole numbers that may be missing as Int64, missing texts as ""."""
    frame = frame[COLUMNS].copy()
    for column in [*FLOATS, *INTEGERS]:
        try:
            numbers = pd.to_numeric(frame[column])
            if column in INTEGERS and (numbers.abs() > 2**53).any():
                raise ValueError("a whole number is larger than any that is counted")
            frame[column] = numbers.astype("Int64" if column in INTEGERS else "float64")
        except (ValueError, TypeError) as error:
            raise ValueError(f"{column}: {error}") from None
    for column in TEXTS:
        frame[column] = frame[column].astype(object).where(frame[column].notna(), "")
    return frame


# ---- Choosing rows ------------------------------------------------------------------------------


def newest(frame):
    """The newest row per (config_key, seed), in order of creation."""
    return _unique(frame.sort_values("created", kind="stable"))


def current(frame):
    """The rows that belong together: of every data set and network the newest checkpoint and test
    set, of every label the newest configuration."""
    frame = newest(frame).reset_index(drop=True)
    frame = frame.assign(label=[label(row) for _, row in frame.iterrows()])
    latest = {
        "checkpoint_sha": ["dataset", "model"], "n_test": ["dataset", "model"],
        "config_key": ["dataset", "model", "label"],
    }
    for name, columns in latest.items():
        frame = frame[frame[name] == frame.groupby(columns)[name].transform("last")]
    return frame


def equal_widths(frame):
    """Rows by hand with as many bits for weights as for activations, of the observers that were
    measured at several such widths.

    Without corrections and in the default convention: what learned rounding and other conventions
    give has tables of its own.
    """
    plain = _equal(frame.method, "by hand") & _equal(frame.corrections, "")
    plain &= frame.first_last_bits.isna() & _equal(frame.weight_bits, frame.act_bits)
    for name in ("residual_bits", "input_bits"):
        plain &= _equal(frame[name], 8)
    same = frame[plain & frame.symmetric.isin(NARROW)]
    widths = same.groupby(["dataset", "model", "observer"]).weight_bits.transform("nunique")
    return same[widths > 1]


def summarize(frame):
    """One row a configuration: the newest rows of every seed, averaged; `seeds` and the deviation
    `top1_std` added.

    drop_low and drop_high are the means of the seeds' intervals: the uncertainty from the test
    images, which seeds do not reduce.
    """
    groups = newest(frame).groupby("config_key", sort=False)
    table = groups.first()
    for column in MEASURED:
        table[column] = groups[column].mean()
    deviation = groups["top1"].std(ddof=1)
    return table.assign(seeds=groups.size(), top1_std=deviation).reset_index()


def label(row):
    """A row's configuration in a few words."""
    if row.method == "float":
        return "fp32 original"
    if row.method != "by hand":
        return f"{row.method}: {row.corrections}" if row.corrections else row.method
    weights, acts = ("*" if pd.isna(b) else b for b in (row.weight_bits, row.act_bits))
    words = [f"W{weights}A{acts} {row.observer}", f"weights {row.weight_observer}"]
    words += [] if row.symmetric in NARROW else ["2^b levels"]
    if not pd.isna(row.first_last_bits):
        words.append(f"first/last {row.first_last_bits}")
    for name in ("residual", "input"):
        bits = row[f"{name}_bits"]
        if pd.isna(bits):
            words.append(f"{name} float")
        elif bits != 8:
            words.append(f"{name} {bits}")
    return ", ".join([*words, row.corrections] if row.corrections else words)
