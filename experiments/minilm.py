"""all-MiniLM-L6-v2 compressed by every method of lesson 10: results/minilm.csv.

    python -m experiments.minilm [--parts untrained table padding trained] [--out FOLDER]
    python -m experiments.minilm --validate

About an hour on one core. Each model gives two rows, for 500 and for 2,000 queries, and two lines
of minilm_places.csv.gz: at which place each query found its definition. ``--validate`` compares
settings on 500 other queries: minilm_validation.csv.
"""

import copy
import csv
import dataclasses
import functools
import gzip
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lrf_utils as lrf
import notebook_utils as nb
from experiments.common import Table, parse
from experiments.models import SentenceEncoder, batches, distil, embed, rounded_table, sketch

KEY = ["method", "ranks", "kept", "draw", "queries"]
COLUMNS = [*KEY, "R@1 (%)", "R@10 (%)", "MRR (%)", "cosine", "cosine, verses"]
CENTERED = ("activations + bias", "loss metric", "weighted metric")  # the mean goes to the bias
STEPS = 300  # of the distillation
STARTS = {"weighted metric": ("own", 3e-4), "plain SVD": ("equal", 1e-3)}  # ranks, best rate
ALL_TEXTS = "0 + 1 + 2"  # all three draws of calibration texts

# The models without training: method, how its ranks are chosen, shares of the weights, draws.
OTHERS = ("plain SVD", "SVD-LLM", "ASVD", "FWSVD", "FWSVD, outputs")
UNTRAINED = (
    ("weighted metric", "own", (0.5, 0.7, 0.9, 0.3, 0.8, 0.6, 0.4), (0,)),
    *((method, "equal", (0.7, 0.5, 0.9, 0.3), (0,)) for method in (*OTHERS, *CENTERED)),
    ("loss metric", "own", (0.7, 0.5, 0.9, 0.3), (0,)),
    ("plain SVD", "own", (0.7, 0.5, 0.9, 0.3), (0,)),  # the paper of FWSVD has no ranks
    ("SVD-LLM", "own", (0.7, 0.5, 0.9, 0.3), (0,)),
    ("ASVD", "own", (0.7, 0.5, 0.9, 0.3), (0,)),
    ("weighted metric", "own", (0.5, 0.7), (1, 2, ALL_TEXTS)),
    ("SVD-LLM", "equal", (0.5, 0.7), (1, 2)),
    ("activations + bias", "output error", (0.7, 0.5), (0,)),
    ("activations + bias", "relative output error", (0.7, 0.5), (0,)),
)

Ranks = Mapping[str, int | None]
# A part yields method, ranks, share of the weights, draw, and a function that makes the model.
Runs = Iterator[tuple[str, str, float, int | str, Callable[[], nn.Module]]]


# --- The model and the texts ---


@functools.cache
def original() -> tuple[SentenceEncoder, Any]:
    bert, tokenizer = nb.load_minilm()
    return SentenceEncoder(bert).eval(), tokenizer


def dense() -> SentenceEncoder:
    return original()[0]


@functools.cache
def weights() -> dict[str, Tensor]:
    """The weights of the linear layers, in float64."""
    return {
        name: dense().get_submodule(name).weight.detach().double()
        for name in lrf.layer_names(dense())
    }


def total() -> int:
    return sum(W.numel() for W in weights().values())


@functools.cache
def sentences(part: str, column: str = "text") -> list[str]:
    """The texts of a part of data/wordnet.tsv.gz, or their definitions."""
    path = nb.ROOT / "data" / "wordnet.tsv.gz"
    data = pd.read_csv(path, sep="\t", quoting=csv.QUOTE_NONE, keep_default_na=False)
    return list(data.loc[data["part"] == part, column])


def encode(model: nn.Module, texts: list[str]) -> Tensor:
    return embed(model, original()[1], texts)


def batches_of(texts: list[str], size: int = 64) -> list[dict[str, Tensor]]:
    return [batch for batch, _ in batches(original()[1], texts, size)]


# --- Statistics ---


def mask_of(batch: dict[str, Tensor]) -> Tensor:
    return batch["attention_mask"]


def several(embeddings: Tensor, generator: torch.Generator, count: int) -> Iterator[Tensor]:
    """``count`` random vectors for each sentence in place of one."""
    for _ in range(count):
        for scalar in sketch(embeddings, generator):
            yield scalar / count**0.5


