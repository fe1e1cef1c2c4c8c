"""Lesson 8: a small residual network with low-rank convolutions. Writes resnet*.csv.

    python -m experiments.resnet [--parts dense untrained gauge recovered controls]
                                 [--seeds 0 1 2] [--out FOLDER]
    python -m experiments.resnet --validate

The dense networks are those of checkpoints/resnet_seed*.pt; one that is missing is trained, and
saved there. All training is in bfloat16 with labels, without distillation; a factorized network
gets 4 epochs after the dense one's 5, and every control as many in total. ``--validate`` compares
learning rates with seed 0, trained on the first 50,000 training images and measured on the other
10,000, and writes resnet_validation.csv.

resnet_pairs.csv holds the differences of PAIRS on the same images. Which images a network
classifies correctly is kept in build/, so a pair is compared where both networks were measured.
"""

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lrf_convs
import lrf_utils as lrf
import notebook_utils as nb
from experiments.common import ROOT, Table, parse
from experiments.models import (
    fold,
    load_resnet,
    make_resnet,
    recalibrated,
    rescaled,
    residual_sums,
    split,
    split_options,
    with_norms,
)
from experiments.training import fit, shuffled

COLUMNS = ["method", "parameters", "MACs", "seed", "accuracy (%)"]
SEEDS = (0, 1, 2)
CHECKPOINTS = ROOT / "checkpoints"
EPOCHS, MORE = 5, 4  # of the dense network; of the factorized ones after that
DENSE_RATE, RATE, NARROW_RATE = 1e-2, 1e-2, 2e-2  # peak learning rates
NARROW = {4: (16, 32, 127, 32), 8: (11, 23, 89, 22)}  # widths with 1/4 and 1/8 of the MACs

SCHEMES = (*lrf_convs.SCHEMES, "CP")
PAIR_COLUMNS = ["ours", "control", "difference (pp)", "± over images", "± over seeds"]
PAIRS = tuple(
    (f"allocated, 1/{parts}, {MORE} epochs", control)
    for parts in (4, 8)
    for control in (f"dense, {EPOCHS + MORE} epochs", f"narrower, 1/{parts}, 9 epochs")
)

Plan = Mapping[str, tuple]  # for each layer that is factorized its scheme and rank
Runs = Iterator[tuple[str, Callable[[], nn.Module]]]


# --- Plans ---------------------------------------------------------------------------------------


def ranks(layer: nn.Conv2d, scheme: str) -> list:
    """A grid of ranks; for Tucker-2 pairs in which both shares are alike to a factor of 2."""
    grid = [*range(1, 16), *range(16, 64, 2), *range(64, 257, 8)]
    if scheme == "CP":
        return grid
    full = lrf_convs.full_rank(layer, scheme)
    if scheme != "Tucker-2":
        return [rank for rank in grid if rank <= full]
    pairs = [(a, b) for a in range(2, full[0] + 1, 3) for b in range(2, full[1] + 1, 3)]
    return [(a, b) for a, b in pairs if 0.5 <= (a / full[0]) / (b / full[1]) <= 2]


def candidates(layer: nn.Conv2d, schemes: Sequence[str] = SCHEMES) -> Iterator[tuple]:
    """Of a 1×1 layer the truncated SVD is the only scheme: "out"."""
    for scheme in schemes if layer.kernel_size != (1, 1) else ("out",):
        yield from ((scheme, rank) for rank in ranks(layer, scheme))


def uniform(options: Mapping[str, dict], scheme: str, room: float) -> Plan | None:
    """Of each layer an option of the scheme (of 1×1 layers the SVD), all at one share of MACs.

    The largest share that fits into ``room``; None if rank 1 of some layer does not.
    """
    for part in torch.linspace(1, 0, 2001).tolist():
        plan, spent = {}, 0
        for name, table in options.items():
            schemes = {option[0] for option in table if option}
            key = scheme if schemes != {"out"} else "out"
            fitting = {
                option: cost
                for option, (cost, _) in table.items()
                if option and option[0] == key and cost <= part * table[None][0]
            }
            if not fitting:
                return None
            least = max(fitting.values())  # of Tucker-2 the pair of least error among the largest
            best = [option for option, cost in fitting.items() if cost >= 0.97 * least]
            plan[name] = min(best, key=lambda option: table[option][1])
            spent += fitting[plan[name]]
        if spent <= room:
            return plan
    return None


