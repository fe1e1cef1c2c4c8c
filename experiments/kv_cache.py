"""The loss of lesson 9's decoder with smaller caches: results/kv_cache.csv.

    python -m experiments.kv_cache [--parts untrained trained] [--out FOLDER]
    python -m experiments.kv_cache --validate

About ten minutes on one thread. A row is a method at a size of the cache, in numbers per token
and layer (256 without compression), with one of three draws of calibration text from the first
90 % of the Bible. Losses are those of 64 sequences of the test text, in nats per character. The
increase is that over the decoder as it is, paired by sequence, with half of its 95 % interval.
Settings were chosen on the validation text: ``--validate`` writes kv_cache_validation.csv.
"""

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lrf_utils as lrf
from experiments.common import Table, parse
from experiments.decoder import next_character_loss
from experiments.models import (
    Attention,
    Decoder,
    by_position,
    cut,
    load_decoder,
    load_text,
    losses,
    positions_known,
    shared_out,
    stretches,
    windows,
    with_joint,
)
from experiments.training import fit

COLUMNS = ["method", "numbers", "draw", "loss", "increase", "half of 95 %"]
SIZES = (128, 64, 32, 16)  # numbers per token and layer
WIDTH, HEADS, LAYERS, SIZE = 128, 4, 4, 32  # of the decoder; SIZE is that of a head
KV = [f"blocks.{i}.attention.kv" for i in range(LAYERS)]
TEXTS, STEPS, RATE = 64, 150, 1e-3
BEST = "joint, loss metric, allocated"

Run = tuple[str, int, int, Callable[[], nn.Module]]  # method, numbers, draw, how it is made

text = functools.cache(load_text)
dense = functools.cache(load_decoder)


# --- Calibration ---


def calibration(draw: int, texts: int = TEXTS) -> tuple[Tensor, ...]:
    return windows(text().train, texts, seed=10_000 + draw)[:, :-1].split(16)


