"""What needs the repository's address is there once the address is set, and not before."""

import os
import re
import shutil
import subprocess
import sys

import nbformat
import pytest

from scripts import write_readme
from scripts.write_badges import COLAB, ROOT, lesson_with_badges, read_address, write_all

LESSONS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))


@pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.stem)
def test_lesson_has_badges_if_and_only_if_there_is_an_address(path):
    assert nbformat.read(path, as_version=4) == lesson_with_badges(path, read_address()), "run make refresh"


def test_an_address_comes_and_goes(tmp_path, monkeypatch):
    for name in ("pyproject.toml", "CITATION.cff"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "notebooks").mkdir()
    shutil.copy(LESSONS[0], tmp_path / "notebooks")
    lesson, citation = tmp_path / "notebooks" / LESSONS[0].name, tmp_path / "CITATION.cff"
    pyproject = (tmp_path / "pyproject.toml").read_text(encoding="utf-8")
    pyproject = re.sub(r"^Repository = .*\n", "", pyproject, flags=re.MULTILINE)

    def with_address(line):
        text = pyproject.replace("[project.urls]\n", f"[project.urls]\n{line}\n")
        (tmp_path / "pyproject.toml").write_text(text, encoding="utf-8")
        write_all(tmp_path)
        monkeypatch.setattr(write_readme, "read_address", lambda: read_address(tmp_path))
        return (
            [text.count("a/b") for text in (lesson.read_text("utf-8"), citation.read_text("utf-8"))],
            [cell.id for cell in nbformat.read(lesson, as_version=4).cells[:2]],
            "a/b" in write_readme.readme_badges(),
        )

    assert with_address("") == ([0, 0], ["cell-00", "cell-01"], False)
    for _ in range(2):
        assert with_address('Repository = "https://github.com/a/b"') == ([3, 1], ["cell-00", "colab"], True)
    assert with_address("") == ([0, 0], ["cell-00", "cell-01"], False)


def test_colab_cell_fetches_the_repository_on_colab_and_nothing_elsewhere(tmp_path):
    origin, clone = tmp_path / "origin", tmp_path / "clone"
    (origin / "notebooks").mkdir(parents=True)
    (origin / "notebooks" / "a.txt").write_text("a")
    for command in (["init", "-q"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "a"]):
        subprocess.run(["git", *command], cwd=origin, check=True)
    source = COLAB.format(address=origin.as_uri(), folder=clone.as_posix()) + "\nprint(os.getcwd(), sys.path[0])"
    elsewhere = {key: value for key, value in os.environ.items() if key != "COLAB_RELEASE_TAG"}

    def run(environment):
        command = [sys.executable, "-c", source]
        return subprocess.check_output(command, cwd=tmp_path, env=environment, text=True).strip()

    assert run(elsewhere).split()[0] == str(tmp_path)
    assert not clone.exists()
    for _ in range(2):  # the second run finds the clone
        assert run(elsewhere | {"COLAB_RELEASE_TAG": "1"}) == f"{clone / 'notebooks'} {clone.as_posix()}"
