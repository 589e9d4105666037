"""Smaller forms of a network: how many units each space keeps, and which, within a budget.

A budget is a share of the widths, or a number or share of multiply-adds or parameters. Spaces are
narrowed evenly, or units go in the order of what they score for what they cost, wherever they are.
What is left out may be merged into what is kept: `transported` couples all units with the kept ones
by optimal transport.

References:
    Theus et al. 2024 (Intra-Fusion). Difference: costs are measured on data, and two maps are used,
    as in `coupling.plans`, so that a network whose units come in copies is halved exactly.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Literal

import numpy as np
from scipy.sparse import coo_array, csr_array

from ..coupling.plans import two_maps
from ..errors import ArgumentError, FuseError
from ..graph.state import floats_of
from ..ir import Coupling, Space
from ..solvers import Solver
from ..spaces.network import Network
from ._carry import (
    CopyPlan,
    Maps,
    ResizedCopy,
    closest_copy,
    plan_copies,
    strongest,
    with_graph_of,
)
from .budget import MultiplyAdds, sized
from .importance import Scores
from .reshape import are_all_groups, change_most, scaled_sizes, shapes_at, spaces_under_norms

Pruned = ResizedCopy
Unit = Literal["width", "multiply_adds", "parameters"]
Sizes = dict[str, int]  # by space, the number of its units

STEPS = 1024  # factors of all widths that are tried between 0 and 1
FEWEST = 8  # of a space whose units compete with others', one unit in eight stays


@dataclass(frozen=True)
class Budget:
    """How much of a network is to be left.

    Attributes:
        to: Up to 1, a share of what it costs; above, a number.
        of: What counts: the number of units, multiply-adds of one sample, or parameters.
    """

    to: float
    of: Unit = "width"

    def __post_init__(self) -> None:
        """Refuse what is no budget."""
        if not self.to > 0 or (self.of == "width" and self.to > 1):
            raise ArgumentError(
                f"to {self.to}",
                where="the argument `to`",
                expected="a share above 0 and up to 1, or a number of multiply-adds or parameters",
                do="use to=0.5 for half of it",
            )

    def costs(self, network: Network) -> Callable[[Sizes], float]:
        """Return the function from sizes of spaces to the cost that counts."""
        if self.of == "parameters":
            names = {n for n, _ in network.module.named_parameters()}
            return lambda sizes: float(
                sum(prod(s) for n, s in shapes_at(network, sizes).items() if n in names)
            )
        if self.of == "multiply_adds":
            work, samples = MultiplyAdds(network), len(network.example[0])
            return lambda sizes: work.at(sizes) / 2 / samples
        return lambda sizes: float(sum(sizes.values()))

    def limit(self, whole: float) -> float:
        """Return what may be spent, where the whole network costs so much."""
        return self.to * whole if self.to <= 1 else self.to


# --- how many units each space keeps ----------------------------------------------------------


def smaller(
    network: Network, budget: Budget, scores: Scores | None
) -> tuple[Network, dict[str, str]]:
    """Return a network of the same structure within a budget, with meaningless weights.

    Args:
        network: The network.
        budget: What it may cost.
        scores: By space, the scores of its units, to let units compete across spaces; None to
            narrow all spaces by one factor.

    Returns:
        The smaller network, and the spaces that keep their width, with the reason.

    Raises:
        ArgumentError: If nothing can be made narrower.
    """
    costs, full = budget.costs(network), {s.name: s.size for s in network.spaces}
    limit, names, kept = budget.limit(costs(full)), _narrowable(network), dict[str, str]()
    host: Network | None = None
    while names:
        if scores is not None:
            factors = _competing(network, names, scores, costs, limit)
        elif budget.of == "width":
            factors = dict.fromkeys(names, budget.to)
        else:
            factors = _even(network, names, costs, limit)
        form = _form(network, factors) if scores is not None else _even_form(network, factors)
        host, unchanged = form
        kept |= unchanged
        names = [name for name in names if name not in unchanged]
        if not unchanged or budget.of == "width":
            break
    if host is None:
        raise ArgumentError(
            f"no space of {len(full)} that can be made narrower by to={budget.to:g}",
            where=network.name,
            expected=next(iter(kept.values()), "a space of units that are not fixed"),
            do="ask for less, leave even=True, or pass a narrower network of your own as `like`",
        )
    return host, kept


def _narrowable(network: Network) -> list[str]:
    """Return the spaces whose units can be left out; groups and heads lose units inside."""
    parents = {s.parent for s in network.spaces}
    wide = [s for s in network.spaces if s.size > 1]
    return [s.name for s in wide if s.name not in parents or are_all_groups(network, s.name)]


def _at(network: Network, factors: Mapping[str, float]) -> Sizes:
    return scaled_sizes(network, factors, spaces_under_norms(network))


def _form(network: Network, factors: Mapping[str, float]) -> tuple[Network | None, dict[str, str]]:
    """Return the network at other widths, as far as these can be had."""
    wanted = _at(network, factors)
    changing = [s.name for s in network.spaces if wanted[s.name] != s.size and s.name in factors]

    def change(names: set[str]) -> Network:
        return sized(network, _at(network, {name: factors[name] for name in names}))

    return change_most(changing, change)


def _even_form(
    network: Network, factors: dict[str, float]
) -> tuple[Network | None, dict[str, str]]:
    """Return the network at one factor of its widths, or at the next eighth below.

    Widths that have to agree, such as a stream's and that of all heads together, can be rounded
    apart by an odd factor.
    """
    factor = min(factors.values())
    if _at(network, factors) == _at(network, {}):
        return None, {}
    below = [eighth / 8 for eighth in range(7, 0, -1) if eighth / 8 < factor]
    for one in (factor, *below):
        try:
            return sized(network, _at(network, dict.fromkeys(factors, one))), {}
        except FuseError:
            continue
    return _form(network, factors)


def _even(
    network: Network, names: list[str], costs: Callable[[Sizes], float], limit: float
) -> dict[str, float]:
    """Return the largest factor of some spaces that keeps within the limit, by space."""

    def cost(step: int) -> float:
        return costs(_at(network, dict.fromkeys(names, step / STEPS)))

    above = bisect_left(range(1, STEPS + 1), True, key=lambda step: cost(step) > limit)
    return dict.fromkeys(names, max(above, 1) / STEPS)


def _competing(
    network: Network,
    names: list[str],
    scores: Scores,
    costs: Callable[[Sizes], float],
    limit: float,
) -> dict[str, float]:
    """Return by space the share that is kept, once those of the least score per cost are out.

    Units of blocks go together, one of each block: all blocks keep as many.
    """
    full = _at(network, {})
    order: list[tuple[float, str]] = []
    for name in names:
        rows = _rows(network.spaces[name], scores[name])
        one_less = _at(network, {name: 1 - 1 / len(rows)})
        saved = max(costs(full) - costs(one_less), 1e-30)
        order += [
            (score / saved, name) for score in rows[: len(rows) - max(len(rows) // FEWEST, 1)]
        ]
    order.sort()

    def shares(count: int) -> dict[str, float]:
        out = dict.fromkeys(names, 0)
        for _, name in order[:count]:
            out[name] += 1
        lengths = {n: len(_rows(network.spaces[n], scores[n])) for n in names}
        return {name: 1 - out[name] / lengths[name] for name in names}

    within = bisect_left(
        range(len(order)), True, key=lambda count: costs(_at(network, shares(count))) <= limit
    )
    return shares(within)


def _rows(space: Space, scores: np.ndarray) -> list[float]:
    """Return the scores in order, the lowest first; of blocks, the sums of their lowest, and on."""
    if space.blocks is None:
        return sorted(scores.tolist())
    parts = [np.sort(scores[space.blocks == block]) for block in np.unique(space.blocks)]
    fewest = min(len(part) for part in parts)
    return [float(sum(part[i] for part in parts)) for i in range(fewest)]


# --- what becomes of the others ---------------------------------------------------------------


def same_units(network: Network) -> dict[str, np.ndarray]:
    """Return by space, `(units,)`, the first unit of the same block that is written alike.

    Units that everything writes alike have the same value whatever the inputs are.
    """
    state = {name: t.detach().cpu().numpy() for name, t in floats_of(network.module).items()}
    first: dict[str, np.ndarray] = {}
    for space in network.spaces:
        written = [a for a in space.axes if not a.reads and a.tensor in state]
        if not written or any(a.groups > 1 for a in written):
            continue
        tensors = [np.moveaxis(state[a.tensor], a.dim, 0)[a.index] for a in written]
        rows = np.concatenate([t.reshape(space.size, -1) for t in tensors], 1)
        blocks = np.zeros(space.size, dtype=int) if space.blocks is None else space.blocks
        known: dict[tuple[int, bytes], int] = {}
        firsts = [
            known.setdefault((b, r.tobytes()), u) for u, (b, r) in enumerate(zip(blocks, rows))
        ]
        if len(known) < space.size:
            first[space.name] = np.array(firsts)
    return first


def without_same(scores: Scores, first: Mapping[str, np.ndarray]) -> Scores:
    """Return scores by which no unit is kept twice before all others are: one has those of all.

    Args:
        scores: By space, those of the units.
        first: What `same_units` returns.
    """
    scores = dict(scores)
    for name, firsts in first.items():
        total = np.bincount(firsts, scores[name], len(firsts))
        lowest = min(scores[name].min(), total.min()) - 1.0
        scores[name] = np.where(firsts == np.arange(len(firsts)), total, lowest)
    return scores


def pruned(network: Network, small: Network, scores: Scores) -> ResizedCopy:
    """Return the network with the units of the highest scores alone: structured pruning.

    What reads a unit that another one is always equal to reads that one.

    Args:
        network: The network.
        small: A network of the same structure with the widths that are wanted.
        scores: By space, the scores of the network's units.
    """
    original = with_graph_of(small, network)
    plan = plan_copies(original, small, strongest, scores)
    first = same_units(original)
    merged = {n: first[old.name] for n, (old, _) in plan.spaces.items() if old.name in first}
    plan = replace(plan, merged=merged)
    return closest_copy(plan, original.module, original.example, enough=0.0)


def transported(
    plan: CopyPlan, picked: Maps, costs: Mapping[str, np.ndarray], solver: Solver
) -> Maps:
    """Return maps that merge all units into the kept ones, by optimal transport.

    Every kept unit takes as much as any other. Units stay within their blocks. Where nothing was
    measured, and where two activations are multiplied unit by unit, units are picked as before.

    Args:
        plan: The network, the narrower one, and the units that are kept.
        picked: The maps of the kept units alone.
        costs: By space of the network, the cost between its units, `(units, units)`.
        solver: Ground cost and marginals to a plan.
    """
    maps = dict(picked)
    for name, (old, new) in plan.spaces.items():
        sources = plan.sources[name]
        movable = name not in plan.problem.unread and len(sources) < old.size
        if movable and old.name in costs:
            coupled = _within_blocks(old, new, sources, costs[old.name][sources], solver)
            maps[name, 0] = Coupling(*two_maps(coupled))
    return maps


def _within_blocks(
    old: Space, new: Space, sources: np.ndarray, cost: np.ndarray, solver: Solver
) -> csr_array:
    """Return the plan `(kept units, units)`, block by block."""
    ours = np.zeros(new.size, dtype=int) if old.blocks is None else old.blocks[sources]
    theirs = np.zeros(old.size, dtype=int) if old.blocks is None else old.blocks
    rows, columns, masses = [], [], []
    for block in np.unique(ours):
        kept, units = np.flatnonzero(ours == block), np.flatnonzero(theirs == block)
        uniform = (np.full(len(side), 1.0 / len(side)) for side in (kept, units))
        plan = coo_array(solver(cost[np.ix_(kept, units)], *uniform))
        rows.append(kept[plan.row])
        columns.append(units[plan.col])
        masses.append(plan.data)
    places = (np.concatenate(rows), np.concatenate(columns))
    return csr_array((np.concatenate(masses), places), shape=cost.shape)
