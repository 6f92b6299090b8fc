"""Re-run notebooks headlessly with papermill: strict parameters, skip what is complete, survive a
kill, end with a table and a report.
"""

import json
import os
import platform
import re
import time

import pandas as pd

from quantlab.system.errors import UserError
from quantlab.system.files import atomic_path, data_folder, root, write_text
from quantlab.workbook import notebooks, results
from quantlab.workbook.keys import run_key
from quantlab.workbook.request import TIME_LIMIT, requested

KERNEL_OPTIONS = [
    "--log-level=ERROR",  # or every one warns that it talks over the loopback device unencrypted
    "--matplotlib=inline",  # figures become pictures, whatever MPLBACKEND says
]


def runs_folder():
    return root() / "results" / "runs"


def report_path():
    return root() / "results" / "report.html"


def run(numbers=(), overrides=None, *, source=None, force=False, time_limit=TIME_LIMIT):
    """Execute notebooks (none named: all, in order); a frame of notebook, status (done, skipped,
    failed), seconds, message.

    numbers, overrides, source: as in `requested`. What is complete under its key (`run_key`) is
    skipped, unless `force`; its rows are recorded again, as if it had run. The executed notebook
    appears in results/runs when it is complete; a failed one is kept as NAME.failed.ipynb.
    """
    lines, plan = [], requested(numbers, overrides, source)
    remove_temporaries()
    for notebook, parameters in plan:
        started = time.perf_counter()
        status, message = _run_one(notebook, parameters, force, time_limit)
        seconds = round(time.perf_counter() - started, 1)
        lines.append([notebook.path.stem, status, seconds, message])
    return pd.DataFrame(lines, columns=["notebook", "status", "seconds", "message"])


def remove_temporaries():
    """Delete the hidden temporary files (`atomic_path`) that killed processes of this machine left.
    """
    parts = ("results", "results/runs", "results/rows", "pic", "checkpoint", "notebooks")
    folders = [*(root() / part for part in parts), data_folder() / "cache"]
    name = re.compile(rf"\..*-{re.escape(platform.node())}-(\d+)-[a-z0-9_]{{8}}(\.\w+)?")
    for file in [file for folder in folders for file in folder.glob(".*")]:
        match = name.fullmatch(file.name)
        if match and not _is_alive(int(match[1])):
            file.unlink(missing_ok=True)


def _is_alive(process):
    if os.name != "posix":  # there is no asking without harm
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        pass
    return True


def _run_one(notebook, parameters, force, time_limit):
    if notebook.problem:
        return "failed", notebook.problem
    try:
        key = run_key(notebook, parameters)
        out = runs_folder() / f"{notebook.path.stem}-{key}.ipynb"
        rows = out.with_suffix(".csv")  # what the run recorded; there when it is complete
        complete = out.exists() and rows.exists() and not force and not _undrawn(out)
        if complete:
            results.count_again(rows)  # results.csv may have been moved away, or be of other code
        else:
            print(f"\n{notebook.path.stem}: {notebook.title}", flush=True)
            with results.rows_of_run(key, rows):
                execute(notebook.path, out, parameters, time_limit)
        if "report" in notebook.path.stem:
            export_html(out, report_path())
        return ("skipped", f"complete: {out.name}") if complete else ("done", out.name)
    except UserError as error:
        return "failed", str(error)


def execute(source, out, parameters, time_limit=TIME_LIMIT, folder=None):
    """Run one notebook with papermill into `out`; UserError with the notebook's own last line when
    a cell fails or time is up. folder: its working directory, by default the workbook.
    """
    import papermill
    from jupyter_client.kernelspec import NoSuchKernel, get_kernel_spec
    from nbclient.exceptions import CellTimeoutError

    kernel, language = notebooks.kernel(source)
    try:
        get_kernel_spec(kernel)
    except NoSuchKernel:
        raise UserError(f"{source.name} wants the kernel {kernel!r}, which is not installed here; "
                        "choose Python 3 (ipykernel) for it in JupyterLab") from None
    deadline = time.monotonic() + time_limit
    _set_up_kernels()
    failed = out.parent / f"{source.stem}.failed.ipynb"
    with atomic_path(out) as temporary:
        try:
            papermill.execute_notebook(
                str(source), str(temporary), parameters=parameters, cwd=str(folder or root()),
                progress_bar=True, log_output=False, kernel_name=kernel, language=language,
                timeout_func=lambda cell: max(1, int(deadline - time.monotonic())),  # what is left
                extra_arguments=KERNEL_OPTIONS,
            )
            why = _undrawn(temporary)
        except papermill.PapermillExecutionError as error:
            said = error.evalue.splitlines()[0] if error.evalue else ""
            why = f"{error.ename}: {said} (cell {error.exec_count})"
        except CellTimeoutError:
            why = f"time limit of {time_limit} s reached (--time-limit)"
        except RuntimeError as error:  # at its start or later
            why = f"the kernel died (out of memory?): {str(error).splitlines()[0]}"
        if not why:
            failed.unlink(missing_ok=True)
            return
        os.replace(temporary, failed)
        raise UserError(f"{why}; see {failed.name}")


def _undrawn(executed):
    """What to say of an executed notebook in which figures are texts, not pictures; else ""."""
    cells = json.loads(executed.read_text(encoding="utf-8")).get("cells", [])
    shown = [o.get("data", {}) for cell in cells for o in cell.get("outputs", [])]
    figure = re.compile(r"<Figure size .* with [1-9]")  # one without axes has no picture anyway
    figures = [data for data in shown if figure.match("".join(data.get("text/plain", "")))]
    missing = sum(not any(kind.startswith("image/") for kind in data) for data in figures)
    what = f"{missing} of {len(figures)} figures have no picture"
    return f"{what}: leave matplotlib's backend to the notebook" if missing else ""


def _set_up_kernels():
    """What kernels find in their environment, where the user has not chosen otherwise."""
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")  # or each prints a debugger's note
    # threads that spin while they wait slow a busy machine by 20 times
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


# nothing is fetched when the page is opened: no scripts for widgets and formulas
OFFLINE = "{%- extends 'lab/index.html.j2' -%}" + "".join(
    f"{{% block {name} %}}{{% endblock %}}" for name in (
        "html_head_js", "html_head_js_mathjax", "html_head_js_mermaidjs", "jupyter_widgets"))


def export_html(executed, out):
    """An executed notebook as one HTML file, pictures inside; code and cells tagged intro left out.
    """
    import nbconvert

    exporter = nbconvert.HTMLExporter(
        exclude_input=True, exclude_input_prompt=True, exclude_output_prompt=True,
        embed_images=True, raw_template=OFFLINE,
    )
    tagged = nbconvert.preprocessors.TagRemovePreprocessor(remove_cell_tags={"intro"})
    exporter.register_preprocessor(tagged, enabled=True)
    html, _ = exporter.from_filename(str(executed))
    write_text(out, html)
    return out


def status_table(frame):
    """The frame of `run` as text, then where the report is."""
    width = max(len(name) for name in frame.notebook)
    lines = [f"{'notebook':{width}}  status   seconds  message"]
    for r in frame.itertuples():
        lines.append(f"{r.notebook:{width}}  {r.status:7}  {r.seconds:7.1f}  {r.message}")
    where = report_path() if report_path().exists() else "none yet (the last notebook writes it)"
    return "\n".join([*lines, f"report: {where}"])
