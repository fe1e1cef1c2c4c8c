"""Properties of lrf_utils that hold for any shape, rank and weight; hypothesis looks for a counterexample."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn

import lrf_utils as lrf

torch.set_num_threads(1)

# The same examples in every run, and no limit on the time of one: a failure is a bug, never bad luck.
settings.register_profile("lrf", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("lrf")

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
seeds = st.integers(0, 2**31)


def gaussian(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@st.composite
def weights_and_rank(draw):
    """A float64 matrix: any numbers, or one with a given spectrum (rank-deficient, ill-conditioned, all equal)."""
    m, n = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    k, seed = min(m, n), draw(seeds)
    if draw(st.booleans()):
        weight = torch.tensor(draw(hnp.arrays(np.float64, (m, n), elements=st.floats(-10, 10, allow_subnormal=False))))
    else:
        U, V = torch.linalg.qr(gaussian(seed, m, k)).Q, torch.linalg.qr(gaussian(seed + 1, n, k)).Q
        spectrum = torch.logspace(0, draw(st.sampled_from([0, -3, -6, -12])), k, dtype=torch.float64)
        spectrum[draw(st.integers(1, k)) :] *= draw(st.sampled_from([0, 1]))
        weight = U * spectrum @ V.T
    return weight, draw(st.integers(1, k))


@st.composite
def layers_and_rank(draw, dtypes=DTYPES):
    weight, rank = draw(weights_and_rank())
    layer = nn.Linear(*reversed(weight.shape), bias=draw(st.booleans()), dtype=draw(st.sampled_from(dtypes)))
    layer.weight.data.copy_(weight)
    return layer.requires_grad_(False), rank


@given(weights_and_rank(), st.sampled_from(DTYPES))
def test_the_error_of_the_svd_is_the_tail_and_its_factors_are_balanced_and_nested(case, dtype):
    weight, rank = case[0].to(dtype), case[1]
    A, B = lrf.truncated_svd(weight, rank)
    whole = lrf.truncated_svd(weight, min(weight.shape))
    assert torch.equal(whole[0][:, :rank], A) and torch.equal(whole[1][:rank], B) and A.dtype == B.dtype == dtype
    A, B, S = A.double(), B.double(), torch.tensor(np.linalg.svd(weight.double().numpy(), compute_uv=False))
    # Rounding changes each factor by at most eps/2 of its norm, and numbers near 0 by less than 1e-7 (float16).
    eps, least = torch.finfo(dtype).eps, 1e-5 if dtype is torch.float16 else 1e-9
    error = (weight.double() - A @ B).norm()
    assert abs(error - S[rank:].norm()) <= eps * S[:rank].sum() + least * (1 + S[0])
    for gram in (A.T @ A, B @ B.T):
        torch.testing.assert_close(gram, S[:rank].diag(), rtol=0, atol=4 * eps * S[:rank].sum().item() + least)


@given(layers_and_rank(), seeds)
def test_a_pair_has_two_factors_and_at_full_rank_computes_what_the_layer_computes(case, seed):
    layer, rank = case
    (m, n), dtype = layer.weight.shape, layer.weight.dtype
    x = gaussian(seed, 5, n).to(dtype)
    pair, full = lrf.factorize_layer(layer, rank), lrf.factorize_layer(layer, min(m, n))
    bias = 0 if layer.bias is None else m
    assert lrf.count_parameters(pair) == rank * (m + n) + bias and lrf.count_parameters(layer) == m * n + bias
    assert (lrf.count_parameters(pair) < lrf.count_parameters(layer)) == (rank <= lrf.break_even_rank(m, n))
    size = max(1.0, layer.weight.double().norm().item()) * x.double().norm(dim=1).max().item() + 1
    torch.testing.assert_close(full(x), layer(x), rtol=0, atol=8 * torch.finfo(dtype).eps * size)


@given(st.integers(1, 10**9), st.integers(1, 10**9))
def test_the_break_even_rank_is_the_largest_that_saves(m, n):
    rank = lrf.break_even_rank(m, n)
    assert rank * (m + n) < m * n <= (rank + 1) * (m + n)
    assert rank == lrf.break_even_rank(n, m) < min(m, n)


@given(layers_and_rank(dtypes=(torch.float64,)), seeds, st.sampled_from([1, 3, 30]))
def test_no_other_layer_of_that_rank_is_nearer_on_the_inputs_and_the_ridge(case, seed, rows):
    layer, rank = case
    n, x = layer.in_features, gaussian(seed, rows, layer.in_features) + 1
    known = lrf.collect(layer, x)[""]
    centred = x - x.mean(0) * (layer.bias is not None)
    white = torch.eye(n) * (centred.square().sum() / rows).sqrt()
    tail = np.linalg.svd((torch.cat([centred, white]) @ layer.weight.T).numpy(), compute_uv=False)[rank:]
    scale = 1e-9 * (x @ layer.weight.T).square().sum().item() / rows + 1e-12
    if rows > 1 or layer.bias is None:  # else nothing is known of the rows but their mean, and the ridge is 1
        assert lrf.errors(layer, known)[rank].item() == pytest.approx((tail**2).sum() / rows, rel=1e-6, abs=scale)
    pair = lrf.factorize_layer(layer, rank, known)
    change = ((pair(x) - layer(x)).square().sum() / rows).item()
    assert change <= lrf.errors(layer, known)[rank].item() + scale


@st.composite
def models(draw):
    """A small float64 network, its inputs and labels; logits that depend on rounding alone have no place in it."""
    widths = draw(st.lists(st.integers(2, 8), min_size=2, max_size=4))
    seed, scale = draw(seeds), draw(st.sampled_from([0.1, 1.0, 10.0]))
    parts = []
    for i, (n, m) in enumerate(pairwise(widths)):
        layer = nn.Linear(n, m, bias=draw(st.booleans()) or i == len(widths) - 2, dtype=torch.float64)
        layer.weight.data = gaussian(seed + i, m, n) * torch.logspace(0, draw(st.sampled_from([0, -4])), m)[:, None]
        if layer.bias is not None:
            layer.bias.data = scale * gaussian(seed - i, m)
        parts += [layer, draw(st.sampled_from([nn.ReLU, nn.ReLU, nn.Tanh, nn.Identity]))()]
    model = nn.Sequential(*parts[: len(parts) - draw(st.integers(0, 1))])
    x = gaussian(seed + 99, 40, widths[0])
    with torch.no_grad():
        right = model(x).argmax(1)
    labels = torch.where(gaussian(seed + 98, 40) > 0, right, torch.arange(40) % widths[-1])
    name = draw(st.sampled_from([name for name, part in model.named_children() if type(part) is nn.Linear]))
    return model, name, x, labels


@settings(max_examples=60)
@given(models(), st.sampled_from([7, 40, 10_000]))
def test_the_sweep_counts_what_factorizing_and_evaluating_counts(case, batch_size):
    model, name, x, y = case
    full = min(model.get_submodule(name).weight.shape)
    expected = {r: lrf.accuracy(lrf.factorize(model, {name: r}), x, y) for r in range(1, full + 1)}
    assert lrf.rank_sweep(model, name, x, y, batch_size=batch_size) == expected
