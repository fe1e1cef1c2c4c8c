"""Write the repository's address, which stands in pyproject.toml, wherever else it is needed.

That is: the badges of README.md and of each lesson, each lesson's cell for Google Colab, and CITATION.cff. A Colab cell
that is new has not been executed yet; ``make refresh`` runs this script first, then executes the notebooks.
"""

import re
import tomllib
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
BRANCH = "main"

COLAB = """\
# On Google Colab, this cell fetches the repository. Everywhere else it does nothing.
import os
import subprocess
import sys

if "COLAB_RELEASE_TAG" in os.environ:
    address = "{address}"
    folder = "{folder}"
    if not os.path.exists(folder):
        subprocess.run(["git", "clone", "--quiet", "--depth=1", address, folder], check=True)
    os.chdir(os.path.join(folder, "notebooks"))
    sys.path.insert(0, folder)
"""


def address(root: Path = ROOT) -> str:
    """The repository's address, ``https://github.com/OWNER/NAME``."""
    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Repository"]


def badges(repository: str, lesson: str, binder_page: str) -> str:
    """Two badges in one line of Markdown: ``lesson`` on Colab, and ``binder_page`` (a file or folder) on Binder."""
    name = repository.removeprefix("https://github.com/")
    colab = f"https://colab.research.google.com/github/{name}/blob/{BRANCH}/{lesson}"
    binder = f"https://mybinder.org/v2/gh/{name}/{BRANCH}?urlpath=lab/tree/{binder_page}"
    return (
        f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({colab}) "
        f"[![Open on Binder](https://mybinder.org/badge_logo.svg)]({binder})"
    )


def colab_cell(repository: str, folder: str = "/content/tutorials") -> str:
    """The source of the cell that makes a lesson run on Colab, which has every package that the lessons import."""
    return COLAB.format(address=repository, folder=folder).strip()


def write_lesson(path: Path, repository: str) -> bool:
    """Put badges at the end of a lesson's title cell and the Colab cell behind it; whether the file was changed."""
    notebook = nbformat.read(path, as_version=4)
    before = nbformat.writes(notebook)
    title = notebook.cells[0]
    page = f"notebooks/{path.name}"
    title.source = title.source.partition("\n\n[![Open in Colab]")[0] + "\n\n" + badges(repository, page, page)
    if "colab" not in notebook.cells[1].metadata.get("tags", []):
        notebook.cells.insert(1, nbformat.v4.new_code_cell(id="colab", metadata={"tags": ["colab"]}))
    notebook.cells[1].source = colab_cell(repository)
    if nbformat.writes(notebook) == before:
        return False
    nbformat.write(notebook, path)
    return True


def lessons(root: Path = ROOT) -> list[Path]:
    """The numbered notebooks, in order."""
    return sorted((root / "notebooks").glob("[0-9]*.ipynb"))


def write_page(path: Path, pattern: str, text: str) -> bool:
    """Replace the one match of ``pattern`` in a text file; whether the file was changed."""
    old = path.read_text(encoding="utf-8")
    new, count = re.subn(pattern, lambda match: text, old, flags=re.DOTALL | re.MULTILINE)
    if count != 1:
        raise ValueError(f"{path} must hold {pattern!r} once, and holds it {count} times")
    path.write_text(new, encoding="utf-8", newline="\n")
    return new != old


def write_all(root: Path = ROOT) -> list[Path]:
    """Write the address everywhere; returns the files that were changed."""
    repository, first = address(root), lessons(root)[0]
    readme = badges(repository, f"notebooks/{first.name}", "notebooks")
    pages = [
        (
            root / "README.md",
            "<!-- badges -->.*<!-- end badges -->",
            f"<!-- badges -->\n\n{readme}\n\n<!-- end badges -->",
        ),
        (root / "CITATION.cff", "^repository-code:[^\n]*$", f'repository-code: "{repository}"'),
    ]
    changed = [path for path, pattern, text in pages if write_page(path, pattern, text)]
    return changed + [path for path in lessons(root) if write_lesson(path, repository)]


if __name__ == "__main__":
    for path in write_all():
        print("wrote", path.relative_to(ROOT))
