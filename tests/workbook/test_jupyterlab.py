"""In JupyterLab, in a real browser: notebooks run from top to bottom, and the panel's slider
redraws its figure.
"""

import browser
import pytest
from conftest import read_text

pytestmark = [pytest.mark.long, browser.needed]
BY_HAND, OBSERVERS = "notebooks/03_quantize_by_hand.ipynb", "notebooks/04_observers.ipynb"
SLIDER = "[...document.querySelectorAll('.widget-slider')].find(" \
         "s => s.textContent.includes('clip range'))"
PICTURE = f"{SLIDER}.closest('.widget-vbox').querySelector('img')"


def set_parameter(workbook, notebook, line, other):
    """In its script, which JupyterLab reads, as a user would."""
    script = (workbook / notebook).with_suffix(".py")
    text = read_text(script)
    assert text.count(f"\n{line}") == 1
    script.write_text(text.replace(f"\n{line}", f"\n{other}"))


def test_notebooks_run_and_the_slider_moves_the_figure(workbook, tmp_path):
    for notebook in (BY_HAND, OBSERVERS):
        set_parameter(workbook, notebook, "n_calibration = 0", "n_calibration = 32")
    with browser.chromium() as page, browser.jupyterlab(workbook, tmp_path) as lab:
        for notebook in (BY_HAND, OBSERVERS):  # both at once, on two cores
            browser.open_notebook(page, lab, notebook)
            browser.start_all_cells(page, notebook)
        for notebook in (BY_HAND, OBSERVERS):
            cells = browser.cells_after(page, notebook, seconds=300)
            code = [cell for cell in cells if cell["cell_type"] == "code"]
            wrong = [output for cell in code for output in cell["outputs"]
                     if output["output_type"] == "error"]
            assert not wrong, wrong[0]["traceback"]
            assert all(cell["execution_count"] for cell in code if cell["source"])
            assert browser.faults_of(page, notebook) == []
        assert "Error displaying widget" not in page.run("document.body.textContent")
        move_slider(page)


def move_slider(page):
    """Drag the slider "clip range" to the left: the figure is another one, and says for what."""
    page.run(f"{SLIDER}.scrollIntoView()")
    before, source = page.picture(PICTURE), page.run(f"{PICTURE}.src")
    left, width, x, y = page.run(f"""(() => {{
        const track = {SLIDER}.querySelector('.noUi-base').getBoundingClientRect();
        const handle = {SLIDER}.querySelector('.noUi-handle').getBoundingClientRect();
        return [track.left, track.width, handle.left + handle.width / 2, handle.top + 5];
    }})()""")
    page.drag(x, y, left + width * (0.5 - 0.1) / (1.5 - 0.1))
    page.wait(f"{PICTURE}.src != {source!r} && {PICTURE}.complete")
    said = float(page.run(f"{SLIDER}.querySelector('.widget-readout').textContent"))
    assert said == pytest.approx(0.5, abs=0.05)
    after = page.picture(PICTURE)
    assert after.shape == before.shape and (after != before).any(-1).mean() > 0.01
