"""One run of a sweep on whatever machine: in a process and a folder of its own, the notebook and
its parameters sent, what it executed and recorded sent back as bytes.

    outcome = carry_out(Task(...), cores=2, wanted=lambda: True)
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import pickle
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time

import psutil

from quantlab.system.errors import UserError, one_line
from quantlab.system.files import PACKAGE, read_text, root, write_text

GRACE = 60  # seconds beyond the time limit, for a kernel that does not answer
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
REMEDIES = {  # for what may be another on a worker's machine
    "package": "install the same version of quantlab there",
    "torch": "install the same version there",
    "data": "copy the same images there and name them in QUANTLAB_DATA",
    "checkpoint": "copy the same file there",
    "weights": "copy the same file there",
    "network": "copy the same module there",
}


@dataclasses.dataclass(frozen=True)
class Task:
    """A run of a notebook: its file's name and text, its key, the parameters it is given, the facts
    of `keys.facts` and torch's version that must be the same where it runs, the variables of
    `keys.ENVIRONMENT`, seconds it may take.
    """

    name: str
    text: str
    key: str
    parameters: dict
    facts: dict
    environment: dict
    time_limit: int


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a Task: done, failed, or refused by this machine; one line that says why; the
    seconds it took; the executed notebook and the rows, b"" where there is none.
    """

    status: str
    message: str = ""
    seconds: float = 0.0
    notebook: bytes = b""
    rows: bytes = b""


def carry_out(task, cores, wanted):
    """The Outcome of a Task, run on `cores` processor cores.

    wanted: a function; when it returns False the run is killed, its kernel with it. So they are
    when this process dies.
    """
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="quantlab-run-", ignore_cleanup_errors=True) as folder:
        place = pathlib.Path(folder).resolve()
        _lay_out(place, task)
        parameters, other = _here(place, task)
        if other:
            return Outcome("refused", f"{platform.node()}: {other}")
        with (place / "stderr").open("wb") as errors:
            child = subprocess.Popen(
                [sys.executable, "-m", "quantlab.workbook.task"], stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL, stderr=errors, env=_environment(place, task, cores),
                start_new_session=True)
        try:
            # a network of one's own is imported from where this machine's worker was started
            own = os.getcwd() if "network" in task.facts else None
            why = _wait(child, (task.name, parameters, task.time_limit, own), wanted)
        finally:
            kill(child.pid)
            child.wait()
            child.stdin.close()
        seconds = round(time.perf_counter() - started, 1)
        return Outcome("failed", why, seconds) if why else _outcome(place, task, child, seconds)


def _wait(child, order, wanted):
    """Until a child has ended: ""; else why it must."""
    with contextlib.suppress(BrokenPipeError):
        child.stdin.write(pickle.dumps(order))
        child.stdin.flush()  # and left open: its end tells the child that this process has died
    limit = order[2]
    deadline = time.monotonic() + limit + GRACE
    while child.poll() is None:
        if not wanted():
            return "stopped"
        if time.monotonic() > deadline:
            return f"time limit of {limit} s reached (--time-limit), and the kernel does not answer"
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(0.1)
    return ""


def kill(process):
    """Kill a process and all that it has started, in whatever session; of this process, only that.
    """
    with contextlib.suppress(psutil.NoSuchProcess):
        top = psutil.Process(process)
        for one in [*top.children(recursive=True), top]:
            if one.pid != os.getpid():
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()


def _outcome(place, task, child, seconds):
    try:
        why = json.loads(read_text(place / "outcome.json"))
    except UserError:  # it was killed, or crashed
        said = (place / "stderr").read_text("utf-8", "replace").strip().splitlines() or [""]
        why = f"the run ended with status {child.returncode}: {one_line(said[-1])}"
    failed = f"{pathlib.Path(task.name).stem}.failed.ipynb"
    files = [place / failed] if why else [place / "executed.ipynb", place / "rows.csv"]
    contents = [file.read_bytes() if file.is_file() else b"" for file in files]
    return Outcome("failed" if why else "done", why, seconds, *contents)


# ---- Its folder ----------------------------------------------------------------------------------


