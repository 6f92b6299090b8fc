"""What the parameters of the notebooks may be, by name; loads without torch.

    check(weight_bits=4, observer="percentile", widths="4/4,2/2/8")
    describe("weight_bits")                                          # "2 to 8"
"""

import re

from quantlab.networks.recipe import NETWORKS
from quantlab.system.errors import UserError, check_name, did_you_mean

COMMON = ("data", "model", "checkpoint", "seed", "preset")  # of every notebook with data
PRESETS = ("auto", "smoke", "full")
OBSERVERS = ("minmax", "percentile", "histogram", "mse", "entropy", "aciq_laplace", "aciq_gauss")
RIVALS = ("auto", "both", "pt2e", "onnxruntime", "none")
ROWS = ("auto", "local", "published")

# Names of methods: a start and, behind " + ", steps.
LEARNED = ("AdaRound", "BRECQ", "QDrop")  # in lower case, presets of ReconstructConfig
CORRECTIONS = ("bias correction", "analytic bias correction", "BatchNorm re-estimation")
TUNED = ("end to end", *(f"{kind}fine-tuning" for kind in ("", "long ", "augmented ")))
METHODS = ("nearest", "equalisation", *CORRECTIONS, *LEARNED, *(f"QDrop + {t}" for t in TUNED))
STARTS = ("nearest", "equalisation", *CORRECTIONS, *LEARNED)
STEPS = ("Fisher", *CORRECTIONS, *TUNED)  # Fisher: the loss that is learned with

BITS, COUNT = (2, 8), (0, 10**9)
NUMBERS = {  # parameter -> (least, most)
    "seed": (0, 2**31), "epochs": (0, 10**5), "clip_share": (0.1, 1.5), "n_panels": (1, 1000),
    "qat_epochs": (0, 10**4), "qat_lr": (1e-9, 1), "qat_lr_weights": (0, 1),
    "n": (1, 10**9), "size": (1, 4096),
    **dict.fromkeys(("bits", "weight_bits", "act_bits", "qat_bits"), BITS),
    **dict.fromkeys((
        "n_calibration", "n_seeds", "n_costs", "n_sensitivity", "n_proof", "n_batches", "n_sample",
        "iterations", "distilled", "distillation_steps"), COUNT),
}
NAMES = {
    "model": NETWORKS, "preset": PRESETS, "observer": OBSERVERS, "method": LEARNED,
    "rivals": RIVALS, "source": ROWS,
}
LISTS = ("widths", "methods")  # parameters whose own values have commas


def check(**parameters):
    """UserError for the first value that its parameter does not allow; of other names any value."""
    for name, value in parameters.items():
        if name in NUMBERS:
            _check_number(name, value)
        elif name in NAMES:
            check_name(name, value, NAMES[name])
        elif name in TEXTS:
            if not isinstance(value, str):
                raise UserError(f"{name}={value!r} is no text; allowed: {describe(name)}")
            TEXTS[name][0](value)


def describe(name):
    """What `check` allows in a few words; "" where it allows everything."""
    if name in NUMBERS:
        low, high = NUMBERS[name]
        return f"from {low}" + (f" to {high}" if high < COUNT[1] else "")
    return ", ".join(NAMES.get(name, ())) or TEXTS.get(name, (None, ""))[1]


def _check_number(name, value):
    low, high = NUMBERS[name]
    if isinstance(value, (int, float)) and low <= value <= high:  # never nan
        return
    if (low, high) == BITS:
        raise UserError(f"{name}={value!r}: a width is an integer from {low} to {high}")
    raise UserError(f"{name}={value!r}: allowed are values {describe(name)}")


# ---- Methods and widths --------------------------------------------------------------------------


def check_methods(names):
    """The names as a list; UserError for one that is not made of known parts."""
    names = list(names)
    for name in names:
        start, *steps = name.split(" + ")
        for part, known in [(start, STARTS), *((step, STEPS) for step in steps)]:
            if part not in known:
                hint = f"{did_you_mean(part, known)}; there are: {', '.join(known)}"
                raise UserError(f"method {name!r}: {part!r} is unknown{hint}")
        if "Fisher" in steps and start not in LEARNED:
            raise UserError(f"method {name!r}: Fisher is a loss of learning; begin with one of "
                            f"{', '.join(LEARNED)}")
    return names


def split_width(width):
    """The bits of a width such as "4/4" or "2/2/8": weights, activations[, first and last]."""
    if not re.fullmatch(r"[2-8]/[2-8](/[2-8])?", width):
        raise UserError(f"width {width!r}: give the bits, 2 to 8, of weights/activations, or also "
                        "those of the first and the last layer, as in 4/4 or 2/2/8")
    return [int(part) for part in width.split("/")]


def _check_method(value):
    check_methods([value])


def _check_list(check_item, *words):
    def check_all(value):
        for item in () if value in words else value.split(","):
            check_item(item)

    return check_all


def _check_channels(value):
    try:
        constants = [float(text) for text in value.split()]
    except ValueError:
        constants = []
    if len(constants) != 3:
        raise UserError(f"{value!r}: give three numbers, one a channel, as in \"0.5 0.5 0.5\"")
    return constants


def _check_deviations(value):
    if not all(0 < constant < 1e6 for constant in _check_channels(value)):
        raise UserError(f"std {value!r}: standard deviations are above 0")


TEXTS = {  # parameter -> (its check, in words)
    "methods": (_check_list(_check_method, "auto", "none"), "auto, none, or methods, with commas"),
    "widths": (_check_list(split_width, "auto"), "auto, or widths as in 4/4,2/2/8"),
    "keep": (_check_list(split_width, "none"), "none, or widths as in 4/4,2/2"),
    "best_method": (_check_method, "a method"), "pareto_method": (_check_method, "a method"),
    "convention_method": (_check_method, "a method"),
    "mean": (_check_channels, "three numbers"), "std": (_check_deviations, "three numbers above 0"),
}
