"""Fewer bits and fewer ranks, by equal bytes: the tables and the tiny file behind lesson 11.

    python -m scripts.quantize [--parts untrained trained minilm layers file] [--seeds 0 1 2 3 4]
    python -m scripts.quantize --validate

Writes results/quantized_mnist.csv, results/quantized_minilm.csv, results/quantized_layers.csv and checkpoints/tiny.lrq.
Each row is written as soon as it is measured; rows that are in the file already are skipped. ``--validate`` tries the
settings of the MNIST network with networks trained on the first 50,000 training images, on the other 10,000, and writes
results/quantized_validation.csv; the test images only measure.
"""

import argparse
import copy
import csv
import dataclasses
import functools
import gzip
import struct
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrize

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import lrf_utils as lrf
import notebook_utils as nb
from scripts import recover

MNIST = ["method", "rounding", "bits", "seed", "parameters", "bytes", "accuracy (%)"]
LAYERS = ["layer", "method", "bits", "bytes", "output error (%)"]
LAYERS += ["first twelfth, weight (%)", "first twelfth, output (%)"]
FILES = ["method", "bits", "seed", "bytes", "accuracy (%)"]
MINILM = ["method", "bits", "bytes", "MRR (%)", "cosine"]


# --- Rounding, by itself and by GPTQ ---------------------------------------------------------------------------------


def rounded(W, step, bits):
    """Each number at the nearest of 2^bits levels: …, -1½, -½, ½, 1½, … times its row's step."""
    half = 2 ** (bits - 1)
    return ((W / step).floor().clamp(-half, half - 1) + 0.5) * step


def best_step(W, bits, importance=None, tries=80):
    """For each row, of the steps that clip the largest number by less and less, the one of the least squared error.

    ``importance`` weights the columns' errors by the mean squares of their inputs: else a large weight may be clipped
    on which all depends.
    """
    shares = torch.linspace(1, 0.2, tries).to(W)[:, None, None]
    steps = (shares * W.abs().amax(1, keepdim=True) / 2 ** (bits - 1)).clamp(min=1e-7).half().to(W)
    importance = torch.ones(W.shape[1]).to(W) if importance is None else importance
    left = torch.stack([(rounded(W, step, bits) - W).square() @ importance for step in steps])
    return steps[left.argmin(0), torch.arange(len(W))]


def gptq(W, C, bits, step=None, to=rounded):
    """Round column by column; what a column loses, the columns to its right make up for, as far as inputs let them.

    C is the covariance of the inputs. The steps are those of plain rounding, and so are the levels: ``to``.

    Source: Frantar, Ashkboos, Hoefler & Alistarh (2023), arXiv:2210.17323, without blocks.
    """
    step = best_step(W, bits) if step is None else step
    R = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(C)), upper=True)
    W, Q = W.clone(), torch.empty_like(W)
    for j in range(W.shape[1]):
        Q[:, j] = to(W[:, j : j + 1], step, bits)[:, 0]
        error = (W[:, j] - Q[:, j]) / R[j, j]
        W[:, j + 1 :] -= torch.outer(error, R[j, j + 1 :])
    return Q


def damped(C, share=0.01):
    return C + share * C.diagonal().mean() * torch.eye(len(C), dtype=C.dtype)


def pack(codes, bits):
    """Whole numbers below 2^bits as bytes, without gaps."""
    ones = codes.flatten()[:, None] >> torch.arange(bits) & 1
    return np.packbits(ones.flatten().numpy().astype("u1"), bitorder="little").tobytes()


