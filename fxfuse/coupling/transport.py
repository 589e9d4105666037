"""Couple units by optimal transport between what they compute on the data, or leave them in place.

`Transport` gives every space one plan, a residual stream too. `LayerByLayer`, as the published
transport codes do, gives every contraction that writes into a stream a plan of its own. What reads
the stream takes the plan of the contraction that wrote last; where two wrote side by side (a branch
and the convolution of its shortcut), the mean of their plans. What an identity skip carries past a
layer then disagrees with that layer's plan. The network's outputs get a plan too, which is wrong
where networks disagree on their classes. Both are kept to reproduce the papers' figures. `InPlace`
couples unit `i` with unit `i`: naive averaging.

References:
    Singh and Jaggi 2020 (OTFusion), Nguyen et al. (CLAFusion), with their codes' treatment of
    skips; Imfeld et al. 2024 (Transformer Fusion) call it the flow of transport maps.
"""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import networkx as nx
import numpy as np
from scipy.sparse import csr_array

from .._progress import counted, part
from ..calibration.distance import scores_node
from ..calibration.moments import PairMoments, correlation
from ..errors import ArgumentError, PairingError
from ..ir import OUTPUTS, Coupling, Space
from ..solvers import Exact, Solver
from ..spaces.network import Network
from ._weights import Weights, weight_cost
from .measure import Evidence, Pair, View, points_of
from .mixing import Couplings
from .plans import Costs, CouplingMethod, Plans, ToMaps, two_maps, uniform
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
        agreement: Power of the agreement (see `plans.agreements`) that a network's weight in a
            fused unit is multiplied by: the less its unit agrees with the base network's, the less
            it counts, and the less what reads it in that network reads the fused unit. One whose
            layers are far wider has no share in units at all. With 0, every network counts fully
            in every unit.
        by_index: Where all networks agree with the base network unit by unit, by index, as those
            that were tuned from one checkpoint do, match them so, every network counting fully.
            `LeastSquares` then leaves the fused network at their mean.
    """

    ground_cost: GroundCost = correlation
    solver: Solver = Exact()
    maps: ToMaps = two_maps
    view: View = View()
    agreement: float = 0.0
    by_index: bool = False

    def __post_init__(self) -> None:
        """Refuse a power that is negative or infinite."""
        if not 0 <= self.agreement < math.inf:
            raise ArgumentError(
                f"agreement {self.agreement}",
                where="Transport(agreement=...)",
                expected="a finite power, 0 or more",
                do="use 0 to count every network fully, 4 for what the default method does",
            )

    def __call__(self, problem: Problem, evidence: Evidence) -> Couplings:
        """Return the coupling of every space and network."""
        plans = Plans(problem, self.solver, self.maps, agreement=self.agreement)
        solve_all(plans, GroundCosts(problem, evidence, self.ground_cost))
        siblings = self.by_index and plans.are_siblings()
        for key in plans.costs if siblings else ():
            plans.keep(*key)
        counted_in = without_far_wider(problem) if self.agreement else problem
        return Couplings(counted_in, plans.couplings, siblings=siblings)


def without_far_wider(problem: Problem) -> Problem:
    """Return the problem without a share in units for networks much wider than the anchor.

    The mean of many units is none of them. Such networks count in what the outputs should be. All
    keep their share if that is not class scores of one layer, which can be fitted to the mean by
    itself; if others than the anchor would be left; or if it lacks layers, which others define. If
    none would be left, the anchor is, whatever it counts.
    """
    shares = [0.0 if far else w for w, far in zip(problem.weights, problem.far_wider)]
    if not any(shares):
        shares[problem.anchor] = 1.0
    if not shares[problem.anchor] or shares == list(problem.weights):
        return problem
    if scores_node(problem.structure) is None or problem.absent[problem.anchor]:
        return problem
    return problem.weighted([w / sum(shares) for w in shares])


class GroundCosts(Mapping[tuple[str, int], np.ndarray]):
    """The costs between the base network's units and each other's, where these were measured.

    A cost is computed each time it is asked for: of wide networks each takes gigabytes.
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
        """Return how many spaces and networks were compared."""
        return len(self._pairs)

    def __contains__(self, key: object) -> bool:
        """Tell whether a space and network were compared, without computing their cost."""
        return key in self._pairs


