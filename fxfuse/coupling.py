"""Couple the units of each space: one (project, unproject) pair of maps per space and network.

A residual stream is one space and gets one coupling from all its places together. Spaces inside
blocks (groups, heads) are coupled in two steps: blocks by the cost of their best inner match, then
units inside matched blocks.

References:
    Singh and Jaggi 2020 (OTFusion). Difference: two maps. With `T` the plan, `P = T / mass of the
    fused units` acts on what is written and `U = T' / mass of the units` on what is read; one map
    for both scales a widened copy of a network by its width ratio at every layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from scipy.sparse import coo_array, csr_array, diags_array, eye_array

from .correspondence import Correspondence
from .errors import PairingError
from .ir import Coupling, Space
from .measuring import Measurements
from .moments import PairMoments

GroundCost = Callable[[Sequence[PairMoments]], np.ndarray]
Solver = Callable[[np.ndarray, np.ndarray, np.ndarray], csr_array]
Maps = Callable[[csr_array], tuple[csr_array, csr_array]]


def two_maps(plan: csr_array) -> tuple[csr_array, csr_array]:
    """Turn a plan `(fused, own)` into project and unproject, each with rows that sum to 1."""
    project = diags_array(1.0 / plan.sum(1)) @ plan
    unproject = diags_array(1.0 / plan.sum(0)) @ plan.T
    return csr_array(project), csr_array(unproject)


def one_map(plan: csr_array) -> tuple[csr_array, csr_array]:
    """Use the projection on both sides, as the published codes do (equal for permutations)."""
    project = csr_array(diags_array(1.0 / (plan.sum(1) + 1e-7)) @ plan)
    return project, csr_array(project.T)


def couple(
    match: Correspondence,
    measured: Measurements,
    ground_cost: GroundCost,
    solver: Solver,
    maps: Maps,
) -> dict[tuple[str, int], Coupling]:
    """Solve a coupling for each space and network, `(name, network)` -> maps to the fused space."""
    costs = {key: ground_cost(list(places.values())) for key, places in measured.pairs.items()}
    couplings: dict[tuple[str, int], Coupling] = {}
    plans: dict[tuple[str, int], csr_array] = {}
    for name, spaces in match.spaces.items():
        for k, space in enumerate(spaces):
            base = spaces[match.base[name]]
            if k == match.base[name] or not match.present[name][k]:
                couplings[name, k] = _identity(base.size, space.size, name)
                plans[name, k] = csr_array(eye_array(base.size) / base.size)
                continue
            cost = costs.get((name, k))
            inner = _children(match, costs, name, k)
            if inner:
                cost = _block_cost(base.size, space.size, inner, solver)
            if cost is None:
                couplings[name, k] = _identity(base.size, space.size, name)
                plans[name, k] = csr_array(eye_array(base.size) / base.size)
                continue
            plan = _solve(cost, base, space, plans.get((base.parent, k)), solver)
            plans[name, k] = plan
            project, unproject = maps(plan)
            total = float(plan.multiply(cost).sum() / plan.sum())
            couplings[name, k] = Coupling(project, unproject, total)
    return couplings


def _identity(size: int, other: int, name: str) -> Coupling:
    if size != other:
        raise PairingError(
            f"a space of {size} and {other} units where nothing was measured",
            where=f"space '{name}'",
            expected="equal sizes where the units cannot be compared",
            do="use networks of equal width in this place",
        )
    return Coupling(csr_array(eye_array(size)), csr_array(eye_array(size)))


def _children(
    match: Correspondence, costs: dict[tuple[str, int], np.ndarray], name: str, k: int
) -> list[tuple[Space, Space, np.ndarray]]:
    """Return the measured spaces inside the blocks of a space: of the base, of `k`, their cost."""
    found = []
    for child, spaces in match.spaces.items():
        base = spaces[match.base[child]]
        if base.parent is not None and (child, k) in costs:
            parents = match.spaces[name][match.base[child]].name
            if base.parent == parents:
                found.append((base, spaces[k], costs[child, k]))
    return found


def _members(space: Space) -> list[np.ndarray]:
    return [np.flatnonzero(space.blocks == b) for b in range(int(space.blocks.max()) + 1)]


def _block_cost(
    rows: int, columns: int, inner: list[tuple[Space, Space, np.ndarray]], solver: Solver
) -> np.ndarray:
    total = np.zeros((rows, columns))
    for base, space, cost in inner:
        ours, theirs = _members(base), _members(space)
        for i, here in enumerate(ours):
            for j, there in enumerate(theirs):
                part = cost[np.ix_(here, there)]
                plan = solver(part, *_uniform(part))
                total[i, j] += plan.multiply(part).sum()
    return total


def _uniform(cost: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return tuple(np.full(n, 1.0 / n) for n in cost.shape)


def _solve(
    cost: np.ndarray, base: Space, space: Space, outer: csr_array | None, solver: Solver
) -> csr_array:
    """Solve a plan; inside blocks, follow the plan of the blocks (or keep them in place)."""
    if base.blocks is None:
        return solver(cost, *_uniform(cost))
    ours, theirs = _members(base), _members(space)
    if outer is None:
        outer = csr_array(eye_array(len(ours)) / len(ours))
    outer = coo_array(outer)
    data, rows, columns = [], [], []
    for i, j, mass in zip(outer.row, outer.col, outer.data):
        part = cost[np.ix_(ours[i], theirs[j])]
        plan = coo_array(solver(part, *_uniform(part)))
        rows.append(ours[i][plan.row])
        columns.append(theirs[j][plan.col])
        data.append(plan.data * mass)
    where = (np.concatenate(rows), np.concatenate(columns))
    return csr_array((np.concatenate(data), where), shape=cost.shape)
