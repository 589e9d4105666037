"""What forward writes to: constants are made anew at each call, and assigned buffers keep count."""

import copy
import operator
import random

import pytest
import torch
from torch import fx, nn

import fxfuse
from fxfuse.errors import TraceError
from fxfuse.graph.trace import trace
from fxfuse.graph.writes import writes
from tests.support.nets import gap, randomise
from tests.support.sweeps import crossed
from tests.support.tolerances import PERMUTATION


class Writes(nn.Module):
    """A network that writes to something in its forward."""

    def __init__(self, how, only_in_training=False):
        super().__init__()
        self.how, self.only_in_training = how, only_in_training
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)
        self.register_buffer("steps", torch.tensor(5))
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x):
        units = torch.tanh(self.a(x))
        if self.training or not self.only_in_training:
            units = getattr(self, self.how)(units)
        return self.b(units + 0.1 * self.mean)

    def counter(self, units):
        self.steps += 1
        return units

    def assigned_counter(self, units):
        self.steps = self.steps + 1
        return units

    def counted_in_place(self, units):
        self.steps.add_(1)
        return units

    def running_mean(self, units):
        self.mean = 0.9 * self.mean + 0.1 * units.mean(0)
        return units

    def before_and_after(self, units):
        before = self.mean
        self.mean = units.mean(0)
        return units - before * self.mean

    def total(self, units):
        total = torch.zeros(8)
        total += units.mean(0)
        return units + total

    def parts(self, units):
        parts = torch.zeros(1, 8)
        parts[:, 2:] = units[:1, 2:]
        return units + parts


HOWS = [name for name in vars(Writes) if not name.startswith("_") and name != "forward"]


@pytest.mark.parametrize("only_in_training", [False, True])
@pytest.mark.parametrize("how", HOWS)
def test_a_copy_writes_what_the_network_writes_at_each_call(how, only_in_training):
    net = randomise(Writes(how, only_in_training))
    before = copy.deepcopy(net.state_dict())
    permuted = fxfuse.permute(net, torch.randn(4, 6), seed=1)
    assert all(torch.equal(t, before[k]) for k, t in net.state_dict().items()), "left as it was"
    for _ in range(3):
        assert gap(net, permuted, torch.randn(4, 6)) < PERMUTATION
    if "steps" in permuted.state_dict():
        assert net.steps == permuted.steps
    loaded = Writes(how, only_in_training).eval()
    loaded.load_state_dict(permuted.state_dict(), strict="count" in how)
    assert gap(loaded, permuted, torch.randn(4, 6)) < PERMUTATION


@pytest.mark.parametrize("how", ["counter", "assigned_counter", "counted_in_place"])
def test_what_training_counts_is_counted_in_training_mode_only(how):
    graph = trace(randomise(Writes(how, True)))
    graph(torch.randn(4, 6))
    assert int(graph.steps) == 5
    graph.train()
    graph(torch.randn(4, 6))
    assert int(graph.steps) == 6


@pytest.mark.parametrize(
    ("how", "method", "only_in_training"), crossed(HOWS, ("best", "otfusion"), (False, True))
)
def test_networks_that_write_are_fused_as_they_were_before(how, method, only_in_training):
    net, data = randomise(Writes(how, only_in_training)), torch.randn(64, 6)
    fused = fxfuse.fuse([net, fxfuse.permute(net, data[:4], seed=2)], data, method=method)
    for name, kept in fused.named_buffers():
        assert how != "counter" or kept.is_floating_point() or int(kept) == 5, name
    assert gap(copy.deepcopy(net), fused, torch.randn(4, 6)) < 1e-3


class Late(nn.Module):
    def forward(self, x):
        total = torch.ones(6)
        y = x * total
        total += 1
        return y + total


def test_a_constant_that_is_changed_after_its_use_is_not_traced_symbolically():
    x = torch.randn(2, 6)
    with pytest.raises(TraceError, match="writes to again"):
        trace(Late(), x, doors=["traced symbolically"])
    assert gap(Late(), trace(Late(), x), x) == 0


@pytest.mark.parametrize("how", HOWS)
def test_recorded_forwards_write_the_same(how):
    net, x = randomise(Writes(how)), torch.randn(4, 6)
    graph = trace(net, x, doors=["recorded"])
    for _ in range(3):
        assert gap(net, graph, x) < PERMUTATION
    assert all(torch.allclose(t, net.state_dict()[k]) for k, t in graph.state_dict().items())


class Noise(nn.Module):
    """Random numbers that no input takes part in."""

    def __init__(self, only_in_training):
        super().__init__()
        self.only_in_training = only_in_training

    def forward(self, x):
        if self.training or not self.only_in_training:
            return x + (torch.randn(6) if random.random() < 0.9 else 0)
        return x


def test_random_numbers_are_no_constants():
    net = nn.Sequential(nn.Linear(6, 6), Noise(False), nn.Linear(6, 3))
    with pytest.raises(TraceError, match="random numbers") as refused:
        fxfuse.find_spaces(net, torch.randn(2, 6))
    assert "Noise" in refused.value.where
    net = nn.Sequential(Noise(False), nn.Linear(6, 6), nn.Linear(6, 3))
    with pytest.raises(TraceError, match="random numbers") as refused:
        fxfuse.find_spaces(net, torch.randn(2, 6))
    assert "Noise" in refused.value.where


def test_noise_of_training_is_drawn_at_each_call():
    graph = trace(nn.Sequential(nn.Linear(6, 6), Noise(True), nn.Linear(6, 3)).train())
    x = torch.randn(2, 6)
    assert not torch.equal(graph(x), graph(x))
    assert torch.equal(graph.eval()(x), graph(x))


@pytest.mark.parametrize("name", ["and_", "or_", "not_", "iand", "iadd", "setitem", "add"])
def test_operators_of_python_write_where_they_assign(name):
    graph = fx.Graph()
    node = graph.call_function(getattr(operator, name), (graph.placeholder("x"),))
    assert writes(node) == (name in ("iand", "iadd", "setitem"))
