"""Merge plain layers into the next one, with a straight line in place of each activation.

A gate chooses the lines: it takes what was measured of a layer's units and returns a slope and an
offset for each. A slope of one keeps a unit of a ReLU layer, a slope of zero drops it.

References:
    Nguyen et al. (CLAFusion), section 3.2. Differences: biases and norms are composed too, and
    convolutions whose composite kernel is no larger than the next layer's. Beyond the paper's three
    gates by sign: the least-squares line, which fits any activation and has an offset.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor, fx

from ..calibration.affine import Affine, compose
from ..calibration.data import Calibration
from ..calibration.producers import Producer, restate, write_producer
from ..calibration.run import batch_size, record
from ..errors import PassError
from ..ir import Layer
from ..spaces.network import Network
from ._neutral import apply_activation
from ._removal import Removal, Unsuitable, WorkingCopy, cannot_remove

# --- gates ------------------------------------------------------------------------------------


class Responses:
    """Streamed sums over the pre-activations `z` of units and over their activations `a`.

    Args:
        layer: Name of the layer, for errors.
        rectifies: Whether the activation keeps what is far above zero and drops what is far below.

    Attributes:
        count: Number of samples (positions) so far.
        z: `(units,)` sum of the pre-activations.
        a: `(units,)` sum of the activations.
        zz: `(units,)` sum of `z * z`.
        za: `(units,)` sum of `z * a`.
        positive: `(units,)` number of samples on which `z` is above zero.
    """

    def __init__(self, layer: str = "", rectifies: bool = True) -> None:
        self.layer, self.rectifies = layer, rectifies
        self.count = 0
        self.z = self.a = self.zz = self.za = self.positive = torch.zeros((), dtype=torch.float64)

    def add(self, before: Tensor, after: Tensor) -> None:
        """Add values `(units, positions)` before and behind the activation."""
        z, a = before.double(), after.double()
        self.count += z.shape[1]
        self.positive = (z > 0).sum(1) + self.positive.to(z.device)
        sums = z.sum(1), a.sum(1), (z * z).sum(1), (z * a).sum(1)
        earlier = self.z, self.a, self.zz, self.za
        self.z, self.a, self.zz, self.za = (x + y.to(z.device) for x, y in zip(sums, earlier))


Gate = Callable[[Responses], tuple[Tensor, Tensor]]


def sign_of_sum(units: Responses) -> tuple[Tensor, Tensor]:
    """Keep a unit if its pre-activations sum to no less than zero."""
    return _by_sign(units, (units.z >= 0).double())


def majority_vote(units: Responses) -> tuple[Tensor, Tensor]:
    """Keep a unit if it is active on at least half of the samples."""
    return _by_sign(units, (units.positive / units.count >= 0.5).double())


def average_of_signs(units: Responses) -> tuple[Tensor, Tensor]:
    """Scale a unit by the share of the samples on which it is active (above zero)."""
    return _by_sign(units, units.positive.double() / units.count)


def fitted_line(units: Responses) -> tuple[Tensor, Tensor]:
    """Fit the least-squares line, of any activation."""
    z, a, n = units.z / units.count, units.a / units.count, units.count
    spread = (units.zz / n - z * z).clamp(min=0)
    varies = spread > 1e-9 * (units.zz / n)
    slope = torch.where(varies, (units.za / n - z * a) / torch.where(varies, spread, 1.0), 0.0)
    return slope, a - slope * z


def fitted_line_through_zero(units: Responses) -> tuple[Tensor, Tensor]:
    """Fit the least-squares line without an offset, for networks without biases."""
    varies = units.zz > 0
    slope = torch.where(varies, units.za / torch.where(varies, units.zz, 1.0), 0.0)
    return slope, torch.zeros_like(slope)


def _by_sign(units: Responses, slope: Tensor) -> tuple[Tensor, Tensor]:
    """Return slopes without offsets, if they make sense: of a rectifier."""
    if not units.rectifies:
        raise PassError(
            "a gate by sign on an activation that is no rectifier",
            where=f"layer '{units.layer}'",
            expected="an activation that keeps what is far above zero and drops what is far below",
            do="use fxfuse.depth.fitted_line, which fits any activation, or no gate: least squares",
        )
    return slope, torch.zeros_like(slope)


# --- merging ----------------------------------------------------------------------------------

BATCH_BYTES, BATCH_SAMPLES = 1 << 26, 256


@dataclass(frozen=True)
class MergeIntoNext:
    """Merges plain layers into the next one; a `Strategy`.

    Attributes:
        gate: Chooses the line that replaces each activation.
        data: What the units are measured on, in the network with all its layers.
    """

    gate: Gate
    data: Calibration

    def __call__(self, network: WorkingCopy, removal: Removal) -> None:
        """Merge the layers.

        Raises:
            PassError: If a layer is not plain, or the composite does not fit into the next layer.
        """
        try:
            producer, composite = self.merged(network, removal)
        except Unsuitable as error:
            do = "choose least squares: Shorten() without a gate"
            raise cannot_remove(network.original, removal, [str(error)], do) from error
        with network.without(removal):
            write_producer(network.edited, producer, composite)
            restate(network.edited, producer, self.data)

    def merged(self, network: WorkingCopy, removal: Removal) -> tuple[Producer, Affine]:
        """Return the contraction of the next layer, and the map it computes with the others merged.

        Raises:
            Unsuitable: If the layers cannot be merged.
        """
        behind, piece = removal.behind, removal.pieces[0]
        blocks = [layer.name for layer in (*piece, behind) if layer is not None and layer.branched]
        if blocks:
            raise Unsuitable(f"'{blocks[0]}' is a block, which cannot be merged")
        if len(removal.pieces) > 1 or behind is None or behind.entry != removal.last.nodes[-1]:
            raise Unsuitable(
                "steps such as pooling or flattening lie between them and the next layer"
            )
        host = self._producer(network, behind)
        straight = [self._straightened(network, layer) for layer in piece]
        composite = reduce(compose, [*straight, host.affine])
        if _geometry(composite) != _geometry(host.affine):
            needed, present = _described(composite), _described(host.affine)
            raise Unsuitable(f"merged they need {needed}; '{behind.name}' has {present}")
        return host, composite

    def _producer(self, network: WorkingCopy, layer: Layer) -> Producer:
        producer = network.producer(layer)
        if producer is None:
            raise Unsuitable(f"'{layer.name}' is no single contraction, so it cannot be merged")
        return producer

    def _straightened(self, network: WorkingCopy, layer: Layer) -> Affine:
        """Return a layer as a map, with a line in place of its activation."""
        original, producer = network.original, self._producer(network, layer)
        names = layer.nodes[layer.nodes.index(producer.joint) + 1 :]
        behind = [original.nodes[name] for name in names]
        activations = [n for n in behind if not original.is_idle(n)]
        if len(activations) > 1 or not all(original.is_activation(n) for n in activations):
            raise Unsuitable(f"'{layer.name}' does more than contract, normalise and activate")
        if not activations:
            return producer.affine
        return producer.affine.scaled(*self._line(original, layer, producer, activations[0]))

    def _line(
        self, network: Network, layer: Layer, producer: Producer, activation: fx.Node
    ) -> tuple[Tensor, Tensor]:
        far = producer.affine.weight.new_tensor([-60.0, 60.0])
        kept = apply_activation(network, activation, far)
        rectifies = bool((kept - far.clamp(min=0)).abs().max() < 1e-6)
        units, axis = Responses(layer.name, rectifies), producer.axis
        ends = producer.joint, activation.name
        for batch in self.data.chunks(batch_size([network], BATCH_BYTES, BATCH_SAMPLES)):
            values = record(network, batch, dict.fromkeys(ends, lambda v: v))
            before, after = (values[name].movedim(axis, 0).flatten(1) for name in ends)
            units.add(before, after)
        return self.gate(units)


def _geometry(affine: Affine) -> tuple[object, ...]:
    return affine.kernel, affine.stride, affine.padding, affine.dilation, affine.groups


def _described(affine: Affine) -> str:
    kernel = "x".join(map(str, affine.kernel))
    return f"a kernel of {kernel} in {affine.groups} groups, stride {affine.stride}"
