"""From ground costs to plans, and from plans to couplings: what all coupling methods share.

A coupling method is a function `(problem, evidence) -> couplings` with a `view`: what it wants
measured. A residual stream is one space and gets one coupling from all its places together. Spaces
inside blocks (groups, heads) are coupled in two steps: blocks by the cost of their best inner
match, then units inside matched blocks. Blocks, and units that no weight reads (queries, keys), are
not mixed: there a soft solver is replaced by an exact one.

The mean of two units that have little in common is like neither of them. So a network may count
less in a fused unit where its unit agrees less with the base network's (see `agreements`).

References:
    Singh and Jaggi 2020 (OTFusion). Difference: two maps. With `T` the plan, `P = T / mass of the
    fused units` acts on what is written and `U = T' / mass of the units` on what is read; one map
    for both scales a widened copy of a network by its width ratio at every layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Protocol

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_array, csr_array, eye_array

from ..errors import PairingError
from ..ir import Coupling, Space
from ..solvers import Assignment, Exact, Solver
from .measure import Evidence, View
from .mixing import Couplings
from .problem import Problem

Costs = Mapping[tuple[str, int], np.ndarray]  # space and network -> ground cost
ToMaps = Callable[[csr_array], tuple[csr_array, csr_array]]

BY_INDEX = 0.9  # of what the best match gains over any match: siblings gain as much by index
ALIKE_BY_INDEX = 0.5  # share of the mean cost that siblings' units are below, matched by index
SAME = 1e-3  # relative cost below which units differ by rounding only
ALIKE = 0.5  # costs are relative to their mean, or to this if it is less
LEAST = 0.03  # agreement of units that have nothing in common, so that a lone network counts fully


class CouplingMethod(Protocol):
    """How the units of the networks are matched; inherit from it for the defaults.

    Attributes:
        widest: Whether the anchor is the widest network, if the caller names none.
    """

    widest: ClassVar[bool] = False

    @property
    def room(self) -> float | None:
        """How many units it may give the fused network, relative to the widest of the networks.

        It is then called with a problem that has a host for them (`width.growth`). None, the
        default, if it gives it those of the anchor.
        """
        return None

    @property
    def view(self) -> View | None:
        """What is to be measured of the units; None, the default, if only weights count."""
        return None

    def __call__(self, problem: Problem, evidence: Evidence) -> Couplings:
        """Return the coupling of every space and network.

        Args:
            problem: The networks, their spaces and shares.
            evidence: What one pass over the data measured of the units, in the method's view.
        """


def two_maps(plan: csr_array) -> tuple[csr_array, csr_array]:
    """Turn a plan `(fused, own)` into project and unproject, each with rows that sum to 1."""
    return _rows_to_one(plan), _rows_to_one(plan.T)


def one_map(plan: csr_array) -> tuple[csr_array, csr_array]:
    """Use the projection on both sides, as the published codes do (equal for permutations)."""
    project = _rows_to_one(plan, floor=1e-7)
    return project, csr_array(project.T)


def reading_map(plan: csr_array) -> tuple[csr_array, csr_array]:
    """Use the map of what is read on both sides, as the code of Transformer Fusion does.

    Rows of what is written sum to the width ratio: each layer is scaled by it.
    """
    unproject = _rows_to_one(plan.T)
    return csr_array(unproject.T), unproject


def _rows_to_one(matrix: csr_array, floor: float = 0.0) -> csr_array:
    """Divide each row by its sum; a permutation gets ones exactly, which mixes without sums."""
    scaled = csr_array(matrix, copy=True)
    scaled.eliminate_zeros()  # a row of zeros stays: the unit is matched with nothing
    scaled.data = scaled.data / (scaled.sum(1) + floor)[coo_array(scaled).row]
    return scaled


def coupled(plan: csr_array, maps: ToMaps, cost: float | None = None) -> Coupling:
    """Return the coupling of a plan; rows of what is written that sum to more or less are scaled.

    Args:
        plan: `(fused, own)`.
        maps: Plan to project and unproject.
        cost: Mean ground cost per unit of mass.
    """
    project, unproject = maps(plan)
    sums = np.asarray(project.sum(1)).ravel()
    scaled = maps is reading_map and bool(np.abs(sums - 1.0).max(initial=0.0) > SAME)
    gains = np.where(sums > 0, sums, 1.0) if scaled else None
    return Coupling(project, unproject, cost, gains)


def agreements(cost: np.ndarray, project: csr_array, blocks: np.ndarray | None) -> np.ndarray:
    """Return how far a network's units agree with the base network's, `(fused units,)`.

    The agreement is one minus the cost of what a fused unit is given, relative to the mean cost:
    with correlations as costs, the correlation. It is 1 where units are the same. A mean cost below
    one half says that all units are alike, or that there is only one; it is then taken as one half.

    Args:
        cost: Ground cost `(fused units, units)`.
        project: What the units give to the fused ones; rows sum to 1.
        blocks: The block of each fused unit, if they lie in blocks, which agree as a whole.
    """
    missed = np.asarray(project.multiply(cost).sum(1)).ravel() / max(np.abs(cost).mean(), ALIKE)
    if blocks is not None:
        missed = (np.bincount(blocks, missed) / np.bincount(blocks))[blocks]
    agreed: np.ndarray = np.where(missed <= SAME, 1.0, np.clip(1.0 - missed, LEAST, 1.0))
    return agreed


@dataclass(eq=False)
class Plans:
    """Solves space by space, between the base network and one other, given ground costs.

    Plans are kept, as a space inside blocks follows the plan of its blocks.

    Attributes:
        problem: The spaces.
        solver: Ground cost and marginals to a plan.
        maps: Plan to project and unproject.
        couplings: The maps of each space and network solved so far.
        plans: Their plans.
        agreement: Power of the agreement, as in `transport.Transport`.
        costs: For each space and network, the cost of three matches, summed over the units: the
            match by index, the one that was solved for, and the mean over all matches.
    """

    problem: Problem
    solver: Solver
    maps: ToMaps
    couplings: dict[tuple[str, int], Coupling] = field(default_factory=dict)
    plans: dict[tuple[str, int], csr_array] = field(default_factory=dict)
    agreement: float = 0.0
    costs: dict[tuple[str, int], np.ndarray] = field(default_factory=dict)

    def settle_given(self) -> list[tuple[str, int]]:
        """Couple what needs no solving; return the spaces and networks that are left."""
        left = []
        for name, spaces in self.problem.spaces.items():
            for k in range(len(spaces)):
                if (name, k) in self.couplings:
                    continue
                if k == self.problem.base[name]:
                    self.keep(name, k)
                elif not self.problem.present[name][k]:
                    self.drop(name, k)
                else:
                    left.append((name, k))
        return left

    def solve(self, name: str, k: int, costs: Costs) -> None:
        """Solve one space, given the ground costs of it or of the spaces inside its blocks."""
        space, base = self.problem.spaces[name][k], self.problem.base_space(name)
        cost, inner = costs.get((name, k)), self._children(name, k, costs)
        solver = self._solver_of(name)
        if inner:
            blocks = _block_cost(base.size, space.size, inner, solver)
            cost = blocks if cost is None else cost + blocks
        if cost is None:
            if base.size != space.size:
                raise PairingError(
                    f"a space of {base.size} and {space.size} units that nothing tells apart",
                    where=f"space '{name}'",
                    expected="equal sizes where units cannot be compared",
                    do="use networks of equal width in this place",
                )
            self.keep(name, k)
            return
        outer = self.plans.get((self._parent(name) or "", k))
        plan = _solve(cost, base, space, outer, solver, whole=name in self.problem.unread)
        total = float(plan.multiply(cost).sum() / plan.sum())
        self.plans[name, k] = plan
        square = base.size == space.size
        by_index = float(np.trace(cost)) / len(cost) if square else np.inf
        self.costs[name, k] = base.size * np.array([by_index, total, float(cost.mean())])
        coupling = coupled(plan, self.maps, total)
        if self.agreement:
            agreed = agreements(cost, coupling.project, base.blocks)
            project = csr_array(coupling.project.multiply((agreed**self.agreement)[:, None]))
            unproject = csr_array(coupling.unproject.multiply(agreed[None]))
            coupling = replace(coupling, project=project, unproject=unproject)
        self.couplings[name, k] = coupling

    def are_siblings(self) -> bool:
        """Tell whether the units of all networks agree with the base networks' by index.

        They do in networks that were tuned from one checkpoint. A match that leaves no difference
        is never given up for a match by index that leaves some.
        """
        others = {k for _, k in self.costs}
        for k in others:
            of_network = [costs for (_, j), costs in self.costs.items() if j == k]
            by_index, best, mean = np.sum(of_network, axis=0)
            gained = mean - by_index >= max(BY_INDEX * (mean - best), ALIKE_BY_INDEX * mean)
            if not gained or (best <= SAME * mean and by_index > best):
                return False
        every = len(others) + 1 == len(self.problem.networks)
        return every and not any(self.problem.absent)

    def _solver_of(self, name: str) -> Solver:
        """Return an exact solver for blocks, and for units that no weight reads.

        No map on the reading side could undo what a soft plan does there.
        """
        blocks = any(self._encloses(name, spaces) for spaces in self.problem.spaces.values())
        exact = blocks or name in self.problem.unread
        return Exact() if self.solver.soft and exact else self.solver

    def keep(self, name: str, k: int) -> None:
        """Leave the units of a space where they are."""
        size = self.problem.base_space(name).size
        self.plans[name, k] = csr_array(eye_array(size) / size)
        self.couplings[name, k] = Coupling(csr_array(eye_array(size)), csr_array(eye_array(size)))

    def drop(self, name: str, k: int) -> None:
        """Take nothing from a network that does not have a space."""
        shape = self.problem.base_space(name).size, self.problem.spaces[name][k].size
        self.couplings[name, k] = Coupling(csr_array(shape), csr_array(shape[::-1]))

    def _parent(self, name: str) -> str | None:
        """Return the anchor's name of the space whose blocks a space lies in."""
        inside = self.problem.spaces[name]
        return next((p for p in self.problem.spaces if self._encloses(p, inside)), None)

    def _encloses(self, name: str, inside: Sequence[Space]) -> bool:
        pairs = zip(self.problem.spaces[name], inside)
        return all(child.parent == outer.name for outer, child in pairs if child.size)

    def _children(self, name: str, k: int, costs: Costs) -> list[tuple[Space, Space, np.ndarray]]:
        """Return the spaces with costs inside a space's blocks: of the base, of `k`, their cost."""
        return [
            (self.problem.base_space(child), spaces[k], costs[child, k])
            for child, spaces in self.problem.spaces.items()
            if (child, k) in costs and self._encloses(name, spaces)
        ]


