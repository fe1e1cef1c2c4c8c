"""SmolLM2 with fewer weights, and with a smaller cache: results/language_model*.csv.

    python -m experiments.language_model [--parts linear cache layers] [--out FOLDER]

Four rows for each model: its perplexity on test text of three kinds and on all together, and the
logarithm of the ratio to that of the dense model, with a 95 % interval over windows, paired. The
calibration text is other text of the same kinds. Statistics stay in build/language_model; what
they took goes to language_model_times.csv. With ``--validate`` on validation text instead:
language_model_validation.csv. Minutes of one idle core: statistics 6, a row one half to two.
"""

import functools
import itertools
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

import lrf_utils as lrf
import notebook_utils as nb
from experiments import smollm
from experiments.common import Table, parse
from experiments.smollm import KINDS

COLUMNS = ["part", "method", "ranks", "size", "bits", "bytes", "text"]
COLUMNS += ["windows", "perplexity", "log ratio", "low", "high"]
KEY = ["part", "method", "ranks", "size", "bits", "text"]
TIMES = ["what", "layers", "tokens", "CPU seconds", "wall seconds"]
LAYERS = ["layer", "rank", "predicted", "KL", "loss"]  # nats per token, more than dense

CALIBRATION = {"weighted": 16, "activations": 16, "cache": 8}  # windows of each kind
TEST = {"linear": (6, 256), "cache": (3, 512)}  # windows of each kind, and their tokens

# --- What is measured ----------------------------------------------------------------------------

SHARES = ((0.9, 0.8), (0.7, 0.5))  # of the 106 million weights in 210 layers
LINEAR = {  # method, and how its ranks are chosen
    "weighted metric": ("own", "corrected", "equal"),
    "SVD-LLM": ("own", "equal"),
    "SVD-LLM without ridge": ("equal",),
    "plain SVD": ("own", "equal"),
    "FWSVD": ("own", "equal"),
    "ASVD": ("own", "equal"),
    "AFM": ("own", "equal"),
}
# Numbers per token and layer, 384 without compression, and bits for each.
MANY_SIZES = ((192, 16), (160, 16), (128, 16), (96, 16), (192, 4), (160, 4), (128, 4))
MANY_SIZES += ((160, 8), (160, 3))
FEW_SIZES = ((192, 16), (96, 16), (160, 4))
ONLY_BITS = ((384, 4), (384, 2), (384, 3), (384, 8))
CODED = ((100, 32), (144, 32), (100, 64), (120, 32), (76, 64), (192, 32))  # bytes, group
CACHE = (
    ("joint, weighted metric", "equal", MANY_SIZES),
    ("joint, weighted metric, per token", "equal", ((160, 4),)),
    ("joint, weighted metric", "own", FEW_SIZES),
    ("joint, activations", "equal", FEW_SIZES),
    ("joint, plain SVD", "equal", FEW_SIZES),
    ("separate, weighted metric", "equal", FEW_SIZES),
    ("separate, activations", "equal", FEW_SIZES),
    ("separate, plain SVD", "equal", FEW_SIZES),
    ("keys per channel", "", ONLY_BITS),
    ("per token", "", ONLY_BITS),
)

Statistics = Mapping[str, lrf.Statistics]

# --- The model, texts, statistics ----------------------------------------------------------------

FOLDER = nb.ROOT / "build" / "language_model"
BY_LAYER = nb.ROOT / "results" / "language_model_layers.csv"
original = functools.cache(nb.load_smollm2)


def dense() -> nn.Module:
    return original()[0]


@functools.cache
def cached() -> nn.Module:
    return smollm.with_latent_cache(dense())


@functools.cache
def names() -> list[str]:
    """The 210 linear layers; the head is tied to the embedding table and stays."""
    parts = dense().model.layers.named_modules(prefix="model.layers")
    return [name for name, part in parts if isinstance(part, nn.Linear)]


def calibration(name: str) -> list[Tensor]:
    windows = smollm.windows_of(original()[1], "calibration", CALIBRATION[name])
    # Of each kind in turn, two at a time.
    return list(torch.stack(list(windows.values()), 1).flatten(0, 1).split(2))


def saved(name: str, make: Callable[[], Any], layers: int) -> Any:
    """What ``make()`` returns, kept in a file; the time it took goes to the table."""
    path = FOLDER / f"{name}.pt"
    if not path.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        wall, cpu = time.perf_counter(), time.process_time()
        result = make()
        torch.save(result, path.with_suffix(".part"))
        os.replace(path.with_suffix(".part"), path)
        seconds = [f"{time.process_time() - cpu:.0f}", f"{time.perf_counter() - wall:.0f}"]
        row = [name, layers, CALIBRATION.get(name, 0) * len(KINDS) * 256, *seconds]
        times().add(dict(zip(TIMES, row)), dict)
    return torch.load(path, weights_only=True, mmap=True)


