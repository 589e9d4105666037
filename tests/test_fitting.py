"""One contraction fitted at some positions: against brute force on the whole values."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nets import conv, outputs, randomise
from torch import nn

from fxfuse.fitting import Fit, Task, moments_of_rows
from fxfuse.moments import Moments
from fxfuse.network import Network
from fxfuse.sampling import reads_at, rows_at
from fxfuse.targets import aims_of
from fxfuse.tracing import trace

RIDGES = (1e-6, 1e-2)
KINDS = {
    "bias": lambda: conv(3, 4, norm=False, act=False),
    "norm": lambda: conv(3, 4, act=False),
    "neither": lambda: nn.Conv2d(3, 4, 3, padding=1, bias=False),
    "groups": lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2),
    "relu": lambda: conv(3, 4, norm=False),
}


def case(kind, seed=0, count=40):
    """Return a network whose first contraction is to be fitted, its aim and an input."""
    net = randomise(
        nn.Sequential(KINDS[kind](), nn.Conv2d(6 if kind == "groups" else 4, 2, 1)), seed
    )
    inputs = next(p for p in net.parameters() if p.dim() == 4).shape[1] * (1 + (kind == "groups"))
    x = torch.randn(count, inputs, 6, 6, generator=torch.Generator().manual_seed(seed + 50))
    one = Network.of("net", trace(net.eval()), (x[:2],))
    aim = next(iter(aims_of(one)[1].values()))
    return one, aim, x + 0.5


def value_at(network, x, name):
    found = {}
    for part, module in network.module.named_modules():
        if part.replace(".", "_") == name.strip("_"):
            module.register_forward_hook(lambda m, i, out: found.update(value=out.clone()))
    outputs(network.module, x)
    return found["value"]


def task_of(network, aim, x, wanted, acted=None):
    at = torch.arange(len(x) * 36)
    rows = [None if t is None else rows_at(t, 1, at) for t in (wanted, acted)]
    reads = reads_at(x, aim.producer.affine, at)
    return Task(reads, rows[0], rows[1], None, torch.relu, len(at) * 3 // 4, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_target_within_reach_is_reached(kind):
    network, aim, x = case(kind)
    other, _, _ = case(kind, seed=1)
    wanted = value_at(other, x, aim.at)
    acted = wanted.relu() if aim.through else None
    Fit(network, aim, task_of(network, aim, x, wanted, acted), RIDGES)(1)
    error = value_at(network, x, aim.at) - wanted
    assert float(error.square().mean() / wanted.var()) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_a_target_that_is_met_changes_nothing(kind):
    network, aim, x = case(kind)
    wanted = value_at(network, x, aim.at)
    state = {k: t.clone() for k, t in network.module.state_dict().items()}
    acted = wanted.relu() if aim.through else None
    correction = Fit(network, aim, task_of(network, aim, x, wanted, acted), RIDGES)(1)
    assert correction.weight is None
    assert torch.allclose(value_at(network, x, aim.at), wanted, atol=1e-5)
    if aim.producer.norm is None:  # which takes what its contraction is scaled by
        weight = state[aim.producer.weight]
        assert torch.allclose(network.module.state_dict()[aim.producer.weight], weight, rtol=1e-5)


@pytest.mark.parametrize("kind", ["bias", "norm", "groups"])
def test_units_get_the_mean_of_what_is_wanted_and_the_activated_their_spread(kind):
    network, aim, x = case(kind)
    wanted = torch.randn(value_at(network, x, aim.at).shape) * 3 + 2
    Fit(network, aim, task_of(network, aim, x, wanted), RIDGES)(1)
    given = value_at(network, x, aim.at).movedim(1, 0).flatten(1)
    assert torch.allclose(given.mean(1), wanted.movedim(1, 0).flatten(1).mean(1), atol=1e-4)


def test_steps_follow_the_gradient_of_what_the_activations_lack():
    found = []
    for steps in (0, 1, 3):
        network, aim, x = case("relu", count=200)
        aim = replace(aim, swing=False)
        others = [case("relu", seed=s)[0] for s in (1, 2)]
        values = [value_at(o, x, aim.at) for o in others]
        acted = sum(v.relu() for v in values) / 2
        Fit(network, aim, task_of(network, aim, x, sum(values) / 2, acted), RIDGES)(steps)
        left = rows_at(value_at(network, x, aim.at).relu() - acted, 1, torch.arange(200 * 36))
        reads = reads_at(x, aim.producer.affine, torch.arange(200 * 36))[0]
        found.append(float(((reads - reads.mean(0)).T @ (left - left.mean(0))).norm()))
    assert found[0] > found[1] > found[2]


@given(st.integers(1, 50), st.integers(1, 4), st.integers(0, 99))
def test_moments_of_rows_are_those_of_units(count, units, seed):
    rows = torch.randn(count, units, generator=torch.Generator().manual_seed(seed)) * 3 + 5
    found, expected = moments_of_rows(rows), Moments()
    expected.add(rows.T)
    for name in ("mean", "spread", "power"):
        assert np.allclose(getattr(found, name), getattr(expected, name), rtol=1e-4, atol=1e-5)
