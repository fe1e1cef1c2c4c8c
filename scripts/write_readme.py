"""Fill the generated parts of README.md: the badges, the map of the notebooks and the two results tables."""

import re
from pathlib import Path

import nbformat
import pandas as pd

from scripts.write_badges import badges, read_address

ROOT = Path(__file__).resolve().parent.parent


def readme_badges() -> str:
    """The badges and what they are for, once the repository has an address."""
    address = read_address()
    links = badges(address, "notebooks/01_svd_theory.ipynb", "notebooks") if address else ""
    return links and f"{links}\n\nThe badges open the series in the browser. Each notebook has its own pair."


def notebook_map() -> str:
    """One line a notebook: its title, what its second cell line promises, and the measured time."""
    seconds = pd.read_csv(ROOT / "results" / "run_times.csv").set_index("notebook")["seconds"]
    lines = ["| notebook | you will learn | time to run |", "|---|---|---|"]
    for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")):
        first = nbformat.read(path, as_version=4).cells[0].source
        title = first.splitlines()[0].removeprefix("# ")
        learn = re.search(r"\*\*You will learn\*\* (.*?)\.? \*\*It takes\*\*", first, re.DOTALL).group(1)
        lines.append(f"| [{title}](notebooks/{path.name}) | {learn} | {seconds[path.stem]:.0f} s |")
    return "\n".join(lines)


def results_table() -> str:
    """The demo's ten ranks: its accuracy and size, and ours in two factors."""
    table = pd.read_csv(ROOT / "results" / "demo_ranks.csv")
    lines = [
        "| rank of the 256→128 layer | demo: accuracy (one run) | ours: accuracy (five seeds) | original weights "
        "| demo: three factors | ours: two factors |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for row in table.to_dict("records"):
        lines.append(
            f"| {row['rank']} | {row['demo accuracy (%)']:.2f} % "
            f"| {row['our accuracy (%)']:.2f} ± {row['± (%)']:.2f} % "
            f"| {row['original params']:,} | {row['three factors']:,} | {row['two factors']:,} |"
        )
    return "\n".join(lines)


MLP, LENET, LARGE = "784-256-128-10", "784-300-100-10", "784-5x1024-10"
LEARNED_RANKS = "[98.10](https://github.com/UCMerced-ML/LC-model-compression), ratio not stated"
PORTFOLIO = "https://github.com/ananthpai1998/ML-Ops-Portfolio"
SHIFTED = "teacher of shifted images"
# task; network; our method; the method of the dense column; what others published; a method to compare with
GOALS = [
    ("`fc2` at rank 5, 4 epochs", MLP, "fc2 at rank 5, 4 epochs", "dense, 3 + 4 epochs", None, None),
    ("`fc2` at rank 2, 8 epochs", MLP, "fc2 at rank 2, 8 epochs", "dense, 3 + 8 epochs", None, None),
    ("`fc2` at rank 1, 12 epochs", MLP, "fc2 at rank 1, 12 epochs", "dense, 3 + 12 epochs", None, None),
    (f"{MLP}, 5 epochs", MLP, "8x, 5 epochs", "dense, 3 + 5 epochs", None, "8x, narrower dense layers, 8 epochs"),
    (f"{MLP}, 10 epochs", MLP, "12x, 10 epochs", "dense, 3 + 10 epochs", None, "12x, narrower dense layers, 13 epochs"),
    (f"the same, {SHIFTED}", MLP, f"12x, 10 epochs, {SHIFTED}", "dense, 3 + 5 epochs, shifted images", None, None),
    (f"LeNet300 ({LENET}), 10 epochs", LENET, "10x, 10 epochs", "dense, 3 + 10 epochs", LEARNED_RANKS, None),
    (f"the same, {SHIFTED}", LENET, f"10x, 10 epochs, {SHIFTED}", "dense, 3 + 5 epochs, shifted images", None, None),
    (
        f"{LARGE.replace('x', '×')} at rank 20, no training",
        LARGE,
        "rank 20, sequential, no training",
        "dense, 3 epochs",
        f"[50 to 68]({PORTFOLIO})",
        "rank 20, truncated SVD, no training",
    ),
    (
        f"{LARGE.replace('x', '×')}, 4 epochs with a teacher",
        LARGE,
        "40x, 4 epochs, teacher",
        "dense, 3 epochs",
        f"[97.69]({PORTFOLIO}) at 23×",
        None,
    ),
]


def goals_table() -> str:
    """One line a goal: what others, plain SVD or narrower layers reach, what we reach, and the dense network."""
    untrained = pd.read_csv(ROOT / "results" / "activation_aware.csv").set_index(["rank", "method"])
    groups = pd.read_csv(ROOT / "results" / "recovery.csv").groupby(["model", "method"])
    recovered = groups["accuracy (%)"].agg(["mean", "std"])
    ratio = groups["ratio"].first()

    def plus_minus(row: pd.Series) -> str:
        return "{:.2f} ± {:.2f}".format(*row)

    def plain_svd(rank: int) -> str:
        return f"plain SVD, no training: {plus_minus(untrained.loc[(rank, 'plain SVD')])}"

    rows = [
        (
            "`fc2` at rank 5, no training",
            ratio[MLP, "fc2 at rank 5, no training"],
            plain_svd(5),
            plus_minus(untrained.loc[(5, "loss metric")]),
            plus_minus(recovered.loc[(MLP, "dense, 3 epochs")]),
        )
    ]
    for task, network, method, dense, published, other in GOALS:
        compare = [published] if published else []
        if method.startswith("fc2"):
            compare.append(plain_svd(int(method.split()[3].rstrip(","))))
        if other:
            compare.append(f"{other.split(', ')[1]}: {plus_minus(recovered.loc[(network, other)])}")
        ours, control = (plus_minus(recovered.loc[(network, name)]) for name in (method, dense))
        rows.append((task, ratio[network, method], "; ".join(compare), ours, control))
    lines = ["| task | times smaller | to compare with (%) | ours (%) | dense (%) |", "|---|---:|---:|---:|---:|"]
    lines += [f"| {task} | {times:.2f} | {' | '.join(cells)} |" for task, times, *cells in rows]
    return "\n".join(lines)


GENERATED = {"badges": readme_badges, "map": notebook_map, "results": results_table, "goals": goals_table}


def fill(text: str) -> str:
    """``text`` with everything between ``<!-- NAME -->`` and ``<!-- end NAME -->`` made anew."""
    for name, make in GENERATED.items():
        start, end = f"<!-- {name} -->", f"<!-- end {name} -->"
        before, _, rest = text.partition(start)
        _, _, after = rest.partition(end)
        text = before + "\n\n".join(filter(None, (start, make(), end))) + after
    return text


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(fill(readme.read_text(encoding="utf-8")), encoding="utf-8", newline="\n")
