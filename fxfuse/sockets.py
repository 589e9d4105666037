"""Where a layer can be refitted: the contraction that settles the value before its activation."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, fx

from .checks import TOLERANCE
from .ir import Layer
from .network import Network
from .producer import Producer, read_producer
from .statistics import record


@dataclass(frozen=True, eq=False)
class Socket:
    """Where a layer can be refitted.

    Attributes:
        producer: The contraction.
        joint: The node whose value it settles: of a block the sum, else the producer's own.
        branch: Of a block, what is added to the skip there.
    """

    producer: Producer
    joint: str
    branch: str | None = None


def find_socket(network: Network, layer: Layer) -> Socket | str:
    """Return where a layer can be refitted, or why it cannot."""
    nodes = {n.name: n for n in network.module.graph.nodes}
    if not layer.branched:
        producer = read_producer(network, nodes[layer.merge])
        if producer is None:
            return f"'{layer.name}' is no single contraction"
        return Socket(producer, producer.joint)
    merge = nodes[layer.merge]
    parts = network.inputs_of(merge)
    found: list[tuple[int, int, Socket]] = []
    for part in parts if len(parts) == 2 else ():
        producer = _branch_end(network, part, layer)
        if producer is not None:
            depth = len(_upstream(part, layer) & set(layer.producers))
            found.append((depth, len(found), Socket(producer, layer.merge, part.name)))
    socket = max(found, key=lambda f: f[:2])[2] if found else None
    if socket is None or not _adds(network, merge, socket):
        return f"'{layer.name}' is no sum of a branch that ends in one contraction, and a skip"
    return socket


def tail_of(network: Network, layer: Layer, joint: str) -> list[fx.Node]:
    """Return what a layer does with the value at its joint."""
    nodes = {n.name: n for n in network.module.graph.nodes}
    behind = [nodes[n] for n in layer.nodes[layer.nodes.index(joint) + 1 :]]
    return [n for n in behind if not network.is_idle(n)]


def _branch_end(network: Network, node: fx.Node, layer: Layer) -> Producer | None:
    """Return the contraction whose value, normalised, is all that a branch hands on."""
    while network.is_idle(node) and len(node.users) == 1 and node.name in layer.nodes:
        node = network.inputs_of(node)[0]
    joint = node
    if node.name in network.book.norms:
        node = network.inputs_of(node)[0]
    inside = node.name in layer.nodes and len(joint.users) == len(node.users) == 1
    producer = read_producer(network, node) if inside else None
    return producer if producer is not None and producer.joint == joint.name else None


def _upstream(node: fx.Node, layer: Layer) -> set[str]:
    found, waiting = set(), [node]
    while waiting:
        node = waiting.pop()
        if node.name in layer.nodes and node.name not in found:
            found.add(node.name)
            waiting += node.all_input_nodes
    return found


def _adds(network: Network, merge: fx.Node, socket: Socket) -> bool:
    """Tell whether a block's value is the sum of branch and skip, on the network's example."""
    skip = next(n for n in network.inputs_of(merge) if n.name != socket.branch)
    names = [merge.name, socket.producer.joint, skip.name]
    values = record(network, network.example, dict.fromkeys(names, Tensor.double))
    whole, branch, skip = (values[n] for n in names)
    if not whole.shape == branch.shape == skip.shape:
        return False
    return bool((whole - branch - skip).abs().max() <= TOLERANCE * whole.abs().max())
