"""Give a fused network more units than its anchor has, for the units that match worst.

Fusing takes means of matched units. A unit with a place of its own is not averaged: no other
network writes that place, and only its own network reads it. With places for all units the fused
network is the networks side by side, and its outputs are exactly the mean of theirs. A `Room` says
which units get places. Spaces over whose units a norm averages, groups and heads keep their width.

References:
    Stoica et al. 2024 (ZipIt, "partial zipping"): networks are zipped up to a layer, and apart from
    there. Difference: as much is left apart as a number of multiply-adds allows.
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

from ..coupling.mixing import Couplings
from ..coupling.plans import Costs
from ..coupling.problem import Problem
from ..depth.deepen import Balanced
from ..errors import ArgumentError, FuseError
from ..graph.trace import Interpreter
from ..ir import Coupling, Space
from ..spaces.network import OPEN, Network
from .reshape import change_most, reshaped, shapes_at, spaces_under_norms

Owner = tuple[int, int]  # a network, and one of its units in a space

Candidates = Mapping[str, Sequence[Owner]]  # by space, the units least like their matches first

# --- which units get places -------------------------------------------------------------------

Room = Callable[[Network, float, Candidates], dict[str, Sequence[Owner]]]


def evenly(base: Network, width: float, candidates: Candidates) -> dict[str, Sequence[Owner]]:
    """Make all spaces wider by one factor, as an architecture with a width is.

    Args:
        base: The network that is to be wider.
        width: What the number of units of each space may be multiplied by.
        candidates: By space, the units that could get places of their own, the least alike first.

    Returns:
        Those that get one, by space.
    """
    return {
        name: owners[: round(min(base.spaces[name].size * (width - 1), len(owners)))]
        for name, owners in candidates.items()
    }


def deepest_first(
    base: Network, width: float, candidates: Candidates
) -> dict[str, Sequence[Owner]]:
    """Give places in the deepest spaces first, and to one network after the other.

    Networks that were trained apart are less alike in deeper layers, and later layers can correct
    what early ones lose. A space is as deep as its values lie on average: a residual stream is half
    as deep as the last layer. One network with all its units says more than two with half of
    theirs; that with the fewest units comes first.

    There are as many places as keep the multiply-adds of the network within those that it would
    have if all its spaces were made wider `evenly`.

    Args:
        base: The network that is to be wider.
        width: What the number of units of each space would be multiplied by.
        candidates: By space, the units that could get places of their own, the least alike first.

    Returns:
        Those that get one, by space.
    """
    sizes = {space.name: space.size for space in base.spaces}
    depths = _depths(base)
    deepest = sorted(candidates, key=depths.__getitem__, reverse=True)
    needs = Counter(k for owners in candidates.values() for k, _ in owners)
    networks = sorted(needs, key=lambda k: (needs[k], k))
    order = [
        (name, owner)
        for k in networks
        for name in deepest
        for owner in candidates[name]
        if owner[0] == k
    ]
    most = max((1 + len(owners) / sizes[n] for n, owners in candidates.items()), default=1.0)
    work = MultiplyAdds(base)
    even = {name: sizes[name] + round(sizes[name] * (min(width, most) - 1)) for name in candidates}
    limit = work.at(sizes | even)

    def first(count: int) -> dict[str, Sequence[Owner]]:
        chosen: dict[str, list[Owner]] = {name: [] for name in candidates}
        for name, owner in order[:count]:
            chosen[name].append(owner)
        return {name: tuple(owners) for name, owners in chosen.items()}

    def cost(count: int) -> float:
        return work.at(sizes | {n: sizes[n] + len(owners) for n, owners in first(count).items()})

    return first(bisect_right(range(len(order) + 1), limit, key=cost) - 1)


def _depths(base: Network) -> dict[str, float]:
    """Return where the values of each space lie on average, counted in nodes."""
    position = {node.name: i for i, node in enumerate(base.module.graph.nodes)}
    positions = {
        space.name: [position[f.tensor] for f in space.features if f.tensor in position]
        for space in base.spaces
    }
    return {name: fmean(found) if found else 0.0 for name, found in positions.items()}


class MultiplyAdds:
    """The operations of a network by the numbers of its units, two for each multiply-add."""

    def __init__(self, base: Network) -> None:
        self.base = base
        counter = _Counter(base.module)
        with torch.no_grad():
            counter.run(*base.example)
        self.by_node = counter.by_node
        self.weights = self._weights({space.name: space.size for space in base.spaces})

    def at(self, sizes: dict[str, int]) -> float:
        """Return what a run on the example costs at some sizes."""
        weights = self._weights(sizes)
        return sum(
            count * weights[node] / self.weights[node] if node in weights else count
            for node, count in self.by_node.items()
        )

    def _weights(self, sizes: dict[str, int]) -> dict[str, int]:
        """Return how many weights each node contracts with its input."""
        shapes, contracted = shapes_at(self.base, sizes), self.base.weights
        return {
            node: sum(prod(shapes[name]) for name in contracted[node])
            for node in self.by_node
            if node in contracted
        }


class _Counter(Interpreter):
    """Runs a network and counts the operations of every node."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.by_node: dict[str, int] = {}

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Return a tensor without its gradient: the counter trips over views that require one."""
        value = super().get_attr(target, args, kwargs)
        return value.detach() if isinstance(value, torch.Tensor) else value

    def run_node(self, n: fx.Node) -> Any:
        with FlopCounterMode(display=False) as counter:
            value = super().run_node(n)
        if counter.get_total_flops():
            self.by_node[n.name] = counter.get_total_flops()
        return value


# --- a wider network --------------------------------------------------------------------------

MULTIPLES = (1, 2, 4, 8)  # of which numbers of new units are tried

LEAST = 1e-6  # share of a network in units that it has in common with others, at least


def require_width(width: float) -> None:
    """Refuse a width that a fused network cannot have.

    Args:
        width: Relative to the anchor's.

    Raises:
        ArgumentError: If it is below 1.
    """
    if not width >= 1:
        raise ArgumentError(
            f"width {width}",
            where="the argument `width`",
            expected="1, the anchor's, or more; float('inf') for the sum of all networks' widths",
            do="for a narrower network, fuse with `fxfuse.narrow(model, example)` as the anchor",
        )


def with_room(
    couplings: Couplings, width: float, costs: Costs, room: Room
) -> tuple[Couplings, dict[str, str]]:
    """Widen the fused network, and give places of their own to the units least like their matches.

    Args:
        couplings: The maps of the networks.
        width: Of the fused network, relative to its anchor's.
        costs: How unlike the units of the base and of the others are, where it was measured.
        room: Chooses the units that get places.

    Returns:
        The maps of a problem with one more network, of no weight, whose structure the fused one
        takes; and the spaces that keep their width, with the reason.

    Raises:
        ArgumentError: If the coupling treats every layer by itself.
    """
    if couplings.of_axes:
        raise ArgumentError(
            f"width {width} and a coupling that treats every layer by itself",
            where="the argument `width`",
            expected="a coupling that gives each space one pair of maps",
            do="use fxfuse.coupling.Transport(), or leave the width out",
        )
    problem = couplings.problem
    base = problem.structure
    fixed = fixed_spaces(base)
    free = [space.name for space in base.spaces if space.name not in fixed]
    chosen = room(base, width, {name: _candidates(couplings, name, costs) for name in free})
    host, kept = host_of(base, {name: len(owners) for name, owners in chosen.items()})
    wider = hosted(problem, host)
    maps = {}
    for name, spaces in wider.spaces.items():
        before, after = spaces[problem.anchor], spaces[wider.anchor]
        owners = chosen.get(before.name, ())[: after.size - before.size]
        for k in range(len(problem.networks)):
            maps[name, k] = _with_room(couplings.maps[before.name, k], k, owners)
        nothing = csr_array((after.size, after.size))
        maps[name, wider.anchor] = Coupling(nothing, nothing)
    return Couplings(wider, maps), fixed | kept


def hosted(problem: Problem, host: Network) -> Problem:
    """Return the problem with one more network, which gives the structure and has no weight."""
    # a network that counts in the outputs needs its own units, even if its weight is zero
    outputs = problem.output_weights
    weights = [max(w, LEAST) if out else w for w, out in zip(problem.weights, outputs)]
    networks, absent = (*problem.networks, host), (*problem.absent, ())
    balanced = Balanced(networks, absent, (0.0,) * len(networks))
    wider = Problem.of(balanced, len(problem.networks), (*weights, 0.0), problem.absent_as_zero)
    return replace(
        wider,
        lead=problem.lead,
        present={name: (*having[:-1], False) for name, having in wider.present.items()},
        output_weights=(*outputs, 0.0),
        guests=problem.guests,
    )


def fixed_spaces(base: Network) -> dict[str, str]:
    """Return the spaces that cannot have any number of units, each with the reason."""
    parents, under_norms = {s.parent for s in base.spaces}, spaces_under_norms(base)
    output = base.module.graph.output_node()
    handed_on = {n.name for n in output.all_input_nodes if OPEN in output.meta}
    reasons: dict[str, str] = {}
    for space in base.spaces:
        if space.blocks is not None or space.name in parents:
            reasons[space.name] = "groups and heads keep their width"
        elif space.name in under_norms:
            reasons[space.name] = "units that a norm averages over keep their number"
        elif any(a.groups not in (1, space.size) for a in space.axes):
            reasons[space.name] = "units of grouped convolutions keep their number"
        elif not any(a.reads for a in space.axes) and not any(
            f.tensor in handed_on for f in space.features
        ):
            reasons[space.name] = "no weight reads the units"
    return reasons


def _candidates(couplings: Couplings, name: str, costs: Costs) -> list[Owner]:
    """Return the units that could get places of their own, the least alike first."""
    problem = couplings.problem
    spaces, base = problem.spaces[name], problem.base[name]
    candidates: list[tuple[float, Owner]] = []
    for k, space in enumerate(spaces):
        if k == base or not problem.present[name][k] or not problem.output_weights[k]:
            continue
        cost = costs.get((name, k), np.zeros((spaces[base].size, space.size)))
        project = couplings.maps[name, k].project.toarray()
        mean = (project * cost).sum(0) / np.maximum(project.sum(0), 1e-12)
        candidates += [(-float(c), (k, unit)) for unit, c in enumerate(mean)]
    return [owner for _, owner in sorted(candidates)]


def host_of(base: Network, more: dict[str, int]) -> tuple[Network, dict[str, str]]:
    """Return a network of the anchor's structure with more units, and what could not have more.

    Not every number of units can be had where sizes come in equal parts. A space that cannot have
    as many as asked for gets as many as a multiple of 2, 4 or 8 allows.

    Args:
        base: The anchor.
        more: How many units each space is to gain.
    """
    old = {s.name: s.size for s in base.spaces}
    host, sizes, more = base, dict(old), dict(more)
    kept = dict.fromkeys((name for name, gained in more.items() if gained), "")

    def widened_by(names: set[str]) -> Network:
        return sized(base, sizes | {name: old[name] + more[name] for name in names})

    for multiple in MULTIPLES:
        more |= {name: more[name] - more[name] % multiple for name in kept}
        before = kept
        wider, kept = change_most([name for name in before if more[name]], widened_by)
        host = wider or host
        kept |= {name: why for name, why in before.items() if not more[name]}
        sizes |= {name: old[name] + more[name] for name in before if name not in kept}
    return host, kept


def sized(base: Network, sizes: dict[str, int]) -> Network:
    """Return a network of other widths, if its spaces come out as they should."""
    wide = Network.of(base.name, reshaped(base, sizes), base.example)
    for name, (new, old) in Problem.between(wide, base).spaces.items():
        if new.size != sizes[name]:
            raise _of_another_size(old, new.size, sizes[name])
    return wide


def _with_room(coupling: Coupling, k: int, apart: Sequence[Owner]) -> Coupling:
    """Return the maps of network `k` once some units have places of their own, behind the others.

    A unit with a place of its own no longer writes to its match. If the network's other units write
    there too, they are scaled up to give as much as before. Weights that read the unit read its new
    place.

    Args:
        coupling: The maps without the new places.
        k: The network.
        apart: The owners of the new places, in order.
    """
    if not apart:
        return coupling
    places = [place for place, (owner, _) in enumerate(apart) if owner == k]
    units = [unit for owner, unit in apart if owner == k]
    size, width = coupling.project.shape
    moved = np.zeros(width, dtype=bool)
    moved[units] = True
    project, unproject = coo_array(coupling.project), coo_array(coupling.unproject)
    stays = ~moved[project.col]
    left = csr_array(
        (project.data[stays], (project.row[stays], project.col[stays])), shape=(size, width)
    )
    before, after = coupling.given, np.asarray(left.sum(1)).ravel()
    scale = np.divide(before, after, out=np.zeros(size), where=after > 1e-12)
    written = csr_array((np.ones(len(units)), (places, units)), shape=(len(apart), width))
    reads = ~moved[unproject.row]
    rows = np.concatenate([unproject.row[reads], np.array(units, dtype=int)])
    columns = np.concatenate([unproject.col[reads], size + np.array(places, dtype=int)])
    data = np.concatenate([unproject.data[reads], np.ones(len(units))])
    return Coupling(
        csr_array(vstack([left.multiply(scale[:, None]), written])),
        csr_array((data, (rows, columns)), shape=(width, size + len(apart))),
        coupling.cost,
    )


def _of_another_size(space: Space, size: int, wanted: int) -> FuseError:
    return FuseError(
        f"a space that came out with {size} units",
        where=f"space '{space.name}'",
        expected=f"{wanted} units",
        do="leave its width as it is",
    )
