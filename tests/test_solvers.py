"""Plans: their marginals and costs, against scipy and POT; and problems that are refused."""

import dataclasses

import numpy as np
import ot
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array

from fxfuse.errors import SolverError
from fxfuse.solvers import Assignment, Exact, Sinkhorn, UnbalancedSinkhorn
from tests.support.tolerances import EXACT

SOLVERS = [Exact(), Assignment()]
SOFT = [Sinkhorn(), UnbalancedSinkhorn()]
seeds, counts = st.integers(0, 9999), st.integers(1, 8)


def problem(seed, n, m, uniform=True, ties=False):
    rng = np.random.default_rng(seed)
    cost = rng.integers(0, 3, (n, m)).astype(float) if ties else rng.random((n, m))
    a, b = (np.ones(k) if uniform else rng.uniform(0.2, 1, k) for k in (n, m))
    return cost, a / a.sum(), b / b.sum()


def value(plan, cost):
    return plan.multiply(cost).sum()


@pytest.mark.parametrize("solver", SOLVERS)
@given(seeds, counts, st.booleans())
def test_square_problems_are_assignments_of_least_cost(solver, seed, n, ties):
    cost, a, b = problem(seed, n, n, ties=ties)
    plan = solver(cost, a, b)
    rows, columns = linear_sum_assignment(cost)
    assert value(plan, cost) == pytest.approx(cost[rows, columns].sum() / n, rel=EXACT, abs=EXACT)
    assert plan.nnz == n and np.allclose(plan.data, 1 / n, rtol=EXACT)


@given(seeds, counts, counts, st.booleans(), st.booleans())
def test_any_problem_has_its_marginals_and_the_least_cost(seed, n, m, uniform, ties):
    cost, a, b = problem(seed, n, m, uniform, ties)
    plan = Exact()(cost, a, b)
    assert plan.shape == (n, m) and plan.data.min() >= 0
    assert np.allclose(plan.sum(1), a, atol=EXACT) and np.allclose(plan.sum(0), b, atol=EXACT)
    assert value(plan, cost) == pytest.approx(ot.emd2(a, b, cost), rel=1e-7, abs=EXACT)


@given(seeds, counts, counts)
def test_no_other_plan_is_cheaper(seed, n, m):
    cost, a, b = problem(seed, n, m)
    plan = Exact()(cost, a, b)
    assert value(plan, cost) <= (np.outer(a, b) * cost).sum() + EXACT


@given(seeds, counts, counts)
def test_exact_plans_are_sparse(seed, n, m):
    cost, a, b = problem(seed, n, m, uniform=False)
    assert Exact()(cost, a, b).nnz <= n + m - 1


def test_a_widened_copy_is_coupled_to_its_copies():
    base = np.random.default_rng(0).random((4, 5))
    wide = np.repeat(base, 2, axis=0)
    cost = ((wide[:, None] - base[None]) ** 2).sum(2)
    plan = Exact()(cost, np.full(8, 1 / 8), np.full(4, 1 / 4)).toarray()
    assert np.allclose(plan, np.kron(np.eye(4), np.full((2, 1), 1 / 8)), atol=EXACT)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("solver", SOLVERS + SOFT)
def test_costs_that_are_not_finite_are_refused(solver, value):
    cost, a, b = problem(0, 3, 3)
    cost[1, 2] = value
    with pytest.raises(SolverError, match="NaN or infinite") as caught:
        solver(cost, a, b)
    assert "3 x 3" in caught.value.where


@pytest.mark.parametrize(("n", "m", "uniform"), [(3, 4, True), (4, 3, True), (3, 3, False)])
def test_an_assignment_refuses_other_problems_and_names_a_solver_that_takes_them(n, m, uniform):
    with pytest.raises(SolverError, match=f"{n} and {m} units") as caught:
        Assignment()(*problem(0, n, m, uniform))
    assert "Exact()" in caught.value.do


def test_a_simplex_that_does_not_finish_names_the_limit_to_raise():
    with pytest.raises(SolverError, match="the network simplex stopped") as caught:
        Exact(iterations=3)(*problem(0, 30, 20))
    assert "iterations" in caught.value.do
    assert Exact()(*problem(0, 30, 20)).nnz <= 49


@pytest.mark.parametrize("solver", [Exact(), *SOFT])
def test_solvers_do_not_change_their_arguments(solver):
    cost, a, b = problem(0, 4, 6, uniform=False)
    copies = cost.copy(), a.copy(), b.copy()
    solver(cost, a, b)
    assert all(np.array_equal(x, y) for x, y in zip(copies, (cost, a, b)))


@pytest.mark.parametrize("solver", SOLVERS + SOFT)
def test_solvers_are_plain_values(solver):
    assert solver == type(solver)() and hash(solver) == hash(type(solver)())
    with pytest.raises(dataclasses.FrozenInstanceError):
        solver.iterations = 3


