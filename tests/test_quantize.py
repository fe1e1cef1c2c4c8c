"""The quantizer of lesson 11, its file, and the script that runs the file."""

import subprocess
import sys

import numpy as np
import pytest
import torch

import notebook_utils as nb
from scripts import quantize, tiny_digit

SCRIPT = nb.ROOT / "scripts" / "tiny_digit.py"


@pytest.fixture(scope="module")
def weight():
    torch.manual_seed(0)
    return torch.randn(12, 40).double()


@pytest.mark.parametrize("bits", (2, 3, 4, 8))
def test_rounded_weights_are_the_nearest_of_so_many_levels(weight, bits):
    step = quantize.best_step(weight, bits)
    Q = quantize.rounded(weight, step, bits)
    levels = (torch.arange(2**bits) - 2 ** (bits - 1) + 0.5) * step[:, :, None]
    torch.testing.assert_close((weight[:, :, None] - levels).abs().amin(2), (weight - Q).abs())
    assert len(Q[0].unique()) <= 2**bits
    assert torch.equal(step.half().double(), step), "the step must fit into 16 bits"


def test_best_step_beats_the_one_that_clips_nothing(weight):
    widest = weight.abs().amax(1, keepdim=True) / 2
    errors = [
        (quantize.rounded(weight, s, 2) - weight).square().sum(1) for s in (widest, quantize.best_step(weight, 2))
    ]
    assert (errors[1] <= errors[0]).all() and errors[1].sum() < 0.9 * errors[0].sum()


def test_importance_keeps_a_large_weight_whose_input_is_large(weight):
    W, importance = weight.clone(), torch.ones(40).double()
    W[:, 0], importance[0] = 12, 1000
    plain, careful = (quantize.rounded(W, quantize.best_step(W, 3, i), 3) for i in (None, importance))
    assert (careful[:, 0] - 12).abs().max() < (plain[:, 0] - 12).abs().min()


def test_a_row_of_small_weights_and_one_large_gets_a_level_at_0(weight):
    W, importance = weight.clone(), torch.ones(40).double()
    W[:6, 0], W[6:, 0], importance[0] = 40, -40, 1000
    step, zero = grid = quantize.best_grid(W, 3, importance)
    Q = quantize.rounded_to(W, grid, 3)
    assert (zero[:6] == 3).all() and (zero[6:] == 4).all(), "one level more on the side of the large weight"
    assert torch.equal(step.half().double(), step) and all(len(row.unique()) <= 8 for row in Q)
    halves = quantize.rounded(W, quantize.best_step(W, 3, importance), 3)
    assert ((Q - W).square() @ importance < 0.5 * (halves - W).square() @ importance).all()


def test_a_grid_with_0_between_two_levels_is_that_of_rounded(weight):
    step = quantize.best_step(weight, 3)
    Q = quantize.rounded_to(weight, (step, 3.5), 3)
    torch.testing.assert_close(Q, quantize.rounded(weight, step, 3))


@pytest.mark.parametrize("bits", (2, 3, 4, 8))
def test_a_matrix_of_large_inputs_and_weights_loses_less_by_gptq(weight, bits):
    torch.manual_seed(1)
    x = torch.randn(500, 10).double() @ torch.randn(10, 40).double() + 0.1 * torch.randn(500, 40)
    x[:, 5] *= 20
    W, C = weight.clone(), x.T @ x / len(x)
    W[:2, 5] = 30
    near, ours = (W - quantize.matrix_at(W, C, bits, how) for how in ("nearest", "GPTQ"))
    assert quantize.output_error(ours, C) < quantize.output_error(near, C)


def test_gptq_changes_outputs_less_and_weights_more(weight):
    torch.manual_seed(1)
    x = torch.randn(500, 10).double() @ torch.randn(10, 40).double() + 0.1 * torch.randn(500, 40)
    C = x.T @ x / len(x)
    near, ours = quantize.rounded(weight, quantize.best_step(weight, 3), 3), quantize.gptq(weight, C, 3)
    assert quantize.output_error(weight - ours, C) < 0.7 * quantize.output_error(weight - near, C)
    assert (weight - ours).norm() > (weight - near).norm()


