"""Lesson 7: its settings were the best on validation images, or as good; and its formats."""

import pandas as pd
import pytest
import torch
from torch import nn

import lrf_utils as lrf
import notebook_utils as nb
from experiments import models, recovery

RATES = (0.002, 0.005, 0.01)
TAKEN = [  # what the table calls it, what was tried, what was taken
    ("dense, 3 + 5 epochs, rate {}", (0.001, 0.002, 0.005), models.DENSE_RATE),
    ("8x with 22 and 11, 5 epochs, rate {}", RATES, models.RATE),
    ("8x, plain SVD, 5 epochs, rate {}", RATES, models.RATE),
    ("8x, pruned, 5 epochs, rate {}", RATES, models.RATE),
    ("8x, narrower 784-30-127-10, 8 epochs, rate {}", RATES, models.RATE),
    ("8x, factors from a random start, 8 epochs, rate {}", RATES, models.RATE),
    (
        "8x, spectral initialization, decay 0.0001, 8 epochs, rate {}",
        (0.005, 0.01, 0.02),
        recovery.RANDOM_RATE,
    ),
    (
        "8x, spectral initialization, decay {}, 8 epochs, rate 0.01",
        (1e-5, 1e-4, 1e-3),
        recovery.DECAY,
    ),
    ("12x with 14 and 8, 10 epochs, rate {}", RATES, models.RATE),
    ("12x, plain SVD, 10 epochs, rate {}", RATES, models.RATE),
    ("12x, pruned, 10 epochs, rate {}", RATES, models.RATE),
    ("12x, narrower 784-20-116-10, 13 epochs, rate {}", RATES, models.RATE),
    (
        "12x, spectral initialization, decay 0.0001, 13 epochs, rate {}",
        (0.005, 0.01, 0.02),
        recovery.RANDOM_RATE,
    ),
    ("12x, 6,000 images, rate {}", (0.0005, 0.001, 0.002, 0.005), recovery.FEW_RATE),
    ("12x, plain SVD, 6,000 images, rate {}", (0.0005, 0.001, 0.002, 0.005), recovery.FEW_RATE),
    ("12x, 1 epochs, rate {}", RATES, models.RATE),
    ("12x, plain SVD, 1 epochs, rate {}", RATES, models.RATE),
    (
        "8x, 5 epochs, teacher of 3 + 5 epochs, temperature {}",
        (0.5, 1, 2, 4),
        int(recovery.TEMPERATURE),
    ),
]


@pytest.mark.parametrize("method, tried, taken", TAKEN)
def test_settings_are_the_best_or_as_good_and_inside_their_grid(method, tried, taken):
    table = pd.read_csv(nb.ROOT / "results" / "recovery_validation.csv")
    found = table.groupby("method")["accuracy (%)"].agg(["mean", "size"])
    found = found.loc[[method.format(setting) for setting in tried]]
    assert set(found["size"]) == {3}
    assert found.loc[method.format(taken), "mean"] >= found["mean"].max() - 0.1
    assert taken not in (tried[0], tried[-1])


def test_sparse_bytes_of_one_row():
    row = torch.tensor([[0, 0, 5, 0, 0, 0, 2, 0]]).float()
    found = models.sparse_bytes([row])
    assert found == {
        "compressed rows": 2 * (4 + 2) + 2 * 4,
        "bit mask": 2 * 4 + 1,
        "offsets of 5 bits": 2 * 4 + 2,  # 10 bits are 2 bytes
    }
    gap = torch.cat([torch.ones(1, 1), torch.zeros(1, 64), torch.ones(1, 1)], 1)
    # 64 zeros are two extra entries, 32 positions each: four entries of 37 bits
    assert models.sparse_bytes([gap])["offsets of 5 bits"] == 4 * 4 + 3


def test_squared_norm_is_that_of_the_product():
    model = nb.make_mlp((20, 12, 8))
    small = lrf.factorize(model, {"fc1": 3})
    pair = small.fc1[1].weight @ small.fc1[0].weight
    expected = pair.square().sum() + model.fc2.weight.square().sum()
    torch.testing.assert_close(models.squared_norm(small), expected)


def test_pruned_to_equal_bytes():
    nets = models.MnistNetworks(nb.load_mnist(), 0)
    model = recovery.equal_bytes(nets, 28_778, epochs=0)
    weights = [layer.weight for layer in model if isinstance(layer, nn.Linear)]
    size = min(models.sparse_bytes(weights).values()) + 4 * (256 + 128 + 10)
    assert 4 * 28_778 - 10 <= size <= 4 * 28_778
