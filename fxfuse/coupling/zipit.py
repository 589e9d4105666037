"""Couple units by zipping: merge the two most alike, again and again, until the width is reached.

At first, each unit of each network is a group; then the two groups that correlate most are merged,
be they of two networks or of one. A fused unit is the mean of its group, weighted by the networks'
shares, and whatever read a member reads the group.

References:
    Stoica et al. 2024 (ZipIt), section 4; Xu et al. 2025, elastic zip for unequal widths.
    Differences: (1) a network's budget of inner merges is tested before a merge; the published code
    tests it afterwards, so that a budget of none still allows one; (2) a group counts as each of
    the networks that have units in it, not only as that of its first unit; (3) the discount `alpha`
    never raises a similarity, negative ones included, and does not apply to units that are the
    same; (4) a network wider than the result may always make the inner merges that it needs, and
    budgets are lifted where nothing else is left to merge (three networks and more); (5) units that
    correlate equally are told apart by mean and spread, and units that are constant are the same if
    their values are; (6) the weights of a group sum to 1, in heads too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from scipy.sparse import csr_array

from .._progress import counted, part
from ..calibration.moments import PairMoments, correlation, moment_distance, pearson, varies
from ..errors import ArgumentError
from ..ir import Coupling
from ..solvers import Exact
from .measure import Evidence, View
from .mixing import Couplings
from .plans import CouplingMethod, Plans, two_maps
from .problem import Problem
from .transport import GroundCosts, solve_all

FLOOR = 1e-7  # least product of two spreads that a correlation divides by
TIE_BREAK = 1e-3  # weight of the distance of means and spreads in a similarity
EQUAL = 1e-9  # distance of means and spreads up to which they are equal
SAME = 1.0  # similarity from which on two units are one
DECIMALS = 4  # similarities are rounded to so many: what differs by less is a tie


@dataclass(frozen=True)
class Zip(CouplingMethod):
    """Zip every space whose units are measured and read by a weight, and lie in no blocks.

    Other spaces (groups and heads and what is inside them, queries and keys, units that no node
    shows, or that are known by one value each) are matched with the base network's by exact
    transport, as `Transport` does it. The fused
    width of a space is the anchor's, by default that of the widest network. Networks without a
    share do not influence the groups; their units join the group they resemble most.

    Attributes:
        alpha: In (0, 1]: what the similarity of a merged group to others is multiplied by; the
            smaller it is, the fewer groups grow beyond two units.
        beta: In [0, 1]: how many of its merges a network may spend on pairs of its own units.
        view: Where units are compared; all networks must be compared with each other.
    """

    alpha: float = 0.3
    beta: float = 0.125
    view: View = View(activated=True, everything=True)
    widest: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse options out of range."""
        _require_options(self.alpha, self.beta)
        if not self.view.everything:
            raise ArgumentError(
                f"{self.view}",
                where="Zip(view=...)",
                expected="a view of all networks with each other and each with itself",
                do="set View(everything=True)",
            )

    def __call__(self, problem: Problem, evidence: Evidence) -> Couplings:
        """Return the coupling of every space and network."""
        plans, evidence = Plans(problem, Exact(), two_maps), _of_several_values(evidence)
        with part(0.0, 0.5):
            for name in counted(_to_zip(problem, evidence)):
                for k, present in enumerate(problem.present[name]):
                    if not present:
                        plans.drop(name, k)
                plans.couplings |= self._zip(problem, name, evidence)
        with part(0.5, 1.0):
            solve_all(plans, GroundCosts(problem, evidence, correlation))
        return Couplings(problem, plans.couplings)

    def _zip(
        self, problem: Problem, name: str, evidence: Evidence
    ) -> dict[tuple[str, int], Coupling]:
        """Return the coupling of one space for each network that has it."""
        pairs = [(key, by_node) for key, by_node in evidence.pairs.items() if key[0] == name]
        places = {(i, k): list(by_node.values()) for (_, i, k), by_node in pairs}
        spaces, base = problem.spaces[name], problem.base[name]
        having = sorted({k for pair in places for k in pair}, key=lambda k: (k != base, k))
        owners = np.repeat(having, [spaces[k].size for k in having])
        alike = similarities(places, having)
        shares = np.array(problem.among(problem.present[name]))
        size = spaces[problem.anchor].size
        groups = self._group(alike, owners, shares[owners], min(size, len(owners)))
        mass = np.bincount(groups, shares[owners])
        maps = {}
        for k in having:
            of_k = owners == k
            project, unproject = _maps(groups[of_k], np.where(mass > 0, mass, 1.0), size)
            cost = _cost(alike[of_k], groups[of_k][:, None] == groups, np.flatnonzero(of_k))
            maps[name, k] = Coupling(project, unproject, cost)
        return maps

    def _group(
        self, alike: np.ndarray, owners: np.ndarray, shares: np.ndarray, size: int
    ) -> np.ndarray:
        """Zip the units of networks that have a share, if they are enough; the others join them."""
        zipped = shares > 0 if (shares > 0).sum() >= size else shares >= 0
        chosen = alike if zipped.all() else alike[np.ix_(zipped, zipped)]
        groups = np.empty(len(owners), dtype=int)
        groups[zipped] = greedy_zip(chosen, owners[zipped], size, self.alpha, self.beta)
        if not zipped.all():
            groups[~zipped] = groups[zipped][alike[np.ix_(~zipped, zipped)].argmax(1)]
        return groups


