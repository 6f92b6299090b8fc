"""What every notebook sets up and writes down: images, network, preset, rows, captions, figures.

    study = Study(data, model, checkpoint, preset, n_calibration=n_calibration, seed=seed,
                  notebook="03_quantize_by_hand")
    show(study.record(study.evaluate(qmodel), "by hand", qmodel.config))

Set-up and bookkeeping only: what a notebook teaches stands in its cells.
"""

import functools
import os

import matplotlib
import safetensors
import torch
from IPython import get_ipython
from IPython.core.pylabtools import select_figure_formats
from IPython.display import display
from matplotlib.figure import Figure

from quantlab import plots
from quantlab.calibration import collect
from quantlab.evaluate import Evaluation, evaluate
from quantlab.images.datasets import Dataset, limited, load_data
from quantlab.networks.checkpoints import load_trained
from quantlab.quantized import weight_bytes
from quantlab.system.errors import check_name
from quantlab.system.files import root, save_tensors
from quantlab.system.machine import device_name
from quantlab.workbook import results
from quantlab.workbook.contents import code_hash, digest

PRESETS = ("auto", "smoke", "full")
SMOKE_LIMIT = 1000  # test images of a smoke run
SHOWN = ["method", "weight_bits", "act_bits", "levels", "n_test", "top1", "drop", "drop_low",
         "drop_high", "bytes"]  # of a row that has just been recorded


