"""Which segments of networks correspond: in order, blocks taken apart where these differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby, product

import numpy as np

from ..errors import PairingError
from ..ir import Alignment, Layer, Segment
from ..spaces.network import Network
from .aligners import Monotone, count_maps
from .layers import OWNERS, Anatomy, partition

MOST_WAYS = 64  # to take blocks apart that are tried

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
    networks: Sequence[Network], segments: Sequence[tuple[Segment, ...]] | None = None
) -> list[SegmentGroup]:
    """Pair the segments of networks in order.

    Within a segment, plain layers may stand in front of blocks (a stem in front of a residual
    stage). If all networks alternate in the same way, each of these parts is paired by itself.
    Blocks that keep segments from pairing are taken apart, and what is inside is paired: the levels
    of a U-Net, towers, an encoder and a decoder.

    Args:
        networks: At least one network.
        segments: The segments of each, to be paired as they are; all of them if not given.

    Raises:
        PairingError: With the lists side by side, at the first pair that differs.
    """
    if segments is not None:
        lanes = list(segments)
        paired = _paired(lanes)
    else:
        lanes, paired = _pair_all(networks)
    if isinstance(paired, int):
        raise _mismatch(networks, lanes, min(paired, max(map(len, lanes)) - 1))
    return paired


def _pair_all(
    networks: Sequence[Network],
) -> tuple[list[tuple[Segment, ...]], list[SegmentGroup] | int]:
    """Return all segments, and how they pair; steps between layers belong to these if need be.

    They need to where networks differ in such steps once what not all of them have is passed by.
    """
    usual: tuple[list[tuple[Segment, ...]], list[SegmentGroup] | int] | None = None
    for owner in OWNERS:
        bodies = [Anatomy(n, owner) for n in networks]
        fronts = [body.front for body in bodies]
        lanes = [body.segments for body in bodies]
        if None not in fronts and len({x.kind for x in fronts if x is not None}) > 1:
            lanes = [(Segment((x,)), *lane) for x, lane in zip(fronts, lanes) if x is not None]
        paired = _opened(bodies, lanes, [MOST_WAYS])
        if not isinstance(paired, int) and _agree(bodies, paired):
            return lanes, paired
        usual = usual or (lanes, paired)
    assert usual is not None
    return usual


def layers_paired(networks: Sequence[Network], alignment: Alignment) -> list[dict[str, Layer]]:
    """Return the layers that an alignment is of, by name, in its order.

    Args:
        networks: The networks.
        alignment: Of their layers, with blocks taken apart if need be.
    """
    layers = [[x for s in partition(n) for x in s.layers] for n in networks]
    with suppress(PairingError):
        groups = pair_segments(networks)
        paired = [[x for g in groups for x in g.segments[k].layers] for k in range(len(networks))]
        if _names(alignment, paired):
            layers = paired
    return [{x.name: x for x in of_one} for of_one in layers]


def _names(alignment: Alignment, layers: Sequence[Sequence[Layer]]) -> bool:
    """Tell whether an alignment names these layers, each once, in order."""
    rows = [s.slots for s in alignment.segments if len(s.slots) == len(layers)]
    named = [[n for slots in rows for n in slots[k] if n is not None] for k in range(len(layers))]
    return named == [[x.name for x in of_one] for of_one in layers]


def _opened(
    bodies: Sequence[Anatomy], lanes: Sequence[tuple[Segment, ...]], ways: list[int]
) -> list[SegmentGroup] | int:
    """Pair segments, taking blocks apart where it is needed; the first that differs if in vain."""
    paired = _paired(lanes)
    if not isinstance(paired, int):
        return paired
    ways[0] -= 1
    here = [lane[paired].layers if paired < len(lane) else () for lane in lanes]
    shared = set[str].intersection(*({x.kind for x in layers} for layers in here))
    unlike = [next((x for x in ls if x.branched and x.kind not in shared), None) for ls in here]
    if ways[0] < 0 or not any(unlike):
        return paired
    options = [
        [lane]
        if block is None
        else [_with_inside(lane, paired, block, s) for s in body.inside(block)]
        for body, lane, block in zip(bodies, lanes, unlike)
    ]
    combined = [list(zip(*pick)) for pick in product(*(enumerate(o) for o in options))]
    for _, chosen in sorted(combined, key=lambda pick: sum(pick[0])):
        found = _opened(bodies, chosen, ways)
        if not isinstance(found, int) and _agree(bodies, found):
            return found
    return paired


def _agree(bodies: Sequence[Anatomy], groups: Sequence[SegmentGroup]) -> bool:
    """Tell whether networks compute the same where layers that not all have are passed by."""
    absent: list[list[Layer]] = [[] for _ in bodies]
    for group in groups:
        maps = [
            Monotone(False, False)(np.where(group.possible(k), 0.0, np.inf))
            for k in range(len(bodies))
        ]
        everywhere = set(range(len(group.deep))).intersection(*maps)
        for k, rows in enumerate(maps):
            layers = group.segments[k].layers
            absent[k] += [x for x, row in zip(layers, rows) if row not in everywhere]
    return len({body.output_past(layers) for body, layers in zip(bodies, absent)}) == 1


def _with_inside(
    lane: tuple[Segment, ...], at: int, block: Layer, inside: tuple[Segment, ...]
) -> tuple[Segment, ...]:
    """Put the segments inside a block in its place."""
    layers, i = lane[at].layers, lane[at].layers.index(block)
    around = [(Segment(part),) if part else () for part in (layers[:i], layers[i + 1 :])]
    return (*lane[:at], *around[0], *inside, *around[1], *lane[at + 1 :])


def _paired(segments: Sequence[tuple[Segment, ...]]) -> list[SegmentGroup] | int:
    """Pair segments in order; return the index of the first that differs if they do not pair."""
    for i in range(max(map(len, segments))):
        of_place = [s[i] for s in segments if i < len(s)]
        if len(of_place) < len(segments) or not all(_similar(of_place[0], s) for s in of_place):
            return i
    groups = []
    for i, corresponding in enumerate(zip(*segments)):
        parts = [SegmentGroup(part) for part in _split(corresponding)]
        if not all(part.has_maps() for part in parts):
            return i
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
    lines = [_difference(networks, segments, at)]
    for network, listed in zip(networks, segments):
        lines.append(f"segments of {network.name}:")
        for i, segment in enumerate(listed):
            lines.append(f"    {'>>' if i == at else '  '} {segment}")
        if at < len(listed):
            kinds = dict.fromkeys(layer.kind for layer in listed[at].layers)
            lines += [f"           made of {shorten(kind, 240)}" for kind in kinds]
    heard = "take what the others compute as targets (across=True)"
    advice = f"check that the same input size is right for both, or {heard}"
    if at > 0:
        before = segments[0][min(at, len(segments[0])) - 1].layers[-1].name
        advice = (
            f"{heard}, or fuse what is in front of it and keep a head for each: "
            f"anchor=0, heads=fxfuse.heads.Separate(after={before!r})"
        )
    return PairingError(
        "networks whose segments do not pair: " + "\n  ".join(lines),
        where=f"segment {at + 1}, the first that differs",
        expected="one family: the same kinds of layers at the same resolutions, in order",
        do=advice,
    )


def _difference(
    networks: Sequence[Network], segments: Sequence[tuple[Segment, ...]], at: int
) -> str:
    """Say in one line what differs: two layers by name, and what only one of them has."""
    here = [lane[at].layers if at < len(lane) else () for lane in segments]
    first = next((i for i, layers in enumerate(here) if layers), 0)
    other = next((i for i in range(len(here)) if _differ(here[first], here[i])), len(here) - 1)
    names = [networks[k].name for k in (first, other)]
    if not here[other]:
        return f"{names[1]} has nothing where {names[0]} has '{here[first][0].name}'"
    kinds = [{x.kind for x in here[k]} for k in (other, first)]
    sides = zip((here[first], here[other]), kinds)
    pair = [next((x for x in ls if x.kind not in theirs), ls[0]) for ls, theirs in sides]
    if all(x.kind in theirs for x, theirs in zip(pair, kinds)):
        a, b = (f"{x.name}' of {name}" for x, name in zip(pair, names))
        if (pair[0].layout, pair[0].resolution) == (pair[1].layout, pair[1].resolution):
            return f"the layers from '{a} and '{b} on are in another order"
        works = [Segment((x,)).label for x in pair]
        return f"'{a} works on {works[0]}, '{b} on {works[1]}"
    words = [Counter(x.kind.rpartition(" [")[0].split(", ")) for x in pair]
    has = [_listed(words[i] - words[1 - i]) for i in (0, 1)]
    if not any(has):
        has = _in_order_or_settings([networks[k] for k in (first, other)], pair)
    named = [
        f"'{x.name}' of {name} has {h or 'nothing that the other has not'}"
        for x, name, h in zip(pair, names, has)
    ]
    return ", ".join(named)


def _listed(words: Counter[str]) -> str:
    counted = [word if n == 1 else f"{n} {word}" for word, n in words.items()]
    return shorten(", ".join(counted), 120)


def _in_order_or_settings(networks: Sequence[Network], layers: Sequence[Layer]) -> list[str]:
    """Return how each of two layers with the same operators has them, where they differ."""
    steps = [
        [step for node in layer.nodes for step in network.steps(node) if step.word]
        for network, layer in zip(networks, layers)
    ]
    words = [[step.word for step in of_one] for of_one in steps]
    if layers[0].branched != layers[1].branched:
        return ["parallel paths" if layer.branched else "a single path" for layer in layers]
    if words[0] != words[1]:
        first = next(i for i, (a, b) in enumerate(zip(*words)) if a != b)
        return [f"{', '.join(w[first : first + 3])} ..." for w in words]
    pair = next((ab for ab in zip(*steps) if ab[0] != ab[1]), None)
    if pair is None:
        return ["other inputs to the same operators"] * 2
    settings = [
        [f"{name} {value}" for name, value in step.geometry._asdict().items()]
        if step.geometry
        else [str(step.settings)]
        for step in pair
    ]
    differing = [[t for t in own if t not in settings[1 - i]] for i, own in enumerate(settings)]
    return [f"{step.word} with {', '.join(d)}" for step, d in zip(pair, differing)]


def _differ(a: Sequence[Layer], b: Sequence[Layer]) -> bool:
    return {(x.kind, x.resolution) for x in a} != {(x.kind, x.resolution) for x in b}


def shorten(words: str, most: int) -> str:
    """Return words without their middle if there are very many, as of recurrent layers."""
    return words if len(words) <= most else f"{words[: most - 40]} ... {words[-30:]}"
