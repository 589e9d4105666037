"""One network made smaller: what stays, what is merged, and what a refit gives back."""

import copy
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fxfuse
from fxfuse.errors import ArgumentError, FusionWarning
from fxfuse.graph.verify import lint
from fxfuse.refit import LeastSquares
from fxfuse.width import activation, magnitude, taylor
from tests.support.definitions import intra_fusion, outputs_of
from tests.support.nets import Tokens, build, data_shape, gap, mlp, outputs, random_nets, randomise
from tests.support.sweeps import some

IMAGES, OTHER = torch.randn(2, 3, 8, 8), torch.randn(3, 3, 8, 8)
PLAIN = {"importance": magnitude, "merge": False, "refit": None}


@pytest.mark.parametrize("name", ["residual", "grouped", "tokens"])
def test_a_smaller_network_is_nearer_once_it_is_refitted(name):
    net, _ = build(name)
    data, test = (torch.randn(60, *data_shape(name)) for _ in range(2))
    before = copy.deepcopy(net.state_dict())
    small = fxfuse.narrow(net, data)
    report = small.meta["fxfuse"]
    assert all(new <= old for old, new in report.sizes.values())
    assert any(new < old for old, new in report.sizes.values()) and report.layers
    wanted = outputs(net, test)
    missed = [
        (outputs(n, test) - wanted).square().mean()
        for n in (small, fxfuse.narrow(net, data, refit=None))
    ]
    assert missed[0] < missed[1]
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())


def test_the_strongest_units_are_kept_with_what_they_read():
    net = randomise(mlp(6, 5, 3))
    with torch.no_grad():
        net[0].weight[1] *= 5
        net[0].weight[3] *= 5
    small = fxfuse.narrow(net, torch.randn(2, 6), to=0.4, **PLAIN)
    assert torch.equal(small.get_submodule("0").weight, net[0].weight[[1, 3]])
    assert torch.equal(small.get_submodule("2").weight, net[2].weight[:, [1, 3]])


def test_every_option_matters():
    net, data = randomise(mlp(6, 12, 16, 3)), torch.randn(40, 6)
    results = [
        outputs(fxfuse.narrow(net, data, **options), data)
        for options in (
            {},
            {"to": 0.75},
            {"of": "parameters"},
            {"importance": magnitude},
            {"importance": activation},
            {"even": False},
            {"merge": True},
            {"refit": None},
        )
    ]
    for i, one in enumerate(results):
        assert all((one - other).abs().max() > 1e-4 for other in results[:i])


def test_copies_of_units_are_merged_without_loss():
    net, data = randomise(mlp(6, 7, 5, 3)), torch.randn(40, 6)
    wide = fxfuse.net2wider(net, data)
    for options in ({"refit": None}, {}):
        small = fxfuse.narrow(wide, data, like=net, merge=True, **options)
        units = [s.size for s in fxfuse.find_spaces(small, data)]
        assert units == [7, 5]
    kept = fxfuse.narrow(wide, data, merge=True, importance=_first_copies, refit=None)
    assert gap(net, kept, data) < 1e-5


def test_merging_is_what_a_few_lines_of_numpy_make_of_it():
    net, data = randomise(mlp(5, 6, 3)), torch.randn(60, 5)
    merged = fxfuse.narrow(net, data, to=0.5, **{**PLAIN, "merge": True})
    w, b, v, c = (p.detach().double().numpy() for p in net.parameters())
    kept = sorted(np.argsort(-(w**2).sum(1))[:3])
    x = torch.randn(9, 5).double().numpy()
    defined = intra_fusion((w, b, v, c), kept, data.double().numpy())
    wanted = outputs_of(defined, x).T
    assert np.allclose(outputs(merged, torch.from_numpy(x).float()), wanted, atol=1e-4)


NARROWED = ["plain", "batch norm", "residual", "grouped", "depthwise", "tokens"]


