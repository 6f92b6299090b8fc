"""What executed notebooks and the report look like in a real browser: nothing is cut off, and no
page scrolls sideways, on a laptop and on a telephone.
"""

import browser
import nbformat
import pytest
from nbformat.sign import NotebookNotary

pytestmark = [pytest.mark.long, browser.needed]
WIDTHS = (1280, 400)


@pytest.mark.parametrize("width", WIDTHS)
def test_the_report_fits(executed, width):
    with browser.chromium() as page:
        page.open((executed[0] / "results" / "report.html").as_uri(), width)
        assert page.run("document.querySelectorAll('table, img').length") > 8
        assert page.faults() == []


def test_executed_notebooks_fit_in_jupyterlab(executed, tmp_path):
    place = executed[0]
    with browser.chromium() as page, browser.jupyterlab(place, tmp_path) as lab:
        notary = NotebookNotary(data_dir=str(tmp_path / "JUPYTER_DATA_DIR"))
        for file in sorted((place / "results" / "runs").glob("[0-9]*.ipynb")):
            notary.sign(nbformat.read(file, as_version=4))  # it is ours: its outputs are shown
            path = file.relative_to(place).as_posix()
            browser.open_notebook(page, lab, path)
            for width in WIDTHS:
                # beside the list of files where there is room for it
                page.run(f"jupyterapp.shell.{'collapse' if width < 760 else 'expand'}Left()")
                page.resize(width)
                page.settle()
                faults = browser.faults_of(page, path, in_boxes=width < 760)
                assert faults == [], f"{file.name} at {width} pixels"
            browser.close_notebook(page, path)
