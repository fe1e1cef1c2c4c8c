"""What takes too long for a cell of lesson 12, or needs Linux: results/scale_*.csv.

    python -m experiments.scale [--parts spectra svd smollm2] [--out FOLDER]

One thread, about five minutes. CPU seconds, which other programs on the machine change little,
are those of the thread that computes. Memory is private memory above that before the call (see
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
SMOLLM2_WEIGHTS = [
    "model.embed_tokens",
    "model.layers.0.self_attn.q_proj",
    "model.layers.15.self_attn.o_proj",
    "model.layers.15.mlp.up_proj",
    "model.layers.29.mlp.down_proj",
]
MINILM_WEIGHTS = [
    "embeddings.word_embeddings",
    "encoder.layer.0.attention.self.query",
    "encoder.layer.3.intermediate.dense",
]


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
    "randomized, 10 more, 3 iterations": lambda W, r: randomized(W, r, 10, 3),
    "randomized, a quarter more, 2 iterations": lambda W, r: randomized(W, r, r // 4, 2),
    "randomized, a quarter more, 3 iterations": lambda W, r: randomized(W, r, r // 4, 3),
    "randomized, half more, 2 iterations": lambda W, r: randomized(W, r, r // 2, 2),
    "randomized, half more, 3 iterations": lambda W, r: randomized(W, r, r // 2, 3),
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
            start = time.thread_time()  # of this thread, not of the log's
            A, B = decompose(W, rank)
            spent = time.thread_time() - start
        return spent, log.peak, product_error(W, A, B)


def optimum(W: Tensor, rank: int) -> float:
    """The error of the best approximation of this rank."""
    W = W.double() if len(W) <= W.shape[1] else W.T.double()
    return torch.linalg.eigvalsh(W @ W.T)[:-rank].clamp(min=0).sum().sqrt().item()


def svd(out: Path, m: int = 2048, n: int = 5504, rank: int = 256) -> None:
    columns = ["method", "m", "n", "rank", "CPU seconds", "private MB", "error / optimum"]
    table = Table(out / "scale_svd.csv", columns, key=["method", "m", "n", "rank"])
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/W.safetensors"
        W = slow_matrix(m, n)
        save_file({"W": W}, file)

        @functools.cache
        def best() -> float:
            return optimum(W, rank)

        def measure(name: str) -> dict[str, str]:
            spent, peak, left = alone(measured, file, name, rank)
            values = f"{spent:.2f}", f"{peak:.0f}", f"{left / best():.5f}"
            return dict(zip(columns[4:], values))

        for name in DECOMPOSITIONS:
            row = {"method": name, "m": m, "n": n, "rank": rank}
            table.add(row, functools.partial(measure, name))


def matrices() -> dict[str, Tensor]:
    """Trained weights of two language models, and random matrices with other spectra."""
    found = {}
    for short, model, names in (
        ("SmolLM2", nb.load_smollm2()[0], SMOLLM2_WEIGHTS),
        ("MiniLM", nb.load_minilm()[0], MINILM_WEIGHTS),
    ):
        for name in names:
            found[f"{short}: {name}"] = model.get_submodule(name).weight.data.float()
    torch.manual_seed(1)
    found["white noise"] = noise = torch.randn(576, 1536)
    found["slow fall"] = slow_matrix(576, 1536)
    found["rank 64 and white noise"] = noise + torch.randn(576, 64) @ torch.randn(64, 1536) / 2
    return found


def spectra(out: Path) -> None:
    """How far the randomized SVD is from the optimum, at an eighth and a quarter of all ranks."""
    columns = ["matrix", "m", "n", "rank", "method", "error / optimum"]
    table = Table(out / "scale_spectra.csv", columns, key=["matrix", "rank", "method"])
    for name, W in matrices().items():
        m, n = W.shape
        for rank in (min(m, n) // 8, min(m, n) // 4):
            best = functools.cache(functools.partial(optimum, W, rank))
            for method in (each for each in DECOMPOSITIONS if each.startswith("randomized")):
                row = {"matrix": name, "m": m, "n": n, "rank": rank, "method": method}
                table.add(row, functools.partial(above_optimum, W, rank, method, best))


def above_optimum(W: Tensor, rank: int, method: str, best: Callable[[], float]) -> dict[str, str]:
    left = product_error(W, *DECOMPOSITIONS[method](W, rank))
    return {"error / optimum": f"{left / best():.5f}"}


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


def speeds(size: int = 1024) -> dict[str, float]:
    """How many operations of each kind one thread does in a second, or how many numbers."""
    single = torch.randn(size, size)
    double, logits = single.double(), torch.randn(256, 4 * size)
    spd = double @ double.T + size * torch.eye(size)
    large = torch.randn(4 * size, size)  # larger than caches
    large_double = large.double()
    calls = {  # how many, and a call
        "product, float32": (2 * size**3, lambda: single @ single),
        "product, float64": (2 * size**3, lambda: double @ double),
        "Cholesky, float64": (size**3 / 3, lambda: torch.linalg.cholesky(spd)),
        "eigenvectors, float64": (size**3, lambda: torch.linalg.eigh(spd)),
        "QR, float64": (8 / 3 * size**3, lambda: torch.linalg.qr(double)),
        "pass, float32": (4 * size**2, lambda: large * large),
        "pass, float64": (4 * size**2, lambda: large_double * large_double),
        "draw of a token": (256 * 4 * size, lambda: logits.softmax(1).multinomial(1)),
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    each = {kind: call for kind, (_, call) in calls.items()}
    spent = nb.measure(each, blocks=3, clock=time.thread_time).median()
    torch.set_num_threads(threads)
    return {kind: count / spent[kind] for kind, (count, _) in calls.items()}


class Clocks:
    """Seconds of this thread in functions, each without what it calls of the others."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}
        self.inner = [0.0]

    def around(self, function: Callable, what: str) -> Callable:
        def timed(*args: object, **kwargs: object) -> object:
            start = time.thread_time()
            self.inner.append(0.0)
            result = function(*args, **kwargs)
            spent = time.thread_time() - start
            self.spent[what] = self.spent.get(what, 0) + spent - self.inner.pop()
            self.inner[-1] += spent
            return result

        return timed


