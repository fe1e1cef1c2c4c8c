"""The repository's address: written in pyproject.toml, the same everywhere else, and what the badges lead to works."""

import ast
import os
import re
import shutil
import subprocess
import sys

import nbformat
import pytest

from scripts.write_badges import ROOT, address, badges, colab_cell, lessons, write_all

# What Google Colab has installed, of what the lessons might import.
ON_COLAB = {"IPython", "PIL", "lrf_utils", "matplotlib", "numpy", "pandas", "seaborn", "torch", "torchvision"}
TEXT = {".md", ".py", ".toml", ".yml", ".yaml", ".cff", ".ipynb", ""}


@pytest.fixture
def copy(tmp_path):
    """The files that hold the address, with a lesson that never had badges."""
    for name in ("pyproject.toml", "README.md", "CITATION.cff"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "notebooks").mkdir()
    cells = [nbformat.v4.new_markdown_cell("# 1. Title\n\nPromise."), nbformat.v4.new_code_cell("import torch")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "notebooks" / "01_lesson.ipynb")
    return tmp_path


def generated(text: str) -> str:
    """``text`` without what write_badges.py writes."""
    parts = (
        r"<!-- badges -->.*<!-- end badges -->",
        r"^repository-code:.*?$",
        r'^ *"\[!\[Open in Colab\].*?$',  # the last line of a title cell, in a notebook's JSON
        r'^ *" *address = .*?$',  # a line of the Colab cell
    )
    for part in parts:
        text = re.sub(part, "", text, flags=re.DOTALL | re.MULTILINE)
    return text


def test_address_is_written_by_hand_in_one_place_only():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    if not tracked:
        pytest.skip("not a git checkout")
    name = address().removeprefix("https://github.com/")
    holds = []
    for path in (ROOT / file for file in tracked):
        if path.exists() and path.suffix in TEXT and name in generated(path.read_text(encoding="utf-8")):
            holds.append(path.name)
    assert holds == ["pyproject.toml"]


def test_readme_citation_and_lessons_carry_the_address(tmp_path):
    for name in ("pyproject.toml", "README.md", "CITATION.cff"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "notebooks").mkdir()
    for path in lessons():
        shutil.copy(path, tmp_path / "notebooks")
    stale = [path.name for path in write_all(tmp_path)]
    assert not stale, f"{', '.join(stale)}: run make refresh"


def test_a_lesson_gets_badges_and_a_colab_cell_once(copy):
    assert {path.name for path in write_all(copy)} >= {"01_lesson.ipynb"}
    assert write_all(copy) == []
    title, colab, code = nbformat.read(copy / "notebooks" / "01_lesson.ipynb", as_version=4).cells
    page = "notebooks/01_lesson.ipynb"
    assert title.source == "# 1. Title\n\nPromise.\n\n" + badges(address(), page, page)
    assert (colab.source, colab.metadata["tags"], code.source) == (colab_cell(address()), ["colab"], "import torch")


def test_a_new_address_reaches_every_place(copy):
    write_all(copy)
    pyproject = copy / "pyproject.toml"
    new = "https://github.com/someone/else"
    pyproject.write_text(pyproject.read_text(encoding="utf-8").replace(address(), new), encoding="utf-8")
    assert {path.name for path in write_all(copy)} == {"README.md", "CITATION.cff", "01_lesson.ipynb"}
    for path in (copy / "README.md", copy / "CITATION.cff", copy / "notebooks" / "01_lesson.ipynb"):
        text = path.read_text(encoding="utf-8")
        assert "someone/else" in text and address() not in text, path.name


def run_cell(source: str, folder, environment: dict) -> str:
    """Run the source in a fresh Python; returns its working folder and the head of its module path."""
    code = f"{source}\nprint(os.getcwd(), sys.path[0])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_colab_cell_fetches_the_repository_on_colab_and_nothing_elsewhere(tmp_path):
    origin, clone = tmp_path / "origin", tmp_path / "clone"
    (origin / "notebooks").mkdir(parents=True)
    (origin / "notebooks" / "a.txt").write_text("a")
    for command in (["init", "-q"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "a"]):
        subprocess.run(["git", *command], cwd=origin, check=True)
    source = colab_cell(origin.as_uri(), clone.as_posix())
    environment = {key: value for key, value in os.environ.items() if key != "COLAB_RELEASE_TAG"}

    assert run_cell(source, tmp_path, environment).split()[0] == str(tmp_path)
    assert not clone.exists()
    for _ in range(2):  # the second run finds the clone
        there = run_cell(source, tmp_path, {**environment, "COLAB_RELEASE_TAG": "release"})
        assert there == f"{clone / 'notebooks'} {clone.as_posix()}"


@pytest.mark.parametrize("path", lessons(), ids=lambda p: p.stem)
def test_colab_has_what_a_lesson_imports(path):
    notebook = nbformat.read(path, as_version=4)
    tree = ast.parse("\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) <= ON_COLAB


def test_version_is_the_same_in_project_citation_and_changelog():
    pattern = {
        "pyproject.toml": r'^version = "(.+)"',
        "CITATION.cff": r"^version: (.+)",
        "CHANGELOG.md": r"^## ([\d.]+)",
    }
    found = {name: re.search(p, (ROOT / name).read_text("utf-8"), re.MULTILINE).group(1) for name, p in pattern.items()}
    assert len(set(found.values())) == 1, found