def alone(problem: Problem, k: int) -> Couplings:
    """Return the maps that make one network the whole result; the fused units are its own."""
    of_one = problem.led_by(k) or problem
    plans = Plans(of_one, Exact(), two_maps)
    for key in plans.settle_given():
        plans.drop(*key)
    weights = [float(j == k) for j in range(len(problem.networks))]
    return Couplings(of_one.weighted(weights), plans.couplings)


def _members(space: Space) -> list[np.ndarray]:
    blocks = space.blocks
    assert blocks is not None, "a space inside blocks"
    return [np.flatnonzero(blocks == b) for b in range(int(blocks.max()) + 1)]


def _block_cost(
    rows: int, columns: int, inner: list[tuple[Space, Space, np.ndarray]], solver: Solver
) -> np.ndarray:
    total = np.zeros((rows, columns))
    for base, space, cost in inner:
        for i, ours in enumerate(_members(base)):
            for j, theirs in enumerate(_members(space)):
                total[i, j] += _least(cost[np.ix_(ours, theirs)], solver)
    return total


def _least(cost: np.ndarray, solver: Solver) -> float:
    """Return the cost of the best plan; the many small assignments take a shortcut."""
    if cost.shape[0] == cost.shape[1] and isinstance(solver, (Exact, Assignment)):
        return float(cost[linear_sum_assignment(cost)].mean())
    return float(plan_between(cost, solver).multiply(cost).sum())


