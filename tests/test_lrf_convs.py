"""Low-rank convolutions: exact at full rank, optimal where a theorem says so, repaired."""

import copy

import pytest
import torch
import torchvision.models as zoo
import transformers
from torch import nn
from torch.fx.experimental.optimization import fuse

import lrf_utils as lrf
from lrf_convs import SCHEMES, full_rank, refit, split_conv

GEOMETRIES = [
    {},
    {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)},
    {"stride": 2, "padding": (2, 0), "bias": False},
    {"padding": "same", "dilation": 2},
    {"padding": "valid"},
]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def half(layer, scheme):
    full = full_rank(layer, scheme)
    return tuple(max(1, r // 2) for r in full) if isinstance(full, tuple) else max(1, full // 2)


def net():
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(12, 16, 3, padding=1, bias=False),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 5),
    ).eval()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_full_rank_is_the_layer(scheme, geometry):
    layer = nn.Conv2d(6, 8, (3, 5), **geometry).double().eval().requires_grad_(False)
    x = torch.randn(2, 6, 11, 17)
    before = copy.deepcopy(layer.state_dict())
    parts = split_conv(layer, scheme, full_rank(layer, scheme))
    torch.testing.assert_close(parts(x.double()), layer(x.double()))
    assert type(parts) is lrf.LowRank and parts.weight.shape == layer.weight.shape
    assert parts.stride == layer.stride
    assert len(parts) == (3 if scheme == "Tucker-2" else 2)
    assert [part.bias is not None for part in parts] == [False] * (len(parts) - 1) + [
        layer.bias is not None
    ]
    assert not any(part.training or part.weight.requires_grad for part in parts)
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_shapes_and_costs(scheme):
    layer, x = nn.Conv2d(6, 8, (3, 5), stride=2, padding=(1, 2)), torch.zeros(1, 6, 8, 12)
    parts = split_conv(layer, scheme, (4, 2) if scheme == "Tucker-2" else 2)
    shapes = {
        "out": [(2, 6, 3, 5), (8, 2, 1, 1)],
        "in": [(2, 6, 1, 1), (8, 2, 3, 5)],
        "spatial": [(2, 6, 3, 1), (8, 2, 1, 5)],
        "depthwise": [(12, 1, 3, 5), (8, 12, 1, 1)],
        "Tucker-2": [(2, 6, 1, 1), (4, 2, 3, 5), (8, 4, 1, 1)],
    }
    macs = {  # 96 positions go in, 24 come out, and 48 lie between the halves of "spatial"
        "out": 24 * (180 + 16),
        "in": 96 * 12 + 24 * 240,
        "spatial": 48 * 36 + 24 * 80,
        "depthwise": 24 * (180 + 96),
        "Tucker-2": 96 * 12 + 24 * (120 + 32),
    }
    assert [tuple(part.weight.shape) for part in parts] == shapes[scheme]
    assert lrf.count_macs(parts, x) == macs[scheme]
    assert parts(x).shape == layer(x).shape
    assert parts.training and all(part.weight.requires_grad for part in parts)


def weight_of(parts, layer):
    """The product of the parts: what they make of single ones amid a large image of zeros."""
    n, (h, w) = layer.in_channels, layer.kernel_size
    x = torch.eye(n).view(n, n, 1, 1).to(layer.weight)
    x = nn.functional.pad(x, (w - 1, w - 1, h - 1, h - 1))
    return (parts(x) - parts(torch.zeros_like(x))).transpose(0, 1).flip(2, 3)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_error_is_the_tail_of_the_matrix(scheme):
    layer = nn.Conv2d(6, 8, (3, 5)).double()
    W, r = layer.weight.detach(), half(layer, scheme)
    error = (weight_of(split_conv(layer, scheme, r), layer) - W).square().sum()
    matrices = {
        "out": [W.flatten(1)],
        "in": [W.transpose(0, 1).flatten(1)],
        "spatial": [W.permute(1, 2, 0, 3).reshape(18, 40)],
        "depthwise": list(W.transpose(0, 1).flatten(2)),
        "Tucker-2": [W.flatten(1), W.transpose(0, 1).flatten(1)],
    }[scheme]
    ranks = r if scheme == "Tucker-2" else [r] * len(matrices)
    tails = [torch.linalg.svdvals(matrix).square()[k:].sum() for matrix, k in zip(matrices, ranks)]
    if scheme == "Tucker-2":  # De Lathauwer et al. (2000), doi:10.1137/S0895479896305696
        assert max(tails) <= error <= sum(tails)
    else:
        torch.testing.assert_close(error, sum(tails))


