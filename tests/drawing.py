"""What a figure draws, as text: the tests compare that, since pixels differ from machine to machine."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.contour import ContourSet
from matplotlib.text import Text

SMALLEST = 11.2  # points: 8 pixels where a phone shows a figure of 6.4 inches 328 pixels wide


def drawn_numbers(figure: plt.Figure) -> str:
    """The titles, labels and data of everything drawn in ``figure``, as text; four digits of each number.

    Raises a ValueError if some text in it is too small for a phone.
    """
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    if small := [text.get_text() for text in texts if text.get_fontsize() < SMALLEST]:
        raise ValueError(f"text smaller than {SMALLEST} points: {', '.join(small)}")

    def digits(values: object) -> str:
        array = np.ma.filled(np.ma.asarray(values, dtype=float), np.nan).ravel()
        whole = np.all(np.isfinite(array)) and np.all(array == array.round())
        numbers = (f"{v:.0f}" if whole else f"{v:#.4g}" for v in array + 0.0)  # -0.0 becomes 0.0
        return " ".join(number + "0" if number.endswith(".") else number for number in numbers)

    lines = [f"figure {figure.get_suptitle()!r}"] if figure.get_suptitle() else []
    for axes in figure.axes:
        lines.append(f"axes {axes.get_title()!r}: {axes.get_xlabel()!r}, {axes.get_ylabel()!r}")
        for line in axes.lines:
            x, y = line.get_data(orig=False)
            lines.append(f"line {line.get_label()!r}: x {digits(x)}; y {digits(y)}")
        for patch in axes.patches:
            corners = patch.get_path().get_extents(patch.get_transform() - axes.transData).get_points()
            lines.append(f"patch {patch.get_label()!r}: {digits(corners)}")
        for group in axes.collections:
            if isinstance(group, ContourSet):  # one image more or less moves them, and adds or removes corners
                lines.append(f"contours: {digits(group.levels)}")
                continue
            drawn = [path.vertices for path in group.get_paths()]  # bands, error bars; of points, the marker
            if len(group.get_offsets()) > 1 or not np.allclose(group.get_offsets(), 0):
                drawn = [group.get_offsets()]
            lines.append(f"points {group.get_label()!r}: {' '.join(digits(vertices) for vertices in drawn)}")
        for image in axes.images:
            values = image.get_array()
            lines.append(f"image {values.shape}: mean {values.mean():#.4g}, standard deviation {values.std():#.4g}")
        lines += [f"text {text.get_text()!r}" for text in axes.texts]
    return "\n".join(lines)
