"""The tables behind lesson 10: all-MiniLM-L6-v2, compressed by every method of the lesson.

Each row is appended to results/minilm.csv as soon as it is measured, and the places at which the 2,000 queries found
their definitions to results/minilm_places.csv.gz; what is there is not measured again. All of it takes about an hour on
one core. ``--validate`` compares settings on 500 other queries: results/minilm_validation.csv.
"""

import argparse
import copy
import csv
import dataclasses
import functools
import gzip
import math
import sys
import time
import warnings
from pathlib import Path

import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import lrf_utils as lrf
import notebook_utils as nb
from lrf_layers import LowRank, Statistics

COLUMNS = ["method", "ranks", "kept", "draw", "queries", "R@1 (%)", "R@10 (%)", "MRR (%)", "cosine", "cosine, verses"]
STARTS = {"weighted metric": "own", "plain SVD": "equal"}  # of the distillation, with their ranks
CENTRED = ("activations + bias", "loss metric", "weighted metric")
STEPS, RATES = 300, {"weighted metric": 3e-4, "plain SVD": 1e-3}  # of the distillation; by the validation cosine
warnings.filterwarnings("ignore", "the budget does not count")  # the tables of embeddings, which stay


class SentenceEncoder(nn.Module):
    """The model as it is used: the mean over the tokens of its last layer, scaled to length 1."""

    def __init__(self, bert):
        super().__init__()
        self.bert = bert

    def forward(self, input_ids, attention_mask):
        hidden = self.bert(input_ids, attention_mask).last_hidden_state
        mask = attention_mask[..., None].to(hidden)
        return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


bert, tokenizer = nb.load_minilm()
dense = SentenceEncoder(bert).eval()
WEIGHTS = {name: dense.get_submodule(name).weight.detach().double() for name in lrf.layer_names(dense)}
TOTAL = sum(W.numel() for W in WEIGHTS.values())
data = pd.read_csv(nb.ROOT / "data" / "wordnet.tsv.gz", sep="\t", quoting=csv.QUOTE_NONE, keep_default_na=False)
texts = {part: list(rows["text"]) for part, rows in data.groupby("part")}
definitions = {part: list(rows["definition"]) for part, rows in data.groupby("part")}


def batches(sentences, size=64, length=None):
    """Sentences of similar length together; each batch with the places of its sentences. ``length`` pads to that."""
    ids = tokenizer(sentences, truncation=True, max_length=64)["input_ids"]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    for start in range(0, len(order), size):
        places = order[start : start + size]
        how = {"padding": "max_length", "max_length": length} if length else {}
        yield dict(tokenizer.pad({"input_ids": [ids[i] for i in places]}, return_tensors="pt", **how)), places


@torch.no_grad()
def encode(model, sentences):
    embeddings = torch.empty(len(sentences), 384)
    for batch, places in batches(sentences):
        embeddings[places] = model(**batch)
    return embeddings


@functools.cache
def original(part):
    """The original's embeddings of a part's texts and definitions."""
    path = nb.ROOT / "build" / f"minilm_original_{part}.pt"
    if not path.exists():
        torch.save([encode(dense, sentences[part]) for sentences in (texts, definitions)], path)
    return torch.load(path)


def retrieve(model, part, count):
    """The place of each query's own definition, 1 at best, and the mean cosine to the original's embeddings.

    For the first ``count`` queries among as many definitions, and for the first 500 of them among 500.
    """
    old = [each[:count] for each in original(part)]
    new = old if model is dense else [encode(model, sentences[part][:count]) for sentences in (texts, definitions)]
    cosine = torch.cat([(a * b).sum(1) for a, b in zip(old, new)]).mean().item()
    for size in sorted({count, 500}):
        scores = new[0][:size] @ new[1][:size].T
        yield size, (scores >= scores.diagonal()[:, None]).sum(1), cosine


# --- Statistics ------------------------------------------------------------------------------------------------------


def sketch(embeddings, count=1, generator=None):
    """Random scalars whose gradients' outer products are, on average, those of all 384 numbers of the embedding."""
    for _ in range(count):
        yield (embeddings * torch.randn(embeddings.shape, generator=generator)).sum() / count**0.5


def collected(sentences, weighted, count=1, **how):
    seen = [batch for batch, _ in batches(sentences, **how)]
    keep = (lambda batch: batch["attention_mask"]) if not how else None
    loss = functools.partial(sketch, count=count, generator=torch.Generator().manual_seed(0))
    return lrf.collect(dense, seen, keep=keep, loss=loss, weighted=weighted)


