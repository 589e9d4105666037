"""Match units by the weights of the networks alone.

`WeightTransport` shares out each network's units among the base network's, space by space in
network order. `WeightMatching` permutes each network so that its weights resemble the base's most;
`MergeMany` permutes each in turn towards the sum of the others. Both climb by `Ascent`: the sum,
over all tensors, of the inner product of a target with the network's tensor, all axes mapped, is
raised space by space until no move raises it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .._progress import counted, part, rounds
from ..errors import PairingError
from ..ir import Axis
from ..solvers import Assignment, Exact, Solver
from ..spaces.network import Network
from ._weights import Weights, cross, unit_rows, weight_cost
from .measure import Evidence
from .mixing import Couplings
from .plans import Costs, CouplingMethod, Plans, ToMaps, two_maps
from .problem import Problem

LEAST_GAIN = 1e-12  # of the size of the sum: what counts as an improvement
INNER_SWEEPS = 3  # between spaces of one family that share a tensor
SWEEPS, ROUNDS = 100, 100  # limits: over the spaces of a network, and over all networks

Free = Mapping[int, Sequence[str]]  # network -> the spaces whose units may move


@dataclass(frozen=True)
class WeightTransport(CouplingMethod):
    """Transport from each network's units to the base network's, compared by their weights.

    Each space is solved in network order. A unit's vector is its row of every tensor that writes
    its space, with the input side mapped by the couplings solved before. In a residual stream, only
    the first writers have their input side mapped when the stream is reached, so later passes solve
    every space again with all of its writers; on a plain chain they change nothing.

    Attributes:
        solver: Ground cost and marginals to a transport plan.
        maps: Plan to project and unproject.
        passes: How often to go through the network.

    References:
        Singh and Jaggi 2020 (OTFusion), its mode `wts`. Differences: biases and norms count.
    """

    solver: Solver = Exact()
    maps: ToMaps = two_maps
    passes: int = 2

    def __call__(self, problem: Problem, evidence: Evidence) -> Couplings:
        """Return the coupling of every space and network."""
        weights = Weights.of(problem)
        plans = Plans(problem, self.solver, self.maps, weights.couplings)
        unsolved = set(plans.settle_given())
        order = families(problem.structure)
        for _ in counted(range(self.passes)):
            for family in counted(order):
                for k in sorted({k for name, k in unsolved if name in family}):
                    self._solve(weights, plans, family, k)
        return Couplings(problem, weights.couplings)

    def _solve(self, weights: Weights, plans: Plans, family: list[str], k: int) -> None:
        """Solve blocks and what is inside; once the blocks are matched, their inside again."""
        for moving in (family, *([name] for name in family[1:])):
            costs = self._costs(weights, moving, k)
            for name in moving:
                plans.solve(name, k, costs)
                weights.put(name, k, plans.couplings[name, k])

    def _costs(self, weights: Weights, moving: list[str], k: int) -> Costs:
        costs: dict[tuple[str, int], np.ndarray] = {}
        for name in moving:
            axes = weights.axes(name)
            squared = weights.distances(name, k, [a for a in axes if not a.reads] or axes)
            if squared is not None:
                costs[name, k] = np.sqrt(squared)
            elif k == weights.reference(name):  # the base has no such units: share these out
                costs[name, k] = weight_cost(weights, name, k)
        return costs


@dataclass(frozen=True)
class WeightMatching(CouplingMethod):
    """Match each network to the base network so that their weights are most alike.

    The sum over all tensors of the inner product of the base's and the network's, all axes mapped,
    is raised space by space until no space raises it. Networks of equal width only.

    Attributes:
        seed: Of the order in which spaces are visited.

    References:
        Ainsworth et al. 2023 (Git Re-Basin), algorithm 1. Differences: (1) spaces of blocks; (2) a
        move is kept only if the whole sum is greater; (3) it starts from one pass in network order,
        not from units in place, where it does not always find a network's own permuted copy.
    """

    seed: int = 0

    def __call__(self, problem: Problem, evidence: Evidence) -> Couplings:
        """Return the coupling of every space and network.

        Raises:
            PairingError: If the networks differ in width.
        """
        require_equal_widths(problem, type(self).__name__)
        weights = Weights.of(problem)
        free = Plans(problem, Exact(), two_maps, weights.couplings).settle_given()
        matched = [problem.anchor]
        others = [k for k in range(len(weights.states)) if k != problem.anchor]
        for k in counted(others):
            targets = first_of(weights, matched)
            ascent = Ascent(weights, k, targets, [name for name, i in free if i == k])
            ascent.sweep()
            ascent.run(np.random.default_rng(self.seed))
            matched.append(k)
        return Couplings(problem, weights.couplings)


@dataclass(frozen=True)
class MergeMany(CouplingMethod):
    """Match each network in turn to the sum of all others, until none moves.

    Every network is mapped, the anchor too: the fused units belong to none of them. Networks are
    taken in an order that depends on their weights and the seed, not on their place in the list;
    only networks of exactly equal norms, such as copies, keep the order of the list. Networks of
    equal width only.

    Attributes:
        seed: Of the order of networks and spaces.

    References:
        Ainsworth et al. 2023 (Git Re-Basin), algorithm 3.
    """

    seed: int = 0

    def __call__(self, problem: Problem, evidence: Evidence) -> Couplings:
        """Return the coupling of every space and network.

        Raises:
            PairingError: If the networks differ in width.
        """
        require_equal_widths(problem, type(self).__name__)
        weights = Weights.of(problem)
        rng, free = np.random.default_rng(self.seed), spaces_to_join(weights)
        with part(0.0, 0.5):
            join(weights, free)
        with part(0.5, 1.0):
            merge_in_turn(weights, free, ROUNDS, rng)
        return Couplings(problem, weights.couplings)


def require_equal_widths(problem: Problem, method: str) -> None:
    """Refuse networks of different width for a method that matches units one to one.

    Raises:
        PairingError: Naming the first space whose sizes differ.
    """
    for name, spaces in problem.spaces.items():
        sizes = [s.size for s, present in zip(spaces, problem.present[name]) if present]
        if len(set(sizes)) > 1:
            raise PairingError(
                f"units that cannot be matched one to one: {' and '.join(map(str, sizes))} of them",
                where=f"space '{name}', method {method}",
                expected="the same width in all networks",
                do="use Transport() or WeightTransport(), which share units out",
            )


# --- coordinate ascent for one network ------------------------------------------------------------


def first_of(weights: Weights, networks: Sequence[int]) -> dict[str, np.ndarray]:
    """Return every tensor, mapped, of the first network that has it."""
    tensors: dict[str, np.ndarray] = {}
    for k in networks:
        for tensor in weights.states[k]:
            if tensor not in tensors:
                tensors[tensor] = weights.carried(tensor, k)
    return tensors


@dataclass(frozen=True, eq=False)
class Ascent:
    """Coordinate ascent for one network towards fixed targets.

    A space inside blocks moves together with the blocks. Where a tensor has one space on two axes,
    or two spaces of one family, the sum is not linear in what moves: the best move of the linear
    part is proposed. Every move is kept only if the whole sum is greater after it.

    Attributes:
        weights: The tensors, and the couplings that are moved.
        k: The network.
        targets: What each of its tensors is to resemble, in fused coordinates.
        names: The spaces that may move.
    """

    weights: Weights
    k: int
    targets: Mapping[str, np.ndarray]
    names: Sequence[str]

    def keep(self) -> None:
        """Leave all units of the network where they are."""
        plans = Plans(self.weights.problem, Assignment(), two_maps)
        for name in self.names:
            plans.keep(name, self.k)
            self.weights.put(name, self.k, plans.couplings[name, self.k])

    def sweep(self) -> None:
        """Match family by family in network order, so that no match rests on one not made yet."""
        for name in self.names:
            self.weights.forget(name, self.k)
        for family in self.families:
            self._solve(family, self._costs(family, settled=True))
            for name in family[1:]:  # now that the blocks are matched, more is
                self._solve([name], self._costs([name], settled=True))

    def run(self, rng: np.random.Generator, sweeps: int = SWEEPS) -> bool:
        """Move spaces in random order until none improves; return whether any did."""
        moved, stale = False, set(range(len(self.families)))
        for _ in rounds(sweeps):
            for i in counted(rng.permutation(len(self.families)).tolist()):
                if i not in stale:
                    continue
                stale.discard(i)
                if self._improve(self.families[i]):
                    moved = True
                    stale |= self._neighbours[i]
            if not stale:
                break
        return moved

    @cached_property
    def families(self) -> list[list[str]]:
        """Spaces with the spaces inside their blocks, those that are free to move."""
        free = set(self.names)
        kept = [[n for n in family if n in free] for family in families(self.weights.anchor)]
        return [family for family in kept if family]

    @cached_property
    def _neighbours(self) -> list[set[int]]:
        """Per family, the indices of those that share a tensor with it."""
        index = {name: i for i, family in enumerate(self.families) for name in family}
        neighbours = []
        for i, family in enumerate(self.families):
            spaces = {s for t in self._tensors(family) for s in self.weights.spaces_on(t)}
            neighbours.append({index[s] for s in spaces if s in index} - {i})
        return neighbours

    def _tensors(self, family: Sequence[str]) -> list[str]:
        """Return the tensors that a family lies on, of those with a target."""
        tensors = dict.fromkeys(a.tensor for name in family for a in self.weights.axes(name))
        return [t for t in tensors if t in self.targets and t in self.weights.states[self.k]]

    def _improve(self, family: list[str]) -> bool:
        moved = self._try(family)
        for name in family[1:]:
            moved = self._try([name]) or moved
        return moved

    def _try(self, moving: list[str]) -> bool:
        """Move some spaces to where the sum seems greatest; undo it unless it is greater."""
        tensors = self._tensors(moving)
        before = {name: self.weights.couplings[name, self.k] for name in moving}
        value, scale = self._value(tensors)
        self._solve(moving, self._costs(moving))
        linked = [n for n in moving[1:] if self._linked(n, moving)]
        for _ in range(INNER_SWEEPS if linked else 0):
            for name in linked:
                self._solve([name], self._costs([name]))
        if self._value(tensors)[0] > value + LEAST_GAIN * scale:
            return True
        for name, coupling in before.items():
            self.weights.put(name, self.k, coupling)
        return False

    def _linked(self, name: str, family: Sequence[str]) -> bool:
        on = [self.weights.spaces_on(a.tensor, a.dim) for a in self.weights.axes(name)]
        return any(set(spaces) & set(family) for spaces in on)

    def _value(self, tensors: Sequence[str]) -> tuple[float, float]:
        """Return the sum over tensors, and the size of what was summed."""
        value = scale = 0.0
        for tensor in tensors:
            a, b = self.targets[tensor], self.weights.carried(tensor, self.k)
            value += inner(a, b)
            scale += inner(a, a) + inner(b, b)
        return value, scale

    def _costs(self, moving: Sequence[str], settled: bool = False) -> Costs:
        """Return minus the inner products of targets and units, where there are any.

        Args:
            moving: The spaces; a tensor that two of them lie on does not count.
            settled: Only count tensors whose other axes are matched.
        """
        costs: dict[tuple[str, int], np.ndarray] = {}
        for name in moving:
            parts = [
                cross(unit_rows(self.targets[a.tensor], a), self.weights.rows(name, a, self.k))
                for a in self._counted(name, moving)
                if not settled or self.weights.settled(a, self.k)
            ]
            if parts:
                gains = sum(parts[1:], parts[0])
                costs[name, self.k] = -gains * members(self.weights.problem, name)
        return costs

    def _counted(self, name: str, moving: Sequence[str]) -> list[Axis]:
        """Return where a space lies in tensors that have a target, and that only it moves."""
        tensors = set(self._tensors([name]))
        axes = [a for a in self.weights.axes(name) if a.tensor in tensors]
        if len(moving) == 1:
            return axes
        return [a for a in axes if not {*self.weights.spaces_on(a.tensor, a.dim)} & {*moving}]

    def _solve(self, moving: Sequence[str], costs: Costs) -> None:
        """Solve some spaces; one without costs stays where it is, or moves with its blocks."""
        couplings = self.weights.couplings
        plans = Plans(self.weights.problem, Assignment(), two_maps)
        plans.plans.update({key: c.project for key, c in couplings.items() if key[1] == self.k})
        costs = followed(self.weights.problem, moving, self.k, costs)
        for name in moving:
            if (name, self.k) in costs or len(moving) > 1 or (name, self.k) not in couplings:
                plans.solve(name, self.k, costs)
                self.weights.put(name, self.k, plans.couplings[name, self.k])


# --- several networks, matched to each other ------------------------------------------------------


def spaces_to_join(weights: Weights) -> Free:
    """Settle the spaces that a network lacks; return, per network, those that it has."""
    problem = weights.problem
    plans = Plans(problem, Assignment(), two_maps, weights.couplings)
    free: dict[int, list[str]] = {k: [] for k in range(len(problem.networks))}
    for name in problem.spaces:
        for k, present in enumerate(problem.present[name]):
            if present:
                free[k].append(name)
            elif any(problem.present[name]) or k != problem.base[name]:
                plans.drop(name, k)
            else:
                plans.keep(name, k)
    return free


def join(weights: Weights, free: Free) -> None:
    """Match each network, in one sweep, to the sum of those before it; the first stays."""
    order = by_content(weights)
    for i, k in enumerate(counted(order)):
        ascent = Ascent(weights, k, sum_of(weights, order[:i]), free[k])
        if i:
            ascent.sweep()
        else:
            ascent.keep()


def merge_in_turn(weights: Weights, free: Free, limit: int, rng: np.random.Generator) -> None:
    """Match each network to the sum of the others, in random order, until none moves."""
    order = by_content(weights)
    for _ in rounds(limit):
        moved = False
        for k in counted([order[i] for i in rng.permutation(len(order))]):
            targets = sum_of(weights, [j for j in order if j != k])
            moved |= Ascent(weights, k, targets, free[k]).run(rng)
        if not moved:
            return


def by_content(weights: Weights) -> list[int]:
    """Return the networks in an order that depends on their weights, not on that of the list."""
    norms = [[inner(t, t) for _, t in sorted(s.items())] for s in weights.states]
    return sorted(range(len(norms)), key=lambda k: norms[k])


def sum_of(weights: Weights, networks: Sequence[int]) -> dict[str, np.ndarray]:
    """Return every tensor summed over the networks that have it, all axes mapped."""
    total: dict[str, np.ndarray] = {}
    for k in networks:
        for tensor in weights.states[k]:
            value = weights.carried(tensor, k)
            total[tensor] = total[tensor] + value if tensor in total else value
    return total


# --- spaces in order, and sums over them ----------------------------------------------------------


def inner(a: np.ndarray, b: np.ndarray) -> float:
    """Return the inner product of two tensors, in double precision."""
    return float(np.einsum("i,i->", a.ravel(), b.ravel(), dtype=float))


def followed(problem: Problem, moving: Sequence[str], k: int, costs: Costs) -> Costs:
    """Return costs with zeros for the spaces inside moving blocks that have none."""
    zeros = {}
    for name in (n for n in moving[1:] if (n, k) not in costs):
        zeros[name, k] = np.zeros((problem.base_space(name).size, problem.spaces[name][k].size))
    return {**costs, **zeros}


def members(problem: Problem, name: str) -> int:
    """Return how many units lie in each block of a space, 1 if it has none.

    Plans count the best match inside a block as a mean over its units; here it counts as a sum.
    """
    blocks = problem.base_space(name).blocks
    return 1 if blocks is None or not len(blocks) else int(np.bincount(blocks).max())


def families(network: Network) -> list[list[str]]:
    """Return spaces with those inside their blocks, outermost first, in network order."""
    root: dict[str, str] = {}
    for space in network.spaces:  # a space of blocks comes before the spaces inside
        root[space.name] = root.get(space.parent or "", space.name)
    rank = {name: i for i, name in enumerate(network_order(network))}
    inside: dict[str, list[str]] = {}
    for name, outer in root.items():
        inside.setdefault(outer, []).append(name)
    return sorted(inside.values(), key=lambda family: min(rank[name] for name in family))


def network_order(network: Network) -> list[str]:
    """Return the names of the spaces by the first node that writes their units."""
    first: dict[str, int] = {}
    for i, node in enumerate(network.module.graph.nodes):
        for tensor in network.tensors.get(node.name, ()):
            for space, axis in network.spaces.on(tensor):
                if not axis.reads:
                    first.setdefault(space.name, i)
    names = [space.name for space in network.spaces]
    return sorted(names, key=lambda name: first.get(name, len(network.module.graph.nodes)))
