"""SmolLM2 with fewer weights: results/language_model*.csv.

    python -m experiments.language_model [--parts linear layers …] [--out FOLDER]

A row for each model and kind of text: the mean loss of each of 16 test windows of 256 tokens, so
that any two models can be compared window by window (``smollm.change``). The calibration text is
other text of the same kinds, if ``calibration`` does not say otherwise. The model runs in bfloat16
(autocast), the dense one, too. Six other windows of each test text had been looked at before.
Statistics stay in build/language_model (15 GB); what they took goes to language_model_times.csv.
With ``--validate`` the windows are those of validation text: language_model_validation.csv.
Seconds of one idle core: statistics 75 for a kind (and 5.6 GB), factors 25 for a method, a row 30.

The checkpoint comes from Q4_1: 4 bits in groups of 32. To round to 4 bits in the same groups is
nearly free, as it would not be for another model; so our groups of 64 begin 16 weights off those
of the file, and one row rotates the inputs first.
"""

import functools
import operator
import shutil
from collections.abc import Iterable, Mapping
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn

import lrf_utils as lrf
import notebook_utils as nb
from experiments import smollm
from experiments.common import Table, parse
from experiments.smollm import KINDS


class Run(NamedTuple):
    """A model. ``size`` is the share that its linear layers keep of their 106 million weights."""

    method: str
    ranks: str = ""
    size: float = 1.0
    bits: int = 16
    calibration: str = ""


OURS = "weighted metric"
KEY = [*Run._fields, "text"]
COLUMNS = [*KEY, "MB", "losses"]
LAYERS = ["layer", "rank", "predicted", "KL", "loss"]  # nats per token, more than dense
WINDOWS = 16  # of each kind, for calibration and for the test

# --- What is measured ----------------------------------------------------------------------------

DENSE, MILD, ALL = Run("dense"), (0.9, 0.8), (0.9, 0.8, 0.7, 0.5)


def runs_of(methods: Iterable[str], ranks: Iterable[str], sizes: Iterable[float]) -> list[Run]:
    return [Run(*each, 16, "given") for each in product(methods, ranks, sizes)]


# SVD-LLM is better without the ridge of ``lrf.Statistics``; ours is 2 % worse (validation).
LINEAR = [DENSE, *runs_of((OURS, "SVD-LLM without ridge", "SVD-LLM"), ("own", "equal"), ALL)]
LINEAR += runs_of(["plain SVD"], ("own", "equal"), MILD)
# ASVD's own search for ranks, nine shares of each layer, would take 1,890 runs of the model.
OTHERS = runs_of(("AFM", "FWSVD", "ASVD"), ("equal", "own"), MILD)
CORRECTED = runs_of([OURS], ["corrected"], ALL)
# Tested on the kind that is left out alone. Plain SVD has no calibration: its rows are above.
HELD_OUT = [
    Run(*method, size, 16, f"without {kind}")
    for size, kind in product((0.8, 0.9), KINDS)
    for method in ((OURS, "own"), ("SVD-LLM without ridge", "own"))
]
TEXTS = ("written", "6 windows", "15 windows")  # 48, if given
CALIBRATION = [Run(OURS, "own", 0.8, 16, text) for text in TEXTS]
# Groups of 64 weights have 32 bits of scales: the second row of a line has the bytes of the first.
BITS = [Run("rounded", bits=8), Run(OURS, "own", 0.53, 16, "given")]
BITS += [Run("rounded", bits=4), Run(OURS, "own", 0.529, 8, "given")]
BITS += [Run("rounded", bits=3), Run(OURS, "own", 0.777, 4, "given")]
BITS += [Run(OURS, "own", size, bits, "given") for size, bits in ((0.9, 8), (0.9, 4), (0.8, 8))]
BITS += [Run("rounded in the file's groups", bits=4), Run("rounded, rotated", bits=4)]
HEAD = [Run("head of rank 288", calibration="given"), Run("head", bits=8), Run("head", bits=4)]
PARTS = {"linear": LINEAR, "layers": [], "corrected": CORRECTED, "others": OTHERS}
PARTS |= {"bits": BITS, "held_out": HELD_OUT, "calibration": CALIBRATION, "head": HEAD}

# --- The model, texts, statistics ----------------------------------------------------------------

FOLDER = smollm.FOLDER
BY_LAYER = nb.ROOT / "results" / "language_model_layers.csv"
original = functools.cache(nb.load_smollm2)


def dense() -> nn.Module:
    return original()[0]


