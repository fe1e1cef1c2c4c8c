"""experiments/gpu.py where no NVIDIA card is: what it computes without one, and what it says."""

import subprocess
import sys

import pytest
import torch

from experiments import gpu
from experiments.common import ROOT


def test_ratios_are_those_of_bytes_and_multiplications():
    one, many = gpu.ratios(4096, 256, 1), gpu.ratios(4096, 256, 4096)
    assert one.macs == many.macs == 8
    assert one.bytes == pytest.approx(4096 * 4098 / (2 * 256 * 4096 + 2 * 4352))
    assert 1 < many.bytes < one.bytes < 8  # with many inputs, those take most of the bytes


def test_a_speed_up_is_the_median_of_ratios_within_rounds():
    row = gpu.summary(dense=[8.0, 80.0, 8.0], pair=[2.0, 20.0, 1.0])
    assert row["speed-up"] == "4.000" and row["speed-up, upper quartile"] == "6.000"
    assert row["time (µs)"] == "2000.000" and row["dense (µs)"] == "8000.000"
    with pytest.raises(ValueError, match="got 1 and 2"):
        gpu.summary([1.0], [1.0, 2.0])


def test_a_pair_is_two_products():
    torch.manual_seed(0)
    x, B, A = torch.randn(3, 8), torch.randn(2, 8), torch.randn(8, 2)
    torch.testing.assert_close(gpu.layer([B, A], x)(), x @ B.T @ A.T)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_it_says_so_and_writes_nothing(tmp_path):
    command = [sys.executable, "-m", "experiments.gpu", "--out", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1 and result.stderr.startswith("This needs an NVIDIA card")
    assert not list(tmp_path.iterdir())
