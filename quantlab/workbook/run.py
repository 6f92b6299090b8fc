"""Re-run notebooks headlessly with papermill: strict parameters, skip what is complete, survive a kill, end with a table and a report."""

import hashlib
import json
import os
import pathlib
import time

import pandas as pd

from quantlab.images import datasets as data
from quantlab.images import imageset
from quantlab.system.errors import UserError
from quantlab.system.files import PACKAGE, atomic_path, root, sha256, write_text
from quantlab.workbook import notebooks as workbook
from quantlab.workbook import results

TIME_LIMIT = 3 * 3600  # seconds a notebook
# glibc gives every large tensor back to the system, and each new one is mapped anew, page by page; with these it keeps what it has.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": 2**25, "MALLOC_TRIM_THRESHOLD_": 2**30, "MALLOC_TOP_PAD_": 2**27}  # bytes; 2^25 is the largest allowed


def runs_folder():
    return root() / "results" / "runs"


def run(numbers=(), overrides=None, *, source=None, force=False, time_limit=TIME_LIMIT):
    """Execute notebooks (none named: all, in order) and return a frame: notebook, status (done, skipped, failed), seconds, message.

    overrides: parameter -> text. With notebooks named, each must know every parameter; without, those that know it get it.
    source: the data set, for those notebooks that have the parameter `data`. Paths are relative to the working directory.
    A run is keyed by notebook, package, parameters, checkpoints and data; what is complete under its key is skipped, unless `force`.
    The executed notebook appears in results/runs when it is complete; a failed one is kept as NAME.failed.ipynb to look at.
    """
    chosen = [workbook.find(n) for n in numbers] if numbers else list(workbook.notebooks().values())
    overrides = dict(overrides or {})
    _check_known(overrides, chosen, strict=bool(numbers))
    overrides |= {"data": source} if source else {}
    for name in ("data", "checkpoint"):  # a notebook runs in the workbook's folder, wherever this command was typed
        if name in overrides and pathlib.Path(overrides[name]).exists():
            overrides[name] = str(pathlib.Path(overrides[name]).resolve())
    plans = [(nb, {k: workbook.check_parameter(nb, k, v) for k, v in overrides.items() if k in nb.parameters}) for nb in chosen]
    lines = []
    for notebook, parameters in plans:
        started = time.perf_counter()
        status, message = _run_one(notebook, parameters, force, time_limit)
        seconds = time.perf_counter() - started
        lines.append({"notebook": notebook.path.stem, "status": status, "seconds": round(seconds, 1), "message": message})
    return pd.DataFrame(lines)


def _check_known(overrides, chosen, strict):
    for name in overrides:
        knowing = [nb for nb in chosen if name in nb.parameters]
        if not knowing or strict and len(knowing) < len(chosen):
            stranger = next(nb for nb in chosen if name not in nb.parameters)
            workbook.check_parameter(stranger, name, overrides[name])  # raises, with a suggestion


def _run_one(notebook, parameters, force, time_limit):
    try:
        out = runs_folder() / f"{notebook.path.stem}-{run_key(notebook, parameters)}.ipynb"
        is_report = "data" not in notebook.parameters
        has_rows = "results.record(" in (source := notebook.path.read_text(encoding="utf-8")) or "results.once(" in source
        recorded = not has_rows or notebook.path.stem in set(results.load().notebook)  # its rows may have been moved away
        complete = out.exists() and recorded and not force
        if not complete:
            print(f"\n{notebook.path.stem}: {notebook.title}", flush=True)
            execute(notebook.path, out, parameters, time_limit)
        if is_report and "report" in notebook.path.stem and not (complete and _is_newer(report_path(), out)):
            export_html(out, report_path())
        return ("skipped", f"complete: {out.name}") if complete else ("done", out.name)
    except UserError as error:
        return "failed", str(error)


def report_path():
    return root() / "results" / "report.html"


def _is_newer(file, other):
    return file.exists() and file.stat().st_mtime >= other.stat().st_mtime


def run_key(notebook, parameters):
    """Sixteen hex digits of everything that decides what a notebook computes."""
    parts = [notebook.path.read_text(encoding="utf-8"), json.dumps({**notebook.parameters, **parameters}, sort_keys=True)]
    parts += [file.read_text(encoding="utf-8") for file in sorted([*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.c")])]
    if "data" in notebook.parameters:
        place = data.find_data(parameters.get("data", notebook.parameters["data"]))
        parts.append(json.dumps(imageset.state(pathlib.Path(place)) if pathlib.Path(place).exists() else place))
        model, named = ({**notebook.parameters, **parameters}[name] for name in ("model", "checkpoint"))
        weights = (root() / "checkpoint").glob(f"{model}-*.safetensors") if named == "auto" else [pathlib.Path(named)]
        parts += [f"{file.name} {sha256(file)}" for file in sorted(weights) if file.is_file() and ".training" not in file.name]
    else:  # a notebook without data reads results
        parts += [sha256(file) for file in (results.local_path(), results.published_path()) if file.exists()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def execute(source, out, parameters, time_limit=TIME_LIMIT):
    """Run one notebook with papermill into `out`; UserError with the notebook's own last line when a cell fails or time is up."""
    import papermill
    from nbclient.exceptions import CellTimeoutError, DeadKernelError

    deadline = time.monotonic() + time_limit
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")  # or every kernel start prints a debugger's warning
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin while they wait slow a busy machine by 20 times
    for name, size in ALLOCATOR.items():
        os.environ.setdefault(name, str(size))
    failed = out.parent / f"{source.stem}.failed.ipynb"
    with atomic_path(out) as temporary:
        try:
            papermill.execute_notebook(
                str(source), str(temporary), parameters=parameters, cwd=str(root()), progress_bar=True, log_output=False,
                timeout_func=lambda cell: max(1, int(deadline - time.monotonic())),  # what is left of the notebook's time
                extra_arguments=["--log-level=ERROR"],  # or every kernel warns that it talks over the loopback device unencrypted
            )
        except papermill.PapermillExecutionError as error:
            os.replace(temporary, failed)
            raise UserError(f"{error.ename}: {error.evalue.splitlines()[0] if error.evalue else ''} (cell {error.exec_count}; see {failed.name})") from None
        except (CellTimeoutError, DeadKernelError) as error:
            os.replace(temporary, failed)
            why = f"time limit of {time_limit} s reached (--time-limit)" if isinstance(error, CellTimeoutError) else "the kernel died (out of memory?)"
            raise UserError(f"{why}; see {failed.name}") from None
    failed.unlink(missing_ok=True)


def export_html(executed, out):
    """An executed notebook as one HTML file, pictures inside, code left out."""
    import nbconvert

    exporter = nbconvert.HTMLExporter(exclude_input=True, exclude_input_prompt=True, exclude_output_prompt=True, embed_images=True)
    html, _ = exporter.from_filename(str(executed))
    write_text(out, html)
    return out


def status_table(frame):
    """The frame of `run` as text, then where the report is."""
    width = max(len(name) for name in frame.notebook)
    lines = [f"{'notebook':{width}}  status   seconds  message"]
    lines += [f"{r.notebook:{width}}  {r.status:7}  {r.seconds:7.1f}  {r.message}" for r in frame.itertuples()]
    return "\n".join([*lines, f"report: {report_path()}" if report_path().exists() else "report: none yet (notebook 11 writes it)"])
