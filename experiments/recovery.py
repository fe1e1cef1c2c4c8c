"""Lesson 7: factorize, then train again. Writes recovery.csv.

    python -m experiments.recovery [--parts goals controls lenet] [--seeds 0 1 2 3 4]
                                   [--out FOLDER]
    python -m experiments.recovery --validate

The test set only measures. What had to be chosen (rates, epochs, ranks, shapes, the temperature),
for the controls as for the factorized networks, was chosen with networks trained on the first
50,000 training images, by their accuracy on the other 10,000. ``--validate`` does that again with
seeds 0, 1 and 2 and writes recovery_validation.csv, with the settings that were not taken.
"""

from collections.abc import Callable, Iterator
from functools import partial

from torch import nn

import lrf_utils as lrf
import notebook_utils as nb
from experiments.common import Table, parse
from experiments.models import (
    LENET,
    MLP,
    MLP_8X,
    MLP_12X,
    NARROW_8X,
    NARROW_12X,
    RATE,
    MnistNetworks,
    sparse_bytes,
)

COLUMNS = ["model", "method", "parameters", "ratio", "seed", "accuracy (%)"]
OTHER_8X, OTHER_12X = {"fc1": 22, "fc2": 12}, {"fc1": 13, "fc2": 11}  # lesson 6's, untrained
LENET_10X = {"fc1": 20, "fc2": 8}
DECAY, RANDOM_RATE = 1e-4, 1e-2  # for the spectral initialization
FEW_RATE = 1e-3  # for 6,000 images
TEMPERATURE = 1.0

# A part yields what a method is called in the table, and a function that makes its network.
Runs = Iterator[tuple[str, Callable[[], nn.Module]]]


def goals(nets: MnistNetworks) -> Runs:
    """What the lesson set out for, with the loss metric and with plain SVD; and dense controls."""
    yield "dense, 3 epochs", lambda: nets.dense
    for name, ranks, epochs in (
        ("8x", MLP_8X, 5),
        ("12x", MLP_12X, 10),
        ("fc2 at rank 5", {"fc2": 5}, 5),
        ("fc2 at rank 2", {"fc2": 2}, 10),
        ("fc2 at rank 1", {"fc2": 1}, 10),
    ):
        yield f"{name}, no training", partial(nets.by_loss, ranks)
        yield f"{name}, {epochs} epochs", partial(nets.trained, nets.by_loss, ranks, epochs)
        yield f"{name}, plain SVD, no training", partial(nets.by_svd, ranks)
        yield (
            f"{name}, plain SVD, {epochs} epochs",
            partial(nets.trained, nets.by_svd, ranks, epochs),
        )
    for epochs in (5, 10):
        yield f"dense, 3 + {epochs} epochs", partial(nets.longer, epochs)


def short(nets: MnistNetworks) -> Runs:
    """How soon training forgets where the factors come from."""
    for name, make in (("12x", nets.by_loss), ("12x, plain SVD", nets.by_svd)):
        yield (
            f"{name}, 6,000 images",
            partial(on_few_images(nets).trained, make, MLP_12X, 1, FEW_RATE),
        )
        for epochs in (1, 3):
            yield f"{name}, {epochs} epochs", partial(nets.trained, make, MLP_12X, epochs)


def on_few_images(nets: MnistNetworks) -> MnistNetworks:
    few = nb.Dataset(nets.data.x_train[:6000], nets.data.y_train[:6000], *nets.data[2:])
    return MnistNetworks(few, nets.seed)


def controls(nets: MnistNetworks) -> Runs:
    """The same sizes in other ways, with as many epochs; and a teacher in place of the labels."""
    for name, ranks, other, narrow, epochs in (
        ("8x", MLP_8X, OTHER_8X, NARROW_8X, 5),
        ("12x", MLP_12X, OTHER_12X, NARROW_12X, 10),
    ):
        total, size = 3 + epochs, lrf.count_parameters(nets.random_factors(ranks))
        yield (
            f"{name}, narrower dense layers, {total} epochs",
            partial(nets.trained, nets.narrow, narrow, total),
        )
        yield (
            f"{name}, factors from a random start, {total} epochs",
            partial(nets.trained, nets.random_factors, ranks, total),
        )
        yield (
            f"{name}, spectral initialization, decay, {total} epochs",
            partial(decayed, nets, nets.spectral, ranks, total, RANDOM_RATE),
        )
        yield (
            f"{name}, decay, {epochs} epochs",
            partial(decayed, nets, nets.by_loss, ranks, epochs),
        )
        yield f"{name}, pruned, no training", partial(nets.pruned, size, epochs=0)
        yield f"{name}, pruned, {epochs} epochs", partial(nets.pruned, size, epochs)
        yield (
            f"{name}, pruned, equal bytes, {epochs} epochs",
            partial(equal_bytes, nets, size, epochs),
        )
        method = "{} with ranks {fc1} and {fc2}".format(name, **other)
        yield f"{method}, no training", partial(nets.by_loss, other)
        yield f"{method}, {epochs} epochs", partial(nets.trained, nets.by_loss, other, epochs)
    yield "8x, 5 epochs, teacher of 3 epochs", partial(taught, nets, "dense")
    yield "8x, 5 epochs, teacher of 3 + 5 epochs", partial(taught, nets, "strong_teacher")


