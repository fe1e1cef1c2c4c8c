"""Low-rank factorization of PyTorch layers: decompose, choose ranks, replace, count.

Conventions, used everywhere: a layer is a matrix ``W`` (m, n) that acts on rows (see ``lrf_layers``). A rank-r
factorization is ``W ≈ A @ B`` with ``A`` (m, r) and ``B`` (r, n); as layers, first B, then A with the bias. Accuracies
are fractions in [0, 1]. 1 MAC is one multiply-accumulate (2 FLOPs). Decompositions run in float64, on the CPU.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lrf_layers import (
    Layer,
    LowRank,
    Statistics,
    as_matrix,
    as_rows,
    check_int,
    check_rank,
    collect,
    evaluating,
    in_batches,
    layer_names,
    named_layer,
    run,
)

# ---------------------------------------------------------------------------------------------------------------------
# Factorization
# ---------------------------------------------------------------------------------------------------------------------


def truncated_svd(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best rank-``rank`` approximation of ``weight`` (m, n) as ``A`` (m, rank) and ``B`` (rank, n).

    The singular values are shared evenly, ``A = U √S`` and ``B = √S Vᵀ``, so that both factors have the same norm. The
    factors of a smaller rank r are ``A[:, :r]`` and ``B[:r]``: one call serves all ranks. They keep dtype and device.

    Raises:
        TypeError, ValueError: ``weight`` is not a matrix of finite real numbers, or ``rank`` not from 1 to min(m, n).

    Source: Eckart & Young (1936), doi:10.1007/BF02288367.
    """
    if weight.ndim != 2:
        raise ValueError(f"weight must be a matrix, got shape {tuple(weight.shape)}")
    check_rank(rank, weight)
    if not weight.is_floating_point():
        raise TypeError(f"weight must hold real floating-point numbers, got {weight.dtype}")
    if not weight.isfinite().all():
        raise ValueError(f"the {weight.shape[0]}×{weight.shape[1]} weight holds NaN or infinity")
    U, S, Vh = torch.linalg.svd(weight.detach().cpu().double(), full_matrices=False)
    root = S[:rank].sqrt()
    return (U[:, :rank] * root).to(weight), (root[:, None] * Vh[:rank]).to(weight)


def _response(layer: Layer, statistics: Statistics | None) -> tuple[Tensor, Tensor, Tensor]:
    """G^½ W C^½, G^½ and G^-½; C is the covariance of the rows with the ridge, G the damped metric, or 1 without them.

    The sum of the squared singular values beyond the r-th is the least error E‖G^½ (W - W_r) x‖² of any W_r of rank r.
    """
    W, (m, n) = as_matrix(layer), as_matrix(layer).shape
    root = inverse = torch.eye(m, dtype=torch.float64, device="cpu")
    if statistics is None:
        return W, root, inverse
    G = statistics.metric
    if statistics.outer_sum.shape != (n, n) or (G is not None and len(G) != m):
        raise ValueError(f"these statistics are not those of a layer with a {m}×{n} weight")
    if G is not None:
        if not (statistics.damping > 0 and G.trace() > 0):
            raise ValueError(f"damping and metric must be positive, got {statistics.damping}, trace {G.trace()}")
        values, Q = torch.linalg.eigh(G + statistics.damping * G.diagonal().mean() * root)
        root, inverse = Q * values.sqrt() @ Q.T, Q * values.rsqrt() @ Q.T
    C = statistics.covariance(centred=layer.bias is not None, ridge=True)  # a bias makes up for the mean
    return root @ W @ torch.linalg.cholesky(C), root, inverse


def errors(layer: Layer, statistics: Statistics | None = None) -> Tensor:
    """The least error at each rank from 0 to full, which is what ``factorize_layer`` leaves.

    Without statistics it is ‖W - W_r‖². With them it is, summed over the rows of one input, the squared change of the
    output or, with a loss metric, twice the change of the loss to second order, as if rows were independent; both with
    ridge and damping.
    """
    squares = torch.linalg.svdvals(_response(layer, statistics)[0]).square()
    if statistics is not None and statistics.metric is None:  # the metric is a sum over rows already
        squares = squares * (statistics.rows / statistics.inputs)
    return F.pad(squares.flip(0).cumsum(0).flip(0), (0, 1))


