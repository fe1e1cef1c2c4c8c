"""Networks that a long run shares with a lesson or with another run; nothing is loaded on import.

In this order: perceptrons on MNIST (lessons 7 and 11), convolutions on Fashion-MNIST (lesson 8),
the decoder (9), the sentence encoder (10), rounding and ONNX (11), large matrices (12).
"""

import copy
import dataclasses
import functools
import gzip
import itertools
import logging
import tempfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.nn.utils.fusion import fuse_conv_bn_eval

import lrf_utils as lrf
import notebook_utils as nb
from experiments.training import fit, shuffled

if TYPE_CHECKING:
    import onnx
    import onnxruntime

# --- Perceptrons on MNIST: lessons 7 and 11 ------------------------------------------------------

MLP, LENET = (784, 256, 128, 10), (784, 300, 100, 10)  # widths
MLP_8X, MLP_12X = {"fc1": 22, "fc2": 11}, {"fc1": 14, "fc2": 8}  # ranks for the MLP
NARROW_8X, NARROW_12X = (784, 30, 127, 10), (784, 20, 116, 10)  # dense, of the same sizes
RATE, DENSE_RATE = 5e-3, 2e-3  # peak learning rates, of small networks and of dense ones


class MnistNetworks:
    """The networks of one seed. They are trained on all training images of ``data``.

    ``by_loss``, ``by_svd``, ``narrow`` and ``random_factors`` make a network that is not trained
    yet; ``trained`` makes one and trains it.
    """

    def __init__(self, data: nb.Dataset, seed: int, widths: Sequence[int] = MLP) -> None:
        self.data, self.seed, self.widths = data, seed, tuple(widths)

    @property
    def calibration(self) -> Tensor:
        return self.data.x_train[:10_000]

    @functools.cached_property
    def dense(self) -> nn.Sequential:
        """Three epochs from random weights: the committed network, if it was made like that."""
        if self.widths == MLP and len(self.data.x_train) == 60_000:
            return nb.load_baseline(self.seed)
        return self.fit(self.narrow(self.widths), 3, rate=1e-3)

    @functools.cached_property
    def strong_teacher(self) -> nn.Sequential:
        return self.longer(5)

    def longer(self, epochs: int, rate: float = DENSE_RATE) -> nn.Sequential:
        """The dense network after ``epochs`` more."""
        return self.fit(copy.deepcopy(self.dense), epochs, rate)

    def by_loss(self, ranks: Mapping[str, int]) -> nn.Module:
        statistics = lrf.collect_statistics(self.dense, self.calibration, ranks, loss="classes")
        return lrf.factorize(self.dense, ranks, statistics)

    def by_svd(self, ranks: Mapping[str, int]) -> nn.Module:
        return lrf.factorize(self.dense, ranks)

    def narrow(self, widths: Sequence[int]) -> nn.Sequential:
        """Dense layers with random weights."""
        torch.manual_seed(self.seed)
        return nb.make_mlp(widths)

    def random_factors(self, ranks: Mapping[str, int]) -> nn.Sequential:
        """Pairs of layers with random weights in place of the layers in ``ranks``."""
        model = self.narrow(self.widths)
        for name, rank in ranks.items():
            layer = model.get_submodule(name)
            down = nn.Linear(layer.in_features, rank, bias=False)
            up = nn.Linear(rank, layer.out_features)
            setattr(model, name, nn.Sequential(down, up))
        return model

    def spectral(self, ranks: Mapping[str, int]) -> nn.Module:
        """Pairs from the truncated SVD of random weights: Khodak et al. (2021)."""
        return lrf.factorize(self.narrow(self.widths), ranks)

    def pruned(self, size: int, epochs: int, rate: float = RATE) -> nn.Sequential:
        """The dense network with all but ``size`` parameters at 0: its smallest weights."""
        model = copy.deepcopy(self.dense)
        weights = [(layer, "weight") for layer in model if isinstance(layer, nn.Linear)]
        amount = lrf.count_parameters(model) - size
        prune.global_unstructured(weights, prune.L1Unstructured, amount=amount)
        self.fit(model, epochs, rate)
        for layer, name in weights:
            prune.remove(layer, name)
        return model

    def trained(
        self, make: Callable[[Any], nn.Module], what: Any, epochs: int, rate: float = RATE
    ) -> nn.Module:
        return self.fit(make(what), epochs, rate)

    def fit(
        self,
        model: nn.Module,
        epochs: int,
        rate: float = RATE,
        teacher: nn.Module | None = None,
        temperature: float = 2.0,
    ) -> nn.Module:
        """Train in place, without epochs not at all; a teacher takes the place of the labels."""
        if epochs:
            nb.train(
                model,
                self.data.x_train,
                self.data.y_train,
                epochs=epochs,
                seed=self.seed,
                lr=rate,
                teacher=teacher,
                temperature=temperature,
            )
        return model

    def fit_decayed(
        self, model: nn.Sequential, epochs: int, rate: float, decay: float
    ) -> nn.Sequential:
        """The same with half of ``decay`` times the squared norm of the weights in the loss."""
        x, y = self.data.x_train, self.data.y_train
        batches = shuffled(len(x), epochs, self.seed)
        optimizer = torch.optim.Adam(model.parameters(), lr=rate)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=len(batches))

        def loss_of(batch: Tensor) -> Tensor:
            return F.cross_entropy(model(x[batch]), y[batch]) + decay / 2 * squared_norm(model)

        fit(batches, loss_of, optimizer, schedule)
        return model.eval()


