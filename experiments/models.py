"""Networks that a long run shares with a lesson or with another run; nothing is loaded on import.

In this order: perceptrons on MNIST (lessons 7 and 11), a ResNet on Fashion-MNIST (lesson 8),
the sentence encoder (10), rounding and ONNX (11), large matrices (12).
"""

import copy
import functools
import itertools
import logging
import operator
import tempfile
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.nn.utils.fusion import fuse_conv_bn_eval

import lrf_convs
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


# --- A ResNet on Fashion-MNIST: lesson 8 ---------------------------------------------------------


class ResidualBlock(nn.Module):
    """ReLU(shortcut(x) + branch(x)): two 3×3 layers, or with a neck 1×1, 3×3 and 1×1.

    The shortcut is a 1×1 layer where the shape changes, and otherwise nothing.
    """

    def __init__(self, n: int, m: int, stride: int = 1, neck: int | None = None) -> None:
        super().__init__()
        plan = [(n, m, 3, stride), (m, m, 3, 1)]
        if neck is not None:
            plan = [(n, neck, 1, 1), (neck, neck, 3, stride), (neck, m, 1, 1)]
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for k, (inputs, outputs, size, step) in enumerate(plan, start=1):
            conv = nn.Conv2d(inputs, outputs, size, step, padding=size // 2, bias=False)
            layers |= {f"conv{k}": conv, f"norm{k}": nn.BatchNorm2d(outputs)}
            if k < len(plan):
                layers[f"relu{k}"] = nn.ReLU()
        self.branch, self.shortcut = nn.Sequential(layers), nn.Identity()
        if n != m or stride != 1:
            conv = nn.Conv2d(n, m, 1, stride, bias=False)
            parts = OrderedDict(conv=conv, norm=nn.BatchNorm2d(m))
            self.shortcut = nn.Sequential(parts)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.shortcut(x) + self.branch(x))


def make_resnet(widths: Sequence[int] = (32, 64, 256, 64)) -> nn.Sequential:
    """A small residual network; ``widths``: of the first layer, first block, other blocks, necks.

    28×28 pixels, 14×14 behind the first layer, 7×7 behind the first block, then 4×4.
    """
    first, basic, wide, neck = widths
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(1, first, 3, stride=2, padding=1, bias=False),
            norm=nn.BatchNorm2d(first),
            relu=nn.ReLU(),
            block1=ResidualBlock(first, basic, stride=2),
            block2=ResidualBlock(basic, wide, stride=2, neck=neck),
            block3=ResidualBlock(wide, wide, neck=neck),
            block4=ResidualBlock(wide, wide, neck=neck),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            fc=nn.Linear(wide, 10),
        )
    )


def load_resnet(seed: int, folder: Path = nb.ROOT / "checkpoints") -> nn.Sequential:
    """The network of ``make_resnet`` that ``experiments.resnet`` trained with ``seed``."""
    model = make_resnet()
    model.load_state_dict(torch.load(folder / f"resnet_seed{seed}.pt", weights_only=True))
    return model.eval()


def fold(model: nn.Module) -> nn.Module:
    """A copy without BatchNorm: each convolution takes over the one that follows it."""
    model = copy.deepcopy(model).eval()
    for parent in list(model.modules()):
        children = list(parent.named_children())
        for (name, layer), (next_name, norm) in zip(children, children[1:]):
            if isinstance(layer, nn.Conv2d | lrf.LowRank) and isinstance(norm, nn.BatchNorm2d):
                parts = layer if isinstance(layer, lrf.LowRank) else [layer]
                parts[-1] = fuse_conv_bn_eval(parts[-1], norm)  # the last part takes it over
                setattr(parent, name, layer if len(parts) > 1 else parts[0])
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


