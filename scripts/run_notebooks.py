"""Execute the lessons in order, then the notebooks with the solutions, showing which cell is at work.

By default the executed copies and an HTML page of each go to ``build/``, and nothing else changes. With ``--in-place``
the committed notebooks, results, checkpoints and images are made anew.
"""

import argparse
import base64
import os
import re
import sys
import time
from pathlib import Path

import nbformat
import pandas as pd
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbconvert import HTMLExporter

ROOT = Path(__file__).resolve().parent.parent


def execute(path: Path, label: str) -> tuple[nbformat.NotebookNode, float]:
    """Run one notebook in its own folder, in a fresh kernel; return it with its outputs, and the seconds it took."""
    notebook = nbformat.read(path, as_version=4)
    code_cells = [i for i, cell in enumerate(notebook.cells) if cell.cell_type == "code"]

    def report(cell_index: int, **_: object) -> None:
        end = "\r" if sys.stdout.isatty() else "\n"
        print(f"{label} {path.name}: cell {code_cells.index(cell_index) + 1} of {len(code_cells)}", end=end, flush=True)

    client = NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=600,
        record_timing=False,
        coalesce_streams=True,
        on_cell_execute=lambda cell, cell_index: report(cell_index) if cell.cell_type == "code" else None,
        resources={"metadata": {"path": str(path.parent)}},
        extra_arguments=["--log-level=ERROR"],  # without it, every kernel warns that it talks over TCP
    )
    start = time.perf_counter()
    client.execute()
    # The version of Python differs from machine to machine and says nothing about the notebook.
    notebook.metadata.get("language_info", {}).pop("version", None)
    return notebook, time.perf_counter() - start


def html_page(notebook: nbformat.NotebookNode, path: Path) -> str:
    """The notebook, which lies at ``path``, as a page that needs no other file.

    nbconvert can embed pictures too, but only those below the notebook's own folder.
    """

    def embedded(match: re.Match) -> str:
        data = base64.b64encode((path.parent / match[1]).read_bytes()).decode()
        return f'src="data:image/png;base64,{data}"'

    page, _ = HTMLExporter().from_notebook_node(notebook, {"metadata": {"name": path.stem}})
    return re.sub(r'\bsrc="((?!data:|https?:)[^"]+\.png)"', embedded, page)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--in-place", action="store_true", help="rewrite the committed files instead of build/")
    in_place = parser.parse_args().in_place
    out = ROOT if in_place else ROOT / "build"
    os.environ["LRF_OUT"] = str(out)

    paths = sorted((ROOT / "notebooks").rglob("[0-9]*.ipynb"))
    paths = [path for path in paths if ".ipynb_checkpoints" not in path.parts]
    seconds = {}
    for number, path in enumerate(paths, start=1):
        try:
            notebook, seconds[path.stem] = execute(path, f"[{number}/{len(paths)}]")
        except CellExecutionError as error:
            print(f"\n{path.relative_to(ROOT)} failed:\n{error}", file=sys.stderr)
            return 1
        copy = out / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, copy)
        if not in_place:
            copy.with_suffix(".html").write_text(html_page(notebook, path), encoding="utf-8")
        print(f"[{number}/{len(paths)}] {path.name}: done in {seconds[path.stem]:.0f} s", flush=True)
    if in_place:
        lessons = {name: seconds[name] for name in seconds if not name.endswith("_solutions")}
        table = pd.Series(lessons, name="seconds").rename_axis("notebook").round(1)
        table.to_csv(ROOT / "results" / "run_times.csv")
    folder = (out / "notebooks").relative_to(ROOT)
    print(f"All {len(paths)} notebooks ran in {sum(seconds.values()):.0f} s; they are in {folder}/")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
