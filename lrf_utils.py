"""Helpers for the low-rank factorization notebooks.

Conventions, used everywhere: the weight ``W`` of an ``nn.Linear`` has shape (m, n) = (out_features, in_features).
A rank-r factorization is ``W ≈ A @ B`` with ``A`` (m, r) and ``B`` (r, n); as layers, ``Linear(n, r, bias=False)``
followed by ``Linear(r, m)``. Accuracies are fractions in [0, 1]. 1 MAC is one multiply-accumulate (2 FLOPs).
"""

from __future__ import annotations

import contextlib
import copy
import gzip
import hashlib
import io
import logging
import os
import tempfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from numbers import Integral
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from IPython.display import Markdown, display
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from torchvision.datasets import MNIST

# torch.utils.benchmark loads PyTorch's extension builder, which complains about CUDA compilers without a GPU.
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
from torch.utils.benchmark import Measurement, Timer  # noqa: E402

# Our matrices are small: several threads mostly wait for one another, and on a busy machine they wait for long.
torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parent
SEEDS = (0, 1, 2, 3, 4)

# ---------------------------------------------------------------------------------------------------------------------
# Data, checkpoints and what the notebooks write
# ---------------------------------------------------------------------------------------------------------------------

SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
PIXEL_MEAN, PIXEL_STD = 0.1307, 0.3081  # of the 60,000 training images, pixels scaled to [0, 1]


class Mnist(NamedTuple):
    """MNIST in memory: images float32 (N, 784), normalised; labels int64 (N,)."""

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor


def load_mnist(root: str | Path = ROOT / "data") -> Mnist:
    """Read MNIST from ``root/MNIST/raw``, unpacking and verifying the four gzip archives on first use.

    Pixels are scaled to [0, 1], then shifted and scaled by the mean and standard deviation of the training images.
    An archive that is missing or damaged is replaced by torchvision's own download.

    Raises:
        OSError: a file is missing or damaged and cannot be downloaded either; the message says how to mend it.
    """
    raw = Path(root) / "MNIST" / "raw"
    for name in SHA256:
        _unpack(raw, name)
    tensors = []
    for train in (True, False):
        split = MNIST(root, train=train)
        images = split.data.reshape(-1, 784).float().div_(255).sub_(PIXEL_MEAN).div_(PIXEL_STD)
        tensors += [images, split.targets]
    return Mnist(*tensors)


def _unpack(raw: Path, name: str) -> None:
    """Make sure that ``raw/name`` is there and right. It appears whole or not at all, whoever else is at work."""

    def damage(data: bytes) -> str | None:
        return None if hashlib.sha256(data).hexdigest() == SHA256[name] else "does not have the expected SHA-256"

    target, archive = raw / name, raw / f"{name}.gz"
    if target.is_file() and damage(target.read_bytes()) is None:
        return
    try:
        data = gzip.decompress(archive.read_bytes())
        problem = damage(data)
    except FileNotFoundError:
        problem = "is missing"
    except (OSError, EOFError, ValueError, zlib.error) as error:
        problem = f"cannot be unpacked ({error})"
    raw.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=raw) as scratch:  # same disk as the target, so that os.replace is atomic
        if problem:
            try:
                MNIST(scratch, download=True)
                data = (Path(scratch) / "MNIST" / "raw" / name).read_bytes()
            except (OSError, RuntimeError) as error:
                raise OSError(
                    f"{archive} {problem}, and downloading it failed too ({error}). To mend it, either restore the "
                    "file from the repository (git checkout -- data/MNIST/raw) or run this again with a network."
                ) from error
        whole = Path(scratch) / name
        whole.write_bytes(data)
        os.replace(whole, target)


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


# ---------------------------------------------------------------------------------------------------------------------
# Models: build, train, evaluate, count
# ---------------------------------------------------------------------------------------------------------------------


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


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module's own mode is restored afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _check_inputs(model: nn.Module, x: Tensor, y: Tensor | None = None) -> None:
    """A ValueError for inputs that are empty, do not match their labels, or do not fit the model."""
    if len(x) == 0:
        raise ValueError("x is empty; give at least one input")
    if y is not None and len(x) != len(y):
        raise ValueError(f"x has {len(x)} rows and y has {len(y)}; they must be equal")
    if y is not None and y.ndim != 1:
        raise ValueError(f"y must hold one label per row of x, got shape {tuple(y.shape)}")
    try:
        with _evaluating(model):
            model(x[:1])
    except RuntimeError as error:
        raise ValueError(f"the model does not accept inputs of shape {tuple(x.shape)}: {error}") from error


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
    _check_inputs(model, x, y)
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


