"""Lesson 8's residual network: what the experiment and the example compute with."""

import pandas as pd
import pytest
import torch
from torch import nn

import lrf_utils as lrf
import notebook_utils as nb
from experiments import models, resnet


@pytest.fixture(scope="module")
def network():
    """A tiny one whose BatchNorm has seen images, folded; and images."""
    torch.manual_seed(0)
    model, x = models.make_resnet((6, 8, 12, 6)), torch.randn(40, 1, 28, 28)
    with torch.no_grad():
        model(x)
    return model.eval(), models.fold(model), x


def test_folding_changes_nothing_and_parts_take_over_the_norm(network):
    model, folded, x = network
    assert not any(isinstance(part, nn.BatchNorm2d) for part in folded.modules())
    torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-5)
    name = "block2.branch.conv2"
    split = {name: models.split(model.get_submodule(name), "spatial", 18)}  # its full rank
    small = models.fold(lrf.factorize(model, split))
    assert len(small.get_submodule(name)) == 2
    torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-5)


def test_sums_are_found(network):
    last = {1: "branch.conv2", 2: "branch.conv3", 3: "branch.conv3", 4: "branch.conv3"}
    expected = {f"block{k}.{name}": f"block{k}.relu" for k, name in last.items()}
    expected |= {f"block{k}.shortcut.conv": f"block{k}.relu" for k in (1, 2)}
    assert models.residual_sums(network[1]) == expected


@pytest.mark.parametrize("seed", (None, 1))
def test_rescaled_channels_compute_the_same(network, seed):
    _, folded, x = network
    other = models.rescaled(folded, seed)
    torch.testing.assert_close(other(x), folded(x), rtol=1e-4, atol=1e-5)
    weights = (net.block1.branch.conv1.weight for net in (other, folded))
    assert not torch.allclose(*weights)


