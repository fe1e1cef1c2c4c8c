"""What the comparison of notebooks must let pass, and what it must not."""

import copy
import shutil
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

from tests.compare import (
    DRAWING,
    difference,
    drawing_difference,
    pictures_difference,
    table_difference,
)

pytest_plugins = ["pytester"]
ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("stored", "new", "tags"),
    [
        ("accuracy 97.28 %", "accuracy  97.29 %", []),  # rounding in the last digit
        ("accuracy 97.28 %", "accuracy 97.33 %", ["evaluated"]),
        ("gain −0.02 pp", "gain +0.02 pp", ["evaluated"]),
        ("97.28", "97.47", ["retrained"]),
        ("97.28", "97.47", ["evaluated", "retrained"]),  # the wider of two
        ("93.5 %", "92.0 %", ["slope"]),
        ("44.5 %", "51.0 %", ["cliff"]),
        ("rank 9.2", "rank 8.1", ["knee"]),
        ("took 12.5 ms", "took 90.1 ms", ["timing"]),
        ("loss 1.576", "loss 1.590", ["evaluated"]),  # three decimals: 2 % of the number
        ("1.2e-05", "1.3e-05", []),
    ],
)
def test_what_may_differ(stored, new, tags):
    assert difference(stored, new, tags) is None
    assert difference(new, stored, tags) is None


@pytest.mark.parametrize(
    ("stored", "new", "tags"),
    [
        ("a word", "another word", ["timing"]),
        ("2 words", "2 words more", []),
        ("1048576", "1048577", ["cliff"]),  # whole numbers are exact
        ("rank 9", "rank 9.0", []),
        ("accuracy 97.28 %", "accuracy 97.30 %", []),
        ("accuracy 97.28 %", "accuracy 97.34 %", ["evaluated"]),
        ("gain +0.39 pp", "gain −9.00 pp", ["slope"]),
        ("loss 0.015", "loss 0.045", ["evaluated"]),
        ("1.2e-05", "1.9e-05", ["evaluated"]),
        ("cosine 0.895", "cosine 0.695", ["cliff"]),
        ("faster by 1.5", "faster by -1.5", ["timing"]),
        ("97.28", "nan", ["cliff"]),
        ("version 1.2.3", "version 1.2.4", ["cliff"]),
    ],
)
def test_what_may_not_differ(stored, new, tags):
    assert difference(stored, new, tags)


@pytest.mark.parametrize(
    ("row", "new", "tags", "same"),
    [
        ("line 'a' y: 100.0 0.1000", "line 'a' y: 100.0 0.2000", [], True),  # invisible
        ("line 'a' y: 100.0 0.1000", "line 'a' y: 100.0 0.5000", [], False),
        ("line 'a' y: 100.0 0.1000", "line 'a' y: 100.0 1.500", ["evaluated"], True),
        ("line 'a' y (log): 100.0 0.1000", "line 'a' y (log): 100.0 0.2000", ["cliff"], False),
        ("line 'a' y (%): 97.28 30.00", "line 'a' y (%): 97.28 38.00", ["cliff"], True),
        ("line 'a' y (%): 97.28 30.00", "line 'a' y (%): 97.28 38.00", ["slope"], False),
        ("line 'a: 0.5' y: 1 2", "line 'a: 0.6' y: 1 2", ["evaluated"], False),
        ("line 'a' y: 1 2 3", "line 'a' y: 1 2 4", ["evaluated"], False),
        ("line 'a' y: 1 2 3", "line 'a' y: 1 2", [], False),
        ("text 'here: 9.5 %'", "text 'here: 9.6 %'", [], True),
        ("text 'here: 9.5 %'", "text 'here: 9.7 %'", [], False),
        ("axes 'a': 'x', 'y'", "axes 'b': 'x', 'y'", [], False),
        ("line 'a' y: 1 2\nline 'b' y: 1 2", "line 'a' y: 1 2", [], False),
    ],
)
def test_drawn_numbers_may_differ_by_what_nobody_sees(row, new, tags, same):
    assert (drawing_difference(row, new, tags) is None) == same


def picture(alt="A line.", drawing=("line 'a' y: 1 2",), data="png"):
    metadata = {"image/png": {"alt": alt}}
    data = {"image/png": data, "text/plain": alt, DRAWING: list(drawing)}
    return new_output("display_data", data, metadata=metadata)


def test_pictures():
    stored = [picture("A line at 97.28 %.")]
    old = copy.deepcopy(stored)
    del old[0].data[DRAWING]
    assert pictures_difference(stored, [picture("A line at 97.29 %.", data="other")]) is None
    for new in ([], stored * 2, [picture("A line at 95.28 %.")], [picture("")], old):
        assert pictures_difference(stored, new)
    assert "refresh the notebook" in pictures_difference(old, stored)


def test_tables(tmp_path):
    def written(name, text):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    stored = written("stored.csv", "rank,right (%),seconds\n10,97.2800,0.5\n")
    for name, row, same in (
        ("equal", "10,97.2800,0.5\n", True),
        ("near", "10,97.3200,9.5\n", True),
        ("far", "10,97.3900,0.5\n", False),
        ("negative time", "10,97.2800,-0.5\n", False),
        ("other rank", "11,97.2800,0.5\n", False),
        ("more", "10,97.2800,0.5\n" * 2, False),
    ):
        new = written(f"{name}.csv", "rank,right (%),seconds\n" + row)
        assert (table_difference(stored, new) is None) == same, name
    other = written("columns.csv", "rank,wrong (%),seconds\n10,97.2800,0.5\n")
    assert table_difference(stored, other)
    assert "not committed" in table_difference(tmp_path / "missing.csv", stored)


SHOW = f"""from IPython.display import display
data = {{"image/png": "png", "text/plain": "A line.", "{DRAWING}": ["line 'a' y: 1 2"]}}
display(data, raw=True, metadata={{"image/png": {{"alt": "A line."}}}})"""
WRITE = """import os
os.makedirs(os.environ["LRF_OUT"] + "/results")
open(os.environ["LRF_OUT"] + "/results/table.csv", "w").write("rank\\n10\\n") and None"""


def test_a_notebook_with_faults(pytester):
    """Runs in a process of its own, with this conftest, on a small notebook and a table."""
    for name in ("conftest.py", "tests/compare.py"):
        path = pytester.path / name
        path.parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, path)
    pytester.mkdir("results")
    (pytester.path / "results" / "table.csv").write_text("rank\n11\n")
    cells = [
        new_code_cell("print(0.5, 'of it')", outputs=[new_output("stream", text="0.5 of it\n")]),
        new_code_cell("print(2, 'of 3')", outputs=[new_output("stream", text="3 of 3\n")]),
        new_code_cell(SHOW, outputs=[picture()]),
        new_code_cell(SHOW, outputs=[picture(drawing=["line 'a' y: 1 3"])]),
        new_code_cell("1 + 1"),  # its output is not stored
        new_code_cell(WRITE),
    ]
    for number, cell in enumerate(cells, start=1):
        cell.execution_count = number
    nbformat.write(new_notebook(cells=cells), pytester.path / "notebook.ipynb")
    options = ("--nbval", "--nbval-current-env")
    pytester.runpytest_subprocess(*options).assert_outcomes(passed=3, failed=4)
    # Only what failed, again: the cells need one another, so the whole notebook runs.
    (pytester.path / "results" / "table.csv").write_text("rank\n10\n")
    pytester.runpytest_subprocess(*options, "--lf").assert_outcomes(passed=4, failed=3)