class Study:
    """One network on one data set under one preset.

    data: a source for `load_data`, or a Dataset. checkpoint: "auto" or a path. preset: smoke, full,
    or auto: smoke on the digits. n_calibration: images that ranges are chosen on; 0: 256 in a smoke
    run, 1,024 in a full one. limit: test images; None: 1,000 in a smoke run, else all.
    notebook: its file's name, for the rows. UserError for an unknown preset, data or checkpoint.

    images (Dataset), network (float, eval mode), card, model (its name), smoke (bool), limit, seed,
    n_calibration, test (Split, limited).
    """

    def __init__(self, data, model, checkpoint="auto", preset="auto", *, n_calibration=0, seed=0,
                 limit=None, notebook=""):
        check_name("preset", preset, PRESETS)
        if get_ipython() is None:
            matplotlib.use("Agg")  # a plain script saves its figures and opens no window
        self.images = data if isinstance(data, Dataset) else load_data(data)
        self.smoke = self.images.smoke if preset == "auto" else preset == "smoke"
        self.limit = limit or (SMOKE_LIMIT if self.smoke else None)
        enough = min(self.choose(0, smoke=256, full=1024), len(self.images.train))
        self.n_calibration = n_calibration or enough
        self.seed = seed
        self.notebook = notebook
        self.model = model
        self.network, self.card = load_trained(model, self.images, checkpoint)
        self.test = limited(self.images.test, self.limit)

    def choose(self, given, *, smoke, full):
        """A parameter of the notebook: as given, or the preset's where it is 0, "" or "auto"."""
        if given and given != "auto":
            return given
        return smoke if self.smoke else full

    # ---- Images, statistics, accuracies ---------------------------------------------------------

    def calibration(self, seed=None, n=None, batch_size=128):
        """Batches (float32 [B, 3, H, W]) of `n` training images; by default the study's."""
        seed = self.seed if seed is None else seed
        return self.images.calibration(n or self.n_calibration, seed, batch_size)

    @functools.cached_property
    def stats(self):
        """CalibrationStats of the float network on the study's calibration images."""
        return collect(self.network, self.calibration())

    @functools.cached_property
    def baseline(self):
        """Evaluation of the float network on the test images, which rows compare with.

        Kept on disk for every notebook: of a large network it takes minutes.
        """
        return self._kept(["float", code_hash()], lambda: self.network)[0]

    def evaluate(self, network, split=None, **options):
        """Evaluation on the test images or another Split, at most `limit` of them."""
        split = self.images.test if split is None else split
        return evaluate(network, split, limit=self.limit, **options)

    def evaluated(self, settings, build):
        """(Evaluation on the test images, bytes of the weights) of build(), a network.

        In a run of `python -m quantlab run` both are kept: started again after a kill, the same
        run builds and evaluates nothing twice. settings: whatever tells its networks apart.
        """
        run = os.environ.get("QUANTLAB_RUN")
        if run is None:
            network = build()
            return self.evaluate(network), weight_bytes(network)
        return self._kept([run, settings], build)

    def _kept(self, settings, build):
        sources = self.images.pixels, self.card.sha256, torch.__version__, device_name()
        key = digest(sources, len(self.test), settings)
        file = root() / "results" / "rows" / f"{key}.evaluation.safetensors"
        try:
            with safetensors.safe_open(file, "pt") as stored:
                predictions, about = stored.get_tensor("predictions"), stored.metadata()
        except (OSError, safetensors.SafetensorError):  # not there, or damaged
            network = build()
            result = self.evaluate(network)
            about = {"seconds": str(result.seconds), "bytes": str(weight_bytes(network))}
            predictions = result.predictions
            save_tensors(file, {"predictions": predictions}, about)
        seconds, size = float(about["seconds"]), int(about["bytes"])
        return Evaluation.of(predictions, self.test.labels, seconds, device_name()), size

    # ---- Rows -----------------------------------------------------------------------------------

    def row(self, result, method, config=None, **columns):
        """A row of results.csv for an Evaluation on the test images, as a dict; not yet recorded.

        config: the QuantConfig of a network by hand. columns: bytes, corrections and whatever else
        `results.make_row` takes; n_calibration is the study's where there is a config, else 0.
        """
        own = {
            "data": self.images, "model": self.model, "card": self.card, "seed": self.seed,
            "notebook": self.notebook, "n_calibration": self.n_calibration if config else 0,
        }
        columns = {**own, **columns}
        columns.setdefault("baseline", result if method == "float" else self.baseline)
        return results.make_row(result=result, method=method, config=config, **columns)

    def record(self, result, method, config=None, **columns):
        """Record a `row` at once; return what of it is worth showing, as a frame of one row."""
        return brief(self.record_rows([self.row(result, method, config, **columns)]))

    def record_rows(self, rows):
        """Record rows of `row`; return them as a frame with every column, for a table or figure."""
        return results.record(rows)

    def once(self, settings, measure):
        """`results.once`: the row that measure(state) returns, measured once for these settings.

        settings: a dict of what decides the number besides network, images, n_calibration and seed.
        """
        own = {
            "data": self.images.pixels, "checkpoint": self.card.sha256, "model": self.model,
            "n_test": len(self.test), "n_calibration": self.n_calibration, "seed": self.seed,
        }
        return results.once({**own, **settings}, measure)

    # ---- Figures --------------------------------------------------------------------------------

    def caption(self, n, text="", data=None):
        """A figure's caption: data set, model, n, then text. data: named in place of the images."""
        return plots.row_caption(data or self.images, self.model, n, text)

    def save(self, figure, name, data=None):
        """Save a figure as pic/NAME_MODEL_DATA (.png, .svg); return it, as the value of a cell."""
        data = data or self.images
        plots.save(figure, name, data, self.model)
        if get_ipython() is None:
            print(f"figure: {root() / 'pic'}/{name}_{self.model}_{getattr(data, 'name', data)}.png")
        return figure


def draw_figures(shell):
    """Make figures pictures in a notebook also where MPLBACKEND names a backend that shows none."""
    formatters = shell.display_formatter.formatters
    if not any(Figure in formatters[kind] for kind in ("image/png", "image/svg+xml")):
        select_figure_formats(shell, {"png"})


if get_ipython() is not None:
    draw_figures(get_ipython())


def brief(frame):
    """The columns of recorded rows that are worth showing, rounded."""
    return frame[SHOWN].round(2)


def show(*things):
    """Show frames, figures and texts: as a notebook's output, or printed by a plain script.

    A figure prints nothing there: `Study.save` says where it is.
    """
    for thing in things:
        if isinstance(thing, str):
            print(thing)
        elif get_ipython() is not None:
            display(thing)
        elif hasattr(thing, "to_string"):  # a frame, a series or a styled frame
            print(thing.to_string(), end="\n\n")
        elif isinstance(getattr(thing, "data", None), str):  # IPython's Markdown
            print(thing.data)
