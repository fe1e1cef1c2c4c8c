"""Fewer bits and fewer ranks at equal bytes, behind lesson 11: results/quantized_*.csv.

    python -m experiments.quantization [--parts shipped encoder trained untrained files layers]
        [--seeds 0 1 2 3 4] [--validate] [--out FOLDER]

``shipped``: MiniLM as six files that ONNX Runtime runs, with their times (quantized_shipped.csv).
``encoder``: its 36 linear layers by more quantizers, without files (quantized_minilm.csv); the
rows of torchao need ``pip install torchao==0.18.0`` and are left out without it. Both hold at
which place each query found its definition. ``layers``: 18 of these layers one by one
(quantized_layers.csv).

``untrained`` and ``trained``: the MNIST network (quantized_mnist.csv). Training also writes the
networks as packed files, that of seed 0 in 3 bits as checkpoints/tiny.lrq beside the folder of
the tables and the others to build/; ``files`` measures them as examples/tiny_digit.py reads them
(quantized_files.csv). ``--validate`` tries the settings of its training with networks trained on
the first 50,000 training images, on the other 10,000 (quantized_validation.csv); the test images
only measure.
"""

import copy
import dataclasses
import functools
import importlib.util
import itertools
import struct
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import lrf_utils as lrf
import notebook_utils as nb
from examples import tiny_digit
from experiments import minilm
from experiments.common import Table, parse
from experiments.models import (
    MLP_8X,
    MnistNetworks,
    OnnxEncoder,
    best_step,
    encoder_in_bits,
    encoder_to_onnx,
    gptq,
    output_error,
    rounded,
)

MNIST = ["method", "rounding", "bits", "seed", "parameters", "bytes", "accuracy (%)"]
FILES = ["method", "bits", "seed", "bytes", "accuracy (%)"]
SHARES = ["first twelfth, weight (%)", "first twelfth, output (%)"]
LAYERS = ["layer", "method", "bits", "bytes", "output error (%)", *SHARES]
SCORES = ["MRR (%)", "MRR, dense index (%)", "places", "places, dense index"]
MINILM = ["method", "bits", "queries", "bytes", "cosine", *SCORES[:3]]
SHIPPED = ["model", "bits", "queries", "bytes", "1 query (ms)", "64 queries (ms)", *SCORES]

# --- A network in few bits -----------------------------------------------------------------------


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}


def damped(C: Tensor, share: float = 0.01) -> Tensor:
    return C + share * C.diagonal().mean() * torch.eye(len(C), dtype=C.dtype)


def half_precision(model: nn.Module) -> nn.Module:
    """A copy whose parameters are those that 16 bits can hold."""
    return copy.deepcopy(model).half().float()


@torch.no_grad()
def quantized(model: nn.Module, bits: int, x: Tensor | None = None) -> nn.Module:
    """A copy with every weight rounded: to the nearest level, or with inputs ``x`` by GPTQ.

    GPTQ goes layer after layer, on the inputs that the rounded layers before it give.
    """
    model = half_precision(model)
    for layer in linear_layers(model).values():
        W = layer.weight.double()
        step = best_step(W, bits)
        if x is None:
            layer.weight.copy_(rounded(W, step, bits))
        else:
            seen: list[Tensor] = []
            with layer.register_forward_pre_hook(lambda _, args, to=seen: to.append(args[0])):
                model(x)
            X = seen[0].double()
            C = damped(X.T @ X / len(X))
            layer.weight.copy_(
                gptq(W, C, lambda column, _, step=step: rounded(column, step, bits))
            )
    return model


