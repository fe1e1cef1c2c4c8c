"""Distillation of a language model's factors, on a tiny Llama; and the rates that were taken."""

import dataclasses
from functools import partial

import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import lrf_utils as lrf
import notebook_utils as nb
from experiments import distill, smollm
from experiments import language_model as lm
from experiments.common import Table

NAMES = [f"model.layers.{i}.mlp.{part}_proj" for i in (0, 1) for part in ("up", "down")]


@pytest.fixture
def llama(monkeypatch, tmp_path):
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=6, num_key_value_heads=2, head_dim=16)
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data *= 5  # predictions that differ between tokens
    ids = torch.randint(50, (8, 24), generator=torch.Generator().manual_seed(1))
    for cached in (distill.teacher, distill.teaching, distill.head, distill.windows):
        cached.cache_clear()
    monkeypatch.setattr(lm, "dense", lambda: model)
    monkeypatch.setattr(lm, "FOLDER", tmp_path)
    monkeypatch.setattr(smollm, "written_text", lambda *_: ids)
    monkeypatch.setattr(distill, "validation", lambda: dict.fromkeys(smollm.KINDS, ids[:1]))
    small = partial(lrf.factorize, model, dict.fromkeys(NAMES, 8))
    monkeypatch.setitem(distill.STUDENTS, "ours", small)
    return model


@pytest.fixture
def curve(tmp_path):
    columns = [*distill.RUN, "step", "CPU seconds", *smollm.KINDS]
    return Table(tmp_path / "curve.csv", columns, [*distill.RUN, "step"])


def divergence(teacher, student, ids):
    with torch.no_grad():
        p, q = (model(ids, use_cache=False).logits.log_softmax(-1) for model in (teacher, student))
    return F.kl_div(q, p, log_target=True, reduction="sum").item() / ids.numel()


def test_the_surrogate_has_the_gradient_of_the_loss():
    torch.manual_seed(0)
    states, taught, head = torch.randn(3, 50, 8), torch.randn(3, 50, 8), torch.randn(20, 8)
    ids, losses = torch.randint(20, (3, 50)), []
    for target in (taught, ids):
        x = states.clone().requires_grad_()
        distill.surrogate(x, target, head).backward()
        y = states.clone().requires_grad_()
        logits = (y @ head.T).flatten(0, 1)
        if target is ids:
            loss = F.cross_entropy(logits, ids.flatten())
        else:
            p = (taught @ head.T).flatten(0, 1).softmax(1)
            loss = F.kl_div(logits.log_softmax(1), p, reduction="batchmean")
        loss.backward()
        torch.testing.assert_close(x.grad, y.grad)
        losses.append(loss)
    assert losses[0] != losses[1]


def test_only_the_factors_are_trained_and_others_have_16_bits(llama):
    model = distill.untrained("ours")
    student = distill.trainable(model, NAMES)
    wanted = {name for name, p in student.named_parameters() if p.requires_grad}
    assert wanted == {f"{name}.{i}.weight" for name in NAMES for i in (0, 1)}
    kinds = {
        name: part.weight.dtype
        for name, part in student.named_modules()
        if isinstance(part, nn.Linear)
    }
    assert kinds["lm_head"] == kinds[f"{NAMES[0]}.1"] == torch.float32
    assert kinds["model.layers.0.self_attn.q_proj"] == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("change", ({}, {"update": "LoRA"}, {"loss": "cross-entropy"}))
def test_training_changes_the_factors_alone_and_helps(llama, curve, change):
    ids = distill.windows("written")
    before = distill.untrained("ours")
    run = distill.Run("ours", rate=1e-2, steps=40, **change)
    after = distill.trained(run, curve)
    assert {name for name, part in after.named_modules() if isinstance(part, lrf.LowRank)} == set(
        NAMES
    )
    changed = {
        name for name, p in after.named_parameters() if not p.equal(before.get_parameter(name))
    }
    assert changed == {f"{name}.{i}.weight" for name in NAMES for i in (0, 1)}
    if run.loss == "divergence":
        assert divergence(llama, after, ids) < 0.8 * divergence(llama, before, ids)
    else:
        entropy = [smollm.window_losses(model, ids).mean() for model in (before, after)]
        assert entropy[1] < entropy[0]
    if run.update == "LoRA":
        gap = after.get_submodule(NAMES[0])[1].weight - before.get_submodule(NAMES[0])[1].weight
        assert torch.linalg.matrix_rank(gap, rtol=1e-4) <= 8


def test_an_interrupted_run_ends_as_one_that_was_not(llama, curve, monkeypatch):
    run = distill.Run("ours", rate=1e-2, steps=40)
    whole = distill.trained(run, curve)
    rows = pd.read_csv(curve.path)
    assert list(rows["step"]) == [0, 20, 40]
    for state in lm.FOLDER.glob("distill *"):
        state.unlink()
    stopped, fit = [], distill.fit

    def stop(*args, **kwargs):
        if stopped:
            raise KeyboardInterrupt
        stopped.append(fit(*args, **kwargs))

    monkeypatch.setattr(distill, "fit", stop)
    with pytest.raises(KeyboardInterrupt):
        distill.trained(run, curve)
    monkeypatch.setattr(distill, "fit", fit)
    again = distill.trained(run, curve)
    for name, parameter in whole.named_parameters():
        torch.testing.assert_close(again.get_parameter(name), parameter, atol=1e-4, rtol=1e-3)
    assert len(pd.read_csv(curve.path)) == 3


def test_the_rate_warms_up_and_falls():
    rates = [distill.schedule(step, 100) for step in range(101)]
    assert rates[9] == 1 and max(rates) == 1 and rates[0] == pytest.approx(0.1)
    assert rates[100] == pytest.approx(0.02)


def test_the_rate_taken_was_the_best_of_those_tried():
    curve, last = pd.read_csv(nb.ROOT / "results" / "distill_curve.csv"), {}
    for run in distill.TRIALS:
        row = {**dataclasses.asdict(run), "step": run.steps}
        found = curve[(curve[list(row)] == pd.Series(row)).all(axis=1)]
        last[run.rate] = found[list(smollm.KINDS)].mean(axis=1).item()
    rate = distill.Run("ours").rate
    assert min(last, key=last.get) == rate and min(last) < rate < max(last)
