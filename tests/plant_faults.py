"""Plant one fault of each kind in a copy of the repository, and report which ones the tests catch.

Each fault is planted alone, and only the tests that should catch it are run: the checks of the documents, or those and
one notebook. The first entry plants nothing and must pass. Exits with 1 when a fault was missed.
"""

import copy
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = "notebooks/03_factorize_layers.ipynb"
SOLUTIONS = "notebooks/solutions/03_factorize_layers.toml"
DOCUMENTS = ["tests/test_documents.py"]
OUTPUTS = [NOTEBOOK, "tests/test_results.py"]
EXERCISES = ["tests/test_exercises.py"]
HELPERS = ["tests/test_lrf_utils.py", "tests/test_lrf_convs.py", "tests/test_properties.py"]
FOR_NOTEBOOKS = ["tests/test_notebook_utils.py"]


def replace(name: str, old: str, new: str) -> Callable[[Path], None]:
    """A fault: the first ``old`` in the file becomes ``new``."""

    def plant(folder: Path) -> None:
        text = (folder / name).read_text(encoding="utf-8")
        assert old in text, f"{name} holds no {old!r}"
        (folder / name).write_text(text.replace(old, new, 1), encoding="utf-8")

    return plant


def edit(change: Callable[[nbformat.NotebookNode], None]) -> Callable[[Path], None]:
    """A fault: ``change`` is applied to the notebook."""

    def plant(folder: Path) -> None:
        notebook = nbformat.read(folder / NOTEBOOK, as_version=4)
        before = copy.deepcopy(notebook)
        change(notebook)
        assert notebook != before, "the fault changes nothing"
        nbformat.write(notebook, folder / NOTEBOOK)

    return plant


