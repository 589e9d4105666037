"""Remove layers from a network, one run of neighbours after the other.

What takes over their work is a strategy: `MergeIntoNext` or `RefitNeighbour`. Both are approximate.
Each removal starts from what the network computes without the layers that were removed before.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import takewhile

from torch import fx

from .._progress import counted
from ..calibration.producers import Producer, read_producer
from ..errors import PassError
from ..graph.passes import graph_pass
from ..ir import Layer
from ..spaces.network import Network


@dataclass(frozen=True)
class Removal:
    """Neighbouring layers to be removed.

    Attributes:
        pieces: The layers, in runs that follow directly on each other; pooling may lie between two.
        before: The layer that stays in front of them, if there is one.
        following: The layers that stay behind them, up to the next removal, in order.
    """

    pieces: tuple[tuple[Layer, ...], ...]
    before: Layer | None
    following: tuple[Layer, ...]

    @property
    def behind(self) -> Layer | None:
        """The layer that stays behind them, if there is one."""
        return self.following[0] if self.following else None

    @property
    def last(self) -> Layer:
        """The last of the layers."""
        return self.pieces[-1][-1]

    def __str__(self) -> str:
        return ", ".join(f"'{layer.name}'" for piece in self.pieces for layer in piece)


Strategy = Callable[["WorkingCopy", Removal], None]


class Unsuitable(Exception):
    """Why a strategy cannot remove layers. It is caught inside this package."""


def plan_removals(layers: Sequence[Layer], names: set[str]) -> list[Removal]:
    """Group the layers to be removed into runs of neighbours.

    Args:
        layers: All layers of a network, in order.
        names: Names of those to be removed.
    """
    removals, i = [], 0
    while i < len(layers):
        removed = list(takewhile(lambda layer: layer.name in names, layers[i:]))
        staying = list(takewhile(lambda layer: layer.name not in names, layers[i + len(removed) :]))
        if removed:
            before = layers[i - 1] if i else None
            removals.append(Removal(_pieces(removed), before, tuple(staying)))
        i += len(removed) + len(staying)
    return removals


def _pieces(layers: Sequence[Layer]) -> tuple[tuple[Layer, ...], ...]:
    """Return layers in runs that follow directly on each other."""
    pieces: list[tuple[Layer, ...]] = []
    for layer in layers:
        follows = pieces and pieces[-1][-1].nodes[-1] == layer.entry
        pieces = [*pieces[:-1], (*pieces[-1], layer)] if follows else [*pieces, (layer,)]
    return tuple(pieces)


@graph_pass(keeps_function=False)
def remove_layers(
    module: fx.GraphModule,
    network: Network,
    removals: Sequence[Removal],
    strategy: Strategy,
) -> None:
    """Remove layers, in order.

    Args:
        module: A copy of the network's module, edited in place.
        network: The network, as it was.
        removals: What to remove.
        strategy: How.

    Raises:
        PassError: If nothing can take over the work of a layer.
    """
    for removal in counted(removals):
        strategy(WorkingCopy(network, replace(network, module=module)), removal)


@dataclass(frozen=True, eq=False)
class WorkingCopy:
    """A network, and a copy of it from which layers are being removed.

    Attributes:
        original: The network with all its layers.
        edited: The copy. Its facts about nodes (shapes, tensors) are those of the original.
    """

    original: Network
    edited: Network

    def node(self, name: str) -> fx.Node:
        """Return a node of the copy."""
        return self.edited.nodes[name]

    def producer(self, layer: Layer) -> Producer | None:
        """Return the contraction of a plain layer; None if it is a block or no single one."""
        merge = self.original.nodes[layer.merge]
        return None if layer.branched else read_producer(self.original, merge)

    def redirect(self, name: str, other: str) -> None:
        """Let the readers of a node read another one; erase nodes that nothing reads any more."""
        module = self.edited.module
        self.node(name).replace_all_uses_with(self.node(other))
        unread = {n.name for n in self.original.module.graph.nodes if not n.users}
        for node in reversed(module.graph.nodes):
            if not node.users and node.name not in unread and node.op != "placeholder":
                module.graph.erase_node(node)

    @contextmanager
    def without(self, removal: Removal) -> Iterator[None]:
        """Take layers out of the graph; put them back if `Unsuitable` is raised inside."""
        graph = copy.deepcopy(self.edited.module.graph)
        for piece in removal.pieces:
            self.redirect(piece[-1].nodes[-1], piece[0].entry)
        try:
            yield
        except Unsuitable:
            self.edited.module.graph = graph
            raise


def cannot_remove(network: Network, removal: Removal, reasons: Sequence[str], do: str) -> PassError:
    """Say that layers cannot be removed, why, and what to do."""
    return PassError(
        "layers whose work nothing can take over: " + "; ".join(reasons),
        where=f"{removal} of {network.name}",
        expected="a plain layer or a block with a skip next to them, at the same resolution",
        do=do,
    )
