"""Train the decoder of lesson 9 on the King James Bible, character by character.

    python -m experiments.decoder [--steps 2500] [--out FILE]

About six minutes on one thread. Writes checkpoints/decoder.pt, with weights in half precision.
Training sees the first 90 % of the text. Every 200 steps, all that is needed to continue goes to
build/decoder_state.pt, so an interrupted run resumes. Losses are in nats per character.
"""

import argparse
import math
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.common import ROOT
from experiments.models import Decoder, load_decoder, load_text, losses, stretches, windows
from experiments.training import fit

BATCH, RATE, WARM_UP = 4, 3e-3, 100


def next_character_loss(model: nn.Module, batch: Tensor) -> Tensor:
    return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--out", type=Path, default=ROOT / "checkpoints" / "decoder.pt")
    options = parser.parse_args()
    if options.steps <= WARM_UP:
        sys.exit(f"--steps must be over {WARM_UP}, the steps of the warm-up; got {options.steps}")
    torch.manual_seed(0)
    text, model = load_text(), Decoder()
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]  # LayerNorms and biases
    groups = [
        {"params": matrices, "weight_decay": 0.1},
        {"params": vectors, "weight_decay": 0.0},
    ]
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
    while first < options.steps:
        last = min(first + 200, options.steps)
        batches = (windows(text.train, BATCH, step) for step in range(first, last))
        fit(batches, lambda batch: next_character_loss(model, batch), optimizer, schedule, clip=1)
        first = last
        state = {name: part.state_dict() for name, part in parts.items()}
        torch.save({**state, "step": first, "steps": options.steps}, saved)
        print(f"after step {first} of {options.steps}", flush=True)
    torch.save({name: p.half() for name, p in model.state_dict().items()}, options.out)
    saved.unlink()
    loss = losses(load_decoder(options.out), stretches(text.validation, 800)).mean()
    print(f"validation loss {loss:.4f}")


if __name__ == "__main__":
    main()
