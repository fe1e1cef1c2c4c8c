"""Make .venv and install the project into it: ``python3 scripts/set_up.py``.

A set-up that was cut off is begun again; what pip has downloaded lies in pip's own cache. There is no syntax newer than
Python 3.6 here, so that an old Python gets as far as saying that it is too old.
"""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
READY = VENV / "ready"  # the Makefile looks for it; it is written last
NEEDED = (3, 11)  # as in pyproject.toml
OTHER = "py -3.12 scripts\\set_up.py" if os.name == "nt" else "make PYTHON=python3.12 test"
AGAIN = ", then give the same command again"
CAUSES = {  # what venv and pip say -> what to do
    r"No space left|Disk quota|not enough space|Errno (28|122)\b": (
        "the disk is full: make room, 2 GB for the CPU build of PyTorch (see README.md), 8 GB with CUDA"
    ),
    r"(?i)connection|name resolution|getaddrinfo|unreachable|timed out|HTTP ?error|ProxyError|IncompleteRead"
    r"|No matching distribution found for setuptools": (  # every index has it
        "pip cannot reach the package index: check the network (behind a proxy, set HTTPS_PROXY and PIP_CERT)"
    ),
}


def advice(errors):
    """What to do, from what venv or pip said; where that is not known, its last lines."""
    known = [todo for pattern, todo in CAUSES.items() if re.search(pattern, errors)]
    last = "\n".join(errors.strip().splitlines()[-5:])
    return known[0] + AGAIN if known else f"{last}\nMend that, or take another Python, as in {OTHER}"


def stop(reason):
    sys.exit(f"Set-up stopped: {reason}.")


def run(*command):
    done = subprocess.run([str(word) for word in command], stderr=subprocess.PIPE, errors="replace")
    if done.returncode:
        stop(advice(done.stderr))


def make_venv():
    version, needed = "{}.{}".format(*sys.version_info), "{}.{}".format(*NEEDED)
    if sys.version_info < NEEDED:
        stop(
            f"this is Python {version}, and {needed} or newer is needed: install it from "
            f"https://www.python.org/downloads/, then name it, as in {OTHER}"
        )
    tools = [name for name, needs in (("venv", "ensurepip"), ("virtualenv", "virtualenv")) if find_spec(needs)]
    if not tools:
        stop(
            f"this Python lacks its venv module: install it (Debian and Ubuntu: apt install python{version}-venv), "
            f"or virtualenv, for which nobody needs root (python3 -m pip install --user virtualenv){AGAIN}"
        )
    print(f"Making .venv with Python {version}", flush=True)
    run(sys.executable, "-m", tools[0], "--clear", VENV)


def set_up():
    if READY.exists() and PYTHON.exists():
        READY.unlink()  # an update that fails is begun again, too
    else:  # never finished: a package may be there by half
        make_venv()
    run(PYTHON, "-m", "pip", "install", "--disable-pip-version-check", "--editable", ROOT)
    READY.touch()
    print("Set-up done: .venv is ready")


if __name__ == "__main__":
    try:
        set_up()
    except KeyboardInterrupt:
        sys.exit("\nSet-up interrupted: give the same command again.")
