"""Which segments of several networks belong together, and which of their layers can pair.

Cross-layer alignment: which layers of networks of different depth correspond.

Segments pair up in order; within a pair, a layer cost compares the layers of the two networks, and
an aligner chooses a strictly increasing map, unless pairs are given by hand.

References:
    Nguyen et al. (CLAFusion), section 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import groupby, zip_longest
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .._progress import tell
from ..calibration.affine import fold, folds
from ..calibration.data import Batch, Calibration
from ..calibration.run import batch_size, record
from ..errors import ArgumentError, DataError, PairingError
from ..ir import Alignment, Layer, LayerFacts, Segment, SegmentAlignment
from ..spaces.network import Network
from .aligners import Aligner, choices, monotone, needs_costs
from .layer_costs import LayerCost, LayerView, Meter, linear_cka
from .layers import partition


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


BATCH_SAMPLES, BATCH_BYTES = 256, 1 << 28  # samples run at a time, and the memory for them


Job = tuple[int, tuple[Segment, ...]]  # the network with the most layers, and the segments


Pairs = Sequence[tuple[str, str]]


def align_networks(
    networks: Sequence[Network],
    data: Calibration,
    aligner: Aligner = monotone,
    layer_cost: LayerCost = linear_cka,
    measure_forced: bool = True,
    pairs: Sequence[Pairs | None] = (),
    segments: Sequence[tuple[Segment, ...]] | None = None,
) -> Alignment:
    """Align the layers of analysed networks.

    Args:
        networks: At least one network.
        data: Calibration inputs.
        aligner: From a cost matrix to the row of each column.
        layer_cost: How unlike two layers are.
        measure_forced: Measure costs also where the aligner does not need them.
        pairs: Per segment, the pairs by hand of two networks, or None to align it.
        segments: The segments of each network to align; all of them if not given.

    Raises:
        PairingError: If the segments do not pair.
        ArgumentError: If the aligner, the layer cost or the pairs by hand are at fault.
    """
    paired = pair_segments(networks, segments or [partition(n) for n in networks])
    jobs = [(_deepest(s), s) for s in paired]
    _require_pairs(pairs, networks, len(jobs))
    by_hand = [
        None if given is None else _by_hand(given, i, *job)
        for i, (given, job) in enumerate(zip_longest(pairs, jobs))
    ]
    costs = _measure(networks, jobs, data, layer_cost, aligner, measure_forced)
    found = [_align(job, cost, aligner, rows) for job, cost, rows in zip(jobs, costs, by_hand)]
    own = [[x for _, s in jobs for x in s[k].layers] for k in range(len(networks))]
    facts = tuple(_facts(n, layers) for n, layers in zip(networks, own))
    return Alignment(tuple(found), tuple(n.name for n in networks), facts)


def _facts(network: Network, layers: Sequence[Layer]) -> dict[str, LayerFacts]:
    sizes = {name: p.numel() for name, p in network.module.named_parameters()}
    found = {}
    for x in layers:
        names = {t for node in x.nodes for t in network.book.tensors.get(node, ())}
        found[x.name] = LayerFacts(x.kind, x.width, sum(sizes.get(t, 0) for t in names))
    return found


def _deepest(segments: tuple[Segment, ...]) -> int:
    depths = [len(s.layers) for s in segments]
    return depths.index(max(depths))


def _align(
    job: Job, costs: list[np.ndarray | None], aligner: Aligner, by_hand: list[int] | None
) -> SegmentAlignment:
    reference, segments = job
    deep = segments[reference].layers
    slots, shown = [], []
    for k, segment in enumerate(segments):
        possible = possible_pairs(deep, segment.layers)
        measured = costs[k]
        matrix = np.where(possible, 0.0, np.inf) if measured is None else measured
        rows: Sequence[int]
        if k == reference or len(deep) == len(segment.layers) and possible.diagonal().all():
            rows = range(len(deep))  # also what is given by hand can be no other map
        elif by_hand is not None:
            rows = by_hand
        else:
            rows = _align_steps(deep, segment.layers, matrix, aligner)
        row: list[str | None] = [None] * len(deep)
        for layer, at in zip(segment.layers, rows):
            row[at] = layer.name
        slots.append(tuple(row))
        shown.append(None if measured is None else tuple(map(tuple, measured.tolist())))
    return SegmentAlignment(segments[reference].label, reference, tuple(slots), tuple(shown))


def _align_steps(
    deep: Sequence[Layer], shallow: Sequence[Layer], costs: np.ndarray, aligner: Aligner
) -> list[int]:
    """Align step by step, so that layers which are neutral only together stay together."""
    rows, columns = steps_of(deep, shallow)
    first, own = (np.cumsum([0, *map(len, s)]) for s in (rows, columns))
    fits = possible_pairs(rows, columns)
    table = np.full(fits.shape, np.inf)
    for i, j in np.argwhere(fits):
        table[i, j] = costs[first[i] : first[i + 1], own[j] : own[j + 1]].diagonal().mean()
    found = aligner(table)
    _require_map(found, table, aligner)
    return [int(first[i]) + n for i, step in zip(found, columns) for n in range(len(step))]


def _require_map(rows: Sequence[int], costs: np.ndarray, aligner: Aligner) -> None:
    m, n = costs.shape
    increasing = list(rows) == sorted({r for r in rows if 0 <= r < m})
    if len(rows) != n or not increasing or not np.isfinite(costs[list(rows), range(n)]).all():
        raise ArgumentError(
            f"the rows {list(rows)} for {m} and {n} layers",
            where=f"the aligner {aligner}",
            expected=f"{n} strictly increasing rows from 0 to {m - 1}, layers of one kind paired",
            do="avoid the infinite entries of the costs, as those of fxfuse.aligners do",
        )


# --- pairs by hand --------------------------------------------------------------------------------


def _require_pairs(
    pairs: Sequence[Pairs | None], networks: Sequence[Network], segments: int
) -> None:
    """Refuse what is no list of pairs for each segment of two models."""
    entries = [entry for given in pairs if given is not None for entry in given]
    of_two = all(isinstance(e, (tuple, list)) and len(e) == 2 for e in entries)
    if not of_two or len(pairs) > segments or entries and len(networks) != 2:
        raise ArgumentError(
            f"pairs {list(pairs)} for {segments} segments of {len(networks)} models",
            where="the argument `pairs`",
            expected="per segment of two models, a list of (layer of the deeper, of the shallower)",
            do="start from the `pairs` of fxfuse.align(models, data); of more models, align two",
        )


def _by_hand(pairs: Pairs, at: int, reference: int, segments: tuple[Segment, ...]) -> list[int]:
    """Return the row of each layer of the shallower network, or refuse the pairs."""
    deep, shallow = segments[reference].layers, segments[1 - reference].layers
    place = {layer.name: i for i, layer in enumerate(deep)}
    rows = [place.get(name, -1) for name, _ in pairs]
    possible = possible_pairs(deep, shallow)
    if [name for _, name in pairs] != [x.name for x in shallow]:
        fault = "which do not name each layer of the shallower network once, in order"
    elif -1 in rows:
        fault = f"whose '{pairs[rows.index(-1)][0]}' is no layer of the deeper network here"
    elif any(a >= b for a, b in zip(rows, rows[1:])):
        fault = "whose layers of the deeper network are out of order"
    elif not possible[rows, range(len(rows))].all():
        a, b = pairs[int(np.argmin(possible[rows, range(len(rows))]))]
        fault = f"whose '{a}' and '{b}' are layers of different kinds"
    else:
        return rows
    names = ["deeper: " + ", ".join(place), "shallower: " + ", ".join(x.name for x in shallow)]
    raise ArgumentError(
        f"the pairs {list(pairs)}, {fault}",
        where=f"the argument `pairs`, segment {at + 1} ({segments[reference].label})",
        expected="(layer of the deeper, layer of the shallower) of " + "; ".join(names),
        do="start from the `pairs` of fxfuse.align(models, data), and edit them",
    )


# --- measuring layers -----------------------------------------------------------------------------


def _measure(
    networks: Sequence[Network],
    jobs: list[Job],
    data: Calibration,
    layer_cost: LayerCost,
    aligner: Aligner,
    measure_forced: bool,
) -> list[list[np.ndarray | None]]:
    """Return, per segment and network, the costs to the reference; infinite across kinds."""
    views = [_views(network, [s[k] for _, s in jobs]) for k, network in enumerate(networks)]
    meters: dict[tuple[int, int], Meter | np.ndarray] = {}
    for s, (reference, segments) in enumerate(jobs):
        deep = segments[reference].layers
        for k, segment in enumerate(segments):
            steps = possible_pairs(*steps_of(deep, segment.layers))
            undecided = len(segment.layers) < len(deep) and needs_costs(aligner, steps)
            if k != reference and (measure_forced or undecided):
                meters[s, k] = layer_cost(views[reference][s], views[k][s])
    shown = {at: meter for at, meter in meters.items() if isinstance(meter, Meter)}
    if shown:
        _show(networks, jobs, data, shown)
    costs: list[list[np.ndarray | None]] = [[None] * len(networks) for _ in jobs]
    for (s, k), meter in meters.items():
        reference, segments = jobs[s]
        found = meter.costs() if isinstance(meter, Meter) else np.asarray(meter, dtype=float)
        possible = possible_pairs(segments[reference].layers, segments[k].layers)
        _require_costs(found, possible, layer_cost)
        costs[s][k] = np.where(possible, found, np.inf)
    return costs


def _views(network: Network, segments: Sequence[Segment]) -> list[list[LayerView]]:
    state = cache(lambda: fold(network, folds(network)))

    def weights(layer: Layer) -> list[np.ndarray]:
        return [state()[name] for node in layer.producers for name in network.book.weights[node]]

    return [
        [LayerView(x.name, x.kind, x.width, partial(weights, x)) for x in segment.layers]
        for segment in segments
    ]


def _show(
    networks: Sequence[Network],
    jobs: list[Job],
    data: Calibration,
    meters: dict[tuple[int, int], Meter],
) -> None:
    """Show meters the pre-activations of their layers; what is reduced is shared among them."""
    points: list[dict[str, Layer]] = [{} for _ in networks]
    for s, k in meters:
        reference, segments = jobs[s]
        for i in (reference, k):
            points[i].update({x.point: x for x in segments[i].layers})
    one, seen = next(iter(meters.values())), 0
    for batch in data.chunks(_samples_at_a_time(networks, points, one)):
        found = [_reduced(n, batch, p, one) for n, p in zip(networks, points)]
        for (s, k), meter in meters.items():
            reference, segments = jobs[s]
            sides = [[found[i][x.point] for x in segments[i].layers] for i in (reference, k)]
            meter.add(*sides)
        seen += len(batch[0])
        tell(seen / data.samples)
        if one.wanted is not None and seen >= one.wanted:
            break


def _samples_at_a_time(
    networks: Sequence[Network], points: Sequence[dict[str, Layer]], meter: Meter
) -> int:
    """Return how many samples are run at a time: of layers that are held whole, less."""
    if meter.together is not None:
        return batch_size(networks, BATCH_BYTES, meter.together, least=8)
    held = 0
    for network, at in zip(networks, points):
        values = sum(math.prod(network.book.shapes[point]) for point in at)
        held += 4 * values // len(network.example[0])
    return max(1, min(BATCH_SAMPLES, BATCH_BYTES // max(held, 1)))


def _reduced(
    network: Network, batch: Batch, points: dict[str, Layer], meter: Meter
) -> dict[str, Any]:
    def reducer(layer: Layer) -> Callable[[Tensor], Any]:
        return lambda x: meter.reduce(x.movedim(layer.layout[1], 1))

    found = record(network, batch, {point: reducer(layer) for point, layer in points.items()})
    for point, value in found.items():
        if not all(bool(t.isfinite().all()) for t in tree_leaves(value) if isinstance(t, Tensor)):
            raise DataError(
                "activations that are NaN or infinite",
                where=f"layer '{points[point].name}' of {network.name}",
                expected="finite activations on the calibration data",
                do="check the data's normalisation and the network's weights",
            )
    return found


def _require_costs(costs: np.ndarray, possible: np.ndarray, layer_cost: LayerCost) -> None:
    if costs.shape != possible.shape or np.isnan(costs[possible]).any():
        raise ArgumentError(
            f"costs of shape {costs.shape}, {int(np.isnan(costs).sum())} of them NaN",
            where=f"the layer cost {layer_cost}",
            expected=f"numbers of shape {possible.shape}: rows and columns as handed in",
            do="return one cost for each pair of layers",
        )
