"""Fill what README.md generates from results/: the headline and the table of results.

A generated part stands between ``<!-- NAME -->`` and ``<!-- end NAME -->``. ``make refresh`` runs
this; the tests compare the page with what it gives.
"""

from pathlib import Path
from typing import NamedTuple

import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
MLP = "784-256-128-10"
SIZES = {"8x": 5, "12x": 10}  # the small networks, and how many epochs they are trained


class Row(NamedTuple):
    """A network of the results: what the page calls it, and what results/recovery.csv does."""

    name: str
    untrained: str | None
    trained: str  # after the epochs of SIZES; what starts from random weights gets three more


DENSE = Row("full network", "dense, 3 epochs", "dense, 3 + {epochs} epochs")
LOSS = Row("low rank, loss metric", "{size}, no training", "{size}, {epochs} epochs")
SVD = Row(
    "low rank, plain SVD",
    "{size}, plain SVD, no training",
    "{size}, plain SVD, {epochs} epochs",
)
RANDOM = Row(
    "low rank, random initialization",
    None,
    "{size}, spectral initialization, decay, {total} epochs",
)
DEFAULT = Row(
    "the same, PyTorch's default initialization",
    None,
    "{size}, factors from a random start, {total} epochs",
)
NARROW = Row("narrower layers", None, "{size}, narrower dense layers, {total} epochs")
PRUNED = Row(
    "pruned, positions not counted",
    "{size}, pruned, no training",
    "{size}, pruned, {epochs} epochs",
)
ROWS = (DENSE, LOSS, SVD, RANDOM, DEFAULT, NARROW, PRUNED)


def results(method: str | None, size: str = "8x") -> pd.Series | None:
    """Parameters, times smaller, mean accuracy and deviation of a method, if it was run."""
    if method is None:
        return None
    table = pd.read_csv(ROOT / "results" / "recovery.csv")
    name = method.format(size=size, epochs=SIZES[size], total=3 + SIZES[size])
    rows = table[(table["model"] == MLP) & (table["method"] == name)]
    assert len(rows) == 5, f"{len(rows)} seeds of {name!r} in results/recovery.csv"
    first, accuracy = rows.iloc[0], rows["accuracy (%)"]
    numbers = {"parameters": first["parameters"], "ratio": first["ratio"]}
    return pd.Series({**numbers, "mean": accuracy.mean(), "std": accuracy.std()})


def percent(row: pd.Series | None) -> str:
    return "" if row is None else f"{row['mean']:.2f}"


def headline() -> str:
    """What comes out, in three sentences, and in a picture with its alternative text."""
    small, plain, dense = (results(row.untrained) for row in (LOSS, SVD, DENSE))
    small_after, dense_after = (results(row.trained) for row in (LOSS, DENSE))
    return f"""\
An example: we make a network for MNIST {small.ratio:.1f} times smaller. Without any further \
training, it classifies {percent(small)} % of the test images correctly (plain SVD: \
{percent(plain)} %; full network: {percent(dense)} %). After five more epochs of training, \
**{percent(small_after)} %** are correct. The full network reaches {percent(dense_after)} % with \
the same five epochs.

<img src="images/hero.png" width="640" alt="{hero_text()}">"""


def hero_text() -> str:
    """The alternative text of images/hero.png."""
    dense, small = results(DENSE.trained), results(LOSS.trained)
    parts = []
    for row in (DENSE, LOSS, SVD, RANDOM, NARROW):
        before = f"{percent(results(row.untrained))} %, then " if row.untrained else ""
        parts.append(f"{row.name} {before}{percent(results(row.trained))} %")
    return (
        f"Above: the weight matrices of the full network, {dense.parameters:,.0f} parameters, and "
        f"of the low-rank network, {small.parameters:,.0f} parameters, drawn to scale; two large "
        "matrices become pairs of thin strips. Below: accuracy before and after five epochs of "
        f"training: {'; '.join(parts)}."
    )


def results_table() -> str:
    """A line a network, before and after training, at two sizes."""
    heads, rules = ["network"], ["---"]
    for size, epochs in SIZES.items():
        ratio = f"{results(LOSS.trained, size).ratio:.1f}× smaller"
        heads += [f"{ratio}, before training", f"after {epochs} epochs"]
        rules += ["---:", "---:"]
    lines = [f"| {' | '.join(heads)} |", f"|{'|'.join(rules)}|"]
    for row in ROWS:
        cells = [row.name]
        for size in SIZES:
            for method in (row.untrained, row.trained):
                found = results(method, size)
                spread = "" if found is None else f"\u00a0±\u00a0{found['std']:.2f}"
                cells.append(percent(found) + spread)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def fill(text: str) -> str:
    """``text`` with its generated parts made again."""
    for name, make in {"headline": headline, "results": results_table}.items():
        before, rest = text.split(f"<!-- {name} -->")
        _, after = rest.split(f"<!-- end {name} -->")
        text = f"{before}<!-- {name} -->\n\n{make()}\n\n<!-- end {name} -->{after}"
    return text


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(fill(readme.read_text(encoding="utf-8")), encoding="utf-8", newline="\n")
