"""What takes too long for a cell of lesson 12, or needs Linux: results/scale_*.csv.

    python -m experiments.scale [--parts svd smollm2] [--out FOLDER]

One thread, about eight minutes. CPU seconds, which other programs on the machine change little,
are those of the process. Memory is private memory above that before the call (see
``examples.memory``), in a process of its own.
"""

import argparse
import functools
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path

import tokenizers
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import lrf_utils as lrf
import notebook_utils as nb
from examples import compress_checkpoint, compress_llm
from examples.compress_checkpoint import Sweep
from examples.memory import MemoryLog
from examples.on_disk import Source
from experiments.common import Table, parse

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

# --- Truncated SVDs of a large matrix -----------------------------------------------------------

Factors = tuple[Tensor, Tensor]


def slow_matrix(m: int, n: int) -> Tensor:
    """Random, with singular values that fall slowly, about as 1 / sqrt(index)."""
    torch.manual_seed(0)
    return torch.randn(m, m) * torch.arange(1.0, m + 1).rsqrt() @ torch.randn(m, n)


def full_svd(W: Tensor, rank: int) -> Factors:
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return U[:, :rank] * S[:rank], Vh[:rank]


def gram(W: Tensor, rank: int, dtype: torch.dtype = torch.float32) -> Factors:
    """By the eigenvectors of C, which is W Wᵀ or Wᵀ W, whichever is smaller, in ``dtype``."""
    if W.shape[0] > W.shape[1]:
        A, B = gram(W.T, rank, dtype)
        return B.T, A.T
    C = torch.zeros(len(W), len(W), dtype=dtype)
    for some in W.split(1024, dim=1):  # in parts, so no copy of W in another precision
        C.addmm_(some.to(dtype), some.to(dtype).T)
    U = torch.linalg.eigh(C)[1][:, -rank:].to(W.dtype)
    return U, U.T @ W


def randomized(W: Tensor, rank: int, more: int, iterations: int) -> Factors:
    """By products of W with rank + ``more`` random vectors, and ``iterations`` times Wᵀ and W."""
    torch.manual_seed(0)
    U, S, V = torch.svd_lowrank(W, q=rank + more, niter=iterations)
    return U[:, :rank] * S[:rank], V[:, :rank].T


DECOMPOSITIONS: dict[str, Callable[[Tensor, int], Factors]] = {
    "full SVD": full_svd,
    "Gram, float32": gram,
    "Gram, float64": functools.partial(gram, dtype=torch.float64),
    "randomized, 10 more, 0 iterations": lambda W, r: randomized(W, r, 10, 0),
    "randomized, 10 more, 1 iteration": lambda W, r: randomized(W, r, 10, 1),
    "randomized, 10 more, 2 iterations": lambda W, r: randomized(W, r, 10, 2),
    "randomized, a quarter more, 3 iterations": lambda W, r: randomized(W, r, r // 4, 3),
    "randomized, half more, 2 iterations": lambda W, r: randomized(W, r, r // 2, 2),
}


def product_error(W: Tensor, A: Tensor, B: Tensor) -> float:
    """The Frobenius norm of W - A @ B, by parts of its rows."""
    parts = zip(W.split(512), A.split(512))
    return sum((rows.float() - a @ B).double().square().sum().item() for rows, a in parts) ** 0.5


def measured(file: str, name: str, rank: int) -> tuple[float, float, float]:
    """CPU seconds, peak of private memory in MB, and error, in a process that did nothing else."""
    torch.set_num_threads(1)
    decompose = DECOMPOSITIONS[name]
    with safe_open(file, framework="pt") as tensors:
        W = tensors.get_tensor("W")  # mapped: it takes no private memory
        decompose(W[:256, :300].clone(), 8)  # the libraries take what they need for themselves
        with MemoryLog() as log:
            start = time.process_time()
            A, B = decompose(W, rank)
            spent = time.process_time() - start
        return spent, log.peak, product_error(W, A, B)


def svd(out: Path, m: int = 4096, n: int = 11008, rank: int = 512) -> None:
    columns = ["method", "m", "n", "rank", "CPU seconds", "private MB", "error / optimum"]
    table = Table(out / "scale_svd.csv", columns, key=["method", "m", "n", "rank"])
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/W.safetensors"
        W = slow_matrix(m, n)
        save_file({"W": W}, file)

        @functools.cache
        def optimum() -> float:
            C = W.double() @ W.double().T
            return torch.linalg.eigvalsh(C)[:-rank].clamp(min=0).sum().sqrt().item()

        def measure(name: str) -> dict[str, str]:
            spent, peak, left = alone(measured, file, name, rank)
            values = f"{spent:.2f}", f"{peak:.0f}", f"{left / optimum():.5f}"
            return dict(zip(columns[4:], values))

        for name in DECOMPOSITIONS:
            row = {"method": name, "m": m, "n": n, "rank": rank}
            table.add(row, functools.partial(measure, name))


def alone(function: Callable, *given: object) -> object:
    """The function's result, from a process of its own."""
    kind = "fork" if "fork" in get_all_start_methods() else "spawn"  # forked: nothing to import
    with get_context(kind).Pool(1) as pool:
        return pool.apply(function, given)


# --- The pipeline -------------------------------------------------------------------------------


def random_llama(folder: Path, blocks: int, width: int = 256, ffn: int = 704) -> None:
    """A folder with a Llama of random numbers in bfloat16, a tokenizer, and a text.

    Its tokens are letters. The weights of its layers have singular values that fall.
    """
    letters = "abcdefghijklmnopqrstuvwxyz "
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(letters),
        hidden_size=width,
        intermediate_size=ffn,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config)
    for layer in model.model.layers.modules():
        if isinstance(layer, nn.Linear):
            U, S, Vh = torch.linalg.svd(layer.weight.data, full_matrices=False)
            fall = torch.arange(1.0, len(S) + 1).rsqrt() * S[0]
            layer.weight.data = (U * fall) @ Vh
    model.bfloat16().save_pretrained(folder, max_shard_size="2MB")
    known = {letter: number for number, letter in enumerate(letters)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(known, unk_token=" "))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=" ")
    fast.save_pretrained(folder)
    chosen = torch.randint(len(letters), (20_000,)).tolist()
    (folder / "text.txt").write_text("".join(letters[i] for i in chosen))