def accuracy(model: nn.Module, x: Tensor, y: Tensor, batch_size: int = 1000) -> float:
    """The fraction of inputs ``x`` (N, …) whose largest logit is at the label ``y`` (N,); in [0, 1]."""
    _check_inputs(model, x, y)
    with _evaluating(model):
        batches = zip(x.split(batch_size), y.split(batch_size))
        return sum((model(xb).argmax(1) == yb).sum().item() for xb, yb in batches) / len(x)


def count_parameters(module: nn.Module) -> int:
    """The number of weights and biases; a shared one counts once."""
    return sum(p.numel() for p in module.parameters())


def count_macs(module: nn.Module, example_input: Tensor) -> int:
    """Multiply-accumulates of one forward pass over ``example_input``, counted by PyTorch while it runs."""
    _check_inputs(module, example_input)
    with _evaluating(module), FlopCounterMode(display=False) as counter:
        module(example_input)
    return counter.get_total_flops() // 2


def measure(call: Callable[[], object], threads: int = 1, max_run_time: float = 1.0) -> Measurement:
    """Time ``call`` after a warm-up, without gradients, until the median is steady or ``max_run_time`` seconds are up.

    The result has ``.median`` and ``.iqr`` (the spread of the middle half), in seconds.
    """
    with torch.no_grad():
        timer = Timer("call()", globals={"call": call}, num_threads=threads)
        return timer.adaptive_autorange(max_run_time=max_run_time)


# ---------------------------------------------------------------------------------------------------------------------
# Low-rank factorization
# ---------------------------------------------------------------------------------------------------------------------


def _check_rank(rank: int, shape: Sequence[int], what: str = "rank") -> None:
    if isinstance(rank, bool) or not isinstance(rank, Integral):
        raise TypeError(f"{what} must be an int, got {rank!r} ({type(rank).__name__})")
    if not 1 <= rank <= min(shape):
        raise ValueError(f"{what} must be from 1 to {min(shape)} for a {shape[0]}×{shape[1]} weight, got {rank}")


def _check_finite(weight: Tensor) -> None:
    if not weight.isfinite().all():
        raise ValueError(f"the {weight.shape[0]}×{weight.shape[1]} weight holds NaN or infinity")


