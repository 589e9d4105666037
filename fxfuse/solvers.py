"""Transport and assignment problems: ground costs and marginals in, a sparse plan out.

A solver is an immutable object that is called as `solver(cost, a, b)`, where `a` and `b` are the
masses of the units on both sides, and returns how much mass goes from each unit to each other one.

References:
    Cuturi 2013, Sinkhorn; Chizat et al. 2018, unbalanced scaling. Difference: the regularisation is
    relative to the mean cost, so that a plan does not depend on the unit of the cost.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array

from .errors import ArgumentError, SolverError


class Solver:
    """What solves transport problems; derive from it for a solver of your own.

    Attributes:
        soft: Whether its plans spread each unit over many others. What must not be mixed (heads,
            groups) is then matched by `Exact` instead.
    """

    soft: ClassVar[bool] = False

    def __call__(self, cost: np.ndarray, a: np.ndarray, b: np.ndarray) -> csr_array:
        """Return the plan `(n, m)` for costs `(n, m)` and masses `a` `(n,)` and `b` `(m,)`."""
        raise NotImplementedError


@dataclass(frozen=True)
class Exact(Solver):
    """Exact optimal transport; where the plan is a permutation, by an assignment solver.

    A plan between `n` and `m` units has at most `n + m - 1` entries.

    Attributes:
        iterations: Limit of the network simplex.
    """

    iterations: int = 2_000_000

    def __call__(self, cost: np.ndarray, a: np.ndarray, b: np.ndarray) -> csr_array:
        """Return the plan `(n, m)` of least cost with marginals `a` `(n,)` and `b` `(m,)`.

        Raises:
            SolverError: If the cost is not finite, the masses do not fit, or the simplex does not
                finish.
        """
        _require_solvable(cost, a, b)
        if len(a) == len(b) and np.ptp(a) == 0 and np.ptp(b) == 0:
            rows, columns = linear_sum_assignment(cost)
            return csr_array((a[rows], (rows, columns)), shape=cost.shape)
        import ot  # imported late: it imports scikit-learn, which takes half a second

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the log repeats the warning
            plan, log = ot.emd(a, b, np.ascontiguousarray(cost), self.iterations, log=True)
        if log["warning"] is not None:
            raise SolverError(
                f"the network simplex stopped: {log['warning']}",
                where=_problem(cost),
                expected=f"an optimum within {self.iterations} iterations",
                do="raise Exact(iterations=...)",
            )
        return _sparse(plan)


@dataclass(frozen=True)
class Assignment(Solver):
    """One-to-one assignment; refuses problems whose plan is not a permutation."""

    def __call__(self, cost: np.ndarray, a: np.ndarray, b: np.ndarray) -> csr_array:
        """Return the permutation of least cost, each entry the mass of a unit.

        Raises:
            SolverError: If the sizes differ, the marginals are not uniform, or the cost is not
                finite.
        """
        if len(a) != len(b) or np.ptp(a) or np.ptp(b):
            masses = " and ".join(f"{x.min():.3g} to {x.max():.3g}" for x in (a, b))
            raise SolverError(
                f"{len(a)} and {len(b)} units, of masses {masses}",
                where="the solver Assignment",
                expected="as many units on one side as on the other, all of the same mass",
                do="use solvers.Exact(), which takes any marginals",
            )
        return Exact()(cost, a, b)


@dataclass(frozen=True)
class Sinkhorn(Solver):
    """Entropic optimal transport: a plan softer than the exact one, found by stabilised scaling.

    Attributes:
        regularisation: Weight of the entropy, relative to the mean absolute cost.
        absolute: Take `regularisation` in the unit of the cost instead.
        iterations: Limit of scaling iterations.
        tolerance: Largest error of a marginal, relative to the mass of its unit.

    Example:
        >>> plan = Sinkhorn(0.5)(np.array([[0.0, 1.0], [1.0, 0.0]]), np.ones(2) / 2, np.ones(2) / 2)
        >>> plan.toarray().round(2).tolist()
        [[0.49, 0.01], [0.01, 0.49]]
    """

    regularisation: float = 0.05
    absolute: bool = False
    iterations: int = 10_000
    tolerance: float = 1e-3
    soft: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse options that are not positive."""
        _require_positive(
            type(self),
            regularisation=self.regularisation,
            iterations=self.iterations,
            tolerance=self.tolerance,
        )

    def __call__(self, cost: np.ndarray, a: np.ndarray, b: np.ndarray) -> csr_array:
        """Return the plan `(n, m)` whose marginals are `a` `(n,)` and `b` `(m,)` up to `tolerance`.

        Raises:
            SolverError: If the cost is not finite, the masses do not fit, or the marginals are not
                met within `iterations`.
        """
        import ot

        _require_solvable(cost, a, b)
        weight = _in_units_of(cost, self.regularisation, self.absolute)
        accuracy = self.tolerance * min(a.min(), b.min())
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")  # convergence is checked below
            plan = ot.sinkhorn(
                *(a, b, cost, weight),
                method="sinkhorn_stabilized",
                numItermax=self.iterations,
                stopThr=accuracy,
            )
        _require_converged(self, cost, _marginal_error(plan, a, b))
        return _sparse(plan)


