"""Execute notebooks, each in a fresh kernel.

    python -m tools.run_notebooks                  all; copies and web pages go to build/
    python -m tools.run_notebooks 03               lesson 3 and its solutions
    python -m tools.run_notebooks --in-place 03    ... and rewrite what is committed of them

Two run side by side, but in place only one, since the times that they store should be undisturbed.
Notebooks read what is committed, never what another one has just written, so their order does not
matter. If one fails, the others still run, and nothing that is committed changes.
"""

import argparse
import base64
import csv
import html
import os
import re
import shutil
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbconvert import HTMLExporter

ROOT = Path(__file__).resolve().parent.parent


def find(start: str = "") -> list[Path]:
    """The notebooks whose names start so: lessons, then appendix, solutions and template."""
    paths = (ROOT / "notebooks").rglob(f"{start}*.ipynb")
    return sorted(path for path in paths if ".ipynb_checkpoints" not in path.parts)


class Progress:
    """Prints a line for each notebook that is done; on a terminal, also the cells at work."""

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0
        self.at_work: dict[str, str] = {}
        self.lock = threading.Lock()

    def cell(self, name: str, number: int, total: int) -> None:
        with self.lock:
            self.at_work[name] = f"{name} {number}/{total}"
            self._show()

    def finish(self, name: str, result: str) -> None:
        with self.lock:
            self.at_work.pop(name, None)
            self.done += 1
            self._show(f"[{self.done}/{self.total}] {name}: {result}")

    def _show(self, line: str = "") -> None:
        if not sys.stdout.isatty():
            print(line + "\n" if line else "", end="", flush=True)
            return
        columns = shutil.get_terminal_size().columns - 1
        status = "  ".join(self.at_work.values())[:columns].ljust(columns)
        above = line.ljust(columns) + "\n" if line else ""
        print(f"\r{above}{status}\r", end="", flush=True)


def execute(path: Path, progress: Progress) -> tuple[nbformat.NotebookNode, float]:
    """Run a notebook in its own folder; return it with its outputs, and the seconds it took."""
    notebook = nbformat.read(path, as_version=4)
    code_cells = [i for i, cell in enumerate(notebook.cells) if cell.cell_type == "code"]

    def report(cell: nbformat.NotebookNode, cell_index: int) -> None:
        if cell.cell_type == "code":
            progress.cell(path.stem, code_cells.index(cell_index) + 1, len(code_cells))

    client = NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=600,
        record_timing=False,
        coalesce_streams=True,
        on_cell_execute=report,
        resources={"metadata": {"path": str(path.parent)}},
        extra_arguments=["--log-level=ERROR"],  # or every kernel warns that it talks over TCP
    )
    start = time.perf_counter()
    client.execute()
    seconds = time.perf_counter() - start
    # The version of Python differs from machine to machine and says nothing about the notebook.
    notebook.metadata.get("language_info", {}).pop("version", None)
    return notebook, seconds


def html_page(notebook: nbformat.NotebookNode, path: Path) -> str:
    """The notebook at ``path`` as a web page that holds its pictures and links to other pages.

    nbconvert embeds pictures too, but only those below the notebook's own folder.
    """

    def embedded(match: re.Match) -> str:
        data = base64.b64encode((path.parent / match[1]).read_bytes()).decode()
        return f'src="data:image/png;base64,{data}"'

    page, _ = HTMLExporter().from_notebook_node(notebook, {"metadata": {"name": path.stem}})
    page = re.sub(r'\bsrc="((?!data:|https?:)[^"]+\.png)"', embedded, page)
    return re.sub(r'\bhref="((?!https?:)[^"#]+)\.ipynb([#"])', r'href="\1.html\2', page)