def truncated_svd(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best rank-``rank`` approximation of ``weight`` (m, n) as ``A`` (m, rank) and ``B`` (rank, n).

    The singular values are shared evenly, ``A = U √S`` and ``B = √S Vᵀ``, so that both factors have the same norm.
    The factors of a smaller rank r are ``A[:, :r]`` and ``B[:r]``: one call serves all ranks. Computed in float64,
    returned in the dtype and on the device of ``weight``.

    Source: Eckart & Young (1936), doi:10.1007/BF02288367.
    """
    if weight.ndim != 2:
        raise ValueError(f"weight must be a matrix, got shape {tuple(weight.shape)}")
    _check_rank(rank, weight.shape)
    if not weight.is_floating_point():
        raise TypeError(f"weight must hold real floating-point numbers, got {weight.dtype}")
    _check_finite(weight)
    U, S, Vh = torch.linalg.svd(weight.detach().cpu().double(), full_matrices=False)
    root = S[:rank].sqrt()
    A, B = U[:, :rank] * root, root[:, None] * Vh[:rank]
    return A.to(weight), B.to(weight)


def break_even_rank(out_features: int, in_features: int) -> int:
    """The largest rank r with r(m + n) < mn, at which two factors hold fewer weights than the matrix; may be 0."""
    for size in (out_features, in_features):
        if isinstance(size, bool) or not isinstance(size, Integral):
            raise TypeError(f"a layer size must be an int, got {size!r} ({type(size).__name__})")
        if size < 1:
            raise ValueError(f"a layer size must be at least 1, got {size}")
    m, n = int(out_features), int(in_features)  # NumPy's integers would overflow
    return (m * n - 1) // (m + n)


class Statistics(NamedTuple):
    """What calibration data say about one linear layer; float64."""

    mean: Tensor  # (n,): of its inputs
    covariance: Tensor  # (n, n): of its inputs, centred
    metric: Tensor | None = None  # (m, m): E[g gᵀ], g the gradient of the loss at its output


def layer_statistics(
    model: nn.Module, names: Iterable[str], inputs: Tensor | Iterable[Tensor], *, temperature: float | None = None
) -> dict[str, Statistics]:
    """Statistics of the named linear layers over calibration inputs of ``model``, in one pass.

    Args:
        inputs: a tensor (N, …) or, where the data do not fit in memory, an iterable of such batches.
        temperature: with one, also the loss metric: the covariance of the gradient of the cross-entropy, at every class
            in turn, weighted by its probability under softmax(logits / temperature). This needs no labels.

    Raises:
        KeyError, TypeError: as ``factorize``.
        ValueError: ``inputs`` are empty, do not fit the model or lead to NaN; a layer is not used; ``temperature`` is
            not positive, or the model's output is not (N, classes).

    Source: Martens & Grosse (2015), arXiv:1503.05671; the metric is their output factor, summed instead of sampled.
    """
    layers = {name: _named_linear(model, name) for name in names}
    if temperature is not None and not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature!r}")
    shapes = {name: layer.weight.shape for name, layer in layers.items()}
    sums = {name: [torch.zeros(*size).double() for size in ((n,), (n, n), (m, m))] for name, (m, n) in shapes.items()}
    rows, images = dict.fromkeys(layers, 0), 0
    seen: list[tuple[str, Tensor, Tensor]] = []

    def look(name: str, module: nn.Module, args: tuple, kwargs: dict[str, Tensor], output: Tensor) -> Tensor:
        x = args[0] if args else kwargs["input"]
        # Copies, since the next module may write into what it is given, as nn.ReLU(inplace=True) does.
        seen.append((name, x.detach().reshape(-1, x.shape[-1]).to("cpu", torch.float64, copy=True), output))
        return output.requires_grad_(temperature is not None).clone()

    with contextlib.ExitStack() as hooks, _evaluating(model), torch.set_grad_enabled(temperature is not None):
        for name, layer in layers.items():
            hooks.enter_context(layer.register_forward_hook(partial(look, name), with_kwargs=True))
        for batch in inputs.split(1000) if isinstance(inputs, Tensor) else inputs:
            _check_inputs(model, batch)
            seen.clear()  # of what the check looked at
            logits = model(batch)
            images += len(batch)
            for name, x, _ in seen:
                rows[name] += len(x)
                sums[name][0] += x.sum(0)
                sums[name][1] += x.T @ x
            if temperature is None or not seen:
                continue
            if logits.ndim != 2:
                raise ValueError(f"the loss metric needs logits of shape (N, classes), got {tuple(logits.shape)}")
            log_p = (logits / temperature).log_softmax(1)
            outputs = [output for _, _, output in seen]
            for c in range(log_p.shape[1]):
                gradients = torch.autograd.grad(-log_p[:, c].sum(), outputs, retain_graph=True, materialize_grads=True)
                weight = log_p[:, c, None].detach().exp().sqrt()
                for (name, _, _), g in zip(seen, gradients):
                    g = (g.flatten(1) * weight).reshape(-1, g.shape[-1]).to("cpu", torch.float64)
                    sums[name][2] += g.T @ g
    if images == 0:
        raise ValueError("inputs is empty; give at least one batch")
    result = {}
    for name, (total, second, gradient) in sums.items():
        if rows[name] == 0:
            raise ValueError(f"the model does not use its layer {name!r}")
        if not (second.isfinite().all() and gradient.isfinite().all()):
            raise ValueError(f"the inputs or the gradients of the layer {name!r} are not all finite")
        mean = total / rows[name]
        metric = None if temperature is None else gradient / images
        result[name] = Statistics(mean, second / rows[name] - torch.outer(mean, mean), metric)
    return result


def _response(weight: Tensor, statistics: Statistics, damping: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """G^½, G^-½, and the eigenvalues (largest first) and eigenvectors of G^½ W C Wᵀ G^½.

    C is the covariance of the inputs; G the damped metric, or the identity. The sum of the eigenvalues beyond the r-th
    is the least error, E‖G^½ (W - W_r) x‖², that a rank-r W_r leaves.
    """
    m, n = weight.shape
    if statistics.covariance.shape != (n, n) or (statistics.metric is not None and statistics.metric.shape != (m, m)):
        raise ValueError(f"these statistics are not those of a layer with a {m}×{n} weight")
    W, root, inverse = weight.detach().cpu().double(), torch.eye(m).double(), torch.eye(m).double()
    if statistics.metric is not None:
        level = statistics.metric.diagonal().mean()
        if not (damping > 0 and level > 0):
            raise ValueError(f"the damping and the metric must be positive, got {damping} and a mean of {level}")
        values, Q = torch.linalg.eigh(statistics.metric + damping * level * torch.eye(m))
        root, inverse = Q * values.sqrt() @ Q.T, Q * values.rsqrt() @ Q.T
    values, vectors = torch.linalg.eigh(root @ W @ statistics.covariance @ W.T @ root)
    return root, inverse, values.flip(0).clamp(min=0), vectors.flip(1)


def factorize_linear(
    layer: nn.Linear, rank: int, *, inputs: Tensor | Iterable[Tensor] | Statistics | None = None, damping: float = 0.1
) -> nn.Sequential:
    """Two linear layers, ``Linear(n, rank, bias=False)`` and ``Linear(rank, m)``, in place of one ``Linear(n, m)``.

    They keep the layer's bias, dtype, device and mode. At full rank, min(m, n), they compute what it computes.

    Args:
        inputs: what the layer is fed with, (N, n), in one tensor or in batches; or its ``Statistics``. With them, not
            the error of the weight is least but that of the *output* on such inputs, in the statistics' metric if they
            have one, and the bias makes up for the mean of what is lost. A layer without a bias stays without one.
        damping: added to the metric's diagonal, as a share of its mean.

    Raises:
        TypeError: ``layer`` is not exactly an ``nn.Linear``, or ``rank`` is not an int.
        ValueError: ``rank`` is out of range, the weight holds NaN or infinity, or ``inputs`` do not fit the layer.

    Source: Zhang, Zou, He & Sun (2016), arXiv:1505.06798, for the response PCA.
    """
    if type(layer) is not nn.Linear:  # a subclass may compute something else
        raise TypeError(f"only an nn.Linear can be factorized, got {type(layer).__name__}")
    A, B = truncated_svd(layer.weight, rank)
    if inputs is None:
        return _as_layers(A, B, layer)
    statistics = inputs if isinstance(inputs, Statistics) else layer_statistics(layer, [""], inputs)[""]
    if layer.bias is None:  # nothing can make up for the mean, so it counts as part of the error
        second_moment = statistics.covariance + torch.outer(statistics.mean, statistics.mean)
        statistics = statistics._replace(covariance=second_moment)
    root, inverse, _, vectors = _response(layer.weight, statistics, damping)
    W, U = layer.weight.detach().cpu().double(), vectors[:, :rank]
    projected = inverse @ U @ (U.T @ (root @ W))
    pair = _as_layers(*truncated_svd(projected, rank), layer)
    if layer.bias is not None:
        with torch.no_grad():
            pair[1].bias += ((W - projected) @ statistics.mean).to(layer.bias)
    return pair


def _as_layers(A: Tensor, B: Tensor, layer: nn.Linear) -> nn.Sequential:
    """The factors as two linear layers that take the place of ``layer``."""
    like = {"dtype": layer.weight.dtype, "device": layer.weight.device}
    down = nn.utils.skip_init(nn.Linear, layer.in_features, len(B), bias=False, **like)
    up = nn.utils.skip_init(nn.Linear, len(B), layer.out_features, bias=layer.bias is not None, **like)
    pair = nn.Sequential(down, up).train(layer.training).requires_grad_(layer.weight.requires_grad)
    with torch.no_grad():
        down.weight.copy_(B)
        up.weight.copy_(A)
        if layer.bias is not None:
            up.bias.copy_(layer.bias)
            up.bias.requires_grad_(layer.bias.requires_grad)
    return pair


def _named_linear(model: nn.Module, name: str) -> nn.Linear:
    linears = {n: m for n, m in model.named_modules() if type(m) is nn.Linear}
    if name not in dict(model.named_modules()):
        raise KeyError(f"the model has no module {name!r}; its linear layers are {sorted(linears)}")
    if name not in linears:
        given = type(model.get_submodule(name)).__name__
        raise TypeError(f"{name!r} is a {given}, not an nn.Linear; the linear layers are {sorted(linears)}")
    return linears[name]


def factorize(
    model: nn.Module,
    ranks: Mapping[str, int],
    *,
    inputs: Tensor | Iterable[Tensor] | None = None,
    temperature: float | None = None,
    damping: float = 0.1,
) -> nn.Module:
    """A copy of ``model`` in which each layer named in ``ranks`` is replaced by ``factorize_linear(layer, rank)``.

    Names are those of ``model.named_modules()``. Everything is checked before anything is copied; ``model`` itself
    is never changed.

    Args:
        inputs: calibration inputs of the *model*, in one tensor or in batches. With them, each layer keeps its output
            on such inputs, rather than its weight; ``temperature`` adds the loss metric (``layer_statistics``).

    Raises:
        KeyError: no module has that name.
        TypeError, ValueError: as in ``factorize_linear``.
    """
    layers = {name: _named_linear(model, name) for name in ranks}
    for name, layer in layers.items():
        _check_rank(ranks[name], layer.weight.shape)
    statistics = layer_statistics(model, layers, inputs, temperature=temperature) if inputs is not None else {}
    pairs = {
        id(layer): factorize_linear(layer, ranks[name], inputs=statistics.get(name), damping=damping)
        for name, layer in layers.items()
    }
    # deepcopy looks up by id what it has copied already: so each pair takes its layer's place wherever that is used.
    return copy.deepcopy(model, pairs)


def allocate_ranks(
    model: nn.Module,
    budget: int,
    *,
    inputs: Tensor | Iterable[Tensor] | None = None,
    temperature: float | None = None,
    damping: float = 0.1,
) -> dict[str, int]:
    """Ranks with which the linear layers of ``model`` hold at most ``budget`` weights, at the least predicted error.

    The weights of a linear layer are also its MACs per input row, so it serves either budget; biases, and modules that
    are not linear, do not count. A layer that is not in the result stays dense; no rank makes a layer larger. The
    prediction adds up, over the layers, what each rank leaves out: of the squared singular values, as a share of the
    layer's, without ``inputs``; of the output or, with ``temperature``, of the loss with them (``factorize_linear``).
    The choice is the exact optimum of that prediction, by dynamic programming over the layers.

    Raises:
        TypeError: ``budget`` is not an int.
        ValueError: even rank 1 everywhere exceeds the budget; or as ``layer_statistics``.
    """
    if isinstance(budget, bool) or not isinstance(budget, Integral):
        raise TypeError(f"budget must be an int, got {budget!r} ({type(budget).__name__})")
    layers = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    statistics = layer_statistics(model, layers, inputs, temperature=temperature) if inputs is not None else {}
    cost, error, choices = torch.tensor([0]), torch.zeros(1).double(), []
    for name, layer in layers.items():
        _check_finite(layer.weight)
        m, n = layer.weight.shape
        ranks = torch.arange(1, break_even_rank(m, n) + 1)
        if inputs is None:
            terms = torch.linalg.svdvals(layer.weight.detach().cpu().double()).square()
            terms = terms / terms.sum().clamp(min=torch.finfo(torch.float64).tiny)
        else:
            terms = _response(layer.weight, statistics[name], damping)[2]
        left = terms.sum() - terms.cumsum(0)
        # Options: every rank that saves, and dense. All combinations with the best of the layers so far …
        option_cost = torch.cat([ranks * (m + n), torch.tensor([m * n])])
        option_error = torch.cat([left[: len(ranks)].clamp(min=0), torch.zeros(1)])
        cost = (cost[:, None] + option_cost).flatten()
        error = (error[:, None] + option_error).flatten()
        # … of which only those stay that no other beats in both cost and error.
        order = torch.from_numpy(np.lexsort((error, cost)))  # by cost, then by error
        order = order[cost[order] <= budget]
        best_so_far = error[order].cummin(0)[0]
        order = order[torch.cat([torch.ones(1).bool(), best_so_far[1:] < best_so_far[:-1]])[: len(order)]]
        if len(order) == 0:
            raise ValueError(f"a budget of {budget} weights is too small, even with rank 1 in every linear layer")
        cost, error = cost[order], error[order]
        choices.append((name, len(option_cost), order))
    position, result = len(cost) - 1, {}
    for name, count, order in reversed(choices):
        position, option = divmod(int(order[position]), count)
        if option < count - 1:
            result[name] = option + 1
    return dict(reversed(result.items()))


def rank_sweep(
    model: nn.Module,
    layer_name: str,
    x: Tensor,
    y: Tensor,
    ranks: Iterable[int] | None = None,
    batch_size: int = 10_000,
) -> dict[int, float]:
    """The accuracy on ``x``, ``y`` at every rank of one linear layer (or at ``ranks``), as ``{rank: accuracy}``.

    Same result as ``accuracy(factorize(model, {layer_name: r}), x, y)`` for each r, from one SVD. In an
    ``nn.Sequential`` it takes one pass over the data: truncations are nested, so the layer's output at rank r is that
    at rank r - 1 plus one outer product, and only the modules behind the layer run again. Any other model is evaluated
    rank by rank.

    Raises:
        KeyError, TypeError, ValueError: as ``factorize`` and ``accuracy``.
    """
    layer = _named_linear(model, layer_name)
    full = min(layer.weight.shape)
    ranks = list(range(1, full + 1) if ranks is None else ranks)
    for rank in ranks:
        _check_rank(rank, layer.weight.shape)
    ranks = sorted({int(rank) for rank in ranks})
    _check_inputs(model, x, y)
    A, B = truncated_svd(layer.weight, full)

    # One pass needs a layer that is a module of the nn.Sequential, not used elsewhere in it, and sees one vector per
    # input; and sums of rank-1 terms that do not round away what the two factors keep.
    one_pass = type(model) is nn.Sequential and [part for part in model if layer in set(part.modules())] == [layer]
    one_pass &= layer.weight.dtype in (torch.float32, torch.float64)
    if one_pass:
        position = list(model).index(layer)
        before, behind = model[:position], model[position + 1 :]
        with _evaluating(model):
            one_pass = before(x[:1]).ndim == 2
    if not one_pass:
        pairs = {rank: _as_layers(A[:, :rank], B[:rank], layer) for rank in ranks}
        return {rank: accuracy(copy.deepcopy(model, {id(layer): pair}), x, y) for rank, pair in pairs.items()}

    # Behind the layer only ReLUs and one linear layer, none of which writes to its input: then images settle early.
    settles = len(behind) > 0 and type(behind[-1]) is nn.Linear
    settles &= all(type(m) is nn.ReLU and not m.inplace for m in behind[:-1])
    correct = dict.fromkeys(ranks, 0)
    with _evaluating(model):
        for xb, yb in zip(x.split(batch_size), y.split(batch_size)):
            inputs = before(xb)
            outputs = layer(inputs)
            codes = inputs @ B.T  # what the rank-1 terms read off each image
            dense_right = behind(outputs.clone()).argmax(1) == yb
            steps = torch.full((len(xb),), full)
            if settles:
                steps = _ranks_until_settled(behind, outputs, codes * A.norm(dim=0))
            # Images that settle late come first, so that those still open at any rank are the first rows.
            order = steps.argsort(descending=True)
            labels, codes = yb[order], codes[order].T.unsqueeze(2).contiguous()
            settled_right = [0] + dense_right[order].flip(0).cumsum(0).tolist()
            open_at = torch.bincount(steps, minlength=full + 1).flip(0).cumsum(0).flip(0).tolist()
            outputs = torch.zeros_like(outputs) if layer.bias is None else layer.bias.repeat(len(xb), 1)
            for rank in range(1, max(ranks, default=0) + 1):
                n = open_at[rank]
                outputs = outputs[:n].addcmul_(codes[rank - 1, :n], A[:, rank - 1])
                if rank in correct:
                    logits = behind(outputs if settles else outputs.clone())
                    correct[rank] += int(torch.count_nonzero(logits.argmax(1) == labels[:n]))
                    correct[rank] += settled_right[len(xb) - n]
    return {rank: count / len(x) for rank, count in correct.items()}


def _ranks_until_settled(behind: nn.Sequential, outputs: Tensor, terms: Tensor) -> Tensor:
    """For each image the last rank at which its predicted class could still differ from that of the dense model.

    ``outputs`` (N, m) are the layer's at full rank; ``terms`` (N, R) the lengths of the R orthogonal rank-1 terms in
    each. At rank r they are ‖terms[r:]‖ away from full rank. ReLUs do not increase distances, and the classifier behind
    them, with rows w_i, has its boundary between classes i and j at distance (logit_i - logit_j) / ‖w_i - w_j‖.
    """
    classifier, features = behind[-1], behind[:-1](outputs)
    weight, logits = classifier.weight, classifier(features)
    distance_at = terms.square().flip(1).cumsum(1).flip(1).sqrt()[:, 1:]  # at ranks 1, 2, …, R - 1
    rounding = 1e-4 * (features.norm(dim=1, keepdim=True) * weight.norm(dim=1).max() + logits.abs().amax())
    top = logits.argmax(1, keepdim=True)
    # Not by way of products, which round the distance between rows that nearly coincide down to 0.
    apart = torch.cdist(weight, weight, compute_mode="donot_use_mm_for_euclid_dist")
    boundary = (logits.gather(1, top) - logits - rounding) / apart[top.squeeze(1)]
    boundary.scatter_(1, top, torch.inf)
    return (~(1.01 * distance_at < boundary.amin(1, keepdim=True))).sum(1)  # NaN counts as open


# ---------------------------------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------------------------------


def use_style() -> None:
    """The look of every figure in the series: white face, colour-blind-safe palette, light grid; tables are not cut."""
    pd.set_option("display.max_colwidth", None, "display.width", 120)
    sns.set_theme(style="whitegrid", palette="colorblind")
    plt.rcParams.update({"figure.facecolor": "white", "figure.dpi": 110, "axes.titlesize": "medium"})
    plt.rcParams.update({"figure.constrained_layout.use": True, "axes.spines.top": False, "axes.spines.right": False})


def show(figure: plt.Figure, alt: str, save: str | None = None) -> None:
    """Display ``figure`` as PNG with the alternative text ``alt``, and close it; ``save`` also writes that file.

    The picture's plain-text form, which a browser does not show, lists the numbers that are drawn (``drawn_numbers``).
    That is what the tests compare, since pixels differ from machine to machine.
    """
    png, drawing = io.BytesIO(), io.BytesIO()
    figure.savefig(drawing, format="png")
    Image.open(drawing).convert("RGB").quantize(256).save(png, format="png")  # a third of the size
    if save:
        output_path(save).write_bytes(png.getvalue())
    data = {"image/png": png.getvalue(), "text/plain": drawn_numbers(figure)}
    display(data, raw=True, metadata={"image/png": {"alt": alt}})
    plt.close(figure)


def drawn_numbers(figure: plt.Figure) -> str:
    """The titles, labels and data of everything drawn in ``figure``, as text; four digits of each number."""

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
            drawn = [path.vertices for path in group.get_paths()]  # bands, error bars; of points, the marker
            if len(group.get_offsets()) > 1 or not np.allclose(group.get_offsets(), 0):
                drawn = [group.get_offsets()]
            lines.append(f"points {group.get_label()!r}: {' '.join(digits(vertices) for vertices in drawn)}")
        for image in axes.images:
            values = image.get_array()
            lines.append(f"image {values.shape}: mean {values.mean():#.4g}, standard deviation {values.std():#.4g}")
        lines += [f"text {text.get_text()!r}" for text in axes.texts]
    return "\n".join(lines)


def say(text: str) -> None:
    """Display ``text`` as Markdown: a sentence whose numbers come from the run."""
    display(Markdown(text))


# ---------------------------------------------------------------------------------------------------------------------
# Exercises
# ---------------------------------------------------------------------------------------------------------------------


def check(answer: object, is_right: Callable[[Any], object], hint: str) -> None:
    """Print whether an exercise is solved: "Right.", "Not yet." and the hint, or "Not tried yet.".

    Args:
        answer: a value, a tuple of values, or a function without arguments that returns one of these. As long as it,
            or a member of the tuple, is ``...`` or None, the exercise counts as not tried.
        is_right: tells whether that value (or tuple, as one argument) is right.
        hint: what to think about after a wrong answer.

    A wrong answer never raises: an error in ``answer`` or ``is_right`` is printed behind the hint.
    """
    try:
        value = answer() if isinstance(answer, FunctionType) else answer
        parts = value if isinstance(value, tuple) else (value,)
        if any(part is ... or part is None for part in parts):
            verdict = "Not tried yet."
        else:
            verdict = "Right." if is_right(value) else f"Not yet. {hint}"
    except Exception as error:
        verdict = f"Not yet. {hint} ({type(error).__name__}: {error})"
    print(verdict)
