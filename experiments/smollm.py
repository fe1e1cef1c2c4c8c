"""SmolLM2 as lessons 9 and 10 and a long run use it: texts, perplexity, attention with a cache.

Texts are of three kinds and in three parts: calibration, validation (which settings are chosen
on) and test.
"""

import copy
import csv
import dataclasses
import gzip
import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lrf_utils as lrf
import notebook_utils as nb

# --- Texts ---------------------------------------------------------------------------------------

KINDS = ("WordNet", "Bible", "Python docs")
DATA = nb.ROOT / "data"


def _split(text: str, first: float, second: float) -> dict[str, str]:
    """By position: up to ``first`` of its characters, up to ``second``, and what follows."""
    a, b = int(first * len(text)), int(second * len(text))
    return {"calibration": text[:a], "validation": text[a:b], "test": text[b:]}


def load_texts() -> dict[str, dict[str, str]]:
    """For each of KINDS the texts "calibration", "validation" and "test"."""
    table = pd.read_csv(
        DATA / "wordnet.tsv.gz", sep="\t", quoting=csv.QUOTE_NONE, keep_default_na=False
    )
    sentences = {}
    for part in ("calibration", "validation", "test"):
        name = "calibration 0" if part == "calibration" else part
        sentences[part] = "\n".join(table.loc[table["part"] == name, "text"])
    bible = gzip.decompress((DATA / "kjv" / "kjv.txt.gz").read_bytes()).decode()
    docs = gzip.decompress((DATA / "python_docs.txt.gz").read_bytes()).decode()
    return {
        "WordNet": sentences,
        "Bible": _split(bible, 0.90, 0.95),
        "Python docs": _split(docs, 0.60, 0.70),
    }


def token_windows(tokenizer: Any, text: str, count: int, length: int = 256) -> Tensor:
    """``count`` sequences of ``length`` tokens, evenly spread over the text; none overlap."""
    step = len(text) // count
    rows = []
    for start in range(0, count * step, step):
        # A token has at least one character: more than enough of them are read.
        ids = tokenizer(text[start : start + min(step, 12 * length)])["input_ids"][:length]
        if len(ids) < length:
            raise ValueError(f"the text is too short for {count} windows of {length} tokens")
        rows.append(ids)
    return torch.tensor(rows)


def windows_of(tokenizer: Any, part: str, count: int, length: int = 256) -> dict[str, Tensor]:
    """For each kind of text, ``count`` windows of its ``part``."""
    texts = load_texts()
    return {kind: token_windows(tokenizer, texts[kind][part], count, length) for kind in KINDS}


# --- Perplexity ----------------------------------------------------------------------------------


@torch.no_grad()
def window_losses(model: nn.Module, windows: Tensor, batch_size: int = 2) -> Tensor:
    """The mean cross-entropy of each window, in nats per token; the first token is given."""
    losses = []
    for ids in windows.split(batch_size):
        logits = model(ids, use_cache=False).logits[:, :-1]
        each = F.cross_entropy(logits.transpose(1, 2).float(), ids[:, 1:], reduction="none")
        losses.append(each.mean(1))
    return torch.cat(losses)


def perplexity(losses: Tensor) -> float:
    """exp of the mean loss: among how many equally likely tokens the model seems to choose."""
    return math.exp(losses.double().mean())


# --- The cache: keys and values from one factor --------------------------------------------------

KV = "model.layers.{}.self_attn.kv"