def collected(
    given: list[dict[str, Tensor]],
    weighted: bool,
    count: int = 1,
    mask_of: Callable[[dict], Tensor] | None = mask_of,
) -> dict[str, lrf.Statistics]:
    loss = partial(several, generator=torch.Generator().manual_seed(0), count=count)
    return lrf.collect_statistics(dense(), given, mask_of=mask_of, loss=loss, weighted=weighted)


@functools.cache
def statistics(draw: int | str, weighted: bool = False) -> dict[str, lrf.Statistics]:
    """Of one draw of calibration texts, or of all three."""
    if draw == ALL_TEXTS:
        first, second, third = (statistics(each, weighted) for each in (0, 1, 2))
        return {name: first[name] + second[name] + third[name] for name in first}
    return collected(batches_of(sentences(f"calibration {draw}")), weighted)


def changed(known: Mapping[str, lrf.Statistics], **fields: Any) -> dict[str, lrf.Statistics]:
    return {name: dataclasses.replace(s, **fields) for name, s in known.items()}


@functools.cache
def mean_sizes() -> dict[str, Tensor]:
    """Of each layer's inputs, the mean absolute value; for ASVD."""
    sums = dict.fromkeys(weights(), 0)

    def add(name: str, layer: nn.Module, args: tuple[Tensor]) -> None:
        sums[name] = sums[name] + args[0][mask].abs().double().sum(0)

    hooks = [
        dense().get_submodule(name).register_forward_pre_hook(partial(add, name)) for name in sums
    ]
    for batch in batches_of(sentences("calibration 0")):
        mask = mask_of(batch).bool()
        with torch.no_grad():
            dense()(**batch)
    for hook in hooks:
        hook.remove()
    return {name: each / statistics(0)[name].rows for name, each in sums.items()}


@functools.cache
def fisher(outputs: bool) -> dict[str, Tensor]:
    """Per input of a weight, or output, the root of its summed squared gradients; for FWSVD."""
    generator = torch.Generator().manual_seed(0)
    sums = dict.fromkeys(weights(), 0)
    parameters = [dense().get_submodule(name).weight for name in sums]
    for batch in batches_of(sentences("calibration 0")[:100], size=1):
        (scalar,) = sketch(dense()(**batch), generator)
        for name, gradient in zip(sums, torch.autograd.grad(scalar, parameters)):
            sums[name] = sums[name] + gradient.double().square().sum(1 if outputs else 0)
    return {name: (s / s.mean()).clamp(min=1e-6).sqrt().diag() for name, s in sums.items()}


# --- Methods: W_r = L⁻¹ [L W R]_r R⁻¹, each with an L and an R of its own ---


def scalings(method: str, name: str, draw: int | str) -> tuple[Tensor | None, Tensor | None]:
    """L and R of one layer; None for the identity."""
    if method == "plain SVD":
        return None, None
    if method == "FWSVD":  # its weights are inputs by outputs: its rows are our columns
        return None, fisher(outputs=False)[name]
    if method == "FWSVD, outputs":
        return fisher(outputs=True)[name], None
    if method == "ASVD":
        return None, mean_sizes()[name].sqrt().diag()
    known = statistics(draw, method == "weighted metric")[name]
    covariance = known.covariance(centered=method in CENTERED, ridge=True)
    left = None
    if method in ("loss metric", "weighted metric"):
        left = torch.linalg.cholesky(damped(known.metric)).T
    return left, torch.linalg.cholesky(covariance)


def damped(G: Tensor, damping: float = 0.1) -> Tensor:
    return G + damping * G.diagonal().mean() * torch.eye(len(G))


@functools.cache
def factors(method: str, draw: int | str = 0) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """For each layer A, B and the squared singular values; A[:, :r] @ B[:r] has rank r."""
    found = {}
    for name, W in weights().items():
        left, right = scalings(method, name, draw)
        scaled = W if right is None else W @ right
        scaled = scaled if left is None else left @ scaled
        U, S, Vh = torch.linalg.svd(scaled, full_matrices=False)
        A, B = U * S.sqrt(), S.sqrt()[:, None] * Vh
        if left is not None:
            A = torch.linalg.solve(left, A)
        if right is not None:
            B = torch.linalg.solve(right, B, left=False)
        found[name] = A, B, S.square()
    return found


