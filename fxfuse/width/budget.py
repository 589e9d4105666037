"""Which units of a wider fused network get places of their own.

Networks that were trained apart are less alike the deeper one looks into them, and what an early
layer loses later ones can correct. So room does most near the outputs; early layers can be common.

References:
    Stoica et al. 2024 (ZipIt, "partial zipping"): networks are zipped up to a layer, and heads left
    apart. Difference: as much is left apart as a number of multiply-adds allows.

Give the fused network more units than its anchor has, and keep the least alike ones apart.

A unit that is split off its match gets a place of its own, which no other network writes or is read
by: what a fusion loses by taking means, it does not lose there. With room for all of them the
fused network is the networks side by side, and its outputs are the mean of theirs exactly. Spaces
over whose units a norm takes moments, groups and heads keep their width.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import prod
from statistics import fmean
from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_array, csr_array, vstack
from torch import fx
from torch.utils.flop_counter import FlopCounterMode

from ..calibration.moments import correlation
from ..coupling.measure import Measurements
from ..coupling.mixing import Correspondence, Mixer, correspond
from ..coupling.transport import ground_costs
from ..depth.deepen import Balanced
from ..errors import ArgumentError, FuseError
from ..graph.trace import Interpreter
from ..ir import Coupling, Space
from ..spaces.network import Network
from .reshape import change_most, reshaped, shapes_at, spaces_under_norms

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


MULTIPLES = (1, 2, 4, 8)  # of which numbers of units are tried


LEAST = 1e-6  # share of a network in units that it has in common with others, at least


def require_width(width: float, apart: bool = False) -> None:
    """Refuse what is no width of a fused network.

    Args:
        width: Relative to the anchor's.
        apart: Whether the networks are of different tasks.

    Raises:
        ArgumentError: If it is below 1, or above it for networks of different tasks.
    """
    if apart and width > 1:
        raise ArgumentError(
            f"width {width} for networks of different tasks",
            where="the argument `width`",
            expected="1, as each network's head reads a trunk of the anchor's width",
            do="leave it out, or cut the networks earlier, heads.Separate(after=...)",
        )
    if not width >= 1:
        raise ArgumentError(
            f"width {width}",
            where="the argument `width`",
            expected="1, the anchor's, or more; float('inf') for the sum of all networks' widths",
            do="for a narrower network, fuse with `fxfuse.narrow(model, example)` as the anchor",
        )


def distances(mixer: Mixer, measured: Measurements) -> dict[tuple[str, int], np.ndarray]:
    """Return how unlike units are, `(units of the base, units)` by space and network.

    Args:
        mixer: The networks.
        measured: What was measured of them; not used up.
    """
    pairs = {key: found for key, found in measured.pairs.items() if key[0] in mixer.match.base}
    alone = Measurements(pairs, {})
    return ground_costs(mixer.match, alone, correlation)


def widened(
    mixer: Mixer, width: float, costs: Mapping[tuple[str, int], np.ndarray], room: Room
) -> tuple[Mixer, dict[str, str]]:
    """Widen the fused network and split off the units that are least like what they are matched to.

    Args:
        mixer: The networks and their maps.
        width: Of the fused network, relative to its anchor's.
        costs: How unlike units are, where that is known.
        room: Which spaces get how much of it.

    Returns:
        The networks with a last one of no weight, whose structure the fused one takes, and the
        spaces that keep their width, with the reason.

    Raises:
        ArgumentError: If the coupling treats every layer by itself.
    """
    if mixer.layered:
        raise ArgumentError(
            f"width {width} and a coupling that treats every layer by itself",
            where="the argument `width`",
            expected="a coupling that gives each space one pair of maps",
            do="use fxfuse.coupling.Transport(), or leave the width out",
        )
    base = mixer.balanced.networks[mixer.anchor]
    apart = room(base, width, {name: _unlike(mixer, name, costs) for name in _able(mixer)})
    host, kept = _host(base, {name: len(owners) for name, owners in apart.items()})
    old = mixer.balanced
    balanced = Balanced((*old.networks, host), (*old.absent, ()), (*old.errors, 0.0))
    last = len(old.networks)
    match = correspond(balanced, last)
    couplings = {}
    for name, spaces in match.spaces.items():
        own = spaces[mixer.anchor].name
        chosen = apart.get(own, ())[: spaces[last].size - spaces[mixer.anchor].size]
        for k in range(last):
            couplings[name, k] = _with_room(mixer.couplings[own, k], k, chosen)
        nothing = csr_array((spaces[last].size, spaces[last].size))
        couplings[name, last] = Coupling(nothing, nothing)
    outputs = mixer.output_weights  # who has a say there has one in its own units
    weights = [max(w, LEAST) if out else w for w, out in zip(mixer.weights, outputs)]
    found = replace(
        mixer,
        balanced=balanced,
        anchor=last,
        match=_without_last(match, mixer.match.lead),
        weights=(*weights, 0.0),
        couplings=couplings,
        ensemble=(*outputs, 0.0),
    )
    return found, kept


def _able(mixer: Mixer) -> list[str]:
    """Return the spaces that can have any number of units."""
    base = mixer.balanced.networks[mixer.anchor]
    outer, even = {s.parent for s in base.spaces}, spaces_under_norms(base)
    return [
        s.name
        for s in base.spaces
        if s.blocks is None
        and s.name not in outer | even
        and s.axes
        and all(a.groups == 1 or a.groups == s.size for a in s.axes)
        and any(a.reads for a in s.axes)
    ]


def _unlike(mixer: Mixer, name: str, costs: Mapping[tuple[str, int], np.ndarray]) -> list[Owner]:
    """Return the units that could have places of their own, the least alike first."""
    spaces, base = mixer.match.spaces[name], mixer.match.base[name]
    found: list[tuple[float, Owner]] = []
    for k, space in enumerate(spaces):
        if k == base or not mixer.match.present[name][k] or not mixer.output_weights[k]:
            continue
        cost = costs.get((name, k), np.zeros((spaces[base].size, space.size)))
        plan = mixer.couplings[name, k].project.toarray()
        mean = (plan * cost).sum(0) / np.maximum(plan.sum(0), 1e-12)
        found += [(-float(c), (k, unit)) for unit, c in enumerate(mean)]
    return [owner for _, owner in sorted(found)]


def _host(base: Network, more: dict[str, int]) -> tuple[Network, dict[str, str]]:
    """Return a network of the anchor's structure with more units, and what could not have more.

    Where sizes come in equal parts, not every number of units can be had: those that cannot be
    given as many as they should are given as many as a multiple of 2, 4 or 8 allows.
    """
    own = {s.name: s.size for s in base.spaces}
    host, sizes, more = base, dict(own), dict(more)
    kept = dict.fromkeys((name for name, extra in more.items() if extra), "")

    def widened_by(names: set[str]) -> Network:
        return _sized(base, sizes | {name: own[name] + more[name] for name in names})

    for step in MULTIPLES:
        more |= {name: more[name] - more[name] % step for name in kept}
        before = kept
        wider, kept = change_most([name for name in before if more[name]], widened_by)
        host = wider or host
        kept |= {name: why for name, why in before.items() if not more[name]}
        sizes |= {name: own[name] + more[name] for name in before if name not in kept}
    return host, kept


def _sized(base: Network, sizes: dict[str, int]) -> Network:
    """Return a network of other widths, if its spaces come out as they should."""
    wide = Network.of(base.name, reshaped(base, sizes), base.example)
    balanced = Balanced((base, wide), ((), ()), (0.0, 0.0))
    for name, (own, there) in correspond(balanced, 0).spaces.items():
        if there.size != sizes[name]:
            raise _elsewhere(own, there.size, sizes[name])
    return wide


def _with_room(coupling: Coupling, k: int, apart: Sequence[Owner]) -> Coupling:
    """Return the maps of network `k` once some units have places of their own, behind the others.

    What a unit that is split off wrote is left to the other networks' units there, and what read it
    reads its own place.
    """
    own = [(place, unit) for place, (owner, unit) in enumerate(apart) if owner == k]
    size, width = coupling.project.shape
    gone = np.zeros(width, dtype=bool)
    gone[[unit for _, unit in own]] = True
    project, unproject = coo_array(coupling.project), coo_array(coupling.unproject)
    stays = ~gone[project.col]
    left = csr_array(
        (project.data[stays], (project.row[stays], project.col[stays])), shape=(size, width)
    )
    before, after = coupling.given, np.asarray(left.sum(1)).ravel()
    scale = np.divide(before, after, out=np.zeros(size), where=after > 1e-12)
    places = [place for place, _ in own], [unit for _, unit in own]
    new = csr_array((np.ones(len(own)), places), shape=(len(apart), width))
    reads = ~gone[unproject.row]
    rows = np.concatenate([unproject.row[reads], np.array(places[1], dtype=int)])
    columns = np.concatenate([unproject.col[reads], size + np.array(places[0], dtype=int)])
    data = np.concatenate([unproject.data[reads], np.ones(len(own))])
    return Coupling(
        csr_array(vstack([left.multiply(scale[:, None]), new])),
        csr_array((data, (rows, columns)), shape=(width, size + len(apart))),
        coupling.cost,
    )


def _without_last(match: Correspondence, lead: int) -> Correspondence:
    """Let the last network have no say, only a structure."""
    present = {name: (*here[:-1], False) for name, here in match.present.items()}
    return replace(match, present=present, lead=lead)


def _elsewhere(space: Space, found: int, wanted: int) -> FuseError:
    return FuseError(
        f"a space that came out with {found} units",
        where=f"space '{space.name}'",
        expected=f"{wanted} units",
        do="leave its width as it is",
    )
