"""The programs in examples/: killed runs go on to the same file, workers agree, none hangs."""

import hashlib
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import lrf_utils as lrf
from examples import compress_llm, stream, tiny_digit, workers

# --- stream.py -----------------------------------------------------------------------------------


def digest(file):
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.fixture
def model():
    torch.manual_seed(0)
    first, second, third = nn.Linear(40, 60), nn.Linear(60, 50), nn.Linear(50, 3)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third)


@pytest.fixture
def file(model, tmp_path):
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_the_result_is_nearly_that_of_factorize(model, file, tmp_path):
    names = list(stream.stream(file, tmp_path / "out", 5))
    assert sorted(names) == sorted(model.state_dict())
    small = lrf.factorize(model, {"0": 5, "2": 5})  # for layer 4, 3×50, rank 5 saves nothing
    best = {name: small.get_submodule(name) for name in "02"}
    best = {name: pair[1].weight @ pair[0].weight for name, pair in best.items()}
    small.load_state_dict(load_file(tmp_path / "out"))
    for name in "02":
        layer, pair = model.get_submodule(name), small.get_submodule(name)
        found = pair[1].weight @ pair[0].weight
        error, least = (torch.linalg.norm(layer.weight - M) for M in (found, best[name]))
        assert error < 1.03 * least
        torch.testing.assert_close(pair[1].bias, layer.bias)


def test_only_named_layers_are_factorized_and_types_kept(file, tmp_path):
    weights = {name: tensor.bfloat16() for name, tensor in load_file(file).items()}
    save_file(weights | {"steps": torch.tensor(7)}, file)
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


@pytest.mark.parametrize(("rank", "cut"), [(5, 0), (5, 1), (5, 777), (4, 0)])
def test_an_interrupted_run_goes_on_to_the_same_file(file, tmp_path, rank, cut):
    whole = list(stream.stream(file, tmp_path / "whole", 5))
    part, run = tmp_path / "out.part", stream.stream(file, tmp_path / "out", rank)
    before = [next(run) for _ in range(4)]
    run.close()
    with part.open("r+b") as open_file:  # as if it had died within a tensor
        open_file.truncate(part.stat().st_size - cut)
    again = list(stream.stream(file, tmp_path / "out", 5))
    assert digest(tmp_path / "out") == digest(tmp_path / "whole") and not part.exists()
    if rank != 5:  # other settings: it starts anew
        assert again == whole
    else:
        assert again == whole[4:] if cut == 0 else again[0] in before


def test_a_killed_program_goes_on_to_the_same_file(tmp_path):
    torch.manual_seed(0)
    source, out = tmp_path / "model.safetensors", tmp_path / "out"
    save_file({f"{i}.weight": torch.randn(512, 512) for i in range(8)}, source)
    list(stream.stream(source, tmp_path / "whole", 32))
    command = [sys.executable, stream.__file__, str(source), str(out), "--rank", "32"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().strip() == "0.weight"
    process.kill()
    process.communicate()
    if not out.exists():
        list(stream.stream(source, out, 32))
    ours, theirs = load_file(out), load_file(tmp_path / "whole")
    for i in range(8):  # two programs, perhaps with other numbers of threads: equal to rounding
        one, two = (pair[f"{i}.1.weight"] @ pair[f"{i}.0.weight"] for pair in (ours, theirs))
        assert torch.linalg.norm(one - two) < 1e-3 * torch.linalg.norm(two)


@pytest.mark.parametrize(
    ("name", "rank", "complaint"),
    [
        ("none.safetensors", "4", "no safetensors file at none.safetensors; give a"),
        ("broken.safetensors", "4", "broken.safetensors is not a complete safetensors file"),
        ("model.safetensors", "0", "--rank must be at least 1, got 0"),
    ],
)
def test_bad_input_ends_in_one_clear_line(file, tmp_path, monkeypatch, name, rank, complaint):
    (tmp_path / "broken.safetensors").write_bytes(file.read_bytes()[:-10])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["stream.py", name, "out", "--rank", rank])
    with pytest.raises(SystemExit) as error:
        stream.main()
    assert complaint in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(stream.private_bytes() is None, reason="private memory is not told here")
def test_private_memory_counts_copies_and_no_mapped_file(tmp_path):
    save_file({"W": torch.ones(3000, 3000)}, tmp_path / "W.safetensors")
    stream.give_back()  # or the copy hides in memory that other tests have freed
    before = stream.private_bytes()
    with stream.opened(tmp_path / "W.safetensors") as tensors:
        W = tensors["W"].get_tensor("W")
        assert W.sum() > 0 and stream.private_bytes() - before < 5e6
        copy = W.double()
        assert stream.private_bytes() - before > 0.9 * copy.numel() * 8


# --- workers.py ----------------------------------------------------------------------------------