def drawn_loss(seed: int, draws: int) -> Callable[[Tensor], Iterator[Tensor]]:
    """As ``loss="tokens"``, with more than one character drawn at each position."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(logits: Tensor) -> Iterator[Tensor]:
        logits = logits.flatten(0, 1)
        for _ in range(draws):
            characters = torch.multinomial(logits.detach().softmax(1), 1, generator=generator)
            yield F.cross_entropy(logits, characters[:, 0], reduction="sum")

    return drawn


@functools.cache
def statistics(draw: int, texts: int = TEXTS, draws: int = 1) -> dict[str, lrf.Statistics]:
    loss = "tokens" if draws == 1 else drawn_loss(draw, draws)
    return lrf.collect_statistics(
        with_joint(dense()), calibration(draw, texts), KV, loss=loss, seed=draw
    )


# --- Ways to a smaller cache ---


def with_bias(layer: nn.Linear) -> nn.Linear:
    """The same layer with a bias of 0, which can hold a mean, as that of a joint matrix does."""
    new = nn.Linear(layer.in_features, layer.out_features)
    new.weight = layer.weight
    nn.init.zeros_(new.bias)
    return new


def parts(form: str, kind: str, draw: int, **how: int) -> tuple[Decoder, dict]:
    """The decoder in that form, and for each of its matrices the statistics that ``kind`` uses."""
    model, known = with_joint(dense()), dict.fromkeys(KV)
    if kind != "plain SVD":
        known = statistics(draw, **how)
    if kind == "activations":
        known = {name: dataclasses.replace(s, gradient_sum=None) for name, s in known.items()}
    if form == "joint":
        return model, known
    model, separate = copy.deepcopy(dense()), {}
    for block, (name, joint) in zip(model.blocks, known.items()):
        # K is the upper half of the joint matrix, V the lower one
        for letter, rows in (("k", slice(0, WIDTH)), ("v", slice(WIDTH, None))):
            setattr(block.attention, letter, with_bias(getattr(block.attention, letter)))
            own = joint
            if joint is not None and joint.gradient_sum is not None:
                own = dataclasses.replace(joint, gradient_sum=joint.gradient_sum[rows, rows])
            separate[name.replace("kv", letter)] = own
    return model, separate


def reduced(form: str, kind: str, shares: str, numbers: int, draw: int, **how: int) -> nn.Module:
    model, known = parts(form, kind, draw, **how)
    rank = numbers if form == "joint" else numbers // 2
    ranks = dict.fromkeys(known, rank)
    if shares == "allocated":
        ranks = shared_out(model, known, rank * len(known))
    return lrf.factorize(model, ranks, None if kind == "plain SVD" else known)


def by_its_position(numbers: int, draw: int, table_rank: int | None = None) -> nn.Module:
    """Joint, loss metric, allocated, with a table for each position, or a cut one."""
    joint = with_joint(dense())
    means, about = by_position(joint, calibration(draw), statistics(draw))
    model = positions_known(joint, shared_out(joint, about, LAYERS * numbers), means, about)
    if table_rank is not None:
        for block in model.blocks:
            A, B = lrf.truncated_svd(block.attention.table, table_rank)
            block.attention.table = A @ B
    return model


class Grouped(nn.Module):
    """In place of ``k`` or ``v``: the mean of a group's heads, handed to all of the group."""

    def __init__(self, layer: nn.Linear, groups: int):
        super().__init__()
        self.groups = groups
        heads = layer.weight.detach().view(groups, -1, SIZE, WIDTH)
        self.mean = nn.Linear(WIDTH, groups * SIZE, bias=False)
        self.mean.weight = nn.Parameter(heads.mean(1).flatten(0, 1))

    def forward(self, x: Tensor) -> Tensor:
        heads = self.mean(x).unflatten(-1, (self.groups, SIZE))
        return heads.repeat_interleave(HEADS // self.groups, dim=-2).flatten(-2)


def heads_averaged(numbers: int) -> nn.Module:
    model, groups = copy.deepcopy(dense()), numbers // (2 * SIZE)
    for block in model.blocks:
        block.attention.k = Grouped(block.attention.k, groups)
        block.attention.v = Grouped(block.attention.v, groups)
    return model


def per_head(kind: str, numbers: int, draw: int) -> nn.Module:
    """Q with K, and V with O, cut together in each head, for white inputs or for real ones."""
    model = copy.deepcopy(dense())
    for block, known in zip(model.blocks, parts("joint", kind, draw)[1].values()):
        block.attention = cut_heads(block.attention, known, numbers // (2 * HEADS))
    return model


def cut_heads(old: Attention, known: lrf.Statistics | None, rank: int) -> Attention:
    second = centered = torch.eye(WIDTH).double()  # moments of the inputs
    mean = torch.zeros(WIDTH).double()
    if known is not None:
        second = known.covariance(centered=False, ridge=True)
        centered, mean = known.covariance(ridge=True), known.mean
    pieces, lost = {name: [] for name in "qkvo"}, torch.zeros(WIDTH).double()
    for head in range(HEADS):
        rows = slice(head * SIZE, (head + 1) * SIZE)
        W = {name: getattr(old, name).weight.detach().double()[rows] for name in "qkv"}
        W["o"] = old.o.weight.detach().double()[:, rows].T
        # what all keys share adds the same to all scores, which the softmax ignores
        keys, values = W["k"] @ centered @ W["k"].T, W["v"] @ centered @ W["v"].T
        to_q, to_k, _ = cut(W["q"] @ second @ W["q"].T, keys, rank)
        to_o, to_v, _ = cut(W["o"] @ W["o"].T, values, rank)
        # attention divides by the root of the head size, which has changed
        new = {"q": math.sqrt(rank / SIZE) * to_q @ W["q"], "k": to_k @ W["k"]}
        new |= {"v": to_v @ W["v"], "o": to_o @ W["o"]}
        for name, piece in new.items():
            pieces[name].append(piece)
        lost = lost + (W["o"].T @ W["v"] - new["o"].T @ new["v"]) @ mean
    model = Attention()
    model.o = nn.Linear(HEADS * rank, WIDTH)
    for name in "qkv":
        getattr(model, name).weight = nn.Parameter(torch.cat(pieces[name]).float())
    model.o.weight = nn.Parameter(torch.cat(pieces["o"]).float().T)
    model.o.bias = nn.Parameter(lost.float())
    return model


def trained(make: Callable[[], nn.Module], steps: int, rate: float) -> nn.Module:
    """All weights, on the training text, with a warm-up of 20 steps and half a cosine."""
    model = copy.deepcopy(make()).requires_grad_().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / 20, 0.5 + 0.5 * math.cos(math.pi * step / steps)),
    )
    batches = (windows(text().train, 4, seed=20_000 + step) for step in range(steps))
    fit(batches, lambda batch: next_character_loss(model, batch), optimizer, schedule, clip=1)
    return model.eval()


