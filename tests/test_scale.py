"""The scripts of notebook 12: a killed run goes on to the same file, workers agree with one process, none hangs."""

import hashlib
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lrf_utils as lrf
from scripts import scale, stream, worker

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "stream.py"


def digest(file):
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 60), nn.ReLU(), nn.Linear(60, 50), nn.ReLU(), nn.Linear(50, 3))


@pytest.fixture
def file(model, tmp_path):
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_the_result_is_that_of_factorize_with_its_names(model, file, tmp_path):
    names = list(stream.stream(file, tmp_path / "out", 5))
    assert sorted(names) == sorted(model.state_dict())
    small = lrf.factorize(model, {"0": 5, "2": 5})  # of layer 4, 3×50, rank 5 would save nothing
    exact = [small.get_submodule(name).weight.clone() for name in "02"]
    small.load_state_dict(load_file(tmp_path / "out"))
    for name, best in zip("02", exact):
        W, found = model.get_submodule(name).weight, small.get_submodule(name).weight
        assert torch.linalg.norm(W - found) < 1.03 * torch.linalg.norm(W - best)
        torch.testing.assert_close(small.get_submodule(name).bias, model.get_submodule(name).bias)


def test_only_the_named_layers_are_factorized_and_types_are_kept(file, tmp_path):
    weights = {name: tensor.bfloat16() for name, tensor in load_file(file).items()} | {"steps": torch.tensor(7)}
    save_file(weights, file)
    list(stream.stream(file, tmp_path / "out", 5, layers="2"))
    new = load_file(tmp_path / "out")
    assert new["2.0.weight"].dtype == torch.bfloat16 and new["2.1.weight"].shape == (50, 5)
    assert torch.equal(new["0.weight"], weights["0.weight"]) and new["steps"] == 7


def test_a_folder_of_parts_is_one_model(file, tmp_path):
    list(stream.stream(file, tmp_path / "whole", 5))
    (tmp_path / "parts").mkdir()
    for number, (name, tensor) in enumerate(load_file(file).items()):
        save_file({name: tensor}, tmp_path / "parts" / f"{number}.safetensors")
    list(stream.stream(tmp_path / "parts", tmp_path / "out", 5))
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


@pytest.mark.parametrize("cut", [0, 1, 777])
def test_an_interrupted_run_goes_on_to_the_same_file(file, tmp_path, cut):
    whole = list(stream.stream(file, tmp_path / "whole", 5))
    run = stream.stream(file, tmp_path / "out", 5)
    before = [next(run) for _ in range(4)]
    run.close()
    part = tmp_path / "out.part"
    assert not (tmp_path / "out").exists()
    with part.open("r+b") as open_file:  # as if it had died within a tensor
        open_file.truncate(part.stat().st_size - cut)
    again = list(stream.stream(file, tmp_path / "out", 5))
    assert digest(tmp_path / "out") == digest(tmp_path / "whole") and not part.exists()
    assert again == whole[4:] if cut == 0 else again[0] in before


def test_a_run_with_other_settings_starts_anew(file, tmp_path):
    list(stream.stream(file, tmp_path / "whole", 5))
    run = stream.stream(file, tmp_path / "out", 4)
    [next(run) for _ in range(4)]
    run.close()
    assert len(list(stream.stream(file, tmp_path / "out", 5))) == 6
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


