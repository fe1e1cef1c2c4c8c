"""Fewer bits and fewer ranks at equal bytes, behind lesson 11: results/quantized_*.csv.

    python -m experiments.quantization [--parts shipped encoder trained untrained layers]
        [--seeds 0 1 2 3 4] [--validate] [--out FOLDER]

``shipped``: MiniLM as six files that ONNX Runtime runs, with their times (quantized_shipped.csv).
``encoder``: its 36 linear layers by more quantizers, without files (quantized_minilm.csv); the
rows of torchao need ``pip install torchao==0.18.0`` and are left out without it. Both hold at
which of 2,000 places each of 2,000 queries found its definition. ``layers``: six of these
layers one by one, and a pair for the error of 2 bits (quantized_layers.csv).

``untrained`` and ``trained``: the MNIST network (quantized_mnist.csv). Training also writes that
of seed 0 in 3 bits as checkpoints/tiny.lrq beside the folder of the tables, for
examples/tiny_digit.py. ``--validate`` tries the settings of its training with networks trained on
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
LAYERS = ["layer", "method", "bits", "bytes", "output error (%)"]
SCORES = ["MRR (%)", "MRR, dense index (%)", "places", "places, dense index"]
MINILM = ["method", "bits", "bytes", "cosine", "MRR (%)", "places"]
SHIPPED = ["model", "bits", "bytes", "cosine", "1 query (ms)", "64 queries (ms)", *SCORES]

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

    At 16 and 32 bits there are no steps, and every parameter takes as many bits.
    """
    if bits >= 16:
        return lrf.count_parameters(model) * bits // 8
    size = 0
    for layer in linear_layers(model).values():
        size += -(-layer.weight.numel() * bits // 8)
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
    """Bits alone, ranks alone, and both."""
    plain = [("none", 32), ("nearest", 8)]
    few = [(how, bits) for bits in (4, 3, 2) for how in ("nearest", "GPTQ")]
    for how, bits in plain + few:
        yield "dense", how, bits, partial(in_bits, nets, None, how, bits)
    for ratio in (2, 4, 6, 8, 12):
        for how, bits in [*plain, ("GPTQ", 4)]:
            yield f"low rank, {ratio}x", how, bits, partial(in_bits, nets, ratio, how, bits)


# At 12.3 kB or just below, by bits: the ranks of fc1 and fc2, or the widths of a dense network.
AT_12_KB: dict[int, tuple[dict[str, int], tuple[int, ...]]] = {
    3: (MLP_8X, (784, 32, 127, 10)),
    2: ({"fc1": 33, "fc2": 17}, (784, 49, 127, 10)),
    4: ({"fc1": 16, "fc2": 8}, (784, 24, 127, 10)),
}
EPOCHS = {"narrower dense": 13, "low rank": 10}  # the pairs' dense network had three before
RATES = (5e-4, 1e-3, 2e-3, 5e-3, 1e-2)  # peaks, compared with --validate
BEST_RATE = dict.fromkeys(itertools.product(EPOCHS, AT_12_KB), 5e-3) | {("low rank", 2): 1e-3}


def train_rounded(
    nets: MnistNetworks, kind: str, bits: int, rate: float, file: Path | None = None
) -> nn.Module:
    """A network trained through the rounding: pairs, or what they compete with."""
    ranks, widths = AT_12_KB[bits]
    model = nets.by_loss(ranks) if kind == "low rank" else nets.narrow(widths)
    nets.fit(with_rounding(model, bits), EPOCHS[kind], rate)
    if file:
        save(model, bits, file)
    return model


def trained(nets: MnistNetworks, out: Path) -> Runs:
    for bits, kind in itertools.product(AT_12_KB, EPOCHS):
        written = (kind, bits, nets.seed) == ("low rank", 3, 0)
        file = out.parent / "checkpoints" / "tiny.lrq" if written else None
        make = partial(train_rounded, nets, kind, bits, BEST_RATE[kind, bits], file)
        yield f"{kind}, 12 kB", "trained", bits, make


def choices(nets: MnistNetworks) -> Runs:
    """The rates above."""
    for bits, kind, rate in itertools.product(AT_12_KB, EPOCHS, RATES):
        make = partial(train_rounded, nets, kind, bits, rate)
        yield f"{kind}, 12 kB, rate {rate}", "trained", bits, make


def measure(bits: int, make: Callable, data: nb.Dataset) -> dict[str, Any]:
    model = make()
    accuracy = 100 * lrf.accuracy(model, data.x_test, data.y_test)
    return {
        "parameters": lrf.count_parameters(model),
        "bytes": size_in_bytes(model, bits),
        "accuracy (%)": f"{accuracy:.2f}",
    }


def record(path: Path, runs: Runs, nets: MnistNetworks) -> None:
    table = Table(path, MNIST, key=MNIST[:4])
    for method, how, bits, make in runs:
        row = {"method": method, "rounding": how, "bits": bits, "seed": nets.seed}
        table.add(row, partial(measure, bits, make, nets.data))


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
    return W.numel() * bits / 8 + 3 * groups


def pair_at(A: Tensor, B: Tensor, C: Tensor, bits: int, how: str) -> tuple[Tensor, Tensor]:
    """Both factors rounded, ``A`` for what the rounded ``B`` gives it."""
    B = matrix_at(B, C, bits, how)
    return matrix_at(A, damped(B @ C @ B.T, 1e-4), bits, how), B


def covariance(name: str, weighted: bool = False) -> Tensor:
    return minilm.statistics(0, weighted)[name].covariance(centered=True, ridge=True)


def mended(W: Tensor, Q: Tensor, name: str, rank: int) -> Tensor:
    """Q + AB, with AB the best of its rank for the outputs, and in 16 bits."""
    statistics = dataclasses.replace(minilm.statistics(0)[name], gradient_sum=None)
    holder = nn.Linear(*W.T.shape).double()
    with torch.no_grad():
        holder.weight.copy_(W - Q)
    down, up = lrf.factorize_layer(holder, rank, statistics)
    return Q + (up.weight @ down.weight).detach().half().double()


def layers(out: Path) -> None:
    """The layers of block 2 by GPTQ, and what a pair for its error adds."""
    table = Table(out / "quantized_layers.csv", LAYERS, key=LAYERS[:3])

    def add(name: str, W: Tensor, bits: int, rank: int) -> None:
        def measure() -> dict[str, Any]:
            C = covariance(name)
            Q = matrix_at(W, C, bits, "GPTQ")
            Q = mended(W, Q, name, rank) if rank else Q
            size = matrix_bytes(W, bits) + 2 * rank * sum(W.shape)
            error = 100 * (output_error(W - Q, C) / output_error(W, C)).item()
            return {"bytes": round(size), "output error (%)": f"{error:.4f}"}

        method = f"GPTQ + response PCA of rank {rank}" if rank else "GPTQ"
        table.add({"layer": name, "method": method, "bits": bits}, measure)

    for name, W in minilm.weights().items():
        if ".layer.2." in name:
            for bits, rank in ((3, 0), (2, 0), (2, 32)):
                add(name, W, bits, rank)


# --- The whole encoder ---------------------------------------------------------------------------

Matrices = tuple[dict[str, Tensor], float]  # the weights by layer, and their bytes


def dense() -> Matrices:
    return minilm.weights(), 4 * minilm.total()


def rounded_model(bits: int, how: str, group: int) -> Matrices:
    weights = minilm.weights()
    size = sum(matrix_bytes(W, bits, group) for W in weights.values())
    return {
        name: matrix_at(W, covariance(name), bits, how, group) for name, W in weights.items()
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


def encoder_with(matrices: dict[str, Tensor], weighted: bool) -> nn.Module:
    """A copy of MiniLM; the biases make up for the mean of what its weights lose."""
    model, statistics = copy.deepcopy(minilm.dense()), minilm.statistics(0, weighted)
    with torch.no_grad():
        for name, Q in matrices.items():
            layer = model.get_submodule(name)
            layer.bias += (minilm.weights()[name] - Q) @ statistics[name].mean
            layer.weight.copy_(Q)
    return model


def searched(model: Callable) -> dict[str, str]:
    """At which place each query finds its definition, in an index of its own and the dense one."""
    columns = ("text", "definition")
    dense_queries, dense = (minilm.original_embeddings("test", c, 2000) for c in columns)
    queries, own = (minilm.encode(model, minilm.sentences("test", c)) for c in columns)
    row = {"cosine": f"{(queries * dense_queries).sum(1).mean().item():.4f}"}
    for index, documents in (("", own), (", dense index", dense)):
        scores = queries @ documents.T
        places = (scores >= scores.diagonal()[:, None]).sum(1)
        row[f"MRR{index} (%)"] = f"{(100 / places).mean().item():.3f}"
        row[f"places{index}"] = " ".join(map(str, places.tolist()))
    return row


def encoders(out: Path) -> None:
    """Whole encoders, by all quantizers."""
    table = Table(out / "quantized_minilm.csv", MINILM, key=MINILM[:2])

    def add(method: str, bits: int, make: Callable, *how: Any, weighted: bool = False) -> None:
        def measure() -> dict[str, Any]:
            matrices, size = make(*how)
            return {"bytes": round(size)} | searched(encoder_with(matrices, weighted))

        table.add({"method": method, "bits": bits}, measure)

    def add_rounded(bits: int, how: str, group: int) -> None:
        add(f"{how}, groups of {group}", bits, rounded_model, bits, how, group)

    def add_pairs(bits: int, how: str, kept: float) -> None:
        method = f"low rank, {100 * kept:.0f} % of weights"
        add(method, bits, pairs_model, bits, how, kept, weighted=True)

    add("dense", 32, dense)
    for bits in (4, 3, 2):
        add_rounded(bits, "GPTQ", 128)
    for bits, how, kept in ((4, "GPTQ", 0.5), (4, "GPTQ", 0.75), (8, "nearest", 0.5)):
        add_pairs(bits, how, kept)
    for bits in (8, 4):
        if importlib.util.find_spec("torchao"):
            add("torchao", bits, torchao_model, bits)
    others = (("GPTQ", 32), ("AWQ", 128), ("nearest", 128))
    for bits, (how, group) in itertools.product((4, 3), others):
        add_rounded(bits, how, group)


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


def shipped(out: Path) -> None:
    """Dense and at half of the weights; in 32, 8 and 4 bits."""
    table = Table(out / "quantized_shipped.csv", SHIPPED, key=SHIPPED[:2])
    models = ("dense", "pairs")
    rows = [{"model": model, "bits": bits} for model in models for bits in BITS]
    if all(row in table for row in rows):
        return
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for model, network in (("dense", minilm.dense()), ("pairs", half_of_the_weights())):
            files[model, 32] = Path(folder) / f"{model}.onnx"
            encoder_to_onnx(network, files[model, 32])
            for bits in BITS[1:]:
                files[model, bits] = Path(folder) / f"{model}_{bits}.onnx"
                encoder_in_bits(files[model, 32], files[model, bits], bits)
        programs = {key: OnnxEncoder(file) for key, file in files.items()}
        times = shipped_times(programs)

        def measure(key: tuple[str, int]) -> dict[str, Any]:
            seconds = {name: f"{1000 * each[key].median():.3f}" for name, each in times.items()}
            size = {"bytes": files[key].stat().st_size}
            return size | seconds | searched(programs[key])

        for row in rows:
            table.add(row, partial(measure, (row["model"], row["bits"])))


BITS = (32, 8, 4)


def half_of_the_weights() -> nn.Module:
    """The pairs of lesson 10: the weighted metric, at its own ranks."""
    return minilm.compressed("weighted metric", minilm.ranks_of("weighted metric", "ours", 0.5))


def shipped_times(programs: Mapping) -> dict[str, pd.DataFrame]:
    """Seconds of the thread for 1 query and for 64, all models in turn."""
    found = {}
    for count, name in zip((1, 64), SHIPPED[4:6]):
        (batch,) = minilm.batches_of(minilm.sentences("validation")[:count])
        calls = {key: partial(program, **batch) for key, program in programs.items()}
        found[name] = nb.measure(calls, blocks=7, seconds=0.05, clock=time.thread_time)
    return found


PARTS = ("shipped", "encoder", "trained", "untrained", "layers")


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
    others = {"shipped": shipped, "encoder": encoders, "layers": layers}
    for name in options.parts:
        if name in others:
            others[name](out)


if __name__ == "__main__":
    main()
