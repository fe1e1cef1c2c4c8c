"""The networks of notebook 08 and its long runs: checkpoints/cnn_seed*.pt and the results/convolutions*.csv.

    python scripts/train_cnn.py [--parts dense recovered controls untrained more] [--seeds 0 1 2]
    python scripts/train_cnn.py --validate

One idle core needs about an hour and a half for everything. Each row is written as soon as it is measured; rows that
are in the file already are skipped, so an interrupted run resumes. ``--validate`` compares learning rates with seed 0,
trained on the first 50,000 training images and measured on the other 10,000. One thing was chosen after a look at test
accuracy: five epochs for the dense network, not four.

The functions of the lesson are taken from the lesson: its cells with the tag ``setup``. The three dense networks were
trained with ``--bfloat16``, everything else without.
"""

import argparse
import copy
import csv
import functools
import math
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nbformat
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import lrf_utils as lrf
import notebook_utils as nb

ROOT = nb.ROOT

COLUMNS = ["method", "parameters", "MACs", "seed", "accuracy (%)"]
EPOCHS, MORE = 5, 4  # of the dense network; of recovery
SHARES = (2, 4, 8)
NARROW = (11, 22, 45, 45)
RATE, DENSE_RATE, NARROW_RATE, SEPARABLE_RATE = 2e-2, 5e-3, 2e-2, 2e-2
# ours, and the control that it is compared with on the same images
PAIRS = [
    ("allocated by MACs, 1/4, 4 epochs", "dense, 5 epochs"),
    ("allocated by MACs, 1/8, 4 epochs", "dense, 5 epochs"),
    ("allocated by MACs, 1/8, 4 epochs", "narrower, 1/8, 9 epochs"),
    ("allocated by MACs, 1/8, 4 epochs", "separable, 1/8, 9 epochs"),
]
data, checkpoints, bfloat16 = nb.load_fashion_mnist(), ROOT / "checkpoints", False


@functools.cache
def lesson() -> dict[str, Any]:
    """The names that the lesson's setup cells define."""
    names: dict[str, Any] = {}
    for cell in nbformat.read(ROOT / "notebooks" / "08_convolutions.ipynb", as_version=4).cells:
        if "setup" in cell.metadata.get("tags", []):
            exec(cell.source, names)
    return names


def make_cnn(widths: Sequence[int] = (32, 64, 128, 128)) -> nn.Sequential:
    """As in the lesson, which cannot be asked: its setup cells load the checkpoints that are made here."""
    layers, n = OrderedDict(), 1
    for k, (m, stride) in enumerate(zip(widths, (1, 2, 2, 1)), start=1):
        layers[f"conv{k}"] = nn.Conv2d(n, m, 3, stride, padding=1, bias=False)
        layers[f"norm{k}"] = nn.BatchNorm2d(m)
        layers[f"relu{k}"] = nn.ReLU()
        n = m
    layers |= {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "fc": nn.Linear(n, 10)}
    return nn.Sequential(layers)


def make_separable(widths=(30, 61, 123, 123)) -> nn.Sequential:
    """The same layout with depthwise-separable convolutions; BatchNorm and ReLU behind both halves of each."""
    layers = [nn.Conv2d(1, widths[0], 3, padding=1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()]
    for n, m, stride in zip(widths, widths[1:], (2, 2, 1)):
        layers += [nn.Conv2d(n, n, 3, stride, padding=1, groups=n, bias=False), nn.BatchNorm2d(n), nn.ReLU()]
        layers += [nn.Conv2d(n, m, 1, bias=False), nn.BatchNorm2d(m), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))