def factorize_layer(layer: Layer, rank: int, statistics: Statistics | None = None) -> LowRank:
    """``Linear(n, rank, bias=False)`` and ``Linear(rank, m)``, or a k×k convolution to ``rank`` and a 1×1, for a layer.

    They keep the layer's bias, dtype, device and mode. At full rank, min(m, n), they compute what it computes. With
    ``statistics`` not the error of the weight is least but that of the *output* on such inputs, in the statistics'
    metric if they have one, and the bias makes up for the mean of what is lost. A layer without a bias gets none.

    Raises:
        TypeError: the layer is not exactly an ``nn.Linear`` or ``nn.Conv2d``, or ``rank`` is not an int.
        ValueError: ``rank`` is out of range, the statistics are another layer's, or the layer cannot be factorized.

    Source: Zhang, Zou, He & Sun (2016), arXiv:1505.06798, for the response PCA.
    """
    W = as_matrix(named_layer(layer))
    check_rank(rank, W)
    if statistics is None or rank == min(W.shape):
        A, B = truncated_svd(W, rank)
    else:
        response, root, inverse = _response(layer, statistics)
        U = torch.linalg.svd(response, full_matrices=False)[0][:, :rank]
        Q_A, R_A = torch.linalg.qr(inverse @ U)
        Q_B, R_B = torch.linalg.qr((U.T @ root @ W).T)
        A, B = truncated_svd(R_A @ R_B.T, rank)  # balances the factors, by way of their small core
        A, B = Q_A @ A, B @ Q_B.T
    biased, fields = layer.bias is not None, vars(layer)
    build = partial(nn.utils.skip_init, type(layer), dtype=layer.weight.dtype, device=layer.weight.device)
    if isinstance(layer, nn.Linear):
        pair = LowRank(build(layer.in_features, rank, bias=False), build(rank, layer.out_features, bias=biased))
    else:
        geometry = {key: fields[key] for key in ("kernel_size", "stride", "padding", "dilation", "padding_mode")}
        down = build(layer.in_channels, rank, bias=False, **geometry)
        pair = LowRank(down, build(rank, layer.out_channels, 1, bias=biased))
    vars(pair).update({key: value for key, value in fields.items() if not key.startswith("_")})
    pair.train(layer.training).requires_grad_(layer.weight.requires_grad)
    with torch.no_grad():
        pair[0].weight.copy_(B.reshape(pair[0].weight.shape))
        pair[1].weight.copy_(A.reshape(pair[1].weight.shape))
        if biased:
            lost = 0 if statistics is None else (W - A @ B) @ statistics.mean
            pair.bias.copy_(layer.bias.cpu().double() + lost)
            pair.bias.requires_grad_(layer.bias.requires_grad)
    return pair


def factorize(
    model: nn.Module,
    ranks: Mapping[str, int | nn.Module | None],
    statistics: Mapping[str, Statistics] | None = None,
    *,
    inputs: Tensor | Iterable[Any] | None = None,
    **how: Any,
) -> nn.Module:
    """A copy of ``model`` in which each layer named in ``ranks`` is replaced by ``factorize_layer(layer, rank)``.

    Names are those of ``model.named_modules()``. At rank None a layer stays as it is; a module in place of a rank takes
    the layer's place. Everything is checked before anything is copied; ``model`` itself is never changed.

    Args:
        statistics: what ``collect`` returned. A layer without statistics gets the truncated SVD of its weight.
        inputs: in place of statistics, calibration data for ``collect``, with its options in ``how``.

    Raises:
        KeyError: no module has that name.
        TypeError, ValueError: as in ``factorize_layer`` and ``collect``.
    """
    layers = {name: named_layer(model, name) for name, rank in ranks.items() if rank is not None}
    chosen = {name: ranks[name] for name in layers if not isinstance(ranks[name], nn.Module)}
    for name, rank in chosen.items():
        check_rank(rank, as_matrix(layers[name]))
    if (how and inputs is None) or (inputs is not None and statistics is not None):
        raise ValueError(f"give either statistics, or inputs with options of collect, not both; options: {sorted(how)}")
    known = (statistics or {}) if inputs is None else collect(model, inputs, chosen, **how)
    new = {name: factorize_layer(layers[name], rank, known.get(name)) for name, rank in chosen.items()}
    # deepcopy looks up by id what it has copied already: so each pair takes its layer's place wherever that is used.
    return copy.deepcopy(model, {id(layer): new.get(name, ranks[name]) for name, layer in layers.items()})


