"""Times behind lesson 11, in PyTorch and in ONNX Runtime: results/runtime_*.csv.

    python -m experiments.runtime [--parts pairs bits precision calls] [--out FOLDER]

Five minutes on an idle thread. A speed-up is a ratio of the thread's computing times; with two
threads, of the times of calls during which both threads ran without interruption.

``pairs``: a dense layer against its pair at rank d/16, with weights in the cache (hot) and not
(cold). ``bits``: width 4096, low rank against 8 and 4 bits, cold, by batch. ``precision``: the
same layer in 32 bits and in bfloat16, on one thread and on two. ``calls``: eight small layers,
called one by one, compiled, and in ONNX Runtime.
"""

import functools
import itertools
import logging
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lrf_utils as lrf
import notebook_utils as nb
from experiments.common import Table, parse
from experiments.models import (
    COLD,
    cold,
    eight_bits,
    four_bits,
    hot,
    product,
    weight_bytes,
)

QUARTILES = ["speed-up", "speed-up, lower quartile", "speed-up, upper quartile"]
MEASURED = [*QUARTILES, "time (µs)", "dense (µs)"]


def eager(weights: list[Tensor], x: Tensor, copies: int = 1) -> Callable[[], Tensor]:
    """A function that multiplies in PyTorch, with another copy of the weights each time."""
    cycle = itertools.cycle([[W.clone() for W in weights] for _ in range(copies)])

    def call() -> Tensor:
        y = x
        for W in next(cycle):
            y = F.linear(y, W)
        return y

    return call


def speed_ups(calls: Mapping[str, Callable], **how: float) -> dict[str, dict[str, str]]:
    """For each call but the first its row of MEASURED: speed-ups are over the first."""
    # thread_time leaves out what other programs do on the machine
    times = nb.measure(calls, clock=time.thread_time, **how)
    dense = times.iloc[:, 0]
    rows = {}
    for name in times.columns[1:]:
        ratios = (dense / times[name]).quantile([0.5, 0.25, 0.75])
        values = [*ratios, 1e6 * times[name].median(), 1e6 * dense.median()]
        rows[name] = {column: f"{value:.3f}" for column, value in zip(MEASURED, values)}
    return rows


def quiet_speed_ups(
    calls: Mapping[str, Callable], threads: int, patience: float = 60
) -> dict[str, dict[str, str]]:
    """The same for several threads, from calls during which no other program took one of them.

    PyTorch's waiting threads spin, so the process then uses ``threads`` seconds in a second.
    """
    kept: dict[str, list[float]] = {name: [] for name in calls}
    deadline = time.perf_counter() + patience
    with torch.no_grad():
        while min(map(len, kept.values())) < 30 and time.perf_counter() < deadline:
            for name, call in calls.items():
                wall, used = time.perf_counter(), time.process_time()
                call()
                wall, used = time.perf_counter() - wall, time.process_time() - used
                if used > 0.9 * threads * wall:
                    kept[name].append(wall)
    if min(map(len, kept.values())) < 30:
        raise SystemExit(f"other programs use the processor: {threads} threads cannot be timed")
    seconds = {name: np.quantile(times, [0.5, 0.75, 0.25]) for name, times in kept.items()}
    dense = next(iter(seconds.values()))[0]
    rows = {}
    for name, times in list(seconds.items())[1:]:
        values = [*(dense / times), 1e6 * times[0], 1e6 * dense]
        rows[name] = {column: f"{value:.3f}" for column, value in zip(MEASURED, values)}
    return rows


