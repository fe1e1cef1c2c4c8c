"""The set-up: what stands in the way is said in one line, and one that was cut off is begun again."""

import ast
import os
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from scripts import set_up

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """The commands that the set-up gives, of which none is run, in an empty folder."""
    given = []
    for name, path in {"VENV": ".venv", "PYTHON": ".venv/python", "READY": ".venv/ready"}.items():
        monkeypatch.setattr(set_up, name, tmp_path / path)

    def run(*command):
        given.append(command[2])
        set_up.VENV.mkdir(exist_ok=True)
        set_up.PYTHON.touch()

    monkeypatch.setattr(set_up, "run", run)
    return given


def test_a_finished_set_up_is_updated_and_one_that_was_cut_off_is_begun_again(commands):
    set_up.set_up()
    set_up.set_up()
    assert commands == ["venv", "pip", "pip"]
    set_up.READY.unlink()
    set_up.set_up()
    assert commands[3:] == ["venv", "pip"]


def test_an_old_python(commands, monkeypatch):
    monkeypatch.setattr(sys, "version_info", namedtuple("Version", "major minor")(3, 9))
    with pytest.raises(SystemExit, match=r"3\.11 or newer is needed.*python\.org"):
        set_up.set_up()
    ast.parse((ROOT / "scripts" / "set_up.py").read_text(encoding="utf-8"), feature_version=(3, 6))
    assert f'">={".".join(map(str, set_up.NEEDED))}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_a_python_without_venv(commands, monkeypatch):
    monkeypatch.setattr(set_up, "find_spec", lambda name: name == "virtualenv")
    set_up.set_up()
    assert commands == ["virtualenv", "pip"]
    set_up.READY.unlink()
    monkeypatch.setattr(set_up, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"apt install python3.*root.*--user virtualenv"):
        set_up.set_up()


@pytest.mark.parametrize(
    ("errors", "advice"),
    [
        ("WARNING: connection broken by 'ReadTimeoutError'\nERROR: [Errno 28] No space left on device", "make room"),
        ("OSError: [WinError 112] There is not enough space on the disk", "make room"),
        ("ReadTimeoutError: HTTPSConnectionPool(host='pypi.org'): Read timed out.", "check the network"),
        ("ERROR: No matching distribution found for torch>=2.9", "No matching distribution.*\n.*another Python"),
    ],
)
def test_what_pip_says_becomes_advice(errors, advice):
    assert re.search(advice, set_up.advice(errors))


def test_without_a_network_for_real(tmp_path):
    """The script itself, with an index that nobody serves."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "set_up.py", tmp_path / "scripts")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PIP_")}
    environment |= {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": "http://127.0.0.1:9/", "PIP_RETRIES": "0"}
    command = [sys.executable, tmp_path / "scripts" / "set_up.py"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and not (tmp_path / ".venv" / "ready").exists()
    assert done.stderr.startswith("Set-up stopped: pip cannot reach the package index") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("target", ["run", "test", "check", "lab"])
def test_commands_without_make_are_those_of_make(target):
    recipe = re.search(rf"^{target}:.*\n((?:\t.*\n)*)", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE).group(1)
    commands = [line.strip().replace("$(BIN)", ".venv/bin") for line in recipe.splitlines()]
    readme, contributing = ((ROOT / name).read_text("utf-8") for name in ("README.md", "CONTRIBUTING.md"))
    assert all(command in (contributing if target == "check" else readme) for command in commands), commands
