"""What each contraction of the fused network should give: the mean of the networks' own values.

The target is taken where the effect of a contraction is complete: behind its norm, or, if it ends a
branch, behind the sum with what is already there. Then the contraction has to give what is missing,
and errors do not add up along a stream. Where only an activation reads the target, the mean of the
networks' activations is wanted too, because these are what the next layers mix.

`aims_of` finds what can be refitted and in which order; `Parents` takes the networks over the data
in that order and returns the `Goal` of each contraction.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, fx

from ..calibration.affine import Producer, identify, users_of
from ..calibration.data import Calibration
from ..calibration.distance import scores_node
from ..calibration.norms import foldable_norms
from ..calibration.positions import Positions
from ..calibration.rows import output_rows
from ..calibration.run import Run, Track
from ..calibration.spill import SpillStore
from ..coupling.measure import bypasses
from ..coupling.mixing import Couplings
from ..graph.compare import TOLERANCE
from ..spaces.network import Network
from ._guests import Visits, among


@dataclass(frozen=True, eq=False)
class Goal:
    """What a contraction of the fused network has to give, at a sample of its positions.

    Attributes:
        sample: Which positions.
        shapes: Of the value of each batch, without its units.
        values: `(positions, units)`, the mean of the networks' values where the contraction's
            effect is complete; the fit writes to it.
        activated: The mean of what the networks' activations make of them, if nothing else reads
            them.
    """

    sample: Positions
    shapes: list[tuple[int, ...]]
    values: Tensor
    activated: Tensor | None


class Source(Protocol):
    """Where the goals of contractions come from: networks that run, or what was kept of them."""

    targets: Targets

    def goal(self, aim: Aim) -> Goal:
        """Return what is wanted of a contraction; it can be asked for once."""

    def outputs(self, batch: int) -> list[tuple[float, Any]]:
        """Return the shares and outputs, for a batch, of all networks that have a share."""


class Parents:
    """The networks on their way over the data, ahead of the fused one where a target asks for it.

    Args:
        targets: Mixes their values.
        order: The order in which the fused network's nodes are visited.
        aims: What is to be refitted, by contraction.
        data: Calibration inputs.
        samples: How many of the first ones.
        size: How many of them are one batch.
        store: Where their values wait between stops.
        draw: Chooses positions of a contraction from the number of positions in one sample and
            the way over the samples.
        looks: By node, what to make of all networks just before it, batch by batch; None stands for
            a network without a share.
    """

    def __init__(
        self,
        targets: Targets,
        order: Sequence[fx.Node],
        aims: dict[str, Aim],
        data: Calibration,
        samples: int,
        size: int,
        store: SpillStore,
        draw: Draw,
        looks: Mapping[str, Look],
    ) -> None:
        self.targets, self.draw, self.looks = targets, draw, looks
        couplings = targets.couplings
        networks = couplings.problem.networks
        place = {node.name: i for i, node in enumerate(order)}
        self.tracks: list[Track | None] = []
        for k, (network, bypass) in enumerate(zip(networks, targets.bypasses)):
            nodes = sorted(network.module.graph.nodes, key=lambda n: place[n.name])
            given = network, data, samples, size, nodes, store, bypass
            self.tracks.append(Track(*given) if contributes(couplings, k) else None)
        self.track = next(track for track in self.tracks if track is not None)
        self.visits = Visits(couplings.problem.guests, data, samples, size, store)
        self.place = place
        ends: list[tuple[int, Aim | str]] = [(place[aim.at] + 1, aim) for aim in aims.values()]
        ends += [(place[node], node) for node in looks]
        self.stops = [stop for _, stop in sorted(ends, key=lambda end: end[0])]
        self.goals: dict[str, Goal] = {}  # those that lie before the one asked for last
        self.seen: dict[str, list[Any]] = {}

    def goal(self, aim: Aim) -> Goal:
        """Return what is wanted of a contraction; it can be asked for once."""
        self._go_to(aim.producer.node)
        return self.goals.pop(aim.producer.node)

    def seen_before(self, node: str) -> list[Any]:
        """Return what was made of the networks before a node, batch by batch, once."""
        self._go_to(node)
        return self.seen.pop(node)

    def _go_to(self, name: str) -> None:
        while name not in self.goals and name not in self.seen:
            following = self.stops.pop(0)
            if isinstance(following, str):
                self.seen[following] = self._look(following)
            else:
                self.goals[following.producer.node] = self._go(following)

    def _look(self, node: str) -> list[Any]:
        """Take all networks to a node; return what is made of them there."""
        made = []
        for batch in range(len(self.track.sizes)):
            runs = [None if t is None else t.go(batch, self.place[node])[0] for t in self.tracks]
            made.append(self.looks[node](runs))
            for track in self.tracks:
                if track is not None:
                    track.rest(batch)
        return made

    def _go(self, aim: Aim) -> Goal:
        """Take all networks to where a contraction meets its target, and return that."""
        means: list[Tensor] = []
        activated: list[Tensor] = []
        sample: Positions | None = None
        shapes: list[tuple[int, ...]] = []
        axis = aim.axis_in(self.targets.problem.networks[0])
        for batch, size in enumerate(self.track.sizes):
            stops = [
                (None, None) if t is None else t.go(batch, self.place[aim.at] + 1)
                for t in self.tracks
            ]
            values = self._in_units(aim, [value for _, value in stops])
            one = next(value for value in values if value is not None)
            if sample is None:
                sample = self.draw(aim, one.numel() // (one.shape[axis] * size), self.track)
            shapes.append(tuple(one.movedim(axis, -1).shape[:-1]))
            sample.keep_below(batch, math.prod(shapes[-1]))
            sample.keep(batch, next(run for run, _ in stops if run).counted.among(shapes[-1]))
            at = sample.at[batch]
            rows = [None if value is None else output_rows(value, axis, at) for value in values]
            beside = self.targets.given_beside(aim.at, aim.beside, axis, one.shape, at)
            means.append(self._mixed(aim, rows, beside))
            if aim.activation is not None:
                whole = [value for _, value in stops] if aim.beside else rows
                results = [self._activated(aim, run, r) for (run, _), r in zip(stops, whole)]
                if aim.beside:
                    moved = self._in_units(aim, results)
                    results = [None if v is None else output_rows(v, axis, at) for v in moved]
                activated.append(self._mixed(aim, results, beside))
            for track in self.tracks:
                if track is not None:
                    track.rest(batch)
        assert sample is not None, "there is a batch"
        joined = sample.joined
        goal = Goal(sample, shapes, joined(means), joined(activated) if activated else None)
        told = self.visits.said(aim.at, axis, sample, goal.values)
        among(goal.values, told)
        if goal.activated is not None:
            among(goal.activated, [(share, self._act(aim, said)) for share, said in told])
        return goal

    def _act(self, aim: Aim, rows: Tensor) -> Tensor:
        """Return what the activation behind a contraction makes of values in fused units."""
        track = self.tracks[self.targets.problem.anchor] or self.track
        run, _ = track.go(0, self.place[aim.at] + 1)
        activated = self._activated(aim, run, rows)
        track.rest(0)
        assert activated is not None, "there is an activation"
        return activated

    def _in_units(self, aim: Aim, values: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return values with the units beside those of the contraction in the fused network's."""
        moved = []
        for k, value in enumerate(values):
            for dim in aim.beside:
                if value is not None:
                    value = in_units(self.targets.map_of(aim.at, dim, k), value, dim)
            moved.append(value)
        return moved

    def _mixed(
        self, aim: Aim, rows: Sequence[Tensor | None], beside: Sequence[Tensor] = ()
    ) -> Tensor:
        axis = aim.axis_in(self.targets.problem.networks[0])
        return self.targets.mix(aim.at, aim.producer.weight, axis, rows, -1, beside)

    def _activated(self, aim: Aim, run: Run | None, rows: Tensor | None) -> Tensor | None:
        """Return what the activation behind a contraction makes of one network's values."""
        if run is None or rows is None or aim.activation is None:
            return None
        node = run.network.nodes[aim.activation]
        return run.apply(node, run.network.inputs_of(node)[0], rows)

    def outputs(self, batch: int) -> list[tuple[float, Any]]:
        """Take a batch to the end; return the shares and outputs of all that have a share."""
        problem, guests = self.targets.problem, self.visits.outputs(batch)
        left = 1 - sum(share for share, _ in guests)
        pairs = list(zip(problem.output_weights, self.tracks))
        own = [(left * w, t.go(batch, len(t.order))[1]) for w, t in pairs if t is not None]
        return [(share, value) for share, value in (*own, *guests) if share]