def decayed(
    nets: MnistNetworks,
    make: Callable[[dict[str, int]], nn.Sequential],
    ranks: dict[str, int],
    epochs: int,
    rate: float = RATE,
    decay: float = DECAY,
) -> nn.Module:
    return nets.fit_decayed(make(ranks), epochs, rate, decay)


def equal_bytes(nets: MnistNetworks, size: int, epochs: int) -> nn.Sequential:
    """Pruned until its smallest format takes as many bytes as ``size`` numbers, then trained."""
    low, high = 0, size
    while high - low > 1:  # by bisection: low fits, high may not
        middle = (low + high) // 2
        weights = [p for p in nets.pruned(middle, epochs=0).parameters() if p.ndim == 2]
        biases = 4 * (lrf.count_parameters(nets.dense) - sum(W.numel() for W in weights))
        fits = min(sparse_bytes(weights).values()) + biases <= 4 * size
        low, high = (middle, high) if fits else (low, middle)
    return nets.pruned(low, epochs)


def taught(nets: MnistNetworks, teacher: str, temperature: float = TEMPERATURE) -> nn.Module:
    """The network of an eighth after five epochs with a teacher, which is made only now."""
    network = getattr(nets, teacher)
    return nets.fit(nets.by_loss(MLP_8X), 5, teacher=network, temperature=temperature)


def lenet(nets: MnistNetworks) -> Runs:
    yield "dense, 3 epochs", lambda: nets.dense
    yield "10x, no training", partial(nets.by_loss, LENET_10X)
    yield "10x, 10 epochs", partial(nets.trained, nets.by_loss, LENET_10X, 10)
    yield "10x, plain SVD, 10 epochs", partial(nets.trained, nets.by_svd, LENET_10X, 10)
    yield "dense, 3 + 10 epochs", partial(nets.longer, 10)


def choices(nets: MnistNetworks) -> Runs:
    """The settings above among others."""
    for epochs, rate in ((5, 1e-3), (5, 2e-3), (5, 5e-3), (10, 1e-3), (10, 2e-3)):
        yield f"dense, 3 + {epochs} epochs, rate {rate}", partial(nets.longer, epochs, rate)
    yield from shapes(nets)
    yield from rates_and_ranks(nets)
    three = (2e-3, 5e-3, 1e-2)
    for name, ranks, epochs in (("8x", MLP_8X, 5), ("12x", MLP_12X, 10)):
        size = lrf.count_parameters(nets.random_factors(ranks))
        for rate in (1e-3, *three) if name == "8x" else three:
            yield (
                f"{name}, pruned, {epochs} epochs, rate {rate}",
                partial(nets.pruned, size, epochs, rate),
            )
        for rate in three:
            yield (
                f"{name}, plain SVD, {epochs} epochs, rate {rate}",
                partial(nets.trained, nets.by_svd, ranks, epochs, rate=rate),
            )
    for rate in three:
        yield (
            f"8x, factors from a random start, 8 epochs, rate {rate}",
            partial(nets.trained, nets.random_factors, MLP_8X, 8, rate=rate),
        )
    for rate in (5e-4, 1e-3, 2e-3, 5e-3):
        for method, make in (("12x", nets.by_loss), ("12x, plain SVD", nets.by_svd)):
            yield (
                f"{method}, 6,000 images, rate {rate}",
                partial(on_few_images(nets).trained, make, MLP_12X, 1, rate),
            )
    for rate in three:
        for method, make in (("12x", nets.by_loss), ("12x, plain SVD", nets.by_svd)):
            yield f"{method}, 1 epochs, rate {rate}", partial(nets.trained, make, MLP_12X, 1, rate)
    yield from decays(nets)
    for temperature in (0.5, 1, 2, 4):
        yield (
            f"8x, 5 epochs, teacher of 3 + 5 epochs, temperature {temperature}",
            partial(taught, nets, "strong_teacher", temperature),
        )


