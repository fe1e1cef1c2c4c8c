"""A Llama's cache with fewer bits: rounding in groups, and ranks and bits together (lesson 9)."""

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lrf_utils as lrf
from experiments.latent_cache import Statistics

# --- Fewer bits ----------------------------------------------------------------------------------

SCALES = 32  # bits of a group's scale and offset, 16 each


def cache_bytes(numbers: int, bits: int, size: int) -> float:
    """Bytes per token and layer; below 16 bits with the scales of groups of ``size``."""
    scales = math.ceil(numbers / size) * SCALES if bits < 16 else 0
    return (numbers * bits + scales) / 8


def round_groups(x: Tensor, bits: int, dim: int, size: int) -> Tensor:
    """``x`` rounded in groups of ``size`` along ``dim``, each from its minimum to its maximum."""
    x = x.movedim(dim, -1)
    count = x.shape[-1]
    groups = F.pad(x, (0, -count % size), mode="replicate").unflatten(-1, (-1, size))
    low, high = groups.aminmax(dim=-1, keepdim=True)
    step = ((high - low) / (2**bits - 1)).clamp(min=1e-12)
    rounded = ((groups - low) / step).round() * step + low
    return rounded.flatten(-2)[..., :count].movedim(-1, dim)


def naive_bits(kv: Tensor, bits: int, size: int = 64) -> Tensor:
    """Keys and values per token and head."""
    return round_groups(kv, bits, -1, size)


def kivi_bits(kv: Tensor, bits: int, size: int = 32) -> Tensor:
    """Keys per channel over 32 tokens, values per token; as KIVI, but before the rotation.

    Source: Liu et al. (2024), arXiv:2402.02750; before the rotation as Hooper et al. (2024),
    arXiv:2401.18079.
    """
    k, v = kv.chunk(2, dim=-1)
    return torch.cat([round_groups(k, bits, -2, size), round_groups(v, bits, -1, size)], dim=-1)


def with_bits(model: nn.Module, rounded: Callable[[Tensor], Tensor] | None) -> nn.Module:
    """Sets how each layer's cache is rounded, in place."""
    for block in model.model.layers:
        block.self_attn.rounded = rounded
    return model


# --- Ranks and bits together: transform coding ---------------------------------------------------

# The error of a number with variance 1 at 0, 1, 2, … bits, and the steps that reach it, for a
# normal distribution and evenly spaced levels. Source: Max (1960), doi:10.1109/TIT.1960.1057548.
FIXED_ERRORS = (1.0, 0.3634, 0.1188, 0.03744, 0.01154, 0.003495, 0.001041, 0.0003035, 8.714e-5)
FIXED_STEPS = (0.0, 1.596, 0.9957, 0.5860, 0.3352, 0.1881, 0.1041, 0.05687, 0.03076)


def channel_bits(variances: Tensor, total: float, size: int | None = None) -> Tensor:
    """Bits for each channel that sum up to ``total``, with the scales of groups of ``size``.

    One more bit after the other goes where it lowers the error most: reverse water-filling, as in
    transform coding. A channel with 0 bits is not kept, which is what a smaller rank does. Without
    ``size`` the steps are fixed beforehand, so that nothing is stored beside the bits.
    """
    if size is None:
        errors, first, costs = torch.tensor(FIXED_ERRORS), 1, torch.ones(len(FIXED_ERRORS) - 1)
    else:  # the range of 32 normal numbers is about four deviations; one bit is not offered
        steps, first = torch.arange(2, 12), 2
        errors = torch.cat([torch.ones(1), 1.4 / (2.0**steps - 1) ** 2])
        costs = torch.tensor([2 + SCALES / size] + [1.0] * (len(steps) - 1))
    gains = -variances.float()[:, None] * errors.diff() / costs
    level = torch.zeros(len(variances), dtype=torch.long)
    while True:
        gain = gains.gather(1, level[:, None].clamp(max=len(costs) - 1))[:, 0]
        gain = gain.masked_fill(level == len(costs), 0)
        best = gain.argmax()
        if gain[best] <= 0 or costs[level[best]] > total:
            break
        total -= costs[level[best]].item()
        level[best] += 1
    return torch.where(level > 0, level + first - 1, 0)


