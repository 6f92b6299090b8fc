"""Several notebooks at a time, each in a process of its own.

    for status, seconds, message in outcomes(function, parts, workers=2): ...   # parts' order
"""

import concurrent.futures
import contextlib
import multiprocessing
import os
import threading
from concurrent.futures.process import BrokenProcessPool

from tqdm.auto import tqdm

from quantlab.workbook.engines import usable_cores
from quantlab.workbook.task import THREADS, kill

LOST = ("its process, or one beside it, was killed (out of memory?); run again with --workers 1: "
        "what is complete is skipped")


def outcomes(function, parts, workers):
    """[(status, seconds, message)] that function(*part) returns for every part; a bar, and a line
    for each that has ended. What function prints is not shown.

    function: of a module; part: what pickle takes, a Notebook first. Whatever ends this, also
    Ctrl-C, ends the processes; they also end when this process is killed.
    """
    cores = max(1, usable_cores() // workers)
    print(f"\n{len(parts)} notebooks, {workers} at a time", flush=True)
    pool = concurrent.futures.ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), _prepare, [cores])
    waiting, found = {pool.submit(_quietly, function, part): part for part in parts}, {}
    try:
        for future in tqdm(concurrent.futures.as_completed(waiting), "notebooks", len(waiting),
                           unit=" notebooks", disable=None):
            part = waiting[future]
            found[id(part)] = _outcome(future)
            status, seconds, _ = found[id(part)]
            tqdm.write(f"{status}: {part[0].path.stem}, {seconds:.0f} s")
    except BaseException:
        kill(os.getpid())  # all that it has started
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    return [found[id(part)] for part in parts]


def _outcome(future):
    try:
        return future.result()
    except BrokenProcessPool:
        return "failed", 0.0, LOST


# ---- In a process --------------------------------------------------------------------------------


def _prepare(cores):
    for name in THREADS:
        os.environ.setdefault(name, str(cores))
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
    multiprocessing.parent_process().join()
    kill(os.getpid())
    os._exit(1)


def _quietly(function, part):
    with (open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere),
          contextlib.redirect_stderr(nowhere)):
        return function(*part)