def save(model, bits, path):
    """One file of packed codes; of each row a step, of each layer its bias in 16 bits. scripts/tiny_digit.py reads it.

    The model's weights must be rounded already; ``Rounded`` knows the steps.
    """
    shapes, body = b"", b""
    for layer in linear_layers(model).values():
        step = layer.parametrizations.weight[0].step(layer.parametrizations.weight.original)
        codes = (layer.weight / step + 2 ** (bits - 1) - 0.5).round().long()
        halves = [step.flatten()] + ([] if layer.bias is None else [layer.bias])
        shapes += struct.pack("<HH?", *layer.weight.shape, layer.bias is not None)
        body += b"".join(h.detach().half().numpy().tobytes() for h in halves) + pack(codes, bits)
    data = bytes([bits, len(linear_layers(model))]) + shapes + body
    path.write_bytes(b"LRQ1" + struct.pack("<I", zlib.crc32(data)) + data)


def size_in_bytes(model, bits):
    """Packed codes; a step for each row and the biases in 16 bits. For 16 and 32 bits, as many for each number."""
    if bits >= 16:
        return lrf.count_parameters(model) * bits // 8
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    codes = sum(-(-layer.weight.numel() * bits // 8) for layer in layers)
    biases = sum(len(layer.bias) for layer in layers if layer.bias is not None)
    return codes + 2 * sum(layer.out_features for layer in layers) + 2 * biases


# --- The MNIST network -----------------------------------------------------------------------------------------------


def linear_layers(model):
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}


def half_precision(model):
    """A copy whose numbers are those that 16 bits can hold."""
    return copy.deepcopy(model).half().float()


@torch.no_grad()
def quantized(model, bits, x=None):
    """A copy with every weight rounded; with inputs x by GPTQ, layer after layer on what the rounded ones give it."""
    model = half_precision(model)
    for layer in linear_layers(model).values():
        W = layer.weight.double()
        if x is None:
            Q = rounded(W, best_step(W, bits), bits)
        else:
            seen = []
            with layer.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].double())):
                model(x)
            Q = gptq(W, damped(seen[0].T @ seen[0] / len(x)), bits)
        layer.weight.copy_(Q)
    return model


class Rounded(nn.Module):
    """Weights are used rounded; the gradient passes as if they were not (straight through).

    Steps stay a fixed share of their row's root mean square: the share that is best for the weights at the start.
    """

    def __init__(self, W, bits):
        super().__init__()
        self.bits, self.share = bits, best_step(W, bits) / W.square().mean(1, keepdim=True).sqrt()

    def step(self, W):
        return (self.share * W.detach().square().mean(1, keepdim=True).sqrt()).half().to(W)

    def forward(self, W):
        step = self.step(W)
        half = 2 ** (self.bits - 1)
        inside = (W / step).clamp(-half, half - 0.01)
        return (inside + (inside.floor() + 0.5 - inside).detach()) * step


def trained(model, bits, epochs, seed, lr=recover.RATE):
    """``recover.fit`` with every weight rounded all along. The model keeps its ``Rounded``."""
    for layer in linear_layers(model).values():
        parametrize.register_parametrization(layer, "weight", Rounded(layer.weight.detach(), bits))
    return recover.fit(model, epochs, seed, lr)


RATIOS = (2, 4, 6, 8, 12)  # of the dense network's weights to the pairs'


@functools.cache
def known(seed):
    """The dense network of a seed, its calibration statistics in the loss metric, and what each rank costs."""
    model = recover.dense_model("mlp", seed)
    statistics = lrf.collect(model, recover.CALIBRATION, temperature=2)
    return model, statistics, lrf.options(model, statistics)


def low_rank(seed, ratio):
    """At the ranks that lose least, without training."""
    model, statistics, table = known(seed)
    weights = sum(layer.weight.numel() for layer in linear_layers(model).values())
    return lrf.factorize(model, lrf.allocate(table, weights / ratio), statistics)


def rounding(model, bits, how):
    if how == "none":
        return model if bits == 32 else half_precision(model)
    return quantized(model, bits, recover.CALIBRATION if how == "GPTQ" else None)


