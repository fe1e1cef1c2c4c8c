"""Attention with a cache of latent numbers, its ranks and its bits, on a tiny Llama."""

import pandas as pd
import pytest
import torch
from torch import nn

import lrf_utils as lrf
import notebook_utils as nb
from experiments import cache_bits, kv_cache, latent_cache


@pytest.fixture
def joint(llama):
    return latent_cache.with_latent_cache(llama)


def logits(model, ids):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def generated(model, ids):
    return model.generate(ids[:1, :10], max_new_tokens=12, do_sample=False, eos_token_id=None)


def test_a_latent_cache_computes_the_same_and_generates(llama, joint, ids):
    torch.testing.assert_close(logits(joint, ids), logits(llama, ids))
    full = lrf.factorize(joint, dict.fromkeys(latent_cache.kv_names(joint), 48))
    torch.testing.assert_close(logits(full, ids), logits(llama, ids), atol=1e-4, rtol=1e-4)
    small = lrf.factorize(joint, dict.fromkeys(latent_cache.kv_names(joint), 8))
    for model in (joint, small):  # with a cache, what is generated is what comes without
        tokens = generated(model, ids)
        assert torch.equal(logits(model, tokens)[0, 9:-1].argmax(-1), tokens[0, 10:])
    assert torch.equal(generated(joint, ids), generated(llama, ids))


def test_two_sequences_and_two_parts_give_what_one_call_does(llama, joint, ids):
    small = lrf.factorize(joint, dict.fromkeys(latent_cache.kv_names(joint), 8))
    exact = latent_cache.with_latent_cache(llama, sinks=2, recent=5)
    for model in (joint, small, cache_bits.with_bits(exact, torch.clone)):
        with torch.no_grad():
            first = model(ids[:2, :15], use_cache=True)
            cache = first.past_key_values
            second = model(ids[:2, 15:], cache=cache).logits
        torch.testing.assert_close(second, logits(model, ids[:2])[:, 15:])
    tokens = joint.generate(ids[:2, :10], max_new_tokens=5, do_sample=False, eos_token_id=None)
    for row, prompt in zip(tokens, ids):
        assert torch.equal(row[:15], generated(llama, prompt[None])[0, :15])


def test_a_latent_cache_holds_only_its_numbers_and_takes_no_padding(joint, ids):
    small = lrf.factorize(joint, dict.fromkeys(latent_cache.kv_names(joint), 8))
    with torch.no_grad():
        output = small(ids, use_cache=True)
    cache = output.past_key_values
    for layer in cache.layers:
        assert layer.keys.numel() == 8 * ids.numel() and not layer.values.numel()  # noqa: PD011
    mask = torch.ones_like(ids)
    torch.testing.assert_close(small(ids, attention_mask=mask).logits, output.logits)
    mask[0, :3] = 0
    with pytest.raises(ValueError, match="it takes no padding"):
        small(ids, attention_mask=mask)


def test_only_far_tokens_are_cut_rounded_or_unseen(llama, ids):
    expected = logits(llama, ids)
    names = latent_cache.kv_names(latent_cache.with_latent_cache(llama))
    near = latent_cache.with_latent_cache(llama, sinks=4, recent=32)
    torch.testing.assert_close(logits(near, ids), expected)
    cut = lrf.factorize(near, dict.fromkeys(names, 4))
    rounded = latent_cache.with_latent_cache(llama, sinks=4, recent=32)
    cache_bits.with_bits(rounded, torch.zeros_like)
    window = latent_cache.with_latent_cache(llama, sinks=4, recent=32)
    for block in window.model.layers:
        block.self_attn.window = True
    for model in (cut, rounded, window):
        changed = logits(model, ids)
        torch.testing.assert_close(changed[:, :36], expected[:, :36])
        assert (changed[:, 36:] - expected[:, 36:]).abs().max() > 1e-3


def test_gradients_reach_a_layer_only_by_way_of_far_tokens(llama, ids):
    near = latent_cache.with_latent_cache(llama, sinks=4, recent=32)
    names = latent_cache.kv_names(near)
    how = {"loss": "tokens", "weighted": True}
    long = lrf.collect_statistics(near, [ids], names, **how)[names[1]]
    assert long.gradient_sum.any()
    with pytest.warns(UserWarning, match="the loss does not depend on"):
        short = lrf.collect_statistics(near, [ids[:, :36]], names, **how)[names[1]]
    assert not short.gradient_sum.any()


@pytest.mark.parametrize("how", (cache_bits.naive_bits, cache_bits.kivi_bits))
def test_rounding_is_off_by_half_a_step(how):
    x = torch.randn(2, 70, 128, generator=torch.Generator().manual_seed(0))
    errors = [(how(x, bits) - x).abs().max() for bits in (2, 4, 8)]
    spread = x.max() - x.min()
    for error, bits in zip(errors, (2, 4, 8)):
        assert error <= 0.5001 * spread / (2**bits - 1)
    assert cache_bits.cache_bytes(384, 4, 32) == 240 and cache_bits.cache_bytes(384, 16, 32) == 768


