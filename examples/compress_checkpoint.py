"""Compress a language model that does not fit into memory, one block after another.

    python examples/compress_checkpoint.py MODEL --keep 0.8 --out FOLDER [--text FILE.txt]

MODEL is a folder of a Llama-like model as Hugging Face publishes it: config.json, tokenizer, and
safetensors files in 16 or 32 bits. The method is that of examples/compress_llm.py:

1. Forward, block by block: what enters each block goes to disk.
2. Backward, block by block: statistics of the block's layers, weighted by the loss, whose gradient
   comes from the block above. One decomposition of each layer gives its factors for *all* ranks
   that save, and the error at each of them. Both go to disk.
3. Ranks for all layers under one budget; then the first columns of each factor are copied.

So memory holds one block and its statistics, however many blocks there are. A run that was killed
goes on after the last complete block when the same command is given again, but not with another
model or text. With ``--keep-work``, another budget needs no sweep.

Several workers that share a disk divide the text and the layers. Two on one machine:

    torchrun --local-addr 127.0.0.1 --nproc-per-node 2 examples/compress_checkpoint.py MODEL …

Without the address, torchrun waits where the machine's own name leads nowhere.

    from examples.compress_checkpoint import load
    model, tokenizer = load("FOLDER")
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer

import lrf_utils as lrf
from examples.compress_llm import texts
from examples.memory import MemoryLog
from examples.on_disk import INDEX, Entry, Source, mapped, write
from examples.on_disk import load as load  # so that it can be imported from here, too

ROWS = 2048  # tokens that go through a block at once; tokens of the head that are scored at once

# --- The two sweeps ------------------------------------------------------------------------------


class Sweep:
    """What a worker does with its share of the windows; its files are in the folder ``work``."""

    def __init__(self, source: Source, windows: Tensor, work: Path, rank: int, world: int) -> None:
        self.source, self.work, self.rank, self.world = source, work, rank, world
        self.windows, self.numbers = windows[rank::world], range(len(windows))[rank::world]
        self.shape = (*self.windows.shape, source.width)
        self.batch = max(1, ROWS // windows.shape[1])
        angles, positions = source.model.model.rotary_emb, torch.arange(windows.shape[1])[None]
        self.positions = {"position_embeddings": angles(torch.zeros(1), positions)}
        self.positions["position_ids"] = positions

    def file(self, kind: str, i: int) -> Path:
        return self.work / f"{kind}-{i:03d}-of-worker-{self.rank}"

    def stored(self, kind: str, i: int) -> Tensor:
        return mapped(self.file(kind, i), self.shape)

    @torch.no_grad()
    def forward(self) -> Iterator[str]:
        """Store what enters each block, and what leaves the last one."""
        for i in range(self.source.depth + 1):
            if self.file("states", i).exists():
                continue
            states = self.stored("half", i)
            if i == 0:
                table = self.source["model.embed_tokens.weight"]
                for k, ids in enumerate(self.windows):
                    states[k] = table[ids]
            else:
                block = self.source.part(f"model.layers.{i - 1}")
                below = self.stored("states", i - 1).split(self.batch)
                for some, x in zip(states.split(self.batch), below):
                    some.copy_(block(hidden_states=x, **self.positions))
            os.replace(self.file("half", i), self.file("states", i))
            yield f"forward {i} of {self.source.depth}"

    def loss(self) -> None:
        """Store the gradient of a sampled loss at the output of the last block."""
        norm, head = self.source.part("model.norm"), self.source[self.source.head]
        states, gradients = (self.stored(x, self.source.depth) for x in ("states", "gradients"))
        for k, number in enumerate(self.numbers):
            x = states[k].clone().requires_grad_()
            y = norm(x)
            with torch.no_grad():
                change = torch.cat([y @ rows.float().T for rows in head.split(ROWS)], 1).softmax(1)
                change[range(len(y)), draw(change, number)] -= 1  # cross-entropy's at the logits
                parts = zip(change.split(ROWS, 1), head.split(ROWS))
                change = sum(some @ rows.float() for some, rows in parts)
            (gradients[k],) = torch.autograd.grad(y, x, change)

    def statistics(self, block: nn.Module, i: int) -> dict[str, lrf.Statistics]:
        """Of the layers of block i; stores the gradient at its input on the way."""
        states, above = self.stored("states", i), self.stored("gradients", i + 1)
        below, now = self.stored("gradients", i), {}

        def inputs_of(some: slice) -> dict[str, Any]:
            now.update(some=some, x=states[some].clone().requires_grad_())
            return {"hidden_states": now["x"], **self.positions}

        def loss(output: Tensor) -> tuple:
            # The backward pass through this block alone; it passes all layers on its way to x.
            (below[now["some"]],) = torch.autograd.grad(output, now["x"], above[now["some"]])
            return ()

        batches = [slice(k, k + self.batch) for k in range(0, len(states), self.batch)]
        how = {"loss": loss, "weighted": True, "inputs_of": inputs_of}
        return lrf.collect_statistics(block, batches, self.source.layers, **how)

    def backward(self) -> Iterator[str]:
        """Store the factors of all layers, from the last block to the first."""
        if not (self.work / f"done-{self.source.depth}").exists():
            self.loss()
            self.done(self.source.depth)
            yield "loss"
        for i in reversed(range(self.source.depth)):
            if (self.work / f"done-{i}").exists():
                continue
            block = self.source.part(f"model.layers.{i}")
            known = self.statistics(block, i)
            if self.world > 1:
                known = add_up(known)
            for name in list(known)[self.rank :: self.world]:
                layer, full = block.get_submodule(name), f"model.layers.{i}.{name}"
                found = nested_factors(layer, known.pop(name), self.source[f"{full}.weight"].dtype)
                save_file(found, self.work / f"{full}.safetensors")
            self.done(i)
            with contextlib.suppress(OSError):  # a system may want to keep a file that is mapped
                self.file("gradients", i + 1).unlink()
            yield f"backward {i}"

    def done(self, i: int) -> None:
        """Leave a mark, as soon as all workers have come as far."""
        if self.world > 1:
            dist.barrier()
        (self.work / f"done-{i}").touch()


def add_up(known: dict[str, lrf.Statistics]) -> dict[str, lrf.Statistics]:
    """What all workers' statistics say together. Sums are sent, and never a row."""
    together = {}
    for name, each in known.items():
        counts = torch.tensor([each.inputs, each.rows, each.weight], dtype=torch.float64)
        for numbers in (counts, each.row_sum, each.outer_sum, each.gradient_sum):
            dist.all_reduce(numbers)  # in place: now it is the sum over all workers
        inputs, rows, weight = counts.tolist()
        more = {"inputs": round(inputs), "rows": round(rows), "weight": weight}
        together[name] = dataclasses.replace(each, **more)
    return together


