"""Unit tests of lrf_utils: contracts, error texts, data loading. Random ones are in test_properties.py."""

import gzip
import hashlib
import io
import json
import os
import pickle
import subprocess
import sys
import tempfile
import threading
import time
from itertools import pairwise, product
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import seaborn as sns
import torch
from IPython.display import Markdown
from torch import nn
from torchvision.datasets import MNIST

import lrf_utils as lrf

plt.switch_backend("agg")
float64 = {"dtype": torch.float64}


def snapshot(model):
    """What a function that only reads must leave as it is: modules, modes, gradient flags, values, random state."""
    tensors = [*model.parameters(), *model.buffers()]
    objects = [(name, id(module), module.training) for name, module in model.named_modules()]
    objects += [(id(tensor), tensor.requires_grad, tensor.grad) for tensor in tensors]
    return objects, [tensor.detach().clone() for tensor in tensors], torch.get_rng_state()


def assert_unchanged(model, before):
    now = snapshot(model)
    assert now[0] == before[0]
    torch.testing.assert_close(now[1:], before[1:], rtol=0, atol=0, equal_nan=True)


def raises(kind, text, call, *args, **kwargs):
    """The call fails with exactly this text."""
    with pytest.raises(kind) as caught:
        call(*args, **kwargs)
    assert type(caught.value) is kind
    assert caught.value.args == (text,)
    return caught.value


class Probe(nn.Module):
    """Passes its input on, and notes what it was called with."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, x):
        self.calls.append((len(x), self.training, torch.is_grad_enabled()))
        return x


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mnist():
    return lrf.load_mnist()


def test_mnist_is_the_real_one(mnist):
    assert mnist._fields == ("x_train", "y_train", "x_test", "y_test")
    assert mnist.x_train.shape == (60_000, 784) and mnist.x_test.shape == (10_000, 784)
    assert mnist.x_train.dtype == mnist.x_test.dtype == torch.float32
    assert mnist.y_train.dtype == mnist.y_test.dtype == torch.int64
    assert mnist.y_train.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert mnist.y_test.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


def test_pixels_are_scaled_by_the_mean_and_standard_deviation_of_the_training_images(mnist):
    pixels = MNIST(lrf.ROOT / "data", train=False).data.reshape(-1, 784)
    torch.testing.assert_close(mnist.x_test, (pixels / 255 - 0.1307) / 0.3081)
    # 0.1307 and 0.3081 are right to their last digit, hence mean 0 and standard deviation 1 to half of that.
    assert abs(mnist.x_train.mean().item()) * 0.3081 < 0.5e-4
    assert abs(mnist.x_train.std().item() - 1) * 0.3081 < 0.5e-4


def idx_file(values):
    values = np.asarray(values, dtype=np.uint8)
    return bytes([0, 0, 8, values.ndim]) + np.array(values.shape, dtype=">i4").tobytes() + values.tobytes()


FAKES = {
    "train-images-idx3-ubyte": idx_file(np.arange(3 * 784).reshape(3, 28, 28) % 251),
    "train-labels-idx1-ubyte": idx_file([7, 0, 9]),
    "t10k-images-idx3-ubyte": idx_file(np.arange(2 * 784).reshape(2, 28, 28) % 241),
    "t10k-labels-idx1-ubyte": idx_file([4, 1]),
}
FAKE_SHA256 = {name: hashlib.sha256(data).hexdigest() for name, data in FAKES.items()}
NAME = "t10k-images-idx3-ubyte"  # the file that the tests damage


def write_archives(raw):
    raw.mkdir(parents=True, exist_ok=True)
    for name, data in FAKES.items():
        (raw / f"{name}.gz").write_bytes(gzip.compress(data))


def unpacked(raw):
    return {path.name: path.read_bytes() for path in raw.iterdir() if path.suffix != ".gz"}


@pytest.fixture
def raw(tmp_path, monkeypatch):
    """A data folder with four small archives, and no network."""
    monkeypatch.setattr(lrf, "SHA256", FAKE_SHA256)
    downloader(monkeypatch, OSError("no network"))
    raw = tmp_path / "data" / "MNIST" / "raw"
    write_archives(raw)
    return raw


def downloader(monkeypatch, failure=None):
    """Let torchvision's download write the four files, or fail."""

    def download(self):
        if failure:
            raise failure
        folder = Path(self.raw_folder)
        folder.mkdir(parents=True)
        for name, data in FAKES.items():
            (folder / name).write_bytes(data)

    monkeypatch.setattr(MNIST, "download", download)


def load(raw):
    data = lrf.load_mnist(raw.parent.parent)
    assert unpacked(raw) == FAKES, "the unpacked files, all right and nothing else"
    return data


def test_the_expected_hashes_are_those_of_the_original_files():
    hashes = {
        "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    }
    assert hashes == lrf.SHA256


def test_archives_are_unpacked_and_each_part_is_what_its_file_holds(raw):
    data = load(raw)
    assert data.y_train.tolist() == [7, 0, 9] and data.y_test.tolist() == [4, 1]
    torch.testing.assert_close(data.x_train, ((torch.arange(3 * 784.0) % 251 / 255 - 0.1307) / 0.3081).reshape(3, 784))
    torch.testing.assert_close(data.x_test, ((torch.arange(2 * 784.0) % 241 / 255 - 0.1307) / 0.3081).reshape(2, 784))
    assert sorted(path.name for path in raw.iterdir()) == sorted([*FAKES, *(f"{name}.gz" for name in FAKES)])


def test_files_are_unpacked_on_the_disk_where_they_belong(raw, monkeypatch):
    """Only there can a file be put in place all at once."""
    monkeypatch.setattr(tempfile, "tempdir", str(raw / "another disk"))
    lrf.load_mnist(raw.parent.parent)


def test_the_folder_may_be_given_as_text(raw):
    assert lrf.load_mnist(str(raw.parent.parent)).y_test.tolist() == [4, 1]


def test_unpacked_files_that_are_right_are_used_as_they_are(raw):
    load(raw)
    for archive in raw.glob("*.gz"):
        archive.unlink()
    written = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in raw.iterdir()}
    load(raw)
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in raw.iterdir()} == written


@pytest.mark.parametrize("content", [b"", FAKES[NAME][:1000], FAKES[NAME] + b"x", FAKES[NAME].replace(b"\1", b"\2")])
def test_an_unpacked_file_that_is_half_written_or_damaged_is_replaced(raw, content):
    (raw / NAME).write_bytes(content)
    load(raw)


FAULTS = {
    "missing": (None, "is missing"),
    "truncated": (
        gzip.compress(FAKES[NAME])[:-20],
        "cannot be unpacked (Compressed file ended before the end-of-stream marker was reached)",
    ),
    "corrupt": (
        gzip.compress(FAKES[NAME])[:10] + b"\xff" * 100,
        "cannot be unpacked (Error -3 while decompressing data: invalid block type)",
    ),
    "not gzip": (b"<html>404</html>", "cannot be unpacked (Not a gzipped file (b'<h'))"),
    "wrong content": (gzip.compress(FAKES[NAME] + b"x"), "does not have the expected SHA-256"),
}


@pytest.fixture(params=FAULTS)
def fault(raw, request):
    """One archive made bad; what is wrong with it."""
    content, problem = FAULTS[request.param]
    archive = raw / f"{NAME}.gz"
    archive.unlink()
    if content is not None:
        archive.write_bytes(content)
    return problem


@pytest.mark.parametrize("failure", [OSError("no network"), RuntimeError("Error downloading")])
def test_without_network_a_bad_archive_gives_an_error_that_says_how_to_mend_it(raw, fault, failure, monkeypatch):
    downloader(monkeypatch, failure)
    error = raises(
        OSError,
        f"{raw / NAME}.gz {fault}, and downloading it failed too ({failure}). To mend it, either restore the "
        "file from the repository (git checkout -- data/MNIST/raw) or run this again with a network.",
        lrf.load_mnist,
        raw.parent.parent,
    )
    assert error.__cause__ is failure
    assert NAME not in unpacked(raw) and set(unpacked(raw)) < set(FAKES)


def test_a_bad_archive_is_replaced_by_a_download(raw, fault, monkeypatch):
    downloader(monkeypatch)
    load(raw)


def test_a_folder_that_does_not_exist_is_filled_by_a_download(tmp_path, monkeypatch):
    monkeypatch.setattr(lrf, "SHA256", FAKE_SHA256)
    downloader(monkeypatch)
    load(tmp_path / "new" / "data" / "MNIST" / "raw")


def test_many_threads_can_unpack_at_once(raw):
    start, failures = threading.Barrier(8), []

    def unpack():
        start.wait()
        try:
            assert lrf.load_mnist(raw.parent.parent).y_test.tolist() == [4, 1]
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=unpack) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    load(raw)


STOPS_HALFWAY = """
import json, pathlib, sys, time
import lrf_utils

def write_half(path, data):
    with open(path, "wb") as file:
        file.write(data[: len(data) // 2])
    print("half", flush=True)
    time.sleep(600)

pathlib.Path.write_bytes = write_half
lrf_utils.SHA256 = json.loads(sys.argv[2])
lrf_utils.load_mnist(sys.argv[1])
"""