def test_gptq_of_white_inputs_is_plain_rounding(weight):
    near = quantize.rounded(weight, quantize.best_step(weight, 3), 3)
    torch.testing.assert_close(quantize.gptq(weight, torch.eye(40).double(), 3), near)


def test_packed_codes_come_back():
    codes = torch.randint(8, (5, 7), generator=torch.Generator().manual_seed(0))
    packed = quantize.pack(codes, 3)
    ones = np.unpackbits(np.frombuffer(packed, "u1"), count=5 * 7 * 3, bitorder="little").reshape(5, 7, 3)
    assert len(packed) == 14 and (ones @ (1, 2, 4) == codes.numpy()).all()


@pytest.mark.parametrize("bits", (2, 3, 5))
def test_a_saved_network_computes_the_same_with_numpy(bits, tmp_path):
    model = quantize.start("low rank, 8x", 1)
    for layer in quantize.linear_layers(model).values():
        rounding = quantize.Rounded(layer.weight.detach(), bits)
        torch.nn.utils.parametrize.register_parametrization(layer, "weight", rounding)
    quantize.save(model, bits, tmp_path / "net.lrq")
    x = nb.load_mnist().x_test[:200]
    found = tiny_digit.classify(x.numpy() * nb.PIXEL_STD + nb.PIXEL_MEAN, tiny_digit.load(tmp_path / "net.lrq"))
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(found).float(), model(x).softmax(1), atol=0.01, rtol=0)
    header = 10 + 5 * 5
    assert (tmp_path / "net.lrq").stat().st_size == quantize.size_in_bytes(model, bits) + header


def test_the_committed_file_is_small_and_right():
    assert tiny_digit.TINY.stat().st_size <= 14_000
    assert len(SCRIPT.read_text(encoding="utf-8").splitlines()) <= 60
    text = tiny_digit.main("all")
    assert float(text.split(" %")[0]) >= 98.0, text


@pytest.mark.parametrize("damage", ("missing", "empty", "short", "flipped"))
def test_a_damaged_file_gives_one_clear_line(damage, tmp_path):
    path, data = tmp_path / "tiny.lrq", bytearray(tiny_digit.TINY.read_bytes())
    if damage == "flipped":
        data[5000] ^= 1
    if damage != "missing":
        path.write_bytes({"empty": b"", "short": data[:5000], "flipped": data}[damage])
    with pytest.raises(ValueError, match=r"tiny\.lrq is missing or damaged; restore it: git checkout"):
        tiny_digit.load(path)


@pytest.mark.parametrize("given", (["10000"], ["seven"], ["-1"], []))
def test_what_is_no_digit_gives_one_clear_line(given, tmp_path):
    result = subprocess.run([sys.executable, SCRIPT, *given], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 1 and result.stdout == "" and len(result.stderr.splitlines()) == 1
    assert "give a number from 0 to 9999, a file of 28 lines of 28 characters, or all; got " in result.stderr


def test_a_drawing_is_read(tmp_path):
    stroke = ["." * 13 + "###" + "." * 12] * 20
    (tmp_path / "one.txt").write_text("\n".join(["." * 28] * 4 + stroke + ["." * 28] * 4))
    assert tiny_digit.main(str(tmp_path / "one.txt")).startswith("This is a 1 ")


def test_rows_that_are_there_are_not_measured_again(tmp_path):
    calls = []
    for _ in range(2):
        record = quantize.recorder(tmp_path / "table.csv", ["method", "bits", "bytes"])
        record(("dense", 8), lambda: calls.append(1) or [5])
    assert len(calls) == 1 and (tmp_path / "table.csv").read_text() == "method,bits,bytes\ndense,8,5\n"
