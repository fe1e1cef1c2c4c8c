"""The times and the memory behind lesson 11, in PyTorch and in ONNX Runtime. Writes results/runtime_*.csv.

    python scripts/measure_runtime.py [--parts pairs bits memory] [--out FOLDER]

Three minutes on an idle thread. A speed-up is a ratio of the thread's computing times. A row is written as soon as it
is measured, and what is in a file already is skipped, so an interrupted run resumes; remove a file to measure anew.

``pairs``: a dense layer against its pair at rank d/16, hot and cold. ``bits``: width 4096, low rank against 8 and 4
bits, cold, by batch. ``memory`` (Linux only): what a process holds for eight layers, if the file has two products for
each and if it has ``A @ B``.
"""

import argparse
import csv
import itertools
import logging
import platform
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import lrf_utils as lrf
import notebook_utils as nb

logging.disable(logging.WARNING)  # the quantizers report each step, and advise a preparation that changes nothing here
torch.set_num_threads(1)

COLD = 64 * 2**20  # bytes of copies to go round: more than the caches of the machines we know
QUARTILES = ["speed-up", "speed-up, lower quartile", "speed-up, upper quartile", "time (µs)", "dense (µs)"]


def product(*weights: np.ndarray) -> onnx.ModelProto:
    """The ONNX model x @ W0 @ W1 …, one ``MatMul`` for each weight; for a linear layer, hand over ``weight.T``."""
    names = ["x"] + [f"h{i}" for i in range(1, len(weights))] + ["y"]
    nodes = [helper.make_node("MatMul", [a, f"W{i}"], [b]) for i, (a, b) in enumerate(zip(names, names[1:]))]
    ends = [("x", len(weights[0])), ("y", weights[-1].shape[1])]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", size]) for name, size in ends)
    held = [numpy_helper.from_array(np.ascontiguousarray(W), f"W{i}") for i, W in enumerate(weights)]
    graph = helper.make_graph(nodes, "product", [x], [y], held)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def eight_bits(model: onnx.ModelProto) -> onnx.ModelProto:
    """Weights rounded to 8 bits, a scale for each output; inputs are rounded while the model runs."""
    with tempfile.TemporaryDirectory() as folder:
        quantize_dynamic(model, f"{folder}/8.onnx", weight_type=QuantType.QInt8, per_channel=True)
        return onnx.load(f"{folder}/8.onnx")


def four_bits(model: onnx.ModelProto, inputs: str = "8 bits") -> onnx.ModelProto:
    """Weights rounded to 4 bits in blocks of 32, each with a scale; they meet inputs of 8 bits, or of 32."""
    level = {"8 bits": 4, "32 bits": 1}[inputs]  # the runtime's names for the arithmetic
    copy = onnx.ModelProto.FromString(model.SerializeToString())  # the quantizer changes what it gets
    quantizer = MatMulNBitsQuantizer(copy, block_size=32, is_symmetric=True, accuracy_level=level)
    quantizer.process()
    return quantizer.model.model


def session(model: onnx.ModelProto | str, optimized: str = "") -> onnxruntime.InferenceSession:
    """The model, or that of a file, ready to run on one thread; ``optimized``: where to write what will really run."""
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads, settings.log_severity_level = 1, 3
    settings.optimized_model_filepath = optimized
    model = model if isinstance(model, str) else model.SerializeToString()
    return onnxruntime.InferenceSession(model, settings, providers=["CPUExecutionProvider"])


def weight_bytes(model: onnx.ModelProto) -> int:
    """What the weights of the file take, scales included."""
    return sum(numpy_helper.to_array(tensor).nbytes for tensor in model.graph.initializer)


def hot(model: onnx.ModelProto, x: np.ndarray):
    """A function that runs the model, the same one each time."""
    return partial(session(model).run, None, {"x": x})


