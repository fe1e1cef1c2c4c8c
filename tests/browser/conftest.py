"""Chromium for the tests in this folder, and a copy of the repository, so that nothing committed changes."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, sync_playwright

ROOT = Path(__file__).resolve().parent.parent.parent
BUILD = ROOT / "build" / "browser"
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()


def name_of(path: Path) -> str:
    """A file's name for tests and screenshots; a solution has the name of its notebook, in another folder."""
    return path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "-").removeprefix("notebooks-")


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    names = ("chromium", "chromium-browser", "google-chrome")
    chromium = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if not chromium:
        pytest.exit("No Chromium: install chromium or google-chrome, or set CHROMIUM to its path.", returncode=1)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def repository() -> Path:
    """A copy of the repository in which every figure that is saved also notes its faint text."""
    copy = BUILD / "repository"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "build", ".*_cache", "__pycache__"))
    with open(copy / "notebook_utils.py", "a", encoding="utf-8") as helpers:
        helpers.write("\nfrom tests.browser.contrast import note_faint_text\nnote_faint_text()\n")
    return copy
