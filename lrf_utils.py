"""Low-rank factorization of PyTorch layers: factorize, choose ranks, count, save.

A layer is a matrix ``W`` (m, n) that acts on rows: of an ``nn.Linear`` its weight, and a row is
one input vector; of an ``nn.Conv2d`` its weight (m, channels · h · w), and a row is one patch of
the image. A rank-r factorization is ``W ≈ A @ B`` with ``A`` (m, r) and ``B`` (r, n); as layers,
first B, then A with the bias. 1 MAC is one multiply-accumulate (2 FLOPs).
"""

import contextlib
import copy
import dataclasses
import json
import math
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

# fmt: off
__all__ = [
    "LowRank", "Statistics", "accuracy", "allocate_ranks", "break_even_rank",
    "collect_statistics", "count_macs", "count_parameters", "factorize", "factorize_layer",
    "factorize_sequentially", "layer_names", "load_factorized", "rank_options", "rank_sweep",
    "save_factorized", "truncated_svd", "truncation_errors",
]
# fmt: on

Layer = nn.Linear | nn.Conv2d
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# --- Layers -------------------------------------------------------------------------------------


class LowRank(nn.Sequential):
    """Two factors in place of a layer, or what ``lrf_convs.split_conv`` makes of one.

    The layer's fields (``in_features``, ``stride``, …) still answer. ``weight`` tells shape, dtype
    and device and nothing else, since there is no dense matrix; that of a linear pair would be
    ``pair[1].weight @ pair[0].weight``.
    """

    @property
    def weight(self) -> Tensor:
        first, last = self[0], self[-1]
        if isinstance(first, nn.Linear):
            if torch.compiler.is_dynamo_compiling():  # which knows no such stand-in as below,
                return last.weight @ first.weight  # but drops a product that nobody uses
            return _ShapeOnly((last.out_features, first.in_features), last.weight)
        kernel = [max(sizes) for sizes in zip(*(part.kernel_size for part in self))]
        return _ShapeOnly((last.out_channels, first.in_channels, *kernel), last.weight)

    @property
    def bias(self) -> Tensor | None:
        return self[-1].bias


class _ShapeOnly(Tensor):
    """A tensor without numbers: to compute with it, to read it or to write to it is an error."""

    ANSWERS = frozenset(
        "shape size dim ndim numel nelement __len__ dtype device layout get_device is_leaf grad"
        " requires_grad is_floating_point is_complex is_meta is_cuda is_cpu is_mps is_sparse"
        " is_quantized is_nested element_size itemsize type __hash__".split()
    )

    @staticmethod
    def __new__(cls, shape: Iterable[int], like: Tensor) -> Tensor:
        like = {"dtype": like.dtype, "device": like.device, "requires_grad": like.requires_grad}
        return Tensor._make_wrapper_subclass(cls, shape, **like)

    def __repr__(self) -> str:
        return f"<shape {tuple(self.shape)} of a product that is never computed>"

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", str(function))
        if name == "__get__":  # of a property, such as dtype
            name = function.__self__.__name__
        if name in cls.ANSWERS:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **(kwargs or {}))
        raise RuntimeError(
            f"{name!r} needs the weight of a factorized layer, which has none, but two factors "
            "(their product: pair[1].weight @ pair[0].weight). If a model reads this weight, "
            "leave the layer dense; if this merges a LoRA, merge first, then factorize"
        )

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return cls.__torch_function__(function, types, args, kwargs)


_OTHER_TYPES = {  # parts of a type's name, and what to do
    "Conv1D": "convert it first: new = nn.Linear(*layer.weight.shape); "
    "new.weight = nn.Parameter(layer.weight.T.contiguous()); new.bias = layer.bias",
    "OptimizedModule": "it is compiled; factorize first, then compile",
    "MultiheadAttention": "it reads its weights and never calls a layer",
    "NonDynamicallyQuantizableLinear": "nn.MultiheadAttention reads its weight and never calls it",
    "Parametrized": "call torch.nn.utils.parametrize.remove_parametrizations first",
    "quantized": "its weight is packed; factorize first, then quantize",
    "bitsandbytes": "its weight is packed; factorize first, then quantize",
    "": "only an exact nn.Linear or nn.Conv2d can be factorized",  # "" is a part of all names
}


def _problem(layer: nn.Module) -> str | None:
    """Why a module cannot be factorized, if so, and what to do."""
    if type(layer) not in (nn.Linear, nn.Conv2d):  # a subclass may compute something else
        name = f"{type(layer).__module__}.{type(layer).__qualname__}"
        name = name.split(".")[-1] if name.startswith("torch.nn.modules.") else name
        return f"a {name}; {next(text for part, text in _OTHER_TYPES.items() if part in name)}"
    weight, groups, fields = layer.weight, getattr(layer, "groups", 1), vars(layer)
    computed, dtype, shape = type(weight) is not nn.Parameter, weight.dtype, tuple(weight.shape)
    sharded = "DTensor" in type(weight).__name__ or len(shape) < 2
    hooked = "forward" in fields or layer._forward_hooks or layer._forward_pre_hooks
    reasons = [
        ("_hf_hook" in fields, "offloaded by accelerate; load the model whole, no device_map"),
        (sharded, f"a layer whose weight is {shape} here; if sharded, gather it first"),
        (computed, "one whose weight is not a parameter: computed anew, or packed; undo that"),
        (groups > 1, f"a convolution in {groups} groups; only groups=1 can be factorized"),
        (hooked, "a layer with hooks or with a forward of its own; remove these first"),
        (weight.is_meta, "a layer on the meta device, without numbers; load the weights first"),
        (dtype not in _DTYPES, f"a layer of {dtype}; convert it to real numbers first"),
    ]
    for applies, reason in reasons:
        if applies:
            return reason
    return None if weight.isfinite().all() else "a layer whose weight holds NaN or infinity"


def _check_model(model: nn.Module) -> None:
    """Refuse models of which a copy with other layers would not work."""
    for name, module in model.named_modules():
        kind, scripted = type(module).__name__, isinstance(module, torch.jit.ScriptModule)
        where = f"the part {name!r}" if name else "the model"
        if kind == "FullyShardedDataParallel":
            raise TypeError(f"{where} is sharded over processes; gather the weights first")
        if kind == "OptimizedModule" or scripted or vars(module).get("_compiled_call_impl"):
            raise TypeError(f"{where} is compiled or scripted; factorize first, then compile")


