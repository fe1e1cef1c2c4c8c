"""Lesson 8: low-rank convolutions. Writes convolutions.csv and convolutions_pairs.csv.

    python -m experiments.convolutions [--parts dense recovered controls untrained more]
                                       [--seeds 0 1 2] [--out FOLDER]
    python -m experiments.convolutions --validate

The dense networks are those of checkpoints/cnn_seed*.pt; one that is missing is trained, and saved
there. Those three were trained in bfloat16, everything else in float32. ``--validate`` compares
learning rates with seed 0, trained on the first 50,000 training images and measured on the other
10,000, and writes convolutions_validation.csv. One thing was chosen after a look at test accuracy:
five epochs for the dense network, not four.

convolutions_pairs.csv holds the differences of PAIRS on the same images. Which images a network
gets right is kept in build/, so a pair is compared where both of its networks were measured.
"""

import bisect
import copy
import functools
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lrf_convs
import lrf_utils as lrf
import notebook_utils as nb
from experiments.common import ROOT, Table, parse
from experiments.models import fold, load_cnn, make_cnn, make_separable, option_error, with_norms
from experiments.resnet import PAIR_COLUMNS, SEEDS, differences, kept_in, measure
from experiments.training import fit, shuffled

COLUMNS = ["method", "parameters", "MACs", "seed", "accuracy (%)"]
PAIRS = (
    ("allocated by MACs, 1/4, 4 epochs", "dense, 5 epochs"),
    ("allocated by MACs, 1/8, 4 epochs", "dense, 5 epochs"),
    ("allocated by MACs, 1/8, 4 epochs", "narrower, 1/8, 9 epochs"),
    ("allocated by MACs, 1/8, 4 epochs", "separable, 1/8, 9 epochs"),
)
CHECKPOINTS = ROOT / "checkpoints"
SIZES = {"conv2": 28, "conv3": 14, "conv4": 7}  # what is factorized: height and width of its input
EPOCHS, MORE = 5, 4  # of the dense network; of the factorized ones after that
RATE, DENSE_RATE = 2e-2, 5e-3  # peak learning rates, of everything small and of the dense network
NARROW = (11, 22, 45, 45)

Plan = dict[str, tuple]  # for each layer that is factorized its scheme and rank
Runs = Iterator[tuple[str, Callable[[], nn.Module]]]


# --- Plans ---------------------------------------------------------------------------------------


@functools.cache
def macs(layer: nn.Conv2d, size: int, scheme: str | None = None, rank: int | tuple = 1) -> int:
    """MACs of a layer, or of what a scheme makes of it, for an input of ``size`` × ``size``."""
    parts = lrf_convs.split_conv(layer, scheme, rank) if scheme else layer
    return lrf.count_macs(parts, torch.zeros(1, layer.in_channels, size, size))


def uniform(model: nn.Module, scheme: str, share: float) -> Plan | None:
    """One scheme, and a share of the network's MACs for every layer; None if rank 1 costs more."""
    layers = {name: model.get_submodule(name) for name in SIZES}
    dense = {name: macs(layer, SIZES[name]) for name, layer in layers.items()}
    total = lrf.count_macs(model, torch.zeros(1, 1, 28, 28))
    fixed = total - sum(dense.values())  # of the first layer and the classifier
    part = (share * total - fixed) / sum(dense.values())
    plan = {}
    for name, layer in layers.items():
        cost = partial(macs, layer, SIZES[name], scheme)
        ranks = ranks_of(lrf_convs.full_rank(layer, scheme))
        fitting = bisect.bisect_right(ranks, part * dense[name], key=cost)
        if not fitting:
            return None
        plan[name] = (scheme, ranks[fitting - 1])
    return plan


def ranks_of(full: int | tuple[int, int]) -> list:
    """All ranks, the lowest first; for Tucker-2 pairs, both as the same share of a full rank."""
    if isinstance(full, int):
        return list(range(1, full + 1))
    most, other = full
    return [(r, max(1, round(r * other / most))) for r in range(1, most + 1)]


def candidates(layer: nn.Conv2d, scheme: str) -> list:
    """The ranks that an allocation chooses from: a grid, coarser where ranks are large."""
    grid = [*range(4, 32, 4), *range(32, 385, 16)]
    full = lrf_convs.full_rank(layer, scheme)
    if scheme == "depthwise":
        return list(range(1, full + 1))
    if scheme != "Tucker-2":
        return [rank for rank in grid if rank <= full]
    pairs = [(a, b) for a in grid for b in grid if a <= full[0] and b <= full[1]]
    return [(a, b) for a, b in pairs if a <= 4 * b and b <= 4 * a]


