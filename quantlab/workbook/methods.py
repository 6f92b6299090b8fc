"""Every method by its name, from nearest rounding to fine-tuning, and its row, measured once.

    methods = Methods(study, iterations=500)
    row = methods.measure("QDrop + fine-tuning", config_of("2/2"), seed=0)
    frame = methods.known(["4/4", "2/2/8"])      # rows published and new

A name is a start (ranges, equalisation or learning) and, behind " + ", what is done to its result.
"""

import dataclasses
import json
import shutil

import pandas as pd
import torch

from quantlab.calibration import collect
from quantlab.config import QuantConfig
from quantlab.export.packed import save_quantized
from quantlab.improving.corrections import correct_bias, correct_bias_analytic, reestimate_batchnorm
from quantlab.improving.equalization import equalize
from quantlab.improving.reconstruct import ReconstructConfig, reconstruct
from quantlab.improving.tune import TuneConfig, tune_end_to_end
from quantlab.networks.cards import card_path
from quantlab.ptq import quantize
from quantlab.quantized import weight_bytes
from quantlab.system.errors import UserError
from quantlab.system.files import atomic_path, root, sha256, write_text
from quantlab.workbook import results
from quantlab.workbook.allowed import (
    CORRECTIONS,
    LEARNED,
    METHODS,
    TUNED,
    check_methods,
    split_width,
)

# ---- Names ---------------------------------------------------------------------------------------


def config_of(width, **convention):
    """The QuantConfig of a width such as "4/4" or "2/2/8", with other fields of a convention."""
    weight_bits, act_bits, *outer = split_width(width)
    fields = {"first_last_bits": outer[0] if outer else None} | convention
    return QuantConfig(weight_bits, act_bits, **fields)


def name_of(width):
    """A width in words: "W4A4", "W2A2, first/last 8"."""
    weight_bits, act_bits, *outer = split_width(width)
    return f"W{weight_bits}A{act_bits}" + (f", first/last {outer[0]}" if outer else "")


# ---- Building and measuring ----------------------------------------------------------------------


