"""Every notebook, run in JupyterLab in Chromium, as a reader does.

``make browser`` or ``make browser NB=03`` starts it; Chromium or Chrome must be there. Everything
happens in a copy of the repository. Look at the screenshots in build/browser/.
"""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import nbformat
import pytest
from playwright.sync_api import Page, sync_playwright

from tools.run_notebooks import ROOT, find

OUT = ROOT / "build" / "browser"
SECONDS = 1200  # for one notebook, on a machine that does other work, too
# Of each code cell: its prompt, its errors and messages, and the widths of its pictures
CELLS = """() => [...document.querySelectorAll('.jp-Notebook .jp-CodeCell')].map(cell => {
    const all = selector => [...cell.querySelectorAll(selector)];
    return {
        prompt: cell.querySelector('.jp-InputPrompt').innerText.trim(),
        problems: all('[data-mime-type$="error"], [data-mime-type$="stderr"]')
            .map(output => output.innerText),
        pictures: all('.jp-OutputArea img').map(image => image.naturalWidth),
    };
})"""


@pytest.fixture(scope="session")
def repository() -> Path:
    copy = OUT / "repository"
    shutil.rmtree(copy, ignore_errors=True)
    unneeded = shutil.ignore_patterns(".git", ".venv", "build", ".*_cache", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=unneeded)
    for path in find():
        notebook = nbformat.read(path, as_version=4)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.update(outputs=[], execution_count=None)
                cell.metadata.pop("jupyter", None)  # a collapsed cell shows no prompt
        nbformat.write(notebook, copy / path.relative_to(ROOT))
    # Every cell stays in the page, so that the page can be asked about all of them.
    settings = copy / "build" / "lab" / "settings" / "@jupyterlab" / "notebook-extension"
    settings.mkdir(parents=True)
    (settings / "tracker.jupyterlab-settings").write_text('{"windowingMode": "none"}')
    return copy


@pytest.fixture(scope="session")
def lab(repository: Path) -> Iterator[str]:
    """The address of a JupyterLab that shows the copy, without any settings of its user."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    own = repository / "build" / "lab"
    names = ["CONFIG_DIR", "RUNTIME_DIR"]
    environment = os.environ | {f"JUPYTER_{name}": str(own / name) for name in names}
    environment |= {"JUPYTERLAB_WORKSPACES_DIR": str(own), "PYTHONPATH": str(repository)}
    environment["JUPYTERLAB_SETTINGS_DIR"] = str(own / "settings")
    command = [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root"]
    command += ["--ip=127.0.0.1", f"--ServerApp.port={port}", "--IdentityProvider.token=reader"]
    with (OUT / "jupyterlab.log").open("w") as log:
        server = subprocess.Popen(command, cwd=repository, env=environment, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    for _ in range(120):
        with suppress(OSError), urllib.request.urlopen(f"{address}/api/status?token=reader"):
            break
        time.sleep(0.5)  # what went wrong stands in jupyterlab.log
    yield address
    server.terminate()


@pytest.fixture(scope="session")
def page() -> Iterator[Page]:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    assert chromium, "install Chromium or Chrome"
    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu"]
        browser = playwright.chromium.launch(executable_path=chromium, args=flags)
        yield browser.new_page(viewport={"width": 1280, "height": 900})
        browser.close()


@pytest.mark.parametrize("path", find(), ids=lambda path: path.stem)
def test_runs_in_jupyterlab(page: Page, lab: str, path: Path) -> None:
    page.set_default_timeout(120_000)
    name = path.relative_to(ROOT).as_posix()
    page.goto(f"{lab}/lab/workspaces/{path.stem}/tree/{name}?token=reader")
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    end = time.monotonic() + SECONDS
    while True:  # an error stops JupyterLab: then some cells have no number, and none has a star
        prompts = "".join(cell["prompt"] for cell in page.evaluate(CELLS))
        if "1" in prompts and "*" not in prompts:
            break
        assert time.monotonic() < end, f"still running after {SECONDS} s"
        page.wait_for_timeout(500)
    height = page.evaluate("document.querySelector('.jp-WindowedPanel-viewport').scrollHeight")
    page.set_viewport_size({"width": 1280, "height": height + 150})
    page.screenshot(path=OUT / f"{path.stem}.png")
    page.set_viewport_size({"width": 1280, "height": 900})
    stored = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    for number, (cell, was) in enumerate(zip(page.evaluate(CELLS), stored, strict=True), start=1):
        assert cell["prompt"] == f"[{number}]:", f"code cell {number} did not run"
        if "raises-exception" not in was.metadata.get("tags", []):
            assert not cell["problems"], f"code cell {number}: {cell['problems'][0][-300:]}"
        pictures = sum("image/png" in output.get("data", {}) for output in was.outputs)
        assert len(cell["pictures"]) == pictures and all(cell["pictures"]), f"code cell {number}"
