"""What takes too long for a cell of notebook 12, or needs Linux. Writes results/scale_*.csv.

    python scripts/scale.py [--parts svd engines memory] [--out FOLDER]

One thread, about six minutes; each part writes its table anew, row by row. CPU seconds, which a busy machine changes
little, are those of the process and, where several work, of all of them. Memory is private memory above that before the
call (see ``stream.MemoryLog``), in a process of its own. The engine Dask is measured only where it is installed.
"""

import argparse
import csv
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
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from stream import MemoryLog, factors

ROOT = Path(__file__).resolve().parents[1]
SVD = ["method", "m", "n", "rank", "CPU seconds", "private MB", "error / optimum"]
ENGINES = ["engine", "workers", "block", "CPU seconds", "seconds"]
JOBS, WIDTH, RANK = 16, 1024, 64


def matrix(m: int, n: int) -> Tensor:
    """Random, with singular values that fall about as 1 / sqrt(index), as slowly as those of many trained layers."""
    torch.manual_seed(0)
    return torch.randn(m, m) * torch.arange(1.0, m + 1).rsqrt() @ torch.randn(m, n)


def full(W: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return U[:, :rank] * S[:rank], Vh[:rank]


def gram(W: Tensor, rank: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """By the eigenvectors of W Wᵀ or Wᵀ W, whichever is smaller; C is summed in ``dtype``."""
    if W.shape[0] > W.shape[1]:
        A, B = gram(W.T, rank, dtype)
        return B.T, A.T
    C = torch.zeros(len(W), len(W), dtype=dtype)
    for some in W.split(1024, dim=1):  # so no copy of W in another precision
        C.addmm_(some.to(dtype), some.to(dtype).T)
    U = torch.linalg.eigh(C)[1][:, -rank:].to(W.dtype)
    return U, U.T @ W


def randomized(W: Tensor, rank: int, more: int, niter: int) -> tuple[Tensor, Tensor]:
    """From the products of W with rank + ``more`` random vectors, and ``niter`` times with Wᵀ and W again."""
    torch.manual_seed(0)
    U, S, V = torch.svd_lowrank(W, q=rank + more, niter=niter)
    return U[:, :rank] * S[:rank], V[:, :rank].T


def range_finder(W: Tensor, rank: int, more: int, niter: int) -> tuple[Tensor, Tensor]:
    """The same, but what is left in the end, a wide matrix of rank + ``more`` rows, is solved by its Gram matrix."""
    if W.shape[0] > W.shape[1]:
        A, B = range_finder(W.T, rank, more, niter)
        return B.T, A.T
    torch.manual_seed(0)
    Q = torch.linalg.qr(W @ torch.randn(W.shape[1], rank + more))[0]
    for _ in range(niter):
        Q = torch.linalg.qr(W @ torch.linalg.qr(W.T @ Q)[0])[0]
    U, B = gram(Q.T @ W, rank)
    return Q @ U, B


METHODS: dict[str, Callable] = {
    "full SVD": full,
    "Gram, float32": gram,
    "Gram, float64": lambda W, rank: gram(W, rank, torch.float64),
    "randomized, 10 more, 0 iterations": lambda W, rank: randomized(W, rank, 10, 0),
    "randomized, 10 more, 1 iteration": lambda W, rank: randomized(W, rank, 10, 1),
    "randomized, 10 more, 2 iterations": lambda W, rank: randomized(W, rank, 10, 2),
    "randomized, a quarter more, 3 iterations": lambda W, rank: randomized(W, rank, rank // 4, 3),
    "randomized, half more, 2 iterations": lambda W, rank: randomized(W, rank, rank // 2, 2),
    "randomized, half more, 2 iterations, Gram": lambda W, rank: range_finder(W, rank, rank // 2, 2),
}


def error(W: Tensor, A: Tensor, B: Tensor) -> float:
    return sum((rows - a @ B).double().square().sum().item() for rows, a in zip(W.split(512), A.split(512))) ** 0.5


def measured(file: str, name: str, rank: int) -> tuple[float, float, float]:
    """CPU seconds, peak of private memory in MB, and error of one method, in a process that did nothing before."""
    torch.set_num_threads(1)
    with safe_open(file, framework="pt") as tensors:
        W = tensors.get_tensor("W")  # mapped: no private memory
        METHODS[name](W[:256, :300].clone(), 8)
        with MemoryLog() as log:
            start = time.process_time()
            A, B = METHODS[name](W, rank)
            spent = time.process_time() - start
        return spent, max((size for _, size in log.rows), default=float("nan")), error(W, A, B)


def svd(record: Callable) -> None:
    m, n, rank = 4096, 11008, 512
    with tempfile.TemporaryDirectory() as folder, get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        file = f"{folder}/W.safetensors"
        save_file({"W": matrix(m, n)}, file)
        optimum = None
        for name in METHODS:
            spent, peak, left = pool.apply(measured, (file, name, rank))
            optimum = optimum or left  # the full SVD comes first
            record(name, m, n, rank, f"{spent:.2f}", f"{peak:.0f}", f"{left / optimum:.5f}")


def job(number: int) -> float:
    torch.manual_seed(number)
    return sum(part.norm().item() for part in factors(torch.randn(WIDTH, WIDTH), RANK))


def engines(record: Callable) -> None:
    """The same jobs in one loop, in threads, in processes that start anew, and in Dask's threads if it is there."""
    numbers = range(JOBS)

    def loop() -> None:
        for number in numbers:
            job(number)

    def threads() -> None:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(job, numbers))

    def processes() -> None:
        code = f"import sys, scale; [scale.job(n) for n in range(int(sys.argv[1]), {JOBS}, 2)]"
        command = [sys.executable, "-c", code]
        started = [subprocess.Popen([*command, str(rank)], cwd=Path(__file__).parent) for rank in range(2)]
        if any(process.wait() for process in started):
            raise SystemExit("a process of the engines' comparison failed")

    def dask_threads() -> None:
        import dask

        dask.compute(*[dask.delayed(job)(number) for number in numbers], scheduler="threads", num_workers=2)

    tried = {"loop": loop, "threads": threads, "layers[rank::2], 2 new processes": processes}
    if importlib.util.find_spec("dask"):
        tried["Dask, threads"] = dask_threads
    job(0)
    for block in range(3):
        for name, engine in tried.items():
            before, start = sum(os.times()[:4]), time.perf_counter()
            engine()
            seconds, spent = time.perf_counter() - start, sum(os.times()[:4]) - before  # with children
            record(name, 1 if name == "loop" else 2, block + 1, f"{spent:.2f}", f"{seconds:.2f}")


def curve(log: Path) -> pd.DataFrame:
    """A log of ``stream.py --memory`` in 60 equal stretches of time: the largest private memory in each."""
    rows = pd.read_csv(log)
    stretch = pd.cut(rows["seconds"], 60, labels=False)
    return rows.groupby(stretch).max().reindex(range(60)).ffill().clip(lower=0.001)


def memory(record: Callable) -> None:
    """Private memory of ``stream.py`` over time, for twelve weights of 2048×2048."""
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        save_file({f"{i:02d}.weight": torch.randn(2048, 2048) for i in range(12)}, f"{folder}/model.safetensors")
        for run, more in (("at_once", ["--at-once"]), ("one_by_one", [])):
            files = Path(__file__).with_name("stream.py"), f"{folder}/model.safetensors", f"{folder}/{run}"
            log = Path(folder, "log.csv")
            command = [sys.executable, *map(str, files), "--rank", "64", "--memory", str(log), *more]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            for seconds, size in curve(log).itertuples(index=False):
                record(run, f"{seconds:.3f}", f"{size:.3f}")


def recorder(path: Path, columns: list[str]) -> Callable:
    path.write_text(",".join(columns) + "\n", encoding="utf-8")

    def record(*values: object) -> None:
        with path.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerow(values)
        print(*values, sep=", ", flush=True)

    return record


PARTS = {
    "svd": (svd, "scale_svd.csv", SVD),
    "engines": (engines, "scale_engines.csv", ENGINES),
    "memory": (memory, "scale_memory.csv", ["run", "seconds", "MB"]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path, default=ROOT / "results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    for part in options.parts:
        run, name, columns = PARTS[part]
        run(recorder(options.out / name, columns))


if __name__ == "__main__":
    main()
