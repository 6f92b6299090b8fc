"""Results and figures in one zip file, to take home from a machine that is gone tomorrow.

    !python -m quantlab zip              # in Colab; then download workbook.zip
"""

import pathlib
import subprocess
import zipfile

from quantlab.system.errors import UserError
from quantlab.system.files import atomic_path, root

KEPT = ("results/*.csv", "results/*.html", "results/runs/*.ipynb", "results/figures/*",
        "results/tables/*", "results/search-*", "results/rows/*.network.safetensors", "pic/*",
        "checkpoint/*-w?a?.*")


def bundle(out):
    """Write all that runs have made, by its place in the workbook, into the zip file `out`;
    (path, number of files). UserError where nothing was made yet.
    """
    found = sorted({path for kind in KEPT for path in root().glob(kind) if path.is_file()})
    if not _made_here(found):
        raise UserError("no notebook has been run here yet; python -m quantlab run")
    with atomic_path(pathlib.Path(out)) as temporary, zipfile.ZipFile(
            temporary, "w", zipfile.ZIP_DEFLATED) as file:
        for path in found:
            file.write(path, path.relative_to(root()))
    return pathlib.Path(out), len(found)


def _made_here(found):
    """Of these files those that are not committed as they are; all of them outside git.

    Cells that were run one after the other, as in Colab, leave rows and figures but no run.
    """
    git = ["git", "ls-files", "-z", "--others", "--modified", "--", "results", "pic", "checkpoint"]
    try:
        done = subprocess.run(git, cwd=root(), capture_output=True, text=True, encoding="utf-8")
    except FileNotFoundError:
        return found
    names = set(done.stdout.split("\0"))
    return [path for path in found
            if done.returncode or path.relative_to(root()).as_posix() in names]
