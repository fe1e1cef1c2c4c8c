"""Models on disk, read without loading them and written one tensor after another."""

import copy
import hashlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import lrf_utils as lrf

# Not model.safetensors: from_pretrained would fill factorized layers with random numbers.
INDEX = "factorized.safetensors.index.json"
BYTES = {"F32": 4, "F16": 2, "BF16": 2}  # of a number, by its type in the file
Entry = tuple[list[int], str, Callable[[], Tensor]]  # of a file: shape, type, how to get it


def skeleton(folder: str | Path) -> nn.Module:
    """The model without numbers, except for the angles of its positions, which no file holds."""
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config).eval()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model


def load(folder: str | Path) -> tuple[nn.Module, Any]:
    """The factorized model and its tokenizer."""
    folder, model, numbers = Path(folder), skeleton(folder), {}
    index = json.loads((folder / INDEX).read_text())
    for name, rank in index["metadata"]["ranks"].items():
        layer = model.get_submodule(name)
        (m, n), bias = layer.weight.shape, layer.bias is not None
        with torch.device("meta"):
            pair = lrf.LowRank(nn.Linear(n, rank, bias=False), nn.Linear(rank, m, bias=bias))
        model.set_submodule(name, pair)
    for file in sorted(set(index["weight_map"].values())):
        numbers |= load_file(folder / file)
    model.load_state_dict(numbers, strict=False, assign=True)
    model.tie_weights()
    if empty := [name for name, each in model.named_parameters() if each.is_meta]:
        raise ValueError(f"{folder} has no numbers for {empty[:8]}")
    return model.eval(), AutoTokenizer.from_pretrained(folder)


class Source:
    """A model on disk. Its tensors are mapped: the system reads a page when it is looked at."""

    def __init__(self, folder: Path) -> None:
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise SystemExit(f"no safetensors file in {folder.name}")
        self.tensors, digest = {}, hashlib.sha256()
        for path in files:
            try:
                file = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise SystemExit(f"{path.name} is no complete safetensors file") from error
            self.tensors |= dict.fromkeys(file.keys(), file)
            with path.open("rb") as numbers:
                digest.update(hashlib.file_digest(numbers, "sha256").digest())
        self.folder, self.digest, self.model = folder, digest.hexdigest(), skeleton(folder)
        config = self.model.config
        if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
            raise SystemExit(f"{folder.name} uses sliding-window attention, unknown here")
        self.depth, self.width = len(self.model.model.layers), self.model.config.hidden_size
        tied = "lm_head.weight" not in self.tensors
        self.head = "model.embed_tokens.weight" if tied else "lm_head.weight"
        parts = self.model.model.layers[0].named_modules()
        self.layers = [name for name, part in parts if type(part) is nn.Linear]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name].get_tensor(name)

    def part(self, name: str) -> nn.Module:
        """One part of the model with its numbers, in float32."""
        part = copy.deepcopy(self.model.get_submodule(name))
        numbers = {key: self[f"{name}.{key}"].float() for key in part.state_dict()}
        part.load_state_dict(numbers, assign=True)
        return part.requires_grad_(False)


def mapped(path: Path, shape: tuple[int, ...]) -> Tensor:
    """Numbers that lie in a file, which is made if need be: memory holds what it has room for."""
    return torch.from_file(str(path), shared=True, size=math.prod(shape)).view(shape)


def write(path: Path, entries: dict[str, Entry]) -> None:
    """A safetensors file, one tensor after another; it gets its name when it is complete."""
    header, end, half = {"__metadata__": {"format": "pt"}}, 0, path.with_suffix(".half")
    for name, (shape, dtype, _) in entries.items():
        start, end = end, end + BYTES[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with half.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, _, numbers in entries.values():
            file.write(numbers().contiguous().view(-1).view(torch.uint8).numpy())
    os.replace(half, path)
