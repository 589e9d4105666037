"""Couple units by soft plans of single layers, which flow through the network and meet at sums.

What a layer writes takes the layer's own plan, from what it computes before anything is added. A
table of learnt vectors (of words, of positions) takes the plan between its own vectors; a few such
vectors (a class token, kinds of segments) take that of what they are joined to. At a sum, the plans
of its summands become one: what reads the sum, norms included, takes that one. Heads are matched as
wholes, queries and keys one to one; values are transported within matched heads.

References:
    Imfeld et al. 2024, Transformer fusion with optimal transport: standardised activations, the
    Sinkhorn solver, the flow of transport maps and its three ways at residual connections.
    Differences: plans, not maps, are joined, and two maps are made of them (`reading_map` is what
    their code does); queries and keys share a plan, as no other keeps their product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import csr_array, diags_array
from torch import fx

from .._progress import counted, part
from ..calibration.moments import PairMoments, moment_distance, pearson, varies
from ..graph.state import floats_of
from ..ir import Axis, Coupling
from ..solvers import Sinkhorn, Solver
from ..spaces.network import Network
from .measure import Evidence, View, points_of
from .mixing import Couplings
from .plans import Plans, coupled, plan_between
from .problem import Problem
from .transport import AxisMaps, GroundCost, GroundCosts, Transport, solve_all

Ways = Callable[[Sequence[np.ndarray]], list[np.ndarray]]

ROUNDING = 1e-5  # squared distance of standardised units that differ by rounding only
VECTORS = 8  # a table of fewer does not tell its units apart
TIE_BREAK = 1e-3  # weight of means where neither of two units varies


def standardised(places: Sequence[PairMoments]) -> np.ndarray:
    """Distance of two units' standardised values, relative to the largest one.

    With correlation `r`, the root of `2 - 2 r`, summed over places under the root.

    Returns:
        `(units of a, units of b)`.
    """
    total: np.ndarray | float = 0.0
    for m in places:
        a, b = varies(m.a)[:, None], varies(m.b)[None]
        square = a + 1.0 * b - 2.0 * pearson(m) + ~(a | b) * TIE_BREAK * moment_distance(m)
        total = total + np.where(square < ROUNDING, 0.0, square)
    costs: np.ndarray = np.sqrt(total)
    return costs / max(float(costs.max(initial=0.0)), 1e-30)


def averaged(sizes: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Count all summands equally; `sizes` are their mean absolute values, `(units,)` each."""
    return [np.full(len(size), 1.0 / len(sizes)) for size in sizes]


