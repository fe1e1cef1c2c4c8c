"""What takes too long for a cell of lesson 12, or needs Linux: results/scale_*.csv.

    python -m experiments.scale [--parts svd engines memory] [--out FOLDER]

One thread, about six minutes. CPU seconds, which other programs on the machine change little, are
those of the process and, where several work, of all of them. Memory is private memory above that
before the call (see ``stream.MemoryLog``), in a process of its own. The engine Dask is measured
only where it is installed.
"""

import functools
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pandas as pd
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from examples import stream
from experiments.common import ROOT, Table, parse
from experiments.models import DECOMPOSITIONS, memory_curve, product_error, slow_matrix

# --- Ways to decompose one large matrix ----------------------------------------------------------


def measured(file: str, name: str, rank: int) -> tuple[float, float, float]:
    """CPU seconds, peak of private memory in MB, and error, in a process that did nothing else."""
    torch.set_num_threads(1)
    decompose = DECOMPOSITIONS[name]
    with safe_open(file, framework="pt") as tensors:
        W = tensors.get_tensor("W")  # mapped: it takes no private memory
        decompose(W[:256, :300].clone(), 8)  # the libraries take what they need for themselves
        with stream.MemoryLog() as log:
            start = time.process_time()
            A, B = decompose(W, rank)
            spent = time.process_time() - start
        peak = max((size for _, size in log.rows), default=float("nan"))
        return spent, peak, product_error(W, A, B)


def svd(out: Path, m: int = 4096, n: int = 11008, rank: int = 512) -> None:
    columns = ["method", "m", "n", "rank", "CPU seconds", "private MB", "error / optimum"]
    table = Table(out / "scale_svd.csv", columns, key=["method", "m", "n", "rank"])
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/W.safetensors"
        W = slow_matrix(m, n)
        save_file({"W": W}, file)

        @functools.cache
        def optimum() -> float:
            C = W.double() @ W.double().T
            return torch.linalg.eigvalsh(C)[:-rank].clamp(min=0).sum().sqrt().item()

        def measure(name: str) -> dict[str, str]:
            with get_context("spawn").Pool(1) as pool:
                spent, peak, left = pool.apply(measured, (file, name, rank))
            return {
                "CPU seconds": f"{spent:.2f}",
                "private MB": f"{peak:.0f}",
                "error / optimum": f"{left / optimum():.5f}",
            }

        for name in DECOMPOSITIONS:
            row = {"method": name, "m": m, "n": n, "rank": rank}
            table.add(row, functools.partial(measure, name))


# --- Engines: the same sixteen jobs, in several ways ---------------------------------------------

JOBS, WIDTH, RANK = 16, 1024, 64
HALF_THE_JOBS = f"""
import sys, torch
from examples import stream
for number in range(int(sys.argv[1]), {JOBS}, 2):
    torch.manual_seed(number)
    stream.factors(torch.randn({WIDTH}, {WIDTH}), {RANK})
"""


def job(number: int) -> None:
    torch.manual_seed(number)
    stream.factors(torch.randn(WIDTH, WIDTH), RANK)


def loop() -> None:
    for number in range(JOBS):
        job(number)


def threads() -> None:
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(job, range(JOBS)))


def processes() -> None:
    command = [sys.executable, "-c", HALF_THE_JOBS]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # as the others have
    started = [subprocess.Popen([*command, str(k)], cwd=ROOT, env=one_thread) for k in range(2)]
    if any([process.wait() for process in started]):
        raise SystemExit("a process of the engines' comparison failed")


def dask_threads() -> None:
    import dask

    jobs = [dask.delayed(job)(number) for number in range(JOBS)]
    dask.compute(*jobs, scheduler="threads", num_workers=2)


def timed(engine: Callable[[], None]) -> dict[str, str]:
    before, start = sum(os.times()[:4]), time.perf_counter()  # with those of child processes
    engine()
    seconds, spent = time.perf_counter() - start, sum(os.times()[:4]) - before
    return {"CPU seconds": f"{spent:.2f}", "seconds": f"{seconds:.2f}"}


def engines(out: Path) -> None:
    columns = ["engine", "workers", "block", "CPU seconds", "seconds"]
    table = Table(out / "scale_engines.csv", columns, key=["engine", "block"])
    tried = {"loop": loop, "threads": threads, "layers[rank::2], 2 new processes": processes}
    if importlib.util.find_spec("dask"):
        tried["Dask, threads"] = dask_threads
    torch.set_num_threads(1)
    job(0)
    for block in (1, 2, 3):
        for name, engine in tried.items():
            row = {"engine": name, "workers": 1 if name == "loop" else 2, "block": block}
            table.add(row, functools.partial(timed, engine))


# --- Memory over time ----------------------------------------------------------------------------


def memory(out: Path) -> None:
    """Private memory of ``stream.py`` over time, for twelve weights of 2048×2048."""
    path = out / "scale_memory.csv"
    table = Table(path, ["run", "seconds", "MB"], key=["run", "seconds"])
    done = set(pd.read_csv(path)["run"])  # a run of the program makes all its rows at once
    with tempfile.TemporaryDirectory() as folder:
        model, log = Path(folder, "model.safetensors"), Path(folder, "log.csv")
        torch.manual_seed(0)
        save_file({f"{i:02d}.weight": torch.randn(2048, 2048) for i in range(12)}, model)
        for run, more in (("at_once", ["--at-once"]), ("one_by_one", [])):
            if run in done:
                continue
            command = [sys.executable, stream.__file__, str(model), f"{folder}/{run}"]
            command += ["--rank", "64", "--memory", str(log), *more]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            for seconds, size in memory_curve(log).itertuples(index=False):
                row = {"run": run, "seconds": f"{seconds:.3f}", "MB": f"{size:.3f}"}
                table.add(row, dict)


PARTS = {"svd": svd, "engines": engines, "memory": memory}


def main() -> None:
    options = parse(__doc__, PARTS)
    for part in options.parts:
        PARTS[part](options.out)


if __name__ == "__main__":
    main()