def test_a_clip_reads_the_dtype_of_its_patches():
    """And layer_names does not offer the parts of what is split."""
    config = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        image_size=16, patch_size=8,
    )  # fmt: skip
    clip, x = transformers.CLIPVisionModel(config).eval(), torch.randn(1, 3, 16, 16)
    name = next(name for name in lrf.layer_names(clip) if "patch_embedding" in name)
    full = split_conv(clip.get_submodule(name), "out", 16)
    small = lrf.factorize(clip, {name: full})
    assert not any(name in each for each in lrf.layer_names(small))
    with torch.no_grad():
        torch.testing.assert_close(
            small(x).pooler_output, clip(x).pooler_output, rtol=1e-3, atol=1e-4
        )


def test_tucker_is_better_than_two_separate_bases():
    layer = nn.Conv2d(6, 8, 3).double()
    W = layer.weight.detach()
    U, V = (torch.linalg.svd(M)[0] for M in (W.flatten(1), W.transpose(0, 1).flatten(1)))
    hosvd = torch.einsum("oihw,oa,pa,ib,jb->pjhw", W, U[:, :3], U[:, :3], V[:, :2], V[:, :2])
    ours = weight_of(split_conv(layer, "Tucker-2", (3, 2)), layer)
    assert (ours - W).norm() < (hosvd - W).norm()


@pytest.mark.parametrize(
    ("layer", "scheme", "rank", "error", "words"),
    [
        (nn.Conv2d(6, 8, 3), "in", 7, ValueError, "the rank of in .* must be from 1 to 6, got 7"),
        (nn.Conv2d(6, 8, 3), "out", 0, ValueError, "must be from 1 to 8, got 0"),
        (nn.Conv2d(6, 8, 3), "out", 2.0, TypeError, "must be an int, got 2.0"),
        (nn.Conv2d(6, 8, 3), "Tucker-2", (8, 7), ValueError, "must be from 1 to 6, got 7"),
        (nn.Conv2d(6, 8, 3), "Tucker-2", 3, TypeError, r"a pair \(out, in\); got 3"),
        (nn.Conv2d(6, 8, 3), "Tucker-2", (3,), TypeError, r"a pair \(out, in\)"),
        (nn.Conv2d(6, 8, 3), "in", (3, 3), TypeError, r"must be an int, got \(3, 3\)"),
        (nn.Conv2d(6, 8, 3), "CP", 3, ValueError, "one of out, in, .* Tucker-2; got 'CP'"),
        (nn.Conv2d(6, 8, 3, groups=2), "in", 3, ValueError, "in 2 groups"),
        (nn.Conv2d(6, 8, 3, padding_mode="reflect"), "in", 3, ValueError, "_mode='reflect'"),
        (nn.Conv2d(6, 8, 2, padding="same"), "in", 3, ValueError, "the same on both sides"),
        (nn.Linear(6, 8), "in", 3, TypeError, "only an nn.Conv2d can be split, got a Linear"),
    ],
)
def test_bad_input_is_named(layer, scheme, rank, error, words):
    with pytest.raises(error, match=words):
        split_conv(layer, scheme, rank)


def truncated(model, scheme="spatial"):
    layers = {name: model.get_submodule(name) for name in "02"}
    split = {name: split_conv(c, scheme, half(c, scheme)) for name, c in layers.items()}
    return lrf.factorize(model, split)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_refit_gives_the_best_last_part(scheme):
    """On its own inputs no other weight and bias of the last part comes closer."""
    model, x = net().double(), torch.randn(60, 3, 12, 12).double()
    small = truncated(model, scheme)
    fitted = refit(model, small, x, ["0"], ridge=1e-12)
    parts, target = fitted[0], model[0](x).detach()
    (target - parts(x)).square().sum().backward()
    for p in (parts[-1].weight, parts[-1].bias):
        assert p.grad.abs().max() < 1e-6 * target.square().sum()
    before = (target - small[0](x)).square().sum()
    assert (target - parts(x)).square().sum() < 0.999 * before


def test_refit_sees_what_the_compressed_network_feeds():
    model, x = net().double(), torch.randn(60, 3, 12, 12).double()
    small = truncated(model)
    fitted = refit(model, small, x)
    again = refit(model, fitted, x, ["2"])  # fitted after the first: nothing is left to do
    torch.testing.assert_close(again[2][-1].weight, fitted[2][-1].weight, rtol=0, atol=1e-3)
    apart = refit(model, small, x, ["2"])  # as if the first were not fitted: another answer
    assert (apart[2][-1].weight - fitted[2][-1].weight).abs().max() > 1e-2
    assert fitted[2][-1].bias is None and torch.equal(fitted[6].weight, model[6].weight)


