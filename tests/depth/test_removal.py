"""Runs of neighbouring layers, and graphs without them."""

import copy

import pytest
import torch

from fxfuse.depth._removal import Unsuitable
from fxfuse.graph.trace import trace
from fxfuse.spaces.network import Network
from tests.support.nets import mlp, outputs, randomise, residual, stages
from tests.support.removals import layers_of, network_of, removals_at, removed

torch.manual_seed(0)  # of what is drawn while the tests are collected

IMAGES = torch.randn(8, 3, 8, 8)


def network(net, data=IMAGES):
    return network_of(randomise(net), data)


def leave_out(copy, removal):
    """A strategy that lets nothing take over the work of removed layers."""
    with copy.without(removal):
        pass


def test_neighbours_are_removed_together_in_pieces_between_poolings():
    original = network(stages([4, 4, 4], [4, 4]))
    names = [x.name for x in layers_of(original)]
    removals = removals_at(original, [1, 2, 3])
    assert [[x.name for x in piece] for piece in removals[0].pieces] == [names[1:3], names[3:4]]
    assert (removals[0].before.name, removals[0].behind.name) == (names[0], names[4])
    assert [x.name for x in removals[0].following] == names[4:]
    apart = removals_at(original, [0, 2])
    assert [(r.before and r.before.name, r.behind.name) for r in apart] == [
        (None, names[1]),
        (names[1], names[3]),
    ]
    assert apart[1].last.name == names[2] and str(apart[1]) == f"'{names[2]}'"
    assert removals_at(original, []) == []


@pytest.mark.parametrize(
    ("make", "data", "at", "left"),
    [
        (lambda: mlp(6, 5, 5, 5, 3), torch.randn(4, 6), [1, 2], lambda: mlp(6, 5, 3)),
        (lambda: stages([4, 4, 4], [4, 4]), IMAGES, [2, 4], lambda: stages([4, 4], [4])),
        (lambda: residual((6, 4)), IMAGES, [2, 3], lambda: residual((6, 2))),
    ],
)
def test_removed_layers_leave_the_graph_of_a_copy(make, data, at, left):
    original = network(make(), data)
    state, code = copy.deepcopy(original.module.state_dict()), original.module.code
    shorter = removed(original, at, leave_out)
    kinds = [x.kind for x in layers_of(Network.of("shorter", shorter, original.example))]
    assert kinds == [x.kind for x in layers_of(network(left(), data))]
    assert len(list(shorter.graph.nodes)) == len(list(network(left(), data).module.graph.nodes))
    assert original.module.code == code
    assert all(torch.equal(t, state[n]) for n, t in original.module.state_dict().items())
    assert set(shorter.state_dict()) < set(state)


def test_removing_layers_that_do_nothing_changes_nothing():
    net = randomise(mlp(6, 5, 5, 3))
    net[2].weight.data.copy_(torch.eye(5))
    net[2].bias.data.zero_()
    data = torch.randn(9, 6)
    original = Network.of("net", trace(net), (data[:2],))
    shorter = removed(original, [1], leave_out)
    assert torch.allclose(outputs(net, data), outputs(shorter, data), atol=1e-6)


def test_layers_are_put_back_if_the_strategy_finds_them_unsuitable():
    original = network(stages([4, 4, 4], [4, 4]))
    codes = []

    def there_and_back(copy, removal):
        with pytest.raises(Unsuitable), copy.without(removal):
            codes.append(copy.edited.module.graph.python_code("self").src)
            raise Unsuitable

    same = removed(original, [1, 2, 3], there_and_back)
    assert same.code == original.module.code and codes[0] != same.code
