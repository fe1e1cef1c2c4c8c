"""The long runs behind notebook 09: the loss of the decoder with smaller caches. Writes results/kv_cache.csv.

    python scripts/kv_cache.py [--parts untrained trained] [--out FILE]
    python scripts/kv_cache.py --validate

One thread needs about ten minutes for everything. Each row is written as soon as it is measured; rows that are in
the file already are skipped, so an interrupted run resumes. A row is a method at a size of the cache, in numbers per
token and layer (256 without compression), with one of three draws of calibration text from the first 90 % of the Bible.
Losses are those of 64 stretches of the test text, in nats per character; the increase is that over the decoder as it
is, paired by stretch, with half its 95 % interval. Settings were chosen on validation text: ``--validate`` writes
results/kv_cache_validation.csv.
"""

import argparse
import copy
import csv
import dataclasses
import functools
import math
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from train_decoder import CONTEXT, HEADS, LAYERS, ROOT, WIDTH, Attention, Decoder, load_decoder, load_text, windows

import lrf_utils as lrf

torch.set_num_threads(1)

COLUMNS = ["method", "numbers", "draw", "loss", "increase", "half of 95 %"]
SIZES = (128, 64, 32, 16)  # numbers per token and layer
SIZE = WIDTH // HEADS  # of a head
KV = [f"blocks.{i}.attention.kv" for i in range(LAYERS)]
TEXTS, STRETCHES = 64, 64  # stretches to calibrate with, and to measure with
STEPS, RATE = 150, 1e-3
text, dense = load_text(), load_decoder()


class JointAttention(Attention):
    """Keys and values from one matrix. The cache keeps what goes in, or once it is factorized, what is between."""

    def __init__(self, old: Attention):
        super().__init__()
        self.q, self.o = old.q, old.o
        del self.k, self.v
        self.kv = nn.Linear(WIDTH, 2 * WIDTH)  # the bias, zero at first, can make up for a mean
        self.kv.weight = nn.Parameter(torch.cat([old.k.weight, old.v.weight]).detach())
        nn.init.zeros_(self.kv.bias)

    def stored(self, x: Tensor) -> Tensor:
        return self.kv[0](x) if isinstance(self.kv, lrf.LowRank) else x

    def keys_values(self, stored: Tensor) -> tuple[Tensor, Tensor]:
        expand = self.kv[1] if isinstance(self.kv, lrf.LowRank) else self.kv
        return expand(stored).chunk(2, dim=-1)


