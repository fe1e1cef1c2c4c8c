"""Write badges, Colab cells and the citation's link from the repository's address in pyproject.toml; none if unset.

A Colab cell that is new has not been executed yet; ``make refresh`` runs this script first, then the notebooks.
"""

import re
import tomllib
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
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
    sys.path.insert(0, folder)"""


def read_address(root: Path = ROOT) -> str | None:
    """The repository's address, ``https://github.com/OWNER/NAME``, or None while it is unset."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project.get("urls", {}).get("Repository")


def badges(address: str, lesson: str, binder_page: str) -> str:
    """Two badges in one line of Markdown: ``lesson`` on Colab, and ``binder_page`` (a file or folder) on Binder."""
    name = address.removeprefix("https://github.com/")
    return (
        "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
        f"(https://colab.research.google.com/github/{name}/blob/main/{lesson}) "
        "[![Open on Binder](https://mybinder.org/badge_logo.svg)]"
        f"(https://mybinder.org/v2/gh/{name}/main?urlpath=lab/tree/{binder_page})"
    )


def lesson_with_badges(path: Path, address: str | None) -> nbformat.NotebookNode:
    """The lesson with badges at the end of its title cell and the Colab cell behind it, or without both."""
    notebook = nbformat.read(path, as_version=4)
    colab = [cell for cell in notebook.cells if cell.id == "colab"] or [nbformat.v4.new_code_cell(id="colab")]
    notebook.cells = [cell for cell in notebook.cells if cell.id != "colab"]
    title = notebook.cells[0]
    title.source = title.source.partition("\n\n[![Open in Colab]")[0]
    if address:
        page = f"notebooks/{path.name}"
        title.source += "\n\n" + badges(address, page, page)
        colab[0].source = COLAB.format(address=address, folder="/content/tutorials")
        notebook.cells[1:1] = colab
    return notebook


def write_all(root: Path = ROOT) -> None:
    address = read_address(root)
    for path in sorted((root / "notebooks").glob("[0-9]*.ipynb")):
        nbformat.write(lesson_with_badges(path, address), path)
    citation = root / "CITATION.cff"
    text = re.sub(r"^repository-code:.*\n", "", citation.read_text(encoding="utf-8"), flags=re.MULTILINE)
    text += f'repository-code: "{address}"\n' if address else ""
    citation.write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    write_all()
