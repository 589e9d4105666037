"""Match units into a set that grows: those like a fused unit join it, others become new ones.

Spaces are matched one after the other in network order, each unit by the weights that write it,
read in the fused units matched before. One network after the other is assigned to the fused units
so far and to new ones; then each is taken out and assigned anew. A fused unit is the mean of its
members by the networks' shares, and what a network has no unit for counts as zero there.

References:
    Wang et al. 2020 (FedMA), equation 2 and algorithm 1; Yurochkin et al. 2019 (PFNM), whose
    posterior gives the costs. Differences: (1) weights are counted relative to the size of the
    layer's rows, so that one noise suits all layers; (2) a network is as precise as its share; (3)
    the clients do not train between layers; (4) weights that a network lacks, as of a layer that
    only others have, count for nothing; (5) heads, groups, units under norms over units and units
    that no weight reads keep the anchor's number, and are matched by transport.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array

from .._progress import counted
from ..errors import ArgumentError, PairingError
from ..ir import Axis, Coupling
from ..solvers import Exact
from ._weights import Weights, weight_cost
from .measure import Evidence
from .mixing import Couplings
from .plans import CouplingMethod, Plans, two_maps
from .problem import Problem
from .weight_matching import by_content, families

POPULAR = 10  # more members do not make a fused unit more likely, as in the published code
NO_PRECISION = 1e-12  # instead of none, so that nothing is divided by zero


@dataclass(frozen=True)
class MatchedAveraging(CouplingMethod):
    """Match the units of many networks, of any widths, into a set that grows.

    Attributes:
        noise: Standard deviation of a network's weights about those of its fused unit, relative to
            the root mean square norm of the layer's rows. The smaller, the more new units.
        prior: Standard deviation of fused weights about zero, on the same scale.
        gamma: Mass of the process that fused units are drawn from. The greater, the more new units.
        limit: Most units of a layer, relative to the widest network's. Never more than all networks
            have together.
        rounds: How often each network is taken out and assigned anew.
        seed: Of the order in which they are.
    """

    noise: float = 0.3
    prior: float = 10.0
    gamma: float = 1.0
    limit: float = 2.0
    rounds: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse options out of range."""
        positive = min(self.noise, self.prior, self.gamma) > 0
        if not (positive and self.limit >= 1 and self.rounds >= 0):
            raise ArgumentError(
                f"{self}",
                where="MatchedAveraging",
                expected="noise, prior and gamma above 0, a limit of 1 or more, no negative rounds",
                do="leave them out for the usual ones",
            )

    @property
    def room(self) -> float:
        """How many units the fused network may have, relative to the widest network."""
        return self.limit

    def __call__(self, problem: Problem, evidence: Evidence) -> Couplings:
        """Return the coupling of every space and network to the units of the host.

        Raises:
            PairingError: If units of different number have no weights to compare.
        """
        weights = Weights.of(problem)
        plans = Plans(problem, Exact(), two_maps, weights.couplings)
        left = set(plans.settle_given())
        for family in counted(families(problem.structure)):
            grows = problem.base[family[0]] == problem.anchor and len(family) == 1
            if grows:
                self._grow(weights, plans, family[0])
                continue
            for k in sorted({k for name, k in left if name in family}):
                for moving in (family, *([name] for name in family[1:])):
                    costs = {(name, k): weight_cost(weights, name, k) for name in moving}
                    for name in moving:
                        plans.solve(name, k, costs)
                        weights.put(name, k, plans.couplings[name, k])
        return Couplings(problem, weights.couplings)

    def _grow(self, weights: Weights, plans: Plans, name: str) -> None:
        """Match one space of all networks that have it and have a share."""
        problem, shares = weights.problem, weights.problem.weights
        present = problem.present[name]
        having = [k for k in by_content(weights) if k != problem.anchor and present[k]]
        having = [k for k in having if shares[k]] or having
        for k in range(len(present)):
            if k not in having:
                plans.drop(name, k)
        having.sort(key=lambda k: -problem.spaces[name][k].size)
        rows, known = _rows(weights, name, having)
        parts = np.array(problem.among([k in having for k in range(len(present))]))[having]
        precisions = known * (parts * len(having))[:, None] / self.noise**2
        size = problem.base_space(name).size
        if not known.any():
            places = _by_index(name, [len(r) for r in rows], size)
        else:
            rng = np.random.default_rng(self.seed)
            rows = [r / _scale(rows) for r in rows]
            options = self.prior, self.gamma, size, self.rounds, rng
            places = match_into_growing_set(rows, precisions, *options)
        mass = np.bincount(np.concatenate(places), np.repeat(parts, list(map(len, places))), size)
        for k, places_of_k in zip(having, places):
            units = np.arange(len(places_of_k))
            shape = size, len(units)
            written = csr_array((1 / mass[places_of_k], (places_of_k, units)), shape=shape)
            read = csr_array((np.ones(len(units)), (units, places_of_k)), shape=shape[::-1])
            weights.put(name, k, Coupling(written, read))