def fit(model: nn.Module, *, epochs: int, seed: int, lr: float = DENSE_RATE) -> nn.Module:
    """Adam with one cycle on all training images, in place."""
    model.to(memory_format=torch.channels_last).train()
    steps = -(-len(data.x_train) // 128)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=epochs * steps)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for _ in range(epochs):
            for batch in torch.randperm(len(data.x_train)).split(128):
                with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                    logits = model(data.x_train[batch]).float()
                loss = F.cross_entropy(logits, data.y_train[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return model.to(memory_format=torch.contiguous_format).eval()


def from_scratch(model: Callable[[], nn.Module], seed: int, epochs: int, **how: Any) -> nn.Module:
    torch.manual_seed(seed)
    return fit(model(), epochs=epochs, seed=seed, **how)


@functools.cache
def dense(seed: int) -> nn.Sequential:
    """The trained network, from its checkpoint or made; rounded to half precision, which is what is stored."""
    path, model = checkpoints / f"cnn_seed{seed}.pt", make_cnn()
    if not path.exists():
        model = from_scratch(make_cnn, seed, EPOCHS)
        exact = right(model)
        half = {key: value.half() if value.is_floating_point() else value for key, value in model.state_dict().items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(half, path)
        model.load_state_dict(half)
        print(f"seed {seed}: half precision changes {(right(model) != exact).sum()} of {len(exact)} verdicts")
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.eval()


def right(model: nn.Module) -> Tensor:
    """Which test images the model classifies correctly."""
    with torch.no_grad():
        model = copy.deepcopy(model).eval().to(memory_format=torch.channels_last)
        return torch.cat([model(x).argmax(1) == y for x, y in zip(data.x_test.split(1000), data.y_test.split(1000))])


@functools.cache
def folded(seed: int) -> nn.Sequential:
    return lesson()["fold"](dense(seed))


@functools.cache
def errors(seed: int) -> dict:
    names = lesson()
    statistics = lrf.collect(folded(seed), names["x_calibration"], names["NAMES"], temperature=2)
    return names["all_options"](folded(seed), statistics)


def start(seed: int, plan: dict) -> nn.Module:
    """A factorized network after least squares."""
    names = lesson()
    return names["refit"](folded(seed), names["apply"](folded(seed), plan), names["x_calibration"])


def plan_of(kind: str, seed: int, parts: int) -> dict | None:
    if kind.startswith("allocated by "):
        return lesson()["allocate"](errors(seed), 1 / parts, kind.removeprefix("allocated by "))
    return lesson()["uniform"](kind, 1 / parts)


def continued(seed: int, model: nn.Module, epochs: int = MORE, norms: bool = True, **how: Any) -> nn.Module:
    """A copy of ``model`` after more epochs; with ``norms``, these have BatchNorm, which is folded again afterwards."""
    model = fit(with_norms(model) if norms else copy.deepcopy(model), epochs=epochs, seed=seed, **{"lr": RATE} | how)
    return without_norms(model) if norms else model


def recover(seed: int, kind: str, parts: int, epochs: int = MORE, **how: Any) -> nn.Module:
    return continued(seed, start(seed, plan_of(kind, seed, parts)), epochs, **how)


@torch.no_grad()
def with_norms(model: nn.Module) -> nn.Module:
    """A copy with a BatchNorm behind every convolution that changes nothing, as long as it does not train."""
    model, seen = copy.deepcopy(model).eval(), {}
    convs = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d)}
    hooks = [
        layer.register_forward_hook(lambda _, args, output, name=name: seen.update({name: output}))
        for name, layer in convs.items()
    ]
    model(lesson()["x_calibration"])
    for hook in hooks:
        hook.remove()
    for name, conv in convs.items():
        norm = nn.BatchNorm2d(conv.out_channels).eval()
        norm.running_var.copy_(seen[name].var((0, 2, 3)))
        norm.bias.copy_(seen[name].mean((0, 2, 3)))
        norm.running_mean.copy_(norm.bias - (0 if conv.bias is None else conv.bias))
        norm.weight.copy_((norm.running_var + norm.eps).sqrt())
        conv.bias = None
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, nn.Sequential(conv, norm))
    return model


def without_norms(model: nn.Module) -> nn.Module:
    """A copy in which each convolution has taken over the BatchNorm behind it."""
    model = copy.deepcopy(model).eval()
    for name, part in list(model.named_modules()):
        if isinstance(part, nn.Sequential) and len(part) == 2 and isinstance(part[1], nn.BatchNorm2d):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, fuse_conv_bn_eval(*part))
    return model


def run_dense(record, seed):
    record("dense, 5 epochs", lambda: dense(seed))


def run_untrained(record, seed):
    names = lesson()
    for parts in SHARES:
        for scheme in names["SPLITS"]:
            if plan := plan_of(scheme, seed, parts):
                record(f"{scheme}, 1/{parts}, truncated SVD", lambda p=plan: names["apply"](folded(seed), p))
                record(f"{scheme}, 1/{parts}, least squares", lambda p=plan: start(seed, p))
        for unit in ("MACs", "parameters"):
            kind = f"allocated by {unit}"
            record(f"{kind}, 1/{parts}, least squares", lambda k=kind, n=parts: start(seed, plan_of(k, seed, n)))


def run_recovered(record, seed):
    for parts in (8, 4):
        record(f"allocated by MACs, 1/{parts}, 4 epochs", lambda n=parts: recover(seed, "allocated by MACs", n))


def run_controls(record, seed):
    narrow = functools.partial(make_cnn, NARROW)
    record("narrower, 1/8, 9 epochs", lambda: from_scratch(narrow, seed, EPOCHS + MORE, lr=NARROW_RATE))
    record("separable, 1/8, 9 epochs", lambda: from_scratch(make_separable, seed, EPOCHS + MORE, lr=SEPARABLE_RATE))


