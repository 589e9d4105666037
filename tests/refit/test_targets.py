"""The order of the sweep, what is refitted, and what it should give."""

import numpy as np
import torch
from hypothesis import given, settings
from torch import nn

import fxfuse
from fxfuse.alignment.align import align_networks
from fxfuse.calibration.data import Calibration
from fxfuse.calibration.run import Run, walk
from fxfuse.coupling.measure import View, measure
from fxfuse.coupling.problem import Problem
from fxfuse.coupling.transport import Transport
from fxfuse.depth.deepen import deepen
from fxfuse.graph.trace import trace
from fxfuse.refit._targets import Targets, aims_of
from fxfuse.spaces.network import Network
from tests.support.nets import (
    Pooled,
    Tokens,
    build,
    conv,
    outputs,
    random_nets,
    randomise,
    residual,
    stages,
)
from tests.support.tolerances import FUNCTION


def images(count=24, seed=5):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def network(module, x):
    return Network.of("net", trace(module), (x[:2],))


def output_of(traced, order, x):
    run, value = Run(traced, (x,), order=order), None
    with torch.no_grad():
        for node in order:
            stepped = run.step(node)
            value = stepped if node.op == "output" else value
    return value, run.env


@settings(max_examples=15)
@given(random_nets())
def test_the_order_is_one_in_which_the_network_runs(net):
    x = images(3)
    traced = network(net, x)
    order, aims = aims_of(traced)
    graph = list(traced.module.graph.nodes)
    assert len(order) == len(graph) and set(order) == set(graph)
    place = {node: i for i, node in enumerate(order)}
    assert all(place[i] < place[n] for n in graph for i in n.all_input_nodes)
    value, _ = output_of(traced, order, x)
    assert torch.allclose(value, outputs(net, x), rtol=1e-5, atol=1e-6)
    assert aims


class Constants(nn.Module):
    """Constants made from constants, of which some are read by nothing that data reach."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(4, 5))
        self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        sizes = self.table.shape
        first, last = sizes[1], sizes[0]
        offset = self.table.clone().reshape(last, first)
        offset.add_(1.0)
        x = torch.relu(self.a(x)).reshape(-1, first)
        unread = offset.sum() + sizes[0]
        unread * 2
        return self.b(x + offset[0])


def test_constants_come_first_in_the_order_of_the_graph():
    net, x = randomise(Constants()), torch.randn(3, 6)
    traced = network(net, x)
    order, _ = aims_of(traced)
    place = {node: i for i, node in enumerate(order)}
    assert all(place[i] < place[n] for n in order for i in n.all_input_nodes)
    value, _ = output_of(traced, order, x)
    assert torch.allclose(value, outputs(net, x), rtol=1e-5, atol=1e-6)


def test_values_are_freed_in_any_order():
    net, x = randomise(residual((6, 2), (8, 1))), images(3)
    traced = network(net, x)
    order, _ = aims_of(traced)
    _, left = output_of(traced, order, x)
    assert {node.op for node in left} <= {"output"}


def test_of_two_that_end_in_a_sum_the_deeper_one_closes():
    net, x = randomise(residual((6, 2), (8, 1))), images(3)
    traced = network(net, x)
    _, aims = aims_of(traced)
    closing = {name for name, aim in aims.items() if aim.added is not None}
    assert closing == {"_1_0_b_0", "_1_1_b_0", "_2_0_b_0"}
    assert aims["_2_0_skip_0"].at == aims["_2_0_skip_0"].producer.joint
    assert aims["_2_0_b_0"].added == aims["_2_0_skip_0"].producer.joint
    spread = {name for name, aim in aims.items() if aim.needs_spread}
    assert spread == {"_0_0", "_1_0_a_0", "_1_1_a_0", "_2_0_a_0"}


class Overwriting(nn.Module):
    """Reads a value, then writes over it: the graph's own order counts."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (conv(n, 4, norm=False, act=False) for n in (3, 4, 4))
        self.head = Pooled(4, 3)

    def forward(self, x):
        x = self.a(x)
        y = self.b(x)
        return self.head(self.c(x.relu_()) + y)


def test_a_network_that_writes_in_place_is_taken_in_its_own_order():
    net, x = randomise(Overwriting()), images(3)
    traced = network(net, x)
    value, _ = output_of(traced, aims_of(traced)[0], x)
    assert torch.allclose(value, outputs(net, x), atol=1e-6)


class Computed(nn.Module):
    """A weight that is computed from its parameter."""

    def __init__(self):
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.zeros(5, 6)), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(torch.relu(nn.functional.linear(x, self.weight * 1.0)))


def test_computed_and_shared_weights_and_joint_modules_are_left_alone():
    x = torch.randn(3, 6)
    assert set(aims_of(network(randomise(Computed()), x))[1]) == {"head"}
    net, x = build("shared")
    aims = aims_of(network(net, x))[1]
    assert {name for name, aim in aims.items() if not aim.shared} == {"_0_0", "_2_fc"}
    assert {aim.producer.weight for aim in aims.values() if aim.shared} == {"1.a.weight"}
    names = set(aims_of(network(randomise(Tokens()), images(2)))[1])
    assert names == {"embed", "blocks_0_mlp_0", "blocks_0_mlp_2", "head"}


def mixed(nets, x, weights, anchor=0):
    networks = [network(net, x) for net in nets]
    data = Calibration(x)
    balanced = deepen(networks, align_networks(networks, data))
    problem = Problem.of(balanced, anchor, weights)
    return Transport()(problem, measure(problem, data, View(), {}, len(x)))


