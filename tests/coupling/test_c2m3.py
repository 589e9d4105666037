"""Joint matching in a universe: its objective, its steps, and what must hold of the result."""

import itertools

import numpy as np
import pytest
import torch

import fxfuse
from fxfuse.coupling._weights import Weights
from fxfuse.coupling.c2m3 import (
    CycleConsistent,
    _corner,
    _keys,
    _move,
    _soften,
    _tensors,
    along,
    even_map,
    slope,
)
from fxfuse.coupling.measure import Evidence
from fxfuse.coupling.weight_matching import inner
from fxfuse.errors import PairingError
from tests.support.nets import build, data_shape, gap, mlp, randomise, residual
from tests.support.problems import images, joined, problem_of
from tests.support.sweeps import some
from tests.support.tolerances import FUNCTION

NETWORKS = ["plain", "grouped", "shared", "tokens", "depthwise"]


def three(name):
    nets = [build(name, seed)[0] for seed in (1, 2, 3)]
    return joined(nets, torch.randn(8, *data_shape(name)), in_place=True)


def objective(weights: Weights) -> float:
    """What is to be raised: the sum over tensors and pairs of networks of their inner product."""
    value = 0.0
    for tensor in _tensors(weights):
        mapped = [weights.carried(tensor, k) for k in weights.having(tensor)]
        total = sum(mapped[1:], mapped[0])
        value += (inner(total, total) - sum(inner(t, t) for t in mapped)) / 2
    return value


@pytest.mark.parametrize("name", NETWORKS)
def test_the_objective_is_the_sum_over_pairs(name):
    weights, _ = three(name)
    total = 0.0
    for p, q in itertools.combinations(range(3), 2):
        for tensor in weights.states[0]:
            if weights.dims(tensor):
                a, b = (weights.carried(tensor, k).astype(float) for k in (p, q))
                total += (a * b).sum()
    assert objective(weights) == pytest.approx(total, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_polynomial_along_a_segment_is_the_objective_there(name):
    weights, free = three(name)
    _soften(weights, free, 0.3)
    here = {key: weights.couplings[key].project for key in _keys(free)}
    corner = _corner(weights, free, slope(weights))
    curve = np.polynomial.Polynomial(along(weights, corner))
    scale = max(abs(objective(weights)), 1.0)
    for step in (0.0, 0.2, 0.7, 1.0):
        _move(weights, {key: (1 - step) * here[key] + step * corner[key] for key in here})
        assert curve(step) == pytest.approx(objective(weights), abs=1e-4 * scale)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_slope_is_that_of_the_polynomial(name):
    weights, free = three(name)
    _soften(weights, free, 0.3)
    gains = slope(weights)
    corner = _corner(weights, free, gains)
    here = {key: weights.couplings[key].project for key in _keys(free)}
    rise = sum(float((corner[key] - here[key]).multiply(g).sum()) for key, g in gains.items())
    assert rise == pytest.approx(along(weights, corner)[1], rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("name", ["plain", "grouped", "shuffle", "tokens"])
def test_the_even_map_shares_units_out_as_far_as_their_blocks_let_them_go(name):
    weights, free = three(name)
    parents = {s.name: s.parent for s in weights.anchor.spaces}
    rng, problem = np.random.default_rng(0), weights.problem
    for _ in range(5):
        costs = {key: rng.random((problem.spaces[key[0]][0].size,) * 2) for key in _keys(free)}
        for (name, k), project in _corner(weights, free, costs).items():
            even = even_map(problem, parents, name, k)
            assert np.allclose(even.sum(0), 1) and np.allclose(even.sum(1), 1)
            assert np.unique(even[even > 0]).size == 1
            assert (even[project.nonzero()] > 0).all()


def coupled(nets, data, **options):
    return CycleConsistent(**options)(problem_of(nets, data), Evidence({}, {}))


def value_of(couplings):
    return objective(Weights.of(couplings.problem, dict(couplings.maps)))


def test_maps_between_networks_agree_around_every_cycle():
    nets = [randomise(residual((6, 1), (8, 1)), s) for s in range(3)]
    couplings = coupled(nets, images())
    for name in couplings.problem.spaces:
        into = [couplings.maps[name, k].project.toarray() for k in range(3)]
        assert all((m.sum(0) == 1).all() and (m.sum(1) == 1).all() for m in into)
        between = {(p, q): into[p].T @ into[q] for p in range(3) for q in range(3)}
        for p, q, r in itertools.permutations(range(3)):
            round_trip = between[p, q] @ between[q, r] @ between[r, p]
            assert np.array_equal(round_trip, np.eye(len(round_trip)))


@pytest.mark.parametrize("options", [{}, {"polish": 0}])
def test_the_order_of_the_networks_does_not_matter(options):
    nets, data = [randomise(mlp(6, 9, 8, 3, norm=True), s) for s in range(3)], torch.randn(32, 6)
    method = fxfuse.Method(coupling=CycleConsistent(**options))
    whole = fxfuse.fuse(nets, data, method=method)
    for order in ([1, 0, 2], [2, 0, 1]):
        again = fxfuse.fuse([nets[i] for i in order], data, method=method)
        assert gap(whole, again, data) < FUNCTION


COPIED = [*NETWORKS, "residual", "concat"]


@pytest.mark.parametrize("name", some(COPIED, "grouped", "residual", "tokens"))
def test_permuted_copies_of_one_network_fuse_to_it(name):
    net, x = build(name)
    data = torch.randn(24, *data_shape(name))
    copies = [net, *(fxfuse.permute(net, x, seed=s) for s in range(3))]
    method = fxfuse.Method(coupling=CycleConsistent())
    assert gap(net, fxfuse.fuse(copies, data, method=method), data) < FUNCTION


def test_steps_then_rounding_then_turns_each_raise_the_objective():
    nets, x = [randomise(mlp(6, 12, 10, 3), s) for s in range(4)], torch.randn(8, 6)
    start = objective(joined(nets, x, in_place=True)[0])
    rounded, polished = (value_of(coupled(nets, x, polish=p)) for p in (0, 100))
    assert start < rounded <= polished


@pytest.mark.parametrize("options", [{"iterations": 2}, {"polish": 100}])
def test_each_option_changes_the_result(options):
    nets = [randomise(mlp(6, 12, 10, 3, norm=True), s) for s in range(4)]
    a, b = (coupled(nets, torch.randn(8, 6), **{"polish": 0} | o).maps for o in ({}, options))
    assert any((a[key].project != b[key].project).nnz for key in a)


def test_the_seed_changes_where_polishing_ends():
    nets = [randomise(residual((6, 2), (9, 2)), s) for s in range(3)]
    ends = [coupled(nets, images(), iterations=1, seed=seed).maps for seed in range(4)]
    assert any((ends[0][key].project != e[key].project).nnz for e in ends[1:] for key in e)


def test_layers_that_networks_lack_are_nobodys_say():
    nets = [randomise(residual((6, n), (8, m)), n) for n, m in ((1, 2), (2, 1), (1, 1))]
    couplings = coupled(nets, images())
    for name, present in couplings.problem.present.items():
        for k, here in enumerate(present):
            project = couplings.maps[name, k].project
            assert {*project.sum(0), *project.sum(1)} == ({1.0} if here else {0.0})


def test_networks_of_unequal_width_are_refused():
    nets = [randomise(mlp(6, n, 3)) for n in (8, 8, 5)]
    with pytest.raises(PairingError, match="CycleConsistent"):
        method = fxfuse.Method(coupling=CycleConsistent())
        fxfuse.fuse(nets, torch.randn(16, 6), method=method)
