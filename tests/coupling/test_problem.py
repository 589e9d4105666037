"""Which spaces correspond, whose units lead, and how networks share what only some of them have."""

import pytest
import torch
from torch import nn

from fxfuse import fuse
from fxfuse.coupling.problem import Problem, absent_tensors, foreign_tensors
from fxfuse.depth.deepen import Balanced
from fxfuse.errors import PairingError
from fxfuse.graph.compare import relative_error
from tests.support.nets import mlp, randomise, residual
from tests.support.problems import images, network, problem_of
from tests.support.sweeps import some
from tests.support.tolerances import FUNCTION


def test_a_network_without_a_block_adds_nothing_to_the_stream_and_has_no_share_inside():
    """The zeros that silence the block count, its other tensors belong to the other network."""
    nets, x = (
        [randomise(residual((6, 3), (8, 1)), 1), randomise(residual((6, 1), (8, 1)), 2)],
        images(),
    )
    problem = problem_of(nets, x, weights=(0.4, 0.6))
    lacking = absent_tensors(problem.networks[1], problem.absent[1])
    assert lacking and not absent_tensors(problem.networks[0], problem.absent[0])
    inside = [n for n in lacking if n.endswith("weight")]
    shares = {name: problem.shares(name) for name in inside}
    assert {tuple(s) for s in shares.values()} == {(1.0, 0.0)}
    silent = {t for a in problem.absent[1] for t in a.zeroed}
    assert silent and all(problem.shares(name) == [0.4, 0.6] for name in silent)
    assert problem.shares("0.0.weight") == [0.4, 0.6]


def test_absent_layers_count_as_zeros_if_asked_for():
    nets = [randomise(residual((6, 3), (8, 1)), 1), randomise(residual((6, 1), (8, 1)), 2)]
    problem = problem_of(nets, images(), weights=(0.4, 0.6))
    lacking = absent_tensors(problem.networks[1], problem.absent[1])
    zeros = Problem.of(Balanced(problem.networks, problem.absent, (0.0, 0.0)), 0, (0.4, 0.6), True)
    assert all(zeros.shares(name) == [0.4, 0.0] for name in lacking)
    assert lacking < foreign_tensors(problem.networks[1], problem.absent[1])


def test_shares_are_equal_where_none_of_those_that_have_a_tensor_has_weight():
    nets = [randomise(mlp(6, 8, 3), s) for s in range(3)]
    problem = problem_of(nets, torch.randn(8, 6), weights=(1.0, 0.0, 0.0))
    assert problem.among([True, True, False]) == [1.0, 0.0, 0.0]
    assert problem.among([False, True, True]) == [0.0, 0.5, 0.5]


def test_another_network_leads_where_its_widths_are_those_of_the_anchor():
    nets = [
        randomise(mlp(6, 8, 7, 3), 1),
        randomise(mlp(6, 8, 7, 3), 2),
        randomise(mlp(6, 5, 7, 3)),
    ]
    problem = problem_of(nets, torch.randn(8, 6))
    led = problem.led_by(1)
    assert (led.lead, led.anchor, set(led.base.values())) == (1, 0, {1})
    assert led.base_space("0") is problem.spaces["0"][1]
    assert problem.led_by(2) is None


def test_units_of_a_layer_that_the_anchor_lacks_are_those_of_the_first_network_as_wide():
    nets = [randomise(residual((6, n), (8, 1)), n) for n in (1, 2, 2)]
    problem = problem_of(nets, images(), anchor=0)
    lacking = {name for name, present in problem.present.items() if not present[0]}
    assert lacking and all(problem.base[name] == 1 for name in lacking)
    assert all(base == 0 for name, base in problem.base.items() if name not in lacking)


def test_networks_whose_fixed_axes_differ_are_refused():
    x = torch.randn(8, 6)
    both = network(randomise(mlp(6, 8, 3)), x), network(randomise(mlp(6, 8, 4)), x)
    with pytest.raises(PairingError, match="stay in place, of size 3 and 4"):
        Problem.between(both[1], both[0])


class Stream(nn.Module):
    """A residual stream with a branch, both of a given width."""

    def __init__(self, width):
        super().__init__()
        self.stem, self.head = nn.Linear(6, width), nn.Linear(width, 3)
        self.branch = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))

    def forward(self, x):
        """Add the branch."""
        x = self.stem(x)
        return self.head(x + self.branch(x))


class Recurrent(nn.Module):
    """The last state of a recurrent layer of a given width."""

    def __init__(self, width):
        super().__init__()
        self.cell, self.head = nn.LSTM(2, width, batch_first=True), nn.Linear(width, 3)

    def forward(self, x):
        """Read six numbers as three steps of two."""
        return self.head(self.cell(x.unflatten(1, (3, 2)))[0][:, -1])


class Stem(nn.Module):
    """A convolution, a norm and an activation of a given width in front of others."""

    def __init__(self, width):
        super().__init__()
        self.a, self.norm = nn.Conv1d(1, width, 3), nn.BatchNorm1d(width)
        self.b, self.head = nn.Conv1d(width, 4, 2), nn.Linear(12, 3)

    def forward(self, x):
        """Read six numbers as places."""
        x = torch.relu(self.norm(self.a(x[:, None])))
        return self.head(torch.relu(self.b(x)).flatten(1))


ONE_UNIT = {
    "plain": lambda w: mlp(6, w, 4, 3),
    "norms": lambda w: mlp(6, w, 4, 3, norm=True),
    "behind norms": lambda w: mlp(6, 4, w, 3, norm=True),
    "stem": Stem,
    "stream": Stream,
    "recurrent": Recurrent,
}


@pytest.mark.parametrize("name", some(ONE_UNIT, "norms", "stem", "stream"))
def test_a_layer_of_one_unit_meets_a_wider_one(name):
    """Along an axis of one position there are no labels; the other network shows what it is."""
    make = ONE_UNIT[name]
    nets, x, other = [randomise(make(w), w) for w in (1, 5)], torch.randn(40, 6), torch.randn(9, 6)
    for k, net in enumerate(nets):
        alone = fuse(nets, x, weights=[1.0 - k, float(k)], anchor=k)
        assert relative_error([alone(other)], [net(other)]) <= FUNCTION
        whole = fuse(nets, x, width=float("inf"), anchor=k)
        mean = torch.stack([n(other) for n in nets]).mean(0)
        assert relative_error([whole(other)], [mean]) <= FUNCTION