def decays(nets: MnistNetworks) -> Runs:
    """How much Frobenius decay, and which rate with it, for random factors; a try with ours."""
    tried = [("8x", MLP_8X, 8, RATE, 0.0)]
    tried += [("8x", MLP_8X, 8, RANDOM_RATE, decay) for decay in (0.0, 1e-5, 1e-3)]
    for rate in (5e-3, 1e-2, 2e-2):
        tried += [("8x", MLP_8X, 8, rate, DECAY), ("12x", MLP_12X, 13, rate, DECAY)]
    for name, ranks, epochs, rate, decay in tried:
        yield (
            f"{name}, spectral initialization, decay {decay}, {epochs} epochs, rate {rate}",
            partial(decayed, nets, nets.spectral, ranks, epochs, rate, decay),
        )
    for name, ranks, epochs in (("8x", MLP_8X, 5), ("12x", MLP_12X, 10)):
        yield (
            f"{name}, decay {DECAY}, {epochs} epochs, rate {RATE}",
            partial(decayed, nets, nets.by_loss, ranks, epochs),
        )


def shapes(nets: MnistNetworks) -> Runs:
    """Which two widths, and which rate, the narrower dense networks get."""
    tried = [(NARROW_8X, 8, 2e-3), (NARROW_8X, 8, 1e-2)]
    tried += [(NARROW_12X, 13, 2e-3), (NARROW_12X, 13, 1e-2)]
    for a, b in ((36, 10), (34, 46), (32, 84), (30, 127), (28, 174), (26, 225)):
        tried.append(((784, a, b, 10), 8, RATE))
    for a, b in ((24, 13), (22, 61), (20, 116), (18, 178), (16, 249)):
        tried.append(((784, a, b, 10), 13, RATE))
    for widths, epochs, rate in tried:
        name, shape = {8: "8x", 13: "12x"}[epochs], "-".join(map(str, widths))
        yield (
            f"{name}, narrower {shape}, {epochs} epochs, rate {rate}",
            partial(nets.trained, nets.narrow, widths, epochs, rate=rate),
        )


def rates_and_ranks(nets: MnistNetworks) -> Runs:
    """Which ranks, and which rate, the factorized networks get."""
    three = (2e-3, 5e-3, 1e-2)
    for name, ranks, epochs, rates in (
        ("8x", MLP_8X, 5, three),
        ("8x", OTHER_8X, 5, (RATE,)),
        ("8x", {"fc1": 20, "fc2": 16}, 5, (RATE,)),
        ("8x", {"fc1": 24, "fc2": 7}, 5, (RATE,)),
        ("12x", MLP_12X, 10, three),
        ("12x", OTHER_12X, 10, (RATE,)),
        ("12x", {"fc1": 15, "fc2": 6}, 10, three),
        ("12x", {"fc1": 16, "fc2": 3}, 10, (RATE,)),
        ("fc2", {"fc2": 5}, 5, three),
        ("fc2", {"fc2": 2}, 10, three),
        ("fc2", {"fc2": 1}, 5, (RATE,)),
        ("fc2", {"fc2": 1}, 10, three),
    ):
        shown = " and ".join(map(str, ranks.values()))
        for rate in rates:
            yield (
                f"{name} with {shown}, {epochs} epochs, rate {rate}",
                partial(nets.trained, nets.by_loss, ranks, epochs, rate=rate),
            )


def lenet_choices(nets: MnistNetworks) -> Runs:
    for ranks in (LENET_10X, {"fc1": 18, "fc2": 14}, {"fc1": 21, "fc2": 5}):
        yield (
            "10x with {fc1} and {fc2}, 10 epochs".format(**ranks),
            partial(nets.trained, nets.by_loss, ranks, 10),
        )


PARTS = {
    "goals": (goals, MLP),
    "short": (short, MLP),
    "controls": (controls, MLP),
    "lenet": (lenet, LENET),
}
CHOICES = {"choices": (choices, MLP), "lenet choices": (lenet_choices, LENET)}


def measure(make: Callable[[], nn.Module], nets: MnistNetworks) -> dict[str, str | int]:
    """The columns that are measured. A parameter counts if it is not zero."""
    model = make()
    size = sum(int(parameter.count_nonzero()) for parameter in model.parameters())
    ratio = lrf.count_parameters(nb.make_mlp(nets.widths)) / size
    accuracy = 100 * lrf.accuracy(model, nets.data.x_test, nets.data.y_test)
    return {"parameters": size, "ratio": f"{ratio:.2f}", "accuracy (%)": f"{accuracy:.2f}"}


def main() -> None:
    options = parse(__doc__, PARTS, nb.SEEDS)
    data, name = nb.load_mnist(), "recovery"
    parts, seeds = {part: PARTS[part] for part in options.parts}, options.seeds
    if options.validate:
        data, name = nb.validation_split(data), "recovery_validation"
        parts, seeds = CHOICES, (0, 1, 2)
    table = Table(options.out / f"{name}.csv", COLUMNS, key=("model", "method", "seed"))
    for part, widths in parts.values():
        for seed in seeds:
            nets = MnistNetworks(data, seed, widths)
            for method, make in part(nets):
                row = {"model": "-".join(map(str, widths)), "method": method, "seed": seed}
                table.add(row, partial(measure, make, nets))


if __name__ == "__main__":
    main()
