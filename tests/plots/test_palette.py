"""One palette: every method that is measured has a colour and a marker of its own, whatever was
imported first.
"""

import itertools
import json
import subprocess
import sys

import pytest
from matplotlib.colors import to_rgb

from quantlab import plots
from quantlab.observers import OBSERVERS
from quantlab.plots import ladder
from quantlab.plots.style import COLOURS, MARKERS, find_method, method_style
from quantlab.workbook import results

# Methods that one figure shows beside one another.
TOGETHER = {
    "range setters": ["float", *OBSERVERS],
    "tools": ["float", "eager int8", "PT2E int8", "ONNX Runtime int8", "Brevitas GPTQ",
              "Brevitas learned round", "nearest", "QDrop + augmented fine-tuning"],
    "dynamic": ["float", "dynamic int8 by hand", "quantize_dynamic"],
    "corrections": ["nearest", "equalisation", "bias correction", "analytic bias correction",
                    "BatchNorm re-estimation", "AdaRound", "BRECQ", "QDrop", "QDrop + Fisher",
                    "QDrop + end to end", "QDrop + fine-tuning", "QDrop + long fine-tuning",
                    "QDrop + augmented fine-tuning", "PT2E int8", "ONNX Runtime int8"],
    "Pareto": ["float", "nearest", "mixed precision"],
    "roundings": ["single", "double"],
    "the original": list(ladder.WAYS),
    "its ranges": ["hist", "fake-hist", "ours"],
    "number formats": ["integers", "minifloat", "MX", "NV"],
    "calibrated on": ["real images", "distilled images", "noise images"],
}


def test_no_two_methods_share_colour_and_marker():
    pairs = [(COLOURS[name], MARKERS[name]) for name in COLOURS]
    assert COLOURS.keys() == MARKERS.keys() and len(set(pairs)) == len(pairs)


@pytest.mark.parametrize("group", TOGETHER)
def test_methods_in_one_figure_are_told_apart_by_colour_and_by_marker(group):
    for a, b in itertools.combinations(TOGETHER[group], 2):
        distance = sum((x - y) ** 2 for x, y in zip(to_rgb(COLOURS[a]), to_rgb(COLOURS[b]))) ** 0.5
        assert distance > 0.12 and MARKERS[a] != MARKERS[b], f"{a} looks like {b}"


def test_every_published_row_has_a_style():
    """Steps between two methods ("ablation") are drawn as steps, not as methods."""
    rows = results.current(results.load(results.published_path()))
    rows = rows[rows.method != "ablation"]
    assert len(rows) > 100
    for _, row in rows.iterrows():
        corrections = row.corrections if isinstance(row.corrections, str) else ""
        name = find_method(results.label(row))
        if row.method == "original":
            assert name in ("hist", "fake-hist") or "built-in" in corrections
        elif row.method == "by hand" and not corrections:
            assert name == row.observer
        elif row.method == "by hand":
            assert name == corrections.split(",")[0]
        else:
            assert name and name in row.method


@pytest.mark.parametrize("label, name", [
    ("fp32 original", "float"), ("W4A4 histogram, weights lp(p=3), residual float", "histogram"),
    ("W4A4 histogram, weights lp(p=3), QDrop + Fisher, 500 iterations", "QDrop + Fisher"),
    ("W4A4 histogram, weights lp(p=3), analytic bias correction", "analytic bias correction"),
    ("percentile(q=99.9)", "percentile"), ("integer only W8A8, double rounding", "double"),
    ("W4A4, calibrated on 128 noise images", "noise images"), ("a setter of my own", None),
    ("original: 4bit fake-hist", "fake-hist"), ("W3A3 QAT, learned steps", "QAT"),
    ("Brevitas GPTQ: W4A4, first/last 8, bias correction, 0.12.1", "Brevitas GPTQ"),
    ("integers, 4 bits", "integers"), ("minifloat E4M3", "minifloat"), ("MXFP8 E5M2", "MX"),
    ("NVINT4", "NV"),
])
def test_a_label_finds_its_method(label, name):
    assert find_method(label) == name
    if name:
        assert method_style(label) == dict(color=COLOURS[name], marker=MARKERS[name])


def test_the_palette_cannot_be_changed():
    for table in (COLOURS, MARKERS, plots.style.STYLE):
        with pytest.raises(TypeError):
            table["mine"] = "#000000"


IMPORTED = """
import importlib, json, sys, matplotlib
before = dict(matplotlib.rcParams)
for name in sys.argv[1].split():
    importlib.import_module(f"quantlab.plots.{name}")
from quantlab.plots.style import COLOURS, MARKERS
print(json.dumps([dict(COLOURS), dict(MARKERS), dict(matplotlib.rcParams) == before]))
"""


def test_the_order_of_imports_changes_nothing():
    rooms = "training ranges questions panel lowbit ladder integer formats distributions beyond "
    rooms += "accuracy"
    run = [sys.executable, "-c", IMPORTED, rooms]
    answer = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    assert json.loads(answer) == [dict(COLOURS), dict(MARKERS), True]