def solve_all(plans: Plans, costs: Costs) -> None:
    """Couple what is not coupled yet by its costs; what has no costs, last, by its weights."""
    problem, keys = plans.problem, plans.settle_given()
    late = _without_costs(problem, keys, costs)
    early = [key for key in keys if key not in late]
    share = len(early) / max(len(keys), 1)
    with part(0.0, share):
        for key in counted(early):
            plans.solve(*key, costs)
    weights = Weights.of(problem, plans.couplings)
    with part(share, 1.0):
        for k in counted(sorted({k for _, k in late})):
            late_of_k = [key for key in keys if key in late and key[1] == k]
            on_axes = [key for key in late_of_k if problem.spaces[key[0]][0].axes]
            by_weights = {key: weight_cost(weights, *key) for key in on_axes}
            costs = ChainMap(by_weights, cast(MutableMapping[tuple[str, int], np.ndarray], costs))
            for key in counted(late_of_k):
                plans.solve(*key, costs)


def _without_costs(
    problem: Problem, keys: Sequence[tuple[str, int]], costs: Costs
) -> set[tuple[str, int]]:
    """Return the spaces without costs of their own, the spaces of their blocks, and all inside."""
    late: set[tuple[str, int]] = set()
    for k in {k for _, k in keys}:
        anchor_name = {s[k].name: name for name, s in problem.spaces.items()}
        outer = {s[k].parent for s in problem.spaces.values()}
        names = [name for name, network in keys if network == k]
        for name in names:
            space = problem.spaces[name][k]
            if (name, k) not in costs and space.name not in outer:
                late.add((name, k))
                if space.parent is not None:
                    late.add((anchor_name[space.parent], k))
        for name in names:
            parent = problem.spaces[name][k].parent
            if parent is not None and (anchor_name[parent], k) in late:
                late.add((name, k))
    return late


AxisMaps = dict[tuple[str, str, int, int], Coupling]  # see `Couplings.of_axes`
Flow = dict[str, Coupling]  # contraction -> the maps of its output
Reach = dict[str, set[str]]  # contraction -> all nodes behind it


@dataclass(frozen=True)
class LayerByLayer(Transport):
    """Transport between the outputs of single layers; takes the attributes of `Transport`.

    Spaces inside blocks, and axes whose writers cannot be measured, take the space's coupling.
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
    written = {a.tensor for a in space.axes if not a.reads}
    writers = {n for n, weights in base.weights.items() if written & set(weights)}
    node_of = {t: n for n, names in base.tensors.items() for t in names}
    for axis in space.axes:
        node = node_of.get(axis.tensor)
        last = [node] if node in writers and not axis.reads else _last(writers, node, reach)
        maps = [flow[w] for w in last if w in flow]
        if maps:
            of_axes[space.name, axis.tensor, axis.dim, k] = _mean(maps)
    output = base.module.graph.output_node()
    maps = [flow[w] for w in _last(writers, output.name, reach) if w in flow]
    for axis in space.features if maps else ():
        if axis.tensor in {n.name for n in output.all_input_nodes}:  # a head may read it there
            of_axes[space.name, axis.tensor, axis.dim, k] = _mean(maps)
    return of_axes


def _map_outputs(base: Network, k: int, flow: Flow) -> AxisMaps:
    """Return the map of the axes that the network's outputs lie along."""
    of_axes: AxisMaps = {}
    for node, coupling in flow.items():
        for tensor in base.tensors[node]:
            input_dims = {axis.dim for _, axis in base.spaces.on(tensor)}
            of_axes[OUTPUTS, tensor, int(0 in input_dims), k] = coupling
    return of_axes


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

    With `AsMixed()` the result is the average of the weights, name by name. Networks
    of unequal depth are balanced first, as for any other method. Norms with running statistics are
    folded into the weights that are averaged, and measured anew on the result.

    Raises:
        PairingError: If networks differ in width.

    Example:
        >>> import torch, fxfuse
        >>> from fxfuse.refit import AsMixed
        >>> a, b = (torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU()) for _ in "ab")
        >>> naive = fxfuse.Method(coupling=InPlace(), refit=AsMixed())
        >>> fused = fxfuse.fuse([a, b], torch.randn(9, 4), method=naive)
        >>> torch.allclose(fused.get_submodule("0").weight, (a[0].weight + b[0].weight) / 2)
        True
    """

    def __call__(self, problem: Problem, evidence: Evidence) -> Couplings:
        """Return the coupling of every space and network."""
        plans = Plans(problem, Exact(), two_maps)
        for name, k in counted(plans.settle_given()):
            sizes = problem.base_space(name).size, problem.spaces[name][k].size
            if sizes[0] != sizes[1]:
                raise PairingError(
                    f"a space of {sizes[0]} and {sizes[1]} units, to be averaged in place",
                    where=f"space '{name}'",
                    expected="equal widths, where unit i of one network is unit i of the other",
                    do="couple the units by transport, or bring the networks to one width first",
                )
            plans.keep(name, k)
        return Couplings(problem, plans.couplings)
