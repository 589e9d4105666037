"""Rows of weights with all other axes mapped: against sums written out, and what does not count."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.sparse import csr_array
from scipy.spatial.distance import cdist
from torch import nn

import fxfuse
from fxfuse.coupling._weights import Weights, cross, squared_distances, unit_rows, weight_cost
from fxfuse.ir import Axis, Coupling
from fxfuse.refit import AsMixed
from tests.support.nets import build, conv, data_shape, gap, randomise, residual, stages
from tests.support.problems import images, problem_of
from tests.support.tolerances import EXACT

MATRICES = arrays(float, (4, 5), elements=st.floats(-3, 3).map(lambda v: round(v, 2)))


def put_random(weights, seed=0):
    """Give every space and network two random dense maps, and return them."""
    rng, maps = np.random.default_rng(seed), {}
    for name, spaces in weights.problem.spaces.items():
        for k, space in enumerate(spaces):
            p, u = (rng.random((space.size, space.size)) for _ in range(2))
            maps[name, k] = p, u
            weights.put(name, k, Coupling(csr_array(p), csr_array(u)))
    return maps


@given(MATRICES, MATRICES, st.integers(1, 5))
def test_distances_are_those_of_the_rows_however_they_are_cut(a, b, width):
    cuts = [slice(i, i + width) for i in range(0, 5, width)]
    squared = squared_distances((a[:, cut], b[:, cut]) for cut in cuts)
    assert np.allclose(squared, cdist(a, b) ** 2, atol=1e-9)
    assert squared_distances([]) is None


def test_products_in_pieces_are_the_products(monkeypatch):
    a, b = np.random.default_rng(0).random((2, 6, 50)).astype(np.float32)
    whole = cross(a, b)
    monkeypatch.setattr("fxfuse.coupling._weights.CHUNK", 40)
    assert np.allclose(cross(a, b), whole, rtol=EXACT)


def test_rows_of_units_that_occur_several_times_hold_all_places():
    axis = Axis("t", 1, np.array([[2, 0], [1, 3]]))
    tensor = np.arange(8).reshape(2, 4)
    assert unit_rows(tensor, axis).tolist() == [[2, 6, 0, 4], [1, 5, 3, 7]]


def test_rows_are_carried_along_every_other_axis():
    nets = [randomise(stages([5, 6], [7]), s) for s in (1, 2)]
    weights = Weights.of(problem_of(nets, images()))
    maps, (first, second) = put_random(weights), [s.name for s in weights.anchor.spaces][:2]
    raw = nets[1].state_dict()["0.1.0.weight"].numpy()
    written, read = weights.axes(second), weights.axes(first)
    written = next(a for a in written if a.tensor == "0.1.0.weight")
    read = next(a for a in read if a.tensor == "0.1.0.weight")
    expected = np.einsum("oihw,iI->oIhw", raw, maps[first, 1][1]).reshape(6, -1)
    assert np.allclose(weights.rows(second, written, 1), expected, rtol=1e-5, atol=1e-6)
    expected = np.einsum("Oo,oihw->iOhw", maps[second, 1][0], raw).reshape(5, -1)
    assert np.allclose(weights.rows(first, read, 1), expected, rtol=1e-5, atol=1e-6)


def test_a_new_coupling_is_seen_by_what_was_mapped_before():
    nets = [randomise(stages([5, 6], [7]), s) for s in (1, 2)]
    weights = Weights.of(problem_of(nets, images()))
    put_random(weights, 1)
    before = weights.carried("0.1.0.weight", 1)
    put_random(weights, 2)
    assert not np.allclose(weights.carried("0.1.0.weight", 1), before)


class Grouped(nn.Module):
    def __init__(self, groups):
        super().__init__()
        self.a, self.b = conv(3, 8, norm=False), conv(8, 8, groups=groups, norm=False)

    def forward(self, x):
        return self.b(self.a(x)).mean((2, 3))


def test_a_grouped_weight_counts_as_the_dense_one_it_stands_for():
    net = randomise(Grouped(2))
    dense = Grouped(1)
    state = dict(net.state_dict())
    wide = torch.zeros(8, 8, 3, 3)
    wide[:4, :4], wide[4:, 4:] = state["b.0.weight"][:4], state["b.0.weight"][4:]
    dense.load_state_dict(state | {"b.0.weight": wide})
    weights = Weights.of(problem_of([net], images()))
    assert np.array_equal(weights.dense("b.0.weight", 0), wide.numpy())


def test_filters_of_one_input_each_count_by_what_they_write():
    net, _ = build("depthwise")
    weights = Weights.of(problem_of([net], images()))
    name = next(n for n, t in net.named_parameters() if t.dim() == 4 and t.shape[1:] == (1, 3, 3))
    assert weights.dims(name) == [0]


def test_running_statistics_do_not_count():
    net, x = build("batch norm")
    state = Weights.of(problem_of([net], images())).states[0]
    assert not {n for n, _ in net.named_buffers() if n.endswith(("_mean", "_var"))} & set(state)
    assert {n for n, _ in net.named_parameters()} == set(state)


def test_layers_in_name_only_do_not_count():
    nets = [randomise(residual((6, 3), (8, 1)), 1), randomise(residual((6, 1), (8, 1)), 2)]
    weights = Weights.of(problem_of(nets, images()))
    missing = set(weights.states[0]) - set(weights.states[1])
    assert {n.rpartition(".")[0] for n in missing} >= {"1.1.a.0", "1.1.b.0", "1.2.a.0", "1.2.b.0"}
    assert not set(weights.states[1]) - set(weights.states[0])
    assert "1.0.a.0.weight" in weights.states[1]


@pytest.mark.parametrize("name", ["plain", "grouped", "tokens"])
def test_the_cost_of_a_network_with_itself_is_zero_on_the_diagonal(name):
    net, _ = build(name)
    x = torch.randn(8, *data_shape(name))
    problem = problem_of([net, net], x)
    weights = Weights.of(problem)
    for space, both in problem.spaces.items():
        eye = csr_array(np.eye(both[0].size))
        for k in (0, 1):
            weights.put(space, k, Coupling(eye, eye))
    for space in problem.spaces:
        cost = weight_cost(weights, space, 1)
        assert np.abs(np.diag(cost)).max() < 1e-9 and (cost >= 0).all()


class Ranked(nn.Module):
    """Multiplies by the numbers of a parameter, in their order."""

    def __init__(self):
        super().__init__()
        self.a, self.k, self.c = nn.Linear(6, 8), nn.Parameter(torch.zeros(8)), nn.Linear(8, 3)

    def forward(self, x):
        return self.c(torch.tanh(self.a(x)) * self.k.sort()[0])


def test_single_numbers_are_told_apart_by_more_than_their_sign():
    net, x = randomise(Ranked()), torch.randn(40, 6)
    moved = fxfuse.permute(net, x[:4], seed=1)
    assert not torch.equal(moved.state_dict()["k"], net.k)
    mixed = fxfuse.fuse([net, moved], x, method=fxfuse.Method(refit=AsMixed()))
    assert gap(net, mixed, x) < 1e-6
