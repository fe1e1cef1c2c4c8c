"""The long runs behind notebook 07, all five seeds: factorize, then recover. Writes results/recovery.csv.

    python scripts/recover.py [--parts mlp controls lenet large continued] [--seeds 0 1 2 3 4] [--out FILE]
    python scripts/recover.py --validate

One thread needs about an hour for everything. Each row is written as soon as it is measured; rows that are in the file
already are skipped, so an interrupted run resumes. The test set only measures: ranks, rates and epochs were chosen with
networks trained on the first 50,000 training images, by their accuracy on the other 10,000. ``--validate`` does that
again for seed 0 and writes results/recovery_validation.csv: the methods below, and settings that were not taken.
"""

import argparse
import copy
import csv
import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import lrf_utils as lrf
import notebook_utils as nb

torch.set_num_threads(1)

COLUMNS = ["model", "method", "parameters", "ratio", "seed", "accuracy (%)"]
WIDTHS = {"mlp": (784, 256, 128, 10), "lenet": (784, 300, 100, 10), "large": (784, *5 * [1024], 10)}
NAMES = {"mlp": "784-256-128-10", "lenet": "784-300-100-10", "large": "784-5x1024-10"}
MLP_8X, MLP_12X = {"fc1": 22, "fc2": 11}, {"fc1": 14, "fc2": 8}
LENET_10X = {"fc1": 20, "fc2": 8}
LARGE_23X = {f"fc{i}": 20 for i in range(1, 6)}
LARGE_40X = {"fc1": 24, "fc2": 8, "fc3": 8, "fc4": 8, "fc5": 8}
data = nb.load_mnist()
CALIBRATION = data.x_train[:10_000]


