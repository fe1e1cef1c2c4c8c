"""Each check accepts its solution and rejects wrong answers; solution and lesson ask the same."""

import ast
import re
from functools import cache
from pathlib import Path

import nbformat
import pytest

FOLDER = Path(__file__).parent
SOLUTIONS = sorted((FOLDER.parent / "notebooks" / "solutions").glob("*.ipynb"))
LESSONS = {path: path.parent.parent / path.name.replace("_solutions", "") for path in SOLUTIONS}


@cache
def cells(path):
    return nbformat.read(path, as_version=4).cells


def exercises(path):
    """For each exercise its question, the code that answers it (or has dots), and its check."""
    tags = [cell.metadata.get("tags", []) for cell in cells(path)]
    return [cells(path)[i - 1 : i + 2] for i in range(len(tags)) if "exercise" in tags[i]]


def set_up_code(path):
    """The code before the first exercise."""
    code = [cell for cell in cells(path) if cell.cell_type == "code"]
    first = code.index(exercises(path)[0][1])
    return "\n".join(cell.source for cell in code[:first])


def wrong_answers(path):
    """The cells of ``wrong_answers/NN_name.py``: the number of an exercise, and code."""
    text = (FOLDER / "wrong_answers" / f"{LESSONS[path].stem}.py").read_text(encoding="utf-8")
    _, *parts = re.split(r"^# %% (\d+): .+\n", text, flags=re.MULTILINE)
    return [(int(number), code) for number, code in zip(parts[::2], parts[1::2])]


def functions(code):
    definitions = (ast.FunctionDef, ast.ClassDef)
    return {ast.unparse(node) for node in ast.parse(code).body if isinstance(node, definitions)}


@pytest.mark.parametrize("path", SOLUTIONS, ids=lambda path: path.stem)
def test_solutions_are_those_of_the_lesson(path):
    pairs = list(zip(exercises(path), exercises(LESSONS[path]), strict=True))
    assert 3 <= len(pairs) <= 5
    for (question, answer, check), (asked, stub, lesson_check) in pairs:
        assert question.source == asked.source.replace("### ", "## ", 1)
        assert check.source == lesson_check.source
        # the variables and the heads of functions in which the stub has dots
        for name in re.findall(r"(?m)^def .+:$|^\w+(?= = \.\.\.$)", stub.source):
            assert name in answer.source
        hidden = [cell.metadata.jupyter.source_hidden for cell in (check, lesson_check)]
        assert hidden == [True, True], "a check gives its hint away: View, Collapse Selected Code"
        assert [output.text for output in check.outputs] == ["Right.\n"]
    assert functions(set_up_code(path)) <= functions(set_up_code(LESSONS[path]))


@pytest.mark.parametrize("path", SOLUTIONS, ids=lambda path: path.stem)
def test_checks_give_the_right_verdict(path, capsys):
    set_up = {}
    exec(set_up_code(path), set_up)
    for number, (_, answer, check) in enumerate(exercises(path), start=1):
        stub = exercises(LESSONS[path])[number - 1][1].source
        wrong = [f"{stub}\n{code}" for n, code in wrong_answers(path) if n == number]
        assert len(wrong) >= 3
        for code in (stub, answer.source, *wrong):
            names = dict(set_up)
            exec(code, names)
            capsys.readouterr()
            exec(check.source, names)
            verdict = capsys.readouterr().out
            expected = {stub: "Not tried yet.\n", answer.source: "Right.\n"}
            if code in expected:
                assert verdict == expected[code]
            else:
                assert verdict.startswith(("Not yet. ", "Not yet (")), f"accepted:\n{code}"
