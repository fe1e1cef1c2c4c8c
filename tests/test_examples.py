"""The programs in examples/: what is compressed loads again, killed runs go on, workers agree."""

import json
import os
import socket
import subprocess
import sys
import warnings

import pytest
import tokenizers
import torch
import torch.distributed as dist
import transformers
from PIL import Image
from safetensors.torch import save_file
from torch.fx.experimental.optimization import fuse

import lrf_utils as lrf
from examples import (
    compress_checkpoint,
    compress_convnet,
    compress_llm,
    memory,
    on_disk,
    tiny_digit,
)
from experiments import models, scale

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


# --- compress_checkpoint.py ----------------------------------------------------------------------

SIZE = "--keep 0.7 --windows 11 --length 32 --multiple-of 1".split()
KINDS = [  # type in the file, tied head, biases
    (torch.float32, True, False),
    (torch.bfloat16, True, False),
    (torch.bfloat16, False, False),
    (torch.float32, False, True),
]


@pytest.fixture
def make(llama, tmp_path):
    """A function that makes a model's folder with weights in several files."""

    def function(dtype=torch.float32, tied=True, biased=False):
        folder = tmp_path / "model"
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": tied}
        kind = "Qwen2" if biased else "Llama"
        config = getattr(transformers, f"{kind}Config")(vocab_size=11, **sizes, **heads)
        torch.manual_seed(0)
        model = getattr(transformers, f"{kind}ForCausalLM")(config)
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.data *= 3
            if name.endswith("bias"):
                parameter.data.normal_()
        model.to(dtype).save_pretrained(folder, max_shard_size="20KB")
        transformers.AutoTokenizer.from_pretrained(llama).save_pretrained(folder)
        return folder

    return function


def command(llama, folder, out):
    return [str(folder), "--out", str(out), "--text", str(llama / "text.txt"), *SIZE]


@pytest.mark.parametrize(("dtype", "tied", "biased"), KINDS)
def test_block_by_block_is_as_in_memory(make, llama, tmp_path, dtype, tied, biased):
    folder, out = make(dtype, tied, biased), tmp_path / "out"
    assert len(list(folder.glob("*.safetensors"))) > 2
    compress_checkpoint.main(command(llama, folder, out))
    small, tokenizer = compress_checkpoint.load(out)
    options = scale.asked(llama / "text.txt", 11, 32)
    windows, _ = compress_llm.texts(tokenizer, options)
    known, dense = scale.in_memory(folder, windows)
    with warnings.catch_warnings(action="ignore"):  # of what the budget does not count
        table = lrf.rank_options(dense, known)
    total = sum(dense.get_submodule(name).weight.numel() for name in known)
    plan = lrf.allocate_ranks(table, 0.7 * total)
    ranks = json.loads((out / on_disk.INDEX).read_text())["metadata"]["ranks"]
    assert ranks == {name: rank for name, rank in plan.items() if rank is not None}
    expected = lrf.factorize(dense, plan, known)
    rounding = 1e-5 if dtype == torch.float32 else 1e-2
    for name in ranks:
        ours, theirs = (network.get_submodule(name) for network in (small, expected))
        assert ours.weight.dtype == dtype and type(ours) is lrf.LowRank
        P, Q = (pair[1].weight.float() @ pair[0].weight.float() for pair in (ours, theirs))
        assert (P - Q).norm() < rounding * Q.norm()
    logits = [network.float()(windows).logits for network in (small, expected)]
    assert (logits[0] - logits[1]).norm() < rounding * logits[1].norm()
    assert (small.lm_head.weight is small.model.embed_tokens.weight) == tied
    assert not (out / "unfinished").exists() and (out / "config.json").exists()


def test_a_killed_run_goes_on_and_another_is_refused(make, llama, tmp_path, capsys):
    folder, given = make(), command(llama, make(), tmp_path / "out")
    compress_checkpoint.main(command(llama, folder, tmp_path / "whole"))
    run = [sys.executable, compress_checkpoint.__file__, *given]
    process = subprocess.Popen(run, stdout=subprocess.PIPE, text=True)
    while process.stdout.readline() != "backward 2\n":
        assert process.poll() is None
    process.kill()
    process.communicate()
    with pytest.raises(SystemExit, match="is of another model or text"):
        compress_checkpoint.main([*given, "--windows", "10"])
    capsys.readouterr()
    compress_checkpoint.main(given)
    assert "forward 1" not in (said := capsys.readouterr().out) and "backward 2\n" not in said
    assert scale.largest_difference(tmp_path / "out", tmp_path / "whole") < 1e-5