def pruned(seed, share):
    """The largest weights in 8 bits; where they are takes one bit for each weight, kept or not."""
    model = copy.deepcopy(recover.dense_model("mlp", seed))
    weights = torch.cat([layer.weight.flatten().abs() for layer in linear_layers(model).values()])
    threshold = weights.quantile(1 - share) if len(weights) < 2**24 else None
    kept = {name: layer.weight.abs() >= threshold for name, layer in linear_layers(model).items()}
    rounded_model = quantized(model, 8)
    with torch.no_grad():
        for name, layer in linear_layers(rounded_model).items():
            layer.weight.mul_(kept[name])
    count = sum(int(mask.sum()) for mask in kept.values())
    missing = len(weights) - count
    return rounded_model, size_in_bytes(rounded_model, 8) - missing + -(-len(weights) // 8), count


def untrained(record, seed):
    """Bits alone, ranks alone, both; and pruning."""
    dense = recover.dense_model("mlp", seed)
    ways = ("none", 32), ("nearest", 8)
    for how, bits in (*ways, *((how, bits) for bits in (4, 3, 2) for how in ("nearest", "GPTQ"))):
        record(("dense", how, bits), lambda h=how, b=bits: rounding(dense, b, h))
    for ratio in (*RATIOS, 7.7):
        pair = low_rank(seed, ratio)
        for how, bits in (*ways, ("GPTQ", 4)):
            record((f"low rank, {ratio}x", how, bits), lambda p=pair, h=how, b=bits: rounding(p, b, h))
    model, size, count = pruned(seed, 0.3)
    record(("pruned to 30 %", "nearest", 8), lambda: model, size=size, count=count)


PAIRS = {"8x": recover.MLP_8X, "12x": recover.MLP_12X}
TRAINED = (  # method, bits, epochs, peak of the rate; chosen with --validate
    ("low rank, 8x", 3, 10, 5e-3),
    ("low rank, 8x", 2, 5, 2e-3),
    ("narrower dense, 8x", 3, 13, 5e-3),
)
TRIED = (
    *(("low rank, 8x", 2, epochs, rate) for epochs, rate in ((10, 2e-3), (5, 2e-3), (5, 5e-3), (10, 5e-3))),
    *(("narrower dense, 8x", 3, 13, rate) for rate in (5e-3, 1e-2)),
    *(("low rank, 8x", 3, epochs, rate) for epochs, rate in ((10, 5e-3), (5, 5e-3), (5, 2e-3), (10, 2e-3))),
    *(("dense", 2, 10, rate) for rate in (2e-3, 5e-3)),
)
SMALL = ((7.7, "GPTQ", 4), (7.7, "nearest", 4), (5.75, "GPTQ", 3), (12, "nearest", 8))  # about 17 kB


def file_of(method, bits, seed):
    if (method, bits, seed) == ("low rank, 8x", 3, 0):
        return nb.ROOT / "checkpoints" / "tiny.lrq"
    return nb.ROOT / "build" / f"{method.replace(', ', '_').replace(' ', '_')}_{bits}_{seed}.lrq"


def start(method, seed):
    if method == "dense":
        return copy.deepcopy(recover.dense_model("mlp", seed))
    if method.startswith("low rank"):
        return recover.by_loss("mlp", seed, PAIRS[method.split()[-1]])
    return recover.random_start(seed, recover.NARROW[method.split()[-1]])


def trained_row(record, seed, method, bits, epochs, rate, label=""):
    def make():
        model = start(method, seed)
        trained(model, bits, epochs, seed, rate)
        if not label:
            save(model, bits, file_of(method, bits, seed))
        return model

    record((f"{method}, {epochs} epochs{label}", "trained", bits), make)


def with_training(record, seed, which=TRAINED):
    """Training through the rounding, of pairs and of what they compete with."""
    for method, bits, epochs, rate in which:
        trained_row(record, seed, method, bits, epochs, rate)


def choices(record, seed):
    """The settings above among others. ``recover.data`` holds validation images in place of the test images."""
    for ratio, how, bits in SMALL:
        pair = low_rank(seed, ratio)
        record((f"low rank, {ratio}x", how, bits), lambda p=pair, h=how, b=bits: rounding(p, b, h))
    if seed == 0:
        for method, bits, epochs, rate in TRIED:
            trained_row(record, seed, method, bits, epochs, rate, f", rate {rate}")


def recorder(path, columns):
    """A function that appends a row, unless the file has one with the same first fields."""
    if not path.exists():
        with path.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(columns)

    def record(key, measure):
        key = [str(part) for part in key]
        with path.open(newline="") as file:
            if any(row[: len(key)] == key for row in csv.reader(file)):
                return
        began = time.process_time()
        row = [*key, *measure()]
        with path.open("a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(row)
        print(", ".join(map(str, row)), f"({time.process_time() - began:.0f} s)", flush=True)

    return record


def mnist_recorder(path, seed):
    append = recorder(path, MNIST)

    def record(key, make, size=None, count=None):
        method, how, bits = key

        def measure():
            model = make()
            accuracy = 100 * lrf.accuracy(model, recover.data.x_test, recover.data.y_test)
            return count or lrf.count_parameters(model), size or size_in_bytes(model, bits), f"{accuracy:.2f}"

        append((method, how, bits, seed), measure)

    return record


# --- A transformer: the 36 linear layers of MiniLM -------------------------------------------------------------------


def minilm():
    """The script of lesson 10, which loads the model when it is imported."""
    from scripts import compress_minilm

    return compress_minilm


def covariance(name, weighted=False):
    return minilm().statistics(0, weighted)[name].covariance(centred=True, ridge=True)


def output_error(E, C):
    """E‖E x‖² for inputs x of that covariance, about their mean."""
    return ((E @ C) * E).sum().item()


def rounded_to(W, grid, bits):
    """The nearest of 2^bits levels. The grid is each row's step and its zero point, the place of 0 among the levels."""
    step, zero = grid
    return ((W / step + zero).round().clamp(0, 2**bits - 1) - zero) * step


def best_grid(W, bits, importance, tries=17):
    """For each row the step and the zero point of the least squared error, weighted as by ``best_step``.

    Of three zero points: with one, 0 is between two levels, as in ``rounded``; with the others it is a level, and there
    is one level more below it or above. A row of small weights and a few that are 30 times as large, as MiniLM has,
    needs a level at 0. Else each small weight becomes half a step, which may be several times the weight.
    """
    half, largest = 2 ** (bits - 1), W.abs().amax(1, keepdim=True)
    steps = [(share * largest / half).clamp(min=1e-7).half().to(W) for share in torch.linspace(1, 0.2, tries)]
    grids = [(step, torch.full_like(step, zero)) for zero in (half - 0.5, half, half - 1) for step in steps]
    best = torch.stack([(rounded_to(W, grid, bits) - W).square() @ importance for grid in grids]).argmin(0)
    rows = torch.arange(len(W))
    return tuple(torch.stack(parts)[best, rows] for parts in zip(*grids))


def matrix_at(W, C, bits, how):
    if bits == 16:
        return W.half().to(W)
    V, K = W.float(), C.float()
    grid = best_grid(V, bits, K.diagonal())
    if how == "nearest":
        return rounded_to(V, grid, bits).to(W)
    order = K.diagonal().argsort(descending=True)  # what matters most first: the columns after it can make up for it
    Q = gptq(V[:, order], damped(K)[order][:, order], bits, grid, rounded_to)
    return Q[:, order.argsort()].to(W)


def matrix_bytes(W, bits):
    """Packed codes, and for each row a step in 16 bits and a zero point in 8."""
    return W.numel() * bits / 8 + (3 * len(W) if bits < 16 else 0)


def pair_at(A, B, C, bits, how):
    """Both factors rounded, the second for what the rounded first gives it."""
    B = matrix_at(B, C, bits, how)
    C = B @ C @ B.T
    return matrix_at(A, C + 1e-4 * C.diagonal().mean() * torch.eye(len(C)).to(C), bits, how), B


def layer_of(E):
    """A layer that holds E, for lrf.factorize_layer."""
    layer = nn.Linear(E.shape[1], E.shape[0])
    with torch.no_grad():
        layer.weight.copy_(E)
    return layer.double()


def share_of_first(E):
    """What the first twelfth of the ranks holds of the squared error."""
    squares = torch.linalg.svdvals(E).square()
    return (squares[: len(squares) // 12].sum() / squares.sum()).item()


def layers(_):
    """Layer by layer, at equal bytes: rounding, GPTQ, pairs; what mends the error, and where the error sits."""
    record = recorder(nb.ROOT / "results" / "quantized_layers.csv", LAYERS)
    for name, W in minilm().WEIGHTS.items():
        if int(name.split(".")[3]) not in (0, 2, 5):
            continue
        C = covariance(name)
        L = torch.linalg.cholesky(C)
        whole = output_error(W, C)
        _, S, Vh = torch.linalg.svd(W @ L, full_matrices=False)
        V = torch.linalg.solve(L, Vh, left=False)  # W @ L @ Vh.T @ V is W

        def add(method, bits, Q, size, spread=False, W=W, C=C, L=L, whole=whole, name=name):
            def measure():
                E = W - Q()
                shares = [f"{100 * share_of_first(e):.2f}" if spread else "" for e in (E, E @ L)]
                return round(size), f"{100 * output_error(E, C) / whole:.4f}", *shares

            record((name, method, bits), measure)

        for bits in (4, 3, 2):
            size = matrix_bytes(W, bits)
            for how in ("nearest", "GPTQ"):
                Q = functools.cache(lambda how=how, bits=bits, W=W, C=C: matrix_at(W, C, bits, how))
                add(how, bits, Q, size, spread=True)
                for space in ("SVD", "response PCA") if bits == 2 and ".layer.2." in name else ():
                    branch = size + 2 * 32 * sum(W.shape)
                    make = functools.partial(mended, W, name=name, space=space, rank=32)
                    add(f"{how} + {space} of rank 32", bits, lambda Q=Q, make=make: make(Q()), branch)
            for how, b in (("none", 16), ("nearest", 8), ("GPTQ", 4), ("GPTQ", 3)):
                rank = int((size - 3 * len(W) * (b < 16)) / (sum(W.shape) * b / 8 + 3 * (b < 16)))
                if 0 < rank <= min(W.shape):
                    A, B = W @ L @ Vh[:rank].T / S[:rank].sqrt(), S[:rank, None].sqrt() * V[:rank]

                    def product(A=A, B=B, C=C, b=b, how=how):
                        A, B = pair_at(A, B, C, b, how)
                        return A @ B

                    add(f"low rank in {b} bits", bits, product, matrix_bytes(A, b) + matrix_bytes(B, b))


def mended(W, Q, name, space, rank):
    """Q + AB, with AB the best for the weight, or for the outputs in the layer's loss metric or without."""
    statistics = None if space == "SVD" else minilm().statistics(0)[name]
    if space == "response PCA":
        statistics = dataclasses.replace(statistics, gradient_sum=None)
    pair = lrf.factorize_layer(layer_of(W - Q), rank, statistics)
    return Q + pair.weight.detach().half().double()


def whole_model(matrices, weighted=False):
    """A copy of MiniLM with these weights; the biases make up for the mean of what is lost."""
    model = copy.deepcopy(minilm().dense)
    with torch.no_grad():
        for name, Q in matrices.items():
            layer, W = model.get_submodule(name), minilm().WEIGHTS[name]
            layer.bias += (W - Q) @ minilm().statistics(0, weighted)[name].mean
            layer.weight.copy_(Q)
    return model


def retrieval(_):
    """Whole models: 500 queries of the test part among 500 definitions."""
    record = recorder(nb.ROOT / "results" / "quantized_minilm.csv", MINILM)
    weights, metric = minilm().WEIGHTS, "weighted metric"

    def plain(how, bits, weighted=False):
        size = sum(matrix_bytes(W, bits) for W in weights.values())
        return {n: matrix_at(W, covariance(n, weighted), bits, how) for n, W in weights.items()}, size

    def pairs(kept, bits, how):
        products, size = {}, 0
        for name, rank in minilm().ranks_of(metric, "own", kept).items():
            C = covariance(name, weighted=True)
            if rank is None:
                products[name] = matrix_at(weights[name], C, bits, how)
                size += matrix_bytes(weights[name], bits)
            else:
                A, B, _ = minilm().factors(metric)[name]
                A, B = pair_at(A[:, :rank], B[:rank], C, bits, how)
                products[name], size = A @ B, size + matrix_bytes(A, bits) + matrix_bytes(B, bits)
        return products, size

    def branch(bits, rank):
        Q, size = plain("GPTQ", bits)
        both = {name: mended(W, Q[name], name, "loss metric", rank) for name, W in weights.items()}
        return both, size + 2 * sum(rank * sum(W.shape) for W in weights.values())

    def add(method, bits, make, weighted=False):
        def measure():
            matrices, size = make()
            ((_, places, cosine),) = minilm().retrieve(whole_model(matrices, weighted), "test", 500)
            with gzip.open(nb.ROOT / "results" / "quantized_places.csv.gz", "at") as file:
                file.write("\t".join([method, str(bits), " ".join(map(str, places.tolist()))]) + "\n")
            return round(size), f"{(100 / places).mean().item():.3f}", f"{cosine:.4f}"

        record((method, bits), measure)

    add("dense", 32, lambda: (weights, 4 * minilm().TOTAL))
    for bits in (3, 4, 2, 8):
        for how in ("GPTQ", "nearest"):
            add(how, bits, lambda how=how, bits=bits: plain(how, bits))
    eight = [(kept, 8, "nearest") for kept in (0.5, 0.25, 0.75)]
    four = [(kept, 4, "GPTQ") for kept in (0.75, 0.5)]
    for kept, bits, how in ((0.5, 16, "none"), *eight, *four):
        method = f"low rank, {100 * kept:.0f} % of the weights"
        add(method, bits, lambda k=kept, b=bits, h=how: pairs(k, b, h), weighted=True)
    add("GPTQ + loss metric of rank 4", 3, lambda: branch(3, 4))
    for bits in (2, 3):  # as the pairs: rows count as their squared gradients
        add("GPTQ, weighted rows", bits, lambda bits=bits: plain("GPTQ", bits, weighted=True), weighted=True)


def files(_):
    """The files that training wrote, as scripts/tiny_digit.py reads them; seed 0's in 3 bits is the committed one."""
    from scripts import tiny_digit

    record = recorder(nb.ROOT / "results" / "quantized_files.csv", FILES)
    pixels = recover.data.x_test.numpy() * nb.PIXEL_STD + nb.PIXEL_MEAN
    for method, bits, _, _ in TRAINED:
        for seed in nb.SEEDS:
            path = file_of(method, bits, seed)

            def measure(path=path):
                found = tiny_digit.classify(pixels, tiny_digit.load(path)).argmax(1)
                return path.stat().st_size, f"{100 * (found == recover.data.y_test.numpy()).mean():.2f}"

            if path.exists():
                record((method, bits, seed), measure)


PARTS = {"untrained": untrained, "trained": with_training, "files": files, "layers": layers, "minilm": retrieval}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--validate", action="store_true", help="measure settings on validation images")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(nb.SEEDS))
    options = parser.parse_args()
    if options.validate:
        x, y = recover.data.x_train, recover.data.y_train
        recover.data = nb.Dataset(x[:50_000], y[:50_000], x[50_000:], y[50_000:])
        for seed in (0, 1):
            choices(mnist_recorder(nb.ROOT / "results" / "quantized_validation.csv", seed), seed)
        return
    for part in options.parts:
        if part in ("files", "layers", "minilm"):
            PARTS[part](None)
            continue
        for seed in options.seeds:
            PARTS[part](mnist_recorder(nb.ROOT / "results" / "quantized_mnist.csv", seed), seed)


if __name__ == "__main__":
    main()