def test_a_process_killed_while_it_writes_leaves_no_half_written_file(raw):
    """Meanwhile a second process (this one) unpacks the same files."""
    path = os.pathsep.join([str(Path(lrf.__file__).parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", STOPS_HALFWAY, str(raw.parent.parent), json.dumps(FAKE_SHA256)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}) as child:
        try:
            assert child.stdout.readline() == "half\n"
            assert not any((raw / name).exists() for name in FAKES)
            assert lrf.load_mnist(raw.parent.parent).y_test.tolist() == [4, 1]
        finally:
            child.kill()
    assert {name: (raw / name).read_bytes() for name in FAKES} == FAKES
    assert lrf.load_mnist(raw.parent.parent).y_test.tolist() == [4, 1]


# ---------------------------------------------------------------------------------------------------------------------
# What the notebooks write, and checkpoints
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variable", [None, "", "elsewhere"])
def test_output_path_is_in_build_unless_lrf_out_says_otherwise(tmp_path, monkeypatch, variable):
    monkeypatch.setattr(lrf, "ROOT", tmp_path)
    monkeypatch.delenv("LRF_OUT", raising=False)
    if variable is not None:
        monkeypatch.setenv("LRF_OUT", variable and str(tmp_path / variable))
    for _ in range(2):  # the folder may be there already
        path = lrf.output_path("results/deep/sweep.csv")
        assert path == tmp_path / (variable or "build") / "results" / "deep" / "sweep.csv"
        assert path.parent.is_dir() and not path.exists()


def test_each_baseline_is_the_committed_one_and_classifies_well(mnist):
    assert lrf.SEEDS == (0, 1, 2, 3, 4)
    for seed in lrf.SEEDS:
        model = lrf.load_baseline(seed)
        stored = torch.load(lrf.ROOT / "checkpoints" / f"mlp_seed{seed}.pt", weights_only=True)
        torch.testing.assert_close(model.state_dict(), stored, rtol=0, atol=0)
        assert lrf.accuracy(model, mnist.x_test[:2000], mnist.y_test[:2000]) > 0.96
        if seed == 0:
            torch.testing.assert_close(lrf.load_baseline().state_dict(), stored, rtol=0, atol=0)


@pytest.mark.parametrize("seed", [5, -1, "0", None, 0.5, True, 1.0])
def test_a_seed_without_a_baseline_is_refused(seed):
    text = f"no baseline was trained with seed {seed!r}; choose one of (0, 1, 2, 3, 4)"
    raises(ValueError, text, lrf.load_baseline, seed)


def test_a_checkpoint_may_hold_weights_only(tmp_path, monkeypatch):
    """Unpickling anything else could run any code."""
    (tmp_path / "checkpoints").mkdir()
    torch.save({"fc1.weight": Path("x")}, tmp_path / "checkpoints" / "mlp_seed0.pt")
    monkeypatch.setattr(lrf, "ROOT", tmp_path)
    with pytest.raises(pickle.UnpicklingError):
        lrf.load_baseline()


# ---------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("widths", "names"),
    [((3, 1), "fc1"), ((4, 3, 2), "fc1 relu1 fc2"), (np.array([5, 4, 3, 2]), "fc1 relu1 fc2 relu2 fc3")],
)
def test_make_mlp_names_and_sizes(widths, names):
    model = lrf.make_mlp(widths)
    assert type(model) is nn.Sequential and [name for name, _ in model.named_children()] == names.split()
    assert all(type(m) is nn.ReLU and not m.inplace for name, m in model.named_children() if name.startswith("relu"))
    linears = [m for m in model if type(m) is nn.Linear]
    assert [(m.in_features, m.out_features) for m in linears] == list(pairwise(widths))
    assert all(m.bias is not None for m in linears)


def test_the_default_mlp():
    model = lrf.make_mlp()
    assert [tuple(p.shape) for p in model.parameters() if p.ndim == 2] == [(256, 784), (128, 256), (10, 128)]
    assert lrf.count_parameters(model) == 235_146
    assert lrf.count_macs(model, torch.zeros(1, 784)) == 784 * 256 + 256 * 128 + 128 * 10 == 234_752


@pytest.mark.parametrize("widths", [(), (784,), (3, 0), (-1, 3), (3, 2.0), (True, 3), (3, "4"), (3, None, 2)])
def test_make_mlp_refuses_widths_that_are_not_positive_integers(widths):
    raises(ValueError, f"widths must be two or more positive integers, got {widths!r}", lrf.make_mlp, widths)


def test_make_mlp_is_seeded_by_the_global_seed():
    torch.manual_seed(3)
    one = lrf.make_mlp((4, 3)).fc1.weight
    torch.manual_seed(3)
    assert torch.equal(one, lrf.make_mlp((4, 3)).fc1.weight)
    assert not torch.equal(one, lrf.make_mlp((4, 3)).fc1.weight)


def train_one_step(model, x, y):
    return lrf.train(model, x, y, epochs=1, seed=0)


def sweep_first(model, x, y):
    return lrf.rank_sweep(model, "0", x, y)


def macs_without_labels(model, x, y):
    return lrf.count_macs(model, x)


BAD_INPUTS = {
    "empty": (torch.zeros(0, 4), torch.zeros(0), "x is empty; give at least one input"),
    "longer x": (torch.zeros(3, 4), torch.zeros(2), "x has 3 rows and y has 2; they must be equal"),
    "longer y": (torch.zeros(1, 4), torch.zeros(2), "x has 1 rows and y has 2; they must be equal"),
}


@pytest.mark.parametrize(
    ("function", "case"),
    [
        *product([lrf.accuracy, train_one_step, sweep_first], [*BAD_INPUTS, "width", "dtype"]),
        *product([macs_without_labels], ["empty", "width", "dtype"]),
    ],
)
def test_bad_inputs_are_refused_and_change_nothing(function, case):
    model = nn.Sequential(nn.Linear(4, 2), nn.Dropout().eval())
    before = snapshot(model)
    if case in BAD_INPUTS:
        x, y, text = BAD_INPUTS[case]
        raises(ValueError, text, function, model, x, y)
    else:
        x, y = (torch.zeros(3, 5), torch.zeros(3)) if case == "width" else (torch.zeros(3, 4).double(), torch.zeros(3))
        with pytest.raises(ValueError) as caught:
            function(model, x, y)
        cause = caught.value.__cause__
        assert type(cause) is RuntimeError
        assert str(caught.value) == f"the model does not accept inputs of shape {tuple(x.shape)}: {cause}"
    assert_unchanged(model, before)


@pytest.mark.parametrize("function", [lrf.accuracy, train_one_step, sweep_first])
@pytest.mark.parametrize("shape", [(3, 1), (3, 3)])
def test_labels_that_are_not_one_per_row_are_refused(function, shape):
    text = f"y must hold one label per row of x, got shape {shape}"
    raises(ValueError, text, function, nn.Sequential(nn.Linear(4, 3)), torch.zeros(3, 4), torch.zeros(shape).long())


@pytest.mark.parametrize(
    ("labels", "fraction"), [([0, 1, 2, 0, 1], 1.0), ([0, 1, 2, 0, 2], 0.8), ([1, 2, 0, 1, 2], 0.0)]
)
@pytest.mark.parametrize("batch_size", [1, 2, 5, 9])
def test_accuracy_is_the_fraction_whose_largest_logit_is_at_the_label(labels, fraction, batch_size):
    logits = torch.tensor([[3.0, 1, 2], [-3, -1, -2], [0, 0, 0.1], [5, 4, 4], [0, 9, 8]])
    got = lrf.accuracy(nn.Identity(), logits, torch.tensor(labels), batch_size=batch_size)
    assert got == fraction and type(got) is float


def test_accuracy_evaluates_without_gradients_in_batches_of_1000_and_restores_every_mode():
    probe = Probe()
    model = nn.Sequential(probe, nn.Dropout(0.9).eval(), nn.BatchNorm1d(3), nn.Linear(3, 2)).train()
    model[1].eval()
    before = snapshot(model)
    lrf.accuracy(model, torch.ones(2500, 3), torch.zeros(2500))
    assert_unchanged(model, before)
    assert probe.calls == [(n, False, False) for n in (1, 1000, 1000, 500)]


@pytest.mark.parametrize("function", [lrf.accuracy, sweep_first])
def test_modes_and_gradients_are_restored_after_a_failure(function):
    class Fails(nn.Module):
        def forward(self, x):
            if len(x) > 1:
                raise ArithmeticError
            return x

    model = nn.Sequential(nn.Linear(3, 3), Fails(), nn.Dropout())
    model[2].eval()
    before = snapshot(model)
    with pytest.raises(ArithmeticError):
        function(model, torch.zeros(4, 3), torch.zeros(4))
    assert_unchanged(model, before)
    assert torch.is_grad_enabled()


def test_count_parameters_counts_a_shared_one_once():
    layer = nn.Linear(3, 3)
    assert lrf.count_parameters(layer) == 12
    assert lrf.count_parameters(nn.Sequential(layer, layer, nn.ReLU(), nn.Linear(3, 2, bias=False))) == 18


@pytest.mark.parametrize(
    ("module", "shape", "macs"),
    [
        (nn.Linear(5, 3), (1, 5), 15),
        (nn.Linear(5, 3, bias=False), (7, 5), 105),
        (nn.Sequential(nn.Linear(5, 2, bias=False), nn.ReLU(), nn.Linear(2, 3)), (2, 5), 32),
        (nn.Conv2d(1, 2, 3), (1, 1, 8, 8), 648),
        (nn.ReLU(), (4, 4), 0),
    ],
)
def test_count_macs_counts_one_pass_over_the_example(module, shape, macs, capsys):
    before = snapshot(module)
    got = lrf.count_macs(module, torch.zeros(shape))
    assert got == macs and type(got) is int
    assert_unchanged(module, before)
    assert capsys.readouterr().out == ""


def test_count_macs_runs_in_evaluation_mode():
    model = nn.Sequential(Probe(), nn.BatchNorm1d(4), nn.Linear(4, 2))
    assert lrf.count_macs(model, torch.ones(1, 4)) == 8
    assert model.training and model[0].calls == [(1, False, False)] * 2


@pytest.mark.parametrize(("given", "threads", "limit"), [({}, 1, 1.0), ({"threads": 2, "max_run_time": 0.5}, 2, 0.5)])
def test_measure_passes_on_threads_and_time_limit(monkeypatch, given, threads, limit):
    def autorange(timer, **options):
        assert options == {"max_run_time": limit}
        timer.timeit(1)
        return "measured"

    monkeypatch.setattr(lrf.Timer, "adaptive_autorange", autorange)
    seen = set()
    assert lrf.measure(lambda: seen.add((torch.get_num_threads(), torch.is_grad_enabled())), **given) == "measured"
    assert seen == {(threads, False)} and torch.is_grad_enabled() and torch.get_num_threads() == 1


def test_measure_gives_seconds():
    result = lrf.measure(lambda: time.sleep(0.002), max_run_time=0.05)
    assert 0.002 <= result.median < 2 and result.iqr >= 0


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def small_problem(rows):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3)).double()
    return model, torch.randn(rows, 4, **float64), torch.randint(0, 3, (rows,))


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
        (8, 2, {"lr": 0.05, "batch_size": 4}),
        (3, 1, {"lr": 0.05, "batch_size": 9}),  # a single step
        (3, 2, {"lr": 0.05, "batch_size": 1}),
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
    history = lrf.train(model.eval(), x, y, epochs=epochs, seed=5, **given)
    torch.testing.assert_close(history, expected, rtol=1e-12, atol=0)
    assert [list(entry) for entry in history] == [["epoch", "loss", "accuracy"]] * epochs
    torch.testing.assert_close(model.state_dict(), weights, rtol=1e-10, atol=1e-12)
    assert torch.equal(torch.get_rng_state(), state), "the global random state is left as it was"
    assert not any(module.training for module in model.modules())