@pytest.mark.parametrize("name", some(NARROWED, "tokens"))
@pytest.mark.parametrize("merge", [False, True])
def test_a_wider_copy_comes_back_though_the_copies_of_a_unit_count_alike(name, merge):
    net, x = build(name)
    wide = fxfuse.net2wider(net, x)
    for refit in (None, LeastSquares()):
        small = fxfuse.narrow(
            wide, torch.randn(24, *data_shape(name)), like=net, refit=refit, merge=merge
        )
        assert gap(net, small, x) < 1e-4


def _first_copies(network, data):
    return {s.name: -torch.arange(s.size).numpy().astype(float) for s in network.spaces}


@settings(max_examples=2)
@given(random_nets(), st.sampled_from([0.4, 0.5]))
def test_random_networks_get_narrower(net, share):
    small = fxfuse.narrow(net, IMAGES, to=share, merge=True)
    assert outputs(small, OTHER).shape == (3, 3)
    lint(small)


@pytest.mark.parametrize("importance", [magnitude, activation, taylor])
def test_dead_units_are_left_out_first_so_nothing_is_lost(importance):
    net = randomise(mlp(6, 8, 3))
    with torch.no_grad():
        net[0].weight[::2], net[0].bias[::2] = 0.0, 0.0
    x = torch.randn(4, 6)
    small = fxfuse.narrow(net, x, importance=importance)
    assert gap(net, small, x) <= 1e-5 and small.meta["fxfuse"].error <= 1e-5


def test_a_copy_like_a_narrower_network_loads_into_its_class():
    net, small = randomise(Tokens(16, 4, 12)), randomise(Tokens(8, 2, 7), 1)
    result = fxfuse.narrow(net, IMAGES, like=small, refit=None)
    small.load_state_dict(result.state_dict())
    assert outputs(small, IMAGES).shape == (2, 3)


def test_shares_out_of_range_and_nothing_to_narrow_are_refused():
    for to in (0, 1.2):
        with pytest.raises(ArgumentError, match=f"to {to}"):
            fxfuse.narrow(*build("plain"), to=to)
    with pytest.raises(ArgumentError, match="no space"):
        fxfuse.narrow(*build("plain"), to=1.0)


def test_single_numbers_stay():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(0.5))
            self.body = mlp(6, 8, 3)

        def forward(self, x):
            return self.body(x) * self.scale

    assert fxfuse.narrow(Scaled(), torch.randn(20, 6)).scale.shape == ()


def test_a_network_that_became_useless_is_said():
    net, data = randomise(mlp(6, 40, 3)), torch.randn(160, 6)
    with torch.no_grad():
        net[2].weight.mul_(4)
    worst = {"importance": lambda n, d: {k: -v for k, v in magnitude(n).items()}, "refit": None}
    with pytest.warns(FusionWarning, match="than the mean of its outputs is") as caught:
        report = fxfuse.narrow(net, data, to=0.1, **worst).meta["fxfuse"]
    assert report.warnings == (str(caught[0].message),) and "`refit` at its default" in str(
        caught[0].message
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        near = fxfuse.narrow(net, data, to=0.9).meta["fxfuse"].nearness
    assert near.held_out and near.samples == 10 and not near.networks


def test_a_result_farther_than_the_network_it_is_like_is_said():
    net, data = randomise(mlp(6, 9, 3)), torch.randn(160, 6)
    options = {"importance": _last, "refit": None}
    wide = fxfuse.net2wider(net, data[:4], noise=1e-3)
    with pytest.warns(
        FusionWarning, match="farther from the model than Sequential 1, whose widths"
    ):
        report = fxfuse.narrow(wide, data, like=net, **options).meta["fxfuse"]
    near = report.nearness
    assert near.clear == (True,) and near.networks[0] < near.fused


def _last(network, data):
    """Score the last of the copies highest, so that the first are dropped, what reads them too."""
    return {s.name: np.arange(s.size) * 1.0 for s in network.spaces}
