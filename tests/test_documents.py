"""What a reader of the committed notebooks and pages would stumble over, and no diff shows.

Reads files only, so that it runs before every commit: nothing but pytest and nbformat is needed.
"""

import base64
import re
import struct
import warnings
from pathlib import Path

import nbformat
import pytest

from tests.compare import DRAWING, IN_PERCENT, TOLERANCES

ROOT = Path(__file__).resolve().parent.parent
LESSONS = sorted(ROOT.glob("notebooks/[0-9]*.ipynb"))
NOTEBOOKS = sorted([*ROOT.glob("notebooks/*.ipynb"), *ROOT.glob("notebooks/[!.]*/*.ipynb")])
PAGES = [
    path
    for path in sorted(ROOT.rglob("*.md"))
    if not {".venv", "build"} & set(path.relative_to(ROOT).parts)
]

TAGS = {*TOLERANCES, "raises-exception", "setup", "exercise", "check", "thumbnail"}
PIXELS = 1408  # the width of every picture: the 704 pixels of nb.use_style, twice
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:root|home|Users|work|tmp|private|mnt|usr)/|[A-Z]:\\")
CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)
STRIPPED = re.compile(
    r"<(?:script|style|iframe|svg|object|font|center)\b|<\w[^>]*\s(?:style|on\w+)="
)


def headings(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = nbformat.reads(text, as_version=4).cells
        text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    titles = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def markdown_problems(text: str, folder: Path) -> list[str]:
    problems = []
    for block in re.finditer(r"(\n*)^\$\$$.*?^\$\$$(\n*)", text, re.MULTILINE | re.DOTALL):
        starts, ends = block.start() == 0, block.end() == len(text)
        if not (starts or len(block[1]) > 1) or not (ends or len(block[2]) > 1):
            problems.append("a $$ block without a blank line around it")
    text = CODE.sub("", text)
    if text.count("$") % 2:
        problems.append("an odd number of dollar signs")
    if re.search(r"\\(?:tag|label|newcommand|def|begin\{(?:align|equation))\b", text):
        problems.append("mathematics that GitHub does not show: \\tag, \\label, a macro, or align")
    if STRIPPED.search(text):
        problems.append("HTML that GitHub strips")
    text = re.sub(r'<img src="([^"]*)"[^>]* alt="([^"]*)">', r"![\2](\1)", text)
    for bang, label, address in re.findall(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", text):
        if bang and not label.strip():
            problems.append(f"a picture without alternative text: {address}")
        if re.match(r"https?://|mailto:", address):
            continue
        name, _, heading = address.partition("#")
        target = (folder / name).resolve()
        # The folder is listed, since some file systems ignore upper and lower case.
        if name and not any(path.name == target.name for path in target.parent.glob("*")):
            problems.append(f"a link to a file that is not there: {address}")
        elif name and heading and heading not in headings(target):
            problems.append(f"a link to a heading that is not there: {address}")
    return problems


def output_problems(output: nbformat.NotebookNode, tags: set[str]) -> list[str]:
    data = output.get("data", {})
    text = output.get("text", "") + str({key: data[key] for key in data if key != "image/png"})
    in_percent = re.search(r"%|\bpp\b", text)
    found = {
        "an error": output.output_type == "error" and "raises-exception" not in tags,
        "text on stderr": output.get("name") == "stderr",
        "a warning": "Warning" in output.get("text", ""),
        "a path of a machine": MACHINE_PATH.search(text),
        "something GitHub does not show": re.search("svg|widget|javascript", " ".join(data)),
        "a tolerance for percent without a percentage": tags & IN_PERCENT and not in_percent,
    }
    if "image/png" in data:
        png = base64.b64decode(data["image/png"])
        width, color = struct.unpack(">I", png[16:20])[0], png[25]
        alt = output.metadata.get("image/png", {}).get("alt", "")
        found["a picture without alternative text"] = not alt.strip()
        found["a picture that nb.show did not draw"] = DRAWING not in data or width != PIXELS
        found["a transparent picture"] = color in (4, 6) or b"tRNS" in png
    return [problem for problem, is_there in found.items() if is_there]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path):
    text = path.read_text(encoding="utf-8")
    notebook = nbformat.reads(text, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(text.encode()) <= 600_000, "GitHub may not show it: at most 600 KB, fewer pictures"
    assert "widgets" not in notebook.metadata, "GitHub shows no notebook with metadata.widgets"
    counts = [cell.execution_count for cell in code]
    assert counts == list(range(1, len(code) + 1)), "not executed in order from a fresh kernel"
    problems = []
    for number, cell in enumerate(notebook.cells):
        tags, found = set(cell.metadata.get("tags", [])), []
        if cell.cell_type == "markdown":
            found = markdown_problems(cell.source, path.parent)
        if cell.cell_type == "code":
            found = [f"an unknown tag: {tag}" for tag in tags - TAGS]
            if re.search(r"#\s*(NBVAL_|PYTEST_VALIDATE)", cell.source):
                found.append("a comment that keeps nbval from comparing the cell")
            if len(cell.source.splitlines()) > 30:
                found.append("more than 30 lines of code")
            for output in cell.outputs:
                found += output_problems(output, tags)
        problems += [f"cell {number}: {problem}" for problem in found]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_page(path):
    problems = markdown_problems(path.read_text(encoding="utf-8"), path.parent)
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_budget_is_reported(path):
    """A lesson over its budget is a warning in the report, for its author to weigh."""
    words = lines = pictures = 0
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "markdown":
            words += len(CODE.sub("", cell.source).split())
        elif not {"exercise", "check"} & set(cell.metadata.get("tags", [])):
            lines += sum(bool(line.strip()) for line in cell.source.splitlines())
            pictures += sum("image/png" in output.get("data", {}) for output in cell.outputs)
    found = f"{words:,} words, {lines} lines of code, {pictures} pictures"
    if words > 2500 or lines > 350 or pictures > 10:
        warnings.warn(f"{path.stem}: {found}; at most 2,500, 350, and 10", stacklevel=1)
