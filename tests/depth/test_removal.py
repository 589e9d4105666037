"""."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from fxfuse.alignment.layers import partition
from fxfuse.calibration.data import Calibration
from fxfuse.depth import gates
from fxfuse.depth._removal import Merging, Refitting, plan_removals, remove
from fxfuse.errors import PassError
from fxfuse.graph.passes import canonical
from fxfuse.graph.trace import trace
from fxfuse.spaces.network import Network
from tests.support.nets import (
    Inverted,
    Pooled,
    Tokens,
    conv,
    gap,
    mlp,
    outputs,
    randomise,
    residual,
    stages,
    values,
)
from tests.support.tolerances import FUNCTION

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


torch.manual_seed(0)  # of what is drawn while the tests are collected


MERGED_VECTORS, MERGED_IMAGES = torch.randn(200, 6), torch.randn(20, 3, 8, 8)


def merged(net, data, at, gate):
    found = Network.of("net", trace(net), (data[:2],))
    strategy = Merging(gate, Calibration(data))
    return remove(found.module, found.example, found, plan(found, at), strategy)


def open_net(norm=False):
    """A perceptron whose second and third layer are always active."""
    net = randomise(mlp(6, 8, 7, 5, 3, norm=norm))
    for module in net[2 if not norm else 3 : -1]:
        if isinstance(module, nn.BatchNorm1d if norm else nn.Linear):
            module.bias.data.fill_(60.0)
    return net


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("at", [[1], [2], [1, 2]])
@pytest.mark.parametrize("gate", [gates.sign_of_sum, gates.majority_vote, gates.line])
def test_layers_that_are_always_active_merge_exactly(norm, at, gate):
    net = open_net(norm)
    shorter = merged(net, MERGED_VECTORS, at, gate)
    assert gap(net, shorter, MERGED_VECTORS) <= FUNCTION
    assert len(layers_of(Network.of("", shorter, (MERGED_VECTORS[:2],)))) == 4 - len(at)


def test_merging_multiplies_the_matrices_as_the_paper_says():
    net = randomise(mlp(6, 8, 7, 3, bias=False))
    net[4].bias = None
    shorter = merged(net, MERGED_VECTORS, [1], gates.sign_of_sum)
    z = torch.relu(MERGED_VECTORS @ net[0].weight.T) @ net[2].weight.T
    truth = net[4].weight @ torch.diag((z.sum(0) >= 0).float()) @ net[2].weight
    assert torch.allclose(shorter.get_submodule("4").weight, truth, atol=1e-6)


def test_biases_are_composed():
    net = randomise(mlp(6, 8, 7, 3))
    shorter = merged(net, MERGED_VECTORS, [1], gates.average_of_signs)
    z = net[2](torch.relu(net[0](MERGED_VECTORS)))
    share = (z > 0).double().mean(0).float()
    truth = net[4].bias + net[4].weight @ (share * net[2].bias)
    assert torch.allclose(shorter.get_submodule("4").bias, truth, atol=1e-6)


@pytest.mark.parametrize("act", [nn.ReLU, nn.GELU, nn.Tanh])
def test_the_line_is_the_best_of_the_gates(act):
    net = randomise(mlp(6, 16, 16, 16, 3, act=act), 3)
    errors = {}
    for gate in (gates.sign_of_sum, gates.average_of_signs, gates.line):
        if act is nn.ReLU or gate is gates.line:
            shorter = merged(net, MERGED_VECTORS, [1], gate)
            errors[gate] = float(
                (outputs(net, MERGED_VECTORS) - outputs(shorter, MERGED_VECTORS)).norm()
            )
    assert min(errors, key=errors.get) is gates.line
    assert errors[gates.line] < 0.5 * float(outputs(net, MERGED_VECTORS).norm())


@pytest.mark.parametrize("act", [nn.Sigmoid, nn.Tanh])
def test_gates_by_sign_need_a_rectifier(act):
    with pytest.raises(PassError, match="no rectifier"):
        merged(randomise(mlp(6, 8, 7, 3, act=act)), MERGED_VECTORS, [1], gates.sign_of_sum)


def test_convolutions_merge_where_the_kernel_fits():
    parts = [conv(3, 4), conv(4, 6, 1, act=False, bias=True), conv(6, 5), Pooled(5, 3)]
    parts[2][0].padding = (0, 0)  # at padded borders a composite would not be exact
    net = randomise(nn.Sequential(*parts))
    assert gap(net, merged(net, MERGED_IMAGES, [1], gates.line), MERGED_IMAGES) <= FUNCTION


UNMERGEABLE = {
    "they need a kernel of 5x5": (lambda: stages([4, 4, 4]), [1]),
    "pooling or flattening": (lambda: stages([4, 4], [4]), [1]),
    "is a block": (lambda: residual((6, 3)), [2]),
    "more than contract": (
        lambda: nn.Sequential(
            conv(3, 4, 1),
            conv(4, 4, 1, norm=False, act=False),
            nn.GroupNorm(2, 4),
            nn.ReLU(),
            conv(4, 4, 1),
            Pooled(4, 3),
        ),
        [1],
    ),
    "no single contraction": (
        lambda: nn.Sequential(
            conv(3, 4, 1),
            nn.Conv2d(4, 4, 1, 1, 1, padding_mode="circular"),
            conv(4, 4, 1),
            Pooled(4, 3),
        ),
        [1],
    ),
}


@pytest.mark.parametrize("reason", UNMERGEABLE)
def test_what_cannot_merge_is_refused_with_the_reason(reason):
    make, at = UNMERGEABLE[reason]
    with pytest.raises(PassError, match=reason) as caught:
        merged(randomise(make()), MERGED_IMAGES, at, gates.line)
    assert "least squares" in caught.value.do


def test_an_offset_needs_a_bias_to_go_to():
    net = randomise(mlp(6, 8, 7, 3, bias=False))
    net[4].bias = None
    with pytest.raises(PassError, match="no place"):
        merged(net, MERGED_VECTORS, [1], gates.line)
    assert gap(net, merged(net, MERGED_VECTORS, [1], gates.line_through_zero), MERGED_VECTORS) < 1


torch.manual_seed(0)  # of what is drawn while the tests are collected


VECTORS, REFITTED_IMAGES = torch.randn(300, 6), torch.randn(40, 3, 8, 8)


def refitted(net, data, at, ridge=1e-6, **options):
    found = Network.of("net", trace(net), (data[:2],))
    strategy = Refitting(Calibration(data), ridge, **options)
    return remove(found.module, found.example, found, plan(found, at), strategy)


def error(net, other, data):
    a, b = outputs(net, data), outputs(other, data)
    return float((a - b).norm() / a.norm())


def unit(net, name):
    return [n for n in trace(net).graph.nodes if n.op == "call_module" and n.target == name][0].name


def test_a_plain_layer_behind_gets_the_least_squares_fit_of_its_own_pre_activation():
    net = randomise(mlp(6, 8, 7, 5, 3))
    shorter = refitted(net, VECTORS, [1], 1e-9, rounds=0, reach=0)
    z = values(trace(net), VECTORS)
    x, y = z[unit(net, "1")].double().numpy(), z[unit(net, "4")].double().numpy()
    design = np.hstack([x, np.ones((len(x), 1))])
    truth = design @ np.linalg.lstsq(design, y, rcond=None)[0]
    assert np.allclose(values(shorter, VECTORS)[unit(net, "4")].numpy(), truth, atol=1e-3)


LINEAR = {
    "linear layer": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.Linear(7, 3)),
        VECTORS,
        [1],
    ),
    "pointwise convolution": (
        lambda: nn.Sequential(conv(3, 4), conv(4, 6, 1, act=False), conv(6, 5), Pooled(5, 3)),
        REFITTED_IMAGES,
        [1],
    ),
    "convolution and pooling": (
        lambda: nn.Sequential(
            conv(3, 4),
            conv(4, 6, 1, act=False),
            nn.AvgPool2d(2),
            conv(6, 5, norm=False),
            Pooled(5, 3),
        ),
        REFITTED_IMAGES,
        [1],
    ),
    "before flattening": (
        lambda: nn.Sequential(
            conv(3, 4),
            conv(4, 3, 1, act=False, norm=False),
            nn.MaxPool2d(4),
            nn.Conv2d(3, 3, 1),
            nn.Flatten(),
            nn.Linear(12, 3),
        ),
        REFITTED_IMAGES,
        [2],
    ),
    "depthwise": (
        lambda: nn.Sequential(
            conv(3, 4), conv(4, 4, 1, groups=4, act=False), conv(4, 4, groups=4), Pooled(4, 3)
        ),
        REFITTED_IMAGES,
        [1],
    ),
}


@pytest.mark.parametrize("name", LINEAR)
def test_what_is_linear_is_taken_over_exactly(name):
    """Where the border of the composite is exact too: no bias before what pads."""
    make, data, at = LINEAR[name]
    net = randomise(make())
    if name != "linear layer":
        for module in net[at[0]].modules():
            if isinstance(module, nn.BatchNorm2d):
                module.bias.data.zero_()
                module.running_mean.zero_()
    assert gap(net, refitted(net, data, at, 1e-10), data) <= FUNCTION


CASES = {
    "perceptron": (lambda: mlp(6, 8, 7, 5, 3), VECTORS, [1]),
    "perceptron, first layer": (lambda: mlp(6, 8, 7, 5, 3), VECTORS, [0]),
    "perceptron with GELU and norms": (
        lambda: mlp(6, 8, 7, 5, 3, act=nn.GELU, norm=True),
        VECTORS,
        [1, 2],
    ),
    "stage": (lambda: stages([4, 5, 6], [4]), REFITTED_IMAGES, [1]),
    "end of a stage": (lambda: stages([4, 5], [6]), REFITTED_IMAGES, [1]),
    "end of a stage and start of the next": (
        lambda: stages([4, 5], [6, 6]),
        REFITTED_IMAGES,
        [1, 2],
    ),
    "without norms": (lambda: stages([4, 5], [6], norm=False, hidden=(8,)), REFITTED_IMAGES, [1]),
    "into a linear layer": (lambda: stages([4], [6, 5], hidden=(8,)), REFITTED_IMAGES, [2]),
    "blocks": (lambda: residual((6, 3), (8, 2)), REFITTED_IMAGES, [2, 3, 5]),
    "blocks at the start": (lambda: residual((6, 3)), REFITTED_IMAGES, [1]),
    "plain in front of a block": (
        lambda: nn.Sequential(conv(3, 5), conv(5, 6), residual((6, 2), stem=6)[1], Pooled(6, 3)),
        REFITTED_IMAGES,
        [1],
    ),
    "inverted": (
        lambda: nn.Sequential(conv(3, 6), *[Inverted(6, 9, 4) for _ in range(3)], Pooled(6, 3)),
        REFITTED_IMAGES,
        [2],
    ),
    "tokens": (lambda: Tokens(depth=2), REFITTED_IMAGES, [2, 3]),
}


LIMIT: dict = {}


@pytest.mark.parametrize("name", CASES)
def test_refitted_networks_are_closer_than_their_mean_and_have_their_norms(name):
    make, data, at = CASES[name]
    net = randomise(make())
    shorter = refitted(net, data, at)
    a = outputs(net, data)
    spread = float((a - a.mean(0)).norm() / a.norm())
    print(name, error(net, shorter, data) / spread)
    assert error(net, shorter, data) < LIMIT.get(name, 1.0) * spread
    kept = [x for i, x in enumerate(layers_of(network_of(net, data))) if i not in at]
    left = layers_of(network_of(shorter, data))
    assert [x.kind for x in left] == [x.kind for x in kept]
    assert [x.width for x in left][-1] == 3


def network_of(net, data):
    return Network.of("", trace(net), (data[:2],))


def test_removed_blocks_that_add_nothing_are_not_missed():
    net = randomise(residual((6, 4)))
    for block in net[1][2:]:
        block.b[1].weight.data.zero_()
        block.b[1].bias.data.zero_()
    shorter = refitted(net, REFITTED_IMAGES, [3, 4], 1e-3)
    assert gap(net, shorter, REFITTED_IMAGES) <= FUNCTION


def test_fitting_in_order_makes_up_for_earlier_removals():
    """Two removals are fitted one on what the other left: no worse than each on the old values."""
    net = randomise(mlp(6, 12, 12, 12, 12, 3))
    both = refitted(net, VECTORS, [1, 3], rounds=0)
    z = values(trace(net), VECTORS)
    x = values(both, VECTORS)[unit(net, "5")].double()
    y = z[unit(net, "8")].double()
    design = torch.cat([x, torch.ones(len(x), 1)], 1)
    best = torch.linalg.lstsq(design, y).solution
    assert unit(net, "8") in values(both, VECTORS)
    assert torch.allclose(values(both, VECTORS)[unit(net, "8")].double(), design @ best, atol=1e-2)


def test_ridge_draws_to_the_merged_weights():
    net = randomise(mlp(6, 8, 7, 5, 3))
    weights = {
        r: refitted(net, VECTORS, [1], r).get_submodule("4").weight.detach()
        for r in (1e-6, 1.0, 1e6)
    }

    limit = merged(net, VECTORS, [1], gates.line).get_submodule("4").weight
    far = [float((w - limit).norm()) for w in weights.values()]
    assert far == sorted(far, reverse=True) and far[-1] < 1e-4 < far[0]


REFUSED = {
    "grown": (lambda: nn.Sequential(conv(3, 4), *grown(), Pooled(9, 3)), [2], "no sum of a branch"),
    "strided": (lambda: residual((6, 2), (8, 2)), [3], "another shape"),
    "strided first layer": (
        lambda: nn.Sequential(conv(3, 4, stride=2), conv(4, 4), Pooled(4, 3)),
        [0],
        "another shape",
    ),
    "gate": (
        lambda: nn.Sequential(
            conv(3, 4),
            Inverted(4, 4, 2).gate,
            Inverted(4, 4, 2).gate,
            Inverted(4, 4, 2).gate,
            Pooled(4, 3),
        ),
        [2],
        "no sum of a branch",
    ),
}


def grown():
    from tests.support.nets import Grown

    return [Grown(4, 1, 5)]


@pytest.mark.parametrize("name", REFUSED)
def test_what_nothing_can_host_is_refused_with_the_reason(name):
    make, at, reason = REFUSED[name]
    with pytest.raises(PassError, match=reason) as caught:
        refitted(randomise(make()), REFITTED_IMAGES, at)
    assert "nothing can stand in for" in caught.value.met