def uniform(cost: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return marginals that give every unit of a side the same mass."""
    rows, columns = (np.full(n, 1.0 / n) for n in cost.shape)
    return rows, columns


def plan_between(cost: np.ndarray, solver: Solver) -> csr_array:
    """Return a plan; where units are copies of others, the plan that joins each with its original.

    A soft solver is then not asked: it would spread a unit over partners that are less like it.
    """
    if cost.shape[0] == cost.shape[1] and not solver.soft:
        return solver(cost, *uniform(cost))
    partners = one_partner(cost)
    missed = float(partners.multiply(cost).max())
    copies = missed <= SAME * float(np.abs(cost).mean())
    return partners if copies else solver(cost, *uniform(cost))


def one_partner(cost: np.ndarray) -> csr_array:
    """Return a plan that gives each unit of the larger side one partner, and each of the smaller.

    Args:
        cost: Ground cost `(n, m)`.

    Example:
        >>> cost = np.array([[0, 1], [1, 0], [1, 0]])
        >>> one_partner(cost).toarray().astype(bool).astype(int).tolist()
        [[1, 0], [0, 1], [0, 1]]
    """
    if cost.shape[0] < cost.shape[1]:
        return csr_array(one_partner(cost.T).T)
    partners = cost.argmin(1)
    rows, columns = linear_sum_assignment(cost)
    partners[rows] = columns
    count = len(partners)
    return csr_array((np.full(count, 1 / count), (np.arange(count), partners)), shape=cost.shape)


def _solve(
    cost: np.ndarray,
    base: Space,
    space: Space,
    outer: csr_array | None,
    solver: Solver,
    whole: bool,
) -> csr_array:
    """Solve a plan; inside blocks, follow the plan of the blocks (or keep them in place).

    Args:
        cost: Ground cost `(n, m)`.
        base: The space of the base network.
        space: That of the other network.
        outer: The plan of the blocks that they lie in, if there is one.
        solver: Solves for the units, block by block.
        whole: Whether units get one partner, instead of shares of several, where sizes differ.
    """

    def plan_of(part: np.ndarray) -> csr_array:
        square = part.shape[0] == part.shape[1]
        return one_partner(part) if whole and not square else plan_between(part, solver)

    if base.blocks is None:
        return plan_of(cost)
    ours, theirs = _members(base), _members(space)
    if outer is None:
        outer = csr_array(eye_array(len(ours)) / len(ours))
    outer = coo_array(outer)
    data, rows, columns = [], [], []
    for i, j, mass in zip(outer.row, outer.col, outer.data):
        part = cost[np.ix_(ours[i], theirs[j])]
        plan = coo_array(plan_of(part))
        rows.append(ours[i][plan.row])
        columns.append(theirs[j][plan.col])
        data.append(plan.data * mass)
    places = (np.concatenate(rows), np.concatenate(columns))
    return csr_array((np.concatenate(data), places), shape=cost.shape)
