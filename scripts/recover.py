"""The long runs behind notebook 07, all five seeds: factorize, then recover. Writes results/recovery.csv.

    python scripts/recover.py [--parts goals controls lenet large continued] [--seeds 0 1 2 3 4] [--out FILE]
    python scripts/recover.py --validate

One thread needs about an hour and a half for everything. Each row is written as soon as it is measured; rows that are
in the file already are skipped, so an interrupted run resumes. The test set only measures. What had to be chosen
(rates, epochs, ranks, shapes, the temperature), for the controls as for the factorized networks, was chosen with
networks trained on the first 50,000 training images, by their accuracy on the other 10,000. ``--validate`` does that
again and writes results/recovery_validation.csv, with the settings that were not taken. The parts ``large`` and
``continued``, on five wide layers, have not been run for all seeds, nor validated; the committed tables lack them.
"""

import argparse
import copy
import csv
import functools
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import lrf_utils as lrf
import notebook_utils as nb

torch.set_num_threads(1)

COLUMNS = ["model", "method", "parameters", "ratio", "seed", "accuracy (%)"]
WIDTHS = {"mlp": (784, 256, 128, 10), "lenet": (784, 300, 100, 10), "large": (784, *5 * [1024], 10)}
NAMES = {"mlp": "784-256-128-10", "lenet": "784-300-100-10", "large": "784-5x1024-10"}
MLP_8X, MLP_12X = {"fc1": 22, "fc2": 11}, {"fc1": 14, "fc2": 8}
BEST_BEFORE = {"8x": {"fc1": 22, "fc2": 12}, "12x": {"fc1": 13, "fc2": 11}}  # what notebook 06 finds, untrained
NARROW = {"8x": (784, 30, 127, 10), "12x": (784, 20, 116, 10)}
LENET_10X = {"fc1": 20, "fc2": 8}
LARGE_23X = {f"fc{i}": 20 for i in range(1, 6)}
LARGE_40X = {"fc1": 24, "fc2": 8, "fc3": 8, "fc4": 8, "fc5": 8}
RATE, DENSE_RATE = 5e-3, 2e-3  # peaks of the one-cycle schedules, of small networks and of dense ones
data = nb.load_mnist()
CALIBRATION = data.x_train[:10_000]


