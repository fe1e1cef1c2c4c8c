"""The factors of a compressed SmolLM2, trained: results/distill.csv and distill_curve.csv.

    python -m experiments.distill [--parts headline controls] [--out FOLDER]
    python -m experiments.distill --validate

The dense model teaches: the loss is the divergence of the student's prediction from its own, on
text that it wrote itself. Only the factors are trained. distill.csv has the losses of each test
window, as language_model.csv has them; distill_curve.csv mean losses of validation text on the
way, and the CPU seconds spent: all under bfloat16 autocast. ``--validate`` adds the short curves
by which the rate of ours was chosen; other students took the same one, and LoRA ten times as much,
untried. A step takes 3 CPU seconds; an interrupted run goes on from build/language_model.

Tried without gain: to train the first factors in coordinates where their inputs are white. After
20 steps at the best of three rates, validation losses had fallen by 0.056 instead of 0.082.
"""

import copy
import dataclasses
import functools
import math
import os
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import lrf_utils as lrf
from experiments import language_model as lm
from experiments import smollm
from experiments.common import Table, parse
from experiments.smollm import KINDS
from experiments.training import fit, shuffled

WRITTEN, GIVEN = 128, 40  # windows of 256 tokens; of given text, for each kind
EVERY, TRIAL = 20, 20  # steps from one point of a curve to the next; of a run that tries a rate

bfloat16 = partial(torch.autocast, "cpu", torch.bfloat16)


@dataclasses.dataclass(frozen=True)
class Run:
    student: str
    loss: str = "divergence"  # from the teacher; or "cross-entropy" with the tokens of the text
    text: str = "written"  # by the model; or "given": calibration text
    update: str = "all"  # of the factors; or "LoRA"
    rate: float = 1e-4
    batch: int = 2  # windows
    steps: int = 40
    seed: int = 0  # of the order of the windows


RUN = [field.name for field in dataclasses.fields(Run)]
OTHER = "SVD-LLM, our ranks"
PARTS = {
    "headline": [Run("ours", steps=320), Run("ours", text="given", steps=160)],
    "controls": [Run("ours", steps=0), Run("ours"), Run("ours", text="given"), Run(OTHER)],
}
PARTS["controls"] += [
    Run("ours", update="LoRA", rate=1e-3),
    Run("ours", seed=1),
    Run("dense", loss="cross-entropy", text="given"),
    Run("ours", loss="cross-entropy", text="given"),
]
TRIALS = [Run("ours", rate=rate, steps=TRIAL) for rate in (3e-5, 1e-4, 3e-4, 1e-3)]

# --- Students ------------------------------------------------------------------------------------

STUDENTS: dict[str, Callable[[], nn.Module]] = {
    "ours": partial(lm.small, "weighted metric", "own", 0.8),
    OTHER: partial(lm.small, "SVD-LLM", "own", 0.8),
}


def pairs(student: str) -> dict[str, lrf.LowRank]:
    """Made once and kept in a file, norms shared out as ``lrf.factorize`` does for each method."""
    path = lm.FOLDER / f"student {student}.pt"
    if not path.exists():
        parts = STUDENTS[student]().named_modules()
        found = {name: part for name, part in parts if isinstance(part, lrf.LowRank)}
        for down, up in found.values():
            A, B = lrf.truncated_svd(up.weight @ down.weight, len(down.weight))
            up.weight.data, down.weight.data = A, B
        save(found, path)
    return torch.load(path, weights_only=False)


def untrained(student: str) -> nn.Module:
    if student == "dense":
        return copy.deepcopy(lm.dense())
    return lrf.factorize(lm.dense(), pairs(student))


def save(what: object, path: os.PathLike) -> None:
    torch.save(what, f"{path}.part")
    os.replace(f"{path}.part", path)


def trainable(model: nn.Module, parts: list[str]) -> nn.Module:
    """A copy in which only ``parts`` are trained; the other layers' weights have 16 bits."""
    model = copy.deepcopy(model).requires_grad_(False)
    for name in parts:
        model.get_submodule(name).requires_grad_(True)
    for layer in model.model.modules():
        if isinstance(layer, nn.Linear) and not layer.weight.requires_grad:
            layer.weight.data = layer.weight.data.bfloat16()
    return model


class Update(nn.Module):
    """A factor plus a trained product of rank 8, as LoRA adds it to a weight."""

    def __init__(self, m: int, n: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.zeros(m, 8))
        self.down = nn.Parameter(torch.randn(8, n) / math.sqrt(n))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.up @ self.down


def set_updates(model: nn.Module, parts: list[str], which: int | None) -> None:
    """Merge all pairs' updates; then train only a new one of factor ``which`` of each pair.

    First one factor, then the other: the second step of SVD-LLM, Wang et al. (2024),
    arXiv:2403.07378.
    """
    for i, factor in [(i, model.get_submodule(name)[i]) for name in parts for i in (0, 1)]:
        if parametrize.is_parametrized(factor):
            parametrize.remove_parametrizations(factor, "weight")
        factor.requires_grad_(False)
        if i == which:
            parametrize.register_parametrization(factor, "weight", Update(*factor.weight.shape))


# --- Text, teacher, loss -------------------------------------------------------------------------


@functools.cache
def windows(text: str) -> Tensor:
    if text == "written":
        return smollm.written_text(lm.dense(), WRITTEN, lm.FOLDER)
    return torch.cat(list(smollm.windows_of(lm.original()[1], "calibration", GIVEN).values()))


teacher = functools.cache(lambda: trainable(lm.dense(), []))
head = functools.cache(lambda: lm.dense().lm_head.weight.detach().bfloat16())