@functools.cache
def names() -> list[str]:
    """The 210 linear layers; the head is tied to the embedding table and stays."""
    parts = dense().model.layers.named_modules(prefix="model.layers")
    return [name for name, part in parts if isinstance(part, nn.Linear)]


@functools.cache
def test_windows(text: str = "test") -> dict[str, Tensor]:
    # Half a step later than windows that were looked at when the settings were chosen.
    count = WINDOWS if text == "test" else WINDOWS // 2
    return smollm.windows_of(original()[1], text, count, offset=0.5)


def windows_for(source: str) -> Tensor:
    """The calibration windows of one kind, some of all three, or text that the model wrote."""
    if source == "written":
        return smollm.written_text(dense(), 3 * WINDOWS, FOLDER)
    count = WINDOWS if source in KINDS else int(source.removesuffix(" windows")) // 3
    windows = smollm.windows_of(original()[1], "calibration", count)
    return windows[source] if source in KINDS else torch.cat(list(windows.values()))


def sources(calibration: str) -> list[str]:
    """What has statistics of its own; those of several kinds are sums."""
    if calibration == "given" or calibration.startswith("without"):
        return [kind for kind in KINDS if not calibration.endswith(kind)]
    return [calibration]


SAME_INPUT = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}


def collected(what: str, source: str) -> dict[str, Any]:
    """Of each layer what the statistics hold, or for ASVD and FWSVD a size of each input."""
    layers, how = names(), {}
    if what == "activations":
        layers = [name for name in layers if name.split(".")[-1] not in SAME_INPUT]
    if what == "weighted":
        how = {"loss": "tokens", "weighted": True}

    def make() -> dict[str, Any]:
        windows = windows_for(source)
        if what in ("ASVD", "FWSVD"):
            measure = smollm.input_sizes if what == "ASVD" else smollm.weight_gradients
            return measure(dense(), layers, windows[::4].split(2))  # a size needs fewer
        found = lrf.collect_statistics(dense(), windows.split(2), layers, **how)
        return {name: vars(each) for name, each in found.items()}

    return smollm.saved(f"{what} {source}", len(layers), make)


@functools.lru_cache(1)
def statistics_of(method: str, calibration: str = "given") -> Mapping[str, lrf.Statistics] | None:
    """What a method knows; each published one is a covariance of its own for our factors."""
    if method == "plain SVD":
        return None
    base = method.removesuffix(" without ridge")
    what = {OURS: "weighted", "ASVD": "ASVD", "FWSVD": "FWSVD"}.get(base, "activations")
    files = [collected(what, source) for source in sources(calibration)]

    def make(name: str) -> lrf.Statistics:
        if what in ("ASVD", "FWSVD"):
            return smollm.diagonal(sum(file[name] for file in files))
        if what == "activations":
            block, _, last = name.rpartition(".")
            name = f"{block}.{SAME_INPUT.get(last, last)}"
        known = functools.reduce(operator.add, (lrf.Statistics(**file[name]) for file in files))
        return known if method == base else smollm.without_ridge(known)

    return smollm.Lazy(names(), make)


# --- Fewer weights -------------------------------------------------------------------------------


@functools.lru_cache(1)
def factors(method: str, calibration: str) -> smollm.Factors:
    """Of each layer ``smollm.nested_factors``, good for all ranks."""

    def make() -> smollm.Factors:
        known, result = statistics_of(method, calibration), {}
        for name in names():
            layer, seen = dense().get_submodule(name), known and known[name]
            result[name] = smollm.nested_factors(layer, seen, method == "AFM")
        return result

    if calibration == "given":  # which several parts need
        return smollm.saved(f"factors {method}", len(names()), make)
    return make()


@functools.cache
def options(calibration: str = "given") -> smollm.Options:
    return smollm.options_of(factors(OURS, calibration))


@functools.cache
def plan(ranks: str, kept: float, calibration: str = "given") -> dict[str, int | None]:
    if ranks == "equal":
        return smollm.equal_ranks(dense(), names(), kept)
    table = options(calibration)
    if ranks == "corrected":
        table = smollm.corrected(table, pd.read_csv(BY_LAYER).set_index("layer"))
    return lrf.allocate_ranks(table, kept * sum(table[name][None][0] for name in table))


def write_options(path: Path) -> None:
    """The predicted loss of each layer at each rank, for the lesson to allocate any budget."""
    rows = [
        {"layer": name, "rank": rank, "error": f"{error:.5g}"}
        for name, table in options().items()
        for rank, (_, error) in table.items()
        if rank is not None
    ]
    pd.DataFrame(rows).to_csv(path, index=False)