def _named_layer(model: nn.Module, name: str = "") -> Layer:
    """The layer of that name, or an error that says why it cannot be factorized."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        names = [each for each, part in model.named_modules() if not _problem(part)]
        text = f"the model has no module {name!r}; it has the layers {names}"
        raise KeyError(text) from None
    if problem := _problem(module):
        known = type(module) in (nn.Linear, nn.Conv2d)
        raise (ValueError if known else TypeError)(f"{name!r} is {problem}")
    return module


def _tied(model: nn.Module) -> dict[str, list[str]]:
    """For each module with a tied weight, the others that hold it."""
    holders: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            if parameter.ndim > 1:
                holders.setdefault(id(parameter), []).append(name)
    groups = [names for names in holders.values() if len(names) > 1]
    return {name: [n for n in names if n != name] for names in groups for name in names}


def layer_names(model: nn.Module) -> list[str]:
    """The names of the layers that can be factorized, a shared layer once.

    A layer whose weight is tied, as a language model's head to its embedding table, is left out,
    since a pair would be one more copy. A warning says what is left out, and why.
    """
    _check_model(model)
    tied, names, left_out = _tied(model), [], {}
    parts = {part for module in model.modules() if isinstance(module, LowRank) for part in module}
    for name, module in model.named_modules():
        if module in parts:
            continue
        why = _problem(module)
        if why is None and name in tied:
            why = f"a layer whose weight is tied to that of {', '.join(tied[name])}"
        if why is None:
            names.append(name)
        elif type(module).__name__ in ("Linear", "Conv1d", "Conv2d", "Conv3d", "Conv1D"):
            left_out.setdefault(why, []).append(name)
    if left_out or not names:
        kind = type(model).__name__
        what = "left out" if names else f"no layer of this {kind} can be factorized"
        counts = [f"{len(each)} × {why} ({each[0]!r})" for why, each in left_out.items()]
        warnings.warn(f"{what}: {'; '.join(counts) or 'it has no other'}", stacklevel=2)
    return names


def _float64(tensor: Tensor) -> Tensor:
    """In float64; on the CPU, if the device has no such numbers, as Apple's GPU."""
    device = "cpu" if tensor.device.type == "mps" else tensor.device
    return tensor.detach().to(device, torch.float64)


def _as_matrix(layer: Layer) -> Tensor:
    """The weight as a float64 matrix (m, n)."""
    return _float64(layer.weight.flatten(1))


