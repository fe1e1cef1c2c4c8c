"""The set-up: what stands in the way is said in one line, and a set-up that was cut off is mended by the next one."""

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
NO_SPACE = "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device"
Version = namedtuple("Version", "major minor micro releaselevel serial")


class Machine:
    """Stands for .venv, pip and the disk: which commands were run, and how each kind of command ends."""

    def __init__(self, root: Path):
        self.root, self.calls, self.pip, self.venv_error = root, [], (0, ""), ""
        self.venv_python = self.imports = None  # no .venv yet

    def run(self, command, **options):
        words = " ".join(map(str, command))
        if "-m venv" in words:
            self.calls.append("venv")
            (self.root / ".venv").mkdir(exist_ok=True)
            self.venv_python, self.imports = sys.version_info[:2], True
            return bool(self.venv_error), self.venv_error
        if "pip install" in words:
            self.calls.append("install")
            return self.pip() if callable(self.pip) else self.pip
        if "import sys, pip" in words:
            if self.venv_python is None:
                raise FileNotFoundError(2, "no such file", words)
            allowed = re.search(r"version_info\[:2\] (.*)\)$", words).group(1)
            return int(not eval(f"{self.venv_python} {allowed}")), ""
        assert "lrf_utils" in words
        return (0, "") if self.imports else (1, "Traceback\nImportError: half a package")


@pytest.fixture
def machine(tmp_path, monkeypatch):
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    machine = Machine(tmp_path)
    monkeypatch.setattr(set_up, "run", machine.run)
    for name, path in {"ROOT": ".", "VENV": ".venv", "READY": ".venv/ready", "LOG": "build/setup.log"}.items():
        monkeypatch.setattr(set_up, name, tmp_path / path)
    monkeypatch.setattr(set_up, "free_gigabytes", lambda folder: 50.0)
    return machine


def stopped(capsys) -> str:
    """Run the set-up, which must fail; returns the one line that it says."""
    assert set_up.main() == 1
    assert not set_up.READY.exists()
    said = capsys.readouterr().err.strip()
    assert "\n" not in said and "Traceback" not in said
    return said


def test_a_new_set_up_makes_the_environment_and_the_stamp(machine):
    assert set_up.main() == 0
    assert machine.calls == ["venv", "install"] and set_up.READY.exists()


def test_another_run_keeps_the_environment(machine):
    set_up.main()
    assert set_up.main() == 0
    assert machine.calls == ["venv", "install", "install"]


def test_a_set_up_that_was_cut_off_goes_on(machine, capsys):
    machine.pip = (1, "ReadTimeoutError: timed out")
    stopped(capsys)
    machine.pip = (0, "")
    assert set_up.main() == 0
    assert machine.calls == ["venv", "install", "install"] and set_up.READY.exists()


def test_half_an_environment_is_made_anew(machine):
    (machine.root / ".venv").mkdir()  # no Python in it
    assert set_up.main() == 0
    assert machine.calls == ["venv", "install"]


def test_half_a_package_is_installed_anew(machine):
    machine.venv_python, machine.imports = sys.version_info[:2], False
    assert set_up.main() == 0
    assert machine.calls == ["install", "venv", "install"]


def test_half_a_package_that_pip_cannot_replace_is_installed_anew(machine):
    machine.venv_python, machine.imports = sys.version_info[:2], True
    machine.pip = lambda: (0, "") if "venv" in machine.calls else (1, "error: uninstall-no-record-file")
    assert set_up.main() == 0
    assert machine.calls == ["install", "venv", "install"]


def test_an_unfinished_environment_of_another_python_is_made_anew(machine):
    (machine.root / ".venv").mkdir()
    machine.venv_python, machine.imports = (3, 99), True
    assert set_up.main() == 0
    assert machine.calls == ["venv", "install"]


def test_a_finished_environment_of_another_python_is_kept(machine):
    set_up.main()
    machine.venv_python = (3, 99)
    assert set_up.main() == 0
    assert machine.calls == ["venv", "install", "install"]


def test_a_finished_environment_of_a_python_that_is_too_old_is_made_anew(machine):
    set_up.main()
    machine.venv_python = (3, 8)
    assert set_up.main() == 0
    assert machine.calls == ["venv", "install", "venv", "install"]


def test_an_old_python(machine, capsys, monkeypatch):
    monkeypatch.setattr(sys, "version_info", Version(3, 9, 1, "final", 0))
    said = stopped(capsys)
    assert "this is Python 3.9, and 3.11 or newer is needed" in said and "python.org" in said
    assert machine.calls == []


def test_a_32_bit_python(machine, capsys, monkeypatch):
    monkeypatch.setattr(sys, "maxsize", 2**31 - 1)
    assert "64-bit Python" in stopped(capsys)