def squared_norm(model: nn.Sequential) -> Tensor:
    """Of all weights together; that of a pair is its product's (Frobenius decay)."""
    total = torch.zeros(())
    for layer in model:
        if isinstance(layer, nn.Sequential):
            B, A = (part.weight for part in layer)
            total = total + ((A.T @ A) * (B @ B.T)).sum()  # of A @ B, from r × r matrices
        elif isinstance(layer, nn.Linear):
            total = total + layer.weight.square().sum()
    return total


def sparse_bytes(weights: Iterable[Tensor]) -> dict[str, int]:
    """What the entries that are not 0 take in three formats, with 4 bytes for each value."""
    weights = [W.detach() for W in weights]
    entries = torch.cat([W.flatten() for W in weights])
    places = entries.nonzero()[:, 0]
    count = len(places)
    # Offsets of 5 bits reach over 31 zeros; after as many, an entry of value 0 is put in.
    zeros = places.diff(prepend=torch.tensor([-1])) - 1
    with_fillers = count + int((zeros // 32).sum())
    return {
        "compressed rows": 6 * count + 4 * sum(len(W) + 1 for W in weights),
        "bit mask": 4 * count + -(-len(entries) // 8),
        "offsets of 5 bits": 4 * with_fillers + -(-5 * with_fillers // 8),
    }


# --- Convolutions on Fashion-MNIST: lesson 8 -----------------------------------------------------


def make_cnn(widths: Sequence[int] = (32, 64, 128, 128)) -> nn.Sequential:
    """Four convolutions with BatchNorm and ReLU; the second and the third halve the image."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    n = 1
    for k, (m, stride) in enumerate(zip(widths, (1, 2, 2, 1)), start=1):
        layers[f"conv{k}"] = nn.Conv2d(n, m, 3, stride, padding=1, bias=False)
        layers[f"norm{k}"] = nn.BatchNorm2d(m)
        layers[f"relu{k}"] = nn.ReLU()
        n = m
    layers |= {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "fc": nn.Linear(n, 10)}
    return nn.Sequential(layers)


def load_cnn(seed: int, folder: Path = nb.ROOT / "checkpoints") -> nn.Sequential:
    """The network of ``make_cnn`` that ``experiments.convolutions`` trained with ``seed``."""
    model = make_cnn()
    model.load_state_dict(torch.load(folder / f"cnn_seed{seed}.pt", weights_only=True))
    return model.eval()


def make_separable(widths: Sequence[int] = (30, 61, 123, 123)) -> nn.Sequential:
    """The same layout with depthwise-separable convolutions, BatchNorm and ReLU behind each."""

    def block(n: int, m: int, size: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
        conv = nn.Conv2d(n, m, size, stride, padding=size // 2, groups=groups, bias=False)
        return [conv, nn.BatchNorm2d(m), nn.ReLU()]

    layers = block(1, widths[0], size=3)
    for n, m, stride in zip(widths, widths[1:], (2, 2, 1)):
        layers += block(n, n, size=3, stride=stride, groups=n)  # a filter for each channel
        layers += block(n, m, size=1)  # mixes the channels
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))


def fold(model: nn.Module) -> nn.Module:
    """A copy without BatchNorm: each convolution takes over the one that follows it."""
    model = copy.deepcopy(model).eval()
    for parent in list(model.modules()):
        children = list(parent.named_children())
        for (name, layer), (next_name, norm) in zip(children, children[1:]):
            if isinstance(layer, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(parent, name, fuse_conv_bn_eval(layer, norm))
                delattr(parent, next_name)
    return model


@torch.no_grad()
def with_norms(model: nn.Module, images: Tensor) -> nn.Module:
    """A copy with a BatchNorm behind each convolution that, until it is trained, changes nothing.

    Its mean and variance are those of what the convolution gives for ``images``.
    """
    model = copy.deepcopy(model).eval()
    convs = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d)}
    outputs: dict[nn.Module, Tensor] = {}

    def keep(layer: nn.Module, _: tuple, output: Tensor) -> None:
        outputs[layer] = output

    hooks = [conv.register_forward_hook(keep) for conv in convs.values()]
    model(images)
    for hook in hooks:
        hook.remove()
    for name, conv in convs.items():
        norm = nn.BatchNorm2d(conv.out_channels).eval()
        norm.running_var.copy_(outputs[conv].var((0, 2, 3)))
        norm.weight.copy_((norm.running_var + norm.eps).sqrt())
        # the bias moves into the BatchNorm: (x + bias - mean) + mean is x + bias
        norm.bias.copy_(outputs[conv].mean((0, 2, 3)))
        norm.running_mean.copy_(norm.bias - (0 if conv.bias is None else conv.bias))
        conv.bias = None
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, nn.Sequential(conv, norm))
    return model


@torch.no_grad()
def option_error(layer: nn.Conv2d, parts: nn.Sequential, statistics: lrf.Statistics) -> float:
    """What a split of ``layer`` loses in the metric of the loss, once its last part is refitted.

    All but the last part turn a patch into features, which the last part mixes. So the weight that
    remains after least squares is the best one among those that see the patch by its features.
    """
    W, C = layer.weight.double().flatten(1), statistics.covariance()
    features = torch.eye(W.shape[1]).view(-1, *layer.weight.shape[1:])  # of each unit patch
    for part in parts[:-1]:
        features = F.conv2d(features, part.weight, groups=part.groups)
    P = features.flatten(1).double()
    PCP = P.T @ C @ P
    PCP.diagonal().add_(1e-5 * PCP.diagonal().mean())
    lost = W - torch.linalg.solve(PCP, P.T @ C @ W.T).T @ P.T
    return (statistics.metric * (lost @ C @ lost.T)).sum().item()


# --- The decoder, and its text: lesson 9 ---------------------------------------------------------

CONTEXT = 256


class Text(NamedTuple):
    """A text as whole numbers below the size of its alphabet, in three parts by position."""

    alphabet: str
    train: Tensor  # the first 90 %
    validation: Tensor  # the next 5 %
    test: Tensor  # the last 5 %


def load_text(path: Path = nb.ROOT / "data" / "kjv" / "kjv.txt.gz") -> Text:
    """The King James Bible, a verse a line. An OSError if the file is missing or damaged."""
    try:
        text = gzip.decompress(path.read_bytes()).decode("ascii")
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise OSError(
            f"{path} is missing or damaged ({error}). "
            f"Restore it: git checkout -- {path.name} in its folder."
        ) from error
    alphabet = "".join(sorted(set(text)))
    codes = encode(text, alphabet)
    first, second = len(codes) * 90 // 100, len(codes) * 95 // 100
    return Text(alphabet, codes[:first], codes[first:second], codes[second:])


def encode(text: str, alphabet: str) -> Tensor:
    """The place of each character in the alphabet."""
    if unknown := sorted(set(text) - set(alphabet)):
        raise ValueError(f"the decoder does not know {unknown}; its alphabet is {alphabet!r}")
    number = {character: i for i, character in enumerate(alphabet)}
    return torch.tensor([number[character] for character in text])


def windows(codes: Tensor, count: int, seed: int) -> Tensor:
    """``count`` sequences of CONTEXT + 1 characters from random positions."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(codes) - CONTEXT, (count,), generator=generator)
    return codes[starts[:, None] + torch.arange(CONTEXT + 1)]


def stretches(codes: Tensor, count: int) -> Tensor:
    """``count`` sequences of CONTEXT + 1 characters, evenly spread over the text."""
    return codes.unfold(0, CONTEXT + 1, (len(codes) - CONTEXT - 1) // (count - 1))[:count]


@torch.no_grad()
def losses(network: nn.Module, rows: Tensor) -> Tensor:
    """The mean cross-entropy of each sequence, in nats per character."""
    parts = [(network(x[:, :-1]).transpose(1, 2), x[:, 1:]) for x in rows.split(16)]
    return torch.cat([F.cross_entropy(*part, reduction="none").mean(1) for part in parts])


class Attention(nn.Module):
    """Causal self-attention with several heads."""

    def __init__(self, width: int = 128, heads: int = 4):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))

    def stored(self, x: Tensor) -> Tensor:
        # what the cache keeps of each token
        return torch.cat([self.k(x), self.v(x)], dim=-1)

    def keys_values(self, stored: Tensor) -> tuple[Tensor, Tensor]:
        return stored.chunk(2, dim=-1)

    def forward(self, x: Tensor, cache: list[Tensor] | None = None) -> Tensor:
        stored = self.stored(x)
        if cache is not None:  # earlier tokens come first
            cache.append(stored)
            stored = torch.cat(cache, dim=1)
            cache[:] = [stored]
        parts = (self.q(x), *self.keys_values(stored))
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        # a token sees itself and all tokens before it, those in the cache included
        old, seen = k.shape[2] - q.shape[2], None
        if old:
            seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=x.device).tril(old)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=not old)
        return self.o(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention, then a two-layer MLP; each adds to what comes in."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor, cache: list[Tensor] | None = None) -> Tensor:
        x = x + self.attention(self.norm1(x), cache)
        return x + self.mlp(self.norm2(x))


class Decoder(nn.Module):
    """Characters (batch, tokens) to logits of the next ones, with learned positions."""

    def __init__(self, alphabet: int = 63, width: int = 128, heads: int = 4, layers: int = 4):
        super().__init__()
        self.embedding = nn.Embedding(alphabet, width)
        self.position = nn.Embedding(CONTEXT, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, alphabet, bias=False)

    def forward(self, tokens: Tensor, caches: list[list[Tensor]] | None = None) -> Tensor:
        """With ``caches``, one list for each block, ``tokens`` continue those given before."""
        caches = caches or [None] * len(self.blocks)
        old = caches[0][0].shape[1] if caches[0] else 0
        context = len(self.position.weight)
        if old + tokens.shape[1] > context:
            raise ValueError(f"{old} + {tokens.shape[1]} tokens, but the context is {context}")
        x = self.embedding(tokens) + self.position.weight[old : old + tokens.shape[1]]
        for block, cache in zip(self.blocks, caches):
            x = block(x, cache)
        return self.head(self.norm(x))


def load_decoder(path: Path = nb.ROOT / "checkpoints" / "decoder.pt") -> Decoder:
    """The trained decoder; its weights are stored in half precision."""
    model = Decoder()
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.eval()


class JointAttention(Attention):
    """Keys and values from one matrix; the cache holds its input or, factorized, the middle."""

    def __init__(self, old: Attention):
        super().__init__()
        self.q, self.o = old.q, old.o
        del self.k, self.v
        weight = torch.cat([old.k.weight, old.v.weight]).detach()
        self.kv = nn.Linear(weight.shape[1], weight.shape[0])
        self.kv.weight = nn.Parameter(weight)
        nn.init.zeros_(self.kv.bias)  # costs no cache, and can hold a mean

    def stored(self, x: Tensor) -> Tensor:
        return self.kv[0](x) if isinstance(self.kv, lrf.LowRank) else x

    def keys_values(self, stored: Tensor) -> tuple[Tensor, Tensor]:
        expand = self.kv[1] if isinstance(self.kv, lrf.LowRank) else self.kv
        return expand(stored).chunk(2, dim=-1)


def with_joint(network: Decoder) -> Decoder:
    """A copy in which each layer has one matrix for keys and values."""
    network = copy.deepcopy(network)
    for block in network.blocks:
        block.attention = JointAttention(block.attention)
    return network


def cut(first: Tensor, second: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Maps to ``rank`` numbers for two vectors with these second moments, and the energies."""
    L, R = torch.linalg.cholesky(first), torch.linalg.cholesky(second)
    U, S, Vh = torch.linalg.svd(L.T @ R)
    root = S[:rank].sqrt()[:, None]
    map_first = root * torch.linalg.solve(L.T, U).T[:rank]
    map_second = root * torch.linalg.solve(R.T, Vh.T).T[:rank]
    return map_first, map_second, S.square()


def shared_out(
    network: nn.Module, known: Mapping[str, lrf.Statistics | None], total: int
) -> dict[str, int]:
    """Ranks with this sum that leave the least sum of errors."""
    options = {}
    for name, statistics in known.items():
        errors = lrf.truncation_errors(network.get_submodule(name), statistics).tolist()
        options[name] = {rank: (rank, errors[rank]) for rank in range(1, len(errors))}
    return lrf.allocate_ranks(options, total)


class PositionAttention(JointAttention):
    """The cache holds what is special about a token; a table adds what its position tells."""

    def keys_values(self, stored: Tensor) -> tuple[Tensor, Tensor]:
        return (self.kv[1](stored) + self.table[: stored.shape[1]]).chunk(2, dim=-1)


def by_position(
    network: nn.Module, batches: Iterable[Tensor], known: Mapping[str, lrf.Statistics]
) -> tuple[dict[str, Tensor], dict[str, lrf.Statistics]]:
    """For each layer the mean input at each position, and the statistics about these means."""
    inputs = {name: [] for name in known}
    hooks = []
    for name, seen in inputs.items():
        keep = lambda _, args, seen=seen: seen.append(args[0])  # noqa: E731
        hooks.append(network.get_submodule(name).register_forward_pre_hook(keep))
    with torch.no_grad():
        for batch in batches:
            network(batch)
    for hook in hooks:
        hook.remove()
    means, about = {}, {}
    for name, seen in inputs.items():
        x = torch.cat(seen).double()
        means[name] = x.mean(0)
        x = (x - means[name]).flatten(0, 1)
        about[name] = dataclasses.replace(known[name], row_sum=x.sum(0), outer_sum=x.T @ x)
    return means, about


def positions_known(
    network: Decoder,
    ranks: Mapping[str, int],
    means: Mapping[str, Tensor],
    about: Mapping[str, lrf.Statistics],
) -> Decoder:
    """A factorized copy of a joint decoder, with a table of what is usual at each position."""
    network = copy.deepcopy(network)
    for name, block in zip(ranks, network.blocks):
        old = block.attention.kv
        new = lrf.factorize_layer(old, ranks[name], about[name])
        lost = (old.weight - new[1].weight @ new[0].weight).detach().double()
        block.attention.kv, block.attention.table = new, (means[name] @ lost.T).float()
        block.attention.__class__ = PositionAttention
    return network


# --- The sentence encoder: lesson 10 -------------------------------------------------------------


class SentenceEncoder(nn.Module):
    """A BERT as it is used: the mean over the tokens of its last layer, scaled to length 1."""

    def __init__(self, bert: nn.Module):
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.bert(input_ids, attention_mask).last_hidden_state
        mask = attention_mask[..., None].to(hidden)  # 0 for padding
        return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


def batches(
    tokenizer: Callable, sentences: Sequence[str], size: int = 64
) -> Iterator[tuple[dict[str, Tensor], list[int]]]:
    """Sentences of similar length together; each batch with the positions of its sentences."""
    ids = tokenizer(sentences, truncation=True, max_length=64)["input_ids"]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    for start in range(0, len(order), size):
        at = order[start : start + size]
        batch = tokenizer.pad({"input_ids": [ids[i] for i in at]}, return_tensors="pt")
        yield dict(batch), at


@torch.no_grad()
def embed(network: nn.Module, tokenizer: Callable, sentences: Sequence[str]) -> Tensor:
    """The embedding of each sentence."""
    embeddings = torch.empty(len(sentences), 384)
    for batch, at in batches(tokenizer, sentences):
        embeddings[at] = network(**batch)
    return embeddings


def sketch(embeddings: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
    """A random scalar whose gradient has, on average, the outer product of all 384 numbers'."""
    yield (embeddings * torch.randn(embeddings.shape, generator=generator)).sum()


def distil(
    student: nn.Module, taught: Sequence[tuple[dict[str, Tensor], Tensor]], rate: float
) -> nn.Module:
    """One step for each pair of a batch and the original's embeddings; no labels."""
    parameters = [p for name, p in student.named_parameters() if "embeddings" not in name]
    optimizer = torch.optim.Adam(parameters, lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=len(taught))
    for batch, target in taught:
        loss = (student(**batch) - target).square().sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return student


def rounded_table(table: Tensor, bits: int) -> Tensor:
    """What comes back from whole numbers of so many bits and a scale for each row."""
    scale = table.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    return (table / scale).round() * scale


# --- Rounding: lesson 11, whose cells show these four word for word ------------------------------


def rounded(W, step, bits):
    """Each number at the nearest of 2^bits levels: ..., -1.5, -0.5, 0.5, 1.5, ... steps."""
    half = 2 ** (bits - 1)
    return ((W / step).floor().clamp(-half, half - 1) + 0.5) * step


def best_step(W, bits, importance=None, tries=80):
    """For each row the step of least squared error, columns weighted by importance."""
    importance = torch.ones(W.shape[1]).to(W) if importance is None else importance
    shares = torch.linspace(1, 0.2, tries).to(W)[:, None, None]  # a smaller step clips more
    steps = shares * W.abs().amax(1, keepdim=True) / 2 ** (bits - 1)
    steps = steps.clamp(min=1e-7).half().to(W)  # they are stored in 16 bits
    errors = torch.stack([(rounded(W, step, bits) - W).square() @ importance for step in steps])
    return steps[errors.argmin(0), torch.arange(len(W))]


def gptq(W, C, bits, step, to=rounded):
    """Round column by column; the columns to the right make up for the error."""
    W, Q = W.clone(), torch.empty_like(W)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(C))
    R = torch.linalg.cholesky(inverse, upper=True)
    for j in range(W.shape[1]):
        Q[:, j] = to(W[:, j : j + 1], step, bits)[:, 0]
        error = (W[:, j] - Q[:, j]) / R[j, j]
        W[:, j + 1 :] -= torch.outer(error, R[j, j + 1 :])
    return Q


def output_error(E, C):
    """The mean of ‖E x‖² for x about its mean (a bias makes up for the mean)."""
    return ((E @ C) * E).sum()


# --- ONNX models of one layer: lesson 11 (imported where used; no other lesson needs ONNX) -------

COLD = 64 * 2**20  # bytes of copies to take in turn: more than the caches of the CPUs we know


def product(*weights: np.ndarray) -> "onnx.ModelProto":
    """The model x @ W0 @ W1 ..., one ``MatMul`` each; for a linear layer, pass ``weight.T``."""
    from onnx import TensorProto, helper, numpy_helper

    names = ["x", *(f"h{i}" for i in range(1, len(weights))), "y"]
    nodes, held = [], []
    for i, W in enumerate(weights):
        nodes.append(helper.make_node("MatMul", [names[i], f"W{i}"], [names[i + 1]]))
        held.append(numpy_helper.from_array(np.ascontiguousarray(W), f"W{i}"))
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", size])
        for name, size in (("x", len(weights[0])), ("y", weights[-1].shape[1]))
    ]
    graph = helper.make_graph(nodes, "product", ends[:1], ends[1:], held)
    opset = [helper.make_opsetid("", 21)]
    return helper.make_model(graph, opset_imports=opset, ir_version=10)


def eight_bits(model: "onnx.ModelProto") -> "onnx.ModelProto":
    """Weights in 8 bits, a scale for each output; inputs are rounded while the model runs."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/8.onnx"
        quantize_dynamic(model, file, weight_type=QuantType.QInt8, per_channel=True)
        return onnx.load(file)


def four_bits(model: "onnx.ModelProto", inputs: str = "8 bits") -> "onnx.ModelProto":
    """Weights in 4 bits, a scale for each 32 of them; they meet inputs of 8 bits or of 32."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    logging.getLogger(MatMulNBitsQuantizer.__module__).setLevel(logging.WARNING)  # not each step
    level = {"8 bits": 4, "32 bits": 1}[inputs]  # the runtime's names for the arithmetic
    same = type(model).FromString(model.SerializeToString())  # the quantizer changes what it gets
    quantizer = MatMulNBitsQuantizer(same, block_size=32, is_symmetric=True, accuracy_level=level)
    quantizer.process()
    return quantizer.model.model


def session(model: "onnx.ModelProto | str", optimized: str = "") -> "onnxruntime.InferenceSession":
    """The model, or that of a file, ready to run on one thread.

    ``optimized`` is a file: there the runtime writes the graph that it really runs.
    """
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads, settings.log_severity_level = 1, 3
    settings.optimized_model_filepath = optimized
    source = model if isinstance(model, str) else model.SerializeToString()
    return onnxruntime.InferenceSession(source, settings, providers=["CPUExecutionProvider"])


def weight_bytes(model: "onnx.ModelProto") -> int:
    """What the weights take in the file, scales included."""
    from onnx import numpy_helper

    return sum(numpy_helper.to_array(tensor).nbytes for tensor in model.graph.initializer)


def hot(model: "onnx.ModelProto", x: np.ndarray) -> Callable[[], list]:
    """A function that runs the model, the same one each time."""
    return functools.partial(session(model).run, None, {"x": x})


def cold(model: "onnx.ModelProto", x: np.ndarray) -> Callable[[], list]:
    """A function that runs another copy each time, so that its weights are in no cache."""
    copies = itertools.cycle([session(model) for _ in range(COLD // weight_bytes(model) + 1)])
    return lambda: next(copies).run(None, {"x": x})


# --- Truncated SVDs of a large matrix, and a record of memory: lesson 12 -------------------------


def slow_matrix(m: int, n: int) -> Tensor:
    """Random, with singular values that fall slowly, about as 1 / sqrt(index)."""
    torch.manual_seed(0)
    return torch.randn(m, m) * torch.arange(1.0, m + 1).rsqrt() @ torch.randn(m, n)


def full_svd(W: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return U[:, :rank] * S[:rank], Vh[:rank]


def gram(W: Tensor, rank: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """By the eigenvectors of C, which is W Wᵀ or Wᵀ W, whichever is smaller, in ``dtype``."""
    if W.shape[0] > W.shape[1]:
        A, B = gram(W.T, rank, dtype)
        return B.T, A.T
    C = torch.zeros(len(W), len(W), dtype=dtype)
    for some in W.split(1024, dim=1):  # in parts, so no copy of W in another precision
        C.addmm_(some.to(dtype), some.to(dtype).T)
    U = torch.linalg.eigh(C)[1][:, -rank:].to(W.dtype)
    return U, U.T @ W


def randomized(W: Tensor, rank: int, more: int, niter: int) -> tuple[Tensor, Tensor]:
    """By products of W with rank + ``more`` random vectors, and ``niter`` times with Wᵀ and W."""
    torch.manual_seed(0)
    U, S, V = torch.svd_lowrank(W, q=rank + more, niter=niter)
    return U[:, :rank] * S[:rank], V[:, :rank].T


def range_finder(W: Tensor, rank: int, more: int, niter: int) -> tuple[Tensor, Tensor]:
    """The same, but the wide matrix of rank + ``more`` rows at the end is solved by ``gram``."""
    if W.shape[0] > W.shape[1]:
        A, B = range_finder(W.T, rank, more, niter)
        return B.T, A.T
    torch.manual_seed(0)
    Q = torch.linalg.qr(W @ torch.randn(W.shape[1], rank + more))[0]
    for _ in range(niter):
        Q = torch.linalg.qr(W @ torch.linalg.qr(W.T @ Q)[0])[0]
    U, B = gram(Q.T @ W, rank)
    return Q @ U, B


DECOMPOSITIONS: dict[str, Callable[[Tensor, int], tuple[Tensor, Tensor]]] = {
    "full SVD": full_svd,
    "Gram, float32": gram,
    "Gram, float64": functools.partial(gram, dtype=torch.float64),
    "randomized, 10 more, 0 iterations": functools.partial(randomized, more=10, niter=0),
    "randomized, 10 more, 1 iteration": functools.partial(randomized, more=10, niter=1),
    "randomized, 10 more, 2 iterations": functools.partial(randomized, more=10, niter=2),
    "randomized, a quarter more, 3 iterations": lambda W, r: randomized(W, r, r // 4, niter=3),
    "randomized, half more, 2 iterations": lambda W, r: randomized(W, r, r // 2, niter=2),
    "randomized, half more, 2 iterations, Gram": lambda W, r: range_finder(W, r, r // 2, niter=2),
}


def product_error(W: Tensor, A: Tensor, B: Tensor) -> float:
    """The Frobenius norm of W - A @ B, by parts of its rows."""
    parts = zip(W.split(512), A.split(512))
    return sum((rows - a @ B).double().square().sum().item() for rows, a in parts) ** 0.5


def memory_curve(log: Path) -> pd.DataFrame:
    """A log of ``stream.py --memory``: the largest private memory in each of 60 stretches."""
    rows = pd.read_csv(log)
    stretch = pd.cut(rows["seconds"], 60, labels=False)
    return rows.groupby(stretch).max().reindex(range(60)).ffill().clip(lower=0.001)
