"""Which segments of several networks belong together, and which of their layers can pair."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np

from .aligners import choices
from .errors import PairingError
from .ir import Layer, Segment
from .network import Network


def pair_segments(
    networks: Sequence[Network], segments: Sequence[tuple[Segment, ...]]
) -> list[tuple[Segment, ...]]:
    """Pair the segments of networks in order.

    Where all networks show the same run of plain layers and blocks within a segment (a stem in
    front of a residual stage), each run is a segment of its own.

    Raises:
        PairingError: With the lists side by side, at the first pair that differs.
    """
    counts = [len(s) for s in segments]
    for i in range(max(counts)):
        row = [s[i] if i < len(s) else None for s in segments]
        if any(s is None or not _pairs(s, row[0]) for s in row):
            raise _mismatch(networks, segments, i)
    paired = []
    for i, here in enumerate(zip(*segments)):
        runs = [[list(g) for _, g in groupby(s.layers, key=lambda x: x.branched)] for s in here]
        patterns = {tuple(run[0].branched for run in r) for r in runs}
        split = list(zip(*runs)) if len(patterns) == 1 else [tuple(s.layers for s in here)]
        parts = [tuple(Segment(tuple(layers)) for layers in one) for one in split]
        if not all(_fit(part) for part in parts):
            raise _mismatch(networks, segments, i)
        paired += parts
    return paired


def _fit(segments: tuple[Segment, ...]) -> bool:
    """Tell whether the layers of each can be mapped to the most layers at all, kinds kept."""
    deep = max((s.layers for s in segments), key=len)
    steps = (possible_pairs(*steps_of(deep, s.layers)) for s in segments)
    maps = (choices(s) for s in steps)
    return all(count > 0 for count in maps)


def _pairs(a: Segment, b: Segment | None) -> bool:
    if b is None or a.layers[0].layout != b.layers[0].layout or a.resolution != b.resolution:
        return False
    return bool({x.kind for x in a.layers} & {x.kind for x in b.layers})


def _mismatch(
    networks: Sequence[Network], segments: Sequence[tuple[Segment, ...]], at: int
) -> PairingError:
    lines = []
    for network, found in zip(networks, segments):
        lines.append(f"segments of {network.name}:")
        for i, s in enumerate(found):
            lines.append(f"    {'>>' if i == at else '  '} {s}")
        if at < len(found):
            kinds = dict.fromkeys(layer.kind for layer in found[at].layers)
            lines += [f"           made of {kind}" for kind in kinds]
    return PairingError(
        "networks whose segments do not pair:\n  " + "\n  ".join(lines),
        where=f"segment {at + 1}, the first that differs",
        expected="one family: the same kinds of layers at the same resolutions, in order",
        do="fuse networks of one family; check that the same input size is right for both",
    )


def steps_of(
    deep: Sequence[Layer], shallow: Sequence[Layer]
) -> tuple[list[tuple[Layer, ...]], list[tuple[Layer, ...]]]:
    """Group the layers of two networks into steps that are matched or inserted as a whole.

    A run of plain layers and gates that ends without an activation (an inverted bottleneck without
    a skip) is one step, if the networks agree on such runs; any other layer is one by itself.
    """
    runs = _runs(deep), _runs(shallow)
    if len(runs[0]) >= len(runs[1]) and choices(possible_pairs(*runs)):
        return runs
    return [(x,) for x in deep], [(x,) for x in shallow]


def _runs(layers: Sequence[Layer]) -> list[tuple[Layer, ...]]:
    found, i = [], 0
    while i < len(layers):
        end = i
        if not layers[i].branched and not layers[i].linear:
            ends = (j for j in range(i, len(layers)) if layers[j].linear)
            end = next(ends, i)
        found.append(tuple(layers[i : end + 1]))
        i = end + 1
    return found


def possible_pairs(
    deep: Sequence[Layer | tuple[Layer, ...]], shallow: Sequence[Layer | tuple[Layer, ...]]
) -> np.ndarray:
    """Tell which layers, or runs of layers, are of one kind."""
    ours, theirs = ([_kinds(x) for x in layers] for layers in (deep, shallow))
    return np.array([[a == b for b in theirs] for a in ours]).reshape(len(ours), len(theirs))


def _kinds(step: Layer | tuple[Layer, ...]) -> tuple[str, ...]:
    return tuple(x.kind for x in (step if isinstance(step, tuple) else (step,)))
