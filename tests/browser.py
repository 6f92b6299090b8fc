"""Chromium, driven over its DevTools protocol, and a JupyterLab of its own to open in it.

    with chromium() as browser:
        browser.open("file:///...", width=400)
        browser.run("document.title")
"""

import base64
import contextlib
import io
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request

import numpy as np
import pytest
import websocket
from conftest import CHECKOUT
from PIL import Image

NAMES = "chromium", "chromium-browser", "google-chrome", "chrome"
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
needed = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
OWN = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_SETTINGS_DIR",
       "JUPYTERLAB_WORKSPACES_DIR", "IPYTHONDIR")
QUIET = ["--disable-background-networking", "--disable-component-update", "--disable-quic",
         "--disable-sync", "--no-first-run"]  # nothing is asked of the network

FAULTS = """(page, part, inBoxes) => {
  const found = [], sheet = document.querySelector(page), width = sheet.clientWidth;
  if (sheet.scrollWidth > width + 1) found.push(`the page: ${sheet.scrollWidth} of ${width} px`);
  const edge = sheet.getBoundingClientRect().left + width;
  const text = 'h1, h2, h3, p, li', things = 'pre, table, img, svg, mjx-container, .widget-box';
  for (const one of document.querySelectorAll(part + ' :is(' + text + ', ' + things + ')')) {
    const {left, right, height} = one.getBoundingClientRect();
    if (right <= left || !height) continue;
    const says = `${one.tagName} ${one.textContent.trim().slice(0, 40)}`;
    if (one.matches('img:not([src^=http])') && !one.naturalWidth)
      found.push(`${one.src}: no picture`);
    const wide = one.scrollWidth > one.clientWidth + 1;
    if (!inBoxes && one.matches(text) && !one.querySelector(things) && wide)
      found.push(`${says}: ${one.scrollWidth} of ${one.clientWidth} px`);
    let end = getComputedStyle(one).overflowX == 'visible' ? left + one.scrollWidth : right;
    end = Math.max(end, right);
    for (let box = one.parentElement; box && !box.matches(page); box = box.parentElement) {
      const overflow = getComputedStyle(box).overflowX, limit = box.getBoundingClientRect().right;
      if (/auto|scroll/.test(overflow)) end = limit;
      else if (overflow != 'visible' && end > limit + 1)
        found.push(`${says}: cut off at ${Math.round(limit)} of ${Math.round(end)} px`);
    }
    if (end > edge + 1) found.push(`${says}: ends at ${Math.round(end)} of ${edge} px`);
  }
  return [...new Set(found)];
}"""


class Browser:
    """One page. Its methods raise TimeoutError or RuntimeError with what the page says."""

    def __init__(self, address):
        self._socket = websocket.create_connection(address, suppress_origin=True, timeout=120)
        self._count = 0
        self.call("Page.enable")
        self.call("Emulation.setFocusEmulationEnabled", enabled=True)  # as if it were in front

    def call(self, method, **parameters):
        """The result of one DevTools call."""
        self._count += 1
        self._socket.send(json.dumps({"id": self._count, "method": method, "params": parameters}))
        while True:
            said = json.loads(self._socket.recv())
            if said.get("id") == self._count:
                if "error" in said:
                    raise RuntimeError(f"{method}: {said['error']}")
                return said["result"]

    def run(self, script):
        """The value of a JavaScript expression; of a promise what it becomes."""
        said = self.call("Runtime.evaluate", expression=script, awaitPromise=True,
                         returnByValue=True)
        if "exceptionDetails" in said:
            raise RuntimeError(str(said["exceptionDetails"])[:2000])
        return said["result"].get("value")

    def wait(self, script, seconds=30):
        """The value of an expression as soon as it is true."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if value := self.run(script):
                return value
            time.sleep(0.1)
        raise TimeoutError(f"not in {seconds} s: {script}")

    def resize(self, width, height=900):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=1, mobile=False)

    def open(self, address, width=1280):
        self.resize(width)
        self.call("Page.navigate", url=address)
        self.wait("document.readyState == 'complete'")

    def settle(self):
        """Wait until nothing has become wider or longer for half a second."""
        size = "[...document.querySelectorAll('.jp-Cell')].map(c => c.offsetHeight).join()"
        before = None
        while (now := self.run(size)) != before:
            before = now
            time.sleep(0.5)

    def mouse(self, kind, x, y):
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1,
                  clickCount=1)

    def drag(self, x, y, to):
        """Press the button at (x, y), move to x = `to`, release it."""
        self.mouse("mousePressed", x, y)
        for step in range(1, 6):
            self.mouse("mouseMoved", x + (to - x) * step / 5, y)
        self.mouse("mouseReleased", to, y)

    def picture(self, image):
        """Pixels [H, W, 3] of the img element that an expression names."""
        address = self.run(f"""fetch({image}.src).then(answer => answer.blob()).then(
            blob => new Promise(done => {{
                const reader = new FileReader();
                reader.onload = () => done(reader.result);
                reader.readAsDataURL(blob);
            }}))""")
        content = base64.b64decode(address.partition(",")[2])
        return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))

    def faults(self, page="html", part="body", in_boxes=False):
        """What is wrong with the look of what lies in `part`, a line each: the page scrolls
        sideways, text needs scrolling to be read, a table, picture or control is cut off. Tables
        and pictures may be wider than the page in a box of their own that scrolls, also text
        where `in_boxes` says so.
        """
        return self.run(f"({FAULTS})({page!r}, {part!r}, {json.dumps(in_boxes)})")

    def screenshot(self, path):
        data = self.call("Page.captureScreenshot", captureBeyondViewport=False)["data"]
        pathlib.Path(path).write_bytes(base64.b64decode(data))


@contextlib.contextmanager
def _process(command, **options):
    """A process that ends with the block."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, **options)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()


