"""Emission: filters in front of norms keep their size, and buffers are picked, not mixed."""

import copy
import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fxfuse
from fxfuse.coupling.plans import two_maps
from fxfuse.coupling.transport import Transport


def images(count=40):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(5))


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
        usual = sum(sizes(p, place).square().mean() for p in parents) / 2
        assert 0.5 < float(sizes(fused, place).square().mean() / usual) < 1.5


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
