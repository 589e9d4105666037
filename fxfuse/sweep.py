"""Refit every contraction of the fused network in one forward sweep, by ridge least squares.

All networks advance together. Each contraction is fitted to the mean of the parents' values on what
the fused network really feeds it, corrected as it is up to there; then its units get back the
spread that averaging takes from them, where something non-linear reads them.

References:
    Jin et al. 2023 (RegMean): least squares to the parents' own layers, on their own inputs.
    Difference: inputs are the fused network's, targets the mean in matched units, and a layer that
    writes a residual stream is fitted to what the stream is missing.
    Jordan et al. 2023 (REPAIR) for the spread.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from .composition import Affine
from .data import Calibration
from .emit import NormPlan, WeightPlan, outputs_to_settle
from .fitting import Fit, Task
from .frontier import Frontier, Track
from .interpreter import OPEN
from .ir import LayerFit
from .mixing import Mixer
from .moments import Moments
from .network import Network
from .parents import Parents
from .refit import (
    Outcome,
    describe_norm,
    settle_norm,
    settle_weight,
)
from .sampling import Sample, reads_at, rows_at, sample
from .statistics import Run, working_batch
from .targets import Aim, Targets, aims_of

FEWEST = 256  # positions whose moments are taken, where products are few


@dataclass(frozen=True)
class LeastSquares:
    """Refit every contraction by ridge least squares while sweeping forward.

    What is no single contraction of one weight (attention in one module, weights used twice) gets
    the parents' moments as in `refit.MatchMoments`.

    Attributes:
        ridges: Strengths with which weights are drawn to the coupled ones, relative to the mean
            variance of what they read; a held-out quarter of the samples chooses, and may choose
            to leave the coupled weights as they are.
        rows: Positions used per weight of a unit, at most; more cost time and change little.
        steps: Corrections by the results of an activation, where one reads the values.
        frontier: Bytes of memory for the values of all networks and samples that are still to be
            read; beyond them these lie in a temporary file until they are.
        gram: Bytes for the products of the inputs of one contraction with each other: of 2,896 by
            default. Where there are more, or more than positions, the products of that many
            positions are taken instead. Eight times this for the inputs themselves.
        outputs: Fit what writes the outputs, too. If not, it stays as it was mixed.
    """

    ridges: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    rows: int = 16
    steps: int = 1
    frontier: int = 1 << 29
    gram: int = 1 << 26
    outputs: bool = True

    @property
    def variants(self) -> tuple[LeastSquares, ...]:
        """The same without a fit of the outputs: they hold what is learned by heart, too."""
        return (replace(self, outputs=False),) if self.outputs else ()

    def settles(self, mixer: Mixer) -> dict[str, int]:
        """Return the nodes whose moments are wanted: those that are not refitted."""
        network = mixer.balanced.networks[mixer.anchor]
        _, aims = replace(self, outputs=True)._aims(network, Targets(mixer))
        refitted = {n for a in aims.values() for n in (a.producer.node, a.producer.joint)}
        return {n: d for n, d in outputs_to_settle(network).items() if n not in refitted}

    def samples(self, networks: Sequence[Network]) -> int:
        """Return how many samples may be live at once: any number."""
        return sys.maxsize

    def __call__(
        self,
        fused: Network,
        mixer: Mixer,
        plans: Sequence[NormPlan | WeightPlan],
        data: Calibration,
        samples: int,
        tick: Callable[[float], None] | None = None,
    ) -> Outcome:
        """Refit in place; see `refit.Refit`."""
        targets = Targets(mixer)
        order, aims = self._aims(fused, targets)
        size = working_batch([fused, *mixer.balanced.networks])
        given = data, samples, size
        with torch.no_grad(), Frontier(self.frontier) as frontier:
            parents = Parents(targets, order, aims, *given, frontier, self.draw)
            track = Track(fused, *given, order, frontier)
            sweep = _Sweep(self, fused, parents, track, {p.node: p for p in plans})
            for done, node in enumerate(order):
                sweep.visit(done, node, aims.get(node.name))
                if tick is not None:
                    tick((done + 1) / len(order))
            divergence = sweep.finish()
            return Outcome(tuple(sweep.layers), divergence, not self.outputs)

    def _aims(self, network: Network, targets: Targets) -> tuple[list[fx.Node], dict[str, Aim]]:
        """Return the order of the sweep, and what can be refitted."""

        def can(aim: Aim) -> bool:
            ends = aim.at, aim.producer.joint
            if aim.producer.node in targets.outputs and not self.outputs:
                return False
            return all(targets.fits(node, aim.axis_in(network)) for node in ends)

        order, aims = aims_of(network)
        return order, {name: aim for name, aim in aims.items() if can(aim)}

    def draw(self, aim: Aim, places: int, sizes: Sequence[int]) -> Sample:
        """Choose at which positions of a contraction it is fitted; see `sampling.sample`."""
        return sample(places, sizes, *self.rows_for(aim.producer.affine, places * sum(sizes)))

    def rows_for(self, affine: Affine, positions: int) -> tuple[int, int]:
        """Return how many positions to look at, and every how-manieth is one equation.

        Args:
            affine: The contraction.
            positions: How many there are.

        Returns:
            The second is 0 where there is to be one equation for each input instead.
        """
        inputs, budget = affine.weight.shape[1:].numel(), self.gram // affine.groups
        held = 8 * budget // (4 * inputs)  # rows whose inputs can be held
        if 8 * inputs**2 <= budget and inputs <= positions:
            return min(self.rows * inputs, held, positions), 0
        equations = max(min(math.isqrt(budget // 8), held, positions), 1)
        looked = min(max(min(4 * equations, held), FEWEST), positions)
        return looked, -(-looked // equations)


@dataclass(eq=False)
class _Sweep:
    """The fused network on its way."""

    choice: LeastSquares
    fused: Network
    parents: Parents
    track: Track
    waiting: dict[str, NormPlan | WeightPlan]
    layers: list[LayerFit] = field(default_factory=list)
    read: dict[str, tuple[Aim, Moments]] = field(default_factory=dict)

    def visit(self, place: int, node: fx.Node, aim: Aim | None) -> None:
        """Refit or settle a node, before it is stepped over."""
        plan = self.waiting.pop(node.name, None)
        if aim is not None and self._refit(place, node, aim):
            self.waiting.pop(aim.producer.joint, None)
        elif isinstance(plan, NormPlan):
            settle_norm(self.fused, plan, self._moments(place, plan), False)
        elif plan is not None:
            settle_weight(self.fused, plan, self._moments(place, plan))

    def _go(self, place: int, show: Callable[[int, Run], None]) -> None:
        """Take all batches to a place, and show each there."""
        for batch in range(len(self.track.sizes)):
            run, _ = self.track.go(batch, place, self._watch)
            show(batch, run)
            self.track.rest(batch)
        for aim, moments in self.read.values():
            describe_norm(self.fused, aim.producer.roles, moments)
        self.read = {}

    def _watch(self, node: fx.Node, value: Any) -> None:
        """Take the moments of what a norm reads that is to have them as its statistics."""
        if node.name in self.read:
            aim, moments = self.read[node.name]
            moments.add(value.movedim(aim.axis_in(self.fused), 0))

    def _moments(self, place: int, plan: NormPlan | WeightPlan) -> Moments:
        """Return the moments of what a node reads, if it is a norm, or gives."""
        moments, node = Moments(), self.track.order[place]

        def show(_: int, run: Run) -> None:
            if isinstance(plan, NormPlan):
                moments.add(run.value_of(plan.reads).movedim(1, 0))
            else:
                moments.add(run.peek(node).movedim(plan.axis, 0))

        self._go(place, show)
        return moments

    def _refit(self, place: int, node: fx.Node, aim: Aim) -> bool:
        """Refit one contraction; tell whether that could be done."""
        task = self._task(place, node, aim)
        if task is None:
            return False
        fit = Fit(self.fused, aim, task, self.choice.ridges)
        correction = fit(self.choice.steps)
        power = fit.whole.variance if aim.producer.biased else fit.whole.power**2
        if power.sum() > 0:
            explained = 1 - correction.error / float(power.sum())
            self.layers.append(LayerFit(node.name, explained, correction.ridge))
        if aim.producer.norm is not None:
            self.read[node.name] = aim, Moments()
        return True

    def _task(self, place: int, node: fx.Node, aim: Aim) -> Task | None:
        """Gather what a contraction reads; None if it gives values of another shape."""
        goal, affine, axis = self.parents.goal(aim), aim.producer.affine, aim.axis_in(self.fused)
        source = self.fused.inputs_of(node)[0].name
        inputs: list[Tensor] = []
        rests: list[Tensor] = []
        fits: list[bool] = []

        def show(batch: int, run: Run) -> None:
            x, at = run.value_of(source), goal.sample.at[batch]
            places = (len(x), *affine.places(tuple(x.shape[2:]))) if affine.kernel else x.shape[:-1]
            fits.append(tuple(places) == goal.shapes[batch])
            if fits[-1]:
                inputs.append(reads_at(x, affine, at))
                rests.extend([rows_at(run.value_of(aim.rest), axis, at)] if aim.rest else [])

        self._go(place, show)
        if not all(fits):
            return None
        joined = goal.sample.joined
        read = joined(inputs)
        inputs.clear()
        return Task(
            read,
            joined(goal.values),
            joined(goal.acted) if goal.acted else None,
            joined(rests) if rests else None,
            partial(self._act, place, aim),
            sum(goal.sample.fit),
            goal.sample.thin,
        )

    def _act(self, place: int, aim: Aim, value: Tensor) -> Tensor:
        """Return what the activation behind a contraction makes of values."""
        node = next(n for n in self.track.order if n.name == aim.through)
        run, _ = self.track.go(0, place)
        found = run.apply(node, self.fused.inputs_of(node)[0], value)
        self.track.rest(0)
        return found

    def finish(self) -> float | None:
        """Go to the end; return the mean divergence from the ensemble, if outputs can be logits."""
        end, total = len(self.track.order) - 1, [0.0]
        output, shares = self.track.order[end], self.parents.targets.mixer.output_weights
        able = OPEN not in self.fused.module.graph.output_node().meta

        def show(batch: int, run: Run) -> None:
            own = run.peek(output)
            if not able or not _logits(own) or math.isnan(total[0]):
                total[0] = math.nan
                return
            found = [(w, t) for w, t in zip(shares, self.parents.outputs(batch)) if w]
            mean = sum(w * t.double() for w, t in found).log_softmax(1)
            total[0] += float((mean.exp() * (mean - own.double().log_softmax(1))).sum())

        self._go(end, show)
        return None if math.isnan(total[0]) else total[0] / sum(self.track.sizes)


def _logits(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 2 and value.shape[1] > 1
