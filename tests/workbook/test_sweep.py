"""Sweeps: lists multiplied, engines that lose, refuse and resume, real processes, and Dask's
scheduler and workers, one of them killed. The slow ones: make test-long.
"""

import concurrent.futures
import contextlib
import dataclasses
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import nbformat
import psutil
import pytest
from conftest import CHECKOUT, is_gone, make_image_folder, read_text

from quantlab.__main__ import main
from quantlab.system.errors import UserError
from quantlab.workbook import engines, grid, keys, notebooks, results, sweep, task
from quantlab.workbook.sweep import plan

PARAMETERS = "n = 1\nseed = 0\nwidths = '4/4'\nsides = (1, 2)\nfolder = ''\ndata = 'digits'"
# a run's own file of rows, written without the package: a kernel without torch starts sooner
RECORDING = f"""
import os, pathlib, time
row = dict.fromkeys({results.COLUMNS}, "") | dict(config_key=f"k{{n}}", seed=seed)
row |= dict(run=os.environ["QUANTLAB_RUN"], device=os.environ["OMP_NUM_THREADS"])
text = ",".join(row) + "\\n" + ",".join(map(str, row.values())) + "\\n"
pathlib.Path(os.environ["QUANTLAB_ROWS"]).write_text(text)
"""
WAITING = """
place = pathlib.Path(folder)
(place / f"{n}-{os.getpid()}").touch()
while not (place / "go").exists():
    time.sleep(0.05)
"""


