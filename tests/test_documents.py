"""What can be checked without running a notebook: every notebook and Markdown file, as they are committed."""

import base64
import io
import re
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pandas as pd
import pytest
from PIL import Image, ImageChops, ImageStat

from scripts.draw_readme import draw_hero, small_picture
from scripts.run_notebooks import html_page
from scripts.write_readme import fill
from tests.compare import TOLERANCES
from tests.drawing import drawn_numbers

plt.switch_backend("agg")

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(p for p in (ROOT / "notebooks").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
LESSONS = [path for path in NOTEBOOKS if path.parent.name == "notebooks" and path.name[0].isdigit()]
PAGES = sorted(p for p in ROOT.rglob("*.md") if not {".venv", "build"} & set(p.relative_to(ROOT).parts))

WIDTH = 1408  # of every picture: the 704 pixels of nb.use_style, twice for sharp screens
KNOWN_TAGS = {*TOLERANCES, "raises-exception", "setup", "exercise", "check", "thumbnail"}
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:root|home|Users|work|tmp|private|mnt|usr)/|[A-Z]:\\")
UNIT = r"\s?(?:%|pp\b|ms\b|µs\b|s\b|seconds?\b|minutes?\b|times\b|×(?!\s?\d)|images?\b|mistakes?\b|percent\b)"
MEASURED = re.compile(rf"(?<![\w.,/–×-])[-−]?(?!10\.\d{{4}}/)\d[\d,]*(?:\.\d+|(?:\.\d+)?{UNIT})(?:{UNIT})?")
# Whole numbers look counted from 11 on. Smaller ones are words like "two", and a year is a year.
WHOLE = re.compile(r"(?<![\w.,/–×#-])\d[\d,]*\d(?![\w/×-]|[.,]\d|\s?%)")
# A comment like one of these lets the numbers of its line stand. It does not render.
MARK = re.compile(r"^.*<!-- (?:exact|chosen|quoted: .+?) -->.*$", re.MULTILINE)
LITERAL = re.compile(r"(?<![\w.])\d[\d_]*(?:\.\d+)?(?:e-?\d+)?")


def prose(markdown: str) -> str:
    """Markdown without code, mathematics, addresses, references, generated parts and marked lines."""
    markdown = MARK.sub(" ", markdown)
    markdown = re.sub(r"<!-- (\w+) -->.*?<!-- end \1 -->", " ", markdown, flags=re.DOTALL)
    markdown = re.split(r"^## References", markdown, flags=re.MULTILINE)[0]
    for pattern in (
        r"```.*?```",
        r"\$\$.*?\$\$",
        r"`[^`]*`",
        r"\$[^$]*\$",
        r"\]\([^)]*\)",
        r"\*\*It takes\*\* under \d+ s",
        r"(?m)^# \d+\. ",  # the lesson's number
        r"\b\d+\.\d+\.\d+\b",  # a version
    ):
        markdown = re.sub(pattern, " ", markdown, flags=re.DOTALL)
    return markdown


def typed_numbers(markdown: str, code: str = "") -> list[str]:
    """Numbers in the text that a run may change: those that are neither marked nor a setting in the notebook's code."""
    text, settings = prose(markdown), {float(number) for number in LITERAL.findall(code)}
    measured = [match.strip() for match in MEASURED.findall(text)]
    counted = [n for n in WHOLE.findall(text) if (value := float(n.replace(",", ""))) > 10 and not 1900 <= value < 2100]
    plain = re.compile(r"[\d,]+(?:\.\d+)?")
    unknown = [n for n in measured + counted if not plain.fullmatch(n) or float(n.replace(",", "")) not in settings]
    return [f"a number typed by hand: {n!r}; print it, or mark it (see CONTRIBUTING.md)" for n in unknown]


