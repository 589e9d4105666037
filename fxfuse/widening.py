"""Make room in a network for units that an inserted layer puts beside its stream.

A block that joins its output to what it read (a dense layer) lets the stream grow. To have such a
block and keep its function, a network reads the new units with zeros; everything behind the block
that works on the stream gets places for them.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, fx, nn

from .checks import sizes_of
from .interpreter import OPEN
from .network import Network

Place = tuple[str, int]  # a tensor or a node's output, and an axis of it


class Room:
    """Places for new units on the streams of one network that is being edited.

    Args:
        network: The network as it was analysed, before any edit.
    """

    def __init__(self, network: Network) -> None:
        self.network = network
        self._units = _units_by_place(network)
        self._added: dict[Place, list[tuple[int, int]]] = {}

    def width(self, node: str) -> int:
        """Return the present size of the stream behind a node."""
        place = self._stream(node)
        if place is None:
            shape = self.network.book.shapes[node]
            return shape[1 if len(shape) in (2, 4, 5) else -1]
        return len(self._units[place]) + sum(n for _, n in self._added.get(place, ()))

    def add(self, module: fx.GraphModule, node: str, count: int) -> bool:
        """Widen all that works on a node's stream behind it; tell whether there is such a stream.

        Contractions read the new units with zeros; norms treat them like an average unit.
        """
        place = self._stream(node)
        if place is None or (self._units[place] < 0).any():
            return False
        stream = self._units[place]
        if self._leaves(node, stream):
            return False
        self._added.setdefault(place, []).append((len(stream), count))
        for name in self._behind(node):
            for other in (p for p in self._units if p[0] == name):
                at = _find(self._units[other], stream)
                if at is None:
                    continue
                point, added = at + len(stream), self._added.setdefault(other, [])
                position = point + sum(n for p, n in added if p <= point)
                added.append((point, count))
                if name in self.network.book.features:
                    continue
                reads = any(a.reads for _, a in self.network.spaces.places[other])
                _widen(module, other, position, count, reads)
        return True

    def _leaves(self, node: str, stream: np.ndarray) -> bool:
        """Tell whether the network is cut at a value behind a node that holds the stream."""
        output = self.network.module.graph.output_node()
        sources = {n.name for n in output.all_input_nodes} & {node, *self._behind(node)}
        held = [units for place, units in self._units.items() if place[0] in sources]
        return OPEN in output.meta and any(_find(units, stream) is not None for units in held)

    def _stream(self, node: str) -> Place | None:
        return next((p for p in self._units if p[0] == node), None)

    def _behind(self, node: str) -> list[str]:
        """Return the nodes behind a node, and the parameters and buffers they touch."""
        nodes = {n.name: n for n in self.network.module.graph.nodes}
        found: dict[str, None] = {}
        waiting = [nodes[node]]
        while waiting:
            for user in waiting.pop().users:
                if user.name not in found:
                    found[user.name] = None
                    found |= dict.fromkeys(self.network.book.tensors.get(user.name, ()))
                    waiting.append(user)
        return list(found)


def _units_by_place(network: Network) -> dict[Place, np.ndarray]:
    """Return a number for the unit at each position of each axis, -1 where nothing can move."""
    sizes = dict(network.spaces.sizes)
    found: dict[Place, np.ndarray] = {}
    start = 0
    for space in network.spaces:
        for axis in (*space.features, *space.axes):
            place = axis.tensor, axis.dim
            if axis.groups == 1:
                size = sizes.get(place) or network.book.shapes[axis.tensor][axis.dim]
                numbers = np.repeat(start + np.arange(space.size), axis.index.shape[1])
                found.setdefault(place, np.full(size, -1))[axis.index.reshape(-1)] = numbers
        start += space.size
    return found


def _find(units: np.ndarray, run: np.ndarray) -> int | None:
    """Return where a run of units begins."""
    for at in np.flatnonzero(units[: len(units) - len(run) + 1] == run[0]):
        if np.array_equal(units[at : at + len(run)], run):
            return int(at)
    return None


def _widen(module: fx.GraphModule, place: Place, at: int, count: int, reads: bool) -> None:
    path, dim = place
    owner, _, leaf = path.rpartition(".")
    part = module.get_submodule(owner)
    tensor: Tensor = getattr(part, leaf)
    data = tensor.detach()
    head, tail = data.narrow(dim, 0, at), data.narrow(dim, at, data.shape[dim] - at)
    shape = [count if d == dim else n for d, n in enumerate(data.shape)]
    new = torch.zeros(shape, dtype=data.dtype, device=data.device)
    if not reads:
        new += data.mean(dim, keepdim=True)
    wide = torch.cat([head, new, tail], dim)
    setattr(part, leaf, nn.Parameter(wide) if isinstance(tensor, nn.Parameter) else wide)
    for name, size in sizes_of(part).items():
        setattr(part, name, size)