def factorize_sequentially(
    model: nn.Module, ranks: Mapping[str, int], inputs: Tensor | Iterable[Any], **how: Any
) -> nn.Module:
    """Like ``factorize`` with ``inputs``, but each layer is fitted to what it is fed with in the *compressed* model.

    Layer by layer, in the order of their calls: the weight that best gives the original's output from these rows, by
    least squares, then its approximation at the layer's rank. So errors do not pile up. The ridge of ``Statistics``
    keeps the old weight where the rows say nothing. ``inputs`` are read once for each layer, and once before.

    Source: the asymmetric reconstruction of Zhang, Zou, He & Sun (2016), arXiv:1505.06798.
    """
    inputs = list(inputs) if isinstance(inputs, Iterator) else inputs
    for name, rank in ranks.items():
        check_rank(rank, as_matrix(named_layer(model, name)))
    select, keep = how.get("select"), how.get("keep")
    result = copy.deepcopy(model)
    for name, dense in collect(model, inputs, ranks, **how).items():
        layer, twin = named_layer(model, name), result.get_submodule(name)
        W, biased, ours, cross = as_matrix(layer), layer.bias is not None, 0, 0
        for batch in in_batches(inputs):
            mask, seen = None if keep is None else keep(batch), {layer: [], twin: []}

            def look(layer: Layer, args: tuple, kwargs: dict, mask: Tensor | None = mask, seen: dict = seen) -> None:
                seen[layer].append(as_rows(layer, args, kwargs, mask))

            for network, place in ((model, layer), (result, twin)):
                with place.register_forward_pre_hook(look, with_kwargs=True), evaluating(network):
                    run(network, batch, select)
            x, y = torch.cat(seen[layer]), torch.cat(seen[twin])
            cross = cross + x.T @ y
            ours = ours + torch.cat([y.sum(0)[None], y.T @ y])
        known = Statistics(dense.inputs, dense.rows, ours[0], ours[1:], dense.gradient_sum, dense.damping)
        C = known.covariance(biased, ridge=True)
        cross = cross / dense.rows - torch.outer(dense.mean, known.mean) * biased + C - known.covariance(biased)
        best = copy.deepcopy(layer)
        with torch.no_grad():
            best.weight.copy_(torch.linalg.solve(C, (W @ cross).T).T.reshape(best.weight.shape))
            if biased:
                best.bias.add_(W @ dense.mean - as_matrix(best) @ known.mean)
        result = copy.deepcopy(result, {id(twin): factorize_layer(best, ranks[name], known)})
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Budgets
# ---------------------------------------------------------------------------------------------------------------------


def break_even_rank(out_features: int, in_features: int) -> int:
    """The largest rank r with r(m + n) < mn, at which two factors hold fewer weights than the matrix; may be 0."""
    m, n = (check_int(size, 1, math.inf, "a layer size") for size in (out_features, in_features))
    return (m * n - 1) // (m + n)


def options(
    model: nn.Module, statistics: Mapping[str, Statistics] | None = None, *, cost: str = "weights"
) -> dict[str, dict[int | None, tuple[float, float]]]:
    """For each layer what each rank costs, and the error that it leaves: ``{name: {rank: (cost, error)}}``.

    The layers are those of ``statistics`` or of ``layer_names(model)``; the ranks are those that save, and None for the
    layer as it is. Costs are weights, a shared layer's once, or MACs for one input, every call and position counted.
    Errors are those of ``errors``. Biases, and whatever is not such a layer, do not count; a warning names the weights
    that are left out.

    Raises:
        ValueError: no such ``cost``; MACs without statistics; or a weight that another module holds too, so that a pair
            would be one more copy.
    """
    if cost not in ("weights", "macs") or (cost == "macs" and statistics is None):
        raise ValueError(f'cost must be "weights" or, with statistics, "macs"; got {cost!r}')
    holders = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    layers = {name: named_layer(model, name) for name in (layer_names(model) if statistics is None else statistics)}
    holders.update(id(layer.weight) for layer in layers.values())  # by now each once as a module's, once as a name's
    if tied := [name for name, layer in layers.items() if holders[id(layer.weight)] > 2]:
        raise ValueError(f"the weights of {tied} have other modules or names too; give statistics without these layers")
    counted = {id(layer.weight) for layer in layers.values()}
    if others := [name for name, p in model.named_parameters() if p.ndim > 1 and id(p) not in counted]:
        warnings.warn(f"the budget does not count {', '.join(others)}", stacklevel=2)
    result = {}
    for name, layer in layers.items():
        known = None if statistics is None else statistics[name]
        times, left = (known.rows / known.inputs if cost == "macs" else 1), errors(layer, known).tolist()
        m, n = as_matrix(layer).shape
        ranks = range(1, break_even_rank(m, n) + 1)
        result[name] = {None: (m * n * times, 0.0)} | {r: (r * (m + n) * times, left[r]) for r in ranks}
    return result


