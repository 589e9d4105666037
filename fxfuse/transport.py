"""Couple units by optimal transport between what they compute on the data."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .correspondence import Correspondence
from .costs import correlation
from .coupling import Costs, Maps, Plans, two_maps
from .errors import ArgumentError
from .measuring import Measurements, View
from .mixing import Mixer
from .moments import PairMoments
from .progress import Tick, counted, in_parts, part, silent
from .solvers import Exact, Solver
from .weightwise import Weights, weight_cost

GroundCost = Callable[[Sequence[PairMoments]], np.ndarray]


@dataclass(frozen=True)
class Transport:
    """Transport from each network's units to the base network's, space by space.

    Spaces whose units no node shows (inside attention) are matched last, by their weights.

    Attributes:
        ground_cost: Moments of two spaces to the cost between their units.
        solver: Ground cost and marginals to a transport plan.
        maps: Plan to project and unproject.
        view: Where units are compared.
        agreement: Where a network's units agree less with the base network's (see
            `coupling.agreements`), its weight counts less: times this power of the agreement. What
            reads the fused units in its place reads them as far as they agree. With 0 every
            network has its full say everywhere.
    """

    ground_cost: GroundCost = correlation
    solver: Solver = Exact()
    maps: Maps = two_maps
    view: View = View()
    agreement: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what is no power."""
        if not 0 <= self.agreement < math.inf:
            raise ArgumentError(
                f"agreement {self.agreement}",
                where="transport.Transport",
                expected="a power that is not negative",
                do="use 0 for a full say everywhere, 4 for that of the default method",
            )

    def __call__(self, mixer: Mixer, measured: Measurements, tick: Tick = silent) -> None:
        """Fill in the coupling of every space and network."""
        plans = Plans(
            mixer.match, self.solver, self.maps, mixer.couplings, agreement=self.agreement
        )
        costs = ground_costs(mixer.match, measured, self.ground_cost, part(tick, 0.0, 0.5))
        solve_all(mixer, plans, costs, part(tick, 0.5, 1.0))


def ground_costs(
    match: Correspondence,
    measured: Measurements,
    ground_cost: GroundCost,
    tick: Tick = silent,
) -> Costs:
    """Return the cost between the base network's units and each other's; uses up the pairs."""
    costs: Costs = {}
    for name, i, k in counted(list(measured.pairs), tick):  # each may take gigabytes
        places = list(measured.pairs.pop((name, i, k)).values())
        if match.base[name] in (i, k) and i != k:
            forward = match.base[name] == i
            cost = ground_cost(places)
            costs[name, k if forward else i] = cost if forward else cost.T
    return costs


def solve_all(mixer: Mixer, plans: Plans, costs: Costs, tick: Tick = silent) -> None:
    """Couple what is not coupled yet, given its costs; what has none is compared by weights."""
    keys = plans.settle_given()
    late = _unseen(mixer.match, keys, costs)
    early = [key for key in keys if key not in late]
    share = len(early) / max(len(keys), 1)
    for key in counted(early, part(tick, 0.0, share)):
        plans.solve(*key, costs)
    weights = Weights.of(mixer)
    for k, step in in_parts(sorted({k for _, k in late}), part(tick, share, 1.0)):
        own = [key for key in keys if key in late and key[1] == k]
        shown = [key for key in own if mixer.match.spaces[key[0]][0].axes]
        costs |= {key: weight_cost(weights, *key) for key in shown}
        for key in counted(own, step):
            plans.solve(*key, costs)


def _unseen(
    match: Correspondence,
    keys: Sequence[tuple[str, int]],
    costs: Costs,
) -> set[tuple[str, int]]:
    """Return the spaces without a cost of their own, or around or beside such a one in blocks."""
    late: set[tuple[str, int]] = set()
    for k in {k for _, k in keys}:
        family = {s[k].name: name for name, s in match.spaces.items()}
        outer = {s[k].parent for s in match.spaces.values()}
        for name in (n for n, j in keys if j == k):
            space = match.spaces[name][k]
            if (name, k) not in costs and space.name not in outer:
                late.add((name, k))
                if space.parent is not None:
                    late.add((family[space.parent], k))
        for name in (n for n, j in keys if j == k):
            parent = match.spaces[name][k].parent
            if parent is not None and (family[parent], k) in late:
                late.add((name, k))
    return late
