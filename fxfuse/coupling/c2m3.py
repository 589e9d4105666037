"""Match all networks jointly, through a universe of units that belong to none of them.

References:
    Crisostomi et al. 2024 (C2M3), equations 5 to 8. Differences: the step along a segment is the
    exact maximum of the polynomial that the objective is there; what is rounded at the end is then
    raised further, network by network.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.polynomial import Polynomial
from numpy.polynomial.polynomial import polyadd
from scipy.sparse import csr_array

from .._progress import counted, part
from ..ir import Coupling
from ..solvers import Assignment
from ._weights import Weights, cross, unit_rows
from .measure import Evidence
from .mixing import Couplings, apply_along
from .plans import Costs, CouplingMethod, Plans, two_maps
from .problem import Problem
from .weight_matching import (
    Free,
    families,
    followed,
    inner,
    join,
    members,
    merge_in_turn,
    require_equal_widths,
    spaces_to_join,
)

INWARD = 0.5  # way from the permutations to the maps that share every unit out evenly
TOLERANCE = 1e-4  # relative to the objective: what still counts as a gain

Maps = dict[tuple[str, int], csr_array]
Gains = dict[tuple[str, int], np.ndarray]


@dataclass(frozen=True)
class CycleConsistent(CouplingMethod):
    """Match all networks at once so that their weights are most alike in a common universe.

    The sum over pairs of networks and tensors of inner products, all axes mapped to the universe,
    is raised by Frank-Wolfe steps over all maps together, then each map is rounded to the nearest
    permutation. Maps between networks are consistent around cycles, since all lead over the
    universe, and the order of the networks does not matter. The universe's units are those of the
    anchor, in another order: the result has the anchor's order. Networks of equal width only.

    Attributes:
        iterations: Limit of the steps.
        polish: Limit of the rounds in which each rounded network is matched to the sum of the
            others; 0 for the paper's method.
        seed: Of the order in these rounds.
    """

    iterations: int = 100
    polish: int = 100
    seed: int = 0

    def __call__(self, problem: Problem, evidence: Evidence) -> Couplings:
        """Return the coupling of every space and network.

        Raises:
            PairingError: If the networks differ in width.
        """
        require_equal_widths(problem, type(self).__name__)
        weights = Weights.of(problem)
        rng, free = np.random.default_rng(self.seed), spaces_to_join(weights)
        with part(0.0, 0.2):
            join(weights, free)
        _soften(weights, free, INWARD)
        with part(0.2, 0.8):
            for _ in counted(range(self.iterations)):
                if not _step(weights, free):
                    break
        maps = {key: weights.couplings[key].project.toarray() for key in _keys(free)}
        _move(weights, _corner(weights, free, maps))
        with part(0.8, 1.0):
            merge_in_turn(weights, free, self.polish, rng)
        return Couplings(problem, {**weights.couplings, **_in_units_of_base(weights, free)})


def _in_units_of_base(weights: Weights, free: Free) -> dict[tuple[str, int], Coupling]:
    """Return the maps with the universe's units in the order of the base network's."""
    maps = {key: weights.couplings[key].project for key in _keys(free)}
    base = weights.problem.base
    return {(n, k): _coupling(maps[n, base[n]].T @ project) for (n, k), project in maps.items()}


def _soften(weights: Weights, free: Free, share: float) -> None:
    """Move all maps towards the even ones; no further than a space's blocks let its units go.

    At the permutations themselves, the first step would depend on this one match alone.
    """
    maps = {key: weights.couplings[key].project for key in _keys(free)}
    parents = {s.name: s.parent for s in weights.anchor.spaces}
    even = {key: csr_array(even_map(weights.problem, parents, *key)) for key in maps}
    _move(weights, {key: (1 - share) * maps[key] + share * even[key] for key in maps})


def even_map(problem: Problem, parents: Mapping[str, str | None], name: str, k: int) -> np.ndarray:
    """Return the mean of all permutations that a space allows, `(universe, units)`."""
    base, space = problem.base_space(name), problem.spaces[name][k]
    if base.blocks is None or space.blocks is None:
        return np.full((base.size, space.size), 1.0 / space.size)
    parent, blocks = parents[name], space.blocks
    outer = even_map(problem, parents, parent, k) if parent else np.eye(int(blocks.max()) + 1)
    even: np.ndarray = outer[np.ix_(base.blocks, blocks)] / np.bincount(blocks)[blocks]
    return even


def _step(weights: Weights, free: Free) -> bool:
    """Take one Frank-Wolfe step; return whether it gained anything."""
    gains = slope(weights)
    maps = {key: weights.couplings[key].project for key in _keys(free)}
    corner = _corner(weights, free, gains)
    curve = Polynomial(along(weights, corner))
    rise = sum(float((corner[key] - maps[key]).multiply(g).sum()) for key, g in gains.items())
    least = TOLERANCE * abs(curve(0.0))
    if rise <= least:
        return False
    best = _highest(curve)
    _move(weights, {key: (1 - best) * maps[key] + best * corner[key] for key in maps})
    return bool(curve(best) - curve(0.0) > least)


def _highest(curve: Polynomial) -> float:
    """Return where in [0, 1] a polynomial is highest."""
    roots: np.ndarray = curve.deriv().roots()
    flat = [float(r.real) for r in roots if abs(r.imag) < 1e-9 and 0 < r.real < 1]
    return max([0.0, 1.0, *flat], key=curve)


def along(weights: Weights, corner: Maps) -> np.ndarray:
    """Return the coefficients, constant first, of the objective on the way to other maps.

    A mapped tensor is a polynomial in the step, of the degree of its number of mapped axes.
    """
    other = weights.at({key: _coupling(project) for key, project in corner.items()})
    total: np.ndarray = np.zeros(1)
    for tensor in _tensors(weights):
        curves = [_curve(weights, other, tensor, k) for k in weights.having(tensor)]
        both = [sum(parts[1:], parts[0]) for parts in zip(*curves)]
        for sign, curve in [(0.5, both), *((-0.5, c) for c in curves)]:
            total = polyadd(total, sign * _square(curve))
    return total


def _curve(weights: Weights, other: Weights, tensor: str, k: int) -> list[np.ndarray]:
    """Return the coefficients of a mapped tensor on the way from some maps to others."""
    curve = [weights.dense(tensor, k)]
    for dim in weights.dims(tensor):
        start, end = (w.axis_map(tensor, dim, k) for w in (weights, other))
        low = [apply_along(start, t, dim) for t in curve]
        high = [apply_along(end, t, dim) for t in curve]
        steps = [b - a for a, b in zip(low, high)]
        curve = [low[0], *(a + b for a, b in zip(low[1:], steps)), steps[-1]]
    return curve


def _square(curve: list[np.ndarray]) -> np.ndarray:
    """Return the coefficients of the squared norm of a polynomial of tensors."""
    total = np.zeros(2 * len(curve) - 1)
    for i, a in enumerate(curve):
        for j, b in enumerate(curve[i:], i):
            total[i + j] += inner(a, b) * (1 if i == j else 2)
    return total


def slope(weights: Weights) -> Gains:
    """Return the derivative `(universe, units)` of the objective by each map."""
    gains: Gains = {}
    for tensor in _tensors(weights):
        mapped = {k: weights.carried(tensor, k) for k in weights.having(tensor)}
        total = sum(mapped.values())
        for k, value in mapped.items():
            for name, axis in weights.places(tensor):
                gain = cross(unit_rows(total - value, axis), weights.rows(name, axis, k))
                gains[name, k] = gains[name, k] + gain if (name, k) in gains else gain
    return gains


def _tensors(weights: Weights) -> list[str]:
    """Return the tensors with units on them that at least two networks have."""
    names = dict.fromkeys(t for state in weights.states for t in state)
    return [t for t in names if len(weights.having(t)) > 1 and weights.dims(t)]


def _corner(weights: Weights, free: Free, gains: Gains) -> Maps:
    """Return the permutations, in blocks where there are some, of the greatest linear gain."""
    problem = weights.problem
    plans = Plans(problem, Assignment(), two_maps)
    order = families(weights.anchor)
    for k, names in free.items():
        costs: Costs = {(n, i): -g * members(problem, n) for (n, i), g in gains.items() if i == k}
        for family in order:
            moving = [name for name in family if name in names]
            if any((name, k) in costs for name in moving):
                costs = followed(problem, moving, k, costs)
            for name in moving:
                plans.solve(name, k, costs)
    return {key: coupling.project for key, coupling in plans.couplings.items()}


def _move(weights: Weights, maps: Maps) -> None:
    for (name, k), project in maps.items():
        weights.put(name, k, _coupling(project))


def _coupling(project: csr_array) -> Coupling:
    project = csr_array(project)
    project.eliminate_zeros()
    return Coupling(project, csr_array(project.T))


def _keys(free: Free) -> list[tuple[str, int]]:
    return [(name, k) for k, names in free.items() for name in names]
