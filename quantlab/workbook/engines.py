"""Where the runs of a sweep go: processes of this machine, or workers of a Dask scheduler.

An engine is three functions: cores() names the places that take a run now and how many processor
cores each gives it; submit(place, task, cores) returns a future of an Outcome; close() ends all.
"""

import concurrent.futures
import dataclasses
import os
import threading

import psutil

from quantlab.system.errors import UserError, one_line
from quantlab.system.machine import device
from quantlab.workbook.task import Outcome, Task, carry_out

ANSWER = 10  # seconds in which a scheduler must
MEMORY = 3 * 2**30  # bytes that a run may need
# Not a function: a worker looks it up while it reads a message, and ends where there is none.
ON_WORKER = "__import__('quantlab.workbook.engines').workbook.engines.on_worker(given, cores)"
LOST = ("CancelledError", "FutureCancelledError", "KilledWorker")  # names: Dask may be absent
START = "start one with: dask scheduler"


class Local:
    """Processes of this machine, its cores divided between them."""

    def __init__(self, workers):
        names = [f"local {i + 1}" for i in range(workers)]
        self._cores = dict.fromkeys(names, max(1, usable_cores() // workers))
        self._stop = threading.Event()
        self._pool = concurrent.futures.ThreadPoolExecutor(workers)

    def cores(self):
        return self._cores

    def submit(self, place, task, cores):
        return self._pool.submit(carry_out, task, cores, lambda: not self._stop.is_set())

    def close(self):
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)


def usable_cores():
    """Processor cores that this process may use."""
    has_affinity = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1


def default_workers():
    """How many runs at a time: one a core as far as memory goes, one on an accelerator."""
    if device().type != "cpu":
        return 1
    return max(1, min(usable_cores(), psutil.virtual_memory().available // MEMORY))


class Dask:
    """Workers of a Dask scheduler: one run at a time on each, with the worker's threads as cores.

    UserError where none answers, and later where it has gone.
    """

    def __init__(self, address):
        try:
            import distributed
        except ModuleNotFoundError:
            raise UserError("--scheduler needs Dask, which is not installed here: "
                            "pip install -e '.[sweep]'") from None
        self.address = address
        try:
            self._client = distributed.Client(address, timeout=ANSWER, set_as_default=False)
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"no scheduler answers at {one_line(address)} within {ANSWER} s "
                            f"({type(error).__name__}); {START}") from None
        try:
            self._client.wait_for_workers(1, timeout=ANSWER)
        except TimeoutError:
            self.close()
            raise UserError(f"the scheduler at {address} has no worker; start one on each machine, "
                            f"in its workbook, with: dask worker {address} --nworkers 1") from None

    def cores(self):
        try:
            return self._client.nthreads()
        except (OSError, ValueError, RuntimeError):
            raise UserError(f"the scheduler at {self.address} has gone; {START}, and the same "
                            "command goes on from here") from None

    def submit(self, place, task, cores):
        given = {"given": dataclasses.asdict(task), "cores": cores}
        return self._client.submit(eval, ON_WORKER, given, workers=[place], pure=False)

    def close(self):
        self._client.close(timeout=ANSWER)


def on_worker(given, cores):
    """What a worker of Dask does: the Outcome of a Task, given by its fields."""
    from distributed import get_worker

    worker = get_worker()
    own = worker.state.tasks[worker.get_current_task()]
    # no longer when the client has gone or has given this run to another worker
    return carry_out(Task(**given), cores, lambda: own.state == "executing")


def outcome_of(future):
    """The Outcome of a future that is done; where it raised, that of a worker that was lost or that
    cannot carry out anything.
    """
    try:
        return future.result()
    except Exception as error:  # whatever a worker of another version says
        if type(error).__name__ in LOST:
            return Outcome("lost")
        if isinstance(error, (UserError, OSError)):  # a full disk
            return Outcome("refused", one_line(error))
        said = f"{type(error).__name__}: {one_line(error)}"
        return Outcome("refused", f"{said}; install the same versions of quantlab and Python there")
