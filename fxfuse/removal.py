"""Take layers out of a network, so that something that stays can do their work.

How is a strategy: `Merging` into the next layer, or `Refitting` of a neighbour. Both are
approximate. Removals are done in order, each on what the network without the earlier ones computes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

from torch import fx

from .errors import PassError
from .ir import Layer
from .network import Network
from .passes import graph_pass
from .producer import Producer, read_producer
from .progress import Tick, counted, silent


@dataclass(frozen=True)
class Removal:
    """Neighbouring layers to be removed.

    Attributes:
        pieces: Runs of them that follow directly on each other; pooling may lie between two.
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
        return ", ".join(f"'{x.name}'" for piece in self.pieces for x in piece)


Strategy = Callable[["Edit", Removal], None]


def plan_removals(layers: Sequence[Layer], names: set[str]) -> list[Removal]:
    """Sort the layers to be removed into runs between layers that stay.

    Args:
        layers: All layers of a network, in order.
        names: Names of those to be removed.
    """
    found, i = [], 0
    while i < len(layers):
        gone = list(takewhile(lambda x: x.name in names, layers[i:]))
        kept = list(takewhile(lambda x: x.name not in names, layers[i + len(gone) :]))
        if gone:
            before = layers[i - 1] if i else None
            found.append(Removal(_pieces(gone), before, tuple(kept)))
        i += len(gone) + len(kept)
    return found


def _pieces(layers: Sequence[Layer]) -> tuple[tuple[Layer, ...], ...]:
    pieces: list[tuple[Layer, ...]] = []
    for layer in layers:
        follows = pieces and pieces[-1][-1].nodes[-1] == layer.entry
        pieces = [*pieces[:-1], (*pieces[-1], layer)] if follows else [*pieces, (layer,)]
    return tuple(pieces)


@graph_pass(keeps_function=False)
def remove(
    module: fx.GraphModule,
    network: Network,
    removals: Sequence[Removal],
    strategy: Strategy,
    tick: Tick = silent,
) -> None:
    """Remove layers, in order.

    Args:
        module: A copy of the network's module, edited in place.
        network: The network, as it was.
        removals: What to remove.
        strategy: How: `Merging` or `Refitting`.
        tick: Called with the share that is done.

    Raises:
        PassError: If nothing can take the place of a layer.
    """
    for removal in counted(removals, tick):
        strategy(Edit(network, replace(network, module=module)), removal)


@dataclass(frozen=True, eq=False)
class Edit:
    """A network as it was, and as it is while layers are being removed.

    Attributes:
        before: The network with all layers.
        now: The network under edit; what is known of its nodes is what they were.
    """

    before: Network
    now: Network

    def node(self, name: str) -> fx.Node:
        """Return a node of the network under edit."""
        found: fx.Node = next(n for n in self.now.module.graph.nodes if n.name == name)
        return found

    def bypass(self, removal: Removal) -> Callable[[], None]:
        """Let what reads removed layers read what they read; return what undoes it."""
        known = copy.deepcopy(self.now.module.graph)
        for piece in removal.pieces:
            self.replace(piece[-1].nodes[-1], piece[0].entry)

        def undo() -> None:
            self.now.module.graph = known

        return undo

    def replace(self, name: str, other: str) -> None:
        """Let what reads a node read another one, and drop what is then read no more."""
        module = self.now.module
        self.node(name).replace_all_uses_with(self.node(other))
        unread = {n.name for n in self.before.module.graph.nodes if not n.users}
        for node in reversed(module.graph.nodes):
            if not node.users and node.name not in unread and node.op != "placeholder":
                module.graph.erase_node(node)

    def producer(self, layer: Layer) -> Producer | None:
        """Return the contraction of a plain layer."""
        nodes = {n.name: n for n in self.before.module.graph.nodes}
        return None if layer.branched else read_producer(self.before, nodes[layer.merge])


def refused(edit: Edit, removal: Removal, reasons: Sequence[str], do: str) -> PassError:
    """Say that layers cannot be removed, why, and what to do."""
    return PassError(
        "layers that nothing can stand in for: " + "; ".join(reasons),
        where=f"{removal} of {edit.before.name}",
        expected="a plain layer or a block with a skip next to them, at the same resolution",
        do=do,
    )