@functools.cache
def statistics(draw, weighted=False):
    if draw == "0 + 1 + 2":
        first, *others = (statistics(each, weighted) for each in (0, 1, 2))
        return {name: s + others[0][name] + others[1][name] for name, s in first.items()}
    path = nb.ROOT / "build" / f"minilm_statistics_{draw}{'_weighted' * weighted}.pt"
    if not path.exists():
        known = collected(texts[f"calibration {draw}"], weighted)
        torch.save({name: vars(each) for name, each in known.items()}, path)
    return {name: Statistics(**each) for name, each in torch.load(path).items()}


@functools.cache
def mean_sizes():
    """Of each layer's inputs, the mean absolute value; for ASVD."""
    sums = dict.fromkeys(WEIGHTS, 0)

    def look(name, layer, args):
        sums[name] = sums[name] + args[0][mask].abs().double().sum(0)

    hooks = [dense.get_submodule(n).register_forward_pre_hook(functools.partial(look, n)) for n in WEIGHTS]
    for batch, _ in batches(texts["calibration 0"]):
        mask = batch["attention_mask"].bool()
        with torch.no_grad():
            dense(**batch)
    for hook in hooks:
        hook.remove()
    return {name: total / statistics(0)[name].rows for name, total in sums.items()}


@functools.cache
def fisher(outputs):
    """Of each input of a weight, or output, the summed squared gradient, one text at a time; for FWSVD."""
    torch.manual_seed(0)
    sums, weights = dict.fromkeys(WEIGHTS, 0), [dense.get_submodule(name).weight for name in WEIGHTS]
    for batch, _ in batches(texts["calibration 0"][:100], size=1):
        (scalar,) = sketch(dense(**batch))
        for name, gradient in zip(WEIGHTS, torch.autograd.grad(scalar, weights)):
            sums[name] = sums[name] + gradient.double().square().sum(1 if outputs else 0)
    return {name: (each / each.mean()).clamp(min=1e-6).sqrt().diag() for name, each in sums.items()}


# --- Methods: W_r = L⁻¹ [L W R]_r R⁻¹, each with an L and an R of its own ------------------------------------------


def scalings(method, name, draw):
    """L and R of one layer; None for the identity."""
    known, m = statistics(draw, method == "weighted metric")[name], len(WEIGHTS[name])
    left = right = None
    if method == "FWSVD":  # whose weights are the transposed ones, inputs by outputs: its rows are our columns
        right = fisher(outputs=False)[name]
    if method == "FWSVD, outputs":
        left = fisher(outputs=True)[name]
    if method == "ASVD":
        right = mean_sizes()[name].sqrt().diag()
    if method == "SVD-LLM":
        right = torch.linalg.cholesky(known.covariance(centred=False, ridge=True))
    if method in CENTRED:
        right = torch.linalg.cholesky(known.covariance(ridge=True))
    if method in ("loss metric", "weighted metric"):
        G = known.metric
        left = torch.linalg.cholesky(G + known.damping * G.diagonal().mean() * torch.eye(m)).T
    return left, right


@functools.cache
def factors(method, draw=0):
    """For each layer A, B and the squared singular values; A[:, :r] @ B[:r] is the layer at rank r."""
    found = {}
    for name, W in WEIGHTS.items():
        left, right = scalings(method, name, draw)
        scaled = W if right is None else W @ right
        U, S, Vh = torch.linalg.svd(scaled if left is None else left @ scaled, full_matrices=False)
        A, B = U * S.sqrt(), S.sqrt()[:, None] * Vh
        A = A if left is None else torch.linalg.solve(left, A)
        found[name] = A, B if right is None else torch.linalg.solve(right, B, left=False), S.square()
    return found


def compressed(method, ranks, draw=0):
    """A copy of the model with these ranks; None is dense."""
    pairs = {}
    for name, rank in ranks.items():
        if rank is not None:
            A, B, _ = factors(method, draw)[name]
            (m, n), layer = WEIGHTS[name].shape, dense.get_submodule(name)
            pair = LowRank(nn.Linear(n, rank, bias=False), nn.Linear(rank, m))
            lost = 0
            if method in CENTRED:
                mean = statistics(draw, method == "weighted metric")[name].mean
                lost = (WEIGHTS[name] - A[:, :rank] @ B[:rank]) @ mean
            with torch.no_grad():
                for parameter, value in zip(pair.parameters(), (B[:rank], A[:, :rank], layer.bias + lost)):
                    parameter.copy_(value)
            pairs[name] = pair
    return lrf.factorize(dense, pairs).eval()


