"""Workers that factorize together through torch.distributed; ``launch`` starts them.

    found = workers.launch("statistics", {"model": model, "inputs": x, "ranks": {"fc1": 22}})

The workers meet in a temporary folder, by a file, so no port is needed that another program might
have. What they are given lies there (``given.pt``), and so does what worker 0 finds
(``found.pt``). The backend gloo talks over this machine's own loopback and needs no GPU.
"""

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import lrf_utils as lrf

# --- What a worker does --------------------------------------------------------------------------


def add_up(statistics: dict[str, lrf.Statistics]) -> dict[str, lrf.Statistics]:
    """What all workers' statistics say together. Sums are sent, and never a row."""
    together = {}
    for name, s in statistics.items():
        counts = torch.tensor([s.inputs, s.rows, s.weight], dtype=torch.float64)
        for numbers in (counts, s.row_sum, s.outer_sum):
            dist.all_reduce(numbers)  # in place: now the sum over all workers
        inputs, rows, weight = counts.tolist()
        together[name] = replace(s, inputs=round(inputs), rows=round(rows), weight=weight)
    return together


def statistics(given: dict[str, Any], rank: int, world: int) -> dict[str, Any]:
    """Each worker runs its share of the inputs; then all know the statistics of all inputs."""
    together = add_up(lrf.collect_statistics(given["model"], given["inputs"][rank::world]))
    widths = [len(s.row_sum) for s in together.values()]
    return {
        "statistics": together,
        "model": lrf.factorize(given["model"], given["ranks"], together),
        "sent": sum(3 + n + n * n for n in widths),
    }


def gram_svd(W_k: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """This worker's rows of A, and B, for a W whose rows are spread over the workers."""
    C = W_k.T @ W_k
    dist.all_reduce(C)  # n × n numbers: the sum over workers is Wᵀ W
    values, V = torch.linalg.eigh(C.double())
    V, root = V[:, -rank:].to(W_k).contiguous(), values[-rank:].clamp(min=1e-30).to(W_k) ** 0.25
    dist.broadcast(V, src=0)  # n × rank; on other hardware the signs may be others
    return W_k @ V / root, root[:, None] * V.T


def sharded(given: dict[str, Any], rank: int, world: int) -> dict[str, Any]:
    """A truncated SVD of a weight with spread rows: by a DTensor, and without gathering it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode

    D = distribute_tensor(given["W"], init_device_mesh("cpu", (world,)), [Shard(0)])
    with CommDebugMode() as talk:
        S = torch.linalg.svd(D, full_matrices=False)[1]
    counts = talk.get_comm_counts()
    A_k, B = gram_svd(D.to_local(), given["rank"])
    parts = [torch.empty_like(A_k) for _ in range(world)]
    dist.all_gather(parts, A_k)  # only to look at the result here
    return {
        "DTensor": {str(op).split(".")[-1]: count for op, count in counts.items() if count},
        "whole on each worker": S.to_local().shape == (min(given["W"].shape),),
        "A": torch.cat(parts),
        "B": B,
    }


def death(given: dict[str, Any], rank: int, world: int) -> dict[str, Any]:
    """A worker dies before the others hear from it."""
    if rank == given["who"]:
        os._exit(3)
    dist.all_reduce(torch.ones(1))
    return {}


JOBS = {"statistics": statistics, "sharded": sharded, "death": death}

# --- Starting them -------------------------------------------------------------------------------


def launch(
    job: str, given: dict[str, Any], world: int = 2, timeout: float = 300
) -> dict[str, Any]:
    """Start ``world`` workers, wait for all of them, and return what worker 0 found.

    Raises:
        ValueError: there is no such job, or fewer than one worker is asked for.
        RuntimeError: a worker failed or was late, and the others have been ended; or PyTorch
            lacks torch.distributed.
    """
    if job not in JOBS or world < 1:
        names = ", ".join(JOBS)
        raise ValueError(
            f"job must be one of {names} and world at least 1, got {job!r} and {world!r}"
        )
    if not dist.is_available():
        raise RuntimeError(
            "this build of PyTorch has no torch.distributed; install one from pytorch.org"
        )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if sys.platform in ("linux", "darwin"):
        environment["GLOO_SOCKET_IFNAME"] = {"linux": "lo", "darwin": "lo0"}[sys.platform]
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
        torch.save(given, folder / "given.pt")
        command = [sys.executable, str(Path(__file__).resolve()), job, str(folder)]
        workers = []
        try:
            for rank in range(world):
                log = stack.enter_context((folder / f"log{rank}").open("w"))
                whole = [*command, str(rank), str(world), str(timeout)]
                workers.append(subprocess.Popen(whole, stdout=log, stderr=log, env=environment))
            _wait(workers, folder, timeout)
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
        return torch.load(folder / "found.pt", weights_only=False)  # worker 0 has just written it


def _wait(workers: list[subprocess.Popen], folder: Path, timeout: float) -> None:
    """Return when all have ended well; raise a RuntimeError as soon as one has not."""
    end = time.monotonic() + timeout
    while True:
        codes = [worker.poll() for worker in workers]
        failed = [rank for rank, code in enumerate(codes) if code]
        if failed:
            _report(failed, workers, folder)
        running = [rank for rank, code in enumerate(codes) if code is None]
        if not running:
            return
        if time.monotonic() > end:
            raise RuntimeError(
                f"workers {running} of {len(workers)} were not done after {timeout} s; "
                "they were ended"
            )
        time.sleep(0.02)


def _report(failed: list[int], workers: list[subprocess.Popen], folder: Path) -> None:
    time.sleep(0.2)  # for the last lines of the logs
    logs = {rank: (folder / f"log{rank}").read_text().strip().splitlines() for rank in failed}
    # A worker that lost its partner fails, too, so look for one that failed for another reason.
    causes = [r for r, lines in logs.items() if not any("Connection closed" in x for x in lines)]
    rank = (causes or failed)[0]
    why = f": {logs[rank][-1]}" if logs[rank] else ", without a word"
    code = workers[rank].returncode
    raise RuntimeError(
        f"worker {rank} of {len(workers)} ended with code {code}{why}; the others were ended"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="One worker; launch() in this file starts it.")
    parser.add_argument("job", choices=JOBS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("rank", type=int)
    parser.add_argument("world", type=int)
    parser.add_argument("timeout", type=float)
    o = parser.parse_args()
    torch.set_num_threads(1)
    given = torch.load(o.folder / "given.pt", weights_only=False)  # it may hold a whole model
    store = dist.FileStore(str(o.folder / "store"), o.world)
    limit = timedelta(seconds=o.timeout)
    dist.init_process_group("gloo", store=store, rank=o.rank, world_size=o.world, timeout=limit)
    found = JOBS[o.job](given, o.rank, o.world)
    if o.rank == 0:
        torch.save(found, o.folder / "found.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
