"""Guests: networks of another structure, whose outputs and features are targets of the refit.

No weight of a guest goes into the fused network. Targets are its outputs, and its features at the
end of the last resolution that both networks have.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice, product

from torch import fx
from torch.utils._pytree import tree_leaves

from ..alignment.layers import partition
from ..ir import Layer
from ..spaces.network import Network


@dataclass(frozen=True, eq=False)
class Guest:
    """A network of another structure than the fused one.

    Attributes:
        network: The guest.
        share: What it counts, of 1 that all networks count together.
        places: By a node of the fused network, where the guest meets it: the guest's node, and the
            axis of its units there, to which a map has to be found. The axis is None if both are
            outputs, whose units are the same.
    """

    network: Network
    share: float
    places: dict[str, tuple[str, int | None]]


def guest_of(network: Network, host: Network, share: float) -> Guest:
    """Return a network as a guest of another, see `Guest`.

    They meet at the outputs, and where the last layers of the last resolution that both have end,
    whatever their depths. Targets in front of that made the one pair they were tried on worse.
    """
    places: dict[str, tuple[str, int | None]] = {}
    for ours, other in zip(_outputs(host), _outputs(network)):
        if host.shapes[ours] == network.shapes[other]:
            places[ours] = other, None
    pairs = product(_ends(host), _ends(network))
    same = ((here, there) for here, there in pairs if _sizes(host, here) == _sizes(network, there))
    for here, there in islice(same, 1):
        places[here.pre_activation] = there.pre_activation, there.layout[1]
    return Guest(network, share, places)


def _ends(network: Network) -> list[Layer]:
    """Return the last layer of each segment but the one that writes the outputs, the last first."""
    return [segment.layers[-1] for segment in reversed(partition(network)[:-1])]


def _sizes(network: Network, layer: Layer) -> tuple[int, ...]:
    """Return the shape of a layer's value, but for its units."""
    shape, axis = network.shapes[layer.pre_activation], layer.layout[1]
    return (*shape[:axis], *shape[axis + 1 :])


def _outputs(network: Network) -> list[str]:
    """Return the nodes that compute the outputs, not those that only hand them on."""
    found = []
    for node in tree_leaves(network.module.graph.output_node().args[0]):
        if isinstance(node, fx.Node):
            while network.hands_on(node):
                (node,) = network.inputs_of(node)
            found.append(node.name)
    return found
