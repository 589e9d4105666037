"""Several networks matched in turn: nobody's coordinates, and no matter in which order."""

import itertools

import numpy as np
import pytest
import torch
from conftest import FUNCTION
from nets import build, data_shape, gap, mlp, randomise, residual
from test_weightwise import images, mixer_of

import fxfuse
from fxfuse.ascent import forward, in_place, inner
from fxfuse.together import by_content, join, merge_in_turn, spaces_to_join, sum_of
from fxfuse.weight_matching import MergeMany
from fxfuse.weightwise import Weights


def joined(nets, x, start=forward):
    mixer = mixer_of(nets, x)
    weights, free = Weights.of(mixer), spaces_to_join(mixer)
    join(weights, free, start)
    return weights, free


def length(weights):
    """Squared norm of the sum of all networks: what matching raises."""
    return sum(inner(t, t) for t in sum_of(weights, range(len(weights.states))).values())


def test_networks_are_ordered_by_what_they_hold():
    nets, x = [randomise(mlp(6, 8, 7, 3), s) for s in range(3)], torch.randn(8, 6)
    ranks = set()
    for order in itertools.permutations(range(3)):
        weights = Weights.of(mixer_of([nets[i] for i in order], x))
        ranks.add(tuple(order[i] for i in by_content(weights)))
    assert len(ranks) == 1


def test_the_sum_is_over_the_networks_that_have_a_tensor():
    nets = [randomise(residual((6, n), (8, 1)), n) for n in (1, 2, 1)]
    weights, _ = joined(nets, images(), in_place)
    total = sum_of(weights, range(3))
    assert np.array_equal(total["1.1.a.0.weight"], nets[1].state_dict()["1.1.a.0.weight"].numpy())
    stem = [n.state_dict()["0.0.weight"].numpy() for n in nets]
    assert np.allclose(total["0.0.weight"], sum(stem), atol=1e-6)


@pytest.mark.parametrize("start", [forward, in_place])
def test_turns_make_the_networks_more_alike_until_none_moves(start):
    nets = [randomise(mlp(6, 8, 7, 3), s) for s in range(4)]
    weights, free = joined(nets, torch.randn(8, 6), start)
    before = length(weights)
    merge_in_turn(weights, free, 100, 100, np.random.default_rng(0))
    after = length(weights)
    assert after > before
    merge_in_turn(weights, free, 100, 100, np.random.default_rng(1))
    assert length(weights) == pytest.approx(after, rel=1e-12)


def test_of_small_networks_no_single_map_could_be_better():
    nets = [randomise(mlp(4, 3, 2, bias=False), s) for s in range(3)]
    weights, free = joined(nets, torch.randn(8, 4))
    merge_in_turn(weights, free, 100, 100, np.random.default_rng(0))
    orders = [weights.mixer.couplings["0", k].project.indices for k in range(3)]
    pairs = [[p.detach().double() for p in n.parameters() if p.dim() == 2] for n in nets]

    def score(orders):
        first = sum(a[list(o)] for (a, _), o in zip(pairs, orders))
        second = sum(b[:, list(o)] for (_, b), o in zip(pairs, orders))
        return float(first.square().sum() + second.square().sum())

    for k, order in itertools.product(range(3), itertools.permutations(range(3))):
        tried = [order if i == k else o for i, o in enumerate(orders)]
        assert score(tried) <= score(orders) + 1e-6


def test_the_order_of_the_networks_does_not_matter():
    nets, data = [randomise(residual((6, 1), (8, 1)), s) for s in range(3)], images()
    method = fxfuse.Method(coupling=MergeMany())
    whole = fxfuse.fuse(nets, data, method=method)
    for shift in (1, 2):
        turned = nets[shift:][::-1] + nets[:shift]
        assert gap(whole, fxfuse.fuse(turned, data, method=method), data) < FUNCTION


@pytest.mark.parametrize("name", ["plain", "grouped", "tokens"])
def test_permuted_copies_of_one_network_fuse_to_it(name):
    net, x = build(name)
    data = torch.randn(24, *data_shape(name))
    copies = [net, *(fxfuse.permute(net, x, seed=s) for s in range(3))]
    fused = fxfuse.fuse(copies, data, method=fxfuse.Method(coupling=MergeMany()))
    assert gap(net, fused, data) < FUNCTION
