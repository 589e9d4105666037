"""Refit a layer next to removed ones by least squares to the values that the network had there."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, fx

from .composition import Affine
from .data import Calibration
from .errors import DataError
from .gates import line, line_through_zero
from .ir import Layer
from .least_squares import Refit
from .merging import Merging
from .network import Network
from .producer import Producer, read_producer, restate, write_producer
from .removal import Edit, Removal, refused
from .statistics import record
from .verify import TOLERANCE

FIT_BYTES, FIT_SAMPLES = 1 << 28, 128  # of the patches of one batch


@dataclass(frozen=True)
class Refitting:
    """Refits a host next to the removed layers to the values that the network had there.

    For plain layers that is the next one, which is to give its own pre-activation as before, or
    the one before, which is to give that of the last removed layer. For blocks it is the block
    before, the last contraction of whose branch is to add what was added by all of them together,
    or the block behind. Weights are drawn to what they were in a block, and to those of a merge
    through least-squares lines where that is possible.

    Attributes:
        data: What is fitted on.
        ridge: See `least_squares.NormalEquations.solve`.
    """

    data: Calibration
    ridge: float

    def __call__(self, edit: Edit, removal: Removal) -> None:
        """Refit; see `Strategy`.

        Raises:
            PassError: If there is no host.
        """
        ways, reasons = [self._behind, self._in_front], []
        for way in reversed(ways) if removal.last.branched else ways:
            reason = way(edit, removal)
            if not reason:
                return
            reasons.append(reason)
        do = "give an alignment in which they are matched, or balance by deepening"
        raise refused(edit, removal, reasons, do)

    def _in_front(self, edit: Edit, removal: Removal) -> str:
        """Let the layer before take the place of the last removed one; return why not."""
        layer, last = removal.before, removal.last
        first = removal.pieces[0][0]
        if layer is None or len(removal.pieces) > 1 or layer.nodes[-1] != first.entry:
            return "no layer directly before"
        socket = _socket(edit.before, layer)
        if isinstance(socket, str):
            return socket
        producer = edit.producer(last)
        target = producer.joint if producer else last.merge
        shapes = edit.before.book.shapes
        own, wanted = shapes[socket.joint], shapes[target]
        widths = socket.skip is not None or socket.producer.affine.groups > 1
        if (own if widths else _places(own, socket)) != (
            wanted if widths else _places(wanted, socket)
        ):
            return f"'{layer.name}' gives values of another shape"
        prior = None if socket.skip is None else socket.producer.affine
        reason = self._fit(edit, socket, target, prior)
        if not reason:
            edit.node(target).replace_all_uses_with(edit.node(socket.joint))
        return reason

    def _behind(self, edit: Edit, removal: Removal) -> str:
        """Let the layer behind give what it gave before, from what it reads now."""
        layer = removal.behind
        socket = "no layer behind" if layer is None else _socket(edit.before, layer)
        if isinstance(socket, str):
            return socket
        shapes = edit.before.book.shapes
        ends = [(shapes[p[0].entry], shapes[p[-1].nodes[-1]]) for p in removal.pieces]
        if layer.branched and any(a != b for a, b in ends):
            return f"'{layer.name}' is a block, and without them reads values of another shape"
        prior = socket.producer.affine
        if socket.skip is None:
            gate = line if socket.producer.biased else line_through_zero
            merged = Merging(gate, self.data).merged(edit, removal)
            prior = None if isinstance(merged, str) else merged[1]
        undo = edit.bypass(removal)
        reason = self._fit(edit, socket, socket.joint, prior)
        if reason:
            undo()
        return reason

    def _fit(self, edit: Edit, socket: Socket, target: str, prior: Affine | None) -> str:
        """Refit a host so that a node has the value that `target` had; return why not."""
        producer = socket.producer
        reads = edit.now.inputs_of(edit.node(producer.node))[0].name
        needed = list(dict.fromkeys([reads] + [socket.skip] * (socket.skip is not None)))
        try:
            x = record(edit.now, edit.now.example, [reads], lambda v: v)[reads]
        except DataError as error:
            return f"without them the network does not run ({error.met})"
        affine, shape = producer.affine, edit.before.book.shapes[target]
        if not _reads(affine, x, shape):
            return f"'{producer.node}' would read values of another shape"
        refit = Refit(affine)
        size = 8 * _elements(affine, x, shape)
        for batch in self.data.chunks(max(1, min(FIT_SAMPLES, FIT_BYTES // size))):
            wanted = record(edit.before, batch, [target], lambda v: v.double())[target]
            found = record(edit.now, batch, needed, lambda v: v)
            skip = 0.0 if socket.skip is None else found[socket.skip]
            refit.add(found[reads], wanted - skip)
        write_producer(edit.now, producer, refit.solve(self.ridge, prior, producer.biased))
        restate(edit.now, producer, self.data)
        return ""


@dataclass(frozen=True, eq=False)
class Socket:
    """Where a layer can be refitted.

    Attributes:
        producer: The contraction.
        joint: The node whose value it settles.
        skip: Of a block, the node that is added to the branch there.
    """

    producer: Producer
    joint: str
    skip: str | None = None


def _socket(network: Network, layer: Layer) -> Socket | str:
    """Return where a layer can be refitted, or why it cannot."""
    nodes = {n.name: n for n in network.module.graph.nodes}
    if not layer.branched:
        producer = read_producer(network, nodes[layer.merge])
        if producer is None:
            return f"'{layer.name}' is no single contraction"
        return Socket(producer, producer.joint)
    merge = nodes[layer.merge]
    parts = network.inputs_of(merge)
    found = []
    for part, other in (parts, parts[::-1]) if len(parts) == 2 else ():
        producer = _branch_end(network, part, layer)
        if producer is not None:
            depth = len(_upstream(part, layer) & set(layer.producers))
            found.append((depth, len(found), Socket(producer, layer.merge, other.name)))
    socket = max(found, key=lambda f: f[:2])[2] if found else None
    if socket is None or not _adds(network, merge, socket):
        return f"'{layer.name}' is no sum of a branch that ends in one contraction, and a skip"
    return socket


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
    names = [merge.name, socket.producer.joint, socket.skip]
    values = record(network, network.example, names, lambda v: v.double())
    whole, branch, skip = (values[n] for n in names)
    if not whole.shape == branch.shape == skip.shape:
        return False
    return bool((whole - branch - skip).abs().max() <= TOLERANCE * whole.abs().max())


def _places(shape: tuple[int, ...], socket: Socket) -> tuple[int, ...]:
    return shape[2:] if socket.producer.affine.kernel else shape[1:-1]


def _reads(affine: Affine, x: Tensor, shape: tuple[int, ...]) -> bool:
    """Tell whether a map's geometry leads from an input to an output of a shape."""
    if not affine.kernel:
        return x.shape[:-1] == shape[:-1]
    if x.dim() != affine.weight.dim() or affine.groups > 1 and x.shape[1] != affine.inputs:
        return False
    return affine.places(tuple(x.shape[2:])) == shape[2:]


def _elements(affine: Affine, x: Tensor, shape: tuple[int, ...]) -> int:
    """Return how many numbers the patches of one sample have."""
    if not affine.kernel:
        return math.prod(x.shape[1:])
    return math.prod(shape[2:]) * x.shape[1] * math.prod(affine.kernel)
