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

# The same examples in every run, and no limit on the time of one: a failure is a bug, never bad luck.
settings.register_profile("lrf", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("lrf")


DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
sides = st.integers(1, 12)
seeds = st.integers(0, 2**31)


def gaussian(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@st.composite
def weights(draw):
    """A float64 matrix: any numbers, or one with a given spectrum (rank-deficient, ill-conditioned, all equal)."""
    m, n = draw(sides), draw(sides)
    if draw(st.booleans()):
        numbers = st.floats(-10, 10, allow_subnormal=False)
        return torch.tensor(draw(hnp.arrays(np.float64, (m, n), elements=numbers)))
    k, seed = min(m, n), draw(seeds)
    U, V = torch.linalg.qr(gaussian(seed, m, k)).Q, torch.linalg.qr(gaussian(seed + 1, n, k)).Q
    exponents = draw(st.sampled_from([0, -3, -6, -12]))
    spectrum = torch.logspace(0, exponents, k, dtype=torch.float64)
    spectrum[draw(st.integers(1, k)) :] *= draw(st.sampled_from([0, 1]))
    return U * spectrum @ V.T


@st.composite
def weights_and_rank(draw):
    weight = draw(weights())
    return weight, draw(st.integers(1, min(weight.shape)))


@st.composite
def layers(draw, dtypes=DTYPES):
    weight = draw(weights())
    layer = nn.Linear(*reversed(weight.shape), bias=draw(st.booleans()), dtype=draw(st.sampled_from(dtypes)))
    layer.weight.data.copy_(weight)
    return layer.requires_grad_(False)


@given(weights_and_rank())
def test_the_squared_error_is_the_tail_of_the_spectrum(case):
    weight, rank = case
    A, B = lrf.truncated_svd(weight, rank)
    tail = (np.linalg.svd(weight.numpy(), compute_uv=False)[rank:] ** 2).sum()
    assert abs((weight - A @ B).square().sum().item() - tail) <= 1e-10 * weight.square().sum().item()


@given(weights_and_rank(), st.sampled_from(DTYPES))
def test_the_error_is_the_tail_to_rounding_for_every_dtype(case, dtype):
    weight, rank = case[0].to(dtype), case[1]
    A, B = lrf.truncated_svd(weight, rank)
    assert A.dtype == B.dtype == dtype
    S = np.linalg.svd(weight.double().numpy(), compute_uv=False)
    error = (weight.double() - A.double() @ B.double()).norm().item()
    # Rounding changes each factor by at most eps/2 of its norm, and numbers near 0 by less than 1e-7 (float16).
    assert abs(error - np.sqrt((S[rank:] ** 2).sum())) <= torch.finfo(dtype).eps * S[:rank].sum() + 1e-5


@given(weights_and_rank())
def test_no_other_matrix_of_that_rank_is_nearer(case):
    weight, rank = case
    A, B = lrf.truncated_svd(weight, rank)
    best = (weight - A @ B).norm()
    rows = gaussian(rank, rank, weight.shape[1])
    for other in (rows, B + 0.1 * rows):
        fitted = torch.linalg.lstsq(other.T, weight.T, driver="gelsd").solution.T @ other
        assert best <= (weight - fitted).norm() + 1e-10 * weight.norm()


@given(weights_and_rank())
def test_the_factors_are_balanced(case):
    weight, rank = case
    A, B = lrf.truncated_svd(weight, rank)
    S = torch.tensor(np.linalg.svd(weight.numpy(), compute_uv=False))[:rank]
    torch.testing.assert_close(A.T @ A, S.diag(), rtol=0, atol=1e-12 * S[0].item() + 1e-300)
    torch.testing.assert_close(B @ B.T, S.diag(), rtol=0, atol=1e-12 * S[0].item() + 1e-300)


@given(weights_and_rank(), st.sampled_from(DTYPES))
def test_ranks_are_nested(case, dtype):
    weight, rank = case[0].to(dtype), case[1]
    A, B = lrf.truncated_svd(weight, min(weight.shape))
    smaller = lrf.truncated_svd(weight, rank)
    assert torch.equal(smaller[0], A[:, :rank]) and torch.equal(smaller[1], B[:rank])


@given(layers(), seeds)
def test_at_full_rank_the_two_layers_compute_what_the_layer_computes(layer, seed):
    x = gaussian(seed, 5, layer.in_features).to(layer.weight.dtype)
    pair = lrf.factorize_linear(layer, min(layer.weight.shape))
    eps = torch.finfo(layer.weight.dtype).eps
    size = max(1.0, layer.weight.double().norm().item()) * x.double().norm(dim=1).max().item() + 1
    torch.testing.assert_close(pair(x), layer(x), rtol=0, atol=8 * eps * size)


@given(layers(), st.data())
def test_a_factorized_layer_has_the_parameters_of_two_factors(layer, data):
    m, n = layer.weight.shape
    rank = data.draw(st.integers(1, min(m, n)))
    pair = lrf.factorize_linear(layer, rank)
    bias = 0 if layer.bias is None else m
    assert lrf.count_parameters(layer) == m * n + bias
    assert lrf.count_parameters(pair) == rank * (m + n) + bias
    assert (lrf.count_parameters(pair) < lrf.count_parameters(layer)) == (rank <= lrf.break_even_rank(m, n))
    assert {p.dtype for p in pair.parameters()} == {layer.weight.dtype}


@given(st.integers(1, 10**9), st.integers(1, 10**9))
def test_the_break_even_rank_is_the_largest_that_saves(m, n):
    rank = lrf.break_even_rank(m, n)
    assert rank * (m + n) < m * n <= (rank + 1) * (m + n)
    assert rank == lrf.break_even_rank(n, m) < min(m, n)


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


def contents(model):
    modules = [(id(module), module.training) for module in model.modules()]
    return modules, [(id(p), p.detach().clone()) for p in model.parameters()]


@pytest.mark.parametrize("wrapped", [False, True])
@settings(max_examples=60)
@given(models(), st.sampled_from([7, 40, 10_000]))
def test_the_sweep_counts_what_factorizing_and_evaluating_counts(wrapped, case, batch_size):
    model, name, x, y = case
    if wrapped:  # the layer is not in an nn.Sequential at the top: no short cut
        model, name = nn.ModuleDict({"net": model}), f"net.{name}"
        model.forward = model["net"].forward
        expected = lrf.rank_sweep(model["net"], name.removeprefix("net."), x, y)
    else:
        full = min(model.get_submodule(name).weight.shape)
        expected = {r: lrf.accuracy(lrf.factorize(model, {name: r}), x, y) for r in range(1, full + 1)}
    assert lrf.rank_sweep(model, name, x, y, batch_size=batch_size) == expected


@given(models(), st.data())
def test_the_model_is_untouched(case, data):
    model, name, x, y = case
    before = contents(model)
    full = min(model.get_submodule(name).weight.shape)
    rank = data.draw(st.integers(1, full))
    copy = lrf.factorize(model, {name: rank})
    lrf.rank_sweep(model, name, x, y, ranks=[rank])
    lrf.accuracy(model, x, y)
    lrf.count_macs(model, x)
    assert not {p.data_ptr() for p in copy.parameters()} & {p.data_ptr() for p in model.parameters()}
    torch.testing.assert_close(contents(model), before, rtol=0, atol=0)


@given(layers(dtypes=(torch.float64,)), seeds, st.sampled_from([1, 3, 30]), st.data())
def test_no_other_layer_of_that_rank_is_nearer_on_the_inputs(layer, seed, rows, data):
    """Few inputs leave the covariance singular; nothing is divided by it."""
    weight, (m, n) = layer.weight, layer.weight.shape
    rank = data.draw(st.integers(1, min(m, n)))
    x = gaussian(seed, rows, n) + 1
    pair = lrf.factorize_linear(layer, rank, inputs=x)
    error = (pair(x) - layer(x)).square().sum()
    centred = x if layer.bias is None else x - x.mean(0)
    tail = np.linalg.svd((centred @ weight.T).numpy(), compute_uv=False)[rank:]
    scale = (x @ weight.T).square().sum().item()
    assert abs(error.item() - (tail**2).sum()) <= 1e-9 * scale
    plain = lrf.factorize_linear(layer, rank)
    assert error <= (plain(x) - layer(x)).square().sum() + 1e-9 * scale


@given(models(), st.data())
def test_an_allocation_keeps_to_its_budget_and_more_budget_never_predicts_more_error(case, data):
    model = case[0]
    linears = {name: layer.weight.detach() for name, layer in model.named_children() if type(layer) is nn.Linear}
    dense = sum(weight.numel() for weight in linears.values())
    budgets = sorted(data.draw(st.lists(st.integers(1, dense), min_size=2, max_size=2)))
    errors = []
    for budget in budgets:
        try:
            ranks = lrf.allocate_ranks(model, budget)
        except ValueError:
            continue
        assert sum(p.numel() for p in lrf.factorize(model, ranks).parameters() if p.ndim == 2) <= budget
        shares = {name: np.linalg.svd(weight.numpy(), compute_uv=False) ** 2 for name, weight in linears.items()}
        errors.append(sum(shares[name][rank:].sum() / shares[name].sum() for name, rank in ranks.items()))
        assert all(rank <= lrf.break_even_rank(*linears[name].shape) for name, rank in ranks.items())
    assert errors == sorted(errors, reverse=True)
