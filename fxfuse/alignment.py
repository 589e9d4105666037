"""Cross-layer alignment: which layers of networks of different depth correspond.

Segments pair up in order; within a pair, dynamic programming finds the strictly increasing map of
least total cost, first layer to first and last to last.

References:
    Nguyen et al. (CLAFusion), Definition 1. Difference: the printed Algorithm 1 applies the
    first-layer constraint only while backtracking and can miss the optimum; here it restricts the
    table from the start. Ties go to the smallest index.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

import numpy as np

from .costs import LinearCKA, gram
from .data import Calibration
from .errors import ArgumentError, DataError, PairingError
from .ir import Alignment, Layer, Segment, SegmentAlignment
from .network import Network
from .segments import partition
from .statistics import batch_size, record

GRAM_SAMPLES, GRAM_BYTES = 256, 1 << 28  # samples compared at a time, and the memory for them
Aligner = Callable[[np.ndarray], list[int]]


def monotone(costs: np.ndarray, first: bool = True, last: bool = True) -> list[int]:
    """Map each column to a row, strictly increasing, at the least total cost.

    Args:
        costs: `(m, n)` with `m >= n`; infinite where a pair is impossible.
        first: Map the first column to the first row.
        last: Map the last column to the last row (a single column goes to the first).

    Returns:
        The row of each column.

    Raises:
        PairingError: If every map has infinite cost.

    Example:
        >>> monotone(np.array([[0.3, 0.9], [0.1, 0.2], [0.5, 0.4]]))
        [0, 2]
    """
    allowed = _constrain(costs, first, last)
    m, n = allowed.shape
    table = np.full((n + 1, m + 1), np.inf)
    table[0] = 0.0
    for k in range(1, n + 1):
        for row in range(k, m + 1):
            table[k, row] = min(table[k, row - 1], table[k - 1, row - 1] + allowed[row - 1, k - 1])
    if not np.isfinite(table[n, m]):
        raise PairingError(
            "layers that can only pair out of order",
            where=f"a segment of {m} and {n} layers",
            expected="for each layer of the shallower network one of its kind, in order",
            do="fuse networks of one family, or give an alignment by hand",
        )
    rows, row = [0] * n, m
    for k in range(n, 0, -1):
        while row > k and table[k, row] == table[k, row - 1]:
            row -= 1
        rows[k - 1] = row - 1
        row -= 1
    return rows


def _constrain(costs: np.ndarray, first: bool, last: bool) -> np.ndarray:
    allowed = np.array(costs, dtype=float)
    m, n = allowed.shape
    if m < n:
        raise ArgumentError(
            f"a cost matrix of shape ({m}, {n})",
            where="the argument `costs`",
            expected="at least as many rows (layers of the deeper network) as columns",
            do="transpose it",
        )
    if first:
        allowed[1:, 0] = np.inf
    if last and n > 1:
        allowed[:-1, -1] = np.inf
    return allowed


def choices(possible: np.ndarray, first: bool = True, last: bool = True) -> int:
    """Count the maps that the constraints and the impossible pairs leave open."""
    allowed = np.isfinite(_constrain(np.where(possible, 0.0, np.inf), first, last))
    m, n = allowed.shape
    table = np.zeros((n + 1, m + 1), dtype=object)
    table[0] = 1
    for k in range(1, n + 1):
        for row in range(k, m + 1):
            table[k, row] = table[k, row - 1] + table[k - 1, row - 1] * int(allowed[row - 1, k - 1])
    return table[n, m]


def align_networks(
    networks: Sequence[Network],
    data: Calibration,
    aligner: Aligner = monotone,
    measure_forced: bool = True,
    tick: Callable[[float], None] | None = None,
    segments: Sequence[tuple[Segment, ...]] | None = None,
) -> Alignment:
    """Align the layers of analysed networks.

    Args:
        networks: At least one network.
        data: Calibration inputs.
        aligner: From a cost matrix to the row of each column.
        measure_forced: Measure costs also where the constraints leave a single map.
        tick: Called with the share of the samples that is done.
        segments: The segments of each network to align; all of them if not given.

    Raises:
        PairingError: If the segments do not pair.
    """
    paired = pair_segments(networks, segments or [partition(n) for n in networks])
    jobs = []
    for segments in paired:
        reference = max(range(len(segments)), key=lambda k: len(segments[k].layers))
        jobs.append((reference, segments))
    costs = _measure(networks, jobs, data, measure_forced, tick)
    found = [_align(job, cost, aligner) for job, cost in zip(jobs, costs)]
    return Alignment(tuple(found), tuple(n.name for n in networks))


def _align(
    job: tuple[int, tuple[Segment, ...]], costs: list[np.ndarray | None], aligner: Aligner
) -> SegmentAlignment:
    reference, segments = job
    deep = segments[reference].layers
    slots, shown = [], []
    for k, segment in enumerate(segments):
        possible = _possible(deep, segment.layers)
        matrix = np.where(possible, 0.0, np.inf) if costs[k] is None else costs[k]
        same = k == reference or len(deep) == len(segment.layers) and possible.diagonal().all()
        rows = range(len(deep)) if same else _align_steps(deep, segment.layers, matrix, aligner)
        row = [None] * len(deep)
        for layer, at in zip(segment.layers, rows):
            row[at] = layer.name
        slots.append(tuple(row))
        shown.append(None if costs[k] is None else tuple(map(tuple, costs[k].tolist())))
    return SegmentAlignment(segments[reference].label, reference, tuple(slots), tuple(shown))


def _align_steps(
    deep: Sequence[Layer], shallow: Sequence[Layer], costs: np.ndarray, aligner: Aligner
) -> list[int]:
    """Align step by step, so that layers which are neutral only together stay together."""
    rows, columns = _steps(deep, shallow)
    first, own = (np.cumsum([0, *map(len, s)]) for s in (rows, columns))
    fits = _possible(rows, columns)
    table = np.full(fits.shape, np.inf)
    for i, j in np.argwhere(fits):
        table[i, j] = costs[first[i] : first[i + 1], own[j] : own[j + 1]].diagonal().mean()
    found = aligner(table)
    return [int(first[i]) + n for i, step in zip(found, columns) for n in range(len(step))]


def _steps(
    deep: Sequence[Layer], shallow: Sequence[Layer]
) -> tuple[list[tuple[Layer, ...]], list[tuple[Layer, ...]]]:
    """Group the layers of two networks into steps that are matched or inserted as a whole.

    A run of plain layers and gates that ends without an activation (an inverted bottleneck without
    a skip) is one step, if the networks agree on such runs; any other layer is one by itself.
    """
    runs = tuple(_runs(layers) for layers in (deep, shallow))
    if len(runs[0]) >= len(runs[1]) and choices(_possible(*runs), first=False, last=False):
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


def _possible(deep: Sequence, shallow: Sequence) -> np.ndarray:
    """Tell which layers, or runs of layers, are of one kind."""
    ours, theirs = ([_kinds(x) for x in layers] for layers in (deep, shallow))
    return np.array([[a == b for b in theirs] for a in ours]).reshape(len(ours), len(theirs))


def _kinds(step: Layer | tuple[Layer, ...]) -> tuple[str, ...]:
    return tuple(x.kind for x in (step if isinstance(step, tuple) else (step,)))


def _measure(
    networks: Sequence[Network],
    jobs: list[tuple[int, tuple[Segment, ...]]],
    data: Calibration,
    measure_forced: bool,
    tick: Callable[[float], None] | None,
) -> list[list[np.ndarray | None]]:
    """Return, per segment and network, one minus CKA to the reference; infinite across kinds."""
    meters: dict[tuple[int, int], LinearCKA] = {}
    points: list[dict[str, None]] = [{} for _ in networks]
    for s, (reference, segments) in enumerate(jobs):
        deep = segments[reference].layers
        for k, segment in enumerate(segments):
            possible = _possible(deep, segment.layers)
            steps = _possible(*_steps(deep, segment.layers))
            open_ones = measure_forced or choices(steps) > 1 and len(segment.layers) < len(deep)
            if k != reference and open_ones:
                meters[s, k] = LinearCKA(len(deep), len(segment.layers))
                points[reference].update(dict.fromkeys(x.point for x in deep))
                points[k].update(dict.fromkeys(x.point for x in segment.layers))
    if meters:
        samples = batch_size(networks, GRAM_BYTES, GRAM_SAMPLES, least=8)
        for batch in data.chunks(samples, tick):
            grams = [record(n, batch, list(p), gram) for n, p in zip(networks, points)]
            for (s, k), meter in meters.items():
                reference, segments = jobs[s]
                meter.add(
                    _pick(networks[reference], grams[reference], segments[reference]),
                    _pick(networks[k], grams[k], segments[k]),
                )
    costs: list[list[np.ndarray | None]] = [[None] * len(networks) for _ in jobs]
    for (s, k), meter in meters.items():
        reference, segments = jobs[s]
        possible = _possible(segments[reference].layers, segments[k].layers)
        costs[s][k] = np.where(possible, meter.costs(), np.inf)
    return costs


def _pick(network: Network, grams: dict, segment: Segment) -> list:
    found = [grams[layer.point] for layer in segment.layers]
    for layer, g in zip(segment.layers, found):
        if not bool(g.isfinite().all()):
            raise DataError(
                "activations that are NaN or infinite",
                where=f"layer '{layer.name}' of {network.name}",
                expected="finite activations on the calibration data",
                do="check the data's normalisation and the network's weights",
            )
    return found


# --- pairing segments -----------------------------------------------------------------------------


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
        here = [s[i] if i < len(s) else None for s in segments]
        if any(s is None or not _pairs(s, here[0]) for s in here):
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
    steps = (_possible(*_steps(deep, s.layers)) for s in segments)
    maps = (choices(s, first=False, last=False) for s in steps)
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