def test_recalibrated_channels_have_the_same_mean_and_deviation(network):
    _, folded, x = network
    name = "block1.branch.conv1"
    layer = folded.get_submodule(name)
    small = lrf.factorize(folded, {name: models.split(layer, "out", 2)})
    fitted = models.recalibrated(folded, small, x, [name])
    read = folded[:2](x)
    ours, theirs = (part(read) for part in (fitted.get_submodule(name), layer))
    torch.testing.assert_close(ours.mean((0, 2, 3)), theirs.mean((0, 2, 3)), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(ours.std((0, 2, 3)), theirs.std((0, 2, 3)), rtol=1e-3, atol=1e-5)


def error_after_least_squares(layer, parts, statistics):
    """One option at a time, as ``models.split_options`` defines its error."""
    W, C = layer.weight.detach().double().flatten(1), statistics.covariance()
    P = models.features(layer, parts)
    PCP = P.T @ C @ P
    PCP.diagonal().add_(1e-5 * PCP.diagonal().mean())
    lost = W - torch.linalg.solve(PCP, P.T @ C @ W.T).T @ P.T
    return (statistics.metric * (lost @ C @ lost.T)).sum().item()


def test_options_agree_with_parts_that_are_built(network):
    _, folded, x = network
    names = ["block1.branch.conv2", "block1.shortcut.conv", "block2.branch.conv2"]
    statistics = lrf.collect_statistics(folded, x, names, loss="classes")
    options = models.split_options(folded, statistics, x[:1], resnet.candidates)
    shapes = models.input_shapes(folded, x[:1], names)
    schemes = set()
    for name in names:
        layer, whole = folded.get_submodule(name), options[name].pop(None)
        assert whole == (lrf.count_macs(layer, torch.zeros(shapes[name])), 0.0)
        for (scheme, rank), (macs, error) in list(options[name].items())[::3]:
            schemes.add(scheme)
            parts = models.split(layer, scheme, rank)
            assert macs == lrf.count_macs(parts, torch.zeros(shapes[name])) < whole[0]
            expected = error_after_least_squares(layer, parts, statistics[name])
            assert error == pytest.approx(expected, rel=1e-3, abs=1e-9)
    assert schemes >= {"out", "in", "spatial", "Tucker-2", "CP"}


def test_cp_finds_a_sum_of_few_terms_and_keeps_the_geometry():
    torch.manual_seed(0)
    layer = nn.Conv2d(5, 7, (3, 2), stride=(2, 1), padding=(1, 0))
    with torch.no_grad():
        layer.weight.copy_(torch.einsum("or,ir,hwr->oihw", *map(torch.randn, *zip((7, 3), (5, 3))),
                                        torch.randn(3, 2, 3)))  # fmt: skip
    x, parts = torch.randn(2, 5, 9, 8), models.split_cp(layer, 3, ridge=1e-9, sweeps=300)
    error = (parts(x) - layer(x)).norm() / layer(x).norm()
    assert error < 0.05 and parts(x).shape == layer(x).shape
    many = models.split_cp(layer, 20, ridge=1e-2, sweeps=2000)  # most terms vanish
    assert many[0].weight.count_nonzero() < many[0].weight.numel()
    assert all(part.weight.isfinite().all() for part in many)


def test_narrower_networks_have_the_same_macs():
    x = torch.zeros(1, 1, 28, 28)
    total = lrf.count_macs(models.make_resnet(), x)
    for parts, widths in resnet.NARROW.items():
        assert lrf.count_macs(models.make_resnet(widths), x) == pytest.approx(
            total / parts, rel=0.01
        )
    assert lrf.count_parameters(models.make_resnet()) == 276_458


def test_plans_keep_to_the_budget_and_a_repair_helps(network):
    model, folded, x = network
    data = nb.Dataset(x, torch.zeros(len(x), dtype=torch.long), x, None)
    nets = resnet.ResnetNetworks(data, 0)
    nets.dense = model
    nets.all_options = nets.options(folded, ("spatial", "Tucker-2"))
    for plan in (nets.uniform(2, "spatial"), nets.allocated(2)):
        networks = [nets.truncated(plan), nets.recalibrated(plan), nets.repaired(plan)]
        macs = {lrf.count_macs(small, x[:1]) for small in networks}
        assert len(macs) == 1 and 0.8 * nets.total / 2 < macs.pop() <= nets.total / 2
        with torch.no_grad():
            target = folded[:-1](x)  # what goes into the classifier
            errors = [(small[:-1](x) - target).square().mean() for small in networks]
        assert errors[2] < errors[0]
        assert nets.raw(plan)(x).shape == nets.raw(plan, repair=True)(x).shape == (len(x), 10)
    assert nets.uniform(1000, "spatial") is None


def committed(name):
    return pd.read_csv(nb.ROOT / "results" / f"{name}.csv", dtype={"accuracy (%)": float})


def test_each_row_that_is_trained_has_a_run():
    nets = resnet.ResnetNetworks(nb.load_fashion_mnist(), 0)
    tables = {"resnet": resnet.PARTS, "resnet_validation": resnet.CHOICES}
    for name, parts in tables.items():
        trained = [make for key, make in parts.items() if key not in ("untrained", "gauge")]
        rows = committed(name)["method"]
        runs = {method for make in trained for method, _ in make(nets)}
        assert set(rows[rows.str.contains("epoch")]) == runs


def test_committed_plans_and_networks_agree_with_the_table():
    data = nb.load_fashion_mnist()
    nets, rows = resnet.ResnetNetworks(data, 0), committed("resnet").query("seed == 0")
    for method, make in {
        f"dense, {resnet.EPOCHS} epochs": lambda: nets.dense,
        "allocated, 1/8, least squares": lambda: nets.repaired(resnet.read_plan(8, "allocated")),
    }.items():
        row = resnet.measure(make, data)
        was = rows.set_index("method").loc[method]
        assert float(row["accuracy (%)"]) == pytest.approx(was["accuracy (%)"], abs=0.05)
        assert (row["parameters"], row["MACs"]) == (was["parameters"], was["MACs"])


def test_a_factorized_network_is_trained_with_norms_that_are_folded_again():
    few = nb.Dataset(*(part[:256] for part in nb.load_fashion_mnist()))
    nets = resnet.ResnetNetworks(few, 0)
    small = nets.repaired(resnet.read_plan(8, "spatial"))
    norms = models.with_norms(small, nets.calibration)
    with torch.no_grad():
        torch.testing.assert_close(norms(few.x_test), small(few.x_test), rtol=1e-3, atol=1e-3)
    trained = models.fold(nets.fit(norms, epochs=1, rate=1e-3))
    assert lrf.count_macs(trained, few.x_test[:1]) == lrf.count_macs(small, few.x_test[:1])
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in trained.modules())