def write_notebook(place, code, parameters=PARAMETERS):
    cells = [
        nbformat.v4.new_markdown_cell("# 98 · Tiny"),
        nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(code),
    ]
    notebook = nbformat.v4.new_notebook(cells=cells, metadata=notebooks.KERNEL)
    (place / "notebooks").mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, place / "notebooks" / "98_tiny.ipynb")


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A workbook with one notebook, which records a row a run, and a set of images."""
    place = tmp_path / "home"
    write_notebook(place, RECORDING)
    make_image_folder(place / "data" / "pets")
    monkeypatch.setenv("QUANTLAB_ROOT", str(place))
    return place


def plan_of(place, *parameters, **more):
    asked = grid.ask("98", parameters, source=str(place / "data" / "pets"), **more)
    return plan(grid.multiplied(asked), asked.swept, time_limit=120)


def rows_of(frame):
    """(configuration, seed) of rows, in order of their keys."""
    return sorted(zip(frame.config_key, frame.seed))


# ---- The grid ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, text, expected", [
    ("n", "4,3", ["4", "3"]),
    ("n", " 4 ; 3 ", ["4", "3"]),
    ("n", "4", ["4"]),
    ("widths", "4/4,3/3", ["4/4,3/3"]),
    ("widths", "4/4,3/3;2/2", ["4/4,3/3", "2/2"]),
    ("widths", "4/4;", ["4/4"]),
    ("sides", "(1, 2),(3,4)", ["(1, 2)", "(3,4)"]),
    ("folder", "", [""]),
])
def test_commas_separate_values_and_semicolons_those_that_have_commas(tiny, name, text, expected):
    assert grid.values(notebooks.find("98"), name, text) == expected


def test_lists_are_multiplied_and_every_value_has_its_type(tiny):
    asked = grid.ask("98", [("n", "4,3"), ("sides", "(5, 6)")], seeds="2")
    table = [(p["n"], p["sides"], p["seed"]) for _, p in grid.multiplied(asked)]
    assert table == [(4, (5, 6), 0), (4, (5, 6), 1), (3, (5, 6), 0), (3, (5, 6), 1)]
    assert asked.swept == ["n", "seed"]


def test_a_file_says_the_same_as_a_command_and_the_command_replaces_it(tiny, tmp_path):
    file = tmp_path / "grid.yaml"
    file.write_text("notebook: 98\nparameters:\n  n: [4, 3]\n  widths: 4/4,3/3\nseeds: 2\n")
    told = grid.ask("98", [("n", "4,3"), ("widths", "4/4,3/3")], seeds="2")
    assert grid.ask(str(file)) == told
    assert grid.ask(str(file), [("n", "5")]).lists == told.lists | {"n": ["5"]}


@pytest.mark.parametrize("arguments, message", [
    (["97"], "notebook '97' is unknown"),
    (["98", "-p", "m", "1,2"], "98_tiny has no parameter 'm'"),
    (["98", "-p", "n", "4,x"], "parameter n='x' of 98_tiny is not int; its default is 1"),
    (["98", "-p", "n", ""], "-p n '' has an empty value: separate values by commas, or by semi"),
    (["98", "-p", "n", "4,,3"], "-p n '4,,3' has an empty value"),
    (["98", "-p", "n", "1", "-p", "n", "2"], "n is given twice; give its values once, as in -p"),
    (["98", "-p", "seed", "1", "--seeds", "2"], "seed is given twice"),
    (["98", "--seeds", "0"], "seeds '0': name how many, at least 1"),
    (["98", "--workers", "0"], "--workers 0: name at least 1"),
    (["98", "-p", "widths", "4/4;9/9"], "width '9/9': give the bits, 2 to 8"),
    (["98", "--workers", "2", "--scheduler", "tcp://a:1"], "--workers divides this machine"),
    (["97_rows"], "97_rows has no parameter data: it reads recorded rows"),
    (["no.yaml"], "no.yaml not found"),
    (["list.yaml"], "list.yaml names no notebook; its first line is such as notebook: 03"),
    (["empty.yaml"], "empty.yaml: n has an empty list"),
    (["field.yaml"], "did you mean seeds?"),
    (["torn.yaml"], "torn.yaml is no YAML: while parsing"),
])
def test_a_mistake_is_answered_in_one_line_before_anything_starts(
    tiny, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tiny)
    nbformat.write(nbformat.v4.new_notebook(), tiny / "notebooks" / "97_rows.ipynb")
    files = {"list": "- 98", "empty": "notebook: 98\nparameters: {n: []}",
             "field": "notebook: 98\nseed: 3", "torn": "notebook: [98"}
    for name, text in files.items():
        (tiny / f"{name}.yaml").write_text(text)
    if arguments[0] == "97":
        (tiny / "notebooks" / "97_rows.ipynb").unlink()
    monkeypatch.setattr(engines, "Local", None)
    assert main(["sweep", *arguments]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and message in said


def test_a_dry_run_shows_runs_what_is_complete_and_how_long_the_others_take(tiny, capsys):
    """Estimated from the nearest earlier runs: n = 4 took 30 s with one seed and 50 with another;
    on other images it took 9999.
    """
    pets = str(tiny / "data" / "pets")
    runs = plan_of(tiny, ("n", "4,3"), seeds=2)
    earlier = [(4, 0, pets, 30.0), (4, 1, pets, 50.0), (4, 0, "digits", 9999.0)]
    for i, (n, seed, data, seconds) in enumerate(earlier):
        about = dict(duration=seconds, exception=None, parameters=dict(n=n, seed=seed, data=data))
        notebook = nbformat.v4.new_notebook(metadata={"papermill": about})
        out = runs[0].out if i == 0 else runs[0].out.with_stem(f"98_tiny-{i}")
        out.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, out)
    runs[0].out.with_suffix(".csv").write_text("")
    assert main(["sweep", "98", "-p", "n", "4,3", "--seeds", "2", "--data", pets, "--dry-run",
                 "--workers", "2"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert " ".join(lines[0]) == (
        "4 runs: 1 complete, 3 to do; about 65 s on 2 at a time, by earlier runs")
    assert [line[:-1] for line in lines[2:]] == [
        ["4", "0", "complete"], ["4", "1", "to", "do"], ["3", "0", "to", "do"],
        ["3", "1", "to", "do"]]
    assert [float(line[-1]) for line in lines[2:]] == [30, 50, 30, 50]
    assert sorted(tiny.iterdir()) == [tiny / n for n in ("data", "notebooks", "results")]


def test_a_network_of_ones_own_counts_by_its_source(tiny, monkeypatch, capsys):
    """The notebook inspect_network, by name; the module's text decides, not its place or time."""
    monkeypatch.chdir(tiny)
    monkeypatch.syspath_prepend(str(tiny))
    source = CHECKOUT / "notebooks" / "inspect_network.ipynb"
    (tiny / "notebooks" / source.name).write_text(read_text(source))
    asked = ("inspect_network", [("target", "mine_98:build"), ("weights", ""), ("bits", "4,3")])

    def keys_of():
        combinations = grid.multiplied(grid.ask(*asked, source=str(tiny / "data" / "pets")))
        return [run.task.key for run in plan(combinations, ["bits"])]

    assert main(["sweep", asked[0], "-p", "target", "mine_98:build", "--dry-run"]) == 1
    assert "module 'mine_98' was not found" in capsys.readouterr().err
    module = tiny / "mine_98.py"
    module.write_text("build = None")
    first = keys_of()
    os.utime(module, (1, 1))
    assert keys_of() == first and len({*first}) == 2
    module.write_text("build = 1")
    assert not {*first} & {*keys_of()}


