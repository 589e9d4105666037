"""Cross-layer alignment: which layers of networks of different depth correspond.

Segments pair up in order: the first of each network, the second of each, and so on. Within a pair,
a layer cost compares the layers of one kind, and an aligner chooses a strictly increasing map,
unless pairs are given by hand. With more networks, each is aligned with the one that has the most
layers in the segment. Each network runs once over each batch, whatever the number of pairs.

References:
    Nguyen et al. (CLAFusion), section 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .._progress import tell
from ..calibration.counted import Counted
from ..calibration.data import Calibration
from ..calibration.norms import fold_norms, foldable_norms
from ..calibration.run import batch_size, record
from ..calibration.shares import Batch
from ..errors import ArgumentError, DataError
from ..ir import Alignment, Layer, LayerFacts, Segment, SegmentAlignment
from ..spaces.network import Network
from .aligners import Aligner, monotone
from .layer_costs import LayerCost, Meter, linear_cka
from .pairing import SegmentGroup, pair_segments

BATCH_SAMPLES, BATCH_BYTES = 256, 1 << 28  # samples run at a time, and the memory for them
SHOWN_SAMPLES = 64  # enough for costs that decide nothing

Place = tuple[int, int]  # a group of segments, and the network that is compared with its deepest
Side = tuple[int, tuple[Layer, ...]]  # the index of a network, and layers of it
Comparison = tuple[tuple[Side, Side], Meter]  # layers of two networks, and their meter


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
        measure_all: Measure costs also where the alignment does not depend on them. If not, only
            those are measured there that some samples suffice for.
        pairs: Per segment, the pairs by hand of two networks, or None to align it.
        segments: The segments of each network to align; all of them if not given.

    Raises:
        PairingError: If the segments do not pair.
        ArgumentError: If the aligner, the layer cost or the pairs by hand are at fault.
    """
    _require_aligner(aligner)
    groups = pair_segments(networks, segments)
    given = _given_rows(pairs, networks, groups)
    places = {
        (s, k): measure_all or _depends_on_costs(group, k, aligner)
        for s, group in enumerate(groups)
        for k in range(len(networks))
        if k != group.reference
    }
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


def measure_costs(
    networks: Sequence[Network],
    groups: Sequence[SegmentGroup],
    places: Mapping[Place, bool],
    data: Calibration,
    layer_cost: LayerCost,
) -> dict[Place, np.ndarray]:
    """Return costs `(layers of the deepest network, layers)`, infinite across kinds.

    Args:
        networks: The networks.
        groups: Their segments that correspond.
        places: Where costs are wanted, and whether they are needed: if not, only quick ones are
            measured, and on few samples.
        data: Calibration inputs.
        layer_cost: How unlike two layers are.

    Raises:
        ArgumentError: If the layer cost gives numbers of another shape, or NaN.
        DataError: If pre-activations are not finite.
    """
    answers: dict[Place, Meter | np.ndarray] = {}
    deciding: list[Comparison] = []
    shown: list[Comparison] = []
    for (s, k), needed in places.items():
        group = groups[s]
        deep, layers = group.deep, group.segments[k].layers
        answer = layer_cost(deep, layers)
        if isinstance(answer, Meter) and not (needed or answer.quick):
            continue
        answers[s, k] = answer
        if isinstance(answer, Meter):
            comparison = ((group.reference, deep), (k, layers)), answer
            (deciding if needed else shown).append(comparison)
    for comparisons, of in ((deciding, data), (shown, data.first(SHOWN_SAMPLES))):
        if comparisons and comparisons[0][1].of_weights:
            _show_weights(networks, comparisons)
        elif comparisons:
            _show_data(networks, comparisons, of)
    costs = {}
    for (s, k), answer in answers.items():
        measured = answer.costs() if isinstance(answer, Meter) else np.asarray(answer, dtype=float)
        possible = groups[s].possible(k)
        _require_costs(measured, possible, layer_cost)
        costs[s, k] = np.where(possible, measured, np.inf)
    return costs


def _show(comparisons: Sequence[Comparison], reduced: Sequence[Mapping[str, Any]]) -> None:
    """Show each meter what was reduced of its layers, by network and name."""
    for sides, meter in comparisons:
        meter.add(*([reduced[k][x.name] for x in layers] for k, layers in sides))