class Rounded(nn.Module):
    """Weights are used rounded; the gradient passes as if they were not (straight through).

    A step stays a fixed share of its row's root mean square: the best share for ``W``.
    """

    def __init__(self, W: Tensor, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.share = best_step(W, bits) / W.square().mean(1, keepdim=True).sqrt()

    def step(self, W: Tensor) -> Tensor:
        return (self.share * W.detach().square().mean(1, keepdim=True).sqrt()).half().to(W)

    def forward(self, W: Tensor) -> Tensor:
        step, half = self.step(W), 2 ** (self.bits - 1)
        inside = (W / step).clamp(-half, half - 0.01)
        return (inside + (inside.floor() + 0.5 - inside).detach()) * step


def with_rounding(model: nn.Module, bits: int) -> nn.Module:
    """``model`` itself, which from now on computes with rounded weights."""
    for layer in linear_layers(model).values():
        rounding = Rounded(layer.weight.detach(), bits)
        parametrize.register_parametrization(layer, "weight", rounding)
    return model


def size_in_bytes(model: nn.Module, bits: int) -> int:
    """Packed codes, and in 16 bits a step for each row and the biases.

    At 16 and 32 bits there are no steps, and every parameter takes as many bits. Of a pruned
    layer only the kept weights are stored; a bit for each weight says which those are.
    """
    if bits >= 16:
        return lrf.count_parameters(model) * bits // 8
    size = 0
    for layer in linear_layers(model).values():
        kept, total = int(layer.weight.count_nonzero()), layer.weight.numel()
        size += -(-kept * bits // 8) + (-(-total // 8) if kept < total else 0)
        size += 2 * layer.out_features * (1 if layer.bias is None else 2)
    return size


def pack(codes: Tensor, bits: int) -> bytes:
    """Whole numbers below 2^bits as bytes, without gaps."""
    ones = codes.flatten()[:, None] >> torch.arange(bits) & 1
    return np.packbits(ones.flatten().numpy().astype("u1"), bitorder="little").tobytes()


def save(model: nn.Module, bits: int, path: Path) -> None:
    """A file of packed codes, steps and biases, for a model ``with_rounding``.

    examples/tiny_digit.py says in ``load`` what a code stands for, and reads the file.
    """
    layers = linear_layers(model)
    shapes, body = b"", b""
    for layer in layers.values():
        rounding = layer.parametrizations.weight
        step = rounding[0].step(rounding.original)
        codes = (layer.weight / step + 2 ** (bits - 1) - 0.5).round().long()
        shapes += struct.pack("<HH?", *layer.weight.shape, layer.bias is not None)
        for halves in (step.flatten(), layer.bias):
            if halves is not None:
                body += halves.detach().half().numpy().tobytes()
        body += pack(codes, bits)
    data = bytes([bits, len(layers)]) + shapes + body
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"LRQ1" + struct.pack("<I", zlib.crc32(data)) + data)


# --- The MNIST network ---------------------------------------------------------------------------


# A part yields method, rounding, bits, and a function that makes the model.
Runs = Iterator[tuple[str, str, int, Callable[[], nn.Module]]]


@functools.cache
def rank_choice(nets: MnistNetworks) -> tuple[dict, dict]:
    """The dense network's statistics in the loss metric, and what each rank costs."""
    statistics = lrf.collect_statistics(nets.dense, nets.calibration, loss="classes")
    return statistics, lrf.rank_options(nets.dense, statistics)


def low_rank(nets: MnistNetworks, ratio: float) -> nn.Module:
    """The dense network at the ranks that lose least, with ``ratio`` times fewer weights."""
    statistics, options = rank_choice(nets)
    weights = sum(layer.weight.numel() for layer in linear_layers(nets.dense).values())
    return lrf.factorize(nets.dense, lrf.allocate_ranks(options, weights / ratio), statistics)


def in_bits(nets: MnistNetworks, ratio: float | None, how: str, bits: int) -> nn.Module:
    """The dense network, or its pairs at ``ratio``, rounded."""
    model = nets.dense if ratio is None else low_rank(nets, ratio)
    if how == "none":
        return model if bits == 32 else half_precision(model)
    return quantized(model, bits, nets.calibration if how == "GPTQ" else None)


def untrained(nets: MnistNetworks) -> Runs:
    """Bits alone, ranks alone, both; and pruning."""
    plain = [("none", 32), ("nearest", 8)]
    few = [(how, bits) for bits in (4, 3, 2) for how in ("nearest", "GPTQ")]
    for how, bits in plain + few:
        yield "dense", how, bits, partial(in_bits, nets, None, how, bits)
    for ratio in (2, 4, 6, 8, 12, 7.7):
        for how, bits in [*plain, ("GPTQ", 4)]:
            yield f"low rank, {ratio}x", how, bits, partial(in_bits, nets, ratio, how, bits)
    yield "pruned to 30 %", "nearest", 8, partial(pruned, nets, 0.3)


def pruned(nets: MnistNetworks, share: float) -> nn.Module:
    """The largest weights in 8 bits, the others at 0."""
    weights = [layer.weight.detach() for layer in linear_layers(nets.dense).values()]
    threshold = torch.cat([W.flatten().abs() for W in weights]).quantile(1 - share)
    model = quantized(nets.dense, 8)
    with torch.no_grad():
        for W, layer in zip(weights, linear_layers(model).values()):
            layer.weight.mul_(W.abs() >= threshold)
    return model


# At 12.3 kB or just below, by bits: the ranks of fc1 and fc2, or the widths of a dense network.
AT_12_KB: dict[int, tuple[dict[str, int], tuple[int, ...]]] = {
    3: (MLP_8X, (784, 32, 127, 10)),
    2: ({"fc1": 33, "fc2": 17}, (784, 49, 127, 10)),
    4: ({"fc1": 16, "fc2": 8}, (784, 24, 127, 10)),
}
EPOCHS = {"low rank": 10, "narrower dense": 13}  # the pairs' dense network had three before
TRAINED = (  # method, bits, epochs, peak of the rate; chosen with --validate
    ("low rank, 8x", 3, 10, 5e-3),
    ("low rank, 8x", 2, 10, 2e-3),  # the rows in the table still have 5 epochs, which is worse
    *((f"{kind}, 12 kB", bits, EPOCHS[kind], 5e-3) for bits in AT_12_KB for kind in EPOCHS),
    ("dense", 2, 10, 2e-3),
)
TRIED = (
    ("narrower dense, 12 kB", 3, 13, 5e-3),
    *itertools.product(["low rank, 8x"], (3, 2), (10, 5), (5e-3, 2e-3)),
    *itertools.product(["narrower dense, 12 kB"], (3,), (13,), (1e-2, 2e-3)),
    ("low rank, 8x", 3, 10, 1e-2),
    *itertools.product(["low rank, 12 kB"], (2, 4), (10,), (5e-3, 1e-2, 2e-3)),
    *itertools.product(["narrower dense, 12 kB"], (2, 4), (13,), (5e-3, 1e-2, 2e-3)),
    *itertools.product(["dense"], (2,), (10,), (5e-3, 2e-3, 1e-3)),
)


def train_rounded(
    nets: MnistNetworks, method: str, bits: int, epochs: int, rate: float, file: Path | None = None
) -> nn.Module:
    """A network trained through the rounding: lesson 7's pairs, or what they compete with."""
    if method == "dense":
        model = copy.deepcopy(nets.dense)
    elif method == "low rank, 8x":
        model = nets.by_loss(MLP_8X)
    elif method == "low rank, 12 kB":
        model = nets.by_loss(AT_12_KB[bits][0])
    else:
        model = nets.narrow(AT_12_KB[bits][1])
    nets.fit(with_rounding(model, bits), epochs, rate)
    if file:
        save(model, bits, file)
    return model


def trained(nets: MnistNetworks, out: Path) -> Runs:
    for method, bits, epochs, rate in TRAINED:
        if (method, bits) == ("low rank, 12 kB", 3):
            continue  # the same as low rank, 8x
        file = file_of(method, bits, nets.seed, out) if method in WRITTEN else None
        make = partial(train_rounded, nets, method, bits, epochs, rate, file)
        yield f"{method}, {epochs} epochs", "trained", bits, make


def choices(nets: MnistNetworks) -> Runs:
    """The settings above among others."""
    for method, bits, epochs, rate in TRIED:
        make = partial(train_rounded, nets, method, bits, epochs, rate)
        yield f"{method}, {epochs} epochs, rate {rate}", "trained", bits, make


def measure(method: str, bits: int, make: Callable, data: nb.Dataset) -> dict[str, Any]:
    model = make()
    count, size = lrf.count_parameters(model), size_in_bytes(model, bits)
    if method.startswith("pruned"):  # the weights that are kept
        count = sum(int(layer.weight.count_nonzero()) for layer in linear_layers(model).values())
    accuracy = 100 * lrf.accuracy(model, data.x_test, data.y_test)
    return {"parameters": count, "bytes": size, "accuracy (%)": f"{accuracy:.2f}"}


def record(path: Path, runs: Runs, nets: MnistNetworks) -> None:
    table = Table(path, MNIST, key=MNIST[:4])
    for method, how, bits, make in runs:
        row = {"method": method, "rounding": how, "bits": bits, "seed": nets.seed}
        table.add(row, partial(measure, method, bits, make, nets.data))


WRITTEN = ("low rank, 8x",)  # as packed files


def file_of(method: str, bits: int, seed: int, out: Path) -> Path:
    if (method, bits, seed) == ("low rank, 8x", 3, 0):
        return out.parent / "checkpoints" / "tiny.lrq"
    name = method.replace(", ", "_").replace(" ", "_")
    return out.parent / "build" / f"{name}_{bits}_{seed}.lrq"


def files(out: Path) -> None:
    """What training wrote, read and run with NumPy."""
    table, data = Table(out / "quantized_files.csv", FILES, key=FILES[:3]), nb.load_mnist()
    pixels = data.x_test.numpy() * nb.PIXEL_STD + nb.PIXEL_MEAN

    def measure(path: Path) -> dict[str, Any]:
        found = tiny_digit.classify(pixels, tiny_digit.load(path)).argmax(1)
        accuracy = 100 * (found == data.y_test.numpy()).mean()
        return {"bytes": path.stat().st_size, "accuracy (%)": f"{accuracy:.2f}"}

    for method, bits in itertools.product(WRITTEN, (3, 2)):
        for seed in nb.SEEDS:
            path = file_of(method, bits, seed, out)
            if path.exists():
                row = {"method": method, "bits": bits, "seed": seed}
                table.add(row, partial(measure, path))


# --- A matrix of a transformer in few bits: its rows hold outliers -------------------------------


class Grid(NamedTuple):
    """The levels of each entry: their step, and the zero point, the position of 0 among them."""

    step: Tensor
    zero: Tensor

    def column(self, j: int) -> "Grid":
        return Grid(*(part[:, j : j + 1] for part in self))


def rounded_to(W: Tensor, grid: Grid, bits: int) -> Tensor:
    """The nearest of the 2^bits levels of ``grid``."""
    codes = (W / grid.step + grid.zero).round().clamp(0, 2**bits - 1)
    return (codes - grid.zero) * grid.step


def best_grid(
    W: Tensor, bits: int, importance: Tensor, group: int | None = None, tries: int = 17
) -> Grid:
    """The grid of least squared error for each row, or for each ``group`` of entries in a row.

    Entries weigh as their column's importance. Of three zero points: with one, 0 is between two
    levels, as in ``rounded``; with the others it is a level, and there is one level more below it
    or above. A row of small weights with a few that are 30 times as large, as MiniLM has, needs a
    level at 0. Else each small weight becomes half a step, which may be several times the weight.
    """
    half, parts = 2 ** (bits - 1), W.unflatten(1, (-1, group or W.shape[1]))
    importance = importance.view(parts.shape[1:])
    largest = parts.abs().amax(2, keepdim=True)
    least, best = torch.full_like(largest, torch.inf), Grid(largest, largest)
    for zero in (half - 0.5, half, half - 1):
        for share in torch.linspace(1, 0.2, tries):
            step = (share * largest / half).clamp(min=1e-7).half().to(W)
            grid = Grid(step, torch.full_like(step, zero))
            error = (rounded_to(parts, grid, bits) - parts).square().mul(importance)
            error = error.sum(2, keepdim=True)
            best = Grid(*(torch.where(error < least, *two) for two in zip(grid, best)))
            least = least.minimum(error)
    return Grid(*(part.expand(parts.shape).flatten(1) for part in best))


def awq(W: Tensor, C: Tensor, bits: int, group: int) -> Tensor:
    """Columns with large inputs are enlarged before rounding: AWQ's scales, from eleven powers.

    The input is divided by the same scales, which costs nothing where a layer before it can do so.
    """
    sizes, best = C.diagonal().sqrt(), (torch.inf, W)
    for power in torch.linspace(0, 1, 11):
        scales = (sizes / sizes.log().mean().exp()) ** power
        grid = best_grid(W * scales, bits, torch.ones_like(sizes), group, tries=5)
        Q = rounded_to(W * scales, grid, bits) / scales
        best = min(best, (output_error(W - Q, C).item(), Q), key=lambda pair: pair[0])
    return best[1]


def matrix_at(W: Tensor, C: Tensor, bits: int, how: str, group: int | None = None) -> Tensor:
    """``W`` in so many bits, for inputs of covariance ``C``."""
    if bits == 16:
        return W.half().to(W)
    V, K = W.float(), C.float()
    if how == "AWQ":
        return awq(V, K, bits, group).to(W)
    grid = best_grid(V, bits, K.diagonal(), group)
    if how == "nearest":
        return rounded_to(V, grid, bits).to(W)
    # the columns that matter most come first: those after them can make up for their errors
    order = K.diagonal().argsort(descending=True)
    grid = Grid(*(part[:, order] for part in grid))
    Q = gptq(
        V[:, order], damped(K)[order][:, order], lambda w, j: rounded_to(w, grid.column(j), bits)
    )
    return Q[:, order.argsort()].to(W)


def matrix_bytes(W: Tensor, bits: int, group: int | None = None) -> float:
    """Packed codes, and for each row, or group, a step in 16 bits and a zero point in 8."""
    groups = W.numel() // (group or W.shape[1])
    return W.numel() * bits / 8 + (3 * groups if bits < 16 else 0)


def pair_at(A: Tensor, B: Tensor, C: Tensor, bits: int, how: str) -> tuple[Tensor, Tensor]:
    """Both factors rounded, ``A`` for what the rounded ``B`` gives it."""
    B = matrix_at(B, C, bits, how)
    return matrix_at(A, damped(B @ C @ B.T, 1e-4), bits, how), B


def covariance(name: str, weighted: bool = False) -> Tensor:
    return minilm.statistics(0, weighted)[name].covariance(centered=True, ridge=True)


def share_of_first(E: Tensor) -> str:
    """What the first twelfth of the ranks holds of the squared error, in percent."""
    squares = torch.linalg.svdvals(E).square()
    return f"{100 * (squares[: len(squares) // 12].sum() / squares.sum()).item():.2f}"


def mended(W: Tensor, Q: Tensor, name: str, space: str, rank: int) -> Tensor:
    """Q + AB, with AB the best for the weight (SVD) or for the outputs, in one of two metrics."""
    statistics = None if space == "SVD" else minilm.statistics(0)[name]
    if space == "response PCA":
        statistics = dataclasses.replace(statistics, gradient_sum=None)
    holder = nn.Linear(W.shape[1], W.shape[0]).double()
    with torch.no_grad():
        holder.weight.copy_(W - Q)
    down, up = lrf.factorize_layer(holder, rank, statistics)
    return Q + (up.weight @ down.weight).detach().half().double()


class Layer:
    """The rows of quantized_layers.csv for one layer of MiniLM."""

    def __init__(self, table: Table, name: str) -> None:
        self.table, self.name = table, name
        self.W, self.C = minilm.weights()[name], covariance(name)
        self.root = torch.linalg.cholesky(self.C)
        self.whole = output_error(self.W, self.C)
        _, self.S, Vh = torch.linalg.svd(self.W @ self.root, full_matrices=False)
        self.A = self.W @ self.root @ Vh.T / self.S.sqrt()
        self.B = self.S.sqrt()[:, None] * torch.linalg.solve(self.root, Vh, left=False)

    def add(
        self, method: str, bits: int, size: float, make: Callable[[], Tensor], spread: bool = False
    ) -> None:
        """``spread``: also where the error sits, in the weight and in the output."""

        def measure() -> dict[str, Any]:
            E = self.W - make()
            error = 100 * (output_error(E, self.C) / self.whole).item()
            shares = map(share_of_first, (E, E @ self.root)) if spread else ("", "")
            return {"output error (%)": f"{error:.4f}", **dict(zip(SHARES, shares))}

        row = {"layer": self.name, "method": method, "bits": bits, "bytes": round(size)}
        self.table.add(row, measure)

    def add_rounded(self, bits: int, how: str) -> None:
        Q = functools.cache(partial(matrix_at, self.W, self.C, bits, how))
        size = matrix_bytes(self.W, bits)
        self.add(how, bits, size, Q, spread=True)
        if bits == 2 and ".layer.2." in self.name:
            for space in ("SVD", "response PCA"):
                method = f"{how} + {space} of rank 32"
                make = partial(self.mended, Q, space)
                self.add(method, bits, size + 2 * 32 * sum(self.W.shape), make)

    def mended(self, Q: Callable[[], Tensor], space: str) -> Tensor:
        return mended(self.W, Q(), self.name, space, 32)

    def add_pair(self, size: float, bits: int, pair_bits: int, how: str) -> None:
        """The pair with the largest rank that takes at most ``size`` bytes."""
        rows = 3 if pair_bits < 16 else 0  # bytes for a row's step and zero point
        per_rank = sum(self.W.shape) * pair_bits / 8 + rows
        rank = int((size - rows * len(self.W)) / per_rank)
        if 0 < rank <= min(self.W.shape):
            A, B = self.A[:, :rank], self.B[:rank]
            held = matrix_bytes(A, pair_bits) + matrix_bytes(B, pair_bits)
            make = partial(self.pair, A, B, pair_bits, how)
            self.add(f"low rank in {pair_bits} bits", bits, held, make)

    def pair(self, A: Tensor, B: Tensor, bits: int, how: str) -> Tensor:
        A, B = pair_at(A, B, self.C, bits, how)
        return A @ B


def layers(out: Path) -> None:
    """At equal bytes: rounding, GPTQ, pairs; what mends the error, and where the error sits."""
    table = Table(out / "quantized_layers.csv", LAYERS, key=LAYERS[:3])
    for name, W in minilm.weights().items():
        if int(name.split(".")[3]) not in (0, 2, 5):  # blocks
            continue
        layer = Layer(table, name)
        for bits in (4, 3, 2):
            for how in ("nearest", "GPTQ"):
                layer.add_rounded(bits, how)
            for pair_bits, how in ((16, "none"), (8, "nearest"), (4, "GPTQ"), (3, "GPTQ")):
                layer.add_pair(matrix_bytes(W, bits), bits, pair_bits, how)


# --- The whole encoder ---------------------------------------------------------------------------

Matrices = tuple[dict[str, Tensor], float]  # the weights by layer, and their bytes


def dense() -> Matrices:
    return minilm.weights(), 4 * minilm.total()


def rounded_model(
    bits: int, how: str, group: int | None = None, weighted: bool = False
) -> Matrices:
    weights = minilm.weights()
    size = sum(matrix_bytes(W, bits, group) for W in weights.values())
    return {
        name: matrix_at(W, covariance(name, weighted), bits, how, group)
        for name, W in weights.items()
    }, size


def pairs_model(bits: int, how: str, kept: float) -> Matrices:
    """Pairs by the weighted metric that keep so large a share of the weights, at its own ranks."""
    products, size = {}, 0
    for name, rank in minilm.ranks_of("weighted metric", "ours", kept).items():
        W, C = minilm.weights()[name], covariance(name, weighted=True)
        if rank is None:
            products[name] = matrix_at(W, C, bits, how)
            size += matrix_bytes(W, bits)
        else:
            A, B, _ = minilm.factors("weighted metric")[name]
            A, B = pair_at(A[:, :rank], B[:rank], C, bits, how)
            products[name] = A @ B
            size += matrix_bytes(A, bits) + matrix_bytes(B, bits)
    return products, size


def mended_model(bits: int, rank: int) -> Matrices:
    """GPTQ, and for each layer's error a pair in the loss metric, in 16 bits."""
    Q, size = rounded_model(bits, "GPTQ")
    weights = minilm.weights()
    both = {name: mended(W, Q[name], name, "loss metric", rank) for name, W in weights.items()}
    return both, size + 2 * sum(rank * sum(W.shape) for W in weights.values())


def encoder_with(matrices: dict[str, Tensor], weighted: bool) -> nn.Module:
    """A copy of MiniLM; the biases make up for the mean of what its weights lose."""
    model, statistics = copy.deepcopy(minilm.dense()), minilm.statistics(0, weighted)
    with torch.no_grad():
        for name, Q in matrices.items():
            layer = model.get_submodule(name)
            layer.bias += (minilm.weights()[name] - Q) @ statistics[name].mean
            layer.weight.copy_(Q)
    return model


def searched(model: Callable, count: int) -> dict[str, str]:
    """At which place each query finds its definition, in an index of its own and the dense one."""
    columns = ("text", "definition")
    dense_queries, dense = (minilm.original_embeddings("test", c, count) for c in columns)
    queries, own = (minilm.encode(model, minilm.sentences("test", c)[:count]) for c in columns)
    row = {"cosine": f"{(queries * dense_queries).sum(1).mean().item():.4f}"}
    for index, documents in (("", own), (", dense index", dense)):
        scores = queries @ documents.T
        places = (scores >= scores.diagonal()[:, None]).sum(1)
        row[f"MRR{index} (%)"] = f"{(100 / places).mean().item():.3f}"
        row[f"places{index}"] = " ".join(map(str, places.tolist()))
    return row


def retrieval(out: Path, count: int = 500) -> None:
    """Whole encoders: so many queries of the test part among as many definitions."""
    table = Table(out / "quantized_minilm.csv", MINILM, key=MINILM[:3])

    def add(method: str, bits: int, make: Callable, *how: Any, weighted: bool = False) -> None:
        def measure() -> dict[str, Any]:
            matrices, size = make(*how)
            return {"bytes": round(size)} | searched(encoder_with(matrices, weighted), count)

        table.add({"method": method, "bits": bits, "queries": count}, measure)

    def add_pairs(bits: int, how: str, kept: float) -> None:
        method = f"low rank, {100 * kept:.0f} % of the weights"
        add(method, bits, pairs_model, bits, how, kept, weighted=True)

    for bits in (4, 3):
        for how in ("GPTQ", "AWQ"):
            add(f"{how}, groups of 128", bits, rounded_model, bits, how, 128)
    add("dense", 32, dense)
    add_pairs(4, "GPTQ", 0.5)
    add_pairs(4, "GPTQ", 0.75)
    add("GPTQ, groups of 32", 3, rounded_model, 3, "GPTQ", 32)
    add("GPTQ, groups of 128", 2, rounded_model, 2, "GPTQ", 128)
    add_pairs(8, "nearest", 0.5)
    for bits in (2, 3, 4):
        add("GPTQ", bits, rounded_model, bits, "GPTQ")
    add("nearest, groups of 128", 4, rounded_model, 4, "nearest", 128)
    add("nearest, groups of 128", 3, rounded_model, 3, "nearest", 128)
    for bits in (8, 4):
        if importlib.util.find_spec("torchao"):
            add("torchao", bits, torchao_model, bits)
    add("nearest", 8, rounded_model, 8, "nearest")
    add("GPTQ, weighted rows", 2, rounded_model, 2, "GPTQ", None, True, weighted=True)
    add("GPTQ + loss metric of rank 4", 3, mended_model, 3, 4)
    add("GPTQ, groups of 32", 4, rounded_model, 4, "GPTQ", 32)
    add("GPTQ, groups of 32", 2, rounded_model, 2, "GPTQ", 32)
    add_pairs(16, "none", 0.5)
    add_pairs(8, "nearest", 0.75)


def torchao_model(bits: int) -> Matrices:
    """Weight-only, as torchao does it: 8 bits by rows, or 4 bits in groups of 32."""
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    config = Int8WeightOnlyConfig()
    if bits == 4:
        config = IntxWeightOnlyConfig(torch.int4, PerGroup(32))
    matrices = {}
    for name, W in minilm.weights().items():
        layer = nn.Linear(*W.T.shape, bias=False)
        layer.weight = nn.Parameter(W.float())
        holder = nn.Sequential(layer)
        quantize_(holder, config)
        matrices[name] = holder[0].weight.dequantize().detach().double()
    groups = sum(W.numel() // 32 if bits == 4 else len(W) for W in matrices.values())
    return matrices, minilm.total() * bits / 8 + 4 * groups  # a scale of 32 bits for each


# --- MiniLM as files that ONNX Runtime runs ------------------------------------------------------


def shipped(out: Path, count: int = 500) -> None:
    """Dense and at half of the weights; in 32, 8 and 4 bits."""
    table = Table(out / "quantized_shipped.csv", SHIPPED, key=SHIPPED[:3])
    rows = [
        {"model": model, "bits": bits, "queries": count}
        for model in ("dense", "low rank")
        for bits in BITS
    ]
    if all(row in table for row in rows):
        return
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for model, network in (("dense", minilm.dense()), ("low rank", half_of_the_weights())):
            files[model, 32] = Path(folder) / f"{model}.onnx"
            encoder_to_onnx(network, files[model, 32])
            for bits in BITS[1:]:
                files[model, bits] = Path(folder) / f"{model}_{bits}.onnx"
                encoder_in_bits(files[model, 32], files[model, bits], bits)
        encoders = {key: OnnxEncoder(file) for key, file in files.items()}
        times = shipped_times(encoders)

        def measure(key: tuple[str, int]) -> dict[str, Any]:
            seconds = {name: f"{1000 * each[key].median():.3f}" for name, each in times.items()}
            return {
                "bytes": files[key].stat().st_size,
                **seconds,
                **searched(encoders[key], count),
            }

        for row in rows:
            table.add(row, partial(measure, (row["model"], row["bits"])))


BITS = (32, 8, 4)


def half_of_the_weights() -> nn.Module:
    """The pairs of lesson 10: the weighted metric, at its own ranks."""
    return minilm.compressed("weighted metric", minilm.ranks_of("weighted metric", "ours", 0.5))


def shipped_times(encoders: Mapping) -> dict[str, pd.DataFrame]:
    """Seconds of the thread for 1 query and for 64, all models in turn."""
    found = {}
    for count, name in zip((1, 64), SHIPPED[4:6]):
        (batch,) = minilm.batches_of(minilm.sentences("validation")[:count])
        calls = {key: partial(encoder, **batch) for key, encoder in encoders.items()}
        found[name] = nb.measure(calls, blocks=7, seconds=0.05, clock=time.thread_time)
    return found


PARTS = ("shipped", "encoder", "trained", "untrained", "files", "layers")


def main() -> None:
    options = parse(__doc__, PARTS, nb.SEEDS)
    out = options.out
    if options.validate:
        data = nb.validation_split(nb.load_mnist())
        nets = MnistNetworks(data, seed=0)
        record(out / "quantized_validation.csv", choices(nets), nets)
        return
    of_mnist = [part for part in ("untrained", "trained") if part in options.parts]
    data = nb.load_mnist() if of_mnist else None
    for part in of_mnist:
        for seed in options.seeds:
            nets = MnistNetworks(data, seed)
            runs = untrained(nets) if part == "untrained" else trained(nets, out)
            record(out / "quantized_mnist.csv", runs, nets)
    others = {"shipped": shipped, "encoder": retrieval, "files": files, "layers": layers}
    for name in options.parts:
        if name in others:
            others[name](out)


if __name__ == "__main__":
    main()
