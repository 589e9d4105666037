"""Where units are measured, before or behind their activations, and which networks are compared."""

import numpy as np
import pytest
import torch
from torch import nn

import fxfuse
from fxfuse.calibration.data import Calibration
from fxfuse.coupling.measure import View, measure, points_of
from fxfuse.coupling.transport import Transport
from fxfuse.coupling.zipit import Zip
from fxfuse.ir import OUTPUTS
from fxfuse.refit.emit import outputs_to_settle
from tests.support.nets import (
    build,
    conv,
    data_shape,
    gap,
    mlp,
    outputs,
    randomise,
    residual,
    stages,
    values,
)
from tests.support.problems import network, problem_of


def images(count=40):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(5))


def measuring_points(net, activated):
    return set(points_of(net, View(activated)).values())


def activated_next(net, points):
    """The points that one activation reads and nothing else."""
    nodes = {n.name: n for n in net.module.graph.nodes}
    users = {p: list(nodes[p].users) for p in points}
    return {p for p, u in users.items() if len(u) == 1 and net.is_activation(u[0])}


@pytest.mark.parametrize("name", ["plain", "batch norm", "residual", "depthwise", "gate", "tokens"])
def test_points_go_on_behind_the_activations_where_there_are_any(name):
    net, x = build(name)
    found = network(net, x)
    before, after = (measuring_points(found, a) for a in (False, True))
    assert len(before) == len(after)
    assert activated_next(found, before) and not activated_next(found, after)
    assert after - before and before & after  # the head, at least, has no activation


def test_points_of_a_residual_block_lie_behind_its_add_or_the_activation_of_the_whole_block():
    net = randomise(residual((6, 2), (8, 1)))
    x = images(2)
    found = network(net, x)
    seen = values(found.module, x)
    before, after = (measuring_points(found, a) for a in (False, True))
    adds = {n.name for n in found.module.graph.nodes if n.name.startswith("add")}
    assert len(adds) == 3 and adds <= before and not adds & after
    acts = {u.name for n in found.module.graph.nodes if n.name in adds for u in n.users}
    assert len(acts) == 3 and acts <= after
    head = {n for n in before & after if seen[n].shape == (2, 3)}
    assert all(float(seen[n].min()) >= 0 for n in after - head)
    assert any(float(seen[n].min()) < 0 for n in before - head)


def test_an_activation_whose_value_is_not_labelled_is_not_passed():
    net, x = build("plain")
    found = network(net, x)
    before, after = (measuring_points(found, a) for a in (False, True))
    lost = sorted(after - before)[0]
    del found.features[lost]
    assert measuring_points(found, True) == after - {lost} | {
        n.all_input_nodes[0].name for n in found.module.graph.nodes if n.name == lost
    }


class PreNorm(nn.Module):
    """Norm and activation in front: the stream itself is never activated."""

    def __init__(self, width):
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, 1, 1)

    def forward(self, x):
        return x + self.conv(torch.relu(self.norm(x)))


def test_a_stream_that_several_read_is_measured_as_it_is():
    net = randomise(nn.Sequential(conv(3, 6), PreNorm(6), PreNorm(6), nn.Conv2d(6, 3, 1)))
    found = network(net, images(2))
    adds = {n.name for n in found.module.graph.nodes if n.name.startswith("add")}
    assert len(adds) == 2 and adds <= measuring_points(found, True)


def test_what_is_measured_behind_an_activation_is_what_it_makes_of_the_units():
    nets, x = [randomise(stages([5], [6]), s) for s in (1, 2)], images(70)
    problem, data = problem_of(nets, x), Calibration(x)
    found = measure(problem, data, View(activated=True), {}, 70)
    assert found.pairs
    for (name, i, k), places in found.pairs.items():
        for node, moments in places.items():
            for index, side in ((i, moments.a), (k, moments.b)):
                value = values(problem.networks[index].module, x)[node]
                flat = value.movedim(1, 0).flatten(1).double().numpy()
                assert flat.min() >= 0, name
                assert np.allclose(side.mean, flat.mean(1), atol=1e-5)
                assert np.allclose(side.spread, flat.std(1), atol=1e-5)


