"""Low-rank convolutions: one weight, laid out as a matrix in five ways, and least squares as a repair.

For ``nn.Conv2d`` in one group with padding by zeros. The weight W (m, n, h, w) has output channels, input channels,
rows and columns. ``lrf_utils.factorize`` takes what ``split_conv`` returns in place of a rank:
``factorize(model, {"conv2": split_conv(model.conv2, "spatial", 20)})``.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lrf_layers import as_matrix, as_rows, check_int, collect, evaluating, in_batches, named_layer, run
from lrf_utils import truncated_svd

SCHEMES = ("out", "in", "spatial", "depthwise", "Tucker-2")


def full_rank(layer: nn.Conv2d, scheme: str) -> int | tuple[int, int]:
    """The rank at which a scheme is exact; of Tucker-2 the pair (out, in)."""
    (m, n), (h, w) = layer.weight.shape[:2], layer.kernel_size
    ranks = {"out": min(m, n * h * w), "in": min(n, m * h * w)}
    ranks |= {"spatial": min(n * h, m * w), "depthwise": min(m, h * w), "Tucker-2": (ranks["out"], ranks["in"])}
    if scheme not in ranks:
        raise ValueError(f"the scheme must be one of {', '.join(SCHEMES)}; got {scheme!r}")
    return ranks[scheme]


def _top(matrix: Tensor, count: int) -> Tensor:
    """The first left singular vectors."""
    return torch.linalg.eigh(matrix @ matrix.T).eigenvectors.flip(1)[:, :count]


def _tucker(W: Tensor, r_out: int, r_in: int) -> tuple[Tensor, Tensor, Tensor]:
    """Bases of both kinds of channels (m, r_out), (n, r_in), and the core: orthogonal iteration from the HOSVD."""
    U, V = _top(W.flatten(1), r_out), _top(W.transpose(0, 1).flatten(1), r_in)
    for _ in range(3):
        U = _top(torch.einsum("oihw,is->oshw", W, V).flatten(1), r_out)
        V = _top(torch.einsum("oihw,or->irhw", W, U).flatten(1), r_in)
    return U, V, torch.einsum("oihw,or,is->rshw", W, U, V)


def split_conv(layer: nn.Conv2d, scheme: str, rank: int | tuple[int, int]) -> nn.Sequential:
    """Two or three convolutions in place of one: its weight as a matrix, cut to a rank by the SVD.

    =========  =====================  ==========================================================
    scheme     rows of the matrix     convolutions
    =========  =====================  ==========================================================
    out        output channels        h×w to ``rank`` channels, then 1×1
    in         input channels         1×1 to ``rank`` channels, then h×w
    spatial    input channels, rows   h×1 to ``rank`` channels, then 1×w
    depthwise  output channels, one   h×w on each input channel, ``rank`` times, then 1×1
               matrix for each input
    Tucker-2   both kinds, in turn    1×1 to ``rank[1]`` channels, h×w to ``rank[0]``, then 1×1
    =========  =====================  ==========================================================

    They keep the layer's bias (in the last of them), geometry, dtype, device and mode. At ``full_rank`` they compute
    what the layer computes.

    Raises:
        TypeError, ValueError: not exactly an ``nn.Conv2d``, groups, padding other than with zeros, an unknown scheme,
            or a rank out of range.

    Source: Zhang et al., arXiv:1505.06798 (out); Denton et al., arXiv:1404.0736 (in); Jaderberg et al., arXiv:1405.3866
    (spatial); Guo et al., arXiv:1808.05517 (depthwise); Kim et al., arXiv:1511.06530 (Tucker-2).
    """
    if not isinstance(named_layer(layer), nn.Conv2d):
        raise TypeError(f"only an nn.Conv2d can be split, got a {type(layer).__name__}")
    if layer.padding_mode != "zeros":
        raise ValueError(f"only padding with zeros can be split, got padding_mode={layer.padding_mode!r}")
    left, right, top, bottom = layer._reversed_padding_repeated_twice
    if (left, top) != (right, bottom):
        raise ValueError(f"the padding must be the same on both sides; that of {layer} is not")
    full = full_rank(layer, scheme)
    if isinstance(full, tuple) != isinstance(rank, tuple) or (isinstance(rank, tuple) and len(rank) != 2):
        raise TypeError(f"the rank must be {'a pair (out, in)' if isinstance(full, tuple) else 'an int'}; got {rank!r}")
    for value, most in zip(rank, full) if isinstance(rank, tuple) else [(rank, full)]:
        check_int(value, 1, most, f"the rank of {scheme} for a weight {tuple(layer.weight.shape)}")
    W, (m, n, h, w) = layer.weight.detach().cpu().double(), layer.weight.shape
    both, neither, r = (0, 1), (), rank
    if scheme == "out":
        A, B = truncated_svd(W.flatten(1), r)
        parts = [(B.view(r, n, h, w), both), (A[..., None, None], neither)]
    elif scheme == "in":
        A, B = truncated_svd(W.transpose(0, 1).flatten(1), r)
        parts = [(A.T[..., None, None], neither), (B.view(r, m, h, w).transpose(0, 1), both)]
    elif scheme == "spatial":
        A, B = truncated_svd(W.permute(1, 2, 0, 3).reshape(n * h, m * w), r)
        parts = [(A.view(n, h, 1, r).permute(3, 0, 1, 2), (0,)), (B.view(r, m, 1, w).transpose(0, 1), (1,))]
    elif scheme == "depthwise":
        pairs = [truncated_svd(W[:, i].flatten(1), r) for i in range(n)]
        A, B = torch.cat([A for A, _ in pairs], dim=1), torch.cat([B for _, B in pairs])
        parts = [(B.view(n * r, 1, h, w), both), (A[..., None, None], neither)]
    else:
        U, V, core = _tucker(W, *r)
        parts = [(V.T[..., None, None], neither), (core, both), (U[..., None, None], neither)]
    geometry = {"stride": layer.stride, "dilation": layer.dilation, "padding": (top, left)}
    convs = nn.Sequential()
    for weight, axes in parts:  # stride, padding and dilation go along with the filter's rows and columns
        here = {key: [value[k] if k in axes else key != "padding" for k in both] for key, value in geometry.items()}
        last, groups = len(convs) == len(parts) - 1, len(weight) // r if scheme == "depthwise" and not convs else 1
        conv = nn.utils.skip_init(
            nn.Conv2d,
            weight.shape[1] * groups,
            *(len(weight), weight.shape[2:]),
            **{key: tuple(map(int, value)) for key, value in here.items()},
            groups=groups,
            bias=last and layer.bias is not None,
            dtype=layer.weight.dtype,
            device=layer.weight.device,
        )
        with torch.no_grad():
            conv.weight.copy_(weight)
            if conv.bias is not None:
                conv.bias.copy_(layer.bias)
        convs.append(conv.requires_grad_(layer.weight.requires_grad))
    return convs.train(layer.training)


@torch.no_grad()
def refit(
    model: nn.Module,
    small: nn.Module,
    inputs: Tensor | Iterable[Any],
    names: Iterable[str] | None = None,
    *,
    select: Callable[[Any], Any] | None = None,
    ridge: float = 1e-3,
) -> nn.Module:
    """A copy of ``small`` whose layers give again, as nearly as they can, what the layers of ``model`` give.

    Layer by layer, in the order of their calls, the last part of each gets the weight and the bias with which it comes
    closest to the output of the original layer, by least squares, from what the *compressed* network feeds it with. So
    a layer corrects what those before it did wrong, without labels. ``inputs`` are read once for each layer.

    Args:
        names: the layers to fit, in ``small`` single ones or an ``nn.Sequential`` of parts; those that are an
            ``nn.Sequential`` in place of one layer, if not given. A classifier can be named too, but it sees only one
            row an image: with fewer than some hundred images, leave it alone.
        select: as in ``lrf_utils.collect``.
        ridge: what keeps the old weight where the rows say nothing, as a share of their mean square.

    Raises:
        KeyError, TypeError, ValueError: no such layer, one that cannot be fitted or is not called, no inputs.

    Source: He, Zhang & Sun (2017), arXiv:1707.06168; Zhang et al. (2016), arXiv:1505.06798.
    """
    if not ridge > 0:
        raise ValueError(f"ridge must be positive, got {ridge!r}")
    inputs, small = list(inputs) if isinstance(inputs, Iterator) else inputs, copy.deepcopy(small)
    layers = dict(model.named_modules())
    if names is None:
        parts = {name for name, part in small.named_modules() if isinstance(part, nn.Sequential)}
        names = [name for name in parts if isinstance(layers.get(name), nn.Linear | nn.Conv2d)]
    first = list(itertools.islice(in_batches(inputs), 1))
    for name in collect(model, first, names, select=select):  # for the order of the calls
        layer, last = layers[name], small.get_submodule(name)
        last = last[-1] if isinstance(last, nn.Sequential) else last
        named_layer(last)
        biased, sums = last.bias is not None, [0.0] * 5
        for batch in in_batches(inputs):
            z, t = [], []

            def look(layer: nn.Module, args: tuple, kwargs: dict, z: list = z) -> None:
                z.append(as_rows(layer, args, kwargs, None))

            def aim(_: nn.Module, args: tuple, output: Tensor, t: list = t) -> None:
                t.append(output.flatten(2).transpose(1, 2) if output.ndim == 4 else output)

            with last.register_forward_pre_hook(look, with_kwargs=True), layer.register_forward_hook(aim):
                for network in (model, small):
                    with evaluating(network):
                        run(network, batch, select)
            z, t = (torch.cat([rows.reshape(-1, rows.shape[-1]).cpu().double() for rows in each]) for each in (z, t))
            sums = [a + b for a, b in zip(sums, (len(z), z.sum(0), t.sum(0), z.T @ z, t.T @ z))]
        z_mean, t_mean, C, cross = (value / sums[0] for value in sums[1:])
        if biased:
            C, cross = C - torch.outer(z_mean, z_mean), cross - torch.outer(t_mean, z_mean)
        level = ridge * (C.diagonal().mean() or 1)
        C.diagonal().add_(level)
        A = torch.linalg.solve(C, (cross + level * as_matrix(last)).T).T
        last.weight.copy_(A.reshape(last.weight.shape))
        if biased:
            last.bias.copy_(t_mean - A @ z_mean)
    return small