def _compared_layers(count: int, comparisons: Sequence[Comparison]) -> list[tuple[Layer, ...]]:
    """Return the layers of each of some networks that are compared, each once."""
    layers: list[dict[str, Layer]] = [{} for _ in range(count)]
    for sides, _ in comparisons:
        for k, side in sides:
            layers[k].update({x.name: x for x in side})
    return [tuple(by_name.values()) for by_name in layers]


def _show_weights(networks: Sequence[Network], comparisons: Sequence[Comparison]) -> None:
    """Show meters the weights of their layers."""
    _, meter = comparisons[0]
    reduced = []
    for network, layers in zip(networks, _compared_layers(len(networks), comparisons)):
        state = fold_norms(network, foldable_norms(network))
        weights = {
            x.name: [state[name] for node in x.producers for name in network.weights[node]]
            for x in layers
        }
        reduced.append({name: meter.reduce(arrays) for name, arrays in weights.items()})
    _show(comparisons, reduced)


def _show_data(
    networks: Sequence[Network], comparisons: Sequence[Comparison], data: Calibration
) -> None:
    """Show meters the pre-activations of their layers, until they have seen enough."""
    (_, meter), seen = comparisons[0], 0
    layers = _compared_layers(len(networks), comparisons)
    size = _samples_at_a_time(networks, layers, meter)
    if meter.samples is not None:
        data = data.first(-(-meter.samples // size) * size)
    for batch in data.dealt(size) if meter.adds_up else data.chunks(size):
        reduced = [_reduced(n, batch, x, meter) for n, x in zip(networks, layers)]
        _show(comparisons, reduced)
        seen += data.samples_in(batch)
        tell(seen / data.samples)
    with data.summed():
        for _, compared in comparisons:
            compared.summed()


def _samples_at_a_time(
    networks: Sequence[Network], layers: Sequence[Sequence[Layer]], meter: Meter
) -> int:
    """Return how many samples to run at a time: as many as the meter asks for, if they fit.

    Where it does not ask, the pre-activations of all layers have to fit together.
    """
    if meter.batch is not None:
        return batch_size(networks, BATCH_BYTES, meter.batch, least=8)
    sample_bytes = 0
    for network, compared in zip(networks, layers):
        values = sum(math.prod(network.shapes[x.pre_activation]) for x in compared)
        sample_bytes += 4 * values // len(network.example[0])
    return max(1, min(BATCH_SAMPLES, BATCH_BYTES // max(sample_bytes, 1)))


def _reduced(
    network: Network, batch: Batch, layers: Sequence[Layer], meter: Meter
) -> dict[str, Any]:
    """Return what a meter reduces the pre-activations of each layer to, by the layer's name."""
    counted = Counted.of(batch)

    def reducer(layer: Layer) -> Callable[[Tensor], Any]:
        axis = layer.layout[1]

        def reduced(x: Tensor) -> Any:
            x, at = (x, axis) if x.dim() > 1 else (x[:, None], 1)  # one unit has no axis of its own
            return meter.reduce(counted.filled(x, at).movedim(at, 1))

        return reduced

    values = record(network, batch, {x.pre_activation: reducer(x) for x in layers})
    for x in layers:
        tensors = [t for t in tree_leaves(values[x.pre_activation]) if isinstance(t, Tensor)]
        if not all(bool(t.isfinite().all()) for t in tensors):
            raise DataError(
                "activations that are NaN or infinite",
                where=f"layer '{x.name}' of {network.name}",
                expected="finite activations on the calibration data",
                do="check the data's normalisation and the network's weights",
            )
    return {x.name: values[x.pre_activation] for x in layers}


def _require_costs(costs: np.ndarray, possible: np.ndarray, layer_cost: LayerCost) -> None:
    if costs.shape != possible.shape or np.isnan(costs[possible]).any():
        raise ArgumentError(
            f"costs of shape {costs.shape}, {int(np.isnan(costs).sum())} of them NaN",
            where=f"the layer cost {layer_cost}",
            expected=f"numbers of shape {possible.shape}: rows and columns as handed in",
            do="return one cost for each pair of layers",
        )


Pairs = Sequence[tuple[str, str]]
