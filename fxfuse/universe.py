"""Match all networks jointly, through units of a universe that belong to none of them.

References:
    Crisostomi et al. 2024 (C2M3), equations 5 to 8. Differences: the step along a segment is the
    exact maximum of the polynomial that the objective is there; what is rounded at the end is then
    raised further, network by network.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.polynomial import Polynomial
from scipy.sparse import csr_array

from .ascent import Start, families, follow, forward, inner, members, require_equal_widths
from .coupling import Plans, two_maps
from .ir import Coupling
from .measuring import Measurements, View
from .mixing import Mixer
from .solvers import Assignment
from .together import Free, join, merge_in_turn, spaces_to_join
from .weightwise import Weights, cross, unit_rows

Maps = dict[tuple[str, int], csr_array]
Gains = dict[tuple[str, int], np.ndarray]


@dataclass(frozen=True)
class CycleConsistent:
    """Match all networks at once so that their weights are most alike in a common universe.

    The sum over pairs of networks and tensors of inner products, all axes mapped to the universe,
    is raised by Frank-Wolfe steps over all maps together, then each map is rounded to the nearest
    permutation. Maps between networks are consistent around cycles, since all lead over the
    universe, and the order of the networks does not matter. Networks of equal width only.

    Attributes:
        start: Where to start from.
        iterations: Limit of the steps.
        tolerance: Relative to the objective, what still counts as a gain.
        polish: Rounds of matching each rounded network to the sum of the others.
        seed: Of the order in these rounds.
        folded: Compare weights with norms folded in.
        view: Nothing is measured.
    """

    start: Start = forward
    iterations: int = 100
    tolerance: float = 1e-6
    polish: int = 100
    seed: int = 0
    folded: bool = False
    view: View | None = None

    def __call__(self, mixer: Mixer, measured: Measurements) -> None:
        """Fill in the coupling of every space and network.

        Raises:
            PairingError: If the networks differ in width.
        """
        require_equal_widths(mixer.match, type(self).__name__)
        weights, rng = Weights.of(mixer, self.folded), np.random.default_rng(self.seed)
        free = spaces_to_join(mixer)
        join(weights, free, self.start)
        for _ in range(self.iterations):
            if not _step(weights, free, self.tolerance):
                break
        here = {key: mixer.couplings[key].project.toarray() for key in _keys(free)}
        _move(weights, _corner(weights, free, here))
        merge_in_turn(weights, free, self.polish, 100, rng)


def _step(weights: Weights, free: Free, tolerance: float) -> bool:
    """Take one Frank-Wolfe step; return whether it gained anything."""
    value, gains = slope(weights)
    here = {key: weights.mixer.couplings[key].project for key in _keys(free)}
    corner = _corner(weights, free, gains)
    room = sum(float((corner[key] - here[key]).multiply(g).sum()) for key, g in gains.items())
    if room <= tolerance * abs(value):
        return False
    degree = 2 * max(len(weights.dims(t)) for t in _tensors(weights))
    points, values = np.linspace(0.0, 1.0, degree + 1), [value]
    for point in points[1:]:
        _move(weights, _between(here, corner, point))
        values.append(objective(weights))
    best, gained = _highest(points, np.array(values))
    _move(weights, _between(here, corner, best))
    return gained > tolerance * abs(value)


def _highest(points: np.ndarray, values: np.ndarray) -> tuple[float, float]:
    """Return where in [0, 1] the polynomial through some values is highest, and its rise."""
    curve = Polynomial.fit(points, values, len(points) - 1)
    roots = curve.deriv().roots()
    flat = [float(r.real) for r in roots if abs(r.imag) < 1e-9 and 0 < r.real < 1]
    best = max([0.0, 1.0, *flat], key=curve)
    return best, float(curve(best) - curve(0.0))


def objective(weights: Weights) -> float:
    """Return the sum over tensors and pairs of networks of their inner product, mapped."""
    return sum(_of_tensor(weights, t)[0] for t in _tensors(weights))


def slope(weights: Weights) -> tuple[float, Gains]:
    """Return the objective, and its derivative `(universe, units)` by each map."""
    value, gains = 0.0, {}
    for tensor in _tensors(weights):
        part, mapped, total = _of_tensor(weights, tensor)
        value += part
        for k, own in mapped.items():
            others = total - own
            for name, axis in weights.places(tensor):
                found = cross(unit_rows(others, axis), weights.rows(name, axis, k))
                gains[name, k] = gains[name, k] + found if (name, k) in gains else found
    return value, gains


def _of_tensor(
    weights: Weights, tensor: str
) -> tuple[float, dict[int, np.ndarray], np.ndarray]:
    """Return a tensor's part of the objective, the tensor of each network, and their sum."""
    here = [k for k, state in enumerate(weights.states) if tensor in state]
    mapped = {k: weights.carried(tensor, k) for k in here}
    total = sum(mapped.values())
    return (inner(total, total) - sum(inner(t, t) for t in mapped.values())) / 2, mapped, total


def _tensors(weights: Weights) -> list[str]:
    """Return the tensors with units on them that at least two networks have."""
    names = dict.fromkeys(t for state in weights.states for t in state)
    shared = [t for t in names if sum(t in state for state in weights.states) > 1]
    return [t for t in shared if weights.dims(t)]


def _corner(weights: Weights, free: Free, gains: Gains) -> Maps:
    """Return the permutations, in blocks where there are some, of the greatest linear gain."""
    match = weights.mixer.match
    plans = Plans(match, Assignment(), two_maps)
    order = families(weights.mixer.balanced.networks[weights.mixer.anchor])
    for k, names in free.items():
        costs = {(n, i): -g * members(match, n) for (n, i), g in gains.items() if i == k}
        for family in order:
            moving = [name for name in family if name in names]
            if any((name, k) in costs for name in moving):
                follow(match, moving, k, costs)
            for name in moving:
                plans.solve(name, k, costs)
    return {key: coupling.project for key, coupling in plans.couplings.items()}


def _between(here: Maps, there: Maps, share: float) -> Maps:
    return {key: (1 - share) * here[key] + share * there[key] for key in here}


def _move(weights: Weights, maps: Maps) -> None:
    for (name, k), project in maps.items():
        project = csr_array(project)
        project.eliminate_zeros()
        weights.put(name, k, Coupling(project, csr_array(project.T)))


def _keys(free: Free) -> list[tuple[str, int]]:
    return [(name, k) for k, names in free.items() for name in names]