def test_refit_changes_only_its_copy_and_reads_any_batches():
    model, x = net(), torch.randn(60, 3, 12, 12)
    small = truncated(model)
    before = copy.deepcopy([model.state_dict(), small.state_dict()])
    whole = refit(model, small, x, ["0", "2", "6"])
    pairs = ((batch, None) for batch in x.split(7))
    parts = refit(model, small, pairs, ["6", "0", "2"], inputs_of=lambda batch: batch[0])
    for ours, theirs in zip(whole.parameters(), parts.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    for now, then in zip([model.state_dict(), small.state_dict()], before):
        assert all(torch.equal(now[key], then[key]) for key in then)
    assert not whole.training and not any(module._forward_hooks for module in model.modules())


def test_with_few_inputs_the_old_weight_stays():
    """One image of zeros says nothing about the weight: only the bias follows."""
    model = net().double()
    small = truncated(model)
    fitted = refit(model, small, torch.zeros(1, 3, 12, 12).double(), ["0"])
    torch.testing.assert_close(fitted[0][-1].weight, small[0][-1].weight)


def test_refit_through_skip_connections():
    network, x = fuse(zoo.resnet18(weights=None).eval()), torch.randn(6, 3, 32, 32)
    convs = [k for k in lrf.layer_names(network) if k.startswith("layer1")]
    split = {k: split_conv(network.get_submodule(k), "spatial", 24) for k in convs}
    small = lrf.factorize(network, split)
    sums = {f"layer1.{k}.conv2": f"layer1.{k}.relu" for k in (0, 1)}
    fitted, fresh = refit(network, small, x, sums=sums), torch.randn(6, 3, 32, 32)
    with torch.no_grad():
        errors = [(other(fresh) - network(fresh)).square().mean() for other in (small, fitted)]
    assert errors[1] < 0.5 * errors[0]


class Residual(nn.Module):
    """What comes in is already off, since a layer before the shortcut is truncated, too."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)  # called twice; the sum comes last

    def forward(self, x):
        x = self.relu(self.first(x))
        return self.relu(self.second(x) + x)


def residual():
    model, x = Residual().double().eval(), torch.randn(40, 3, 10, 10).double()
    parts = {name: split_conv(model.get_submodule(name), "in", 2) for name in ("first", "second")}
    return model, lrf.factorize(model, parts), x


def the_sum(network, x):
    x = network.first(x).relu()
    return network.second(x) + x


def test_refit_corrects_what_the_shortcut_got_wrong():
    model, small, x = residual()
    fitted = refit(model, small, x, sums={"second": "relu"}, ridge=1e-12)
    target, parts = the_sum(model, x).detach(), fitted.second
    (target - the_sum(fitted, x)).square().sum().backward()
    for p in (parts[-1].weight, parts[-1].bias):  # no other last part comes closer
        assert p.grad.abs().max() < 1e-6 * target.square().sum()
    alone = refit(model, small, x, ridge=1e-12)
    errors = [(target - the_sum(other, x)).square().sum() for other in (fitted, alone)]
    assert errors[0] < 0.98 * errors[1]


def test_refit_reads_as_many_positions_as_it_is_told():
    model, small, x = residual()
    how = {"sums": {"second": "relu"}}
    whole, again = (refit(model, small, x, positions=n, **how) for n in (None, 64))  # 8 × 8
    some = refit(model, small, x, positions=16, **how)
    torch.testing.assert_close(again.second[-1].weight, whole.second[-1].weight)
    assert not torch.equal(some.second[-1].weight, whole.second[-1].weight)
    target = the_sum(model, x)
    errors = [(target - the_sum(other, x)).square().sum() for other in (whole, some)]
    assert errors[0] < errors[1] < 1.05 * errors[0]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"batches": torch.empty(0, 3, 12, 12)}, ValueError, "at least one input"),
        ({"batches": []}, ValueError, "empty"),
        ({"names": ["9"]}, KeyError, "no module '9'"),
        ({"ridge": 0.0}, ValueError, "ridge must be positive, got 0.0"),
        ({"names": ["1"]}, TypeError, "'1' is a ReLU"),
    ],
)
def test_refit_names_what_is_wrong(change, error, words):
    model = net()
    arguments = {"batches": torch.randn(4, 3, 12, 12), "names": None} | change
    with pytest.raises(error, match=words):
        refit(model, truncated(model), **arguments)
