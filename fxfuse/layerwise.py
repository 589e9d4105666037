"""Couple layer by layer, as the published transport codes do: a plan for each layer's output.

`transport` gives the units of a residual stream one coupling. Here every contraction that writes
into the stream has a plan of its own, and what reads the stream takes the plan of the contraction
that wrote last; where two wrote side by side (a branch and the convolution of its shortcut), the
mean of theirs. What an identity skip carries past a layer is not made consistent with that layer's
plan: kept for the sake of the papers' figures. So is a plan for the network's outputs, which is the
identity where networks agree on their classes, and wrong where it is not.

References:
    Singh and Jaggi 2020 (OTFusion), Nguyen et al. (CLAFusion), with their codes' treatment of
    skips; Imfeld et al. 2024 (Transformer Fusion) call it the flow of transport maps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import networkx as nx
from scipy.sparse import csr_array

from .coupling import uniform
from .ir import OUTPUTS, Coupling, Space
from .measuring import Measurements, View, points_of
from .mixing import Mixer
from .moments import PairMoments
from .network import Network
from .progress import Tick, counted, part, silent
from .transport import Transport

Flow = dict[str, Coupling]  # the contraction that wrote, and the maps of its output
Reach = dict[str, set[str]]


@dataclass(frozen=True)
class LayerByLayer(Transport):
    """Transport between the outputs of single layers rather than between spaces.

    Spaces inside blocks, and axes whose writers cannot be measured, take the space's coupling.
    Takes the attributes of `Transport`.
    """

    view: View = View(singly=True, outputs=True)

    def __call__(self, mixer: Mixer, measured: Measurements, tick: Tick = silent) -> None:
        """Fill in the coupling of every space, network and tensor axis."""
        base = mixer.balanced.networks[mixer.anchor]
        points, reach = points_of(base, self.view), _reach(base)
        pairs = counted(measured.pairs.items(), part(tick, 0.0, 0.5))
        for (name, i, k), places in pairs:
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
        super().__call__(mixer, measured, part(tick, 0.5, 1.0))

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
