"""Fill the generated parts of README.md: the promise, the badges, the lessons and the two tables of results."""

import html
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


def recovered() -> pd.DataFrame:
    """Of each network and method of ``scripts/recover.py``: size, times smaller, accuracy over the seeds, deviation."""
    groups = pd.read_csv(ROOT / "results" / "recovery.csv").groupby(["model", "method"])
    return groups.agg(
        parameters=("parameters", "first"),
        ratio=("ratio", "first"),
        mean=("accuracy (%)", "mean"),
        std=("accuracy (%)", "std"),
    )


def promise() -> str:
    """The first sentence: what comes out, beside the network that it came from."""
    table = recovered()
    dense, small, narrow = (table.loc[(MLP, method)] for method in HERO.values())
    return (
        f"**Make a trained network {small.ratio:.1f} times smaller and keep {small['mean']:.2f} % of MNIST's test "
        f"images right, where the full one has {dense['mean']:.2f} %**, and an ordinary network of the small size "
        f"{narrow['mean']:.2f} %. These Jupyter notebooks show how, in PyTorch, from the singular value decomposition "
        "to compressed networks that you can use."
    )


def hero() -> str:
    """The picture of ``scripts/draw_readme.py``, with what it shows in words."""
    table = recovered()
    dense, small, narrow = (table.loc[(MLP, method)] for method in HERO.values())
    return (
        '<img src="images/hero.png" width="640" alt="Three networks, their weights drawn to scale. '
        f"Dense: large blocks, {dense.parameters:,.0f} numbers, "
        f"{dense['mean']:.2f} % right. Low rank: thin strips along the edges of the same blocks, "
        f"{small.parameters:,.0f} numbers, {small['mean']:.2f} %. A narrower dense network: {narrow.parameters:,.0f} "
        f'numbers, {narrow["mean"]:.2f} %.">\n\n'
        "*Area is what must be stored. All three are networks for MNIST with eight epochs of training in all; "
        "accuracies are means over five seeds, on the 10,000 test images.*"
    )


def reading_minutes(notebook: nbformat.NotebookNode) -> int:
    """Minutes to read it, code and text alike at 150 words a minute, in steps of five."""
    words = sum(len(cell.source.split()) for cell in notebook.cells)
    return max(5, 5 * round(words / 150 / 5))


def lessons() -> list[tuple[Path, nbformat.NotebookNode]]:
    paths = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
    return [(path, nbformat.read(path, as_version=4)) for path in paths]


