"""Make .venv and install the project with everything it needs: ``python scripts/set_up.py``.

Run it again after it was cut off: it takes up or replaces what is there. Whatever stands in the way is said in one
line, with what to do about it. Only the standard library is used, and no syntax newer than Python 3.6, so that an old
Python gets as far as saying that it is too old.
"""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
READY = VENV / "ready"  # the Makefile looks for it; it is written last
LOG = ROOT / "build" / "setup.log"
GIGABYTES = 1.5  # the least that an installation fills, with the CPU build of PyTorch

OTHER_PYTHON = "make PYTHON=python3.12 test" if os.name != "nt" else r"py -3.12 scripts\set_up.py"
COMPILER = {
    "Linux": "sudo apt install build-essential, or what your distribution calls it",
    "Darwin": "xcode-select --install",
    "Windows": "https://visualstudio.microsoft.com/visual-cpp-build-tools/",
}

# What pip says in its error output -> what to tell the reader. The first that matches counts.
CAUSES = [
    (
        r"No space left on device|Disk quota exceeded|not enough space on the disk|\[Errno (28|122)\]|WinError 112",
        "disk full",
    ),
    (
        r"Failed building wheel for (?!low-rank)|metadata-generation-failed|unable to execute '"
        r"|Visual C\+\+ .* is required",
        "no compiler",
    ),
    (r"CERTIFICATE_VERIFY_FAILED|SSLError", "no trust"),
    (
        r"Failed to establish a new connection|NameResolutionError|Temporary failure in name resolution|getaddrinfo"
        r"|Max retries exceeded|after connection broken|Connection ?(reset|refused|broken|aborted)|ConnectionError"
        r"|Network is unreachable|ProxyError|timed out|TimeoutError|IncompleteRead|HTTP error|HTTPError"
        r"|No matching distribution found for setuptools",  # every index has it
        "no network",
    ),
    (r"No matching distribution found", "no package"),
]


class Stop(Exception):
    """The set-up cannot go on; the message says why and what to do."""


class UnknownFailure(Stop):
    """pip failed for none of the known reasons."""


def needed_python() -> tuple:
    """The oldest version of Python that pyproject.toml allows, such as (3, 11)."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return tuple(int(part) for part in re.search(r'requires-python = ">=(\d+)\.(\d+)"', text).groups())


def run(command: list, **options: object) -> tuple:
    """Run a command; return its exit status and its error output. What it prints otherwise is seen at once."""
    done = subprocess.run([str(word) for word in command], stderr=subprocess.PIPE, errors="replace", **options)
    return done.returncode, done.stderr


def check_python() -> None:
    """Stop unless this Python can make an environment in which PyTorch runs."""
    version, needed = "{}.{}".format(*sys.version_info), "{}.{}".format(*needed_python())
    if sys.version_info < needed_python():
        raise Stop(
            f"this is Python {version}, and {needed} or newer is needed: install it from "
            f"https://www.python.org/downloads/, then run {OTHER_PYTHON} (with the version that you have)."
        )
    if sys.maxsize < 2**32:
        raise Stop("this Python is a 32-bit build, and PyTorch needs 64 bits: install a 64-bit Python from python.org.")
    if not (importlib.util.find_spec("venv") and importlib.util.find_spec("ensurepip")):
        raise Stop(
            "this Python lacks its venv module: install it (Debian and Ubuntu: "
            f"sudo apt install python{version}-venv), then run the same command again."
        )


def free_gigabytes(folder: Path) -> float:
    return shutil.disk_usage(str(folder)).free / 1e9


def disk_full() -> Stop:
    temporary = tempfile.gettempdir()
    return Stop(
        f"the disk is too full ({free_gigabytes(ROOT):.1f} GB free here, {free_gigabytes(temporary):.1f} GB in "
        f"{temporary}): make room, 2 GB for the CPU build of PyTorch (see README.md), 8 GB with CUDA, then run "
        "the same command again."
    )


def explain(errors: str) -> Stop:
    """What to tell the reader about the error output of pip or venv."""
    kind = next((kind for pattern, kind in CAUSES if re.search(pattern, errors)), None)
    if kind == "disk full" or (kind is None and min(map(free_gigabytes, (ROOT, tempfile.gettempdir()))) < 0.1):
        return disk_full()
    if kind == "no compiler":
        return Stop(
            f"a package has no ready-made build for Python {platform.python_version()} on this system, and building it "
            f"failed: take another Python, as in {OTHER_PYTHON}, or install a compiler "
            f"({COMPILER.get(platform.system(), 'for C and C++')}) and run the same command again. Details: {LOG}"
        )
    if kind == "no trust":
        return Stop(
            "pip does not trust the certificate of the package index: behind a company's proxy, set PIP_CERT to the "
            "proxy's certificate file, then run the same command again."
        )
    if kind == "no network":
        return Stop(
            "pip cannot reach the package index: check the network (behind a proxy, set HTTPS_PROXY), then run "
            "the same command again; what is already installed is kept."
        )
    if kind == "no package":
        name = re.search(r"No matching distribution found for (.+)", errors).group(1).strip()
        return Stop(
            f"there is no {name} for Python {platform.python_version()} on {platform.system()} {platform.machine()}: "
            f"take a Python that PyTorch supports (https://pytorch.org/get-started/locally/), as in {OTHER_PYTHON}."
        )
    last = "\n".join([line for line in errors.splitlines() if line.strip() and "WARNING" not in line][-5:])
    return UnknownFailure(f"pip failed, for a reason that this script does not know. All that it said: {LOG}\n{last}")


def venv_works(any_version: bool) -> bool:
    """Whether .venv has a Python that is new enough, and pip; of this Python's version unless ``any_version``."""
    allowed = f">= {needed_python()}" if any_version else f"== {sys.version_info[:2]}"
    try:
        return run([PYTHON, "-c", f"import sys, pip; sys.exit(not sys.version_info[:2] {allowed})"])[0] == 0
    except OSError:
        return False