def compressed(method: str, ranks: Ranks, draw: int | str = 0) -> nn.Module:
    """A copy of the model with these ranks; None is dense."""
    model = copy.deepcopy(dense())
    for name, rank in ranks.items():
        if rank is None:
            continue
        A, B, _ = factors(method, draw)[name]
        (m, n), layer = weights()[name].shape, dense().get_submodule(name)
        bias = layer.bias.detach().double()
        if method in CENTERED:
            mean = statistics(draw, method == "weighted metric")[name].mean
            bias = bias + (weights()[name] - A[:, :rank] @ B[:rank]) @ mean
        down, up = nn.Linear(n, rank, bias=False), nn.Linear(rank, m)
        down.weight = nn.Parameter(B[:rank].float())
        up.weight = nn.Parameter(A[:, :rank].float())
        up.bias = nn.Parameter(bias.float())
        model.set_submodule(name, lrf.LowRank(down, up))
    return model


# --- Ranks ---


def equal(kept: float) -> dict[str, int]:
    return {name: int(kept * W.numel() / sum(W.shape)) for name, W in weights().items()}


def by_error(method: str, kept: float, draw: int | str, relative: bool = False) -> Ranks:
    """The least sum of what is cut off, as each method counts it, or as a share of each layer."""
    options = {}
    for name, (_, _, squares) in factors(method, draw).items():
        m, n = weights()[name].shape
        left = squares.sum() - squares.cumsum(0)
        if relative:
            left = left / squares.sum()
        options[name] = {None: (m * n, 0.0)}
        for rank in range(1, lrf.break_even_rank(m, n) + 1):
            options[name][rank] = rank * (m + n), left[rank - 1].item()
    return lrf.allocate_ranks(options, kept * total())


def by_group(kept: float) -> Ranks:
    """SVD-LLM V2: layers of one kind lose in proportion to 1 / log(loss at the equal ratio)."""
    groups: dict[str, list[str]] = {}
    for name in weights():
        groups.setdefault(name.split(".", 4)[-1], []).append(name)
    ranks = {}
    for names in groups.values():
        shares = {}
        for name in names:
            squares = factors("SVD-LLM")[name][2] * statistics(0)[name].rows
            shares[name] = 1 / math.log(squares[equal(kept)[name] :].sum().sqrt())
        for name in names:
            shape = weights()[name].shape
            removed = (1 - kept) * len(names) * shares[name] / sum(shares.values())
            rank = int((1 - removed) * math.prod(shape) / sum(shape))
            ranks[name] = max(1, min(rank, *shape))
    return ranks


@functools.cache
def sensitivities() -> dict[tuple[str, int], float]:
    """ASVD's table: for each layer alone at a share of its weights, how far 16 embeddings move."""
    texts, found = sentences("calibration 0")[:16], {}
    known = encode(dense(), texts)
    for name, W in weights().items():
        for share in (0.2, 0.4, 0.6, 0.8):
            rank = max(1, int(share * W.numel() / sum(W.shape)))
            moved = encode(compressed("ASVD", {name: rank}), texts) - known
            found[name, rank] = moved.square().sum(1).mean().item()
    return found


def by_threshold(kept: float) -> Ranks:
    """ASVD: each layer's least rank that moves the embeddings by less than one threshold."""
    for threshold in sorted(sensitivities().values()):
        ranks = dict.fromkeys(weights())
        for (name, rank), moved in sorted(sensitivities().items(), key=lambda item: -item[0][1]):
            if moved <= threshold:
                ranks[name] = rank
        size = 0
        for name, W in weights().items():
            size += W.numel() if ranks[name] is None else ranks[name] * sum(W.shape)
        if size <= kept * total():
            return ranks
    raise ValueError(f"no threshold keeps {kept} of the weights or less")


def ranks_of(method: str, ranks: str, kept: float, draw: int | str = 0) -> Ranks:
    if ranks == "equal":
        return equal(kept)
    if ranks == "own" and method == "ASVD":
        return by_threshold(kept)
    if ranks == "own" and method == "SVD-LLM":
        return by_group(kept)
    return by_error(method, kept, draw, relative=ranks == "relative output error")


def allocated(known: Mapping[str, lrf.Statistics], kept: float = 0.5) -> nn.Module:
    """All by the library: the ranks by predicted loss, and the factors."""
    with warnings.catch_warnings(action="ignore"):  # the embeddings do not count, and stay
        options = lrf.rank_options(dense(), known)
    return lrf.factorize(dense(), lrf.allocate_ranks(options, kept * total()), known)


# --- Training, and the embedding table ---