class Methods:
    """Builds networks by the name of their method and measures them, for one Study.

    iterations: of learning a unit and of fine-tuning; tuning end to end takes half as many, long
    and augmented fine-tuning three times as many. 0: 3 in a smoke run, 500 in a full one. seed,
    everywhere: of the calibration images and of what is random in learning; None: the study's.
    """

    def __init__(self, study, iterations=0):
        self.study = study
        self.iterations = study.choose(iterations, smoke=3, full=500)
        self._stats = {}  # seed -> CalibrationStats
        self._learned = None, None  # settings and network learned last: what a "+" goes on from

    check = staticmethod(check_methods)  # of names

    def learning(self, method, seed=None):
        """The ReconstructConfig that a learned method starts with."""
        start, *steps = method.split(" + ")
        loss = "fisher" if "Fisher" in steps else "mse"
        return ReconstructConfig.preset(
            start.lower(), iterations=self.iterations, seed=self._seed(seed), loss=loss)

    def tuning(self, step, seed=None):
        """The TuneConfig of a step of TUNED."""
        shared = dict(batch_size=min(64, self.study.n_calibration), seed=self._seed(seed))
        if step == "end to end":
            return TuneConfig(iterations=max(self.iterations // 2, 1), **shared)
        shared |= dict(crop=1, mixup=0.5) if step == "augmented fine-tuning" else {}
        iterations = (1 if step == "fine-tuning" else 3) * self.iterations
        return TuneConfig(iterations=iterations, learn_weights=True, flip=True, **shared)

    def build(self, method, config, seed=None, state=None):
        """The QuantizedNetwork of a method. state: a path from which a killed learning resumes."""
        network, images = self.study.network, self.study.calibration(self._seed(seed))
        start, *steps = method.split(" + ")
        if start in LEARNED:
            qmodel = self._learn(self.learning(method, seed), config, images, state)
        elif start == "equalisation":
            equal = equalize(network)
            qmodel = quantize(equal, collect(equal, images), config)
        else:
            qmodel = quantize(network, self.stats(seed), config)
        for step in [start, *steps] if start in CORRECTIONS else steps:
            if step == "bias correction":
                qmodel = correct_bias(network, qmodel, images)
            elif step == "analytic bias correction":
                qmodel = correct_bias_analytic(network, qmodel)
            elif step == "BatchNorm re-estimation":
                qmodel = reestimate_batchnorm(network, qmodel, images)
            elif step in TUNED:
                qmodel = tune_end_to_end(network, qmodel, images, self.tuning(step, seed))
        return qmodel

    def measure(self, method, config, seed=None, **columns):
        """`row` of the network that `build` gives, measured once for these settings."""
        def build(state):
            return self.build(method, config, seed, state)

        return self.once(build, method, config, seed, **columns)

    def once(self, build, method, config, seed=None, **columns):
        """`row` of build(state), once for these settings, also in another notebook or run."""
        start, *steps = method.split(" + ")
        learning = [self.learning(method, seed)] if start in LEARNED else []
        learning += [self.tuning(step, seed) for step in steps if step in TUNED]
        settings = {
            "method": method, "config": dataclasses.asdict(config), "seed": self._seed(seed),
            "learning": [dataclasses.asdict(part) for part in learning], "columns": columns}

        def measure(state):
            qmodel = build(state)
            row = self.row(qmodel, method, config, seed, **columns)
            if learning:
                kept = state.with_suffix(".network.safetensors")
                save_quantized(qmodel, kept)
                row["network"] = kept.name
            return row

        return self.study.once(settings, measure)

    def keep(self, row):
        """Put the network of a learned row into checkpoint/, with its card; the path.

        MODEL-DATA-w4a4.safetensors: packed, for `load_quantized`. UserError where it is not there.
        """
        kept = root() / "results" / "rows" / (row.get("network") or "none")
        if not kept.is_file():
            raise UserError(f"{kept} is not there; delete results/rows and it is learned again")
        name = f"{row['model']}-{row['dataset']}-w{row['weight_bits']}a{row['act_bits']}"
        path = root() / "checkpoint" / f"{name}.safetensors"
        with atomic_path(path) as temporary:
            shutil.copyfile(kept, temporary)
        about = ("method", "corrections", "weight_bits", "act_bits", "levels", "residual_bits",
                 "input_bits", "n_calibration", "seed", "fp32_top1", "drop", "drop_low",
                 "drop_high", "commit")
        card = dataclasses.replace(
            self.study.card, recipe={name: row[name] for name in about}, history=(),
            test_top1=row["top1"], n_test=row["n_test"], heldout_top1=row["heldout"],
            sha256=sha256(path), software={"torch": row["torch"]}, hardware=row["device"],
            created=row["created"], source=f"quantized from {self.study.card.sha256[:12]}")
        write_text(card_path(path), json.dumps(dataclasses.asdict(card), indent=1) + "\n")
        return path

    def row(self, qmodel, method, config, seed=None, **columns):
        """A row of results.csv as a dict and with it, for learned methods, `units` (what learning
        did to each) and `heldout` (top-1 in % on held-out images), and `wrong`: the indices of the
        test images that it gets wrong. columns: instead of those that method and config decide.
        """
        result = self.study.evaluate(qmodel)
        own = {"corrections": self.note(method), "bytes": weight_bytes(qmodel)}
        row = self.study.row(
            result, "by hand", config, seed=self._seed(seed), **{**own, **columns})
        more = {"wrong": (~result.correct).nonzero().flatten().tolist(), "heldout": None}
        if method.split(" + ")[0] in LEARNED:
            more["heldout"] = self.study.evaluate(qmodel, self.study.images.heldout).top1
        units = qmodel.meta.get("reconstruction", pd.DataFrame())
        return row | more | {"units": units.to_dict("records")}

    @staticmethod
    def correct_images(row):
        """bool [n]: which test images the network of a row gets right; for `paired_drop`."""
        correct = torch.ones(row["n_test"], dtype=torch.bool)
        correct[torch.tensor(row["wrong"], dtype=torch.long)] = False
        return correct

    def note(self, method):
        """What the column `corrections` says of a method."""
        if method.split(" + ")[0] in LEARNED:
            return f"{method}, {self.iterations} iterations"
        return "" if method == "nearest" else method

    def stats(self, seed=None):
        """CalibrationStats of the float network for a calibration seed."""
        if self._seed(seed) == self.study.seed:
            return self.study.stats
        if seed not in self._stats:
            self._stats[seed] = collect(self.study.network, self.study.calibration(seed))
        return self._stats[seed]

    def _learn(self, learning, config, images, state):
        if self._learned[0] != (learning, config):
            self._learned = None, None  # one network at a time
            network, stats = self.study.network, self.stats(learning.seed)
            qmodel = reconstruct(network, stats, images, config, learning, state)
            self._learned = (learning, config), qmodel
        return self._learned[1]

    def _seed(self, seed):
        return self.study.seed if seed is None else seed

    # ---- Rows there are --------------------------------------------------------------------------

    def rows(self):
        """Rows published and recorded here of this network, these test images and as many
        calibration images, of each configuration and seed the newest.
        """
        files = [results.load(results.published_path()), results.load()]
        rows = results.newest(pd.concat(files)).reset_index(drop=True)
        own = {
            "checkpoint_sha": self.study.card.sha256[:12], "n_test": len(self.study.test),
            "data_sha": self.study.images.fingerprint[:12],
            "n_calibration": self.study.n_calibration}
        return rows[rows[list(own)].eq(pd.Series(own)).all(axis=1)]

    def known(self, widths, **convention):
        """Those of METHODS, in their order, at these widths, under one convention: a frame like
        results.csv, with `name` (of the method) and `width`. Learned ones: for `iterations`.
        """
        rows, parts = self.rows(), []
        names = rows.corrections.str.removesuffix(f", {self.iterations} iterations")
        rows = rows.assign(name=names.replace("", "nearest"))
        rows = rows[rows.name.isin(METHODS)]
        for width in widths:
            same = results.has_config(rows, config_of(width, **convention))
            parts.append(rows[same].assign(width=width))
        order = dict(key=lambda names: names.map(METHODS.index), kind="stable")
        return pd.concat(parts, ignore_index=True).sort_values("name", **order)