# --- Ranks -----------------------------------------------------------------------------------------------------------


def equal(kept):
    return {name: int(kept * m * n / (m + n)) for name, (m, n) in ((k, W.shape) for k, W in WEIGHTS.items())}


def by_error(method, kept, draw, relative=False):
    """The least sum of what is cut off, in the method's own unit; for ``relative``, as a share of each layer's."""
    tables = {}
    for name, (_, _, squares) in factors(method, draw).items():
        m, n = WEIGHTS[name].shape
        left = (squares.sum() - squares.cumsum(0)) / (squares.sum() if relative else 1)
        ranks = range(1, lrf.break_even_rank(m, n) + 1)
        tables[name] = {None: (m * n, 0.0)} | {r: (r * (m + n), left[r - 1].item()) for r in ranks}
    return lrf.allocate(tables, kept * TOTAL)


def by_group(kept):
    """SVD-LLM V2: among the layers of one kind, what is removed is divided by 1 / log(loss at the equal ratio)."""
    ranks, groups = {}, {}
    for name in WEIGHTS:
        groups.setdefault(name.split(".", 4)[-1], []).append(name)
    for names in groups.values():
        losses = {}
        for name in names:
            squares = factors("SVD-LLM", 0)[name][2] * statistics(0)[name].rows
            losses[name] = 1 / math.log(squares[equal(kept)[name] :].sum().sqrt())
        for name in names:
            m, n = WEIGHTS[name].shape
            removed = (1 - kept) * len(names) * losses[name] / sum(losses.values())
            ranks[name] = max(1, min(int((1 - removed) * m * n / (m + n)), min(m, n)))
    return ranks


@functools.cache
def sensitivities():
    """ASVD's table: for each layer alone at a share of its weights, how far 16 embeddings move."""
    sentences, found = texts["calibration 0"][:16], {}
    known = encode(dense, sentences)
    for name, W in WEIGHTS.items():
        for share in (0.2, 0.4, 0.6, 0.8):
            rank = max(1, int(share * W.numel() / sum(W.shape)))
            moved = encode(compressed("ASVD", {name: rank}), sentences) - known
            found[name, rank] = moved.square().sum(1).mean().item()
    return found


def by_threshold(kept):
    """ASVD: each layer gets the least rank that moves the embeddings by less than a threshold, the same for all."""

    def ranks_at(threshold):
        ranks = dict.fromkeys(WEIGHTS)
        for (name, rank), moved in sorted(sensitivities().items(), key=lambda item: -item[0][1]):
            ranks[name] = rank if moved <= threshold else ranks[name]
        return ranks

    def size(ranks):
        return sum(W.numel() if ranks[n] is None else ranks[n] * sum(W.shape) for n, W in WEIGHTS.items())

    fitting = [t for t in sorted(sensitivities().values()) if size(ranks_at(t)) <= kept * TOTAL]
    return ranks_at(fitting[0])


def ranks_of(method, ranks, kept, draw=0):
    if ranks == "equal":
        return equal(kept)
    if ranks == "own" and method in ("ASVD", "SVD-LLM"):
        return {"ASVD": by_threshold, "SVD-LLM": by_group}[method](kept)
    return by_error(method, kept, draw, relative=ranks == "relative output error")


# --- Training, and the table of embeddings ---------------------------------------------------------------------------