# --- Networks ------------------------------------------------------------------------------------


class ResnetNetworks:
    """The networks of one seed, trained on the training images of ``data``."""

    def __init__(self, data: nb.Dataset, seed: int, folder: Path = CHECKPOINTS) -> None:
        self.data, self.seed, self.folder = data, seed, folder
        self.calibration = data.x_train[:1000]

    @functools.cached_property
    def dense(self) -> nn.Sequential:
        """The trained network, rounded to half precision, which is what is stored."""
        path = self.folder / f"resnet_seed{self.seed}.pt"
        if not path.exists():
            save_half(self.from_scratch(EPOCHS, DENSE_RATE), path)
        return load_resnet(self.seed, self.folder)

    @functools.cached_property
    def folded(self) -> nn.Module:
        return fold(self.dense)

    @functools.cached_property
    def names(self) -> list[str]:
        """All convolutions but the first, which reads one channel."""
        return [
            name
            for name, layer in self.folded.named_modules()
            if isinstance(layer, nn.Conv2d) and layer.in_channels > 1
        ]

    @functools.cached_property
    def total(self) -> int:
        return lrf.count_macs(self.folded, self.calibration[:1])

    def options(self, model: nn.Module, schemes: Sequence[str] = SCHEMES) -> dict[str, dict]:
        statistics = lrf.collect_statistics(model, self.calibration, self.names, loss="classes")
        some = partial(candidates, schemes=schemes)
        return split_options(model, statistics, self.calibration[:1], some)

    @functools.cached_property
    def all_options(self) -> dict[str, dict]:
        return self.options(self.folded)

    def room(self, parts: float) -> float:
        """What is left for ``names`` of 1/``parts`` of the MACs."""
        dense = sum(table[None][0] for table in self.all_options.values())
        return self.total / parts - (self.total - dense)

    def allocated(self, parts: float) -> Plan:
        """The plan of least error with 1/``parts`` of the network's MACs."""
        plan = lrf.allocate_ranks(self.all_options, self.room(parts))
        return {name: option for name, option in plan.items() if option}

    def uniform(self, parts: float, scheme: str) -> Plan | None:
        return uniform(self.all_options, scheme, self.room(parts))

    def truncated(self, plan: Plan, model: nn.Module | None = None) -> nn.Module:
        model = self.folded if model is None else model
        layers = {name: model.get_submodule(name) for name in plan}
        parts = {name: split(layer, *plan[name]) for name, layer in layers.items()}
        return lrf.factorize(model, parts)

    def recalibrated(self, plan: Plan, model: nn.Module | None = None) -> nn.Module:
        model = self.folded if model is None else model
        return recalibrated(model, self.truncated(plan, model), self.calibration, plan)

    def repaired(
        self,
        plan: Plan,
        model: nn.Module | None = None,
        sums: bool = True,
        classifier: bool = True,
    ) -> nn.Module:
        """Truncated, then least squares: the last part of each layer, and the classifier."""
        model = self.folded if model is None else model
        small, names = self.truncated(plan, model), [*plan, *(["fc"] if classifier else [])]
        sums = residual_sums(model) if sums else {}
        return lrf_convs.refit(model, small, self.calibration, names, sums=sums)

    def raw(self, plan: Plan, repair: bool = False) -> nn.Module:
        """The SVD sees weights that BatchNorm has not scaled yet; folded afterwards."""
        parts = {name: split(self.dense.get_submodule(name), *plan[name]) for name in plan}
        small = fold(lrf.factorize(self.dense, parts))
        if not repair:
            return small
        sums, names = residual_sums(self.folded), [*plan, "fc"]
        return lrf_convs.refit(self.folded, small, self.calibration, names, sums=sums)

    def recovered(self, parts: float, epochs: int, rate: float) -> nn.Module:
        """Allocated, repaired, and trained with a BatchNorm behind each convolution."""
        model = self.repaired(self.allocated(parts))
        return fold(self.fit(with_norms(model, self.calibration), epochs, rate))

    def from_scratch(
        self, epochs: int, rate: float, widths: Sequence[int] | None = None
    ) -> nn.Sequential:
        torch.manual_seed(self.seed)
        model = make_resnet(widths) if widths else make_resnet()
        return self.fit(model, epochs, rate)

    def fit(self, model: nn.Module, epochs: int, rate: float) -> nn.Module:
        """Train in place with Adam and one cycle, in the layout that is fastest."""
        model.to(memory_format=torch.channels_last).train()
        batches = shuffled(len(self.data.x_train), epochs, self.seed)
        optimizer = torch.optim.Adam(model.parameters(), lr=rate, fused=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=rate, total_steps=len(batches)
        )

        def loss_of(batch: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(self.data.x_train[batch]).float()
            return F.cross_entropy(logits, self.data.y_train[batch])

        fit(batches, loss_of, optimizer, schedule)
        return model.to(memory_format=torch.contiguous_format).eval()


def save_half(model: nn.Module, path: Path) -> None:
    half = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(half, path)


# --- Runs: what a method is called in the table, and a function that makes its network -----------


def dense(nets: ResnetNetworks) -> Runs:
    yield f"dense, {EPOCHS} epochs", lambda: nets.dense


def dense_rates(nets: ResnetNetworks) -> Runs:
    """Chosen first: everything else rests on it."""
    for rate in (5e-3, 1e-2, 2e-2):
        yield f"dense, {EPOCHS} epochs, rate {rate}", partial(nets.from_scratch, EPOCHS, rate)


def untrained(nets: ResnetNetworks) -> Runs:
    """Every scheme at the same share of each layer's MACs, and the allocation; three repairs."""
    for parts in (2, 4, 8):
        plans = {scheme: nets.uniform(parts, scheme) for scheme in SCHEMES}
        plans["allocated"] = nets.allocated(parts)
        for scheme, plan in plans.items():
            if plan:
                name = f"{scheme}, 1/{parts}"
                yield f"{name}, truncated", partial(nets.truncated, plan)
                yield f"{name}, channels recalibrated", partial(nets.recalibrated, plan)
                alone = partial(nets.repaired, plan, sums=False)
                yield f"{name}, least squares, layers alone", alone
                yield f"{name}, least squares", partial(nets.repaired, plan)


def gauge(nets: ResnetNetworks) -> Runs:
    """The same function in other numbers: what the plain SVD makes of it."""
    models = {f"rescaled {draw}": partial(rescaled, nets.folded, draw) for draw in (1, 2, 3)}
    models |= {"equalized": partial(rescaled, nets.folded, None), "folded": lambda: nets.folded}
    for parts in (4, 8):
        for scheme in ("spatial", "Tucker-2"):
            plan = nets.uniform(parts, scheme)
            for name, model in models.items():
                name = f"{name}: {scheme}, 1/{parts}"
                yield f"{name}, truncated", lambda p=plan, m=model: nets.truncated(p, m())
                yield f"{name}, least squares", lambda p=plan, m=model: nets.repaired(p, m())
            name = f"raw weights: {scheme}, 1/{parts}"
            yield f"{name}, truncated", partial(nets.raw, plan)
            yield f"{name}, least squares", partial(nets.raw, plan, repair=True)


def recovered(nets: ResnetNetworks) -> Runs:
    for parts in (8, 4):
        run = partial(nets.recovered, parts, MORE, RATE)
        yield f"allocated, 1/{parts}, {MORE} epochs", run


def controls(nets: ResnetNetworks) -> Runs:
    total = EPOCHS + MORE
    for parts in (8, 4):
        run = partial(nets.from_scratch, total, NARROW_RATE, NARROW[parts])
        yield f"narrower, 1/{parts}, {total} epochs", run
    yield f"dense, {total} epochs", partial(nets.from_scratch, total, DENSE_RATE)


def rates(nets: ResnetNetworks) -> Runs:
    """Of ours and of the controls."""
    for rate in (2.5e-3, 5e-3, 1e-2, 2e-2):
        run = partial(nets.recovered, 8, MORE, rate)
        yield f"allocated, 1/8, {MORE} epochs, rate {rate}", run
    for rate in (5e-3, 1e-2, 2e-2, 4e-2):
        run = partial(nets.from_scratch, EPOCHS + MORE, rate, NARROW[8])
        yield f"narrower, 1/8, {EPOCHS + MORE} epochs, rate {rate}", run


PARTS = {
    "dense": dense,
    "untrained": untrained,
    "gauge": gauge,
    "recovered": recovered,
    "controls": controls,
}
CHOICES = {"dense-rates": dense_rates, "rates": rates}


# --- Tables --------------------------------------------------------------------------------------


@torch.no_grad()
def correct(model: nn.Module, data: nb.Dataset) -> Tensor:
    """Which test images the model classifies correctly."""
    model = copy.deepcopy(model).eval().to(memory_format=torch.channels_last)
    predicted = [model(batch).argmax(1) for batch in data.x_test.split(1000)]
    return torch.cat(predicted) == data.y_test


def kept_in(folder: str, method: str, seed: int) -> Path:
    return ROOT / "build" / folder / f"{method.replace('/', '_')}, seed {seed}.pt"


def measure(make: Callable[[], nn.Module], data: nb.Dataset, keep: Path | None) -> dict:
    model = make()
    right = correct(model, data)
    if keep:
        keep.parent.mkdir(parents=True, exist_ok=True)
        torch.save(right, keep)
    return {
        "parameters": lrf.count_parameters(model),
        "MACs": lrf.count_macs(model, data.x_test[:1]),
        "accuracy (%)": f"{100 * right.double().mean():.2f}",
    }


def differences(folder: str, ours: str, control: str) -> dict[str, str]:
    """Ours minus the control on the same images, with halves of two 95 % intervals.

    Over the images: these networks, had there been other images. Over the seeds: other networks.
    """
    first, second = (
        torch.stack([torch.load(kept_in(folder, method, seed)) for seed in SEEDS]).double()
        for method in (ours, control)
    )
    gaps = 100 * (first - second)
    halves = []
    for values in (gaps.mean(0), gaps.mean(1)):
        mean, low, high = nb.interval(values.numpy())
        halves.append(f"{(high - low) / 2:.2f}")
    return dict(zip(PAIR_COLUMNS[2:], (f"{mean:.2f}", *halves)))


def main() -> None:
    options = parse(__doc__, [*PARTS, *CHOICES], SEEDS)
    data, name, folder = nb.load_fashion_mnist(), "resnet", CHECKPOINTS
    parts, seeds = PARTS, options.seeds
    if options.validate:
        data, name, folder = nb.validation_split(data), "resnet_validation", None
        folder, parts, seeds = ROOT / "build" / "validation", CHOICES, [0]
    networks = [ResnetNetworks(data, seed, folder) for seed in seeds]
    table = Table(options.out / f"{name}.csv", COLUMNS, key=("method", "seed"))
    for part in (make for key, make in parts.items() if key in options.parts):
        for nets in networks:
            for method, make in part(nets):
                keep = None if options.validate else kept_in("resnet", method, nets.seed)
                row = {"method": method, "seed": nets.seed}
                table.add(row, partial(measure, make, data, keep))
    if options.validate:
        return
    pairs = Table(options.out / f"{name}_pairs.csv", PAIR_COLUMNS, key=("ours", "control"))
    for ours, control in PAIRS:
        files = [kept_in("resnet", method, seed) for method in (ours, control) for seed in SEEDS]
        if all(file.exists() for file in files):
            measure_pair = partial(differences, "resnet", ours, control)
            pairs.add({"ours": ours, "control": control}, measure_pair)


if __name__ == "__main__":
    main()