def thumbnail(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The output that stands for a lesson: the first picture of a cell with the tag ``thumbnail``, or of any cell."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    code.sort(key=lambda cell: "thumbnail" not in cell.metadata.get("tags", []))
    return next(output for cell in code for output in cell.outputs if "image/png" in output.get("data", {}))


def lesson_list() -> str:
    """One paragraph a lesson: a picture of it, what its first sentence promises, and how long it takes."""
    seconds = pd.read_csv(ROOT / "results" / "run_times.csv").set_index("notebook")["seconds"]
    paragraphs = ["After each lesson you can …"]
    total = 0
    for path, notebook in lessons():
        title, promised = re.match(
            r"# (.*?)\n.*?^After this notebook you can (.*?)$", notebook.cells[0].source, re.DOTALL | re.MULTILINE
        ).groups()
        alt = html.escape(thumbnail(notebook).metadata["image/png"]["alt"])
        address, minutes = f"notebooks/{path.name}", reading_minutes(notebook)
        total += minutes
        paragraphs.append(  # no table: on a phone, pictures in it shrink to nothing
            f'<img src="images/lessons/{path.stem}.png" width="160" align="left" hspace="8" alt="{alt}"> '
            f"**[{title}]({address})**<br>… {promised}<br>*{minutes} min to read, {seconds[path.stem]:.0f} s to run*"
            '<br clear="left">'
        )
    run = seconds[[path.stem for path, _ in lessons()]].sum()
    paragraphs.append(f"All of them: about {total / 60:.0f} hours to read, {run / 60:.0f} minutes to run on two cores.")
    return "\n\n".join(paragraphs)


def results_table() -> str:
    """The demo's ten ranks: its accuracy and size, and ours in two factors."""
    table = pd.read_csv(ROOT / "results" / "demo_ranks.csv")
    lines = [
        "| rank | demo: accuracy (one run) | ours: accuracy | demo: three factors | ours: two factors |",
        "|---:|---:|---:|---:|---:|",
    ]
    for row in table.to_dict("records"):
        lines.append(
            f"| {row['rank']} | {row['demo accuracy (%)']:.2f} % "
            f"| {row['our accuracy (%)']:.2f} ± {row['± (%)']:.2f} % "
            f"| {row['three factors']:,} | {row['two factors']:,} |"
        )
    return "\n".join(lines)


MLP, LENET = "784-256-128-10", "784-300-100-10"
# The methods in the names of scripts/recover.py, with as many epochs in all.
HERO = {
    "dense": "dense, 3 + 5 epochs",
    "low rank": "8x, 5 epochs",
    "narrower": "8x, narrower dense layers, 8 epochs",
}
# task; network; our method; the dense network; the controls, each with what it is
RESULTS = [
    (
        f"{MLP}, 10 epochs",
        MLP,
        "12x, 10 epochs",
        "dense, 3 + 10 epochs",
        {
            "plain SVD, the same training": "12x, plain SVD, 10 epochs",
            "narrower dense network": "12x, narrower dense layers, 13 epochs",
            "pruned, positions not counted": "12x, pruned, 10 epochs",
        },
    ),
    (
        f"LeNet300 ({LENET}), 10 epochs",
        LENET,
        "10x, 10 epochs",
        "dense, 3 + 10 epochs",
        {"plain SVD, the same training": "10x, plain SVD, 10 epochs"},
    ),
    (
        f"{MLP}, 5 epochs",
        MLP,
        HERO["low rank"],
        HERO["dense"],
        {
            "plain SVD, the same training": "8x, plain SVD, 5 epochs",
            "narrower dense network": HERO["narrower"],
            "pruned, positions not counted": "8x, pruned, 5 epochs",
        },
    ),
    (
        "`fc2` alone at rank 5, 5 epochs",
        MLP,
        "fc2 at rank 5, 5 epochs",
        HERO["dense"],
        {"plain SVD, the same training": "fc2 at rank 5, plain SVD, 5 epochs"},
    ),
    (
        "`fc2` alone at rank 5, no training",
        MLP,
        "fc2 at rank 5, no training",
        "dense, 3 epochs",
        {"plain SVD, no training": "fc2 at rank 5, plain SVD, no training"},
    ),
]


def goals_table() -> str:
    """One line a result, the largest ratio first, beside the fair controls and the dense network."""
    table = recovered()

    def percent(network: str, method: str) -> str:
        return "{mean:.2f}\u00a0±\u00a0{std:.2f}".format(**table.loc[(network, method)])

    lines = [
        "| network, training after the cut | times smaller | ours (%) | as small in another way (%) | dense (%) |",
        "|---|---:|---:|---|---:|",
    ]
    for task, network, ours, dense, controls in sorted(RESULTS, key=lambda row: -table.ratio[row[1], row[2]]):
        others = "<br>".join(f"{name}: {percent(network, method)}" for name, method in controls.items())
        lines.append(
            f"| {task} | {table.ratio[network, ours]:.1f} | {percent(network, ours)} | {others} "
            f"| {percent(network, dense)} |"
        )
    return "\n".join(lines)


GENERATED = {
    "promise": promise,
    "badges": readme_badges,
    "hero": hero,
    "lessons": lesson_list,
    "goals": goals_table,
    "results": results_table,
}


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
