"""The command line: python -m quantlab run | list | report | publish | train | data | import-checkpoint | bench | inspect | sync."""

import argparse
import dataclasses
import sys
import typing

import quantlab as ql
from quantlab.system.errors import UserError
from quantlab.system.files import root


def main(arguments=None):
    """Run one command; exit status 0, or 1 after one line that says what was wrong, what is allowed and what to do."""
    options = parser().parse_args(arguments)
    try:
        return options.command(options) or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130


def parser():
    top = argparse.ArgumentParser(prog="python -m quantlab", description="Post-training quantization workbook: run its notebooks, train its networks.")
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(name, function, help):
        command = commands.add_parser(name, help=help, description=help)
        command.set_defaults(command=function)
        return command

    run = add("run", _run, "execute notebooks with papermill (no number: all)")
    run.add_argument("numbers", nargs="*", metavar="NN", help="number or name of a notebook")
    run.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), dest="parameters", help="a parameter of the notebooks")
    run.add_argument("--data", help="auto, cifar10, digits, images or a path, for the notebooks that use data")
    run.add_argument("--force", action="store_true", help="run again what is complete")
    run.add_argument("--time-limit", type=int, default=3 * 3600, metavar="SECONDS", help="per notebook (default: %(default)s)")
    add("list", _list, "list the notebooks and their parameters")
    add("report", _report, "rebuild results/report.html from the results there are")
    add("publish", _publish, "move local results of real data sets into published.csv and the README's table")
    train = add("train", _train, "train a network and write its checkpoint and card; resumes after a kill")
    train.add_argument("--data", default="auto", help="auto, cifar10, digits, images or a path")
    train.add_argument("--size", type=int, help="side in pixels, where images differ in size")
    train.add_argument("--out", help="checkpoint to write (default: checkpoint/MODEL-DATA.safetensors)")
    train.add_argument("--restart", action="store_true", help="replace a finished checkpoint; drop an unfinished run of other settings")
    train.add_argument("--recipe", help="two-cores, two-cores-long or accelerator; settings below change it")
    train.add_argument("--start-from", metavar="CHECKPOINT", help="begin with these weights: a second cycle")
    train.add_argument("--threads", type=int, help="processor threads (default: torch's)")
    train.add_argument("--save-every", type=float, default=60, metavar="SECONDS", help="what a kill may cost (default: %(default)s)")
    kinds = {**typing.get_type_hints(ql.TrainConfig), "phases": str}
    for field in dataclasses.fields(ql.TrainConfig):
        kind = kinds[field.name]
        action = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}
        train.add_argument("--" + field.name.replace("_", "-"), default=None, help=f"default on images: {field.default}", **action)
    data = add("data", _data, "load and describe a data set; cifar10 downloads it, jpeg makes the JPEG copy of it")
    data.add_argument("source", nargs="?", default="auto", help="auto, cifar10, digits, images, a path, or jpeg")
    data.add_argument("--size", type=int, help="side in pixels, where images differ in size")
    data.add_argument("--out", help="folder of the JPEG copy (default: data/cifar10-jpeg-copy)")
    imported = add("import-checkpoint", _import, "bring in a state dict (.pt) as safetensors with a card, executing nothing in it")
    imported.add_argument("file")
    imported.add_argument("--model", default="resnet50", help="architecture (default: %(default)s)")
    imported.add_argument("--data", default="auto", help="data set it was trained on")
    imported.add_argument("--out", help="checkpoint to write (default: checkpoint/MODEL-DATA-imported.safetensors)")
    bench = add("bench", _bench, "measure speed: ratios, side by side, in one run")
    bench.add_argument("sections", nargs="*", metavar="SECTION", help="what to measure (none: everything)")
    bench.add_argument("--model", default="resnet50", help="resnet20 or resnet50 (default: %(default)s)")
    bench.add_argument("--batch", type=int, default=64, help="images at once (default: %(default)s)")
    bench.add_argument("--rounds", type=int, default=5, help="rounds of which the median counts (default: %(default)s)")
    bench.add_argument("--compiled", action=argparse.BooleanOptionalAction, help="also with torch.compile (default: where a C++ compiler is)")
    inspected = add("inspect", _inspect, "analyse a network of your own: one HTML file")
    inspected.add_argument("target", metavar="MODULE:FUNCTION", help="what builds the network, importable from here")
    inspected.add_argument("--data", required=True, help="folder of images: train/CLASS + test/CLASS, CLASS, or no classes at all")
    inspected.add_argument("--weights", help="a .safetensors file or a state dict (.pt); nothing in it is executed")
    inspected.add_argument("--size", type=int, default=224, help="side in pixels (default: %(default)s)")
    inspected.add_argument("--mean", type=float, nargs=3, default=(0.485, 0.456, 0.406), help="of the three channels, in 0..1 (default: ImageNet's)")
    inspected.add_argument("--std", type=float, nargs=3, default=(0.229, 0.224, 0.225), help="of the three channels (default: ImageNet's)")
    inspected.add_argument("--bits", type=int, default=4, help="of weights and activations (default: %(default)s)")
    inspected.add_argument("-n", type=int, default=256, help="calibration images, and as many test images (default: %(default)s)")
    inspected.add_argument("--unlabelled", action="store_true", help="folders are no classes: leave accuracy out")
    inspected.add_argument("--out", help="HTML file to write (default: results/inspect-FUNCTION.html)")
    add("sync", _sync, "bring .ipynb, .py, README and badges into step, without outputs")
    return top