# ---- Losing, refusing, resuming: an engine of plain Python ---------------------------------------


class Scripted:
    """An engine whose places answer as told: place -> function of a Task, None for one that dies
    with it.
    """

    def __init__(self, **places):
        self.places, self.asked, self.is_closed = places, [], False

    def cores(self):
        return dict.fromkeys(self.places, 3)

    def submit(self, place, task, cores):
        self.asked.append((place, task.parameters.get("n"), cores))
        future = concurrent.futures.Future()
        outcome = self.places[place](task)
        if outcome is None:
            del self.places[place]
            self.places[f"{place}+"] = done  # started again by its nanny, under another address
        elif isinstance(outcome, Exception):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)
        return future

    def close(self):
        self.is_closed = True


def done(task):
    row = dict.fromkeys(results.COLUMNS, "")
    row |= {"config_key": f"k{task.parameters.get('n')}", "seed": task.parameters.get("seed", 0)}
    text = ",".join(row) + "\n" + ",".join(map(str, row.values())) + "\n"
    return task_outcome("done", rows=text.encode())


def task_outcome(status, message="", rows=b""):
    notebook = nbformat.writes(nbformat.v4.new_notebook()).encode()
    return task.Outcome(status, message, 1.0, notebook, rows)


def test_what_is_lost_or_refused_runs_elsewhere_and_is_there_once(tiny, capsys):
    runs = plan_of(tiny, ("n", "1,2,3"), seeds=2)
    engine = Scripted(good=done, dying=lambda task: None, other=lambda task: task_outcome(
        "refused", "other: another data"), old=lambda task: ModuleNotFoundError("No module"))
    frame = sweep.sweep(runs, engine)
    assert engine.is_closed and frame.status.eq("done").all()
    expected = [(f"k{n}", seed) for n, seed in itertools.product((1, 2, 3), (0, 1))]
    assert rows_of(results.load()) == expected
    asked = [place for place, _, _ in engine.asked]
    assert asked.count("other") == asked.count("old") == asked.count("dying") == 1
    said = capsys.readouterr().out
    assert said.count("refused: ") == 2 and "lost with its worker, runs again: n=" in said
    assert "refused: ModuleNotFoundError: No module; install the same versions" in said
    again = plan_of(tiny, ("n", "1,2,3"), seeds=2)
    results.local_path().unlink()
    assert sweep.sweep(again, Scripted()).status.eq("complete").all()
    assert rows_of(results.load()) == expected, "though results.csv was moved away"


def test_a_run_that_no_worker_takes_or_that_kills_them_fails_and_the_others_go_on(tiny):
    runs = plan_of(tiny, ("n", "1,2"))
    frame = sweep.sweep(runs, Scripted(other=lambda task: task_outcome("refused", "other: no")))
    assert frame.status.tolist() == ["failed"] * 2 and set(frame.message) == {"other: no"}
    engine = Scripted(one=lambda task: done(task) if task.parameters["n"] == 2 else
                      concurrent.futures.CancelledError())
    frame = sweep.sweep(plan_of(tiny, ("n", "1,2")), engine)
    assert frame.status.tolist() == ["failed", "done"]
    assert frame.message[0] == "3 workers were lost while it ran (out of memory?)"
    assert [n for _, n, _ in engine.asked] == [1, 1, 1, 2]


def test_rows_that_are_none_fail_their_run_and_nothing_is_written(tiny):
    engine = Scripted(one=lambda task: task_outcome("done", rows=b"a,b\n1,2\n"))
    frame = sweep.sweep(plan_of(tiny), engine)
    assert frame.status[0] == "failed" and "lacks the columns" in frame.message[0]
    assert not results.local_path().exists() and plan_of(tiny)[0].status == "to do"