def _lay_out(place, task):
    """The workbook as a run sees it: what it only reads is linked, what it writes is its own; what
    it keeps for later runs (`results.once`) goes to the workbook of this machine.
    """
    home = root()
    (place / "notebooks").mkdir()
    (place / "notebooks" / task.name).write_text(task.text, encoding="utf-8")
    kept = home / "results" / "rows"
    kept.mkdir(parents=True, exist_ok=True)
    recorded = [home / "results" / f"{name}.csv" for name in ("published", "original", "bench")]
    weights = [f for f in (home / "checkpoint").glob("*") if ".training." not in f.name]
    for file in (home / "data", home / "pyproject.toml", kept, *recorded, *weights):
        link = place / file.relative_to(home)
        link.parent.mkdir(exist_ok=True)
        if file.exists():
            link.symlink_to(file)


def _environment(place, task, cores):
    """The variables of a run. Assigned and not defaulted: Dask sets one thread for its workers."""
    own = {name: str(cores) for name in THREADS}
    own |= {"QUANTLAB_ROOT": str(place), "QUANTLAB_RUN": task.key,
            "QUANTLAB_ROWS": str(place / "rows.csv")}
    more = os.environ.get("PYTHONPATH")
    own["PYTHONPATH"] = f"{PACKAGE.parent}{os.pathsep}{more}" if more else str(PACKAGE.parent)
    given = {name: value for name, value in task.environment.items() if value is not None}
    dropped = {*task.environment, "MALLOC_TRIM_THRESHOLD_"}
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return kept | given | own


def _here(place, task):
    """(parameters, ""), with the paths of this machine for the same weights and images; or (None,
    what decides the numbers and is another here).
    """
    from quantlab.images.files import find_cifar10, find_images

    parameters, others = dict(task.parameters), []
    for name in ("checkpoint", "weights"):
        named = pathlib.Path(str(parameters.get(name, "")))
        if named.is_absolute() and not named.exists():
            parameters[name] = f"checkpoint/{named.name}"
    sources = dict.fromkeys([parameters["data"], find_cifar10(), find_images()])
    for source in filter(None, sources):
        try:
            name, told = _difference(task, place, parameters | {"data": source})
        except UserError as error:
            name, told = "data", str(error)
        if not name:
            return parameters | {"data": _called(place, parameters["data"], source)}, ""
        others.append((name == "data", told))
    # of the images it is said only where all the rest is the same
    return None, next((told for is_data, told in others if not is_data), others[-1][1])


def _difference(task, place, parameters):
    """What decides the numbers and is another here than a Task wants, and a line about it; "", ""
    where nothing is.
    """
    import torch

    from quantlab.workbook import keys, notebooks

    notebook = notebooks.read(place / "notebooks" / task.name)
    ours = keys.facts(notebook, parameters) | {"torch": torch.__version__}
    for name, wanted in task.facts.items():
        if ours.get(name) != wanted:
            told = f"another {name} ({str(ours.get(name))[:12]}, not {str(wanted)[:12]})"
            return name, f"{told}; {REMEDIES.get(name, 'install the same versions there')}"
    return "", ""


def _called(place, wanted, source):
    """`source`, or a link to it with the name of the client's images, which names them in rows."""
    name = pathlib.Path(wanted).name
    if pathlib.Path(source).name == name:
        return source
    link = place / "images" / name
    link.parent.mkdir()
    link.symlink_to(pathlib.Path(source).resolve())
    return str(link)


# ---- In the process ------------------------------------------------------------------------------


def main():
    """Execute what standard input names; in outcome.json stands why it failed, "" if it did not."""
    order = pickle.load(sys.stdin.buffer)
    # papermill would import it: a grammar of addresses, a second's work that no notebook needs
    sys.modules["rfc3987_syntax"] = None
    threading.Thread(target=_end_with_parent, daemon=True).start()
    write_text(root() / "outcome.json", json.dumps(_execute(*order)))
    kill(os.getpid())


def _end_with_parent():
    os.read(0, 1)  # the parent writes nothing more: this returns when it has gone
    kill(os.getpid())
    shutil.rmtree(root(), ignore_errors=True)
    os._exit(1)


def _execute(name, parameters, time_limit, folder):
    from quantlab.workbook.execute import execute

    source, out = root() / "notebooks" / name, root() / "executed.ipynb"
    failed = root() / f"{source.stem}.failed.ipynb"
    for is_last in (False, True):
        try:
            execute(source, out, parameters, time_limit, folder)
            return ""
        except UserError as error:
            has_begun = failed.is_file() and re.search(r'"execution_count": \d', read_text(failed))
            if is_last or has_begun or not failed.is_file():
                return str(error)  # else its kernel did not start: two chose one port


if __name__ == "__main__":
    main()