def contributes(couplings: Couplings, k: int) -> bool:
    """Tell whether a network gives values, and not a structure at most."""
    gives = any(c.given.any() for (_, j), c in couplings.maps.items() if j == k)
    problem = couplings.problem
    return bool(problem.weights[k] or problem.output_weights[k] or gives)


@dataclass(frozen=True, eq=False)
class Aim:
    """A contraction of the fused network and where it meets its target.

    Attributes:
        producer: The contraction; its map has a shape but no values.
        at: The node whose value is to be the networks' mean.
        added: If that is a sum, the node that is added to what the contraction gives.
        activation: The activation that alone reads the target, if there is one.
        needs_spread: Whether its units need the target's spread, because no sum, concatenation or
            further linear map reads them.
        shared: Whether its weight is used elsewhere, too, so that all uses are fitted together.
        beside: The axes of its value, counted from the front, along which there are units beside
            those that it writes, as channels are where it mixes tokens.
    """

    producer: Producer
    at: str
    added: str | None
    activation: str | None
    needs_spread: bool
    shared: bool = False
    beside: tuple[int, ...] = ()

    def axis_in(self, network: Network) -> int:
        """Return the axis that holds the units, counted from the front."""
        return self.producer.axis % len(network.shapes[self.producer.node])


class Way(Protocol):
    """The samples that networks are taken over: how many, and the numbers of those in batches."""

    samples: int
    numbers: Sequence[Tensor]


