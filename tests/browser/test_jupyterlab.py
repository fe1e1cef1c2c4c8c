"""Every notebook, run in JupyterLab in a browser, as a reader does."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from playwright.sync_api import Browser, Page

from tests.browser.conftest import BUILD, ROOT, name_of
from tests.test_documents import NOTEBOOKS

TOKEN = "reader"
SCREENSHOTS = BUILD / "jupyterlab"
SECONDS = 1200  # for one notebook; a shared machine is slow
# Every cell stays in the page, so that the page can be asked about all of them; nothing asks or saves by itself.
SETTINGS = {
    "notebook-extension/tracker": {"windowingMode": "none"},
    "docmanager-extension/plugin": {"autosave": False},
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}
# Each code cell's prompt, and the text, kind and pictures of its outputs.
CELLS = """() => [...document.querySelectorAll('.jp-Notebook .jp-CodeCell')].map(cell => ({
    prompt: cell.querySelector('.jp-InputPrompt').innerText,
    streams: [...cell.querySelectorAll('[data-mime-type="application/vnd.jupyter.stdout"]')].map(o => o.innerText),
    errors: [...cell.querySelectorAll('[data-mime-type="application/vnd.jupyter.error"]')].map(o => o.innerText),
    stderr: [...cell.querySelectorAll('[data-mime-type="application/vnd.jupyter.stderr"]')].map(o => o.innerText),
    pictures: [...cell.querySelectorAll('.jp-OutputArea img')].map(i => i.complete ? i.naturalWidth : 0),
}))"""
# The addresses of the server's pictures in the text that did not load; badges come from the web, which may be away.
MISSING = """server => [...document.querySelectorAll('.jp-MarkdownCell img')]
    .filter(image => image.src.startsWith(server) && (!image.complete || image.naturalWidth === 0))
    .map(image => image.src)"""


def environment(repository: Path) -> dict[str, str]:
    """The variables of a reader without any settings of their own, whose repository is the copy."""
    folders = ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_WORKSPACES_DIR", "IPYTHONDIR")
    own = {name: str(repository / "build" / name.lower()) for name in folders}
    for path in own.values():
        Path(path).mkdir(parents=True, exist_ok=True)
    settings = Path(own["JUPYTER_CONFIG_DIR"]) / "lab" / "user-settings" / "@jupyterlab"
    for name, values in SETTINGS.items():
        file = settings / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values), encoding="utf-8")
    return {
        **os.environ,
        **own,
        "JUPYTERLAB_SETTINGS_DIR": str(settings.parent),
        "PYTHONPATH": str(repository),
        "LRF_OUT": str(repository / "build"),
        "FAINT": str(repository / "build" / "faint.txt"),
    }


@pytest.fixture(scope="session")
def lab(repository: Path) -> Iterator[str]:
    """The address of a JupyterLab that the command of ``make lab`` started in the copy."""
    recipe = subprocess.check_output(["make", "-n", "--no-print-directory", "lab"], cwd=ROOT, text=True)
    command = recipe.splitlines()[-1]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = [
        "--no-browser",
        "--allow-root",
        "--ip=127.0.0.1",
        f"--ServerApp.port={port}",
        "--ServerApp.port_retries=0",
    ]
    options.append(f"--IdentityProvider.token={TOKEN}")
    address = f"http://127.0.0.1:{port}"
    with open(BUILD / "jupyterlab.log", "w", encoding="utf-8") as log:
        server = subprocess.Popen(
            [sys.executable, *shlex.split(command)[1:], *options],
            cwd=repository,
            env=environment(repository),
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            for _ in range(240):
                try:
                    urllib.request.urlopen(f"{address}/api/status?token={TOKEN}").close()
                    break
                except (urllib.error.URLError, ConnectionError):
                    assert server.poll() is None, f"`{command}` ended: see {log.name}"
                    time.sleep(0.5)
            else:
                pytest.fail(f"`{command}` does not answer: see {log.name}")
            yield address
        finally:
            server.terminate()
            server.wait(timeout=60)


def form(streams: list[str]) -> str:
    """Text with every number as 0 and every gap as one space."""
    text = re.sub(r"\d[\d.,]*", "0", "".join(streams).replace("\xa0", " "))
    return re.sub(r" +", " ", text).strip()


def run_all(page: Page, path: Path) -> tuple[list[dict], list[set[str]]]:
    """Run every cell of the notebook that is open; return the cells at the end, and the texts each showed before."""
    page.locator(".jp-Notebook .jp-CodeCell").first.wait_for()
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    shown: list[set[str]] = [set() for _ in page.evaluate(CELLS)]
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        cells = page.evaluate(CELLS)
        if all(re.fullmatch(r"\[\d+\]:", cell["prompt"].strip()) for cell in cells):
            return cells, [states - {"".join(cell["streams"])} for states, cell in zip(shown, cells)]
        prompts = "".join(cell["prompt"] for cell in cells)
        if re.search(r"\d", prompts) and "*" not in prompts:
            return cells, shown  # an error stops JupyterLab; the rest is never run
        for states, cell in zip(shown, cells):
            states.add("".join(cell["streams"]))
        page.wait_for_timeout(100)
    pytest.fail(f"{path.name} was still running after {SECONDS} s")


def problems(notebook: nbformat.NotebookNode, cells: list[dict], shown: list[set[str]]) -> list[str]:
    """What a reader of the run notebook would stumble over, against the committed one."""
    found = []
    code = [(i, cell) for i, cell in enumerate(notebook.cells) if cell.cell_type == "code"]
    for (number, stored), cell, states in zip(code, cells, shown, strict=True):
        may_fail = "raises-exception" in stored.metadata.get("tags", [])
        pictures = sum("image/png" in output.get("data", {}) for output in stored.outputs)
        text = "".join(output.text for output in stored.outputs if output.get("name") == "stdout")
        final = "".join(cell["streams"])
        if not re.fullmatch(r"\[\d+\]:", cell["prompt"].strip()):
            found.append(f"cell {number}: did not run")
        if cell["errors"] and not may_fail:
            found.append(f"cell {number}: an error: {cell['errors'][0][-300:]}")
        if cell["stderr"]:
            found.append(f"cell {number}: stderr: {cell['stderr'][0][:300]}")
        if len(cell["pictures"]) != pictures or 0 in cell["pictures"]:
            found.append(f"cell {number}: pictures of widths {cell['pictures']}, and the committed page has {pictures}")
        if form(cell["streams"]) != form([text]):
            found.append(f"cell {number}: shows {final!r} in the end, and the committed page {text!r}")
        if "progress=" in stored.source:
            moving = [state for state in states if state and not final.startswith(state.rstrip())]
            if len(moving) < 2:
                found.append(f"cell {number}: its progress did not move; seen on the way: {sorted(states)}")
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_runs_in_jupyterlab(browser: Browser, lab: str, repository: Path, path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    faint, copy = repository / "build" / "faint.txt", repository / path.relative_to(ROOT)
    faint.unlink(missing_ok=True)
    cleared = nbformat.read(path, as_version=4)
    for cell in cleared.cells:
        if cell.cell_type == "code":
            cell.update(outputs=[], execution_count=None)
            cell.metadata.pop("jupyter", None)  # a collapsed cell has no prompt that says when it is done
    nbformat.write(cleared, copy)

    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(120_000)
    page.goto(f"{lab}/lab/workspaces/{name_of(path)}/tree/{path.relative_to(ROOT).as_posix()}?token={TOKEN}")
    cells, shown = run_all(page, path)
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    height = page.evaluate("document.querySelector('.jp-Notebook .jp-WindowedPanel-viewport').scrollHeight")
    page.set_viewport_size({"width": 1280, "height": height + 150})
    page.evaluate("document.querySelector('.jp-WindowedPanel-outer').scrollTop = 0")
    page.wait_for_timeout(1000)
    page.screenshot(path=SCREENSHOTS / f"{name_of(path)}.png")
    found = problems(notebook, cells, shown)
    found += [f"a missing image: {address}" for address in page.evaluate(MISSING, lab)]
    api, headers = f"{lab}/api/sessions", {"Authorization": f"token {TOKEN}"}
    for session in page.request.get(api, headers=headers).json():
        assert page.request.delete(f"{api}/{session['id']}", headers=headers).ok, "the kernel does not stop"
    page.close()
    if any(cell["pictures"] for cell in cells):  # then the file is there, and empty if all is well
        found += [f"a figure: the text {line}" for line in sorted(set(faint.read_text(encoding="utf-8").splitlines()))]
    assert not found, "\n".join(found)


PROGRESS = nbformat.v4.new_code_cell(
    "train(progress='a')", outputs=[nbformat.v4.new_output("stream", text="a: 3/3, accuracy 98.1 %\n")]
)
PICTURE = nbformat.v4.new_code_cell(outputs=[nbformat.v4.new_output("display_data", {"image/png": ""})])
END = {"prompt": "[1]:", "streams": [], "errors": [], "stderr": [], "pictures": []}
LINE = ["a: 3/3, accuracy 97.2 %\n"]


@pytest.mark.parametrize(
    ("cell", "end", "states", "problem"),
    [
        (PROGRESS, {"streams": LINE}, {"a: 1/3", "a: 2/3"}, ""),
        (PROGRESS, {"streams": LINE}, {"", "a: 3/3"}, "did not move"),
        (PROGRESS, {"streams": ["a: 1/3a: 2/3" + LINE[0]]}, {"a: 1/3", "a: 1/3a: 2/3"}, "in the end"),
        (PICTURE, {"pictures": [500]}, set(), ""),
        (PICTURE, {"pictures": []}, set(), "pictures of widths []"),
        (PICTURE, {"pictures": [0]}, set(), "pictures of widths [0]"),
        (PICTURE, {"pictures": [500], "errors": ["ValueError"]}, set(), "an error: ValueError"),
        (PICTURE, {"pictures": [500], "stderr": ["a warning"]}, set(), "stderr: a warning"),
        (PICTURE, {"pictures": [500], "prompt": "[ ]:"}, set(), "did not run"),
    ],
)
def test_each_fault_of_a_run_is_caught(cell: dict, end: dict, states: set[str], problem: str) -> None:
    found = problems(nbformat.v4.new_notebook(cells=[cell]), [END | end], [states])
    assert bool(found) == bool(problem) and problem in "".join(found)


def test_a_missing_picture_in_the_text_is_caught(browser: Browser) -> None:
    page = browser.new_page()
    page.set_content('<div class="jp-MarkdownCell"><img src="http://127.0.0.1:9/nowhere.png"></div>')
    assert page.evaluate(MISSING, "http://127.0.0.1:9") == ["http://127.0.0.1:9/nowhere.png"]
    page.close()
