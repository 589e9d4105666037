"""Balancing by shortening: networks lose the layers that others do not have.

References:
    Nguyen et al. (CLAFusion), section 3.2: merging layers, for perceptrons. Difference: the default
    is least squares on the calibration data, which serves convolutions and residual blocks too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .._progress import counted, part
from ..alignment.layers import partition
from ..calibration.data import Calibration
from ..calibration.run import relative_error_on
from ..errors import ArgumentError, PassError
from ..ir import Alignment, Layer, SegmentAlignment
from ..spaces.network import Network
from ._removal import Merging, Refitting, plan_removals, remove
from .deepen import Balanced, check_alignment, insert_missing_layers
from .gates import Gate


@dataclass(frozen=True)
class Shorten:
    """Removes the layers that not all networks have; approximate, by as much as `errors` says.

    Attributes:
        gate: How to merge plain layers into the next one in closed form (see `gates`). If not
            given, a layer next to the removed ones is refitted by least squares on the data.
        ridge: Of least squares, relative to the mean variance of what a layer reads.
        rounds: How often to fit again to what activations cannot tell from the values wanted.
        reach: How many layers behind the refitted one are refitted too.
        to: Index of the network whose layers all get: deeper ones are shortened to it and shallower
            ones deepened, segment by segment. If not given, the layers stay that all have.
    """

    gate: Gate | None = None
    ridge: float = 1e-3
    rounds: int = 1
    reach: int = 4
    to: int | None = None

    def __call__(
        self,
        networks: Sequence[Network],
        alignment: Alignment,
        data: Calibration,
    ) -> Balanced:
        """Balance networks.

        Args:
            networks: The networks; not modified.
            alignment: Which of their layers correspond.
            data: What removed layers are replaced on.

        Raises:
            ArgumentError: If the alignment is of other networks, or `to` is no index.
            PassError: If nothing can take the place of a layer.
            PairingError: If the structures differ beside their layers.
        """
        layers = [[x for s in partition(n) for x in s.layers] for n in networks]
        check_alignment(alignment, [{x.name: x for x in own} for own in layers])
        kept = [self._kept(s, len(networks)) for s in alignment.segments]
        removed = [_outside(alignment, kept, k) for k in range(len(networks))]
        with part(0.0, 0.8):
            jobs = counted(list(zip(networks, layers, removed)))
            shorter = [self._shorten(n, own, names, data) for n, own, names in jobs]
        counts = [len(names) for names in removed]
        skeleton = counts.index(min(counts)) if self.to is None else self.to
        with part(0.8, 1.0):
            balanced = insert_missing_layers(
                shorter, self._rest(alignment, kept, shorter), skeleton
            )
        pairs = zip(networks, balanced.networks, counts)
        errors = (relative_error_on(data, a, b) if count else 0.0 for a, b, count in pairs)
        gone = tuple(frozenset(names) for names in removed)
        return replace(balanced, errors=tuple(errors), removed=gone)

    def _kept(self, segment: SegmentAlignment, count: int) -> list[int]:
        """Return the slots of a segment that stay."""
        if self.to is not None and not 0 <= self.to < count:
            raise ArgumentError(
                f"network {self.to}",
                where="Shorten(to=...)",
                expected=f"an index from 0 to {count - 1}",
                do="leave it out to keep the layers that all networks have",
            )
        rows = segment.slots if self.to is None else [segment.slots[self.to]]
        return [i for i, slot in enumerate(zip(*rows)) if None not in slot]

    def _shorten(
        self,
        network: Network,
        layers: Sequence[Layer],
        names: set[str],
        data: Calibration,
    ) -> Network:
        if not names:
            return network
        fitted = Refitting(data, self.ridge, self.rounds, self.reach)
        strategy = Merging(self.gate, data) if self.gate else fitted
        removals = plan_removals(layers, names)
        with part(0.0, 0.8):
            module = remove(network.module, network.example, network, removals, strategy)
        with part(0.8, 1.0):
            shorter = Network.of(network.name, module, network.example)
        left = [x.kind for s in partition(shorter) for x in s.layers]
        if left != [x.kind for x in layers if x.name not in names]:
            raise PassError(
                f"layers that others depend on: without them there are {len(left)} of other kinds",
                where=f"{', '.join(sorted(names))} of {network.name}",
                expected="layers whose removal leaves the others what they are",
                do="give an alignment in which they are matched, or balance by deepening",
            )
        return shorter

    def _rest(
        self, alignment: Alignment, kept: Sequence[list[int]], shorter: Sequence[Network]
    ) -> Alignment:
        """Return the alignment of the layers that stay, by the names they have now."""
        names = [iter([x.name for s in partition(n) for x in s.layers]) for n in shorter]
        segments = []
        for segment, slots in zip(alignment.segments, kept):
            rows = [
                tuple(None if row[i] is None else next(own) for i in slots)
                for row, own in zip(segment.slots, names)
            ]
            segments.append(
                SegmentAlignment(segment.label, self.to or 0, tuple(rows), (None,) * len(rows))
            )
        return Alignment(tuple(segments), alignment.names)


def _outside(alignment: Alignment, kept: Sequence[list[int]], k: int) -> set[str]:
    """Return the layers of one network in slots that do not stay."""
    pairs = [(s.slots[k], slots) for s, slots in zip(alignment.segments, kept)]
    gone = [[x for i, x in enumerate(row) if i not in slots] for row, slots in pairs]
    return {x for row in gone for x in row if x is not None}
