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
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, fx

from .correction import HELD, Correction, Sums, corrected
from .data import Calibration
from .emit import NormPlan, WeightPlan
from .interpreter import OPEN
from .ir import LayerFit
from .least_squares import patches, rows
from .mixing import Mixer
from .moments import Moments
from .network import Network
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
from .targets import Aim, Targets, aims_of, inverted

ROUNDING = 1e-5  # a target met but for this share of its spread is met


@dataclass(frozen=True)
class LeastSquares:
    """Refit every contraction by ridge least squares while sweeping forward.

    What is no single contraction of one weight (attention in one module, weights used twice) gets
    the parents' moments as in `refit.MatchMoments`; so does what is wider than the budget.

    Attributes:
        ridges: Strengths with which weights are drawn to the coupled ones, relative to the mean
            variance of what they read; a held-out quarter of the samples chooses, and may choose
            to leave the coupled weights as they are.
        rows: Positions used per weight of a unit, at most; more cost time and change little.
        frontier: Bytes for the live values of all networks; what does not fit is left out.
        gram: Bytes for the products of the inputs of one contraction: 2,896 of them by default, as
            solving for more takes tens of seconds a layer.
    """

    ridges: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    rows: int = 64
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
        sweep.runs = start(fused, data, samples, order)
        waiting = {p.node: p for p in plans}
        with torch.no_grad():
            for done, node in enumerate(order):
                sweep.visit(node, aims.get(node.name), waiting)
                if tick is not None:
                    tick((done + 1) / len(order))
            return Outcome(tuple(sweep.layers), sweep.divergence())

    def _can(self, fused: Network, aim: Aim, targets: Targets) -> bool:
        affine = aim.producer.affine
        columns = affine.weight.shape[1:].numel()
        return (
            8 * affine.groups * columns**2 <= self.gram
            and targets.fits(aim.at, _axis(fused, aim))
            and targets.fits(aim.producer.joint, _axis(fused, aim))
        )


def _axis(network: Network, aim: Aim) -> int:
    return aim.producer.axis % len(network.book.shapes[aim.producer.node])


