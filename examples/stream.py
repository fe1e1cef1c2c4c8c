"""Factorize a model that need not fit into memory: one weight after another, file to file.

    python examples/stream.py MODEL OUT --rank 64 [--layers REGEX] [--at-once] [--memory LOG.csv]

MODEL is a .safetensors file, or a folder with the parts of one. The weight ``NAME.weight`` of a
layer whose NAME matches REGEX becomes ``NAME.0.weight`` and ``NAME.1.weight``, the names that
``lrf.factorize`` gives to the pair, if the two factors are smaller than the matrix. Everything
else is copied. The truncated SVD is a randomized one, which needs little memory and gives the
same result in every run on one machine.

All shapes are known before any number is. So the header of OUT is written first, into a file with
the ending .part, and then one tensor after the other: the length of that file tells how far a run
got. A run that was killed goes on there when it is started again, and only a complete file gets
the name OUT.
"""

import argparse
import contextlib
import ctypes
import json
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

import lrf_utils as lrf

FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # bytes of a number, by its type in the file
BYTES = FLOATS | {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
STATUS = Path("/proc/self/status")
Entry = tuple[str, str, list[int]]  # of a tensor in the file: name, type, shape

# --- What memory the process takes ---------------------------------------------------------------


def private_bytes() -> int | None:
    """Memory that this process alone holds and that is no copy of a file; None if unknown."""
    if not STATUS.exists():
        return None
    line = re.search(r"^RssAnon:\s*(\d+) kB$", STATUS.read_text(), re.MULTILINE)
    return 1024 * int(line[1]) if line else None


def give_back() -> None:
    """Return freed memory to the system if we can: reusing it would hide what is taken next."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # some C libraries lack it
        if trim:
            trim(0)


class MemoryLog(threading.Thread):
    """Private memory every two milliseconds: ``rows`` holds (seconds, MB above the start)."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.rows: list[tuple[float, float]] = []
        self.done = threading.Event()

    def __enter__(self) -> "MemoryLog":
        self.before, self.began = private_bytes(), time.perf_counter()
        if self.before is not None:
            self.start()
        return self

    def run(self) -> None:
        while not self.done.wait(0.002):
            seconds = time.perf_counter() - self.began
            self.rows.append((seconds, (private_bytes() - self.before) / 1e6))

    def __exit__(self, *_: object) -> None:
        self.done.set()
        if self.before is not None:
            self.join()


# --- Reading and planning ------------------------------------------------------------------------


@contextlib.contextmanager
def opened(model: Path) -> Iterator[dict]:
    """The tensors of a model, without reading them: {name: the open file that holds it}."""
    files = sorted(model.glob("*.safetensors")) if model.is_dir() else [model]
    if not files or not all(file.is_file() for file in files):
        raise SystemExit(
            f"no safetensors file at {model.name}; give a .safetensors file or a folder with some"
        )
    with contextlib.ExitStack() as stack:
        tensors = {}
        for file in files:
            try:
                handle = stack.enter_context(safe_open(file, framework="pt"))
            except SafetensorError as error:
                raise SystemExit(f"{file.name} is not a complete safetensors file") from error
            tensors.update(dict.fromkeys(handle.keys(), handle))
        yield tensors


def plan(tensors: dict, rank: int, layers: str) -> dict[str, list[Entry]]:
    """The entries that replace each tensor; for a weight to be factorized there are two."""
    result = {}
    for name, handle in sorted(tensors.items()):
        part = handle.get_slice(name)
        dtype, shape = part.get_dtype(), part.get_shape()
        if dtype not in BYTES:
            raise SystemExit(f"{name} has the type {dtype}; known are {', '.join(BYTES)}")
        result[name] = [(name, dtype, shape)]

        layer = name.removesuffix(".weight")
        chosen = layer != name and re.fullmatch(layers, layer)
        matrix = len(shape) == 2 and dtype in FLOATS
        if chosen and matrix and rank <= lrf.break_even_rank(*shape):
            m, n = shape
            result[name] = [
                (f"{layer}.0.weight", dtype, [rank, n]),
                (f"{layer}.1.weight", dtype, [m, rank]),
            ]

    for name, entries in list(result.items()):
        bias = name.removesuffix("weight") + "bias"
        if len(entries) == 2 and bias in result:  # it moves to the second factor
            _, dtype, shape = result[bias][0]
            result[bias] = [(f"{name.removesuffix('.weight')}.1.bias", dtype, shape)]
    return result


def header(entries: list[Entry], settings: dict[str, str]) -> tuple[bytes, dict[str, int]]:
    """The first bytes of a safetensors file, and where in the file each tensor ends."""
    places, end = {"__metadata__": settings}, 0
    for name, dtype, shape in entries:
        start, end = end, end + BYTES[dtype] * torch.Size(shape).numel()
        places[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(places).encode()
    text += b" " * (-len(text) % 8)
    first = 8 + len(text)
    ends = {name: first + places[name]["data_offsets"][1] for name, _, _ in entries}
    return len(text).to_bytes(8, "little") + text, ends


# --- Factorizing and writing ---------------------------------------------------------------------


def factors(W: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """B (rank, n) and A (m, rank), by a randomized SVD in float32.

    It uses half as many vectors again as the rank, and two iterations (lesson 12 says why).
    """
    torch.manual_seed(0)  # the numbers of a layer depend on no layer before it
    U, S, V = torch.svd_lowrank(W.float(), q=min(rank + rank // 2 + 10, *W.shape), niter=2)
    root = S[:rank].sqrt()
    return (root[:, None] * V[:, :rank].T).to(W.dtype), (U[:, :rank] * root).to(W.dtype)


def begins_with(file: Path, head: bytes) -> bool:
    if not file.exists():
        return False
    with file.open("rb") as open_file:
        return open_file.read(len(head)) == head


def raw(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())


def stream(
    model: Path, out: Path, rank: int, layers: str = ".*", at_once: bool = False
) -> Iterator[str]:
    """Yield each tensor's name as soon as what replaces it is in the file."""
    with opened(model) as tensors:
        new = plan(tensors, rank, layers)
        settings = {"format": "pt", "rank": str(rank), "layers": layers}
        head, ends = header([entry for entries in new.values() for entry in entries], settings)
        end_of = {name: ends[entries[-1][0]] for name, entries in new.items()}
        loaded = {name: tensors[name].get_tensor(name).clone() for name in new if at_once}

        part = out.with_name(out.name + ".part")
        if not begins_with(part, head):  # no run was interrupted, or one with other settings
            part.write_bytes(head)
        done = [name for name in new if end_of[name] <= part.stat().st_size]
        with part.open("r+b") as file:
            file.seek(end_of[done[-1]] if done else len(head))
            file.truncate()  # drop a tensor that is only half written
            for name in list(new)[len(done) :]:
                W = loaded[name] if at_once else tensors[name].get_tensor(name)
                for tensor in factors(W, rank) if len(new[name]) == 2 else (W,):
                    file.write(raw(tensor))
                file.flush()
                os.fsync(file.fileno())
                yield name
    os.replace(part, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--layers", default=".*", help="which layers, by name; all by default")
    parser.add_argument("--at-once", action="store_true", help="load all first, for comparison")
    parser.add_argument("--memory", type=Path, help="write here the private memory over time")
    options = parser.parse_args()
    if options.rank < 1:
        raise SystemExit(f"--rank must be at least 1, got {options.rank}")
    torch.set_num_threads(1)
    factors(torch.randn(512, 512), 8)  # the libraries take what they need for themselves
    how = options.rank, options.layers, options.at_once
    with MemoryLog() as log:
        for name in stream(options.model, options.out, *how):
            print(name, flush=True)
    if options.memory and log.before is None:
        raise SystemExit(
            "this system does not tell private memory (no RssAnon in /proc/self/status); "
            "nothing to log"
        )
    if options.memory:
        lines = [f"{seconds:.4f},{size:.3f}" for seconds, size in log.rows]
        options.memory.write_text("\n".join(["seconds,MB", *lines, ""]))


if __name__ == "__main__":
    main()
