"""What nbval lacks: decimals are compared within a tolerance, and a picture must be drawn, with its alt text."""

import os
import shutil
from pathlib import Path

from nbval.plugin import IPyNbCell

from tests.compare import difference

OUT = Path(__file__).parent / "build" / "tests"
strict_compare_outputs = IPyNbCell.compare_outputs


class StoredOrNew(str):
    """An output that equals another one when ``difference`` finds nothing."""

    tags: list[str]

    def __eq__(self, other: object) -> bool:
        return difference(self, str(other), self.tags) is None

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


def sanitize(cell: IPyNbCell, text: object) -> object:
    if not isinstance(text, str):
        return text
    output = StoredOrNew(text)
    output.tags = cell.cell.metadata.get("tags", [])
    return output


def pictures(outputs: list) -> list[str | None]:
    """The alt text of every picture among a cell's outputs."""
    shown = [output for output in outputs if "image/png" in output.get("data", {})]
    return [output["metadata"].get("image/png", {}).get("alt") for output in shown]


def compare_outputs(cell: IPyNbCell, new: list, stored: list, skip_compare: tuple[str, ...] | None = None) -> bool:
    if pictures(new) != pictures(stored):
        cell.comparison_traceback = [f"pictures differ: stored {pictures(stored)}, now {pictures(new)}"]
        return False
    return strict_compare_outputs(cell, new, stored, skip_compare)


def format_output_compare(cell: IPyNbCell, key: str, stored: str, new: str) -> None:
    reason = difference(stored, new, cell.cell.metadata.get("tags", [])) or "not the same"
    cell.comparison_traceback += [f"{key}: {reason}", "stored:", str(stored), "now:", str(new)]


IPyNbCell.sanitize = sanitize
IPyNbCell.compare_outputs = compare_outputs
IPyNbCell.format_output_compare = format_output_compare


def pytest_configure() -> None:
    """The notebooks under test write to a folder of their own, empty at the start."""
    shutil.rmtree(OUT, ignore_errors=True)
    os.environ["LRF_OUT"] = str(OUT)
