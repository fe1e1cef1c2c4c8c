"""The text experiments: their decoder, their tables, and that lessons show the code they ran."""

import ast
import hashlib
import re
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import torch

from experiments import decoder, kv_cache, minilm
from experiments.models import Decoder, encode, load_text

ROOT = Path(__file__).parent.parent
TAUGHT = {
    "09_attention": "Attention JointAttention PositionAttention by_position cut positions_known "
    "shared_out with_joint",
    "10_pretrained_transformer": "SentenceEncoder batches distil embed rounded_table sketch",
}


def test_logits_with_and_without_cache_agree():
    torch.manual_seed(0)
    model, tokens = Decoder(width=16, heads=2, layers=2).eval(), torch.randint(63, (3, 12))
    caches = [[] for _ in model.blocks]
    with torch.no_grad():
        parts = [model(part, caches) for part in tokens.split([5, 1, 4, 2], dim=1)]
        torch.testing.assert_close(torch.cat(parts, 1), model(tokens), rtol=0, atol=1e-5)
    assert all(cache[0].shape == (3, 12, 32) for cache in caches)


def test_bad_input_ends_in_a_clear_error(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=re.escape("0 + 257 tokens, but the context is 256")):
        Decoder(width=8, heads=2, layers=1)(torch.zeros(1, 257).long())
    with pytest.raises(ValueError, match=r"the decoder does not know \['é'\]"):
        encode("é", "abc")
    with pytest.raises(OSError, match=r"missing or damaged .* git checkout"):
        load_text(tmp_path / "kjv.txt.gz")
    monkeypatch.setattr("sys.argv", ["decoder", "--steps", "10"])
    with pytest.raises(SystemExit, match="--steps must be over 100, the steps of the warm-up"):
        decoder.main()


def test_text_is_the_one_that_the_data_page_names():
    text = load_text()
    whole = "".join(text.alphabet[i] for i in torch.cat(text[1:]).tolist())
    page = (ROOT / "data" / "README.md").read_text(encoding="utf-8")
    assert hashlib.sha256(whole.encode()).hexdigest() in page


def test_runs_are_the_rows_of_the_committed_tables(monkeypatch):
    monkeypatch.setattr(minilm, "original", None)  # listing the runs loads no model
    for name, module, columns, *parts in (
        ("kv_cache", kv_cache, 3, kv_cache.untrained_runs, kv_cache.trained_runs),
        ("kv_cache_validation", kv_cache, 3, kv_cache.validation_runs),
        ("minilm", minilm, 4, *minilm.PARTS.values()),
        ("minilm_validation", minilm, 4, minilm.choices),
    ):
        table = pd.read_csv(ROOT / f"results/{name}.csv", dtype=str, keep_default_na=False)
        committed = set(table[module.COLUMNS[:columns]].itertuples(index=False, name=None))
        rows = [tuple(map(str, row)) for part in parts for *row, _ in part()]
        assert len(rows) == len(set(rows))
        assert set(rows) == committed


def test_one_row_is_made_again():
    small = kv_cache.reduced("joint", "plain SVD", "equal", 64, draw=0)
    loss = kv_cache.losses(small, kv_cache.stretches(kv_cache.text().test, 64)).mean().item()
    table = pd.read_csv(ROOT / "results/kv_cache.csv", index_col=["method", "numbers"])
    assert abs(loss - table.loc[("joint, plain SVD, equal", 64), "loss"].item()) < 1e-4


@pytest.mark.parametrize("lesson", TAUGHT)
def test_lesson_shows_the_code_that_made_its_table(lesson):
    models = definitions((ROOT / "experiments" / "models.py").read_text(encoding="utf-8"))
    cells = nbformat.read(ROOT / "notebooks" / f"{lesson}.ipynb", as_version=4).cells
    shown = definitions("\n".join(cell.source for cell in cells if cell.cell_type == "code"))
    for name in TAUGHT[lesson].split():
        assert shown[name] == models[name]


def definitions(code):
    """The functions and classes of some code, without annotations, docstrings and comments."""
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            node.annotation = None
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            node.returns = None
            if ast.get_docstring(node):
                del node.body[0]
    return {node.name: ast.unparse(node) for node in tree.body if hasattr(node, "name")}
