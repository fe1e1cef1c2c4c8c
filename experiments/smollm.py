"""SmolLM2 as lessons 9 and 10 and the long runs use it: texts, perplexity, published methods.

Texts are of three kinds and in three parts: calibration, validation (which settings are chosen
on) and test.
"""

import copy
import csv
import dataclasses
import functools
import gzip
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lrf_utils as lrf
import notebook_utils as nb
from experiments.cache_bits import round_groups
from experiments.common import Table

# --- Texts ---------------------------------------------------------------------------------------

KINDS = ("WordNet", "Bible", "Python docs")
DATA = nb.ROOT / "data"
FOLDER = nb.ROOT / "build" / "language_model"


def _split(text: str, first: float, second: float) -> dict[str, str]:
    """By position: up to ``first`` of its characters, up to ``second``, and what follows."""
    a, b = int(first * len(text)), int(second * len(text))
    return {"calibration": text[:a], "validation": text[a:b], "test": text[b:]}


def load_texts() -> dict[str, dict[str, str]]:
    """For each of KINDS the texts "calibration", "validation" and "test"."""
    table = pd.read_csv(
        DATA / "wordnet.tsv.gz", sep="\t", quoting=csv.QUOTE_NONE, keep_default_na=False
    )
    sentences = {}
    for part in ("calibration", "validation", "test"):
        name = "calibration 0" if part == "calibration" else part
        sentences[part] = "\n".join(table.loc[table["part"] == name, "text"])
    bible = gzip.decompress((DATA / "kjv" / "kjv.txt.gz").read_bytes()).decode()
    docs = gzip.decompress((DATA / "python_docs.txt.gz").read_bytes()).decode()
    return {
        "WordNet": sentences,
        "Bible": _split(bible, 0.90, 0.95),
        "Python docs": _split(docs, 0.60, 0.70),
    }


def token_windows(
    tokenizer: Any, text: str, count: int, length: int = 256, offset: float = 0.0
) -> Tensor:
    """``count`` sequences of ``length`` tokens, evenly spread over the text; none overlap.

    With an ``offset`` they begin later, by this share of the step from one to the next.
    """
    step, rows = len(text) // count, []
    for number in range(count):
        start = int((number + offset) * step)
        # A token has at least one character: more than enough of them are read.
        ids = tokenizer(text[start : start + min(step, 12 * length)])["input_ids"][:length]
        if len(ids) < length:
            raise ValueError(f"the text is too short for {count} windows of {length} tokens")
        rows.append(ids)
    return torch.tensor(rows)


def windows_of(
    tokenizer: Any, part: str, count: int, length: int = 256, offset: float = 0.0
) -> dict[str, Tensor]:
    """For each kind of text, ``count`` windows of its ``part``."""
    how = {"count": count, "length": length, "offset": offset}
    return {
        kind: token_windows(tokenizer, text[part], **how) for kind, text in load_texts().items()
    }


def written_text(
    model: nn.Module, count: int, folder: Path, length: int = 256, batch_size: int = 64
) -> Tensor:
    """``count`` sequences that the model writes itself: from its first token, at temperature 1.

    They come in batches, each kept in a file of ``folder``; a longer call goes on after them.
    """
    start, rows = model.generation_config.bos_token_id, []
    how = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "eos_token_id": None}
    how |= {"max_length": length, "pad_token_id": start, "cache_implementation": "static"}
    writer = functools.cache(lambda: copy.deepcopy(model).bfloat16())
    for number in range(math.ceil(count / batch_size)):
        path = folder / f"written_{number}.pt"
        if not path.exists():
            first = torch.full((batch_size, 1), start)
            with torch.random.fork_rng(devices=[]), torch.inference_mode():
                torch.manual_seed(number)
                ids = writer().generate(first, attention_mask=torch.ones_like(first), **how)
            folder.mkdir(parents=True, exist_ok=True)
            torch.save(ids, path.with_suffix(".part"))
            os.replace(path.with_suffix(".part"), path)
        rows.append(torch.load(path))
    return torch.cat(rows)[:count]


# --- What takes long -----------------------------------------------------------------------------

TIMES = ["what", "layers", "CPU seconds", "wall seconds", "load"]


def times() -> Table:
    return Table(FOLDER / "language_model_times.csv", TIMES, TIMES[:1])