def test_two_launches_at_once_agree_with_one_process(model):
    x = torch.randn(301, 40)  # an odd number: the workers' shares differ
    given = {"model": model, "inputs": x, "ranks": {"0": 5}}
    alone = lrf.collect_statistics(model, x)
    small = lrf.factorize(model, given["ranks"], alone)
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda _: workers.launch("statistics", given), range(2)))
    for found in both:
        for name, s in alone.items():
            other = found["statistics"][name]
            assert (other.inputs, other.rows, other.weight) == (s.inputs, s.rows, s.weight)
            for ours, theirs in ((other.row_sum, s.row_sum), (other.outer_sum, s.outer_sum)):
                scale = theirs.abs().max().item()  # products are in float32
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6 * scale)
        for ours, theirs in zip(found["model"].parameters(), small.parameters()):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("who", "timeout", "message"),
    [
        (0, 200, r"^worker 0 of 2 ended with code 3, without a word; the others were ended$"),
        (5, 0.1, r"^workers \[0, 1\] of 2 were not done after 0.1 s; they were ended$"),
    ],
)
def test_a_dead_or_late_worker_ends_the_call(who, timeout, message):
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=message):
        workers.launch("death", {"who": who}, timeout=timeout)
    assert time.monotonic() - start < 150


@pytest.mark.parametrize(("job", "world"), [("dance", 2), ("statistics", 0)])
def test_unknown_jobs_and_no_workers_are_refused(job, world):
    with pytest.raises(ValueError, match="job must be one of statistics, sharded, death and"):
        workers.launch(job, {}, world)


# --- tiny_digit.py -------------------------------------------------------------------------------


def test_the_committed_file_is_small_and_accurate():
    assert tiny_digit.TINY.stat().st_size <= 14_000
    text = tiny_digit.main("all")
    assert float(text.split(" %")[0]) >= 98.0, text


@pytest.mark.parametrize("damage", ("missing", "empty", "short", "flipped"))
def test_a_damaged_file_gives_one_clear_line(damage, tmp_path):
    path, data = tmp_path / "tiny.lrq", bytearray(tiny_digit.TINY.read_bytes())
    if damage == "flipped":
        data[5000] ^= 1
    if damage != "missing":
        path.write_bytes({"empty": b"", "short": data[:5000], "flipped": data}[damage])
    with pytest.raises(ValueError, match=r"tiny\.lrq is missing or damaged; restore it: git"):
        tiny_digit.load(path)


@pytest.mark.parametrize("given", (["10000"], ["seven"], ["-1"], []))
def test_what_is_no_digit_gives_one_clear_line(given, tmp_path):
    command = [sys.executable, tiny_digit.__file__, *given]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 1 and result.stdout == ""
    assert len(result.stderr.splitlines()) == 1 and "give a number from 0 to 9999" in result.stderr


def test_a_drawing_is_read(tmp_path):
    stroke = ["." * 13 + "###" + "." * 12] * 20
    (tmp_path / "one.txt").write_text("\n".join(["." * 28] * 4 + stroke + ["." * 28] * 4))
    assert tiny_digit.main(str(tmp_path / "one.txt")).startswith("This is a 1 ")


# --- compress_llm.py -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A folder with a Llama of two layers and a tokenizer that knows letters, and a text."""
    folder, letters = tmp_path_factory.mktemp("llama"), "abcdefghij "
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=len(letters), **sizes, **heads)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    known = {letter: number for number, letter in enumerate(letters)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(known, unk_token=" "))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=" ")
    fast.save_pretrained(folder)
    (folder / "text.txt").write_text("abc def ghij cab fed " * 400)
    return folder


def test_a_language_model_is_compressed_and_loads_again(llama, tmp_path, capsys, monkeypatch):
    size = "--windows 8 --test-windows 4 --length 32 --multiple-of 1"
    given = [str(llama), *f"--out {tmp_path} --text {llama / 'text.txt'} {size}".split()]
    monkeypatch.setattr(compress_llm, "CHUNK", 2)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(lrf, "rank_options", raising(KeyboardInterrupt))
        compress_llm.main(given)
    with pytest.raises(SystemExit, match="from a run with other options"):
        compress_llm.main([*given, "--keep", "0.5"])
    capsys.readouterr()
    compress_llm.main(given)
    said = capsys.readouterr().out
    assert "statistics" not in said and "14 linear layers with 18,432 weights" in said
    small, tokenizer = compress_llm.load(tmp_path)
    dense, _ = compress_llm.load_dense(str(llama))
    ratio = lrf.count_parameters(small) / lrf.count_parameters(dense)
    assert 0.75 < ratio < 0.83 and small.lm_head.weight is small.model.embed_tokens.weight
    ids = tokenizer("abc def", return_tensors="pt")["input_ids"]
    assert small.generate(ids, max_new_tokens=4, do_sample=False).shape == (1, 11)
    difference = (small(ids).logits - dense(ids).logits).norm() / dense(ids).logits.norm()
    assert difference < 0.3 and not (tmp_path / "unfinished").exists()


def raising(error):
    def function(*args, **kwargs):
        raise error

    return function
