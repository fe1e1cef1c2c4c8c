"""Draw the pictures in images/: two concepts, and the networks on the front page."""

import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, Rectangle

from tools import readme

BLUE, ORANGE, GREEN, BROWN, GREY = "#0173b2", "#de8f05", "#029e73", "#ca9161", "#949494"
DARK = "#333333"

Spots = list[tuple[float, float]]


def canvas(width: float, height: float) -> tuple[plt.Figure, plt.Axes]:
    """Axes in units of which ``width`` make up the width of every figure of the series."""
    figure, axes = plt.subplots(figsize=(6.4, 6.4 * height / width), dpi=110, layout="constrained")
    axes.set(xlim=(0, width), ylim=(0, height), aspect="equal")
    axes.axis("off")
    return figure, axes


def block(
    axes: plt.Axes, x: float, y: float, shape: tuple, color: str, name: str, size: str
) -> None:
    """A matrix of (width, height), its middle at the height ``y``, with its name and size."""
    width, height = shape
    corner, look = (x, y - height / 2), {"facecolor": color, "edgecolor": color}
    axes.add_patch(Rectangle(corner, width, height, alpha=0.35, lw=2, **look))
    axes.text(x + width / 2, y, name, ha="center", va="center", fontsize=14)
    below = y - height / 2 - 0.12
    axes.text(x + width / 2, below, size, ha="center", va="top", fontsize=11.5, color="#333333")


def sign(axes: plt.Axes, x: float, y: float, text: str) -> None:
    axes.text(x, y, text, ha="center", va="center", fontsize=16)


def units(axes: plt.Axes, x: float, count: int, height: float, color: str, label: str) -> Spots:
    """A column of ``count`` network units around the height 1.5; returns where they are."""
    spots = [(x, 1.5 + height * (i / (count - 1) - 0.5)) for i in range(count)]
    axes.scatter(*zip(*spots), s=40, color=color, zorder=3)
    below = 1.3 - height / 2
    axes.text(x, below, label, ha="center", va="top", fontsize=11.5, color="#333333")
    return spots


def connect(axes: plt.Axes, left: Spots, right: Spots, color: str, name: str) -> None:
    """A line for each weight of the matrix ``name``, between two columns of units."""
    for a in left:
        for b in right:
            axes.plot(*zip(a, b), color=color, lw=0.8, alpha=0.7, zorder=1)
    x, y = (left[0][0] + right[0][0]) / 2, (left[-1][1] + right[-1][1]) / 2
    axes.text(x, y + 0.12, name, ha="center", va="bottom", fontsize=14)


def draw_factorization() -> plt.Figure:
    figure, axes = canvas(9, 5.2)
    block(axes, 0.4, 4.1, (2.6, 1.3), BLUE, "W", "m × n weights")
    sign(axes, 3.6, 4.1, "≈")
    block(axes, 4.3, 4.1, (0.4, 1.3), ORANGE, "A", "m × r")
    sign(axes, 5.2, 4.1, "·")
    block(axes, 5.7, 4.1, (2.6, 0.4), GREEN, "B", "r × n")
    outputs = units(axes, 2.6, 5, 1.3, DARK, "m outputs")
    inputs = units(axes, 0.7, 9, 2.1, DARK, "n inputs")
    connect(axes, inputs, outputs, BLUE, "W")
    look = {"arrowstyle": "-|>", "mutation_scale": 20, "color": "black"}
    axes.add_patch(FancyArrowPatch((3.2, 1.5), (4.1, 1.5), **look))
    inputs = units(axes, 4.7, 9, 2.1, DARK, "n inputs")
    middle = units(axes, 6.4, 2, 0.4, DARK, "r codes")
    outputs = units(axes, 8.1, 5, 1.3, DARK, "m outputs")
    connect(axes, inputs, middle, GREEN, "B")
    connect(axes, middle, outputs, ORANGE, "A")
    return figure


def draw_svd() -> plt.Figure:
    figure, axes = canvas(9, 4.6)
    block(axes, 0.3, 3.4, (2.2, 1.4), BLUE, "W", "m × n")
    sign(axes, 2.9, 3.4, "=")
    block(axes, 3.3, 3.4, (1.4, 1.4), ORANGE, "U", "m × m")
    block(axes, 4.9, 3.4, (1.4, 1.4), "#cccccc", "", "m values")
    for i, shade in enumerate((1.0, 0.75, 0.5, 0.3, 0.15)):
        corner = (4.9 + 0.28 * i, 3.82 - 0.28 * i)
        axes.add_patch(Rectangle(corner, 0.28, 0.28, facecolor="black", alpha=shade))
    block(axes, 6.5, 3.4, (2.2, 1.4), GREEN, "Vᵀ", "m × n")
    sign(axes, 0.5, 1.2, "=")
    for i, shade in enumerate((0.9, 0.55, 0.3)):
        x, number = 0.9 + 2.55 * i, "₁₂₃"[i]
        axes.text(x, 1.2, f"σ{number}", fontsize=14, ha="center", va="center")
        column, row = Rectangle((x + 0.25, 0.7), 0.14, 1.0), Rectangle((x + 0.5, 1.56), 1.4, 0.14)
        column.set(facecolor=ORANGE, edgecolor=ORANGE, alpha=shade)
        row.set(facecolor=GREEN, edgecolor=GREEN, alpha=shade)
        axes.add_patch(column)
        axes.add_patch(row)
        axes.text(x + 0.32, 0.6, f"u{number}", fontsize=11.5, ha="center", va="top")
        axes.text(x + 1.2, 1.5, f"v{number}ᵀ", fontsize=11.5, ha="center", va="top")
        sign(axes, x + 2.2, 1.2, "+" if i < 2 else "+ …")
    text = "largest first: stop after r terms, and you have the best matrix of rank r"
    axes.text(4.5, 0.02, text, ha="center", fontsize=11.5)
    return figure


