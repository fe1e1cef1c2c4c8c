"""What nbval lacks: tolerances for decimals, comparison of pictures and of the tables written.

Each notebook of a test run writes to a temporary folder of its own, so that neither another run
nor another worker of pytest-xdist (which needs ``--dist loadfile``) gets in its way.
"""

import os
import tempfile
from pathlib import Path

import pytest
from nbval.plugin import IPyNbCell, IPyNbFile

from tests.compare import (
    difference,
    drawing_difference,
    pictures_difference,
    table_difference,
)

ROOT = Path(__file__).parent


def pytest_configure(config: pytest.Config) -> None:
    """What tests write goes to a folder that is removed at the end."""
    config.scratch = tempfile.TemporaryDirectory(prefix="lrf-")
    os.environ["LRF_OUT"] = config.scratch.name


def pytest_unconfigure(config: pytest.Config) -> None:
    config.scratch.cleanup()


# --- Cells ---------------------------------------------------------------------------------------


class Output(str):
    """Text in an output, which equals other text when no difference counts."""

    tags: list[str]
    drawn: bool  # what a picture shows, rather than words

    def problem(self, other: str) -> str | None:
        compare = drawing_difference if self.drawn else difference
        return compare(self, other, self.tags)

    def __eq__(self, other: object) -> bool:
        return self.problem(str(other)) is None

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


def sanitize(cell: IPyNbCell, value: object) -> object:
    """nbval calls this for whatever it is about to compare with ``!=``."""
    if not isinstance(value, str | list):
        return value
    drawn = isinstance(value, list)
    output = Output("\n".join(value) if drawn else value)
    output.tags, output.drawn = cell.cell.metadata.get("tags", []), drawn
    return output


def compare_outputs(cell: IPyNbCell, new: list, stored: list, *options: object) -> bool:
    """nbval's comparison, which never looks at pictures, after that of the pictures."""
    problem = pictures_difference(stored, new, cell.cell.metadata.get("tags", []))
    if problem:
        cell.comparison_traceback = [problem]
        return False
    return compare_texts(cell, new, stored, *options)


def format_output_compare(cell: IPyNbCell, key: str, stored: Output, new: Output) -> None:
    reason = stored.problem(new) if isinstance(stored, Output) else "not the same"
    cell.comparison_traceback += [f"{key}: {reason}", "stored:", str(stored), "now:", str(new)]


compare_texts = IPyNbCell.compare_outputs
IPyNbCell.sanitize = sanitize
IPyNbCell.compare_outputs = compare_outputs
IPyNbCell.format_output_compare = format_output_compare


# --- Notebooks -----------------------------------------------------------------------------------


class Tables(pytest.Item):
    """The last item of a notebook: the tables that its cells wrote against the committed ones."""

    def runtest(self) -> None:
        for path in sorted(self.parent.out.glob("results/*.csv")):
            problem = table_difference(ROOT / "results" / path.name, path)
            assert not problem, problem

    def repr_failure(self, excinfo: pytest.ExceptionInfo) -> str:
        return str(excinfo.value)

    def reportinfo(self) -> tuple[Path, int, str]:
        return self.path, 0, f"{self.path.name}: tables"


def setup(notebook: IPyNbFile) -> None:
    notebook.out = Path(notebook.config.scratch.name) / notebook.path.stem
    os.environ["LRF_OUT"] = str(notebook.out)  # before the notebook's kernel starts
    start_kernel(notebook)


def collect(notebook: IPyNbFile) -> list[pytest.Item]:
    notebook.items = [*collect_cells(notebook), Tables.from_parent(notebook, name="tables")]
    return notebook.items


start_kernel, collect_cells = IPyNbFile.setup, IPyNbFile.collect
IPyNbFile.setup = setup
IPyNbFile.collect = collect


class WholeNotebooks:
    """Selects whole notebooks with ``--lf`` and ``-k``, since a cell needs those above it."""

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_make_collect_report(self, collector: pytest.Collector) -> object:
        report = yield
        if isinstance(collector, IPyNbFile) and report.result:
            report.result = list(collector.items)
        return report

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> object:
        collected = list(items)
        result = yield
        notebooks = {item.parent for item in items if isinstance(item.parent, IPyNbFile)}
        items[:] = [item for item in collected if item in items or item.parent in notebooks]
        return result


def pytest_sessionstart(session: pytest.Session) -> None:
    # Registered last, so that its hooks come after those that select.
    session.config.pluginmanager.register(WholeNotebooks())
