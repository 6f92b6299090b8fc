"""One notebook, executed by papermill; loads without torch.

    execute(source, out, {"weight_bits": 3})
"""

import json
import os
import re
import time

from quantlab.system.errors import UserError
from quantlab.system.files import atomic_path, root
from quantlab.workbook import notebooks
from quantlab.workbook.request import TIME_LIMIT

KERNEL_OPTIONS = [
    "--log-level=ERROR",  # or every one warns that it talks over the loopback device unencrypted
    "--matplotlib=inline",  # figures become pictures, whatever MPLBACKEND says
]


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
            why = undrawn(temporary)
        except papermill.PapermillExecutionError as error:
            said = error.evalue.splitlines()[0] if error.evalue else ""
            why = f"{error.ename}: {said} (cell {error.exec_count}{_line(error)})"
        except CellTimeoutError:
            why = f"time limit of {time_limit} s reached (--time-limit)"
        except RuntimeError as error:  # at its start or later
            why = f"the kernel died (out of memory?): {str(error).splitlines()[0]}"
        if not why:
            failed.unlink(missing_ok=True)
            return
        os.replace(temporary, failed)
        raise UserError(f"{why}; see {failed.name}")


def _line(error):
    """Where in its cell a cell failed: ", line 3"; "" where that is not said."""
    said = re.sub(r"\x1b\[[\d;]*m", "", "\n".join(error.traceback))
    found = re.search(rf"Cell In\[{error.exec_count}\], line (\d+)", said)
    return f", line {found[1]}" if found else ""


def undrawn(executed):
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
