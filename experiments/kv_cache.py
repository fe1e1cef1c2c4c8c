"""SmolLM2 with a smaller cache: results/kv_cache.csv, which lesson 9 reads.

    python -m experiments.kv_cache [--validate] [--out FOLDER]

A row for each model and kind of text has the mean loss of each window in ``losses``, so that any
two models can be compared. "repeated" is text that is given twice; the second time counts. Bytes
are per token and layer, all scales counted; "at 1024" and "at 4096" also count the tokens that are
kept in full, the first ``sinks`` and the last ``recent`` ones, spread over so many tokens. All
models run in bfloat16 where autocast allows it. With ``--validate``: kv_cache_validation.csv.

That the first tokens have to stay in full was found on test text: 9 sequences of 512 tokens, each
the first ones of a third of a text. The windows here begin later in each third.
"""

import functools
import os
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lrf_utils as lrf
import notebook_utils as nb
from experiments import cache_bits as cb
from experiments import latent_cache as lc
from experiments import smollm
from experiments.common import Table, parse
from experiments.smollm import KINDS

COLUMNS = ["method", "ranks", "numbers", "bits", "sinks", "recent"]
COLUMNS += ["bytes", "at 1024", "at 4096", "kind", "losses"]
FOLDER = nb.ROOT / "build" / "kv_cache"
LENGTH = 1024  # tokens of a window
CALIBRATION = (16, 256)  # windows of each kind, and their tokens
FULL, NONE = (4, 32), (0, 0)  # first and last tokens that are kept in full

# Methods, their size (numbers, bits or bytes) and the tokens in full. A row takes a minute of one
# idle core. Others that can be added: (JOINT, 192, (4, 0)), (JOINT + ", 4 bits", 160, FULL),
# (JOINT + ", all tokens", 96, FULL), (FIXED, 76, FULL).
JOINT, KEYS, TOKEN = "joint, loss metric", "keys per channel", "per token"
CODED = "bits by channel, "  # of the joint factor, of a PCA of K and V, or of K and V themselves
GROUPS, PCA, OWN = CODED + "groups of 32", CODED + "activations", CODED + "no basis"
FIXED = CODED + "fixed steps"
ROWS = [("dense", 768, NONE), (JOINT, 192, FULL), ("window", 0, FULL), (JOINT, 96, FULL)]
ROWS += [(KEYS, 2, FULL), ("joint, activations", 192, FULL), (GROUPS, 100, FULL), (KEYS, 4, FULL)]
ROWS += [("joint, plain SVD", 192, FULL), (PCA, 100, FULL), (TOKEN, 4, NONE), (GROUPS, 76, FULL)]
ROWS += [("joint, activations", 96, FULL), (JOINT, 192, NONE), (TOKEN, 2, FULL)]
ROWS += [("separate, activations", 192, FULL), (JOINT + ", own ranks", 96, FULL), (KEYS, 3, FULL)]
ROWS += [
    (JOINT + ", own ranks", 192, FULL),
    (TOKEN, 4, FULL),
    (KEYS, 8, FULL),
    (GROUPS, 144, FULL),
]
ROWS += [("separate, loss metric", 192, FULL)]

# --- The model, texts, statistics ----------------------------------------------------------------

original = functools.cache(nb.load_smollm2)


def dense() -> nn.Module:
    return original()[0]


