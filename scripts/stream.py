"""Factorize a model that need not fit into memory: one weight at a time, from safetensors files to one of them.

    python scripts/stream.py MODEL OUT --rank 64 [--layers REGEX] [--at-once] [--memory LOG.csv]

MODEL is a .safetensors file, or a folder with the parts of one. The weight ``NAME.weight`` of a layer whose NAME fits
REGEX becomes ``NAME.0.weight`` and ``NAME.1.weight``, the names that ``lrf.factorize`` gives to the pair, if two
factors are smaller than the matrix; everything else is copied. The truncated SVD is a randomized one, which needs
little memory and is the same in every run on one machine.

All shapes are known before any number is. So the header of OUT is written first, into OUT with the ending .part, then
one tensor after the other; the length of that file tells how far it got. A run that was killed goes on there when it is
started again, and only a file that is complete gets the name OUT.
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import lrf_utils as lrf

BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
REAL = ("F64", "F32", "F16", "BF16")
STATUS = Path("/proc/self/status")


def private_bytes() -> int | None:
    """Memory that this process alone holds and that is no copy of a file; None where the system does not tell."""
    if not STATUS.exists() or not (line := re.search(r"^RssAnon:\s*(\d+) kB$", STATUS.read_text(), re.MULTILINE)):
        return None
    return 1024 * int(line[1])


def give_back() -> None:
    """Return freed memory to the system, where its allocator can be told to: reuse would hide what is taken next."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)


class MemoryLog(threading.Thread):
    """Private memory above that at the start, in MB, every two milliseconds: ``rows`` holds (seconds, MB)."""

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
            self.rows.append((time.perf_counter() - self.began, (private_bytes() - self.before) / 1e6))

    def __exit__(self, *_: object) -> None:
        self.done.set()
        if self.before is not None:
            self.join()


@contextlib.contextmanager
def opened(model: Path) -> Iterator[dict]:
    """The tensors of a model, without reading them: {name: the open file that holds it}."""
    files = sorted(model.glob("*.safetensors")) if model.is_dir() else [model]
    if not files or not all(file.is_file() for file in files):
        raise SystemExit(f"no safetensors file at {model.name}; give a .safetensors file or a folder with some")
    with contextlib.ExitStack() as stack:
        tensors = {}
        for file in files:
            try:
                handle = stack.enter_context(safe_open(file, framework="pt"))
            except SafetensorError as error:
                raise SystemExit(f"{file.name} is not a complete safetensors file: {error}") from error
            tensors.update(dict.fromkeys(handle.keys(), handle))
        yield tensors


def plan(tensors: dict, rank: int, layers: str) -> dict[str, list[tuple[str, str, list[int]]]]:
    """What becomes of each tensor: {name: [(new name, dtype, shape), …]}; a weight to be factorized becomes two."""
    result = {}
    for name, handle in sorted(tensors.items()):
        part, layer = handle.get_slice(name), name.removesuffix(".weight")
        dtype, shape = part.get_dtype(), part.get_shape()
        if dtype not in BYTES:
            raise SystemExit(f"{name} has the type {dtype}; known are {', '.join(BYTES)}")
        real = layer != name and re.fullmatch(layers, layer) and len(shape) == 2 and dtype in REAL
        if real and rank <= lrf.break_even_rank(*shape):
            (m, n), pair = shape, (f"{layer}.0.weight", f"{layer}.1.weight")
            result[name] = [(pair[0], dtype, [rank, n]), (pair[1], dtype, [m, rank])]
        else:
            result[name] = [(name, dtype, shape)]
    for name in [name for name, new in result.items() if len(new) == 2]:
        bias = name.removesuffix("weight") + "bias"
        if bias in result:
            result[bias] = [(f"{name.removesuffix('.weight')}.1.bias", *result[bias][0][1:])]
    return result


def header(entries: list[tuple[str, str, list[int]]], settings: dict[str, str]) -> tuple[bytes, dict[str, int]]:
    """The first bytes of a safetensors file, and where in the file each tensor ends."""
    places, end = {"__metadata__": settings}, 0
    for name, dtype, shape in entries:
        start, end = end, end + BYTES[dtype] * torch.Size(shape).numel()
        places[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(places).encode()
    text += b" " * (-len(text) % 8)
    first = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {e[0]: first + places[e[0]]["data_offsets"][1] for e in entries}


def factors(W: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """B (rank, n) and A (m, rank), by a randomized SVD in float32: half as many vectors again, two iterations."""
    torch.manual_seed(0)
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


def stream(model: Path, out: Path, rank: int, layers: str = ".*", at_once: bool = False) -> Iterator[str]:
    """Yields each tensor's name as soon as what became of it is in the file."""
    with opened(model) as tensors:
        new = plan(tensors, rank, layers)
        settings = {"format": "pt", "rank": str(rank), "layers": layers}
        head, ends = header([entry for entries in new.values() for entry in entries], settings)
        part = out.with_name(out.name + ".part")
        if not begins_with(part, head):  # nothing there, or of other settings
            part.write_bytes(head)
        end_of = {name: ends[entries[-1][0]] for name, entries in new.items()}
        done = [name for name in new if end_of[name] <= part.stat().st_size]
        loaded = {name: tensors[name].get_tensor(name).clone() for name in new if at_once}
        with part.open("r+b") as file:
            file.seek(end_of[done[-1]] if done else len(head))
            file.truncate()  # what is half written
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
    parser.add_argument("--at-once", action="store_true", help="load the whole model first, for comparison")
    parser.add_argument("--memory", type=Path, help="write here the private memory over time")
    options = parser.parse_args()
    if options.rank < 1:
        raise SystemExit(f"--rank must be at least 1, got {options.rank}")
    torch.set_num_threads(1)
    factors(torch.randn(512, 512), 8)  # the libraries take what they need for themselves
    with MemoryLog() as log:
        for name in stream(options.model, options.out, options.rank, options.layers, options.at_once):
            print(name, flush=True)
    if options.memory and log.before is None:
        raise SystemExit("this system does not tell private memory (no RssAnon in /proc/self/status); nothing to log")
    if options.memory:
        lines = ["seconds,MB", *(f"{seconds:.4f},{size:.3f}" for seconds, size in log.rows)]
        options.memory.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
