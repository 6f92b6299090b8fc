"""Many runs of one notebook, on this machine or on several: what is complete is skipped, so that
starting again is resuming; only this process writes results.

    asked = grid.ask("03", [("weight_bits", "4,3")], seeds=5)
    runs = plan(grid.multiplied(asked), asked.swept)
    frame = sweep(runs, Local(workers=2))
"""

import collections
import dataclasses
import functools
import json
import os
import time

import pandas as pd
import torch
from tqdm.auto import tqdm

from quantlab.images.files import find_data
from quantlab.system.errors import UserError
from quantlab.system.files import atomic_path, commit, read_text
from quantlab.workbook import keys, results
from quantlab.workbook.contents import digest
from quantlab.workbook.engines import outcome_of
from quantlab.workbook.notebooks import Notebook
from quantlab.workbook.request import TIME_LIMIT
from quantlab.workbook.run import is_complete, remove_temporaries, runs_folder
from quantlab.workbook.task import Outcome, Task

LOOK = 0.2  # seconds between two looks at what runs
ALLOWED_LOSSES = 3  # workers that may be lost while they carry out one run
ALIKE = ("data", "model", "preset")  # parameters that decide how long a notebook takes


@dataclasses.dataclass
class Run:
    """One combination: its notebook, the values that tell it from others, its Task, and what has
    become of it. status: complete, to do, done, failed.
    """

    notebook: Notebook
    values: dict
    task: Task
    status: str = "to do"
    expected: float | None = None  # seconds
    seconds: float | None = None
    where: str = ""
    message: str = ""
    losses: int = 0
    began: float = 0.0  # of time.monotonic

    @property
    def out(self):
        """Its executed notebook in results/runs; beside it, as .csv, its rows."""
        return runs_folder() / f"{self.notebook.path.stem}-{self.task.key}.ipynb"

    def __str__(self):
        return " ".join(f"{name}={value}" for name, value in self.values.items())


def plan(combinations, swept, time_limit=TIME_LIMIT):
    """[Run] of [(Notebook, parameters)], each key once; UserError for images or a network that
    cannot be read. swept: names of the parameters that tell them apart.
    """
    known, runs = {}, {}
    environment = {name: os.environ.get(name) for name in keys.ENVIRONMENT}
    for notebook, parameters in combinations:
        outside = digest({name: parameters.get(name) for name in (*keys.OUTSIDE, "model")})
        if outside not in known:
            found = keys.facts(notebook, parameters)
            place = find_data(parameters.get("data", notebook.parameters["data"]))
            known[outside] = found, {"data": str(place)}
        facts, data = known[outside]
        key = digest(keys.settings_of(notebook, parameters), facts)
        task = Task(notebook.path.name, read_text(notebook.path), key, parameters | data,
                    facts | {"torch": torch.__version__}, environment, time_limit)
        values = {name: parameters[name] for name in swept}
        run = runs.setdefault(key, Run(notebook, values, task))
        run.status = "complete" if is_complete(run.out) else "to do"
    _expect([*runs.values()])
    return [*runs.values()]


def sweep(runs, engine):
    """Carry out those of `runs` (of `plan`) that are not complete; their table.

    Every run of a worker that is lost starts again on another; what a worker refuses goes to
    another. Whatever ends this, also Ctrl-C, ends the processes that an engine has started.
    """
    remove_temporaries()
    for run in runs:
        if run.status == "complete":
            results.count_again(run.out.with_suffix(".csv"))
    try:
        with _Progress(runs) as progress:
            _carry_out([run for run in runs if run.status == "to do"], engine, progress)
    finally:
        engine.close()
    return table(runs)


def _carry_out(runs, engine, progress):
    queue = _Queue(runs, engine, progress)
    while queue.waiting or queue.running:
        cores = engine.cores()
        queue.gather(cores)
        queue.hand_out(cores)
        if cores and not queue.running:
            queue.give_up(cores)
        progress.show(queue.running, len(cores))
        time.sleep(LOOK)


class _Queue:
    """The runs that wait, those that run (place -> (Run, future)), and what places have refused
    (place -> facts of runs -> why). cores: what `engine.cores` gives.
    """

    def __init__(self, runs, engine, progress):
        self.waiting, self.running = collections.deque(runs), {}
        self.refused = collections.defaultdict(dict)
        self.engine, self.progress = engine, progress

    def gather(self, cores):
        """Take what has ended, and what has gone with its place."""
        for place, (run, future) in [*self.running.items()]:
            if place in cores and not future.done():
                continue
            del self.running[place]
            outcome = outcome_of(future) if place in cores else Outcome("lost")
            if outcome.status == "refused":
                self.refused[place][_facts(run)] = outcome.message
                self.progress.say(f"refused: {outcome.message}")
                self.waiting.appendleft(run)
            elif outcome.status == "lost":
                self._lose(run)
            else:
                _finish(run, outcome, place)
                self.progress.end(run)

    def _lose(self, run):
        run.losses += 1
        if run.losses < ALLOWED_LOSSES:
            self.progress.say(f"lost with its worker, runs again: {run}")
            self.waiting.appendleft(run)
        else:
            run.status = "failed"
            run.message = f"{run.losses} workers were lost while it ran (out of memory?)"
            self.progress.end(run)

    def hand_out(self, cores):
        """Give every free place the first run that it has not refused."""
        for place in cores.keys() - self.running.keys():
            run = next((r for r in self.waiting if _facts(r) not in self.refused[place]), None)
            if run is not None:
                self.waiting.remove(run)
                run.began = time.monotonic()
                self.running[place] = run, self.engine.submit(place, run.task, cores[place])

    def give_up(self, cores):
        """Fail what waits while nothing runs: every place has refused it."""
        while self.waiting:
            run = self.waiting.popleft()
            whys = dict.fromkeys(self.refused[place][_facts(run)] for place in cores)
            run.status, run.message = "failed", "; ".join(whys)
            self.progress.end(run)


