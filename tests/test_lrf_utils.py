"""What the low-rank helper promises, each promise by small cases."""

import copy
import io
import math
import re
import resource
import sys
import warnings
from itertools import product

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18
from torchvision.models.swin_transformer import SwinTransformer
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.pytorch_utils import Conv1D

import lrf_convs
import lrf_utils as lrf

torch.set_num_threads(1)
settings.register_profile("lrf", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("lrf")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def matrix(*shape, seed=None):
    generator = torch.Generator().manual_seed(sum(shape) if seed is None else seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def seeded(make, *args, **kwargs):
    """A model of reproducible numbers in float64, so that nothing hangs on rounding."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return make(*args, **kwargs).double().eval()


def snapshot(model):
    """What a function that only reads must leave as it is."""
    tensors = [*model.parameters(), *model.buffers()]
    modules = list(model.named_modules())
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for _, m in modules]
    objects = [hooks, *((name, id(m), m.training) for name, m in modules)]
    objects += [(id(tensor), tensor.requires_grad, tensor.grad) for tensor in tensors]
    return objects, [tensor.detach().clone() for tensor in tensors], torch.get_rng_state()


def assert_unchanged(model, before):
    now = snapshot(model)
    assert now[0] == before[0]
    torch.testing.assert_close(now[1:], before[1:], rtol=0, atol=0, equal_nan=True)


def raises(kind, text, call, *args, **kwargs):
    """The call fails with just this kind of error, whose text holds this."""
    with pytest.raises(kind, match=re.escape(text)) as caught:
        call(*args, **kwargs)
    assert type(caught.value) is kind


def product_of(pair):
    return (pair[1].weight.flatten(1) @ pair[0].weight.flatten(1)).detach()


def mlp():
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Linear(5, 4))


def cnn():
    return nn.Sequential(
        nn.Conv2d(2, 5, 3, stride=2, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(5, 4, 2, padding="same"),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(36, 4),
    )


class Residual(nn.Module):
    """A layer used twice, a nested one, and a head without a bias."""

    def __init__(self):
        super().__init__()
        self.stem, self.block = nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), nn.ReLU())
        self.norm, self.head = nn.BatchNorm1d(6), nn.Linear(6, 4, bias=False)

    def forward(self, x):
        x = self.norm(torch.relu(self.stem(x)))
        return self.head(x + self.block(self.stem(x)))


class Tokens(nn.Module):
    """A layer sees every token, the classifier the mean of those that are no padding."""

    def __init__(self):
        super().__init__()
        self.fc, self.head = nn.Linear(6, 3), nn.Linear(3, 4)

    def forward(self, x, padding=None):
        kept = torch.ones(x.shape[:2], dtype=bool) if padding is None else ~padding
        hidden = torch.tanh(self.fc(input=x)) * kept[..., None]
        return self.head(hidden.sum(1) / kept.sum(1, keepdim=True))


class Scribble(nn.Module):
    """Overwrites what its layer was given."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 4)

    def forward(self, x):
        hidden = x + 1
        logits = self.fc(hidden)
        hidden.zero_()
        return logits


def llama(tied=False, **how):
    config = transformers.LlamaConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        **how,
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return transformers.LlamaForCausalLM(config).eval()


# --- Factors -------------------------------------------------------------------------------------


def random_weight(m, n, decay, kept, seed):
    """A matrix with a spectrum that falls to 10^-decay, and is zero behind a place."""
    U, V = torch.linalg.qr(matrix(m, m, seed=seed)).Q, torch.linalg.qr(matrix(n, n, seed=seed)).Q
    k = min(m, n)
    spectrum = torch.logspace(0, -decay, k, dtype=torch.float64) * (torch.arange(k) < kept)
    return U[:, :k] * spectrum @ V[:, :k].T


WEIGHTS = st.builds(
    random_weight,
    st.integers(1, 9),
    st.integers(1, 9),
    st.sampled_from([0, 3, 12]),
    st.integers(1, 9),
    st.integers(0, 2**31),
)


@given(WEIGHTS, st.integers(1, 9), st.sampled_from(DTYPES))
def test_svd_error_is_the_tail_and_factors_are_balanced(weight, rank, dtype):
    weight, full = weight.to(dtype), min(weight.shape)
    rank = min(rank, full)
    A, B = lrf.truncated_svd(weight, rank)
    whole = lrf.truncated_svd(weight, full)
    assert torch.equal(whole[0][:, :rank], A) and torch.equal(whole[1][:rank], B)
    assert A.dtype == B.dtype == dtype
    A, B, S = A.double(), B.double(), torch.linalg.svdvals(weight.double())
    # Rounding moves each factor by eps/2 of its norm, and numbers near 0 by 1e-7 (float16).
    eps, least = torch.finfo(dtype).eps, 1e-5 if dtype is torch.float16 else 1e-9
    error = (weight.double() - A @ B).norm()
    assert abs(error - S[rank:].norm()) <= eps * S.sum() + least * (1 + S[0])
    for gram in (A.T @ A, B @ B.T):
        torch.testing.assert_close(gram, S[:rank].diag(), rtol=0, atol=4 * eps * rank + least)


def net_of(weight):
    net = nn.Sequential(nn.Linear(*reversed(weight.shape)))
    net[0].weight.data = weight
    return net


X, Y = torch.ones(2, 4), torch.zeros(2)
KNOWN = {"0": lrf.Statistics(1, 1, 1, torch.ones(4), torch.eye(4).double())}
TAKE_A_RANK = {
    "truncated_svd": lambda W, r: lrf.truncated_svd(W, r),
    "factorize_layer": lambda W, r: lrf.factorize_layer(net_of(W)[0], r),
    "factorize": lambda W, r: lrf.factorize(net_of(W), {"0": r}),
    "sequentially": lambda W, r: lrf.factorize_sequentially(net_of(W), {"0": r}, KNOWN, X),
    "sweep": lambda W, r: lrf.rank_sweep(net_of(W), "0", X, Y, [r]),
}


@pytest.mark.parametrize("function", TAKE_A_RANK.values(), ids=TAKE_A_RANK)
def test_bad_ranks_and_weights_are_refused(function):
    weight = matrix(3, 4).float()
    for rank in (0, -1, 4, np.int64(0)):
        raises(ValueError, f"3×4 weight must be from 1 to 3, got {rank}", function, weight, rank)
    for rank in (2.0, True, np.float64(2), torch.tensor(2), "2"):
        raises(TypeError, f"must be an int, got {rank!r}", function, weight, rank)
    for rank in (3, np.int64(3), np.uint8(3)):
        function(weight, rank)
    weight[1, 2] = math.nan
    raises(ValueError, "weight holds NaN or infinity", function, weight, 2)
    raises(ValueError, "must be a matrix, got shape (3,)", lrf.truncated_svd, torch.zeros(3), 1)
    raises(TypeError, "got torch.int64", lrf.truncated_svd, torch.eye(3).long(), 1)


@given(st.integers(1, 10**9), st.integers(1, 10**9))
def test_break_even_rank_is_the_largest_that_saves(m, n):
    rank = lrf.break_even_rank(m, n)
    assert rank * (m + n) < m * n <= (rank + 1) * (m + n)


# --- One layer -----------------------------------------------------------------------------------

LAYERS = {
    "linear": (lambda: nn.Linear(6, 4), (50, 6)),
    "taller, no bias": (lambda: nn.Linear(4, 9, bias=False), (50, 4)),
    "tokens": (lambda: nn.Linear(6, 4), (9, 5, 6)),
    "no bias, 2×3": (lambda: nn.Conv2d(3, 4, (2, 3), bias=False), (5, 3, 6, 5)),
    "stride": (lambda: nn.Conv2d(2, 7, 3, stride=(2, 1), padding=(1, 2)), (6, 2, 7, 5)),
    "circular": (
        lambda: nn.Conv2d(2, 7, 3, dilation=2, padding=2, padding_mode="circular"),
        (6, 2, 7, 6),
    ),
    "same, odd sides": (lambda: nn.Conv2d(2, 5, (2, 4), padding="same"), (6, 2, 7, 6)),
}
EACH_LAYER = pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS)


def as_vectors(layer, output):
    if isinstance(layer, nn.Conv2d):
        output = output.movedim(-3, -1)
    return output.flatten(0, -2).detach()


def rows_of(layer, x):
    """With the unit matrix for its weight, a layer passes on the rows that its weight acts on."""
    unit, n = copy.deepcopy(layer), layer.weight[0].numel()
    eye = torch.eye(n, dtype=torch.float64)
    unit.weight, unit.bias = nn.Parameter(eye.reshape(n, *layer.weight.shape[1:])), None
    return as_vectors(layer, unit.forward(x))  # without the hooks


def measured(layer, pair, x, metric=None, damping=0.1):
    """What a pair leaves, by running it: on x and, for the ridge, on n white rows, per input."""
    rows = rows_of(layer, x)
    spread = rows if pair.bias is None else rows - rows.mean(0)
    size = spread.square().sum(1).mean() / len(rows)
    lost = layer.weight.detach().flatten(1) - product_of(pair)
    on_white = lost.T * (len(rows) * size).sqrt()
    change = torch.cat([as_vectors(layer, layer(x) - pair(x)), on_white])
    if metric is None:
        return change.square().sum().item() / len(x)
    G = metric + damping * metric.diagonal().mean() * torch.eye(len(metric)).double()
    return (change @ G * change).sum().item() / len(rows)


@EACH_LAYER
@pytest.mark.parametrize("metric", [False, True])
def test_errors_are_what_is_left_and_nothing_leaves_less(make, shape, metric):
    layer, x = seeded(make), matrix(*shape) + 0.5
    loss = (lambda y: [(y[..., :1] * matrix(1)).sum(), y.sin().sum()]) if metric else None
    statistics = lrf.collect_statistics(layer, x, loss=loss, damping=0.3)[""]
    how = {"metric": statistics.metric, "damping": 0.3}
    plain, errors = lrf.truncation_errors(layer), lrf.truncation_errors(layer, statistics)
    assert len(plain) == len(errors) == min(layer.weight.flatten(1).shape) + 1
    assert plain[-1] == errors[-1] == 0 and errors[0] > errors[1]
    for rank in range(1, len(errors)):
        pair = lrf.factorize_layer(layer, rank, statistics)
        left = measured(layer, pair, x, **how)
        assert left == pytest.approx(errors[rank].item(), rel=1e-7, abs=1e-13)
        A, B = (part.weight.detach().flatten(1) for part in (pair[1], pair[0]))
        torch.testing.assert_close(A.T @ A, B @ B.T)  # their norms are shared evenly
        svd = lrf.factorize_layer(layer, rank)
        lost = (layer.weight.flatten(1) - product_of(svd)).square().sum().item()
        assert lost == pytest.approx(plain[rank].item(), rel=1e-7, abs=1e-13)
        assert errors[rank] <= measured(layer, svd, x, **how) * (1 + 1e-7) + 1e-13
        for part in pair.parameters():  # the least also among its neighbors
            with torch.no_grad():
                part += 0.01 * matrix(*part.shape)
                assert measured(layer, pair, x, **how) >= left
                part -= 0.01 * matrix(*part.shape)


@EACH_LAYER
def test_a_pair_keeps_what_the_layer_is(make, shape):
    layer, x = make(), matrix(*shape).float()
    before, full = snapshot(layer), min(layer.weight.flatten(1).shape)
    pair = lrf.factorize_layer(layer, full, lrf.collect_statistics(layer, x[:1])[""])
    torch.testing.assert_close(pair(x), layer(x), rtol=1e-4, atol=1e-5)
    pair = lrf.factorize_layer(layer, 2)
    assert_unchanged(layer, before)
    assert [type(part) for part in pair] == [type(layer)] * 2 and pair[0].bias is None
    assert pair(x).shape == layer(x).shape and pair.weight.shape == layer.weight.shape
    public = {key: value for key, value in vars(layer).items() if not key.startswith("_")}
    assert {key: getattr(pair, key) for key in public} == public
    biases = 0 if layer.bias is None else layer.bias.numel()
    assert pair.bias is pair[1].bias and (pair.bias is None) == (layer.bias is None)
    assert lrf.count_parameters(pair) == 2 * sum(layer.weight.flatten(1).shape) + biases
    assert set(pair.state_dict()) <= {"0.weight", "1.weight", "1.bias"}


@pytest.mark.parametrize("make", [nn.Linear, lambda *a, **k: nn.Conv2d(*a, 1, **k)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("flags", [(True, True), (True, False), (False, True)])
def test_a_pair_keeps_dtype_mode_and_flags(make, dtype, flags):
    layer = make(6, 4, dtype=dtype).train(flags[0])
    layer.weight.requires_grad_(flags[0])
    layer.bias.requires_grad_(flags[1])
    x = matrix(50, 6).to(dtype)
    x = x if isinstance(layer, nn.Linear) else x[..., None, None]
    known = lrf.collect_statistics(layer, x, loss=lambda output: [output.sum()])[""]
    with torch.device("meta"):  # where new tensors go unless told otherwise
        pair = lrf.factorize_layer(layer, 2, known)
    assert {(p.dtype, p.device.type, p.is_leaf) for p in pair.parameters()} == {
        (dtype, "cpu", True)
    }
    assert [p.requires_grad for p in pair.parameters()] == [flags[0], flags[0], flags[1]]
    assert [m.training for m in pair.modules()] == [flags[0]] * 3


def test_few_inputs_leave_the_svd_nearly_as_it_is():
    layer, other = seeded(nn.Linear, 30, 20), matrix(500, 30) * torch.logspace(0, -1, 30)

    def error(x):
        known = None if x is None else lrf.collect_statistics(layer, x)[""]
        return (lrf.factorize_layer(layer, 5, known)(other) - layer(other)).square().sum().item()

    zeros = lrf.collect_statistics(layer, torch.zeros(3, 30).double())[""]
    svd = lrf.factorize_layer(layer, 5)
    torch.testing.assert_close(product_of(lrf.factorize_layer(layer, 5, zeros)), product_of(svd))
    for few in (1, 2, 5):  # the bias is off by the sampling error of the mean
        assert error(other[:few]) <= (1.1 + 1 / few) * error(None)
    assert error(other) < 0.8 * error(None)


def test_a_layer_without_a_bias_gets_one_on_demand():
    layer, x = seeded(nn.Linear, 6, 4, bias=False), matrix(50, 6) + 3
    known = lrf.collect_statistics(layer, x)
    without, pair = (lrf.factorize_layer(layer, 2, known[""], add_bias=b) for b in (False, True))
    assert without.bias is None and pair.bias is not None
    lost = [(each(x) - layer(x)).square().sum().item() for each in (pair, without)]
    assert lost[0] < 0.5 * lost[1]
    torch.testing.assert_close((pair(x) - layer(x)).mean(0), torch.zeros(4).double())
    raises(ValueError, "no statistics of ['']", lrf.factorize, layer, {"": 2}, add_bias=True)
    same = lrf.factorize(layer, {"": 2}, known, add_bias=True)
    torch.testing.assert_close(same(x), pair(x))


def test_a_pair_keeps_channels_last_and_can_be_trained():
    conv = nn.Conv2d(6, 8, 3).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        for make in (lrf.factorize_layer, lambda c, r: lrf.factorize(c, {"": r})):
            pair = make(conv, 3)
            assert pair[0].weight.is_contiguous(memory_format=torch.channels_last)
            assert not any(p.is_inference() for p in pair.parameters())
    with torch.inference_mode(False), torch.enable_grad():
        pair(torch.randn(1, 6, 5, 5)).sum().backward()


# --- What stands in for the weight ---------------------------------------------------------------

FORBIDDEN = {
    "computing": lambda w: w + 1,
    "a layer": lambda w: F.linear(torch.ones(2, 5), w),
    "writing": lambda w: w.zero_(),
    "initializing": lambda w: nn.init.normal_(w),
    "its data": lambda w: w.data.add_(1),
    "a part": lambda w: w[0],
    "a transpose": lambda w: w.T,
    "another dtype": lambda w: w.to(torch.float16),
}


@pytest.mark.parametrize("use", FORBIDDEN.values(), ids=FORBIDDEN)
def test_a_weight_that_does_not_exist_cannot_be_used(use):
    pair = lrf.factorize_layer(nn.Linear(5, 7, dtype=torch.bfloat16), 2)
    with torch.no_grad():
        raises(RuntimeError, "has none, but two factors", use, pair.weight)


def test_a_pair_answers_cheap_questions_about_its_weight():
    pair = lrf.factorize_layer(nn.Linear(5, 7, dtype=torch.bfloat16), 2)
    w = pair.weight
    assert isinstance(w, torch.Tensor) and w.shape == w.size() == (7, 5) and len(w) == 7
    assert (w.ndim, w.dim(), w.numel(), w.size(1)) == (2, 2, 35, 5)
    assert (w.dtype, w.device.type, w.requires_grad) == (torch.bfloat16, "cpu", True)
    assert w.is_floating_point() and not w.is_meta and "(7, 5)" in repr(w)
    hand_made = lrf.LowRank(nn.Linear(5, 2, bias=False), nn.Linear(2, 7))
    assert hand_made.weight.shape == (7, 5)


def test_an_encoder_with_pairs_leaves_its_fused_path():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    names = lrf.layer_names(encoder.eval())
    pairs, x = lrf.factorize(encoder, dict.fromkeys(names, 4)), matrix(3, 7, 8).float()
    with torch.no_grad():
        torch.testing.assert_close(pairs(x), pairs.train(False).requires_grad_()(x))
        graph = torch.export.export(pairs, (x,)).graph
    assert not [node for node in graph.nodes if "matmul" in str(node.target)]
    assert lrf.count_macs(pairs, x) < lrf.count_macs(encoder, x)


def test_a_t5_that_reads_a_dtype_costs_what_its_pairs_cost():
    config = transformers.T5Config(
        vocab_size=60, d_model=32, d_ff=96, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    t5 = transformers.T5ForConditionalGeneration(config).eval()
    names = [
        "encoder.block.0.layer.1.DenseReluDense.wo",
        "encoder.block.0.layer.1.DenseReluDense.wi",
    ]
    small = lrf.factorize(t5, dict.fromkeys(names, 8))
    given = {"input_ids": torch.tensor([[5]]), "decoder_input_ids": torch.tensor([[0]])}
    saved = 2 * (32 * 96 - 8 * (32 + 96))
    assert lrf.count_macs(t5, **given) - lrf.count_macs(small, **given) == saved


def test_a_model_that_reads_a_weight_is_told_so():
    swin = SwinTransformer([4, 4], 8, [1, 1], [2, 2], [2, 2], num_classes=5).eval()
    small = lrf.factorize(swin, {"features.1.0.attn.qkv": 4})
    raises(RuntimeError, "leave the layer dense", small, torch.zeros(1, 3, 32, 32))


def test_merging_a_lora_into_a_pair_fails_loudly():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["0"], r=4, init_lora_weights=False)
    net = peft.get_peft_model(nn.Sequential(nn.Linear(32, 32), nn.ReLU()), config)
    name = next(n for n in lrf.layer_names(net) if n.endswith("base_layer"))
    small = lrf.factorize(net, {name: 12})
    raises(RuntimeError, "merge first, then factorize", small.merge_and_unload)


# --- What cannot be factorized -------------------------------------------------------------------


def linear(change):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some ways are old
        layer = nn.Linear(4, 4)
        other = change(layer)
    return other if isinstance(other, nn.Module) else layer


class Subclass(nn.Linear):
    pass


def emptied(layer):
    layer.weight = nn.Parameter(torch.empty(0))


def offloaded(layer):
    layer._hf_hook = object()


def quantized(layer):
    net = torch.ao.quantization.quantize_dynamic(nn.Sequential(layer))
    return net[0]


REFUSED = {
    "another module": (lambda: nn.ReLU(), "is a ReLU; only an exact nn.Linear or nn.Conv2d"),
    "GPT-2's": (lambda: Conv1D(8, 4), "new = nn.Linear(*layer.weight.shape)"),
    "a subclass": (lambda: Subclass(4, 4), f"is a {__name__}.Subclass; only an exact"),
    "attention": (lambda: nn.MultiheadAttention(4, 2), "never calls a layer"),
    "its output": (lambda: nn.MultiheadAttention(4, 2).out_proj, "never calls it"),
    "parametrized": (
        lambda: linear(nn.utils.parametrizations.weight_norm),
        "remove_parametrizations first",
    ),
    "quantized": (lambda: linear(quantized), "factorize first, then quantize"),
    "groups": (lambda: nn.Conv2d(4, 4, 3, groups=2), "in 2 groups; only groups=1"),
    "pruned": (lambda: linear(lambda x: prune.l1_unstructured(x, "weight", 0.5)), "undo that"),
    "hook": (lambda: linear(lambda x: x.register_forward_hook(print)), "with hooks"),
    "forward": (lambda: linear(lambda x: setattr(x, "forward", print)), "forward of its own"),
    "meta": (lambda: nn.Linear(4, 4, device="meta"), "meta device, without numbers"),
    "sharded": (lambda: linear(emptied), "weight is (0,) here; if sharded, gather it first"),
    "offloaded": (lambda: linear(offloaded), "by accelerate; load the model whole"),
    "8 bits": (lambda: linear(lambda x: x.to(torch.float8_e4m3fn)), "float8_e4m3fn"),
    "NaN": (lambda: linear(lambda x: nn.init.constant_(x.weight, math.nan)), "NaN"),
}


@pytest.mark.parametrize(("make", "text"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_factorized_is_refused_by_name(make, text):
    layer = make()
    layer = layer if isinstance(layer, nn.Module) else make()
    model = nn.Sequential(nn.Linear(4, 4), layer)
    kind = ValueError if type(layer) in (nn.Linear, nn.Conv2d) else TypeError
    for call in (
        lambda: lrf.factorize(model, {"1": 2}),
        lambda: lrf.collect_statistics(model, torch.ones(2, 4), ["1"]),
        lambda: lrf.rank_sweep(model, "1", torch.ones(2, 4), torch.zeros(2)),
    ):
        raises(kind, text, call)
        raises(kind, "'1' is ", call)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert lrf.layer_names(model) == ["0"]


def test_compiled_and_sharded_models_are_refused():
    compiled, parts = torch.compile(mlp(), backend="eager"), mlp()
    parts[0] = torch.compile(parts[0], backend="eager")
    in_place = mlp()
    in_place[2].compile(backend="eager")
    for model, what in ((compiled, "model"), (parts, "part '0'"), (in_place, "part '2'")):
        for call in (lrf.layer_names, lambda model: lrf.factorize(model, {"2": 2})):
            raises(TypeError, f"the {what} is compiled", call, model)


def test_fully_sharded_layers_are_refused(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        model = mlp()
        fully_shard(model, mesh=mesh)
        raises(ValueError, "gather it first", lrf.factorize, model, {"0": 2})
        parallel = nn.parallel.DistributedDataParallel(mlp())
        assert lrf.layer_names(parallel) == ["module.0", "module.2"]
    finally:
        torch.distributed.destroy_process_group()


def test_a_model_without_a_usable_layer_stops_the_pipeline():
    gpt = nn.Sequential(nn.Embedding(9, 4), Conv1D(8, 4))
    for call in (lrf.rank_options, lambda m: lrf.collect_statistics(m, torch.ones(2, 3).long())):
        with pytest.warns(UserWarning, match=r"1 × a transformers.*Conv1D; convert it first"):
            raises(ValueError, "no layer of this Sequential can be factorized", call, gpt)
    with pytest.warns(UserWarning, match="no layer of this Sequential"):
        assert lrf.layer_names(gpt) == []


def test_names_are_checked_and_near_ones_offered():
    raises(
        KeyError, "no module 'fc'; it has the layers ['0', '2']", lrf.factorize, mlp(), {"fc": 1}
    )
    layer = nn.Linear(3, 3)
    model = nn.Sequential(layer, nn.Sequential(nn.ReLU(), layer))
    assert lrf.layer_names(model) == ["0"]
    assert lrf.layer_names(lrf.factorize(model, {"0": 1})) == []
    conv = cnn()
    split = lrf.factorize(conv, {"0": lrf_convs.split_conv(conv[0], "spatial", 2)})
    assert lrf.layer_names(split) == ["2", "5"], "no parts of what is factorized"


# --- Factorize -----------------------------------------------------------------------------------


def test_named_layers_are_replaced_in_a_copy():
    model = seeded(Residual).train()
    model.norm.eval()
    own, before = nn.Linear(6, 6).double(), snapshot(model)
    result = lrf.factorize(model, {"block.0": 2, "head": np.int64(3), "stem": own})
    for name, rank in [("block.0", 2), ("head", 3)]:
        expected = lrf.factorize_layer(model.get_submodule(name), rank).state_dict()
        torch.testing.assert_close(result.get_submodule(name).state_dict(), expected)
    assert type(result) is Residual and result.stem is own and result.training
    assert not result.norm.training and not set(model.modules()) & set(result.modules())
    with torch.no_grad():
        for tensor in (*result.parameters(), *result.buffers()):
            tensor.zero_()
    assert_unchanged(model, before)
    assert type(lrf.factorize(model, {"head": None}).head) is nn.Linear
    assert type(lrf.factorize(model.head, {"": 2})) is lrf.LowRank, "the model is the layer"


def test_a_shared_layer_is_replaced_everywhere_by_one_pair():
    layer = nn.Linear(3, 3)
    model = nn.Sequential(layer, nn.Sequential(nn.ReLU(), layer))
    for ranks in ({"0": 1}, {"1.1": 1}, {"0": 1, "1.1": 1}):
        result = lrf.factorize(model, ranks)
        assert type(result[0]) is lrf.LowRank and result[0] is result[1][1]
    text = "'0' and '1.1' are one layer; give it one rank"
    raises(ValueError, text, lrf.factorize, model, {"0": 1, "1.1": 2})


def test_tied_weights_are_left_out_or_refused():
    net, ids = llama(tied=True), torch.ones(1, 4).long()
    with pytest.warns(UserWarning, match="left out: 1 × .* tied to that of model.embed_tokens"):
        assert "lm_head" not in lrf.layer_names(net)
    with pytest.warns(UserWarning):
        assert "lm_head" not in lrf.rank_options(net)
        assert "lm_head" not in lrf.collect_statistics(net, ids)
    raises(
        ValueError, "'model.embed_tokens', which would keep it", lrf.factorize, net, {"lm_head": 4}
    )
    known = lrf.collect_statistics(net, ids, ["lm_head", "model.layers.0.mlp.up_proj"])
    with pytest.warns(UserWarning, match="does not count model.embed_tokens.weight"):
        assert list(lrf.rank_options(net, known)) == ["model.layers.0.mlp.up_proj"]
    net.lm_head.weight = nn.Parameter(net.lm_head.weight.detach().clone())
    assert type(lrf.factorize(net, {"lm_head": 4}).lm_head) is lrf.LowRank


def test_a_model_that_grows_is_said():
    layer = nn.Linear(32, 32)
    with pytest.warns(UserWarning, match="has grown from 1,056 to 1,952 parameters"):
        lrf.factorize(nn.Sequential(layer), {"0": 30})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lrf.factorize(nn.Sequential(layer), {"0": 32})  # to see that it computes the same
        lrf.factorize_layer(layer, 30)
        lrf.rank_sweep(nn.Sequential(layer), "0", torch.randn(9, 32), torch.zeros(9), [30])


def test_statistics_must_be_those_of_the_layers():
    model, x = mlp(), torch.randn(9, 6)
    known = lrf.collect_statistics(model, x, loss="classes")
    other = {f"net.{name}": each for name, each in known.items()}
    text = "no statistics of ['0']; there are those of ['net.0', 'net.2']"
    raises(ValueError, text, lrf.factorize, model, {"0": 2}, other)
    with pytest.warns(
        UserWarning, match=re.escape("no statistics of ['2'], so these get the SVD")
    ):
        partly = lrf.factorize(model, {"0": 2, "2": 2}, {"0": known["0"]})
    torch.testing.assert_close(product_of(partly[2]), product_of(lrf.factorize_layer(model[2], 2)))
    text = "the statistics of '0' are not those of a 5×6 weight"
    raises(ValueError, text, lrf.factorize, model, {"0": 2}, {"0": known["2"]})
    raises(ValueError, text, lrf.rank_options, model, {"0": known["2"]})
    raises(ValueError, "of a 5×6 weight", lrf.truncation_errors, model[0], known["2"])


class Keeps(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.last = nn.Linear(8, 8), nn.Linear(8, 3), {}

    def forward(self, x):
        self.last["hidden"] = [torch.relu(self.a(x))]
        return self.b(self.last["hidden"][0])


def test_any_model_can_be_copied_or_its_part_is_named():
    net, x = Keeps(), torch.randn(4, 8)
    known = lrf.collect_statistics(net, x, loss="classes")
    assert net.last["hidden"][0].grad_fn is not None
    assert lrf.factorize(net, {"a": 2}, known)(x).isfinite().all()
    for change in (nn.utils.weight_norm, lambda layer: prune.l1_unstructured(layer, "weight", 3)):
        other = nn.Sequential(linear(change), nn.Linear(4, 3))
        small = lrf.factorize(other, {"1": 3})
        torch.testing.assert_close(small(x[:, :4]), other(x[:, :4]), rtol=1e-4, atol=1e-5)
    net.generator = (each for each in ())
    raises(TypeError, "'generator' of its module '', a Keeps,", lrf.factorize, net, {"a": 2})


# --- Statistics ----------------------------------------------------------------------------------


def by_hand(model, layer, x, temperature):
    """A layer's rows, and E[g gᵀ] summed over rows: one input, class and call at a time."""
    calls, rows, total = [], [], 0

    def keep(module, args, kwargs, output):
        rows.append(rows_of(layer, next(iter((*args, *kwargs.values()))).detach().clone()))
        calls.append(output)
        return output.clone()  # what follows may write into it

    with layer.register_forward_hook(keep, with_kwargs=True):
        for one in x:
            calls.clear()
            log_p = (model(one[None]) / temperature).log_softmax(1)[0]
            for value, call in product(log_p, calls):
                g = as_vectors(layer, torch.autograd.grad(value, call, retain_graph=True)[0])
                total = total + value.exp().item() * g.T @ g / len(x)
    return torch.cat(rows), total


STATISTICS_OF = {
    "in place": (mlp, "0", (40, 6)),
    "overwritten": (Scribble, "fc", (40, 6)),
    "used twice": (Residual, "stem", (40, 6)),
    "head without a bias": (Residual, "head", (40, 6)),
    "tokens, by keyword": (Tokens, "fc", (40, 5, 6)),
    "the model itself": (lambda: nn.Linear(6, 4), "", (40, 6)),
    "stride": (cnn, "0", (10, 2, 6, 6)),
    "same, in place before": (cnn, "2", (10, 2, 6, 6)),
}


@pytest.mark.parametrize(("make", "name", "shape"), STATISTICS_OF.values(), ids=STATISTICS_OF)
@pytest.mark.parametrize("frozen", [False, True])
def test_statistics_are_mean_covariance_and_metric(make, name, shape, frozen):
    model, x = seeded(make), matrix(*shape) + 1
    rows, metric = by_hand(model, model.get_submodule(name), x, 2.0)
    model.requires_grad_(not frozen)
    before = snapshot(model)
    found = lrf.collect_statistics(model, x.clone(), [name], loss="classes")[name]
    close = {"rtol": 1e-9, "atol": 1e-12}
    assert (found.inputs, found.rows, found.weight) == (len(x), len(rows), len(rows))
    torch.testing.assert_close(found.mean, rows.mean(0), **close)
    cov = torch.cov(rows.T, correction=0)
    torch.testing.assert_close(found.covariance(), cov, **close)
    torch.testing.assert_close(
        found.covariance(centered=False), rows.T @ rows / len(rows), **close
    )
    ridge = cov.trace() / len(rows) * torch.eye(len(cov)).double()
    torch.testing.assert_close(found.covariance(ridge=True), cov + ridge, **close)
    torch.testing.assert_close(found.metric, metric, **close)
    how = {"loss": "classes", "damping": 0.1}
    parts = lrf.collect_statistics(model, iter(x.split(7)), [name], **how)[name]
    torch.testing.assert_close(vars(parts), vars(found), **close)
    plain = lrf.collect_statistics(model, x, [name])[name]
    torch.testing.assert_close(plain.outer_sum, found.outer_sum, **close)
    assert plain.metric is None
    assert_unchanged(model, before)


@pytest.mark.parametrize("width", [40, 700])
def test_float32_products_lose_nothing_that_matters(width):
    """Against float64, with a mean a thousand times the spread, and more rows than one chunk."""
    rows = (matrix(3000, width) + 1000).float()
    layer = nn.Linear(width, 4)
    found = lrf.collect_statistics(layer, [rows], loss=lambda y: [(y * y.detach()).sum() / 2])[""]
    tensors = (found.row_sum, found.outer_sum, found.gradient_sum)
    assert {tensor.dtype for tensor in tensors} == {torch.float64}
    cov, g = torch.cov(rows.double().T, correction=0), layer(rows).double().detach() / 2
    assert (found.covariance() - cov).norm() < 1e-5 * cov.norm()
    torch.testing.assert_close(found.gradient_sum, g.T @ g, rtol=1e-5, atol=0)
    assert torch.equal(found.outer_sum, found.outer_sum.T)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_statistics_of_models_in_half_precision(dtype):
    model, x = seeded(Tokens).to(dtype), (matrix(40, 5, 6) + 10).to(dtype)
    found = lrf.collect_statistics(model, x, loss="classes")["fc"]
    rows = x.double().reshape(-1, 6)
    torch.testing.assert_close(
        found.covariance(), torch.cov(rows.T, correction=0), rtol=1e-5, atol=1e-5
    )
    exact = lrf.collect_statistics(copy.deepcopy(model).double(), x.double(), loss="classes")["fc"]
    assert (found.metric - exact.metric).norm() < 0.1 * exact.metric.norm()


def test_any_kind_of_batch_runs_once_in_evaluation_mode():
    class Probe(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.drop, self.calls = nn.Linear(6, 4), nn.Dropout(0.9), []

        def forward(self, x, scale=1.0, *, offset=0.0):
            self.calls.append((len(x), self.training, torch.is_grad_enabled()))
            return self.drop(self.fc(x * scale + offset))

    model, x, y = seeded(Probe).train(), matrix(300, 6), torch.zeros(300)
    before = snapshot(model)
    expected = vars(lrf.collect_statistics(model, x)["fc"])
    assert model.calls == [(200, False, False), (100, False, False)]
    loader = DataLoader(TensorDataset(x, y), batch_size=150, generator=torch.Generator())
    for batches, inputs_of in [
        ([[x]], None),
        ([(x / 2, 2.0)], None),
        ([{"x": x - 1, "offset": 1.0}], None),
        (loader, lambda batch: batch[0]),
        (loader, lambda batch: {"x": batch[0]}),
        ((part for part in x.split(50)), None),
    ]:
        model.calls.clear()
        found = lrf.collect_statistics(model, batches, inputs_of=inputs_of, loss="classes")["fc"]
        wanted = {**expected, "gradient_sum": found.gradient_sum}
        torch.testing.assert_close(wanted, vars(found), rtol=1e-9, atol=1e-9)
        assert sum(call[0] for call in model.calls) == 300
        assert {call[1:] for call in model.calls} == {(False, True)}
    assert_unchanged(model, before)


def test_a_large_input_comes_in_smaller_batches():
    sizes = []
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    lrf.collect_statistics(model, torch.zeros(27, 3, 224, 224))
    assert sizes == [13, 13, 1]


def test_the_loss_takes_logits_or_is_a_function():
    model, x = seeded(mlp), matrix(40, 6)

    class Wrapped(nn.Module):
        def __init__(self, form):
            super().__init__()
            self.net, self.form = model, form

        def forward(self, x):
            return self.form(self.net(x))

    def every_class(output):
        log_p = (output["out"] / 3).log_softmax(1)
        return [(log_p[:, k].detach().exp().sqrt() * log_p[:, k]).sum() for k in range(4)]

    how = {"loss": "classes", "temperature": 3.0}
    expected = lrf.collect_statistics(model, x, **how)["0"].metric
    field = Wrapped(lambda out: SequenceClassifierOutput(logits=out))
    torch.testing.assert_close(lrf.collect_statistics(field, x, **how)["net.0"].metric, expected)
    given = Wrapped(lambda out: {"out": out})
    found = lrf.collect_statistics(given, x, loss=every_class)["net.0"]
    torch.testing.assert_close(found.metric, expected)
    for loss, shape in (("classes", "(inputs, classes)"), ("tokens", "(inputs, tokens, vocab")):
        raises(ValueError, f"needs logits {shape}", lrf.collect_statistics, given, x, loss=loss)
    raises(ValueError, 'loss must be None, "classes"', lrf.collect_statistics, model, x, loss="CE")
    one = nn.Sequential(nn.Linear(6, 1))
    raises(
        ValueError,
        "one logit is no choice",
        lrf.collect_statistics,
        one,
        x.float(),
        loss="classes",
    )
    for bad in ({"temperature": 0.0}, {"damping": -1.0}, {"damping": math.nan}):
        raises(ValueError, "must be positive", lrf.collect_statistics, model, x, **bad)


def test_tokens_are_drawn_from_the_prediction_with_a_seed():
    """On average over seeds the drawn metric is that of every token, in turn."""
    model, x = seeded(nn.Linear, 3, 4), matrix(20, 2, 3)
    p = model(x).softmax(-1).detach().flatten(0, 1)
    expected = (p.sum(0).diag() - p.T @ p) / 20  # of softmax: E[g gᵀ] = diag(p) - p pᵀ
    how = {"loss": "tokens"}
    drawn = [lrf.collect_statistics(model, x, seed=k, **how)[""].metric for k in range(300)]
    assert (torch.stack(drawn).mean(0) - expected).norm() < 0.1 * expected.norm()
    again = lrf.collect_statistics(model, x, seed=1, **how)[""].metric
    assert torch.equal(again, drawn[1]) and not torch.equal(drawn[0], drawn[1])


def test_padding_does_not_enter_a_language_model():
    net = llama()
    ids, mask = torch.arange(1, 17).reshape(2, 8), torch.ones(2, 8).long()
    mask[0, 5:] = 0
    names = ["model.layers.0.mlp.up_proj", "lm_head"]
    how = {"names": names, "loss": "tokens", "mask_of": lambda batch: batch["attention_mask"]}
    found = []
    for padding in (0, 3):
        padded = torch.where(mask.bool(), ids, padding)
        batch = {"input_ids": padded, "attention_mask": mask}
        found.append(lrf.collect_statistics(net, [batch], **how))
    for name in names:
        one, two = (vars(each[name]) for each in found)
        assert one["rows"] == 13
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


def test_rows_weighted_by_gradients_and_their_sums():
    model, x = seeded(mlp), matrix(40, 6)
    how = {"loss": "classes", "temperature": 1.0}
    plain = lrf.collect_statistics(model, x, **how)
    found = lrf.collect_statistics(model, x.split(7), weighted=True, **how)
    halves = [lrf.collect_statistics(model, part, weighted=True, **how) for part in x.split(20)]
    for name, rows in (("0", x), ("2", model[:2](x))):
        rows, each = rows.detach(), found[name]
        weights = torch.stack(
            [
                lrf.collect_statistics(model, one[None], [name], **how)[name].metric.trace()
                for one in x
            ]
        )
        assert (each.rows, each.inputs) == (40, 40)
        mean = weights @ rows / weights.sum()
        torch.testing.assert_close(each.mean, mean)
        spread = rows - mean
        torch.testing.assert_close(
            each.covariance(), spread.T @ (weights[:, None] * spread) / weights.sum()
        )
        torch.testing.assert_close(each.gradient_sum, plain[name].gradient_sum)
        together = halves[0][name] + halves[1][name]
        torch.testing.assert_close(vars(together), vars(each))
        raises(ValueError, "cannot be added", lambda each=each, name=name: each + plain[name])
    raises(ValueError, "so give a loss too", lrf.collect_statistics, model, x, weighted=True)


def test_masks_leave_padding_out():
    """Sequences of 5, 3 and 1 tokens in one batch are as good as one by one."""
    model, x = seeded(Tokens), matrix(3, 5, 6)
    padding = torch.arange(5) >= torch.tensor([5, 3, 1])[:, None]
    x[padding] = 1e3
    one_by_one = [sequence[~hidden][None] for sequence, hidden in zip(x, padding)]
    for loss in (None, "classes"):
        alone = lrf.collect_statistics(model, one_by_one, loss=loss)
        for mask_of in (
            lambda batch: ~batch[1],
            lambda batch: (~batch[1]).float(),
            lambda batch: {"": torch.ones(3), "fc": ~batch[1]},
        ):
            found = lrf.collect_statistics(model, [(x, padding)], mask_of=mask_of, loss=loss)
            assert found["fc"].rows == 9 and found["head"].rows == 3
            for name in alone:
                torch.testing.assert_close(vars(found[name]), vars(alone[name]))
    known, ranks = lrf.collect_statistics(model, one_by_one), {"fc": 1, "head": 2}
    alone = lrf.factorize_sequentially(model, ranks, known, one_by_one)
    how = {"mask_of": lambda batch: ~batch[1]}
    together = lrf.factorize_sequentially(model, ranks, known, [(x, padding)], **how)
    torch.testing.assert_close(together.state_dict(), alone.state_dict())
    text = "a mask for (3, 4) inputs or tokens does not fit layer 'fc', whose rows are (3, 5)"
    how = {"mask_of": lambda batch: torch.ones(3, 4)}
    raises(ValueError, text, lrf.collect_statistics, model, x, **how)
    how = {"mask_of": lambda batch: torch.zeros(3, 5)}
    raises(ValueError, "no row of the layer 'fc' counts", lrf.collect_statistics, model, x, **how)
    how = {"mask_of": lambda batch: {"encoder": torch.zeros(3, 5)}}
    raises(AttributeError, "encoder", lrf.collect_statistics, model, x, **how)
    flat = nn.Sequential(nn.Flatten(0, 1), nn.Linear(6, 2)).double()  # all tokens in one line
    found = lrf.collect_statistics(flat, [x], mask_of=lambda batch: ~padding)["1"]
    assert found.rows == 9
    conv, images = seeded(cnn), matrix(4, 2, 6, 6)
    some = lrf.collect_statistics(conv, images, mask_of=lambda batch: torch.tensor([1, 0, 0, 1]))
    same = lrf.collect_statistics(conv, images[[0, 3]])
    torch.testing.assert_close(some["2"].outer_sum, same["2"].outer_sum)


def test_statistics_add_up_and_can_be_saved():
    model, x = seeded(Residual), matrix(40, 6)
    whole = lrf.collect_statistics(model, x, loss="classes")
    a, b = (lrf.collect_statistics(model, part, loss="classes") for part in x.split(23))
    file = io.BytesIO()
    torch.save({name: vars(a[name] + b[name]) for name in a}, file)
    file.seek(0)
    for name, fields in torch.load(file, weights_only=True).items():
        torch.testing.assert_close(vars(lrf.Statistics(**fields)), vars(whole[name]))
    plain = lrf.collect_statistics(model, x)["head"]
    damped = lrf.collect_statistics(model, x, loss="classes", damping=1.0)["head"]
    for one, two in [(plain, damped), (damped, plain), (a["head"], damped)]:
        raises(ValueError, "cannot be added", lambda one=one, two=two: one + two)


def test_inputs_can_be_counted_by_the_caller():
    """nn.Transformer's default puts the tokens first: 16 sequences of 7 here."""
    net = nn.TransformerEncoderLayer(32, 4, 64).eval()
    how = {"names": ["linear1"], "count_of": lambda batch: batch.shape[1]}
    known = lrf.collect_statistics(net, [torch.randn(7, 16, 32)], **how)
    assert (known["linear1"].inputs, known["linear1"].rows) == (16, 112)
    with pytest.warns(UserWarning, match="does not count"):
        assert lrf.rank_options(net, known, cost="macs")["linear1"][None][0] == 7 * 32 * 64


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.a, self.b, self.reentrant = nn.Linear(8, 8), nn.Linear(8, 6), reentrant

    def forward(self, x):
        def block(x):
            return torch.relu(self.a(x))

        if self.reentrant is None:
            return self.b(block(x))
        return self.b(checkpoint(block, x, use_reentrant=self.reentrant))


def test_checkpointed_blocks_count_once_or_are_refused():
    x, how = matrix(50, 8), {"loss": "classes"}
    plain, again = (
        lrf.collect_statistics(seeded(Checkpointed, k), x, **how) for k in (None, False)
    )
    for name in plain:
        torch.testing.assert_close(vars(again[name]), vars(plain[name]))
    text = "no gradient reaches the layer 'a': it is called under torch.no_grad() or"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        raises(RuntimeError, text, lrf.collect_statistics, seeded(Checkpointed, True), x, **how)


class Uneven(nn.Module):
    """One layer is not called, and the loss does not depend on another."""

    def __init__(self):
        super().__init__()
        self.unused, self.late, self.used = nn.Linear(6, 4), nn.Linear(4, 4), nn.Linear(6, 4)

    def forward(self, x):
        self.late(self.used(x))
        return self.used(x)


def test_layers_that_are_not_called_or_do_not_count_are_named():
    model, x = seeded(Uneven), matrix(30, 6)
    with pytest.warns(
        UserWarning, match=re.escape("no statistics of ['unused'], which the model")
    ):
        assert list(lrf.collect_statistics(model, x)) == ["used", "late"]
    names = ["used", "unused"]
    raises(ValueError, "does not call ['unused']", lrf.collect_statistics, model, x, names)
    how = {"names": iter(["late", "used"]), "loss": "classes"}
    with pytest.warns(UserWarning, match=re.escape("the loss does not depend on ['late']")):
        known = lrf.collect_statistics(model, x, **how)
    assert list(known) == ["used", "late"], "in the order of the calls"
    with pytest.warns(UserWarning, match="does not count unused.weight"):
        tables = lrf.rank_options(model, known)
    assert list(tables["late"]) == [None] and len(tables["used"]) == 3
    with pytest.warns(UserWarning, match=re.escape("the loss does not depend on ['late']")):
        weighted = lrf.collect_statistics(model, x, ["late"], loss="classes", weighted=True)
    for each in (known, weighted):
        assert lrf.factorize(model, {"late": 2}, each)(x).isfinite().all()


def test_bad_batches_are_named_and_change_nothing():
    model, good = seeded(mlp), matrix(2, 6)
    before = snapshot(model)
    for kind, text, batches in [
        (ValueError, "batches is empty", []),
        (ValueError, "at least one input", torch.zeros(0, 6).double()),
        (TypeError, "must be Tensor, not str", ["text"]),
        (
            ValueError,
            "inputs of the layer '0' are not all finite (batch 1)",
            [good, math.nan * good],
        ),
        (RuntimeError, "mat1 and mat2 shapes cannot be multiplied", [torch.zeros(2, 5).double()]),
        (TypeError, "takes 2 positional arguments but 3 were given", [(good, good)]),
    ]:
        raises(kind, text, lrf.collect_statistics, model, batches)
        assert_unchanged(model, before)
        assert torch.is_grad_enabled()
    with pytest.raises(TypeError) as caught:
        lrf.collect_statistics(model, batches)
    assert "inputs_of= says what of a batch goes into the model" in caught.value.__notes__[0]
    nn.init.constant_(model[2].bias, math.nan)
    assert lrf.collect_statistics(model, good)["0"].outer_sum.isfinite().all()
    text = "gradients of the layer '2' are not all finite (batch 0)"
    raises(ValueError, text, lrf.collect_statistics, model, good, loss="classes")


def test_progress_is_one_line(capsys):
    lrf.collect_statistics(mlp(), torch.randn(500, 6), progress=True)
    assert re.search(r"\r3 batches, \d+ s \n$", capsys.readouterr().err)


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is in other units elsewhere")
def test_memory_depends_on_what_is_asked_for():
    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6

    head = nn.Sequential(nn.Linear(64, 30_000, bias=False))
    conv, image = nn.Conv2d(32, 32, 3, padding=1), torch.randn(3, 32, 224, 224)
    with torch.no_grad():
        conv(image)
    before = peak()
    lrf.collect_statistics(head, [torch.randn(8, 64)] * 2)  # (m, m) would hold 7.2 GB
    lrf.collect_statistics(conv, [image])  # all patches at once hold 0.2 GB
    assert peak() - before < 0.3


# --- Sequential factorization --------------------------------------------------------------------


def deep():
    return nn.Sequential(*[p for _ in range(5) for p in (nn.Linear(8, 8), nn.ReLU())][:-1])


def deep_cnn():
    parts = []
    for _ in range(3):
        parts += [nn.Conv2d(6, 6, 3, padding=1, padding_mode="circular"), nn.ReLU(inplace=True)]
    return nn.Sequential(*parts, nn.Flatten(), nn.Linear(6 * 25, 4))


SEQUENTIAL = [(deep, matrix(300, 8)), (deep_cnn, matrix(60, 6, 5, 5))]


@pytest.mark.parametrize(("make", "x"), SEQUENTIAL, ids=["deep", "deep_cnn"])
def test_sequential_is_nearer_at_the_output_and_exact_at_full(make, x):
    model = seeded(make)
    model[2].bias = None
    before, names = snapshot(model), lrf.layer_names(model)
    known = lrf.collect_statistics(model, x)
    full = {name: min(model.get_submodule(name).weight.flatten(1).shape) for name in names}
    torch.testing.assert_close(lrf.factorize_sequentially(model, full, known, x)(x), model(x))
    ranks = dict.fromkeys(names, 3)

    def error(result):
        return (result(x) - model(x)).square().sum().item()

    sequential = lrf.factorize_sequentially(model, ranks, known, iter(x.split(50)))
    assert error(sequential) < 0.9 * error(lrf.factorize(model, ranks, known))
    assert_unchanged(model, before)
    some = lrf.factorize_sequentially(model, ranks | {names[1]: None}, known, x)
    assert type(some.get_submodule(names[1])) is type(model.get_submodule(names[1]))
    first = {names[0]: 2}
    for how in ({}, {"loss": "classes", "damping": 0.5}):
        known = lrf.collect_statistics(model, x, **how)
        one, same = (
            lrf.factorize_sequentially(model, first, known, x),
            lrf.factorize(model, first, known),
        )
        torch.testing.assert_close(one(x), same(x))
    picked = lrf.factorize_sequentially(model, ranks, known, [(x, 0)], inputs_of=lambda b: b[0])
    torch.testing.assert_close(picked(x), lrf.factorize_sequentially(model, ranks, known, x)(x))
    raises(
        ValueError, "no statistics of ['0']", lrf.factorize_sequentially, model, {"0": 1}, {}, x
    )


@pytest.mark.parametrize("bias", [True, False])
def test_no_neighbor_of_a_sequential_pair_is_nearer(bias):
    """On the compressed network's rows and the ridge, on which the old weight is the target."""
    model = seeded(nn.Sequential, nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 6, bias=bias))
    x = matrix(50, 8) + 0.3
    known = lrf.collect_statistics(model, x)
    result = lrf.factorize_sequentially(model, {"2": 2, "0": 2}, known, x)
    rows, layer, pair = torch.tanh(result[0](x)).detach(), model[2], result[2]
    spread = rows - rows.mean(0) * bias
    level = spread.square().sum(1).mean()  # on all white rows together, as much as on one row

    def error():
        missed = (layer.weight - product_of(pair)).square().sum() * level
        return ((pair(rows) - model(x)).square().sum() + missed).item()

    best = error()
    with torch.no_grad():
        for step, (index, part) in product((1e-2, 1e-4), enumerate(pair.parameters())):
            for sign in (1, -1):
                part += (move := sign * step * matrix(*part.shape, seed=index))
                assert error() > best
                part -= move


# --- Budgets -------------------------------------------------------------------------------------


def cost_and_error(tables, plan):
    return tuple(sum(tables[name][option][k] for name, option in plan.items()) for k in (0, 1))


@given(st.data())
def test_an_allocation_is_the_best_of_all(data):
    costs, errors = st.integers(0, 30), st.floats(0, 1, allow_subnormal=False)
    table = st.dictionaries(
        st.sampled_from([None, 1, 2, 3, 4]), st.tuples(costs, errors), min_size=1
    )
    tables = data.draw(st.dictionaries(st.sampled_from("abcd"), table, min_size=1))
    plans = [cost_and_error(tables, dict(zip(tables, c))) for c in product(*tables.values())]
    least = min(cost for cost, _ in plans)
    budget = least + data.draw(st.integers(0, 60))
    found = lrf.allocate_ranks(tables, budget)
    cost, error = cost_and_error(tables, found)
    assert list(found) == list(tables) and cost <= budget
    assert error == pytest.approx(min(e for c, e in plans if c <= budget), rel=1e-12, abs=1e-12)


def falling(size, count, seed):
    """A layer's table with costs in steps, and errors that fall ever more slowly."""
    errors = matrix(count, seed=seed).abs().sort(descending=True)[0] ** 3
    return {r: (size * r, error) for r, error in enumerate(errors.tolist(), start=1)}


def test_costs_in_fractions_never_exceed_the_budget():
    tables = {k: falling(7.3 + k / 3, 20, k) for k in range(6)}
    whole = {
        k: {r: (round(3 * 1000 * c), e) for r, (c, e) in t.items()} for k, t in tables.items()
    }
    for budget in (60.1, 200.0, 555.5, 1e9):
        cost, error = cost_and_error(tables, lrf.allocate_ranks(tables, budget))
        best = cost_and_error(whole, lrf.allocate_ranks(whole, 3000 * budget))[1]
        assert cost <= budget and error <= best * 1.01
    tiny = {"a": {1: (0, 1.0), 2: (1, 0.5)}, "b": {1: (0, 1.0), 2: (10**9, 0.0)}}
    assert lrf.allocate_ranks(tiny, 10**9) == {"a": 1, "b": 2}, "a step of less than a unit"


def test_many_layers_share_a_budget_in_coarser_units():
    tables = {k: falling(1000 + 7 * (k % 5), 300, k) for k in range(25)}
    for budget in (500_000, 5_000_000):
        cost, error = cost_and_error(tables, lrf.allocate_ranks(tables, budget))
        assert 0.99 * budget < cost <= budget
        price = np.array([1e-9, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3])
        bounds = [
            sum(min(e + p * c for c, e in t.values()) for t in tables.values()) for p in price
        ]
        assert error >= max(bounds - price * budget) - 1e-9, "no less than Lagrange's bound"


def test_budgets_at_the_edges():
    tables = {"a": {1: (3, 2.0), 2: (5, 1.0), None: (9, 0.0)}, "b": {1: (2, 5.0), None: (4, 0.0)}}
    dense = {"a": None, "b": None}
    for budget in (13, math.inf, 1e30):
        assert lrf.allocate_ranks(tables, budget) == dense
    for budget in (5, 6.999):
        assert lrf.allocate_ranks(tables, budget) == {"a": 1, "b": 1}
    assert lrf.allocate_ranks(tables, np.int64(7)) == {"a": 1, "b": None}
    assert lrf.allocate_ranks({}, 0) == {}
    raises(ValueError, "too small: the cheapest options cost 5", lrf.allocate_ranks, tables, 4)


@pytest.mark.parametrize("cost", ["weights", "macs"])
def test_options_say_what_a_pair_costs_and_leaves(cost):
    model, x = seeded(cnn), matrix(20, 2, 6, 6)
    known = lrf.collect_statistics(model, x)
    tables = lrf.rank_options(model, known, cost=cost)
    few = lrf.rank_options(model, known, cost=cost, multiple_of=2)
    for name, table in tables.items():
        layer, calls = model.get_submodule(name), 1 if cost == "weights" or name == "5" else 9
        m, n = layer.weight.flatten(1).shape
        errors = lrf.truncation_errors(layer, known[name])
        ranks = range(1, lrf.break_even_rank(m, n) + 1)
        assert table[None] == (calls * m * n, 0) and list(table) == [None, *ranks]
        assert all(table[r] == (calls * r * (m + n), errors[r].item()) for r in ranks)
        assert few[name] == {r: table[r] for r in (None, *ranks[1::2])}
    budget = 0.6 * sum(table[None][0] for table in tables.values())
    result = lrf.factorize(model, lrf.allocate_ranks(tables, budget), known)
    weights = sum(p.numel() for p in result.parameters() if p.ndim > 1)
    assert (weights if cost == "weights" else lrf.count_macs(result, x[:1])) <= budget
    assert list(lrf.rank_options(model)) == ["0", "2", "5"]
    raises(ValueError, "cost must be", lrf.rank_options, model, known, cost="flops")
    raises(ValueError, "cost must be", lrf.rank_options, model, cost="macs")


def test_a_shared_layer_counts_once_in_weights_and_per_call_in_macs():
    model, x = seeded(Residual), matrix(9, 6)
    known = lrf.collect_statistics(model, x)
    assert lrf.rank_options(model, known)["stem"][None] == (36, 0)
    tables = lrf.rank_options(model, known, cost="macs")
    assert tables["stem"][None] == (72, 0)
    assert sum(t[None][0] for t in tables.values()) == lrf.count_macs(model, x[:1])


def test_the_error_with_a_loss_is_twice_its_change():
    """Where the rows of an input are independent: five random tokens, added up."""

    class Sum(nn.Sequential):
        def forward(self, x):
            return super().forward(x).sum(1)

    model, x = seeded(Sum, nn.Linear(6, 4)), matrix(4000, 5, 6) / 3
    nn.init.zeros_(model[0].bias)
    how = {"loss": "classes", "temperature": 1.0, "damping": 1e-9}
    known = lrf.collect_statistics(model, x, **how)
    log_p, log_q = (m(x).log_softmax(1) for m in (model, lrf.factorize(model, {"0": 2}, known)))
    twice = 2 * (log_p.exp() * (log_p - log_q)).sum(1).mean().item()
    assert lrf.truncation_errors(model[0], known["0"])[2].item() == pytest.approx(twice, rel=0.1)


# --- Counting ------------------------------------------------------------------------------------


def test_accuracy_is_the_fraction_of_correct_largest_logits():
    logits = torch.tensor([[3.0, 1, 2], [-3, -1, -2], [0, 0, 0.1], [5, 4, 4], [0, 9, 8]])
    for labels, fraction in [
        ([0, 1, 2, 0, 1], 1.0),
        ([0, 1, 2, 0, 2], 0.8),
        ([1, 2, 0, 1, 2], 0.0),
    ]:
        for size in (1, 2, 9):
            assert lrf.accuracy(nn.Identity(), logits, torch.tensor(labels), size) == fraction

    class Named(nn.Identity):
        def forward(self, x):
            return SequenceClassifierOutput(logits=x)

    assert lrf.accuracy(Named(), logits, torch.tensor([0, 1, 2, 0, 2])) == 0.8


def test_accuracy_and_sweep_refuse_other_shapes():
    x, y = torch.ones(3, 4), torch.zeros(3)

    def sweep(model, x, y):
        return lrf.rank_sweep(nn.Sequential(nn.Linear(4, 4), model), "0", x, y)

    for function in (lrf.accuracy, sweep):
        for shape in ((3, 4, 1), (3, 1), (3,), (2, 4)):
            model = nn.Identity()
            model.forward = lambda x, shape=shape: torch.zeros(shape)
            raises(ValueError, f"without NaN, got shape {shape}", function, model, x, y)
        for bad_x, bad_y in [(x[:0], y[:0]), (x, y[:2]), (x, y[:, None])]:
            raises(ValueError, "a label for each", function, nn.Identity(), bad_x, bad_y)
        raises(TypeError, "must be a tensor of inputs, got a dict", function, nn.Identity(), {}, y)
    raises(ValueError, "without NaN", lrf.accuracy, nn.Identity(), math.nan * x, y)


class Doubled(nn.Sequential):
    """A subclass of nn.Sequential that computes something else."""

    def forward(self, x):
        return nn.Sequential.forward(self, x) + nn.Sequential.forward(self, -2 * x).flip(1)


def tanh_net(change=None):
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4))
    if change is not None:
        change(model)
    return model


def repeated():
    layer = nn.Linear(6, 6)
    return nn.Sequential(layer, nn.ReLU(), nn.Sequential(layer, nn.ReLU()), nn.Linear(6, 4))


def on_images():
    return nn.Sequential(nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 3, 2), nn.Flatten())


def on_tokens():
    return nn.Sequential(
        nn.Unflatten(1, (3, 2)), nn.Linear(2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(6, 4)
    )


SWEPT = {
    "first of two": (tanh_net, "0"),
    "in place behind": (mlp, "0"),
    "nested": (lambda: nn.Sequential(nn.Sequential(nn.Linear(6, 6)), nn.Linear(6, 4)), "0.0"),
    "used twice": (repeated, "0"),
    "subclass": (lambda: Doubled(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4)), "0"),
    "hook": (lambda: tanh_net(lambda m: m.register_forward_hook(lambda m, x, y: y.flip(1))), "0"),
    "residual": (Residual, "stem"),
    "convolution": (on_images, "1"),
    "tokens": (on_tokens, "1"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "name"), SWEPT.values(), ids=SWEPT)
def test_a_sweep_is_factorizing_rank_by_rank(make, name):
    model = seeded(make)
    x, y = 2 * matrix(300, 6), torch.arange(300) % 4
    before, full = snapshot(model), min(model.get_submodule(name).weight.flatten(1).shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ranks that save nothing
        networks = {r: lrf.factorize(model, {name: r}) for r in range(1, full + 1)}
    expected = {r: lrf.accuracy(network, x, y) for r, network in networks.items()}
    assert len(set(expected.values())) > 1, "a test in which the ranks differ"
    for how in ({}, {"batch_size": 128}):
        assert list(lrf.rank_sweep(model, name, x, y, **how).items()) == list(expected.items())
    some = lrf.rank_sweep(model, name, x, y, [2, 1, np.int64(2)])
    assert some == {1: expected[1], 2: expected[2]}
    assert_unchanged(model, before)


def test_a_sweep_in_half_precision():
    model, x, y = seeded(mlp).bfloat16(), matrix(300, 6).bfloat16(), torch.arange(300) % 4
    expected = {r: lrf.accuracy(lrf.factorize(model, {"2": r}), x, y) for r in range(1, 5)}
    assert lrf.rank_sweep(model, "2", x, y) == expected


MACS = {
    "linear": (nn.Linear(5, 3), [(1, 5)], 15),
    "pair": (lrf.factorize_layer(nn.Linear(5, 3), 2), [(2, 5)], 32),
    "convolution": (nn.Conv2d(1, 2, 3), [(1, 1, 8, 8)], 648),
    "grouped": (nn.Conv2d(4, 4, 3, groups=4), [(1, 4, 5, 5)], 4 * 9 * 9),
    "attention": (nn.MultiheadAttention(8, 2), [(5, 1, 8)] * 3, 4 * 5 * 64 + 2 * 25 * 8),
    "encoder": (
        nn.TransformerEncoderLayer(16, 4, 32, batch_first=True),
        [(3, 7, 16)],
        21 * (4 * 256 + 2 * 512) + 3 * 2 * 49 * 16,
    ),
    "ResNet-18": (resnet18(), [(1, 3, 224, 224)], 1_814_073_344),
}


@pytest.mark.parametrize(("module", "shapes", "macs"), MACS.values(), ids=MACS)
def test_macs_are_those_of_one_pass(module, shapes, macs):
    before, fast = snapshot(module), torch.backends.mha.get_fastpath_enabled()
    got = lrf.count_macs(module, *(torch.zeros(shape) for shape in shapes))
    assert got == macs and type(got) is int
    assert_unchanged(module, before)
    assert torch.backends.mha.get_fastpath_enabled() == fast


def test_recurrent_layers_are_not_counted_as_nothing():
    given = nn.LSTM(3, 4), torch.zeros(2, 1, 3)
    raises(ValueError, "cannot count recurrent layers", lrf.count_macs, *given)


# --- What comes after ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_cnn():
    model = seeded(cnn).float()
    split = lrf_convs.split_conv(model[0], "Tucker-2", (3, 2))
    return lrf.factorize(model, {"0": split, "2": 2, "5": 2}), matrix(3, 2, 6, 6).float()


def test_a_factorized_model_can_be_copied_pickled_and_trained(small_cnn):
    model, x = small_cnn
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for same in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        torch.testing.assert_close(same(x), model(x), rtol=0, atol=0)
        same(x).sum().backward()
        assert all(p.grad is not None for p in same.parameters())
        assert same.load_state_dict(model.state_dict()).missing_keys == []


def test_a_factorized_model_can_be_exported_and_compiled(small_cnn):
    class Asks(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            last = self.net[5]
            return self.net(x.to(last.weight.dtype))

    with torch.no_grad():
        model, x = Asks(small_cnn[0]), small_cnn[1]
        torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), model(x))


def fresh(kind, tied, dense):
    if kind == "the dense model":
        return dense
    if kind == "fresh":
        return llama(tied)
    with torch.device("meta"):
        return llama(tied)


@pytest.mark.parametrize("kind", ["the dense model", "fresh", "meta"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_language_model_loads_into_any_model(kind, tied, tmp_path):
    dense, ids = llama(tied), torch.arange(5, 15)[None]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = lrf.layer_names(dense)
    known = lrf.collect_statistics(dense, [ids], names)
    small = lrf.factorize(dense, dict.fromkeys(names, 9), known, add_bias=True)
    lrf.save_factorized(small, tmp_path / "small.safetensors")
    model = fresh(kind, tied, dense)
    before = [(id(p), p.shape) for p in model.parameters()]
    back = lrf.load_factorized(model, tmp_path / "small.safetensors")
    assert before == [(id(p), p.shape) for p in model.parameters()]
    torch.testing.assert_close(back(ids).logits, small(ids).logits, rtol=0, atol=0)
    assert (back.lm_head.weight is back.model.embed_tokens.weight) == tied
    assert lrf.count_parameters(back) == lrf.count_parameters(small)
    assert [p.requires_grad for p in back.parameters()] == [
        p.requires_grad for p in small.parameters()
    ]
    assert list(back.state_dict()) == list(small.state_dict()) and not back.training
    torch.testing.assert_close(
        back.generate(ids, max_new_tokens=3), small.generate(ids, max_new_tokens=3)
    )


def test_saved_convolutions_load_and_nothing_is_decomposed(small_cnn, tmp_path, monkeypatch):
    model, x = small_cnn
    path = tmp_path / "small.safetensors"
    lrf.save_factorized(model, path)
    monkeypatch.setattr(torch.linalg, "svd", None)
    back = lrf.load_factorized(cnn().bfloat16(), path)
    assert {p.dtype for p in back.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(lrf.load_factorized(cnn().eval(), path)(x), model(x))
    assert back[0].weight.shape == (5, 2, 3, 3) and [p.name for p in tmp_path.iterdir()] == [
        path.name
    ]


def test_wrong_models_and_damaged_files_are_refused(tmp_path):
    model, path = mlp(), tmp_path / "small.safetensors"
    lrf.save_factorized(lrf.factorize(model, {"0": 2}), path)
    for other, text in [
        (nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 4)), "'0' should have (5, 6)"),
        (nn.Sequential(nn.ReLU()), "'0' should have (5, 6)"),
        (
            nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)),
            "'2.weight' should have (3, 5)",
        ),
        (nn.Sequential(nn.Linear(6, 5), nn.ReLU()), "it has no ['2.bias', '2.weight']"),
        (nn.Sequential(*mlp(), nn.Linear(4, 4)), "'3.weight' should have (4, 4), has nothing"),
    ]:
        before = snapshot(other)
        raises(ValueError, text, lrf.load_factorized, other, path)
        assert_unchanged(other, before)
    raises(FileNotFoundError, "absent", lrf.load_factorized, model, tmp_path / "absent")
    content = path.read_bytes()
    path.write_bytes(content[:-9])
    raises(ValueError, "is damaged, or is no safetensors file", lrf.load_factorized, model, path)
    save_file(model.state_dict(), path)
    raises(ValueError, "was not written by save_factorized", lrf.load_factorized, model, path)
    with torch.device("meta"):
        raises(ValueError, "holds no numbers to save", lrf.save_factorized, mlp(), path)
    assert lrf.load_factorized is not None and path.exists()


def test_from_pretrained_is_a_trap_and_load_factorized_is_not(tmp_path):
    """Transformers builds the dense model, and fills what the file lacks with random numbers."""
    dense, ids = llama(), torch.arange(5, 15)[None]
    names = [name for name in lrf.layer_names(dense) if name != "lm_head"]
    small = lrf.factorize(dense, dict.fromkeys(names, 8))
    small.save_pretrained(tmp_path)
    lrf.save_factorized(small, tmp_path / "factorized.safetensors")
    wrong = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert (wrong(ids).logits - small(ids).logits).norm() > 0.05 * small(ids).logits.norm()
    assert type(wrong.model.layers[0].mlp.up_proj) is nn.Linear
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    with torch.device("meta"):
        empty = transformers.AutoModelForCausalLM.from_config(config).eval()
    right = lrf.load_factorized(empty, tmp_path / "factorized.safetensors")
    torch.testing.assert_close(right(ids).logits, small(ids).logits)


def test_a_layer_under_two_names_is_not_counted_twice():
    layer = nn.Linear(8, 8)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    statistics = lrf.collect_statistics(model, torch.randn(20, 8), ["0", "2"])
    with pytest.raises(ValueError, match="share a weight"):
        lrf.rank_options(model, statistics)
