"""Cross-layer alignment: which layers of networks of different depth correspond.

Segments pair up in order. Within a pair, a layer cost compares the layers of the two networks, and
an aligner chooses a strictly increasing map, unless pairs are given by hand. With more networks,
each is aligned with the one that has the most layers in the segment.

References:
    Nguyen et al. (CLAFusion), section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

import numpy as np

from ..calibration.data import Calibration
from ..errors import ArgumentError
from ..ir import Alignment, Layer, LayerFacts, Segment, SegmentAlignment
from ..spaces.network import Network
from ._measuring import measure_costs
from ._pairing import SegmentGroup, pair_segments
from .aligners import Aligner, monotone
from .layer_costs import LayerCost, linear_cka
from .layers import partition

Pairs = Sequence[tuple[str, str]]


def align_networks(
    networks: Sequence[Network],
    data: Calibration,
    aligner: Aligner = monotone,
    layer_cost: LayerCost = linear_cka,
    measure_all: bool = True,
    pairs: Sequence[Pairs | None] = (),
    segments: Sequence[tuple[Segment, ...]] | None = None,
) -> Alignment:
    """Align the layers of analysed networks.

    Args:
        networks: At least one network.
        data: Calibration inputs.
        aligner: From a cost matrix to the row of each column.
        layer_cost: How unlike two layers are.
        measure_all: Measure costs also where the alignment does not depend on them.
        pairs: Per segment, the pairs by hand of two networks, or None to align it.
        segments: The segments of each network to align; all of them if not given.

    Raises:
        PairingError: If the segments do not pair.
        ArgumentError: If the aligner, the layer cost or the pairs by hand are at fault.
    """
    _require_aligner(aligner)
    groups = pair_segments(networks, segments or [partition(n) for n in networks])
    given = _given_rows(pairs, networks, groups)
    places = [
        (s, k)
        for s, group in enumerate(groups)
        for k in range(len(networks))
        if k != group.reference and (measure_all or _depends_on_costs(group, k, aligner))
    ]
    costs = measure_costs(networks, groups, places, data, layer_cost)
    aligned = [
        _align(group, [costs.get((s, k)) for k in range(len(networks))], aligner, given[s])
        for s, group in enumerate(groups)
    ]
    facts = [
        _facts(network, [x for group in groups for x in group.segments[k].layers])
        for k, network in enumerate(networks)
    ]
    return Alignment(tuple(aligned), tuple(n.name for n in networks), tuple(facts))


def _require_aligner(aligner: Aligner) -> None:
    if not isinstance(aligner, Aligner):
        raise ArgumentError(
            f"an aligner of type {type(aligner).__name__}",
            where="the argument `aligner`",
            expected="one of fxfuse.alignment, such as `monotone`, or of your own",
            do="derive a class from fxfuse.alignment.Aligner whose `__call__` takes the costs",
        )


def _depends_on_costs(group: SegmentGroup, network: int, aligner: Aligner) -> bool:
    """Tell whether costs decide which layers of a network pair with those of the deepest."""
    fewer = len(group.segments[network].layers) < len(group.deep)
    return fewer and aligner.needs_costs(group.possible_runs(network))


def _facts(network: Network, layers: Sequence[Layer]) -> dict[str, LayerFacts]:
    """Return what pictures say of layers, by name."""
    sizes = {name: p.numel() for name, p in network.module.named_parameters()}
    facts = {}
    for x in layers:
        names = {t for node in x.nodes for t in network.tensors.get(node, ())}
        facts[x.name] = LayerFacts(x.kind, x.width, sum(sizes.get(t, 0) for t in names))
    return facts


def _align(
    group: SegmentGroup,
    costs: Sequence[np.ndarray | None],
    aligner: Aligner,
    given: Sequence[int] | None,
) -> SegmentAlignment:
    """Align each network with the deepest.

    Args:
        group: Segments that correspond.
        costs: Per network, what was measured, if it was.
        aligner: From a cost matrix to the row of each column.
        given: The row of each layer of the shallower of two networks, if given by hand.
    """
    slots = []
    for k, segment in enumerate(group.segments):
        rows = _rows(group, k, costs[k], aligner, given)
        names: list[str | None] = [None] * len(group.deep)
        for layer, row in zip(segment.layers, rows):
            names[row] = layer.name
        slots.append(tuple(names))
    shown = tuple(None if c is None else tuple(map(tuple, c.tolist())) for c in costs)
    label = group.segments[group.reference].label
    return SegmentAlignment(label, group.reference, tuple(slots), shown)


def _rows(
    group: SegmentGroup,
    network: int,
    costs: np.ndarray | None,
    aligner: Aligner,
    given: Sequence[int] | None,
) -> Sequence[int]:
    """Return the row of each layer of a network among the layers of the deepest."""
    possible, layers = group.possible(network), group.segments[network].layers
    depth = len(group.deep)
    if network == group.reference or len(layers) == depth and possible.diagonal().all():
        return range(depth)  # rows that are given can be no other
    if given is not None:
        return given
    return _align_runs(
        group, network, np.where(possible, 0.0, np.inf) if costs is None else costs, aligner
    )


def _align_runs(
    group: SegmentGroup, network: int, costs: np.ndarray, aligner: Aligner
) -> list[int]:
    """Align run by run, so that layers which are neutral only together stay together."""
    runs = group.runs(network)
    first_row, first_column = (np.cumsum([0, *map(len, side)]) for side in runs)
    possible = group.possible_runs(network)
    of_runs = np.full(possible.shape, np.inf)
    for i, j in np.argwhere(possible):
        rows = slice(first_row[i], first_row[i + 1])
        columns = slice(first_column[j], first_column[j + 1])
        of_runs[i, j] = costs[rows, columns].diagonal().mean()
    chosen = aligner(of_runs)
    _require_map(chosen, of_runs, aligner)
    return [int(first_row[i]) + n for i, run in zip(chosen, runs[1]) for n in range(len(run))]


def _require_map(rows: Sequence[int], costs: np.ndarray, aligner: Aligner) -> None:
    m, n = costs.shape
    increasing = list(rows) == sorted({r for r in rows if 0 <= r < m})
    if len(rows) != n or not increasing or not np.isfinite(costs[list(rows), range(n)]).all():
        raise ArgumentError(
            f"the rows {list(rows)} for {m} and {n} layers",
            where=f"the aligner {aligner}",
            expected=f"{n} strictly increasing rows from 0 to {m - 1}, layers of one kind paired",
            do="avoid the infinite entries of the costs, as those of fxfuse.alignment do",
        )


# --- pairs by hand --------------------------------------------------------------------------------


def _given_rows(
    pairs: Sequence[Pairs | None], networks: Sequence[Network], groups: Sequence[SegmentGroup]
) -> list[list[int] | None]:
    """Return, per group, the rows that pairs by hand give; None where there are no pairs."""
    entries = [entry for of_segment in pairs if of_segment is not None for entry in of_segment]
    of_two = all(isinstance(e, (tuple, list)) and len(e) == 2 for e in entries)
    if not of_two or len(pairs) > len(groups) or entries and len(networks) != 2:
        raise ArgumentError(
            f"pairs {list(pairs)} for {len(groups)} segments of {len(networks)} models",
            where="the argument `pairs`",
            expected="per segment of two models, a list of (layer of the deeper, of the shallower)",
            do="start from the `pairs` of fxfuse.align(models, data); of more models, align two",
        )
    return [
        None if of_segment is None else _rows_of_pairs(of_segment, i, group)
        for i, (of_segment, group) in enumerate(zip_longest(pairs, groups))
    ]


def _rows_of_pairs(pairs: Pairs, segment: int, group: SegmentGroup) -> list[int]:
    """Return the row of each layer of the shallower network, or refuse the pairs."""
    shallow = group.segments[1 - group.reference].layers
    row_of = {layer.name: i for i, layer in enumerate(group.deep)}
    rows = [row_of.get(name, -1) for name, _ in pairs]
    possible = group.possible(1 - group.reference)
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
    names = ["deeper: " + ", ".join(row_of), "shallower: " + ", ".join(x.name for x in shallow)]
    raise ArgumentError(
        f"the pairs {list(pairs)}, {fault}",
        where=f"the argument `pairs`, segment {segment + 1} ({group.segments[0].label})",
        expected="(layer of the deeper, layer of the shallower) of " + "; ".join(names),
        do="start from the `pairs` of fxfuse.align(models, data), and edit them",
    )
