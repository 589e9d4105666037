"""Couple units by canonical correlation analysis: features that correlate most, not single units.

Where permutations pair one unit with one, the maps found here are dense: a network's features are
turned and scaled, so that directions in which both networks vary together fall onto each other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array

from .._progress import counted, part
from ..calibration.moments import correlation
from ..errors import ArgumentError
from ..ir import Coupling
from ..solvers import Exact
from .measure import Evidence, View
from .mixing import Couplings
from .plans import CouplingMethod, Plans, two_maps, uniform
from .problem import Problem
from .transport import GroundCosts, solve_all

FAINT = 1e-3  # canonical correlations that are lower hardly tell directions apart


@dataclass(frozen=True)
class CanonicalCorrelation(CouplingMethod):
    """Map each network's features onto the base network's by canonical correlations.

    With `A`, `B` the covariances of the base network's units and another's, `C` those of one with
    the other, and `U S V'` the singular values of `A^-1/2 C B^-1/2`, the maps are
    `A^1/2 U V' B^-1/2` on what is written and its inverse on what is read. Spaces whose units are
    normalised together, multiplied with each other, convolved one by one, or lie in heads or
    groups, cannot be turned: there units are matched one to one by their correlation.

    Attributes:
        ridge: Added to variances, relative to the mean variance of a network's units. The paper's
            code tries values over many orders of magnitude with labels; of five, 1 and 10 were
            nearest to the ensemble on unlabelled digits, on networks that no table shows.
        view: Where units are compared.

    References:
        Horoi et al. 2024 (CCA-Merge). Differences: the ridge is relative; a stream counts in all of
        its places; directions in which the networks have nothing in common, or which no data show,
        follow the best permutation; widths may differ, and then one side has no inverse.
    """

    ridge: float = 1.0
    view: View = View(activated=True, everything=True)

    def __post_init__(self) -> None:
        """Refuse a ridge that is not above 0."""
        if not 0 < self.ridge < math.inf:
            raise ArgumentError(
                f"ridge {self.ridge}",
                where="CanonicalCorrelation(ridge=...)",
                expected="a number above 0, relative to the mean variance",
                do="leave it out, or give 1e-6 for hardly any",
            )

    def __call__(self, problem: Problem, evidence: Evidence) -> Couplings:
        """Return the coupling of every space and network."""
        plans = Plans(problem, Exact(), two_maps)
        costs = GroundCosts(problem, evidence, correlation)
        free = _free_to_turn(problem)
        with part(0.0, 0.5):
            for name, k in counted(plans.settle_given()):
                if name in free and (name, k) in costs:
                    plans.couplings[name, k] = self._turned(problem, evidence, costs, name, k)
        with part(0.5, 1.0):
            solve_all(plans, costs)
        return Couplings(problem, plans.couplings)

    def _turned(
        self, problem: Problem, evidence: Evidence, costs: GroundCosts, name: str, k: int
    ) -> Coupling:
        base, pairs = problem.base[name], evidence.pairs
        first, last = min(base, k), max(base, k)
        nodes = list(pairs[name, first, last])

        def covariance(i: int, j: int) -> np.ndarray:
            parts = [pairs[name, i, j][node].covariance for node in nodes]
            total: np.ndarray = np.sum(parts, axis=0)
            return total

        across = covariance(first, last)
        own, other = covariance(base, base), covariance(k, k)
        cost = costs[name, k]
        matched = np.zeros_like(cost)
        if cost.shape[0] == cost.shape[1]:
            matched = Exact()(cost, *uniform(cost)).toarray() * len(cost)
        project, unproject = canonical_maps(
            own, other, across if base < k else across.T, matched, self.ridge
        )
        sums = project.sum(1)  # what a unit is made of does not say how much a network counts
        return Coupling(csr_array(project), csr_array(unproject), None, np.where(sums, sums, 1.0))


def canonical_maps(
    a: np.ndarray, b: np.ndarray, across: np.ndarray, matched: np.ndarray, ridge: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return the maps from `m` units to `n`, `(n, m)`, and back, `(m, n)`.

    Args:
        a: Covariances `(n, n)` of the units to map to.
        b: Covariances `(m, m)` of those that are mapped.
        across: Covariances `(n, m)` of one with the other.
        matched: Permutation `(n, m)` that faint directions follow; zeros for none.
        ridge: See `CanonicalCorrelation`.

    Example:
        >>> a = np.array([[2.0, 0.0], [0.0, 1.0]])
        >>> swap = np.array([[0.0, 1.0], [1.0, 0.0]])
        >>> to, back = canonical_maps(a, swap @ a @ swap, a @ swap, swap, 1e-6)
        >>> np.allclose(to, swap, atol=1e-3), np.allclose(back, swap, atol=1e-3)
        (True, True)
    """
    (root_a, inverse_a), (root_b, inverse_b) = (_roots(x, ridge) for x in (a, b))
    alike = inverse_a @ across @ inverse_b + FAINT * matched
    left, _, right = np.linalg.svd(alike, full_matrices=False)
    turn = left @ right
    return root_a @ turn @ inverse_b, root_b @ turn.T @ inverse_a


def _roots(covariance: np.ndarray, ridge: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the square root of covariances with a ridge, and its inverse."""
    mean = float(np.trace(covariance)) / len(covariance)
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    roots = np.sqrt(np.maximum(values, 0.0) + max(ridge * mean, 1e-30))
    return (vectors * roots) @ vectors.T, (vectors / roots) @ vectors.T


def _free_to_turn(problem: Problem) -> set[str]:
    """Return the spaces whose units only meet activations, sums, and weights that read them all."""
    free = set()
    networks = problem.networks
    parents = {s.parent for spaces in problem.spaces.values() for s in spaces}
    for name, spaces in problem.spaces.items():
        blocks = any(s.blocks is not None or s.name in parents for s in spaces)
        grouped = any(axis.groups > 1 for s in spaces for axis in s.axes)
        nodes = [(n, f.tensor) for n, s in zip(networks, spaces) for f in s.features]
        bound = any(n.normalises_across_units(x) or n.multiplies(x) for n, x in nodes)
        if not (blocks or grouped or bound or name in problem.unread):
            free.add(name)
    return free