def all_options(model: nn.Module, images: Tensor) -> dict[str, dict]:
    """{layer: {(scheme, rank), or None for dense: (MACs, parameters, error)}}.

    Only what saves both MACs and parameters is an option.
    """
    statistics = lrf.collect_statistics(model, images, list(SIZES), loss="classes")
    options: dict[str, dict] = {}
    for name, size in SIZES.items():
        layer = model.get_submodule(name)
        x = torch.zeros(1, layer.in_channels, size, size)
        dense = lrf.count_macs(layer, x), lrf.count_parameters(layer)
        options[name] = {None: (*dense, 0.0)}
        for scheme in lrf_convs.SCHEMES:
            for rank in candidates(layer, scheme):
                parts = lrf_convs.split_conv(layer, scheme, rank)
                costs = lrf.count_macs(parts, x), lrf.count_parameters(parts)
                if costs[0] < dense[0] and costs[1] < dense[1]:
                    error = option_error(layer, parts, statistics[name])
                    options[name][scheme, rank] = (*costs, error)
    return options


# --- Networks ------------------------------------------------------------------------------------


class CnnNetworks:
    """The networks of one seed, trained on the training images of ``data``."""

    def __init__(self, data: nb.Dataset, seed: int, folder: Path = CHECKPOINTS) -> None:
        self.data, self.seed, self.folder = data, seed, folder
        self.calibration = data.x_train[:1000]

    @functools.cached_property
    def dense(self) -> nn.Sequential:
        """The trained network, rounded to half precision, which is what is stored."""
        path = self.folder / f"cnn_seed{self.seed}.pt"
        if not path.exists():
            as_committed = self.folder == CHECKPOINTS
            model = self.from_scratch(make_cnn, EPOCHS, DENSE_RATE, bfloat16=as_committed)
            half = {
                name: value.half() if value.is_floating_point() else value
                for name, value in model.state_dict().items()
            }
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(half, path)
        return load_cnn(self.seed, self.folder)

    @functools.cached_property
    def folded(self) -> nn.Module:
        return fold(self.dense)

    @functools.cached_property
    def options(self) -> dict[str, dict]:
        return all_options(self.folded, self.calibration)

    def allocated(self, parts: int, unit: str = "MACs") -> Plan:
        """The plan of least error with 1/``parts`` of the network's MACs, or of its parameters."""
        if unit == "MACs":
            column, total = 0, lrf.count_macs(self.folded, self.calibration[:1])
        else:
            column, total = 1, lrf.count_parameters(self.folded)
        options = {
            name: {option: (values[column], values[2]) for option, values in table.items()}
            for name, table in self.options.items()
        }
        fixed = total - sum(table[None][0] for table in options.values())
        plan = lrf.allocate_ranks(options, total / parts - fixed)
        return {name: option for name, option in plan.items() if option}

    def truncated(self, plan: Plan) -> nn.Module:
        parts = {
            name: lrf_convs.split_conv(self.folded.get_submodule(name), *option)
            for name, option in plan.items()
        }
        return lrf.factorize(self.folded, parts)

    def repaired(self, plan: Plan) -> nn.Module:
        """Truncated, then least squares: the last part of each layer, and the classifier."""
        small = self.truncated(plan)
        return lrf_convs.refit(self.folded, small, self.calibration, [*plan, "fc"])

    def repaired_allocation(self, parts: int, unit: str) -> nn.Module:
        return self.repaired(self.allocated(parts, unit))

    def recovered(
        self, parts: int, epochs: int = MORE, rate: float = RATE, norms: bool = True
    ) -> nn.Module:
        """Allocated by MACs, repaired, trained; ``norms``: with BatchNorm while it is trained."""
        return self.continued(self.repaired_allocation(parts, "MACs"), epochs, rate, norms)

    def continued(
        self, model: nn.Module, epochs: int, rate: float, norms: bool = True
    ) -> nn.Module:
        model = with_norms(model, self.calibration) if norms else copy.deepcopy(model)
        return fold(self.fit(model, epochs, rate))

    def from_scratch(
        self, make: Callable[[], nn.Module], epochs: int, rate: float, bfloat16: bool = False
    ) -> nn.Module:
        torch.manual_seed(self.seed)
        return self.fit(make(), epochs, rate, bfloat16)

    def fit(self, model: nn.Module, epochs: int, rate: float, bfloat16: bool = False) -> nn.Module:
        """Train in place with Adam and one cycle, in the layout that is fastest."""
        model.to(memory_format=torch.channels_last).train()
        batches = shuffled(len(self.data.x_train), epochs, self.seed)
        optimizer = torch.optim.Adam(model.parameters(), lr=rate, fused=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=rate, total_steps=len(batches)
        )

        def loss_of(batch: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                logits = model(self.data.x_train[batch]).float()
            return F.cross_entropy(logits, self.data.y_train[batch])

        fit(batches, loss_of, optimizer, schedule)
        return model.to(memory_format=torch.contiguous_format).eval()


# --- Runs: what a method is called in the table, and a function that makes its network -----------


def dense(nets: CnnNetworks) -> Runs:
    yield "dense, 5 epochs", lambda: nets.dense


def recovered(nets: CnnNetworks) -> Runs:
    for parts in (8, 4):
        yield f"allocated by MACs, 1/{parts}, 4 epochs", partial(nets.recovered, parts)


def controls(nets: CnnNetworks) -> Runs:
    total = EPOCHS + MORE
    narrow = partial(make_cnn, NARROW)
    yield "narrower, 1/8, 9 epochs", partial(nets.from_scratch, narrow, total, RATE)
    yield "separable, 1/8, 9 epochs", partial(nets.from_scratch, make_separable, total, RATE)


def untrained(nets: CnnNetworks) -> Runs:
    for parts in (2, 4, 8):
        for scheme in lrf_convs.SCHEMES:
            plan = uniform(nets.folded, scheme, 1 / parts)
            if plan:
                yield f"{scheme}, 1/{parts}, truncated SVD", partial(nets.truncated, plan)
                yield f"{scheme}, 1/{parts}, least squares", partial(nets.repaired, plan)
        for unit in ("MACs", "parameters"):
            method = f"allocated by {unit}, 1/{parts}, least squares"
            yield method, partial(nets.repaired_allocation, parts, unit)


def more(nets: CnnNetworks) -> Runs:
    """Variants, of seed 0 only."""
    if nets.seed == 0:
        yield "dense, 5 + 4 epochs", partial(nets.continued, nets.folded, MORE, DENSE_RATE)
        yield "allocated by MACs, 1/8, 1 epoch", partial(nets.recovered, 8, epochs=1)
        for rate in (3e-3, 8e-3):
            method = f"allocated by MACs, 1/8, 4 epochs without BatchNorm, rate {rate}"
            yield method, partial(nets.recovered, 8, rate=rate, norms=False)


def choices(nets: CnnNetworks) -> Runs:
    """Learning rates, of the controls as of ours."""
    for rate in (1e-2, 2e-2):
        method = f"allocated by MACs, 1/8, 4 epochs, BatchNorm put back, rate {rate}"
        yield method, partial(nets.recovered, 8, rate=rate)
    for name, make, rates in (
        ("narrower", partial(make_cnn, NARROW), (5e-3, 1e-2, 2e-2)),
        ("separable", make_separable, (1e-2, 2e-2)),
    ):
        for rate in rates:
            method = f"{name}, 1/8, 9 epochs, rate {rate}"
            yield method, partial(nets.from_scratch, make, EPOCHS + MORE, rate)


PARTS = {
    "dense": dense,
    "recovered": recovered,
    "controls": controls,
    "untrained": untrained,
    "more": more,
}


# --- Tables --------------------------------------------------------------------------------------


def main() -> None:
    options = parse(__doc__, PARTS, SEEDS)
    data, name, folder = nb.load_fashion_mnist(), "convolutions", CHECKPOINTS
    parts, seeds = [PARTS[part] for part in options.parts], options.seeds
    if options.validate:
        data, name = nb.validation_split(data), "convolutions_validation"
        folder = ROOT / "build" / "validation"
        parts, seeds = [dense, choices], [0]
    networks = [CnnNetworks(data, seed, folder) for seed in seeds]
    table = Table(options.out / f"{name}.csv", COLUMNS, key=("method", "seed"))
    compared = {method for pair in PAIRS for method in pair} if not options.validate else set()
    for part in parts:
        for nets in networks:
            for method, make in part(nets):
                keep = kept_in("convolutions", method, nets.seed) if method in compared else None
                row = {"method": method, "seed": nets.seed}
                table.add(row, partial(measure, make, data, keep))
    if options.validate:
        return
    pairs = Table(options.out / f"{name}_pairs.csv", PAIR_COLUMNS, key=("ours", "control"))
    for ours, control in PAIRS:
        files = [
            kept_in("convolutions", method, seed) for method in (ours, control) for seed in SEEDS
        ]
        if all(file.exists() for file in files):
            measure_pair = partial(differences, "convolutions", ours, control)
            pairs.add({"ours": ours, "control": control}, measure_pair)


if __name__ == "__main__":
    main()