def _check_int(value: object, most: float, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{what} must be an int, got {value!r} ({type(value).__name__})")
    if not 1 <= value <= most:
        raise ValueError(f"{what} must be from 1 to {most}, got {value}")
    return int(value)  # NumPy's integers would overflow


def _check_rank(rank: int, weight: Tensor) -> int:
    m, n = weight.flatten(1).shape
    return _check_int(rank, min(m, n), f"the rank of a {m}×{n} weight")


# --- Factorize ----------------------------------------------------------------------------------


def truncated_svd(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best rank-``rank`` approximation of a matrix (m, n): ``A`` (m, rank), ``B`` (rank, n).

    ``A = U √S`` and ``B = √S Vᵀ``; those of a smaller rank r are ``A[:, :r]`` and ``B[:r]``, so
    one call serves all. It runs in float64 on the CPU; the factors keep dtype and device.

    Source: Eckart & Young (1936), doi:10.1007/BF02288367.
    """
    if weight.ndim != 2:
        raise ValueError(f"weight must be a matrix, got shape {tuple(weight.shape)}")
    rank = _check_rank(rank, weight)
    if not weight.is_floating_point():
        raise TypeError(f"weight must hold real floating-point numbers, got {weight.dtype}")
    if not weight.isfinite().all():
        raise ValueError("the {}×{} weight holds NaN or infinity".format(*weight.shape))
    U, S, Vh = torch.linalg.svd(weight.detach().cpu().double(), full_matrices=False)
    root = S[:rank].sqrt()
    return (U[:, :rank] * root).to(weight), (root[:, None] * Vh[:rank]).to(weight)


def _top_vectors(matrix: Tensor, count: int) -> Tensor:
    """The first left singular vectors, from the smaller Gram matrix: much faster than an SVD."""
    m, n = matrix.shape
    if m <= n:
        return torch.linalg.eigh(matrix @ matrix.T).eigenvectors.flip(1)[:, :count]
    right = torch.linalg.eigh(matrix.T @ matrix).eigenvectors.flip(1)[:, :count]
    return torch.linalg.qr(matrix @ right).Q


def _whitened(layer, statistics, biased):
    """R W L and R, with L Lᵀ the covariance of the rows and Rᵀ R the metric, if there is one.

    Any W_r of rank r leaves the error ‖R (W - W_r) L‖², so the SVD of R W L finds the best one.
    """
    W = _as_matrix(layer)
    # A bias makes up for the mean of what is lost, so only the spread about the mean is an error.
    response = W @ torch.linalg.cholesky(statistics.covariance(biased, ridge=True).to(W))
    if statistics._without_gradient():
        return response, None
    G = statistics.metric.to(W)
    G.diagonal().add_(statistics.damping * G.diagonal().mean())
    R = torch.linalg.cholesky(G).T
    return R @ response, R


def _best_factors(layer, rank, statistics, biased):
    """A and B in float64."""
    W = _as_matrix(layer)
    if statistics is None or rank == min(W.shape):
        return truncated_svd(W, rank)
    response, R = _whitened(layer, statistics, biased)
    A = _top_vectors(response, rank)
    B = A.T @ W if R is None else A.T @ (R @ W)
    A = A if R is None else torch.linalg.solve_triangular(R, A, upper=True)
    # Share the norm evenly, as truncated_svd does, by way of the small product of their cores.
    Q_A, R_A = torch.linalg.qr(A)
    Q_B, R_B = torch.linalg.qr(B.T)
    A, B = truncated_svd(R_A @ R_B.T, rank)
    return Q_A @ A, B @ Q_B.T


def _in_place_of(layer: Layer, pair: LowRank) -> LowRank:
    """``pair`` with the fields, mode, memory format and trainability of ``layer``."""
    fields = {key: value for key, value in vars(layer).items() if not key.startswith("_")}
    vars(pair).update(fields)
    if layer.weight.ndim == 4 and not layer.weight.is_contiguous():
        pair.to(memory_format=torch.channels_last)
    pair.train(layer.training).requires_grad_(layer.weight.requires_grad)
    if layer.bias is not None:
        pair.bias.requires_grad_(layer.bias.requires_grad)
    return pair


def _check_statistics(name: str, layer: Layer, statistics: "Statistics | None") -> None:
    m, n = layer.weight.flatten(1).shape
    if statistics is not None:
        gradients = statistics.gradient_sum
        if len(statistics.row_sum) != n or (gradients is not None and len(gradients) != m):
            raise ValueError(f"the statistics of {name!r} are not those of a {m}×{n} weight")


@torch.inference_mode(False)  # so that what is made here can be trained, wherever it is made
@torch.no_grad()
def factorize_layer(
    layer: Layer, rank: int, statistics: "Statistics | None" = None, *, add_bias: bool = False
) -> LowRank:
    """``Linear(n, rank, bias=False)`` and ``Linear(rank, m)`` in place of ``layer``.

    For an ``nn.Conv2d``, a k×k convolution to ``rank`` channels and a 1×1 one. The pair keeps the
    layer's bias, dtype, device and mode. With ``statistics`` not the error of the weight is least
    but that of the *output* on such inputs, in the statistics' metric if they have one, and the
    bias makes up for the mean of what is lost; ``add_bias`` gives one to a layer that has none.

    Raises a TypeError for another kind of layer or rank, a ValueError for a rank out of range,
    another layer's statistics, or a layer that cannot be factorized.

    Source: Zhang, Zou, He & Sun (2016), arXiv:1505.06798, for the response PCA.
    """
    _check_statistics("the layer", _named_layer(layer), statistics)
    rank, biased = _check_rank(rank, layer.weight), layer.bias is not None or add_bias
    like = {"dtype": layer.weight.dtype, "device": layer.weight.device}
    build = partial(nn.utils.skip_init, type(layer), **like)
    if isinstance(layer, nn.Linear):
        down = build(layer.in_features, rank, bias=False)
        up = build(rank, layer.out_features, bias=biased)
    else:
        names = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
        geometry = {name: getattr(layer, name) for name in names}
        down = build(layer.in_channels, rank, bias=False, **geometry)
        up = build(rank, layer.out_channels, 1, bias=biased)
    A, B = _best_factors(layer, rank, statistics, biased)
    down.weight.copy_(B.reshape(down.weight.shape))
    up.weight.copy_(A.reshape(up.weight.shape))
    if biased:
        W = _as_matrix(layer)
        bias = W.new_zeros(len(W)) if layer.bias is None else layer.bias.to(W)
        if statistics is not None:
            bias = bias + (W - A @ B) @ statistics.mean.to(W)
        up.bias.copy_(bias)
    return _in_place_of(layer, LowRank(down, up))


def _copy(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """A copy of ``model`` with the ``new`` modules in place of some."""
    # deepcopy looks up by id what it has copied already: so each new module takes its layer's
    # place wherever that is used.
    memo: dict[int, Any] = {id(layer): module for layer, module in new.items()}
    # It refuses tensors that hang on a graph, such as an activation that a module keeps, or a
    # weight that weight_norm or pruning computes at each call; these are detached.
    for value in tree_leaves([vars(module) for module in model.modules()]):
        if isinstance(value, Tensor) and not value.is_leaf:
            memo[id(value)] = value.detach().clone()
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        for name, module in model.named_modules():
            for field in vars(module).keys() - {"_modules"}:
                try:
                    copy.deepcopy(vars(module)[field], memo)
                except Exception:
                    where = f"{field!r} of its module {name!r}, a {type(module).__name__},"
                    raise TypeError(f"the model cannot be copied: {where} fails") from error
        raise


@torch.inference_mode(False)
def factorize(
    model: nn.Module,
    ranks: Mapping[str, int | nn.Module | None],
    statistics: "Mapping[str, Statistics] | None" = None,
    *,
    add_bias: bool = False,
) -> nn.Module:
    """A copy of ``model`` in which a pair replaces each layer named in ``ranks``.

    The pairs are those of ``factorize_layer``, whose ``statistics`` are those that
    ``collect_statistics`` returned. At rank None a layer stays as it is; a module in place of a
    rank takes the layer's place. ``model`` itself is never changed.

    Raises a KeyError for an unknown name; else a TypeError or ValueError, as ``factorize_layer``,
    or for two ranks of one shared layer or a weight that another module would keep.
    """
    _check_model(model)
    known, tied = statistics or {}, _tied(model)
    chosen = {name: rank for name, rank in ranks.items() if rank is not None}
    layers = {name: _named_layer(model, name) for name in chosen}
    ranked = [name for name, rank in chosen.items() if not isinstance(rank, nn.Module)]
    first: dict[nn.Module, str] = {}
    for name, layer in layers.items():
        other = first.setdefault(layer, name)
        if chosen[other] != chosen[name]:
            raise ValueError(f"{other!r} and {name!r} are one layer; give it one rank")
        for other in tied.get(name, ()):
            if model.get_submodule(other) not in layers.values():
                text = f"{name!r} shares its weight with {other!r}, which would keep it; untie it:"
                raise ValueError(f"{text} layer.weight = nn.Parameter(layer.weight.clone())")
        if name in ranked:
            _check_rank(chosen[name], layer.weight)
            _check_statistics(name, layer, known.get(name))
    without = [name for name in ranked if name not in known]
    if without and (add_bias or (known and len(without) == len(ranked))):
        raise ValueError(f"no statistics of {without}; there are those of {list(known)[:8]}")
    if without and known:
        text = f"no statistics of {without}, so these get the SVD of their weights"
        warnings.warn(text, stacklevel=3)
    new: dict[nn.Module, nn.Module] = {layers[name]: chosen[name] for name in chosen}
    for name in ranked:
        how = {"statistics": known.get(name), "add_bias": add_bias}
        new[layers[name]] = factorize_layer(layers[name], chosen[name], **how)
    result = _copy(model, new)
    # A pair of full rank is larger on purpose, to see that it computes the same.
    full = any(chosen[name] == min(layers[name].weight.flatten(1).shape) for name in ranked)
    before, after = count_parameters(model), count_parameters(result)
    if after > 1.05 * before and not full:
        text = f"the model has grown from {before:,} to {after:,} parameters"
        warnings.warn(f"{text}; ranks above break_even_rank save nothing", stacklevel=3)
    return result


@torch.no_grad()
def _fit(model, small, name, part, batches, statistics, inputs_of, mask_of=None, ridge=None):
    """Bring ``part`` of ``small`` as near as it can to the output of the layer ``name``.

    By least squares, in float64. The ridge acts as white rows on which the old weight is the
    target, as many as a row has numbers or a share of all rows. Returns ``statistics`` with the
    rows of ``part`` in place of the layer's.
    """
    layer, W = model.get_submodule(name), _as_matrix(part)
    count, t_sum, x_sum, cross, outer = 0, 0.0, 0.0, 0.0, 0.0
    calls: dict[nn.Module, list[tuple]] = {}

    def keep(module, args, kwargs, output):
        # Copies, since what follows may write into them.
        calls[module].append((_input(args, kwargs).clone(), output.clone()))

    for batch in _in_batches(batches):
        for network, place in ((model, layer), (small, part)):
            calls[place] = []
            with place.register_forward_hook(keep, with_kwargs=True), _evaluating(network):
                _run(network, batch, inputs_of)
        mask = _mask_of_layer(name, mask_of(batch) if mask_of else None)
        for (_, output), (x, _) in zip(calls[layer], calls[part]):
            targets = _counted(_output_rows(layer, _float64(output)), mask, name)
            for rows in _row_chunks(part, x, mask, name, torch.float64):
                t, targets = targets[: len(rows)], targets[len(rows) :]
                count += len(rows)
                t_sum, x_sum = t_sum + t.sum(0), x_sum + rows.sum(0)
                cross, outer = cross + t.T @ rows, outer + rows.T @ rows
    sums = {"rows": count, "weight": count, "row_sum": x_sum, "outer_sum": outer}
    known = dataclasses.replace(statistics, **sums)
    C, t_mean = known.covariance(centered=part.bias is not None), t_sum / count
    cross = cross / count
    if part.bias is not None:
        cross -= torch.outer(t_mean, known.mean)
    level = (C.diagonal().mean() or 1) * (len(C) / count if ridge is None else ridge)
    C.diagonal().add_(level)
    A = torch.linalg.solve(C, (cross + level * W).T).T
    part.weight.copy_(A.reshape(part.weight.shape))
    if part.bias is not None:
        part.bias.copy_(t_mean - A @ known.mean)
    return known


@torch.inference_mode(False)
def factorize_sequentially(
    model: nn.Module,
    ranks: Mapping[str, int | None],
    statistics: "Mapping[str, Statistics]",
    batches: Tensor | Iterable[Any],
    *,
    inputs_of: Callable[[Any], Any] | None = None,
    mask_of: Callable[[Any], Any] | None = None,
) -> nn.Module:
    """Like ``factorize``, but each layer is fitted to what the *compressed* model feeds it with.

    Layer by layer, in the order of ``statistics``: the weight that best gives the original's
    output from these rows, by least squares, then its approximation at the layer's rank. So errors
    do not pile up. ``batches`` are read once for each layer.

    Source: the asymmetric reconstruction of Zhang, Zou, He & Sun (2016), arXiv:1505.06798.
    """
    batches = list(batches) if isinstance(batches, Iterator) else batches
    chosen = {name: rank for name, rank in ranks.items() if rank is not None}
    for name, rank in chosen.items():
        _check_rank(rank, _named_layer(model, name).weight)
    if missing := [name for name in chosen if name not in statistics]:
        raise ValueError(f"no statistics of {missing}")
    result = _copy(model, {})
    for name in [name for name in statistics if name in chosen]:
        twin = result.get_submodule(name)
        how = {"statistics": statistics[name], "inputs_of": inputs_of, "mask_of": mask_of}
        known = _fit(model, result, name, twin, batches, **how)
        result = _copy(result, {twin: factorize_layer(twin, chosen[name], known)})
    return result


# --- Statistics ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What calibration data say about one layer: sums, so ``a + b`` is what both say together.

    ``torch.save({name: vars(s) for …})`` saves them; ``Statistics(**d)`` makes each again.
    """

    inputs: int  # how many inputs of the model were seen
    rows: int  # how many rows the layer saw of them
    weight: float  # the sum of the rows' weights; ``rows``, where each counts the same
    row_sum: Tensor  # (n,)
    outer_sum: Tensor  # (n, n), of x xᵀ
    gradient_sum: Tensor | None = None  # (m, m), of g gᵀ; g is the gradient at the layer's output
    damping: float = 0.1  # what is added to the metric's diagonal, as a share of its mean

    def __add__(self, other: "Statistics") -> "Statistics":
        kinds = {(s.damping, s.gradient_sum is None, s.weight == s.rows) for s in (self, other)}
        if len(kinds) > 1:
            raise ValueError("statistics of two kinds cannot be added: loss, weights or damping")
        keys = {key for key, value in vars(self).items() if value is not None} - {"damping"}
        sums = {key: getattr(self, key) + getattr(other, key) for key in keys}
        return dataclasses.replace(self, **sums)

    @property
    def mean(self) -> Tensor:
        return self.row_sum / self.weight

    @property
    def metric(self) -> Tensor | None:
        """E[g gᵀ], summed over the rows of one input."""
        return None if self.gradient_sum is None else self.gradient_sum / self.inputs

    def _without_gradient(self) -> bool:
        return self.gradient_sum is None or not self.gradient_sum.any()

    def covariance(self, centered: bool = True, ridge: bool = False) -> Tensor:
        """Of the rows, about their mean or about 0; with a ridge, as if n more rows were white.

        With few rows a factorization so goes over to the plain SVD, with many the ridge vanishes.
        On lesson 2's network at rank 10, every smaller one is 1 to 8 points behind with 20 images.
        """
        C = self.outer_sum / self.weight
        if centered:
            C = C - torch.outer(self.mean, self.mean)
        if ridge:
            level = C.diagonal().mean() * len(C) / self.rows
            C.diagonal().add_(level if level > 0 else 1)
        return C


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module's own mode is restored afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _in_batches(data: Tensor | Iterable[Any]) -> Iterable[Any]:
    """A tensor in batches of 200 inputs, or of fewer large ones: 13 images of 224×224 pixels."""
    if not isinstance(data, Tensor):
        return data
    size = data[:1].numel()
    return data.split(max(1, min(200, 2**21 // max(1, size))))


def _run(model: nn.Module, batch: Any, inputs_of: Callable[[Any], Any] | None) -> tuple[Any, int]:
    """The model's output on one batch, and the length of the first tensor that goes in, or 0."""
    given = batch if inputs_of is None else inputs_of(batch)
    kwargs = given if isinstance(given, Mapping) else {}
    args = () if kwargs else given if isinstance(given, tuple | list) else (given,)
    sizes = [len(x) for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.ndim]
    if sizes and sizes[0] == 0:
        raise ValueError(f"a batch must hold at least one input, got {given!r}")
    try:
        return model(*args, **kwargs), sizes[0] if sizes else 0
    except TypeError as error:
        error.add_note("inputs_of= says what of a batch goes into the model")
        raise


def _input(args: tuple, kwargs: Mapping[str, Tensor]) -> Tensor:
    return args[0] if args else kwargs["input"]


def _mask_of_layer(name: str, masks: Any) -> Tensor | None:
    """The mask for a layer's rows: of masks by the model's parts, that of the innermost one."""
    if not isinstance(masks, Mapping):
        return masks
    around = [part for part in masks if not part or f"{name}.".startswith(f"{part}.")]
    return masks[max(around, key=len)] if around else None


def _counted(rows: Tensor, mask: Tensor | None, name: str) -> Tensor:
    """Rows (…, n) of a layer as a matrix, without those that the mask leaves out."""
    if mask is not None:
        shape, mask = rows.shape[:-1], mask.bool().to(rows.device)
        if mask.ndim > len(shape) and mask.shape[: len(shape)] == shape:
            mask = mask.flatten(len(shape)).any(-1)  # one row for all tokens of an input
        elif mask.numel() == shape.numel():
            mask = mask.reshape(shape)  # the tokens of all inputs in one line
        if mask.shape != shape[: mask.ndim]:
            raise ValueError(
                f"a mask for {tuple(mask.shape)} inputs or tokens does not fit layer {name!r}, "
                f"whose rows are {tuple(shape)}; mask_of may return one for each part of the model"
            )
        rows = rows[mask]
    return rows.reshape(-1, rows.shape[-1])


def _output_rows(layer: Layer, output: Tensor) -> Tensor:
    """Of images (…, m, h, w) the rows (images, h · w, m); of a linear layer the output itself."""
    if isinstance(layer, nn.Linear):
        return output
    return output.reshape(-1, *output.shape[-3:]).flatten(2).transpose(1, 2)


def _row_chunks(layer, x, mask, name, dtype=torch.float32) -> Iterator[Tensor]:
    """The rows that ``layer`` multiplies when called with ``x``, of this ``dtype`` or a finer one.

    Patches come in pieces of 64 MB, or of one image.
    """
    dtype = torch.promote_types(x.dtype, dtype)
    x = _float64(x) if dtype == torch.float64 else x.detach().to(dtype)
    if isinstance(layer, nn.Linear):
        yield _counted(x, mask, name)
        return
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = x.reshape(-1, *x.shape[-3:])
    patches = layer.weight[0].numel() * x[0, 0].numel() // math.prod(layer.stride)
    size = max(1, 2**24 // max(1, patches))
    for start in range(0, len(x), size):
        images = F.pad(x[start : start + size], layer._reversed_padding_repeated_twice, mode)
        rows = F.unfold(images, layer.kernel_size, layer.dilation, stride=layer.stride)
        some = None if mask is None else mask[start : start + size]
        yield _counted(rows.transpose(1, 2), some, name)


def _add_product(total: Tensor, rows: Tensor, what: str, weights: Tensor | None = None) -> None:
    """Add rowsᵀ · rows to the float64 ``total``, the blocks on and above the diagonal alone.

    That is half of the work, and products of 2,048 rows in float32 are half of it again.
    """
    width = len(total) if len(total) <= 512 else 256
    left = rows if weights is None else rows * weights[:, None]
    for some, others in zip(left.split(2048), rows.split(2048)):
        for start in range(0, len(total), width):
            block = some[:, start : start + width].T @ others[:, start:]
            total[start : start + width, start:] += block.to(total.device)
    if not total.diagonal().isfinite().all():
        raise ValueError(f"the {what} are not all finite")


class _Sums:
    """What is added up for one layer."""

    def __init__(self, name: str, layer: Layer, with_loss: bool) -> None:
        m, n = layer.weight.flatten(1).shape
        zero = _float64(layer.weight.new_zeros(()))
        self.name, self.layer, self.rows, self.weight, self.shift = name, layer, 0, 0.0, None
        self.row_sum, self.outer_sum = zero.repeat(n), zero.repeat(n, n)
        self.gradient_sum = zero.repeat(m, m) if with_loss else None

    def add_rows(self, rows: Tensor, weights: Tensor | None = None) -> None:
        if not len(rows):
            return
        if self.shift is None:  # from a large mean, float32 would lose the digits of the spread
            self.shift = rows[:2048].mean(0)
        rows = rows - self.shift
        _add_product(self.outer_sum, rows, f"inputs of the layer {self.name!r}", weights)
        total = rows.sum(0) if weights is None else weights @ rows
        self.row_sum += total.to(self.row_sum)
        self.rows += len(rows)
        self.weight += len(rows) if weights is None else weights.cpu().double().sum().item()

    def add_gradient(self, gradient: Tensor, mask: Tensor | None, weights: Tensor | None) -> None:
        gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        rows = _counted(_output_rows(self.layer, gradient), mask, self.name)
        _add_product(self.gradient_sum, rows, f"gradients of the layer {self.name!r}")
        if weights is not None:
            weights += rows.square().sum(1)

    def statistics(self, inputs: int, damping: float) -> Statistics:
        if not self.rows:
            raise ValueError(f"no row of the layer {self.name!r} counts")
        weight = self.weight or self.rows  # 0, if weighted and no gradient has come
        # Undo the shift, in float64 and in place: Σ x xᵀ from Σ (x - s)(x - s)ᵀ.
        shift = self.shift.to(self.row_sum)
        outer = self.outer_sum.addr_(self.row_sum, shift).addr_(shift, self.row_sum)
        outer.addr_(shift, self.weight * shift)
        for total in (outer, self.gradient_sum):  # what is above the diagonal goes below it, too
            if total is not None:
                total.triu_().add_(total.triu(1).T)
        row_sum, gradients = self.row_sum + self.weight * shift, self.gradient_sum
        return Statistics(inputs, self.rows, weight, row_sum, outer, gradients, damping)


def _scalars(output, loss, temperature, mask, generator) -> Iterable[Tensor]:
    """Scalars whose gradients' outer products add up to the metric, or do so on average."""
    logits = getattr(output, "logits", output)
    axes = ["inputs", "classes"] if loss == "classes" else ["inputs", "tokens", "vocabulary"]
    shape = tuple(logits.shape) if isinstance(logits, Tensor) else ()
    if len(shape) != len(axes) or shape[-1] == 1:
        text = f"loss={loss!r} needs logits ({', '.join(axes)}), got {shape or type(logits)}"
        raise ValueError(f"{text}; one logit is no choice. Or give a function as loss")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if loss == "classes":
        log_p = (logits / temperature).log_softmax(1)
        return -(log_p.detach().exp().sqrt() * log_p).sum(0)
    logits = _counted(logits, mask, "of the logits")
    p = logits.detach().softmax(1).cpu()
    drawn = torch.multinomial(p, 1, generator=generator)[:, 0].to(logits.device)
    return [F.cross_entropy(logits, drawn, reduction="sum")]


def collect_statistics(
    model: nn.Module,
    batches: Tensor | Iterable[Any],
    names: Iterable[str] | None = None,
    *,
    loss: str | Callable[[Any], Iterable[Tensor]] | None = None,
    temperature: float = 2.0,
    inputs_of: Callable[[Any], Any] | None = None,
    mask_of: Callable[[Any], Any] | None = None,
    count_of: Callable[[Any], int] | None = None,
    damping: float = 0.1,
    weighted: bool = False,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, Statistics]:
    """Statistics of the named layers, or of ``layer_names(model)``, in the order of their calls.

    Args:
        batches: a tensor (N, …) or any iterable, such as a DataLoader. The model is called once
            for each batch, in evaluation mode; a tuple or list are its arguments, a dictionary
            its keywords.
        loss: with one, also the loss metric: the covariance of its gradient at the layer's output.
            ``"classes"``: the cross-entropy of logits (N, classes), at every class in turn,
            weighted by its probability under softmax(logits / temperature), without labels.
            ``"tokens"``: that of logits (N, T, V), at one token for each position, drawn with
            ``seed`` from the model's own prediction; memory for four tensors as the logits.
            Or a function that makes scalars of the model's output.
        inputs_of: what of a batch goes in; for a DataLoader of (x, y), ``lambda batch: batch[0]``.
        mask_of: of a batch, a mask (N,) or (N, T), laid out as the layers' inputs are; 0 for rows
            that must not count, such as padding. Or one for each part of the model,
            ``{"encoder": …, "decoder": …}``.
        count_of: how many inputs a batch holds; if not given, the length of its first tensor.
        damping: what ``Statistics`` adds to the metric's diagonal, as a share of its mean.
        weighted: with a loss, let each row count as its squared gradient. See lesson 10.

    Beside what the model needs, memory holds a float64 matrix (n, n) for each layer, with a loss
    one (m, m) too; patches in pieces of 64 MB or one image; if weighted, all rows of a batch.
    Raises a KeyError or TypeError as ``factorize``; a ValueError for data or arguments that do not
    fit, NaN, or a named layer that is not called.

    Source: Martens & Grosse (2015), arXiv:1503.05671; the metric is their output factor.
    """
    if isinstance(loss, str) and loss not in ("classes", "tokens"):
        raise ValueError(f'loss must be None, "classes", "tokens" or a function, got {loss!r}')
    if not (temperature > 0 and damping > 0):
        raise ValueError(f"temperature and damping must be positive, got {temperature}, {damping}")
    if weighted and loss is None:
        raise ValueError("rows are weighted by their gradients, so give a loss too")
    _check_model(model)
    chosen = layer_names(model) if names is None else names
    layers = {name: _named_layer(model, name) for name in chosen}
    if not layers:
        raise ValueError(f"no layer of this {type(model).__name__} can be factorized")
    generator = torch.Generator().manual_seed(seed)
    anchor = torch.zeros((), requires_grad=True)
    sums: dict[str, _Sums] = {}
    waiting: list[tuple[_Sums, Tensor, Tensor]] = []  # rows whose weights are still to come
    masks, mask, inputs, start = None, None, 0, time.perf_counter()

    def look(name: str, layer: Layer, args: tuple, kwargs: dict, output: Tensor) -> Tensor | None:
        nonlocal mask
        if torch._C._current_graph_task_id() != -1:
            return None  # a checkpointed block that runs again, in the backward pass
        if loss is not None and not torch.is_grad_enabled():
            raise RuntimeError(
                f"no gradient reaches the layer {name!r}: it is called under torch.no_grad() or "
                "in a checkpoint with use_reentrant=True"
            )
        each = sums[name] = sums.get(name) or _Sums(name, layer, loss is not None)
        mask, weights = _mask_of_layer(name, masks), None
        chunks = _row_chunks(layer, _input(args, kwargs), mask, name)
        if weighted:
            rows = torch.cat(list(chunks)).clone()
            weights = rows.new_zeros(len(rows))
            waiting.append((each, rows, weights))
        else:
            for rows in chunks:
                each.add_rows(rows)
        if loss is None:
            return None
        # A copy, since what follows may write into it. By way of the anchor it needs a gradient,
        # even if no weight does, and is all that the backward pass has to visit.
        output = output + anchor
        output.register_hook(partial(each.add_gradient, mask=mask, weights=weights))
        return output

    with contextlib.ExitStack() as stack:
        for name, layer in layers.items():
            hook = layer.register_forward_hook(partial(look, name), with_kwargs=True)
            stack.enter_context(hook)
        stack.enter_context(_evaluating(model))
        stack.enter_context(torch.set_grad_enabled(loss is not None))
        for number, batch in enumerate(_in_batches(batches)):
            masks = None if mask_of is None else mask_of(batch)
            for part in masks if isinstance(masks, Mapping) else ():
                model.get_submodule(part)  # an error, if there is no such part
            try:
                output, length = _run(model, batch, inputs_of)
                if isinstance(loss, str) and sums:  # mask: of the layer that was called last
                    scalars = _scalars(output, loss, temperature, mask, generator)
                else:
                    scalars = loss(output) if loss and sums else ()
                for scalar in scalars:
                    if not scalar.requires_grad:
                        raise ValueError("the loss does not depend on any of the layers")
                    torch.autograd.grad(scalar, anchor, retain_graph=True, allow_unused=True)
                output = scalars = scalar = None  # frees the graph before the next forward pass
                for each, rows, weights in waiting:
                    each.add_rows(rows, weights)
                waiting.clear()
            except ValueError as error:
                raise ValueError(f"{error} (batch {number})") from error
            count = length if count_of is None else count_of(batch)
            if not count:
                raise ValueError(f"a batch holds no tensor, so give count_of; got {batch!r}")
            inputs += count
            if progress:
                text = f"\r{number + 1} batches, {time.perf_counter() - start:.0f} s "
                print(text, end="", file=sys.stderr, flush=True)
    if progress:
        print(file=sys.stderr)
    if inputs == 0:
        raise ValueError("batches is empty; give at least one")
    if missing := [name for name in layers if name not in sums]:
        if names is not None:
            raise ValueError(f"the model does not call {missing}; leave them out")
        warnings.warn(f"no statistics of {missing}, which the model does not call", stacklevel=2)
    found = {name: each.statistics(inputs, damping) for name, each in sums.items()}
    if dead := [name for name, each in found.items() if loss and each._without_gradient()]:
        text = f"the loss does not depend on {dead}: rank_options keeps these layers dense, and "
        warnings.warn(f"{text}factorize makes their output's error least", stacklevel=2)
    return found


# --- Budgets ------------------------------------------------------------------------------------


def break_even_rank(out_features: int, in_features: int) -> int:
    """The largest rank r with r(m + n) < mn, at which a pair holds fewer weights; may be 0."""
    return (out_features * in_features - 1) // (out_features + in_features)


def truncation_errors(layer: Layer, statistics: Statistics | None = None) -> Tensor:
    """The least error at each rank from 0 to full, which is what ``factorize_layer`` leaves.

    Without statistics it is ‖W - W_r‖². With them it is, summed over the rows of one input, the
    squared change of the output or, with a loss metric, twice the change of the loss to second
    order, as if rows were independent; both with ridge and damping.
    """
    _check_statistics("the layer", layer, statistics)
    matrix, scale = _as_matrix(layer), 1.0
    if statistics is not None:
        matrix, _ = _whitened(layer, statistics, layer.bias is not None)
        if statistics._without_gradient():  # a metric is summed over the rows of an input already
            scale = statistics.rows / statistics.inputs
    gram = matrix @ matrix.T if len(matrix) <= matrix.shape[1] else matrix.T @ matrix
    squares = scale * torch.linalg.eigvalsh(gram).clamp(min=0)  # from the smallest to the largest
    return F.pad(squares.cumsum(0).flip(0), (0, 1))


def rank_options(
    model: nn.Module,
    statistics: Mapping[str, Statistics] | None = None,
    *,
    cost: str = "weights",
    multiple_of: int = 1,
) -> dict[str, dict[int | None, tuple[float, float]]]:
    """What each rank of each layer costs, and its error: ``{name: {rank: (cost, error)}}``.

    The layers are those of ``statistics`` or of ``layer_names(model)``, without tied ones; the
    ranks are multiples of ``multiple_of`` that save, and None for the layer as it is, the only one
    if the loss does not depend on it. Costs are weights, or MACs for one input; errors are those
    of ``truncation_errors``. A warning names the weights that do not count.
    """
    if cost not in ("weights", "macs") or (cost == "macs" and statistics is None):
        raise ValueError(f'cost must be "weights" or, with statistics, "macs"; got {cost!r}')
    known = dict.fromkeys(layer_names(model)) if statistics is None else statistics
    if not known:
        raise ValueError(f"no layer of this {type(model).__name__} can be factorized")
    tied = _tied(model)
    layers = {name: _named_layer(model, name) for name in known if name not in tied}
    counted = {id(layer.weight) for layer in layers.values()}
    if len(counted) < len(layers):
        raise ValueError(f"some of {list(layers)} share a weight; give statistics of one")
    others = [name for name, p in model.named_parameters() if p.ndim > 1 and id(p) not in counted]
    if others:
        more = f" and {len(others) - 8} more" if len(others) > 8 else ""
        warnings.warn(f"the budget does not count {', '.join(others[:8])}{more}", stacklevel=2)
    options: dict[str, dict] = {}
    for name, layer in layers.items():
        seen = known[name]
        _check_statistics(name, layer, seen)
        times = seen.rows / seen.inputs if cost == "macs" else 1
        m, n = layer.weight.flatten(1).shape
        options[name] = {None: (m * n * times, 0.0)}
        if seen is not None and seen.gradient_sum is not None and seen._without_gradient():
            continue
        errors = truncation_errors(layer, seen).tolist()
        for rank in range(multiple_of, break_even_rank(m, n) + 1, multiple_of):
            options[name][rank] = (rank * (m + n) * times, errors[rank])
    return options


def allocate_ranks(
    options: Mapping[str, Mapping[Hashable, tuple[float, float]]], budget: float
) -> dict[str, Hashable]:
    """One option of each name, with costs of at most ``budget`` and the least sum of errors.

    ``options`` is ``{name: {option: (cost, error)}}``. Dynamic programming: the least error of the
    first layers for each sum that they may spend. Exact for whole-number costs, as long as there
    are at most 200,000 such sums and 3·10⁹ of them times options; otherwise costs are rounded up
    to coarser units, and about one unit for each layer can remain.

    Source: Kellerer, Pferschy & Pisinger (2004), *Knapsack Problems*.
    """
    tables = [np.array(list(table.values()), dtype=float).T for table in options.values()]
    least, most = (sum(end(cost) for cost, _ in tables) for end in (np.min, np.max))
    if budget < least * (1 - 1e-12):
        raise ValueError(f"budget {budget} is too small: the cheapest options cost {least:.0f}")
    room = min(budget, most) - least  # what is there to share out
    # What each option costs beyond the cheapest one of its layer, in units, rounded up.
    steps = [cost - cost.min() for cost, _ in tables]
    every = np.concatenate([[0.0], *steps])
    limit = min(200_000, 3e9 / len(every))
    unit = math.gcd(*every.astype(int)) if (every % 1 == 0).all() else room / limit
    unit = unit * max(1, math.ceil(room / unit / limit)) if unit > 0 else 1
    steps = [np.ceil(step / unit - 1e-9).astype(int) for step in steps]
    spend = int(room / unit + 1e-9) if budget < most else sum(step.max() for step in steps)
    # best[k][s] is the least error of the first k layers, if they spend at most s units.
    best = [np.zeros(max(0, spend) + 1)]
    for (_, errors), step in zip(tables, steps):
        total = np.full_like(best[0], np.inf)
        for error, s in zip(errors, step):
            if s < len(total):
                np.minimum(total[s:], best[-1][: len(total) - s] + error, out=total[s:])
        best.append(total)
    left, plan = len(best[0]) - 1, []
    for (_, errors), step, total in list(zip(tables, steps, best))[::-1]:  # walk back
        sums = np.where(step <= left, total[np.maximum(left - step, 0)] + errors, np.inf)
        plan.append(int(sums.argmin()))
        left = left - step[plan[-1]]
    return {name: list(options[name])[k] for name, k in zip(options, plan[::-1])}


# --- Counting -----------------------------------------------------------------------------------


def _correct(output: Any, y: Tensor) -> int:
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise TypeError(f"the model must return logits, got a {type(logits).__name__}")
    shape = tuple(logits.shape)
    if len(shape) != 2 or shape[0] != len(y) or shape[1] < 2 or logits.isnan().any():
        text = f"logits must be ({len(y)}, two or more classes) without NaN"
        raise ValueError(f"{text}, got shape {shape}")
    return int((logits.argmax(1) == y).sum())


def _check_labels(x: Tensor, y: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor of inputs, got a {type(x).__name__}")
    if len(x) == 0 or y.shape != (len(x),):
        shapes = f"got {tuple(x.shape)} and {tuple(y.shape)}"
        raise ValueError(f"x must hold inputs, and y a label for each; {shapes}")


def accuracy(model: nn.Module, x: Tensor, y: Tensor, batch_size: int = 1000) -> float:
    """The fraction of inputs ``x`` (N, …) whose largest logit is at the label ``y`` (N,)."""
    _check_labels(x, y)
    batches = zip(x.split(batch_size), y.split(batch_size))
    with _evaluating(model):
        return sum(_correct(model(xb), yb) for xb, yb in batches) / len(x)


def rank_sweep(
    model: nn.Module,
    name: str,
    x: Tensor,
    y: Tensor,
    ranks: Iterable[int] | None = None,
    batch_size: int = 10_000,
) -> dict[int, float]:
    """The accuracy on ``x``, ``y`` at every rank of one layer (or at ``ranks``), by rank.

    As ``accuracy(factorize(model, {name: r}), x, y)`` for each r. For a linear layer of a plain
    ``nn.Sequential``, one SVD and one pass do: the output at rank r is that at r - 1 plus one
    outer product, and only the modules behind the layer run again.
    """
    layer = _named_layer(model, name)
    full = min(layer.weight.flatten(1).shape)
    ranks = range(1, full + 1) if ranks is None else ranks
    ranks = sorted({_check_rank(rank, layer.weight) for rank in ranks})
    _check_labels(x, y)
    parts = [part for part in model._modules.values() if layer in part.modules()]  # just once
    plain = type(model) is nn.Sequential and isinstance(layer, nn.Linear) and parts == [layer]
    hooks = model._forward_hooks or model._forward_pre_hooks or "forward" in vars(model)
    half = layer.weight.element_size() < 4  # in which the terms would add up too coarsely
    if not plain or hooks or half:
        networks = ((rank, _copy(model, {layer: factorize_layer(layer, rank)})) for rank in ranks)
        return {rank: accuracy(network, x, y, batch_size) for rank, network in networks}
    position = list(model).index(layer)
    A, B = truncated_svd(layer.weight, full)
    correct = dict.fromkeys(ranks, 0)
    with _evaluating(model):
        for xb, yb in zip(x.split(batch_size), y.split(batch_size)):
            codes = model[:position](xb) @ B.T  # what the rank-1 terms read off each input
            outputs = codes.new_zeros(*codes.shape[:-1], len(A))
            if layer.bias is not None:
                outputs += layer.bias
            for rank in range(1, max(ranks, default=0) + 1):
                outputs += codes[..., rank - 1, None] * A[:, rank - 1]
                if rank in correct:  # a copy, since the next module may write into it
                    correct[rank] += _correct(model[position + 1 :](outputs.clone()), yb)
    return {rank: count / len(x) for rank, count in correct.items()}


def count_parameters(module: nn.Module) -> int:
    """The number of weights and biases; a shared one counts once."""
    return sum(p.numel() for p in module.parameters())


def count_macs(model: nn.Module, *args: Any, **kwargs: Any) -> int:
    """The multiply-accumulates of ``model(*args, **kwargs)``, counted by PyTorch while it runs.

    Matrix products, convolutions and attention count, nothing else; recurrent layers are refused.
    Fused kernels are off meanwhile, since PyTorch cannot count them; the products are the same.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel  # here, since they are slow to import
    from torch.utils.flop_counter import FlopCounterMode

    def refuse(*args: Any, **kwargs: Any) -> int:
        raise ValueError("count_macs cannot count recurrent layers")

    recurrent = ("mkldnn_rnn_layer", "_cudnn_rnn", "miopen_rnn")
    rules = {getattr(torch.ops.aten, name): refuse for name in recurrent}
    counter = FlopCounterMode(display=False, custom_mapping=rules)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with _evaluating(model), sdpa_kernel(SDPBackend.MATH), counter:
            model(*args, **kwargs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops() // 2


# --- Saving -------------------------------------------------------------------------------------

_ARGUMENTS = {  # what builds a part of a LowRank again
    nn.Linear: ("in_features", "out_features"),
    nn.Conv2d: ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation",
                "groups", "padding_mode"),
}  # fmt: skip


def _slots(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers under all of their names, with buffers that no state_dict holds."""
    parameters = model.named_parameters(remove_duplicate=False)
    return dict(parameters) | dict(model.named_buffers(remove_duplicate=False))


def save_factorized(model: nn.Module, path: str | os.PathLike) -> None:
    """Write ``model`` to a safetensors file, with what ``load_factorized`` builds its pairs from.

    Tied weights are written once. The file takes its place when it is complete, so an interrupted
    call leaves what was there.
    """
    from safetensors.torch import save_file

    pairs: dict[str, list] = {}
    for name, module in model.named_modules():
        for part in module if isinstance(module, LowRank) else ():
            fields = {key: getattr(part, key) for key in _ARGUMENTS[type(part)]}
            fields |= {"type": type(part).__name__, "bias": part.bias is not None}
            pairs.setdefault(name, []).append(fields)
    slots, numbers, tied, names = _slots(model), {}, {}, {}
    empty = [name for name, tensor in slots.items() if tensor.is_meta]
    if empty := empty + [name for name in model.state_dict() if name not in slots]:
        raise ValueError(f"{empty[0]!r} holds no numbers to save")
    for name, tensor in slots.items():
        first = names.setdefault(id(tensor), name)
        if first == name:
            numbers[name] = tensor.detach().clone(memory_format=torch.contiguous_format)
        else:
            tied[name] = first
    structure = json.dumps({"version": 1, "layers": pairs, "tied": tied})
    path = Path(path)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".saving-") as folder:
        file = Path(folder) / path.name
        save_file(numbers, file, {"format": "pt", "lrf": structure})
        os.replace(file, path)


@torch.inference_mode(False)
def load_factorized(model: nn.Module, path: str | os.PathLike) -> nn.Module:
    """A copy of ``model`` with the pairs and the numbers that ``save_factorized`` wrote.

    ``model`` is the dense one: fresh, pretrained, or on the meta device; it is never changed.
    Pairs are built by their sizes, without an SVD. Numbers take the dtype and the device of
    ``model``, those for the meta device stay as they are in the file.

    Raises an OSError, or a ValueError for a file that is damaged, foreign, or not for this model.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            structure = json.loads((file.metadata() or {}).get("lrf", "{}"))
            numbers = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged, or is no safetensors file: {error}") from error
    if structure.get("version") != 1:
        raise ValueError(f"{path} was not written by save_factorized, or by another version of it")
    wrong = f"{path} is not for this {type(model).__name__}: "
    modules = dict(model.named_modules(remove_duplicate=False))
    new: dict[nn.Module, nn.Module] = {}
    for name, parts in structure["layers"].items():
        with torch.device("meta"):  # sizes without numbers
            pair = LowRank(*(getattr(nn, part.pop("type"))(**part) for part in parts))
        layer = modules.get(name)
        if type(layer) not in (nn.Linear, nn.Conv2d) or layer.weight.shape != pair.weight.shape:
            raise ValueError(f"{wrong}{name!r} should have {tuple(pair.weight.shape)}, is {layer}")
        pair = pair.to(layer.weight.dtype).to_empty(device=layer.weight.device)
        new[layer] = _in_place_of(layer, pair)
    result, tied, made = _copy(model, new), structure["tied"], {}
    slots = _slots(result)
    if extra := (set(numbers) | set(tied)) - set(slots):
        raise ValueError(f"{wrong}it has no {sorted(extra)[:8]}")
    state = result.state_dict()
    for name, old in slots.items():
        if name not in state and not old.is_meta:
            continue  # a buffer that the model makes by itself
        source = tied.get(name, name)
        value = numbers.get(source)
        got = "nothing" if value is None else tuple(value.shape)
        if got != tuple(old.shape):
            raise ValueError(f"{wrong}{name!r} should have {tuple(old.shape)}, has {got}")
        if source not in made:
            value = value if old.is_meta else value.to(old)
            parameter = isinstance(old, nn.Parameter)
            made[source] = nn.Parameter(value, old.requires_grad) if parameter else value
        owner, _, field = name.rpartition(".")
        setattr(result.get_submodule(owner), field, made[source])
    return result