def _facts(run):
    """What a worker that refused one run would refuse another for."""
    return digest(run.task.facts)


def _finish(run, outcome, place):
    run.status, run.message, run.where = outcome.status, outcome.message, place
    run.seconds = outcome.seconds
    try:
        _keep(run, outcome)
    except UserError as error:
        run.status, run.message = "failed", str(error)


def _keep(run, outcome):
    """Write what came back; a run is complete when its rows are there, which are written last."""
    failed = run.out.with_suffix(".failed.ipynb")
    if outcome.status == "failed":
        if outcome.notebook:
            _write(failed, outcome.notebook)
        run.message = run.message.replace(f"{run.notebook.path.stem}.failed.ipynb", failed.name)
        return
    _write(run.out, outcome.notebook)
    rows = run.out.with_suffix(".csv")
    with atomic_path(rows) as temporary:
        temporary.write_bytes(outcome.rows)
        frame = results.load(temporary)
        frame["commit"] = frame["commit"].replace("", commit())  # the same code, outside of git
        results.write(frame, temporary)
    failed.unlink(missing_ok=True)
    results.count_again(rows)


def _write(path, content):
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


# ---- Before, during, after -----------------------------------------------------------------------


def table(runs):
    """A frame of runs: the values that tell them apart, status, seconds expected and taken, where,
    message.
    """
    state = ("status", "expected", "seconds", "where", "message")
    return pd.DataFrame([run.values | {name: getattr(run, name) for name in state} for run in runs])


def _expect(runs):
    """Set the seconds that each run will take, where something tells: the mean of those earlier
    runs of its notebook, on such data, network and preset, that agree in most parameters.
    """
    earlier = []
    for file in runs_folder().glob(f"{runs[0].notebook.path.stem}-*.ipynb"):
        try:
            about = json.loads(read_text(file))["metadata"]["papermill"]
            if about["duration"] and not about["exception"]:
                earlier.append((_settings(runs[0].notebook, about["parameters"]),
                                about["duration"]))
        except (UserError, ValueError, KeyError, TypeError):  # not papermill's
            continue
    for run in runs:
        run.expected = _estimate(_settings(run.notebook, run.task.parameters), earlier)


def _estimate(settings, earlier):
    alike = collections.defaultdict(list)
    for other, seconds in earlier:
        if all(settings.get(name) == other.get(name) for name in ALIKE):
            alike[sum(settings[name] == other.get(name) for name in settings)].append(seconds)
    nearest = alike[max(alike)] if alike else []
    return sum(nearest) / len(nearest) if nearest else None


def _settings(notebook, parameters):
    settings = {**notebook.parameters, **parameters}
    return settings | {"data": _place(settings["data"])}


@functools.cache
def _place(source):
    try:
        return str(find_data(source))
    except UserError:  # it was there once
        return str(source)


def forecast(runs, workers):
    """One line: how many runs, how many are complete, and how long the others will take."""
    todo = [run for run in runs if run.status == "to do"]
    line = f"{len(runs)} runs: {len(runs) - len(todo)} complete, {len(todo)} to do"
    known = [run.expected for run in todo if run.expected is not None]
    if not todo or not known:
        return line + ("; no earlier run tells how long" if todo else "")
    work = sum(known) / len(known) * len(todo)
    return f"{line}; about {duration(work / workers)} on {workers} at a time, by earlier runs"


def duration(seconds):
    """Seconds as text: 40 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def status_text(frame):
    """The table as text, its failures last, each with its line."""
    shown = frame.drop(columns=["expected", "message"])
    lines = [shown.to_string(index=False, na_rep="")]
    lines.append(", ".join(f"{n} {status}" for status, n in frame.status.value_counts().items()))
    for values in frame[frame.status == "failed"].to_dict("records"):
        swept = [f"{name}={values[name]}" for name in frame.columns[:-5]]
        lines.append(f"failed: {' '.join(swept)}: {values['message']}")
    return "\n".join(lines)


class _Progress:
    """A bar with what runs where and the time left; a line for every run that has ended."""

    def __init__(self, runs):
        self.todo = [run for run in runs if run.status == "to do"]
        self.seconds = [run.expected for run in self.todo if run.expected is not None]
        self.bar = None

    def __enter__(self):
        form = "{desc}{n_fmt}/{total_fmt} |{bar:12}| {elapsed}{postfix}"
        self.bar = tqdm(total=len(self.todo), bar_format=form, dynamic_ncols=True, disable=None)
        return self

    def __exit__(self, *_):
        self.bar.close()

    def show(self, running, places):
        """running: place -> (Run, its future). places: how many can run at a time."""
        where = "; ".join(f"{place}: {run}" for place, (run, _) in running.items())
        left, count = "", self.bar.total - self.bar.n
        if self.seconds and count and places:
            mean, now = sum(self.seconds) / len(self.seconds), time.monotonic()
            work = mean * count - sum(min(mean, now - run.began) for run, _ in running.values())
            left = f"about {duration(work / min(count, places))} left; "
        self.bar.set_postfix_str(left + (where or "no worker" * bool(count)))

    def say(self, line):
        tqdm.write(line)

    def end(self, run):
        took = f", {run.seconds:.0f} s, {run.where}" if run.seconds is not None else ""
        self.say(f"{run.status}: {run}{took}")
        if run.status == "done":
            self.seconds.append(run.seconds)
        self.bar.update()
