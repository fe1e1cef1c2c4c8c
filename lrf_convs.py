"""Low-rank convolutions: one weight, laid out as a matrix in five ways, and a repair.

For ``nn.Conv2d`` in one group with padding by zeros. The weight W (m, n, h, w) has output
channels, input channels, rows and columns. ``lrf_utils.factorize`` takes what ``split_conv``
returns in place of a rank: ``{"conv2": split_conv(model.conv2, "spatial", 20)}``.
"""

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import lrf_utils as lrf

__all__ = ["SCHEMES", "full_rank", "refit", "split_conv"]

SCHEMES = ("out", "in", "spatial", "depthwise", "Tucker-2")


def full_rank(layer: nn.Conv2d, scheme: str) -> int | tuple[int, int]:
    """The rank at which a scheme is exact; of Tucker-2 the pair (out, in)."""
    m, n, h, w = layer.weight.shape
    ranks = {"out": min(m, n * h * w), "in": min(n, m * h * w), "spatial": min(n * h, m * w)}
    ranks |= {"depthwise": min(m, h * w), "Tucker-2": (ranks["out"], ranks["in"])}
    if scheme not in ranks:
        raise ValueError(f"the scheme must be one of {', '.join(SCHEMES)}; got {scheme!r}")
    return ranks[scheme]


def _tucker(W: Tensor, r_out: int, r_in: int) -> tuple[Tensor, Tensor, Tensor]:
    """Bases of both kinds of channels, each in turn the best for the other one, and the core."""
    U = lrf._top_vectors(W.flatten(1), r_out)
    V = lrf._top_vectors(W.transpose(0, 1).flatten(1), r_in)
    for _ in range(3):
        U = lrf._top_vectors(torch.einsum("oihw,is->oshw", W, V).flatten(1), r_out)
        V = lrf._top_vectors(torch.einsum("oihw,or->irhw", W, U).flatten(1), r_in)
    return U, V, torch.einsum("oihw,or,is->rshw", W, U, V)


def _filters(W: Tensor, scheme: str, rank: int | tuple[int, int]) -> list[tuple[Tensor, str]]:
    """The weights of the convolutions in turn, and the axes along which each of them slides."""
    m, n, h, w = W.shape
    if scheme == "out":
        A, B = lrf.truncated_svd(W.flatten(1), rank)
        return [(B.view(rank, n, h, w), "hw"), (A[..., None, None], "")]
    if scheme == "in":
        A, B = lrf.truncated_svd(W.transpose(0, 1).flatten(1), rank)
        return [(A.T[..., None, None], ""), (B.view(rank, m, h, w).transpose(0, 1), "hw")]
    if scheme == "spatial":
        A, B = lrf.truncated_svd(W.permute(1, 2, 0, 3).reshape(n * h, m * w), rank)
        down = A.view(n, h, 1, rank).permute(3, 0, 1, 2)
        return [(down, "h"), (B.view(rank, m, 1, w).transpose(0, 1), "w")]
    if scheme == "depthwise":
        pairs = [lrf.truncated_svd(W[:, i].flatten(1), rank) for i in range(n)]
        up = torch.cat([A for A, _ in pairs], dim=1)
        down = torch.cat([B for _, B in pairs])
        return [(down.view(n * rank, 1, h, w), "hw"), (up[..., None, None], "")]
    U, V, core = _tucker(W, *rank)
    return [(V.T[..., None, None], ""), (core, "hw"), (U[..., None, None], "")]


