"""Remove layers from a network, one run of neighbours after the other.

What takes over their work is a strategy: `RefitNeighbour`, or `MergeIntoNext`, which merges a
layer into the next one with a straight line in place of each activation. A gate chooses the lines:
it takes what was measured of a layer's units and returns a slope and an offset for each. A slope
of one keeps a unit of a ReLU layer, a slope of zero drops it. Both strategies are approximate.
Each removal starts from what the network computes without the layers that were removed before.

References:
    Nguyen et al. (CLAFusion), section 3.2. Differences: biases and norms are composed too, and
    convolutions whose composite kernel is no larger than the next layer's. Beyond the paper's three
    gates by sign: the least-squares line, which fits any activation and has an offset.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import reduce
from itertools import takewhile

import torch
from torch import Tensor, fx

from .._progress import counted
from ..calibration.affine import Affine, Producer, compose, read_producer, restate, write_producer
from ..calibration.data import Calibration
from ..calibration.run import batch_size, record
from ..errors import PassError
from ..graph.passes import graph_pass
from ..graph.state import drop_unused
from ..ir import Layer
from ..spaces.network import Network
from ._neutral import apply_activation


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
    drop_unused(module)


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