def match_into_growing_set(
    rows: Sequence[np.ndarray],
    precisions: np.ndarray,
    prior: float,
    gamma: float,
    most: int,
    rounds: int,
    rng: np.random.Generator,
) -> list[np.ndarray]:
    """Assign the units of each network to fused units, at most one of each network to one of them.

    Args:
        rows: Of each network, the weights `(units, columns)`.
        precisions: `(networks, columns)` one over the variance of a network's weights.
        prior: Standard deviation of fused weights about zero.
        gamma: Mass of the process that fused units are drawn from.
        most: How many fused units there may be, at least as many as any network has units.
        rounds: How often each network is taken out and assigned anew.
        rng: For the order in which they are.

    Returns:
        Of each network, the fused unit of each of its units. They are numbered without gaps.

    Example:
        >>> a, b = np.eye(3), np.array([[0.0, 1, 0], [0, 0, -1]])
        >>> places = match_into_growing_set([a, b], np.full((2, 3), 9.0), 10, 1, 5, 0, None)
        >>> [p.tolist() for p in places]
        [[0, 1, 2], [1, 3]]
    """
    fused = _Fused(rows, np.maximum(precisions, NO_PRECISION), prior, gamma, most)
    for k in range(len(rows)):
        fused.assign(k)
    for _ in range(rounds if len(rows) > 1 else 0):
        for k in rng.permutation(len(rows)):
            fused.take_out(k)
            fused.assign(k)
    used = np.unique(np.concatenate(fused.places))
    return [np.searchsorted(used, places) for places in fused.places]


class _Fused:
    """The fused units while networks are assigned to them, each with its members' sums."""

    def __init__(
        self,
        rows: Sequence[np.ndarray],
        precisions: np.ndarray,
        prior: float,
        gamma: float,
        most: int,
    ) -> None:
        columns = precisions.shape[1]
        self.rows, self.precisions = rows, precisions
        self.least, self.gamma = 1 / prior**2, gamma
        self.sums = np.zeros((most, columns))  # of the members' weights, by their precisions
        self.total = np.full((most, columns), self.least)  # precisions of the members and the prior
        self.members = np.zeros(most, dtype=int)
        self.places = [np.zeros(0, dtype=int) for _ in rows]

    def assign(self, k: int) -> None:
        """Assign the units of a network to fused units, old and new."""
        count, networks = len(self.rows[k]), len(self.rows)
        old, free = np.flatnonzero(self.members), np.flatnonzero(self.members == 0)
        free = free[:count]
        weighed, precision = self.rows[k] * self.precisions[k], self.precisions[k]
        alone = (weighed**2 / (self.least + precision)).sum(1)
        number = np.arange(1, len(free) + 1)
        opened = alone[:, None] + 2 * np.log(self.gamma / networks) - 2 * np.log(number)
        both = self.total[old] + precision
        joined = (self.sums[old] ** 2 / both - self.sums[old] ** 2 / self.total[old]).sum(1)
        joined = joined + 2 * weighed @ (self.sums[old] / both).T + weighed**2 @ (1 / both).T
        popular = np.minimum(self.members[old], POPULAR)
        joined = joined + np.log(popular / np.maximum(networks - popular, 1))
        if len(old):
            _, chosen = linear_sum_assignment(np.hstack([joined, opened]), maximize=True)
            new = chosen >= len(old)  # which of them is which new one makes no difference
            chosen[new] = len(old) + np.arange(new.sum())
            self.places[k] = np.concatenate([old, free])[chosen]
        else:
            self.places[k] = free
        self._count(k, 1)

    def take_out(self, k: int) -> None:
        """Take the units of a network out."""
        self._count(k, -1)

    def _count(self, k: int, sign: int) -> None:
        places = self.places[k]
        self.sums[places] += sign * self.rows[k] * self.precisions[k]
        self.total[places] += sign * self.precisions[k]
        self.members[places] += sign
        empty = self.members == 0  # what rounding leaves
        self.sums[empty], self.total[empty] = 0.0, self.least


def _rows(
    weights: Weights, name: str, networks: Sequence[int]
) -> tuple[list[np.ndarray], np.ndarray]:
    """Return what writes the units of each network, and which columns each network has.

    Returns:
        Of each network `(units, columns)`, and `(networks, columns)` 1 where it has them, else 0.
    """
    axes = weights.axes(name)
    axes = [a for a in axes if not a.reads] or axes
    pieces: list[list[np.ndarray]] = [[] for _ in networks]
    known: list[np.ndarray] = []
    for axis in axes:
        having = [weights.settled(axis, k) for k in networks]
        if any(having):
            _add_columns(weights, name, axis, networks, having, pieces)
            known.append(np.repeat(np.array([having], float).T, pieces[0][-1].shape[1], axis=1))
    sizes = [weights.problem.spaces[name][k].size for k in networks]
    rows = [np.hstack(p) if p else np.zeros((n, 0)) for p, n in zip(pieces, sizes)]
    return rows, np.hstack(known) if known else np.zeros((len(networks), 0))


def _add_columns(
    weights: Weights,
    name: str,
    axis: Axis,
    networks: Sequence[int],
    having: Sequence[bool],
    pieces: list[list[np.ndarray]],
) -> None:
    """Add what one tensor holds of each network's units; zeros where a network lacks it."""
    found = [weights.rows(name, axis, k) if has else None for k, has in zip(networks, having)]
    columns = next(r.shape[1] for r in found if r is not None)
    for k, rows, of_network in zip(networks, found, pieces):
        size = weights.problem.spaces[name][k].size
        of_network.append(np.zeros((size, columns)) if rows is None else rows.astype(float))


def _scale(rows: Sequence[np.ndarray]) -> float:
    """Return the root mean square norm of all rows."""
    norms = np.concatenate([(r**2).sum(1) for r in rows])
    return float(np.sqrt(norms.mean())) or 1.0


def _by_index(name: str, sizes: Sequence[int], size: int) -> list[np.ndarray]:
    """Match units that nothing tells apart by their numbers."""
    if len(set(sizes)) > 1 or sizes[0] > size:
        raise PairingError(
            f"a space of {' and '.join(map(str, sizes))} units that nothing tells apart",
            where=f"space '{name}'",
            expected="equal sizes where units cannot be compared",
            do="use networks of equal width in this place",
        )
    return [np.arange(n) for n in sizes]
