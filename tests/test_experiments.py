"""The long runs of lesson 7: tables that resume, and rows that are cheap to make again."""

import sys

import pandas as pd
import pytest
import torch
from torch import nn

import notebook_utils as nb
from experiments import models, recovery
from experiments.common import Table
from experiments.training import fit, shuffled


def committed(name):
    return pd.read_csv(nb.ROOT / "results" / f"{name}.csv", dtype={"accuracy (%)": float})


@pytest.fixture(scope="module")
def data():
    return nb.load_mnist()


def test_table_resumes_and_refuses_a_foreign_file(tmp_path):
    path, calls = tmp_path / "new folder" / "table.csv", []

    def measure():
        calls.append(1)
        return {"±": 2.5}

    for _ in range(2):  # the second time as after an interruption
        table = Table(path, ["method", "seed", "±"], key=["method", "seed"])
        table.add({"method": "1/8, dense", "seed": 0}, measure)
    assert len(calls) == 1
    assert path.read_text("utf-8") == 'method,seed,±\n"1/8, dense",0,2.5\n'
    with pytest.raises(ValueError, match="has the columns"):
        Table(path, ["method", "seed", "accuracy"], key=["method"])


def test_each_row_has_a_run(data):
    for name, parts in (("recovery", recovery.PARTS), ("recovery_validation", recovery.CHOICES)):
        runs = set()
        for part, widths in parts.values():
            nets = models.MnistNetworks(data, 0, widths)
            runs |= {("-".join(map(str, widths)), method) for method, _ in part(nets)}
        rows = committed(name)[["model", "method"]]
        assert runs == set(rows.itertuples(index=False, name=None))


def test_cheap_rows_of_recovery_agree(tmp_path, monkeypatch):
    def some(nets):
        yield from (run for run in recovery.goals(nets) if "8x" in run[0] and "no " in run[0])

    monkeypatch.setattr(recovery, "PARTS", {"some": (some, models.MLP)})
    monkeypatch.setattr(sys, "argv", ["recovery", "--seeds", "3", "--out", str(tmp_path)])
    recovery.main()
    made = pd.read_csv(tmp_path / "recovery.csv")
    both = made.merge(committed("recovery"), on=["model", "method", "parameters", "ratio", "seed"])
    assert len(both) == len(made) == 2
    assert (both["accuracy (%)_x"] - both["accuracy (%)_y"]).abs().max() < 0.05


def test_fit_takes_the_steps_of_the_lessons(data):
    x, y, networks = data.x_train[:1000], data.y_train[:1000], []
    for _ in range(2):
        torch.manual_seed(0)
        networks.append(nb.make_mlp((784, 8, 10)))
    nb.train(networks[0], x, y, epochs=2, seed=5)
    batches = shuffled(1000, epochs=2, seed=5)
    optimizer = torch.optim.Adam(networks[1].parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=len(batches))

    def loss_of(batch):
        logits = networks[1](x[batch])
        return nn.functional.cross_entropy(logits, y[batch])

    fit(batches, loss_of, optimizer, schedule)
    for ours, theirs in zip(*(network.parameters() for network in networks)):
        assert torch.equal(ours, theirs)