Draw = Callable[[Aim, int, Way], Positions]
Look = Callable[[Sequence[Run | None]], Any]


def aims_of(network: Network) -> tuple[list[fx.Node], dict[str, Aim]]:
    """Return the order in which to refit a network, and what to refit, by contraction.

    Values are computed as early as possible. Contractions come level by level: of two that end in
    one sum, the one behind more others comes last, and gives what the other one lacks.

    Args:
        network: The fused network; its weights do not matter.
    """
    nodes = list(network.module.graph.nodes)
    producers, sums = _survey(network)
    order = sweep_order(network, set(producers))
    if not _same_function(network, order):
        order = nodes
    place = {node.name: i for i, node in enumerate(order)}
    aims = {}
    for name, producer in producers.items():
        at, added = sums.get(name, (producer.joint, None))
        if added is not None and place[added] > place[name]:
            at, added = producer.joint, None
        spread = added is None and _needs_spread(network, producer.joint)
        shared = len(users_of(network, producer.weight)) > 1
        others = _beside(network, producer)
        aims[name] = Aim(producer, at, added, _activation(network, at), spread, shared, others)
    return order, aims


def sweep_order(network: Network, producers: set[str]) -> list[fx.Node]:
    """Order nodes so that contractions come level by level, all else as soon as it can."""
    fed, graph = network.fed(), list(network.module.graph.nodes)
    level: dict[fx.Node, int] = {}
    for node in graph:
        level[node] = max((level[n] for n in node.all_input_nodes), default=0)
        level[node] += node.name in producers
    constants = [n for n in graph if n.name not in fed and n.op != "output"]
    order: dict[fx.Node, None] = dict.fromkeys(constants)  # some are made from others, in place
    waiting = [n for n in graph if n not in order]
    while waiting:
        ready = (n for n in waiting if all(i in order for i in n.all_input_nodes))
        best = min(ready, key=lambda n: (n.op == "output", n.name in producers and level[n]))
        waiting.remove(best)
        order[best] = None
    return list(order)


