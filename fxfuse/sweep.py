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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, fx

from .composition import Affine
from .correction import HELD, Correction, Regression
from .data import Calibration
from .emit import NormPlan, WeightPlan
from .interpreter import OPEN
from .ir import LayerFit
from .least_squares import patches, rows
from .mixing import Mixer
from .moments import Moments
from .network import Network
from .parents import Parents
from .refit import (
    Outcome,
    frontier_samples,
    gain_of,
    moments_of,
    restate_norm,
    settle_norm,
    settle_weight,
    start,
    tensor_of,
)
from .statistics import Run
from .targets import Aim, Targets, aims_of

ROUNDING = 1e-5  # a target met but for this share of its spread is met
FAR = 0.5  # share of the variance of a unit's activation that its start may miss


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
        frontier: Bytes for the live values of all networks; what does not fit is left out.
        gram: Bytes for the products of the inputs of one contraction with each other: of 2,896 by
            default. Where there are more, or more than positions, the products of that many
            positions are taken instead. Eight times this for the inputs themselves.
    """

    ridges: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    rows: int = 64
    steps: int = 1
    frontier: int = 1 << 31
    gram: int = 1 << 26
    wants_moments: ClassVar[bool] = True

    def samples(self, networks: Sequence[Network]) -> int:
        """Return how many samples may be live at once."""
        return frontier_samples(networks, self.frontier // (len(networks) + 1))

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
        order, aims = aims_of(fused)
        targets = Targets(mixer)
        aims = {n: a for n, a in aims.items() if self._can(fused, a, targets)}
        sweep = _Sweep(self, fused, Parents(targets, order, aims, data, samples), order)
        sweep.runs = start(fused, data, samples, order, beside=mixer.balanced.networks)
        waiting = {p.node: p for p in plans}
        with torch.no_grad():
            for done, node in enumerate(order):
                sweep.visit(node, aims.get(node.name), waiting)
                if tick is not None:
                    tick((done + 1) / len(order))
            return Outcome(tuple(sweep.layers), sweep.divergence())

    def _can(self, fused: Network, aim: Aim, targets: Targets) -> bool:
        joint = aim.producer.joint
        return all(targets.fits(node, aim.axis_in(fused)) for node in (aim.at, joint))

    def rows_for(self, affine: Affine, positions: int) -> tuple[int, bool]:
        """Return how many positions to fit on, and whether by their products, not the inputs'.

        Args:
            affine: The contraction.
            positions: How many there are.
        """
        inputs, budget = affine.weight.shape[1:].numel(), self.gram // affine.groups
        held = 8 * budget // (4 * inputs)  # rows whose inputs can be held
        if 8 * inputs**2 <= budget and inputs <= positions:
            return min(self.rows * inputs, held, positions), False
        return max(min(math.isqrt(budget // 8), held, positions), 1), True


@dataclass(eq=False)
class _Sweep:
    """The fused network on its way."""

    choice: LeastSquares
    fused: Network
    parents: Parents
    order: Sequence[fx.Node]
    runs: list[Run] = field(default_factory=list)
    layers: list[LayerFit] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)

    def visit(self, node: fx.Node, aim: Aim | None, waiting: dict[str, Any]) -> None:
        """Refit or settle a node and step over it."""
        plan, given = waiting.pop(node.name, None), None
        if aim is not None:
            given = self._refit(node, aim)
            if given is not None:
                waiting.pop(aim.producer.joint, None)
                plan = None
        if isinstance(plan, NormPlan):
            values = [r.value_of(plan.reads) for r in self.runs]
            settle_norm(self.fused, plan, values, False)
        values = [run.step(node, value) for run, value in zip(self.runs, given or repeat(None))]
        if isinstance(plan, WeightPlan):
            settle_weight(self.fused, plan, values)
        if node.op == "output":
            self.outputs = values

    def _refit(self, node: fx.Node, aim: Aim) -> list[Tensor] | None:
        """Refit one contraction; return what it gives now, None if it cannot be refitted."""
        goals, axis = self.parents.goals(aim.at), aim.axis_in(self.fused)
        values, targets = [run.peek(node) for run in self.runs], [g.value for g in goals]
        if [t.shape for t in targets] != [v.shape for v in values]:
            return None
        acted = [g.acted for g in goals if g.acted is not None]
        if acted:
            self._revive(aim, targets, acted)
        whole = moments_of(targets, axis)
        if aim.rest is not None:
            targets = [t - run.value_of(aim.rest) for t, run in zip(targets, self.runs)]
        wanted, found = moments_of(targets, axis), moments_of(values, axis)
        gain = _gain(aim, wanted, found)
        self._scale(aim, gain, values)
        shift = (wanted.mean - gain * found.mean) * aim.producer.biased
        left = [t.sub_(v).sub_(_along(shift, v, axis)) for t, v in zip(targets, values)]
        inputs = self._inputs(node, aim, values)
        correction = self._correct(aim, inputs, left, whole)
        del targets, left
        values, mean = self._add(node, aim, correction, values), wanted.mean
        if acted:
            whole = moments_of(acted, axis)
            state = values, mean, correction
            values, mean, correction = self._descend(node, aim, inputs, acted, *state)
        spread = whole.variance.sum() if aim.producer.biased else (whole.power**2).sum()
        if spread > 0:
            explained = 1 - correction.error / float(spread)
            self.layers.append(LayerFit(node.name, explained, correction.ridge))
        self._complete(aim, wanted, mean, values)
        return values

    def _revive(self, aim: Aim, targets: list[Tensor], acted: list[Tensor]) -> None:
        """Start units within reach of what is wanted of them, in place.

        The mean of a unit that never fires and one that does can be one that never fires.
        """
        axis, through = aim.axis_in(self.fused), self._activation(aim)
        found = [run.apply(*through, target) for run, target in zip(self.runs, targets)]
        missed = moments_of([w - f for w, f in zip(acted, found)], axis).power ** 2
        lost = np.flatnonzero(missed > FAR * moments_of(acted, axis).variance)
        for target, wanted in zip(targets, acted) if len(lost) else ():
            units = torch.as_tensor(lost, device=target.device)
            target.index_copy_(axis, units, wanted.index_select(axis, units))

    def _descend(
        self,
        node: fx.Node,
        aim: Aim,
        inputs: tuple[Regression, list[Tensor]],
        acted: list[Tensor],
        values: list[Tensor],
        mean: np.ndarray,
        correction: Correction,
    ) -> tuple[list[Tensor], np.ndarray, Correction]:
        """Correct further by what the activation's results lack, as the next layers read these.

        An activation with slopes between 0 and 1 is the gradient of a convex function, so that to
        meet its results is convex too (the loss matched to it), and each step by the plain
        regression's curvature, which bounds that of the loss, descends.
        """
        axis = aim.axis_in(self.fused)
        whole = moments_of(acted, axis)
        for _ in range(self.choice.steps):
            shift = (mean - moments_of(values, axis).mean) * aim.producer.biased
            left = [
                w.sub(self._acted(run, aim, v + _along(shift, v, axis)))
                for w, v, run in zip(acted, values, self.runs)
            ]
            mean = mean + moments_of(left, axis).mean * aim.producer.biased
            correction = self._correct(aim, inputs, left, whole)
            if correction.weight is None:
                break
            values = self._add(node, aim, correction, values)
        return values, mean, correction

    def _acted(self, run: Run, aim: Aim, value: Tensor) -> Tensor:
        """Return what the activation makes of a contraction's value."""
        if aim.rest is not None:
            value = value + run.value_of(aim.rest)
        return run.apply(*self._activation(aim), value)

    def _activation(self, aim: Aim) -> tuple[fx.Node, fx.Node]:
        """Return the activation behind a contraction, and the node it reads."""
        node = next(n for n in self.order if n.name == aim.through)
        return node, self.fused.inputs_of(node)[0]

    def _inputs(
        self, node: fx.Node, aim: Aim, values: Sequence[Tensor]
    ) -> tuple[Regression, list[Tensor]]:
        """Return what a contraction reads at part of the positions, and which these are.

        Every fourth sample is held out of the fits that choose the ridge.
        """
        affine, biased = aim.producer.affine, aim.producer.biased
        total = sum(value.numel() for value in values) // affine.outputs
        wanted, by_rows = self.choice.rows_for(affine, total)
        generator, origin, seen = torch.Generator().manual_seed(0), None, 0
        source, parts, places = self.fused.inputs_of(node)[0].name, [], []
        for run, value in zip(self.runs, values):
            count = value.numel() // affine.outputs
            chosen = torch.rand(count, generator=generator) < wanted / total
            at = chosen.nonzero()[:, 0].to(value.device)
            x = patches(run.value_of(source), affine, at)
            if origin is None:
                origin = x.mean(1, keepdim=True) * biased
            sample = seen + at // (count // run.samples)
            parts.append((x - origin, sample % HELD == HELD - 1))
            places.append(at)
            seen += run.samples
        return Regression(parts, biased, by_rows), places

    def _correct(
        self, aim: Aim, inputs: tuple[Regression, list[Tensor]], left: list[Tensor], whole: Moments
    ) -> Correction:
        """Fit what is left to explain, unless that is nothing but rounding."""
        regression, places = inputs
        rests = [rows(rest, aim.producer.affine)[:, at] for rest, at in zip(left, places)]
        least = ROUNDING**2 * float((whole.power**2).sum())
        return regression.correct(rests, self.choice.ridges, least)

    def _scale(self, aim: Aim, gain: np.ndarray, values: Sequence[Tensor]) -> None:
        """Scale the units that a contraction writes, and the values it gave, in place."""
        producer = aim.producer
        weight = tensor_of(self.fused, producer.weight)
        factor = torch.as_tensor(gain).to(weight)
        along = [1] * weight.dim()
        along[int(producer.turned)] = -1
        weight.data.mul_(factor.view(along))
        if producer.bias is not None:
            tensor_of(self.fused, producer.bias).data.mul_(factor)
        for value in values:
            value.mul_(_along(gain, value, aim.axis_in(self.fused)))

    def _add(
        self, node: fx.Node, aim: Aim, correction: Correction, values: list[Tensor]
    ) -> list[Tensor]:
        """Add a correction, if there is one, to the weight; return what the node gives then."""
        if correction.weight is None:
            return values
        producer = aim.producer
        weight = tensor_of(self.fused, producer.weight)
        added = correction.weight.mT.flatten(0, 1).reshape(producer.affine.weight.shape)
        weight.data.add_((added.T if producer.turned else added).to(weight))
        return [run.peek(node) for run in self.runs]

    def _complete(
        self, aim: Aim, wanted: Moments, mean: np.ndarray, values: Sequence[Tensor]
    ) -> None:
        """Give the units a mean, and the target's spread where that counts."""
        producer, axis = aim.producer, aim.axis_in(self.fused)
        found = moments_of(values, axis)
        gain = _gain(aim, wanted, found) if aim.swing else np.ones_like(found.mean)
        if producer.norm is not None:
            restate_norm(self.fused, producer.roles, found, gain, mean)
            return
        self._scale(aim, gain, values)
        if producer.bias is not None:
            shift = mean - gain * found.mean
            bias = tensor_of(self.fused, producer.bias)
            bias.data.add_(torch.as_tensor(shift).to(bias))
            for value in values:
                value.add_(_along(shift, value, axis))

    def divergence(self) -> float | None:
        """Return the mean divergence from the ensemble, if outputs can be logits."""
        if OPEN in self.fused.module.graph.output_node().meta:
            return None
        parents = list(zip(self.parents.targets.mixer.output_weights, self.parents.finish()))
        parents, own = [(w, outputs) for w, outputs in parents if w], self.outputs
        tensors = [t for outputs in (*(o for _, o in parents), own) for t in outputs]
        if not own or not all(isinstance(t, Tensor) and t.dim() == 2 for t in tensors):
            return None
        if own[0].shape[1] < 2:
            return None
        total, count = 0.0, 0
        for i, ours in enumerate(own):
            mean = sum(w * outputs[i].double() for w, outputs in parents).log_softmax(1)
            gap = mean - ours.double().log_softmax(1)
            total, count = total + float((mean.exp() * gap).sum()), count + len(ours)
        return total / count


def _gain(aim: Aim, wanted: Moments, found: Moments) -> np.ndarray:
    one = np.ones_like(found.mean)
    if aim.producer.biased:
        return gain_of(wanted.spread, found.spread, one)
    return gain_of(wanted.power, found.power, one)


def _along(units: np.ndarray, value: Tensor, axis: int) -> Tensor:
    """Lay out one number for each unit along an axis of a value."""
    return (
        torch.as_tensor(units).to(value).view([-1 if d == axis else 1 for d in range(value.dim())])
    )