def pairs(out: Path) -> None:
    """A dense layer against its pair: in PyTorch and in the runtime, hot and cold."""
    key = ["runtime", "width", "batch", "weights"]
    table = Table(out / "runtime_pairs.csv", key + MEASURED, key)
    for width, batch in itertools.product((256, 1024, 4096), (1, 32, 256)):
        rank, x = width // 16, torch.randn(batch, width)
        W, B, A = torch.randn(width, width), torch.randn(rank, width), torch.randn(width, rank)
        layers = {"dense": [W], "pair": [B, A]}

        def in_pytorch(weights: str, layers=layers, x=x) -> dict[str, str]:
            calls = {}
            for name, matrices in layers.items():
                size = sum(4 * matrix.numel() for matrix in matrices)
                calls[name] = eager(matrices, x, COLD // size + 1 if weights == "cold" else 1)
            return speed_ups(calls, blocks=11, seconds=0.05)["pair"]

        def in_onnx(weights: str, layers=layers, x=x) -> dict[str, str]:
            make = {"hot": hot, "cold": cold}[weights]
            graphs = {name: product(*(M.T.numpy() for M in Ms)) for name, Ms in layers.items()}
            calls = {name: make(graph, x.numpy()) for name, graph in graphs.items()}
            return speed_ups(calls, blocks=11, seconds=0.05)["pair"]

        for weights in ("hot", "cold"):
            for runtime, run in (("PyTorch", in_pytorch), ("ONNX Runtime", in_onnx)):
                row = {"runtime": runtime, "width": width, "batch": batch, "weights": weights}
                table.add(row, functools.partial(run, weights))


def bit_models(width: int = 4096, rank: int = 256) -> dict[str, onnx.ModelProto]:
    """One layer in every form that ``bits`` compares; its values cost no time, so are random."""
    rng = np.random.default_rng(0)
    W = rng.standard_normal((width, width), "float32")
    B = rng.standard_normal((width, rank), "float32")
    A = rng.standard_normal((rank, width), "float32")
    dense, pair = product(W), product(B, A)
    return {
        "dense": dense,
        "low rank": pair,
        "8 bits": eight_bits(dense),
        "4 bits": four_bits(dense),
        "4 bits, inputs of 32": four_bits(dense, "32 bits"),
        "low rank, 8 bits": eight_bits(pair),
        "low rank, 4 bits": four_bits(pair),
    }


def bits(out: Path) -> None:
    """Width 4096: the gain of 8 bits, 4 bits, rank 256 and both over dense, by batch, cold."""
    columns = ["method", "batch", "weights (bytes)", "byte ratio", *MEASURED]
    table = Table(out / "runtime_bits.csv", columns, key=["method", "batch"])
    graphs = bit_models()
    held = {name: weight_bytes(graph) for name, graph in graphs.items()}
    for batch in (1, 2, 4, 8, 16, 32, 64, 128):

        @functools.cache  # all methods are timed in turn, so a batch makes all its rows at once
        def times(batch: int = batch) -> dict[str, dict[str, str]]:
            x = np.random.default_rng(1).standard_normal((batch, 4096), "float32")
            calls = {name: cold(graph, x) for name, graph in graphs.items()}
            return speed_ups(calls, blocks=11, seconds=0.05)

        for name in list(graphs)[1:]:
            row = {"method": name, "batch": batch, "weights (bytes)": held[name]}
            row["byte ratio"] = f"{held['dense'] / held[name]:.3f}"
            table.add(row, lambda name=name, times=times: times()[name])


def precision(out: Path, width: int = 4096, rank: int = 256) -> None:
    """A layer and its pair, cold, in 32 bits and in bfloat16, with one thread and with two."""
    key = ["method", "batch", "threads"]
    table = Table(out / "runtime_precision.csv", key + MEASURED, key)
    W, B, A = torch.randn(width, width), torch.randn(rank, width), torch.randn(width, rank)
    kinds = {
        "low rank": ([B, A], torch.float32),
        "bfloat16": ([W], torch.bfloat16),
        "low rank, bfloat16": ([B, A], torch.bfloat16),
    }
    for threads, batch in itertools.product((1, 2), (1, 32)):

        @functools.cache  # all are timed in turn, so they make all their rows at once
        def times(threads: int = threads, batch: int = batch) -> dict[str, dict[str, str]]:
            torch.set_num_threads(threads)
            calls = {}
            for name, (weights, dtype) in {"dense": ([W], torch.float32), **kinds}.items():
                same, x = [M.to(dtype) for M in weights], torch.randn(batch, width).to(dtype)
                calls[name] = eager(same, x, COLD // sum(M.nbytes for M in same) + 1)
            if threads == 1:
                return speed_ups(calls, blocks=11, seconds=0.05)
            return quiet_speed_ups(calls, threads)

        for name in kinds:
            row = dict(zip(key, (name, batch, threads)))
            table.add(row, lambda name=name, times=times: times()[name])
    torch.set_num_threads(1)


def calls(out: Path, width: int = 256, rank: int = 16) -> None:
    """One input through eight small layers, hot: what remains of the gain, by who calls them."""
    columns = ["layers", "called by", *MEASURED]
    table = Table(out / "runtime_calls.csv", columns, key=columns[:2])
    x = torch.randn(1, width)

    @functools.cache
    def times() -> dict[str, dict[str, str]]:
        made: dict[str, Callable] = {}
        for name, size in (("dense", None), ("pairs", rank)):
            torch.manual_seed(0)
            layers = [nn.Linear(width, width) for _ in range(8)]
            if size:
                layers = [lrf.factorize_layer(layer, size) for layer in layers]
            parts = (part for layer in layers for part in (layer, nn.ReLU()))
            network = nn.Sequential(*parts).eval()
            made[f"{name}, PyTorch"] = functools.partial(network, x)
            made[f"{name}, torch.compile"] = functools.partial(torch.compile(network), x)
            with tempfile.TemporaryDirectory() as folder:
                file = f"{folder}/network.onnx"
                torch.onnx.export(network, (x,), input_names=["x"], verbose=False).save(file)
                made[f"{name}, ONNX Runtime"] = hot(onnx.load(file), x.numpy())
        return speed_ups({"": made["dense, PyTorch"]} | made, blocks=15, seconds=0.03)

    for name, caller in itertools.product(
        ("dense", "pairs"), ("PyTorch", "torch.compile", "ONNX Runtime")
    ):
        row = {"layers": name, "called by": caller}
        table.add(row, lambda key=f"{name}, {caller}": times()[key])


PARTS = {"pairs": pairs, "bits": bits, "precision": precision, "calls": calls}


def main() -> None:
    options = parse(__doc__, PARTS)
    # the quantizers advise a preparation that would change nothing here
    logging.disable(logging.WARNING)
    for part in options.parts:
        PARTS[part](options.out)


if __name__ == "__main__":
    main()