def draw(p: Tensor, number: int) -> Tensor:
    """A token for each position of window ``number``, from the model's own prediction."""
    return torch.multinomial(p, 1, generator=torch.Generator().manual_seed(number))[:, 0]


def nested_factors(
    layer: nn.Linear, known: lrf.Statistics, dtype: torch.dtype
) -> dict[str, Tensor]:
    """A and B whose first r columns and rows are the best pair of rank r, for all r that save.

    As ``lrf.factorize_layer`` up to a scale for each column and its inverse for the row; with
    the errors at ranks 0, 1, … as ``lrf.truncation_errors``, and the mean of the inputs.
    """
    W, biased = layer.weight.double(), layer.bias is not None
    G = known.metric
    G.diagonal().add_(known.damping * G.diagonal().mean())
    R = torch.linalg.cholesky(G).T
    RW = R @ W
    response = RW @ torch.linalg.cholesky(known.covariance(centered=biased, ridge=True))
    if len(W) <= W.shape[1]:
        values, U = torch.linalg.eigh(response @ response.T)
        U = U.flip(1)
    else:  # the smaller Gram matrix
        values, V = torch.linalg.eigh(response.T @ response)
        U = torch.linalg.qr(response @ V.flip(1)).Q
    most = lrf.break_even_rank(*W.shape)
    A, B = torch.linalg.solve_triangular(R, U[:, :most], upper=True), U[:, :most].T @ RW
    scale = (B.norm(dim=1) / A.norm(dim=0)).sqrt()
    errors = values.clamp(min=0).cumsum(0).flip(0)[: most + 1].clone()
    factors = {"A": (A * scale).to(dtype).contiguous(), "B": (B / scale[:, None]).to(dtype)}
    return factors | {"errors": errors, "mean": known.mean}


# --- The result ----------------------------------------------------------------------------------


def choose_ranks(source: Source, work: Path, keep: float, multiple_of: int) -> dict[str, int]:
    """The ranks of the layers that do not stay as they are."""
    options = {}
    for path in sorted(work.glob("*.safetensors")):
        name = path.stem
        m, n = source[f"{name}.weight"].shape
        with safe_open(path, framework="pt") as file:
            errors = file.get_tensor("errors").tolist()
        ranks = range(multiple_of, len(errors), multiple_of)
        options[name] = {None: (m * n, 0.0)} | {r: (r * (m + n), errors[r]) for r in ranks}
    total = sum(table[None][0] for table in options.values())
    plan = lrf.allocate_ranks(options, keep * total)
    return {name: rank for name, rank in plan.items() if rank is not None}