def split_cp(layer: nn.Conv2d, rank: int, ridge: float = 1e-3, sweeps: int = 30) -> lrf.LowRank:
    """CP: 1×1 to ``rank`` channels, a filter on each of them, 1×1; by alternating least squares.

    Without the ridge the terms may grow without limit and cancel.

    Source: Lebedev et al. (2014), arXiv:1412.6553; Phan et al. (2020), arXiv:2008.05441.
    """
    W = layer.weight.detach().double().flatten(2)
    generator = torch.Generator().manual_seed(0)
    factors = [torch.randn(n, rank, generator=generator).double() for n in W.shape]
    scale = W.norm()
    for _ in range(sweeps):
        for k in range(3):
            a, b = (factor for j, factor in enumerate(factors) if j != k)
            gram = (a.T @ a) * (b.T @ b)
            gram.diagonal().add_(ridge)
            mixed = (W / scale).movedim(k, 0).flatten(1) @ (a[:, None] * b).flatten(0, 1)
            factors[k] = torch.linalg.solve(gram, mixed.T).T
    last, first, middle = factors
    norms = [factor.norm(dim=0) for factor in factors]
    even = (torch.stack(norms).prod(0) * scale).pow(1 / 3)
    tiny = torch.finfo(scale.dtype).tiny  # the ridge makes terms vanish that nobody needs
    pairs = zip(factors, norms)
    last, first, middle = (factor / norm.clamp(min=tiny) * even for factor, norm in pairs)
    n, m, geometry = layer.in_channels, layer.out_channels, {}
    for key in ("stride", "padding", "dilation"):
        geometry[key] = getattr(layer, key)
    parts = lrf.LowRank(
        nn.Conv2d(n, rank, 1, bias=False),
        nn.Conv2d(rank, rank, layer.kernel_size, groups=rank, bias=False, **geometry),
        nn.Conv2d(rank, m, 1, bias=layer.bias is not None),
    )
    with torch.no_grad():
        for part, factor in zip(parts, (first.T, middle.T, last)):
            part.weight.copy_(factor.reshape(part.weight.shape))
        if layer.bias is not None:
            parts[2].bias.copy_(layer.bias)
    return parts.train(layer.training)


def split(layer: nn.Conv2d, scheme: str, rank: int | tuple[int, int]) -> lrf.LowRank:
    """What ``lrf_convs.split_conv`` returns; it does not know the scheme CP."""
    if scheme == "CP":
        return split_cp(layer, rank)
    return lrf_convs.split_conv(layer, scheme, rank)


def input_shapes(model: nn.Module, x: Tensor, names: Iterable[str]) -> dict[str, tuple]:
    """The shape of what each layer reads when the model reads ``x``."""
    shapes: dict[str, tuple] = {}
    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda _, args, __, name=name: shapes.__setitem__(name, tuple(args[0].shape))
        )
        for name in names
    ]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return shapes


def features(layer: nn.Conv2d, parts: nn.Sequential) -> Tensor:
    """What all but the last part make of each unit patch, a column for each feature."""
    n = layer.weight[0].numel()
    x = torch.eye(n).view(n, *layer.weight.shape[1:])
    for part in parts[:-1]:
        x = F.conv2d(x, part.weight, groups=part.groups)
    return x.detach().flatten(1).double()


def split_options(
    model: nn.Module,
    statistics: Mapping[str, lrf.Statistics],
    x: Tensor,
    candidates: Callable[[nn.Conv2d], Iterable[tuple]],
) -> dict[str, dict]:
    """{layer: {(scheme, rank), or None for dense: (MACs, error)}} of all that saves MACs.

    The error is what remains in the metric of the loss once the last part is fitted anew. All but
    the last part turn a patch into features, which the last part mixes; so the weight after least
    squares is the best among those that see the patch by its features. In some schemes the parts
    of a lower rank are the first ones of a higher: there one SVD serves all ranks.
    """
    options: dict[str, dict] = {}
    for name, shape in input_shapes(model, x, statistics).items():
        layer, zeros = model.get_submodule(name), torch.zeros(1, *shape[1:])
        W, C = layer.weight.detach().double().flatten(1), statistics[name].covariance()
        G, WC, dense = statistics[name].metric, W @ C, lrf.count_macs(layer, zeros)
        whole, options[name] = (G * (WC @ W.T)).sum(), {None: (dense, 0.0)}
        groups: dict[Any, list] = {}
        for scheme, rank in candidates(layer):
            nested = scheme in ("out", "in", "spatial")
            groups.setdefault(scheme if nested else (scheme, rank), []).append((scheme, rank))
        for group in groups.values():
            scheme, most = max(group)
            parts = split(layer, scheme, most)
            cost, P = lrf.count_macs(parts, zeros), features(layer, parts)
            PCP, WCP = P.T @ C @ P, WC @ P
            for _, rank in group:
                share = 1 if rank == most else rank / most
                macs, k = round(cost * share), round(P.shape[1] * share)
                if macs < dense:
                    M, K = PCP[:k, :k], WCP[:, :k]
                    ridge = 1e-5 * M.diagonal().mean() * torch.eye(k)
                    A = torch.linalg.solve(M + ridge, K.T).T
                    error = whole + (G * (A @ M @ A.T - 2 * A @ K.T)).sum()
                    options[name][scheme, rank] = (macs, error.clamp(min=0).item())
    return options


