"""Each check accepts its solution and rejects wrong answers; the committed solutions are those of the TOML files.

Every exercise runs from the lesson's ``setup`` cells alone, as it does for a reader who skips the rest.
"""

import ast
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


def functions_to_write(stub):
    """The names of the functions in which the stub has dots for the answer."""
    functions = [node for node in ast.parse(stub).body if isinstance(node, ast.FunctionDef)]
    return [function.name for function in functions if "..." in ast.unparse(function)]


@pytest.mark.parametrize(("lesson", "number"), EXERCISES)
def test_check_gives_the_right_verdict(lesson, number, capsys):
    exercise = read_exercises(lesson)[number - 1]

    def verdict(*sources):
        names = dict(set_up(lesson))
        for source in sources:
            exec(source, names)
        capsys.readouterr()
        exec(exercise.check.source, names)
        return capsys.readouterr().out

    stub = exercise.stub.source
    assert verdict(stub) == "Not tried yet.\n", "a function to be written ends with return ..."
    # Without the stub, since the published solution is the answer alone.
    assert verdict(exercise.answer) == "Right.\n", "an answer is the whole stub, solved"
    for name in functions_to_write(stub):
        head = f"def {name}(*arguments, **options):\n    "
        assert verdict(stub, head + "pass").startswith("Your function returned nothing. ")
        assert verdict(stub, head + "return no_such_name").startswith("The check could not run (NameError: ")
    assert len(set(exercise.wrong)) >= 6
    for wrong in exercise.wrong:
        assert verdict(stub, wrong).startswith(("Not yet. ", "Not yet (")), f"accepted:\n{wrong}"


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda p: p.stem)
def test_lesson_ends_with_three_to_five_exercises(lesson):
    cells = nbformat.read(lesson, as_version=4).cells
    assert 3 <= len(read_exercises(lesson)) <= 5
    assert sum(cell.source.startswith("### Exercise ") for cell in cells) == len(read_exercises(lesson))
    checks = [cell for cell in cells if has_tag(cell, "check")]
    assert len(checks) == len(read_exercises(lesson))
    hidden = [cell.metadata.get("jupyter", {}).get("source_hidden") for cell in checks]
    assert all(hidden), "a check gives its hint away: hide it in JupyterLab, with View, Collapse Selected Code"


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda p: p.stem)
def test_solutions_are_what_the_lesson_and_its_toml_file_say(lesson):
    def parts(notebook):
        return [(cell.cell_type, cell.source, cell.metadata) for cell in notebook.cells]

    committed = nbformat.read(solution_path(lesson), as_version=4)
    assert parts(committed) == parts(solution_notebook(lesson)), "run make refresh"
    shown = [[output.get("text") for output in cell.outputs] for cell in committed.cells if has_tag(cell, "check")]
    assert shown == [["Right.\n"]] * len(shown)


def test_every_notebook_with_solutions_has_its_lesson():
    folder = solution_path(LESSONS[0]).parent
    assert sorted(folder.glob("*.ipynb")) == [solution_path(lesson) for lesson in LESSONS]
