"""Contractions inside one node: what is recorded of them, and how they are fitted."""

import numpy as np
import pytest
import torch
from torch import nn

import fxfuse
from fxfuse.calibration.run import Run
from fxfuse.coupling.mixing import Mixer
from fxfuse.coupling.transport import Transport
from fxfuse.graph.trace import trace
from fxfuse.refit import sweep
from fxfuse.refit._inside import inner_nodes, recorded
from fxfuse.spaces.network import Network
from tests.support.nets import gap, randomise
from tests.support.sweeps import some


def data(samples, seed):
    return torch.randn(samples, 7, 6, generator=torch.Generator().manual_seed(seed))


class Recurrent(nn.Module):
    """A layer over a sequence; its last state is read."""

    def __init__(self, kind, **settings):
        super().__init__()
        self.read = kind(6, 8, batch_first=True, **settings)
        self.out = nn.Linear(8 * (1 + self.read.bidirectional), 3)

    def forward(self, x):
        return self.out(self.read(x)[0][:, -1])


class Attending(nn.Module):
    """Attention in one module."""

    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Linear(6, 8), nn.Linear(8, 3)
        self.read = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        x = self.embed(x)
        return self.out((x + self.read(x, x, x, need_weights=False)[0]).mean(1))


MAKE = {
    "lstm": lambda: Recurrent(nn.LSTM),
    "gru": lambda: Recurrent(nn.GRU),
    "rnn": lambda: Recurrent(nn.RNN, bias=False),
    "deep": lambda: Recurrent(nn.GRU, num_layers=2, bidirectional=True),
}


def network(net):
    example = data(4, 0)
    return Network.of("net", trace(net, example), (example,))


@pytest.mark.parametrize("name", MAKE)
def test_what_is_recorded_is_what_weights_and_biases_make_of_the_inputs(name):
    one = network(randomise(MAKE[name]()))
    nodes, run = inner_nodes(one, []), Run(one, (data(5, 1),))
    assert nodes == ["read"]
    with torch.no_grad():
        for node in one.module.graph.nodes:
            if node.name == "read":
                rows, _ = recorded(run, node)
            run.step(node)
    matrices = {n for n, p in one.module.named_parameters() if p.dim() == 2 and "read" in n}
    assert rows.keys() == matrices
    for weight, row in rows.items():
        expected = row.x @ one.module.get_parameter(weight).T
        if row.bias is not None:
            expected = expected + one.module.get_parameter(row.bias)
        assert torch.allclose(row.z, expected, atol=1e-5)
        assert (row.bias is None) == (name == "rnn")


def test_weights_that_are_used_once_are_left_as_they_are_coupled():
    one = network(randomise(Attending()))
    assert len(one.contractions("read")) > 1 and inner_nodes(one, []) == []


def test_the_later_of_two_in_one_sum_has_the_other_added():
    one = network(randomise(MAKE["lstm"]()))
    run = Run(one, (data(5, 1),))
    with torch.no_grad():
        for node in one.module.graph.nodes:
            if node.name == "read":
                rows, _ = recorded(run, node)
            run.step(node)
    first, second = rows.values()
    assert not first.added.any()
    steps = first.z.view(7, 5, -1).flatten(0, 1)
    assert torch.equal(second.added, steps)


@pytest.mark.parametrize("name", some(MAKE, "lstm", "deep"))
def test_copies_and_a_lone_network_come_back(name):
    nets = [randomise(MAKE[name](), seed) for seed in (1, 2)]
    x = data(60, 2)
    copies = [nets[0], fxfuse.permute(nets[0], x, seed=1)]
    assert gap(nets[0], fxfuse.fuse(copies, x), x) < 1e-4
    assert gap(nets[0], fxfuse.fuse(nets, x, weights=[1, 0], anchor=0), x) < 1e-4


class Noisy(Mixer):
    """Weights with noise, which a fit to the networks has to undo."""

    def __call__(self, named, shares):
        rng = np.random.default_rng(0)
        return lambda name, tensors: (
            tensors[0] + 0.3 * tensors[0].std() * rng.standard_normal(tensors[0].shape)
        )


@pytest.mark.parametrize("name", some(MAKE, "lstm", "gru"))
def test_new_data_see_less_error_than_without(name, monkeypatch):
    net, x, fresh = randomise(MAKE[name]()), data(120, 3), data(60, 4)
    nets, method = (
        [net, fxfuse.permute(net, x[:4], seed=1)],
        fxfuse.Method(coupling=Transport(), mixer=Noisy()),
    )
    errors = []
    for inner in (inner_nodes, lambda network, aims: []):
        monkeypatch.setattr(sweep, "inner_nodes", inner)
        errors.append(gap(net, fxfuse.fuse(nets, x, method=method), fresh))
    assert errors[0] < errors[1] / 2
