"""Couple units by optimal transport between what they compute on the data.

Couple layer by layer, as the published transport codes do: a plan for each layer's output.

`transport` gives the units of a residual stream one coupling. Here every contraction that writes
into the stream has a plan of its own, and what reads the stream takes the plan of the contraction
that wrote last; where two wrote side by side (a branch and the convolution of its shortcut), the
mean of theirs. What an identity skip carries past a layer is not made consistent with that layer's
plan: kept for the sake of the papers' figures. So is a plan for the network's outputs, which is the
identity where networks agree on their classes, and wrong where it is not.

References:
    Singh and Jaggi 2020 (OTFusion), Nguyen et al. (CLAFusion), with their codes' treatment of
    skips; Imfeld et al. 2024 (Transformer Fusion) call it the flow of transport maps.

Couple unit `i` of each network with unit `i` of the others: naive averaging.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import networkx as nx
import numpy as np
from scipy.sparse import csr_array, eye_array

from .._progress import counted, part
from ..calibration.moments import PairMoments, correlation
from ..errors import ArgumentError, PairingError
from ..ir import OUTPUTS, Coupling, Space
from ..solvers import Exact, Solver
from ..spaces.network import Network
from ._weights import Weights, weight_cost
from .measure import Measurements, View, points_of
from .mixing import Correspondence, Mixer
from .plans import Costs, Maps, Plans, two_maps, uniform

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

    def __call__(self, mixer: Mixer, measured: Measurements) -> None:
        """Fill in the coupling of every space and network."""
        plans = Plans(
            mixer.match, self.solver, self.maps, mixer.couplings, agreement=self.agreement
        )
        with part(0.0, 0.5):
            costs = ground_costs(mixer.match, measured, self.ground_cost)
        with part(0.5, 1.0):
            solve_all(mixer, plans, costs)


def ground_costs(
    match: Correspondence,
    measured: Measurements,
    ground_cost: GroundCost,
) -> Costs:
    """Return the cost between the base network's units and each other's; uses up the pairs."""
    costs: Costs = {}
    for name, i, k in counted(list(measured.pairs)):  # each may take gigabytes
        places = list(measured.pairs.pop((name, i, k)).values())
        if match.base[name] in (i, k) and i != k:
            forward = match.base[name] == i
            cost = ground_cost(places)
            costs[name, k if forward else i] = cost if forward else cost.T
    return costs


def solve_all(mixer: Mixer, plans: Plans, costs: Costs) -> None:
    """Couple what is not coupled yet, given its costs; what has none is compared by weights."""
    keys = plans.settle_given()
    late = _unseen(mixer.match, keys, costs)
    early = [key for key in keys if key not in late]
    share = len(early) / max(len(keys), 1)
    with part(0.0, share):
        for key in counted(early):
            plans.solve(*key, costs)
    weights = Weights.of(mixer)
    with part(share, 1.0):
        for k in counted(sorted({k for _, k in late})):
            own = [key for key in keys if key in late and key[1] == k]
            shown = [key for key in own if mixer.match.spaces[key[0]][0].axes]
            costs |= {key: weight_cost(weights, *key) for key in shown}
            for key in counted(own):
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


Flow = dict[str, Coupling]  # the contraction that wrote, and the maps of its output


Reach = dict[str, set[str]]


@dataclass(frozen=True)
class LayerByLayer(Transport):
    """Transport between the outputs of single layers rather than between spaces.

    Spaces inside blocks, and axes whose writers cannot be measured, take the space's coupling.
    Takes the attributes of `Transport`.
    """

    view: View = View(singly=True, outputs=True)

    def __call__(self, mixer: Mixer, measured: Measurements) -> None:
        """Fill in the coupling of every space, network and tensor axis."""
        base = mixer.balanced.networks[mixer.anchor]
        points, reach = points_of(base, self.view), _reach(base)
        with part(0.0, 0.5):
            for (name, i, k), places in counted(measured.pairs.items()):
                outputs = name == OUTPUTS
                if i != (mixer.anchor if outputs else mixer.match.base[name]):
                    continue
                if outputs or base.spaces[name].blocks is None:
                    maps = {node: self._maps(moments) for node, moments in places.items()}
                    flow = {w: maps[point] for w, point in points.items() if point in maps}
                    if outputs:
                        _map_outputs(mixer, base, k, flow)
                    else:
                        _let_flow(mixer, base, base.spaces[name], k, flow, reach)
        for pair in [p for p in measured.pairs if p[0] == OUTPUTS]:
            del measured.pairs[pair]
        with part(0.5, 1.0):
            super().__call__(mixer, measured)

    def _maps(self, moments: PairMoments) -> Coupling:
        cost = self.ground_cost([moments])
        return Coupling(*self.maps(self.solver(cost, *uniform(cost))))


def _reach(network: Network) -> Reach:
    """Return the nodes behind each contraction."""
    graph = nx.DiGraph()
    for node in network.module.graph.nodes:
        graph.add_edges_from((n.name, node.name) for n in node.all_input_nodes)
    return {n: nx.descendants(graph, n) for n in network.book.weights}


def _let_flow(mixer: Mixer, base: Network, space: Space, k: int, flow: Flow, reach: Reach) -> None:
    writers = _writers(base, space)
    touched = {t: n for n, names in base.book.tensors.items() for t in names}
    for axis in space.axes:
        node = touched.get(axis.tensor)
        last = [node] if node in writers and not axis.reads else _last(writers, node, reach)
        found = [flow[w] for w in last if w in flow]
        if found:
            mixer.layered[space.name, axis.tensor, axis.dim, k] = _mean(found)
    output = base.module.graph.output_node()
    found = [flow[w] for w in _last(writers, output.name, reach) if w in flow]
    for axis in space.features if found else ():
        if axis.tensor in {n.name for n in output.all_input_nodes}:  # a head may read it there
            mixer.layered[space.name, axis.tensor, axis.dim, k] = _mean(found)


def _map_outputs(mixer: Mixer, base: Network, k: int, flow: Flow) -> None:
    for node, coupling in flow.items():
        for tensor in base.book.tensors[node]:
            read = {axis.dim for _, axis in base.spaces.on(tensor)}
            mixer.layered[OUTPUTS, tensor, int(0 in read), k] = coupling


def _writers(network: Network, space: Space) -> set[str]:
    """Return the contractions that write a space."""
    written = {a.tensor for a in space.axes if not a.reads}
    return {n for n, weights in network.book.weights.items() if written & set(weights)}


def _last(writers: set[str], node: str | None, reach: Reach) -> list[str]:
    """Return the writers before a node that no other of them comes after."""
    before = [w for w in sorted(writers) if node in reach[w]]
    return [w for w in before if not reach[w].intersection(before)]


def _mean(couplings: Sequence[Coupling]) -> Coupling:
    count = len(couplings)
    project = csr_array(sum(c.project for c in couplings) / count)
    return Coupling(project, csr_array(sum(c.unproject for c in couplings) / count))


@dataclass(frozen=True)
class InPlace:
    """Leave every unit where it is: the baseline that knows nothing of permutations.

    With `MatchMoments(keep=True)` the result is the average of the weights, name by name. Nets of
    unequal depth are balanced first, as for any other method. Norms with running statistics are
    folded into the weights that are averaged, and measured anew on the result.

    Attributes:
        view: Nothing is measured.

    Raises:
        PairingError: If networks differ in width.

    Example:
        >>> import torch, fxfuse
        >>> from fxfuse.refit import MatchMoments
        >>> a, b = (torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU()) for _ in "ab")
        >>> naive = fxfuse.Method(coupling=InPlace(), refit=MatchMoments(keep=True))
        >>> fused = fxfuse.fuse([a, b], torch.randn(9, 4), method=naive)
        >>> torch.allclose(fused.get_submodule("0").weight, (a[0].weight + b[0].weight) / 2)
        True
    """

    view: View | None = None

    def __call__(self, mixer: Mixer, measured: Measurements) -> None:
        """Fill in the coupling of every space and network."""
        match = mixer.match
        for name, spaces in counted(match.spaces.items()):
            fused = spaces[match.base[name]].size
            for k, own in enumerate(spaces):
                if not match.present[name][k]:
                    shape = fused, own.size
                    maps = csr_array(shape), csr_array(shape[::-1])
                elif own.size == fused:
                    maps = csr_array(eye_array(fused)), csr_array(eye_array(fused))
                else:
                    raise _unequal(name, fused, own.size)
                mixer.couplings[name, k] = Coupling(*maps)


def _unequal(name: str, fused: int, own: int) -> PairingError:
    return PairingError(
        f"a space of {fused} and {own} units, to be averaged in place",
        where=f"space '{name}'",
        expected="equal widths, where unit i of one network is unit i of the other",
        do="couple the units by transport, or bring the networks to one width first",
    )
