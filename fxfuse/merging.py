"""Merge plain layers into the next one, with straight lines in place of their activations.

References:
    Nguyen et al. (CLAFusion), section 3.2. Differences: biases and norms are composed too, and
    convolutions where the composite kernel is no larger than the next layer's.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, fx

from .composition import Affine, compose
from .data import Calibration
from .gates import Gate, Responses
from .ir import Layer
from .network import Network
from .neutral import respond
from .producer import Producer, restate, write_producer
from .removal import Edit, Removal, refused
from .statistics import batch_size, record

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
        kept = respond(network, act, far)
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