def test_the_seed_of_training_matters_and_the_global_one_does_not():
    losses = []
    for global_seed, seed in [(1, 5), (2, 5), (1, 6)]:
        model, x, y = small_problem(20)
        torch.manual_seed(global_seed)
        losses.append(lrf.train(model, x, y, epochs=1, seed=seed, batch_size=8)[0]["loss"])
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize(("epochs", "batch_size"), [(0, 8), (1, 0), (-1, 8), (1, -1)])
def test_train_refuses_numbers_below_one_and_changes_nothing(epochs, batch_size):
    model, x, y = small_problem(4)
    before = snapshot(model)
    text = f"epochs and batch_size must be at least 1, got {epochs} and {batch_size}"
    raises(ValueError, text, lrf.train, model, x, y, epochs=epochs, seed=0, batch_size=batch_size)
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
    lrf.train(model, x, y, epochs=1, seed=0, batch_size=1)
    assert capsys.readouterr().out == ""
    screen = Screen(model)
    monkeypatch.setattr(sys, "stdout", screen)
    history = lrf.train(model, x, y, epochs=3, seed=0, batch_size=1, progress="seed 0")
    lines = [f"\rseed 0: epoch {e}/3, batch {b}/101" for e in (1, 2, 3) for b in (50, 100, 101)]
    batches = [50, 100, 101, 151, 201, 202, 252, 302, 303]
    assert screen.seen == [(batches[i], "".join(lines[: i + 1])) for i in range(9)]
    assert screen.getvalue() == "".join(lines) + f", training accuracy {100 * history[-1]['accuracy']:.2f} %\n"


# ---------------------------------------------------------------------------------------------------------------------
# Factors
# ---------------------------------------------------------------------------------------------------------------------


def matrix(m, n, **like):
    return torch.randn(m, n, generator=torch.Generator().manual_seed(10 * m + n), dtype=torch.float64).to(**like)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5), (1, 3), (3, 1)])
def test_factors_are_the_singular_vectors_with_the_singular_values_shared_evenly(shape):
    weight = matrix(*shape)
    U, S, Vh = np.linalg.svd(weight.numpy(), full_matrices=False)
    for rank in range(1, min(shape) + 1):
        A, B = lrf.truncated_svd(weight, rank)
        assert A.shape == (shape[0], rank) and B.shape == (rank, shape[1])
        torch.testing.assert_close(A.T @ A, torch.tensor(np.diag(S[:rank])))
        torch.testing.assert_close(B @ B.T, torch.tensor(np.diag(S[:rank])))
        torch.testing.assert_close(A @ B, torch.tensor((U[:, :rank] * S[:rank]) @ Vh[:rank]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_factors_have_the_dtype_of_the_weight_and_no_gradient(dtype):
    weight = nn.Parameter(matrix(5, 4, dtype=dtype))
    A, B = lrf.truncated_svd(weight, 4)
    assert A.dtype == B.dtype == dtype and not A.requires_grad and not B.requires_grad
    torch.testing.assert_close((A.double() @ B.double()).to(dtype), weight.detach(), rtol=0.02, atol=0.02)


def test_the_decomposition_of_a_float32_weight_runs_in_float64():
    """In float32 the smallest of these singular values would be off by several percent."""
    U, V = torch.linalg.qr(matrix(8, 8)).Q, torch.linalg.qr(matrix(8, 8) + 1).Q
    weight = (U * torch.logspace(0, -7, 8, **float64) @ V.T).float()
    S = np.linalg.svd(weight.double().numpy(), compute_uv=False)
    A, B = lrf.truncated_svd(weight, 8)
    torch.testing.assert_close(A.double().norm(dim=0).square(), torch.tensor(S), rtol=1e-5, atol=0)
    torch.testing.assert_close(B.double().norm(dim=1).square(), torch.tensor(S), rtol=1e-5, atol=0)


def svd_of(weight, rank):
    return lrf.truncated_svd(weight, rank)


def layer_of(weight):
    layer = nn.Linear(*reversed(weight.shape))
    layer.weight.data = weight
    return layer


def factorize_layer_of(weight, rank):
    return lrf.factorize_linear(layer_of(weight), rank)


def factorize_model_of(weight, rank):
    return lrf.factorize(nn.Sequential(nn.ReLU(), layer_of(weight)), {"1": rank})


def sweep_of(weight, rank):
    x = torch.zeros(2, weight.shape[1], dtype=weight.dtype)
    return lrf.rank_sweep(nn.Sequential(layer_of(weight)), "0", x, torch.zeros(2), ranks=[rank])


TAKE_A_RANK = pytest.mark.parametrize("function", [svd_of, factorize_layer_of, factorize_model_of, sweep_of])


@TAKE_A_RANK
@pytest.mark.parametrize(("shape", "full"), [((3, 4), 3), ((4, 3), 3)])
def test_ranks_out_of_range_are_refused(function, shape, full):
    for rank in (0, -1, full + 1, np.int64(0)):
        text = f"rank must be from 1 to {full} for a {shape[0]}×{shape[1]} weight, got {rank}"
        raises(ValueError, text, function, matrix(*shape).float(), rank)


@TAKE_A_RANK
@pytest.mark.parametrize("rank", [2.0, True, np.float64(2), np.bool_(True), torch.tensor(2), "2", None])
def test_ranks_that_are_not_integers_are_refused(function, rank):
    text = f"rank must be an int, got {rank!r} ({type(rank).__name__})"
    raises(TypeError, text, function, matrix(3, 4).float(), rank)


@TAKE_A_RANK
@pytest.mark.parametrize("rank", [3, np.int64(3), np.uint8(3)])
def test_the_full_rank_is_allowed_also_as_a_numpy_integer(function, rank):
    function(matrix(3, 4).float(), rank)


@TAKE_A_RANK
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(function, value):
    weight = matrix(3, 4).float()
    weight[1, 2] = value
    raises(ValueError, "the 3×4 weight holds NaN or infinity", function, weight, 2)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4)])
def test_only_a_matrix_has_an_svd(shape):
    raises(ValueError, f"weight must be a matrix, got shape {shape}", lrf.truncated_svd, torch.zeros(shape), 1)


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64])
def test_only_a_matrix_of_real_floating_point_numbers_has_an_svd(dtype):
    """Integer factors would be rounded to nonsense."""
    text = f"weight must hold real floating-point numbers, got {dtype}"
    raises(TypeError, text, lrf.truncated_svd, torch.eye(3, dtype=dtype), 1)


@pytest.mark.parametrize(
    ("m", "n", "rank"),
    [
        (1, 1, 0),  # 2 against 1
        (2, 2, 0),  # a tie at rank 1: 4 against 4
        (2, 3, 1),  # 5 against 6
        (3, 6, 1),  # a tie at rank 2: 18 against 18
        (6, 3, 1),
        (4, 4, 1),  # a tie at rank 2: 16 against 16
        (5, 4, 2),  # 18 against 20
        (256, 128, 85),
        pytest.param(np.int8(100), np.int8(100), 49),
        pytest.param(np.int32(50_000), np.int32(50_000), 24_999),
    ],
)
def test_break_even_rank(m, n, rank):
    got = lrf.break_even_rank(m, n)
    assert got == rank and type(got) is int


@pytest.mark.parametrize("bad", [2.0, True, "3", None])
def test_break_even_rank_refuses_sizes_that_are_not_integers(bad):
    text = f"a layer size must be an int, got {bad!r} ({type(bad).__name__})"
    raises(TypeError, text, lrf.break_even_rank, bad, 3)
    raises(TypeError, text, lrf.break_even_rank, 3, bad)


@pytest.mark.parametrize("bad", [0, -1])
def test_break_even_rank_refuses_sizes_below_one(bad):
    raises(ValueError, f"a layer size must be at least 1, got {bad}", lrf.break_even_rank, bad, 3)
    raises(ValueError, f"a layer size must be at least 1, got {bad}", lrf.break_even_rank, 3, bad)