def allocate(options: Mapping[str, Mapping[Hashable, tuple[float, float]]], budget: float) -> dict[str, Hashable]:
    """One option of each name, with costs that add up to at most ``budget`` and errors to the least sum; exact.

    ``options`` is ``{name: {option: (cost, error)}}``. A price on cost bounds from below what a partial choice can
    still become (Lagrange). Dynamic programming over the names keeps what no other choice beats in both cost and error:
    first 30 to 1,000 of them, which gives a good sum; then all that this sum does not rule out.

    Raises:
        TypeError, ValueError: ``budget`` is not a number, or the cheapest options cost more.

    Source: Shoham & Gersho (1988), doi:10.1109/29.90373; Kellerer, Pferschy & Pisinger (2004), *Knapsack Problems*.
    """
    if isinstance(budget, bool) or not isinstance(budget, Real) or math.isnan(budget):
        raise TypeError(f"budget must be a number, got {budget!r} ({type(budget).__name__})")
    given = ({None: (0, 0)}, *options.values())  # the first for the case of no names
    tables = [torch.tensor(list(table.values()), dtype=torch.float64).T for table in given]
    least, most = (sum(float(end(cost)) for cost, _ in tables) for end in (torch.min, torch.max))
    if least > budget:
        raise ValueError(f"a budget of {budget} is too small: the cheapest options cost {least:.0f}")
    budget = min(float(budget), most) * (1 + 1e-14)  # more buys nothing, and sums are rounded
    steps = torch.cat([cost - cost.min() for cost, _ in tables]).tolist()
    if all(step.is_integer() for step in steps) and (step := math.gcd(*map(int, steps))):
        budget = least + (budget - least) // step * step  # no choice costs anything in between

    def best_at(price: float) -> Tensor:
        """What the options cost and leave that are best if each unit of cost adds ``price`` to the error."""
        return sum(table[:, (table[1] + price * table[0]).argmin()] for table in tables)

    low, price = 0.0, 1.0
    while best_at(price)[0] > budget and price < 1e30:
        price *= 4
    for _ in range(50):
        middle = (low + price) / 2
        low, price = (middle, price) if best_at(middle)[0] > budget else (low, middle)
    prices, ceiling = price * torch.linspace(-1, 1, 9).exp2().double(), best_at(price)[1]
    floors = torch.stack([(table[1] + prices[:, None] * table[0]).amin(1) for table in tables])
    for width in (30, 300, 1000, math.inf):
        sums, rest, reserve, kept = torch.zeros(2, 1).double(), floors.sum(0) - prices * budget, least, []
        for table, floor in zip(tables, floors):
            limit = ceiling + 1e-12 * (abs(ceiling) + price * budget)  # allows for rounding
            lost = table[1] + price * table[0] - floor[4]  # prices[4] is price
            old, new = ((sums[1] + price * sums[0] + rest[4])[:, None] + lost <= limit).nonzero(as_tuple=True)
            sums, rest, reserve = sums[:, old] + table[:, new], rest - floor, reserve - table[0].min()
            bound = sums[1] + (rest[:, None] + prices[:, None] * sums[0]).amax(0)
            order = ((sums[0] + reserve <= budget) & (bound <= limit)).nonzero().squeeze(1)
            for key in (1, 0):  # by cost, then by error
                order = order[sums[key, order].argsort(stable=True)]
            best = sums[1, order].cummin(0)[0]
            order = order[torch.cat([torch.ones(1).bool(), best[1:] < best[:-1]])]
            if width < len(order):  # one for each interval of cost, and the one that the price prefers
                at = ((sums[0, order] - sums[0, order[0]]) / (sums[0, order[-1]] - sums[0, order[0]]) * width).long()
                few = torch.cat([at[1:] != at[:-1], torch.ones(1).bool()])
                few[(sums[1] + price * sums[0])[order].argmin()] = True
                order = order[few]
            sums = sums[:, order]
            kept.append((old[order], new[order]))
        ceiling = min(ceiling, sums[1, -1])
    position, chosen = -1, {}
    for name, (old, new) in zip(reversed(options), reversed(kept)):
        chosen[name] = list(options[name])[new[position]]
        position = old[position]
    return dict(reversed(chosen.items()))


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------------------------


def _correct(logits: Tensor, y: Tensor) -> int:
    if logits.ndim != 2 or len(logits) != len(y) or logits.shape[1] < 2 or logits.isnan().any():
        raise ValueError(f"logits must be ({len(y)}, two or more classes) without NaN, got shape {tuple(logits.shape)}")
    return int((logits.argmax(1) == y).sum())