def headings(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        text = "\n".join(
            cell.source for cell in nbformat.reads(text, as_version=4).cells if cell.cell_type == "markdown"
        )
    titles = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(markdown: str, folder: Path) -> list[str]:
    problems = []
    markdown = re.sub(r"```.*?```", "", markdown, flags=re.DOTALL)
    markdown = re.sub(r'<img src="([^"]*)"[^>]* alt="([^"]*)">', r"![\2](\1)", markdown)
    for bang, label, address in re.findall(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", markdown):
        if bang and not label.strip():
            problems.append(f"a picture without alt text: {address}")
        if re.match(r"https?://|mailto:", address):
            continue
        name, _, heading = address.partition("#")
        target = (folder / name).resolve()
        # Comparing with the listing, since some file systems ignore upper and lower case.
        if name and (not target.exists() or target.name not in {p.name for p in target.parent.iterdir()}):
            problems.append(f"a link to a file that is not there: {address}")
        elif heading and name and heading not in headings(target):
            problems.append(f"a link to a heading that is not there: {address}")
    return problems


def bare_references(markdown: str) -> list[str]:
    _, _, section = markdown.partition("## References")
    entries = re.findall(r"^- .*$", section.split("\n## ")[0], flags=re.MULTILINE)
    return [f"a reference without DOI, arXiv number or address: {e}" for e in entries if not re.search(r"https?://", e)]


def plain_predictions(markdown: str) -> list[str]:
    """The reader's turn is the same everywhere: a paragraph in a quotation of its own."""
    lines = re.findall(r"^[^\w\n]*Predict\b.*$", markdown, flags=re.MULTILINE)
    return [f"not '> **Predict:** …': {line}" for line in lines if not line.startswith("> **Predict:** ")]


def picture_problems(png: str) -> list[str]:
    picture = Image.open(io.BytesIO(base64.b64decode(png)))
    low, high = picture.convert("L").getextrema()
    problems = ["an empty picture"] if low == high else []
    if picture.width != WIDTH:
        problems.append(f"a picture {picture.width} pixels wide; use figsize=(6.4, …), panels below each other")
    return problems


def deserts(cells: list[nbformat.NotebookNode]) -> list[str]:
    """Stretches with much code, blank lines apart, and no picture; without the exercises."""
    problems, lines, start = [], 0, 0
    for number, cell in enumerate(cells):
        if cell.cell_type == "code" and not {"exercise", "check"} & set(cell.metadata.get("tags", [])):
            lines += sum(bool(line.strip()) for line in cell.source.splitlines())
        drawn = any("image/png" in output.get("data", {}) for output in cell.get("outputs", []))
        if drawn or number == len(cells) - 1 or (cell.cell_type == "markdown" and "![" in cell.source):
            if lines > 90:
                problems.append(f"cells {start} to {number}: {lines} lines of code without a picture, more than 90")
            lines, start = 0, number + 1
    return problems


def output_problems(output: nbformat.NotebookNode, may_fail: bool) -> list[str]:
    problems = []
    data = output.get("data", {})
    if output.output_type == "error" and not may_fail:
        problems.append("an error output")
    if output.get("name") == "stderr":
        problems.append("stderr output")
    if "Warning" in output.get("text", ""):
        problems.append("a warning in the output")
    for kind in data:
        if "svg" in kind or "widget" in kind or "javascript" in kind:
            problems.append(f"an output of a kind that GitHub does not show: {kind}")
    if "image/png" in data:
        if not output.metadata.get("image/png", {}).get("alt"):
            problems.append("a picture without alt text in its metadata")
        if not str(data.get("text/plain", "")).startswith("axes "):
            problems.append("a picture without the numbers that it draws; display it with nb.show")
        problems += picture_problems(data["image/png"])
    if MACHINE_PATH.search(output.get("text", "") + str({k: v for k, v in data.items() if k != "image/png"})):
        problems.append("a machine's path in the output")
    return problems


def notebook_problems(path: Path) -> list[str]:
    """Everything that is wrong with a committed notebook, with the number of the cell."""
    text = path.read_text(encoding="utf-8")
    notebook = nbformat.reads(text, as_version=4)
    problems = []
    if len(text.encode()) > 500_000:
        problems.append(f"{len(text.encode()) // 1000} KB, more than 500")
    if "widgets" in notebook.metadata:
        problems.append("metadata.widgets, which GitHub cannot show")
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if [cell.execution_count for cell in code] != list(range(1, len(code) + 1)):
        problems.append("not executed in order from a fresh kernel")
    if not any(cell.outputs for cell in code):
        problems.append("no outputs at all")
    if path in LESSONS:
        problems += deserts(notebook.cells)
    sources = "\n".join(cell.source for cell in code)
    for number, cell in enumerate(notebook.cells):
        found = []
        if cell.cell_type == "markdown":
            found += (
                typed_numbers(cell.source, sources)
                + broken_links(cell.source, path.parent)
                + bare_references(cell.source)
                + plain_predictions(cell.source)
            )
        if cell.cell_type == "code":
            tags = set(cell.metadata.get("tags", []))
            found += [f"an unknown tag: {tag}" for tag in tags - KNOWN_TAGS]
            if re.search(r"#\s*(NBVAL_|PYTEST_VALIDATE)", cell.source):
                found.append("a comment that makes nbval skip or ignore the cell")
            if cell.source.rstrip().endswith(";"):
                found.append("ends with a semicolon")
            if len(cell.source.splitlines()) > 30:
                found.append("more than 30 lines of code")
            found += [f"longer than 99 characters: {line}" for line in cell.source.splitlines() if len(line) > 99]
            for output in cell.outputs:
                found += output_problems(output, "raises-exception" in tags)
        problems += [f"cell {number}: {problem}" for problem in found]
    return problems


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_in_order(path):
    assert not notebook_problems(path), "\n".join(notebook_problems(path))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_web_page_carries_its_pictures(path):
    page = html_page(nbformat.read(path, as_version=4), path)
    addresses = re.findall(r"<img\b[^>]*?\bsrc=\"([^\"]*)", page)
    elsewhere = [address[:80] for address in addresses if not re.match(r"data:image/png;base64,\w|https://", address)]
    assert not elsewhere, elsewhere


@pytest.mark.parametrize("path", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_page_is_in_order(path):
    text = path.read_text(encoding="utf-8")
    problems = typed_numbers(text) + broken_links(text, path.parent) + bare_references(text)
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.stem)
def test_time_to_run_is_the_measured_one(path):
    first = nbformat.read(path, as_version=4).cells[0].source
    promised = int(
        re.search(r"\*\*You need\*\* .*\*\*You will learn\*\* .*\*\*It takes\*\* under (\d+) s", first).group(1)
    )
    seconds = pd.read_csv(ROOT / "results" / "run_times.csv").set_index("notebook")["seconds"]
    assert seconds[path.stem] < promised


def test_readme_is_what_the_results_say():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme == fill(readme), "README.md differs from results/ and notebooks/; run make refresh"


def test_hero_is_what_the_results_say():
    figure = draw_hero()
    assert Image.open(ROOT / "images" / "hero.png").text["Description"] == drawn_numbers(figure), "run make refresh"
    plt.close(figure)


@pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.stem)
def test_small_picture_is_that_of_the_lesson(path):
    committed = Image.open(ROOT / "images" / "lessons" / f"{path.stem}.png").convert("RGB")
    picture = small_picture(nbformat.read(path, as_version=4))
    assert committed.size == picture.size
    # With 64 colours, and perhaps another version of Pillow, a pixel is off by a few of 255 levels.
    assert max(ImageStat.Stat(ImageChops.difference(committed, picture)).mean) < 2.5, "run make refresh"


def test_version_is_the_same_in_project_citation_and_changelog():
    pattern = {
        "pyproject.toml": r'^version = "(.+)"',
        "CITATION.cff": r"^version: (.+)",
        "CHANGELOG.md": r"^## ([\d.]+)",
    }
    found = {name: re.search(p, (ROOT / name).read_text("utf-8"), re.MULTILINE).group(1) for name, p in pattern.items()}
    assert len(set(found.values())) == 1, found


def test_a_number_may_be_marked_on_its_line_or_set_in_the_code():
    assert len(typed_numbers("It has 11.7 million parameters, and gets 196 wrong, 2.1 %.")) == 3
    assert not typed_numbers("It has 11.7 million parameters. <!-- quoted: its authors -->")
    assert not typed_numbers("There are 196 patches. <!-- exact -->") and typed_numbers("196 <!-- quoted -->")
    assert typed_numbers("There are 196 patches. <!-- exact -->\n\nIt gets 37 wrong.")
    assert not typed_numbers("A dropout of 0.2 and 25 epochs.", "train(model, dropout=0.2, epochs=25)")
    assert typed_numbers("It gets 25 % right.", "train(model, epochs=25)")


def test_a_prediction_is_a_quotation_of_its_own():
    assert not plain_predictions("Text.\n\n> **Predict:** more, or less?\n\nWe can predict this. Predict nothing.")
    assert len(plain_predictions("Predict it.\n\n**Predict:** this?\n\n> Predict: that?\n\n*Predict* it.")) == 4


def test_long_stretches_of_code_without_a_picture_are_found():
    def code(lines, **more):
        return nbformat.v4.new_code_cell("\n".join(["x = 1"] * lines), **more)

    picture = nbformat.v4.new_markdown_cell("![a picture](a.png)")
    drawn = [nbformat.v4.new_output("display_data", {"image/png": ""})]
    assert not deserts([code(90), picture, code(60), code(30, outputs=drawn), code(90)])
    assert len(deserts([code(91), picture, code(60), code(31, outputs=drawn), code(50), code(41)])) == 3
    assert not deserts([code(90), code(9, metadata={"tags": ["exercise"]}), code(9, metadata={"tags": ["check"]})])
