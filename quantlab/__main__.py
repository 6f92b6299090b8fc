"""The command line: python -m quantlab COMMAND, or --help.

A mistake is answered before torch is loaded: every command checks its options first and imports
what it needs afterwards.
"""

import argparse
import dataclasses
import os
import pathlib
import sys
import typing

from quantlab.images.files import SOURCES
from quantlab.networks.recipe import NETWORKS, RECIPES, TrainConfig, parse_phases
from quantlab.system.errors import UserError, check_name
from quantlab.system.files import root
from quantlab.system.paper import COLUMNS, ask_notebooks, check_paper
from quantlab.workbook import allowed, grid, notebooks
from quantlab.workbook.request import TIME_LIMIT, check_data, cost, headline, requested

SEARCH_COSTS = ("bytes", "bitops")
TABLES = ("headline", "original", "speed", "all", "methods", "goals", "tools", "conventions")
BENCH_SECTIONS = ("collect", "fakequant", "int8", "integer", "reconstruct", "tune")


def main(arguments=None):
    """Run one command; exit status 0, or 1 after one line that says what was wrong, what is allowed
    and what to do.
    """
    try:
        options = parser().parse_args(arguments)
        status = options.command(options) or 0
        sys.stdout.flush()
        return status
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # whoever read has ended: | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it again
        return 141
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130


# ---- Options -------------------------------------------------------------------------------------


def parser():
    top = argparse.ArgumentParser(
        prog="python -m quantlab",
        description="Post-training quantization workbook: run its notebooks, train its networks.")
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(name, function, help):
        command = commands.add_parser(name, help=help, description=help)
        command.set_defaults(command=function)
        return command

    _run_options(add("run", _run, "execute notebooks with papermill (no number: all)"))
    add("list", _list, "list the notebooks and their parameters")
    add("report", _report, "rebuild results/report.html from the results there are")
    add("publish", _publish,
        "move local results of real data sets into published.csv, the README's tables, what the "
        "notebooks say they found, results/pages and the gallery in pic/README.md")
    _sweep_options(add("sweep", _sweep, "execute one notebook with every combination of lists of "
                                        "parameters, on this machine or on several; started again, "
                                        "it goes on"))
    _paper_options(add("figures", _figures, "draw figures for a report: from the published rows, "
                                            "or by running the notebooks named"), COLUMNS, ("pdf",))
    _paper_options(add("tables", _tables, "write the tables of published rows as LaTeX (booktabs) "
                                          "and CSV"), None, ("tex", "csv"))
    _train_options(add("train", _train, "train a network and write its checkpoint and card; "
                                        "resumes after a kill"))
    _data_options(add("data", _data, "load and describe a data set; cifar10 downloads it, jpeg "
                                     "makes the JPEG copy of it"))
    _import_options(add("import-checkpoint", _import, "bring in a state dict (.pt) as safetensors "
                                                      "with a card, executing nothing in it"))
    _bench_options(add("bench", _bench, "measure speed: ratios, side by side, in one run"))
    _rivals_options(add("rivals", _rivals, "measure other tools on a network of the workbook, ours "
                                           "beside them (make rivals sets them up)"))
    _inspect_options(add("inspect", _inspect, "analyse a network of your own: one HTML file"))
    zipped = add("zip", _zip, "results and figures in one file, to download")
    zipped.add_argument("out", nargs="?", default="workbook.zip", help="default: %(default)s")
    _search_options(add("search", _search, "the cheapest network that loses at most so much"))
    _address_options(add("address", _address, "set the address of this repository, or show it"))
    add("sync", _sync, "bring .ipynb, .py, README and badges into step, without outputs")
    return top


def _run_options(run):
    add = run.add_argument
    add("numbers", nargs="*", metavar="NN", help="number or name of a notebook")
    add("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), dest="parameters",
        help="a parameter of the notebooks")
    add("--data", help=f"{', '.join(SOURCES)} or a path, for the notebooks that use data")
    add("--full", action="store_true", help="the full preset, also on the digits")
    add("--headline", action="store_true",
        help="what the README's headline needs, all on this machine; says first what it costs")
    add("--force", action="store_true", help="run again what is complete")
    add("--workers", type=int, metavar="N",
        help="notebooks at a time (default: of smoke runs one a core as far as memory goes, else "
             "one, as two would disturb each other's times)")
    add("--time-limit", type=int, default=TIME_LIMIT, metavar="SECONDS",
        help="per notebook (default: %(default)s)")