class Grouped(nn.Module):
    """In place of ``k`` or ``v``: the mean of each group's heads, handed to all heads of the group."""

    def __init__(self, layer: nn.Linear, groups: int):
        super().__init__()
        self.groups = groups
        mean = layer.weight.detach().view(groups, -1, SIZE, WIDTH).mean(1).flatten(0, 1)
        self.mean = nn.Linear(WIDTH, groups * SIZE, bias=False)
        self.mean.weight = nn.Parameter(mean)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.mean(x).unflatten(-1, (self.groups, SIZE))
        return heads.repeat_interleave(HEADS // self.groups, dim=-2).flatten(-2)


def with_joint(model: Decoder) -> Decoder:
    model = copy.deepcopy(model)
    for block in model.blocks:
        block.attention = JointAttention(block.attention)
    return model


def drawn_loss(seed: int, draws: int = 1) -> Callable[[Tensor], Iterator[Tensor]]:
    """For ``lrf.collect``: cross-entropies at a character that is drawn, at each position, from the model's own."""
    generator = torch.Generator().manual_seed(seed)

    def losses(logits: Tensor) -> Iterator[Tensor]:
        logits = logits.flatten(0, 1)
        for _ in range(draws):
            drawn = torch.multinomial(logits.detach().softmax(1), 1, generator=generator)[:, 0]
            yield F.cross_entropy(logits, drawn, reduction="sum")

    return losses


@functools.cache
def statistics(draw: int, texts: int = TEXTS, draws: int = 1) -> dict[str, lrf.Statistics]:
    batches = windows(text.train, texts, seed=10_000 + draw)[:, :-1].split(16)
    return lrf.collect(with_joint(dense), batches, KV, loss=drawn_loss(draw, draws))


def parts(form: str, kind: str, draw: int, **how: int) -> tuple[Decoder, dict[str, lrf.Statistics | None]]:
    """A decoder with one matrix for K and V, or with two, and what ``kind`` uses of the statistics of each matrix."""
    model, stats = with_joint(dense), dict.fromkeys(KV)
    if kind != "plain SVD":
        stats = statistics(draw, **how)
    if form == "separate":  # rows of the joint matrix; with a bias, as that one has
        model, both = copy.deepcopy(dense), stats
        stats = {}
        for block, (name, stat) in zip(model.blocks, both.items()):
            for letter, rows in (("k", slice(0, WIDTH)), ("v", slice(WIDTH, None))):
                layer = nn.Linear(WIDTH, WIDTH)
                layer.weight = getattr(block.attention, letter).weight
                nn.init.zeros_(layer.bias)
                setattr(block.attention, letter, layer)
                gradients = None if stat is None else stat.gradient_sum[rows, rows]
                stats[name[:-2] + letter] = stat and dataclasses.replace(stat, gradient_sum=gradients)
    if kind == "activations":
        stats = {name: dataclasses.replace(stat, gradient_sum=None) for name, stat in stats.items()}
    return model, stats


def plan(model: nn.Module, stats: dict[str, lrf.Statistics | None], total: int) -> dict[str, int]:
    """The ranks that leave the least sum of errors."""
    left = {name: lrf.errors(model.get_submodule(name), stat).tolist() for name, stat in stats.items()}
    options = {name: {r: (r, errors[r]) for r in range(1, WIDTH + 1)} for name, errors in left.items()}
    return lrf.allocate(options, total)


def reduced(form: str, kind: str, numbers: int, draw: int, shares: str = "equal", **how: int) -> nn.Module:
    model, stats = parts(form, kind, draw, **how)
    rank = numbers if form == "joint" else numbers // 2
    ranks = plan(model, stats, rank * len(stats)) if shares == "allocated" else dict.fromkeys(stats, rank)
    return lrf.factorize(model, ranks, {name: stat for name, stat in stats.items() if stat is not None})


class PositionAttention(JointAttention):
    """The cache holds what is special about a token; what is usual at its place comes from a table."""

    table: Tensor  # (CONTEXT, 2 WIDTH)

    def keys_values(self, stored: Tensor) -> tuple[Tensor, Tensor]:
        return (self.kv[1](stored) + self.table[: stored.shape[1]]).chunk(2, dim=-1)


@functools.cache
def by_position(draw: int) -> tuple[dict[str, Tensor], dict[str, lrf.Statistics]]:
    """For each joint matrix, the mean input at each place, and the statistics about these means."""
    model, seen = with_joint(dense), {name: [] for name in KV}
    for name, rows in seen.items():
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, rows=rows: rows.append(args[0]))
    with torch.no_grad():
        for batch in windows(text.train, TEXTS, seed=10_000 + draw)[:, :-1].split(16):
            model(batch)
    means, about = {}, {}
    for name, rows in seen.items():
        x = torch.cat(rows).double()
        means[name] = x.mean(0)
        x = (x - means[name]).flatten(0, 1)
        about[name] = dataclasses.replace(statistics(draw)[name], row_sum=x.sum(0), outer_sum=x.T @ x)
    return means, about


def positions_known(numbers: int, draw: int, table_rank: int = WIDTH) -> nn.Module:
    """Joint, loss metric, allocated; with a table of what is usual at each place, cut to a rank if that is less."""
    model, (means, about) = with_joint(dense), by_position(draw)
    ranks = plan(model, about, LAYERS * numbers)
    for name, block in zip(KV, model.blocks):
        kv = lrf.factorize_layer(block.attention.kv, ranks[name], about[name])
        left = block.attention.kv.weight.detach().double() - kv.weight.detach().double()
        A, B = lrf.truncated_svd(means[name] @ left.T, table_rank)
        block.attention.kv = kv
        block.attention.__class__, block.attention.table = PositionAttention, (A @ B).float()
    return model


