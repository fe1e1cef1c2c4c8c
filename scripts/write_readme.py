"""Fill the generated parts of README.md: the map of the notebooks and the results table."""

import re
from pathlib import Path

import nbformat
import pandas as pd

ROOT = Path(__file__).resolve().parent.parent


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


GENERATED = {"map": notebook_map, "results": results_table}


def fill(text: str) -> str:
    """``text`` with everything between ``<!-- NAME -->`` and ``<!-- end NAME -->`` made anew."""
    for name, make in GENERATED.items():
        start, end = f"<!-- {name} -->", f"<!-- end {name} -->"
        before, _, rest = text.partition(start)
        _, _, after = rest.partition(end)
        text = f"{before}{start}\n\n{make()}\n\n{end}{after}"
    return text


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(fill(readme.read_text(encoding="utf-8")), encoding="utf-8", newline="\n")
