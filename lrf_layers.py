"""A layer as a matrix that acts on rows, and what calibration data say about these rows. For ``lrf_utils``.

Of an ``nn.Linear``, the matrix W (m, n) is the weight and a row is one input vector. Of an ``nn.Conv2d``, W is the
weight with its last three axes as one, and a row is one patch of the input.
"""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Layer = nn.Linear | nn.Conv2d


class LowRank(nn.Sequential):
    """Two linear layers, or convolutions, in place of one.

    The fields of that one (``in_features``, ``stride``, …) still answer, and so do ``bias`` and ``weight``, the
    product, made anew at each reading: some modules read these and never call the layer.
    """

    @property
    def weight(self) -> Tensor:
        down, up = self[0].weight, self[1].weight
        return (up.flatten(1) @ down.flatten(1)).unflatten(1, down.shape[1:])

    @property
    def bias(self) -> Tensor | None:
        return self[1].bias


def _problem(layer: nn.Module) -> str | None:
    """Why a module cannot be factorized, if so."""
    if type(layer) not in (nn.Linear, nn.Conv2d):  # a subclass may compute something else
        return f"a {type(layer).__name__}; only an exact nn.Linear or nn.Conv2d can be factorized"
    if getattr(layer, "groups", 1) != 1:
        return f"a convolution in {layer.groups} groups; only groups=1 can be factorized"
    if not isinstance(layer.weight, nn.Parameter):
        return "a layer whose weight is computed anew (weight_norm, spectral_norm, pruning); remove that first"
    if "forward" in vars(layer) or layer._forward_hooks or layer._forward_pre_hooks:
        return "a layer with hooks or with a forward of its own; remove these first"
    if layer.weight.is_inference() and not torch.is_inference_mode_enabled():
        return "a layer made in inference mode, closed to autograd; copy the model with copy.deepcopy"
    if layer.weight.is_meta or not layer.weight.is_floating_point():
        return f"a layer with a weight of {layer.weight.dtype} on {layer.weight.device}; give real numbers in memory"
    return None if layer.weight.isfinite().all() else "a layer whose weight holds NaN or infinity"


def named_layer(model: nn.Module, name: str = "") -> Layer:
    modules = dict(model.named_modules(remove_duplicate=False))
    if name not in modules:
        raise KeyError(f"the model has no module {name!r}; it has the layers {layer_names(model)}")
    if problem := _problem(modules[name]):
        raise (ValueError if type(modules[name]) in (nn.Linear, nn.Conv2d) else TypeError)(f"{name!r} is {problem}")
    return modules[name]


def layer_names(model: nn.Module) -> list[str]:
    """The names of the layers that can be factorized, a shared one once; the parts of a ``LowRank`` are left alone."""
    if isinstance(model, torch.jit.ScriptModule) or hasattr(model, "_orig_mod"):
        raise TypeError("the model is compiled or scripted; factorize first, then compile")
    done = {part for module in model.modules() if isinstance(module, LowRank) for part in module}
    return [name for name, module in model.named_modules() if module not in done and not _problem(module)]


def as_matrix(layer: Layer) -> Tensor:
    return layer.weight.detach().flatten(1).cpu().double()


def as_rows(layer: Layer, args: tuple, kwargs: Mapping[str, Tensor], mask: Tensor | None) -> Tensor:
    """What the matrix acts on when the layer is called: ``_counted`` vectors, or patches (images, positions, n)."""
    x = args[0] if args else kwargs["input"]
    if isinstance(layer, nn.Conv2d):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = F.pad(x.reshape(-1, *x.shape[-3:]).double(), layer._reversed_padding_repeated_twice, mode)
        x = F.unfold(x, layer.kernel_size, layer.dilation, stride=layer.stride).transpose(1, 2)
    return _counted(x, mask)


def _counted(rows: Tensor, mask: Tensor | None) -> Tensor:
    """Rows (…, n) as a matrix in float64, without those that a mask over inputs, or inputs and tokens, leaves out."""
    rows = rows.detach().to("cpu", torch.float64)
    if mask is not None:
        lead, mask = rows.shape[:-1], mask.bool().cpu()
        if mask.ndim > len(lead):  # one row for all tokens of an input
            mask = mask.flatten(len(lead)).any(-1)
        if lead[: mask.ndim] != mask.shape:
            raise ValueError(f"a mask for {tuple(mask.shape)} inputs or tokens does not fit rows of {tuple(lead)}")
        rows = rows[mask]
    return rows.reshape(-1, rows.shape[-1])


