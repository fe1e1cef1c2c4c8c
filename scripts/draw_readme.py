"""Draw the README's pictures: ``images/hero.png``, and a small picture of each lesson in ``images/lessons/``."""

import base64
import io
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
from matplotlib.patches import Rectangle
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import notebook_utils as nb
from scripts.write_readme import HERO, MLP, ROOT, lessons, recovered, thumbnail
from tests.drawing import drawn_numbers

WIDTHS, NARROW, RANKS = (784, 256, 128, 10), (784, 30, 127, 10), (22, 11, None)
GAP, STEP = 60, 415  # between matrices, and from row to row, in weights


def draw_hero() -> plt.Figure:
    """Dense, low rank and narrower dense: every matrix of the three networks, with an area of what it stores."""
    table = recovered()
    fig, ax = plt.subplots(figsize=(6.4, 5.8))
    texts = {
        "dense": "Dense",
        "low rank": "Low rank: each block as a tall strip times a wide one",
        "narrower": "An ordinary network, made narrow",
    }
    styles = ("dense", "trained again", "narrower dense")
    for row, (name, method) in enumerate(HERO.items()):
        color, y, x, stored = nb.METHODS[styles[row]]["color"], -STEP * row, 0, 0
        widths = NARROW if name == "narrower" else WIDTHS
        for n, m, full_n, full_m, rank in zip(widths, widths[1:], WIDTHS, WIDTHS[1:], RANKS):
            strips = [(x, n, m)]
            if name == "low rank" and rank:
                strips = [(x - rank - 6, rank, m), (x, n, rank)]
            ax.add_patch(Rectangle((x, y), full_n, -full_m, facecolor="none", edgecolor="#b0b0b0", lw=0.8, ls=":"))
            for left, width, height in strips:
                ax.add_patch(Rectangle((left, y), width, -height, facecolor=color, lw=0))
                stored += width * height
            stored += m  # the biases
            x += full_n + GAP
        result = table.loc[(MLP, method)]
        assert stored == result.parameters, f"{name} is drawn with {stored} numbers, and has {result.parameters}"
        ax.text(-28, y + 78, texts[name], fontsize=14, fontweight="bold", va="center")
        ax.text(-28, y + 28, f"{stored:,} numbers, {result['mean']:.2f} % right", fontsize=14, va="center")
    ax.set(xlim=(-34, x - GAP + 6), ylim=(-2 * STEP - 262, 105), aspect="equal")
    ax.axis("off")
    return fig


def small_picture(notebook: nbformat.NotebookNode) -> Image.Image:
    """The picture that stands for a lesson, 352 pixels wide and at most 264 high, for half that size on the page."""
    data = base64.b64decode(thumbnail(notebook).data["image/png"])
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    picture.thumbnail((352, 264), Image.Resampling.LANCZOS)
    return picture


def save(picture: Image.Image, path: Path, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.convert("RGB").quantize(64).save(path, optimize=True, **options)


if __name__ == "__main__":
    nb.use_style()
    figure, png, note = draw_hero(), io.BytesIO(), PngInfo()
    figure.savefig(png, dpi=2 * figure.dpi)
    note.add_text("Description", drawn_numbers(figure))  # by which the tests know whether it is up to date
    save(Image.open(png), ROOT / "images" / "hero.png", pnginfo=note)
    for path, notebook in lessons():
        save(small_picture(notebook), ROOT / "images" / "lessons" / f"{path.stem}.png")
