"""The language model's texts and what published methods know, on a tiny Llama."""

import copy
import math

import pandas as pd
import pytest
import torch
from torch import nn

import lrf_utils as lrf
from experiments import smollm


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


def test_published_methods_scale_the_inputs(llama, ids):
    name = "model.layers.0.mlp.up_proj"
    layer = llama.get_submodule(name)
    for sizes in (smollm.input_sizes, smollm.weight_gradients):
        known = smollm.diagonal(sizes(llama, [name], [ids])[name])
        scale = known.covariance(centered=False).diagonal().sqrt().float()
        A, B = lrf.truncated_svd(layer.weight * scale, 5)
        pair = lrf.factorize_layer(layer, 5, known)
        product = pair[1].weight @ pair[0].weight
        torch.testing.assert_close(product, A @ B / scale, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("how", ({}, {"loss": "tokens", "weighted": True}, None))
def test_nested_factors_are_the_best_of_every_rank(llama, ids, how):
    names = [f"model.layers.0.{name}" for name in ("mlp.up_proj", "mlp.down_proj")]
    known = {} if how is None else lrf.collect_statistics(llama, [ids], names, **how)
    for name in names:
        layer, seen = llama.get_submodule(name), known.get(name)
        A, B, errors = smollm.nested_factors(layer, seen)
        for rank in (3, len(B)):
            pair = lrf.factorize_layer(layer, rank, seen)
            product = pair[1].weight @ pair[0].weight
            torch.testing.assert_close(A[:, :rank] @ B[:rank], product, atol=1e-4, rtol=1e-3)
        if how != {}:  # without a metric, errors are those of an input, not of a row
            expected = lrf.truncation_errors(layer, seen)
            torch.testing.assert_close(errors, expected, atol=1e-6 * expected[0].item(), rtol=1e-4)
        options = smollm.options_of({name: (A, B, errors)}, 8)[name]
        assert list(options) == [None, 8, 16, 24] and options[None] == (64 * 48, 0)
        assert options[8] == (8 * (64 + 48), errors[8].item())


def test_any_two_models_of_a_table_can_be_compared(tmp_path):
    path = tmp_path / "table.csv"
    rows = ["a,1,x,0.7 0.9", "a,1,y,1.1 1.3", "b,1,y,1.0 1.2", "b,1,x,0.5 0.8", "a,2,x,9 9"]
    path.write_text("\n".join(["method,size,text,losses", *rows]))
    table = smollm.read_losses(path)
    a, b = (smollm.losses_of(table, method=method, size=1) for method in "ab")
    found, other = smollm.change(a, b), smollm.losses_of(table, method="a", size=2)
    assert smollm.change(other, b).mean == pytest.approx(100 * math.expm1(8.35))  # on x alone
    assert found.mean == pytest.approx(100 * math.expm1(0.125)) and found.low < found.mean
    assert smollm.perplexity(b) == pytest.approx(math.exp(0.875))
    with pytest.raises(ValueError, match="not one model, but 0 rows match"):
        smollm.losses_of(table, method="c")
    with pytest.raises(ValueError, match="not one model"):
        smollm.losses_of(table, size=1)


def test_weights_are_rounded_in_groups_and_a_table_becomes_a_pair(llama, ids):
    names = ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"]
    few = lrf.factorize(llama, {names[1]: 9})
    for model in (
        smollm.rounded_model(few, names, 8, group=16, shift=4),
        smollm.in_random_basis(llama, names, 8, 16),
    ):
        for name in names:
            layer, before = model.get_submodule(name), few.get_submodule(name)
            if isinstance(layer, nn.Linear) and isinstance(before, nn.Linear):
                error = (layer.weight - before.weight).abs().max()
                assert 0 < error < 0.01 * before.weight.abs().max()
    tied = copy.deepcopy(llama)
    tied.lm_head.weight = tied.model.embed_tokens.weight
    full = smollm.with_table(tied, tied.lm_head.weight.detach(), torch.eye(48))
    with torch.no_grad():
        torch.testing.assert_close(full(ids).logits, tied(ids).logits, atol=1e-5, rtol=1e-4)
    assert lrf.count_parameters(full) == lrf.count_parameters(tied) + 2 * 48 * 48


def test_equal_ranks_keep_the_same_share(llama):
    names = ["model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"]
    assert smollm.equal_ranks(llama, names, 0.5) == dict(zip(names, (13, 16)))


def test_a_model_runs_from_the_block_of_the_layer_that_is_changed(llama, ids):
    alone = smollm.Alone(llama, ids)
    for name in ("model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"):
        small = lrf.factorize(llama, {name: 5})
        with torch.no_grad():
            expected = small(ids).logits.log_softmax(-1)
        found = alone(name, small.get_submodule(name))
        torch.testing.assert_close(found, expected)
        with torch.no_grad():
            assert alone.loss(found) == pytest.approx(small(ids, labels=ids).loss.item(), rel=1e-5)
        both = {"input": found, "target": alone.before, "log_target": True, "reduction": "none"}
        divergence = nn.functional.kl_div(**both).sum(-1).mean().item()
        assert alone.divergence(found) == pytest.approx(divergence, abs=1e-8)


def test_what_takes_long_is_kept_in_a_file_with_its_time(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm, "FOLDER", tmp_path)
    calls = []
    for _ in range(2):
        assert smollm.saved("numbers", 3, lambda: calls.append(0) or {"a": 1.0}) == {"a": 1.0}
    assert len(calls) == 1
    (row,) = smollm.times().path.read_text().splitlines()[1:]
    assert row.startswith("numbers,3,")


def test_options_are_corrected_by_what_was_measured():
    options = {"a": {None: (10, 0.0), 2: (4, 3.0)}, "b": {None: (10, 0.0), 2: (4, 5.0)}}
    layers = pd.DataFrame({"predicted": [2.0, 1.0], "KL": [3.0, 0.5]}, ["a", "b"])
    assert lrf.allocate_ranks(options, 14) == {"a": 2, "b": None}
    found = smollm.corrected(options, layers)
    assert found["a"][2] == (4, 4.5) and found["b"] == {None: (10, 0.0), 2: (4, 2.5)}
    assert lrf.allocate_ranks(found, 14) == {"a": None, "b": 2}
