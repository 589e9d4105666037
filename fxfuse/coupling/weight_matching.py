"""Match several networks to each other rather than all of them to one.

The fused units are then nobody's: every network, the anchor too, has a map to them, and the maps
between two networks that lead over them are consistent around every cycle.

Match the units of one network to given tensors by coordinate ascent over its spaces.

The sum over tensors of the inner product of a target with the network's tensor, all axes mapped, is
raised space by space; a space inside blocks moves together with the blocks. Where a tensor has one
space on two axes, or two spaces of one family, the sum is not linear in what moves: the best move
of the linear part is proposed. Every move is kept only if the whole sum is greater after it.

References:
    Ainsworth et al. 2023 (Git Re-Basin), algorithm 1. Difference: blocks, and the check of moves.

Couplings from weights alone: transport, weight matching to a base, and to each other in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .._progress import counted, part, rounds
from ..errors import PairingError
from ..ir import Axis
from ..solvers import Assignment, Exact, Solver
from ..spaces.network import Network
from ._weights import Products, Weights, cross, distance, unit_norm, unit_rows, weight_cost
from .measure import Evidence, View
from .mixing import Couplings
from .plans import Costs, CouplingMethod, Maps, Plans, two_maps
from .problem import Problem

Free = Mapping[int, Sequence[str]]


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


def join(weights: Weights, free: Free, start: Start) -> None:
    """Start each network against the sum of those before it, the first where it is."""
    order = by_content(weights)
    for i, k in enumerate(counted(order)):
        ascent = Ascent(weights, k, sum_of(weights, order[:i]), free[k])
        if i:
            start(ascent)
        else:
            ascent.keep()


def merge_in_turn(
    weights: Weights,
    free: Free,
    limit: int,
    sweeps: int,
    rng: np.random.Generator,
) -> None:
    """Match each network to the sum of the others, in random order, until none moves."""
    order = by_content(weights)
    for _ in rounds(limit):
        moved = False
        for k in counted([order[i] for i in rng.permutation(len(order))]):
            targets = sum_of(weights, [j for j in order if j != k])
            moved |= Ascent(weights, k, targets, free[k]).run(sweeps, rng)
        if not moved:
            return


def by_content(weights: Weights) -> list[int]:
    """Return the networks in an order that depends on their weights, not on that of the list."""
    norms = [[inner(t, t) for _, t in sorted(s.items())] for s in weights.states]
    return sorted(range(len(norms)), key=lambda k: norms[k])


def sum_of(weights: Weights, networks: Sequence[int]) -> dict[str, np.ndarray]:
    """Return every tensor summed over the networks that have it, all axes mapped."""
    found: dict[str, np.ndarray] = {}
    for k in networks:
        for tensor in weights.states[k]:
            value = weights.carried(tensor, k)
            found[tensor] = found[tensor] + value if tensor in found else value
    return found


LEAST_GAIN = 1e-12  # of the size of the sum: what counts as an improvement


INNER_SWEEPS = 3  # between spaces of one family that share a tensor


Targets = Mapping[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Ascent:
    """Coordinate ascent for one network towards fixed targets.

    Attributes:
        weights: The tensors, and the couplings that are moved.
        k: The network.
        targets: What each of its tensors is to resemble, in fused coordinates.
        names: The spaces that may move.
    """

    weights: Weights
    k: int
    targets: Targets
    names: Sequence[str]

    def keep(self) -> None:
        """Leave all units of the network where they are."""
        plans = Plans(self.weights.problem, Assignment(), two_maps)
        for name in self.names:
            plans.keep(name, self.k)
            self.weights.put(name, self.k, plans.couplings[name, self.k])

    def sweep(self) -> None:
        """Match family by family in network order, by the tensors whose other axes are matched."""
        for name in self.names:
            self.weights.forget(name, self.k)
        for family in self.families:
            self._solve(family, self._gains(family, settled=True))
            for name in family[1:]:  # now that the blocks are matched, more is
                self._solve([name], self._gains([name], settled=True))

    def run(self, sweeps: int, rng: np.random.Generator) -> bool:
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
        found = families(self.weights.anchor)
        free = set(self.names)
        kept = [[n for n in family if n in free] for family in found]
        return [family for family in kept if family]

    @cached_property
    def _neighbours(self) -> list[set[int]]:
        home = {name: i for i, family in enumerate(self.families) for name in family}
        found = []
        for i, family in enumerate(self.families):
            beside = {s for t in self._tensors(family) for s in self.weights.spaces_on(t)}
            found.append({home[s] for s in beside if s in home} - {i})
        return found

    def _tensors(self, family: Sequence[str]) -> list[str]:
        """Return the tensors that count and that a family lies on."""
        found = dict.fromkeys(a.tensor for name in family for a in self.weights.axes(name))
        return [t for t in found if t in self.targets and t in self.weights.states[self.k]]

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
        self._solve(moving, self._gains(moving))
        linked = [n for n in moving[1:] if self._linked(n, moving)]
        for _ in range(INNER_SWEEPS if linked else 0):
            for name in linked:
                self._solve([name], self._gains([name]))
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

    def _gains(
        self, moving: Sequence[str], settled: bool = False
    ) -> dict[tuple[str, int], np.ndarray]:
        """Return minus the inner products of targets and units, for each space that has any.

        Args:
            moving: The spaces; a tensor that two of them lie on does not count.
            settled: Only count tensors whose other axes are matched.
        """
        found: dict[tuple[str, int], np.ndarray] = {}
        for name in moving:
            parts = [
                cross(unit_rows(self.targets[a.tensor], a), self.weights.rows(name, a, self.k))
                for a in self._counted(name, moving)
                if not settled or self.weights.settled(a, self.k)
            ]
            if parts:
                gains = sum(parts[1:], parts[0])
                found[name, self.k] = -gains * members(self.weights.problem, name)
        return found

    def _counted(self, name: str, moving: Sequence[str]) -> list[Axis]:
        """Return where a space lies in tensors that have a target, and that only it moves."""
        mine = set(self._tensors([name]))
        axes = [a for a in self.weights.axes(name) if a.tensor in mine]
        if len(moving) == 1:
            return axes
        return [a for a in axes if not {*self.weights.spaces_on(a.tensor, a.dim)} & {*moving}]

    def _solve(self, moving: Sequence[str], costs: Costs) -> None:
        """Solve some spaces; one of which nothing is known stays, or moves with its blocks."""
        known = self.weights.couplings
        plans = Plans(self.weights.problem, Assignment(), two_maps)
        plans.plans.update({key: c.project for key, c in known.items() if key[1] == self.k})
        costs = followed(self.weights.problem, moving, self.k, costs)
        for name in moving:
            if (name, self.k) in costs or len(moving) > 1 or (name, self.k) not in known:
                plans.solve(name, self.k, costs)
                self.weights.put(name, self.k, plans.couplings[name, self.k])


Start = Callable[[Ascent], None]


def in_place(ascent: Ascent) -> None:
    """Start with all units where they are, as Git Re-Basin and C2M3 do."""
    ascent.keep()


def forward(ascent: Ascent) -> None:
    """Start from one pass in network order, so that no match rests on one that is not made yet."""
    ascent.sweep()


def inner(a: np.ndarray, b: np.ndarray) -> float:
    """Return the inner product of two tensors, in double precision."""
    return float(np.einsum("i,i->", a.ravel(), b.ravel(), dtype=float))


def followed(problem: Problem, moving: Sequence[str], k: int, costs: Costs) -> Costs:
    """Return costs with zeros for the spaces inside blocks that move, where nothing is known."""
    unknown = [name for name in moving[1:] if (name, k) not in costs]
    zeros = {}
    for name in unknown:
        spaces = problem.spaces[name]
        zeros[name, k] = np.zeros((spaces[problem.base[name]].size, spaces[k].size))
    return {**costs, **zeros}


def members(problem: Problem, name: str) -> int:
    """Return how many units lie in each block of a space, 1 if it has none.

    The plans weigh a block's best inner match per unit; sums over units want it per block.
    """
    blocks = problem.spaces[name][problem.base[name]].blocks
    return 1 if blocks is None or not len(blocks) else int(np.bincount(blocks).max())


def families(network: Network) -> list[list[str]]:
    """Return spaces with those inside their blocks, outermost first, in network order."""
    root: dict[str, str] = {}
    for space in network.spaces:  # a space of blocks comes before the spaces inside
        root[space.name] = root.get(space.parent or "", space.name)
    rank = {name: i for i, name in enumerate(network_order(network))}
    found: dict[str, list[str]] = {}
    for name, outer in root.items():
        found.setdefault(outer, []).append(name)
    return sorted(found.values(), key=lambda family: min(rank[name] for name in family))


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


RowCost = Callable[[Products], np.ndarray]


@dataclass(frozen=True)
class WeightTransport(CouplingMethod):
    """Transport from each network's units to the base network's, compared by their weights.

    Forward in network order: a unit's vector is its row of every tensor that writes its space, the
    input side mapped by the couplings found before. Of a residual stream only the first writers
    have their input side mapped when it is reached, so later passes solve every space again with
    all of its writers; on a plain chain they change nothing.

    Attributes:
        ground_cost: Inner products of rows to the cost between units.
        scale_to_one: Scale units to unit norm first.
        solver: Ground cost and marginals to a transport plan.
        maps: Plan to project and unproject.
        folded: Compare weights with norms folded in.
        passes: How often to go through the network.
        view: Nothing is measured.

    References:
        Singh and Jaggi 2020 (OTFusion), its mode `wts`. Differences: biases and norms count.
    """

    ground_cost: RowCost = distance
    scale_to_one: bool = False
    solver: Solver = Exact()
    maps: Maps = two_maps
    folded: bool = False
    passes: int = 2
    view: View | None = None

    def __call__(self, problem: Problem, evidence: Evidence) -> Couplings:
        """Return the coupling of every space and network."""
        weights = Weights.of(problem, folded=self.folded)
        plans = Plans(problem, self.solver, self.maps, weights.couplings)
        left = set(plans.settle_given())
        order = families(problem.structure)
        for _ in counted(range(self.passes)):
            for family in counted(order):
                for k in sorted({k for name, k in left if name in family}):
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
        found: dict[tuple[str, int], np.ndarray] = {}
        for name in moving:
            axes = weights.axes(name)
            writers = [a for a in axes if not a.reads] or axes
            products = weights.products(name, k, writers)
            if products is not None:
                scaled = unit_norm(products) if self.scale_to_one else products
                found[name, k] = self.ground_cost(scaled)
            elif k == weights.reference(name):  # the base has no such units: share these out
                found[name, k] = weight_cost(weights, name, k)
        return found


@dataclass(frozen=True)
class WeightMatching(CouplingMethod):
    """Match each network to the base network so that their weights are most alike.

    The sum over all tensors of the inner product of the base's and the network's, all axes mapped,
    is raised space by space until no space raises it. Networks of equal width only.

    Attributes:
        start: Where to start from. Measured, `forward` ends nearer: `in_place`, as published, does
            not always find its way back even between a network and its permuted copy.
        seed: Of the order in which spaces are visited.
        sweeps: Limit of the sweeps over all spaces.
        folded: Compare weights with norms folded in; the raw ones are the paper's.
        view: Nothing is measured.

    References:
        Ainsworth et al. 2023 (Git Re-Basin), algorithm 1.
    """

    start: Start = forward
    seed: int = 0
    sweeps: int = 100
    folded: bool = False
    view: View | None = None

    def __call__(self, problem: Problem, evidence: Evidence) -> Couplings:
        """Return the coupling of every space and network.

        Raises:
            PairingError: If the networks differ in width.
        """
        require_equal_widths(problem, type(self).__name__)
        weights = Weights.of(problem, folded=self.folded)
        free = Plans(problem, Exact(), two_maps, weights.couplings).settle_given()
        settled = [problem.anchor]
        others = [k for k in range(len(weights.states)) if k != problem.anchor]
        for k in counted(others):
            targets = _of_the_first(weights, settled)
            ascent = Ascent(weights, k, targets, [name for name, i in free if i == k])
            self.start(ascent)
            ascent.run(self.sweeps, np.random.default_rng(self.seed))
            settled.append(k)
        return Couplings(problem, weights.couplings)


@dataclass(frozen=True)
class MergeMany(CouplingMethod):
    """Match each network in turn to the sum of all others, until none moves.

    No network stays where it is: the fused units are nobody's. Networks are taken in an order that
    depends on their weights and the seed, not on their place in the list; only networks of
    exactly equal norms, copies above all, keep the order of the list. Equal width only.

    Attributes:
        start: Where to start from, each network against those before it.
        seed: Of the order of networks and spaces.
        rounds: Limit of the rounds through all networks.
        sweeps: Limit of the sweeps over the spaces of one network.
        folded: Compare weights with norms folded in.
        view: Nothing is measured.

    References:
        Ainsworth et al. 2023 (Git Re-Basin), algorithm 3.
    """

    start: Start = forward
    seed: int = 0
    rounds: int = 100
    sweeps: int = 100
    folded: bool = False
    view: View | None = None

    def __call__(self, problem: Problem, evidence: Evidence) -> Couplings:
        """Return the coupling of every space and network.

        Raises:
            PairingError: If the networks differ in width.
        """
        require_equal_widths(problem, type(self).__name__)
        weights = Weights.of(problem, folded=self.folded)
        rng, free = np.random.default_rng(self.seed), spaces_to_join(weights)
        with part(0.0, 0.5):
            join(weights, free, self.start)
        with part(0.5, 1.0):
            merge_in_turn(weights, free, self.rounds, self.sweeps, rng)
        return Couplings(problem, weights.couplings)


def _of_the_first(weights: Weights, networks: Sequence[int]) -> dict[str, np.ndarray]:
    """Return every tensor, mapped, of the first network that has it."""
    found: dict[str, np.ndarray] = {}
    for k in networks:
        for tensor in weights.states[k]:
            if tensor not in found:
                found[tensor] = weights.carried(tensor, k)
    return found
