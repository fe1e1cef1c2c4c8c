"""One of several workers that factorize together over torch.distributed, and ``launch``, which starts them all.

    python scripts/worker.py JOB FOLDER RANK WORLD [--timeout 300]

The workers meet in FOLDER, by a file, so there is no port that another program might have. What they are given lies
there (``given.pt``), and so does what worker 0 finds (``found.pt``). Gloo talks over this machine's own loopback.
"""

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    loopback = {"linux": "lo", "darwin": "lo0"}.get(sys.platform)
    if loopback:
        os.environ["GLOO_SOCKET_IFNAME"] = loopback  # before torch.distributed looks for an address

import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import lrf_utils as lrf

# --- What a worker does ----------------------------------------------------------------------------------------------


def add_up(statistics: dict[str, lrf.Statistics]) -> dict[str, lrf.Statistics]:
    """What all workers' statistics say together: one all_reduce of one vector."""
    counts = [torch.tensor([s.inputs, s.rows]).double() for s in statistics.values()]
    sums = [torch.cat([c, s.row_sum, s.outer_sum.flatten()]) for c, s in zip(counts, statistics.values())]
    vector = torch.cat(sums)
    dist.all_reduce(vector)
    together = {}
    for (name, s), part in zip(statistics.items(), vector.split([len(part) for part in sums])):
        n = len(s.row_sum)
        inputs, rows = part[:2].long().tolist()
        together[name] = lrf.Statistics(inputs, rows, part[2 : n + 2], part[n + 2 :].reshape(n, n))
    return together


def statistics(given: dict[str, Any], rank: int, world: int) -> dict[str, Any]:
    """Each worker runs its share of the inputs through the model; then all know the statistics of all inputs."""
    together = add_up(lrf.collect(given["model"], given["inputs"][rank::world]))
    sent = sum(2 + len(s.row_sum) * (1 + len(s.row_sum)) for s in together.values())
    return {"statistics": together, "model": lrf.factorize(given["model"], given["ranks"], together), "sent": sent}


def gram_svd(W_k: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """This worker's rows of A, and B, for a W whose rows are spread over the workers. W itself is never sent."""
    C = W_k.T @ W_k
    dist.all_reduce(C)  # n × n numbers: the sum over workers is Wᵀ W
    values, V = torch.linalg.eigh(C.double())
    V, root = V[:, -rank:].to(W_k).contiguous(), values[-rank:].clamp(min=1e-30).to(W_k) ** 0.25
    dist.broadcast(V, src=0)  # n × rank; on other hardware the signs may be others
    return W_k @ V / root, root[:, None] * V.T


def sharded(given: dict[str, Any], rank: int, world: int) -> dict[str, Any]:
    """A truncated SVD of a weight whose rows are spread over the workers, by a DTensor, and without gathering."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode

    D = distribute_tensor(given["W"], init_device_mesh("cpu", (world,)), [Shard(0)])
    result = {}
    with CommDebugMode() as talk:
        S = torch.linalg.svd(D, full_matrices=False)[1]
    result["DTensor"] = {str(op).split(".")[-1]: count for op, count in talk.get_comm_counts().items() if count}
    result["whole on each worker"] = S.to_local().shape == (min(given["W"].shape),)
    A_k, B = gram_svd(D.to_local(), given["rank"])
    parts = [torch.empty_like(A_k) for _ in range(world)]
    dist.all_gather(parts, A_k)  # only to look at the result here
    return result | {"A": torch.cat(parts), "B": B}


def death(given: dict[str, Any], rank: int, world: int) -> dict[str, Any]:
    """A worker dies before the others hear from it."""
    if rank == given["who"]:
        os._exit(3)
    total = torch.ones(1)
    dist.all_reduce(total)
    return {}


JOBS = {"statistics": statistics, "sharded": sharded, "death": death}

# --- Starting them ---------------------------------------------------------------------------------------------------


def launch(job: str, given: dict[str, Any], world: int = 2, timeout: float = 300) -> dict[str, Any]:
    """Start ``world`` workers, wait for all of them, and return what worker 0 found.

    Raises:
        ValueError: no such job, or fewer than one worker.
        RuntimeError: a worker ended with an error, or time was up, and all others have been ended by then; or PyTorch
            cannot do it here.
    """
    if job not in JOBS or world < 1:
        raise ValueError(f"job must be one of {', '.join(JOBS)} and world at least 1, got {job!r} and {world!r}")
    if not dist.is_available():
        raise RuntimeError("this build of PyTorch has no torch.distributed; install one from pytorch.org")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, contextlib.ExitStack() as stack:
        torch.save(given, Path(folder, "given.pt"))
        logs = [stack.enter_context(Path(folder, f"log{rank}").open("w")) for rank in range(world)]
        command = [sys.executable, str(Path(__file__).resolve()), job, folder]
        workers = [
            subprocess.Popen([*command, str(rank), str(world), "--timeout", str(timeout)], stdout=log, stderr=log)
            for rank, log in enumerate(logs)
        ]
        try:
            _wait(workers, Path(folder), timeout)
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
        return torch.load(Path(folder, "found.pt"), weights_only=False)  # written by worker 0, a moment ago


def _wait(workers: list[subprocess.Popen], folder: Path, timeout: float) -> None:
    """Until all have ended well; a RuntimeError as soon as one has not."""
    end = time.monotonic() + timeout
    while any(worker.poll() is None for worker in workers) or any(worker.returncode for worker in workers):
        # A worker that lost its partner fails, too: the first in the list of the failed is not the cause.
        if failed := [rank for rank, worker in enumerate(workers) if worker.poll()]:
            time.sleep(0.2)
            causes = {rank: (folder / f"log{rank}").read_text().strip().splitlines() for rank in failed}
            rank = min(causes, key=lambda rank: any("Connection closed" in line for line in causes[rank]))
            why = f": {causes[rank][-1]}" if causes[rank] else ", without a word"
            code = workers[rank].returncode
            raise RuntimeError(f"worker {rank} of {len(workers)} ended with code {code}{why}; the others were ended")
        if time.monotonic() > end:
            late = [rank for rank, worker in enumerate(workers) if worker.poll() is None]
            raise RuntimeError(f"workers {late} of {len(workers)} were not done after {timeout} s; they were ended")
        time.sleep(0.02)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("job", choices=JOBS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("rank", type=int)
    parser.add_argument("world", type=int)
    parser.add_argument("--timeout", type=float, default=300)
    o = parser.parse_args()
    if not 0 <= o.rank < o.world:
        raise SystemExit(f"RANK must be from 0 to {o.world - 1}, got {o.rank}")
    if not (o.folder / "given.pt").exists():
        raise SystemExit(f"there is no given.pt in {o.folder}; launch() in this file makes one")
    torch.set_num_threads(1)
    given = torch.load(o.folder / "given.pt", weights_only=False)  # it may hold a model; launch() wrote it
    store = dist.FileStore(str(o.folder / "store"), o.world)
    dist.init_process_group("gloo", store=store, rank=o.rank, world_size=o.world, timeout=timedelta(seconds=o.timeout))
    found = JOBS[o.job](given, o.rank, o.world)
    if o.rank == 0:
        torch.save(found, o.folder / "found.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