# ---- One run, in a process of its own ------------------------------------------------------------


def test_runs_in_processes_of_their_own(tiny, monkeypatch, capsys):
    """Two at a time: one records a row, with half of the cores; one fails, which says where."""
    monkeypatch.setattr(engines, "usable_cores", lambda: 6)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    write_notebook(tiny, RECORDING + "if n == 2:\n    x = 3\n    raise ValueError('too green')")
    pets = str(tiny / "data" / "pets")
    assert main(["sweep", "98", "-p", "n", "1,2", "--workers", "2", "--data", pets]) == 1
    said = capsys.readouterr().out
    first, second = plan_of(tiny, ("n", "1,2"))
    assert "1 done, 1 failed" in said
    assert (f"failed: n=2: ValueError: too green (cell 3, line 8); see {second.out.stem}"
            ".failed.ipynb\n") in said
    (row,) = results.load().to_dict("records")
    assert (row["config_key"], row["run"], row["device"]) == ("k1", first.task.key, "3")
    assert [first.status, second.status] == ["complete", "to do"]
    assert sorted(f.name for f in first.out.parent.iterdir()) == sorted([
        first.out.name, first.out.with_suffix(".csv").name, f"{second.out.stem}.failed.ipynb"])
    assert notebooks.read(first.out).title == "98 · Tiny"
    assert not list((tiny / "results" / "rows").iterdir()) and not (tiny / "checkpoint").exists()


def test_a_machine_with_other_images_weights_code_or_torch_refuses(tiny, tmp_path, monkeypatch):
    """It finds the same images under another path and name, and calls them as the client does."""
    (run,) = plan_of(tiny)
    worker = tmp_path / "worker"
    (worker / "data").mkdir(parents=True)
    (tiny / "data" / "pets").rename(worker / "data" / "animals")
    monkeypatch.setenv("QUANTLAB_ROOT", str(worker))
    folder = tmp_path / "folder"
    folder.mkdir()
    task._lay_out(folder, run.task)
    parameters, why = task._here(folder, run.task)
    assert not why and parameters["data"] == str(folder / "images" / "pets")
    assert keys.images_hash(parameters["data"]) == run.task.facts["data"]

    def refusal(**facts):
        other = dataclasses.replace(run.task, facts=run.task.facts | facts)
        outcome = task.carry_out(other, 1, None)
        assert outcome.status == "refused"
        return outcome.message

    assert "another package (" in refusal(package="0" * 16)
    assert "; install the same version of quantlab there" in refusal(package="0" * 16)
    assert "another torch (" in refusal(torch="0.4.1")
    next((worker / "data" / "animals" / "train").rglob("*.png")).unlink()
    assert "another data (" in refusal() and "; copy the same images there" in refusal()


# ---- Dask ----------------------------------------------------------------------------------------


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """start(name, **environment): a worker of a scheduler of its own, with a workbook in a folder
    of its own, that has the same images; its process. start.address: the scheduler's.
    """
    pytest.importorskip("distributed", reason="Dask is not installed: pip install -e '.[sweep]'")
    monkeypatch.setenv("DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT", "10s")
    file, processes = tmp_path / "scheduler.json", []

    def launch(*arguments, **options):
        command = [sys.executable, "-m", "distributed.cli." + arguments[0], *arguments[1:]]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        processes.append(subprocess.Popen(command, **quiet, **options))
        return processes[-1]

    def start(name, **environment):
        place = tmp_path / name
        make_image_folder(place / "data" / "pets")
        paths = {"QUANTLAB_ROOT": str(place), "PYTHONPATH": str(CHECKOUT)}
        return launch("dask_worker", "--scheduler-file", str(file), "--nthreads", "2",
                      "--no-nanny", "--no-dashboard", cwd=place,
                      env=os.environ | paths | environment)

    start.scheduler = launch("dask_scheduler", "--host", "127.0.0.1", "--port", "0",
                             "--no-dashboard", "--scheduler-file", str(file))
    start.file = file
    yield start
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.wait()


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)
    return found


def address_of(cluster):
    wait_for(cluster.file.exists)
    return json.loads(read_text(cluster.file))["address"]


