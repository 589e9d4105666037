import dataclasses

import numpy as np
import ot
import pytest
from conftest import EXACT
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from fxfuse.errors import SolverError
from fxfuse.solvers import Assignment, Exact

SOLVERS = [Exact(), Assignment()]
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
@pytest.mark.parametrize("solver", SOLVERS)
def test_costs_that_are_not_finite_are_refused(solver, value):
    cost, a, b = problem(0, 3, 3)
    cost[1, 2] = value
    with pytest.raises(SolverError, match="NaN or infinite") as caught:
        solver(cost, a, b)
    assert "3 x 3" in caught.value.where


@pytest.mark.parametrize(("n", "m", "uniform"), [(3, 4, True), (4, 3, True), (3, 3, False)])
def test_an_assignment_refuses_what_is_none_and_names_who_takes_it(n, m, uniform):
    with pytest.raises(SolverError, match=f"{n} and {m} units") as caught:
        Assignment()(*problem(0, n, m, uniform))
    assert "Exact()" in caught.value.do


def test_a_simplex_that_does_not_finish_says_so_and_what_to_raise():
    with pytest.raises(SolverError, match="the network simplex stopped") as caught:
        Exact(iterations=3)(*problem(0, 30, 20))
    assert "iterations" in caught.value.do
    assert Exact()(*problem(0, 30, 20)).nnz <= 49


def test_the_problem_is_left_as_it_was():
    cost, a, b = problem(0, 4, 6, uniform=False)
    kept = cost.copy(), a.copy(), b.copy()
    Exact()(cost, a, b)
    assert all(np.array_equal(x, y) for x, y in zip(kept, (cost, a, b)))


@pytest.mark.parametrize("solver", SOLVERS)
def test_solvers_are_plain_values(solver):
    assert solver == type(solver)() and hash(solver) == hash(type(solver)())
    with pytest.raises(dataclasses.FrozenInstanceError):
        solver.iterations = 3