def grouped(numbers: int) -> nn.Module:
    model = copy.deepcopy(dense)
    for block in model.blocks:
        for name in ("k", "v"):
            setattr(block.attention, name, Grouped(getattr(block.attention, name), numbers // (2 * SIZE)))
    return model


def cut(first: Tensor, second: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Maps (rank, n) of two vectors with these second moments, whose dot products are then closest to the old ones."""
    L, R = torch.linalg.cholesky(first), torch.linalg.cholesky(second)
    U, S, Vh = torch.linalg.svd(L.T @ R)
    root = S[:rank].sqrt()[:, None]
    return root * torch.linalg.solve(L.T, U).T[:rank], root * torch.linalg.solve(R.T, Vh.T).T[:rank]


def per_head(kind: str, numbers: int, draw: int) -> nn.Module:
    """Q with K, and V with O, cut together in each head, with white inputs or with those of calibration text."""
    model, rank = copy.deepcopy(dense), numbers // (2 * HEADS)
    for block, stat in zip(model.blocks, parts("joint", kind, draw)[1].values()):
        old, new = block.attention, Attention()
        C, centred = (torch.eye(WIDTH).double(),) * 2
        if stat is not None:
            C, centred = (stat.covariance(centred=c, ridge=True) for c in (False, True))
        pieces, lost = {name: [] for name in "qkvo"}, torch.zeros(WIDTH).double()
        for head in range(HEADS):
            rows = slice(head * SIZE, (head + 1) * SIZE)
            W = {name: getattr(old, name).weight.detach().double()[rows] for name in "qkv"}
            W["o"] = old.o.weight.detach().double()[:, rows].T
            # what all keys share adds the same to all scores, which the softmax ignores
            maps = dict(zip("qk", cut(W["q"] @ C @ W["q"].T, W["k"] @ centred @ W["k"].T, rank)))
            maps |= zip("ov", cut(W["o"] @ W["o"].T, W["v"] @ centred @ W["v"].T, rank))
            maps["q"] = maps["q"] * math.sqrt(rank / SIZE)  # attention divides by the root of the head size
            for name, part in pieces.items():
                part.append(maps[name] @ W[name])
            if stat is not None:
                lost = lost + (W["o"].T @ W["v"] - pieces["o"][-1].T @ pieces["v"][-1]) @ stat.mean
        new.o = nn.Linear(HEADS * rank, WIDTH)
        new.o.bias = nn.Parameter(lost.float())
        for name, part in pieces.items():
            weight = torch.cat(part).float()
            getattr(new, name).weight = nn.Parameter(weight.T if name == "o" else weight)
        block.attention = new
    return model


def fit(model: nn.Module, steps: int = STEPS, rate: float = RATE) -> nn.Module:
    """Train all weights on the training text, with a warm-up of 20 steps and half a cosine."""
    model = copy.deepcopy(model).requires_grad_().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.1)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / 20, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        batch = windows(text.train, 4, seed=20_000 + step)
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


def losses(model: nn.Module, codes: Tensor) -> Tensor:
    """The mean loss in each of STRETCHES stretches, evenly spread over a text."""
    rows = codes.unfold(0, CONTEXT + 1, (len(codes) - CONTEXT - 1) // (STRETCHES - 1))[:STRETCHES]
    with torch.no_grad():
        parts = [F.cross_entropy(model(x[:, :-1]).transpose(1, 2), x[:, 1:], reduction="none") for x in rows.split(16)]
    return torch.cat(parts).mean(1)


def untrained(record: Callable[..., None]) -> None:
    record("dense", 256, 0, lambda: dense)
    record("joint, not factorized", 128, 0, lambda: with_joint(dense))
    for numbers in (128, 64):
        record("heads averaged", numbers, 0, partial(grouped, numbers))
    for draw in (0, 1, 2):
        for numbers in SIZES:
            for form in ("separate", "joint") if numbers < WIDTH else ("separate",):  # jointly, a half is exact
                for kind in ("plain SVD", "activations", "loss metric"):
                    if draw and (kind == "plain SVD" or (form, kind) == ("separate", "activations")):
                        continue  # the first uses no text, the second is one draw only
                    for shares in ("equal", "allocated") if numbers < WIDTH else ("equal",):
                        make = partial(reduced, form, kind, numbers, draw, shares)
                        record(f"{form}, {kind}, {shares}", numbers, draw, make)
            if numbers < WIDTH:
                record("positions known", numbers, draw, partial(positions_known, numbers, draw))
            if draw == 0 and numbers in (128, 64, 32):
                for kind in ("plain SVD", "activations"):
                    record(f"per head, {kind}", numbers, draw, partial(per_head, kind, numbers, draw))


def trained(record: Callable[..., None]) -> None:
    best = partial(reduced, "joint", "loss metric", draw=0, shares="allocated")
    for method, numbers, rate, make in (
        ("dense", 256, RATE, lambda: dense),
        ("heads averaged", 128, 2 * RATE, partial(grouped, 128)),
        ("joint, loss metric, allocated", 16, RATE, partial(best, 16)),
        ("joint, loss metric, allocated", 32, RATE, partial(best, 32)),
        ("separate, plain SVD, equal", 32, RATE, partial(reduced, "separate", "plain SVD", 32, 0)),
    ):
        record(f"{method}, {STEPS} steps", numbers, 0, lambda m=make, lr=rate: fit(m(), STEPS, lr))


def choices(record: Callable[..., None]) -> None:
    """Settings. Here the text that measures is the validation text."""
    best = partial(reduced, "joint", "loss metric", draw=0, shares="allocated")
    for texts in (4, 16, 64):
        record(f"joint, loss metric, allocated, {texts} texts", 32, 0, partial(best, 32, texts=texts))
    record("joint, loss metric, allocated, 4 characters drawn", 32, 0, partial(best, 32, draws=4))
    for rank in (16, 64, 128):
        record(f"positions known, table of rank {rank}", 32, 0, partial(positions_known, 32, 0, rank))
    for name, numbers, make in (
        ("joint, loss metric, allocated", 16, partial(best, 16)),
        ("heads averaged", 128, partial(grouped, 128)),
    ):
        for rate in (5e-4, 1e-3, 2e-3):
            record(f"{name}, 30 steps, rate {rate}", numbers, 0, lambda m=make, lr=rate: fit(m(), 30, lr))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--validate", action="store_true", help="try settings on validation text")
    parser.add_argument("--parts", nargs="+", choices=("untrained", "trained"), default=["untrained", "trained"])
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "kv_cache.csv")
    options = parser.parse_args()
    codes, runs = text.test, [{"untrained": untrained, "trained": trained}[part] for part in options.parts]
    if options.validate:
        codes, runs = text.validation, [choices]
        options.out = options.out.with_name("kv_cache_validation.csv")
    if not options.out.exists():
        with options.out.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(COLUMNS)
    before = losses(dense, codes)

    def record(method: str, numbers: int, draw: int, make: Callable[[], nn.Module]) -> None:
        with options.out.open(newline="") as file:
            rows = {(row["method"], row["numbers"], row["draw"]) for row in csv.DictReader(file)}
        if (method, str(numbers), str(draw)) in rows:
            return
        start = time.perf_counter()
        after = losses(make(), codes)
        more = after - before
        half = 1.96 * more.std() / math.sqrt(len(more))
        with options.out.open("a", newline="") as file:
            values = [f"{value:.5f}" for value in (after.mean(), more.mean(), half)]
            csv.writer(file, lineterminator="\n").writerow([method, numbers, draw, *values])
        seconds = time.perf_counter() - start
        print(f"{method}, {numbers}, draw {draw}: {more.mean():+.4f} ± {half:.4f} ({seconds:.0f} s)", flush=True)

    for run in runs:
        run(record)


if __name__ == "__main__":
    main()