@functools.cache
def teaching(text: str, index: int) -> Tensor:
    """The teacher's last states in a window: small, and its predictions are one product away."""
    with torch.no_grad(), bfloat16():
        states = teacher().model(windows(text)[index, None], use_cache=False).last_hidden_state
    return states[0].bfloat16()


def surrogate(states: Tensor, target: Tensor, head: Tensor) -> Tensor:
    """A scalar whose gradient is that of the mean loss per token, without a graph of the logits.

    ``target`` holds the teacher's last states, which predict p, or the next tokens. For both, the
    gradient at the logits is q - p, where q is the student's prediction. Logits take much memory,
    so they are made for some tokens at a time.
    """
    states, target, gradient = states.flatten(0, 1), target.flatten(0, 1), []
    with torch.no_grad():
        for some, known in zip(states.split(128), target.split(128)):
            difference = (some.to(head) @ head.T).float().softmax(-1)
            if known.is_floating_point():
                difference -= (known.to(head) @ head.T).float().softmax(-1)
            else:
                difference[torch.arange(len(known)), known] -= 1
            gradient.append(difference.to(head) @ head)
    return (states * torch.cat(gradient)).sum() / len(states)


def loss_of(student: nn.Module, run: Run, batch: Tensor) -> Tensor:
    ids = windows(run.text)[batch]
    with bfloat16():
        states = student.model(ids, use_cache=False).last_hidden_state[:, :-1]
    target = ids[:, 1:]
    if run.loss == "divergence":
        target = torch.stack([teaching(run.text, int(i))[:-1] for i in batch])
    return surrogate(states.float(), target, head())


# --- Training ------------------------------------------------------------------------------------


def schedule(step: int, steps: int) -> float:
    """A linear warm-up over a tenth, then half a cosine down to 2 %."""
    first = max(1, 0.1 * steps)
    done = min(1, max(0, step - first) / (steps - first))
    return min((step + 1) / first, 0.02 + 0.49 * (1 + math.cos(math.pi * done)))


def train(student: nn.Module, run: Run, batches: list[Tensor], curve: Table | None) -> None:
    """Train what wants a gradient; with ``curve``, measure its points and go on after a stop."""
    weights = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(weights, run.rate, betas=(0.9, 0.99), fused=True)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(schedule, steps=len(batches)))
    path = lm.FOLDER / f"distill {', '.join(map(str, vars(run).values()))}.pt"
    done, seconds = 0, 0.0
    if curve and path.exists():
        done, seconds, saved, *states = torch.load(path, weights_only=True)
        optimizer.load_state_dict(states[0])
        rates.load_state_dict(states[1])
        for weight, old in zip(weights, saved):
            weight.data.copy_(old)
    while True:
        if curve:
            row = {**vars(run), "step": done, "CPU seconds": f"{seconds:.0f}"}
            curve.add(row, partial(validation_losses, student))
        if done == len(batches):
            return
        begin, some = time.process_time(), batches[done : done + EVERY]
        fit(some, partial(loss_of, student, run), optimizer, rates, clip=1)
        done, seconds = done + len(some), seconds + time.process_time() - begin
        if curve:
            save((done, seconds, weights, optimizer.state_dict(), rates.state_dict()), path)


def trained(run: Run, curve: Table) -> nn.Module:
    """The student, trained, with all weights in 32 bits."""
    model = untrained(run.student)
    parts = list(pairs("ours" if run.student == "dense" else run.student))
    student, count = trainable(model, parts), len(windows(run.text))
    epochs = math.ceil(run.steps * run.batch / count)
    batches = shuffled(count, epochs, run.seed, run.batch)[: run.steps]
    if run.update == "LoRA":
        half = len(batches) // 2
        for which, some in ((1, batches[:half]), (0, batches[half:])):
            set_updates(student, parts, which)
            train(student, run, some, None)
        set_updates(student, parts, None)
        row = {**vars(run), "step": run.steps, "CPU seconds": ""}
        curve.add(row, partial(validation_losses, student))
    else:
        train(student, run, batches, curve)
    for name in parts:
        state = student.get_submodule(name).state_dict()
        model.get_submodule(name).load_state_dict(state)
    return model


# --- The tables ----------------------------------------------------------------------------------


@functools.cache
def validation() -> dict[str, Tensor]:
    return smollm.windows_of(lm.original()[1], "validation", 3)


def losses(model: nn.Module, texts: dict[str, Tensor]) -> dict[str, Tensor]:
    with bfloat16():
        return {kind: smollm.window_losses(model, ids) for kind, ids in texts.items()}


def validation_losses(model: nn.Module) -> dict[str, str]:
    return {kind: f"{each.mean():.4f}" for kind, each in losses(model, validation()).items()}


@functools.lru_cache(1)
def test_losses(run: Run, curve: Table) -> dict[str, Tensor]:
    model = trained(run, curve) if run.steps else untrained(run.student)
    return losses(model, lm.test_windows())


def main() -> None:
    options = parse(__doc__, PARTS)
    columns, key = [*RUN, "step", "CPU seconds", *KINDS], [*RUN, "step"]
    curve = Table(options.out / "distill_curve.csv", columns, key)
    if options.validate:
        for run in TRIALS:
            trained(run, curve)
        return
    table = Table(options.out / "distill.csv", [*RUN, "kind", "losses"], [*RUN, "kind"])

    def measure(run: Run, kind: str) -> dict[str, str]:
        found = test_losses(run, curve)[kind]
        return {"losses": " ".join(f"{loss:.4f}" for loss in found)}

    for run in [run for part in options.parts for run in PARTS[part]]:
        for kind in KINDS:
            table.add({**vars(run), "kind": kind}, partial(measure, run, kind))


if __name__ == "__main__":
    main()
