"""Draw the two concept pictures, ``images/lrf.png`` and ``images/svd.png``."""

import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, Rectangle

import notebook_utils as nb


def block(ax: plt.Axes, x: float, y: float, width: float, height: float, color: str, name: str, size: str) -> None:
    """A matrix, drawn to scale around the height ``y`` of its middle, with its name inside and its size below."""
    ax.add_patch(Rectangle((x, y - height / 2), width, height, facecolor=color, alpha=0.35, edgecolor=color, lw=2))
    ax.text(x + width / 2, y, name, ha="center", va="center", fontsize=14)
    ax.text(x + width / 2, y - height / 2 - 0.12, size, ha="center", va="top", fontsize=11.5, color="#333333")


def sign(ax: plt.Axes, x: float, y: float, text: str) -> None:
    ax.text(x, y, text, ha="center", va="center", fontsize=16)


def units(
    ax: plt.Axes, x: float, y: float, count: int, height: float, color: str, label: str
) -> list[tuple[float, float]]:
    """A column of ``count`` network units; returns where they are."""
    spots = [(x, y + height * (i / (count - 1) - 0.5)) for i in range(count)]
    ax.scatter(*zip(*spots), s=40, color=color, zorder=3)
    ax.text(x, y - height / 2 - 0.2, label, ha="center", va="top", fontsize=11.5, color="#333333")
    return spots


def connect(ax: plt.Axes, left: list[tuple[float, float]], right: list[tuple[float, float]]) -> None:
    for a in left:
        for b in right:
            ax.plot(*zip(a, b), color=nb.GREY, lw=0.6, zorder=1)


def canvas(width: float, height: float) -> tuple[plt.Figure, plt.Axes]:
    """Axes in units of which ``width`` make up the width of every figure of the series."""
    fig, ax = plt.subplots(figsize=(6.4, 6.4 * height / width))
    ax.set(xlim=(0, width), ylim=(0, height), aspect="equal")
    ax.axis("off")
    return fig, ax


def draw_factorization() -> plt.Figure:
    fig, ax = canvas(9, 5.2)
    block(ax, 0.4, 4.1, 2.6, 1.3, nb.BLUE, "W", "m × n weights")
    sign(ax, 3.6, 4.1, "≈")
    block(ax, 4.3, 4.1, 0.4, 1.3, nb.ORANGE, "A", "m × r")
    sign(ax, 5.2, 4.1, "·")
    block(ax, 5.7, 4.1, 2.6, 0.4, nb.GREEN, "B", "r × n")
    outputs, inputs = (
        units(ax, 2.6, 1.5, 5, 1.3, nb.BLUE, "m outputs"),
        units(ax, 0.7, 1.5, 9, 2.1, nb.BLUE, "n inputs"),
    )
    connect(ax, inputs, outputs)
    ax.add_patch(FancyArrowPatch((3.2, 1.5), (4.1, 1.5), arrowstyle="-|>", mutation_scale=20, color="black"))
    inputs = units(ax, 4.7, 1.5, 9, 2.1, nb.GREEN, "n inputs")
    middle = units(ax, 6.4, 1.5, 2, 0.4, nb.ORANGE, "r codes")
    outputs = units(ax, 8.1, 1.5, 5, 1.3, nb.ORANGE, "m outputs")
    connect(ax, inputs, middle)
    connect(ax, middle, outputs)
    return fig


def draw_svd() -> plt.Figure:
    fig, ax = canvas(9, 4.6)
    block(ax, 0.3, 3.4, 2.2, 1.4, nb.BLUE, "W", "m × n")
    sign(ax, 2.9, 3.4, "=")
    block(ax, 3.3, 3.4, 1.4, 1.4, nb.ORANGE, "U", "m × m")
    block(ax, 4.9, 3.4, 1.4, 1.4, "#cccccc", "", "m values")
    for i, shade in enumerate((1.0, 0.75, 0.5, 0.3, 0.15)):
        ax.add_patch(Rectangle((4.9 + 0.28 * i, 3.82 - 0.28 * i), 0.28, 0.28, facecolor="black", alpha=shade))
    block(ax, 6.5, 3.4, 2.2, 1.4, nb.GREEN, "Vᵀ", "m × n")
    sign(ax, 0.5, 1.2, "=")
    for i, shade in enumerate((0.9, 0.55, 0.3)):
        x = 0.9 + 2.55 * i
        ax.text(x, 1.2, f"σ{'₁₂₃'[i]}", fontsize=14, ha="center", va="center")
        ax.add_patch(Rectangle((x + 0.25, 0.7), 0.14, 1.0, facecolor=nb.ORANGE, alpha=shade, edgecolor=nb.ORANGE))
        ax.add_patch(Rectangle((x + 0.5, 1.56), 1.4, 0.14, facecolor=nb.GREEN, alpha=shade, edgecolor=nb.GREEN))
        ax.text(x + 0.32, 0.6, f"u{'₁₂₃'[i]}", fontsize=11.5, ha="center", va="top")
        ax.text(x + 1.2, 1.5, f"v{'₁₂₃'[i]}ᵀ", fontsize=11.5, ha="center", va="top")
        sign(ax, x + 2.2, 1.2, "+" if i < 2 else "+ …")
    ax.text(
        4.5,
        0.02,
        "largest first: stop after r terms, and you have the best matrix of rank r",
        ha="center",
        fontsize=11.5,
    )
    return fig


if __name__ == "__main__":
    nb.use_style()
    for name, draw in (("lrf", draw_factorization), ("svd", draw_svd)):
        fig = draw()
        fig.savefig(nb.ROOT / "images" / f"{name}.png", dpi=2 * fig.dpi)  # sharp on dense screens
