"""How many units are kept within a budget, and the maps that merge the others into them."""

import numpy as np
import ot
import pytest
import torch

from fxfuse.calibration.data import Calibration, analyse
from fxfuse.errors import ArgumentError
from fxfuse.solvers import Exact
from fxfuse.width import magnitude
from fxfuse.width.narrower import FEWEST, Budget, pruned, smaller, transported
from tests.support.nets import build, mlp, randomise


@pytest.mark.parametrize(
    ("name", "of", "even"),
    [
        ("plain", "multiply_adds", True),
        ("residual", "parameters", True),
        ("residual", "multiply_adds", False),
        ("grouped", "parameters", False),
        ("tokens", "parameters", True),
    ],
)
def test_a_budget_is_kept_and_used(name, of, even):
    net, x = build(name)
    network, budget = analyse(net, x, "net"), Budget(0.6, of)
    small, _ = smaller(network, budget, None if even else magnitude(network, Calibration(x)))
    costs = [budget.costs(n)({s.name: s.size for s in n.spaces}) for n in (network, small)]
    assert 0.2 * costs[0] < costs[1] <= 0.6 * costs[0]


def test_numbers_are_those_of_one_sample():
    net, x = mlp(6, 8, 5, 3), torch.randn(7, 6)
    network = analyse(net, x, "net")
    sizes = {s.name: s.size for s in network.spaces}
    assert Budget(9, "multiply_adds").costs(network)(sizes) == 6 * 8 + 8 * 5 + 5 * 3
    count = sum(p.numel() for p in net.parameters())
    assert Budget(9, "parameters").costs(network)(sizes) == count


def test_competing_units_go_where_they_count_least_but_some_of_each_space_stay():
    net, x = randomise(mlp(6, 16, 16, 3)), torch.randn(5, 6)
    network = analyse(net, x, "net")
    scores = {"0": np.linspace(0.1, 0.2, 16), "2": np.linspace(1, 2, 16)}
    small, _ = smaller(network, Budget(0.6), scores)
    sizes = {s.name: s.size for s in small.spaces}
    assert 16 // FEWEST <= sizes["0"] < sizes["2"] and sum(sizes.values()) == 19


@pytest.mark.parametrize("to", [0, -1, 2])
def test_no_budget_is_refused(to):
    with pytest.raises(ArgumentError, match="to "):
        Budget(to)


def test_all_units_are_carried_onto_the_kept_ones():
    rng = np.random.default_rng(0)
    net, x = randomise(mlp(4, 6, 3)), torch.randn(5, 4)
    network = analyse(net, x, "net")
    small, _ = smaller(network, Budget(0.5), None)
    copied = pruned(network, small, {"0": np.array([5.0, 0, 4, 0, 0, 3])})
    assert copied.plan.sources["0"].tolist() == [0, 2, 5]
    cost = rng.random((6, 6))
    np.fill_diagonal(cost, 0)
    coupling = transported(copied.plan, copied.maps, {"0": cost}, Exact())["0", 0]
    plan = ot.emd(np.full(3, 1 / 3), np.full(6, 1 / 6), cost[[0, 2, 5]])
    assert np.allclose(coupling.project.toarray(), plan * 3)
    assert np.allclose(coupling.unproject.toarray(), plan.T * 6)