def check_int(value: object, least: int, most: float, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{what} must be an int, got {value!r} ({type(value).__name__})")
    if not least <= value <= most:
        raise ValueError(f"{what} must be from {least} to {most}, got {value}")
    return int(value)  # NumPy's integers would overflow


def check_rank(rank: int, matrix: Tensor) -> int:
    return check_int(rank, 1, min(matrix.shape), "the rank of a {}×{} weight".format(*matrix.shape))


@dataclass(frozen=True)
class Statistics:
    """What calibration data say about one layer: sums in float64, so that ``a + b`` is what both say together.

    ``torch.save({name: vars(s) for …})`` saves them; after loading, ``Statistics(**d)`` makes each again.
    """

    inputs: int  # how many inputs of the model were seen
    rows: int  # how many rows the layer saw of them
    row_sum: Tensor  # (n,)
    outer_sum: Tensor  # (n, n), of x xᵀ
    gradient_sum: Tensor | None = None  # (m, m), of g gᵀ, with g the gradient of the loss at the layer's output
    damping: float = 0.1  # what is added to the metric's diagonal, as a share of its mean

    def __add__(self, other: Statistics) -> Statistics:
        if self.damping != other.damping or (self.gradient_sum is None) != (other.gradient_sum is None):
            raise ValueError("statistics with and without a loss metric, or of two dampings, cannot be added")
        sums = {k: v if v is None else v + vars(other)[k] for k, v in vars(self).items() if k != "damping"}
        return Statistics(**sums, damping=self.damping)

    @property
    def mean(self) -> Tensor:
        return self.row_sum / self.rows

    @property
    def metric(self) -> Tensor | None:
        """E[g gᵀ], summed over the rows of one input."""
        return None if self.gradient_sum is None else self.gradient_sum / self.inputs

    def covariance(self, centred: bool = True, ridge: bool = False) -> Tensor:
        """Of the rows, about their mean or about 0; with a ridge, as if n more rows were white and as large on average.

        So with few rows a factorization goes over to the plain SVD, and with many the ridge vanishes. Measured at rank
        10 on fc1 and fc2 of notebook 2, three seeds: with 20 images every smaller ridge (a tenth of it, shares from
        1e-6 to 1e-2, OAS shrinkage) is 1 to 8 points behind this one; from 3,000 images on, all agree within 0.05.
        """
        C = self.outer_sum / self.rows - torch.outer(self.mean, self.mean) * centred
        if ridge:
            level = C.diagonal().mean() * len(C) / self.rows
            C.diagonal().add_(level if level > 0 else 1)
        return C


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module's own mode is restored afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def run(model: nn.Module, batch: Any, select: Callable[[Any], Any] | None) -> tuple[Any, int]:
    """The model's output on one batch, and the number of inputs in it."""
    given = batch if select is None else select(batch)
    args = tuple(given) if isinstance(given, (tuple, list)) else () if isinstance(given, Mapping) else (given,)
    kwargs = given if isinstance(given, Mapping) else {}
    first = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim), ())
    if not len(first):
        raise ValueError(f"a batch must hold a tensor with at least one input, got {given!r}")
    try:
        return model(*args, **kwargs), len(first)
    except (TypeError, RuntimeError) as error:
        error.add_note(f"That was a batch of type {type(batch).__name__}; select= says what of it goes into the model.")
        raise


def _every_class(temperature: float, output: Any) -> Iterator[Tensor]:
    """One scalar for each class, whose gradients' outer products add up to their expectation over the classes."""
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        given = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"temperature needs logits of shape (inputs, classes), got {given}; or give a loss")
    log_p = (logits / temperature).log_softmax(1)
    yield from (-(log_p.detach().exp().sqrt() * log_p).sum(0))


def in_batches(data: Tensor | Iterable[Any]) -> Iterable[Any]:
    return data.split(200) if isinstance(data, Tensor) else data