# ---------------------------------------------------------------------------------------------------------------------
# Factorized layers and models
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_factorized_layer_is_two_linear_layers_with_the_factors_and_the_bias(bias, dtype):
    layer = nn.Linear(6, 4, bias=bias, dtype=dtype)
    before = snapshot(layer)
    for rank in (1, 4):
        pair = lrf.factorize_linear(layer, rank)
        A, B = lrf.truncated_svd(layer.weight, rank)
        assert type(pair) is nn.Sequential and [type(m) for m in pair] == [nn.Linear, nn.Linear]
        assert [(m.in_features, m.out_features) for m in pair] == [(6, rank), (rank, 4)]
        assert torch.equal(pair[0].weight, B) and torch.equal(pair[1].weight, A) and pair[0].bias is None
        assert torch.equal(pair[1].bias, layer.bias) if bias else pair[1].bias is None
        assert {p.dtype for p in pair.parameters()} == {dtype}
        assert not {p.data_ptr() for p in pair.parameters()} & {p.data_ptr() for p in layer.parameters()}
    x = matrix(9, 6, dtype=dtype)
    torch.testing.assert_close(pair(x), layer(x), rtol=0, atol=32 * torch.finfo(dtype).eps)
    assert_unchanged(layer, before)


def test_factorizing_uses_no_random_numbers():
    layer = nn.Linear(3, 3)
    before = snapshot(layer)
    lrf.factorize_linear(layer, 2)
    lrf.factorize(nn.Sequential(layer), {"0": 2})
    lrf.rank_sweep(nn.Sequential(layer), "0", torch.zeros(2, 3), torch.zeros(2))
    assert_unchanged(layer, before)


def test_a_factorized_layer_stays_on_the_device_of_the_layer():
    layer = nn.Linear(4, 3)
    with torch.device("meta"):  # where new tensors go unless told otherwise
        pair = lrf.factorize_linear(layer, 2)
    assert {p.device.type for p in pair.parameters()} == {"cpu"}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("weight_grad", "bias_grad"),
    [
        (True, True),
        (False, False),
        pytest.param(True, False),
        pytest.param(False, True),
    ],
)
def test_a_factorized_layer_keeps_mode_and_requires_grad(training, weight_grad, bias_grad):
    layer = nn.Linear(4, 3).train(training)
    layer.weight.requires_grad_(weight_grad)
    layer.bias.requires_grad_(bias_grad)
    pair = lrf.factorize_linear(layer, 2)
    assert [m.training for m in pair.modules()] == [training] * 3
    assert [p.requires_grad for p in pair.parameters()] == [weight_grad, weight_grad, bias_grad]
    assert all(p.is_leaf for p in pair.parameters())


class Subclass(nn.Linear):
    pass


@pytest.mark.parametrize("layer", [nn.ReLU(), Subclass(3, 3), nn.Conv2d(1, 1, 1), torch.eye(3), None])
def test_only_a_linear_layer_can_be_factorized(layer):
    text = f"only an nn.Linear can be factorized, got {type(layer).__name__}"
    raises(TypeError, text, lrf.factorize_linear, layer, 1)


class Residual(nn.Module):
    """A skip connection, a nested block, a layer used twice."""

    def __init__(self, width=6, classes=4):
        super().__init__()
        self.stem = nn.Linear(width, width)
        self.block = nn.Sequential(nn.Linear(width, width), nn.ReLU())
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, classes, bias=False)

    def forward(self, x):
        x = self.norm(torch.relu(self.stem(x)))
        return self.head(x + self.block(self.stem(x)))


