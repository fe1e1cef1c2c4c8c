"""Each check accepts its solution and rejects wrong answers; the committed solutions are those of the TOML files."""

from functools import cache

import matplotlib.pyplot as plt
import nbformat
import pytest

from scripts.write_solutions import LESSONS, has_tag, read_exercises, solution_notebook, solution_path

plt.switch_backend("agg")

EXERCISES = [
    pytest.param(lesson, number, id=f"{lesson.stem}-{number}")
    for lesson in LESSONS
    for number in range(1, len(read_exercises(lesson)) + 1)
]


@cache
def set_up(lesson):
    """The names that the lesson's cells with the tag ``setup`` define."""
    names = {}
    for cell in nbformat.read(lesson, as_version=4).cells:
        if has_tag(cell, "setup"):
            exec(cell.source, names)
    return names


@pytest.mark.parametrize(("lesson", "number"), EXERCISES)
def test_check_tells_right_from_wrong_and_from_not_tried(lesson, number, capsys):
    exercise = read_exercises(lesson)[number - 1]

    def verdict(*sources):
        names = dict(set_up(lesson))
        for source in sources:
            exec(source, names)
        capsys.readouterr()
        exec(exercise.check.source, names)
        return capsys.readouterr().out

    stub = exercise.stub.source
    assert verdict(stub) == "Not tried yet.\n"
    assert verdict(stub, exercise.answer) == "Right.\n"
    assert len(set(exercise.wrong)) >= 2
    for wrong in exercise.wrong:
        assert verdict(stub, wrong).startswith("Not yet. "), f"accepted:\n{wrong}"


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda p: p.stem)
def test_lesson_ends_with_three_to_five_exercises(lesson):
    cells = nbformat.read(lesson, as_version=4).cells
    assert 3 <= len(read_exercises(lesson)) <= 5
    assert sum(cell.source.startswith("### Exercise ") for cell in cells) == len(read_exercises(lesson))
    assert sum(has_tag(cell, "check") for cell in cells) == len(read_exercises(lesson))


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda p: p.stem)
def test_solutions_are_what_the_lesson_and_its_toml_file_say(lesson):
    def parts(notebook):
        return [(cell.cell_type, cell.source, cell.metadata) for cell in notebook.cells]

    committed = nbformat.read(solution_path(lesson), as_version=4)
    assert parts(committed) == parts(solution_notebook(lesson)), "run make refresh"


def test_every_notebook_with_solutions_has_its_lesson():
    folder = solution_path(LESSONS[0]).parent
    assert sorted(folder.glob("*.ipynb")) == [solution_path(lesson) for lesson in LESSONS]
