"""Plans, the two maps made of them, and what they do to spaces with and without blocks."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import csr_array

import fxfuse
from fxfuse.calibration.data import Calibration
from fxfuse.calibration.moments import correlation
from fxfuse.coupling.measure import measure
from fxfuse.coupling.plans import agreements, one_map, two_maps
from fxfuse.coupling.transport import Transport
from fxfuse.errors import ArgumentError
from fxfuse.refit.moments import AsMixed
from fxfuse.solvers import Exact, Sinkhorn, UnbalancedSinkhorn
from tests.support.nets import build, data_shape, gap, mlp, randomise
from tests.support.problems import problem_of
from tests.support.sweeps import some
from tests.support.tolerances import FUNCTION
from tests.support.widening import widened


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
        method = fxfuse.Method(coupling=Transport(maps=maps), refit=AsMixed())
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
    from fxfuse.calibration.moments import PairMoments

    levels = torch.tensor([0.0, 1.0, 2.0, 3.0])
    moments = PairMoments()
    moments.add(levels[:, None].expand(4, 20), levels.flip(0)[:, None].expand(4, 20))
    assert correlation([moments]).argmin(1).tolist() == [3, 2, 1, 0]


# --- a say as far as units agree ------------------------------------------------------------------


@given(st.integers(2, 9), st.integers(2, 9), st.integers(0, 99))
def test_agreement_is_one_minus_the_cost_relative_to_the_mean(rows, columns, seed):
    cost = np.random.default_rng(seed).random((rows, columns)) + 0.5
    project = two_maps(plan_of(rows, columns, seed))[0]
    agreed = agreements(cost, project, None)
    expected = 1 - (project.toarray() * cost).sum(1) / cost.mean()
    assert np.allclose(agreed, np.clip(expected, agreed.min(), 1), atol=1e-9)
    assert (agreed > 0).all() and (agreed <= 1).all()
    assert np.allclose(agreements(7 * cost, project, None), agreed)


@pytest.mark.parametrize("size", [1, 4])
def test_where_all_units_are_alike_they_agree(size):
    assert (agreements(np.full((size, size), 1e-7), csr_array(np.eye(size)), None) == 1).all()


def test_units_of_a_block_agree_as_a_whole_and_the_same_ones_fully():
    cost = np.array([[0.0, 1, 1, 1], [1, 0.4, 1, 1], [1, 1, 1e-9, 1], [1, 1, 1, 0.0]])
    eye = csr_array(np.eye(4))
    agreed = agreements(cost, eye, np.array([0, 0, 1, 1]))
    assert agreed[0] == agreed[1] < 1 and (agreed[2:] == 1).all()


@pytest.mark.parametrize("name", ["plain", "residual", "grouped", "tokens", "shuffle"])
def test_where_nothing_agrees_the_first_network_stays(name):
    net, x = build(name)
    other, data = randomise(build(name)[0], 5), torch.randn(64, *data_shape(name))
    loose = fxfuse.Method(coupling=Transport(agreement=400.0), refit=AsMixed())
    fused = fxfuse.fuse([net, other], data, method=loose, anchor=0)
    full = fxfuse.fuse([net, other], data, method=replace(loose, coupling=Transport()), anchor=0)
    inner = [n for n, p in net.named_parameters() if p.dim() > 1][:-1]
    own, near, far = (m.state_dict() for m in (net, fused, full))
    missed = [sum(float((own[n] - m[n]).square().sum()) for n in inner) for m in (near, far)]
    assert missed[0] < 0.3 * missed[1]


def test_weight_decides_where_nobody_else_has_any():
    nets, x = [randomise(mlp(6, 9, 9, 4), s) for s in (1, 2)], torch.randn(300, 6)
    fused = fxfuse.fuse(nets, x, weights=[0, 1])
    assert gap(nets[1], fused, x) < 0.02


@pytest.mark.parametrize("power", [-1.0, float("nan"), float("inf")])
def test_what_is_no_power_of_agreement_is_refused(power):
    with pytest.raises(ArgumentError, match="agreement"):
        Transport(agreement=power)


# --- networks that were tuned from one checkpoint -------------------------------------------------


def tuned(net, seed, by=0.1):
    """A copy whose weights differ a little."""
    other, generator = copy.deepcopy(net), torch.Generator().manual_seed(seed)
    for p in other.parameters():
        p.data += by * p.std().nan_to_num() * torch.randn(p.shape, generator=generator)
    return other


@pytest.mark.parametrize(
    "name", some(["plain", "residual", "grouped", "tokens"], "plain", "tokens")
)
def test_siblings_stay_at_their_mean(name):
    net, _ = build(name)
    data = torch.randn(48, *data_shape(name), generator=torch.Generator().manual_seed(0))
    nets = [tuned(net, seed) for seed in (1, 2, 3)]
    mean = fxfuse.presets.average(nets, data, weights=[2, 1, 1])
    for weights in ([2, 1, 1], "auto"):
        fused = fxfuse.fuse(nets, data, weights=weights)
        kinds = {c.kind for s in fused.meta["fxfuse"].spaces for c in s.couplings}
        assert kinds == {"identity"}
    assert gap(mean, fxfuse.fuse(nets, data, weights=[2, 1, 1]), data) < FUNCTION
    fitted = fxfuse.fuse(nets, data, method=fxfuse.Method(coupling=Transport(agreement=4.0)))
    assert gap(fxfuse.presets.average(nets, data), fitted, data) > FUNCTION


@pytest.mark.parametrize("name", ["plain", "residual", "tokens"])
def test_networks_in_other_orders_or_of_other_origin_are_no_siblings(name):
    net, x = build(name)
    data = torch.randn(48, *data_shape(name), generator=torch.Generator().manual_seed(0))
    moved = fxfuse.permute(tuned(net, 1), x, seed=4)
    for other in (moved, randomise(build(name)[0], 5)):
        assert fxfuse.fuse([net, other], data).meta["fxfuse"].layers


# --- soft plans -----------------------------------------------------------------------------------


def couplings_of(nets, x, solver):
    problem = problem_of(nets, x)
    transport = Transport(solver=solver)
    return transport(problem, measure(problem, Calibration(x), transport.view, {}, len(x)))


@pytest.mark.parametrize("solver", [Sinkhorn(0.3), UnbalancedSinkhorn(0.3)])
@pytest.mark.parametrize("name", ["tokens", "grouped"])
def test_soft_solvers_mix_units_but_neither_blocks_nor_products(name, solver):
    nets = [build(name, seed)[0] for seed in (0, 5)]
    x = torch.randn(40, *data_shape(name))
    couplings = couplings_of(nets, x, solver)
    spaces = couplings.problem.networks[0].spaces
    parents, soft = {s.parent for s in spaces}, 0
    for space in spaces:
        coupling = couplings.maps[space.name, 1]
        project = coupling.project.toarray()
        hard = (project > 0).sum(1).max() == 1
        read = any(a.reads for a in space.axes)
        if space.name in parents or not read:
            assert hard, space.name
        soft += not hard
        if space.blocks is not None:
            outer = couplings.maps[space.parent, 1].project.toarray()
            crossed = project[outer[space.blocks][:, space.blocks] == 0]
            assert not crossed.any(), "units of blocks that are not matched"
    assert soft >= 2
    fused = fxfuse.fuse(nets, x, method=fxfuse.Method(coupling=Transport(solver=solver)))
    plain = fxfuse.fuse(nets, x)
    assert gap(plain, fused, x) > 1e-3


@pytest.mark.parametrize("maps", [one_map, two_maps])
@given(st.integers(2, 6), st.integers(2, 6), st.integers(0, 99))
def test_units_left_with_nothing_get_rows_of_zeros(maps, rows, columns, seed):
    plan = np.random.default_rng(seed).random((rows, columns))
    plan[0], plan[:, 1] = 0.0, 0.0
    stored = csr_array(np.ones_like(plan))
    stored.data[:] = plan.ravel()  # zeros that are stored count as none
    for given_plan in (csr_array(plan), stored):
        project, unproject = maps(given_plan)
        for matrix in (project, unproject):
            assert np.isfinite(matrix.toarray()).all()
        assert not project.toarray()[0].any() and not unproject.toarray()[1].any()
        assert np.allclose(project.sum(1)[1:], 1.0, atol=1e-5)
        if maps is two_maps:
            assert np.allclose(np.delete(unproject.sum(1), 1), 1.0, atol=1e-9)


def test_a_solver_changes_the_result():
    nets = [randomise(mlp(6, 8, 7, 3), s) for s in (1, 2)]
    x = torch.randn(40, 6)
    fused = [
        fxfuse.fuse(nets, x, method=fxfuse.Method(coupling=Transport(solver=s)))
        for s in (Exact(), Sinkhorn(0.2), Sinkhorn(0.5), UnbalancedSinkhorn(0.2))
    ]
    assert all(gap(a, b, x) > 1e-3 for i, a in enumerate(fused) for b in fused[:i])


@pytest.mark.parametrize("factor", [1.25, 1.5, 3.0])
@pytest.mark.parametrize("anchor", [0, 1])
def test_a_network_comes_back_from_a_copy_widened_by_any_factor(factor, anchor):
    net, data = randomise(mlp(6, 9, 7, 3)), torch.randn(80, 6)
    wide = fxfuse.net2wider(net, data[:4], factor=factor)
    fused = fxfuse.fuse([net, wide], data, anchor=anchor)
    assert gap(net, fused, torch.randn(20, 6)) < 1e-4