def _wait_for(ready, process, what, seconds=60):
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError, ValueError, IndexError):
            return ready()
        time.sleep(0.1)
    raise TimeoutError(f"{what} did not start")


@contextlib.contextmanager
def chromium():
    """A Browser in a new profile, without a window."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [CHROMIUM, "--headless=new", "--disable-gpu", "--remote-debugging-port=0",
                   f"--user-data-dir={profile}", *QUIET]
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            command.append("--no-sandbox")  # which root cannot have
        silent = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        with _process([*command, "about:blank"], **silent) as process:
            port = pathlib.Path(profile) / "DevToolsActivePort"

            def page():
                place = f"http://127.0.0.1:{port.read_text().splitlines()[0]}/json/list"
                with urllib.request.urlopen(place) as answer:
                    pages = [t for t in json.load(answer) if t["type"] == "page"]
                return pages[0]["webSocketDebuggerUrl"]

            yield Browser(_wait_for(page, process, "Chromium"))


SETTINGS = {  # every cell is laid out, also what nobody has scrolled to; no question about news
    "notebook-extension/tracker": {"windowingMode": "none"},
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}


ALONE = {"OMP_NUM_THREADS": "1"}  # several kernels share the cores: else each waits for the others


@contextlib.contextmanager
def jupyterlab(folder, own):
    """Address of a JupyterLab that serves `folder`; what it keeps lies in the folder `own`."""
    for name, values in SETTINGS.items():
        file = own / "JUPYTERLAB_SETTINGS_DIR" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {
        "ServerApp.root_dir": folder, "ServerApp.ip": "127.0.0.1", "ServerApp.port": port,
        "ServerApp.port_retries": 0, "ServerApp.allow_root": True, "IdentityProvider.token": "",
        "LabApp.expose_app_in_browser": True}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser",
               *(f"--{name}={value}" for name, value in options.items())]
    places = {name: str(own / name) for name in OWN}
    with (own / "jupyterlab.log").open("w") as log, _process(
            command, env={**os.environ, "PYTHONPATH": str(CHECKOUT), **places, **ALONE},
            stdout=log, stderr=log) as process:
        address = f"http://127.0.0.1:{port}/lab"
        _wait_for(lambda: urllib.request.urlopen(address).close(), process, "JupyterLab")
        yield address


# ---- Notebooks in JupyterLab ---------------------------------------------------------------------


def open_notebook(browser, lab, path):
    """Open a notebook by its path in the served folder, as the newest tab, and wait for its kernel.
    """
    if not browser.run("location.href").startswith(lab):
        browser.open(f"{lab}?reset")
        browser.wait("window.jupyterapp && (jupyterapp.restored.then(() => true))", 60)
    browser.run(f"void jupyterapp.commands.execute('docmanager:open', {{path: {path!r}}})")
    browser.wait(f"{_widget(path)}?.sessionContext.session?.kernel?.status == 'idle'", 60)
    browser.wait(f"{_widget(path)}.context.isReady && {_widget(path)}.revealed.then(() => true)")


def _widget(path):
    return f"[...jupyterapp.shell.widgets('main')].find(w => w.context?.path == {path!r})"


def start_all_cells(browser, path):
    """Press "Run All Cells" in an open notebook."""
    browser.run(f"jupyterapp.shell.activateById({_widget(path)}.id)")
    browser.run("void jupyterapp.commands.execute('notebook:run-all-cells')"
                f".then(() => {_widget(path)}.ended = true)")


def cells_after(browser, path, seconds):
    """Cells of a notebook as in its file, when all of them have run or one has failed."""
    browser.wait(f"{_widget(path)}.ended", seconds)
    browser.run(f"jupyterapp.shell.activateById({_widget(path)}.id)")
    return json.loads(browser.run(f"JSON.stringify({_widget(path)}.content.model.toJSON().cells)"))


def faults_of(browser, path, in_boxes=False):
    """`Browser.faults` of texts and outputs of the notebook in front."""
    notebook = "#" + browser.run(f"{_widget(path)}.id")
    return browser.faults(f"{notebook} .jp-WindowedPanel-outer",
                          f"{notebook} :is(.jp-MarkdownOutput, .jp-OutputArea)", in_boxes)


def close_notebook(browser, path):
    """Close a notebook with its kernel."""
    browser.run(f"{_widget(path)}.sessionContext.shutdown().then(() => {_widget(path)}.dispose())")