def distil(student, rate, steps=STEPS, seed=0, size=64):
    """Train all but the embeddings to give the original's embeddings, with Adam and a one-cycle rate. No labels."""
    known = taught(size)
    parameters = [p for name, p in student.named_parameters() if "embeddings" not in name]
    optimizer = torch.optim.Adam(parameters, lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat([torch.randperm(len(known), generator=generator) for _ in range(1 + steps // len(known))])
    for i in order[:steps].tolist():
        batch, target = known[i]
        loss = (student(**batch) - target).square().sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return student


@functools.cache
def taught(size):
    """Batches of the training texts, each with the original's embeddings."""
    with torch.no_grad():
        return [(batch, dense(**batch)) for batch, _ in batches(texts["training"], size)]


def with_table(table):
    model = copy.deepcopy(dense)
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight.copy_(table)
    return model


def rounded(table, bits):
    """Whole numbers of so many bits, and a scale for each row."""
    scale = table.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    return (table / scale).round() * scale


def truncated(table, rank, weights=None, G=None):
    """The table at a rank: best for rows weighted by ``weights``, in the metric G."""
    E = table.double()
    R = torch.eye(384).double() if G is None else torch.linalg.cholesky(G)
    C = E.T @ E if weights is None else E.T @ (weights[:, None] * E)
    V = torch.linalg.eigh(R.T @ C @ R).eigenvectors[:, -rank:]
    return (E @ R @ V) @ torch.linalg.solve(R.T, V).T


def table_statistics():
    """How often each token occurs in the calibration texts, and the metric of the loss at the embedding's output."""
    torch.manual_seed(0)
    counts, G = torch.zeros(len(tokenizer)).double(), torch.zeros(384, 384).double()
    layer = dense.bert.embeddings.word_embeddings
    for batch, _ in batches(texts["calibration 0"]):
        counts += torch.bincount(batch["input_ids"][batch["attention_mask"].bool()], minlength=len(counts))
        kept = []
        hook = layer.register_forward_hook(lambda *call, kept=kept: kept.append(call[2]))
        (scalar,) = sketch(dense(**batch))
        hook.remove()
        g = torch.autograd.grad(scalar, kept[0])[0].flatten(0, 1).double()
        G += g.T @ g
    return counts, G + 0.1 * G.diagonal().mean() * torch.eye(384)


# --- Parts -----------------------------------------------------------------------------------------------------------


def row(record, method, ranks, kept, draw=0, **how):
    record(method, ranks, kept, draw, lambda: compressed(method, ranks_of(method, ranks, kept, draw), draw), **how)


def ours(record):
    """The weighted metric with its own ranks, at every ratio."""
    record("dense", "", 1.0, 0, lambda: dense)
    for kept in (0.5, 0.7, 0.9, 0.3):
        row(record, "weighted metric", "own", kept)


def between(record):
    """The same at three more ratios."""
    for kept in (0.8, 0.6, 0.4):
        row(record, "weighted metric", "own", kept)


def published(record, ratios=(0.7, 0.5)):
    """The other methods, and ours, at equal ratios; and the loss metric whose rows are not weighted."""
    for kept in ratios:
        for method in ("plain SVD", "SVD-LLM", "ASVD", "FWSVD", "FWSVD, outputs", *CENTRED):
            row(record, method, "equal", kept)
        row(record, "loss metric", "own", kept)


def published_ranks(record):
    """The same with ranks of their own; the paper of FWSVD has none."""
    for method in ("plain SVD", "SVD-LLM"):
        for kept in (0.7, 0.5, 0.9, 0.3):
            row(record, method, "own", kept)


def searched(record):
    """ASVD with its own ranks, which take many evaluations."""
    for kept in (0.7, 0.5, 0.9, 0.3):
        row(record, "ASVD", "own", kept)


def published_ends(record):
    """The same at the largest and the smallest ratio."""
    published(record, (0.9, 0.3))


def currency(record):
    """Ranks by the error of the outputs, in two units."""
    for kept in (0.7, 0.5):
        for ranks in ("output error", "relative output error"):
            row(record, "activations + bias", ranks, kept)


def draws(record):
    """Other calibration texts, and three times as many."""
    for draw in (1, 2, "0 + 1 + 2"):
        for kept in (0.5, 0.7):
            row(record, "weighted metric", "own", kept, draw)
            if draw != "0 + 1 + 2":
                row(record, "SVD-LLM", "equal", kept, draw)


def trained(record):
    """Distillation, from two starts."""
    for method, ranks in STARTS.items():
        start = functools.partial(balanced, method, ranks)
        record(method, f"{ranks}, distilled", 0.5, 0, lambda s=start, m=method: distil(s(), RATES[m]))


def allocated(known, kept=0.5):
    return lrf.factorize(dense, lrf.allocate(lrf.options(dense, known), kept * TOTAL), known)


def balanced(method, ranks, kept=0.5):
    """As ``compressed``, by the library, which gives both factors of a pair the same size; Adam wants that."""
    known = statistics(0, True) if method == "weighted metric" else None
    return lrf.factorize(dense, ranks_of(method, ranks, kept), known)


def table(record):
    """The table of embeddings, which is half of the model: fewer bits against a lower rank."""
    E = dense.bert.embeddings.word_embeddings.weight.detach()
    counts, G = table_statistics()
    frequency = counts + 0.1  # a token that the calibration texts lack may come
    for name, kept, make in (
        ("int8", 0.25, lambda: rounded(E, 8)),
        ("int4", 0.125, lambda: rounded(E, 4)),
        ("SVD", 0.25, lambda: truncated(E, 94)),
        ("SVD, frequency", 0.25, lambda: truncated(E, 94, frequency)),
        ("SVD, frequency, loss metric", 0.25, lambda: truncated(E, 94, frequency, G)),
        ("SVD", 0.5, lambda: truncated(E, 189)),
        ("SVD, frequency, loss metric", 0.5, lambda: truncated(E, 189, frequency, G)),
    ):
        record("table of embeddings", name, kept, 0, lambda make=make: with_table(make()))


def padding(record):
    """250 texts, with the padding masked out and with padding to 40 tokens that counts."""
    few = texts["calibration 0"][:250]
    for weighted in (False, True):
        for ranks, how in (("own, 250 texts", {}), ("own, 250 texts, padding counts", {"length": 40})):

            def make(weighted=weighted, how=how):
                return allocated(collected(few, weighted, **how))

            record("weighted metric" if weighted else "loss metric", ranks, 0.5, 0, make)

    def with_less_ridge():  # the ridge falls with the number of rows, and padding makes more of them
        known = collected(few, True)
        for name, s in known.items():
            k = 40 * len(few) / s.rows
            known[name] = dataclasses.replace(s, rows=k * s.rows, row_sum=k * s.row_sum, outer_sum=k * s.outer_sum)
        return allocated(known)

    record("weighted metric", "own, 250 texts, ridge as with padding", 0.5, 0, with_less_ridge)


PARTS = {
    part.__name__: part
    for part in (
        ours,
        published,
        published_ends,
        published_ranks,
        searched,
        draws,
        currency,
        table,
        between,
        padding,
        trained,
    )
}


def recorder(path, part="test", most=2000):
    """A function that measures a model and appends its rows, unless the file has them."""
    places_path = path.with_name("minilm_places.csv.gz")

    def record(method, ranks, kept, draw, make, count=2000):
        key, count = [method, ranks, str(kept), str(draw)], min(count, most)
        with path.open(newline="") as file:
            if any([row[c] for c in COLUMNS[:5]] == [*key, str(count)] for row in csv.DictReader(file)):
                return
        start = time.process_time()
        model = make()
        made = time.process_time()
        old = original("other")[0][:40]
        verses = (encode(model, texts["other"][:40]) * old).sum(1).mean().item() if part == "test" else 1
        for size, places, cosine in retrieve(model, part, count):
            found = [100.0 * (places <= 1), 100.0 * (places <= 10), 100 / places]
            found = [f"{values.mean().item():.3f}" for values in found]
            with path.open("a", newline="") as file:
                row = [*key, size, *found, f"{cosine:.4f}", f"{verses:.4f}"]
                csv.writer(file, lineterminator="\n").writerow(row)
            if part == "test":
                with gzip.open(places_path, "at") as file:
                    file.write("\t".join([*key, str(size), " ".join(map(str, places.tolist()))]) + "\n")
        spent = f"{made - start:.0f} + {time.process_time() - made:.0f} s"
        print(f"{', '.join(key)}: {found}, {cosine:.4f}, {verses:.4f} ({spent})", flush=True)

    return record


def choices(record):
    """The settings above among others: rows weighted or not, more vectors, other dampings, more texts; rates."""
    first = statistics(0, True)

    def both(name, known):
        for kept in (0.7, 0.5):
            record("loss metric", name, kept, 0, lambda kept=kept: allocated(known(), kept))

    both("rows not weighted", lambda: statistics(0))
    both("rows weighted", lambda: first)
    for damping in (0.01, 0.5):
        changed = {name: dataclasses.replace(each, damping=damping) for name, each in first.items()}
        both(f"damping {damping}", lambda changed=changed: changed)
    both("4 vectors", functools.cache(lambda: collected(texts["calibration 0"], True, 4)))
    both("3 times the texts", lambda: statistics("0 + 1 + 2", True))
    for rate in (1e-4, 3e-4, 1e-3, 3e-3):
        for method, ranks in STARTS.items():
            start = functools.partial(balanced, method, ranks)
            name = f"{ranks}, {STEPS // 4} steps, rate {rate}"
            record(method, name, 0.5, 0, lambda start=start, rate=rate: distil(start(), rate, STEPS // 4))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--validate", action="store_true", help="measure settings on validation queries")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--queries", type=int, default=2000, help="how many to use; the first 500 are always reported")
    options = parser.parse_args()
    path = nb.ROOT / "results" / ("minilm_validation.csv" if options.validate else "minilm.csv")
    if not path.exists():
        with path.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(COLUMNS)
    for part in [choices] if options.validate else [PARTS[name] for name in options.parts]:
        part(recorder(path, *(("validation", 500) if options.validate else ("test", options.queries))))


if __name__ == "__main__":
    main()