def similarities(
    places: dict[tuple[int, int], list[PairMoments]], order: Sequence[int]
) -> np.ndarray:
    """Return how alike all networks' units are, `(units, units)`, as a mean over places.

    Args:
        places: Moments of each pair of networks `(i, k)`, `i <= k`, place by place.
        order: The networks in the order in which their units are to lie.
    """
    rows = []
    for i in order:
        row = []
        for k in order:
            pair = places[min(i, k), max(i, k)]
            alike = [_alike(m) for m in pair]
            mean = sum(alike[1:], alike[0]) / len(pair)
            row.append(mean if i <= k else mean.T)
        rows.append(np.hstack(row))
    return np.round(np.vstack(rows), DECIMALS)


def _alike(m: PairMoments) -> np.ndarray:
    """Correlate units; of two that never vary it is 1 if their values are equal, otherwise 0."""
    apart = moment_distance(m)
    equal = np.outer(~varies(m.a), ~varies(m.b)) & (apart < EQUAL)
    return np.where(equal, 1.0, np.clip(pearson(m, FLOOR), -1.0, 1.0)) - TIE_BREAK * apart


def greedy_zip(
    similarity: np.ndarray, owners: np.ndarray, size: int, alpha: float = 0.3, beta: float = 0.125
) -> np.ndarray:
    """Merge the two most similar groups of units again and again until `size` groups are left.

    A merged group is as similar to another one as its less similar part, times `alpha` unless its
    parts are the same (similarity 1). Ties go to the first pair of units.

    Args:
        similarity: `(units, units)`, symmetric and finite.
        owners: `(units,)` the network of each unit.
        size: Number of groups.
        alpha: In (0, 1].
        beta: In [0, 1]: each network takes part in the merges in proportion to its width; this
            share of them may join two of its own units.

    Returns:
        `(units,)` the group of each unit; groups are numbered by their first units.

    Raises:
        ArgumentError: If `alpha`, `beta` or `size` is out of range, or a similarity is not finite.

    Example:
        >>> alike = np.array([[1, 0.9, 0.2, 0.8], [0.9, 1, 0.7, 0], [0.2, 0.7, 1, 0.1],
        ...                   [0.8, 0, 0.1, 1]])
        >>> greedy_zip(alike, np.array([0, 0, 1, 1]), 2, beta=0).tolist()
        [0, 1, 1, 0]
        >>> greedy_zip(alike, np.array([0, 0, 1, 1]), 2, beta=1).tolist()
        [0, 0, 1, 1]
    """
    _require_options(alpha, beta)
    _require_problem(similarity, size)
    _, owners = np.unique(owners, return_inverse=True)
    widths = np.bincount(owners)
    removed = len(owners) - size
    budgets = np.floor(removed * widths / max(len(owners), 1) * beta + 1e-4)
    budgets = np.maximum(budgets, widths - size)  # a network wider than the result needs these
    groups = _Groups(
        np.minimum(similarity, similarity.T), owners[:, None] == np.arange(len(widths)), budgets
    )
    for _ in range(removed):
        groups.merge(*groups.most_similar(), alpha)
    return np.unique(groups.first, return_inverse=True)[1]


