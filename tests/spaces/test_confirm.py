"""Other inputs decide where labels are wrong: units at fault are frozen, all others stay free."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import fxfuse
from fxfuse.graph.trace import trace
from fxfuse.spaces import _confirm, _rules
from fxfuse.spaces.network import OPEN, analyse
from fxfuse.spaces.operators import OPERATORS
from tests.support.nets import NETS, build, gap, randomise
from tests.support.tolerances import PERMUTATION


class Chain(nn.Module):
    """Layers with a function of the units between the second and the third."""

    def __init__(self, function):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 7), nn.Linear(7, 8), nn.Linear(8, 5)
        self.head, self.function = nn.Linear(5, 3), function

    def forward(self, x):
        x = self.function(torch.tanh(self.b(torch.tanh(self.a(x)))))
        return self.head(torch.tanh(self.c(x)))


@pytest.fixture
def wrong_rule(monkeypatch):
    """A row that says of sums along an axis that they leave every unit as it is."""
    row = replace(OPERATORS["cumsum"], rule=_rules.unchanged)
    monkeypatch.setitem(OPERATORS, "cumsum", row)


def test_what_a_wrong_rule_leaves_free_is_frozen_and_nothing_else(wrong_rule):
    net, x = randomise(Chain(lambda x: x.cumsum(1))), torch.randn(4, 6)
    spaces = fxfuse.find_spaces(net, x)
    assert [(s.name, s.size) for s in spaces] == [("a", 7), ("c", 5)]
    assert {f.tensor for f in spaces.frozen if f.reason == _confirm.REASON} == {
        "b.weight",
        "b.bias",
        "c.weight",
    }
    assert gap(net, fxfuse.permute(net, x), torch.randn(4, 6)) < PERMUTATION


def test_fused_copies_are_confirmed_too(wrong_rule):
    net, data = randomise(Chain(lambda x: x.cumsum(1))), torch.randn(64, 6)
    fused = fxfuse.fuse([net, fxfuse.permute(net, data[:4], seed=3)], data)
    assert gap(net, fused, torch.randn(8, 6)) < 1e-3


class Heads(nn.Module):
    """Attention whose heads, or the units inside, are summed up one after the other."""

    def __init__(self, dim):
        super().__init__()
        self.dim, self.read, self.write = dim, nn.Linear(6, 3 * 8), nn.Linear(8, 3)

    def forward(self, x):
        q, k, v = self.read(x).view(2, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
        mixed = (q @ k.mT).softmax(-1) @ v
        return self.write(mixed.cumsum(self.dim).transpose(1, 2).reshape(2, 5, 8))


@pytest.mark.parametrize("dim", [1, 3])
def test_units_that_travel_with_blocks_are_told_apart(wrong_rule, dim):
    net, x = randomise(Heads(dim)), torch.randn(2, 5, 6)
    assert gap(net, fxfuse.permute(net, x), torch.randn(2, 5, 6)) < PERMUTATION
    assert sorted(s.size for s in fxfuse.find_spaces(net, x)) == [4, 4], "queries and keys"


class ComputedTable(nn.Module):
    """Places whose vectors a layer computes; the example is shorter than the table."""

    def __init__(self):
        super().__init__()
        self.register_buffer("places", torch.zeros(16, 2))
        self.table, self.a, self.b = nn.Linear(2, 8), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x) + self.table(self.places)[: x.shape[1]]))


def test_places_that_only_longer_inputs_reach_stay():
    net, x = randomise(ComputedTable()), torch.randn(2, 5, 6)
    assert sorted(s.size for s in fxfuse.find_spaces(net, x)) == [2, 8], "not the 16 places"
    assert gap(net, fxfuse.permute(net, x), torch.randn(2, 16, 6)) < PERMUTATION


def test_rounding_is_no_evidence():
    def ill_conditioned(x):
        return x + (x.sum(1, keepdim=True) * 1e6).frac()

    assert fxfuse.find_spaces(randomise(Chain(ill_conditioned)), torch.randn(4, 6)).free_units == 20


@pytest.mark.parametrize("name", NETS)
def test_right_spaces_pass(name):
    net, x = build(name)
    spaces = fxfuse.find_spaces(net, x)
    assert not any(f.reason == _confirm.REASON for f in spaces.frozen)


class Choosy(nn.Module):
    """Takes only truth values, whole numbers within bounds, or what is not negative."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.table, self.b = kind, nn.Embedding(9, 8), nn.Linear(8, 3)

    def forward(self, x):
        if self.kind == "mask":
            x = self.table.weight.expand(x.shape[0], 9, 8).masked_fill(~x[:, :, None], 0).sum(1)
        elif self.kind == "roots":
            x = x.sqrt().sum(1, keepdim=True) + self.table.weight[0]
        else:
            x = self.table(x).mean(1)
        return self.b(torch.tanh(x))


@pytest.mark.parametrize("kind", ["mask", "roots", "tokens"])
def test_inputs_of_the_same_kind_are_drawn(kind):
    x = {"mask": torch.ones(3, 9) > 0, "roots": torch.rand(3, 4)}
    net, x = randomise(Choosy(kind)), x.get(kind, torch.tensor([[8, 0, 3]]))
    assert fxfuse.find_spaces(net, x).free_units == 8


def test_random_networks_are_compared_with_the_same_random_numbers():
    net = randomise(Chain(lambda x: x + torch.rand(1, device=x.device)))
    assert fxfuse.find_spaces(net, torch.randn(4, 6)).free_units == 20


@pytest.mark.parametrize("name", ["outputs", "inputs"])
def test_units_that_a_cut_network_returns_or_reads_are_confirmed_in_their_new_order(
    wrong_rule, name
):
    for function, sizes in ((torch.tanh, {7, 8, 5}), (lambda x: x.cumsum(1), {7, 5})):
        graph = trace(randomise(Chain(function)))
        nodes = list(graph.graph.nodes)
        if name == "outputs":
            nodes[-1].meta[OPEN], sizes = True, sizes | {3}
        else:
            nodes[0].meta[OPEN], sizes = 1, sizes | {6}
        _, spaces = analyse(graph, (torch.randn(4, 6),))
        assert {s.size for s in spaces} == sizes