def round_channels(x: Tensor, bits: Tensor, size: int = 32) -> Tensor:
    """Each channel over ``size`` tokens, with its own bits; without bits it is 0."""
    result = torch.zeros_like(x)
    for count in bits[bits > 0].unique():
        some = bits == count
        result[..., some] = round_groups(x[..., some], int(count), -2, size)
    return result


def round_fixed(x: Tensor, bits: Tensor, steps: Tensor) -> Tensor:
    """Each channel to the nearest of 2**bits levels around 0, ``steps`` apart."""
    most = 2.0 ** (bits - 1) - 0.5
    return steps * ((x / steps).floor() + 0.5).clamp(-most, most)


def coded(
    layer: nn.Linear,
    known: lrf.Statistics,
    size: float,
    group: int | None = 32,
    seen: lrf.Statistics | None = None,
    rotate: bool = True,
) -> tuple[lrf.LowRank, Tensor, Callable[[Tensor], Tensor]]:
    """A pair whose latent numbers add up to the predicted loss one by one; their bits; a rounding.

    They are those of the truncated factors before the norms are shared out: so each one's part of
    the error, cut or rounded, is its variance. ``size`` is in bytes per token. Steps are those of
    groups of ``group`` tokens, or fixed ones by the variances in ``seen``. Without a loss metric
    it is a PCA of keys and values; without ``rotate`` their own channels get the bits.
    """
    W = layer.weight.detach().double()
    G = eye = torch.eye(len(W), dtype=W.dtype)
    if known.gradient_sum is not None:
        G = known.metric + known.damping * known.metric.diagonal().mean() * eye
    root = torch.linalg.cholesky(G if rotate else G.diagonal().diag()).T
    response = root @ W
    spread = response @ known.covariance(ridge=True) @ response.T
    variances, order = spread.diagonal().sort()
    variances, U = torch.linalg.eigh(spread) if rotate else (variances, eye[:, order])
    bits = channel_bits(variances.clamp(min=0).flip(0), 8 * size, group)
    U, bits = U.flip(1)[:, bits > 0], bits[bits > 0]
    down, up = nn.Linear(W.shape[1], U.shape[1]), nn.Linear(U.shape[1], len(W))
    B, mean = U.T @ response, (known if seen is None else seen).mean
    with torch.no_grad():
        down.weight.copy_(B)
        down.bias.copy_(-B @ mean)  # a channel that is cut stays at 0
        up.weight.copy_(torch.linalg.solve_triangular(root, U, upper=True))
        up.bias.copy_(W @ mean)
    if group is not None:
        return lrf.LowRank(down, up), bits, partial(round_channels, bits=bits, size=group)
    deviations = (B @ seen.covariance() @ B.T).diagonal().sqrt().float()
    steps = torch.tensor(FIXED_STEPS)[bits] * deviations
    return lrf.LowRank(down, up), bits, partial(round_fixed, bits=bits, steps=steps)


def with_coded_cache(
    model: nn.Module,
    statistics: Statistics,
    size: float | Mapping[str, float],
    group: int | None = 32,
    seen: Statistics | None = None,
    rotate: bool = True,
) -> nn.Module:
    """A copy of ``with_latent_cache(...)`` that keeps ``size`` bytes per token and layer."""
    sizes = size if isinstance(size, Mapping) else dict.fromkeys(statistics, size)
    codes = {
        name: coded(
            model.get_submodule(name), each, sizes[name], group, seen and seen[name], rotate
        )
        for name, each in statistics.items()
    }
    result = lrf.factorize(model, {name: pair for name, (pair, _, _) in codes.items()})
    for name, (_, _, rounded) in codes.items():
        result.get_submodule(name.removesuffix(".kv")).rounded = rounded
    return result