def test_other_text_or_weights_are_refused(make, llama, tmp_path, monkeypatch):
    folder, given = make(), command(llama, make(), tmp_path / "out")
    monkeypatch.setattr(compress_checkpoint, "finish", raising(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        compress_checkpoint.main(given)
    text = (path := llama / "text.txt").read_text()
    path.write_text(text[::-1])
    with pytest.raises(SystemExit, match="is of another model or text"):
        compress_checkpoint.main(given)
    path.write_text(text)
    file = min(folder.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(SystemExit, match="is of another model or text"):
        compress_checkpoint.main(given)


@pytest.fixture
def together():
    """What torchrun tells each of two workers, but for its rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    local = {"linux": {"GLOO_SOCKET_IFNAME": "lo"}, "darwin": {"GLOO_SOCKET_IFNAME": "lo0"}}
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    return meet | local.get(sys.platform, {})


def add_share(rank, folder, together):
    os.environ.update(together, RANK=str(rank))
    dist.init_process_group("gloo")
    share = torch.load(folder / f"share-{rank}.pt", weights_only=False)
    torch.save(compress_checkpoint.add_up(share), folder / f"sum-{rank}.pt")


def test_two_processes_add_exactly(tmp_path, together):
    torch.manual_seed(0)
    model, shares = torch.nn.Linear(9, 7), []
    for rank, rows in enumerate((20, 33)):
        how = {"loss": lambda output: [output.square().sum()], "weighted": True}
        shares.append(lrf.collect_statistics(model, [torch.randn(rows, 9)], **how))
        torch.save(shares[-1], tmp_path / f"share-{rank}.pt")
    torch.multiprocessing.spawn(add_share, (tmp_path, together), nprocs=2)
    (name,) = shares[0]
    for rank in range(2):
        found = torch.load(tmp_path / f"sum-{rank}.pt", weights_only=False)[name]
        for key, right in vars(shares[0][name] + shares[1][name]).items():
            assert torch.equal(*map(torch.as_tensor, (getattr(found, key), right))), key


def test_two_workers_agree_with_one(make, llama, tmp_path, together):
    folder = make()
    compress_checkpoint.main(command(llama, folder, tmp_path / "one"))
    run = [sys.executable, compress_checkpoint.__file__, *command(llama, folder, tmp_path / "two")]
    environments = [os.environ | together | {"RANK": str(rank)} for rank in range(2)]
    workers = [subprocess.Popen(run, env=environment) for environment in environments]
    try:
        assert [worker.wait(timeout=300) for worker in workers] == [0, 0]
    finally:
        for worker in workers:
            worker.kill()
    assert scale.largest_difference(tmp_path / "one", tmp_path / "two") < 1e-5


def test_bad_input_ends_in_one_clear_line(make, llama, tmp_path):
    folder = make()
    file = min(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(SystemExit, match="is no complete safetensors file"):
        compress_checkpoint.main(command(llama, folder, tmp_path / "out"))
    for file in folder.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(SystemExit, match="no safetensors file in model"):
        compress_checkpoint.main(command(llama, folder, tmp_path / "out"))


def test_sliding_windows_are_refused(make, llama, tmp_path):
    config = json.loads((path := make() / "config.json").read_text())
    path.write_text(json.dumps(config | {"model_type": "mistral", "sliding_window": 16}))
    with pytest.raises(SystemExit, match="sliding-window attention"):
        compress_checkpoint.main(command(llama, path.parent, tmp_path / "out"))


@pytest.mark.skipif(memory.private_bytes() is None, reason="private memory is not told here")
def test_private_memory_counts_copies_and_no_mapped_file(tmp_path):
    save_file({"W": torch.ones(3000, 3000)}, tmp_path / "W.safetensors")
    memory.give_back()  # or the copy hides in memory that other tests have freed
    before = memory.private_bytes()
    with on_disk.safe_open(tmp_path / "W.safetensors", framework="pt") as tensors:
        W = tensors.get_tensor("W")
        assert W.sum() > 0 and memory.private_bytes() - before < 5e6
        copy = W.double()
        assert memory.private_bytes() - before > 0.9 * copy.numel() * 8


# --- compress_convnet.py -------------------------------------------------------------------------


@pytest.mark.parametrize("folder", (False, True))
def test_a_convnet_is_compressed_and_loads_again(folder, tmp_path, capsys, monkeypatch):
    torch.manual_seed(0)
    model = models.make_resnet((8, 12, 24, 8))
    model.conv = torch.nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)  # for colors
    model(torch.randn(40, 3, 32, 32))  # BatchNorm sees something
    monkeypatch.setattr(compress_convnet, "dense", lambda *_: (fuse(model.eval()), "no weights"))
    given = "resnet18 --keep 0.6 --size 32 --count 8 --test-count 4 --batch 3 --positions 6"
    given += f" --out {tmp_path / 'small.safetensors'}"
    if folder:
        for k in range(12):
            Image.new("RGB", (50, 40), (20 * k, 255 - 20 * k, 90)).save(tmp_path / f"{k}.png")
        given += f" --images {tmp_path}"
    compress_convnet.main(given.split())
    text = capsys.readouterr().out
    share = float(text.splitlines()[-1].split(": ")[1].split("%")[0])
    assert 50 < share <= 60, text
    small = compress_convnet.load(tmp_path / "small.safetensors", "resnet18")
    assert any(isinstance(part, lrf.LowRank) for part in small.modules())
    assert small(compress_convnet.Noise(2, 32)[1][None]).shape == (1, 10)
    before, after = (float(line.split()[-1][:-1]) for line in text.splitlines()[-3:-1])
    assert after < before, text


def test_too_few_images_give_one_clear_line(tmp_path):
    with pytest.raises(SystemExit, match="holds 0 images, fewer than 96"):
        compress_convnet.main(["resnet18", "--images", str(tmp_path), "--out", "x"])


@pytest.mark.skipif(memory.private_bytes() is None, reason="private memory is not told here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copying_factors_takes_less_than_a_layer_and_a_half(tmp_path, dtype):
    name, size, rank = "model.layers.0.mlp.up_proj", 2000, 900
    source, (A, B) = tmp_path / "model.safetensors", torch.rand(2, 1_998_000).to(dtype)
    save_file({f"{name}.weight": torch.rand(size, size).to(dtype)}, source)
    save_file({"A": A.view(size, 999), "B": B.view(999, size)}, tmp_path / f"{name}.safetensors")
    del A, B
    model = type("Source", (), {"tensors": {f"{name}.weight": on_disk.safe_open(source, "pt")}})
    with memory.MemoryLog() as log:
        entries = compress_checkpoint.entries_of(model, tmp_path, f"{name}.weight", {name: rank})
        on_disk.write(tmp_path / "out.safetensors", entries)
    assert log.peak < 1.5 * size**2 * dtype.itemsize / 1e6