def started(folder):
    """n -> processes of the kernels that have started to run a notebook with it."""
    found = {}
    for file in folder.glob("*-*"):
        n, process = map(int, file.name.split("-"))
        found.setdefault(n, []).append(process)
    return found


def ancestor(process, pids):
    """Which of the processes `pids` a process comes from."""
    (found,) = {parent.pid for parent in psutil.Process(process).parents()} & {*pids}
    return found


@pytest.mark.long
def test_a_dask_worker_killed_in_the_middle_loses_nothing_and_leaves_no_kernel(tiny, cluster):
    workers = {worker.pid: worker for worker in (cluster("a"), cluster("b"))}
    folder = tiny / "signals"
    folder.mkdir()
    write_notebook(tiny, RECORDING + WAITING)
    runs = plan_of(tiny, ("n", "1,2"), ("folder", str(folder)))
    engine = engines.Dask(address_of(cluster))
    pool = concurrent.futures.ThreadPoolExecutor()
    frame = pool.submit(sweep.sweep, runs, engine)
    first = wait_for(lambda: len(started(folder)) == 2 and started(folder))
    (kernel,) = first[1]
    killed = ancestor(kernel, workers)
    assert ancestor(first[2][0], workers) != killed
    os.kill(killed, signal.SIGKILL)
    wait_for(lambda: is_gone(kernel), 30)
    (folder / "go").touch()
    frame = frame.result(240)
    assert frame.status.tolist() == ["done", "done"] and [run.losses for run in runs] == [1, 0]
    assert rows_of(results.load()) == [("k1", 0), ("k2", 0)]
    assert set(results.load().device) == {"2"}, "as many threads as the worker has, not Dask's 1"
    assert {n: len(found) for n, found in started(folder).items()} == {1: 2, 2: 1}


def test_a_scheduler_that_does_not_answer_gets_one_line(tiny, monkeypatch, capsys):
    pytest.importorskip("distributed", reason="Dask is not installed: pip install -e '.[sweep]'")
    monkeypatch.setattr(engines, "ANSWER", 1)
    assert main(["sweep", "98", "--scheduler", "tcp://127.0.0.1:1"]) == 1
    assert "no scheduler answers at tcp://127.0.0.1:1 within 1 s" in capsys.readouterr().err
    with pytest.raises(UserError, match="no scheduler answers at nonsense://x"):
        engines.Dask("nonsense://x")


# ---- In make test-long ---------------------------------------------------------------------------


@pytest.fixture
def start_client(tiny):
    """start(folder, *options): the command, a sweep of six runs; its process."""
    clients, environment = [], os.environ | {"PYTHONPATH": str(CHECKOUT)}

    def start(folder, *options):
        command = [sys.executable, "-m", "quantlab", "sweep", "98", "-p", "n", "1,2,3", "--seeds",
                   "2", "-p", "folder", str(folder), "--data", str(tiny / "data/pets"), *options]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        clients.append(subprocess.Popen(command, cwd=tiny, env=environment, **pipes))
        return clients[-1]

    yield start
    for client in clients:
        client.kill()
        client.wait()


EVERY = sorted(itertools.product(("k1", "k2", "k3"), (0, 1)))  # rows of an undisturbed run


def table_of(place):
    """results.csv without what names the machine, as one text a row, sorted."""
    frame = results.load(place / "results" / "results.csv")
    return sorted(frame.drop(columns="device").to_csv(index=False).splitlines())


def all_started(folder):
    return [*itertools.chain(*started(folder).values())]


@pytest.mark.long
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("where", ["local", "dask"])
def test_a_client_stopped_and_started_again_ends_with_the_table_of_an_undisturbed_run(
    tiny, tmp_path, cluster, start_client, how, where
):
    cluster("a"), cluster("b")
    folder = tmp_path / "signals"
    folder.mkdir()
    write_notebook(tiny, RECORDING + WAITING)
    on = ["--scheduler", address_of(cluster)] if where == "dask" else ["--workers", "2"]
    client = start_client(folder, *on)
    kernels = wait_for(lambda: len(found := all_started(folder)) == 2 and found)
    client.send_signal(how)
    said, _ = client.communicate(timeout=120)
    if how == signal.SIGINT:
        assert client.returncode == 130 and "stopped; the same command goes on from here" in said
    wait_for(lambda: all(map(is_gone, kernels)), 30)
    assert not (tiny / "results" / "results.csv").exists()
    (folder / "go").touch()
    again = start_client(folder, *on)
    said, _ = again.communicate(timeout=300)
    assert again.returncode == 0 and "6 done" in said, said
    assert rows_of(results.load()) == EVERY
    disturbed = table_of(tiny)
    shutil.rmtree(tiny / "results")
    assert start_client(folder, "--workers", "1").wait(300) == 0
    assert table_of(tiny) == disturbed
    assert start_client(folder).communicate(timeout=60)[0].count("complete") >= 6