def _sweep_options(sweep):
    add = sweep.add_argument
    add("notebook", metavar="NN", help="number or name of a notebook, or a YAML file with "
                                       "notebook: NN, parameters: {NAME: [V1, V2]}, seeds, data")
    add("-p", nargs=2, action="append", default=[], metavar=("NAME", "V1,V2"), dest="parameters",
        help="a parameter's values; with semicolons where a value has commas: '4/4,3/3;2/2'")
    add("--seeds", metavar="N", help="values 0 to N - 1 of the parameter seed")
    add("--data", help=f"{', '.join(SOURCES)} or a path")
    add("--dry-run", action="store_true", help="show the runs and how long they will take")
    add("--workers", type=int, metavar="N",
        help="runs at a time on this machine, its cores divided between them (default: one a "
             "core as far as memory goes; on an accelerator one)")
    add("--scheduler", metavar="tcp://HOST:PORT",
        help="send the runs to the workers of a Dask scheduler")
    add("--time-limit", type=int, default=TIME_LIMIT, metavar="SECONDS",
        help="per run (default: %(default)s)")


def _paper_options(command, widths, formats):
    add = command.add_argument
    add("--formats", nargs="+", default=formats, metavar="FORMAT",
        help=f"default: {', '.join(formats)}")
    if widths is None:
        add("names", nargs="*", metavar="TABLE", help=f"of {', '.join(TABLES)} (none: all)")
        return
    add("numbers", nargs="*", metavar="NN", help="notebooks to run for their figures")
    add("--widths", nargs="+", default=widths, metavar="MM", help="default: 89 and 183")
    add("--data", help=f"{', '.join(SOURCES)} or a path, for the notebooks named")


def _train_options(train):
    add = train.add_argument
    add("--data", default="auto", help=f"{', '.join(SOURCES)} or a path")
    add("--size", type=int, help="side in pixels, where images differ in size")
    add("--out", help="checkpoint to write (default: checkpoint/MODEL-DATA.safetensors)")
    add("--restart", action="store_true",
        help="replace a finished checkpoint; drop an unfinished run of other settings")
    add("--recipe", help=f"{', '.join(RECIPES)}; settings below change it")
    add("--start-from", metavar="CHECKPOINT", help="begin with these weights: a second cycle")
    add("--threads", type=int, help="processor threads (default: torch's)")
    add("--save-every", type=float, default=60, metavar="SECONDS",
        help="what a kill may cost (default: %(default)s)")
    kinds = {**typing.get_type_hints(TrainConfig), "phases": parse_phases}
    for field in dataclasses.fields(TrainConfig):
        kind = kinds[field.name]
        action = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}
        option = "--" + field.name.replace("_", "-")
        add(option, default=None, help=f"default on images: {field.default}", **action)


def _data_options(data):
    add = data.add_argument
    add("source", nargs="?", default="auto", help=f"{', '.join(SOURCES)}, a path, or jpeg")
    add("--size", type=int, help="side in pixels, where images differ in size")
    add("--out", help="folder of the JPEG copy (default: data/cifar10-jpeg-copy)")


def _import_options(imported):
    add = imported.add_argument
    add("file")
    add("--model", default="resnet50", help="architecture (default: %(default)s)")
    add("--data", default="auto", help="data set it was trained on")
    add("--out", help="checkpoint to write (default: checkpoint/MODEL-DATA-imported.safetensors)")


def _bench_options(bench):
    add = bench.add_argument
    add("sections", nargs="*", metavar="SECTION",
        help=f"of {', '.join(BENCH_SECTIONS)} (none: everything)")
    add("--model", help=f"{', '.join(NETWORKS)} or mobilenet_v2 (default: of integer all of them, "
                        "elsewhere resnet50)")
    add("--batch", type=int, help="images at once (default: of integer 1 and 64, elsewhere 64)")
    add("--rounds", type=int, default=5,
        help="rounds of which the median counts (default: %(default)s)")
    add("--compiled", action=argparse.BooleanOptionalAction,
        help="also with torch.compile (default: where a C++ compiler is)")


