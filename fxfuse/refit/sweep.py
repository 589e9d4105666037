"""Refit every contraction of the fused network in one forward sweep, by ridge least squares.

All networks advance together. Each contraction is fitted, at a sample of its positions, on what the
fused network really feeds it, corrected as it is up to there: first to the mean of the parents'
values, then to the mean of their activations. Then its units get back the spread that averaging
takes from them, where something non-linear reads them.

References:
    Jin et al. 2023 (RegMean): least squares to the parents' own layers, on their own inputs.
    Difference: inputs are the fused network's, targets the mean in matched units, and a layer that
    writes a residual stream is fitted to what the stream is missing.
    Jordan et al. 2023 (REPAIR) for the spread.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, fx

from .._progress import part, tell
from .._ranks import total_of
from ..calibration.affine import Affine
from ..calibration.data import Calibration
from ..calibration.distance import divergence, is_logits
from ..calibration.least_squares import Correction, Regression
from ..calibration.moments import Moments, mean_of_rows, moments_of_rows
from ..calibration.norms import write_norm, write_statistics
from ..calibration.positions import Positions, draw_positions
from ..calibration.rows import (
    in_groups,
    input_rows,
    output_rows,
    rows_as_weight,
    weight_as_rows,
)
from ..calibration.run import Run, Track, working_batch
from ..calibration.spill import SpillStore
from ..coupling.mixing import Couplings
from ..coupling.problem import Problem
from ..graph.state import tensor_at
from ..ir import LayerFit
from ..spaces.network import OPEN, Network
from ._guests import Visits
from ._inside import Inside, Wanted, inner_nodes
from ._kept import Informed, KeptParents, KeptRows
from ._scores import Scores
from ._shared import SharedFits
from ._targets import Aim, Draw, Goal, Parents, Source, Targets, Way, aims_of
from .emit import NormPlan, WeightPlan, outputs_to_settle, scale_units
from .moments import Outcome, Refit, gain_of, left_at_mean, settle_norm, settle_weight

ROUNDING = 1e-5  # share of its root mean square by which a target that is met may be missed
FURTHEST_START = 0.5  # share of the variance of a unit's activation that its start may miss
USUAL_ROWS = 16  # positions per weight of a unit that any contraction may have
ROWS_OF_SCORES = 256  # the same, where class scores are fitted by their divergence
FEWEST_ROWS = 2  # the same, however long their products take
QUICK = 3 << 30  # multiply-adds that the products of inputs may take where there are more positions
FEWEST_POSITIONS = 256  # to take moments of, where there is memory for few products only


class Fit:
    """A contraction whose weight is being fitted, in place.

    Args:
        network: The fused network.
        aim: The contraction.
        goal: What is wanted of it; its values are written to.
        x: What it reads at these positions, `(groups, positions, inputs)`; written to.
        added: What is added to its own value, if that is part of a sum.
        activation: What the activation behind it makes of values.
        ridges: See `LeastSquares`.
    """

    def __init__(
        self,
        network: Network,
        aim: Aim,
        goal: Goal,
        x: Tensor,
        added: Tensor | None,
        activation: Callable[[Tensor], Tensor],
        ridges: Sequence[float],
    ) -> None:
        self.network, self.aim, self.goal, self.ridges = network, aim, goal, ridges
        self.x, self.added, self.activation = x, added, activation
        self.producer, self.biased = aim.producer, aim.producer.biased
        self.origin = mean_of_rows(x, 1) * self.biased
        x.sub_(self.origin)
        sample = goal.sample
        facts = sum(sample.fit), self.biased, sample.dual_every, sample.order
        self.regression = Regression(x, *facts)
        self.values = self._given(self._weight())  # but for a constant

    def __call__(self, steps: int) -> Correction:
        """Fit; return the last correction.

        Args:
            steps: Corrections by the results of the activation, if there is one.
        """
        targets, activated = self.goal.values, self.goal.activated
        if activated is not None:
            self._revive(targets, activated)
        self.whole = whole = moments_of_rows(targets)
        if self.added is not None:
            targets = targets.sub_(self.added)
        wanted, given = moments_of_rows(targets), moments_of_rows(self.values)
        gain = self._gain(wanted, given)
        self._scale(gain)
        shift = (wanted.mean - gain * given.mean) * self.biased
        left = targets.sub_(self.values).sub_(_row(shift, targets))
        correction = self._correct(left, whole, activated is None or not steps)
        mean = wanted.mean
        if activated is not None:
            correction, mean = self._descend(activated, correction, mean, steps)
        self._complete(wanted, mean)
        return correction

    def _revive(self, targets: Tensor, activated: Tensor) -> None:
        """Aim units at their mean activation where their mean value is far from giving it.

        The mean of a unit that never fires and one that does can be one that never fires.
        """
        missed = moments_of_rows(activated - self.activation(targets)).rms ** 2
        lost = np.flatnonzero(missed > FURTHEST_START * moments_of_rows(activated).variance)
        if len(lost):
            units = torch.as_tensor(lost, device=targets.device)
            targets.index_copy_(1, units, activated.index_select(1, units))

    def _descend(
        self, activated: Tensor, correction: Correction, mean: np.ndarray, steps: int
    ) -> tuple[Correction, np.ndarray]:
        """Correct further by what the activation's results lack, as the next layers read these.

        An activation with slopes between 0 and 1 is the gradient of a convex function. The loss
        that is matched to it is convex too, and the curvature of the plain regression bounds that
        of the loss. So each step of the plain regression descends.
        """
        self.whole = moments_of_rows(activated)
        for step in range(steps):
            shift = (mean - moments_of_rows(self.values).mean) * self.biased
            value = self.values + _row(shift, self.values)
            if self.added is not None:
                value += self.added
            left = activated - self.activation(value)
            mean = mean + moments_of_rows(left).mean * self.biased
            correction = self._correct(left, self.whole, step == steps - 1)
            if correction.weight is None:
                break
        return correction, mean

    def _correct(self, left: Tensor, whole: Moments, last: bool) -> Correction:
        """Fit what is left to explain, unless that is nothing but rounding.

        After the last correction, values are followed only where their spread still counts.
        """
        least = ROUNDING**2 * float((whole.rms**2).sum())
        left = in_groups(left, self.producer.affine.groups)
        correction = self.regression.correct(left, self.ridges, least)
        if correction.weight is not None:
            weight = tensor_at(self.network.module, self.producer.weight)
            added = rows_as_weight(correction.weight, self.producer.affine.kernel)
            weight.data.add_((added.T if self.producer.transposed else added).to(weight))
            if self.aim.needs_spread or not last:
                self.values += self._given(correction.weight)
        return correction

    def _given(self, weight: Tensor) -> Tensor:
        """Return what a weight `(groups, inputs, out / groups)` gives, `(positions, units)`."""
        return (self.x @ weight.to(self.x)).transpose(0, 1).flatten(1)

    def _weight(self) -> Tensor:
        weight = tensor_at(self.network.module, self.producer.weight).detach()
        weight = weight.T if self.producer.transposed else weight
        return weight_as_rows(weight, self.producer.affine)

    def _scale(self, gain: np.ndarray) -> None:
        """Scale the units that the contraction writes."""
        module, producer = self.network.module, self.producer
        scale_units(tensor_at(module, producer.weight), gain, int(producer.transposed))
        if producer.bias is not None:
            scale_units(tensor_at(module, producer.bias), gain, 0)
        self.values.mul_(_row(gain, self.values))

    def _complete(self, wanted: Moments, mean: np.ndarray) -> None:
        """Give the units a mean, and the target's spread where that counts."""
        producer, module = self.producer, self.network.module
        given = moments_of_rows(self.values)  # the last correction adds nothing to their means
        gain = self._gain(wanted, given) if self.aim.needs_spread else np.ones_like(given.mean)
        if producer.norm is not None:
            given.shift = given.shift + self._offset().to(given.shift)
            write_norm(module, producer.roles, gain, mean, given.mean, given.variance)
            return
        self._scale(gain)
        if producer.bias is not None:
            shift = mean - gain * given.mean
            bias = tensor_at(module, producer.bias)
            offset = self._offset() - bias.detach().double()
            bias.data.copy_(torch.as_tensor(shift).to(offset) - offset)

    def _offset(self) -> Tensor:
        """Return what the contraction adds to the values held here, `(units,)`."""
        moved = self.origin.double() @ self._weight().double()
        offset = moved.transpose(0, 1).flatten()
        if self.producer.bias is not None:
            offset = offset + tensor_at(self.network.module, self.producer.bias).detach().double()
        return offset

    @property
    def affine_map(self) -> Tensor:
        """The weight of one group, and the bias as its last row, if there is one."""
        weight = self._weight()[0].double()
        bias = self.producer.bias
        if bias is None:
            return weight
        shift = tensor_at(self.network.module, bias).detach().double()
        return torch.cat([weight, shift[None]])

    @affine_map.setter
    def affine_map(self, value: Tensor) -> None:
        producer, module = self.producer, self.network.module
        inputs = len(value) - (producer.bias is not None)
        weight = tensor_at(module, producer.weight)
        rows = rows_as_weight(value[None, :inputs], producer.affine.kernel)
        weight.data.copy_(rows.T if producer.transposed else rows)
        if producer.bias is not None:
            tensor_at(module, producer.bias).data.copy_(value[inputs])

    def _gain(self, wanted: Moments, given: Moments) -> np.ndarray:
        one = np.ones_like(given.mean)
        if self.biased:
            return gain_of(wanted.spread, given.spread, one, wanted.rms)
        return gain_of(wanted.rms, given.rms, one)


