"""Re-run notebooks headlessly with papermill: strict parameters, skip what is complete, survive a
kill, end with a table and a report.
"""

import functools
import itertools
import os
import platform
import re
import time

import pandas as pd

from quantlab.system.errors import UserError
from quantlab.system.files import data_folder, root, write_text
from quantlab.workbook import results
from quantlab.workbook.engines import default_workers
from quantlab.workbook.execute import execute, undrawn
from quantlab.workbook.keys import names_network, run_key
from quantlab.workbook.request import TIME_LIMIT, is_smoke, requested
from quantlab.workbook.together import outcomes


def runs_folder():
    return root() / "results" / "runs"


def report_path():
    return root() / "results" / "report.html"


def run(numbers=(), overrides=None, *, source=None, force=False, time_limit=TIME_LIMIT, workers=1):
    """Execute notebooks (none named: all, in order); a frame of notebook, status (done, skipped,
    failed), seconds, message.

    numbers, overrides, source: as in `requested`. What is complete under its key (`run_key`) is
    skipped, unless `force`; its rows are recorded again, as if it had run. The executed notebook
    appears in results/runs when it is complete; a failed one is kept as NAME.failed.ipynb.
    workers: how many at a time; None: one a core where all are smoke runs, whose times are no
    measurements, else one.
    """
    plan = requested(numbers, overrides, source)
    remove_temporaries()
    if workers is None:
        workers = default_workers() if all(is_smoke(*part) for part in plan) else 1
    lines = []
    for is_alone, parts in itertools.groupby(plan, _is_alone):
        parts = [(*part, force, time_limit) for part in parts]
        several = 1 if is_alone else min(workers, len(parts))
        run_all = functools.partial(outcomes, workers=several) if several > 1 else itertools.starmap
        lines += [[part[0].path.stem, *ended]
                  for part, ended in zip(parts, run_all(_timed, parts))]
    return pd.DataFrame(lines, columns=["notebook", "status", "seconds", "message"])


def _is_alone(part):
    """Whether others wait for a notebook's end or it waits for theirs: one that trains the network,
    and the report.
    """
    notebook = part[0]
    return "retrain" in notebook.parameters or notebook.is_report


def _timed(*part):
    """(status, seconds, message) of `_run_one`."""
    started = time.perf_counter()
    status, message = _run_one(*part)
    return status, round(time.perf_counter() - started, 1), message


def combined(parts, **options):
    """`run` of one (numbers, overrides) after the other: their lines in one frame."""
    return pd.concat([run(*part, **options) for part in parts], ignore_index=True)


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
        rows = out.with_suffix(".csv")
        complete = not force and is_complete(out)
        if complete:
            results.count_again(rows)  # results.csv may have been moved away, or be of other code
        else:
            print(f"\n{notebook.path.stem}: {notebook.title}", flush=True)
            with results.rows_of_run(key, rows):
                # a network of one's own is meant as it is found where the command was typed
                folder = os.getcwd() if names_network(notebook, parameters) else None
                execute(notebook.path, out, parameters, time_limit, folder)
        if notebook.is_report:
            export_html(out, report_path())
        return ("skipped", f"complete: {out.name}") if complete else ("done", out.name)
    except UserError as error:
        return "failed", str(error)


def is_complete(out):
    """Whether an executed notebook is there, all its figures, and what the run recorded."""
    return out.exists() and out.with_suffix(".csv").exists() and not undrawn(out)


# nothing is fetched when the page is opened: no scripts for widgets and formulas
OFFLINE = "{%- extends 'lab/index.html.j2' -%}" + "".join(
    f"{{% block {name} %}}{{% endblock %}}" for name in (
        "html_head_js", "html_head_js_mathjax", "html_head_js_mermaidjs", "jupyter_widgets"))

# Cells without outputs are not there; words end where lines do; numbers stay in one line where
# there is room. What is too wide for a screen scrolls in its own box, also a figure whose text
# would be too small to read.
STYLE = """
.jp-CodeCell.jp-mod-noOutputs { display: none; }
.jp-OutputArea-output, .jp-OutputArea-output pre, .jp-MarkdownOutput {
    overflow-wrap: break-word; word-break: normal; }
@media (min-width: 700px) { td[style*="right"], td:first-child { white-space: nowrap; } }
.jp-RenderedImage img { max-width: max(100%, 640px) !important; }
"""
READABLE = "{% block html_head_css %}{{ super() }}<style>" + STYLE + "</style>{% endblock %}"


def export_html(executed, out):
    """An executed notebook as one HTML file, pictures inside; code and cells tagged intro left out.
    """
    import nbconvert

    exporter = nbconvert.HTMLExporter(
        exclude_input=True, exclude_input_prompt=True, exclude_output_prompt=True,
        embed_images=True, raw_template=OFFLINE + READABLE,
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