def entries_of(source: Source, work: Path, name: str, ranks: dict[str, int]) -> dict[str, Entry]:
    """What the file of the result holds in place of one tensor."""
    view = source.tensors[name].get_slice(name)
    shape, dtype = view.get_shape(), view.get_dtype()
    layer, _, kind = name.rpartition(".")
    rank = ranks.get(layer)
    if rank is None:
        return {name: (shape, dtype, lambda: source[name])}

    def factors() -> dict[str, Tensor]:
        return load_file(work / f"{layer}.safetensors")  # mapped

    def bias() -> Tensor:  # that makes up for the mean of what is lost
        found, lost = factors(), source[f"{layer}.weight"].double() @ factors()["mean"]
        kept = found["A"][:, :rank].double() @ (found["B"][:rank].double() @ found["mean"])
        return (source[name].double() + lost - kept).to(source[name].dtype)

    if kind == "bias":
        return {f"{layer}.1.bias": (shape, dtype, bias)}
    return {
        f"{layer}.0.weight": ([rank, shape[1]], dtype, lambda: factors()["B"][:rank]),
        f"{layer}.1.weight": ([shape[0], rank], dtype, lambda: factors()["A"][:, :rank]),
    }


def finish(source: Source, work: Path, out: Path, ranks: dict[str, int]) -> None:
    """Write config, tokenizer, and one safetensors file for each block and one for the rest."""
    for path in source.folder.iterdir():
        if path.is_file() and ".safetensors" not in path.name:
            shutil.copy(path, out)
    files: dict[str, dict[str, Entry]] = {}
    for name in sorted(source.tensors):
        number = int(name.split(".")[2]) + 2 if name.startswith("model.layers.") else 1
        file = f"factorized-{number:05d}-of-{source.depth + 1:05d}.safetensors"
        files.setdefault(file, {}).update(entries_of(source, work, name, ranks))
    for file, entries in files.items():
        write(out / file, entries)
    where = {name: file for file, entries in files.items() for name in entries}
    about = {"ranks": ranks, "source": source.digest}
    (out / INDEX).write_text(json.dumps({"metadata": about, "weight_map": where}, indent=1))


def compress(options: argparse.Namespace) -> None:
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:  # torchrun has said so; one worker may have to wait for another for long
        dist.init_process_group("gloo", timeout=timedelta(days=7))
    source, work = Source(options.model), options.out / "unfinished"
    work.mkdir(parents=True, exist_ok=True)
    calibration, _ = texts(AutoTokenizer.from_pretrained(options.model), options)
    tokens = hashlib.sha256(calibration.numpy().tobytes()).hexdigest()
    asked = str([source.digest, tokens, world])
    settings = work / "settings.txt"
    if rank == 0 and settings.exists() and settings.read_text() != asked:
        sys.exit(f"{work} is of another model or text; remove it or choose another --out")
    if world > 1:
        dist.barrier()  # nobody goes on before the first worker has looked
    settings.write_text(asked)
    sweep = Sweep(source, calibration, work, rank, world)

    def last() -> Iterator[str]:
        if rank == 0:
            ranks = choose_ranks(source, work, options.keep, options.multiple_of)
            finish(source, work, options.out, ranks)
            yield f"factors of {len(ranks)} layers"

    for stage in (sweep.forward, sweep.backward, last):
        with MemoryLog() as log:
            for step in stage():
                print(step, flush=True)
        print(f"{log.seconds:.1f} s, at most {log.peak:.1f} MB of private memory", flush=True)
    if rank == 0 and not options.keep_work:
        shutil.rmtree(work)
    if world > 1:
        dist.destroy_process_group()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="a folder")
    parser.add_argument("--keep", type=float, default=0.8, help="share of the linear weights")
    parser.add_argument("--out", type=Path, required=True, help="the folder to make")
    parser.add_argument("--text", type=Path, help="your own text, UTF-8")
    parser.add_argument("--windows", type=int, default=48, help="to calibrate with")
    parser.add_argument("--length", type=int, default=256, help="tokens in a window")
    parser.add_argument("--multiple-of", type=int, default=16, help="of which ranks are multiples")
    parser.add_argument("--keep-work", action="store_true", help="for a run with another --keep")
    parser.set_defaults(test_windows=3)  # of which nothing is used here
    compress(parser.parse_args(arguments))


if __name__ == "__main__":
    main()
