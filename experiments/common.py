"""What experiments share: options on the command line, and a table that resumes."""

import argparse
import csv
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


class Table:
    """A CSV file to which each row is added once, as soon as it is measured.

    Rows are told apart by the columns in ``key``. Since rows that are there are skipped, an
    interrupted run goes on where it stopped.
    """

    def __init__(self, path: Path, columns: Sequence[str], key: Sequence[str]) -> None:
        self.path, self.columns, self.key = Path(path), list(columns), list(key)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.path.exists():
            self._append(self.columns)
        with self.path.open(newline="", encoding="utf-8") as file:
            header = next(csv.reader(file))
        if header != self.columns:
            raise ValueError(f"{self.path} has the columns {header}, not {self.columns}")

    def __contains__(self, row: Mapping[str, Any]) -> bool:
        wanted = [str(row[name]) for name in self.key]
        with self.path.open(newline="", encoding="utf-8") as file:
            return any([old[name] for name in self.key] == wanted for old in csv.DictReader(file))

    def add(self, row: Mapping[str, Any], measure: Callable[[], Mapping[str, Any]]) -> None:
        """Append ``row`` with the columns that ``measure()`` returns, unless its key is there."""
        if row in self:
            return
        start = time.perf_counter()
        values = {**row, **measure()}
        if row in self:
            raise SystemExit(f"another process writes to {self.path.name}, too; stop one of them")
        self._append([values[name] for name in self.columns])
        seconds = time.perf_counter() - start
        shown = ", ".join(f"{name} {values[name]}" for name in self.columns)
        print(f"{self.path.stem}: {shown} ({seconds:.0f} s)", flush=True)

    def _append(self, values: Iterable[Any]) -> None:
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerow(values)


def parse(doc: str, parts: Iterable[str], seeds: Sequence[int] = (0,)) -> argparse.Namespace:
    """The options of an experiment: ``parts``, ``seeds``, ``validate`` and the folder ``out``."""
    parts = list(parts)
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts, help="what to run")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(seeds))
    parser.add_argument(
        "--validate", action="store_true", help="compare settings on validation data instead"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "results", help="folder of the tables")
    return parser.parse_args()
