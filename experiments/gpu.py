"""Times on an NVIDIA card, for lesson 11: results/gpu.csv. So far, nobody has run it.

    python -m experiments.gpu [--out FOLDER]

Ten minutes at most. A linear layer of width 4096 against its pair at rank 256, in float32 and
in bfloat16, for 1 to 4,096 inputs. With one input, most of an eager call is the time that Python
needs to launch a kernel. So each layer is also timed as a CUDA graph, which is recorded once and
launched as a whole. "cold" empties the L2 cache before every call, as other layers would.

Kernels run after the call has returned. So the card's own clock is read (CUDA events), and it is
read after a synchronization.
"""

import functools
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from experiments.common import Table, parse

WIDTH, RANK = 4096, 256
BATCHES = (1, 8, 64, 512, 4096)  # few inputs: decoding; many: prefill
QUARTILES = ["speed-up", "speed-up, lower quartile", "speed-up, upper quartile"]
KEY = ["card", "precision", "batch", "weights", "called", "layer"]
COLUMNS = [*KEY, "byte ratio", "MAC ratio", *QUARTILES, "time (µs)", "dense (µs)"]
WARM_UP, ROUNDS = 10, 50


class Ratios(NamedTuple):
    """How many times more a dense layer moves, in bytes, and multiplies than its pair."""

    bytes: float
    macs: float


def ratios(width: int, rank: int, batch: int) -> Ratios:
    """Weights, inputs, outputs and what passes between the factors count as bytes."""
    dense = width * width + 2 * batch * width
    pair = 2 * rank * width + 2 * batch * (width + rank)
    return Ratios(dense / pair, width / (2 * rank))


def summary(dense: list[float], pair: list[float]) -> dict[str, str]:
    """The speed-up, as the median and quartiles of ratios within a round; times are in ms."""
    if len(dense) != len(pair) or not dense:
        raise ValueError(f"each round needs both times, got {len(dense)} and {len(pair)}")
    speed = np.quantile(np.divide(dense, pair), [0.5, 0.25, 0.75])
    values = [*speed, 1e3 * np.median(pair), 1e3 * np.median(dense)]
    return {name: f"{value:.3f}" for name, value in zip(COLUMNS[-5:], values)}


def problem() -> str | None:
    """Why nothing can be timed here, or None."""
    if not torch.cuda.is_available():
        return "This needs an NVIDIA card, and PyTorch finds none; nothing was written."
    if torch.version.hip:
        return "This PyTorch is for AMD cards; on which nobody tried this."
    return None


def layer(weights: list[Tensor], x: Tensor) -> Callable[[], Tensor]:
    """A function that multiplies ``x`` by one matrix after the other."""
    return lambda: functools.reduce(F.linear, weights, x)


def as_graph(call: Callable[[], Tensor]) -> Callable[[], None]:
    """The kernels of ``call`` recorded once; each call launches them all together."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # a capture needs a warm-up on a stream of its own
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def milliseconds(
    calls: dict[str, Callable], flush: Tensor | None, rounds: int = ROUNDS
) -> dict[str, list[float]]:
    """Each call in turn, round after round; ``flush`` is overwritten before each, if given."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(WARM_UP):
            call()
    for _ in range(rounds):
        for name, call in calls.items():
            if flush is not None:
                flush.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            begin.record()
            call()
            end.record()
            torch.cuda.synchronize()  # without it, the clock stops before the kernel does
            times[name].append(begin.elapsed_time(end))
    return times


def flush_buffer() -> Tensor:
    """Numbers that fill the card's L2 cache twice."""
    size = torch.cuda.get_device_properties(0).L2_cache_size
    return torch.empty(2 * size, dtype=torch.int8, device="cuda")


@torch.inference_mode()
def run(out: Path) -> None:
    table = Table(out / "gpu.csv", COLUMNS, KEY)
    card = torch.cuda.get_device_name(0)
    torch.backends.cuda.matmul.allow_tf32 = False  # else float32 means 19 bits
    for dtype, batch in itertools.product((torch.float32, torch.bfloat16), BATCHES):
        torch.manual_seed(0)
        make = functools.partial(torch.randn, device="cuda", dtype=dtype)
        x, W = make(batch, WIDTH), make(WIDTH, WIDTH)
        eager = {
            "dense": layer([W], x),
            "pair": layer([make(RANK, WIDTH), make(WIDTH, RANK)], x),
        }
        called = {"eager": eager, "CUDA graph": {name: as_graph(c) for name, c in eager.items()}}
        for (how, calls), weights in itertools.product(called.items(), ("hot", "cold")):
            row = dict(zip(KEY, (card, str(dtype)[6:], batch, weights, how, "pair")))

            def measure(calls: dict = calls, weights: str = weights, batch: int = batch) -> dict:
                times = milliseconds(calls, flush_buffer() if weights == "cold" else None)
                of_bytes, of_macs = (f"{ratio:.2f}" for ratio in ratios(WIDTH, RANK, batch))
                shown = {"byte ratio": of_bytes, "MAC ratio": of_macs}
                return shown | summary(times["dense"], times["pair"])

            table.add(row, measure)


def main() -> None:
    options = parse(__doc__, ("all",))
    if reason := problem():
        sys.exit(reason)
    run(options.out)


if __name__ == "__main__":
    main()