def targets_at(couplings, x):
    """Return the target and the networks' own values at each place that is aimed at."""
    targets, problem = Targets(couplings), couplings.problem
    base = problem.structure
    aims = {a.at: a for a in aims_of(base)[1].values()}
    targets_of = {}

    def visit(node, values):
        if node.name in aims:
            aim = aims[node.name]
            dim = aim.producer.axis % values[problem.anchor].dim()
            target = targets.mix(node.name, aim.producer.weight, dim, values)
            targets_of[node.name] = target, [None if v is None else v.clone() for v in values]

    walk(problem.networks, (x,), visit, targets.bypasses)
    return targets_of


def test_the_target_of_a_network_and_its_shuffled_copy_is_what_the_network_gives():
    import fxfuse

    for name in ("residual", "concat", "depthwise", "grouped", "tokens"):
        net, x = build(name)
        x = images()
        at_nodes = targets_at(mixed([net, fxfuse.permute(net, x[:2], seed=1)], x, (0.3, 0.7)), x)
        for node, (target, (first, _)) in at_nodes.items():
            scale = float(first.abs().max())
            assert float((target - first).abs().max()) < FUNCTION * scale, (name, node)


def test_a_plain_target_is_the_weighted_mean_in_matched_units():
    nets, x = [randomise(stages([5], [6]), s) for s in (1, 2)], images()
    couplings = mixed(nets, x, (0.3, 0.7))
    (target, values), *_ = targets_at(couplings, x).values()
    space = next(s.name for s in couplings.problem.networks[0].spaces if s.size == 5)
    moved = couplings.maps[space, 1].project.toarray()
    expected = 0.3 * values[0] + 0.7 * torch.einsum(
        "ij,njhw->nihw", torch.as_tensor(moved).float(), values[1]
    )
    assert torch.allclose(target, expected, rtol=1e-5, atol=1e-6)


def test_a_network_without_a_block_has_no_say_inside_and_counts_on_the_stream():
    nets = [randomise(residual((6, 3)), 1), randomise(residual((6, 1)), 2)]
    x = images()
    couplings = mixed(nets, x, (0.4, 0.6))
    at_nodes = targets_at(couplings, x)
    alone = [node for node, (_, values) in at_nodes.items() if values[1] is None]
    assert len(alone) == 2
    for node in alone:
        target, values = at_nodes[node]
        assert torch.allclose(target, values[0], rtol=1e-5, atol=1e-6)
    sums = [
        node for node, (_, values) in at_nodes.items() if "add" in node and values[1] is not None
    ]
    assert len(sums) == 3
    for node in sums:
        target, values = at_nodes[node]
        assert not torch.allclose(target, values[0], rtol=0.1)


def test_the_activation_behind_a_target_is_found_through_what_is_idle():
    net = nn.Sequential(nn.Linear(6, 5), nn.Dropout(), nn.GELU(), nn.Linear(5, 4), nn.Linear(4, 3))
    _, aims = aims_of(network(randomise(net), torch.randn(3, 6)))
    assert [aim.activation for aim in aims.values()] == ["_2", None, None]
    assert [aim.needs_spread for aim in aims.values()] == [True, False, False]


def test_the_output_is_the_last_step_also_behind_layers_that_nothing_reads():
    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.spare = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 2)

        def forward(self, x):
            x = self.a(x).relu()
            self.spare(x)
            return (self.b(x),)

    x = torch.randn(30, 4)
    order, aims = aims_of(network(Spare(), x))
    assert order[-1].op == "output" and "spare" in aims
    fused = fxfuse.fuse([Spare(), Spare()], x)
    assert fused.meta["fxfuse"].divergence is None, "a tuple has no logits"


class AlongTokens(nn.Module):
    """Mixes along tokens, then along channels."""

    def __init__(self, width=5):
        super().__init__()
        self.embed, self.out = nn.Conv2d(3, width, 4, 4), nn.Linear(width, 3)
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x):
        x = self.embed(x).flatten(2)
        return self.out((x + self.down(torch.tanh(self.up(x)))).mean(2))


def test_units_beside_those_that_are_written_are_known():
    _, aims = aims_of(network(randomise(AlongTokens()), images(2)))
    assert {name: aim.beside for name, aim in aims.items() if aim.beside} == {
        "up": (1,),
        "down": (1,),
    }


def test_rows_count_by_what_each_network_gives_at_their_unit_beside():
    targets = Targets(mixed([randomise(AlongTokens(), s) for s in (1, 2)], images(), (0.3, 0.7)))
    given = iter([[1, 1, 1, 0, 1.0], [1, 1, 1, 1, 0.0]] * 9)
    targets._given = lambda node, dim, k: np.array(next(given))
    at = torch.arange(10)
    beside = targets.given_beside("up", (1,), 2, (2, 5, 6), at)
    assert [b.tolist() for b in beside] == [[1, 1, 1, 0, 1] * 2, [1, 1, 1, 1, 0] * 2]
    mass = targets.mass("up", 1, [0.3, 0.7], [b.numpy() for b in beside])
    assert mass.shape == (10, 5)
    assert mass[3].tolist() == [0.7, 0.7, 0.7, 0.7, 1.0]
    assert mass[4].tolist() == [0.3, 0.3, 0.3, 1.0, 0.3]