def cold(model: onnx.ModelProto, x: np.ndarray):
    """A function that runs another copy each time, of 64 MB of copies, so that no weight is in a cache."""
    copies = itertools.cycle([session(model) for _ in range(COLD // weight_bytes(model) + 1)])
    return lambda: next(copies).run(None, {"x": x})


def eager(weights: list[torch.Tensor], x: torch.Tensor, copies: int = 1):
    """The same in PyTorch: a product after the other."""
    cycle = itertools.cycle([[W.clone() for W in weights] for _ in range(copies)])

    def call():
        y = x
        for W in next(cycle):
            y = F.linear(y, W)
        return y

    return call


measure = partial(nb.measure, clock=time.thread_time)  # what others do on the machine counts less


@torch.no_grad()
def speed_ups(calls, **how):
    """For each call but the first: quartiles of the speed-up over the first, and both medians in µs."""
    times = measure(calls, **how)
    dense = times.iloc[:, 0]
    for name in times.columns[1:]:
        ratios = (dense / times[name]).quantile([0.5, 0.25, 0.75])
        yield name, [f"{v:.3f}" for v in (*ratios, 1e6 * times[name].median(), 1e6 * dense.median())]


def write(path: Path, columns: list[str], rows: list[list]) -> None:
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns] * new + rows)


def done(path: Path, keys: list[str]) -> set[tuple[str, ...]]:
    if not path.exists():
        return set()
    with path.open(encoding="utf-8") as file:
        return {tuple(row[key] for key in keys) for row in csv.DictReader(file)}


def measure_pairs(path: Path) -> None:
    """Dense layer against pair, eager and in the runtime, hot and cold."""
    keys = ["runtime", "width", "batch", "weights"]
    for width, batch in itertools.product((256, 1024, 4096), (1, 32, 256)):
        rank, x = width // 16, torch.randn(batch, width)
        W, B, A = torch.randn(width, width), torch.randn(rank, width), torch.randn(width, rank)
        copies = [COLD // (4 * sum(map(torch.numel, part))) + 1 for part in ([W], [A, B])]
        models = product(W.T.numpy()), product(B.T.numpy(), A.T.numpy())
        for weights, make in (("hot", hot), ("cold", cold)):
            if ("ONNX Runtime", str(width), str(batch), weights) in done(path, keys):
                continue
            many = (1, 1) if weights == "hot" else copies
            for runtime, calls in (
                ("PyTorch", {"dense": eager([W], x, many[0]), "pair": eager([B, A], x, many[1])}),
                ("ONNX Runtime", dict(zip(("dense", "pair"), (make(m, x.numpy()) for m in models)))),
            ):
                ((_, values),) = speed_ups(calls, blocks=11, seconds=0.05)
                write(path, keys + QUARTILES, [[runtime, width, batch, weights, *values]])
                print(runtime, width, batch, weights, values, flush=True)


def bit_models(width: int = 4096, rank: int = 256) -> dict[str, onnx.ModelProto]:
    """One layer in every form that ``bits`` compares; the weights are random, since their values cost no time."""
    rng = np.random.default_rng(0)
    W, B, A = (rng.standard_normal(shape, "float32") for shape in ((width, width), (width, rank), (rank, width)))
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


def measure_bits(path: Path) -> None:
    """Width 4096: what 8 bits, 4 bits, rank 256 and both gain over dense, by batch, cold."""
    width, models = 4096, bit_models()
    held = {name: weight_bytes(model) for name, model in models.items()}
    for batch in (1, 2, 4, 8, 16, 32, 64, 128):
        if (str(batch),) in done(path, ["batch"]):
            continue
        x = np.random.default_rng(1).standard_normal((batch, width), "float32")
        calls = {name: cold(model, x) for name, model in models.items()}
        rows = []
        for name, values in speed_ups(calls, blocks=11, seconds=0.05):
            rows.append([name, batch, held[name], f"{held['dense'] / held[name]:.3f}", *values])
            print(*rows[-1], flush=True)
        write(path, ["method", "batch", "weights (bytes)", "byte ratio", *QUARTILES], rows)


class Stack(nn.Module):
    """Eight linear layers as pairs; ``joined`` multiplies each pair's matrices before it meets the input."""

    def __init__(self, width: int, rank: int, joined: bool) -> None:
        super().__init__()
        down, up = partial(nn.Linear, width, rank, bias=False), partial(nn.Linear, rank, width, bias=False)
        self.pairs = nn.ModuleList(lrf.LowRank(down(), up()) for _ in range(8))
        self.joined = joined

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for pair in self.pairs:
            x = F.linear(x, pair.weight) if self.joined else pair(x)
        return x


PROBE = """
import re, sys
import numpy as np, onnxruntime
def private():
    text = open("/proc/self/smaps_rollup").read()
    return 1024 * sum(int(n) for n in re.findall(r"^Private_\\w+: +(\\d+) kB", text, re.M))
settings = onnxruntime.SessionOptions()
settings.intra_op_num_threads, settings.log_severity_level = 1, 3
before = private()
session = onnxruntime.InferenceSession(sys.argv[1], settings, providers=["CPUExecutionProvider"])
session.run(None, {"x": np.zeros((1, int(sys.argv[2])), "float32")})
print(private() - before)
"""


def measure_memory(path: Path, width: int = 2048, rank: int = 128) -> None:
    """Private memory of a process with eight layers, by what the file says: two products each, or ``A @ B``."""
    if platform.system() != "Linux":
        print("memory: skipped, since private memory is read from /proc, which only Linux has")
        return
    for graph, joined in (("two products", False), ("A @ B", True)):
        if (graph,) in done(path, ["graph"]):
            continue
        torch.manual_seed(0)
        stack = Stack(width, rank, joined).eval()
        with tempfile.TemporaryDirectory() as folder:
            file = f"{folder}/stack.onnx"
            torch.onnx.export(stack, (torch.zeros(1, width),), input_names=["x"], verbose=False).save(file)
            size = weight_bytes(onnx.load(file))
            command = [sys.executable, "-c", PROBE, file, str(width)]
            values = [int(subprocess.run(command, capture_output=True, check=True).stdout) for _ in range(5)]
        row = [graph, width, rank, f"{size / 1e6:.3f}", f"{sorted(values)[2] / 1e6:.3f}"]
        write(path, ["graph", "width", "rank", "weights in the file (MB)", "private memory (MB)"], [row])
        print(*row, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {"pairs": measure_pairs, "bits": measure_bits, "memory": measure_memory}
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--out", type=Path, default=nb.ROOT / "results")
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    for part in chosen.parts:
        parts[part](chosen.out / f"runtime_{part}.csv")


if __name__ == "__main__":
    main()