class Parents:
    """The networks on their way, a step ahead of the fused one where its targets ask for it."""

    def __init__(
        self,
        targets: Targets,
        order: Sequence[fx.Node],
        aims: dict[str, Aim],
        data: Calibration,
        samples: int,
    ) -> None:
        self.targets, self.at = targets, {a.at: a for a in aims.values()}
        networks = targets.mixer.balanced.networks
        self.orders, self.runs = [], []
        place = {node.name: i for i, node in enumerate(order)}
        for network, bypass in zip(networks, targets.bypasses):
            nodes = sorted(network.module.graph.nodes, key=lambda n: place[n.name])
            self.orders.append(nodes)
            self.runs.append(start(network, data, samples, nodes, bypass))
        self.done = 0
        self.caught: dict[str, list[Tensor]] = {}
        self.outputs: list[list[Any]] = []

    def target(self, node: str) -> list[Tensor]:
        """Return the target at a node, batch by batch; it is forgotten."""
        while node not in self.caught:
            self.advance()
        return self.caught.pop(node)

    def advance(self) -> None:
        """Take one step with all networks."""
        values = []
        for runs, order in zip(self.runs, self.orders):
            values.append([run.step(order[self.done]) for run in runs])
        node = self.orders[0][self.done]
        aim = self.at.get(node.name)
        if aim is not None:
            self.caught[node.name] = [
                self._mixed(aim, runs, batch) for runs, batch in zip(zip(*self.runs), zip(*values))
            ]
        if node.op == "output":
            self.outputs = values
        self.done += 1

    def _mixed(self, aim: Aim, runs: Sequence[Run], values: Sequence[Tensor | None]) -> Tensor:
        """Return the target of one batch from each network's value there."""
        dim = _axis(self.targets.mixer.balanced.networks[0], aim)
        where = aim.at, aim.producer.weight, dim
        mean = self.targets.mix(*where, values)
        if aim.through is None:
            return mean
        place = next(i for i, n in enumerate(self.orders[0]) if n.name == aim.through)

        def act(k: int, value: Tensor) -> Tensor:
            node = self.orders[k][place]
            return runs[k].apply(node, runs[k].network.inputs_of(node)[0], value)

        acts = [None if v is None else act(k, v) for k, v in enumerate(values)]
        return inverted(lambda t: act(0, t), self.targets.mix(*where, acts), mean)

    def finish(self) -> list[list[Any]]:
        """Go on to the end; return what each network gives for each batch."""
        while self.done < len(self.orders[0]):
            self.advance()
        return self.outputs


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
        plan = waiting.pop(node.name, None)
        if aim is not None and self._refit(node, aim):
            waiting.pop(aim.producer.joint, None)
            plan = None
        if isinstance(plan, NormPlan):
            values = [r.value_of(plan.reads) for r in self.runs]
            settle_norm(self.fused, plan, values, False)
        values = [run.step(node) for run in self.runs]
        if isinstance(plan, WeightPlan):
            settle_weight(self.fused, plan, values)
        if node.op == "output":
            self.outputs = values

    def _refit(self, node: fx.Node, aim: Aim) -> bool:
        """Refit one contraction; return whether it could be."""
        targets, axis = self.parents.target(aim.at), _axis(self.fused, aim)
        goal = moments_of(targets, axis)
        values = [run.peek(node) for run in self.runs]
        if [t.shape for t in targets] != [v.shape for v in values]:
            return False
        if aim.rest is not None:
            targets = [t - run.value_of(aim.rest) for t, run in zip(targets, self.runs)]
        wanted, found = moments_of(targets, axis), moments_of(values, axis)
        gain = _gain(aim, wanted, found)
        self._scale(aim, gain)
        left = [_left(t, v, gain, wanted, found, axis, aim) for t, v in zip(targets, values)]
        correction = self._correct(node, aim, left, goal)
        if correction.weight is not None:
            self._add(aim, correction.weight)
        spread = goal.variance.sum() if aim.producer.biased else (goal.power**2).sum()
        if spread > 0:
            explained = 1 - correction.error / float(spread)
            self.layers.append(LayerFit(node.name, explained, correction.ridge))
        del targets, left
        values = [run.peek(node) for run in self.runs]
        self._complete(aim, wanted, moments_of(values, axis))
        return True

    def _correct(
        self, node: fx.Node, aim: Aim, left: Sequence[Tensor], goal: Moments
    ) -> Correction:
        """Fit what is left to explain, on part of the positions, every fourth sample held out."""
        affine = aim.producer.affine
        sums = [Sums(aim.producer.biased) for _ in range(2)]
        total = sum(math.prod(r.shape) // affine.outputs for r in left)
        share = self.choice.rows * affine.weight.shape[1:].numel() / total
        generator, origin, seen = torch.Generator().manual_seed(0), None, 0
        for run, rest in zip(self.runs, left):
            x = patches(run.value_of(self.fused.inputs_of(node)[0].name), affine)
            rest = rows(rest, affine)
            if origin is None:
                origin = x.mean(1, keepdim=True) * aim.producer.biased
            each = x.shape[1] // run.samples
            sample = torch.arange(x.shape[1]) // each + seen
            kept = torch.rand(x.shape[1], generator=generator) < share
            for part, group in enumerate((sample % HELD != HELD - 1, sample % HELD == HELD - 1)):
                index = (kept & group).nonzero()[:, 0].to(x.device)
                sums[part].add(x[:, index] - origin, rest[:, index])
            seen += run.samples
        everything = sums[0] + sums[1]
        if float(everything.rr.sum()) <= ROUNDING**2 * everything.count * float(
            (goal.power**2).sum()
        ):
            return Correction(None, float("inf"), everything.error(everything, None))
        return corrected(sums[0], sums[1], self.choice.ridges)

    def _scale(self, aim: Aim, gain: np.ndarray) -> None:
        producer = aim.producer
        weight = tensor_of(self.fused, producer.weight)
        factor = torch.as_tensor(gain).to(weight)
        along = [1] * weight.dim()
        along[int(producer.turned)] = -1
        weight.data.mul_(factor.view(along))
        if producer.bias is not None:
            tensor_of(self.fused, producer.bias).data.mul_(factor)

    def _add(self, aim: Aim, correction: Tensor) -> None:
        producer = aim.producer
        weight = tensor_of(self.fused, producer.weight)
        added = correction.mT.flatten(0, 1).reshape(producer.affine.weight.shape)
        weight.data.add_((added.T if producer.turned else added).to(weight))

    def _complete(self, aim: Aim, wanted: Moments, found: Moments) -> None:
        """Give the units the target's mean, and its spread where that counts."""
        producer = aim.producer
        gain = _gain(aim, wanted, found) if aim.swing else np.ones_like(found.mean)
        if producer.norm is not None:
            restate_norm(self.fused, producer.roles, found, gain, wanted.mean)
            return
        self._scale(aim, gain)
        if producer.bias is not None:
            bias = tensor_of(self.fused, producer.bias)
            bias.data.add_(torch.as_tensor(wanted.mean - gain * found.mean).to(bias))

    def divergence(self) -> float | None:
        """Return the mean divergence from the ensemble, if outputs can be logits."""
        if OPEN in self.fused.module.graph.output_node().meta:
            return None
        parents, own = self.parents.finish(), self.outputs
        tensors = [t for outputs in (*parents, own) for t in outputs]
        if not own or not all(isinstance(t, Tensor) and t.dim() == 2 for t in tensors):
            return None
        if own[0].shape[1] < 2:
            return None
        total, count = 0.0, 0
        for *theirs, ours in zip(*parents, own):
            pairs = zip(self.parents.targets.mixer.weights, theirs)
            mean = sum(w * t.double() for w, t in pairs).log_softmax(1)
            gap = mean - ours.double().log_softmax(1)
            total, count = total + float((mean.exp() * gap).sum()), count + len(ours)
        return total / count


def _gain(aim: Aim, wanted: Moments, found: Moments) -> np.ndarray:
    one = np.ones_like(found.mean)
    if aim.producer.biased:
        return gain_of(wanted.spread, found.spread, one)
    return gain_of(wanted.power, found.power, one)


def _left(
    target: Tensor,
    value: Tensor,
    gain: np.ndarray,
    wanted: Moments,
    found: Moments,
    axis: int,
    aim: Aim,
) -> Tensor:
    """Return what a contraction scaled by a gain leaves of its target."""
    across = [-1 if d == axis else 1 for d in range(value.dim())]
    factor = torch.as_tensor(gain).to(value).view(across)
    left = target - factor * value
    if aim.producer.biased:
        shift = torch.as_tensor(wanted.mean - gain * found.mean).to(value)
        left -= shift.view(across)
    return left
