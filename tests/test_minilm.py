"""The experiment on MiniLM: its table, and that it agrees with the helper."""

from pathlib import Path

import pandas as pd
import torch

import lrf_utils as lrf
from experiments import minilm

TABLE = Path(__file__).parent.parent / "results" / "minilm.csv"


def test_runs_are_the_rows_of_the_committed_table(monkeypatch):
    monkeypatch.setattr(minilm, "original", None)  # listing the runs loads no model
    table = pd.read_csv(TABLE, dtype=str, keep_default_na=False)
    committed = set(table[minilm.KEY].itertuples(index=False, name=None))
    rows = [tuple(map(str, row)) for *row, _ in minilm.runs()]
    assert len(rows) == len(set(rows))
    assert set(rows) == committed


def test_reciprocal_ranks_are_those_of_the_places():
    table = pd.read_csv(TABLE)
    for _, row in table.iterrows():
        places = torch.tensor([int(place) for place in row["places"].split()])
        assert len(places) == 2000
        assert abs(100 * (1 / places).mean().item() - row["MRR (%)"]) < 6e-4


def test_factors_are_those_of_the_helper(monkeypatch):
    """On a small encoder: the weighted metric, with its bias."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 4))
    x = torch.randn(200, 6)
    generator = torch.Generator().manual_seed(0)

    def loss(output):
        yield (output * torch.randn(output.shape, generator=generator)).sum()

    known = lrf.collect_statistics(model, x, loss=loss, weighted=True)
    monkeypatch.setattr(minilm, "dense", lambda: model)
    monkeypatch.setattr(minilm, "statistics", lambda draw=0, weighted=False: known)
    for cached in (minilm.weights, minilm.factors):
        cached.cache_clear()
    try:
        made = minilm.compressed("weighted metric", {"0": 2, "2": None})
    finally:
        for cached in (minilm.weights, minilm.factors):
            cached.cache_clear()
    expected = lrf.factorize(model, {"0": 2}, known)
    torch.testing.assert_close(made(x), expected(x), rtol=0, atol=1e-4)