def test_a_python_without_venv(machine, capsys, monkeypatch):
    monkeypatch.setattr(set_up.importlib.util, "find_spec", lambda name: None)
    assert "apt install python3" in stopped(capsys)


def test_too_little_room_is_noticed_before_anything_is_downloaded(machine, capsys, monkeypatch):
    monkeypatch.setattr(set_up, "free_gigabytes", lambda folder: 0.3)
    assert "make room" in stopped(capsys)
    assert machine.calls == []


@pytest.mark.parametrize(
    ("errors", "advice"),
    [
        (NO_SPACE, "make room"),
        ("OSError: [WinError 112] There is not enough space on the disk", "make room"),
        (f"WARNING: Retrying after connection broken by 'ReadTimeoutError'\n{NO_SPACE}", "make room"),
        (
            "WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError(': Failed to establish "
            "a new connection: [Errno 111] Connection refused')'\nERROR: No matching distribution found for torch>=2.9",
            "check the network",
        ),
        ("socket.gaierror: [Errno 11001] getaddrinfo failed", "check the network"),
        ("pip._vendor.urllib3.exceptions.ProtocolError: ('Connection broken: IncompleteRead'", "check the network"),
        ("ssl.SSLCertVerificationError: [SSL: CERTIFICATE_VERIFY_FAILED]", "PIP_CERT"),
        ("error: command 'gcc' failed\n  ERROR: Failed building wheel for psutil", "install a compiler"),
        ("error: Microsoft Visual C++ 14.0 or greater is required.", "install a compiler"),
        ("error: metadata-generation-failed", "install a compiler"),
        ("ERROR: No matching distribution found for setuptools>=77", "check the network"),
        ("ERROR: No matching distribution found for torch>=2.9", "there is no torch>=2.9 for Python"),
    ],
)
def test_what_pip_reports_becomes_one_line_of_advice(machine, capsys, errors, advice):
    machine.pip = (1, errors)
    assert advice in stopped(capsys)
    assert set_up.LOG.read_text(encoding="utf-8") == errors


def test_venv_that_fails_on_a_full_disk(machine, capsys):
    machine.venv_error = "Error: [Errno 28] No space left on device"
    assert "make room" in stopped(capsys)


def test_a_disk_that_is_too_full_for_the_report(machine, capsys, monkeypatch):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    machine.pip = (1, "something")
    monkeypatch.setattr(Path, "write_text", full)
    assert "make room" in stopped(capsys)


def test_an_unknown_failure_shows_what_pip_said_last(machine, capsys):
    machine.pip = (1, "\n".join(f"line {i}" for i in range(20)))
    assert set_up.main() == 1
    said = capsys.readouterr().err
    assert str(set_up.LOG) in said and "line 19" in said and "line 3\n" not in said


def test_pip_that_was_killed(machine, capsys):
    machine.pip = (-9, "WARNING: something else")
    assert "lack of memory" in stopped(capsys)


def test_an_interrupt(machine, capsys, monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(set_up, "install", interrupt)
    assert "run the same command again" in stopped(capsys)


def test_packages_that_do_not_start(machine, capsys, monkeypatch):
    monkeypatch.setattr(set_up, "broken", lambda: "OSError: c10.dll")
    assert "OSError: c10.dll" in stopped(capsys)


def test_without_a_network_for_real(tmp_path):
    """The script itself, with an index that nobody serves."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "set_up.py", tmp_path / "scripts")
    for name in ("pyproject.toml", "README.md", "LICENSE", "lrf_utils.py"):
        shutil.copy(ROOT / name, tmp_path)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PIP_")}
    environment |= {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": "http://127.0.0.1:9/", "PIP_RETRIES": "0"}
    command = [sys.executable, tmp_path / "scripts" / "set_up.py"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("Set-up stopped: pip cannot reach the package index") and done.stderr.count("\n") == 1
    assert not (tmp_path / ".venv" / "ready").exists()


def test_an_old_python_can_read_the_script():
    ast.parse((ROOT / "scripts" / "set_up.py").read_text(encoding="utf-8"), feature_version=(3, 6))


def recipes() -> dict[str, list[str]]:
    """The commands of each target of the Makefile."""
    found = re.findall(r"^([a-z-]+):.*\n((?:\t.*\n)*)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    return {target: [line.strip() for line in lines.splitlines()] for target, lines in found}


@pytest.mark.parametrize("target", ["run", "test", "lab"])
def test_windows_commands_in_the_readme_are_those_of_make(target):
    (command,) = recipes()[target]
    windows = command.replace("$(BIN)/", ".venv\\Scripts\\").replace("scripts/", "scripts\\")
    assert f"| `make {target}` | `{windows}` |" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_make_alone_lists_every_target():
    listed = subprocess.run(["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True).stdout
    assert {line.split(":")[0] for line in listed.splitlines()} == set(recipes())