# --- The runs ---


def untrained_runs() -> Iterator[Run]:
    yield "dense", 256, 0, dense
    yield "joint, not factorized", 128, 0, lambda: with_joint(dense())
    for numbers in (128, 64):
        yield "heads averaged", numbers, 0, partial(heads_averaged, numbers)
    for draw in (0, 1, 2):
        for numbers in SIZES:
            for form, kind, shares in ways(numbers, draw):
                make = partial(reduced, form, kind, shares, numbers, draw)
                yield f"{form}, {kind}, {shares}", numbers, draw, make
            if numbers < WIDTH:
                yield "positions known", numbers, draw, partial(by_its_position, numbers, draw)
            if draw == 0 and numbers > 16:
                for kind in ("plain SVD", "activations"):
                    make = partial(per_head, kind, numbers, draw)
                    yield f"per head, {kind}", numbers, draw, make


def ways(numbers: int, draw: int) -> Iterator[tuple[str, str, str]]:
    """Forms, metrics and shares. Jointly, half of the cache is exact, so only K and V are cut."""
    for form in ("separate", "joint") if numbers < WIDTH else ("separate",):
        for kind in ("plain SVD", "activations", "loss metric"):
            uses_no_text = kind == "plain SVD"
            only_once = (form, kind) == ("separate", "activations")
            if draw == 0 or not (uses_no_text or only_once):
                for shares in ("equal", "allocated") if numbers < WIDTH else ("equal",):
                    yield form, kind, shares


def trained_runs() -> Iterator[Run]:
    best = partial(reduced, "joint", "loss metric", "allocated", draw=0)
    separate = partial(reduced, "separate", "plain SVD", "equal", 32, 0)
    for method, numbers, rate, make in (
        ("dense", 256, RATE, dense),
        ("heads averaged", 128, 2 * RATE, partial(heads_averaged, 128)),
        (BEST, 16, RATE, partial(best, 16)),
        (BEST, 32, RATE, partial(best, 32)),
        ("separate, plain SVD, equal", 32, RATE, separate),
    ):
        yield f"{method}, {STEPS} steps", numbers, 0, partial(trained, make, STEPS, rate)


def validation_runs() -> Iterator[Run]:
    best = partial(reduced, "joint", "loss metric", "allocated", draw=0)
    for texts in (4, 16, 64):
        yield f"{BEST}, {texts} texts", 32, 0, partial(best, 32, texts=texts)
    yield f"{BEST}, 4 characters drawn", 32, 0, partial(best, 32, draws=4)
    for rank in (16, 64, 128):
        make = partial(by_its_position, 32, 0, rank)
        yield f"positions known, table of rank {rank}", 32, 0, make
    for name, numbers, make in (
        (BEST, 16, partial(best, 16)),
        ("heads averaged", 128, partial(heads_averaged, 128)),
    ):
        for rate in (5e-4, 1e-3, 2e-3):
            yield f"{name}, 30 steps, rate {rate}", numbers, 0, partial(trained, make, 30, rate)


def main() -> None:
    runs = {"untrained": untrained_runs, "trained": trained_runs}
    options = parse(__doc__, runs)
    name, codes, chosen = "kv_cache.csv", text().test, [runs[part] for part in options.parts]
    if options.validate:
        name, codes, chosen = "kv_cache_validation.csv", text().validation, [validation_runs]
    table = Table(options.out / name, COLUMNS, key=COLUMNS[:3])
    rows = stretches(codes, 64)
    before = losses(dense(), rows)

    def measure(make: Callable[[], nn.Module]) -> dict[str, str]:
        after = losses(make(), rows)
        more = after - before
        half = 1.96 * more.std() / math.sqrt(len(more))
        values = (after.mean(), more.mean(), half)
        return dict(zip(COLUMNS[3:], (f"{value:.5f}" for value in values)))

    for run in chosen:
        for method, numbers, draw, make in run():
            row = {"method": method, "numbers": numbers, "draw": draw}
            table.add(row, partial(measure, make))


if __name__ == "__main__":
    main()
