"""Compare a stored output with a new one: words and whole numbers exactly, decimals loosely.

The rule that the lessons follow: a number that is exact is printed as a whole number, and whatever
is measured or rounded is printed with a decimal point; accuracies in percent with one or two
decimals. How far a decimal may move depends on the tag of its cell.
"""

import csv
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple


class Tolerance(NamedTuple):
    """How far a decimal may be from the stored one."""

    points: float  # of an accuracy in percent: percentage points
    share: float  # of any other number, as a share of it


TOLERANCES = {
    # Weights that are stored: another CPU kernel or thread count rounds differently, and moves
    # images that lie on a decision boundary. Five of 10,000 images.
    "evaluated": Tolerance(0.05, 0.02),
    # Models trained in this run: training amplifies rounding. Three standard deviations over
    # seeds, of 0.06 (notebook 02). Other CPU kernels moved accuracies by 0.09 at most.
    "retrained": Tolerance(0.2, 0.05),
    # The same where a rank-accuracy curve begins to fall, or after one epoch at a high rate: other
    # CPU kernels moved LoRA's accuracy (notebook 07) by 0.7.
    "slope": Tolerance(2.0, 0.1),
    # The same far below the knee, where it is steepest. The standard deviation over seeds is up to
    # 5 there (notebook 04, Figure 1); other CPU kernels moved one network by 6.
    "cliff": Tolerance(10.0, 0.2),
    # The rank at which such a network comes within 1 pp of its plateau. Other CPU kernels moved it
    # by 0.7 at most.
    "knee": Tolerance(1.5, 0.15),
    # Times and their ratios: another machine, or a busier one. They only have to be there, with
    # the same sign.
    "timing": Tolerance(math.inf, math.inf),
}
IN_PERCENT = {"slope", "cliff"}  # too wide for numbers in any other unit
INVISIBLE = 0.002  # of the largest number that is drawn in a row: about one pixel of a picture
DRAWING = "application/vnd.lrf.drawing+json"  # of notebook_utils.show
TIMES = re.compile(r"µs|\bms\b|seconds|speed-up|spread \(%\)")  # columns of tables

DECIMAL = re.compile(r"(?<![\w.])[-+−]?\d+(?:\.\d+(?:[eE][-+]?\d+)?|[eE][-+]?\d+)(?!\w|\.\d)")


def difference(stored: str, new: str, tags: Iterable[str] = ()) -> str | None:
    """What is wrong with ``new``, in words, or None."""
    tolerance = _tolerance(tags)

    def allowed(number: str) -> float:
        if re.search(r"\.\d\d?$", number):  # as accuracies in percent are printed
            return tolerance.points
        return min(tolerance.points, tolerance.share * abs(_value(number)))

    return _difference(stored, new, allowed)


def drawing_difference(stored: str, new: str, tags: Iterable[str] = ()) -> str | None:
    """The same for lines that ``notebook_utils.drawn_numbers`` wrote."""
    tolerance = _tolerance(tags)
    was, now = stored.splitlines(), new.splitlines()
    for a, b in zip(was, now):
        if a.startswith(("figure", "axes", "legend", "text")):
            problem = difference(a, b, tags)
        else:
            problem = _row_difference(a, b, tolerance)
        if problem:
            return f"{problem}, in {a[:60]!r}"
    return None if len(was) == len(now) else "more or fewer things are drawn"


def _row_difference(stored: str, new: str, tolerance: Tolerance) -> str | None:
    """Coordinates follow the name of what is drawn, which ends with their unit."""
    name, _, numbers = stored.rpartition(": ")
    new_name, _, new_numbers = new.rpartition(": ")
    if name != new_name:
        return f"other things are drawn: stored {name!r}, now {new_name!r}"
    share = max(tolerance.share, INVISIBLE)
    largest = max((abs(_value(number)) for number in DECIMAL.findall(numbers)), default=0.0)

    def allowed(number: str) -> float:
        if name.endswith("(%)"):
            return max(tolerance.points, INVISIBLE * largest)
        if name.endswith("(log)"):
            return share * abs(_value(number))
        return share * largest

    return _difference(numbers, new_numbers, allowed)


def _difference(stored: str, new: str, allowed: Callable[[str], float]) -> str | None:
    """``allowed`` tells how far a number may be from the stored one."""
    texts = [[" ".join(part.split()) for part in DECIMAL.split(text)] for text in (stored, new)]
    if texts[0] != texts[1]:
        for was, now in zip_longest(*texts):
            if was != now:
                return f"words or whole numbers differ: stored {was!r}, now {now!r}"
    for was, now in zip(DECIMAL.findall(stored), DECIMAL.findall(new)):
        a, b = _value(was), _value(now)
        tolerance = allowed(was)
        if tolerance == math.inf:
            if (a < 0) != (b < 0):
                return f"a sign differs: stored {was}, now {now}"
            continue
        # One unit in the last digit is rounding; the factor keeps 97.28 and 97.29 within it in
        # binary arithmetic.
        tolerance = max(tolerance, 1.001 * _last_digit(was), 1.001 * _last_digit(now))
        if abs(a - b) > tolerance:
            return f"a number differs by more than {tolerance:.3g}: stored {was}, now {now}"
    return None


def _tolerance(tags: Iterable[str]) -> Tolerance:
    """The widest of the tags'."""
    return max((TOLERANCES[tag] for tag in tags if tag in TOLERANCES), default=Tolerance(0, 0))


def _value(number: str) -> float:
    return float(number.replace("−", "-"))


def _last_digit(number: str) -> float:
    """The value of one unit in the last printed digit: 0.01 for 97.28."""
    mantissa, _, exponent = number.lower().partition("e")
    return 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))


def pictures(outputs: Sequence[Mapping]) -> list[tuple[str, bool]]:
    """The alternative text of each picture, and whether the output says what is drawn."""
    found = []
    for output in outputs:
        data = output.get("data", {})
        if "image/png" in data:
            alt = output["metadata"].get("image/png", {}).get("alt", "")
            found.append((alt, DRAWING in data))
    return found


def pictures_difference(
    stored: Sequence[Mapping], new: Sequence[Mapping], tags: Iterable[str] = ()
) -> str | None:
    was, now = pictures(stored), pictures(new)
    if len(was) != len(now):
        return f"{len(was)} pictures are stored, and {len(now)} are drawn now"
    for (alt, listed), (new_alt, new_listed) in zip(was, now):
        if problem := difference(alt, new_alt, tags):
            return f"alternative texts: {problem}"
        if new_listed and not listed:
            return "the stored picture does not say what is drawn; refresh the notebook"
        if listed and not new_listed:
            return "the picture no longer says what is drawn; use nb.show"
    return None


def table_difference(stored: Path, new: Path) -> str | None:
    """The same for two CSV files: accuracies as if "evaluated", and times by their sign."""
    if not stored.exists():
        return f"results/{stored.name} is not committed; refresh the notebook"
    was, now = _rows(stored), _rows(new)
    if len(was) != len(now) or was[0] != now[0]:
        return f"results/{stored.name} has other columns or another number of rows"
    for number, (row, new_row) in enumerate(zip(was, now)):
        for column, a, b in zip(was[0], row, new_row):
            points = TOLERANCES["timing" if TIMES.search(column) else "evaluated"].points
            if problem := _difference(a, b, lambda _, points=points: points):
                return f"results/{stored.name}, row {number}, {column}: {problem}"
    return None


def _rows(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))