def run_more(record, seed):
    """Variants, of seed 0 only."""
    if seed == 0:
        record("dense, 5 + 4 epochs", lambda: continued(seed, folded(seed), lr=DENSE_RATE))
        record("allocated by MACs, 1/8, 1 epoch", lambda: recover(seed, "allocated by MACs", 8, 1))
        for rate in (3e-3, 8e-3):
            method = f"allocated by MACs, 1/8, 4 epochs without BatchNorm, rate {rate}"
            record(method, lambda lr=rate: recover(seed, "allocated by MACs", 8, norms=False, lr=lr))


def run_choices(record, seed):
    """Settings, of the controls as of ours, on validation images; the networks are those of ``--validate``."""
    for rate in (1e-2, 2e-2):
        method = f"allocated by MACs, 1/8, 4 epochs, BatchNorm put back, rate {rate}"
        record(method, lambda lr=rate: recover(seed, "allocated by MACs", 8, lr=lr))
    for rate in (5e-3, 1e-2, 2e-2):
        method = f"narrower, 1/8, 9 epochs, rate {rate}"
        record(method, lambda lr=rate: from_scratch(lambda: make_cnn(NARROW), seed, 9, lr=lr))
    for rate in (1e-2, 2e-2):
        record(f"separable, 1/8, 9 epochs, rate {rate}", lambda lr=rate: from_scratch(make_separable, seed, 9, lr=lr))


PARTS = {
    "dense": run_dense,
    "recovered": run_recovered,
    "controls": run_controls,
    "untrained": run_untrained,
    "more": run_more,
}


def recorder(path: Path, seed: int) -> Callable[[str, Callable[[], nn.Module]], None]:
    """A function that measures a method and appends its row, unless the file has it.

    Which images are right goes to build/, for the comparisons on the same images.
    """

    def record(method: str, make: Callable[[], nn.Module]) -> None:
        verdicts = ROOT / "build" / path.stem / f"{method.replace('/', '_')}, seed {seed}.pt"
        with path.open(newline="") as file:
            there = any((row["method"], row["seed"]) == (method, str(seed)) for row in csv.DictReader(file))
        if there and verdicts.exists():
            return
        begin, model = time.perf_counter(), make()
        verdict = right(model)
        verdicts.parent.mkdir(parents=True, exist_ok=True)
        torch.save(verdict, verdicts)
        if there:
            return
        counts = lrf.count_parameters(model), lrf.count_macs(model, data.x_test[:1])
        row = [method, *counts, seed, f"{100 * verdict.double().mean():.2f}"]
        with path.open("a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(row)
        print(*row, f"{time.perf_counter() - begin:.0f} s", sep=", ", flush=True)

    return record


def compare(path: Path) -> None:
    """The paired differences of PAIRS, with two 95 % intervals: over the images, for these networks; over the seeds."""
    rows, seeds = [], (0, 1, 2)
    for ours, control in PAIRS:
        files = [
            [path.parents[1] / "build" / path.stem / f"{m.replace('/', '_')}, seed {seed}.pt" for seed in seeds]
            for m in (ours, control)
        ]
        if all(file.exists() for pair in files for file in pair):
            a, b = (torch.stack([torch.load(file) for file in group]).double() for group in files)
            images, by_seed = 100 * (a - b).mean(0), 100 * (a - b).mean(1)
            over_images = 1.96 * images.std() / math.sqrt(len(images))
            over_seeds = 4.303 * by_seed.std() / math.sqrt(3)  # Student's t, two degrees of freedom
            row = (images.mean(), over_images, over_seeds)
            rows.append([ours, control, *(f"{value:.2f}" for value in row)])
    with path.with_name(f"{path.stem}_pairs.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["ours", "control", "difference (pp)", "± over images", "± over seeds"])
        writer.writerows(rows)


def main() -> None:
    global data, checkpoints, bfloat16
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--validate", action="store_true", help="measure on 10,000 training images kept back, seed 0")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--bfloat16", action="store_true", help="train in it: twice as fast on the CPUs that have it")
    options = parser.parse_args()
    path, bfloat16 = ROOT / "results" / "convolutions.csv", options.bfloat16
    if options.validate:
        x, y = data.x_train, data.y_train
        data = nb.Dataset(x[:50_000], y[:50_000], x[50_000:], y[50_000:])
        checkpoints = ROOT / "build" / "validation"
        options.seeds, path = [0], path.with_name("convolutions_validation.csv")
        PARTS["choices"] = run_choices
        options.parts = ["dense", "choices"]
    torch.set_num_threads(1)
    if not path.exists():
        with path.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(COLUMNS)
    for seed in options.seeds:  # the lesson's setup cells load all of them
        dense(seed)
    for part in options.parts:
        for seed in options.seeds:
            PARTS[part](recorder(path, seed), seed)
    if not options.validate:
        compare(path)


if __name__ == "__main__":
    main()
