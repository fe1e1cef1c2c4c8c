"""Which text in a matplotlib figure stands out too little from what is behind it."""

import os
from unittest import mock

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import to_rgba
from matplotlib.text import Text

LEAST = 3.0  # WCAG 2.2, success criterion 1.4.11 and, for large text, 1.4.3


def luminance(rgb: np.ndarray) -> np.ndarray:
    """The relative luminance of colours (…, 3) in [0, 1], as WCAG defines it; in [0, 1]."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return linear @ [0.2126, 0.7152, 0.0722]


def faint_text(figure: plt.Figure) -> list[str]:
    """Each text whose contrast against the picture behind it, the median over its box, is below ``LEAST``."""
    # Only what is really drawn counts: an axis keeps hidden labels, too.
    with mock.patch.object(Text, "draw", autospec=True, side_effect=Text.draw) as draw:
        figure.canvas.draw()
    texts = [call.args[0] for call in draw.call_args_list]
    texts = [text for text in dict.fromkeys(texts) if text.get_visible() and text.get_text().strip()]
    boxes = [text.get_window_extent() for text in texts]
    colours = [text.get_color() for text in texts]
    for text in texts:
        text.set_color((0, 0, 0, 0))
    figure.canvas.draw()
    behind = np.asarray(figure.canvas.buffer_rgba())[..., :3] / 255
    for text, colour in zip(texts, colours):
        text.set_color(colour)
    faint = []
    height = len(behind)
    for text, box, colour in zip(texts, boxes, colours):
        rows = slice(max(0, round(height - box.y1)), max(0, round(height - box.y0)))
        ground = behind[rows, max(0, round(box.x0)) : max(0, round(box.x1))].reshape(-1, 3)
        *rgb, alpha = to_rgba(colour, text.get_alpha())
        lighter_darker = np.sort([luminance(alpha * np.array(rgb) + (1 - alpha) * ground), luminance(ground)], axis=0)
        contrast = np.median((lighter_darker[1] + 0.05) / (lighter_darker[0] + 0.05))
        if contrast < LEAST:
            faint.append(f"{text.get_text()!r} has a contrast of {contrast:.1f}, less than {LEAST:.0f}")
    return faint


def note_faint_text() -> None:
    """From now on, every figure that is saved appends its faint text to the file that the variable FAINT names."""
    save = plt.Figure.savefig

    def checked(figure: plt.Figure, *args: object, **options: object) -> None:
        with open(os.environ["FAINT"], "a", encoding="utf-8") as notes:
            notes.writelines(f"{line}\n" for line in faint_text(figure))
        save(figure, *args, **options)

    plt.Figure.savefig = checked
