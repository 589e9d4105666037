"""One joint pass over the data: how alike the units of matched spaces are, and their moments.

Units are compared by their pre-activations (behind every contraction, its norm and residual add) or
by the values behind their activations. Layers that a network has only as neutral ones are not run,
nor more samples than it takes to tell how alike units are.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, fx

from .._progress import tell
from .._ranks import total
from ..calibration.counted import Counted, Served, Tokens
from ..calibration.data import Calibration
from ..calibration.moments import Moments, PairMoments
from ..calibration.run import Bypass, walk, working_batch
from ..depth import bypass_of
from ..errors import DataError
from ..ir import OUTPUTS, Axis
from ..spaces.network import OPEN, Network
from .problem import Problem

ENOUGH_SAMPLES, ENOUGH_POSITIONS = 512, 1 << 15  # more hardly change how alike units are

Key = tuple[str, str | None]  # a node, and the space if it is measured unit by unit there
Pair = tuple[str, int, int]  # a space, one network, the other


@dataclass(frozen=True)
class View:
    """What a coupling method wants to see of the units.

    Attributes:
        activated: Compare units behind their activations, not before.
        everything: Compare all networks with each other and each with itself, not only each with
            the base network of the space.
        singly: Where several contractions are added up, only the one in the first operand is
            compared behind the sum, the others before it.
        outputs: Compare the network's outputs too, as a space called `OUTPUTS`.
        summands: Compare every contraction before it is added to anything, and measure how large
            the values are that are added up.
        tokens: Which positions of a sample count, from how many there are, such as `Window(6)`;
            None for all.
    """

    activated: bool = False
    everything: bool = False
    singly: bool = False
    outputs: bool = False
    summands: bool = False
    tokens: Tokens | None = None


@dataclass(frozen=True, eq=False)
class Evidence:
    """What one joint pass over the data measured.

    Attributes:
        pairs: `(space, one network, the other)` -> moments of both, per node.
        outputs: Node whose output is to keep its moments -> those of each network, None where
            the network has no such layer.
        sizes: Node whose output is added to others, and its axis of units -> mean absolute values
            along it, of each network.
    """

    pairs: dict[Pair, dict[str, PairMoments]]
    outputs: dict[str, list[Moments | None]]
    sizes: dict[tuple[str, int], list[np.ndarray | None]] = field(default_factory=dict)


class Keeper(Protocol):
    """Keeps values of the networks for later, since they run anyway.

    Attributes:
        size: How many samples one batch has to have.
        settles: Nodes whose output moments are wanted, with their feature axis.
    """

    size: int
    settles: dict[str, int]

    def see(self, batch: int, node: fx.Node, values: Sequence[Any], counted: Counted) -> None:
        """See a node's value in every network, None where one has none; in every batch."""


def points_of(network: Network, view: View) -> dict[str, str]:
    """Return the node where the units that a contraction writes are compared, per contraction."""
    points = {}
    for node in network.module.graph.nodes:
        if node.name not in network.weights:
            continue
        point = node
        while len(point.users) == 1:
            user = next(iter(point.users))
            adds = network.adds(user)
            if adds and view.singly and _second_operand(network, point, user):
                break
            if adds and view.summands and len(network.inputs_of(user)) > 1:
                break
            passed = network.is_norm(user) or adds or network.is_idle(user)
            passed = passed or view.activated and network.is_activation(user)
            if not passed or not network.features.get(user.name):
                break  # also where the units of the next value are not known
            point = user
        points[node.name] = point.name
    return points


def _second_operand(network: Network, node: fx.Node, add: fx.Node) -> bool:
    """Tell whether a node is not an add's first operand, and a contraction writes the first."""
    first, *others = network.inputs_of(add)
    second = bool(others) and node is not first
    while len(first.users) == 1 and first.name not in network.weights:
        before = network.inputs_of(first)
        if len(before) != 1 or not (network.is_norm(first) or network.is_idle(first)):
            return False
        first = before[0]
    return second and first.name in network.weights


def bypasses(problem: Problem) -> list[Bypass]:
    """Return, per network, the nodes that need not run because its layer is absent."""
    return [bypass_of(absent) for absent in problem.absent]


