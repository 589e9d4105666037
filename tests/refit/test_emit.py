"""Emission: tensors are mixed as the formula says; filters in front of norms keep their size."""

import copy
import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array
from torch import nn

import fxfuse
from fxfuse.coupling.mixing import Couplings
from fxfuse.coupling.plans import two_maps
from fxfuse.coupling.problem import absent_tensors
from fxfuse.coupling.transport import Transport
from fxfuse.ir import Coupling
from tests.support.nets import randomise, residual, stages
from tests.support.problems import problem_of


def images(count=40):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(5))


def test_a_tensor_is_mixed_as_the_formula_says():
    nets, x = [randomise(stages([5, 6], [7]), s) for s in (1, 2)], images()
    problem = problem_of(nets, x, weights=(0.3, 0.7))
    rng = np.random.default_rng(0)
    couplings, maps = {}, {}
    for name, spaces in problem.spaces.items():
        for k in (0, 1):
            p, u = (rng.random((spaces[k].size,) * 2) for _ in range(2))
            maps[name, k] = (p, u)
            couplings[name, k] = Coupling(csr_array(p), csr_array(u))
    weights = [n.state_dict()["0.1.0.weight"].numpy() for n in nets]
    (first, second) = [s.name for s in problem.networks[0].spaces][:2]
    expected = sum(
        share * np.einsum("Oo,oihw,iI->OIhw", maps[second, k][0], weights[k], maps[first, k][1])
        for k, share in enumerate((0.3, 0.7))
    )
    mixed = Couplings(problem, couplings).mix("0.1.0.weight", weights)
    assert np.allclose(mixed, expected, rtol=1e-5, atol=1e-6)


def test_a_network_without_a_block_adds_nothing_to_the_stream_and_shares_no_inside():
    """The zeros that silence the block count, its other tensors belong to the other network."""
    nets, x = (
        [randomise(residual((6, 3), (8, 1)), 1), randomise(residual((6, 1), (8, 1)), 2)],
        images(),
    )
    problem = problem_of(nets, x, weights=(0.4, 0.6))
    gone = absent_tensors(problem.networks[1], problem.absent[1])
    assert gone and not absent_tensors(problem.networks[0], problem.absent[0])
    inside = [n for n in gone if n.endswith("weight")]
    shares = {name: problem.shares(name) for name in inside}
    assert {tuple(s) for s in shares.values()} == {(1.0, 0.0)}
    silent = {t for a in problem.absent[1] for t in a.zeroed}
    assert silent and all(problem.shares(name) == [0.4, 0.6] for name in silent)
    assert problem.shares("0.0.weight") == [0.4, 0.6]


class Masked(torch.nn.Module):
    """A masked autoencoder: output `i` depends on inputs before `i` only."""

    def __init__(self, width=8, scale=1.0):
        super().__init__()
        self.first = torch.nn.Parameter(torch.randn(width, 6))
        self.last = torch.nn.Parameter(torch.randn(6, width))
        degree, place = torch.arange(width) % 5, torch.arange(6)
        self.register_buffer("ins", (degree[:, None] >= place).float())
        self.register_buffer("outs", (place[:, None] > degree).float())
        self.register_buffer("scale", torch.tensor(scale))

    def forward(self, x):
        hidden = torch.tanh(torch.nn.functional.linear(x * self.scale, self.first * self.ins))
        return torch.nn.functional.linear(hidden, self.last * self.outs)


@pytest.mark.parametrize("width", [1.0, 1.5, math.inf])
@pytest.mark.parametrize("name", ["best", "otfusion", "git_rebasin", "clafusion"])
def test_masks_are_moved_but_never_averaged(name, width):
    torch.manual_seed(0)
    nets, x = [Masked(8), Masked(8)], torch.randn(64, 6)
    if width > 1 and name != "best":
        pytest.skip("only couplings of whole spaces can be widened")
    fused = getattr(fxfuse.presets, name)(nets, x, width=width)
    assert all(set(m.unique().tolist()) <= {0.0, 1.0} for m in (fused.ins, fused.outs))
    slopes = torch.autograd.functional.jacobian(lambda v: fused(v[None])[0], x[0])
    assert slopes.triu().abs().max() <= 1e-6 * slopes.abs().max()


def test_a_buffer_that_is_no_statistic_is_the_anchors():
    nets = [Masked(8, 0.5), Masked(8, 1.5)]
    for anchor in (0, 1):
        fused = fxfuse.fuse(nets, torch.randn(64, 6), anchor=anchor)
        assert torch.equal(fused.scale, nets[anchor].scale)


def test_couplings_made_of_plans_are_used_by_default():
    assert fxfuse.Method().coupling.maps is two_maps


def net(width, affine=True, bias=False):
    layers = []
    for inner, outer in ((3, width), (width, width + 2)):
        layers += [nn.Conv2d(inner, outer, 3, padding=1, bias=bias)]
        layers += [nn.BatchNorm2d(outer, affine=affine), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width + 2, 3))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model.eval()


def sizes(model, place):
    return model.get_submodule(place).weight.detach().flatten(1).norm(dim=1)


@settings(max_examples=4)
@given(st.integers(0, 2**31), st.booleans(), st.booleans())
def test_filters_get_their_size_back_and_the_function_stays(seed, affine, bias):
    torch.manual_seed(seed)
    parents = net(6, affine, bias), net(5, affine, bias)
    with torch.no_grad():
        parents[1][0].weight.mul_(7)
    data, method = torch.randn(32, 3, 6, 6), fxfuse.Method(coupling=Transport())
    with pytest.MonkeyPatch.context() as patch:
        module = sys.modules["fxfuse.fusion.fuse"]  # its name in the package is the function
        patch.setattr(module, "rescale", lambda fused, couplings: None)
        plain = fxfuse.fuse(parents, data, method=method)
    fused = fxfuse.fuse(parents, data, method=method)
    torch.testing.assert_close(fused(data), plain(data), rtol=1e-4, atol=1e-4)
    for place in ("0", "3"):
        own = sum(sizes(p, place).square().mean() for p in parents) / 2
        assert 0.5 < float(sizes(fused, place).square().mean() / own) < 1.5


def test_a_copy_of_another_scale_does_not_change_the_filters_of_a_network():
    torch.manual_seed(0)
    model = net(6)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for conv, norm in ((other[0], other[1]), (other[3], other[4])):
            conv.weight.mul_(3)
            norm.running_mean.mul_(3)
            norm.running_var.copy_(9 * (norm.running_var + norm.eps) - norm.eps)
    data = torch.randn(32, 3, 6, 6)
    fused = fxfuse.fuse([model, other], data, weights=[0.5, 0.5])
    torch.testing.assert_close(fused(data), model(data), rtol=1e-3, atol=1e-3)
    for place in ("0", "3"):
        expected = sizes(model, place) * (0.5 + 0.5 * 9) ** 0.5
        torch.testing.assert_close(sizes(fused, place), expected, rtol=1e-2, atol=1e-3)
