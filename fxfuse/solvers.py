"""Transport and assignment problems: a ground cost and marginals in, a plan out.

A solver is an immutable object with `__call__(cost, a, b) -> plan`. Plans are sparse: an exact plan
between `n` and `m` units has at most `n + m - 1` entries.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import ot
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array

from .errors import SolverError


@dataclass(frozen=True)
class Exact:
    """Exact optimal transport; the assignment solver where the plan is a permutation.

    Attributes:
        iterations: Limit of the network simplex.
    """

    iterations: int = 2_000_000

    def __call__(self, cost: np.ndarray, a: np.ndarray, b: np.ndarray) -> csr_array:
        """Return the plan `(n, m)` of least cost with marginals `a` `(n,)` and `b` `(m,)`.

        Raises:
            SolverError: If the cost is not finite or the simplex does not finish.
        """
        _require_finite(cost)
        if len(a) == len(b) and np.ptp(a) == 0 and np.ptp(b) == 0:
            rows, columns = linear_sum_assignment(cost)
            return csr_array((a[rows], (rows, columns)), shape=cost.shape)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the log says what the warning says
            plan, log = ot.emd(a, b, np.ascontiguousarray(cost), self.iterations, log=True)
        if log["warning"] is not None:
            raise SolverError(
                f"the network simplex stopped: {log['warning']}",
                where=f"a transport problem of {len(a)} x {len(b)} units",
                expected=f"an optimum within {self.iterations} iterations",
                do="raise Exact(iterations=...)",
            )
        plan[plan < 1e-12 / max(plan.shape)] = 0.0
        return csr_array(plan)


@dataclass(frozen=True)
class Assignment:
    """One-to-one assignment; refuses problems whose plan is not a permutation."""

    def __call__(self, cost: np.ndarray, a: np.ndarray, b: np.ndarray) -> csr_array:
        """Return the permutation of least cost, weighted by the marginals.

        Raises:
            SolverError: If the sizes differ or the marginals are not uniform.
        """
        if len(a) != len(b) or np.ptp(a) or np.ptp(b):
            raise SolverError(
                f"{len(a)} and {len(b)} units, or marginals that are not uniform",
                where="the solver Assignment",
                expected="as many units on both sides, all of the same mass",
                do="use solvers.Exact(), which takes any marginals",
            )
        return Exact()(cost, a, b)


def _require_finite(cost: np.ndarray) -> None:
    if not np.isfinite(cost).all():
        raise SolverError(
            "a ground cost that is NaN or infinite",
            where=f"a transport problem of {cost.shape[0]} x {cost.shape[1]} units",
            expected="finite costs",
            do="check the activations of both networks on the calibration data",
        )