def pair(method: str, name: str, rank: int, calibration: str = "given") -> lrf.LowRank:
    A, B, _ = factors(method, calibration)[name]
    A, B, bias = A[:, :rank].clone(), B[:rank].clone(), None
    if method == "AFM":  # it makes up for the mean of what is lost
        lost = dense().get_submodule(name).weight.detach() - A @ B
        bias = lost @ statistics_of(method, calibration)[name].mean.float()
    return smollm.pair_of(A, B, bias)


def small(method: str, ranks: str, kept: float, calibration: str = "given") -> nn.Module:
    chosen = {name: rank for name, rank in plan(ranks, kept, calibration).items() if rank}
    pairs = {name: pair(method, name, rank, calibration) for name, rank in chosen.items()}
    return lrf.factorize(dense(), pairs)


# --- Fewer bits, and the head --------------------------------------------------------------------


def model_of(run: Run) -> nn.Module:
    if run.method.startswith("head of rank"):
        rank = int(run.method.split()[-1])
        return smollm.with_small_table(dense(), windows_for("15 windows").split(1), rank)
    if run.method in ("head", "rounded in the file's groups"):
        layers, group = (["lm_head"], 64) if run.method == "head" else (names(), 32)
        return smollm.rounded_model(dense(), layers, run.bits, group=group)
    if run.method == "rounded, rotated":
        return smollm.in_random_basis(dense(), names(), run.bits, group=64)
    model = small(*run[:3], run.calibration) if run.ranks else dense()
    if run.bits == 16:
        return model
    return smollm.rounded_model(model, names(), run.bits, group=64, shift=16)


def megabytes(model: nn.Module, run: Run) -> float:
    """Weights and biases, with 32 bits of scales for each group; also what stays in 16 bits."""
    rounded = 16 if run.bits == 16 else run.bits + 32 / (32 if "file" in run.method else 64)
    layers = ["lm_head"] if run.method == "head" else names()
    few = sum(p.numel() for name in layers for p in model.get_submodule(name).parameters())
    return (few * rounded + (lrf.count_parameters(model) - few) * 16) / 8e6


# --- The prediction, layer by layer --------------------------------------------------------------


def measure_layers(out: Path) -> None:
    """Each layer alone at half of its weights: what the loss changes by, and the prediction."""
    write_options(out / "language_model_options.csv")
    table = Table(out / BY_LAYER.name, LAYERS, LAYERS[:1])
    windows = smollm.windows_of(original()[1], "validation", 1).values()
    model = smollm.Alone(dense(), torch.cat(list(windows))[:, :128])

    def measure(name: str, rank: int) -> dict[str, str]:
        after = model(name, pair(OURS, name, rank))
        # The metric sums over the tokens of a window.
        predicted = factors(OURS, "given")[name][2][rank] / 2 / 256
        change = model.loss(after) - model.loss(model.before)
        values = {"predicted": predicted, "KL": model.divergence(after), "loss": change}
        return {key: f"{value:.6f}" for key, value in values.items()}

    for name, rank in smollm.equal_ranks(dense(), names(), 0.5).items():
        table.add({"layer": name, "rank": rank}, partial(measure, name, rank))


# --- The table -----------------------------------------------------------------------------------


def record(table: Table, runs: list[Run], text: str) -> None:
    @functools.lru_cache(1)
    def model(run: Run) -> nn.Module:
        result = model_of(run)
        for part in result.model.layers.modules() if run != DENSE else ():
            if isinstance(part, nn.Linear):
                part.bfloat16()  # as autocast would at each call
        return result

    def measure(run: Run, kind: str) -> dict[str, str]:
        network, windows = model(run), test_windows(text)[kind]  # made in full precision
        with torch.autocast("cpu", torch.bfloat16):
            losses = smollm.window_losses(network, windows)
        shown = " ".join(f"{loss:.4f}" for loss in losses)
        return {"MB": f"{megabytes(network, run):.1f}", "losses": shown}

    for run in runs:
        left_out = [kind for kind in KINDS if run.calibration == f"without {kind}"]
        for kind in left_out or KINDS:
            table.add({**run._asdict(), "text": kind}, partial(measure, run, kind))


def main() -> None:
    options = parse(__doc__, PARTS)
    name, text = "language_model.csv", "test"
    if options.validate:
        name, text = "language_model_validation.csv", "validation"
    for part in options.parts:
        if part == "layers":
            measure_layers(options.out)
        else:
            record(Table(options.out / name, COLUMNS, KEY), PARTS[part], text)
    shutil.copy(smollm.times().path, options.out)


if __name__ == "__main__":
    main()