def make_venv() -> None:
    if free_gigabytes(ROOT) < GIGABYTES:
        raise disk_full()
    status, errors = run([sys.executable, "-m", "venv", "--clear", VENV])
    if status:
        raise explain(errors)


def install() -> None:
    options = ["--disable-pip-version-check", "--prefer-binary"]
    status, errors = run([PYTHON, "-m", "pip", "install", *options, "--editable", ROOT])
    if status < 0:
        raise Stop(
            f"pip was killed (signal {-status}), perhaps for lack of memory: close other programs, then run the same "
            "command again."
        )
    if status:
        LOG.parent.mkdir(exist_ok=True)
        LOG.write_text(errors, encoding="utf-8", errors="replace")
        raise explain(errors)


def broken() -> str:
    """What goes wrong when the installed packages are imported; empty if nothing does."""
    status, errors = run([PYTHON, "-c", "import hypothesis, jupyterlab, lrf_utils, nbval"], cwd=str(VENV))
    return errors.strip().splitlines()[-1] if status else ""


def set_up() -> None:
    finished = READY.exists()
    fresh = not venv_works(any_version=finished)
    if finished:
        READY.unlink()
    if fresh:
        check_python()
        print(f"Making .venv with Python {platform.python_version()}", flush=True)
        make_venv()
    # A set-up that was killed can leave half a package, which pip takes for a whole one or cannot replace.
    try:
        install()
        damaged = not fresh and broken()
    except UnknownFailure:
        if fresh:
            raise
        damaged = True
    if damaged:
        print("Packages in .venv are damaged; making it anew", flush=True)
        check_python()
        make_venv()
        install()
    error = broken()
    if error:
        raise Stop(f"everything is installed, but it does not start: {error}")
    READY.touch()


def main() -> int:
    try:
        set_up()
    except Stop as reason:
        print(f"Set-up stopped: {reason}", file=sys.stderr)
    except KeyboardInterrupt:
        print("\nSet-up interrupted: run the same command again, and it goes on.", file=sys.stderr)
    except OSError as error:  # a full disk, a folder that may not be written
        reason = disk_full() if error.errno in (28, 122) else f"{error}. Mend that, then run the same command again."
        print(f"Set-up stopped: {reason}", file=sys.stderr)
    else:
        print("Set-up done: .venv is ready")
        return 0
    return 1


if __name__ == "__main__":
    sys.exit(main())
