"""Plans, the two maps made of them, and what they do to spaces with and without blocks."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nets import build, data_shape, mlp, randomise
from widening import widened

import fxfuse
from fxfuse.costs import correlation
from fxfuse.coupling import one_map, two_maps
from fxfuse.refit import MatchMoments
from fxfuse.solvers import Exact
from fxfuse.transport import Transport


def plan_of(rows, columns, seed):
    cost = np.random.default_rng(seed).random((rows, columns))
    return Exact()(cost, np.full(rows, 1 / rows), np.full(columns, 1 / columns))


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))
def test_both_maps_have_rows_that_sum_to_one(rows, columns, seed):
    project, unproject = two_maps(plan_of(rows, columns, seed))
    assert project.shape == (rows, columns) and unproject.shape == (columns, rows)
    for matrix in (project, unproject):
        assert np.allclose(matrix.sum(1), 1.0, atol=1e-9) and matrix.data.min() >= 0


@given(st.integers(1, 9), st.integers(0, 99))
def test_for_a_permutation_both_ways_agree(size, seed):
    plan = plan_of(size, size, seed)
    for two, one in zip(two_maps(plan), one_map(plan)):
        assert np.allclose(two.toarray(), one.toarray(), atol=1e-5)


def test_one_map_scales_a_duplicated_network_and_two_maps_do_not():
    net, x = randomise(mlp(6, 5, 4, 3, bias=False)), torch.randn(50, 6)
    pair = [widened(net, mlp(6, 10, 8, 3, bias=False), x[:2]), net]
    factor = {}
    for maps in (one_map, two_maps):
        method = fxfuse.Method(coupling=Transport(maps=maps), refit=MatchMoments(keep=True))
        fused = fxfuse.fuse(pair, x, weights=[1, 0], anchor=1, method=method)
        factor[maps] = float((fused(x) / net(x)).median().detach())
    assert factor[two_maps] == pytest.approx(1.0, abs=1e-4)
    assert factor[one_map] != pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("name", ["plain", "residual", "grouped", "tokens", "shuffle"])
def test_the_permutation_between_a_network_and_its_shuffled_copy_is_found(name):
    net, x = build(name)
    data = torch.randn(48, *data_shape(name))
    report = fxfuse.fuse([net, fxfuse.permute(net, x, seed=4)], data).meta["fxfuse"]
    for space in report.spaces:
        assert space.confidences == (1.0, 1.0), space.name
        assert space.costs[0] is None and space.costs[1] < 1e-4, space.name


def test_correlation_tells_units_that_never_vary_apart_by_their_level():
    from fxfuse.moments import PairMoments

    levels = torch.tensor([0.0, 1.0, 2.0, 3.0])
    moments = PairMoments()
    moments.add(levels[:, None].expand(4, 20), levels.flip(0)[:, None].expand(4, 20))
    assert correlation([moments]).argmin(1).tolist() == [3, 2, 1, 0]