def _check_labels(x: Tensor, y: Tensor) -> None:
    if len(x) == 0 or y.shape != (len(x),):
        raise ValueError(f"x must not be empty, and y hold a label for each; got {tuple(x.shape)} and {tuple(y.shape)}")


def accuracy(model: nn.Module, x: Tensor, y: Tensor, batch_size: int = 1000) -> float:
    """The fraction of inputs ``x`` (N, …) whose largest logit is at the label ``y`` (N,); in [0, 1]."""
    _check_labels(x, y)
    with evaluating(model):
        return sum(_correct(model(xb), yb) for xb, yb in zip(x.split(batch_size), y.split(batch_size))) / len(x)


def rank_sweep(
    model: nn.Module, name: str, x: Tensor, y: Tensor, ranks: Iterable[int] | None = None, batch_size: int = 10_000
) -> dict[int, float]:
    """The accuracy on ``x``, ``y`` at every rank of one layer (or at ``ranks``), as ``{rank: accuracy}``.

    Same result as ``accuracy(factorize(model, {name: r}), x, y)`` for each r. For a linear layer of a plain
    ``nn.Sequential``, one SVD and one pass do: truncations are nested, so the layer's output at rank r is that at rank
    r - 1 plus one outer product, and only the modules behind it run again.

    Raises:
        KeyError, TypeError, ValueError: as ``factorize`` and ``accuracy``.
    """
    layer, W = named_layer(model, name), as_matrix(named_layer(model, name))
    ranks = sorted({check_rank(rank, W) for rank in (range(1, min(W.shape) + 1) if ranks is None else list(ranks))})
    _check_labels(x, y)
    plain = type(model) is nn.Sequential and isinstance(layer, nn.Linear) and layer.weight.dtype.itemsize > 2
    plain = plain and not (model._forward_hooks or model._forward_pre_hooks or "forward" in vars(model))
    if not plain or [part for part in model if layer in set(part.modules())] != [layer]:  # nested, or used twice
        return {rank: accuracy(factorize(model, {name: rank}), x, y) for rank in ranks}
    position, correct = list(model).index(layer), dict.fromkeys(ranks, 0)
    A, B = truncated_svd(layer.weight, min(W.shape))
    with evaluating(model):
        for xb, yb in zip(x.split(batch_size), y.split(batch_size)):
            codes = model[:position](xb) @ B.T  # what the rank-1 terms read off each input
            outputs = codes.new_zeros(*codes.shape[:-1], len(A)) + (0 if layer.bias is None else layer.bias)
            for rank in range(1, max(ranks, default=0) + 1):
                outputs += codes[..., rank - 1, None] * A[:, rank - 1]
                if rank in correct:
                    correct[rank] += _correct(model[position + 1 :](outputs.clone()), yb)
    return {rank: count / len(x) for rank, count in correct.items()}


def count_parameters(module: nn.Module) -> int:
    """The number of weights and biases; a shared one counts once."""
    return sum(p.numel() for p in module.parameters())


def count_macs(model: nn.Module, *args: Any, **kwargs: Any) -> int:
    """The multiply-accumulates of ``model(*args, **kwargs)``, counted by PyTorch while it runs, attention included.

    Element-wise operations do not count. What cannot be counted, as an LSTM, raises a ValueError.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel  # here, since they make importing this module slow
    from torch.utils.flop_counter import FlopCounterMode

    def refuse(op: str, *args: Any, **kwargs: Any) -> int:
        raise ValueError(f"count_macs cannot count the operation {op}")

    def product(op: str, *shapes: Any, **kwargs: Any) -> int:
        return 2 * math.prod(shapes[1 if op == "addmv" else 0])

    aten = torch.ops.aten
    rules = {getattr(aten, op): partial(product, op) for op in ("mv", "addmv", "dot")}
    for op in ("mkldnn_rnn_layer", "_cudnn_rnn", "miopen_rnn", "_trilinear", "addbmm", "addr", "_cdist_forward"):
        rules[getattr(aten, op)] = partial(refuse, op)
    rules[torch.ops.quantized.linear_dynamic] = partial(refuse, "linear_dynamic")
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # the fused kernels of attention are not counted
    try:
        with (
            evaluating(model),
            sdpa_kernel(SDPBackend.MATH),
            FlopCounterMode(display=False, custom_mapping=rules) as counter,
        ):
            model(*args, **kwargs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops() // 2
