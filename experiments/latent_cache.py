"""A Llama whose attention caches fewer numbers: lesson 9 explains it, ``kv_cache.py`` measures it.

How numbers get fewer bits is in ``cache_bits.py``.
"""

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lrf_utils as lrf

_attention = F.scaled_dot_product_attention
Statistics = Mapping[str, lrf.Statistics]
KV = "model.layers.{}.self_attn.kv"

# --- Attention -----------------------------------------------------------------------------------


class LatentAttention(nn.Module):
    """Llama's attention with a cache of what comes *before* the rotation, for K and V together.

    ``kv`` holds the weights of K and V as one layer. Once it is a pair, its first factor gives the
    r numbers to cache, and its second expands them to keys and values, which are rotated then.

    The other fields simulate caches for a measurement, and save no memory: ``rounded`` says what a
    cache with fewer bits gives back for these numbers; with a dense layer ``full``, the ``recent``
    last tokens and the first ones, ``sinks``, on which much attention rests (Xiao et al. (2023),
    arXiv:2309.17453), keep exact keys and values; with ``window`` no other token is seen.
    """

    def __init__(self, attention: nn.Module, rotary: nn.Module) -> None:
        super().__init__()
        self.q_proj, self.o_proj = attention.q_proj, attention.o_proj
        self.layer_idx, self.head_dim = attention.layer_idx, attention.head_dim
        self.rotary = rotary
        k, v = attention.k_proj, attention.v_proj
        if k.bias is not None or v.bias is not None:
            raise ValueError("LatentAttention takes keys and values without a bias")
        self.kv = nn.Linear(k.in_features, k.out_features + v.out_features, bias=False)
        self.kv.weight = nn.Parameter(torch.cat([k.weight, v.weight]).detach())
        self.full: nn.Linear | None = None
        self.sinks, self.recent, self.window = 0, 0, False
        self.rounded: Callable[[Tensor], Tensor] | None = None

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        if attention_mask is not None and not _sees_all(attention_mask):
            raise ValueError("LatentAttention counts positions from 0: it takes no padding")
        cache = past_key_values if cache is None else cache
        pair = isinstance(self.kv, lrf.LowRank)
        latent = self.kv[0](hidden_states) if pair else self.kv(hidden_states)
        full = latent[..., :0] if self.full is None else self.full(hidden_states)
        if cache is not None:  # as if there were one head
            kept = cache.update(latent[:, None], full[:, None], self.layer_idx)
            latent, full = (part[:, 0] for part in kept)
        positions = torch.arange(latent.shape[1], device=latent.device)
        cos, sin = self.rotary(hidden_states, positions[None])
        q = self._heads(self.q_proj(hidden_states))
        q = _rotate(q, cos[:, -q.shape[2] :], sin[:, -q.shape[2] :])
        distance = positions[-q.shape[2] :, None] - positions
        k, v = self._keys_values(self._given_back(latent), cos, sin)
        seen = distance >= 0
        if self.full is not None:  # two sets of keys and values, and each token is in one of them
            near = (distance < self.recent) | (positions < self.sinks)
            far = torch.zeros_like(near) if self.window else ~near
            exact = self._keys_values(full, cos, sin)
            k, v = (torch.cat(both, dim=2) for both in zip(exact, (k, v)))
            seen = torch.cat([seen & near, seen & far], dim=1)
        y = []
        for some, mask in zip(q.split(256, dim=2), seen.split(256)):  # causal: half of the work
            used = mask.any(0)
            keys, values = k[:, :, used], v[:, :, used]
            y.append(_attention(some, keys, values, attn_mask=mask[:, used], enable_gqa=True))
        return self.o_proj(torch.cat(y, dim=2).transpose(1, 2).flatten(2)), None

    def _given_back(self, latent: Tensor) -> Tensor:
        """Both halves of K and V from what the cache holds; the first tokens are in no group."""
        if self.rounded is not None and latent.shape[1] > self.sinks:
            rounded = self.rounded(latent[:, self.sinks :].float())
            latent = torch.cat([latent[:, : self.sinks], rounded.to(latent)], dim=1)
        return self.kv[1](latent) if isinstance(self.kv, lrf.LowRank) else latent

    def _keys_values(self, both: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        k, v = (self._heads(part) for part in both.chunk(2, dim=-1))
        return _rotate(k, cos, sin), v

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each pair of numbers, half a head apart, by an angle that grows with the position."""
    a, b = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat([-b, a], dim=-1) * sin[:, None]


def _sees_all(mask: Tensor) -> bool:
    """Whether the last token sees all; masks hold truth values, or 0 for what is seen."""
    last = mask[..., -1, :] if mask.ndim > 2 else mask
    return bool((last == 0 if last.is_floating_point() else last != 0).all())


def with_latent_cache(model: nn.Module, sinks: int = 0, recent: int = 0) -> nn.Module:
    """A copy of a Llama whose attention has a layer ``kv``; it computes the same."""
    model = copy.deepcopy(model)
    for block in model.model.layers:
        block.self_attn = new = LatentAttention(block.self_attn, model.model.rotary_emb)
        new.sinks, new.recent = sinks, recent
        if sinks or recent:
            new.full = nn.Linear(new.kv.in_features, new.kv.out_features, bias=False)
            new.full.weight = nn.Parameter(new.kv.weight.detach(), requires_grad=False)
    return model


def kv_names(model: nn.Module) -> list[str]:
    return [KV.format(i) for i in range(len(model.model.layers))]


# --- Ranks ---------------------------------------------------------------------------------------


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


def cache_ranks(
    model: nn.Module,
    statistics: Statistics,
    numbers: int,
    multiple_of: int = 16,
    factors: Mapping[str, float] | None = None,
) -> dict[str, int | None]:
    """Ranks of the layers ``kv`` that sum up to at most ``numbers`` for each, by least error.

    ``factors`` correct the errors: what was measured over what was predicted.
    """
    options = {}
    for name, known in statistics.items():
        layer = model.get_submodule(name)
        errors = lrf.truncation_errors(layer, known) * (factors or {}).get(name, 1)
        full = min(layer.weight.shape)
        ranks = range(multiple_of, full, multiple_of)
        options[name] = {rank: (rank, errors[rank].item()) for rank in ranks}
        options[name][None] = (full, 0.0)
    return lrf.allocate_ranks(options, numbers * len(options))
