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
from ..alignment.pairing import layers_paired, pair_segments
from ..calibration.data import Calibration
from ..calibration.distance import relative_error_on
from ..errors import ArgumentError, PassError
from ..ir import Alignment, Layer, SegmentAlignment
from ..spaces.network import Network
from ._refit import RefitNeighbour
from ._removal import Gate, MergeIntoNext, Strategy, plan_removals, remove_layers
from .deepen import Balanced, check_alignment, insert_missing_layers


@dataclass(frozen=True)
class Shorten:
    """Removes the layers that not all networks have; approximate, by as much as `errors` says.

    Attributes:
        gate: Merge plain layers into the next one in closed form, with the lines that this chooses
            in place of their activations (`sign_of_sum`, `majority_vote`, `average_of_signs`,
            `fitted_line`). If not given, a layer next to the removed ones is refitted by least
            squares on the data.
        ridge: Of least squares, relative to the mean variance of what a layer reads.
        rounds: How often to fit again to targets that are easier to reach: where activations map
            different values to the same, to the nearest of them. 0 to fit once.
        reach: How many of the layers that follow are refitted too.
        to: Index of the network whose layers all networks get: deeper ones are shortened to it and
            shallower ones deepened, segment by segment. If not given, the layers stay that all
            have.
    """

    gate: Gate | None = None
    ridge: float = 1e-3
    rounds: int = 1
    reach: int = 4
    to: int | None = None

    def __call__(
        self, networks: Sequence[Network], alignment: Alignment, data: Calibration
    ) -> Balanced:
        """Balance networks.

        Args:
            networks: The networks; not modified.
            alignment: Which of their layers correspond.
            data: What the layers that stay are refitted, or the lines fitted, on.

        Raises:
            ArgumentError: If the alignment is of other networks, or `to` is no index.
            PassError: If nothing can take over the work of a layer.
            PairingError: If the structures differ outside of their layers.
        """
        by_name = layers_paired(networks, alignment)
        check_alignment(alignment, by_name)
        layers = [list(of_network.values()) for of_network in by_name]
        kept = [self._kept_slots(s, len(networks)) for s in alignment.segments]
        removed = [_layers_outside(alignment, kept, k) for k in range(len(networks))]
        with part(0.0, 0.8):
            jobs = counted(list(zip(networks, layers, removed)))
            shorter = [self._shorten(*job, data) for job in jobs]
        counts = [len(names) for names in removed]
        skeleton = counts.index(min(counts)) if self.to is None else self.to
        with part(0.8, 1.0):
            rest = self._rest(alignment, kept, shorter)
            balanced = insert_missing_layers(shorter, rest, skeleton)
        pairs = zip(networks, balanced.networks, counts)
        errors = (relative_error_on(data, a, b) if count else 0.0 for a, b, count in pairs)
        names = tuple(frozenset(of_network) for of_network in removed)
        return replace(balanced, errors=tuple(errors), removed=names)

    def _kept_slots(self, segment: SegmentAlignment, count: int) -> list[int]:
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
        self, network: Network, layers: Sequence[Layer], names: set[str], data: Calibration
    ) -> Network:
        """Return a network without some of its layers."""
        if not names:
            return network
        strategy: Strategy
        if self.gate is not None:
            strategy = MergeIntoNext(self.gate, data)
        else:
            strategy = RefitNeighbour(data, self.ridge, self.rounds, self.reach)
        removals = plan_removals(layers, names)
        with part(0.0, 0.8):
            module = remove_layers(network.module, network.example, network, removals, strategy)
        with part(0.8, 1.0):
            shorter = Network.of(network.name, module, network.example)
        left = [x.kind for x in _along(shorter)]
        if layers == _along(network) and left != [x.kind for x in layers if x.name not in names]:
            raise PassError(
                f"layers that others depend on: without them there are {len(left)}, of other kinds",
                where=f"{', '.join(sorted(names))} of {network.name}",
                expected="layers whose removal does not change the kinds of the others",
                do="give an alignment in which they are matched, or fuse without Shorten()",
            )
        return shorter

    def _rest(
        self, alignment: Alignment, kept: Sequence[list[int]], shorter: Sequence[Network]
    ) -> Alignment:
        """Return the alignment of the layers that stay, by the names they have now."""
        no_costs = (None,) * len(shorter)
        if self.to is None:  # all have all of them
            groups = [[x.layers for x in group.segments] for group in pair_segments(shorter)]
            names = [tuple(tuple(x.name for x in ls) for ls in group) for group in groups]
            rows = [SegmentAlignment("", 0, of_group, no_costs) for of_group in names]
            return Alignment(tuple(rows), alignment.names)
        left = [iter([x.name for x in _along(n)]) for n in shorter]
        segments = []
        for segment, slots in zip(alignment.segments, kept):
            slots_left = tuple(
                tuple(None if row[i] is None else next(of_network) for i in slots)
                for row, of_network in zip(segment.slots, left)
            )
            segments.append(SegmentAlignment(segment.label, self.to, slots_left, no_costs))
        return Alignment(tuple(segments), alignment.names)


def _along(network: Network) -> list[Layer]:
    """Return the layers of a network's chain."""
    return [x for segment in partition(network) for x in segment.layers]


def _layers_outside(alignment: Alignment, kept: Sequence[list[int]], k: int) -> set[str]:
    """Return the layers of network `k` in slots that do not stay."""
    return {
        name
        for segment, slots in zip(alignment.segments, kept)
        for i, name in enumerate(segment.slots[k])
        if i not in slots and name is not None
    }
