"""Scale the two factors of a product, as queries and keys, like those of the anchor.

Queries four times smaller and keys four times larger give the same attention, but the mean of two
networks that are scaled so differently gives neither's. Networks as training leaves them differ
little in this, and stay as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace

import networkx as nx
import numpy as np
import torch

from ..errors import DataError
from ..graph.compare import TOLERANCE, relative_error
from ..graph.state import tensor_at
from ..graph.trace import run_once
from ..ir import Axis, Space
from ..spaces.network import Network
from .problem import Problem

UNLIKE = 2.0  # by how much the factors' sizes differ from the anchor's before anything is done

Part = tuple[str, int, int]  # a tensor, an axis of it, and which of the places of each unit there
Change = tuple[Axis, int, float]  # where, which of the places of each unit, and the factor


def factors_alike(problem: Problem) -> Problem:
    """Return the problem with products divided alike; the networks compute the same as before.

    Args:
        problem: Networks of one structure; not modified.
    """
    networks = list(problem.networks)
    for k in range(len(networks)):
        changes: list[Change] = []
        for name in problem.unread:
            base, own = (problem.spaces[name][i] for i in (problem.anchor, k))
            if k != problem.anchor and base.size and own.size:
                changes += _changes(problem.structure, base, problem.networks[k], own)
        networks[k] = _scaled(networks[k], changes) if changes else networks[k]
    same = all(a is b for a, b in zip(networks, problem.networks))
    return problem if same else replace(problem, networks=tuple(networks))


def _changes(structure: Network, base: Space, network: Network, own: Space) -> list[Change]:
    """Return by what the parts of a product are to be multiplied; nothing if they are alike."""
    sides = [_sides(structure, base), _sides(network, own)]
    if sides[0] != sides[1] or len(sides[0]) != 2:
        return []
    wanted, given = (
        [_size(n, s, side) for side in sides[0]] for n, s in ((structure, base), (network, own))
    )
    if not all((*wanted, *given)):
        return []
    unlike = (wanted[0] / wanted[1]) / (given[0] / given[1])
    if 1 / UNLIKE <= unlike <= UNLIKE:
        return []
    parts, factors = dict(_parts(own)), (unlike**0.5, unlike**-0.5)
    return [(parts[p], p[2], factor) for side, factor in zip(sides[0], factors) for p in side]


def _parts(space: Space) -> Iterator[tuple[Part, Axis]]:
    for axis in space.axes:
        yield from (((axis.tensor, axis.dim, m), axis) for m in range(axis.index.shape[1]))


def _sides(network: Network, space: Space) -> list[list[Part]]:
    """Return the parts of tensors that write each factor of a product, in order.

    Parts that one node uses in the same places are of one factor, and so are those whose node
    reads, unit by unit, what another part's node wrote: of these, only the last node's count, as a
    norm's do behind a layer whose size it takes away.
    """
    parts, shown = dict(_parts(space)), {a.tensor for a in space.features}
    sides: nx.Graph = nx.Graph()
    sides.add_nodes_from(parts)
    steps: nx.Graph = nx.Graph()
    for name, node in network.nodes.items():
        here = [part for part in parts if part[0] in network.tensors.get(name, ())]
        for part in here:
            alike = [p for p in here if np.array_equal(_places(parts, p), _places(parts, part))]
            sides.add_edges_from((part, other) for other in alike)
            if parts[part].index.shape[1] == 1:
                steps.add_edge(part, name)
        if name in shown:
            steps.add_edges_from((name, n.name) for n in node.all_input_nodes if n.name in shown)
    for linked in nx.connected_components(steps):
        among = [part for part in parts if part in linked]
        sides.add_edges_from(zip(among, among[1:]))
    last = {t: i for i, name in enumerate(network.nodes) for t in network.tensors.get(name, ())}
    whole = [sorted(side) for side in nx.connected_components(sides)]
    ends = [max(last.get(part[0], -1) for part in side) for side in whole]
    return sorted(
        [part for part in side if last.get(part[0], -1) == end] for side, end in zip(whole, ends)
    )


def _places(parts: dict[Part, Axis], part: Part) -> np.ndarray:
    places: np.ndarray = parts[part].index[:, part[2]]
    return places


def _size(network: Network, space: Space, side: list[Part]) -> float:
    """Return the size of the weights of one factor, as a geometric mean over the units."""
    parts, total = dict(_parts(space)), np.zeros(space.size)
    for part in side:
        tensor = tensor_at(network.module, part[0]).detach().double().cpu().numpy()
        rows = np.moveaxis(tensor, part[1], 0)[_places(parts, part)]
        total += np.square(rows).reshape(space.size, -1).sum(1)
    return float(np.exp(np.log(total[total > 0]).mean() / 2)) if total.any() else 0.0


def _scaled(network: Network, changes: list[Change]) -> Network:
    """Return a network with parts of tensors scaled; as it is if that would change what it does."""
    module = copy.deepcopy(network.module)
    for axis, place, factor in changes:
        tensor = tensor_at(module, axis.tensor)
        rows = torch.as_tensor(axis.index[:, place].copy(), device=tensor.device)
        with torch.no_grad():
            tensor.index_copy_(axis.dim, rows, tensor.index_select(axis.dim, rows) * factor)
    try:
        outputs = (run_once(m, network.example, network.name) for m in (network.module, module))
        error = relative_error(*outputs)
    except DataError:
        return network
    return replace(network, module=module) if error <= TOLERANCE else network