def _same_function(network: Network, order: Sequence[fx.Node]) -> bool:
    """Tell whether another order changes no value; it does where values are written in place."""
    sizes: list[dict[str, float]] = []
    for nodes in (list(network.module.graph.nodes), order):
        run = Run(network, network.example, order=nodes)
        sizes.append({})
        with torch.no_grad():
            for node in nodes:
                value = run.step(node)
                if isinstance(value, Tensor) and value.is_floating_point():
                    sizes[-1][node.name] = float(value.double().abs().sum())
    return all(abs(v - sizes[1][n]) <= TOLERANCE * abs(v) for n, v in sizes[0].items())


def _survey(network: Network) -> tuple[dict[str, Producer], dict[str, tuple[str, str]]]:
    """Find what can be refitted, and the sums that it ends in, in one run of the example.

    Returns:
        The contractions; for those that end in a sum, this sum and the node that it adds to them.
    """
    folded = {producer: norm for norm, producer in foldable_norms(network).items()}
    run = Run(network, network.example)
    producers: dict[str, Producer] = {}
    holds: dict[str, str] = {}  # node -> the contraction whose value it alone hands on
    sums: dict[str, tuple[str, str]] = {}
    with torch.no_grad():
        for node in network.module.graph.nodes:
            inputs = network.inputs_of(node)
            before = [run.value_of(n.name) for n in inputs]
            if _is_sum(network, node):
                before = [value.clone() for value in before]  # it may be written in place
            value = run.step(node)
            alone = [n.name for n in inputs if len(n.users) == 1]
            if _may_be_refitted(network, node, before, value):
                both = before[0].double(), value.double()
                producer = identify(network, node, *both, shared=True)
                if producer is not None and producer.norm == folded.get(node.name):
                    producers[node.name] = _without_values(producer)
                    holds[node.name] = node.name
            elif len(alone) == len(inputs) == 1 and alone[0] in holds:
                if network.is_idle(node) or producers[holds[alone[0]]].norm == node.name:
                    holds[node.name] = holds[alone[0]]
            elif _is_sum(network, node) and _adds(before, value):
                for part, other in (inputs, inputs[::-1]):
                    if part.name in alone and part.name in holds:
                        sums[holds[part.name]] = node.name, other.name
    return producers, {n: ends for n, ends in sums.items() if producers[n].joint in holds}


def _is_sum(network: Network, node: fx.Node) -> bool:
    return network.adds(node) and len(network.inputs_of(node)) == 2


def _adds(parts: Sequence[Tensor], value: Tensor) -> bool:
    if not all(part.shape == value.shape for part in parts):
        return False
    scale = max(float(t.abs().max()) for t in (*parts, value)) if value.numel() else 0.0
    return bool((value - parts[0] - parts[1]).abs().max() <= TOLERANCE * scale)


def _may_be_refitted(
    network: Network, node: fx.Node, inputs: Sequence[object], value: object
) -> bool:
    """Tell whether a node contracts a parameter.

    What has units along the samples' axis, beside others, is left alone. So is a weight that is
    computed from a parameter, and a part that may compute something else on other inputs.
    """
    if network.is_opaque(node):
        return False
    tensors = [t for t in (*inputs, value) if isinstance(t, Tensor) and t.is_floating_point()]
    if node.name not in network.weights or len(inputs) != 1 or len(tensors) != 2:
        return False
    assert isinstance(value, Tensor), "there is one input"
    if any(n.op != "get_attr" for n in node.all_input_nodes if not network.carries_data(n)):
        return False
    dims = {dim % value.dim() for dim in network.features.get(node.name, ())}
    return len(dims) <= 1 or 0 not in dims