def _rivals_options(rivals):
    add = rivals.add_argument
    add("--data", default="auto", help=f"{', '.join(SOURCES)} or a path")
    add("--model", default="resnet20", help=f"{', '.join(NETWORKS)} (default: %(default)s)")
    add("--widths", default="8/8,4/4,3/3", help="weights/activations[/first and last layer, else "
                                                "8], with commas (default: %(default)s)")
    add("--methods", default="nearest", help="of ours, with commas (default: %(default)s)")
    add("--iterations", type=int, default=0,
        help="of learned rounding, theirs and ours (default: 500, on the digits 3)")
    add("--seed", type=int, default=0, help="of the calibration images (default: %(default)s)")


def _address_options(address):
    add = address.add_argument
    add("url", nargs="?", help='such as https://github.com/NAME/REPOSITORY, or "" for none')
    add("--branch", default="main", help="default: %(default)s")


def _inspect_options(inspected):
    add = inspected.add_argument
    add("target", metavar="MODULE:FUNCTION", help="what builds the network, importable from here")
    add("--data", required=True,
        help="folder of images: train/CLASS + test/CLASS, CLASS, or no classes at all")
    add("--weights", help="a .safetensors file or a state dict (.pt); nothing in it is executed")
    add("--size", type=int, default=224, help="side in pixels (default: %(default)s)")
    add("--mean", type=float, nargs=3, default=(0.485, 0.456, 0.406),
        help="of the three channels, in 0..1 (default: ImageNet's)")
    add("--std", type=float, nargs=3, default=(0.229, 0.224, 0.225),
        help="of the three channels (default: ImageNet's)")
    add("--bits", type=int, default=4, help="of weights and activations (default: %(default)s)")
    add("-n", type=int, default=256,
        help="calibration images, and as many test images (default: %(default)s)")
    add("--unlabelled", action="store_true", help="folders are no classes: leave accuracy out")
    add("--out", help="HTML file to write (default: results/inspect-FUNCTION.html)")


def _search_options(searched):
    add = searched.add_argument
    add("target", help=f"{', '.join(NETWORKS)}, or MODULE:FUNCTION that builds the network")
    add("--data", default="auto", help="auto, cifar10, digits, images, or a folder or archive of "
        "train/CLASS and test/CLASS (default: %(default)s)")
    add("--lose", type=float, default=1.0,
        help="points of accuracy, on held-out images (default: %(default)s)")
    add("--cost", choices=SEARCH_COSTS, default="bytes",
        help="of weights, or bit operations of an image (default: %(default)s)")
    add("--learned", action="store_true", help="try learned rounding below what nearest reaches")
    add("--iterations", type=int, default=500, help="of learning (default: %(default)s)")
    add("--limit", type=int, help="held-out and test images to look at (default: all)")
    add("-n", type=int, default=1024, help="calibration images (default: %(default)s)")
    add("--seed", type=int, default=0, help="of calibration images (default: %(default)s)")
    add("--weights", help="a .safetensors file or a state dict (.pt); nothing in it is executed")
    add("--size", type=int, help="side in pixels that images are resized and cropped to")
    add("--mean", type=float, nargs=3, help="of the three channels, in 0..1")
    add("--std", type=float, nargs=3, help="of the three channels")
    add("--out", help="packed network to write (default: results/search-NAME.safetensors)")


# ---- Commands ------------------------------------------------------------------------------------


def _run(options):
    parameters = dict(options.parameters)
    _check_least("--time-limit", options.time_limit)
    _check_least("--workers", options.workers)
    if options.full:
        parameters = {"preset": "full"} | parameters
    parts = [(options.numbers, parameters)]
    if options.headline:
        if options.numbers:
            raise UserError("--headline names its notebooks itself: leave the numbers out")
        parts = [([number], own) for number, own in headline(parameters)]
    for numbers, own in parts:
        for notebook, _ in requested(numbers, own, options.data):
            if options.headline:
                what = f"{notebook.path.stem}, {own['model']}"
                print(f"{what}: {cost(notebook) or 'a minute or two'}", flush=True)

    from quantlab.workbook.run import combined, status_table

    frame = combined(parts, source=options.data, force=options.force,
                     time_limit=options.time_limit, workers=options.workers)
    print("\n" + status_table(frame))
    return int((frame.status == "failed").any())