def distilled(method: str, rate: float, steps: int = STEPS) -> nn.Module:
    """From half of the weights, on training texts in random order."""
    taught, generator, order = lessons(), torch.Generator().manual_seed(0), []
    while len(order) < steps:
        order += torch.randperm(len(taught), generator=generator).tolist()
    # by the library: Adam wants both factors of a pair to have the same size
    known = statistics(0, weighted=True) if method == "weighted metric" else None
    student = lrf.factorize(dense(), ranks_of(method, STARTS[method][0], 0.5), known)
    return distil(student, [taught[i] for i in order[:steps]], rate)


@functools.cache
def lessons() -> list[tuple[dict[str, Tensor], Tensor]]:
    """Batches of the training texts, each with the original's embeddings."""
    with torch.no_grad():
        return [(batch, dense()(**batch)) for batch in batches_of(sentences("training"))]


def with_table(make: Callable[..., Tensor], *args: Any) -> nn.Module:
    model = copy.deepcopy(dense())
    layer = model.bert.embeddings.word_embeddings
    layer.weight = nn.Parameter(make(layer.weight.detach(), *args).float())
    return model


def truncated_table(
    table: Tensor, rank: int, frequency: bool = False, loss: bool = False
) -> Tensor:
    """Best for rows weighted by how often they occur, and in the metric of the loss."""
    E, R, C = table.double(), torch.eye(384).double(), None
    if frequency:
        counts, G = table_statistics()
        C = E.T @ ((counts + 0.1)[:, None] * E)  # a token that calibration lacks may come
        R = torch.linalg.cholesky(G) if loss else R
    C = E.T @ E if C is None else C
    V = torch.linalg.eigh(R.T @ C @ R).eigenvectors[:, -rank:]
    return (E @ R @ V) @ torch.linalg.solve(R.T, V).T


@functools.cache
def table_statistics() -> tuple[Tensor, Tensor]:
    """How often the calibration texts have each token, and the damped metric at the embedding."""
    layer, generator = dense().bert.embeddings.word_embeddings, torch.Generator().manual_seed(0)
    counts, G = torch.zeros(len(layer.weight)).double(), torch.zeros(384, 384).double()
    outputs = []
    hook = layer.register_forward_hook(lambda *call: outputs.append(call[2]))
    for batch in batches_of(sentences("calibration 0")):
        seen = batch["input_ids"][mask_of(batch).bool()]
        counts += torch.bincount(seen, minlength=len(counts))
        (scalar,) = sketch(dense()(**batch), generator)
        g = torch.autograd.grad(scalar, outputs.pop())[0].flatten(0, 1).double()
        G += g.T @ g
    hook.remove()
    return counts, damped(G)


# --- The parts ---


def untrained() -> Runs:
    yield "dense", "", 1.0, 0, dense
    for method, ranks, shares, draws in UNTRAINED:
        for draw in draws:
            for kept in shares:
                yield method, ranks, kept, draw, partial(model_of, method, ranks, kept, draw)


def model_of(method: str, ranks: str, kept: float, draw: int | str) -> nn.Module:
    return compressed(method, ranks_of(method, ranks, kept, draw), draw)


def table() -> Runs:
    """The embedding table, half of the model: fewer bits against a lower rank."""
    for name, kept, make, *settings in (
        ("int8", 0.25, rounded_table, 8),
        ("int4", 0.125, rounded_table, 4),
        ("SVD", 0.25, truncated_table, 94),
        ("SVD, frequency", 0.25, truncated_table, 94, True),
        ("SVD, frequency, loss metric", 0.25, truncated_table, 94, True, True),
        ("SVD", 0.5, truncated_table, 189),
        ("SVD, frequency, loss metric", 0.5, truncated_table, 189, True, True),
    ):
        yield "table of embeddings", name, kept, 0, partial(with_table, make, *settings)


def padding() -> Runs:
    """250 texts, with the padding masked out and with padding to 40 tokens that counts."""
    for method, weighted in (("loss metric", False), ("weighted metric", True)):
        make = partial(of_few_texts, weighted=weighted)
        yield method, "own, 250 texts", 0.5, 0, make
        counts = partial(make, padding_counts=True)
        yield method, "own, 250 texts, padding counts", 0.5, 0, counts
    name = "own, 250 texts, ridge as with padding"
    yield "weighted metric", name, 0.5, 0, with_smaller_ridge


def of_few_texts(weighted: bool, padding_counts: bool = False) -> nn.Module:
    few = batches_of(sentences("calibration 0")[:250])
    if not padding_counts:
        return allocated(collected(few, weighted))
    padded = [{k: F.pad(v, (0, 40 - v.shape[1])) for k, v in batch.items()} for batch in few]
    return allocated(collected(padded, weighted, mask_of=None))