def residual_sums(model: nn.Module) -> dict[str, str]:
    """For ``lrf_convs.refit``: of each convolution that is added to others, who gets the sum."""
    graph, sums = torch.fx.symbolic_trace(model).graph, {}
    modules = dict(model.named_modules())
    for node in graph.nodes:
        readers = [user.target for user in node.users if user.op == "call_module"]
        if node.target not in (operator.add, operator.iadd, torch.add) or not readers:
            continue
        for term in node.all_input_nodes:
            while isinstance(modules.get(term.target), nn.Identity):
                term = term.args[0]
            if isinstance(modules.get(term.target), nn.Conv2d):
                sums[term.target] = readers[0]
    return sums


@torch.no_grad()
def recalibrated(model: nn.Module, small: nn.Module, images: Tensor, names: Iterable[str]):
    """A copy of ``small`` in which each output channel has the mean and deviation of ``model``'s.

    What re-estimating BatchNorm would do: a scale and a shift for each channel, layer by layer.
    """
    small, outputs = copy.deepcopy(small), {}

    def keep(layer: nn.Module, _: tuple, output: Tensor) -> None:
        outputs[layer] = output.mean((0, 2, 3)), output.std((0, 2, 3))

    for name in names:
        layer, parts = model.get_submodule(name), small.get_submodule(name)
        for network, place in ((model, layer), (small, parts)):
            hook = place.register_forward_hook(keep)
            network(images)
            hook.remove()
        (mean, deviation), (old_mean, old_deviation) = outputs[layer], outputs[parts]
        scale, last = deviation / old_deviation.clamp(min=1e-6), parts[-1]
        last.weight.mul_(scale[:, None, None, None])
        last.bias.copy_(mean + scale * (last.bias - old_mean))
    return small


@torch.no_grad()
def rescaled(model: nn.Module, seed: int | None) -> nn.Module:
    """The same function in other numbers: channels of a folded ``make_resnet`` network rescaled.

    In a branch, a channel times s before the ReLU and over s after it is the same. The s are
    random; with ``seed`` None those that make what writes a channel as large as what reads it.
    """
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed or 0)
    for block in (part for part in model if isinstance(part, ResidualBlock)):
        convs = [layer for layer in block.branch if isinstance(layer, nn.Conv2d)]
        for first, second in zip(convs, convs[1:]):
            if seed is None:
                writes = first.weight.flatten(1).norm(dim=1)
                reads = second.weight.transpose(0, 1).flatten(1).norm(dim=1)
                scale = (reads / writes.clamp(min=1e-6)).sqrt().clamp(min=1e-2, max=1e2)
            else:
                scale = torch.randn(first.out_channels, generator=generator).exp()
            first.weight.mul_(scale[:, None, None, None])
            first.bias.mul_(scale)
            second.weight.div_(scale[:, None, None])
    return model


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


# --- Rounding: lesson 11, whose cells show these three word for word -----------------------------


def rounded(W, step, bits):
    """Each number at the nearest of 2^bits levels: ..., -1.5, -0.5, 0.5, 1.5, ... steps."""
    half = 2 ** (bits - 1)
    return ((W / step).floor().clamp(-half, half - 1) + 0.5) * step


def best_step(W, bits, tries=80):
    """For each row the step of least squared error; a smaller step clips more and rounds less."""
    largest = W.abs().amax(1, keepdim=True) / 2 ** (bits - 1)
    shares = torch.linspace(1, 0.2, tries).to(W)[:, None, None]
    steps = (shares * largest).clamp(min=1e-7).half().to(W)  # they are stored in 16 bits
    errors = torch.stack([(rounded(W, step, bits) - W).square().sum(1) for step in steps])
    return steps[errors.argmin(0), torch.arange(len(W))]


def gptq(W, C, to):
    """Round column by column; the columns to the right make up for the error.

    ``to(column, j)`` is column j rounded.
    """
    W, Q = W.clone(), torch.empty_like(W)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(C))
    R = torch.linalg.cholesky(inverse, upper=True)
    for j in range(W.shape[1]):
        Q[:, j] = to(W[:, j : j + 1], j)[:, 0]
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


# --- The encoder outside of PyTorch: lesson 11 ---------------------------------------------------