def saved(what: str, layers: int, make: Callable[[], Any]) -> Any:
    """What ``make()`` returns, kept in a file; the time it took goes to the table."""
    path = FOLDER / f"{what}.pt"
    if not path.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        wall, cpu = time.perf_counter(), time.process_time()
        result = make()
        seconds = [time.process_time() - cpu, time.perf_counter() - wall]
        torch.save(result, path.with_suffix(".part"))
        os.replace(path.with_suffix(".part"), path)
        row = [what, layers, *(f"{x:.0f}" for x in seconds), f"{os.getloadavg()[0]:.1f}"]
        times().add(dict(zip(TIMES, row)), dict)
    return torch.load(path, weights_only=True, mmap=True)


# --- Perplexity ----------------------------------------------------------------------------------


@torch.no_grad()
def window_losses(model: nn.Module, windows: Tensor, batch_size: int = 1) -> Tensor:
    """The mean cross-entropy of each window, in nats per token; the first token is given."""
    losses = []
    for ids in windows.split(batch_size):
        logits = model(ids, use_cache=False).logits[:, :-1].flatten(0, 1).float()
        each = F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")
        losses.append(each.view(len(ids), -1).mean(1))
    return torch.cat(losses)


def perplexity(losses: Any) -> float:
    """exp of the mean loss: among how many equally likely tokens the model seems to choose."""
    return math.exp(np.hstack([np.asarray(each) for each in losses]).mean())


def read_losses(path: Path) -> pd.DataFrame:
    """A table of an experiment; its column ``losses`` holds an array of the windows' losses."""
    table = pd.read_csv(path, keep_default_na=False)
    table["losses"] = [np.array(text.split(), dtype=float) for text in table["losses"]]
    return table


def losses_of(table: pd.DataFrame, **wanted: Any) -> pd.Series:
    """The losses of a model's windows, by text; ``wanted`` says what its columns hold."""
    rows = table[(table[list(wanted)] == pd.Series(wanted)).all(axis=1)]
    if rows.empty or rows["text"].duplicated().any():
        raise ValueError(f"not one model, but {len(rows)} rows match {wanted}")
    return rows.set_index("text")["losses"].sort_index()


def change(losses: pd.Series, before: pd.Series) -> nb.Interval:
    """By how many percent the perplexity is higher than ``before``, on the texts of both.

    It is the ratio of geometric means; the interval is that of its logarithm, windows paired.
    """
    shared = losses.index.intersection(before.index)
    ratio = nb.interval(np.concatenate([losses[key] - before[key] for key in shared]))
    return nb.Interval(*(100 * math.expm1(value) for value in ratio))


class Alone:
    """A model with one layer changed, on ``ids``: it runs from that layer's block on."""

    def __init__(self, model: nn.Module, ids: Tensor) -> None:
        self.model, self.inputs = model, []

        def keep(block: nn.Module, args: tuple, kwargs: dict) -> None:
            self.inputs.append((args, kwargs))

        blocks = model.model.layers
        hooks = [block.register_forward_pre_hook(keep, with_kwargs=True) for block in blocks]
        with torch.no_grad():
            self.before = model(ids, use_cache=False).logits.log_softmax(-1)
        self.next = ids[:, 1:, None]
        for hook in hooks:
            hook.remove()

    @torch.no_grad()
    def __call__(self, name: str, pair: nn.Module) -> Tensor:
        """The logarithms of its probabilities, as ``before`` has those of the model itself."""
        _, _, number, inner = name.split(".", 3)
        blocks = self.model.model.layers[int(number) :]
        (x,), how = self.inputs[int(number)]
        for block in (lrf.factorize(blocks[0], {inner: pair}), *blocks[1:]):
            x = block(x, **how)
        return self.model.lm_head(self.model.model.norm(x)).log_softmax(-1)

    def loss(self, log_p: Tensor) -> float:
        return -log_p[:, :-1].gather(2, self.next).mean().item()

    def divergence(self, log_p: Tensor) -> float:
        """Of ``before`` from these, KL in nats per token."""
        return (self.before.exp() * (self.before - log_p)).sum(-1).mean().item()


# --- Factors and ranks ---------------------------------------------------------------------------


Factors = dict[str, tuple[Tensor, Tensor, Tensor]]
Options = dict[str, dict[int | None, tuple[float, float]]]