def weighted_scalar(sizes: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Count each summand by how large its values are on average."""
    means = [np.full(len(size), size.mean() if len(size) else 0.0) for size in sizes]
    return weighted_matrix(means)


def weighted_matrix(sizes: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Count each summand by how large its values are, unit by unit.

    Example:
        >>> [x.tolist() for x in weighted_matrix([np.array([1.0, 0.0]), np.array([3.0, 0.0])])]
        [[0.25, 0.5], [0.75, 0.5]]
    """
    total = np.sum(sizes, axis=0)
    equal = 1.0 / len(sizes)
    return [np.divide(s, total, out=np.full(len(s), equal), where=total > 0) for s in sizes]


@dataclass(frozen=True)
class TransportFlow(Transport):
    """Transport between single layers, by plans that flow through sums.

    Takes the attributes of `Transport`. `View(summands=True, tokens=Window(6))` compares units at
    some tokens only.

    Attributes:
        residual: How much each summand's plan counts behind a sum: `averaged`, `weighted_scalar` or
            `weighted_matrix`, or a function from the mean absolute values of the summands in the
            base network, `(units,)` each, to shares of the same shape, sum 1.
    """

    ground_cost: GroundCost = standardised
    solver: Solver = Sinkhorn(0.08, absolute=True)
    view: View = View(summands=True)
    residual: Ways = averaged

    def __call__(self, problem: Problem, evidence: Evidence) -> Couplings:
        """Return the coupling of every space, network and tensor axis."""
        plans = Plans(problem, self.solver, self.maps, agreement=self.agreement)
        costs = GroundCosts(problem, evidence, self.ground_cost)
        with part(0.0, 0.5):
            solve_all(plans, costs)
        of_axes: AxisMaps = {}
        keys = [key for key in costs if problem.structure.spaces[key[0]].blocks is None]
        with part(0.5, 1.0):
            for key in counted([key for key in keys if key[0] not in problem.unread]):
                flow = _Flow(self, problem, evidence, plans.plans[key], *key)
                of_axes |= dict(flow.of_axes())
        return Couplings(problem, plans.couplings, of_axes)


class _Flow:
    """The plans of one space and network, node by node.

    Args:
        method: How plans are made and joined.
        problem: The networks.
        evidence: What was measured of them.
        usual: The plan of the space as a whole, for layers that were not measured.
        name: The space.
        k: The network.
    """

    def __init__(
        self,
        method: TransportFlow,
        problem: Problem,
        evidence: Evidence,
        usual: csr_array,
        name: str,
        k: int,
    ) -> None:
        self.method, self.problem, self.evidence = method, problem, evidence
        self.name, self.k, self.usual = name, k, usual
        self.base, self.space = problem.base[name], problem.structure.spaces[name]
        self.network: Network = problem.structure
        self.features = {axis.tensor: axis for axis in problem.base_space(name).features}
        self.written = {axis.tensor for axis in self.space.axes if not axis.reads}
        self.plans: dict[str, csr_array] = {}
        own = self._of_layers()
        for node in self.network.module.graph.nodes:
            if node.name in own or node.name in self.features:
                plan = own[node.name] if node.name in own else self._at(node)
                if plan is not None:
                    self.plans[node.name] = plan

    def of_axes(self) -> Iterator[tuple[tuple[str, str, int, int], Coupling]]:
        """Yield the coupling of each axis that a plan reaches."""
        made: dict[int, Coupling] = {}
        plans = [(axis, self._of_axis(axis)) for axis in self.space.axes]
        plans += [(axis, self.plans.get(axis.tensor)) for axis in self.space.features]
        for axis, plan in plans:
            if plan is not None and plan is not self.usual:
                if id(plan) not in made:
                    made[id(plan)] = coupled(plan, self.method.maps)
                yield (self.name, axis.tensor, axis.dim, self.k), made[id(plan)]

    def _of_layers(self) -> dict[str, csr_array]:
        """Return the plan of each contraction that writes units of the space."""
        places = self.evidence.pairs.get((self.name, self.base, self.k), {})
        points = points_of(self.network, self.method.view)
        writers = [n for n, names in self.network.weights.items() if self.written & set(names)]
        return {n: self._solved(places[points[n]]) for n in writers if points[n] in places}

    def _solved(self, moments: PairMoments) -> csr_array:
        return plan_between(self.method.ground_cost([moments]), self.method.solver)

    def _at(self, node: fx.Node) -> csr_array | None:
        """Return the plan of what a node returns; None if nothing tells it."""
        if node.name in self.network.weights:
            return self.usual
        before = [n for n in node.all_input_nodes if n.name in self.plans]
        if not before:
            return self._of_table(node)
        plans = [self.plans[n.name] for n in before]
        if all(plan is plans[0] for plan in plans):
            return plans[0]
        if not self.network.adds(node):  # values side by side: most of them
            sizes = [math.prod(self.network.shapes.get(n.name, ())) for n in before]
            return plans[sizes.index(max(sizes))]
        shares = self.method.residual(self._sizes(before))
        return csr_array(sum(diags_array(s) @ plan for s, plan in zip(shares, plans)))

    def _sizes(self, nodes: Sequence[fx.Node]) -> list[np.ndarray]:
        """Return mean absolute values `(units,)` in the base network; equal if one is not known."""
        sizes = []
        for node in nodes:
            axis = self.features[node.name]
            of_networks = self.evidence.sizes.get((node.name, axis.dim))
            size = None if of_networks is None else of_networks[self.base]
            if size is None:
                return [np.ones(self.space.size)] * len(nodes)
            sizes.append(size[axis.index].mean(1))
        return sizes

    def _of_table(self, node: fx.Node) -> csr_array | None:
        """Return the plan between the vectors of a table; None if the node reads no table."""
        touched = [str(node.target)] if node.op == "get_attr" else []
        touched += self.network.tensors.get(node.name, [])
        for tensor in (t for t in touched if t in self.written):
            rows = [self._vectors(j, tensor) for j in (self.base, self.k)]
            if rows[0].shape[1] == rows[1].shape[1] >= VECTORS:
                moments = PairMoments()
                moments.add(*rows)
                return self._solved(moments)
        return None

    def _vectors(self, k: int, tensor: str) -> torch.Tensor:
        """Return a network's vectors `(units, vectors)`; none if other units lie along them."""
        network = self.problem.networks[k]
        axes = [axis for _, axis in network.spaces.on(tensor)]
        if len(axes) != 1 or tensor in self.problem.lacking[k]:
            return torch.empty(0, 0)
        moved = floats_of(network.module)[tensor].detach().movedim(axes[0].dim, 0)
        return moved[axes[0].index].flatten(1)

    def _of_axis(self, axis: Axis) -> csr_array | None:
        """Return the plan of an axis of a tensor; None where none reaches it."""
        nodes = [n for n in self.network.module.graph.nodes if self._touches(n, axis.tensor)]
        for node in nodes:
            before = [n.name for n in node.all_input_nodes if n.name in self.plans]
            if not axis.reads and node.name in self.plans:
                return self.plans[node.name]
            if axis.reads and before and node.name in self.network.weights:
                return self.plans[before[0]]
        return None

    def _touches(self, node: fx.Node, tensor: str) -> bool:
        of_table = node.op == "get_attr" and node.target == tensor
        return of_table or tensor in self.network.tensors.get(node.name, ())