@functools.cache
def windows(part: str, kind: str) -> Tensor:
    """Of each third of a text, after its first fifth, two windows; of validation text one."""
    if kind == "repeated":
        half = torch.cat([windows(part, each)[:1, : LENGTH // 2] for each in KINDS])
        return half.repeat(1, 2)
    text, count = smollm.load_texts()[kind][part], 2 if part == "test" else 1
    third = len(text) // 3
    pieces = [text[third * i + third // 5 : third * (i + 1)] for i in range(3)]
    found = [smollm.token_windows(original()[1], piece, count, LENGTH) for piece in pieces]
    return torch.cat(found)


def collected(name: str, kind: str) -> dict[str, lrf.Statistics]:
    """Of the layers ``kv``, on calibration text of one kind; kept in a file.

    "near": weighted by gradients, which reach a layer only by way of tokens that are not kept in
    full; "plain": by way of all tokens; "inputs": of the inputs alone, without the first tokens.
    """
    path = FOLDER / f"{name} {kind}.pt"
    if not path.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        model = lc.with_latent_cache(dense(), *(FULL if name == "near" else NONE))
        # Every other one of twice as many: the last half of a text would be left out otherwise.
        ids = smollm.windows_of(original()[1], "calibration", 2 * CALIBRATION[0], CALIBRATION[1])
        how = {"mask_of": lambda ids: (torch.arange(ids.shape[1]) >= FULL[0]).expand(ids.shape)}
        if name != "inputs":
            how = {"loss": "tokens", "weighted": True}
            model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
        found = lrf.collect_statistics(model, ids[kind][::2].split(1), lc.kv_names(model), **how)
        torch.save({layer: vars(each) for layer, each in found.items()}, path.with_suffix(".part"))
        os.replace(path.with_suffix(".part"), path)
    found = torch.load(path, weights_only=True, mmap=True)
    return {layer: lrf.Statistics(**each) for layer, each in found.items()}


@functools.cache
def statistics(name: str) -> dict[str, lrf.Statistics]:
    """Of all kinds: sums add up."""
    first, *others = (collected(name, kind) for kind in KINDS)
    for other in others:
        first = {layer: first[layer] + other[layer] for layer in first}
    return first


# --- Smaller caches ------------------------------------------------------------------------------


def with_ranks(method: str, numbers: int, full: tuple[int, int] = FULL) -> nn.Module:
    form, kind, *more = method.split(", ")
    model, known = lc.with_latent_cache(dense(), *full), None
    if kind != "plain SVD":
        name = "near" if full[0] and "all tokens" not in more else "plain"
        known = statistics("inputs" if kind == "activations" else name)
    chosen: dict = dict.fromkeys(lc.kv_names(model), numbers)
    if "own ranks" in more:
        chosen = lc.cache_ranks(model, known, numbers)
    if form == "separate":
        for name in chosen:
            layer = model.get_submodule(name)
            chosen[name] = lc.separate(layer, numbers, known and known[name])
        return lrf.factorize(model, chosen)
    model = lrf.factorize(model, chosen, known, add_bias=known is not None)
    if "4 bits" in more:  # the same for each number, per channel over 32 tokens
        cb.with_bits(model, partial(cb.round_groups, bits=4, dim=-2, size=32))
    return model


def with_bits(how: Callable[[Tensor], Tensor], full: tuple[int, int]) -> nn.Module:
    return cb.with_bits(lc.with_latent_cache(dense(), *full), how)


def with_codes(method: str, size: float, full: tuple[int, int]) -> nn.Module:
    known, seen = statistics("near" if full[0] else "plain"), statistics("inputs")
    how = {"rotate": method != OWN}
    if method == FIXED:
        how |= {"group": None, "seen": seen}
    model = lc.with_latent_cache(dense(), *full)
    return cb.with_coded_cache(model, seen if method == PCA else known, size, **how)


def with_window(full: tuple[int, int]) -> nn.Module:
    model = lc.with_latent_cache(dense(), *full)
    for block in model.model.layers:
        block.self_attn.window = True
    return model


# --- The runs ------------------------------------------------------------------------------------


def run_of(method: str, size: int, full: tuple[int, int]) -> tuple[dict, Callable[[], nn.Module]]:
    """A row without its kind and its losses, and what makes its model."""
    numbers, bits, ranks = 384, 16, ""
    if method == "dense":
        cost, make = 768, dense
    elif method == "window":
        cost, make = 0, partial(with_window, full)
    elif method in (KEYS, TOKEN):
        how, group = (cb.kivi_bits, 32) if method == KEYS else (cb.naive_bits, 64)
        bits, cost = size, cb.cache_bytes(384, size, group)
        make = partial(with_bits, partial(how, bits=size), full)
    elif method.startswith(CODED):
        bits, cost, make = round(8 * size / 384, 2), size, partial(with_codes, method, size, full)
    else:
        numbers, bits = size, 4 if "4 bits" in method else 16
        ranks, cost = "own" if "own" in method else "equal", cb.cache_bytes(size, bits, 32)
        make = partial(with_ranks, method, size, full)
    name = method.removesuffix(", own ranks").removesuffix(", 4 bits")
    spread = [f"{cost + sum(full) * (768 - cost) / count:.0f}" for count in (1024, 4096)]
    return dict(zip(COLUMNS, (name, ranks, numbers, bits, *full, f"{cost:g}", *spread))), make


@torch.no_grad()
def losses(make: Callable[[], nn.Module], part: str, kind: str) -> dict[str, str]:
    model, found = make(), []
    for ids in windows(part, kind):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(ids[None], use_cache=False).logits[0, :-1]
        each = F.cross_entropy(logits.float(), ids[1:], reduction="none")
        found.append(each[LENGTH // 2 - 1 if kind == "repeated" else 0 :].mean())
    return {"losses": " ".join(f"{loss:.4f}" for loss in found)}


def main() -> None:
    options = parse(__doc__, ("cache",))
    part, name = ("validation", "_validation") if options.validate else ("test", "")
    table = Table(options.out / f"kv_cache{name}.csv", COLUMNS, [*COLUMNS[:7], "kind"])
    for each in ROWS:
        row, make = run_of(*each)
        make = functools.cache(make)
        for kind in (*KINDS, "repeated"):
            table.add({**row, "kind": kind}, partial(losses, make, part, kind))


if __name__ == "__main__":
    main()
