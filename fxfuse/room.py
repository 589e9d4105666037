"""Which units of a wider fused network get places of their own.

Networks that were trained apart are less alike the deeper one looks into them, and what an early
layer loses later ones can correct. So room does most near the outputs; early layers can be common.

References:
    Stoica et al. 2024 (ZipIt, "partial zipping"): networks are zipped up to a layer, and heads left
    apart. Difference: as much is left apart as a number of multiply-adds allows.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from math import prod
from statistics import fmean
from typing import Any

import torch
from torch import fx
from torch.utils.flop_counter import FlopCounterMode

from .network import Network
from .reshaping import shapes_at
from .tracing import Interpreter

Owner = tuple[int, int]  # a network and one of its units
Unlike = Mapping[str, Sequence[Owner]]  # by space: who could have a place, the least alike first
Room = Callable[[Network, float, Unlike], dict[str, Sequence[Owner]]]


def evenly(base: Network, width: float, unlike: Unlike) -> dict[str, Sequence[Owner]]:
    """Make every space as much wider, so that an architecture with a width can be met.

    Args:
        base: The network that is to be wider.
        width: How many times its units each space has room for.
        unlike: By space, the units that could have places of their own, the least alike first.

    Returns:
        Those that get one, by space.
    """
    return {
        name: owners[: round(min(base.spaces[name].size * (width - 1), len(owners)))]
        for name, owners in unlike.items()
    }


def deepest_first(base: Network, width: float, unlike: Unlike) -> dict[str, Sequence[Owner]]:
    """Give room to the deepest spaces first, of one network after the other.

    There is as much of it as keeps the network's multiply-adds within those it would have if it
    were made wider `evenly`, in all its spaces. A space is as deep as its values lie on average: a
    residual stream is half as deep as the last layer. One network that has all its units says more
    than two that have half, so that with the fewest comes first.

    Args:
        base: The network that is to be wider.
        width: How many times its units each space would have.
        unlike: By space, the units that could have places of their own, the least alike first.

    Returns:
        Those that get one, by space.
    """
    own = {space.name: space.size for space in base.spaces}
    depths = _depths(base)
    deepest = sorted(unlike, key=depths.__getitem__, reverse=True)
    needs = Counter(k for owners in unlike.values() for k, _ in owners)
    first_come = sorted(needs, key=lambda k: (needs[k], k))
    order = [
        (n, owner) for k in first_come for n in deepest for owner in unlike[n] if owner[0] == k
    ]
    most = max((1 + len(owners) / own[name] for name, owners in unlike.items()), default=1.0)
    work = _Work(base)
    limit = work.at(own | {name: round(own[name] * min(width, most)) for name in unlike})

    def first(count: int) -> dict[str, Sequence[Owner]]:
        found: dict[str, list[Owner]] = {name: [] for name in unlike}
        for name, owner in order[:count]:
            found[name].append(owner)
        return {name: tuple(owners) for name, owners in found.items()}

    def cost(count: int) -> float:
        return work.at(own | {n: own[n] + len(owners) for n, owners in first(count).items()})

    return first(bisect_right(range(len(order) + 1), limit, key=cost) - 1)


def _depths(base: Network) -> dict[str, float]:
    """Return where the values of each space lie on average, counted in nodes."""
    place = {node.name: i for i, node in enumerate(base.module.graph.nodes)}
    found = {
        s.name: [place[f.tensor] for f in s.features if f.tensor in place] for s in base.spaces
    }
    return {name: fmean(places) if places else 0.0 for name, places in found.items()}


class _Work:
    """The multiply-adds of a network by the numbers of its units."""

    def __init__(self, base: Network) -> None:
        self.base = base
        self.own = {space.name: space.size for space in base.spaces}
        counter = _Counter(base.module)
        with torch.no_grad():
            counter.run(*base.example)
        self.spent = counter.spent
        self.held = self._weights(self.own)

    def at(self, sizes: dict[str, int]) -> float:
        """Return what a run on the example costs at some sizes."""
        held = self._weights(sizes)
        return sum(c * held[n] / self.held[n] if n in held else c for n, c in self.spent.items())

    def _weights(self, sizes: dict[str, int]) -> dict[str, int]:
        """Return how many weights each node contracts with what it reads."""
        shapes, contracted = shapes_at(self.base, sizes), self.base.book.weights
        return {
            n: sum(prod(shapes[w]) for w in contracted[n]) for n in self.spent if n in contracted
        }


class _Counter(Interpreter):
    """Runs a network and counts the operations of every node."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.spent: dict[str, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        with FlopCounterMode(display=False) as counter:
            value = super().run_node(n)
        if counter.get_total_flops():
            self.spent[n.name] = counter.get_total_flops()
        return value
