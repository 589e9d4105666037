"""Which unit of a network each unit of another of the same structure, but other widths, stands for.

Where there are more units there, some stand for the same one; where there are fewer, for the
strongest. Units inside a block (a group, a head) stand for units of the block that theirs stands
for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .balancing import Balanced
from .correspondence import correspond
from .errors import PairingError
from .folding import fold, folds
from .ir import Space
from .mixing import Mixer
from .network import Network

Pick = Callable[[np.ndarray, int], np.ndarray]


@dataclass(frozen=True, eq=False)
class Resize:
    """A network, one of other widths, and which unit of the first each unit there stands for.

    Attributes:
        mixer: The two as networks of one structure; the second is the anchor.
        stands: Space name -> `(units there,)` units here.
    """

    mixer: Mixer
    stands: dict[str, np.ndarray]

    @property
    def networks(self) -> tuple[Network, Network]:
        """The network, and the one whose widths are taken."""
        here, there = self.mixer.balanced.networks
        return here, there

    def sizes(self) -> dict[str, tuple[int, int]]:
        """Return the number of units of each space here and there."""
        spaces = self.mixer.match.spaces
        return {name: (own.size, there.size) for name, (own, there) in spaces.items()}


def resize(network: Network, like: Network, pick: Pick, weigh: bool = False) -> Resize:
    """Choose which unit of a network each unit of another of the same structure stands for.

    Args:
        network: The network.
        like: The network whose widths are wanted, equal to it node for node and name for name.
        pick: Scores of units and a number to that many of the units, in order.
        weigh: Score units by their weights; otherwise all are alike.

    Raises:
        PairingError: If units do not lie in the same places.
    """
    balanced = Balanced((network, like), ((), ()), (0.0, 0.0))
    match = correspond(balanced, 1)
    stands: dict[str, np.ndarray] = {}
    scores = strengths(network) if weigh else {}
    for name, (own, there) in match.spaces.items():
        if not own.size:
            raise _elsewhere(there)
        known = scores.get(own.name, np.zeros(own.size))
        stands[name] = _stands(own, there, stands.get(there.parent or ""), known, pick)
    return Resize(Mixer(balanced, 1, match, (1.0, 0.0)), stands)


def _stands(
    own: Space, there: Space, outer: np.ndarray | None, scores: np.ndarray, pick: Pick
) -> np.ndarray:
    if there.blocks is None and own.blocks is None:
        return pick(scores, there.size)
    if there.blocks is None or own.blocks is None:
        raise _elsewhere(there)
    counts = [int(blocks.max()) + 1 for blocks in (own.blocks, there.blocks)]
    if outer is None and counts[0] != counts[1]:
        raise _elsewhere(there)
    found = np.empty(there.size, dtype=int)
    for b in range(counts[1]):
        here = np.flatnonzero(there.blocks == b)
        units = np.flatnonzero(own.blocks == (b if outer is None else outer[b]))
        found[here] = units[pick(scores[units], len(here))]
    return found


def duplicates(seed: int | None) -> Pick:
    """Return a choice that takes each unit equally often, up to one.

    The first units stand for themselves; of the others each stands for one in turn, or, with a
    seed, for one in random order.
    """
    rng = None if seed is None else np.random.default_rng(seed)

    def pick(scores: np.ndarray, count: int) -> np.ndarray:
        rounds = range(-(-count // len(scores)))
        plain = np.arange(len(scores))
        turns = [rng.permutation(plain) if rng is not None and i else plain for i in rounds]
        return np.concatenate(turns)[:count]

    return pick


def strongest(scores: np.ndarray, count: int) -> np.ndarray:
    """Return the units of the highest scores in their order; all in turn if more are wanted."""
    if count >= len(scores):
        return np.arange(count) % len(scores)
    return np.sort(np.argsort(-scores, kind="stable")[:count])


def strengths(network: Network) -> dict[str, np.ndarray]:
    """Return the norm of what writes each unit, its norms folded in, per space."""
    state = fold(network, folds(network))
    contracted = {t for names in network.book.weights.values() for t in names}
    found = {}
    for space in network.spaces:
        total = np.zeros(space.size)
        for axis in space.axes:
            if not axis.reads and axis.tensor in contracted:
                rows = np.moveaxis(state[axis.tensor].astype(float), axis.dim, 0)
                squares = (rows.reshape(len(rows), -1) ** 2).sum(1)
                total += squares[axis.index].sum(1) / max(squares.sum(), 1e-30)
        found[space.name] = np.sqrt(total)
    for space in network.spaces:  # blocks without weights of their own are as strong as what is in
        for inner in network.spaces:
            within = inner.blocks if inner.parent == space.name else None
            if within is not None and not found[space.name].any():
                found[space.name] = np.bincount(within, found[inner.name] ** 2, space.size)
    return found


def _elsewhere(there: Space) -> PairingError:
    return PairingError(
        f"a space of {there.size} units that does not lie in the same places in both networks",
        where=f"space '{there.name}'",
        expected="networks of one structure that differ in width alone",
        do="compare print(fxfuse.find_spaces(...)) of both",
    )


def copies(plan: Resize, name: str) -> list[np.ndarray]:
    """Return, per block of the wanted space, how often each unit of the block here is taken."""
    own, there = plan.mixer.match.spaces[name]
    stands = plan.stands[name]
    if there.blocks is None or own.blocks is None:
        return [np.bincount(stands, minlength=own.size)]
    found = []
    for b in np.unique(there.blocks):
        taken = stands[there.blocks == b]
        units = np.flatnonzero(own.blocks == own.blocks[taken[0]])
        found.append(np.bincount(taken, minlength=own.size)[units])
    return found


def normed(network: Network) -> set[str]:
    """Return the spaces over whose units a norm takes moments."""
    nodes = {
        n.name
        for n in network.module.graph.nodes
        if network.rules(n) & {"layer_norm", "group_norm"}
    }
    return {s.name for s in network.spaces if any(f.tensor in nodes for f in s.features)}
