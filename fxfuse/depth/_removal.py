"""Take layers out of a network, so that something that stays can do their work.

How is a strategy: `Merging` into the next layer, or `Refitting` of a neighbour. Both are
approximate. Removals are done in order, each on what the network without the earlier ones computes.

Where a layer can be refitted: the contraction that settles the value before its activation.

Merge plain layers into the next one, with straight lines in place of their activations.

References:
    Nguyen et al. (CLAFusion), section 3.2. Differences: biases and norms are composed too, and
    convolutions where the composite kernel is no larger than the next layer's.

Refit layers next to removed ones by least squares to the values that the network had there.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

import torch
from torch import Tensor, fx

from .._progress import counted
from ..alignment.layers import describe
from ..calibration.affine import Affine, Producer, compose, read_producer, restate, write_producer
from ..calibration.data import Calibration
from ..calibration.least_squares import Refit
from ..calibration.run import batch_size, record
from ..errors import DataError, PassError
from ..graph.passes import graph_pass
from ..graph.verify import TOLERANCE
from ..ir import Layer
from ..spaces.network import Network
from ._neutral import apply_activation
from .gates import Gate, Responses, line, line_through_zero


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
    for removal in counted(removals):
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


BATCH_BYTES, BATCH_SAMPLES = 1 << 26, 256


@dataclass(frozen=True)
class Merging:
    """Merges plain layers into the next one through straight lines.

    Attributes:
        gate: From what was measured of units to their slopes and offsets.
        data: What they are measured on, in the network as it was.
    """

    gate: Gate
    data: Calibration

    def __call__(self, edit: Edit, removal: Removal) -> None:
        """Merge; see `Strategy`.

        Raises:
            PassError: If a layer is not plain, or the composite does not fit.
        """
        found = self.merged(edit, removal)
        if isinstance(found, str):
            do = "choose least squares: Shorten() without a gate"
            raise refused(edit, removal, [found], do)
        host, affine = found
        edit.bypass(removal)
        write_producer(edit.now, host, affine)
        restate(edit.now, host, self.data)

    def merged(self, edit: Edit, removal: Removal) -> tuple[Producer, Affine] | str:
        """Return the layer behind and the map it computes with the others merged, or why not."""
        behind, piece = removal.behind, removal.pieces[0]
        branched = [x.name for x in (*piece, behind) if x is not None and x.branched]
        if branched:
            return f"'{branched[0]}' is a block, which cannot be merged"
        if len(removal.pieces) > 1 or behind is None or behind.entry != removal.last.nodes[-1]:
            return "steps such as pooling or flattening lie between them and the next layer"
        total: Affine | None = None
        for layer in (*piece, behind):
            producer = edit.producer(layer)
            if producer is None:
                return f"'{layer.name}' is no single contraction, so it cannot be merged"
            affine = producer.affine if layer is behind else self._straight(edit, layer, producer)
            if affine is None:
                return f"'{layer.name}' does more than contract, normalise and activate"
            total = affine if total is None else compose(total, affine)
        assert producer is not None and total is not None, "there is the layer behind at least"
        if _geometry(total) != _geometry(producer.affine):
            return f"merged they need {_say(total)}; '{behind.name}' has {_say(producer.affine)}"
        return producer, total

    def _straight(self, edit: Edit, layer: Layer, producer: Producer) -> Affine | None:
        """Return a layer as a map, its activation replaced by a line; None if it has more."""
        network = edit.before
        nodes = {n.name: n for n in network.module.graph.nodes}
        tail = layer.nodes[layer.nodes.index(producer.joint) + 1 :]
        acts = [nodes[n] for n in tail if not network.is_idle(nodes[n])]
        if len(acts) > 1 or not all(network.is_activation(n) for n in acts):
            return None
        if not acts:
            return producer.affine
        return producer.affine.scaled(*self._line(network, layer, producer, acts[0]))

    def _line(
        self, network: Network, layer: Layer, producer: Producer, act: fx.Node
    ) -> tuple[Tensor, Tensor]:
        far = producer.affine.weight.new_tensor([-60.0, 60.0])
        kept = apply_activation(network, act, far)
        rectifies = bool((kept - far.clamp(min=0)).abs().max() < 1e-6)
        units, axis = Responses(layer.name, rectifies), producer.axis
        for batch in self.data.chunks(batch_size([network], BATCH_BYTES, BATCH_SAMPLES)):
            values = record(network, batch, dict.fromkeys([producer.joint, act.name], lambda v: v))
            flat = [values[n].movedim(axis, 0).flatten(1) for n in (producer.joint, act.name)]
            units.add(*flat)
        return self.gate(units)


def _geometry(affine: Affine) -> tuple[object, ...]:
    return affine.kernel, affine.stride, affine.padding, affine.dilation, affine.groups


def _say(affine: Affine) -> str:
    kernel = "x".join(map(str, affine.kernel))
    return f"a kernel of {kernel} in {affine.groups} groups, stride {affine.stride}"


FIT_BYTES, FIT_SAMPLES = 1 << 28, 128  # of the patches of one batch


LARGEST = 1 << 13  # inputs of a contraction that is refitted only to make up for others


@dataclass(frozen=True)
class Refitting:
    """Refits a host next to the removed layers to the values that the network had there.

    For plain layers that is the next one, which is to give its own pre-activation as before, or
    the one before, which is to give that of the last removed layer. For blocks it is the block
    before, whose branch is to add what it and the removed ones added together, or the one behind.
    Weights are drawn to what they were in a block, and to those of a merge through straight lines
    where that is possible.

    Attributes:
        data: What is fitted on.
        ridge: See `least_squares.NormalEquations.solve`.
        rounds: How often to fit again where activations make the same of different values, to
            what is then nearest; 0 to fit once to the values themselves.
        reach: How many of the layers that follow are refitted to what they gave, to make up for
            what is still missing.
    """

    data: Calibration
    ridge: float = 1e-3
    rounds: int = 1
    reach: int = 4

    def __call__(self, edit: Edit, removal: Removal) -> None:
        """Refit; see `Strategy`.

        Raises:
            PassError: If there is no host.
        """
        ways, reasons = [self._behind, self._in_front], []
        for way in reversed(ways) if removal.last.branched else ways:
            reason = way(edit, removal)
            if not reason:
                fresh = removal.following[way == self._behind :]
                for layer in fresh[: self.reach]:
                    self._correct(edit, layer)
                return
            reasons.append(reason)
        do = "give an alignment in which they are matched, or balance by deepening"
        raise refused(edit, removal, reasons, do)

    def _in_front(self, edit: Edit, removal: Removal) -> str:
        """Let the layer before take the place of the last removed one; return why not."""
        layer, last = removal.before, removal.last
        if layer is None or len(removal.pieces) > 1:
            return "no layer directly before"
        socket = find_socket(edit.before, layer)
        if isinstance(socket, str):
            return socket
        producer = edit.producer(last)
        target = producer.joint if producer else last.merge
        reason = self._no_stand_in(edit, removal, layer, socket, target)
        prior = None if socket.branch is None else socket.producer.affine
        act = _activation(edit.before, last, target)
        reason = reason or self._fit(edit, socket, target, act, prior)
        if not reason:
            own = any(
                n.name in edit.before.book.tensors for n in tail_of(edit.before, last, target)
            )
            ends = (target, socket.joint) if own else (last.nodes[-1], layer.nodes[-1])
            edit.replace(*ends)  # of a norm behind the sum, the last layer's own stays
        return reason

    def _no_stand_in(
        self, edit: Edit, removal: Removal, layer: Layer, socket: Socket, target: str
    ) -> str:
        """Return why the value at a layer's socket cannot stand in for one of the last layer."""
        network = edit.before
        if layer.nodes[-1] != removal.pieces[0][0].entry:
            return f"steps such as pooling lie behind '{layer.name}'"
        ends = (layer, socket.joint), (removal.last, target)
        tails = [[describe(network, n) for n in tail_of(network, *end)] for end in ends]
        if tails[0] != tails[1]:
            return f"'{layer.name}' has another activation"
        own, wanted = network.book.shapes[socket.joint], network.book.shapes[target]
        if socket.branch is None and socket.producer.affine.groups == 1:  # its width may change
            axis = socket.producer.axis % len(own)
            own, wanted = (s[:axis] + s[axis + 1 :] for s in (own, wanted))
        return "" if own == wanted else f"'{layer.name}' gives values of another shape"

    def _correct(self, edit: Edit, layer: Layer) -> None:
        """Let a layer make up for what the ones before it could not do, if it can."""
        socket = find_socket(edit.before, layer)
        if isinstance(socket, Socket) and socket.producer.affine.weight[0].numel() <= LARGEST:
            act = _activation(edit.before, layer, socket.joint)
            self._fit(edit, socket, socket.joint, act, socket.producer.affine)

    def _behind(self, edit: Edit, removal: Removal) -> str:
        """Let the layer behind give what it gave before, from what it reads now."""
        layer = removal.behind
        if layer is None:
            return "no layer behind"
        socket = find_socket(edit.before, layer)
        if isinstance(socket, str):
            return socket
        shapes = edit.before.book.shapes
        ends = [(shapes[p[0].entry], shapes[p[-1].nodes[-1]]) for p in removal.pieces]
        if layer.branched and any(a != b for a, b in ends):
            return f"'{layer.name}' is a block, and without them reads values of another shape"
        prior: Affine | None = socket.producer.affine
        if socket.branch is None:
            gate = line if socket.producer.biased else line_through_zero
            merged = Merging(gate, self.data).merged(edit, removal)
            prior = None if isinstance(merged, str) else merged[1]
        act = _activation(edit.before, layer, socket.joint)
        undo = edit.bypass(removal)
        reason = self._fit(edit, socket, socket.joint, act, prior)
        if reason:
            undo()
        return reason

    def _fit(
        self, edit: Edit, socket: Socket, target: str, act: fx.Node | None, prior: Affine | None
    ) -> str:
        """Refit a host so that its joint has the value that `target` had; return why not."""
        producer, affine = socket.producer, socket.producer.affine
        reads = edit.now.inputs_of(edit.node(producer.node))[0].name
        try:
            x = record(edit.now, edit.now.example, {reads: lambda v: v})[reads]
        except DataError as error:
            return f"without them the network does not run ({error.met})"
        shape = edit.before.book.shapes[target]
        if not _leads(affine, x, shape):
            return f"'{producer.node}' would read values of another shape"
        size = max(1, min(FIT_SAMPLES, FIT_BYTES // (8 * _elements(affine, x, shape))))
        guess, skips = prior if self.rounds else None, _skips(edit, socket)
        for _ in range(1 + (act is not None) * self.rounds):
            refit = Refit(affine)
            for batch in self.data.chunks(size):
                wanted = record(edit.before, batch, {target: torch.Tensor.double})[target]
                needed = dict.fromkeys([reads, *skips], torch.Tensor.double)
                found = record(edit.now, batch, needed)
                skip = sum(found[name] for name in skips)
                if act is not None and guess is not None:
                    wanted = _nearest(edit.before, act, wanted, guess(found[reads]) + skip)
                refit.add(found[reads], wanted - skip)
            guess = refit.solve(self.ridge, prior, producer.biased)
        assert guess is not None, "fitted once at least"
        write_producer(edit.now, producer, guess)
        restate(edit.now, producer, self.data)
        return ""


def _skips(edit: Edit, socket: Socket) -> list[str]:
    """Return what is added to a block's branch now; of a plain layer, nothing."""
    if socket.branch is None:
        return []
    parts = edit.now.inputs_of(edit.node(socket.joint))
    return [n.name for n in parts if n.name != socket.branch]


def _activation(network: Network, layer: Layer, joint: str) -> fx.Node | None:
    """Return the activation behind a layer's joint, if there is nothing else."""
    tail = tail_of(network, layer, joint)
    return tail[0] if len(tail) == 1 and network.is_activation(tail[0]) else None


def _nearest(network: Network, act: fx.Node, wanted: Tensor, found: Tensor) -> Tensor:
    """Return, of the values that an activation makes the same of, the one nearest to what is found.

    What a rectifier makes of -1 and of -2 is the same: there a fit need not try for either.
    """
    image = apply_activation(network, act, wanted)
    best = wanted
    for other in (image, found):
        same = apply_activation(network, act, other) == image
        nearer = (other - found).abs() < (best - found).abs()
        best = torch.where(same & nearer, other, best)
    return best


def _leads(affine: Affine, x: Tensor, shape: tuple[int, ...]) -> bool:
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