def _row(units: np.ndarray, rows: Tensor) -> Tensor:
    return torch.as_tensor(units).to(rows)


@dataclass(frozen=True)
class LeastSquares(Refit):
    """Refit every contraction by ridge least squares while sweeping forward.

    Siblings (`Transport(by_index=True)`) stay at their mean, and only norms are measured anew.
    Class scores that a far wider network has a share in alone are fitted by their divergence.
    Several contractions in one node (recurrent cells, attention in one module) are fitted one after
    another (see `_inside`); what cannot be gets the parents' moments as in `MatchMoments`. A weight
    used in several places gets one fit for all (see `_shared`).

    Attributes:
        ridges: Strengths with which weights are drawn to the coupled ones, relative to the mean
            variance of what they read. A held-out quarter of the samples chooses, downhill from the
            middle one, and may choose to leave the coupled weights as they are.
        rows: Positions used per weight of a unit, at most; more cost time, and help where one
            network is to hold what several do. Beyond 2, no more than are quickly worked on.
        steps: Corrections by the results of an activation, where one reads the values.
        frontier: Bytes of memory for the values of all networks and samples that are still to be
            read; what exceeds them lies in a temporary file. Where the networks' values at all
            fitted positions take no more than half of it, they are kept while units are measured,
            and the networks do not run again.
        gram: Bytes for the products of a contraction's inputs with each other; the default is
            enough for 1,448 inputs. Where there are more inputs, or more than positions, the
            products of as many positions are taken instead. The inputs themselves may take 32
            times as much.
        only_outputs: Fit the contractions that write the outputs, and leave all else as it is.
    """

    fits: ClassVar[bool] = True
    ridges: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    rows: int = USUAL_ROWS
    steps: int = 1
    frontier: int = 1 << 29
    gram: int = 1 << 24
    only_outputs: bool = False

    @property
    def of_outputs(self) -> LeastSquares:
        """The same, for the contractions that write the outputs alone."""
        return replace(self, only_outputs=True)

    def settles(self, problem: Problem) -> dict[str, int]:
        """Return the nodes whose moments are wanted: those that cannot be refitted."""
        network, targets = problem.structure, Targets(Couplings(problem, {}))
        return _not_fitted(network, replace(self, only_outputs=False)._aims(network, targets)[1])

    def samples(self, networks: Sequence[Network]) -> int:
        """Return how many samples may be live at once: any number."""
        return sys.maxsize

    def __call__(
        self,
        fused: Network,
        couplings: Couplings,
        plans: Sequence[NormPlan | WeightPlan],
        data: Calibration,
        samples: int,
        kept: KeptRows | None = None,
    ) -> Outcome:
        """Refit in place; see `Refit`."""
        apart = OPEN in fused.module.graph.output_node().meta or couplings.problem.guests
        if couplings.siblings and not apart:
            return left_at_mean(fused, couplings, plans, data, samples)
        with data.first(samples).summed():
            return self._refit(fused, couplings, plans, data, samples, kept)

    def keeps(self, problem: Problem, data: Calibration, samples: int) -> KeptRows | None:
        """Return what keeps the networks' values at all targets, if memory is enough."""
        if self.only_outputs:
            return None
        targets, size = Targets(Couplings(problem, {})), working_batch(problem.networks)
        order, aims = self._aims(problem.structure, targets)
        names, draw = [node.name for node in order], self._draw_for(targets)
        # rows beside other units are matched once these are coupled; inside nodes nothing is kept
        if any(a.beside for a in aims.values()) or inner_nodes(problem.structure, aims):
            return None
        budget, settles = self.frontier // 2, _not_fitted(problem.structure, aims)
        kept = KeptRows(problem, names, aims, settles, data.first(samples), size, draw, budget)
        return kept if kept.promising else None

    def using(self, kept: Any) -> Refit:
        """Return the same, with values that were kept."""
        return Informed(self, partial(self, kept=kept))

    def _draw_for(self, targets: Targets) -> Draw:
        """Return what chooses positions, more of them for class scores."""
        many = replace(self, rows=max(self.rows, ROWS_OF_SCORES))

        def draw(aim: Aim, places: int, way: Way) -> Positions:
            method = many if aim.producer.node in targets.scores else self
            return method.draw(aim, places, way)

        return draw

    def _refit(
        self,
        fused: Network,
        couplings: Couplings,
        plans: Sequence[NormPlan | WeightPlan],
        data: Calibration,
        samples: int,
        kept: KeptRows | None = None,
    ) -> Outcome:
        targets = Targets(couplings)
        if kept is None or not kept.serves(fused, targets.problem):
            kept = None
            order, aims = self._aims(fused, targets)
        else:
            order, aims = [fused.nodes[name] for name in kept.order], dict(kept.aims)
        size = working_batch([fused, *targets.problem.networks])
        given = data, samples, size
        shared = SharedFits(fused, self.ridges)
        inner = [] if self.only_outputs or couplings.problem.guests else inner_nodes(fused, aims)
        looks = {node: Wanted(targets, node, -(-samples // size)) for node in inner}

        def once(wanted: dict[str, Aim]) -> _Sweep:
            if kept is None:
                draw = self._draw_for(targets)
                parents: Source = Parents(targets, order, wanted, *given, store, draw, looks)
            else:
                visits = Visits(targets.problem.guests, *given, store)
                parents = KeptParents(targets, kept, visits, again=wanted is not alone)
            track = Track(fused, *given, order, store)
            waiting = {p.node: p for p in plans}
            sweep = _Sweep(self, fused, parents, track, waiting, shared, looks)
            for done, node in enumerate(order):
                sweep.visit(done, node, wanted.get(node.name))
                tell((done + 1) / len(order))
            return sweep

        memory = self.frontier - (0 if kept is None else kept.nbytes)
        alone, fits = {name: aim for name, aim in aims.items() if not aim.shared}, []
        with torch.no_grad():
            if len(alone) < len(aims):
                with SpillStore(memory) as store, part(0.0, 0.5):
                    once(aims)
                fits = shared.solve()
            with SpillStore(memory) as store, part(0.5 * (len(alone) < len(aims)), 1.0):
                sweep = once(alone)
                divergence = sweep.finish()
        return Outcome((*sweep.layers, *fits), divergence)

    def _aims(self, network: Network, targets: Targets) -> tuple[list[fx.Node], dict[str, Aim]]:
        """Return the order of the sweep, and what can be refitted."""

        def can(aim: Aim) -> bool:
            ends = aim.at, aim.producer.joint
            apart = aim.beside and targets.problem.guests  # these have no units along other axes
            if apart or (self.only_outputs and aim.producer.node not in targets.outputs):
                return False
            dims = aim.axis_in(network), *aim.beside
            return all(targets.fits(node, dim) for node in ends for dim in dims)

        order, aims = aims_of(network)
        return order, {name: aim for name, aim in aims.items() if can(aim)}

    def draw(self, aim: Aim, places: int, way: Way) -> Positions:
        """Choose the positions at which a contraction is fitted."""
        budget = self.rows_for(aim.producer.affine, places * way.samples)
        return draw_positions(places, way.numbers, way.samples, *budget)

    def rows_for(self, affine: Affine, positions: int) -> tuple[int, int]:
        """Return how many positions to draw, and `dual_every` of their `Regression`.

        Args:
            affine: The contraction.
            positions: How many there are.
        """
        inputs, budget = affine.weight.shape[1:].numel(), self.gram // affine.groups
        affordable = 32 * budget // (4 * inputs)  # positions whose inputs can be held
        if 8 * inputs**2 <= budget and inputs <= positions:
            quick = max(FEWEST_ROWS * inputs, QUICK // (affine.groups * inputs**2))
            return min(self.rows * inputs, quick, affordable, positions), 0
        equations = max(min(math.isqrt(budget // 8), affordable, positions), 1)
        count = min(max(min(2 * equations, affordable), FEWEST_POSITIONS), positions)
        return count, -(-count // equations)


def _not_fitted(network: Network, aims: dict[str, Aim]) -> dict[str, int]:
    """Return the nodes that would be fitted if they could be, with their feature axis."""
    fitted = {n for a in aims.values() for n in (a.producer.node, a.producer.joint)}
    return {n: d for n, d in outputs_to_settle(network).items() if n not in fitted}


def _scores_of(aim: Aim, goal: Goal, x: Tensor) -> Scores:
    """Return copies of what a layer reads, `(1, rows, inputs)`, and of the scores wanted."""
    biased = aim.producer.bias is not None
    rows = torch.cat([x[0].double(), x.new_ones(x.shape[1], int(biased)).double()], 1)
    return Scores(rows, goal.values.double().clone(), sum(goal.sample.fit), biased)


@dataclass(eq=False)
class _Sweep:
    """The fused network on its way over the data.

    Attributes:
        method: The options.
        fused: The fused network.
        parents: The networks that it is made of.
        track: Takes the fused network from node to node.
        waiting: The plans that are still to be settled, by node.
        shared: Gathers what is to be fitted together.
        inside: What is wanted of the weights inside nodes that contract several.
        layers: What was refitted so far.
        read: Norms of which the statistics of what they read are measured next, by contraction.
    """

    method: LeastSquares
    fused: Network
    parents: Source
    track: Track
    waiting: dict[str, NormPlan | WeightPlan]
    shared: SharedFits
    inside: Mapping[str, Wanted]
    layers: list[LayerFit] = field(default_factory=list)
    read: dict[str, tuple[Aim, Moments]] = field(default_factory=dict)

    def visit(self, place: int, node: fx.Node, aim: Aim | None) -> None:
        """Refit or settle a node, before it is stepped over."""
        plan = self.waiting.pop(node.name, None)
        if node.name in self.inside and isinstance(self.parents, Parents):
            self._refit_inside(place, node, self.parents)
        if aim is not None and self._refit(place, node, aim):
            self.waiting.pop(aim.producer.joint, None)
        elif isinstance(plan, NormPlan):
            settle_norm(self.fused, plan, self._moments(place, plan))
        elif plan is not None:
            settle_weight(self.fused, plan, self._moments(place, plan))

    def _go(self, place: int, show: Callable[[int, Run], None]) -> None:
        """Take all batches to a place in the order, and show each there."""
        for batch in range(len(self.track.sizes)):
            run, _ = self.track.go(batch, place, self._watch)
            show(batch, run)
            self.track.rest(batch)
        for aim, moments in self.read.values():
            write_statistics(self.fused.module, aim.producer.roles, moments.summed())
        self.read = {}

    def _watch(self, run: Run, node: fx.Node, value: Any) -> None:
        """Add to the moments of what a norm reads, if they are to be its statistics."""
        if node.name in self.read:
            aim, moments = self.read[node.name]
            moments.add(run.counted.of_units(value, aim.axis_in(self.fused)))

    def _moments(self, place: int, plan: NormPlan | WeightPlan) -> Moments:
        """Return the moments of what a node reads, if it is a norm, or gives."""
        moments, node = Moments(), self.track.order[place]

        def show(_: int, run: Run) -> None:
            if isinstance(plan, NormPlan):
                moments.add(run.counted.of_units(run.value_of(plan.reads), 1))
            else:
                moments.add(run.counted.of_units(run.peek(node), plan.axis))

        self._go(place, show)
        return moments.summed()

    def _refit(self, place: int, node: fx.Node, aim: Aim) -> bool:
        """Refit one contraction; tell whether that could be done."""
        start = time.perf_counter()
        goal = self.parents.goal(aim)
        read = self._read_at(place, node, aim, goal)
        if read is None or not len(goal.values):  # also of fewer values than there are samples
            return False
        if aim.shared:
            self.shared.add(aim, goal, *read)
            return False
        scores = _scores_of(aim, goal, read[0]) if self._gives_scores(aim) else None
        fit = Fit(self.fused, aim, goal, *read, partial(self._act, place, aim), self.method.ridges)
        own = fit.affine_map if scores else None
        correction = fit(self.method.steps)
        if scores and own is not None:
            fit.affine_map = scores.nearest((own, fit.affine_map), self.method.ridges)
        power = fit.whole.variance if aim.producer.biased else fit.whole.rms**2
        if power.sum() > 0:
            explained = 1 - correction.error / float(power.sum())
            took = time.perf_counter() - start
            self.layers.append(LayerFit(node.name, explained, correction.ridge, took))
        if aim.producer.norm is not None:
            self.read[node.name] = aim, Moments()
        return True

    def _refit_inside(self, place: int, node: fx.Node, parents: Parents) -> None:
        """Refit the weights inside a node that contracts several."""
        start, wanted = time.perf_counter(), parents.seen_before(node.name)
        self._go(place, lambda batch, run: None)

        def runs() -> Iterator[tuple[int, Run]]:
            for batch in range(len(self.track.sizes)):
                yield batch, self.track.go(batch, place)[0]
                self.track.rest(batch)

        facts = node, wanted, self.inside[node.name].keep, runs, self.method.ridges
        fit = Inside(self.fused, *facts)()
        self.layers += [replace(fit, seconds=time.perf_counter() - start)] if fit else []

    def _gives_scores(self, aim: Aim) -> bool:
        """Tell whether a layer gives class scores that are to be fitted by their divergence."""
        node, plain = aim.producer.node, aim.added is None and aim.producer.affine.groups == 1
        return node == aim.at and node in self.parents.targets.scores and plain

    def _read_at(
        self, place: int, node: fx.Node, aim: Aim, goal: Goal
    ) -> tuple[Tensor, Tensor | None] | None:
        """Return what a contraction reads and what is added to it, at the goal's positions.

        None if it gives values of another shape than the parents.
        """
        affine, axis = aim.producer.affine, aim.axis_in(self.fused)
        source = self.fused.inputs_of(node)[0].name
        inputs: list[Tensor] = []
        added: list[Tensor] = []

        def show(batch: int, run: Run) -> None:
            x, at = run.value_of(source), goal.sample.at[batch]
            spatial = affine.output_sizes(tuple(x.shape[2:]))
            places = (len(x), *spatial) if affine.kernel else x.shape[:-1]
            if tuple(places) == goal.shapes[batch]:
                inputs.append(input_rows(x, affine, at))
                added.extend([output_rows(run.value_of(aim.added), axis, at)] if aim.added else [])

        self._go(place, show)
        if len(inputs) < len(goal.shapes):
            return None
        return goal.sample.joined(inputs), goal.sample.joined(added) if added else None

    def _act(self, place: int, aim: Aim, value: Tensor) -> Tensor:
        """Return what the activation behind a contraction makes of values."""
        node = next(n for n in self.track.order if n.name == aim.activation)
        run, _ = self.track.go(0, place)
        activated = run.apply(node, self.fused.inputs_of(node)[0], value)
        self.track.rest(0)
        return activated

    def finish(self) -> float | None:
        """Go to the end; return the mean divergence from the ensemble, if outputs can be logits."""
        end, apart = len(self.track.order) - 1, [0.0]
        output = self.track.order[end]
        closed = OPEN not in self.fused.module.graph.output_node().meta

        def show(batch: int, run: Run) -> None:
            logits = run.peek(output)
            if not closed or not is_logits(logits) or math.isnan(apart[0]):
                apart[0] = math.nan
                return
            mean: Tensor = sum(w * t.double() for w, t in self.parents.outputs(batch))
            apart[0] += divergence(mean, logits)

        self._go(end, show)
        missed = total_of(apart[0])
        return None if math.isnan(missed) else missed / self.track.samples
