"""all-MiniLM-L6-v2 compressed by the methods of lesson 10: results/minilm.csv.

    python -m experiments.minilm [--out FOLDER]

About half an hour on one core. The task: for each of 2,000 example sentences of WordNet, find the
definition that belongs to it. A row of the table also has the place of each sentence's own
definition among all 2,000, so that a lesson can pair any two rows.
"""

import copy
import csv
import functools
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

import lrf_utils as lrf
import notebook_utils as nb
from experiments.common import Table, parse
from experiments.models import SentenceEncoder, batches, embed, sketch

KEY = ["method", "ranks", "kept"]
COLUMNS = [*KEY, "MRR (%)", "cosine", "places"]
SHARES = (0.9, 0.7, 0.5)
RUNS = (  # "ours": those of the weighted metric, chosen by predicted loss
    ("weighted metric", "ours"),
    ("weighted metric", "equal"),
    ("SVD-LLM", "ours"),
    ("SVD-LLM", "equal"),
    ("plain SVD", "equal"),
    ("FWSVD", "equal"),
    ("ASVD", "equal"),
)

Ranks = Mapping[str, int | None]

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


@functools.cache
def statistics(draw: int = 0, weighted: bool = False) -> dict[str, lrf.Statistics]:
    """Of one of the three draws of 1,000 calibration texts, about 13 tokens each."""
    loss = partial(sketch, generator=torch.Generator().manual_seed(0))
    given = batches_of(sentences(f"calibration {draw}"))
    return lrf.collect_statistics(dense(), given, mask_of=mask_of, loss=loss, weighted=weighted)


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
def fisher() -> dict[str, Tensor]:
    """For each input of a layer, the root of its weights' summed squared gradients; for FWSVD."""
    generator = torch.Generator().manual_seed(0)
    sums = dict.fromkeys(weights(), 0)
    parameters = [dense().get_submodule(name).weight for name in sums]
    for batch in batches_of(sentences("calibration 0")[:100], size=1):
        (scalar,) = sketch(dense()(**batch), generator)
        for name, gradient in zip(sums, torch.autograd.grad(scalar, parameters)):
            sums[name] = sums[name] + gradient.double().square().sum(0)
    return {name: (s / s.mean()).clamp(min=1e-6).sqrt().diag() for name, s in sums.items()}


# --- Factors: one formula, each method with an L and an R of its own ---


def scalings(method: str, name: str) -> tuple[Tensor | None, Tensor | None]:
    """L and R of ‖L (W - W_r) R‖, which the method makes least; None stands for the identity."""
    if method == "plain SVD":
        return None, None
    if method == "FWSVD":
        return None, fisher()[name]
    if method == "ASVD":
        return None, mean_sizes()[name].sqrt().diag()
    ours = method == "weighted metric"
    known = statistics(0, ours)[name]
    # Ours takes the mean into the bias. SVD-LLM's covariance is about 0; the ridge is ours.
    right = torch.linalg.cholesky(known.covariance(centered=ours, ridge=True))
    return torch.linalg.cholesky(damped(known.metric)).T if ours else None, right


def damped(G: Tensor, damping: float = 0.1) -> Tensor:
    return G + damping * G.diagonal().mean() * torch.eye(len(G))


@functools.cache
def factors(method: str) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """For each layer A, B and the squared singular values; A[:, :r] @ B[:r] has rank r."""
    found = {}
    for name, W in weights().items():
        left, right = scalings(method, name)
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


def compressed(method: str, ranks: Ranks) -> nn.Module:
    """A copy of the model with these ranks; None is dense."""
    model = copy.deepcopy(dense())
    for name, rank in ranks.items():
        if rank is None:
            continue
        A, B, _ = factors(method)[name]
        (m, n), layer = weights()[name].shape, dense().get_submodule(name)
        bias = layer.bias.detach().double()
        if method == "weighted metric":
            mean = statistics(0, True)[name].mean
            bias = bias + (weights()[name] - A[:, :rank] @ B[:rank]) @ mean
        down, up = nn.Linear(n, rank, bias=False), nn.Linear(rank, m)
        down.weight = nn.Parameter(B[:rank].float())
        up.weight = nn.Parameter(A[:, :rank].float())
        up.bias = nn.Parameter(bias.float())
        model.set_submodule(name, lrf.LowRank(down, up))
    return model


# --- Ranks ---


def ranks_of(method: str, ranks: str, kept: float) -> Ranks:
    """Equal shares, or the least sum of what ``method`` cuts off."""
    if ranks == "equal":
        return {name: int(kept * W.numel() / sum(W.shape)) for name, W in weights().items()}
    options = {}
    for name, (_, _, squares) in factors(method).items():
        m, n = weights()[name].shape
        left = squares.sum() - squares.cumsum(0)
        options[name] = {None: (m * n, 0.0)}
        for rank in range(1, lrf.break_even_rank(m, n) + 1):
            options[name][rank] = rank * (m + n), left[rank - 1].item()
    return lrf.allocate_ranks(options, kept * total())


def model_of(method: str, ranks: str, kept: float) -> nn.Module:
    return compressed(method, ranks_of("weighted metric", ranks, kept))


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


def runs() -> Iterator[tuple]:
    yield "dense", "", 1.0, dense
    for method, ranks in RUNS:
        for kept in SHARES:
            yield method, ranks, kept, partial(model_of, method, ranks, kept)


def main() -> None:
    results = Table(parse(__doc__, ()).out / "minilm.csv", COLUMNS, KEY)
    for *values, make in runs():

        def measure(make=make) -> dict[str, str]:
            (places,), cosine = retrieve(make(), "test", (2000,))
            numbers = [f"{(100 / places).mean():.3f}", f"{cosine:.4f}"]
            return dict(zip(COLUMNS[3:], [*numbers, " ".join(map(str, places.tolist()))]))

        results.add(dict(zip(KEY, values)), measure)


if __name__ == "__main__":
    main()