def asked(text: Path | None, windows: int, length: int) -> argparse.Namespace:
    """Options as ``compress_llm.texts`` wants them."""
    return argparse.Namespace(text=text, windows=windows, test_windows=3, length=length)


def largest_difference(first: Path, second: Path) -> float:
    """Of the products A·B in two folders that compress_checkpoint wrote, relative to the norm."""
    one, other = (compress_checkpoint.load(folder)[0].float() for folder in (first, second))
    worst = 0.0
    for name, pair in one.named_modules():
        if isinstance(pair, lrf.LowRank):
            twin = other.get_submodule(name)
            P, Q = (each[1].weight @ each[0].weight for each in (pair, twin))
            worst = max(worst, ((P - Q).norm() / Q.norm()).item())
    return worst


def in_memory(folder: Path, windows: Tensor) -> tuple[dict[str, lrf.Statistics], nn.Module]:
    """All layers' statistics at once, by the draws of compress_checkpoint; and the model."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    numbers = iter(range(len(windows)))

    def loss(output: object) -> list[Tensor]:
        logits = output.logits[0]
        drawn = compress_checkpoint.draw(logits.detach().softmax(1), next(numbers))
        return [nn.functional.cross_entropy(logits, drawn, reduction="sum")]

    names = [name for name, part in model.named_modules() if type(part) is nn.Linear]
    names.remove("lm_head")
    how = {"loss": loss, "weighted": True}
    return lrf.collect_statistics(model, windows.split(1), names, **how), model


def stages(
    folder: Path, out: Path, text: Path | None, count: int, length: int
) -> list[tuple[str, float, float]]:
    """(stage, CPU seconds, peak of private memory in MB) of compress_checkpoint."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    windows, _ = compress_llm.texts(tokenizer, asked(text, count, length))
    work = out / "unfinished"
    work.mkdir(parents=True, exist_ok=True)
    source = Source(folder)
    sweep = Sweep(source, windows, work, 0, 1)

    def finish() -> None:
        ranks = compress_checkpoint.choose_ranks(source, work, keep=0.8, multiple_of=16)
        compress_checkpoint.finish(source, work, out, ranks)

    found = []
    for name, stage in (
        ("forward", lambda: list(sweep.forward())),
        ("backward", lambda: list(sweep.backward())),
        ("finish", finish),
    ):
        with MemoryLog() as log:
            start = time.process_time()
            stage()
            spent = time.process_time() - start
        found.append((name, spent, log.peak))
    return found


def smollm2(out: Path, count: int = 6, length: int = 256) -> None:
    """SmolLM2 in bfloat16, from folder to folder: what each stage costs."""
    columns = ["stage", "tokens", "file MB", "CPU seconds", "private MB"]
    table = Table(out / "scale_smollm2.csv", columns, key=["stage"])
    if {"stage": "finish"} in table:
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "model")
        model, tokenizer = nb.load_smollm2()
        for part in (model.bfloat16(), tokenizer):
            part.save_pretrained(folder)
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e6
        about = {"tokens": count * length, "file MB": f"{size:.0f}"}
        for stage, spent, peak in alone(stages, folder, Path(name, "out"), None, count, length):
            values = {"CPU seconds": f"{spent:.1f}", "private MB": f"{peak:.0f}"}
            table.add({"stage": stage} | about, lambda values=values: values)


PARTS = {"svd": svd, "smollm2": smollm2}


def main() -> None:
    torch.set_num_threads(1)
    options = parse(__doc__, PARTS)
    for part in options.parts:
        PARTS[part](options.out)


if __name__ == "__main__":
    main()
