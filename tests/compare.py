"""Compare a stored output with a new one: words and whole numbers exactly, decimals within a tolerance.

The rule that the notebooks follow: a number that is exact is printed as a whole number, and whatever is measured or
rounded is printed with a decimal point. How far a decimal may move depends on the cell's tag.
"""

import math
import re
from collections.abc import Iterable

# tag of the cell -> how far a decimal may be from the stored one, and why
TOLERANCES = {
    # Accuracies, in percent, of weights that are stored: another CPU kernel or thread count rounds differently, and
    # moves images that lie on a decision boundary. Five of 10,000 images.
    "evaluated": 0.05,
    # Accuracies, in percent, of models trained anew in this run: training amplifies rounding. Three standard deviations
    # over seeds, of 0.06 (notebook 02). Other CPU kernels moved them by 0.09 at most.
    "retrained": 0.2,
    # The same below the knee of a rank-accuracy curve, where it is steep. The standard deviation over seeds is up to 5
    # there (notebook 04, Figure 1); other CPU kernels moved one network by 6. The plateaus are printed, and compared
    # as "retrained". Also LoRA after one epoch at a high rate (notebook 07): other CPU kernels moved it by 0.7.
    "cliff": 10.0,
    # The rank at which such a network comes within 1 pp of its plateau. Other CPU kernels moved it by 0.7 at most.
    "knee": 1.5,
    # Times and their ratios: another machine, or a busier one. They only have to be there, with the same sign.
    "timing": math.inf,
}

DECIMAL = re.compile(r"(?<![\w.])[-+−]?\d+(?:\.\d+(?:[eE][-+]?\d+)?|[eE][-+]?\d+)(?!\w|\.\d)")


def last_digit(number: str) -> float:
    """The value of one unit in the last printed digit: 0.01 for 97.28."""
    mantissa, _, exponent = number.lower().partition("e")
    return 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))


def difference(stored: str, new: str, tags: Iterable[str] = ()) -> str | None:
    """What is wrong with ``new``, in words, or None."""
    words_stored, words_new = ([" ".join(w.split()) for w in DECIMAL.split(text)] for text in (stored, new))
    if words_stored != words_new:
        was, now = next(((a, b) for a, b in zip(words_stored, words_new) if a != b), (words_stored[-1], words_new[-1]))
        return f"words or whole numbers differ: stored {was!r}, now {now!r}"
    widest = max((TOLERANCES[tag] for tag in tags if tag in TOLERANCES), default=0.0)
    for was, now in zip(DECIMAL.findall(stored), DECIMAL.findall(new)):
        a, b = (float(number.replace("−", "-")) for number in (was, now))
        # One unit in the last digit is rounding; the factor keeps 97.28 and 97.29 within it in binary arithmetic.
        tolerance = max(widest, 1.001 * last_digit(was), 1.001 * last_digit(now))
        if abs(a - b) > tolerance or ((a < 0) != (b < 0) and widest == math.inf):
            return f"a number differs by more than {tolerance:.3g}: stored {was}, now {now}"
    return None
