"""Lesson 8: a small residual network with low-rank convolutions. Writes resnet*.csv.

    python -m experiments.resnet [--parts dense untrained gauge recovered controls costs]
                                 [--seeds 0 1 2] [--out FOLDER]
    python -m experiments.resnet --validate

The dense networks are those of checkpoints/resnet_seed*.pt; one that is missing is trained, and
saved there. All training is in bfloat16 with labels, without a teacher; a factorized network
gets 4 epochs after the dense one's 5, and every control as many in total. ``--validate`` compares
learning rates with seed 0, trained on the first 50,000 training images and measured on the other
10,000, and writes resnet_validation.csv.
"""

import functools
import json
import re
import subprocess
import sys
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
DENSE_RATE, RATE = 1e-2, 5e-3  # peak learning rates
NARROW_RATE = {4: 2e-2, 8: 4e-2}
NARROW = {4: (16, 32, 127, 32), 8: (11, 23, 89, 22)}  # widths with 1/4 and 1/8 of the MACs

SCHEMES = (*lrf_convs.SCHEMES, "CP")
SHARES = (4, 8)  # a quarter and an eighth of the MACs
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

    The largest share that fits into ``room``; then, as long as there is room, one layer after the
    other gets the next better option. None if rank 1 of some layer does not fit.
    """
    tables = {}
    for name, table in options.items():
        schemes = {option[0] for option in table if option}
        key = scheme if schemes != {"out"} else "out"
        tables[name] = {o: value for o, value in table.items() if o and o[0] == key}
    for part in torch.linspace(1, 0, 2001).tolist():
        plan = {}
        for name, table in tables.items():
            fitting = [
                o for o, (cost, _) in table.items() if cost <= part * options[name][None][0]
            ]
            if not fitting:
                return None
            most = max(table[option][0] for option in fitting)
            best = [option for option in fitting if table[option][0] >= 0.97 * most]
            plan[name] = min(best, key=lambda option: table[option][1])  # of Tucker-2 pairs
        room_left = room - sum(tables[name][option][0] for name, option in plan.items())
        if room_left >= 0:
            break
    improved = True
    while improved:
        improved = False
        for name, table in tables.items():
            (cost, error), better = table[plan[name]], []
            for option, (more, less) in table.items():
                if cost < more <= cost + room_left and less < error:
                    better.append((more, option))
            if better:
                more, plan[name] = min(better)
                room_left, improved = room_left - (more - cost), True
    return plan


def read_plan(parts: int, name: str) -> Plan:
    """A plan for the network of seed 0, as resnet_plans.json has it."""
    plans = json.loads((ROOT / "results" / "resnet_plans.json").read_text())
    return {
        layer: (scheme, tuple(rank) if isinstance(rank, list) else rank)
        for layer, (scheme, rank) in plans[f"{name}, 1/{parts}"].items()
    }


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

    def plans(self, parts: float) -> dict[str, Plan]:
        """Every scheme at the same share of each layer's MACs, and the allocation."""
        plans = {scheme: self.uniform(parts, scheme) for scheme in SCHEMES}
        plans["allocated"] = self.allocated(parts)
        return {name: plan for name, plan in plans.items() if plan}

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
    ) -> nn.Module:
        """Truncated, then least squares: the last part of each layer, and the classifier."""
        model = self.folded if model is None else model
        small, names = self.truncated(plan, model), [*plan, "fc"]
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

    def recovered(
        self, parts: float, epochs: int, rate: float, temperature: float | None = None
    ) -> nn.Module:
        """Allocated, repaired, and trained with a BatchNorm behind each convolution."""
        model = self.repaired(self.allocated(parts))
        return fold(self.fit(with_norms(model, self.calibration), epochs, rate, temperature))

    def from_scratch(
        self,
        epochs: int,
        rate: float,
        widths: Sequence[int] | None = None,
        temperature: float | None = None,
    ) -> nn.Sequential:
        torch.manual_seed(self.seed)
        model = make_resnet(widths) if widths else make_resnet()
        return self.fit(model, epochs, rate, temperature)

    @functools.cached_property
    def teacher(self) -> Tensor:
        """The logits of the dense network for the training images."""
        with torch.no_grad():
            return torch.cat([self.folded(x) for x in self.data.x_train.split(1000)])

    def fit(
        self, model: nn.Module, epochs: int, rate: float, temperature: float | None = None
    ) -> nn.Module:
        """Train in place with Adam and one cycle, in the layout that is fastest.

        With a temperature, the dense network's probabilities take the place of the labels.
        """
        model.to(memory_format=torch.channels_last).train()
        batches = shuffled(len(self.data.x_train), epochs, self.seed)
        optimizer = torch.optim.Adam(model.parameters(), lr=rate, fused=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=rate, total_steps=len(batches)
        )

        def loss_of(batch: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(self.data.x_train[batch]).float()
            if temperature is None:
                return F.cross_entropy(logits, self.data.y_train[batch])
            wanted = (self.teacher[batch] / temperature).softmax(1)
            return temperature**2 * F.cross_entropy(logits / temperature, wanted)

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
    """That of the fewer epochs is chosen first: everything else rests on it."""
    for epochs in (EPOCHS, EPOCHS + MORE):
        for rate in (5e-3, 1e-2, 2e-2):
            yield f"dense, {epochs} epochs, rate {rate}", partial(nets.from_scratch, epochs, rate)


def untrained(nets: ResnetNetworks) -> Runs:
    """Each plan truncated, and after three repairs."""
    for parts in SHARES:
        for scheme, plan in nets.plans(parts).items():
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
    for scheme in ("spatial", "Tucker-2"):
        plan = nets.uniform(4, scheme)
        for name, model in models.items():
            name = f"{name}: {scheme}, 1/4"
            yield f"{name}, truncated", lambda p=plan, m=model: nets.truncated(p, m())
            yield f"{name}, least squares", lambda p=plan, m=model: nets.repaired(p, m())
        yield f"raw weights: {scheme}, 1/4, truncated", partial(nets.raw, plan)
        run = partial(nets.raw, plan, repair=True)
        yield f"raw weights: {scheme}, 1/4, least squares", run


def recovered(nets: ResnetNetworks) -> Runs:
    for parts in (8, 4):
        run = partial(nets.recovered, parts, MORE, RATE)
        yield f"allocated, 1/{parts}, {MORE} epochs", run


def controls(nets: ResnetNetworks) -> Runs:
    total = EPOCHS + MORE
    for parts in (8, 4):
        run = partial(nets.from_scratch, total, NARROW_RATE[parts], NARROW[parts])
        yield f"narrower, 1/{parts}, {total} epochs", run
    yield f"dense, {total} epochs", partial(nets.from_scratch, total, DENSE_RATE)


def rates(nets: ResnetNetworks) -> Runs:
    """Of ours and of the narrower networks."""
    total = EPOCHS + MORE
    for parts, ours, theirs in (
        (8, (2.5e-3, 5e-3, 1e-2, 2e-2), (5e-3, 1e-2, 2e-2, 4e-2, 8e-2)),
        (4, (2.5e-3, 5e-3, 1e-2), (1e-2, 2e-2, 4e-2)),
    ):
        for rate in ours:
            run = partial(nets.recovered, parts, MORE, rate)
            yield f"allocated, 1/{parts}, {MORE} epochs, rate {rate}", run
        for rate in theirs:
            run = partial(nets.from_scratch, total, rate, NARROW[parts])
            yield f"narrower, 1/{parts}, {total} epochs, rate {rate}", run


def taught(nets: ResnetNetworks) -> Runs:
    """Ours with the dense network as the teacher, at the rate that is best with labels."""
    for temperature in (1, 2, 4):
        name = f"allocated, 1/8, {MORE} epochs, teacher, temperature {temperature}, rate {RATE}"
        yield name, partial(nets.recovered, 8, MORE, RATE, temperature)


PARTS = {
    "dense": dense,
    "untrained": untrained,
    "gauge": gauge,
    "recovered": recovered,
    "controls": controls,
}
CHOICES = {"dense-rates": dense_rates, "rates": rates, "taught": taught}


# --- Tables --------------------------------------------------------------------------------------


def measure(make: Callable[[], nn.Module], data: nb.Dataset) -> dict:
    model = make()
    return {
        "parameters": lrf.count_parameters(model),
        "MACs": lrf.count_macs(model, data.x_test[:1]),
        "accuracy (%)": f"{100 * lrf.accuracy(model, data.x_test, data.y_test):.2f}",
    }


def costs(folder: Path) -> None:
    """What examples/compress_convnet.py takes at 224×224 pixels, step by step; random weights."""
    columns = ["model", "step", "s", "CPU s", "GB"]
    table = Table(folder / "resnet_costs.csv", columns, key=("model", "step"))
    said = r"(.+): (\d+) s \((\d+) s of CPU time\), at most ([\d.]+) GB"
    for name in ("resnet18", "resnet50"):
        if {"model": name, "step": "least squares"} in table:
            continue
        file = ROOT / "build" / f"{name}.safetensors"
        command = [sys.executable, "examples/compress_convnet.py", name, "--out", str(file)]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        for step, *values in re.findall(said, run.stdout):
            values = dict(zip(columns[2:], values))
            table.add({"model": name, "step": step}, lambda values=values: values)


def main() -> None:
    options = parse(__doc__, [*PARTS, *CHOICES, "costs"], SEEDS)
    data, name, folder = nb.load_fashion_mnist(), "resnet", CHECKPOINTS
    parts, seeds = PARTS, options.seeds
    if options.validate:
        data, name, folder = nb.validation_split(data), "resnet_validation", None
        folder, parts, seeds = ROOT / "build" / "validation", CHOICES, [0]
    networks = [ResnetNetworks(data, seed, folder) for seed in seeds]
    table = Table(options.out / f"{name}.csv", COLUMNS, key=("method", "seed"))
    if "untrained" in options.parts and 0 in seeds and not options.validate:
        nets = networks[seeds.index(0)]
        plans = {
            f"{name}, 1/{share}": plan
            for share in SHARES
            for name, plan in nets.plans(share).items()
        }
        (options.out / "resnet_plans.json").write_text(json.dumps(plans, indent=1) + "\n")
    for part in (make for key, make in parts.items() if key in options.parts):
        for nets in networks:
            for method, make in part(nets):
                row = {"method": method, "seed": nets.seed}
                table.add(row, partial(measure, make, data))
    if "costs" in options.parts and not options.validate:
        costs(options.out)


if __name__ == "__main__":
    main()
