"""Refit layers next to removed ones by least squares to the values that the network had there."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from .composition import Affine
from .data import Calibration
from .errors import DataError
from .gates import line, line_through_zero
from .ir import Layer
from .least_squares import Refit
from .merging import Merging
from .network import Network
from .neutral import respond
from .producer import restate, write_producer
from .removal import Edit, Removal, refused
from .segments import describe
from .sockets import Socket, find_socket, tail_of
from .statistics import record

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
    image = respond(network, act, wanted)
    best = wanted
    for other in (image, found):
        same = respond(network, act, other) == image
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