def collect(
    model: nn.Module,
    batches: Tensor | Iterable[Any],
    names: Iterable[str] | None = None,
    *,
    select: Callable[[Any], Any] | None = None,
    keep: Callable[[Any], Tensor] | None = None,
    temperature: float | None = None,
    loss: Callable[[Any], Iterable[Tensor]] | None = None,
    damping: float = 0.1,
    weighted: bool = False,
) -> dict[str, Statistics]:
    """Statistics of the named layers, or of ``layer_names(model)``, in the order of their first calls.

    Args:
        batches: a tensor (N, …), or any iterable of batches. The model is called once for each, in evaluation mode,
            with a tensor as it is, a tuple or list as arguments, a dictionary as keywords.
        select: what of a batch goes in; for a DataLoader of (x, y), ``lambda batch: batch[0]``.
        keep: of a batch, a mask (N,) or (N, tokens); 0 for rows that must not count, such as padding.
        temperature: with one, also the loss metric: the covariance of the gradient of the cross-entropy, at every class
            in turn, weighted by its probability under softmax(logits / temperature), without labels. Each input must
            have logits of its own, (N, classes), as the model's output or in its ``.logits``.
        loss: for any other output or many classes: makes scalars of the output, whose gradients' outer products are
            added up. With one class drawn for each input it is the sum of their cross-entropies.
        weighted: with a loss, let each row count as its squared gradient, scaled to a mean of 1. Then the covariance
            is that of the rows on which the loss depends. See notebook 10.

    Raises a KeyError or TypeError as ``factorize``; a ValueError for no data, NaN in them, a named layer that is not
    called, a mask or an argument that does not fit.

    Source: Martens & Grosse (2015), arXiv:1503.05671; the metric is their output factor, summed instead of sampled.
    """
    for value in (temperature, damping):
        if value is not None and not value > 0:
            raise ValueError(f"temperature and damping must be positive, got {value!r}")
    losses = loss if temperature is None else partial(_every_class, temperature)
    if weighted and losses is None:
        raise ValueError("rows are weighted by their gradients, so give a temperature or a loss too")
    layers = {name: named_layer(model, name) for name in (layer_names(model) if names is None else names)}
    sums: dict[str, list] = {}
    seen: list[tuple[str, Tensor, Tensor]] = []
    weights: Counter[str] = Counter()
    mask, inputs = None, 0

    def look(name: str, layer: Layer, args: tuple, kwargs: dict[str, Tensor], output: Tensor) -> Tensor:
        x, (m, n) = as_rows(layer, args, kwargs, mask), layer.weight.flatten(1).shape
        sums.setdefault(name, [0, *(x.new_zeros(size) for size in ((n,), (n, n), (m, m)))])
        sums[name][0] += len(x)
        if not weighted:
            sums[name][1] += x.sum(0)
            sums[name][2].addmm_(x.T, x)
        if losses is None:
            return output
        # The next module gets a copy, since it may write into it, as nn.ReLU(inplace=True) does.
        seen.append((name, output.requires_grad_(), x))
        return output.clone()

    with contextlib.ExitStack() as hooks, evaluating(model), torch.set_grad_enabled(losses is not None):
        for name, layer in layers.items():
            hooks.enter_context(layer.register_forward_hook(partial(look, name), with_kwargs=True))
        for batch in in_batches(batches):
            seen.clear()
            mask = None if keep is None else keep(batch)
            output, count = run(model, batch, select)
            inputs += count
            for scalar in losses(output) if seen else ():
                outputs = [each for _, each, _ in seen]
                gradients = torch.autograd.grad(scalar, outputs, retain_graph=True, materialize_grads=True)
                for (name, _, x), g in zip(seen, gradients):
                    conv = isinstance(layers[name], nn.Conv2d)
                    g = _counted(g.reshape(-1, *g.shape[-3:]).flatten(2).transpose(1, 2) if conv else g, mask)
                    sums[name][3].addmm_(g.T, g)
                    if weighted:
                        w = g.square().sum(1)
                        weights[name] += w.sum()
                        sums[name][1] += w @ x
                        sums[name][2].addmm_(x.T, w[:, None] * x)
    if inputs == 0:
        raise ValueError("batches is empty; give at least one")
    if missing := [name for name in layers if name not in sums]:
        if names is not None:
            raise ValueError(f"the model does not call {missing}; leave them out")
        warnings.warn(f"no statistics of {missing}, which the model does not call", stacklevel=2)
    for name, total in weights.items():
        for product in sums[name][1:3]:
            product *= sums[name][0] / total
    for name, (rows, _, *products) in sums.items():
        if rows == 0 or not all(product.isfinite().all() for product in products):
            raise ValueError(
                f"the inputs or gradients of the layer {name!r} are not all finite, or none of them counts"
            )
    return {k: Statistics(inputs, *s[:3], s[3] if losses else None, damping) for k, s in sums.items()}
