"""What the notebooks just wrote against what is committed. Needs a run of the notebooks, as in ``make test``."""

import os
from pathlib import Path

import pandas as pd
import pytest

from tests.compare import TOLERANCES

ROOT = Path(__file__).resolve().parent.parent
# Tables that scripts write. Notebooks 07 to 12 run some rows of them again.
FROM_SCRIPTS = {"run_times.csv", "recovery.csv", "recovery_validation.csv"}
FROM_SCRIPTS |= {"convolutions.csv", "convolutions_pairs.csv", "convolutions_validation.csv"}
FROM_SCRIPTS |= {"kv_cache.csv", "kv_cache_validation.csv", "minilm.csv", "minilm_validation.csv"}
FROM_SCRIPTS |= {"scale_svd.csv", "scale_engines.csv", "scale_memory.csv"}
FROM_SCRIPTS |= {"runtime_pairs.csv", "runtime_bits.csv", "runtime_memory.csv"}
FROM_SCRIPTS |= {"quantized_mnist.csv", "quantized_minilm.csv", "quantized_layers.csv"}
FROM_SCRIPTS |= {"quantized_files.csv", "quantized_validation.csv"}
TABLES = sorted({p.name for p in (ROOT / "results").glob("*.csv")} - FROM_SCRIPTS)
TIMES = r"µs|\bms\b|seconds|speed-up|spread \(%\)"  # columns that hold times


@pytest.fixture(scope="session")
def fresh():
    """The folder that the notebooks of this session write to."""
    return Path(os.environ["LRF_OUT"]) / "results"


def test_every_table_is_committed_and_nothing_else(request, fresh):
    run = {item.path for item in request.session.items if item.path.suffix == ".ipynb"}
    if not run >= set((ROOT / "notebooks").rglob("[0-9]*.ipynb")):
        pytest.skip("not all notebooks were run in this session")
    assert sorted(path.name for path in fresh.glob("*.csv")) == TABLES


@pytest.mark.parametrize("name", TABLES)
def test_table_is_what_the_run_gives(name, fresh):
    if not (fresh / name).exists():
        pytest.skip("the notebook that writes it was not run in this session")
    stored, new = (pd.read_csv(folder / name) for folder in (ROOT / "results", fresh))
    times = stored.columns[stored.columns.str.contains(TIMES)]
    pd.testing.assert_frame_equal(
        new.drop(columns=times), stored.drop(columns=times), rtol=0, atol=TOLERANCES["evaluated"]
    )
    assert list(new.columns) == list(stored.columns)
    assert (new[times] >= 0).all(axis=None)