class _Groups:
    """The groups while they are merged, with the best partner of each.

    Similarities never rise. A group's best one is therefore a bound later on, and the group is
    searched again only when this bound is the largest of all.
    """

    def __init__(self, similarity: np.ndarray, holds: np.ndarray, budgets: np.ndarray) -> None:
        self.similarity = similarity.astype(float)
        np.fill_diagonal(self.similarity, -np.inf)
        self.holds, self.budgets = holds, budgets  # (groups, networks), (networks,)
        self.first = np.arange(len(holds))  # the first unit of each unit's group
        self.partner = np.zeros(len(holds), dtype=int)
        self.best = np.full(len(holds), np.inf)
        self.stale = np.ones(len(holds), dtype=bool)

    def most_similar(self) -> tuple[int, int]:
        """Return the first of the pairs `i < j` that are most similar among those allowed."""
        while True:
            i = int(self.best.argmax())
            if self.best[i] == -np.inf:
                self._lift()
            elif self.stale[i]:
                self._search(i)
            else:
                return i, int(self.partner[i])

    def _search(self, i: int) -> None:
        row = self.similarity[i]
        spent = self.holds[i] & (self.budgets <= 0)
        if spent.any():
            row = np.where(self.holds[:, spent].any(1), -np.inf, row)
        self.partner[i] = row.argmax()
        self.best[i], self.stale[i] = row[self.partner[i]], False

    def _lift(self) -> None:
        """Lift all budgets: any two of the groups that are left hold units of one network."""
        self.budgets[:] = np.inf
        alive = np.unique(self.first)
        self.best[alive], self.stale[alive] = np.inf, True

    def merge(self, i: int, j: int, alpha: float) -> None:
        """Put group `j` into group `i`."""
        shared = self.holds[i] & self.holds[j]
        self.budgets = self.budgets - shared
        if (shared & (self.budgets <= 0)).any():
            self.stale[:] = True
        lower = np.minimum(self.similarity[i], self.similarity[j])
        if self.similarity[i, j] < SAME:
            lower = np.minimum(alpha * lower, lower)
        self.similarity[i] = self.similarity[:, i] = lower
        self.similarity[j] = self.similarity[:, j] = self.best[j] = -np.inf
        self.stale |= (self.partner == i) | (self.partner == j)
        self.stale[i] = True
        self.holds[i] |= self.holds[j]
        self.first[self.first == j] = i


def _maps(groups: np.ndarray, mass: np.ndarray, size: int) -> tuple[csr_array, csr_array]:
    """Return the maps of a network's units, given their groups and the shares in each group.

    Where the anchor lacks a layer, its width may exceed the number of units to zip: a group then
    becomes several equal fused units, and whatever reads the group reads an equal part of each.
    """
    units, places = np.arange(len(groups)), np.arange(size)
    shape = len(groups), len(mass)
    member = csr_array((np.ones(len(units)), (units, groups)), shape=shape)
    copies = csr_array((np.ones(size), (places % len(mass), places)), shape=(len(mass), size))
    project = copies.T @ (member.T.multiply(1.0 / mass[:, None]))
    return csr_array(project), csr_array(member @ copies.multiply(1.0 / copies.sum(1)[:, None]))


def _cost(alike: np.ndarray, same: np.ndarray, units: np.ndarray) -> float | None:
    """Return how unlike units are to the others of their groups, None if all are alone."""
    same[np.arange(len(units)), units] = False
    return float(1.0 - alike[same].mean()) if same.any() else None


def _of_several_values(evidence: Evidence) -> Evidence:
    """Leave out what is known of units by one value each: all that are silent there are equal."""
    several = {
        key: by_node
        for key, by_node in evidence.pairs.items()
        if any(m.a.count > 1 for m in by_node.values())
    }
    return replace(evidence, pairs=several)


def _to_zip(problem: Problem, evidence: Evidence) -> list[str]:
    """Return the measured spaces that a weight reads and that neither are blocks nor lie in any."""
    parents = {s.parent for spaces in problem.spaces.values() for s in spaces}
    names = []
    for name, spaces in problem.spaces.items():
        blocks = any(s.blocks is not None or s.name in parents for s in spaces if s.size)
        read = any(a.reads for s in spaces for a in s.axes)
        having = [k for k, present in enumerate(problem.present[name]) if present]
        measured = all((name, i, k) in evidence.pairs for i in having for k in having if i <= k)
        if having and measured and read and not blocks:
            names.append(name)
    return names


def _require_options(alpha: float, beta: float) -> None:
    if not (0 < alpha <= 1 and 0 <= beta <= 1):
        raise ArgumentError(
            f"alpha {alpha} and beta {beta}",
            where="a zip",
            expected="alpha in (0, 1] and beta in [0, 1]",
            do="use Zip() for the published ones, Zip(alpha=1, beta=0) for neither",
        )


def _require_problem(similarity: np.ndarray, size: int) -> None:
    if not 0 < size <= len(similarity):
        raise ArgumentError(
            f"{len(similarity)} units to be zipped into {size} groups",
            where="greedy_zip",
            expected="at least one group, and no more groups than all networks have units",
            do="take a network of less width as the anchor, or ask for fewer groups",
        )
    if not np.isfinite(similarity).all():
        raise ArgumentError(
            "a similarity that is NaN or infinite",
            where=f"a zip of {len(similarity)} units",
            expected="finite similarities",
            do="check the activations of the networks on the calibration data",
        )