def times() -> Table:
    return Table(FOLDER / "language_model_times.csv", TIMES, TIMES[:1])


def collected(name: str, model: nn.Module, layers: list[str], **how: Any) -> Statistics:
    def make() -> dict[str, dict]:
        batches = calibration(name)
        found = lrf.collect_statistics(model, batches, layers, progress=True, **how)
        return {layer: vars(each) for layer, each in found.items()}

    found = saved(name, make, len(layers))
    return {layer: lrf.Statistics(**each) for layer, each in found.items()}


@functools.cache
def weighted() -> Statistics:
    return collected("weighted", dense(), names(), loss="tokens", weighted=True)


@functools.cache
def activations() -> Statistics:
    """Of the inputs alone. Q, K and V have the same, gate and up too."""
    first = [name for name in names() if name.split(".")[-1] in ("q_proj", "o_proj", "gate_proj")]
    first += [name for name in names() if name.endswith("down_proj")]
    found = collected("activations", dense(), first)
    same = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
    result = {}
    for name in names():
        block, _, last = name.rpartition(".")
        result[name] = found[f"{block}.{same.get(last, last)}"]
    return result


@functools.cache
def of_cache() -> Statistics:
    layers = smollm.kv_names(cached())
    smollm.with_bits(cached(), None)
    return collected("cache", cached(), layers, loss="tokens", weighted=True)


@functools.cache
def by_size() -> Statistics:
    return smollm.asvd_statistics(dense(), names(), calibration("activations")[::2])


@functools.cache
def by_gradient() -> Statistics:
    return smollm.fwsvd_statistics(dense(), names(), calibration("activations")[::2])


# --- Fewer weights -------------------------------------------------------------------------------


def statistics_of(method: str) -> Statistics | None:
    """What a method knows; each published one is a covariance of its own for our factors."""
    if method == "plain SVD":
        return None
    if method == "weighted metric":
        return weighted()
    if method == "ASVD":
        return by_size()
    if method == "FWSVD":
        return by_gradient()
    if method == "SVD-LLM without ridge":
        return {name: smollm.without_ridge(each) for name, each in activations().items()}
    return activations()  # SVD-LLM; with a bias for the mean, AFM


@functools.cache
def options() -> dict[str, dict[int | None, tuple[float, float]]]:
    make = partial(lrf.rank_options, dense(), weighted(), multiple_of=16)
    return saved("options", make, len(names()))


def corrected_options() -> dict[str, dict[int | None, tuple[float, float]]]:
    """With each layer's errors times what its loss really changed by, over the prediction."""
    rows = pd.read_csv(BY_LAYER).set_index("layer")
    factors, result = rows["KL"] / rows["predicted"], {}
    for name, table in options().items():
        factor = float(factors[name])
        result[name] = {rank: (cost, factor * error) for rank, (cost, error) in table.items()}
    return result


@functools.cache
def plan(ranks: str, kept: float) -> dict[str, int | None]:
    if ranks == "equal":
        return smollm.equal_ranks(dense(), names(), kept)
    table = options() if ranks == "own" else corrected_options()
    return lrf.allocate_ranks(table, kept * sum(table[name][None][0] for name in table))


def small(method: str, ranks: str, kept: float) -> nn.Module:
    known = statistics_of(method)
    return lrf.factorize(dense(), plan(ranks, kept), known, add_bias=method == "AFM")


def linear_runs() -> Iterator[tuple]:
    yield "dense", "", 1.0, 16, "", dense
    pairs = [(method, each) for method, ways in LINEAR.items() for each in ways]
    known = BY_LAYER.exists() and len(pd.read_csv(BY_LAYER)) == len(names())
    for shares in SHARES:
        for (method, ranks), kept in itertools.product(pairs, shares):
            if ranks != "corrected" or known:  # when the part "layers" has run
                yield method, ranks, kept, 16, "", partial(small, method, ranks, kept)


# --- A smaller cache -----------------------------------------------------------------------------


def cache_statistics(kind: str) -> Statistics | None:
    if kind == "plain SVD":
        return None
    if kind == "weighted metric":
        return of_cache()
    return {name: activations()[name.replace(".kv", ".k_proj")] for name in of_cache()}


def with_codes(size: int, group: int) -> nn.Module:
    smollm.with_bits(cached(), None)
    return smollm.with_coded_cache(cached(), of_cache(), size, group)