def code(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [output for cell in code(notebook) for output in cell.outputs]


def picture(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    return next(output for output in outputs(notebook) if "image/png" in output.get("data", {}))


def in_outputs(pattern: str, new: str | Callable[[re.Match], str]) -> Callable[[Path], None]:
    """A fault: the first match of ``pattern`` in the stored text of an output changes."""

    def change(notebook: nbformat.NotebookNode) -> None:
        for output in outputs(notebook):
            holder, keys = (output, ["text"]) if "text" in output else (output.data, list(output.get("data", {})))
            for key in keys:
                if key != "image/png" and re.search(pattern, holder[key]):
                    holder[key] = re.sub(pattern, new, holder[key], count=1)
                    return
        raise AssertionError(f"no output matches {pattern}")

    return edit(change)


def in_source(old: str, new: str) -> Callable[[Path], None]:
    def change(notebook: nbformat.NotebookNode) -> None:
        cell = next(cell for cell in code(notebook) if old in cell.source)
        cell.source = cell.source.replace(old, new)

    return edit(change)


def add_output(**fields: object) -> Callable[[Path], None]:
    return edit(lambda nb: code(nb)[1].outputs.append(nbformat.v4.new_output(**fields)))


def add_text(text: str) -> Callable[[Path], None]:
    return edit(lambda nb: nb.cells.append(nbformat.v4.new_markdown_cell(text)))


def delete_output(notebook: nbformat.NotebookNode) -> None:
    next(cell for cell in code(notebook) if cell.outputs).outputs.pop()


def clear(notebook: nbformat.NotebookNode) -> None:
    for cell in code(notebook):
        cell.outputs, cell.execution_count = [], None


def stream(text: str, name: str = "stdout") -> Callable[[Path], None]:
    return add_output(output_type="stream", name=name, text=text)


FAULTS: list[tuple[str, Callable[[Path], None], list[str]]] = [
    ("nothing (must pass)", lambda folder: None, [*DOCUMENTS, *OUTPUTS, *EXERCISES, *HELPERS, *FOR_NOTEBOOKS]),
    ("a word of a stored output", in_outputs("must be an int", "must be an integer"), OUTPUTS),
    ("an exact integer of a stored output, by one", in_outputs(r"\b1048576\b", "1048577"), OUTPUTS),
    ("a measured number beyond its tolerance", in_outputs(r"from 97\.(\d)", r"from 96.\1"), OUTPUTS),
    ("a stored output deleted", edit(delete_output), OUTPUTS),
    ("a whole notebook cleared", edit(clear), DOCUMENTS),
    ("a picture no longer drawn", in_source("nb.show(", "_ = dict(figure="), OUTPUTS),
    ("a picture drawn from other numbers", in_source("barh(row, width,", "barh(row, 1.1 * width,"), OUTPUTS),
    ("another picture's alt text", edit(lambda nb: picture(nb).metadata["image/png"].update(alt="A cat.")), OUTPUTS),
    ("a measured number typed into a notebook", add_text("The accuracy is 97.24 %."), DOCUMENTS),
    ("a count typed into a notebook", add_text("It gets 37 of them wrong."), DOCUMENTS),
    ("a measured whole percentage typed into a notebook", add_text("It loses 3 pp."), DOCUMENTS),
    (
        "a measured time typed into the README",
        replace("README.md", "## Run it", "It runs in 12 s.\n\n## Run it"),
        DOCUMENTS,
    ),
    ("a number of the README's table", replace("README.md", "97.24 %", "97.25 %"), DOCUMENTS),
    ("a number of a results table", replace("results/demo_ranks.csv", ",34.73", ",35.73"), OUTPUTS),
    ("cells executed out of order", edit(lambda nb: code(nb)[2].update(execution_count=99)), DOCUMENTS),
    ("stderr", stream("careful", "stderr"), DOCUMENTS),
    ("a warning", stream("UserWarning: careful"), DOCUMENTS),
    ("a widget", edit(lambda nb: nb.metadata.update(widgets={})), DOCUMENTS),
    ("an error output", add_output(output_type="error", ename="E", evalue="e", traceback=[]), DOCUMENTS),
    ("an SVG output", add_output(output_type="display_data", data={"image/svg+xml": "<svg/>"}), DOCUMENTS),
    ("a machine's path", stream("saved to /home/me/model.pt"), DOCUMENTS),
    ("a notebook over 500 KB", add_text("word " * 101_000), DOCUMENTS),
    ("a picture in Markdown without alt text", add_text("![](../images/lrf.png)"), DOCUMENTS),
    ("a picture in an output without alt text", edit(lambda nb: picture(nb).metadata.clear()), DOCUMENTS),
    ("a link to a missing file", add_text("[next](99_nothing.ipynb)"), DOCUMENTS),
    ("a link to a file in the wrong case", add_text("![drawing](../images/LRF.png)"), DOCUMENTS),
    ("a link to a missing heading", add_text("[there](01_svd_theory.ipynb#nothing-here)"), DOCUMENTS),
    ("a reference without an address", add_text("## References\n\n- A. Nobody (2020), *Nothing*."), DOCUMENTS),
    (
        "a cell whose output is ignored",
        edit(lambda nb: code(nb)[3].metadata.update(tags=["nbval-ignore-output"])),
        DOCUMENTS,
    ),
    (
        "a badge without an address",
        replace(NOTEBOOK, "on two cores.", "on two cores.\\n\\n[![Open in Colab](x)](y)"),
        ["tests/test_badges.py"],
    ),
    (
        "a command without make that is not make's",
        replace("README.md", "scripts/run_notebooks.py", "scripts/run.py"),
        ["tests/test_set_up.py"],
    ),
    ("a check that accepts a wrong answer", in_source("2 * r * d < d * d", "2 * r * d <= d * d"), EXERCISES),
    ("a check that rejects its solution", in_source("2 * r * d < d * d", "2 * r * d < d"), EXERCISES),
    (
        "a check that calls a stub wrong",
        replace("notebook_utils.py", "part is ... for", "part is 0 for"),
        EXERCISES,
    ),
    (
        "a solution that drifted from its source",
        replace(SOLUTIONS, "return (d - 1) // 2", "return (d + 1) // 2 - 1"),
        EXERCISES,
    ),
    ("an exercise without a solution", replace(SOLUTIONS, "[[exercise]]", "[[other]]"), EXERCISES),
    ("a rank of 0 allowed", replace("lrf_layers.py", "check_int(rank, 1,", "check_int(rank, 0,"), HELPERS),
    ("unbalanced factors", replace("lrf_utils.py", "S[:rank].sqrt()", "S[:rank]"), HELPERS),
    ("a lost bias", replace("lrf_utils.py", "layer.bias.cpu().double() + lost", "0 * layer.bias"), HELPERS),
    ("a lost padding", replace("lrf_utils.py", '"padding", "dilation"', '"dilation"'), HELPERS),
    ("no ridge", replace("lrf_utils.py", "ridge=True)  # a bias", "ridge=False)  # a bias"), HELPERS),
    ("a mean not made up for", replace("lrf_utils.py", "0 if statistics is None else (W", "0 * (W"), HELPERS),
    ("a mask that is not used", replace("lrf_layers.py", "rows = rows[mask]", "rows = rows[mask | True]"), HELPERS),
    ("a pair without a weight", replace("lrf_layers.py", "def weight(self)", "def weights(self)"), HELPERS),
    (
        "stale weights accepted",
        replace("lrf_layers.py", "not isinstance(layer.weight", "not isinstance(nn.Parameter()"),
        HELPERS,
    ),
    (
        "attention that is not counted",
        replace("lrf_utils.py", "sdpa_kernel(SDPBackend.MATH)", "torch.no_grad()"),
        HELPERS,
    ),
    ("a budget that is not kept", replace("lrf_utils.py", "(sums[0] + reserve <= budget) & ", ""), HELPERS),
    (
        "threads set by importing",
        replace("lrf_utils.py", "\nimport torch\n", "\nimport torch; torch.set_num_threads(1)\n"),
        HELPERS,
    ),
    ("a filter's halves exchanged", replace("lrf_convs.py", "permute(1, 2, 0, 3)", "permute(1, 3, 0, 2)"), HELPERS),
    ("a repair that sees other inputs", replace("lrf_convs.py", "in (model, small):", "in (model, model):"), HELPERS),
    ("other pixels", replace("notebook_utils.py", "0.1307", "0.1317"), FOR_NOTEBOOKS),
    ("an error without advice", replace("notebook_utils.py", "Restore it:", ""), FOR_NOTEBOOKS),
]


def caught(plant: Callable[[Path], None], tests: list[str]) -> tuple[bool, str]:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "copy"
        shutil.copytree(
            ROOT, folder, ignore=shutil.ignore_patterns(".venv", "build", ".git", "__pycache__", "*.egg-info")
        )
        plant(folder)
        run = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "--tb=short", *tests],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(folder)},
            capture_output=True,
            text=True,
        )
        return run.returncode != 0, run.stdout


def main() -> int:
    wrong = 0
    for name, plant, tests in FAULTS:
        failed, report = caught(plant, tests)
        right = failed != name.startswith("nothing")
        wrong += not right
        print(f"{'ok    ' if right else 'WRONG '} {'caught' if failed else 'passed'}: {name}", flush=True)
        if not right:
            print(report[-3000:])
    print(f"{len(FAULTS) - wrong} of {len(FAULTS)} as expected")
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