def seeded(make, *args):
    """A model made of reproducible random numbers, in float64 so that no decision hangs on rounding."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return make(*args).double()


def test_factorize_replaces_the_named_layers_and_nothing_else():
    model = seeded(Residual)
    model.norm.eval()
    before = snapshot(model)
    copy = lrf.factorize(model, {"block.0": 2, "head": 4, "stem": np.int64(6)})
    for name, rank in [("block.0", 2), ("head", 4), ("stem", 6)]:
        expected = lrf.factorize_linear(model.get_submodule(name), rank).state_dict()
        torch.testing.assert_close(copy.get_submodule(name).state_dict(), expected, rtol=0, atol=0)
    assert type(copy) is Residual and type(copy.block[1]) is nn.ReLU
    torch.testing.assert_close(copy.norm.state_dict(), model.norm.state_dict(), rtol=0, atol=0)
    assert copy.training and not copy.norm.training
    assert_unchanged(model, before)


def test_a_factorized_copy_shares_nothing_with_the_model():
    model = seeded(Residual)
    copy = lrf.factorize(model, {"head": 4})
    assert not set(model.modules()) & set(copy.modules())
    before = snapshot(model)
    with torch.no_grad():
        for tensor in (*copy.parameters(), *copy.buffers()):
            tensor.zero_()
    copy.eval()
    assert_unchanged(model, before)


@pytest.mark.parametrize("names", [(), ("stem",), ("stem", "block.0", "head")])
def test_at_full_rank_a_factorized_model_computes_what_the_model_computes(names):
    model = seeded(Residual)
    x = matrix(9, 6)
    copy = lrf.factorize(model, {name: min(model.get_submodule(name).weight.shape) for name in names})
    torch.testing.assert_close(copy(x), model(x))


def test_the_model_itself_can_be_the_layer():
    layer = nn.Linear(4, 3)
    pair = lrf.factorize(layer, {"": 2})
    torch.testing.assert_close(pair.state_dict(), lrf.factorize_linear(layer, 2).state_dict(), rtol=0, atol=0)


def test_a_layer_used_in_two_places_is_replaced_in_both():
    layer = nn.Linear(3, 3)
    copy = lrf.factorize(nn.Sequential(layer, nn.Sequential(nn.ReLU(), layer)), {"0": 1})
    assert type(copy[0]) is nn.Sequential and copy[0] is copy[1][1]


def factorize_at_2(model, name):
    return lrf.factorize(model, {"stem": 2, name: 2})


def sweep_at_2(model, name):
    return lrf.rank_sweep(model, name, torch.zeros(3, 6).double(), torch.zeros(3), ranks=[2])


@pytest.mark.parametrize("function", [factorize_at_2, sweep_at_2])
@pytest.mark.parametrize(
    ("name", "kind", "text"),
    [
        ("fc9", KeyError, "the model has no module 'fc9'; its linear layers are ['block.0', 'head', 'stem']"),
        ("block.9", KeyError, "the model has no module 'block.9'; its linear layers are ['block.0', 'head', 'stem']"),
        ("norm", TypeError, "'norm' is a BatchNorm1d, not an nn.Linear; the linear layers are [{}]"),
        ("block", TypeError, "'block' is a Sequential, not an nn.Linear; the linear layers are [{}]"),
        ("", TypeError, "'' is a Residual, not an nn.Linear; the linear layers are [{}]"),
        ("odd", TypeError, "'odd' is a Subclass, not an nn.Linear; the linear layers are [{}]"),
    ],
)
def test_names_that_are_not_linear_layers_are_refused_and_nothing_changes(function, name, kind, text):
    model = seeded(Residual)
    if name == "odd":
        model.odd = Subclass(3, 3)
    before = snapshot(model)
    raises(kind, text.format("'block.0', 'head', 'stem'"), function, model, name)
    assert_unchanged(model, before)


# ---------------------------------------------------------------------------------------------------------------------
# Rank sweep
# ---------------------------------------------------------------------------------------------------------------------


def rank_by_rank(model, name, x, y, ranks=None):
    full = min(model.get_submodule(name).weight.shape)
    return {r: lrf.accuracy(lrf.factorize(model, {name: r}), x, y) for r in ranks or range(1, full + 1)}


def worn(norm):
    """A BatchNorm with statistics unlike those of any batch."""
    norm.running_mean.uniform_(-0.5, 0.5)
    norm.running_var.uniform_(0.5, 2)
    return norm


def sequential(*parts):
    return lambda: nn.Sequential(*(part() for part in parts))


def linear(n, m, **options):
    return lambda: nn.Linear(n, m, **options)


def nested_twice():
    layer = nn.Linear(6, 6)
    return nn.Sequential(layer, nn.Sequential(nn.ReLU(), layer), nn.Linear(6, 4))


def repeated():
    layer = nn.Linear(6, 6)
    return nn.Sequential(layer, nn.ReLU(), layer, nn.ReLU(), nn.Linear(6, 4))


class CalledByKeyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 4)

    def forward(self, x):
        return self.fc(input=x)


class Doubled(nn.Sequential):
    """A subclass of nn.Sequential that computes something else."""

    def forward(self, x):
        return super().forward(x) + super().forward(-2 * x).flip(1)


def stretched():
    layer = nn.Linear(6, 6)
    with torch.no_grad():
        layer.weight.mul_(30)
    return layer


relu, tanh, in_place = nn.ReLU, nn.Tanh, lambda: nn.ReLU(inplace=True)
norm, dropout = lambda: worn(nn.BatchNorm1d(6)), lambda: nn.Dropout(0.5)
SWEPT = {
    "first layer": (sequential(linear(6, 5), relu, linear(5, 7), relu, linear(7, 4)), "0"),
    "middle layer": (sequential(linear(6, 7), relu, linear(7, 6), relu, linear(6, 4)), "2"),
    "last layer": (sequential(linear(6, 5), relu, linear(5, 4)), "2"),
    "only layer": (sequential(linear(6, 4)), "0"),
    "a layer between that stretches": (sequential(linear(6, 6), relu, stretched, linear(6, 4)), "0"),
    "no activation": (sequential(linear(6, 6), linear(6, 4)), "0"),
    "two relus": (sequential(linear(6, 6), relu, relu, linear(6, 4)), "0"),
    "no bias": (sequential(linear(6, 6, bias=False), relu, linear(6, 4)), "0"),
    "no bias at all": (sequential(linear(6, 6, bias=False), relu, linear(6, 4, bias=False)), "0"),
    "no bias, last": (sequential(linear(6, 6), tanh, linear(6, 4, bias=False)), "2"),
    "tanh": (sequential(linear(6, 6), tanh, linear(6, 4)), "0"),
    "in place": (sequential(linear(6, 6), in_place, linear(6, 4)), "0"),
    "in place and relu": (sequential(linear(6, 6), relu, in_place, linear(6, 4)), "0"),
    "in place, last": (sequential(linear(6, 4), in_place), "0"),
    "relu after the classifier": (sequential(linear(6, 6), relu, linear(6, 4), relu), "0"),
    "batch norm": (sequential(linear(6, 6), norm, relu, linear(6, 4)), "0"),
    "batch norm in front": (sequential(norm, linear(6, 6), relu, linear(6, 4)), "1"),
    "dropout": (sequential(dropout, linear(6, 6), relu, dropout, linear(6, 4)), "1"),
    "relu in front": (sequential(relu, linear(6, 6), relu, linear(6, 4)), "1"),
    "leaky": (sequential(linear(6, 6), lambda: nn.LeakyReLU(-3.0), linear(6, 4)), "0"),
    "factorized before": (sequential(sequential(linear(6, 2), linear(2, 6)), relu, linear(6, 4)), "2"),
    "nested": (sequential(sequential(linear(6, 6), relu), linear(6, 4)), "0.0"),
    "used twice": (repeated, "0"),
    "used twice, nested": pytest.param(nested_twice, "0"),
    "subclass": (lambda: Doubled(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4)), "0"),
    "residual stem": (Residual, "stem"),
    "residual block": (Residual, "block.0"),
    "residual head": (Residual, "head"),
    "root": (lambda: nn.Linear(6, 4), ""),
    "called by keyword": pytest.param(CalledByKeyword, "fc"),
}


@pytest.mark.parametrize(("make", "name"), SWEPT.values(), ids=SWEPT)
def test_rank_sweep_is_factorizing_and_evaluating_rank_by_rank(make, name):
    model = seeded(make)
    x, y = 2 * matrix(300, 6), torch.arange(300) % 4
    before = snapshot(model)
    expected = rank_by_rank(model, name, x, y)
    assert len(set(expected.values())) > 1, "a test in which the ranks differ"
    for options in ({}, {"batch_size": 128}, {"batch_size": 1}):
        swept = lrf.rank_sweep(model, name, x.clone(), y, **options)
        assert list(swept.items()) == list(expected.items())
    assert {type(rank) for rank in swept} == {int} and {type(value) for value in swept.values()} == {float}
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    "ranks", [[4], [1], [2, 5], [5, 2, 2], {6}, range(2, 7, 2), pytest.param(np.array([4, 2])), []]
)
@pytest.mark.parametrize("make", [SWEPT["middle layer"][0], SWEPT["tanh"][0], lambda: Doubled(SWEPT["tanh"][0]())])
def test_rank_sweep_of_some_ranks_gives_those_in_rising_order(make, ranks):
    model = seeded(make)
    name = next(name for name, m in model.named_modules() if type(m) is nn.Linear and min(m.weight.shape) == 6)
    x, y = 2 * matrix(100, 6), torch.arange(100) % 4
    swept = lrf.rank_sweep(model, name, x, y, ranks=iter(ranks))
    whole = lrf.rank_sweep(model, name, x, y)
    assert list(swept.items()) == [(rank, whole[rank]) for rank in sorted({int(r) for r in ranks})]
    assert all(type(rank) is int for rank in swept)


@pytest.mark.parametrize("bad", [[1, True], [1, 1.0], ["a", 1]])
def test_rank_sweep_checks_every_rank_also_those_that_equal_another(bad):
    culprit = next(rank for rank in bad if type(rank) is not int)
    text = f"rank must be an int, got {culprit!r} ({type(culprit).__name__})"
    model = nn.Sequential(nn.Linear(3, 3))
    raises(TypeError, text, lrf.rank_sweep, model, "0", torch.zeros(2, 3), torch.zeros(2), bad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rank_sweep_of_a_low_precision_model(dtype):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = lrf.make_mlp((20, 40, 32, 5)).to(dtype)
        x, y = torch.randn(300, 20).to(dtype), torch.randint(0, 5, (300,))
    assert lrf.rank_sweep(model, "fc2", x, y) == rank_by_rank(model, "fc2", x, y)


def test_rank_sweep_of_a_layer_with_more_than_one_vector_per_input():
    model = seeded(sequential(linear(5, 4), relu, nn.Flatten, linear(12, 4)))
    for rows in (40, 3, 4):
        x, y = matrix(rows * 3, 5).reshape(rows, 3, 5), torch.arange(rows) % 4
        assert lrf.rank_sweep(model, "0", x, y) == rank_by_rank(model, "0", x, y)


@pytest.mark.parametrize("name", ["fc1", "fc2", "fc3"])
def test_rank_sweep_of_the_baseline(mnist, name):
    model, x, y = lrf.load_baseline(), mnist.x_test[:300], mnist.y_test[:300]
    ranks = {"fc1": [1, 30, 256], "fc2": [*range(1, 15), 127, 128], "fc3": None}[name]
    swept, expected = lrf.rank_sweep(model, name, x, y, ranks), rank_by_rank(model, name, x, y, ranks)
    assert list(swept) == list(expected)
    # Same counts here; on another CPU rounding may decide an image that lies on a boundary.
    assert all(abs(swept[rank] - expected[rank]) < 1.5 / 300 for rank in swept)


def rotation(size, seed):
    return torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(seed), **float64)).Q


@pytest.mark.parametrize("rank", range(1, 6))
@pytest.mark.parametrize("relus", [0, 1])
@pytest.mark.parametrize("bias", [1.0, 1e4])
def test_an_image_settles_no_earlier_than_its_last_rank_on_the_wrong_side(rank, relus, bias):
    """The boundary is square to what is missing at ``rank``, and 1 % nearer than that is long: the tightest case."""
    layer, classifier = nn.Linear(6, 6, **float64), nn.Linear(6, 3, **float64)
    U, V, S = rotation(6, 1), rotation(6, 2), torch.tensor([3.0, 2.5, 2, 1.5, 1, 0.5], **float64)
    codes = torch.tensor([1.0, -2, 1.5, -1, 3, -2], **float64)
    missing = U[:, rank:] @ (S * codes)[rank:]
    with torch.no_grad():
        layer.weight.copy_(U * S @ V.T)
        layer.bias.fill_(max(bias, 20.0) if relus else bias)
        classifier.weight.copy_(torch.stack([missing, -missing, 0 * missing]))
        dense = layer(V @ codes)
        classifier.bias.zero_()
        classifier.bias[2] = missing @ dense - 300  # never the largest, yet not so far off that rounding would count
        classifier.bias[1] = 2 * missing @ dense - 0.99 * 2 * missing @ missing
    model = nn.Sequential(layer, *(nn.ReLU() for _ in range(relus)), classifier)
    x, y = (V @ codes).repeat(3, 1), torch.zeros(3)
    x[0] *= 1.0001
    swept = lrf.rank_sweep(model, "0", x, y)
    assert swept == rank_by_rank(model, "0", x, y)
    assert swept[rank] < 1 and swept[6] == 1


@pytest.mark.parametrize("classes", [5, pytest.param(30)])
@pytest.mark.parametrize(("dtype", "gap"), [(torch.float32, 1e-4), (torch.float64, 1e-8)])
def test_classes_whose_weights_nearly_coincide_can_still_be_told_apart(classes, dtype, gap):
    """What is missing at rank 1 is so long that even the small gap between two rows of the classifier decides."""
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, classes)).to(dtype)
    with torch.no_grad():
        model[0].weight.copy_(torch.diag(torch.tensor([2.0, 1.0])))
        model[0].bias.copy_(torch.tensor([0.0, 1 / gap]))
        model[2].weight.copy_(torch.tensor([[1.0, 0.0]]).expand(classes, 2))
        model[2].weight[1, 1] = gap
        model[2].bias.fill_(-1.0)
        model[2].bias[:2] = torch.tensor([0.01, 0.0])
    x, y = torch.tensor([[0.25, -1 / gap]], dtype=dtype), torch.tensor([0])
    assert lrf.rank_sweep(model, "0", x, y) == rank_by_rank(model, "0", x, y) == {1: 0.0, 2: 1.0}


def test_classes_that_coincide_are_never_settled_and_the_first_wins():
    model = seeded(sequential(linear(6, 6), relu, linear(6, 4)))
    with torch.no_grad():
        model[2].weight[1:] = model[2].weight[:1]
        model[2].bias[1:] = model[2].bias[:1]
    x, y = matrix(50, 6), torch.zeros(50)
    assert lrf.rank_sweep(model, "0", x, y) == dict.fromkeys(range(1, 7), 1.0)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("size", [0.0, 1.0])
def test_an_image_within_rounding_of_the_boundary_stays_open(scale, size):
    """The allowance is 1e-4 of the image's features times the longest row, and of the batch's largest logit."""
    classifier = nn.Linear(2, 2, **float64)
    with torch.no_grad():
        classifier.weight.copy_(torch.tensor([[3.0, 0.0], [0.0, 3.0]]))
        classifier.bias.zero_()
    allowance = 1e-4 * (2**0.5 + 1)
    gaps = torch.tensor([0.98, 1.02, 0.98, 1.02], **float64) * allowance
    features = scale * torch.stack([torch.ones(4), 1 - gaps], dim=1)
    features[:2] *= size  # a small image beside large ones: its own features count, and the batch's largest logit
    gap = 1e-4 * scale
    if size == 0:
        features[0, 0], features[1, 0] = 0.99 * gap, 1.01 * gap
    steps = lrf._ranks_until_settled(nn.Sequential(classifier), features, torch.zeros(4, 3, **float64))
    assert (steps > 0).tolist() == [True, False, True, False]


@pytest.mark.parametrize("scale", [1.0, 1e200])
def test_logits_that_overflow_are_not_settled(scale):
    """The length of what is missing overflows too: such images stay open."""
    model = seeded(sequential(linear(6, 6), relu, linear(6, 4)))
    x, y = scale * matrix(50, 6), torch.arange(50) % 4
    with torch.no_grad():
        model[2].weight.mul_(scale)
    assert lrf.rank_sweep(model, "0", x, y) == rank_by_rank(model, "0", x, y)


def test_rank_sweep_takes_one_svd_and_one_pass_through_the_layer(monkeypatch):
    calls, svd = [], torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda *args, **kwargs: calls.append(1) or svd(*args, **kwargs))
    model = seeded(sequential(Probe, linear(6, 6), relu, linear(6, 4)))
    lrf.rank_sweep(model, "1", matrix(10_002, 6), torch.zeros(10_002))
    assert len(calls) == 1
    whole = [call for call in model[0].calls if call[0] > 1]  # single rows only try whether the inputs fit
    assert whole == [(10_000, False, False), (2, False, False)]


def test_settled_images_are_not_evaluated_again():
    """Far from every boundary, an image passes once, densely: here 90 of 100 settle at once, 10 never do."""
    model = seeded(sequential(linear(6, 6), relu, linear(6, 4)))
    with torch.no_grad():
        model[2].bias.copy_(torch.tensor([0.0, 0, -1000, -1000]))
        model[2].weight[:2] = torch.tensor([[50.0] + [0] * 5, [0.0] * 6])
        model[0].bias.copy_(torch.tensor([2.0, 0, 0, 0, 0, 0]))
        model[2].bias[1] = 50
    x, y = 0.1 * matrix(100, 6), torch.arange(100) % 2
    x[::10] *= 60
    rows = []
    model[2].register_forward_hook(lambda module, args, output: rows.append(len(output)))
    swept = lrf.rank_sweep(model, "0", x, y)
    assert rows[:3] == [1, 100, 100] and max(rows[3:]) <= 10 and rows[-1] == 0
    assert rows[3:] == sorted(rows[3:], reverse=True)
    assert swept == rank_by_rank(model, "0", x, y)


# ---------------------------------------------------------------------------------------------------------------------
# Activations, the loss metric, and budgets
# ---------------------------------------------------------------------------------------------------------------------


def metric_by_hand(model, layer, x, temperature):
    """E[g gᵀ] over images and classes, one image, class and use of the layer at a time."""
    outputs = []

    def keep(module, args, output):
        outputs.append(output)
        return output.clone()  # what follows may write into it

    handle = layer.register_forward_hook(keep)
    total = torch.zeros(layer.out_features, layer.out_features, **float64)
    for image in x:
        outputs.clear()
        log_p = (model(image[None]) / temperature).log_softmax(1)[0]
        for value in log_p:
            for output in outputs:
                (g,) = torch.autograd.grad(value, output, retain_graph=True)
                g = g.reshape(-1, layer.out_features)
                total += value.exp().item() * g.T @ g / len(x)
    handle.remove()
    return total


class Tokens(nn.Module):
    """Images of five tokens; the layer sees them all, the classifier their mean."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 3)
        self.head = nn.Linear(3, 4)

    def forward(self, x):
        return self.head(torch.tanh(self.fc(x)).mean(1))


