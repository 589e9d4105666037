"""Match the units of one network to given tensors by coordinate ascent over its spaces.

The sum over tensors of the inner product of a target with the network's tensor, all axes mapped, is
raised space by space; a space inside blocks moves together with the blocks. Where a tensor has one
space on two axes, or two spaces of one family, the sum is not linear in what moves: the best move
of the linear part is proposed. Every move is kept only if the whole sum is greater after it.

References:
    Ainsworth et al. 2023 (Git Re-Basin), algorithm 1. Difference: blocks, and the check of moves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .correspondence import Correspondence
from .coupling import Costs, Plans, two_maps
from .errors import PairingError
from .ir import Axis
from .network import Network
from .progress import Tick, counted, rounds, silent
from .solvers import Assignment
from .weightwise import Weights, cross, unit_rows

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
        plans = Plans(self._match, Assignment(), two_maps)
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

    def run(self, sweeps: int, rng: np.random.Generator, tick: Tick = silent) -> bool:
        """Move spaces in random order until none improves; return whether any did."""
        moved, stale = False, set(range(len(self.families)))
        for step in rounds(sweeps, tick):
            for i in counted(rng.permutation(len(self.families)).tolist(), step):
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
        before = {name: self.weights.mixer.couplings[name, self.k] for name in moving}
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

    def _gains(self, moving: Sequence[str], settled: bool = False) -> Costs:
        """Return minus the inner products of targets and units, for each space that has any.

        Args:
            moving: The spaces; a tensor that two of them lie on does not count.
            settled: Only count tensors whose other axes are matched.
        """
        found: Costs = {}
        for name in moving:
            parts = [
                cross(unit_rows(self.targets[a.tensor], a), self.weights.rows(name, a, self.k))
                for a in self._counted(name, moving)
                if not settled or self.weights.settled(a, self.k)
            ]
            if parts:
                gains = sum(parts[1:], parts[0])
                found[name, self.k] = -gains * members(self._match, name)
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
        known = self.weights.mixer.couplings
        plans = Plans(self._match, Assignment(), two_maps)
        plans.plans.update({key: c.project for key, c in known.items() if key[1] == self.k})
        follow(self._match, moving, self.k, costs)
        for name in moving:
            if (name, self.k) in costs or len(moving) > 1 or (name, self.k) not in known:
                plans.solve(name, self.k, costs)
                self.weights.put(name, self.k, plans.couplings[name, self.k])

    @property
    def _match(self) -> Correspondence:
        return self.weights.mixer.match


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


def follow(match: Correspondence, moving: Sequence[str], k: int, costs: Costs) -> None:
    """Add zeros for the spaces inside blocks that move, where nothing else is known of them."""
    for name in moving[1:]:
        if (name, k) not in costs:
            shape = match.spaces[name][match.base[name]].size, match.spaces[name][k].size
            costs[name, k] = np.zeros(shape)


def members(match: Correspondence, name: str) -> int:
    """Return how many units lie in each block of a space, 1 if it has none.

    The plans weigh a block's best inner match per unit; sums over units want it per block.
    """
    blocks = match.spaces[name][match.base[name]].blocks
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
        for tensor in network.book.tensors.get(node.name, ()):
            for space, axis in network.spaces.on(tensor):
                if not axis.reads:
                    first.setdefault(space.name, i)
    names = [space.name for space in network.spaces]
    return sorted(names, key=lambda name: first.get(name, len(network.module.graph.nodes)))


def require_equal_widths(match: Correspondence, method: str) -> None:
    """Refuse networks of different width for a method that matches units one to one.

    Raises:
        PairingError: Naming the first space whose sizes differ.
    """
    for name, spaces in match.spaces.items():
        sizes = [s.size for s, here in zip(spaces, match.present[name]) if here]
        if len(set(sizes)) > 1:
            raise PairingError(
                f"units that cannot be matched one to one: {' and '.join(map(str, sizes))} of them",
                where=f"space '{name}', method {method}",
                expected="the same width in all networks",
                do="use Transport() or WeightTransport(), which share units out",
            )