@dataclass(frozen=True)
class UnbalancedSinkhorn(Solver):
    """Entropic transport that may leave a unit unmatched where no partner is near.

    A plan whose marginals differ from the units' masses pays `marginals` times their
    Kullback-Leibler divergence. A unit whose mass all stays behind has no part in the fused unit.

    Attributes:
        regularisation: Weight of the entropy, relative to the mean absolute cost.
        marginals: Weight of that divergence, relative to the mean absolute cost.
        absolute: Take both weights in the unit of the cost instead.
        iterations: Limit of scaling iterations.
        tolerance: Largest difference between a unit's mass in the plan and the mass that its dual
            potential implies, relative to the mass of the unit.
    """

    regularisation: float = 0.05
    marginals: float = 1.0
    absolute: bool = False
    iterations: int = 10_000
    tolerance: float = 1e-3
    soft: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse options that are not positive."""
        _require_positive(
            type(self),
            regularisation=self.regularisation,
            marginals=self.marginals,
            iterations=self.iterations,
            tolerance=self.tolerance,
        )

    def __call__(self, cost: np.ndarray, a: np.ndarray, b: np.ndarray) -> csr_array:
        """Return the plan `(n, m)` between units of masses `a` `(n,)` and `b` `(m,)`.

        Raises:
            SolverError: If the cost is not finite, the scaling does not converge within
                `iterations`, or no unit is matched.
        """
        import ot

        _require_solvable(cost, a, b, balanced=False)
        weights = [self.regularisation, self.marginals]
        weight, penalty = (_in_units_of(cost, w, self.absolute) for w in weights)
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")  # convergence is checked below
            plan, log = ot.unbalanced.sinkhorn_unbalanced(
                *(a, b, cost, weight, penalty),
                method="sinkhorn_translation_invariant",  # POT's stabilised one can overflow
                numItermax=self.iterations,
                stopThr=1e-9,
                log=True,
            )
            # At the optimum, and only there, the potentials imply each unit's mass in the plan.
            shares = [np.exp(-log[u] * weight / penalty) for u in ("logu", "logv")]
            residual = _marginal_error(plan, a, b, *shares)
        _require_converged(self, cost, residual)
        plan = _sparse(plan)
        if not plan.nnz:
            raise SolverError(
                "a plan that matches no unit",
                where=_problem(cost),
                expected="some units near enough to each other to be matched",
                do="raise UnbalancedSinkhorn(marginals=...), or use solvers.Sinkhorn()",
            )
        return plan


def _in_units_of(cost: np.ndarray, weight: float, absolute: bool) -> float:
    return weight if absolute else weight * (float(np.abs(cost).mean()) or 1.0)


def _sparse(plan: np.ndarray) -> csr_array:
    plan[plan < 1e-12 / max(plan.shape)] = 0.0
    return csr_array(plan)


def _marginal_error(
    plan: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    share_a: np.ndarray | float = 1.0,
    share_b: np.ndarray | float = 1.0,
) -> float:
    """Return the largest error of a unit's mass in a plan, relative to the mass of the unit.

    Args:
        plan: `(n, m)`.
        a: Masses `(n,)`.
        b: Masses `(m,)`.
        share_a: Which share of each mass in `a` the plan should hold.
        share_b: Which share of each mass in `b` the plan should hold.
    """
    errors = np.concatenate([plan.sum(1) / a - share_a, plan.sum(0) / b - share_b])
    return float(np.abs(errors).max())


def _problem(cost: np.ndarray) -> str:
    return f"a transport problem of {cost.shape[0]} x {cost.shape[1]} units"


def _require_converged(
    solver: Sinkhorn | UnbalancedSinkhorn, cost: np.ndarray, residual: float
) -> None:
    if not residual <= solver.tolerance:  # written so that NaN is refused, too
        raise SolverError(
            f"scaling that did not converge in {solver.iterations} iterations: marginals are off "
            f"by up to {residual:.1e} of a unit's mass",
            where=f"{_problem(cost)}, {solver}",
            expected=f"marginals within {solver.tolerance:.1e}",
            do="raise regularisation or iterations, or use solvers.Exact()",
        )


def _require_positive(solver: type[Solver], **options: float) -> None:
    for name, value in options.items():
        if not (value > 0 and np.isfinite(value)):
            raise ArgumentError(
                f"{name} {value}",
                where=f"solvers.{solver.__name__}",
                expected=f"a positive, finite {name}",
                do=f"give {solver.__name__}({name}=...) another value",
            )


def _require_solvable(
    cost: np.ndarray, a: np.ndarray, b: np.ndarray, balanced: bool = True
) -> None:
    if not np.isfinite(cost).all():
        raise SolverError(
            "a ground cost that is NaN or infinite",
            where=_problem(cost),
            expected="finite costs",
            do="check the activations of both networks on the calibration data",
        )
    positive = (a > 0).all() and (b > 0).all()
    same_total = np.isclose(a.sum(), b.sum(), rtol=1e-9, atol=0.0)
    if not positive or balanced and not same_total:
        raise SolverError(
            f"masses that are not all positive, or add up to {a.sum():.6g} and {b.sum():.6g}",
            where=_problem(cost),
            expected="positive masses with the same sum on both sides",
            do="divide both marginals by their sums, or use solvers.UnbalancedSinkhorn()",
        )