def write_index(out: Path) -> Path:
    """A page that links all web pages below ``out``, in the order of the lessons."""
    items = []
    for path in find():
        page = (out / path.relative_to(ROOT)).with_suffix(".html")
        if page.exists():
            first = nbformat.read(path, as_version=4).cells[0].source
            title = html.escape(first.partition("\n")[0].lstrip("# "))
            items.append(f'<li><a href="{page.relative_to(out).as_posix()}">{title}</a></li>')
    index = out / "index.html"
    index.write_text(
        '<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>Lessons</title>'
        '<body style="font: 18px/1.6 sans-serif; max-width: 40em; margin: 2em auto">'
        "<h1>Low-rank factorization of neural networks</h1>"
        f'<ul style="list-style: none; padding: 0">{"".join(items)}</ul></body></html>\n',
        encoding="utf-8",
    )
    return index


def publish(out: Path, seconds: dict[Path, float]) -> None:
    """Copy what a run wrote to ``out`` over what is committed, and note the lessons' times."""
    for name in ("notebooks", "results", "checkpoints"):
        for new in sorted(path for path in (out / name).rglob("*") if path.is_file()):
            old = ROOT / new.relative_to(out)
            if name == "checkpoints" and old.exists() and old.read_bytes() != new.read_bytes():
                print(f"{old.relative_to(ROOT)} has changed: refresh what reads it, too")
            old.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(new, old)
    file = ROOT / "results" / "run_times.csv"
    with file.open(newline="", encoding="utf-8") as rows:
        times = {row["notebook"]: row["seconds"] for row in csv.DictReader(rows)}
    times |= {path.stem: f"{value:.1f}" for path, value in seconds.items()}
    lessons = [path.stem for path in find("[0-9]") if path.parent.name == "notebooks"]
    lines = [f"{name},{times[name]}\n" for name in lessons if name in times]
    file.write_text("notebook,seconds\n" + "".join(lines), encoding="utf-8", newline="\n")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("start", nargs="?", default="", help="how the notebooks' names start")
    parser.add_argument("--in-place", action="store_true", help="rewrite the committed files")
    parser.add_argument("--processes", type=int, help="how many at a time (2; in place, 1)")
    options = parser.parse_args(arguments)
    processes = options.processes or (1 if options.in_place else 2)
    out = ROOT / "build" / "refresh" if options.in_place else ROOT / "build"
    if options.in_place:
        shutil.rmtree(out, ignore_errors=True)
    # The template is for authors: it is refreshed with the others, but no page of the series.
    paths = [path for path in find(options.start) if options.in_place or path.stem != "template"]
    if not paths:
        parser.error(f"no notebook has a name that starts with {options.start}")
    # For the kernels. Threads beyond one would only wait for those of the other kernel.
    os.environ["LRF_OUT"] = str(out)
    os.environ.setdefault("OMP_NUM_THREADS", "1")

    progress, start = Progress(len(paths)), time.perf_counter()
    seconds: dict[Path, float] = {}
    failures: list[str] = []

    def run(path: Path) -> None:
        try:
            notebook, seconds[path] = execute(path, progress)
        except Exception as error:  # of a cell, a kernel or a file; the others still run
            failures.append(f"{path.relative_to(ROOT)} failed:\n{error}")
            progress.finish(path.stem, "failed")
            return
        copy = out / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, copy)
        if not options.in_place:
            copy.with_suffix(".html").write_text(html_page(notebook, path), encoding="utf-8")
        progress.finish(path.stem, f"{seconds[path]:.0f} s")

    with ThreadPoolExecutor(processes) as pool:
        try:
            list(pool.map(run, paths))
        except KeyboardInterrupt:
            os._exit(130)  # kernels end with this process; their cells may take minutes
    print(f"{len(seconds)} of {len(paths)} notebooks ran in {time.perf_counter() - start:.0f} s")
    if failures:
        print("\n\n".join(failures), file=sys.stderr)
        return 1
    if options.in_place:
        publish(out, seconds)
    else:
        print(f"Open {write_index(out).relative_to(ROOT)} in a browser")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
