"""Train the decoder of notebook 09 on the King James Bible, character by character. Writes checkpoints/decoder.pt.

    python scripts/train_decoder.py [--steps 2500] [--out FILE]

About six minutes on one thread. Every 200 steps all that is needed to go on is written to build/decoder_state.pt, so an
interrupted run resumes; when it is done, the weights are rounded to half precision and stored. Training sees the first
90 % of the text. Losses are in nats per character.
"""

import argparse
import gzip
import math
import sys
import time
import zlib
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
CONTEXT, WIDTH, HEADS, LAYERS = 256, 128, 4, 4
BATCH, RATE, WARM_UP = 4, 3e-3, 100


class Text(NamedTuple):
    """A text as numbers from 0 to the size of its alphabet, in three parts by position."""

    alphabet: str
    train: Tensor  # the first 90 %
    validation: Tensor  # the next 5 %
    test: Tensor  # the last 5 %


def load_text(path: Path = ROOT / "data" / "kjv" / "kjv.txt.gz") -> Text:
    """The King James Bible, a verse a line. Raises an OSError if the file is missing or damaged."""
    try:
        text = gzip.decompress(path.read_bytes()).decode("ascii")
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise OSError(
            f"{path} is missing or damaged ({error}). Restore it: git checkout -- {path.name} in its folder."
        ) from error
    alphabet = "".join(sorted(set(text)))
    codes = encode(text, alphabet)
    first, second = len(codes) * 90 // 100, len(codes) * 95 // 100
    return Text(alphabet, codes[:first], codes[first:second], codes[second:])


def encode(text: str, alphabet: str) -> Tensor:
    if unknown := sorted(set(text) - set(alphabet)):
        raise ValueError(f"the decoder does not know {unknown}; its alphabet is {alphabet!r}")
    number = {character: i for i, character in enumerate(alphabet)}
    return torch.tensor([number[character] for character in text])


class Attention(nn.Module):
    """Causal self-attention with several heads. A cache keeps, for each token, what ``stored`` says."""

    def __init__(self, width: int = WIDTH, heads: int = HEADS):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))

    def stored(self, x: Tensor) -> Tensor:
        return torch.cat([self.k(x), self.v(x)], dim=-1)

    def keys_values(self, stored: Tensor) -> tuple[Tensor, Tensor]:
        return stored.chunk(2, dim=-1)

    def forward(self, x: Tensor, cache: list[Tensor] | None = None) -> Tensor:
        stored = self.stored(x)
        if cache is not None:  # tokens that came before stand in front
            cache.append(stored)
            stored = torch.cat(cache, dim=1)
            cache[:] = [stored]
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (self.q(x), *self.keys_values(stored)))
        old = k.shape[2] - q.shape[2]
        seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=x.device).tril(old) if old else None
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=not old)
        return self.o(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, cache: list[Tensor] | None = None) -> Tensor:
        x = x + self.attention(self.norm1(x), cache)
        return x + self.mlp(self.norm2(x))


class Decoder(nn.Module):
    """Characters (batch, tokens) to logits of the next ones. Learned positions are added to the embedding."""

    def __init__(self, alphabet: int = 63, width: int = WIDTH, heads: int = HEADS, layers: int = LAYERS):
        super().__init__()
        self.embedding, self.position = nn.Embedding(alphabet, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, alphabet, bias=False)

    def forward(self, tokens: Tensor, caches: list[list[Tensor]] | None = None) -> Tensor:
        """With ``caches``, a list for each block and empty at first, ``tokens`` go on from those that were given."""
        caches = caches or [None] * len(self.blocks)
        old = caches[0][0].shape[1] if caches[0] else 0
        if old + tokens.shape[1] > len(self.position.weight):
            raise ValueError(f"{old} + {tokens.shape[1]} tokens, but the context is {len(self.position.weight)}")
        x = self.embedding(tokens) + self.position.weight[old : old + tokens.shape[1]]
        for block, cache in zip(self.blocks, caches):
            x = block(x, cache)
        return self.head(self.norm(x))


def load_decoder(path: Path = ROOT / "checkpoints" / "decoder.pt") -> Decoder:
    """The trained decoder; its weights are stored in half precision."""
    model = Decoder()
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.eval()


def windows(codes: Tensor, count: int, seed: int) -> Tensor:
    """``count`` stretches of CONTEXT + 1 characters from random places."""
    starts = torch.randint(len(codes) - CONTEXT, (count,), generator=torch.Generator().manual_seed(seed))
    return codes[starts[:, None] + torch.arange(CONTEXT + 1)]


def block_losses(model: nn.Module, codes: Tensor) -> Tensor:
    """The mean loss in each of the consecutive stretches of CONTEXT characters, in nats per character."""
    rows = codes[: (len(codes) - 1) // CONTEXT * CONTEXT + 1].unfold(0, CONTEXT + 1, CONTEXT)
    with torch.no_grad():
        parts = [
            F.cross_entropy(model(part[:, :-1]).transpose(1, 2), part[:, 1:], reduction="none").mean(1)
            for part in rows.split(32)
        ]
    return torch.cat(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--out", type=Path, default=ROOT / "checkpoints" / "decoder.pt")
    options = parser.parse_args()
    if options.steps <= WARM_UP:
        sys.exit(f"--steps must be more than {WARM_UP}, the steps of the warm-up; got {options.steps}")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    text, model = load_text(), Decoder()
    matrices = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.99))

    def rate(step: int) -> float:
        """A linear warm-up, then half a cosine down to 2 %."""
        done = min(1, max(0, step - WARM_UP) / (options.steps - WARM_UP))
        return min((step + 1) / WARM_UP, 0.02 + 0.49 * (1 + math.cos(math.pi * done)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    saved, first = ROOT / "build" / "decoder_state.pt", 0
    saved.parent.mkdir(exist_ok=True)
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        if state["steps"] == options.steps:
            first = state["step"]
            for name, part in parts.items():
                part.load_state_dict(state[name])
            print(f"goes on after step {first}", flush=True)
    start = time.perf_counter()
    for step in range(first, options.steps):
        batch = windows(text.train, BATCH, step)
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 200 == 0:
            state = {name: part.state_dict() for name, part in parts.items()}
            torch.save({**state, "step": step + 1, "steps": options.steps}, saved)
            seconds = time.perf_counter() - start
            print(f"step {step + 1}: training loss {loss.item():.3f}, {seconds:.0f} s", flush=True)
    before = block_losses(model, text.validation).mean()
    torch.save({name: p.half() for name, p in model.state_dict().items()}, options.out)
    after = block_losses(load_decoder(options.out), text.validation).mean()
    saved.unlink(missing_ok=True)
    print(f"validation loss {before:.4f}, with weights in half precision {after:.4f}")


if __name__ == "__main__":
    main()
