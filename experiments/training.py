"""The training loop of experiments that need more than ``nb.train``, the loop of the lessons."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


def fit(
    batches: Iterable[Any],
    loss_of: Callable[[Any], Tensor],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler | None = None,
    clip: float | None = None,
) -> None:
    """For each batch, one step of ``optimizer`` down the gradient of ``loss_of(batch)``.

    Args:
        schedule: changes the learning rate after each step.
        clip: gradients longer than that are shortened.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for batch in batches:
        loss = loss_of(batch)
        optimizer.zero_grad()
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        if schedule is not None:
            schedule.step()


def shuffled(count: int, epochs: int, seed: int, batch_size: int = 128) -> list[Tensor]:
    """The indices in each batch; every epoch goes through all ``count`` in a new order."""
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(count, generator=generator) for _ in range(epochs)]
    return [batch for order in orders for batch in order.split(batch_size)]
