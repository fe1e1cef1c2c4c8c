"""The models that scripts/measure_runtime.py times compute what they should, and an interrupted run resumes."""

import numpy as np
import torch

from scripts.measure_runtime import (
    Stack,
    cold,
    done,
    eager,
    eight_bits,
    four_bits,
    hot,
    product,
    session,
    speed_ups,
    weight_bytes,
    write,
)

rng = np.random.default_rng(0)
W, B, A, x = (rng.standard_normal(shape, "float32") for shape in ((64, 64), (64, 32), (32, 64), (3, 64)))


def test_product_is_that_of_numpy_and_pytorch():
    (y,) = hot(product(B, A), x)()
    np.testing.assert_allclose(y, x @ B @ A, rtol=1e-4, atol=1e-3)
    weights = [torch.from_numpy(M.T.copy()) for M in (B, A)]
    np.testing.assert_allclose(y, eager(weights, torch.from_numpy(x), copies=2)(), rtol=1e-4, atol=1e-3)


def test_fewer_bits_are_fewer_bytes_and_nearly_the_same_numbers():
    dense = product(W)
    before = dense.SerializeToString()
    exact = x @ W
    for model, bytes_at_most, error_at_most in ((eight_bits(dense), 0.3, 0.05), (four_bits(dense), 0.16, 0.3)):
        assert weight_bytes(model) < bytes_at_most * weight_bytes(dense)
        (y,) = hot(model, x)()
        assert np.linalg.norm(y - exact) < error_at_most * np.linalg.norm(exact)
    assert dense.SerializeToString() == before


def test_cold_goes_round_copies_that_agree(monkeypatch):
    monkeypatch.setattr("scripts.measure_runtime.COLD", 3 * W.nbytes)
    call = cold(product(W), x)
    first, second = call()[0], call()[0]
    np.testing.assert_array_equal(first, second)


def test_both_ways_of_a_stack_compute_the_same():
    torch.manual_seed(0)
    apart, joined = Stack(16, 2, False), Stack(16, 2, True)
    joined.load_state_dict(apart.state_dict())
    torch.testing.assert_close(apart(torch.ones(1, 16)), joined(torch.ones(1, 16)))


def test_session_writes_the_graph_that_runs(tmp_path):
    session(product(B, A), optimized=str(tmp_path / "runs.onnx"))
    assert (tmp_path / "runs.onnx").stat().st_size > 0


def test_speed_ups_are_over_the_first_call():
    calls = {"slow": lambda: sum(range(20_000)), "fast": lambda: sum(range(2_000))}
    ((name, values),) = speed_ups(calls, blocks=3, seconds=0.01)
    assert name == "fast" and float(values[0]) > 2


def test_what_is_measured_already_is_known(tmp_path):
    path = tmp_path / "table.csv"
    assert done(path, ["batch"]) == set()
    write(path, ["method", "batch"], [["dense", 1]])
    write(path, ["method", "batch"], [["dense", 2]])
    assert done(path, ["batch"]) == {("1",), ("2",)} and path.read_text().count("method") == 1