def measure(
    problem: Problem,
    data: Calibration,
    view: View | None,
    outputs: dict[str, int],
    samples: int,
    keeper: Keeper | None = None,
) -> Evidence:
    """Advance all networks together over the data and gather moments at the measuring points.

    Args:
        problem: The networks and their spaces.
        data: Calibration inputs.
        view: How units are compared; None if they are not.
        outputs: Nodes whose output moments are wanted, with their feature axis.
        samples: How many of the first samples count for these.
        keeper: Sees all values of all samples, besides; not called if its batches are of another
            size, or if nothing is measured.

    Raises:
        DataError: If activations are not finite.
    """
    networks = problem.networks
    visits = {} if view is None else _visits(problem, view)
    meters = {key: _Meter(len(networks)) for key in [*visits, *((n, None) for n in outputs)]}
    summands = _summands(problem) if view is not None and view.summands else []
    sizes = {place: [Moments() for _ in networks] for place in summands}
    if not meters:
        return Evidence({}, {})
    by_node: dict[str, list[Key]] = {}
    for key in meters:
        by_node.setdefault(key[0], []).append(key)
    counted = chosen = Counted()
    keeper = keeper if keeper is not None and keeper.size == _step(networks, data) else None
    number, beyond = 0, False

    def visit(node: fx.Node, values: list[Any]) -> None:
        if keeper is not None:
            keeper.see(number, node, values, counted)
        if beyond:
            return
        for place in (p for p in summands if p[0] == node.name):
            for moments, value in zip(sizes[place], values):
                if value is not None:
                    moments.add(chosen.of_units(value.abs(), place[1]))
        for key in by_node.get(node.name, ()):
            measured = visits.get(key, ())
            if key[1] is None:
                dim = measured[0].axes[0].dim if measured else outputs[node.name]
                moved = [None if v is None else counted.of_units(v, dim) for v in values]
            else:
                moved = _all_unit_by_unit(values, measured, chosen)
            meters[key].add(moved, {(p.base, p.network) for p in measured})

    kept = None
    bypassed = bypasses(problem)
    given = networks, data, meters, samples if outputs else 0, keeper is not None
    for at, (batch, late, past, told) in enumerate(_until_enough(*given)):
        number, beyond = at, past
        if late and kept is None:
            kept = copy.deepcopy({node: meters[node, None].moments for node in outputs})
        counted = Counted.of(batch)
        chosen = Counted.of(batch, view.tokens) if view is not None else counted
        walk(networks, batch, visit, bypassed)
        tell(told)
    kept = kept or {node: meters[node, None].moments for node in outputs}
    with data.summed():
        moments = {n: [m and m.summed() for m in ms] for n, ms in kept.items()}
        pairs = _pairs(visits, {key: meter.summed() for key, meter in meters.items()})
        large = {place: [m.summed() for m in ms] for place, ms in sizes.items()}
    _require_finite(pairs, networks)
    means = {place: [m.mean if m.count else None for m in ms] for place, ms in large.items()}
    return Evidence(pairs, moments, means)


def _summands(problem: Problem) -> list[tuple[str, int]]:
    """Return the nodes whose outputs are added to others, each with its axes of units."""
    network = problem.networks[0]
    nodes = [
        [n for n in node.all_input_nodes if network.features.get(n.name)]
        for node in network.module.graph.nodes
        if network.adds(node)
    ]
    added = dict.fromkeys(n.name for summands in nodes if len(summands) > 1 for n in summands)
    return [(name, dim) for name in added for dim in network.features[name]]


def _until_enough(
    networks: Sequence[Network],
    data: Calibration,
    meters: Mapping[Key, _Meter],
    samples: int,
    on: bool,
) -> Iterator[tuple[Served, bool, bool, float]]:
    """Yield batches of the first samples, until meters have seen what tells how alike units are.

    Args:
        networks: The networks.
        data: Calibration inputs.
        meters: They say how many positions they have seen.
        samples: How many of the first samples are wanted in any case.
        on: Go on to the last sample.

    Yields:
        A batch, whether it lies behind these samples, whether behind all that is measured, and the
        share of the work done with it.
    """
    size, fewest = working_batch(networks), None
    enough = _whole(ENOUGH_SAMPLES, size)
    step = _step(networks, data)
    for inputs, numbers in zip(data.own(step), data.numbers.split(step)):
        early = numbers < samples
        later = ~early & (numbers < enough)
        for late, chosen in ((False, early), (True, later), (True, ~early & ~later)):
            beyond = late and bool((numbers[chosen] >= enough).any())
            if chosen.any() and (on or not beyond):
                most = data.samples if on else min(max(enough, samples), data.samples)
                parts = inputs if chosen.all() else inputs.like([t[chosen] for t in inputs])
                yield parts, late, beyond, int(numbers[chosen][-1] + 1) / most
                if fewest is None:
                    counts = [int(chosen.sum()), *(m.positions for m in meters.values())]
                    with data.summed():  # so that all processes decide alike
                        (sums,) = total(torch.tensor(counts, dtype=torch.float64))
                    seen, *positions = sums.tolist()
                    fewest = min(positions) / seen
                    enough = max(enough, _whole(ENOUGH_POSITIONS / max(fewest, 1e-9), size))
        if not on and numbers[-1] >= max(enough, samples):
            break


def _step(networks: Sequence[Network], data: Calibration) -> int:
    """Return how many samples are run at a time."""
    most = ENOUGH_SAMPLES * len(data.numbers) // data.samples
    return data.at_a_time(max(min(working_batch(networks), most), 1))


