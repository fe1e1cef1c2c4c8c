"""Low-rank convolutions: one weight, laid out as a matrix in five ways, and a repair.

For ``nn.Conv2d`` in one group with padding by zeros. The weight W (m, n, h, w) has output
channels, input channels, rows and columns. ``lrf_utils.factorize`` takes what ``split_conv``
returns in place of a rank: ``{"conv2": split_conv(model.conv2, "spatial", 20)}``.
"""

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import lrf_utils as lrf

__all__ = ["SCHEMES", "full_rank", "refit", "split_conv"]

SCHEMES = ("out", "in", "spatial", "depthwise", "Tucker-2")


def full_rank(layer: nn.Conv2d, scheme: str) -> int | tuple[int, int]:
    """The rank at which a scheme is exact; of Tucker-2 the pair (out, in)."""
    (m, n), (h, w) = layer.weight.shape[:2], layer.kernel_size
    ranks = {
        "out": min(m, n * h * w),
        "in": min(n, m * h * w),
        "spatial": min(n * h, m * w),
        "depthwise": min(m, h * w),
    }
    ranks["Tucker-2"] = (ranks["out"], ranks["in"])
    if scheme not in ranks:
        raise ValueError(f"the scheme must be one of {', '.join(SCHEMES)}; got {scheme!r}")
    return ranks[scheme]


def _tucker(W: Tensor, r_out: int, r_in: int) -> tuple[Tensor, Tensor, Tensor]:
    """Bases of both kinds of channels (m, r_out), (n, r_in), and the core.

    By orthogonal iteration: each basis in turn is the best for the other one.
    """
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

    Source: Zhang et al., arXiv:1505.06798 (out); Denton et al., arXiv:1404.0736 (in); Jaderberg et
    al., arXiv:1405.3866 (spatial); Guo et al., arXiv:1808.05517 (depthwise); Kim et al.,
    arXiv:1511.06530 (Tucker-2).
    """
    if not isinstance(lrf._named_layer(layer), nn.Conv2d):
        raise TypeError(f"only an nn.Conv2d can be split, got a {type(layer).__name__}")
    if layer.padding_mode != "zeros":
        mode = layer.padding_mode
        raise ValueError(f"only padding with zeros can be split, got padding_mode={mode!r}")
    left, right, top, bottom = layer._reversed_padding_repeated_twice
    if (left, top) != (right, bottom):
        raise ValueError(f"the padding must be the same on both sides; that of {layer} is not")
    _check_rank(layer, scheme, rank)
    filters = _filters(layer.weight.detach().cpu().double(), scheme, rank)
    geometry = {"stride": layer.stride, "dilation": layer.dilation, "padding": (top, left)}
    like = {"dtype": layer.weight.dtype, "device": layer.weight.device}
    convs = []
    for weight, axes in filters:
        here: dict[str, Any] = {"bias": len(convs) == len(filters) - 1 and layer.bias is not None}
        for key, sizes in geometry.items():  # go along with the filter's rows and columns
            neutral = 0 if key == "padding" else 1
            here[key] = tuple(int(s) if axis in axes else neutral for axis, s in zip("hw", sizes))
        here["groups"] = layer.in_channels if scheme == "depthwise" and not convs else 1
        outputs, inputs, *kernel = weight.shape
        conv = nn.utils.skip_init(
            nn.Conv2d, inputs * here["groups"], outputs, tuple(kernel), **here, **like
        )
        with torch.no_grad():
            conv.weight.copy_(weight)
            if conv.bias is not None:
                conv.bias.copy_(layer.bias)
        convs.append(conv)
    return lrf._in_place_of(layer, lrf.LowRank(*convs))


def _check_rank(layer: nn.Conv2d, scheme: str, rank: int | tuple[int, int]) -> None:
    full = full_rank(layer, scheme)
    if isinstance(full, tuple) and not (isinstance(rank, tuple) and len(rank) == 2):
        raise TypeError(f"the rank must be a pair (out, in); got {rank!r}")
    what = f"the rank of {scheme} for a weight {tuple(layer.weight.shape)}"
    for value, most in zip(rank, full) if isinstance(full, tuple) else [(rank, full)]:
        lrf._check_int(value, most, what)


@torch.inference_mode(False)
def refit(
    model: nn.Module,
    small: nn.Module,
    batches: Tensor | Iterable[Any],
    names: Iterable[str] | None = None,
    *,
    inputs_of: Callable[[Any], Any] | None = None,
    ridge: float = 1e-3,
) -> nn.Module:
    """A copy of ``small`` whose layers give again, as nearly as they can, what ``model``'s give.

    Layer by layer, in the order of their calls, the last part of each gets the weight and the bias
    with which it comes closest to the output of the original layer, by least squares, from what
    the *compressed* network feeds it with. So a layer corrects what those before it did wrong,
    without labels. ``batches`` are read once for each layer.

    Args:
        names: the layers to fit, in ``small`` single ones or an ``nn.Sequential`` of parts; if not
            given, those that are such parts in place of one layer. A classifier sees only one row
            an image: with fewer than some hundred images, leave it alone.
        inputs_of: as in ``lrf_utils.collect_statistics``.
        ridge: what keeps the old weight where the rows say nothing, as a share of their mean
            square.

    Source: He, Zhang & Sun (2017), arXiv:1707.06168; Zhang et al. (2016), arXiv:1505.06798.
    """
    if not ridge > 0:
        raise ValueError(f"ridge must be positive, got {ridge!r}")
    batches = list(batches) if isinstance(batches, Iterator) else batches
    small = copy.deepcopy(small)
    layers = dict(model.named_modules())
    if names is None:
        parts = [name for name, part in small.named_modules() if isinstance(part, nn.Sequential)]
        names = [name for name in parts if isinstance(layers.get(name), nn.Linear | nn.Conv2d)]
    first = list(itertools.islice(lrf._in_batches(batches), 1))
    order = lrf.collect_statistics(model, first, names, inputs_of=inputs_of)
    for name, known in order.items():
        last = small.get_submodule(name)
        last = last[-1] if isinstance(last, nn.Sequential) else last
        lrf._named_layer(last)
        lrf._fit(model, small, name, last, batches, known, inputs_of, ridge=ridge)
    return small