def inplace():
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Linear(5, 4))


class Scribble(nn.Module):
    """Overwrites what its layer was given."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 4)

    def forward(self, x):
        hidden = x + 1
        logits = self.fc(hidden)
        hidden.zero_()
        return logits


def inputs_of(model, layer, x):
    """All rows that the layer is fed with."""
    rows = []
    hook = lambda module, args, kwargs: rows.append((args[0] if args else kwargs["input"]).clone())  # noqa: E731
    handle = layer.register_forward_pre_hook(hook, with_kwargs=True)
    with torch.no_grad():
        model(x)
    handle.remove()
    return torch.cat([row.reshape(-1, layer.in_features) for row in rows])


STATISTICS_OF = {
    "in place": (inplace, "0", (40, 6)),
    "behind a ReLU": (inplace, "2", (40, 6)),
    "overwritten": (Scribble, "fc", (40, 6)),
    "used twice": (Residual, "stem", (40, 6)),
    "head without a bias": (Residual, "head", (40, 6)),
    "tokens": (Tokens, "fc", (40, 5, 6)),
    "by keyword": (CalledByKeyword, "fc", (40, 6)),
    "the model itself": (lambda: nn.Linear(6, 4), "", (40, 6)),
}


@pytest.mark.parametrize(("make", "name", "shape"), STATISTICS_OF.values(), ids=STATISTICS_OF)
@pytest.mark.parametrize("frozen", [False, True])
def test_statistics_are_mean_covariance_and_metric(make, name, shape, frozen):
    model = seeded(make).eval()
    x = matrix(40, 30)[:, : np.prod(shape[1:])].reshape(shape) + 1
    layer = model.get_submodule(name)
    rows = inputs_of(model, layer, x)
    metric = metric_by_hand(model, layer, x, 2.0)
    model.requires_grad_(not frozen)
    found = lrf.layer_statistics(model, [name], x, temperature=2.0)[name]
    close = {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(found.mean, rows.mean(0), **close)
    torch.testing.assert_close(found.covariance, torch.cov(rows.T, correction=0), **close)
    torch.testing.assert_close(found.metric, metric, **close)
    without = lrf.layer_statistics(model, [name], x)[name]
    torch.testing.assert_close(without[:2], found[:2], rtol=0, atol=0)
    assert without.metric is None


def test_statistics_do_not_depend_on_the_batches_and_serve_all_layers_at_once():
    model, x = seeded(Residual), matrix(2300, 6)
    names = ["stem", "block.0", "head"]
    whole = lrf.layer_statistics(model, iter(names), x, temperature=1)
    assert list(whole) == names
    parts = lrf.layer_statistics(model, names, (part for part in x.split(7)), temperature=1)
    torch.testing.assert_close(parts, whole, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(lrf.layer_statistics(model, ["head"], x, temperature=1)["head"], whole["head"])


def test_statistics_are_float64_whatever_the_model_is():
    model = seeded(Tokens).float()
    x = matrix(40, 30).reshape(40, 5, 6).float() + 100
    found = lrf.layer_statistics(model, ["fc"], x, temperature=1)["fc"]
    assert {part.dtype for part in found} == {torch.float64}
    rows = x.double().reshape(-1, 6)
    torch.testing.assert_close(found.covariance, torch.cov(rows.T, correction=0), rtol=1e-9, atol=1e-9)


def test_the_metric_of_a_float16_model_is_summed_in_float64():
    layer, x = nn.Linear(6, 4).half(), matrix(200, 6).half()
    logits = layer(x).detach().requires_grad_()
    log_p, metric = logits.log_softmax(1), torch.zeros(4, 4, **float64)
    for c in range(4):
        (g,) = torch.autograd.grad(-log_p[:, c].sum(), logits, retain_graph=True)
        g = (g * log_p[:, c, None].detach().exp().sqrt()).double()
        metric += g.T @ g / 200
    found = lrf.layer_statistics(layer, [""], x, temperature=1)[""].metric
    torch.testing.assert_close(found, metric, rtol=1e-9, atol=1e-12)


def test_statistics_take_one_pass_in_batches_of_1000_and_leave_the_model_as_it_was():
    model = nn.Sequential(Probe(), seeded(inplace))
    before = snapshot(model)
    lrf.layer_statistics(model, ["1.0"], matrix(2300, 6))
    assert model[0].calls == [(n, False, False) for n in (1, 1000, 1, 1000, 1, 300)]
    lrf.layer_statistics(model, ["1.0"], matrix(3, 6), temperature=1)
    assert model[0].calls[-1] == (3, False, True)
    assert_unchanged(model, before)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("temperature", [None, 1.0])
def test_no_layers_have_no_statistics(temperature):
    assert lrf.layer_statistics(seeded(inplace), [], matrix(3, 6), temperature=temperature) == {}


def statistics_of(model=None, names=("0",), inputs=None, **options):
    return lrf.layer_statistics(model or seeded(inplace), names, matrix(3, 6) if inputs is None else inputs, **options)


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x):
        return self.used(x)


@pytest.mark.parametrize(
    ("kind", "text", "given"),
    [
        (ValueError, "temperature must be positive, got 0", {"temperature": 0}),
        (ValueError, "temperature must be positive, got nan", {"temperature": float("nan")}),
        (ValueError, "x is empty; give at least one input", {"inputs": torch.zeros(0, 6, **float64)}),
        (ValueError, "inputs is empty; give at least one batch", {"inputs": []}),
        (KeyError, "the model has no module '7'; its linear layers are ['0', '2']", {"names": ["0", "7"]}),
        (TypeError, "'1' is a ReLU, not an nn.Linear; the linear layers are ['0', '2']", {"names": ["1"]}),
        (
            ValueError,
            "the inputs or the gradients of the layer '0' are not all finite",
            {"inputs": matrix(3, 6) / torch.tensor([1, 0, 1, 1, 1, 1])},
        ),
    ],
)
def test_statistics_refuse_what_they_cannot_use(kind, text, given):
    raises(kind, text, statistics_of, **given)


def test_statistics_of_a_layer_that_is_not_used_are_refused():
    model = seeded(Unused)
    text = "the model does not use its layer 'unused'"
    raises(ValueError, text, statistics_of, model, ["used", "unused"])
    raises(ValueError, text, statistics_of, model, ["unused"], temperature=1)


class Ignored(Unused):
    def forward(self, x):
        self.unused(x)
        return self.used(x)


def test_a_layer_whose_output_does_not_count_has_a_metric_of_zero():
    found = statistics_of(seeded(Ignored), ["used", "unused"], temperature=1)
    assert found["used"].metric.norm() > 0 and found["unused"].metric.norm() == 0
    assert found["unused"].covariance.norm() > 0


def test_gradients_that_are_not_finite_are_refused():
    model = seeded(inplace)
    with torch.no_grad():
        model[2].bias[0] = float("nan")
    assert statistics_of(model)["0"].covariance.isfinite().all()
    text = "the inputs or the gradients of the layer '0' are not all finite"
    raises(ValueError, text, statistics_of, model, temperature=1)


def test_the_metric_needs_one_row_of_logits_per_image():
    model, x = nn.Sequential(nn.Linear(6, 4)).double(), torch.zeros(2, 5, 6, **float64)
    text = "the loss metric needs logits of shape (N, classes), got (2, 5, 4)"
    raises(ValueError, text, statistics_of, model, inputs=x, temperature=1)
    assert statistics_of(model, inputs=x)["0"].metric is None


def test_a_layer_with_inputs_that_do_not_fit_is_refused():
    error = raises_value_error(lrf.factorize_linear, layer_of(matrix(3, 4)), 2, inputs=matrix(9, 5))
    assert error.startswith("the model does not accept inputs of shape (9, 5): ")


def raises_value_error(call, *args, **kwargs):
    with pytest.raises(ValueError) as caught:
        call(*args, **kwargs)
    return str(caught.value)


def random_statistics(m, n, with_metric=True):
    mean, root, metric = matrix(1, n)[0] + 1, matrix(n, n) + torch.eye(n), matrix(m, m) + torch.eye(m)
    return lrf.Statistics(mean, root @ root.T, metric @ metric.T if with_metric else None)


@pytest.mark.parametrize("shape", [(5, 7), (7, 5), (6, 6)])
@pytest.mark.parametrize("with_metric", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_the_error_on_the_inputs_is_the_least_for_the_rank(shape, with_metric, bias):
    m, n = shape
    layer = nn.Linear(n, m, bias=bias, **float64)
    layer.weight.data = matrix(m, n)
    statistics = random_statistics(m, n, with_metric)
    C = statistics.covariance if bias else statistics.covariance + torch.outer(statistics.mean, statistics.mean)
    G = torch.eye(m, **float64)
    if with_metric:
        G = statistics.metric + 0.3 * statistics.metric.diagonal().mean() * torch.eye(m)

    def error(weight):
        missing = layer.weight.detach() - weight
        return (G @ missing @ C @ missing.T).trace().item()

    # All of it is an ordinary SVD of G^½ W C^½, by way of Cholesky factors.
    L, R = torch.linalg.cholesky(G), torch.linalg.cholesky(C)
    spectrum = torch.linalg.svdvals(L.T @ layer.weight.detach() @ R)
    for rank in range(1, min(m, n) + 1):
        pair = lrf.factorize_linear(layer, rank, inputs=statistics, damping=0.3)
        weight = (pair[1].weight @ pair[0].weight).detach()
        assert pair[0].weight.shape == (rank, n) and pair[1].weight.shape == (m, rank)
        assert error(weight) == pytest.approx(spectrum[rank:].square().sum().item(), rel=1e-9, abs=1e-9)
        torch.testing.assert_close(pair[1].weight.norm(dim=0), pair[0].weight.norm(dim=1))
        if bias:  # on average, nothing is lost
            expected = layer.weight @ statistics.mean + layer.bias
            torch.testing.assert_close(weight @ statistics.mean + pair[1].bias, expected)
        else:
            assert pair[1].bias is None


def test_the_damping_is_a_tenth_unless_given():
    layer, statistics = nn.Linear(7, 5, **float64), random_statistics(5, 7)
    default, given, other = (
        lrf.factorize_linear(layer, 2, inputs=statistics, **options)[1].weight
        for options in ({}, {"damping": 0.1}, {"damping": 10.0})
    )
    assert torch.equal(default, given) and not torch.allclose(default, other)


def test_inputs_are_the_same_as_their_statistics():
    layer, x = nn.Linear(7, 5, **float64), matrix(50, 7)
    from_inputs = lrf.factorize_linear(layer, 2, inputs=x).state_dict()
    for same in (lrf.layer_statistics(layer, [""], x)[""], x.split(9), iter(x.split(9))):
        torch.testing.assert_close(lrf.factorize_linear(layer, 2, inputs=same).state_dict(), from_inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_layer_factorized_for_its_inputs_keeps_dtype_mode_and_flags(dtype):
    layer = nn.Linear(7, 5, dtype=dtype).eval().requires_grad_(False)
    before = snapshot(layer)
    pair = lrf.factorize_linear(layer, 5, inputs=matrix(50, 7).to(dtype))
    assert_unchanged(layer, before)
    assert {(p.dtype, p.requires_grad) for p in pair.parameters()} == {(dtype, False)} and not pair.training
    x = matrix(9, 7).to(dtype)
    torch.testing.assert_close(pair(x), layer(x), rtol=0.01, atol=0.01)


def test_statistics_of_another_layer_are_refused():
    text = "these statistics are not those of a layer with a 5×7 weight"
    for m, n in ((5, 6), (6, 7)):
        raises(ValueError, text, lrf.factorize_linear, nn.Linear(7, 5), 2, inputs=random_statistics(m, n))


@pytest.mark.parametrize("damping", [0, -1.0, float("nan")])
def test_the_damping_must_be_positive(damping):
    statistics = lrf.Statistics(torch.zeros(7), torch.eye(7).double(), torch.eye(5).double())
    text = f"the damping and the metric must be positive, got {damping} and a mean of 1.0"
    raises(ValueError, text, lrf.factorize_linear, nn.Linear(7, 5), 2, inputs=statistics, damping=damping)


def test_a_metric_of_zero_is_refused():
    statistics = lrf.Statistics(torch.zeros(7), torch.eye(7).double(), torch.zeros(5, 5).double())
    text = "the damping and the metric must be positive, got 0.1 and a mean of 0.0"
    raises(ValueError, text, lrf.factorize_linear, nn.Linear(7, 5), 2, inputs=statistics)


@pytest.mark.parametrize("options", [{}, {"temperature": 2}, {"temperature": 2, "damping": 1.0}])
def test_factorize_for_inputs_takes_the_statistics_of_the_model(options):
    model, x = seeded(Residual), matrix(40, 6)
    before, ranks = snapshot(model), {"block.0": 2, "head": 3}
    copy = lrf.factorize(model, ranks, inputs=x.split(7), **options)
    assert_unchanged(model, before)
    statistics = lrf.layer_statistics(model, ranks, x, temperature=options.get("temperature"))
    for name, rank in ranks.items():
        damping = options.get("damping", 0.1)
        layer = model.get_submodule(name)
        expected = lrf.factorize_linear(layer, rank, inputs=statistics[name], damping=damping).state_dict()
        torch.testing.assert_close(copy.get_submodule(name).state_dict(), expected)


def test_factorize_checks_ranks_before_it_reads_the_inputs():
    text = "rank must be from 1 to 5 for a 5×6 weight, got 6"
    raises(ValueError, text, lrf.factorize, seeded(inplace), {"2": 1, "0": 6}, inputs=iter([None]))


def options_of(model, inputs, **options):
    """For each linear layer: {rank, or None for dense: (weights, predicted error)}."""
    table = {}
    for name, layer in model.named_modules():
        if type(layer) is not nn.Linear:
            continue
        W, (m, n) = layer.weight.detach(), layer.weight.shape
        terms = torch.linalg.svdvals(W).square()
        terms = terms / terms.sum()
        if inputs is not None:
            statistics = lrf.layer_statistics(model, [name], inputs, temperature=options.get("temperature"))[name]
            G = torch.eye(m, **float64)
            if statistics.metric is not None:
                damping = options.get("damping", 0.1) * statistics.metric.diagonal().mean()
                G = statistics.metric + damping * torch.eye(m)
            terms = torch.linalg.eigvals(G @ W @ statistics.covariance @ W.T).real.sort(descending=True)[0]
        table[name] = {r: (r * (m + n), terms[r:].sum().item()) for r in range(1, min(m, n)) if r * (m + n) < m * n}
        table[name][None] = (m * n, 0.0)
    return table


@pytest.mark.parametrize(
    "options", [{}, {"inputs": matrix(60, 8)}, {"inputs": matrix(60, 8), "temperature": 2, "damping": 1.0}]
)
def test_allocated_ranks_are_the_best_of_all(options):
    model = seeded(lambda: nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 3)))
    table = options_of(model, options.get("inputs"), **{k: v for k, v in options.items() if k != "inputs"})
    plans = []
    for choice in product(*(layer.items() for layer in table.values())):
        weights, error = (sum(values) for values in zip(*(value for _, value in choice)))
        plans.append((weights, error, {n: rank for n, (rank, _) in zip(table, choice) if rank is not None}))
    smallest, dense = min(plans)[0], 8 * 12 + 12 * 9 + 9 * 3
    for budget in range(smallest, dense + 3):
        found = lrf.allocate_ranks(model, budget, **options)
        best = min(error for weights, error, _ in plans if weights <= budget)
        weights, error = next((w, e) for w, e, plan in plans if plan == found)
        assert weights <= budget and error == pytest.approx(best, rel=1e-9, abs=1e-12)
        assert list(found) == [name for name in table if name in found]
        assert lrf.count_parameters(lrf.factorize(model, found)) == weights + 12 + 9 + 3
    assert found == {}, "everything fits, so everything stays dense"
    text = f"a budget of {smallest - 1} weights is too small, even with rank 1 in every linear layer"
    raises(ValueError, text, lrf.allocate_ranks, model, smallest - 1, **options)


def test_allocation_leaves_the_model_as_it_was():
    model = seeded(Residual)
    before = snapshot(model)
    lrf.allocate_ranks(model, 90, inputs=matrix(40, 6), temperature=1)
    assert_unchanged(model, before)


def test_the_default_damping_of_an_allocation_is_a_tenth():
    model, x = lrf.load_baseline(0), lrf.load_mnist().x_train[:500]
    plans = [
        lrf.allocate_ranks(model, 25_000, inputs=x, temperature=1, **options)
        for options in ({}, {"damping": 0.1}, {"damping": 1.1})
    ]
    assert plans[0] == plans[1] != plans[2]


def test_a_model_without_weights_to_save_needs_no_ranks():
    assert lrf.allocate_ranks(nn.ReLU(), 0) == {}
    zero = nn.Sequential(nn.Linear(9, 9))
    nn.init.zeros_(zero[0].weight)
    assert lrf.allocate_ranks(zero, 80) == {"0": 1}


def test_a_pair_as_large_as_the_layer_is_no_option():
    model = nn.Sequential(layer_of(torch.diag(torch.tensor([1.0, 1.0, 0.0, 0.0]))))
    assert lrf.break_even_rank(4, 4) == 1 and lrf.allocate_ranks(model, 16) == {}


@pytest.mark.parametrize("budget", [1e5, True, "9", None])
def test_a_budget_is_an_integer(budget):
    text = f"budget must be an int, got {budget!r} ({type(budget).__name__})"
    raises(TypeError, text, lrf.allocate_ranks, nn.Linear(3, 3), budget)


def test_a_budget_may_be_a_numpy_integer():
    assert lrf.allocate_ranks(nn.Linear(9, 9), np.int64(81)) == {}


def test_weights_that_are_not_finite_get_no_ranks():
    model = nn.Sequential(layer_of(torch.full((3, 4), float("nan"))))
    raises(ValueError, "the 3×4 weight holds NaN or infinity", lrf.allocate_ranks, model, 9)


# ---------------------------------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def displayed(monkeypatch, tmp_path):
    """What is displayed, as (arguments, options)."""
    calls = []
    monkeypatch.setattr(lrf, "display", lambda *args, **kwargs: calls.append((args, kwargs)))
    monkeypatch.setenv("LRF_OUT", str(tmp_path / "out"))
    with plt.rc_context(), pd.option_context("display.max_colwidth", 50, "display.width", 80):
        plt.rcdefaults()
        plt.switch_backend("agg")
        yield calls
    plt.close("all")


def test_use_style(displayed):
    lrf.use_style()
    expected = {
        "figure.facecolor": "white",
        "axes.facecolor": "white",
        "figure.dpi": 110,
        "axes.titlesize": "medium",
        "figure.constrained_layout.use": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "font.size": 12,
    }
    assert pd.get_option("display.max_colwidth") is None and pd.get_option("display.width") == 120
    assert {key: plt.rcParams[key] for key in expected} == expected
    assert sns.color_palette() == sns.color_palette("colorblind")


@pytest.mark.parametrize("save", [None, "images/curve.png"])
def test_show_displays_a_picture_with_its_alt_text_and_its_numbers_and_closes_it(displayed, tmp_path, save):
    plt.rcParams["savefig.format"] = "pdf"
    figure, axes = plt.subplots()
    other = plt.figure()
    axes.plot([1, 2], [0.5, 0.25])
    lrf.show(figure, "two points", *([save] if save else []))
    [((data,), options)] = displayed
    assert set(data) == {"image/png", "text/plain"}
    assert data["image/png"].startswith(b"\x89PNG\r\n") and b"tRNS" not in data["image/png"]  # opaque
    assert data["text/plain"] == "axes '': '', ''\nline '_child0': x 1 2; y 0.5000 0.2500"
    assert options == {"raw": True, "metadata": {"image/png": {"alt": "two points"}}}
    assert not plt.fignum_exists(figure.number) and plt.fignum_exists(other.number)
    written = {str(path.relative_to(tmp_path)): path.read_bytes() for path in tmp_path.rglob("*.*")}
    assert written == ({str(Path("out", save)): data["image/png"]} if save else {})


def test_drawn_numbers_lists_everything_that_is_drawn(displayed):
    figure, (left, right) = plt.subplots(1, 2)
    left.set(title="Lines", xlabel="rank", ylabel="error")
    left.plot([1, 2, 3, 4], [0.123456, 2e-7, 1234.6, 12345.6], label="err")
    left.plot([10, 20], [-3, 1_000_000])
    left.plot([-0.0, 1], [0.5, -0.0], label="zeros")
    left.plot([1, 2], [1, float("nan")], label="gap")
    left.plot([], [], label="none")
    left.text(0.5, 0.5, "knee")
    left.annotate("here", (1, 1))
    right.bar([0, 1], [3, 4.5], label="bars")
    right.barh([5], [2], height=2)
    right.scatter([1, 2.5], [3, 4], label="dots")
    right.scatter([7], [8], label="one")
    right.scatter(np.ma.masked_equal([1, 2], 2), [3, 4], label="masked")
    right.scatter([0, 0], [0, 0], label="at the origin")
    right.vlines([1, 2], 3, [4, 5], label="two lines")
    right.imshow(np.ma.masked_equal([[1.0, 2.0], [4.0, 9.0]], 9.0))
    assert lrf.drawn_numbers(figure).splitlines() == [
        "axes 'Lines': 'rank', 'error'",
        "line 'err': x 1 2 3 4; y 0.1235 2.000e-07 1235.0 1.235e+04",
        "line '_child1': x 10 20; y -3 1000000",
        "line 'zeros': x 0 1; y 0.5000 0.000",
        "line 'gap': x 1 2; y 1.000 nan",
        "line 'none': x ; y ",
        "text 'knee'",
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


def test_drawn_numbers_start_with_the_title_of_the_figure(displayed):
    figure = plt.figure()
    figure.suptitle("All layers")
    assert lrf.drawn_numbers(figure) == "figure 'All layers'"


def test_drawn_numbers_of_named_categories_are_their_positions(displayed):
    figure, axes = plt.subplots()
    axes.plot(["dense", "factorized"], [1, 2])
    assert lrf.drawn_numbers(figure).splitlines()[1] == "line '_child0': x 0 1; y 1 2"


@pytest.mark.parametrize(
    "draw",
    [
        lambda axes, top: axes.fill_between([1, 2], [0, 0], [1, top]),
        lambda axes, top: axes.errorbar([1, 2], [1, 2], yerr=[0.1, top]),
        lambda axes, top: axes.vlines([1, 2], 0, [1, top]),
    ],
    ids=["band", "error bars", "vlines"],
)
def test_drawn_numbers_notice_another_band_or_error_bar(displayed, draw):
    texts = []
    for top in (0.5, 0.25):
        figure, axes = plt.subplots()
        draw(axes, top)
        texts.append(lrf.drawn_numbers(figure))
    assert texts[0] != texts[1]


def test_say_displays_markdown(displayed):
    lrf.say("**97.28 %** at rank 10")
    [((shown,), options)] = displayed
    assert type(shown) is Markdown and shown.data == "**97.28 %** at rank 10" and options == {}


# ---------------------------------------------------------------------------------------------------------------------
# Exercises
# ---------------------------------------------------------------------------------------------------------------------


def is_two(value):
    return value == 2


@pytest.mark.parametrize(
    ("answer", "is_right", "verdict"),
    [
        (2, is_two, "Right."),
        (3, is_two, "Not yet. Count again."),
        (..., is_two, "Not tried yet."),
        (None, is_two, "Not tried yet."),
        (0, is_two, "Not yet. Count again."),
        ((1, 2), lambda pair: pair == (1, 2), "Right."),
        ((1, 3), lambda pair: pair == (1, 2), "Not yet. Count again."),
        ((1, ...), lambda pair: pair == (1, 2), "Not tried yet."),
        ((None, 2), lambda pair: pair == (1, 2), "Not tried yet."),
        (lambda: 2, is_two, "Right."),
        (lambda: 3, is_two, "Not yet. Count again."),
        (lambda: ..., is_two, "Not tried yet."),
        (lambda: (1, None), is_two, "Not tried yet."),
        (lambda: 1 / 0, is_two, "Not yet. Count again. (ZeroDivisionError: division by zero)"),
        (
            "2",
            lambda value: value < 2,
            "Not yet. Count again. (TypeError: '<' not supported between instances of 'str' and 'int')",
        ),
        (torch.tensor(2), is_two, "Right."),
        (torch.tensor([2, 3]), lambda values: (values > 1).all(), "Right."),
        (nn.ReLU(), lambda module: isinstance(module, nn.ReLU), "Right."),  # callable, but no function
    ],
)
def test_check_prints_its_verdict_and_never_fails(capsys, answer, is_right, verdict):
    assert lrf.check(answer, is_right, "Count again.") is None
    assert capsys.readouterr().out == verdict + "\n"


def test_check_does_not_ask_about_an_answer_that_was_not_tried(capsys):
    asked = []
    lrf.check((..., 2), asked.append, "Count again.")
    assert not asked


def test_check_lets_itself_be_interrupted():
    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lrf.check(interrupt, is_two, "Count again.")