def _whole(count: float, size: int) -> int:
    """Return a number of samples in whole batches."""
    return math.ceil(count / size) * size


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
            a, b, x, y = self.moments[i], self.moments[k], shifted[i], shifted[k]
            assert a and b and x is not None and y is not None, "both networks have this value"
            if (i, k) not in self.pairs:
                self.pairs[i, k] = PairMoments(a, b)
            self.pairs[i, k].add_shifted(x, y)

    def summed(self) -> _Meter:
        """Return what the meters of all processes have seen together."""
        every = _Meter(0)
        every.moments = [m and m.summed() for m in self.moments]
        for (i, k), pair in sorted(self.pairs.items()):
            a, b = every.moments[i], every.moments[k]
            assert a and b, "both networks have values here"
            every.pairs[i, k] = pair.summed(a, b)
        return every


@dataclass(frozen=True, eq=False)
class _Visit:
    """A space of two networks to be compared at a node.

    Attributes:
        space: The space.
        base: One network.
        network: The other.
        axes: Where the units lie in each.
        across: Axes of the value along which other units lie, which each network orders its way.
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
    points = set(points_of(problem.networks[0], view).values())
    fed = problem.networks[0].fed()
    bypassed = [{n for a in absent for n in a.inner} for absent in problem.absent]
    dims: dict[str, set[int]] = {}
    for node, dim in (place for n in problem.networks for place in n.spaces.feature_places):
        dims.setdefault(node, set()).add(dim)
    visits: dict[Key, list[_Visit]] = {}
    for name, spaces in problem.spaces.items():
        for i, k in _compared(problem, name, view):
            axes = {a.tensor: a for a in spaces[k].features}
            both = [(a, axes[a.tensor]) for a in spaces[i].features if a.tensor in axes]
            both = [p for p in both if p[0].tensor in fed - bypassed[k] - bypassed[i]]
            places = [
                _Visit(name, i, k, p, tuple(dims[p[0].tensor] - {p[0].dim}))
                for p in [p for p in both if p[0].tensor in points] or both[:1]
            ]
            for visit in [v for v in places if not v.across] or places:
                whole = visit.plain and view.tokens is None  # else apart from the outputs' moments
                key = (visit.axes[0].tensor, None if whole else name)
                visits.setdefault(key, []).append(visit)
    first, anchor = problem.networks[0], problem.anchor
    pairs = [(anchor, k) for k in range(len(bypassed)) if k != anchor]
    closed = OPEN not in first.module.graph.output_node().meta
    if view.outputs and closed and first.weights and pairs:
        node, dim, size = last_contraction(first)
        axis = Axis(node, dim, np.arange(size)[:, None])
        visits[node, None] = [_Visit(OUTPUTS, i, k, (axis, axis)) for i, k in pairs]
    return visits


def last_contraction(network: Network) -> tuple[str, int, int]:
    """Return the last contraction in front of the output, its feature axis and its width."""
    node = [*network.weights][-1]
    dim = network.features[node][0]
    return node, dim, network.shapes[node][dim]


def _compared(problem: Problem, name: str, view: View) -> list[tuple[int, int]]:
    """Return the pairs of networks whose units of a space are compared."""
    having = [k for k, present in enumerate(problem.present[name]) if present]
    if view.everything:
        return [(i, k) for i in having for k in having if i <= k]
    base = problem.base[name]
    return [(base, k) for k in having if k != base and base in having]


def _pairs(
    visits: dict[Key, list[_Visit]], meters: dict[Key, _Meter]
) -> dict[Pair, dict[str, PairMoments]]:
    pairs: dict[Pair, dict[str, PairMoments]] = {}
    for key, measured in visits.items():
        meter = meters.pop(key)  # of wide networks each takes gigabytes
        for visit in measured:
            moments = meter.pairs[visit.base, visit.network]
            if key[1] is None:
                moments = moments.take(*(a.index[:, 0] for a in visit.axes))
            pairs.setdefault((visit.space, visit.base, visit.network), {})[key[0]] = moments
    return pairs


def _all_unit_by_unit(
    values: Sequence[Any], measured: Sequence[_Visit], counted: Counted
) -> list[Tensor | None]:
    """Return what `_unit_by_unit` does of the networks that are measured, None for others."""
    moved: list[Tensor | None] = [None] * len(values)
    for pair in measured:
        for k, axis in zip((pair.base, pair.network), pair.axes):
            moved[k] = _unit_by_unit(values[k], axis, pair.across, counted)
    return moved


def _unit_by_unit(value: Tensor, axis: Axis, across: tuple[int, ...], counted: Counted) -> Tensor:
    """Return values `(units, positions)`, averaged over the axes `across` of other units.

    Samples and places are the same in all networks, the order of other units is not.
    """
    if across:
        value = value.mean(across, keepdim=True)
    moved = counted.of_units(value, axis.dim).flatten(1)
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