def _beside(network: Network, producer: Producer) -> tuple[int, ...]:
    """Return the axes along which a contraction's value has units that it does not write."""
    dims = len(network.shapes[producer.node])
    axes = {dim % dims for dim in network.features.get(producer.node, ())}
    return tuple(sorted(axes - {producer.axis % dims}))


def _without_values(producer: Producer) -> Producer:
    """Keep the shape of a producer's map only: values of wide networks take gigabytes."""
    empty = torch.zeros(()).expand(producer.affine.weight.shape)
    return replace(producer, affine=replace(producer.affine, weight=empty, bias=None))


def _activation(network: Network, name: str) -> str | None:
    """Return the activation that alone reads a node, if there is one."""
    node = network.nodes[name]
    while len(node.users) == 1:
        node = next(iter(node.users))
        if network.is_activation(node):
            return node.name
        if not network.is_idle(node):
            return None
    return None


def _needs_spread(network: Network, joint: str) -> bool:
    """Tell whether no sum, concatenation, norm or further contraction reads a node directly."""
    waiting = [network.nodes[joint]]
    while waiting:
        for user in waiting.pop().users:
            if network.is_idle(user):
                waiting.append(user)
            linear = network.joins(user) or network.is_norm(user)
            if linear or user.op == "output" or user.name in network.weights:
                return False
            if network.adds(user) and len(network.inputs_of(user)) > 1:
                return False
    return True