def _run(options):
    from quantlab.workbook.run import run, status_table

    frame = run(options.numbers, dict(options.parameters), source=options.data, force=options.force, time_limit=options.time_limit)
    print("\n" + status_table(frame))
    return int((frame.status == "failed").any())


def _list(options):
    from quantlab.workbook import notebooks

    for notebook in notebooks().values():
        print(f"{notebook.path.stem}: {notebook.title}")
        for name, default in notebook.parameters.items():
            print(f"    -p {name} {default!r}  ({type(default).__name__})")


def _report(options):
    from quantlab.workbook.run import run, status_table

    frame = run(["11"], force=True)
    print(status_table(frame))
    return int((frame.status == "failed").any())


def _publish(options):
    from quantlab.workbook.results import published_path
    from quantlab.workbook.tables import publish

    print(f"{publish()} rows published to {published_path()}; README.md updated")


def _train(options):
    import torch

    from quantlab.networks.recipe import parse_phases
    from quantlab.networks.train import default_config, is_complete

    if options.threads is not None:
        if options.threads < 1:
            raise UserError(f"--threads {options.threads}: name at least 1")
        torch.set_num_threads(options.threads)
    if options.phases is not None:
        options.phases = parse_phases(options.phases)
    data = ql.load_data(options.data, size=options.size)
    given = {f.name: getattr(options, f.name) for f in dataclasses.fields(ql.TrainConfig) if getattr(options, f.name) is not None}
    network = given.pop("model", "resnet50" if options.recipe else "resnet20")
    config = default_config(network, data, options.recipe, **given)
    out = options.out or root() / "checkpoint" / f"{config.model}-{data.name}.safetensors"
    if is_complete(out) and not options.restart:
        raise UserError(f"{out} is complete; name another file with --out, or pass --restart to replace it")
    _, card = ql.train(config, data, out, start_from=options.start_from, restart=options.restart, save_every=options.save_every)
    print(f"{out}: {card.test_top1:.2f} % top-1 on {card.n_test:,} test images of {data}")


def _data(options):
    from quantlab.images.cifar10 import make_jpeg_copy

    print(make_jpeg_copy(options.out)) if options.source == "jpeg" else ql.load_data(options.source, size=options.size)


def _import(options):
    from quantlab.networks.checkpoints import import_checkpoint

    data = ql.load_data(options.data)
    out = options.out or root() / "checkpoint" / f"{options.model}-{data.name}-imported.safetensors"
    _, card = import_checkpoint(options.file, options.model, out, data)
    print(f"{out}: {card.num_outputs} ways, {card.test_top1:.2f} % top-1 on {card.n_test:,} test images of {data.name}")


def _bench(options):
    from quantlab.workbook.bench import bench

    bench(options.sections, options.model, options.batch, options.rounds, options.compiled)


def _inspect(options):
    from quantlab.workbook.inspection import inspect

    out = options.out or root() / "results" / f"inspect-{options.target.split(':')[-1]}.html"
    given = {name: getattr(options, name) for name in ("size", "mean", "std", "bits", "n", "weights", "unlabelled")}
    print(inspect(options.target, options.data, out, **given))


def _sync(options):
    from quantlab.workbook.notebooks import sync

    print("\n".join(sync()) or "everything is in step")


if __name__ == "__main__":
    sys.exit(main())