def _sweep(options):
    _check_least("--time-limit", options.time_limit)
    _check_least("--workers", options.workers)
    if options.workers and options.scheduler:
        raise UserError("--workers divides this machine; with --scheduler, start as many workers "
                        "as are to run at a time: dask worker ADDRESS --nworkers N")
    asked = grid.ask(options.notebook, options.parameters, options.seeds, options.data)
    combinations = grid.multiplied(asked)

    from quantlab.workbook.engines import Dask, Local, default_workers
    from quantlab.workbook.sweep import forecast, plan, status_text, sweep, table

    runs = plan(combinations, asked.swept, options.time_limit)
    if options.scheduler:
        engine = Dask(options.scheduler)
    else:
        engine = Local(min(options.workers or default_workers(), len(runs)))
    print(forecast(runs, len(engine.cores())))
    if options.dry_run:
        engine.close()
        shown = table(runs).drop(columns=["seconds", "where", "message"])
        print(shown.to_string(index=False, na_rep="", float_format="{:.0f}".format))
        return 0
    frame = sweep(runs, engine)
    print("\n" + status_text(frame))
    return int((frame.status == "failed").any())


def _list(options):
    for notebook in notebooks.notebooks().values():
        print(f"{notebook.path.stem}: {notebook.problem or notebook.title}")
        for name, default in notebook.parameters.items():
            says = allowed.describe(name)
            kind = f"({type(default).__name__})" + (f"  {says}" if says else "")
            print(f"    -p {name} {default!r}  {kind}")


def _report(options):
    from quantlab.workbook.run import run, status_table

    frame = run(["report"], force=True)
    print(status_table(frame))
    return int((frame.status == "failed").any())


def _publish(options):
    from quantlab.workbook import gallery, pages
    from quantlab.workbook.findings import update_notebooks
    from quantlab.workbook.results import published_path
    from quantlab.workbook.tables import publish

    print(f"{publish()} rows published to {published_path()}; README.md updated")
    print("\n".join(update_notebooks()) or "what notebooks found stands in them")
    for path in pages.write():
        print(f"page: {path}")
    print(f"figures: {gallery.write()}")


def _figures(options):
    widths, formats = check_paper(options.widths, options.formats)
    if options.numbers:
        ask_notebooks(widths, formats)
        options.parameters, options.force, options.time_limit = [], True, TIME_LIMIT
        options.full, options.headline, options.workers = False, False, None
        return _run(options)

    from quantlab.workbook import gallery
    from quantlab.workbook.figures import save_figures

    for line in save_figures(widths, formats):
        print(line, flush=True)
    print(f"figures: {gallery.write()}")


def _tables(options):
    for name in options.formats:
        check_name("format", name, ("tex", "csv"))
    for name in options.names:
        check_name("table", name, TABLES)

    from quantlab.workbook.tables import save_tables

    print("\n".join(map(str, save_tables(options.names, options.formats))))


def _train(options):
    fields = [field.name for field in dataclasses.fields(TrainConfig)]
    given = {name: getattr(options, name) for name in fields if getattr(options, name) is not None}
    TrainConfig(**given)  # refuses what is out of range
    network = given.pop("model", "resnet50" if options.recipe else "resnet20")
    check_name("model", network, NETWORKS)
    if options.recipe is not None:
        check_name("recipe", options.recipe, RECIPES)
    _check_least("--threads", options.threads)
    _check_least("--size", options.size)
    _check_file(options.start_from)
    check_data(options.data)

    import torch

    from quantlab.images.datasets import load_data
    from quantlab.networks.train import default_config, is_complete, train

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    data = load_data(options.data, size=options.size)
    config = default_config(network, data, options.recipe, **given)
    out = options.out or root() / "checkpoint" / f"{config.model}-{data.name}.safetensors"
    if is_complete(out) and not options.restart:
        raise UserError(
            f"{out} is complete; name another file with --out, or pass --restart to replace it")
    _, card = train(config, data, out, start_from=options.start_from, restart=options.restart,
                    save_every=options.save_every)
    print(f"{out}: {card.test_top1:.2f} % top-1 on {card.n_test:,} test images of {data}")


def _data(options):
    if options.source == "jpeg":
        from quantlab.images.cifar10 import make_jpeg_copy

        print(make_jpeg_copy(options.out))
        return
    _check_least("--size", options.size)
    check_data(options.source)

    from quantlab.images.datasets import load_data

    load_data(options.source, size=options.size)


