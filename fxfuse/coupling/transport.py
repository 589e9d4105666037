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
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

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
from .measure import Evidence, Pair, View, points_of
from .mixing import Couplings
from .plans import Costs, CouplingMethod, Maps, Plans, two_maps, uniform
from .problem import Problem

GroundCost = Callable[[Sequence[PairMoments]], np.ndarray]


@dataclass(frozen=True)
class Transport(CouplingMethod):
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

    def __call__(self, problem: Problem, evidence: Evidence) -> Couplings:
        """Return the coupling of every space and network."""
        plans = Plans(problem, self.solver, self.maps, agreement=self.agreement)
        solve_all(plans, GroundCosts(problem, evidence, self.ground_cost))
        return Couplings(problem, plans.couplings)


class GroundCosts(Mapping[tuple[str, int], np.ndarray]):
    """The cost between the base network's units and each other's, where these were measured.

    A cost is computed each time it is asked for: of wide networks each takes gigabytes.

    Args:
        problem: The spaces.
        evidence: What was measured of them.
        ground_cost: Moments of two spaces to the cost between their units.
    """

    def __init__(self, problem: Problem, evidence: Evidence, ground_cost: GroundCost) -> None:
        self._evidence, self._ground_cost = evidence, ground_cost
        self._pairs: dict[tuple[str, int], Pair] = {}
        for name, i, k in evidence.pairs:
            base = problem.base.get(name)  # outputs have none
            if base in (i, k) and i != k:
                self._pairs[name, k if base == i else i] = name, i, k

    def __getitem__(self, key: tuple[str, int]) -> np.ndarray:
        """Return the cost `(units of the base, units)` of a space and network."""
        pair = self._pairs[key]
        cost = self._ground_cost(list(self._evidence.pairs[pair].values()))
        return cost if pair[2] == key[1] else cost.T

    def __iter__(self) -> Iterator[tuple[str, int]]:
        """Iterate over the spaces and networks that were compared."""
        return iter(self._pairs)

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._pairs)

    def __contains__(self, key: object) -> bool:
        """Tell whether a space and network were compared, without computing their cost."""
        return key in self._pairs


def solve_all(plans: Plans, costs: Costs) -> None:
    """Couple what is not coupled yet, given its costs; what has none is compared by weights."""
    problem, keys = plans.problem, plans.settle_given()
    late = _unseen(problem, keys, costs)
    early = [key for key in keys if key not in late]
    share = len(early) / max(len(keys), 1)
    with part(0.0, share):
        for key in counted(early):
            plans.solve(*key, costs)
    weights = Weights.of(problem, plans.couplings)
    with part(share, 1.0):
        for k in counted(sorted({k for _, k in late})):
            own = [key for key in keys if key in late and key[1] == k]
            shown = [key for key in own if problem.spaces[key[0]][0].axes]
            by_weights = {key: weight_cost(weights, *key) for key in shown}
            costs = ChainMap(by_weights, cast(MutableMapping[tuple[str, int], np.ndarray], costs))
            for key in counted(own):
                plans.solve(*key, costs)


def _unseen(
    problem: Problem,
    keys: Sequence[tuple[str, int]],
    costs: Costs,
) -> set[tuple[str, int]]:
    """Return the spaces without a cost of their own, or around or beside such a one in blocks."""
    late: set[tuple[str, int]] = set()
    for k in {k for _, k in keys}:
        family = {s[k].name: name for name, s in problem.spaces.items()}
        outer = {s[k].parent for s in problem.spaces.values()}
        for name in (n for n, j in keys if j == k):
            space = problem.spaces[name][k]
            if (name, k) not in costs and space.name not in outer:
                late.add((name, k))
                if space.parent is not None:
                    late.add((family[space.parent], k))
        for name in (n for n, j in keys if j == k):
            parent = problem.spaces[name][k].parent
            if parent is not None and (family[parent], k) in late:
                late.add((name, k))
    return late


AxisMaps = dict[tuple[str, str, int, int], Coupling]  # see `Couplings.of_axes`
Flow = dict[str, Coupling]  # the contraction that wrote, and the maps of its output
Reach = dict[str, set[str]]


