"""One joint pass over the data: how alike the units of matched spaces are, and their moments.

Units are compared by their pre-activations (after every contraction, the value behind its norm and
residual add) or by what their activations make of these. Layers that a network has only as neutral
ones are not run. Of many samples no more are run than tell how alike units are.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import numpy as np
from torch import Tensor, fx

from .._progress import tell
from ..calibration.data import Calibration
from ..calibration.moments import Moments, PairMoments
from ..calibration.run import Bypass, walk, working_batch
from ..errors import DataError
from ..ir import OUTPUTS, Axis
from ..spaces.network import OPEN, Network
from .problem import Problem

ENOUGH_SAMPLES, ENOUGH_POSITIONS = 512, 1 << 15  # more hardly change how alike units are


Key = tuple[str, str | None]  # a node, and the space if it is measured unit by unit there


Pair = tuple[str, int, int]


@dataclass(frozen=True)
class View:
    """What a coupling method wants to see of the units.

    Attributes:
        activated: Compare units behind their activations, not before.
        everything: Compare all networks with each other and each with itself, not only each with
            the base network of the space.
        singly: Where contractions write side by side into one sum, compare behind the sum for the
            one in its first operand only, and the others before it.
        outputs: Compare the network's outputs too, as a space called `OUTPUTS`.
    """

    activated: bool = False
    everything: bool = False
    singly: bool = False
    outputs: bool = False


@dataclass(frozen=True, eq=False)
class Evidence:
    """What one joint pass over the data found.

    Attributes:
        pairs: `(space, one network, the other)` -> moments, per node.
        outputs: Node whose output is to keep its moments -> those of each network, None where
            the network has no such layer.
    """

    pairs: dict[Pair, dict[str, PairMoments]]
    outputs: dict[str, list[Moments | None]]


def measuring_points(network: Network, view: View = View()) -> set[str]:
    """Return the nodes where units are compared: behind each contraction, its norm and add."""
    return set(points_of(network, view).values())


def points_of(network: Network, view: View) -> dict[str, str]:
    """Return where what each contraction writes is compared: contraction -> node."""
    points = {}
    for node in network.module.graph.nodes:
        if node.name not in network.weights:
            continue
        point = node
        while len(point.users) == 1:
            user = next(iter(point.users))
            adds = network.adds(user)
            if adds and view.singly and _joins_second(network, point, user):
                break
            passed = network.is_norm(user) or adds or network.is_idle(user)
            passed = passed or view.activated and network.is_activation(user)
            if not passed or not network.features.get(user.name):
                break  # also where the units of the next value are not known
            point = user
        points[node.name] = point.name
    return points


def _joins_second(network: Network, node: fx.Node, add: fx.Node) -> bool:
    """Tell whether an add has a contraction beside this node, and in front of it."""
    first, *others = network.inputs_of(add)
    behind = bool(others) and node is not first
    while len(first.users) == 1 and first.name not in network.weights:
        before = network.inputs_of(first)
        if len(before) != 1 or not (network.is_norm(first) or network.is_idle(first)):
            return False
        first = before[0]
    return behind and first.name in network.weights


def bypasses(problem: Problem) -> list[Bypass]:
    """Return, per network, the nodes that need not run because its layer is absent."""
    bypassed: list[Bypass] = []
    for absent in problem.absent:
        silent = [a for a in absent if not a.joins]  # what nobody reads must still have a shape
        bypassed.append({n: (a.entry, n in a.carriers) for a in silent for n in a.nodes})
    return bypassed


def measure(
    problem: Problem,
    data: Calibration,
    view: View | None,
    outputs: dict[str, int],
    samples: int,
) -> Evidence:
    """Advance all networks together over the data and gather moments at the measuring points.

    Args:
        problem: The networks and their spaces.
        data: Calibration inputs.
        view: How units are compared; None if they are not.
        outputs: Nodes whose output moments are wanted, with their feature axis.
        samples: How many of the first samples count for these: a multiple of `measuring_batch`,
            or all.

    Raises:
        DataError: If activations are not finite.
    """
    networks = problem.networks
    visits = {} if view is None else _visits(problem, view)
    meters = {key: _Meter(len(networks)) for key in [*visits, *((n, None) for n in outputs)]}
    if not meters:
        return Evidence({}, {})
    by_node: dict[str, list[Key]] = {}
    for key in meters:
        by_node.setdefault(key[0], []).append(key)
    kept: dict[str, list[Moments | None]] = {}
    seen = 0

    def visit(node: fx.Node, values: list[Any]) -> None:
        for key in by_node.get(node.name, ()):
            measured = visits.get(key, ())
            moved: list[Tensor | None]
            if key[1] is None:
                dim = measured[0].axes[0].dim if measured else outputs[node.name]
                moved = [None if v is None else v.movedim(dim, 0) for v in values]
            else:
                moved = [None] * len(values)
                for pair in measured:
                    for k, axis in zip((pair.base, pair.network), pair.axes):
                        moved[k] = _unit_by_unit(values[k], axis, pair.across)
            meters[key].add(moved, {(p.base, p.network) for p in measured})

    around = bypasses(problem)
    for batch in data.chunks(measuring_batch(networks)):
        walk(networks, batch, visit, around)
        seen += len(batch[0])
        tell(seen / data.samples)
        if seen == samples:
            kept = copy.deepcopy({node: meters[node, None].moments for node in outputs})
        fewest = min((m.positions for m in meters.values()), default=0)
        told = seen >= ENOUGH_SAMPLES and fewest >= ENOUGH_POSITIONS
        if told and (seen >= samples or not outputs):
            break
    pairs = _pairs(visits, meters)
    _require_finite(pairs, networks)
    return Evidence(pairs, kept)


def measuring_batch(networks: Sequence[Network]) -> int:
    """Return how many samples are measured at a time."""
    return working_batch(networks)


class _Meter:
    """Moments of every network at one place, and cross moments of the pairs that are compared."""

    def __init__(self, networks: int) -> None:
        self.moments: list[Moments | None] = [None] * networks
        self.pairs: dict[tuple[int, int], PairMoments] = {}

    @property
    def positions(self) -> int:
        """How many values of each unit it has seen."""
        return max((m.count for m in self.moments if m is not None), default=0)

    def add(self, values: list[Tensor | None], pairs: set[tuple[int, int]]) -> None:
        shifted: list[Tensor | None] = [None] * len(values)
        for k, value in enumerate(values):
            if value is not None:
                moments = self.moments[k] = self.moments[k] or Moments()
                shifted[k] = moments.add(value)
        for i, k in pairs:
            a, b, here, there = self.moments[i], self.moments[k], shifted[i], shifted[k]
            assert a and b and here is not None and there is not None, "both are shown"
            if (i, k) not in self.pairs:
                self.pairs[i, k] = PairMoments(a, b)
            self.pairs[i, k].add_shifted(here, there)


@dataclass(frozen=True, eq=False)
class _Visit:
    """A space of two networks to be compared at a node.

    Attributes:
        space: The space.
        base: One network.
        network: The other.
        axes: Where the units lie in each.
        across: Axes of the value along which other units lie, in an order of each network's own.
    """

    space: str
    base: int
    network: int
    axes: tuple[Axis, Axis]
    across: tuple[int, ...] = ()

    @property
    def plain(self) -> bool:
        """Tell whether each unit is one position, and the other axes are the same in both."""
        return self.axes[0].index.shape[1] == 1 and not self.across


def _visits(problem: Problem, view: View) -> dict[Key, list[_Visit]]:
    points = measuring_points(problem.networks[0], view)
    fed = problem.networks[0].fed()
    gone = [{n for a in absent for n in a.inner} for absent in problem.absent]
    dims: dict[str, set[int]] = {}
    for node, dim in (place for n in problem.networks for place in n.spaces.feature_places):
        dims.setdefault(node, set()).add(dim)
    visits: dict[Key, list[_Visit]] = {}
    for name, spaces in problem.spaces.items():
        for i, k in _compared(problem, name, view):
            own = {a.tensor: a for a in spaces[k].features}
            both = [(a, own[a.tensor]) for a in spaces[i].features if a.tensor in own]
            both = [p for p in both if p[0].tensor in fed - gone[k] - gone[i]]
            found = [
                _Visit(name, i, k, p, tuple(dims[p[0].tensor] - {p[0].dim}))
                for p in [p for p in both if p[0].tensor in points] or both[:1]
            ]
            for visit in [v for v in found if not v.across] or found:
                key = (visit.axes[0].tensor, None if visit.plain else name)
                visits.setdefault(key, []).append(visit)
    if view.outputs and OPEN not in problem.networks[0].module.graph.output_node().meta:
        node, dim, size = last_contraction(problem.networks[0])
        axis = Axis(node, dim, np.arange(size)[:, None])
        pairs = permutations(range(len(gone)), 2)
        visits[node, None] = [_Visit(OUTPUTS, i, k, (axis, axis)) for i, k in pairs]
    return visits


def last_contraction(network: Network) -> tuple[str, int, int]:
    """Return the last contraction in front of the output, its feature axis and its width."""
    node = [*network.weights][-1]
    dim = network.features[node][0]
    return node, dim, network.shapes[node][dim]


def _compared(problem: Problem, name: str, view: View) -> list[tuple[int, int]]:
    """Return the pairs of networks whose units of a space are compared."""
    here = [k for k, has in enumerate(problem.present[name]) if has]
    if view.everything:
        return [(i, k) for i in here for k in here if i <= k]
    base = problem.base[name]
    return [(base, k) for k in here if k != base and base in here]


def _pairs(
    visits: dict[Key, list[_Visit]], meters: dict[Key, _Meter]
) -> dict[Pair, dict[str, PairMoments]]:
    found: dict[Pair, dict[str, PairMoments]] = {}
    for key, measured in visits.items():
        meter = meters.pop(key)  # of wide networks each takes gigabytes
        for visit in measured:
            moments = meter.pairs[visit.base, visit.network]
            if key[1] is None:
                moments = moments.take(*(a.index[:, 0] for a in visit.axes))
            found.setdefault((visit.space, visit.base, visit.network), {})[key[0]] = moments
    return found


def _unit_by_unit(value: Tensor, axis: Axis, across: tuple[int, ...]) -> Tensor:
    """Return values `(units, positions)`; of other units, `across`, no more than their mean.

    Unlike samples and places, these are not the same from one network to the other.
    """
    if across:
        value = value.mean(across, keepdim=True)
    moved = value.movedim(axis.dim, 0).flatten(1)
    return moved[axis.index.reshape(-1)].reshape(len(axis.index), -1)


def _require_finite(pairs: dict[Pair, dict[str, PairMoments]], networks: Sequence[Network]) -> None:
    for (name, i, k), places in pairs.items():
        for node, moments in places.items():
            if not bool(moments.cross.isfinite().all()):
                raise DataError(
                    "activations that are NaN or infinite",
                    where=f"node '{node}' ('{name}') of {networks[i].name} or {networks[k].name}",
                    expected="finite activations on the calibration data",
                    do="check the data's normalisation and the networks' weights",
                )