CLOCKED = {  # whose time is which part of lesson 12's bill
    "head": [(Sweep, "loss")],
    "backward": [(Sweep, "statistics")],
    "statistics": [(lrf._Sums, name) for name in ("add_rows", "add_gradient", "statistics")],
    "decompositions": [(compress_checkpoint, "nested_factors")],
}


def clocked(
    folder: Path, out: Path, text: Path | None, count: int, length: int
) -> tuple[dict[str, float], float, list[dict[str, float]]]:
    """Seconds of compress_checkpoint, its peak of private memory, speeds before and after."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    windows, _ = compress_llm.texts(tokenizer, asked(text, count, length))
    work, clocks, fast = out / "unfinished", Clocks(), [speeds()]
    work.mkdir(parents=True, exist_ok=True)
    for what, functions in CLOCKED.items():
        for owner, name in functions:
            setattr(owner, name, clocks.around(getattr(owner, name), what))

    def finish() -> None:
        ranks = compress_checkpoint.choose_ranks(source, work, keep=0.8, multiple_of=16)
        compress_checkpoint.finish(source, work, out, ranks)

    with MemoryLog() as log:
        source = Source(folder)
        sweep = Sweep(source, windows, work, 0, 1)
        clocks.around(lambda: list(sweep.forward()), "forward")()
        clocks.around(lambda: list(sweep.backward()), "files")()
        clocks.around(finish, "files")()
    return clocks.spent, log.peak, [*fast, speeds()]


def smollm2(out: Path, count: int = 6, length: int = 256) -> None:
    """SmolLM2 in bfloat16, from folder to folder: what each part costs, and the speeds then."""
    columns = ["part", "tokens", "file MB", "CPU seconds", "private MB"]
    table = Table(out / "scale_smollm2.csv", columns, key=["part"])
    rates = Table(out / "scale_speeds.csv", ["kind", "per second"], key=["kind"])
    if {"part": "files"} in table:
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "model")
        model, tokenizer = nb.load_smollm2()
        for part in (model.bfloat16(), tokenizer):
            part.save_pretrained(folder)
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e6
        spent, peak, fast = alone(clocked, folder, Path(name, "out"), None, count, length)
    for kind in fast[0]:
        mean = sum(each[kind] for each in fast) / len(fast)
        rates.add({"kind": kind}, lambda mean=mean: {"per second": f"{mean:.3g}"})
    about = {"tokens": count * length, "file MB": f"{size:.0f}", "private MB": f"{peak:.0f}"}
    for part in ("forward", "head", "backward", "statistics", "decompositions", "files"):
        values = about | {"CPU seconds": f"{spent[part]:.2f}"}
        table.add({"part": part}, lambda values=values: values)


PARTS = {"spectra": spectra, "svd": svd, "smollm2": smollm2}


def main() -> None:
    torch.set_num_threads(1)
    options = parse(__doc__, PARTS)
    for part in options.parts:
        PARTS[part](options.out)


if __name__ == "__main__":
    main()