@dataclass(frozen=True)
class LayerByLayer(Transport):
    """Transport between the outputs of single layers rather than between spaces.

    Spaces inside blocks, and axes whose writers cannot be measured, take the space's coupling.
    Takes the attributes of `Transport`.
    """

    view: View = View(singly=True, outputs=True)

    def __call__(self, problem: Problem, evidence: Evidence) -> Couplings:
        """Return the coupling of every space, network and tensor axis."""
        with part(0.0, 0.5):
            of_axes = self._layer_by_layer(problem, evidence)
        with part(0.5, 1.0):
            return replace(super().__call__(problem, evidence), of_axes=of_axes)

    def _layer_by_layer(self, problem: Problem, evidence: Evidence) -> AxisMaps:
        """Return the maps of the axes that the outputs of single layers lie along."""
        base = problem.structure
        points, reach = points_of(base, self.view), _reach(base)
        of_axes: AxisMaps = {}
        for (name, i, k), places in counted(evidence.pairs.items()):
            outputs = name == OUTPUTS
            if i != (problem.anchor if outputs else problem.base[name]):
                continue
            if outputs or base.spaces[name].blocks is None:
                maps = {node: self._maps(moments) for node, moments in places.items()}
                flow = {w: maps[point] for w, point in points.items() if point in maps}
                if outputs:
                    of_axes |= _map_outputs(base, k, flow)
                else:
                    of_axes |= _let_flow(base, base.spaces[name], k, flow, reach)
        return of_axes

    def _maps(self, moments: PairMoments) -> Coupling:
        cost = self.ground_cost([moments])
        return Coupling(*self.maps(self.solver(cost, *uniform(cost))))


def _reach(network: Network) -> Reach:
    """Return the nodes behind each contraction."""
    graph = nx.DiGraph()
    for node in network.module.graph.nodes:
        graph.add_edges_from((n.name, node.name) for n in node.all_input_nodes)
    return {n: nx.descendants(graph, n) for n in network.weights}


def _let_flow(base: Network, space: Space, k: int, flow: Flow, reach: Reach) -> AxisMaps:
    """Return the map of each axis of a space: that of the contractions which wrote last."""
    of_axes: AxisMaps = {}
    writers = _writers(base, space)
    touched = {t: n for n, names in base.tensors.items() for t in names}
    for axis in space.axes:
        node = touched.get(axis.tensor)
        last = [node] if node in writers and not axis.reads else _last(writers, node, reach)
        found = [flow[w] for w in last if w in flow]
        if found:
            of_axes[space.name, axis.tensor, axis.dim, k] = _mean(found)
    output = base.module.graph.output_node()
    found = [flow[w] for w in _last(writers, output.name, reach) if w in flow]
    for axis in space.features if found else ():
        if axis.tensor in {n.name for n in output.all_input_nodes}:  # a head may read it there
            of_axes[space.name, axis.tensor, axis.dim, k] = _mean(found)
    return of_axes


def _map_outputs(base: Network, k: int, flow: Flow) -> AxisMaps:
    """Return the map of the axes that the network's outputs lie along."""
    of_axes: AxisMaps = {}
    for node, coupling in flow.items():
        for tensor in base.tensors[node]:
            read = {axis.dim for _, axis in base.spaces.on(tensor)}
            of_axes[OUTPUTS, tensor, int(0 in read), k] = coupling
    return of_axes


def _writers(network: Network, space: Space) -> set[str]:
    """Return the contractions that write a space."""
    written = {a.tensor for a in space.axes if not a.reads}
    return {n for n, weights in network.weights.items() if written & set(weights)}


def _last(writers: set[str], node: str | None, reach: Reach) -> list[str]:
    """Return the writers before a node that no other of them comes after."""
    before = [w for w in sorted(writers) if node in reach[w]]
    return [w for w in before if not reach[w].intersection(before)]


def _mean(couplings: Sequence[Coupling]) -> Coupling:
    count = len(couplings)
    project = csr_array(sum(c.project for c in couplings) / count)
    return Coupling(project, csr_array(sum(c.unproject for c in couplings) / count))


@dataclass(frozen=True)
class InPlace(CouplingMethod):
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

    def __call__(self, problem: Problem, evidence: Evidence) -> Couplings:
        """Return the coupling of every space and network.

        Raises:
            PairingError: If the networks differ in width.
        """
        maps: dict[tuple[str, int], Coupling] = {}
        for name, spaces in counted(problem.spaces.items()):
            fused = spaces[problem.base[name]].size
            for k, space in enumerate(spaces):
                if not problem.present[name][k]:
                    shape = fused, space.size
                    maps[name, k] = Coupling(csr_array(shape), csr_array(shape[::-1]))
                elif space.size == fused:
                    same = csr_array(eye_array(fused))
                    maps[name, k] = Coupling(same, same.copy())
                else:
                    raise _unequal(name, fused, space.size)
        return Couplings(problem, maps)


def _unequal(name: str, fused: int, own: int) -> PairingError:
    return PairingError(
        f"a space of {fused} and {own} units, to be averaged in place",
        where=f"space '{name}'",
        expected="equal widths, where unit i of one network is unit i of the other",
        do="couple the units by transport, or bring the networks to one width first",
    )
