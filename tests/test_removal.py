import copy

import pytest
import torch
from nets import mlp, outputs, randomise, residual, stages
from torch import nn

from fxfuse.canonical import canonical
from fxfuse.network import Network
from fxfuse.removal import plan_removals, remove
from fxfuse.segments import partition
from fxfuse.tracing import trace

torch.manual_seed(0)  # of what is drawn while the tests are collected
IMAGES = torch.randn(8, 3, 8, 8)


def network(net, data=IMAGES):
    return Network.of("net", canonical(trace(randomise(net)), (data[:2],)), (data[:2],))


def layers_of(found):
    return [x for s in partition(found) for x in s.layers]


def plan(found, at):
    layers = layers_of(found)
    return plan_removals(layers, {layers[i].name for i in at})


def bypass(edit, removal):
    edit.bypass(removal)


def test_neighbours_are_removed_together_and_pooling_parts_them():
    found = network(stages([4, 4, 4], [4, 4]))
    names = [x.name for x in layers_of(found)]
    removals = plan(found, [1, 2, 3])
    assert [[x.name for x in piece] for piece in removals[0].pieces] == [names[1:3], names[3:4]]
    assert (removals[0].before.name, removals[0].behind.name) == (names[0], names[4])
    assert [x.name for x in removals[0].following] == names[4:]
    apart = plan(found, [0, 2])
    assert [(r.before and r.before.name, r.behind.name) for r in apart] == [
        (None, names[1]),
        (names[1], names[3]),
    ]
    assert apart[1].last.name == names[2] and str(apart[1]) == f"'{names[2]}'"
    assert plan(found, []) == []


@pytest.mark.parametrize(
    ("make", "data", "at", "left"),
    [
        (lambda: mlp(6, 5, 5, 5, 3), torch.randn(4, 6), [1, 2], lambda: mlp(6, 5, 3)),
        (lambda: stages([4, 4, 4], [4, 4]), IMAGES, [2, 4], lambda: stages([4, 4], [4])),
        (lambda: residual((6, 4)), IMAGES, [2, 3], lambda: residual((6, 2))),
    ],
)
def test_removed_layers_leave_the_graph_and_the_network_stays(make, data, at, left):
    found = network(make(), data)
    state, code = copy.deepcopy(found.module.state_dict()), found.module.code
    shorter = remove(found.module, found.example, found, plan(found, at), bypass)
    kinds = [x.kind for x in layers_of(Network.of("shorter", shorter, found.example))]
    assert kinds == [x.kind for x in layers_of(network(left(), data))]
    assert len(list(shorter.graph.nodes)) == len(list(network(left(), data).module.graph.nodes))
    assert found.module.code == code
    assert all(torch.equal(t, state[n]) for n, t in found.module.state_dict().items())
    assert set(shorter.state_dict()) < set(state)


def test_removing_layers_that_do_nothing_changes_nothing():
    net = randomise(mlp(6, 5, 5, 3))
    net[2].weight.data.copy_(torch.eye(5))
    net[2].bias.data.zero_()
    data = torch.randn(9, 6)
    found = Network.of("net", trace(net), (data[:2],))
    shorter = remove(found.module, found.example, found, plan(found, [1]), bypass)
    assert torch.allclose(outputs(net, data), outputs(shorter, data), atol=1e-6)


def test_what_was_bypassed_can_be_undone():
    found, codes = network(stages([4, 4, 4], [4, 4])), []

    def there_and_back(edit, removal):
        undo = edit.bypass(removal)
        codes.append(edit.now.module.graph.python_code("self").src)
        undo()

    same = remove(found.module, found.example, found, plan(found, [1, 2, 3]), there_and_back)
    assert same.code == found.module.code and codes[0] != same.code
    assert isinstance(same, nn.Module)
