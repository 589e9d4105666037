"""Coordinate ascent against brute force, and the order in which spaces are visited."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import NETS, build, data_shape, mlp, randomise, residual
from test_weightwise import images, mixer_of

import fxfuse
from fxfuse.ascent import (
    Ascent,
    families,
    forward,
    in_place,
    inner,
    members,
    network_order,
    require_equal_widths,
)
from fxfuse.errors import PairingError
from fxfuse.weightwise import Weights


def ascent_of(a, b, x, folded=False):
    """Return an ascent of the second network towards the first, and its weights."""
    weights = Weights.of(mixer_of([a, b], x), folded)
    Ascent(weights, 0, {}, list(weights.mixer.match.spaces)).keep()
    targets = {name: weights.carried(name, 0) for name in weights.states[0]}
    return Ascent(weights, 1, targets, list(weights.mixer.match.spaces))


def value(ascent):
    targets = ascent.targets.items()
    return sum(inner(t, ascent.weights.carried(n, 1)) for n, t in targets)


def by_hand(a, b, orders):
    """Sum of inner products of two MLPs' tensors, the second's hidden units in some order."""
    first, last, total = [part for part in b if hasattr(part, "weight")], None, 0.0
    for i, (one, two) in enumerate(zip([part for part in a if hasattr(part, "weight")], first)):
        w, bias = two.weight.detach().double(), two.bias.detach().double()
        if i:
            w = w[:, last]
        if i < len(orders):
            last = list(orders[i])
            w, bias = w[last], bias[last]
        total += float((one.weight.detach() * w).sum() + (one.bias.detach() * bias).sum())
    return total


@settings(max_examples=10)
@given(st.integers(0, 1000), st.sampled_from([forward, in_place]))
def test_what_is_reached_no_single_space_can_raise(seed, start):
    nets, x = [randomise(mlp(5, 4, 3, 2), s) for s in (seed, seed + 1)], torch.randn(8, 5)
    ascent = ascent_of(*nets, x)
    start(ascent)
    ascent.run(100, np.random.default_rng(seed))
    orders = [ascent.weights.mixer.couplings[n, 1].project.indices for n in ("0", "2")]
    reached = by_hand(*nets, orders)
    assert reached == pytest.approx(value(ascent), rel=1e-6)
    for i, size in enumerate((4, 3)):
        for order in itertools.permutations(range(size)):
            tried = [order if j == i else orders[j] for j in range(2)]
            assert by_hand(*nets, tried) <= reached + 1e-5


@pytest.mark.parametrize("name", NETS)
def test_a_run_never_lowers_the_sum_and_ends(name):
    (a, _), (b, _) = build(name, 1), build(name, 2)
    ascent = ascent_of(a, b, torch.randn(8, *data_shape(name)))
    ascent.keep()
    reached = [value(ascent)]
    for seed in range(3):
        ascent.run(1, np.random.default_rng(seed))
        reached.append(value(ascent))
    assert all(b >= a - 1e-6 * abs(a) for a, b in itertools.pairwise(reached))
    ascent.run(100, np.random.default_rng(0))
    assert not ascent.run(100, np.random.default_rng(1)), "it stopped before the end"


def test_every_map_stays_a_permutation_inside_its_blocks():
    (a, _), (b, _) = build("grouped", 1), build("grouped", 2)
    ascent = ascent_of(a, b, images())
    forward(ascent)
    ascent.run(100, np.random.default_rng(0))
    match, couplings = ascent.weights.mixer.match, ascent.weights.mixer.couplings
    for name, spaces in match.spaces.items():
        project = couplings[name, 1].project.toarray()
        assert (project.sum(0) == 1).all() and (project.sum(1) == 1).all()
        parent = spaces[0].parent
        if parent is not None:
            outer = couplings[parent, 1].project.toarray()
            for fused, own in zip(*project.nonzero()):
                assert outer[spaces[0].blocks[fused], spaces[1].blocks[own]]


def test_the_least_sweeps_stop_early():
    nets, x = [randomise(residual((6, 2), (8, 2)), s) for s in (1, 2)], images()
    reached = []
    for sweeps in (0, 1, 100):
        ascent = ascent_of(*nets, x)
        ascent.keep()
        ascent.run(sweeps, np.random.default_rng(0))
        reached.append(value(ascent))
    assert reached[0] < reached[1] < reached[2]


def test_spaces_come_in_the_order_in_which_they_are_written():
    class Backwards(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.first = torch.nn.Linear(7, 3), torch.nn.Linear(6, 8)
            self.middle = torch.nn.Linear(8, 7)

        def forward(self, x):
            return self.last(torch.relu(self.middle(torch.relu(self.first(x)))))

    mixer = mixer_of([randomise(Backwards())], torch.randn(8, 6))
    assert network_order(mixer.balanced.networks[0]) == ["first", "middle"]


def test_spaces_inside_blocks_form_a_family_with_them():
    net, _ = build("tokens")
    mixer = mixer_of([net], images())
    network = mixer.balanced.networks[0]
    parents = {s.name: s.parent for s in network.spaces}
    for family in families(network):
        assert {parents[name] for name in family[1:]} <= {*family}
        assert parents[family[0]] is None
    assert sorted(n for f in families(network) for n in f) == sorted(parents)
    heads = next(f for f in families(network) if len(f) == 3)
    assert [members(mixer.match, name) for name in heads] == [1, 4, 4]


def test_networks_of_unequal_width_are_refused():
    nets = [randomise(mlp(6, 8, 7, 3)), randomise(mlp(6, 5, 7, 3))]
    with pytest.raises(PairingError, match="8 and 5") as caught:
        require_equal_widths(mixer_of(nets, torch.randn(8, 6)).match, "M")
    assert "WeightTransport" in caught.value.do
    require_equal_widths(mixer_of([nets[0], nets[0]], torch.randn(8, 6)).match, "M")


def test_a_layer_that_only_one_network_has_does_not_make_widths_unequal():
    nets = [randomise(residual((6, 2), inner=9)), randomise(residual((6, 1), inner=9))]
    require_equal_widths(mixer_of(nets, images()).match, "M")
    assert fxfuse.find_spaces(nets[0], images(2)).free_units
