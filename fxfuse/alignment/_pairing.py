"""Which segments of several networks correspond, and which of their layers can pair.

Segments pair up in order: the first of each network, the second of each, and so on. Two layers can
pair if they are of one kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from ..errors import PairingError
from ..ir import Layer, Segment
from ..spaces.network import Network
from .aligners import count_maps

LayerRun = tuple[Layer, ...]  # layers that are matched, or inserted, as a whole


@dataclass(frozen=True)
class SegmentGroup:
    """Segments that correspond, one of each network."""

    segments: tuple[Segment, ...]

    @property
    def reference(self) -> int:
        """The first network that has the most layers here."""
        depths = [len(s.layers) for s in self.segments]
        return depths.index(max(depths))

    @property
    def deep(self) -> tuple[Layer, ...]:
        """The layers of that network."""
        return self.segments[self.reference].layers

    def possible(self, network: int) -> np.ndarray:
        """Tell which layers of the deepest network (rows) and of another (columns) can pair."""
        return _same_kinds(_single(self.deep), _single(self.segments[network].layers))

    def runs(self, network: int) -> tuple[list[LayerRun], list[LayerRun]]:
        """Cut the layers of the deepest network and of another into runs.

        Plain layers and gates up to the first layer without an activation are one run (an inverted
        bottleneck without a skip), if the networks agree on such runs. Any other layer is a run by
        itself.
        """
        deep, shallow = self.deep, self.segments[network].layers
        joined = _joined(deep), _joined(shallow)
        if len(joined[0]) >= len(joined[1]) and count_maps(_same_kinds(*joined)):
            return joined
        return _single(deep), _single(shallow)

    def possible_runs(self, network: int) -> np.ndarray:
        """Tell which runs of the deepest network (rows) and of another (columns) can pair."""
        return _same_kinds(*self.runs(network))

    def has_maps(self) -> bool:
        """Tell whether the layers of each network can be mapped to those of the deepest."""
        return all(count_maps(self.possible_runs(k)) for k in range(len(self.segments)))


def pair_segments(
    networks: Sequence[Network], segments: Sequence[tuple[Segment, ...]]
) -> list[SegmentGroup]:
    """Pair the segments of networks in order.

    Within a segment, plain layers may stand in front of blocks (a stem in front of a residual
    stage). If all networks alternate in the same way, each of these parts is paired by itself.

    Args:
        networks: At least one network.
        segments: The segments of each.

    Raises:
        PairingError: With the lists side by side, at the first pair that differs.
    """
    for i in range(max(map(len, segments))):
        of_place = [s[i] for s in segments if i < len(s)]
        if len(of_place) < len(segments) or not all(_similar(of_place[0], s) for s in of_place):
            raise _mismatch(networks, segments, i)
    groups = []
    for i, corresponding in enumerate(zip(*segments)):
        parts = [SegmentGroup(part) for part in _split(corresponding)]
        if not all(part.has_maps() for part in parts):
            raise _mismatch(networks, segments, i)
        groups += parts
    return groups


def _split(segments: tuple[Segment, ...]) -> list[tuple[Segment, ...]]:
    """Cut segments between plain layers and blocks, if they alternate in the same way."""
    cut = [
        [(branched, Segment(tuple(layers))) for branched, layers in groupby(s.layers, _is_block)]
        for s in segments
    ]
    patterns = {tuple(branched for branched, _ in parts) for parts in cut}
    if len(patterns) > 1:
        return [segments]
    return list(zip(*([part for _, part in parts] for parts in cut)))


def _is_block(layer: Layer) -> bool:
    return layer.branched


def _similar(a: Segment, b: Segment) -> bool:
    """Tell whether two segments work on tensors of one form and have a kind of layer in common."""
    if a.layers[0].layout != b.layers[0].layout or a.resolution != b.resolution:
        return False
    return bool({x.kind for x in a.layers} & {x.kind for x in b.layers})


def _single(layers: Sequence[Layer]) -> list[LayerRun]:
    return [(x,) for x in layers]


def _joined(layers: Sequence[Layer]) -> list[LayerRun]:
    """Join plain layers up to the next one without an activation, see `SegmentGroup.runs`."""
    runs, i = [], 0
    while i < len(layers):
        end = i
        if not layers[i].branched and not layers[i].linear:
            end = next((j for j in range(i, len(layers)) if layers[j].linear), i)
        runs.append(tuple(layers[i : end + 1]))
        i = end + 1
    return runs


def _same_kinds(rows: Sequence[LayerRun], columns: Sequence[LayerRun]) -> np.ndarray:
    """Tell which runs of two networks consist of layers of the same kinds."""
    kinds = [[[layer.kind for layer in run] for run in runs] for runs in (rows, columns)]
    same = [[a == b for b in kinds[1]] for a in kinds[0]]
    return np.array(same).reshape(len(rows), len(columns))


def _mismatch(
    networks: Sequence[Network], segments: Sequence[tuple[Segment, ...]], at: int
) -> PairingError:
    lines = []
    for network, listed in zip(networks, segments):
        lines.append(f"segments of {network.name}:")
        for i, segment in enumerate(listed):
            lines.append(f"    {'>>' if i == at else '  '} {segment}")
        if at < len(listed):
            kinds = dict.fromkeys(layer.kind for layer in listed[at].layers)
            lines += [f"           made of {kind}" for kind in kinds]
    return PairingError(
        "networks whose segments do not pair:\n  " + "\n  ".join(lines),
        where=f"segment {at + 1}, the first that differs",
        expected="one family: the same kinds of layers at the same resolutions, in order",
        do="fuse networks of one family; check that the same input size is right for both",
    )