def without_metadata(model: "onnx.ModelProto") -> "onnx.ModelProto":
    """``model`` itself, without what the exporter noted about the machine that made it.

    PyTorch notes for each step the lines of code behind it, with their paths.
    """
    graph = model.graph
    values = [*graph.input, *graph.output, *graph.value_info, *graph.initializer]
    for part in (model, graph, *graph.node, *values, *model.functions):
        del part.metadata_props[:]
        part.ClearField("doc_string")
    for node in (node for function in model.functions for node in function.node):
        del node.metadata_props[:]
    return model


def encoder_to_onnx(network: nn.Module, file: str | Path) -> None:
    """A sentence encoder as ONNX, for any number of sentences and of tokens."""
    import onnx

    ids = torch.arange(6).view(2, 3)  # an example, as the exporter needs one
    example = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    axes = {0: "sentences", 1: "tokens"}
    with warnings.catch_warnings(action="ignore"):  # it warns that both inputs share their axes
        program = torch.onnx.export(
            network.eval(),
            kwargs=example,
            input_names=list(example),
            dynamic_shapes=dict.fromkeys(example, axes),
            verbose=False,
        )
    onnx.save(without_metadata(program.model_proto), file)


def encoder_in_bits(source: str | Path, file: str | Path, bits: int) -> None:
    """The linear layers in 8 or 4 bits, the embedding table in 8, by ONNX Runtime's quantizers."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load(source)
    if bits == 4:
        model = four_bits(model)
    kinds = ["Gather"] if bits == 4 else ["Gather", "MatMul", "Gemm"]
    how = {"weight_type": QuantType.QInt8, "per_channel": True}
    logging.disable(logging.WARNING)  # it advises a preparation that would change nothing here
    try:
        quantize_dynamic(model, file, op_types_to_quantize=kinds, **how)
    finally:
        logging.disable(logging.NOTSET)


class OnnxEncoder:
    """A file as a function of a batch, like a ``SentenceEncoder``."""

    def __init__(self, file: str | Path) -> None:
        self.session = session(str(file))

    def __call__(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        batch = {"input_ids": input_ids.numpy(), "attention_mask": attention_mask.numpy()}
        return torch.from_numpy(self.session.run(None, batch)[0])


def numpy_encoder(
    tensors: Mapping[str, np.ndarray], heads: int, ids: np.ndarray, mask: np.ndarray
) -> np.ndarray:
    """The encoder in NumPy, from the tensors of a BERT's file; pairs are used as pairs."""

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        if f"{name}.0.weight" in tensors:  # a pair: its first factor has no bias
            x, name = x @ tensors[f"{name}.0.weight"].T, f"{name}.1"
        return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-12)
        return x * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]

    def split(x: np.ndarray) -> np.ndarray:  # sentences, heads, tokens, width of a head
        return x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)

    x = tensors["embeddings.word_embeddings.weight"][ids]
    x = x + tensors["embeddings.position_embeddings.weight"][: ids.shape[1]]
    x = norm(x + tensors["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
    hidden = np.where(mask[:, None, None] == 1, 0, -np.inf)  # padding is not looked at
    for block in itertools.count():
        name = f"encoder.layer.{block}"
        if f"{name}.output.LayerNorm.weight" not in tensors:
            break
        attended = (f"{name}.attention.self.{part}" for part in ("query", "key", "value"))
        q, k, v = (split(linear(x, part)) for part in attended)
        scores = q @ k.swapaxes(2, 3) / q.shape[-1] ** 0.5 + hidden
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = scores / scores.sum(-1, keepdims=True) @ v
        mixed = mixed.transpose(0, 2, 1, 3).reshape(x.shape)
        mixed = linear(mixed, f"{name}.attention.output.dense")
        x = norm(x + mixed, f"{name}.attention.output.LayerNorm")
        h = linear(x, f"{name}.intermediate.dense")
        h = h * (1 + _erf(h / 2**0.5)) / 2  # GELU
        x = norm(x + linear(h, f"{name}.output.dense"), f"{name}.output.LayerNorm")
    x = (x * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def _erf(x: np.ndarray) -> np.ndarray:
    """To 1.5e-7: Abramowitz and Stegun, 7.1.26. NumPy has none."""
    t = 1 / (1 + 0.3275911 * np.abs(x))
    powers = (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)
    total = sum(a * t ** (i + 1) for i, a in enumerate(powers))
    return np.sign(x) * (1 - total * np.exp(-x * x))