def draw_layers(axes: plt.Axes, x: float, ranks: tuple) -> tuple[int, float]:
    """The layers of 784-256-128-10 to scale, from ``x`` on; what they store, and where they end.

    A layer with a rank is drawn as its factors, along the edges of the matrix that they replace.
    """
    stored = 0
    for n, m, rank in zip((784, 256, 128), (256, 128, 10), ranks):
        parts, label = [(0, n, m, "#80b9d9")], f"{m} × {n}"
        if rank:
            label = f"rank {rank}"
            edge = {"facecolor": "none", "edgecolor": GREY, "lw": 0.8, "ls": ":"}
            axes.add_patch(Rectangle((x, 0), n, -m, **edge))
            parts = [(-rank - 8, rank, m, ORANGE), (0, n, rank, GREEN)]
        for left, width, height, color in parts:
            axes.add_patch(Rectangle((x + left, 0), width, -height, facecolor=color, lw=0))
            stored += width * height
        stored += m  # the bias
        if m > 10:
            axes.text(x + n / 2, -m - 12, label, ha="center", va="top", fontsize=11.5)
        x += n + 100
    return stored, x - 100


def draw_accuracies(axes: plt.Axes) -> None:
    """A line for each network, from its accuracy before training to that after it."""
    rows = (
        (readme.DENSE, "black"),
        (readme.LOSS, GREEN),
        (readme.SVD, BLUE),
        (readme.RANDOM, BROWN),
        (readme.NARROW, GREY),
    )
    for y, (row, color) in enumerate(rows):
        after = readme.results(row.trained)["mean"]
        look = {"marker": "o", "ms": 9, "color": color, "ls": "none"}
        if row.untrained:
            before = readme.results(row.untrained)["mean"]
            axes.plot([before, after], [y, y], color=color, lw=2)
            axes.plot(before, y, markerfacecolor="white", markeredgewidth=2, **look)
        axes.plot(after, y, **look)
        axes.text(after + 0.07, y, f"{after:.2f} %", va="center_baseline", fontsize=11.5)
    grey = {"marker": "o", "ms": 9, "color": DARK, "ls": "none"}
    axes.plot([], [], markerfacecolor="white", markeredgewidth=2, label="before", **grey)
    axes.plot([], [], label="after 5 epochs of training", **grey)
    names = [row.name for row, _ in rows]
    axes.set(yticks=range(len(rows)), yticklabels=names, ylim=(4.6, -0.6), xlim=(96.6, 98.9))
    axes.set_xticks([97, 98], ["97 %", "98 %"])
    axes.set_xlabel("test images classified correctly", fontsize=11.5)
    axes.tick_params(length=0, labelsize=11.5)
    axes.grid(axis="x", color="#e8e8e8")
    axes.spines[:].set_visible(False)
    place = {"loc": "lower center", "bbox_to_anchor": (0.42, 0.98), "ncols": 2}
    axes.legend(fontsize=11.5, frameon=False, columnspacing=1.0, handletextpad=0.2, **place)


def draw_hero() -> plt.Figure:
    """The headline's networks: what is stored of them, and how well they do."""
    figure = plt.figure(figsize=(6.4, 4.4), dpi=110)
    above = figure.add_axes((0.01, 0.72, 0.98, 0.28))
    below = figure.add_axes((0.39, 0.13, 0.6, 0.46))
    dense, end = draw_layers(above, 0, (None, None, None))
    small, last = draw_layers(above, end + 330, (22, 11, None))
    arrow = {"arrowstyle": "-|>", "mutation_scale": 20, "color": "black"}
    above.add_patch(FancyArrowPatch((end + 70, -110), (end + 260, -110), **arrow))
    for x, stored, row in ((0, dense, readme.DENSE), (end + 300, small, readme.LOSS)):
        assert stored == readme.results(row.trained).parameters, f"{stored} drawn: {row.name}"
        kind = "full" if row is readme.DENSE else "low rank"
        above.text(x, 40, f"{kind}: {stored:,} parameters", fontsize=11.5, fontweight="bold")
    above.set(xlim=(-5, last + 5), ylim=(-360, 115), aspect="equal")
    above.axis("off")
    draw_accuracies(below)
    return figure


if __name__ == "__main__":
    # The description tells the tests which numbers the picture holds.
    for name, draw, description in (
        ("lrf", draw_factorization, ""),
        ("svd", draw_svd, ""),
        ("hero", draw_hero, readme.hero_text()),
    ):
        metadata = {"Description": description} if description else {}
        draw().savefig(readme.ROOT / "images" / f"{name}.png", dpi=220, metadata=metadata)