@pytest.mark.long
def test_workers_of_another_version_or_with_other_images_are_refused_in_a_line(
    tiny, tmp_path, cluster
):
    """Also one whose quantlab knows nothing of sweeps. What they refuse runs on the one that is
    right, which comes last.
    """
    old, older = tmp_path / "old", tmp_path / "older"
    for place in (old, older):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(CHECKOUT / "quantlab", place / "quantlab", ignore=ignored)
    with (old / "quantlab" / "affine.py").open("a") as file:
        file.write("# older\n")
    (older / "quantlab" / "workbook" / "task.py").unlink()
    cluster("a", PYTHONPATH=str(old))
    cluster("b", PYTHONPATH=str(older))
    hidden = tmp_path / "hidden"
    cluster("c")
    next((tmp_path / "c" / "data" / "pets" / "train").rglob("*.png")).unlink()
    runs = plan_of(tiny, ("n", "1,2"))
    (tiny / "data").rename(hidden)  # no worker reads the client's disk
    engine = engines.Dask(address_of(cluster))
    wait_for(lambda: len(engine.cores()) == 3)
    frame = sweep.sweep(runs, engine)
    assert set(frame.status) == {"failed"}
    for said in ("another package (", "install the same versions of quantlab", "another data ("):
        assert said in frame.message[0] and "\n" not in frame.message[0], frame.message[0]
    hidden.rename(tiny / "data")
    runs = plan_of(tiny, ("n", "1,2"))
    cluster("d")
    engine = engines.Dask(address_of(cluster))
    wait_for(lambda: len(engine.cores()) == 4)
    assert sweep.sweep(runs, engine).status.eq("done").all()
    assert rows_of(results.load()) == [("k1", 0), ("k2", 0)]


@pytest.mark.long
@pytest.mark.parametrize("code", [
    "time.sleep(600)",
    "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\nwhile True: time.sleep(1)",
], ids=["sleeps", "ignores interrupts"])
def test_a_notebook_that_hangs_fails_and_the_others_are_done(tiny, tmp_path, monkeypatch, code):
    folder = tmp_path / "signals"
    folder.mkdir()
    monkeypatch.setattr(task, "GRACE", 5)
    hang = "(pathlib.Path(folder) / f'{n}-{os.getpid()}').touch()\nif n == 1:\n    "
    write_notebook(tiny, RECORDING + hang + code.replace("\n", "\n    "))
    asked = grid.ask("98", [("n", "1,2"), ("folder", str(folder))],
                     source=str(tiny / "data" / "pets"))
    runs = plan(grid.multiplied(asked), asked.swept, time_limit=8)
    frame = sweep.sweep(runs, engines.Local(2))
    assert frame.status.tolist() == ["failed", "done"]
    assert frame.message[0].startswith("time limit of 8 s reached (--time-limit)")
    assert all(map(is_gone, all_started(folder)))
    assert rows_of(results.load()) == [("k2", 0)]


@pytest.mark.long
def test_a_scheduler_without_workers_or_that_goes_in_the_middle_gets_one_line(
    tiny, tmp_path, cluster, start_client
):
    with pytest.raises(UserError, match="has no worker; start one on each machine"):
        engines.Dask(address_of(cluster))
    cluster("a")
    folder = tmp_path / "signals"
    folder.mkdir()
    write_notebook(tiny, RECORDING + WAITING)
    client = start_client(folder, "--scheduler", address_of(cluster))
    wait_for(lambda: started(folder))
    cluster.scheduler.kill()
    said, _ = client.communicate(timeout=120)
    assert client.returncode == 1
    assert "has gone; start one with: dask scheduler, and the same command goes on" in said