def test_a_killed_program_goes_on_to_the_same_file(tmp_path):
    torch.manual_seed(0)
    weights = {f"{i}.weight": torch.randn(512, 512) for i in range(8)}
    save_file(weights, tmp_path / "model.safetensors")
    list(stream.stream(tmp_path / "model.safetensors", tmp_path / "whole", 32))
    command = [sys.executable, str(SCRIPT), str(tmp_path / "model.safetensors"), str(tmp_path / "out"), "--rank", "32"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().strip() == "0.weight"
    process.kill()
    process.wait()
    process.stdout.close()
    if not (tmp_path / "out").exists():
        list(stream.stream(tmp_path / "model.safetensors", tmp_path / "out", 32))
    ours, theirs = (load_file(tmp_path / name) for name in ("out", "whole"))
    for i in range(8):  # of two programs, perhaps with other numbers of threads: equal but for rounding
        one, two = (pair[f"{i}.1.weight"] @ pair[f"{i}.0.weight"] for pair in (ours, theirs))
        assert torch.linalg.norm(one - two) < 1e-3 * torch.linalg.norm(two)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["none.safetensors", "out", "--rank", "4"], "no safetensors file at none.safetensors; give a"),
        (["broken.safetensors", "out", "--rank", "4"], "broken.safetensors is not a complete safetensors file"),
        (["model.safetensors", "out", "--rank", "0"], "--rank must be at least 1, got 0"),
    ],
)
def test_bad_input_ends_in_one_clear_line(file, tmp_path, monkeypatch, arguments, complaint):
    (tmp_path / "broken.safetensors").write_bytes(file.read_bytes()[:-10])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["stream.py", *arguments])
    with pytest.raises(SystemExit) as error:
        stream.main()
    assert complaint in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_where_a_system_does_not_tell_private_memory_the_run_says_so(file, tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "STATUS", tmp_path / "none")
    assert stream.private_bytes() is None
    log = ["--memory", str(tmp_path / "log")]
    monkeypatch.setattr(sys, "argv", ["stream.py", str(file), str(tmp_path / "out"), "--rank", "4", *log])
    with pytest.raises(SystemExit, match="this system does not tell private memory"):
        stream.main()
    assert (tmp_path / "out").exists() and not (tmp_path / "log").exists()


@pytest.mark.skipif(stream.private_bytes() is None, reason="this system does not tell private memory")
def test_private_memory_grows_with_a_tensor_and_not_with_a_mapped_one(tmp_path):
    save_file({"W": torch.ones(3000, 3000)}, tmp_path / "W.safetensors")
    stream.give_back()  # or the copy hides in memory that other tests have freed
    before = stream.private_bytes()
    with stream.opened(tmp_path / "W.safetensors") as tensors:
        W = tensors["W"].get_tensor("W")
        assert W.sum() > 0 and stream.private_bytes() - before < 5e6
        copy = W.double()
        assert stream.private_bytes() - before > 0.9 * copy.numel() * 8


def test_two_launches_at_once_agree_with_one_process(model):
    x = torch.randn(301, 40)  # an odd number: the shares differ
    given, alone = {"model": model, "inputs": x, "ranks": {"0": 5}}, lrf.collect(model, x)
    small = lrf.factorize(model, given["ranks"], alone)
    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(lambda _: worker.launch("statistics", given), range(2)):
            for name, s in alone.items():
                other = found["statistics"][name]
                assert (other.inputs, other.rows) == (s.inputs, s.rows)
                torch.testing.assert_close(other.row_sum, s.row_sum, rtol=1e-12, atol=1e-12 * 301)
                torch.testing.assert_close(other.outer_sum, s.outer_sum, rtol=1e-12, atol=1e-12 * 301)
            for ours, theirs in zip(found["model"].parameters(), small.parameters()):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_a_dead_worker_ends_the_call_with_its_name():  # worker 0 here, worker 1 in the notebook
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"^worker 0 of 2 ended with code 3, without a word; the others were"):
        worker.launch("death", {"who": 0}, timeout=200)
    assert time.monotonic() - start < 150


def test_a_late_worker_ends_the_call(model):
    with pytest.raises(RuntimeError, match=r"workers \[0, 1\] of 2 were not done after 0.1 s"):
        worker.launch("death", {"who": 5}, timeout=0.1)


@pytest.mark.parametrize(("job", "world"), [("dance", 2), ("statistics", 0)])
def test_unknown_jobs_and_no_workers_are_refused(job, world):
    with pytest.raises(ValueError, match="job must be one of statistics, sharded, death and world at least 1"):
        worker.launch(job, {}, world)


def test_a_pytorch_without_distributed_is_named(monkeypatch):
    monkeypatch.setattr(worker.dist, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match=r"^this build of PyTorch has no torch.distributed"):
        worker.launch("death", {"who": 0})


@pytest.mark.parametrize("shape", [(60, 90), (90, 60)])
def test_every_method_comes_close_to_the_optimum(shape):
    W = scale.matrix(*shape)
    best = scale.error(W, *scale.full(W, 8))
    for name, method in scale.METHODS.items():
        A, B = method(W, 8)
        assert A.shape == (shape[0], 8) and B.shape == (8, shape[1])
        assert scale.error(W, A, B) < (1.3 if "0 iterations" in name else 1.05) * best, name
