"""The language model's texts, its cache and what published methods know, on a tiny Llama."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import lrf_utils as lrf
from experiments import smollm


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=6, num_key_value_heads=2, head_dim=16)
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(50, (3, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def joint(llama):
    return smollm.with_latent_cache(llama)


def logits(model, ids):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def generated(model, ids):
    return model.generate(ids[:1, :10], max_new_tokens=12, do_sample=False, eos_token_id=None)


def test_texts_have_three_parts_that_share_no_paragraph():
    texts = smollm.load_texts()
    assert tuple(texts) == smollm.KINDS
    for parts in texts.values():
        assert list(parts) == ["calibration", "validation", "test"]
        first, last = (set(parts[part].split("\n\n")) for part in ("calibration", "test"))
        assert not {text for text in first & last if len(text) > 100}


def test_windows_do_not_overlap_and_losses_are_those_of_their_tokens(llama):
    def letters(text):
        return {"input_ids": [ord(letter) - 97 for letter in text]}

    windows = smollm.token_windows(letters, "abcdefghijkl" * 2, 4, 5)
    assert windows.tolist() == [[0, 1, 2, 3, 4], [6, 7, 8, 9, 10]] * 2
    with pytest.raises(ValueError, match="too short for 5 windows of 5 tokens"):
        smollm.token_windows(letters, "abcdefghijkl" * 2, 5, 5)
    losses = smollm.window_losses(llama, windows)
    expected = llama(windows, labels=windows).loss
    torch.testing.assert_close(losses.mean(), expected)
    assert smollm.perplexity(losses) == pytest.approx(expected.exp().item())


def test_a_latent_cache_computes_the_same_and_generates(llama, joint, ids):
    torch.testing.assert_close(logits(joint, ids), logits(llama, ids))
    full = lrf.factorize(joint, dict.fromkeys(smollm.kv_names(joint), 48))
    torch.testing.assert_close(logits(full, ids), logits(llama, ids), atol=1e-4, rtol=1e-4)
    small = lrf.factorize(joint, dict.fromkeys(smollm.kv_names(joint), 8))
    for model in (joint, small):  # with a cache, what is generated is what comes without
        tokens = generated(model, ids)
        assert torch.equal(logits(model, tokens)[0, 9:-1].argmax(-1), tokens[0, 10:])
    assert torch.equal(generated(joint, ids), generated(llama, ids))


def test_older_tokens_are_rounded_and_recent_ones_are_not(joint, ids):
    expected = logits(joint, ids)
    torch.testing.assert_close(logits(smollm.with_bits(joint, torch.clone), ids), expected)
    changed = logits(smollm.with_bits(joint, torch.zeros_like), ids)
    torch.testing.assert_close(changed[:, :36], expected[:, :36])
    assert (changed[:, 36:] - expected[:, 36:]).abs().max() > 1e-3


@pytest.mark.parametrize("how", (smollm.naive_bits, smollm.kivi_bits))
def test_rounding_is_off_by_half_a_step(how):
    x = torch.randn(2, 70, 128, generator=torch.Generator().manual_seed(0))
    errors = [(how(x, bits) - x).abs().max() for bits in (2, 4, 8)]
    spread = x.max() - x.min()
    for error, bits in zip(errors, (2, 4, 8)):
        assert error <= 0.5001 * spread / (2**bits - 1)
    assert smollm.cache_bytes(384, 4, 32) == 240 and smollm.cache_bytes(384, 16, 32) == 768


def test_separate_factors_are_those_of_each_half():
    torch.manual_seed(0)
    layer = nn.Linear(12, 20, bias=False)
    pair = smollm.separate(layer, 8, None)
    for rows in (slice(0, 10), slice(10, 20)):
        A, B = lrf.truncated_svd(layer.weight[rows], 4)
        product = (pair[1].weight @ pair[0].weight)[rows]
        torch.testing.assert_close(product, A @ B, atol=1e-5, rtol=1e-4)


def test_published_methods_scale_the_inputs(llama, ids):
    name = "model.layers.0.mlp.up_proj"
    layer = llama.get_submodule(name)
    by_size = smollm.asvd_statistics(llama, [name], [ids])[name]
    by_gradient = smollm.fwsvd_statistics(llama, [name], [ids])[name]
    for known in (by_size, by_gradient):
        scale = known.covariance(centered=False).diagonal().sqrt().float()
        A, B = lrf.truncated_svd(layer.weight * scale, 5)
        pair = lrf.factorize_layer(layer, 5, known)
        product = pair[1].weight @ pair[0].weight
        torch.testing.assert_close(product, A @ B / scale, atol=1e-4, rtol=1e-3)


def test_ranks_of_the_cache_keep_to_the_budget(joint, ids):
    names = smollm.kv_names(joint)
    known = lrf.collect_statistics(joint, [ids], names, loss="tokens", weighted=True)
    ranks = smollm.cache_ranks(joint, known, 16, multiple_of=4)
    assert list(ranks) == names and 0 < sum(ranks.values()) <= 32
    assert smollm.equal_ranks(joint, names, 0.5) == dict.fromkeys(names, 13)


def test_bits_by_channel_keep_to_the_budget_and_go_where_they_help():
    bits = smollm.channel_bits(torch.linspace(0, 1, 64) ** 4, 100)
    assert 98 < (bits + (bits > 0)).sum() <= 100  # a group of 32 has a scale of 32 bits
    assert bits.diff().min() >= 0 and bits[0] == 0 and bits[-1] == 3
    assert smollm.channel_bits(torch.ones(4), 1e6).tolist() == [11] * 4
    x = torch.randn(1, 64, 64, generator=torch.Generator().manual_seed(0))
    rounded = smollm.round_channels(x, bits)
    assert not rounded[..., bits == 0].any()
    error = (rounded - x)[..., bits > 0].square().mean((0, 1))
    assert (error < 2 * 1.4 / (2.0 ** bits[bits > 0] - 1) ** 2).all()


def test_coded_pairs_are_the_best_factors_in_another_basis(llama, ids):
    model = smollm.with_latent_cache(llama)
    names = smollm.kv_names(model)
    known = lrf.collect_statistics(model, [ids], names, loss="tokens", weighted=True)
    layer, seen = model.get_submodule(names[0]), known[names[0]]
    pair, bits = smollm.coded(layer, seen, 6)
    expected = lrf.factorize_layer(layer, len(bits), seen, add_bias=True)
    x = torch.randn(20, 48)
    torch.testing.assert_close(pair(x), expected(x), atol=1e-3, rtol=1e-3)
    assert (bits + 1).sum() <= 48
    exact = smollm.with_coded_cache(model, known, 100)
    torch.testing.assert_close(logits(exact, ids), logits(llama, ids), atol=1e-2, rtol=1e-2)