def _import(options):
    check_name("model", options.model, NETWORKS)
    _check_file(options.file)
    check_data(options.data)

    from quantlab.images.datasets import load_data
    from quantlab.networks.checkpoints import import_checkpoint

    data = load_data(options.data)
    name = f"{options.model}-{data.name}-imported.safetensors"
    out = options.out or root() / "checkpoint" / name
    _, card = import_checkpoint(options.file, options.model, out, data)
    print(f"{out}: {card.num_outputs} outputs, {card.test_top1:.2f} % top-1 on {card.n_test:,} "
          f"test images of {data.name}\nto run a notebook with it: python -m quantlab run 03 "
          f"-p model {options.model} -p checkpoint {out}")


def _bench(options):
    for section in options.sections:
        check_name("bench section", section, BENCH_SECTIONS)
    check_name("model", options.model or "resnet50", (*NETWORKS, "mobilenet_v2"))
    _check_least("--batch", 64 if options.batch is None else options.batch)
    _check_least("--rounds", options.rounds)

    from quantlab.workbook.bench import bench

    bench(options.sections, options.model, options.batch, options.rounds, options.compiled)


def _rivals(options):
    check_name("model", options.model, NETWORKS)
    allowed.check(seed=options.seed, iterations=options.iterations)
    widths, methods = options.widths.split(","), allowed.check_methods(options.methods.split(","))
    for width in widths:
        allowed.split_width(width)
    check_data(options.data)

    from quantlab.rivals.brevitas import interpreter

    interpreter()

    from quantlab.workbook.rivals import compared
    from quantlab.workbook.study import Study, brief, show

    study = Study(options.data, options.model, seed=options.seed, notebook="rivals")
    show(brief(compared(study, widths, methods, options.iterations)))


def _inspect(options):
    if options.data in SOURCES:
        check_data(options.data)
    elif not pathlib.Path(options.data).is_dir():
        raise UserError(f"data {options.data!r} not found: name a folder of images, or one of "
                        f"{', '.join(SOURCES)}")
    _check_file(options.weights)

    from quantlab.workbook.inspection import inspect

    name = f"inspect-{options.target.split(':')[-1]}.html"
    out = options.out or root() / "results" / name
    settings = ("size", "mean", "std", "bits", "n", "weights", "unlabelled")
    given = {name: getattr(options, name) for name in settings}
    print(inspect(options.target, options.data, out, **given))


def _zip(options):
    from quantlab.workbook.bundle import bundle

    path, count = bundle(options.out)
    print(f"{path}: {count} files, {path.stat().st_size / 1e6:.1f} MB")


def _search(options):
    check_data(options.data)
    _check_file(options.weights)
    for name, value in (("--iterations", options.iterations), ("-n", options.n),
                        ("--limit", options.limit)):
        _check_least(name, value)
    if options.target not in NETWORKS and ":" not in options.target:
        raise UserError(f"{options.target!r} is no network; name one of {', '.join(NETWORKS)}, or "
                        "module:function that builds yours")

    from quantlab.workbook.searching import run_search

    name = f"search-{options.target.split(':')[-1]}.safetensors"
    out = pathlib.Path(options.out or root() / "results" / name)
    settings = ("lose", "cost", "learned", "limit", "seed", "iterations", "size", "mean", "std",
                "weights")
    given = {name: getattr(options, name) for name in settings}
    print(run_search(options.target, options.data, out, n_calibration=options.n, **given), end="")
    print(f"written: {out}, {out.with_suffix('.png').name}, {out.with_suffix('.txt').name}")


def _address(options):
    from quantlab.workbook.address import read_address, write_address

    if options.url is not None:
        write_address(options.url, options.branch)
        _sync(options)
    address, branch = read_address()
    print(f"{address}, branch {branch}" if address else "no address is set")


def _sync(options):
    print("\n".join(notebooks.sync()) or "everything is in step")


def _check_least(option, value):
    if value is not None and value < 1:
        raise UserError(f"{option} {value}: name at least 1")


def _check_file(path):
    if path is not None and not pathlib.Path(path).exists():
        raise UserError(f"{path} not found")


if __name__ == "__main__":
    sys.exit(main())
