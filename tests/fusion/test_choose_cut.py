"""Cuts chosen by what the result may cost, and by how near its heads are on samples held out."""

import pytest
import torch

import fxfuse
from fxfuse.errors import ArgumentError
from fxfuse.fusion import _choose_cut
from fxfuse.fusion.heads import Separate, Union
from fxfuse.graph.cost import cost_of
from tests.support.nets import randomise, residual, stages


def images(count):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(5))


def pair():
    """Networks of other depth and task."""
    nets = residual((6, 2), (8, 2)), residual((6, 1), (8, 2), classes=5)
    return [randomise(net, seed) for seed, net in enumerate(nets)]


def relative(nets, fused):
    return cost_of(fused, images(2)) / cost_of(nets[0], images(2))


@pytest.mark.sweep
def test_the_more_it_may_cost_the_less_is_fused():
    nets, x = pair(), images(16)
    costs = []
    for most in (1.05, 1.9):
        fused = fxfuse.fuse(nets, x, heads=Separate(after="auto", multiply_adds=most), anchor=0)
        costs.append(relative(nets, fused).multiply_adds)
        assert costs[-1] <= most
    assert costs[0] < costs[1]
    few = Union([range(3), range(3, 8)], after="auto", parameters=1.2)
    fused = fxfuse.fuse(nets, x, heads=few, anchor=0)
    assert relative(nets, fused).parameters <= 1.2 and fused(x).shape == (16, 8)


def test_of_the_cuts_that_fit_the_one_nearest_on_held_out_samples_is_taken(monkeypatch):
    nets, x = pair(), images(16)
    heads = Separate(after="auto", multiply_adds=1.9)
    tried = []

    def costly(networks, fused, held):
        tried.append(cost_of(fused, images(2)).multiply_adds)
        assert held.samples == 4
        return tried[-1]

    monkeypatch.setattr(_choose_cut, "_missed", costly)
    fused = fxfuse.fuse(nets, x, heads=heads, anchor=0)
    assert len(tried) == _choose_cut.TRIED == len(set(tried))
    assert cost_of(fused, images(2)).multiply_adds == min(tried)


@pytest.mark.parametrize(
    ("heads", "words"),
    [
        (Separate(after="auto"), "without a limit"),
        (Separate(after="auto", multiply_adds=0.5), "budget of 0.5"),
    ],
)
def test_no_limit_and_one_that_no_cut_meets_are_refused(heads, words):
    nets = [randomise(stages([5, 6], [7]), seed) for seed in (1, 2)]
    with pytest.raises(ArgumentError, match=words) as caught:
        fxfuse.fuse(nets, images(16), heads=heads)
    assert all([caught.value.met, caught.value.where, caught.value.expected, caught.value.do])