# --- soft plans -----------------------------------------------------------------------------------


def entropy_of(plan):
    dense = plan.toarray()
    return -(dense * np.log(np.maximum(dense, 1e-300))).sum()


def divergence(p, q):
    """Kullback-Leibler divergence of masses that need not sum to 1."""
    return (p * np.log(np.maximum(p, 1e-300) / q) - p + q).sum()


@given(seeds, counts, counts, st.sampled_from([0.05, 0.2, 1.0]), st.booleans())
def test_sinkhorn_has_its_marginals_and_beats_other_plans(seed, n, m, weight, uniform):
    cost, a, b = problem(seed, n, m, uniform)
    plan = Sinkhorn(weight, tolerance=1e-6)(cost, a, b)
    assert np.allclose(plan.sum(1), a, rtol=1e-6) and np.allclose(plan.sum(0), b, rtol=1e-6)
    others = [csr_array(np.outer(a, b)), Exact()(cost, a, b)]
    price = weight * cost.mean()
    best = value(plan, cost) - price * entropy_of(plan)
    assert all(best <= value(p, cost) - price * entropy_of(p) + 1e-6 for p in others)
    assert value(plan, cost) >= value(others[1], cost) - 1e-6


@given(seeds, counts, counts, st.sampled_from([0.1, 0.5]), st.sampled_from([0.3, 1.0, 5.0]))
def test_an_unbalanced_plan_beats_its_scaled_and_shaken_copies(seed, n, m, weight, marginals):
    cost, a, b = problem(seed, n, m, uniform=False)
    plan = UnbalancedSinkhorn(weight, marginals, tolerance=1e-6)(cost, a, b).toarray()
    mean, rng = cost.mean(), np.random.default_rng(seed)

    def objective(p):
        loss = (p * cost).sum() + weight * mean * divergence(p, np.outer(a, b))
        return loss + marginals * mean * (divergence(p.sum(1), a) + divergence(p.sum(0), b))

    shaken = [plan * np.exp(0.1 * rng.standard_normal(plan.shape)) for _ in range(3)]
    for other in [0.8 * plan, 1.25 * plan, np.outer(a, b), *shaken]:
        assert objective(plan) <= objective(other) + 1e-9


@pytest.mark.parametrize("solver", SOFT)
@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_a_soft_plan_depends_on_the_unit_of_the_cost_only_if_absolute(solver, scale):
    cost, a, b = problem(1, 6, 5)
    plan = solver(cost, a, b).toarray()
    assert np.allclose(solver(scale * cost, a, b).toarray(), plan, atol=1e-6)
    absolute = dataclasses.replace(solver, absolute=True)
    scaled = absolute(3.0 * cost, a, b).toarray()
    assert not np.allclose(scaled, absolute(cost, a, b).toarray(), atol=1e-4)
    weights = {
        f: getattr(solver, f) * cost.mean()
        for f in ("regularisation", "marginals")
        if hasattr(solver, f)
    }
    same = dataclasses.replace(absolute, **weights)(cost, a, b).toarray()
    assert np.allclose(same, plan, atol=1e-9)


def test_with_less_regularisation_plans_approach_the_exact_one():
    cost, a, b = problem(2, 8, 8)
    exact = Exact()(cost, a, b).toarray()
    gaps = [np.abs(Sinkhorn(w)(cost, a, b).toarray() - exact).sum() for w in (1.0, 0.2, 0.01)]
    assert gaps[0] > gaps[1] > gaps[2] and gaps[2] < 0.2


def test_the_dearer_the_marginals_the_more_mass_is_matched():
    cost, a, b = problem(3, 6, 4)
    mass = [UnbalancedSinkhorn(0.1, m)(cost, a, b).sum() for m in (0.1, 1.0, 100.0)]
    assert mass[0] < mass[1] < mass[2] and mass[2] == pytest.approx(1.0, abs=0.02)
    balanced = Sinkhorn(0.1)(cost, a, b).toarray()
    dear = UnbalancedSinkhorn(0.1, 1000.0, iterations=100_000)(cost, a, b).toarray()
    assert np.allclose(dear, balanced, atol=1e-3)


def test_a_unit_far_from_all_others_is_not_matched():
    cost = np.array([[0.0, 1.0], [1.0, 0.0], [90.0, 90.0]])
    solver = UnbalancedSinkhorn(0.5, 0.1, absolute=True)
    plan = solver(cost, np.full(3, 1 / 3), np.full(2, 1 / 2))
    assert plan[[2]].nnz == 0 and plan[[0]].nnz > 0


@pytest.mark.parametrize("solver", SOFT)
def test_equal_costs_are_spread_evenly(solver):
    for cost in (np.zeros((3, 4)), np.ones((3, 4))):
        plan = solver(cost, np.full(3, 1 / 3), np.full(4, 1 / 4)).toarray()
        assert np.allclose(plan, plan.mean()) and plan.mean() > 0