def nested_factors(
    layer: nn.Linear, known: lrf.Statistics | None, centered: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """A (m, k), B (k, n) whose first r columns and rows are the best pair of rank r, for any r.

    Their norms are shared out for each component, not for a whole pair as ``factorize`` does; so
    one call serves all ranks that save weights. The third tensor are ``truncation_errors``.
    """
    W = layer.weight.detach().double()
    m, n = W.shape
    C, R = torch.eye(n).double(), None
    if known is not None:
        C = known.covariance(centered, ridge=True)
    if known is not None and known.gradient_sum is not None:
        G = known.metric
        G.diagonal().add_(known.damping * G.diagonal().mean())
        R = torch.linalg.cholesky(G).mT  # G = Rᵀ R
    if m <= n:  # W ≈ R⁻¹ U Uᵀ R W
        B = W if R is None else R @ W
        squares, U = torch.linalg.eigh(B @ C @ B.mT)
    else:  # W ≈ W L U Uᵀ L⁻¹, with C = L Lᵀ
        L = torch.linalg.cholesky(C)
        A = W @ L
        squares, U = torch.linalg.eigh(A.mT @ (A if R is None else G @ A))
    U = U.flip(1)[:, : max(1, lrf.break_even_rank(m, n))]
    if m <= n:
        A = U if R is None else torch.linalg.solve_triangular(R, U, upper=True)
        B = U.mT @ B
    else:
        A, B = A @ U, torch.linalg.solve_triangular(L.mT, U, upper=True).mT
    balance = (B.norm(dim=1) / A.norm(dim=0)).sqrt()
    errors = F.pad(squares.clamp(min=0).cumsum(0).flip(0), (0, 1))
    return (A * balance).float(), (B / balance[:, None]).float(), errors


def pair_of(A: Tensor, B: Tensor, bias: Tensor | None = None) -> lrf.LowRank:
    down = nn.Linear(B.shape[1], len(B), bias=False)
    up = nn.Linear(len(B), len(A), bias=bias is not None)
    down.weight, up.weight = nn.Parameter(B), nn.Parameter(A)
    if bias is not None:
        up.bias = nn.Parameter(bias.float())
    return lrf.LowRank(down, up)


def load_options(model: nn.Module) -> dict[str, dict[int | None, tuple[float, float]]]:
    """``rank_options`` of all linear layers, from the long run: weights, and predicted loss."""
    table = pd.read_csv(nb.ROOT / "results" / "language_model_options.csv")
    options: dict[str, dict] = {}
    for name, rank, error in table.itertuples(index=False):
        m, n = model.get_submodule(name).weight.shape
        options.setdefault(name, {None: (m * n, 0.0)})[rank] = (rank * (m + n), error)
    return options


def options_of(factors: Factors, multiple_of: int = 16) -> Options:
    """As ``lrf.rank_options``, of what ``nested_factors`` has found for each layer."""
    options: Options = {}
    for name, (A, B, errors) in factors.items():
        m, n = len(A), B.shape[1]
        options[name] = {None: (m * n, 0.0)}
        for rank in range(multiple_of, len(B) + 1, multiple_of):
            options[name][rank] = (rank * (m + n), errors[rank].item())
    return options


def corrected(options: Options, layers: pd.DataFrame) -> Options:
    """Each layer's errors times the divergence measured with it alone cut, over the predicted."""
    factors, result = (layers["KL"] / layers["predicted"]).to_dict(), {}
    for name, table in options.items():
        result[name] = {rank: (cost, factors[name] * e) for rank, (cost, e) in table.items()}
    return result


def equal_ranks(model: nn.Module, names: Iterable[str], kept: float) -> dict[str, int]:
    """The same share of its weights for each layer."""
    ranks = {}
    for name in names:
        m, n = model.get_submodule(name).weight.shape
        ranks[name] = max(1, int(kept * m * n / (m + n)))
    return ranks


# --- What published methods know of a layer ------------------------------------------------------


class Lazy(Mapping):
    """What ``make(name)`` returns for each name, made when asked for and not kept."""

    def __init__(self, names: list[str], make: Callable[[str], Any]) -> None:
        self.names, self.make = names, make

    def __getitem__(self, name: str) -> Any:
        return self.make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


MANY = 10**7  # rows; with so many, a covariance gets next to no ridge


def diagonal(values: Tensor) -> lrf.Statistics:
    """Of imagined inputs that are independent and have these mean squares."""
    values = values.double().clamp(min=1e-6 * values.mean())
    zeros = torch.zeros(len(values), dtype=torch.float64)
    return lrf.Statistics(1, MANY, MANY, zeros, (MANY * values).diag())


def input_sizes(
    model: nn.Module, names: Iterable[str], batches: Iterable[Tensor]
) -> dict[str, Tensor]:
    """ASVD scales inputs by the root of their mean absolute values (its alpha is a half).

    Source: Yuan et al. (2023), arXiv:2312.05821.
    """
    sums: dict[str, Any] = dict.fromkeys(names, 0)

    def add(name: str, layer: nn.Module, args: tuple[Tensor]) -> None:
        sums[name] = sums[name] + args[0].abs().double().flatten(0, 1).mean(0)

    layers = {name: model.get_submodule(name) for name in sums}
    hooks = [layer.register_forward_pre_hook(partial(add, name)) for name, layer in layers.items()]
    with torch.no_grad():
        for batch in batches:
            model(batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    return sums


def weight_gradients(
    model: nn.Module, names: Iterable[str], batches: Iterable[Tensor]
) -> dict[str, Tensor]:
    """FWSVD scales inputs by the root of the summed squared gradients of their weights.

    Source: Hsu et al. (2022), arXiv:2207.00112.
    """
    sums: dict[str, Any] = dict.fromkeys(names, 0)
    weights = [model.get_submodule(name).weight for name in sums]
    for batch in batches:
        for ids in batch.split(1):
            logits = model(ids, use_cache=False).logits[0]
            loss = F.cross_entropy(logits[:-1], ids[0, 1:])
            for name, gradient in zip(sums, torch.autograd.grad(loss, weights)):
                sums[name] = sums[name] + gradient.square().sum(0)
    return sums


def without_ridge(known: lrf.Statistics) -> lrf.Statistics:
    more = MANY / known.rows
    sums = {key: more * getattr(known, key) for key in ("weight", "row_sum", "outer_sum")}
    return dataclasses.replace(known, rows=MANY, **sums)


# --- Fewer bits ----------------------------------------------------------------------------------


def rounded(W: Tensor, bits: int, dim: int, group: int, shift: int = 0) -> Tensor:
    """A weight rounded to nearest in groups along ``dim``, which begin at ``shift``."""
    return round_groups(W.roll(-shift, dim), bits, dim, group).roll(shift, dim)


def rounded_model(model: nn.Module, names: Iterable[str], bits: int, **how: int) -> nn.Module:
    """A copy with the named layers, or the factors of their pairs, in ``bits`` bits.

    Groups run along a layer's inputs, and in a pair along each component.
    """
    result = copy.deepcopy(model)
    with torch.no_grad():
        for name in names:
            layer = result.get_submodule(name)
            parts = (
                [(layer, 1)] if isinstance(layer, nn.Linear) else [(layer[0], 1), (layer[1], 0)]
            )
            for part, dim in parts:
                part.weight.copy_(rounded(part.weight, bits, dim, **how))
    return result


def in_random_basis(model: nn.Module, names: Iterable[str], bits: int, group: int) -> nn.Module:
    """The named layers rounded after a random rotation of their inputs, as QuIP# and QuaRot do."""
    result, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    bases = {}
    with torch.no_grad():
        for name in names:
            W = result.get_submodule(name).weight
            n = W.shape[1]
            if n not in bases:
                bases[n] = torch.linalg.qr(torch.randn(n, n, generator=generator)).Q
            W.copy_(rounded(W @ bases[n], bits, 1, group) @ bases[n].mT)
    return result


def with_table(model: nn.Module, A: Tensor, B: Tensor) -> nn.Module:
    """A copy whose embedding table, and the head tied to it, are the pair A (tokens, r), B."""
    head, embed = pair_of(A, B), nn.Sequential(nn.Embedding(*A.shape), nn.Linear(*B.shape, False))
    embed[0].weight, embed[1].weight = head[1].weight, nn.Parameter(B.mT.contiguous())
    return lrf._copy(model, {model.model.embed_tokens: embed, model.lm_head: head})


def with_small_table(model: nn.Module, batches: Iterable[Tensor], rank: int) -> nn.Module:
    """The same, with the pair that changes the logits least on these texts."""
    known = lrf.collect_statistics(model, batches, ["lm_head"])["lm_head"]
    A, B, _ = nested_factors(model.lm_head, known)
    return with_table(model, A[:, :rank].clone(), B[:rank].clone())
