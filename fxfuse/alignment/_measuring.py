"""Costs of pairs of layers, as a layer cost measures them on the networks and the data.

All meters are shown the data together: each network runs once over each batch, and what is reduced
of a layer is handed to every meter that compares it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .._progress import tell
from ..calibration.data import Batch, Calibration
from ..calibration.norms import fold_norms, foldable_norms
from ..calibration.run import batch_size, record
from ..errors import ArgumentError, DataError
from ..ir import Layer
from ..spaces.network import Network
from ._pairing import SegmentGroup
from .layer_costs import LayerCost, Meter

BATCH_SAMPLES, BATCH_BYTES = 256, 1 << 28  # samples run at a time, and the memory for them

Place = tuple[int, int]  # a group of segments, and the network that is compared with its deepest


def measure_costs(
    networks: Sequence[Network],
    groups: Sequence[SegmentGroup],
    places: Iterable[Place],
    data: Calibration,
    layer_cost: LayerCost,
) -> dict[Place, np.ndarray]:
    """Return costs `(layers of the deepest network, layers)`, infinite across kinds.

    Args:
        networks: The networks.
        groups: Their segments that correspond.
        places: Where costs are wanted.
        data: Calibration inputs.
        layer_cost: How unlike two layers are.

    Raises:
        ArgumentError: If the layer cost gives numbers of another shape, or NaN.
        DataError: If pre-activations are not finite.
    """
    answers: dict[Place, Meter | np.ndarray] = {}
    comparisons = []
    for s, k in places:
        group = groups[s]
        sides = group.deep, group.segments[k].layers
        answer = answers[s, k] = layer_cost(*sides)
        if isinstance(answer, Meter):
            comparisons.append(_Comparison((group.reference, k), sides, answer))
    if comparisons and comparisons[0].meter.of_weights:
        _show_weights(networks, comparisons)
    elif comparisons:
        _show_data(networks, comparisons, data)
    costs = {}
    for (s, k), answer in answers.items():
        measured = answer.costs() if isinstance(answer, Meter) else np.asarray(answer, dtype=float)
        possible = groups[s].possible(k)
        _require_costs(measured, possible, layer_cost)
        costs[s, k] = np.where(possible, measured, np.inf)
    return costs


@dataclass(frozen=True, eq=False)
class _Comparison:
    """Layers of two networks, and the meter of their costs.

    Attributes:
        networks: Indices of the two networks.
        layers: The layers of each.
        meter: What measures them.
    """

    networks: tuple[int, int]
    layers: tuple[tuple[Layer, ...], tuple[Layer, ...]]
    meter: Meter

    def show(self, reduced: Sequence[Mapping[str, Any]]) -> None:
        """Show the meter what was reduced of the layers, by network and name."""
        sides = zip(self.networks, self.layers)
        self.meter.add(*([reduced[k][x.name] for x in layers] for k, layers in sides))


def _compared_layers(count: int, comparisons: Sequence[_Comparison]) -> list[tuple[Layer, ...]]:
    """Return the layers of each of some networks that are compared, each once."""
    layers: list[dict[str, Layer]] = [{} for _ in range(count)]
    for comparison in comparisons:
        for k, side in zip(comparison.networks, comparison.layers):
            layers[k].update({x.name: x for x in side})
    return [tuple(by_name.values()) for by_name in layers]


def _show_weights(networks: Sequence[Network], comparisons: Sequence[_Comparison]) -> None:
    """Show meters the weights of their layers."""
    meter = comparisons[0].meter
    reduced = []
    for network, layers in zip(networks, _compared_layers(len(networks), comparisons)):
        state = fold_norms(network, foldable_norms(network))
        weights = {
            x.name: [state[name] for node in x.producers for name in network.weights[node]]
            for x in layers
        }
        reduced.append({name: meter.reduce(arrays) for name, arrays in weights.items()})
    for comparison in comparisons:
        comparison.show(reduced)


def _show_data(
    networks: Sequence[Network], comparisons: Sequence[_Comparison], data: Calibration
) -> None:
    """Show meters the pre-activations of their layers, until they have seen enough."""
    meter, seen = comparisons[0].meter, 0
    layers = _compared_layers(len(networks), comparisons)
    for batch in data.chunks(_samples_at_a_time(networks, layers, meter)):
        reduced = [_reduced(n, batch, x, meter) for n, x in zip(networks, layers)]
        for comparison in comparisons:
            comparison.show(reduced)
        seen += len(batch[0])
        tell(seen / data.samples)
        if meter.samples is not None and seen >= meter.samples:
            break


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

    def reducer(layer: Layer) -> Callable[[Tensor], Any]:
        return lambda x: meter.reduce(x.movedim(layer.layout[1], 1))

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