@pytest.mark.parametrize("activated", [False, True])
def test_everything_is_all_pairs_of_networks_and_each_with_itself(activated):
    nets = [randomise(residual((6, 2), (8, 1)), s) for s in (1, 2)]
    nets.append(randomise(residual((6, 1), (8, 1)), 3))
    problem, data = problem_of(nets, images()), Calibration(images())
    found = measure(problem, data, View(activated, everything=True), {}, 40)
    base = measure(problem, data, View(activated), {}, 40)
    for name, present in problem.present.items():
        here = [k for k, has in enumerate(present) if has]
        pairs = {(name, i, k) for i in here for k in here if i <= k}
        assert pairs == {key for key in found.pairs if key[0] == name}
        for _, i, k in pairs:
            if i == k:
                for m in found.pairs[name, i, k].values():
                    assert np.allclose(np.diag(m.covariance), m.a.variance, atol=1e-5)
            elif i == problem.base[name]:
                for node, m in base.pairs[name, i, k].items():
                    same = found.pairs[name, i, k][node]
                    assert np.allclose(m.covariance, same.covariance, atol=1e-6)


@pytest.mark.parametrize("coupling", [Transport, Zip])
@pytest.mark.parametrize("name", ["plain", "residual"])
def test_measuring_behind_activations_changes_the_result(coupling, name):
    nets = [build(name, seed)[0] for seed in (0, 5)]
    x = torch.randn(40, *data_shape(name), generator=torch.Generator().manual_seed(3))
    all_pairs = coupling is Zip
    fused = [
        fxfuse.fuse(nets, x, method=fxfuse.Method(coupling=coupling(view=View(a, all_pairs))))
        for a in (False, True)
    ]
    assert gap(*fused, x) > 1e-3


def test_transport_takes_what_it_needs_of_a_view_of_everything():
    nets, x = [randomise(mlp(6, 8, 7, 3), s) for s in (1, 2, 3)], torch.randn(40, 6)
    fused = [
        fxfuse.fuse(nets, x, anchor=1, method=fxfuse.Method(coupling=Transport(view=view)))
        for view in (View(), View(everything=True))
    ]
    assert gap(*fused, x) < 1e-6


@pytest.mark.parametrize("enough, expected", [((16, 100), 16), ((8, 2000), 32), ((100, 100), 40)])
def test_no_more_samples_are_run_than_tell_how_alike_units_are(enough, expected, monkeypatch):
    monkeypatch.setattr("fxfuse.coupling.measure.ENOUGH_SAMPLES", enough[0])
    monkeypatch.setattr("fxfuse.coupling.measure.ENOUGH_POSITIONS", enough[1])
    monkeypatch.setattr("fxfuse.calibration.run.BATCH_SAMPLES", 8)
    net = nn.Sequential(conv(3, 4), conv(4, 5), nn.Conv2d(5, 2, 1))
    problem = problem_of([randomise(net, s) for s in (1, 1)], images())
    data = Calibration(images())
    node = next(n.name for n in problem.networks[0].module.graph.nodes if n.op == "call_module")
    for nodes, seen in (({}, expected), ({node: 1}, 40)):
        found = measure(problem, data, View(), nodes, 40)
        counts = {m.a.count for places in found.pairs.values() for m in places.values()}
        assert counts == {64 * seen}


def test_outputs_are_compared_with_the_anchor_only():
    nets, x = [randomise(mlp(6, 5, 3), s) for s in range(5)], torch.randn(20, 6)
    found = measure(problem_of(nets, x), Calibration(x), View(outputs=True), {}, 20).pairs
    assert sorted(k for name, i, k in found if name == OUTPUTS and i == 0) == [1, 2, 3, 4]
    assert len(found) == 8  # of outputs and of one space, with every network but the anchor


def test_the_joint_pass_measures_what_numpy_measures():
    nets, x = [randomise(stages([5], [6]), s) for s in (1, 2)], images(70)
    problem, data = problem_of(nets, x), Calibration(x)
    nodes = outputs_to_settle(problem.networks[0])
    evidence = measure(problem, data, View(), nodes, 70)
    point = next(iter(measuring_points(problem.networks[0], False) & set(nodes)))
    for k, net in enumerate(nets):
        recorded = {}
        net[0][0][1].register_forward_hook(lambda m, i, o, r=recorded: r.update(out=o))
        outputs(net, x)
        expected = recorded["out"].transpose(0, 1).flatten(1).double().numpy()
        first = next(n for n in nodes if n in problem.networks[0].norms)
        assert np.allclose(evidence.outputs[first][k].mean, expected.mean(1), atol=1e-5)
        assert np.allclose(evidence.outputs[first][k].spread, expected.std(1), atol=1e-5)
    assert point