def fit(model, targets, *, epochs, seed, lr=5e-3, temperature=1.0, pixels=0, clip=None):
    """``nb.train`` on all training images with three extras; ``targets`` are labels, or a teacher's probabilities.

    ``temperature`` divides the logits. ``pixels``: in each epoch every image is shifted at random by up to so many.
    ``clip``: gradients longer than that are shortened.
    """
    steps = -(-len(data.x_train) // 128)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=epochs * steps)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for _ in range(epochs):
            images = shift(data.x_train, pixels) if pixels else data.x_train
            for batch in torch.randperm(len(images)).split(128):
                loss = temperature**2 * F.cross_entropy(model(images[batch]) / temperature, targets[batch])
                optimizer.zero_grad()
                loss.backward()
                if clip:
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                schedule.step()
    return model


def soft_labels(teacher: nn.Module, temperature: float) -> Tensor:
    """The teacher's probabilities for all training images, softened."""
    with torch.no_grad():
        return torch.cat([(teacher(batch) / temperature).softmax(1) for batch in data.x_train.split(5000)])


def shift(x: Tensor, pixels: int) -> Tensor:
    """Each 28×28 image moved by a random whole number of pixels, at most ``pixels``, along both axes."""
    images = F.pad(x.view(-1, 28, 28), (pixels,) * 4, value=float(x.min()))  # the background
    side = 2 * pixels + 1
    which, moved = torch.randint(side * side, (len(x),)), torch.empty(len(x), 28, 28)
    for k in range(side * side):
        rows = (which == k).nonzero().squeeze(1)
        moved[rows] = images[rows, k // side : k // side + 28, k % side : k % side + 28]
    return moved.flatten(1)


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
def longer(key: str, seed: int, epochs: int, lr: float = 5e-3, pixels: int = 0, clip: float | None = None):
    """The dense model after more epochs of its own."""
    model = copy.deepcopy(dense_model(key, seed))
    return fit(model, data.y_train, epochs=epochs, seed=seed, lr=lr, pixels=pixels, clip=clip)


def shifted_teacher(key: str, seed: int) -> nn.Sequential:
    """The dense model after 5 more epochs, on images shifted by up to a pixel."""
    return longer(key, seed, 5, 2e-3, 1)


@functools.cache
def small_large(seed: int) -> nn.Sequential:
    """The network of five wide layers at 40x, before training."""
    return sequential("large", seed, LARGE_40X)


def factorized(key: str, seed: int, ranks: dict[str, int]) -> nn.Sequential:
    return lrf.factorize(dense_model(key, seed), ranks, inputs=CALIBRATION, temperature=2)


def sequential(key: str, seed: int, ranks: dict[str, int]) -> nn.Sequential:
    return lrf.factorize_sequentially(dense_model(key, seed), ranks, data.x_train[:5000], temperature=2)


def from_labels(model, seed, epochs):
    return fit(model, data.y_train, epochs=epochs, seed=seed)


def from_teacher(model, teacher, seed, epochs, lr=5e-3, clip=None):
    return fit(model, soft_labels(teacher, 2), epochs=epochs, seed=seed, lr=lr, temperature=2, clip=clip)


def random_start(seed: int, widths, ranks: dict[str, int] | None = None) -> nn.Sequential:
    """A new network; with ``ranks``, those layers are pairs of new layers."""
    torch.manual_seed(seed)
    model = nb.make_mlp(widths)
    for name, rank in (ranks or {}).items():
        layer = model.get_submodule(name)
        down, up = nn.Linear(layer.in_features, rank, bias=False), nn.Linear(rank, layer.out_features)
        setattr(model, name, nn.Sequential(down, up))
    return model


def mlp(record, seed):
    """The goals of the 784-256-128-10 network."""
    record("dense, 3 epochs", lambda: dense_model("mlp", seed))
    record("8x, no training", lambda: factorized("mlp", seed, MLP_8X))
    record("8x, 5 epochs", lambda: from_labels(factorized("mlp", seed, MLP_8X), seed, 5))
    record("12x, no training", lambda: factorized("mlp", seed, MLP_12X))
    record("12x, 10 epochs", lambda: from_labels(factorized("mlp", seed, MLP_12X), seed, 10))
    for rank, epochs in ((5, 4), (2, 8), (1, 12)):
        record(f"fc2 at rank {rank}, no training", lambda r=rank: factorized("mlp", seed, {"fc2": r}))
        method = f"fc2 at rank {rank}, {epochs} epochs"
        record(method, lambda r=rank, e=epochs: from_labels(factorized("mlp", seed, {"fc2": r}), seed, e))
    record("dense, 3 + 5 epochs, shifted images", lambda: shifted_teacher("mlp", seed))
    record(
        "12x, 10 epochs, teacher of shifted images",
        lambda: from_teacher(factorized("mlp", seed, MLP_12X), shifted_teacher("mlp", seed), seed, 10),
    )


def lenet(record, seed):
    """LeNet300."""
    record("dense, 3 epochs", lambda: dense_model("lenet", seed))
    record("10x, no training", lambda: factorized("lenet", seed, LENET_10X))
    record("dense, 3 + 5 epochs, shifted images", lambda: shifted_teacher("lenet", seed))
    record(
        "10x, 10 epochs, teacher of shifted images",
        lambda: from_teacher(factorized("lenet", seed, LENET_10X), shifted_teacher("lenet", seed), seed, 10),
    )
    record("10x, 10 epochs", lambda: from_labels(factorized("lenet", seed, LENET_10X), seed, 10))
    record("dense, 3 + 10 epochs", lambda: longer("lenet", seed, 10))


def large(record, seed):
    """The five layers of width 1024. The last layer stays dense."""
    record("dense, 3 epochs", lambda: dense_model("large", seed))
    record("rank 20, truncated SVD, no training", lambda: lrf.factorize(dense_model("large", seed), LARGE_23X))
    record(
        "rank 20, sequential, no training",
        lambda: sequential("large", seed, LARGE_23X),
    )
    record("40x, truncated SVD, no training", lambda: lrf.factorize(dense_model("large", seed), LARGE_40X))
    record("40x, sequential, no training", lambda: small_large(seed))
    record(
        "40x, 4 epochs, teacher",
        lambda: from_teacher(copy.deepcopy(small_large(seed)), dense_model("large", seed), seed, 4, lr=2e-3, clip=1.0),
    )


def continued(record, seed):
    """The dense network of five wide layers with the further epochs of its recovery; the slowest of all."""
    record("dense, 3 + 4 epochs", lambda: longer("large", seed, 4, lr=2e-3, clip=1.0))


def controls(record, seed):
    """The dense network with as many further epochs; the same sizes in other ways; a teacher in place of the labels."""
    for epochs in (4, 5, 8, 10, 12):
        record(f"dense, 3 + {epochs} epochs", lambda e=epochs: longer("mlp", seed, e))
    for name, ranks, widths, epochs in (
        ("8x", MLP_8X, (784, 35, 26, 10), 8),
        ("12x", MLP_12X, (784, 24, 13, 10), 13),
    ):
        low_rank = functools.partial(random_start, seed, WIDTHS["mlp"], ranks)
        method = f"{name}, factors from a random start, {epochs} epochs"
        record(method, lambda m=low_rank, e=epochs: from_labels(m(), seed, e))
        narrow = functools.partial(random_start, seed, widths)
        record(f"{name}, narrower dense layers, {epochs} epochs", lambda m=narrow, e=epochs: from_labels(m(), seed, e))
    record("8x, truncated SVD, 5 epochs", lambda: from_labels(lrf.factorize(dense_model("mlp", seed), MLP_8X), seed, 5))
    for name, ranks, epochs in (("8x", MLP_8X, 5), ("fc2 at rank 2", {"fc2": 2}, 8)):
        record(
            f"{name}, {epochs} epochs, teacher of 3 epochs",
            lambda r=ranks, e=epochs: from_teacher(factorized("mlp", seed, r), dense_model("mlp", seed), seed, e),
        )
        record(
            f"{name}, {epochs} epochs, teacher of 3 + {epochs} epochs",
            lambda r=ranks, e=epochs: from_teacher(factorized("mlp", seed, r), longer("mlp", seed, e), seed, e),
        )


def choices(record, seed):
    """Settings that were compared on validation images and not taken, or that show how little hangs on the choice."""
    for rank, epochs, rate in ((2, 8, 2e-3), (2, 8, 1e-2), (1, 8, 5e-3)):
        record(
            f"fc2 at rank {rank}, {epochs} epochs, rate {rate}",
            lambda r=rank, e=epochs, lr=rate: fit(
                factorized("mlp", seed, {"fc2": r}), data.y_train, epochs=e, seed=seed, lr=lr
            ),
        )
    for name, ranks in (("12x", MLP_12X), ("12x with ranks 15 and 6", {"fc1": 15, "fc2": 6})):
        record(f"{name}, 20 epochs", lambda r=ranks: from_labels(factorized("mlp", seed, r), seed, 20))
        record(
            f"{name}, 20 epochs, teacher of shifted images",
            lambda r=ranks: from_teacher(factorized("mlp", seed, r), shifted_teacher("mlp", seed), seed, 20),
        )
    for rate in (2e-3, 5e-3, 1e-2):
        for how, widths, ranks in (
            ("factors from a random start", WIDTHS["mlp"], MLP_8X),
            ("narrower dense layers", (784, 35, 26, 10), None),
        ):
            record(
                f"8x, {how}, 8 epochs, rate {rate}",
                lambda w=widths, r=ranks, lr=rate: fit(
                    random_start(seed, w, r), data.y_train, epochs=8, seed=seed, lr=lr
                ),
            )
    record(
        "12x, 20 epochs, shifted images",
        lambda: fit(factorized("mlp", seed, MLP_12X), data.y_train, epochs=20, seed=seed, pixels=1),
    )


PARTS = {
    "mlp": (mlp, "mlp"),
    "controls": (controls, "mlp"),
    "lenet": (lenet, "lenet"),
    "large": (large, "large"),
    "continued": (continued, "large"),
}


def recorder(path: Path, key: str, seed: int) -> Callable[[str, Callable[[], nn.Module]], None]:
    """A function that measures a method and appends its row, unless the file has it."""

    def is_there(method: str) -> bool:
        with path.open(newline="") as file:
            rows = {(row["model"], row["method"], row["seed"]) for row in csv.DictReader(file)}
        return (NAMES[key], method, str(seed)) in rows

    def record(method: str, make: Callable[[], nn.Module]) -> None:
        if is_there(method):
            return
        start = time.perf_counter()
        model = make()
        accuracy = 100 * lrf.accuracy(model, data.x_test, data.y_test)
        size = lrf.count_parameters(model)
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
    parser.add_argument("--validate", action="store_true", help="measure on 10,000 training images kept back, seed 0")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(nb.SEEDS))
    parser.add_argument("--out", type=Path, default=nb.ROOT / "results" / "recovery.csv")
    options = parser.parse_args()
    if options.validate:
        x, y = data.x_train, data.y_train
        data = nb.Dataset(x[:50_000], y[:50_000], x[50_000:], y[50_000:])
        PARTS["choices"] = (choices, "mlp")
        options.parts, options.seeds = ["mlp", "choices", "large", "lenet"], [0]
        options.out = options.out.with_name("recovery_validation.csv")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    if not options.out.exists():
        with options.out.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(COLUMNS)
    for part in options.parts:
        run, key = PARTS[part]
        for seed in options.seeds:
            run(recorder(options.out, key, seed), seed)


if __name__ == "__main__":
    main()