@functools.lru_cache(1)
def latent(method: str, ranks: str, numbers: int) -> nn.Module:
    form, _, kind = method.partition(", ")
    known = cache_statistics(kind)
    layers = smollm.kv_names(cached())
    chosen: dict[str, Any] = dict.fromkeys(layers, numbers)
    if ranks == "own":
        chosen = smollm.cache_ranks(cached(), known, numbers)
    if form == "separate":
        for name in layers:
            layer = cached().get_submodule(name)
            chosen[name] = smollm.separate(layer, numbers, known and known[name])
        return lrf.factorize(cached(), chosen)
    return lrf.factorize(cached(), chosen, known, add_bias=known is not None)


def with_cache(method: str, ranks: str, numbers: int, bits: int) -> nn.Module:
    if method in ("keys per channel", "per token"):
        how = smollm.kivi_bits if method == "keys per channel" else smollm.naive_bits
        return smollm.with_bits(cached(), partial(how, bits=bits))
    per_token = method.endswith(", per token")  # in place of per channel over 32 tokens
    how = partial(smollm.round_groups, bits=bits, dim=-1 if per_token else -2, size=32)
    model = latent(method.removesuffix(", per token"), ranks, numbers)
    return smollm.with_bits(model, None if bits == 16 else how)


def cache_runs() -> Iterator[tuple]:
    yield "dense", "", 384, 16, 768, dense
    for size, group in CODED:
        method = f"bits by channel, groups of {group}"
        yield method, "equal", 384, f"{8 * size / 384:.2f}", size, partial(with_codes, size, group)
    for method, ranks, sizes in CACHE:
        for numbers, bits in sizes:
            group = 64 if method == "per token" else 32
            size = smollm.cache_bytes(numbers, bits, group)
            make = partial(with_cache, method, ranks, numbers, bits)
            yield method, ranks, numbers, bits, f"{size:g}", make


# --- The prediction, layer by layer --------------------------------------------------------------


@torch.no_grad()
def log_probabilities(model: nn.Module, windows: Tensor) -> Tensor:
    return model(windows, use_cache=False).logits.log_softmax(-1)


def measure_layers(out: Path) -> None:
    """Each layer alone at half of its weights: what the loss changes by, and the prediction."""
    table = Table(out / "language_model_layers.csv", LAYERS, LAYERS[:1])
    windows = smollm.windows_of(original()[1], "validation", 1)
    ids = torch.cat(list(windows.values()))
    before = functools.cache(lambda: log_probabilities(dense(), ids))

    def measure(name: str, rank: int) -> dict[str, str]:
        errors = lrf.truncation_errors(dense().get_submodule(name), weighted()[name])
        model = lrf.factorize(dense(), {name: rank}, weighted())
        after = log_probabilities(model, ids)
        divergence = (before().exp() * (before() - after)).sum(-1).mean()
        loss = (before() - after)[:, :-1].gather(2, ids[:, 1:, None]).mean()
        predicted = errors[rank] / 2 / 256  # the metric sums over the tokens of a window
        values = {"predicted": predicted, "KL": divergence, "loss": loss}
        return {key: f"{value:.6f}" for key, value in values.items()}

    for name, rank in smollm.equal_ranks(dense(), names(), 0.5).items():
        table.add({"layer": name, "rank": rank}, partial(measure, name, rank))


# --- The table -----------------------------------------------------------------------------------


@functools.cache
def losses(make: Callable[[], nn.Module], part: str, text: str) -> dict[str, Tensor]:
    """Of each window, by the kind of its text."""
    windows, model = smollm.windows_of(original()[1], text, *TEST[part]), make()
    found = {kind: smollm.window_losses(model, windows[kind]) for kind in KINDS}
    return {**found, "all": torch.cat(list(found.values()))}


def record(table: Table, part: str, text: str, runs: Iterator[tuple]) -> None:
    before = partial(losses, dense, part, text)

    def scores(after: Callable[[], dict[str, Tensor]], kind: str) -> dict[str, Any]:
        change = nb.interval((after()[kind] - before()[kind]).double())
        values = [f"{smollm.perplexity(after()[kind]):.3f}", *(f"{x:.4f}" for x in change)]
        return dict(zip(COLUMNS[7:], [len(after()[kind]), *values]))

    for *values, make in runs:
        after = partial(losses, make, part, text)
        for kind in ("all", *KINDS):
            row = dict(zip(COLUMNS, [part, *values, kind]))
            table.add(row, partial(scores, after, kind))


def main() -> None:
    options = parse(__doc__, ("linear", "cache", "layers"))
    name, text = "language_model.csv", "test"
    if options.validate:
        name, text = "language_model_validation.csv", "validation"
    for part in options.parts:
        if part == "layers":
            measure_layers(options.out)
            continue
        runs = linear_runs() if part == "linear" else cache_runs()
        record(Table(options.out / name, COLUMNS, KEY), part, text, runs)
    shutil.copy(times().path, options.out)


if __name__ == "__main__":
    main()