def fit(model, epochs, seed, lr=RATE, teacher=None, temperature=2.0, clip=None):
    """``nb.train`` on all training images; with a teacher, on its softened probabilities in place of the labels.

    ``clip``: gradients longer than that are shortened.
    """
    if teacher is None:
        targets, temperature = data.y_train, 1.0
    else:
        with torch.no_grad():
            targets = torch.cat([(teacher(batch) / temperature).softmax(1) for batch in data.x_train.split(5000)])
    steps = -(-len(targets) // 128)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=epochs * steps)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for batch in (batch for _ in range(epochs) for batch in torch.randperm(len(targets)).split(128)):
            logits = model(data.x_train[batch])
            loss = temperature**2 * F.cross_entropy(logits / temperature, targets[batch])
            optimizer.zero_grad()
            loss.backward()
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            schedule.step()
    return model


@functools.cache
def dense_model(key: str, seed: int) -> nn.Sequential:
    """Three epochs from a random start. Of the small MLP the committed one, if it may know all training images."""
    if key == "mlp" and len(data.x_train) == 60_000:
        return nb.load_baseline(seed)
    torch.manual_seed(seed)
    model = nb.make_mlp(WIDTHS[key])
    nb.train(model, data.x_train, data.y_train, epochs=3, seed=seed, batch_size=256 if key == "large" else 128)
    return model


@functools.cache
def longer(key: str, seed: int, epochs: int, lr: float = DENSE_RATE) -> nn.Sequential:
    """The dense model after more epochs of its own."""
    return fit(copy.deepcopy(dense_model(key, seed)), epochs, seed, lr)


def by_loss(key: str, seed: int, ranks: dict[str, int]) -> nn.Sequential:
    return lrf.factorize(dense_model(key, seed), ranks, inputs=CALIBRATION, temperature=2)


def by_svd(key: str, seed: int, ranks: dict[str, int]) -> nn.Sequential:
    return lrf.factorize(dense_model(key, seed), ranks)


def sequential(seed: int, ranks: dict[str, int]) -> nn.Sequential:
    return lrf.factorize_sequentially(dense_model("large", seed), ranks, CALIBRATION, temperature=2)


@functools.cache
def small_large(seed: int) -> nn.Sequential:
    """The network of five wide layers at 40x, before training."""
    return sequential(seed, LARGE_40X)


def random_start(seed: int, widths, ranks: dict[str, int] | None = None) -> nn.Sequential:
    """A new network; with ``ranks``, those layers are pairs of new layers."""
    torch.manual_seed(seed)
    model = nb.make_mlp(widths)
    for name, rank in (ranks or {}).items():
        layer = model.get_submodule(name)
        down, up = nn.Linear(layer.in_features, rank, bias=False), nn.Linear(rank, layer.out_features)
        setattr(model, name, nn.Sequential(down, up))
    return model


def pruned(seed: int, size: int, epochs: int, lr: float = RATE) -> nn.Sequential:
    """The dense network with its smallest weights, all layers together, at 0, so that ``size`` numbers are not."""
    model = copy.deepcopy(dense_model("mlp", seed))
    weights = [(layer, "weight") for layer in model if isinstance(layer, nn.Linear)]
    prune.global_unstructured(weights, prune.L1Unstructured, amount=lrf.count_parameters(model) - size)
    if epochs:
        fit(model, epochs, seed, lr)
    for layer, name in weights:
        prune.remove(layer, name)
    return model


def nonzeros(model: nn.Module) -> int:
    return sum(int(p.count_nonzero()) for p in model.parameters())


def goals(record, seed):
    """The goals of the 784-256-128-10 network; the same with plain SVD; dense, as it was and with as many epochs."""
    record("dense, 3 epochs", lambda: dense_model("mlp", seed))
    for name, ranks, epochs in (
        ("8x", MLP_8X, 5),
        ("12x", MLP_12X, 10),
        ("fc2 at rank 5", {"fc2": 5}, 5),
        ("fc2 at rank 2", {"fc2": 2}, 10),
        ("fc2 at rank 1", {"fc2": 1}, 10),
    ):
        for start, make in ((name, by_loss), (f"{name}, plain SVD", by_svd)):
            make = partial(make, "mlp", seed, ranks)
            record(f"{start}, no training", make)
            record(f"{start}, {epochs} epochs", lambda m=make, e=epochs: fit(m(), e, seed))
    for epochs in (5, 10):
        record(f"dense, 3 + {epochs} epochs", lambda e=epochs: longer("mlp", seed, e))


def controls(record, seed):
    """The same sizes in other ways, with as many epochs; and a teacher in place of the labels."""
    for name, ranks, epochs in (("8x", MLP_8X, 5), ("12x", MLP_12X, 10)):
        total, size = 3 + epochs, lrf.count_parameters(random_start(seed, WIDTHS["mlp"], ranks))
        narrow = partial(random_start, seed, NARROW[name])
        record(f"{name}, narrower dense layers, {total} epochs", lambda m=narrow, e=total: fit(m(), e, seed))
        start = partial(random_start, seed, WIDTHS["mlp"], ranks)
        record(f"{name}, factors from a random start, {total} epochs", lambda m=start, e=total: fit(m(), e, seed))
        for cut, further in ((f"{name}, pruned, no training", 0), (f"{name}, pruned, {epochs} epochs", epochs)):
            record(cut, lambda s=size, e=further: pruned(seed, s, e), count=nonzeros)
        other = BEST_BEFORE[name]
        method, make = "{} with ranks {fc1} and {fc2}".format(name, **other), partial(by_loss, "mlp", seed, other)
        record(f"{method}, no training", make)
        record(f"{method}, {epochs} epochs", lambda m=make, e=epochs: fit(m(), e, seed))
    for training, teacher in (("3", dense_model), ("3 + 5", partial(longer, epochs=5))):
        record(
            f"8x, 5 epochs, teacher of {training} epochs",
            lambda t=teacher: fit(by_loss("mlp", seed, MLP_8X), 5, seed, teacher=t("mlp", seed)),
        )


def lenet(record, seed):
    """LeNet300."""
    record("dense, 3 epochs", lambda: dense_model("lenet", seed))
    record("10x, no training", lambda: by_loss("lenet", seed, LENET_10X))
    record("10x, 10 epochs", lambda: fit(by_loss("lenet", seed, LENET_10X), 10, seed))
    record("10x, plain SVD, 10 epochs", lambda: fit(by_svd("lenet", seed, LENET_10X), 10, seed))
    record("dense, 3 + 10 epochs", lambda: longer("lenet", seed, 10))


def large(record, seed):
    """The five layers of width 1024. The last layer stays dense."""
    record("dense, 3 epochs", lambda: dense_model("large", seed))
    for name, ranks in (("rank 20", LARGE_23X), ("40x", LARGE_40X)):
        record(f"{name}, plain SVD, no training", lambda r=ranks: by_svd("large", seed, r))
        record(f"{name}, no training", lambda r=ranks: by_loss("large", seed, r))
    record("rank 20, sequential, no training", lambda: sequential(seed, LARGE_23X))
    record("40x, sequential, no training", lambda: small_large(seed))
    for start, make in (
        ("sequential", lambda: copy.deepcopy(small_large(seed))),
        ("plain SVD", lambda: by_svd("large", seed, LARGE_40X)),
    ):
        record(
            f"40x, {start}, 4 epochs, teacher",
            lambda m=make: fit(m(), 4, seed, 2e-3, teacher=dense_model("large", seed), clip=1.0),
        )


def continued(record, seed):
    """The dense network of five wide layers with the further epochs of its recovery; the slowest of all."""
    record("dense, 3 + 4 epochs", lambda: longer("large", seed, 4))


def choices(record, seed):
    """The settings above among others. ``data`` holds validation images in place of the test images."""
    for epochs, rate in ((5, 1e-3), (5, 2e-3), (5, 5e-3), (10, 1e-3), (10, 2e-3)):
        record(f"dense, 3 + {epochs} epochs, rate {rate}", lambda e=epochs, lr=rate: longer("mlp", seed, e, lr))
    for name, epochs, shapes in (
        ("8x", 8, ((36, 10), (34, 46), (32, 84), (30, 127), (28, 174), (26, 225))),
        ("12x", 13, ((24, 13), (22, 61), (20, 116), (18, 178), (16, 249))),
    ):
        for shape in shapes:
            method = "{}, narrower 784-{}-{}-10, {} epochs, rate 0.005".format(name, *shape, epochs)
            record(method, lambda s=shape, e=epochs: fit(random_start(seed, (784, *s, 10)), e, seed))
    size = lrf.count_parameters(random_start(seed, WIDTHS["mlp"], MLP_8X))
    for rate in (1e-3, 2e-3, 5e-3, 1e-2):
        record(f"8x, pruned, 5 epochs, rate {rate}", lambda lr=rate: pruned(seed, size, 5, lr), count=nonzeros)
    for rate in (2e-3, 1e-2):
        method = "8x, narrower 784-{1}-{2}-10, 8 epochs, rate {rate}".format(*NARROW["8x"], rate=rate)
        record(method, lambda lr=rate: fit(random_start(seed, NARROW["8x"]), 8, seed, lr))
    for name, ranks, epochs, rates in (
        ("8x", MLP_8X, 5, (2e-3, 5e-3, 1e-2)),
        ("8x", BEST_BEFORE["8x"], 5, (5e-3,)),
        ("8x", {"fc1": 20, "fc2": 16}, 5, (5e-3,)),
        ("8x", {"fc1": 24, "fc2": 7}, 5, (5e-3,)),
        ("12x", MLP_12X, 10, (2e-3, 5e-3, 1e-2)),
        ("12x", BEST_BEFORE["12x"], 10, (5e-3,)),
        ("12x", {"fc1": 15, "fc2": 6}, 10, (2e-3, 5e-3, 1e-2)),
        ("12x", {"fc1": 16, "fc2": 3}, 10, (5e-3,)),
        ("fc2", {"fc2": 5}, 5, (2e-3, 5e-3, 1e-2)),
        ("fc2", {"fc2": 2}, 10, (2e-3, 5e-3, 1e-2)),
        ("fc2", {"fc2": 1}, 5, (5e-3,)),
        ("fc2", {"fc2": 1}, 10, (2e-3, 5e-3, 1e-2)),
    ):
        for rate in rates:
            method = f"{name} with {' and '.join(map(str, ranks.values()))}, {epochs} epochs, rate {rate}"
            record(method, lambda r=ranks, e=epochs, lr=rate: fit(by_loss("mlp", seed, r), e, seed, lr))
    for rate in (2e-3, 5e-3, 1e-2):
        method = f"8x, plain SVD, 5 epochs, rate {rate}"
        record(method, lambda lr=rate: fit(by_svd("mlp", seed, MLP_8X), 5, seed, lr))
        method = f"8x, factors from a random start, 8 epochs, rate {rate}"
        record(method, lambda lr=rate: fit(random_start(seed, WIDTHS["mlp"], MLP_8X), 8, seed, lr))
    for temperature in (1, 2, 4):
        record(
            f"8x, 5 epochs, teacher of 3 + 5 epochs, temperature {temperature}",
            lambda t=temperature: fit(
                by_loss("mlp", seed, MLP_8X), 5, seed, teacher=longer("mlp", seed, 5), temperature=t
            ),
        )


def lenet_choices(record, seed):
    for ranks in (LENET_10X, {"fc1": 18, "fc2": 14}, {"fc1": 21, "fc2": 5}):
        method = "10x with {fc1} and {fc2}, 10 epochs".format(**ranks)
        record(method, lambda r=ranks: fit(by_loss("lenet", seed, r), 10, seed))


def large_choices(record, seed):
    for rate, clip in ((2e-3, None), (2e-3, 1.0), (5e-3, None), (5e-3, 1.0)):
        method = f"40x, sequential, 4 epochs, teacher, rate {rate}" + (", clipped" if clip else "")
        record(
            method,
            lambda lr=rate, c=clip: fit(
                copy.deepcopy(small_large(seed)), 4, seed, lr, teacher=dense_model("large", seed), clip=c
            ),
        )
    record(
        "40x, sequential, 4 epochs, labels, rate 0.002",
        lambda: fit(copy.deepcopy(small_large(seed)), 4, seed, 2e-3),
    )


PARTS = {
    "goals": (goals, "mlp"),
    "controls": (controls, "mlp"),
    "lenet": (lenet, "lenet"),
    "large": (large, "large"),
    "continued": (continued, "large"),
}


def recorder(path: Path, key: str, seed: int) -> Callable[..., None]:
    """A function that measures a method and appends its row, unless the file has it."""

    def is_there(method: str) -> bool:
        with path.open(newline="") as file:
            rows = {(row["model"], row["method"], row["seed"]) for row in csv.DictReader(file)}
        return (NAMES[key], method, str(seed)) in rows

    def record(method: str, make: Callable[[], nn.Module], count: Callable = lrf.count_parameters) -> None:
        if is_there(method):
            return
        start = time.perf_counter()
        model = make()
        accuracy = 100 * lrf.accuracy(model, data.x_test, data.y_test)
        size = count(model)
        ratio = lrf.count_parameters(nb.make_mlp(WIDTHS[key])) / size
        if is_there(method):
            raise SystemExit(f"another process writes to {path.name} too; stop one of the two")
        with path.open("a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(
                [NAMES[key], method, size, f"{ratio:.2f}", seed, f"{accuracy:.2f}"]
            )
        seconds = time.perf_counter() - start
        print(f"{NAMES[key]}, seed {seed}: {method}: {accuracy:.2f} % ({size:,}, {seconds:.0f} s)", flush=True)

    return record


def main() -> None:
    global data
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--validate", action="store_true", help="measure settings on validation images, three seeds")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(nb.SEEDS))
    parser.add_argument("--out", type=Path, default=nb.ROOT / "results" / "recovery.csv")
    options = parser.parse_args()
    runs = [(*PARTS[part], seed) for part in options.parts for seed in options.seeds]
    if options.validate:
        x, y = data.x_train, data.y_train
        data = nb.Dataset(x[:50_000], y[:50_000], x[50_000:], y[50_000:])
        tried = [(choices, "mlp", seed) for seed in (0, 1, 2)] + [(lenet_choices, "lenet", seed) for seed in (0, 1, 2)]
        runs = [*tried, (large_choices, "large", 0)]
        options.out = options.out.with_name("recovery_validation.csv")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    if not options.out.exists():
        with options.out.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(COLUMNS)
    for run, key, seed in runs:
        run(recorder(options.out, key, seed), seed)


if __name__ == "__main__":
    main()
