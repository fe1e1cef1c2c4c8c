"""Write ``notebooks/solutions/NN_name_solutions.ipynb`` from each lesson and its ``NN_name.toml``, without outputs.

Question, stub and check are taken from the lesson. The TOML file holds one ``[[exercise]]`` table for each exercise,
in order: ``answer``, the whole stub, solved; ``why``, the explanation; ``wrong``, plausible answers, one of which at a
time replaces names of the stub, for the check to reject.
"""

import tomllib
from pathlib import Path
from typing import NamedTuple

import nbformat
from nbformat import NotebookNode, v4

ROOT = Path(__file__).resolve().parent.parent
SOLUTIONS = ROOT / "notebooks" / "solutions"
LESSONS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))


class Exercise(NamedTuple):
    """One exercise: three cells of the lesson, and what its TOML file says."""

    question: NotebookNode
    stub: NotebookNode
    check: NotebookNode
    answer: str
    why: str
    wrong: list[str]


def has_tag(cell: NotebookNode, tag: str) -> bool:
    return tag in cell.metadata.get("tags", [])


def read_exercises(lesson: Path) -> list[Exercise]:
    """The exercises of a lesson, in order.

    Raises:
        ValueError: a question, its stub and its check do not follow each other, or there are more or fewer of them than
            tables in the TOML file.
    """
    cells = nbformat.read(lesson, as_version=4).cells
    stubs = [i for i, cell in enumerate(cells) if has_tag(cell, "exercise")]
    tables = tomllib.loads((SOLUTIONS / f"{lesson.stem}.toml").read_text(encoding="utf-8"))["exercise"]
    if len(stubs) != len(tables):
        raise ValueError(f"{lesson.name} has {len(stubs)} exercises, and {lesson.stem}.toml has {len(tables)}")
    exercises = []
    for number, (i, table) in enumerate(zip(stubs, tables), start=1):
        question, stub, check = cells[i - 1 : i + 2]
        if not question.source.startswith(f"### Exercise {number}: ") or not has_tag(check, "check"):
            raise ValueError(f"{lesson.name}: exercise {number} is not a question, its stub and its check")
        texts = {key: table[key].strip() for key in ("answer", "why")}
        exercises.append(Exercise(question, stub, check, **texts, wrong=[text.strip() for text in table["wrong"]]))
    return exercises


def solution_notebook(lesson: Path) -> NotebookNode:
    """The lesson's set-up, then for each exercise the question, the answer, the check and the explanation."""
    notebook = nbformat.read(lesson, as_version=4)
    title = notebook.cells[0].source.splitlines()[0]
    intro = (
        f"{title}: solutions\n\nTry the exercises in [the lesson](../{lesson.name}) first. A check asks for the right "
        "properties only, so your answer may look different and be just as right."
    )
    cells = [v4.new_markdown_cell(intro)]
    cells += [v4.new_code_cell(cell.source) for cell in notebook.cells if has_tag(cell, "setup")]
    for exercise in read_exercises(lesson):
        cells += [
            v4.new_markdown_cell(exercise.question.source.replace("### ", "## ", 1)),
            v4.new_code_cell(exercise.answer, metadata=exercise.stub.metadata),
            v4.new_code_cell(exercise.check.source, metadata=exercise.check.metadata),
            v4.new_markdown_cell(exercise.why),
        ]
    for number, cell in enumerate(cells):
        cell.id = f"cell-{number:02}"
    return v4.new_notebook(cells=cells, metadata={"kernelspec": notebook.metadata.kernelspec})


def solution_path(lesson: Path) -> Path:
    return SOLUTIONS / f"{lesson.stem}_solutions.ipynb"


if __name__ == "__main__":
    for path in LESSONS:
        nbformat.write(solution_notebook(path), solution_path(path))