class Targets:
    """Mixes the networks' values at a node, each carried into the fused network's units.

    Args:
        couplings: The maps of the networks.
    """

    def __init__(self, couplings: Couplings) -> None:
        self.couplings = couplings
        self.problem = problem = couplings.problem
        self.mute = [{n for a in absent for n in a.mute} for absent in problem.absent]
        self.bypasses = bypasses(problem)
        self.outputs = behind_contractions(problem.structure)
        shares = zip(problem.weights, problem.output_weights, problem.far_wider)
        apart = any(far and out and not w for w, out, far in shares) or bool(problem.guests)
        self.scores = {scores_node(problem.structure)} if apart else set()
        self.maps: dict[tuple[str, int, int], Tensor] = {}  # of the last node only

    def fits(self, node: str, dim: int) -> bool:
        """Tell whether every network has the fused network's spaces along an axis of a node."""
        networks = self.problem.networks
        shown = [n.spaces.feature_places.get((node, dim), ()) for n in networks]
        for k, places in enumerate(shown):
            wanted = [self.problem.spaces[s.name][k] for s, _ in shown[self.problem.anchor]]
            if not {s.name for s in wanted if s.size} <= {s.name for s, _ in places}:
                return False
        return all(len(n.shapes.get(node, ())) > dim for n in networks)

    def mix(
        self,
        node: str,
        weight: str,
        dim: int,
        values: Sequence[Tensor | None],
        axis: int | None = None,
        beside: Sequence[Tensor] = (),
    ) -> Tensor:
        """Return the target at a node.

        A network does not count inside a branch that it lacks, except for tensors that are zero
        because it lacks the branch. Where its value passes by the branch, it counts.

        Args:
            node: The node.
            weight: The weight of the contraction whose target it is.
            dim: The feature axis.
            values: Each network's value there, None where it has none.
            axis: The feature axis of the values given, if not `dim`.
            beside: If there are units along other axes, what each network gives at each position.
        """
        axis = dim if axis is None else axis
        shares, total = self.shares(node, weight, values), None
        for k, (share, value) in enumerate(zip(shares, values)):
            if share and value is not None:
                part = in_units(self.map_of(node, dim, k), value, axis).mul_(share)
                total = part if total is None else total.add_(part)
        assert total is not None, "some network has a share"
        mass = torch.as_tensor(self.mass(node, dim, shares, [b.cpu().numpy() for b in beside]))
        total.movedim(axis, -1).div_(mass.to(total))
        return total

    def map_of(self, node: str, dim: int, k: int) -> Tensor:
        """Return the map into the fused network's units; an index where it only picks units."""
        if (node, dim, k) not in self.maps:
            self.maps = {key: m for key, m in self.maps.items() if key[0] == node}
            matrix = self.couplings.feature_map(node, dim, k)
            picks = (matrix.data == 1).all() and (np.diff(matrix.indptr) == 1).all()
            self.maps[node, dim, k] = torch.as_tensor(matrix.indices if picks else matrix.toarray())
        return self.maps[node, dim, k]

    def shares(self, node: str, weight: str, values: Sequence[Tensor | None]) -> list[float]:
        """Return each network's share in the target; equal ones if those with a share lack it."""
        last = node in self.outputs
        weights = self.problem.output_weights if last else self.problem.weights
        lacks = zip(self.mute, self.problem.lacking)
        absent = [node in mute and weight in tensors for mute, tensors in lacks]
        shares = [0.0 if gone else w for gone, w in zip(absent, weights)]
        if any(v is not None and s > 0 for v, s in zip(values, shares)):
            return shares
        return [float(v is not None) for v in values]

    def mass(
        self, node: str, dim: int, shares: Sequence[float], beside: Sequence[np.ndarray] = ()
    ) -> np.ndarray:
        """Return the share of the networks that give something to the unit at each position.

        Args:
            node: The node.
            dim: The feature axis.
            shares: Of the networks.
            beside: If there are units along other axes, what each network gives at each of some
                positions; the result then has a row for each of these.
        """
        parts = [share * self._given(node, dim, k) for k, share in enumerate(shares)]
        mass = np.sum([np.multiply.outer(*both) for both in zip(beside, parts)] or parts, 0)
        return np.where(mass > 0, mass, 1.0)

    def given_beside(
        self, node: str, dims: Sequence[int], axis: int, shape: Sequence[int], at: Tensor
    ) -> list[Tensor]:
        """Return what each network gives at positions, `(positions,)`; nothing without `dims`.

        Args:
            node: The node.
            dims: The axes along which there are units beside those of the feature axis.
            axis: The feature axis.
            shape: Of the node's value.
            at: The positions.
        """
        found = []
        for k in range(len(self.problem.networks) if dims else 0):
            given = torch.ones(()).double()
            for dim in dims:
                along = torch.as_tensor(self._given(node, dim, k))
                given = given * along.view([-1 if d == dim else 1 for d in range(len(shape))])
            whole = given.expand([1 if d == axis else size for d, size in enumerate(shape)])
            found.append(output_rows(whole, axis, at.cpu())[:, 0])
        return found

    def _given(self, node: str, dim: int, k: int) -> np.ndarray:
        """Return how much of each unit along an axis of a node a network gives."""
        base = self.problem.structure
        given = np.ones(base.shapes[node][dim])
        for space, axis in base.spaces.feature_places.get((node, dim), ()):
            given[axis.index] = self.couplings.maps[space.name, k].given[:, None]
        return given


def behind_contractions(network: Network) -> set[str]:
    """Return the nodes whose values reach the outputs through no further contraction."""
    before: set[fx.Node] = set()
    for node in reversed(network.module.graph.nodes):
        if node in before or node.name in network.weights:
            before.update(node.all_input_nodes)
    return {node.name for node in network.module.graph.nodes if node not in before}


def in_units(units: Tensor, value: Tensor, dim: int) -> Tensor:
    """Return a copy of values in other units: picked by an index, or mixed by a matrix."""
    if units.dim() == 1:
        return value.index_select(dim, units.to(value.device))
    return (value.movedim(dim, -1) @ units.T.to(value)).movedim(-1, dim)
