"""Take layers out of a network, so that something that stays can do their work.

How is a strategy: `Merging` into the next layer, or `Refitting` of a neighbour. Both are
approximate. Removals are done in order, each on what the network without the earlier ones computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import fx

from .errors import PassError
from .ir import Layer
from .network import Network
from .passes import graph_pass
from .producer import Producer, read_producer


@dataclass(frozen=True)
class Removal:
    """Neighbouring layers to be removed.

    Attributes:
        pieces: Runs of them that follow directly on each other; pooling may lie between two.
        before: The layer that stays in front of them, if there is one.
        behind: The layer that stays behind them, if there is one.
    """

    pieces: tuple[tuple[Layer, ...], ...]
    before: Layer | None
    behind: Layer | None

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
    found, before, pieces = [], None, []
    for layer in [*layers, None]:
        if layer is not None and layer.name in names:
            follows = pieces and pieces[-1][-1].nodes[-1] == layer.entry
            pieces = [*pieces[:-1], (*pieces[-1], layer)] if follows else [*pieces, (layer,)]
            continue
        if pieces:
            found.append(Removal(tuple(pieces), before, layer))
        before, pieces = layer, []
    return found


@graph_pass(keeps_function=False)
def remove(
    module: fx.GraphModule, network: Network, removals: Sequence[Removal], strategy: Strategy
) -> None:
    """Remove layers, in order.

    Args:
        module: A copy of the network's module, edited in place.
        network: The network, as it was.
        removals: What to remove.
        strategy: How: `Merging` or `Refitting`.

    Raises:
        PassError: If nothing can take the place of a layer.
    """
    for removal in removals:
        edit = Edit(network, replace(network, module=module))
        unread = {n for n in module.graph.nodes if not n.users}
        strategy(edit, removal)
        for node in reversed(module.graph.nodes):
            if not node.users and node not in unread and node.op != "placeholder":
                module.graph.erase_node(node)


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
        return next(n for n in self.now.module.graph.nodes if n.name == name)

    def bypass(self, removal: Removal) -> Callable[[], None]:
        """Let what reads removed layers read what they read; return what undoes it."""
        swaps = []
        for piece in removal.pieces:
            exit_node, entry = self.node(piece[-1].nodes[-1]), self.node(piece[0].entry)
            swaps += [(user, exit_node, entry) for user in list(exit_node.users)]
        for user, exit_node, entry in swaps:
            user.replace_input_with(exit_node, entry)

        def undo() -> None:
            for user, exit_node, entry in swaps:
                user.replace_input_with(entry, exit_node)

        return undo

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