class LatentAttention(nn.Module):
    """Llama's attention with a cache of what comes *before* the rotation, for K and V together.

    ``kv`` holds the weights of K and V as one layer. Once it is a pair, its first factor gives the
    r numbers to cache, and its second expands them to keys and values, which are rotated then.
    ``rounded`` says what a cache with fewer bits holds in place of these numbers; the ``recent``
    last tokens are held in full, and so are the first ones, ``sinks``, on which much attention
    rests (Xiao et al. (2023), arXiv:2309.17453). Positions count from 0: no padding on the left.
    """

    def __init__(self, attention: nn.Module, rotary: nn.Module) -> None:
        super().__init__()
        self.q_proj, self.o_proj = attention.q_proj, attention.o_proj
        self.layer_idx, self.head_dim = attention.layer_idx, attention.head_dim
        self.rotary = rotary
        k, v = attention.k_proj, attention.v_proj
        self.kv = nn.Linear(k.in_features, k.out_features + v.out_features, bias=False)
        self.kv.weight = nn.Parameter(torch.cat([k.weight, v.weight]).detach())
        self.rounded: Callable[[Tensor], Tensor] | None = None
        self.recent, self.sinks = 32, 4

    def forward(
        self, hidden_states: Tensor, cache: Any = None, past_key_values: Any = None, **others: Any
    ) -> tuple[Tensor, None]:
        cache = past_key_values if cache is None else cache
        q = self._heads(self.q_proj(hidden_states))
        pair = isinstance(self.kv, lrf.LowRank)
        latent = self.kv[0](hidden_states) if pair else self.kv(hidden_states)
        if cache is not None:  # as if it were one head of keys, with values of no numbers
            kept = cache.update(latent[:, None], latent[:, None, :, :0], self.layer_idx)
            latent = kept[0][:, 0]
        count = latent.shape[1]
        positions = torch.arange(count, device=latent.device)[None]
        cos, sin = self.rotary(hidden_states, positions)
        q = _rotate(q, cos[:, -q.shape[2] :], sin[:, -q.shape[2] :])
        distance = positions[0, -q.shape[2] :, None] - positions
        if self.rounded is None or count <= self.sinks:
            k, v = self._expand(latent, cos, sin)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=distance >= 0, enable_gqa=True)
        else:  # each token sees the first and the recent ones in full, and others rounded
            first = latent[:, : self.sinks]
            rounded = torch.cat([first, self.rounded(latent[:, self.sinks :])], dim=1)
            far = (distance >= self.recent) & (positions[0] >= self.sinks)
            near = (distance >= 0) & ~far
            full, other = (self._expand(each, cos, sin) for each in (latent, rounded))
            y = _two_caches(q, full, other, near, far)
        return self.o_proj(y.transpose(1, 2).flatten(2)), None

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _expand(self, latent: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        both = self.kv[1](latent) if isinstance(self.kv, lrf.LowRank) else latent
        k, v = (self._heads(part) for part in both.chunk(2, dim=-1))
        return _rotate(k, cos, sin), v


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each pair of numbers, half a head apart, by an angle that grows with the position."""
    a, b = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat([-b, a], dim=-1) * sin[:, None]


def _two_caches(
    q: Tensor,
    full: tuple[Tensor, Tensor],
    rounded: tuple[Tensor, Tensor],
    near: Tensor,
    far: Tensor,
) -> Tensor:
    """Attention with ``full`` keys and values where ``near``, ``rounded`` ones where ``far``."""
    groups = q.shape[1] // full[0].shape[1]
    full, rounded = ([x.repeat_interleave(groups, 1) for x in pair] for pair in (full, rounded))
    scores = torch.where(near, q @ full[0].mT, q @ rounded[0].mT) / math.sqrt(q.shape[-1])
    p = scores.masked_fill(~(near | far), -torch.inf).softmax(-1)
    return (p * near) @ full[1] + (p * far) @ rounded[1]


def with_latent_cache(model: nn.Module) -> nn.Module:
    """A copy of a Llama whose attention has a layer ``kv``; it computes the same."""
    model = copy.deepcopy(model)
    for block in model.model.layers:
        block.self_attn = LatentAttention(block.self_attn, model.model.rotary_emb)
    return model


def separate(layer: nn.Linear, rank: int, known: lrf.Statistics | None) -> lrf.LowRank:
    """A pair for K and one for V, of half the rank each, in one: its second factor has blocks."""
    size, pairs = layer.out_features // 2, []
    for rows in (slice(0, size), slice(size, None)):
        half, own = nn.Linear(layer.in_features, size, bias=False), known
        half.weight = nn.Parameter(layer.weight[rows].detach())
        if known is not None and known.gradient_sum is not None:
            own = dataclasses.replace(known, gradient_sum=known.gradient_sum[rows, rows])
        pairs.append(lrf.factorize_layer(half, rank // 2, own, add_bias=own is not None))
    down = nn.Linear(layer.in_features, rank, bias=False)
    up = nn.Linear(rank, layer.out_features, bias=known is not None)
    down.weight = nn.Parameter(torch.cat([pair[0].weight for pair in pairs]))
    up.weight = nn.Parameter(torch.block_diag(*(pair[1].weight for pair in pairs)))
    if known is not None:
        up.bias = nn.Parameter(torch.cat([pair.bias for pair in pairs]))
    return lrf.LowRank(down, up)


def kv_names(model: nn.Module) -> list[str]:
    return [KV.format(i) for i in range(len(model.model.layers))]


def with_bits(model: nn.Module, rounded: Callable[[Tensor], Tensor] | None) -> nn.Module:
    """Sets how each layer's cache is rounded, in place."""
    for block in model.model.layers:
        block.self_attn.rounded = rounded
    return model


# --- Fewer bits ----------------------------------------------------------------------------------

SCALES = 32  # bits of a group's scale and offset, 16 each


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


def channel_bits(variances: Tensor, total: float, size: int = 32) -> Tensor:
    """Bits for each channel, so that with scales of groups of ``size`` they sum up to ``total``.

    One more bit after the other goes where it lowers the error most: reverse water-filling, as in
    transform coding. A channel with 0 bits is not kept, which is what a smaller rank does.
    """
    steps = torch.arange(2, 12)
    # The range of 32 normal numbers is about four deviations; the error is a twelfth of step².
    errors = torch.cat([torch.ones(1), 1.4 / (2.0**steps - 1) ** 2])
    errors = variances.float()[:, None] * errors  # of each channel, at 0, 2, 3, … bits
    costs = torch.tensor([2 + SCALES / size] + [1.0] * (len(steps) - 1))
    gains = -errors.diff(dim=1) / costs
    level = torch.zeros(len(variances), dtype=torch.long)
    while True:
        gain = gains.gather(1, level[:, None].clamp(max=len(costs) - 1))[:, 0]
        gain = gain.masked_fill(level == len(costs), 0)
        best = gain.argmax()
        if gain[best] <= 0 or costs[level[best]] > total:
            break
        total -= costs[level[best]].item()
        level[best] += 1
    return torch.where(level > 0, level + 1, 0)


def round_channels(x: Tensor, bits: Tensor, size: int = 32) -> Tensor:
    """Each channel over ``size`` tokens, with its own bits; without bits it is 0."""
    result = torch.zeros_like(x)
    for count in bits[bits > 0].unique():
        some = bits == count
        result[..., some] = round_groups(x[..., some], int(count), -2, size)
    return result


def coded(layer: nn.Linear, known: lrf.Statistics, size: int, group: int = 32) -> tuple:
    """A pair whose latent numbers add up to the predicted loss one by one; and their bits.

    They are those of the truncated factors before the norms are shared out: so each one's part of
    the error, cut or rounded, is its variance. ``size`` is in bytes per token.
    """
    W = layer.weight.detach().double()
    G = known.metric + known.damping * known.metric.diagonal().mean() * torch.eye(len(W))
    root = torch.linalg.cholesky(G).T
    response = root @ W
    C = known.covariance(ridge=True)
    variances, U = torch.linalg.eigh(response @ C @ response.T)
    bits = channel_bits(variances.clamp(min=0).flip(0), 8 * size, group)
    U = U.flip(1)[:, bits > 0]
    down, up = nn.Linear(W.shape[1], U.shape[1]), nn.Linear(U.shape[1], len(W))
    with torch.no_grad():
        down.weight.copy_(U.T @ response)
        down.bias.copy_(-down.weight.double() @ known.mean)  # a channel that is cut stays at 0
        up.weight.copy_(torch.linalg.solve_triangular(root, U, upper=True))
        up.bias.copy_(W @ known.mean)
    return lrf.LowRank(down, up), bits[bits > 0]


def with_coded_cache(
    model: nn.Module, statistics: dict[str, lrf.Statistics], size: int, group: int = 32
) -> nn.Module:
    """A copy of ``with_latent_cache(...)`` that keeps ``size`` bytes per token and layer."""
    codes = {
        name: coded(model.get_submodule(name), statistics[name], size, group)
        for name in kv_names(model)
    }
    result = lrf.factorize(model, {name: pair for name, (pair, _) in codes.items()})
    for block, (_, bits) in zip(result.model.layers, codes.values()):
        block.self_attn.rounded = partial(round_channels, bits=bits, size=group)
        block.self_attn.recent = group
    return result


def cache_bytes(numbers: int, bits: int, size: int) -> float:
    """Bytes per token and layer; below 16 bits with the scales of groups of ``size``."""
    scales = math.ceil(numbers / size) * SCALES if bits < 16 else 0
    return (numbers * bits + scales) / 8


# --- Ranks ---------------------------------------------------------------------------------------


def equal_ranks(model: nn.Module, names: Iterable[str], kept: float) -> dict[str, int]:
    """The same share of its weights for each layer."""
    ranks = {}
    for name in names:
        m, n = model.get_submodule(name).weight.shape
        ranks[name] = max(1, int(kept * m * n / (m + n)))
    return ranks


def cache_ranks(
    model: nn.Module, statistics: dict[str, lrf.Statistics], numbers: int, multiple_of: int = 16
) -> dict[str, int | None]:
    """Ranks of the layers ``kv`` that sum up to at most ``numbers`` for each, by least error."""
    options = {}
    for name, known in statistics.items():
        layer = model.get_submodule(name)
        errors = lrf.truncation_errors(layer, known).tolist()
        full = min(layer.weight.shape)
        options[name] = {r: (r, errors[r]) for r in range(multiple_of, full, multiple_of)}
        options[name][None] = (full, 0.0)
    return lrf.allocate_ranks(options, numbers * len(options))


# --- What published methods know of a layer ------------------------------------------------------

MANY = 10**7  # rows; with so many, a covariance gets next to no ridge


def diagonal(values: Tensor) -> lrf.Statistics:
    """Of imagined inputs that are independent and have these mean squares."""
    values = values.double().clamp(min=1e-6 * values.mean())
    zeros = torch.zeros(len(values), dtype=torch.float64)
    return lrf.Statistics(1, MANY, MANY, zeros, (MANY * values).diag())


def asvd_statistics(
    model: nn.Module, names: Iterable[str], batches: Iterable[Tensor]
) -> dict[str, lrf.Statistics]:
    """ASVD scales inputs by the root of their mean absolute values (its alpha is a half).

    Source: Yuan et al. (2023), arXiv:2312.05821.
    """
    sums: dict[str, Any] = dict.fromkeys(names, 0)

    def add(name: str, layer: nn.Module, args: tuple[Tensor]) -> None:
        sums[name] = sums[name] + args[0].abs().double().flatten(0, 1).mean(0)

    layers = {name: model.get_submodule(name) for name in sums}
    hooks = [layer.register_forward_pre_hook(partial(add, name)) for name, layer in layers.items()]
    with torch.no_grad():
        for batch in batches:
            model(batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    return {name: diagonal(each) for name, each in sums.items()}


def fwsvd_statistics(
    model: nn.Module, names: Iterable[str], batches: Iterable[Tensor]
) -> dict[str, lrf.Statistics]:
    """FWSVD scales inputs by the root of the summed squared gradients of their weights.

    Source: Hsu et al. (2022), arXiv:2207.00112.
    """
    sums: dict[str, Any] = dict.fromkeys(names, 0)
    weights = [model.get_submodule(name).weight for name in sums]
    for batch in batches:
        for ids in batch.split(1):
            logits = model(ids, use_cache=False).logits[0]
            loss = F.cross_entropy(logits[:-1], ids[0, 1:])
            for name, gradient in zip(sums, torch.autograd.grad(loss, weights)):
                sums[name] = sums[name] + gradient.square().sum(0)
    return {name: diagonal(each) for name, each in sums.items()}


def without_ridge(known: lrf.Statistics) -> lrf.Statistics:
    more = MANY / known.rows
    sums = {"weight": MANY, "row_sum": more * known.row_sum, "outer_sum": more * known.outer_sum}
    return dataclasses.replace(known, rows=MANY, **sums)