def split_conv(layer: nn.Conv2d, scheme: str, rank: int | tuple[int, int]) -> lrf.LowRank:
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

    They keep the layer's bias (in the last of them), geometry, dtype, device and mode. At
    ``full_rank`` they compute what the layer computes.

    Source: Zhang et al., arXiv:1505.06798 (out); Tai et al., arXiv:1511.06067 (spatial); Guo et
    al., arXiv:1808.05517 (depthwise); Kim et al., arXiv:1511.06530 (Tucker-2).
    """
    if not isinstance(lrf._named_layer(layer), nn.Conv2d):
        raise TypeError(f"only an nn.Conv2d can be split, got a {type(layer).__name__}")
    if (mode := layer.padding_mode) != "zeros":
        raise ValueError(f"only padding with zeros can be split, got padding_mode={mode!r}")
    left, right, top, bottom = layer._reversed_padding_repeated_twice
    if (left, top) != (right, bottom):
        raise ValueError(f"the padding must be the same on both sides; that of {layer} is not")
    full, shape = full_rank(layer, scheme), tuple(layer.weight.shape)
    if scheme == "Tucker-2" and not (isinstance(rank, tuple) and len(rank) == 2):
        raise TypeError(f"the rank must be a pair (out, in); got {rank!r}")
    for value, most in zip(rank, full) if scheme == "Tucker-2" else [(rank, full)]:
        lrf._check_int(value, most, f"the rank of {scheme} for a weight {shape}")
    filters = _filters(layer.weight.detach().cpu().double(), scheme, rank)
    geometry = {"stride": layer.stride, "dilation": layer.dilation, "padding": (top, left)}
    like, convs = {"dtype": layer.weight.dtype, "device": layer.weight.device}, []
    for weight, axes in filters:
        here: dict[str, Any] = {"bias": len(convs) == len(filters) - 1 and layer.bias is not None}
        for key, sizes in geometry.items():  # go along with the filter's rows and columns
            other = int(key != "padding")
            here[key] = tuple(int(s) if axis in axes else other for axis, s in zip("hw", sizes))
        here["groups"] = layer.in_channels if scheme == "depthwise" and not convs else 1
        sizes = weight.shape[1] * here["groups"], len(weight), tuple(weight.shape[2:])
        convs.append(nn.utils.skip_init(nn.Conv2d, *sizes, **here, **like))
        convs[-1].weight.data.copy_(weight)
    if layer.bias is not None:
        convs[-1].bias.data.copy_(layer.bias)
    return lrf._in_place_of(layer, lrf.LowRank(*convs))


@torch.inference_mode(False)
@torch.no_grad()
def refit(
    model: nn.Module,
    small: nn.Module,
    batches: Tensor | Iterable[Any],
    names: Iterable[str] | None = None,
    *,
    sums: Mapping[str, str] | None = None,
    positions: int | None = None,
    inputs_of: Callable[[Any], Any] | None = None,
    ridge: float = 1e-3,
) -> nn.Module:
    """A copy of ``small`` whose layers give again, as nearly as they can, what ``model``'s give.

    Layer by layer, in the order of their calls, the last part of each gets the weight and the bias
    with which it comes closest to the original layer's output, by least squares, from what the
    *compressed* network feeds it. So a layer corrects what those before it did wrong, without
    labels. ``batches`` are read once for each layer.

    Args:
        names: the layers to fit, in ``small`` single ones or an ``nn.Sequential`` of parts; if not
            given, all such parts. With fewer than some hundred images, not the classifier.
        sums: for the last layer of a residual branch, the module that gets the sum of branch and
            shortcut (in its last call): the layer then corrects the error of the shortcut, too.
            The sum must take the layer's output as it is, so fold BatchNorm first.
        positions: how many random positions of each image to use, if not all.
        inputs_of: as in ``lrf_utils.collect_statistics``.
        ridge: what keeps the old weight where the rows say nothing, as a share of their mean.

    Source: He, Zhang & Sun (2017), arXiv:1707.06168; Zhang et al. (2016), arXiv:1505.06798.
    """
    if not ridge > 0:
        raise ValueError(f"ridge must be positive, got {ridge!r}")
    batches = list(batches) if isinstance(batches, Iterator) else batches
    small, layers = copy.deepcopy(small), dict(model.named_modules())
    if names is None:
        parts = [name for name, part in small.named_modules() if isinstance(part, nn.Sequential)]
        names = [name for name in parts if isinstance(layers.get(name), nn.Linear | nn.Conv2d)]
    first, generator = itertools.islice(lrf._in_batches(batches), 1), torch.Generator()
    for name in lrf.collect_statistics(model, first, names, inputs_of=inputs_of):  # their order
        last = small.get_submodule(name)
        last = last[-1] if isinstance(last, nn.Sequential) else last
        n, W = lrf._named_layer(last).weight[0].numel(), lrf._as_matrix(last)
        count, total, outer = 0, 0.0, 0.0
        for batch in lrf._in_batches(batches):
            run = partial(_calls, batch=batch, inputs_of=inputs_of, into=(sums or {}).get(name))
            for (x, y, s), (_, target, t) in zip(run(small, last), run(model, layers[name])):
                target = target if t is None else t - (s - y)
                mask = _some(target, positions, generator)
                rows = torch.cat([*lrf._row_chunks(last, x, mask, name, torch.float64)])
                targets = lrf._output_rows(last, lrf._float64(target))
                rows = torch.cat([rows, lrf._counted(targets, mask, name)], dim=1)
                count, total, outer = count + len(rows), total + rows.sum(0), outer + rows.T @ rows
        mean, C = total / count, outer / count
        C = C if last.bias is None else C - torch.outer(mean, mean)
        C.diagonal().add_(level := ridge * (C[:n, :n].diagonal().mean() or 1))
        A = torch.linalg.solve(C[:n, :n], (C[n:, :n] + level * W).T).T
        last.weight.copy_(A.reshape(last.weight.shape))
        if last.bias is not None:
            last.bias.copy_(mean[n:] - A @ mean[:n])
    return small


def _calls(network, place, batch, inputs_of, into):
    """Of each call of ``place`` its input, its output and the sum, if any, that goes ``into``."""
    calls, sums = [], [None]
    receiver = nn.Identity() if into is None else network.get_submodule(into)

    def keep(module, args, kwargs, output=None):  # copies, since what follows may write into them
        x = lrf._input(args, kwargs).clone()
        sums.append(x) if output is None else calls.append((x, output.clone()))

    hook, before = place.register_forward_hook, receiver.register_forward_pre_hook
    with hook(keep, with_kwargs=True), before(keep, with_kwargs=True), lrf._evaluating(network):
        lrf._run(network, batch, inputs_of)
    return [(*call, sums[-1]) for call in calls]


def _some(output, positions, generator):
    """A mask of so many random positions of each image, or None for all."""
    places = output[0, 0].numel() if output.ndim == 4 else 0
    if positions is None or positions >= places:
        return None
    chosen = torch.rand(len(output), places, generator=generator).topk(positions).indices
    return torch.zeros(len(output), places, dtype=torch.bool).scatter_(1, chosen, True)