def with_smaller_ridge() -> nn.Module:
    """The ridge falls with the number of rows, and padding makes more of them."""
    few = batches_of(sentences("calibration 0")[:250])
    return allocated(changed(collected(few, weighted=True), rows=40 * 250))


def trained() -> Runs:
    """Distillation, from two starts."""
    for method, (ranks, rate) in STARTS.items():
        yield method, f"{ranks}, distilled", 0.5, 0, partial(distilled, method, rate)


def choices() -> Runs:
    """The settings above among others, on validation queries."""

    texts, first = partial(sentences, "calibration 0"), partial(statistics, 0, weighted=True)
    for name, known in (
        ("rows not weighted", partial(statistics, 0)),
        ("rows weighted", first),
        ("damping 0.01", lambda: changed(first(), damping=0.01)),
        ("damping 0.5", lambda: changed(first(), damping=0.5)),
        ("4 vectors", lambda: collected(batches_of(texts()), weighted=True, count=4)),
        ("3 times the texts", partial(statistics, ALL_TEXTS, True)),
    ):
        for kept in (0.7, 0.5):
            yield "loss metric", name, kept, 0, lambda known=known, k=kept: allocated(known(), k)
    steps = STEPS // 4
    for rate in (1e-4, 3e-4, 1e-3, 3e-3):
        for method, (ranks, _) in STARTS.items():
            make = partial(distilled, method, rate, steps)
            yield method, f"{ranks}, {steps} steps, rate {rate}", 0.5, 0, make


# --- Measuring ---


@functools.cache
def original_embeddings(part: str, column: str, count: int) -> Tensor:
    return encode(dense(), sentences(part, column)[:count])


def retrieve(model: nn.Module, part: str, counts: tuple[int, ...]) -> tuple[list[Tensor], float]:
    """The place of each query's own definition, 1 at best, for the first ``counts`` queries.

    The last count is the largest. Also the mean cosine to the original's embeddings.
    """
    columns = ("text", "definition")
    old = [original_embeddings(part, column, counts[-1]) for column in columns]
    new = old
    if model is not dense():
        new = [encode(model, sentences(part, column)[: counts[-1]]) for column in columns]
    cosine = torch.cat([(a * b).sum(1) for a, b in zip(old, new)]).mean().item()
    places = []
    for count in counts:
        scores = new[0][:count] @ new[1][:count].T
        places.append((scores >= scores.diagonal()[:, None]).sum(1))
    return places, cosine


def verses_cosine(model: nn.Module) -> float:
    new = encode(model, sentences("other")[:40])
    return (new * original_embeddings("other", "text", 40)).sum(1).mean().item()


def record(results: Table, row: dict[str, Any], make: Callable[[], nn.Module], part: str) -> None:
    """Measure a model, unless its rows are there."""
    counts = (500,) if part == "validation" else (500, 2000)

    @functools.cache
    def measured() -> tuple[list[Tensor], float, float]:
        model = make()
        verses = 1.0 if part == "validation" else verses_cosine(model)
        return *retrieve(model, part, counts), verses

    def scores(i: int) -> dict[str, str]:
        all_places, cosine, verses = measured()
        places = all_places[i]
        shares = [100.0 * (places <= 1), 100.0 * (places <= 10), 100 / places]
        values = [f"{share.mean().item():.3f}" for share in shares]
        return dict(zip(COLUMNS[5:], [*values, f"{cosine:.4f}", f"{verses:.4f}"]))

    for i, count in enumerate(counts):
        key = {**row, "queries": count}
        if key in results:
            continue
        results.add(key, partial(scores, i))
        if part == "test":
            places = " ".join(map(str, measured()[0][i].tolist()))
            with gzip.open(results.path.with_name("minilm_places.csv.gz"), "at") as file:
                file.write("\t".join([*map(str, key.values()), places]) + "\n")


PARTS = {"untrained": untrained, "table": table, "padding": padding, "trained": trained}


def main() -> None:
    options = parse(__doc__, PARTS)
    part, name, chosen = "test", "minilm.csv", [PARTS[name] for name in options.parts]
    if options.validate:
        part, name, chosen = "validation", "minilm_validation.csv", [choices]
    results = Table(options.out / name, COLUMNS, KEY)
    for runs in chosen:
        for *values, make in runs():
            record(results, dict(zip(KEY, values)), make, part)


if __name__ == "__main__":
    main()