def test_separate_factors_are_those_of_each_half():
    torch.manual_seed(0)
    layer = nn.Linear(12, 20, bias=False)
    pair = latent_cache.separate(layer, 8, None)
    for rows in (slice(0, 10), slice(10, 20)):
        A, B = lrf.truncated_svd(layer.weight[rows], 4)
        product = (pair[1].weight @ pair[0].weight)[rows]
        torch.testing.assert_close(product, A @ B, atol=1e-5, rtol=1e-4)


def test_ranks_of_the_cache_keep_to_the_budget(joint, ids):
    names = latent_cache.kv_names(joint)
    known = lrf.collect_statistics(joint, [ids], names, loss="tokens", weighted=True)
    ranks = latent_cache.cache_ranks(joint, known, 16, multiple_of=4)
    assert list(ranks) == names and 0 < sum(ranks.values()) <= 32


def test_bits_by_channel_keep_to_the_budget_and_go_where_they_help():
    bits = cache_bits.channel_bits(torch.linspace(0, 1, 64) ** 4, 100, 32)
    assert 98 < (bits + (bits > 0)).sum() <= 100  # a group of 32 has a scale of 32 bits
    assert bits.diff().min() >= 0 and bits[0] == 0 and bits[-1] == 3
    assert cache_bits.channel_bits(torch.ones(4), 1e6, 32).tolist() == [11] * 4
    x = torch.randn(1, 64, 64, generator=torch.Generator().manual_seed(0))
    rounded = cache_bits.round_channels(x, bits)
    assert not rounded[..., bits == 0].any()
    error = (rounded - x)[..., bits > 0].square().mean((0, 1))
    assert (error < 2 * 1.4 / (2.0 ** bits[bits > 0] - 1) ** 2).all()


def test_coded_pairs_are_the_best_factors_in_another_basis(llama, ids):
    model = latent_cache.with_latent_cache(llama)
    names = latent_cache.kv_names(model)
    known = lrf.collect_statistics(model, [ids], names, loss="tokens", weighted=True)
    layer, seen = model.get_submodule(names[0]), known[names[0]]
    pair, bits, _ = cache_bits.coded(layer, seen, 6)
    expected = lrf.factorize_layer(layer, len(bits), seen, add_bias=True)
    x = torch.randn(20, 48)
    torch.testing.assert_close(pair(x), expected(x), atol=1e-3, rtol=1e-3)
    assert (bits + 1).sum() <= 48
    inputs = lrf.collect_statistics(model, [ids], names)
    for each, how in ((inputs, {}), (known, {"rotate": False})):  # all channels, in 11 bits
        pair, _, _ = cache_bits.coded(layer, each[names[0]], 100, **how)
        torch.testing.assert_close(pair(x), layer(x), atol=1e-4, rtol=1e-4)
    exact = cache_bits.with_coded_cache(model, known, 100)
    torch.testing.assert_close(logits(exact, ids), logits(llama, ids), atol=1e-2, rtol=1e-2)


def test_fixed_steps_need_no_scales(llama, ids):
    model = latent_cache.with_latent_cache(llama)
    names = latent_cache.kv_names(model)
    known = lrf.collect_statistics(model, [ids], names, loss="tokens", weighted=True)
    seen = lrf.collect_statistics(model, [ids], names)
    layer = model.get_submodule(names[0])
    _, bits, rounded = cache_bits.coded(layer, known[names[0]], 6, None, seen[names[0]])
    assert bits.sum() == 48 and bits.min() == 1
    x = torch.randn(1, 50, len(bits)) * 0.1
    assert torch.equal(rounded(x)[:, 7:9], rounded(x[:, 7:9]))  # each token on its own
    assert all(rounded(x)[..., i].unique().numel() <= 2**b for i, b in enumerate(bits.tolist()))
    x, values = torch.randn(100_000, generator=torch.Generator().manual_seed(0)), range(1, 9)
    for b, step, error in zip(values, cache_bits.FIXED_STEPS[1:], cache_bits.FIXED_ERRORS[1:]):
        found = cache_bits.round_fixed(x[:, None], torch.tensor([b]), torch.tensor([step]))
        assert (found[:, 0] - x).square().mean().item() == pytest.approx(error, rel=0.05)
    exact = cache_bits.with_coded_cache(model, known, 48, None, seen)
    assert (logits(exact, ids) - logits(llama, ids)).abs().max() < 0.05


def test_runs_are_the_rows_of_the_committed_table():
    table = pd.read_csv(nb.ROOT / "results" / "kv_cache.csv", dtype=str, keep_default_na=False)
    columns = [name for name in kv_cache.COLUMNS if name != "losses"]
    kinds = (*kv_cache.KINDS, "repeated")
    runs = [kv_cache.run_of(*row)[0] for row in kv_cache.ROWS]
    rows = {(*map(str, run.values()), kind) for run in runs for kind in kinds}
    assert len(rows) == len(kinds) * len(runs)
    assert set(table[columns].itertuples(index=False, name=None)) == rows
    counts = table["losses"].str.split().str.len()
    assert (counts == table["kind"].eq("repeated").map({True: 3, False: 6})).all()
